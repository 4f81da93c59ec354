# Needs git, make and python3 >= 3.11, nothing else. `make` lists the targets.
# The exact versions come from constraints.txt; PYTHON=python3.12 picks another interpreter, VENV=DIR another environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin
python := $(bin)/python
pip := $(python) -m pip --disable-pip-version-check
wheels := /usr/share/python-wheels
pip_by_pip = $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -m pip --python $(python) install -qq pip
pip_by_wheel = for wheel in $(wheels)/pip-*.whl; do \
	[ -e "$$wheel" ] && $(python) "$$wheel/pip" install -qq --no-index "$$wheel" && break; done
define too_old
error: jaxlm needs Python >= 3.11, and '$(PYTHON)' is not. Install one (Debian: apt-get install python3.11 \
python3.11-venv) and name it: make PYTHON=python3.11 ...
endef
define no_venv
error: '$(PYTHON)' can not make virtual environments: ensurepip, virtualenv and a pip >= 22.3 are missing or failed. \
\nInstall one of them (Debian: apt-get install python3-venv, or python3-pip) and run make again.
endef

.DEFAULT_GOAL := help
# `.venv` is a folder too: phony, so that make looks at the stamps inside.
.PHONY: remake help .venv dev torch quickstart test test-fast lint types bench clean

help: ## list the targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3.12] [VENV=DIR]'
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

.venv: $(VENV)/.run ## make the environment that runs need

# An environment that got PyTorch once keeps it up to date.
tools := $(if $(wildcard $(VENV)/.torch),$(VENV)/.torch,$(VENV)/.dev)
dev: $(tools) ## add what tests, lint and types need

torch: $(VENV)/.torch ## dev, and PyTorch for the tests and figures beside it (Python 3.11)

# The first stamp is the environment itself: one that works is kept, unless PYTHON was given and is of another version.
# The others are what was installed into it: old as soon as pyproject.toml or constraints.txt is newer.
version := import sys; print("%d.%d" % sys.version_info[:2])
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) -c '$(version)' 2>/dev/null),$(shell $(python) -c '$(version)' 2>/dev/null))
$(VENV)/.made: remake
endif
endif

# Debian's python3 lacks ensurepip without python3-venv: there the system's pip, or the one in Debian's folder of wheels,
# installs pip. `.half` marks an environment that was not made to its end, even if make was killed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { printf '%b\n' "$(too_old)" >&2; exit 1; }
	@if [ -z "$(filter remake,$^)" ] && [ ! -e $(VENV)/.half ] && $(pip) --version >/dev/null 2>&1; then exit 0; fi; \
	echo "making $(VENV) with $$($(PYTHON) --version)"; \
	rm -rf $(VENV) && mkdir -p $(VENV) && touch $(VENV)/.half || exit 1; \
	if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then $(PYTHON) -m virtualenv -q $(VENV); \
	elif command -v virtualenv >/dev/null; then virtualenv -q -p "$$(command -v $(PYTHON))" $(VENV); \
	elif $(PYTHON) -m venv --without-pip $(VENV) 2>/dev/null && { $(pip_by_pip) || $(pip_by_wheel); }; then :; \
	else rm -rf $(VENV); printf '%b\n' "$(no_venv)" >&2; exit 1; fi && rm $(VENV)/.half
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing jaxlm and what runs need into $(VENV)"
	@$(pip) install -qq -c constraints.txt -e '.[report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what tests, lint and types need into $(VENV)"
	@$(pip) install -qq -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.torch: $(VENV)/.dev
	@echo "installing PyTorch into $(VENV), if its Python is 3.11 (CONTRIBUTING.md says how to get the small CPU build)"
	@$(pip) install -qq -c constraints.txt -e '.[torch]'
	@touch $@

quickstart: $(VENV)/.run ## train a small GPT-2 on Python source, evaluate it, print a sample; again: it resumes
	@echo "== train"
	@$(python) -m jaxlm.main --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)
	@echo "== evaluate"
	@$(python) -m jaxlm.evaluate --checkpoint=runs/quickstart
	@echo "== generate"
	@$(python) -m jaxlm.generate --checkpoint=runs/quickstart --prompt="def " --max_tokens=200

test: $(tools) ## the whole test suite; ARGS="tests/optim -k decay" for a part
	@$(python) -m pytest -n 2 $(ARGS)

test-fast: $(tools) ## the tests that are quick and need no GPU
	@$(python) -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

lint: $(tools) ## ruff: rules and format
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

types: $(tools) ## mypy
	@$(python) -m mypy

bench: $(tools) ## time training and data; after `make torch` beside PyTorch
	@$(python) -m experiments.bench $(ARGS)

clean: ## remove environments, caches and build output; runs/ stays
	@rm -rf .venv .venv312 $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find jaxlm configs experiments tests -name __pycache__ -prune -exec rm -rf {} +

# Needs git, make and python3 >= 3.11, nothing else. `make` lists the targets.
# The exact versions come from constraints.txt; PYTHON=python3.12 picks another interpreter, VENV=DIR another environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin
python := $(bin)/python
pip := $(python) -m pip --disable-pip-version-check
define too_old
error: jaxlm needs Python >= 3.11, and '$(PYTHON)' is not. Install one (Debian: apt-get install python3.11 \
python3.11-venv) and name it: make PYTHON=python3.11 ...
endef
define no_venv
error: '$(PYTHON)' can not make virtual environments, and virtualenv is not installed.\n\
Install one of them (Debian: apt-get install python3-venv) and run make again.
endef

.DEFAULT_GOAL := help
# `.venv` is a folder too: phony, so that make looks at the stamps inside.
.PHONY: remake help .venv dev quickstart test test-fast lint types bench clean

help: ## list the targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3.12] [VENV=DIR]'
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

.venv: $(VENV)/.run ## make the environment that runs need

dev: $(VENV)/.dev ## add what tests, lint and types need

# The first stamp is the environment itself: one that works is kept, unless PYTHON was given and is of another version.
# The other two are what was installed into it: old as soon as pyproject.toml or constraints.txt is newer.
version := import sys; print("%d.%d" % sys.version_info[:2])
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) -c '$(version)' 2>/dev/null),$(shell $(python) -c '$(version)' 2>/dev/null))
$(VENV)/.made: remake
endif
endif

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { printf '%b\n' "$(too_old)" >&2; exit 1; }
	@if [ -z "$(filter remake,$^)" ] && $(pip) --version >/dev/null 2>&1; then exit 0; fi; \
	echo "making $(VENV) with $$($(PYTHON) --version)"; \
	rm -rf $(VENV); \
	if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then $(PYTHON) -m virtualenv -q $(VENV); \
	elif command -v virtualenv >/dev/null; then virtualenv -q -p "$$(command -v $(PYTHON))" $(VENV); \
	else printf '%b\n' "$(no_venv)" >&2; exit 1; fi
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing jaxlm and what runs need into $(VENV)"
	@$(pip) install -qq -c constraints.txt -e '.[report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what tests, lint and types need into $(VENV)"
	@$(pip) install -qq -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.run ## train a small GPT-2 on Python source, evaluate it, print a sample; again: it resumes
	@echo "== train"
	@$(python) -m jaxlm.main --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)
	@echo "== evaluate"
	@$(python) -m jaxlm.evaluate --checkpoint=runs/quickstart
	@echo "== generate"
	@$(python) -m jaxlm.generate --checkpoint=runs/quickstart --prompt="def " --max_tokens=200

test: $(VENV)/.dev ## the whole test suite; ARGS="tests/optim -k decay" for a part
	@$(python) -m pytest -n 2 $(ARGS)

test-fast: $(VENV)/.dev ## the tests that are quick and need no GPU
	@$(python) -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

lint: $(VENV)/.dev ## ruff: rules and format
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

types: $(VENV)/.dev ## mypy
	@$(python) -m mypy

bench: $(VENV)/.dev ## time training and data beside PyTorch
	@$(python) -m experiments.bench $(ARGS)

clean: ## remove environments, caches and build output; runs/ stays
	@rm -rf .venv .venv312 $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find jaxlm configs experiments tests -name __pycache__ -prune -exec rm -rf {} +

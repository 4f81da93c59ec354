"""What a study compares: its variants, its points, its trials' addresses, and what it refuses."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config, optim
from jaxlm.ablation import (
    Range,
    Study,
    study,
)
from jaxlm.errors import ConfigError
from tests.ablation.small import PEAK, small
from tests.runs import ROOT
from tests.tiny import tiny

B2 = "optimizer.scale_by_adam.b2"
TUNED = {"tuning": {PEAK: (1e-3, 1e-2)}, "tuning_seeds": (100,)}

# Metrics


def test_a_metric_with_a_minus_is_to_rise():
    """As in checkpoint.best and early_stopping.metric."""
    made = small(metric="-eval/accuracy")
    assert (made.metric, made.lower_is_better) == ("eval/accuracy", False)
    assert (small().metric, small().lower_is_better) == ("eval/loss", True)
    again = dataclasses.replace(made, question="And again?")
    assert (again.metric, again.lower_is_better) == ("eval/accuracy", False)
    assert small(metric="eval/accuracy", lower_is_better=False).metric == "eval/accuracy"


@pytest.mark.parametrize("metric", ["train/accuracy", "eval/generate/exact_match", "throughput/mfu"])
def test_a_metric_that_would_silently_be_minimised_is_refused(metric):
    with pytest.raises(ConfigError, match=f"metric is '{metric}', .*write metric='-{metric}'"):
        small(metric=metric)


# Overrides


def test_an_optimizer_is_a_spec_or_a_function_of_the_bases():
    sgd = {"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": 0.1}}
    unclipped = study.apply(tiny(), {"optimizer": lambda spec: optim.drop(spec, "clip_by_global_norm")})
    assert study.apply(tiny(), {"optimizer": sgd}).optimizer.to_dict() == sgd
    assert unclipped.optimizer.chain == tuple(tiny().optimizer.chain)[1:]
    assert unclipped.optimizer.scale_by_adam.to_dict() == tiny().optimizer.scale_by_adam.to_dict()


def test_an_optimizer_without_each_of_its_stages_is_a_study():
    without = optim.leave_one_out(tiny().optimizer.to_dict())
    ablation = small(variants={"full": {}} | without, baseline="full")
    chain = tuple(tiny().optimizer.chain)
    assert [study.arm(ablation, variant).optimizer.chain for variant in ablation.variants] == [
        chain,
        *(tuple(name for name in chain if variant != f"without {name}") for variant in without),
    ]


def test_later_overrides_go_on_top():
    sgd = {"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": 0.1}}
    variant = {"optimizer": sgd, PEAK: 0.2}
    found = study.arm(small(overrides={PEAK: 0.3, "steps": 9}, variants={"clip": variant}), "clip", {PEAK: 0.4})
    assert (found.optimizer.chain, found.optimizer.scale_by_learning_rate.peak) == (("scale_by_learning_rate",), 0.4)
    assert found.steps == 9
    assert study.apply(tiny(), variant).optimizer.scale_by_learning_rate.peak == 0.2
    assert sgd["scale_by_learning_rate"]["peak"] == 0.1


def test_numbers_may_be_numpys():
    found = study.apply(tiny(), {"steps": np.int64(9), PEAK: np.float64(0.3), "model.dropout": np.float32(0.5)})
    assert config.differences(found, tiny(steps=9, **{PEAK: 0.3, "model.dropout": 0.5})) == {}
    assert type(found.optimizer.scale_by_learning_rate.peak) is float


def test_the_callers_config_stays_as_it_is():
    base = tiny()

    def edits(spec):
        spec["scale_by_adam"]["b2"] = 0.5
        return spec

    copy = study.apply(base, {})
    copy.steps = 1
    changed = study.apply(base, {"optimizer": edits, "model.dropout": 0.1})
    changed.optimizer.scale_by_adam.b1 = 0.5
    changed.optimizer.new = {"a": 1}
    assert config.flat(base) == config.flat(tiny())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.droput": 0.1}, "unknown config field 'model.droput': did you mean 'model.dropout'?"),
        ({"model.dropout": "much"}, "model.dropout is 'much' (str); expected float"),
        ({"steps": 1.5}, "steps is 1.5 (float); expected int"),
        ({"model.dropout": 2.0}, "model.dropout is 2.0; expected at least 0 and below 1"),
        ({"optimizer": "adamw"}, "optimizer is 'adamw'; expected a spec"),
        ({"optimizer": lambda spec: spec.clear()}, "optimizer is None; expected a spec, or a function that returns"),
        ({"optimizer": lambda spec: optim.drop(spec, "scale_by_adan")}, "did you mean 'scale_by_adam'"),
        (
            {"optimizer": lambda spec: spec["scale_by_adan"]},
            "its edit of the optimizer raised KeyError: 'scale_by_adan'",
        ),
    ],
)
def test_a_wrong_override_names_its_variant(overrides, said):
    made = small(variants={"clip": {}, "odd one": overrides})
    study.arm(made, "clip")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        study.arm(made, "odd one")
    assert str(caught.value).startswith("variant 'odd one': ")


def test_a_wrong_override_of_the_base_is_refused():
    with pytest.raises(ConfigError, match="unknown config field 'step': did you mean 'steps'"):
        study.base(small(overrides={"step": 3}))


def test_the_base_may_be_a_config_file():
    assert study.base(small_of("configs/ablation.py", overrides={"steps": 3})).steps == 3
    assert study.base(small_of(Path("configs/ablation.py"), overrides={"steps": 3})).steps == 3
    with pytest.raises(ConfigError, match=r"no config file 'configs/ablaton.py': did you mean 'configs/ablation.py'"):
        study.base(small_of("configs/ablaton.py"))


@pytest.mark.parametrize("base", [None, 3, {"steps": 3}])
def test_a_base_that_is_no_config_is_refused(base):
    with pytest.raises(ConfigError, match=re.escape(f"base is {base!r}; expected a config, or the path of its file")):
        small_of(base)


def small_of(base, **fields):
    return Study("?", base=base, baseline="a", variants={"a": {}}, **fields)


# Addresses


HARMLESS = {"log.progress": True, "log.writers": ("jsonl", "tensorboard"), "log.profile": 2, "data.cache_dir": "/cache"}
SAVES = {"checkpoint.every": 3, "checkpoint.keep": 7, "checkpoint.max_failures": 9}


def address(seed=0, variant="clip", point=None, **changes):
    return study.trial(study.arm(small(**changes), "clip"), variant, seed, point).address


def test_what_no_result_depends_on_makes_no_other_trial():
    """Else a study without a progress bar would train all of its trials again."""
    for field, value in {**HARMLESS, **SAVES, "log.carbon_intensity": "FRA"}.items():
        assert address(overrides={field: value}) == address(), field
    for field, value in {"log.every": 3, "log.groups": True, "eval.every": 3, "checkpoint.best": "", PEAK: 0.1}.items():
        assert address(overrides={field: value}) != address(), field


def test_a_run_that_goes_back_to_its_checkpoints_depends_on_them():
    for field, value in SAVES.items():
        back = {"divergence.rollback_z": 5.0}
        assert address(overrides={**back, field: value}) != address(overrides=back), field


def test_the_address_of_a_trial_is_its_configs():
    assert address() == address() == address(variant="other", point={"any": 1})
    different = [address(), address(seed=1), address(**{"model__dropout": 0.1}), address(overrides={PEAK: 1.0001e-3})]
    assert len(set(different)) == len(different)


def test_the_address_does_not_depend_on_the_order_of_tables():
    tables = {"scale_by_adam": {"b1": 0.8, "b2": 0.9}, "scale_by_learning_rate": {"peak": 0.1, "final": 0.2}}
    chain = tuple(tables)
    turned = {name: dict(reversed(table.items())) for name, table in reversed(tables.items())}
    assert list(turned) != list(tables)
    specs = ({"chain": chain, **tables}, {**turned, "chain": chain})
    assert len({address(overrides={"optimizer": spec}) for spec in specs}) == 1
    assert address(overrides={"optimizer": {"chain": chain[::-1], **tables}}) != address(
        overrides={"optimizer": specs[0]}
    )


def test_an_edited_function_is_another_trial(tmp_path, monkeypatch):
    """Else a study would go on with what the code before the edit gave."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # both files are of one second and one size

    def found(text):
        (tmp_path / "edited_later.py").write_text(text)
        sys.modules.pop("edited_later", None)
        overrides = {"optimizer.chain": ("mine",), "optimizer.mine": {"transform": "edited_later:mine"}}
        return address(overrides=overrides)

    mine = "import optax\ndef mine():\n    return optax.sgd(0.1)\n"
    assert found(mine) == found(mine + "# Half would do.\n") != found(mine.replace("0.1", "0.2"))


def test_another_process_finds_the_same_address():
    script = "from tests.ablation.test_study import address; print(address(seed=3))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == address(seed=3)


def edits(spec):
    return spec


def test_a_trial_has_a_title():
    cfg = study.arm(small(), "clip")
    assert study.trial(cfg, "clip", 3).title == "clip seed=3"
    assert study.trial(cfg, "clip", 3, {PEAK: 0.0012345}).title == "clip peak=0.001234 seed=3"
    two = {"optimizer.slow.peak": 0.1, "optimizer.fast.peak": 0.2}
    assert study.trial(cfg, "clip", 3, two).title == "clip slow.peak=0.1 fast.peak=0.2 seed=3"
    named = study.trial(cfg, "clip", 3, {"optimizer": edits}).title
    assert named == "clip optimizer=<tests.ablation.test_study.edits> seed=3"


# What a study refuses


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"baseline": "clib"}, "baseline 'clib' is no variant: did you mean 'clip'?"),
        ({"variants": {}}, "baseline 'clip' is no variant"),
        ({"variants": {"clip": {}, 2: {}}}, "variant 2: expected a name, a string such as '2'"),
        ({"variants": {"clip": {}, "": {}}}, "variant '': expected a name"),
        ({"seeds": (0, 1, 0)}, "seeds=(0, 1, 0) has a seed twice"),
        ({**TUNED, "tuning_seeds": (9, 9)}, "tuning_seeds=(9, 9) has a seed twice"),
        ({"seeds": ()}, "seeds is empty"),
        ({"budget": {"token": 100}}, "budget is {'token': 100}; expected one of tokens, steps, flops, seconds"),
        ({"budget": {"tokens": 100, "steps": 2}}, "expected one of tokens"),
        ({"budget": {"tokens": 0}}, "budget is {'tokens': 0}; expected a number above 0"),
        ({"budget": {"flops": math.nan}}, "expected a number above 0"),
        ({"budget": {"flops": math.inf}}, "expected a number above 0"),
        ({"search": "optun"}, "search is 'optun': did you mean 'optuna'?"),
        ({"lanes": -1}, "lanes=-1, tuning_trials=0; expected at least 0"),
        ({**TUNED, "tuning": {"seed": (1, 2)}}, "tuning over the seed would choose luck"),
        ({**TUNED, "tuning": {PEAK: Range(1e-3, 1e-2)}}, f"tuning axis '{PEAK}' is a range, which a grid"),
        ({**TUNED, "tuning": {PEAK: ()}}, f"tuning axis '{PEAK}' is (); expected a sequence"),
        ({**TUNED, "tuning": {PEAK: 0.1}}, f"tuning axis '{PEAK}' is 0.1; expected a sequence"),
        ({**TUNED, "tuning": {PEAK: "0.1"}}, f"tuning axis '{PEAK}' is '0.1'; expected a sequence"),
        (
            {**TUNED, "tuning": {PEAK: Range(0, 1)}, "search": "random", "tuning_trials": 3},
            "expected low < high and, on a logarithmic scale, low above 0",
        ),
        ({"tuning": {PEAK: (1e-3,)}}, "tuning and tuning_seeds go together"),
        ({"tuning_seeds": (100,)}, "tuning and tuning_seeds go together"),
        ({**TUNED, "tuning_seeds": (100, 1)}, "seed 1 is one of seeds and of tuning_seeds"),
        ({**TUNED, "search": "random"}, "search='random' needs tuning_trials"),
        ({**TUNED, "search": "optuna"}, "search='optuna' needs tuning_trials"),
        (
            {**TUNED, "tuning": {"no clap": {PEAK: (1e-3,)}}},
            "tuning has axes for 'no clap', which is no variant: did you mean 'no clip'?",
        ),
        ({**TUNED, "tuning": {"b2": {"seed": (1,)}}}, "tuning over the seed"),
        ({"variants": {"clip": {}, "lucky": {"seed": 7}}}, "variant 'lucky' sets the seed"),
        ({"baseline": None}, "baseline is None; expected the name of a variant"),
        ({**TUNED, "tuning": {PEAK: {1e-3}}}, f"tuning axis '{PEAK}' is {{0.001}}; expected a sequence"),
        ({"question": 3}, "question is 3; expected text"),
        ({"variants": ["clip"]}, "variants is ['clip']; expected {name: {config field: value}}"),
        ({"variants": {"clip": {}, "b": [("steps", 3)]}}, "variant 'b' is [('steps', 3)]; expected {config field: "),
        ({"overrides": None}, "overrides is None; expected {config field: value}"),
        ({"seeds": ("0", "1")}, "seeds is ('0', '1'); expected whole numbers, such as (0, 1, 2)"),
        ({"seeds": 3}, "seeds is 3; expected whole numbers"),
        ({"seeds": (0.5, 1)}, "seeds is (0.5, 1); expected whole numbers"),
        ({**TUNED, "tuning_seeds": "9"}, "tuning_seeds is '9'; expected whole numbers"),
        ({"metric": None}, "metric is None; expected a name of metrics.jsonl, such as 'eval/loss'"),
        ({"lower_is_better": "no"}, "lower_is_better is 'no'; expected True or False"),
        ({"budget": 1000}, "budget is 1000; expected a number of one kind, such as {'tokens': 1e6}"),
        ({"budget": {"tokens": "1e6"}}, "budget is {'tokens': '1e6'}; expected a number of one kind"),
        ({**TUNED, "tuning": [PEAK]}, f"tuning is ['{PEAK}']; expected {{config field: values}}"),
        ({**TUNED, "tuning_trials": 2.5}, "tuning_trials is 2.5; expected a whole number"),
        ({"lanes": 2.5}, "lanes is 2.5; expected a whole number"),
        ({"search": None}, "search is None; expected a name"),
    ],
)
def test_a_study_that_means_nothing_is_refused(fields, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        small(**fields)


def test_a_study_that_means_something_is_not():
    small(budget={})
    small(budget={"seconds": 0.5})
    small(**TUNED)
    small(**{**TUNED, "tuning": {PEAK: Range(1e-3, 1e-2)}, "search": "halton", "tuning_trials": 3})


def test_an_arm_has_the_axes_of_all_or_its_own():
    made = small(tuning={PEAK: (1e-3, 1e-2), "b2": {B2: (0.9, 0.99)}}, tuning_seeds=(100,))
    assert (made.axes("clip"), made.axes("b2")) == ({PEAK: (1e-3, 1e-2)}, {B2: (0.9, 0.99)})


def test_a_value_that_is_given_twice_is_tried_once():
    made = small(**{**TUNED, "tuning": {PEAK: (1e-2, 1e-2, 1e-3)}})
    assert (made.points("clip"), made.tries("clip")) == ([{PEAK: 1e-2}, {PEAK: 1e-3}], 2)


# Files


GOOD = (
    "from jaxlm.ablation import Study\n\n\ndef study():\n    return Study('?', 'configs/ablation.py', 'a', {'a': {}})\n"
)


def write(folder, text):
    (folder / "decay.py").write_text(text)
    return str(folder / "decay.py")


def test_a_study_is_read_from_its_file(tmp_path):
    assert study.load(write(tmp_path, GOOD)) == small_of("configs/ablation.py")


def test_a_missing_file_names_the_nearest(tmp_path):
    near = write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {near!r}")):
        study.load(str(tmp_path / "dekay.py"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("STUDY = 3\n", "defines no study()"),
        ("def study():\n    return 3\n", "returned int; expected a jaxlm.ablation.Study"),
        ("def study():\n    return {}['a']\n", "decay.py, line 2: KeyError: 'a'"),
        ("def study()\n", "decay.py, line 1: SyntaxError"),
        (GOOD.replace("'a', {'a'", "'b', {'a'"), "baseline 'b' is no variant: known: a"),
    ],
)
def test_a_file_of_no_study_says_what_is_wrong(tmp_path, text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        study.load(write(tmp_path, text))


@pytest.mark.parametrize("kind", [np.array, list, tuple])
def test_the_values_of_an_axis_may_be_numpys(kind):
    made = small(tuning={PEAK: kind(np.geomspace(1e-3, 1e-1, 3))}, tuning_seeds=(100,))
    assert made.points("clip") == [{PEAK: pytest.approx(value)} for value in (1e-3, 1e-2, 1e-1)]
    assert {type(point[PEAK]) for point in made.points("clip")} == {float}

import math
import re
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxlm import config, config_json, config_rules
from jaxlm.errors import ConfigError
from jaxlm.optim.stages import stages

ROOT = Path(__file__).parents[1]


def changed(changes):
    """The defaults with fields set whatever their type, resolved."""
    c = config.default()
    with c.unlocked(), c.ignore_type():
        for path, value in changes.items():
            *sections, last = path.split(".")
            node = c
            for name in sections:
                node = node[name]
            node[last] = value
    return config.resolve(c)


def overridden(**changes):
    return config.resolve(config.override(config.default(), changes))


# resolve


def test_the_defaults_resolve():
    cfg = config.resolve(config.default())
    assert config.flat(cfg) == config.flat(config.default())


def test_resolving_twice_changes_nothing():
    cfg = config.resolve(config.default())
    assert config.resolve(cfg) == cfg


def test_a_resolved_config_cannot_be_changed():
    cfg = config.resolve(config.default())
    with pytest.raises(AttributeError, match="immutable"):
        cfg.steps = 3
    with pytest.raises(AttributeError, match="immutable"):
        cfg.model.dropout = 0.5
    with pytest.raises(AttributeError, match="immutable"):
        cfg.optimizer.scale_by_adam.b1 = 0.5


def test_every_rule_is_of_a_declared_field():
    assert set(config_rules.RULES) <= set(config.flat(config.default()))


@pytest.mark.parametrize(
    ("path", "near"),
    [("setps", "steps"), ("model.num_layer", "model.num_layers"), ("data.batchsize", "data.batch_size")],
)
def test_an_unknown_field_names_the_nearest(path, near):
    with pytest.raises(ConfigError, match=f"unknown config field '{path}': did you mean '{near}'"):
        changed({path: 3})


@pytest.mark.parametrize(
    ("path", "value", "kind", "expected"),
    [
        ("steps", "100", "str", "int"),
        ("steps", True, "bool", "int"),
        ("steps", 100.0, "float", "int"),
        ("steps", None, "NoneType", "int"),
        ("model.dropout", "0.1", "str", "float"),
        ("model.dropout", None, "NoneType", "float"),
        ("model.unroll", 1, "int", "bool"),
        ("model.dtype", 32, "int", "str"),
        ("log.writers", "jsonl", "str", "tuple"),
        ("optimizer.chain", "adamw", "str", "tuple"),
    ],
)
def test_a_wrong_type_is_refused(path, value, kind, expected):
    with pytest.raises(ConfigError, match=re.escape(f"{path} is {value!r} ({kind}); expected {expected}")):
        changed({path: value})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("steps", 0),
        ("steps", -5),
        ("steps_per_call", 0),
        ("model.num_layers", 0),
        ("model.num_heads", 0),
        ("model.embed_dim", 0),
        ("model.context_length", 0),
        ("model.vocab_size", -1),
        ("model.vocab_size", 2**32 - 1),
        ("model.num_layers", 10**30),
        ("model.lora.rank", 10**30),
        ("data.batch_size", 2**31),
        ("model.dropout", 1.0),
        ("model.dropout", 1 - 1e-12),  # 1 in float32
        ("model.dropout", -0.1),
        ("model.dropout", math.nan),
        ("model.dtype", "float64"),
        ("model.param_dtype", "float16"),
        ("model.attention", "flash"),
        ("model.remat", "all"),
        ("data.source", ""),
        ("data.tokenizer", ""),
        ("data.errors", "ignore"),
        ("data.batch_size", 0),
        ("data.micro_batches", 0),
        ("loss.label_smoothing", 1.0),
        ("loss.label_smoothing", -0.1),
        ("loss.z_loss", -1e-4),
        ("loss.l1", -1.0),
        ("loss.l2", math.inf),
        ("eval.every", -1),
        ("eval.batches", -1),
        ("checkpoint.every", -1),
        ("checkpoint.keep", 0),
        ("early_stopping.metric", ""),
        ("early_stopping.patience", -1),
        ("early_stopping.min_delta", -0.1),
        ("parallel.data", 0),
        ("parallel.mode", "magic"),
        ("log.every", -1),
        ("log.writers", ("jsonl", "tensorbord")),
        ("log.writers", (1,)),
        ("optimizer.chain", (1, 2)),
        ("optimizer.scale_by_learning_rate.peak", math.nan),
        ("optimizer.scale_by_learning_rate.peak", math.inf),
        ("optimizer.scale_by_learning_rate.peak", 1e39),  # infinite in float32
        ("optimizer.scale_by_adam.b1", -math.inf),
        ("optimizer.scale_by_adam.mu_dtype", np.float32),
    ],
)
def test_a_value_out_of_range_is_refused(path, value):
    with pytest.raises(ConfigError, match=re.escape(path) + " is .*; expected "):
        changed({path: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.num_heads": 3}, "model.num_heads=3 does not divide model.embed_dim=128"),
        ({"model.loss_chunks": 3}, "model.loss_chunks=3 does not divide model.context_length=128"),
        ({"data.micro_batches": 3}, "data.micro_batches=3 does not divide data.batch_size=16"),
        ({"model.attention": "cudnn", "model.dropout": 0.1}, "model.attention='cudnn' has no dropout"),
    ],
)
def test_fields_that_disagree_are_refused(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        changed(changes)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 2**32 - 1),
        ("steps", 1),
        ("model.dropout", 0.0),
        ("model.dropout", 0.99),
        ("eval.every", 0),
        ("checkpoint.every", 0),
        ("parallel.data", -1),
        ("log.writers", ()),
        ("log.writers", ["jsonl"]),
        ("optimizer.scale_by_learning_rate.peak", 1e-30),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_taken(path, value):
    taken = config.flat(changed({path: value}))[path]
    assert taken == (tuple(value) if isinstance(value, list) else value)


def test_an_int_serves_as_a_float():
    dropout = changed({"model.dropout": 0}).model.dropout
    assert dropout == 0.0 and type(dropout) is float


@pytest.mark.parametrize("path", ["steps", "model.num_layers", "optimizer.chain"])
def test_a_missing_field_is_named(path):
    c = config.default()
    *sections, last = path.split(".")
    with c.unlocked():
        del (c[sections[0]] if sections else c)[last]
    with pytest.raises(ConfigError, match=f"config field '{path}' is missing"):
        config.resolve(c)


def test_the_table_of_a_stage_that_the_chain_lacks_is_refused():
    with pytest.raises(ConfigError, match="optimizer.scale_by_adan is the table of no stage.* 'scale_by_adam'"):
        overridden(**{"optimizer.scale_by_adan.b1": 0.9})


def test_a_default_table_that_the_chain_leaves_out_is_left_out():
    cfg = overridden(**{"optimizer.chain": ("scale_by_learning_rate",)})
    assert sorted(cfg.optimizer) == ["chain", "scale_by_learning_rate"]


def test_a_stage_without_a_table_of_arguments_is_refused():
    with pytest.raises(ConfigError, match="optimizer.scale_by_adam is 5; expected a table of arguments"):
        changed({"optimizer.scale_by_adam": 5})


# override


@pytest.mark.parametrize(
    ("path", "given", "taken"),
    [
        ("steps", "100", 100),
        ("steps", "1e3", 1000),
        ("steps", 7, 7),
        ("model.dropout", "0.25", 0.25),
        ("model.dropout", "0", 0.0),
        ("model.dropout", 0, 0.0),
        ("model.unroll", "true", True),
        ("model.unroll", "False", False),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("data.source", "1e3", "1e3"),  # a string stays one
        ("data.source", "", ""),
        ("log.writers", "jsonl,wandb", ("jsonl", "wandb")),
        ("log.writers", "jsonl, wandb,", ("jsonl", "wandb")),
        ("log.writers", "('jsonl', 'wandb')", ("jsonl", "wandb")),
        ("log.writers", "jsonl", ("jsonl",)),
        ("log.writers", "", ()),
        ("optimizer.scale_by_adam.b2", "0.99", 0.99),
        ("optimizer.scale_by_adam.eps", "1", 1.0),
        ("optimizer.scale_by_adam.nesterov", "True", True),  # an argument that the defaults lack
        ("optimizer.scale_by_adam.mu_dtype", "bfloat16", "bfloat16"),
        ("optimizer.scale_by_adam.mu_dtype", "None", None),
        ("optimizer.adamw.learning_rate", "3e-4", 3e-4),  # a stage that they lack
        ("optimizer.scale_by_learning_rate.warmup", "100", 100.0),
        ("optimizer.add_decayed_weights.where", "all", "all"),
    ],
)
def test_an_override_takes_strings_and_values(path, given, taken):
    value = config.flat(config.override(config.default(), {path: given}))[path]
    assert value == taken and type(value) is type(taken)


def test_an_override_leaves_its_argument_alone():
    c = config.default()
    config.override(c, {"steps": 3, "optimizer.scale_by_adam.b1": 0.5, "optimizer.noise.eta": 0.1})
    assert config.differences(c, config.default()) == {}


def test_overrides_add_up_in_order():
    c = config.override(config.default(), {"optimizer.chain": "noise", "optimizer.noise": "{'eta': 0.1}"})
    c = config.override(c, {"optimizer.noise.eta": "0.2", "optimizer.noise.gamma": "0.5"})
    assert config.resolve(c).optimizer.to_dict() == {"chain": ("noise",), "noise": {"eta": 0.2, "gamma": 0.5}}


@pytest.mark.parametrize("names", ["decay, noise", ("decay", "noise")])
def test_a_groups_chain_is_written_as_the_chain_is(names):
    c = config.override(
        config.default(),
        {
            "optimizer.chain": "partition",
            "optimizer.partition.all.where": "all",
            "optimizer.partition.all.chain": names,
            "optimizer.decay": {"transform": "add_decayed_weights", "weight_decay": 0.1},
            "optimizer.noise": {"transform": "add_noise", "eta": 0.1, "gamma": 0.5, "key": 0},
        },
    )
    spec = config.resolve(c).optimizer.to_dict()
    assert set(spec) == {"chain", "partition", "decay", "noise"}
    (partition,) = stages(spec)
    assert [stage.name for stage in partition.groups["all"].stages] == ["decay", "noise"]


def test_a_groups_chain_of_no_names_is_refused():
    changes = {"optimizer.chain": "partition", "optimizer.partition": {"a": {"where": "all", "chain": 5}}}
    with pytest.raises(ConfigError, match="optimizer.partition.a.chain is 5; expected names of stages"):
        config.resolve(config.override(config.default(), changes))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("setps", "3", "unknown config field 'setps': did you mean 'steps'"),
        ("epochs", "3", "unknown config field 'epochs': a run is so many steps long, give steps = "),
        ("model", "3", "unknown config field 'model': "),
        ("steps.x", "3", "unknown config field 'steps.x': did you mean 'steps'"),
        ("modle.dropout", "0", "unknown config field 'modle.dropout': did you mean 'model.dropout'"),
        ("optimizer.scale_by_adam.__class__", "3", "unknown config field 'optimizer.scale_by_adam.__class__'"),
        ("optimizer.__dict__.x", "3", "unknown config field 'optimizer.__dict__.x'"),
        ("optimizer.chain.x", "3", "unknown config field 'optimizer.chain.x': 'chain' is no table"),
        ("optimizer.scale_by_adam.b1.x", "3", "unknown config field 'optimizer.scale_by_adam.b1.x': 'b1' is no table"),
        ("steps", "1.5", "steps is 1.5 (float); expected int"),
        ("steps", "many", "steps is 'many' (str); expected int"),
        ("steps", "", "steps is '' (str); expected int"),
        ("steps", "nan", "steps is nan (float); expected int"),
        ("steps", "True", "steps is True (bool); expected int"),
        ("steps", "{[]: 1}", "steps is '{[]: 1}' (str); expected int"),
        ("steps", "1e400", "steps is inf (float); expected int"),
        ("steps", None, "steps is None (NoneType); expected int"),
        ("model.dropout", "False", "model.dropout is False (bool); expected float"),
        ("model.unroll", "1", "model.unroll is 1 (int); expected bool"),
        ("model.unroll", "yes", "model.unroll is 'yes' (str); expected bool"),
        ("model.dtype", 32, "model.dtype is 32 (int); expected str"),
        ("log.carbon_intensity", 380, "log.carbon_intensity is 380 (int); expected str, such as '380'"),
        ("log.writers", "3", "log.writers is 3 (int); expected tuple"),
    ],
)
def test_a_bad_override_is_refused(path, value, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.override(config.default(), {path: value})


def without_an_optimizer(c):
    return ConfigDict({"steps": 3})


def a_number_as_a_name(c):
    c.optimizer.scale_by_adam = {1: 2}


def itself_within(c):
    c.optimizer.scale_by_adam.whole = c


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_an_optimizer, "'optimizer' is missing: start from jaxlm.config.default"),
        (a_number_as_a_name, "optimizer.scale_by_adam.1 is named by int; expected text"),
        (itself_within, "is a table in a table more than 20 times: does it hold itself?"),
    ],
)
def test_what_a_config_file_may_return_and_is_no_config(spoil, said):
    cfg = config.default()
    cfg = spoil(cfg) or cfg
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.resolve(config.override(cfg, {"steps": 3}))


def test_a_nan_override_is_refused_when_resolved():
    with pytest.raises(ConfigError, match="optimizer.scale_by_learning_rate.peak is nan; expected a finite number"):
        overridden(**{"optimizer.scale_by_learning_rate.peak": "nan"})


@given(st.sampled_from(sorted(config.flat(config.default()))), st.text(max_size=8))
@example("steps", "-" * 100_000 + "1")
@example("steps", "\0")
@settings(max_examples=50)
def test_any_text_is_a_value_or_a_config_error(path, text):
    try:
        cfg = config.resolve(config.override(config.default(), {path: text}))
    except ConfigError:
        return
    assert type(config.flat(cfg)[path]) is type(config.flat(config.default())[path]) or path.startswith("optimizer.")


# differences


def test_differences_are_named_by_path_with_both_values():
    old = config.resolve(config.default())
    new = overridden(**{"steps": 5, "optimizer.scale_by_adam.b1": 0.8, "optimizer.scale_by_adam.nesterov": True})
    assert config.differences(old, old) == {}
    assert config.differences(old, new) == {
        "optimizer.scale_by_adam.b1": (0.9, 0.8),
        "optimizer.scale_by_adam.nesterov": (None, True),
        "steps": (1000, 5),
    }
    assert config.differences(new, old)["optimizer.scale_by_adam.nesterov"] == (True, None)


# split

ON = {"model.dropout": 0.1, "loss.label_smoothing": 0.1, "loss.z_loss": 0.1, "loss.l1": 0.1, "loss.l2": 0.1}


@pytest.mark.parametrize(
    "path",
    [
        path
        for path, value in config.flat(overridden(**ON)).items()
        if type(value) is float
        and not path.startswith(("data.", "early_stopping.", "divergence."))
        and path not in ("model.norm_epsilon", "model.lora.alpha")
    ],
)
def test_configs_that_differ_in_a_traced_number_share_a_structure(path):
    one, hparams = config.split(overridden(**ON))
    other, other_hparams = config.split(
        overridden(**ON, **{path: 0.3}) if path not in ON else overridden(**{**ON, path: 0.3})
    )
    assert one == other and hash(one) == hash(other)
    assert jax.tree.leaves(hparams) != jax.tree.leaves(other_hparams)


@pytest.mark.parametrize("path", sorted(ON))
def test_whether_a_feature_is_on_is_structure(path):
    on, _ = config.split(overridden(**{path: 0.1}))
    off, _ = config.split(overridden(**{path: 0.0}))
    assert on != off


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 7},
        {"model.num_layers": 3},
        {"model.remat": "block"},
        {"model.norm_epsilon": 1e-6},
        {"model.scale_attention_by_layer": True},
        {"data.micro_batches": 2},
        {"optimizer.chain": ("scale_by_learning_rate", "scale_by_adam")},
        {"optimizer.scale_by_adam.nesterov": True},
        {"optimizer.add_decayed_weights.where": "all"},
        {"optimizer.scale_by_learning_rate.schedule": "constant"},
    ],
)
def test_what_shapes_the_program_is_structure(changes):
    assert config.split(overridden(**changes))[0] != config.split(config.resolve(config.default()))[0]


@pytest.mark.parametrize("changes", [{"seed": 5}, {"log.every": 7}, {"data.source": "x.txt"}, {"eval.every": 3}])
def test_what_does_not_shape_the_program_is_not_structure(changes):
    assert config.split(overridden(**changes))[0] == config.split(config.resolve(config.default()))[0]


def test_a_static_number_stays_in_the_structure():
    structure, hparams = config.split(config.resolve(config.default()), frozenset({"scale_by_adam.b1"}))
    assert structure.optimizer.scale_by_adam.b1 == 0.9
    assert structure.optimizer.scale_by_adam.b2 == config.TRACED
    assert sorted(hparams.optimizer["scale_by_adam"]) == ["b2", "eps"]
    other, _ = config.split(overridden(**{"optimizer.scale_by_adam.b1": 0.8}), frozenset({"scale_by_adam.b1"}))
    assert structure != other


def test_numbers_of_tables_in_tables_are_traced_in_place():
    changes = {"optimizer.chain": ("rates",), "optimizer.rates.by_group": {"norms": 0.5, "kind": "fast"}}
    structure, hparams = config.split(overridden(**changes))
    assert structure.optimizer.rates.by_group.to_dict() == {"norms": config.TRACED, "kind": "fast"}
    assert hparams.optimizer == {"rates": {"by_group": {"norms": np.float32(0.5)}}}


def test_hyperparameters_are_float32_and_hold_the_numbers():
    _, hparams = config.split(overridden(**ON))
    assert all(type(leaf) is np.float32 for leaf in jax.tree.leaves(hparams))
    assert hparams.dropout == np.float32(0.1)
    assert hparams.loss == {name: np.float32(0.1) for name in ("label_smoothing", "z_loss", "l1", "l2")}
    assert hparams.optimizer["scale_by_learning_rate"] == {
        "peak": np.float32(1e-3),
        "warmup": np.float32(0.02),
        "final": np.float32(0.1),
    }


def test_a_structure_is_frozen():
    structure, _ = config.split(config.resolve(config.default()))
    assert isinstance(structure, ml_collections.FrozenConfigDict)


def test_arguments_of_a_stage_with_a_dot_in_its_name_want_a_free_name():
    c = config.default()
    c.optimizer = {"chain": ("contrib.muon",), "contrib": {"muon": {"learning_rate": 0.1}}}
    with pytest.raises(ConfigError, match="optimizer.contrib is the table of no stage .*: name 'contrib.muon' freely"):
        config.resolve(c)


@pytest.mark.parametrize("path", ["optimizer.chain", "optimizer.partition.a.chain"])
def test_a_stage_can_t_be_called_as_the_chain_is(path):
    changes = {path: ("chain", "scale_by_adam")}
    if path != "optimizer.chain":
        changes |= {"optimizer.chain": ("partition",), "optimizer.partition.a.where": "all"}
    with pytest.raises(ConfigError, match=f"{path} is .*; 'chain' is the chain itself"):
        config.resolve(config.override(config.default(), changes))


def test_scalars_of_numpy_serve_as_numbers():
    changes = {"steps": np.int64(3), "model.dropout": np.float32(0.5), "model.unroll": np.bool_(False)}
    c = config.override(config.default(), changes | {"optimizer.scale_by_adam.b1": np.array(0.75)})
    c.optimizer.scale_by_learning_rate.peak = np.float64(1e-4)
    plain = {path: value.item() for path, value in changes.items()} | {"optimizer.scale_by_adam.b1": 0.75}
    plain["optimizer.scale_by_learning_rate.peak"] = 1e-4
    cfg = config.resolve(c)
    assert cfg == config.resolve(config.override(config.default(), plain))
    assert {type(value) for _, value in config.items(cfg)} == {bool, int, float, str, tuple}
    assert config_json.from_json(config_json.to_json(c)) == cfg


def test_what_is_no_config_is_refused():
    with pytest.raises(ConfigError, match=r"the config is 'configs/x.py'; expected .*config_file.load\(path\)"):
        config.resolve("configs/x.py")


def test_a_whole_spec_may_be_given():
    spec = {"chain": ("sgd",), "sgd": {"learning_rate": 0.1}}
    assert config.resolve(config.override(config.default(), {"optimizer": spec})).optimizer.to_dict() == spec


def test_a_function_as_an_argument_is_refused_with_a_way_out():
    c = config.override(config.default(), {"optimizer.scale_by_learning_rate": {"schedule": lambda count: 1.0}})
    with pytest.raises(ConfigError, match=r"name a schedule 'module:function', or give what takes it, made"):
        config.resolve(c)

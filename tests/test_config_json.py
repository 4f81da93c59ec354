import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config, config_json
from jaxlm.errors import ConfigError, DataError

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 10**9),
            "model.dropout": st.floats(0, 0.9),
            "model.unroll": st.booleans(),
            "data.source": st.text(min_size=1),
            "log.writers": st.lists(st.sampled_from(["jsonl", "tensorboard", "wandb"])).map(tuple),
            "optimizer.scale_by_adam.b1": NUMBERS,
            "optimizer.scale_by_adam.mu_dtype": st.sampled_from([None, "bfloat16"]),
            "optimizer.scale_by_adam.extra": st.recursive(
                NUMBERS | st.integers() | st.text() | st.booleans(),
                lambda inner: st.lists(inner).map(tuple),
                max_leaves=4,
            ),
        },
    )
)
@settings(max_examples=40)
def test_json_gives_a_config_back_equal(changes):
    c = config.default()
    with c.unlocked(), c.ignore_type():
        for path, value in changes.items():
            *sections, last = path.split(".")
            (c[sections[0]][sections[1]] if len(sections) == 2 else c[sections[0]] if sections else c)[last] = value
    cfg = config.resolve(c)
    back = config_json.from_json(config_json.to_json(cfg))
    assert back == cfg and config.differences(cfg, back) == {}
    assert list(map(type, config.flat(back).values())) == list(map(type, config.flat(cfg).values()))


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("{", DataError, "not a config: "),
        ("", DataError, "not a config: "),
        ("5", ConfigError, "not a config: it holds int"),
        ("[]", ConfigError, "not a config: it holds list"),
        ("{}", ConfigError, "config field 'optimizer.chain' is missing"),
        ('{"optimizer": 5}', ConfigError, "config field 'optimizer.chain' is missing"),
        ('{"optimizer": {"a.b": 1}}', ConfigError, "not a config: ConfigDict does not accept dots"),
        ('{"optimizer": {"chain": [], "__class__": 1}}', ConfigError, "not a config: '__class__ cannot be overridden"),
        ('{"a": ' * 300 + "1" + "}" * 300, ConfigError, "does it hold itself?"),
        ('{"optimizer": {"chain": []}, "setps": 5}', ConfigError, "did you mean 'steps'"),
    ],
)
def test_json_that_is_no_config_is_refused(text, error, said):
    with pytest.raises(error, match=re.escape(said)):
        config_json.from_json(text)


def test_json_is_checked_again():
    text = config_json.to_json(config.resolve(config.default())).replace('"steps": 1000', '"steps": NaN')
    with pytest.raises(ConfigError, match="steps is nan"):
        config_json.from_json(text)


def test_json_is_json():
    raw = json.loads(config_json.to_json(config.resolve(config.default())))
    assert raw["log"]["writers"] == ["jsonl", "tensorboard"]


def test_a_config_of_an_earlier_version_has_the_defaults_of_newer_fields():
    raw = json.loads(config_json.to_json(config.default()))
    del raw["parallel"]["deterministic"], raw["divergence"], raw["model"]["lora"]
    assert config_json.from_json(json.dumps(raw)) == config.resolve(config.default())


def test_secrets_stay_where_they_are_asked_for(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "swordfish-swordfish")
    cfg = config.resolve(config.override(config.default(), {"data.source": "/data/swordfish-swordfish/a.txt"}))
    assert "swordfish" not in config_json.to_json(cfg)
    assert config_json.from_json(config_json.to_json(cfg, secrets=True)) == cfg

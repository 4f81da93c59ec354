import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import config, config_json, redact
from jaxlm.training.explain import explain
from tests.tiny import tiny

CANARY = "Canary7c4a1f"
IN_ENVIRONMENT = {
    "MY_API_KEY": "environmental-canary",
    "AWS_ACCESS_KEY_ID": "longer than environmental-canary",
    "SOME_PASSWORD": "redacted",  # in the mark itself
    "SOME_SECRET": "ed>@host",
    "HF_TOKEN": "x<redacte",
    "SHORT_TOKEN": "a@b",
    "HF_TOKEN_PATH": "/home/me/.cache/token",
    "MAX_TOKENS": "16777216",
    "KEYBOARD_LAYOUT": "us-international",
}


@pytest.fixture(autouse=True, scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IN_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


HARMLESS = [
    "",
    "/data/books/*.txt",
    "C:\\data\\books",
    "openai-community/gpt2",
    "hf://owner/name/config:train",
    "https://example.com:8080/a?revision=main&tokens_per_step=5&tokenizer=gpt2#keys",
    "h/.*(attn|mlp)/kernel$",
    "me@example.com",
    "see https://example.com, or mail me@example.com",
    "sk-learn-datasets-20newsgroups and task-0123456789abcdef0123",
    "hf_transformers",
    "0123456789abcdef0123456789abcdef01234567",  # a commit
    "token by token, the key to it all: 0123456789",
    "bpe:8192",
    *(IN_ENVIRONMENT[name] for name in ("SHORT_TOKEN", "HF_TOKEN_PATH", "MAX_TOKENS", "KEYBOARD_LAYOUT")),
]


@pytest.mark.parametrize("s", HARMLESS)
def test_what_is_harmless_stays(s):
    assert redact.text(s) == s


@pytest.mark.parametrize(
    ("s", "expected"),
    [
        ("https://me:pass@example.com/a", "https://<redacted>@example.com/a"),
        ("s3://a:b@c@example.com", "s3://<redacted>@example.com"),
        ("git+https://abc123@example.com and me@x.org", "git+https://<redacted>@example.com and me@x.org"),
        ("https://x.org/?token=abc&page=2&api_key=d#e", "https://x.org/?token=<redacted>&page=2&api_key=<redacted>#e"),
        (
            "https://x.org/?X-Amz-Signature=abc&authToken=d",
            "https://x.org/?X-Amz-Signature=<redacted>&authToken=<redacted>",
        ),
        ('{"url": "https://x.org/?key=a\\"b"}', '{"url": "https://x.org/?key=<redacted>\\"b"}'),
        ("hf_" + 17 * "aB", "<redacted>"),
        ("sk-proj-a_b-" + 10 * "aB3" + "-_x.", "<redacted>."),
        ("'AKIAIOSFODNN7EXAMPLE'", "'<redacted>'"),
        ("ghp_" + 36 * "a" + "/github_pat_" + 22 * "a" + "_" + 59 * "b", "<redacted>/<redacted>"),
        ("WANDB_API_KEY=" + 8 * "01abc", "WANDB_API_KEY=<redacted>"),
        ('{"wandb": "' + 8 * "01abc" + '"}', '{"wandb": "<redacted>"}'),
        ("-environmental-canary-", "-<redacted>-"),
        ("longer than environmental-canary", "<redacted>"),
        ("redacted <redacted>", "<redacted> <redacted>"),
    ],
)
def test_what_is_secret_goes(s, expected):
    assert redact.text(s) == expected


PIECES = [
    "://",
    "@",
    "?token=",
    "&",
    "/",
    " ",
    "hf_",
    "sk-",
    "aB3" * 8,
    "key=",
    "0f" * 20,
    "<redacted>",
    "https://u:p@h",
]
TEXTS = st.lists(st.sampled_from([*PIECES, *HARMLESS, *IN_ENVIRONMENT.values()]) | st.text(max_size=5)).map("".join)


@given(TEXTS)
def test_twice_is_as_once(s):
    once = redact.text(s)
    assert redact.text(once) == once
    assert redact.fields(redact.fields({"a": s, "key": s})) == redact.fields({"a": s, "key": s})


@given(TEXTS, TEXTS)
def test_what_an_environment_variable_holds_never_survives(before, after):
    found = redact.text(before + "environmental-canary" + after)
    assert "environmental-canary" not in found


NAMES = ["source", "tokenizer", "tokens_per_step", "vocab", "tokens_sha256", "key_dtype", "secretary", "a"]
SECRETS = ["key", "api_key", "apiKey", "hf_token", "tokens", "client_secret", "secret_2", "PASSWORD", "aws-secret-key"]
USERS = st.text("abcXYZ019-._~!$&'()*+,;=:@%", max_size=8)
URLS = st.builds(
    "{}://{}{}{}@example.com/{}".format,
    st.sampled_from(["https", "s3", "git+ssh"]),
    USERS,
    st.just(CANARY),
    USERS,
    USERS,
) | st.builds("https://{}/a?b=c&{}={}{}".format, st.just("x.org"), st.sampled_from(SECRETS), st.just(CANARY), USERS)


def around(inner):
    name, others = (
        st.sampled_from(NAMES),
        st.dictionaries(st.sampled_from(NAMES), st.text() | st.integers(), max_size=2),
    )
    return st.builds(lambda others, name, item: {**others, name: item}, others, name, inner) | st.builds(
        lambda item, more: (more, item), inner, st.none() | st.floats()
    )


BELOW = st.recursive(st.just(CANARY), around, max_leaves=4)
UNDER = st.builds(lambda name, item: {name: item}, st.sampled_from(SECRETS), BELOW)


@given(st.recursive(URLS | UNDER, around, max_leaves=4))
def test_a_secret_never_survives_wherever_it_is(item):
    assert CANARY not in json.dumps(redact.fields({"a": item}))


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_secrets_keep_their_values(name):
    tree = {name: "a value", "key": 0, "token": None, "password": ""}
    assert redact.fields({"a": tree, "b": (tree, 1.5)}) == {"a": tree, "b": (tree, 1.5)}


def test_a_config_stays_one():
    cfg = config.resolve(config.default())
    assert redact.fields(cfg) == cfg.to_dict()
    cfg = config.resolve(tiny(data__source=f"https://me:{CANARY}@example.com", init_from="environmental-canary"))
    text = config_json.to_json(type(cfg)(redact.fields(cfg)))
    again = config_json.from_json(text)
    assert CANARY not in text and config.differences(cfg, again).keys() == {"data.source", "init_from"}
    assert again.data.source == "https://<redacted>@example.com" and redact.fields(again) == again.to_dict()


def test_explain_shows_none(tmp_path):
    shown = explain(tiny(data__cache_dir=str(tmp_path / "environmental-canary")))
    assert "environmental-canary" not in shown and str(tmp_path / "<redacted>") in shown

import json

import pytest

from jaxlm import config
from jaxlm.errors import DataError
from jaxlm.model import huggingface_config
from jaxlm.model.huggingface_config import described, fields

SMALL = {  # GPT-2 124M, as a config says it
    "num_layers": 12,
    "num_heads": 12,
    "embed_dim": 768,
    "feed_forward_dim": 0,
    "context_length": 1024,
    "vocab_size": 50257,
    "activation": "gelu_tanh",
    "norm_epsilon": 1e-5,
    "scale_attention": True,
    "scale_attention_by_layer": False,
    "tie_embeddings": True,
}
HUB = {  # and as "gpt2" on the hub does
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def section(**changes):
    c = config.default()
    c.model.update(SMALL | changes)
    return config.resolve(c).model


@pytest.fixture
def read(tmp_path):
    """(the text of config.json, or what it holds) -> its fields."""

    def run(content):
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return fields(tmp_path)

    return run


def test_the_file_of_the_hub_is_gpt2(read):
    assert read(HUB) == SMALL
    config.resolve(config.override(config.default(), {f"model.{name}": value for name, value in SMALL.items()}))


def test_what_a_file_leaves_out_is_as_in_transformers(read):
    assert read({"model_type": "gpt2"}) == SMALL


def test_every_entry_that_transformers_writes_is_known(read):
    import transformers

    theirs = transformers.GPT2Config(architectures=["GPT2LMHeadModel"], dtype="float16", pad_token_id=3).to_dict()
    assert read(theirs) == SMALL


def test_older_versions_entries_and_those_that_are_off_are_let_through(read):
    older = {"torch_dtype": "float16", "_name_or_path": "x", "gradient_checkpointing": True, "temperature": 0.7}
    off = {"quantization_config": None, "add_cross_attention": False, "pruned_heads": {}, "torchscript": False}
    assert read(HUB | older | off) == SMALL


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPT2Model"])
def test_both_architectures_are_the_same_model(read, architecture):
    assert read(HUB | {"architectures": [architecture]}) == SMALL


@pytest.mark.parametrize(("n_inner", "ours"), [(None, 0), (4 * 768, 0), (1000, 1000)])
def test_a_feed_forward_width_of_four_times_the_width_is_0(read, n_inner, ours):
    assert read(HUB | {"n_inner": n_inner}) == SMALL | {"feed_forward_dim": ours}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3, "num_heads": 2, "embed_dim": 10, "context_length": 7, "vocab_size": 11},
        {"feed_forward_dim": 17, "norm_epsilon": 1e-7, "tie_embeddings": False},
        {"scale_attention": False, "scale_attention_by_layer": True},
        *({"activation": name} for name in sorted(set(huggingface_config.ACTIVATIONS.values()))),
    ],
)
def test_what_is_written_is_read_back(read, changes):
    assert read(described(section(**changes))) == SMALL | changes


def test_dropout_and_dtype_are_written_for_others():
    out = described(section(dropout=0.25, param_dtype="bfloat16"))
    assert out["dtype"] == "bfloat16" and out["architectures"] == ["GPT2LMHeadModel"]
    assert out["embd_pdrop"] == out["attn_pdrop"] == out["resid_pdrop"] == 0.25
    assert out["n_inner"] is None and out["activation_function"] == "gelu_new"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, 'model_type is "llama"; jaxlm reads "gpt2"'),
        ({"model_type": None}, "model_type is null"),
        (
            {"architectures": ["GPT2ForSequenceClassification"]},
            r"architectures is .\"GPT2ForSeq.*reads GPT2LMHeadModel",
        ),
        ({"architectures": []}, r"architectures is \[\]"),
        ({"architectures": {"a": 1}}, r"architectures is {"),
        ({"activation_function": "quick_gelu"}, 'activation_function is "quick_gelu"; expected one of gelu_new, '),
        ({"activation_function": ["relu"]}, r"activation_function is \[\"relu\"\]"),
        ({"activation_function": None}, "activation_function is null"),
        ({"add_cross_attention": True}, "add_cross_attention is true, which jaxlm doesn't have"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantization_config is {\"load_in_4bit\": true}"),
        ({"auto_map": {"AutoModel": "code.Evil"}}, "auto_map is"),
        ({"hidden_size": 64}, "hidden_size is 64"),
        ({"rotary_dim": "x" * 999}, r"rotary_dim is \"x{70,}\.\.\., which"),
        ({"n_layer": "12"}, 'n_layer is "12"; expected a whole number from 1 to 1,000'),
        ({"n_layer": True}, "n_layer is true"),
        ({"n_layer": 12.0}, "n_layer is 12.0"),
        ({"n_layer": 10**9}, "n_layer is 1000000000"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_head": 7}, "n_head 7 does not divide n_embd 768"),
        ({"n_embd": -768}, "n_embd is -768"),
        ({"n_positions": None}, "n_positions is null"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"vocab_size": [50257]}, "vocab_size is"),
        ({"layer_norm_epsilon": "1e-5"}, 'layer_norm_epsilon is "1e-5"; expected a number above 0'),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is NaN"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is Infinity"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"scale_attn_weights": "yes"}, "scale_attn_weights is"),
        ({"scale_attn_by_inverse_layer_idx": None}, "scale_attn_by_inverse_layer_idx is null"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_jaxlm_does_not_have_is_refused_by_name_and_value(read, change, message):
    with pytest.raises(DataError, match=message):
        read(HUB | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't read .*config.json"),
        ('{"model_type": "gpt2",', "can't read .*config.json"),
        ("[" * 100_000, "can't read .*config.json"),
        ('["gpt2"]', r'holds \["gpt2"\]; expected a JSON object'),
        ("12", "holds 12; expected"),
    ],
)
def test_a_damaged_file_is_an_error(read, text, message):
    with pytest.raises(DataError, match=message):
        read(text)


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(DataError, match="can't read"):
        fields(tmp_path)


def test_a_folder_without_the_file_says_what_is_there(tmp_path):
    with pytest.raises(DataError, match="has no config.json; it holds nothing"):
        fields(tmp_path)
    for name in ("d", "c.json", "b.txt", "a", "e"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="has no config.json; it holds a, b.txt, c.json and 2 more"):
        fields(tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        fields(tmp_path / "nowhere")

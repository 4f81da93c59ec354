"""A `model` section out of the config.json of a Hugging Face folder, and into one.

The reference is transformers' GPT2Config. What a file asks for beyond `ENTRIES` is refused, not skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config_rules import LARGEST
from jaxlm.errors import DataError

NAME = "config.json"
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",  # the first of each is what we write
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Entry(NamedTuple):
    """What config.json calls a field of ours."""

    field: str
    default: Any  # GPT2Config's, where the entry is absent


ENTRIES = {
    "n_layer": Entry("num_layers", 12),
    "n_head": Entry("num_heads", 12),
    "n_embd": Entry("embed_dim", 768),
    "n_inner": Entry("feed_forward_dim", None),
    "n_positions": Entry("context_length", 1024),
    "vocab_size": Entry("vocab_size", 50257),
    "activation_function": Entry("activation", "gelu_new"),
    "layer_norm_epsilon": Entry("norm_epsilon", 1e-5),
    "scale_attn_weights": Entry("scale_attention", True),
    "scale_attn_by_inverse_layer_idx": Entry("scale_attention_by_layer", False),
    "tie_word_embeddings": Entry("tie_embeddings", True),
}

# Entries that change no logits of ours: dropout and initial values, ids and generation, heads of other tasks, how
# transformers computes or answers, and notes.
HARMLESS = re.compile(
    r"""_.*|summary_.*|(embd|attn|resid)_pdrop|initializer_range|n_ctx|n_special|predict_special_tokens
    |\w+_token_id|do_sample|(max|min)_(new_tokens|length)|num_(beams|beam_groups|return_sequences)|early_stopping
    |temperature|top_[kp]|typical_p|(encoder_)?(repetition|length|diversity)_penalty|(encoder_)?no_repeat_ngram_size
    |bad_words_ids|prefix|task_specific_params|num_labels|id2label|label2id|problem_type|finetuning_task
    |reorder_and_upcast_attn|attn_implementation|use_cache|gradient_checkpointing|dtype|torch_dtype|is_decoder
    |return_dict\w*|output_\w+|tokenizer_class|transformers_version|model_type|architectures""",
    re.VERBOSE,
)


def fields(folder: Path) -> dict[str, Any]:
    """The fields of a config's `model` section that config.json describes; those it leaves out are GPT2Config's.

    `feed_forward_dim` is 0 where it is 4 times the width, however the file says so.

    Raises:
      DataError: there is no config.json, or it is damaged, or describes what jaxlm doesn't have.
    """
    file = folder / NAME
    if not file.is_file():
        raise DataError(f"{folder} has no {NAME}; {listing(folder)}")
    raw = json_object(file)
    if raw.get("model_type") != "gpt2":
        raise DataError(f'{file}: model_type is {shown(raw.get("model_type"))}; jaxlm reads "gpt2" only')
    architectures = raw.get("architectures")
    if architectures is not None and architectures not in [[name] for name in ARCHITECTURES]:
        raise DataError(f"{file}: architectures is {shown(architectures)}; jaxlm reads {' or '.join(ARCHITECTURES)}")
    for name, value in raw.items():
        # transformers' GPT-2 doesn't look at an entry that it doesn't know, but its loading does at some, such as
        # quantization_config, pruned_heads or auto_map (the author's own code). They can't all be known, so what is
        # not listed is refused, but where it is off.
        if value and name not in ENTRIES and not HARMLESS.fullmatch(name):
            raise DataError(
                f"{file}: {name} is {shown(value)}, which jaxlm doesn't have; take it out if it changes nothing "
                "in the model"
            )
    out = {entry.field: _value(file, name, raw.get(name, entry.default)) for name, entry in ENTRIES.items()}
    if out["embed_dim"] % out["num_heads"]:
        raise DataError(f"{file}: n_head {out['num_heads']} does not divide n_embd {out['embed_dim']}")
    if out["feed_forward_dim"] in (None, 4 * out["embed_dim"]):
        out["feed_forward_dim"] = 0
    return out | {"activation": ACTIVATIONS[out["activation"]]}


DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def dropouts(folder: Path) -> dict[str, Any]:
    """The rates of dropout that a config.json names, {"attn_pdrop": 0.1, ...}; where it names none, GPT-2's."""
    raw = json_object(folder / NAME)
    return {name: raw.get(name, 0.1) for name in DROPOUTS}


def described(section: Any) -> dict[str, Any]:
    """config.json of the model of a resolved `model` section; `fields` gives its fields back."""
    out = {name: section[entry.field] for name, entry in ENTRIES.items()}
    if out["n_inner"] in (0, 4 * out["n_embd"]):
        out["n_inner"] = None
    out["activation_function"] = next(name for name, ours in ACTIVATIONS.items() if ours == section.activation)
    out |= dict.fromkeys(DROPOUTS, section.dropout)
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | out | {"dtype": section.param_dtype}


def _value(file: Path, name: str, value: Any) -> Any:
    """The value of an entry, checked."""
    field, default = ENTRIES[name]
    if limit := LARGEST.get(field):
        good = (value is None and default is None) or (type(value) is int and 1 <= value <= limit)
        expected = f"a whole number from 1 to {limit:,}"
    elif name == "activation_function":
        good, expected = isinstance(value, str) and value in ACTIVATIONS, "one of " + ", ".join(ACTIVATIONS)
    elif type(default) is bool:
        good, expected = type(value) is bool, "true or false"
    else:
        good, expected = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
    if not good:
        raise DataError(f"{file}: {name} is {shown(value)}; expected {expected}")
    return value


def json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      DataError: it can't be read, or holds no object.
    """
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"can't read {file}: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{file} holds {shown(raw)}; expected a JSON object")
    return raw


def listing(folder: Path) -> str:
    """What is in a folder that lacks something, for an error."""
    if not folder.is_dir():
        return "there is no such folder"
    return "it holds " + (some(sorted(path.name for path in folder.iterdir())) or "nothing")


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

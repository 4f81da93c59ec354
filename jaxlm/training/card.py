"""The model card of an export: what is known of a model, as the README.md that the hub shows."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from jaxlm import __version__, config_json, hub, redact, tree
from jaxlm.evals import perplexity
from jaxlm.telemetry import flops
from jaxlm.telemetry.writers import METRICS, read_jsonl
from jaxlm.training.load import Loaded, Located

_RESULTS = {
    "train/loss": "nats per token, of one batch",
    "eval/loss": "nats per token",
    "eval/perplexity": "per token",
    "eval/bits_per_byte": "of UTF-8 text",
    "eval/accuracy": "of the next token",
}
_LIBRARIES = ("jax", "flax", "optax", "numpy", "transformers")


CONFIG = "jaxlm_config.json"
"""In an export, the config of the run, beside transformers' config.json."""


class Latest(NamedTuple):
    step: int
    value: float


def card(name: str, source: str, located: Located, loaded: Loaded, weights: str = "") -> str:
    """Markdown with YAML front matter, without secrets.

    Args:
      name: the model's, as its folder is called.
      source: what was exported: a run, a folder or a hub id.
      weights: as `load` was given them.
    """
    cfg, of_run = shown(loaded), located.step is not None
    base = cfg.init_from if of_run else source
    trained = ", trained with jaxlm" if of_run else f", copied from {_code(base)}" if _is_hub_id(base) else ""
    parts = [
        _front_matter(base),
        f"# {name}",
        f"A GPT-2 language model of {_size(loaded):,} parameters{trained}.",
        _table(("", ""), _architecture(loaded)),
    ]
    if located.step is not None:
        parts += _run(cfg, located.folder, located.step, weights)
    parts += ["## Use", _use(name)]
    if of_run:
        parts += ["## Config", _AGAIN, _fold(CONFIG, config_json.to_json(cfg))]
    parts += [f"Written with {_versions()}."]
    return redact.text("\n\n".join(parts) + "\n")


def shown(loaded: Loaded) -> FrozenConfigDict:
    """The config without secrets."""
    return FrozenConfigDict(redact.fields(loaded.config))


def _front_matter(base: str) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2", "- jaxlm"]
    if _is_hub_id(base):
        lines.append(f"base_model: {json.dumps(base)}")
    lines.append("# license: yours to name, see https://huggingface.co/docs/hub/repositories-licenses")
    return "\n".join(["---", *lines, "---"])


def _is_hub_id(name: str) -> bool:
    return hub.is_id(name) and not Path(name).exists()


def _size(loaded: Loaded) -> int:
    """Numbers in the parameters that an export holds: no rows that pad the vocabulary, no low-rank products."""
    padding = flops.padding(loaded.params, loaded.config.model.vocab_size)
    return tree.size(loaded.params) - tree.size(loaded.params.get("lora", ())) - padding


def _architecture(loaded: Loaded) -> list[tuple[str, str]]:
    model = loaded.config.model
    return [
        ("layers", f"{model.num_layers}"),
        ("heads", f"{model.num_heads}"),
        ("width", f"{model.embed_dim:,}"),
        ("context", f"{model.context_length:,} tokens"),
        ("vocabulary", f"{model.vocab_size:,} ids, of which {loaded.tokenizer.end_of_text} ends a document"),
    ]


def _run(cfg: FrozenConfigDict, workdir: Path, step: int, weights: str) -> list[str]:
    """What a run recorded up to a step."""
    metrics = workdir / METRICS
    rows = read_jsonl(metrics) if metrics.exists() else []
    latest = _latest([row for row in rows if row["step"] <= step])
    B, T = cfg.data.batch_size, cfg.model.context_length
    seen = latest.get("data/tokens", Latest(0, 0))
    facts = [
        ("data", _code(cfg.data.source)),
        ("held out", _code(cfg.data.validation) if cfg.data.validation else "nothing"),
        ("tokenizer", _code(cfg.data.tokenizer)),
        ("started from", _code(cfg.init_from) if cfg.init_from else "random parameters"),
        ("steps", f"{step:,} of {cfg.steps:,}"),
        ("tokens seen", f"{int(seen.value) + (step - seen.step) * B * T:,}"),
        *((_code(name), f"{found.value:.6g}") for name, found in latest.items() if name.startswith("energy/")),
    ]
    if weights:
        facts.append(("weights", f"an average of the parameters: {_code(weights)}"))
    units = {perplexity.named(name, weights): unit for name, unit in _RESULTS.items()}
    results = [
        (_code(name), f"{latest[name].value:.4f}", unit, f"{latest[name].step:,}")
        for name, unit in units.items()
        if name in latest
    ]
    out = ["## Training", _table(("", ""), facts)]
    if results:
        out += ["## Results", _table(("metric", "value", "", "after step"), results)]
    if perplexity.named("eval/loss", weights) in latest:
        part = f"at most {cfg.eval.batches} batches of {B * T:,} tokens spread over" if cfg.eval.batches else "all of"
        out.append(f"Those of `eval/` are over {part} the held-out text, in windows that don't overlap.")
    return out


def _latest(rows: Iterable[Mapping[str, Any]]) -> dict[str, Latest]:
    """The last value of each metric, and its step."""
    return {name: Latest(row["step"], value) for row in rows for name, value in row.items()}


def _use(name: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

```python
import jaxlm

model, params, tokenizer, config = jaxlm.load("{name}")
```

```
python -m jaxlm.generate --checkpoint={name} --prompt="Once"
python -m jaxlm.evaluate --checkpoint={name} --data=FILE
```

Where text of data spells out a special token, jaxlm encodes its characters and transformers the token itself."""


_AGAIN = f"""To train it again, from `{CONFIG}`:

```python
from pathlib import Path

import jaxlm

jaxlm.train(jaxlm.config_json.from_json(Path("{CONFIG}").read_text()), "runs/again")
```"""


def _fold(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n```json\n{text}\n```\n\n</details>"


def _versions() -> str:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    return f"jaxlm {__version__}, {found} and Python {platform.python_version()}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`"

"""EleutherAI's lm-evaluation-harness on our models: its tasks, prompts and metrics, our likelihoods and texts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm.data import Tokenizer
from jaxlm.errors import ConfigError, DataError, nearest
from jaxlm.evals import generation, likelihoods
from jaxlm.evals.generation import Request
from jaxlm.evals.tasks import Result
from jaxlm.model.gpt2 import Model, PyTree

Z95 = 1.96

KNOWN = ("do_sample", "max_gen_toks", "repetition_penalty", "temperature", "top_k", "top_p", "until")
"""Of a task's `generation_kwargs`, with lm_eval's other names of `max_gen_toks`."""

SAME = {"num_beams": 1, "use_cache": True}
"""What tasks write for other models, and what changes no text of ours."""


def adapter(
    model: Model, params: PyTree, tokenizer: Tokenizer, context_length: int, batch_size: int, chunks: int = 1
) -> Any:
    """A `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`; `chunks` as `likelihoods.of_tails`.

    Long requests are treated as its `hf` model treats them: a context loses its start. But a prompt that the model's
    context can take stays whole, and its text ends where the context is full; one that it can't keeps at least half a
    context, however much text is asked for.

    Raises:
      ConfigError: lm_eval is not installed.
    """
    with _needed():
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs

    class Adapter(TemplateLM):
        max_length = context_length
        tokenizer_name = tokenizer.fingerprint  # in names of its caches

        @property
        def eot_token_id(self) -> int:
            return tokenizer.end_of_text

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            if not requests:
                return []
            sequences = [[*context, *continuation][-(context_length + 1) :] for _, context, continuation in requests]
            counted = [len(continuation) for _, _, continuation in requests]
            if (longest := max(counted)) > context_length:
                raise DataError(f"a continuation of {longest} tokens is longer than the context of {context_length}")
            nats, greedy = likelihoods.of_tails(
                model, params, sequences, counted, context_length, batch_size, chunks=chunks
            )
            return list(zip(nats.tolist(), greedy.tolist(), strict=True))

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows = [
                (i, *utils.make_disjoint_window(window))
                for i, request in enumerate(requests)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=tokenizer.end_of_text,
                    max_seq_len=context_length,
                    context_len=1,
                )
            ]
            totals = [0.0] * len(requests)
            found = self._loglikelihood_tokens([(None, context, text) for _, context, text in windows])
            for (i, _, _), (nats, _) in zip(windows, found, strict=True):
                totals[i] += nats
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            alike: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                alike.setdefault(repr(request.args[1]), []).append(i)
            for chosen in alike.values():
                asked = requested(requests[chosen[0]].args[1], normalize_gen_kwargs)
                most = min(asked.max_tokens, context_length - 1)
                kept = max(context_length - most, context_length // 2)
                prompts = [self.tok_encode(requests[i].args[0]) or [tokenizer.end_of_text] for i in chosen]
                prompts = [prompt if len(prompt) < context_length else prompt[-kept:] for prompt in prompts]
                found = generation.continued(
                    model,
                    params,
                    tokenizer,
                    prompts,
                    list(range(len(chosen))),
                    asked._replace(max_tokens=most),
                    context_length,
                    rows=batch_size,
                )
                for i, one in zip(chosen, found, strict=True):
                    texts[i] = one.text
            return texts

    return Adapter()


def requested(given: Mapping[str, Any], normalize: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Request:
    """What a task's `generation_kwargs` ask for; `normalize` is lm_eval's `normalize_gen_kwargs`.

    Raises:
      ConfigError: an argument that would change the text and isn't known here, or a value that can't be.
    """
    ours = {name: value for name, value in given.items() if name not in SAME or value != SAME[name]}
    try:
        asked = dict(normalize(ours))
        request = Request(
            max_tokens=asked["max_gen_toks"],
            temperature=float(asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0)),
            top_k=int(asked.get("top_k") or 0),
            top_p=float(asked.get("top_p") or 1.0),
            repetition_penalty=float(asked.get("repetition_penalty") or 1.0),
            stop=[stop for stop in asked["until"] if stop],
            beyond="stop",
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the harness asks for a text by {dict(given)}: {error}") from error
    if unknown := sorted(set(asked) - set(KNOWN)):
        name = unknown[0]
        raise ConfigError(
            f"the harness asks for a text by {name}={asked[name]!r}, which would be ignored; known: {', '.join(KNOWN)}"
        )
    generation.check(request)
    return request


def find(names: Sequence[str]) -> Any:
    """A `lm_eval.tasks.TaskManager` that knows tasks by their names, or paths of YAML files.

    Raises:
      ConfigError: lm_eval is not installed, or there is no such task.
      DataError: there is no such file.
    """
    with _needed():
        from lm_eval.tasks import TaskManager

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise DataError(f"--harness={file}: there is no such file")
    known = TaskManager(include_defaults=len(files) < len(names))
    for name in names:
        if name not in files and name not in known.all_tasks:
            hint = nearest(name, known.all_tasks)
            if not hint.startswith("did you mean"):
                hint = f"`lm_eval ls tasks` lists its {len(known.all_tasks):,}"
            raise ConfigError(f"the harness has no task {name!r}: {hint}")
    return known


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"--harness needs lm_eval: pip install 'jaxlm[harness]' ({error})") from error


def run(
    model: Model,
    params: PyTree,
    tokenizer: Tokenizer,
    names: Sequence[str],
    known: Any,
    *,
    context_length: int,
    batch_size: int,
    chunks: int = 1,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> Result:
    """What tasks of the harness give, under their names; intervals are 1.96 of its standard errors.

    Args:
      names: of its tasks, groups or tags, or paths of its YAML files.
      known: what `find` gives for them.
      num_fewshot: examples in the prompt, from 0; None as each task says.
      limit: so many of a task's documents, from 1; None for all.

    Raises:
      ConfigError: a task asks for what we don't do.
      DataError: a task's data can't be had.
    """
    lm = adapter(model, params, tokenizer, context_length, batch_size, chunks)
    import lm_eval

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it is about
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(names),
                task_manager=known,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                torch_random_seed=None,
            )
    except (ConfigError, DataError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # of a task's file, its data set, the network
        lines = str(error).strip().splitlines() or [""]
        raise DataError(f"--harness={' '.join(names)}: {type(error).__name__}: {lines[0]}") from error
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            name = f"{task}/{metric}" + ("" if kept == "none" else f"/{kept}")
            metrics[name] = float(value)
            spread = row.get(f"{metric}_stderr,{kept}")
            if isinstance(spread, (int, float)):
                intervals[name] = (value - Z95 * spread, value + Z95 * spread)
    details = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
    return Result(metrics, intervals, details)

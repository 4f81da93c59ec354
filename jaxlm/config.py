"""A run is a function of its config: every knob declared once, checked once, then frozen.

configs/x.py + --config.a.b=v  ->  config_file.load, override  ->  resolve  ->  split  ->  (structure, hparams)
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config_rules import checked, finite, number, storable
from jaxlm.errors import ConfigError, nearest

TRACED = "<traced>"
"""Stands in a structure where a number was moved to the hyperparameters."""


_DEEPEST = 20  # tables in a table

_ELSEWHERE = {
    name: "a run is so many steps long, give steps = epochs x the steps of an epoch, which its start line tells"
    for name in ("epochs", "num_epochs", "num_train_epochs")
}
"""What other libraries' fields are here, where no name is near."""


class Hparams(NamedTuple):
    """The numbers that an ablation turns, all float32 scalars: arguments of the step, never constants in it.

    Leaves may carry a leading lane axis under `jax.vmap`.
    """

    dropout: Any
    loss: dict[str, Any]  # label_smoothing, z_loss, l1, l2
    optimizer: dict[str, Any]  # stage name -> argument name -> number


def default() -> ConfigDict:
    """The complete config: every field that exists, with its default. Runs edit a copy of it."""
    c = ConfigDict()

    c.seed = 0  # initial parameters, order of the data, dropout
    c.steps = 1000  # optimizer steps of the whole run; the schedule ends here
    c.steps_per_call = 1  # optimizer steps per dispatch, by scan: worth raising for small models
    c.strict = False  # what is almost surely wrong in an optimizer is an error, not a warning
    # Where initial parameters come from: a run directory or one step of it, a Hugging Face directory, or a hub id such
    # as "gpt2"; "" draws them from the seed. The architecture, model.num_layers to model.tie_embeddings, is then the
    # source's and best left out, but for context_length and vocab_size; data.tokenizer="bytes" means its tokenizer.
    c.init_from = ""
    # With init_from, a run of jaxlm: begin as a branch of it, with its optimizer state, at its step and, on the same
    # data, with the batches that come next. Rates, schedules and data may be others; what shapes the state may not.
    c.init_state = False

    c.model = ConfigDict()
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.embed_dim = 128
    # T: positions that the model knows, and the length of a training sequence. With init_from, 0: the source's; another
    # number cuts its positions, or adds some that are drawn from the seed.
    c.model.context_length = 128
    # 0: as many ids as the tokenizer has; with init_from, as the source has. There another number cuts its ids, or adds
    # some that get the mean of the old ones.
    c.model.vocab_size = 0
    c.model.feed_forward_dim = 0  # F; 0: 4 times embed_dim
    c.model.activation = "gelu_tanh"  # GPT-2's; "gelu", "relu", "silu"
    c.model.norm_epsilon = 1e-5  # of layer norms
    c.model.scale_attention = True  # scores over the square root of the head dimension
    c.model.scale_attention_by_layer = False  # and over the layer's number, from 1: as Stanford's Mistral GPT-2s
    c.model.tie_embeddings = True  # the head is the token embedding; False: lm_head/kernel, a matrix of its own
    c.model.dropout = 0.0  # on embeddings, attention probabilities and residual branches
    c.model.dtype = "float32"  # of the computation; softmax, loss and norm statistics stay float32
    c.model.param_dtype = "float32"
    c.model.attention = "auto"  # "cudnn", "blockwise", or the first of these that serves
    c.model.loss_chunks = 1  # parts of T whose logits are in memory at a time; 0: all, in float32, by autodiff
    c.model.remat = "none"  # recompute in the backward pass: "none", all but "dots", or each "block"
    c.model.lora = ConfigDict()  # low-rank adaptation, see model/lora.py: freeze the rest in the optimizer
    c.model.lora.rank = 0  # 0: none
    c.model.lora.alpha = 16.0  # the products are multiplied by alpha / rank
    c.model.lora.where = "attn/c_attn/kernel$"  # the matrices, by path
    c.model.unroll = True  # layers one after another: faster, on GPUs with less memory; a loop of them compiles faster

    c.data = ConfigDict()
    # "stdlib", a file, glob or folder of text, a .bin token file, hf://name[:split], package.module:function
    c.data.source = "stdlib"
    c.data.validation = "5%"  # a share of the documents, held out; or a source of its own; "" for none
    c.data.tokenizer = "bytes"  # "bytes", "chars", "bpe:SIZE", a tokenizer.json, a Hugging Face directory or id
    c.data.format = "text"  # or "pairs": each row of a table is a prompt and its completion
    c.data.text_field = "text"  # column of .jsonl, .csv, .parquet and hf:// that holds the text
    c.data.prompt = "{prompt}"  # of a pair: a template, in which {name} stands for the text of that column
    c.data.completion = "{completion}"  # the same; an end of text follows it
    c.data.loss_on = "completions"  # or "all": the prompts' tokens count as well
    c.data.too_long = "cut"  # a pair that is longer than the context: "cut" its prompt on the left, "drop", "error"
    c.data.errors = "strict"  # text that is not UTF-8: "strict" stops, "replace" goes on with U+FFFD
    # Several pairs, or documents, in a row of T: attention stays within each, and positions begin anew. Without it a
    # pair has a row to itself, and documents follow each other as one text.
    c.data.pack = False
    c.data.token_dropout = 0.0  # share of the inputs of training that are replaced by tokens drawn from its text
    c.data.crop = 0.0  # up to this share of a prompt is cut on the left in training, other shares in each epoch
    c.data.batch_size = 16  # B: sequences per optimizer step over all devices
    # A batch is computed in so many parts, in evaluation too; the numbers stay the same, but SOAP magnifies rounding.
    c.data.micro_batches = 1
    c.data.cache_dir = ""  # of token files; "": jaxlm in the user's cache directory

    c.optimizer = ConfigDict()
    c.optimizer.chain = ("clip_by_global_norm", "scale_by_adam", "add_decayed_weights", "scale_by_learning_rate")
    c.optimizer.clip_by_global_norm = {"max_norm": 1.0}
    c.optimizer.scale_by_adam = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
    c.optimizer.add_decayed_weights = {"weight_decay": 0.1, "where": "kernels"}
    c.optimizer.scale_by_learning_rate = {"peak": 1e-3, "schedule": "warmup_cosine", "warmup": 0.02, "final": 0.1}

    c.loss = ConfigDict()
    c.loss.label_smoothing = 0.0  # share of the target's probability spread over the vocabulary
    c.loss.z_loss = 0.0  # times log(Z)^2 per token
    c.loss.l1 = 0.0  # times the sum of |w| over the kernels that train
    c.loss.l2 = 0.0  # times half the sum of w^2 over the kernels that train

    c.eval = ConfigDict()
    c.eval.every = 200  # steps between evaluations, and one at the end; 0: never
    c.eval.batches = 20  # batches of validation data each time; 0: the whole split
    # On held-out pairs: "generate", "classify", "classify_by_length", "choice", or a package.module:function;
    # "perplexity" is always reported.
    c.eval.tasks = ()

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps between checkpoints, and one at the end; 0: never, not at the end either
    c.checkpoint.keep = 2  # so many of the latest stay
    c.checkpoint.best = "eval/loss"  # and the one where this metric is lowest, or of "-name" highest; "": none
    c.checkpoint.max_failures = 3  # so many saves that fail one after another stop the run; fewer are warned of

    c.early_stopping = ConfigDict()
    c.early_stopping.metric = "eval/loss"  # is to fall; "-name" is to rise
    c.early_stopping.patience = 0  # stop after so many evaluations without improvement; 0: never
    c.early_stopping.min_delta = 0.0  # how much lower counts as an improvement

    c.divergence = ConfigDict()  # a step whose loss, gradient or update is not finite changes no parameter
    c.divergence.max_bad_steps = 10  # so many of them in a row stop the run, with exit code 3
    # A loss so many standard deviations above the mean of the `window` losses before it sends the run back to its
    # latest checkpoint, to go on with the batches after that loss's; 0: never. (To skip such steps: skip_spikes.)
    c.divergence.rollback_z = 0.0
    c.divergence.window = 100
    c.divergence.max_rollbacks = 3  # one more stops the run, with exit code 3

    c.parallel = ConfigDict()
    c.parallel.mode = "jit"  # or "pmap": all parameters on each device, `data` devices, of one process
    # Devices are data x fsdp x tensor. A batch's rows are divided over data and fsdp; parameters and optimizer state
    # over fsdp, by width, and tensor, by heads, feed-forward and vocabulary. The numbers stay the same, but SOAP
    # magnifies rounding.
    c.parallel.data = -1  # -1: as many as there are
    c.parallel.fsdp = 0  # 0: as few as a step is estimated to fit on
    c.parallel.tensor = 1
    # The same bits in each run on the same kind of GPU: no sum in an order of arrival, no algorithm chosen by its time.
    # On a CPU they are the same anyway. (XLA's xla_gpu_deterministic_ops.)
    c.parallel.deterministic = False

    c.log = ConfigDict()
    c.log.every = 10  # steps between rows of train metrics, of which the last step has one too; 0: never
    c.log.writers = ("jsonl", "tensorboard")  # and "wandb"
    c.log.groups = False  # norms and sparsity of kernels, embeddings, norms and biases, each in the train metrics
    c.log.energy = "counter"  # joules by NVML or RAPL where there is one; "estimate": else codecarbon's; "off"
    c.log.carbon_intensity = ""  # grams of CO2e per kWh, or a country, as "FRA", by codecarbon's data; "": not told
    c.log.profile = 0  # so many steps are traced by jax.profiler, once all is compiled
    c.log.progress = True  # a bar in a terminal, plain lines elsewhere

    c.lock()
    c.optimizer.unlock()  # stages may be added; optim.chain checks them
    return c


def items(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as ("a.b.c", value), in the order of their keys.

    Raises:
      ConfigError: a key is no text, or the mappings go down without end.
    """
    if prefix.count(".") > _DEEPEST:
        raise ConfigError(f"{prefix[:40]}... is a table in a table more than {_DEEPEST} times: does it hold itself?")
    for key, value in cfg.items():
        if not isinstance(key, str):
            raise ConfigError(f"{prefix or 'the config: '}{key!r} is named by {type(key).__name__}; expected text")
        if isinstance(value, (Mapping, ConfigDict)):
            yield from items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b.c": value} of nested mappings."""
    return dict(items(cfg))


def resolve(cfg: ConfigDict | FrozenConfigDict) -> FrozenConfigDict:
    """Checks names, types and ranges of every field, and freezes.

    Optimizer stages are checked against their functions by `jaxlm.optim.chain`, which knows them.

    Raises:
      ConfigError: naming the field, what it is, what was expected and the nearest valid name.
    """
    if not isinstance(cfg, (Mapping, ConfigDict)):
        raise ConfigError(f"the config is {cfg!r}; expected a ConfigDict; of a file: jaxlm.config_file.load(path)")
    declared = {path: value for path, value in items(default()) if not path.startswith("optimizer.")}
    given = flat(cfg)
    out: dict[str, Any] = {"optimizer": _stages(cfg.get("optimizer", {}))}
    for path in given:
        if path not in declared and not path.startswith("optimizer."):
            raise ConfigError(f"unknown config field {path!r}: {nearest(path, declared)}")
    for path, value in declared.items():
        if path not in given:
            raise ConfigError(f"config field {path!r} is missing: start from jaxlm.config.default()")
        *sections, last = path.split(".")
        node = out
        for name in sections:
            node = node.setdefault(name, {})
        node[last] = checked(path, given[path], value)

    model, data = out["model"], out["data"]
    if model["attention"] == "cudnn" and model["dropout"]:
        raise ConfigError("model.attention='cudnn' has no dropout; set model.dropout=0 or model.attention='auto'")
    if not model["context_length"] and not out["init_from"]:
        raise ConfigError("model.context_length is 0; expected at least 1, or init_from, whose length 0 takes over")
    if model["embed_dim"] % model["num_heads"] and not out["init_from"]:  # these are then the source's
        raise ConfigError(f"model.num_heads={model['num_heads']} does not divide model.embed_dim={model['embed_dim']}")
    if out["init_state"] and not out["init_from"]:
        raise ConfigError("init_state=True begins with the state of another run: name it, as init_from")
    chunks, length = model["loss_chunks"], model["context_length"]
    if chunks and length % chunks:
        raise ConfigError(f"model.loss_chunks={chunks} does not divide model.context_length={length}")
    if data["crop"] and data["format"] != "pairs":
        raise ConfigError("data.crop cuts prompts, of data.format='pairs'; text is cut anew in each epoch anyway")
    if data["batch_size"] % data["micro_batches"]:
        raise ConfigError(
            f"data.micro_batches={data['micro_batches']} does not divide data.batch_size={data['batch_size']}"
        )
    return FrozenConfigDict(out)


def _stages(section: Mapping[str, Any]) -> dict[str, Any]:
    """The chain and the tables of its stages. Tables of the defaults that the chain doesn't name are left out."""
    if not isinstance(section, (Mapping, ConfigDict)) or "chain" not in section:
        raise ConfigError("config field 'optimizer.chain' is missing: a tuple of stage names")
    chain = stage_names("optimizer.chain", checked("optimizer.chain", plain(section["chain"]), ()))
    groups = ((path, value) for path, value in items(section, "optimizer.") if path.count(".") == 3)
    used = {*chain, *(name for path, value in groups if path.endswith(".chain") for name in stage_names(path, value))}
    out: dict[str, Any] = {"chain": chain}
    for stage, table in section.items():
        if stage in used:
            if not isinstance(table, (Mapping, ConfigDict)):
                raise ConfigError(
                    f"optimizer.{stage} is {table!r}; expected a table of arguments, such as {{'b1': 0.9}}"
                )
            out[stage] = plain(table)
            for path, value in items(out[stage], f"optimizer.{stage}."):
                storable(path, value)
                finite(path, value)
        elif stage not in default().optimizer:
            dotted = next((name for name in chain if name.startswith(f"{stage}.")), None)
            how = f"name {dotted!r} freely, with a table that has 'transform': {dotted!r}" if dotted else ""
            raise ConfigError(
                f"optimizer.{stage} is the table of no stage in optimizer.chain: {how or nearest(stage, chain)}"
            )
    return out


def stage_names(path: str, chain: Any) -> tuple[str, ...]:
    """The names in a chain; in that of a group, "a,b" from a flag too.

    Raises:
      ConfigError: it holds anything else.
    """
    names = _separate(chain) if isinstance(chain, str) else chain
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path} is {chain!r}; expected names of stages, such as ('scale_by_adam', 'scale')")
    if "chain" in names:  # a stage's table stands where its name says
        raise ConfigError(f"{path} is {tuple(names)!r}; 'chain' is the chain itself, and can't be the name of a stage")
    return tuple(names)


def _separate(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def plain(value: Any) -> Any:
    """Nested mappings as plain dicts, lists as tuples, scalars of NumPy as Python's."""
    if isinstance(value, (Mapping, ConfigDict)):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return tuple(plain(item) for item in value)
    return number(value)


def override(cfg: ConfigDict | FrozenConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of `cfg` with dotted fields replaced: `{"steps": 100, "optimizer.scale_by_adam.b2": "0.99"}`, or with
    another spec as its whole "optimizer".

    A string for a field that isn't one is read as a Python literal. Stages and arguments of the optimizer may be
    new; all other fields must exist.

    Raises:
      ConfigError: an unknown field, or a value that is not of the field's type.
    """
    out = ConfigDict(cfg).copy_and_resolve_references()
    if not isinstance(out.get("optimizer"), ConfigDict):
        raise ConfigError("config field 'optimizer' is missing: start from jaxlm.config.default()")
    for path, value in changes.items():
        if path == "optimizer" and isinstance(value, (Mapping, ConfigDict)):
            with out.unlocked(), out.ignore_type():
                out.optimizer = ConfigDict(plain(value))
            continue
        known = flat(out)
        old = known.get(path)
        if old is None and (not path.startswith("optimizer.") or ".__" in path):  # which Python has its own for
            raise ConfigError(f"unknown config field {path!r}: {_ELSEWHERE.get(path) or nearest(path, known)}")
        value = _literal(value, old) if isinstance(value, str) and not isinstance(old, str) else number(value)
        if old is not None:
            out_value = float(value) if type(old) is float and type(value) is int else value
            # warmup=0.02 or =100, mu_dtype=None or "bfloat16": the optimizer's own checks know what an argument takes
            if type(out_value) is not type(old) and not path.startswith("optimizer."):
                checked(path, value, old)
            value = out_value
        with out.unlocked():
            *parents, last = path.split(".")
            node = out
            for name in parents:
                if node.get(name) is None:
                    node[name] = ConfigDict()
                node = node[name]
                if not isinstance(node, ConfigDict):
                    raise ConfigError(f"unknown config field {path!r}: {name!r} is no table; {nearest(path, known)}")
            with node.ignore_type():
                node[last] = value
    out.optimizer.unlock()  # as in `default`
    return out


def _literal(text: str, old: Any) -> Any:
    if isinstance(old, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
        return int(value) if type(old) is int and type(value) is float and value.is_integer() else value  # 1e3
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # whatever literal_eval may raise
        if isinstance(old, tuple):  # a,b,c for a tuple of names
            return _separate(text)
        if text.lower() in ("nan", "inf", "-inf", "+inf"):
            return float(text)
        return text


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{"a.b": (old value, new value)} where two configs differ; None where a field is absent."""
    a, b = flat(old), flat(new)
    return {path: (a.get(path), b.get(path)) for path in sorted(a | b) if a.get(path) != b.get(path)}


def split(cfg: FrozenConfigDict, static: frozenset[str] = frozenset()) -> tuple[FrozenConfigDict, Hparams]:
    """Parts a resolved config into what shapes the program and the numbers that it takes.

    The structure is hashable; configs with equal structures share one compiled program. Whether a feature is on
    (dropout zero or not) is structure, how much of it is a number.

    Args:
      cfg: from `resolve`.
      static: dotted paths below `optimizer` of floats that their transform can't take traced; see
        `jaxlm.optim.static.static_arguments`, and `jaxlm.training.step.split`, which puts the two together.
    """

    def mark(value: float) -> Any:
        return TRACED if value else 0.0

    def part(table: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
        shape: dict[str, Any] = {}
        numbers: dict[str, Any] = {}
        for key, value in table.items():
            if isinstance(value, (Mapping, ConfigDict)):
                shape[key], inner = part(value, f"{prefix}{key}.")
                if inner:
                    numbers[key] = inner
            elif type(value) is float and prefix + key not in static:
                shape[key], numbers[key] = TRACED, np.float32(value)
            else:
                shape[key] = value
        return shape, numbers

    optimizer, optimizer_numbers = part(cfg.optimizer, "")
    structure = {
        "steps": cfg.steps,
        "groups": cfg.log.groups,
        "micro_batches": cfg.data.micro_batches,
        "model": {**cfg.model.to_dict(), "dropout": mark(cfg.model.dropout)},
        "loss": {key: mark(value) for key, value in cfg.loss.items()},
        "optimizer": optimizer,
    }
    hparams = Hparams(
        dropout=np.float32(cfg.model.dropout),
        loss={key: np.float32(value) for key, value in cfg.loss.items()},
        optimizer=optimizer_numbers,
    )
    return FrozenConfigDict(structure), hparams

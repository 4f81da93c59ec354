"""GPT-2's parameters in and out of a Hugging Face folder. What its config.json says is `huggingface_config`'s story.

The reference is what transformers' GPT2LMHeadModel makes of the same folder. Nothing is unpickled and no code is run.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jaxlm import tree
from jaxlm.errors import DataError
from jaxlm.model import gpt2
from jaxlm.model import huggingface_config as description

PyTree = Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ALIGNMENT = 64  # bytes
DTYPES = ("F32", "BF16", "F16", "F64")
BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which old checkpoints hold too


def read(folder: Path, section: Any) -> PyTree:
    """The parameters in model.safetensors, or in the files that its index names, of whatever float type they are.

    Beside the parameters themselves, host memory holds one tensor at a time.

    Args:
      section: a resolved `model` section that agrees with `huggingface_config.fields(folder)`.

    Returns:
      NumPy arrays in `section.param_dtype`, layers stacked, what pads the vocabulary zero. `jax.device_put` makes
      them arrays on the CPU without a copy.

    Raises:
      DataError: there are no safetensors, or they are damaged, or don't hold exactly these tensors, or not as finite
        numbers; or a head that config.json ties to the embedding differs from it.
    """
    with contextlib.ExitStack() as stack:
        stored = _stored(stack, _weight_files(folder))
        tied = stored.pop("lm_head.weight", None) if section.tie_embeddings else None
        shapes = gpt2.shapes(section)
        unallocated = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)
        _check(folder, stored, tensors(unallocated, section.vocab_size))
        params = jax.tree.map(_zeros, shapes)
        for name, place in tensors(params, section.vocab_size).items():
            with np.errstate(over="ignore"):  # of a wider type: infinity is refused below
                place[...] = stored[name].get()
            if not np.all(np.isfinite(place)):
                raise DataError(f"{name} in {stored[name].path} holds numbers that are not finite in {place.dtype}")
        if tied:
            embedding = params["wte"]["embedding"][: section.vocab_size]
            if not np.array_equal(tied.get().astype(embedding.dtype), embedding):
                # transformers 5 warns and does not tie them, older ones drop the head: no one knows what was meant
                raise DataError(
                    f"lm_head.weight in {tied.path} differs from wte.weight, but {description.NAME} ties them: "
                    'set "tie_word_embeddings" to false there, or take the tensor out'
                )
    return params


def write(folder: Path, params: PyTree, section: Any, *, special_ids: Mapping[str, int]) -> None:
    """Writes what `GPT2LMHeadModel.from_pretrained(folder)` reads: config.json, generation_config.json and
    model.safetensors. `read` gives the same bits back.

    Args:
      folder: exists; better a new one, that takes its name when all is in it.
      params: as `read` returns them, or on a device.
      section: the resolved `model` section that they belong to.
      special_ids: {"bos_token_id": ..., "eos_token_id": ...}, of the tokens that begin and end a text, and of others.

    Raises:
      OSError: the folder can't be written.
    """
    ids = dict(special_ids)
    for name, value in ((description.NAME, description.described(section) | ids), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    host = tensors(jax.tree.map(np.asarray, params), section.vocab_size)
    # views still, but for a head of its own, which is transposed: safetensors would not see the strides
    host = {name: np.ascontiguousarray(array) for name, array in host.items()}
    try:
        safetensors.numpy.save_file(host, folder / WEIGHTS, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"can't write {folder / WEIGHTS}: {error}") from error
    shutil.copymode(folder / description.NAME, folder / WEIGHTS)  # safetensors lets no one but the owner read it


def tensors(params: PyTree, vocab_size: int) -> dict[str, np.ndarray]:
    """Views of our arrays, NumPy's, as GPT2LMHeadModel names and shapes them: layer by layer, without padding.

    Its Conv1D kernels are [in, out] like ours; lm_head.weight is [V, D]. Serves gradients as well.
    """
    out = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *module, kind = tree.path_of(key_path).split("/")
        kind = "bias" if kind == "bias" else "weight"
        if module[0] == "h":
            for number, layer in enumerate(leaf):
                out[".".join(("transformer.h", str(number), *module[1:], kind))] = layer
        elif module == ["lm_head"]:
            out["lm_head.weight"] = leaf[:, :vocab_size].T
        else:
            out[".".join(("transformer", *module, kind))] = leaf[:vocab_size] if module == ["wte"] else leaf
    return out


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    file: Any

    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def get(self) -> np.ndarray:
        with _reading(self.path):
            return self.file.get_tensor(self.name)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise DataError(f"{folder} has no {WEIGHTS}; {_conversion(folder) or description.listing(folder)}")
    weight_map = description.json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} has no weight_map, an object that names the file of each tensor")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(
                f"{index} names {description.shown(name)}; expected the name of a .safetensors file beside it"
            )
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise DataError(f"{folder} lacks {description.some(absent)}, which {INDEX} names")
    return paths


def _stored(stack: contextlib.ExitStack, paths: Sequence[Path]) -> dict[str, Stored]:
    """What the files hold, by GPT2LMHeadModel's names: GPT2Model's, as in the first checkpoints, lack the prefix."""
    found: dict[str, Stored] = {}
    for path in paths:
        with _reading(path):
            # read, not mapped: mapped pages count as memory too, and those of a file that is cut kill the process
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy", backend="pread"))
        for name in file.keys():  # noqa: SIM118 - not a mapping
            full = name if name == "lm_head.weight" else "transformer." + name.removeprefix("transformer.")
            if full in found:
                raise DataError(f"{full} is there twice, in {found[full].path} and in {path}")
            if not BUFFER.fullmatch(full):
                found[full] = Stored(path, name, file)
    return found


def _check(folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, np.ndarray]) -> None:
    """That the files hold the expected tensors and no others."""

    def refuse(names: Sequence[str], end: str) -> None:
        if names:
            raise DataError(f"the weights in {folder} hold {description.some(names)}, {end}")

    missing = [name for name in expected if name not in stored]
    if missing:
        raise DataError(f"the weights in {folder} lack {description.some(missing)}")
    extra = [tensor.name for name, tensor in stored.items() if name not in expected]
    refuse(extra, f"which the model of {description.NAME} does not have")
    shapes = {name: (list(tensor.shape()), list(expected[name].shape)) for name, tensor in stored.items()}
    odd = [f"{name} as {given} in place of {wanted}" for name, (given, wanted) in shapes.items() if given != wanted]
    refuse(odd, f"so they are not of the model of {description.NAME}")
    odd = [f"{name} as {tensor.dtype()}" for name, tensor in stored.items() if tensor.dtype() not in DTYPES]
    refuse(odd, f"which is not among {', '.join(DTYPES)}")


def _zeros(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """An array so aligned that JAX on the CPU need not copy it; NumPy's own large ones are not."""
    size = leaf.size * leaf.dtype.itemsize
    buffer = np.zeros(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(leaf.dtype).reshape(leaf.shape)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is damaged or incomplete ({error}); fetch it again") from error


def _conversion(folder: Path) -> str:
    """What to do where only formats lie that jaxlm doesn't read; "" where none does."""
    convert = "with transformers{} and PyTorch: GPT2LMHeadModel.from_pretrained({}).save_pretrained('converted')"
    if any(folder.glob("pytorch_model*.bin")):
        how = convert.format("", repr(str(folder)))
        return f"its pytorch_model.bin is a pickle, which jaxlm doesn't open. If you trust its author, convert it {how}"
    for name, kind in (("tf_model.h5", "tf"), ("flax_model.msgpack", "flax")):
        if (folder / name).is_file():
            return f"jaxlm doesn't read {name}. Convert it {convert.format(' 4', f'{str(folder)!r}, from_{kind}=True')}"
    return ""

"""What is said of transformers needs PyTorch; all else is tested on folders that `write` made."""

import copy
import functools
import json
import math
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import config, tree
from jaxlm.errors import DataError
from jaxlm.model import gpt2, huggingface, huggingface_config, losses
from jaxlm.training import step
from tests.tiny import assert_same_bits, tiny

SIZES = ("num_layers", "num_heads", "embed_dim", "context_length", "vocab_size")
THEIR_SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")

# sizes; what GPT2Config is told beside them; what it comes to
CASES = {
    "K=8": ((1, 2, 16, 16, 131), {}, {}),
    "K=16, gelu, narrow": (
        (2, 3, 48, 24, 97),
        {"activation_function": "gelu", "n_inner": 80},
        {"activation": "gelu", "feed_forward_dim": 80},
    ),
    "K=32, relu, epsilon": (
        (3, 2, 64, 12, 257),
        {"activation_function": "relu", "layer_norm_epsilon": 1e-2},
        {"activation": "relu", "norm_epsilon": 1e-2},
    ),
    "K=24, by layer": (
        (4, 2, 48, 17, 301),
        {"activation_function": "gelu_fast", "scale_attn_by_inverse_layer_idx": True},
        {"scale_attention_by_layer": True},
    ),
    "K=64, silu, unscaled": (
        (2, 1, 64, 20, 51),
        {"activation_function": "silu", "scale_attn_weights": False},
        {"activation": "silu", "scale_attention": False},
    ),
    "K=8, untied": (
        (3, 4, 32, 9, 127),
        {
            "tie_word_embeddings": False,
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": False,
            "reorder_and_upcast_attn": True,
            "n_inner": 128,
        },
        {"tie_embeddings": False, "scale_attention_by_layer": True, "scale_attention": False},
    ),
}
BASE = {
    "feed_forward_dim": 0,
    "activation": "gelu_tanh",
    "norm_epsilon": 1e-5,
    "scale_attention": True,
    "scale_attention_by_layer": False,
    "tie_embeddings": True,
}

IDS = {"bos_token_id": 5, "eos_token_id": 5}


def fields(name):
    sizes, _, ours = CASES[name]
    return dict(zip(SIZES, sizes)) | BASE | ours


def section(**changes):
    c = config.default()
    c.model.update(changes)
    return config.resolve(c).model


@functools.cache
def parameters(name, dtype="float32"):
    """Such as `read` gives, all of them random."""
    shapes = gpt2.shapes(section(**fields(name)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(dtype), shapes)
    V = fields(name)["vocab_size"]
    params["wte"]["embedding"][V:] = 0
    if "lm_head" in params:
        params["lm_head"]["kernel"][:, V:] = 0
    return params


def tokens(name, rows=3, seed=0):
    sizes = fields(name)
    shape = (rows, sizes["context_length"] + 1)
    return np.random.default_rng(seed).integers(0, sizes["vocab_size"], shape, dtype=np.int32)


@pytest.fixture(params=["K=16, gelu, narrow", "K=8, untied"])
def written(request, tmp_path):
    """A folder, its section and its parameters."""
    chosen, params = section(**fields(request.param)), parameters(request.param)
    huggingface.write(tmp_path, params, chosen, special_ids=IDS)
    return tmp_path, chosen, params


@pytest.fixture
def folder(tmp_path):
    """The same, of the smallest, tied model."""
    chosen, params = section(**fields("K=8")), parameters("K=8")
    huggingface.write(tmp_path, params, chosen, special_ids=IDS)
    return tmp_path, chosen, params


def edit(folder, change):
    """The tensors of a folder, changed."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")


# the reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(name of a case) -> a GPT2LMHeadModel with random parameters, and the folder that it was saved to."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: `make torch` with Python 3.11")
    import transformers

    @functools.cache
    def make(name):
        sizes, theirs, _ = CASES[name]
        ids = dict(bos_token_id=None, eos_token_id=None)
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**dict(zip(THEIR_SIZES, sizes)), **theirs, **ids))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
        folder = tmp_path_factory.mktemp("reference")
        model.eval().save_pretrained(folder)
        return model, folder

    return make


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_every_gradient_are_those_of_transformers(reference, name):
    theirs, folder = reference(name)
    assert huggingface_config.fields(folder) == fields(name)
    chosen = section(**fields(name))
    model, params, ids = gpt2.build(chosen), huggingface.read(folder, chosen), tokens(name)

    @jax.jit
    def run(params):
        def loss(params):
            logits = model.apply(params, {"inputs": ids[:, :-1]})
            sums = losses.token_sums(logits, ids[:, 1:], np.ones_like(ids[:, 1:]))
            return sums.objective / sums.weight, logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradients = run(params)
    import torch

    inputs, targets = (torch.tensor(x, dtype=torch.long) for x in (ids[:, :-1], ids[:, 1:]))
    expected = theirs(inputs).logits
    their_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    theirs.zero_grad()
    their_loss.backward()
    expected = expected.detach().numpy()
    assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    gradients = huggingface.tensors(jax.tree.map(np.asarray, gradients), chosen.vocab_size)
    named = {parameter: x.grad.numpy() for parameter, x in theirs.named_parameters()}
    assert gradients.keys() == named.keys()
    for parameter, gradient in named.items():
        difference = np.linalg.norm(gradients[parameter] - gradient)
        assert 0 < np.linalg.norm(gradient) and difference <= 1e-3 * np.linalg.norm(gradient), parameter


@pytest.mark.parametrize("name", ["K=16, gelu, narrow", "K=8, untied"])
def test_twenty_steps_of_adamw_follow_pytorch(reference, name):
    theirs, folder = reference(name)  # which skips without PyTorch
    import torch

    theirs = copy.deepcopy(theirs)
    peak, warmup, final, steps, decay, clip = 1e-2, 5, 0.1, 20, 1.0, 0.5
    c = tiny(steps=steps)
    c.model.update(fields(name))
    c.optimizer.chain = ("clip_by_global_norm", "scale_by_adam", "add_decayed_weights", "scale_by_learning_rate")
    c.optimizer.clip_by_global_norm = {"max_norm": clip}
    c.optimizer.scale_by_adam = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
    c.optimizer.add_decayed_weights = {"weight_decay": decay, "where": "kernels"}
    c.optimizer.scale_by_learning_rate = {"peak": peak, "schedule": "warmup_cosine", "warmup": warmup, "final": final}
    cfg = config.resolve(c)
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    state = jax.jit(program.init)(jax.random.key(0), hparams)._replace(params=huggingface.read(folder, cfg.model))
    train_step = jax.jit(program.train_step)

    decayed = [
        x for path, x in theirs.named_parameters() if x.dim() == 2 and ".wte." not in path and ".wpe." not in path
    ]
    others = [x for x in theirs.parameters() if all(x is not y for y in decayed)]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)

    ours, expected = [], []
    for n in range(steps):
        ids = tokens(name, seed=n % 4)
        batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones_like(ids[:, 1:], np.float32)}
        state, metrics = train_step(hparams, state, batch)
        ours.append(metrics["train/loss"])
        inputs, targets = (torch.tensor(batch[part], dtype=torch.long) for part in ("inputs", "targets"))
        loss = torch.nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        progress = (n - warmup) / (steps - warmup)
        cosine = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * (n / warmup if n < warmup else cosine)
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    assert expected[-1] < 0.9 * expected[0], "nothing was learned: agreement says nothing"


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_the_same_model_in_transformers(reference, name, tmp_path):
    theirs, folder = reference(name)
    chosen = section(**fields(name))
    huggingface.write(tmp_path, huggingface.read(folder, chosen), chosen, special_ids=IDS)
    import torch
    import transformers

    again, told = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert (
        again.generation_config.eos_token_id == again.generation_config.bos_token_id == again.config.eos_token_id == 5
    )
    ids = torch.tensor(tokens(name)[:, :-1], dtype=torch.long)
    with torch.no_grad():
        logits, expected = again(ids).logits, theirs(ids).logits
    assert torch.abs(logits - expected).max() <= 1e-6 * torch.abs(expected).max()  # gelu_fast is written as gelu_new


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("K=24, by layer", "sharded"),
        ("K=8, untied", "sharded"),
        ("K=24, by layer", "without the head"),
        ("K=24, by layer", "bfloat16"),
        ("K=8, untied", "float16"),
    ],
)
def test_however_transformers_saves_it_is_the_same(reference, name, how, tmp_path):
    theirs, folder = reference(name)
    whole = huggingface.read(folder, section(**fields(name)))
    theirs = copy.deepcopy(theirs)
    match how:
        case "sharded":
            theirs.save_pretrained(tmp_path, max_shard_size="50KB")
            assert len(list(tmp_path.glob("*.safetensors"))) > 2
        case "without the head":
            theirs.transformer.save_pretrained(tmp_path)
            assert "wte.weight" in load_file(tmp_path / "model.safetensors")
        case _:
            theirs.to(getattr(__import__("torch"), how)).save_pretrained(tmp_path)
            whole = jax.tree.map(lambda x: x.astype(how).astype(np.float32), whole)
    assert huggingface_config.fields(tmp_path) == fields(name)
    assert_same_bits(huggingface.read(tmp_path, section(**fields(name))), whole)


# out and in


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_back_to_the_bit(name, dtype, tmp_path):
    chosen, params = section(**fields(name), param_dtype=dtype), parameters(name, dtype)
    huggingface.write(tmp_path, params, chosen, special_ids=IDS)
    assert huggingface_config.fields(tmp_path) == fields(name)
    assert_same_bits(huggingface.read(tmp_path, chosen), params)


def test_arrays_on_a_device_are_written_alike(written, tmp_path_factory):
    folder, chosen, params = written
    other = tmp_path_factory.mktemp("other")
    huggingface.write(other, jax.tree.map(jax.numpy.asarray, params), chosen, special_ids=IDS)
    assert (other / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_who_may_read_the_config_may_read_the_weights(written):
    modes = {path.stat().st_mode for path in written[0].iterdir()}
    assert len(modes) == 1 and len(list(written[0].iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="nowhere"):
        huggingface.write(tmp_path / "nowhere", parameters("K=8"), section(**fields("K=8")), special_ids=IDS)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match="can't write .*model.safetensors"):
        huggingface.write(tmp_path, parameters("K=8"), section(**fields("K=8")), special_ids=IDS)


def test_weights_are_cast_to_what_is_asked_for(folder):
    path, chosen, params = folder
    edit(path, lambda held: held.update({name: x.astype(np.float64) for name, x in held.items()}))
    assert_same_bits(huggingface.read(path, chosen), params)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert_same_bits(huggingface.read(path, section(**fields("K=8"), param_dtype="bfloat16")), rounded)


def test_jax_on_the_cpu_takes_the_arrays_without_a_copy(folder):
    for leaf in jax.tree.leaves(huggingface.read(*folder[:2])):
        if leaf.size:
            assert jax.device_put(leaf).unsafe_buffer_pointer() == leaf.ctypes.data


def test_reading_takes_little_more_memory_than_the_parameters(tmp_path):
    chosen = section(num_layers=4, num_heads=4, embed_dim=128, context_length=64, vocab_size=4000)
    shapes = gpt2.shapes(chosen)
    huggingface.write(tmp_path, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes), chosen, special_ids=IDS)
    huggingface.read(tmp_path, chosen)  # what JAX keeps
    tracemalloc.start()
    try:
        params = huggingface.read(tmp_path, chosen)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 < peak / (4 * tree.size(params)) < 1.8  # the largest tensor is 0.4 of them


def two_files(folder):
    """The tensors of model.safetensors in two files with an index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": sorted(held)[::2], "b.safetensors": sorted(held)[1::2]}
    for file, names in parts.items():
        save_file({name: held[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_files_with_an_index_are_one_model(written):
    folder, chosen, params = written
    two_files(folder)
    assert_same_bits(huggingface.read(folder, chosen), params)


def test_masks_names_without_a_prefix_and_a_tied_head_are_as_nothing(folder):
    path, chosen, params = folder

    def first_checkpoints(held):
        held |= {name.removeprefix("transformer."): held.pop(name) for name in list(held)}
        held["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
        held["h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
        held["lm_head.weight"] = held["wte.weight"]

    edit(path, first_checkpoints)
    assert_same_bits(huggingface.read(path, chosen), params)


# bad input


def rename(old, new):
    return lambda held: held.update({new: held.pop(old)})


def put(name, array):
    return lambda held: held.update({name: array})


def spoil(value):
    def change(held):
        held["transformer.wpe.weight"][3, 3] = value

    return change


LN = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(LN), f"lack {LN}$"),
        (lambda held: held.clear(), r"lack transformer.h.0.attn.c_attn.bias, .*, .* and 13 more$"),
        (rename(LN, "transformer.ln_g.weight"), f"lack {LN}$"),
        (put("score.weight", np.zeros(3)), "hold score.weight, which the model of config.json does not have"),
        (put("h.1.ln_1.bias", np.zeros(16)), "hold h.1.ln_1.bias, which"),
        (put("ln_f.weight", np.zeros(16)), f"{LN} is there twice, in .* and in "),
        (put(LN, np.zeros((16, 1), np.float32)), rf"hold {LN} as \[16, 1\] in place of \[16\], so they"),
        (put(LN, np.zeros(17, np.float32)), rf"hold {LN} as \[17\] in place of \[16\]"),
        (put(LN, np.zeros(16, np.int32)), f"hold {LN} as I32, which is not among F32, "),
        (spoil(np.nan), "wpe.weight in .*model.safetensors holds numbers that are not finite"),
        (spoil(-np.inf), "wpe.weight in .*model.safetensors holds numbers that are not finite"),
        (put(LN, np.full(16, 1e300)), "ln_f.weight in .* that are not finite in float32"),
        (put("lm_head.weight", np.zeros((131, 16), np.float32)), "lm_head.weight in .* differs from wte.weight"),
    ],
)
def test_other_tensors_than_the_models_are_an_error_by_name(folder, change, message):
    path, chosen, _ = folder
    edit(path, change)
    with pytest.raises(DataError, match=message) as error:
        huggingface.read(path, chosen)
    assert error.value.exit_code == 4


def test_a_config_of_another_size_is_found_before_anything_is_allocated(folder):
    path, _, _ = folder
    described = json.loads((path / "config.json").read_text())
    sizes = {"n_layer": 10**3, "n_head": 10**5, "n_embd": 10**6, "n_inner": 10**7, "n_positions": 10**8}
    for change in (sizes | {"vocab_size": 10**8}, {"n_embd": 10**6}, {"n_layer": 10**3}):
        (path / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(DataError, match="the weights in .* (lack|hold) "):
            huggingface.read(path, section(**huggingface_config.fields(path)))


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_an_error(folder, length):
    path, chosen, _ = folder
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(DataError, match="model.safetensors is damaged or incomplete .*; fetch it again"):
        huggingface.read(path, chosen)


def test_damaged_bytes_give_an_error_or_other_numbers_but_no_other_exception(folder):
    path, chosen, params = folder
    file = path / "model.safetensors"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for at in rng.integers(0, 1200, rng.integers(1, 4)):  # of the header
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            got = huggingface.read(path, chosen)
            assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, params)
        except DataError:
            refused += 1
    assert refused > 50


def test_a_file_that_is_cut_while_it_is_read_is_an_error(folder, monkeypatch):
    path, chosen, _ = folder
    whole, check = (path / "model.safetensors").read_bytes(), huggingface._check

    def cut(*args):
        (path / "model.safetensors").write_bytes(whole[:-5000])
        check(*args)

    monkeypatch.setattr(huggingface, "_check", cut)
    with pytest.raises(DataError, match="damaged or incomplete"):
        huggingface.read(path, chosen)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "a.bin", "", 7, None])
def test_an_index_may_name_files_beside_it_only(folder, name):
    path, chosen, _ = folder
    weight_map = two_files(path)
    weight_map[LN] = name
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError, match="index.json names .*; expected the name of a .safetensors file beside it"):
        huggingface.read(path, chosen)


def test_an_index_whose_files_are_absent_or_that_is_none_is_an_error(folder):
    path, chosen, _ = folder
    two_files(path)
    (path / "b.safetensors").unlink()
    with pytest.raises(DataError, match="lacks b.safetensors, which model.safetensors.index.json names"):
        huggingface.read(path, chosen)
    for text, message in (
        ("{", "can't read"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
    ):
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(DataError, match=message):
            huggingface.read(path, chosen)


def test_a_tensor_in_two_files_is_an_error(folder):
    path, chosen, _ = folder
    two_files(path)
    save_file(load_file(path / "a.safetensors") | {LN: np.zeros(16)}, path / "a.safetensors")
    with pytest.raises(DataError, match=f"{LN} is there twice, in .*a.safetensors and in .*b.safetensors"):
        huggingface.read(path, chosen)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], r"is a pickle, .*from_pretrained\('.*'\).save_pretrained\('converted'\)"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "is a pickle"),
        (["tf_model.h5"], "doesn't read tf_model.h5. Convert it .*', from_tf=True"),
        (["flax_model.msgpack"], "doesn't read flax_model.msgpack. Convert it .*', from_flax=True"),
        (["model.gguf", "README.md"], "it holds README.md, model.gguf$"),
        ([], "it holds nothing$"),
    ],
)
def test_other_formats_get_a_word_on_how_to_convert(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=f"has no model.safetensors; .*{message}"):
        huggingface.read(tmp_path, section(**fields("K=8")))

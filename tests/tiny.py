"""A model and a corpus small enough for tests: one layer of width 16 on a file of real Python."""

import argparse
from pathlib import Path

import numpy as np

from jaxlm import config

CORPUS = Path(argparse.__file__)


def tiny(**changes):
    """A config that trains in seconds; `changes` by dotted field, with "__" for the dot."""
    c = config.default()
    c.steps = 8
    c.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    c.data.update(source=str(CORPUS), batch_size=4)
    c.eval.update(every=4, batches=2)
    c.checkpoint.every = 4
    c.log.update(every=2, writers=("jsonl",), progress=False)
    return config.override(c, {path.replace("__", "."): value for path, value in changes.items()})


def resolved(**changes):
    return config.resolve(tiny(model__vocab_size=257, **changes))


def batch(rows=4, length=16, vocabulary=257, seed=0):
    """Random tokens with uneven weights, some of them 0."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    weights = random.uniform(0.0, 2.0, (rows, length)).astype(np.float32)
    weights[:, : length // 4] = 0
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def leaves(tree):
    """{path: NumPy array}, keys as their data."""
    import jax

    from jaxlm import tree as trees

    def host(x):
        return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return dict(zip(trees.paths(tree), map(host, jax.tree.leaves(tree)), strict=True))


def assert_same_bits(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)

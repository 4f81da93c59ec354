"""What a transform of one's own gets wrong is said before anything is trained, and of which stage."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxlm.errors import ConfigError
from jaxlm.optim import chain
from jaxlm.optim.static import static_arguments
from tests.optim.small import DEFAULT, GRADIENTS, PARAMS, STEPS


def own(init, update):
    return optax.GradientTransformation(init, lambda updates, state, params=None: update(updates, state))


def fails(updates, state):
    raise LookupError("nope")


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (
            own(lambda p: jnp.zeros([], jnp.int32), lambda u, s: (u, s + 0.5)),
            "its update gives back float32[], given int32[]; expected state of the same",
        ),
        (
            own(lambda p: (), lambda u, s: (u, {"n": optax.tree.norm(u)})),
            "its update gives back float32[] as 'n', given nothing; expected state of the same",
        ),
        (own(lambda p: [0.0], lambda u, s: (u, (s[0],))), "expected state of the same structure"),
        (
            own(lambda p: (), lambda u, s: (jax.tree.map(jnp.sum, u), s)),
            "gives back [] as 'h/attn/bias', given [1, 6]; expected updates of the same",
        ),
        (own(lambda p: (), fails), "raised LookupError: nope"),
        (own(lambda p: fails(p, ()), lambda u, s: (u, s)), "raised LookupError: nope"),
    ],
    ids=["another dtype", "another structure", "a tuple for a list", "another shape", "an update", "an init"],
)
@pytest.mark.parametrize("outer", [(), ("skip_nonfinite",)])
def test_a_mistake_in_a_transform_is_told_of_its_stage(transform, said, outer):
    spec = {**DEFAULT, "chain": (*outer, "mine", *DEFAULT["chain"]), "mine": {"transform": transform}}
    with pytest.raises(ConfigError, match="optimizer stage 'mine'.*" + re.escape(said)):
        static_arguments(spec, PARAMS, STEPS)


def test_a_number_of_python_is_a_state_too():
    ema = own(lambda p: {"ema": 0.0}, lambda u, s: (u, {"ema": 0.9 * s["ema"] + 0.1 * optax.tree.norm(u)}))
    spec = {"chain": ("mine", "sgd"), "mine": {"transform": ema}, "sgd": {"learning_rate": 0.1}}
    transform = chain.build(spec, None, STEPS)
    _, state = transform.update(GRADIENTS[0], transform.init(PARAMS), PARAMS)
    assert float(state[0]["ema"]) > 0

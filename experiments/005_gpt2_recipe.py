"""Which parts of the GPT-2 recipe matter: warmup, clipping, decay, a short second moment, bias correction?

python -m jaxlm.sweep --experiment=experiments/005_gpt2_recipe.py
"""

import jax
import jax.numpy as jnp
import optax

from jaxlm import optim
from jaxlm.ablation import Study, leave_one_out


def uncorrected_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam whose moments start at zero and stay biased towards it: m / (sqrt(v) + eps)."""

    def update(updates, state, params=None):
        del params
        m = jax.tree.map(lambda old, new: b1 * old + (1 - b1) * new, state[0], updates)
        v = jax.tree.map(lambda old, new: b2 * old + (1 - b2) * jnp.square(new), state[1], updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v), (m, v)

    def init(params):
        return optax.tree.zeros_like(params), optax.tree.zeros_like(params)

    return optax.GradientTransformation(init, update)


def without_correction(spec):
    return optim.replace(spec, "scale_by_adam", "uncorrected", transform=uncorrected_adam, **spec["scale_by_adam"])


def study() -> Study:
    return Study(
        question="Which parts of the GPT-2 recipe matter: warmup, clipping, decay, b2=0.95, bias correction?",
        base="configs/ablation.py",
        baseline="full",
        variants=leave_one_out(
            {
                "warmup": {"optimizer.scale_by_learning_rate.warmup": 0.0},
                "clipping": {"optimizer": lambda spec: optim.drop(spec, "clip_by_global_norm")},
                "decay": {"optimizer": lambda spec: optim.drop(spec, "add_decayed_weights")},
                "b2=0.95": {"optimizer.scale_by_adam.b2": 0.999},
                "bias correction": {"optimizer": without_correction},
            }
        ),
    )

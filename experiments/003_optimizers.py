"""Which optimizer is best at its own learning rate?

    python -m jaxlm.sweep --experiment=experiments/003_optimizers.py

Each arm tries five peaks, a factor of about three apart, with one tuning seed; the rest of it is as its authors or
optax have it. All but schedule-free have a warmup of 10% and a cosine to zero; all clip the gradient's norm at 1.
"""

from typing import Any

from jaxlm.ablation import Study, log_spaced

RATE = {"peak": 1e-2, "schedule": "cosine", "warmup": 0.1, "final": 0.0}
DECAY = {"weight_decay": 0.1, "where": "kernels"}


def chain(**stages: dict[str, Any]) -> dict[str, Any]:
    """An optimizer of clipping and these stages, in their order."""
    return {"chain": ("clip_by_global_norm", *stages), "clip_by_global_norm": {"max_norm": 1.0}, **stages}


OPTIMIZERS = {
    "adamw": chain(
        scale_by_adam={"b1": 0.9, "b2": 0.95, "eps": 1e-8}, add_decayed_weights=DECAY, scale_by_learning_rate=RATE
    ),
    "adam": chain(scale_by_adam={"b1": 0.9, "b2": 0.95, "eps": 1e-8}, scale_by_learning_rate=RATE),
    "sgd_momentum": chain(trace={"decay": 0.9}, scale_by_learning_rate=RATE),
    "rmsprop": chain(scale_by_rms={"decay": 0.95, "eps": 1e-8}, scale_by_learning_rate=RATE),
    "lion": chain(
        scale_by_lion={"b1": 0.9, "b2": 0.99},
        add_decayed_weights={"weight_decay": 1.0, "where": "kernels"},  # as much as AdamW's at a tenth of its rate
        scale_by_learning_rate=RATE,
    ),
    "adafactor": chain(adafactor={**RATE, "min_dim_size_to_factor": 32}),
    "muon": chain(muon={**RATE, "weight_decay": 0.1, "adam_learning_rate": RATE}),
    "soap": chain(scale_by_soap={"b1": 0.95, "b2": 0.95}, add_decayed_weights=DECAY, scale_by_learning_rate=RATE),
    "schedule_free": chain(
        schedule_free={"b1": 0.9},
        scale_by_rms={"decay": 0.95, "eps": 1e-8, "bias_correction": True},
        add_decayed_weights=DECAY,
        scale_by_learning_rate={"peak": 1e-2, "schedule": "constant", "warmup": 0.1},
    ),
}
PEAKS = {name: ("optimizer.scale_by_learning_rate.peak", 1e-3, 1e-1) for name in OPTIMIZERS} | {
    "sgd_momentum": ("optimizer.scale_by_learning_rate.peak", 3e-2, 3.0),
    "rmsprop": ("optimizer.scale_by_learning_rate.peak", 1e-4, 1e-2),
    "lion": ("optimizer.scale_by_learning_rate.peak", 1e-4, 1e-2),
    "adafactor": ("optimizer.adafactor.peak", 1e-2, 1.0),
    "muon": ("optimizer.muon.peak", 3e-3, 3e-1),
}


def study() -> Study:
    return Study(
        question="Which optimizer is best at its own learning rate?",
        base="configs/ablation.py",
        baseline="adamw",
        variants={name: {"optimizer": spec} for name, spec in OPTIMIZERS.items()},
        tuning={name: {path: log_spaced(low, high, 5)} for name, (path, low, high) in PEAKS.items()},
        tuning_seeds=(100,),
    )

"""What helps a model that overfits: dropout, L1, L2, decoupled weight decay or early stopping?

    python -m jaxlm.sweep --experiment=experiments/004_regularisation.py

The text is one module of the standard library, textwrap.py, read some fifty times: without a remedy the loss on the
fifth that is held out falls for 400 steps, and rises for the 400 that follow. Each arm tries four strengths with one
tuning seed.
"""

import textwrap
from pathlib import Path

from jaxlm import optim
from jaxlm.ablation import Study

DECAY = "optimizer.add_decayed_weights.weight_decay"


def without_decay(spec):
    return optim.drop(spec, "add_decayed_weights")


def study() -> Study:
    return Study(
        question="What helps a model that overfits: dropout, L1, L2, decoupled weight decay or early stopping?",
        base="configs/ablation.py",
        overrides={
            "data.source": str(Path(textwrap.__file__)),
            "data.validation": "20%",
            "steps": 800,
            "optimizer.scale_by_learning_rate.peak": 5e-3,
            "eval.every": 50,
            "eval.batches": 0,
        },
        baseline="none",
        variants={
            "none": {"optimizer": without_decay},
            "dropout": {"optimizer": without_decay, "model.dropout": 0.1},
            "l1": {"optimizer": without_decay, "loss.l1": 1e-5},
            "l2": {"optimizer": without_decay, "loss.l2": 1e-3},
            "decoupled decay": {DECAY: 0.1},
            "early stopping": {
                "optimizer": without_decay,
                "early_stopping.patience": 4,
                "checkpoint.best": "eval/loss",
            },
        },
        tuning={
            "dropout": {"model.dropout": (0.1, 0.2, 0.3, 0.5)},
            "l1": {"loss.l1": (1e-6, 3e-6, 1e-5, 1e-4)},
            "l2": {"loss.l2": (1e-4, 1e-3, 1e-2, 1e-1)},
            "decoupled decay": {DECAY: (0.1, 1.0, 3.0, 10.0)},
        },
        tuning_seeds=(100,),
    )

"""How sensitive are four schedules to the peak learning rate, and which is best at its own?

python -m jaxlm.sweep --experiment=experiments/002_schedules.py
"""

from jaxlm.ablation import Study, log_spaced

RATE = "optimizer.scale_by_learning_rate"


def study() -> Study:
    return Study(
        question="How sensitive are four schedules to the peak learning rate, and which is best at its own?",
        base="configs/ablation.py",
        baseline="cosine",
        variants={
            "cosine": {},
            "linear": {f"{RATE}.schedule": "linear"},
            "warmup_stable_decay": {f"{RATE}.schedule": "warmup_stable_decay", f"{RATE}.cooldown": 0.2},
            "constant": {"optimizer": constant},
        },
        tuning={f"{RATE}.peak": log_spaced(1e-3, 1e-1, 7)},
        tuning_seeds=(100, 101),
    )


def constant(spec):
    return spec | {"scale_by_learning_rate": {"peak": 1e-2, "schedule": "constant", "warmup": 0.1}}

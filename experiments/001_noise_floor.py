"""How far do two runs of one config differ, by their seeds and by rounding alone?

python -m jaxlm.sweep --experiment=experiments/001_noise_floor.py
"""

from jaxlm.ablation import Study


def study() -> Study:
    return Study(
        question="How far do runs of one config differ, by their seeds and by rounding alone?",
        base="configs/ablation.py",
        baseline="unrolled",
        # the same arithmetic in another order: all that differs between the arms is rounding
        variants={"unrolled": {}, "rolled": {"model.unroll": False}},
        seeds=range(16),
    )

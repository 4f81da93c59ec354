"""Studies that take seconds: of the tiny model, on the file that the other tests train on."""

from jaxlm import optim
from jaxlm.ablation import Study, plan
from jaxlm.ablation.lanes import Member
from jaxlm.ablation.memory import Memory
from jaxlm.telemetry.progress import Progress
from jaxlm.training.prepare import prepare
from tests.tiny import tiny

PEAK = "optimizer.scale_by_learning_rate.peak"
BASE = {"steps": 12, "eval__every": 6, "checkpoint__every": 4, "log__every": 1}


def without(stage):
    return {"optimizer": lambda spec: optim.drop(spec, stage)}


def small(**changes):
    """Three arms in two programs, two seeds: six trials of 12 steps.

    `changes`: fields of the Study, or of its base with "__" for the dot.
    """
    base = {name: changes.pop(name) for name in list(changes) if "__" in name or name in ("steps",)}
    fields = {
        "question": "Does clipping matter?",
        "baseline": "clip",
        "variants": {"clip": {}, "no clip": without("clip_by_global_norm"), "b2": {"optimizer.scale_by_adam.b2": 0.9}},
        "seeds": (0, 1),
        "lanes": 2,
    }
    unsaved = {"checkpoint__every": 0}  # what a study says is in its metrics
    return Study(base=tiny(**{**BASE, **unsaved, **base}), **{**fields, **changes})


def arms(made, memory=None):
    """The budgeted config of each arm, where it is not tuned."""
    memory = memory or Memory()
    return {name: plan.budgeted(made, name, None, memory) for name in made.variants}


def member(workdir, **changes):
    """A run to be trained beside others."""
    cfg = tiny(**{**BASE, **changes})
    return Member(prepare(cfg), workdir, lambda done: Progress(cfg.steps, done, False, every=0))

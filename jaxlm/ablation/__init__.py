"""Ablations: variants with the same seeds, at an equal budget, compared with intervals.

study = Study("Does decay help?", base="configs/quickstart.py", baseline="decay", variants={"decay": {}, "none": ...})
found = run(study, "runs/decay")  # trains what is missing, writes the report
"""

from jaxlm.ablation.points import Range, log_spaced
from jaxlm.ablation.runner import run
from jaxlm.ablation.study import Study
from jaxlm.ablation.variants import grid, halton, leave_one_out, one_at_a_time, random, zipped

__all__ = [
    "Range",
    "Study",
    "grid",
    "halton",
    "leave_one_out",
    "log_spaced",
    "one_at_a_time",
    "random",
    "run",
    "zipped",
]

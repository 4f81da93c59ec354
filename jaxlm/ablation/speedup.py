"""How many tokens an arm took to the baseline's result: descriptive, no test."""

from __future__ import annotations

import math

import numpy as np

from jaxlm.ablation.findings import Findings, compared
from jaxlm.ablation.outcomes import Curve


def tokens_to_baseline(findings: Findings, variant: str) -> float:
    """The median over paired seeds of the tokens at which a variant first reached the baseline's value on that seed, as
    a share of those at which the baseline did: 0.5 in half the tokens.

    inf where it never did on half of the seeds or more, as one that diverged doesn't; nan without pairs.
    """
    own = {one.seed: one for one in compared(findings, variant)}
    shares = []
    for base in compared(findings, findings.baseline):
        if base.seed not in own or not base.finished:
            continue
        first = reached(base.curve, base.value, findings.lower_is_better)
        one = own[base.seed]
        took = reached(one.curve, base.value, findings.lower_is_better) if one.finished else math.inf
        if math.isfinite(first) and first > 0:
            shares.append(took / first)
    return float(np.median(shares)) if shares else math.nan


def reached(curve: Curve, value: float, lower_is_better: bool) -> float:
    """The tokens at which a curve first is at a value or better, by the line between measurements; inf where never."""
    sign = 1 if lower_is_better else -1
    known = np.isfinite(curve.values)
    tokens, over = curve.tokens[known], sign * (curve.values[known] - value)
    there = np.flatnonzero(over <= 0)
    if not len(there):
        return math.inf
    at = int(there[0])
    if at == 0 or over[at] == over[at - 1]:
        return float(tokens[at])
    share = over[at - 1] / (over[at - 1] - over[at])
    return float(tokens[at - 1] + share * (tokens[at] - tokens[at - 1]))

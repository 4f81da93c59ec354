"""The studies that we ran can be run: each loads, and its arms and tuning points are configs."""

from pathlib import Path

import pytest

from jaxlm.ablation import study

STUDIES = sorted((Path(__file__).parents[2] / "experiments").glob("[0-9]*.py"))


def test_there_are_studies():
    assert len(STUDIES) >= 5


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_loads_and_its_arms_resolve(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    made = study.load(str(path))
    assert made.question.endswith("?") and len(made.seeds) >= 5
    configs = [study.arm(made, variant, point) for variant in made.variants for point in [{}, *made.points(variant)]]
    addresses = {study.trial(cfg, "x", 0).address for cfg in configs}
    assert len(addresses) >= len(made.variants)  # an arm may be among its own points

"""A study's numbers for other programs."""

import csv
import math

import numpy as np
import pytest

from jaxlm.ablation import results, runner
from tests.ablation.small import PEAK, small
from tests.ablation.test_report import study


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_results_hold_every_trial(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    findings = study()
    results.write(findings, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [
        "trial",
        "variant",
        "seed",
        "tuning",
        "point.optimizer.peak",
        "status",
        "value",
        "gap",
        "tokens",
        "flops",
        "seconds",
        "joules",
    ]
    assert list(rows[0]) == columns and len(rows) == len(findings.outcomes) == 50
    for row, one in zip(rows, findings.outcomes):
        assert (row["variant"], int(row["seed"]), row["tuning"]) == (one.variant, one.seed, str(one.tuning))
        np.testing.assert_equal(float(row["value"]), one.value)  # to the last digit; nan is nan
    table = parquet.read_table(tmp_path / "results.parquet")
    assert table.column_names == columns and str(table.schema.field("value").type) == "double"
    np.testing.assert_equal(table["value"].to_pylist(), [one.value for one in findings.outcomes])


def test_points_of_mixed_types_become_text_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    findings = study()
    mixed = [one._replace(point={"a": "cosine" if one.tuning else 3}) for one in findings.outcomes]
    results.write(findings._replace(outcomes=mixed), tmp_path)
    assert set(parquet.read_table(tmp_path / "results.parquet")["point.a"].to_pylist()) == {"cosine", "3"}


def test_a_study_that_has_not_begun_has_no_numbers(tmp_path):
    assert results.write(study(outcomes=[]), tmp_path) == []


def test_every_measurement_is_a_row_of_curves(tmp_path):
    findings = study({"baseline": 0.0, "other": 0.1})
    results.write(findings._replace(outcomes=[*findings.outcomes, findings.outcomes[0]]), tmp_path)
    rows = read(tmp_path / "curves.csv")
    assert list(rows[0]) == ["trial", "variant", "seed", "step", "tokens", "flops", "seconds", "value"]
    assert len(rows) == sum(len(one.curve.steps) for one in findings.outcomes)  # a trial of two points once
    one = findings.outcomes[-1]
    last = rows[-1]
    assert (last["trial"], last["variant"], int(last["step"])) == (one.trial, one.variant, one.curve.steps[-1])
    np.testing.assert_equal(float(last["value"]), one.curve.values[-1])
    assert math.isfinite(float(last["seconds"]))


def test_fields_that_differ_have_a_column_for_a_pivot(tmp_path):
    """A tuned point's value is the trial's own, not that at which its arm is compared."""
    made = small(
        steps=2,
        variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}},
        seeds=(0,),
        tuning={"b2": {PEAK: (1e-3, 2e-3)}},
        tuning_seeds=(9,),
    )
    runner.run(made, tmp_path)
    rows = read(tmp_path / "results.csv")
    columns = [name for name in rows[0] if name.startswith("config.")]
    assert columns == ["config.optimizer.scale_by_adam.b2", f"config.{PEAK}"]
    found = {(row["variant"], row["tuning"], row["seed"], *(row[name] for name in columns)) for row in rows}
    chosen = next(row[f"point.{PEAK}"] for row in rows if row["variant"] == "b2" and row["tuning"] == "False")
    base = next(row[f"config.{PEAK}"] for row in rows if row["variant"] == "clip")
    assert found == {
        ("b2", "True", "9", "0.9", "0.001"),
        ("b2", "True", "9", "0.9", "0.002"),
        ("b2", "False", "0", "0.9", chosen),
        ("clip", "False", "0", "0.95", base),
    }

import json
import math
import sys

import numpy as np
import pytest

from jaxlm.errors import DataError
from jaxlm.telemetry import curves


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that `draw` made."""
    figure = pytest.importorskip("matplotlib.figure")
    figures = []

    class Kept(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    return figures


def write(workdir, rows):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def labels(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_draws_losses_and_learning_rate(tmp_path, drawn):
    write(
        tmp_path,
        [{"step": s, "train/loss": 4 / s, "optim/learning_rate": 1e-3} for s in range(10, 2001, 10)]
        + [{"step": 1000, "eval/loss": 1.0}, {"step": 2000, "eval/loss": 1.5}],
    )
    path = curves.draw(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    (figure,) = drawn
    assert len(figure.axes) == 2
    assert figure.axes[0].get_title(loc="left") == tmp_path.name
    assert labels(figure) == ["train 0.0020", "eval 1.5000\nbest 1.0000 at 1,000"]
    heights = [text.xy[1] for text in figure.axes[0].texts]
    assert heights == [0.002, 1.5]


def test_labels_of_close_ends_do_not_overlap(tmp_path, drawn):
    write(tmp_path, [{"step": s, "train/loss": 4.0 - s, "eval/loss": 4.01 - s} for s in (1, 2, 3)])
    curves.draw(tmp_path)
    train, evaluation = (text.get_window_extent() for text in drawn[0].axes[0].texts)
    assert train.y1 < evaluation.y0


def test_non_finite_losses_are_gaps_and_said(tmp_path, drawn):
    write(tmp_path, [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": "nan"}, {"step": 3, "eval/loss": "inf"}])
    assert curves.draw(tmp_path)
    assert labels(drawn[0]) == ["train nan"]


@pytest.mark.parametrize(
    "rows", [[{"step": 1, "eval/loss": 2.0}], [{"step": s, "train/loss": 2.0} for s in range(500)]]
)
def test_one_row_and_constant_losses(tmp_path, drawn, rows):
    write(tmp_path, rows)
    assert curves.draw(tmp_path)


@pytest.mark.parametrize("rows", [None, [], [{"step": 1, "data/tokens": 2.0}], [{"step": 1, "train/loss": "nan"}]])
def test_nothing_to_draw(tmp_path, rows):
    if rows is not None:
        write(tmp_path, rows)
    assert curves.draw(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    write(tmp_path, [{"step": 1, "train/loss": 2.0}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curves.draw(tmp_path) is None


def test_damaged_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('no\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        curves.draw(tmp_path)


def test_pyplot_stays_out(tmp_path, drawn):
    write(tmp_path, [{"step": 1, "train/loss": 2.0}])
    before = "matplotlib.pyplot" in sys.modules
    curves.draw(tmp_path)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_smooth_is_a_centred_mean_that_skips_gaps():
    values = np.array([1.0, 2.0, 6.0, math.nan, 4.0, 8.0])
    np.testing.assert_allclose(curves._smooth(values, 1), [1, 3, 4, math.nan, 6, 8])
    line = np.arange(30.0)
    np.testing.assert_allclose(curves._smooth(line, 7), line)  # no lag and no bias, ends included


def test_draws_schedules_in_a_panel_each(tmp_path, drawn):
    rates = np.linspace(0, 6e-4, 30)
    path = curves.draw_schedule({"learning rate": rates, "weight_decay $": [0.1] * 30}, tmp_path / "schedule.png")
    assert path == tmp_path / "schedule.png" and path.read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in tmp_path.iterdir()] == ["schedule.png"]
    first, second = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["learning rate", "weight_decay $"]
    np.testing.assert_array_equal(first.lines[0].get_xydata(), np.stack([np.arange(30), rates], axis=1))
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "0.0003", "0.0006"]
    assert second.get_xlabel() == "step" and not first.get_xlabel()


@pytest.mark.parametrize("series", [[], [0.0], [0.0, 0.0], [1.0, math.nan]])
def test_draws_short_and_empty_schedules(tmp_path, series):
    assert curves.draw_schedule({"rate": series}, tmp_path / "schedule.png")


def test_draws_no_schedule_without_one_or_without_matplotlib(tmp_path, monkeypatch):
    assert curves.draw_schedule({}, tmp_path / "schedule.png") is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curves.draw_schedule({"rate": [1.0]}, tmp_path / "schedule.png") is None
    assert not list(tmp_path.iterdir())


def test_a_sparkline_is_a_line_of_blocks_from_zero_up():
    assert curves.sparkline(np.arange(8) / 7) == "▁▂▃▄▅▆▇█"
    assert curves.sparkline([6.0, 7.0]) == "▇█"  # not from the least value up
    assert curves.sparkline(np.repeat([0.0, 7.0], 500), width=4) == "▁▁██"
    assert len(curves.sparkline(np.ones(1001))) == 60
    assert curves.sparkline([0.0, 0.0]) == "▁▁"
    assert curves.sparkline([math.nan, 1.0, -1.0, math.inf]) == " █▁ "
    assert curves.sparkline([]) == ""

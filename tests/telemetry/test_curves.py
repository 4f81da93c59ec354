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

import pytest

from jaxlm.telemetry.board import Board
from tests.telemetry.test_progress import terminal_of


def run(board, title="lion seed=0", steps=100, to=100):
    with board.lane(title, steps, 0) as lane:
        lane.update(to // 2, {"train/loss": 3.21})
        lane.update(to, {"eval/loss": 3.5, "optim/grad_norm": 1.0})


def test_elsewhere_than_in_a_terminal_each_run_is_a_line_when_it_ends(capsys):
    with Board(2, 200) as board:
        run(board)
        run(board, "b", to=50)
        board.say("hello")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "run 1 of 2  lion seed=0: step 100 of 100  train/loss 3.2100  eval/loss 3.5000",
        "run 2 of 2  b: step 50 of 100  train/loss 3.2100  eval/loss 3.5000",
        "hello",
    ]


def test_of_what_a_run_says_only_warnings_are_shown(capsys):
    with Board(1, 10) as board, board.lane("a", 10, 0) as lane:
        lane.say("compiled the step in 1.2 s")
        lane.say("warning: step 3 changes nothing")
        lane.say("stopped early: eval/loss has not improved on 3.1")
    assert capsys.readouterr().err.splitlines()[:2] == [
        "a: warning: step 3 changes nothing",
        "a: stopped early: eval/loss has not improved on 3.1",
    ]


def test_in_a_terminal_there_is_a_bar_for_all_and_one_for_each_under_way(monkeypatch):
    stderr = terminal_of(monkeypatch)
    with Board(2, 200, metric="eval/accuracy") as board:
        with board.lane("one", 100, 20) as first, board.lane("two", 100, 0) as second:
            first.update(60, {"eval/accuracy": 0.25})
            second.update(40, {"train/loss": 2.5})
            board.bar.refresh()
        board.bar.refresh()
        shown = stderr.lines()
    assert any("step 100/200" in line and "0 of 2 runs" in line for line in shown)
    assert any("step 60/100" in line and "one  eval/accuracy 0.2500" in line for line in shown)
    assert any("step 40/100" in line and "two  train/loss 2.5000" in line for line in shown)


@pytest.mark.parametrize(("done", "to"), [(900, 1000), (0, 100)], ids=["resumed", "stopped early"])
def test_steps_that_nobody_computed_are_no_pace(monkeypatch, done, to):
    now = [0.0]
    monkeypatch.setattr("jaxlm.telemetry.progress.time.monotonic", lambda: now[0])
    stderr = terminal_of(monkeypatch)
    with Board(3, 3000) as board:
        for start, end in (0, 1000), (done, to), (0, 500):
            with board.lane("a", 1000, start) as lane:
                for step in range(start + 10, end + 1, 10):
                    now[0] += 1
                    lane.update(step)
                if end == 500:
                    board.bar.refresh()
                    assert any("step 2500/3000" in line and line.endswith("  50s left") for line in stderr.lines())

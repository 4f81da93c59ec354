import io
import re
import sys

import pytest

from jaxlm.telemetry.progress import Progress, duration

METRICS = {"train/loss": 3.21009, "throughput/tokens_per_second": 23456.3, "optim/grad_norm": 1.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self):
        """What was drawn, without colours and movements of the cursor."""
        return [line.rstrip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()))]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr("jaxlm.telemetry.progress.time.monotonic", lambda: now[0])
    return now


def terminal_of(monkeypatch):
    """Makes stderr a terminal of 80 columns. Not a fixture, since pytest sets stderr anew after those."""
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return stderr


def run(clock, steps, seconds=1.0, metrics=METRICS, **kwargs):
    with Progress(**kwargs) as progress:
        for step in steps:
            progress.update(step, metrics)
            clock[0] += seconds
    return progress


class TestRows:
    def test_row(self, clock, capsys):
        run(clock, range(89, 101), total=1000, every=100)
        run(clock, range(999, 1001), total=1000, every=100)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines() == [
            "step  100/1000  loss 3.2101  23,456 tokens/s  15m 00s left",
            "step  999/1000  loss 3.2101  23,456 tokens/s",
            "step 1000/1000  loss 3.2101  23,456 tokens/s",
        ]

    def test_every_counts_from_the_step_resumed_and_the_last_step_always_shows(self, clock, capsys):
        run(clock, range(41, 66), total=65, start=40, every=10)
        assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["50/65", "60/65", "65/65"]

    def test_steps_per_call_that_every_is_no_multiple_of(self, clock, capsys):
        run(clock, range(4, 33, 4), total=100, every=10)
        assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["12/100", "24/100"]

    def test_every_counts_from_the_step_gone_back_to(self, clock, capsys):
        run(clock, [*range(10, 61, 10), *range(20, 61, 10)], total=100, every=20)
        shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
        assert shown == ["20/100", "40/100", "60/100", "40/100", "60/100"]

    def test_evaluations_always_show_and_steps_without_metrics_never(self, clock, capsys):
        with Progress(100, every=0) as progress:
            progress.update(1, {"train/loss": 1.0})
            progress.update(2)
            progress.update(2, {"eval/loss": 2.0})
            progress.update(100)
        assert capsys.readouterr().err == "step   2/100  eval 2.0000\n"

    def test_disabled_still_speaks(self, clock, capsys):
        run(clock, range(1, 101), total=100, every=1, enabled=False).say("saved [10]")
        assert capsys.readouterr().err == "saved [10]\n"


class TestTimeLeft:
    def test_first_step_is_not_pace(self, clock, capsys):
        """It holds compilation."""
        with Progress(100, every=1) as progress:
            clock[0] += 500
            progress.update(1, METRICS)
            clock[0] += 2
            progress.update(2, METRICS)
        first, second = capsys.readouterr().err.splitlines()
        assert "left" not in first and second.endswith("3m 16s left")

    def test_follows_a_change_of_pace(self, clock, capsys):
        with Progress(10_000, every=1000) as progress:
            for step in range(1, 1001):
                clock[0] += 0.1 if step < 600 else 1.0
                progress.update(step, METRICS)
        assert capsys.readouterr().err.endswith("2h 30m left\n")  # 9000 steps of one second

    def test_steps_gone_back_are_no_pace(self, clock, capsys):
        run(clock, [*range(0, 601, 10), *range(100, 501, 10)], total=1000, every=100)
        rows = capsys.readouterr().err.splitlines()
        assert rows[-4].startswith("step  200/1000") and rows[-4].endswith("  1m 20s left")  # 800 steps, 10 a second
        assert rows[-1].startswith("step  500/1000") and rows[-1].endswith("  50s left")

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [(0.2, "1s"), (59, "59s"), (59.5, "1m 00s"), (185, "3m 05s"), (8040, "2h 14m"), (273_600, "3d 04h")],
    )
    def testduration(self, seconds, words):
        assert duration(seconds) == words


def test_rows_and_lines_that_can_t_be_written_end_no_run(clock, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    run(clock, [1], total=2, every=1).say("half of it")


class TestBar:
    def test_fits_80_columns(self, clock, monkeypatch):
        terminal = terminal_of(monkeypatch)
        metrics = {"train/loss": 3.2101, "eval/loss": 3.3, "throughput/tokens_per_second": 1234567.0}
        run(clock, [99_998, 99_999], 0.5, metrics, total=100_000, every=10)
        last = terminal.lines()[-2]
        assert re.fullmatch(r"step 99999/100000 ━+.* loss 3.2101  eval 3.3000  1,234,567 tokens/s  1s left", last)
        assert max(map(len, terminal.lines())) <= 80

    def test_latest_figures_stay(self, clock, monkeypatch):
        terminal = terminal_of(monkeypatch)
        with Progress(100, every=1) as progress:
            progress.update(1, {"train/loss": 2.0})
            progress.update(1, {"eval/loss": 3.0})
            progress.update(2)
        assert re.fullmatch(r"step 2/100 .* loss 2.0000  eval 3.0000", terminal.lines()[-2])

    def test_say_is_plain_text_above_the_bar(self, clock, monkeypatch):
        terminal = terminal_of(monkeypatch)
        long = "see [red] " + "x" * 100
        with Progress(100, start=50, every=1) as progress:
            progress.say(long)
        assert long in terminal.lines()
        assert terminal.lines()[-2].startswith("step 50/100")

    def test_stdout_is_left_alone_when_it_goes_elsewhere(self, clock, monkeypatch, capsys):
        terminal_of(monkeypatch)
        with Progress(100, every=1):
            print("result")
        assert capsys.readouterr().out == "result\n"

    def test_a_dumb_terminal_gets_rows(self, clock, monkeypatch):
        terminal = terminal_of(monkeypatch)
        monkeypatch.setenv("TERM", "dumb")
        run(clock, [1], total=1, every=1)
        assert terminal.getvalue() == "step 1/1  loss 3.2101  23,456 tokens/s\n"

    def test_an_exception_leaves_the_terminal_in_order(self, clock, monkeypatch):
        terminal = terminal_of(monkeypatch)
        with pytest.raises(RuntimeError), Progress(100, every=1):
            raise RuntimeError
        assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
        assert sys.stderr is terminal

"""The phase clock, the plain lines and the live panel."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from megatron_entropic.observability.progress import PhaseDisplay, Progress, duration, gauge, sparkline
from megatron_entropic.observability.timing import PhaseClock
from megatron_entropic.observability.yardsticks import mismatch_yardstick


class Time:
    """A clock that goes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_phases_add_up_to_the_step() -> None:
    time = Time()
    clock = PhaseClock(time)
    time.pass_by(50)  # starting up is no part of the first step
    with clock.phase("generate"):
        time.pass_by(3)
        assert clock.current == "generate"
        with clock.phase("checkpoint"):
            assert clock.current == "checkpoint"
            time.pass_by(2)
        time.pass_by(1)
    assert clock.current is None
    time.pass_by(0.5)
    with clock.phase("update"):
        time.pass_by(1)
    with clock.phase("update"):
        time.pass_by(1)
    assert clock.finish_step() == {
        "time/generate_s": 4,
        "time/checkpoint_s": 2,
        "time/update_s": 2,
        "time/step_s": 8.5,
    }
    time.pass_by(7)
    with clock.phase("update"):
        time.pass_by(1)
    assert clock.finish_step() == {"time/update_s": 1, "time/step_s": 8}


def test_a_phase_that_fails_is_left_behind() -> None:
    clock = PhaseClock(Time())
    with pytest.raises(RuntimeError), clock.phase("generate"):
        raise RuntimeError
    assert clock.current is None


METRICS = {
    "reward/mean": 0.41234,
    "entropy/mean": 0.512,
    "entropy/alpha": -0.25,
    "mismatch/logprob_abs_mean": 3.1e-8,
    "mismatch/logprob_abs_max": 1.26e-6,
    "throughput/tokens_per_s": 1834.4,
    "time/step_s": 2.0,
}


def show(terminal: bool, steps: int, metrics: dict[str, float], target: float | None = 0.5) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=110, color_system=None)
    with Progress(60, target=target, title="demo", console=console) as progress:
        for step in range(1, steps + 1):
            progress.phase("generate")
            progress.update(step, metrics)
        progress.log("a message [with brackets]")
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = show(False, 3, METRICS).splitlines()
    assert len(lines) == 4
    assert lines[2] == (
        "step  3/60  reward 0.412  entropy 0.512 (target 0.5)  alpha -0.250  mismatch 3.1e-08 (max 1.3e-06)  "
        "1,834 tokens/s  1 min 54 s left"
    )
    assert lines[3] == "a message [with brackets]"


def test_what_is_missing_is_not_shown() -> None:
    assert show(False, 1, {"reward/mean": 1.0}, target=None).splitlines()[0] == "step  1/60  reward 1.000"


def test_the_panel_of_a_terminal() -> None:
    text = show(True, 5, METRICS)
    for part in ("demo", "step 5 / 60", "target 0.5, off by +0.012", "raises entropy", "1 min 50 s left", "finished"):
        assert part in text, part


def test_a_mismatch_says_what_is_usual() -> None:
    usual = mismatch_yardstick({"model": {"dtype": "bfloat16"}})
    for terminal, mean, words in (
        (False, 0.03, "mismatch 3.0e-02 (max 5.0e-01)"),
        (False, 0.3, "mismatch 3.0e-01 (max 5.0e-01, bfloat16: usually below 0.04)"),
        (True, 0.03, "3.0e-02  mean, policy to engine; largest 5.0e-01; bfloat16: usually below 0.04"),
    ):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=110, color_system=None)
        with Progress(60, mismatch=usual, console=console) as progress:
            progress.update(1, {"mismatch/logprob_abs_mean": mean, "mismatch/logprob_abs_max": 0.5})
        assert words in stream.getvalue()


def test_a_resumed_run_does_not_begin_at_step_0() -> None:
    stream = io.StringIO()
    with Progress(60, console=Console(file=stream, force_terminal=True, width=110, color_system=None)) as progress:
        progress.resume(41)
    text = stream.getvalue()
    assert "step 41 / 60" in text


def test_the_minutes_before_the_first_step_are_lines_with_the_time_where_there_is_no_terminal() -> None:
    time, stream = Time(), io.StringIO()
    with Progress(60, console=Console(file=stream, width=110), now=time) as progress:
        progress.starting("starting Ray")
        time.pass_by(7)
        progress.starting("loading the engines (2)")
        time.pass_by(83)
        progress.starting("the first step")
        progress.phase("generate")
    assert [line.strip() for line in stream.getvalue().splitlines()] == [
        "0 s  starting Ray",
        "7 s  loading the engines (2)",
        "1 min 30 s  the first step",
    ]


def test_the_panel_counts_the_seconds_of_a_phase() -> None:
    time, stream = Time(), io.StringIO()
    console = Console(file=stream, width=110)
    progress = Progress(60, console=console, now=time)
    progress.phase("loading the engines (2)")
    time.pass_by(83)
    console.print(progress._panel())
    assert "loading the engines (2)  1 min 23 s" in stream.getvalue()


def test_an_evaluation_says_what_it_is_doing_and_how_far_it_is() -> None:
    time, stream = Time(), io.StringIO()
    with PhaseDisplay(Console(file=stream, width=110), time) as phases:
        phases.begin("loading the engines (1)")
        time.pass_by(60)
        phases.begin("answering held: responses", total=4)
        for _ in range(4):
            time.pass_by(20)
            phases.count()
    assert [line.strip() for line in stream.getvalue().splitlines()] == [
        "0 s  loading the engines (1)",
        "1 min 00 s  answering held: responses (4)",
        "1 min 40 s    2 of 4",
        "2 min 20 s    4 of 4",
    ]


def test_an_evaluation_in_a_terminal_counts_seconds_and_responses() -> None:
    time, stream = Time(), io.StringIO()
    with PhaseDisplay(Console(file=stream, force_terminal=True, width=110, color_system=None), time) as phases:
        phases.begin("answering \x1b[2Jheld: responses", total=4)
        phases.count()
        time.pass_by(12)
    assert "responses: 1 of 4, 12 s" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_values_that_are_not_finite_do_not_break_it() -> None:
    broken = dict.fromkeys(METRICS, math.nan) | {"time/step_s": 1.0}
    assert "nan" in show(True, 2, broken)
    assert "nan" in show(False, 2, broken)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0, 1], "\u2581\u2588"),
        ([1, 1], "\u2584\u2584"),
        ([0, math.nan, 1], "\u2581 \u2588"),
        ([], ""),
        ([math.nan], ""),
    ],
)
def test_sparkline(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_a_sparkline_leaves_room_for_the_target() -> None:
    assert sparkline([0.9, 1.0], include=0.0) == "\u2587\u2588"


def test_the_gauge_points_to_the_side_of_alpha() -> None:
    full = "\u2588"
    assert gauge(-1).plain.split("\u2502")[0].count(full) == 10
    assert gauge(0.5).plain.split("\u2502")[1].count(full) == 5
    assert gauge(0).plain.count(full) == 0
    assert gauge(7).plain.count(full) == 10


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (80, "1 min 20 s"), (3599.6, "1 h 00 min"), (3725, "1 h 02 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

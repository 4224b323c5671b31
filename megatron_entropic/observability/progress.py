"""Display of a run while it goes on: a live panel in a terminal, one plain line a step anywhere else.

with Progress(config.train.steps, done=resumed_steps, target=0.1) as progress:
    progress.phase("generate")
    progress.update(step, metrics)
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_entropic.files.text import printable
from megatron_entropic.observability.metrics import ENTROPY_BAND
from megatron_entropic.observability.yardsticks import MismatchYardstick

_HISTORY = 40
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_GAUGE_CELLS = 21
_RECENT_STEPS = 20


class Progress:
    """Shows a run's steps; `console.is_terminal` decides between the live panel and plain lines."""

    def __init__(
        self,
        total_steps: int,
        *,
        target: float | None = None,
        mismatch: MismatchYardstick | None = None,
        title: str = "",
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        """Start at step 0.

        Args:
            total_steps: steps of the whole run.
            target: entropy target in nats; None where nothing is controlled.
            mismatch: usual range of the mismatch; None where nothing is known to be usual.
            title: title of the panel.
            console: where to show the steps; None: standard output.
            now: a clock, in seconds.
        """
        self._now = now
        self._start = self._phase_start = now()
        self._total, self._target, self._usual, self._title = total_steps, target, mismatch, title
        self._console = console or Console()
        self._step = 0
        self._phase = "starting"
        self._metrics: Mapping[str, float] = {}
        self._history: dict[str, deque[float]] = {
            name: deque(maxlen=_HISTORY) for name in ("reward/mean", "entropy/mean", "entropy/alpha")
        }
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._live = live_display(self._console, self._panel, transient=False)

    def __enter__(self) -> Progress:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.phase("failed" if kind else "finished")
        self._live.__exit__(kind, error, trace)

    def phase(self, name: str) -> None:
        """Show what is going on now; plain output does not mention it."""
        self._phase, self._phase_start = name, self._now()

    def starting(self, name: str) -> None:
        """Show what is done before the first step; plain output gets a line with the time since the start."""
        self.phase(name)
        if not self._console.is_terminal:
            self.log(phase_line(self._now() - self._start, name))

    def resume(self, step: int) -> None:
        """Go on after this step: it and those before it are done."""
        self._step = step

    def log(self, message: str) -> None:
        """Show a message above the panel, or as a plain line."""
        self._console.print(printable(message), markup=False, highlight=False, soft_wrap=True)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step. Names are those of metrics.jsonl; what is missing is not shown."""
        self._step, self._metrics = step, metrics
        if "time/step_s" in metrics:
            self._step_seconds.append(metrics["time/step_s"])
        for name, values in self._history.items():
            if name in metrics:
                values.append(metrics[name])
        if not self._console.is_terminal:
            self.log(self._line())

    def seconds_left(self) -> float | None:
        """Time left in seconds, from the median of the recent steps' time/step_s; None before the first of them."""
        if not self._step_seconds:
            return None
        return max(0, self._total - self._step) * median(self._step_seconds)

    def _far(self, mismatch: float) -> bool:
        return self._usual is not None and not mismatch <= self._usual.limit

    def _line(self) -> str:
        """One step as plain text, with the same columns each time so that a log reads like a table."""
        metrics, width = self._metrics, len(str(self._total))
        parts = [f"step {self._step:>{width}}/{self._total}"]
        if "reward/mean" in metrics:
            parts.append(f"reward {metrics['reward/mean']:.3f}")
        if "entropy/mean" in metrics:
            aim = "" if self._target is None else f" (target {self._target:g})"
            parts.append(f"entropy {metrics['entropy/mean']:.3f}{aim}")
        if "entropy/alpha" in metrics:
            parts.append(f"alpha {metrics['entropy/alpha']:+.3f}")
        if "mismatch/logprob_abs_mean" in metrics:
            mean, largest = metrics["mismatch/logprob_abs_mean"], metrics.get("mismatch/logprob_abs_max", math.nan)
            far = f", {self._usual}" if self._far(mean) else ""
            parts.append(f"mismatch {mean:.1e} (max {largest:.1e}{far})")
        if "throughput/tokens_per_s" in metrics:
            parts.append(f"{metrics['throughput/tokens_per_s']:,.0f} tokens/s")
        left = self.seconds_left()
        if left is not None and self._step < self._total:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _panel(self) -> Panel:
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        left = self.seconds_left()
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, complete_style="cyan", pulse=False)
        head.add_row(
            Text(f"step {self._step} / {self._total}", style="bold"),
            bar,
            Text(f"{duration(left)} left" if left is not None else ""),
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", min_width=9)
        rows.add_column(justify="right", min_width=8)
        rows.add_column(no_wrap=True)
        for row in self._rows():
            rows.add_row(*row)
        foot = Text(self._phase, style="cyan")
        # A phase of minutes, such as loading engines, is seen to go on.
        if (waited := self._now() - self._phase_start) >= 1:
            foot.append(f"  {duration(waited)}", "dim")
        return Panel(Group(head, Text(), rows, Text(), foot), title=self._title or None, title_align="left")

    def _rows(self) -> list[tuple[str, Text, Text]]:
        metrics, history = self._metrics, self._history
        rows = []
        if "reward/mean" in metrics:
            rows.append(
                ("reward", Text(f"{metrics['reward/mean']:.3f}"), Text(sparkline(history["reward/mean"]), "green"))
            )
        if "entropy/mean" in metrics:
            entropy = metrics["entropy/mean"]
            near = self._target is not None and abs(entropy - self._target) <= ENTROPY_BAND * self._target
            style = "" if self._target is None else "green" if near else "yellow"
            aim = "" if self._target is None else f"  target {self._target:g}, off by {entropy - self._target:+.3f}"
            line = Text(sparkline(history["entropy/mean"], include=self._target), "magenta").append(aim, "dim")
            rows.append(("entropy", Text(f"{entropy:.3f}", style), line))
        if "entropy/alpha" in metrics:
            alpha = metrics["entropy/alpha"]
            rows.append(("alpha", Text(f"{alpha:+.3f}", "red" if abs(alpha) >= 1 else ""), gauge(alpha)))
        if "mismatch/logprob_abs_mean" in metrics:
            mean, largest = metrics["mismatch/logprob_abs_mean"], metrics.get("mismatch/logprob_abs_max", math.nan)
            note = f"mean, policy to engine; largest {largest:.1e}" + (f"; {self._usual}" if self._usual else "")
            rows.append(("mismatch", Text(f"{mean:.1e}", "yellow" if self._far(mean) else ""), Text(note, "dim")))
        if "throughput/tokens_per_s" in metrics:
            seconds = metrics.get("time/step_s")
            per_step = f"{seconds:.1f} s a step" if seconds is not None else ""
            rows.append(("tokens/s", Text(f"{metrics['throughput/tokens_per_s']:,.0f}"), Text(per_step, "dim")))
        return rows


def sparkline(values: Sequence[float], *, include: float | None = None) -> str:
    """Block characters between the smallest and the largest value; `include` widens the range to a target.

    A value that is not finite is a gap.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    bounds = finite if include is None else [*finite, include]
    low, span = min(bounds), max(bounds) - min(bounds)
    last = len(_BLOCKS) - 1
    return "".join(
        " " if not math.isfinite(value) else _BLOCKS[round((value - low) / span * last) if span else last // 2]
        for value in values
    )


def gauge(alpha: float) -> Text:
    """alpha on a scale from -1 to 1 with a mark in the middle: the side shows which way entropy is pushed."""
    half = _GAUGE_CELLS // 2
    clipped = min(1.0, max(-1.0, alpha)) if math.isfinite(alpha) else 0.0
    cells = round(abs(clipped) * half)
    left = "\u2588" * cells if clipped < 0 else ""
    right = "\u2588" * cells if clipped > 0 else ""
    text = Text("-1 ", "dim").append(f"{left:>{half}}", "blue").append("\u2502", "dim")
    text.append(f"{right:<{half}}", "red").append(" 1", "dim")
    text.append("  raises entropy" if clipped < 0 else "  lowers entropy" if clipped > 0 else "", "dim")
    return text


# What a command that takes minutes is doing: one line a phase, and in a terminal a line below that counts seconds.
#
# with PhaseDisplay(Console(stderr=True)) as phases:
#   | phases.begin("starting Ray")                 #   0 s  starting Ray
#   | phases.begin("answering held", total=128)    #  21 s  answering held (128)
#   | phases.count()                               #  51 s    37 of 128

_QUIET_S = 30.0
"""Seconds without a line after which plain output says how far a counted phase is."""


class PhaseDisplay:
    """Shows phases as they begin; a context manager."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, now
        self._start = self._phase_start = self._last_line = now()
        self._name, self._done, self._total = "", 0, 0
        self._live = live_display(console, self._moving, transient=True)

    def __enter__(self) -> PhaseDisplay:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def begin(self, name: str, total: int = 0) -> None:
        """Show that a phase begins, which ends the one before.

        Args:
            total: things that `count` will count; 0: nothing is counted.
        """
        self._name, self._done, self._total, self._phase_start = name, 0, total, self._now()
        self._line(f"{name} ({total:,})" if total else name)

    def count(self) -> None:
        """Count one more of the phase's things as done."""
        self._done += 1
        if not self._console.is_terminal and self._now() - self._last_line >= _QUIET_S:
            self._line(f"  {self._progress()}")

    def _line(self, text: str) -> None:
        self._last_line = self._now()
        line = phase_line(self._last_line - self._start, text)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _progress(self) -> str:
        return f"{self._done:,} of {self._total:,}"

    def _moving(self) -> Text:
        counted = f"{self._progress()}, " if self._total else ""
        seconds = duration(self._now() - self._phase_start)
        return Text(printable(f"{self._name}: {counted}{seconds}") if self._name else "", "cyan")


def quiet(name: str) -> None:
    """Show nothing: stands in for `PhaseDisplay.begin` where nobody waits."""


def phase_line(seconds: float, text: str) -> str:
    """One line of a log about a phase that began `seconds` after the command."""
    return printable(f"{duration(seconds):>12}  {text}")


def duration(seconds: float) -> str:
    """Text of a time in seconds: 3725 -> `1 h 02 min`, 80 -> `1 min 20 s`, 8 -> `8 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def live_display(console: Console, render: Callable[[], RenderableType], *, transient: bool) -> Iterator[None]:
    """Draw what `render` returns below the printed lines four times a second; nothing where there is no terminal.

    Args:
        console: where to draw.
        render: returns what to draw now.
        transient: whether the last drawing is wiped at the end.
    """
    if not console.is_terminal:
        yield
        return
    live = Live(get_renderable=render, console=console, refresh_per_second=4, transient=transient)
    live.start(refresh=True)
    try:
        yield
    finally:
        live.stop()

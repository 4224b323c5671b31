"""The part of a terminal that is drawn anew while something goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live


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

"""The timeline: trace events that Perfetto opens, of the newest steps."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_entropic.observability.timeline import TIMELINE_FILE, Timeline


def test_tracks_spans_and_counts_of_the_newest_steps(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, keep_steps=2)
    for step in range(4):
        timeline.span("driver", "score", step, step + 0.5)
        timeline.span("engine 0", "generate", step, step + 0.25, passes=3)
        timeline.count("waiting", step, 7)
        timeline.finish_step()
    timeline.write()
    events = json.loads((tmp_path / TIMELINE_FILE).read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("driver", "score", 2_000_000, 500_000),
        ("engine 0", "generate", 2_000_000, 250_000),
        ("driver", "score", 3_000_000, 500_000),
        ("engine 0", "generate", 3_000_000, 250_000),
    ]
    assert [event["args"] for event in events if event["ph"] == "C"] == [{"waiting": 7}] * 2


def test_no_file_where_none_is_wanted(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, keep_steps=0)
    timeline.span("driver", "score", 0, 1)
    timeline.finish_step()
    timeline.write()
    assert list(tmp_path.iterdir()) == []

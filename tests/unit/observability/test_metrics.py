"""metrics.jsonl and its sinks, written for real and read back."""

from __future__ import annotations

import builtins
import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.config.run import LoggingConfig
from megatron_entropic.errors import UserError
from megatron_entropic.observability.metrics import MetricsWriter, read_metrics, wandb_mode

PLAIN = LoggingConfig(tensorboard=False, wandb="off")


def test_one_object_a_step_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN) as writer:
        writer.write(1, {"reward/mean": 0.5, "grad_norm": float("inf"), "weights/version": 3})
        assert read_metrics(tmp_path)[-1]["reward/mean"] == 0.5
        writer.write(2, {"reward/mean": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "reward/mean": 0.5, "grad_norm": None, "weights/version": 3}
    assert json.loads(lines[1]) == {"step": 2, "reward/mean": None}


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": 2.0**-1074, "d": 1 / 3}
    with MetricsWriter(tmp_path, PLAIN) as writer:
        writer.write(1, values)
    assert read_metrics(tmp_path) == [{"step": 1} | values]


def test_a_resumed_run_writes_its_steps_again(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN) as writer:
        for step in range(1, 6):
            writer.write(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')
    with MetricsWriter(tmp_path, PLAIN) as writer:
        writer.truncate_after(3)
        writer.write(4, {"x": 40})
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such run directory"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"it has no metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(ValueError, match="no complete step yet"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"steps": 1}\n')
    with pytest.raises(ValueError, match="line 1: no integer 'step'"):
        read_metrics(tmp_path)


def test_tensorboard_reads_back_and_forgets_what_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(tensorboard=True, wandb="off")
    with MetricsWriter(tmp_path, config) as writer:
        for step in range(1, 6):
            writer.write(step, {"reward/mean": step / 10, "grad_norm": float("nan")})
    with MetricsWriter(tmp_path, config) as writer:
        writer.truncate_after(3)
        writer.write(4, {"reward/mean": 0.9})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    scalars = {event.step: event.value for event in events.Scalars("reward/mean")}
    assert scalars == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.9})


@pytest.mark.parametrize(
    ("library", "switch"), [("tensorboard", "logging.tensorboard=false"), ("wandb", "logging.wandb=off")]
)
def test_a_library_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, switch: str
) -> None:
    real_import = builtins.__import__

    def without_it(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(builtins, "__import__", without_it)
    config = LoggingConfig(tensorboard=library == "tensorboard", wandb="offline" if library == "wandb" else "off")
    with pytest.raises(ValueError, match=f"'{library}' is not installed: install it, or set {switch}"):
        MetricsWriter(tmp_path, config)


def test_wandb_mode_of_the_environment_is_followed_unless_the_run_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    for word, mode in (("", "online"), ("offline", "offline"), ("dryrun", "offline"), ("disabled", "off")):
        monkeypatch.setenv("WANDB_MODE", word)
        assert wandb_mode("auto") == mode
        assert wandb_mode("online") == "online"
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=False, wandb="auto")) as writer:
        writer.write(1, {"reward/mean": 1.0})
    assert not (tmp_path / "wandb").exists(), "disabled"
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE=onlin"):
        wandb_mode("auto")


def test_wandb_offline_without_a_key_and_resumed_by_id(tmp_path: Path) -> None:
    """Two attempts at one run, in processes of their own, end up under one W&B id with all their steps."""
    program = f"""
        import sys
        from pathlib import Path
        from megatron_entropic.config.run import LoggingConfig
        from megatron_entropic.observability.metrics import MetricsWriter

        config = LoggingConfig(tensorboard=False, wandb="auto", wandb_project="test")
        first = int(sys.argv[1])
        with MetricsWriter(Path({str(tmp_path)!r}), config, run_name="a name", run_config={{"seed": 7}}) as writer:
            writer.truncate_after(first - 1)
            for step in range(first, first + 3):
                writer.write(step, {{"reward/mean": step / 10}})
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    for first in (1, 3):
        command = [sys.executable, "-c", textwrap.dedent(program), str(first)]
        subprocess.run(command, check=True, timeout=300, env=environment | {"HOME": str(tmp_path)})
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    rows = [row for path in files for row in _wandb_history(path)]
    assert [(row["step"], row["reward/mean"]) for row in rows] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (3, 0.3),
        (4, 0.4),
        (5, 0.5),
    ]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def _wandb_history(path: Path) -> Iterator[dict[str, Any]]:
    """The history rows of an offline run: protobuf records in LevelDB's log framing (32 KiB blocks)."""
    from wandb.proto import wandb_internal_pb2

    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

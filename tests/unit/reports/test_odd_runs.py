"""Runs that were killed early, edited by hand or written by another version: shown as far as they go, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.cli import main
from megatron_entropic.files.text import printable
from megatron_entropic.observability.metrics import read_metrics
from megatron_entropic.reports.advice import verdicts
from megatron_entropic.reports.report import write_report
from megatron_entropic.reports.run import load_run, summarise

ODD_VALUES: list[Any] = [
    None,
    "0.5",
    "text",
    [1],
    {"a": 1},
    True,
    10**400,
    1e308,
    1e99,
    -1e99,
    float("nan"),
    float("inf"),
]
NAMES = (
    "entropy/mean",
    "entropy/target",
    "entropy/alpha",
    "reward/mean",
    "time/step_s",
    "time/generate_s",
    "grad_norm",
)


def odd_run(directory: Path, config: str = "") -> Path:
    """Every odd value under every name, among sound rows."""
    rows = [{"step": step, **dict.fromkeys(NAMES, 0.5)} for step in range(1, 5)]
    rows += [{"step": 5 + k, **dict.fromkeys(NAMES, value)} for k, value in enumerate(ODD_VALUES)]
    rows.append({"step": 50, "entropy/mean": 0.5, "odd/one": "\x1b[2Jgone", "odd/two": 10**400})
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "samples.jsonl").write_text(
        '{"step": "x", "response": "\\u001b[31mred"}\n{"step": 50}\n'
        '{"step": 50, "response": "a\\u001b]0;t\\u0007b\\u009b", "reward": "high"}\n'
    )
    if config:
        (directory / "config.yaml").write_text(config)
    return directory


ODD_CONFIG = """
train: {steps: many}
model: {hf_dir: [1]}
run: {name: 7}
rollout: 3
entropy_control: {target: relative, tau: none, kp: {}}
algorithm: {optimizer_steps_per_rollout: two}
"""


def test_a_report_shows_what_is_there_of_odd_metrics_and_no_control_character(tmp_path: Path) -> None:
    run = odd_run(tmp_path / "odd", ODD_CONFIG)
    page = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    assert not [character for character in page if ord(character) < 32 and character not in "\n\t"]
    assert "\x9b" not in page
    assert "a\u241b]0;t\u2407b\\u009b" in page
    assert "\u241b[2Jgone" in page


@pytest.mark.parametrize("config", ["", ODD_CONFIG, "3: {}", "# nothing\n"])
def test_odd_metrics_count_as_missing(tmp_path: Path, config: str) -> None:
    run = load_run(odd_run(tmp_path / "odd", config))
    assert run.finite("reward/mean") == [0.5] * 4 + [1e99, -1e99]
    assert summarise(run).steps == 50
    assert isinstance(verdicts(run), list)


def test_a_step_that_is_told_twice_counts_once(tmp_path: Path) -> None:
    rows = [{"step": step, "reward/mean": value} for value in (0.1, 0.2) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(tmp_path) == rows[3:]


@pytest.mark.parametrize("step", ["true", "1.5", '"1"', "null", "-1", "1" + "0" * 30])
def test_a_row_without_a_step_is_named(tmp_path: Path, step: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')
    with pytest.raises(ValueError, match="line 2: no integer 'step'"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("command", ["tune", "rollouts"])
def test_other_commands_say_what_is_missing_of_an_odd_run(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = odd_run(tmp_path / "odd", ODD_CONFIG)
    assert main([command, str(run)]) == 2
    error = capsys.readouterr().err
    assert "at least 10 steps" in error or "no rollouts are recorded" in error
    (run / "config.yaml").write_bytes(b"run: \xff")
    assert main([command, str(run)]) == 2
    assert "config.yaml: not UTF-8 text" in capsys.readouterr().err


def test_text_keeps_what_does_not_act() -> None:
    kept = "tab\tline\n\u00fc \u6f22 \U0001f642 \u241b \u2028 \u00a0"
    assert printable(kept) == kept
    assert printable("\x1b[0m\r\x00\x7f\x85\u202e\udc80") == "\u241b[0m\u240d\u2400\u2421\\u0085\\u202e\\udc80"

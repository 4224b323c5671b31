"""The report: self-contained, escaped, right in its numbers, and clear about what it cannot read."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from trajectories import reward_of, task_of, trajectory_of

from megatron_entropic.observability.records import SampleLog
from megatron_entropic.reports import lines, plots
from megatron_entropic.reports.report import write_report
from megatron_entropic.reports.run import load_run, summarise
from megatron_entropic.types import Group, Reward, TrainingBatch

HOSTILE = "<script>alert('x')</script> & $x_1$ \"quoted\""


def metrics(step: int, controlled: bool) -> dict[str, Any]:
    entropy = 0.5 + 0.1 * math.exp(-step / 5) if controlled else 0.5 - 0.005 * step
    row: dict[str, Any] = {
        "step": step,
        "entropy/mean": entropy,
        "reward/mean": step / 100,
        "mismatch/logprob_abs_mean": 1e-7 if step % 2 else 0.0,
        "mismatch/logprob_abs_max": 1e-6 * step,
        "response/length_mean": 5.0,
        "grad_norm": None if step == 3 else 0.5,
        "throughput/tokens_per_s": 1000.0 + step,
        "time/generate_s": 1.0,
        "time/update_s": 0.5,
        "time/step_s": 2.0,
    }
    if controlled:
        alpha = -1.0 if step <= 10 else 0.25
        row |= {
            "entropy/target": 0.5,
            "entropy/alpha": alpha,
            "entropy/proportional": 0.2,
            "entropy/integral_term": 0.1,
        }
    return row


def make_run(path: Path, name: str, *, controlled: bool = True, steps: int = 40) -> Path:
    path.mkdir()
    config = {
        "run": {"name": name, "output_dir": str(path)},
        "model": {"hf_dir": "/models/tiny"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2},
        "entropy_control": {"controller": "pi" if controlled else "off", "target": 0.5, "kp": 5.0, "ki": 0.2},
        "train": {"steps": 40},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = (metrics(step, controlled) for step in range(1, steps + 1))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Page(HTMLParser):
    """What the page refers to, and its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "my run")
    path = write_report([run], tmp_path / "out")
    content = path.read_text()
    page = Page(content)
    assert page.references
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in re.sub(r"base64,[^\"]*", "", content)
    for part in ("my run", "40 of 40 steps", "EntroPIC-PI, K_p 5.0, K_i 0.2", "Mean |H \u2212 target|", "25%"):
        assert part in page.text, part
    slugs = {"entropy", "alpha", "reward", "mismatch", "response_length", "gradient_norm", "time"}
    assert {image.stem for image in (tmp_path / "out").glob("*.png")} == slugs
    for image in (tmp_path / "out").glob("*.png"):
        assert matplotlib.image.imread(image).std() > 0.01
    assert len(page.references) == 2 * len(slugs)


def test_the_numbers_on_the_cards(tmp_path: Path) -> None:
    summary = summarise(load_run(make_run(tmp_path / "a", "a")))
    last = range(21, 41)
    assert summary.steps == 40
    assert summary.reward == pytest.approx(sum(step / 100 for step in last) / 20)
    assert summary.reward_start == pytest.approx(0.105)
    assert summary.tracking_error == pytest.approx(sum(0.1 * math.exp(-step / 5) for step in last) / 20)
    assert summary.on_target
    assert summary.saturated == 0.25
    assert summary.mismatch == pytest.approx(0.5e-7)
    assert summary.worst_mismatch == pytest.approx(40e-6)
    assert summary.tokens_per_s == 1020.5
    assert summary.hours == pytest.approx(80 / 3600)


def test_several_runs_overlaid(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "controlled"), make_run(tmp_path / "b", "free", controlled=False, steps=30)]
    page = Page(write_report(runs, tmp_path / "out").read_text())
    for part in ("Comparison of 2 runs", "controlled", "free", "no entropy control", "What differs", "30 of 40 steps"):
        assert part in page.text, part
    assert "entropy_control.controller" in page.text.split("What differs")[1].split("Metrics of the last step")[0]
    assert "run.output_dir" not in page.text.split("What differs")[1].split("Metrics of the last step")[0]


def test_held_out_problems_are_drawn_where_they_were_answered(tmp_path: Path) -> None:
    (plot,) = [plot for plot in plots.PLOTS if plot.slug == "benchmarks"]
    for count in (1, 2):
        runs = []
        for index in range(count):
            run = make_run(tmp_path / f"{count} {index}", f"run {index}", steps=20)
            rows = [metrics(step, controlled=True) for step in range(1, 21)]
            for row in rows[9::10]:
                row |= {f"evaluation/{name}/avg": row["step"] / 100 for name in ("sums", "words")}
                row |= {"evaluation/sums/pass": 0.5}
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            runs.append(run)
        axes = Figure().add_subplot()
        assert plot.draw(axes, [load_run(run) for run in runs], lines.LIGHT)
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        average = ([10, 20], [0.1, 0.2])
        assert drawn == [average, ([10, 20], [0.5, 0.5]), average] * count
        labels = axes.get_legend_handles_labels()[1]
        assert labels == (
            ["sums", "words"]
            if count == 1
            else [f"run {index}: {name}" for index in (0, 1) for name in ("sums", "words")]
        )
        write_report(runs, tmp_path / f"out {count}")
        assert (tmp_path / f"out {count}" / "benchmarks.png").is_file()
    assert not plot.draw(Figure().add_subplot(), [load_run(make_run(tmp_path / "none", "none"))], lines.LIGHT)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first", "same"), make_run(tmp_path / "second", "same")]
    text = Page(write_report(runs, tmp_path / "out").read_text()).text
    assert "first" in text
    assert "second" in text
    (tmp_path / "x").mkdir()
    runs.append(make_run(tmp_path / "x" / "second", "same"))
    text = Page(write_report(runs, tmp_path / "out").read_text()).text
    for run in runs:
        assert f"same ({run})" in text


def test_text_of_models_and_users_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", HOSTILE)
    log = SampleLog(run, 2)
    task, text = task_of(0, text=f"prompt {HOSTILE}"), f"\udc80 response {HOSTILE}"
    trajectory = trajectory_of(task, 0, [1, 2], text, finish_reason="length")
    log.write(40, TrainingBatch((Group((trajectory,), (Reward(0.0, 0.0, "timeout"),)),), ()))
    log.close()
    page = Page(write_report([run], tmp_path / "out").read_text())
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 4
    assert "cut off at the limit" in page.text
    assert "verifier: timeout" in page.text


def test_samples_of_different_prompts_come_first(tmp_path: Path) -> None:
    tasks = [task_of(i, text=f"p{i}") for i in range(3)]
    attempts = [tuple(trajectory_of(task, k, text=f"r{k}") for k in range(4)) for task in tasks]
    batch = TrainingBatch(tuple(Group(of_one, (reward_of(1.0),) * 4) for of_one in attempts), ())
    log = SampleLog(tmp_path, 4)
    log.write(1, batch)
    log.write(2, batch)
    log.truncate_after(1)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"], row["response"]) for row in rows] == [
        (1, "p0", "r0"),
        (1, "p1", "r0"),
        (1, "p2", "r0"),
        (1, "p0", "r1"),
    ]
    SampleLog(tmp_path / "none", 0).write(1, batch)
    assert not (tmp_path / "none").exists()


def test_a_torn_last_line_and_a_single_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "young", steps=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "entr')
    assert "1 of 40 steps" in Page(write_report([run], tmp_path / "out").read_text()).text


def test_a_run_with_almost_nothing(tmp_path: Path) -> None:
    """Figures and cards without data are left out."""
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 1.0}\n')
    page = Page(write_report([run], tmp_path / "out").read_text())
    assert [image.stem for image in (tmp_path / "out").glob("*.png")] == ["reward"]
    assert "bare" in page.text
    assert "Worst mismatch" not in page.text


def test_every_unreadable_run_is_named(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", "good")
    (tmp_path / "empty").mkdir()
    torn = make_run(tmp_path / "torn", "torn")
    (torn / "metrics.jsonl").write_text('{"step": 1')
    damaged = make_run(tmp_path / "damaged", "damaged")
    (damaged / "metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 3}\n')
    with pytest.raises(ValueError) as caught:
        write_report([good, tmp_path / "nowhere", tmp_path / "empty", torn, damaged], tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for line, (name, reason) in zip(
        lines,
        [
            ("nowhere", "no such run directory"),
            ("empty", "no metrics.jsonl"),
            ("torn", "no complete step yet"),
            ("damaged", "line 2: not valid JSON"),
        ],
        strict=True,
    ):
        assert str(tmp_path / name) in line
        assert reason in line
    assert not (tmp_path / "out").exists()


def test_conversations_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    by_slug = {plot.slug: plot for plot in plots.PLOTS}
    runs = []
    for name in ("a", "b"):
        run = make_run(tmp_path / name, name, steps=5)
        rows = [metrics(step, controlled=True) for step in range(1, 6)]
        for row in rows:
            row |= {"environment/turns_mean": 2.0, "entropy/turn_1": 0.5, "entropy/turn_2": row["step"]}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(load_run(run))
    for shown in (runs[:1], runs):
        axes = Figure().add_subplot()
        assert by_slug["turn_entropy"].draw(axes, shown, lines.LIGHT)
        drawn = [list(line.get_ydata()) for line in axes.get_lines()]
        np.testing.assert_allclose(sorted(drawn), sorted([[0.5] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]] * len(shown)))
        assert by_slug["turns"].draw(Figure().add_subplot(), shown, lines.DARK)
    without = [load_run(make_run(tmp_path / "c", "c"))]
    assert not any(
        by_slug[slug].draw(Figure().add_subplot(), without, lines.LIGHT) for slug in ("turns", "turn_entropy")
    )

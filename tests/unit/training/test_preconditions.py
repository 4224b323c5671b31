"""`train --check` opens what a start opens, and tells everything that is wrong with all of it at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_entropic.cli import main
from megatron_entropic.training.machine import load_checked_config
from megatron_entropic.training.preconditions import open_inputs

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "countdown_cpu.yaml"


@pytest.fixture
def files(countdown_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model and a few rows of the example; also the current directory's only content."""
    folder = tmp_path / "countdown"
    shutil.copytree(countdown_dir / "model", folder / "model")
    for name in ("train", "warm_start"):
        rows = pq.read_table(countdown_dir / f"{name}.parquet").slice(0, 20)
        pq.write_table(rows, folder / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    return folder


def arguments(files: Path, *overrides: str) -> list[str]:
    return [
        f"model.hf_dir={files / 'model'}",
        f"data.train_files={files / 'train.parquet'}",
        f"warm_start.file={files / 'warm_start.parquet'}",
        f"run.output_dir={files.parent / 'run'}",
        *overrides,
    ]


def check(files: Path, *overrides: str) -> int:
    return main(["train", str(EXAMPLE), "--check", *arguments(files, *overrides)])


def test_what_can_start_is_accepted_and_nothing_is_left_behind(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(files) == 0
    assert "train.parquet" in capsys.readouterr().out
    assert sorted(path.name for path in files.parent.iterdir()) == ["countdown"]


def test_everything_that_a_start_would_meet_is_told_at_once(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncated weights, a loss that does not import, a controller that is none, data and warm start without use."""
    weights = files / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (files.parent / "my_loss.py").write_text("def half(")
    (files / "train.jsonl").write_text('{"problem": "", "answer": 7}\n')
    (files / "pairs.jsonl").write_text('{"prompt": "1"}\n')
    (files / "bench.jsonl").write_text('{"question": ""}\n')
    status = check(
        files,
        f"data.train_files={files / 'train.jsonl'}",
        f"warm_start.file={files / 'pairs.jsonl'}",
        f"evaluation.benchmarks={{b: {files / 'bench.jsonl'}}}",
        "algorithm.policy_loss=my_loss:half",
        "entropy_control.controller=json:JSONDecoder",
        "reward.added={no_module_of_mine:f: 1}",
    )
    told = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in told
    for part in (
        "model.safetensors: truncated",
        "algorithm.policy_loss=my_loss:half: my_loss cannot be imported: SyntaxError",
        "entropy_control.controller=json:JSONDecoder: JSONDecoder is no subclass",
        "no_module_of_mine cannot be imported",
        "bench.jsonl",
        "train.jsonl, line 1: ",
        "pairs.jsonl",
    ):
        assert part in told, (part, told)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.megatron_dir=elsewhere"], "elsewhere"),
        (
            ["algorithm.kl.coefficient=0.1", "algorithm.kl.reference_hf_dir=reference"],
            "reference: the checkpoint",
        ),
        (
            ["algorithm.distillation.teacher_hf_dir=other_tokens"],
            "other_tokens: its tokenizer is not the policy's: 1 token ids mean something else",
        ),
        (
            ["reward.verifier=judge", "reward.judge={urls: [http://127.0.0.1:9/v1], model: m, request_timeout_s: 5}"],
            "the judge (reward.judge) does not answer: http://127.0.0.1:9/v1: ConnectError",
        ),
        (["reward.verifier=os:system"], "verifier=os:system: is called with 3 arguments"),
        (["algorithm.policy_loss=math:pi"], "there is no function or class pi in math"),
        (["run.resume=never"], "exists and run.resume=never"),
        ([], "is damaged: x has"),
        (["train.steps=1"], "train.steps=1, but this run has done 2"),
        (["logging.wandb=auto"], "WANDB_MODE=never in the environment: expected online"),
    ],
)
def test_each_thing_that_is_opened(
    overrides: list[str],
    expected: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "never")
    shutil.copytree(files / "model", files.parent / "reference")
    config = files.parent / "reference" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    shutil.copytree(files / "model", files.parent / "other_tokens")
    tokens = files.parent / "other_tokens" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"7":', '"seven":'))
    (files.parent / "elsewhere").mkdir()
    (files.parent / "elsewhere" / ".metadata").write_bytes(b"no metadata")
    if not overrides or overrides in (["run.resume=never"], ["train.steps=1"]):
        newest = files.parent / "run" / "checkpoints" / "step_00000002"
        newest.mkdir(parents=True)
        (newest / "COMPLETE").write_text('{"files": {"x": 5}}')
    if overrides == ["train.steps=1"]:
        (newest / "COMPLETE").write_text('{"files": {}}')
        (newest / "state.json").write_text('{"state": {}}')
    assert check(files, *overrides) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert expected in told, told


def test_a_start_needs_neither_ray_nor_vllm_to_be_checked() -> None:
    code = (
        "import sys, megatron_entropic.training.preconditions;"
        "print(sorted({'ray', 'vllm', 'megatron'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"


def test_what_was_opened_is_what_the_run_gets(files: Path) -> None:
    config = load_checked_config(EXAMPLE, arguments(files, "warm_start.steps=2", "warm_start.sequences_per_step=4"))
    with open_inputs(config) as inputs:
        assert len(inputs.tasks) == 20
        assert [len(lesson) for lesson in inputs.lessons] == [4, 4]
        assert not inputs.evaluator.due(1)

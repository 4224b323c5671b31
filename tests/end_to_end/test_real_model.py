"""SmolLM2-135M-Instruct through the commands: a step of training over pipeline stages, its answers, evaluation, export.

A toy of random weights has no text to read and no large channels to round, and its log-probs hardly differ from one
context to the next: an engine that has the right weights is told from one that has not by a model that knows something.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pyarrow.parquet
import pytest
import torch
from modules import load_module
from training_run import ROOT, Run

from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.cli import main
from megatron_entropic.observability.records import read_rollouts, recorded_steps, rollouts_path

Command = Callable[..., str]
ANSWER = r"\A\s*.*?(-?[0-9]+)[^0-9\n]*$"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command(*words)` -> what megatron-entropic printed; it must succeed."""

    def run(*words: object) -> str:
        status = main([str(word) for word in words])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums behind one solved example, as examples/real_model.sh has them; nine are held out."""
    folder = tmp_path_factory.mktemp("problems")
    arithmetic = load_module(ROOT / "examples/arithmetic.py", "arithmetic")
    arithmetic.prepare(folder, levels=(1, 2, 3), sizes=arithmetic.Sizes(shots=1, heldout=9))
    return folder


@pytest.fixture(scope="module")
def trained(smollm2: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A step of examples/real_model.yaml, 16 answers, over two pipeline stages, evaluated after it."""
    directory = tmp_path_factory.mktemp("real_model") / "run"
    settings = {
        "run.output_dir": directory,
        "model.hf_dir": smollm2,
        "data.train_files": problems / "few_shot/sums_train.parquet",
        "reward.workers": 1,
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 4,
        "rollout.kv_cache_gb": 0.1,
        "policy.data_parallel": 1,
        "policy.pipeline_parallel": 2,
        "optimizer.warmup_steps": 0,
        "train.steps": 1,
        "evaluation.benchmarks": f"{{sums: {problems / 'few_shot/sums_heldout.parquet'}}}",
        "evaluation.every_steps": 1,
        "logging.rollouts_every_steps": 1,
        "logging.wandb": "off",
    }
    run = Run(directory, [str(ROOT / "examples/real_model.yaml"), *(f"{key}={one}" for key, one in settings.items())])
    run.finish()
    return run


def test_the_engine_has_the_weights_of_both_stages(trained: Run) -> None:
    first = trained.metrics()[0]
    assert first["mismatch/logprob_abs_max"] < 5e-4, "of a policy that is sure of some tokens and not of others"
    assert 0.3 < first["entropy/rollout"] < 2.0, "near one nat, as this model has on such problems"


def test_the_update_reached_every_tensor_and_the_export_has_it(trained: Run, smollm2: Path) -> None:
    before, after = HfReader(smollm2), HfReader(trained.directory / "hf")
    assert len(after.names) > 250
    assert after.names == before.names
    assert [name for name in after.names if torch.equal(before[name], after[name])] == []


def test_rollouts_shows_the_text_that_was_sampled(trained: Run, command: Command) -> None:
    shown = command("rollouts", trained.directory, "--prompts", 4)
    assert re.search(r"\d+ [-+*] \d+ = -?\d+", shown), shown
    assert "\ufffd" not in shown
    assert len(read_rollouts(rollouts_path(trained.directory, recorded_steps(trained.directory)[0])).responses) == 16


def test_evaluate_solves_some_sums_with_the_model_as_it_comes(
    smollm2: Path, problems: Path, command: Command, tmp_path: Path
) -> None:
    options = "--samples 8 --max-tokens 4 --max-prompt-tokens 96 --no-chat-template --workers 1 --kv-cache-gb 0.1"
    command(
        "evaluate",
        *("--model", smollm2, "--output-dir", tmp_path / "out", "--dtype", "float32"),
        *("--benchmarks", f"sums={problems / 'few_shot/sums_heldout.parquet'}", *options.split()),
        *("--answer", "regex", "--answer-pattern", ANSWER),
    )
    (sums,) = json.loads((tmp_path / "out/evaluation.json").read_text())["benchmarks"]
    rows = pyarrow.parquet.read_table(tmp_path / "out/sums.parquet").to_pylist()
    assert len(rows) == 72
    assert sums["average"]["value"] == pytest.approx(fmean(row["reward"] for row in rows))
    assert 0.05 < sums["average"]["value"] < 0.6, "a fifth, of many more sums"


def test_int8_weights_cost_a_language_model_thousandths_of_a_nat(
    smollm2: Path, problems: Path, command: Command, tmp_path: Path
) -> None:
    """And rounded inputs far more: of real text a few channels are much larger than the others."""
    calibration = ("--calibration", problems / "few_shot/words_train.parquet", "--max-prompts", 8)
    printed = command(
        "export", smollm2, "--quantize", "int8", "--output-dir", tmp_path / "int8", *calibration, "--max-kl", 1
    )
    found = re.search(r"mean (\S+), max (\S+) nats over (\d+) tokens", printed)
    assert found is not None, printed
    assert 1e-4 < float(found[1]) < 0.02
    assert int(found[3]) > 200

"""Errors that no restore-equality test or single-step test shows; each is seen to happen without its remedy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "optimizer_traps.py"
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.5


@pytest.fixture(scope="module")
def ranks(run_ranks_once, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("traps")
    write_tiny_model("qwen3", directory / "model")
    return [json.loads(output) for output in run_ranks_once(SCRIPT, 2, directory, timeout_s=540)]


def test_resumed_parameters_have_a_step_count_each(ranks):
    for report in ranks:
        patched = report["shared step"]["patched"]
        assert patched["tensors"] == patched["parameters"] > 10
        assert patched["counts"] == [3.0]
        assert patched["metrics"] == report["shared step"]["went on"]


def test_the_shared_step_count_still_needs_its_patch(ranks):
    for report in ranks:
        unpatched = report["shared step"]["load_state_dict"]
        assert unpatched["tensors"] == 1
        assert unpatched["counts"] == [2.0 + unpatched["parameters"]], "one step counted once for every parameter"


def test_the_restored_step_count_still_needs_its_patch(ranks):
    for report in ranks:
        unpatched = report["shared step"]["_set_main_param_and_optimizer_states"]
        assert unpatched["counts"] == [1.0], "the steps before the checkpoint are forgotten"


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "distributed"])
def test_the_first_step_decays_matrices_and_nothing_else(ranks, kind):
    for report in ranks:
        case = report["weight decay"][kind]
        assert len(case["vectors"]) > 10
        for name, factor in case["factors"].items():
            expected = 1.0 if name in case["vectors"] else 1.0 - LEARNING_RATE * WEIGHT_DECAY
            assert factor == pytest.approx(expected, abs=1e-7), name
        assert case["upstream"] == [WEIGHT_DECAY], "without a scheduler megatron-core no longer decays norms"


def test_saving_starts_no_process(ranks):
    for report in ranks:
        assert report["shared step"]["children"] == 0


def test_the_checkpoint_writer_still_needs_its_patches():
    # Read, not imported: this process has no platform.
    locations = [Path(location) for location in importlib.util.find_spec("megatron").submodule_search_locations]
    core = next(location / "core" for location in locations if (location / "core").is_dir())
    source = (core / "dist_checkpointing" / "strategies" / "filesystem_async.py").read_text(encoding="utf-8")
    assert "ctx.Manager().Queue()" in source, "results no longer go through a server process"
    forks = 'ctx = mp.get_context("fork")' in source
    fails_alone = "assert isinstance(local_results_or_exc, list)" in source and "threading.Thread(" in source
    assert forks or fails_alone

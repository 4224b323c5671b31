"""A process that dies in the middle of a publication: who is named, and that nobody samples from half-new weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_run import Run, run_script

SCRIPT = Path(__file__).parent / "scripts" / "broken_publications.py"
LIMIT_S = 100.0


@pytest.fixture(scope="module")
def seen(countdown_run: Callable[..., Run]) -> dict[str, Any]:
    run = countdown_run(
        "broken_publications",
        "policy.tensor_parallel=1",
        "policy.pipeline_parallel=3",
        "rollout.engines=1",
        "cluster.max_engine_restarts=1",
        f"cluster.publish_timeout_s={LIMIT_S}",
    )
    output = run.directory.with_suffix(".json")
    finished = run_script(SCRIPT, output, *run.arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report: dict[str, Any] = json.loads(output.read_text())
    return report


@pytest.mark.parametrize(("victim", "name"), [("policy", "policy rank 1"), ("engine", "engine 0")])
def test_the_error_names_phase_and_process_within_the_limit(seen: dict[str, Any], victim: str, name: str) -> None:
    found = seen[victim]
    assert not found["ended early"], found["error"]
    assert found["error"].startswith(
        ("PeerDied: publish (weights version 3): ", "RunError: publish (weights version 3)")
    )
    assert name in found["error"]
    assert found["seconds"] < LIMIT_S


def test_an_engine_that_is_lost_in_a_publication_is_replaced_and_has_the_new_weights(seen: dict[str, Any]) -> None:
    replaced = seen["engine"]["replaced"]
    assert not replaced["ended early"]
    assert replaced["error"] == "NoneType: None"
    assert set(replaced["versions"]) == {2}


def test_engines_that_get_the_policys_weights_at_once_read_none_before(seen: dict[str, Any]) -> None:
    """Each read the whole model at its start, 30 TB for 64 engines of 235B, and had it replaced before a token."""
    for found in seen.values():
        assert "no weights were published to this engine yet" in found["unpublished"]


def test_a_half_updated_engine_never_generates(seen: dict[str, Any]) -> None:
    assert "the engine's weights are incomplete, publish again" in seen["policy"]["refusal"]
    assert "engine 0 died" in seen["engine"]["refusal"]


def test_every_start_publishes_and_samples_whatever_happened_before(seen: dict[str, Any]) -> None:
    for found in seen.values():
        assert set(found["versions"]) == {1}

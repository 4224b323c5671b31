"""A step's rollouts come back from disk as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_entropic.errors import UserError
from megatron_entropic.files.formats import FileFormat
from megatron_entropic.observability.records import read_rollouts, recorded_steps, rollouts_path, write_rollouts
from megatron_entropic.types import Prompt, Sample, Scores, Sequence


def step_of(*lengths: int, reference: bool) -> tuple[list[Sample], list[Sequence], Scores]:
    draw = torch.Generator().manual_seed(1)
    samples, batch, logprobs, entropies = [], [], [], []
    for number, length in enumerate(lengths):
        prompt = Prompt(7, [1, 2], "What?", {"target": 3}, "file", {"level": "hard"})
        values = [-torch.rand(length, generator=draw) for _ in range(3)]
        tokens = list(range(length))
        samples.append(
            Sample(
                prompt,
                number,
                tokens,
                values[0].tolist(),
                "stop",
                4,
                text="a\ud800b",
                reward=0.5,
                verifier_status="ok",
                verifier_reward=0.25,
            )
        )
        batch.append(
            Sequence(
                torch.tensor([1, 2, *tokens]),
                2,
                advantages=torch.full((length,), 0.25),
                reference_logprobs=values[2] if reference else None,
            )
        )
        logprobs.append(values[1])
        entropies.append(-values[1])
    return samples, batch, Scores(logprobs, entropies)


@pytest.mark.parametrize("reference", [True, False])
def test_everything_comes_back(reference: bool, tmp_path: Path) -> None:
    samples, batch, scores = step_of(3, 0, 5, reference=reference)
    path = rollouts_path(tmp_path, 12)
    write_rollouts(path, 12, samples, batch, scores, {"entropy/alpha": -0.25})
    read = read_rollouts(path)
    assert recorded_steps(tmp_path) == [12]
    assert (read.step, read.metrics) == (12, {"entropy/alpha": -0.25})
    assert len(read.responses) == 3
    for index, response in enumerate(read.responses):
        sample = samples[index]
        assert response.sample.prompt == sample.prompt
        assert response.sample.text == "a\\ud800b"
        for name in (
            "sample_index",
            "response_tokens",
            "finish_reason",
            "weights_version",
            "reward",
            "verifier_reward",
            "verifier_status",
        ):
            assert getattr(response.sample, name) == getattr(sample, name), name
        np.testing.assert_array_equal(np.float32(response.sample.rollout_logprobs), np.float32(sample.rollout_logprobs))
        np.testing.assert_array_equal(response.old_logprobs, scores.logprobs[index].numpy())
        np.testing.assert_array_equal(response.entropies, scores.entropies[index].numpy())
        np.testing.assert_array_equal(response.advantages, batch[index].advantages.numpy())
        if reference:
            np.testing.assert_array_equal(response.reference_logprobs, batch[index].reference_logprobs.numpy())
        else:
            assert response.reference_logprobs is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert recorded_steps(tmp_path) == []
    with pytest.raises(ValueError, match="not the recorded rollouts"):
        read_rollouts(tmp_path / "missing.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not the recorded rollouts"):
        read_rollouts(tmp_path / "x.parquet")


def test_files_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of before there were versions are read; a newer one is called what it is, and is not deleted."""
    samples, batch, scores = step_of(3, reference=False)
    path = rollouts_path(tmp_path, 12)
    monkeypatch.setattr(FileFormat, "stamp", lambda self, content: content)
    write_rollouts(path, 12, samples, batch, scores, {})
    assert read_rollouts(path).step == 12
    monkeypatch.setattr(FileFormat, "stamp", lambda self, content: {"format_version": 2, **content})
    write_rollouts(path, 12, samples, batch, scores, {})
    with pytest.raises(UserError, match=r"step_000012\.parquet: written by a newer .* \(rollouts format 2"):
        read_rollouts(path)

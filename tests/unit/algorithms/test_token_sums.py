"""Means over a rollout part by part: the bits of one part, the values of many, and no copy of the whole."""

from __future__ import annotations

import pytest
import torch

from megatron_entropic.algorithms import importance_metrics, mismatch_metrics, mismatch_metrics_of, token_sums
from megatron_entropic.algorithms.token_sums import Sums, summed


def sequences(count: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 60, (count,), generator=random).tolist()
    return [(torch.randn(size, generator=random), torch.randn(size, generator=random)) for size in sizes]


def test_parts_are_whole_sequences_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sums, "PART_TOKENS", 100)
    pairs = sequences()
    parts = [tuple(map(torch.cat, zip(*part, strict=True))) for part in token_sums._parts(iter(pairs))]
    assert all(100 <= first.numel() < 160 for first, _ in parts[:-1])
    for column in (0, 1):
        assert torch.equal(torch.cat([part[column] for part in parts]), torch.cat([pair[column] for pair in pairs]))
    sums = summed(pairs, lambda sums, first, second: sums.add("x", (first * second).double()))
    assert sums.count("x") == sum(first.numel() for first, _ in pairs)


def test_one_part_has_the_bits_of_a_mean_over_all_tokens() -> None:
    values = torch.cat([first for first, _ in sequences(400)]).double()
    sums = Sums()
    sums.add("x", values)
    assert sums.mean("x") == float(values.mean())


def test_metrics_do_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = sequences()
    policy, rollout = (torch.cat(list(column)) for column in zip(*pairs, strict=True))
    ratios = [(first - second).exp() for first, second in pairs]
    whole = mismatch_metrics(policy, rollout) | importance_metrics(ratios, "tis", 2.0)
    assert mismatch_metrics_of(iter(pairs)) | importance_metrics(iter(ratios), "tis", 2.0) == whole
    monkeypatch.setattr(token_sums, "PART_TOKENS", 64)
    assert mismatch_metrics_of(iter(pairs)) | importance_metrics(iter(ratios), "tis", 2.0) == pytest.approx(
        whole, 1e-14
    )

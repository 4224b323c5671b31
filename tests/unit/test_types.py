"""The dataclasses that cross borders arrive as they were sent."""

from __future__ import annotations

import pickle

import torch

from megatron_entropic.types import Scores, Sequence


def test_a_sequence_survives_pickling_bit_for_bit() -> None:
    sent = Sequence(torch.arange(5), 3, torch.tensor([0.1, -0.2]), torch.tensor([-1e-30, float("nan")]), None)
    pickled = pickle.dumps(sent)
    assert b"torch" not in pickled, "tensors travel as arrays, under every Python"
    got = pickle.loads(pickled)
    assert got.prompt_length == 3
    assert got.tokens.dtype == torch.int64
    for name in ("tokens", "advantages", "old_logprobs"):
        assert getattr(got, name).numpy().tobytes() == getattr(sent, name).numpy().tobytes()
        assert getattr(got, name).dtype == getattr(sent, name).dtype
    assert got.rollout_logprobs is None
    got.old_logprobs.add_(1)  # not a view of a read-only buffer


def test_scores_survive_pickling_with_their_order_and_empty_responses() -> None:
    sent = Scores([torch.tensor([-0.5]), torch.zeros(0)], [torch.tensor([0.25]), torch.zeros(0)])
    pickled = pickle.dumps(sent)
    assert b"torch" not in pickled
    got = pickle.loads(pickled)
    assert [value.tolist() for value in got.logprobs] == [[-0.5], []]
    assert [value.tolist() for value in got.entropies] == [[0.25], []]
    assert got.logprobs[1].dtype == torch.float32
    assert got.experts == []
    experts = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    (got_experts,) = pickle.loads(pickle.dumps(Scores([], [], [experts]))).experts
    assert torch.equal(got_experts, experts)
    assert got_experts.dtype == torch.uint8


def test_an_advantage_that_all_tokens_have_travels_once() -> None:
    alone = len(pickle.dumps(Sequence(torch.arange(3), 1, torch.tensor(0.25).expand(2))))
    sent = Sequence(torch.arange(3), 1, torch.tensor(0.25).expand(1 << 14))
    pickled = pickle.dumps(sent)
    assert len(pickled) < alone + 16
    assert torch.equal(pickle.loads(pickled).advantages, sent.advantages)

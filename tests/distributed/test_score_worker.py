"""`megatron-entropic score` without the command line: files in, files out, and what happens to bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, random_sequences, transformers_statistics, write_tiny_model, write_token_file

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.errors import PeerDied, UserError
from megatron_entropic.policy.score_transformers import score_file as score_with_transformers
from megatron_entropic.policy.score_worker import score_file

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("qwen2", tmp_path_factory.mktemp("score_worker") / "model")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_token_file(tmp_path / "tokens.jsonl", random_sequences())


def score(model: Path, tokens: Path, output: Path, device: str = "cpu", **layout: object) -> None:
    policy = PolicyConfig(tokens_per_microbatch=60, distributed_timeout_s=200, **layout)
    score_file(model, tokens, output, policy, temperature=TEMPERATURE, dtype="float32", device=device)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_backends_agree_and_keep_the_lines(model, tokens, tmp_path):
    with tokens.open("a") as file:
        file.write("\n" + json.dumps({"tokens": [3, 1, 4], "prompt_length": 2, "id": "pi"}) + "\n")
    layout = {"tensor_parallel": 2, "context_parallel": 2, "sequence_parallel": True}
    score(model, tokens, tmp_path / "new" / "megatron.jsonl", **layout)
    score_with_transformers(model, tokens, tmp_path / "reference.jsonl", TEMPERATURE, "float32")

    scored, reference = read(tmp_path / "new" / "megatron.jsonl"), read(tmp_path / "reference.jsonl")
    given = [json.loads(line) for line in tokens.read_text().splitlines() if line]
    assert [list(line) for line in scored] == [[*line, "logprobs", "entropies"] for line in given]
    assert scored[-1]["id"] == "pi"
    for line, wanted in zip(scored, reference, strict=True):
        assert line["tokens"] == wanted["tokens"]
        for key in ("logprobs", "entropies"):
            assert len(line[key]) == len(line["tokens"]) - line["prompt_length"]
            torch.testing.assert_close(torch.tensor(line[key]), torch.tensor(wanted[key]), rtol=0, atol=1e-5)


def test_data_and_pipeline_parallel_ranks_merge_in_order(model, tokens, tmp_path):
    score(model, tokens, tmp_path / "scored.jsonl", pipeline_parallel=2, data_parallel=2)
    score_with_transformers(model, tokens, tmp_path / "reference.jsonl", TEMPERATURE, "float32")
    for line, wanted in zip(read(tmp_path / "scored.jsonl"), read(tmp_path / "reference.jsonl"), strict=True):
        torch.testing.assert_close(torch.tensor(line["logprobs"]), torch.tensor(wanted["logprobs"]), rtol=0, atol=1e-5)


def test_expert_parallel_ranks_merge_in_order(tokens, tmp_path):
    model = write_tiny_model("mixtral", tmp_path / "mixtral")
    score(model, tokens, tmp_path / "scored.jsonl", data_parallel=2, expert_parallel=2)
    reference = transformers_statistics(model, random_sequences(), TEMPERATURE)
    for line, (logprobs, _) in zip(read(tmp_path / "scored.jsonl"), reference, strict=True):
        torch.testing.assert_close(torch.tensor(line["logprobs"]), logprobs.float(), rtol=0, atol=1e-5)


def test_all_bad_lines_in_one_error(model, tmp_path):
    lines = [
        {"tokens": [1, 2, 3], "prompt_length": 0},
        {"tokens": [1, 2, 3], "prompt_length": 3},
        {"tokens": [1, VOCABULARY, -1], "prompt_length": 1},
        {"tokens": [1, 2, 3], "prompt_length": 1},
        {"tokens": "abc", "prompt_length": 1},
        {"prompt_length": 1},
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "not json"]))
    with pytest.raises(ValueError, match="6 lines cannot be scored") as caught:
        score(model, path, tmp_path / "out.jsonl")
    for number in (1, 2, 3, 5, 6, 7):
        assert f"line {number}:" in str(caught.value)
    assert "line 4:" not in str(caught.value)
    assert f"[{VOCABULARY}, -1] are outside the vocabulary of {VOCABULARY}" in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_layout_that_does_not_divide_the_model_is_refused_before_any_process_starts(model, tokens, tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel=4") as caught:
        score(model, tokens, tmp_path / "out.jsonl", tensor_parallel=4, pipeline_parallel=3, expert_parallel=2)
    assert "pipeline_parallel=3 does not divide the 4 layers" in str(caught.value)
    assert "expert_parallel=2: the model has no experts" in str(caught.value)


def test_a_failing_rank_is_named_with_its_phase_and_error(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_link")
    with pytest.raises(PeerDied, match=r"policy rank [01] failed in phase rendezvous") as caught:
        score(model, tokens, tmp_path / "out.jsonl", tensor_parallel=2)
    assert "no_such_link" in str(caught.value)


def test_what_ranks_refuse_is_said_once(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as caught:
        score(model, tokens, tmp_path / "out.jsonl", device="cuda", tensor_parallel=2)
    assert str(caught.value).count("torch finds no GPU") == 1

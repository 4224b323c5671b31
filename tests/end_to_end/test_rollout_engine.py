"""A real vLLM engine against transformers: log-probs, determinism over processes, weight updates, scoring."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "rollout_engine_run.py"
VOCABULARY = 97
END = 3
TEMPERATURE = 0.7
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def write_model(directory: Path, seed: int) -> Path:
    """A random Qwen3 in the layout of transformers; the head dimension is one that vLLM has a CPU kernel for."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=72,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=END,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def without_weights(model: Path, directory: Path) -> None:
    """A copy of a model's directory in which there are no weights to read."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))


def reference_logprobs(model: Any, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """[R] log softmax(logits / temperature) of the response tokens, by transformers in float32."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def distances(model: Any, samples: list[dict[str, Any]]) -> torch.Tensor:
    """[all tokens] |engine - transformers| at the rollout temperature."""
    return torch.cat(
        [
            (torch.tensor(s["logprobs"]) - reference_logprobs(model, s["prompt"], s["response"], TEMPERATURE)).abs()
            for s in samples
        ]
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products: threads that wait for each other on shared cores would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rollout_engine")
    write_model(path / "old", 0)
    write_model(path / "new", 1)
    without_weights(path / "old", path / "bare")
    return path


@pytest.fixture(scope="module")
def lives(directory: Path) -> dict[str, dict[str, Any]]:
    """The reports of engines in processes of their own: one that has a past, one that starts with the new weights, one
    with the scheduling of a GPU, and one with scheduling and model runner of a GPU."""
    processes = {
        life: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(directory), life],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for life in ("full", "resumed", "asynchronous", "second_runner")
    }
    try:
        for life, process in processes.items():
            output, _ = process.communicate(timeout=500)
            assert process.returncode == 0, f"{life}:\n{output}"
            (directory / f"{life}.log").write_text(output)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {life: torch.load(directory / f"{life}.pt") for life in processes}


def test_logprobs_are_those_of_transformers_at_the_rollout_temperature(lives, directory):
    samples = lives["full"]["before"]
    assert distances(load(directory / "old"), samples).max() < 1e-4
    assert distances(load(directory / "new"), samples).max() > 0.1, "the two models must be told apart"
    assert {s["version"] for s in samples} == {0}


def test_responses_come_when_they_are_finished(lives):
    finished, all_of_them = lives["full"]["first finished"], lives["full"]["before"]
    assert 0 < len(finished) < len(all_of_them)
    for position, sample in finished:
        assert sample["seed"] == all_of_them[position]["seed"]
        assert sample["response"] == all_of_them[position]["response"]


def test_order_lengths_and_end_of_sequence(lives):
    samples = lives["full"]["before"]
    assert [s["seed"] for s in samples] == [1000 + 10 * prompt + sample for prompt in range(10) for sample in range(4)]
    assert {s["finish_reason"] for s in samples} == {"stop", "length"}
    for sample in samples:
        assert len(sample["logprobs"]) == len(sample["response"])
        # The end token is part of the response and has a log-prob of its own.
        assert (sample["response"][-1] == END) == (sample["finish_reason"] == "stop")
        assert END not in sample["response"][:-1]
        assert sample["finish_reason"] == "stop" or len(sample["response"]) == 40
    responses = {tuple(s["response"]) for s in samples}
    assert len(responses) > len(samples) - 4, "samples of one prompt have seeds of their own"


def test_sampling_is_a_function_of_weights_and_requests(lives):
    """Not of what the engine did before, of its cache or of the process: this is what makes a resumed run exact."""
    full, resumed = lives["full"], lives["resumed"]
    assert full["repeated"] == full["before"]
    assert full["cached before"] == 192, "the repetition used the prefix cache: of 200 tokens the full blocks of 32"
    assert full["step 2"] == resumed["step 2"]
    assert full["step 2"] != full["after"]


def test_an_engine_that_read_no_weights_has_every_one_after_a_publication(lives):
    """Buffers and what layers keep beside their parameters, too: nothing of its random start is left."""
    full, bare = lives["full"]["every tensor"], lives["resumed"]["every tensor"]
    assert any(name.endswith("cos_sin_cache") for name in full)
    assert any(name.endswith("_k_scale") for name in full)
    assert bare == full


def test_scheduling_ahead_of_the_last_tokens_changes_no_response(lives):
    """As vLLM does on a GPU: a forward pass may still be under way when weights and prefix cache are replaced."""
    ahead, full = lives["asynchronous"], lives["full"]
    assert ahead["cached before"] > 0
    assert ahead["cached after"] == 0
    for batch in ("before", "repeated", "after", "step 2"):
        for sample, expected in zip(ahead[batch], full[batch], strict=True):
            assert sample["response"] == expected["response"], batch
            assert sample["version"] == expected["version"]
            assert sample["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5)


def test_the_model_runner_of_a_gpu_samples_updates_and_scores_rightly(lives, directory):
    """vLLM's second, which draws tokens with kernels of its own: other tokens, but a function of weights and seeds."""
    second, full = lives["second_runner"], lives["full"]
    old, new = load(directory / "old"), load(directory / "new")
    assert distances(old, second["before"]).max() < 1e-5
    assert second["repeated"] == second["before"]
    assert second["cached before"] > 0
    responses = {tuple(sample["response"]) for sample in second["before"]}
    assert len(responses) == len(second["before"]), "samples of one prompt have seeds of their own"
    assert "incomplete" in second["incomplete"]
    assert second["cached after"] == 0
    assert second["vllm version after"] == "2"
    assert second["pieces"] == full["pieces"]
    for samples in (second["after"], second["step 2"]):
        assert {sample["version"] for sample in samples} == {2}
        assert distances(new, samples).max() < 1e-5
    assert distances(old, second["after"]).max() > 0.1
    fitting = [sample for sample in second["after"] if len(sample["prompt"]) < 200]
    for sample, scored in zip(fitting, second["scored"], strict=True):
        reference = reference_logprobs(new, sample["prompt"], sample["response"], 1.0)
        assert (torch.tensor(scored) - reference).abs().max() < 1e-5


def test_an_update_replaces_all_weights_and_empties_the_prefix_cache(lives, directory):
    full = lives["full"]
    assert full["buckets"] > 3
    assert full["cached after"] == 0
    assert distances(load(directory / "new"), full["after"]).max() < 1e-5
    assert distances(load(directory / "old"), full["after"]).max() > 0.1
    assert {s["version"] for s in full["after"]} == {2}
    assert full["vllm version before"] != "2"
    assert full["vllm version after"] == "2"


def test_a_sender_that_sends_nothing_is_named_and_leaves_no_usable_weights(lives):
    full = lives["full"]
    assert "publish: broadcast 0, model.embed_tokens.weight" in full["timeout"]
    assert "engine worker 1 waited 2" in full["timeout"]
    assert "the sending policy rank at 127.0.0.1:" in full["timeout"]
    assert "incomplete" in full["incomplete"]


def test_a_prompt_over_the_budget_is_refused(lives):
    assert "the longest has 201" in lives["full"]["too long"]


def test_scores_of_given_tokens_are_those_of_transformers_at_temperature_one(lives, directory):
    full, model = lives["full"], load(directory / "new")
    assert len(full["scored"]) == 36
    for sample, scored in zip(full["after"][4:], full["scored"], strict=True):
        reference = reference_logprobs(model, sample["prompt"], sample["response"], 1.0)
        assert len(scored) == len(sample["response"])
        assert (torch.tensor(scored) - reference).abs().max() < 1e-4


def test_the_log_holds_no_known_noise(lives, directory):
    log = (directory / "full.log").read_text()
    for noise in ("Failed to load weights", "Enforce eager", "Chat template warmup", "global random seed"):
        assert noise not in log


def test_score_command_with_vllm(directory):
    generator = torch.Generator().manual_seed(4)
    lines = [
        {"tokens": torch.randint(4, VOCABULARY, (length,), generator=generator).tolist(), "prompt_length": prompt}
        for length, prompt in ((2, 1), (60, 7), (300, 299), (300, 3))
    ]
    tokens = directory / "tokens.jsonl"
    tokens.write_text("".join(json.dumps({**line, "id": i}) + "\n" for i, line in enumerate(lines)))
    command = [sys.executable, "-m", "megatron_entropic.cli", "score", "--backend", "vllm", "--dtype", "float32"]
    files = ["--hf-dir", directory / "old", "--tokens", tokens, "--output", directory / "scored.jsonl"]
    subprocess.run(
        [*command, *map(str, files)], env={**os.environ, **ENVIRONMENT}, check=True, timeout=400, capture_output=True
    )
    model = load(directory / "old")
    written = [json.loads(text) for text in (directory / "scored.jsonl").read_text().splitlines()]
    for index, (line, scored) in enumerate(zip(lines, written, strict=True)):
        assert scored["id"] == index
        assert scored["entropies"] is None
        prompt, response = line["tokens"][: line["prompt_length"]], line["tokens"][line["prompt_length"] :]
        reference = reference_logprobs(model, prompt, response, 1.0)
        assert (torch.tensor(scored["logprobs"]) - reference).abs().max() < 1e-4

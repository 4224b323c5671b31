"""Publishing from real policy ranks: every tensor arrives unchanged under every layout, and vLLM samples from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_model

SCRIPTS = Path(__file__).parent / "scripts"
FAMILIES = ("qwen3", "qwen2", "llama")  # untied, tied with biases, untied
LAYOUTS = {
    "dp4": {"data_parallel": 4},
    "tp2 dp2": {"tensor_parallel": 2, "data_parallel": 2},
    "pp2 dp2": {"pipeline_parallel": 2, "data_parallel": 2},
    "tp2 pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
EXPERT_LAYOUTS = {
    "tp2 ep2": {"tensor_parallel": 2, "data_parallel": 2, "expert_parallel": 2, "sequence_parallel": True},
    "dp4 ep2": {"data_parallel": 4, "expert_parallel": 2},
    "pp2 ep2": {"pipeline_parallel": 2, "data_parallel": 2, "expert_parallel": 2},
    "pp2 ep2 of 3 and 1 layers": {
        "pipeline_parallel": 2,
        "first_stage_layers": 3,
        "data_parallel": 2,
        "expert_parallel": 2,
    },
}
CASES = {**dict.fromkeys(FAMILIES, LAYOUTS), **dict.fromkeys(("qwen3_moe", "mixtral", "deepseek_v3"), EXPERT_LAYOUTS)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products: threads that wait for each other on shared cores would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reports(run_ranks_once, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of four ranks saw, by family and layout."""
    directory = tmp_path_factory.mktemp("publish_layouts")
    for family in CASES:
        write_tiny_model(family, directory / family)
    (directory / "cases.json").write_text(json.dumps(CASES))
    return [json.loads(text) for text in run_ranks_once(SCRIPTS / "publish_layouts.py", 4, directory)]


def test_every_tensor_arrives_bit_for_bit_under_every_layout(reports):
    sender = reports[0]
    assert set(sender) == {f"{family} {layout}" for family, layouts in CASES.items() for layout in layouts}
    for case, found in sender.items():
        assert found["tensors"] > 20
        assert found["buckets"] > 2, "one bucket would not test their order"
        assert found["differences"] == [[]] * 4, case


def test_one_collective_a_bucket_and_only_in_the_first_replica(reports):
    for found in (found for report in reports for found in report.values()):
        calls, between_machines, place = found["calls"], found["calls between machines"], found["place"]
        dense, experts = found["owned"]
        gathers = dense if place["data"] == 0 and place["tensor_size"] > 1 else 0
        gathers += experts if place["expert_data"] == 0 else 0
        # Ranks that share memory wait for each other before and after they write a bucket. Every stage sends its own
        # buckets to the engines.
        assert calls == {"gather": 0, "barrier": 2 * gathers, "all_gather": 0, "send": 0}
        assert between_machines == {"gather": gathers, "barrier": 0, "all_gather": 0, "send": 0}


def test_every_stage_reports_what_it_sent(reports):
    for case, sender in reports[0].items():
        places = [report[case] for report in reports]
        total = sum(found["elements"][0] for found in places)
        assert total == sender["all elements"]
        for found in places:
            place = found["place"]
            assert (found["elements"][0] > 0) == (place["data"] == 0 and place["tensor"] == 0)
            assert found["elements"][1] == found["elements"][0]
            assert found["checksums"]


def test_where_each_rank_serves_its_own_engine_every_rank_sends_everything(reports):
    for rank, report in enumerate(reports):
        for case, found in report.items():
            each, serves = found["each"], rank < 3
            assert each["differences"] == ([[]] * 6 if rank == 0 else []), case
            assert each["elements"] == [found["all elements"] if serves else 0] * 2
            assert each["checksums"] == (found["tensors"] if serves else 0)


def test_exports_in_the_background_are_complete_and_failures_are_told_once(reports):
    for report in reports:
        for case in (f"{family} tp2 pp2" for family in FAMILIES):
            assert bool(report[case]["exports"]) == (report is reports[0])
    for family in FAMILIES:
        found = reports[0][f"{family} tp2 pp2"]["exports"]
        assert found["kept"] == ["step_000010", "step_000015"]
        assert found["differences"] == []
        assert found["failure"].startswith("export to ")
        assert "config.json" in found["failure"]


def write_model(directory: Path, seed: int, vocabulary: int = 97) -> None:
    """A random Qwen2 with biases and tied embeddings whose padded vocabulary is not its own size."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)


def distance(hf_dir: Path, samples: list[dict[str, Any]]) -> float:
    """Largest |engine - transformers| over all tokens, at the engine's temperature of 0.8."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    worst = 0.0
    for sample in samples:
        prompt, response = sample["prompt"], sample["response"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / 0.8
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
        worst = max(worst, float((torch.tensor(sample["logprobs"]) - wanted).abs().max()))
    return worst


def test_an_engine_of_two_workers_samples_from_what_two_ranks_publish(run_ranks, tmp_path):
    names = ("zero", "one", "two")
    for seed, name in enumerate(names):
        write_model(tmp_path / name, seed)
    write_model(tmp_path / "other", 0, vocabulary=96)
    log = (tmp_path / "engine.log").open("w+")
    engine = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "publish_engine.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        run_ranks(SCRIPTS / "publish_policy.py", 2, tmp_path, timeout_s=400)
        status = engine.wait(timeout=120)
    finally:
        engine.kill()
        engine.wait()
    log.seek(0)
    assert status == 0, log.read()
    seen = torch.load(tmp_path / "seen.pt")
    for version, name in enumerate(names):
        samples = seen[str(version)]
        assert {sample["version"] for sample in samples} == {version}
        for other in names:
            found = distance(tmp_path / other, samples)
            assert found < 1e-5 if other == name else found > 0.1, f"version {version} against {other}: {found}"
    for version in (1, 2):
        assert seen[f"{version} weights"] == []
    assert seen["wrong"] == ["model.norm.weight: engine holds other values than were sent"]
    # What a hang would be explained with: the engine's own process and both of its workers.
    assert "in main" in seen["stacks"]
    assert seen["stacks"].count("worker_busy_loop") == 2
    assert "model.embed_tokens.weight: shape (96, 128), the model has (97, 128)" in seen["misfit"]

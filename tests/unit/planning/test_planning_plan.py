"""The command, from a file to tables and exit status; suggestions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from planned import EXAMPLES, example, known, tiny_config
from rich.console import Console

from megatron_entropic.cli import main
from megatron_entropic.config.checks import violations
from megatron_entropic.config.run import Config
from megatron_entropic.planning.plan import make_plan
from megatron_entropic.planning.report import sections, show
from megatron_entropic.planning.suggest import MEMORY_SHARE, Suggestion, suggest

GOLDEN = Path(__file__).parent / "nemotron_1_5b.txt"


def accepts(config: Config) -> bool:
    return not any(violations(config))


@pytest.fixture(scope="module")
def suggestions() -> list[Suggestion]:
    return suggest(
        example("nemotron_1_5b"),
        known("OpenReasoning-Nemotron-1.5B"),
        gpus=8,
        gpu_memory_gb=80,
        accepts=accepts,
    )


def test_plain_text_report(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change that is meant: megatron-entropic plan examples/nemotron_1_5b.yaml > the file named GOLDEN."""
    assert main(["plan", str(EXAMPLES / "nemotron_1_5b.yaml")]) == 0
    assert capsys.readouterr().out == GOLDEN.read_text(encoding="utf-8")


def test_the_buckets_of_a_publication_are_listed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "qwen3_30b_a3b.yaml"), "--buckets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.split()[:3] == ["bucket", "stage", "dtype"]]
    assert lines[first + 1].split()[:3] == ["0", "0", "bfloat16"]
    assert lines[-1].startswith(f"{len(lines) - first - 2} buckets of at most 512.0 MiB or one parameter, ")


def test_a_terminal_gets_drawn_tables() -> None:
    plan = make_plan(example("qwen3_8b"), known("Qwen3-8B"), gpu_memory_gb=80)
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    show(list(sections(plan)), console)
    assert isinstance(console.file, io.StringIO)
    assert "expected seconds of one training step" in console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "gpus", "gpu_memory_gb"),
    [
        ("nemotron_1_5b", 8, 80),
        ("qwen3_8b", 16, 80),
        ("qwen3_8b_colocated", 16, 80),
        ("qwen3_8b_grpo", 16, 80),
        ("qwen3_8b_offpolicy", 16, 80),
        ("qwen3_32b", 64, 80),
    ],
)
def test_dense_examples_fit(name: str, gpus: int, gpu_memory_gb: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(EXAMPLES / f"{name}.yaml"), "--gpus", str(gpus), "--gpu-memory-gb", str(gpu_memory_gb)]
    assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model", "gpus", "gpu_memory_gb"),
    [("qwen3_30b_a3b", "Qwen3-30B-A3B", 32, 80), ("qwen3_235b_a22b", "Qwen3-235B-A22B", 128, 141)],
)
def test_examples_with_experts_fit(name: str, model: str, gpus: int, gpu_memory_gb: float) -> None:
    """Whether the rest of the project can run them yet is not the plan's question."""
    plan = make_plan(example(name), known(model), gpus=gpus, gpu_memory_gb=gpu_memory_gb)
    assert plan.problems == ()


def test_latent_attention_has_a_plan() -> None:
    layout = ["policy.pipeline_parallel=1", "policy.data_parallel=8", "rollout.max_response_tokens=7168"]
    config = example("qwen3_30b_a3b", *layout)
    plan = make_plan(config, known("Moonlight-16B-A3B"), gpus=32, gpu_memory_gb=80)
    assert plan.problems == ()
    assert plan.numbers is not None
    # One vector of 512 + 64 for all heads, on every rank of an engine.
    assert plan.numbers.rollout.kv_bytes_per_token == 27 * 576 * 2


def test_everything_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["policy.tensor_parallel=16", "policy.pipeline_parallel=5", "rollout.tensor_parallel=3", "policy.size=1"]
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *sizes, "--gpus", "16"]) == 2
    message = capsys.readouterr().err
    for words in (
        "unknown key policy.size",
        "tensor_parallel=16 exceeds the model's 8 key/value heads",
        "pipeline_parallel=5 does not divide the 36 layers",
        "rollout.tensor_parallel=3 does not divide the attention heads",
        "are 184, not 16",
    ):
        assert words in message


def test_memory_that_does_not_suffice_is_named_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["policy.tensor_parallel=1", "policy.pipeline_parallel=1", "policy.sequence_parallel=false"]
    overrides.append("rollout.gpu_memory_fraction=0.85")
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *overrides, "--gpu-memory-gb", "20"]) == 2
    output = capsys.readouterr()
    assert "stage 0 needs" in output.err
    assert "GB of 20 GB on each GPU: activations 46.9, optimizer 45.8, gradients 30.5" in output.err
    assert "an engine's KV cache holds 0 tokens" in output.err
    assert "expected seconds of one training step" in output.out


def test_experts_must_divide() -> None:
    config = example("qwen3_30b_a3b", "policy.expert_parallel=3")
    problems = make_plan(config, known("Qwen3-30B-A3B"), gpu_memory_gb=80).problems
    assert any("expert_parallel=3 does not divide the 128 experts" in problem for problem in problems)
    assert any("does not divide tensor x context x data parallel = " in problem for problem in problems)
    dense = make_plan(example("qwen3_8b", "policy.expert_parallel=2"), known("Qwen3-8B"), gpu_memory_gb=80)
    assert "policy.expert_parallel=2: the model has no experts" in dense.problems


def test_a_cpu_configuration_has_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(tiny_config(max_position_embeddings=512)))
    assert main(["plan", str(EXAMPLES / "countdown_cpu.yaml"), "--model-config", str(model)]) == 0
    assert "plan of countdown" in capsys.readouterr().out


def test_suggestions_come_fastest_first_and_fit(suggestions: list[Suggestion]) -> None:
    assert len(suggestions) == 5
    times = [suggestion.time_s for suggestion in suggestions]
    assert times == sorted(times)
    assert all(suggestion.memory_bytes <= MEMORY_SHARE * 80 * 2**30 for suggestion in suggestions)
    assert len({suggestion.overrides for suggestion in suggestions}) == 5


def test_each_suggestion_passes_the_plan(suggestions: list[Suggestion], capsys: pytest.CaptureFixture[str]) -> None:
    for suggestion in suggestions:
        arguments = ["plan", str(EXAMPLES / "nemotron_1_5b.yaml"), "--gpus", "8", *suggestion.overrides]
        assert main(arguments) == 0
        assert f"total    {suggestion.time_s:,.1f}" in capsys.readouterr().out


def test_the_search_has_looked_at_the_shipped_layout(suggestions: list[Suggestion]) -> None:
    shipped = make_plan(example("nemotron_1_5b"), known("OpenReasoning-Nemotron-1.5B"), gpu_memory_gb=80)
    assert shipped.numbers is not None
    assert suggestions[0].time_s <= shipped.numbers.time.total_s


def test_suggestions_are_printed_with_their_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "nemotron_1_5b.yaml"), "--suggest"]) == 0
    output = capsys.readouterr().out
    assert "fastest layouts that fit on 8 GPUs" in output
    assert "1: policy.tensor_parallel=" in output


def test_no_layout_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), "--gpus", "2", "--suggest"]) == 2
    assert "none: no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([], "hours, 8,463 GPU-hours"),
        (["--gpus", "32"], "on 16 GPUs; 16 of the 32 would stand still, all are 16,926 GPU-hours"),
        (["--gpus", "8"], "on 16 GPUs, as this layout needs them; --suggest lays it out on 8"),
    ],
)
def test_gpu_hours_are_those_of_the_gpus_in_use(
    gpus: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *gpus])
    printed = capsys.readouterr().out
    assert "529 hours, 8,463 GPU-hours" in printed
    assert words in printed


COLOCATED = ["cluster.colocate=true", "policy.offload=all"]


def test_engines_that_share_gpus_are_not_added_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *COLOCATED, "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "8 of the same GPUs: 8 engines of 1" in printed
    assert "moving the policy's state off its GPUs and back, once a step, is not counted" in printed
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *COLOCATED, "--gpus", "16"]) == 2
    assert "on the same GPUs (cluster.colocate) are 8, not 16" in capsys.readouterr().err


def test_colocated_suggestions_have_an_engine_on_each_gpu() -> None:
    config = example("nemotron_1_5b", *COLOCATED)
    model = known("OpenReasoning-Nemotron-1.5B")
    found = suggest(config, model, gpus=8, gpu_memory_gb=80, accepts=accepts, count=2)
    assert len(found) == 2
    for suggestion in found:
        changed = suggestion.plan.config
        assert (changed.policy.world_size, changed.rollout.engines, changed.rollout.tensor_parallel) == (8, 8, 1)


def test_a_suggestion_is_an_answer_whatever_is_wrong_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(EXAMPLES / "nemotron_1_5b.yaml"), "--gpus", "4", "--suggest"]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "1: policy.tensor_parallel=" in output.out
    assert "as it is written, " in output.err
    assert "are 8, not 4" in output.err
    assert main([*command, "rollout.engines=many"]) == 2

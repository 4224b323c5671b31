"""The command, from a file to tables and exit status; suggestions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from planned import EXAMPLES, example, known, planned, tiny_config
from rich.console import Console

from megatron_entropic.cli import main
from megatron_entropic.config.checks import violations
from megatron_entropic.config.run import Config
from megatron_entropic.planning.generation import engine_load
from megatron_entropic.planning.hardware import machine
from megatron_entropic.planning.plan import make_plan, publication
from megatron_entropic.planning.report import sections, show
from megatron_entropic.planning.roofline import StepTime
from megatron_entropic.planning.sketch import SketchedTable, sketched_publication
from megatron_entropic.planning.suggest import MEMORY_SHARE, Suggestion, suggest

GOLDEN = Path(__file__).parent / "nemotron_1_5b.txt"
PAPER_MODELS = {
    "nemotron_1_5b": "OpenReasoning-Nemotron-1.5B",
    **dict.fromkeys(("qwen3_8b", "qwen3_8b_colocated", "qwen3_8b_grpo", "qwen3_8b_offpolicy"), "Qwen3-8B"),
    **dict.fromkeys(("qwen3_32b", "qwen3_32b_colocated", "qwen3_32b_lora"), "Qwen3-32B"),
}


def objections(config: Config) -> list[str]:
    return [violation.message for violation in violations(config)]


@pytest.fixture(scope="module")
def suggestions() -> list[Suggestion]:
    found, _ = suggest(
        example("nemotron_1_5b"), known("OpenReasoning-Nemotron-1.5B"), machine(gpus=8), objections=objections
    )
    return found


def test_plain_text_report(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change that is meant: megatron-entropic plan examples/nemotron_1_5b.yaml > the file named GOLDEN."""
    assert main(["plan", str(EXAMPLES / "nemotron_1_5b.yaml")]) == 0
    assert capsys.readouterr().out == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "column"), [("performance.md", 3), ("reproducing_the_paper.md", 2)])
def test_the_pages_say_what_plan_says(page: str, column: int) -> None:
    """Seconds of a step of the shipped layouts; those with experts take seconds each and are left out."""
    lines = (EXAMPLES.parent / "docs" / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    said = {cells[0].removesuffix(".yaml"): cells[column] for cells in rows if len(cells) > column}
    compared = 0
    for name, model in PAPER_MODELS.items():
        if name in said:
            numbers = make_plan(example(name), known(model), machine()).numbers
            assert numbers is not None
            assert said[name] == f"{numbers.time.total_s:,.0f}", f"{name} in docs/{page}"
            compared += 1
    assert compared >= 4


def test_the_buckets_of_a_publication_are_listed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "qwen3_30b_a3b.yaml"), "--buckets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.split()[:3] == ["bucket", "stage", "dtype"]]
    assert lines[first + 1].split()[:3] == ["0", "0", "bfloat16"]
    assert lines[-1].startswith(f"{len(lines) - first - 2} buckets of at most 512.0 MiB or one parameter, ")


def test_a_terminal_gets_drawn_tables() -> None:
    plan = make_plan(example("qwen3_8b"), known("Qwen3-8B"), machine())
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    show(list(sections(plan)), console)
    assert isinstance(console.file, io.StringIO)
    assert "expected seconds of one training step" in console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "gpus", "gpu_memory_gb"),
    [
        ("nemotron_1_5b", 8, 80),
        ("two_phase_qwen3_1_7b", 8, 80),
        ("qwen3_8b", 16, 80),
        ("qwen3_8b_colocated", 16, 80),
        ("qwen3_8b_grpo", 16, 80),
        ("qwen3_8b_offpolicy", 16, 80),
        ("qwen3_32b", 64, 80),
        ("qwen3_32b_colocated", 32, 80),
        ("qwen3_32b_lora", 8, 80),
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
    plan = make_plan(example(name), known(model), machine(gpu_memory_gb=gpu_memory_gb, gpus=gpus))
    assert plan.problems == ()


def test_adapters_leave_gradients_optimizer_and_checkpoints_of_the_weights_out() -> None:
    config, table = example("qwen3_32b_lora"), known("Qwen3-32B")
    every_weight = config.model_copy(update={"policy": config.policy.without_adapters})
    adapted, full = (make_plan(one, table, machine(gpus=8)).numbers for one in (config, every_weight))
    assert adapted is not None
    assert full is not None
    trained = table.trained(config.policy.lora).elements
    assert trained == 64 * 32 * sum(
        inputs + outputs
        for inputs, outputs in (
            (5120, 8192),  # q
            (5120, 1024),  # k
            (5120, 1024),  # v
            (8192, 5120),  # o
            (5120, 25600),  # gate
            (5120, 25600),  # up
            (25600, 5120),  # down
        )
    )
    (with_adapters,), (without,) = adapted.memory, full.memory
    assert with_adapters.gradients < 0.03 * without.gradients
    assert with_adapters.optimizer < 0.03 * without.optimizer
    assert with_adapters.weights == pytest.approx(without.weights, rel=0.02)
    assert adapted.checkpoint_host_bytes < 0.03 * full.checkpoint_host_bytes
    assert adapted.time.score_s == pytest.approx(full.time.score_s, rel=0.02)
    assert 0.6 < adapted.time.update_s / full.time.update_s < 0.8, "a third of the products falls away"


def test_latent_attention_has_a_plan() -> None:
    layout = ["policy.pipeline_parallel=1", "policy.data_parallel=8", "rollout.max_response_tokens=7168"]
    config = example("qwen3_30b_a3b", *layout)
    plan = make_plan(config, known("Moonlight-16B-A3B"), machine(gpus=32))
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
    problems = make_plan(config, known("Qwen3-30B-A3B"), machine()).problems
    assert any("expert_parallel=3 does not divide the 128 experts" in problem for problem in problems)
    assert any("does not divide tensor x context x data parallel = " in problem for problem in problems)
    dense = make_plan(example("qwen3_8b", "policy.expert_parallel=2"), known("Qwen3-8B"), machine())
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
        assert ["total", f"{suggestion.time_s:,.1f}"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_search_has_looked_at_the_shipped_layout(suggestions: list[Suggestion]) -> None:
    shipped = make_plan(example("nemotron_1_5b"), known("OpenReasoning-Nemotron-1.5B"), machine())
    assert shipped.numbers is not None
    assert suggestions[0].time_s <= shipped.numbers.time.total_s


def test_suggestions_are_printed_with_their_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "nemotron_1_5b.yaml"), "--suggest"]) == 0
    output = capsys.readouterr().out
    assert "fastest layouts that fit on 8 GPUs" in output
    assert "1: policy.tensor_parallel=" in output


def test_without_a_layout_that_fits_the_search_says_what_fills_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """It said "more GPUs, or fewer policy.tokens_per_microbatch", whatever the reason was."""
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), "--gpus", "2", "--suggest"]) == 2
    assert (
        "none: none of 1 policy layouts fits: 1 GPU, recompute full needs least, 147.9 GB of the 72.0 GB that a "
        "suggestion may fill, on stage 0: optimizer 91.5, gradients 30.5, weights 15.3"
    ) in capsys.readouterr().out


def test_a_search_that_the_engines_or_the_run_itself_stop_says_so() -> None:
    table, asked = known("Qwen3-235B-A22B"), machine(gpus=64)
    small = example("qwen3_235b_a22b", "rollout.gpu_memory_fraction=0.3")
    found, reasons = suggest(small, table, asked, objections=objections)
    assert not found
    assert reasons[0].startswith("no engine fits: with rollout.tensor_parallel=8, an engine's KV cache holds 0 tokens")
    _, reasons = suggest(example("qwen3_8b"), known("Qwen3-8B"), machine(gpus=16), objections=lambda _: ["no."])
    assert reasons == ("no.",)


def test_the_search_folds_experts_over_tensor_ranks() -> None:
    """Every published layout of Qwen3 models has whole experts on its tensor ranks; none was searched."""
    found, _ = suggest(example("qwen3_30b_a3b"), known("Qwen3-30B-A3B"), machine(gpus=16), objections=objections)
    assert any("policy.expert_tensor_parallel=1" in suggestion.overrides for suggestion in found)


def test_a_pipeline_of_eight_stages_has_94_layers() -> None:
    """Of Qwen3-235B's 94 layers only pipelines of 1, 2, 47 and 94 stages could be planned."""
    table = known("Qwen3-235B-A22B")
    layout = [*("policy.pipeline_parallel=8", "policy.first_stage_layers=11", "policy.last_stage_layers=11")]
    numbers = make_plan(example("qwen3_235b_a22b", *layout), table, machine()).numbers
    assert numbers is not None
    assert [stage.layers for stage in numbers.stages] == [11, *[12] * 6, 11]
    assert sum(stage.elements_of("embedding") for stage in numbers.stages) == numbers.stages[0].elements_of("embedding")
    found, _ = suggest(example("qwen3_235b_a22b"), table, machine("H200", gpus=128), objections=objections, count=1)
    assert any("policy.first_stage_layers=23" in suggestion.overrides for suggestion in found)


UNEVEN = ("policy.pipeline_parallel=5", "policy.first_stage_layers=9", "policy.last_stage_layers=3")


@pytest.mark.parametrize(
    ("name", "model", "overrides"),
    [
        ("qwen3_30b_a3b", "Qwen3-30B-A3B", ()),
        ("qwen3_30b_a3b", "Qwen3-30B-A3B", UNEVEN),
        ("qwen3_8b", "Qwen3-8B", ()),
    ],
)
def test_the_sketch_of_a_search_agrees_with_the_exact_plan(name: str, model: str, overrides: tuple[str, ...]) -> None:
    config, table = example(name, *overrides), known(model)
    sketch = SketchedTable(table)
    for stage in range(config.policy.pipeline_parallel):
        exact, sketched = table.stage(config.policy, stage), sketch.stage(config.policy, stage)
        assert sketched.elements == exact.elements
        assert sketched.expert_elements == exact.expert_elements
    close = sketched_publication(planned(config, sketch))
    published = publication(planned(config, table))
    assert close.engine_bytes == published.engine_bytes
    assert close.tensors == published.tensors
    assert close.gathered_bytes == pytest.approx(published.gathered_bytes, rel=0.01)
    assert close.forwarded_bytes == pytest.approx(published.forwarded_bytes, rel=0.1)


def test_given_lengths_replace_the_assumed_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of 32,768 tokens whose responses have 3,000 was planned as one of 16,384."""
    command = ["plan", str(EXAMPLES / "nemotron_1_5b.yaml")]
    assert main([*command, "--lengths", "3000,400"]) == 0
    printed = capsys.readouterr().out
    assert "  given: " in printed
    assert "3,000 tokens on average, standard deviation of responses 400" in printed
    with pytest.raises(SystemExit):
        main([*command, "--lengths", "0"])
    assert main([*command, "--lengths", str(tmp_path / "none.parquet")]) == 2


def test_other_gpus_are_known_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(EXAMPLES / "nemotron_1_5b.yaml")]
    assert main([*command, "--gpu", "A100"]) == 0
    assert "3.12e+14 FLOP/s" in capsys.readouterr().out
    assert main([*command, "--gpu", "K80"]) == 2
    assert "GPU 'K80' is not known; known are A100, H100, H200, H20, B200" in capsys.readouterr().err


def test_what_makes_a_run_faster_is_in_the_plan() -> None:
    """8-bit products and engines, and moving state of GPUs that policy and engines share, changed nothing."""
    table = known("Qwen3-8B")

    def time_of(*overrides: str) -> StepTime:
        numbers = make_plan(example("qwen3_8b", *overrides), table, machine()).numbers
        assert numbers is not None
        return numbers.time

    config = example("qwen3_8b")
    planned = make_plan(config, table, machine()).numbers
    assert planned is not None
    plain = planned.time
    assert time_of("policy.fp8=hybrid").update_s < 0.8 * plain.update_s
    assert time_of("rollout.quantization=fp8").rollout_s < plain.rollout_s
    assert time_of("rollout.enforce_eager=true").rollout_s > plain.rollout_s
    assert time_of("cluster.colocate=true").switch_s < time_of(*COLOCATED).switch_s
    assert plain.switch_s == 0
    ahead = time_of("rollout.lag=1")
    # The longest responses of a step no longer run alone, so that it takes less than its rollout did.
    assert plain.rollout_s - plain.tail_s < ahead.total_s < plain.rollout_s
    assert ahead.ahead is not None
    assert (ahead.ahead.lag, ahead.ahead.oldest) == (1, 1)
    # The table of lags and the total are one simulation; without a lag it is the sum of the phases.
    load = engine_load(planned.step, planned.rollout)
    assert plain.with_lag(config, load, 1) == ahead.ahead
    assert plain.with_lag(config, load, 0).step_s == pytest.approx(plain.total_s, rel=1e-6)


def test_phases_that_their_timeouts_would_end_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), "cluster.generate_timeout_s=60"])
    assert "s are more than half of cluster.generate_timeout_s=60; raise it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([], "hours, {hours} GPU-hours"),
        (["--gpus", "32"], "on 16 GPUs; 16 of the 32 would stand still, all are {twice} GPU-hours"),
        (["--gpus", "8"], "on 16 GPUs, as this layout needs them; --suggest lays it out on 8"),
    ],
)
def test_gpu_hours_are_those_of_the_gpus_in_use(
    gpus: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(example("qwen3_8b"), known("Qwen3-8B"), machine())
    assert plan.numbers is not None
    hours = 16 * plan.numbers.time.total_s * plan.config.train.steps / 3600
    main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *gpus])
    printed = capsys.readouterr().out
    assert f"{hours / 16:,.0f} hours, {hours:,.0f} GPU-hours" in printed
    assert words.format(hours=f"{hours:,.0f}", twice=f"{2 * hours:,.0f}") in printed


COLOCATED = ["cluster.colocate=true", "policy.offload=all"]


def test_engines_that_share_gpus_are_not_added_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *COLOCATED, "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "8 of the same GPUs: 8 engines of 1" in printed
    assert "  switch" in printed
    assert main(["plan", str(EXAMPLES / "qwen3_8b.yaml"), *COLOCATED, "--gpus", "16"]) == 2
    assert "on the same GPUs (cluster.colocate) are 8, not 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model", "gpus", "width"),
    [("nemotron_1_5b", "OpenReasoning-Nemotron-1.5B", 8, 1), ("qwen3_32b", "Qwen3-32B", 32, 4)],
)
def test_colocated_suggestions_have_engines_on_every_gpu(name: str, model: str, gpus: int, width: int) -> None:
    config = example(name, *COLOCATED, "rollout.gpu_memory_fraction=0.85")
    found, _ = suggest(config, known(model), machine(gpus=gpus), objections=objections, count=2)
    assert len(found) == 2
    for suggestion in found:
        policy, rollout = suggestion.plan.config.policy, suggestion.plan.config.rollout
        assert (policy.world_size, rollout.engines, rollout.tensor_parallel) == (gpus, gpus // width, width)


def test_a_suggestion_is_an_answer_whatever_is_wrong_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(EXAMPLES / "nemotron_1_5b.yaml"), "--gpus", "4", "--suggest"]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "1: policy.tensor_parallel=" in output.out
    assert "as it is written, " in output.err
    assert "are 8, not 4" in output.err
    assert main([*command, "rollout.engines=many"]) == 2

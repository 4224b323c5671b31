"""Memory, schedule and traffic of cases small enough for paper."""

from __future__ import annotations

import importlib
import math

import pytest
from planned import example, known, planned

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.planning import activations
from megatron_entropic.planning import plan as publishing
from megatron_entropic.planning.activations import head_bytes, layer_bytes
from megatron_entropic.planning.communication import gradient_traffic, microbatch_traffic
from megatron_entropic.planning.failures import checkpoints
from megatron_entropic.planning.memory import GIB, driver_host_bytes, rollout_memory, stage_memory
from megatron_entropic.planning.parameters import ParameterTable
from megatron_entropic.planning.plan import checkpoint_host_bytes, publication
from megatron_entropic.planning.roofline import score_time_s, update_time_s
from megatron_entropic.planning.schedule import bubble_fraction, in_flight, make_schedule
from megatron_entropic.policy.publish import publisher as publish


def test_constants_of_other_rooms() -> None:
    """Rooms above `planning`, or not open to it, whose constants it repeats."""
    # The package's functions of these names hide the modules.
    policy_loss = importlib.import_module("megatron_entropic.tensor_parallel.fused_policy_loss")
    reverse_kl = importlib.import_module("megatron_entropic.tensor_parallel.reverse_kl")
    head = importlib.import_module("megatron_entropic.tensor_parallel.fused_head")
    assert activations.LOSS_BLOCK_BYTES == policy_loss.ACCELERATOR_BLOCK_BYTES
    assert activations.LOSS_BLOCK_TOKENS == policy_loss.ACCELERATOR_TOKENS
    assert activations.RECOMPUTE_BLOCK == head.ACCELERATOR_CHUNKS
    assert activations.DIVERGENCE_BLOCK == reverse_kl.ACCELERATOR_CHUNKS
    assert publish.BUCKET_BYTES["cuda"] == publishing.BUCKET_BYTES


@pytest.mark.parametrize(("stages", "microbatches", "expected"), [(1, 7, 0), (4, 1, 3 / 4), (2, 9, 1 / 10)])
def test_bubble(stages: int, microbatches: int, expected: float) -> None:
    assert bubble_fraction(stages, microbatches) == pytest.approx(expected)


def test_micro_batches_in_flight() -> None:
    assert [in_flight(4, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(4, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    # Two chunks: warm-up of 2 (p - s - 1) + p forward passes of a chunk, and one more before the first backward.
    assert [in_flight(4, stage, 8, 2) for stage in range(4)] == [11, 9, 7, 5]
    assert bubble_fraction(4, 8, 2) == pytest.approx(3 / 19)


def test_schedule_of_the_published_setting() -> None:
    schedule = make_schedule(example("qwen3_8b", "policy.tokens_per_microbatch=18432"))
    # 512 x 8 responses over 2 replicas; 18,432 tokens hold 4 sequences of 256 + 4,096 tokens, or 2 of 9,216.
    assert (schedule.microbatches, schedule.microbatches_at_most) == (512, 1024)
    assert schedule.tokens == 4 * 4352
    assert schedule.bubble_fraction == pytest.approx(1 / 513)


def test_host_memory_of_the_driver() -> None:
    table = known("OpenReasoning-Nemotron-1.5B")

    def bytes_of(*overrides: str) -> tuple[int, int]:
        return driver_host_bytes(planned(example("nemotron_1_5b", *overrides), table, gpus_per_node=8))

    schedule = make_schedule(example("nemotron_1_5b"))
    tokens = schedule.responses * schedule.mean_tokens
    assert bytes_of() == (17 * tokens, 12 * tokens)
    assert bytes_of("rollout.lag=2", "algorithm.optimizer_steps_per_rollout=4") == ((17 + 2 * 8) * tokens, 3 * tokens)


def test_host_memory_of_a_checkpoint() -> None:
    table = known("OpenReasoning-Nemotron-1.5B")
    # Four replicas: an optimizer state among them (its last parts are padding), and the weights once.
    shards = checkpoint_host_bytes(planned(example("nemotron_1_5b"), table, gpus_per_node=8))
    assert shards == pytest.approx((12 + 2) * table.elements, rel=1e-5)
    alone = checkpoint_host_bytes(planned(example("nemotron_1_5b"), table, gpus_per_node=1))
    assert alone == pytest.approx((12 / 4 + 2) * table.elements, rel=1e-5)
    ahead = checkpoint_host_bytes(planned(example("nemotron_1_5b", "rollout.lag=1"), table, gpus_per_node=8))
    policy = example("nemotron_1_5b").policy
    ranks = min(8, policy.world_size)
    assert ahead - shards == ranks * 2 * 2 * table.stage(policy, 0).elements
    whole = checkpoint_host_bytes(
        planned(example("nemotron_1_5b", "checkpoint.format=fully_reshardable"), table, gpus_per_node=8)
    )
    assert whole == 4 * 27 * table.elements
    plain = checkpoint_host_bytes(
        planned(example("nemotron_1_5b", "policy.distributed_optimizer=false"), table, gpus_per_node=8)
    )
    assert plain == 14 * table.elements


def test_host_memory_of_experts_is_on_the_ranks_that_hold_them() -> None:
    config = example("qwen3_30b_a3b")
    table = known("Qwen3-30B-A3B")
    ranks = config.policy.stage_ranks * config.policy.pipeline_parallel
    total = checkpoint_host_bytes(planned(config, table, gpus_per_node=ranks))
    assert total == pytest.approx(14 * table.elements, rel=0.01)


def test_static_memory_of_one_gpu() -> None:
    config = example("nemotron_1_5b", "policy.data_parallel=1", "policy.distributed_optimizer=false")
    table = known("OpenReasoning-Nemotron-1.5B")
    memory = stage_memory(planned(config, table), 0)
    assert memory.weights == 2 * table.elements
    assert memory.gradients == 4 * table.elements
    assert memory.optimizer == 12 * table.elements
    assert memory.frozen == 0
    penalised = example("nemotron_1_5b", "algorithm.kl.coefficient=0.1")
    assert stage_memory(planned(penalised, table), 0).frozen == 2 * table.elements


def test_sixteen_bits_of_gradients_and_moments_are_counted() -> None:
    """8 bytes of state a parameter instead of 12: two moments, and the parameter in float32."""
    table = known("OpenReasoning-Nemotron-1.5B")
    plain, halved = (
        planned(example("nemotron_1_5b", *options), table)
        for options in ([], ["policy.gradient_dtype=bfloat16", "optimizer.state_dtype=bfloat16"])
    )
    before, now = stage_memory(plain, 0), stage_memory(halved, 0)
    assert (now.gradients, now.optimizer) == (before.gradients / 2, before.optimizer * 8 / 12)
    assert now.weights == before.weights
    sent = [
        sum(one.sent_bytes for one in gradient_traffic(step) if "gradients" in one.operation)
        for step in (plain, halved)
    ]
    assert sent[1] == sent[0] / 2
    assert update_time_s(halved) < update_time_s(plain)
    assert checkpoint_host_bytes(halved) == checkpoint_host_bytes(plain)


def test_inputs_of_8_bit_products_are_kept_in_8_bits_and_matrices_beside_the_weights() -> None:
    """Counted by hand: inputs of qkv, the projection, fc1 and fc2; 2 bytes for each element of the layers' matrices."""
    table, tokens = known("Qwen3-8B"), 1000
    hidden, query, ffn = 4096, 4096, 12288
    plain, float8 = (
        layer_bytes(table.model, PolicyConfig(fp8=fp8), tokens, dtype="bfloat16", attention="flash").saved
        for fp8 in ("off", "hybrid")
    )
    assert plain - float8 == tokens * (hidden + query + hidden + ffn)
    before, now = (stage_memory(planned(example("qwen3_8b", f"policy.fp8={fp8}"), table), 1) for fp8 in ("off", "e4m3"))
    assert (before.float8, now.weights) == (0, before.weights)
    # Half of 36 layers, cut by two tensor ranks; norms are few.
    matrices = 18 * (hidden * (query + 2 * 1024) + query * hidden + 3 * hidden * ffn) / 2
    assert now.float8 == pytest.approx(2 * matrices, rel=1e-3)
    experts = known("Qwen3-30B-A3B")
    step = planned(example("qwen3_30b_a3b", "policy.fp8=e4m3"), experts)
    assert 0 < stage_memory(step, 0).float8 < stage_memory(step, 0).weights * 1.01


def test_checkpoints_are_as_far_apart_as_failures_ask_for() -> None:
    """By hand: 14 bytes of each of 235 billion parameters; twice the GPUs fail twice as often."""
    step = planned(example("qwen3_235b_a22b"), known("Qwen3-235B-A22B"), failure_gpu_hours=51_200)
    few, many = (checkpoints(step, gpus, step_s=100.0) for gpus in (512, 1024))
    assert few.size_bytes == 14 * step.table.elements
    assert (few.hours_between_failures, many.hours_between_failures) == (100, 50)
    assert few.best_every_steps == math.ceil((2 * few.blocked_s * 360_000) ** 0.5 / 100)
    assert many.best_every_steps < few.best_every_steps
    lost = few.blocked_s / 5000 + (2500 + few.write_s) / 360_000
    assert few.lost_share == pytest.approx(lost), "50 steps of 100 s"
    slow = planned(example("qwen3_235b_a22b"), known("Qwen3-235B-A22B"), storage_bytes_per_s=1e8)
    assert checkpoints(slow, 512, step_s=100.0).best_every_steps == math.ceil(
        checkpoints(slow, 512, 100.0).write_s / 100
    )


def test_a_dispatcher_that_sends_once_to_each_node_takes_less_of_the_network() -> None:
    table = known("Qwen3-30B-A3B")
    layout = (
        "policy.data_parallel=16",
        "policy.expert_parallel=16",
        "policy.tensor_parallel=1",
        "policy.pipeline_parallel=1",
    )
    sent = {}
    for dispatcher in ("alltoall", "deepep", "hybridep"):
        step = planned(example("qwen3_30b_a3b", *layout, f"policy.moe_dispatcher={dispatcher}"), table)
        rows = [row for row in microbatch_traffic(step, "update") if row.kind == "expert" and row.across_nodes]
        sent[dispatcher] = sum(row.sent_bytes for row in rows)
    # Two nodes: 8 experts of a token mean 4 copies to the other one, or 1 in 255 of 256 cases.
    assert sent["alltoall"] / sent["deepep"] == pytest.approx(4 / (255 / 256))
    assert sent["hybridep"] == sent["deepep"]


def test_a_teacher_counts_with_its_own_sizes() -> None:
    policy, teacher = known("OpenReasoning-Nemotron-1.5B"), known("Qwen3-8B")
    table = ParameterTable(policy.model, beside={"teacher": teacher})
    plain = example("nemotron_1_5b", "policy.data_parallel=1")
    given = example("nemotron_1_5b", "policy.data_parallel=1", "algorithm.distillation.teacher_hf_dir=Qwen3-8B")
    lossy = example(
        "nemotron_1_5b",
        *("policy.data_parallel=1", "algorithm.distillation.teacher_hf_dir=Qwen3-8B"),
        "algorithm.distillation.term=loss",
    )
    without, advantage, loss = (stage_memory(planned(config, table), 0) for config in (plain, given, lossy))
    assert advantage.frozen == loss.frozen == 2 * teacher.elements
    assert advantage.head == without.head < loss.head
    steps = [planned(config, table) for config in (plain, given, lossy)]
    times = [(score_time_s(step), update_time_s(step)) for step in steps]
    assert times[1][0] > 3 * times[0][0], "the teacher is five times as large"
    assert times[1][1] == times[0][1]
    assert times[2][0] == times[0][0]
    assert times[2][1] > times[0][1]


def test_the_distributed_optimizer_divides_its_state() -> None:
    config, table = example("nemotron_1_5b"), known("OpenReasoning-Nemotron-1.5B")
    memory = stage_memory(planned(config, table), 0)
    assert memory.optimizer == pytest.approx(12 * table.elements / 4, rel=1e-4)
    assert memory.gradients == pytest.approx(4 * table.elements, rel=1e-4)


def test_activations_of_a_layer() -> None:
    table, tokens = known("Qwen3-8B"), 1000
    hidden, query, key, ffn = 4096, 4096, 1024, 12288
    none, full, selective, sharded = (
        layer_bytes(table.model, policy, tokens, dtype="bfloat16", attention="flash")
        for policy in (
            PolicyConfig(),
            PolicyConfig(recompute="full"),
            PolicyConfig(recompute="selective"),
            PolicyConfig(tensor_parallel=2, sequence_parallel=True),
        )
    )
    # Norm inputs and outputs; packed q, k, v, a copy of q, q and k with RoPE, output; gate, up and product.
    elements = 4 * hidden + (query + 2 * key) + query + (query + key) + query + 3 * ffn
    assert none.saved == tokens * (2 * elements + 8 * 32 + 8)
    assert full.saved == tokens * 2 * hidden
    assert full.complete == none.saved
    # The feed-forward part goes, and what its norm keeps beside its input.
    assert none.saved - selective.saved == tokens * (2 * (3 * ffn + hidden) + 4)
    assert sharded.saved == pytest.approx(none.saved / 2, rel=1e-3)


def test_logits_are_the_most_that_a_head_can_take() -> None:
    table, policy = known("Qwen3-8B"), PolicyConfig(tensor_parallel=2)
    sizes = {
        head: head_bytes(table.model, policy, 16384, dtype="bfloat16", head=head)
        for head in ("logits", "recompute", "fused_loss")
    }
    vectors = 2 * 16384 * 4096 * 2
    assert sizes["logits"] == vectors + 16384 * 75968 * 2
    assert sizes["recompute"] == vectors + 4096 * (32768 * 6 + 4 * 4096)
    assert sizes["fused_loss"] == vectors + (1 << 30) // (4 * 75968) * 75968 * 6


def test_a_rollout_gpu() -> None:
    config, table = example("qwen3_8b", "rollout.tensor_parallel=2", "rollout.engines=4"), known("Qwen3-8B")
    memory = rollout_memory(planned(config, table), 80 * GIB)
    assert memory.kv_bytes_per_token == 2 * 36 * 4 * 128 * 2
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    assert memory.weights == 2 * ((table.elements - norms) // 2 + norms)
    assert memory.kv_cache == int(80 * GIB * 0.92) - memory.weights - memory.workspace


def test_traffic_of_a_micro_batch() -> None:
    config, table = example("qwen3_8b", "policy.recompute=none"), known("Qwen3-8B")
    traffic = {t.kind: t for t in microbatch_traffic(planned(config, table, 1000), "update")}
    hidden = 1000 * 4096 * 2
    # 18 layers x 2 blocks: all-gather and reduce-scatter, forward and backward, inputs once more; one end the same.
    assert traffic["tensor"].count == 2 * (2 * 36 + 2) + 36
    assert traffic["tensor"].sent_bytes == traffic["tensor"].count * hidden / 2
    assert traffic["pipeline"].sent_bytes == hidden / 2
    forward = {t.kind: t for t in microbatch_traffic(planned(config, table, 1000), "forward")}
    assert forward["tensor"].count == 2 * (36 + 1)
    config = example("qwen3_8b", "policy.recompute=selective")
    selective = {t.kind: t for t in microbatch_traffic(planned(config, table, 1000), "update")}
    assert selective["tensor"].count == traffic["tensor"].count + 2 * 18


def test_gradients_are_summed_or_scattered() -> None:
    table = known("Qwen3-8B")
    scattered = gradient_traffic(planned(example("qwen3_8b"), table))
    summed = gradient_traffic(planned(example("qwen3_8b", "policy.distributed_optimizer=false"), table))
    elements = table.stage(example("qwen3_8b").policy, 1).elements
    assert [t.sent_bytes for t in scattered] == pytest.approx([4 * elements / 2, 2 * elements / 2], rel=1e-4)
    assert [t.sent_bytes for t in summed] == [8 * elements / 2]


def test_links_leave_the_node_when_a_group_does() -> None:
    layout = ["policy.pipeline_parallel=2", "policy.data_parallel=4"]
    config, table = example("qwen3_32b", *layout), known("Qwen3-32B")
    crossing = {t.kind: t.across_nodes for t in microbatch_traffic(planned(config, table, 1000), "update")}
    assert crossing == {"tensor": False, "pipeline": True}
    assert all(t.across_nodes for t in gradient_traffic(planned(config, table)))


def test_publication_is_that_of_the_weights_plan() -> None:
    table = known("Qwen3-8B")
    published = publication(planned(example("qwen3_8b"), table))
    assert published.engine_bytes == 2 * table.elements
    assert published.buckets * 2 < published.collectives < published.buckets * 3
    vocabulary = 151_936 * 4096
    layers = table.elements - 2 * vocabulary - 4096
    assert published.forwarded_bytes == 2 * (layers // 2 + 4096 + vocabulary)
    experts = publication(planned(example("qwen3_30b_a3b"), known("Qwen3-30B-A3B")))
    assert experts.engine_bytes == 2 * 30_532_122_624

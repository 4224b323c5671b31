"""The policy of every example is built of the real Transformer Engine and megatron-core classes, without memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import meta_policies
import pytest

MODELS = {
    "nemotron_1_5b": "OpenReasoning-Nemotron-1.5B",
    "qwen3_8b": "Qwen3-8B",
    "qwen3_8b_grpo": "Qwen3-8B",
    "qwen3_8b_offpolicy": "Qwen3-8B",
    "qwen3_8b_colocated": "Qwen3-8B",
    "qwen3_32b": "Qwen3-32B",
    "qwen3_32b_colocated": "Qwen3-32B",
    "qwen3_32b_lora": "Qwen3-32B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
    "qwen3_235b_a22b": "Qwen3-235B-A22B",
    "two_phase_qwen3_1_7b": "Qwen3-1.7B",
}
EXAMPLES = sorted(
    path.stem
    for path in (meta_policies.ROOT / "examples").glob("*.yaml")
    if "\n  device: cuda\n" in path.read_text(encoding="utf-8")
)
VARIANTS: dict[str, tuple[str, list[str]]] = {
    **{name: (name, []) for name in EXAMPLES},
    "8B, one stage": ("qwen3_8b", ["policy.pipeline_parallel=1", "policy.data_parallel=4"]),
    "8B, fp8": ("qwen3_8b", ["policy.fp8=e4m3"]),
    "8B, context parallel": ("qwen3_8b", ["policy.context_parallel=2"]),
    "8B, two chunks a stage": ("qwen3_8b", ["policy.virtual_pipeline_parallel=2"]),
    "8B, selective recomputation": ("qwen3_8b", ["policy.recompute=selective"]),
    "8B, gradients in 16 bits": ("qwen3_8b", ["policy.gradient_dtype=bfloat16"]),
    "8B, moments in 16 bits": ("qwen3_8b", ["optimizer.state_dtype=bfloat16"]),
    "8B, plain optimizer": ("qwen3_8b", ["policy.distributed_optimizer=false"]),
    "30B, experts whole": ("qwen3_30b_a3b", ["policy.expert_tensor_parallel=1"]),
    "30B, replay of routers": ("qwen3_30b_a3b", ["policy.moe_router_replay=score"]),
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process that believes in a GPU; it outlives one build, since importing takes longer than building."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=meta_policies.install) as pool:
        yield pool


def test_every_example_for_gpus_is_built() -> None:
    assert set(EXAMPLES) == set(MODELS)


@pytest.mark.parametrize("last", [False, True], ids=["first rank", "last rank"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_policy_has_the_parameters_of_the_map(process: ProcessPoolExecutor, variant: str, last: bool) -> None:
    example, overrides = VARIANTS[variant]
    found = process.submit(meta_policies.build, example, MODELS[example], overrides, last=last).result(timeout=500)
    assert found["parameters"] > 100
    for problem in ("missing", "surplus", "twice", "wrong shapes"):
        assert found[problem] == [], problem
    assert found["dtypes"] == {"torch.bfloat16"}
    # An adapter reads what the norm before a linear layer gives, so the two are not one layer.
    columns = {"TEColumnParallelLinear", "LinearAdapter"} if "lora" in example else {"TELayerNormColumnParallelLinear"}
    assert found["classes"] >= {*columns, "TERowParallelLinear"}
    assert ("TEColumnParallelGroupedLinear" in found["classes"]) == ("b_a" in example)
    assert found["optimizers"] == {"transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"}
    # Two moments and the main parameters in float32 beside 2 bytes a parameter, or this rank's share of them.
    assert 0 < found["state_bytes"] <= 6 * found["parameter_bytes"] + 2**20
    assert found["saved"] >= found["parameters"] / 20
    published = found["published"]
    if not last or found["colocated"]:
        # Rank 0 sends every bucket of all stages, a rank that shares its GPU with an engine too, and in its order.
        assert published["all"]
        assert published["elements"] == published["wanted"]
    else:
        assert published["elements"] == 0
    assert published["buffers kept"] == 0, "memory that the next step needs"
    if (shards := found["shards"]) is not None:
        assert shards["can be written"]
        # A checkpoint takes this rank's state as it is, once.
        assert shards["devices"] == {"meta"}
        assert found["state_bytes"] <= shards["bytes"] + 2**20
        # It is in float32, also of moments in 16 bits.
        wider = 1.2 if "moments" in variant else 1.0
        assert shards["bytes"] <= 1.01 * wider * found["state_bytes"] + 2**20
        if not last:  # the first of its data-parallel ranks says where each parameter lies
            assert shards["elements of parameters"] == shards["elements of their pieces"]
            assert shards["elements of parameters"] <= shards["elements of own buckets"]

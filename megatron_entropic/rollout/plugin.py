"""Entry point that vLLM calls in each of its processes, so that spawned workers know what its engine knows."""

from __future__ import annotations


def register() -> None:
    """Make the weight-transfer backend `gloo` known to vLLM, and more that each of its processes needs. Repeatable."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from megatron_entropic.observability.stacks import offer_stacks
    from megatron_entropic.rollout.store_guard import guard_store
    from megatron_entropic.rollout.vllm_setup import let_readers_sleep, silence_known_noise

    offer_stacks()
    silence_known_noise()
    let_readers_sleep()
    guard_store()
    # The factory refuses a name twice and has no public question for it.
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "gloo", "megatron_entropic.rollout.gloo_transport", "GlooWeightTransferEngine"
        )

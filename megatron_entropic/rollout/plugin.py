"""Entry point that vLLM calls in each of its processes, so that spawned workers know the gloo transport too."""

from __future__ import annotations


def register() -> None:
    """Make the weight-transfer backend `gloo` known to vLLM and drop its harmless warnings. Repeatable."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from megatron_entropic.rollout.noise import silence_known_noise

    silence_known_noise()
    # The factory refuses a name twice and has no public question for it.
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "gloo", "megatron_entropic.rollout.gloo_transport", "GlooWeightTransferEngine"
        )

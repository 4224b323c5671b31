"""Entropy-stable reinforcement learning of language models: EntroPIC on Megatron-core with vLLM rollouts."""

__version__ = "0.1.0"

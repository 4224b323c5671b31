"""The mixture of experts that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_entropic.weights.architectures import ExpertKeys


@dataclass(frozen=True)
class ExpertDimensions:
    """Feed-forward parts with experts, the same in all layers that have them."""

    count: int
    """Experts of a layer."""
    per_token: int
    """Experts that each token goes through."""
    ffn_hidden_size: int
    """Width of one expert."""
    renormalised: bool
    """Whether the router's probabilities of a token's experts are scaled to add up to 1."""
    dense_layers: tuple[int, ...] = ()
    """Global numbers of the layers without experts."""

    def parallel_problems(self, expert_parallel: int, expert_tensor_parallel: int) -> list[str]:
        """Why the experts cannot be spread so; empty if they can."""
        problems = []
        if self.count % expert_parallel:
            problems.append(f"expert_parallel={expert_parallel} does not divide the {self.count} experts")
        if self.ffn_hidden_size % expert_tensor_parallel:
            problems.append(
                f"expert_tensor_parallel={expert_tensor_parallel} does not divide the width of an expert "
                f"({self.ffn_hidden_size})"
            )
        return problems


def expert_problems(config: Mapping[str, Any], keys: ExpertKeys) -> list[str]:
    """What in a config.json does not describe experts that can be trained."""
    problems = []
    counts = [key for key in keys.count if config.get(key) is not None] or [keys.count[0]]
    for key in (*counts[:1], "num_experts_per_tok", keys.ffn):
        if not _is_positive(config.get(key)):
            problems.append(f"{key} must be a positive integer, found {config.get(key)!r}")
    if not _is_positive(config.get("decoder_sparse_step", 1)):
        problems.append(f"decoder_sparse_step must be a positive integer, found {config['decoder_sparse_step']!r}")
    if not isinstance(config.get("mlp_only_layers") or [], list):
        problems.append(f"mlp_only_layers must be a list of layers, found {config['mlp_only_layers']!r}")
    if problems:
        return problems
    experts = read_experts(config, keys, num_layers=0)
    if experts.per_token > experts.count:
        problems.append(f"num_experts_per_tok={experts.per_token} is more than the {experts.count} experts")
    if experts.per_token == 1 and experts.renormalised:
        problems.append("num_experts_per_tok=1 with weights that add up to 1: the router would get no gradient")
    if config.get("router_jitter_noise"):
        problems.append(f"router_jitter_noise={config['router_jitter_noise']}: noise in the router is not supported")
    return problems


def read_experts(config: Mapping[str, Any], keys: ExpertKeys, num_layers: int) -> ExpertDimensions:
    """The experts of a config.json in which `expert_problems` finds nothing.

    A layer has experts unless `mlp_only_layers` names it, and if `decoder_sparse_step` divides its number counted from
    1 (the rule of transformers' Qwen3MoeDecoderLayer).
    """
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or [])
    renormalised = keys.renormalised
    return ExpertDimensions(
        count=next(config[key] for key in keys.count if config.get(key) is not None),
        per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config[keys.ffn],
        renormalised=renormalised if isinstance(renormalised, bool) else bool(config.get(renormalised, False)),
        dense_layers=tuple(layer for layer in range(num_layers) if layer in dense or (layer + 1) % step),
    )


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0

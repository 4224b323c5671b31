"""The mixture of experts that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_entropic.models.config_values import MOST_ELEMENTS, MOST_LAYERS, positive_number, shown
from megatron_entropic.models.families import ExpertKeys

_MOST_EXPERTS = 1_000_000
"""Of all layers together."""


@dataclass(frozen=True)
class SigmoidRouting:
    """How DeepSeek-V3 chooses a token's experts (arXiv 2412.19437, 2.1.2).

    An expert's score is the sigmoid of its logit. The highest sums of score and a bias of each expert choose: first
    groups of experts, by their two best, then experts in these. The weights are the scores alone, scaled.
    """

    groups: int
    chosen_groups: int
    """Of which a token's experts are; all groups: no such restriction."""
    scaling: float
    """Of the weights, after they were made to add up to 1."""


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
    shared_ffn_hidden_size: int = 0
    """Width of all experts together that every token goes through besides; 0: there are none."""
    sigmoid: SigmoidRouting | None = None
    """None: probabilities are a softmax over all experts, and the highest are chosen."""

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
    for key in (keys.count[0], "num_experts_per_tok", keys.ffn):
        if not _is_positive(config.get(key)):
            problems.append(f"{key} must be a positive integer, found {shown(config.get(key))}")
    if not _is_positive(config.get("decoder_sparse_step", 1)):
        problems.append(f"decoder_sparse_step must be a positive integer, found {config['decoder_sparse_step']!r}")
    if not isinstance(config.get("mlp_only_layers") or [], list):
        problems.append(f"mlp_only_layers must be a list of layers, found {config['mlp_only_layers']!r}")
    if keys.sigmoid:
        problems += _sigmoid_problems(config)
    if problems:
        return problems
    experts = read_experts(config, keys, num_layers=0)
    layers = config.get("num_hidden_layers")
    if type(layers) is int and experts.count * layers > _MOST_EXPERTS:
        problems.append(f"{keys.count[0]}={experts.count} in {layers} layers are more than any model has")
    if experts.sigmoid is not None:
        problems += _group_problems(experts.sigmoid, experts)
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
    1 (the rule of transformers' Qwen3MoeDecoderLayer), and if it is not one of the first that have none.
    """
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or [])
    renormalised = keys.renormalised
    first = config[keys.first_layer] if keys.first_layer else 0
    return ExpertDimensions(
        count=config[keys.count[0]],
        per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config[keys.ffn],
        renormalised=renormalised if isinstance(renormalised, bool) else bool(config.get(renormalised, False)),
        dense_layers=tuple(n for n in range(num_layers) if n < first or n in dense or (n + 1) % step),
        shared_ffn_hidden_size=config["n_shared_experts"] * config[keys.ffn] if keys.sigmoid else 0,
        sigmoid=SigmoidRouting(config["n_group"], config["topk_group"], float(config["routed_scaling_factor"]))
        if keys.sigmoid
        else None,
    )


def _sigmoid_problems(config: Mapping[str, Any]) -> list[str]:
    """What does not describe DeepSeek-V3's routing; vLLM needs the two names, whose defaults are those of V2."""
    problems = [
        f"{key} must be a positive integer, found {config.get(key)!r}"
        for key in ("n_group", "topk_group", "n_shared_experts")
        if not _is_positive(config.get(key))
    ]
    wanted = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    for key, value in wanted.items():
        if config.get(key) != value:
            problems.append(f"{key}={config.get(key)!r}: only {value!r} is supported")
    first, scaling = config.get("first_k_dense_replace"), config.get("routed_scaling_factor")
    if type(first) is not int or not 0 <= first <= MOST_LAYERS:
        problems.append(f"first_k_dense_replace must be an integer of at least 0, found {first!r}")
    if positive_number(scaling) is not None:
        problems.append(f"routed_scaling_factor must be a positive number, found {scaling!r}")
    if config.get("moe_layer_freq", 1) != 1:
        problems.append(f"moe_layer_freq={config['moe_layer_freq']!r}: only 1 is supported")
    return problems


def _group_problems(routing: SigmoidRouting, experts: ExpertDimensions) -> list[str]:
    """Groups of experts that cannot be chosen from."""
    groups, chosen = routing.groups, routing.chosen_groups
    if experts.count % groups or chosen > groups:
        return [f"topk_group={chosen} of n_group={groups} groups of {experts.count} experts: they must divide them"]
    if chosen == groups:
        return []
    problems = []
    if experts.per_token > chosen * (experts.count // groups):
        problems.append(f"num_experts_per_tok={experts.per_token} is more than topk_group={chosen} groups hold")
    if experts.per_token // chosen != 2:
        problems.append(
            f"num_experts_per_tok={experts.per_token} with topk_group={chosen}: megatron-core chooses groups by their "
            f"{experts.per_token // chosen} best experts, the model by their 2 best; only equal numbers are supported"
        )
    return problems


def _is_positive(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_ELEMENTS

"""Experts, latent attention and rotary embedding as a Hugging Face config.json describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_entropic.models.config_values import MOST_ELEMENTS, MOST_LAYERS, positive_number, shown
from megatron_entropic.models.families import ExpertKeys

_MOST_EXPERTS = 1_000_000
"""Largest number of experts of all layers together."""


@dataclass(frozen=True)
class SigmoidRouting:
    """Choice of a token's experts as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2).

    An expert's score is the sigmoid of its logit. The highest sums of score and a bias of each expert choose: first
    groups of experts, by their two best, then experts in these. The weights are the scores alone, scaled.
    """

    groups: int
    chosen_groups: int
    """Number of groups that a token's experts are taken from; all groups: no such restriction."""
    scaling: float
    """Factor of a token's expert weights, after they were made to add up to 1."""


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
    """DeepSeek-V3's routing; None: probabilities are a softmax over all experts, and the highest are chosen."""

    def parallel_problems(self, expert_parallel: int, expert_tensor_parallel: int) -> list[str]:
        """Reasons why the experts cannot be spread so; empty if they can."""
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
    """Reasons why a config.json does not describe experts that can be trained."""
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
    """Reasons why routing is not DeepSeek-V3's; vLLM needs the two names, whose defaults are those of V2."""
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
    """Reasons why experts cannot be chosen from the groups."""
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


# The multi-head latent attention that a Hugging Face config.json describes (DeepSeek-V2, arXiv 2405.04434, 2.1).

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class LatentAttention:
    """Keys and values of all heads are made of one vector a token; a further part of the keys is shared by all heads.

    A head of q and k is `head_dim` wide: first what RoPE leaves alone, then `rotary_head_dim` that it turns.
    """

    query_rank: int | None
    """Width of the vector of which queries are made; None: they are made of hidden states directly."""
    key_value_rank: int
    rotary_head_dim: int
    value_head_dim: int


def latent_problems(config: Mapping[str, Any]) -> list[str]:
    """Reasons why a config.json does not describe latent attention that can be trained."""
    problems = []
    optional = ["q_lora_rank"] if config["q_lora_rank"] is not None else []
    for key in (*_SIZES, *optional):
        value = config.get(key)
        if type(value) is not int or not 0 < value <= MOST_ELEMENTS:
            problems.append(
                f"{key} must be a positive integer{' or null' * bool(key in optional)}, found {shown(value)}"
            )
    if not problems and config["qk_rope_head_dim"] % 2:
        problems.append(f"qk_rope_head_dim={config['qk_rope_head_dim']} must be even")
    if config.get("rope_interleave", True) is not True:
        problems.append(
            f"rope_interleave={config['rope_interleave']!r}: only true is supported, RoPE of neighbouring pairs"
        )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if groups is not None and groups != heads:
        problems.append(f"num_key_value_heads={groups} differs from num_attention_heads={heads}")
    return problems


def read_latent(config: Mapping[str, Any]) -> LatentAttention:
    """The attention of a config.json in which `latent_problems` finds nothing."""
    return LatentAttention(
        query_rank=config["q_lora_rank"],
        key_value_rank=config["kv_lora_rank"],
        rotary_head_dim=config["qk_rope_head_dim"],
        value_head_dim=config["v_head_dim"],
    )


# The rotary embedding that a Hugging Face config.json describes.

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN_KEYS = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(config: Mapping[str, Any], *, latent: bool) -> tuple[float, dict[str, Any] | None, list[str]]:
    """RoPE base, scaling and problems; transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling.

    Args:
        config: the values of config.json, with the family's defaults.
        latent: whether the family has latent attention, whose megatron-core module knows YaRN and not Llama 3's
            scaling.
    """
    written = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    parameters = {**written[0]} if written else {}
    problems = []
    if len(written) > 1 and written[0] != written[1]:
        problems.append("rope_scaling and rope_parameters differ: leave one out")
    types = [parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None]
    if len(types) > 1 and types[0] != types[1]:
        problems.append(f"rope_type={shown(types[0])} and type={shown(types[1])} differ: leave one out")
    problems += _bad_numbers(parameters)
    if problems:
        return config["rope_theta"], None, problems
    theta = float(parameters.get("rope_theta", config["rope_theta"]))
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and partial != 1.0:
        problems.append(f"partial_rotary_factor={partial}: only 1.0 is supported")
    rope_type = types[0] if types else "default"
    if rope_type == "default":
        return theta, None, problems
    scaled = "yarn" if latent else "llama3"
    if rope_type != scaled:
        return theta, None, [*problems, f"rope type {rope_type!r} is not supported (supported: default, {scaled})"]
    if latent:
        parameters = _YARN_DEFAULTS | parameters
        problems += _yarn_problems(parameters)
    # transformers lets the model's own key win over that of the rope parameters.
    if config.get("original_max_position_embeddings") is not None:
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    keys = (*_YARN_KEYS, *_YARN_DEFAULTS) if latent else _LLAMA3_KEYS
    missing = [key for key in keys if key not in parameters]
    if missing:
        return theta, None, [*problems, f"rope type {scaled!r} lacks {', '.join(missing)}"]
    return theta, {"rope_type": scaled} | {key: parameters[key] for key in keys}, problems


def _bad_numbers(parameters: Mapping[str, Any]) -> list[str]:
    """Problems of rope parameters that must be positive numbers and are not."""
    return [
        f"{key} of the rope parameters must be {wanted}, found {shown(parameters[key])}"
        for key in ("rope_theta", "partial_rotary_factor", *_LLAMA3_KEYS, *_YARN_DEFAULTS)
        if key in parameters and (wanted := positive_number(parameters[key])) is not None
    ]


def _yarn_problems(parameters: Mapping[str, Any]) -> list[str]:
    """Problems of YaRN settings that transformers, vLLM and megatron-core do not all understand in the same way."""
    problems = []
    for key in ("mscale", "mscale_all_dim"):
        if key in parameters and positive_number(parameters[key]) is not None:
            problems.append(f"rope type 'yarn' with {key}={parameters[key]}: only positive values are supported")
    if parameters.get("attention_factor") is not None:
        problems.append("rope type 'yarn' with attention_factor is not supported")
    if parameters.get("truncate", True) is not True:
        problems.append("rope type 'yarn' with truncate=false is not supported")
    return problems

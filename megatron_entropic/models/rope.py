"""The rotary embedding that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_entropic.models.config_values import positive_number, shown

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN_KEYS = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(config: Mapping[str, Any], *, latent: bool) -> tuple[float, dict[str, Any] | None, list[str]]:
    """RoPE base, scaling and problems; transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling.

    Args:
        config: of config.json, with the family's defaults.
        latent: the family has latent attention, whose megatron-core module knows YaRN and not Llama 3's scaling.
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
    """Numbers that are none."""
    return [
        f"{key} of the rope parameters must be {wanted}, found {shown(parameters[key])}"
        for key in ("rope_theta", "partial_rotary_factor", *_LLAMA3_KEYS, *_YARN_DEFAULTS)
        if key in parameters and (wanted := positive_number(parameters[key])) is not None
    ]


def _yarn_problems(parameters: Mapping[str, Any]) -> list[str]:
    """What transformers, vLLM and megatron-core do not all understand in the same way."""
    problems = []
    for key in ("mscale", "mscale_all_dim"):
        if key in parameters and positive_number(parameters[key]) is not None:
            problems.append(f"rope type 'yarn' with {key}={parameters[key]}: only positive values are supported")
    if parameters.get("attention_factor") is not None:
        problems.append("rope type 'yarn' with attention_factor is not supported")
    if parameters.get("truncate", True) is not True:
        problems.append("rope type 'yarn' with truncate=false is not supported")
    return problems

"""The rotary embedding that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN_KEYS = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(config: Mapping[str, Any], *, latent: bool) -> tuple[float, dict[str, Any] | None, list[str]]:
    """RoPE base, scaling and problems; transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling.

    Args:
        config: of config.json.
        latent: the family has latent attention, whose megatron-core module knows YaRN and not Llama 3's scaling.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    problems = []
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        problems.append(f"partial_rotary_factor={partial}: only 1.0 is supported")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return theta, None, problems
    scaled = "yarn" if latent else "llama3"
    if rope_type != scaled:
        return theta, None, [*problems, f"rope type {rope_type!r} is not supported (supported: default, {scaled})"]
    if latent:
        parameters = _YARN_DEFAULTS | parameters
        problems += _yarn_problems(parameters)
    keys = (*_YARN_KEYS, *_YARN_DEFAULTS) if latent else _LLAMA3_KEYS
    missing = [key for key in keys if key not in parameters]
    if missing:
        return theta, None, [*problems, f"rope type {scaled!r} lacks {', '.join(missing)}"]
    return theta, {"rope_type": scaled} | {key: parameters[key] for key in keys}, problems


def _yarn_problems(parameters: Mapping[str, Any]) -> list[str]:
    """What transformers, vLLM and megatron-core do not all understand in the same way."""
    problems = []
    for key in ("mscale", "mscale_all_dim"):
        if key in parameters and not parameters[key]:
            problems.append(f"rope type 'yarn' with {key}={parameters[key]}: only positive values are supported")
    if parameters.get("attention_factor") is not None:
        problems.append("rope type 'yarn' with attention_factor is not supported")
    if parameters.get("truncate", True) is not True:
        problems.append("rope type 'yarn' with truncate=false is not supported")
    return problems

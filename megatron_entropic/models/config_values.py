"""The values of a Hugging Face config.json: completed with transformers' defaults, each checked to be of its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError, missing_model
from megatron_entropic.models.families import Architecture

MOST_LAYERS = 1_000
MOST_ELEMENTS = 2**24
"""Largest length of one axis, and largest number of experts; the largest vocabularies have a million rows."""
_MOST_POSITIONS = 2**31 - 1
_SHOWN_CHARACTERS = 60

REQUIRED_SIZES = {
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": MOST_ELEMENTS,
    "intermediate_size": MOST_ELEMENTS,
    "num_attention_heads": MOST_ELEMENTS,
    "vocab_size": MOST_ELEMENTS,
    "max_position_embeddings": _MOST_POSITIONS,
}
"""Keys that a config.json must have, whatever transformers takes for absent ones, with the largest value accepted."""
_OPTIONAL_SIZES = {
    "num_key_value_heads": MOST_ELEMENTS,
    "head_dim": MOST_ELEMENTS,
    "sliding_window": _MOST_POSITIONS,
    "original_max_position_embeddings": _MOST_POSITIONS,
}
_SWITCHES = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob", "rope_interleave"),
)
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers"}
"""Other names of keys, as transformers' attribute_map has them, with the names used here."""

Check = Callable[[Any], str | None]
"""Function of a value that returns words for what the value must be, or None if it is that already."""


def read_json(hf_dir: Path) -> dict[str, Any]:
    """The object in config.json of a model directory.

    Raises:
        UserError: no directory, no file, or not a JSON object of finite numbers.
    """
    if not hf_dir.is_dir():
        raise UserError(missing_model(hf_dir))
    path = hf_dir / "config.json"
    if not path.is_file() and (hf_dir / "adapter_config.json").is_file():
        raise UserError(
            f"{hf_dir}: an adapter without its model. Merge the two with `megatron-entropic convert peft-to-hf`, or "
            "train on from it with policy.lora.adapter_dir"
        )
    if not path.is_file():
        raise UserError(f"{hf_dir}: no config.json, so this is not a Hugging Face model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: JSON, UTF-8, or a number of thousands of digits
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not readable as JSON: nested too deeply") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    endless = [f"{key} must be a finite number, found {value}" for key, value in _numbers(config) if not _finite(value)]
    if endless:
        raise UserError(f"{path}: this model cannot be used:\n" + "\n".join(f"  - {problem}" for problem in endless))
    return config


def complete_values(config: Mapping[str, Any], architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """Complete the values of a config.json with the family's defaults for absent keys; also returns the problems found.

    A value of the wrong kind is a problem and gives way to the default, so that everything else can still be checked.
    """
    values, problems = _canonical(config, architecture)
    for key, check in _checks():
        if key in values and (wanted := check(values[key])) is not None:
            problems.append(f"{key} must be {wanted}, found {shown(values.pop(key))}")
    for key, most in REQUIRED_SIZES.items():
        wanted = _size(most)(values.get(key))
        if wanted is not None:
            problems.append(f"{key} must be {wanted}, found {shown(values.get(key))}")
    return {**architecture.defaults, **values}, problems


def positive_number(value: Any) -> str | None:
    """Return "a positive number" unless the value is a number above 0."""
    return None if _is_number(value) and value > 0 else "a positive number"


def shown(value: Any) -> str:
    """Text of a value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _canonical(config: Mapping[str, Any], architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """Move each value to the first of its key's names; two names with different values are a problem."""
    values, problems = dict(config), []
    aliases = dict(_ALIASES)
    if architecture.experts is not None:
        first, *others = architecture.experts.count
        aliases |= dict.fromkeys(others, first)
    for alias, key in aliases.items():
        if values.get(alias) is None:
            continue
        if values.get(key) is not None and values[key] != values[alias]:
            problems.append(f"{key}={shown(values[key])} and {alias}={shown(values[alias])}: they must be the same")
        values.setdefault(key, values[alias])
    return values, problems


def _checks() -> Iterator[tuple[str, Check]]:
    for key, most in _OPTIONAL_SIZES.items():
        yield key, _or_null(_size(most))
    for key in _SWITCHES:
        yield key, _or_null(lambda value: None if isinstance(value, bool) else "true or false")
    yield "rms_norm_eps", positive_number
    yield "rope_theta", positive_number
    for key in ("rope_parameters", "rope_scaling"):
        yield key, _or_null(lambda value: None if isinstance(value, dict) else "an object or null")
    yield "layer_types", _or_null(_list_of(str, "texts"))
    yield "mlp_only_layers", _or_null(_list_of(int, "layers"))
    for key in ("dtype", "torch_dtype"):
        yield key, _or_null(_float_dtype)
    yield "hidden_act", lambda value: None if isinstance(value, str) else "a text"
    for key in ("max_window_layers", "num_nextn_predict_layers"):
        yield key, _or_null(_size(MOST_LAYERS, least=0))


def _size(most: int, least: int = 1) -> Check:
    words = "a positive integer" if least else "an integer of at least 0"

    def check(value: Any) -> str | None:
        if type(value) is not int or value < least:
            return words
        return f"{words} of at most {most:,}" if value > most else None

    return check


def _float_dtype(value: Any) -> str | None:
    """Check of a dtype's name: transformers and vLLM look it up in torch, whatever the weights are."""
    known = ("float32", "bfloat16", "float16", "float64")
    return None if isinstance(value, str) and value.removeprefix("torch.") in known else f"one of {', '.join(known)}"


def _list_of(kind: type, name: str) -> Check:
    def check(value: Any) -> str | None:
        fits = isinstance(value, list) and all(type(item) is kind for item in value)
        return None if fits else f"a list of {name}"

    return check


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and _finite(value)


def _finite(value: float) -> bool:
    # An integer beyond every float is no number that a model can have either.
    return -1e300 < value < 1e300 and math.isfinite(value)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yields every number below a value, with its place, such as `rope_scaling.factor`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}[{index}]")
    elif type(value) in (int, float):
        yield key, value

"""Instruction following: all verifiable instructions of a prompt are followed, or not (IFEval, prompt-level strict)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_entropic.errors import UserError
from megatron_entropic.rewards.verifiers.instruction_checks import CHECKS


def ifeval(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the response follows every instruction of the ground truth, else 0.0; an empty one follows none.

    Args:
        ground_truth: {"instruction_id_list": [...], "kwargs": [...]} as in the published data, or the same as JSON.
            Arguments that are None are as good as absent.

    Raises:
        UserError: a ground truth that is not of this form, an unknown instruction, or one that lacks an argument.
    """
    # All of them are looked at, so that a ground truth with a mistake in it is found whatever the response.
    followed = [_followed(response, name, given) for name, given in _instructions(ground_truth)]
    return float(all(followed))


def _instructions(ground_truth: Any) -> list[tuple[str, dict[str, Any]]]:
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if not isinstance(truth, dict) or not truth.get("instruction_id_list"):
        raise UserError(f"expected a ground truth with instruction_id_list and kwargs, found {ground_truth!r:.200}")
    names = list(truth["instruction_id_list"])
    given = list(truth.get("kwargs") or [{}] * len(names))
    unknown = [name for name in names if name not in CHECKS]
    if unknown or len(given) != len(names):
        raise UserError(
            f"unknown instructions: {', '.join(map(str, unknown))}" if unknown else "kwargs is not as long as its ids"
        )
    return [
        (name, {key: value for key, value in (one or {}).items() if value is not None})
        for name, one in zip(names, given, strict=True)
    ]


def _followed(response: str, name: str, given: dict[str, Any]) -> bool:
    try:
        follows = CHECKS[name](response, given)
    except KeyError as error:
        raise UserError(f"the instruction {name} lacks the argument {error}") from error
    return bool(response.strip()) and follows

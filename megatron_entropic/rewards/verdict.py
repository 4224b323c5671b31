"""What came out of judging one response."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_entropic.rewards.verifiers import Verifier


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward, or the reason why there is none."""

    status: Literal["ok", "timeout", "error"]
    reward: float = 0.0
    message: str = ""


def judge(verifier: Verifier, response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> Verdict:
    """Ask a verifier in this process; whatever it raises becomes an error verdict."""
    try:
        reward = float(verifier(response, ground_truth, extra_info))
    except (Exception, SystemExit) as error:  # noqa: BLE001  foreign code: its failure is an outcome to count
        return Verdict("error", message=f"{type(error).__name__}: {error}"[:500])
    if not math.isfinite(reward):
        return Verdict("error", message=f"the verifier returned {reward}")
    return Verdict("ok", reward)

"""Usual ranges of metrics, so that a number says something to a person who sees it for the first time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_entropic.observability.values import as_number, setting_of


@dataclass(frozen=True)
class MismatchYardstick:
    """Usual range of mismatch/logprob_abs_mean where policy and engines agree: nats a token, mean over a step."""

    dtype: str
    usual: float
    """Value that the metric is seldom above."""
    limit: float
    """Value above which the engines sample from another policy than the one that is trained."""

    def __str__(self) -> str:
        return f"{self.dtype}: usually below {self.usual:g}"


# Measured: float32 on a CPU 1e-7 to 4e-7 (0.2 million parameters), at most 4.5e-5 of single tokens (135 million);
# bfloat16 0.0086 (1.5B shape, policy against float32, H200), 0.035 (135 million, 30 layers, CPU).
_MISMATCH = {
    "float32": MismatchYardstick("float32", 1e-5, 1e-3),
    "bfloat16": MismatchYardstick("bfloat16", 0.04, 0.12),
}


def mismatch_yardstick(config: Mapping[str, Any]) -> MismatchYardstick | None:
    """The usual range of the mismatch of a run with this configuration; None where nothing is known to be usual.

    Nothing is known where policy or engines round to 8 bits, and where top_p or top_k cut what is sampled, so that
    log-probs of two distributions are compared.
    """
    rounded = any(setting_of(config, key, "off") != "off" for key in ("rollout.quantization", "policy.fp8"))
    top_p, top_k = as_number(setting_of(config, "rollout.top_p"), 1), as_number(setting_of(config, "rollout.top_k"), -1)
    return None if rounded or top_p < 1 or top_k > 0 else _MISMATCH.get(str(setting_of(config, "model.dtype")))

"""The limit on what quantising may cost: above it nothing is written, and the message says what to do."""

from __future__ import annotations

import math
import re

import pytest

from megatron_entropic.commands.export import (
    MAX_KL,
    QuantizationFormat,
    QuantizationReport,
    refuse_another_policy,
)
from megatron_entropic.errors import UserError


def _report(kl_mean: float) -> QuantizationReport:
    return QuantizationReport(kl_mean=kl_mean, kl_max=7.5, tokens=120, prompts=6)


def test_a_kl_within_the_limit_is_accepted() -> None:
    refuse_another_policy(_report(0.0028), "int8", MAX_KL)
    refuse_another_policy(_report(MAX_KL), "fp8", MAX_KL)


def test_int8_inputs_that_make_another_policy_are_refused_with_the_form_that_does_not() -> None:
    with pytest.raises(UserError) as refusal:
        refuse_another_policy(_report(0.8741), "int8_activations", MAX_KL)
    for part in ("0.874 nats a token", "limit of 0.1", "nothing was written", "--quantize int8,", "--max-kl 0.88"):
        assert part in str(refusal.value), part


@pytest.mark.parametrize("kl", [0.1000001, 0.8741, 1.0, 12.34, 99.9])
@pytest.mark.parametrize("quantization", ["fp8", "int8", "int8_activations", "nvfp4"])
def test_the_limit_that_is_offered_is_accepted(kl: float, quantization: QuantizationFormat) -> None:
    with pytest.raises(UserError) as refusal:
        refuse_another_policy(_report(kl), quantization, MAX_KL)
    offered = re.search(r"--max-kl (\S+)", str(refusal.value))
    assert offered is not None
    refuse_another_policy(_report(kl), quantization, float(offered[1]))


def test_a_policy_without_numbers_is_refused_at_any_limit() -> None:
    with pytest.raises(UserError, match="gives no numbers"):
        refuse_another_policy(_report(math.nan), "int8_activations", math.inf)

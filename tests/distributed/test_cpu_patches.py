"""Every patch of megatron-core is still needed by the installed version, and does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_entropic.policy.megatron.cpu_patches import patches_for
from megatron_entropic.policy.megatron.platform import check_megatron_version, installed_megatron_version

SCRIPT = Path(__file__).parent / "scripts" / "cpu_patches.py"
TARGETS = [patch.target for patch in patches_for(check_megatron_version(installed_megatron_version()))]


@pytest.fixture(scope="module")
def answers(run_ranks_once):
    return json.loads(run_ranks_once(SCRIPT, 1)[0])


@pytest.mark.parametrize("target", TARGETS)
def test_patch_is_still_needed_and_helps(answers, target):
    assert answers["before"][target], "megatron-core does not need this patch any more: remove it"
    assert not answers["after"][target], "the defect is still there with the patch applied"
    assert answers["reasons"][target]


def test_torch_compile_is_switched_off(answers):
    assert answers["stance"] == ["default", "force_eager"]


def test_one_gather_rotates_like_the_loop_over_segments(answers):
    assert answers["rope_scale"] > 1
    assert answers["rope_difference"] < 1e-6


def test_the_random_state_tracker_forks_and_restores(answers):
    assert answers["rng_restored"]


def test_a_rank_does_not_wait_for_what_it_never_uses(answers):
    assert answers["unused"] == []

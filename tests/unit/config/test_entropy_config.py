"""The section entropy_control: what does not go together is said at once, and what goes is shown."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_entropic.config.checks import config_warnings
from megatron_entropic.config.entropy_checks import entropy_violations
from megatron_entropic.config.load import batch_arithmetic
from megatron_entropic.config.names import CONTROLLERS
from megatron_entropic.config.run import Config


def config(algorithm: dict[str, Any] | None = None, **entropy_control: Any) -> Config:
    return Config(
        model={"hf_dir": "unused"},
        data={"train_files": ["unused"]},
        algorithm=algorithm or {},
        entropy_control=entropy_control,
    )


def problems(**entropy_control: Any) -> str:
    return "; ".join(violation.message for violation in entropy_violations(config(**entropy_control)))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"guard": "celing"}, "did you mean ceiling"),
        ({"guard": "ceiling", "controller": "aec"}, "overrides alpha, and controller=aec has none"),
        ({"guard": "ceiling", "controller": "off"}, "controller=off has none"),
        ({"guard": "band", "feedback": "microbatch_local"}, "one alpha for all ranks"),
        ({"reanchor": "detected", "feedback": "microbatch_local"}, "one alpha for all ranks"),
        ({"reanchor": "measured", "feedback": "sampling"}, "it needs feedback=score_pass, not sampling"),
        ({"guard": "band", "guards": {"bottom": 1.3}}, "bottom=1.3 is not below top=1.2"),
        ({"controller": "cascade", "tau": 0.99}, "must lie within rivals.cascade_tau"),
        ({"controller": "repo_r", "rivals": {"repo_zeta": 2.0}}, "repo_zeta=2 must lie within repo_bounds"),
        ({"controller": "adapo", "rivals": {"adapo_bounds": [0.3, 0.5]}}, "adapo_clip=0.2 must lie within"),
    ],
)
def test_what_does_not_go_together_is_said(section: dict[str, Any], words: str) -> None:
    assert words in problems(**section)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("guard", ["off", "ceiling", "band"])
def test_everything_else_goes_together(name: str, guard: str) -> None:
    own = guard if CONTROLLERS[name].steers_alpha else "off"
    section = {"tau": 0.9} if name == "cascade" else {}
    assert problems(controller=name, guard=own, reanchor="detected", **section) == ""


def test_a_clip_that_never_clips_is_a_warning() -> None:
    assert any("the controller does nothing" in line for line in config_warnings(config(controller="adapo")))
    several = config({"optimizer_steps_per_rollout": 4}, controller="adapo")
    assert not any("the controller does nothing" in line for line in config_warnings(several))


def test_a_target_that_nobody_reads_is_not_asked_for() -> None:
    def asked(name: str) -> bool:
        return any("entropy_control.target is not set" in line for line in config_warnings(config(controller=name)))

    assert [name for name in CONTROLLERS if not asked(name)] == [
        "constant", "unsolved", "probe", "entropy_bonus", "entrocraft", "fade",
    ]  # fmt: skip


def test_the_summary_names_guard_and_reanchoring() -> None:
    words = dict(batch_arithmetic(config(controller="pi", target="0.7x", guard="band", reanchor="detected")))
    assert words["entropy control"].startswith("PI at 0.7x the initial entropy nats")
    assert "under a band, target moved where the data change, H from score pass" in words["entropy control"]
    plain = dict(batch_arithmetic(config(controller="unsolved")))
    assert plain["entropy control"] == "unsolved, H from score pass"

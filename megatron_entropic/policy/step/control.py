"""Entropy feedback: the measurement that drives the controller, fixed before the first backward, equal on all ranks.

score pass ---measured---> EntropyControl.steering_for_step ---> backward of all micro-batches ---> commit
                                    ^                                  |
                                    '------- previous_step ------------'  H measured during the update itself
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.algorithms import MicrobatchLocalController, Steering, build_controller
from megatron_entropic.config.algorithm import EntropyControlConfig
from megatron_entropic.config.run import Config
from megatron_entropic.policy.megatron.parallel import ParallelState, verify_equal
from megatron_entropic.types import Scores, Sequence


@dataclass(frozen=True, slots=True)
class EntropyMeasurement:
    """Global sums over response tokens, the same on every rank."""

    entropy_sum: float
    """Sum of the token entropies, in nats."""
    token_count: float

    @property
    def mean(self) -> float:
        """Token mean in nats; NaN without tokens."""
        return self.entropy_sum / self.token_count if self.token_count else math.nan

    @property
    def usable(self) -> bool:
        """Whether a controller can be fed with the measurement."""
        return self.token_count > 0 and math.isfinite(self.entropy_sum)


def measured_entropy(
    sequences: list[Sequence], scores: Scores, feedback: str, cap: float, measure: str = "tokens"
) -> torch.Tensor:
    """Sum of this replica's token entropies, nats, and number of its tokens, [2] float64.

    Where older weights sampled tokens (`Sequence.sampling_logprobs`), each token counts by the weight of its state: how
    much more often the policy that is scored now would come there than those that did,

        w_t = clip(prod over the response's tokens s < t of pi_now(s) / pi_sampled-it(s), 1 / cap, cap)

    so that the mean is an estimate for the states of the current policy, of bounded variance. With feedback "sampling"
    the entropy of a token is minus its log-prob as the engine reported it, and the weights are 1.

    Args:
        sequences: scored sequences of this replica.
        scores: their scores.
        feedback: name of the feedback.
        cap: `rollout.importance_cap`.
        measure: `entropy_control.measure`. responses: the sum of the responses' means, and their number. first_turn:
            only tokens before the first one that an environment wrote.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for sequence, logprobs, entropies in zip(sequences, scores.logprobs, scores.entropies, strict=True):
        values, weights = entropies.double(), torch.ones_like(entropies, dtype=torch.float64)
        if feedback == "sampling":
            assert sequence.rollout_logprobs is not None, "rollouts have log-probs"
            values = -sequence.rollout_logprobs.double()
        elif sequence.sampling_logprobs is not None:
            steps = (logprobs - sequence.sampling_logprobs).double().nan_to_num(nan=0.0)
            before = steps.cumsum(0) - steps
            weights = before.clamp(-math.log(cap), math.log(cap)).exp()
        if measure == "first_turn":
            values, weights = values[: sequence.first_turn_length], weights[: sequence.first_turn_length]
        measured = torch.stack([(weights * values).sum(), weights.sum()])
        total += measured / measured[1] if measure == "responses" else measured
    return total


class EntropyControl:
    """One rank's replica of the controller with the feedback that the configuration asks for.

    Args:
        config: the `entropy_control` section, enabled.
        feedback: "score_pass" (the latest scoring pass), "sampling" (the log-probs that the engines reported) or
            "previous_step" (the entropy measured during the previous optimizer step; the first step uses the scoring
            pass).
        parallel: this rank's place.
        device: device of the policy.
    """

    def __init__(
        self, config: EntropyControlConfig, feedback: str, parallel: ParallelState, device: torch.device
    ) -> None:
        assert feedback in ("score_pass", "previous_step", "sampling"), feedback
        self.controller = build_controller(config)
        self.measures_updates = feedback == "previous_step"
        self.steers_alpha = config.steers_alpha
        self._parallel = parallel
        self._device = device
        self._feedback: EntropyMeasurement | None = None

    def scored(self, measurement: EntropyMeasurement) -> None:
        """Take the result of a scoring pass."""
        if not self.measures_updates or self._feedback is None:
            self._feedback = measurement

    def steering_for_step(self) -> Steering:
        """Fix what the coming optimizer step does, after checking that every rank holds the same state.

        Raises:
            ValueError: nothing was measured yet, or what was measured is not finite.
            RuntimeError: the replicas differ; names the ranks.
        """
        if self._feedback is None:
            raise ValueError("entropy control has no measurement yet: score the batch before the first update")
        measured = {"entropy_sum": self._feedback.entropy_sum, "token_count": self._feedback.token_count}
        verify_equal(
            {**self.controller.state_dict(), **measured}, "entropy controller state", self._parallel, self._device
        )
        return self.controller.observe(self._feedback.entropy_sum, self._feedback.token_count)

    def commit(self, measurement: EntropyMeasurement | None, *, stepped: bool, has_advantage: bool) -> None:
        """Advance the controller after the optimizer step that it steered.

        `measurement` is the entropy of that step's own forward passes, None when it was not asked for. One that is not
        finite comes from the broken forward pass of a refused step; the measurement before it stays.
        """
        self.controller.commit(stepped=stepped, has_advantage=has_advantage)
        if self.measures_updates and measurement is not None and measurement.usable:
            self._feedback = measurement

    def updated(self, measurement: EntropyMeasurement) -> None:
        """Take the entropy of the step's own responses under the weights after it."""
        if measurement.usable:
            self.controller.measured_again(measurement.mean)

    def metrics(self) -> dict[str, float]:
        """Metrics of the controller, for the log."""
        return self.controller.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Controller and feedback, as JSON types; floats survive JSON exactly."""
        feedback = self._feedback
        return {
            "controller": self.controller.state_dict(),
            "feedback": None if feedback is None else [feedback.entropy_sum, feedback.token_count],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; the next alphas are those of a run that was not interrupted."""
        self.controller.load_state_dict(state["controller"])
        feedback = state["feedback"]
        self._feedback = None if feedback is None else EntropyMeasurement(*feedback)


class MicrobatchLocalControl:
    """Control of `feedback: microbatch_local`: the published code's alpha, per rank and micro-batch, never reduced.

    Only last stages know entropies, so only their controllers advance; tensor ranks of one replica stay equal.
    """

    def __init__(self, config: EntropyControlConfig) -> None:
        self.controller = MicrobatchLocalController.from_config(config)

    def alpha(self, entropies: torch.Tensor, n_sequences: int, minibatch_sequences: int) -> float:
        """Alpha of one micro-batch from its own tokens' entropies [T]."""
        return self.controller.step(float(entropies.double().mean()), n_sequences, minibatch_sequences)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state."""
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this rank's state."""
        self.controller.load_state_dict(state["controller"])


def build_control(
    config: Config, parallel: ParallelState, device: torch.device
) -> EntropyControl | MicrobatchLocalControl | None:
    """Build the control that a configuration asks for; None when the controller is off."""
    section = config.entropy_control
    if not section.enabled:
        return None
    if config.feedback == "microbatch_local":
        return MicrobatchLocalControl(section)
    return EntropyControl(section, config.feedback, parallel, device)


def collect_control_state(
    control: EntropyControl | MicrobatchLocalControl | None, parallel: ParallelState
) -> dict[str, Any]:
    """State that a checkpoint keeps, the same on every rank: one state, or one for each replica where they differ.

    Called by all ranks together.
    """
    if control is None:
        return {"kind": "off", "states": []}
    if isinstance(control, EntropyControl):
        return {"kind": control.controller.kind, "states": [control.state_dict()]}
    mine = (parallel.data_rank, control.state_dict()) if parallel.reports else None
    gathered: list[tuple[int, dict[str, Any]] | None] = [None] * parallel.world_size
    dist.all_gather_object(gathered, mine)
    by_replica = sorted((entry for entry in gathered if entry is not None), key=lambda entry: entry[0])
    return {"kind": "local", "states": [state for _, state in by_replica]}


def restore_control_state(
    control: EntropyControl | MicrobatchLocalControl | None, saved: Mapping[str, Any], parallel: ParallelState
) -> None:
    """Restore what `collect_control_state` returned.

    A control of another kind than the saved one starts fresh. With another number of replicas, local states are dealt
    in turn: the published code gives no rule, and each state is as good as another.
    """
    if isinstance(control, EntropyControl) and saved["kind"] == control.controller.kind:
        control.load_state_dict(saved["states"][0])
    if isinstance(control, MicrobatchLocalControl) and saved["kind"] == "local":
        control.load_state_dict(saved["states"][parallel.data_rank % len(saved["states"])])

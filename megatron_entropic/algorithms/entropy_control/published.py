"""The published code's controller, defects included, so that published runs can be reproduced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.controller import Setpoint, check_gains, check_state
from megatron_entropic.algorithms.entropy_control.proportional_integral import clipped_alpha
from megatron_entropic.config.names import controller_entry

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig


class MicrobatchLocalController:
    """The published code's arithmetic (yk7333/EntroPIC at 2470730c): a new alpha every micro-batch, nothing reduced.

        alpha = clip(K_p * (H_mb - target) + K_i * acc, -1, 1)            acc before this micro-batch
        acc  += (H_mb - target) * sequences of the micro-batch / sequences of this rank's mini-batch

    Alpha and acc differ between ranks, depend on how sequences are packed, and wind up while alpha is saturated;
    `EntropyController` has none of these defects. It is not a `Controller`: there is no global measurement to observe.

    Args:
        target: set point of the token-mean entropy, nats.
        kp: K_p, per nat.
        ki: K_i, per nat and optimizer step.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(self, target: float, kp: float, ki: float) -> None:
        check_gains(kp, ki)
        self.target = Setpoint.of(target).at(0, 0.0)
        self.kp, self.ki = float(kp), float(ki)
        self.entropy = 0.0
        self.alpha_unclipped = 0.0
        self.alpha = 0.0
        self.integral = 0.0
        self._count = 0

    @classmethod
    def from_config(cls, config: EntropyControlConfig) -> MicrobatchLocalController:
        """Build from the `entropy_control` section; its anti-windup, limit, leak and dead band do not apply here.

        Raises:
            ValueError: the controller is not p or pi, or its target is not a fixed number of nats.
        """
        if not controller_entry(config.controller).answers_error or config.fixed_target is None:
            raise ValueError("feedback microbatch_local exists for controllers p and pi with a fixed target in nats")
        return cls(config.fixed_target, config.kp, config.ki if config.controller == "pi" else 0.0)

    @property
    def microbatches(self) -> int:
        """Number of micro-batches seen; `step` in the state."""
        return self._count

    def step(self, entropy_mean: float, n_sequences: int, minibatch_sequences_of_rank: int) -> float:
        """Alpha of one micro-batch; the integral advances at once.

        Args:
            entropy_mean: token mean of the entropy over this micro-batch's response tokens, nats.
            n_sequences: sequences of this micro-batch.
            minibatch_sequences_of_rank: sequences of one optimizer step on this rank.

        Returns:
            alpha in [-1, 1].

        Raises:
            ValueError: the entropy is not finite.
        """
        assert 0 < n_sequences <= minibatch_sequences_of_rank
        if not math.isfinite(entropy_mean):
            raise ValueError(f"entropy control: measured entropy {entropy_mean}: the policy's logits are not finite")
        self.entropy = entropy_mean
        error = entropy_mean - self.target
        self.alpha_unclipped = self.kp * error + self.ki * self.integral
        self.alpha = clipped_alpha(self.alpha_unclipped)
        self.integral += error * n_sequences / minibatch_sequences_of_rank
        self._count += 1
        return self.alpha

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers: `acc` (sum of errors), `alpha`, `alpha_unclipped`, `H` and `step` (micro-batches seen)."""
        return {
            "acc": self.integral,
            "alpha": self.alpha,
            "alpha_unclipped": self.alpha_unclipped,
            "H": self.entropy,
            "step": self._count,
        }

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: keys are missing or unknown, or a value is not finite.
        """
        check_state(state, ("acc", "alpha", "alpha_unclipped", "H", "step"))
        self.integral = float(state["acc"])
        self.alpha = float(state["alpha"])
        self.alpha_unclipped = float(state["alpha_unclipped"])
        self.entropy = float(state["H"])
        self._count = int(state["step"])

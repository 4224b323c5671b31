"""Entropy controllers: from the measured entropy to the coefficient alpha of the EntroPIC term.

The law (EntroPIC, arXiv 2511.15248), for every controller in this file:

    e     = H - H_target                                    nats
    alpha = clip(K_p * e + K_i * sum of earlier e, -1, 1)

Too much entropy gives alpha > 0: high-probability tokens are pushed up whatever the sign of their advantage, so entropy
falls. Too little gives alpha < 0. A controller is a few Python floats; it sees numbers that were already summed over
ranks, so replicas that start equal stay equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_entropic.config import EntropyControlConfig

ALPHA_LIMIT = 1.0
"""|alpha| <= 1 keeps the weights 1 + alpha and 1 - alpha of the policy gradient non-negative."""


class _ControlLaw:
    """The law, its last inputs and outputs, and the state that a checkpoint carries.

    Attributes (0 before the first measurement; entropies, errors and the integral in nats):
        target, kp, ki: set point and gains.
        entropy, error: last measured H and its e.
        proportional_term, integral_term: the two summands of the last alpha.
        alpha_unclipped, alpha: their sum, before and after clipping.
        integral: sum of errors. Not multiplied by K_i, so a run resumed with another K_i rescales nothing.
    """

    def __init__(self, target: float, kp: float, ki: float) -> None:
        for name, value in (("target", target), ("kp", kp), ("ki", ki)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"entropy control: {name} must be a finite number >= 0, not {value}")
        self.target, self.kp, self.ki = float(target), float(kp), float(ki)
        self.entropy = 0.0
        self.error = 0.0
        self.proportional_term = 0.0
        self.integral_term = 0.0
        self.alpha_unclipped = 0.0
        self.alpha = 0.0
        self.integral = 0.0
        self._count = 0

    def _apply(self, entropy: float, error: float) -> float:
        """Apply the law to one measurement; the integral does not contain this error yet."""
        if not math.isfinite(entropy):
            raise ValueError(f"entropy control: measured entropy {entropy}: the policy's logits are not finite")
        self.entropy = entropy
        self.error = error
        self.proportional_term = self.kp * error
        self.integral_term = self.ki * self.integral
        self.alpha_unclipped = self.proportional_term + self.integral_term
        self.alpha = min(max(self.alpha_unclipped, -ALPHA_LIMIT), ALPHA_LIMIT)
        return self.alpha

    def metrics(self) -> dict[str, float]:
        """What a run logs each step. `entropy/integral` is the state now, `entropy/integral_term` what alpha used."""
        return {
            "entropy/mean": self.entropy,
            "entropy/target": self.target,
            "entropy/error": self.error,
            "entropy/proportional": self.proportional_term,
            "entropy/integral_term": self.integral_term,
            "entropy/alpha": self.alpha,
            "entropy/alpha_unclipped": self.alpha_unclipped,
            "entropy/integral": self.integral,
        }

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers: `acc` (sum of errors), `alpha`, `alpha_unclipped`, `H` and `step` (how often it advanced)."""
        return {
            "acc": self.integral,
            "alpha": self.alpha,
            "alpha_unclipped": self.alpha_unclipped,
            "H": self.entropy,
            "step": self._count,
        }

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Restore what `state_dict` returned; the next alphas are those of a controller that was never stopped.

        Raises:
            ValueError: keys are missing or unknown, or a value is not finite.
        """
        expected = self.state_dict().keys()
        if set(state) != set(expected):
            raise ValueError(f"entropy controller state needs exactly the keys {sorted(expected)}, not {sorted(state)}")
        if not all(math.isfinite(value) for value in state.values()):
            raise ValueError(f"entropy controller state holds a value that is not finite: {dict(state)}")
        self.integral = float(state["acc"])
        self.alpha = float(state["alpha"])
        self.alpha_unclipped = float(state["alpha_unclipped"])
        self.entropy = float(state["H"])
        self._count = int(state["step"])


class EntropyController(_ControlLaw):
    """One alpha per optimizer step from the global entropy; P with `ki` = 0, else PI.

    Each optimizer step calls `observe` before its first backward pass and `commit` after the optimizer ran. Between the
    two, alpha is fixed. The integral advances by e in `commit`, so the alpha of a step never contains that step's own
    error in its integral term.

    Args:
        target: set point of the token-mean entropy, nats.
        kp: K_p, per nat.
        ki: K_i, per nat and optimizer step.
        anti_windup: "conditional" (the integral stands still while |K_p e + K_i sum(e)| >= 1 and e would push it
            further out) or "none".
        integral_limit: bound of |sum of errors|, nats; None is no bound.
        integral_leak: fraction of the integral that is forgotten each time it advances.
        dead_band: an error with |e| < dead_band counts as 0, nats.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        target: float,
        kp: float,
        ki: float,
        *,
        anti_windup: str = "conditional",
        integral_limit: float | None = None,
        integral_leak: float = 0.0,
        dead_band: float = 0.0,
    ) -> None:
        super().__init__(target, kp, ki)
        if anti_windup not in ("conditional", "none"):
            raise ValueError(f"entropy control: anti_windup must be 'conditional' or 'none', not {anti_windup!r}")
        if integral_limit is not None and not integral_limit > 0:
            raise ValueError(f"entropy control: integral_limit must be > 0 or None, not {integral_limit}")
        if not 0 <= integral_leak < 1:
            raise ValueError(f"entropy control: integral_leak must be in [0, 1), not {integral_leak}")
        if not dead_band >= 0:
            raise ValueError(f"entropy control: dead_band must be >= 0, not {dead_band}")
        self.anti_windup = anti_windup
        self.integral_limit = integral_limit
        self.integral_leak = integral_leak
        self.dead_band = dead_band
        self._observed = False

    @classmethod
    def from_config(cls, config: EntropyControlConfig) -> EntropyController:
        """Build from the `entropy_control` section; controller `p` is `pi` with K_i = 0.

        Raises:
            ValueError: the controller is off.
        """
        if not config.enabled:
            raise ValueError("entropy_control.controller is off: there is no controller to build")
        return cls(
            config.target,
            config.kp,
            config.ki if config.controller == "pi" else 0.0,
            anti_windup=config.anti_windup,
            integral_limit=config.integral_limit,
            integral_leak=config.integral_leak,
            dead_band=config.dead_band,
        )

    @property
    def step(self) -> int:
        """Number of optimizer steps that were taken (skipped ones do not count)."""
        return self._count

    def observe(self, entropy_sum: float, token_count: float) -> float:
        """Fix alpha for the next optimizer step.

        Args:
            entropy_sum: sum of the token entropies over all response tokens of all ranks, nats.
            token_count: number of those tokens.

        Returns:
            alpha in [-1, 1].

        Raises:
            ValueError: there are no tokens, or the sum is not finite (the forward pass itself is broken).
        """
        if not token_count > 0:
            raise ValueError(f"entropy control: no response tokens to measure on (token count {token_count})")
        entropy = entropy_sum / token_count
        error = entropy - self.target
        alpha = self._apply(entropy, 0.0 if abs(error) < self.dead_band else error)
        self._observed = True
        return alpha

    def commit(self, *, stepped: bool, has_advantage: bool) -> None:
        """Advance the integral once, after the optimizer step that used the observed alpha.

        Args:
            stepped: the optimizer changed the weights; False when the step was skipped (non-finite gradient).
            has_advantage: some token had A != 0. Without one, alpha had nothing to act on and the error says nothing
                about the loop, so the integral stands still.
        """
        assert self._observed, "commit() without observe(): this optimizer step has no alpha"
        self._observed = False
        if not stepped:
            return
        self._count += 1
        if not has_advantage or self._winds_up():
            return
        integral = (1.0 - self.integral_leak) * self.integral + self.error
        if self.integral_limit is not None:
            integral = min(max(integral, -self.integral_limit), self.integral_limit)
        self.integral = integral

    def _winds_up(self) -> bool:
        """Whether alpha is saturated and this error would push the integral further beyond the limit.

        The bound this gives: while e > 0 the integral grows only if K_p e + K_i sum(e) < 1, so after it has grown
        K_i sum(e) < 1 + (K_i - K_p) e. With K_p >= K_i it stays below 1 however long alpha is saturated, and the first
        error of the other sign brings alpha off its limit. The same holds mirrored.
        """
        saturated = abs(self.alpha_unclipped) >= ALPHA_LIMIT
        return self.anti_windup == "conditional" and saturated and self.error * self.alpha_unclipped > 0


class MicrobatchLocalController(_ControlLaw):
    """The published code's arithmetic (yk7333/EntroPIC at 2470730c): a new alpha every micro-batch, nothing reduced.

        alpha = clip(K_p * (H_mb - target) + K_i * acc, -1, 1)            acc before this micro-batch
        acc  += (H_mb - target) * sequences of the micro-batch / sequences of this rank's mini-batch

    It exists to reproduce published runs. Alpha and acc differ between ranks, depend on how sequences are packed, and
    wind up while alpha is saturated; `EntropyController` has none of these defects.

    Args:
        target: set point of the token-mean entropy, nats.
        kp: K_p, per nat.
        ki: K_i, per nat and optimizer step.
    """

    @classmethod
    def from_config(cls, config: EntropyControlConfig) -> MicrobatchLocalController:
        """Build from the `entropy_control` section; its anti-windup, limit, leak and dead band do not apply here.

        Raises:
            ValueError: the controller is off.
        """
        if not config.enabled:
            raise ValueError("entropy_control.controller is off: there is no controller to build")
        return cls(config.target, config.kp, config.ki if config.controller == "pi" else 0.0)

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
        alpha = self._apply(entropy_mean, entropy_mean - self.target)
        self.integral += self.error * n_sequences / minibatch_sequences_of_rank
        self._count += 1
        return alpha

"""How a controller's sum of errors advances, and what keeps it from winding up while alpha is at its limit."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA_LIMIT = 1.0
"""|alpha| <= 1 keeps the weights 1 + alpha and 1 - alpha of the policy gradient non-negative."""


def clipped_alpha(alpha: float) -> float:
    """alpha within its limits."""
    return min(max(alpha, -ALPHA_LIMIT), ALPHA_LIMIT)


@dataclass(frozen=True, slots=True)
class IntegralRule:
    """What the sum of errors becomes after an optimizer step.

    Raises:
        ValueError: a setting is out of its range.
    """

    anti_windup: str = "conditional"
    """conditional: the integral stands still while |K_p e + K_i sum(e)| >= 1 and e would push it further out; clamp:
    |K_i sum(e)| stays within 1; or none."""
    limit: float | None = None
    """Bound of |sum of errors|, nats; None is no bound."""
    leak: float = 0.0
    """Fraction of the integral that is forgotten each time it advances."""

    def __post_init__(self) -> None:
        if self.anti_windup not in ("conditional", "clamp", "none"):
            raise ValueError(f"entropy control: anti_windup is conditional, clamp or none, not {self.anti_windup!r}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"entropy control: integral_limit must be > 0 or None, not {self.limit}")
        if not 0 <= self.leak < 1:
            raise ValueError(f"entropy control: integral_leak must be in [0, 1), not {self.leak}")

    def advanced(self, integral: float, error: float, *, alpha_unclipped: float, ki: float) -> float:
        """The sum of errors, nats, after a step with this error.

        Conditional integration has this bound: while e > 0 the integral grows only if K_p e + K_i sum(e) < 1, so after
        it has grown K_i sum(e) < 1 + (K_i - K_p) e. With K_p >= K_i it stays below 1 however long alpha is saturated,
        and the first error of the other sign brings alpha off its limit. The same holds mirrored.
        """
        saturated = abs(alpha_unclipped) >= ALPHA_LIMIT
        if self.anti_windup == "conditional" and saturated and error * alpha_unclipped > 0:
            return integral
        advanced = (1.0 - self.leak) * integral + error
        limit = self.limit
        if self.anti_windup == "clamp" and ki > 0:
            limit = min(ALPHA_LIMIT / ki, limit or ALPHA_LIMIT / ki)
        return advanced if limit is None else min(max(advanced, -limit), limit)

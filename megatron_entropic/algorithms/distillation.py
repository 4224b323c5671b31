"""Reverse KL towards a teacher as advantages of the sampled tokens."""

from __future__ import annotations

from torch import Tensor


def distilled(
    advantages: Tensor, logprobs: Tensor, teacher_logprobs: Tensor, *, coefficient: float, reward_weight: float
) -> Tensor:
    """Advantages of a response's tokens under rewards and a teacher.

        A_t = reward_weight A_t + coefficient (log pi_teacher(a_t) - log pi(a_t))

    With a_t sampled from pi, the policy gradient of the second summand is that of -coefficient KL(pi || pi_teacher) at
    each context that was reached; what a token does to later contexts is not counted. (Agarwal et al., arXiv
    2306.13649; as an advantage: Thinking Machines, "On-Policy Distillation", 2025.)

    Args:
        advantages: [R] from rewards.
        logprobs: [R] of the policy that is about to be updated.
        teacher_logprobs: [R] of the same tokens under the teacher, at the same temperature.
        coefficient: weight of the teacher.
        reward_weight: weight of the rewards.

    Raises:
        ValueError: shapes differ.
    """
    if not advantages.shape == logprobs.shape == teacher_logprobs.shape:
        shapes = (tuple(advantages.shape), tuple(logprobs.shape), tuple(teacher_logprobs.shape))
        raise ValueError(f"advantages {shapes[0]}, log-probs {shapes[1]}, the teacher's {shapes[2]}")
    return reward_weight * advantages + coefficient * (teacher_logprobs - logprobs).detach()

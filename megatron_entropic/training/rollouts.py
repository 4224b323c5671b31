"""The judged responses that a step trains on.

    prompts --> engines --> verifiers --> groups all alike? --> other prompts, at most rollout.max_resamples times

Verifiers judge a response soon after it is finished, while others are still being sampled: the phase `reward` is what
is then left to wait for.

Replacing groups whose responses are all right or all wrong is DAPO's dynamic sampling (arXiv 2503.14476): their
group-relative advantages are 0, so they would take part in the step without teaching anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.config.run import Config
from megatron_entropic.data import PromptDataset
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.training.lifecycle import StopRequest
from megatron_entropic.training.run_directory import RunDirectory
from megatron_entropic.training.step import on_arrival, prompt_groups
from megatron_entropic.types import Prompt, Sample


@dataclass
class JudgedRollouts:
    """Generates and judges, and counts what it did."""

    config: Config
    prompts: PromptDataset
    engines: EngineGroup
    scorer: RewardScorer
    run: RunDirectory
    stop: StopRequest
    _judged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Number of responses and metrics of each round."""

    def of_step(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The responses of a step, grouped by prompt, and reward/verifier_*, resampling/*.

        A function of (seed, step) and the weights, like everything else: replacements come from an order of their own.
        A replacement takes the place of the group it replaces. What is still all alike after the last round stays.
        """
        self._judged = []
        rollout = self.config.rollout
        asked = self.prompts.at_step(step, rollout.prompts_per_step)
        groups = self._answered(step, asked, first_place=0)
        rewards = [sample.verifier_reward for group in groups for sample in group]
        seen = {prompt.index for prompt in asked}
        rounds = replaced = 0
        while rounds < rollout.max_resamples and (alike := [i for i, group in enumerate(groups) if all_alike(group)]):
            fresh = self.prompts.replacements(step, rounds, len(alike), seen)
            if not fresh:
                break
            answered = self._answered(step, fresh, first_place=len(asked) + replaced)
            rounds, replaced = rounds + 1, replaced + len(fresh)
            seen |= {prompt.index for prompt in fresh}
            for place, group in zip(alike, answered, strict=False):
                groups[place] = group
                rewards += [sample.verifier_reward for sample in group]
        metrics = _merged(self._judged)
        if rollout.max_resamples:
            metrics |= {
                "resampling/rounds": float(rounds),
                "resampling/replaced_groups": float(replaced),
                "resampling/left_groups": float(sum(map(all_alike, groups))),
                "resampling/verifier_reward_mean": fmean(rewards),
            }
        return [sample for group in groups for sample in group], metrics

    def _answered(self, step: int, prompts: list[Prompt], *, first_place: int) -> list[list[Sample]]:
        """Generate and judge one round; places count on from round to round, so that no seed comes twice."""
        per_prompt = self.config.rollout.samples_per_prompt
        with self.scorer.scoring(len(prompts) * per_prompt) as scoring:
            arrived = on_arrival(self.prompts.tokenizer, scoring.add)
            with self.run.phase("generate"):
                samples = self.engines.generate(
                    prompts,
                    step,
                    first_place=first_place,
                    arrived=arrived,
                    while_waiting=self.stop.raise_if_asked,
                )
            with self.run.phase("reward"):
                self._judged.append((len(samples), scoring.finish()))
        return prompt_groups(samples, per_prompt)


def all_alike(group: list[Sample]) -> bool:
    """Whether the verifier said the same of every response it could judge; added rewards do not count."""
    return len({sample.verifier_reward for sample in group if sample.verifier_status == "ok"}) < 2


def _merged(rounds: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Counts of all rounds together, means over all their responses."""
    judged = sum(responses for responses, _ in rounds)
    return {
        name: sum(
            metrics[name] * (responses / judged if name.endswith("_mean") else 1) for responses, metrics in rounds
        )
        for name in rounds[0][1]
    }

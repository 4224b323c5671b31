"""Benchmarks answered by engines, for `megatron-entropic evaluate` and for the training loop.

    problems --> engines --> verifier --> NAME.parquet --> evaluation.json, table.md

The numbers are computed from the stored responses, so they can be computed again without a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_entropic.config.run import Config, DataConfig
from megatron_entropic.data import TaskDataset
from megatron_entropic.data.rows import content_digest
from megatron_entropic.data.tokenizer import template_digest, tokenizer_digest
from megatron_entropic.errors import UserError
from megatron_entropic.evaluation.generations import Generation, write_generations
from megatron_entropic.evaluation.store import generations_path, stored_settings, summarise_stored, write_summary
from megatron_entropic.evaluation.summary import BenchmarkSummary
from megatron_entropic.observability.settings_history import sampled_digest
from megatron_entropic.rewards import RewardScorer, build_reader, judge_trajectory
from megatron_entropic.types import Task, Trajectory, Verdict

if TYPE_CHECKING:  # what is read before a start needs no Ray
    from megatron_entropic.cluster.sampling import Sampler
    from megatron_entropic.training.run_directory import RunDirectory

# The settings of training data that hold for benchmarks too.
_FORM_KEYS = (
    "prompt_key",
    "answer_key",
    "system_prompt",
    "prompt_suffix",
    "apply_chat_template",
    "template_date",
    "max_prompt_tokens",
)

_SPEED_KEYS = {"workers", "reply_timeout_s"}
"""Keys of the section `environment` that no response depends on."""


class Evaluator:
    """The benchmarks of a configuration, read and tokenised."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        """Read every benchmark.

        Raises:
            UserError: listing every benchmark that cannot be used, with its rows. A problem that is too long or
                malformed is an error here whatever `data` says: the numbers would be those of another benchmark.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._read_answer = build_reader(config.reward.verifier, config.reward)
        self._benchmarks: dict[str, list[Task]] = {}
        refused = []
        self.problems: dict[str, list[str]] = {}
        """Texts of the problems, by benchmark."""
        form = {key: getattr(config.data, key) for key in _FORM_KEYS}
        for name, file in config.evaluation.benchmarks.items():
            data = DataConfig(train_files=[file], **form)
            try:
                dataset = TaskDataset(data, tokenizer, seed=0, other_columns=True)
                self._benchmarks[name], self.problems[name] = dataset.tasks, dataset.problems
            except ValueError as error:
                refused.append(f"benchmark {name}: {error}")
        if refused:
            raise UserError("\n".join(refused))

    def due(self, step: int) -> bool:
        """Whether the run is to be evaluated after this training step."""
        every = self._config.evaluation.every_steps
        return every > 0 and step % every == 0 and bool(self._benchmarks)

    def pending(self, directory: Path, model: dict[str, Any]) -> list[str]:
        """Names of the benchmarks whose responses are not in `directory` yet.

        Args:
            model: identity of the weights.

        Raises:
            UserError: the directory holds responses made with other settings; naming those.
        """
        missing, problems = [], []
        for name in self._benchmarks:
            present, wanted = stored_settings(directory, name), self._settings(name, model)
            if present is None:
                missing.append(name)
            elif present != wanted:
                problems.append(f"  - {name}: {', '.join(_changes(present, wanted))}")
        if problems:
            raise UserError(
                f"{directory} holds responses that were made with other settings; choose another directory, or remove "
                "the files of these benchmarks\n" + "\n".join(problems)
            )
        return missing

    def answer(
        self,
        name: str,
        sampler: Sampler,
        scorer: RewardScorer,
        directory: Path,
        model: dict[str, Any],
        count: Callable[[], None] = lambda: None,
    ) -> None:
        """Let the engines answer one benchmark, judge the responses as they come, and store them.

        Args:
            sampler: engines that answer.
            scorer: verifier that judges.
            directory: folder of the evaluation.
            model: identity of the weights.
            count: called once for each response that has come.
        """

        def take(position: int, trajectory: Trajectory) -> None:
            judge_trajectory(judging, position, trajectory)
            count()

        problems = self._benchmarks[name]
        with scorer.judging(len(problems) * self._config.evaluation.samples(name)) as judging:
            trajectories = sampler.answer_benchmark(name, problems, take)
            generations = list(map(self._generation, trajectories, judging.verdicts(warn=True)))
        write_generations(generations_path(directory, name), generations, self._settings(name, model))

    def summarise(self, directory: Path, label: str) -> list[BenchmarkSummary]:
        """Compute and write the numbers of the stored responses."""
        summaries = [summarise_stored(directory, name)[1] for name in self._benchmarks]
        write_summary(directory, label, summaries)
        return summaries

    def after_step(self, step: int, sampler: Sampler, scorer: RewardScorer, run: RunDirectory) -> dict[str, float]:
        """Evaluate the weights of a training step; returns evaluation/* for metrics.jsonl.

        What an earlier attempt of the run stored for this step is replaced.
        """
        directory = run.path / "evaluations" / f"step_{step:06d}"
        # Counted, as checkpoints are, into the time of the step that follows.
        with run.journal.phase("evaluate"):
            for name in self._benchmarks:
                self.answer(name, sampler, scorer, directory, {"step": step})
            summaries = self.summarise(directory, f"{self._config.run.name}, step {step}")
        return {key: value for summary in summaries for key, value in _metrics(summary)}

    def _generation(self, trajectory: Trajectory, verdict: Verdict) -> Generation:
        truth = trajectory.task.ground_truth
        return Generation(
            problem=trajectory.task.index,
            sample=trajectory.sample_index,
            prompt=trajectory.task.text,
            response=trajectory.text,
            answer=self._read_answer(trajectory.text),
            ground_truth=truth if isinstance(truth, str) else json.dumps(truth, sort_keys=True, default=str),
            reward=verdict.reward,
            verifier_status=verdict.status,
            response_tokens=trajectory.continuation.tolist(),
            logprob_sum=sum(trajectory.rollout_logprobs.tolist()),
            finish_reason=trajectory.finish_reason,
        )

    def _settings(self, name: str, model: dict[str, Any]) -> dict[str, Any]:
        """Everything that a benchmark's responses depend on."""
        config, data = self._config, self._config.data
        environment, stop = config.environment.section, config.rollout.stop
        return {
            # Only where there are some, so that evaluations of older versions of the package stay comparable.
            **(
                {} if environment is None else {"environment": environment.model_dump(mode="json", exclude=_SPEED_KEYS)}
            ),
            **({"stop": stop} if stop else {}),
            "model": model,
            "content_sha256": content_digest(config.evaluation.benchmarks[name]),
            "prompts_sha256": _prompts_digest(self._benchmarks[name]),
            "tokenizer_sha256": tokenizer_digest(self._tokenizer),
            "chat_template_sha256": template_digest(self._tokenizer) if data.apply_chat_template else None,
            "samples": config.evaluation.samples(name),
            "sampling": asdict(config.evaluation_sampling(name)),
            "seed": config.evaluation.seed,
            "dtype": config.model.dtype,
            "verifier": config.reward.verifier,
            "answer": config.reward.answer,
            "answer_pattern": config.reward.answer_pattern or None,
            "data": data.model_dump(mode="json", include=set(_FORM_KEYS)),
        }


def _prompts_digest(tasks: list[Task]) -> str:
    """SHA-256 over everything that the model reads and that its responses are judged by, whatever made it so."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps([task.index, task.tokens.tolist(), task.ground_truth], default=str).encode())
    return digest.hexdigest()


def _changes(present: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Differences between two settings, in words such as `data.prompt_suffix (was '', is 'Answer:')`."""
    changed = []
    for key in sorted(present | wanted):
        before, now = present.get(key), wanted.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict) and key != "model":
            changed += [
                f"{key}.{inner} (was {before.get(inner)!r}, is {now.get(inner)!r})"
                for inner in sorted(before | now)
                if before.get(inner) != now.get(inner)
            ]
        elif key not in present or key not in wanted:
            changed.append(f"{_WORDS.get(key, key)} (not recorded by another version of this program)")
        elif key in _WORDS:
            changed.append(_WORDS[key])
        else:
            changed.append(f"{key} (was {before!r}, is {now!r})")
    return changed


_WORDS = {
    "model": "the model's files",
    "content_sha256": "the content of the benchmark",
    "file_sha256": "the content of the benchmark",
    "prompts_sha256": "the prompts, as the model reads them",
    "tokenizer_sha256": "the tokenizer's files",
    "chat_template_sha256": "the chat template",
}


def model_identity(hf_dir: Path) -> dict[str, Any]:
    """Digest that tells the weights and settings of two Hugging Face directories apart, see `sampled_digest`.

    Tokenizer and chat template, which can come in other files, are told apart by `Evaluator._settings`.
    """
    return {"files_sha256": sampled_digest(sorted([*hf_dir.glob("*.safetensors"), *hf_dir.glob("*.json")]))}


def _metrics(summary: BenchmarkSummary) -> Iterator[tuple[str, float]]:
    prefix = f"evaluation/{summary.name}"
    yield f"{prefix}/avg", summary.average.value
    yield f"{prefix}/pass", summary.pass_at[summary.samples].value
    if summary.majority is not None:
        yield f"{prefix}/maj", summary.majority.value
    yield f"{prefix}/length_mean", summary.mean_tokens
    yield f"{prefix}/truncated_fraction", summary.truncated

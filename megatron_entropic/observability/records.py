"""A step's rollouts with everything the update was computed from: RUN/rollouts/step_NNNNNN.parquet.

One row a response, in the order of the training batch. `megatron-entropic rollouts` shows these files and
`megatron-entropic replay` computes their step again. The step's metrics are in the file's own metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropic.errors import UserError
from megatron_entropic.files.atomic import write_parquet
from megatron_entropic.files.formats import ROLLOUTS, NewerFormat
from megatron_entropic.files.jsonl import JsonLinesWriter
from megatron_entropic.types import NO_VERSION, Group, Origin, Reward, Scores, Segment, Task, TrainingBatch, Trajectory

ROLLOUTS_FOLDER = "rollouts"
_METADATA_KEY = b"megatron_entropic.rollouts"
_ROW_GROUP_TOKENS = 1 << 22
"""Tokens that are written together: about 130 MB before compression."""
_Written = tuple[Trajectory, Reward, int, int | None]
"""A context with its reward, its number within the attempt and the place of its sequence, None if it has none."""


@dataclass(frozen=True, slots=True)
class RecordedResponse:
    """One response of a step, R tokens that the policy wrote, with what the update was computed from."""

    trajectory: Trajectory
    """Task, tokens and text of the response, with the engine's log-probs."""
    reward: Reward
    advantages: np.ndarray
    """Advantages, [R] float32."""
    old_logprobs: np.ndarray
    """Log-probs of the policy before the step's first update, at the rollout temperature, [R] float32."""
    entropies: np.ndarray
    """Entropies of the same policy at the same temperature, in nats, [R] float32."""
    reference_logprobs: np.ndarray | None
    """Log-probs of the frozen reference, [R] float32; None without a KL penalty."""
    context: int = 0
    """Number of the context among those of its attempt; 0 for all but conversations whose context was replaced."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step, read back from its file."""

    step: int
    metrics: dict[str, Any]
    """Metrics of the step in metrics.jsonl, as far as they were known when the file was written."""
    responses: list[RecordedResponse]
    """Responses in the order of the training batch, context by context."""

    @property
    def trained(self) -> list[RecordedResponse]:
        """Those that the policy learned from, in the order of the batch's sequences."""
        return [response for response in self.responses if response.trajectory.response_length]

    def by_task(self) -> list[list[RecordedResponse]]:
        """Responses of each group. A task that comes twice in a row is two groups: its sample_index starts anew."""
        groups: list[list[RecordedResponse]] = []
        for response in self.responses:
            now, last = response.trajectory, groups[-1][-1].trajectory if groups else None
            follows = last is not None and (now.sample_index > last.sample_index or response.context > 0)
            if last and now.task.index == last.task.index and follows:
                groups[-1].append(response)
            else:
                groups.append([response])
        return groups

    def groups(self) -> list[Group]:
        """Groups that the step was trained on."""
        groups = []
        for of_one in self.by_task():
            attempts: list[tuple[list[Trajectory], Reward]] = []
            for response in of_one:
                if not response.context:
                    attempts.append(([], response.reward))
                attempts[-1][0].append(response.trajectory)
            whole = (replace(contexts[-1], earlier=tuple(contexts[:-1])) for contexts, _ in attempts)
            groups.append(Group(tuple(whole), tuple(reward for _, reward in attempts)))
        return groups


def rollouts_path(run_dir: Path, step: int) -> Path:
    """Path of the rollouts of a step."""
    return run_dir / ROLLOUTS_FOLDER / f"step_{step:06d}.parquet"


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps of a run whose rollouts are kept, ascending."""
    files = (run_dir / ROLLOUTS_FOLDER).glob("step_*.parquet")
    return sorted(int(number) for file in files if (number := file.stem.removeprefix("step_")).isdigit())


def write_rollouts(path: Path, step: int, batch: TrainingBatch, scores: Scores, metrics: Mapping[str, Any]) -> None:
    """Write a step's rollouts as a whole: the file appears when it is complete.

    Args:
        step: the step whose rollouts they are.
        batch: batch of the step, with advantages and reference log-probs.
        scores: scores of its sequences, before the first update.
        metrics: metrics of the step.
    """
    content = ROLLOUTS.stamp({"step": step, "metrics": dict(metrics)})
    metadata = {_METADATA_KEY: json.dumps(content).encode()}
    tables = (_table(rows, batch, scores).replace_schema_metadata(metadata) for rows in _row_groups(_rows(batch)))
    write_parquet(path, tables)


def _row_groups(rows: Iterable[_Written]) -> Iterator[list[_Written]]:
    """Yields rows with _ROW_GROUP_TOKENS tokens or a little more, so that a long rollout is never copied whole."""
    taken: list[_Written] = []
    tokens = 0
    for row in rows:
        taken.append(row)
        tokens += row[0].continuation_length
        if tokens >= _ROW_GROUP_TOKENS:
            yield taken
            taken, tokens = [], 0
    if taken:
        yield taken


def _table(rows: list[_Written], batch: TrainingBatch, scores: Scores) -> Any:
    """Table of some rows."""
    import pyarrow as pa

    trajectories, rewards, numbers, places = zip(*rows, strict=True)
    tasks = [trajectory.task for trajectory in trajectories]

    def learned(name: str) -> list[Any]:
        return [None if place is None else _array(getattr(batch.sequences[place], name)) for place in places]

    def scored(values: Sequence[Any]) -> list[Any]:
        return [[] if place is None else _array(values[place]) for place in places]

    return pa.table(
        {
            "prompt_index": pa.array([task.index for task in tasks], pa.int64()),
            "sample_index": pa.array([one.sample_index for one in trajectories], pa.int32()),
            "context": pa.array(numbers, pa.int32()),
            "prompt": pa.array([_storable(task.text) for task in tasks], pa.string()),
            "prompt_tokens": _lists([task.tokens for task in tasks], np.int32),
            "ground_truth": pa.array([_json(task.ground_truth) for task in tasks], pa.string()),
            "data_source": pa.array([task.data_source for task in tasks], pa.string()),
            "extra_info": pa.array([_json(task.extra_info) for task in tasks], pa.string()),
            "response": pa.array([_storable(one.text) for one in trajectories], pa.string()),
            "response_tokens": _lists([one.continuation for one in trajectories], np.int32),
            "finish_reason": pa.array([one.finish_reason for one in trajectories], pa.string()),
            "ending": pa.array([one.ending for one in trajectories], pa.string()),
            "weights_version": pa.array([one.weights_version for one in trajectories], pa.int64()),
            "segment_versions": _lists([[s.weights_version for s in one.segments] for one in trajectories], np.int64),
            "segment_tokens": _lists([[s.tokens.size for s in one.segments] for one in trajectories], np.int64),
            "reward": pa.array([reward.value for reward in rewards], pa.float64()),
            "verifier_reward": pa.array([reward.verifier for reward in rewards], pa.float64()),
            "verifier_status": pa.array([reward.status for reward in rewards], pa.string()),
            "rollout_logprobs": _lists([one.rollout_logprobs for one in trajectories], np.float32),
            "advantages": _lists([[] if values is None else values for values in learned("advantages")], np.float32),
            "old_logprobs": _lists(scored(scores.logprobs), np.float32),
            "entropies": _lists(scored(scores.entropies), np.float32),
            "reference_logprobs": _lists(learned("reference_logprobs"), np.float32),
            "sampling_logprobs": _lists(learned("sampling_logprobs"), np.float32),
        }
    )


def _rows(batch: TrainingBatch) -> Iterator[_Written]:
    """Yields each context of each attempt with its reward, its number, and the place of its sequence.

    An attempt in which the policy wrote nothing has one without a sequence: its reward counted for the others.
    """
    place = 0
    for group in batch.groups:
        for one, reward in zip(group.trajectories, group.rewards, strict=True):
            if not one.contexts:
                yield one, reward, 0, None
            for number, context in enumerate(one.contexts):
                yield context, reward, number, place
                place += 1


def read_rollouts(path: Path) -> RecordedStep:
    """Read one file back, responses in the order of the training batch.

    Raises:
        UserError: no such file, not one that `write_rollouts` wrote, or of a later version of the package.
    """
    import pyarrow.parquet

    with _reading(path):
        table = pyarrow.parquet.read_table(path)
        step, metrics = _content(table.schema, path)
        return RecordedStep(step, metrics, [_response(row) for row in table.to_pylist()])


def recorded_lengths(path: Path) -> tuple[list[int], list[int]]:
    """(tokens of the prompt, tokens of the response) of every response of a recorded step.

    Raises:
        UserError: no such file, not one that `write_rollouts` wrote, or of a later version of the package.
    """
    import pyarrow.compute
    import pyarrow.parquet

    with _reading(path):
        table = pyarrow.parquet.read_table(path)
        _content(table.schema, path)
        prompts, responses = (
            pyarrow.compute.list_value_length(table[name]).to_pylist() for name in ("prompt_tokens", "response_tokens")
        )
        return prompts, responses


def recorded_metrics(path: Path) -> dict[str, Any]:
    """Read the metrics of a recorded step, without its responses.

    Raises:
        UserError: as `read_rollouts`.
    """
    import pyarrow.parquet

    with _reading(path):
        return _content(pyarrow.parquet.read_schema(path), path)[1]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a file that is missing, damaged or foreign raises into one `UserError`."""
    import pyarrow

    try:
        yield
    except NewerFormat:
        raise
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the recorded rollouts of a step: {error}") from error


def _content(schema: Any, path: Path) -> tuple[int, dict[str, Any]]:
    """Step and metrics, read from a file's own metadata."""
    content = ROLLOUTS.read(json.loads((schema.metadata or {})[_METADATA_KEY]), path)
    return content["step"], dict(content["metrics"])


def _response(row: dict[str, Any]) -> RecordedResponse:
    trajectory_segments = _segments(row)
    count = sum(one.logprobs.size for one in trajectory_segments if one.origin is Origin.POLICY)
    lists = ("rollout_logprobs", "advantages", "old_logprobs", "entropies")
    if unequal := [name for name in lists if len(row[name]) != count]:
        raise UserError(f"a response of {count} tokens of the policy has other numbers of {', '.join(unequal)}")
    task = Task(
        index=row["prompt_index"],
        tokens=np.array(row["prompt_tokens"], np.int32),
        text=row["prompt"],
        ground_truth=json.loads(row["ground_truth"]),
        data_source=row["data_source"],
        extra_info=json.loads(row["extra_info"]),
    )
    reference = row["reference_logprobs"]
    return RecordedResponse(
        trajectory=Trajectory(
            *(task, row["sample_index"], trajectory_segments, row["finish_reason"], row["response"]),
            ending=row.get("ending", ""),
        ),
        reward=Reward(float(row["reward"]), float(row["verifier_reward"]), str(row["verifier_status"])),
        advantages=np.array(row["advantages"], np.float32),
        old_logprobs=np.array(row["old_logprobs"], np.float32),
        entropies=np.array(row["entropies"], np.float32),
        reference_logprobs=None if reference is None else np.array(reference, np.float32),
        context=row.get("context") or 0,
    )


def _segments(row: dict[str, Any]) -> tuple[Segment, ...]:
    """Segments of a response; one, where an older version of the package wrote the row."""
    tokens, logprobs = np.array(row["response_tokens"], np.int32), np.array(row["rollout_logprobs"], np.float32)
    sampling = row.get("sampling_logprobs")
    scored = None if sampling is None else np.array(sampling, np.float32)
    versions = row.get("segment_versions") or [row["weights_version"]]
    found, start, written = [], 0, 0
    for version, size in zip(versions, row.get("segment_tokens") or [tokens.size], strict=True):
        own, start = tokens[start : start + size], start + size
        if version == NO_VERSION:
            found.append(Segment.of_environment(own))
            continue
        piece, written = slice(written, written + size), written + size
        found.append(Segment(own, logprobs[piece], version, policy_logprobs=None if scored is None else scored[piece]))
    if start != tokens.size or written != logprobs.size:
        raise UserError(f"segments of {start} tokens, {written} of the policy, are not those of the response")
    return tuple(found)


def _lists(rows: Sequence[Iterable[Any] | None], dtype: type) -> Any:
    """A column of lists, without a Python object for each number; a row that is None is null."""
    import pyarrow as pa

    arrays: list[np.ndarray] = [np.empty(0, dtype) if row is None else np.asarray(row, dtype) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([array.size for array in arrays])])
    mask = np.array([row is None for row in rows], dtype=bool)
    values = pa.array(np.concatenate(arrays) if arrays else np.empty(0, dtype))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values, mask=pa.array(mask))


def _array(values: Any) -> np.ndarray | None:
    return None if values is None else values.detach().cpu().numpy()


def _storable(text: str) -> str:
    """The text with lone surrogates, as a broken response can have, as escapes: parquet holds UTF-8."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _json(value: Any) -> str:
    """JSON of a value; dates and the like, which a parquet row may hold, become strings."""
    return json.dumps(value, default=str)


# Some responses of each step in samples.jsonl, for people to read.

SAMPLES_FILE = "samples.jsonl"


class SampleLog:
    """Writes the first `samples_per_step` prompts' first responses of each step; 0 writes nothing."""

    def __init__(self, output_dir: Path, samples_per_step: int):
        self._samples_per_step = samples_per_step
        self._lines = JsonLinesWriter(output_dir / SAMPLES_FILE) if samples_per_step else None

    def truncate_after(self, step: int) -> None:
        """Forget every step after `step`, as `MetricsWriter.truncate_after` does."""
        if self._lines:
            self._lines.truncate_after(step)

    def write(self, step: int, batch: TrainingBatch) -> None:
        """Record one step. Different tasks are taken where there are enough of them."""
        if self._lines is None:
            return
        judged = zip(batch.trajectories, batch.rewards, strict=True)
        chosen = sorted(judged, key=lambda one: one[0].sample_index)[: self._samples_per_step]
        self._lines.append_all([_row(step, trajectory, reward) for trajectory, reward in chosen])

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()


def _row(step: int, trajectory: Trajectory, reward: Reward) -> dict[str, object]:
    return {
        "step": step,
        "prompt_index": trajectory.task.index,
        "sample_index": trajectory.sample_index,
        "weights_version": trajectory.weights_version,
        "prompt": trajectory.task.text,
        "response": trajectory.text,
        "response_tokens": trajectory.response_length,
        "reward": reward.value,
        "verifier_status": reward.status,
        "finish_reason": trajectory.finish_reason,
    }

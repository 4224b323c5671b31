"""A step's rollouts with everything the update was computed from: RUN/rollouts/step_NNNNNN.parquet.

One row a response, in the order of the training batch. `megatron-entropic rollouts` shows these files and
`megatron-entropic replay` computes their step again. The step's metrics are in the file's own metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropic.errors import UserError
from megatron_entropic.files.atomic import write_parquet
from megatron_entropic.files.formats import ROLLOUTS, NewerFormat
from megatron_entropic.files.jsonl import JsonLinesWriter
from megatron_entropic.types import Prompt, Sample, Scores
from megatron_entropic.types import Sequence as TokenSequence

ROLLOUTS_FOLDER = "rollouts"
_METADATA_KEY = b"megatron_entropic.rollouts"


@dataclass(frozen=True, slots=True)
class RecordedResponse:
    """One response of a step. R tokens."""

    sample: Sample
    """As it was judged: prompt, tokens, text, reward, verifier status, the engine's log-probs."""
    advantages: np.ndarray
    """[R] float32."""
    old_logprobs: np.ndarray
    """[R] float32, of the policy before the step's first update, at the rollout temperature."""
    entropies: np.ndarray
    """[R] float32, nats, of the same policy at the same temperature."""
    reference_logprobs: np.ndarray | None
    """[R] float32; None without a KL penalty."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step, read back."""

    step: int
    metrics: dict[str, Any]
    """What metrics.jsonl says of the step, as far as it was known when the file was written."""
    responses: list[RecordedResponse]


def rollouts_path(run_dir: Path, step: int) -> Path:
    """Where the rollouts of a step are kept."""
    return run_dir / ROLLOUTS_FOLDER / f"step_{step:06d}.parquet"


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps of a run whose rollouts are kept, ascending."""
    files = (run_dir / ROLLOUTS_FOLDER).glob("step_*.parquet")
    return sorted(int(number) for file in files if (number := file.stem.removeprefix("step_")).isdigit())


def write_rollouts(
    path: Path,
    step: int,
    samples: Sequence[Sample],
    batch: Sequence[TokenSequence],
    scores: Scores,
    metrics: Mapping[str, Any],
) -> None:
    """Write a step's rollouts as a whole: the file appears when it is complete.

    Args:
        samples: judged and decoded.
        batch: their sequences in the same order, with advantages and old log-probs.
        scores: of the same sequences, before the first update.
        metrics: of the step.
    """
    import pyarrow as pa

    prompts = [sample.prompt for sample in samples]
    columns = {
        "prompt_index": pa.array([prompt.index for prompt in prompts], pa.int64()),
        "sample_index": pa.array([sample.sample_index for sample in samples], pa.int32()),
        "prompt": pa.array([_storable(prompt.text) for prompt in prompts], pa.string()),
        "prompt_tokens": _lists([prompt.tokens for prompt in prompts], np.int32),
        "ground_truth": pa.array([_json(prompt.ground_truth) for prompt in prompts], pa.string()),
        "data_source": pa.array([prompt.data_source for prompt in prompts], pa.string()),
        "extra_info": pa.array([_json(prompt.extra_info) for prompt in prompts], pa.string()),
        "response": pa.array([_storable(sample.text) for sample in samples], pa.string()),
        "response_tokens": _lists([sample.response_tokens for sample in samples], np.int32),
        "finish_reason": pa.array([sample.finish_reason for sample in samples], pa.string()),
        "weights_version": pa.array([sample.weights_version for sample in samples], pa.int64()),
        "reward": pa.array([sample.reward for sample in samples], pa.float64()),
        "verifier_reward": pa.array([sample.verifier_reward for sample in samples], pa.float64()),
        "verifier_status": pa.array([sample.verifier_status for sample in samples], pa.string()),
        "rollout_logprobs": _lists([sample.rollout_logprobs for sample in samples], np.float32),
        "advantages": _lists([_array(sequence.advantages) for sequence in batch], np.float32),
        "old_logprobs": _lists([_array(values) for values in scores.logprobs], np.float32),
        "entropies": _lists([_array(values) for values in scores.entropies], np.float32),
        "reference_logprobs": _lists([_array(sequence.reference_logprobs) for sequence in batch], np.float32),
    }
    content = ROLLOUTS.stamp({"step": step, "metrics": dict(metrics)})
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(content).encode()})
    write_parquet(path, table)


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


def recorded_metrics(path: Path) -> dict[str, Any]:
    """The metrics of a recorded step, without its responses.

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
    """Step and metrics, from a file's own metadata."""
    content = ROLLOUTS.read(json.loads((schema.metadata or {})[_METADATA_KEY]), path)
    return content["step"], dict(content["metrics"])


def _response(row: dict[str, Any]) -> RecordedResponse:
    prompt = Prompt(
        index=row["prompt_index"],
        tokens=row["prompt_tokens"],
        text=row["prompt"],
        ground_truth=json.loads(row["ground_truth"]),
        data_source=row["data_source"],
        extra_info=json.loads(row["extra_info"]),
    )
    sample = Sample(
        prompt=prompt,
        sample_index=row["sample_index"],
        response_tokens=row["response_tokens"],
        rollout_logprobs=row["rollout_logprobs"],
        finish_reason=row["finish_reason"],
        weights_version=row["weights_version"],
        text=row["response"],
        reward=row["reward"],
        verifier_status=row["verifier_status"],
        verifier_reward=row["verifier_reward"],
    )
    reference = row["reference_logprobs"]
    count = len(sample.response_tokens)
    lists = ("rollout_logprobs", "advantages", "old_logprobs", "entropies")
    if unequal := [name for name in lists if len(row[name]) != count]:
        raise UserError(f"a response of {count} tokens has other numbers of {', '.join(unequal)}")
    return RecordedResponse(
        sample=sample,
        advantages=np.array(row["advantages"], np.float32),
        old_logprobs=np.array(row["old_logprobs"], np.float32),
        entropies=np.array(row["entropies"], np.float32),
        reference_logprobs=None if reference is None else np.array(reference, np.float32),
    )


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
    """A lone surrogate, as a broken response can have, becomes its escape: parquet holds UTF-8."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _json(value: Any) -> str:
    """Dates and the like, which a parquet row may hold, become strings."""
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

    def write(self, step: int, samples: list[Sample]) -> None:
        """Record one step. Different prompts are taken where there are enough of them."""
        if self._lines is None:
            return
        chosen = sorted(samples, key=lambda sample: sample.sample_index)[: self._samples_per_step]
        self._lines.append_all([_row(step, sample) for sample in chosen])

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()


def _row(step: int, sample: Sample) -> dict[str, object]:
    return {
        "step": step,
        "prompt_index": sample.prompt.index,
        "sample_index": sample.sample_index,
        "weights_version": sample.weights_version,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "response_tokens": len(sample.response_tokens),
        "reward": sample.reward,
        "verifier_status": sample.verifier_status,
        "finish_reason": sample.finish_reason,
    }

"""The stored responses of one benchmark: a parquet file that appears when it is complete.

One row a response. The settings it was made with are in the file's own metadata, so that a file can never be taken for
the answer to another question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError
from megatron_entropic.files.atomic import write_parquet
from megatron_entropic.files.formats import EVALUATION, NewerFormat

_SETTINGS_KEY = b"megatron_entropic.evaluation"


@dataclass(frozen=True, slots=True)
class Generation:
    """One judged response to one problem."""

    problem: int
    """Row of the problem in the benchmark's file."""
    sample: int
    """Number of the response among those to this problem, from 0."""
    prompt: str
    response: str
    answer: str | None
    """The verifier's reading of the response; None if it found no answer."""
    ground_truth: str
    """The problem's ground truth, as JSON where it is not a string."""
    reward: float
    """Reward of the verifier; 0 where it gave none, and `verifier_status` says why."""
    verifier_status: str
    """Outcome of the verifier: ok, timeout or error."""
    response_tokens: list[int]
    """Token ids, the end-of-sequence token included."""
    logprob_sum: float
    """Sum of the sampled tokens' log-probs under the distribution they were sampled from, nats."""
    finish_reason: str
    """Reason why generation ended: stop or length."""

    @property
    def correct(self) -> bool:
        """Whether the verifier gave a positive reward."""
        return self.reward > 0


def write_generations(path: Path, generations: Sequence[Generation], settings: dict[str, Any]) -> None:
    """Write all responses of a benchmark, durably and as a whole."""
    import pyarrow as pa

    types = {
        "problem": pa.int32(),
        "sample": pa.int32(),
        "reward": pa.float64(),
        "response_tokens": pa.list_(pa.int32()),
        "logprob_sum": pa.float64(),
    }
    schema = pa.schema(
        [(field.name, types.get(field.name, pa.string())) for field in fields(Generation)],
        metadata={_SETTINGS_KEY: json.dumps(EVALUATION.stamp(settings), sort_keys=True).encode()},
    )
    table = pa.Table.from_pylist([asdict(generation) for generation in generations], schema=schema)
    write_parquet(path, [table])


def read_generations(path: Path) -> tuple[list[Generation], dict[str, Any]]:
    """Read the responses, in the order of problem and sample, and the settings they were made with.

    Raises:
        UserError: not a file that `write_generations` wrote, or of a later version of the package.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # Its version before its columns, which may be other ones.
        settings = EVALUATION.read(json.loads((pyarrow.parquet.read_schema(path).metadata or {})[_SETTINGS_KEY]), path)
        generations = [Generation(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    except NewerFormat:
        raise
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the stored responses of an evaluation: {error}") from error
    return sorted(generations, key=lambda generation: (generation.problem, generation.sample)), settings

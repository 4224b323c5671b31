"""Recorded pass rates of problems, from the responses that `megatron-entropic evaluate` stored."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from megatron_entropic.errors import UserError

_COLUMNS = ["prompt", "reward"]


def read_pass_rates(file: Path) -> dict[str, float]:
    """Share of responses with a positive reward, by rendered prompt.

    Args:
        file: NAME.parquet of an evaluation whose benchmark was the training file.

    Raises:
        UserError: no such file, or not one of an evaluation.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(file, columns=_COLUMNS).to_pydict()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{file}: not the stored responses of an evaluation: {error}") from error
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for prompt, reward in zip(columns["prompt"], columns["reward"], strict=True):
        outcomes[prompt].append(reward > 0)
    return {prompt: fmean(solved) for prompt, solved in outcomes.items()}

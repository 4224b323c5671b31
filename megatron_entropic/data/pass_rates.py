"""Recorded pass rates of problems, from the responses that `megatron-entropic evaluate` stored."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_entropic.errors import UserError
from megatron_entropic.files.formats import EVALUATION, NewerFormat

_COLUMNS = ["prompt", "reward"]
_SETTINGS_KEY = b"megatron_entropic.evaluation"
_FORM_KEYS = ("system_prompt", "prompt_suffix", "apply_chat_template", "template_date")


def recorded_form(file: Path) -> dict[str, Any]:
    """How the prompts of an evaluation were made: `data` keys, and the SHA-256 of the chat template.

    Raises:
        UserError: no such file, not one of an evaluation, or of a later version of the package.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        settings = EVALUATION.read(json.loads((pyarrow.parquet.read_schema(file).metadata or {})[_SETTINGS_KEY]), file)
        data = settings["data"]
        form = {f"data.{key}": data[key] for key in _FORM_KEYS if key in data}
    except NewerFormat:
        raise
    except (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not the stored responses of an evaluation: {error}") from error
    return form | {"the chat template": settings.get("chat_template_sha256")}


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
    except (pyarrow.ArrowException, OSError, LookupError, ValueError) as error:
        raise UserError(f"{file}: not the stored responses of an evaluation: {error}") from error
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for prompt, reward in zip(columns["prompt"], columns["reward"], strict=True):
        outcomes[prompt].append(reward > 0)
    return {prompt: fmean(solved) for prompt, solved in outcomes.items()}

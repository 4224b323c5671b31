"""The model to plan for, from a config.json alone: a model directory, a file, or the published sizes shipped here."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError, reading
from megatron_entropic.models.dimensions import ModelDimensions, read_dimensions
from megatron_entropic.models.read_config import ExpertDimensions

KNOWN_MODELS = Path(__file__).parent / "model_configs"
"""One file for each model, NAME.json, with the dimensions of its published config.json."""


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a model and where they were found."""

    name: str
    dimensions: ModelDimensions
    source: str

    @property
    def experts(self) -> ExpertDimensions | None:
        """Of every layer that has some; None for a dense model."""
        return self.dimensions.experts

    @property
    def feed_forward_width(self) -> int:
        """Of a layer of a dense model, or of one expert."""
        return self.experts.ffn_hidden_size if self.experts else self.dimensions.ffn_hidden_size


def find_model(hf_dir: Path, model_config: Path | None = None) -> PlannedModel:
    """The model of a configuration.

    Args:
        hf_dir: `model.hf_dir`. If it holds a config.json, that one counts; if not, a known model whose name the
            directory's name begins with (Qwen3-8B-Base has the sizes of Qwen3-8B).
        model_config: a config.json to take instead.

    Raises:
        UserError: no such file, no known model of that name, or a model that cannot be planned for.
    """
    if model_config is not None:
        return read_model(model_config, model_config.stem if model_config.stem != "config" else hf_dir.name)
    if (hf_dir / "config.json").is_file():
        return read_model(hf_dir / "config.json", hf_dir.name)
    known = {path.stem: path for path in sorted(KNOWN_MODELS.glob("*.json"))}
    matches = [name for name in known if hf_dir.name.lower().startswith(name.lower())]
    if not matches:
        raise UserError(
            f"model.hf_dir={hf_dir}: no config.json in it, and {hf_dir.name!r} is not the name of a known model "
            f"({', '.join(known)}); give its config.json with --model-config"
        )
    return read_model(known[max(matches, key=len)], hf_dir.name)


def read_model(path: Path, name: str) -> PlannedModel:
    """The model that a config.json describes.

    Raises:
        UserError: not readable, or a model that cannot be planned for; all reasons in one message.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return PlannedModel(name, _dimensions(config, path), str(path))


def _dimensions(config: dict[str, Any], path: Path) -> ModelDimensions:
    """`read_dimensions` of a configuration that is not in a model directory of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "config.json"
        copy.write_text(json.dumps(config), encoding="utf-8")
        try:
            return read_dimensions(copy.parent)
        except ValueError as error:
            raise UserError(str(error).replace(str(copy), str(path))) from error

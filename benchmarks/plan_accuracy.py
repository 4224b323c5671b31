"""The plan beside published measurements: `python -m benchmarks.plan_accuracy`, some seconds.

`benchmarks/published/KIND.yaml` holds the measurements, each with its configuration and source; models that the planner
does not ship are in `benchmarks/published/models`. A ratio is predicted / published.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.markdown import markdown_table
from megatron_entropic.config.run import Config
from megatron_entropic.planning.generation import generation_time
from megatron_entropic.planning.hardware import Machine, machine
from megatron_entropic.planning.memory import GIB, rollout_memory, stage_memory
from megatron_entropic.planning.parameters import KNOWN_MODELS, ParameterTable, read_model
from megatron_entropic.planning.plan import publication, publication_time_s
from megatron_entropic.planning.roofline import score_time_s, switch_time_s, update_time_s
from megatron_entropic.planning.schedule import Lengths, make_schedule
from megatron_entropic.planning.step import PlannedStep

_STATE_BYTES = {"gradients": 4, "optimizer": 12}
FOLDER = Path(__file__).parent / "published"
KINDS = ("dense_training", "memory", "moe_training", "rl_step", "generation", "publication")


@dataclass(frozen=True)
class Measurement:
    """One published figure and the configuration that it is of."""

    row: str
    kind: str
    name: str
    unit: str
    published: float
    source: str
    config: Config
    table: ParameterTable
    lengths: Lengths
    machine: Machine
    """GPUs, with what the publication's programs do otherwise than this project's."""
    state_bytes: dict[str, float]
    """Bytes of each element of gradients and optimizer state, by kind of memory, where they are not this project's."""
    stage: int
    """Pipeline stage of a measurement of memory; -1: the last."""
    padded: bool
    """Whether every micro-batch is padded to the most tokens that it may have, as NeMo-RL does for pipelines."""
    held_out: bool
    """Whether the row was added after the constants were fixed: none was read off it or tuned on it."""
    outside: str
    """Why the prediction may be outside its kind's bound; empty: it may not."""


def measurements() -> Iterator[Measurement]:
    """Yields all published measurements, kind by kind."""
    for kind in KINDS:
        content = yaml.safe_load((FOLDER / f"{kind}.yaml").read_text(encoding="utf-8"))
        for row in content["rows"]:
            yield _measurement(kind, content["unit"], row)


def predicted(measurement: Measurement) -> float:
    """What the plan says of a measurement, in its unit."""
    schedule = make_schedule(measurement.config, measurement.lengths)
    if measurement.padded:
        schedule = replace(schedule, tokens=measurement.config.policy.tokens_per_microbatch)
    step = PlannedStep(measurement.config, measurement.table, schedule, measurement.machine.hardware)
    return _PREDICTIONS[measurement.kind](measurement, step)


def main() -> None:
    """Print the table of each kind as Markdown, and median and worst ratio of the kinds."""
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        rows = []
        for measurement in (m for m in measurements() if m.kind == kind):
            value = predicted(measurement)
            ratios[kind].append(value / measurement.published)
            rows.append(_cells(measurement, value))
        print(f"## {kind}\n\n{markdown_table(('row', 'configuration', 'published', 'plan', 'ratio'), rows)}\n")
    summary = ([kind, str(len(r)), f"{statistics.median(r):.2f}", f"{_worst(r):.2f}"] for kind, r in ratios.items())
    print(markdown_table(("kind", "rows", "median ratio", "worst ratio"), summary))


def _cells(measurement: Measurement, value: float) -> Sequence[str]:
    unit, published = measurement.unit, measurement.published
    note = " (*)" if measurement.outside else " (held out)" if measurement.held_out else ""
    return (
        measurement.row,
        measurement.name,
        f"{published:.4g} {unit}",
        f"{value:.4g} {unit}",
        f"{value / published:.2f}{note}",
    )


def _worst(ratios: Sequence[float]) -> float:
    """The ratio that is farthest from 1, up or down by a factor."""
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio))


def _measurement(kind: str, unit: str, row: dict[str, Any]) -> Measurement:
    sections: dict[str, Any] = {name: dict(values) for name, values in row["configuration"].items()}
    pretraining = kind not in ("rl_step", "generation")
    sections["model"] = {"hf_dir": row["model"]}
    sections["data"] = {"train_files": ["none"], "max_prompt_tokens": 1, **sections.get("data", {})}
    sections["cluster"] = {"device": "cuda", **sections.get("cluster", {})}
    # One response to each prompt, unless a row says otherwise; a pretraining sequence is a prompt of one token.
    sections["rollout"] = {"samples_per_prompt": 1, **sections["rollout"]}
    sections["policy"] = {"output_head": "logits" if pretraining else "auto", **sections.get("policy", {})}
    sections["entropy_control"] = {"controller": "off"}
    config, gpus = Config.model_validate(sections), machine(row.get("gpu"))
    lengths = Lengths(config.data.max_prompt_tokens, config.rollout.max_response_tokens, response_deviation=0)
    return Measurement(
        row=row["row"],
        kind=kind,
        name=row["name"],
        unit=unit,
        published=float(row["published"]),
        source=row["source"],
        config=config,
        table=_table(row["model"], row.get("layers")),
        lengths=Lengths(**row["lengths"]) if "lengths" in row else lengths,
        machine=replace(gpus, hardware=replace(gpus.hardware, **row.get("hardware", {}))),
        state_bytes=row.get("state_bytes", {}),
        stage=row.get("stage", 0),
        padded=row.get("padded", False),
        held_out=row.get("held_out", False),
        outside=row.get("outside", ""),
    )


@cache
def _table(model: str, layers: int | None) -> ParameterTable:
    """Parameters of a model, with another number of layers where a publication's stages are uneven."""
    own = FOLDER / "models" / f"{model}.json"
    path = own if own.is_file() else KNOWN_MODELS / f"{model}.json"
    if layers is None:
        return ParameterTable(read_model(path, model))
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "config.json"
        changed.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": layers}))
        return ParameterTable(read_model(changed, model))


def _update_s(measurement: Measurement, step: PlannedStep) -> float:
    return update_time_s(step)


def _memory_gb(measurement: Measurement, step: PlannedStep) -> float:
    memory = stage_memory(step, range(step.policy.pipeline_parallel)[measurement.stage])
    used = memory.total - memory.runtime
    for kind, item in measurement.state_bytes.items():
        used += getattr(memory, kind) * (item / _STATE_BYTES[kind] - 1)
    return used / 1e9


def _step_s(measurement: Measurement, step: PlannedStep) -> float:
    return (
        _generation_s(measurement, step)
        + score_time_s(step)
        + update_time_s(step)
        + _publication_s(measurement, step)
        + switch_time_s(step)
    )


def _generation_s(measurement: Measurement, step: PlannedStep) -> float:
    return generation_time(step, rollout_memory(step, int(measurement.machine.gpu_memory_gb * GIB))).total_s


def _publication_s(measurement: Measurement, step: PlannedStep) -> float:
    return publication_time_s(step, publication(step))


_PREDICTIONS: dict[str, Callable[[Measurement, PlannedStep], float]] = {
    "dense_training": _update_s,
    "moe_training": _update_s,
    "memory": _memory_gb,
    "rl_step": _step_s,
    "generation": _generation_s,
    "publication": _publication_s,
}


if __name__ == "__main__":
    sys.exit(main())

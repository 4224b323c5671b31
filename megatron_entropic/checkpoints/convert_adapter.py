"""Adapters on their way between a run's checkpoint, peft's directory, and the model they are merged into.

    CHECKPOINT (of a run with policy.lora) --megatron_to_peft--> ADAPTER_DIR --peft_to_hf, with the model--> HF_DIR

No model is built; one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_entropic.checkpoints.convert import UNTOLD, Progress
from megatron_entropic.checkpoints.hf import HfReader, write_hf_directory
from megatron_entropic.checkpoints.open_weights import MegatronCheckpoint, MegatronTensors
from megatron_entropic.checkpoints.peft_adapter import PeftAdapter, read_lora_settings, write_adapter
from megatron_entropic.checkpoints.run_checkpoints import read_state
from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.errors import Problems, UserError
from megatron_entropic.files.atomic import appears_when_complete, output_problems
from megatron_entropic.models.adapters import PEFT_PREFIX, adapted_matrices, adapter_map
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap


def peft_to_hf(hf_dir: Path, adapter_dir: Path, output_dir: Path, *, progress: Progress = UNTOLD) -> None:
    """Write a model with an adapter merged into its weights: W + alpha/rank B A in float32, rounded once.

    Args:
        hf_dir: Hugging Face directory of the model that the adapter is for; only read.
        adapter_dir: directory that peft or a run wrote.
        output_dir: directory that must not exist, or be empty.
        progress: is told how much is written.

    Raises:
        UserError: the adapter cannot be used or does not fit, or the output cannot be written; all reasons at once.
        OSError: the output could not be written.
    """
    reader, lora = HfReader(hf_dir), read_lora_settings(adapter_dir)
    adapter = PeftAdapter(adapter_dir, reader.parameter_map, lora)
    shapes = reader.parameter_map.hf_tensors
    total = sum(prod(shape) * reader.stored_dtype(name).itemsize for name, shape in shapes.items())
    _refuse(output_dir, total)
    progress.begin(total)
    write_hf_directory(output_dir, _merged(reader, adapter, lora, progress), hf_dir)


def _merged(
    reader: HfReader, adapter: PeftAdapter, lora: LoraConfig, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the model, those with adapters merged."""
    adapted = {f"{matrix.hf_module}.weight" for matrix in adapted_matrices(reader.parameter_map, lora)}
    for name in reader.names:
        tensor = reader[name]
        if name in adapted:
            module = PEFT_PREFIX + name.removesuffix(".weight")
            a, b = (adapter[f"{module}.lora_{letter}.weight"].float() for letter in "AB")
            tensor = (b @ a).mul_(lora.scale).add_(tensor).to(tensor.dtype)
        yield name, tensor
        progress.advance(tensor.nbytes)


def megatron_to_peft(checkpoint_dir: Path, hf_dir: Path, output_dir: Path) -> None:
    """Write the adapters of a run's checkpoint for peft.

    Args:
        checkpoint_dir: a complete checkpoint of a run with `policy.lora`; only read.
        hf_dir: Hugging Face directory of the model that the run began with, of which the configuration is read.
        output_dir: directory that must not exist, or be empty.

    Raises:
        UserError: it has no adapters, or they are not of that model; the output cannot be written.
        CheckpointError: not a complete checkpoint.
        OSError: the output could not be written.
    """
    shape = read_state(checkpoint_dir)["state"].get("lora")
    if shape is None:
        raise UserError(f"{checkpoint_dir}: a checkpoint of a run without policy.lora, which has no adapters")
    lora, parameter_map = LoraConfig(**shape), ParameterMap(read_dimensions(hf_dir))
    tensors = MegatronTensors(MegatronCheckpoint(checkpoint_dir, adapter_map(parameter_map, lora)))
    _refuse(output_dir, sum(prod(shape) * 4 for shape in tensors.parameter_map.hf_tensors.values()))
    with appears_when_complete(output_dir.absolute()) as directory:
        write_adapter(directory, tensors, parameter_map, lora, str(hf_dir))


def _refuse(output_dir: Path, total_bytes: int) -> None:
    problems = Problems()
    for problem in output_problems(output_dir, total_bytes):
        problems.add(problem)
    problems.raise_if_any("nothing was written:")

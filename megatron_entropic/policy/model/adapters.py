"""Low-rank adapters on this rank's linear layers, and the merged weights that leave the policy.

    cut along outputs    x --A (whole)--> h --copied to all ranks--> B (own rows) --> added to the layer's own rows
    cut along inputs     x (own columns) --A (own columns)--> h --summed over ranks--> B (whole) --> added to the sum

h has rank elements a token, so what tensor ranks tell each other is small. Under sequence parallelism h is gathered
or scattered by tokens as the layer's own input or output is, and the matrix that every rank holds whole sees this
rank's tokens only: its gradient is summed over tensor ranks with those of the norms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_entropic.checkpoints.peft_adapter import PeftAdapter
from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.models.adapters import AdaptedMatrix, adapted_matrices, adapter_map, adapter_name
from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.parameter_map import Entry, ParameterMap, to_global_name
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.megatron.wide_linear import wide_linear
from megatron_entropic.tensor_parallel.products import has_bfloat16_tiles


class LinearAdapter(torch.nn.Module):
    """The adapters of one linear layer: A and B of each of its Hugging Face matrices that has some.

    Args:
        matrices: those matrices, which share the layer's input.
        dimensions: the model.
        lora: the section `policy.lora`.
        weight: the layer's own weight on this rank, for dtype and device.
        state: this rank's place.

    Parameters are q_proj_a [rank, inputs], q_proj_b [outputs, rank] and so on, uninitialised (see `fill_adapters`).
    """

    def __init__(
        self,
        matrices: list[AdaptedMatrix],
        dimensions: ModelDimensions,
        lora: LoraConfig,
        weight: torch.Tensor,
        state: ParallelState,
    ) -> None:
        super().__init__()
        self._matrices = matrices
        self._dimensions = dimensions
        self._scale = lora.scale
        self._group: dist.ProcessGroup = state.tensor_group
        self._sequence_parallel = state.sequence_parallel
        self._inputs_cut = matrices[0].cut_along_inputs
        for matrix in matrices:
            rows, columns = matrix.shape
            columns //= state.tensor_size if self._inputs_cut else 1
            rows //= 1 if self._inputs_cut else state.tensor_size
            for letter, shape in (("a", (lora.rank, columns)), ("b", (rows, lora.rank))):
                value = torch.nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
                self.register_parameter(f"{matrix.module}_{letter}", value)
                cut = self._inputs_cut == (letter == "a")
                self._mark(value, cut=cut)

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add the adapters' part to the layer's output.

        Args:
            x: the layer's input, [T, 1, inputs], or this rank's part of the tokens or of the inputs, as the layer has.
            output: [T, 1, outputs], or this rank's part of the outputs or of the tokens.
        """
        from megatron.core import tensor_parallel

        hidden = _product(x, self._stacked_a()) * self._scale
        if self._inputs_cut and self._sequence_parallel:
            hidden = tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden, group=self._group)
        elif self._inputs_cut:
            hidden = tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=self._group)
        elif self._sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self._group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self._group)
        return _add_product(output, hidden, self._stacked_b())

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """This rank's part of alpha/rank B A in the layer's weight, of the weight's shape, float32."""
        return self._stacked_b().float() @ self._stacked_a().float() * self._scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """State for megatron's dist_checkpointing, readable in any layout."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        letter, axis = ("a", 1) if self._inputs_cut else ("b", 0)
        axes = {f"{matrix.module}_{letter}": axis for matrix in self._matrices}
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
        return sharded

    def _mark(self, parameter: torch.nn.Parameter, *, cut: bool) -> None:
        """Tell megatron-core which gradients it counts once in the norm, and which it sums over tensor ranks."""
        if cut:
            for name, value in {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}.items():
                setattr(parameter, name, value)
        else:
            setattr(parameter, "sequence_parallel", self._sequence_parallel)  # noqa: B010 (torch types no such mark)

    def _parts(self, letter: str) -> list[torch.Tensor]:
        return [self.get_parameter(f"{matrix.module}_{letter}") for matrix in self._matrices]

    def _stacked_a(self) -> torch.Tensor:
        """All A as one matrix, [matrices * rank, the layer's inputs]."""
        found = self._parts("a")
        return found[0] if len(found) == 1 else torch.cat(found)

    def _stacked_b(self) -> torch.Tensor:
        """All B as one matrix, [the layer's outputs, matrices * rank], each in its own rows and columns, else 0."""
        found = self._parts("b")
        base = self._matrices[0].base
        if len(base.hf_names) == 1:
            return found[0]
        rank, width = found[0].shape[1], len(found) * found[0].shape[1]
        ranks = self._matrices[0].shape[0] // found[0].shape[0]
        # Matrices of the layer that have no adapter.
        parts = [found[0].new_zeros(shape[0] // ranks, width) for shape in base.hf_shapes]
        for index, (matrix, b) in enumerate(zip(self._matrices, found, strict=True)):
            parts[matrix.part] = F.pad(b, (index * rank, width - (index + 1) * rank))
        return base.layout.combine(self._dimensions, parts)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if _is_wide(x):
        return wide_linear(x, weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None)
    return F.linear(x, weight)


def _add_product(output: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute output + hidden weight^T of [T, 1, outputs] and [T, 1, n]."""
    if _is_wide(hidden):
        return output + _product(hidden, weight)
    return torch.addmm(output.flatten(0, 1), hidden.flatten(0, 1), weight.t()).unflatten(0, output.shape[:2])


def _is_wide(x: torch.Tensor) -> bool:
    """Whether products are those of `wide_linear`, as the layers' own are."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_bfloat16_tiles()


def add_adapters(
    chunk: Any, parameter_map: ParameterMap, lora: LoraConfig, state: ParallelState, first_layer: int
) -> None:
    """Give a chunk of the model its adapters, uninitialised, and freeze everything else.

    Args:
        chunk: GPTModel of one chunk of this rank's stage.
        first_layer: global number of the chunk's layer 0.
    """
    chunk.requires_grad_(False)
    by_base: dict[str, list[AdaptedMatrix]] = {}
    for matrix in adapted_matrices(parameter_map, lora):
        by_base.setdefault(matrix.base.megatron_name, []).append(matrix)
    for name, _ in list(chunk.named_parameters()):
        matrices = by_base.get(to_global_name(name, first_layer))
        if matrices is None:
            continue
        linear = chunk.get_submodule(name.removesuffix(".weight"))
        adapter = LinearAdapter(matrices, parameter_map.dimensions, lora, linear.weight, state)
        parent, _, own_name = adapter_name(name).rpartition(".")
        chunk.get_submodule(parent).add_module(own_name, adapter)
        linear.register_forward_hook(partial(_add_to_output, adapter))
    if chunk.config.recompute_granularity is not None and chunk.pre_process:
        # What is computed again gets gradients only where an input of it has some, and nothing before the first adapter
        # would.
        chunk.embedding.register_forward_hook(_ask_for_gradient)


def _add_to_output(adapter: LinearAdapter, _linear: Any, inputs: tuple[torch.Tensor], outputs: tuple[Any, Any]) -> Any:
    output, bias = outputs
    return adapter(inputs[0], output), bias


def _ask_for_gradient(_embedding: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def named_adapters(
    model: torch.nn.ModuleList, num_layers: int, state: ParallelState
) -> Iterator[tuple[str, LinearAdapter]]:
    """Yields the adapters of this rank's layers with their names in the whole model, of `num_layers` layers."""
    stages = state.stage_sizes.of_layers(num_layers)
    for index, chunk in enumerate(model):
        first_layer = stages.of_chunk(state.pipeline_rank, index).start
        for name, module in chunk.named_modules():
            if isinstance(module, LinearAdapter):
                yield to_global_name(name, first_layer), module


def adapter_entries(
    model: torch.nn.ModuleList, adapters: ParameterMap, state: ParallelState
) -> Iterator[tuple[Entry, torch.nn.Parameter]]:
    """Yields this rank's matrices A and B with the rows of `adapter_map` for them."""
    for name, module in named_adapters(model, adapters.dimensions.num_layers, state):
        for own_name, parameter in module.named_parameters():
            yield adapters.by_megatron_name(f"{name}.{own_name}"), parameter


def fill_adapters(
    model: torch.nn.ModuleList, parameter_map: ParameterMap, lora: LoraConfig, state: ParallelState, seed: int
) -> None:
    """Fill A and B: from `lora.adapter_dir`, or A at random and B with 0, the same in every layout.

    Random values are those of peft's default, uniform in +-1/sqrt(inputs), from (seed, name of the matrix).

    Raises:
        UserError: the adapter does not fit, or holds NaN or infinite values.
    """
    adapters = adapter_map(parameter_map, lora)
    given = None if lora.adapter_dir is None else PeftAdapter(lora.adapter_dir, parameter_map, lora)
    with torch.no_grad():
        for entry, parameter in adapter_entries(model, adapters, state):
            (name,) = entry.hf_names
            if given is not None:
                whole = given[name]
            elif name.endswith(".lora_A.weight"):
                whole = _random_matrix(entry.shape, seed, name)
            else:
                whole = torch.zeros(entry.shape)
            parameter.copy_(adapters.to_megatron_shard(entry, {name: whole}, state.tensor_rank, state.tensor_size))


def _random_matrix(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=generator)


class MergedValues(Mapping[str, torch.Tensor]):
    """This rank's shards by global Megatron name, those with adapters as W + alpha/rank B A.

    The sum is taken in float32 when a shard is asked for, and rounded once to W's dtype; nothing is kept.
    """

    def __init__(self, values: dict[str, torch.Tensor], adapters: dict[str, LinearAdapter]) -> None:
        self._values = values
        self._adapters = adapters

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, adapter = self._values[name], self._adapters.get(adapter_name(name))
        if adapter is None:
            return weight
        return adapter.delta().add_(weight.detach()).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

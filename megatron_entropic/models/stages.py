"""Which layers of a model are on which pipeline stage.

    94 layers on 8 stages, 11 on the first and on the last:  11 | 12 | 12 | 12 | 12 | 12 | 12 | 11

As in megatron-core: stages have equal runs of layers, but the first and the last can have numbers of their own, and the
others share the rest. With several chunks a stage has several runs, equally long, and stages take them in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.errors import UserError


@dataclass(frozen=True)
class StageSizes:
    """What a layout says of pipeline stages, whatever the model."""

    stages: int = 1
    chunks: int = 1
    first_layers: int | None = None
    """Number of layers of the first stage; None: as many as the others."""
    last_layers: int | None = None
    """Number of layers of the last stage; None: as many as the others."""

    @staticmethod
    def of(policy: PolicyConfig) -> StageSizes:
        """The sizes of a configured layout."""
        return StageSizes(
            policy.pipeline_parallel,
            policy.virtual_pipeline_parallel,
            policy.first_stage_layers,
            policy.last_stage_layers,
        )

    def problems(self, layers: int) -> list[str]:
        """Reasons why `layers` layers cannot be shared out, each beginning with a key of `policy`."""
        named = self._named()
        if not named:
            return self._even_problems(layers)
        ends = " and ".join(f"{key}={count}" for key, count in named.items())
        if self.stages == 1:
            return [f"{ends} needs pipeline_parallel > 1: one stage has all layers"]
        rest, others = layers - sum(named.values()), self.stages - len(named)
        if rest < others * self.chunks or (others == 0 and rest):
            return [f"{ends} of {layers} layers leave {rest} for the other {others} stages of pipeline_parallel"]
        if self.chunks > 1 and others == 0:
            # megatron-core divides by the number of stages between.
            return [f"virtual_pipeline_parallel={self.chunks} with {ends} needs a stage between the first and the last"]
        if others and rest % (others * self.chunks):
            across = f"{others} stages" + (f" x {self.chunks} chunks" if self.chunks > 1 else "")
            return [f"{ends} of {layers} layers leave {rest}, which pipeline_parallel's other {across} cannot share"]
        return [
            f"virtual_pipeline_parallel={self.chunks} does not divide {key}={count}"
            for key, count in named.items()
            if count % self.chunks
        ]

    def of_layers(self, layers: int) -> PipelineStages:
        """The layers of every stage of a model with `layers` layers.

        Raises:
            UserError: they cannot be shared out.
        """
        if problems := self.problems(layers):
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise UserError(f"this model cannot be laid out as asked:\n{listed}")
        named = self._named()
        others = self.stages - len(named)
        each = (layers - sum(named.values())) // others if others else 0
        middle = [each] * (self.stages - 2)
        first = each if self.first_layers is None else self.first_layers
        last = each if self.last_layers is None else self.last_layers
        return PipelineStages((first,) if self.stages == 1 else (first, *middle, last), self.chunks)

    def _named(self) -> dict[str, int]:
        """Numbers of layers of stages that have one of their own, by the key of `policy` that gives it."""
        ends = {"first_stage_layers": self.first_layers, "last_stage_layers": self.last_layers}
        return {key: count for key, count in ends.items() if count is not None}

    def _even_problems(self, layers: int) -> list[str]:
        if layers % self.stages:
            return [
                f"pipeline_parallel={self.stages} does not divide the {layers} layers: give the first or the last "
                "stage a number of its own with first_stage_layers, last_stage_layers"
            ]
        if layers % (self.stages * self.chunks):
            return [
                f"virtual_pipeline_parallel={self.chunks} x pipeline_parallel={self.stages} does not divide the "
                f"{layers} layers"
            ]
        return []


@dataclass(frozen=True)
class PipelineStages:
    """Layers of every stage of one model."""

    layers: tuple[int, ...]
    """Number of layers of each stage."""
    chunks: int
    """Number of equal runs in which each stage has its layers."""

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self.layers)

    def of_chunk(self, stage: int, chunk: int = 0) -> range:
        """Global numbers of the layers of a stage's chunk."""
        runs = [layers // self.chunks for layers in self.layers]
        first = chunk * sum(runs) + sum(runs[:stage])
        return range(first, first + runs[stage])

    def of_stage(self, stage: int) -> list[int]:
        """Global numbers of a stage's layers, chunk by chunk."""
        return [layer for chunk in range(self.chunks) for layer in self.of_chunk(stage, chunk)]

    def place(self, layer: int) -> tuple[int, int]:
        """(stage, chunk) of a layer's global number."""
        runs = [layers // self.chunks for layers in self.layers]
        chunk, within = divmod(layer, sum(runs))
        for stage, run in enumerate(runs):
            if within < run:
                return stage, chunk
            within -= run
        raise AssertionError(f"layer {layer} is behind the last stage")

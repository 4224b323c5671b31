"""The section `policy`: how the megatron-core policy is laid out over ranks, and what its passes keep and share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from megatron_entropic.config.base import Count, Ranks, Seconds, Section, off_is_a_word

OffloadPart = Literal["optimizer", "gradients", "parameters"]
"""Part of a policy rank's memory. optimizer: Adam's moments and float32 main parameters that are not the parameters."""
OFFLOAD_PARTS: tuple[OffloadPart, ...] = get_args(OffloadPart)

AdaptedModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Linear layer of a decoder layer that can have an adapter, as Hugging Face and peft call it."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): weights W stay as they are, and W + alpha/rank B A is used."""

    rank: Count = Field(
        0,
        ge=0,
        le=65536,
        description="Rows of A and columns of B, which are trained in the place of the weights; 0 trains the weights.",
    )
    alpha: float = Field(32.0, gt=0, description="B A is multiplied by alpha / rank.")
    target_modules: list[AdaptedModule] = Field(
        list(get_args(AdaptedModule)),
        min_length=1,
        description="Linear layers that get adapters, each its own A and B, in all decoder layers.",
    )
    adapter_dir: Path | None = Field(
        None,
        description="Directory of a peft adapter (adapter_config.json, adapter_model.safetensors) to begin with, of "
        "the same rank, alpha and target_modules. None: A is random, B is 0. The KL penalty's reference is the policy "
        "with the adapters it began with.",
    )

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained, and the weights are not."""
        return self.rank > 0

    @property
    def shape(self) -> dict[str, Any] | None:
        """What the adapters of a checkpoint must agree with, as JSON; None without adapters."""
        return self.model_dump(mode="json", exclude={"adapter_dir"}) if self.enabled else None

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


class PolicyConfig(Section):
    """How the megatron-core policy is laid out over ranks and micro-batches."""

    tensor_parallel: Ranks = 1
    pipeline_parallel: Ranks = 1
    virtual_pipeline_parallel: Ranks = Field(
        1,
        description="Chunks of layers on each stage (interleaved 1F1B): a smaller bubble, more traffic.",
    )
    first_stage_layers: Annotated[Count, Field(ge=1)] | None = Field(
        None,
        description="Layers of the first pipeline stage, for numbers of layers that pipeline_parallel does not divide; "
        "the stages without a number of their own share the rest. None: as many as the others.",
    )
    last_stage_layers: Annotated[Count, Field(ge=1)] | None = Field(
        None, description="Layers of the last pipeline stage, which has the output layer besides. None: as the others."
    )
    data_parallel: Ranks = 1
    context_parallel: Ranks = Field(
        1,
        description="Ranks that share each sequence's tokens; tokens_per_microbatch counts those of all of them.",
    )
    expert_parallel: Ranks = Field(
        1, description="Ranks that share out the experts of a layer; taken from data and context parallelism."
    )
    expert_tensor_parallel: Ranks | None = Field(
        None, description="Tensor parallel size of experts. None: tensor_parallel."
    )
    moe_aux_loss_coefficient: float = Field(
        0.0, ge=0, description="Weight of the load-balancing loss of layers with experts; 0 switches it off."
    )
    moe_dispatcher: Literal["alltoall", "deepep", "hybridep"] = Field(
        "alltoall",
        description="What brings tokens to their experts. alltoall: a copy for each expert. deepep, hybridep: DeepEP's "
        "kernels, on GPUs; a token goes once to each node that needs it. They need the package deep_ep.",
    )
    moe_router_replay: Annotated[Literal["off", "score"], BeforeValidator(off_is_a_word)] = Field(
        "off",
        description="score: updates send each token to the experts that the score pass chose, so that the ratio of new "
        "and old probability is one of weights, not of routes.",
    )
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Dtype in which gradients are added up over micro-batches and ranks. bfloat16 halves their memory "
        "and traffic and rounds each sum to 8 bits; with model.dtype=bfloat16 only.",
    )
    tokens_per_microbatch: Count = Field(
        16384, ge=1, description="Packed tokens of one forward; a longer sequence goes alone."
    )
    prefix_sharing: Annotated[Literal["auto", "off"], BeforeValidator(off_is_a_word)] = Field(
        "auto",
        description="auto: on a CPU a prompt is computed once for all its responses in a micro-batch, but not with "
        "context parallelism or experts. off: once for each response.",
    )
    output_head: Literal["auto", "logits", "recompute", "fused_loss"] = Field(
        "auto",
        description="How the last stage turns hidden states into log-probs. logits: stores its vocabulary shard of "
        "logits. recompute: stores none, computes them twice. fused_loss: stores none, takes the gradient in the "
        "forward pass. auto: fused_loss if each token's loss is known before the forward pass, else recompute.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="What backward computes again instead of keeping it. full: every layer. selective: with "
        "Transformer Engine's layers the feed-forward part or the experts, with others attention.",
    )
    offload: Annotated[Literal["off", "optimizer", "all"], BeforeValidator(off_is_a_word)] = Field(
        "off",
        description="What leaves the policy's devices for host memory while engines generate. optimizer: Adam's "
        "moments and float32 main parameters. all: gradient buffers and parameters too.",
    )
    fp8: Annotated[Literal["off", "e4m3", "hybrid"], BeforeValidator(off_is_a_word)] = Field(
        "off",
        description="Transformer Engine's 8-bit products in the layers, on GPUs that have them; the output layer stays "
        "in model.dtype. hybrid: e4m3 forward, e5m2 for gradients.",
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = Field(
        "tensorwise", description="How values are scaled into 8 bits; mxfp8 needs Blackwell."
    )
    lora: LoraConfig = LoraConfig()
    distributed_timeout_s: Seconds = Field(600.0, description="Limit of every collective between policy ranks.")

    @property
    def without_adapters(self) -> PolicyConfig:
        """The same layout of a model without adapters, such as a frozen one."""
        return self.model_copy(update={"lora": LoraConfig()})

    @property
    def offloaded_parts(self) -> tuple[OffloadPart, ...]:
        """Parts of a rank's memory that policy.offload names."""
        parts: dict[str, tuple[OffloadPart, ...]] = {"off": (), "optimizer": ("optimizer",), "all": OFFLOAD_PARTS}
        return parts[self.offload]

    @property
    def token_alignment(self) -> int:
        """Divisor of the number of tokens of a product: 8-bit products want whole blocks of 16, or of 32 for mxfp8."""
        if self.fp8 == "off":
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def world_size(self) -> int:
        """Number of policy ranks."""
        return self.stage_ranks * self.pipeline_parallel

    @property
    def stage_ranks(self) -> int:
        """Number of ranks of each pipeline stage."""
        return self.tensor_parallel * self.context_parallel * self.data_parallel

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallel size of experts: policy.expert_tensor_parallel with None resolved."""
        return self.expert_tensor_parallel or self.tensor_parallel

    @property
    def expert_replicas(self) -> int:
        """Number of ranks that hold the same expert parameters."""
        return max(1, self.stage_ranks // (self.expert_tensor_size * self.expert_parallel))

"""This rank's part of the policy: a real megatron-core GPTModel whose last stage returns token statistics, not logits.

    tokens [1, T] -> embedding -> layers -> final norm -> hidden [T, 1, H]       [T/tp, 1, H] with sequence parallelism
    hidden -> `output_head`: rows that predict response tokens, output layer, statistics [R]

Full-vocabulary logits exist on no rank, and logits of prompt and padding positions on none at all.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import Dtype
from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.megatron.platform import Platform
from megatron_entropic.policy.megatron.rotary import scale_frequencies
from megatron_entropic.policy.model.adapters import add_adapters
from megatron_entropic.policy.model.attention import (
    SegmentedAttention,
    packed_segments,
    use_own_attention,
    use_plain_layers,
)
from megatron_entropic.policy.model.norm import RMSNorm
from megatron_entropic.policy.model.output_head import OutputHead
from megatron_entropic.policy.model.outputs import Output, OutputOptions
from megatron_entropic.policy.model.router import PolicyRouter
from megatron_entropic.policy.model.router_replay import check_hook, take_choices
from megatron_entropic.policy.model.transformer_config import build_transformer_config


class PolicyModel(GPTModel):
    """One chunk of a pipeline stage of the policy. `forward(micro_batch=..., options=...)` is its only use."""

    def __init__(self, dimensions: ModelDimensions, config: Any, spec: Any, state: ParallelState, chunk: int) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=dimensions.padded_vocab_size(state.tensor_size),
            max_sequence_length=dimensions.max_position_embeddings,
            pre_process=state.is_first_stage and chunk == 0,
            post_process=state.is_last_stage and chunk == state.virtual_size - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=dimensions.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=dimensions.rope_theta,
            vp_stage=chunk if state.virtual_size > 1 else None,
        )
        # Latent attention has an embedding of its own in every layer.
        if dimensions.rope_scaling is not None and dimensions.latent is None:
            scale_frequencies(self.rotary_pos_emb, dimensions.rope_scaling)
        if self.post_process:
            self._output_head = OutputHead(
                self.output_layer,
                self.pg_collection.tp,
                dimensions.vocab_size,
                config.sequence_parallel,
                self.pg_collection.cp if config.context_parallel_size > 1 else None,
            )

    def forward(self, micro_batch: MicroBatch, options: OutputOptions) -> torch.Tensor | Output:
        """Run this chunk.

        Returns:
            Hidden states for the next chunk, or from the last (log-probs [R] float32, entropies [R] float32 or
            None, loss or None), equal on all tensor and context parallel ranks.
        """
        return self._run(
            micro_batch, output_processor=self._statistics, output_processor_context=(micro_batch, options)
        )

    def _run(self, micro_batch: MicroBatch, **hook: Any) -> torch.Tensor | Output:
        output: torch.Tensor | Output = super().forward(
            input_ids=micro_batch.tokens,
            position_ids=micro_batch.position_ids,
            attention_mask=None,
            packed_seq_params=packed_segments(micro_batch),
            **hook,
        )
        return output

    def _statistics(
        self, *, hidden_states: torch.Tensor, context: tuple[MicroBatch, OutputOptions], **_unused: Any
    ) -> Output:
        """Compute the last stage's statistics, in place of GPTModel's logits over all T positions."""
        # Two of three heads read the output layer's weight without calling the layer. megatron-core waits for the
        # gather of a weight that the optimizer has stepped in a hook of the call (`overlap_param_gather`), and without
        # it nobody would wait: the second step dies of an assertion, or trains and publishes the weights of before.
        for wait_for_weight in self.output_layer._forward_pre_hooks.values():
            wait_for_weight(self.output_layer, ())
        return self._output_head.run(hidden_states, self.output_weight(), *context)

    def output_weight(self) -> torch.Tensor:
        """Weight of the output layer on a last stage, the embedding's where they are tied, [V/tp, H]."""
        tied = self.share_embeddings_and_output_weights
        weight: torch.Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight


class PolicyModelWithoutHook(PolicyModel):
    """Policy model for megatron-core before 0.18, whose GPTModel takes no `output_processor`."""

    def forward(self, micro_batch: MicroBatch, options: OutputOptions) -> torch.Tensor | Output:
        """Run this chunk, as `PolicyModel.forward` does."""
        # GPTModel hands `labels` to `_postprocess` and looks at it nowhere else.
        return self._run(micro_batch, labels=(micro_batch, options))

    def _postprocess(
        self, hidden_states: torch.Tensor, labels: tuple[MicroBatch, OutputOptions], **_unused: Any
    ) -> torch.Tensor | Output:
        if not self.post_process:
            return hidden_states
        return self._statistics(hidden_states=hidden_states, context=labels)


def build_model(
    dimensions: ModelDimensions, policy: PolicyConfig, dtype: Dtype, state: ParallelState, platform: Platform
) -> torch.nn.ModuleList:
    """Build the chunks of this rank's stage, one without virtual pipeline parallelism, on the platform's device.

    Parameters are uninitialised (see `load`), those of adapters too (`adapters.fill_adapters`).

    Raises:
        UserError: the layout does not divide the model, or megatron-core lacks what is asked for.
    """
    config = build_transformer_config(dimensions, policy, dtype, state, platform)
    build_spec = _transformer_engine_spec if platform.transformer_engine else _plain_spec
    has_hook = "output_processor" in inspect.signature(GPTModel.forward).parameters
    model_class = PolicyModel if has_hook else PolicyModelWithoutHook
    chunks = []
    parameter_map = ParameterMap(dimensions) if policy.lora.enabled else None
    for chunk in range(state.virtual_size):
        layers = _layers_of_chunk(dimensions, state, chunk)
        spec = build_spec(config, [dimensions.has_experts(layer) for layer in layers])
        if parameter_map is not None and platform.transformer_engine:
            _take_norms_out(spec)
        chunks.append(model_class(dimensions, config, spec, state, chunk))
        if policy.moe_router_replay != "off":
            _enable_replay(chunks[-1])
        if parameter_map is not None:
            add_adapters(chunks[-1], parameter_map, policy.lora, state, layers.start)
    return torch.nn.ModuleList(chunks).to(platform.device)


def _enable_replay(chunk: PolicyModel) -> None:
    check_hook()
    for layer in chunk.decoder.layers:
        if (router := getattr(layer.mlp, "router", None)) is not None:
            router.enable_replay()
            layer.register_forward_pre_hook(take_choices, with_kwargs=True)


def _layers_of_chunk(dimensions: ModelDimensions, state: ParallelState, chunk: int) -> range:
    """Global numbers of the layers of this stage's chunk."""
    return state.stage_sizes.of_layers(dimensions.num_layers).of_chunk(state.pipeline_rank, chunk)


def _transformer_engine_spec(config: Any, has_experts: list[bool]) -> TransformerBlockSubmodules:
    """Spec of Transformer Engine's layers, each with experts or without; experts run as one grouped product."""
    from megatron.core.extensions.transformer_engine import TENorm

    def layer_spec(experts: bool) -> ModuleSpec:
        spec: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts if experts else None,
            moe_grouped_gemm=config.moe_grouped_gemm and experts,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
        if config.multi_latent_attention:
            use_own_attention(spec.submodules.self_attention)
        return _with_router(spec) if experts else spec

    return TransformerBlockSubmodules(layer_specs=[layer_spec(experts) for experts in has_experts], layer_norm=TENorm)


def _take_norms_out(spec: TransformerBlockSubmodules) -> None:
    """Make norms modules of their own where Transformer Engine's layers have them fused into a linear one.

    An adapter reads what the linear layer behind the norm reads, which a fused layer shows to nobody.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
    )

    for layer_spec in spec.layer_specs:
        layer = layer_spec.submodules
        attention = layer.self_attention.submodules
        if attention.linear_qkv is TELayerNormColumnParallelLinear:
            attention.linear_qkv, layer.input_layernorm = TEColumnParallelLinear, TENorm
        feed_forward = _feed_forward_modules(layer.mlp)
        if getattr(feed_forward, "linear_fc1", None) is TELayerNormColumnParallelLinear:
            feed_forward.linear_fc1, layer.pre_mlp_layernorm = TEColumnParallelLinear, TENorm


def _plain_spec(config: Any, has_experts: list[bool]) -> TransformerBlockSubmodules:
    """Spec of megatron-core's own linear layers with our norms and attention; experts run one after the other."""

    def layer_spec(experts: bool) -> ModuleSpec:
        spec: ModuleSpec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if experts else None,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization="RMSNorm",
        )
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        attention = layer.self_attention.submodules
        attention.core_attention = SegmentedAttention
        if config.multi_latent_attention:
            use_plain_layers(layer, has_experts=experts)
        elif config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        return _with_router(spec) if experts else spec

    return TransformerBlockSubmodules(layer_specs=[layer_spec(experts) for experts in has_experts], layer_norm=RMSNorm)


def _with_router(spec: ModuleSpec) -> ModuleSpec:
    """Put our router into a spec."""
    _feed_forward_modules(spec.submodules.mlp).router = PolicyRouter
    return spec


def _feed_forward_modules(mlp: Any) -> Any:
    """Modules of a spec's feed-forward part, which is a ModuleSpec in megatron-core 0.16, a partial in 0.19."""
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules

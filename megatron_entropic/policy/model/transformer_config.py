"""Model dimensions and layout -> megatron-core's TransformerConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import Dtype
from megatron_entropic.errors import UserError
from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.read_config import ExpertDimensions
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.megatron.platform import Platform

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_transformer_config(
    dimensions: ModelDimensions, policy: PolicyConfig, dtype: Dtype, state: ParallelState, platform: Platform
) -> TransformerConfig:
    """Build the configuration that every module of this rank's model shares.

    Raises:
        UserError: the layout does not divide the model, or this platform lacks what the configuration asks for.
    """
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    problems = dimensions.layout_problems(policy)
    if problems:
        raise UserError("the policy cannot be laid out as asked:\n" + "\n".join(f"  - {p}" for p in problems))
    params_dtype = DTYPES[dtype]
    config_class = TransformerConfig if dimensions.latent is None else MLATransformerConfig
    return config_class(
        **_architecture(dimensions),
        **_latent(dimensions),
        **_fusions(dimensions, platform),
        **_recompute(policy, platform),
        **_fp8(policy, platform),
        **_experts(dimensions, policy, platform),
        tensor_model_parallel_size=state.tensor_size,
        pipeline_model_parallel_size=state.pipeline_size,
        virtual_pipeline_model_parallel_size=state.virtual_size if state.virtual_size > 1 else None,
        num_layers_in_first_pipeline_stage=policy.first_stage_layers,
        num_layers_in_last_pipeline_stage=policy.last_stage_layers,
        context_parallel_size=state.context_size,
        sequence_parallel=state.sequence_parallel,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        # Micro-batches are packed without padding, so each has its own length, but for interleaved stages.
        variable_seq_lengths=not state.packing.equal_tokens,
        **_dispatcher(policy),
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        # Parameters stay uninitialised until `load_weights` has filled every one of them.
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
    )


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _architecture(dimensions: ModelDimensions) -> dict[str, Any]:
    return {
        "num_layers": dimensions.num_layers,
        "hidden_size": dimensions.hidden_size,
        "ffn_hidden_size": dimensions.ffn_hidden_size,
        "num_attention_heads": dimensions.num_attention_heads,
        "num_query_groups": dimensions.num_query_groups,
        "kv_channels": dimensions.head_dim,
        # Under latent attention: norms of the latent vectors.
        "qk_layernorm": dimensions.qk_norm or dimensions.latent is not None,
        "add_qkv_bias": dimensions.qkv_bias,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": dimensions.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _latent(dimensions: ModelDimensions) -> dict[str, Any]:
    """Settings of latent attention, its RoPE included; none for other models."""
    latent = dimensions.latent
    if latent is None:
        return {}
    scaling = dimensions.rope_scaling or {"rope_type": "default", "factor": 1.0}
    yarn = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": dimensions.head_dim - latent.rotary_head_dim,
        "qk_pos_emb_head_dim": latent.rotary_head_dim,
        "v_head_dim": latent.value_head_dim,
        "rotary_base": dimensions.rope_theta,
        "rope_type": "yarn" if scaling["rope_type"] == "yarn" else "rope",
        # Scales attention as well; 1 scales nothing.
        "rotary_scaling_factor": scaling["factor"],
        **{key: scaling[key] for key in yarn if key in scaling},
    }


def _experts(dimensions: ModelDimensions, policy: PolicyConfig, platform: Platform) -> dict[str, Any]:
    """Settings of experts; none for a dense model."""
    experts = dimensions.experts
    if experts is None:
        return {}
    return {
        "expert_model_parallel_size": policy.expert_parallel,
        "expert_tensor_parallel_size": policy.expert_tensor_size,
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        "moe_layer_freq": [int(dimensions.has_experts(layer)) for layer in range(dimensions.num_layers)],
        # A softmax over the chosen experts' logits is the softmax over all, scaled to add up to 1.
        "moe_router_pre_softmax": not experts.renormalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if policy.moe_aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": policy.moe_aux_loss_coefficient,
        # One product for all experts of a rank needs Transformer Engine; without, they run one after the other.
        "moe_grouped_gemm": platform.transformer_engine,
        "moe_permute_fusion": platform.transformer_engine,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        **_sigmoid(experts),
    }


def _dispatcher(policy: PolicyConfig) -> dict[str, Any]:
    """Settings of what brings tokens to experts."""
    if policy.moe_dispatcher == "alltoall":
        # Looked at for dense models too: the default excludes variable lengths.
        return {"moe_token_dispatcher_type": "alltoall"}
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": policy.moe_dispatcher}


def _sigmoid(experts: ExpertDimensions) -> dict[str, Any]:
    """Settings of DeepSeek-V3's choice of experts; none for a softmax. The bias that balances them stays as trained."""
    routing = experts.sigmoid
    if routing is None:
        return {}
    grouped = routing.chosen_groups < routing.groups
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": routing.scaling,
        "moe_router_num_groups": routing.groups if grouped else None,
        "moe_router_group_topk": routing.chosen_groups if grouped else None,
    }


def _fusions(dimensions: ModelDimensions, platform: Platform) -> dict[str, Any]:
    """Settings of fused kernels."""
    # They exist on CUDA only, those of RoPE in Transformer Engine only, and not for plain RoPE of latents.
    return {
        "bias_activation_fusion": platform.fused_kernels,
        "bias_dropout_fusion": platform.fused_kernels,
        "apply_rope_fusion": platform.transformer_engine and dimensions.latent is None,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": platform.fused_weight_gradients,
        "persist_layer_norm": False,
    }


def _recompute(policy: PolicyConfig, platform: Platform) -> dict[str, Any]:
    if policy.recompute == "none":
        return {}
    if policy.recompute == "selective":
        # Transformer Engine's attention keeps no scores, so computing it again would save nothing: there it is the
        # feed-forward part, whose activations are the widest, of layers without experts ("mlp") and with them ("moe").
        modules = ["mlp", "moe"] if platform.transformer_engine else ["core_attn"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _fp8(policy: PolicyConfig, platform: Platform) -> dict[str, Any]:
    if policy.fp8 == "off":
        return {}
    if not platform.transformer_engine:
        raise UserError(
            f"policy.fp8={policy.fp8} needs a GPU and Transformer Engine, which is not usable here "
            "(bash tools/environment.sh gpu builds it; the log says what is wrong with it)"
        )
    return {"fp8": policy.fp8, "fp8_recipe": policy.fp8_recipe}

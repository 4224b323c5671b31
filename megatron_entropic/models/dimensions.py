"""The size of a model as its Hugging Face config.json gives it, checked against what the project can train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropic.config.policy import LoraConfig, PolicyConfig
from megatron_entropic.errors import UserError
from megatron_entropic.models.config_values import complete_values, read_json, shown
from megatron_entropic.models.families import ARCHITECTURES, Architecture
from megatron_entropic.models.read_config import (
    ExpertDimensions,
    LatentAttention,
    expert_problems,
    latent_problems,
    read_experts,
    read_latent,
    read_rope,
)
from megatron_entropic.models.stages import PipelineStages, StageSizes

_FEED_FORWARD_MODULES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes and switches of one decoder; everything is counted in elements of the unsharded model."""

    family: str
    """Key of `ARCHITECTURES`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the feed-forward part in layers without experts."""
    num_attention_heads: int
    num_query_groups: int
    """Number of key/value heads."""
    head_dim: int
    """Width of a head of queries and keys."""
    vocab_size: int
    """Rows of the Hugging Face embedding, before any padding for tensor parallelism."""
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None for plain RoPE; for Llama 3.x rope_type "llama3", factor, low_freq_factor, high_freq_factor and
    original_max_position_embeddings; with latent attention rope_type "yarn", factor, beta_fast, beta_slow, mscale,
    mscale_all_dim and original_max_position_embeddings."""
    rms_norm_eps: float
    max_position_embeddings: int
    experts: ExpertDimensions | None = None
    """Experts of the layers that have some; None for dense models."""
    latent: LatentAttention | None = None
    """Latent attention; None where each head has keys and values of its own or of its group."""
    prediction_layers: int = 0
    """Layers behind the last in the checkpoint that predict further tokens; they are neither trained nor exported."""

    @property
    def value_head_dim(self) -> int:
        """Width of a head of values, and of what attention makes of them."""
        return self.head_dim if self.latent is None else self.latent.value_head_dim

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer has a feed-forward part without experts."""
        return self.experts is None or bool(self.experts.dense_layers)

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this global number has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def sparse_layers(self) -> int:
        """Number of layers with experts."""
        return sum(self.has_experts(layer) for layer in range(self.num_layers))

    def size(self, axis: str) -> int:
        """Length of a named axis, as the architecture tables spell it.

        Raises:
            KeyError: unknown axis name.
        """
        sizes = {
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_query_groups * self.head_dim,
            "attended": self.num_attention_heads * self.value_head_dim,
            "head": self.head_dim,
            "vocab": self.vocab_size,
        }
        if self.experts is not None:
            sizes |= {"experts": self.experts.count, "expert_ffn": self.experts.ffn_hidden_size}
            sizes["shared_ffn"] = self.experts.shared_ffn_hidden_size
        if self.latent is not None:
            rank, rotary = self.latent.key_value_rank, self.latent.rotary_head_dim
            sizes |= {"key_value_latent": rank, "key_value_latent_and_rotary": rank + rotary}
            sizes["key_value_unrotated"] = self.num_attention_heads * (self.head_dim - rotary + self.value_head_dim)
            sizes["query_latent"] = self.latent.query_rank or 0
        return sizes[axis]

    def cached_elements(self, engine_ranks: int = 1) -> int:
        """Elements that each of an engine's ranks keeps of a token: keys and values of all layers, or their latents."""
        if self.latent is not None:
            # Every rank needs all of the latent vector for its heads.
            return self.num_layers * self.size("key_value_latent_and_rotary")
        # With more ranks than key/value heads vLLM keeps a copy of a head on several.
        return 2 * self.num_layers * max(1, self.num_query_groups // engine_ranks) * self.head_dim

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """The vocabulary rounded up so that `tensor_parallel` divides it; the added rows are zero."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    def parallel_problems(
        self,
        tensor_parallel: int,
        stages: StageSizes | None = None,
        *,
        expert_parallel: int = 1,
        expert_tensor_parallel: int | None = None,
    ) -> list[str]:
        """Reasons against this layout; empty if there are none. `expert_tensor_parallel` None: `tensor_parallel`."""
        problems = []
        if tensor_parallel > self.num_query_groups:
            problems.append(
                f"tensor_parallel={tensor_parallel} exceeds the model's {self.num_query_groups} key/value heads"
            )
        divided = [("attention heads", self.num_attention_heads), ("key/value heads", self.num_query_groups)]
        if self.has_dense_layers:
            divided.append(("feed-forward width", self.ffn_hidden_size))
        if self.experts is not None and self.experts.shared_ffn_hidden_size:
            divided.append(("width of the shared experts", self.experts.shared_ffn_hidden_size))
        for name, size in divided:
            if size % tensor_parallel:
                problems.append(f"tensor_parallel={tensor_parallel} does not divide the {name} ({size})")
        problems += (stages or StageSizes()).problems(self.num_layers)
        if self.experts is not None:
            problems += self.experts.parallel_problems(expert_parallel, expert_tensor_parallel or tensor_parallel)
        else:
            asked = {"expert_parallel": expert_parallel, "expert_tensor_parallel": expert_tensor_parallel or 1}
            problems += [f"{name}={size}: the model has no experts" for name, size in asked.items() if size > 1]
        return problems

    def layout_problems(self, policy: PolicyConfig) -> list[str]:
        """Reasons why this model cannot be laid out as configured, each beginning with a key of `policy`."""
        problems = self.parallel_problems(
            policy.tensor_parallel,
            StageSizes.of(policy),
            expert_parallel=policy.expert_parallel,
            expert_tensor_parallel=policy.expert_tensor_parallel,
        )
        problems += self.adapter_problems(policy.lora)
        if self.experts is None:
            return problems
        if policy.stage_ranks % (policy.expert_tensor_size * policy.expert_parallel):
            problems.append(
                f"expert_parallel={policy.expert_parallel} x expert tensor parallel {policy.expert_tensor_size} does "
                f"not divide tensor x context x data parallel = {policy.stage_ranks}, whose ranks share the experts"
            )
        if policy.expert_parallel == 1 and policy.expert_tensor_size != policy.tensor_parallel:
            problems.append(
                f"expert_tensor_parallel={policy.expert_tensor_size} differs from tensor_parallel="
                f"{policy.tensor_parallel}, which needs expert_parallel > 1: megatron-core gives experts data-parallel "
                "groups of their own only then"
            )
        if policy.tensor_parallel > 1 and not policy.sequence_parallel:
            problems.append(
                f"sequence_parallel=false: experts with tensor_parallel={policy.tensor_parallel} need it, each tensor "
                "rank sends its own tokens to them"
            )
        return problems

    def adapter_problems(self, lora: LoraConfig) -> list[str]:
        """Reasons why this model cannot have the adapters that are asked for, each beginning with a key of `policy`."""
        if not lora.enabled:
            return []
        problems = []
        beside_attention = [module for module in _FEED_FORWARD_MODULES if module in lora.target_modules]
        if self.latent is not None:
            problems.append(
                f"lora.rank={lora.rank}: a {self.family} model has latent attention, whose matrices get no adapters; "
                "train all parameters (policy.lora.rank=0)"
            )
        elif self.experts is not None and beside_attention:
            problems.append(
                f"lora.target_modules names {', '.join(beside_attention)}, and experts get no adapters: leave them "
                "out, the modules of attention (q_proj, k_proj, v_proj, o_proj) can have some"
            )
        if lora.rank > self.hidden_size:
            problems.append(
                f"lora.rank={lora.rank} is more than the model's hidden_size, {self.hidden_size}: adapters would be "
                "larger than what they adapt"
            )
        return problems

    def pipeline_stages(self, policy: PolicyConfig) -> PipelineStages:
        """Layers of every stage under a layout.

        Raises:
            UserError: the layout does not share out the layers.
        """
        return StageSizes.of(policy).of_layers(self.num_layers)

    def check_parallel(
        self,
        tensor_parallel: int,
        stages: StageSizes | None = None,
        *,
        expert_parallel: int = 1,
        expert_tensor_parallel: int | None = None,
    ) -> None:
        """Refuse a layout that does not divide the model.

        Raises:
            UserError: listing everything `parallel_problems` finds.
        """
        problems = self.parallel_problems(
            tensor_parallel,
            stages,
            expert_parallel=expert_parallel,
            expert_tensor_parallel=expert_tensor_parallel,
        )
        if problems:
            raise UserError("this model cannot be laid out as asked:\n" + "\n".join(f"  - {p}" for p in problems))


def read_dimensions(hf_dir: Path) -> ModelDimensions:
    """Read config.json of a Hugging Face directory (as transformers 4 or 5 wrote it).

    Raises:
        UserError: no directory, no readable config.json, or a model the project cannot train; one error lists
            everything that is wrong.
    """
    given = read_json(Path(hf_dir))
    architecture, problems = _architecture_of(given)
    if architecture is None:
        raise UserError(_problem_list(hf_dir, problems))
    config, of_values = complete_values(given, architecture)
    problems += of_values + _unsupported_features(config)
    if _uses_sliding_window(config, architecture):
        problems.append("sliding-window attention is in use (use_sliding_window or layer_types)")
    rope_theta, rope_scaling, rope_problems = read_rope(config, latent=architecture.latent)
    problems += rope_problems
    if architecture.experts is not None:
        problems += expert_problems(config, architecture.experts)
    if architecture.latent:
        problems += latent_problems(config)
    if architecture.always_windowed and config.get("sliding_window") is not None:
        problems.append(f"sliding-window attention is in use (sliding_window={config['sliding_window']})")
    if problems:
        raise UserError(_problem_list(hf_dir, problems))
    dimensions = _dimensions(config, architecture, rope_theta, rope_scaling)
    if dimensions.num_attention_heads % dimensions.num_query_groups:
        problem = f"{dimensions.num_attention_heads} heads cannot share {dimensions.num_query_groups} key/value heads"
        raise UserError(_problem_list(hf_dir, [problem]))
    return dimensions


def _dimensions(
    config: dict[str, Any], architecture: Architecture, rope_theta: float, rope_scaling: dict[str, Any] | None
) -> ModelDimensions:
    """Dimensions from a config.json's values that passed every check."""
    heads, keys = config["num_attention_heads"], architecture.experts
    latent = read_latent(config) if architecture.latent else None
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if latent is not None:
        # transformers writes the rotary part alone as head_dim.
        head_dim = config["qk_nope_head_dim"] + latent.rotary_head_dim
    return ModelDimensions(
        family=architecture.family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=float(config["rms_norm_eps"]),
        max_position_embeddings=config["max_position_embeddings"],
        experts=None if keys is None else read_experts(config, keys, config["num_hidden_layers"]),
        latent=latent,
        prediction_layers=config.get("num_nextn_predict_layers") or 0,
    )


def _problem_list(hf_dir: Path, problems: list[str]) -> str:
    return f"{Path(hf_dir) / 'config.json'}: this model cannot be used:\n" + "\n".join(f"  - {p}" for p in problems)


def _architecture_of(config: dict[str, Any]) -> tuple[Architecture | None, list[str]]:
    """Find the family by `architectures`, or by `model_type` where no class is named; also returns the problems."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None, [f"architectures must be a list of names, found {shown(names)}"]
    for architecture in ARCHITECTURES.values():
        if architecture.hf_class in names or (not names and config.get("model_type") == architecture.family):
            return architecture, _other_family(config, architecture)
    found = ", ".join(names) or f"model_type {config.get('model_type')!r}"
    supported = ", ".join(a.hf_class for a in ARCHITECTURES.values())
    problems = [f"architecture {found} is not supported (supported: {supported})"]
    return None, problems + _unsupported_features(config)


def _other_family(config: dict[str, Any], architecture: Architecture) -> list[str]:
    """Problem of a model_type that is another family's: transformers and vLLM take the model's class by model_type."""
    found = config.get("model_type")
    if found == architecture.family:
        return []
    return [f"model_type must be {architecture.family!r}, that of {architecture.hf_class}, found {shown(found)}"]


def _unsupported_features(config: dict[str, Any]) -> list[str]:
    problems = []
    quantization = config.get("quantization_config")
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else {}
        method = settings.get("quant_method", "unknown method")
        if method == "fp8" and isinstance(settings.get("weight_block_size"), list):
            method = f"FP8 in blocks of {' x '.join(map(str, settings['weight_block_size']))}"
        problems.append(f"the checkpoint is quantised ({method}); training needs the unquantised weights")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            problems.append(f"{key}=true: biases other than Qwen2's on q, k and v are not supported")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        problems.append(f"hidden_act={activation!r}: only silu is supported")
    return problems


def _uses_sliding_window(config: dict[str, Any], architecture: Architecture) -> bool:
    """Whether any layer attends to a window, by the rules of transformers' Qwen configs."""
    layer_types = config.get("layer_types")
    if layer_types:
        return any(kind != "full_attention" for kind in layer_types)
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return False
    if not architecture.windowed_from_layer:
        return True
    first = config.get("max_window_layers", 28)
    return first is None or first < _layers(config)


def _layers(config: dict[str, Any]) -> int:
    """Number of layers, 0 where that is among the problems."""
    layers = config.get("num_hidden_layers")
    return layers if type(layers) is int else 0

"""Bytes that autograd keeps of one micro-batch, tensor by tensor, and that the output head needs besides.

    h = H / TP with sequence parallelism, else H        q, k = query and key/value width / TP        f = F / TP

Counts are elements per token. A tensor that is a view keeps its whole storage: v is a part of the packed q, k, v. The
`sdpa` column is what torch saves for this project's plain layers (measured, tests/distributed), the `flash` column what
Transformer Engine's fused layers save (from their documentation and code; not measured here).

    saved by                     sdpa                                       flash
    two norms                    input, normalised: 4 h in float32          input: 2 h
    their outputs                2 h                                        2 h
    packed q, k, v               q + 2 k, if something needs it             q + 2 k
    norms of q and k             2 q + 2 k or as much in float32            q
    RoPE                         4 D                                        q + k, kept by attention
    attention                    2 q + 2 k in batches of segments           8 bytes of sums for each head
    output projection            q                                          q
    gated feed-forward           5 f                                        3 f

Under latent attention (`_around_latent_attention`) the vectors of which q, k and v are made are kept instead of packed
q, k, v, normalised and as they were, and attention keeps k as wide as q, with sdpa v and its result too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import ITEM_BYTES, Dtype
from megatron_entropic.models.read_config import LatentAttention
from megatron_entropic.planning.parameters import PlannedModel

Attention = Literal["sdpa", "flash"]
HeadName = Literal["logits", "recompute", "fused_loss"]

LOSS_BLOCK_BYTES = 1 << 30
LOSS_BLOCK_TOKENS = (1024, 8192)
RECOMPUTE_BLOCK = (4096, 32768)
DIVERGENCE_BLOCK = (1024, 32768)
"""Sizes of a block of logits in the fused heads on an accelerator, as in `tensor_parallel`; a test compares."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one micro-batch leaves on one rank, in float because padding of sequences is averaged."""

    saved: float
    """Bytes kept by one layer until its backward pass, with the layout's recomputation."""
    complete: float
    """Bytes kept by one layer while its backward pass runs: everything, recomputed or not."""
    final: float
    """Bytes kept by the final norm, with the hidden states it gives to the output head."""


@dataclass(frozen=True)
class _Widths:
    """Widths of a layer's tensors, in elements per token on one rank."""

    hidden: float
    query: float
    key: float
    attended: float
    """Width of the result of attention."""
    ffn: float
    """Width of the feed-forward part of a layer without experts, or of one expert."""
    shared: float
    """Width of the shared experts, which every token goes through."""


def rank_tokens(policy: PolicyConfig, tokens: int) -> int:
    """Tokens of a packed micro-batch on each context-parallel rank, padded for sequence and context parallelism.

    Under context parallelism each sequence is padded besides, by at most 2 * context_parallel - 1 tokens: not counted.
    """
    multiple = policy.tensor_parallel if policy.sequence_parallel else 1
    multiple *= 2 if policy.context_parallel > 1 else 1
    return -(-tokens // (policy.context_parallel * multiple)) * multiple


def layer_bytes(
    model: PlannedModel,
    policy: PolicyConfig,
    tokens: int,
    *,
    dtype: Dtype,
    attention: Attention,
    experts: bool | None = None,
) -> LayerBytes:
    """Bytes that one layer and the final norm keep of a micro-batch of `tokens` packed tokens.

    `experts` says whether the layer has experts; None: it has, if the model has any.
    """
    item, own_tokens = ITEM_BYTES[dtype], rank_tokens(policy, tokens)
    sparse = model.experts is not None if experts is None else experts
    width = _widths(model, policy, sparse)
    norm_input = (_norm_item(item) if attention == "sdpa" else item) * width.hidden
    # With 8-bit products a linear layer keeps its input in 8 bits alone; a layer with experts has the router's besides.
    linear_item = 1 if policy.fp8 != "off" else item
    linear_inputs = (linear_item + (item if sparse else linear_item)) * width.hidden
    core = _core_attention(model, policy, width, item, attention)
    around = _around_attention(model, policy, width, item, attention)
    feed_forward = _feed_forward(model, policy, width, item, attention, sparse)
    around -= (item - linear_item) * width.attended
    feed_forward -= (item - linear_item) * _linear_inputs(model, policy, width, sparse)
    final = norm_input + 4 + item * width.hidden
    copies = 0.0
    if policy.lora.enabled:
        adapters = adapter_bytes(model, policy, item)
        copies = adapters.copies
        # Frozen norms keep their input alone, frozen linear layers nothing: what adapters read is kept for them.
        norm_input = item * width.hidden
        linear_inputs = item * width.hidden * sum(module in adapters.kept for module in ("linear_qkv", "linear_fc1"))
        around += adapters.hidden - (0 if "linear_proj" in adapters.kept else item * width.attended)
        feed_forward -= 0 if sparse or "linear_fc2" in adapters.kept else item * width.ffn
        final = norm_input + 4 + item * width.hidden
    complete = 2 * (norm_input + 4) + linear_inputs + core + around + feed_forward
    saved = complete
    if policy.recompute == "full":
        saved = item * width.hidden
    elif policy.recompute == "selective" and attention == "flash":
        # The feed-forward part is computed again from its input. Without experts its norm is fused into it, so that
        # the input is the norm's, which is counted there, and the norm's result and sum go too.
        fused_norm = 0 if sparse else 4 + linear_item * width.hidden
        saved = complete - feed_forward - fused_norm
    elif policy.recompute == "selective":
        saved = complete - core + _core_attention_inputs(model, width, item)
    kept_copies = 0 if policy.recompute == "full" else copies
    return LayerBytes(own_tokens * saved + kept_copies, own_tokens * complete + copies, own_tokens * final)


@dataclass(frozen=True)
class AdapterBytes:
    """What the adapters of one layer keep on one rank."""

    kept: frozenset[str]
    """Names of the Megatron layers that have adapters, and so keep their inputs."""
    hidden: float
    """Bytes per token of A x."""
    copies: float
    """Bytes, whatever the number of tokens, of A and B of several matrices put together for one product."""


def adapter_bytes(model: PlannedModel, policy: PolicyConfig, item: int) -> AdapterBytes:
    """What the adapters of a layer keep of each token, and once.

    Without sequence parallelism every tensor rank has A x of all tokens. With it so have layers cut along outputs, and
    those cut along inputs that of the rank's part.
    """
    rank, ranks, targets = policy.lora.rank, policy.tensor_parallel, policy.lora.target_modules
    size, hidden = model.dimensions.size, model.dimensions.hidden_size
    layers = {
        "linear_qkv": (("q_proj", "k_proj", "v_proj"), size("query") + 2 * size("key_value")),
        "linear_proj": (("o_proj",), hidden),
        "linear_fc1": (("gate_proj", "up_proj"), 2 * model.dimensions.ffn_hidden_size),
        "linear_fc2": (("down_proj",), hidden),
    }
    counts = {name: sum(module in targets for module in modules) for name, (modules, _) in layers.items()}
    parts = ranks if policy.sequence_parallel else 1
    width = sum(
        rank * count / (parts if name in ("linear_proj", "linear_fc2") else 1) for name, count in counts.items()
    )
    copies = sum(
        rank * counts[name] * ((hidden if counts[name] > 1 else 0) + layers[name][1] / ranks)
        for name in ("linear_qkv", "linear_fc1")
    )
    return AdapterBytes(frozenset(name for name, count in counts.items() if count), item * width, item * copies)


def head_bytes(model: PlannedModel, policy: PolicyConfig, tokens: int, *, dtype: Dtype, head: HeadName) -> int:
    """Peak bytes of the output head on the last stage, beside the hidden states: logits or a block of them, dL/dhidden.

    Every token is taken for a response token, which is the most it can be.
    """
    item, own_tokens = ITEM_BYTES[dtype], rank_tokens(policy, tokens)
    hidden = model.dimensions.hidden_size
    columns = model.dimensions.padded_vocab_size(policy.tensor_parallel) // policy.tensor_parallel
    gathered = own_tokens * hidden * item if policy.sequence_parallel else 0
    selected_and_gradient = 2 * own_tokens * hidden * item
    # A block has float32 logits and, for bfloat16 models, their gradient as an operand.
    block_item = 4 if dtype == "float32" else 4 + item
    if head == "logits":
        block = own_tokens * columns * item
    elif head == "fused_loss":
        least, most = LOSS_BLOCK_TOKENS
        rows = min(max(LOSS_BLOCK_BYTES // (4 * columns), least), most, own_tokens)
        block = rows * columns * block_item
    else:
        rows = min(RECOMPUTE_BLOCK[0], own_tokens)
        block = rows * (min(RECOMPUTE_BLOCK[1], columns) * block_item + 4 * hidden)
    return gathered + selected_and_gradient + block


def divergence_bytes(
    model: PlannedModel, teacher: PlannedModel, policy: PolicyConfig, tokens: int, *, dtype: Dtype
) -> int:
    """Peak bytes of the divergence from a teacher on the last stage: its hidden states, dL/dhidden, and blocks.

    Both models' logits of a block are float32, as are their exponentials and what is computed of them.
    """
    item, own_tokens = ITEM_BYTES[dtype], rank_tokens(policy, tokens)
    columns = model.dimensions.padded_vocab_size(policy.tensor_parallel) // policy.tensor_parallel
    rows, width = min(DIVERGENCE_BLOCK[0], own_tokens), min(DIVERGENCE_BLOCK[1], columns)
    hidden = own_tokens * (teacher.dimensions.hidden_size + 2 * model.dimensions.hidden_size) * item
    return hidden + rows * width * (4 * 4 + item)


def backward_bytes(model: PlannedModel, policy: PolicyConfig, tokens: int, *, dtype: Dtype) -> int:
    """Bytes of gradients alive beside what is saved: of the widest activation, and of the largest matrix in `dtype`."""
    dimensions, item = model.dimensions, ITEM_BYTES[dtype]
    if policy.lora.enabled:
        largest_matrix = 0  # no gradient of a weight is ever made
    else:
        rows_of_vocabulary = dimensions.padded_vocab_size(policy.tensor_parallel) // policy.tensor_parallel
        largest_matrix = rows_of_vocabulary * dimensions.hidden_size
    rows = rank_tokens(policy, tokens) * (model.experts.per_token if model.experts else 1)
    rows = round(rows * expert_token_share(model, policy))
    width = 3 * model.feed_forward_width // feed_forward_ranks(model, policy)
    return item * (rows * width + largest_matrix)


def feed_forward_ranks(model: PlannedModel, policy: PolicyConfig) -> int:
    """Number of ranks that cut the matrices of a feed-forward part, or of an expert."""
    return policy.expert_tensor_size if model.experts else policy.tensor_parallel


def expert_token_share(model: PlannedModel, policy: PolicyConfig) -> float:
    """Share of its context-parallel rank's tokens that a rank's experts get copies of, with balanced experts.

    Under sequence parallelism each tensor rank dispatches its own part of the tokens, and the ranks that cut an expert
    gather theirs: TP ranks without expert tensor parallelism divide the tokens by TP.
    """
    if model.experts is None or not policy.sequence_parallel:
        return 1.0
    return policy.expert_tensor_size / policy.tensor_parallel


def _widths(model: PlannedModel, policy: PolicyConfig, sparse: bool) -> _Widths:
    dimensions, ranks = model.dimensions, policy.tensor_parallel
    if sparse:
        ffn, shared = (
            model.feed_forward_width / feed_forward_ranks(model, policy),
            dimensions.size("shared_ffn") / ranks,
        )
    else:
        ffn, shared = dimensions.ffn_hidden_size / ranks, 0.0
    return _Widths(
        hidden=dimensions.hidden_size / (ranks if policy.sequence_parallel else 1),
        query=dimensions.size("query") / ranks,
        key=dimensions.size("key_value") / ranks,
        attended=dimensions.size("attended") / ranks,
        ffn=ffn,
        shared=shared,
    )


def _around_attention(
    model: PlannedModel, policy: PolicyConfig, width: _Widths, item: int, attention: Attention
) -> float:
    """Bytes per token of packed q, k, v, their norms, RoPE, and the output projection's input."""
    if model.dimensions.latent is not None:
        return _around_latent_attention(model.dimensions.latent, width, item, attention)
    packed, projection = item * (width.query + 2 * width.key), item * width.query
    if attention == "flash":
        copy_of_query = item * width.query if model.dimensions.qk_norm else 0
        return packed + copy_of_query + projection
    rope = 4 * item * model.dimensions.head_dim
    if not model.dimensions.qk_norm:
        return rope + projection
    # In float32 the norms keep q as a copy, unless it is of one group, and k as a view of the packed tensor, and
    # unless they are frozen the products of both; in bfloat16 copies of both.
    copied = width.query if model.dimensions.num_query_groups > policy.tensor_parallel else 0
    products = 0 if policy.lora.enabled else width.query + width.key
    norms = packed + 4 * (copied + products) if item == 4 else item * (width.query + width.key)
    return norms + rope + projection


def _norm_item(item: int) -> int:
    """Bytes that a plain norm keeps of an element: torch's of float32 its input and a product, ours its input."""
    return 8 if item == 4 else item


def _around_latent_attention(latent: LatentAttention, width: _Widths, item: int, attention: Attention) -> float:
    """Bytes per token kept around latent attention.

    They are the two latent vectors before and after their norms, the keys' shared part, RoPE, the projection's input.
    """
    query_rank, projection = latent.query_rank or 0, item * width.attended
    if attention == "flash":
        return item * (2 * query_rank + 2 * latent.key_value_rank + latent.rotary_head_dim) + projection
    norms = (_norm_item(item) + item) * (query_rank + latent.key_value_rank) + item * latent.rotary_head_dim
    return norms + 4 * item * latent.rotary_head_dim + projection


def _core_attention(
    model: PlannedModel, policy: PolicyConfig, width: _Widths, item: int, attention: Attention
) -> float:
    heads = model.dimensions.num_attention_heads / policy.tensor_parallel
    if model.dimensions.latent is not None:
        if attention == "flash":
            return item * (width.query + width.key + width.attended) + 8 * heads
        # Values are padded to the width of keys, and so is the result.
        return item * 4 * width.query + 4 * heads
    if attention == "flash":
        return item * (width.query + width.key) + 8 * heads
    return item * (2 * width.query + 2 * width.key) + 4 * heads


def _core_attention_inputs(model: PlannedModel, width: _Widths, item: int) -> float:
    """Bytes per token that a plain layer keeps to compute core attention again.

    They are q and k after RoPE, and v where nothing else keeps packed q, k, v.
    """
    inputs = item * (width.query + width.key)
    if model.dimensions.latent is not None:
        return inputs + item * width.attended
    if model.dimensions.qk_norm and item == 4:
        return inputs
    return inputs + item * (width.query + 2 * width.key)


def _linear_inputs(model: PlannedModel, policy: PolicyConfig, width: _Widths, sparse: bool) -> float:
    """Elements per token of the inputs of products that `_feed_forward` counts."""
    if model.experts is None or not sparse:
        return width.ffn
    received = expert_token_share(model, policy) * model.experts.per_token
    return received * (model.dimensions.hidden_size + width.ffn) + width.shared


def _feed_forward(
    model: PlannedModel, policy: PolicyConfig, width: _Widths, item: int, attention: Attention, sparse: bool
) -> float:
    products = 5 if attention == "sdpa" else 3
    if model.experts is None or not sparse:
        return item * products * width.ffn
    # Each token is copied for its experts: sorted before the exchange, received after it, and once in each product.
    # With balanced experts every rank receives as many copies as all that share an expert's tokens send.
    copies, hidden = model.experts.per_token, model.dimensions.hidden_size
    sent = copies * width.hidden
    received = expert_token_share(model, policy) * copies * (hidden + products * width.ffn)
    shared = products * width.shared
    return item * (sent + received + shared) + 4 * model.experts.count / (
        policy.tensor_parallel if policy.sequence_parallel else 1
    )

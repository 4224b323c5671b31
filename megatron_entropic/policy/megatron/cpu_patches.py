"""Patches for megatron-core on a CPU with gloo. It assumes CUDA in three ways, each undone by one kind of patch:

    CudaLiteral   one function says "cuda" where it means "the device": its code gets "cpu" instead
    Replacement   a function asks for the CUDA device, its generator or its streams: another function answers
    (a setting)   torch.compile is switched off, which on a CPU needs a C++ compiler and gains nothing

A fourth matter is speed: `WITHOUT_AMX`.

Every patch names its reason. `needed()` tells whether the installed megatron-core still has the defect, which a test
asks for each of them; nothing else in torch or megatron-core is touched.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch

from megatron_entropic.policy.megatron.rotary import angles_of_rank, apply_rotary_packed
from megatron_entropic.policy.megatron.unequal_parts import gather_along_first_dim, reduce_scatter_along_first_dim
from megatron_entropic.policy.megatron.wide_linear import wide_linear
from megatron_entropic.tensor_parallel.products import has_bfloat16_tiles

_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


@dataclass(frozen=True)
class CudaLiteral:
    """One function whose code names CUDA: a constant "cuda", a CUDA tensor type, or a call of `.cuda()`.

    The function keeps its identity; its code object is exchanged for one with the CPU's names. `torch.cuda.f()` in it
    becomes `torch.cpu.f()`, which torch provides for what is used here.
    """

    target: str
    """Place of the function as module:qualified name, below megatron.core."""
    reason: str
    since: tuple[int, int] = (0, 16)
    """First megatron-core version that has the function."""

    def function(self) -> FunctionType:
        """The function itself, below decorators and classmethod."""
        module, name = self.target.split(":")
        found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(f"megatron.core.{module}"))
        unwrapped = inspect.unwrap(getattr(found, "__func__", found))
        assert isinstance(unwrapped, FunctionType)
        return unwrapped

    def needed(self) -> bool:
        """Whether the code, as it stands, names CUDA."""
        code = self.function().__code__
        return _on_cpu(code) != code

    def apply(self) -> None:
        """Exchange the code of the function."""
        function = self.function()
        function.__code__ = _on_cpu(function.__code__)


def _on_cpu(code: CodeType) -> CodeType:
    """Copy of code, and of that of functions nested in it, with the names of CUDA exchanged."""
    return code.replace(
        co_consts=tuple(_constant_on_cpu(constant) for constant in code.co_consts),
        co_names=tuple("cpu" if name == "cuda" else name for name in code.co_names),
    )


def _constant_on_cpu(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        return _on_cpu(constant)
    if isinstance(constant, tuple):
        return tuple(_constant_on_cpu(item) for item in constant)
    return _CONSTANTS.get(constant, constant) if isinstance(constant, str) else constant


@dataclass(frozen=True)
class Replacement:
    """One attribute of a module, or of a class in it, that is exchanged."""

    target: str
    """Place of the attribute as module:qualified name."""
    value: Any
    reason: str
    defect: Callable[[Any], bool]
    """Whether the original, given to it, shows the defect."""

    def needed(self) -> bool:
        """Whether the attribute, as it stands, shows the defect."""
        return self.defect(getattr(*self._place()))

    def apply(self) -> None:
        """Exchange the attribute."""
        setattr(*self._place(), self.value)

    def _place(self) -> tuple[Any, str]:
        module, name = self.target.split(":")
        *owners, last = name.split(".")
        return functools.reduce(getattr, owners, importlib.import_module(module)), last


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _do_nothing(*_arguments: Any, **_options: Any) -> None:
    return None


def _get_generator_state(*_arguments: Any, **_options: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_generator_state(state: torch.Tensor, *_arguments: Any, **_options: Any) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _fails(function: Callable[..., Any]) -> bool:
    """Whether calling a function raises: a CPU build has no CUDA, a machine may have no driver."""
    try:
        function()
    except (RuntimeError, AssertionError):
        return True
    return False


def _does_not_seed(function: Callable[..., Any]) -> bool:
    """Whether a function that seeds leaves torch's CPU generator as it was."""
    # torch queues the call for the day CUDA is initialised, which never comes.
    before = torch.get_rng_state()
    try:
        function(int(before[0]) + 12345)
        return torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_rng_state(before)


def _does_not_restore(function: Callable[..., Any]) -> bool:
    """Whether a function that restores a generator's state leaves torch's CPU generator as it was."""
    before = torch.get_rng_state()
    other = torch.Generator().manual_seed(987654321).get_state()
    try:
        function(other)
        return not torch.equal(other, torch.get_rng_state())
    finally:
        torch.set_rng_state(before)


class _HostStream:
    """Stand-in for the stream on which counts are copied to the host: they are there, nothing has to be waited for."""

    def wait_stream(self, _other: Any) -> None:
        """Do nothing: no other stream runs."""

    def record_event(self) -> _HostStream:
        """Stand-in for an event, which has happened already."""
        return self

    def synchronize(self) -> None:
        """Do nothing: all work has been done."""


def _is_absent(value: Any) -> bool:
    return value is None


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stand-in for megatron-core's `maybe_move_tensor_to_cpu`, on tensors that are there already."""
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor


def _keeps_tensors(function: Callable[..., Any]) -> bool:
    return torch.is_tensor(function(torch.zeros(1, dtype=torch.int64), as_numpy=True))


def _calls(function: Callable[..., Any], name: str) -> bool:
    return name in function.__code__.co_names


def _loops_over_segments(function: Callable[..., Any]) -> bool:
    return "torch.split(t, seqlens)" in inspect.getsource(function)


def _pins_memory(function: Callable[..., Any]) -> bool:
    return "pin_memory=True" in inspect.getsource(function)


PACKED_ROTARY = Replacement(
    "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd",
    apply_rotary_packed,
    "one gather instead of a loop over segments; Transformer Engine has a kernel for it",
    _loops_over_segments,
)
"""Patch of packed RoPE on any device where Transformer Engine's layers are not used."""

REPLACEMENTS = (
    PACKED_ROTARY,
    Replacement("torch.cuda:current_device", _cpu_device, "device of buffers, parameters and p2p tensors", _fails),
    Replacement("torch.cuda:synchronize", _do_nothing, "after p2p and before saving; a CPU has no queue", _fails),
    Replacement("torch.cuda:get_rng_state", _get_generator_state, "RNG tracker of tensor-parallel ranks", _fails),
    Replacement("torch.cuda:manual_seed", _manual_seed, "RNG tracker of tensor-parallel ranks", _does_not_seed),
    Replacement(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        _get_generator_state,
        "RNG tracker's fork, and recomputation",
        _fails,
    ),
    Replacement(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        _set_generator_state,
        "RNG tracker's fork, and recomputation; unpatched it only grows torch's list of queued calls",
        _does_not_restore,
    ),
    Replacement(
        "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding:get_pos_emb_on_this_cp_rank",
        angles_of_rank,
        "YaRN's table of a context-parallel rank, cut with an index in pinned memory",
        _pins_memory,
    ),
    Replacement(
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
        _HostStream(),
        "the first dispatcher makes a CUDA stream for all, unless there is one; torch's CPU stream records no events",
        _is_absent,
    ),
    Replacement(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        _as_numbers,
        "tokens for each expert's rank must be numbers; only CUDA tensors become some",
        _keeps_tensors,
    ),
    Replacement(
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        gather_along_first_dim,
        "experts cut over tensor ranks gather unequal numbers of tokens, which gloo's all_gather refuses",
        functools.partial(_calls, name="all_gather"),
    ),
    Replacement(
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        reduce_scatter_along_first_dim,
        "and scatter them likewise",
        functools.partial(_calls, name="reduce_scatter"),
    ),
)

WITHOUT_AMX = (
    Replacement(
        "megatron.core.tensor_parallel.layers:linear_with_grad_accumulation_and_async_allreduce",
        wide_linear,
        "products of bfloat16 in bfloat16, which only AMX makes faster than those of float32",
        functools.partial(_calls, name="LinearWithGradAccumulationAndAsyncCommunication"),
    ),
    Replacement(
        "megatron.core.tensor_parallel.layers:linear_with_frozen_weight",
        wide_linear,
        "the same for a reference model",
        functools.partial(_calls, name="LinearWithFrozenWeight"),
    ),
)
"""Patches where the processor has no AMX for bfloat16."""

_OPTIMIZER_INIT = "scalars of gradient scaling and clipping; types of parameters"
LITERALS = (
    CudaLiteral("pipeline_parallel.schedules:forward_backward_no_pipelining", "the token count"),
    CudaLiteral("pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving", "the token count"),
    CudaLiteral("pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving", "the token count"),
    CudaLiteral("optimizer.clip_grads:get_grad_norm_fp32", "the norm"),
    CudaLiteral("optimizer.clip_grads:clip_grad_by_total_norm_fp32", "type of gradients, overflow buffer"),
    CudaLiteral("optimizer.optimizer:MixedPrecisionOptimizer.__init__", _OPTIMIZER_INIT),
    CudaLiteral("optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__", _OPTIMIZER_INIT),
    CudaLiteral("optimizer.optimizer:FP32Optimizer.__init__", _OPTIMIZER_INIT),
    CudaLiteral("optimizer.optimizer:MegatronOptimizer.has_grad_norm_group", "a flag", since=(0, 19)),
    CudaLiteral("optimizer.distrib_optimizer:DistributedOptimizer.__init__", _OPTIMIZER_INIT),
    CudaLiteral("optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups", _OPTIMIZER_INIT),
    CudaLiteral(
        "optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero", "gathers state with .cuda()"
    ),
    CudaLiteral(
        "distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
        "asks for the current stream",
        since=(0, 19),
    ),
    CudaLiteral("utils:local_multi_tensor_l2_norm", "the norm"),
    CudaLiteral(
        "models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
        "tied embeddings over pipeline stages are moved with .cuda()",
    ),
    CudaLiteral(
        "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "asks for the current stream",
    ),
    CudaLiteral("dist_checkpointing.strategies.state_dict_saver:verify_global_md_reuse", "a flag"),
    CudaLiteral("dist_checkpointing.exchange_utils:_get_empty_tensor_for_exchange", "buffers of parallel loading"),
    CudaLiteral("dist_checkpointing.exchange_utils:exchange_loaded_tensors_gather_rounds", "as above"),
    CudaLiteral("dist_checkpointing.exchange_utils:exchange_loaded_tensors_broadcast", "as above"),
)


def patches_for(version: tuple[int, int]) -> list[CudaLiteral | Replacement]:
    """All patches of one megatron-core version; looking at `needed()` imports megatron.core."""
    wide = () if has_bfloat16_tiles() else WITHOUT_AMX
    return [*REPLACEMENTS, *wide, *(literal for literal in LITERALS if literal.since <= version)]


def import_megatron() -> None:
    """Import megatron.core without what a policy rank on a CPU never uses, which takes a third of its start.

    Of 6.0 s of CPU time for all imports of a rank 2.0 are torch's inductor, loaded by `@torch.compile` above functions
    that then run as they are written, and W&B, which only megatron-core's inference server would use.
    """
    if "megatron.core" in sys.modules:
        return
    compiler, wandb = torch.compile, sys.modules.get("wandb")
    torch.compile = _as_written  # type: ignore[assignment]
    sys.modules["wandb"] = None  # type: ignore[assignment]  # importing it is an ImportError, which is handled there
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compiler
        del sys.modules["wandb"]
        if wandb is not None:
            sys.modules["wandb"] = wandb


def _as_written(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
    """A decorator with torch.compile's signature that changes nothing."""
    return _as_written if function is None else function


def apply_cpu_patches(version: tuple[int, int]) -> None:
    """Apply all patches to this process; megatron.core may be imported before or after. Repeating changes nothing.

    Raises:
        AttributeError: a function is not where it was; this megatron-core does not fit.
    """
    import_megatron()
    # Where megatron-core was imported before, its functions are compiled ones: at their first use they would call a
    # C++ compiler.
    torch.compiler.set_stance("force_eager")
    for patch in patches_for(version):
        patch.apply()

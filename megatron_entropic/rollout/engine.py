"""One vLLM engine: samples responses, scores given tokens, takes in new weights.

    requests --> respond --> samples with log pi_engine(token) at the rollout temperature, as they are finished
    plan, version --> receive: start, update, finish, empty prefix cache, check the version

Sampling is a function of weights and requests: every response has a seed of its own and the batch is scheduled in this
process, so the same calls in a fresh process give the same tokens and the same log-probs bit for bit (on the CPU).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_entropic.config.names import TRANSPORTS
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.config.run import Dtype, RolloutConfig, Sampling
from megatron_entropic.data.tokenizer import stop_token_ids
from megatron_entropic.errors import UserError
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.rollout.vllm_setup import Device, imported_for_good, prepare_environment, silence_known_noise
from megatron_entropic.types import CUT, GenerationRequest, Response, Segment
from megatron_entropic.weight_sync.checksums import Piece
from megatron_entropic.weight_sync.gloo import FlatContents
from megatron_entropic.weight_sync.plan import PublishPlan

_CPU_TOKENS_PER_FORWARD = 4096
"""Tokens of one forward pass on a CPU, as vLLM has them by default."""
_CPU_TOKENS_PER_BLOCK = 32
"""Of the KV cache on a CPU: the fewest that vLLM's attention reads there; its default is 128. Only full blocks are
shared: with 128 every response to a short prompt computes it, and every turn of a conversation what was said before."""


class UpdateCalls(Protocol):
    """An engine's end of a transport, in the process that calls vLLM; `gloo_transport.GlooUpdates` is one to copy."""

    init_info: dict[str, Any]
    """Arguments of vLLM's `init_weight_transfer_engine`."""

    def __init__(self, senders: Sequence[dict[str, Any]], ranks: range) -> None:
        """Find the senders, in the group of each of which this engine's workers have `ranks` and the sender rank 0."""

    def of(self, plan: PublishPlan) -> list[AbstractContextManager[dict[str, Any]]]:
        """Arguments of vLLM's update calls for a publication, each call to be made within its context."""


class RolloutEngine:
    """One vLLM `LLM` in this process; workers of tensor parallelism are its children."""

    def __init__(
        self,
        hf_dir: Path,
        dtype: Dtype,
        config: RolloutConfig,
        *,
        max_model_tokens: int,
        seed: int,
        device: Device,
        transport: str = "gloo",
        sleeps: bool = False,
        max_batched_tokens: int | None = None,
        load_weights: bool = True,
    ) -> None:
        """Load the model of `hf_dir` as weights version 0.

        Args:
            hf_dir: Hugging Face directory; the tokenizer is not read.
            dtype: dtype of weights, activations and KV cache.
            config: sampling and memory.
            max_model_tokens: longest prompt and response together.
            seed: seed of vLLM's own generators, which nothing here draws from.
            device: cpu or cuda.
            transport: name of what carries weights, a key of `config.names.TRANSPORTS`.
            sleeps: on a GPU, whether `sleep` gives memory back; it needs an allocator of its own.
            max_batched_tokens: tokens of one forward pass; None leaves the choice to vLLM.
            load_weights: False: only the configuration is read, and nothing can be sampled before `receive`.

        Raises:
            UserError: an architecture that the weight map does not know, a limit that vLLM refuses, or quantisation on
                a CPU.
        """
        if config.quantization != "off" and device == "cpu":
            raise UserError(
                f"rollout.quantization={config.quantization} needs a GPU: vLLM has no 8-bit products on a CPU"
            )
        prepare_environment(device)
        silence_known_noise()
        with imported_for_good():
            from vllm import LLM

            from megatron_entropic.rollout.plugin import register

        register()
        self._config = config
        self._updates_type: type[UpdateCalls] = find_attribute(
            "cluster.transport", TRANSPORTS[transport].receiver, arguments=2
        )
        self._updates: UpdateCalls | None = None
        self._max_model_tokens = max_model_tokens
        dimensions = read_dimensions(hf_dir)
        self._hf_tensors = ParameterMap(dimensions).hf_tensors
        self._stop_token_ids = stop_token_ids(hf_dir, config.stop)
        self._weights_version: int | None = 0 if load_weights else None
        self._refusal = "no weights were published to this engine yet, and it has none of its own"
        options = _engine_options(dtype, config, device, transport)
        options["enable_sleep_mode"] = sleeps and device == "cuda"
        if max_batched_tokens is not None:
            options["max_num_batched_tokens"] = max_batched_tokens
        elif device == "cpu":
            options |= _whole_prompts(max_model_tokens)
        if device == "cpu" and dimensions.latent is None:  # latent attention has blocks of its own
            options["block_size"] = _CPU_TOKENS_PER_BLOCK
        if not load_weights:
            options["load_format"] = "dummy"
        self._llm = LLM(model=str(hf_dir), max_model_len=max_model_tokens, seed=seed, **options)

    @property
    def weights_version(self) -> int:
        """Version of the loaded weights, 0 for those of the Hugging Face directory.

        Raises:
            RuntimeError: an update broke off, so the weights are a mixture, or there were none yet.
        """
        if self._weights_version is None:
            raise RuntimeError(self._refusal)
        return self._weights_version

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling | None = None) -> list[Response]:
        """Sample one response to each request; the result is in the order of the requests. See `respond`."""
        found = dict(pair for finished in self.respond(requests, sampling) for pair in finished)
        return [found[position] for position in range(len(requests))]

    def respond(
        self, requests: Sequence[GenerationRequest], sampling: Sampling | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        """Yields one response to each request, with the position of the request: after each forward pass those it has
        finished.

        When the caller takes them changes nothing about the responses.

        Args:
            requests: prompts, each with the seed of its response.
            sampling: settings of the responses; None: those of the configuration.

        Raises:
            UserError: a prompt that leaves no room for max_response_tokens.
            RuntimeError: the weights are incomplete.
        """
        names = self.begin(requests, sampling or self._config.sampling)
        position_of = {name: position for position, name in enumerate(names)}
        try:
            while self.busy:
                yield [(position_of[name], response) for name, response in self.step()]
        except GeneratorExit:
            # The caller stopped asking. A running request would keep the prefix cache from being emptied.
            self._llm.llm_engine.abort_request(names)
            raise

    @property
    def busy(self) -> bool:
        """Whether a request that was begun has not come to its end."""
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def begin(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[str]:
        """Take requests up, after those that are running; returns a name for each, unique in this process.

        Raises:
            UserError: a prompt that leaves no room for max_response_tokens; nothing is taken up.
            RuntimeError: the weights are incomplete.
        """
        from vllm import TokensPrompt

        _ = self.weights_version  # refuses incomplete weights
        self._check_lengths(requests, sampling)
        if not requests:
            return []
        prompts = [TokensPrompt(prompt_token_ids=request.tokens.tolist()) for request in requests]
        names = self._llm.enqueue(prompts, self._parameters(requests, sampling), use_tqdm=False)
        # An output has vLLM's number of its request alone; inside, random characters follow it.
        return [name.partition("-")[0] for name in names]

    def step(self) -> list[tuple[str, Response]]:
        """Run one forward pass over what was begun; returns the responses that ended in it, by name."""
        version = self.weights_version
        outputs = [output for output in self._llm.llm_engine.step() if output.finished]
        return [(output.request_id, _response(output, version)) for output in outputs]

    def cut(self, names: Sequence[str]) -> list[Response]:
        """End running requests before their end; returns what each has so far, which may be nothing.

        No cached key or value is left of them, so new weights can come.
        """
        from vllm.v1.engine import FinishReason

        if not names:
            return []
        version, engine = self.weights_version, self._llm.llm_engine
        processor = engine.output_processor
        responses = []
        for name in names:
            (inside,) = processor.external_req_ids[name]
            # As vLLM makes the last output of an aborted request for its server.
            output = processor.request_states[inside].make_request_output([], None, FinishReason.ABORT, None)
            responses.append(replace(_response(output, version), finish_reason=CUT))
        engine.abort_request(list(names))
        return responses

    def score_tokens(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
        """Log-probs at temperature 1 of the tokens after each prompt.

        Args:
            sequences: (tokens [L], prompt_length), 1 <= prompt_length < L < max_model_tokens.

        Returns:
            Log-probs of each sequence, L - prompt_length of them, in the caller's order.

        Raises:
            UserError: vLLM has no room for a sequence and one token more.
            RuntimeError: the weights are incomplete.
        """
        _ = self.weights_version  # refuses incomplete weights
        from vllm import SamplingParams, TokensPrompt

        # vLLM must generate something: one greedy token, which is thrown away.
        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        prompts = [TokensPrompt(prompt_token_ids=list(tokens)) for tokens, _ in sequences]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [
            [output.prompt_logprobs[i][tokens[i]].logprob for i in range(prompt_length, len(tokens))]
            for (tokens, prompt_length), output in zip(sequences, outputs, strict=True)
        ]

    def sleep(self) -> None:
        """Give the memory of weights and KV cache back; weights are kept in host memory, cached prefixes are not.

        On a CPU vLLM frees nothing, but refuses work as on a GPU until everything is awake.
        """
        # Level 2 would not copy the weights, 16 GB for an 8B, to the host and back: a second or two a step by estimate.
        # But vLLM then brings back registered buffers only, not what layers keep as plain attributes, and a turn of
        # rollouts or evaluation can begin without a publication (`cluster/cluster.py`).
        self._llm.sleep(level=1)

    def wake(self, parts: list[str]) -> None:
        """Take memory again for `parts`: "weights", "kv_cache"; new weights can come when the first are awake."""
        self._llm.wake_up(tags=parts)

    def connect(self, senders: Sequence[dict[str, Any]], rank_offset: int) -> None:
        """Join the transfer groups of the policy.

        Args:
            senders: result of `Publisher.open` on each sending rank, in the order of ranks.
            rank_offset: rank of this engine's first worker in every group, whose rank 0 is the sender.

        Raises:
            PhaseTimeout: naming phase, worker and peer.
        """
        self._updates = self._updates_type(senders, range(rank_offset, rank_offset + self._config.tensor_parallel))
        self._llm.init_weight_transfer_engine({"init_info": self._updates.init_info})

    def receive(self, plan: PublishPlan, weights_version: int) -> None:
        """Take in all buckets of `plan` while the policy publishes them; the weights are then `weights_version`.

        Raises:
            UserError: the plan does not hold exactly this model's tensors; nothing has been received.
            PhaseTimeout, PeerDied: naming bucket, worker and peer.
            RuntimeError: the prefix cache could not be emptied, or vLLM reports another version afterwards.
        """
        check_complete([FlatContents.of_bucket(bucket) for bucket in plan.buckets], self._hf_tensors)
        self._weights_version = None
        self._refusal = "a weight update broke off: the engine's weights are incomplete, publish again"
        self._llm.start_weight_update()
        assert self._updates is not None, "connect() comes before receive()"
        for update in self._updates.of(plan):
            with update as update_info:
                self._llm.update_weights({"update_info": update_info})
        self._finish_update(weights_version)
        # Cached keys and values belong to the old weights, and vLLM keeps them.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("publish: vLLM could not empty its prefix cache, a request is still running")
        self._weights_version = weights_version

    def weight_pieces(self) -> list[Piece]:
        """Checksums of all weights as they lie in this engine's workers.

        Raises:
            RuntimeError: the weights are incomplete.
        """
        _ = self.weights_version  # refuses incomplete weights
        return [piece for pieces in self._llm.collective_rpc("weight_pieces") for piece in pieces]

    def _parameters(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Any]:
        """vLLM's SamplingParams of each request."""
        from vllm import SamplingParams

        return [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=request.own_seed,
                max_tokens=_limit(request, sampling) - request.done,
                stop_token_ids=self._stop_token_ids,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for request in requests
        ]

    def _finish_update(self, version: int) -> None:
        """Finish the update, and let vLLM keep the version where it can (its LLM class has no version up to 0.24)."""
        if not hasattr(self._llm, "get_weight_version"):
            self._llm.finish_weight_update()
            return
        self._llm.finish_weight_update(weight_version=str(version))
        reported = self._llm.get_weight_version()
        if reported != str(version):
            raise RuntimeError(f"publish: vLLM reports weights version {reported} after update {version}")

    def _check_lengths(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> None:
        lengths = [request.tokens.size - request.done for request in requests]
        rooms = [self._max_model_tokens - _limit(request, sampling) for request in requests]
        too_long = [(length, room) for length, room in zip(lengths, rooms, strict=True) if length > room]
        if too_long:
            longest, room = max(too_long)
            raise UserError(
                f"{len(too_long)} prompts are longer than what max_response_tokens={sampling.max_response_tokens} "
                f"leaves of {self._max_model_tokens} tokens; the longest has {longest}, and there is room for {room}"
            )


def _limit(request: GenerationRequest, sampling: Sampling) -> int:
    """Most tokens of a turn."""
    return sampling.max_response_tokens if request.limit is None else request.limit


def check_complete(buckets: Sequence[FlatContents], hf_tensors: dict[str, tuple[int, ...]]) -> None:
    """Refuse an update that does not hold every tensor of the model once and in its shape.

    vLLM keeps the old values of tensors that an update leaves out, without a word.

    Raises:
        ValueError: listing every difference.
    """
    sent = [pair for contents in buckets for pair in zip(contents.names, contents.shapes, strict=True)]
    times_sent = Counter(name for name, _ in sent)
    problems = [f"{name}: sent twice" for name, times in sorted(times_sent.items()) if times > 1]
    problems += [f"{name}: missing" for name in hf_tensors if name not in times_sent]
    for name, shape in sent:
        if name not in hf_tensors:
            problems.append(f"{name}: the model has no such tensor")
        elif tuple(shape) != tuple(hf_tensors[name]):
            problems.append(f"{name}: shape {tuple(shape)}, the model has {tuple(hf_tensors[name])}")
    if problems:
        raise ValueError("publish: the update does not fit the engine's model:\n  " + "\n  ".join(problems))


def _engine_options(dtype: Dtype, config: RolloutConfig, device: Device, transport: str) -> dict[str, Any]:
    """Arguments of vLLM's LLM that follow from the configuration alone."""
    from vllm.config import WeightTransferConfig

    on_cpu = device == "cpu"
    memory: dict[str, Any] = (
        {"kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30)}
        if on_cpu
        else {"gpu_memory_utilization": config.gpu_memory_fraction}
    )
    return {
        "dtype": dtype,
        "quantization": None if config.quantization == "off" else config.quantization,
        "skip_tokenizer_init": True,
        # Code of a model's directory is never run, whatever becomes vLLM's default.
        "trust_remote_code": False,
        "use_tqdm_on_load": False,
        # What the policy's log-probs at the rollout temperature are compared with.
        "logprobs_mode": "processed_logprobs",
        # A model's own sampling defaults (top_k, temperature) must not change the experiment.
        "generation_config": "vllm",
        "tensor_parallel_size": config.tensor_parallel,
        # Inside a Ray actor vLLM would otherwise place its workers through Ray.
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "max_num_seqs": config.max_concurrent_sequences,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "weight_transfer_config": WeightTransferConfig(backend=transport),
        "worker_extension_cls": "megatron_entropic.rollout.weight_inspection.WeightInspection",
        **memory,
    }


def _whole_prompts(max_model_tokens: int) -> dict[str, Any]:
    """Options that keep vLLM from cutting prompts into parts, which fails on a CPU for requests with a seed.

    vLLM draws a token for the unfinished prompt, throws it away and winds the request's generator back, which torch's
    CPU generators cannot do ("CPU Generator does not use offset").
    """
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_CPU_TOKENS_PER_FORWARD, max_model_tokens),
    }


def _response(output: Any, weights_version: int) -> Response:
    """Response of this package for vLLM's request output."""
    (completion,) = output.outputs
    tokens, logprobs = list(completion.token_ids), completion.logprobs
    # A request that was cut before its first token has no log-probs at all.
    assert not tokens or list(logprobs.token_ids) == tokens, "one log-prob for each sampled token"
    return Response(
        Segment(
            tokens=np.array(tokens, np.int32),
            logprobs=np.array(list(logprobs.logprobs) if tokens else [], np.float32),
            weights_version=weights_version,
        ),
        finish_reason=str(completion.finish_reason),
    )

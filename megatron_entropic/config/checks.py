"""Checks that need several values: combinations that cannot work on any machine.

Each check yields `Violation`s and names the keys it used, so that a verdict drawn from an unreadable value can be
dropped. Nothing here looks at the disk; `training/machine.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_entropic.config.algorithm import DistillationConfig
from megatron_entropic.config.base import Violation
from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.config.entropy_checks import entropy_violations
from megatron_entropic.config.names import (
    ADVANTAGES,
    ENVIRONMENTS,
    OFF,
    POLICY_LOSSES,
    TRANSPORTS,
    controller_entry,
    is_instant,
    transports_for,
    unknown_name,
)
from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.config.reward_checks import benchmark_violations, reward_violations
from megatron_entropic.config.run import Config, Device


def violations(config: Config) -> Iterator[Violation]:
    """Yields combinations that cannot work on any machine."""
    checks = (
        *(
            _batch,
            _lag,
            _parallelism,
            _lora,
            _optimizer,
            _data,
            reward_violations,
            environment_violations,
            _policy_loss,
        ),
        *(
            _distillation,
            entropy_violations,
            _placement,
            _colocation,
            _megatron_options,
            _transport,
            _publish,
            benchmark_violations,
        ),
    )
    for check in checks:
        yield from check(config)


def _batch(config: Config) -> Iterator[Violation]:
    rollout, algorithm, policy = config.rollout, config.algorithm, config.policy
    steps = algorithm.optimizer_steps_per_rollout
    if rollout.prompts_per_step % steps:
        yield Violation(
            ("rollout.prompts_per_step", "algorithm.optimizer_steps_per_rollout"),
            f"rollout.prompts_per_step={rollout.prompts_per_step} is not divisible by "
            f"algorithm.optimizer_steps_per_rollout={steps}: each optimizer step takes whole prompt groups",
        )
    elif config.sequences_per_optimizer_step < policy.data_parallel:
        yield Violation(
            ("rollout", "algorithm.optimizer_steps_per_rollout", "policy.data_parallel"),
            f"policy.data_parallel={policy.data_parallel} is more than the {config.sequences_per_optimizer_step} "
            "responses of an optimizer step: some replicas would have nothing to do",
        )
    if rollout.samples_per_prompt < 2:
        yield Violation(
            ("rollout.samples_per_prompt", "algorithm.advantage"),
            f"rollout.samples_per_prompt={rollout.samples_per_prompt}: algorithm.advantage={algorithm.advantage} "
            "compares the responses to one prompt and needs at least 2",
        )
    if config.warm_start.steps and config.warm_start.sequences_per_step < policy.data_parallel:
        yield Violation(
            ("warm_start.sequences_per_step", "policy.data_parallel"),
            f"warm_start.sequences_per_step={config.warm_start.sequences_per_step} is fewer than "
            f"policy.data_parallel={policy.data_parallel}",
        )


def _lag(config: Config) -> Iterator[Violation]:
    rollout = config.rollout
    if rollout.staleness_correction != "none" and not (rollout.lag and rollout.split_staleness):
        yield Violation(
            ("rollout.staleness_correction", "rollout.lag", "rollout.split_staleness"),
            f"rollout.staleness_correction={rollout.staleness_correction} needs rollout.lag > 0 and "
            "rollout.split_staleness=true: without them no token is stale, or nobody knows by how much",
        )
    if rollout.schedule_of is not None and not rollout.lag:
        yield Violation(
            ("rollout.schedule_of", "rollout.lag"),
            f"rollout.schedule_of={rollout.schedule_of} needs the rollout.lag of that run: with lag 0 there is none",
        )


def _parallelism(config: Config) -> Iterator[Violation]:
    policy = config.policy
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        yield Violation(
            ("policy.sequence_parallel", "policy.tensor_parallel"),
            "policy.sequence_parallel=true needs policy.tensor_parallel > 1: it splits activations over those ranks",
        )
    if policy.virtual_pipeline_parallel > 1 and policy.pipeline_parallel == 1:
        yield Violation(
            ("policy.virtual_pipeline_parallel", "policy.pipeline_parallel"),
            f"policy.virtual_pipeline_parallel={policy.virtual_pipeline_parallel} needs policy.pipeline_parallel > 1: "
            "stages take turns with their chunks",
        )
    if policy.fp8 != "off" and config.cluster.device == "cpu":
        yield Violation(
            ("policy.fp8", "cluster.device"), f"policy.fp8={policy.fp8} needs a GPU, but cluster.device is cpu"
        )
    if policy.fp8 != "off" and config.model.dtype == "float32":
        yield Violation(
            ("policy.fp8", "model.dtype"),
            f"policy.fp8={policy.fp8} needs model.dtype=bfloat16: what is not computed in 8 bits stays in 16",
        )
    if policy.output_head == "fused_loss" and not config.loss_adds_up_over_tokens:
        yield Violation(
            ("policy.output_head", "entropy_control", "algorithm.policy_loss"),
            "policy.output_head=fused_loss takes each token's gradient in the forward pass, but with "
            f"entropy_control.denominator={config.entropy_control.denominator}, feedback={config.feedback} and "
            f"algorithm.policy_loss={config.algorithm.policy_loss} "
            "a token's loss depends on the other tokens of its micro-batch: use auto or recompute",
        )


def _lora(config: Config) -> Iterator[Violation]:
    """Yields keys of adapters that have no use, modules that are named twice, and what adapters do not go with."""
    lora, key = config.policy.lora, "policy.lora"
    if not lora.enabled:
        # By value: a configuration that a run has written names every key.
        before, now = LoraConfig().model_dump(), lora.model_dump()
        if used := ", ".join(f"{key}.{name}" for name in sorted(now) if now[name] != before[name]):
            yield Violation((key,), f"{used} has no use with {key}.rank=0, which trains the weights themselves")
        return
    if twice := sorted({name for name in lora.target_modules if lora.target_modules.count(name) > 1}):
        yield Violation((f"{key}.target_modules",), f"{key}.target_modules names {', '.join(twice)} twice")
    if config.policy.fp8 != "off":
        yield Violation(
            (f"{key}.rank", "policy.fp8"),
            f"policy.fp8={config.policy.fp8} with {key}.rank={lora.rank}: 8-bit layers were not tried with adapters; "
            "use fp8=off",
        )


def _megatron_options(config: Config) -> Iterator[Violation]:
    """Yields what options of megatron-core need of other keys; what they need of the machine: `training.machine`."""
    policy, dtype, on_cpu = config.policy, config.model.dtype, config.cluster.device == "cpu"
    halved = {
        "policy.gradient_dtype": policy.gradient_dtype,
        "optimizer.state_dtype": config.optimizer.state_dtype,
    }
    for key, value in halved.items():
        if value == "bfloat16" and dtype != "bfloat16":
            yield Violation((key, "model.dtype"), f"{key}=bfloat16 needs model.dtype=bfloat16, it is {dtype}")
    if config.optimizer.state_dtype == "bfloat16":
        key = "optimizer.state_dtype"
        if on_cpu:
            yield Violation((key, "cluster.device"), f"{key}=bfloat16 needs a GPU, but cluster.device is cpu")
        if not policy.distributed_optimizer:
            yield Violation(
                (key, "policy.distributed_optimizer"),
                f"{key}=bfloat16 needs policy.distributed_optimizer=true: only that one of megatron-core has it",
            )
    if policy.moe_dispatcher != "alltoall":
        key, named = "policy.moe_dispatcher", f"policy.moe_dispatcher={policy.moe_dispatcher}"
        if on_cpu:
            yield Violation((key, "cluster.device"), f"{named} needs GPUs, but cluster.device is cpu")
        if policy.expert_parallel * policy.expert_tensor_size == 1:
            yield Violation(
                (key, "policy.expert_parallel"),
                f"{named} needs policy.expert_parallel > 1: on one rank there is nobody to send tokens to",
            )


def _publish(config: Config) -> Iterator[Violation]:
    if config.rollout.quantization != "off" and config.cluster.device == "cpu":
        yield Violation(
            ("rollout.quantization", "cluster.device"),
            f"rollout.quantization={config.rollout.quantization} needs a GPU, but cluster.device is cpu",
        )
    if config.rollout.quantization != "off" and config.cluster.check_weights:
        yield Violation(
            ("rollout.quantization", "cluster.check_weights"),
            f"cluster.check_weights=true with rollout.quantization={config.rollout.quantization}: engines do not hold "
            "the weights as they are sent",
        )


def _transport(config: Config) -> Iterator[Violation]:
    cluster, key = config.cluster, "cluster.transport"
    if problem := unknown_name(cluster.transport, ["auto", *TRANSPORTS]):
        yield Violation((key,), f"{key}={cluster.transport}: {problem}")
        return
    device: Device = "cuda" if cluster.device == "cuda" else "cpu"
    entry, others = TRANSPORTS.get(cluster.transport), transports_for("cuda", colocate=cluster.colocate)
    if entry is not None and entry.needs_gpu and device == "cpu":
        yield Violation(
            (key, "cluster.device"),
            f"{key}={cluster.transport} is for GPUs: set cluster.device=cuda, or {key}=auto",
        )
    if entry is not None and entry.colocated not in (None, cluster.colocate):
        yield Violation(
            (key, "cluster.colocate"),
            f"{key}={cluster.transport} {entry.why_colocated}: use {' or '.join(others)}",
        )
    transport = cluster.transport_on(device)
    if config.rollout.publish == "delta" and not TRANSPORTS[transport].delta:
        able = " or ".join(f"{key}={name}" for name in TRANSPORTS if TRANSPORTS[name].delta)
        yield Violation(
            ("rollout.publish", "cluster.device", key),
            f"rollout.publish=delta does not go over the transport here, {transport}: use full or {able}",
        )


def _optimizer(config: Config) -> Iterator[Violation]:
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield Violation(
            ("optimizer.min_learning_rate", "optimizer.learning_rate"),
            f"optimizer.min_learning_rate={optimizer.min_learning_rate:g} is above "
            f"optimizer.learning_rate={optimizer.learning_rate:g}",
        )


def _policy_loss(config: Config) -> Iterator[Violation]:
    """Yields problems of the loss: whether it exists, its numbers, and a layout that withholds tokens it looks at."""
    name, options = config.algorithm.policy_loss, config.algorithm.loss_options
    if problem := unknown_name(name, POLICY_LOSSES, own="module:function"):
        yield Violation(("algorithm.policy_loss",), f"algorithm.policy_loss={name!r}: {problem}")
    advantage = config.algorithm.advantage
    if problem := unknown_name(advantage, ADVANTAGES):
        yield Violation(("algorithm.advantage",), f"algorithm.advantage={advantage!r}: {problem}")
    for low, high in (("steer_weight_min", "steer_weight_max"), ("clip_cov_low", "clip_cov_high")):
        if getattr(options, low) > getattr(options, high):
            yield Violation(
                (f"algorithm.loss_options.{low}", f"algorithm.loss_options.{high}"),
                f"algorithm.loss_options.{low}={getattr(options, low):g} is above {high}={getattr(options, high):g}",
            )
    entry = POLICY_LOSSES.get(name)
    looks_further = entry is None or entry.whole_sequences or entry.plan
    if looks_further and config.policy.context_parallel > 1:
        yield Violation(
            ("algorithm.policy_loss", "policy.context_parallel"),
            f"algorithm.policy_loss={name} needs whole sequences, and policy.context_parallel="
            f"{config.policy.context_parallel} splits them over ranks: use 1",
        )


def _distillation(config: Config) -> Iterator[Violation]:
    distillation, control = config.algorithm.distillation, config.entropy_control
    key = "algorithm.distillation"
    if distillation.teacher_hf_dir is None and distillation != DistillationConfig():
        yield Violation((key,), f"{key} has no use without teacher_hf_dir, the directory of the teacher")
    if distillation.as_loss and distillation.reward_weight == 0 and control.enabled and control.steers_alpha:
        yield Violation(
            (key, "entropy_control.controller"),
            f"{key}: with term=loss and reward_weight=0 every advantage is 0, and alpha of entropy_control.controller="
            f"{control.controller} acts on advantages: take term=advantage, a reward_weight > 0, or a controller that "
            f"does without, such as {OFF} or entropy_bonus",
        )


def _data(config: Config) -> Iterator[Violation]:
    data = config.data
    if data.file_weights is not None and len(data.file_weights) != len(data.train_files):
        yield Violation(
            ("data.file_weights", "data.train_files"),
            f"data.file_weights has {len(data.file_weights)} numbers for {len(data.train_files)} data.train_files",
        )
    if data.pass_rate_min > data.pass_rate_max:
        yield Violation(
            ("data.pass_rate_min", "data.pass_rate_max"),
            f"data.pass_rate_min={data.pass_rate_min:g} is above data.pass_rate_max={data.pass_rate_max:g}",
        )
    if data.pass_rates is None and data.order == "easy_to_hard":
        yield Violation(
            ("data.order", "data.pass_rates"),
            "data.order=easy_to_hard needs data.pass_rates, a file of recorded responses",
        )
    if data.pass_rates is None and (data.pass_rate_min > 0 or data.pass_rate_max < 1):
        yield Violation(
            ("data.pass_rates", "data.pass_rate_min", "data.pass_rate_max"),
            "data.pass_rate_min and pass_rate_max need data.pass_rates, a file of recorded responses",
        )


def environment_violations(config: Config) -> Iterator[Violation]:
    """Yields environments that do not exist, and limits that cannot be reached or have no use."""
    environment, longest = config.environment, config.rollout.max_response_tokens
    if environment.name is None:
        before, now = EnvironmentConfig().model_dump(), environment.model_dump()
        if used := ", ".join(f"environment.{key}" for key in now if now[key] != before[key]):
            yield Violation(("environment.name",), f"{used} has no use without environment.name")
        return
    if problem := unknown_name(environment.name, ENVIRONMENTS, own="module:Class"):
        yield Violation(("environment.name",), f"environment.name={environment.name!r}: {problem}")
    if (environment.max_turn_tokens or 0) > longest:
        yield Violation(
            ("environment.max_turn_tokens", "rollout.max_response_tokens"),
            f"environment.max_turn_tokens={environment.max_turn_tokens} is more than rollout.max_response_tokens="
            f"{longest}, which counts all turns and what the environment writes between them",
        )


def _placement(config: Config) -> Iterator[Violation]:
    spare, nodes = config.cluster.spare_nodes, config.cluster.nodes
    if spare and spare >= len(nodes):
        yield Violation(
            ("cluster.spare_nodes", "cluster.nodes"),
            f"cluster.spare_nodes={spare}, but cluster.nodes names {len(nodes)}: it has to name all nodes, the spare "
            "ones among them, as slurm/launch.sh does",
        )
    per_node, ranks = config.cluster.policy_ranks_per_node, config.policy.world_size
    touched = ("cluster.policy_ranks_per_node", "policy")
    if per_node is not None and ranks % per_node:
        yield Violation(touched, f"cluster.policy_ranks_per_node={per_node} does not divide {ranks} policy ranks")
    if per_node is not None and per_node < ranks and config.cluster.address == "local":
        yield Violation(
            touched, f"cluster.policy_ranks_per_node={per_node}: {ranks} ranks need several nodes, a local run has one"
        )


def _colocation(config: Config) -> Iterator[Violation]:
    if not config.cluster.colocate:
        return
    rollout, ranks, key = config.rollout, config.policy.world_size, "cluster.colocate"
    if config.policy.offload != "all":
        yield Violation(
            (key, "policy.offload"),
            f"{key}=true needs policy.offload=all: engines generate in the memory of the policy",
        )
    touched = (key, "rollout.engines", "rollout.tensor_parallel", "policy")
    if ranks % rollout.tensor_parallel:
        yield Violation(
            touched,
            f"{key}=true: an engine shares the devices of rollout.tensor_parallel={rollout.tensor_parallel} policy "
            f"ranks, which does not divide the {ranks} that there are",
        )
    if rollout.engines * rollout.tensor_parallel > ranks:
        yield Violation(
            touched,
            f"{key}=true: rollout.engines={rollout.engines} of {rollout.tensor_parallel} devices each, but there are "
            f"{ranks} policy ranks to share devices with",
        )
    if config.cluster.policy_ranks_per_node is not None:
        yield Violation(
            (key, "cluster.policy_ranks_per_node"),
            f"{key}=true fills nodes one after the other; cluster.policy_ranks_per_node must be null",
        )


# Combinations that work, though perhaps not as meant.


def config_warnings(config: Config) -> list[str]:
    """One sentence for each combination that works, though perhaps not as meant, to be shown before the start."""
    rollout, control = config.rollout, config.entropy_control
    longest = config.max_sequence_tokens
    found = []
    if config.policy.tokens_per_microbatch < longest:
        found.append(
            f"policy.tokens_per_microbatch={config.policy.tokens_per_microbatch} is below the longest sequence "
            f"({longest} tokens): such a sequence is a micro-batch of its own and needs the memory of {longest} tokens"
        )
    if rollout.top_p < 1 or rollout.top_k > 0:
        found.append(
            "rollout.top_p or rollout.top_k cuts the sampling distribution: the engine's log-probs are those of the "
            "cut distribution, so mismatch/* and the importance ratios compare different things"
        )
    reads_target = control.enabled and controller_entry(control.controller).reads_target
    if reads_target and "target" not in control.model_fields_set:
        found.append(
            f"entropy_control.target is not set: {control.target:g} nats is what the paper took for its models; a "
            "multiple of the entropy that is measured first fits any, such as 0.7x"
        )
    if late := [step for step in config.train.record_steps if step > config.train.steps]:
        found.append(f"train.record_steps: {late} come after the last step, {config.train.steps}")
    if control.controller == "pi" and control.kp == 0 and control.ki == 0:
        found.append("entropy_control.kp and ki are both 0: the controller does nothing")
    if control.controller == "adapo" and config.algorithm.updates_per_rollout == 1 and not rollout.lag:
        found.append(
            "entropy_control.controller=adapo moves the clip, and with one optimizer step per rollout nothing is "
            "clipped: the controller does nothing"
        )
    if control.enabled and config.feedback == "score_pass" and config.algorithm.updates_per_rollout > 1:
        found.append(
            "entropy_control.feedback=score_pass with several optimizer steps per rollout: "
            "all of them see the entropy of before the first"
        )
    found += _short_schedules(config)
    if config.algorithm.policy_loss == "gspo" and config.algorithm.aggregation != "seq-mean-token-mean":
        found.append(
            f"algorithm.policy_loss=gspo with aggregation={config.algorithm.aggregation}: the paper's is "
            "seq-mean-token-mean"
        )
    if config.algorithm.proximal_logprobs == "each_epoch" and rollout.importance_correction == "none":
        found.append(
            "algorithm.proximal_logprobs=each_epoch without rollout.importance_correction: nothing accounts for the "
            "distance between the policy that sampled and the one before each epoch"
        )
    if rollout.lag and rollout.importance_correction == rollout.staleness_correction == "none":
        found.append(
            f"rollout.lag={rollout.lag} without rollout.importance_correction or staleness_correction: nothing "
            "accounts for the distance between the policy and the older ones that sampled"
        )
    if rollout.quantization != "off" and rollout.importance_correction == "none":
        found.append(
            f"rollout.quantization={rollout.quantization} without rollout.importance_correction: responses come from "
            "the rounded policy, tis is recommended"
        )
    if config.reward.workers == 0 and not is_instant(config.reward.verifier, config.reward.answer):
        found.append("reward.workers=0: the verifier runs in the driver, and no time limit protects the run from it")
    if config.algorithm.kl.coefficient == 0 and config.algorithm.kl.reference_hf_dir is not None:
        found.append("algorithm.kl.reference_hf_dir is not used: algorithm.kl.coefficient is 0")
    if rollout.prompts_per_step * rollout.samples_per_prompt < rollout.engines:
        found.append(f"rollout.engines={rollout.engines}: more engines than responses in a step")
    idle = config.policy.world_size - rollout.engines * rollout.tensor_parallel
    if config.cluster.colocate and idle > 0:
        found.append(f"cluster.colocate=true: {idle} of {config.policy.world_size} devices stand still during rollouts")
    if config.cluster.device == "cpu" and rollout.enforce_eager is False:
        found.append("rollout.enforce_eager=false on a CPU: engines start minutes later and are hardly faster")
    if config.cluster.device == "cpu" and "gpu_memory_fraction" in rollout.model_fields_set:
        found.append("rollout.gpu_memory_fraction is not used on a CPU; rollout.kv_cache_gb decides there")
    return found


def _short_schedules(config: Config) -> Iterator[str]:
    """Yields a sentence for each schedule of entropy control that looks as if it were written in rollouts."""
    control, updates = config.entropy_control, config.algorithm.updates_per_rollout
    schedules = {
        "target_schedule.steps": control.target_schedule.steps * (control.target_schedule.kind != "constant"),
        "gain_schedule.steps": control.gain_schedule.steps * (control.gain_schedule.kind != "constant"),
        "rivals.entrocraft_steps": control.rivals.entrocraft_steps * (control.controller == "entrocraft"),
    }
    for name, steps in schedules.items():
        if control.enabled and updates > 1 and 0 < steps <= config.train.steps:
            yield (
                f"entropy_control.{name}={steps} counts optimizer steps, {updates} a rollout: it ends with step "
                f"{-(-steps // updates)} of {config.train.steps}; for the whole run take {config.train.steps * updates}"
            )

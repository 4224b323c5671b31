"""Combinations that work, though perhaps not as meant."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_entropic.config.names import verifier_entry
from megatron_entropic.config.run import Config


def config_warnings(config: Config) -> list[str]:
    """One sentence for each of them, to be shown before the start."""
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
    if control.enabled and "target" not in control.model_fields_set:
        found.append(
            f"entropy_control.target is not set: {control.target:g} nats is what the paper took for its models; a "
            "multiple of the entropy that is measured first fits any, such as 0.7x"
        )
    if late := [step for step in config.train.record_steps if step > config.train.steps]:
        found.append(f"train.record_steps: {late} come after the last step, {config.train.steps}")
    if control.controller == "pi" and control.kp == 0 and control.ki == 0:
        found.append("entropy_control.kp and ki are both 0: the controller does nothing")
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
    if rollout.quantization != "off" and rollout.importance_correction == "none":
        found.append(
            f"rollout.quantization={rollout.quantization} without rollout.importance_correction: responses come from "
            "the rounded policy, tis is recommended"
        )
    if config.reward.workers == 0 and not verifier_entry(config.reward.verifier).instant:
        found.append("reward.workers=0: the verifier runs in the driver, and no time limit protects the run from it")
    if config.algorithm.kl.coefficient == 0 and config.algorithm.kl.reference_hf_dir is not None:
        found.append("algorithm.kl.reference_hf_dir is not used: algorithm.kl.coefficient is 0")
    if rollout.prompts_per_step * rollout.samples_per_prompt < rollout.engines:
        found.append(f"rollout.engines={rollout.engines}: more engines than responses in a step")
    idle = config.policy.world_size - rollout.engines
    if config.cluster.colocate and idle > 0:
        found.append(f"cluster.colocate=true: {idle} of {config.policy.world_size} devices stand still during rollouts")
    if config.cluster.device == "cpu" and rollout.enforce_eager is False:
        found.append("rollout.enforce_eager=false on a CPU: engines start minutes later and are hardly faster")
    if config.cluster.device == "cpu" and "gpu_memory_fraction" in rollout.model_fields_set:
        found.append("rollout.gpu_memory_fraction is not used on a CPU; rollout.kv_cache_gb decides there")
    return found


def _short_schedules(config: Config) -> Iterator[str]:
    """Schedules of entropy control that look as if they were written in rollouts."""
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

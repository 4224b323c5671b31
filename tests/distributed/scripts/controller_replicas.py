"""Entropy control over several layouts: what each rank held, and what happened when one rank was led astray.

Usage: controller_replicas.py MODEL_DIR SEQUENCES_PT
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from policy_ranks import RANK, ProcessGroups, hf_gradients, replica_part

from megatron_entropic.policy.policy import Policy
from megatron_entropic.policy.step.control import EntropyControl, MicrobatchLocalControl
from megatron_entropic.types import Sequence

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {},
}
CONTROL = {"target": 4.0, "kp": 0.1, "ki": 0.03, "tau": 0.02}
SMALL = 50


def load(path: Path, advantages: bool = True) -> list[Sequence]:
    """The batch; without advantages all are 0."""
    return [
        Sequence(
            torch.tensor(field["tokens"]),
            field["prompt_length"],
            advantages=field["advantages"] * float(advantages),
            old_logprobs=field["old_logprobs"],
        )
        for field in torch.load(path)
    ]


def digest(policy: Policy) -> list[str]:
    """All parameters and Adam moments of this rank, exactly."""
    tensors = [parameter.detach() for parameter in policy.model.parameters()]
    for part in policy.optimizer.megatron.chained_optimizers:
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
    return [tensor.double().sum().item().hex() + tensor.double().norm().item().hex() for tensor in tensors]


def exact(metrics: dict[str, float]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in metrics.items()}


def several_steps(policy: Policy, part: list[Sequence]) -> list[dict[str, str]]:
    """Three optimizer steps on one scored batch."""
    policy.score(part)
    return [exact(policy.update(part)) for _ in range(3)]


def refused_step(policy: Policy, part: list[Sequence]) -> dict[str, Any]:
    """A step whose loss is not finite on one replica only, then a good one."""
    policy.score(part)
    policy.update(part)
    before, control = digest(policy), policy._control.state_dict()
    steps = policy.optimizer.steps_taken
    bad = part
    if policy.parallel.data_rank == policy.parallel.data_size - 1:
        bad = [replace(part[0], advantages=torch.full_like(part[0].advantages, torch.inf)), *part[1:]]
    refused = policy.update(bad)
    untouched = digest(policy) == before and policy.optimizer.steps_taken == steps
    held = policy._control.state_dict()["controller"]["acc"] == control["controller"]["acc"]
    after = policy.update(part)
    return {
        "refused": refused["optimizer/skipped"],
        "untouched": untouched,
        "integral held": held,
        "next refused": after["optimizer/skipped"],
        "next moved": digest(policy) != before,
        "next": exact(after),
    }


def led_astray(policy: Policy, part: list[Sequence]) -> str:
    """The message of a rank after rank 1's integral was changed in its last bit."""
    policy.score(part)
    if RANK == 1:
        controller = policy._control.controller
        controller.acc = math.nextafter(controller.acc, math.inf)
    try:
        policy.update(part)
    except RuntimeError as error:
        return str(error)
    return ""


def no_advantage(policy: Policy, part: list[Sequence]) -> dict[str, str]:
    """A step in which every advantage is 0."""
    policy.score(part)
    return exact(policy.update(part))


def lonely(policy: Policy, part: list[Sequence]) -> dict[str, Any]:
    """A batch of one sequence: some replica has nothing to do."""
    policy.score(part)
    return {"sequences": len(part), "metrics": exact(policy.update(part))}


def control_off(rendezvous: ProcessGroups, layout: dict[str, Any], model: Path, data: Path) -> dict[str, Any]:
    """Gradients with the controller off, and with one whose alpha is 0, must be the same bits."""
    found = {}
    entropy_was_computed = {}
    for name, control in {"off": {"controller": "off"}, "zero": {"kp": 0.0, "ki": 0.0}}.items():
        plain = {**layout, "distributed_optimizer": False, "tokens_per_microbatch": SMALL}
        sections = {"entropy_control": control, "optimizer": {"gradient_clip": 0.0}}
        with rendezvous.policy(model, policy=plain, **sections) as policy:
            part = replica_part(policy, load(data))
            policy.score(part)
            seen = []
            run = policy._machinery.run

            def spy(batch, share, options, *others, run=run, seen=seen, **named):
                def watched(micro_batch, statistics):
                    seen.append(options.entropy or statistics.entropies is not None)
                    return share(micro_batch, statistics)

                return run(batch, watched, options, *others, **named)

            policy._machinery.run = spy
            metrics = policy.update(part)
            entropy_was_computed[name] = any(seen)
            found[name] = (metrics, hf_gradients(policy))
    off, zero = found["off"], found["zero"]
    return {
        "same loss": off[0]["loss/policy"] == zero[0]["loss/policy"] and off[0]["loss/entropic"] == 0.0,
        "same gradients": all(torch.equal(off[1][name], zero[1][name]) for name in off[1]),
        "entropy computed": entropy_was_computed["off"],
        "entropy reported": off[0]["entropy/mean"] == zero[0]["entropy/mean"],
    }


def reference(rendezvous: ProcessGroups, layout: dict[str, Any], model: Path, data: Path) -> dict[str, bool]:
    """The reference keeps the starting weights while the policy moves."""
    sections = {"algorithm": {"kl": {"coefficient": 0.1}}, "optimizer": {"learning_rate": 1e-3}}
    with rendezvous.policy(model, policy={**layout, "tokens_per_microbatch": SMALL}, **sections) as policy:
        part = replica_part(policy, load(data))
        before = policy.score(part, frozen="reference")
        same = policy.score(part)
        part = [replace(sequence, reference_logprobs=sequence.old_logprobs) for sequence in part]
        policy.update(part)
        after, moved = policy.score(part, frozen="reference"), policy.score(part)
        if before is None or same is None or after is None or moved is None:
            assert not policy.parallel.reports
            return {}
        return {
            # Not bit for bit: the policy's parameters lie in one buffer, and matrix products look at their alignment.
            "starts equal": all(
                torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(before.logprobs, same.logprobs, strict=True)
            ),
            "stays": all(map(torch.equal, before.logprobs, after.logprobs)),
            "policy moved": all(
                float((a - b).abs().max()) > 1e-3 for a, b in zip(moved.logprobs, same.logprobs, strict=True)
            ),
        }


def microbatch_local(policy: Policy, part: list[Sequence]) -> dict[str, Any]:
    """Alphas of the published arithmetic on this rank, recorded as they are applied."""
    assert isinstance(policy._control, MicrobatchLocalControl)
    controller = policy._control.controller
    applied: list[tuple[float, int, int, float]] = []
    step = controller.step

    def recording(entropy_mean: float, n_sequences: int, minibatch_sequences: int) -> float:
        alpha = step(entropy_mean, n_sequences, minibatch_sequences)
        applied.append((entropy_mean, n_sequences, minibatch_sequences, alpha))
        return alpha

    controller.step = recording  # type: ignore[method-assign]
    metrics = [policy.update(part) for _ in range(2)]
    return {
        "applied": applied,
        "integral": controller.integral,
        "sequences": len(part),
        "metrics": [exact(m) for m in metrics],
    }


def main(model: Path, data: Path) -> None:
    rendezvous = ProcessGroups()
    report: dict[str, Any] = {}
    small = {"tokens_per_microbatch": SMALL}
    for name, layout in LAYOUTS.items():
        for feedback in ("score_pass", "previous_step"):
            sections = {"policy": {**layout, **small}, "entropy_control": {**CONTROL, "feedback": feedback}}
            with rendezvous.policy(model, optimizer={"learning_rate": 1e-3}, **sections) as policy:
                assert isinstance(policy._control, EntropyControl)
                report[f"{name}/{feedback}"] = several_steps(policy, replica_part(policy, load(data)))
                if feedback == "previous_step":
                    report[f"{name}/refused"] = refused_step(policy, replica_part(policy, load(data)))
                    report[f"{name}/no advantage"] = no_advantage(policy, replica_part(policy, load(data, False)))
                    report[f"{name}/astray"] = led_astray(policy, replica_part(policy, load(data)))
        with rendezvous.policy(model, policy={**layout, **small}, entropy_control=CONTROL) as policy:
            report[f"{name}/lonely"] = lonely(policy, replica_part(policy, load(data)[3:4]))
        report[f"{name}/off"] = control_off(rendezvous, layout, model, data)
        report[f"{name}/reference"] = reference(rendezvous, layout, model, data)
        local = {**CONTROL, "feedback": "microbatch_local", "denominator": "high_prob_tokens"}
        with rendezvous.policy(model, policy={**layout, **small}, entropy_control=local) as policy:
            report[f"{name}/local"] = microbatch_local(policy, replica_part(policy, load(data)))
            report[f"{name}/local"]["is last stage"] = policy.parallel.is_last_stage
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

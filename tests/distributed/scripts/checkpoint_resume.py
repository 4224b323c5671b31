"""Trains on, in the same process or from a checkpoint, and reports every bit that a resume must bring back.

Usage: checkpoint_resume.py train|resume|fail WORK_DIR RUNS_JSON

WORK_DIR holds a model for each family and sequences.pt; a run is {"name", "checkpoint", "layout", "dtype", "family"}.
`train` writes checkpoints that `resume` reads in other processes; both then take the same STEPS_AFTER steps.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from policy_ranks import RANK, ProcessGroups, adapter_parameters, hf_parameters, replica_part

from megatron_entropic.errors import RunError
from megatron_entropic.policy.policy import Policy
from megatron_entropic.policy.state import checkpoint, checkpoint_writer
from megatron_entropic.types import Sequence

STEPS_BEFORE, STEPS_AFTER = 2, 2
SECTIONS: dict[str, dict[str, Any]] = {
    "optimizer": {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "schedule": "linear",
        "warmup_steps": 3,
        "epsilon": 1e-5,
    },
    "train": {"steps": 9},
    "warm_start": {"steps": 1, "file": "unused", "learning_rate": 2e-3, "warmup_steps": 0},
    "entropy_control": {"target": 4.0, "kp": 0.1, "ki": 0.03, "tau": 0.02, "feedback": "previous_step"},
    "checkpoint": {"keep_last": 2},
}


def sections(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    layout = {"tokens_per_microbatch": 50, **run["layout"]}
    control = {**SECTIONS["entropy_control"], **run.get("control", {})}
    saving = {**SECTIONS["checkpoint"], "asynchronous": run.get("asynchronous", True)}
    saving["format"] = run.get("format", "dp_reshardable")
    model = {"dtype": run["dtype"]}
    return {**SECTIONS, "policy": layout, "model": model, "entropy_control": control, "checkpoint": saving}


def load_sequences(work: Path) -> list[Sequence]:
    return [
        Sequence(
            torch.tensor(field["tokens"]),
            field["prompt_length"],
            advantages=field["advantages"],
            old_logprobs=field["old_logprobs"],
        )
        for field in torch.load(work / "sequences.pt")
    ]


def steps(policy: Policy, part: list[Sequence], count: int) -> list[dict[str, str]]:
    trace = []
    for _ in range(count):
        policy.score(part)
        trace.append({name: float(value).hex() for name, value in policy.update(part).items()})
    return trace


def random_numbers() -> list[float]:
    """The next numbers of both generators."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(3).tolist()
    return tracked + torch.rand(3).tolist()


def adam_steps(policy: Policy) -> list[float]:
    """Step counts of all parameters of this rank."""
    parts = policy.optimizer.megatron.chained_optimizers
    return sorted({float(state["step"]) for part in parts for state in part.optimizer.state.values()})


def train(work: Path, run: dict[str, Any], rendezvous: ProcessGroups) -> dict[str, Any]:
    """Warm start, STEPS_BEFORE updates, a checkpoint, and on without a break."""
    with rendezvous.policy(work / run["family"], **sections(run)) as policy:
        part = replica_part(policy, load_sequences(work))
        policy.warm_start_step(part)
        policy.begin_reinforcement_learning()
        steps(policy, part, STEPS_BEFORE)
        torch.rand(RANK + 2)
        path = checkpoint.checkpoint_path(work / run["checkpoint"], STEPS_BEFORE)
        policy.save_checkpoint(path, {"position": STEPS_BEFORE, "rank 0": [0.1, None]})
        # Written while these steps change what is saved.
        report = went_on(policy, part, work / f"{run['name']}.train.pt")
        policy.check_checkpoint(wait=True)
        policy.export_hf(work / f"{run['name']}.hf")
        policy.score(part)
        assert policy._scored is not None
        return {**report, "entropy of the exported": policy._scored.mean}


def resume(work: Path, run: dict[str, Any], rendezvous: ProcessGroups) -> dict[str, Any]:
    """The same from the checkpoint."""
    with rendezvous.policy(work / run["family"], **sections(run)) as policy:
        part = replica_part(policy, load_sequences(work))
        latest = checkpoint.latest_checkpoint(work / run["checkpoint"])
        assert latest is not None
        driver_state = policy.load_checkpoint(latest)
        assert driver_state == {"position": STEPS_BEFORE, "rank 0": [0.1, None]}
        return went_on(policy, part, work / f"{run['name']}.resume.pt")


def went_on(policy: Policy, part: list[Sequence], saved_path: Path) -> dict[str, Any]:
    before = adam_steps(policy)
    trained = adapter_parameters if policy.config.policy.lora.enabled else hf_parameters
    parameters_before = trained(policy)
    numbers = random_numbers()
    trace = steps(policy, part, STEPS_AFTER)
    parameters = trained(policy)
    if RANK == 0:
        torch.save({"before": parameters_before, "after": parameters}, saved_path)
    return {"trace": trace, "random": numbers, "adam steps": [before, adam_steps(policy)]}


def fail(work: Path, run: dict[str, Any], rendezvous: ProcessGroups) -> dict[str, Any]:
    """Saves that cannot succeed, on each rank in turn, then one that does."""
    root = work / run["checkpoint"]
    report: dict[str, Any] = {}
    with rendezvous.policy(work / run["family"], **sections(run)) as policy:
        part = replica_part(policy, load_sequences(work))
        policy.warm_start_step(part)
        policy.begin_reinforcement_learning()
        policy.save_checkpoint(checkpoint.checkpoint_path(root, 1), {"step": 1})
        policy.check_checkpoint(wait=True)
        steps(policy, part, 1)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        for rank in (0, 1):
            if rank == RANK:
                resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
            report[f"rank {rank} cannot write"] = refused(policy, root)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        if RANK == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
        report["rank 0 cannot write or remove"] = refused_and_kept(policy, root)
        report["export"] = refused_export(policy, work / "exported")
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        margin, checkpoint_writer.SPACE_MARGIN_BYTES = checkpoint_writer.SPACE_MARGIN_BYTES, 2**60
        report["disk too small"] = refused(policy, root)
        checkpoint_writer.SPACE_MARGIN_BYTES = margin
        for step in (3, 4):
            policy.save_checkpoint(checkpoint.checkpoint_path(root, step), {"step": step})
        policy.check_checkpoint(wait=True)
        report["kept"] = sorted(path.name for path in root.iterdir())
        report["trace"] = steps(policy, part, 1)
    return report


def refused(policy: Policy, root: Path) -> list[Any]:
    """(message, what lies in the folder, which checkpoint counts) after a save that must fail."""
    try:
        policy.save_checkpoint(checkpoint.checkpoint_path(root, 2), {"step": 2})
        policy.check_checkpoint(wait=True)
    except checkpoint.CheckpointError as error:
        latest = checkpoint.latest_checkpoint(root)
        assert latest is not None
        return [str(error), sorted(path.name for path in root.iterdir()), checkpoint.read_state(latest)["state"]]
    return ["nothing was raised", [], {}]


def refused_and_kept(policy: Policy, root: Path) -> list[Any]:
    """As `refused`, in a folder from which nothing can be removed, as in one that has become read-only."""

    def refuse(directory: Path) -> None:
        raise PermissionError(13, "Permission denied", str(directory))

    removing, checkpoint_writer.discard = checkpoint_writer.discard, refuse
    try:
        return refused(policy, root)
    finally:
        checkpoint_writer.discard = removing


def refused_export(policy: Policy, output_dir: Path) -> list[Any]:
    """(message, whether anything is there) after an export that must fail."""
    try:
        policy.export_hf(output_dir)
    except RunError as error:
        return [str(error), output_dir.exists()]
    return ["nothing was raised", output_dir.exists()]


def main(mode: str, work: Path, runs: list[dict[str, Any]]) -> None:
    rendezvous = ProcessGroups()
    action = {"train": train, "resume": resume, "fail": fail}[mode]
    sys.stdout.write(json.dumps({run["name"]: action(work, run, rendezvous) for run in runs}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))

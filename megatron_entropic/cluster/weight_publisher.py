"""The meeting point of policy and engines: publishing weights."""

from __future__ import annotations

from typing import Any

from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.waiting import gather
from megatron_entropic.config import ClusterConfig
from megatron_entropic.errors import RunError
from megatron_entropic.weights.checksums import mismatches


class WeightPublisher:
    """Brings the policy's weights into all engines: both sides work at the same time, both are awaited."""

    def __init__(self, policy: PolicyGroup, engines: EngineGroup, config: ClusterConfig) -> None:
        """Connect both sides once; the connection serves every later `publish`."""
        self._policy = policy
        self._engines = engines
        self._timeout_s = config.publish_timeout_s
        self._check = config.check_weights
        senders = policy.open_transport(engines.workers)
        calls = policy.accept_receivers() | engines.connect(senders)
        gather(calls, phase="publish: connect", timeout_s=self._timeout_s)
        self._plan = policy.publish_plan()

    def publish(self, version: int) -> dict[str, float]:
        """Send the current weights as `version`; afterwards every engine samples from them.

        Returns:
            weights/published_fraction: elements that travelled over all elements (below 1 with rollout.publish=delta).

        Raises:
            PhaseTimeout, PeerDied, RunError: naming the rank or engine and the phase; with cluster.check_weights also
                every tensor that is not in an engine as it was sent.
        """
        phase = f"publish (weights version {version})"
        sending = self._policy.publish()
        answers = gather(sending | self._engines.receive(self._plan, version), phase=phase, timeout_s=self._timeout_s)
        published = [answers[rank] for rank in sending]
        if self._check:
            self._compare(phase, published)
        elements = sum(part.elements for part in published)
        return {"weights/published_fraction": sum(part.sent_elements for part in published) / elements}

    def _compare(self, phase: str, published: list[Any]) -> None:
        pieces = gather(self._engines.weight_pieces(), phase=f"{phase}: check", timeout_s=self._timeout_s)
        sent = {name: checksum for part in published for name, checksum in part.checksums.items()}
        if problems := mismatches(sent, pieces):
            raise RunError(f"{phase}: {len(problems)} tensors are not as they were sent:\n  " + "\n  ".join(problems))

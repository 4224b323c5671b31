"""Publishing of weights, for which policy and engines work at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.waiting import gather
from megatron_entropic.config.run import ClusterConfig
from megatron_entropic.errors import PeerDied, RunError
from megatron_entropic.weight_sync.checksums import mismatches
from megatron_entropic.weight_sync.plan import PublishPlan

T = TypeVar("T")


class WeightPublisher:
    """Brings the policy's weights into all engines: both sides work at the same time, both are awaited."""

    def __init__(self, policy: PolicyGroup, engines: EngineGroup, config: ClusterConfig) -> None:
        """Prepare to publish: the first `publish` connects both sides, until an engine is replaced."""
        self._policy = policy
        self._engines = engines
        self._timeout_s = config.publish_timeout_s
        self._check = config.check_weights
        self._replaces_engines = not config.colocate  # there is no room for an engine to load beside the policy
        self.version = 0
        """Version of the weights that were sent last."""
        self._connected = False
        self._plan: PublishPlan | None = None

    def renew(self) -> None:
        """Connect both sides again and send the current weights once more, after engines were replaced."""
        self._connected = False
        self._survive(self._publish)

    def publish(self, version: int) -> dict[str, float]:
        """Send the current weights as `version`; afterwards every engine samples from them.

        An engine that is lost meanwhile is replaced, and all are sent the weights again.

        Returns:
            weights/published_fraction: elements that travelled over all elements (below 1 with rollout.publish=delta).

        Raises:
            PhaseTimeout, PeerDied, RunError: naming the rank or engine and the phase; with cluster.check_weights also
                every tensor that is not in an engine as it was sent.
        """
        self.version = version
        return self._survive(self._publish)

    def _survive(self, action: Callable[[], T]) -> T:
        """Return the result of `action`, called again as long as engines are lost in it and may be replaced."""
        while True:
            try:
                return action()
            except PeerDied as error:
                lost = self._engines.find_lost(error) if self._replaces_engines else {}
                if not lost:
                    raise
                self._connected = False
                self._engines.replace(lost)

    def _connect(self) -> None:
        senders = self._policy.open_transport(self._engines.workers)
        calls = self._policy.accept_receivers() | self._engines.connect(senders)
        gather(calls, phase="publish: connect", timeout_s=self._timeout_s)
        self._connected = True

    def _publish(self) -> dict[str, float]:
        if not self._connected:
            self._connect()
        if self._plan is None:
            self._plan = self._policy.publish_plan()
        version = self.version
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

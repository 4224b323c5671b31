"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config import ClusterConfig

# Before any test imports Ray: the sessions of this process are private ones.
prepare_ray_environment(ClusterConfig())

# The same examples every time, and no time limit for one: the machine may be busy with another test's processes.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

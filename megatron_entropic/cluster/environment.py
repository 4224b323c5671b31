"""Ray's switches for a private local session. Ray reads them when it is imported, so this comes first."""

from __future__ import annotations

import os
import secrets
import sys

import psutil

from megatron_entropic.config.run import ClusterConfig
from megatron_entropic.errors import RunError

_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Ray's own switch for single-machine use: every server binds to 127.0.0.1 instead of an interface address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def prepare_ray_environment(config: ClusterConfig) -> None:
    """Set the environment of this process, and so of every process that Ray will start from it.

    A local session gets a token of its own and listens on loopback only; a cluster that is joined keeps the user's
    settings.

    Raises:
        RunError: Ray was imported before, so the settings would come too late.
    """
    if config.address != "local":
        return
    if "ray" in sys.modules and not is_prepared():
        raise RunError("prepare_ray_environment must run before ray is imported in this process")
    os.environ.update(_LOCAL, RAY_AUTH_TOKEN=secrets.token_hex(32))


def is_prepared() -> bool:
    """Whether this process has the settings of a private session."""
    return all(os.environ.get(name) == value for name, value in _LOCAL.items()) and "RAY_AUTH_TOKEN" in os.environ


# Which network interface the collectives of this process use.


def use_interface_of(address: str) -> None:
    """Point gloo and NCCL's bootstrap to the interface with `address`, unless the environment names another.

    Left alone, gloo takes the address that the host's own name resolves to, which is 127.0.1.1 on many systems and
    nothing at all on others. To be called before the process group is made.

    Raises:
        RunError: no interface has the address.
    """
    name = interface_of(address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # "=" asks for exactly this name; NCCL would take every interface whose name begins with it.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface_of(address: str) -> str:
    """Name of this machine's interface with the given IP address.

    Raises:
        RunError: there is none; lists those there are.
    """
    addresses = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    if address not in addresses:
        found = ", ".join(f"{name} {other}" for other, name in sorted(addresses.items()))
        raise RunError(f"no network interface has the address {address}, by which Ray knows this node; found {found}")
    return addresses[address]

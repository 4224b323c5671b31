"""Which network interface the collectives of this process use."""

from __future__ import annotations

import os

import psutil

from megatron_entropic.errors import RunError


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

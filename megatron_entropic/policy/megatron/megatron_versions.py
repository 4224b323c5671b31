"""Which megatron-core versions the policy knows: 0.16 (Python 3.11) to 0.19 (Python 3.12)."""

from __future__ import annotations

from importlib import metadata

from megatron_entropic.errors import UserError

OLDEST = (0, 16)
NEWEST = (0, 19)


def check_megatron_version(version: str) -> tuple[int, int]:
    """(major, minor) of a supported megatron-core version.

    The policy overrides private parts of megatron-core and, on a CPU, replaces literals in its functions; both were
    checked against these versions only, so another one is refused rather than tried.

    Raises:
        UserError: any other version.
    """
    parts = version.split(".")
    try:
        found = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError) as error:
        raise UserError(f"megatron-core {version!r}: not a version number") from error
    if not OLDEST <= found <= NEWEST:
        raise UserError(
            f"megatron-core {version} is not supported: megatron_entropic works with {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]}. Install megatron-core==0.16.1 (Python 3.11) or 0.19.2 (Python 3.12)."
        )
    return found


def installed_megatron_version() -> str:
    """Version of the installed megatron-core, read from its package metadata without importing it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise UserError("megatron-core is not installed: pip install megatron-core==0.16.1 (Python 3.11)") from error

"""`python -m megatron_entropic`, and what the installed command calls: the command line."""

from __future__ import annotations

import sys


def run() -> int:
    """The command line; where only the parts for other trainers are installed, the words for what is missing."""
    try:
        from megatron_entropic.cli import main

        return main()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("megatron_entropic"):
            raise
        sys.stderr.write(
            f"error: there is no package {error.name}: this installation has the parts for other trainers only. The "
            "command needs pip install 'megatron_entropic[cpu]' or 'megatron_entropic[gpu]'\n"
        )
        return 2


if __name__ == "__main__":
    sys.exit(run())

"""`python -m megatron_entropic`: the command line, where no installed command is on the PATH."""

from __future__ import annotations

import sys

from megatron_entropic.cli import main

if __name__ == "__main__":
    sys.exit(main())

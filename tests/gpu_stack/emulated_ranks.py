"""Runs a script of tests/distributed on a policy of Transformer Engine's layers, with gloo between its ranks.

    python emulated_ranks.py SCRIPT ARGUMENTS

The script asks for the CPU and gets the CUDA platform without a driver; on leaving, rank 0 says on standard error which
emulated functions were called.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1", NVTE_DEBUG="0")

import te_emulation

te_emulation.install()

import no_driver  # noqa: E402
import torch  # noqa: E402

from megatron_entropic.policy.megatron import platform  # noqa: E402


class CudaOnCpu(platform.CudaPlatform):
    """The CUDA platform, whose tensors live in host memory."""

    backend = "gloo"

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")


def main(script: Path, arguments: list[str]) -> None:
    """Runs the script as `__main__`."""
    mode = no_driver.replace_driver(torch.device("cpu"))
    chosen = CudaOnCpu()
    assert chosen.transformer_engine
    platform.select_platform = lambda device="auto": chosen  # type: ignore[assignment]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    with mode:
        runpy.run_path(str(script), run_name="__main__")
    if os.environ["RANK"] == "0":
        sys.stderr.write(json.dumps(te_emulation.CALLS))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

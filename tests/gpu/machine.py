"""Prints the driver, which versions are here and where they lie, and whether the compiled parts of each load."""

from __future__ import annotations

import importlib
import subprocess
import sys

COMPILED = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "megatron.core": "megatron.core",
    "ray": "ray",
    "vllm": "vllm._C_stable_libtorch",
    "transformer_engine": "transformer_engine.pytorch",
    "apex": "amp_C",
    "flashinfer": "flashinfer",
}
"""By package, a module of it that needs its libraries."""


def main() -> int:
    """Looks at every package; one that is missing is no failure. Returns nvidia-smi's status, 1 without it."""
    for name, compiled in COMPILED.items():
        try:
            module = importlib.import_module(name)
            importlib.import_module(compiled)
        except ImportError as error:
            sys.stdout.write(f"{name}: {error}\n")
            continue
        sys.stdout.write(f"{name} {getattr(module, '__version__', '')} {module.__path__[0]}\n")
    query = "--query-gpu=name,driver_version,memory.total"
    try:
        return subprocess.run(["nvidia-smi", query, "--format=csv"], check=False).returncode
    except FileNotFoundError:
        sys.stdout.write("no nvidia-smi: this machine has no NVIDIA driver\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Prints which versions are here and where they lie, and whether the compiled parts of each can be loaded."""

from __future__ import annotations

import importlib
import sys

PACKAGES = {
    "torch": "",
    "triton": "",
    "transformers": "",
    "megatron.core": "",
    "ray": "",
    "vllm": "vllm._C_stable_libtorch",
}
PACKAGES |= {"transformer_engine": "transformer_engine.pytorch", "apex": "amp_C", "flashinfer": ""}


def main() -> int:
    """Looks at every package; what is missing is no failure here."""
    for name, compiled in PACKAGES.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            sys.stdout.write(f"{name}: {error}\n")
            continue
        sys.stdout.write(f"{name} {getattr(module, '__version__', '')} {module.__path__[0]}\n")
        if compiled:
            try:
                importlib.import_module(compiled)
            except ImportError as error:
                sys.stdout.write(f"  {compiled}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks an environment after its installation: no file belongs to two distributions, and what a run needs imports.

    .venv/bin/python tools/check_environment.py

Installers let a second wheel overwrite the files of a first without a word; which of the two contents stays is chance,
and the other distribution is broken. Standard library only, except for what is imported to see whether it can be.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from importlib import metadata

NEEDED = ("torch", "vllm", "megatron.core", "ray", "transformers")
TRANSFORMER_ENGINE = ("transformer_engine.pytorch",)
"""Checked where it is installed: the policy does without it."""
IMPORT_TIMEOUT_S = 1200.0
"""The first import of torch and vLLM from a cold or shared disk takes minutes."""

HARMLESS = {"build_backend.py"}
"""Top-level files that some wheels carry along by mistake and nothing imports once they are installed."""

MARK = "cannot import: "
IMPORT_ALL = f"""
import importlib, sys
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except Exception as error:
        print({MARK!r} + module + ": " + type(error).__name__ + ": " + " ".join(str(error).split())[:500], flush=True)
"""

Owners = dict[str, dict[str, set[str]]]
"""File -> hash of its contents as recorded -> distributions that record it."""


def recorded_files(distributions: list[metadata.Distribution]) -> Owners:
    """Every file with a hash in some distribution's RECORD.

    Args:
        distributions: what is installed; those without a RECORD own nothing.
    """
    owners: Owners = defaultdict(lambda: defaultdict(set))
    for distribution in distributions:
        # Not `distribution.files`: its object for each of 70,000 files takes a minute.
        name, folder = distribution.metadata["Name"], str(distribution.locate_file(""))
        for file, digest, _ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
            if digest:
                path = os.path.join(folder, file)
                owners[os.path.normpath(path) if ".." in file else path][digest].add(name)
    return owners


def conflicts(owners: Owners) -> dict[tuple[str, ...], list[str]]:
    """Files recorded with different contents, by the distributions that claim them."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, by_hash in owners.items():
        if len(by_hash) > 1 and os.path.basename(path) not in HARMLESS:
            found[tuple(sorted(set().union(*by_hash.values())))].append(path)
    return found


def import_problems(modules: tuple[str, ...]) -> list[str]:
    """What Python says of each module that cannot be imported; one process imports them all, in this order.

    Args:
        modules: dotted names.
    """
    # No GPU is asked for: the environment of a cluster is often built on a node that has none.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, *modules],
            capture_output=True,
            text=True,
            check=False,
            timeout=IMPORT_TIMEOUT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return [f"importing {', '.join(modules)} took longer than {IMPORT_TIMEOUT_S:g} s"]
    marked = [line.removeprefix(MARK) for line in result.stdout.splitlines() if line.startswith(MARK)]
    if result.returncode != 0:
        marked.append(f"importing {', '.join(modules)} ended with status {result.returncode}: {result.stderr[-500:]}")
    return marked


def main() -> int:
    """Prints every problem to standard error; the exit status is 1 if there is one."""
    problems = [
        f"{' and '.join(names)} are both installed and write other contents to the same {len(paths)} files, such as "
        f"{paths[0]}: choose versions that do not (requirements/*.txt, setup.py)"
        for names, paths in conflicts(recorded_files(list(metadata.distributions()))).items()
    ]
    installed = {distribution.metadata["Name"].lower().replace("_", "-") for distribution in metadata.distributions()}
    modules = NEEDED + (TRANSFORMER_ENGINE if "transformer-engine" in installed else ())
    problems += import_problems(modules)
    for problem in problems:
        print(f"check_environment: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

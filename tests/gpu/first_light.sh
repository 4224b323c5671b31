#!/usr/bin/env bash
# The first things to run on a machine with one H100 or H200, from the smallest to a whole run; at most 8 minutes.
#
#   bash tests/gpu/first_light.sh [--site DIR] [--output DIR] [PART ...]
#
#   machine    driver, versions, and where each package comes from
#   kernels    Triton kernels and fused heads against float64 and stored logits
#   heads      the operation and the heads as fractions of what copies and products of this GPU reach
#   policy     score and update of a 1.5B-shaped policy against transformers; tokens/s and share of the product's rate
#   colocated  the Countdown example with policy and vLLM engine on this one GPU, weights through CUDA IPC, all compared
#   large      the same loop around the 1.5B shape in bfloat16: publication, mismatch and seconds by phase
#
# Each part has a limit of its own and is reported whatever became of the others. The last two need vLLM and Ray, where
# they are missing they fail and say so. Nothing is downloaded: what the machine's python3 lacks lies in --site, a
# folder made elsewhere with `pip install --no-deps --target DIR -r tests/gpu/first_light.txt`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

output=runs/first_light site=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --site) site=$(cd "${2:?}" && pwd) && shift 2 || exit 2 ;;
    --output) output=${2:?} && shift 2 ;;
    *) echo "first light: unknown option $1" >&2; exit 2 ;;
  esac
done
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(machine kernels heads policy colocated large)
mkdir -p "$output"
output=$(cd "$output" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${site:+:$site} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 FIRST_LIGHT_OUTPUT=$output
# vLLM takes flashinfer's sampler for granted on CUDA; where it is absent PyTorch samples.
"$python" -c 'import flashinfer' 2>/dev/null || export VLLM_USE_FLASHINFER_SAMPLER=0
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

# vLLM finds this project's plug-in by the metadata of an installed package; a checkout has none until now.
"$python" setup.py --quiet egg_info >/dev/null 2>&1 || echo "first light: no package metadata, vLLM's plug-in is missing"

tests=("$python" -m pytest -q -p no:cacheprovider)
failed=0
printf '%-10s %-8s %s\n' part status seconds >"$output/summary.txt"
for part in "${parts[@]}"; do
  case $part in
    machine) limit_s=30 command=("$python" tests/gpu/machine.py) ;;
    kernels) limit_s=60 command=("${tests[@]}" tests/gpu/test_triton_gpu.py tests/gpu/test_fused_heads_gpu.py) ;;
    heads) limit_s=50 command=("$python" benchmarks/gpu/vocab_parallel_gpu.py --output-dir "$output" --repetitions 10) ;;
    policy) limit_s=100 command=("$python" benchmarks/gpu/policy_gpu.py --output-dir "$output" --repetitions 1) ;;
    colocated) limit_s=120 command=("${tests[@]}" tests/gpu/test_colocated_run_gpu.py -k "shares and ipc") ;;
    large) limit_s=120 command=("${tests[@]}" tests/gpu/test_colocated_run_gpu.py -k large) ;;
    *) echo "first light: unknown part $part" >&2; exit 2 ;;
  esac
  echo "== $part (at most $limit_s s)"
  started=$SECONDS
  status=0
  timeout --kill-after=10 "$limit_s" "${command[@]}" >"$output/$part.log" 2>&1 || { status=$? && failed=1; }
  case $status in 0) word=passed ;; 124 | 137) word=timeout ;; *) word=failed ;; esac
  printf '%-10s %-8s %d\n' "$part" $word $((SECONDS - started)) | tee -a "$output/summary.txt"
  [ $word = passed ] || tail -n 25 "$output/$part.log"
done
echo "logs and tables: $output"
exit $failed

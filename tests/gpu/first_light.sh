#!/usr/bin/env bash
# The first things to run on a machine with one H100 or H200, from the smallest to a whole run; at most 8 minutes.
#
#   bash tests/gpu/first_light.sh [--dry-run] [--site DIR] [--output DIR] [PART ...]
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
# folder made elsewhere with `pip install --no-deps --target DIR -r tests/gpu/first_light.txt`. --dry-run runs nothing:
# it prints each part's limit and command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

all_parts=(machine kernels heads policy colocated large)
refuse() { echo "first light: $*" >&2; exit 2; }

output=runs/first_light site='' dry_run=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes && shift ;;
    --site | --output)
      [ -n "${2:-}" ] || refuse "$1 needs a folder"
      if [ "$1" = --output ]; then
        output=$2
      else
        site=$(cd "$2" 2>/dev/null && pwd) || refuse "--site $2 is no folder"
      fi
      shift 2
      ;;
    *) refuse "unknown option $1" ;;
  esac
done
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all_parts[@]}")
for part in "${parts[@]}"; do
  [[ " ${all_parts[*]} " == *" $part "* ]] || refuse "unknown part $part, choose of ${all_parts[*]}"
done

python=${PYTHON:-python3}
tests=("$python" -m pytest -q -p no:cacheprovider)
grace_s=5

# Sets limit_s and command. All limits with their grace are eight minutes.
prepare() {
  case $1 in
    machine) limit_s=25 command=("$python" tests/gpu/machine.py) ;;
    kernels) limit_s=60 command=("${tests[@]}" tests/gpu/test_triton_gpu.py tests/gpu/test_fused_heads_gpu.py) ;;
    heads) limit_s=45 command=("$python" benchmarks/gpu/vocab_parallel_gpu.py --output-dir "$output" --repetitions 10) ;;
    policy) limit_s=95 command=("$python" benchmarks/gpu/policy_gpu.py --output-dir "$output" --repetitions 1) ;;
    colocated) limit_s=115 command=("${tests[@]}" tests/gpu/test_colocated_run_gpu.py -k "shares and ipc") ;;
    large) limit_s=110 command=("${tests[@]}" tests/gpu/test_colocated_run_gpu.py -k large) ;;
  esac
}

if [ -n "$dry_run" ]; then
  for part in "${parts[@]}"; do
    prepare "$part"
    echo "$part: at most $((limit_s + grace_s)) s: ${command[*]}"
  done
  exit 0
fi

mkdir -p "$output"
output=$(cd "$output" && pwd)
export PYTHONPATH=$PWD${site:+:$site} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 FIRST_LIGHT_OUTPUT=$output
# vLLM takes flashinfer's sampler for granted on CUDA; where it is absent PyTorch samples.
"$python" -c 'import flashinfer' 2>/dev/null || export VLLM_USE_FLASHINFER_SAMPLER=0
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

# vLLM finds this project's plug-in by the metadata of an installed package; a checkout has none until now.
"$python" setup.py --quiet egg_info >/dev/null 2>&1 || echo "first light: no package metadata, vLLM's plug-in is missing"

failed=0
printf '%-10s %-8s %s\n' part status seconds >"$output/summary.txt"
for part in "${parts[@]}"; do
  prepare "$part"
  echo "== $part (at most $limit_s s)"
  started=$SECONDS
  status=0
  timeout --kill-after=$grace_s "$limit_s" "${command[@]}" >"$output/$part.log" 2>&1 || { status=$? && failed=1; }
  case $status in 0) word=passed ;; 124 | 137) word=timeout ;; *) word=failed ;; esac
  # pytest's status is 0 where it found no GPU: every test of the part was skipped, nothing was seen.
  if [ $word = passed ] && tail -n 1 "$output/$part.log" | grep -Eq '^[0-9]+ skipped'; then
    word=skipped failed=1
  fi
  printf '%-10s %-8s %d\n' "$part" $word $((SECONDS - started)) | tee -a "$output/summary.txt"
  [ $word = passed ] || tail -n 25 "$output/$part.log"
done
echo "logs and tables: $output"
exit $failed

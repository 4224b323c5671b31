#!/usr/bin/env bash
# From a fresh clone to a trained model and a report, on a CPU: environment, data and model, training, report.
#
#   bash examples/quickstart.sh
#   bash examples/quickstart.sh entropy_control.controller=off run.name=without_control run.output_dir=runs/countdown_off
#
# Arguments are dotted.key=value overrides of examples/countdown_cpu.yaml; relative paths start at the checkout.
# A call that was interrupted is simply repeated: it continues from the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS
say() { printf '\n== %s (%d s since start)\n' "$*" $((SECONDS - started)); }

run_dir=runs/countdown
for override in "$@"; do
  case $override in run.output_dir=*) run_dir=${override#*=} ;; esac
done

say "environment"
bash tools/environment.sh
# One thread per process, and none that spins while it waits: three processes share the cores.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# Nothing is fetched from a hub or reported home.
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

say "problems, tokenizer and model"
.venv/bin/python examples/countdown/prepare.py --output data/countdown

say "training"
.venv/bin/megatron-entropic train examples/countdown_cpu.yaml "$@"

say "report"
.venv/bin/megatron-entropic report "$run_dir"

cat <<TEXT

Done in $((SECONDS - started)) s.
  $run_dir/report/report.html  the report, to open in a browser
  $run_dir/metrics.jsonl       every number of every step
  $run_dir/hf                  the trained model, for transformers and vLLM

What it answers, coloured by entropy:
  .venv/bin/megatron-entropic rollouts $run_dir

What happens without control, and both runs in one report:
  bash examples/quickstart.sh entropy_control.controller=off run.name=without_control run.output_dir=runs/countdown_off
  .venv/bin/megatron-entropic report $run_dir runs/countdown_off
TEXT

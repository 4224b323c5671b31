#!/usr/bin/env bash
# Builds the environment if needed and runs CPU tests, two files at a time. Arguments go to pytest:
#
#   bash tests/run.sh                           the checks of tools/check.sh, then every CPU test
#   bash tests/run.sh fast                      the unit tests, for every edit
#   bash tests/run.sh tests/unit -k entropy
#   bash tests/run.sh tests/unit -n 0 --pdb     in this process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/environment.sh

# One thread per process, and none that spins while it waits: the ranks of a test share few cores.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Nothing reports home and nothing is fetched from a hub.
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 WANDB_MODE=offline
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Once for the hundreds of processes that the tests start, each of which would compile what it imports: 0.1 to 0.3 s.
.venv/bin/python -m compileall -q megatron_entropic

if [ $# = 0 ]; then
  bash tools/check.sh
elif [ "$1" = fast ]; then
  shift
  set -- tests/unit "$@"
fi

# Most tests wait: for processes to start, for one thread, for limits of time. A file stays with one worker, so what its
# tests share is made once; the order is that of `testpaths`, long files first, so that the short ones fill the end.
exec .venv/bin/python tools/run_and_reap.py .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile \
  --no-loadscope-reorder --durations=20 "$@"

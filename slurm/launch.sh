#!/usr/bin/env bash
# Runs one attempt of a training job inside its Slurm allocation; called by the entropic_*.sh files.
#
#   launch.sh DEFAULT_CONFIG [CONFIG.yaml] [dotted.key=value ...]
#
#   pre-flight on every node  ->  Ray on every node  ->  driver on the first node  ->  Ray down  ->  end or requeue
#
# Statuses of the driver: 0 finished, 2 bad input, 75 stopped on request with its state saved, others failed.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=slurm/settings.sh
source "$checkout/slurm/settings.sh"

config=$checkout/$1
shift
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
  config=$(realpath "$1")
  shift
fi
overrides=(cluster.max_restarts=2 "$@")
stopped=75

say() { echo "launch: $(date +%T) $*"; }
refuse() { say "$*" >&2; exit 2; }

# ---- signals: both mean "save and end"; the driver learns of either as USR1 ----
asked_to_stop=
driver=
# shellcheck disable=SC2329  # the trap calls it
forward_stop() {
  say "asked to stop; the run saves its state at the next safe point"
  asked_to_stop=yes
  [ -z "$driver" ] || kill -USR1 "$driver" 2>/dev/null || true
}
trap forward_stop USR1 TERM

# The status of a child. A trap interrupts `wait`, so it is asked again while the child lives.
status_of() {
  local status=0 again
  wait "$1" || status=$?
  while [ "$status" -gt 128 ] && kill -0 "$1" 2>/dev/null; do
    status=0
    wait "$1" || status=$?
  done
  if [ "$status" -gt 128 ]; then
    again=0
    wait "$1" 2>/dev/null || again=$?
    [ "$again" -eq 127 ] || status=$again
  fi
  echo "$status" >"$ME_JOB_DIR/status"
}

# ---- where things are ----
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
node_list=$(IFS=,; echo "${nodes[*]}")
if [ -n "$ME_INTERFACE" ]; then
  address=$(ip -4 -o addr show dev "$ME_INTERFACE" | awk '{split($4, part, "/"); print part[1]; exit}')
else
  name=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  address=$(getent ahostsv4 "$name" | awk '{print $1; exit}')
fi
case $address in
  "" | 127.*) refuse "the first node, $head, has no address for the others ('$address'); set ME_INTERFACE" ;;
esac

overrides+=("cluster.address=$address:$ME_PORT" "cluster.nodes=[$node_list]")

mkdir -p "$ME_JOB_DIR"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$ME_JOB_DIR/ray_token RAY_USAGE_STATS_ENABLED=0
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

# Seconds since the epoch; the driver says how long after it the first step was done.
ME_SUBMIT_TIME=$(date -d "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *SubmitTime=\([^ ]*\).*/\1/p')" +%s)
export ME_SUBMIT_TIME

# ---- how a command runs on the nodes ----
passed_on=
for name in $ME_PASS_ON; do
  [ -z "${!name+set}" ] || passed_on+=${passed_on:+,}$name
done
mounts=$checkout:$checkout,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$ME_JOB_DIR:$ME_JOB_DIR${ME_MOUNTS:+,$ME_MOUNTS}
on_nodes=(srun --overlap --export="$passed_on" --cpu-bind=none)
inside=()
if [ -n "$ME_CONTAINER" ]; then
  case $ME_CONTAINER_RUNTIME in
    pyxis) on_nodes+=(--container-image="$ME_CONTAINER" --container-mounts="$mounts" --no-container-mount-home) ;;
    enroot)
      inside=(enroot start)
      IFS=, read -ra mounted <<<"$mounts"
      for mount in "${mounted[@]}"; do inside+=(--mount "$mount"); done
      inside+=("$ME_CONTAINER")
      ;;
    apptainer) inside=(apptainer exec --nv --bind "$mounts" "$ME_CONTAINER") ;;
    *) refuse "ME_CONTAINER_RUNTIME=$ME_CONTAINER_RUNTIME: choose pyxis, enroot or apptainer" ;;
  esac
elif [ ! -x "$ME_PYTHON" ]; then
  refuse "$ME_PYTHON is missing: build it with tools/environment.sh, or set ME_PYTHON or ME_CONTAINER"
fi
everywhere=(--nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1)
program=("${inside[@]}" "$ME_PYTHON" -m megatron_entropic.cli)

say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, nodes $node_list, Ray at $address:$ME_PORT"

# ---- pre-flight ----
"${on_nodes[@]}" "${everywhere[@]}" --job-name=preflight --kill-on-bad-exit=0 "${program[@]}" preflight "$config" \
  "${overrides[@]}" \
  --nodes "$node_list" --address "$address" --port "$ME_PORT" --gpus-per-node "${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}" \
  --timeout-s "$ME_PREFLIGHT_TIMEOUT_S" &
status_of $!
status=$(<"$ME_JOB_DIR/status")
[ "$status" -eq 0 ] || [ -n "$asked_to_stop" ] || refuse "pre-flight refuses these nodes; nothing was started"

# ---- Ray and the driver ----
# `ray start --block` ends what it started when its step gets TERM; Slurm ends what is left of the step.
end_ray() {
  local step
  step=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | awk '$2 == "ray" {print $1}')
  [ -n "$step" ] || return 0
  scancel --signal=TERM "$step" || true
  for _ in $(seq 100); do
    kill -0 "$ray" 2>/dev/null || return 0
    sleep 0.2
  done
  scancel "$step" || true
}

if [ -z "$asked_to_stop" ]; then
  # A node's loss ends the step on that node alone: the driver goes on on a spare one, if there is one.
  "${on_nodes[@]}" "${everywhere[@]}" --no-kill --wait=0 --kill-on-bad-exit=0 --job-name=ray --output="$ME_JOB_DIR/ray-%N.log" --open-mode=append \
    "${inside[@]}" bash "$checkout/slurm/ray_node.sh" "$ME_PYTHON" "$address" "$ME_PORT" "$ME_NODE_TMP" &
  ray=$!
  "${on_nodes[@]}" --nodes=1 --ntasks=1 --nodelist="$head" --job-name=driver "${program[@]}" train "$config" \
    "${overrides[@]}" &
  driver=$!
  status_of $driver
  status=$(<"$ME_JOB_DIR/status")
  driver=
  end_ray
else
  status=$stopped
fi

# ---- end, or the same job again ----
# A job that was cancelled is no longer RUNNING and stays cancelled.
requeue() {
  say "$1; the job is queued again and continues from its newest checkpoint"
  scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING || return 0
  scontrol requeue "$SLURM_JOB_ID" && sleep 600
}

# A driver that did not listen yet, or had nothing left to do, is ended by the signal itself.
[ -z "$asked_to_stop" ] || [ "$status" -le 128 ] || status=$stopped

# A job that was submitted with --no-kill outlives its nodes; that there are not enough left is nobody's failure.
nodes_left=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *NumNodes=\([0-9]*\).*/\1/p')

failures=$ME_JOB_DIR/failures
# Counts a failure; the job is queued again unless there were too many.
fail() {
  echo "$(date +%FT%T) status $status" >>"$failures"
  count=$(wc -l <"$failures")
  if [ "$count" -le "$ME_MAX_REQUEUES" ]; then
    requeue "failed with status $status (failure $count, $ME_MAX_REQUEUES allowed)" || true
  else
    say "failed with status $status for the ${count}th time; see $failures"
  fi
}

case $status in
  0) say "finished" ;;
  2 | 130) ;; # bad input, and an interrupt by hand: the same would happen again
  "$stopped") requeue "stopped on request" || true ;;
  1)
    if [ "${nodes_left:-${#nodes[@]}}" -lt "${#nodes[@]}" ]; then
      requeue "$nodes_left of ${#nodes[@]} nodes are left, too few" || true
    else
      fail
    fi
    ;;
  *) fail ;;
esac
exit "$status"

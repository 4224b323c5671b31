#!/usr/bin/env bash
# Ray on one node, until TERM; launch.sh starts it on all nodes at once.
#
#   ray_node.sh PYTHON HEAD_ADDRESS FIRST_PORT NODE_TMP
set -euo pipefail
python=$1 head=$2 port=$3 node_tmp=$4

# Each process holds sockets to every other one, and 1,024 of them, the usual soft limit, are too few from some 60 on.
# More than 2^20 would cost programs that close whatever might be open seconds each.
most=$(ulimit -Hn)
if [ "$most" = unlimited ] || [ "$most" -gt 1048576 ]; then most=1048576; fi
ulimit -Sn "$most"

# A folder that nobody else can guess or enter: Ray makes its own, below it, writable for everybody. Sockets lie in it and
# their paths are limited to 107 bytes. It is locked while this script lives; what killed jobs left behind goes.
[ "${#node_tmp}" -le 23 ] || { echo "ray_node: ME_NODE_TMP=$node_tmp has more than 23 bytes, too long for Ray's sockets" >&2; exit 2; }
"$python" -c "import sys; from pathlib import Path; from megatron_entropic.cluster.session import remove_abandoned
remove_abandoned(Path(sys.argv[1]))" "$node_tmp"
folder=$(mktemp -d "$node_tmp/me-ray-XXXXXXXX")
exec 9>"$folder/owner"
flock 9
export VLLM_RPC_BASE_PATH=$folder

# What compilers keep stays on the node for the next job, not in a home that all nodes write to at once. The name can be
# guessed, so that it is used only if it is ours.
caches=$node_tmp/me-cache-$(id -u)
mkdir -m 700 "$caches" 2>/dev/null || true
if [ -L "$caches" ] || [ ! -O "$caches" ]; then
  echo "ray_node: $caches is not ours; compilers keep nothing for the next job" >&2
  caches=$folder/cache
fi
chmod 700 "$caches" 2>/dev/null || true
export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$caches/vllm} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}

# Of several interfaces, the one on the way to the first node.
own=$("$python" -c "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('$head', $port)); print(s.getsockname()[0])")
# shellcheck disable=SC2153  # Slurm sets both SLURM_CPUS_ON_NODE and SLURM_GPUS_ON_NODE
options=(--node-ip-address="$own" --node-name="$SLURMD_NODENAME" --temp-dir="$folder/ray" --num-cpus="$SLURM_CPUS_ON_NODE"
  --dashboard-agent-listen-port=$((port + 2)) --disable-usage-stats --block)
[ -n "${SLURM_GPUS_ON_NODE:-}" ] && command -v nvidia-smi >/dev/null || options+=(--num-gpus=0)
[ -z "${ME_OBJECT_STORE_BYTES:-}" ] || options+=(--object-store-memory="$ME_OBJECT_STORE_BYTES")

child=
ended=
stop() {
  ended=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM
role="worker"
if [ "$own" = "$head" ]; then
  role="head"
  options+=(--head --port="$port" --ray-client-server-port=$((port + 1)) --include-dashboard=false)
else
  options+=(--address="$head:$port")
fi
# A worker may come before the head can take it, and may lose its raylet: it joins again for as long as the job lasts.
# Without its head the job is lost, which the driver notices. If the whole first node is, nobody is left there to notice,
# and Slurm lets a job that was submitted with --no-kill stand on the other nodes until its time is over.
status=0
head_seen=$SECONDS
while [ -z "$ended" ]; do
  if [ $role = worker ] && ! (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; then
    if [ $((SECONDS - head_seen)) -ge "${ME_HEAD_GONE_S:-300}" ]; then
      echo "ray_node: nothing has answered at $head:$port for $((SECONDS - head_seen)) s; the job is queued again" >&2
      scontrol requeue "$SLURM_JOB_ID" || true
      head_seen=$SECONDS
    fi
    sleep 0.5
    continue
  fi
  "$python" -m ray.scripts.scripts start "${options[@]}" 9>&- &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  child=
  head_seen=$SECONDS
  [ $role = worker ] || break
  [ -n "$ended" ] || sleep 2
done
rm -rf "$folder"
[ -n "$ended" ] || exit "$status"

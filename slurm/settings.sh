#!/usr/bin/env bash
# What differs between sites, each with its default; set any of these before `sbatch` or edit this file.
# Sourced by launch.sh in the batch shell. docs/clusters.md explains every variable.
set -euo pipefail

# Where the software is: a virtual environment in the checkout, or a container.
ME_CONTAINER=${ME_CONTAINER:-}                       # image; empty: no container
ME_CONTAINER_RUNTIME=${ME_CONTAINER_RUNTIME:-pyxis}  # pyxis, enroot or apptainer
ME_MOUNTS=${ME_MOUNTS:-}                             # folders visible inside, SOURCE:TARGET,...; checkout and job are added
if [ -n "$ME_CONTAINER" ]; then ME_PYTHON=${ME_PYTHON:-python3}; else ME_PYTHON=${ME_PYTHON:-$checkout/.venv/bin/python}; fi

# Network: the interface of Ray, gloo and NCCL's bootstrap. Empty: the one that Slurm reaches the node by.
ME_INTERFACE=${ME_INTERFACE:-}
# 10 ports from here on the first node; two jobs on one node need different ones.
ME_PORT=${ME_PORT:-$((20000 + SLURM_JOB_ID % 1200 * 10))}

# Folders: shared by all nodes (logs, token); local to each node (Ray's sockets, a short path).
ME_JOB_DIR=${ME_JOB_DIR:-$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID}
ME_NODE_TMP=${ME_NODE_TMP:-/tmp}

# Patience, in seconds and times.
ME_PREFLIGHT_TIMEOUT_S=${ME_PREFLIGHT_TIMEOUT_S:-300}
ME_HEAD_GONE_S=${ME_HEAD_GONE_S:-300}                # after which the other nodes give a lost first node up
ME_MAX_REQUEUES=${ME_MAX_REQUEUES:-3}                # after failures; being preempted does not count

# The only variables that reach the nodes, beside Slurm's own. Unset ones are left out.
ME_PASS_ON="PATH HOME USER LANG LC_ALL TERM TMPDIR LD_LIBRARY_PATH PYTHONPATH PYTHONUNBUFFERED
  CUDA_HOME CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS OMP_WAIT_POLICY CC
  PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF VLLM_CACHE_ROOT TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR
  RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH RAY_USAGE_STATS_ENABLED
  HF_HOME HF_HUB_OFFLINE TRANSFORMERS_OFFLINE WANDB_API_KEY WANDB_BASE_URL WANDB_ENTITY WANDB_MODE WANDB_DIR
  NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_SOCKET_IFNAME NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_IB_TC NCCL_IB_SL
  NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT NCCL_NET_GDR_LEVEL NCCL_NET NCCL_CROSS_NIC NCCL_P2P_LEVEL NCCL_ALGO NCCL_PROTO
  NCCL_TOPO_FILE GLOO_SOCKET_IFNAME TORCH_GLOO_LAZY_INIT FI_PROVIDER FI_EFA_USE_DEVICE_RDMA ME_OBJECT_STORE_BYTES ME_SUBMIT_TIME
  ME_HEAD_GONE_S
  ${ME_PASS_ON:-}"

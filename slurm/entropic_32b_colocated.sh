#!/usr/bin/env bash
# EntroPIC on Qwen3-32B, policy and engines of four GPUs on the same GPUs: 4 nodes of 8 GPUs.
#
#   sbatch --partition=P --account=A slurm/entropic_32b_colocated.sh model.hf_dir=... data.train_files=... train.steps=500
#
# A first argument without "=" replaces the configuration. Everything else: docs/clusters.md.
#SBATCH --job-name=entropic_32b_colocated
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.log
set -euo pipefail
# Slurm runs a copy of this file; the job knows where the original lies.
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
submitted=${submitted%%.sh *} # newer Slurm prints the arguments, too; the path may have blanks
exec bash "${ME_CHECKOUT:-$(dirname "$submitted")/..}/slurm/launch.sh" examples/qwen3_32b_colocated.yaml "$@"

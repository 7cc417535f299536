#!/usr/bin/env bash
# One node:    scripts/launch.sh autoregressive.train --config ...   (all GPUs, or NPROC of them)
# Many nodes:  the same on each, with NNODES, and MASTER_ADDR naming the first of them.
# A process that dies is started again with all others, from the last checkpoint, MAX_RESTARTS times.
# A mistake that only the user can put right (exit code 2) is not: it ends this script with code 2.
# SIGTERM and SIGUSR1 reach the processes, which save and leave.
set -euo pipefail
cd "$(dirname "$0")/.."
module="$1"
shift
NPROC="${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
where=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
  # A fresh store for each restart: the shared one keeps the addresses of dead processes.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${RUN_ID:-llamagen}"
    --rdzv-endpoint "${MASTER_ADDR:?the first node}:${MASTER_PORT:-29500}")
fi
export PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-300}" # seconds to save before SIGKILL
exec python scripts/torchrun.py "${where[@]}" --nproc-per-node "$NPROC" \
  --max-restarts "${MAX_RESTARTS:-3}" -m "$module" "$@"

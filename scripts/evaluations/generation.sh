#!/usr/bin/env bash
# All GPUs of this node: scripts/evaluations/generation.sh --samples ... (NPROC=1 for one). Many nodes: set
# NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --nproc-per-node "${NPROC:-gpu}" --nnodes "${NNODES:-1}" \
  --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" \
  -m evaluations.generation "$@"

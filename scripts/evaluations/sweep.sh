#!/usr/bin/env bash
# Sample a run per guidance scale, then score them all against one reference:
#   CFG_SCALES="1.5 1.75 2.0" GPT=runs/gpt_b TOKENIZER=weights/vq16 OUT=runs/sweep \
#     scripts/evaluations/sweep.sh --metrics.reference VIRTUAL_imagenet256_labeled.npz
# NPROC=1 for one process; SAMPLE_FLAGS="--num_images 10000 --sampling.top_k 2000" for other settings.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=()
for scale in ${CFG_SCALES:-1.5 1.75 2.0 2.25}; do
  run="$OUT/cfg_$scale"
  # shellcheck disable=SC2086 - SAMPLE_FLAGS holds several words
  torchrun --nproc-per-node "${NPROC:-gpu}" -m autoregressive.sample \
    --gpt "$GPT" --tokenizer "$TOKENIZER" --out "$run" --sampling.cfg_scale "$scale" ${SAMPLE_FLAGS:-}
  runs+=("$run")
done
exec torchrun --nproc-per-node "${NPROC:-gpu}" -m evaluations.sweep \
  --runs "[$(IFS=,; echo "${runs[*]}")]" --out "$OUT/scores" "$@"

#!/usr/bin/env bash
# scripts/tokenizer/train.sh --config ...   (see launch.sh for one node and many, slurm.sbatch for Slurm)
exec "$(dirname "$0")/../launch.sh" tokenizer.train "$@"

#!/usr/bin/env bash
# scripts/autoregressive/tune_guidance.sh --config ...   (see launch.sh for one node and many)
exec "$(dirname "$0")/../launch.sh" autoregressive.tune_guidance "$@"

#!/usr/bin/env bash
# scripts/autoregressive/search.sh --config ...   (see launch.sh for one node and many)
exec "$(dirname "$0")/../launch.sh" autoregressive.tune_guidance "$@"

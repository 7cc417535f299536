#!/usr/bin/env bash
# scripts/autoregressive/sample.sh --config ...   (see launch.sh for one node and many)
exec "$(dirname "$0")/../launch.sh" autoregressive.sample "$@"

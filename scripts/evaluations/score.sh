#!/usr/bin/env bash
# scripts/evaluations/score.sh --config ...   (see launch.sh for one node and many)
exec "$(dirname "$0")/../launch.sh" evaluations.score "$@"

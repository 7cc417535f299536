#!/usr/bin/env bash
# scripts/tokenizer/encode.sh --config ...   (see launch.sh for one node and many)
exec "$(dirname "$0")/../launch.sh" tokenizer.encode "$@"

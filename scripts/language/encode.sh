#!/usr/bin/env bash
# scripts/language/encode.sh --t5 ... --pairs.source ...   (see launch.sh for one node and many)
exec "$(dirname "$0")/../launch.sh" language.encode "$@"

#!/usr/bin/env bash
# Benchmarks of the operations, then of the shipped model and, where `make demo` has run, its hybrids.
set -euo pipefail
cd "$(dirname "$0")/.."
for program in build/*_bench; do
  echo "== ${program##*/}"
  "$program"
done
models=(models/teacher)
for dir in out/demo/stages/*/model; do
  [ -d "$dir" ] && models+=("$dir")
done
echo "== cambium bench"
build/cambium bench "${models[@]}" --contexts 512,8192

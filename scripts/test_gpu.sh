#!/usr/bin/env bash
# Runs the tests that use a GPU where there is one: every test of the rooms that compute, whose CUDA
# halves are skipped elsewhere. `scripts/test_gpu.sh FOLDER` takes the test programs of another build.
# With SANITIZE=memcheck (racecheck, initcheck) each test runs under compute-sanitizer's tool.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build}
jobs=${JOBS:-8}

command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU || {
  echo "test-gpu: this machine has no NVIDIA GPU, or no driver for it" >&2
  exit 1
}
run=()
if [ -n "${SANITIZE:-}" ]; then
  run=(compute-sanitizer --tool "$SANITIZE" --error-exitcode 9 --require-cuda-init no)
fi
failed=$(mktemp)
trap 'rm -f "$failed"' EXIT
count=0
for room in tensor ops nn model train serve eval hybrid; do
  program=$build/test_$room
  [ -x "$program" ] || continue
  tests=$("$program" --gtest_list_tests 2>/dev/null | sed 's/ *#.*//' |
    awk '/^[^ ]/ {suite = $1} /^ / {print suite $1}' | grep -v '^Running\|DISABLED')
  count=$((count + $(wc -l <<<"$tests")))
  export program failed
  xargs -P "$jobs" -I{} bash -c '
    out=$("$@" "$program" --gtest_filter="$0" 2>&1) || {
      printf "%s\n" "$out" | grep -vE "^\[|^Note|^Running" | head -30
      echo "FAILED $0" | tee -a "$failed"
    }' {} "${run[@]}" <<<"$tests"
done
if [ "$count" -eq 0 ]; then
  echo "test-gpu: $build has no test programs; build them first" >&2
  exit 1
fi
echo "test-gpu: $count tests, $(wc -l <"$failed") failed"
[ ! -s "$failed" ]

#!/usr/bin/env bash
# The tests whose threads meet, under ThreadSanitizer. Left out: finite differences and parity in
# F64, which run the same loops a thousand times, the tests of cmake/repeating_tests.txt, and those
# that start processes or that kill them.
set -euo pipefail
cd "$(dirname "$0")/.."
export TSAN_OPTIONS="halt_on_error=1" CAMBIUM_THREADS=4

repeating=$(grep -v '^#' cmake/repeating_tests.txt | paste -sd:)
run() {  # PROGRAM TESTS [LEFT_OUT]
  echo "tsan: $1 $2${3:+, but for $3}"
  "build-tsan/$1" --gtest_brief=1 --gtest_filter="$2-$repeating${3:+:$3}"
}
run test_base '*Parallel*:*Pool*:Progress*:Background*'
run test_ops '*' '*Gradient*:*Finite*:*Kill*'
run test_model '*' '*Gradient*:*Counts*'
run test_train '*' '*Gradient*:*Kill*:*Killed*:*Signal*'
run test_serve '*'
echo "tsan: no data race"

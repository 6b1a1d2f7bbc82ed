#!/usr/bin/env bash
# Runs every fuzz target of build-asan for SECONDS (60), as many at once as there are cores, from the
# seeds of scripts/fuzz_seeds.py and what earlier runs found. What fails is left in
# build-fuzz/findings and reproduced by `build-asan/NAME_fuzz FILE`.
#   scripts/fuzz.sh [SECONDS] [NAME ...]
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for source in tests/fuzz/*_fuzz.cc; do
    name=$(basename "$source" _fuzz.cc)
    names+=("$name")
  done
fi
mkdir -p build-fuzz/findings build-fuzz/logs
python3 scripts/fuzz_seeds.py build-fuzz/seeds

# Leaks are looked for at the end of a run only: that is where libFuzzer is slow.
fuzz_one() {
  name=$1 seconds=$2
  mkdir -p "build-fuzz/corpus/$name"
  ASAN_OPTIONS=allocator_may_return_null=0:detect_leaks=1 \
    "build-asan/${name}_fuzz" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
    -malloc_limit_mb=1024 -max_len=16384 -close_fd_mask=3 -print_final_stats=1 \
    -detect_leaks=0 -artifact_prefix="build-fuzz/findings/$name-" \
    "build-fuzz/corpus/$name" "build-fuzz/seeds/$name" >"build-fuzz/logs/$name.log" 2>&1 ||
    { echo "fuzz: $name FAILED" >&2; tail -n 30 "build-fuzz/logs/$name.log" >&2; return 1; }
}
export -f fuzz_one
status=0
printf '%s\0' "${names[@]}" |
  xargs -0 -P "$(nproc)" -I NAME bash -c "fuzz_one NAME $seconds" || status=1

total=0
for name in "${names[@]}"; do
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "build-fuzz/logs/$name.log" | tail -n 1)
  printf 'fuzz: %-12s %12s executions\n' "$name" "${runs:-stopped}"
  total=$((total + ${runs:-0}))
done
printf 'fuzz: %-12s %12d executions\n' total "$total"
exit $status

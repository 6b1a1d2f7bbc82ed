#!/usr/bin/env bash
# Runs the demo's plan into out/demo, from the start.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf out/demo
exec build/cambium hybridize plans/demo.toml -o out/demo --device cpu "$@"

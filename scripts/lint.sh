#!/usr/bin/env bash
# The lint gate: clang-format on every source, clang-tidy on every translation unit of the build in
# build/, and a few house rules that a machine can check. `scripts/lint.sh FILES` looks at those only.
set -euo pipefail
cd "$(dirname "$0")/.."

find_tool() { command -v "$1-14" || command -v "$1"; }
format=$(find_tool clang-format)
tidy=$(find_tool clang-tidy)

if [ $# -gt 0 ]; then
  sources=("$@")
else
  mapfile -t sources < <(git ls-files '*.h' '*.cc' '*.cu' '*.cuh')
fi
status=0

"$format" --dry-run --Werror "${sources[@]}" || status=1

for file in "${sources[@]}"; do
  lines=$(wc -l <"$file")
  if [ "$lines" -gt 1000 ]; then
    echo "$file: $lines lines; no file passes 1,000" >&2
    status=1
  fi
  if [[ $file == *.h || $file == *.cuh ]] && ! grep -q '^#pragma once' "$file"; then
    echo "$file: expected #pragma once" >&2
    status=1
  fi
done
if git grep -nE '\b(TODO|FIXME|XXX)\b' -- 'src/*' 'tests/*' 'bench/*' 'scripts/*.py' 'docs/*' >&2; then
  echo "lint: left undone in the text above" >&2
  status=1
fi

if git grep -nE '^ *# *include.*\.(c|cc|cpp|cxx|cu)[">]' -- 'src/*' 'tests/*' 'bench/*' >&2; then
  echo "lint: the lines above include a translation unit" >&2
  status=1
fi

python3 scripts/arrows.py || status=1
python3 scripts/includes.py "${sources[@]}" || status=1
python3 scripts/evenness.py "${sources[@]}" || status=1

mapfile -t units < <(printf '%s\n' "${sources[@]}" | grep -E '^(src|tests)/.*\.cc$' |
  grep -v '^tests/fuzz/' || true)  # not part of the build that clang-tidy reads
if ! grep -q _cuda.cc build/compile_commands.json; then  # a build without CUDA
  mapfile -t units < <(printf '%s\n' "${units[@]}" | grep -v '_cuda\.cc$' || true)
fi
if [ ${#units[@]} -gt 0 ]; then
  python3 scripts/tidy.py "$tidy" "${units[@]}" >&2 || status=1
fi

if [ $status -eq 0 ]; then
  echo "lint: ${#sources[@]} files are clean"
fi
exit $status

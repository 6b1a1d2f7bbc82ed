#!/usr/bin/env bash
# Installs the system packages a target needs, on Debian 12 or Ubuntu 24.04. What is there already is
# left alone: a second run touches no network.
#   scripts/setup.sh build   compiler, CMake and libraries; where nvcc is, cudnn-frontend's headers
#   scripts/setup.sh lint    the above, clang-format and clang-tidy
#   scripts/setup.sh clang   the first, Clang with its sanitizers and libFuzzer
set -euo pipefail

build=(build-essential cmake ninja-build ccache ca-certificates
  libfmt-dev nlohmann-json3-dev libcli11-dev libtomlplusplus-dev libpcre2-dev libutf8proc-dev
  libxxhash-dev libssl-dev libgtest-dev libgmock-dev python3-minimal)
# The gate is defined for one version of the tools, which both distributions carry.
lint=(clang-format-14 clang-tidy-14)
clang=(clang-14 libclang-rt-14-dev lld)

# Boost.Beast and Asio, headers alone: Debian's default, 1.74, is too old for today's C++20.
boost=libboost1.81-dev
if grep -q '^ID=ubuntu' /etc/os-release 2>/dev/null; then
  boost=libboost1.83-dev
fi
build+=("$boost")

wanted=("${build[@]}")
case "${1:-build}" in
  build) ;;
  lint) wanted+=("${lint[@]}") ;;
  clang) wanted+=("${clang[@]}") ;;
  *) echo "setup: expected build, lint or clang, got '$1'" >&2; exit 2 ;;
esac

# The last thing to do: it wants CMake. A failure only leaves cuDNN out of the build.
fetch_headers() {
  if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
    cmake -P "$(dirname "$0")/../cmake/fetch_cudnn_frontend.cmake" || true
  fi
}

if ! command -v dpkg-query >/dev/null; then
  echo "setup: this is not a Debian or Ubuntu system; install the equivalents of: ${wanted[*]}" >&2
  fetch_headers
  exit 0
fi

missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  fetch_headers
  exit 0
fi

sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || {
    echo "setup: these packages are missing and neither root nor sudo is at hand: ${missing[*]}" >&2
    exit 1
  }
  sudo=(sudo)
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt=("${sudo[@]}" apt-get -o DPkg::Lock::Timeout=600)
"${apt[@]}" update -q
"${apt[@]}" install -y -q --no-install-recommends "${missing[@]}"
fetch_headers

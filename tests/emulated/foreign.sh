#!/usr/bin/env bash
# 32-bit and big-endian processors: golden router weights by a compiled program, or a refusal where
# bytes or rounding would be others.
#
#     bash tests/emulated/foreign.sh PYTHON
#
# PYTHON has what `pip install --group dev` brings. Cross compilers and QEMU are used where they are.
set -euo pipefail
python=$("$1" -c 'import sys; print(sys.executable)')
cd "$(dirname "$0")/../.."
mkdir -p build
header=src/moe_fast/kernels/c/platform.h

refuse() {
    local expected=$1
    shift
    if ! command -v "$1" >/dev/null; then
        echo "$*: LEFT OUT, there is none"
        return
    fi
    if said=$("$@" -fsyntax-only -xc $header 2>&1) || [[ $said != *"$expected"* ]]; then
        echo "$* is not refused: $said" >&2
        exit 1
    fi
    echo "$*: refused, $expected"
}

refuse "needs a little-endian processor" s390x-linux-gnu-gcc
refuse "needs arithmetic that rounds to the type" i686-linux-gnu-gcc
if command -v s390x-linux-gnu-gcc >/dev/null; then
    # What a user sees, who has no wheel for this processor.
    if said=$(CC=s390x-linux-gnu-gcc _PYTHON_HOST_PLATFORM=linux-s390x "$python" -m pip wheel \
        --no-deps --no-build-isolation --wheel-dir build/refused . 2>&1); then
        echo "pip makes a wheel for s390x" >&2
        exit 1
    fi
    line=$(grep -m 1 -o 'error: moe_fast needs a little-endian processor.*' <<<"$said") || {
        echo "$said" >&2
        exit 1
    }
    echo "pip: $line"
fi

# compute NAME COMPILER [FLAG...]; RUN is what runs its programs, if this processor does not.
compute() {
    local name=$1 program=$PWD/build/gates-$1
    shift
    if ! command -v "$1" >/dev/null || [[ -n ${RUN:-} && -z $(command -v "${RUN:-}") ]]; then
        echo "golden router weights on $name: LEFT OUT, there is no $1 ${RUN:-}"
        return
    fi
    "$@" -Wall -Wno-unused-function -Werror -O3 -ffp-contract=off -fno-trapping-math -static \
        -I src/moe_fast/kernels tests/emulated/gates.c -o "$program"
    MOE_FAST_FOREIGN_GATES="${RUN:-} $program" PYTHONPATH=src:tests/emulated "$python" -m pytest -q \
        -p no:cacheprovider -p foreign_gates tests/test_golden.py
}

RUN=qemu-arm compute armhf arm-linux-gnueabihf-gcc
if [[ $(uname -m) = x86_64 ]]; then
    compute i686 i686-linux-gnu-gcc -msse2 -mfpmath=sse
fi

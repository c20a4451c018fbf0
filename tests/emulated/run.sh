#!/usr/bin/env bash
# The kernels' lines for AVX-512, run where there is none: its instructions in plain C.
#
#     bash tests/emulated/run.sh PYTHON        (or: make emulate)
#
# PYTHON has what `pip install --group dev` brings. For Linux on x86-64.
set -euo pipefail
# Absolute: a relative path, as make gives it, ends with the next cd.
python=$("$1" -c 'import sys; print(sys.executable)')
cd "$(dirname "$0")/../.."
shift
built=$PWD/build/emulated
rm -rf "$built"
mkdir -p "$built"
cp -r --preserve=timestamps setup.py pyproject.toml README.md LICENSE docs src tests "$built"
cd "$built"
find src -name '*.so' -delete
"$python" setup.py --quiet build_ext --inplace
"$python" setup.py --quiet egg_info

# Once more the last level: with its lines, and with instructions that this processor has.
kernels=src/moe_fast/kernels
module=$(echo $kernels/_x86_64_v4.*.so)
sed -i 's/defined(__AVX512F__)/1/g' $kernels/c/*.h
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
"${CC:-cc}" -O2 -ffp-contract=off -fno-trapping-math -march=x86-64-v3 -Wno-psabi -fPIC -shared -g0 \
    -I "$include" -include tests/emulated/avx512.h $kernels/_x86_64_v4.c -o "$module"

PYTHONPATH=$built/src:$built/tests/emulated "$python" -m pytest -p no:cacheprovider -p every_level \
    -n auto -k v4 tests/test_counting.py tests/test_dtypes.py tests/test_gates.py \
    tests/test_generator.py tests/test_gradients.py tests/test_normal.py tests/test_routing.py \
    tests/test_statistics.py "$@"

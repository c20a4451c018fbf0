#!/usr/bin/env bash
# The kernels built with AddressSanitizer and UBSan, and the tests that call them.
#
#     bash tests/sanitize.sh PYTHON        (or: make sanitize)
#
# PYTHON has what `pip install --group dev` brings. Any report of either sanitizer ends the run.
set -euo pipefail
# Absolute: a relative path, as make gives it, ends with the next cd.
python=$("$1" -c 'import sys; print(sys.executable)')
cd "$(dirname "$0")/.."
shift
built=$PWD/build/sanitized

MOE_FAST_BUILD_SANITIZE=1 "$python" setup.py --quiet build \
    --build-base build/sanitized-objects --build-lib "$built"

# The sanitizer's runtime must be there before Python is; Python's own allocator would hide the
# borders between its small blocks; and CPython leaks at exit by design.
export LD_PRELOAD=$(cc -print-file-name=libasan.so)
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONMALLOC=malloc PYTHONPATH=$built PYTHONDONTWRITEBYTECODE=1
"$python" -c 'import moe_fast, sys; sys.exit(not moe_fast.__file__.startswith(sys.argv[1]))' "$built"
# AddressSanitizer itself ends a process that asks for too much memory.
exec "$python" -m pytest -p no:cacheprovider -n auto \
    --deselect tests/test_plan.py::test_too_little_memory_names_the_argument \
    tests/test_counting.py tests/test_dtypes.py tests/test_gates.py tests/test_generator.py \
    tests/test_golden.py tests/test_gradients.py tests/test_normal.py tests/test_plan.py \
    tests/test_routing.py tests/test_statistics.py tests/test_threads.py tests/test_upstream.py "$@"

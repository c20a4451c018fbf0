#!/usr/bin/env bash
# Which lines of the Python layer, and of the kernels at every level, the tests run.
#
#     bash tests/coverage.sh PYTHON [TESTS]        (or: make coverage)
#
# PYTHON has what `pip install --group dev --group coverage` brings. What needs torch counts only
# where torch is installed. The pages with every line go into build/coverage.
set -euo pipefail
# Absolute: a relative path, as make gives it, ends with the next cd.
python=$("$1" -c 'import sys; print(sys.executable)')
cd "$(dirname "$0")/.."
shift
pages=$PWD/build/coverage
sources=$pages/sources
rm -rf "$pages"
mkdir -p "$sources"

# A copy, because the kernels are compiled in place and the generated C refers to the definitions.
cp -r setup.py pyproject.toml README.md LICENSE docs examples src tests "$sources"
cd "$sources"
find src \( -name '*.c' -o -name '*.so' -o -name '*.pyd' \) -delete
MOE_FAST_BUILD_COVERAGE=1 "$python" setup.py --quiet build_ext --inplace
"$python" setup.py --quiet egg_info

cat >.coveragerc <<'END'
[run]
source = moe_fast
branch = True
parallel = True
sigterm = True
patch = subprocess
[report]
# Tests of broken installations run copies that are gone by now.
ignore_errors = True
END
export PYTHONPATH=$sources/src
"$python" -m coverage run -m pytest -p no:cacheprovider --deselect tests/test_packaging.py "$@"
"$python" -m coverage combine --quiet
"$python" -m coverage html --quiet --directory "$pages/python"
"$python" -m coverage report --skip-covered --show-missing
"$python" tests/kernel_coverage.py build/temp*/src/moe_fast/kernels

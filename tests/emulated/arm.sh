#!/usr/bin/env bash
# The package on 64-bit Arm, emulated: kernels cross-compiled, Debian's arm64 Python, QEMU's user mode.
#
#     bash tests/emulated/arm.sh PYTHON            what .ci/run runs: some files, of each test's parameters
#                                                  a fourth
#     bash tests/emulated/arm.sh PYTHON all        every test, an hour (make emulate-arm)
#     bash tests/emulated/arm.sh PYTHON count      instructions of each kernel (make count-arm)
#
# PYTHON has what `pip install --group dev` brings, and Debian has the same version of Python. On
# Debian, with qemu-user and gcc-aarch64-linux-gnu. Nothing is installed, mounted or registered.
set -euo pipefail
# Absolute: a relative path, as make gives it, ends with the next cd.
python=$("$1" -c 'import sys; print(sys.executable)')
what=${2:-quick}
cd "$(dirname "$0")/../.."
unset PYTHONDONTWRITEBYTECODE # without byte code each start takes half a minute
# A processor without SVE: emulated, NumPy's BLAS warns of its products and gives NaN for infinity.
emulator=(qemu-aarch64 -cpu neoverse-n1 -L "$PWD/build/emulated-arm/root")
checkout=$PWD
built=$checkout/build/emulated-arm
rm -rf "$built"
mkdir -p "$built"/{apt/lists/partial,apt/archives/partial,root,inc/aarch64-linux-gnu}

for tool in qemu-aarch64 aarch64-linux-gnu-gcc apt-get dpkg-deb; do
    if ! command -v "$tool" >/dev/null; then
        echo "emulated Arm: LEFT OUT, there is no $tool"
        exit
    fi
done

# Python for Arm, unpacked and not installed; apt keeps its lists in a folder of its own.
version=$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")')
touch "$built/apt/status"
apt=(apt-get -qq -o Dir::State="$built/apt" -o Dir::State::status="$built/apt/status"
    -o Dir::Cache="$built/apt" -o APT::Sandbox::User=root -o APT::Architectures::=)
packages=(libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 liblzma5 libbz2-1.0
    libsqlite3-0 libuuid1 "python$version-minimal" "libpython$version"-{minimal,stdlib,dev})
apt+=(-o APT::Architecture=arm64)
cd "$built/apt/archives"
# OpenSSL's package has one name up to Debian 12, and another from 13 on.
if ! "${apt[@]}" update || ! { "${apt[@]}" download "${packages[@]}" libssl3 ||
    "${apt[@]}" download "${packages[@]}" libssl3t64; }; then
    echo "emulated Arm: LEFT OUT, apt has no Python $version for it"
    exit
fi
for package in *.deb; do
    dpkg-deb --extract "$package" "$built/root"
done
rm -- *.deb
cd "$built"

# The C files are the same on every processor, so Cython runs here, for the levels that Arm has, if it
# has not yet: it goes by the times of the files.
mkdir source
cp -r --preserve=timestamps "$checkout"/{setup.py,pyproject.toml,*.md,LICENSE,docs,examples,src,tests,benchmarks} source
cd source
find src -name '*.so' -delete
_PYTHON_HOST_PLATFORM=linux-aarch64 "$python" setup.py --quiet egg_info
ln -s "$built/root/usr/include/python$version" "$built/inc/python$version"
ln -s "$built/root/usr/include/aarch64-linux-gnu/python$version" "$built/inc/aarch64-linux-gnu"
# As setup.py compiles on Arm; Cython and the compiler run here.
compiler=${CC:-aarch64-linux-gnu-gcc}
CC=$compiler LDSHARED="$compiler -shared" _PYTHON_HOST_PLATFORM=linux-aarch64 \
    SETUPTOOLS_EXT_SUFFIX=.cpython-${version/./}-aarch64-linux-gnu.so \
    CFLAGS="-I$built/inc/python$version -I$built/inc -Wall -Wno-unused-function -Werror" \
    "$python" setup.py --quiet build_ext --inplace

"$python" -m pip install --quiet --target "$built/site" --implementation cp \
    --python-version "$version" --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 --only-binary :all: --group pyproject.toml:test \
    numpy ml_dtypes tokenizers pyyaml typer rich matplotlib

# Tests start Python by the name it gives itself. By that of a script, no handler for programs of
# another processor is needed.
cat >"$built/python" <<END
#!/usr/bin/env bash
export PYTHONPATH=$PWD/src:$PWD/tests/emulated:$built/site\${PYTHONPATH:+:\$PYTHONPATH}
exec ${emulator[@]} $built/root/usr/bin/python$version "\$@"
END
chmod +x "$built/python"
echo "import sys; sys.executable = '$built/python'" >"$built/site/sitecustomize.py"
# Compiling byte code takes minutes when it is emulated.
"$python" -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$built/site" "$built/root" src || true
export PYTHONNOUSERSITE=1

"$built/python" -c 'import platform; print("a processor of kind", platform.machine())'

case $what in
count)
    cc -O2 -shared -fPIC -o "$built/instructions.so" benchmarks/instructions.c
    PYTHONPATH=$PWD/src:$built/site "${emulator[@]}" -plugin "$built/instructions.so" \
        "$built/root/usr/bin/python$version" benchmarks/instructions.py \
        >"$built/arm.rows" 2>"$built/arm.counts"
    # An environment's Python is a link; the emulator takes the file, and its packages from here.
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    MOE_FAST_LEVEL=baseline PYTHONPATH=$checkout/src:$packages qemu-x86_64 \
        -plugin "$built/instructions.so" "$(readlink -f "$python")" benchmarks/instructions.py \
        >"$built/x86.rows" 2>"$built/x86.counts"
    PYTHONPATH=$checkout/src "$python" benchmarks/instructions.py "$built/x86" "$built/arm"
    ;;
quick)
    "$built/python" tests/emulated/digests.py >"$built/digests"
    PYTHONPATH=$checkout/src "$python" tests/emulated/digests.py | diff - "$built/digests"
    cat "$built/digests"
    "$built/python" -m pytest -p no:cacheprovider -p few_examples --hypothesis-profile few \
        -n auto --sample 4 tests/test_golden.py tests/test_counting.py tests/test_generator.py \
        tests/test_normal.py tests/test_gates.py tests/test_routing.py tests/test_dtypes.py \
        tests/test_header.py tests/test_writer.py tests/test_convert.py tests/test_build.py "${@:3}"
    ;;
all)
    # The emulator's own memory is counted with the process's and its limits do not hold, a child of a
    # process with threads hangs, and PYTHONPATH is the script's.
    "$built/python" -m pytest -p no:cacheprovider -p few_examples --hypothesis-profile few \
        -n auto --deselect tests/test_large.py::test_operating_on_a_terabyte \
        --deselect tests/test_plan.py::test_too_little_memory_names_the_argument \
        --deselect tests/test_threads.py::test_a_forked_child_makes_its_own_pool \
        --deselect tests/test_first_errors.py::test_kernels_that_were_never_compiled "${@:3}"
    ;;
esac

"""The extension modules: one build of the kernels per SIMD level, and the processor check."""

import os
import re
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, ExecError, PlatformError

if sys.byteorder != "little":
    raise SystemExit(
        "error: moe_fast needs a little-endian processor: this one would write wrong bytes"
    )

KERNELS = Path("src/moe_fast/kernels")
# The platform names the architecture of the kernel, on which a 32-bit Python may run.
platform = sysconfig.get_platform()
HAS_LEVELS = (
    platform.endswith(("x86_64", "amd64"))
    and struct.calcsize("P") == 8
    and not platform.startswith("macosx")
)
DEBUG = os.environ.get("MOE_FAST_BUILD_DEBUG") == "1"
SANITIZE = os.environ.get("MOE_FAST_BUILD_SANITIZE") == "1"
COVERAGE = os.environ.get("MOE_FAST_BUILD_COVERAGE") == "1"

LEVEL_FLAGS = {
    "unix": {
        "_baseline": [],
        "_x86_64_v3": ["-march=x86-64-v3"],
        "_x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
    "msvc": {
        "_baseline": [],
        "_x86_64_v3": ["/arch:AVX2"],
        "_x86_64_v4": ["/arch:AVX512"],
    },
}
ADVICE = """moe_fast has a compiled part. Where there is no wheel for your Python and platform,
installing it takes a C compiler and Python's headers:
    Debian, Ubuntu   apt install build-essential python3-dev
    Fedora           dnf install gcc python3-devel
    macOS            xcode-select --install
    Windows          the "Desktop development with C++" of the Visual Studio Build Tools
To see whether there is a wheel: pip install --only-binary moe-fast moe-fast"""


# Flags that not every compiler accepts. By default GCC clones functions for some arguments, which
# makes the wheel an eighth larger and nothing faster. And the speed of a loop depends on its
# address, by over a tenth: with alignment, a change elsewhere does not change it.
WHERE_ACCEPTED = ["-fno-ipa-cp-clone", "-falign-functions=64", "-falign-loops=32"]

if struct.calcsize("P") == 4:  # on x86, for arithmetic that rounds as everywhere else
    WHERE_ACCEPTED += ["-msse2", "-mfpmath=sse"]


class BuildKernels(build_ext):
    """Chooses the flags, as only here the compiler is known."""

    def accepts(self, flag):
        try:
            return self.try_compiling(os.devnull, flag).returncode == 0
        except FileNotFoundError:  # no compiler: compiling will say so
            return False

    def try_compiling(self, file, *flags):
        command = [*self.compiler.compiler_so, *flags, "-fsyntax-only", "-xc", str(file)]
        return subprocess.run(command, capture_output=True, text=True)

    def refuse_other_platforms(self, flags):
        """Say in one line what platform.h says, not once for each file and among advice."""
        try:
            said = self.try_compiling(KERNELS / "c" / "platform.h", *flags).stderr
        except FileNotFoundError:
            return
        if refusal := re.search(r'#error "(.+)"', said):
            raise SystemExit(f"error: {refusal[1]}")

    def build_extensions(self):
        self.parallel = self.parallel or os.cpu_count()
        for extension in self.extensions:
            level = extension.name.rpartition(".")[2]
            if self.compiler.compiler_type == "msvc":
                extension.extra_compile_args = ["/O2", "/fp:precise"]
                level_flags = LEVEL_FLAGS["msvc"]
            else:
                # By default GCC fuses a*b+c, which would change the last bit of a weight. And it
                # does not vectorise loops with conditions, because floating-point exceptions,
                # which nobody reads, might be raised in another order, and none with square roots,
                # because they might set errno.
                extension.extra_compile_args = ["-O3", "-ffp-contract=off"]
                extension.extra_compile_args += ["-fno-trapping-math", "-fno-math-errno"]
                extension.extra_compile_args += filter(self.accepts, WHERE_ACCEPTED)
                self.refuse_other_platforms(extension.extra_compile_args)
                if SANITIZE:
                    # With more optimisation, accesses are gone before they are watched, and
                    # compiling takes minutes.
                    sanitizers = [
                        "-O1",
                        "-fsanitize=address,undefined",
                        "-fno-sanitize-recover=undefined",
                        "-fno-omit-frame-pointer",
                        "-g",
                    ]
                    extension.extra_compile_args += sanitizers
                    extension.extra_link_args = sanitizers
                elif COVERAGE:
                    extension.extra_compile_args += ["--coverage", "-O0"]
                    extension.extra_link_args = ["--coverage"]
                else:
                    extension.extra_compile_args.append("-g0")
                level_flags = LEVEL_FLAGS["unix"]
            extension.extra_compile_args += level_flags.get(level, [])
        try:
            super().build_extensions()
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(f"error: {error}\n\n{ADVICE}") from None


class BuildWithExamples(build_py):
    """Puts the examples beside the modules, for those who have the wheel alone."""

    def run(self):
        super().run()
        if not self.editable_mode:
            place = Path(self.build_lib, "moe_fast", "examples")
            self.mkpath(str(place))
            for file in (*Path("examples").glob("*.py"), *Path("examples").glob("*.yml")):
                self.copy_file(str(file), str(place))


DEFINITIONS = sorted(str(file) for end in ("pxi", "h") for file in KERNELS.rglob(f"*.{end}"))
# The code that Cython adds to every module that takes buffers, compiled once, not for each level.
SHARED = "moe_fast.kernels._shared"


def extension(name):
    return Extension(
        f"moe_fast.kernels.{name}",
        [str(KERNELS / f"{name}.pyx")],
        include_dirs=[str(KERNELS)],
        depends=DEFINITIONS,
    )


levels = ["_baseline", "_x86_64_v3", "_x86_64_v4"] if HAS_LEVELS else ["_baseline"]

setup(
    ext_modules=cythonize(
        [
            Extension(SHARED, [str(KERNELS / "_shared.c")]),
            *(extension(name) for name in ["_processor", *levels]),
        ],
        shared_utility_qualified_name=SHARED,
        module_name=SHARED,  # names the shared module, which would be "_shared" otherwise
        compiler_directives={
            "language_level": 3,
            "autotestdict": False,
            "boundscheck": DEBUG,
            "wraparound": False,
            "initializedcheck": DEBUG,
            "cdivision": not DEBUG,
            "nonecheck": DEBUG,
            "freethreading_compatible": True,
        },
    ),
    cmdclass={"build_ext": BuildKernels, "build_py": BuildWithExamples},
)

"""The extension modules: one build of the kernels per SIMD level, and the processor check."""

import os
import subprocess
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

platform = sysconfig.get_platform()
ON_X86_64 = platform.endswith(("x86_64", "amd64")) and not platform.startswith("macosx")
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
To be told whether there is a wheel: pip install --only-binary moe-fast moe-fast"""


# What not every compiler takes. GCC copies functions for arguments it guesses: an eighth of the
# wheel, and no faster. Where a loop begins decided over a tenth of its time, by luck.
WHERE_ACCEPTED = ["-fno-ipa-cp-clone", "-falign-functions=64", "-falign-loops=32"]


class BuildKernels(build_ext):
    """Flags by compiler; the compiler is known only here."""

    def accepts(self, flag):
        command = [*self.compiler.compiler_so, flag, "-fsyntax-only", "-xc", os.devnull]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:  # no compiler: what compiles says so
            return False

    def build_extensions(self):
        for extension in self.extensions:
            level = extension.name.rpartition(".")[2]
            if self.compiler.compiler_type == "msvc":
                extension.extra_compile_args = ["/O2", "/fp:precise"]
                level_flags = LEVEL_FLAGS["msvc"]
            else:
                # GCC fuses a*b+c by default, which would change the last bit of a weight. And it
                # keeps loops with conditions scalar, to raise the processor's floating-point flags
                # in order, which nobody reads.
                extension.extra_compile_args = ["-O3", "-ffp-contract=off", "-fno-trapping-math"]
                extension.extra_compile_args += filter(self.accepts, WHERE_ACCEPTED)
                if SANITIZE:
                    sanitizers = [
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


KERNELS = Path("src/moe_fast/kernels")
DEFINITIONS = sorted(str(file) for end in ("pxi", "h") for file in KERNELS.rglob(f"*.{end}"))
# What Cython adds to every module that takes buffers, compiled once instead of once a level.
SHARED = "moe_fast.kernels._shared"


def extension(name):
    return Extension(
        f"moe_fast.kernels.{name}",
        [str(KERNELS / f"{name}.pyx")],
        include_dirs=[str(KERNELS)],
        depends=DEFINITIONS,
    )


levels = ["_baseline", "_x86_64_v3", "_x86_64_v4"] if ON_X86_64 else ["_baseline"]

setup(
    ext_modules=cythonize(
        [
            Extension(SHARED, [str(KERNELS / "_shared.c")]),
            *(extension(name) for name in ["_processor", *levels]),
        ],
        shared_utility_qualified_name=SHARED,
        module_name=SHARED,  # of the shared module alone; without it, it takes the name "_shared"
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
    cmdclass={"build_ext": BuildKernels},
)

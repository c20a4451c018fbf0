# The kernels, included once per SIMD level. They neither check nor raise: callers do.

from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint64_t

include "generator.pxi"
include "counting.pxi"

# The kernels, included once per SIMD level. They neither check nor raise: callers do.

from cpython.buffer cimport (
    PyBUF_RECORDS, PyBUF_RECORDS_RO, PyBuffer_Release, PyObject_GetBuffer
)
from libc.math cimport fabs, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

include "generator.pxi"
include "counting.pxi"
include "normal.pxi"
include "routing.pxi"
include "conversion.pxi"

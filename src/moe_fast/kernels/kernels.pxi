# All kernels; each SIMD level includes them once. They do not check their arguments: callers do.

from cpython.buffer cimport (
    PyBUF_RECORDS, PyBUF_RECORDS_RO, PyBuffer_Release, PyObject_GetBuffer
)
from libc.math cimport fabs, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

include "memory.pxi"
include "arithmetic.pxi"
include "generator.pxi"
include "counting.pxi"
include "conversion.pxi"
include "low_rank.pxi"
include "moments.pxi"
include "columns.pxi"

include "routing/blocks.pxi"
include "routing/lanes.pxi"
include "routing/compress.pxi"
include "normal.pxi"
include "routing/transpose.pxi"
include "routing/load.pxi"
include "routing/softmax.pxi"
include "routing/kth_largest.pxi"
include "routing/sorting_network.pxi"
include "routing/top_k.pxi"
include "routing/rule.pxi"
include "routing/weights.pxi"
include "routing/token_choice.pxi"
include "routing/next_token.pxi"
include "routing/counting_sort.pxi"
include "routing/capacity.pxi"
include "routing/expert_choice.pxi"
include "routing/statistics.pxi"
include "routing/gradients.pxi"

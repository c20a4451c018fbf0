# Routing. A call walks its tokens in blocks of LANES: whatever is summed is summed in that many
# lanes and then by halves, and whatever is rounded is rounded by the operations written here, so
# that neither the width of the processor's vectors nor the number of threads reaches the results.

cdef extern from "c/vector.h":
    # Not the step of a `range`: Cython wants to see its sign. `for ... by` takes it.
    enum: LANES

cdef enum:
    CACHE_LINE = 64

ctypedef fused real:
    float
    double


cdef inline void* from_cache_line(void* memory) noexcept nogil:
    # Where the next one begins: a vector that lies in two takes twice as long to read or to write.
    return <char*>memory + (-<uintptr_t>memory) % CACHE_LINE


cdef inline void* room_for(Py_ssize_t count, size_t size, Py_ssize_t num_experts) except NULL:
    # So much from a cache line on.
    cdef void* memory = malloc(count * size + CACHE_LINE)
    if memory == NULL:
        raise MemoryError(f"no memory to route among num_experts={num_experts}")
    return memory


include "routing_arithmetic.pxi"
include "routing_lanes.pxi"
include "routing_compress.pxi"
include "routing_transpose.pxi"
include "routing_rows.pxi"
include "routing_network.pxi"
include "routing_rule.pxi"
include "routing_choice.pxi"
include "routing_weights.pxi"
include "routing_tokens.pxi"
include "routing_again.pxi"
include "routing_order.pxi"
include "routing_experts.pxi"
include "routing_statistics.pxi"
include "routing_gradients.pxi"

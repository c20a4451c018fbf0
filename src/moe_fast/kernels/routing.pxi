# Routing. A call walks its tokens in blocks of LANES: whatever is summed is summed in that many
# lanes and then by halves, and whatever is rounded is rounded by the operations written here, so
# that neither the width of the processor's vectors nor the number of threads reaches the results.

cdef enum:
    LANES = 16  # and so the step of ranges, which Cython wants as a literal

ctypedef fused real:
    float
    double

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

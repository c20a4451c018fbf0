/* Batcher's sorting networks of 8 and 16 columns, each lane for itself. Written out, so that what
   is sorted stays in registers. */

#ifndef MOE_FAST_SORTING_NETWORK_H
#define MOE_FAST_SORTING_NETWORK_H

#include "vector.h"
#include <stddef.h>

/* The larger of x[a] and x[b] to x[a], the smaller to x[b]. */
#define EXCHANGE(a, b)                                                                             \
    most = OP(max)(x[a], x[b]);                                                                    \
    x[b] = OP(min)(x[a], x[b]);                                                                    \
    x[a] = most;
#define EXCHANGE_4(a, b, c, d, e, f, g, h)                                                         \
    EXCHANGE(a, b) EXCHANGE(c, d) EXCHANGE(e, f) EXCHANGE(g, h)

/* Odd-even merge sort of x[o] to x[o + 7]. */
#define SORT_8(o)                                                                                  \
    EXCHANGE_4(o, o + 1, o + 2, o + 3, o + 4, o + 5, o + 6, o + 7)                                 \
    EXCHANGE_4(o, o + 2, o + 1, o + 3, o + 4, o + 6, o + 5, o + 7)                                 \
    EXCHANGE(o + 1, o + 2)                                                                         \
    EXCHANGE(o + 5, o + 6)                                                                         \
    EXCHANGE_4(o, o + 4, o + 1, o + 5, o + 2, o + 6, o + 3, o + 7)                                 \
    EXCHANGE(o + 2, o + 4)                                                                         \
    EXCHANGE(o + 3, o + 5)                                                                         \
    EXCHANGE(o + 1, o + 2)                                                                         \
    EXCHANGE(o + 3, o + 4)                                                                         \
    EXCHANGE(o + 5, o + 6)

/* Bitonic merge of x[o] to x[o + 7]. */
#define MERGE_8(o)                                                                                 \
    EXCHANGE_4(o, o + 4, o + 1, o + 5, o + 2, o + 6, o + 3, o + 7)                                 \
    EXCHANGE_4(o, o + 2, o + 1, o + 3, o + 4, o + 6, o + 5, o + 7)                                 \
    EXCHANGE_4(o, o + 1, o + 2, o + 3, o + 4, o + 5, o + 6, o + 7)

#define REAL float
#define S    ps
#include "sorting_network_of_real.h"
#undef REAL
#undef S

#define REAL double
#define S    pd
#include "sorting_network_of_real.h"
#undef REAL
#undef S

#undef EXCHANGE
#undef EXCHANGE_4
#undef SORT_8
#undef MERGE_8

#endif

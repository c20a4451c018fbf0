/* Steps over LANES values at once that compilers do not reliably find in plain loops: comparisons
   as bits, and choosing by them. One text for every width of vector and for both types. */

#ifndef MOE_FAST_LANES_H
#define MOE_FAST_LANES_H

#include "vector.h"
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch((const void *)(address), 0, 2)
#elif defined(_M_X64)
#define PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T1)
#else
#define PREFETCH(address) ((void)(address))
#endif

/* Fetch n bytes that lie `ahead` bytes after x, or none if that is 0. They may lie past the end of
   the array. Into the second cache: in the first they took the place of rows in use. */
static inline void prefetch_ahead(const void *x, ptrdiff_t n, ptrdiff_t ahead) {
    if (ahead)
        for (ptrdiff_t i = 0; i < n; i += 64)
            PREFETCH((uintptr_t)x + (uintptr_t)(ahead + i));
}

#define REAL float
#define S    ps
#include "lanes_of_real.h"
#undef REAL
#undef S

#define REAL double
#define S    pd
#include "lanes_of_real.h"
#undef REAL
#undef S

#endif

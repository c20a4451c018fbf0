/* Included by compress.h for REAL float and double; OWN_... says what it wrote for floats itself. */

#define NAME(name) JOIN(name, REAL)

#ifndef OWN_COUNT
/* How many of n values are at least the bound. */
static inline ptrdiff_t NAME(count_at_least)(const REAL *x, ptrdiff_t n, REAL bound) {
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i += LANES)
        count += number_of_bits(NAME(mask_at_least)(x + i, bound));
    return count;
}
#endif

#ifndef OWN_COLLECT
/* Indices and values of those from `bound` up, ascending; returns how many. Indices begin at
   `first`, and both outputs have room for LANES more. */
static inline ptrdiff_t NAME(collect_at_least)(
    const REAL *x, ptrdiff_t n, REAL bound, int32_t first, int32_t *index, REAL *value
) {
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        for (ptrdiff_t j = i; j < i + 64 && j < n; j += LANES)
            bits |= (uint64_t)NAME(mask_at_least)(x + j, bound) << (j - i);
        for (; bits; bits &= bits - 1) {
            ptrdiff_t at = i + lowest_bit(bits);
            index[count] = first + (int32_t)at;
            value[count] = x[at];
            count++;
        }
    }
    return count;
}
#endif

#ifndef OWN_COMPACT
/* Bring the values from `bound` up, and what stands beside them, to the front in their order. */
static inline void NAME(compact_at_least)(int32_t *index, REAL *x, ptrdiff_t n, REAL bound) {
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        REAL value = x[i];
        index[count] = index[i];
        x[count] = value;
        count += value >= bound;
    }
}
#endif

#undef NAME

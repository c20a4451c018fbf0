/* Included by sorting_network.h once for REAL float and S ps, once for double and pd. */

#define NAME(name) JOIN(name, REAL)
#define VECTOR     JOIN(vector, REAL)
#define WIDTH      ((int)(sizeof(VECTOR) / sizeof(REAL)))
#define OP(name)   VECTOR_OP(name, S)

/* Columns 0 to 7 and 8 to 15, each half by itself, largest first. */
static inline void NAME(sort_halves)(REAL *column) {
    VECTOR x[16], most;
    for (int i = 0; i < LANES; i += WIDTH) {
        for (int j = 0; j < 16; j++)
            x[j] = OP(loadu)(column + LANES * j + i);
        SORT_8(0)
        SORT_8(8)
        for (int j = 0; j < 16; j++)
            OP(storeu)(column + LANES * j + i, x[j]);
    }
}

/* The k largest of 16 columns to the first k, largest first. */
static inline void NAME(sort_top_k)(REAL *column, ptrdiff_t k) {
    VECTOR x[16], most;
    for (int i = 0; i < LANES; i += WIDTH) {
        for (int j = 0; j < 16; j++)
            x[j] = OP(loadu)(column + LANES * j + i);
        SORT_8(0)
        SORT_8(8)
        EXCHANGE_4(0, 15, 1, 14, 2, 13, 3, 12)
        EXCHANGE_4(4, 11, 5, 10, 6, 9, 7, 8)
        MERGE_8(0)
        for (int j = 0; j < 8; j++)
            OP(storeu)(column + LANES * j + i, x[j]);
        if (k > 8) {
            MERGE_8(8)
            for (int j = 8; j < 16; j++)
                OP(storeu)(column + LANES * j + i, x[j]);
        }
    }
}

#undef NAME
#undef VECTOR
#undef WIDTH
#undef OP

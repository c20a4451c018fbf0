/* Included by lanes.h once for REAL float and S ps, once for double and pd. */

#define NAME(name) JOIN(name, REAL)
#define VECTOR     JOIN(vector, REAL)
#define WIDTH      ((int)(sizeof(VECTOR) / sizeof(REAL)))
#define OP(name)   VECTOR_OP(name, S)

#ifdef OWN_MASKS
/* Bit i: x[i] > bound. */
static inline uint32_t NAME(mask_above)(const REAL *x, REAL bound) {
    return MASK_OF_BLOCK(gt, x, OP(set1)(bound), S);
}

/* Bit i: x[i] >= bound. */
static inline uint32_t NAME(mask_at_least)(const REAL *x, REAL bound) {
    return MASK_OF_BLOCK(ge, x, OP(set1)(bound), S);
}
#else
/* Bit i: x[i] > bound. */
static inline uint32_t NAME(mask_above)(const REAL *x, REAL bound) {
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i += WIDTH)
        bits |= (uint32_t)COMPARE(gt, OP(loadu)(x + i), OP(set1)(bound), S) << i;
    return bits;
}

/* Bit i: x[i] >= bound. */
static inline uint32_t NAME(mask_at_least)(const REAL *x, REAL bound) {
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i += WIDTH)
        bits |= (uint32_t)COMPARE(ge, OP(loadu)(x + i), OP(set1)(bound), S) << i;
    return bits;
}
#endif

/* Whether any of n values, a multiple of LANES, is a NaN. */
static inline int NAME(has_nan)(const REAL *x, ptrdiff_t n) {
    /* One comparison looks at two vectors, unless one vector is a whole block. */
    const int other = WIDTH < LANES ? LANES / 2 : 0;
    FLAGS(S) flags = {0};
    for (ptrdiff_t j = 0; j < n; j += LANES)
        for (int i = 0; i + other < LANES; i += WIDTH) {
            VECTOR a = OP(loadu)(x + j + i), b = OP(loadu)(x + j + i + other);
            flags = JOIN_FLAGS(flags, UNORDERED(a, b, S));
        }
    return ANY_FLAG(flags);
}

/* to[i] = x[i] - largest[i] for x[i] <= largest[i], and 0 for infinity less itself. */
static inline void NAME(subtract_largest)(const REAL *x, const REAL *largest, REAL *to) {
    for (int i = 0; i < LANES; i += WIDTH) {
        VECTOR less = OP(sub)(OP(loadu)(x + i), OP(loadu)(largest + i));
        OP(storeu)(to + i, OP(min)(less, OP(set1)((REAL)0)));
    }
}

/* to[i] += x[i] */
static inline void NAME(add_to)(REAL *to, const REAL *x) {
    for (int i = 0; i < LANES; i += WIDTH)
        OP(storeu)(to + i, OP(add)(OP(loadu)(to + i), OP(loadu)(x + i)));
}

/* to[i] += x[i] * y[i], both rounded */
static inline void NAME(add_product_to)(REAL *to, const REAL *x, const REAL *y) {
    for (int i = 0; i < LANES; i += WIDTH) {
        VECTOR product = OP(mul)(OP(loadu)(x + i), OP(loadu)(y + i));
        OP(storeu)(to + i, OP(add)(OP(loadu)(to + i), product));
    }
}

/* to[i] *= x[i] */
static inline void NAME(multiply_by)(REAL *to, const REAL *x) {
    for (int i = 0; i < LANES; i += WIDTH)
        OP(storeu)(to + i, OP(mul)(OP(loadu)(to + i), OP(loadu)(x + i)));
}

/* to[i] /= x[i] */
static inline void NAME(divide_by)(REAL *to, const REAL *x) {
    for (int i = 0; i < LANES; i += WIDTH)
        OP(storeu)(to + i, OP(div)(OP(loadu)(to + i), OP(loadu)(x + i)));
}

/* to[i] = x[i] * (y[i] - z[i]), both rounded */
static inline void NAME(times_difference)(const REAL *x, const REAL *y, const REAL *z, REAL *to) {
    for (int i = 0; i < LANES; i += WIDTH) {
        VECTOR difference = OP(sub)(OP(loadu)(y + i), OP(loadu)(z + i));
        OP(storeu)(to + i, OP(mul)(OP(loadu)(x + i), difference));
    }
}

/* x[i] = the larger of x[i] and `least`. */
static inline void NAME(raise_to)(REAL *x, REAL least) {
    for (int i = 0; i < LANES; i += WIDTH)
        OP(storeu)(x + i, OP(max)(OP(loadu)(x + i), OP(set1)(least)));
}

/* to[i] = the larger of to[i] and the smaller of a[i] and b[i]. */
static inline void NAME(max_with_min)(REAL *to, const REAL *a, const REAL *b) {
    for (int i = 0; i < LANES; i += WIDTH) {
        VECTOR smaller = OP(min)(OP(loadu)(a + i), OP(loadu)(b + i));
        OP(storeu)(to + i, OP(max)(OP(loadu)(to + i), smaller));
    }
}

/* to[i] = the largest of x[i], x[i + step], ... before n. */
static inline void NAME(fold_max)(const REAL *x, ptrdiff_t n, ptrdiff_t step, REAL *to) {
    for (int i = 0; i < LANES; i += WIDTH) {
        VECTOR most = OP(loadu)(x + i);
        for (ptrdiff_t j = i + step; j < n; j += step)
            most = OP(max)(OP(loadu)(x + j), most);
        OP(storeu)(to + i, most);
    }
}

/* The same of x[i], x[i + LANES], ...; returns whether a NaN is among them. */
static inline int NAME(fold_max_checked)(const REAL *x, ptrdiff_t n, REAL *to) {
    FLAGS(S) flags = {0};
    for (int i = 0; i < LANES; i += WIDTH) {
        VECTOR a, b, most = OP(loadu)(x + i);
        ptrdiff_t j;
        flags = JOIN_FLAGS(flags, UNORDERED(most, most, S));
        for (j = i + LANES; j + LANES < n; j += 2 * LANES) {
            a = OP(loadu)(x + j);
            b = OP(loadu)(x + j + LANES);
            flags = JOIN_FLAGS(flags, UNORDERED(a, b, S));
            most = OP(max)(OP(max)(a, b), most);
        }
        if (j < n) {
            a = OP(loadu)(x + j);
            flags = JOIN_FLAGS(flags, UNORDERED(a, a, S));
            most = OP(max)(a, most);
        }
        OP(storeu)(to + i, most);
    }
    return ANY_FLAG(flags);
}

/* Insertion: put x, of index e, among best[0] >= best[1] >= ... best[last], behind its equals;
   those it passes move on and the last one out. */
static inline void NAME(insert)(VECTOR *best, VECTOR *index, int last, VECTOR x, VECTOR e) {
    for (int s = last; s > 0; s--) {
        VECTOR here = SELECT_ABOVE(x, best[s], e, index[s], S);
        index[s] = SELECT_ABOVE(x, best[s - 1], index[s - 1], here, S);
        best[s] = OP(max)(OP(min)(x, best[s - 1]), best[s]);
    }
    index[0] = SELECT_ABOVE(x, best[0], e, index[0], S);
    best[0] = OP(max)(x, best[0]);
}

/* The k <= 16 largest of each lane of column[0], column[LANES], ... before column[LANES * n], and
   their indices, in the same form. */
static inline void NAME(insert_columns)(
    const REAL *column, ptrdiff_t n, int k, REAL *best, REAL *index
) {
    VECTOR b[16], j[16];
    for (int i = 0; i < LANES; i += WIDTH) {
        for (int s = 0; s < k; s++) {
            /* The index is there for a -inf, which passes nothing. */
            b[s] = OP(set1)(-(REAL)INFINITY);
            j[s] = OP(set1)((REAL)s);
            NAME(insert)(b, j, s, OP(loadu)(column + LANES * s + i), j[s]);
        }
        for (ptrdiff_t e = k; e < n; e++)
            NAME(insert)(b, j, k - 1, OP(loadu)(column + LANES * e + i), OP(set1)((REAL)e));
        for (int s = 0; s < k; s++) {
            OP(storeu)(best + LANES * s + i, b[s]);
            OP(storeu)(index + LANES * s + i, j[s]);
        }
    }
}

/* The same. With a small k known to the compiler, all of it stays in registers. */
static inline void NAME(top_k_of_columns)(
    const REAL *column, ptrdiff_t n, int k, REAL *best, REAL *index
) {
    if (k == 1)
        NAME(insert_columns)(column, n, 1, best, index);
    else if (k == 2)
        NAME(insert_columns)(column, n, 2, best, index);
    else if (k == 3)
        NAME(insert_columns)(column, n, 3, best, index);
    else if (k == 4)
        NAME(insert_columns)(column, n, 4, best, index);
    else
        NAME(insert_columns)(column, n, k, best, index);
}

#undef NAME
#undef VECTOR
#undef WIDTH
#undef OP

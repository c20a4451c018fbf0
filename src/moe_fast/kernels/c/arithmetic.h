/* Two steps of the exponential that Cython cannot write. */

#ifndef MOE_FAST_ARITHMETIC_H
#define MOE_FAST_ARITHMETIC_H

#include "bits.h"
#include <math.h>

/* p * 2^n, where the low bits of `shifted` hold n. */
static inline float times_power_of_2_float(float p, float shifted) {
    return float_of_bits(bits_of_float(p) + (bits_of_float(shifted) << 23));
}

static inline double times_power_of_2_double(double p, double shifted) {
    return double_of_bits(bits_of_double(p) + (bits_of_double(shifted) << 52));
}

/* x - n * c, where n * c is a float (a double): whether it is rounded makes no difference. */
#if (defined(__FMA__) || defined(__aarch64__)) && defined(__GNUC__)
static inline float subtract_product_float(float x, float n, float c) {
    return __builtin_fmaf(-n, c, x);
}

static inline double subtract_product_double(double x, double n, double c) {
    return __builtin_fma(-n, c, x);
}
#else
static inline float subtract_product_float(float x, float n, float c) {
    return x - n * c;
}

static inline double subtract_product_double(double x, double n, double c) {
    return x - n * c;
}
#endif

#endif

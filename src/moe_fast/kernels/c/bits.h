/* Numbers as their bits, and bits counted and found. */

#ifndef MOE_FAST_BITS_H
#define MOE_FAST_BITS_H

#include "platform.h"
#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline double double_of_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint64_t bits_of_double(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Of bits of which one is set. */
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>

static inline int lowest_bit(uint64_t bits) {
    unsigned long i;
    if (_BitScanForward(&i, (unsigned long)bits))
        return (int)i;
    _BitScanForward(&i, (unsigned long)(bits >> 32));
    return (int)i + 32;
}
#else
static inline int lowest_bit(uint64_t bits) {
    return __builtin_ctzll(bits);
}
#endif

/* Of 16 bits. */
#if defined(__POPCNT__) || (defined(__aarch64__) && defined(__GNUC__))
static inline int number_of_bits(uint32_t bits) {
    return __builtin_popcount(bits);
}
#else
static inline int number_of_bits(uint32_t bits) {
    bits = bits - ((bits >> 1) & 0x5555); /* sums of pairs, fours, eights */
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333);
    bits = (bits + (bits >> 4)) & 0x0F0F;
    return (int)((bits + (bits >> 8)) & 0x1F);
}
#endif

#endif

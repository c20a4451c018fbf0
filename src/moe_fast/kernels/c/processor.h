/* Which of the psABI's levels this processor has, and its operating system allows. */

#ifndef MOE_FAST_PROCESSOR_H
#define MOE_FAST_PROCESSOR_H

#include "platform.h"

#if defined(__x86_64__) || defined(_M_X64)

#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>

static void cpuid(int leaf, unsigned out[4]) {
    __cpuidex((int *)out, leaf, 0);
}

static unsigned saved_state(void) {
    return (unsigned)_xgetbv(0);
}
#else
#include <cpuid.h>

static void cpuid(int leaf, unsigned out[4]) {
    __cpuid_count(leaf, 0, out[0], out[1], out[2], out[3]);
}

static unsigned saved_state(void) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#endif

static int has_all(unsigned bits, unsigned wanted) {
    return (bits & wanted) == wanted;
}

/* Processors with AVX2 or AVX-512 have all of the levels below, and the operating system says in
   xgetbv which registers it keeps when it switches between threads. */
static int has_v3(void) {
    unsigned out[4];
    cpuid(0, out);
    if (out[0] < 7)
        return 0;
    cpuid(1, out); /* FMA, MOVBE, OSXSAVE, AVX, F16C; xgetbv is illegal without OSXSAVE */
    if (!has_all(out[2], 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29))
        return 0;
    if (!has_all(saved_state(), 0x06)) /* xmm, ymm */
        return 0;
    cpuid((int)0x80000001, out);
    if (!has_all(out[2], 1u << 5)) /* LZCNT */
        return 0;
    cpuid(7, out);
    return has_all(out[1], 1u << 3 | 1u << 5 | 1u << 8); /* BMI1, AVX2, BMI2 */
}

static int has_v4(void) {
    unsigned out[4];
    if (!has_v3() || !has_all(saved_state(), 0xE6)) /* and opmask, zmm */
        return 0;
    cpuid(7, out); /* AVX-512 F, DQ, CD, BW, VL */
    return has_all(out[1], 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31);
}

#else

static int has_v3(void) {
    return 0;
}

static int has_v4(void) {
    return 0;
}

#endif

#endif

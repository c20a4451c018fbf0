"""What this processor can do, asked without an instruction that it may not have."""

cdef extern from *:
    """
    #if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    static int has_v3(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi")
            && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
    }
    static int has_v4(void) {
        return has_v3() && __builtin_cpu_supports("avx512f")
            && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    #elif defined(_M_X64)
    #include <intrin.h>
    #include <immintrin.h>
    static int leaf7(int bits, unsigned long long saved) {
        int r[4];
        __cpuid(r, 0);
        if (r[0] < 7) return 0;
        __cpuid(r, 1);
        /* FMA, OSXSAVE, AVX: without OSXSAVE, xgetbv itself is illegal. */
        if ((r[2] & 0x18001000) != 0x18001000) return 0;
        if ((_xgetbv(0) & saved) != saved) return 0;
        __cpuidex(r, 7, 0);
        return (r[1] & bits) == bits;
    }
    static int has_v3(void) { return leaf7(0x128, 0x6); }
    /* AVX-512 F, DQ, CD, BW, VL; the operating system keeps opmask and zmm. */
    static int has_v4(void) { return has_v3() && leaf7((int)0xD0030000, 0xE6); }
    #else
    static int has_v3(void) { return 0; }
    static int has_v4(void) { return 0; }
    #endif
    """
    bint has_v3()
    bint has_v4()


def supports(str level):
    """Whether this processor, and its operating system, run code of `level`."""
    return level == "baseline" or (level == "x86-64-v3" and has_v3()) or (
        level == "x86-64-v4" and has_v4()
    )

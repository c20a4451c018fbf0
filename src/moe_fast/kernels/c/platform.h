/* What every result depends on. A compiler for another platform is refused here. */

#ifndef MOE_FAST_PLATFORM_H
#define MOE_FAST_PLATFORM_H

#include <float.h>

/* safetensors files are little-endian, and their bytes are moved as they are in memory. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "moe_fast needs a little-endian processor: this one would write wrong bytes"
#endif

/* The x87 registers, GCC's default for 32-bit x86, round to 64 bits and then once more. 16 is said
   where only float16 is rounded to its type, and the kernels compute in none. */
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "moe_fast needs arithmetic that rounds to the type: on 32-bit x86, -msse2 -mfpmath=sse"
#endif

#endif

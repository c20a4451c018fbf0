/* The reference's linear congruential generator, and what it makes of each state.

   A row of the result takes draws in equal steps. Its values are made in lanes that start next to
   each other and all jump ahead by the number of lanes: steps of such a generator are one
   multiply-add, whatever their number. C, because vectors of the level's width are a matter of the
   compiler; where it has none, a vector is one number wide and the same lines hold. */

#ifndef MOE_FAST_GENERATOR_H
#define MOE_FAST_GENERATOR_H

#include "platform.h"
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define INLINE                static inline __attribute__((always_inline))
#define CONVERT(values, type) __builtin_convertvector(values, type)
#define MASK(condition)       ((States)(condition))
#if defined(__AVX512F__)
#define IN_VECTOR 8
#elif defined(__AVX2__)
#define IN_VECTOR 4
#else
#define IN_VECTOR 2
#endif
#define VECTOR_OF(type) type __attribute__((vector_size(IN_VECTOR * sizeof(type))))
#else
#define INLINE                static __forceinline
#define CONVERT(values, type) ((type)(values))
#define MASK(condition)       (-(States)(condition))
#define IN_VECTOR             1
#define VECTOR_OF(type)       type
#endif

typedef VECTOR_OF(uint64_t) States;
typedef VECTOR_OF(double) Doubles;
typedef VECTOR_OF(float) Floats;
typedef VECTOR_OF(uint32_t) Words;

/* Stores around the caches, for a result that does not fit in them: saves reading each line. */
#if IN_VECTOR == 8
#include <immintrin.h>
#define STREAM(out, values) _mm512_stream_pd((double *)(out), (__m512d)(values))
#define FINISH_STREAM()     _mm_sfence()
#elif IN_VECTOR == 4
#include <immintrin.h>
#define STREAM(out, values) _mm256_stream_pd((double *)(out), (__m256d)(values))
#define FINISH_STREAM()     _mm_sfence()
#elif IN_VECTOR == 2 && defined(__SSE2__)
#include <emmintrin.h>
#define STREAM(out, values) _mm_stream_pd((double *)(out), (__m128d)(values))
#define FINISH_STREAM()     _mm_sfence()
#else
#if defined(__aarch64__) && IN_VECTOR == 2
#include <arm_neon.h>
#endif
#define STREAM(out, values) memcpy(out, &(values), sizeof(values))
#define FINISH_STREAM()     ((void)0)
#endif

/* Vectors computed side by side: one multiplication takes as long as this many take to start. */
#define VECTORS   4
#define NUM_LANES (VECTORS * IN_VECTOR)

enum { AS_FLOAT64, AS_FLOAT32, AS_FLOAT16, AS_BFLOAT16 };

INLINE size_t size_of(int format) {
    return format == AS_FLOAT64 ? 8 : format == AS_FLOAT32 ? 4 : 2;
}

INLINE Doubles as_doubles(States bits) {
    Doubles d;
    memcpy(&d, &bits, sizeof d);
    return d;
}

INLINE States as_bits(Doubles d) {
    States bits;
    memcpy(&bits, &d, sizeof bits);
    return bits;
}

typedef struct {
    uint64_t multiplier, increment;
} Jump;

INLINE uint64_t advance(uint64_t state, Jump jump) {
    return state * jump.multiplier + jump.increment;
}

/* `steps` steps at once, in O(log steps): F. Brown, Random number generation with arbitrary
   strides, 1994. */
static Jump jump_by(uint64_t steps) {
    Jump jump = {1, 0}, power = {6364136223846793005u, 1};
    for (; steps; steps >>= 1) {
        if (steps & 1) {
            jump.increment = advance(jump.increment, power);
            jump.multiplier *= power.multiplier;
        }
        power.increment = advance(power.increment, power);
        power.multiplier *= power.multiplier;
    }
    return jump;
}

/* What the draws of a row have in common. */
typedef struct {
    Jump step, stride;                              /* to the next value; by all lanes */
    States multiplier[VECTORS], increment[VECTORS]; /* from the row's first to each lane */
    int shift;                                      /* of the state, to the bits of a draw */
    double base, scale;
} Row;

static void set_row(Row *row, Jump step, int format, int full_range, double base, double scale) {
    uint64_t multiplier[NUM_LANES], increment[NUM_LANES];
    Jump jump = {1, 0};
    for (int i = 0; i < NUM_LANES; i++) {
        int lane = i;
        /* Two bytes a value: neighbours lie in two vectors, to be joined in one word. */
        if (format >= AS_FLOAT16)
            lane += i % 2 * IN_VECTOR + i / 2 % IN_VECTOR - i % (2 * IN_VECTOR);
        multiplier[lane] = jump.multiplier;
        increment[lane] = jump.increment;
        jump.increment = advance(jump.increment, step);
        jump.multiplier *= step.multiplier;
    }
    memcpy(row->multiplier, multiplier, sizeof multiplier);
    memcpy(row->increment, increment, sizeof increment);
    row->step = step;
    row->stride = jump;
    row->shift = full_range ? 32 : 33;
    row->base = base;
    row->scale = scale;
}

/* base + (f * 2 - 1) * scale with f = v / (2^32 - 1), v the state's top bits. At 2^21 the last
   place is 2^-31, so v becomes v * 2^-31 without a conversion. Twice the quotient is that times
   1 + 2^-32 + 2^-64: rounded as the quotient is, for every v (a test tries them all). Rounded once,
   by a fused multiply-add, it is the same for every v, too. */
#if defined(__aarch64__) && IN_VECTOR == 2
#define ADD_PRODUCT(a, x, y) ((Doubles)vfmaq_n_f64((float64x2_t)(a), (float64x2_t)(x), y))
#else
#define ADD_PRODUCT(a, x, y) ((a) + (x) * (y))
#endif

INLINE Doubles draw(States states, const Row *row) {
    States bits = (states >> row->shift) | 0x4140000000000000u;
    Doubles v = as_doubles(bits) - 0x1p21;
    Doubles twice = ADD_PRODUCT(v, v, 0x1p-32 + 0x1p-64);
    return row->base + (twice - 1.0) * row->scale;
}

/* Below, an addend is chosen so that the sum's last place is the format's at that magnitude:
   the addition itself rounds, once, to nearest and to even. No value exceeds 2, none but 0 is
   as small as 2^-126. */

/* float32 words of values rounded to bfloat16, whose bits are the upper half. */
INLINE Words round_to_bfloat16_words(Doubles values) {
    Doubles addend = as_doubles(as_bits(values) & 0x7FF0000000000000u) * 0x1.8p45;
    Floats rounded = CONVERT((values + addend) - addend, Floats);
    Words words;
    memcpy(&words, &rounded, sizeof words);
    return words;
}

/* The sum's lowest bits are the significand in units of the last place, so adding its exponent
   gives float16's bits; below 2^-14 the exponent stays and they are subnormal. */
INLINE States round_to_float16_bits(Doubles values) {
    States sign = (as_bits(values) >> 48) & 0x8000;
    States magnitude = as_bits(values) & 0x7FFFFFFFFFFFFFFFu;
    States power = magnitude & 0x7FF0000000000000u;
    States least = (States){0} + 0x3F10000000000000u;
    States normal = MASK(as_doubles(power) > as_doubles(least));
    States sum;
    power = (power & normal) | (least & ~normal);
    sum = as_bits(as_doubles(magnitude) + as_doubles(power) * 0x1p42);
    return (((sum >> 42) + sum - (1051u << 10)) & 0x7FFF) | sign;
}

/* Two vectors of values, rounded once to the format. */
INLINE void store(char *out, int format, int stream, Doubles first, Doubles second) {
    if (format == AS_FLOAT64 && stream) {
        STREAM(out, first);
        STREAM(out + sizeof first, second);
    } else if (format == AS_FLOAT64) {
        memcpy(out, &first, sizeof first);
        memcpy(out + sizeof first, &second, sizeof second);
    } else if (format == AS_FLOAT32) {
        Floats rounded[2] = {CONVERT(first, Floats), CONVERT(second, Floats)};
        memcpy(out, rounded, sizeof rounded);
    } else if (format == AS_FLOAT16) {
        States pairs = round_to_float16_bits(first) | (round_to_float16_bits(second) << 16);
        Words words = CONVERT(pairs, Words);
        memcpy(out, &words, sizeof words);
    } else {
        Words words = (round_to_bfloat16_words(first) >> 16) |
                      (round_to_bfloat16_words(second) & 0xFFFF0000u);
        memcpy(out, &words, sizeof words);
    }
}

/* The states of a vector's lanes while they are advanced. */
#if defined(__aarch64__) && IN_VECTOR == 2
/* No vector of NEON multiplies 64 bits: they stay where that is done, and only leave it. */
typedef struct {
    uint64_t first, second;
} Lanes;

INLINE Lanes lanes_of(States states) {
    return (Lanes){states[0], states[1]};
}

INLINE States states_of(Lanes lanes) {
    return (States){lanes.first, lanes.second};
}

INLINE Lanes advance_lanes(Lanes lanes, Jump jump) {
    return (Lanes){advance(lanes.first, jump), advance(lanes.second, jump)};
}
#else
typedef States Lanes;

INLINE Lanes lanes_of(States states) {
    return states;
}

INLINE States states_of(Lanes lanes) {
    return lanes;
}

INLINE Lanes advance_lanes(Lanes lanes, Jump jump) {
    return lanes * jump.multiplier + jump.increment;
}
#endif

INLINE void start_lanes(Lanes *lanes, uint64_t state, const Row *row) {
    for (int i = 0; i < VECTORS; i++)
        lanes[i] = lanes_of(state * row->multiplier[i] + row->increment[i]);
}

/* The first `size` of the lanes, fewer than all. */
INLINE void store_part(char *out, size_t size, const Lanes *lanes, const Row *row, int format) {
    const size_t itemsize = size_of(format);
    char all[NUM_LANES * 8];
    for (int i = 0; i < VECTORS; i += 2)
        store(
            all + i * IN_VECTOR * itemsize, format, 0, draw(states_of(lanes[i]), row),
            draw(states_of(lanes[i + 1]), row)
        );
    memcpy(out, all, size * itemsize);
}

/* `size` values, from `state` on. */
INLINE void fill_row(
    char *out, size_t size, uint64_t state, const Row *row, int format, int stream
) {
    const size_t itemsize = size_of(format);
    const size_t vector = IN_VECTOR * itemsize;
    const Jump stride = row->stride;
    Lanes lanes[VECTORS];
    /* Up to an address that is a multiple of a vector: streaming needs it, and stores are faster. */
    size_t head = (vector - (size_t)out % vector) % vector / itemsize;
    if (head > size)
        head = size;
    start_lanes(lanes, state, row);
    if (head) {
        store_part(out, head, lanes, row, format);
        out += head * itemsize;
        size -= head;
        for (; head; head--)
            state = advance(state, row->step);
        start_lanes(lanes, state, row);
    }
    for (; size >= NUM_LANES; size -= NUM_LANES, out += NUM_LANES * itemsize)
        for (int i = 0; i < VECTORS; i += 2) {
            store(
                out + i * vector, format, stream, draw(states_of(lanes[i]), row),
                draw(states_of(lanes[i + 1]), row)
            );
            lanes[i] = advance_lanes(lanes[i], stride);
            lanes[i + 1] = advance_lanes(lanes[i + 1], stride);
        }
    if (size)
        store_part(out, size, lanes, row, format);
}

/* Values begin to end of an array of layers of rows. A row begins at draw
   first + layer * to_layer + row * to_row. */
INLINE void fill(
    void *out, size_t begin, size_t end, size_t num_rows, size_t row_length, uint64_t seed,
    uint64_t first, uint64_t to_layer, uint64_t to_row, uint64_t to_column, int full_range,
    double base, double scale, int format, int stream
) {
    const size_t itemsize = size_of(format);
    const Jump row_jump = jump_by(to_row);
    size_t layer = begin / row_length / num_rows;
    size_t row = begin / row_length % num_rows;
    size_t column = begin % row_length;
    uint64_t origin = advance(seed, jump_by(first + layer * to_layer + row * to_row + 1));
    uint64_t state = advance(origin, jump_by(column * to_column));
    Row draws;
    set_row(&draws, jump_by(to_column), format, full_range, base, scale);
    while (begin < end) {
        size_t size = row_length - column < end - begin ? row_length - column : end - begin;
        char *target = (char *)out + begin * itemsize;
        if (format == AS_FLOAT64 && stream)
            fill_row(target, size, state, &draws, format, 1);
        else
            fill_row(target, size, state, &draws, format, 0);
        begin += size;
        column = 0;
        if (++row < num_rows)
            origin = advance(origin, row_jump);
        else {
            row = 0;
            origin = advance(seed, jump_by(first + ++layer * to_layer + 1));
        }
        state = origin;
    }
    if (format == AS_FLOAT64 && stream)
        FINISH_STREAM();
}

#endif

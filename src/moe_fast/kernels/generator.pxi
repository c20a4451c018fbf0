# The reference's linear congruential generator, and what it makes of each state.
#
# A row of the result takes draws in equal steps. Its values are made in lanes that start next to
# each other and all jump ahead by the number of lanes: steps of such a generator are one
# multiply-add, whatever their number. C, because vectors of the level's width are a matter of the
# compiler; where it has none, a vector is one number wide and the same lines hold.

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    #if defined(__GNUC__)
    #define INLINE static inline __attribute__((always_inline))
    #define CONVERTED(values, type) __builtin_convertvector(values, type)
    #define MASK(condition) ((States)(condition))
    #if defined(__AVX512F__)
    #define IN_VECTOR 8
    #elif defined(__AVX2__)
    #define IN_VECTOR 4
    #else
    #define IN_VECTOR 2
    #endif
    #define VECTOR(type) type __attribute__((vector_size(IN_VECTOR * sizeof(type))))
    #else
    #define INLINE static __forceinline
    #define CONVERTED(values, type) ((type)(values))
    #define MASK(condition) (-(States)(condition))
    #define IN_VECTOR 1
    #define VECTOR(type) type
    #endif

    typedef VECTOR(uint64_t) States;
    typedef VECTOR(double) Doubles;
    typedef VECTOR(float) Floats;
    typedef VECTOR(uint32_t) Words;

    /* Around the caches, for a result that would not stay in them: saves reading each line. */
    #if IN_VECTOR == 8
    #include <immintrin.h>
    #define STREAM(out, values) _mm512_stream_pd((double *)(out), (__m512d)(values))
    #define STREAMED() _mm_sfence()
    #elif IN_VECTOR == 4
    #include <immintrin.h>
    #define STREAM(out, values) _mm256_stream_pd((double *)(out), (__m256d)(values))
    #define STREAMED() _mm_sfence()
    #elif IN_VECTOR == 2 && defined(__SSE2__)
    #include <emmintrin.h>
    #define STREAM(out, values) _mm_stream_pd((double *)(out), (__m128d)(values))
    #define STREAMED() _mm_sfence()
    #else
    #define STREAM(out, values) memcpy(out, &(values), sizeof(values))
    #define STREAMED() ((void)0)
    #endif

    /* Vectors in flight: a multiplication takes as long as this many can be started in. */
    #define VECTORS 4
    #define LANES (VECTORS * IN_VECTOR)

    enum { AS_FLOAT64, AS_FLOAT32, AS_FLOAT16, AS_BFLOAT16 };

    INLINE Doubles as_doubles(States bits) { Doubles d; memcpy(&d, &bits, sizeof d); return d; }
    INLINE States as_bits(Doubles d) { States bits; memcpy(&bits, &d, sizeof bits); return bits; }

    typedef struct { uint64_t multiplier, increment; } Jump;

    INLINE uint64_t jumped(uint64_t state, Jump jump) {
        return state * jump.multiplier + jump.increment;
    }

    /* `steps` steps at once, in O(log steps): F. Brown, Random number generation with arbitrary
       strides, 1994. */
    static Jump jump_of(uint64_t steps) {
        Jump jump = {1, 0}, power = {6364136223846793005u, 1};
        for (; steps; steps >>= 1) {
            if (steps & 1) {
                jump.increment = jumped(jump.increment, power);
                jump.multiplier *= power.multiplier;
            }
            power.increment = jumped(power.increment, power);
            power.multiplier *= power.multiplier;
        }
        return jump;
    }

    /* How a row is drawn. */
    typedef struct {
        Jump step, stride;                              /* to the next value; by all lanes */
        States multiplier[VECTORS], increment[VECTORS]; /* from the row's first to each lane */
        int shift;                                      /* of the state, to the bits drawn */
        double base, scale;
    } Stretch;

    static void set_stretch(
        Stretch *stretch, Jump step, int format, int full_range, double base, double scale
    ) {
        uint64_t multiplier[LANES], increment[LANES];
        Jump jump = {1, 0};
        for (int i = 0; i < LANES; i++) {
            int lane = i;
            /* Two bytes a value: neighbours lie in two vectors, to be joined in one word. */
            if (format >= AS_FLOAT16)
                lane += i % 2 * IN_VECTOR + i / 2 % IN_VECTOR - i % (2 * IN_VECTOR);
            multiplier[lane] = jump.multiplier;
            increment[lane] = jump.increment;
            jump.increment = jumped(jump.increment, step);
            jump.multiplier *= step.multiplier;
        }
        memcpy(stretch->multiplier, multiplier, sizeof multiplier);
        memcpy(stretch->increment, increment, sizeof increment);
        stretch->step = step;
        stretch->stride = jump;
        stretch->shift = full_range ? 32 : 33;
        stretch->base = base;
        stretch->scale = scale;
    }

    /* base + (f * 2 - 1) * scale with f = v / (2^32 - 1), v the state's top bits. At 2^21 the last
       place is 2^-31, so v becomes v * 2^-31 without a conversion. Twice the quotient is that times
       1 + 2^-32 + 2^-64: rounded as the quotient is, for every v (a test tries them all). */
    INLINE Doubles drawn(States states, const Stretch *stretch) {
        States bits = (states >> stretch->shift) | 0x4140000000000000u;
        Doubles v = as_doubles(bits) - 0x1p21;
        Doubles twice = v + v * (0x1p-32 + 0x1p-64);
        return stretch->base + (twice - 1.0) * stretch->scale;
    }

    /* Below, an addend is chosen so that the sum's last place is the format's at that magnitude:
       the addition itself rounds, once, to nearest and to even. No value exceeds 2, none but 0 is
       as small as 2^-126. */

    /* float32 words of values rounded to bfloat16, whose bits are the upper half. */
    INLINE Words bfloat16_words(Doubles values) {
        Doubles addend = as_doubles(as_bits(values) & 0x7FF0000000000000u) * 0x1.8p45;
        Floats rounded = CONVERTED((values + addend) - addend, Floats);
        Words words;
        memcpy(&words, &rounded, sizeof words);
        return words;
    }

    /* The sum's lowest bits are the significand in units of the last place, so adding its exponent
       gives float16's bits; below 2^-14 the exponent stays and they are subnormal. */
    INLINE States float16_bits(Doubles values) {
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

    INLINE void put(char *out, int format, int stream, Doubles first, Doubles second) {
        if (format == AS_FLOAT64 && stream) {
            STREAM(out, first);
            STREAM(out + sizeof first, second);
        } else if (format == AS_FLOAT64) {
            memcpy(out, &first, sizeof first);
            memcpy(out + sizeof first, &second, sizeof second);
        } else if (format == AS_FLOAT32) {
            Floats rounded[2] = {CONVERTED(first, Floats), CONVERTED(second, Floats)};
            memcpy(out, rounded, sizeof rounded);
        } else if (format == AS_FLOAT16) {
            States pairs = float16_bits(first) | (float16_bits(second) << 16);
            Words words = CONVERTED(pairs, Words);
            memcpy(out, &words, sizeof words);
        } else {
            Words words = (bfloat16_words(first) >> 16) | (bfloat16_words(second) & 0xFFFF0000u);
            memcpy(out, &words, sizeof words);
        }
    }

    INLINE void start(States *states, uint64_t state, const Stretch *stretch) {
        for (int i = 0; i < VECTORS; i++)
            states[i] = state * stretch->multiplier[i] + stretch->increment[i];
    }

    /* Fewer values than lanes. */
    INLINE void put_part(
        char *out, size_t size, const States *states, const Stretch *stretch, int format
    ) {
        const size_t itemsize = format == AS_FLOAT64 ? 8 : format == AS_FLOAT32 ? 4 : 2;
        char all[LANES * 8];
        for (int i = 0; i < VECTORS; i += 2)
            put(all + i * IN_VECTOR * itemsize, format, 0, drawn(states[i], stretch),
                drawn(states[i + 1], stretch));
        memcpy(out, all, size * itemsize);
    }

    /* `size` values, from `state` on. */
    INLINE void fill_row(
        char *out, size_t size, uint64_t state, const Stretch *stretch, int format, int stream
    ) {
        const size_t itemsize = format == AS_FLOAT64 ? 8 : format == AS_FLOAT32 ? 4 : 2;
        const size_t vector = IN_VECTOR * itemsize;
        const Jump stride = stretch->stride;
        States states[VECTORS];
        /* To the next boundary of a vector, which streaming needs and every store likes. */
        size_t head = (vector - (size_t)out % vector) % vector / itemsize;
        if (head > size)
            head = size;
        start(states, state, stretch);
        if (head) {
            put_part(out, head, states, stretch, format);
            out += head * itemsize;
            size -= head;
            for (; head; head--)
                state = jumped(state, stretch->step);
            start(states, state, stretch);
        }
        for (; size >= LANES; size -= LANES, out += LANES * itemsize)
            for (int i = 0; i < VECTORS; i += 2) {
                put(out + i * vector, format, stream, drawn(states[i], stretch),
                    drawn(states[i + 1], stretch));
                states[i] = states[i] * stride.multiplier + stride.increment;
                states[i + 1] = states[i + 1] * stride.multiplier + stride.increment;
            }
        if (size)
            put_part(out, size, states, stretch, format);
    }

    /* A row begins at draw first + layer * to_layer + row * to_row. */
    INLINE void fill(
        void *out, size_t begin, size_t end, size_t num_rows, size_t row_length, uint64_t seed,
        uint64_t first, uint64_t to_layer, uint64_t to_row, uint64_t to_column, int full_range,
        double base, double scale, int format, int stream
    ) {
        const size_t itemsize = format == AS_FLOAT64 ? 8 : format == AS_FLOAT32 ? 4 : 2;
        const Jump row_jump = jump_of(to_row);
        size_t layer = begin / row_length / num_rows;
        size_t row = begin / row_length % num_rows;
        size_t column = begin % row_length;
        uint64_t origin = jumped(seed, jump_of(first + layer * to_layer + row * to_row + 1));
        uint64_t state = jumped(origin, jump_of(column * to_column));
        Stretch stretch;
        set_stretch(&stretch, jump_of(to_column), format, full_range, base, scale);
        while (begin < end) {
            size_t size = row_length - column < end - begin ? row_length - column : end - begin;
            char *target = (char *)out + begin * itemsize;
            if (format == AS_FLOAT64 && stream)
                fill_row(target, size, state, &stretch, format, 1);
            else
                fill_row(target, size, state, &stretch, format, 0);
            begin += size;
            column = 0;
            if (++row < num_rows)
                origin = jumped(origin, row_jump);
            else {
                row = 0;
                origin = jumped(seed, jump_of(first + ++layer * to_layer + 1));
            }
            state = origin;
        }
        if (format == AS_FLOAT64 && stream)
            STREAMED();
    }
    """
    enum: AS_FLOAT64, AS_FLOAT32, AS_FLOAT16, AS_BFLOAT16
    void fill(
        void *out, size_t begin, size_t end, size_t num_rows, size_t row_length, uint64_t seed,
        uint64_t first, uint64_t to_layer, uint64_t to_row, uint64_t to_column, bint full_range,
        double base, double scale, int format, bint stream,
    ) noexcept nogil


def fill_float64(
    double[::1] out not None, size_t begin, size_t end, size_t num_rows, size_t row_length,
    uint64_t seed, uint64_t first, uint64_t to_layer, uint64_t to_row, uint64_t to_column,
    bint full_range, double base, double scale, bint stream,
):
    """Write `out[begin:end]` of layers of `num_rows` rows of `row_length`, each value rounded once.

    The value in layer `l`, row `i`, column `j` is `base + (f * 2 - 1) * scale`, `f` the top 31 bits
    (32 with `full_range`), over 2^32 - 1, of the generator's state. That started from `seed` and
    made `first + l * to_layer + i * to_row + j * to_column` draws before this one. `stream` writes
    around the caches.
    """
    with nogil:
        fill(
            &out[0], begin, end, num_rows, row_length, seed, first, to_layer, to_row, to_column,
            full_range, base, scale, AS_FLOAT64, stream,
        )


def fill_float32(
    float[::1] out not None, size_t begin, size_t end, size_t num_rows, size_t row_length,
    uint64_t seed, uint64_t first, uint64_t to_layer, uint64_t to_row, uint64_t to_column,
    bint full_range, double base, double scale, bint stream,
):
    """As `fill_float64`."""
    with nogil:
        fill(
            &out[0], begin, end, num_rows, row_length, seed, first, to_layer, to_row, to_column,
            full_range, base, scale, AS_FLOAT32, stream,
        )


def fill_float16(
    uint16_t[::1] out not None, size_t begin, size_t end, size_t num_rows, size_t row_length,
    uint64_t seed, uint64_t first, uint64_t to_layer, uint64_t to_row, uint64_t to_column,
    bint full_range, double base, double scale, bint stream,
):
    """As `fill_float64`, as the bits of float16."""
    with nogil:
        fill(
            &out[0], begin, end, num_rows, row_length, seed, first, to_layer, to_row, to_column,
            full_range, base, scale, AS_FLOAT16, stream,
        )


def fill_bfloat16(
    uint16_t[::1] out not None, size_t begin, size_t end, size_t num_rows, size_t row_length,
    uint64_t seed, uint64_t first, uint64_t to_layer, uint64_t to_row, uint64_t to_column,
    bint full_range, double base, double scale, bint stream,
):
    """As `fill_float64`, as the bits of bfloat16."""
    with nogil:
        fill(
            &out[0], begin, end, num_rows, row_length, seed, first, to_layer, to_row, to_column,
            full_range, base, scale, AS_BFLOAT16, stream,
        )

# Linear congruential generator with jump-ahead: router weights, bit for bit the reference's.

cdef extern from "c/generator.h":
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

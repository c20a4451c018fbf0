/* Router weights for a processor without a Python at hand: the arguments of `fill`, numbers in base 10
   and doubles as their bits, and on standard output the bytes of values begin to end. */

#include "c/generator.h"
#include "c/bits.h"
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    uint64_t n[13];
    if (argc != 14)
        return 2;
    for (int i = 0; i < 13; i++)
        n[i] = strtoull(argv[i + 1], NULL, 10);
    int format = (int)n[12];
    size_t itemsize = size_of(format);
    char *out = malloc(n[1] * itemsize);
    if (!out)
        return 1;
    fill(
        out, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], (int)n[9], double_of_bits(n[10]),
        double_of_bits(n[11]), format, 0
    );
    return fwrite(out + n[0] * itemsize, itemsize, n[1] - n[0], stdout) != n[1] - n[0];
}

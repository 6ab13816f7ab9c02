/* Prints the instruction sets that this machine and build can run, one a line. */
#include "transformer.h"

#include <stdio.h>

int main(void) {
    static const char *const names[] = {"scalar", "neon", "avx2", "avx512"};
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++)
        if (tfm_isa_supported(names[i])) puts(names[i]);
    return 0;
}

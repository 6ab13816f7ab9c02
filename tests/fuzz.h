/* What the fuzz drivers share. A driver is linked with tests/impl.c (fuzz_cache.c has its own copy of the library);
 * for libFuzzer add -fsanitize=fuzzer -DTFM_LIBFUZZER:
 *
 *     cc -g -O1 -fsanitize=address,undefined -I. tests/fuzz_safetensors.c tests/impl.c -o fuzz -lm
 *     ./fuzz             mutations of the driver's seeds: a fixed number (or TFM_FUZZ_RUNS), the same ones in every run
 *     ./fuzz FILE...     these files, and mutations of them
 *
 * A driver has fuzz_seed (built-in inputs), fuzz_words (what mutations like to insert), fuzz_mend (repairs what would
 * be refused too early) and LLVMFuzzerTestOneInput. */
#ifndef TFM_FUZZ_H
#define TFM_FUZZ_H

#include "transformer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A context that cannot take much, made once. */
static tfm_ctx *fuzz_context(void) {
    static tfm_ctx *c;
    tfm_options o;
    if (c) return c;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.memory_limit = 64 << 20;
    c = tfm_create(&o);
    return c;
}

#if !defined(TFM_LIBFUZZER)

enum { FUZZ_ROOM = 1 << 16, FUZZ_RUNS = 20000 };

static size_t fuzz_seed(int number, uint8_t *out); /* 0: there is no such seed */
static const char *const *fuzz_words(void);        /* ends with NULL */
static void fuzz_mend(uint8_t *data, size_t size);

static uint64_t fuzz_state = 1;

static size_t fuzz_random(size_t below) {
    fuzz_state = fuzz_state * 6364136223846793005u + 1442695040888963407u;
    return below ? (size_t)(fuzz_state >> 33) % below : 0;
}

/* An exact copy on the heap, so that a sanitizer sees a read past the end. */
static void fuzz_one(const uint8_t *data, size_t size) {
    uint8_t *copy = (uint8_t *)malloc(size ? size : 1);
    if (!copy) exit(1);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static size_t fuzz_insert(uint8_t *data, size_t size, const uint8_t *what, size_t length) {
    const size_t at = fuzz_random(size + 1);
    if (size + length > FUZZ_ROOM) return size;
    memmove(data + at + length, data + at, size - at);
    memcpy(data + at, what, length);
    return size + length;
}

/* One to four changes. */
static size_t fuzz_mutate(uint8_t *data, size_t size) {
    static const uint32_t numbers[] = {0,          1,          2,          0x7f,    0x80,
                                       0xff,       0x7fff,     0x8000,     0xffff,  0x7fffffff,
                                       0x80000000, 0xfffffffe, 0xffffffff, 0x10000, 0x40000000};
    size_t changes = 1 + fuzz_random(4), words = 0;
    uint8_t piece[64];
    while (fuzz_words()[words]) words++;
    while (changes--) {
        const size_t at = fuzz_random(size), length = 1 + fuzz_random(size - at < 32 ? size - at : 32);
        const uint32_t number = numbers[fuzz_random(sizeof numbers / sizeof numbers[0])];
        switch (fuzz_random(size ? 8 : 2)) {
        case 0:
            if (words) {
                const char *w = fuzz_words()[fuzz_random(words)];
                size = fuzz_insert(data, size, (const uint8_t *)w, strlen(w));
            }
            break;
        case 1:
            piece[0] = (uint8_t)fuzz_random(256);
            size = fuzz_insert(data, size, piece, 1);
            break;
        case 2: data[at] = (uint8_t)fuzz_random(256); break;
        case 3: data[at] ^= (uint8_t)(1u << fuzz_random(8)); break;
        case 4:
            memmove(data + at, data + at + length, size - at - length);
            size -= length;
            break;
        case 5:
            memcpy(piece, data + at, length);
            size = fuzz_insert(data, size, piece, length);
            break;
        case 6:
            if (size >= 4) memcpy(data + fuzz_random(size / 4) * 4, &number, 4);
            break;
        default:
            if (fuzz_random(4) == 0) size = at;
            break;
        }
    }
    return size;
}

static void fuzz_rounds(const uint8_t *seed, size_t size, long rounds) {
    static uint8_t data[FUZZ_ROOM + 64];
    long i;
    fuzz_one(seed, size);
    if (size > FUZZ_ROOM) return;
    for (i = 0; i < rounds; i++) {
        size_t n = size;
        memcpy(data, seed, size);
        n = fuzz_mutate(data, n);
        if (fuzz_random(8)) fuzz_mend(data, n);
        fuzz_one(data, n);
    }
}

int main(int argc, char **argv) {
    static uint8_t seed[1 << 22];
    const char *wanted = getenv("TFM_FUZZ_RUNS");
    const long runs = wanted ? atol(wanted) : FUZZ_RUNS;
    int i, seeds = 0;
    while (fuzz_seed(seeds, seed)) seeds++;
    for (i = 0; argc < 2 && i < seeds; i++) fuzz_rounds(seed, fuzz_seed(i, seed), runs / seeds);
    for (i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        size_t size;
        if (!f) {
            fprintf(stderr, "%s: cannot be read\n", argv[i]);
            return 1;
        }
        size = fread(seed, 1, sizeof seed, f);
        fclose(f);
        fuzz_rounds(seed, size, runs / argc);
    }
    tfm_destroy(fuzz_context());
    return 0;
}
#endif
#endif

/* All memory from your own allocator: here a fixed arena in the program, with a hard cap, as firmware or a plugin
 * would do it.
 *
 *   cc -O2 -I. examples/custom_allocator.c -o custom_allocator -lm && ./custom_allocator */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include <string.h>

typedef struct fixed_arena { size_t used, peak; int64_t blocks; } fixed_arena;
static union { unsigned char bytes[24 << 20]; double align; } memory;

static void *take(void *user, size_t size) {                       /* a bump allocator: free only counts */
    fixed_arena *a = (fixed_arena *)user;
    size_t at = (a->used + 63) & ~(size_t)63;
    if (size > sizeof memory.bytes - at) return NULL;
    a->used = at + size;
    if (a->used > a->peak) a->peak = a->used;
    a->blocks++;
    return memory.bytes + at;
}
static void give(void *user, void *pointer) {
    fixed_arena *a = (fixed_arena *)user;
    (void)pointer;
    if (--a->blocks == 0) a->used = 0;
}

int main(void) {
    fixed_arena arena;
    tfm_options options;
    tfm_ctx *c;
    tfm_tensor *x, *y;
    memset(&arena, 0, sizeof arena);
    memset(&options, 0, sizeof options);
    options.allocator.alloc = take;
    options.allocator.free = give;
    options.allocator.user = &arena;
    options.threads = 1;
    options.memory_limit = 16 << 20;
    c = tfm_create(&options);
    x = tfm_randn(c, TFM_SHAPE(1, 4, 256, 32));
    y = tfm_attention(c, x, x, x, NULL);
    if (!y) { fprintf(stderr, "%s\n", tfm_error(c)); tfm_destroy(c); return 1; }
    printf("attention over (1, 4, 256, 32): the arena peaked at %zu bytes\n", arena.peak);

    x = tfm_randn(c, TFM_SHAPE(1, 4, 1 << 20, 32)); /* 512 MiB: more than the cap, a clear error and no abort */
    printf("asking for more than the cap: %s\n", x ? "granted" : tfm_error(c));
    tfm_clear(c);
    tfm_destroy(c);
    printf("blocks still held: %lld\n", (long long)arena.blocks);
    return arena.blocks != 0 || fflush(stdout) || ferror(stdout);
}

/* What every test includes: the header's declarations, Criterion (or its stand-in), and a few helpers.  A test that
 * needs private functions defines TFM_STATIC and TRANSFORMER_IMPLEMENTATION before it includes this file and gets a
 * library of its own; all others share the one in impl.c. */
#ifndef TFM_TEST_H
#define TFM_TEST_H

#include "transformer.h"

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(TFM_MINI_CRITERION)
#include "mini_criterion.h"
#else
#include <criterion/criterion.h>
#endif

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#undef IN /* words that a test may want */
#undef OUT
#undef near
#undef far
#undef small
#undef interface
#else
#include <sys/mman.h>
#include <unistd.h>
#if !defined(MAP_ANONYMOUS)
#define MAP_ANONYMOUS 0x20 /* hidden by -std=c99 */
#endif
#endif

#define TEST_UNUSED static __attribute__((unused))

/* -- places -------------------------------------------------------------------------------------------------------- */

TEST_UNUSED const char *test_env(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && value[0] ? value : otherwise;
}

TEST_UNUSED int test_file_exists(const char *path) {
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

/* Third-party test data, which the repository does not hold: $TFM_SHARED/data/NAME, TFM_SHARED being ../shared if
 * unset. Returns 1 when the file can be read. */
TEST_UNUSED int tfm_shared_path(char *out, size_t size, const char *name) {
    snprintf(out, size, "%s/data/%s", test_env("TFM_SHARED", "../shared"), name);
    return test_file_exists(out);
}

/* The same, but skips the test when the file is not there. */
#define test_need_shared(out, size, name) \
    do { \
        if (!tfm_shared_path(out, size, name)) cr_skip_test("no %s: set TFM_SHARED", (const char *)(out)); \
    } while (0)

/* Our own expected results: $TFM_GOLDEN/NAME, TFM_GOLDEN being tests/golden if unset. They are part of the
 * repository, so a missing one is a failure. */
TEST_UNUSED int tfm_golden_path(char *out, size_t size, const char *name) {
    snprintf(out, size, "%s/%s", test_env("TFM_GOLDEN", "tests/golden"), name);
    return test_file_exists(out);
}

/* A path for a file that a test writes: $TMPDIR/NAME, with the process id in it so that tests can run side by side. */
TEST_UNUSED void test_temporary_path(char *out, size_t size, const char *name) {
#if defined(_WIN32)
    snprintf(out, size, "%s\\%lu_%s", test_env("TEMP", "."), (unsigned long)GetCurrentProcessId(), name);
#else
    snprintf(out, size, "%s/%lu_%s", test_env("TMPDIR", "/tmp"), (unsigned long)getpid(), name);
#endif
}

/* A whole file, with a 0 after it; NULL when it cannot be read. The caller frees it. */
TEST_UNUSED char *test_read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    char *data = NULL;
    size_t used = 0, room = 0, got = 1;
    if (!f) return NULL;
    while (got) {
        if (room - used < 4096) {
            char *larger = (char *)realloc(data, room = 2 * room + 8192);
            if (!larger) break;
            data = larger;
        }
        got = fread(data + used, 1, room - used - 1, f);
        used += got;
    }
    fclose(f);
    if (data) data[used] = 0;
    if (size) *size = used;
    return data;
}

/* 1 under an emulator or valgrind: take the small sizes. */
TEST_UNUSED int test_quick(void) { return test_env("TFM_QUICK", "0")[0] == '1'; }
/* 1 under an emulator of another processor, which knows signals and threads, but not fork() beside threads. */
TEST_UNUSED int test_emulated(void) { return test_env("TFM_EMULATED", "0")[0] == '1'; }

/* -- numbers ------------------------------------------------------------------------------------------------------- */

/* Uniform in [-1, 1). SplitMix64, so that tests do not depend on the generator they test. */
TEST_UNUSED float test_random(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (float)((double)(z >> 40) / 8388608.0 - 1.0);
}

TEST_UNUSED void test_fill(float *x, int64_t n, uint64_t seed) {
    int64_t i;
    for (i = 0; i < n; i++) x[i] = test_random(&seed);
}

/* How many units in the last place of a float lie between a result and the exact value. Equal infinities and two
 * NaNs: 0. */
TEST_UNUSED double test_ulps(float result, double exact) {
    int exponent;
    if (isnan(exact) || isnan(result)) return isnan(exact) && isnan(result) ? 0 : HUGE_VAL;
    if (fabs(exact) > (double)FLT_MAX) return (double)result == (exact > 0 ? HUGE_VAL : -HUGE_VAL) ? 0 : HUGE_VAL;
    if ((double)result == exact) return 0;
    frexp(exact, &exponent);
    if (exponent < -125) exponent = -125; /* subnormals share one spacing */
    return fabs((double)result - exact) / ldexp(1.0, exponent - 24);
}

/* 1 when |actual - expected| <= atol + rtol |expected| everywhere; NaN is close to NaN, an infinity to itself.
 * Otherwise `text` names the worst element. `expected` is read through a function so that floats and doubles share
 * this. */
TEST_UNUSED int test_worst(const float *actual, const void *expected, int is_double, int64_t n, double rtol,
                           double atol, char *text, size_t size) {
    int64_t i, worst = -1, bad = 0;
    double worst_excess = 0;
    for (i = 0; i < n; i++) {
        const double a = (double)actual[i],
                     e = is_double ? ((const double *)expected)[i] : (double)((const float *)expected)[i];
        double excess;
        if ((isnan(a) && isnan(e)) || a == e) continue;
        excess = isnan(a) || isnan(e) || isinf(a) || isinf(e) ? HUGE_VAL : fabs(a - e) / (atol + rtol * fabs(e));
        if (excess <= 1) continue;
        bad++;
        if (worst < 0 || excess > worst_excess) worst = i, worst_excess = excess;
    }
    if (!bad) return 1;
    snprintf(text, size, "%lld of %lld elements differ; worst at %lld: %.9g, expected %.9g (%.3g times the tolerance)",
             (long long)bad, (long long)n, (long long)worst, (double)actual[worst],
             is_double ? ((const double *)expected)[worst] : (double)((const float *)expected)[worst], worst_excess);
    return 0;
}

#define assert_close(actual, expected, n, rtol, atol) assert_close_in_(actual, expected, 0, n, rtol, atol, #actual)
/* expected: doubles */
#define assert_close_double(actual, expected, n, rtol, atol) \
    assert_close_in_(actual, expected, 1, n, rtol, atol, #actual)
#define assert_close_in_(actual, expected, is_double, n, rtol, atol, name) \
    do { \
        char text_[256]; \
        const int close_ = test_worst(actual, expected, is_double, n, rtol, atol, text_, sizeof text_); \
        cr_assert(close_, "%s: %s", name, text_); \
    } while (0)

/* The first byte that differs, or -1. */
TEST_UNUSED int64_t test_first_difference(const void *a, const void *b, int64_t bytes) {
    int64_t i;
    for (i = 0; i < bytes; i++)
        if (((const unsigned char *)a)[i] != ((const unsigned char *)b)[i]) return i;
    return -1;
}

#define assert_same_bytes(a, b, bytes) \
    do { \
        const int64_t at_ = test_first_difference(a, b, bytes); \
        cr_assert(at_ < 0, "%s and %s: byte %lld of %lld differs", #a, #b, (long long)at_, (long long)(bytes)); \
    } while (0)

/* -- tensors ------------------------------------------------------------------------------------------------------- */

/* The elements of a tensor as floats, row-major, to be freed; NULL when t is NULL or cannot be read. */
TEST_UNUSED float *test_floats(tfm_ctx *c, const tfm_tensor *t) {
    const int64_t n = t ? tfm_numel(t) : -1;
    float *x = n < 0 ? NULL : (float *)malloc((size_t)(n ? n : 1) * sizeof(float));
    if (x && tfm_read(c, t, x, n) != TFM_OK) {
        free(x);
        x = NULL;
    }
    return x;
}

TEST_UNUSED int test_same_shape(const tfm_tensor *a, const tfm_tensor *b) {
    int i;
    if (a->ndim != b->ndim) return 0;
    for (i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i]) return 0;
    return 1;
}

/* 1 when t holds what `expected` holds; otherwise says why not. */
TEST_UNUSED int test_tensor_worst(tfm_ctx *c, const tfm_tensor *t, const tfm_tensor *expected, double rtol, double atol,
                                  char *text, size_t size) {
    float *a, *e;
    int ok = 0;
    if (!t || !expected) {
        snprintf(text, size, "no tensor: %s", tfm_error(c));
        return 0;
    }
    if (!test_same_shape(t, expected)) {
        int i, used = snprintf(text, size, "shape (");
        for (i = 0; i < t->ndim; i++)
            used += snprintf(text + used, size - (size_t)used, " %lld", (long long)t->shape[i]);
        used += snprintf(text + used, size - (size_t)used, " ), expected (");
        for (i = 0; i < expected->ndim; i++)
            used += snprintf(text + used, size - (size_t)used, " %lld", (long long)expected->shape[i]);
        snprintf(text + used, size - (size_t)used, " )");
        return 0;
    }
    a = test_floats(c, t);
    e = test_floats(c, expected);
    if (a && e) ok = test_worst(a, e, 0, tfm_numel(t), rtol, atol, text, size);
    else snprintf(text, size, "cannot be read: %s", tfm_error(c));
    free(a);
    free(e);
    return ok;
}

#define assert_tensor_close(c, t, expected, rtol, atol) \
    do { \
        char text_[320]; \
        const int close_ = test_tensor_worst(c, t, expected, rtol, atol, text_, sizeof text_); \
        cr_assert(close_, "%s: %s", #t, text_); \
    } while (0)

/* t was made: else the test stops with the library's own words. */
#define assert_made(c, t) cr_assert((t) != NULL, "%s: %s", #t, tfm_error(c))
/* A verb succeeded. */
#define assert_ok(c, call) \
    do { \
        const tfm_status status_ = (call); \
        cr_assert(status_ == TFM_OK, "%s: %s: %s", #call, tfm_status_name(status_), tfm_error(c)); \
    } while (0)
/* An expression gave NULL with this status and an error text; the error is cleared. */
#define assert_refused(c, expression, status) \
    do { \
        const void *made_ = (const void *)(expression); \
        cr_assert(made_ == NULL, "%s was accepted", #expression); \
        cr_assert(tfm_status_of(c) == (status), "%s: %s, expected %s (%s)", #expression, \
                  tfm_status_name(tfm_status_of(c)), tfm_status_name(status), tfm_error(c)); \
        cr_assert(tfm_error(c)[0] != 0, "%s: no error text", #expression); \
        tfm_clear(c); \
    } while (0)
/* The same for a verb. */
#define assert_verb_refused(c, call, status) \
    do { \
        const tfm_status got_ = (call); \
        cr_assert(got_ == (status), "%s: %s, expected %s (%s)", #call, tfm_status_name(got_), tfm_status_name(status), \
                  tfm_error(c)); \
        cr_assert(tfm_error(c)[0] != 0, "%s: no error text", #call); \
        tfm_clear(c); \
    } while (0)

/* -- instruction sets ---------------------------------------------------------------------------------------------- */

enum { TEST_ISAS = 4 };

TEST_UNUSED const char *test_isa(int i) {
    static const char *const names[TEST_ISAS] = {"scalar", "neon", "avx2", "avx512"};
    return names[i];
}

/* A context on instruction set i (threads as in tfm_options), or NULL when this machine cannot run it. */
TEST_UNUSED tfm_ctx *test_isa_context(int i, int threads) {
    tfm_options o;
    tfm_ctx *c;
    if (!tfm_isa_supported(test_isa(i))) return NULL;
    memset(&o, 0, sizeof o);
    o.isa = test_isa(i);
    o.threads = threads;
    o.seed = 42;
    c = tfm_create(&o);
    cr_assert(c != NULL, "no context for %s", test_isa(i));
    cr_assert(tfm_status_of(c) == TFM_OK, "%s: %s", test_isa(i), tfm_error(c));
    return c;
}

/* Runs the statement that follows once per usable instruction set, with a context of that set and that many threads:
 *
 *     TEST_EACH_ISA(c, 1) {
 *         tfm_tensor *x = tfm_ones(c, TFM_SHAPE(3));
 *         ...
 *     }
 * continue goes on with the next instruction set; break and return would leave the context behind. */
#define TEST_EACH_ISA(c, threads) \
    for (int test_isa_ = 0; test_isa_ < TEST_ISAS; test_isa_++) \
        for (tfm_ctx *c = test_isa_context(test_isa_, threads), *test_ctx_ = c; test_ctx_; \
             test_ctx_ = (tfm_destroy(test_ctx_), (tfm_ctx *)NULL))

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* An allocator that counts, can fail, fills new memory with garbage, aligns to 16 bytes and no better, and looks for
 * writes past the end when a block is freed. */
typedef struct test_memory {
    int64_t calls;   /* of alloc */
    int64_t blocks;  /* alive */
    int64_t bytes;   /* alive */
    int64_t peak;    /* of bytes */
    int64_t fail_at; /* the call that fails, counted from 0; negative: none */
    int fail_on;     /* 1: every call from fail_at on fails */
    int64_t failed;  /* calls that failed */
    int64_t damaged; /* blocks written past their end, or freed twice */
} test_memory;

enum { TEST_MEMORY_HEAD = 16, TEST_MEMORY_TAIL = 16, TEST_MEMORY_ALIVE = 0x600DB10C };

TEST_UNUSED void *test_memory_alloc(void *user, size_t size) {
    test_memory *m = (test_memory *)user;
    const int64_t call = m->calls++;
    unsigned char *raw;
    uint64_t head[2];
    if (m->fail_at >= 0 && (call == m->fail_at || (m->fail_on && call > m->fail_at))) {
        m->failed++;
        return NULL;
    }
    raw = (unsigned char *)malloc(size + 64 + TEST_MEMORY_HEAD + TEST_MEMORY_TAIL);
    if (!raw) return NULL;
    /* result % 64 == 16, whatever malloc gave; the distance to raw lies in the head */
    {
        unsigned char *p = raw + TEST_MEMORY_HEAD + (64 + 16 - (uintptr_t)(raw + TEST_MEMORY_HEAD) % 64) % 64;
        head[0] = size;
        head[1] = (uint64_t)TEST_MEMORY_ALIVE | (uint64_t)(p - raw) << 32;
        memcpy(p - TEST_MEMORY_HEAD, head, sizeof head);
        memset(p, 0xA5, size);
        memset(p + size, 0x5A, TEST_MEMORY_TAIL);
        m->blocks++;
        m->bytes += (int64_t)size;
        if (m->bytes > m->peak) m->peak = m->bytes;
        return p;
    }
}

TEST_UNUSED void test_memory_free(void *user, void *pointer) {
    test_memory *m = (test_memory *)user;
    unsigned char *p = (unsigned char *)pointer;
    uint64_t head[2];
    size_t i;
    memcpy(head, p - TEST_MEMORY_HEAD, sizeof head);
    if ((uint32_t)head[1] != (uint32_t)TEST_MEMORY_ALIVE) {
        m->damaged++;
        return;
    }
    for (i = 0; i < TEST_MEMORY_TAIL; i++)
        if (p[head[0] + i] != 0x5A) {
            m->damaged++;
            break;
        }
    m->blocks--;
    m->bytes -= (int64_t)head[0];
    memset(p - TEST_MEMORY_HEAD, 0xDD, TEST_MEMORY_HEAD + (size_t)head[0]);
    free(p - (size_t)(head[1] >> 32));
}

TEST_UNUSED tfm_allocator test_allocator(test_memory *m) {
    tfm_allocator a;
    memset(&a, 0, sizeof a);
    a.alloc = test_memory_alloc;
    a.free = test_memory_free;
    a.user = m;
    return a;
}

TEST_UNUSED test_memory test_memory_new(void) {
    test_memory m;
    memset(&m, 0, sizeof m);
    m.fail_at = -1;
    return m;
}

#define assert_no_leak(m) \
    do { \
        cr_assert((m)->blocks == 0, "%lld blocks with %lld bytes were not freed", (long long)(m)->blocks, \
                  (long long)(m)->bytes); \
        cr_assert((m)->damaged == 0, "%lld blocks were written past their end or freed twice", \
                  (long long)(m)->damaged); \
    } while (0)

/* Runs `body` with allocation 0 failing, then 1, 2, ... until a run needs no more; each time once with only that one
 * failing, which the library may get over (a smaller chunk will do), and once with all later ones failing too, which
 * it may not. What must hold: no crash, no leak, no failure but a sticky "out of memory", and a context that works
 * again after tfm_clear. `body` gets a context with the allocator, does its work without assertions about success,
 * and destroys what it made (but not the context). Returns how many allocations the body makes. */
TEST_UNUSED int64_t test_each_allocation_failing(void (*body)(tfm_ctx *c, void *user), void *user,
                                                 const tfm_options *base) {
    static const int64_t origin[TFM_MAX_DIMS] = {0};
    int64_t n;
    for (n = 0; n < 200000; n++) {
        const int forever = (int)(n % 2);
        test_memory m = test_memory_new();
        tfm_options o;
        tfm_ctx *c;
        memset(&o, 0, sizeof o);
        if (base) o = *base;
        if (!o.threads) o.threads = 1;
        o.allocator = test_allocator(&m);
        m.fail_at = n / 2;
        m.fail_on = forever;
        c = tfm_create(&o);
        if (!c) {
            cr_assert(m.failed > 0, "tfm_create gave NULL though memory was there");
            assert_no_leak(&m);
            continue;
        }
        if (tfm_status_of(c) == TFM_OK) body(c, user);
        m.fail_at = -1;
        if (m.failed) {
            const tfm_status status = tfm_status_of(c);
            const tfm_tensor *x;
            cr_assert(status == TFM_OOM || (status == TFM_OK && !forever), "allocation %lld%s failed: %s (%s)",
                      (long long)(n / 2), forever ? " and all after it" : "", tfm_status_name(status), tfm_error(c));
            cr_assert(status == TFM_OK || tfm_error(c)[0] != 0, "allocation %lld failed without a text",
                      (long long)(n / 2));
            tfm_clear(c);
            x = tfm_full(c, TFM_F32, tfm_shape1(3), 2.5);
            cr_assert(x != NULL && tfm_get(x, origin) == 2.5, "not usable after allocation %lld failed: %s",
                      (long long)(n / 2), tfm_error(c));
        }
        tfm_destroy(c);
        assert_no_leak(&m);
        if (!m.failed) return n / 2;
    }
    cr_assert_fail("the body never ran without a failing allocation");
    return n;
}

/* `bytes` bytes whose end (and, for whole pages, begin) touches a page that cannot be read: an access past them
 * crashes. */
typedef struct test_guarded {
    void *data;
    unsigned char *base;
    size_t size;
} test_guarded;

TEST_UNUSED test_guarded test_guard(size_t bytes) {
    const size_t page = 65536, body = (bytes + page - 1) / page * page;
    test_guarded g;
    g.size = body + 2 * page;
#if defined(_WIN32)
    {
        DWORD old;
        g.base = (unsigned char *)VirtualAlloc(NULL, g.size, MEM_COMMIT | MEM_RESERVE, PAGE_READWRITE);
        cr_assert_not_null(g.base);
        VirtualProtect(g.base, page, PAGE_NOACCESS, &old);
        VirtualProtect(g.base + page + body, page, PAGE_NOACCESS, &old);
    }
#else
    {
        void *p = mmap(NULL, g.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        cr_assert(p != MAP_FAILED, "mmap");
        g.base = (unsigned char *)p;
        cr_assert_eq(mprotect(g.base, page, PROT_NONE), 0);
        cr_assert_eq(mprotect(g.base + page + body, page, PROT_NONE), 0);
    }
#endif
    g.data = g.base + page + body - bytes;
    return g;
}

TEST_UNUSED void test_unguard(test_guarded g) {
#if defined(_WIN32)
    VirtualFree(g.base, 0, MEM_RELEASE);
#else
    munmap(g.base, g.size);
#endif
}

#endif

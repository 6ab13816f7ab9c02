/* What the tests of single kernels share. The file that includes it holds a private copy of the library and has
 * included transformer.h before; so what follows does not reach the kernels. */
#ifndef KERNEL_HELPERS_H
#define KERNEL_HELPERS_H

/* References are exact whatever the flags under test (clang refuses -ffast-math by itself). */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-fast-math", "fp-contract=off")
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#include "test.h"

enum { PANEL = 16, KEY_PANEL = 64 }; /* of chapter 4 */

/* A passing cr_assert costs a message to Criterion: loops over elements speak only when they fail. */
#define CHECK(condition, ...) \
    do { \
        if (!(condition)) cr_assert_fail(__VA_ARGS__); \
    } while (0)

/* -- budgets ------------------------------------------------------------------------------------------------------- */

/* How far from the exact result a kernel may be. */
enum {
    BUDGET_EXACT, BUDGET_ROUNDED, BUDGET_TWO, BUDGET_EXP, BUDGET_LOG, BUDGET_SINCOS, BUDGET_TANH, BUDGET_SIGMOID,
    BUDGET_SOFTCAP, BUDGET_SILU, BUDGET_GELU, BUDGET_GELU_FAST, /* in units of the last place */
    BUDGET_SUM, BUDGET_SQUARES, BUDGET_DOT, BUDGET_LONG_SUM, BUDGET_SOFTMAX, BUDGET_SOFTMAX_ROW, BUDGET_LOG_SOFTMAX,
    BUDGET_NORM, BUDGET_ROTARY, BUDGET_PRODUCT, BUDGET_FINISH, BUDGET_WEIGHT, BUDGET_ATTENTION, BUDGET_COUNT
};
static const struct { double most; const char *of; } budget[BUDGET_COUNT] = {
    {0, "ULP: copy, neg, abs, relu, clamp, min, max"},
    {0.5001, "ULP: one correctly rounded operation; pow"},
    {2, "ULP: two or three of them (rsqrt, x^3, x^-0.5)"},
    {2, "ULP: exp on its whole range, subnormal results too"},
    {2, "ULP: log, every positive float"},
    {2, "ULP: sin and cos, every finite float"},
    {2, "ULP: tanh, every float"},
    {3, "ULP: sigmoid, every float"},
    {4, "ULP: cap * tanh(x / cap)"},
    {5, "ULP: silu, |x| <= 50"},
    {12, "ULP: exact gelu, |x| <= 13"},
    {256, "ULP: tanh and quick gelu; the tail near exp(-50) takes over the rounding of exp's argument"},
    {1e-6, "of the sum of |x|: sum"},
    {4e-7, "of the sum of x^2"},
    {4e-7, "of the sum of |a b|: dot"},
    {1e-6, "of the sum: 2^20 positive elements, sum and sum of squares"},
    {5e-6, "of the value: softmax, distances from the maximum up to 85"},
    {1e-6, "absolute: the sum of a softmax row is 1"},
    {3e-7, "of max(1, |y|): log_softmax, logsumexp"},
    {2e-6, "of max(1, |y|): layer_norm, rms_norm; also the mean and 1/deviation"},
    {6e-7, "absolute: rotary on normal deviates"},
    {6e-8, "of (4 + 2 sqrt(k)) * (sum of |a b| + |bias|): products"},
    {1e-6, "of max(1, |y|): what an activation adds to a product's error"},
    {6e-6, "absolute: an attention weight exp(score - max)"},
    {3e-6, "absolute, per unit of sum: attention output; relative: sum of weights"}
};

/* -- the kernels under test ---------------------------------------------------------------------------------------- */

/* Linking with -Ofast makes a program start with subnormals off. */
TEST_UNUSED void plain_arithmetic(void) {
#if defined(__SSE__) || defined(_M_X64)
    tfm__fp_set(0x1f80);
#elif defined(__aarch64__)
    tfm__fp_set(0);
#endif
}

/* The table of an instruction set that this machine can run; the one TFM_ISA names where it is set: `make test` runs
 * the program once for each. */
TEST_UNUSED const tfm__kernels *table_under_test(int isa) {
    const char *only = getenv("TFM_ISA");
    if (!(tfm__isa_usable() >> isa & 1u)) return NULL;
    if (only && only[0] && strcmp(only, tfm__isa_name(isa)) != 0) return NULL;
    plain_arithmetic();
    return tfm__kernels_for(isa);
}

#define EACH_TABLE(k) \
    for (int isa_ = 0; isa_ < TFM_ISA_COUNT; isa_++) \
        for (const tfm__kernels *k = table_under_test(isa_); k; k = NULL)

/* 0 .. 3 widths + 1, then two longer rows. Returns how many. */
TEST_UNUSED int row_sizes(const tfm__kernels *k, int *sizes) {
    int count = 0, i;
    for (i = 0; i <= 3 * k->width + 1; i++) sizes[count++] = i;
    sizes[count++] = 517;
    if (!test_quick()) sizes[count++] = 2051;
    return count;
}
enum { MOST_SIZES = 3 * 16 + 4 };

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* room(i, n): n bytes whose last one touches a page that cannot be accessed, behind ROOM_FRONT bytes that only
 * assert_fronts_untouched may look at; until the next room(i, ...). Where vectors are longer than n, they crash or
 * show. */
enum { ROOMS = 24, ROOM_FRONT = 64 };
static struct { test_guarded memory; size_t size; unsigned char *front; } rooms[ROOMS];

TEST_UNUSED void *room(int i, int64_t bytes) {
    const size_t need = (size_t)bytes + ROOM_FRONT;
    if (need > rooms[i].size) {
        if (rooms[i].size) test_unguard(rooms[i].memory);
        rooms[i].size = need < 65536 ? 65536 : need;
        rooms[i].memory = test_guard(rooms[i].size);
    }
    rooms[i].front = (unsigned char *)rooms[i].memory.data + rooms[i].size - need;
    memset(rooms[i].front, 0xA5, ROOM_FRONT);
    return rooms[i].front + ROOM_FRONT;
}
TEST_UNUSED float *floats(int i, int64_t n) { return (float *)room(i, n * 4); }

TEST_UNUSED void assert_fronts_untouched(const char *what) {
    int i, j;
    for (i = 0; i < ROOMS; i++)
        for (j = 0; rooms[i].front && j < ROOM_FRONT; j++)
            CHECK(rooms[i].front[j] == 0xA5, "%s: written %d bytes before buffer %d", what, ROOM_FRONT - j, i);
}

TEST_UNUSED int same(const void *a, const void *b, int64_t bytes) {
    return bytes == 0 || memcmp(a, b, (size_t)bytes) == 0;
}

/* -- numbers ------------------------------------------------------------------------------------------------------- */

static uint64_t seed_ = 1;
TEST_UNUSED uint32_t random_bits(void) {
    uint64_t z = (seed_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (uint32_t)(z >> 32);
}
TEST_UNUSED double uniform(void) { return (double)random_bits() / 4294967296.0; }
/* About normal, |x| < 6. */
TEST_UNUSED float normal(void) {
    double s = 0;
    int i;
    for (i = 0; i < 6; i++) s += uniform() - uniform();
    return (float)s;
}
TEST_UNUSED void fill_normal(float *x, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) x[i] = normal();
}
TEST_UNUSED void fill_value(float *x, int64_t n, float value) {
    int64_t i;
    for (i = 0; i < n; i++) x[i] = value;
}

/* Through memory: registers may be wider than a float (x87). */
TEST_UNUSED float rounded(double x) {
    volatile float f = (float)x;
    return f;
}

/* test_ulps, but the largest float and infinity are neighbours. */
TEST_UNUSED double ulps(float y, double exact) {
    if (isinf(y) && fabs(exact) <= (double)FLT_MAX && fabs(exact) > (double)FLT_MAX * (1 - 2e-7)) return 1;
    if (fabs(y) == (double)FLT_MAX && fabs(exact) > (double)FLT_MAX && fabs(exact) < (double)FLT_MAX * (1 + 2e-7))
        return 1;
    return test_ulps(y, exact);
}

TEST_UNUSED double at_least_one(double x) { return fabs(x) > 1 ? fabs(x) : 1; }

/* -- narrow floats, by their definition ---------------------------------------------------------------------------- */

/* f16: 10 bits of fraction, least exponent -14; bf16: 7 and -126. Both encode infinity above 15 and 127. */
TEST_UNUSED double half_value(int dtype, uint16_t h) {
    const int fraction = dtype == TFM_F16 ? 10 : 7, least = dtype == TFM_F16 ? -14 : -126;
    const int exponent = (h & 0x7fff) >> fraction, digits = h & ((1 << fraction) - 1);
    const double sign = h & 0x8000 ? -1 : 1;
    if (exponent == (dtype == TFM_F16 ? 31 : 255)) return digits ? (double)NAN : sign * HUGE_VAL;
    if (exponent == 0) return sign * ldexp(digits, least - fraction);
    return sign * ldexp(digits + (1 << fraction), exponent - 1 + least - fraction);
}

/* To nearest, ties to even. */
TEST_UNUSED uint16_t half_nearest(int dtype, float x) {
    const int fraction = dtype == TFM_F16 ? 10 : 7, least = dtype == TFM_F16 ? -14 : -126;
    const uint16_t infinity = (uint16_t)(dtype == TFM_F16 ? 0x7c00 : 0x7f80),
                   sign = (uint16_t)(signbit(x) ? 0x8000 : 0);
    int exponent;
    double units, whole;
    if (x == 0) return sign;
    if (isnan(x)) return (uint16_t)(sign | infinity | 1u << (fraction - 1));
    if (isinf(x)) return (uint16_t)(sign | infinity);
    frexp((double)x, &exponent);
    exponent = exponent - 1 < least ? least : exponent - 1;
    units = ldexp(fabs((double)x), fraction - exponent); /* below 2^(fraction + 1), exact */
    whole = floor(units);
    if (units - whole > 0.5 || (units - whole == 0.5 && fmod(whole, 2) == 1)) whole += 1;
    /* the code of the next larger number is the next code, past the largest exponent infinity's */
    whole += (double)(exponent - least) * (1 << fraction);
    return (uint16_t)(sign | (whole > infinity ? infinity : (uint16_t)whole));
}

/* Element i of memory of dtype f32, f16 or bf16. */
TEST_UNUSED int64_t float_size(int dtype) { return dtype == TFM_F32 ? 4 : 2; }
TEST_UNUSED float element(const void *p, int dtype, int64_t i) {
    return dtype == TFM_F32 ? ((const float *)p)[i] : (float)half_value(dtype, ((const uint16_t *)p)[i]);
}
TEST_UNUSED void set_element(void *p, int dtype, int64_t i, float x) {
    if (dtype == TFM_F32) {
        ((float *)p)[i] = x;
    } else {
        ((uint16_t *)p)[i] = half_nearest(dtype, x);
    }
}
static const char *const float_name[3] = {"f32", "f16", "bf16"};

#endif

/* Every kernel of chapter 4 but attention's, on every instruction set this machine has, against double precision:
 * budgets in kernel_helpers.h. */
#define TFM_STATIC
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"

#include "kernel_helpers.h"

#include <stddef.h>

enum { ATTENTION_ROWS = 48, TOGETHER = 33, SHORT_ROW = 1024 }; /* of chapter 4 */

static void softmax_row(const tfm__kernels *k, float *y, const float *x, int64_t n, int log_form) {
    tfm__softmax_row row;
    row.x = x;
    row.y = y;
    k->softmax(&row, 1, n, log_form);
}

/* -- tables -------------------------------------------------------------------------------------------------------- */

#define SLOTS(X) \
    X(gemm) X(gemm_turned) \
    X(pack_panels) X(pack_weight) X(pack_strips) X(transpose) X(load) X(store) X(unary) X(binary) X(fma_scalar) \
        X(reduce) X(glu) X(softmax) X(logsumexp) X(norm) X(rotary) X(dot) X(scale_rows) X(attn_scores) X(attn_keep) \
        X(attn_bias) X(attn_reduce) X(attn_weigh) X(attn_values) X(attn_merge)

/* Also instruction sets that this machine cannot run. Slots that may hold another set's function: none. */
Test(kernels, no_slot_of_a_table_holds_another_instruction_sets_function) {
    enum { COUNT = 0
#define ONE(slot) + 1
        SLOTS(ONE)
    };
    int isa, other;
    cr_assert_eq(sizeof(tfm__kernels), (offsetof(tfm__kernels, gemm) + COUNT * sizeof(void (*)(void))),
                 "a slot is missing from this test's list");
    for (isa = 0; isa < TFM_ISA_COUNT; isa++) {
        const tfm__kernels *k = tfm__kernels_for(isa);
        if (!k) continue;
        CHECK(k->isa == isa && strcmp(k->name, tfm__isa_name(isa)) == 0, "table %d says it is %s", isa, k->name);
#define SET(slot) CHECK(k->slot != NULL, "%s has no " #slot, k->name);
        SLOTS(SET)
        for (other = 0; other < isa; other++) {
            const tfm__kernels *o = tfm__kernels_for(other);
            if (!o) continue;
#define DIFFERS(slot) CHECK(k->slot != o->slot, "%s and %s share " #slot, k->name, o->name);
            SLOTS(DIFFERS)
        }
    }
    cr_assert_not_null(tfm__kernels_for(TFM_ISA_SCALAR));
    cr_assert_null(tfm__kernels_for(-1));
    cr_assert_null(tfm__kernels_for(TFM_ISA_COUNT));
}

Test(kernels, block_sizes_are_whole_tiles_that_fit_their_caches) {
    int isa;
    for (isa = 0; isa < TFM_ISA_COUNT; isa++) {
        const tfm__kernels *k = tfm__kernels_for(isa);
        if (!k) continue;
        CHECK(k->width >= 4 && k->width <= PANEL && PANEL % k->width == 0, "%s: %d lanes", k->name, k->width);
        CHECK(k->tile_rows > 0 && ATTENTION_ROWS % k->tile_rows == 0, "%s: tiles of %d rows", k->name, k->tile_rows);
        CHECK(k->block_m > 0 && k->block_m % k->tile_rows == 0, "%s: block_m", k->name);
        CHECK(k->block_k > 0 && k->block_k % k->width == 0, "%s: block_k", k->name);
        CHECK(4 * k->block_k * k->block_m <= 524288, "%s: a block of A does not fit into half of 1 MB", k->name);
    }
}

/* -- conversions --------------------------------------------------------------------------------------------------- */

static const int64_t dtype_size[TFM_DTYPE_COUNT] = {4, 2, 2, 8, 8,
                                                    4, 1, 1, 1}; /* f32 f16 bf16 f64 i64 i32 i8 u8 bool */

Test(kernels, every_f16_and_bf16_widens_to_its_value) {
    static uint16_t codes[65536];
    static float wide[65536];
    int i, dtype;
    for (i = 0; i < 65536; i++) codes[i] = (uint16_t)i;
    EACH_TABLE(k) {
        for (dtype = TFM_F16; dtype <= TFM_BF16; dtype++) {
            k->load(wide, codes, dtype, 1, 65536);
            for (i = 0; i < 65536; i++) {
                const double value = half_value(dtype, codes[i]);
                CHECK(isnan(value) ? isnan(wide[i]) : (double)wide[i] == value && !signbit(wide[i]) == (i < 32768),
                      "%s: %s %04x became %.9g, not %.9g", k->name, float_name[dtype], (unsigned)i, (double)wide[i],
                      value);
            }
        }
    }
}

/* Every code, the middle between it and the next, and a little to either side; then anything. */
Test(kernels, f16_and_bf16_round_to_nearest_even_and_keep_nan) {
    static float wide[4 * 65536];
    static uint16_t codes[4 * 65536];
    int i, dtype;
    EACH_TABLE(k) {
        for (dtype = TFM_F16; dtype <= TFM_BF16; dtype++) {
            for (i = 0; i < 65536; i++) {
                const int last = (i & 0x7fff) == 0x7fff || isinf(half_value(dtype, (uint16_t)i));
                const double low = half_value(dtype, (uint16_t)i),
                             high = last ? low : half_value(dtype, (uint16_t)(i + 1));
                wide[4 * i] =
                    (float)(isinf(high) ? low * (1 + ldexp(1, dtype == TFM_F16 ? -12 : -9)) : (low + high) / 2);
                wide[4 * i + 1] = tfm__bits_float(tfm__float_bits(wide[4 * i]) + 1);
                wide[4 * i + 2] = tfm__bits_float(tfm__float_bits(wide[4 * i]) - (wide[4 * i] != 0));
                wide[4 * i + 3] = tfm__bits_float(random_bits());
            }
            k->store(codes, dtype, 1, wide, 4 * 65536);
            for (i = 0; i < 4 * 65536; i++) {
                const uint16_t want = half_nearest(dtype, wide[i]);
                CHECK(isnan(wide[i]) ? isnan(half_value(dtype, codes[i])) : codes[i] == want,
                      "%s: %.9g became %s %04x, not %04x", k->name, (double)wide[i], float_name[dtype],
                      (unsigned)codes[i], (unsigned)want);
            }
        }
    }
}

/* What a float becomes as an integer of [low, high]: toward zero, saturated, NaN: 0. */
static double truncated(float x, double low, double high) {
    const double t = trunc((double)x);
    return isnan(x) ? 0 : t < low ? low : t > high ? high : t;
}

/* The value stored at p, and the one it should be. */
static void stored(const void *p, int dtype, float x, double *is, double *should) {
    int64_t i64;
    int32_t i32;
    uint16_t half;
    switch (dtype) {
    case TFM_F16:
    case TFM_BF16:
        memcpy(&half, p, 2);
        *is = half_value(dtype, half), *should = half_value(dtype, half_nearest(dtype, x));
        return;
    case TFM_F64: memcpy(is, p, 8), *should = (double)x; return;
    case TFM_I64:
        memcpy(&i64, p, 8);
        /* the largest i64 is no double: it stands for 2^63 here */
        *is = i64 == INT64_MAX ? ldexp(1, 63) : (double)i64, *should = truncated(x, -ldexp(1, 63), ldexp(1, 63));
        return;
    case TFM_I32: memcpy(&i32, p, 4), *is = i32, *should = truncated(x, INT32_MIN, INT32_MAX); return;
    case TFM_I8: *is = *(const signed char *)p, *should = truncated(x, -128, 127); return;
    case TFM_U8: *is = *(const unsigned char *)p, *should = truncated(x, 0, 255); return;
    case TFM_BOOL: *is = *(const unsigned char *)p, *should = x != 0; return;
    default: *should = (double)x; {
        float f;
        memcpy(&f, p, 4);
        *is = (double)f;
    }
    }
}

Test(kernels, conversions_truncate_saturate_and_stay_inside_at_every_stride_and_length) {
    static const float edge[] = {0,
                                 -0.f,
                                 1,
                                 -1,
                                 0.5f,
                                 1.5f,
                                 2.5f,
                                 -1.5f,
                                 -0.9f,
                                 127,
                                 127.9f,
                                 128,
                                 -128,
                                 -128.9f,
                                 -129,
                                 255,
                                 255.9f,
                                 256,
                                 1e10f,
                                 -1e10f,
                                 2147483520.f,
                                 2147483648.f,
                                 -2147483648.f,
                                 9.2e18f,
                                 9.3e18f,
                                 -9.3e18f,
                                 (float)HUGE_VAL,
                                 (float)-HUGE_VAL,
                                 (float)NAN,
                                 65504.f,
                                 65520.f,
                                 65519.f,
                                 6e-8f,
                                 3e-8f,
                                 2.9e-8f,
                                 1e-7f,
                                 3.39e38f,
                                 1e-40f,
                                 1.00390625f,
                                 1.01171875f};
    const int edges = (int)(sizeof edge / sizeof edge[0]);
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], count = row_sizes(k, sizes), s, dtype, stride, i;
        for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++)
            for (stride = -2; stride <= 3; stride++)
                for (s = 0; s < count; s++) {
                    const int n = sizes[s], apart = stride < 0 ? -stride : stride;
                    const int64_t size = dtype_size[dtype], span = n ? (int64_t)(n - 1) * apart + 1 : 0;
                    float *x = floats(0, n), *back = floats(1, n);
                    unsigned char *memory = (unsigned char *)room(2, span * size), *first;
                    if (stride == 0) continue;
                    memset(memory, 0x5A, (size_t)(span * size));
                    first = stride > 0 || n == 0 ? memory : memory + (span - 1) * size;
                    for (i = 0; i < n; i++) x[i] = i % 3 ? edge[(i * 7 + s) % edges] : 100 * normal();
                    k->store(first, dtype, stride, x, n);
                    k->load(back, first, dtype, stride, n);
                    for (i = 0; i < n; i++) {
                        double is, should;
                        stored(first + (int64_t)i * stride * size, dtype, x[i], &is, &should);
                        CHECK(isnan(should) ? isnan(is) : is == should,
                              "%s: store of %.9g as dtype %d stride %d, n %d: %.17g, not %.17g", k->name, (double)x[i],
                              dtype, stride, n, is, should);
                        CHECK(isnan(should) ? isnan(back[i]) : back[i] == rounded(should),
                              "%s: load of dtype %d stride %d, n %d: %.9g, not %.9g", k->name, dtype, stride, n,
                              (double)back[i], should);
                    }
                    for (i = 0; i < span * size; i++)
                        CHECK(i / size % apart == 0 || memory[i] == 0x5A, "%s: dtype %d stride %d: gap written",
                              k->name, dtype, stride);
                }
        assert_fronts_untouched(k->name);
        {
            const double f64 = 16777217.0000001;
            const int64_t i64 = ((int64_t)1 << 62) + ((int64_t)1 << 38) + 1;
            float x;
            k->load(&x, &f64, TFM_F64, 1, 1);
            CHECK(x == rounded(f64), "%s: f64 is not rounded to nearest", k->name);
            k->load(&x, &i64, TFM_I64, 1, 1);
            /* valgrind's own conversion goes through double and rounds twice */
            CHECK(test_quick() || (double)x == ldexp(1, 62) + ldexp(1, 39), "%s: i64 is not rounded to nearest",
                  k->name);
        }
    }
}

/* -- unary --------------------------------------------------------------------------------------------------------- */

static double r_copy(double x, double a, double b) { return (void)a, (void)b, x; }
static double r_scale(double x, double a, double b) { return (void)b, x * a; }
static double r_shift(double x, double a, double b) { return (void)b, x + a; }
static double r_neg(double x, double a, double b) { return (void)a, (void)b, -x; }
static double r_abs(double x, double a, double b) { return (void)a, (void)b, fabs(x); }
static double r_sqrt(double x, double a, double b) { return (void)a, (void)b, sqrt(x); }
static double r_rsqrt(double x, double a, double b) { return (void)a, (void)b, 1 / sqrt(x); }
static double r_recip(double x, double a, double b) { return (void)a, (void)b, 1 / x; }
static double r_exp(double x, double a, double b) { return (void)a, (void)b, exp(x); }
static double r_log(double x, double a, double b) { return (void)a, (void)b, log(x); }
static double r_sin(double x, double a, double b) { return (void)a, (void)b, sin(x); }
static double r_cos(double x, double a, double b) { return (void)a, (void)b, cos(x); }
static double r_tanh(double x, double a, double b) { return (void)a, (void)b, tanh(x); }
static double r_sigmoid(double x, double a, double b) { return (void)a, (void)b, 1 / (1 + exp(-x)); }
static double r_relu(double x, double a, double b) { return (void)a, (void)b, isnan(x) ? x : x > 0 ? x : 0; }
/* The limits at infinity are those of the formula: 0 * inf has none. */
static double times(double x, double factor) { return factor == 0 && isinf(x) ? (double)NAN : x * factor; }
static double r_gelu(double x, double a, double b) { return (void)a, (void)b, times(x, 0.5 * erfc(-x / sqrt(2.0))); }
static double r_gelu_tanh(double x, double a, double b) {
    return (void)a, (void)b, times(x, 1 / (1 + exp(-2 * sqrt(2 / 3.14159265358979324) * (x + 0.044715 * x * x * x))));
}
static double r_gelu_quick(double x, double a, double b) {
    return (void)a, (void)b, times(x, 1 / (1 + exp(-1.702 * x)));
}
static double r_silu(double x, double a, double b) { return (void)a, (void)b, times(x, 1 / (1 + exp(-x))); }
static double r_pow(double x, double a, double b) {
    return (void)b, a == 0.5 ? sqrt(x) : a == -0.5 ? 1 / sqrt(x) : pow(x, a);
}
static double r_clamp(double x, double a, double b) { return isnan(x) ? x : fmin(fmax(x, a), b); }
static double r_softcap(double x, double a, double b) { return (void)b, a * tanh(x / a); }

/* The ops with parameters, the range their budget holds for (0: every float is tested), and whether x >= 0 is asked. */
typedef struct unary_case {
    int op;
    const char *name;
    double (*exact)(double x, double p0, double p1);
    float p0, p1;
    int budget;
    double range;
    int positive;
} unary_case;
static const unary_case unary_cases[] = {
    {TFM__U_COPY, "copy", r_copy, 0, 0, BUDGET_EXACT, 1000, 0},
    {TFM__U_SCALE, "scale", r_scale, 1.7f, 0, BUDGET_ROUNDED, 1000, 0},
    {TFM__U_SHIFT, "shift", r_shift, 1.7f, 0, BUDGET_ROUNDED, 1000, 0},
    {TFM__U_NEG, "neg", r_neg, 0, 0, BUDGET_EXACT, 1000, 0},
    {TFM__U_ABS, "abs", r_abs, 0, 0, BUDGET_EXACT, 1000, 0},
    {TFM__U_SQRT, "sqrt", r_sqrt, 0, 0, BUDGET_ROUNDED, 1000, 1},
    {TFM__U_RSQRT, "rsqrt", r_rsqrt, 0, 0, BUDGET_TWO, 1000, 1},
    {TFM__U_RECIP, "recip", r_recip, 0, 0, BUDGET_ROUNDED, 1000, 0},
    {TFM__U_EXP, "exp", r_exp, 0, 0, BUDGET_EXP, 0, 0},
    {TFM__U_LOG, "log", r_log, 0, 0, BUDGET_LOG, 0, 0},
    {TFM__U_SIN, "sin", r_sin, 0, 0, BUDGET_SINCOS, 0, 0},
    {TFM__U_COS, "cos", r_cos, 0, 0, BUDGET_SINCOS, 0, 0},
    {TFM__U_TANH, "tanh", r_tanh, 0, 0, BUDGET_TANH, 0, 0},
    {TFM__U_SIGMOID, "sigmoid", r_sigmoid, 0, 0, BUDGET_SIGMOID, 0, 0},
    {TFM__U_RELU, "relu", r_relu, 0, 0, BUDGET_EXACT, 1000, 0},
    {TFM__U_GELU, "gelu", r_gelu, 0, 0, BUDGET_GELU, 13, 0},
    {TFM__U_GELU_TANH, "gelu_tanh", r_gelu_tanh, 0, 0, BUDGET_GELU_FAST, 9, 0},
    {TFM__U_GELU_QUICK, "gelu_quick", r_gelu_quick, 0, 0, BUDGET_GELU_FAST, 50, 0},
    {TFM__U_SILU, "silu", r_silu, 0, 0, BUDGET_SILU, 50, 0},
    {TFM__U_POW, "x ** 0", r_pow, 0, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_POW, "x ** 1", r_pow, 1, 0, BUDGET_EXACT, 100, 0},
    {TFM__U_POW, "x ** 2", r_pow, 2, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_POW, "x ** 3", r_pow, 3, 0, BUDGET_TWO, 100, 0},
    {TFM__U_POW, "x ** 4", r_pow, 4, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_POW, "x ** 7", r_pow, 7, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_POW, "x ** 0.5", r_pow, 0.5f, 0, BUDGET_ROUNDED, 100, 1},
    {TFM__U_POW, "x ** -0.5", r_pow, -0.5f, 0, BUDGET_TWO, 100, 1},
    {TFM__U_POW, "x ** -1", r_pow, -1, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_POW, "x ** -2", r_pow, -2, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_POW, "x ** 1.7", r_pow, 1.7f, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_POW, "x ** -0.3", r_pow, -0.3f, 0, BUDGET_ROUNDED, 100, 0},
    {TFM__U_CLAMP, "clamp", r_clamp, -1, 2, BUDGET_EXACT, 100, 0},
    {TFM__U_CLAMP, "clamp with low > high", r_clamp, 2, 1, BUDGET_EXACT, 100, 0},
    {TFM__U_SOFTCAP, "softcap", r_softcap, 30, 0, BUDGET_SOFTCAP, 1000, 0}};
enum { UNARY_CASES = (int)(sizeof unary_cases / sizeof unary_cases[0]) };

/* Values of all magnitudes within the range of a case. */
static void fill_for(const unary_case *u, float *x, int n) {
    const double range = u->range ? u->range : 110;
    int i;
    for (i = 0; i < n; i++) {
        double r = i % 4 == 0   ? (2 * uniform() - 1) * range
                   : i % 4 == 1 ? (double)normal()
                   : i % 4 == 2 ? (uniform() < 0.5 ? -1 : 1) * exp((uniform() - 0.9) * 30)
                                : (uniform() - 0.5) * 8;
        if (fabs(r) > range) r = range * (uniform() - 0.5);
        x[i] = (float)(u->positive ? fabs(r) : r);
    }
}

/* 1: the reference itself is off. The C library of Windows reduces large angles by 66 bits of pi. */
static int reference_is_off(const unary_case *u, double x) {
#if defined(_WIN32)
    return (u->op == TFM__U_SIN || u->op == TFM__U_COS) && fabs(x) > 1e5;
#else
    return (void)u, (void)x, 0;
#endif
}

static void assert_unary_within(const tfm__kernels *k, const unary_case *u, const float *x, const float *y, int n) {
    int i;
    for (i = 0; i < n; i++) {
        const double exact = u->exact((double)x[i], (double)u->p0, (double)u->p1), off = ulps(y[i], exact);
        if (reference_is_off(u, (double)x[i])) continue;
        CHECK(off <= budget[u->budget].most, "%s: %s of %.9g is %.9g, not %.9g: %.3g ULP", k->name, u->name,
              (double)x[i], (double)y[i], exact, off);
    }
}

Test(kernels, every_op_is_covered) {
    int op, i;
    for (op = 0; op < TFM__U_COUNT; op++) {
        for (i = 0; i < UNARY_CASES && unary_cases[i].op != op; i++) {}
        CHECK(i < UNARY_CASES, "unary op %d has no case", op);
    }
}

Test(kernels, unary_ops_stay_within_their_budgets) {
    enum { N = 40000 };
    static float x[N], y[N];
    const int n = test_quick() ? N / 20 : N;
    int i;
    EACH_TABLE(k) {
        for (i = 0; i < UNARY_CASES; i++) {
            fill_for(&unary_cases[i], x, n);
            k->unary(unary_cases[i].op, y, x, unary_cases[i].p0, unary_cases[i].p1, n);
            assert_unary_within(k, &unary_cases[i], x, y, n);
        }
    }
}

/* exp within 2 ULP over its range, and its like. */
Test(kernels, vector_math_stays_within_its_budget_on_every_float) {
    enum { N = 4096 };
    static float x[N], y[N];
    const uint32_t step = test_quick() ? 1999993u : 1009u;
    int i, c;
    EACH_TABLE(k) {
        for (c = 0; c < UNARY_CASES; c++) {
            const unary_case *u = &unary_cases[c];
            uint64_t bits = 0;
            if (u->range != 0) continue;
            while (bits < (uint64_t)1 << 32) { /* a sieve over all bit patterns */
                for (i = 0; i < N && bits < (uint64_t)1 << 32; i++, bits += step)
                    x[i] = tfm__bits_float((uint32_t)bits);
                k->unary(u->op, y, x, 0, 0, i);
                assert_unary_within(k, u, x, y, i);
            }
            for (i = 0; i < N; i++) /* where sine and cosine are near 0; else near 0 */
                x[i] = (float)(u->budget == BUDGET_SINCOS ? i * 1.57079632679489662 * (i % 3 ? 1 : 16.37)
                                                          : uniform() * 1e-3);
            k->unary(u->op, y, x, 0, 0, N);
            assert_unary_within(k, u, x, y, N);
        }
    }
}

Test(kernels, unary_bits_depend_on_the_element_alone_not_on_place_length_or_aliasing) {
    enum { N = 2100 };
    static float x[N], whole[N];
    int c, s, offset;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], count = row_sizes(k, sizes);
        for (c = 0; c < UNARY_CASES; c++) {
            const unary_case *u = &unary_cases[c];
            fill_for(u, x, N);
            k->unary(u->op, whole, x, u->p0, u->p1, N);
            for (s = 0; s < count; s++)
                for (offset = 0; offset < 3; offset++) {
                    const int n = sizes[s];
                    float *from = floats(0, n), *to = floats(1, n);
                    if (n) memcpy(from, x + offset, (size_t)n * 4);
                    k->unary(u->op, to, from, u->p0, u->p1, n);
                    CHECK(same(to, whole + offset, n * 4), "%s: %s of %d elements", k->name, u->name, n);
                    k->unary(u->op, from, from, u->p0, u->p1, n);
                    CHECK(same(from, whole + offset, n * 4), "%s: %s of %d elements in place", k->name, u->name, n);
                }
            assert_fronts_untouched(u->name);
        }
    }
}

Test(kernels, special_values_keep_to_their_lane) {
    static const float special[] = {(float)NAN,
                                    (float)HUGE_VAL,
                                    (float)-HUGE_VAL,
                                    0.0f,
                                    -0.0f,
                                    1e-45f,
                                    -1e-45f,
                                    FLT_MAX,
                                    -FLT_MAX,
                                    1,
                                    -1,
                                    1e-38f,
                                    88.8f,
                                    -104,
                                    89,
                                    -88,
                                    1e20f,
                                    -1e20f};
    const int specials = (int)(sizeof special / sizeof special[0]);
    int c, lane, j, i;
    EACH_TABLE(k) {
        const int n = k->width + 2;
        for (c = 0; c < UNARY_CASES; c++) {
            const unary_case *u = &unary_cases[c];
            float usual, x[32], y[32];
            fill_value(x, 32, 1.25f);
            k->unary(u->op, y, x, u->p0, u->p1, 1);
            usual = y[0];
            for (lane = 0; lane < n; lane++)
                for (j = 0; j < specials; j++) {
                    /* ULPs of the formula's small results mean little beyond the stated range */
                    const double exact = u->exact((double)special[j], (double)u->p0, (double)u->p1);
                    if (reference_is_off(u, (double)special[j])) continue;
                    fill_value(x, n, 1.25f);
                    x[lane] = special[j];
                    k->unary(u->op, y, x, u->p0, u->p1, n);
                    CHECK(fabs(exact) < 1e-30 && u->range != 0 ? fabs((double)y[lane]) < 1e-30
                                                               : ulps(y[lane], exact) <= budget[u->budget].most,
                          "%s: %s of %.9g in lane %d: %.9g, not %.9g", k->name, u->name, (double)special[j], lane,
                          (double)y[lane], exact);
                    for (i = 0; i < n; i++)
                        CHECK(i == lane || same(&y[i], &usual, 4), "%s: %s of %.9g in lane %d disturbs lane %d",
                              k->name, u->name, (double)special[j], lane, i);
                }
        }
    }
}

Test(kernels, odd_functions_keep_the_sign_of_zero) {
    static const int ops[] = {TFM__U_COPY, TFM__U_SIN, TFM__U_TANH, TFM__U_SQRT, TFM__U_SCALE};
    int i, j;
    EACH_TABLE(k) {
        for (i = 0; i < (int)(sizeof ops / sizeof ops[0]); i++) {
            float x[32], y[32];
            for (j = 0; j < 32; j++) x[j] = j % 2 ? -0.0f : 0.0f;
            k->unary(ops[i], y, x, 1.7f, 0, 32);
            CHECK(same(x, y, sizeof x), "%s: unary op %d of -0", k->name, ops[i]);
        }
    }
}

/* The budget of a small result is as large as the result. */
Test(kernels, exp_of_less_than_any_float_is_zero) {
    static const float x[] = {-104.0f, -104.5f, -105, -150, -1e30f, (float)-HUGE_VAL};
    enum { N = (int)(sizeof x / sizeof x[0]) };
    static const int ops[] = {TFM__U_EXP, TFM__U_SIGMOID};
    EACH_TABLE(k) {
        for (int j = 0; j < 2; j++) {
            float y[N];
            k->unary(ops[j], y, x, 0, 0, N);
            for (int i = 0; i < N; i++)
                CHECK(y[i] == 0, "%s: unary op %d of %.9g is %.9g", k->name, ops[j], (double)x[i], (double)y[i]);
        }
    }
}

/* -- binary -------------------------------------------------------------------------------------------------------- */

static double binary_exact(int op, double a, double b) {
    switch (op) {
    case TFM__B_ADD: return a + b;
    case TFM__B_SUB: return a - b;
    case TFM__B_MUL: return a * b;
    case TFM__B_DIV: return a / b;
    case TFM__B_MIN: return isnan(a) || isnan(b) ? (double)NAN : a < b ? a : b;
    case TFM__B_MAX: return isnan(a) || isnan(b) ? (double)NAN : a > b ? a : b;
    default: return pow(a, b);
    }
}

/* NaN and infinities among them; a step of 0 repeats one element. */
Test(kernels, binary_ops_round_once_at_every_length_with_repeated_operands_and_in_place) {
    int op, s, steps, i;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], count = row_sizes(k, sizes);
        for (op = 0; op < TFM__B_COUNT; op++)
            for (s = 0; s < count; s++)
                for (steps = 0; steps < 4; steps++) {
                    const int n = sizes[s], a_step = steps & 1, b_step = steps >> 1, an = a_step ? n : 1,
                              bn = b_step ? n : 1;
                    const int small = op == TFM__B_MIN || op == TFM__B_MAX ? BUDGET_EXACT : BUDGET_ROUNDED;
                    float *a = floats(0, an), *b = floats(1, bn), *y = floats(2, n);
                    for (i = 0; i < an; i++) a[i] = i % 7 == 3 ? (float)NAN : i % 11 == 5 ? (float)HUGE_VAL : normal();
                    for (i = 0; i < bn; i++) b[i] = i % 5 == 3 ? (float)NAN : i % 13 == 5 ? (float)-HUGE_VAL : normal();
                    k->binary(op, y, a, a_step, b, b_step, n);
                    for (i = 0; i < n; i++) {
                        const float x = a[a_step * i], z = b[b_step * i];
                        CHECK(ulps(y[i], binary_exact(op, (double)x, (double)z)) <= budget[small].most,
                              "%s: binary op %d of %.9g and %.9g is %.9g (n %d)", k->name, op, (double)x, (double)z,
                              (double)y[i], n);
                    }
                    if (a_step) k->binary(op, a, a, a_step, b, b_step, n);
                    else if (b_step) k->binary(op, b, a, a_step, b, b_step, n);
                    for (i = 0; i < n && steps; i++) {
                        const float *in_place = a_step ? a : b;
                        CHECK(same(&in_place[i], &y[i], 4) || (isnan(y[i]) && isnan(in_place[i])),
                              "%s: binary op %d in place", k->name, op);
                    }
                }
        assert_fronts_untouched("binary");
    }
}

/* The vectors' minimum and maximum give NaN when either operand is one, in whichever lane it stands. */
Test(kernels, minimum_and_maximum_propagate_nan_from_either_side_and_every_lane) {
    int lane, i;
    EACH_TABLE(k) {
        const int n = 3 * k->width + 1;
        for (lane = 0; lane < n; lane++) {
            float a[64], b[64], y[6][64];
            fill_normal(a, n);
            fill_normal(b, n);
            a[lane] = (float)NAN;
            k->binary(TFM__B_MIN, y[0], a, 1, b, 1, n);
            k->binary(TFM__B_MIN, y[1], b, 1, a, 1, n);
            k->binary(TFM__B_MAX, y[2], a, 1, b, 1, n);
            k->binary(TFM__B_MAX, y[3], b, 1, a, 1, n);
            k->unary(TFM__U_RELU, y[4], a, 0, 0, n);
            k->unary(TFM__U_CLAMP, y[5], a, -1, 1, n);
            for (i = 0; i < 6 * n; i++)
                CHECK(isnan(y[i / n][i % n]) == (i % n == lane), "%s: NaN in lane %d, lane %d gives %.9g", k->name,
                      lane, i % n, (double)y[i / n][i % n]);
            CHECK(isnan(k->reduce(TFM__R_MAX, a, n)) && isnan(k->reduce(TFM__R_MIN, a, n)), "%s: NaN at %d is lost",
                  k->name, lane);
        }
    }
}

Test(kernels, scaled_addition_is_within_two_roundings) {
    int s, i;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], count = row_sizes(k, sizes);
        for (s = 0; s < count; s++) {
            const int n = sizes[s];
            float *x = floats(0, n), *y = floats(1, n), *before = floats(2, n);
            fill_normal(x, n);
            fill_normal(y, n);
            if (n) memcpy(before, y, (size_t)n * 4);
            k->fma_scalar(y, x, 1.3f, n);
            for (i = 0; i < n; i++)
                CHECK(fabs((double)y[i] - ((double)before[i] + (double)1.3f * (double)x[i]))
                          <= 2e-7 * (fabs((double)before[i]) + 2 * fabs((double)x[i])),
                      "%s: %.9g + 1.3 * %.9g is %.9g", k->name, (double)before[i], (double)x[i], (double)y[i]);
        }
        assert_fronts_untouched("fma_scalar");
    }
}

/* -- activations --------------------------------------------------------------------------------------------------- */

static const int activation_op[TFM_ACT_COUNT] = {TFM__U_COPY,       TFM__U_RELU, TFM__U_GELU,    TFM__U_GELU_TANH,
                                                 TFM__U_GELU_QUICK, TFM__U_SILU, TFM__U_SIGMOID, TFM__U_TANH};

Test(kernels, gated_unit_has_the_bits_of_activation_times_operand) {
    int activation, s;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], count = row_sizes(k, sizes);
        for (activation = 0; activation < TFM_ACT_COUNT; activation++)
            for (s = 0; s < count; s++) {
                const int n = sizes[s];
                float *gate = floats(0, n), *up = floats(1, n), *y = floats(2, n), *two = floats(3, n);
                fill_normal(gate, n);
                fill_normal(up, n);
                k->glu(activation, y, gate, up, n);
                k->unary(activation_op[activation], two, gate, 0, 0, n);
                k->binary(TFM__B_MUL, two, two, 1, up, 1, n);
                CHECK(same(y, two, n * 4), "%s: activation %d, n %d", k->name, activation, n);
                k->glu(activation, gate, gate, up, n);
                CHECK(same(y, gate, n * 4), "%s: activation %d, n %d in place of gate", k->name, activation, n);
            }
        assert_fronts_untouched("glu");
    }
}

/* -- reductions ---------------------------------------------------------------------------------------------------- */

Test(kernels, empty_reductions_give_their_neutral_element) {
    EACH_TABLE(k) {
        cr_assert(k->reduce(TFM__R_SUM, NULL, 0) == 0 && k->reduce(TFM__R_SUMSQ, NULL, 0) == 0
                      && k->dot(NULL, NULL, 0) == 0,
                  "%s", k->name);
        cr_assert(k->reduce(TFM__R_MAX, NULL, 0) == (float)-HUGE_VAL
                      && k->reduce(TFM__R_MIN, NULL, 0) == (float)HUGE_VAL,
                  "%s", k->name);
        cr_assert(k->logsumexp(NULL, 0) == (float)-HUGE_VAL, "%s", k->name);
        softmax_row(k, NULL, NULL, 0, 0);
        softmax_row(k, NULL, NULL, 0, 1);
    }
}

Test(kernels, reductions_stay_within_their_budgets_and_do_not_depend_on_alignment) {
    static const int longer[] = {300, 4097, 100003};
    int s, i, op;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES + 3], count = row_sizes(k, sizes);
        for (i = 0; i < (test_quick() ? 2 : 3); i++) sizes[count++] = longer[i];
        for (s = 0; s < count; s++) {
            const int n = sizes[s];
            float *x = floats(0, n), *b = floats(1, n), *moved = (float *)room(2, n * 4 + 4);
            double sum = 0, squares = 0, dot = 0, most = -HUGE_VAL, least = HUGE_VAL, magnitude = 0, products = 0;
            fill_normal(x, n);
            fill_normal(b, n);
            if (n > 0) memcpy(moved, x, (size_t)n * 4);
            for (i = 0; i < n; i++) {
                const double v = (double)x[i], w = (double)b[i];
                sum += v, squares += v * v, dot += v * w, magnitude += fabs(v), products += fabs(v * w);
                if (v > most) most = v;
                if (v < least) least = v;
            }
            CHECK(fabs((double)k->reduce(TFM__R_SUM, x, n) - sum) <= budget[BUDGET_SUM].most * magnitude,
                  "%s: sum of %d", k->name, n);
            CHECK(fabs((double)k->reduce(TFM__R_SUMSQ, x, n) - squares) <= budget[BUDGET_SQUARES].most * squares,
                  "%s: squares of %d", k->name, n);
            CHECK(fabs((double)k->dot(x, b, n) - dot) <= budget[BUDGET_DOT].most * products, "%s: dot of %d", k->name,
                  n);
            CHECK((double)k->reduce(TFM__R_MAX, x, n) == most && (double)k->reduce(TFM__R_MIN, x, n) == least,
                  "%s: extremes of %d", k->name, n);
            for (op = 0; op < TFM__R_COUNT; op++) {
                const float here = k->reduce(op, x, n), there = k->reduce(op, moved, n);
                CHECK(same(&here, &there, 4), "%s: reduction %d of %d depends on the address", k->name, op, n);
            }
        }
    }
}

Test(kernels, a_reduction_sees_every_element) {
    int s, j, op;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], count = row_sizes(k, sizes);
        for (s = 0; s < count; s++) {
            const int n = sizes[s];
            float *x = floats(0, n), *b = floats(1, n);
            fill_normal(x, n);
            fill_value(b, n, 1);
            for (j = 0; j < n; j += n > 200 ? 29 : 1) {
                const float kept = x[j];
                x[j] = (float)NAN;
                for (op = 0; op < TFM__R_COUNT; op++)
                    CHECK(isnan(k->reduce(op, x, n)), "%s: op %d loses NaN at %d of %d", k->name, op, j, n);
                CHECK(isnan(k->dot(x, b, n)) && isnan(k->dot(b, x, n)) && isnan(k->logsumexp(x, n)),
                      "%s: NaN at %d of %d", k->name, j, n);
                x[j] = 50;
                CHECK(k->reduce(TFM__R_MAX, x, n) == 50, "%s: maximum at %d of %d", k->name, j, n);
                x[j] = -50;
                CHECK(k->reduce(TFM__R_MIN, x, n) == -50, "%s: minimum at %d of %d", k->name, j, n);
                x[j] = kept;
            }
        }
    }
}

Test(kernels, a_sum_of_a_million_elements_keeps_six_digits) {
    static const float value[] = {0.1f, 1.0f, 0.7f, 1.1f, 3.3f, 0.3333333f, 0.9999f};
    const int n = test_quick() ? 1 << 16 : 1 << 20;
    int j, i;
    EACH_TABLE(k) {
        float *x = floats(0, n);
        for (j = 0; j < 8; j++) {
            double sum = 0, squares = 0;
            for (i = 0; i < n; i++) x[i] = j < 7 ? value[j] : (float)uniform();
            for (i = 0; i < n; i++) sum += (double)x[i], squares += (double)x[i] * (double)x[i];
            CHECK(fabs((double)k->reduce(TFM__R_SUM, x, n) / sum - 1) <= budget[BUDGET_LONG_SUM].most,
                  "%s: sum, case %d", k->name, j);
            CHECK(fabs((double)k->reduce(TFM__R_SUMSQ, x, n) / squares - 1) <= budget[BUDGET_LONG_SUM].most,
                  "%s: squares, case %d", k->name, j);
        }
    }
}

/* -- softmax ------------------------------------------------------------------------------------------------------- */

static void check_softmax(const tfm__kernels *k, int n, double scale) {
    float *x = floats(0, n), *y = floats(1, n), *l = floats(2, n), *z = floats(3, n);
    double most = -HUGE_VAL, sum = 0, row = 0, total;
    int i;
    fill_normal(x, n);
    for (i = 0; i < n; i++) x[i] = rounded(scale * (double)x[i]);
    if (n > 5) x[3] = (float)-HUGE_VAL;
    for (i = 0; i < n; i++)
        if ((double)x[i] > most) most = (double)x[i];
    for (i = 0; i < n; i++) sum += exp((double)x[i] - most);
    total = most + log(sum);
    memcpy(z, x, (size_t)n * 4);
    softmax_row(k, y, x, n, 0);
    softmax_row(k, l, x, n, 1);
    CHECK(same(x, z, n * 4), "%s: input written", k->name);
    for (i = 0; i < n; i++) {
        const double exact = exp((double)x[i] - most) / sum, exact_log = (double)x[i] - total;
        row += (double)y[i];
        if (isinf(x[i])) {
            CHECK(y[i] == 0 && l[i] == (float)-HUGE_VAL, "%s: -inf has weight %.9g, log %.9g", k->name, (double)y[i],
                  (double)l[i]);
            continue;
        }
        CHECK(exact < 1e-37 ? y[i] < 2e-37f : fabs((double)y[i] / exact - 1) <= budget[BUDGET_SOFTMAX].most,
              "%s: softmax, n %d: %.9g, not %.9g", k->name, n, (double)y[i], exact);
        CHECK(fabs((double)l[i] - exact_log) <= budget[BUDGET_LOG_SOFTMAX].most * at_least_one(exact_log),
              "%s: log_softmax, n %d: %.9g, not %.9g", k->name, n, (double)l[i], exact_log);
    }
    CHECK(fabs(row - 1) <= budget[BUDGET_SOFTMAX_ROW].most, "%s: a row of %d sums to %.9g", k->name, n, row);
    CHECK(fabs((double)k->logsumexp(x, n) - total) <= budget[BUDGET_LOG_SOFTMAX].most * at_least_one(total),
          "%s: logsumexp of %d", k->name, n);
    softmax_row(k, z, z, n, 0);
    CHECK(same(y, z, n * 4), "%s: softmax of %d in place", k->name, n);
    memcpy(z, x, (size_t)n * 4);
    softmax_row(k, z, z, n, 1);
    CHECK(same(l, z, n * 4), "%s: log_softmax of %d in place", k->name, n);
}

Test(kernels, a_softmax_has_the_same_bits_whichever_rows_are_taken_with_it) {
    int s, log_form, count, r, i;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], sizes_count = row_sizes(k, sizes);
        for (s = 1; s < sizes_count; s++)
            for (log_form = 0; log_form < 2; log_form++)
                for (count = 2; count <= TOGETHER; count += count < 4 ? 1 : TOGETHER - 4) {
                    const int n = sizes[s];
                    float *x = floats(0, n * count), *y = floats(1, n * count), *alone = floats(2, n);
                    tfm__softmax_row rows[TOGETHER];
                    fill_normal(x, n * count);
                    for (i = 0; i < n; i++) x[n + i] = (float)-HUGE_VAL; /* beside a row without an element */
                    for (r = 0; r < count; r++) rows[r].x = x + r * n, rows[r].y = y + r * n;
                    k->softmax(rows, count, n, log_form);
                    for (r = 0; r < count; r++) {
                        softmax_row(k, alone, x + r * n, n, log_form);
                        CHECK(same(alone, y + r * n, n * 4), "%s: row %d of %d, n %d, log %d", k->name, r, count, n,
                              log_form);
                    }
                }
    }
}

Test(kernels, softmax_stays_within_its_budget) {
    static const int longer[] = {128, 4096, 32000, 50257, 200000};
    int s, i;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES + 5], count = row_sizes(k, sizes);
        for (i = 0; i < (test_quick() ? 1 : 5); i++) sizes[count++] = longer[i];
        for (s = 1; s < count; s++) {
            check_softmax(k, sizes[s], 1);
            check_softmax(k, sizes[s], 10);
        }
        assert_fronts_untouched("softmax");
    }
}

/* NaN or +inf somewhere in x. */
static void check_poisoned_softmax(const tfm__kernels *k, float *x, float *y, int n, int log_form) {
    int i, j;
    for (j = 0; j < n; j += n > 200 ? 37 : 1) {
        const float kept = x[j];
        x[j] = (float)NAN;
        softmax_row(k, y, x, n, log_form);
        for (i = 0; i < n; i++) CHECK(isnan(y[i]), "%s: NaN at %d of %d lost at %d", k->name, j, n, i);
        CHECK(isnan(k->logsumexp(x, n)), "%s: logsumexp with NaN at %d of %d", k->name, j, n);
        x[j] = (float)HUGE_VAL;
        softmax_row(k, y, x, n, log_form);
        for (i = 0; i < n; i++)
            CHECK(isnan(y[i]), "%s: inf at %d of %d: %.9g at %d", k->name, j, n, (double)y[i], i);
        CHECK(k->logsumexp(x, n) == (float)HUGE_VAL, "%s: logsumexp with inf", k->name);
        x[j] = kept;
    }
}

Test(kernels, softmax_of_only_minus_infinity_is_zero_and_nan_or_plus_infinity_takes_the_row) {
    int s, i, log_form;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES], count = row_sizes(k, sizes);
        for (s = 1; s < count; s++) {
            const int n = sizes[s];
            float *x = floats(0, n), *y = floats(1, n);
            for (log_form = 0; log_form < 2; log_form++) {
                fill_value(x, n, (float)-HUGE_VAL);
                softmax_row(k, y, x, n, log_form);
                for (i = 0; i < n; i++)
                    CHECK(y[i] == (log_form ? (float)-HUGE_VAL : 0), "%s: no element, %d of %d", k->name, i, n);
                CHECK(k->logsumexp(x, n) == (float)-HUGE_VAL, "%s: logsumexp of -inf only", k->name);
                fill_value(x, n, -FLT_MAX); /* a finite mask is not an empty row */
                softmax_row(k, y, x, n, log_form);
                for (i = 0; i < n; i++)
                    CHECK(fabs((log_form ? exp((double)y[i]) : (double)y[i]) * n - 1) < 1e-5, "%s: uniform row of %d",
                          k->name, n);
                fill_value(x, n, (float)-HUGE_VAL);
                check_poisoned_softmax(k, x, y, n, log_form);
                fill_normal(x, n);
                check_poisoned_softmax(k, x, y, n, log_form);
            }
        }
    }
}

/* -- norms --------------------------------------------------------------------------------------------------------- */

/* bits of `form`: mean subtracted, residual, weight, bias, sum wanted, in place, weight + 1 */
static void check_norm(const tfm__kernels *k, int n, int form, double mean_of_x) {
    const int subtract = form & 1, in_place = form >> 5 & 1;
    const double eps = (double)1e-5f;
    float *x = floats(0, n), *residual = floats(1, n), *weight = floats(2, n), *bias = floats(3, n),
          *sum = floats(4, n), *y = floats(5, n);
    double mean = 0, variance = 0;
    tfm__norm a;
    tfm__norm_row row;
    int i;
    fill_normal(x, n);
    fill_normal(residual, n);
    fill_normal(weight, n);
    fill_normal(bias, n);
    for (i = 0; i < n; i++) x[i] = rounded((double)x[i] + mean_of_x);
    if (!(form & 2)) fill_value(residual, n, 0);
    memset(&a, 0, sizeof a);
    memset(&row, 0, sizeof row);
    memcpy(y, x, (size_t)n * 4);
    a.n = n;
    a.subtract_mean = subtract;
    row.x = in_place ? y : x;
    if (form & 2) row.residual = residual;
    if (form & 4) a.weight = weight;
    if (form & 8) a.bias = bias;
    if (form & 16) row.sum = sum;
    if (form & 64) a.weight_offset = 1;
    a.eps = (float)eps;
    row.y = y;
    k->norm(&a, &row, 1);
    for (i = 0; i < n; i++) x[i] = rounded((double)x[i] + (double)residual[i]);
    for (i = 0; i < n && subtract; i++) mean += (double)x[i] / n;
    for (i = 0; i < n; i++) variance += ((double)x[i] - mean) * ((double)x[i] - mean) / n;
    CHECK(fabs((double)row.mean - mean) <= budget[BUDGET_NORM].most * at_least_one(mean), "%s: mean %.9g, not %.9g",
          k->name, (double)row.mean, mean);
    CHECK(fabs((double)row.rstd * sqrt(variance + eps) - 1) <= budget[BUDGET_NORM].most, "%s: 1/deviation of %d",
          k->name, n);
    for (i = 0; i < n; i++) {
        const double unit = ((double)x[i] - mean) / sqrt(variance + eps);
        const double exact =
            unit * (form & 4 ? (double)weight[i] + (double)a.weight_offset : 1) + (form & 8 ? (double)bias[i] : 0);
        CHECK(!(form & 16) || sum[i] == x[i], "%s: sum, form %d", k->name, form);
        CHECK(fabs((double)y[i] - exact) <= budget[BUDGET_NORM].most * at_least_one(exact) * (n == 1 ? 400 : 1),
              "%s: form %d, n %d: %.9g, not %.9g", k->name, form, n, (double)y[i], exact);
    }
}

Test(kernels, norms_stay_within_their_budget_in_every_form) {
    int s, form;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES + 2], count = row_sizes(k, sizes);
        sizes[count++] = SHORT_ROW;
        sizes[count++] = SHORT_ROW + 1;
        for (s = 1; s < count; s++)
            for (form = 0; form < 128; form++) check_norm(k, sizes[s], form, 3);
        assert_fronts_untouched("norm");
    }
}

Test(kernels, a_norm_has_the_same_bits_whichever_rows_are_taken_with_it) {
    int s, form, count, r;
    EACH_TABLE(k) {
        int sizes[MOST_SIZES + 2], sizes_count = row_sizes(k, sizes);
        sizes[sizes_count++] = SHORT_ROW;
        sizes[sizes_count++] = SHORT_ROW + 1;
        for (s = 1; s < sizes_count; s++)
            for (form = 0; form < 4; form++)
                for (count = 2; count <= TOGETHER; count += count < 4 ? 1 : TOGETHER - 4) {
                    const int n = sizes[s];
                    float *x = floats(0, n * count), *residual = floats(1, n * count), *weight = floats(2, n),
                          *y = floats(3, n * count), *sum = floats(4, n * count), *alone = floats(5, n);
                    tfm__norm_row rows[TOGETHER], one;
                    tfm__norm a;
                    fill_normal(x, n * count);
                    fill_normal(residual, n * count);
                    fill_normal(weight, n);
                    x[0] += 1e4f; /* the first row's moments are taken twice */
                    memset(rows, 0, sizeof rows);
                    memset(&a, 0, sizeof a);
                    a.n = n, a.eps = 1e-5f, a.weight = weight, a.subtract_mean = form & 1;
                    for (r = 0; r < count; r++) {
                        rows[r].x = x + r * n, rows[r].y = y + r * n;
                        if (form & 2) rows[r].residual = residual + r * n, rows[r].sum = sum + r * n;
                    }
                    one = rows[count - 1];
                    one.y = alone, one.sum = NULL;
                    k->norm(&a, rows, count);
                    k->norm(&a, &one, 1);
                    CHECK(same(alone, y + (count - 1) * n, n * 4) && one.mean == rows[count - 1].mean &&
                              one.rstd == rows[count - 1].rstd,
                          "%s: the last of %d rows of %d, form %d", k->name, count, n, form);
                    memset(&one, 0, sizeof one);
                    one.x = form & 2 ? sum : x, one.y = alone;
                    k->norm(&a, &one, 1);
                    CHECK(same(alone, y, n * 4), "%s: the first of %d rows of %d, form %d", k->name, count, n, form);
                }
    }
}

/* E[x^2] - E[x]^2 would have no digit left. */
Test(kernels, layer_norm_keeps_its_digits_beside_a_large_mean) {
    EACH_TABLE(k) {
        check_norm(k, 768, 1, 1000);
        check_norm(k, 768, 1, -30000);
        check_norm(k, 4 * k->width + 3, 1, 30000);
    }
}

/* The first elements, about whose mean the sums run, say nothing about the others; a deviation of ten times the spacing
 * of floats; a large mean that drifts. */
Test(kernels, layer_norm_keeps_its_digits_on_hostile_rows) {
    enum { N = 768 };
    int kind, i;
    EACH_TABLE(k) {
        for (kind = 0; kind < 4; kind++) {
            float x[N], y[N];
            double mean = 0, variance = 0;
            tfm__norm a;
            tfm__norm_row row;
            memset(&a, 0, sizeof a);
            memset(&row, 0, sizeof row);
            fill_normal(x, N);
            for (i = 0; i < N; i++) {
                const double v = (double)x[i];
                x[i] = rounded(kind == 0   ? (i < 16 ? 1e4 + v : v)
                               : kind == 1 ? 1e4 + 1e-2 * v
                               : kind == 2 ? 3e4 + 40.0 * i + v
                                           : (i == N - 1 ? 1e6 : 1e-3 * v));
            }
            a.n = N, a.eps = 1e-12f, a.subtract_mean = 1;
            row.x = x, row.y = y;
            k->norm(&a, &row, 1);
            for (i = 0; i < N; i++) mean += (double)x[i] / N;
            for (i = 0; i < N; i++) variance += ((double)x[i] - mean) * ((double)x[i] - mean) / N;
            CHECK(fabs((double)row.rstd * sqrt(variance + 1e-12) - 1) <= 1e-6, "%s: 1/deviation of row %d: %.9g",
                  k->name, kind, (double)row.rstd);
            for (i = 0; i < N; i++) {
                const double exact = ((double)x[i] - mean) / sqrt(variance + 1e-12);
                CHECK(fabs((double)y[i] - exact) <= budget[BUDGET_NORM].most * at_least_one(exact),
                      "%s: element %d of row %d: %.9g, not %.9g", k->name, i, kind, (double)y[i], exact);
            }
        }
    }
}

Test(kernels, norm_of_nan_is_nan_and_of_zeros_is_the_bias) {
    int subtract, lane, i;
    EACH_TABLE(k) {
        const int n = 2 * k->width + 1;
        for (subtract = 0; subtract < 2; subtract++) {
            float x[40], y[40], bias[40];
            tfm__norm a;
            tfm__norm_row row;
            memset(&a, 0, sizeof a);
            memset(&row, 0, sizeof row);
            a.n = n, a.bias = bias, a.eps = 1e-5f, a.subtract_mean = subtract;
            row.x = x, row.y = y;
            fill_value(x, n, 0);
            fill_normal(bias, n);
            k->norm(&a, &row, 1);
            CHECK(same(y, bias, n * 4), "%s: zeros", k->name);
            for (lane = 0; lane < n; lane++) {
                fill_normal(x, n);
                x[lane] = (float)NAN;
                k->norm(&a, &row, 1);
                for (i = 0; i < n; i++) CHECK(isnan(y[i]), "%s: NaN at %d lost at %d", k->name, lane, i);
            }
        }
    }
}

/* -- rotary -------------------------------------------------------------------------------------------------------- */

static void rotary_row(const tfm__kernels *k, float *y, const float *x, const float *cosine, const float *sine, int n,
                       int interleaved) {
    tfm__rotary_rows a;
    memset(&a, 0, sizeof a);
    a.rows = 1, a.n = n, a.interleaved = interleaved, a.y = y, a.x = x, a.cosine = cosine, a.sine = sine;
    k->rotary(&a);
}

/* Rows apart from each other: the bits of each alone, nothing between them touched. */
static void check_rotary_rows(const tfm__kernels *k, int half, int interleaved) {
    enum { ROWS = 3, GAP = 5 };
    const int n = 2 * half, row = n + GAP, table = half + GAP;
    float *x = floats(0, ROWS * row), *y = floats(1, ROWS * row), *cosine = floats(2, ROWS * table),
          *sine = floats(3, ROWS * table), *alone = floats(4, row);
    tfm__rotary_rows a;
    int r;
    fill_normal(x, ROWS * row);
    fill_normal(cosine, ROWS * table);
    fill_normal(sine, ROWS * table);
    fill_value(y, ROWS * row, 7);
    memset(&a, 0, sizeof a);
    a.rows = ROWS, a.n = n, a.interleaved = interleaved, a.y = y, a.x = x, a.cosine = cosine, a.sine = sine;
    a.y_row = a.x_row = row, a.table_row = table;
    k->rotary(&a);
    for (r = 0; r < ROWS; r++) {
        fill_value(alone, row, 7);
        rotary_row(k, alone, x + r * row, cosine + r * table, sine + r * table, n, interleaved);
        CHECK(same(alone, y + r * row, row * 4), "%s: row %d, %d pairs", k->name, r, half);
    }
}

Test(kernels, rotary_turns_pairs_and_both_pairings_agree) {
    int half, interleaved, i;
    EACH_TABLE(k) {
        for (half = 0; half <= 3 * k->width + 2; half++)
            for (interleaved = 0; interleaved < 2; interleaved++) {
                const int h = half == 3 * k->width + 2 ? 133 : half, n = 2 * h;
                float *x = floats(0, n), *y = floats(1, n), *cosine = floats(2, h), *sine = floats(3, h),
                      *other = floats(4, n);
                fill_normal(x, n);
                for (i = 0; i < h; i++) cosine[i] = (float)cos(i + 0.3), sine[i] = (float)sin(i + 0.3);
                rotary_row(k, y, x, cosine, sine, n, interleaved);
                for (i = 0; i < h; i++) {
                    const int i0 = interleaved ? 2 * i : i, i1 = interleaved ? 2 * i + 1 : i + h;
                    const double a = (double)x[i0], b = (double)x[i1], c = (double)cosine[i], s = (double)sine[i];
                    CHECK(fabs((double)y[i0] - (a * c - b * s)) <= budget[BUDGET_ROTARY].most &&
                              fabs((double)y[i1] - (b * c + a * s)) <= budget[BUDGET_ROTARY].most,
                          "%s: pair %d of %d", k->name, i, h);
                    other[interleaved ? i : 2 * i] = x[i0];
                    other[interleaved ? i + h : 2 * i + 1] = x[i1];
                }
                rotary_row(k, other, other, cosine, sine, n, !interleaved);
                for (i = 0; i < h; i++)
                    CHECK(other[interleaved ? i : 2 * i] == y[interleaved ? 2 * i : i] &&
                              other[interleaved ? i + h : 2 * i + 1] == y[interleaved ? 2 * i + 1 : i + h],
                          "%s: pair %d of %d differs between the pairings", k->name, i, h);
                rotary_row(k, x, x, cosine, sine, n, interleaved);
                CHECK(same(x, y, n * 4), "%s: in place, %d pairs", k->name, h);
                check_rotary_rows(k, h, interleaved);
            }
        assert_fronts_untouched("rotary");
    }
}

/* -- packing ------------------------------------------------------------------------------------------------------- */

/* Element (j, k) of panels of 16: [j / 16][k][j % 16], of 64 the same way; (r, k) of strips: [strip][k][r - first row
 * of the strip]. */
static void check_packing(const tfm__kernels *k, int from, int to, int64_t cols, int64_t depth, int64_t col_step,
                          int64_t k_step) {
    const int64_t span = cols && depth ? (cols - 1) * col_step + (depth - 1) * k_step + 1 : 0, tile = k->tile_rows;
    const int64_t panels = (cols + PANEL - 1) / PANEL * PANEL, strips = (cols + tile - 1) / tile;
    const int64_t wide = (cols + KEY_PANEL - 1) / KEY_PANEL * KEY_PANEL;
    void *src = room(0, span * float_size(from)), *dst = room(1, wide * depth * float_size(to));
    float *packed = floats(2, strips * tile * depth);
    int64_t i, j, strip, width;
    for (i = 0; i < span; i++) set_element(src, from, i, normal());
    fill_value(packed, strips * tile * depth, (float)NAN);
    k->pack_strips(packed, src, from, col_step, k_step, cols, depth, strips / 2, strips);
    k->pack_strips(packed, src, from, col_step, k_step, cols, depth, 0, strips / 2); /* writes nothing into the next */
    for (width = KEY_PANEL; width >= PANEL; width -= KEY_PANEL - PANEL) {
        memset(dst, 0x55, (size_t)(wide * depth * float_size(to)));
        k->pack_panels(dst, to, width, src, from, col_step, k_step, cols, depth);
        for (j = 0; j < panels; j++)
            for (i = 0; i < depth; i++) {
                const float want = j < cols ? element(src, from, j * col_step + i * k_step) : 0;
                const float is = element(dst, to, (j / width * depth + i) * width + j % width);
                CHECK(is == (to == TFM_F32 ? want : (float)half_value(to, half_nearest(to, want))),
                      "%s: %s panels of %lld from %s, %lld x %lld, steps %lld %lld: (%lld, %lld) is %.9g, from %.9g",
                      k->name, float_name[to], (long long)width, float_name[from], (long long)cols, (long long)depth,
                      (long long)col_step, (long long)k_step, (long long)j, (long long)i, (double)is, (double)want);
            }
    }
    if (from == to && k_step == 1 && col_step == depth) {
        const int64_t bytes = panels * depth * float_size(to), past = random_bits() % 2 * 16; /* and no line's begin */
        void *weight = room(3, bytes + past);
        memset(weight, 0x55, (size_t)bytes);
        k->pack_weight(weight, src, to, cols, depth);
        CHECK(same(weight, dst, bytes), "%s: %s weight of %lld x %lld", k->name,
              float_name[to], (long long)cols, (long long)depth);
    }
    for (strip = 0; strip < strips; strip++)
        for (j = tfm__strip_begin(cols, strips, strip); j < tfm__strip_begin(cols, strips, strip + 1); j++)
            for (i = 0; i < depth; i++)
                CHECK(packed[(strip * depth + i) * tile + j - tfm__strip_begin(cols, strips, strip)] ==
                          element(src, from, j * col_step + i * k_step),
                      "%s: strips from %s, %lld x %lld: (%lld, %lld)", k->name, float_name[from], (long long)cols,
                      (long long)depth, (long long)j, (long long)i);
}

Test(kernels, packing_puts_every_element_in_its_place_and_zeros_in_the_rest) {
    int from, to, form, i;
    EACH_TABLE(k) {
        for (from = TFM_F32; from <= TFM_BF16; from++)
            for (to = TFM_F32; to <= TFM_BF16; to++)
                for (form = 0; form < 4; form++) {
                    for (i = 0; i < (test_quick() ? 8 : 40); i++) {
                        const int64_t cols = random_bits() % 40, depth = random_bits() % 40;
                        check_packing(k, from, to, cols, depth,
                                      form == 0   ? depth
                                      : form == 1 ? 1
                                      : form == 2 ? 2 * depth + 1
                                                  : depth + 3,
                                      form == 0   ? 1
                                      : form == 1 ? cols
                                      : form == 2 ? 2
                                                  : 1);
                    }
                    check_packing(k, from, to, 3 * PANEL + 1, 3 * k->width + 1, 3 * k->width + 1, 1);
                    check_packing(k, from, to, 3 * PANEL, 100, 100, 1);
                    check_packing(k, from, to, 4 * PANEL + 5, 7, 1, 4 * PANEL + 9);
                }
        assert_fronts_untouched("packing");
    }
}

/* -- products ------------------------------------------------------------------------------------------------------ */

/* A product and its operands: a[m][k], b[n][k] as given (bt[k][n] row-major, panels and strips packed). */
typedef struct product {
    const tfm__kernels *k;
    int64_t m, n, depth, a_row, b_row, c_row;
    int dtype, activation;
    float *a, *strips, *bias, *c;
    void *b, *bt, *panels;
} product;

static double activated(int activation, double x) {
    static double (*const exact[TFM_ACT_COUNT])(double, double, double) = {
        r_copy, r_relu, r_gelu, r_gelu_tanh, r_gelu_quick, r_silu, r_sigmoid, r_tanh};
    return exact[activation](x, 0, 0);
}

/* `gap`: elements between rows that nothing may touch. */
static product make_product(const tfm__kernels *k, int64_t m, int64_t n, int64_t depth, int dtype, int activation,
                            int bias, int64_t gap) {
    const int64_t size = float_size(dtype), tile = k->tile_rows;
    product p;
    int64_t i, j;
    p.k = k, p.m = m, p.n = n, p.depth = depth, p.dtype = dtype, p.activation = activation;
    p.a_row = depth + gap, p.b_row = n + gap, p.c_row = n + gap;
    p.a = floats(0, m && depth ? (m - 1) * p.a_row + depth : 0);
    p.b = room(1, n * depth * size);
    p.bt = room(2, n && depth ? ((depth - 1) * p.b_row + n) * size : 0);
    p.panels = room(3, (n + PANEL - 1) / PANEL * PANEL * depth * size);
    p.strips = floats(4, (m + tile - 1) / tile * tile * depth);
    p.c = floats(5, m && n ? (m - 1) * p.c_row + n : 0);
    p.bias = bias ? floats(7, n) : NULL;
    for (i = 0; i < m * depth; i++) p.a[i / depth * p.a_row + i % depth] = normal() / 2;
    for (i = 0; i < m - 1 && depth; i++)
        for (j = 0; j < gap; j++) p.a[i * p.a_row + depth + j] = (float)NAN;
    for (i = 0; i < depth - 1 && n; i++)
        for (j = 0; j < gap; j++) set_element(p.bt, dtype, i * p.b_row + n + j, (float)NAN);
    for (i = 0; i < n * depth; i++) {
        const float x = normal() / 2;
        set_element(p.b, dtype, i, x);
        set_element(p.bt, dtype, i % depth * p.b_row + i / depth, x);
    }
    if (bias) fill_normal(p.bias, n);
    k->pack_panels(p.panels, dtype, PANEL, p.b, dtype, depth, 1, n, depth);
    k->pack_strips(p.strips, p.a, TFM_F32, p.a_row, 1, m, depth, 0, (m + k->tile_rows - 1) / k->tile_rows);
    return p;
}

/* The plain form: rows of A, panels of B. */
static tfm__gemm plain_form(const product *p, float *c) {
    tfm__gemm g;
    memset(&g, 0, sizeof g);
    g.rows = p->m, g.cols = p->n, g.depth = p->depth;
    g.a = p->a, g.a_row = p->a_row;
    g.b = p->panels, g.b_dtype = p->dtype, g.b_row = PANEL, g.b_panel = PANEL * p->depth;
    g.c = c, g.c_row = p->c_row;
    g.finish = 1, g.activation = p->activation, g.bias = p->bias;
    return g;
}

static int64_t c_count(const product *p) { return p->m && p->n ? (p->m - 1) * p->c_row + p->n : 0; }
static float *fresh_c(const product *p) {
    float *c = floats(6, c_count(p));
    fill_value(c, c_count(p), 77);
    return c;
}

#define EXPECT_SAME(p, c, what) \
    CHECK(same((p)->c, c, 4 * c_count(p)), "%s: %s: %lld x %lld x %lld %s, activation %d", (p)->k->name, what, \
          (long long)(p)->m, (long long)(p)->n, (long long)(p)->depth, float_name[(p)->dtype], (p)->activation)

/* c = plain form, checked against doubles (every `stride`th element). */
static void check_exact(const product *p, int64_t stride) {
    const tfm__gemm g = plain_form(p, p->c);
    int64_t r, j, i, at = 0;
    fill_value(p->c, c_count(p), 77);
    p->k->gemm(&g);
    for (r = 0; r < p->m; r++) {
        for (j = p->n; j < p->c_row && r < p->m - 1 && p->n; j++)
            CHECK(p->c[r * p->c_row + j] == 77, "%s: written between the rows of C", p->k->name);
        for (j = 0; j < p->n; j++) {
            const double is = (double)p->c[r * p->c_row + j];
            double sum = 0, size = 0, exact;
            if (at++ % stride) continue;
            for (i = 0; i < p->depth; i++) {
                const double t = (double)p->a[r * p->a_row + i] * (double)element(p->b, p->dtype, j * p->depth + i);
                sum += t, size += fabs(t);
            }
            if (p->bias) sum += (double)p->bias[j], size += fabs((double)p->bias[j]);
            exact = activated(p->activation, sum);
            CHECK(fabs(is - exact) <= budget[BUDGET_PRODUCT].most * (4 + 2 * sqrt((double)p->depth)) * size
                                          + (p->activation ? budget[BUDGET_FINISH].most * at_least_one(exact) : 0),
                  "%s: %lld x %lld x %lld %s, activation %d at (%lld, %lld): %.9g, not %.9g", p->k->name,
                  (long long)p->m, (long long)p->n, (long long)p->depth, float_name[p->dtype], p->activation,
                  (long long)r, (long long)j, is, exact);
        }
    }
}

/* Every other way to the same product gives the same bits. */
static void check_forms(const product *p) {
    const int64_t size = float_size(p->dtype), tile = p->k->tile_rows, step = 1 + p->depth / 3;
    int64_t r, j, at;
    int form;
    float *c = fresh_c(p);
    tfm__gemm g = plain_form(p, c);
    g.b = p->bt, g.b_row = p->b_row, g.b_panel = PANEL;
    p->k->gemm(&g);
    EXPECT_SAME(p, c, "row-major B");
    /* k in pieces: rows, strips, strips with row-major B; in one piece the last time. Strips go with f32 alone */
    for (form = 0; form < (p->dtype == TFM_F32 ? 3 : 1); form++) {
        c = fresh_c(p);
        for (at = 0; at == 0 || at < p->depth; at += step) {
            g = plain_form(p, c);
            g.depth = p->depth - at < step ? p->depth - at : step;
            g.accumulate = at > 0;
            g.finish = at + g.depth == p->depth;
            g.a = form ? p->strips + at * tile : p->a + at;
            g.b = (const char *)p->panels + size * PANEL * at;
            if (form) g.strips = (p->m + tile - 1) / tile, g.a_row = tile * p->depth;
            if (form == 2) g.b = (const char *)p->bt + size * p->b_row * at, g.b_row = p->b_row, g.b_panel = PANEL;
            p->k->gemm(&g);
        }
        EXPECT_SAME(p, c,
                    form == 0   ? "k in pieces"
                    : form == 1 ? "packed A, k in pieces"
                                : "packed A, row-major B, k in pieces");
    }
    c = fresh_c(p);
    g = plain_form(p, c);
    if (p->dtype == TFM_F32) g.a = p->strips, g.strips = (p->m + tile - 1) / tile, g.a_row = tile * p->depth;
    p->k->gemm(&g);
    EXPECT_SAME(p, c, "packed A");
    c = fresh_c(p);
    for (r = 0; r < p->m; r++) {
        g = plain_form(p, c + r * p->c_row);
        g.rows = 1, g.a = p->a + r * p->a_row;
        p->k->gemm(&g);
    }
    EXPECT_SAME(p, c, "row by row");
    c = fresh_c(p);
    for (j = 0; j < p->n; j += PANEL) {
        g = plain_form(p, c + j);
        g.cols = p->n - j < PANEL ? p->n - j : PANEL;
        g.b = (const char *)p->panels + size * j * p->depth;
        if (p->bias) g.bias = p->bias + j;
        p->k->gemm(&g);
    }
    EXPECT_SAME(p, c, "panel by panel");
    if (p->m > 0 && (p->dtype == TFM_F32 ? p->m <= 4 : p->k->turn_rows > 0)) {
        c = fresh_c(p);
        g = plain_form(p, c);
        g.b = p->b, g.b_row = p->depth;
        p->k->gemm_turned(&g);
        EXPECT_SAME(p, c, "B as a file holds it");
    }
    assert_fronts_untouched("product");
}

/* Rows 0 to 3 tiles + 1; columns and depths around every edge. */
Test(kernels, products_are_within_budget_and_have_the_same_bits_alone_packed_and_in_pieces) {
    static const int64_t cols[] = {0, 1, 3, 7, 13, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 131},
                         depths[] = {0, 1, 2, 5, 16, 31, 33, 100};
    EACH_TABLE(k) {
        int64_t m;
        int i;
        for (m = 0; m <= 3 * k->tile_rows + 1; m += test_quick() && m > k->tile_rows ? 7 : 1)
            for (i = 0; i < 16; i += test_quick() ? 2 : 1) {
                const product p = make_product(k, m, cols[i], depths[random_bits() % 8], (int)(random_bits() % 3),
                                               (int)(random_bits() % TFM_ACT_COUNT), (int)(random_bits() % 2),
                                               random_bits() % 2 ? 3 : 0);
                check_exact(&p, 1);
                check_forms(&p);
            }
        for (i = 1; i < 40; i += 4) { /* one row and whole cache lines of depth */
            const product p = make_product(k, 1, i, 48, TFM_F32, TFM_ACT_NONE, 1, 3);
            check_exact(&p, 1);
            check_forms(&p);
        }
    }
}

Test(kernels, every_activation_finishes_a_product_of_every_dtype) {
    int dtype, activation;
    EACH_TABLE(k) {
        for (dtype = TFM_F32; dtype <= TFM_BF16; dtype++)
            for (activation = 0; activation < TFM_ACT_COUNT; activation++) {
                const product p = make_product(k, k->tile_rows + 1, 2 * PANEL + 5, 40, dtype, activation, 1, 0);
                check_exact(&p, 1);
                check_forms(&p);
            }
    }
}

/* One that is larger than each block size, walked as chapter 8 does: the blocks' bits are those of the whole. */
Test(kernels, a_product_cut_at_every_block_edge_has_the_bits_of_the_whole) {
    EACH_TABLE(k) {
        const int64_t m = test_quick() ? 2 * k->tile_rows + 1 : k->block_m + k->tile_rows + 1;
        const int64_t n = test_quick() ? 5 * PANEL + 1 : 17 * PANEL + 1,
                      depth = test_quick() ? 67 : k->block_k + 33;
        const int64_t bm = test_quick() ? k->tile_rows : k->block_m, bn = test_quick() ? 4 * PANEL : 16 * PANEL;
        const int64_t bk = test_quick() ? 32 : k->block_k, tile = k->tile_rows;
        const product p = make_product(k, m, n, depth, TFM_F32, TFM_ACT_GELU, 1, 0);
        float *c = fresh_c(&p);
        int64_t r, j, i;
        check_exact(&p, test_quick() ? 1 : 7);
        for (j = 0; j < n; j += bn)
            for (i = 0; i < depth; i += bk)
                for (r = 0; r < m; r += bm) {
                    tfm__gemm g = plain_form(&p, c + r * p.c_row + j);
                    g.rows = m - r < bm ? m - r : bm;
                    g.cols = n - j < bn ? n - j : bn;
                    g.depth = depth - i < bk ? depth - i : bk;
                    g.accumulate = i > 0;
                    g.finish = i + g.depth == depth;
                    g.a = p.strips, g.strips = (g.rows + tile - 1) / tile, g.a_row = tile * g.depth;
                    k->pack_strips(p.strips, p.a + r * p.a_row + i, TFM_F32, p.a_row, 1, g.rows, g.depth, 0, g.strips);
                    g.b = (const float *)p.panels + j * depth + i * PANEL;
                    g.bias = p.bias + j;
                    k->gemm(&g);
                }
        EXPECT_SAME(&p, c, "blocks");
        assert_fronts_untouched("product");
    }
}

Test(kernels, a_product_of_depth_zero_is_the_bias_or_what_c_holds) {
    EACH_TABLE(k) {
        const product p = make_product(k, 5, 37, 0, TFM_F32, TFM_ACT_NONE, 1, 0);
        float *c = fresh_c(&p);
        tfm__gemm g = plain_form(&p, c);
        int i;
        k->gemm(&g);
        for (i = 0; i < 5 * 37; i++) CHECK(c[i] == p.bias[i % 37], "%s: at %d", k->name, i);
        g.accumulate = 1;
        g.bias = NULL;
        k->gemm(&g);
        for (i = 0; i < 5 * 37; i++) CHECK(c[i] == p.bias[i % 37], "%s: at %d, accumulated", k->name, i);
        g.accumulate = 0;
        k->gemm(&g);
        for (i = 0; i < 5 * 37; i++) CHECK(c[i] == 0, "%s: at %d", k->name, i);
    }
}

Test(kernels, nan_and_infinity_reach_their_row_and_column_and_no_other) {
    int what, packed;
    EACH_TABLE(k) {
        const int64_t m = 2 * k->tile_rows + 1, n = 4 * PANEL + 3, depth = 19;
        for (what = 0; what < 4; what++)
            for (packed = 0; packed < 2; packed++) {
                const product p = make_product(k, m, n, depth, what / 2 ? TFM_F32 : TFM_BF16, TFM_ACT_NONE, 0, 0);
                const float poison = what % 2 ? (float)HUGE_VAL : (float)NAN;
                const int64_t row = random_bits() % m, col = random_bits() % n, at = random_bits() % depth;
                tfm__gemm g = plain_form(&p, p.c);
                int64_t r, j;
                p.a[row * p.a_row + at] = poison;
                set_element(p.panels, p.dtype, (col / PANEL * depth + (at + 1) % depth) * PANEL + col % PANEL, poison);
                k->pack_strips(p.strips, p.a, TFM_F32, p.a_row, 1, m, depth, 0, (m + k->tile_rows - 1) / k->tile_rows);
                if (packed && p.dtype == TFM_F32) g.a = p.strips, g.strips = 3, g.a_row = k->tile_rows * depth;
                k->gemm(&g);
                for (r = 0; r < m; r++)
                    for (j = 0; j < n; j++) {
                        const float is = p.c[r * p.c_row + j];
                        CHECK(r == row || j == col ? isnan(is) || isinf(is) : fabs((double)is) < 100,
                              "%s: poison in (%d, %d), (%d, %d) is %.9g", k->name, (int)row, (int)col, (int)r, (int)j,
                              (double)is);
                    }
            }
    }
}

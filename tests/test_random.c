/* Random numbers: what they are, and that they are the same everywhere. */
#include "test.h"

static tfm_ctx *seeded(uint64_t seed, int threads, const char *isa) {
    tfm_options o;
    tfm_ctx *c;
    memset(&o, 0, sizeof o);
    o.seed = seed;
    o.threads = threads;
    o.isa = isa;
    c = tfm_create(&o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "%s", tfm_error(c));
    return c;
}

/* Philox 4x32-10 as its authors publish it (Salmon et al. 2011), for comparison. */
static void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t x[4], k[2];
    int round;
    memcpy(x, counter, sizeof x);
    memcpy(k, key, sizeof k);
    for (round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * x[0], b = (uint64_t)0xCD9E8D57u * x[2];
        const uint32_t y0 = (uint32_t)(b >> 32) ^ x[1] ^ k[0], y2 = (uint32_t)(a >> 32) ^ x[3] ^ k[1];
        x[0] = y0;
        x[1] = (uint32_t)b;
        x[2] = y2;
        x[3] = (uint32_t)a;
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    memcpy(out, x, sizeof x);
}

/* Word `index` of a stream: what our value number `index` is made of. */
static uint32_t word_of(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t counter[4], key[2], out[4];
    counter[0] = (uint32_t)(index / 4);
    counter[1] = (uint32_t)(index / 4 >> 32);
    counter[2] = (uint32_t)stream;
    counter[3] = (uint32_t)(stream >> 32);
    key[0] = (uint32_t)seed;
    key[1] = (uint32_t)(seed >> 32);
    philox(counter, key, out);
    return out[index % 4];
}

static uint64_t hash_bytes(const void *data, int64_t bytes, uint64_t hash) { /* FNV-1a */
    int64_t i;
    for (i = 0; i < bytes; i++) hash = (hash ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return hash;
}
#define HASH_START 14695981039346656037u

static int64_t many(void) { return test_quick() ? 20000 : 1000000; }

/* -- which numbers ------------------------------------------------------------------------------------------------- */

/* kat_vectors of Random123; our own generator is compared with this one below. */
Test(random, the_reference_is_philox_4x32_10) {
    static const uint32_t known[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
         0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1}};
    int i;
    for (i = 0; i < 3; i++) {
        uint32_t out[4];
        philox(known[i], known[i] + 4, out);
        cr_assert_arr_eq(out, known[i] + 6, sizeof out);
    }
}

/* The n-th op that draws uses stream n; element i is word i of it. */
Test(random, uniform_numbers_are_the_upper_24_bits_of_philox) {
    static const uint64_t seeds[] = {0, 1, 42, UINT64_MAX, 0x0123456789abcdefu};
    int s, draw;
    int64_t i;
    for (s = 0; s < 5; s++) {
        tfm_ctx *c = seeded(seeds[s], 1, NULL);
        for (draw = 0; draw < 3; draw++) {
            const tfm_tensor *x = tfm_uniform(c, TFM_SHAPE(1003), 0, 1);
            assert_made(c, x);
            for (i = 0; i < 1003; i++) {
                const float expected = (float)(word_of(seeds[s], (uint64_t)draw, (uint64_t)i) >> 8) / 16777216.0f;
                cr_assert(((const float *)x->data)[i] == expected, "seed %d, draw %d, element %d", s, draw, (int)i);
            }
        }
        tfm_destroy(c);
    }
}

Test(random, normal_numbers_are_box_and_mullers_of_philox) {
    tfm_ctx *c = seeded(7, 1, NULL);
    const int64_t n = many() / 10;
    const tfm_tensor *x = tfm_randn(c, TFM_SHAPE(n));
    double *expected = (double *)malloc((size_t)n * sizeof *expected);
    int64_t i;
    char text[256];
    assert_made(c, x);
    for (i = 0; i < n; i++) {
        const uint64_t pair = (uint64_t)(i - i % 2);
        const double u = ((double)word_of(7, 0, pair) + 1) / 4294967296.0,
                     turn = (double)word_of(7, 0, pair + 1) / 4294967296.0;
        expected[i] = sqrt(-2 * log(u)) * (i % 2 ? sin(turn * 6.283185307179586477) : cos(turn * 6.283185307179586477));
    }
    cr_assert(test_worst((const float *)x->data, expected, 1, n, 1.2e-7, 1e-14, text, sizeof text), "%s", text);
    free(expected);
    tfm_destroy(c);
}

/* The promise "the same on every platform" is this number. */
Test(random, numbers_are_the_same_on_every_platform) {
    TEST_EACH_ISA(c, 2) { /* seed 42 */
        const tfm_tensor *normal = tfm_randn(c, TFM_SHAPE(100001)), *uniform = tfm_uniform(c, TFM_SHAPE(10001), -2, 3);
        uint64_t hash;
        assert_made(c, normal);
        assert_made(c, uniform);
        hash = hash_bytes(normal->data, 4 * 100001, HASH_START);
        cr_expect(hash == 0x50d949ddfcdb0408u, "normal on %s: %016llx", tfm_isa_name(c), (unsigned long long)hash);
        hash = hash_bytes(uniform->data, 4 * 10001, HASH_START);
        cr_expect(hash == 0x7d9cecafaff6bf8eu, "uniform on %s: %016llx", tfm_isa_name(c), (unsigned long long)hash);
    }
}

Test(random, uniform_needs_finite_bounds) {
    static const float bounds[][2] = {{INFINITY, INFINITY}, {-INFINITY, -INFINITY}, {0, INFINITY}, {-INFINITY, 0},
                                      {NAN, 1}, {0, NAN}, {1, 0}, {-3e38f, 3e38f}};
    tfm_ctx *c = seeded(5, 1, "scalar");
    size_t i;
    for (i = 0; i < sizeof bounds / sizeof bounds[0]; i++)
        assert_refused(c, tfm_uniform(c, TFM_SHAPE(3), bounds[i][0], bounds[i][1]), TFM_INVALID);
    tfm_destroy(c);
}

/* -- independence of how they are asked for ------------------------------------------------------------------------ */

Test(random, numbers_do_not_depend_on_threads_isa_or_shape) {
    static const int counts[] = {1, 2, 3, 7};
    tfm_ctx *first = seeded(5, 1, "scalar");
    const int64_t n = 100003;
    const tfm_tensor *x = tfm_randn(first, TFM_SHAPE(n)), *u = tfm_uniform(first, TFM_SHAPE(n), -1, 1);
    const tfm_tensor *part = NULL;
    int i, isa;
    assert_made(first, x);
    assert_made(first, u);
    for (isa = 0; isa < TEST_ISAS; isa++)
        for (i = 0; i < 4 && tfm_isa_supported(test_isa(isa)); i++) {
            tfm_ctx *c = seeded(5, counts[i], test_isa(isa));
            const tfm_tensor *y = tfm_randn(c, TFM_SHAPE(n)), *v = tfm_uniform(c, TFM_SHAPE(1, n), -1, 1);
            assert_made(c, y);
            assert_made(c, v);
            assert_same_bytes(y->data, x->data, n * 4);
            assert_same_bytes(v->data, u->data, n * 4);
            tfm_destroy(c);
        }
    for (i = 1; i < 9; i++) { /* a shorter draw is the beginning of a longer one */
        tfm_seed(first, 5);
        part = tfm_randn(first, TFM_SHAPE(i, 1000 + i));
        assert_made(first, part);
        assert_same_bytes(part->data, x->data, tfm_numel(part) * 4);
    }
    tfm_destroy(first);
}

/* What else the context does does not matter, only how many draws came before. */
Test(random, numbers_do_not_depend_on_memory_or_other_ops) {
    tfm_ctx *a = seeded(3, 1, NULL), *b = seeded(3, 1, NULL);
    const tfm_tensor *x, *y;
    tfm_marker mark = tfm_mark(b);
    tfm_memory m;
    assert_made(a, tfm_randn(a, TFM_SHAPE(10)));
    x = tfm_randn(a, TFM_SHAPE(500));
    assert_made(b, tfm_randn(b, TFM_SHAPE(9999)));
    tfm_rewind(b, mark);
    assert_made(b, tfm_softmax(b, tfm_ones(b, TFM_SHAPE(30)), 0));
    tfm_measure_begin(b);                        /* draws in a dry run do not count */
    assert_made(b, tfm_randn(b, TFM_SHAPE(100)));
    assert_ok(b, tfm_measure_end(b, &m));
    cr_assert_null(tfm_randn(b, TFM_SHAPE(-1, 3, 0, 0, 0, 0))); /* shape refused */
    tfm_clear(b);
    tfm_seed(b, 3);
    assert_made(b, tfm_uniform(b, TFM_SHAPE(2), 0, 1));
    y = tfm_randn(b, TFM_SHAPE(500));
    assert_made(a, x);
    assert_made(b, y);
    assert_same_bytes(x->data, y->data, 2000);
    tfm_destroy(a);
    tfm_destroy(b);
}

Test(random, seed_starts_again_and_every_seed_is_a_good_one) {
    static const uint64_t seeds[] = {0, 1, 2, 3, UINT64_MAX, UINT64_MAX - 1, (uint64_t)1 << 32, (uint64_t)1 << 63};
    enum { N = 4096, SEEDS = 8 };
    tfm_ctx *c = seeded(0, 1, NULL);
    const float *x[SEEDS];
    int i, j;
    for (i = 0; i < SEEDS; i++) {
        const tfm_tensor *t, *again;
        tfm_seed(c, seeds[i]);
        t = tfm_randn(c, TFM_SHAPE(N));
        assert_made(c, t);
        x[i] = (const float *)t->data;
        again = tfm_randn(c, TFM_SHAPE(N)); /* the next draw is another one */
        assert_made(c, again);
        cr_assert_geq(test_first_difference(again->data, x[i], N * 4), 0);
        tfm_seed(c, seeds[i]);
        again = tfm_randn(c, TFM_SHAPE(N));
        assert_made(c, again);
        assert_same_bytes(again->data, x[i], N * 4);
    }
    for (i = 0; i < SEEDS; i++)
        for (j = 0; j < i; j++) { /* unrelated: correlation within 5 deviations of 0 */
            double sum = 0;
            int k;
            for (k = 0; k < N; k++) sum += (double)x[i][k] * (double)x[j][k];
            cr_assert(fabs(sum / N) < 5 / sqrt((double)N), "seeds %d and %d: correlation %g", i, j, sum / N);
        }
    tfm_destroy(c);
}

/* -- distributions ------------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double uniform_below(double x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
static double normal_below(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }

/* Kolmogorov and Smirnov: the largest distance between what share lies below x and what share should. Beyond 1.95 /
 * sqrt(n) by chance once in a thousand times; the numbers are always the same, so a pass stays one. Sorts x. */
static double kolmogorov(float *x, int64_t n, double (*below)(double)) {
    double worst = 0;
    int64_t i;
    qsort(x, (size_t)n, sizeof *x, ascending);
    for (i = 0; i < n; i++) {
        const double f = below((double)x[i]);
        worst = fmax(worst, fmax(fabs(f - (double)i / (double)n), fabs((double)(i + 1) / (double)n - f)));
    }
    return worst * sqrt((double)n);
}

/* Mean of x[i]^power, and of x[i] x[i + lag]. */
static double moment(const float *x, int64_t n, int power) {
    double sum = 0;
    int64_t i;
    for (i = 0; i < n; i++) sum += pow((double)x[i], power);
    return sum / (double)n;
}

static double lagged(const float *x, int64_t n, int64_t lag, double mean) {
    double sum = 0;
    int64_t i;
    for (i = 0; i + lag < n; i++) sum += ((double)x[i] - mean) * ((double)x[i + lag] - mean);
    return sum / (double)(n - lag);
}

Test(random, normal_numbers_are_normal) {
    tfm_ctx *c = seeded(2026, 1, NULL);
    const int64_t n = many();
    const double sigma = 1 / sqrt((double)n);
    tfm_tensor *t = tfm_randn(c, TFM_SHAPE(n));
    float *x;
    int64_t i, lag;
    double distance;
    assert_made(c, t);
    x = (float *)t->data;
    for (i = 0; i < n; i++) cr_assert(fabs((double)x[i]) < 6.7);
    /* each moment within 5 of its own deviations: those of x^k are sqrt of the double factorials below */
    cr_expect_float_eq(moment(x, n, 1), 0, 5 * sigma);
    cr_expect_float_eq(moment(x, n, 2), 1, 5 * sigma * sqrt(2.0));
    cr_expect_float_eq(moment(x, n, 3), 0, 5 * sigma * sqrt(15.0));
    cr_expect_float_eq(moment(x, n, 4), 3, 5 * sigma * sqrt(96.0));
    for (lag = 1; lag < 9; lag++) cr_expect_float_eq(lagged(x, n, lag, 0), 0, 5 * sigma);
    distance = kolmogorov(x, n, normal_below);
    cr_expect_lt(distance, 1.95, "distance %g", distance);
    tfm_destroy(c);
}

Test(random, uniform_numbers_are_uniform) {
    tfm_ctx *c = seeded(2027, 1, NULL);
    const int64_t n = many();
    const double sigma = 1 / sqrt((double)n);
    tfm_tensor *t = tfm_uniform(c, TFM_SHAPE(n), 0, 1);
    int64_t bin[256] = {0}, i, lag;
    double chi = 0, distance;
    float *x;
    assert_made(c, t);
    x = (float *)t->data;
    for (i = 0; i < n; i++) {
        cr_assert(x[i] >= 0 && x[i] < 1);
        bin[(int)(x[i] * 256)]++;
    }
    for (i = 0; i < 256; i++) chi += pow((double)bin[i] - (double)n / 256, 2) / ((double)n / 256);
    cr_expect(chi > 160 && chi < 370, "chi square of 256 bins is %g", chi); /* 255 +- 5 deviations of 22.6 */
    cr_expect_float_eq(moment(x, n, 1), 0.5, 5 * sigma * sqrt(1.0 / 12));
    cr_expect_float_eq(moment(x, n, 2), 1.0 / 3, 5 * sigma * sqrt(4.0 / 45));
    for (lag = 1; lag < 9; lag++) cr_expect_float_eq(lagged(x, n, lag, 0.5), 0, 5 * sigma / 12);
    distance = kolmogorov(x, n, uniform_below);
    cr_expect_lt(distance, 1.95, "distance %g", distance);
    tfm_destroy(c);
}

Test(random, uniform_keeps_its_range) {
    static const float range[][2] = {{0, 1},           {-1, 1}, {1, 1.0000001f}, {-3e38f, 3e37f},
                                     {1e-40f, 3e-40f}, {5, 5},  {-0.0f, 1e-45f}};
    tfm_ctx *c = seeded(11, 1, NULL);
    int i;
    int64_t j;
    for (i = 0; i < (int)(sizeof range / sizeof range[0]); i++) {
        const tfm_tensor *t = tfm_uniform(c, TFM_SHAPE(5000), range[i][0], range[i][1]);
        assert_made(c, t);
        for (j = 0; j < 5000; j++) {
            const float x = ((const float *)t->data)[j];
            cr_assert(x >= range[i][0] && (x < range[i][1] || range[i][0] == range[i][1]), "range %d gives %.9g", i,
                      (double)x);
        }
    }
    assert_refused(c, tfm_uniform(c, TFM_SHAPE(2), 1, 0), TFM_INVALID);
    assert_refused(c, tfm_uniform(c, TFM_SHAPE(2), 0, (float)HUGE_VAL), TFM_INVALID);
    assert_refused(c, tfm_uniform(c, TFM_SHAPE(2), (float)NAN, 1), TFM_INVALID);
    tfm_destroy(c);
}

/* -- dropout, which draws too -------------------------------------------------------------------------------------- */

Test(random, dropout_drops_its_share_and_scales_the_rest) {
    static const float shares[] = {0.1f, 0.5f, 0.9f};
    const int64_t n = many() / 5;
    int s;
    for (s = 0; s < 3; s++) {
        const float p = shares[s], kept = 1.0f / (1.0f - p);
        tfm_ctx *c = seeded(8, 1, NULL), *other = seeded(8, 3, NULL);
        const tfm_tensor *x = tfm_dropout(c, tfm_ones(c, TFM_SHAPE(n)), p),
                         *y = tfm_dropout(other, tfm_ones(other, TFM_SHAPE(n)), p);
        int64_t i, zeros = 0;
        assert_made(c, x);
        assert_made(other, y);
        assert_same_bytes(x->data, y->data, n * 4);
        for (i = 0; i < n; i++) {
            const float v = ((const float *)x->data)[i];
            zeros += v == 0;
            cr_assert(v == 0 || v == kept, "%.9g", (double)v);
        }
        cr_assert_float_eq((double)zeros / (double)n, p, 5 * sqrt((double)p * (1 - (double)p) / (double)n));
        tfm_destroy(c);
        tfm_destroy(other);
    }
}

/* Initial weights are part of "the same on every platform": a model made from a seed is one model. */
Test(random, a_model_made_from_a_seed_is_the_same_everywhere) {
    tfm_transformer_config g;
    memset(&g, 0, sizeof g);
    g.encoder_layers = g.decoder_layers = 1;
    g.source_vocab = g.target_vocab = 11;
    g.block.d_model = 16;
    g.block.heads = 2;
    g.block.d_ff = 24;
    TEST_EACH_ISA(c, 2) {
        tfm_params *p = tfm_params_create(c);
        tfm_transformer model;
        uint64_t hash = HASH_START;
        int64_t i;
        assert_ok(c, tfm_transformer_init(c, p, "", &g, &model));
        for (i = 0; i < tfm_params_count(p); i++) {
            const tfm_tensor *t = tfm_params_at(p, i);
            hash = hash_bytes(t->data, tfm_numel(t) * 4,
                              hash_bytes(tfm_params_name(p, i), (int64_t)strlen(tfm_params_name(p, i)), hash));
        }
        cr_expect(hash == 0xa26e8778a7ac1d74u, "%s: %016llx", tfm_isa_name(c), (unsigned long long)hash);
        tfm_params_destroy(p);
    }
}

/* Masks: every kind as a matrix, what is refused, and where attention must agree with the matrix. */
#include "reference_attention.h"

static tfm_mask no_mask(void) {
    tfm_mask m;
    memset(&m, 0, sizeof m);
    return m;
}

/* tfm_mask_matrix against the words of the manual. */
static void check_matrix(tfm_ctx *c, const tfm_mask *m, int64_t B, int64_t H, int64_t Lq, int64_t Lk,
                         const char *what) {
    tfm_tensor *t = tfm_mask_matrix(c, m, B, H, Lq, Lk);
    double *expected = (double *) malloc((size_t) (B * H * Lq * Lk + 1) * sizeof(double));
    float *actual;
    char text[256];
    int64_t b, h, i, j, n = 0;
    cr_assert(t != NULL, "%s: %s", what, tfm_error(c));
    for (b = 0; b < B; b++)
        for (h = 0; h < H; h++)
            for (i = 0; i < Lq; i++)
                for (j = 0; j < Lk; j++, n++)
                    if (!reference_mask(m, Lq, Lk, b, h, i, j, &expected[n])) expected[n] = -HUGE_VAL;
    actual = test_floats(c, t);
    cr_assert(test_worst(actual, expected, 1, n, 1e-6, 1e-6, text, sizeof text), "%s: %s", what, text);
    free(actual);
    free(expected);
}

/* "1101" rows of 1 = attend. */
static void check_rows(tfm_ctx *c, const tfm_mask *m, int64_t Lq, int64_t Lk, const char *rows) {
    tfm_tensor *t = tfm_mask_matrix(c, m, 1, 1, Lq, Lk);
    int64_t i;
    assert_made(c, t);
    for (i = 0; i < Lq * Lk; i++) {
        const float x = ((float *) t->data)[i];
        cr_assert(x == (rows[i] == '1' ? 0.0f : -(float) HUGE_VAL), "row %d key %d is %g, expected %c", (int) (i / Lk),
                  (int) (i % Lk), (double) x, rows[i]);
    }
}

Test(masks, each_kind_reads_as_the_manual_says) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_mask m = tfm_mask_causal();
    check_rows(c, &m, 3, 4, "1000" "1100" "1110");
    m.causal = TFM_CAUSAL_BOTTOM_RIGHT;
    check_rows(c, &m, 3, 4, "1100" "1110" "1111");
    check_rows(c, &m, 4, 2, "00" "00" "10" "11");
    m.causal = TFM_CAUSAL_OFFSET;
    m.offset = 2;
    check_rows(c, &m, 2, 4, "1110" "1111");
    m.offset = -1;
    check_rows(c, &m, 3, 3, "000" "100" "110");
    m = tfm_mask_causal();
    m.window_left = 2;
    check_rows(c, &m, 4, 4, "1000" "1100" "0110" "0011");
    m = no_mask();
    m.window_left = 1;
    m.window_right = 2;
    check_rows(c, &m, 4, 4, "1100" "0110" "0011" "0001");
    m = tfm_mask_causal();
    m.prefix = 2;
    check_rows(c, &m, 4, 4, "1100" "1100" "1110" "1111");
    m.window_left = 2; /* the prefix does not reach behind the window */
    check_rows(c, &m, 4, 4, "1100" "1100" "0110" "0011");
    tfm_destroy(c);
}

Test(masks, lengths_segments_and_matrices_cut_keys_out) {
    static const int64_t two = 2, three = 3, qs[3] = {7, 7, 8}, ks[4] = {7, 8, 8, 9};
    static const unsigned char bytes[4] = {1, 0, 200, 1}; /* any byte but 0 is true */
    static const float bias[4] = {0, -1.0f / 0.0f, 0, 0};
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *t = tfm_wrap(c, TFM_BOOL, TFM_SHAPE(4), (void *) (uintptr_t) bytes), *relative;
    tfm_mask m = tfm_mask_padding(reference_ids(c, 1, &two));
    check_rows(c, &m, 2, 4, "1100" "1100");
    m = no_mask();
    m.query_lengths = reference_ids(c, 1, &two);
    check_rows(c, &m, 3, 2, "11" "11" "00");
    m.key_lengths = reference_ids(c, 1, &three);
    m.causal = TFM_CAUSAL_BOTTOM_RIGHT; /* the last real query sees the last real key */
    check_rows(c, &m, 3, 4, "1100" "1110" "0000");
    m = no_mask();
    m.query_segments = tfm_from(c, TFM_I64, TFM_SHAPE(1, 3), qs);
    m.key_segments = tfm_from(c, TFM_I64, TFM_SHAPE(1, 4), ks);
    check_rows(c, &m, 3, 4, "1000" "1000" "0110");
    m = tfm_mask_keep(t);
    check_rows(c, &m, 2, 4, "1011" "1011");
    m = tfm_mask_ignore(t);
    check_rows(c, &m, 2, 4, "0100" "0100");
    m = tfm_mask_nonzero(t);
    check_rows(c, &m, 1, 4, "1011");
    m = tfm_mask_additive(tfm_from(c, TFM_F32, TFM_SHAPE(4), bias));
    check_rows(c, &m, 2, 4, "1011" "1011");
    m.relative_bias = relative = tfm_zeros(c, TFM_SHAPE(32, 1));
    assert_made(c, relative);
    ((float *) relative->data)[tfm_relative_bucket(1, 32, 128, 0)] = (float) NAN;
    check_rows(c, &m, 1, 4, "1011"); /* -inf takes key 1 out, whatever else is added there */
    m.ignore = t;
    check_rows(c, &m, 1, 4, "0000");
    tfm_destroy(c);
}

Test(masks, additive_parts_are_summed) {
    TEST_EACH_ISA(c, 2) {
        const int64_t B = 2, H = 6, Lq = 50, Lk = 300;
        tfm_mask m = no_mask();
        m.alibi_slopes = tfm_alibi_slopes(c, H);
        check_matrix(c, &m, B, H, Lq, Lk, "alibi");
        m.causal = TFM_CAUSAL_OFFSET;
        m.offset = 100;
        check_matrix(c, &m, B, H, Lq, Lk, "alibi at an offset");
        m.relative_bias = reference_random(c, TFM_SHAPE(32, H), 5);
        check_matrix(c, &m, B, H, Lq, Lk, "and a relative bias");
        m.relative_one_way = 1;
        m.relative_max_distance = 60;
        check_matrix(c, &m, B, H, Lq, Lk, "one way");
        m.bias = tfm_transpose(c, reference_random(c, TFM_SHAPE(H, Lk, Lq), 6), 1, 2);
        check_matrix(c, &m, B, H, Lq, Lk, "and a bias");
        m = no_mask();
        m.bias = tfm_cast(c, reference_random(c, TFM_SHAPE(B, 1, 1, Lk), 6), TFM_BF16);
        check_matrix(c, &m, B, H, Lq, Lk, "bf16 bias");
        m = no_mask();
        check_matrix(c, &m, 0, H, Lq, Lk, "empty");
        check_matrix(c, &m, B, H, 0, Lk, "empty");
        check_matrix(c, &m, B, H, Lq, 0, "empty");
        cr_assert_not_null(tfm_mask_matrix(c, NULL, 1, 1, 2, 2));
    }
}

/* One implementation serves both: attention with the mask = attention with its matrix as a bias. */
Test(masks, attention_agrees_with_the_matrix_bit_for_bit) {
    TEST_EACH_ISA(c, 2) {
        const int64_t B = 2, H = 4, L = 200, d = 8;
        static const int64_t real[2] = {150, 200};
        tfm_tensor *q = reference_random(c, TFM_SHAPE(B, H, L, d), 1),
            *k = reference_random(c, TFM_SHAPE(B, 2, L, d), 2), *a, *b;
        tfm_attention_options o;
        memset(&o, 0, sizeof o);
        o.mask.causal = TFM_CAUSAL_TOP_LEFT;
        o.mask.window_left = 70;
        o.mask.prefix = 20;
        o.mask.key_lengths = reference_ids(c, B, real);
        o.mask.keep = tfm_compare_scalar(c, reference_random(c, TFM_SHAPE(L, L), 4), -0.8, TFM_GT);
        a = tfm_attention(c, q, k, k, &o);
        assert_made(c, a);
        o.mask = tfm_mask_additive(tfm_mask_matrix(c, &o.mask, B, H, L, L));
        b = tfm_attention(c, q, k, k, &o);
        assert_made(c, b);
        assert_same_bytes(a->data, b->data, tfm_numel(a) * 4);
    }
}

Test(masks, alibi_slopes_are_the_papers) {
    static const double twelve[12] = {-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5}; /* exponents of 2 */
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *t = tfm_alibi_slopes(c, 12);
    int i;
    for (i = 0; i < 12; i++) cr_assert_float_eq(((float *) t->data)[i], exp2(twelve[i]), 1e-7);
    t = tfm_alibi_slopes(c, 16);
    for (i = 0; i < 16; i++) cr_assert_float_eq(((float *) t->data)[i], exp2(-0.5 * (i + 1)), 1e-7);
    t = tfm_alibi_slopes(c, 1);
    cr_assert_float_eq(((float *) t->data)[0], exp2(-8), 1e-9);
    cr_assert_eq(tfm_numel(tfm_alibi_slopes(c, 0)), 0);
    assert_refused(c, tfm_alibi_slopes(c, -1), TFM_INVALID);
    tfm_destroy(c);
}

Test(masks, relative_buckets_are_t5s) {
    /* transformers.T5Attention._relative_position_bucket, bidirectional, 32 buckets, 128 */
    static const int64_t distance[] = {0, 1, -1, 7, 8, -8, 11, 12, 15, 16, 23, 32, 64, 90, 91, 127, 128, -128, 100000};
    static const int64_t bucket[] = {0, 17, 1, 23, 24, 8, 24, 25, 25, 26, 27, 28, 30, 30, 31, 31, 31, 15, 31};
    int64_t d;
    size_t i;
    for (i = 0; i < sizeof distance / sizeof distance[0]; i++)
        cr_assert(tfm_relative_bucket(distance[i], 32, 128, 0) == bucket[i], "distance %d: %d, expected %d",
                  (int) distance[i], (int) tfm_relative_bucket(distance[i], 32, 128, 0), (int) bucket[i]);
    for (d = -3000; d <= 3000; d++) {
        cr_assert_eq(tfm_relative_bucket(d, 32, 128, 0), reference_bucket(d, 32, 128, 0));
        cr_assert_eq(tfm_relative_bucket(d, 32, 128, 1), reference_bucket(d, 32, 128, 1));
        cr_assert_eq(tfm_relative_bucket(d, 64, 1000, 0), reference_bucket(d, 64, 1000, 0));
    }
    cr_assert_eq(tfm_relative_bucket(INT64_MAX, 32, 128, 0), 31);
    cr_assert_eq(tfm_relative_bucket(INT64_MIN, 32, 128, 0), 15);
    cr_assert_eq(tfm_relative_bucket(INT64_MIN, 32, 128, 1), 31);
    cr_assert_eq(tfm_relative_bucket(INT64_MAX, 32, 128, 1), 0);
    cr_assert_eq(tfm_relative_bucket(500, 32, 0, 0), 31); /* 0: 128 */
    cr_assert_eq(tfm_relative_bucket(5, 1, 128, 0), 0);
}

Test(masks, huge_offsets_and_windows_do_not_overflow) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_mask m = no_mask();
    m.causal = TFM_CAUSAL_OFFSET;
    m.offset = (int64_t) 1 << 60;
    m.window_left = INT64_MAX;
    m.window_right = INT64_MAX;
    m.prefix = INT64_MAX;
    check_rows(c, &m, 2, 2, "11" "11");
    m.offset = -m.offset;
    m.prefix = 0;
    check_rows(c, &m, 2, 2, "00" "00");
    m.offset = INT64_MAX;
    assert_refused(c, tfm_mask_matrix(c, &m, 1, 1, 2, 2), TFM_INVALID);
    tfm_destroy(c);
}

/* What a mask needs for each batch row and each head is more than can be counted, though nothing is attended. */
Test(masks, empty_sizes_too_large_to_count_are_out_of_memory) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_mask m = no_mask();
    const int64_t batch = (int64_t) 1 << 59, heads = ((int64_t) 1 << 62) / 131073 + 1;
    tfm_tensor *x = tfm_empty(c, TFM_F16, TFM_SHAPE(batch, 1, 0, 1));
    assert_made(c, x);
    assert_refused(c, tfm_attention(c, x, x, x, NULL), TFM_OOM);
    assert_refused(c, tfm_mask_matrix(c, NULL, (int64_t) 1 << 58, 1, 0, 1), TFM_OOM);
    m.relative_bias = tfm_expand(c, tfm_ones(c, TFM_SHAPE(4, 1)), TFM_SHAPE(4, heads));
    m.relative_max_distance = 65536;
    assert_made(c, m.relative_bias);
    assert_refused(c, tfm_mask_matrix(c, &m, 0, heads, 1, 1), TFM_OOM);
    tfm_destroy(c);
}

/* The error's text contains `words`. */
static void refused(tfm_ctx *c, const tfm_mask *m, const char *words) {
    cr_assert(tfm_mask_matrix(c, m, 2, 3, 4, 5) == NULL, "accepted: %s", words);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    cr_assert(strstr(tfm_error(c), words) != NULL, "\"%s\" is not in \"%s\"", words, tfm_error(c));
    tfm_clear(c);
}

Test(masks, mistakes_are_refused_in_words) {
    static const int64_t lengths[2] = {3, 6}, negative[2] = {-1, 2};
    tfm_ctx *c = tfm_create(NULL);
    tfm_mask m = tfm_mask_keep(tfm_zeros(c, TFM_SHAPE(4, 5)));
    refused(c, &m, "mask.keep is f32: an additive 0 / -inf mask belongs in mask.bias, a 0 / 1 number mask in "
                   "mask.nonzero");
    m = tfm_mask_ignore(tfm_full(c, TFM_I64, TFM_SHAPE(4, 5), 1));
    refused(c, &m, "mask.ignore is i64: an additive");
    m = tfm_mask_additive(tfm_full(c, TFM_BOOL, TFM_SHAPE(4, 5), 1));
    refused(c, &m, "mask.bias is bool: a bool matrix with true = attend belongs in mask.keep");
    m = tfm_mask_additive(tfm_full(c, TFM_I64, TFM_SHAPE(4, 5), 1));
    refused(c, &m, "mask.nonzero");
    m = tfm_mask_keep(tfm_full(c, TFM_BOOL, TFM_SHAPE(2, 4, 5), 1));
    refused(c, &m, "does not broadcast to (batch, heads, queries, keys) = (2, 3, 4, 5)");
    m = tfm_mask_padding(reference_ids(c, 2, lengths));
    refused(c, &m, "mask.key_lengths[1] is 6: expected 0 to 5");
    m = tfm_mask_padding(reference_ids(c, 2, negative));
    refused(c, &m, "mask.key_lengths[0] is -1");
    m = tfm_mask_padding(tfm_zeros(c, TFM_SHAPE(2)));
    refused(c, &m, "expected i64 or i32");
    m = tfm_mask_padding(reference_ids(c, 1, lengths));
    refused(c, &m, "expected (batch) = (2)");
    m = no_mask();
    m.causal = TFM_CAUSAL_OFFSET;
    m.offset = 1;
    m.offsets = reference_ids(c, 2, lengths);
    refused(c, &m, "mask.offset and mask.offsets are both given");
    m.causal = TFM_CAUSAL_TOP_LEFT;
    m.offsets = NULL;
    refused(c, &m, "TFM_CAUSAL_OFFSET");
    m = no_mask();
    m.prefix = 1;
    m.prefixes = reference_ids(c, 2, lengths);
    refused(c, &m, "mask.prefix and mask.prefixes");
    m = no_mask();
    m.key_segments = tfm_full(c, TFM_I64, TFM_SHAPE(2, 5), 0);
    refused(c, &m, "segments come in pairs");
    m = no_mask();
    m.window_left = -1;
    refused(c, &m, "mask.window_left is -1");
    m = no_mask();
    m.softcap = -1;
    refused(c, &m, "mask.softcap");
    m = no_mask();
    m.causal = 7;
    refused(c, &m, "mask.causal is 7");
    m = no_mask();
    m.alibi_slopes = tfm_zeros(c, TFM_SHAPE(2));
    refused(c, &m, "expected (heads) = (3)");
    m = no_mask();
    m.relative_bias = tfm_zeros(c, TFM_SHAPE(32, 2));
    refused(c, &m, "expected (buckets, heads) = (32, 3)");
    m.relative_bias = tfm_zeros(c, TFM_SHAPE(600, 3));
    refused(c, &m, "600 buckets");
    m = no_mask();
    cr_assert(tfm_mask_matrix(c, &m, -1, 1, 1, 1) == NULL);
    tfm_destroy(c);
}

Test(masks, nothing_is_read_when_memory_is_measured) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_memory memory;
    tfm_mask m = no_mask();
    tfm_measure_begin(c);
    m.key_lengths = tfm_full(c, TFM_I64, TFM_SHAPE(2), 99);
    m.keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(4, 5), 1);
    m.relative_bias = tfm_zeros(c, TFM_SHAPE(32, 3));
    assert_made(c, tfm_mask_matrix(c, &m, 2, 3, 4, 5));
    assert_ok(c, tfm_measure_end(c, &memory));
    cr_assert(memory.arena_peak >= 2 * 3 * 4 * 5 * 4);
    tfm_destroy(c);
}

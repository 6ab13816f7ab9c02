/* Attention: what it computes (against double precision), and what its bits may depend on (nothing but the numbers). */
#include "reference_attention.h"

/* Compares with the reference; tolerance by the result's dtype. */
static void check(tfm_ctx *c, const tfm_tensor *q, const tfm_tensor *k, const tfm_tensor *v, tfm_attention_options *o,
                  const char *what) {
    const int64_t B = q->shape[0], H = q->shape[1], Lq = q->shape[2], Lk = k->shape[2], dv = v->shape[3];
    const int64_t n = B * H * Lq * dv, m = B * H * Lq * Lk;
    double *expected = (double *) malloc((size_t) (n + 1) * sizeof(double)), *we = NULL;
    tfm_tensor *weights = NULL, *y;
    float *actual;
    char text[256];
    double rtol;
    if (o->weights) {
        o->weights = &weights;
        we = (double *) malloc((size_t) (m + 1) * sizeof(double));
    }
    y = tfm_attention(c, q, k, v, o);
    cr_assert(y != NULL, "%s: %s", what, tfm_error(c));
    reference_attention(q, k, v, o, expected, we);
    cr_assert_eq(tfm_numel(y), n);
    rtol = y->dtype == TFM_F32 ? 2e-5 : y->dtype == TFM_F16 ? 1e-3 : 8e-3;
    actual = test_floats(c, y);
    cr_assert(actual != NULL, "%s", tfm_error(c));
    cr_assert(test_worst(actual, expected, 1, n, rtol, rtol / 4, text, sizeof text), "%s: %s", what, text);
    free(actual);
    if (we) {
        actual = test_floats(c, weights);
        cr_assert(test_worst(actual, we, 1, m, 2e-5, 3e-6, text, sizeof text), "%s: weights: %s", what, text);
        free(actual);
        o->weights = &weights;
    }
    free(expected);
    free(we);
}

/* (B, H, L, d) laid out in one of several ways, one of three dtypes. */
static tfm_tensor *operand(tfm_ctx *c, uint64_t *seed, int64_t B, int64_t H, int64_t L, int64_t d, int dtype) {
    tfm_tensor *t;
    const uint64_t numbers = *seed += 12345;
    switch (reference_pick(seed, 0, 3)) {
    case 0: t = reference_random(c, TFM_SHAPE(B, H, L, d), numbers); break;
    case 1: t = tfm_transpose(c, reference_random(c, TFM_SHAPE(B, L, H, d), numbers), 1, 2); break;
    case 2: t = tfm_transpose(c, reference_random(c, TFM_SHAPE(B, H, d, L), numbers), 2, 3); break;
    default: t = tfm_narrow(c, reference_random(c, TFM_SHAPE(B, H, L, d + 3), numbers), 3, 2, d); break;
    }
    if (dtype != TFM_F32) {
        tfm_tensor *copy = tfm_cast(c, t, dtype);
        if (reference_pick(seed, 0, 1)) copy = tfm_transpose(c, tfm_contiguous(c, tfm_transpose(c, copy, 1, 2)), 1, 2);
        t = copy;
    }
    assert_made(c, t);
    return t;
}

static tfm_tensor *lengths(tfm_ctx *c, uint64_t *seed, int64_t B, int64_t low, int64_t high) {
    int64_t value[8] = {0}, b;
    tfm_tensor *t;
    for (b = 0; b < B; b++) value[b] = reference_pick(seed, low, high);
    t = reference_ids(c, B, value);
    return reference_pick(seed, 0, 1) ? tfm_cast(c, t, TFM_I32) : t;
}

/* A random matrix that broadcasts to (B, H, Lq, Lk): dims may be 1 or missing, the memory may be transposed. */
static tfm_tensor *matrix(tfm_ctx *c, uint64_t *seed, int64_t B, int64_t H, int64_t Lq, int64_t Lk) {
    const int64_t b = reference_pick(seed, 0, 1) ? B : 1, h = reference_pick(seed, 0, 1) ? H : 1,
        i = reference_pick(seed, 0, 3) ? Lq : 1;
    const int64_t j = reference_pick(seed, 0, 5) ? Lk : 1;
    *seed += 777;
    switch (reference_pick(seed, 0, 2)) {
    case 0: return reference_random(c, TFM_SHAPE(i, j), *seed);
    case 1: return reference_random(c, TFM_SHAPE(b, h, i, j), *seed);
    default: return tfm_transpose(c, reference_random(c, TFM_SHAPE(b, h, j, i), *seed), 2, 3);
    }
}

static tfm_tensor *segments(tfm_ctx *c, uint64_t *seed, int64_t B, int64_t L) {
    tfm_tensor *t = tfm_empty(c, TFM_I64, TFM_SHAPE(B, L));
    int64_t b, i;
    for (b = 0; b < B; b++) {
        int64_t value = 0;
        for (i = 0; i < L; i++) {
            if (reference_pick(seed, 0, 9) == 0) value++;
            ((int64_t *) t->data)[b * L + i] = value;
        }
    }
    return t;
}

static tfm_mask random_mask(tfm_ctx *c, uint64_t *seed, int64_t B, int64_t H, int64_t Lq, int64_t Lk, char *what) {
    tfm_mask m;
    int parts = (int) reference_pick(seed, 0, 4);
    memset(&m, 0, sizeof m);
    while (parts-- > 0) {
        const int kind = (int) reference_pick(seed, 0, 14);
        sprintf(what + strlen(what), " %d", kind);
        switch (kind) {
        case 0: m.causal = TFM_CAUSAL_TOP_LEFT; m.offset = 0; m.offsets = NULL; break;
        case 1: m.causal = TFM_CAUSAL_BOTTOM_RIGHT; m.offset = 0; m.offsets = NULL; break;
        case 2:
            m.causal = TFM_CAUSAL_OFFSET;
            m.offset = 0;
            m.offsets = NULL;
            if (reference_pick(seed, 0, 1)) m.offset = reference_pick(seed, -Lq, Lk);
            else m.offsets = lengths(c, seed, B, -Lq, Lk);
            break;
        case 3: m.window_left = reference_pick(seed, 1, Lk + 1); break;
        case 4: m.window_right = reference_pick(seed, 1, Lk + 1); break;
        case 5:
            m.prefix = 0;
            m.prefixes = NULL;
            if (reference_pick(seed, 0, 1)) m.prefix = reference_pick(seed, 1, Lk + 1);
            else m.prefixes = lengths(c, seed, B, 0, Lk);
            break;
        case 6: m.key_lengths = lengths(c, seed, B, 0, Lk); break;
        case 7: m.query_lengths = lengths(c, seed, B, 0, Lq); break;
        case 8: m.query_segments = segments(c, seed, B, Lq); m.key_segments = segments(c, seed, B, Lk); break;
        case 9: m.keep = tfm_compare_scalar(c, matrix(c, seed, B, H, Lq, Lk), -0.5, TFM_GT); break;
        case 10: m.ignore = tfm_compare_scalar(c, matrix(c, seed, B, H, Lq, Lk), 0.7, TFM_GT); break;
        case 11: {
            static const int dtype[5] = {TFM_I64, TFM_F32, TFM_U8, TFM_F64, TFM_F16};
            tfm_tensor *t = tfm_compare_scalar(c, matrix(c, seed, B, H, Lq, Lk), -0.3, TFM_GT);
            m.nonzero = tfm_cast(c, t, dtype[reference_pick(seed, 0, 4)]);
            break;
        }
        case 12: {
            tfm_tensor *t = matrix(c, seed, B, H, Lq, Lk);
            if (reference_pick(seed, 0, 1)) t = tfm_masked_fill(c, t, tfm_compare_scalar(c, t, 0.6, TFM_GT), -HUGE_VAL);
            m.bias = reference_pick(seed, 0, 2) ? t : tfm_cast(c, t, TFM_F16);
            break;
        }
        case 13: m.alibi_slopes = tfm_alibi_slopes(c, H); break;
        default:
            *seed += 5;
            m.relative_bias = reference_random(c, TFM_SHAPE(reference_pick(seed, 4, 40), H), *seed);
            m.relative_max_distance = reference_pick(seed, 0, 1) ? 0 : 40;
            m.relative_one_way = (int) reference_pick(seed, 0, 1);
            break;
        }
    }
    if (reference_pick(seed, 0, 3) == 0) m.softcap = 0.7f;
    if (reference_pick(seed, 0, 3) == 0) m.sinks = reference_random(c, TFM_SHAPE(H), *seed += 3);
    return m;
}

Test(attention, every_combination_of_masks_sizes_strides_and_dtypes_is_right) {
    const int rounds = test_quick() ? 40 : 250;
    TEST_EACH_ISA(c, 2) {
        uint64_t seed = 1000;
        int round;
        for (round = 0; round < rounds; round++) {
            static const int dtypes[3] = {TFM_F32, TFM_F16, TFM_BF16};
            const tfm_marker mark = tfm_mark(c);
            const int64_t B = reference_pick(&seed, 1, 3), Hkv = reference_pick(&seed, 1, 3),
                H = Hkv * reference_pick(&seed, 1, 3);
            const int big = reference_pick(&seed, 0, 5) == 0;
            const int64_t Lq = reference_pick(&seed, 1, big ? 120 : 20), Lk = reference_pick(&seed, 1, big ? 400 : 40);
            const int64_t dk = reference_pick(&seed, 1, 40), dv = reference_pick(&seed, 1, 40);
            const int dtype = reference_pick(&seed, 0, 2) ? TFM_F32 : dtypes[reference_pick(&seed, 0, 2)];
            tfm_tensor *q = operand(c, &seed, B, H, Lq, dk, dtype), *k = operand(c, &seed, B, Hkv, Lk, dk, dtype),
                *w = NULL;
            tfm_tensor *v = operand(c, &seed, B, Hkv, Lk, dv, dtype);
            tfm_attention_options o;
            char what[256];
            sprintf(what, "%s round %d: B %d H %d/%d Lq %d Lk %d dk %d dv %d %s, mask", tfm_isa_name(c), round, (int) B,
                    (int) H, (int) Hkv, (int) Lq, (int) Lk, (int) dk, (int) dv, tfm_dtype_name(dtype));
            memset(&o, 0, sizeof o);
            o.mask = random_mask(c, &seed, B, H, Lq, Lk, what);
            if (reference_pick(&seed, 0, 3) == 0) o.scale = test_random(&seed);
            if (reference_pick(&seed, 0, 1)) {
                o.weights = &w;
                o.weights_stage = (int) reference_pick(&seed, 0, 3);
                sprintf(what + strlen(what), ", stage %d", o.weights_stage);
            }
            check(c, q, k, v, &o, what);
            tfm_rewind(c, mark);
        }
    }
}

/* ---- bits ------------------------------------------------------------------------------------------------------ */

static tfm_attention_options plain(void) {
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    return o;
}

typedef struct bits_case {
    int64_t B, H, Hkv, Lq, Lk, d;
    int causal, dtype;
    int64_t window;
} bits_case;

static const bits_case bits_cases[] = {
    {1, 4, 4, 130, 130, 32, TFM_CAUSAL_TOP_LEFT, TFM_F32, 0}, {2, 4, 2, 70, 200, 16, TFM_CAUSAL_NONE, TFM_F32, 0},
    {1, 8, 1, 1, 5000, 24, TFM_CAUSAL_NONE, TFM_F32, 0},
        {3, 2, 2, 3, 4500, 8, TFM_CAUSAL_BOTTOM_RIGHT, TFM_F16, 0},
    {1, 2, 1, 300, 300, 20, TFM_CAUSAL_TOP_LEFT, TFM_BF16, 50},
        {1, 1, 1, 1, 9000, 16, TFM_CAUSAL_BOTTOM_RIGHT, TFM_F32, 3000}
};

static float *bits_run(tfm_ctx *c, const bits_case *x) {
    tfm_attention_options o = plain();
    tfm_tensor *q = tfm_cast(c, reference_random(c, TFM_SHAPE(x->B, x->H, x->Lq, x->d), 1), x->dtype);
    tfm_tensor *k = tfm_cast(c, reference_random(c, TFM_SHAPE(x->B, x->Hkv, x->Lk, x->d), 2), x->dtype);
    tfm_tensor *v = tfm_cast(c, reference_random(c, TFM_SHAPE(x->B, x->Hkv, x->Lk, x->d), 3), x->dtype);
    o.mask.causal = x->causal;
    o.mask.window_left = x->window;
    return test_floats(c, tfm_attention(c, q, k, v, &o));
}

Test(attention, same_bits_on_any_number_of_threads) {
    static const int threads[] = {1, 2, 3, 7};
    int isa, i, t;
    for (isa = 0; isa < TEST_ISAS; isa++)
        for (i = 0; i < (int) (sizeof bits_cases / sizeof bits_cases[0]); i++) {
            const bits_case *x = &bits_cases[i];
            float *first = NULL;
            for (t = 0; t < 4; t++) {
                tfm_ctx *c = test_isa_context(isa, threads[t]);
                float *y;
                if (!c) break;
                y = bits_run(c, x);
                cr_assert(y != NULL, "%s", tfm_error(c));
                if (first) assert_same_bytes(first, y, x->B * x->H * x->Lq * x->d * 4);
                if (first) free(y);
                else first = y;
                tfm_destroy(c);
            }
            free(first);
        }
}

Test(attention, a_row_has_the_bits_of_running_alone) {
    TEST_EACH_ISA(c, 2) {
        const int64_t B = 3, H = 6, Hkv = 2, L = 150, d = 20;
        tfm_tensor *q = reference_random(c, TFM_SHAPE(B, H, L, d), 1),
            *k = reference_random(c, TFM_SHAPE(B, Hkv, L, d), 2);
        tfm_tensor *v = reference_random(c, TFM_SHAPE(B, Hkv, L, d), 3), *y;
        tfm_attention_options o = plain();
        float *all;
        int64_t b, h, i;
        o.mask.causal = TFM_CAUSAL_TOP_LEFT;
        y = tfm_attention(c, q, k, v, &o);
        assert_made(c, y);
        all = test_floats(c, y);
        for (b = 0; b < B; b++)
            for (h = 0; h < H; h += 5)
                for (i = 0; i < L; i += 31) {
                    tfm_tensor *one;
                    float *alone;
                    o.mask.causal = TFM_CAUSAL_OFFSET;
                    o.mask.offset = i;
                    one = tfm_attention(c, tfm_narrow(c, tfm_narrow(c, tfm_narrow(c, q, 0, b, 1), 1, h, 1), 2, i, 1),
                                        tfm_narrow(c, tfm_narrow(c, k, 0, b, 1), 1, h / 3, 1),
                                        tfm_narrow(c, tfm_narrow(c, v, 0, b, 1), 1, h / 3, 1), &o);
                    assert_made(c, one);
                    alone = test_floats(c, one);
                    assert_same_bytes(all + ((b * H + h) * L + i) * d, alone, d * 4);
                    free(alone);
                }
        free(all);
    }
}

/* Up to eight keys go into the product as they lie, more of them or strided ones as panels. */
Test(attention, few_keys_have_the_bits_of_the_same_keys_among_others) {
    static const int64_t sizes[] = {1, 20, 64, 130}, queries[] = {1, 4, 7, 16, 49, 100};
    TEST_EACH_ISA(c, 2) {
        int64_t i, keys;
        for (i = 0; i < 2 * 6 * 4; i += test_quick() ? 5 : 1)
            for (keys = 1; keys <= 8; keys += keys < 7 ? 3 : 1) {
                const int64_t d = sizes[i % 4], L = queries[i / 4 % 6], heads = i / 24 ? 6 : 3, both[] = {keys, keys};
                tfm_marker mark = tfm_mark(c);
                tfm_tensor *q = reference_random(c, TFM_SHAPE(2, heads, L, d), 1);
                tfm_tensor *k = reference_random(c, TFM_SHAPE(2, 3, 12, d), 2);
                tfm_tensor *v = reference_random(c, TFM_SHAPE(2, 3, 12, d), 3), *few = tfm_narrow(c, k, 2, 0, keys);
                tfm_tensor *strided = tfm_contiguous(c, tfm_transpose(c, few, 2, 3)), *y, *z;
                tfm_attention_options o = plain();
                char what[64];
                snprintf(what, sizeof what, "%d x %d queries, %d keys of %d", (int)heads, (int)L, (int)keys, (int)d);
                check(c, q, few, tfm_narrow(c, v, 2, 0, keys), &o, what);
                y = tfm_attention(c, q, few, tfm_narrow(c, v, 2, 0, keys), &o);
                z = tfm_attention(c, q, tfm_transpose(c, strided, 2, 3), tfm_narrow(c, v, 2, 0, keys), &o);
                assert_made(c, y);
                assert_made(c, z);
                assert_same_bytes(y->data, z->data, 2 * heads * L * d * 4);
                o.mask.key_lengths = reference_ids(c, 2, both);
                z = tfm_attention(c, q, k, v, &o);
                assert_made(c, z);
                assert_same_bytes(y->data, z->data, 2 * heads * L * d * 4);
                tfm_rewind(c, mark);
            }
    }
}

/* Sums of the smallest numbers there are: some underflow to -0, and beside longer rows go on to keys of weight 0. */
Test(attention, a_sum_that_underflows_has_the_sign_it_has_alone) {
    TEST_EACH_ISA(c, 1) {
        const int64_t L = 20, V = 21; /* whole vectors and a part of one */
        tfm_tensor *q = tfm_ones(c, TFM_SHAPE(1, 1, L, 4)), *k = tfm_zeros(c, TFM_SHAPE(1, 1, L, 4));
        tfm_tensor *v = tfm_zeros(c, TFM_SHAPE(1, 1, L, V)), *y, *z;
        tfm_attention_options o = plain();
        int64_t i;
        for (i = 0; i < 4; i++) ((float *) k->data)[i] = 2.0f;
        for (i = V; i < L * V; i++) ((float *) v->data)[i] = i / V % 2 ? -1e-45f : 1e-45f;
        o.mask.causal = TFM_CAUSAL_TOP_LEFT;
        y = tfm_attention(c, q, k, v, &o);
        assert_made(c, y);
        o.mask.causal = TFM_CAUSAL_OFFSET;
        for (i = 0; i < L; i++) {
            o.mask.offset = i;
            z = tfm_attention(c, tfm_narrow(c, q, 2, i, 1), k, v, &o);
            assert_made(c, z);
            assert_same_bytes((float *) y->data + i * V, z->data, V * 4);
        }
    }
}

Test(attention, asking_for_weights_does_not_change_the_result) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *q = reference_random(c, TFM_SHAPE(2, 4, 60, 16), 1),
            *k = reference_random(c, TFM_SHAPE(2, 2, 300, 16), 2);
        tfm_tensor *v = reference_random(c, TFM_SHAPE(2, 2, 300, 16), 3), *w, *a, *b;
        tfm_attention_options o = plain();
        o.mask.causal = TFM_CAUSAL_BOTTOM_RIGHT;
        a = tfm_attention(c, q, k, v, &o);
        o.weights = &w;
        b = tfm_attention(c, q, k, v, &o);
        assert_made(c, b);
        assert_same_bytes(a->data, b->data, tfm_numel(a) * 4);
        cr_assert_eq(w->shape[3], 300);
        o.weights_average = 1;
        b = tfm_attention(c, q, k, v, &o);
        assert_made(c, b);
        assert_same_bytes(a->data, b->data, tfm_numel(a) * 4);
        cr_assert_eq(w->ndim, 3);
    }
}

Test(attention, averaged_weights_are_the_mean_over_heads) {
    TEST_EACH_ISA(c, 2) {
        tfm_tensor *q = reference_random(c, TFM_SHAPE(2, 4, 50, 8), 1),
            *k = reference_random(c, TFM_SHAPE(2, 2, 140, 8), 2), *w, *m;
        tfm_attention_options o = plain();
        float *x, *y;
        int64_t b, h, i;
        o.weights = &w;
        assert_made(c, tfm_attention(c, q, k, k, &o));
        o.weights = &m;
        o.weights_average = 1;
        assert_made(c, tfm_attention(c, q, k, k, &o));
        x = test_floats(c, w);
        y = test_floats(c, m);
        for (b = 0; b < 2; b++)
            for (i = 0; i < 50 * 140; i++) {
                double mean = 0;
                for (h = 0; h < 4; h++) mean += (double) x[(b * 4 + h) * 50 * 140 + i] / 4;
                cr_assert(fabs(mean - (double) y[b * 50 * 140 + i]) < 1e-6, "%g %g", mean,
                          (double) y[b * 50 * 140 + i]);
            }
        free(x);
        free(y);
    }
}

/* ---- what never happens ---------------------------------------------------------------------------------------- */

Test(attention, row_without_keys_is_zero) {
    TEST_EACH_ISA(c, 1) {
        static const int64_t none[2] = {0, 3};
        tfm_tensor *q = reference_random(c, TFM_SHAPE(2, 1, 2, 4), 1),
            *k = reference_random(c, TFM_SHAPE(2, 1, 5, 4), 2), *w, *y;
        tfm_attention_options o = plain();
        float *x;
        int i;
        o.mask.key_lengths = reference_ids(c, 2, none);
        o.weights = &w;
        y = tfm_attention(c, q, k, k, &o);
        assert_made(c, y);
        x = test_floats(c, y);
        for (i = 0; i < 8; i++) cr_assert(x[i] == 0.0f && x[8 + i] != 0.0f);
        free(x);
        x = test_floats(c, w);
        for (i = 0; i < 10; i++) cr_assert_eq(x[i], 0.0f);
        free(x);
    }
}

Test(attention, scores_of_minus_infinity_only_give_zeros) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *q = tfm_full(c, TFM_F32, TFM_SHAPE(1, 1, 2, 4), 1),
            *k = tfm_full(c, TFM_F32, TFM_SHAPE(1, 1, 130, 4), -HUGE_VAL), *y;
        float *x;
        int i;
        y = tfm_attention(c, q, k, tfm_ones(c, TFM_SHAPE(1, 1, 130, 4)), NULL);
        assert_made(c, y);
        x = test_floats(c, y);
        for (i = 0; i < 8; i++) cr_assert_eq(x[i], 0.0f);
        free(x);
    }
}

Test(attention, a_mask_of_finite_numbers_only_is_an_ordinary_softmax) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *q = reference_random(c, TFM_SHAPE(1, 1, 3, 4), 1),
            *k = reference_random(c, TFM_SHAPE(1, 1, 6, 4), 2);
        tfm_tensor *v = reference_random(c, TFM_SHAPE(1, 1, 6, 4), 3);
        tfm_attention_options o = plain();
        o.mask.bias = tfm_full(c, TFM_F32, TFM_SHAPE(3, 6), -65504);
        { /* the spacing of floats up there is 1 / 128, so this is no longer exact */
            tfm_tensor *y = tfm_attention(c, q, k, v, &o);
            o.mask.bias = NULL;
            assert_tensor_close(c, y, tfm_attention(c, q, k, v, &o), 0, 0.02);
        }
        /* lowest float: every score is rounded to it, so the weights are equal */
        o.mask.bias = tfm_full(c, TFM_F32, TFM_SHAPE(3, 6), -FLT_MAX);
        {
            tfm_tensor *y = tfm_attention(c, q, k, v, &o);
            float *x = test_floats(c, y);
            double mean = 0;
            int j;
            for (j = 0; j < 6; j++) mean += (double) ((float *) v->data)[j * 4] / 6;
            cr_assert_float_eq(x[0], mean, 1e-6);
            free(x);
        }
    }
}

/* NaN and Inf in keys and values that nobody attends, by every kind of mask. */
Test(attention, a_masked_key_never_leaks) {
    TEST_EACH_ISA(c, 2) {
        const int64_t L = 150, d = 12;
        int kind, poison;
        for (kind = 0; kind < 7; kind++)
            for (poison = 0; poison < 3; poison++) {
                const float bad = poison == 0 ? (float) NAN : poison == 1 ? (float) HUGE_VAL : -(float) HUGE_VAL;
                const tfm_marker mark = tfm_mark(c);
                tfm_tensor *q = reference_random(c, TFM_SHAPE(1, 2, L, d), 1),
                    *k = reference_random(c, TFM_SHAPE(1, 2, L, d), 2);
                tfm_tensor *v = reference_random(c, TFM_SHAPE(1, 2, L, d), 3), *pk = tfm_clone(c, k),
                    *pv = tfm_clone(c, v), *bool_keep;
                tfm_attention_options o = plain();
                int64_t length = 140, h, i, j, column[150];
                tfm_tensor *clean, *poisoned, *position;
                for (h = 0; h < 2; h++)
                    for (j = 140; j < L; j++)
                        for (i = 0; i < d; i++) {
                            ((float *) pk->data)[(h * L + j) * d + i] = ((float *) pv->data)[(h * L + j) * d + i] = bad;
                        }
                position = tfm_arange(c, TFM_I64, 0, (double) L, 1);
                bool_keep = tfm_compare_scalar(c, position, 140, TFM_LT);
                for (j = 0; j < L; j++) column[j] = j >= 140;
                switch (kind) {
                case 0: o.mask.key_lengths = reference_ids(c, 1, &length); break;
                case 1: o.mask.keep = bool_keep; break;
                case 2: o.mask.ignore = tfm_compare_scalar(c, position, 140, TFM_GE); break;
                case 3: o.mask.nonzero = tfm_cast(c, bool_keep, TFM_F32); break;
                case 4:
                    o.mask.bias = tfm_masked_fill(c, tfm_zeros(c, TFM_SHAPE(L)),
                                                  tfm_compare_scalar(c, position, 140, TFM_GE), -HUGE_VAL);
                    break;
                case 5:
                    o.mask.causal = TFM_CAUSAL_OFFSET;
                    o.mask.offset = -11; /* the last query sees key 138 */
                    o.mask.softcap = 3;
                    break;
                default:
                    o.mask.key_segments = tfm_from(c, TFM_I64, TFM_SHAPE(1, L), column);
                    memset(column, 0, sizeof column);
                    o.mask.query_segments = tfm_from(c, TFM_I64, TFM_SHAPE(1, L), column);
                    break;
                }
                clean = tfm_attention(c, q, k, v, &o);
                poisoned = tfm_attention(c, q, pk, pv, &o);
                assert_made(c, poisoned);
                assert_same_bytes(clean->data, poisoned->data, tfm_numel(clean) * 4);
                tfm_rewind(c, mark);
            }
    }
}

/* By rows: -inf at the ends of a block, between them, over whole blocks; at keys of NaN, too. */
Test(attention, minus_infinity_in_a_bias_has_the_bits_of_a_boolean_mask) {
    TEST_EACH_ISA(c, 2) {
        enum { L = 300, BAD = 60, d = 12 };
        uint64_t seed = 7;
        tfm_tensor *q = reference_random(c, TFM_SHAPE(1, 2, 50, d), 1), *k = reference_random(c, TFM_SHAPE(1, 2, L, d), 2);
        tfm_tensor *v = reference_random(c, TFM_SHAPE(1, 2, L, d), 3), *keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(50, L), 1);
        tfm_tensor *bias;
        int64_t h, i, j, kind;
        assert_made(c, keep);
        for (h = 0; h < 2; h++) {
            ((float *) k->data)[(h * L + BAD) * d + 3] = (float) NAN;
            ((float *) v->data)[(h * L + BAD) * d + 5] = (float) HUGE_VAL;
        }
        for (i = 0; i < 50; i++) {
            const int64_t first = reference_pick(&seed, 0, L - 1), last = reference_pick(&seed, first, L);
            for (j = 0; j < L; j++)
                ((uint8_t *) keep->data)[i * L + j] =
                    j != BAD && (i % 3 == 0 ? j < first || j >= last : i % 3 == 1 ? j % 128 == 5 || j >= 256 : 1);
        }
        bias = tfm_masked_fill(c, tfm_zeros(c, TFM_SHAPE(50, L)), tfm_compare_scalar(c, keep, 0, TFM_EQ), -HUGE_VAL);
        for (kind = 0; kind < 4; kind++) {
            tfm_attention_options o = plain();
            tfm_tensor *y, *z;
            o.mask.keep = keep;
            y = tfm_attention(c, q, k, v, &o);
            assert_made(c, y);
            cr_assert(!isnan(((float *) y->data)[0]));
            o.mask.keep = NULL;
            o.mask.bias = kind < 3 ? tfm_cast(c, bias, kind == 0 ? TFM_F32 : kind == 1 ? TFM_F16 : TFM_BF16)
                                   : tfm_transpose(c, tfm_contiguous(c, tfm_transpose(c, bias, 0, 1)), 0, 1);
            z = tfm_attention(c, q, k, v, &o);
            assert_made(c, z);
            assert_same_bytes(y->data, z->data, 2 * 50 * d * 4);
            o.weights = &y;
            cr_assert(tfm_attention(c, q, k, v, &o) != NULL, "%s", tfm_error(c));
            for (i = 0; i < 2 * 50; i++)
                for (j = 0; j < L; j++)
                    cr_assert(((uint8_t *) keep->data)[i % 50 * L + j] || ((float *) y->data)[i * L + j] == 0.0f);
        }
    }
}

/* Of the first head. Four heads make bands of several tiles, whose first ends before the NaN. */
Test(attention, a_nan_that_only_some_rows_attend_stays_in_those) {
    TEST_EACH_ISA(c, 1) {
        const int64_t H = 4, L = 100, at = 57, d = 8;
        tfm_tensor *q = reference_random(c, TFM_SHAPE(1, H, L, d), 1),
            *k = reference_random(c, TFM_SHAPE(1, H, L, d), 2);
        tfm_tensor *v = reference_random(c, TFM_SHAPE(1, H, L, d), 3), *pv = tfm_clone(c, v), *clean, *poisoned;
        tfm_attention_options o = plain();
        int64_t i, e;
        ((float *) pv->data)[at * d + 3] = (float) NAN;
        o.mask.causal = TFM_CAUSAL_TOP_LEFT;
        clean = tfm_contiguous(c, tfm_attention(c, q, k, v, &o));
        poisoned = tfm_contiguous(c, tfm_attention(c, q, k, pv, &o));
        assert_made(c, poisoned);
        for (i = 0; i < H * L; i++)
            for (e = 0; e < d; e++) {
                const float x = ((float *) clean->data)[i * d + e], y = ((float *) poisoned->data)[i * d + e];
                if (i >= at && i < L && e == 3) cr_assert(isnan(y), "row %d lost the NaN", (int) i);
                else cr_assert(memcmp(&x, &y, 4) == 0, "row %d element %d changed", (int) i, (int) e);
            }
    }
}

Test(attention, empty_sizes_are_legal) {
    static const int64_t sizes[4][4] = {{0, 2, 3, 4}, {1, 2, 0, 4}, {1, 2, 3, 0}, {0, 0, 0, 0}};
    TEST_EACH_ISA(c, 2) {
        int i;
        for (i = 0; i < 4; i++) {
            tfm_tensor *q = tfm_ones(c, TFM_SHAPE(sizes[i][0], sizes[i][1], sizes[i][2], 8)), *w = NULL, *y;
            tfm_tensor *k = tfm_ones(c, TFM_SHAPE(sizes[i][0], sizes[i][1], sizes[i][3], 8));
            tfm_tensor *v = tfm_ones(c, TFM_SHAPE(sizes[i][0], sizes[i][1], sizes[i][3], 5));
            tfm_attention_options o = plain();
            float *x;
            int64_t j;
            o.weights = &w;
            o.mask.causal = TFM_CAUSAL_BOTTOM_RIGHT;
            y = tfm_attention(c, q, k, v, &o);
            assert_made(c, y);
            cr_assert_eq(y->shape[3], 5);
            x = test_floats(c, y);
            for (j = 0; j < tfm_numel(y); j++) cr_assert_eq(x[j], 0.0f);
            free(x);
        }
    }
}

Test(attention, large_heads_work) {
    TEST_EACH_ISA(c, 2) {
        static const int64_t sizes[3][2] = {{1024, 1024}, {2000, 8}, {16, 1500}};
        int i;
        for (i = 0; i < (test_quick() ? 1 : 3); i++) {
            tfm_tensor *q = reference_random(c, TFM_SHAPE(1, 1, 5, sizes[i][0]), 1);
            tfm_tensor *k = reference_random(c, TFM_SHAPE(1, 1, 30, sizes[i][0]), 2);
            tfm_tensor *v = tfm_transpose(c, reference_random(c, TFM_SHAPE(1, 1, sizes[i][1], 30), 3), 2, 3);
            tfm_attention_options o = plain();
            check(c, q, k, v, &o, "large head");
        }
    }
}

Test(attention, result_lies_so_that_heads_combine_without_a_copy) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *q = tfm_randn(c, TFM_SHAPE(2, 3, 5, 4)), *y = tfm_attention(c, q, q, q, NULL),
        *z = tfm_combine_heads(c, y);
    assert_made(c, z);
    cr_assert_eq(y->shape[1], 3);
    cr_assert_eq(y->stride[1], 4);
    cr_assert_eq(y->stride[2], 12);
    cr_assert_eq(z->data, y->data);
    cr_assert_eq(z->shape[2], 12);
    tfm_destroy(c);
}

/* ---- dropout --------------------------------------------------------------------------------------------------- */

Test(attention, dropout_scales_what_it_keeps_and_shows_in_the_weights) {
    TEST_EACH_ISA(c, 2) {
        const int64_t L = 200;
        tfm_tensor *q = reference_random(c, TFM_SHAPE(1, 2, L, 8), 1),
            *k = reference_random(c, TFM_SHAPE(1, 2, L, 8), 2), *w, *p, *y;
        tfm_tensor *v = reference_random(c, TFM_SHAPE(1, 2, L, 8), 3);
        tfm_attention_options o = plain();
        float *x, *full, *out;
        int64_t i, j, e, dropped = 0;
        o.weights = &p;
        assert_made(c, tfm_attention(c, q, k, v, &o));
        full = test_floats(c, p);
        o.weights = &w;
        o.dropout = 0.25f;
        y = tfm_attention(c, q, k, v, &o);
        assert_made(c, y);
        x = test_floats(c, w);
        out = test_floats(c, y);
        for (i = 0; i < 2 * L * L; i++) {
            if (x[i] == 0) dropped++;
            else cr_assert(fabs((double) x[i] - (double) full[i] / 0.75) < 1e-6);
        }
        cr_assert(fabs((double) dropped / (double) (2 * L * L) - 0.25) < 0.01, "%lld dropped", (long long) dropped);
        for (i = 0; i < 2 * L; i++)
            for (e = 0; e < 8; e++) {
                double sum = 0;
                for (j = 0; j < L; j++) {
                    sum += (double) x[i * L + j] * (double) ((float *) v->data)[(i / L * L + j) * 8 + e];
                }
                cr_assert(fabs(sum - (double) out[i * 8 + e]) < 1e-5, "%g %g", sum, (double) out[i * 8 + e]);
            }
        free(x);
        free(full);
        free(out);
        o.dropout = 1;
        y = tfm_attention(c, q, k, v, &o);
        assert_made(c, y);
        out = test_floats(c, y);
        for (i = 0; i < 2 * L * 8; i++) cr_assert_eq(out[i], 0.0f);
        free(out);
    }
}

Test(attention, dropout_keeps_out_what_a_masked_key_holds) {
    TEST_EACH_ISA(c, 1) {
        const int64_t L = 140, rows = 110; /* more tiles than one */
        tfm_tensor *q = reference_random(c, TFM_SHAPE(1, 1, rows, 8), 1), *k = reference_random(c, TFM_SHAPE(1, 1, L, 8), 2);
        tfm_tensor *v = reference_random(c, TFM_SHAPE(1, 1, L, 8), 3), *y[2];
        unsigned char keep[140];
        tfm_attention_options o = plain();
        int64_t i, j;
        for (j = 0; j < L; j++) keep[j] = j % 50 != 3;
        o.mask.keep = tfm_from(c, TFM_BOOL, TFM_SHAPE(1, L), keep);
        o.dropout = 0.3f;
        for (i = 0; i < 2; i++) {
            for (j = 3; j < L; j += 50) ((float *) v->data)[j * 8 + j % 8] = i ? NAN : 1.0f;
            tfm_seed(c, 7);
            y[i] = tfm_attention(c, q, k, v, &o);
            assert_made(c, y[i]);
        }
        assert_same_bytes(y[0]->data, y[1]->data, rows * 8 * 4);
    }
}

Test(attention, dropout_does_not_depend_on_threads) {
    int isa, t;
    for (isa = 0; isa < TEST_ISAS; isa++) {
        float *first = NULL;
        for (t = 1; t < 4; t++) {
            tfm_ctx *c = test_isa_context(isa, t);
            tfm_attention_options o = plain();
            tfm_tensor *q;
            float *y;
            if (!c) break;
            q = reference_random(c, TFM_SHAPE(1, 2, 260, 8), 1);
            o.dropout = 0.5f;
            y = test_floats(c, tfm_attention(c, q, q, q, &o));
            if (first) assert_same_bytes(first, y, 2 * 260 * 8 * 4);
            if (first) free(y);
            else first = y;
            tfm_destroy(c);
        }
        free(first);
    }
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

/* Bytes of the arena that one call takes at its peak. */
static int64_t peak_of(tfm_ctx *c, int64_t Lq, int64_t Lk, int64_t window) {
    const tfm_marker mark = tfm_mark(c);
    tfm_tensor *q = reference_random(c, TFM_SHAPE(1, 2, Lq, 16), 1),
        *k = reference_random(c, TFM_SHAPE(1, 2, Lk, 16), 2);
    tfm_attention_options o = plain();
    int64_t before, bytes;
    o.mask.causal = TFM_CAUSAL_BOTTOM_RIGHT;
    o.mask.window_left = window;
    tfm_memory_reset(c);
    before = tfm_memory_usage(c).arena_used;
    assert_made(c, tfm_attention(c, q, k, k, &o));
    bytes = tfm_memory_usage(c).arena_peak - before - Lq * 2 * 16 * 4;
    tfm_rewind(c, mark);
    return bytes;
}

Test(attention, memory_does_not_depend_on_the_lengths) {
    const int64_t L = test_quick() ? 20000 : 131072;
    TEST_EACH_ISA(c, 2) {
        cr_assert(peak_of(c, 1, L, 0) <= peak_of(c, 1, 20000, 0) + 4096);
        cr_assert(peak_of(c, L, L, 64) < 1 << 16, "%lld", (long long) peak_of(c, L, L, 64));
    }
}

static void allocation_body(tfm_ctx *c, void *user) {
    tfm_tensor *q = tfm_randn(c, TFM_SHAPE(1, 2, 3, 1100)), *k = tfm_randn(c, TFM_SHAPE(1, 2, 4200, 1100)), *w = NULL;
    tfm_attention_options o = plain();
    (void) user;
    o.weights = &w;
    o.mask.alibi_slopes = tfm_alibi_slopes(c, 2);
    o.mask.sinks = tfm_zeros(c, TFM_SHAPE(2));
    (void) tfm_attention(c, q, k, k, &o);
}

static void run_in_turn(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    int i;
    (void) user;
    for (i = 0; i < count; i++) run(arg, i);
}

Test(attention, every_failing_allocation_is_an_error_and_no_leak) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = 2; /* of our own: a pool that cannot be made is no error, but fewer threads */
    o.parallel_for = run_in_turn;
    cr_assert(test_each_allocation_failing(allocation_body, NULL, &o) > 1);
}

Test(attention, measuring_says_what_a_run_takes) {
    TEST_EACH_ISA(c, 2) {
        tfm_memory planned;
        tfm_attention_options o = plain();
        tfm_tensor *q, *w;
        int64_t before;
        int pass;
        o.mask.causal = TFM_CAUSAL_TOP_LEFT;
        o.weights = &w;
        for (pass = 0; pass < 2; pass++) {
            if (pass == 0) tfm_measure_begin(c);
            tfm_memory_reset(c);
            before = tfm_memory_usage(c).arena_used;
            q = tfm_randn(c, TFM_SHAPE(2, 3, 100, 1200));
            o.mask.alibi_slopes = tfm_alibi_slopes(c, 3);
            o.mask.bias = tfm_zeros(c, TFM_SHAPE(100, 100));
            assert_made(c, tfm_attention(c, q, q, q, &o));
            if (pass == 0) assert_ok(c, tfm_measure_end(c, &planned));
        }
        cr_assert_eq(tfm_memory_usage(c).arena_peak - before, planned.arena_peak, "%lld %lld",
                     (long long) (tfm_memory_usage(c).arena_peak - before), (long long) planned.arena_peak);
    }
}

/* ---- errors ---------------------------------------------------------------------------------------------------- */

Test(attention, wrong_shapes_and_options_are_refused_in_words) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *q = tfm_ones(c, TFM_SHAPE(2, 4, 3, 8)), *k = tfm_ones(c, TFM_SHAPE(2, 4, 5, 8)),
        *v = tfm_ones(c, TFM_SHAPE(2, 4, 5, 6));
    tfm_attention_options o = plain();
    assert_refused(c, tfm_attention(c, q, NULL, v, NULL), TFM_INVALID);
    assert_refused(c, tfm_attention(c, q, v, v, NULL), TFM_INVALID);
    assert_refused(c, tfm_attention(c, q, k, tfm_ones(c, TFM_SHAPE(2, 4, 4, 6)), NULL), TFM_INVALID);
    assert_refused(c, tfm_attention(c, tfm_ones(c, TFM_SHAPE(2, 3, 8)), k, v, NULL), TFM_INVALID);
    assert_refused(c, tfm_attention(c, tfm_full(c, TFM_I64, TFM_SHAPE(2, 4, 3, 8), 1), k, v, NULL), TFM_INVALID);
    assert_refused(c, tfm_attention(c, tfm_ones(c, TFM_SHAPE(2, 4, 3, 0)), tfm_ones(c, TFM_SHAPE(2, 4, 5, 0)), v, NULL),
                   TFM_INVALID);
    (void) tfm_attention(c, q, tfm_ones(c, TFM_SHAPE(2, 3, 5, 8)), tfm_ones(c, TFM_SHAPE(2, 3, 5, 6)), NULL);
    cr_assert(strstr(tfm_error(c), "4 query heads are not a multiple of 3 key/value heads") != NULL, "%s",
              tfm_error(c));
    tfm_clear(c);
    o.dropout = 1.5f;
    assert_refused(c, tfm_attention(c, q, k, v, &o), TFM_INVALID);
    o = plain();
    o.scale = (float) NAN;
    assert_refused(c, tfm_attention(c, q, k, v, &o), TFM_INVALID);
    o = plain();
    o.weights_stage = 4;
    assert_refused(c, tfm_attention(c, q, k, v, &o), TFM_INVALID);
    tfm_destroy(c);
}

Test(attention, a_cancel_stops_it) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *q = tfm_ones(c, TFM_SHAPE(1, 1, 3, 8));
    tfm_cancel(c);
    cr_assert_null(tfm_attention(c, q, q, q, NULL));
    cr_assert_eq(tfm_status_of(c), TFM_CANCELLED);
    tfm_clear(c);
    assert_made(c, tfm_attention(c, q, q, q, NULL));
    tfm_destroy(c);
}

/* ---- weighted attention over a sequence ------------------------------------------------------------------------ */

Test(attention, weighted_pool_is_a_softmax_over_the_sequence) {
    TEST_EACH_ISA(c, 1) {
        static const int64_t real[2] = {7, 4};
        const int64_t L = 7, d = 5;
        tfm_tensor *x = reference_random(c, TFM_SHAPE(2, L, d), 1), *weight = reference_random(c, TFM_SHAPE(1, d), 2);
        tfm_tensor *bias = reference_random(c, TFM_SHAPE(1), 3), *n = reference_ids(c, 2, real), *w, *pool, *sequence,
            *w2;
        float *px, *pw, *pp, *ps;
        int64_t b, i, e;
        ((float *) x->data)[(L + 5) * d] = (float) NAN; /* padding of row 1 */
        pool = tfm_weighted_pool(c, x, weight, bias, n, &w);
        assert_made(c, pool);
        sequence = tfm_weighted_sequence(c, x, weight, bias, n, &w2);
        assert_made(c, sequence);
        px = test_floats(c, x);
        pw = test_floats(c, w);
        pp = test_floats(c, pool);
        ps = test_floats(c, sequence);
        for (b = 0; b < 2; b++) {
            double score[7], sum = 0, expected;
            for (i = 0; i < real[b]; i++) {
                score[i] = (double) ((float *) bias->data)[0];
                for (e = 0; e < d; e++) {
                    score[i] += (double) px[(b * L + i) * d + e] * (double) ((float *) weight->data)[e];
                }
                sum += exp(score[i]);
            }
            for (i = 0; i < L; i++) cr_assert_float_eq(pw[b * L + i], i < real[b] ? exp(score[i]) / sum : 0, 1e-6);
            for (e = 0; e < d; e++) {
                for (expected = 0, i = 0; i < L; i++) {
                    const double one = i < real[b] ? exp(score[i]) / sum * (double) px[(b * L + i) * d + e] : 0;
                    cr_assert_float_eq(ps[(b * L + i) * d + e], one, 1e-6);
                    expected += one;
                }
                cr_assert_float_eq(pp[b * d + e], expected, 1e-6);
            }
        }
        free(px);
        free(pw);
        free(pp);
        free(ps);
        assert_made(c, tfm_weighted_pool(c, x, weight, NULL, NULL, NULL));
        assert_refused(c, tfm_weighted_pool(c, x, bias, NULL, NULL, NULL), TFM_INVALID);
    }
}

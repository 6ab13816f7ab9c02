/* The key/value cache: same bits as attention over plain tensors, whatever way the keys came in; and nothing that a
 * hostile buffer or a wrong call can do to it. */
#include "reference_attention.h"

enum { LAYERS = 2, BATCH = 3, HEADS = 2, GROUP = 2, DK = 12 };
static int64_t DV = 10; /* above 64 values lie in panels */
static const int64_t value_sizes[2] = {100, 10};
#define EACH_ISA_AND_SIZE(c, threads) \
    for (int size_ = 0; size_ < 2 && (DV = value_sizes[size_]) > 0; size_++) TEST_EACH_ISA(c, threads)

static tfm_cache_options geometry(int dtype, int64_t capacity) {
    tfm_cache_options o;
    memset(&o, 0, sizeof o);
    o.dtype = dtype;
    o.layers = LAYERS;
    o.batch = BATCH;
    o.heads = HEADS;
    o.key_size = DK;
    o.value_size = DV;
    o.capacity = capacity;
    return o;
}

typedef struct inputs {
    tfm_tensor *q, *k, *v; /* (BATCH, HEADS * GROUP or HEADS, L, ...), of the cache's dtype */
} inputs;

static inputs make_inputs(tfm_ctx *c, int64_t L, int dtype) {
    inputs x;
    x.q = tfm_cast(c, reference_random(c, TFM_SHAPE(BATCH, HEADS * GROUP, L, DK), 1), dtype);
    x.k = tfm_cast(c, tfm_transpose(c, reference_random(c, TFM_SHAPE(BATCH, L, HEADS, DK), 2), 1, 2), dtype);
    x.v = tfm_cast(c, tfm_transpose(c, reference_random(c, TFM_SHAPE(BATCH, L, HEADS, DV), 3), 1, 2), dtype);
    return x;
}

static tfm_attention_options causal(int kind) {
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    o.mask.causal = kind;
    return o;
}

static tfm_tensor *part(tfm_ctx *c, const tfm_tensor *t, int64_t start, int64_t length) {
    return tfm_narrow(c, t, 2, start, length);
}

/* The same numbers, the last dim strided. */
static tfm_tensor *in_columns(tfm_ctx *c, const tfm_tensor *t) {
    return tfm_transpose(c, tfm_contiguous(c, tfm_transpose(c, t, 2, 3)), 2, 3);
}

/* Feeds positions [0, L) in the given pieces and writes all outputs, contiguous (B, H, L, DV). */
static void feed(tfm_ctx *c, tfm_cache *cache, const inputs *x, int64_t L, int64_t piece, float *out) {
    const tfm_attention_options o = causal(TFM_CAUSAL_BOTTOM_RIGHT);
    int64_t at, b, h;
    for (at = 0; at < L; at += piece) {
        const tfm_marker mark = tfm_mark(c);
        const int64_t n = at + piece > L ? L - at : piece;
        const tfm_tensor *y;
        float *part_out;
        assert_ok(c, tfm_cache_append(c, cache, 1, part(c, x->k, at, n), part(c, x->v, at, n), NULL));
        y = tfm_attention_cached(c, part(c, x->q, at, n), cache, 1, &o);
        assert_made(c, y);
        part_out = test_floats(c, y);
        for (b = 0; b < BATCH; b++)
            for (h = 0; h < HEADS * GROUP; h++)
                memcpy(out + ((b * HEADS * GROUP + h) * L + at) * DV, part_out + (b * HEADS * GROUP + h) * n * DV,
                       (size_t) (n * DV) * 4);
        free(part_out);
        tfm_rewind(c, mark);
    }
}

Test(cache, same_bits_whole_in_chunks_token_by_token_and_without_a_cache) {
    static const int dtypes[3] = {TFM_F32, TFM_F16, TFM_BF16};
    static const int64_t pieces[5] = {300, 128, 50, 7, 1};
    const int64_t L = 300;
    float *expected, *got = (float *) malloc((size_t) (BATCH * HEADS * GROUP * L * 100 * 4));
    int d, p;
    EACH_ISA_AND_SIZE(c, 2) {
        const int64_t bytes = BATCH * HEADS * GROUP * L * DV * 4;
        for (d = 0; d < 3; d++) {
            const inputs x = make_inputs(c, L, dtypes[d]);
            const tfm_attention_options o = causal(TFM_CAUSAL_TOP_LEFT);
            const tfm_cache_options g = geometry(dtypes[d], 333);
            expected = test_floats(c, tfm_attention(c, x.q, x.k, x.v, &o));
            cr_assert(expected != NULL, "%s", tfm_error(c));
            for (p = 0; p < (test_quick() ? 3 : 5); p++) {
                tfm_cache *cache = tfm_cache_create(c, &g);
                cr_assert(cache != NULL, "%s", tfm_error(c));
                feed(c, cache, &x, L, pieces[p], got);
                assert_same_bytes(expected, got, bytes);
                cr_assert_eq(tfm_cache_length(cache, 1, 2), L);
                cr_assert_eq(tfm_cache_length(cache, 0, 2), 0);
                tfm_cache_destroy(cache);
            }
            free(expected);
        }
    }
    free(got);
}

/* Keys and values of another dtype and of any strides are rounded to the cache's on the way in. */
Test(cache, what_comes_in_is_cast_and_may_have_any_strides) {
    static const int dtypes[3] = {TFM_F32, TFM_F16, TFM_BF16};
    const int64_t L = 21;
    int from, to;
    EACH_ISA_AND_SIZE(c, 1) {
        for (from = 0; from < 3; from++)
            for (to = 0; to < 3; to++) {
                const tfm_cache_options g = geometry(dtypes[to], L);
                tfm_cache *cache = tfm_cache_create(c, &g);
                const inputs x = make_inputs(c, L, dtypes[from]);
                const tfm_tensor *q = tfm_cast(c, x.q, dtypes[to]), *cached, *expected;
                assert_ok(c, tfm_cache_append(c, cache, 1, in_columns(c, part(c, x.k, 0, 4)),
                                              in_columns(c, part(c, x.v, 0, 4)), NULL));
                assert_ok(c, tfm_cache_append(c, cache, 1, part(c, x.k, 4, L - 4), part(c, x.v, 4, L - 4), NULL));
                cached = tfm_attention_cached(c, q, cache, 1, NULL);
                expected = tfm_attention(c, q, tfm_cast(c, x.k, dtypes[to]), tfm_cast(c, x.v, dtypes[to]), NULL);
                assert_made(c, cached);
                assert_made(c, expected);
                cr_assert_eq(cached->dtype, expected->dtype);
                assert_same_bytes(cached->data, expected->data, tfm_numel(expected) * tfm_dtype_size(expected->dtype));
                tfm_cache_destroy(cache);
            }
    }
}

/* Across a super-block's edge, on several threads: a long prompt and one more query. */
Test(cache, same_bits_far_along_on_any_number_of_threads) {
    static const int threads[] = {1, 2, 7};
    float *first = NULL;
    int t, isa;
    for (isa = 0; isa < TEST_ISAS; isa++, free(first), first = NULL)
        for (t = 0; t < 3; t++) {
            const int64_t L = test_quick() ? 2200 : 4300, n = BATCH * HEADS * GROUP * DV;
            const tfm_attention_options plain = causal(TFM_CAUSAL_BOTTOM_RIGHT);
            tfm_ctx *c = test_isa_context(isa, threads[t]);
            tfm_cache_options g = geometry(TFM_F32, L);
            tfm_cache *cache;
            inputs x;
            float *cached, *uncached;
            if (!c) break;
            x = make_inputs(c, L, TFM_F32);
            cache = tfm_cache_create(c, &g);
            assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, 0, L - 1), part(c, x.v, 0, L - 1), NULL));
            assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, L - 1, 1), part(c, x.v, L - 1, 1), NULL));
            cached = test_floats(c, tfm_attention_cached(c, part(c, x.q, L - 1, 1), cache, 0, &plain));
            uncached = test_floats(c, tfm_attention(c, part(c, x.q, L - 1, 1), x.k, x.v, &plain));
            cr_assert(cached && uncached, "%s", tfm_error(c));
            assert_same_bytes(cached, uncached, n * 4);
            if (first) assert_same_bytes(first, cached, n * 4);
            if (first) free(cached);
            else first = cached;
            free(uncached);
            tfm_cache_destroy(cache);
            tfm_destroy(c);
        }
}

static void fill(tfm_ctx *c, tfm_tensor *t, double value) {
    assert_ok(c, tfm_copy(c, t, tfm_full(c, TFM_F32, tfm_shape_of(t->ndim, t->shape), value)));
}

/* A score of -inf takes its key out, whose value may be NaN; blocks with one go another way than those without. */
Test(cache, same_bits_where_some_scores_are_minus_infinity) {
    static const int64_t out[] = {140, 141, 511, 900};
    EACH_ISA_AND_SIZE(c, 2) {
        const int64_t L = 1100, n = BATCH * HEADS * GROUP * DV;
        const tfm_attention_options o = causal(TFM_CAUSAL_BOTTOM_RIGHT);
        const tfm_cache_options g = geometry(TFM_F32, L);
        tfm_cache *cache = tfm_cache_create(c, &g);
        const inputs x = make_inputs(c, L, TFM_F32);
        tfm_tensor *q = part(c, x.q, L - 1, 1);
        float *cached, *uncached;
        fill(c, tfm_narrow(c, q, 3, 0, 1), 100);
        for (int i = 0; i < 4; i++) {
            tfm_tensor *k = part(c, x.k, out[i], 1);
            fill(c, k, 0);
            fill(c, tfm_narrow(c, k, 3, 0, 1), -3e38);
            fill(c, part(c, x.v, out[i], 1), (double)NAN);
        }
        assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, 0, L - 1), part(c, x.v, 0, L - 1), NULL));
        assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, L - 1, 1), part(c, x.v, L - 1, 1), NULL));
        cached = test_floats(c, tfm_attention_cached(c, q, cache, 0, &o));
        uncached = test_floats(c, tfm_attention(c, q, x.k, x.v, &o));
        cr_assert(cached && uncached, "%s", tfm_error(c));
        assert_same_bytes(cached, uncached, n * 4);
        for (int64_t i = 0; i < n; i++) cr_assert(!isnan(cached[i]), "element %d", (int)i);
        free(cached), free(uncached);
        tfm_cache_destroy(cache);
    }
}

Test(cache, ragged_rows_have_the_bits_of_running_alone) {
    TEST_EACH_ISA(c, 2) {
        static const int64_t counts[2][BATCH] = {{20, 3, 11}, {5, 7, 0}};
        const inputs x = make_inputs(c, 40, TFM_F32);
        const tfm_attention_options o = causal(TFM_CAUSAL_BOTTOM_RIGHT);
        const tfm_cache_options g = geometry(TFM_F32, 64);
        tfm_cache *cache = tfm_cache_create(c, &g);
        int64_t length[BATCH] = {0}, b, h, i;
        int step;
        for (step = 0; step < 2; step++) {
            const int64_t most = step ? 7 : 20;
            tfm_tensor *k = part(c, x.k, step * 20, most), *v = part(c, x.v, step * 20, most),
                *q = part(c, x.q, step * 20, most), *y;
            float *all;
            assert_ok(c, tfm_cache_append(c, cache, 0, k, v, reference_ids(c, BATCH, counts[step])));
            y = tfm_attention_cached(c, q, cache, 0, &o);
            assert_made(c, y);
            all = test_floats(c, y);
            for (b = 0; b < BATCH; b++) {
                tfm_tensor *list[2], *rk, *rv, *one;
                const tfm_attention_options alone = causal(TFM_CAUSAL_BOTTOM_RIGHT);
                float *row;
                const int64_t n = counts[step][b];
                length[b] += n;
                cr_assert_eq(tfm_cache_length(cache, 0, b), length[b]);
                for (h = 0; h < HEADS * GROUP; h++)
                    for (i = n * DV; i < most * DV; i++) {
                        cr_assert_eq(all[(b * HEADS * GROUP + h) * most * DV + i], 0.0f);
                    }
                if (!n) continue;
                list[0] = part(c, tfm_narrow(c, x.k, 0, b, 1), 0, counts[0][b]);
                list[1] = part(c, tfm_narrow(c, x.k, 0, b, 1), 20, step ? n : 0);
                rk = tfm_cat(c, (const tfm_tensor *const *) list, 2, 2);
                list[0] = part(c, tfm_narrow(c, x.v, 0, b, 1), 0, counts[0][b]);
                list[1] = part(c, tfm_narrow(c, x.v, 0, b, 1), 20, step ? n : 0);
                rv = tfm_cat(c, (const tfm_tensor *const *) list, 2, 2);
                one = tfm_attention(c, part(c, tfm_narrow(c, q, 0, b, 1), 0, n), rk, rv, &alone);
                assert_made(c, one);
                row = test_floats(c, one);
                for (h = 0; h < HEADS * GROUP; h++) {
                    assert_same_bytes(all + (b * HEADS * GROUP + h) * most * DV, row + h * n * DV, n * DV * 4);
                }
                free(row);
            }
            free(all);
        }
        tfm_cache_destroy(cache);
    }
}

Test(cache, masks_work_over_a_cache_as_over_tensors) {
    EACH_ISA_AND_SIZE(c, 2) {
        const int64_t L = 150, Lq = 9, hidden = 60; /* a key that nobody sees: its value may be Inf */
        const inputs x = make_inputs(c, L, TFM_F32);
        const tfm_cache_options g = geometry(TFM_F32, L + 20);
        tfm_cache *cache = tfm_cache_create(c, &g);
        tfm_attention_options o = causal(TFM_CAUSAL_BOTTOM_RIGHT);
        tfm_tensor *q = part(c, x.q, L - Lq, Lq), *a, *b, *wa, *wb;
        int64_t i;
        int stage;
        ((float *) x.v->data)[hidden * x.v->stride[2] + (DV - 1) * x.v->stride[3]] = HUGE_VALF;
        assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, 0, L - Lq), part(c, x.v, 0, L - Lq), NULL));
        assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, L - Lq, Lq), part(c, x.v, L - Lq, Lq), NULL));
        o.mask.alibi_slopes = tfm_alibi_slopes(c, HEADS * GROUP);
        o.mask.relative_bias = reference_random(c, TFM_SHAPE(32, HEADS * GROUP), 9);
        o.mask.window_left = 100;
        o.mask.softcap = 2;
        o.mask.sinks = reference_random(c, TFM_SHAPE(HEADS * GROUP), 8);
        o.mask.keep = tfm_compare_scalar(c, reference_random(c, TFM_SHAPE(Lq, L), 4), -0.5, TFM_GT);
        for (i = 0; i < Lq; i++) ((uint8_t *) o.mask.keep->data)[i * L + hidden] = 0;
        for (stage = 0; stage < 4; stage++) {
            o.weights_stage = stage;
            o.weights = &wa;
            a = tfm_attention_cached(c, q, cache, 0, &o);
            assert_made(c, a);
            o.weights = &wb;
            b = tfm_attention(c, q, x.k, x.v, &o);
            assert_made(c, b);
            assert_same_bytes(a->data, b->data, tfm_numel(a) * 4);
            assert_same_bytes(wa->data, wb->data, tfm_numel(wa) * 4);
            for (i = 0; i < tfm_numel(a); i++) cr_assert(isfinite(((float *) a->data)[i]));
        }
        tfm_cache_destroy(cache);
    }
}

/* Scores come before masks: a key that the cache holds has one whether or not a length leaves it out. */
Test(cache, weights_of_every_stage_do_not_end_at_key_lengths) {
    EACH_ISA_AND_SIZE(c, 2) {
        static const int64_t counts[BATCH] = {140, 9, 0}, seen[BATCH] = {70, 9, 0};
        const inputs x = make_inputs(c, 140, TFM_F32);
        const tfm_cache_options g = geometry(TFM_F32, 150);
        tfm_cache *cache = tfm_cache_create(c, &g);
        tfm_attention_options o;
        tfm_tensor *weights[2];
        int64_t b;
        int i;
        memset(&o, 0, sizeof o);
        o.mask.softcap = 2;
        o.mask.key_lengths = reference_ids(c, BATCH, seen);
        assert_ok(c, tfm_cache_append(c, cache, 0, x.k, x.v, reference_ids(c, BATCH, counts)));
        for (o.weights_stage = 0; o.weights_stage < 4; o.weights_stage++) {
            for (i = 0; i < 2; i++) {
                o.weights = &weights[i];
                assert_made(c, i ? tfm_attention(c, x.q, x.k, x.v, &o) : tfm_attention_cached(c, x.q, cache, 0, &o));
            }
            for (b = 0; b < BATCH; b++) {
                tfm_tensor *one[2];
                for (i = 0; i < 2; i++) {
                    one[i] = tfm_narrow(c, tfm_narrow(c, weights[i], 0, b, 1), 3, 0, counts[b]);
                    one[i] = tfm_contiguous(c, one[i]);
                    assert_made(c, one[i]);
                }
                assert_same_bytes(one[0]->data, one[1]->data, tfm_numel(one[0]) * 4);
            }
        }
        tfm_cache_destroy(cache);
    }
}

Test(cache, cross_attention_sees_all_keys_from_any_number_of_queries) {
    TEST_EACH_ISA(c, 1) {
        const inputs x = make_inputs(c, 30, TFM_F32);
        const tfm_cache_options g = geometry(TFM_F32, 30);
        tfm_cache *cache = tfm_cache_create(c, &g);
        tfm_tensor *a, *b;
        assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, 0, 5), part(c, x.v, 0, 5), NULL));
        a = tfm_attention_cached(c, x.q, cache, 0, NULL);
        b = tfm_attention(c, x.q, part(c, x.k, 0, 5), part(c, x.v, 0, 5), NULL);
        assert_made(c, b);
        assert_same_bytes(a->data, b->data, tfm_numel(a) * 4);
        tfm_cache_destroy(cache);
    }
}

/* What a row attends: outputs of one query over the cache, per row. */
static float *look(tfm_ctx *c, const tfm_cache *cache, const tfm_tensor *q) {
    float *y = test_floats(c, tfm_attention_cached(c, q, cache, 1, NULL));
    cr_assert(y != NULL, "%s", tfm_error(c));
    return y;
}

static tfm_cache *filled(tfm_ctx *c, const inputs *x, const int64_t *counts, int64_t capacity, int dtype) {
    const tfm_cache_options g = geometry(dtype, capacity);
    tfm_cache *cache = tfm_cache_create(c, &g);
    int layer;
    for (layer = 0; layer < LAYERS; layer++) {
        assert_ok(c, tfm_cache_append(c, cache, layer, x->k, x->v, reference_ids(c, BATCH, counts)));
    }
    return cache;
}

Test(cache, stale_keys_behind_a_truncation_never_leak) {
    EACH_ISA_AND_SIZE(c, 1) {
        static const int64_t counts[BATCH] = {40, 40, 40};
        inputs x = make_inputs(c, 40, TFM_F32), bad;
        const tfm_tensor *q = part(c, x.q, 0, 1);
        tfm_cache *cache = filled(c, &x, counts, 64, TFM_F32);
        float *clean, *after;
        int64_t row;
        assert_ok(c, tfm_cache_truncate(c, cache, -1, 21));
        clean = look(c, cache, q);
        bad.k = tfm_full(c, TFM_F32, TFM_SHAPE(BATCH, HEADS, 30, DK), (double) NAN);
        bad.v = tfm_full(c, TFM_F32, TFM_SHAPE(BATCH, HEADS, 30, DV), HUGE_VAL);
        assert_ok(c, tfm_cache_append(c, cache, 1, bad.k, bad.v, NULL));
        for (row = 0; row < BATCH; row++) assert_ok(c, tfm_cache_truncate(c, cache, row, 21));
        cr_assert_eq(tfm_cache_length(cache, 1, 0), 21);
        after = look(c, cache, q);
        assert_same_bytes(clean, after, BATCH * HEADS * GROUP * DV * 4);
        free(after);
        assert_ok(c, tfm_cache_truncate(c, cache, 0, 100)); /* longer than it is: nothing */
        cr_assert_eq(tfm_cache_length(cache, 1, 0), 21);
        tfm_cache_reset(cache);
        after = look(c, cache, q);
        for (row = 0; row < BATCH * HEADS * GROUP * DV; row++) cr_assert_eq(after[row], 0.0f);
        free(after);
        free(clean);
        tfm_cache_destroy(cache);
    }
}

Test(cache, slide_drops_the_oldest) {
    static const int64_t slides[4] = {1, 16, 21, 37};
    static const int dtypes[2] = {TFM_F32, TFM_F16};
    static const int64_t some[BATCH] = {40, 30, 12};
    EACH_ISA_AND_SIZE(c, 1) {
        const int64_t times = DV > 64 ? 8 : 1; /* beyond a panel of 128 values */
        const int64_t counts[BATCH] = {times * some[0], times * some[1], times * some[2]};
        int i, d;
        for (d = 0; d < 2; d++)
            for (i = 0; i < 4; i++) {
                const inputs x = make_inputs(c, 40 * times, dtypes[d]);
                tfm_cache *cache = filled(c, &x, counts, 48 * times, dtypes[d]);
                int64_t b;
                float *y;
                assert_ok(c, tfm_cache_slide(c, cache, times * slides[i]));
                y = look(c, cache, part(c, x.q, 0, 1));
                for (b = 0; b < BATCH; b++) {
                    const int64_t n = counts[b] > times * slides[i] ? counts[b] - times * slides[i] : 0;
                    tfm_tensor *one;
                    float *row;
                    cr_assert_eq(tfm_cache_length(cache, 0, b), n);
                    one = tfm_attention(c, tfm_narrow(c, part(c, x.q, 0, 1), 0, b, 1),
                                        part(c, tfm_narrow(c, x.k, 0, b, 1), counts[b] - n, n),
                                            part(c, tfm_narrow(c, x.v, 0, b, 1), counts[b] - n, n), NULL);
                    assert_made(c, one);
                    row = test_floats(c, one);
                    assert_same_bytes(y + b * HEADS * GROUP * DV, row, HEADS * GROUP * DV * 4);
                    free(row);
                }
                free(y);
                tfm_cache_destroy(cache);
            }
    }
}

Test(cache, reorder_moves_repeats_and_swaps_rows) {
    static const int64_t orders[7][BATCH] =
        {{0, 1, 2}, {1, 2, 0}, {2, 0, 1}, {1, 0, 2}, {0, 0, 0}, {1, 1, 0}, {2, 2, 1}};
    static const int64_t counts[BATCH] = {40, 3, 17};
    EACH_ISA_AND_SIZE(c, 1) {
        const inputs x = make_inputs(c, 40, TFM_F32);
        const tfm_tensor *q = tfm_expand(c, tfm_narrow(c, part(c, x.q, 0, 1), 0, 0, 1), TFM_SHAPE(BATCH, -1, -1, -1));
        const int64_t row = HEADS * GROUP * DV;
        int i, b;
        for (i = 0; i < 7; i++) {
            tfm_cache *cache = filled(c, &x, counts, 48, TFM_F32), *fork;
            float *before = look(c, cache, q), *after, *forked;
            fork = tfm_cache_fork(c, cache, orders[i], BATCH);
            cr_assert(fork != NULL, "%s", tfm_error(c));
            assert_ok(c, tfm_cache_reorder(c, cache, orders[i], BATCH));
            after = look(c, cache, q);
            forked = look(c, fork, q);
            for (b = 0; b < BATCH; b++) {
                cr_assert_eq(tfm_cache_length(cache, 0, b), counts[orders[i][b]]);
                assert_same_bytes(before + orders[i][b] * row, after + b * row, row * 4);
                assert_same_bytes(before + orders[i][b] * row, forked + b * row, row * 4);
            }
            free(before);
            free(after);
            free(forked);
            tfm_cache_destroy(cache);
            tfm_cache_destroy(fork);
        }
    }
}

Test(cache, random_reorders_of_many_rows_are_right) {
    tfm_ctx *c = tfm_create(NULL);
    uint64_t seed = 7;
    int round;
    for (round = 0; round < 200; round++) {
        const int64_t batch = reference_pick(&seed, 1, 12);
        tfm_cache_options g;
        tfm_cache *cache;
        tfm_tensor *k, *y;
        int64_t from[12], b;
        const tfm_marker mark = tfm_mark(c);
        memset(&g, 0, sizeof g);
        g.batch = batch;
        g.heads = g.key_size = 1;
        g.capacity = 4;
        cache = tfm_cache_create(c, &g);
        k = tfm_empty(c, TFM_F32, TFM_SHAPE(batch, 1, 1, 1));
        for (b = 0; b < batch; b++) {
            ((float *) k->data)[b] = (float) (b + 1);
            from[b] = reference_pick(&seed, 0, batch - 1);
        }
        assert_ok(c, tfm_cache_append(c, cache, 0, k, k, NULL));
        assert_ok(c, tfm_cache_reorder(c, cache, from, batch));
        y = tfm_attention_cached(c, tfm_ones(c, TFM_SHAPE(batch, 1, 1, 1)), cache, 0, NULL);
        assert_made(c, y);
        for (b = 0; b < batch; b++) cr_assert_eq(((float *) y->data)[b], (float) (from[b] + 1));
        tfm_cache_destroy(cache);
        tfm_rewind(c, mark);
    }
    tfm_destroy(c);
}

Test(cache, a_fork_goes_its_own_way) {
    static const int64_t counts[BATCH] = {5, 5, 5}, rows[4] = {1, 1, 0, 2};
    tfm_ctx *c = tfm_create(NULL);
    const inputs x = make_inputs(c, 5, TFM_F32);
    tfm_cache *cache = filled(c, &x, counts, 8, TFM_F32), *fork = tfm_cache_fork(c, cache, rows, 4);
    assert_ok(c, tfm_cache_truncate(c, fork, -1, 1));
    cr_assert_eq(tfm_cache_length(fork, 1, 3), 1);
    cr_assert_eq(tfm_cache_length(cache, 1, 2), 5);
    assert_refused(c, tfm_cache_fork(c, cache, rows, 0), TFM_INVALID);
    tfm_cache_destroy(cache);
    tfm_cache_destroy(fork);
    tfm_destroy(c);
}

Test(cache, full_is_an_error_that_changes_nothing) {
    static const int64_t counts[BATCH] = {5, 7, 5};
    tfm_ctx *c = tfm_create(NULL);
    const inputs x = make_inputs(c, 7, TFM_F32);
    tfm_cache *cache = filled(c, &x, counts, 8, TFM_F32);
    cr_assert_eq(tfm_cache_append(c, cache, 0, part(c, x.k, 0, 2), part(c, x.v, 0, 2), NULL), TFM_INVALID);
    cr_assert(strstr(tfm_error(c), "row 1 of layer 0 is full: capacity 8, length 7, 2 more wanted") != NULL, "%s",
              tfm_error(c));
    tfm_clear(c);
    cr_assert_eq(tfm_cache_length(cache, 0, 0), 5);
    tfm_cache_destroy(cache);
    tfm_destroy(c);
}

Test(cache, wrong_calls_are_refused) {
    static const int64_t counts[BATCH] = {5, 5, 5}, bad[BATCH] = {0, 3, 1}, more[BATCH] = {6, 0, 0};
    tfm_ctx *c = tfm_create(NULL);
    const inputs x = make_inputs(c, 5, TFM_F32);
    tfm_cache *cache = filled(c, &x, counts, 20, TFM_F32);
    tfm_cache_options g = geometry(TFM_F32, 8);
    tfm_attention_options o = causal(TFM_CAUSAL_NONE);
    tfm_tensor *recorded = tfm_clone(c, x.k);
    assert_ok(c, tfm_set_requires_grad(c, recorded, 1));
    assert_verb_refused(c, tfm_cache_append(c, cache, 0, recorded, x.v, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_append(c, cache, 2, x.k, x.v, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_append(c, NULL, 0, x.k, x.v, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_append(c, cache, 0, x.v, x.k, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_append(c, cache, 0, x.k, x.v, reference_ids(c, BATCH, more)), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_reorder(c, cache, bad, BATCH), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_reorder(c, cache, counts, 2), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_truncate(c, cache, 3, 0), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_truncate(c, cache, 0, -1), TFM_INVALID);
    assert_verb_refused(c, tfm_cache_slide(c, cache, -1), TFM_INVALID);
    assert_refused(c, tfm_attention_cached(c, x.v, cache, 0, NULL), TFM_INVALID);
    assert_refused(c, tfm_attention_cached(c, x.q, NULL, 0, NULL), TFM_INVALID);
    o.mask.key_lengths = reference_ids(c, BATCH, more); /* 6 of 5 */
    assert_refused(c, tfm_attention_cached(c, x.q, cache, 0, &o), TFM_INVALID);
    assert_refused(c, tfm_cache_create(c, NULL), TFM_INVALID);
    g.dtype = TFM_I64;
    assert_refused(c, tfm_cache_create(c, &g), TFM_INVALID);
    cr_assert_eq(tfm_cache_memory(&g), -1);
    g = geometry(TFM_F32, (int64_t) 1 << 61);
    assert_refused(c, tfm_cache_create(c, &g), TFM_INVALID);
    g = geometry(TFM_F32, 100);
    cr_assert(tfm_cache_memory(&g) >= LAYERS * BATCH * HEADS * (112 * DK + 100 * DV) * 4);
    cr_assert_eq(tfm_cache_length(NULL, 0, 0), -1);
    cr_assert_eq(tfm_cache_length(cache, 0, BATCH), -1);
    tfm_cache_destroy(NULL);
    tfm_cache_reset(NULL);
    tfm_cache_destroy(cache);
    tfm_destroy(c);
}

/* ---- save and load --------------------------------------------------------------------------------------------- */

Test(cache, saved_and_loaded_gives_the_same_bits) {
    static const int64_t counts[BATCH] = {40, 0, 17}, one[BATCH] = {1, 0, 0};
    EACH_ISA_AND_SIZE(c, 1) {
        const inputs x = make_inputs(c, 40, TFM_F16);
        tfm_cache *cache = filled(c, &x, counts, 45, TFM_F16), *loaded;
        const int64_t size = tfm_cache_saved_size(cache);
        unsigned char *buffer = (unsigned char *) malloc((size_t) size + 1),
            *again = (unsigned char *) malloc((size_t) size);
        float *a, *b;
        assert_ok(c, tfm_cache_truncate(c, cache, 0, 39));
        cr_assert(tfm_cache_saved_size(cache) < size);
        assert_verb_refused(c, tfm_cache_save(c, cache, buffer, tfm_cache_saved_size(cache) - 1), TFM_INVALID);
        assert_verb_refused(c, tfm_cache_save(c, cache, NULL, size), TFM_INVALID);
        assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, 0, 1), part(c, x.v, 0, 1),
                                      reference_ids(c, BATCH, one)));
        cr_assert(tfm_cache_saved_size(cache) < size);
        assert_ok(c, tfm_cache_save(c, cache, buffer + 1, tfm_cache_saved_size(cache))); /* at any alignment */
        loaded = tfm_cache_load(c, buffer + 1, tfm_cache_saved_size(cache));
        cr_assert(loaded != NULL, "%s", tfm_error(c));
        a = look(c, cache, part(c, x.q, 0, 1));
        b = look(c, loaded, part(c, x.q, 0, 1));
        assert_same_bytes(a, b, BATCH * HEADS * GROUP * DV * 4);
        cr_assert_eq(tfm_cache_capacity(loaded), 45);
        assert_ok(c, tfm_cache_save(c, loaded, again, tfm_cache_saved_size(loaded)));
        assert_same_bytes(buffer + 1, again, tfm_cache_saved_size(cache));
        free(a);
        free(b);
        free(buffer);
        free(again);
        tfm_cache_destroy(cache);
        tfm_cache_destroy(loaded);
    }
}

Test(cache, a_hostile_buffer_is_a_format_error) {
    static const int64_t counts[BATCH] = {4, 0, 2};
    tfm_options options;
    tfm_ctx *c;
    inputs x;
    tfm_cache *cache;
    unsigned char *buffer;
    int64_t size, i, header;
    uint64_t seed = 3;
    memset(&options, 0, sizeof options);
    options.threads = 1;
    options.memory_limit = 64 << 20;
    c = tfm_create(&options);
    x = make_inputs(c, 4, TFM_F32);
    cache = filled(c, &x, counts, 5, TFM_F32);
    size = tfm_cache_saved_size(cache);
    header = 72 + 16 * LAYERS * BATCH;
    buffer = (unsigned char *) malloc((size_t) size);
    for (i = 0; i < size; i += i < header ? 1 : 97) { /* cut off anywhere: at a guard page */
        test_guarded g = test_guard((size_t) i);
        assert_ok(c, tfm_cache_save(c, cache, buffer, size));
        memcpy(g.data, buffer, (size_t) i);
        assert_refused(c, tfm_cache_load(c, g.data, i), TFM_FORMAT);
        test_unguard(g);
    }
    for (i = 0; i < header * 6; i++) { /* any byte of the numbers changed: refused, or a cache that works */
        const int64_t at = i / 6;
        static const unsigned char bytes[5] = {0, 1, 127, 128, 255};
        tfm_cache *loaded;
        assert_ok(c, tfm_cache_save(c, cache, buffer, size));
        buffer[at] = i % 6 < 5 ? bytes[i % 6] : (unsigned char) reference_pick(&seed, 0, 255);
        loaded = tfm_cache_load(c, buffer, size);
        if (!loaded) {
            cr_assert(tfm_status_of(c) == TFM_FORMAT || tfm_status_of(c) == TFM_OOM, "%s", tfm_error(c));
            tfm_clear(c);
            continue;
        }
        if (tfm_cache_length(loaded, 1, BATCH - 1) >= 0) {
            tfm_tensor *q = tfm_narrow(c, x.q, 2, 0, 1);
            if (!tfm_attention_cached(c, q, loaded, 0, NULL)) tfm_clear(c);
        }
        tfm_cache_destroy(loaded);
    }
    assert_refused(c, tfm_cache_load(c, NULL, 100), TFM_FORMAT);
    free(buffer);
    tfm_cache_destroy(cache);
    tfm_destroy(c);
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static void allocation_body(tfm_ctx *c, void *user) {
    const tfm_cache_options g = geometry(TFM_F32, 8);
    static const int64_t rows[BATCH] = {1, 0, 0};
    tfm_cache *cache = tfm_cache_create(c, &g), *fork;
    tfm_tensor *k = tfm_ones(c, TFM_SHAPE(BATCH, HEADS, 3, DK)), *v = tfm_ones(c, TFM_SHAPE(BATCH, HEADS, 3, DV));
    (void) user;
    if (cache && tfm_cache_append(c, cache, 0, k, v, NULL) == TFM_OK) (void) tfm_attention_cached(c, k, cache, 0, NULL);
    if (cache && tfm_cache_reorder(c, cache, rows, BATCH) != TFM_OK) {
        tfm_cache_destroy(cache);
        return;
    }
    fork = cache ? tfm_cache_fork(c, cache, rows, BATCH) : NULL;
    tfm_cache_destroy(fork);
    tfm_cache_destroy(cache);
}

Test(cache, every_failing_allocation_is_an_error_and_no_leak) {
    cr_assert(test_each_allocation_failing(allocation_body, NULL, NULL) > 3);
}

/* The bytes of a measured cache say its sizes and lengths, with zeros for what is not there. */
Test(cache, saving_and_loading_can_be_measured) {
    tfm_options options;
    tfm_cache_options o;
    tfm_cache *cache, *back;
    tfm_ctx *c;
    tfm_memory memory;
    tfm_tensor *k;
    int64_t size;
    char *buffer;
    memset(&options, 0, sizeof options);
    options.threads = 1;
    c = tfm_create(&options);
    memset(&o, 0, sizeof o);
    o.heads = 1;
    o.key_size = 8;
    o.capacity = 16;
    tfm_measure_begin(c);
    cache = tfm_cache_create(c, &o);
    k = tfm_ones(c, TFM_SHAPE(1, 1, 2, 8));
    assert_made(c, cache);
    assert_ok(c, tfm_cache_append(c, cache, 0, k, k, NULL));
    size = tfm_cache_saved_size(cache);
    buffer = (char *)malloc((size_t)size);
    memset(buffer, 0x55, (size_t)size);
    assert_ok(c, tfm_cache_save(c, cache, buffer, size));
    back = tfm_cache_load(c, buffer, size);
    assert_made(c, back);
    cr_assert_eq(tfm_cache_length(back, 0, 0), 2);
    cr_assert_eq(tfm_cache_capacity(back), 16);
    cr_assert_eq(buffer[size - 1], 0);
    assert_ok(c, tfm_measure_end(c, &memory));
    free(buffer);
    tfm_cache_destroy(cache);
    tfm_cache_destroy(back);
    tfm_destroy(c);
}

Test(cache, measuring_a_save_of_a_real_cache_saves_what_it_holds) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_cache_options o;
    tfm_cache *cache;
    tfm_memory memory;
    tfm_tensor *k = tfm_ones(c, TFM_SHAPE(1, 1, 2, 8));
    int64_t size, round;
    char *saved[2];
    memset(&o, 0, sizeof o);
    o.heads = 1;
    o.key_size = 8;
    o.capacity = 16;
    cache = tfm_cache_create(c, &o);
    assert_made(c, cache);
    assert_ok(c, tfm_cache_append(c, cache, 0, k, k, NULL));
    size = tfm_cache_saved_size(cache);
    for (round = 0; round < 2; round++) {
        saved[round] = (char *)malloc((size_t)size);
        if (round) tfm_measure_begin(c);
        assert_ok(c, tfm_cache_save(c, cache, saved[round], size));
        if (round) assert_ok(c, tfm_measure_end(c, &memory));
    }
    assert_same_bytes(saved[0], saved[1], size);
    free(saved[0]);
    free(saved[1]);
    tfm_cache_destroy(cache);
    tfm_destroy(c);
}

Test(cache, it_can_be_measured_before_it_is_made) {
    tfm_ctx *c = tfm_create(NULL);
    const tfm_cache_options g = geometry(TFM_F32, 100000);
    tfm_memory memory;
    tfm_cache *cache;
    tfm_tensor *k, *v, *q, *y;
    const tfm_attention_options o = causal(TFM_CAUSAL_BOTTOM_RIGHT);
    tfm_measure_begin(c);
    cache = tfm_cache_create(c, &g);
    k = tfm_ones(c, TFM_SHAPE(BATCH, HEADS, 3, DK));
    v = tfm_ones(c, TFM_SHAPE(BATCH, HEADS, 3, DV));
    q = tfm_ones(c, TFM_SHAPE(BATCH, HEADS, 3, DK));
    assert_ok(c, tfm_cache_append(c, cache, 0, k, v, NULL));
    cr_assert_eq(tfm_cache_length(cache, 0, 0), 3);
    y = tfm_attention_cached(c, q, cache, 0, &o);
    assert_made(c, y);
    assert_ok(c, tfm_measure_end(c, &memory));
    cr_assert(memory.held_peak >= LAYERS * BATCH * HEADS * 100000ll * (DK + DV) * 4, "%lld",
              (long long) memory.held_peak);
    assert_verb_refused(c, tfm_cache_truncate(c, cache, 0, 0), TFM_INVALID); /* it holds nothing outside */
    tfm_cache_destroy(cache);
    tfm_destroy(c);
}

/* A measurement sees the keys that the calls in it would see: those held, and those it appended itself. */
Test(cache, a_measurement_over_a_real_cache_counts_the_keys_that_a_run_sees) {
    tfm_ctx *c = tfm_create(NULL);
    const tfm_cache_options g = geometry(TFM_F32, 32);
    const inputs x = make_inputs(c, 10, TFM_F32);
    tfm_cache *cache = tfm_cache_create(c, &g);
    tfm_tensor *w;
    tfm_attention_options o;
    int dry, step;
    int64_t layer;
    memset(&o, 0, sizeof o);
    o.weights = &w;
    assert_made(c, cache);
    assert_ok(c, tfm_cache_append(c, cache, 0, x.k, x.v, NULL));
    for (dry = 2; dry >= 0; dry--) { /* two measurements leave no trace for what follows */
        if (dry) tfm_measure_begin(c);
        for (step = 0; step < 3; step++) {
            for (layer = 0; layer < 2; layer++) {
                const int64_t keys = step * 7 + (layer ? 0 : 10);
                o.mask.keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(1, keys), 1);
                assert_made(c, tfm_attention_cached(c, part(c, x.q, 0, 2), cache, layer, &o));
                cr_assert_eq(w->shape[3], keys);
                assert_ok(c, tfm_cache_append(c, cache, layer, part(c, x.k, 0, 7), part(c, x.v, 0, 7), NULL));
            }
        }
        if (dry) assert_ok(c, tfm_measure_end(c, NULL));
        cr_assert_eq(tfm_cache_length(cache, 0, 0), dry ? 10 : 31);
    }
    tfm_measure_begin(c);
    assert_ok(c, tfm_cache_append(c, cache, 0, x.k, x.v, NULL)); /* as if there was room: no more than fits */
    o.mask.keep = NULL;
    assert_made(c, tfm_attention_cached(c, x.q, cache, 0, &o));
    cr_assert_eq(w->shape[3], 32);
    tfm_cache_reset(cache);
    assert_made(c, tfm_attention_cached(c, x.q, cache, 0, &o));
    cr_assert_eq(w->shape[3], 0);
    assert_ok(c, tfm_measure_end(c, NULL));
    tfm_cache_destroy(cache);
    tfm_destroy(c);
}

/* What cuts, slides, forks and reorders a cache in a measurement does it to the lengths that there would be. */
Test(cache, a_measurement_changes_a_real_cache_as_a_run_does) {
    static const int64_t rows[BATCH] = {1, 1, 0}, short_ones[BATCH] = {2, 1, 1};
    tfm_ctx *c = tfm_create(NULL);
    const tfm_cache_options g = geometry(TFM_F32, 16);
    const inputs x = make_inputs(c, 10, TFM_F32);
    tfm_cache *cache = tfm_cache_create(c, &g), *fork;
    tfm_tensor *w;
    tfm_attention_options o;
    int dry;
    int64_t layer;
    memset(&o, 0, sizeof o);
    o.weights = &w;
    for (dry = 1; dry >= 0; dry--) {
        if (dry) tfm_measure_begin(c);
        for (layer = 0; layer < LAYERS; layer++) assert_ok(c, tfm_cache_append(c, cache, layer, x.k, x.v, NULL));
        assert_ok(c, tfm_cache_truncate(c, cache, 1, 4));
        o.mask.keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(1, 10), 1);
        assert_made(c, tfm_attention_cached(c, x.q, cache, 1, &o));
        assert_ok(c, tfm_cache_truncate(c, cache, -1, 8));
        o.mask.keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(1, 8), 1);
        assert_made(c, tfm_attention_cached(c, x.q, cache, 1, &o));
        assert_ok(c, tfm_cache_slide(c, cache, 3));
        assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, 0, 2), part(c, x.v, 0, 2), NULL));
        o.mask.keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(1, 7), 1);
        assert_made(c, tfm_attention_cached(c, x.q, cache, 0, &o));
        o.mask.keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(1, 5), 1);
        assert_made(c, tfm_attention_cached(c, x.q, cache, 1, &o));
        fork = tfm_cache_fork(c, cache, rows, BATCH);
        assert_made(c, fork);
        cr_assert_eq(tfm_cache_length(fork, 0, 0), 3);
        cr_assert_eq(tfm_cache_length(fork, 0, 2), 7);
        cr_assert_eq(tfm_cache_length(fork, 1, 2), 5);
        assert_ok(c, tfm_cache_reorder(c, fork, rows, BATCH));
        cr_assert_eq(tfm_cache_length(fork, 0, 2), 3);
        tfm_cache_destroy(fork);
        assert_ok(c, tfm_cache_truncate(c, cache, 2, 2));
        assert_ok(c, tfm_cache_reorder(c, cache, short_ones, BATCH));
        o.mask.keep = tfm_full(c, TFM_BOOL, TFM_SHAPE(1, 3), 1);
        assert_made(c, tfm_attention_cached(c, x.q, cache, 0, &o));
        if (dry) assert_ok(c, tfm_measure_end(c, NULL));
        cr_assert_eq(tfm_cache_length(cache, 0, 0), dry ? 0 : 2);
    }
    tfm_cache_destroy(cache);
    tfm_destroy(c);
}

/* One head beside several threads: keys are split over them once there are thousands. */
Test(cache, a_measured_step_takes_what_it_would_beside_a_full_cache) {
    enum { HELD = 5000, SIZE = 8 };
    TEST_EACH_ISA(c, 3) {
        tfm_cache_options g;
        tfm_cache *cache;
        tfm_memory need, before, after;
        tfm_tensor *many = tfm_ones(c, TFM_SHAPE(1, 1, HELD, SIZE)), *one = tfm_ones(c, TFM_SHAPE(1, 1, 1, SIZE));
        memset(&g, 0, sizeof g);
        g.heads = 1;
        g.key_size = SIZE;
        g.capacity = HELD + 1;
        cache = tfm_cache_create(c, &g);
        assert_made(c, cache);
        tfm_measure_begin(c);
        assert_ok(c, tfm_cache_append(c, cache, 0, one, one, NULL));
        assert_made(c, tfm_attention_cached(c, one, cache, 0, NULL));
        assert_ok(c, tfm_measure_end(c, &need));
        assert_ok(c, tfm_cache_append(c, cache, 0, many, many, NULL));
        assert_ok(c, tfm_cache_append(c, cache, 0, one, one, NULL));
        tfm_memory_reset(c);
        before = tfm_memory_usage(c);
        assert_made(c, tfm_attention_cached(c, one, cache, 0, NULL));
        after = tfm_memory_usage(c);
        cr_assert_eq(need.arena_peak, after.arena_peak - before.arena_used, "%lld were foretold, %lld used",
                     (long long)need.arena_peak, (long long)(after.arena_peak - before.arena_used));
        tfm_cache_destroy(cache);
    }
}

static double first_block[1 << 14];
static int first_block_taken;

/* Gives the first block that is asked for, a context, the same place each time. */
static void *alloc_in_place(void *user, size_t size) {
    (void)user;
    if (first_block_taken || size > sizeof first_block) return malloc(size);
    first_block_taken = 1;
    return first_block;
}

static void free_in_place(void *user, void *block) {
    (void)user;
    if (block != first_block) free(block);
    else first_block_taken = 0;
}

Test(cache, a_measurement_by_a_later_context_at_the_same_address_begins_anew) {
    tfm_options options;
    tfm_ctx *c, *other = tfm_create(NULL), *before = NULL;
    const tfm_cache_options g = geometry(TFM_F32, 32);
    tfm_cache *cache = tfm_cache_create(other, &g);
    int round;
    memset(&options, 0, sizeof options);
    options.threads = 1;
    options.allocator.alloc = alloc_in_place;
    options.allocator.free = free_in_place;
    for (round = 0; round < 3; round++, before = c) {
        inputs x;
        tfm_tensor *w;
        tfm_attention_options o;
        memset(&o, 0, sizeof o);
        o.weights = &w;
        c = tfm_create(&options);
        cr_assert(c && (!before || c == before));
        x = make_inputs(c, 10, TFM_F32);
        tfm_measure_begin(c);
        assert_made(c, tfm_attention_cached(c, x.q, cache, 0, &o));
        cr_assert_eq(w->shape[3], 0);
        assert_ok(c, tfm_cache_append(c, cache, 0, x.k, x.v, NULL));
        assert_ok(c, tfm_measure_end(c, NULL));
        tfm_destroy(c);
    }
    tfm_cache_destroy(cache);
    tfm_destroy(other);
}

Test(cache, decoding_takes_no_memory_after_the_first_step) {
    TEST_EACH_ISA(c, 2) {
        const inputs x = make_inputs(c, 40, TFM_F32);
        const tfm_cache_options g = geometry(TFM_F32, 40);
        const tfm_attention_options o = causal(TFM_CAUSAL_BOTTOM_RIGHT);
        tfm_cache *cache = tfm_cache_create(c, &g);
        int64_t i, allocations = 0;
        for (i = 0; i < 40; i++) {
            const tfm_marker mark = tfm_mark(c);
            assert_ok(c, tfm_cache_append(c, cache, 0, part(c, x.k, i, 1), part(c, x.v, i, 1), NULL));
            assert_made(c, tfm_attention_cached(c, part(c, x.q, i, 1), cache, 0, &o));
            tfm_rewind(c, mark);
            if (i == 1) allocations = tfm_memory_usage(c).allocations;
        }
        cr_assert_eq(tfm_memory_usage(c).allocations, allocations);
        tfm_cache_destroy(cache);
    }
}

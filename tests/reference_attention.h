/* Attention and its masks in double precision, written from the manual's words alone: every element by itself, no tile,
 * no range, no shortcut. It reads tensors of any dtype and stride through tfm_get. */
#ifndef REFERENCE_ATTENTION_H
#define REFERENCE_ATTENTION_H

#include "test.h"

/* Element (b, h, i, j) of what broadcasts to (B, H, Lq, Lk). */
TEST_UNUSED double reference_at(const tfm_tensor *t, int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t full[4] = {b, h, i, j};
    int64_t index[TFM_MAX_DIMS] = {0};
    int d;
    for (d = 0; d < t->ndim; d++) index[d] = t->shape[d] == 1 ? 0 : full[4 - t->ndim + d];
    return tfm_get(t, index);
}

TEST_UNUSED double reference_row(const tfm_tensor *t, int64_t b, int64_t i) {
    const int64_t index[2] = {b, i};
    return tfm_get(t, index);
}

/* T5's buckets as the paper's code has them, in float like it. */
TEST_UNUSED int64_t reference_bucket(int64_t distance, int64_t buckets, int64_t max_distance, int one_way) {
    int64_t base = 0, n = -distance, exact, large;
    if (!one_way) {
        buckets /= 2;
        if (n < 0) base += buckets, n = -n;
    } else if (n < 0) {
        n = 0;
    }
    exact = buckets / 2;
    if (n < exact) return base + n;
    large = exact + (int64_t) ((float) log((double) ((float) n / (float) exact)) /
                               (float) log((double) max_distance / (double) exact) * (float) (buckets - exact));
    return base + (large < buckets - 1 ? large : buckets - 1);
}

/* 1 when query (b, h, i) attends key j; *add gets what is added to its score. */
TEST_UNUSED int reference_mask(const tfm_mask *m, int64_t Lq, int64_t Lk, int64_t b, int64_t h, int64_t i, int64_t j,
                               double *add) {
    const int64_t keys = m->key_lengths ? (int64_t) reference_row(m->key_lengths, b, 0) : Lk;
    const int64_t queries = m->query_lengths ? (int64_t) reference_row(m->query_lengths, b, 0) : Lq;
    const int64_t prefix = m->prefixes ? (int64_t) reference_row(m->prefixes, b, 0) : m->prefix;
    int64_t p = i;
    *add = 0;
    if (m->causal == TFM_CAUSAL_BOTTOM_RIGHT) p = i + keys - queries;
    if (m->causal == TFM_CAUSAL_OFFSET) p = i + (m->offsets ? (int64_t) reference_row(m->offsets, b, 0) : m->offset);
    if (i >= queries || j >= keys) return 0;
    if (j >= prefix) {
        if (m->causal && j > p) return 0;
        if (m->window_right && j >= p + m->window_right) return 0;
    }
    if (m->window_left && j <= p - m->window_left) return 0;
    if (m->query_segments && reference_row(m->query_segments, b, i) != reference_row(m->key_segments, b, j)) return 0;
    if (m->keep && reference_at(m->keep, b, h, i, j) == 0) return 0;
    if (m->ignore && reference_at(m->ignore, b, h, i, j) != 0) return 0;
    if (m->nonzero && reference_at(m->nonzero, b, h, i, j) == 0) return 0;
    if (m->bias) *add += reference_at(m->bias, b, h, i, j);
    if (*add == -HUGE_VAL) return 0;
    if (m->alibi_slopes) *add -= reference_row(m->alibi_slopes, h, 0) * fabs((double) (p - j));
    if (m->relative_bias) {
        const int64_t far = m->relative_max_distance ? m->relative_max_distance : 128;
        *add += reference_row(m->relative_bias,
                              reference_bucket(j - p, m->relative_bias->shape[0], far, m->relative_one_way), h);
    }
    return 1;
}

/* out (B, H, Lq, dv); weights (B, H, Lq, Lk) of the stage, or NULL. */
TEST_UNUSED void reference_attention(const tfm_tensor *q, const tfm_tensor *k, const tfm_tensor *v,
                                     const tfm_attention_options *o, double *out, double *weights) {
    const int64_t B = q->shape[0], H = q->shape[1], Lq = q->shape[2], Lk = k->shape[2], dk = q->shape[3],
        dv = v->shape[3];
    const double scale = o->scale != 0 ? (double) o->scale : 1 / sqrt((double) dk), cap = (double) o->mask.softcap;
    double *score = (double *) malloc((size_t) (Lk + 1) * sizeof(double));
    double *qd = (double *) malloc((size_t) (dk + 1) * sizeof(double));
    int64_t b, h, i, j, d;
    for (b = 0; b < B; b++)
        for (h = 0; h < H; h++)
            for (i = 0; i < Lq; i++) {
                const int64_t g = h / (H / k->shape[1]);
                double top = -HUGE_VAL, sum = 0, *y = out + ((b * H + h) * Lq + i) * dv;
                double *w = weights ? weights + ((b * H + h) * Lq + i) * Lk : NULL;
                for (d = 0; d < dk; d++) {
                    const int64_t at[4] = {b, h, i, d};
                    qd[d] = tfm_get(q, at);
                }
                for (j = 0; j < Lk; j++) {
                    double s = 0, add;
                    for (d = 0; d < dk; d++) {
                        const int64_t at[4] = {b, g, j, d};
                        s += qd[d] * tfm_get(k, at);
                    }
                    s *= scale;
                    if (w && o->weights_stage == TFM_WEIGHTS_SCORES) w[j] = s;
                    if (cap > 0) s = cap * tanh(s / cap);
                    if (w && o->weights_stage == TFM_WEIGHTS_CAPPED) w[j] = s;
                    score[j] = reference_mask(&o->mask, Lq, Lk, b, h, i, j, &add) ? s + add : -HUGE_VAL;
                    if (w && o->weights_stage == TFM_WEIGHTS_MASKED) w[j] = score[j];
                    if (!(score[j] <= top)) top = score[j];
                }
                for (d = 0; d < dv; d++) y[d] = 0;
                if (w && o->weights_stage == TFM_WEIGHTS_PROBABILITIES)
                    for (j = 0; j < Lk; j++) w[j] = 0;
                if (top == -HUGE_VAL) continue;
                for (j = 0; j < Lk; j++) sum += exp(score[j] - top);
                if (o->mask.sinks) sum += exp(reference_row(o->mask.sinks, h, 0) - top);
                for (j = 0; j < Lk; j++) {
                    if (score[j] == -HUGE_VAL) continue;
                    for (d = 0; d < dv; d++) {
                        const int64_t at[4] = {b, g, j, d};
                        y[d] += exp(score[j] - top) / sum * tfm_get(v, at);
                    }
                    if (w && o->weights_stage == TFM_WEIGHTS_PROBABILITIES) w[j] = exp(score[j] - top) / sum;
                }
            }
    free(score);
    free(qd);
}

/* A tensor of random numbers in [-1, 1), made by the test's own generator. */
TEST_UNUSED tfm_tensor *reference_random(tfm_ctx *c, tfm_shape shape, uint64_t seed) {
    tfm_tensor *t = tfm_empty(c, TFM_F32, shape);
    assert_made(c, t);
    test_fill((float *) t->data, tfm_numel(t), seed);
    return t;
}

TEST_UNUSED tfm_tensor *reference_ids(tfm_ctx *c, int64_t n, const int64_t *values) {
    return tfm_from(c, TFM_I64, tfm_shape1(n), values);
}

/* Whole number in [low, high]. */
TEST_UNUSED int64_t reference_pick(uint64_t *state, int64_t low, int64_t high) {
    const double u = ((double) test_random(state) + 1) / 2;
    const int64_t n = low + (int64_t) (u * (double) (high - low + 1));
    return n > high ? high : n;
}

#endif

/* The attention kernels of chapter 4 on every instruction set this machine has: one tile of queries against one
 * block of keys, and the merging of blocks. Budgets in kernel_helpers.h. */
#define TFM_STATIC
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"

#include "kernel_helpers.h"

enum { BLOCK = 128, ROWS = 48 }; /* of chapter 4 */

/* -- one tile ------------------------------------------------------------------------------------------------------ */

/* A tile in guarded memory, with `gap` elements between rows, keys and panels that nothing may use, and its mask. */
typedef struct tile {
    tfm__attn_tile t;
    int gap;
    unsigned char *masked; /* rows x BLOCK: 1: this query does not see this key */
} tile;

enum { Q, K, V, SCORES, OUT, MAX, SUM, MASK, BUFFERS }; /* the rooms of a tile; a second one has the next BUFFERS */

static int64_t key_at(const tile *a, int64_t key, int64_t i) {
    return (key / KEY_PANEL * a->t.key_size + i) * KEY_PANEL + key % KEY_PANEL;
}

/* Memory of a tile of this shape; scores and outputs filled with NaN. */
static tile tile_memory(int first, int64_t rows, int64_t keys, int64_t key_size, int64_t value_size, int k_dtype,
                        int v_dtype, int gap) {
    const int64_t panels = (keys + KEY_PANEL - 1) / KEY_PANEL;
    tile a;
    memset(&a, 0, sizeof a);
    a.gap = gap;
    a.t.rows = rows, a.t.keys = keys, a.t.key_size = key_size, a.t.value_size = value_size;
    a.t.k_dtype = k_dtype, a.t.v_dtype = v_dtype;
    a.t.q_row = key_size + gap, a.t.v_row = value_size + gap, a.t.out_row = value_size + gap;
    a.t.q = floats(first + Q, rows ? (rows - 1) * a.t.q_row + key_size : 0);
    a.t.k = room(first + K, panels * KEY_PANEL * key_size * float_size(k_dtype));
    a.t.v = room(first + V, keys ? ((keys - 1) * a.t.v_row + value_size) * float_size(v_dtype) : 0);
    a.t.scores = floats(first + SCORES, rows * BLOCK);
    a.t.out = floats(first + OUT, rows ? (rows - 1) * a.t.out_row + value_size : 0);
    a.t.max = floats(first + MAX, rows);
    a.t.sum = floats(first + SUM, rows);
    a.masked = (unsigned char *)room(first + MASK, rows * BLOCK);
    fill_value(a.t.scores, rows * BLOCK, (float)NAN);
    if (rows) fill_value(a.t.out, (rows - 1) * a.t.out_row + value_size, 77);
    memset(a.masked, 0, (size_t)(rows * BLOCK));
    return a;
}

static void set_key(tile *a, int64_t key, int64_t i, float x) {
    set_element((void *)(uintptr_t)a->t.k, a->t.k_dtype, key_at(a, key, i), x);
}
static void set_value(tile *a, int64_t key, int64_t i, float x) {
    set_element((void *)(uintptr_t)a->t.v, a->t.v_dtype, key * a->t.v_row + i, x);
}

/* Normal deviates, also up to 15 keys past the last (a cache may hold anything finite there); NaN in the rest of the
 * panel and in the gaps. */
static tile make_tile(int64_t rows, int64_t keys, int64_t key_size, int64_t value_size, int k_dtype, int v_dtype,
                      int gap) {
    tile a = tile_memory(0, rows, keys, key_size, value_size, k_dtype, v_dtype, gap);
    const int64_t whole = (keys + PANEL - 1) / PANEL * PANEL;
    int64_t i, j;
    for (i = 0; i < rows; i++)
        for (j = 0; j < key_size + gap && (i < rows - 1 || j < key_size); j++)
            ((float *)(uintptr_t)a.t.q)[i * a.t.q_row + j] =
                j < key_size ? normal() / (float)sqrt((double)key_size) : (float)NAN;
    for (j = 0; j < (keys + KEY_PANEL - 1) / KEY_PANEL * KEY_PANEL; j++)
        for (i = 0; i < key_size; i++) set_key(&a, j, i, j < whole ? normal() : (float)NAN);
    for (j = 0; j < keys; j++)
        for (i = 0; i < value_size + gap && (j < keys - 1 || i < value_size); i++)
            set_value(&a, j, i, i < value_size ? normal() : (float)NAN);
    return a;
}

/* 4 of 10 keys masked at random, all of row 0's. */
static void mask_some(tile *a) {
    int64_t i;
    for (i = 0; i < a->t.rows * BLOCK; i++) a->masked[i] = i < BLOCK || uniform() < 0.4;
}

/* Scores, the mask on them as chapter 9 puts it, weights and output. */
static void run_tile(const tfm__kernels *k, tile *a) {
    int64_t r, j;
    k->attn_scores(&a->t);
    for (r = 0; r < a->t.rows; r++)
        for (j = 0; j < a->t.keys; j++)
            if (a->masked[r * BLOCK + j]) a->t.scores[r * BLOCK + j] = (float)-HUGE_VAL;
    k->attn_reduce(&a->t);
}

/* The results of a tile that has run. */
typedef struct results {
    float max[ROWS], sum[ROWS], out[ROWS][256];
} results;
static results results_of(const tile *a) {
    results s;
    int64_t r;
    memset(&s, 0, sizeof s);
    for (r = 0; r < a->t.rows; r++) {
        s.max[r] = a->t.max[r], s.sum[r] = a->t.sum[r];
        memcpy(s.out[r], a->t.out + r * a->t.out_row, (size_t)a->t.value_size * 4);
    }
    return s;
}
static int same_row(const tile *a, const results *s, int64_t r, int64_t row_of_s) {
    return same(&a->t.max[r], &s->max[row_of_s], 4) && same(&a->t.sum[r], &s->sum[row_of_s], 4) &&
           same(a->t.out + r * a->t.out_row, s->out[row_of_s], 4 * a->t.value_size);
}

#define TILE "%s: %lld rows, %lld keys (%s) of %lld, values (%s) of %lld"
#define TILE_OF(k, a) \
    (k)->name, (long long)(a)->t.rows, (long long)(a)->t.keys, float_name[(a)->t.k_dtype], (long long)(a)->t.key_size, \
        float_name[(a)->t.v_dtype], (long long)(a)->t.value_size

/* A tile that has run, against doubles. */
static void check_tile(const tfm__kernels *k, const tile *a) {
    int64_t r, j, i;
    for (r = 0; r < a->t.rows; r++) {
        const float *weight = a->t.scores + r * BLOCK, *row = a->t.out + r * a->t.out_row;
        double score[BLOCK], out[256], most = -HUGE_VAL, sum = 0;
        memset(out, 0, sizeof out);
        for (j = 0; j < a->t.keys; j++) {
            score[j] = 0;
            for (i = 0; i < a->t.key_size; i++)
                score[j] += (double)a->t.q[r * a->t.q_row + i] * (double)element(a->t.k, a->t.k_dtype, key_at(a, j, i));
            if (!a->masked[r * BLOCK + j] && score[j] > most) most = score[j];
        }
        for (j = 0; j < (a->t.keys + k->width - 1) / k->width * k->width; j++) {
            const double w = j < a->t.keys && !a->masked[r * BLOCK + j] ? exp(score[j] - most) : 0;
            CHECK(w == 0 ? weight[j] == 0 : fabs((double)weight[j] - w) <= budget[BUDGET_WEIGHT].most,
                  TILE ": weight of query %d on key %d is %.9g, not %.9g", TILE_OF(k, a), (int)r, (int)j,
                  (double)weight[j], w);
            sum += w;
            for (i = 0; w > 0 && i < a->t.value_size; i++)
                out[i] += w * (double)element(a->t.v, a->t.v_dtype, j * a->t.v_row + i);
        }
        if (sum == 0) {
            CHECK(a->t.max[r] == (float)-HUGE_VAL && a->t.sum[r] == 0, TILE ": query %d sees no key", TILE_OF(k, a),
                  (int)r);
        } else {
            CHECK(fabs((double)a->t.max[r] - most) <= 2e-5
                      && fabs((double)a->t.sum[r] / sum - 1) <= budget[BUDGET_ATTENTION].most,
                  TILE ": query %d, maximum %.9g, not %.9g, sum %.9g, not %.9g", TILE_OF(k, a), (int)r,
                  (double)a->t.max[r], most, (double)a->t.sum[r], sum);
        }
        for (i = 0; i < a->t.value_size; i++)
            CHECK(sum == 0 ? row[i] == 0 : fabs((double)row[i] - out[i]) <= budget[BUDGET_ATTENTION].most * sum,
                  TILE ": output (%d, %d) is %.9g, not %.9g", TILE_OF(k, a), (int)r, (int)i, (double)row[i], out[i]);
        for (; i < a->t.out_row && r < a->t.rows - 1; i++)
            CHECK(row[i] == 77, TILE ": written between rows", TILE_OF(k, a));
    }
}

/* Shapes around every edge: tiles of 4, 6 and 12 rows, vectors, panels, the block's end; all dtypes, with gaps and
 * without. */
static const int some_rows[] = {1, 3, 7, 12, 13, 48},
                 some_keys[] = {1, 5, 15, 16, 17, 31, 32, 33, 57, 64, 100, 127, 128};
static const int key_sizes[] = {1, 8, 20, 64}, value_sizes[] = {1, 16, 19, 40, 64, 80, 128};
enum { SHAPES = 6 * 13 * 3 };
static tile tile_of_shape(int shape) {
    tile a = make_tile(some_rows[shape / 3 / 13], some_keys[shape / 3 % 13], key_sizes[shape % 4],
                       value_sizes[shape % 7], shape % 3, shape / 3 % 3, shape % 5 == 0 ? 3 : 0);
    if (shape % 2) mask_some(&a);
    return a;
}
#define EACH_SHAPE(shape) for (int shape = 0; shape < SHAPES; shape += test_quick() ? 5 : 1)

Test(attention_kernels, tiles_are_within_budget_at_every_edge_and_in_every_dtype) {
    EACH_TABLE(k) {
        int64_t keys;
        tile a;
        EACH_SHAPE(shape) {
            a = tile_of_shape(shape);
            run_tile(k, &a);
            check_tile(k, &a);
        }
        for (keys = 0; keys <= 3 * k->width + 1; keys++) {
            a = make_tile(k->tile_rows + 1, keys, keys + 1, keys + 1, TFM_F32, TFM_F32, 0);
            run_tile(k, &a);
            check_tile(k, &a);
        }
        a = make_tile(ROWS, BLOCK, 128, 256, TFM_F32, TFM_F32, 0);
        run_tile(k, &a);
        check_tile(k, &a);
        assert_fronts_untouched("attention");
    }
}

Test(attention_kernels, a_query_has_the_same_bits_alone) {
    EACH_TABLE(k) {
        EACH_SHAPE(shape) {
            tile a = tile_of_shape(shape);
            results all;
            int64_t r;
            run_tile(k, &a);
            all = results_of(&a);
            for (r = 0; r < a.t.rows; r += 1 + a.t.rows / 9) {
                tile one = a;
                one.t.rows = 1;
                one.t.q = a.t.q + r * a.t.q_row;
                one.masked = a.masked + r * BLOCK;
                one.t.scores = floats(BUFFERS + SCORES, BLOCK);
                one.t.out = floats(BUFFERS + OUT, a.t.value_size);
                one.t.max = floats(BUFFERS + MAX, 1);
                one.t.sum = floats(BUFFERS + SUM, 1);
                fill_value(one.t.scores, BLOCK, (float)NAN);
                run_tile(k, &one);
                CHECK(same_row(&one, &all, 0, r), TILE ": query %d", TILE_OF(k, &a), (int)r);
            }
        }
        assert_fronts_untouched("attention");
    }
}

/* More keys that nobody sees, whatever they and their values hold: the same bits. So a prompt fed whole, in chunks
 * or token by token gives the same result. */
Test(attention_kernels, later_masked_keys_change_no_bit_even_when_poisoned) {
    static const float poison[] = {1.5f, (float)NAN, (float)HUGE_VAL, (float)-HUGE_VAL};
    EACH_TABLE(k) {
        EACH_SHAPE(shape) {
            tile a = tile_of_shape(shape), b;
            const int64_t step = 1 + (BLOCK - a.t.keys) / 3;
            results few;
            int64_t more, r, i, j;
            int p = shape;
            run_tile(k, &a);
            few = results_of(&a);
            for (more = a.t.keys; more <= BLOCK; more += step, p++) {
                const float x = poison[p % 4];
                b = tile_memory(BUFFERS, a.t.rows, more, a.t.key_size, a.t.value_size, a.t.k_dtype, a.t.v_dtype, 0);
                b.t.q = a.t.q, b.t.q_row = a.t.q_row;
                for (j = 0; j < (more + PANEL - 1) / PANEL * PANEL; j++)
                    for (i = 0; i < a.t.key_size; i++)
                        set_key(&b, j, i, j < a.t.keys ? element(a.t.k, a.t.k_dtype, key_at(&a, j, i)) : x);
                for (j = 0; j < more; j++)
                    for (i = 0; i < a.t.value_size; i++)
                        set_value(&b, j, i, j < a.t.keys ? element(a.t.v, a.t.v_dtype, j * a.t.v_row + i) : x);
                for (r = 0; r < a.t.rows; r++)
                    for (j = 0; j < BLOCK; j++)
                        b.masked[r * BLOCK + j] = (unsigned char)(j < a.t.keys ? a.masked[r * BLOCK + j] : 1);
                run_tile(k, &b);
                for (r = 0; r < a.t.rows; r++)
                    CHECK(same_row(&b, &few, r, r), TILE ": query %d with %d keys of %.9g more", TILE_OF(k, &a), (int)r,
                          (int)(more - a.t.keys), (double)x);
            }
        }
        assert_fronts_untouched("attention");
    }
}

Test(attention_kernels, a_masked_value_never_leaks_and_an_attended_nan_comes_out) {
    static const float poison[] = {(float)NAN, (float)HUGE_VAL, (float)-HUGE_VAL};
    EACH_TABLE(k) {
        EACH_SHAPE(shape) {
            tile a = tile_of_shape(shape | 1);
            const int64_t key = random_bits() % a.t.keys, at = random_bits() % a.t.value_size;
            const float x = poison[shape % 3];
            results clean;
            int64_t r, i;
            run_tile(k, &a);
            clean = results_of(&a);
            set_value(&a, key, at, x);
            run_tile(k, &a);
            for (r = 0; r < a.t.rows; r++) {
                if (a.masked[r * BLOCK + key]) {
                    CHECK(same_row(&a, &clean, r, r), TILE ": %.9g leaks into query %d", TILE_OF(k, &a), (double)x,
                          (int)r);
                    continue;
                }
                for (i = 0; i < a.t.value_size; i++) {
                    const float is = a.t.out[r * a.t.out_row + i];
                    CHECK(i != at    ? same(&is, &clean.out[r][i], 4)
                          : isnan(x) ? isnan(is)
                                     : is == x || a.t.scores[r * BLOCK + key] == 0,
                          TILE ": %.9g attended at %d: query %d has %.9g at %d", TILE_OF(k, &a), (double)x, (int)at,
                          (int)r, (double)is, (int)i);
                }
            }
        }
    }
}

Test(attention_kernels, an_attended_nan_or_infinite_score_takes_its_row_and_survives_merging) {
    int64_t rows, keys, r, i;
    int what;
    EACH_TABLE(k) {
        for (rows = 1; rows <= k->tile_rows + 1; rows++)
            for (keys = 1; keys <= BLOCK; keys += 9)
                for (what = 0; what < 2; what++) {
                    tile a = make_tile(rows, keys, 8, 24, TFM_F32, TFM_F32, 0);
                    const int64_t bad = rows / 2, key = keys - 1 - keys / 3;
                    float max = 1, sum = 1, out[24];
                    k->attn_scores(&a.t);
                    a.t.scores[bad * BLOCK + key] = what ? (float)HUGE_VAL : (float)NAN;
                    if (keys > 2) a.t.scores[bad * BLOCK] = (float)-HUGE_VAL;
                    k->attn_reduce(&a.t);
                    for (r = 0; r < rows; r++)
                        for (i = 0; i < 24; i++)
                            CHECK(isnan(a.t.out[r * 24 + i]) == (r == bad), TILE ": query %d", TILE_OF(k, &a), (int)r);
                    fill_value(out, 24, 1);
                    k->attn_merge(1, 1, 24, &max, &sum, out, 24, a.t.max + bad, a.t.sum + bad, a.t.out + bad * 24, 24);
                    for (i = 0; i < 24; i++) CHECK(isnan(out[i]) && isnan(sum), "%s: merging loses it", k->name);
                    max = sum = 1;
                    fill_value(out, 24, 1);
                    k->attn_merge(1, 1, 24, a.t.max + bad, a.t.sum + bad, a.t.out + bad * 24, 24, &max, &sum, out, 24);
                    for (i = 0; i < 24; i++) CHECK(isnan(a.t.out[bad * 24 + i]), "%s: merging loses it", k->name);
                }
    }
}

/* Relative error of a weight exp(score - max): of the difference, its product with log2(e), the power of two. Below
 * the least normal number a weight may be any smaller one, far below it is 0. */
Test(attention_kernels, weights_keep_their_digits_down_to_the_least_number) {
    EACH_TABLE(k) {
        const double step = test_quick() ? 0.37 : 0.0137;
        double x = 0;
        while (x < 130) {
            tile a = make_tile(1, BLOCK, 8, 16, TFM_F32, TFM_F32, 0);
            float score[BLOCK];
            int j;
            for (j = 0; j < BLOCK; j++, x += step) score[j] = j ? (float)(3.0 - x) : 3.0f;
            memcpy(a.t.scores, score, sizeof score);
            k->attn_reduce(&a.t);
            for (j = 0; j < BLOCK; j++) {
                const double down = 3.0 - (double)score[j], weight = exp(-down), got = (double)a.t.scores[j];
                CHECK(down > 125 ? got == 0 : weight < 1.18e-38 ? got >= 0 && got < 1.2e-38
                          : fabs(got / weight - 1) <= 1.2e-7 * (1 + down),
                      "%s: exp(-%.9g) is %.9g, not %.9g", k->name, down, got, weight);
            }
        }
    }
}

/* Scores of any size: weights are exp(score - max), so nothing overflows and far keys vanish. */
Test(attention_kernels, large_scores_do_not_overflow) {
    static const float scale[] = {1e3f, 1e20f, 1e37f, -1e37f};
    int s, j, i;
    EACH_TABLE(k) {
        for (s = 0; s < 4; s++) {
            tile a = make_tile(k->tile_rows, 40, 8, 24, TFM_F32, TFM_F32, 0);
            k->attn_scores(&a.t);
            for (i = 0; i < k->tile_rows; i++)
                for (j = 0; j < 40; j++) a.t.scores[i * BLOCK + j] = scale[s] * (float)(j == 11 + i ? 2 : 1);
            k->attn_reduce(&a.t);
            for (i = 0; i < k->tile_rows; i++) {
                const float one = s == 3 ? 39.0f : 1.0f;
                CHECK(a.t.sum[i] == one, "%s: sum %.9g at scale %.9g", k->name, (double)a.t.sum[i], (double)scale[s]);
                for (j = 0; j < 24 && s < 3; j++)
                    CHECK(a.t.out[i * 24 + j] == ((const float *)a.t.v)[(11 + i) * 24 + j], "%s: output at scale %.9g",
                          k->name, (double)scale[s]);
            }
        }
    }
}

Test(attention_kernels, no_key_gives_zeros) {
    EACH_TABLE(k) {
        tile a = make_tile(5, 0, 8, 24, TFM_F32, TFM_F32, 0);
        int i;
        run_tile(k, &a);
        check_tile(k, &a);
        for (i = 0; i < 5 * 24; i++) cr_assert(a.t.out[i] == 0 && !signbit(a.t.out[i]), "%s", k->name);
        a = make_tile(0, 16, 8, 24, TFM_F32, TFM_F32, 0);
        run_tile(k, &a);
        a = make_tile(5, 16, 0, 24, TFM_F32, TFM_F32, 0); /* keys without elements: all scores are 0 */
        run_tile(k, &a);
        check_tile(k, &a);
    }
}

/* -- merging ------------------------------------------------------------------------------------------------------- */

/* Rows of which some have no key on one side, on the other, or on both. */
Test(attention_kernels, merging_is_within_budget_and_a_side_without_keys_leaves_the_other_bit_for_bit) {
    int rows, size, gap, r, i;
    EACH_TABLE(k) {
        for (rows = 0; rows <= ROWS; rows += rows <= 3 * k->width + 1 ? 1 : 5)
            for (size = 1; size < 70; size += 13) {
                float *max = floats(0, rows), *sum = floats(1, rows), *out, *max2 = floats(3, rows),
                      *sum2 = floats(4, rows), *out2;
                float old_max[ROWS], old_sum[ROWS], old[ROWS][70];
                gap = rows % 3;
                out = floats(2, rows ? (rows - 1) * (size + gap) + size : 0);
                out2 = floats(5, rows ? (rows - 1) * (size + 2 * gap) + size : 0);
                if (rows) fill_value(out, (rows - 1) * (size + gap) + size, 77);
                for (r = 0; r < rows; r++) {
                    const int first = r % 5 != 1 && r % 5 != 3, second = r % 5 != 2 && r % 5 != 3;
                    float *row = out + r * (size + gap), *row2 = out2 + r * (size + 2 * gap);
                    max[r] = first ? 5 * normal() : (float)-HUGE_VAL, sum[r] = first ? 1 + (float)uniform() : 0;
                    max2[r] = second ? 5 * normal() : (float)-HUGE_VAL, sum2[r] = second ? 1 + (float)uniform() : 0;
                    for (i = 0; i < size; i++) row[i] = !first ? 0 : i % 5 == 0 ? -0.0f : normal();
                    for (i = 0; i < size; i++) row2[i] = !second ? 0 : i % 4 == 0 ? -0.0f : normal();
                    old_max[r] = max[r], old_sum[r] = sum[r];
                    memcpy(old[r], row, (size_t)size * 4);
                }
                k->attn_merge(1, rows, size, max, sum, out, size + gap, max2, sum2, out2, size + 2 * gap);
                for (r = 0; r < rows; r++) {
                    const float *row = out + r * (size + gap), *row2 = out2 + r * (size + 2 * gap);
                    const double top = fmax((double)old_max[r], (double)max2[r]);
                    const double by = exp((double)old_max[r] - top), by2 = exp((double)max2[r] - top);
                    if (isinf(max2[r])) {
                        CHECK(same(&max[r], &old_max[r], 4) && same(&sum[r], &old_sum[r], 4)
                                  && same(row, old[r], size * 4),
                              "%s: row %d of %d, nothing to merge", k->name, r, rows);
                    } else if (isinf(old_max[r])) {
                        CHECK(same(&max[r], &max2[r], 4) && same(&sum[r], &sum2[r], 4) && same(row, row2, size * 4),
                              "%s: row %d of %d, nothing merged into", k->name, r, rows);
                    } else {
                        CHECK((double)max[r] == top
                                  && fabs((double)sum[r] / ((double)old_sum[r] * by + (double)sum2[r] * by2) - 1)
                                         < 1e-6,
                              "%s: row %d of %d: maximum, sum", k->name, r, rows);
                        for (i = 0; i < size; i++)
                            CHECK(fabs((double)row[i] - ((double)old[r][i] * by + (double)row2[i] * by2))
                                      < budget[BUDGET_ATTENTION].most,
                                  "%s: row %d of %d, element %d", k->name, r, rows, i);
                    }
                    for (i = size; i < size + gap && r < rows - 1; i++)
                        CHECK(row[i] == 77, "%s: written between rows", k->name);
                }
            }
        assert_fronts_untouched("merge");
    }
}

Test(attention_kernels, a_row_merges_to_the_same_bits_alone) {
    EACH_TABLE(k) {
        float max[ROWS], sum[ROWS], out[ROWS * 19], max2[ROWS], sum2[ROWS], out2[ROWS * 19], one[19], one_max, one_sum;
        float was_max[ROWS], was_sum[ROWS], was[ROWS * 19];
        int r;
        fill_normal(max, ROWS), fill_normal(max2, ROWS), fill_normal(out, ROWS * 19), fill_normal(out2, ROWS * 19);
        for (r = 0; r < ROWS; r++) sum[r] = 1 + (float)uniform(), sum2[r] = 1 + (float)uniform();
        memcpy(was_max, max, sizeof max), memcpy(was_sum, sum, sizeof sum), memcpy(was, out, sizeof out);
        k->attn_merge(1, ROWS, 19, max, sum, out, 19, max2, sum2, out2, 19);
        for (r = 0; r < ROWS; r++) {
            one_max = was_max[r], one_sum = was_sum[r];
            memcpy(one, was + r * 19, sizeof one);
            k->attn_merge(1, 1, 19, &one_max, &one_sum, one, 19, max2 + r, sum2 + r, out2 + r * 19, 19);
            CHECK(same(&one_max, &max[r], 4) && same(&one_sum, &sum[r], 4) && same(one, out + r * 19, sizeof one),
                  "%s: row %d", k->name, r);
        }
    }
}

/* Empty parts and rows, NaN and Inf among them. */
Test(attention_kernels, parts_merged_at_once_have_the_bits_of_one_after_the_other) {
    enum { SIZE = 19 };
    EACH_TABLE(k) {
        for (int rows = 1; rows <= 16; rows += rows < 5 ? 1 : 3) {
            const int count = ROWS / rows, all = count * rows;
            float max[16], sum[16], out[16 * SIZE], max2[ROWS], sum2[ROWS], out2[ROWS * SIZE], one_max[16], one_sum[16],
                one[16 * SIZE];
            fill_normal(max, 16), fill_normal(out, 16 * SIZE), fill_normal(max2, ROWS), fill_normal(out2, ROWS * SIZE);
            for (int r = 0; r < rows; r++) {
                sum[r] = r % 3 == 1 ? 0 : 1 + (float)uniform();
                if (r % 3 == 1) max[r] = (float)-HUGE_VAL;
            }
            for (int n = 0; n < all; n++) {
                const double kind = uniform();
                sum2[n] = kind < 0.3 ? 0 : 1 + (float)uniform();
                max2[n] = kind < 0.3 ? (float)-HUGE_VAL : kind < 0.35 ? (float)NAN : kind < 0.4 ? (float)HUGE_VAL : max2[n];
            }
            memcpy(one_max, max, sizeof max), memcpy(one_sum, sum, sizeof sum), memcpy(one, out, sizeof out);
            k->attn_merge(count, rows, SIZE, max, sum, out, SIZE, max2, sum2, out2, SIZE);
            for (int n = 0; n < all; n += rows)
                k->attn_merge(1, rows, SIZE, one_max, one_sum, one, SIZE, max2 + n, sum2 + n, out2 + n * SIZE, SIZE);
            CHECK(same(max, one_max, rows * 4) && same(sum, one_sum, rows * 4) && same(out, one, rows * SIZE * 4),
                  "%s: %d parts of %d rows", k->name, count, rows);
        }
    }
}

Test(attention_kernels, two_steps_have_the_bits_of_one_and_leave_masked_scores_to_it) {
    EACH_TABLE(k) {
        for (int64_t rows = 1; rows <= k->tile_rows + 1; rows++) {
            tile a = make_tile(rows, BLOCK, 8, 24, TFM_F32, TFM_F32, 0);
            const int64_t at = (rows - 1) * BLOCK + 77;
            float scores[ROWS * BLOCK];
            k->attn_scores(&a.t);
            memcpy(scores, a.t.scores, (size_t)(rows * BLOCK) * 4);
            k->attn_reduce(&a.t);
            const results whole = results_of(&a);
            memcpy(a.t.scores, scores, (size_t)(rows * BLOCK) * 4);
            fill_value(a.t.out, rows * 24, 77);
            CHECK(k->attn_weigh(&a.t) == 1, "%s: refused", k->name);
            k->attn_values(&a.t);
            for (int64_t r = 0; r < rows; r++)
                CHECK(same_row(&a, &whole, r, r), "%s: row %d of %d", k->name, (int)r, (int)rows);
            memcpy(a.t.scores, scores, (size_t)(rows * BLOCK) * 4);
            scores[at] = a.t.scores[at] = (float)-HUGE_VAL;
            CHECK(k->attn_weigh(&a.t) == 0 && same(a.t.scores, scores, rows * BLOCK * 4), "%s: -inf taken", k->name);
        }
    }
}

/* A bias lies in the caller's memory: it is read up to its last key. Scores and `keep` have room for whole vectors. */
Test(attention_kernels, a_mask_on_scores_reads_the_bias_up_to_its_last_key) {
    enum { SPARE = 2 * BLOCK };
    EACH_TABLE(k) {
        for (int64_t keys = 0; keys <= 2 * k->width + 1; keys++) {
            float score[SPARE], before[SPARE], *bias = floats(0, keys);
            unsigned char keep[SPARE];
            for (int64_t j = 0; j < SPARE; j++) {
                score[j] = before[j] = j % 5 == 3 ? (float)NAN : normal();
                keep[j] = (unsigned char)(j % 3 ? 255 >> j % 7 : 0);
            }
            for (int64_t j = 0; j < keys; j++) bias[j] = j % 2 ? (float)-HUGE_VAL : normal();
            k->attn_bias(score, bias, keys);
            for (int64_t j = 0; j < keys; j++)
                CHECK(ulps(score[j], j % 2 ? -HUGE_VAL : (double)before[j] + (double)bias[j]) <= 0.5001,
                      "%s: key %d of %d is %.9g", k->name, (int)j, (int)keys, (double)score[j]);
            memcpy(score, before, sizeof score);
            k->attn_keep(score, keep, keys);
            for (int64_t j = 0; j < keys; j++)
                CHECK(keep[j] ? same(&score[j], &before[j], 4) : score[j] == (float)-HUGE_VAL, "%s: key %d of %d",
                      k->name, (int)j, (int)keys);
        }
    }
}

/* A long row of keys in blocks, merged left to right, is the attention over all of them. */
Test(attention_kernels, blocks_merged_left_to_right_are_attention_over_all_keys) {
    enum { KEYS = 5 * BLOCK + 37, SIZE = 24 };
    EACH_TABLE(k) {
        static double score[ROWS][KEYS], value[KEYS][SIZE];
        float max[ROWS], sum[ROWS], out[ROWS * SIZE];
        int64_t rows = k->tile_rows + 1, first, r, j, i;
        for (r = 0; r < rows; r++) max[r] = (float)-HUGE_VAL, sum[r] = 0;
        fill_value(out, ROWS * SIZE, 0);
        for (first = 0; first < KEYS; first += BLOCK) {
            tile a = make_tile(rows, KEYS - first < BLOCK ? KEYS - first : BLOCK, 8, SIZE, TFM_F32, TFM_F32, 0);
            k->attn_scores(&a.t);
            for (r = 0; r < rows; r++)
                for (j = 0; j < a.t.keys; j++) {
                    float *s = a.t.scores + r * BLOCK + j;
                    *s *= 4;
                    if (uniform() < 0.1 || (r == 1 && first < 2 * BLOCK)) *s = (float)-HUGE_VAL;
                    score[r][first + j] = (double)*s;
                }
            for (j = 0; j < a.t.keys; j++)
                for (i = 0; i < SIZE; i++) value[first + j][i] = (double)element(a.t.v, TFM_F32, j * SIZE + i);
            k->attn_reduce(&a.t);
            k->attn_merge(1, rows, SIZE, max, sum, out, SIZE, a.t.max, a.t.sum, a.t.out, SIZE);
        }
        for (r = 0; r < rows; r++) {
            double exact[SIZE], top = -HUGE_VAL, total = 0;
            memset(exact, 0, sizeof exact);
            for (j = 0; j < KEYS; j++)
                if (score[r][j] > top) top = score[r][j];
            for (j = 0; j < KEYS; j++) {
                const double w = exp(score[r][j] - top);
                total += w;
                for (i = 0; i < SIZE; i++) exact[i] += w * value[j][i];
            }
            CHECK((double)max[r] == top, "%s: maximum of row %d", k->name, (int)r);
            for (i = 0; i < SIZE; i++)
                CHECK(fabs((double)out[r * SIZE + i] / (double)sum[r] - exact[i] / total)
                          < budget[BUDGET_ATTENTION].most,
                      "%s: (%d, %d)", k->name, (int)r, (int)i);
        }
    }
}

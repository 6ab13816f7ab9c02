/* Products: tfm_matmul, tfm_linear, tfm_embedding. Values against doubles, and the promise that the bits of an
 * output do not depend on anything but its own row and column. */
#include "op_helpers.h"

static const int floats[3] = {TFM_F32, TFM_F16, TFM_BF16};

/* -- references ---------------------------------------------------------------------------------------------------- */

/* y (rows, cols) is a (rows, depth) times b (depth, cols), which are 2-D. */
static void check_product(const tfm_tensor *y, const tfm_tensor *a, const tfm_tensor *b) {
    const int64_t rows = a->shape[0], depth = a->shape[1], cols = b->shape[1];
    int64_t r, j, k;
    cr_assert(y->ndim == 2 && y->shape[0] == rows && y->shape[1] == cols);
    cr_assert(y->dtype == (a->dtype == b->dtype ? a->dtype : TFM_F32));
    for (r = 0; r < rows; r++) {
        for (j = 0; j < cols; j++) {
            double sum = 0, absolute = 0;
            for (k = 0; k < depth; k++) {
                int64_t at[2], bt[2];
                double x;
                at[0] = r, at[1] = bt[0] = k, bt[1] = j;
                x = tfm_get(a, at) * tfm_get(b, bt);
                sum += x;
                absolute += fabs(x);
            }
            cr_assert(near(element(y, r * cols + j), sum,
                           fabs(sum) * dtype_epsilon(y->dtype) + 6e-8 * absolute * sqrt((double)depth + 4) + 1e-12),
                      "(%lld x %lld x %lld) [%lld, %lld] is %.9g, expected %.9g", (long long)rows, (long long)depth,
                      (long long)cols, (long long)r, (long long)j, element(y, r * cols + j), sum);
        }
    }
}

/* The parameter `weight` holds these values, packed when asked. */
static tfm_tensor *parameter(tfm_ctx *c, tfm_params *p, const char *name, const tfm_tensor *values) {
    tfm_tensor *t = tfm_params_add(c, p, name, values->dtype, tfm_shape_like(values));
    assert_made(c, t);
    assert_ok(c, tfm_copy(c, tfm_params_write_begin(c, p, name), values));
    assert_ok(c, tfm_params_write_end(c, p, name));
    return t;
}

/* A packed copy of values (2-D) made by hand: the format is part of the design, not of the code under test. */
static tfm_tensor packed(const tfm_tensor *values, void *memory) {
    const int64_t rows = values->shape[0], cols = values->shape[1], size = tfm_dtype_size(values->dtype);
    tfm_tensor t;
    int64_t r, k;
    memset(&t, 0, sizeof t);
    memset(memory, 0, (size_t)((rows + 15) / 16 * 16 * cols * size));
    for (r = 0; r < rows; r++) {
        for (k = 0; k < cols; k++) {
            memcpy((char *)memory + (r / 16 * 16 * cols + k * 16 + r % 16) * size,
                   (const char *)values->data + (r * values->stride[0] + k * values->stride[1]) * size, (size_t)size);
        }
    }
    t.dtype = values->dtype;
    t.ndim = 2;
    t.shape[0] = rows;
    t.shape[1] = cols;
    t.stride[0] = cols;
    t.stride[1] = 1;
    t.layout = TFM_PANELS;
    t.panels = memory;
    t.generation = 1;
    return t;
}

/* -- values -------------------------------------------------------------------------------------------------------- */

Test(matmul, every_small_size_against_doubles) {
    TEST_EACH_ISA(c, 1) {
        static const int64_t sizes[] = {0, 1, 2, 3, 5, 12, 13, 15, 16, 17, 33, 65};
        int m, n, k;
        for (m = 0; m < 12; m += test_quick() ? 3 : 1) {
            for (n = 0; n < 12; n++) {
                for (k = 0; k < 12; k += 1 + (m + n) % 3) {
                    const tfm_marker mark = tfm_mark(c);
                    tfm_tensor *a = plain(c, TFM_SHAPE(sizes[m], sizes[k]), 1),
                               *b = plain(c, TFM_SHAPE(sizes[k], sizes[n]), 2);
                    tfm_tensor *y = tfm_matmul(c, a, b);
                    assert_made(c, y);
                    check_product(y, a, b);
                    tfm_rewind(c, mark);
                }
            }
        }
    }
}

Test(matmul, every_layout_and_dtype_against_doubles) {
    TEST_EACH_ISA(c, 2) {
        int la, lb, da, db;
        for (la = 0; la < LAYOUTS; la++) {
            for (lb = 0; lb < LAYOUTS; lb++) {
                for (da = 0; da < 3; da++) {
                    for (db = 0; db < 3; db++) {
                        const tfm_marker mark = tfm_mark(c);
                        tfm_tensor *a = lying(c, floats[da], TFM_SHAPE(14, 21), la, 1, 1),
                                   *b = lying(c, floats[db], TFM_SHAPE(21, 35), lb, 1, 2);
                        tfm_tensor *y = tfm_matmul(c, a, b);
                        assert_made(c, y);
                        check_product(y, a, b);
                        tfm_rewind(c, mark);
                    }
                }
            }
        }
    }
}

Test(matmul, across_every_block_edge_against_doubles) {
    TEST_EACH_ISA(c, 2) {
        const int64_t rows = test_quick() ? 30 : 201, depth = test_quick() ? 50 : 801, cols = test_quick() ? 40 : 275;
        int transposed;
        for (transposed = 0; transposed < 2; transposed++) {
            tfm_tensor *a = plain(c, TFM_SHAPE(rows, depth), 1), *b = plain(c, TFM_SHAPE(depth, cols), 2);
            if (transposed) {
                a = tfm_transpose(c, plain(c, TFM_SHAPE(depth, rows), 1), 0, 1);
                b = tfm_transpose(c, plain(c, TFM_SHAPE(cols, depth), 2), 0, 1);
            }
            check_product(tfm_matmul(c, a, b), a, b);
        }
    }
}

/* Shapes of torch.matmul: the result's shape, and each matrix of it against the 2-D product of its operands. */
Test(matmul, shapes_are_torchs) {
    TEST_EACH_ISA(c, 2) {
        tfm_tensor *v = plain(c, TFM_SHAPE(6), 1), *m = plain(c, TFM_SHAPE(5, 6), 2), *n = plain(c, TFM_SHAPE(6, 4), 3);
        tfm_tensor *b = plain(c, TFM_SHAPE(3, 1, 5, 6), 4), *d = plain(c, TFM_SHAPE(2, 6, 4), 5), *y;
        int64_t i, j;
        assert_shape(c, tfm_matmul(c, v, v), scalar_shape());
        assert_shape(c, tfm_matmul(c, m, v), TFM_SHAPE(5));
        assert_shape(c, tfm_matmul(c, v, n), TFM_SHAPE(4));
        assert_shape(c, tfm_matmul(c, b, v), TFM_SHAPE(3, 1, 5));
        assert_shape(c, tfm_matmul(c, v, d), TFM_SHAPE(2, 4));
        assert_shape(c, tfm_matmul(c, b, n), TFM_SHAPE(3, 1, 5, 4));
        y = tfm_matmul(c, b, d);
        assert_shape(c, y, TFM_SHAPE(3, 2, 5, 4));
        for (i = 0; i < 3; i++) {
            for (j = 0; j < 2; j++) {
                tfm_tensor *left = tfm_select(c, tfm_select(c, b, 0, i), 0, 0), *right = tfm_select(c, d, 0, j);
                assert_same_tensor(c, tfm_select(c, tfm_select(c, y, 0, i), 0, j), tfm_matmul(c, left, right));
            }
        }
        assert_same_tensor(c, tfm_matmul(c, m, v), tfm_squeeze(c, tfm_matmul(c, m, tfm_unsqueeze(c, v, 1)), 1));
        assert_same_tensor(c, tfm_matmul(c, v, n), tfm_squeeze(c, tfm_matmul(c, tfm_unsqueeze(c, v, 0), n), 0));
        assert_shape(c, tfm_matmul(c, tfm_zeros(c, TFM_SHAPE(0, 5, 6)), n), TFM_SHAPE(0, 5, 4));
        y = tfm_matmul(c, tfm_zeros(c, TFM_SHAPE(5, 0)), tfm_zeros(c, TFM_SHAPE(0, 4)));
        assert_shape(c, y, TFM_SHAPE(5, 4));
        for (i = 0; i < 20; i++) cr_assert(element(y, i) == 0);
    }
}

Test(matmul, impossible_ones_are_refused) {
    tfm_ctx *c = context(1);
    tfm_tensor *m = tfm_ones(c, TFM_SHAPE(5, 6));
    cr_assert(tfm_matmul(c, m, m) == NULL);
    assert_error_says(c, "tfm_matmul: a is f32 (5, 6), b is f32 (5, 6)");
    cr_assert_null(tfm_matmul(c, m, tfm_ones(c, TFM_SHAPE(5))));
    assert_error_says(c, "the last size of a and the only size of b differ");
    cr_assert_null(tfm_matmul(c, m, tfm_ones(c, scalar_shape())));
    assert_error_says(c, "expected 1 dim or more");
    assert_refused(c, tfm_matmul(c, tfm_ones(c, TFM_SHAPE(2, 5, 6)), tfm_ones(c, TFM_SHAPE(3, 6, 5))), TFM_INVALID);
    assert_refused(c, tfm_matmul(c, m, tfm_full(c, TFM_I64, TFM_SHAPE(6, 5), 1)), TFM_INVALID);
    tfm_destroy(c);
}

Test(matmul, nan_and_infinity_go_where_arithmetic_sends_them) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *a = tfm_ones(c, TFM_SHAPE(15, 20)), *b = tfm_ones(c, TFM_SHAPE(20, 18)), *y;
        const int64_t at[2] = {7, 3}, bt[2] = {4, 17};
        assert_ok(c, tfm_set(c, a, at, NAN));
        assert_ok(c, tfm_set(c, b, bt, HUGE_VAL));
        y = tfm_matmul(c, a, b);
        cr_assert(isnan(element(y, 7 * 18)) && isnan(element(y, 7 * 18 + 17)) && element(y, 17) == HUGE_VAL &&
                  element(y, 16) == 20);
    }
}

/* -- linear -------------------------------------------------------------------------------------------------------- */

Test(linear, is_activation_of_product_plus_bias) {
    TEST_EACH_ISA(c, 2) {
        int act, d, w;
        for (act = 0; act < TFM_ACT_COUNT; act++) {
            for (d = 0; d < 3; d++) {
                for (w = 0; w < 3; w++) {
                    const tfm_marker mark = tfm_mark(c);
                    tfm_tensor *x = lying(c, floats[d], TFM_SHAPE(2, 3, 20), (act + w) % LAYOUTS, 1, 1),
                               *weight = lying(c, floats[w], TFM_SHAPE(35, 20), act % LAYOUTS, 1, 2);
                    tfm_tensor *bias = lying(c, floats[(d + w) % 3], TFM_SHAPE(35), (d + w) % 3, 1, 3),
                               *y = tfm_linear(c, x, weight, bias, act);
                    tfm_tensor *wide =
                        tfm_matmul(c, tfm_cast(c, x, TFM_F32), tfm_transpose(c, tfm_cast(c, weight, TFM_F32), 0, 1));
                    tfm_tensor *want = tfm_activation(c, tfm_add(c, wide, tfm_cast(c, bias, TFM_F32)), act);
                    assert_shape(c, y, TFM_SHAPE(2, 3, 35));
                    cr_assert(y->dtype == (d == w ? floats[d] : TFM_F32));
                    assert_tensor_close(c, y, want, dtype_epsilon(y->dtype) * 1.05 + 2e-6, 2e-6);
                    tfm_rewind(c, mark);
                }
            }
        }
    }
}

Test(linear, impossible_ones_are_refused) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(2, 6)), *w = tfm_ones(c, TFM_SHAPE(5, 6));
    assert_refused(c, tfm_linear(c, x, tfm_ones(c, TFM_SHAPE(6, 5)), NULL, 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, tfm_ones(c, TFM_SHAPE(6)), NULL, 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, tfm_ones(c, scalar_shape()), w, NULL, 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, w, tfm_ones(c, TFM_SHAPE(6)), 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, w, tfm_ones(c, TFM_SHAPE(1, 5)), 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, w, tfm_ones(c, TFM_SHAPE(5, 1)), 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, w, tfm_full(c, TFM_I32, TFM_SHAPE(5), 1), 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, tfm_full(c, TFM_I32, TFM_SHAPE(5, 6), 1), NULL, 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, tfm_ones(c, TFM_SHAPE(5, 6, 1)), NULL, 0), TFM_INVALID);
    assert_refused(c, tfm_linear(c, x, w, NULL, 8), TFM_INVALID);
    assert_shape(c, tfm_linear(c, tfm_ones(c, TFM_SHAPE(6)), w, NULL, 0), TFM_SHAPE(5));
    assert_shape(c, tfm_linear(c, tfm_ones(c, TFM_SHAPE(0, 6)), w, NULL, 0), TFM_SHAPE(0, 5));
    tfm_destroy(c);
}

Test(linear, without_inputs_is_activation_of_the_bias) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *bias = plain(c, TFM_SHAPE(20), 1);
        tfm_tensor *x = tfm_ones(c, TFM_SHAPE(3, 0)), *weight = tfm_ones(c, TFM_SHAPE(20, 0));
        tfm_tensor panels = packed(weight, x), *y = tfm_linear(c, x, weight, bias, TFM_ACT_RELU);
        assert_same_tensor(c, tfm_select(c, y, 0, 2), tfm_relu(c, bias));
        assert_same_tensor(c, tfm_linear(c, x, &panels, bias, TFM_ACT_RELU), y);
        bias = tfm_slice(c, plain(c, TFM_SHAPE(40), 1), 0, 0, 40, 2);
        y = tfm_linear(c, x, weight, bias, TFM_ACT_NONE);
        assert_same_tensor(c, tfm_select(c, y, 0, 2), bias);
    }
}

/* -- bits ---------------------------------------------------------------------------------------------------------- */

static int64_t size_case(int i) {
    static const int64_t sizes[] = {1, 7, 64, 100, 384, 401, 770};
    return sizes[i];
}

Test(matmul, one_row_has_the_bits_of_many_rows) {
    TEST_EACH_ISA(c, 1) {
        int k, n;
        for (k = 0; k < (test_quick() ? 3 : 7); k++) {
            for (n = 0; n < 5; n++) {
                const tfm_marker mark = tfm_mark(c);
                tfm_tensor *a = plain(c, TFM_SHAPE(40, size_case(k)), 1),
                           *b = plain(c, TFM_SHAPE(size_case(k), size_case(n)), 2), *y = tfm_matmul(c, a, b);
                int64_t r;
                for (r = 0; r < 40; r += 13) {
                    assert_same_tensor(c, tfm_matmul(c, tfm_narrow(c, a, 0, r, 1), b), tfm_narrow(c, y, 0, r, 1));
                }
                for (r = 2; r < 40; r += 7) {
                    assert_same_tensor(c, tfm_matmul(c, tfm_narrow(c, a, 0, 0, r), b), tfm_narrow(c, y, 0, 0, r));
                }
                tfm_rewind(c, mark);
            }
        }
    }
}

Test(matmul, one_column_has_the_bits_of_many_columns) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *a = plain(c, TFM_SHAPE(14, 401), 1), *b = plain(c, TFM_SHAPE(401, 70), 2), *y = tfm_matmul(c, a, b);
        int64_t j;
        for (j = 0; j < 70; j += 3)
            assert_same_tensor(c, tfm_matmul(c, a, tfm_narrow(c, b, 1, j, 1)), tfm_narrow(c, y, 1, j, 1));
        for (j = 2; j < 70; j += 5) {
            assert_same_tensor(c, tfm_matmul(c, a, tfm_narrow(c, b, 1, 70 - j, j)), tfm_narrow(c, y, 1, 70 - j, j));
        }
    }
}

Test(matmul, layout_of_operands_does_not_change_bits) {
    TEST_EACH_ISA(c, 2) {
        static const int64_t rows[] = {1, 3, 30, 200};
        int i;
        for (i = 0; i < (test_quick() ? 3 : 4); i++) {
            const tfm_marker mark = tfm_mark(c);
            tfm_tensor *a = plain(c, TFM_SHAPE(rows[i], 401), 1), *b = plain(c, TFM_SHAPE(401, 300), 2),
                       *y = tfm_matmul(c, a, b);
            tfm_tensor *at = tfm_transpose(c, tfm_clone(c, tfm_transpose(c, a, 0, 1)), 0, 1),
                       *bt = tfm_transpose(c, tfm_clone(c, tfm_transpose(c, b, 0, 1)), 0, 1);
            assert_same_tensor(c, tfm_matmul(c, at, b), y);
            assert_same_tensor(c, tfm_matmul(c, a, bt), y);
            assert_same_tensor(c, tfm_matmul(c, at, bt), y);
            assert_same_tensor(c, tfm_linear(c, a, tfm_transpose(c, b, 0, 1), NULL, 0), y);
            tfm_rewind(c, mark);
        }
    }
}

Test(matmul, the_product_of_a_batch_has_the_bits_of_each) {
    TEST_EACH_ISA(c, 3) {
        tfm_tensor *a = plain(c, TFM_SHAPE(3, 4, 33, 65), 1),
                   *b = tfm_transpose(c, plain(c, TFM_SHAPE(3, 40, 4, 65), 2), 1, 2), *y;
        int64_t i, h;
        y = tfm_matmul(c, a, tfm_transpose(c, b, 2, 3));
        assert_shape(c, y, TFM_SHAPE(3, 4, 33, 40));
        for (i = 0; i < 3; i++) {
            for (h = 0; h < 4; h++) {
                tfm_tensor *left = tfm_select(c, tfm_select(c, a, 0, i), 0, h),
                           *right = tfm_select(c, tfm_select(c, b, 0, i), 0, h);
                assert_same_tensor(c, tfm_select(c, tfm_select(c, y, 0, i), 0, h),
                                   tfm_matmul(c, left, tfm_transpose(c, right, 0, 1)));
            }
        }
    }
}

/* One row of each: what is one product of many rows where the right side is shared. */
Test(matmul, a_batch_of_single_rows_has_a_right_side_each) {
    TEST_EACH_ISA(c, 2) {
        tfm_tensor *a = plain(c, TFM_SHAPE(5, 1, 40), 1), *b = plain(c, TFM_SHAPE(5, 40, 33), 2);
        tfm_tensor *y = tfm_matmul(c, a, b);
        int64_t i;
        for (i = 0; i < 5; i++) {
            tfm_tensor *alone = tfm_matmul(c, tfm_select(c, a, 0, i), tfm_select(c, b, 0, i));
            assert_same_tensor(c, tfm_select(c, y, 0, i), alone);
        }
    }
}

/* Sizes at which the blocks of a product would not fit the scratch of a thread if they were not cut: many rows and
 * columns of halves, deep rows that are converted, a long bias that is. What is written behind a block of memory shows
 * when it is freed. */
Test(products, no_size_is_too_large_for_the_scratch) {
    static const struct { int64_t rows, outs, ins; int threads; } sizes[] = {
        {30, 64, 100, 3}, {144, 700, 20, 1}, {1000, 70, 20, 1}, {1, 2, 300000, 3},
        {12, 16, 30000, 3}, {40, 33, 2306, 3}, {2, 50000, 2, 1}};
    enum { SIZES = (int)(sizeof sizes / sizeof sizes[0]) };
    int isa, i, d, dot;
    for (isa = 0; isa < TEST_ISAS; isa++)
        for (i = 0; i < SIZES; i++)
            for (dot = 0; dot <= (sizes[i].ins > 2000 && sizes[i].rows > 1); dot++) {
                const int64_t m = sizes[i].rows, n = sizes[i].outs, k = sizes[i].ins;
                test_memory memory = test_memory_new();
                void *room = malloc((size_t)((n + 15) / 16 * 16 * k * 4));
                tfm_options o;
                tfm_ctx *c;
                if (!tfm_isa_supported(test_isa(isa))) {
                    free(room);
                    continue;
                }
                memset(&o, 0, sizeof o);
                o.isa = test_isa(isa);
                o.threads = sizes[i].threads;
                o.bf16_dot = dot;
                o.allocator = test_allocator(&memory);
                c = tfm_create(&o);
                cr_assert_not_null(c);
                for (d = 0; d < 4; d++) { /* of x and weight: both, either or none in bf16 */
                    const tfm_marker mark = tfm_mark(c);
                    tfm_tensor *x = tfm_cast(c, tfm_randn(c, TFM_SHAPE(m, k)), d & 1 ? TFM_BF16 : TFM_F32);
                    tfm_tensor *w = tfm_cast(c, tfm_randn(c, TFM_SHAPE(n, k)), d & 2 ? TFM_BF16 : TFM_F32);
                    tfm_tensor *bias = tfm_cast(c, tfm_randn(c, TFM_SHAPE(n)), TFM_BF16), *y, *last;
                    tfm_tensor panels;
                    assert_made(c, x);
                    panels = packed(w, room);
                    y = tfm_linear(c, x, &panels, bias, TFM_ACT_NONE);
                    last = tfm_linear(c, tfm_narrow(c, x, 0, m - 1, 1), &panels, bias, TFM_ACT_NONE);
                    assert_same_tensor(c, tfm_narrow(c, y, 0, m - 1, 1), last);
                    if (!dot) assert_same_tensor(c, tfm_linear(c, x, w, bias, TFM_ACT_NONE), y);
                    tfm_rewind(c, mark);
                }
                tfm_destroy(c);
                assert_no_leak(&memory);
                free(room);
            }
}

/* Many rows read a wide right side in place once and keep it as panels; its last columns are no whole tile. */
Test(matmul, a_wide_right_side_has_the_bits_of_a_packed_weight) {
    TEST_EACH_ISA(c, 2) {
        static const int64_t rows[] = {17, 25, 49, 131, 300}, cols[] = {544, 600, 650};
        void *memory = malloc(656 * 401 * 4);
        for (int i = 0; i < 3; i++) {
            const tfm_marker mark = tfm_mark(c);
            tfm_tensor *b = plain(c, TFM_SHAPE(401, cols[i]), 2);
            tfm_tensor panels = packed(tfm_contiguous(c, tfm_transpose(c, b, 0, 1)), memory);
            for (int j = 0; j < (test_quick() ? 4 : 5); j++) {
                tfm_tensor *a = plain(c, TFM_SHAPE(rows[j], 401), 1), *bias = plain(c, TFM_SHAPE(cols[i]), 3);
                assert_same_tensor(c, tfm_linear(c, a, &panels, NULL, TFM_ACT_NONE), tfm_matmul(c, a, b));
                assert_same_tensor(c, tfm_linear(c, a, &panels, bias, TFM_ACT_NONE),
                                   tfm_linear(c, a, tfm_transpose(c, b, 0, 1), bias, TFM_ACT_NONE));
                assert_same_tensor(c, tfm_linear(c, a, &panels, bias, TFM_ACT_NONE),
                                   tfm_add(c, tfm_matmul(c, a, b), bias));
            }
            tfm_rewind(c, mark);
        }
        free(memory);
    }
}

/* As far apart as in a panel, but no panels: they overlap, or hold a row. */
Test(matmul, rows_16_elements_apart_are_no_panels) {
    TEST_EACH_ISA(c, 1) {
        static const int64_t sizes[][3] = {{1, 100, 70}, {9, 100, 70}, {12, 100, 16}, {30, 100, 100}, {12, 100, 4104}, {9, 1, 5190}};
        static const int64_t strides[] = {16, 1};
        int d, i;
        for (d = 0; d < 3; d++)
            for (i = 0; i < 6; i++) {
                const tfm_marker mark = tfm_mark(c);
                const int64_t m = sizes[i][0], k = sizes[i][1], n = sizes[i][2];
                tfm_tensor *a = lying(c, floats[d], TFM_SHAPE(m, k), LIES_PLAIN, 1, 1);
                tfm_tensor *all = lying(c, floats[d], TFM_SHAPE((k - 1) * 16 + n), LIES_PLAIN, 1, 2);
                tfm_tensor *b = tfm_wrap_strided(c, floats[d], TFM_SHAPE(k, n), strides, all->data);
                assert_same_tensor(c, tfm_matmul(c, a, b), tfm_matmul(c, a, tfm_contiguous(c, b)));
                tfm_rewind(c, mark);
            }
    }
}

Test(linear, packed_and_plain_weights_have_the_same_bits) {
    TEST_EACH_ISA(c, 2) {
        static const int64_t rows[] = {1, 2, 3, 4, 5, 14, 90, 200};
        void *memory = malloc(320 * 401 * 4);
        int d, e, i;
        for (d = 0; d < 3; d++) {
            const tfm_marker mark = tfm_mark(c);
            tfm_tensor *weight = lying(c, floats[d], TFM_SHAPE(310, 401), LIES_PLAIN, 1, 2),
                       *bias = plain(c, TFM_SHAPE(310), 3);
            tfm_tensor panels = packed(weight, memory);
            for (e = 0; e < 3; e++)
                for (i = 0; i < (test_quick() ? 6 : 8); i++) {
                    tfm_tensor *x = lying(c, floats[e], TFM_SHAPE(rows[i], 401), LIES_PLAIN, 1, 1);
                    tfm_tensor *last = tfm_narrow(c, x, 0, rows[i] - 1, 1), *y = tfm_linear(c, x, weight, bias, TFM_ACT_GELU);
                    assert_same_tensor(c, tfm_linear(c, x, &panels, bias, TFM_ACT_GELU), y);
                    assert_same_tensor(c, tfm_linear(c, last, &panels, bias, TFM_ACT_GELU), tfm_narrow(c, y, 0, rows[i] - 1, 1));
                }
            tfm_rewind(c, mark);
        }
        free(memory);
    }
}

Test(linear, a_parameter_gives_the_same_bits_before_and_after_packing) {
    tfm_ctx *c = context(2);
    tfm_params *p = tfm_params_create(c);
    tfm_linear_layer layer;
    tfm_tensor *x = plain(c, TFM_SHAPE(7, 50), 1), *before, *after;
    memset(&layer, 0, sizeof layer);
    assert_ok(c, tfm_linear_init(c, p, "l", 50, 70, 0, &layer));
    assert_ok(c, tfm_copy(c, tfm_params_write_begin(c, p, "l.weight"), plain(c, TFM_SHAPE(70, 50), 2)));
    assert_ok(c, tfm_params_write_end(c, p, "l.weight"));
    before = tfm_linear(c, x, tfm_params_find(p, "l.weight"), NULL, 0);
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert(tfm_params_find(p, "l.weight")->layout == TFM_PANELS);
    after = tfm_linear(c, x, tfm_params_find(p, "l.weight"), NULL, 0);
    assert_same_tensor(c, before, after);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* Products of several kinds, one after the other. */
static int64_t run_products(tfm_ctx *c, float *out, int64_t room, void *memory) {
    const int64_t depth = test_quick() ? 130 : 500;
    tfm_tensor *a = plain(c, TFM_SHAPE(3, 210, depth), 1), *b = plain(c, TFM_SHAPE(depth, 333), 2),
               *w = plain(c, TFM_SHAPE(333, depth), 3), *list[12];
    tfm_tensor *h = tfm_cast(c, a, TFM_BF16), *bh = tfm_cast(c, b, TFM_BF16), panels = packed(w, memory);
    int64_t used = 0;
    int n = 0, i;
    list[n++] = tfm_matmul(c, a, b);
    list[n++] = tfm_matmul(c, h, bh);
    list[n++] = tfm_linear(c, a, w, NULL, TFM_ACT_SILU);
    list[n++] = tfm_linear(c, a, &panels, NULL, 0);
    list[n++] = tfm_linear(c, tfm_select(c, tfm_select(c, a, 0, 0), 0, 0), &panels, NULL, 0);
    list[n++] = tfm_linear(c, tfm_select(c, tfm_select(c, a, 0, 0), 0, 0), w, NULL, 0);
    list[n++] = tfm_matmul(c, tfm_select(c, tfm_select(c, a, 0, 0), 0, 0), b);
    list[n++] = tfm_matmul(c, a, tfm_transpose(c, a, 1, 2));
    for (i = 0; i < n; i++) {
        assert_made(c, list[i]);
        cr_assert(used + tfm_numel(list[i]) <= room);
        assert_ok(c, tfm_read(c, list[i], out + used, tfm_numel(list[i])));
        used += tfm_numel(list[i]);
    }
    return used;
}

Test(products, any_number_of_threads_gives_the_same_bits) {
    const int64_t room = 1200000;
    float *first = (float *)malloc((size_t)room * 4), *now = (float *)malloc((size_t)room * 4);
    void *memory = malloc(336 * 500 * 4);
    static const int counts[] = {1, 2, 3, 7};
    int isa, i;
    for (isa = 0; isa < TEST_ISAS; isa++) {
        for (i = 0; i < 4; i++) {
            tfm_ctx *c = test_isa_context(isa, counts[i]);
            int64_t used;
            if (!c) continue;
            used = run_products(c, i ? now : first, room, memory);
            if (i) assert_same_bytes(now, first, used * 4);
            tfm_destroy(c);
        }
    }
    free(memory);
    free(first);
    free(now);
}

/* -- BF16 dot products --------------------------------------------------------------------------------------------- */

static tfm_ctx *dot_context(const char *isa, int threads) {
    tfm_options options;
    memset(&options, 0, sizeof options);
    options.isa = isa;
    options.threads = threads;
    options.bf16_dot = 1;
    return tfm_create(&options);
}

static int processor_has_bf16_dot(void) {
#if (defined(__x86_64__) || defined(__i386__)) && \
    (defined(__clang__) ? defined(__SSE2__) && __clang_major__ != 16 : __GNUC__ >= 10)
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* x (rows, in) of the context's own, always the same numbers, times panels. */
static tfm_tensor *times(tfm_ctx *c, const tfm_tensor *panels, int dtype, int64_t rows, tfm_tensor **x) {
    *x = lying(c, dtype, TFM_SHAPE(rows, panels->shape[1]), LIES_PLAIN, 1, 1);
    return tfm_linear(c, *x, panels, NULL, TFM_ACT_NONE);
}

/* y is x times weight, within the bound that the option's comment states. 1: some output is not that of `exact`. */
static int check_dot(const tfm_tensor *y, const tfm_tensor *exact, const tfm_tensor *x, const tfm_tensor *weight) {
    const int64_t count = tfm_numel(y), out = weight->shape[0], in = weight->shape[1], step = 1 + count / 300;
    int64_t at, k;
    int differs = 0;
    for (at = 0; at < count; at += step) {
        const double is = element(y, at);
        double sum = 0, size = 0;
        for (k = 0; k < in; k++) {
            const double t = element(x, at / out * in + k) * element(weight, at % out * in + k);
            sum += t;
            size += fabs(t);
        }
        differs |= is != element(exact, at);
        cr_assert(fabs(is - sum) <= size * (1.0 / 256 + 1e-6) + fabs(sum) * dtype_epsilon(y->dtype),
                  "%d x %d [%d] is %.9g, exactly %.9g", (int)out, (int)in, (int)at, is, sum);
    }
    return differs;
}

/* Within the documented bound of the exact product; the same bits in any number of rows and threads; where the option
 * finds nothing to work with (no such processor, an odd depth, a weight of another dtype), what comes without it. */
Test(products, bf16_dot_stays_within_its_bound_and_keeps_its_bits) {
    static const int rows[] = {1, 2, 7, 8, 9, 13, 25, 48, 150}, outs[] = {5, 16, 33, 70, 130};
    static const int ins[] = {2, 34, 101, 770, 1602};
    void *memory = malloc(144 * 1602 * 4);
    int n;
    TEST_EACH_ISA(without, 1) {
        tfm_ctx *c = dot_context(tfm_isa_name(without), 1), *team = dot_context(tfm_isa_name(without), 3);
        for (n = 0; n < 9 * 5 * 3; n++) {
            const int64_t m = rows[n / 15], in = ins[(n / 3 + n / 15) % 5], out = outs[n / 3 % 5];
            const int dtype = floats[n % 3], of_x = floats[n / 3 % 2 * 2];
            const int there = processor_has_bf16_dot() && !strcmp(tfm_isa_name(c), "avx512") && in % 2 == 0;
            const tfm_marker mark = tfm_mark(c), mark2 = tfm_mark(without), mark3 = tfm_mark(team);
            tfm_tensor *weight = lying(without, dtype, TFM_SHAPE(out, in), LIES_PLAIN, 1, 2), *x, *x2, *x3;
            const tfm_tensor panels = packed(weight, memory);
            tfm_tensor *exact = times(without, &panels, of_x, m, &x), *y = times(c, &panels, of_x, m, &x2);
            tfm_tensor *last = tfm_linear(c, tfm_narrow(c, x2, 0, m - 1, 1), &panels, NULL, TFM_ACT_NONE);
            int differs;
            assert_made(c, y);
            assert_same_bytes(times(team, &panels, of_x, m, &x3)->data, y->data, m * out * tfm_dtype_size(y->dtype));
            assert_same_tensor(c, last, tfm_narrow(c, y, 0, m - 1, 1));
            if (y->dtype == TFM_F32) {
                tfm_tensor *bias = plain(c, TFM_SHAPE(out), 3);
                assert_same_tensor(c, tfm_linear(c, x2, &panels, bias, TFM_ACT_NONE), tfm_add(c, y, bias));
            }
            differs = check_dot(y, exact, x, weight);
            cr_assert((there && dtype == TFM_BF16) || !differs, "%s: other bits", tfm_isa_name(c));
            cr_assert(!there || dtype != TFM_BF16 || differs || of_x == TFM_BF16 || in * out < 600,
                      "%d x %d x %d: the option does nothing", (int)m, (int)out, (int)in);
            tfm_rewind(c, mark);
            tfm_rewind(without, mark2);
            tfm_rewind(team, mark3);
        }
        tfm_destroy(c);
        tfm_destroy(team);
    }
    free(memory);
}

/* -- memory -------------------------------------------------------------------------------------------------------- */

Test(products, tiny_ones_take_nothing_but_the_result) {
    tfm_ctx *c = context(1);
    tfm_tensor *a = plain(c, TFM_SHAPE(8, 8), 1);
    tfm_marker mark = tfm_mark(c);
    int64_t calls, i;
    tfm_matmul(c, a, tfm_transpose(c, a, 0, 1));
    tfm_rewind(c, mark);
    calls = tfm_memory_usage(c).allocations;
    for (i = 0; i < 3000; i++) {
        const int64_t before = (tfm_memory_reset(c), tfm_memory_usage(c).arena_used);
        cr_assert(tfm_matmul(c, a, a) != NULL);
        cr_assert(tfm_memory_usage(c).arena_peak - before <= 8 * 8 * 4 + 64);
        tfm_rewind(c, mark);
    }
    cr_assert(tfm_memory_usage(c).allocations == calls);
    tfm_destroy(c);
}

Test(products, the_measure_is_what_a_run_takes) {
    tfm_ctx *c = context(2);
    tfm_tensor *a = plain(c, TFM_SHAPE(300, 700), 1), *w = plain(c, TFM_SHAPE(500, 700), 2);
    const tfm_marker mark = tfm_mark(c);
    tfm_memory planned;
    int64_t before;
    tfm_measure_begin(c);
    cr_assert(tfm_linear(c, a, w, NULL, 0) != NULL, "%s", tfm_error(c));
    assert_ok(c, tfm_measure_end(c, &planned));
    tfm_memory_reset(c);
    before = tfm_memory_usage(c).arena_used;
    cr_assert(tfm_linear(c, a, w, NULL, 0) != NULL);
    cr_assert(tfm_memory_usage(c).arena_peak - before == planned.arena_peak, "%lld, planned %lld",
              (long long)(tfm_memory_usage(c).arena_peak - before), (long long)planned.arena_peak);
    tfm_rewind(c, mark);
    tfm_destroy(c);
}

static void make_products(tfm_ctx *c, void *user) {
    tfm_tensor *a = tfm_ones(c, TFM_SHAPE(300, 600)), *b = tfm_ones(c, TFM_SHAPE(600, 500));
    (void)user;
    tfm_matmul(c, a, b);
    tfm_linear(c, a, tfm_transpose(c, b, 0, 1), NULL, 0);
    tfm_embedding(c, b, tfm_arange(c, TFM_I64, 0, 600, 1));
}

Test(products, every_failing_allocation_is_an_error_and_no_leak) {
    test_each_allocation_failing(make_products, NULL, NULL);
}

/* -- embedding ----------------------------------------------------------------------------------------------------- */

Test(embedding, reads_rows_of_plain_and_packed_tables_as_f32) {
    TEST_EACH_ISA(c, 2) {
        void *memory = malloc(48 * 21 * 4);
        int d, layout;
        for (d = 0; d < 3; d++) {
            for (layout = 0; layout < LAYOUTS; layout++) {
                tfm_tensor *table = lying(c, floats[d], TFM_SHAPE(40, 21), layout, 1, 1),
                           *ids = lying(c, layout % 2 ? I64 : I32, TFM_SHAPE(3, 5), layout, 1, 2);
                tfm_tensor panels = packed(table, memory), *y = tfm_embedding(c, table, ids);
                int64_t i, j;
                assert_shape(c, y, TFM_SHAPE(3, 5, 21));
                cr_assert(y->dtype == TFM_F32);
                for (i = 0; i < 15; i++) {
                    for (j = 0; j < 21; j++) {
                        cr_assert(element(y, i * 21 + j) == element(table, (int64_t)element(ids, i) * 21 + j));
                    }
                }
                assert_same_tensor(c, tfm_embedding(c, &panels, ids), y);
            }
        }
        free(memory);
    }
}

Test(embedding, a_bad_id_is_named_with_position_and_limit) {
    tfm_ctx *c = context(1);
    const int32_t ids[4] = {0, 3, 4, -1};
    tfm_tensor *table = tfm_ones(c, TFM_SHAPE(4, 2));
    cr_assert(tfm_embedding(c, table, tfm_from(c, TFM_I32, TFM_SHAPE(2, 2), ids)) == NULL);
    assert_error_says(c, "tfm_embedding: ids holds 4 at position 2, expected 0 to 3");
    assert_refused(c, tfm_embedding(c, table, tfm_ones(c, TFM_SHAPE(2))), TFM_INVALID);
    assert_refused(c, tfm_embedding(c, tfm_ones(c, TFM_SHAPE(4)), tfm_from(c, TFM_I32, TFM_SHAPE(1), ids)),
                   TFM_INVALID);
    assert_refused(c, tfm_embedding(c, table, tfm_full(c, TFM_I64, TFM_SHAPE(1, 1, 1, 1, 1, 1), 0)), TFM_INVALID);
    assert_shape(c, tfm_embedding(c, table, tfm_from(c, TFM_I64, TFM_SHAPE(0), NULL)), TFM_SHAPE(0, 2));
    assert_shape(c, tfm_embedding(c, tfm_ones(c, TFM_SHAPE(4, 0)), tfm_from(c, TFM_I32, TFM_SHAPE(2), ids)),
                 TFM_SHAPE(2, 0));
    tfm_destroy(c);
}

Test(parameter, packed_ones_are_read_by_copies_and_refused_by_arithmetic) {
    tfm_ctx *c = context(1);
    void *memory = malloc(48 * 21 * 4);
    tfm_tensor *table = plain(c, TFM_SHAPE(40, 21), 1), panels = packed(table, memory);
    tfm_tensor *same = tfm_zeros(c, TFM_SHAPE(40, 21));
    const int64_t at[2] = {37, 20};
    float out[840];
    assert_same_tensor(c, tfm_clone(c, &panels), table);
    assert_same_tensor(c, tfm_cast(c, &panels, TFM_F16), tfm_cast(c, table, TFM_F16));
    assert_ok(c, tfm_read(c, &panels, out, 840));
    assert_same_bytes(out, table->data, 840 * 4);
    cr_assert(tfm_get(&panels, at) == tfm_get(table, at));
    cr_assert_str_eq(tfm_format(c, &panels), tfm_format(c, table));
    assert_ok(c, tfm_copy(c, same, &panels));
    assert_same_tensor(c, same, table);
    assert_verb_refused(c, tfm_copy(c, tfm_zeros(c, TFM_SHAPE(2, 40, 21)), &panels), TFM_INVALID); /* no broadcast */
    assert_refused(c, tfm_add(c, &panels, table), TFM_INVALID);
    assert_refused(c, tfm_transpose(c, &panels, 0, 1), TFM_INVALID);
    assert_refused(c, tfm_matmul(c, table, &panels), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, &panels, table), TFM_INVALID);
    assert_refused(c, tfm_linear(c, &panels, table, NULL, 0), TFM_INVALID);
    free(memory);
    tfm_destroy(c);
}

Test(parameter, is_written_between_begin_and_end_only) {
    tfm_ctx *c = context(1);
    tfm_params *p = tfm_params_create(c);
    tfm_tensor *t = parameter(c, p, "w", tfm_ones(c, TFM_SHAPE(3, 4)));
    const int64_t at[2] = {0, 0};
    assert_verb_refused(c, tfm_copy(c, t, tfm_zeros(c, TFM_SHAPE(3, 4))), TFM_INVALID);
    assert_verb_refused(c, tfm_set(c, t, at, 2), TFM_INVALID);
    assert_ok(c, tfm_set(c, tfm_params_write_begin(c, p, "w"), at, 2));
    assert_ok(c, tfm_params_write_end(c, p, "w"));
    cr_assert(tfm_get(t, at) == 2);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

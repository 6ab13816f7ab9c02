/* Tensors: shapes, creation, views, copies, conversion, indexing; what is refused and how. */
#include "op_helpers.h"

#include <inttypes.h>

/* -- shapes -------------------------------------------------------------------------------------------------------- */

Test(shape, macro_takes_one_to_six_sizes) {
    const tfm_shape s = TFM_SHAPE(1, 2, 3, 4, 5, 6);
    cr_assert(TFM_SHAPE(7).ndim == 1 && TFM_SHAPE(7).dim[0] == 7);
    cr_assert(TFM_SHAPE(7, 8).ndim == 2 && TFM_SHAPE(7, 8).dim[1] == 8);
    cr_assert(s.ndim == 6 && s.dim[0] == 1 && s.dim[5] == 6);
    cr_assert(tfm_shape_of(0, NULL).ndim == 0);
}

Test(shape, bad_shapes_are_refused_with_a_text) {
    tfm_ctx *c = context(1);
    tfm_shape seven = TFM_SHAPE(1);
    seven.ndim = 7;
    assert_refused(c, tfm_zeros(c, TFM_SHAPE(2, -1)), TFM_INVALID);
    cr_assert(tfm_zeros(c, TFM_SHAPE(2, -1)) == NULL);
    assert_error_says(c, "tfm_zeros: shape (2, -1): size 1 is negative");
    assert_refused(c, tfm_zeros(c, seven), TFM_INVALID);
    assert_refused(c, tfm_empty(c, 99, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_empty(c, -1, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_zeros(c, TFM_SHAPE(INT64_MAX, 2)), TFM_INVALID);
    assert_refused(c, tfm_zeros(c, TFM_SHAPE((int64_t)1 << 60)), TFM_INVALID);
    assert_refused(c, tfm_zeros(c, TFM_SHAPE(INT64_MAX / 2, 0, 4)), TFM_INVALID);
    tfm_destroy(c);
}

Test(shape, numel_contiguous_and_dtypes_answer_for_null) {
    cr_assert(tfm_numel(NULL) == 0 && tfm_is_contiguous(NULL) == 0);
    cr_assert_str_eq(tfm_dtype_name(TFM_BF16), "bf16");
    cr_assert_str_eq(tfm_dtype_name(99), "unknown");
    cr_assert(tfm_dtype_size(TFM_F64) == 8 && tfm_dtype_size(-1) == 0);
    cr_assert(isnan(tfm_get(NULL, NULL)) && isnan(tfm_item(NULL)));
}

/* Strides of dims of one element say nothing, nor do any without elements. */
Test(shape, contiguous_is_what_has_no_gaps) {
    tfm_ctx *c = context(1);
    const tfm_tensor *empty = tfm_zeros(c, TFM_SHAPE(2, 0, 3)), *row = tfm_zeros(c, TFM_SHAPE(1, 4));
    cr_assert(empty->stride[0] == 3 && empty->stride[1] == 3 && empty->stride[2] == 1);
    cr_assert(tfm_is_contiguous(tfm_transpose(c, empty, 0, 2)));
    cr_assert(tfm_is_contiguous(tfm_transpose(c, row, 0, 1)));
    cr_assert_not(tfm_is_contiguous(tfm_slice(c, row, 1, 0, 4, 2)));
    tfm_destroy(c);
}

/* -- creation ------------------------------------------------------------------------------------------------------ */

Test(creation, fills_every_dtype) {
    tfm_ctx *c = context(1);
    int dtype;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) {
        const double ones[6] = {1, 1, 1, 1, 1, 1};
        tfm_tensor *t = tfm_full(c, dtype, TFM_SHAPE(2, 3), 1);
        assert_elements(c, t, 6, ones);
        cr_assert(t->dtype == dtype && tfm_is_contiguous(t) && (uintptr_t)t->data % 64 == 0);
    }
    tfm_destroy(c);
}

Test(creation, arange_counts_as_pytorch) {
    tfm_ctx *c = context(1);
    static const double wrong[][3] = {{0, 1, 0}, {0, 1, -1}, {NAN, 1, 1}, {0, NAN, 1}, {0, 1, NAN}, {0, HUGE_VAL, 1}};
    const double up[] = {0, 1, 2, 3, 4}, fractions[] = {1, 1.25, 1.5, 1.75}, down[] = {5, 3, 1};
    int i;
    assert_elements(c, tfm_arange(c, TFM_I64, 0, 5, 1), 5, up);
    assert_elements(c, tfm_arange(c, TFM_F32, 1, 2, 0.25), 4, fractions);
    assert_elements(c, tfm_arange(c, TFM_I32, 5, 0, -2), 3, down);
    assert_shape(c, tfm_arange(c, TFM_F32, 3, 3, 1), TFM_SHAPE(0));
    for (i = 0; i < (int)(sizeof wrong / sizeof wrong[0]); i++) {
        cr_assert_null(tfm_arange(c, TFM_F32, wrong[i][0], wrong[i][1], wrong[i][2]));
        assert_error_says(c, "expected finite numbers, and steps that lead from start to end");
    }
    cr_assert_null(tfm_arange(c, TFM_F32, 0, 1e300, 1e-10));
    assert_error_says(c, "too many elements");
    tfm_destroy(c);
}

Test(creation, random_numbers_depend_on_the_seed_alone) {
    float first[5000];
    int threads, isa, taken = 0;
    for (threads = 1; threads <= 7; threads += 3) {
        for (isa = 0; isa < TEST_ISAS; isa++) {
            tfm_ctx *c = test_isa_context(isa, threads);
            tfm_tensor *t;
            if (!c) continue;
            t = tfm_randn(c, TFM_SHAPE(5000));
            assert_made(c, t);
            if (!taken++) memcpy(first, t->data, sizeof first);
            assert_same_bytes(t->data, first, (int64_t)sizeof first);
            tfm_destroy(c);
        }
    }
}

Test(creation, normal_and_uniform_have_their_moments) {
    tfm_ctx *c = context(1);
    enum { N = 200000 };
    const float *x = (const float *)tfm_randn(c, TFM_SHAPE(N))->data,
                *u = (const float *)tfm_uniform(c, TFM_SHAPE(N), -1, 3)->data;
    double mean = 0, square = 0, middle = 0;
    int i;
    for (i = 0; i < N; i++) {
        mean += (double)x[i] / N;
        square += (double)x[i] * (double)x[i] / N;
        middle += (double)u[i] / N;
        cr_assert(u[i] >= -1 && u[i] < 3);
    }
    cr_assert(fabs(mean) < 0.01 && fabs(square - 1) < 0.02 && fabs(middle - 1) < 0.01, "%g %g %g", mean, square,
              middle);
    cr_assert(tfm_item(tfm_uniform(c, TFM_SHAPE(1), 2, 2)) == 2);
    assert_refused(c, tfm_uniform(c, TFM_SHAPE(1), 2, 1), TFM_INVALID);
    assert_refused(c, tfm_uniform(c, TFM_SHAPE(1), NAN, 1), TFM_INVALID);
    tfm_destroy(c);
}

Test(creation, from_copies_and_wrap_does_not) {
    tfm_ctx *c = context(1);
    float data[6] = {1, 2, 3, 4, 5, 6};
    const double copied[] = {1, 2, 3, 4, 5, 6}, wrapped[] = {9, 2, 3, 4, 5, 6}, strided[] = {9, 4, 2, 5};
    const int64_t stride[2] = {1, 3}, backwards[2] = {-1, 1}, far[2] = {INT64_MAX / 2, 1};
    const int64_t wide[2] = {INT64_MAX / 16, 1}, last[2] = {1, INT64_MAX};
    tfm_tensor *from = tfm_from(c, TFM_F32, TFM_SHAPE(2, 3), data), *wrap = tfm_wrap(c, TFM_F32, TFM_SHAPE(2, 3), data);
    tfm_tensor *columns = tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(2, 2), stride, data);
    data[0] = 9;
    assert_elements(c, from, 6, copied);
    assert_elements(c, wrap, 6, wrapped);
    assert_elements(c, columns, 4, strided);
    assert_refused(c, tfm_from(c, TFM_F32, TFM_SHAPE(1), NULL), TFM_INVALID);
    assert_refused(c, tfm_wrap(c, TFM_F32, TFM_SHAPE(1), NULL), TFM_INVALID);
    assert_refused(c, tfm_wrap(c, TFM_F32, TFM_SHAPE(1), (char *)data + 1), TFM_INVALID);
    assert_refused(c, tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(2, 2), NULL, data), TFM_INVALID);
    cr_assert_null(tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(2, 2), backwards, data));
    assert_error_says(c, "stride 0 is -1, expected 0 or more");
    assert_refused(c, tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(9, 2), far, data), TFM_INVALID);
    assert_refused(c, tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(2, 2), wide, data), TFM_INVALID);
    assert_refused(c, tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(3, 2), last, data), TFM_INVALID);
    assert_shape(c, tfm_from(c, TFM_I32, TFM_SHAPE(0, 3), NULL), TFM_SHAPE(0, 3));
    tfm_destroy(c);
}

/* -- views --------------------------------------------------------------------------------------------------------- */

Test(view, shares_memory_with_its_base) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_arange(c, TFM_F32, 0, 24, 1), *v = tfm_view(c, t, TFM_SHAPE(2, 3, 4));
    const int64_t at[3] = {1, 2, 3}, last[1] = {23};
    assert_ok(c, tfm_set(c, v, at, -1));
    cr_assert(tfm_get(t, last) == -1 && v->data == t->data);
    tfm_destroy(c);
}

Test(view, geometry_of_each_kind) {
    tfm_ctx *c = context(1);
    const double transposed[] = {0, 3, 1, 4, 2, 5}, sliced[] = {1, 4}, expanded[] = {0, 0, 1, 1},
                 permuted[] = {0, 3, 1, 4, 2, 5};
    tfm_tensor *t = tfm_reshape(c, tfm_arange(c, TFM_I32, 0, 6, 1), TFM_SHAPE(2, 3));
    assert_elements(c, tfm_transpose(c, t, 0, -1), 6, transposed);
    assert_elements(c, tfm_permute(c, t, TFM_SHAPE(-1, 0)), 6, permuted);
    assert_elements(c, tfm_slice(c, t, 1, 1, INT64_MAX, 2), 2, sliced);
    assert_elements(c, tfm_slice(c, t, 1, 1, 2, 1), 2, sliced);
    assert_elements(c, tfm_select(c, t, 1, -2), 2, sliced);
    assert_elements(c, tfm_narrow(c, t, -1, 1, 1), 2, sliced);
    assert_elements(c,
                    tfm_expand(c, tfm_reshape(c, tfm_arange(c, TFM_F16, 0, 2, 1), TFM_SHAPE(2, 1)), TFM_SHAPE(-1, 2)),
                    4, expanded);
    assert_shape(c, tfm_unsqueeze(c, t, -1), TFM_SHAPE(2, 3, 1));
    assert_shape(c, tfm_unsqueeze(c, t, 0), TFM_SHAPE(1, 2, 3));
    assert_shape(c, tfm_squeeze(c, tfm_unsqueeze(c, t, 0), 0), TFM_SHAPE(2, 3));
    assert_shape(c, tfm_squeeze(c, t, 0), TFM_SHAPE(2, 3));
    assert_shape(c, tfm_expand(c, t, TFM_SHAPE(4, 2, 3)), TFM_SHAPE(4, 2, 3));
    assert_same_tensor(c, tfm_slice(c, t, 0, -5, 9, 1), t);
    assert_shape(c, tfm_slice(c, t, 0, 5, 9, 1), TFM_SHAPE(0, 3));
    assert_shape(c, tfm_slice(c, t, 0, -1, -5, 1), TFM_SHAPE(0, 3));
    tfm_destroy(c);
}

/* Sizes around the blocks that such copies go by, in each order of three dims. */
Test(views, a_transposed_copy_has_every_element_in_its_place) {
    static const int64_t order[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    static const int64_t sizes[4][3] = {{3, 65, 17}, {16, 2, 64}, {70, 33, 1}, {18, 19, 20}};
    tfm_ctx *c = tfm_create(NULL);
    int dtype, s, o;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++)
        for (s = 0; s < 4; s++)
            for (o = 0; o < 6; o++) {
                tfm_marker mark = tfm_mark(c);
                const int64_t n = sizes[s][0] * sizes[s][1] * sizes[s][2];
                tfm_tensor *count = tfm_arange(c, TFM_I64, 0, (double)n, 1);
                tfm_tensor *x = tfm_cast(c, tfm_reshape(c, count, tfm_shape_of(3, sizes[s])), dtype);
                tfm_tensor *v = tfm_permute(c, x, tfm_shape_of(3, order[o])), *y = tfm_contiguous(c, v);
                int64_t at[3];
                cr_assert_not_null(y, "%s", tfm_error(c));
                for (at[0] = 0; at[0] < y->shape[0]; at[0]++)
                    for (at[1] = 0; at[1] < y->shape[1]; at[1]++)
                        for (at[2] = 0; at[2] < y->shape[2]; at[2]++)
                            cr_assert(tfm_get(y, at) == tfm_get(v, at), "%s, sizes %d, order %d: (%d, %d, %d)",
                                      tfm_dtype_name(dtype), s, o, (int)at[0], (int)at[1], (int)at[2]);
                tfm_rewind(c, mark);
            }
    tfm_destroy(c);
}

Test(view, reshape_is_a_view_where_strides_allow_it) {
    const int64_t huge = (int64_t)1 << 40;
    tfm_shape seven = TFM_SHAPE(1);
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(4, 6, 5)), *cut = tfm_narrow(c, t, 1, 0, 2);
    tfm_tensor *joined = tfm_reshape(c, cut, TFM_SHAPE(4, 10)), *split = tfm_view(c, t, TFM_SHAPE(2, 2, -1, 5));
    seven.ndim = 7;
    assert_shape(c, joined, TFM_SHAPE(4, 10));
    assert_shape(c, split, TFM_SHAPE(2, 2, 6, 5));
    assert_shape(c, tfm_view(c, cut, TFM_SHAPE(1, 4, 1, 10, 1)), TFM_SHAPE(1, 4, 1, 10, 1));
    cr_assert(joined->data == t->data && joined->stride[0] == 30 && split->data == t->data);
    cr_assert(tfm_reshape(c, tfm_transpose(c, t, 0, 1), TFM_SHAPE(-1))->data != t->data);
    assert_refused(c, tfm_view(c, tfm_transpose(c, t, 0, 1), TFM_SHAPE(24, 5)), TFM_INVALID);
    assert_refused(c, tfm_reshape(c, t, TFM_SHAPE(7, -1)), TFM_INVALID);
    cr_assert_null(tfm_reshape(c, t, TFM_SHAPE(-1, -1)));
    assert_error_says(c, "shape (-1, -1) is not one of 120 elements");
    cr_assert_null(tfm_reshape(c, tfm_zeros(c, TFM_SHAPE(0, 4)), TFM_SHAPE(0, -1))); /* any size would do */
    assert_error_says(c, "0 elements do not fit shape (0, -1)");
    cr_assert_null(tfm_reshape(c, t, seven));
    assert_error_says(c, "a shape has 0 to 6 sizes, this one 7");
    assert_refused(c, tfm_reshape(c, t, TFM_SHAPE(5)), TFM_INVALID);
    assert_shape(c, tfm_reshape(c, tfm_zeros(c, TFM_SHAPE(1)), scalar_shape()), scalar_shape());
    assert_shape(c, tfm_reshape(c, tfm_zeros(c, TFM_SHAPE(0, 4)), TFM_SHAPE(2, 0, 9)), TFM_SHAPE(2, 0, 9));
    assert_refused(c, tfm_reshape(c, tfm_zeros(c, TFM_SHAPE(0)), TFM_SHAPE(0, huge, huge)), TFM_INVALID);
    assert_refused(c, tfm_view(c, tfm_zeros(c, TFM_SHAPE(0)), TFM_SHAPE(huge, 0, huge)), TFM_INVALID);
    assert_refused(c, tfm_split_heads(c, tfm_zeros(c, TFM_SHAPE(1 << 25, 0)), huge), TFM_INVALID);
    tfm_destroy(c);
}

Test(view, reshape_of_any_layout_keeps_row_major_order) {
    tfm_ctx *c = context(1);
    int layout;
    for (layout = 0; layout < LAYOUTS; layout++) {
        tfm_tensor *t = lying(c, F16, TFM_SHAPE(4, 3, 6), layout, 1, 3);
        tfm_tensor *y = tfm_reshape(c, t, TFM_SHAPE(2, 9, -1));
        int64_t i;
        assert_shape(c, y, TFM_SHAPE(2, 9, 4));
        for (i = 0; i < 72; i++) cr_assert(element(y, i) == element(t, i));
    }
    tfm_destroy(c);
}

Test(view, heads_split_and_combine_without_a_copy) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = plain(c, TFM_SHAPE(2, 5, 12), 1), *heads = tfm_split_heads(c, t, 3),
               *back = tfm_combine_heads(c, heads);
    const int64_t at[4] = {1, 2, 4, 3}, from[3] = {1, 4, 2 * 4 + 3};
    assert_shape(c, heads, TFM_SHAPE(2, 3, 5, 4));
    cr_assert(tfm_get(heads, at) == tfm_get(t, from));
    cr_assert(heads->data == t->data && back->data == t->data);
    assert_same_tensor(c, back, t);
    heads = tfm_clone(c, heads); /* now only a copy can combine */
    assert_same_tensor(c, tfm_combine_heads(c, heads), t);
    assert_refused(c, tfm_split_heads(c, t, 5), TFM_INVALID);
    assert_refused(c, tfm_split_heads(c, t, 0), TFM_INVALID);
    assert_refused(c, tfm_split_heads(c, tfm_zeros(c, TFM_SHAPE(12)), 3), TFM_INVALID);
    assert_refused(c, tfm_split_heads(c, tfm_zeros(c, TFM_SHAPE(1, 1, 1, 1, 1, 12)), 3), TFM_INVALID);
    assert_refused(c, tfm_combine_heads(c, tfm_zeros(c, TFM_SHAPE(2, 3))), TFM_INVALID);
    tfm_destroy(c);
}

Test(view, impossible_ones_are_refused) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(2, 3)), *scalar = tfm_zeros(c, scalar_shape()),
               *six = tfm_zeros(c, TFM_SHAPE(1, 1, 1, 1, 1, 1));
    tfm_shape seven = tfm_shape_like(six);
    seven.ndim = 7;
    assert_refused(c, tfm_transpose(c, t, 0, 2), TFM_INVALID);
    assert_refused(c, tfm_permute(c, t, TFM_SHAPE(0, 0)), TFM_INVALID);
    assert_refused(c, tfm_permute(c, t, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_slice(c, t, 0, 0, 2, 0), TFM_INVALID);
    assert_refused(c, tfm_slice(c, scalar, 0, 0, 2, 1), TFM_INVALID);
    assert_refused(c, tfm_narrow(c, t, 1, 2, 2), TFM_INVALID);
    assert_refused(c, tfm_narrow(c, t, 1, 0, -1), TFM_INVALID);
    assert_refused(c, tfm_narrow(c, t, 1, -4, 1), TFM_INVALID);
    assert_refused(c, tfm_narrow(c, t, 1, INT64_MAX, INT64_MAX), TFM_INVALID);
    assert_refused(c, tfm_select(c, t, 1, 3), TFM_INVALID);
    assert_refused(c, tfm_select(c, t, 1, -4), TFM_INVALID);
    assert_refused(c, tfm_expand(c, t, TFM_SHAPE(4, 3)), TFM_INVALID);
    assert_refused(c, tfm_expand(c, t, TFM_SHAPE(3)), TFM_INVALID);
    assert_refused(c, tfm_expand(c, t, TFM_SHAPE(-1, 2, 3)), TFM_INVALID);
    assert_refused(c, tfm_expand(c, t, seven), TFM_INVALID);
    cr_assert_null(tfm_expand(c, tfm_zeros(c, TFM_SHAPE(1)), TFM_SHAPE(-2)));
    assert_error_says(c, "dim 0 cannot become -2");
    assert_refused(c, tfm_expand(c, tfm_zeros(c, TFM_SHAPE(1)), TFM_SHAPE(INT64_MAX, 1)), TFM_INVALID);
    assert_refused(c, tfm_unsqueeze(c, six, 0), TFM_INVALID);
    assert_refused(c, tfm_unsqueeze(c, t, 4), TFM_INVALID);
    tfm_destroy(c);
}

/* -- copies -------------------------------------------------------------------------------------------------------- */

Test(copy, contiguous_gives_the_tensor_itself_when_it_can) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = plain(c, TFM_SHAPE(3, 4), 1), *v = tfm_transpose(c, t, 0, 1);
    cr_assert(tfm_contiguous(c, t)->data == t->data);
    cr_assert(tfm_contiguous(c, v)->data != t->data && tfm_is_contiguous(tfm_contiguous(c, v)));
    assert_same_tensor(c, tfm_contiguous(c, v), v);
    cr_assert(tfm_clone(c, t)->data != t->data);
    tfm_destroy(c);
}

Test(copy, clone_and_cast_read_every_layout_and_dtype) {
    TEST_EACH_ISA(c, 2) {
        int from, to, layout;
        for (from = 0; from < TFM_DTYPE_COUNT; from++) {
            for (layout = 0; layout < LAYOUTS; layout++) {
                tfm_marker mark = tfm_mark(c);
                tfm_tensor *t = lying(c, from, TFM_SHAPE(3, 5, 37), layout, 3, 9);
                for (to = 0; to < TFM_DTYPE_COUNT; to++) {
                    tfm_tensor *y = tfm_cast(c, t, to);
                    int64_t i;
                    assert_made(c, y);
                    cr_assert(y->dtype == to && tfm_is_contiguous(y));
                    for (i = 0; i < 3 * 5 * 37; i += 7) {
                        const double x = element(t, i), got = element(y, i);
                        const double want = to == TFM_BOOL          ? x != 0
                                            : to == TFM_U8 && x < 0 ? 0
                                            : to > TFM_F64          ? trunc(x)
                                                                    : x;
                        cr_assert(near(got, want, to <= TFM_BF16 ? fabs(x) * dtype_epsilon(to) + 1e-7 : 0),
                                  "%s to %s: %g gives %g", tfm_dtype_name(from), tfm_dtype_name(to), x, got);
                    }
                }
                tfm_rewind(c, mark);
            }
        }
    }
}

static double cast_one(tfm_ctx *c, int from, double x, int to) {
    tfm_tensor *t = tfm_full(c, from, scalar_shape(), x);
    return tfm_item(tfm_cast(c, t, to));
}

Test(cast, floats_become_integers_truncated_and_saturated) {
    TEST_EACH_ISA(c, 1) {
        int from;
        for (from = 0; from <= TFM_F64; from++) {
            cr_assert(cast_one(c, from, 2.75, TFM_I32) == 2 && cast_one(c, from, -2.75, TFM_I32) == -2);
            cr_assert(cast_one(c, from, 300, TFM_U8) == 255 && cast_one(c, from, -3, TFM_U8) == 0);
            cr_assert(cast_one(c, from, 1000, TFM_I8) == 127 && cast_one(c, from, -1000, TFM_I8) == -128);
            cr_assert(cast_one(c, from, HUGE_VAL, TFM_I64) == 9223372036854775807.0);
            cr_assert(cast_one(c, from, -HUGE_VAL, TFM_I64) == -9223372036854775808.0);
            cr_assert(cast_one(c, from, NAN, TFM_I64) == 0);
            if (from != TFM_F16) cr_assert(cast_one(c, from, ldexp(1, 63), TFM_I64) == 9223372036854775807.0);
            cr_assert(cast_one(c, from, 0.25, TFM_BOOL) == 1 && cast_one(c, from, 0, TFM_BOOL) == 0);
            cr_assert(cast_one(c, from, NAN, TFM_BOOL) == 1);
        }
    }
}

/* Of memory that another program filled: any byte but 0 is true. */
Test(cast, true_is_one_whatever_its_byte) {
    tfm_ctx *c = context(1);
    uint8_t byte[3] = {0, 2, 255};
    const double expected[3] = {0, 1, 1};
    const tfm_tensor *t = tfm_wrap(c, TFM_BOOL, TFM_SHAPE(3), byte);
    int to;
    assert_elements(c, t, 3, expected);
    for (to = 0; to < TFM_DTYPE_COUNT; to++) assert_elements(c, tfm_cast(c, t, to), 3, expected);
    tfm_destroy(c);
}

Test(cast, integers_wrap_into_narrower_integers) {
    tfm_ctx *c = context(1);
    cr_assert(cast_one(c, TFM_I64, 300, TFM_U8) == 44 && cast_one(c, TFM_I64, -1, TFM_U8) == 255);
    cr_assert(cast_one(c, TFM_I32, 200, TFM_I8) == -56 && cast_one(c, TFM_I64, 4294967297.0, TFM_I32) == 1);
    cr_assert(cast_one(c, TFM_I64, 256, TFM_BOOL) == 1); /* but a bool says whether there is anything */
    tfm_destroy(c);
}

/* Memory of the caller: C's true need not be 1. */
Test(cast, a_bool_is_true_whatever_byte_holds_it) {
    static uint8_t bytes[4] = {0, 1, 2, 255};
    const double truth[] = {0, 1, 1, 1};
    TEST_EACH_ISA(c, 1) {
        const tfm_tensor *t = tfm_wrap(c, TFM_BOOL, TFM_SHAPE(4), bytes);
        int dtype;
        for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) assert_elements(c, tfm_cast(c, t, dtype), 4, truth);
        assert_elements(c, tfm_where(c, t, tfm_ones(c, TFM_SHAPE(1)), tfm_zeros(c, TFM_SHAPE(1))), 4, truth);
        assert_elements(c, tfm_compare_scalar(c, t, 1, TFM_EQ), 4, truth);
    }
}

Test(cast, halves_are_rounded_once_from_f64_and_i64) {
    tfm_ctx *c = context(1);
    /* just above the middle of two halves: by way of f32 it would become the tie, and the tie the even one below */
    const double above = 1.0 + 1.0 / 2048 + ldexp(1.0, -40), below = 1.0 + 3.0 / 2048 - ldexp(1.0, -40);
    const int64_t wide = ((int64_t)128 << 50) + ((int64_t)1 << 49) + 1; /* the same for bf16 and an integer */
    tfm_tensor *t = tfm_empty(c, TFM_I64, scalar_shape());
    cr_assert(cast_one(c, TFM_F64, above, TFM_F16) == 1.0 + 1.0 / 1024);
    cr_assert(cast_one(c, TFM_F64, below, TFM_F16) == 1.0 + 1.0 / 1024);
    cr_assert(cast_one(c, TFM_F64, 1.0 + 1.0 / 256 + ldexp(1.0, -40), TFM_BF16) == 1.0 + 1.0 / 128);
    cr_assert(cast_one(c, TFM_F64, ldexp(1.0, -25) + ldexp(1.0, -60), TFM_F16) == ldexp(1.0, -24));
    cr_assert(cast_one(c, TFM_F64, ldexp(1.0, -25), TFM_F16) == 0);
    cr_assert(cast_one(c, TFM_F64, 65519.9999999, TFM_F16) == 65504 && isinf(cast_one(c, TFM_F64, 65520, TFM_F16)));
    cr_assert(isinf(cast_one(c, TFM_F64, 1e300, TFM_BF16)) && isnan(cast_one(c, TFM_F64, NAN, TFM_BF16)));
    /* too small for f32: the sign is all that is left */
    cr_assert(cast_one(c, TFM_F64, -ldexp(1.0, -160), TFM_F16) == 0);
    cr_assert(cast_one(c, TFM_F64, -ldexp(1.0, -160), TFM_BF16) == 0);
    memcpy(t->data, &wide, sizeof wide);
    cr_assert(tfm_item(tfm_cast(c, t, TFM_BF16)) == ldexp(129.0, 50));
    *(int64_t *)t->data = -wide;
    cr_assert(tfm_item(tfm_cast(c, t, TFM_BF16)) == -ldexp(129.0, 50));
    tfm_destroy(c);
}

Test(cast, f64_goes_to_f32_and_back_exactly) {
    tfm_ctx *c = context(1);
    uint64_t seed = 5;
    int i;
    for (i = 0; i < 2000; i++) {
        const double x =
            (double)test_random(&seed) * exp2(60 * (double)test_random(&seed)) + 1e-9 * (double)test_random(&seed);
        cr_assert(cast_one(c, TFM_F64, x, TFM_F32) == (double)(float)x);
        cr_assert(cast_one(c, TFM_F32, x, TFM_F64) == (double)(float)x);
    }
    tfm_destroy(c);
}

Test(copy, into_a_tensor_broadcasts_casts_and_takes_overlaps) {
    tfm_ctx *c = context(1);
    const double row[] = {0, 1, 2, 0, 1, 2}, moved[] = {0, 0, 1, 2, 3, 4};
    tfm_tensor *t = tfm_empty(c, TFM_F16, TFM_SHAPE(2, 3)), *line = tfm_arange(c, TFM_F32, 0, 6, 1), *down;
    assert_ok(c, tfm_copy(c, t, tfm_arange(c, TFM_I64, 0, 3, 1)));
    assert_elements(c, t, 6, row);
    assert_ok(c, tfm_copy(c, tfm_narrow(c, line, 0, 1, 5), tfm_narrow(c, line, 0, 0, 5)));
    assert_elements(c, line, 6, moved);
    down = tfm_transpose(c, tfm_zeros(c, TFM_SHAPE(3, 2)), 0, 1);
    assert_ok(c, tfm_copy(c, down, t));
    assert_elements(c, down, 6, row);
    line = plain(c, TFM_SHAPE(20, 20), 1);
    down = tfm_clone(c, tfm_transpose(c, line, 0, 1));
    assert_ok(c, tfm_copy(c, line, tfm_transpose(c, line, 0, 1)));
    assert_same_tensor(c, line, down);
    line = tfm_slice(c, tfm_zeros(c, TFM_SHAPE(20, 40)), 1, 0, 40, 2);
    assert_ok(c, tfm_copy(c, line, tfm_transpose(c, down, 0, 1)));
    assert_same_tensor(c, line, tfm_transpose(c, down, 0, 1));
    assert_verb_refused(c, tfm_copy(c, tfm_zeros(c, TFM_SHAPE(1, 3)), t), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, t, tfm_zeros(c, TFM_SHAPE(2, 2))), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, t, tfm_zeros(c, TFM_SHAPE(2, 2, 3))), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, tfm_expand(c, line, TFM_SHAPE(2, 20, 20)), line), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, NULL, line), TFM_INVALID);
    tfm_destroy(c);
}

/* Elements that share memory would hold whichever thread wrote last. */
Test(copy, into_a_layout_that_overlaps_itself_is_refused) {
    static const struct { int64_t shape[3], stride[3]; int fine; } row[] = {
        {{2, 5, 1}, {1, 1, 0}, 0}, {{2, 5, 1}, {4, 1, 0}, 0}, {{2, 5, 3}, {15, 2, 5}, 0}, {{2, 5, 1}, {5, 1, 0}, 1},
        {{2, 5, 3}, {1, 6, 2}, 1}, {{2, 1, 3}, {3, 0, 1}, 1}, {{2, 5, 3}, {40, 7, 2}, 1}, {{0, 5, 3}, {1, 1, 1}, 1},
    };
    tfm_ctx *c = context(1);
    static float data[256];
    int i;
    for (i = 0; i < (int)(sizeof row / sizeof row[0]); i++) {
        tfm_tensor *t = tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(row[i].shape[0], row[i].shape[1], row[i].shape[2]),
                                         row[i].stride, data);
        assert_made(c, t);
        if (row[i].fine) assert_ok(c, tfm_copy(c, t, tfm_full(c, TFM_F32, TFM_SHAPE(1), i)));
        else assert_verb_refused(c, tfm_copy(c, t, tfm_full(c, TFM_F32, TFM_SHAPE(1), i)), TFM_INVALID);
    }
    tfm_destroy(c);
}

Test(creation, the_stride_of_a_size_of_1_is_of_no_use) {
    static const int64_t row[3] = {8, INT64_MAX, 1}, column[2] = {INT64_MAX, 1};
    static float data[16], weight[40];
    TEST_EACH_ISA(c, 1) {
        const tfm_tensor *t = tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(2, 1, 8), row, data);
        const tfm_tensor *one = tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(1, 40), column, weight);
        assert_made(c, tfm_layer_norm(c, t, NULL, NULL, NULL)); /* under UBSan: no product with it overflows */
        assert_made(c, tfm_matmul(c, tfm_ones(c, TFM_SHAPE(3, 1)), one));
        cr_expect(t->stride[1] < INT64_MAX && one->stride[0] < INT64_MAX);
    }
}

Test(view, of_an_empty_tensor_with_strides_beyond_memory) {
    static const int64_t far[2] = {INT64_MAX, INT64_MAX};
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_wrap_strided(c, TFM_F32, TFM_SHAPE(5, 0), far, NULL);
    assert_made(c, t);
    assert_made(c, tfm_narrow(c, t, 0, 3, 1)); /* no position of it overflows */
    assert_made(c, tfm_slice(c, t, 0, 1, 5, 2));
    cr_expect_eq(tfm_numel(tfm_contiguous(c, tfm_transpose(c, t, 0, 1))), 0);
    tfm_destroy(c);
}

Test(copy, cat_and_stack_join_any_dtype_and_layout) {
    tfm_ctx *c = context(2);
    int dtype, layout, dim;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) {
        for (layout = 0; layout < LAYOUTS; layout++) {
            for (dim = -3; dim < 3; dim++) {
                tfm_tensor *a = lying(c, dtype, TFM_SHAPE(2, 3, 4), layout, 1, 1),
                           *b = lying(c, dtype, TFM_SHAPE(2, 3, 4), LIES_PLAIN, 1, 2);
                const tfm_tensor *list[3];
                const int at = dim < 0 ? dim + 3 : dim;
                tfm_tensor *y, *z;
                list[0] = a;
                list[1] = b;
                list[2] = a;
                y = tfm_cat(c, list, 3, dim);
                z = tfm_stack(c, list, 3, at);
                cr_assert(y && z && y->dtype == dtype && y->shape[at] == 3 * a->shape[at]);
                assert_same_tensor(c, tfm_narrow(c, y, dim, 0, a->shape[at]), a);
                assert_same_tensor(c, tfm_narrow(c, y, dim, a->shape[at], a->shape[at]), b);
                assert_same_tensor(c, tfm_select(c, z, at, 1), b);
                assert_same_tensor(c, tfm_select(c, z, at, 2), a);
            }
        }
    }
    {
        const tfm_tensor *list[2];
        const double joined[] = {0, 0, 0, 0, 0, 0, 1, 1, 1};
        list[0] = tfm_full(c, TFM_I64, TFM_SHAPE(2, 3), 1);
        list[1] = tfm_zeros(c, TFM_SHAPE(2, 3));
        assert_refused(c, tfm_cat(c, list, 2, 0), TFM_INVALID);
        list[1] = list[0];
        list[0] = tfm_zeros(c, TFM_SHAPE(2, 3));
        assert_refused(c, tfm_cat(c, list, 2, 0), TFM_INVALID);
        list[1] = tfm_full(c, TFM_F16, TFM_SHAPE(1, 3), 1);
        cr_assert(tfm_cat(c, list, 2, 0)->dtype == TFM_F32);
        assert_elements(c, tfm_cat(c, list, 2, 0), 9, joined);
        assert_refused(c, tfm_stack(c, list, 2, 0), TFM_INVALID);
        list[1] = tfm_zeros(c, TFM_SHAPE(2, 3, 1));
        assert_refused(c, tfm_cat(c, list, 2, 0), TFM_INVALID);
        assert_shape(c, tfm_stack(c, list, 1, -1), TFM_SHAPE(2, 3, 1));
        list[1] = tfm_zeros(c, scalar_shape());
        assert_refused(c, tfm_cat(c, list + 1, 1, 0), TFM_INVALID);
        list[1] = tfm_zeros(c, TFM_SHAPE(1, 1, 1, 1, 1, 1));
        assert_refused(c, tfm_stack(c, list + 1, 1, 0), TFM_INVALID);
        list[1] = tfm_zeros(c, TFM_SHAPE(2, 4));
        assert_refused(c, tfm_cat(c, list, 2, 0), TFM_INVALID);
        assert_refused(c, tfm_stack(c, list, 2, 1), TFM_INVALID);
        assert_refused(c, tfm_cat(c, list, 2, 2), TFM_INVALID);
        assert_refused(c, tfm_cat(c, list, 0, 0), TFM_INVALID);
        assert_refused(c, tfm_cat(c, NULL, 2, 0), TFM_INVALID);
        list[1] = NULL;
        assert_refused(c, tfm_cat(c, list, 2, 0), TFM_INVALID);
    }
    tfm_destroy(c);
}

Test(copy, pad_puts_the_value_on_both_sides) {
    tfm_ctx *c = context(1);
    const double padded[] = {7, 0, 1, 7, 7, 7, 2, 3, 7, 7};
    tfm_tensor *t = tfm_reshape(c, tfm_arange(c, TFM_I8, 0, 4, 1), TFM_SHAPE(2, 2));
    assert_elements(c, tfm_pad(c, t, -1, 1, 2, 7), 10, padded);
    assert_shape(c, tfm_pad(c, t, 0, 0, 0, 7), TFM_SHAPE(2, 2));
    assert_refused(c, tfm_pad(c, t, 0, -1, 0, 7), TFM_INVALID);
    assert_refused(c, tfm_pad(c, t, 0, INT64_MAX, INT64_MAX, 7), TFM_INVALID);
    tfm_destroy(c);
}

/* -- by index ------------------------------------------------------------------------------------------------------ */

Test(gather, reads_any_dtype_and_layout) {
    tfm_ctx *c = context(3);
    int dtype, layout, dim;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) {
        for (layout = 0; layout < LAYOUTS; layout++) {
            for (dim = 0; dim < 2; dim++) {
                tfm_tensor *t = lying(c, dtype, TFM_SHAPE(8, 8), layout, 1, 1),
                           *ids = lying(c, dim ? I64 : I32, TFM_SHAPE(8, 5), layout, 1, 2);
                tfm_tensor *list = lying(c, I32, TFM_SHAPE(11), layout, 1, 3), *y, *z;
                int64_t i, j;
                y = tfm_gather(c, t, dim, ids);
                z = tfm_index_select(c, t, dim, list);
                assert_shape(c, y, TFM_SHAPE(8, 5));
                assert_shape(c, z, dim ? TFM_SHAPE(8, 11) : TFM_SHAPE(11, 8));
                for (i = 0; i < 8; i++) {
                    for (j = 0; j < 5; j++) {
                        int64_t from[2], here[2];
                        here[0] = from[0] = i;
                        here[1] = from[1] = j;
                        from[dim] = (int64_t)tfm_get(ids, here);
                        cr_assert(tfm_get(y, here) == tfm_get(t, from));
                    }
                    for (j = 0; j < 11; j++) {
                        int64_t from[2], here[2];
                        here[dim] = j;
                        here[1 - dim] = from[1 - dim] = i;
                        from[dim] = (int64_t)tfm_get(list, &j);
                        cr_assert(tfm_get(z, here) == tfm_get(t, from));
                    }
                }
            }
        }
    }
    tfm_destroy(c);
}

Test(gather, a_bad_id_is_named_with_position_and_limit) {
    tfm_ctx *c = context(1);
    const int64_t ids[3] = {0, 4, 1}, rows[4] = {0, 4, 1, 2};
    const int32_t negative[1] = {-1};
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(4, 2)), *bad = tfm_from(c, TFM_I64, TFM_SHAPE(3), ids);
    cr_assert(tfm_index_select(c, t, 0, bad) == NULL);
    assert_error_says(c, "tfm_index_select: index holds 4 at position 1, expected 0 to 3");
    assert_refused(c, tfm_index_select(c, t, 1, tfm_from(c, TFM_I32, TFM_SHAPE(1), negative)), TFM_INVALID);
    assert_refused(c, tfm_gather(c, t, 0, tfm_reshape(c, bad, TFM_SHAPE(3, 1))), TFM_INVALID);
    assert_refused(c, tfm_gather(c, t, 0, bad), TFM_INVALID);
    assert_refused(c, tfm_gather(c, t, 0, tfm_full(c, TFM_I64, TFM_SHAPE(1, 3), 0)), TFM_INVALID);
    assert_refused(c, tfm_gather(c, t, 0, tfm_zeros(c, TFM_SHAPE(1, 2))), TFM_INVALID);
    assert_refused(c, tfm_gather(c, tfm_zeros(c, scalar_shape()), 0, tfm_full(c, TFM_I64, scalar_shape(), 1)),
                   TFM_INVALID);
    assert_shape(c, tfm_gather(c, t, 0, tfm_full(c, TFM_I64, TFM_SHAPE(9, 1), 3)), TFM_SHAPE(9, 1));
    cr_assert_null(tfm_gather(c, t, 0, tfm_transpose(c, tfm_from(c, TFM_I64, TFM_SHAPE(2, 2), rows), 0, 1)));
    assert_error_says(c, "index holds 4 at position 2"); /* of the transposed ids */
    assert_refused(c, tfm_index_select(c, t, 0, tfm_full(c, TFM_I64, scalar_shape(), 1)), TFM_INVALID);
    assert_refused(c, tfm_index_select(c, tfm_zeros(c, scalar_shape()), 0, tfm_full(c, TFM_I64, TFM_SHAPE(1), 0)),
                   TFM_INVALID);
    assert_refused(c, tfm_index_select(c, t, 0, tfm_zeros(c, TFM_SHAPE(1))), TFM_INVALID);
    assert_refused(c, tfm_index_select(c, t, 0, tfm_reshape(c, bad, TFM_SHAPE(3, 1))), TFM_INVALID);
    tfm_destroy(c);
}

Test(triangle, keeps_what_pytorch_keeps) {
    tfm_ctx *c = context(2);
    int dtype, layout, diagonal;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype += 3) {
        for (layout = 0; layout < LAYOUTS; layout++) {
            for (diagonal = -7; diagonal <= 7; diagonal++) {
                tfm_tensor *t = lying(c, dtype, TFM_SHAPE(2, 4, 5), layout, 1, 1);
                tfm_tensor *lower = tfm_tril(c, t, diagonal), *upper = tfm_triu(c, t, diagonal);
                int64_t i, at[3];
                assert_made(c, lower);
                assert_made(c, upper);
                for (i = 0; i < 40; i++) {
                    unravel(t, i, at);
                    cr_assert(tfm_get(lower, at) == (at[2] - at[1] <= diagonal ? tfm_get(t, at) : 0));
                    cr_assert(tfm_get(upper, at) == (at[2] - at[1] >= diagonal ? tfm_get(t, at) : 0));
                }
            }
        }
    }
    cr_assert(tfm_item(tfm_sum(c, tfm_tril(c, tfm_ones(c, TFM_SHAPE(3, 3)), INT64_MAX), all_dims(), 0)) == 9);
    cr_assert(tfm_item(tfm_sum(c, tfm_triu(c, tfm_ones(c, TFM_SHAPE(3, 3)), INT64_MIN), all_dims(), 0)) == 9);
    assert_shape(c, tfm_tril(c, tfm_ones(c, TFM_SHAPE(3, 0)), 0), TFM_SHAPE(3, 0));
    assert_refused(c, tfm_tril(c, tfm_ones(c, TFM_SHAPE(3)), 0), TFM_INVALID);
    tfm_destroy(c);
}

Test(where, chooses_and_broadcasts_any_dtype) {
    tfm_ctx *c = context(2);
    int dtype, layout;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) {
        for (layout = 0; layout < LAYOUTS; layout++) {
            tfm_tensor *mask = lying(c, TFM_BOOL, TFM_SHAPE(4, 1, 6), layout, 1, 1),
                       *a = lying(c, dtype, TFM_SHAPE(5, 6), layout, 1, 2);
            tfm_tensor *b = lying(c, dtype, TFM_SHAPE(4, 5, 1), layout, 1, 3), *y = tfm_where(c, mask, a, b),
                       *z = tfm_masked_fill(c, b, mask, 1);
            int64_t i, at[3];
            assert_shape(c, y, TFM_SHAPE(4, 5, 6));
            assert_shape(c, z, TFM_SHAPE(4, 5, 6));
            cr_assert(y->dtype == dtype && z->dtype == dtype);
            for (i = 0; i < 120; i++) {
                const int on = (unravel(y, i, at), broadcast_element(mask, 3, at) != 0);
                cr_assert(tfm_get(y, at) == broadcast_element(on ? a : b, 3, at));
                cr_assert(tfm_get(z, at) == (on ? 1 : broadcast_element(b, 3, at)));
            }
        }
    }
    {
        const double threes[] = {3, 3, 3, 3};
        tfm_tensor *mask = tfm_full(c, TFM_BOOL, TFM_SHAPE(2), 1), *h = tfm_full(c, TFM_F16, TFM_SHAPE(2), 1),
                   *f = tfm_ones(c, TFM_SHAPE(2));
        cr_assert(tfm_where(c, mask, h, f)->dtype == TFM_F32);
        h = tfm_full(c, TFM_F16, TFM_SHAPE(2, 1), 3);
        assert_elements(c, tfm_where(c, mask, h, f), 4, threes);
        assert_shape(c, tfm_where(c, mask, tfm_zeros(c, scalar_shape()), f), TFM_SHAPE(2));
        assert_shape(c, tfm_where(c, tfm_full(c, TFM_BOOL, TFM_SHAPE(3, 1), 1), f, f), TFM_SHAPE(3, 2));
        assert_refused(c, tfm_where(c, f, h, h), TFM_INVALID);
        assert_refused(c, tfm_where(c, mask, f, tfm_full(c, TFM_I64, TFM_SHAPE(2), 1)), TFM_INVALID);
        assert_refused(c, tfm_masked_fill(c, f, f, 1), TFM_INVALID);
        assert_refused(c, tfm_masked_fill(c, f, tfm_full(c, TFM_BOOL, TFM_SHAPE(3), 1), 1), TFM_INVALID);
    }
    tfm_destroy(c);
}

/* -- elements ------------------------------------------------------------------------------------------------------ */

Test(element, get_and_set_take_positions_from_both_ends) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(2, 3)), *scalar = tfm_full(c, TFM_F64, scalar_shape(), 0.1);
    const int64_t last[2] = {1, 2}, negative[2] = {-1, -1}, outside[2] = {2, 0}, before[2] = {0, -4};
    assert_ok(c, tfm_set(c, t, last, 5));
    cr_assert(tfm_get(t, negative) == 5 && isnan(tfm_get(t, outside)) && isnan(tfm_get(t, before))
              && isnan(tfm_get(t, NULL)));
    assert_verb_refused(c, tfm_set(c, t, outside, 1), TFM_INVALID);
    assert_verb_refused(c, tfm_set(c, t, before, 1), TFM_INVALID);
    assert_verb_refused(c, tfm_set(c, t, NULL, 1), TFM_INVALID);
    cr_assert(tfm_item(scalar) == 0.1 && isnan(tfm_item(t)) && tfm_get(scalar, NULL) == 0.1);
    tfm_destroy(c);
}

Test(element, read_gives_row_major_floats) {
    tfm_ctx *c = context(1);
    int dtype, layout;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) {
        for (layout = 0; layout < LAYOUTS; layout++) {
            tfm_tensor *t = lying(c, dtype, TFM_SHAPE(3, 7), layout, 1, 1);
            float out[21];
            int i;
            assert_ok(c, tfm_read(c, t, out, 21));
            for (i = 0; i < 21; i++) cr_assert(out[i] == (float)element(t, i));
            assert_verb_refused(c, tfm_read(c, t, out, 20), TFM_INVALID);
            assert_verb_refused(c, tfm_read(c, t, NULL, 21), TFM_INVALID);
        }
    }
    tfm_destroy(c);
}

/* -- life and death ------------------------------------------------------------------------------------------------ */

Test(argument, null_dead_and_foreign_tensors_are_errors_that_name_the_argument) {
    tfm_ctx *c = context(1), *other = context(1);
    tfm_tensor *t = tfm_ones(c, TFM_SHAPE(2)), *foreign = tfm_ones(other, TFM_SHAPE(2)), *dead;
    tfm_marker mark = tfm_mark(c);
    dead = tfm_ones(c, TFM_SHAPE(2));
    tfm_rewind(c, mark);
    cr_assert(tfm_add(c, t, NULL) == NULL);
    assert_error_says(c, "tfm_add: tensor argument 2 is NULL");
    cr_assert(tfm_add(c, dead, t) == NULL);
    assert_error_says(c, "tfm_add: tensor argument 1 is used after the rewind that freed it");
    cr_assert(tfm_add(c, t, foreign) == NULL);
    assert_error_says(c, "tfm_add: tensor argument 2 belongs to another context");
    cr_assert(tfm_add(NULL, t, t) == NULL);
    cr_assert(isnan(tfm_item(dead)));
    tfm_destroy(c);
    tfm_destroy(other);
}

Test(error, the_first_one_stays_and_nothing_runs_until_it_is_cleared) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_ones(c, TFM_SHAPE(2));
    char first[256];
    float out[2] = {-1, -1};
    cr_assert(tfm_select(c, t, 0, 9) == NULL);
    snprintf(first, sizeof first, "%s", tfm_error(c));
    cr_assert(tfm_ones(c, TFM_SHAPE(2)) == NULL && tfm_add(c, t, t) == NULL
              && tfm_reshape(c, t, TFM_SHAPE(-5)) == NULL);
    cr_assert(tfm_read(c, t, out, 2) == TFM_INVALID && out[0] == -1);
    cr_assert(tfm_format(c, t) == NULL);
    cr_assert_str_eq(tfm_error(c), first);
    tfm_clear(c);
    cr_assert(tfm_add(c, t, t) != NULL);
    tfm_destroy(c);
}

Test(measure, views_and_copies_are_counted_and_never_read) {
    if (sizeof(void *) < 8) cr_skip_test("sizes beyond 32 bits");
    tfm_ctx *c = context(1);
    tfm_memory memory;
    tfm_tensor *t, *y;
    float out[4] = {1, 1, 1, 1};
    const int64_t first[2] = {0, 0};
    tfm_measure_begin(c);
    t = tfm_zeros(c, TFM_SHAPE(1 << 20, 1 << 18)); /* a terabyte */
    y = tfm_clone(c, tfm_transpose(c, t, 0, 1));
    assert_shape(c, y, TFM_SHAPE(1 << 18, 1 << 20));
    cr_assert(isnan(tfm_get(y, first)));
    assert_ok(c, tfm_read(c, tfm_narrow(c, tfm_select(c, y, 0, 0), 0, 0, 4), out, 4));
    cr_assert(out[0] == 0);
    assert_ok(c, tfm_copy(c, y, tfm_ones(c, TFM_SHAPE(1))));
    cr_assert(tfm_format(c, y) != NULL);
    assert_ok(c, tfm_measure_end(c, &memory));
    cr_assert(memory.arena_peak >= (int64_t)2 << 40, "%" PRId64, memory.arena_peak);
    cr_assert(tfm_ones(c, TFM_SHAPE(2)) != NULL);
    tfm_destroy(c);
}

static void make_everything(tfm_ctx *c, void *user) {
    const tfm_tensor *list[2];
    tfm_tensor *t = tfm_ones(c, TFM_SHAPE(200, 300));
    (void)user;
    list[0] = list[1] = t;
    tfm_clone(c, tfm_transpose(c, t, 0, 1));
    tfm_cat(c, list, 2, 1);
    tfm_stack(c, list, 2, 0);
    tfm_cast(c, t, TFM_F16);
    tfm_pad(c, t, 0, 100, 100, 1);
    tfm_tril(c, t, 0);
    tfm_where(c, tfm_compare_scalar(c, t, 0, TFM_GT), t, t);
    tfm_index_select(c, t, 0, tfm_arange(c, TFM_I64, 0, 200, 1));
    (void)!tfm_copy(c, tfm_narrow(c, t, 0, 0, 100), tfm_narrow(c, t, 0, 50, 100));
    tfm_format(c, t);
    tfm_contiguous(c, tfm_randn(c, TFM_SHAPE(1000, 1000)));
}

Test(tensors_memory, every_failing_allocation_is_an_error_and_no_leak) {
    test_each_allocation_failing(make_everything, NULL, NULL);
}

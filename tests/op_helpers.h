/* Helpers of the tests of chapters 7 and 8: tensors of every layout, and their elements as doubles. */
#ifndef OP_HELPERS_H
#define OP_HELPERS_H

#include "test.h"

enum { F32 = TFM_F32, F16 = TFM_F16, BF16 = TFM_BF16, F64 = TFM_F64, I64 = TFM_I64, I32 = TFM_I32 };

TEST_UNUSED tfm_shape scalar_shape(void) { return tfm_shape_of(0, NULL); }
TEST_UNUSED tfm_shape all_dims(void) { return tfm_shape_of(0, NULL); }

TEST_UNUSED tfm_ctx *context(int threads) {
    tfm_options o;
    tfm_ctx *c;
    memset(&o, 0, sizeof o);
    o.threads = threads;
    o.seed = 7;
    c = tfm_create(&o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "no context: %s", tfm_error(c));
    return c;
}

/* Position of the i-th element in row-major order. */
TEST_UNUSED void unravel(const tfm_tensor *t, int64_t i, int64_t *index) {
    int d;
    for (d = t->ndim; d-- > 0;) {
        index[d] = i % t->shape[d];
        i /= t->shape[d];
    }
}

/* The i-th element in row-major order; does not use what is tested but strides and tfm_get. */
TEST_UNUSED double element(const tfm_tensor *t, int64_t i) {
    int64_t index[TFM_MAX_DIMS];
    unravel(t, i, index);
    return tfm_get(t, index);
}

/* The element of t that broadcasts to position index of a shape of ndim dims. */
TEST_UNUSED double broadcast_element(const tfm_tensor *t, int ndim, const int64_t *index) {
    int64_t at[TFM_MAX_DIMS];
    int d;
    for (d = 0; d < t->ndim; d++) at[d] = t->shape[d] == 1 ? 0 : index[ndim - t->ndim + d];
    return tfm_get(t, at);
}

/* How a tensor lies in memory. */
enum { LIES_PLAIN, LIES_TRANSPOSED, LIES_IN_STEPS, LIES_EXPANDED, LAYOUTS };

/* Values in [-scale, scale) (integers: whole numbers in [-8, 8)), in a tensor of this shape that lies in that way. */
TEST_UNUSED tfm_tensor *lying(tfm_ctx *c, int dtype, tfm_shape shape, int layout, double scale, uint64_t seed) {
    tfm_shape base = shape;
    tfm_tensor *t, *v;
    int64_t i, n, index[TFM_MAX_DIMS];
    const int last = shape.ndim - 1;
    if (layout == LIES_TRANSPOSED && last > 0) {
        base.dim[0] = shape.dim[last];
        base.dim[last] = shape.dim[0];
    }
    if (layout == LIES_IN_STEPS && last >= 0) base.dim[last] = 2 * shape.dim[last] + 1;
    if (layout == LIES_EXPANDED && last >= 0 && shape.dim[0] > 0) base.dim[0] = 1;
    t = tfm_empty(c, dtype, base);
    assert_made(c, t);
    n = tfm_numel(t);
    for (i = 0; i < n; i++) {
        const double x = (double)test_random(&seed);
        unravel(t, i, index);
        assert_ok(c, tfm_set(c, t, index,
                             dtype == TFM_BOOL ? (x > 0 ? 1 : 0)
                             : dtype > TFM_F64 ? floor(8 * fabs(x))
                                               : x * scale));
    }
    if (last < 0) return t;
    v = t;
    if (layout == LIES_TRANSPOSED && last > 0) v = tfm_transpose(c, t, 0, last);
    if (layout == LIES_IN_STEPS) v = tfm_slice(c, t, last, 1, INT64_MAX, 2);
    if (layout == LIES_EXPANDED) v = tfm_expand(c, t, shape);
    assert_made(c, v);
    return v;
}

TEST_UNUSED tfm_tensor *plain(tfm_ctx *c, tfm_shape shape, uint64_t seed) {
    return lying(c, TFM_F32, shape, LIES_PLAIN, 1, seed);
}

/* One rounding to the dtype, relative. */
TEST_UNUSED double dtype_epsilon(int dtype) { return dtype == TFM_F16 ? 4.9e-4 : dtype == TFM_BF16 ? 3.92e-3 : 6e-8; }

/* |a - b| <= tolerance, NaN like NaN, infinities equal. */
TEST_UNUSED int near(double a, double b, double tolerance) {
    if (isnan(a) || isnan(b)) return isnan(a) && isnan(b);
    return a == b || fabs(a - b) <= tolerance;
}

TEST_UNUSED void assert_shape(tfm_ctx *c, const tfm_tensor *t, tfm_shape shape) {
    int i;
    assert_made(c, t);
    cr_assert(t->ndim == shape.ndim, "%d dims, expected %d", t->ndim, shape.ndim);
    for (i = 0; i < shape.ndim; i++)
        cr_assert(t->shape[i] == shape.dim[i], "size %d is %lld, expected %lld", i, (long long)t->shape[i],
                  (long long)shape.dim[i]);
}

/* Every element of t, in order. */
TEST_UNUSED void assert_elements(tfm_ctx *c, const tfm_tensor *t, int64_t count, const double *values) {
    int64_t i;
    assert_made(c, t);
    cr_assert(tfm_numel(t) == count, "%lld elements, expected %lld", (long long)tfm_numel(t), (long long)count);
    for (i = 0; i < count; i++)
        cr_assert(near(element(t, i), values[i], 0), "element %lld is %.17g, expected %.17g", (long long)i,
                  element(t, i), values[i]);
}

/* Equal shape, dtype and bits, whatever the strides. */
TEST_UNUSED void assert_same_tensor(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b) {
    tfm_tensor *x, *y;
    assert_made(c, a);
    assert_made(c, b);
    cr_assert(test_same_shape(a, b) && a->dtype == b->dtype, "shapes or dtypes differ");
    x = tfm_clone(c, a);
    y = tfm_clone(c, b);
    assert_made(c, x);
    assert_made(c, y);
    assert_same_bytes(x->data, y->data, tfm_numel(a) * tfm_dtype_size(a->dtype));
}

/* The error names the op and holds the words; it is cleared. */
TEST_UNUSED void assert_error_says(tfm_ctx *c, const char *words) {
    cr_assert(strstr(tfm_error(c), words) != NULL, "the error is '%s', expected '%s' in it", tfm_error(c), words);
    tfm_clear(c);
}

#endif

/* Ops: elementwise, comparisons, reductions, ranking, softmax, norms, dropout, recording. Every instruction set,
 * dtype and layout against doubles; threads by bits. */
#include "op_helpers.h"

static const int floats[3] = {TFM_F32, TFM_F16, TFM_BF16};

/* -- one operand --------------------------------------------------------------------------------------------------- */

static double ref_neg(double x) { return -x; }
static double ref_rsqrt(double x) { return 1 / sqrt(x); }
static double ref_sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double ref_relu(double x) { return x > 0 ? x : x != x ? x : 0; }
static double ref_gelu(double x) { return x * 0.5 * erfc(-x / sqrt(2.0)); }
static double ref_gelu_tanh(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static double ref_gelu_quick(double x) { return x / (1 + exp(-1.702 * x)); }
static double ref_silu(double x) { return x / (1 + exp(-x)); }

static const struct unary {
    const char *name;
    tfm_tensor *(*op)(tfm_ctx *c, const tfm_tensor *t);
    double (*reference)(double x);
    double scale; /* of the arguments; negative: only positive ones */
} unaries[] = {{"neg", tfm_neg, ref_neg, 5},
               {"abs", tfm_abs, fabs, 5},
               {"exp", tfm_exp, exp, 8},
               {"log", tfm_log, log, -50},
               {"sqrt", tfm_sqrt, sqrt, -50},
               {"rsqrt", tfm_rsqrt, ref_rsqrt, -50},
               {"sin", tfm_sin, sin, 20},
               {"cos", tfm_cos, cos, 20},
               {"tanh", tfm_tanh, tanh, 4},
               {"sigmoid", tfm_sigmoid, ref_sigmoid, 8},
               {"relu", tfm_relu, ref_relu, 4},
               {"gelu", tfm_gelu, ref_gelu, 5},
               {"gelu_tanh", tfm_gelu_tanh, ref_gelu_tanh, 5},
               {"gelu_quick", tfm_gelu_quick, ref_gelu_quick, 5},
               {"silu", tfm_silu, ref_silu, 8}};

Test(unary, every_op_dtype_and_layout_against_doubles) {
    TEST_EACH_ISA(c, 2) {
        size_t u;
        int d, layout;
        for (u = 0; u < sizeof unaries / sizeof unaries[0]; u++) {
            for (d = 0; d < 3; d++) {
                for (layout = 0; layout < LAYOUTS; layout++) {
                    const tfm_marker mark = tfm_mark(c);
                    tfm_tensor *t = lying(c, floats[d], TFM_SHAPE(3, 2, 71), layout, fabs(unaries[u].scale), 11), *y;
                    int64_t i;
                    if (unaries[u].scale < 0) t = tfm_shift(c, tfm_abs(c, t), 0.01f);
                    y = unaries[u].op(c, t);
                    assert_shape(c, y, tfm_shape_like(t));
                    cr_assert(y->dtype == t->dtype);
                    for (i = 0; i < tfm_numel(t); i++) {
                        const double want = unaries[u].reference(element(t, i));
                        cr_assert(near(element(y, i), want, (fabs(want) + 0.05) * (dtype_epsilon(floats[d]) + 4e-7)),
                                  "%s(%.9g) = %.9g, expected %.9g", unaries[u].name, element(t, i), element(y, i),
                                  want);
                    }
                    tfm_rewind(c, mark);
                }
            }
        }
    }
}

Test(unary, with_parameters) {
    TEST_EACH_ISA(c, 1) {
        static const float exponents[] = {2, 3, 0.5f, -0.5f, 1, 0, -1, 1.7f};
        tfm_tensor *t = plain(c, TFM_SHAPE(40), 1), *positive = tfm_shift(c, tfm_abs(c, t), 0.01f);
        int64_t i;
        size_t e;
        for (i = 0; i < 40; i++) {
            const double x = element(t, i), p = element(positive, i);
            cr_assert(near(element(tfm_scale(c, t, 3), i), 3 * x, 1e-6));
            cr_assert(near(element(tfm_shift(c, t, 3), i), 3 + x, 1e-6));
            cr_assert(element(tfm_clamp(c, t, -0.25f, 0.5f), i) == fmin(fmax(x, -0.25), 0.5));
            for (e = 0; e < sizeof exponents / sizeof exponents[0]; e++) {
                cr_assert(near(element(tfm_pow(c, positive, exponents[e]), i), pow(p, (double)exponents[e]),
                               3e-7 * pow(p, (double)exponents[e])));
            }
        }
        assert_same_tensor(c, tfm_pow(c, t, 3), tfm_mul(c, tfm_mul(c, t, t), t)); /* PyTorch's two roundings */
        cr_assert(isnan(tfm_item(tfm_clamp(c, tfm_full(c, TFM_F32, TFM_SHAPE(1), NAN), 0, 1))));
        cr_assert(isnan(tfm_item(tfm_relu(c, tfm_full(c, TFM_F32, TFM_SHAPE(1), NAN)))));
    }
}

Test(activation, numbers_are_those_of_the_ops) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = plain(c, TFM_SHAPE(100), 1);
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_NONE), t);
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_RELU), tfm_relu(c, t));
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_GELU), tfm_gelu(c, t));
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_GELU_TANH), tfm_gelu_tanh(c, t));
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_GELU_QUICK), tfm_gelu_quick(c, t));
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_SILU), tfm_silu(c, t));
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_SIGMOID), tfm_sigmoid(c, t));
    assert_same_tensor(c, tfm_activation(c, t, TFM_ACT_TANH), tfm_tanh(c, t));
    assert_refused(c, tfm_activation(c, t, TFM_ACT_COUNT), TFM_INVALID);
    assert_refused(c, tfm_activation(c, t, -1), TFM_INVALID);
    tfm_destroy(c);
}

Test(unary, integers_and_f64_are_storage_only) {
    tfm_ctx *c = context(1);
    cr_assert(tfm_exp(c, tfm_full(c, TFM_I64, TFM_SHAPE(3), 1)) == NULL);
    assert_error_says(c, "tfm_exp: t is i64 (3): i64 is storage only");
    assert_refused(c, tfm_exp(c, tfm_full(c, TFM_F64, TFM_SHAPE(3), 1)), TFM_INVALID);
    assert_refused(c, tfm_add(c, tfm_full(c, TFM_BOOL, TFM_SHAPE(3), 1), tfm_ones(c, TFM_SHAPE(3))), TFM_INVALID);
    assert_refused(c, tfm_softmax(c, tfm_full(c, TFM_I32, TFM_SHAPE(3), 1), 0), TFM_INVALID);
    assert_refused(c, tfm_sum(c, tfm_full(c, TFM_U8, TFM_SHAPE(3), 1), all_dims(), 0), TFM_INVALID);
    tfm_destroy(c);
}

/* -- two operands -------------------------------------------------------------------------------------------------- */

static double ref_add(double a, double b) { return a + b; }
static double ref_sub(double a, double b) { return a - b; }
static double ref_mul(double a, double b) { return a * b; }
static double ref_div(double a, double b) { return a / b; }
static double ref_minimum(double a, double b) { return a != a || b != b ? NAN : a < b ? a : b; }
static double ref_maximum(double a, double b) { return a != a || b != b ? NAN : a > b ? a : b; }

static const struct binary {
    const char *name;
    tfm_tensor *(*op)(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
    double (*reference)(double a, double b);
} binaries[] = {{"add", tfm_add, ref_add},
                {"sub", tfm_sub, ref_sub},
                {"mul", tfm_mul, ref_mul},
                {"div", tfm_div, ref_div},
                {"minimum", tfm_minimum, ref_minimum},
                {"maximum", tfm_maximum, ref_maximum}};

static tfm_shape broadcast_case(int i, int second) {
    switch (2 * i + second) {
    case 0: return TFM_SHAPE(4, 3, 37);
    case 1: return TFM_SHAPE(4, 3, 37);
    case 2: return TFM_SHAPE(4, 1, 37);
    case 3: return TFM_SHAPE(3, 1);
    case 4: return TFM_SHAPE(37);
    case 5: return TFM_SHAPE(4, 3, 1);
    case 6: return TFM_SHAPE(4, 3, 37);
    default: return scalar_shape();
    }
}

Test(binary, every_op_broadcast_dtype_and_layout_against_doubles) {
    TEST_EACH_ISA(c, 2) {
        size_t b;
        int shapes, da, db, layout;
        for (b = 0; b < sizeof binaries / sizeof binaries[0]; b++) {
            for (shapes = 0; shapes < 4; shapes++) {
                for (layout = 0; layout < LAYOUTS; layout++) {
                    for (da = 0; da < 3; da++) {
                        const tfm_marker mark = tfm_mark(c);
                        tfm_tensor *x, *z, *y;
                        int64_t i, at[6];
                        db = (da + shapes) % 3;
                        x = lying(c, floats[da], broadcast_case(shapes, 0), layout, 2, 1);
                        z = lying(c, floats[db], broadcast_case(shapes, 1), (layout + shapes) % LAYOUTS, 2, 2);
                        y = binaries[b].op(c, x, z);
                        assert_shape(c, y, TFM_SHAPE(4, 3, 37));
                        cr_assert(y->dtype == (da == db ? floats[da] : TFM_F32));
                        for (i = 0; i < tfm_numel(y); i++) {
                            double want;
                            unravel(y, i, at);
                            want = binaries[b].reference(broadcast_element(x, 3, at), broadcast_element(z, 3, at));
                            cr_assert(near(element(y, i), want, fabs(want) * (dtype_epsilon(y->dtype) + 1e-7) + 1e-7) ||
                                          fabs(want) > 6e4,
                                      "%s gives %.9g, expected %.9g", binaries[b].name, element(y, i), want);
                        }
                        tfm_rewind(c, mark);
                    }
                }
            }
        }
    }
}

Test(binary, nan_goes_through_minimum_and_maximum) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *x = tfm_full(c, TFM_F32, TFM_SHAPE(33), NAN), *one = tfm_ones(c, TFM_SHAPE(33));
        int64_t i;
        for (i = 0; i < 33; i += 8) {
            cr_assert(isnan(element(tfm_minimum(c, x, one), i)) && isnan(element(tfm_minimum(c, one, x), i)));
            cr_assert(isnan(element(tfm_maximum(c, x, one), i)) && isnan(element(tfm_maximum(c, one, x), i)));
        }
    }
}

Test(binary, shapes_that_do_not_broadcast_are_named) {
    tfm_ctx *c = context(1);
    cr_assert(tfm_add(c, tfm_ones(c, TFM_SHAPE(2, 3)), tfm_ones(c, TFM_SHAPE(4))) == NULL);
    assert_error_says(c, "tfm_add: a is f32 (2, 3), b is f32 (4): shapes do not broadcast in dim 1");
    assert_shape(c, tfm_add(c, tfm_ones(c, TFM_SHAPE(0, 3)), tfm_ones(c, TFM_SHAPE(1, 3))), TFM_SHAPE(0, 3));
    assert_refused(c, tfm_add(c, tfm_ones(c, TFM_SHAPE(0, 3)), tfm_ones(c, TFM_SHAPE(2, 3))), TFM_INVALID);
    tfm_destroy(c);
}

Test(glu, is_activation_of_gate_times_up) {
    TEST_EACH_ISA(c, 1) {
        int a, d;
        for (a = 0; a < TFM_ACT_COUNT; a++) {
            for (d = 0; d < 3; d++) {
                tfm_tensor *gate = lying(c, floats[d], TFM_SHAPE(2, 33), LIES_IN_STEPS, 3, 1),
                           *up = lying(c, floats[d], TFM_SHAPE(2, 33), LIES_PLAIN, 3, 2);
                tfm_tensor *y = tfm_glu(c, gate, up, a),
                           *want =
                               tfm_mul(c, tfm_activation(c, tfm_cast(c, gate, TFM_F32), a), tfm_cast(c, up, TFM_F32));
                assert_tensor_close(c, y, want, dtype_epsilon(floats[d]) * 1.1, 1e-6);
                cr_assert(y->dtype == floats[d]);
            }
        }
        {
            tfm_tensor *row = plain(c, TFM_SHAPE(33), 1), *column = plain(c, TFM_SHAPE(4, 1), 2);
            assert_same_tensor(c, tfm_glu(c, row, column, TFM_ACT_SILU), tfm_mul(c, tfm_silu(c, row), column));
            assert_same_tensor(c, tfm_glu(c, column, row, TFM_ACT_SILU), tfm_mul(c, tfm_silu(c, column), row));
        }
        assert_refused(c, tfm_glu(c, tfm_ones(c, TFM_SHAPE(2)), tfm_ones(c, TFM_SHAPE(2)), 77), TFM_INVALID);
    }
}

/* -- comparisons --------------------------------------------------------------------------------------------------- */

static int ref_compare(double a, double b, int relation) {
    switch (relation) {
    case TFM_EQ: return a == b;
    case TFM_NE: return a != b;
    case TFM_LT: return a < b;
    case TFM_LE: return a <= b;
    case TFM_GT: return a > b;
    default: return a >= b;
    }
}

Test(compare, every_pair_of_dtypes) {
    tfm_ctx *c = context(2);
    int a, b, relation;
    for (a = 0; a < TFM_DTYPE_COUNT; a++) {
        for (b = 0; b < TFM_DTYPE_COUNT; b++) {
            const tfm_marker mark = tfm_mark(c);
            tfm_tensor *x = tfm_cast(c, lying(c, I64, TFM_SHAPE(3, 17), LIES_TRANSPOSED, 1, 1), a);
            tfm_tensor *z = tfm_cast(c, lying(c, I64, TFM_SHAPE(3, 17), LIES_PLAIN, 1, 2), b);
            for (relation = TFM_EQ; relation <= TFM_GE; relation++) {
                tfm_tensor *y = tfm_compare(c, x, z, relation);
                int64_t i;
                assert_made(c, y);
                cr_assert(y->dtype == TFM_BOOL);
                for (i = 0; i < 51; i++)
                    cr_assert(element(y, i) == ref_compare(element(x, i), element(z, i), relation));
            }
            tfm_rewind(c, mark);
        }
    }
    assert_refused(c, tfm_compare(c, tfm_ones(c, TFM_SHAPE(2)), tfm_ones(c, TFM_SHAPE(2)), 6), TFM_INVALID);
    assert_refused(c, tfm_compare_scalar(c, tfm_ones(c, TFM_SHAPE(2)), 0, -1), TFM_INVALID);
    tfm_destroy(c);
}

Test(compare, integers_are_exact_beyond_doubles) {
    tfm_ctx *c = context(1);
    const int64_t big[2] = {((int64_t)1 << 53) + 1, INT64_MAX}, small[2] = {(int64_t)1 << 53, INT64_MAX - 1};
    tfm_tensor *a = tfm_from(c, TFM_I64, TFM_SHAPE(2), big), *b = tfm_from(c, TFM_I64, TFM_SHAPE(2), small),
               *d = tfm_cast(c, b, TFM_F64);
    const double both[] = {1, 1}, none[] = {0, 0}, first[] = {1, 0};
    assert_elements(c, tfm_compare(c, a, b, TFM_GT), 2, both);
    assert_elements(c, tfm_compare(c, a, b, TFM_EQ), 2, none);
    assert_elements(c, tfm_compare(c, a, d, TFM_GT), 2, first); /* d is 2^53, 2^63 */
    assert_elements(c, tfm_compare(c, d, a, TFM_LT), 2, first);
    assert_elements(c, tfm_compare_scalar(c, a, 9007199254740992.0, TFM_EQ), 2, none);
    assert_elements(c, tfm_compare_scalar(c, a, 9.5e18, TFM_LT), 2, both);
    assert_elements(c, tfm_compare_scalar(c, a, -1e300, TFM_GT), 2, both);
    assert_elements(c, tfm_compare_scalar(c, tfm_full(c, TFM_I64, TFM_SHAPE(2), 3), 3.5, TFM_LT), 2, both);
    assert_elements(c, tfm_compare_scalar(c, tfm_full(c, TFM_I64, TFM_SHAPE(2), -3), -3.5, TFM_GT), 2, both);
    a = tfm_full(c, TFM_I32, TFM_SHAPE(2), 16777217); /* no f32 */
    assert_elements(c, tfm_compare(c, a, tfm_full(c, TFM_I32, TFM_SHAPE(2), 16777216), TFM_EQ), 2, none);
    assert_elements(c, tfm_compare(c, a, tfm_full(c, TFM_F32, TFM_SHAPE(2), 16777216), TFM_GT), 2, both);
    tfm_destroy(c);
}

Test(compare, nan_equals_nothing) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = tfm_full(c, TFM_F32, TFM_SHAPE(1), NAN);
    int relation;
    for (relation = TFM_EQ; relation <= TFM_GE; relation++) {
        cr_assert(tfm_item(tfm_compare(c, x, x, relation)) == (relation == TFM_NE));
        cr_assert(tfm_item(tfm_compare(c, tfm_cast(c, x, TFM_F64), tfm_full(c, TFM_I64, TFM_SHAPE(1), 1), relation)) ==
                  (relation == TFM_NE));
        cr_assert(tfm_item(tfm_compare_scalar(c, tfm_full(c, TFM_I64, TFM_SHAPE(1), 1), NAN, relation))
                  == (relation == TFM_NE));
    }
    cr_assert(tfm_item(tfm_compare_scalar(c, tfm_full(c, TFM_F32, TFM_SHAPE(1), 0.1), 0.1, TFM_EQ)) == 1);
    tfm_destroy(c);
}

/* -- reductions ---------------------------------------------------------------------------------------------------- */

enum { SUM, MEAN, MAX, MIN, LOGSUMEXP };

static tfm_tensor *reduce(tfm_ctx *c, int what, const tfm_tensor *t, tfm_shape dims, int keepdim) {
    switch (what) {
    case SUM: return tfm_sum(c, t, dims, keepdim);
    case MEAN: return tfm_mean(c, t, dims, keepdim);
    case MAX: return tfm_max(c, t, dims, keepdim);
    case MIN: return tfm_min(c, t, dims, keepdim);
    default: return tfm_logsumexp(c, t, dims, keepdim);
    }
}

/* t (3 dims) over the axes whose bits are set. */
static void check_reduction(tfm_ctx *c, int what, const tfm_tensor *t, int axes) {
    tfm_shape dims = all_dims(), kept = tfm_shape_like(t);
    tfm_tensor *y, *k;
    int64_t o, i, n = 1;
    int d;
    for (d = 0; d < 3; d++) {
        if (!(axes >> d & 1)) continue;
        dims.dim[dims.ndim++] = d % 2 ? d : d - 3;
        n *= t->shape[d];
        kept.dim[d] = 1;
    }
    if (!axes) return;
    k = reduce(c, what, t, dims, 1);
    y = reduce(c, what, t, dims, 0);
    assert_shape(c, k, kept);
    cr_assert(y->ndim == 3 - dims.ndim && y->dtype == t->dtype);
    assert_same_bytes(y->data, k->data, tfm_numel(k) * tfm_dtype_size(k->dtype));
    for (o = 0; o < tfm_numel(k); o++) {
        int64_t base[3], at[3];
        double sum = 0, absolute = 0, most = -HUGE_VAL, least = HUGE_VAL, exps = 0, want;
        unravel(k, o, base);
        for (i = 0; i < n; i++) {
            int64_t rest = i;
            double x;
            for (d = 2; d >= 0; d--) {
                at[d] = base[d];
                if (axes >> d & 1) {
                    at[d] = rest % t->shape[d];
                    rest /= t->shape[d];
                }
            }
            x = tfm_get(t, at);
            sum += x;
            absolute += fabs(x);
            most = fmax(most, x);
            least = fmin(least, x);
            exps += exp(x);
        }
        want = what == SUM    ? sum
               : what == MEAN ? sum / (double)n
               : what == MAX  ? most
               : what == MIN  ? least
                              : log(exps);
        cr_assert(near(element(k, o), want,
                       what == MAX || what == MIN ? 0
                                                  : (fabs(want) + 0.01) * dtype_epsilon(t->dtype)
                                                        + 3e-7
                                                              * (what == SUM    ? absolute
                                                                 : what == MEAN ? absolute / (double)n
                                                                                : 1)),
                  "reduction %d over axes %d of %s: %.9g, expected %.9g", what, axes, tfm_dtype_name(t->dtype),
                  element(k, o), want);
    }
}

Test(reduce, every_set_of_axes_dtype_and_layout_against_doubles) {
    TEST_EACH_ISA(c, 2) {
        int what, d, layout, axes;
        for (what = SUM; what <= LOGSUMEXP; what++) {
            for (d = 0; d < 3; d++) {
                for (layout = 0; layout < LAYOUTS; layout++) {
                    const tfm_marker mark = tfm_mark(c);
                    const tfm_tensor *t = lying(c, floats[d], TFM_SHAPE(5, 4, 35), layout, 3, 8);
                    for (axes = 1; axes < 8; axes++) check_reduction(c, what, t, axes);
                    tfm_rewind(c, mark);
                }
            }
        }
    }
}

Test(reduce, empty_sets) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(3, 0, 2));
    const double zeros[6] = {0, 0, 0, 0, 0, 0};
    assert_elements(c, tfm_sum(c, t, TFM_SHAPE(1), 0), 6, zeros);
    cr_assert(isnan(element(tfm_mean(c, t, TFM_SHAPE(1), 0), 5)));
    cr_assert(element(tfm_logsumexp(c, t, TFM_SHAPE(1), 0), 5) == -HUGE_VAL);
    assert_shape(c, tfm_sum(c, t, TFM_SHAPE(0), 0), TFM_SHAPE(0, 2));
    assert_shape(c, tfm_max(c, t, TFM_SHAPE(0), 1), TFM_SHAPE(1, 0, 2));
    assert_refused(c, tfm_max(c, t, TFM_SHAPE(1), 0), TFM_INVALID);
    assert_refused(c, tfm_min(c, t, all_dims(), 0), TFM_INVALID);
    assert_refused(c, tfm_argmax(c, t, 1, 0), TFM_INVALID);
    assert_shape(c, tfm_argmax(c, t, 0, 0), TFM_SHAPE(0, 2));
    tfm_destroy(c);
}

Test(row_ops, no_rows_take_no_memory_however_long_they_are) {
    tfm_ctx *c = context(1);
    const tfm_tensor *t = tfm_empty(c, TFM_F32, TFM_SHAPE(0, (int64_t)1 << 40));
    const tfm_tensor *h = tfm_empty(c, TFM_F16, TFM_SHAPE(0, (int64_t)1 << 59));
    const tfm_tensor *ones = tfm_expand(c, tfm_full(c, TFM_F16, TFM_SHAPE(1), 1), TFM_SHAPE((int64_t)1 << 59));
    tfm_tensor *sum;
    tfm_norm_options o;
    memset(&o, 0, sizeof o);
    o.residual = h;
    o.sum = &sum;
    assert_shape(c, tfm_softmax(c, t, 1), TFM_SHAPE(0, (int64_t)1 << 40));
    assert_shape(c, tfm_logsumexp(c, t, TFM_SHAPE(1), 0), TFM_SHAPE(0));
    assert_shape(c, tfm_rms_norm(c, h, NULL, NULL), TFM_SHAPE(0, (int64_t)1 << 59));
    assert_shape(c, tfm_layer_norm(c, h, ones, ones, &o), TFM_SHAPE(0, (int64_t)1 << 59));
    assert_shape(c, tfm_topk(c, tfm_empty(c, TFM_F32, TFM_SHAPE(0, 0xffffffff)), 0xfffffff0, NULL),
                 TFM_SHAPE(0, 0xfffffff0));
    tfm_destroy(c);
}

Test(reduce, scalars_are_their_own_sum) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_full(c, TFM_F32, scalar_shape(), 3);
    cr_assert(tfm_item(tfm_sum(c, t, all_dims(), 1)) == 3 && tfm_item(tfm_max(c, t, TFM_SHAPE(-1), 0)) == 3);
    cr_assert(tfm_item(tfm_argmax(c, t, 0, 1)) == 0 && tfm_item(tfm_softmax(c, t, 0)) == 1);
    tfm_destroy(c);
}

Test(reduce, nan_goes_through_maximum_and_minimum) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *t = plain(c, TFM_SHAPE(50, 70), 1);
        const int64_t at[2] = {33, 41};
        assert_ok(c, tfm_set(c, t, at, NAN));
        cr_assert(isnan(tfm_item(tfm_max(c, t, all_dims(), 0))) && isnan(tfm_item(tfm_min(c, t, all_dims(), 0))));
        {
            tfm_tensor *h = tfm_cast(c, t, TFM_BF16); /* widened in pieces, of which the fifth has it */
            cr_assert(isnan(tfm_item(tfm_max(c, h, all_dims(), 0))) && isnan(tfm_item(tfm_min(c, h, all_dims(), 0))));
        }
        cr_assert(isnan(element(tfm_max(c, t, TFM_SHAPE(0), 0), 41))
                  && !isnan(element(tfm_max(c, t, TFM_SHAPE(0), 0), 40)));
        cr_assert(isnan(element(tfm_min(c, t, TFM_SHAPE(1), 0), 33))
                  && !isnan(element(tfm_min(c, t, TFM_SHAPE(1), 0), 32)));
    }
}

Test(reduce, logsumexp_of_infinities) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *t = tfm_full(c, TFM_F32, TFM_SHAPE(40), -HUGE_VAL);
        const int64_t at[1] = {20};
        cr_assert(tfm_item(tfm_logsumexp(c, t, all_dims(), 0)) == -HUGE_VAL);
        assert_ok(c, tfm_set(c, t, at, HUGE_VAL));
        cr_assert(tfm_item(tfm_logsumexp(c, t, all_dims(), 0)) == HUGE_VAL);
        assert_ok(c, tfm_set(c, t, at, 1000));
        cr_assert(tfm_item(tfm_logsumexp(c, t, all_dims(), 0)) == 1000);
    }
}

/* Of rows that lie side by side some are taken: a row has the bits that it has among all. */
Test(reduce, a_row_has_the_bits_of_a_row_in_a_batch) {
    TEST_EACH_ISA(c, 2) {
        static tfm_tensor *(*const ops[])(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim) = {
            tfm_sum, tfm_mean, tfm_max, tfm_min, tfm_logsumexp};
        static const int64_t rows[] = {1, 2, 15, 16, 31}, lengths[] = {3, 200, 1001, 140000}; /* the last one in parts */
        int op, i, j, way;
        for (way = 0; way < 3; way++)
            for (j = 0; j < (way == 1 && !test_quick() ? 4 : 3); j++) {
                const tfm_marker mark = tfm_mark(c);
                const int64_t n = lengths[j];
                tfm_tensor *x = way == 0 ? tfm_randn(c, TFM_SHAPE(32, n))
                    : way == 1 ? tfm_transpose(c, tfm_randn(c, TFM_SHAPE(n, 32)), 0, 1)
                               : tfm_slice(c, tfm_randn(c, TFM_SHAPE(32, 2 * n)), 1, 0, 2 * n, 2);
                for (op = 0; op < (j == 3 ? 1 : 5); op++) {
                    tfm_tensor *all = ops[op](c, x, TFM_SHAPE(1), 0);
                    for (i = 0; i < 5; i++) {
                        tfm_tensor *some = ops[op](c, tfm_narrow(c, x, 0, 1, rows[i]), TFM_SHAPE(1), 0);
                        assert_same_tensor(c, tfm_narrow(c, all, 0, 1, rows[i]), some);
                    }
                }
                tfm_rewind(c, mark);
            }
    }
}

Test(reduce, the_largest_of_zeros_is_0_in_any_order) {
    TEST_EACH_ISA(c, 1) {
        static const float zeros[] = {0, -0.0f, -0.0f, 0, -0.0f, -0.0f};
        const tfm_tensor *x = tfm_from(c, TFM_F32, TFM_SHAPE(3, 2), zeros), *y = tfm_zeros(c, TFM_SHAPE(3));
        assert_same_tensor(c, tfm_max(c, x, TFM_SHAPE(1), 0), y);
        assert_same_tensor(c, tfm_min(c, x, TFM_SHAPE(1), 0), y);
        assert_same_tensor(c, tfm_max(c, tfm_transpose(c, x, 0, 1), TFM_SHAPE(0), 0), y);
    }
}

Test(reduce, of_one_element_it_is_that_element) {
    TEST_EACH_ISA(c, 2) {
        static tfm_tensor *(*const ops[])(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim) = {
            tfm_sum, tfm_mean, tfm_max, tfm_min, tfm_logsumexp};
        static const float odd[] = {-0.0f, HUGE_VALF, -HUGE_VALF, 1e-45f};
        int d, op, i;
        for (d = 0; d < 3; d++) {
            const tfm_marker mark = tfm_mark(c);
            tfm_tensor *x = tfm_randn(c, TFM_SHAPE(5, 1, 150)), *turned;
            for (i = 0; i < 4; i++) {
                const int64_t at[3] = {i, 0, 140 - i};
                assert_ok(c, tfm_set(c, x, at, odd[i]));
            }
            x = tfm_cast(c, x, floats[d]);
            turned = tfm_transpose(c, x, 0, 2);
            for (op = 0; op < 5; op++) { /* + 0: a sum begins with it */
                assert_same_tensor(c, ops[op](c, x, TFM_SHAPE(1), 1), tfm_shift(c, x, 0));
                assert_same_tensor(c, ops[op](c, turned, TFM_SHAPE(1), 1), tfm_shift(c, turned, 0));
            }
            tfm_rewind(c, mark);
        }
    }
}

Test(reduce, long_sums_stay_accurate) {
    TEST_EACH_ISA(c, 2) {
        tfm_tensor *row = tfm_full(c, TFM_F32, TFM_SHAPE(1 << 20), 0.1),
                   *columns = tfm_expand(c, tfm_full(c, TFM_F32, TFM_SHAPE(1, 32), 0.1), TFM_SHAPE(1 << 17, 32));
        const double tenth = (double)0.1f;
        cr_assert(near(tfm_item(tfm_sum(c, row, all_dims(), 0)), 1048576 * tenth, 1048576 * tenth * 2e-6));
        cr_assert(near(element(tfm_sum(c, columns, TFM_SHAPE(0), 0), 31), 131072 * tenth, 131072 * tenth * 2e-6));
    }
}

/* In parts, in blocks of columns, over rows that are no single dim, and of as many rows as are added before a sum goes
 * into the double. The element (a, b, c) is 1000 a + c + 1. */
Test(reduce, every_element_counts_once_however_it_is_cut) {
    static const int64_t shapes[][3] = {{2, 64, 20}, {3, 40, 300}, {2, 1001, 32}, {2, 1001, 5},
                                        {1, 140000, 17}, {3, 1, 140000}};
    TEST_EACH_ISA(c, 1) {
        int i, axes, d;
        for (i = 0; i < (test_quick() ? 4 : 6); i++) {
            const tfm_marker mark = tfm_mark(c);
            const int64_t *n = shapes[i];
            tfm_tensor *t = tfm_narrow(c, tfm_empty(c, TFM_F32, TFM_SHAPE(n[0], n[1] + 1, n[2])), 1, 0, n[1]);
            tfm_tensor *high = tfm_arange(c, TFM_F32, 0, 1000 * (double)n[0], 1000);
            high = tfm_reshape(c, high, TFM_SHAPE(n[0], 1, 1));
            assert_ok(c, tfm_copy(c, t, tfm_add(c, high, tfm_arange(c, TFM_F32, 1, (double)n[2] + 1, 1))));
            for (axes = 1; axes < 8; axes++) {
                tfm_shape dims = all_dims();
                tfm_tensor *y;
                int64_t o;
                for (d = 0; d < 3; d++)
                    if (axes >> d & 1) dims.dim[dims.ndim++] = d;
                y = tfm_sum(c, t, dims, 1);
                assert_made(c, y);
                for (o = 0; o < tfm_numel(y); o += 1 + tfm_numel(y) / 100) {
                    const double rows = axes & 2 ? (double)n[1] : 1, A = axes & 1 ? (double)n[0] : 1,
                                 C = axes & 4 ? (double)n[2] : 1;
                    int64_t at[3];
                    double want;
                    unravel(y, o, at);
                    want = rows * (C * 1000 * (axes & 1 ? A * (A - 1) / 2 : (double)at[0])
                                   + A * (axes & 4 ? C * (C + 1) / 2 : (double)at[2] + 1));
                    cr_assert(near(element(y, o), want, want * 1e-6), "shape %d, axes %d: output %d is %.9g, not %.9g",
                              i, axes, (int)o, element(y, o), want);
                }
            }
            t = tfm_narrow(c, tfm_randn(c, TFM_SHAPE(n[0], n[1] + 1, n[2])), 1, 0, n[1]);
            assert_same_tensor(c, tfm_narrow(c, tfm_sum(c, t, TFM_SHAPE(0, 1), 0), 0, 0, 5),
                               tfm_sum(c, tfm_narrow(c, t, 2, 0, 5), TFM_SHAPE(0, 1), 0));
            tfm_rewind(c, mark);
        }
    }
}

/* Rows that the scratch of a thread cannot hold; damage behind a block shows when it is freed. */
Test(row_ops, rows_longer_than_any_scratch_have_the_same_values) {
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    tfm_tensor *x, *t, *h;
    const int64_t n = 300000;
    int64_t i;
    memset(&o, 0, sizeof o);
    o.allocator = test_allocator(&m);
    o.threads = 3;
    c = tfm_create(&o);
    x = tfm_randn(c, TFM_SHAPE(4, n));
    t = tfm_transpose(c, tfm_clone(c, tfm_transpose(c, x, 0, 1)), 0, 1);
    h = tfm_cast(c, tfm_narrow(c, x, 1, 0, 10000 * (n / 10000)), TFM_BF16);
    assert_same_tensor(c, tfm_softmax(c, t, 1), tfm_softmax(c, x, 1));
    assert_same_tensor(c, tfm_logsumexp(c, t, TFM_SHAPE(1), 0), tfm_logsumexp(c, x, TFM_SHAPE(1), 0));
    for (i = 0; i < 4; i++) {
        assert_same_tensor(c, tfm_select(c, tfm_topk(c, x, n / 2, NULL), 0, i),
                           tfm_topk(c, tfm_select(c, x, 0, i), n / 2, NULL));
    }
    h = tfm_narrow(c, tfm_reshape(c, h, TFM_SHAPE(-1, 10000)), 0, 0, 80);
    t = tfm_layer_norm(c, h, NULL, NULL, NULL);
    for (i = 0; i < 80; i += 13) {
        x = tfm_layer_norm(c, tfm_narrow(c, h, 0, i, 1), NULL, NULL, NULL);
        assert_same_tensor(c, tfm_narrow(c, t, 0, i, 1), x);
    }
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(reduce, impossible_dims_are_refused) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_ones(c, TFM_SHAPE(2, 3));
    tfm_shape seven = TFM_SHAPE(0);
    seven.ndim = 7;
    assert_refused(c, tfm_sum(c, t, TFM_SHAPE(2), 0), TFM_INVALID);
    assert_refused(c, tfm_sum(c, t, TFM_SHAPE(0, -2), 0), TFM_INVALID);
    assert_refused(c, tfm_sum(c, t, TFM_SHAPE(INT64_MIN), 0), TFM_INVALID);
    cr_assert_null(tfm_sum(c, t, seven, 0));
    assert_error_says(c, "dims has 7 entries");
    seven.ndim = -1;
    assert_refused(c, tfm_sum(c, t, seven, 0), TFM_INVALID);
    assert_refused(c, tfm_argmax(c, t, 2, 0), TFM_INVALID);
    tfm_destroy(c);
}

/* -- ranking ------------------------------------------------------------------------------------------------------- */

Test(argmax, finds_the_first_of_equals_in_any_dtype_and_layout) {
    TEST_EACH_ISA(c, 2) {
        int dtype, layout, dim;
        for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) {
            for (layout = 0; layout < LAYOUTS; layout++) {
                const tfm_marker mark = tfm_mark(c);
                tfm_tensor *t = lying(c, dtype, TFM_SHAPE(4, 600), layout, 3, 4);
                for (dim = 0; dim < 2; dim++) {
                    tfm_tensor *y = tfm_argmax(c, t, dim, 0);
                    int64_t o, i;
                    assert_shape(c, y, dim ? TFM_SHAPE(4) : TFM_SHAPE(600));
                    cr_assert(y->dtype == TFM_I64);
                    for (o = 0; o < tfm_numel(y); o += dim ? 1 : 37) {
                        int64_t best = 0, at[2], top[2];
                        at[1 - dim] = top[1 - dim] = o;
                        for (i = 1; i < t->shape[dim]; i++) {
                            at[dim] = i;
                            top[dim] = best;
                            if (tfm_get(t, at) > tfm_get(t, top)) best = i;
                        }
                        cr_assert((int64_t)element(y, o) == best);
                    }
                }
                tfm_rewind(c, mark);
            }
        }
    }
}

Test(argmax, nan_is_the_largest) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *t = plain(c, TFM_SHAPE(1000), 1), *d;
        const int64_t at[1] = {777}, later[1] = {900};
        assert_ok(c, tfm_set(c, t, at, NAN));
        assert_ok(c, tfm_set(c, t, later, NAN));
        d = tfm_cast(c, t, TFM_F64);
        cr_assert(tfm_item(tfm_argmax(c, t, 0, 0)) == 777 && tfm_item(tfm_argmax(c, d, 0, 0)) == 777);
    }
}

Test(topk, is_sorted_and_stable) {
    TEST_EACH_ISA(c, 2) {
        int d, layout;
        int64_t k;
        for (d = 0; d < 3; d++) {
            for (layout = 0; layout < LAYOUTS; layout++) {
                const tfm_marker mark = tfm_mark(c);
                tfm_tensor *t =
                    tfm_cast(c, lying(c, I64, TFM_SHAPE(3, 700), layout, 1, 4), floats[d]); /* many equal values */
                for (k = 0; k <= 700; k = 3 * k + 1) {
                    tfm_tensor *places = NULL, *y = tfm_topk(c, t, k, &places);
                    int64_t r, i;
                    assert_shape(c, y, TFM_SHAPE(3, k));
                    assert_shape(c, places, TFM_SHAPE(3, k));
                    assert_same_tensor(c, tfm_gather(c, t, 1, places), y);
                    for (r = 0; r < 3; r++) {
                        for (i = 1; i < k; i++) {
                            const double a = element(y, r * k + i - 1), b = element(y, r * k + i);
                            cr_assert(a > b || (a == b && element(places, r * k + i - 1) < element(places, r * k + i)));
                        }
                        if (k) { /* no other element is better than the last */
                            int64_t better = 0;
                            for (i = 0; i < 700; i++) better += element(t, r * 700 + i) > element(y, r * k + k - 1);
                            cr_assert(better < k);
                        }
                    }
                    assert_same_tensor(c, tfm_topk(c, t, k, NULL), y);
                }
                tfm_rewind(c, mark);
            }
        }
        {
            const float special[] = {-0.0f, 1, NAN, 0, -NAN, -1};
            const double order[] = {2, 4, 1, 0, 3, 5};
            tfm_tensor *places = NULL;
            assert_made(c, tfm_topk(c, tfm_from(c, TFM_F32, TFM_SHAPE(6), special), 6, &places));
            assert_elements(c, places, 6, order);
            assert_refused(c, tfm_topk(c, tfm_ones(c, TFM_SHAPE(3)), 4, &places), TFM_INVALID);
            cr_assert_null(places);
        }
        assert_refused(c, tfm_topk(c, tfm_ones(c, TFM_SHAPE(3)), 4, NULL), TFM_INVALID);
        assert_refused(c, tfm_topk(c, tfm_ones(c, TFM_SHAPE(3)), -1, NULL), TFM_INVALID);
        assert_refused(c, tfm_topk(c, tfm_full(c, TFM_F32, scalar_shape(), 3), 0, NULL), TFM_INVALID);
        cr_assert(tfm_item(tfm_topk(c, tfm_full(c, TFM_F32, scalar_shape(), 3), 1, NULL)) == 3);
        assert_refused(c, tfm_topk(c, tfm_full(c, TFM_I64, TFM_SHAPE(3), 1), 1, NULL), TFM_INVALID);
    }
}

/* -- softmax ------------------------------------------------------------------------------------------------------- */

Test(softmax, every_dim_dtype_and_layout_against_doubles) {
    TEST_EACH_ISA(c, 2) {
        int d, layout, dim, logs;
        for (d = 0; d < 3; d++) {
            for (layout = 0; layout < LAYOUTS; layout++) {
                const tfm_marker mark = tfm_mark(c);
                tfm_tensor *t = lying(c, floats[d], TFM_SHAPE(5, 3, 34), layout, 6, 4);
                for (dim = 0; dim < 3; dim++) {
                    for (logs = 0; logs < 2; logs++) {
                        tfm_tensor *y = logs ? tfm_log_softmax(c, t, dim - 3) : tfm_softmax(c, t, dim);
                        int64_t i, j, at[3], here[3];
                        assert_shape(c, y, TFM_SHAPE(5, 3, 34));
                        for (i = 0; i < 510; i += 3) {
                            double sum = 0, want;
                            unravel(t, i, at);
                            memcpy(here, at, sizeof at);
                            for (j = 0; j < t->shape[dim]; j++) {
                                here[dim] = j;
                                sum += exp(tfm_get(t, here));
                            }
                            want = logs ? tfm_get(t, at) - log(sum) : exp(tfm_get(t, at)) / sum;
                            cr_assert(near(tfm_get(y, at), want,
                                           fabs(want) * (dtype_epsilon(floats[d]) + 4e-7) + 6e-8 + 6e-7 * logs));
                        }
                    }
                }
                tfm_rewind(c, mark);
            }
        }
    }
}

/* Many slices side by side are turned, 32 at a time; of few, or long ones, elements are gathered. */
Test(softmax, a_slice_has_the_same_bits_along_every_dim) {
    TEST_EACH_ISA(c, 2) {
        static tfm_tensor *(*const ops[])(tfm_ctx *c, const tfm_tensor *t, int dim) = {tfm_softmax, tfm_log_softmax};
        static const int64_t sizes[][3] = {{1, 7, 16}, {2, 33, 47}, {3, 70, 15}, {1, 129, 100}, {2, 1, 40},
                                           {1, 8193, 17}};
        int d, i, op;
        for (d = 0; d < 3; d++)
            for (i = 0; i < 6; i++)
                for (op = 0; op < 2; op++) {
                    const tfm_marker mark = tfm_mark(c);
                    tfm_tensor *x = tfm_cast(c, tfm_randn(c, tfm_shape_of(3, sizes[i])), floats[d]);
                    tfm_tensor *turned = tfm_contiguous(c, tfm_transpose(c, x, 1, 2));
                    assert_same_tensor(c, ops[op](c, x, 1), tfm_transpose(c, ops[op](c, turned, 2), 1, 2));
                    tfm_rewind(c, mark);
                }
    }
}

Test(softmax, slices_of_minus_infinity_give_zeros_and_nan_stays_in_its_slice) {
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(3, 20)), *y;
        int64_t at[2];
        for (at[0] = 1, at[1] = 0; at[1] < 20; at[1]++) assert_ok(c, tfm_set(c, t, at, -HUGE_VAL));
        at[0] = 2, at[1] = 5;
        assert_ok(c, tfm_set(c, t, at, NAN));
        y = tfm_softmax(c, t, 1);
        cr_assert(near(element(y, 0), 0.05, 1e-8) && element(y, 20) == 0 && element(y, 39) == 0
                  && isnan(element(y, 40)));
        assert_shape(c, tfm_softmax(c, tfm_zeros(c, TFM_SHAPE(3, 0)), 1), TFM_SHAPE(3, 0));
        assert_shape(c, tfm_softmax(c, tfm_zeros(c, TFM_SHAPE(0, 3)), 1), TFM_SHAPE(0, 3));
    }
}

/* -- norms --------------------------------------------------------------------------------------------------------- */

static void check_norm(tfm_ctx *c, int layer, int dtype, int weight_dtype, int layout, int dims, int with_residual) {
    const tfm_marker mark = tfm_mark(c);
    const tfm_shape shape = TFM_SHAPE(4, 3, 38);
    tfm_tensor *x = lying(c, dtype, shape, layout, 2, 1),
               *residual = with_residual ? lying(c, dtype, shape, (layout + 1) % LAYOUTS, 2, 2) : NULL;
    tfm_shape inner = tfm_shape_of(dims, shape.dim + 3 - dims), statistics = shape;
    tfm_tensor *weight = lying(c, weight_dtype, inner, layout, 1, 3),
               *bias = lying(c, weight_dtype, inner, LIES_IN_STEPS, 1, 4);
    tfm_tensor *sum = NULL, *mean = NULL, *rstd = NULL, *y;
    tfm_norm_options o;
    int64_t rows = 1, n = 1, r, i;
    int d;
    memset(&o, 0, sizeof o);
    o.eps = 1e-3f;
    o.weight_offset = 1;
    o.residual = residual;
    o.sum = &sum;
    o.mean = &mean;
    o.rstd = &rstd;
    y = layer ? tfm_layer_norm(c, x, weight, bias, &o) : tfm_rms_norm(c, x, weight, &o);
    for (d = 0; d < 3; d++) {
        if (d < 3 - dims) rows *= shape.dim[d];
        else n *= shape.dim[d], statistics.dim[d] = 1;
    }
    assert_shape(c, y, shape);
    assert_shape(c, sum, shape);
    assert_shape(c, mean, statistics);
    assert_shape(c, rstd, statistics);
    cr_assert(y->dtype == dtype && mean->dtype == TFM_F32);
    for (r = 0; r < rows; r++) {
        double m = 0, square = 0, scale;
        for (i = 0; i < n; i++) {
            m += layer ? (element(x, r * n + i) + (residual ? element(residual, r * n + i) : 0)) / (double)n : 0;
        }
        for (i = 0; i < n; i++) {
            const double v = element(x, r * n + i) + (residual ? element(residual, r * n + i) : 0) - m;
            square += v * v / (double)n;
        }
        scale = 1 / sqrt(square + (double)1e-3f);
        if (layer) cr_assert(near(element(mean, r), m, 2e-6));
        cr_assert(near(element(rstd, r), scale, 2e-5 * scale));
        for (i = 0; i < n; i++) {
            const double v = element(x, r * n + i) + (residual ? element(residual, r * n + i) : 0);
            const double want = (v - m) * scale * (1 + element(weight, i)) + (layer ? element(bias, i) : 0);
            cr_assert(near(element(sum, r * n + i), v, fabs(v) * dtype_epsilon(dtype)));
            cr_assert(near(element(y, r * n + i), want, (fabs(want) + 1) * (dtype_epsilon(dtype) + 2e-6)),
                      "%.9g, expected %.9g", element(y, r * n + i), want);
        }
    }
    tfm_rewind(c, mark);
}

Test(norm, layer_and_rms_with_everything_against_doubles) {
    TEST_EACH_ISA(c, 2) {
        int d, layout, dims;
        for (d = 0; d < 3; d++) {
            for (layout = 0; layout < LAYOUTS; layout++) {
                for (dims = 1; dims <= 3; dims++) {
                    check_norm(c, 1, floats[d], floats[(d + layout) % 3], layout, dims, layout % 2);
                    check_norm(c, 0, floats[d], floats[(d + layout) % 3], layout, dims, 1 - layout % 2);
                }
            }
        }
    }
}

Test(norm, without_options_and_weights_is_pytorchs_default) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = plain(c, TFM_SHAPE(2, 8), 1), *y = tfm_layer_norm(c, x, NULL, NULL, NULL);
    double mean = 0, square = 0;
    int i;
    for (i = 0; i < 8; i++) mean += element(x, i) / 8;
    for (i = 0; i < 8; i++) square += (element(x, i) - mean) * (element(x, i) - mean) / 8;
    cr_assert(near(element(y, 3), (element(x, 3) - mean) / sqrt(square + 1e-5), 1e-6));
    tfm_destroy(c);
}

Test(norm, impossible_ones_are_refused) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(2, 8)), *other[3] = {x, x, x};
    tfm_norm_options o;
    memset(&o, 0, sizeof o);
    assert_refused(c, tfm_layer_norm(c, x, tfm_ones(c, TFM_SHAPE(7)), NULL, NULL), TFM_INVALID);
    assert_refused(c, tfm_layer_norm(c, x, NULL, tfm_ones(c, TFM_SHAPE(2, 2, 8)), NULL), TFM_INVALID);
    assert_refused(c, tfm_layer_norm(c, tfm_ones(c, scalar_shape()), NULL, NULL, NULL), TFM_INVALID);
    o.normalized_dims = 3;
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.normalized_dims = 0;
    o.eps = -1;
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.eps = INFINITY;
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.eps = 0;
    o.eps = NAN;
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.eps = 0;
    o.weight_offset = NAN;
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.weight_offset = INFINITY;
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.weight_offset = 0;
    o.sum = &other[0], o.mean = &other[1], o.rstd = &other[2]; /* not there after an error */
    o.residual = tfm_ones(c, TFM_SHAPE(8));
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.residual = tfm_ones(c, TFM_SHAPE(2, 8, 1));
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    cr_assert(!other[0] && !other[1] && !other[2]);
    o.residual = tfm_full(c, TFM_I32, TFM_SHAPE(2, 8), 1);
    assert_refused(c, tfm_rms_norm(c, x, NULL, &o), TFM_INVALID);
    o.residual = NULL;
    o.normalized_dims = 2;
    assert_refused(c, tfm_rms_norm(c, x, tfm_ones(c, TFM_SHAPE(8)), &o), TFM_INVALID);
    assert_refused(c, tfm_layer_norm(c, x, tfm_ones(c, TFM_SHAPE(8)), tfm_ones(c, TFM_SHAPE(8, 1)), NULL),
                   TFM_INVALID);
    assert_refused(c, tfm_rms_norm(c, x, tfm_full(c, TFM_I32, TFM_SHAPE(8), 1), NULL), TFM_INVALID);
    assert_shape(c, tfm_layer_norm(c, tfm_ones(c, TFM_SHAPE(0, 8)), NULL, NULL, NULL), TFM_SHAPE(0, 8));
    assert_shape(c, tfm_layer_norm(c, tfm_ones(c, TFM_SHAPE(8, 0)), NULL, NULL, NULL), TFM_SHAPE(8, 0));
    tfm_destroy(c);
}

Test(norm, residual_of_another_dtype_makes_f32_and_rows_of_nothing_have_no_statistics) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = lying(c, TFM_BF16, TFM_SHAPE(3, 9), LIES_PLAIN, 1, 1), *residual = plain(c, TFM_SHAPE(3, 9), 2);
    tfm_tensor *sum, *mean, *rstd, *y;
    tfm_norm_options o;
    memset(&o, 0, sizeof o);
    o.residual = residual;
    o.sum = &sum;
    y = tfm_layer_norm(c, x, NULL, NULL, &o);
    assert_same_tensor(c, sum, tfm_add(c, x, residual));
    assert_same_tensor(c, y, tfm_layer_norm(c, sum, NULL, NULL, NULL));
    memset(&o, 0, sizeof o);
    o.mean = &mean;
    o.rstd = &rstd;
    assert_shape(c, tfm_layer_norm(c, tfm_ones(c, TFM_SHAPE(2, 0)), NULL, NULL, &o), TFM_SHAPE(2, 0));
    cr_assert(isnan(element(mean, 1)) && isnan(element(rstd, 1)));
    tfm_destroy(c);
}

/* -- dropout ------------------------------------------------------------------------------------------------------- */

Test(dropout, drops_the_share_and_scales_the_rest) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(300, 400)), *y = tfm_dropout(c, x, 0.25f), *again = tfm_dropout(c, x, 0.25f);
    const float *v = (const float *)y->data;
    int64_t i, dropped = 0;
    for (i = 0; i < 120000; i++) {
        cr_assert(v[i] == 0.0f || v[i] == 1.0f / 0.75f);
        dropped += v[i] == 0.0f;
    }
    cr_assert(llabs(dropped - 30000) < 800, "%lld", (long long)dropped);
    cr_assert(memcmp(y->data, again->data, 480000) != 0, "two calls draw the same numbers");
    tfm_seed(c, 7);
    assert_same_tensor(c, tfm_dropout(c, x, 0.25f), y); /* 7 is the context's seed */
    tfm_seed(c, 7); /* the element's number counts, however it lies */
    assert_same_tensor(c, tfm_dropout(c, tfm_transpose(c, tfm_ones(c, TFM_SHAPE(400, 300)), 0, 1), 0.25f), y);
    cr_assert(tfm_dropout(c, x, 0)->data == x->data);
    cr_assert(tfm_item(tfm_max(c, tfm_dropout(c, x, 1), all_dims(), 0)) == 0);
    cr_assert(tfm_item(tfm_dropout(c, tfm_full(c, TFM_F32, TFM_SHAPE(1), NAN), 1)) == 0);
    assert_refused(c, tfm_dropout(c, x, -0.1f), TFM_INVALID);
    assert_refused(c, tfm_dropout(c, x, NAN), TFM_INVALID);
    tfm_destroy(c);
}

/* -- threads ------------------------------------------------------------------------------------------------------- */

/* Results of ops on large tensors, one after the other in `out`. */
static int64_t run_everything(tfm_ctx *c, float *out, int64_t room) {
    tfm_tensor *x = plain(c, TFM_SHAPE(70, 9, 301), 1), *t = tfm_transpose(c, x, 0, 2), *h = tfm_cast(c, x, TFM_BF16),
               *list[24];
    tfm_tensor *row = plain(c, TFM_SHAPE(301), 2), *wide = plain(c, TFM_SHAPE(300000), 3);
    int64_t used = 0;
    int n = 0, i;
    list[n++] = tfm_gelu(c, t);
    list[n++] = tfm_exp(c, h);
    list[n++] = tfm_mul(c, x, row);
    list[n++] = tfm_add(c, h, tfm_transpose(c, t, 0, 2));
    list[n++] = tfm_sum(c, x, TFM_SHAPE(0, 1), 0);
    list[n++] = tfm_sum(c, x, TFM_SHAPE(2), 0);
    list[n++] = tfm_sum(c, t, TFM_SHAPE(1), 0);
    list[n++] = tfm_sum(c, wide, all_dims(), 0);
    list[n++] = tfm_mean(c, tfm_reshape(c, wide, TFM_SHAPE(2, 150000)), TFM_SHAPE(1), 0);
    list[n++] = tfm_max(c, h, TFM_SHAPE(0), 0);
    list[n++] = tfm_logsumexp(c, t, TFM_SHAPE(0), 0);
    list[n++] = tfm_softmax(c, x, 0);
    list[n++] = tfm_softmax(c, x, -1);
    list[n++] = tfm_log_softmax(c, h, -1);
    list[n++] = tfm_layer_norm(c, t, NULL, NULL, NULL);
    list[n++] = tfm_rms_norm(c, x, row, NULL);
    list[n++] = tfm_dropout(c, t, 0.5f);
    list[n++] = tfm_argmax(c, x, 0, 0);
    list[n++] = tfm_topk(c, x, 5, NULL);
    list[n++] = tfm_clone(c, t);
    for (i = 0; i < n; i++) {
        const int64_t count = tfm_numel(list[i]);
        assert_made(c, list[i]);
        cr_assert(used + count <= room);
        assert_ok(c, tfm_read(c, list[i], out + used, count));
        used += count;
    }
    return used;
}

Test(threads_of_ops, any_number_gives_the_same_bits) {
    const int64_t room = 4000000;
    float *first = (float *)malloc((size_t)room * sizeof(float)), *now = (float *)malloc((size_t)room * sizeof(float));
    static const int counts[] = {1, 2, 3, 7};
    int isa, i;
    for (isa = 0; isa < TEST_ISAS; isa++) {
        for (i = 0; i < 4; i++) {
            tfm_ctx *c = test_isa_context(isa, counts[i]);
            int64_t used;
            if (!c) continue;
            used = run_everything(c, i ? now : first, room);
            if (i) assert_same_bytes(now, first, used * (int64_t)sizeof(float));
            tfm_destroy(c);
        }
    }
    free(first);
    free(now);
}

/* -- recording ----------------------------------------------------------------------------------------------------- */

Test(recording, results_inherit_the_need_of_a_gradient) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = plain(c, TFM_SHAPE(2, 3), 1), *w = plain(c, TFM_SHAPE(2, 3), 2), *y;
    cr_assert(tfm_add(c, x, w)->requires_grad == 0 && tfm_tape_length(c) == 0);
    assert_ok(c, tfm_set_requires_grad(c, w, 1));
    y = tfm_mul(c, x, w);
    cr_assert(y->requires_grad && tfm_tape_length(c) == 1);
    cr_assert(tfm_transpose(c, y, 0, 1)->requires_grad && tfm_tape_length(c) == 2);
    cr_assert(tfm_sum(c, y, all_dims(), 0)->requires_grad && tfm_layer_norm(c, y, NULL, NULL, NULL)->requires_grad);
    cr_assert(tfm_compare(c, y, x, TFM_GT)->requires_grad == 0 && tfm_argmax(c, y, 0, 0)->requires_grad == 0);
    cr_assert(tfm_tape_length(c) == 4);
    cr_assert(tfm_exp(c, x)->requires_grad == 0 && tfm_tape_length(c) == 4);
    tfm_tape_clear(c);
    cr_assert(tfm_tape_length(c) == 0 && y->requires_grad == 0 && w->requires_grad == 1);
    assert_verb_refused(c, tfm_set_requires_grad(c, tfm_full(c, TFM_I64, TFM_SHAPE(1), 1), 1), TFM_INVALID);
    tfm_destroy(c);
}

Test(recording, what_the_tape_reads_cannot_be_written) {
    tfm_ctx *c = context(1);
    tfm_tensor *x = plain(c, TFM_SHAPE(4, 3), 1), *w = plain(c, TFM_SHAPE(4, 3), 2),
               *free_one = plain(c, TFM_SHAPE(4, 3), 3), *y, *places, *rstd;
    const tfm_tensor *list[2];
    const int64_t at[2] = {0, 0}, second[2] = {1, 2};
    tfm_norm_options o;
    memset(&o, 0, sizeof o);
    assert_ok(c, tfm_set_requires_grad(c, w, 1));
    assert_ok(c, tfm_set(c, x, at, 1));
    y = tfm_mul(c, x, w);
    assert_verb_refused(c, tfm_copy(c, w, free_one), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, y, free_one), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, tfm_narrow(c, x, 0, 1, 2), tfm_narrow(c, free_one, 0, 1, 2)), TFM_INVALID);
    assert_verb_refused(c, tfm_set(c, x, at, 1), TFM_INVALID);
    assert_verb_refused(c, tfm_copy(c, tfm_wrap(c, TFM_F32, TFM_SHAPE(4, 3), y->data), free_one), TFM_INVALID);
    assert_ok(c, tfm_copy(c, free_one, x));
    assert_verb_refused(c, tfm_set_requires_grad(c, y, 0), TFM_INVALID);
    list[0] = w;
    list[1] = tfm_narrow(c, free_one, 0, 1, 1);
    assert_made(c, tfm_cat(c, list, 2, 0));
    assert_verb_refused(c, tfm_set(c, free_one, second, 1), TFM_INVALID); /* the rows beside it are not read */
    assert_ok(c, tfm_copy(c, tfm_narrow(c, free_one, 0, 0, 1), tfm_narrow(c, free_one, 0, 2, 1)));
    assert_ok(c, tfm_copy(c, tfm_narrow(c, free_one, 0, 2, 2), tfm_narrow(c, free_one, 0, 0, 1)));
    assert_made(c, tfm_topk(c, w, 2, &places));
    assert_verb_refused(c, tfm_set(c, places, at, 0), TFM_INVALID); /* the backward pass will read them */
    o.rstd = &rstd;
    assert_made(c, tfm_layer_norm(c, w, NULL, NULL, &o));
    assert_verb_refused(c, tfm_set(c, rstd, at, 0), TFM_INVALID);
    tfm_tape_clear(c);
    assert_ok(c, tfm_set_requires_grad(c, y, 2));
    cr_assert(y->requires_grad == 1);
    assert_verb_refused(c, tfm_set(c, y, at, 0), TFM_INVALID); /* a leaf now */
    assert_ok(c, tfm_set_requires_grad(c, y, 0));
    assert_ok(c, tfm_copy(c, y, free_one));
    assert_ok(c, tfm_set_requires_grad(c, w, 0));
    assert_ok(c, tfm_copy(c, w, free_one));
    tfm_destroy(c);
}

Test(recording, rewinding_below_the_tape_is_an_error) {
    tfm_ctx *c = context(1);
    tfm_tensor *w = plain(c, TFM_SHAPE(3), 2);
    const tfm_marker mark = tfm_mark(c);
    assert_ok(c, tfm_set_requires_grad(c, w, 1));
    cr_assert(tfm_exp(c, w) != NULL);
    tfm_rewind(c, mark);
    cr_assert(tfm_status_of(c) == TFM_INVALID);
    tfm_clear(c);
    tfm_tape_clear(c);
    tfm_rewind(c, mark);
    cr_assert(tfm_status_of(c) == TFM_OK);
    tfm_destroy(c);
}

/* -- profile and cancel -------------------------------------------------------------------------------------------- */

Test(profile, rows_are_ops_by_shape) {
    tfm_ctx *c = context(1);
    tfm_tensor *a = plain(c, TFM_SHAPE(64, 64), 1);
    tfm_profile_row row;
    tfm_profile_start(c);
    tfm_matmul(c, a, a);
    tfm_matmul(c, a, a);
    tfm_exp(c, a);
    tfm_profile_stop(c);
    cr_assert(tfm_profile_count(c) == 2, "%lld rows", (long long)tfm_profile_count(c));
    assert_ok(c, tfm_profile_get(c, 0, &row));
    cr_assert(!strcmp(row.op, "tfm_matmul") && row.calls == 2 && row.ndim == 2 && row.shape[1] == 64 &&
              row.flops == 2 * 2.0 * 64 * 64 * 64);
    cr_assert(row.bytes == 2 * 3.0 * 64 * 64 * 4 && row.ms > 0);
    tfm_destroy(c);
}

Test(cancel, the_running_op_fails_and_clear_goes_on) {
    tfm_ctx *c = context(1);
    tfm_tensor *a = plain(c, TFM_SHAPE(64, 64), 1);
    tfm_cancel(c);
    cr_assert(tfm_matmul(c, a, a) == NULL && tfm_status_of(c) == TFM_CANCELLED);
    tfm_clear(c);
    cr_assert(tfm_matmul(c, a, a) != NULL);
    tfm_destroy(c);
}

/* -- memory -------------------------------------------------------------------------------------------------------- */

static void make_everything(tfm_ctx *c, void *user) {
    tfm_tensor *t = tfm_ones(c, TFM_SHAPE(300, 2000)), *places = NULL, *statistics = NULL;
    tfm_norm_options o;
    (void)user;
    memset(&o, 0, sizeof o);
    o.mean = &statistics;
    tfm_gelu(c, t);
    tfm_add(c, t, t);
    tfm_sum(c, t, all_dims(), 0);
    tfm_logsumexp(c, t, all_dims(), 0);
    tfm_topk(c, t, 7, &places);
    tfm_softmax(c, t, 0);
    tfm_layer_norm(c, t, NULL, NULL, &o);
    tfm_dropout(c, t, 0.5f);
    if (t && !tfm_set_requires_grad(c, t, 1)) tfm_exp(c, t);
    tfm_tape_clear(c);
}

Test(ops_memory, every_failing_allocation_is_an_error_and_no_leak) {
    test_each_allocation_failing(make_everything, NULL, NULL);
}

Test(ops_memory, ops_take_their_result_and_nothing_else) {
    tfm_ctx *c = context(1);
    tfm_tensor *h = tfm_full(c, TFM_F16, TFM_SHAPE(512, 1024), 0.5), *t = tfm_transpose(c, h, 0, 1);
    const int64_t result = 512 * 1024 * 2;
    int i;
    for (i = 0; i < 8; i++) {
        const tfm_marker mark = tfm_mark(c);
        const int64_t before = (tfm_memory_reset(c), tfm_memory_usage(c).arena_used);
        switch (i) {
        case 0: tfm_exp(c, t); break;
        case 1: tfm_add(c, t, t); break;
        case 2: tfm_softmax(c, t, 0); break;
        case 3: tfm_layer_norm(c, t, NULL, NULL, NULL); break;
        case 4: tfm_clone(c, t); break;
        case 5: tfm_dropout(c, t, 0.5f); break;
        case 6: tfm_sum(c, t, TFM_SHAPE(0), 0); break;
        default: tfm_matmul(c, tfm_narrow(c, h, 1, 0, 512), h); break;
        }
        cr_assert(tfm_status_of(c) == TFM_OK, "%s", tfm_error(c));
        cr_assert(tfm_memory_usage(c).arena_peak - before <= result + 65536 + (i == 7 ? 4 << 20 : 0),
                  "op %d takes %lld bytes", i, (long long)(tfm_memory_usage(c).arena_peak - before));
        tfm_rewind(c, mark);
    }
    tfm_destroy(c);
}

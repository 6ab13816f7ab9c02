/* tfm_format writes what print(tensor) of PyTorch writes. The expected texts are PyTorch 1.13's own output. */
#include "op_helpers.h"

#include <locale.h>

/* Elements: from a list, or (index modulo `modulus`) * step + start. */
static tfm_tensor *listed(tfm_ctx *c, int dtype, tfm_shape shape, int64_t count, const double *values) {
    tfm_tensor *t = tfm_empty(c, dtype, shape);
    int64_t i, index[TFM_MAX_DIMS];
    assert_made(c, t);
    cr_assert(tfm_numel(t) == count);
    for (i = 0; i < count; i++) {
        unravel(t, i, index);
        assert_ok(c, tfm_set(c, t, index, values[i]));
    }
    return t;
}

static tfm_tensor *counted(tfm_ctx *c, int dtype, tfm_shape shape, double step, double start, int64_t modulus) {
    tfm_tensor *t = tfm_empty(c, dtype, shape);
    int64_t i, index[TFM_MAX_DIMS];
    assert_made(c, t);
    for (i = 0; i < tfm_numel(t); i++) {
        unravel(t, i, index);
        assert_ok(c, tfm_set(c, t, index, (double)(i % modulus) * step + start));
    }
    return t;
}

static void assert_text(tfm_ctx *c, const tfm_tensor *t, const char *expected) {
    const char *text = tfm_format(c, t);
    cr_assert(text != NULL, "%s", tfm_error(c));
    cr_assert(strcmp(text, expected) == 0, "got\n%s\nexpected\n%s", text, expected);
}

Test(format, scalar) {
    tfm_ctx *c = context(1);
    const double values[] = {3.14159265};
    assert_text(c, listed(c, TFM_F32, scalar_shape(), 1, values),
                "tensor(3.1416)");
    tfm_destroy(c);
}

Test(format, whole_scalar) {
    tfm_ctx *c = context(1);
    const double values[] = {3};
    assert_text(c, listed(c, TFM_F32, scalar_shape(), 1, values),
                "tensor(3.)");
    tfm_destroy(c);
}

Test(format, integer_scalar) {
    tfm_ctx *c = context(1);
    const double values[] = {-7};
    assert_text(c, listed(c, TFM_I64, scalar_shape(), 1, values),
                "tensor(-7)");
    tfm_destroy(c);
}

Test(format, bool_scalar) {
    tfm_ctx *c = context(1);
    const double values[] = {1};
    assert_text(c, listed(c, TFM_BOOL, scalar_shape(), 1, values),
                "tensor(True)");
    tfm_destroy(c);
}

Test(format, vector) {
    tfm_ctx *c = context(1);
    const double values[] = {0.1, -2.5, 30.25, 4};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(4), 4, values),
                "tensor([ 0.1000, -2.5000, 30.2500,  4.0000])");
    tfm_destroy(c);
}

Test(format, whole_numbers) {
    tfm_ctx *c = context(1);
    const double values[] = {1, 2, -300};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(3), 3, values),
                "tensor([   1.,    2., -300.])");
    tfm_destroy(c);
}

Test(format, whole_numbers_with_nan_and_inf) {
    tfm_ctx *c = context(1);
    const double values[] = {1, NAN, -HUGE_VAL, HUGE_VAL, 20};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(5), 5, values),
                "tensor([ 1., nan, -inf, inf, 20.])");
    tfm_destroy(c);
}

Test(format, zeros) {
    tfm_ctx *c = context(1);
    const double values[] = {0, 0, 0, 0};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(2, 2), 4, values),
                "tensor([[0., 0.],\n"
                "        [0., 0.]])");
    tfm_destroy(c);
}

Test(format, nan_only) {
    tfm_ctx *c = context(1);
    const double values[] = {NAN, 0};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(2), 2, values),
                "tensor([nan, 0.])");
    tfm_destroy(c);
}

Test(format, minus_zero) {
    tfm_ctx *c = context(1);
    const double values[] = {-0.0, 1, 2.5};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(3), 3, values),
                "tensor([-0.0000, 1.0000, 2.5000])");
    tfm_destroy(c);
}

Test(format, small_numbers) {
    tfm_ctx *c = context(1);
    const double values[] = {1e-05, 0.5};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(2), 2, values),
                "tensor([1.0000e-05, 5.0000e-01])");
    tfm_destroy(c);
}

Test(format, wide_range) {
    tfm_ctx *c = context(1);
    const double values[] = {0.001, 1.5, 1000};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(3), 3, values),
                "tensor([1.0000e-03, 1.5000e+00, 1.0000e+03])");
    tfm_destroy(c);
}

Test(format, wide_whole_range) {
    tfm_ctx *c = context(1);
    const double values[] = {1, 10, 2000};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(3), 3, values),
                "tensor([1.0000e+00, 1.0000e+01, 2.0000e+03])");
    tfm_destroy(c);
}

Test(format, just_narrow_enough) {
    tfm_ctx *c = context(1);
    const double values[] = {1.5, 1500};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(2), 2, values),
                "tensor([   1.5000, 1500.0000])");
    tfm_destroy(c);
}

Test(format, large_whole) {
    tfm_ctx *c = context(1);
    const double values[] = {100000000.0, 200000000.0};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(2), 2, values),
                "tensor([1.0000e+08, 2.0000e+08])");
    tfm_destroy(c);
}

Test(format, larger_whole) {
    tfm_ctx *c = context(1);
    const double values[] = {1500000000.0, 2000000000.0};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(2), 2, values),
                "tensor([1.5000e+09, 2.0000e+09])");
    tfm_destroy(c);
}

Test(format, negative_scientific) {
    tfm_ctx *c = context(1);
    const double values[] = {-1e-07, 1, 30000000000.0, NAN};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(2, 2), 4, values),
                "tensor([[-1.0000e-07,  1.0000e+00],\n"
                "        [ 3.0000e+10,         nan]])");
    tfm_destroy(c);
}

Test(format, tenths) {
    tfm_ctx *c = context(1);
    const double values[] = {0.1, 0.25, 0.3333333333333333};
    assert_text(c, listed(c, TFM_F64, TFM_SHAPE(3), 3, values),
                "tensor([0.1000, 0.2500, 0.3333], dtype=torch.float64)");
    tfm_destroy(c);
}

Test(format, half) {
    tfm_ctx *c = context(1);
    const double values[] = {0.1, 0.2, 0.3, 1, 2, 3};
    assert_text(c, listed(c, TFM_F16, TFM_SHAPE(2, 3), 6, values),
                "tensor([[0.1000, 0.2000, 0.3000],\n"
                "        [1.0000, 2.0000, 3.0000]], dtype=torch.float16)");
    tfm_destroy(c);
}

Test(format, bfloat16) {
    tfm_ctx *c = context(1);
    const double values[] = {0.1, 65280};
    assert_text(c, listed(c, TFM_BF16, TFM_SHAPE(2), 2, values),
                "tensor([1.0010e-01, 6.5280e+04], dtype=torch.bfloat16)");
    tfm_destroy(c);
}

Test(format, integers) {
    tfm_ctx *c = context(1);
    const double values[] = {1, -2, 3, 400, 5, 6};
    assert_text(c, listed(c, TFM_I64, TFM_SHAPE(2, 3), 6, values),
                "tensor([[  1,  -2,   3],\n"
                "        [400,   5,   6]])");
    tfm_destroy(c);
}

Test(format, int32) {
    tfm_ctx *c = context(1);
    const double values[] = {1, 2147483647};
    assert_text(c, listed(c, TFM_I32, TFM_SHAPE(2), 2, values),
                "tensor([         1, 2147483647], dtype=torch.int32)");
    tfm_destroy(c);
}

Test(format, bytes) {
    tfm_ctx *c = context(1);
    const double values[] = {0, 128, 255};
    assert_text(c, listed(c, TFM_U8, TFM_SHAPE(3), 3, values),
                "tensor([  0, 128, 255], dtype=torch.uint8)");
    tfm_destroy(c);
}

Test(format, int8) {
    tfm_ctx *c = context(1);
    const double values[] = {-128, 127};
    assert_text(c, listed(c, TFM_I8, TFM_SHAPE(2, 1), 2, values),
                "tensor([[-128],\n"
                "        [ 127]], dtype=torch.int8)");
    tfm_destroy(c);
}

Test(format, bools) {
    tfm_ctx *c = context(1);
    const double values[] = {1, 0, 0, 1};
    assert_text(c, listed(c, TFM_BOOL, TFM_SHAPE(2, 2), 4, values),
                "tensor([[ True, False],\n"
                "        [False,  True]])");
    tfm_destroy(c);
}

Test(format, empty) {
    tfm_ctx *c = context(1);
    const double values[] = {0};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(0), 0, values),
                "tensor([])");
    tfm_destroy(c);
}

Test(format, empty_matrix) {
    tfm_ctx *c = context(1);
    const double values[] = {0};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(0, 3), 0, values),
                "tensor([], size=(0, 3))");
    tfm_destroy(c);
}

Test(format, empty_integers) {
    tfm_ctx *c = context(1);
    const double values[] = {0};
    assert_text(c, listed(c, TFM_I64, TFM_SHAPE(0), 0, values),
                "tensor([], dtype=torch.int64)");
    tfm_destroy(c);
}

Test(format, empty_half) {
    tfm_ctx *c = context(1);
    const double values[] = {0};
    assert_text(c, listed(c, TFM_F16, TFM_SHAPE(2, 0, 4), 0, values),
                "tensor([], size=(2, 0, 4), dtype=torch.float16)");
    tfm_destroy(c);
}

Test(format, one_in_brackets) {
    tfm_ctx *c = context(1);
    const double values[] = {0.5};
    assert_text(c, listed(c, TFM_F32, TFM_SHAPE(1, 1, 1), 1, values),
                "tensor([[[0.5000]]])");
    tfm_destroy(c);
}

Test(format, three_dims) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(2, 2, 3), 0.5, -1.0, 1000),
                "tensor([[[-1.0000, -0.5000,  0.0000],\n"
                "         [ 0.5000,  1.0000,  1.5000]],\n"
                "\n"
                "        [[ 2.0000,  2.5000,  3.0000],\n"
                "         [ 3.5000,  4.0000,  4.5000]]])");
    tfm_destroy(c);
}

Test(format, four_dims) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_I64, TFM_SHAPE(2, 1, 2, 2), 1.0, 0.0, 1000),
                "tensor([[[[0, 1],\n"
                "          [2, 3]]],\n"
                "\n"
                "\n"
                "        [[[4, 5],\n"
                "          [6, 7]]]])");
    tfm_destroy(c);
}

Test(format, six_dims) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_I32, TFM_SHAPE(1, 2, 1, 2, 1, 2), 3.0, -5.0, 1000),
                "tensor([[[[[[-5, -2]],\n"
                "\n"
                "           [[ 1,  4]]]],\n"
                "\n"
                "\n"
                "\n"
                "         [[[[ 7, 10]],\n"
                "\n"
                "           [[13, 16]]]]]], dtype=torch.int32)");
    tfm_destroy(c);
}

Test(format, wraps_at_eighty_columns) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(30), 1.25, -10.0, 1000),
                "tensor([-10.0000,  -8.7500,  -7.5000,  -6.2500,  -5.0000,  -3.7500,  -2.5000,\n"
                "         -1.2500,   0.0000,   1.2500,   2.5000,   3.7500,   5.0000,   6.2500,\n"
                "          7.5000,   8.7500,  10.0000,  11.2500,  12.5000,  13.7500,  15.0000,\n"
                "         16.2500,  17.5000,  18.7500,  20.0000,  21.2500,  22.5000,  23.7500,\n"
                "         25.0000,  26.2500])");
    tfm_destroy(c);
}

Test(format, wraps_in_rows) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(2, 14), 123.4567, 0.0, 100000),
                "tensor([[   0.0000,  123.4567,  246.9134,  370.3701,  493.8268,  617.2835,\n"
                "          740.7402,  864.1969,  987.6536, 1111.1104, 1234.5670, 1358.0237,\n"
                "         1481.4803, 1604.9371],\n"
                "        [1728.3938, 1851.8505, 1975.3073, 2098.7639, 2222.2207, 2345.6772,\n"
                "         2469.1340, 2592.5908, 2716.0474, 2839.5042, 2962.9607, 3086.4175,\n"
                "         3209.8743, 3333.3308]])");
    tfm_destroy(c);
}

Test(format, wraps_integers) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_I64, TFM_SHAPE(3, 25), 7.0, -40.0, 1000),
                "tensor([[-40, -33, -26, -19, -12,  -5,   2,   9,  16,  23,  30,  37,  44,  51,\n"
                "          58,  65,  72,  79,  86,  93, 100, 107, 114, 121, 128],\n"
                "        [135, 142, 149, 156, 163, 170, 177, 184, 191, 198, 205, 212, 219, 226,\n"
                "         233, 240, 247, 254, 261, 268, 275, 282, 289, 296, 303],\n"
                "        [310, 317, 324, 331, 338, 345, 352, 359, 366, 373, 380, 387, 394, 401,\n"
                "         408, 415, 422, 429, 436, 443, 450, 457, 464, 471, 478]])");
    tfm_destroy(c);
}

Test(format, dtype_on_a_new_line) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F16, TFM_SHAPE(9), 0.125, 1.0, 1000),
                "tensor([1.0000, 1.1250, 1.2500, 1.3750, 1.5000, 1.6250, 1.7500, 1.8750, 2.0000],\n"
                "       dtype=torch.float16)");
    tfm_destroy(c);
}

Test(format, dtype_on_the_same_line) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F16, TFM_SHAPE(7), 0.125, 1.0, 1000),
                "tensor([1.0000, 1.1250, 1.2500, 1.3750, 1.5000, 1.6250, 1.7500],\n"
                "       dtype=torch.float16)");
    tfm_destroy(c);
}

Test(format, a_thousand_are_shown) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_I64, TFM_SHAPE(1000), 1.0, 0.0, 10),
                "tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7,\n"
                "        8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1,\n"
                "        2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,\n"
                "        6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n"
                "        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3,\n"
                "        4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])");
    tfm_destroy(c);
}

Test(format, more_are_summarised) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(1001), 1.0, 0.0, 100000),
                "tensor([   0.,    1.,    2.,  ...,  998.,  999., 1000.])");
    tfm_destroy(c);
}

Test(format, summarised_rows) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(500, 3), 0.5, 0.0, 100000),
                "tensor([[0.0000e+00, 5.0000e-01, 1.0000e+00],\n"
                "        [1.5000e+00, 2.0000e+00, 2.5000e+00],\n"
                "        [3.0000e+00, 3.5000e+00, 4.0000e+00],\n"
                "        ...,\n"
                "        [7.4550e+02, 7.4600e+02, 7.4650e+02],\n"
                "        [7.4700e+02, 7.4750e+02, 7.4800e+02],\n"
                "        [7.4850e+02, 7.4900e+02, 7.4950e+02]])");
    tfm_destroy(c);
}

Test(format, summarised_columns) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(3, 500), 0.25, 0.0, 100000),
                "tensor([[0.0000e+00, 2.5000e-01, 5.0000e-01,  ..., 1.2425e+02, 1.2450e+02,\n"
                "         1.2475e+02],\n"
                "        [1.2500e+02, 1.2525e+02, 1.2550e+02,  ..., 2.4925e+02, 2.4950e+02,\n"
                "         2.4975e+02],\n"
                "        [2.5000e+02, 2.5025e+02, 2.5050e+02,  ..., 3.7425e+02, 3.7450e+02,\n"
                "         3.7475e+02]])");
    tfm_destroy(c);
}

Test(format, summarised_both) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(50, 50), 0.1, -3.0, 1000),
                "tensor([[-3.0000, -2.9000, -2.8000,  ...,  1.7000,  1.8000,  1.9000],\n"
                "        [ 2.0000,  2.1000,  2.2000,  ...,  6.7000,  6.8000,  6.9000],\n"
                "        [ 7.0000,  7.1000,  7.2000,  ..., 11.7000, 11.8000, 11.9000],\n"
                "        ...,\n"
                "        [32.0000, 32.1000, 32.2000,  ..., 36.7000, 36.8000, 36.9000],\n"
                "        [37.0000, 37.1000, 37.2000,  ..., 41.7000, 41.8000, 41.9000],\n"
                "        [42.0000, 42.1000, 42.2000,  ..., 46.7000, 46.8000, 46.9000]])");
    tfm_destroy(c);
}

Test(format, summarised_three_dims) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_I64, TFM_SHAPE(8, 9, 20), 1.0, 0.0, 100000),
                "tensor([[[   0,    1,    2,  ...,   17,   18,   19],\n"
                "         [  20,   21,   22,  ...,   37,   38,   39],\n"
                "         [  40,   41,   42,  ...,   57,   58,   59],\n"
                "         ...,\n"
                "         [ 120,  121,  122,  ...,  137,  138,  139],\n"
                "         [ 140,  141,  142,  ...,  157,  158,  159],\n"
                "         [ 160,  161,  162,  ...,  177,  178,  179]],\n"
                "\n"
                "        [[ 180,  181,  182,  ...,  197,  198,  199],\n"
                "         [ 200,  201,  202,  ...,  217,  218,  219],\n"
                "         [ 220,  221,  222,  ...,  237,  238,  239],\n"
                "         ...,\n"
                "         [ 300,  301,  302,  ...,  317,  318,  319],\n"
                "         [ 320,  321,  322,  ...,  337,  338,  339],\n"
                "         [ 340,  341,  342,  ...,  357,  358,  359]],\n"
                "\n"
                "        [[ 360,  361,  362,  ...,  377,  378,  379],\n"
                "         [ 380,  381,  382,  ...,  397,  398,  399],\n"
                "         [ 400,  401,  402,  ...,  417,  418,  419],\n"
                "         ...,\n"
                "         [ 480,  481,  482,  ...,  497,  498,  499],\n"
                "         [ 500,  501,  502,  ...,  517,  518,  519],\n"
                "         [ 520,  521,  522,  ...,  537,  538,  539]],\n"
                "\n"
                "        ...,\n"
                "\n"
                "        [[ 900,  901,  902,  ...,  917,  918,  919],\n"
                "         [ 920,  921,  922,  ...,  937,  938,  939],\n"
                "         [ 940,  941,  942,  ...,  957,  958,  959],\n"
                "         ...,\n"
                "         [1020, 1021, 1022,  ..., 1037, 1038, 1039],\n"
                "         [1040, 1041, 1042,  ..., 1057, 1058, 1059],\n"
                "         [1060, 1061, 1062,  ..., 1077, 1078, 1079]],\n"
                "\n"
                "        [[1080, 1081, 1082,  ..., 1097, 1098, 1099],\n"
                "         [1100, 1101, 1102,  ..., 1117, 1118, 1119],\n"
                "         [1120, 1121, 1122,  ..., 1137, 1138, 1139],\n"
                "         ...,\n"
                "         [1200, 1201, 1202,  ..., 1217, 1218, 1219],\n"
                "         [1220, 1221, 1222,  ..., 1237, 1238, 1239],\n"
                "         [1240, 1241, 1242,  ..., 1257, 1258, 1259]],\n"
                "\n"
                "        [[1260, 1261, 1262,  ..., 1277, 1278, 1279],\n"
                "         [1280, 1281, 1282,  ..., 1297, 1298, 1299],\n"
                "         [1300, 1301, 1302,  ..., 1317, 1318, 1319],\n"
                "         ...,\n"
                "         [1380, 1381, 1382,  ..., 1397, 1398, 1399],\n"
                "         [1400, 1401, 1402,  ..., 1417, 1418, 1419],\n"
                "         [1420, 1421, 1422,  ..., 1437, 1438, 1439]]])");
    tfm_destroy(c);
}

Test(format, summarised_short_dims_whole) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(2, 3, 400), 1.0, 0.5, 100000),
                "tensor([[[5.0000e-01, 1.5000e+00, 2.5000e+00,  ..., 3.9750e+02,\n"
                "          3.9850e+02, 3.9950e+02],\n"
                "         [4.0050e+02, 4.0150e+02, 4.0250e+02,  ..., 7.9750e+02,\n"
                "          7.9850e+02, 7.9950e+02],\n"
                "         [8.0050e+02, 8.0150e+02, 8.0250e+02,  ..., 1.1975e+03,\n"
                "          1.1985e+03, 1.1995e+03]],\n"
                "\n"
                "        [[1.2005e+03, 1.2015e+03, 1.2025e+03,  ..., 1.5975e+03,\n"
                "          1.5985e+03, 1.5995e+03],\n"
                "         [1.6005e+03, 1.6015e+03, 1.6025e+03,  ..., 1.9975e+03,\n"
                "          1.9985e+03, 1.9995e+03],\n"
                "         [2.0005e+03, 2.0015e+03, 2.0025e+03,  ..., 2.3975e+03,\n"
                "          2.3985e+03, 2.3995e+03]]])");
    tfm_destroy(c);
}

Test(format, summarised_half) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F16, TFM_SHAPE(40, 40), 0.5, 0.0, 100),
                "tensor([[ 0.0000,  0.5000,  1.0000,  ..., 18.5000, 19.0000, 19.5000],\n"
                "        [20.0000, 20.5000, 21.0000,  ..., 38.5000, 39.0000, 39.5000],\n"
                "        [40.0000, 40.5000, 41.0000,  ...,  8.5000,  9.0000,  9.5000],\n"
                "        ...,\n"
                "        [40.0000, 40.5000, 41.0000,  ...,  8.5000,  9.0000,  9.5000],\n"
                "        [10.0000, 10.5000, 11.0000,  ..., 28.5000, 29.0000, 29.5000],\n"
                "        [30.0000, 30.5000, 31.0000,  ..., 48.5000, 49.0000, 49.5000]],\n"
                "       dtype=torch.float16)");
    tfm_destroy(c);
}

Test(format, summary_hides_large_numbers) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_F32, TFM_SHAPE(2000), 1.0, 0.0, 100000),
                "tensor([0.0000e+00, 1.0000e+00, 2.0000e+00,  ..., 1.9970e+03, 1.9980e+03,\n"
                "        1.9990e+03])");
    tfm_destroy(c);
}

/* 80 characters are a line, the last bracket not counted. */
Test(format, a_dtype_that_just_fits_stays_on_the_line) {
    tfm_ctx *c = context(1);
    assert_text(c, counted(c, TFM_I32, TFM_SHAPE(13), 1, 10, 10),
                "tensor([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 10, 11, 12], dtype=torch.int32)");
    assert_text(c, counted(c, TFM_BF16, TFM_SHAPE(10), 1, 10, 10),
                "tensor([10., 11., 12., 13., 14., 15., 16., 17., 18., 19.],\n"
                "       dtype=torch.bfloat16)");
    assert_text(c, counted(c, TFM_BF16, TFM_SHAPE(2, 12), 1, 0, 2),
                "tensor([[0., 1., 0., 1., 0., 1., 0., 1., 0., 1., 0., 1.],\n"
                "        [0., 1., 0., 1., 0., 1., 0., 1., 0., 1., 0., 1.]],\n"
                "       dtype=torch.bfloat16)");
    tfm_destroy(c);
}

Test(format, six_rows_of_many_are_all_shown) {
    tfm_ctx *c = context(1);
    assert_text(c, tfm_ones(c, TFM_SHAPE(6, 200)),
                "tensor([[1., 1., 1.,  ..., 1., 1., 1.],\n"
                "        [1., 1., 1.,  ..., 1., 1., 1.],\n"
                "        [1., 1., 1.,  ..., 1., 1., 1.],\n"
                "        [1., 1., 1.,  ..., 1., 1., 1.],\n"
                "        [1., 1., 1.,  ..., 1., 1., 1.],\n"
                "        [1., 1., 1.,  ..., 1., 1., 1.]])");
    tfm_destroy(c);
}

/* Exponents begin above 1e8 and below 1e-4. */
Test(format, the_ends_of_plain_numbers_are_plain) {
    tfm_ctx *c = context(1);
    assert_text(c, tfm_full(c, TFM_F32, TFM_SHAPE(1), 1e8), "tensor([100000000.])");
    assert_text(c, tfm_full(c, TFM_F64, TFM_SHAPE(1), 1e-4), "tensor([0.0001], dtype=torch.float64)");
    assert_text(c, tfm_neg(c, tfm_full(c, TFM_F32, TFM_SHAPE(1), NAN)), "tensor([nan])");
    tfm_destroy(c);
}

Test(format, of_a_dry_run_has_a_size_and_no_elements) {
    tfm_ctx *c = context(1);
    tfm_measure_begin(c);
    assert_text(c, tfm_ones(c, TFM_SHAPE(3, 5)), "tensor(..., size=(3, 5))");
    assert_ok(c, tfm_measure_end(c, NULL));
    tfm_destroy(c);
}

Test(format, of_a_view_is_that_of_its_copy) {
    tfm_ctx *c = context(1);
    int layout, dtype;
    for (dtype = 0; dtype < TFM_DTYPE_COUNT; dtype++) {
        for (layout = 0; layout < LAYOUTS; layout++) {
            tfm_tensor *t = lying(c, dtype, TFM_SHAPE(5, 7, 40), layout, 10, 1);
            assert_text(c, t, tfm_format(c, tfm_clone(c, t)));
        }
    }
    tfm_destroy(c);
}

Test(format, needs_of_gradients_are_told) {
    tfm_ctx *c = context(1);
    tfm_tensor *t = tfm_ones(c, TFM_SHAPE(2));
    assert_ok(c, tfm_set_requires_grad(c, t, 1));
    assert_text(c, t, "tensor([1., 1.], requires_grad=True)");
    t = tfm_full(c, TFM_F16, TFM_SHAPE(8), 1);
    assert_ok(c, tfm_set_requires_grad(c, t, 1));
    assert_text(c, t,
                "tensor([1., 1., 1., 1., 1., 1., 1., 1.], dtype=torch.float16,\n"
                "       requires_grad=True)");
    tfm_destroy(c);
}

Test(format, does_not_follow_the_locale) {
    tfm_ctx *c = context(1);
    char before[64];
    snprintf(before, sizeof before, "%s", setlocale(LC_NUMERIC, NULL));
    if (!setlocale(LC_NUMERIC, "de_DE.UTF-8") && !setlocale(LC_NUMERIC, "fr_FR.UTF-8")) {
        tfm_destroy(c);
        cr_skip_test("no locale with a decimal comma");
    }
    assert_text(c, tfm_full(c, TFM_F32, TFM_SHAPE(2), 0.5), "tensor([0.5000, 0.5000])");
    setlocale(LC_NUMERIC, before);
    tfm_destroy(c);
}

#if !defined(TFM_NO_STDIO)
Test(print, writes_the_text_and_a_newline) {
    tfm_ctx *c = context(1);
    char path[512], *text;
    FILE *file;
    const tfm_tensor *t;
    int64_t used;
    test_temporary_path(path, sizeof path, "print.txt");
    file = fopen(path, "wb");
    cr_assert(file != NULL);
    t = tfm_full(c, TFM_I64, TFM_SHAPE(2), 3);
    used = tfm_memory_usage(c).arena_used;
    assert_ok(c, tfm_print(c, file, t));
    cr_assert_eq(tfm_memory_usage(c).arena_used, used, "the text stays in the arena");
    fclose(file);
    text = test_read_file(path, NULL);
    cr_assert_str_eq(text, "tensor([3, 3])\n");
    free(text);
    remove(path);
    assert_verb_refused(c, tfm_print(c, NULL, tfm_ones(c, TFM_SHAPE(1))), TFM_INVALID);
    tfm_destroy(c);
}
#endif

/* Positions: sinusoidal tables, rotary positions and their scalings. */
#include "layer_helpers.h"

#if !defined(TFM_NO_FILES) && !defined(TFM_NO_STDIO)
static int scaling_of(const char *name) {
    static const char *const names[] = {"plain", "linear", "ntk", "yarn", "llama3"};
    int i;
    for (i = 0; i < 5; i++)
        if (!strcmp(name, names[i])) return i;
    return -1;
}

static void check_rotary(const char *name) {
    TEST_EACH_ISA(c, 1) {
        tfm_file *f = golden(c, name);
        tfm_rope r;
        tfm_tensor *x, *y, *positions, *expected_cosine, *cosine, *sine;
        const double rtol = meta_number(f, "rtol", 0), atol = meta_number(f, "atol", 0);
        const int64_t start = meta_int(f, "start", 0);
        memset(&r, 0, sizeof r);
        r.interleaved = (int)meta_int(f, "interleaved", 0);
        r.scaling = scaling_of(meta(f, "scaling", "plain"));
        r.dims = meta_int(f, "dims", 0);
        r.base = (float)meta_number(f, "base", 0);
        r.factor = (float)meta_number(f, "factor", 0);
        r.original_length = meta_int(f, "original_length", 0);
        r.low_frequency = (float)meta_number(f, "low_frequency", 0);
        r.high_frequency = (float)meta_number(f, "high_frequency", 0);
        r.beta_fast = (float)meta_number(f, "beta_fast", 0);
        r.beta_slow = (float)meta_number(f, "beta_slow", 0);
        r.attention_factor = (float)meta_number(f, "attention_factor", 0);
        x = tfm_file_tensor(c, f, "in.x");
        positions = file_has(c, f, "in.positions");
        y = tfm_rotary(c, x, &r, start, positions);
        assert_tensor_close(c, y, tfm_file_tensor(c, f, "out.y"), rtol, atol);
        expected_cosine = file_has(c, f, "out.cosine");
        if (expected_cosine) {
            assert_ok(c, tfm_rotary_tables(c, &r, x->shape[3], start, x->shape[2], &cosine, &sine));
            assert_tensor_close(c, cosine, expected_cosine, rtol, atol);
            assert_tensor_close(c, sine, tfm_file_tensor(c, f, "out.sine"), rtol, atol);
            assert_same_values(c, y, tfm_rotary_apply(c, x, cosine, sine, NULL, r.interleaved));
        }
        tfm_file_close(f);
    }
}

#define ROTARY_GOLDEN(name) \
    Test(rotary, name) { check_rotary("rotary_" #name ".safetensors"); }
ROTARY_GOLDEN(base)
ROTARY_GOLDEN(far)
ROTARY_GOLDEN(linear)
ROTARY_GOLDEN(linear_interleaved)
ROTARY_GOLDEN(linear_partial)
ROTARY_GOLDEN(llama3)
ROTARY_GOLDEN(llama3_interleaved)
ROTARY_GOLDEN(llama3_options)
ROTARY_GOLDEN(ntk)
ROTARY_GOLDEN(ntk_interleaved)
ROTARY_GOLDEN(partial)
ROTARY_GOLDEN(partial_interleaved)
ROTARY_GOLDEN(plain)
ROTARY_GOLDEN(plain_interleaved)
ROTARY_GOLDEN(positions)
ROTARY_GOLDEN(positions_interleaved)
ROTARY_GOLDEN(yarn)
ROTARY_GOLDEN(yarn_interleaved)
ROTARY_GOLDEN(yarn_options)

static void check_sinusoidal(const char *name) {
    tfm_ctx *c = context_of(1);
    tfm_file *f = golden(c, name);
    const int kind =
        !strcmp(meta(f, "kind", ""), "sinusoidal") ? TFM_POSITION_SINUSOIDAL : TFM_POSITION_SINUSOIDAL_HALVES;
    tfm_tensor *y =
        tfm_sinusoidal(c, kind, meta_int(f, "start", 0), meta_int(f, "length", 0), meta_int(f, "d_model", 0));
    assert_tensor_close(c, y, tfm_file_tensor(c, f, "out.table"), meta_number(f, "rtol", 0), meta_number(f, "atol", 0));
    tfm_file_close(f);
    tfm_destroy(c);
}

Test(sinusoidal, tables_of_the_paper_and_of_tensor2tensor) {
    static const char *const names[] = {"2_from_0", "32_from_5000", "6_from_1", "7_from_0", "8_from_0"};
    static const char *const halves[] = {"32_from_5000", "4_from_0", "6_from_1", "7_from_0", "8_from_0"};
    char file[80];
    int i;
    for (i = 0; i < 5; i++) {
        snprintf(file, sizeof file, "sinusoidal_%s.safetensors", names[i]);
        check_sinusoidal(file);
        snprintf(file, sizeof file, "sinusoidal_halves_%s.safetensors", halves[i]);
        check_sinusoidal(file);
    }
}
#endif

Test(sinusoidal, starts_anywhere) {
    tfm_ctx *c = context_of(2);
    tfm_tensor *all = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 0, 100, 24);
    tfm_tensor *part = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 37, 20, 24);
    assert_made(c, part);
    assert_same_values(c, part, tfm_narrow(c, all, 0, 37, 20));
    tfm_destroy(c);
}

Test(sinusoidal, sizes_of_zero_and_one) {
    tfm_ctx *c = context_of(1);
    static const int64_t at[2] = {3, 0};
    tfm_tensor *t = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 0, 0, 4);
    cr_assert(t && tfm_numel(t) == 0);
    t = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL_HALVES, 0, 5, 0);
    cr_assert(t && tfm_numel(t) == 0);
    t = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 0, 5, 1);
    cr_assert_float_eq(tfm_get(t, at), sin(3.0), 1e-7);
    t = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL_HALVES, 0, 5, 1);
    cr_assert_eq(tfm_get(t, at), 0);
    assert_refused(c, tfm_sinusoidal(c, TFM_POSITION_LEARNED, 0, 5, 4), TFM_INVALID);
    assert_refused(c, tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, -1, 5, 4), TFM_INVALID);
    tfm_destroy(c);
}

/* q.k after rotation depends on the distance alone. */
Test(rotary, products_depend_on_the_distance_only) {
    tfm_ctx *c = context_of(1);
    tfm_rope r;
    int interleaved;
    memset(&r, 0, sizeof r);
    for (interleaved = 0; interleaved < 2; interleaved++) {
        tfm_tensor *q = some(c, TFM_SHAPE(1, 1, 1, 32), 1), *k = some(c, TFM_SHAPE(1, 1, 1, 32), 2);
        double first = 0;
        int64_t p;
        r.interleaved = interleaved;
        for (p = 0; p < 200; p += 50) {
            tfm_tensor *a = tfm_rotary(c, q, &r, p + 9, NULL), *b = tfm_rotary(c, k, &r, p, NULL);
            const double dot = tfm_item(tfm_sum(c, tfm_mul(c, a, b), tfm_shape_of(0, NULL), 0));
            if (p) cr_assert_float_eq(dot, first, 2e-5);
            first = dot;
        }
    }
    tfm_destroy(c);
}

Test(rotary, any_strides_and_dtypes) {
    TEST_EACH_ISA(c, 1) {
        tfm_rope r;
        tfm_tensor *x = some(c, TFM_SHAPE(2, 5, 3, 20), 3), *view, *plain, *half, *y;
        int dtype;
        memset(&r, 0, sizeof r);
        r.dims = 12;
        view = tfm_transpose(c, x, 1, 2); /* (2, 3, 5, 20) as split heads lie */
        plain = tfm_clone(c, view);
        assert_same_values(c, tfm_rotary(c, view, &r, 4, NULL), tfm_rotary(c, plain, &r, 4, NULL));
        view = tfm_transpose(c, x, 2, 3); /* the rotated dim strided */
        plain = tfm_clone(c, view);
        r.dims = 2;
        assert_same_values(c, tfm_rotary(c, view, &r, 4, NULL), tfm_rotary(c, plain, &r, 4, NULL));
        for (dtype = TFM_F16; dtype <= TFM_BF16; dtype++) { /* rounded once, at the end */
            half = tfm_cast(c, plain, dtype);
            y = tfm_rotary(c, half, &r, 4, NULL);
            cr_assert(y && y->dtype == dtype);
            assert_same_values(c, y, tfm_cast(c, tfm_rotary(c, tfm_cast(c, half, TFM_F32), &r, 4, NULL), dtype));
        }
    }
}

Test(rotary, positions_per_row_are_positions) {
    static const int64_t places[6] = {7, 8, 9, 100, 101, 5};
    tfm_ctx *c = context_of(1);
    tfm_rope r;
    tfm_tensor *x = some(c, TFM_SHAPE(2, 2, 3, 8), 4), *y, *positions, *cosine, *sine;
    memset(&r, 0, sizeof r);
    positions = tfm_from(c, TFM_I64, TFM_SHAPE(2, 3), places);
    y = tfm_rotary(c, x, &r, 0, positions);
    assert_made(c, y);
    assert_same_values(c, tfm_narrow(c, y, 0, 0, 1), tfm_rotary(c, tfm_narrow(c, x, 0, 0, 1), &r, 7, NULL));
    assert_same_values(c, tfm_narrow(c, tfm_narrow(c, y, 0, 1, 1), 2, 2, 1),
                       tfm_rotary(c, tfm_narrow(c, tfm_narrow(c, x, 0, 1, 1), 2, 2, 1), &r, 5, NULL));
    assert_ok(c, tfm_rotary_tables(c, &r, 8, 0, 102, &cosine, &sine));
    assert_same_values(c, y, tfm_rotary_apply(c, x, cosine, sine, positions, 0));
    assert_ok(c, tfm_rotary_tables(c, NULL, 8, 0, 102, &cosine, NULL)); /* plain, as for tfm_rotary */
    assert_same_values(c, y, tfm_rotary_apply(c, x, cosine, sine, positions, 0));
    assert_same_values(c, y, tfm_rotary(c, x, NULL, 0, positions));
    assert_same_values(c, tfm_rotary(c, x, &r, 0, tfm_from(c, TFM_I64, TFM_SHAPE(3), places)),
                       tfm_rotary(c, x, &r, 7, NULL));
    tfm_destroy(c);
}

Test(rotary, wrong_arguments_are_refused) {
    static const int64_t far[2] = {0, 9};
    tfm_ctx *c = context_of(1);
    tfm_rope r;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 1, 2, 7), 5), *cosine, *sine;
    memset(&r, 0, sizeof r);
    assert_refused(c, tfm_rotary(c, x, &r, 0, NULL), TFM_INVALID); /* an odd head size */
    r.dims = 6;
    assert_made(c, tfm_rotary(c, x, &r, 0, NULL));
    r.dims = 8;
    assert_refused(c, tfm_rotary(c, x, &r, 0, NULL), TFM_INVALID);
    r.dims = 6;
    assert_refused(c, tfm_rotary(c, x, &r, -1, NULL), TFM_INVALID);
    r.scaling = TFM_ROPE_YARN; /* without original_length */
    assert_refused(c, tfm_rotary(c, x, &r, 0, NULL), TFM_INVALID);
    r.scaling = 77;
    assert_refused(c, tfm_rotary(c, x, &r, 0, NULL), TFM_INVALID);
    r.scaling = TFM_ROPE_PLAIN;
    assert_refused(c, tfm_rotary(c, tfm_ones(c, TFM_SHAPE(2, 7)), &r, 0, NULL), TFM_INVALID);
    assert_refused(c, tfm_rotary(c, tfm_ones(c, TFM_SHAPE(1, 1, 2, 7, 7)), &r, 0, NULL), TFM_INVALID);
    assert_refused(c, tfm_rotary(c, x, &r, 0, tfm_ones(c, TFM_SHAPE(2))), TFM_INVALID);
    assert_ok(c, tfm_rotary_tables(c, &r, 7, 0, 4, &cosine, &sine));
    assert_refused(c, tfm_rotary_apply(c, x, cosine, sine, tfm_from(c, TFM_I64, TFM_SHAPE(2), far), 0), TFM_INVALID);
    assert_refused(c, tfm_rotary_apply(c, x, cosine, tfm_ones(c, TFM_SHAPE(4, 2)), NULL, 0), TFM_INVALID);
    tfm_destroy(c);
}

/* A number out of range, and a rope whose numbers contradict each other: refused, and the text names the field. */
Test(rotary, ropes_that_cannot_be_are_refused_by_name) {
    static const float bad[3] = {-2.0f, (float)NAN, (float)INFINITY};
    tfm_ctx *c = context_of(1);
    tfm_rope r;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 1, 2, 4), 5), *cosine, *sine;
    const struct {
        const char *name;
        float *field;
    } numbers[] = {{"base is ", &r.base}, {"factor is ", &r.factor}, {"low_frequency is ", &r.low_frequency},
                   {"high_frequency is ", &r.high_frequency}, {"beta_fast is ", &r.beta_fast},
                   {"beta_slow is ", &r.beta_slow}, {"attention_factor is ", &r.attention_factor}};
    const struct {
        const char *text;
        int scaling;
        int64_t dims, original_length;
        float base, low, high, fast, slow;
    } whole[] = {{"dims is negative", 0, -2, 0, 0, 0, 0, 0, 0},
                 {"dims exceeds the head size", 0, 6, 0, 0, 0, 0, 0, 0},
                 {"original_length is negative", 0, 0, -1, 0, 0, 0, 0, 0},
                 {"YaRN needs a base above 1", TFM_ROPE_YARN, 0, 8, 1, 0, 0, 0, 0},
                 {"YaRN needs a base above 1", TFM_ROPE_YARN, 0, 8, 0.5f, 0, 0, 0, 0},
                 {"beta_slow exceeds beta_fast", TFM_ROPE_YARN, 0, 8, 0, 0, 0, 2, 3},
                 {"beta_slow exceeds beta_fast", TFM_ROPE_YARN, 0, 8, 0, 0, 0, 0, 33},
                 {"low_frequency exceeds high_frequency", TFM_ROPE_LLAMA3, 0, 8, 0, 3, 2, 0, 0},
                 {"low_frequency exceeds high_frequency", TFM_ROPE_LLAMA3, 0, 8, 0, 5, 0, 0, 0}};
    size_t i, j;
    for (i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        for (j = 0; j < 3; j++) {
            memset(&r, 0, sizeof r);
            *numbers[i].field = bad[j];
            cr_assert_null(tfm_rotary(c, x, &r, 1, NULL), "%s%g was accepted", numbers[i].name, (double)bad[j]);
            assert_error_says(c, numbers[i].name);
            tfm_clear(c);
        }
    for (i = 0; i < sizeof whole / sizeof whole[0]; i++) {
        memset(&r, 0, sizeof r);
        r.scaling = whole[i].scaling;
        r.dims = whole[i].dims;
        r.base = whole[i].base;
        r.factor = 2;
        r.original_length = whole[i].original_length;
        r.low_frequency = whole[i].low;
        r.high_frequency = whole[i].high;
        r.beta_fast = whole[i].fast;
        r.beta_slow = whole[i].slow;
        assert_init_refused(c, tfm_rotary_tables(c, &r, 4, 0, 2, &cosine, &sine), whole[i].text);
    }
    tfm_destroy(c);
}

Test(rotary, same_bits_with_any_number_of_threads) {
    static const int threads[] = {2, 3, 7};
    tfm_ctx *one = context_of(1);
    tfm_rope r;
    tfm_tensor *x = some(one, TFM_SHAPE(2, 4, 150, 64), 6), *y;
    int i;
    memset(&r, 0, sizeof r);
    y = tfm_rotary(one, x, &r, 3, NULL);
    assert_made(one, y);
    for (i = 0; i < 3; i++) {
        tfm_ctx *c = context_of(threads[i]);
        tfm_tensor *z = tfm_rotary(c, tfm_wrap(c, TFM_F32, tfm_shape_like(x), x->data), &r, 3, NULL);
        assert_made(c, z);
        assert_same_bytes(z->data, y->data, tfm_numel(y) * 4);
        tfm_destroy(c);
    }
    tfm_destroy(one);
}

/* Promises that hold everywhere: macros, shapes, zeroed option structs, the rounding of narrow floats. */
#include "test.h"

#if TFM_VERSION < 100 || TFM_VERSION_MAJOR * 10000 + TFM_VERSION_MINOR * 100 + TFM_VERSION_PATCH != TFM_VERSION
#error "the version is not a number for the preprocessor"
#endif
#if TFM_MAX_DIMS != 6
#error "TFM_MAX_DIMS"
#endif

static tfm_ctx *context(void) {
    tfm_options o;
    tfm_ctx *c;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.seed = 5;
    c = tfm_create(&o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "no context: %s", tfm_error(c));
    return c;
}

/* -- macros and shapes --------------------------------------------------------------------------------------------- */

Test(promises, version_of_header_and_implementation_agree) {
    cr_assert_eq(tfm_version(), TFM_VERSION);
}

/* Numbers that files and other languages may hold: they never change. */
Test(promises, constants_keep_their_values) {
    cr_assert(TFM_OK == 0 && TFM_INVALID == 1 && TFM_OOM == 2 && TFM_IO == 3 && TFM_FORMAT == 4 && TFM_UNSUPPORTED == 5
              && TFM_CANCELLED == 6 && TFM_BUSY == 7);
    cr_assert(TFM_F32 == 0 && TFM_F16 == 1 && TFM_BF16 == 2 && TFM_F64 == 3 && TFM_I64 == 4 && TFM_I32 == 5
              && TFM_I8 == 6 && TFM_U8 == 7 && TFM_BOOL == 8 && TFM_DTYPE_COUNT == 9);
    cr_assert(TFM_ACT_NONE == 0 && TFM_ACT_RELU == 1 && TFM_ACT_GELU == 2 && TFM_ACT_GELU_TANH == 3
              && TFM_ACT_GELU_QUICK == 4 && TFM_ACT_SILU == 5 && TFM_ACT_SIGMOID == 6 && TFM_ACT_TANH == 7);
    cr_assert(TFM_CAUSAL_NONE == 0 && TFM_CAUSAL_TOP_LEFT == 1 && TFM_CAUSAL_BOTTOM_RIGHT == 2
              && TFM_CAUSAL_OFFSET == 3);
    cr_assert(TFM_ISA_SCALAR == 0 && TFM_ISA_NEON == 1 && TFM_ISA_AVX2 == 2 && TFM_ISA_AVX512 == 3);
}

Test(promises, dtypes_have_a_name_and_a_size) {
    static const char *const names[] = {"f32", "f16", "bf16", "f64", "i64", "i32", "i8", "u8", "bool"};
    static const int sizes[] = {4, 2, 2, 8, 8, 4, 1, 1, 1};
    int i;
    for (i = 0; i < TFM_DTYPE_COUNT; i++) {
        cr_assert_str_eq(tfm_dtype_name(i), names[i]);
        cr_assert_eq(tfm_dtype_size(i), sizes[i]);
    }
    cr_assert_str_eq(tfm_dtype_name(-1), "unknown");
    cr_assert_str_eq(tfm_dtype_name(TFM_DTYPE_COUNT), "unknown");
    cr_assert_eq(tfm_dtype_size(77), 0);
}

static int is_shape(tfm_shape s, int ndim) { /* sizes 2, 3, 4, ... */
    int i, good = s.ndim == ndim;
    for (i = 0; i < TFM_MAX_DIMS; i++) good &= s.dim[i] == (i < ndim ? i + 2 : 0);
    return good;
}

Test(promises, TFM_SHAPE_takes_one_to_six_sizes_once_each) {
    static const int64_t sizes[] = {2, 3, 4, 5, 6, 7};
    int64_t next = 2;
    tfm_shape s;
    cr_assert(is_shape(TFM_SHAPE(2), 1));
    cr_assert(is_shape(TFM_SHAPE(2, 3), 2));
    cr_assert(is_shape(TFM_SHAPE(2, 3, 4), 3));
    cr_assert(is_shape(TFM_SHAPE(2, 3, 4, 5), 4));
    cr_assert(is_shape(TFM_SHAPE(2, 3, 4, 5, 6), 5));
    cr_assert(is_shape(TFM_SHAPE(2, 3, 4, 5, 6, 7), 6));
    cr_assert(is_shape(tfm_shape_of(0, NULL), 0));
    cr_assert(is_shape(tfm_shape_of(6, sizes), 6));
    s = TFM_SHAPE(next++);
    cr_assert(is_shape(s, 1) && next == 3);
    s = TFM_SHAPE((int64_t)1 << 40, next > 2 ? 3 : 4); /* an expression is one size */
    cr_assert(s.ndim == 2 && s.dim[0] == (int64_t)1 << 40 && s.dim[1] == 3);
    s = TFM_SHAPE(TFM_SHAPE(5).ndim, sizeof(char));
    cr_assert(s.ndim == 2 && s.dim[0] == 1 && s.dim[1] == 1);
}

Test(promises, a_shape_of_a_tensor_makes_one_like_it) {
    tfm_ctx *c = context();
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(2, 3, 4)), *scalar = tfm_ones(c, tfm_shape_of(0, NULL));
    assert_made(c, x);
    assert_made(c, scalar);
    cr_assert(is_shape(tfm_shape_like(x), 3) && is_shape(tfm_shape_like(scalar), 0)
              && is_shape(tfm_shape_like(NULL), 0));
    cr_assert(tfm_numel(x) == 24 && tfm_numel(scalar) == 1 && tfm_numel(NULL) == 0 && tfm_item(scalar) == 1);
    assert_refused(c, tfm_ones(c, tfm_shape_of(7, NULL)), TFM_INVALID);
    assert_refused(c, tfm_ones(c, tfm_shape_of(-1, NULL)), TFM_INVALID);
    tfm_destroy(c);
}

/* -- zeroed options ------------------------------------------------------------------------------------------------ */

static void assert_equal(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b, const char *what) {
    float *x = test_floats(c, a), *y = test_floats(c, b);
    cr_assert(x && y, "%s: %s", what, tfm_error(c));
    cr_assert(test_same_shape(a, b) && memcmp(x, y, (size_t)tfm_numel(a) * 4) == 0, "%s: zero is not the default",
              what);
    free(x);
    free(y);
}

#define ZERO(type, name) \
    type name;           \
    memset(&name, 0, sizeof name)

Test(promises, zeroed_options_of_ops_are_the_defaults) {
    tfm_ctx *c = context();
    tfm_tensor *x = tfm_randn(c, TFM_SHAPE(2, 3, 8)), *w = tfm_randn(c, TFM_SHAPE(8)),
               *q = tfm_randn(c, TFM_SHAPE(1, 2, 9, 16));
    tfm_mask none = tfm_mask_keep(NULL);
    ZERO(tfm_norm_options, norm);
    ZERO(tfm_attention_options, attention);
    ZERO(tfm_rope, rope);
    ZERO(tfm_mask, mask);
    ZERO(tfm_heatmap_options, map);
    tfm_tensor *y;
    assert_equal(c, tfm_layer_norm(c, x, w, w, NULL), tfm_layer_norm(c, x, w, w, &norm), "tfm_norm_options");
    assert_equal(c, tfm_rms_norm(c, x, w, NULL), tfm_rms_norm(c, x, w, &norm), "tfm_norm_options");
    y = tfm_layer_norm(c, x, w, w, NULL);
    norm.eps = 1e-5f;
    norm.normalized_dims = 1;
    assert_equal(c, y, tfm_layer_norm(c, x, w, w, &norm), "explicit tfm_norm_options");
    y = tfm_attention(c, q, q, q, NULL);
    assert_equal(c, y, tfm_attention(c, q, q, q, &attention), "tfm_attention_options");
    attention.scale = 0.25f; /* 1 / sqrt(16) */
    attention.mask.relative_max_distance = 128;
    assert_equal(c, y, tfm_attention(c, q, q, q, &attention), "explicit tfm_attention_options");
    cr_assert(memcmp(&none, &mask, sizeof mask) == 0, "a mask of nothing is all zero");
    y = tfm_mask_matrix(c, &mask, 1, 1, 3, 4);
    assert_equal(c, y, tfm_zeros(c, TFM_SHAPE(1, 1, 3, 4)), "tfm_mask");
    y = tfm_rotary(c, q, &rope, 3, NULL);
    rope.base = 10000;
    rope.dims = 16;
    rope.factor = 1;
    assert_equal(c, y, tfm_rotary(c, q, &rope, 3, NULL), "tfm_rope");
    y = tfm_softmax(c, tfm_select(c, x, 0, 0), 1);
    cr_assert_str_eq(tfm_heatmap_svg(c, y, NULL), tfm_heatmap_svg(c, y, &map));
    cr_assert_str_eq(tfm_heatmap_text(c, y, NULL), tfm_heatmap_text(c, y, &map));
    tfm_destroy(c);
}

Test(promises, zeroed_options_of_layers_are_the_defaults) {
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    tfm_tensor *x = tfm_randn(c, TFM_SHAPE(2, 5, 16));
    const int64_t id[6] = {1, 2, 3, 4, 0, 1};
    tfm_tensor *ids = tfm_from(c, TFM_I64, TFM_SHAPE(2, 3), id);
    tfm_mha attention;
    tfm_encoder encoder;
    tfm_transformer model;
    ZERO(tfm_mha_config, heads);
    ZERO(tfm_mha_options, options);
    ZERO(tfm_block_config, block);
    ZERO(tfm_stack_options, stack);
    ZERO(tfm_transformer_config, config);
    ZERO(tfm_transformer_options, forward);
    ZERO(tfm_session_options, session);
    ZERO(tfm_cache_options, cache);
    tfm_cache *made;
    heads.d_model = block.d_model = 16;
    heads.heads = block.heads = 2;
    assert_ok(c, tfm_mha_init(c, p, "heads", &heads, &attention));
    assert_equal(c, tfm_mha_forward(c, &attention, x, x, x, NULL), tfm_mha_forward(c, &attention, x, x, x, &options),
                 "tfm_mha_options");
    assert_ok(c, tfm_encoder_init(c, p, "stack", 1, &block, 1, &encoder));
    cr_assert_eq(encoder.layers[0].feed_forward.linear1.weight->shape[0], 2048);
    assert_equal(c, tfm_encoder_forward(c, &encoder, x, NULL), tfm_encoder_forward(c, &encoder, x, &stack),
                 "tfm_stack_options");
    config.kind = TFM_DECODER_ONLY;
    config.target_vocab = 5;
    config.block.d_model = 16;
    config.block.heads = 2;
    config.block.d_ff = 16;
    assert_ok(c, tfm_transformer_init(c, p, "model", &config, &model));
    cr_assert_eq(model.decoder.layers ? model.decoder.count : model.encoder.count, 6);
    assert_equal(c, tfm_transformer_forward(c, &model, NULL, ids, NULL),
                 tfm_transformer_forward(c, &model, NULL, ids, &forward), "tfm_transformer_options");
    {
        tfm_session *a = tfm_session_create(c, &model, NULL), *b = tfm_session_create(c, &model, &session);
        tfm_tensor *row = tfm_narrow(c, ids, 0, 0, 1);
        assert_made(c, a);
        assert_made(c, b);
        assert_equal(c, tfm_session_feed(c, a, row, NULL), tfm_session_feed(c, b, row, NULL), "tfm_session_options");
        tfm_session_destroy(a);
        tfm_session_destroy(b);
    }
    cache.heads = 1;
    cache.key_size = 4;
    cache.capacity = 8;
    made = tfm_cache_create(c, &cache); /* f32, one layer, one row */
    assert_made(c, made);
    assert_ok(
        c, tfm_cache_append(c, made, 0, tfm_ones(c, TFM_SHAPE(1, 1, 3, 4)), tfm_ones(c, TFM_SHAPE(1, 1, 3, 4)), NULL));
    cr_assert_eq(tfm_cache_length(made, 0, 0), 3);
    tfm_cache_destroy(made);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* Greedy, no penalty, no limit: the largest logit, the first of equals. */
Test(promises, zeroed_sampling_is_greedy) {
    static const float logit[6] = {-1, 3, 7, 7, 0, 6.5f};
    tfm_ctx *c = context();
    const tfm_tensor *logits = tfm_from(c, TFM_F32, TFM_SHAPE(6), logit);
    int64_t id[2] = {-1, -1};
    ZERO(tfm_sampling, greedy);
    assert_ok(c, tfm_sample(c, logits, NULL, NULL, 0, 0, 0, &id[0], NULL));
    assert_ok(c, tfm_sample(c, logits, &greedy, NULL, 0, 1, 2, &id[1], NULL));
    cr_assert(id[0] == 2 && id[1] == 2, "%lld %lld", (long long)id[0], (long long)id[1]);
    tfm_destroy(c);
}

/* -- narrow floats ------------------------------------------------------------------------------------------------- */

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* What 16 bits mean, by the definition of the format: `digits` of fraction, exponent bias. */
static double value_of(uint16_t bits, int digits, int bias) {
    const int exponent = bits >> digits & ((1 << (15 - digits)) - 1), fraction = bits & ((1 << digits) - 1);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << (15 - digits)) - 1) return fraction ? NAN : sign * HUGE_VAL;
    if (!exponent) return sign * ldexp(fraction, 1 - bias - digits);
    return sign * ldexp(fraction + (1 << digits), exponent - bias - digits);
}

/* All 65536 patterns of f16 and bf16, to f32 and back. */
Test(promises, every_narrow_float_widens_to_its_value_and_back) {
    TEST_EACH_ISA(c, 1) {
        int format;
        for (format = 0; format < 2; format++) {
            const int dtype = format ? TFM_BF16 : TFM_F16, digits = format ? 7 : 10, bias = format ? 127 : 15;
            tfm_tensor *x = tfm_empty(c, dtype, TFM_SHAPE(65536)), *wide, *back;
            int64_t i;
            assert_made(c, x);
            for (i = 0; i < 65536; i++) ((uint16_t *)x->data)[i] = (uint16_t)i;
            wide = tfm_cast(c, x, TFM_F32);
            back = tfm_cast(c, wide, dtype);
            assert_made(c, back);
            for (i = 0; i < 65536; i++) {
                const double expected = value_of((uint16_t)i, digits, bias);
                const float y = ((const float *)wide->data)[i];
                const uint16_t again = ((const uint16_t *)back->data)[i];
                if (isnan(expected)) {
                    cr_assert(isnan(y) && isnan(value_of(again, digits, bias)) && again >> 15 == i >> 15,
                              "%s %04x on %s", tfm_dtype_name(dtype), (unsigned)i, tfm_isa_name(c));
                    continue;
                }
                cr_assert((double)y == expected && !signbit(y) == !(i >> 15), "%s %04x on %s: %.9g, expected %.9g",
                          tfm_dtype_name(dtype), (unsigned)i, tfm_isa_name(c), (double)y, expected);
                cr_assert_eq(again, i, "%s %04x on %s comes back as %04x", tfm_dtype_name(dtype), (unsigned)i,
                             tfm_isa_name(c), again);
                cr_assert(tfm_get(x, &i) == expected);
            }
        }
    }
}

/* The 16 bits nearest to x, to even: found among the format's own values. `low` is the pattern next to zero from x. */
static uint16_t nearest(float x, uint16_t low, int digits, int bias) {
    const double a = fabs((double)x), below = value_of(low & 0x7fff, digits, bias);
    double above = value_of((uint16_t)((low & 0x7fff) + 1), digits, bias);
    if (isinf(above)) above = ldexp(1, (1 << (15 - digits)) - 1 - bias); /* rounding happens before the overflow */
    if (a - below == above - a) return low & 1 ? (uint16_t)(low + 1) : low;
    return a - below < above - a ? low : (uint16_t)(low + 1);
}

/* Rounding is monotone, so the values in the middle of two neighbours, and the floats next to them, decide about all
 * 2^32 floats: these are all there, and some millions from in between. */
Test(promises, every_float_rounds_to_the_nearest_even_narrow_float, .timeout = 120) {
    enum { BLOCK = 65536 * 4 };
    TEST_EACH_ISA(c, 1) {
        int format;
        for (format = 0; format < 2; format++) {
            const int dtype = format ? TFM_BF16 : TFM_F16, digits = format ? 7 : 10, bias = format ? 127 : 15;
            const uint16_t infinity = (uint16_t)(((1 << (15 - digits)) - 1) << digits);
            tfm_tensor *x = tfm_empty(c, TFM_F32, TFM_SHAPE(BLOCK)), *y;
            float *in = (float *)x->data;
            uint16_t *expected = (uint16_t *)malloc(BLOCK * sizeof *expected);
            int64_t i, n = 0;
            assert_made(c, x);
            for (i = 0; i < 65536; i++) {
                const uint16_t low = (uint16_t)i;
                double middle;
                uint32_t bits;
                int k;
                if ((low & 0x7fff) >= infinity) continue;
                middle = value_of((uint16_t)(low + 1), digits, bias);
                if (isinf(middle)) middle = (i >> 15 ? -1 : 1) * ldexp(1, (1 << (15 - digits)) - 1 - bias);
                middle = (value_of(low, digits, bias) + middle) / 2;
                bits = bits_of((float)middle);
                for (k = -1; k <= 1; k++) { /* the floats around the middle */
                    if (k < 0 && !(bits & 0x7fffffff)) continue;
                    in[n] = float_of(bits + (uint32_t)k);
                    expected[n] = nearest(in[n], low, digits, bias);
                    n++;
                }
            }
            cr_assert_gt(n, 3 * 2 * 30000);
            for (i = n; i < BLOCK; i++) in[i] = 0, expected[i] = 0;
            y = tfm_cast(c, x, dtype);
            assert_made(c, y);
            for (i = 0; i < BLOCK; i++)
                cr_assert(((const uint16_t *)y->data)[i] == expected[i],
                          "%s on %s: %.9g (%08x) gives %04x, expected %04x", tfm_dtype_name(dtype), tfm_isa_name(c),
                          (double)in[i], (unsigned)bits_of(in[i]), ((const uint16_t *)y->data)[i], expected[i]);
            free(expected);
        }
    }
}

/* Between the middles: never a step down, over floats taken from all of their range; NaN stays NaN. */
Test(promises, rounding_to_narrow_floats_is_monotone_and_keeps_nan, .timeout = 120) {
    enum { BLOCK = 1 << 16 };
    const uint32_t stride = test_quick() ? 9973 : 509;
    TEST_EACH_ISA(c, 1) {
        int format;
        for (format = 0; format < 2; format++) {
            const int dtype = format ? TFM_BF16 : TFM_F16;
            const uint16_t infinity = format ? 0x7f80 : 0x7c00;
            uint32_t bits = 0;
            uint16_t before = 0;
            tfm_marker mark = tfm_mark(c);
            while (bits < 0x80000000u) {
                tfm_tensor *x = tfm_empty(c, TFM_F32, TFM_SHAPE(2, BLOCK)), *y;
                const uint32_t first = bits;
                int64_t i, n = 0;
                assert_made(c, x);
                for (; n < BLOCK; n++, bits += bits < 0x80000000u ? stride : 0) {
                    ((float *)x->data)[n] = float_of(bits & 0x7fffffffu);
                    ((float *)x->data)[BLOCK + n] = float_of(bits | 0x80000000u);
                }
                y = tfm_cast(c, x, dtype);
                assert_made(c, y);
                for (i = 0, bits = first; i < BLOCK && bits < 0x80000000u; i++, bits += stride) {
                    const uint16_t up = ((const uint16_t *)y->data)[i], down = ((const uint16_t *)y->data)[BLOCK + i];
                    if (bits > 0x7f800000u)
                        cr_assert(up > infinity && up < 0x8000 && down > infinity + 0x8000, "NaN %08x gives %04x, %04x",
                                  (unsigned)bits, up, down);
                    else
                        cr_assert(up >= before && up <= infinity && down == (up | 0x8000),
                                  "%s on %s: %08x gives %04x and %04x after %04x", tfm_dtype_name(dtype),
                                  tfm_isa_name(c), (unsigned)bits, up, down, before);
                    before = up;
                }
                tfm_rewind(c, mark);
            }
        }
    }
}

/* Doubles go to narrow floats in one rounding, not by way of f32. */
Test(promises, doubles_round_once) {
    static const int64_t origin[1] = {0};
    tfm_ctx *c = context();
    const double tie = 1 + 1.0 / 2048, above = tie + ldexp(1, -40), tie_b = 1 + 1.0 / 256,
                 above_b = tie_b + ldexp(1, -40);
    cr_assert_eq(tfm_get(tfm_full(c, TFM_F16, TFM_SHAPE(1), tie), origin), 1);
    cr_assert_eq(tfm_get(tfm_full(c, TFM_F16, TFM_SHAPE(1), above), origin), 1 + 1.0 / 1024);
    cr_assert_eq(tfm_get(tfm_full(c, TFM_BF16, TFM_SHAPE(1), tie_b), origin), 1);
    cr_assert_eq(tfm_get(tfm_full(c, TFM_BF16, TFM_SHAPE(1), above_b), origin), 1 + 1.0 / 128);
    cr_assert_eq(tfm_get(tfm_cast(c, tfm_full(c, TFM_F64, TFM_SHAPE(1), above), TFM_F16), origin), 1 + 1.0 / 1024);
    cr_assert_eq(tfm_get(tfm_cast(c, tfm_full(c, TFM_F64, TFM_SHAPE(1), above_b), TFM_BF16), origin), 1 + 1.0 / 128);
    cr_assert_eq(tfm_get(tfm_full(c, TFM_F16, TFM_SHAPE(1), 65519.999), origin), 65504);
    cr_assert_eq(tfm_get(tfm_full(c, TFM_F16, TFM_SHAPE(1), 65520), origin), HUGE_VAL);
    cr_assert_str_eq(tfm_error(c), "");
    tfm_destroy(c);
}

/* Float to integer truncates and saturates, NaN gives 0: never C's undefined conversion. */
Test(promises, casts_to_integers_truncate_and_saturate) {
    static const struct { double from; int64_t i64, i32, i8, u8;
    } row[] = {{2.9, 2, 2, 2, 2},
               {-2.9, -2, -2, -2, 0},
               {300, 300, 300, 127, 255},
               {-300, -300, -300, -128, 0},
               {3e9, 3000000000, INT32_MAX, 127, 255},
               {-1e30, INT64_MIN, INT32_MIN, -128, 0},
               {1e30, INT64_MAX, INT32_MAX, 127, 255},
               {(double)HUGE_VAL, INT64_MAX, INT32_MAX, 127, 255},
               {(double)NAN, 0, 0, 0, 0}};
    int i;
    TEST_EACH_ISA(c, 1) {
        for (i = 0; i < (int)(sizeof row / sizeof row[0]); i++) {
            const tfm_tensor *x = tfm_full(c, TFM_F32, TFM_SHAPE(19), row[i].from), *a = tfm_cast(c, x, TFM_I64),
                             *b = tfm_cast(c, x, TFM_I32);
            const tfm_tensor *s = tfm_cast(c, x, TFM_I8), *u = tfm_cast(c, x, TFM_U8), *t = tfm_cast(c, x, TFM_BOOL);
            assert_made(c, t);
            cr_assert_eq(((const int64_t *)a->data)[18], row[i].i64, "%g", row[i].from);
            cr_assert_eq(((const int32_t *)b->data)[18], (int32_t)row[i].i32, "%g", row[i].from);
            cr_assert_eq(((const int8_t *)s->data)[18], (int8_t)row[i].i8, "%g", row[i].from);
            cr_assert_eq(((const uint8_t *)u->data)[18], (uint8_t)row[i].u8, "%g", row[i].from);
            cr_assert_eq(((const uint8_t *)t->data)[18], 1);
        }
    }
}

/* Layers against PyTorch, against our golden files, and against themselves: packed and plain, cached and not, any
 * threads, alone and in a batch. */
#include "layer_helpers.h"

#if !defined(TFM_NO_FILES) && !defined(TFM_NO_STDIO)

/* -- PyTorch's own tests (shared data) ----------------------------------------------------------------------------- */

/* A key padding mask (B, L), true = ignore, as our mask. */
static tfm_mask padding_of(tfm_ctx *c, const tfm_tensor *ignore) {
    tfm_mask m;
    memset(&m, 0, sizeof m);
    if (ignore) m.ignore = tfm_reshape(c, ignore, TFM_SHAPE(ignore->shape[0], 1, 1, ignore->shape[1]));
    return m;
}

static tfm_tensor *batch_first(tfm_ctx *c, tfm_tensor *t, int already) {
    return t && !already ? tfm_transpose(c, t, 0, 1) : t;
}

static void check_pytorch(tfm_ctx *c, const char *name, int prepare) {
    char path[512], file[128], text[320];
    tfm_file *f;
    tfm_params *p;
    tfm_block_config g;
    tfm_stack_options o;
    tfm_tensor *x, *memory, *y = NULL, *expected, *ignored, *valid = NULL;
    const char *kind;
    int first, decoder, layer;
    int64_t layers;
    snprintf(file, sizeof file, "pytorch/%s.safetensors", name);
    test_need_shared(path, sizeof path, file);
    f = tfm_file_open(c, path);
    assert_made(c, f);
    p = file_params(c, f);
    kind = meta(f, "kind", "");
    first = (int)meta_int(f, "batch_first", 0);
    layers = meta_int(f, "num_layers", 1);
    decoder = strncmp(kind, "decoder", 7) == 0;
    layer = strstr(kind, "layer") != NULL;
    memset(&g, 0, sizeof g);
    g.d_model = meta_int(f, "d_model", 0);
    g.heads = meta_int(f, "nhead", 0);
    g.d_ff = meta_int(f, "dim_feedforward", 0);
    g.activation = strcmp(meta(f, "activation", ""), "gelu") ? TFM_ACT_RELU : TFM_ACT_GELU;
    g.norm_first = (int)meta_int(f, "norm_first", 0);
    memset(&o, 0, sizeof o);
    x = batch_first(c, tfm_file_tensor(c, f, decoder ? "in.tgt" : "in.src"), first);
    memory = decoder ? batch_first(c, tfm_file_tensor(c, f, "in.memory"), first) : NULL;
    expected = batch_first(c, tfm_file_tensor(c, f, "out.expected"), first);
    ignored = file_has(c, f, decoder ? "mask.tgt_key_padding_mask" : "mask.src_key_padding_mask");
    o.mask = padding_of(c, ignored);
    if (decoder) o.memory_mask = padding_of(c, file_has(c, f, "mask.memory_key_padding_mask"));
    /* PyTorch's fast path of encoders leaves zeros at padded positions. */
    if (ignored && !decoder) valid = tfm_compare_scalar(c, ignored, 0, TFM_EQ);
    if (decoder && layer) {
        tfm_decoder_layer l;
        assert_ok(c, tfm_decoder_layer_init(c, p, "", &g, &l));
        if (prepare) assert_ok(c, tfm_params_prepare(c, p));
        y = tfm_decoder_layer_forward(c, &l, x, memory, &o);
    } else if (decoder) {
        tfm_decoder l;
        assert_ok(c, tfm_decoder_init(c, p, "", layers, &g, (int)meta_int(f, "final_norm", 0), &l));
        if (prepare) assert_ok(c, tfm_params_prepare(c, p));
        y = tfm_decoder_forward(c, &l, x, memory, &o);
    } else if (layer) {
        tfm_encoder_layer l;
        assert_ok(c, tfm_encoder_layer_init(c, p, "", &g, &l));
        if (prepare) assert_ok(c, tfm_params_prepare(c, p));
        y = tfm_encoder_layer_forward(c, &l, x, &o);
    } else {
        tfm_encoder l;
        assert_ok(c, tfm_encoder_init(c, p, "", layers, &g, (int)meta_int(f, "final_norm", 0), &l));
        if (prepare) assert_ok(c, tfm_params_prepare(c, p));
        y = tfm_encoder_forward(c, &l, x, &o);
    }
    cr_expect(
        rows_close(c, y, expected, valid, meta_number(f, "rtol", 0), meta_number(f, "atol", 0), text, sizeof text),
        "%s on %s: %s", name, tfm_isa_name(c), text);
    tfm_params_destroy(p);
    tfm_file_close(f);
}

static void check_pytorch_all(const char *kind, const int *numbers, int count) {
    char name[64], path[512];
    int i;
    snprintf(name, sizeof name, "pytorch/%s_%03d.safetensors", kind, numbers[0]);
    test_need_shared(path, sizeof path, name);
    TEST_EACH_ISA(c, 1)
        for (i = 0; i < count; i++) {
            snprintf(name, sizeof name, "%s_%03d", kind, numbers[i]);
            check_pytorch(c, name, i & 1);
        }
}

Test(pytorch, encoder_layer) {
    static const int n[] = {1, 2, 3, 5, 8, 12, 13, 14, 16, 17, 18, 20};
    check_pytorch_all("encoder_layer", n, 12);
}

Test(pytorch, decoder_layer) {
    static const int n[] = {22, 26, 27, 28, 29, 30, 31, 32, 33, 35, 36, 39, 40, 41, 43, 44};
    check_pytorch_all("decoder_layer", n, 16);
}

Test(pytorch, encoder) {
    static const int n[] = {78, 82, 86, 88, 90, 91};
    check_pytorch_all("encoder", n, 6);
}

Test(pytorch, decoder) {
    static const int n[] = {47, 48, 50, 51, 52, 56, 57, 59, 61, 63, 64, 65, 66, 68, 71, 73, 74, 76, 77};
    check_pytorch_all("decoder", n, 19);
}

/* -- Golden files -------------------------------------------------------------------------------------------------- */

static void check_mha(const char *name) {
    int packed;
    TEST_EACH_ISA(c, 1)
        for (packed = 0; packed < 2; packed++) {
            tfm_file *f = golden(c, name);
            tfm_params *p = file_params(c, f);
            const double rtol = meta_number(f, "rtol", 0), atol = meta_number(f, "atol", 0);
            tfm_mha_config g;
            tfm_mha_options o;
            tfm_mha l;
            tfm_tensor *query, *key, *value, *padding, *mask, *weights = NULL, *y;
            memset(&g, 0, sizeof g);
            memset(&o, 0, sizeof o);
            g.d_model = meta_int(f, "d_model", 0);
            g.heads = meta_int(f, "heads", 0);
            g.kdim = meta_int(f, "kdim", 0);
            g.vdim = meta_int(f, "vdim", 0);
            g.no_bias = !meta_int(f, "bias", 1);
            assert_ok(c, tfm_mha_init(c, p, "", &g, &l));
            if (packed) assert_ok(c, tfm_params_prepare(c, p));
            query = tfm_file_tensor(c, f, "in.query");
            key = meta_int(f, "self_attention", 0) ? query : tfm_file_tensor(c, f, "in.key");
            value = meta_int(f, "self_attention", 0) ? query : tfm_file_tensor(c, f, "in.value");
            padding = file_has(c, f, "in.key_padding_mask");
            mask = file_has(c, f, "in.attn_mask");
            if (padding)
                o.mask.keep = tfm_compare_scalar(
                    c, tfm_reshape(c, padding, TFM_SHAPE(padding->shape[0], 1, 1, padding->shape[1])), 0, TFM_EQ);
            if (mask && mask->dtype == TFM_BOOL) o.mask.ignore = mask;
            else if (mask) o.mask.bias = mask;
            y = tfm_mha_forward(c, &l, query, key, value, &o);
            assert_tensor_close(c, y, tfm_file_tensor(c, f, "out.y"), rtol, atol);
            o.weights = &weights;
            o.need_weights = 1;
            assert_same_values(c, tfm_mha_forward(c, &l, query, key, value, &o), y);
            assert_tensor_close(c, weights, tfm_file_tensor(c, f, "out.weights_average"), rtol, atol);
            o.need_weights = 2;
            assert_same_values(c, tfm_mha_forward(c, &l, query, key, value, &o), y);
            assert_tensor_close(c, weights, tfm_file_tensor(c, f, "out.weights"), rtol, atol);
            tfm_params_destroy(p);
            tfm_file_close(f);
        }
}

#define MHA_GOLDEN(name) \
    Test(mha, golden_##name) { check_mha("mha_" #name ".safetensors"); }
MHA_GOLDEN(self)
MHA_GOLDEN(self_padding)
MHA_GOLDEN(self_causal_bool)
MHA_GOLDEN(self_causal_additive)
MHA_GOLDEN(padding_and_mask)
MHA_GOLDEN(cross)
MHA_GOLDEN(cross_sizes)
MHA_GOLDEN(no_bias)
#endif

/* -- Multi-head attention against itself --------------------------------------------------------------------------- */

/* d_model, heads, kv_heads, head_size: none a multiple of a panel among the slices, and one that is. */
static const int64_t mha_sizes[][4] = {{12, 3, 3, 4}, {24, 6, 2, 4}, {32, 2, 1, 16}, {40, 5, 5, 8}, {16, 4, 2, 6}};

static tfm_mha_config mha_config(int i, int rotary) {
    tfm_mha_config g;
    memset(&g, 0, sizeof g);
    g.d_model = mha_sizes[i][0];
    g.heads = mha_sizes[i][1];
    g.kv_heads = mha_sizes[i][2];
    g.head_size = mha_sizes[i][3];
    g.rotary = rotary;
    return g;
}

Test(mha, packed_and_plain_give_the_same_bits) {
    TEST_EACH_ISA(c, 1) {
        int i, rotary;
        for (i = 0; i < 5; i++)
            for (rotary = 0; rotary < 2; rotary++) {
                tfm_params *p = tfm_params_create(c);
                tfm_mha_config g = mha_config(i, rotary);
                tfm_mha l;
                tfm_tensor *x = some(c, TFM_SHAPE(2, 9, g.d_model), 1), *k = some(c, TFM_SHAPE(2, 5, g.d_model), 2);
                tfm_tensor *v = some(c, TFM_SHAPE(2, 5, g.d_model), 3), *self, *cross, *three;
                assert_ok(c, tfm_mha_init(c, p, "m", &g, &l));
                test_fill((float *)l.in_proj_bias->data, tfm_numel(l.in_proj_bias), 4);
                self = tfm_mha_forward(c, &l, x, x, x, NULL);
                cross = tfm_mha_forward(c, &l, x, k, k, NULL);
                three = tfm_mha_forward(c, &l, x, k, v, NULL);
                assert_made(c, three);
                assert_ok(c, tfm_params_prepare(c, p));
                cr_assert_eq(l.in_proj_weight->layout, TFM_PANELS);
                assert_same_values(c, tfm_mha_forward(c, &l, x, x, x, NULL), self);
                assert_same_values(c, tfm_mha_forward(c, &l, x, k, k, NULL), cross);
                assert_same_values(c, tfm_mha_forward(c, &l, x, k, v, NULL), three);
                tfm_params_destroy(p);
            }
    }
}

/* One in_proj or three weights, one fused product or three: the same bits. */
Test(mha, fused_and_separate_projections_agree) {
    tfm_ctx *c = context_of(1);
    int i;
    for (i = 0; i < 5; i++) {
        tfm_params *p = tfm_params_create(c);
        tfm_mha_config g = mha_config(i, 0);
        tfm_mha fused, separate;
        const int64_t q = g.heads * g.head_size, kv = g.kv_heads * g.head_size;
        tfm_tensor *x = some(c, TFM_SHAPE(2, 7, g.d_model), 1), *copy;
        assert_ok(c, tfm_mha_init(c, p, "fused", &g, &fused));
        test_fill((float *)fused.in_proj_bias->data, q + 2 * kv, 2);
        g.separate = 1;
        assert_ok(c, tfm_mha_init(c, p, "separate", &g, &separate));
        cr_assert(!separate.in_proj_weight && separate.q_proj_weight);
        set_param(c, p, "separate.q_proj_weight", tfm_narrow(c, fused.in_proj_weight, 0, 0, q));
        set_param(c, p, "separate.k_proj_weight", tfm_narrow(c, fused.in_proj_weight, 0, q, kv));
        set_param(c, p, "separate.v_proj_weight", tfm_narrow(c, fused.in_proj_weight, 0, q + kv, kv));
        set_param(c, p, "separate.in_proj_bias", fused.in_proj_bias);
        set_param(c, p, "separate.out_proj.weight", fused.out_proj.weight);
        copy = tfm_clone(c, x);
        assert_same_values(c, tfm_mha_forward(c, &fused, x, x, x, NULL), tfm_mha_forward(c, &separate, x, x, x, NULL));
        assert_same_values(c, tfm_mha_forward(c, &fused, x, x, x, NULL),
                           tfm_mha_forward(c, &fused, x, copy, copy, NULL));
        tfm_params_destroy(p);
    }
    tfm_destroy(c);
}

Test(mha, a_cache_fed_in_any_pieces_gives_the_same_bits) {
    static const int64_t pieces[][4] = {{11, 0, 0, 0}, {1, 1, 1, 8}, {4, 4, 3, 0}, {10, 1, 0, 0}};
    TEST_EACH_ISA(c, 1) {
        int i, j, rotary, k;
        for (i = 0; i < 5; i++)
            for (rotary = 0; rotary < 2; rotary++) {
                tfm_params *p = tfm_params_create(c);
                tfm_mha_config g = mha_config(i, rotary);
                tfm_mha l;
                tfm_tensor *x = some(c, TFM_SHAPE(2, 11, g.d_model), 1), *whole;
                tfm_mha_options o;
                assert_ok(c, tfm_mha_init(c, p, "m", &g, &l));
                assert_ok(c, tfm_params_prepare(c, p));
                memset(&o, 0, sizeof o);
                o.mask.causal = TFM_CAUSAL_TOP_LEFT;
                whole = tfm_mha_forward(c, &l, x, x, x, &o);
                assert_made(c, whole);
                for (j = 0; j < 4; j++) {
                    tfm_cache_options s;
                    int64_t at = 0;
                    memset(&s, 0, sizeof s);
                    s.batch = 2;
                    s.heads = g.kv_heads;
                    s.key_size = g.head_size;
                    s.capacity = 11;
                    o.cache = tfm_cache_create(c, &s);
                    assert_made(c, o.cache);
                    for (k = 0; k < 4 && pieces[j][k]; k++) {
                        tfm_tensor *part = tfm_narrow(c, x, 1, at, pieces[j][k]);
                        tfm_tensor *y = tfm_mha_forward(c, &l, part, part, part, &o);
                        assert_made(c, y);
                        assert_same_values(c, y, tfm_narrow(c, whole, 1, at, pieces[j][k]));
                        at += pieces[j][k];
                    }
                    tfm_cache_destroy(o.cache);
                }
                tfm_params_destroy(p);
            }
    }
}

Test(mha, memory_gives_the_bits_of_keys_and_values) {
    TEST_EACH_ISA(c, 1) {
        int i, rotary;
        for (i = 0; i < 5; i++)
            for (rotary = 0; rotary < 2; rotary++) {
                static const int64_t lengths[2] = {6, 3};
                tfm_params *p = tfm_params_create(c);
                tfm_mha_config g = mha_config(i, rotary);
                tfm_mha l;
                tfm_mha_options o;
                tfm_cache_options s;
                tfm_cache *memory;
                tfm_tensor *x = some(c, TFM_SHAPE(2, 9, g.d_model), 1), *k = some(c, TFM_SHAPE(2, 6, g.d_model), 2),
                           *counts, *direct, *y;
                assert_ok(c, tfm_mha_init(c, p, "m", &g, &l));
                memset(&o, 0, sizeof o);
                memset(&s, 0, sizeof s);
                s.batch = 2;
                s.layers = 3;
                s.heads = g.kv_heads;
                s.key_size = g.head_size;
                s.capacity = 6;
                memory = tfm_cache_create(c, &s);
                counts = lengths_of(c, 2, lengths);
                assert_ok(c, tfm_mha_memory(c, &l, k, k, memory, 2, counts));
                o.mask.key_lengths = counts;
                direct = tfm_mha_forward(c, &l, x, k, k, &o);
                memset(&o, 0, sizeof o);
                o.memory = memory;
                o.layer = 2;
                y = tfm_mha_forward(c, &l, x, NULL, NULL, &o);
                assert_made(c, y);
                assert_same_values(c, y, direct);
                tfm_cache_destroy(memory);
                tfm_params_destroy(p);
            }
    }
}

Test(mha, wrong_calls_are_refused_with_reasons) {
    static const int64_t lengths[2] = {1, 5};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha_config g = mha_config(0, 0);
    tfm_mha_options o;
    tfm_mha l;
    tfm_tensor *x = some(c, TFM_SHAPE(2, 5, 12), 1), *k = some(c, TFM_SHAPE(2, 6, 12), 2), *weights;
    tfm_cache_options s;
    assert_ok(c, tfm_mha_init(c, p, "m", &g, &l));
    memset(&o, 0, sizeof o);
    assert_refused(c, tfm_mha_forward(c, &l, x, NULL, NULL, NULL), TFM_INVALID);
    assert_refused(c, tfm_mha_forward(c, &l, x, k, NULL, NULL), TFM_INVALID);
    assert_refused(c, tfm_mha_forward(c, &l, NULL, k, k, NULL), TFM_INVALID);
    assert_refused(c, tfm_mha_forward(c, NULL, x, k, k, NULL), TFM_INVALID);
    assert_refused(c, tfm_mha_forward(c, &l, x, k, x, NULL), TFM_INVALID); /* 6 keys, 5 values */
    assert_refused(c, tfm_mha_forward(c, &l, x, tfm_ones(c, TFM_SHAPE(1, 6, 12)), k, NULL), TFM_INVALID);
    assert_refused(c, tfm_mha_forward(c, &l, tfm_ones(c, TFM_SHAPE(5, 12)), x, x, NULL),
                   TFM_INVALID); /* no batch dim */
    assert_refused(c, tfm_mha_forward(c, &l, tfm_ones(c, TFM_SHAPE(2, 5, 11)), x, x, NULL), TFM_INVALID);
    o.need_weights = 1;
    assert_refused(c, tfm_mha_forward(c, &l, x, x, x, &o), TFM_INVALID);
    o.weights = &weights;
    assert_made(c, tfm_mha_forward(c, &l, x, x, x, &o));
    o.need_weights = 3;
    cr_assert_null(tfm_mha_forward(c, &l, x, x, x, &o));
    assert_error_says(c, "need_weights is 3");
    tfm_clear(c);
    o.need_weights = -1;
    assert_refused(c, tfm_mha_forward(c, &l, x, x, x, &o), TFM_INVALID);
    o.need_weights = 0;
    assert_made(c, tfm_mha_forward(c, &l, x, x, x, &o));
    cr_assert_null(weights);
    o.counts = lengths_of(c, 2, lengths); /* without a cache, where key_lengths are meant */
    cr_assert_null(tfm_mha_forward(c, &l, x, x, x, &o));
    assert_error_says(c, "tfm_mha_forward: counts is given without a cache");
    tfm_clear(c);
    memset(&o, 0, sizeof o);
    memset(&s, 0, sizeof s);
    s.heads = 3;
    s.key_size = 4;
    s.capacity = 8;
    o.cache = tfm_cache_create(c, &s); /* batch 1 */
    assert_refused(c, tfm_mha_forward(c, &l, x, x, x, &o), TFM_INVALID);
    tfm_cache_destroy(o.cache);
    s.batch = 2;
    o.cache = tfm_cache_create(c, &s);
    assert_refused(c, tfm_mha_forward(c, &l, x, k, k, &o), TFM_INVALID); /* a cache is for self-attention */
    o.layer = 1;
    assert_refused(c, tfm_mha_forward(c, &l, x, x, x, &o), TFM_INVALID);
    o.layer = 0;
    assert_made(c, tfm_mha_forward(c, &l, x, x, x, &o));
    assert_refused(c, tfm_mha_forward(c, &l, x, x, x, &o), TFM_INVALID); /* 5 + 5 > 8 */
    cr_assert_eq(tfm_cache_length(o.cache, 0, 0), 5);
    tfm_cache_destroy(o.cache);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(mha, configurations_that_cannot_be_are_refused) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha l;
    tfm_mha_config g;
    int i;
    memset(&g, 0, sizeof g);
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "d_model is 0");
    g.d_model = 10;
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "heads is 0");
    g.heads = 3;
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "d_model 10 is not a multiple of heads 3");
    g.head_size = 4;
    g.kv_heads = 2;
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "heads 3 is not a multiple of kv_heads 2");
    g.kv_heads = 0;
    g.head_size = 5;
    g.rotary = 1;
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "odd number of dims");
    g.rope.dims = 4;
    g.dropout = 1.0f;
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "dropout");
    g.dropout = 0;
    g.kdim = -1;
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "kdim");
    g.kdim = 0;
    g.kv_heads = -1;
    assert_init_refused(c, tfm_mha_init(c, p, "m", &g, &l), "kv_heads -1");
    g.kv_heads = 0;
    for (i = 0; i < 4; i++) {
        tfm_mha_config large = g;
        large.kdim = large.vdim = 7;
        *(i == 0 ? &large.heads : i == 1 ? &large.d_model : i == 2 ? &large.kdim : &large.vdim) = (int64_t)1 << 41;
        assert_init_refused(c, tfm_mha_init(c, p, "m", &large, &l), "too large");
    }
    assert_init_refused(c, tfm_mha_init(c, p, NULL, &g, &l), "prefix is NULL");
    assert_init_refused(c, tfm_mha_init(c, p, "m", NULL, &l), "config is NULL");
    assert_init_refused(c, tfm_mha_init(c, NULL, "m", &g, &l), "parameters are NULL");
    cr_assert_eq(tfm_params_count(p), 0); /* nothing was made on the way */
    assert_ok(c, tfm_mha_init(c, p, "m", &g, &l));
    cr_assert(l.in_proj_weight && l.in_proj_bias && l.out_proj.bias);
    g.no_out_bias = 1;
    g.kdim = 7;
    assert_ok(c, tfm_mha_init(c, p, "keys", &g, &l));
    cr_assert(l.q_proj_weight && !l.in_proj_weight && l.in_proj_bias && !l.out_proj.bias);
    g.kdim = 0;
    g.vdim = 7;
    assert_ok(c, tfm_mha_init(c, p, "values", &g, &l));
    cr_assert(l.v_proj_weight && !l.in_proj_weight && l.v_proj_weight->shape[1] == 7 && l.k_proj_weight->shape[1] == 10);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* -- Blocks -------------------------------------------------------------------------------------------------------- */

static tfm_block_config block_config(int pre, int gated, int rms, int rotary) {
    tfm_block_config g;
    memset(&g, 0, sizeof g);
    g.norm_first = pre;
    g.gated = gated;
    g.norm = rms ? TFM_RMS_NORM : TFM_LAYER_NORM;
    g.activation = gated ? TFM_ACT_SILU : TFM_ACT_GELU;
    g.d_model = 24;
    g.heads = 6;
    g.kv_heads = gated ? 2 : 0;
    g.d_ff = 40;
    g.rotary = rotary;
    return g;
}

/* Rows of the table, times scale (0: 1); the logits are without it. */
Test(embedding, scales_what_it_looks_up) {
    static const float scales[3] = {0, 1, 2.5f};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_embedding_layer e;
    tfm_tensor *ids = some_ids(c, 2, 3, 7, 1), *x = some(c, TFM_SHAPE(2, 3, 5), 2);
    int i;
    assert_ok(c, tfm_embedding_init(c, p, "e", 7, 5, &e));
    cr_assert_eq(e.scale, 0.0f);
    for (i = 0; i < 3; i++) {
        e.scale = scales[i];
        assert_same_values(c, tfm_embedding_forward(c, &e, ids),
                           tfm_scale(c, tfm_embedding(c, e.weight, ids), i == 2 ? 2.5f : 1.0f));
        assert_same_values(c, tfm_embedding_logits(c, &e, x), tfm_linear(c, x, e.weight, NULL, TFM_ACT_NONE));
    }
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(feed_forward, is_what_its_parts_say) {
    tfm_ctx *c = context_of(1);
    int gated, activation;
    for (gated = 0; gated < 2; gated++)
        for (activation = 0; activation < TFM_ACT_COUNT; activation++) {
            tfm_params *p = tfm_params_create(c);
            tfm_feed_forward_config g;
            tfm_feed_forward l;
            tfm_tensor *x = some(c, TFM_SHAPE(2, 3, 8), 1), *h, *y;
            const int act = activation ? activation : TFM_ACT_RELU;
            memset(&g, 0, sizeof g);
            g.d_model = 8;
            g.d_ff = 20;
            g.gated = gated;
            g.activation = activation;
            assert_ok(c, tfm_feed_forward_init(c, p, "f", &g, &l));
            cr_assert((tfm_params_find(p, "f.linear_gate.weight") != NULL) == gated);
            h = tfm_linear(c, x, tfm_params_find(p, "f.linear1.weight"), tfm_params_find(p, "f.linear1.bias"),
                           TFM_ACT_NONE);
            if (gated)
                h = tfm_glu(c,
                            tfm_linear(c, x, tfm_params_find(p, "f.linear_gate.weight"),
                                       tfm_params_find(p, "f.linear_gate.bias"), TFM_ACT_NONE),
                            h, act);
            else
                h = tfm_activation(c, h, act);
            y = tfm_linear(c, h, tfm_params_find(p, "f.linear2.weight"), tfm_params_find(p, "f.linear2.bias"),
                           TFM_ACT_NONE);
            assert_made(c, y);
            assert_same_values(c, tfm_feed_forward_forward(c, &l, x), y);
            tfm_params_destroy(p);
        }
    tfm_destroy(c);
}

/* norm1(x + SA(x)), norm2(x + FF(x)), and the pre-norm order, written out with public calls. */
Test(encoder_layer, is_what_its_parts_say) {
    tfm_ctx *c = context_of(1);
    int pre, rms;
    for (pre = 0; pre < 2; pre++)
        for (rms = 0; rms < 2; rms++) {
            tfm_params *p = tfm_params_create(c);
            tfm_block_config g = block_config(pre, rms, rms, rms);
            tfm_encoder_layer l;
            tfm_tensor *x = some(c, TFM_SHAPE(2, 5, 24), 1), *n, *h, *y;
            assert_ok(c, tfm_encoder_layer_init(c, p, "l", &g, &l));
            test_fill((float *)l.norm1.weight->data, 24, 2);
            test_fill((float *)l.norm2.weight->data, 24, 3);
            n = pre ? tfm_norm_forward(c, &l.norm1, x) : x;
            h = tfm_add(c, x, tfm_mha_forward(c, &l.self_attn, n, n, n, NULL));
            if (!pre) h = tfm_norm_forward(c, &l.norm1, h);
            y = tfm_add(c, h, tfm_feed_forward_forward(c, &l.feed_forward, pre ? tfm_norm_forward(c, &l.norm2, h) : h));
            if (!pre) y = tfm_norm_forward(c, &l.norm2, y);
            assert_made(c, y);
            assert_same_values(c, tfm_encoder_layer_forward(c, &l, x, NULL), y);
            tfm_params_destroy(p);
        }
    tfm_destroy(c);
}

Test(encoder_layer, parameters_have_pytorchs_names_and_order) {
    static const char *const names[] = {"e.layers.0.self_attn.in_proj_weight",
                                        "e.layers.0.self_attn.in_proj_bias",
                                        "e.layers.0.self_attn.out_proj.weight",
                                        "e.layers.0.self_attn.out_proj.bias",
                                        "e.layers.0.linear1.weight",
                                        "e.layers.0.linear1.bias",
                                        "e.layers.0.linear2.weight",
                                        "e.layers.0.linear2.bias",
                                        "e.layers.0.norm1.weight",
                                        "e.layers.0.norm1.bias",
                                        "e.layers.0.norm2.weight",
                                        "e.layers.0.norm2.bias",
                                        "e.norm.weight",
                                        "e.norm.bias"};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(0, 0, 0, 0);
    tfm_encoder e;
    int64_t i;
    assert_ok(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e));
    cr_assert_eq(tfm_params_count(p), 14);
    for (i = 0; i < 14; i++) cr_assert_str_eq(tfm_params_name(p, i), names[i]);
    tfm_params_destroy(p);
    p = tfm_params_create(c);
    g.no_bias = 1;
    assert_ok(c, tfm_encoder_init(c, p, "", 1, &g, 0, &e));
    for (i = 0; i < tfm_params_count(p); i++)
        cr_assert(!strstr(tfm_params_name(p, i), "bias"), "%s", tfm_params_name(p, i));
    cr_assert_str_eq(tfm_params_name(p, 0), "layers.0.self_attn.in_proj_weight");
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(encoder, same_bits_packed_threaded_alone_and_in_a_batch) {
    static const int threads[] = {2, 3, 7};
    int pre, kind, i;
    for (kind = 0; kind < 2; kind++)
        for (pre = 0; pre < 2; pre++) {
            tfm_ctx *one = context_of(1);
            tfm_params *p = tfm_params_create(one);
            tfm_block_config g = block_config(pre, kind, kind, kind);
            tfm_encoder e;
            tfm_tensor *x = some(one, TFM_SHAPE(3, 70, 24), 1), *y;
            assert_ok(one, tfm_encoder_init(one, p, "e", 2, &g, 1, &e));
            y = tfm_encoder_forward(one, &e, x, NULL);
            assert_made(one, y);
            assert_ok(one, tfm_params_prepare(one, p));
            assert_same_values(one, tfm_encoder_forward(one, &e, x, NULL), y);
            for (i = 0; i < 3; i++) { /* alone */
                tfm_tensor *row = tfm_narrow(one, x, 0, i, 1);
                assert_same_values(one, tfm_encoder_forward(one, &e, row, NULL), tfm_narrow(one, y, 0, i, 1));
            }
            for (i = 0; i < 3; i++) {
                tfm_ctx *c = context_of(threads[i]);
                tfm_tensor *z = tfm_encoder_forward(c, &e, tfm_wrap(c, TFM_F32, tfm_shape_like(x), x->data), NULL);
                assert_made(c, z);
                assert_same_bytes(z->data, y->data, tfm_numel(y) * 4);
                tfm_destroy(c);
            }
            tfm_params_destroy(p);
            tfm_destroy(one);
        }
}

Test(encoder, padding_does_not_reach_real_positions) {
    static const int64_t lengths[2] = {4, 7};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(0, 0, 0, 0);
    tfm_encoder e;
    tfm_stack_options o;
    tfm_tensor *x = some(c, TFM_SHAPE(2, 7, 24), 1), *alone, *y;
    int64_t i;
    assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 1, &e));
    alone = tfm_encoder_forward(c, &e, tfm_narrow(c, tfm_narrow(c, x, 0, 0, 1), 1, 0, 4), NULL);
    for (i = 4 * 24; i < 7 * 24; i++) ((float *)x->data)[i] = (float)NAN;
    memset(&o, 0, sizeof o);
    o.mask.key_lengths = lengths_of(c, 2, lengths);
    y = tfm_encoder_forward(c, &e, x, &o);
    assert_made(c, y);
    assert_same_values(c, tfm_narrow(c, tfm_narrow(c, y, 0, 0, 1), 1, 0, 4), alone);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* n layers need no more than one layer and its input. */
Test(encoder, a_stack_peaks_at_the_scratch_of_one_layer) {
    int64_t peak[2] = {0, 0}, kept[2] = {0, 0};
    const int64_t result = 2 * 64 * 32 * 4;
    int deep, pre;
    for (pre = 0; pre < 2; pre++) {
        for (deep = 0; deep < 2; deep++) {
            tfm_ctx *c = context_of(1);
            tfm_params *p = tfm_params_create(c);
            tfm_block_config g = block_config(pre, 0, 0, 1);
            tfm_encoder e;
            tfm_tensor *x;
            int64_t before;
            g.d_model = 32;
            g.heads = 4;
            g.d_ff = 128;
            assert_ok(c, tfm_encoder_init(c, p, "e", deep ? 12 : 2, &g, 1, &e));
            assert_ok(c, tfm_params_prepare(c, p));
            x = some(c, TFM_SHAPE(2, 64, 32), 1);
            tfm_memory_reset(c);
            before = tfm_memory_usage(c).arena_used;
            assert_made(c, tfm_encoder_forward(c, &e, x, NULL));
            peak[deep] = tfm_memory_usage(c).arena_peak - before;
            kept[deep] = tfm_memory_usage(c).arena_used - before;
            tfm_params_destroy(p);
            tfm_destroy(c);
        }
        cr_assert_eq(peak[0], peak[1], "2 layers need %lld bytes, 12 layers %lld", (long long)peak[0],
                     (long long)peak[1]);
        cr_assert_eq(kept[0], kept[1]);
        cr_assert(kept[0] <= result + 4096, "%lld bytes stay for a result of %lld", (long long)kept[0],
                  (long long)result);
        /* input of the layer and its norm, q, k, v, rotated q and k, attention, result: 10, and the rotary tables */
        cr_assert(peak[1] <= 10 * result + 8192, "%lld bytes for results of %lld", (long long)peak[1],
                  (long long)result);
    }
}

Test(encoder, weights_of_the_last_layer_are_kept) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(0, 0, 0, 0);
    tfm_encoder e;
    tfm_stack_options o;
    tfm_tensor *x = some(c, TFM_SHAPE(2, 5, 24), 1), *weights = NULL, *y, *plain;
    int64_t i, j;
    float *w;
    memset(&o, 0, sizeof o);
    assert_ok(c, tfm_encoder_init(c, p, "e", 3, &g, 1, &e));
    plain = tfm_encoder_forward(c, &e, x, NULL);
    o.weights = &weights;
    y = tfm_encoder_forward(c, &e, x, &o);
    assert_same_values(c, y, plain);
    assert_made(c, weights);
    cr_assert(weights->ndim == 4 && weights->shape[1] == 6 && weights->shape[3] == 5);
    w = test_floats(c, weights);
    for (i = 0; i < 2 * 6 * 5; i++) {
        double sum = 0;
        for (j = 0; j < 5; j++) sum += (double)w[i * 5 + j];
        cr_assert_float_eq(sum, 1, 1e-5);
    }
    free(w);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(encoder, causal_stack_with_a_cache_gives_the_bits_of_the_whole) {
    TEST_EACH_ISA(c, 1) {
        int kind;
        for (kind = 0; kind < 4; kind++) {
            tfm_params *p = tfm_params_create(c);
            tfm_block_config g = block_config(kind & 1, kind >> 1, kind >> 1, kind >> 1);
            tfm_encoder e;
            tfm_stack_options o;
            tfm_cache_options s;
            tfm_tensor *x = some(c, TFM_SHAPE(2, 20, 24), 1), *whole;
            int64_t at, n;
            assert_ok(c, tfm_encoder_init(c, p, "e", 3, &g, 1, &e));
            assert_ok(c, tfm_params_prepare(c, p));
            memset(&o, 0, sizeof o);
            o.mask.causal = TFM_CAUSAL_TOP_LEFT;
            whole = tfm_encoder_forward(c, &e, x, &o);
            assert_made(c, whole);
            memset(&s, 0, sizeof s);
            s.layers = 3;
            s.batch = 2;
            s.heads = e.layers[0].config.kv_heads;
            s.key_size = e.layers[0].config.head_size;
            s.capacity = 20;
            o.cache = tfm_cache_create(c, &s);
            for (at = 0, n = 7; at < 20; at += n, n = at < 14 ? 7 : 1) {
                tfm_tensor *y = tfm_encoder_forward(c, &e, tfm_narrow(c, x, 1, at, n), &o);
                assert_made(c, y);
                assert_same_values(c, y, tfm_narrow(c, whole, 1, at, n));
            }
            tfm_cache_destroy(o.cache);
            tfm_params_destroy(p);
        }
    }
}

/* A stack turns all its layers by one table; where they stand at different positions each has its own. */
Test(encoder, layers_of_a_cache_may_hold_different_numbers_of_positions) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g;
    tfm_encoder e;
    tfm_cache_options size;
    tfm_cache *cache[3]; /* of both layers, of the first, of the second */
    tfm_stack_options o;
    tfm_tensor *k = some(c, TFM_SHAPE(1, 2, 3, 8), 1), *x = some(c, TFM_SHAPE(1, 4, 16), 2), *y, *z;
    int i;
    memset(&g, 0, sizeof g);
    memset(&o, 0, sizeof o);
    memset(&size, 0, sizeof size);
    g.d_model = g.d_ff = 16;
    g.heads = 2;
    g.rotary = 1;
    assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 0, &e));
    size.batch = 1;
    size.heads = 2;
    size.key_size = 8;
    size.capacity = 10;
    for (i = 0; i < 3; i++) {
        size.layers = i ? 1 : 2;
        cache[i] = tfm_cache_create(c, &size);
        assert_made(c, cache[i]);
    }
    assert_ok(c, tfm_cache_append(c, cache[0], 1, k, k, NULL));
    assert_ok(c, tfm_cache_append(c, cache[2], 0, k, k, NULL));
    o.cache = cache[0];
    y = tfm_encoder_forward(c, &e, x, &o);
    assert_made(c, y);
    for (z = x, i = 0; i < 2; i++) {
        o.cache = cache[1 + i];
        z = tfm_encoder_layer_forward(c, &e.layers[i], z, &o);
        assert_made(c, z);
    }
    assert_same_values(c, y, z);
    for (i = 0; i < 3; i++) tfm_cache_destroy(cache[i]);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* Rows of different lengths in one cache: each stands at its own positions. */
Test(encoder, ragged_rows_of_a_cache_have_the_bits_of_running_alone) {
    static const int64_t first[2] = {3, 6}, second[2] = {4, 1};
    TEST_EACH_ISA(c, 1) {
        tfm_params *p = tfm_params_create(c);
        tfm_block_config g = block_config(1, 1, 1, 1);
        tfm_encoder e;
        tfm_stack_options o;
        tfm_cache_options s;
        tfm_tensor *x = some(c, TFM_SHAPE(2, 10, 24), 1), *a, *b;
        int64_t row;
        assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 1, &e));
        memset(&o, 0, sizeof o);
        o.mask.causal = TFM_CAUSAL_TOP_LEFT;
        memset(&s, 0, sizeof s);
        s.layers = 2;
        s.batch = 2;
        s.heads = 2;
        s.key_size = 4;
        s.capacity = 10;
        o.cache = tfm_cache_create(c, &s);
        o.counts = lengths_of(c, 2, first);
        a = tfm_encoder_forward(c, &e, tfm_narrow(c, x, 1, 0, 6), &o);
        assert_made(c, a);
        o.counts = lengths_of(c, 2, second);
        b = tfm_encoder_forward(c, &e, tfm_narrow(c, x, 1, 6, 4), &o);
        assert_made(c, b);
        o.memory_cache = o.cache;
        cr_assert_null(tfm_encoder_forward(c, &e, x, &o));
        assert_error_says(c, "tfm_encoder_forward: memory_cache is given");
        tfm_clear(c);
        cr_assert_null(tfm_encoder_layer_forward(c, &e.layers[0], x, &o));
        assert_error_says(c, "tfm_encoder_layer_forward: memory_cache is given");
        tfm_clear(c);
        o.memory_cache = NULL;
        tfm_cache_destroy(o.cache);
        o.cache = NULL;
        cr_assert_null(tfm_encoder_forward(c, &e, x, &o));
        assert_error_says(c, "tfm_encoder_forward: counts is given without a cache");
        tfm_clear(c);
        o.counts = NULL;
        for (row = 0; row < 2; row++) {
            tfm_tensor *mine = tfm_narrow(c, x, 0, row, 1), *alone, *both[2];
            both[0] = tfm_narrow(c, mine, 1, 0, first[row]);
            both[1] = tfm_narrow(c, mine, 1, 6, second[row]);
            alone = tfm_encoder_forward(c, &e, tfm_cat(c, (const tfm_tensor *const *)both, 2, 1), &o);
            assert_made(c, alone);
            assert_same_values(c, tfm_narrow(c, tfm_narrow(c, a, 0, row, 1), 1, 0, first[row]),
                               tfm_narrow(c, alone, 1, 0, first[row]));
            assert_same_values(c, tfm_narrow(c, tfm_narrow(c, b, 0, row, 1), 1, 0, second[row]),
                               tfm_narrow(c, alone, 1, first[row], second[row]));
        }
        tfm_params_destroy(p);
    }
}

Test(decoder, memory_cache_and_self_cache_give_the_bits_of_the_whole) {
    TEST_EACH_ISA(c, 1) {
        int pre;
        for (pre = 0; pre < 2; pre++) {
            static const int64_t lengths[2] = {9, 5};
            tfm_params *p = tfm_params_create(c);
            tfm_block_config g = block_config(pre, 0, 0, 0);
            tfm_decoder d;
            tfm_stack_options o;
            tfm_cache_options s;
            tfm_cache *memory_cache;
            tfm_tensor *x = some(c, TFM_SHAPE(2, 8, 24), 1), *memory = some(c, TFM_SHAPE(2, 9, 24), 2), *whole,
                       *counts = lengths_of(c, 2, lengths);
            int64_t at, n;
            assert_ok(c, tfm_decoder_init(c, p, "d", 3, &g, 1, &d));
            memset(&o, 0, sizeof o);
            o.mask.causal = TFM_CAUSAL_TOP_LEFT;
            o.memory_mask.key_lengths = counts;
            whole = tfm_decoder_forward(c, &d, x, memory, &o);
            assert_made(c, whole);
            memset(&s, 0, sizeof s);
            s.layers = 3;
            s.batch = 2;
            s.heads = 6;
            s.key_size = 4;
            s.capacity = 9;
            o.cache = tfm_cache_create(c, &s);
            memory_cache = tfm_cache_create(c, &s);
            assert_ok(c, tfm_decoder_memory(c, &d, memory, memory_cache, counts));
            memset(&o.memory_mask, 0, sizeof o.memory_mask);
            o.memory_cache = memory_cache;
            for (at = 0, n = 5; at < 8; at += n, n = 1) {
                tfm_tensor *y = tfm_decoder_forward(c, &d, tfm_narrow(c, x, 1, at, n), NULL, &o);
                assert_made(c, y);
                assert_same_values(c, y, tfm_narrow(c, whole, 1, at, n));
            }
            assert_refused(c, tfm_decoder_forward(c, &d, x, memory, &o), TFM_INVALID);
            o.memory_cache = NULL;
            assert_refused(c, tfm_decoder_forward(c, &d, x, NULL, &o), TFM_INVALID);
            tfm_cache_destroy(memory_cache);
            tfm_cache_destroy(o.cache);
            tfm_params_destroy(p);
        }
    }
}

/* A cache of too few layers is found before the first layer is appended to, whichever cache and stack it is. */
Test(decoder, caches_that_do_not_fit_stay_as_they_are) {
    int rotary, short_memory;
    for (rotary = 0; rotary < 2; rotary++)
        for (short_memory = 0; short_memory < 2; short_memory++) {
            tfm_ctx *c = context_of(1);
            tfm_params *p = tfm_params_create(c);
            tfm_block_config g = block_config(0, 0, 0, rotary);
            tfm_encoder e;
            tfm_decoder d;
            tfm_stack_options o;
            tfm_cache_options s;
            tfm_cache *memory;
            tfm_tensor *x = some(c, TFM_SHAPE(1, 3, 24), 1);
            assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 1, &e));
            assert_ok(c, tfm_decoder_init(c, p, "d", 2, &g, 1, &d));
            memset(&o, 0, sizeof o);
            memset(&s, 0, sizeof s);
            s.heads = 6;
            s.key_size = 4;
            s.capacity = 8;
            s.layers = short_memory ? 2 : 1;
            o.cache = tfm_cache_create(c, &s);
            s.layers = short_memory ? 1 : 2;
            memory = tfm_cache_create(c, &s);
            if (short_memory) {
                assert_init_refused(c, tfm_decoder_memory(c, &d, x, memory, NULL), "tfm_decoder_memory: layer 1");
            } else {
                cr_assert_null(tfm_encoder_forward(c, &e, x, &o));
                assert_error_says(c, "tfm_encoder_forward: layer 1");
                tfm_clear(c);
            }
            o.memory_cache = memory;
            cr_assert_null(tfm_decoder_forward(c, &d, x, NULL, &o));
            assert_error_says(c, "tfm_decoder_forward: layer 1");
            cr_assert_eq(tfm_cache_length(o.cache, 0, 0), 0);
            cr_assert_eq(tfm_cache_length(memory, 0, 0), 0);
            tfm_cache_destroy(memory);
            tfm_cache_destroy(o.cache);
            tfm_params_destroy(p);
            tfm_destroy(c);
        }
}

Test(encoder, a_decode_step_takes_no_memory_after_the_first) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(1, 1, 1, 1);
    tfm_encoder e;
    tfm_stack_options o;
    tfm_cache_options s;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 1, 24), 1);
    int64_t allocations = 0, i;
    tfm_marker m;
    assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 1, &e));
    assert_ok(c, tfm_params_prepare(c, p));
    memset(&o, 0, sizeof o);
    o.mask.causal = TFM_CAUSAL_TOP_LEFT;
    memset(&s, 0, sizeof s);
    s.layers = 2;
    s.heads = 2;
    s.key_size = 4;
    s.capacity = 300;
    o.cache = tfm_cache_create(c, &s);
    m = tfm_mark(c);
    for (i = 0; i < 300; i++) {
        assert_made(c, tfm_encoder_forward(c, &e, x, &o));
        tfm_rewind(c, m);
        if (i == 0) allocations = tfm_memory_usage(c).allocations;
    }
    cr_assert_eq(tfm_memory_usage(c).allocations, allocations);
    tfm_cache_destroy(o.cache);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(encoder, dropout_only_while_training_and_repeatable) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(0, 0, 0, 0);
    tfm_encoder e;
    tfm_stack_options o;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 6, 24), 1), *eval, *a, *b;
    memset(&o, 0, sizeof o);
    g.dropout = 0.3f;
    assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 1, &e));
    eval = tfm_encoder_forward(c, &e, x, &o);
    assert_same_values(c, tfm_encoder_forward(c, &e, x, &o), eval);
    o.training = 1;
    tfm_seed(c, 3);
    a = tfm_encoder_forward(c, &e, x, &o);
    b = tfm_encoder_forward(c, &e, x, &o);
    assert_made(c, b);
    cr_assert(memcmp(a->data, eval->data, 6 * 24 * 4) && memcmp(a->data, b->data, 6 * 24 * 4));
    tfm_seed(c, 3);
    assert_same_values(c, tfm_encoder_forward(c, &e, x, &o), a);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(encoder, recorded_layers_keep_their_scratch) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(1, 0, 0, 0);
    tfm_encoder e;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 6, 24), 1), *plain, *y;
    assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 1, &e));
    plain = tfm_encoder_forward(c, &e, x, NULL);
    assert_ok(c, tfm_set_requires_grad(c, e.layers[0].self_attn.in_proj_weight, 1));
    y = tfm_encoder_forward(c, &e, x, NULL);
    assert_same_values(c, y, plain);
    cr_assert(y->requires_grad && tfm_tape_length(c) > 10);
    tfm_tape_clear(c);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(encoder, no_batch_and_no_length_are_fine) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(0, 0, 0, 1);
    tfm_encoder e;
    tfm_tensor *y;
    assert_ok(c, tfm_encoder_init(c, p, "e", 2, &g, 1, &e));
    y = tfm_encoder_forward(c, &e, tfm_zeros(c, TFM_SHAPE(0, 5, 24)), NULL);
    assert_made(c, y);
    cr_assert(y->shape[0] == 0 && y->shape[1] == 5);
    y = tfm_encoder_forward(c, &e, tfm_zeros(c, TFM_SHAPE(3, 0, 24)), NULL);
    assert_made(c, y);
    cr_assert(y->shape[0] == 3 && y->shape[1] == 0);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(encoder, wrong_calls_are_refused_with_reasons) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_config(0, 0, 0, 0);
    tfm_encoder e, unmade;
    memset(&unmade, 0, sizeof unmade);
    assert_init_refused(c, tfm_encoder_init(c, p, "e", 0, &g, 1, &e), "layers is 0");
    g.activation = 99;
    assert_init_refused(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e), "no activation");
    g.activation = 0;
    g.norm = 5;
    assert_init_refused(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e), "norm 5");
    g.norm = 0;
    g.norm_eps = (float)INFINITY;
    assert_init_refused(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e), "eps inf");
    g.norm_eps = 0;
    g.norm_weight_offset = (float)NAN;
    assert_init_refused(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e), "weight_offset nan");
    g.norm_weight_offset = -(float)INFINITY;
    assert_init_refused(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e), "weight_offset -inf");
    g.norm_weight_offset = 0;
    g.d_ff = -4;
    assert_init_refused(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e), "d_ff is -4");
    g.d_ff = 0;
    assert_init_refused(c, tfm_encoder_init(c, p, "e", INT64_MAX, &g, 1, &e), "layers is 9223372036854775807");
    cr_assert_eq(tfm_params_count(p), 0);
    assert_ok(c, tfm_encoder_init(c, p, "e", 1, &g, 1, &e));
    cr_assert_eq(e.layers[0].config.d_ff, 2048); /* nn.TransformerEncoderLayer's default */
    assert_refused(c, tfm_encoder_forward(c, &unmade, tfm_ones(c, TFM_SHAPE(1, 2, 24)), NULL), TFM_INVALID);
    assert_refused(c, tfm_encoder_forward(c, NULL, tfm_ones(c, TFM_SHAPE(1, 2, 24)), NULL), TFM_INVALID);
    assert_refused(c, tfm_encoder_forward(c, &e, tfm_ones(c, TFM_SHAPE(1, 2, 23)), NULL), TFM_INVALID);
    assert_refused(c, tfm_encoder_forward(c, &e, tfm_ones(c, TFM_SHAPE(2, 24)), NULL), TFM_INVALID);
    {
        const tfm_marker m = tfm_mark(c);
        tfm_tensor *x = tfm_ones(c, TFM_SHAPE(1, 2, 24));
        tfm_rewind(c, m);
        assert_refused(c, tfm_encoder_forward(c, &e, x, NULL), TFM_INVALID);
    }
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* The whole Transformer: kinds, positions, heads, memory, pooling. */
#include "layer_helpers.h"

static tfm_transformer_config small(int kind, int position) {
    tfm_transformer_config g;
    memset(&g, 0, sizeof g);
    g.kind = kind;
    g.position = position;
    g.encoder_layers = 2;
    g.decoder_layers = 2;
    g.block.d_model = 24;
    g.block.heads = 4;
    g.block.d_ff = 40;
    g.source_vocab = kind == TFM_DECODER_ONLY ? 0 : 30;
    g.target_vocab = kind == TFM_ENCODER_ONLY ? 0 : 35;
    g.max_length = 20;
    return g;
}

#if !defined(TFM_NO_FILES) && !defined(TFM_NO_STDIO)
static tfm_mask padded(tfm_ctx *c, const tfm_file *f, const char *name) {
    tfm_tensor *t = tfm_file_tensor(c, f, name);
    tfm_mask m;
    memset(&m, 0, sizeof m);
    assert_made(c, t);
    m.ignore = tfm_reshape(c, t, TFM_SHAPE(t->shape[0], 1, 1, t->shape[1]));
    return m;
}

static void check_seq2seq(const char *name) {
    int packed;
    TEST_EACH_ISA(c, 1)
        for (packed = 0; packed < 2; packed++) {
            tfm_file *f = golden(c, name);
            tfm_params *p = file_params(c, f);
            const double rtol = meta_number(f, "rtol", 0), atol = meta_number(f, "atol", 0);
            tfm_transformer_config g;
            tfm_transformer t;
            tfm_transformer_options o;
            tfm_tensor *valid = tfm_file_tensor(c, f, "out.valid"), *source = tfm_file_tensor(c, f, "in.source"),
                       *memory;
            tfm_tensor *target = tfm_file_tensor(c, f, "in.target"), *y;
            char text[320];
            memset(&g, 0, sizeof g);
            g.block.d_model = meta_int(f, "d_model", 0);
            g.block.heads = meta_int(f, "heads", 0);
            g.block.d_ff = meta_int(f, "d_ff", 0);
            g.block.norm_first = (int)meta_int(f, "norm_first", 0);
            g.block.activation = strcmp(meta(f, "activation", ""), "gelu") ? TFM_ACT_RELU : TFM_ACT_GELU;
            g.encoder_layers = g.decoder_layers = meta_int(f, "layers", 0);
            g.position = strcmp(meta(f, "position", ""), "sinusoidal") ? TFM_POSITION_NONE : TFM_POSITION_SINUSOIDAL;
            g.source_vocab = g.target_vocab = meta_int(f, "vocabulary", 0);
            g.scale_embedding = (int)meta_int(f, "scale_embedding", 0);
            g.head_bias = tfm_params_find(p, "generator.bias") != NULL;
            assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
            if (packed) assert_ok(c, tfm_params_prepare(c, p));
            memset(&o, 0, sizeof o);
            o.source_mask = padded(c, f, "in.src_key_padding_mask");
            o.target_mask = padded(c, f, "in.tgt_key_padding_mask");
            o.memory_mask = o.source_mask;
            if (tfm_file_has(f, "out.memory")) {
                memory = tfm_transformer_encode(c, &t, source, &o);
                cr_assert(rows_close(c, memory, tfm_file_tensor(c, f, "out.memory"),
                                     tfm_file_tensor(c, f, "out.memory_valid"), rtol, atol, text, sizeof text),
                          "memory: %s", text);
            }
            y = tfm_transformer_forward(c, &t, source, target, &o);
            cr_assert(rows_close(c, y, tfm_file_tensor(c, f, g.source_vocab ? "out.logits" : "out.y"), valid, rtol,
                                 atol, text, sizeof text),
                      "%s", text);
            if (g.source_vocab) {
                o.output = TFM_OUTPUT_LOG_SOFTMAX;
                y = tfm_transformer_forward(c, &t, source, target, &o);
                cr_assert(rows_close(c, y, tfm_file_tensor(c, f, "out.log_probabilities"), valid, rtol, atol, text,
                                     sizeof text),
                          "%s", text);
            }
            /* lengths say the same as masks, and the decoder leaves the source's padding alone without being told */
            memset(&o, 0, sizeof o);
            o.source_mask.key_lengths = tfm_file_tensor(c, f, "in.source_lengths");
            o.target_mask.key_lengths = tfm_file_tensor(c, f, "in.target_lengths");
            y = tfm_transformer_forward(c, &t, source, target, &o);
            cr_assert(rows_close(c, y, tfm_file_tensor(c, f, g.source_vocab ? "out.logits" : "out.y"), valid, rtol,
                                 atol, text, sizeof text),
                      "%s", text);
            tfm_params_destroy(p);
            tfm_file_close(f);
        }
}

Test(transformer, golden_seq2seq_post_norm) { check_seq2seq("seq2seq_post_norm.safetensors"); }
Test(transformer, golden_seq2seq_pre_norm_gelu) { check_seq2seq("seq2seq_pre_norm_gelu.safetensors"); }
Test(transformer, golden_seq2seq_embedded) { check_seq2seq("seq2seq_embedded.safetensors"); }

Test(transformer, golden_llama_style_decoder) {
    int packed;
    TEST_EACH_ISA(c, 1)
        for (packed = 0; packed < 2; packed++) {
            tfm_file *f = golden(c, "decoder_llama.safetensors");
            tfm_params *p = file_params(c, f);
            const double rtol = meta_number(f, "rtol", 0), atol = meta_number(f, "atol", 0);
            tfm_transformer_config g;
            tfm_transformer t;
            tfm_transformer_options o;
            memset(&g, 0, sizeof g);
            memset(&o, 0, sizeof o);
            g.kind = TFM_DECODER_ONLY;
            g.position = TFM_POSITION_ROTARY;
            g.decoder_layers = meta_int(f, "layers", 0);
            g.target_vocab = meta_int(f, "vocabulary", 0);
            g.block.norm_first = 1;
            g.block.norm = TFM_RMS_NORM;
            g.block.norm_eps = (float)meta_number(f, "norm_eps", 0);
            g.block.activation = TFM_ACT_SILU;
            g.block.gated = 1;
            g.block.no_bias = 1;
            g.block.d_model = meta_int(f, "d_model", 0);
            g.block.d_ff = meta_int(f, "d_ff", 0);
            g.block.heads = meta_int(f, "heads", 0);
            g.block.kv_heads = meta_int(f, "kv_heads", 0);
            g.block.head_size = meta_int(f, "head_size", 0);
            g.block.rope.base = (float)meta_number(f, "base", 0);
            g.block.rope.interleaved = (int)meta_int(f, "interleaved", 0);
            assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
            if (packed) assert_ok(c, tfm_params_prepare(c, p));
            assert_tensor_close(c, tfm_transformer_forward(c, &t, NULL, tfm_file_tensor(c, f, "in.ids"), NULL),
                                tfm_file_tensor(c, f, "out.logits"), rtol, atol);
            o.output = TFM_OUTPUT_HIDDEN;
            assert_tensor_close(c, tfm_transformer_forward(c, &t, NULL, tfm_file_tensor(c, f, "in.ids"), &o),
                                tfm_file_tensor(c, f, "out.hidden"), rtol, atol);
            tfm_params_destroy(p);
            tfm_file_close(f);
        }
}
#endif

/* Every kind with every position runs, and gives the same bits packed, with more threads, and alone. */
Test(transformer, every_kind_and_position_same_bits_packed_threaded_alone) {
    int kind, position, row, threads;
    for (kind = 0; kind < 3; kind++)
        for (position = 0; position <= TFM_POSITION_RELATIVE; position++) {
            tfm_ctx *c = context_of(1);
            tfm_params *p = tfm_params_create(c);
            tfm_transformer_config g = small(kind, position);
            tfm_transformer t;
            tfm_tensor *source, *target, *y;
            g.outputs = kind == TFM_ENCODER_ONLY ? 9 : 0;
            assert_ok(c, tfm_transformer_init(c, p, "m", &g, &t));
            source = kind == TFM_DECODER_ONLY ? NULL : some_ids(c, 3, 11, 30, 1);
            target = kind == TFM_ENCODER_ONLY ? NULL : some_ids(c, 3, 8, 35, 2);
            y = tfm_transformer_forward(c, &t, source, target, NULL);
            cr_assert(y != NULL, "kind %d position %d: %s", kind, position, tfm_error(c));
            cr_assert_eq(y->shape[2], kind == TFM_ENCODER_ONLY ? 9 : 35);
            assert_ok(c, tfm_params_prepare(c, p));
            assert_same_values(c, tfm_transformer_forward(c, &t, source, target, NULL), y);
            for (row = 0; row < 3; row++)
                assert_same_values(c, tfm_transformer_forward(c, &t, source ? tfm_narrow(c, source, 0, row, 1) : NULL,
                                                              target ? tfm_narrow(c, target, 0, row, 1) : NULL, NULL),
                                   tfm_narrow(c, y, 0, row, 1));
            for (threads = 2; threads < 8; threads += threads == 2 ? 1 : 4) { /* 2, 3, 7 */
                tfm_ctx *other = context_of(threads);
                tfm_tensor *s = source ? tfm_from(other, TFM_I64, tfm_shape_like(source), source->data) : NULL;
                tfm_tensor *u = target ? tfm_from(other, TFM_I64, tfm_shape_like(target), target->data) : NULL;
                tfm_tensor *z = tfm_transformer_forward(other, &t, s, u, NULL);
                assert_made(other, z);
                assert_same_bytes(z->data, y->data, tfm_numel(y) * 4);
                tfm_destroy(other);
            }
            tfm_params_destroy(p);
            tfm_destroy(c);
        }
}

/* A model's own ALiBi slopes and T5 tables say what a caller of a model without positions can say with a mask. */
Test(transformer, slopes_and_relative_tables_are_those_of_a_mask) {
    static const char *const names[2] = {"m.encoder.relative_bias", "m.decoder.relative_bias"};
    tfm_ctx *c = context_of(1);
    int kind, position, side;
    for (kind = 0; kind < 3; kind++)
        for (position = TFM_POSITION_ALIBI; position <= TFM_POSITION_RELATIVE; position++) {
            tfm_params *p = tfm_params_create(c);
            tfm_transformer_config g = small(kind, position);
            tfm_transformer t, none;
            tfm_transformer_options o;
            tfm_mask *masks[2];
            tfm_tensor *source = kind == TFM_DECODER_ONLY ? NULL : some_ids(c, 2, 19, 30, 1);
            tfm_tensor *target = kind == TFM_ENCODER_ONLY ? NULL : some_ids(c, 2, 15, 35, 2), *y;
            memset(&o, 0, sizeof o);
            masks[0] = &o.source_mask;
            masks[1] = &o.target_mask;
            g.relative_buckets = 8;
            g.relative_max_distance = 11; /* neither is the default */
            assert_ok(c, tfm_transformer_init(c, p, "m", &g, &t));
            g.position = TFM_POSITION_NONE;
            assert_ok(c, tfm_transformer_init(c, p, "m", &g, &none));
            for (side = 0; side < 2; side++) {
                if (position == TFM_POSITION_ALIBI) masks[side]->alibi_slopes = tfm_alibi_slopes(c, 4);
                if (!tfm_params_find(p, names[side])) continue;
                set_param(c, p, names[side], some(c, TFM_SHAPE(8, 4), 3 + (uint64_t)side));
                masks[side]->relative_bias = tfm_params_find(p, names[side]);
                masks[side]->relative_max_distance = 11;
                masks[side]->relative_one_way = side;
            }
            y = tfm_transformer_forward(c, &t, source, target, NULL);
            assert_same_values(c, y, tfm_transformer_forward(c, &none, source, target, &o));
            cr_assert(test_first_difference(y->data, tfm_transformer_forward(c, &none, source, target, NULL)->data,
                                            tfm_numel(y) * 4) >= 0, "kind %d position %d: unused", kind, position);
            tfm_params_destroy(p);
        }
    tfm_destroy(c);
}

/* A decoder's past does not depend on its future: the first logits of a longer sequence are those of a shorter one. */
Test(transformer, decoders_are_causal) {
    tfm_ctx *c = context_of(1);
    int kind, position;
    for (kind = 0; kind < 3; kind += 2)
        for (position = 0; position <= TFM_POSITION_RELATIVE; position++) {
            tfm_params *p = tfm_params_create(c);
            tfm_transformer_config g = small(kind, position);
            tfm_transformer t;
            tfm_transformer_options o;
            tfm_tensor *source = kind ? NULL : some_ids(c, 2, 5, 30, 1), *target = some_ids(c, 2, 9, 35, 2), *whole;
            memset(&o, 0, sizeof o);
            assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
            whole = tfm_transformer_forward(c, &t, source, target, NULL);
            assert_made(c, whole);
            assert_same_values(c, tfm_transformer_forward(c, &t, source, tfm_narrow(c, target, 1, 0, 4), NULL),
                               tfm_narrow(c, whole, 1, 0, 4));
            o.not_causal = 1;
            cr_assert(memcmp(tfm_transformer_forward(c, &t, source, target, &o)->data, whole->data, 35 * 4) != 0);
            tfm_params_destroy(p);
        }
    tfm_destroy(c);
}

Test(transformer, encode_and_decode_are_the_halves_of_forward) {
    static const int64_t lengths[2] = {5, 3};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_ENCODER_DECODER, TFM_POSITION_SINUSOIDAL);
    tfm_transformer t;
    tfm_transformer_options o;
    tfm_tensor *source = some_ids(c, 2, 5, 30, 1), *target = some_ids(c, 2, 4, 35, 2), *weights = NULL;
    memset(&o, 0, sizeof o);
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    o.source_mask.key_lengths = lengths_of(c, 2, lengths);
    o.output = TFM_OUTPUT_SOFTMAX;
    assert_same_values(c, tfm_transformer_decode(c, &t, target, tfm_transformer_encode(c, &t, source, &o), &o),
                       tfm_transformer_forward(c, &t, source, target, &o));
    o.weights = &weights;
    assert_made(c, tfm_transformer_forward(c, &t, source, target, &o));
    assert_made(c, weights);
    cr_assert(weights->shape[0] == 2 && weights->shape[1] == 4 && weights->shape[2] == 4 && weights->shape[3] == 5);
    {
        static const int64_t padded_key[4] = {1, 0, 0, 3};
        cr_assert_eq(tfm_get(weights, padded_key), 0);
    }
    assert_refused(c, tfm_transformer_decode(c, &t, target, NULL, NULL), TFM_INVALID);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(transformer, parameters_have_the_documented_names) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_ENCODER_DECODER, TFM_POSITION_LEARNED);
    tfm_transformer t;
    g.head_bias = 1;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert_str_eq(tfm_params_name(p, 0), "src_embedding.weight");
    cr_assert(tfm_params_find(p, "tgt_embedding.weight") && tfm_params_find(p, "src_position.weight")
              && tfm_params_find(p, "tgt_position.weight"));
    cr_assert(tfm_params_find(p, "encoder.norm.weight")
              && tfm_params_find(p, "decoder.layers.1.multihead_attn.out_proj.bias"));
    cr_assert(tfm_params_find(p, "generator.weight") && tfm_params_find(p, "generator.bias"));
    tfm_params_destroy(p);
    p = tfm_params_create(c);
    g = small(TFM_DECODER_ONLY, TFM_POSITION_RELATIVE);
    g.no_final_norm = 1;
    assert_ok(c, tfm_transformer_init(c, p, "gpt", &g, &t));
    cr_assert(tfm_params_find(p, "gpt.decoder.layers.0.self_attn.in_proj_weight")
              && tfm_params_find(p, "gpt.decoder.relative_bias"));
    cr_assert(!tfm_params_find(p, "gpt.decoder.norm.weight")
              && !tfm_params_find(p, "gpt.encoder.layers.0.linear1.weight"));
    tfm_params_destroy(p);
    p = tfm_params_create(c);
    g = small(TFM_ENCODER_DECODER, TFM_POSITION_ALIBI);
    g.target_vocab = 0;
    g.shared_embedding = g.tied_head = 1;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert(tfm_params_find(p, "alibi_slopes") && !tfm_params_find(p, "tgt_embedding.weight")
              && !tfm_params_find(p, "generator.weight"));
    cr_assert(t.generator.weight == t.source_embedding.weight && t.config.outputs == 30);
    tfm_params_destroy(p);
    p = tfm_params_create(c);
    g = small(TFM_ENCODER_ONLY, TFM_POSITION_NONE);
    g.source_vocab = 0;
    g.source_features = 13;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert(tfm_params_find(p, "src_projection.weight") && !tfm_params_find(p, "generator.weight"));
    cr_assert_eq(tfm_transformer_forward(c, &t, some(c, TFM_SHAPE(2, 3, 13), 1), NULL, NULL)->shape[2], 24);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* xavier_uniform on every matrix of the stacks, as nn.Transformer does. */
Test(transformer, matrices_of_the_stacks_are_xavier) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_ENCODER_DECODER, TFM_POSITION_NONE);
    tfm_transformer t;
    int64_t i, j;
    g.block.d_model = 96;
    g.block.d_ff = 200;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    for (i = 0; i < tfm_params_count(p); i++) {
        const tfm_tensor *w = tfm_params_at(p, i);
        const char *name = tfm_params_name(p, i);
        double most = 0, bound;
        if (w->ndim < 2 || (strncmp(name, "encoder.", 8) && strncmp(name, "decoder.", 8))) continue;
        bound = sqrt(6.0 / (double)(w->shape[0] + w->shape[1]));
        for (j = 0; j < tfm_numel(w); j++) most = fmax(most, fabs((double)((const float *)w->data)[j]));
        cr_assert(most <= bound && most > 0.99 * bound, "%s: %g, bound %g", name, most, bound);
    }
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(transformer, configurations_that_cannot_be_are_refused) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer t;
    tfm_transformer_config g = small(TFM_ENCODER_DECODER, TFM_POSITION_NONE);
    int kind, buckets;
    g.kind = 3;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "unknown kind");
    g = small(TFM_ENCODER_DECODER, 7);
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "unknown position");
    g = small(TFM_ENCODER_DECODER, 0);
    g.encoder_layers = -1;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "encoder_layers is -1");
    g = small(TFM_ENCODER_DECODER, 0);
    g.shared_embedding = 1;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "of one size");
    g = small(TFM_ENCODER_DECODER, 0);
    g.source_features = 5;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "exclude each other");
    g = small(TFM_ENCODER_ONLY, 0);
    g.source_vocab = 0;
    g.tied_head = 1;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "tied_head needs");
    g = small(TFM_DECODER_ONLY, 0);
    g.tied_head = 1;
    g.outputs = 12;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "outputs differs");
    g = small(TFM_ENCODER_ONLY, TFM_POSITION_RELATIVE);
    g.relative_max_distance = 65537; /* what a mask refuses, too */
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "relative_max_distance exceeds 65536");
    g = small(TFM_ENCODER_ONLY, 0);
    g.shared_embedding = 1;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "shared_embedding is for encoder-decoders");
    g = small(TFM_ENCODER_ONLY, 0);
    g.target_features = 5;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "has no target_features");
    g = small(TFM_DECODER_ONLY, 0);
    g.target_features = 5;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "target_vocab and target_features exclude");
    g = small(TFM_DECODER_ONLY, 0);
    g.tied_head = g.no_head = 1;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "tied_head needs");
    g = small(TFM_DECODER_ONLY, TFM_POSITION_LEARNED);
    g.position_start = 20;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "position_start leaves none");
    for (buckets = 2; buckets <= 7; buckets += 5) {
        g = small(TFM_DECODER_ONLY, TFM_POSITION_RELATIVE);
        g.relative_buckets = buckets;
        assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "must be even and at least 4");
    }
    for (kind = TFM_ENCODER_DECODER; kind <= TFM_DECODER_ONLY; kind++) {
        g = small(kind, TFM_POSITION_RELATIVE);
        g.relative_buckets = 16;
        g.relative_max_distance = kind == TFM_ENCODER_ONLY ? 4 : 8;
        assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "relative_max_distance must be more");
    }
    g = small(TFM_DECODER_ONLY, TFM_POSITION_ROTARY);
    g.block.d_model = 20;
    g.block.heads = 4; /* heads of 5 */
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "odd number of dims");
    cr_assert_eq(tfm_params_count(p), 0);
    g = small(TFM_ENCODER_ONLY, TFM_POSITION_RELATIVE); /* and what is one more is fine */
    g.relative_buckets = 16;
    g.relative_max_distance = 5;
    assert_ok(c, tfm_transformer_init(c, p, "encoder", &g, &t));
    g = small(TFM_DECODER_ONLY, TFM_POSITION_LEARNED);
    g.position_start = 19;
    assert_ok(c, tfm_transformer_init(c, p, "decoder", &g, &t));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* The standard deviation of a parameter, whose mean is near 0. */
static double deviation_of(tfm_ctx *c, const tfm_tensor *t) {
    float *x = test_floats(c, t);
    const int64_t n = tfm_numel(t);
    double sum = 0;
    int64_t i;
    for (i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    free(x);
    return sqrt(sum / (double)n);
}

/* N(0, 1), but N(0, 1/d) where sqrt(d) or the head multiply the table; a head's table is packed, another is not. */
Test(transformer, embeddings_are_made_for_what_they_are_used_for) {
    static const struct {
        int kind, tied, shared, scaled;
        int narrow[2], packed[2];      /* source, target */
    } table[] = {
        {TFM_ENCODER_DECODER, 0, 0, 0, {0, 0}, {0, 0}}, {TFM_ENCODER_DECODER, 0, 0, 1, {1, 1}, {0, 0}},
        {TFM_ENCODER_DECODER, 1, 0, 0, {0, 1}, {0, 1}}, {TFM_ENCODER_DECODER, 1, 1, 0, {1, 1}, {1, 1}},
        {TFM_ENCODER_DECODER, 0, 1, 0, {0, 0}, {0, 0}}, {TFM_ENCODER_ONLY, 1, 0, 0, {1, 1}, {1, 1}},
        {TFM_DECODER_ONLY, 1, 0, 0, {1, 1}, {1, 1}},
    };
    tfm_ctx *c = context_of(1);
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        tfm_params *p = tfm_params_create(c);
        tfm_transformer_config g = small(table[i].kind, TFM_POSITION_NONE);
        tfm_transformer t;
        int side;
        g.block.d_model = 64;
        g.source_vocab = table[i].kind == TFM_DECODER_ONLY ? 0 : 160;
        g.target_vocab = table[i].kind == TFM_ENCODER_ONLY || table[i].shared ? 0 : 176;
        g.tied_head = table[i].tied;
        g.shared_embedding = table[i].shared;
        g.scale_embedding = table[i].scaled;
        assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
        if (g.tied_head)
            cr_assert(t.generator.weight == (table[i].kind == TFM_ENCODER_ONLY ? t.source_embedding.weight
                                                                               : t.target_embedding.weight));
        assert_ok(c, tfm_params_prepare(c, p));
        for (side = 0; side < 2; side++) {
            const tfm_tensor *w = side ? t.target_embedding.weight : t.source_embedding.weight;
            if (!w) continue;
            cr_assert_float_eq(deviation_of(c, w), table[i].narrow[side] ? 0.125 : 1.0,
                               table[i].narrow[side] ? 0.01 : 0.05, "%d, side %d: %g", (int)i, side, deviation_of(c, w));
            cr_assert_eq(w->layout, table[i].packed[side] ? TFM_PANELS : TFM_STRIDED, "%d, side %d", (int)i, side);
        }
        tfm_params_destroy(p);
    }
    tfm_destroy(c);
}

/* What a block is configured to begin with, or to lack; slopes that were loaded stay. */
Test(transformer, parameters_begin_as_they_are_configured) {
    static const float slopes[4] = {1, 2, 3, 4};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_DECODER_ONLY, TFM_POSITION_ALIBI);
    tfm_transformer t;
    const float *w;
    int64_t i;
    set_param(c, p, tfm_params_add(c, p, "alibi_slopes", TFM_F32, TFM_SHAPE(4)) ? "alibi_slopes" : "",
              tfm_from(c, TFM_F32, TFM_SHAPE(4), slopes));
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert_eq(((const float *)t.alibi->data)[3], 4.0f);
    cr_assert(t.config.encoder_layers == 0 && t.config.decoder_layers == 2);
    w = (const float *)t.encoder.layers[0].norm1.weight->data;
    for (i = 0; i < 24; i++) cr_assert_eq(w[i], 1.0f);
    w = (const float *)t.encoder.layers[0].feed_forward.linear1.bias->data;
    for (i = 0; i < 40; i++) cr_assert(fabs((double)w[i]) <= 1 / sqrt(24.0));
    g.block.norm = TFM_RMS_NORM;
    g.block.norm_weight_offset = 1;
    assert_ok(c, tfm_transformer_init(c, p, "gemma", &g, &t));
    w = (const float *)t.encoder.layers[0].norm1.weight->data;
    for (i = 0; i < 24; i++) cr_assert_eq(w[i], 0.0f);
    cr_assert_null(t.encoder.layers[0].norm1.bias);
    cr_assert_not_null(t.encoder.layers[0].self_attn.in_proj_bias);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(transformer, defaults_are_nn_transformers) {
    tfm_ctx *c = context_of(1);
    tfm_params *p;
    tfm_transformer t;
    tfm_transformer_config g;
    memset(&g, 0, sizeof g);
    tfm_measure_begin(c); /* 44 million parameters: sizes are enough */
    p = tfm_params_create(c);
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert(t.config.block.d_model == 512 && t.config.block.heads == 8 && t.config.block.d_ff == 2048);
    cr_assert(t.config.encoder_layers == 6 && t.config.decoder_layers == 6);
    cr_assert_eq(tfm_params_bytes(p), (int64_t)44140544 * 4); /* what torch counts for nn.Transformer() */
    assert_ok(c, tfm_measure_end(c, NULL));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(transformer, defaults_of_rotary_positions_are_written_out) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_DECODER_ONLY, TFM_POSITION_ROTARY);
    tfm_transformer t;
    const tfm_rope *r = &t.config.block.rope;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert(r->dims == 6 && r->base == 10000.0f && r->factor == 1.0f && r->low_frequency == 1.0f);
    cr_assert(r->high_frequency == 4.0f && r->beta_fast == 32.0f && r->beta_slow == 1.0f);
    cr_assert(t.config.block.rotary == 1 && r->scaling == TFM_ROPE_PLAIN && r->original_length == 0);
    cr_assert(t.encoder.layers[1].self_attn.config.rope.dims == 6 && t.encoder.layers[1].config.rope.dims == 6);
    assert_ok(c, tfm_transformer_init(c, p, "", &t.config, &t)); /* what is written out is a config */
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(transformer, wrong_inputs_are_refused_with_reasons) {
    static const int64_t bad[2] = {3, 30};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_ENCODER_ONLY, TFM_POSITION_LEARNED);
    tfm_transformer t;
    tfm_transformer_options o;
    memset(&o, 0, sizeof o);
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert_null(tfm_transformer_forward(c, &t, tfm_ones(c, TFM_SHAPE(2, 3, 24)), NULL, NULL));
    assert_error_says(c, "ids (batch, length)");
    tfm_clear(c);
    cr_assert_null(tfm_transformer_forward(c, &t, some_ids(c, 1, 21, 30, 1), NULL, NULL));
    assert_error_says(c, "position 20 is asked for, but only 20 were learned");
    tfm_clear(c);
    assert_refused(c, tfm_transformer_forward(c, &t, tfm_from(c, TFM_I64, TFM_SHAPE(1, 2), bad), NULL, NULL),
                   TFM_INVALID);
    cr_assert_null(tfm_transformer_forward(c, &t, NULL, some_ids(c, 1, 2, 30, 1), NULL));
    assert_error_says(c, "encoder-only model takes a source and no target");
    tfm_clear(c);
    o.output = TFM_OUTPUT_SOFTMAX; /* there is no head */
    assert_refused(c, tfm_transformer_forward(c, &t, some_ids(c, 1, 2, 30, 1), NULL, &o), TFM_INVALID);
    o.output = TFM_OUTPUT_LOG_SOFTMAX;
    assert_refused(c, tfm_transformer_forward(c, &t, some_ids(c, 1, 2, 30, 1), NULL, &o), TFM_INVALID);
    o.output = 9;
    assert_refused(c, tfm_transformer_forward(c, &t, some_ids(c, 1, 2, 30, 1), NULL, &o), TFM_INVALID);
    g = small(TFM_DECODER_ONLY, TFM_POSITION_NONE);
    assert_ok(c, tfm_transformer_init(c, p, "d", &g, &t));
    cr_assert_null(tfm_transformer_decode(c, &t, some_ids(c, 1, 2, 30, 1), NULL, &o));
    assert_error_says(c, "tfm_transformer_decode: output 9");
    tfm_clear(c);
    cr_assert_null(tfm_transformer_encode(c, &t, some_ids(c, 1, 2, 30, 1), NULL));
    assert_error_says(c, "a decoder-only model has no encoder");
    tfm_clear(c);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* What measure says is what happens. */
Test(transformer, measure_says_what_happens) {
    int kind, position;
    for (kind = 0; kind < 3; kind++)
        for (position = 0; position <= TFM_POSITION_RELATIVE; position++) {
            tfm_ctx *c = context_of(2);
            tfm_params *p;
            tfm_transformer_config g = small(kind, position);
            tfm_transformer t;
            tfm_transformer_memory m;
            tfm_tensor *source, *target;
            int64_t before;
            g.block.norm_first = position & 1;
            g.head_bias = 1;
            /* a side that the kind lacks is not looked at */
            assert_ok(c, tfm_transformer_measure(c, &g, 3, kind == TFM_DECODER_ONLY ? -1 : 10,
                                                 kind == TFM_ENCODER_ONLY ? INT64_MIN : 7, &m));
            p = tfm_params_create(c);
            assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
            assert_ok(c, tfm_params_prepare(c, p));
            cr_assert_eq(m.weights, tfm_params_bytes(p));
            source = kind == TFM_DECODER_ONLY ? NULL : some_ids(c, 3, 10, 30, 1);
            target = kind == TFM_ENCODER_ONLY ? NULL : some_ids(c, 3, 7, 35, 2);
            tfm_memory_reset(c);
            before = tfm_memory_usage(c).arena_used;
            assert_made(c, tfm_transformer_forward(c, &t, source, target, NULL));
            cr_assert_eq(m.scratch, tfm_memory_usage(c).arena_peak - before,
                         "kind %d position %d: %lld said, %lld taken", kind, position, (long long)m.scratch,
                         (long long)(tfm_memory_usage(c).arena_peak - before));
            if (kind == TFM_ENCODER_ONLY) {
                cr_assert_eq(m.cache, 0);
            } else {
                tfm_cache_options s;
                int64_t expected;
                memset(&s, 0, sizeof s);
                s.layers = 2;
                s.batch = 3;
                s.heads = 4;
                s.key_size = 6;
                s.capacity = 7;
                expected = tfm_cache_memory(&s);
                s.capacity = 10;
                if (kind == TFM_ENCODER_DECODER) expected += tfm_cache_memory(&s);
                cr_assert_eq(m.cache, expected);
            }
            cr_assert(m.threads > 0);
            tfm_params_destroy(p);
            tfm_destroy(c);
        }
}

Test(transformer, measure_of_a_large_model_takes_no_memory) {
    if (sizeof(void *) < 8) cr_skip_test("sizes beyond 32 bits");
    test_memory memory = test_memory_new();
    tfm_options options;
    tfm_ctx *c;
    tfm_transformer_config g;
    tfm_transformer_memory m;
    int64_t held;
    memset(&options, 0, sizeof options);
    options.threads = 1;
    options.allocator = test_allocator(&memory);
    c = tfm_create(&options);
    memset(&g, 0, sizeof g);
    g.kind = TFM_DECODER_ONLY; /* Llama-3.1-70B's sizes */
    g.position = TFM_POSITION_ROTARY;
    g.decoder_layers = 80;
    g.block.d_model = 8192;
    g.block.heads = 64;
    g.block.kv_heads = 8;
    g.block.d_ff = 28672;
    g.block.gated = g.block.no_bias = g.block.norm_first = 1;
    g.block.norm = TFM_RMS_NORM;
    g.target_vocab = 128256;
    held = memory.bytes;
    memory.peak = held;
    assert_ok(c, tfm_transformer_measure(c, &g, 1, 0, 131072, &m));
    cr_assert_eq(m.weights, (int64_t)70553706496 * 4);
    cr_assert(m.cache >= (int64_t)80 * 2 * 8 * 128 * 131072 * 4
              && m.cache < (int64_t)80 * 2 * 8 * 128 * 131072 * 4 + 65536);
    cr_assert(memory.peak - held < (4 << 20), "%lld bytes to measure", (long long)(memory.peak - held));
    assert_verb_refused(c, tfm_transformer_measure(c, &g, 1, 0, -1, &m), TFM_INVALID);
    assert_verb_refused(c, tfm_transformer_measure(c, &g, -1, 0, 1, &m), TFM_INVALID);
    assert_verb_refused(c, tfm_transformer_measure(c, NULL, 1, 0, 1, &m), TFM_INVALID);
    g.block.heads = 63;
    assert_verb_refused(c, tfm_transformer_measure(c, &g, 1, 0, 1, &m), TFM_INVALID);
    assert_made(c, tfm_ones(c, TFM_SHAPE(3))); /* not left in a dry run */
    tfm_destroy(c);
    assert_no_leak(&memory);
}

static void forward_small(tfm_ctx *c) {
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_ENCODER_DECODER, TFM_POSITION_ALIBI);
    tfm_transformer t;
    static const int64_t ids[3] = {1, 2, 3};
    if (p && tfm_transformer_init(c, p, "", &g, &t) == TFM_OK && tfm_params_prepare(c, p) == TFM_OK) {
        tfm_tensor *x = tfm_from(c, TFM_I64, TFM_SHAPE(1, 3), ids);
        (void)tfm_transformer_forward(c, &t, x, x, NULL);
    }
    tfm_params_destroy(p);
}

Test(transformer, every_failing_allocation_is_an_error_and_no_leak) {
    if (test_quick()) cr_skip_test("long");
    cr_assert(each_end_of_memory(forward_small) > 20);
}

/* A (length, batch, size) tensor seen batch first: read where it lies. */
/* The init after one that failed binds what that one left in the store. */
Test(transformer, alibi_slopes_survive_an_init_that_failed) {
    tfm_transformer_config g = small(TFM_DECODER_ONLY, TFM_POSITION_ALIBI);
    int64_t n;
    int way, failed = 0;
    for (way = 0; way < 2; way++)
        for (n = 0, failed = 1; failed && n < (way ? 1 : 1000); n++) {
            test_memory m = test_memory_new();
            tfm_options options;
            tfm_ctx *c;
            tfm_params *p;
            tfm_transformer t;
            tfm_embedding_layer e;
            memset(&options, 0, sizeof options);
            options.threads = 1;
            options.allocator = test_allocator(&m);
            c = tfm_create(&options);
            p = tfm_params_create(c);
            assert_ok(c, tfm_embedding_init(c, p, "tgt_embedding", 35, 24, &e));
            if (way) {
                tfm_cancel(c);
            } else {
                m.fail_at = m.calls + n;
                m.fail_on = 1;
            }
            failed = tfm_transformer_init(c, p, "", &g, &t) != TFM_OK;
            m.fail_at = -1;
            tfm_clear(c);
            assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
            assert_same_values(c, t.alibi, tfm_alibi_slopes(c, 4));
            tfm_params_destroy(p);
            tfm_destroy(c);
        }
    cr_assert(failed, "the cancel was not seen");
}

Test(transformer, inputs_of_any_strides) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_ENCODER_ONLY, TFM_POSITION_SINUSOIDAL);
    tfm_transformer t;
    tfm_tensor *x = tfm_transpose(c, some(c, TFM_SHAPE(5, 2, 24), 1), 0, 1),
               *ids = tfm_transpose(c, some_ids(c, 5, 2, 30, 2), 0, 1);
    g.source_vocab = 0;
    assert_ok(c, tfm_transformer_init(c, p, "vectors", &g, &t));
    assert_same_values(c, tfm_transformer_forward(c, &t, x, NULL, NULL),
                       tfm_transformer_forward(c, &t, tfm_clone(c, x), NULL, NULL));
    g.position = TFM_POSITION_NONE;
    assert_ok(c, tfm_transformer_init(c, p, "plain", &g, &t));
    assert_same_values(c, tfm_transformer_forward(c, &t, x, NULL, NULL),
                       tfm_transformer_forward(c, &t, tfm_clone(c, x), NULL, NULL));
    g.source_vocab = 30;
    assert_ok(c, tfm_transformer_init(c, p, "ids", &g, &t));
    assert_same_values(c, tfm_transformer_forward(c, &t, ids, NULL, NULL),
                       tfm_transformer_forward(c, &t, tfm_clone(c, ids), NULL, NULL));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

#if !defined(_WIN32) && !defined(TFM_NO_THREADS)
#include <pthread.h>

struct reader {
    const tfm_transformer *model;
    float *logits;
};

static void *read_along(void *arg) {
    struct reader *r = (struct reader *)arg;
    static const int64_t ids[6] = {3, 1, 4, 1, 5, 9};
    tfm_options o;
    tfm_ctx *c;
    int i;
    memset(&o, 0, sizeof o);
    o.threads = 2;
    c = tfm_create(&o);
    for (i = 0; i < 5; i++) {
        tfm_tensor *y = tfm_transformer_forward(c, r->model, NULL, tfm_from(c, TFM_I64, TFM_SHAPE(1, 6), ids), NULL);
        free(r->logits);
        r->logits = test_floats(c, y);
    }
    tfm_destroy(c);
    return NULL;
}

/* One store, read by contexts of several threads at once. */
Test(transformer, one_store_serves_contexts_of_many_threads) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = small(TFM_DECODER_ONLY, TFM_POSITION_ROTARY);
    tfm_transformer t;
    struct reader readers[3];
    pthread_t threads[3];
    int i;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    assert_ok(c, tfm_params_prepare(c, p));
    for (i = 0; i < 3; i++) {
        readers[i].model = &t;
        readers[i].logits = NULL;
        cr_assert_eq(pthread_create(&threads[i], NULL, read_along, &readers[i]), 0);
    }
    for (i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    for (i = 0; i < 3; i++) {
        cr_assert_not_null(readers[i].logits);
        assert_same_bytes(readers[i].logits, readers[0].logits, 6 * 35 * 4);
    }
    for (i = 0; i < 3; i++) free(readers[i].logits);
    tfm_params_destroy(p);
    tfm_destroy(c);
}
#endif

/* -- Heads --------------------------------------------------------------------------------------------------------- */

Test(pool, follows_lengths) {
    static const int64_t lengths[3] = {5, 2, 0};
    TEST_EACH_ISA(c, 1) {
        tfm_tensor *x = some(c, TFM_SHAPE(3, 5, 7), 1), *n = lengths_of(c, 3, lengths), *y;
        float *v = (float *)x->data;
        int64_t b, d, l;
        int pooling;
        for (l = 2; l < 5; l++) v[(5 + l) * 7] = (float)NAN; /* padding may hold anything */
        for (pooling = 0; pooling < 4; pooling++) {
            float *r;
            y = tfm_pool(c, x, n, pooling);
            assert_made(c, y);
            cr_assert(y->ndim == 2 && y->shape[0] == 3 && y->shape[1] == 7);
            r = test_floats(c, y);
            for (b = 0; b < 3; b++)
                for (d = 0; d < 7; d++) {
                    double sum = 0, most = -HUGE_VAL, expected;
                    for (l = 0; l < lengths[b]; l++) {
                        const double e = (double)v[(b * 5 + l) * 7 + d];
                        sum += e;
                        most = e > most ? e : most;
                    }
                    expected = !lengths[b]                   ? 0
                               : pooling == TFM_POOL_MEAN    ? sum / (double)lengths[b]
                               : pooling == TFM_POOL_FIRST   ? (double)v[b * 35 + d]
                               : pooling == TFM_POOL_LAST    ? (double)v[(b * 5 + lengths[b] - 1) * 7 + d]
                                                             : most;
                    cr_assert_float_eq(r[b * 7 + d], expected, 1e-6);
                }
            free(r);
            /* alone and in a batch */
            assert_same_values(
                c, tfm_pool(c, tfm_narrow(c, tfm_narrow(c, x, 0, 1, 1), 1, 0, 2), tfm_narrow(c, n, 0, 1, 1), pooling),
                tfm_narrow(c, y, 0, 1, 1));
            assert_same_values(c, tfm_pool(c, tfm_narrow(c, x, 0, 0, 1), NULL, pooling), tfm_narrow(c, y, 0, 0, 1));
        }
        assert_refused(c, tfm_pool(c, x, n, 4), TFM_INVALID);
        assert_refused(c, tfm_pool(c, tfm_ones(c, TFM_SHAPE(3, 4)), NULL, 0), TFM_INVALID);
        assert_refused(c, tfm_pool(c, x, tfm_ones(c, TFM_SHAPE(3)), 0), TFM_INVALID);
        assert_refused(c, tfm_pool(c, tfm_narrow(c, x, 1, 0, 4), n, 0), TFM_INVALID); /* a length of 5 in 4 */
        y = tfm_pool(c, tfm_zeros(c, TFM_SHAPE(2, 0, 3)), NULL, TFM_POOL_MAX);
        cr_assert(y && y->shape[0] == 2 && tfm_item(tfm_sum(c, y, tfm_shape_of(0, NULL), 0)) == 0);
    }
}

Test(pool, a_row_alone_has_the_bits_of_a_row_in_a_padded_batch) {
    static const int64_t lengths[] = {100, 77, 33}, sizes[] = {3, 16, 70};
    tfm_ctx *c = context_of(1);
    int i, b, pooling;
    for (i = 0; i < 3; i++)
        for (pooling = 0; pooling < 4; pooling++) {
            const tfm_tensor *x = tfm_randn(c, TFM_SHAPE(3, 100, sizes[i])), *n = tfm_from(c, TFM_I64, TFM_SHAPE(3), lengths);
            const tfm_tensor *all = tfm_pool(c, x, n, pooling);
            for (b = 0; b < 3; b++) {
                const tfm_tensor *alone = tfm_narrow(c, tfm_narrow(c, x, 0, b, 1), 1, 0, lengths[b]);
                assert_same_values(c, tfm_pool(c, alone, NULL, pooling), tfm_narrow(c, all, 0, b, 1));
            }
        }
    tfm_destroy(c);
}

Test(pool, halves_stay_halves_and_their_sums_do_not_overflow) {
    static const int64_t counts[] = {15};
    tfm_ctx *c = context_of(1);
    const tfm_tensor *x = tfm_full(c, TFM_F16, TFM_SHAPE(1, 20, 2), 10000);
    const tfm_tensor *n = tfm_from(c, TFM_I64, TFM_SHAPE(1), counts), *y;
    const int64_t last[] = {0, 1};
    int kind;
    for (kind = TFM_POOL_MEAN; kind <= TFM_POOL_MAX; kind++) {
        y = tfm_pool(c, x, kind % 2 ? NULL : n, kind);
        cr_assert(y && y->dtype == TFM_F16 && tfm_get(y, last) == 10000);
    }
    y = tfm_pool(c, tfm_full(c, TFM_F16, TFM_SHAPE(1, 0, 2), 0), n, TFM_POOL_MEAN);
    cr_assert(y == NULL); /* a length of 15 in 0 */
    tfm_clear(c);
    y = tfm_pool(c, tfm_full(c, TFM_F16, TFM_SHAPE(1, 0, 2), 0), NULL, TFM_POOL_MEAN);
    cr_assert(y && y->dtype == TFM_F16 && tfm_get(y, last) == 0);
    tfm_destroy(c);
}

Test(l2_normalize, gives_rows_of_length_one) {
    tfm_ctx *c = context_of(1);
    tfm_tensor *x = some(c, TFM_SHAPE(4, 9), 1), *y;
    float *v = (float *)x->data, *r;
    int64_t i, j;
    for (j = 0; j < 9; j++) v[27 + j] = 0;
    y = tfm_l2_normalize(c, x);
    r = test_floats(c, y);
    cr_assert_not_null(r);
    for (i = 0; i < 4; i++) {
        double squares = 0, length = 0;
        for (j = 0; j < 9; j++)
            squares += (double)r[i * 9 + j] * (double)r[i * 9 + j],
                length += (double)v[i * 9 + j] * (double)v[i * 9 + j];
        cr_assert_float_eq(squares, i == 3 ? 0 : 1, 1e-6);
        for (j = 0; i < 3 && j < 9; j++) cr_assert_float_eq(r[i * 9 + j], (double)v[i * 9 + j] / sqrt(length), 1e-6);
    }
    free(r);
    assert_refused(c, tfm_l2_normalize(c, tfm_full(c, TFM_F32, tfm_shape_of(0, NULL), 1)), TFM_INVALID);
    tfm_destroy(c);
}

Test(l2_normalize, squares_of_halves_neither_overflow_nor_vanish) {
    static const double scales[] = {4096, 1.0 / 4096, 0};
    tfm_ctx *c = context_of(1);
    int i;
    for (i = 0; i < 3; i++) {
        const tfm_tensor *y = tfm_l2_normalize(c, tfm_full(c, TFM_F16, TFM_SHAPE(2, 16), scales[i]));
        const int64_t last[] = {1, 15};
        cr_assert(y && y->dtype == TFM_F16);
        cr_assert_float_eq(tfm_get(y, last), i < 2 ? 0.25 : 0, 1e-9);
    }
    tfm_destroy(c);
}

Test(classifier, pools_or_tags) {
    static const int64_t lengths[2] = {3, 1};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_classifier k;
    tfm_tensor *x = some(c, TFM_SHAPE(2, 3, 8), 1), *n = lengths_of(c, 2, lengths), *y;
    assert_ok(c, tfm_classifier_init(c, p, "classifier", 8, 5, TFM_POOL_MEAN, 0, &k));
    cr_assert(tfm_params_find(p, "classifier.weight") && tfm_params_find(p, "classifier.bias"));
    y = tfm_classifier_forward(c, &k, x, n);
    assert_made(c, y);
    cr_assert(y->ndim == 2 && y->shape[0] == 2 && y->shape[1] == 5);
    assert_same_values(c, y, tfm_linear_forward(c, &k.linear, tfm_pool(c, x, n, TFM_POOL_MEAN)));
    k.tokens = 1;
    y = tfm_classifier_forward(c, &k, x, NULL);
    assert_made(c, y);
    cr_assert(y->ndim == 3 && y->shape[1] == 3 && y->shape[2] == 5);
    assert_refused(c, tfm_classifier_forward(c, &k, tfm_ones(c, TFM_SHAPE(2, 3, 7)), NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_classifier_init(c, p, "x", 8, 0, 0, 0, &k), TFM_INVALID);
    assert_verb_refused(c, tfm_classifier_init(c, p, "x", 8, 3, 9, 0, &k), TFM_INVALID);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

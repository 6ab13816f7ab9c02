/* The faults of the articles that this library grew from, one test each: what they got wrong is impossible here, or
 * an error. */
#include "layer_helpers.h"

static tfm_mha_config heads_of(int64_t d_model, int64_t heads) {
    tfm_mha_config g;
    memset(&g, 0, sizeof g);
    g.d_model = d_model;
    g.heads = heads;
    return g;
}

static tfm_block_config block_of(int64_t d_model, int64_t heads) {
    tfm_block_config g;
    memset(&g, 0, sizeof g);
    g.d_model = d_model;
    g.heads = heads;
    g.d_ff = 2 * d_model;
    return g;
}

static tfm_transformer_config model_of(int kind, int64_t source_vocab, int64_t target_vocab) {
    tfm_transformer_config g;
    memset(&g, 0, sizeof g);
    g.kind = kind;
    g.encoder_layers = g.decoder_layers = 2;
    g.block = block_of(16, 4);
    g.source_vocab = source_vocab;
    g.target_vocab = target_vocab;
    return g;
}

static void assert_rows_sum_to_one(tfm_ctx *c, const tfm_tensor *weights) {
    const int64_t n = weights->shape[weights->ndim - 1], rows = tfm_numel(weights) / n;
    float *w = test_floats(c, weights);
    int64_t i, j;
    cr_assert_not_null(w);
    for (i = 0; i < rows; i++) {
        double sum = 0;
        for (j = 0; j < n; j++) {
            cr_assert(w[i * n + j] >= 0);
            sum += (double)w[i * n + j];
        }
        cr_assert_float_eq(sum, 1, 1e-5);
    }
    free(w);
}

static int differ(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b) {
    float *x = test_floats(c, a), *y = test_floats(c, b);
    int different;
    cr_assert(x && y && tfm_numel(a) == tfm_numel(b), "%s", tfm_error(c));
    different = memcmp(x, y, (size_t)tfm_numel(a) * 4) != 0;
    free(x);
    free(y);
    return different;
}

/* nn.Transformer(input_dim, output_dim, heads, layers): the output size became the number of heads. */
Test(seed_faults, D1_sizes_are_named_and_heads_divide_d_model) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_ENCODER_DECODER, 9, 9);
    tfm_transformer t;
    g.block.d_model = 512;
    g.block.heads = 10;
    assert_init_refused(c, tfm_transformer_init(c, p, "", &g, &t), "d_model 512 is not a multiple of heads 10");
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* self.transformer(x) with one sequence. */
Test(seed_faults, D2_one_sequence_wants_an_encoder_only_model) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_ENCODER_DECODER, 9, 9);
    tfm_transformer t;
    tfm_tensor *ids = some_ids(c, 1, 4, 9, 1);
    assert_ok(c, tfm_transformer_init(c, p, "a", &g, &t));
    cr_assert_null(tfm_transformer_forward(c, &t, ids, NULL, NULL));
    assert_error_says(c, "an encoder-decoder needs source and target (for one sequence: TFM_ENCODER_ONLY");
    tfm_clear(c);
    g = model_of(TFM_ENCODER_ONLY, 9, 0);
    assert_ok(c, tfm_transformer_init(c, p, "b", &g, &t));
    assert_made(c, tfm_transformer_forward(c, &t, ids, NULL, NULL));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* A position "encoding" of shape (1, d): the same vector everywhere. */
Test(seed_faults, D3_each_position_has_a_vector_of_its_own) {
    static const int64_t same[5] = {3, 3, 3, 3, 3};
    static const int kinds[3] = {TFM_POSITION_SINUSOIDAL, TFM_POSITION_SINUSOIDAL_HALVES, TFM_POSITION_LEARNED};
    tfm_ctx *c = context_of(1);
    int k, i, j;
    for (k = 0; k < 3; k++) {
        tfm_params *p = tfm_params_create(c);
        tfm_transformer_config g = model_of(TFM_ENCODER_ONLY, 9, 0);
        tfm_transformer t;
        tfm_tensor *y;
        g.position = kinds[k];
        assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
        y = tfm_transformer_forward(c, &t, tfm_from(c, TFM_I64, TFM_SHAPE(1, 5), same), NULL, NULL);
        assert_made(c, y);
        for (i = 0; i < 5; i++)
            for (j = 0; j < i; j++) cr_assert(differ(c, tfm_narrow(c, y, 1, i, 1), tfm_narrow(c, y, 1, j, 1)));
        tfm_params_destroy(p);
    }
    tfm_destroy(c);
}

/* A dropout rate overwritten by a module, and no projection to the classes. */
Test(seed_faults, D4_the_head_is_explicit_and_has_the_size_of_the_output) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_ENCODER_ONLY, 9, 0);
    tfm_transformer t;
    tfm_tensor *y;
    g.outputs = 7;
    g.block.dropout = 0.1f;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    cr_assert_eq(t.config.block.dropout, 0.1f);
    cr_assert_not_null(tfm_params_find(p, "generator.weight"));
    y = tfm_transformer_forward(c, &t, some_ids(c, 2, 3, 9, 1), NULL, NULL);
    assert_made(c, y);
    cr_assert(y->ndim == 3 && y->shape[2] == 7);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* "score divided by the sum of scores": with scores of both signs that is no distribution. */
Test(seed_faults, D5_weights_are_a_softmax_of_the_scores) {
    tfm_ctx *c = context_of(1);
    tfm_tensor *q = some(c, TFM_SHAPE(1, 2, 6, 8), 1), *k = some(c, TFM_SHAPE(1, 2, 4, 8), 2),
               *v = some(c, TFM_SHAPE(1, 2, 4, 8), 3);
    tfm_tensor *weights, *scores;
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    o.weights = &scores;
    o.weights_stage = TFM_WEIGHTS_SCORES;
    assert_made(c, tfm_attention(c, q, k, v, &o));
    o.weights = &weights;
    o.weights_stage = TFM_WEIGHTS_PROBABILITIES;
    assert_made(c, tfm_attention(c, q, k, v, &o));
    assert_rows_sum_to_one(c, weights);
    assert_tensor_close(c, weights, tfm_softmax(c, scores, -1), 1e-5, 1e-6);
    cr_assert(tfm_item(tfm_min(c, scores, tfm_shape_of(0, NULL), 0)) < 0);
    tfm_destroy(c);
}

/* sqrt(input size) where sqrt(key size) belongs. */
Test(seed_faults, D6_scale_is_one_over_the_root_of_the_key_size) {
    tfm_ctx *c = context_of(1);
    tfm_tensor *q = some(c, TFM_SHAPE(1, 1, 3, 16), 1), *k = some(c, TFM_SHAPE(1, 1, 5, 16), 2),
               *v = some(c, TFM_SHAPE(1, 1, 5, 40), 3);
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    o.scale = 0.25f;
    assert_same_values(c, tfm_attention(c, q, k, v, NULL), tfm_attention(c, q, k, v, &o));
    tfm_destroy(c);
}

/* softmax over an axis of size one gives ones; a broadcast that works for B == L only. */
Test(seed_faults, D7_weighted_attention_runs_over_the_sequence) {
    static const int64_t lengths[3] = {5, 2, 4}, padded[2] = {1, 3};
    tfm_ctx *c = context_of(1);
    tfm_tensor *x = some(c, TFM_SHAPE(3, 5, 8), 1), *w = some(c, TFM_SHAPE(1, 8), 2), *b = some(c, TFM_SHAPE(1), 3),
               *weights, *y;
    float *a;
    y = tfm_weighted_pool(c, x, w, b, lengths_of(c, 3, lengths), &weights);
    assert_made(c, y);
    cr_assert(y->ndim == 2 && y->shape[0] == 3 && y->shape[1] == 8);
    cr_assert(weights->ndim == 2 && weights->shape[0] == 3 && weights->shape[1] == 5);
    assert_rows_sum_to_one(c, weights);
    a = test_floats(c, weights);
    cr_assert(a[0] < 1 && a[0] != a[1]);
    free(a);
    cr_assert_eq(tfm_get(weights, padded), 0);
    y = tfm_weighted_sequence(c, x, w, b, NULL, NULL);
    cr_assert(y && y->ndim == 3 && y->shape[1] == 5);
    tfm_destroy(c);
}

/* "Transformer blocks" of one head, without output projection, mask or dropout. */
Test(seed_faults, D8_blocks_have_heads_projection_mask_and_dropout) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_of(16, 4);
    tfm_encoder_layer l;
    tfm_stack_options o;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 6, 16), 1), *plain;
    g.dropout = 0.5f;
    assert_ok(c, tfm_encoder_layer_init(c, p, "", &g, &l));
    cr_assert_eq(l.self_attn.config.heads, 4);
    cr_assert_not_null(tfm_params_find(p, "self_attn.out_proj.weight"));
    memset(&o, 0, sizeof o);
    plain = tfm_encoder_layer_forward(c, &l, x, &o);
    o.mask = tfm_mask_causal();
    cr_assert(differ(c, tfm_encoder_layer_forward(c, &l, x, &o), plain));
    memset(&o, 0, sizeof o);
    o.training = 1;
    cr_assert(differ(c, tfm_encoder_layer_forward(c, &l, x, &o), plain));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* "multiply the elements with each other": it is the sum of values times their weights. */
Test(seed_faults, D9_output_is_the_weighted_sum_of_values) {
    tfm_ctx *c = context_of(1);
    tfm_tensor *q = some(c, TFM_SHAPE(2, 2, 3, 8), 1), *k = some(c, TFM_SHAPE(2, 2, 5, 8), 2),
               *v = some(c, TFM_SHAPE(2, 2, 5, 6), 3), *weights, *y;
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    o.weights = &weights;
    y = tfm_attention(c, q, k, v, &o);
    assert_made(c, y);
    assert_tensor_close(c, y, tfm_matmul(c, weights, v), 1e-5, 1e-6);
    tfm_destroy(c);
}

/* Dropout somewhere inside, LayerNorm inside attention. */
Test(seed_faults, D10_dropout_is_on_the_weights_behind_the_softmax) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha_config g = heads_of(16, 2);
    tfm_mha l;
    tfm_mha_options o;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 12, 16), 1), *plain = NULL, *dropped = NULL;
    float *a, *b;
    int64_t i, zeros = 0;
    g.dropout = 0.25f;
    assert_ok(c, tfm_mha_init(c, p, "", &g, &l));
    memset(&o, 0, sizeof o);
    o.need_weights = 2;
    o.weights = &plain;
    assert_made(c, tfm_mha_forward(c, &l, x, x, x, &o));
    o.training = 1;
    o.weights = &dropped;
    assert_made(c, tfm_mha_forward(c, &l, x, x, x, &o));
    a = test_floats(c, plain);
    b = test_floats(c, dropped);
    for (i = 0; i < 2 * 12 * 12; i++) {
        zeros += b[i] == 0;
        if (b[i] != 0) cr_assert_float_eq(b[i], a[i] / 0.75f, 1e-6);
    }
    cr_assert(zeros > 30 && zeros < 120);
    free(a);
    free(b);
    for (i = 0; i < tfm_params_count(p); i++) cr_assert(!strstr(tfm_params_name(p, i), "norm"));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* One linear layer with ReLU, no residual, no norm. */
Test(seed_faults, D11_feed_forward_has_two_layers_a_residual_and_a_norm) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g = block_of(16, 4);
    tfm_encoder_layer l;
    tfm_tensor *x = some(c, TFM_SHAPE(2, 3, 16), 1), *h, *f;
    assert_ok(c, tfm_encoder_layer_init(c, p, "", &g, &l));
    h = tfm_norm_forward(c, &l.norm1, tfm_add(c, x, tfm_mha_forward(c, &l.self_attn, x, x, x, NULL)));
    f = tfm_relu(
        c, tfm_linear(c, h, tfm_params_find(p, "linear1.weight"), tfm_params_find(p, "linear1.bias"), TFM_ACT_NONE));
    f = tfm_linear(c, f, tfm_params_find(p, "linear2.weight"), tfm_params_find(p, "linear2.bias"), TFM_ACT_NONE);
    f = tfm_layer_norm(c, tfm_add(c, h, f), tfm_params_find(p, "norm2.weight"), tfm_params_find(p, "norm2.bias"), NULL);
    assert_same_values(c, tfm_encoder_layer_forward(c, &l, x, NULL), f);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* sqrt(d_model) although the heads are split. */
Test(seed_faults, D12_scale_is_per_head) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha_config g = heads_of(64, 8);
    tfm_mha l;
    tfm_mha_options o;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 5, 64), 1), *weights = NULL, *q, *k, *scores;
    assert_ok(c, tfm_mha_init(c, p, "", &g, &l));
    memset(&o, 0, sizeof o);
    o.need_weights = 2;
    o.weights = &weights;
    assert_made(c, tfm_mha_forward(c, &l, x, x, x, &o));
    q = tfm_split_heads(c, tfm_linear(c, x, tfm_narrow(c, l.in_proj_weight, 0, 0, 64), NULL, TFM_ACT_NONE), 8);
    k = tfm_split_heads(c, tfm_linear(c, x, tfm_narrow(c, l.in_proj_weight, 0, 64, 64), NULL, TFM_ACT_NONE), 8);
    scores = tfm_scale(c, tfm_matmul(c, q, tfm_transpose(c, k, 2, 3)), (float)(1 / sqrt(8.0)));
    assert_tensor_close(c, weights, tfm_softmax(c, scores, -1), 1e-5, 1e-6);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* No check of dim % heads, no mask argument. */
Test(seed_faults, D13_heads_are_checked_and_a_mask_is_taken) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha_config g = heads_of(30, 4);
    tfm_mha l;
    tfm_mha_options o;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 5, 30), 1), *weights = NULL;
    static const int64_t future[3] = {0, 1, 4};
    assert_init_refused(c, tfm_mha_init(c, p, "", &g, &l), "d_model 30 is not a multiple of heads 4");
    g.heads = 5;
    assert_ok(c, tfm_mha_init(c, p, "", &g, &l));
    memset(&o, 0, sizeof o);
    o.mask = tfm_mask_causal();
    o.need_weights = 1;
    o.weights = &weights;
    assert_made(c, tfm_mha_forward(c, &l, x, x, x, &o));
    cr_assert_eq(tfm_get(weights, future), 0);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* "the encoder's output becomes the decoder's input". */
Test(seed_faults, D14_memory_feeds_cross_attention_and_the_decoder_is_causal) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_ENCODER_DECODER, 9, 11);
    tfm_transformer t;
    tfm_tensor *source = some_ids(c, 1, 4, 9, 1), *other = some_ids(c, 1, 6, 9, 2), *target = some_ids(c, 1, 5, 11, 3),
               *changed, *y;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    y = tfm_transformer_forward(c, &t, source, target, NULL);
    assert_made(c, y);
    cr_assert(y->shape[1] == 5); /* the target's length, not the source's */
    cr_assert(differ(c, tfm_transformer_forward(c, &t, other, target, NULL), y));
    changed = tfm_clone(c, target);
    ((int64_t *)changed->data)[4] = (((int64_t *)changed->data)[4] + 1) % 11;
    changed = tfm_transformer_forward(c, &t, source, changed, NULL);
    assert_same_values(c, tfm_narrow(c, changed, 1, 0, 4), tfm_narrow(c, y, 1, 0, 4));
    cr_assert(differ(c, tfm_narrow(c, changed, 1, 4, 1), tfm_narrow(c, y, 1, 4, 1)));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

#if !defined(TFM_NO_MODELS)
/* "Hello, world!" is two vectors: the tokenizer decides, and d_k is no property of a word. */
Test(seed_faults, D15_a_text_has_as_many_vectors_as_tokens) {
    static const char lines[] = "<unk>\nHello\n,\nworld\n!\n";
    tfm_ctx *c = context_of(1);
    tfm_tokenizer *tokenizer = tfm_tokenizer_lines_memory(c, lines, (int64_t)sizeof lines - 1, 0);
    tfm_params *p = tfm_params_create(c);
    tfm_embedding_layer e;
    int64_t *ids, count;
    tfm_tensor *y;
    assert_made(c, tokenizer);
    assert_ok(c, tfm_tokenizer_encode(c, tokenizer, "Hello , world !", 0, 0, &ids, &count));
    cr_assert_eq(count, 4);
    assert_ok(c, tfm_embedding_init(c, p, "e", tfm_tokenizer_size(tokenizer), 6, &e));
    y = tfm_embedding_forward(c, &e, tfm_from(c, TFM_I64, TFM_SHAPE(1, count), ids));
    assert_made(c, y);
    cr_assert(y->shape[1] == 4 && y->shape[2] == 6);
    tfm_tokenizer_destroy(tokenizer);
    tfm_params_destroy(p);
    tfm_destroy(c);
}
#endif

/* Undefined i, overlapping slices, one row; no word on odd sizes. */
Test(seed_faults, D16_sinusoids_are_the_papers_also_for_odd_sizes) {
    tfm_ctx *c = context_of(1);
    int64_t d, at[2];
    for (d = 1; d < 9; d++) {
        tfm_tensor *t = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 0, 50, d);
        assert_made(c, t);
        for (at[0] = 0; at[0] < 50; at[0]++)
            for (at[1] = 0; at[1] < d; at[1]++) {
                const double angle = (double)at[0] / pow(10000.0, (double)(at[1] / 2 * 2) / (double)d);
                cr_assert_float_eq(tfm_get(t, at), at[1] % 2 ? cos(angle) : sin(angle), 1e-6);
            }
    }
    tfm_destroy(c);
}

/* torch.cat((embedding, positions), dim=1). */
Test(seed_faults, D17_positions_are_added) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_ENCODER_ONLY, 9, 0);
    tfm_transformer t;
    tfm_tensor *ids = some_ids(c, 2, 5, 9, 1), *x, *y;
    g.position = TFM_POSITION_SINUSOIDAL;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    y = tfm_transformer_forward(c, &t, ids, NULL, NULL);
    assert_made(c, y);
    cr_assert(y->shape[1] == 5 && y->shape[2] == 16);
    x = tfm_add(c, tfm_embedding_forward(c, &t.source_embedding, ids),
                tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 0, 5, 16));
    assert_same_values(c, tfm_encoder_forward(c, &t.encoder, x, NULL), y);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* Several heads shown with a function of one, without projections. */
Test(seed_faults, D18_every_head_has_its_projections) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha_config g = heads_of(8, 2);
    tfm_mha l;
    tfm_tensor *x = some(c, TFM_SHAPE(1, 4, 8), 1), *head[2], *y;
    int64_t i;
    assert_ok(c, tfm_mha_init(c, p, "", &g, &l));
    cr_assert(l.in_proj_weight->shape[0] == 24 && l.in_proj_weight->shape[1] == 8 && l.out_proj.weight->shape[0] == 8);
    for (i = 0; i < 2; i++) { /* each head by itself, from its own rows of the weights */
        tfm_tensor *q = tfm_linear(c, x, tfm_narrow(c, l.in_proj_weight, 0, 4 * i, 4), NULL, TFM_ACT_NONE);
        tfm_tensor *k = tfm_linear(c, x, tfm_narrow(c, l.in_proj_weight, 0, 8 + 4 * i, 4), NULL, TFM_ACT_NONE);
        tfm_tensor *v = tfm_linear(c, x, tfm_narrow(c, l.in_proj_weight, 0, 16 + 4 * i, 4), NULL, TFM_ACT_NONE);
        head[i] = tfm_combine_heads(
            c, tfm_attention(c, tfm_split_heads(c, q, 1), tfm_split_heads(c, k, 1), tfm_split_heads(c, v, 1), NULL));
    }
    y = tfm_linear_forward(c, &l.out_proj, tfm_cat(c, (const tfm_tensor *const *)head, 2, 2));
    assert_made(c, y);
    assert_tensor_close(c, tfm_mha_forward(c, &l, x, x, x, NULL), y, 1e-6, 1e-6);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* An additive mask (0 / -inf) given to masked_fill(mask == 0, -inf). */
Test(seed_faults, D19_each_kind_of_mask_has_its_name) {
    static const float additive[9] = {0, -HUGE_VALF, -HUGE_VALF, 0, 0, -HUGE_VALF, 0, 0, 0},
                       kept[9] = {1, 0, 0, 1, 1, 0, 1, 1, 1};
    static const uint8_t keep[9] = {1, 0, 0, 1, 1, 0, 1, 1, 1}, ignore[9] = {0, 1, 1, 0, 0, 1, 0, 0, 0};
    tfm_ctx *c = context_of(1);
    tfm_tensor *q = some(c, TFM_SHAPE(1, 2, 3, 8), 1), *first = NULL;
    tfm_mask masks[5];
    int i;
    masks[0] = tfm_mask_causal();
    masks[1] = tfm_mask_additive(tfm_from(c, TFM_F32, TFM_SHAPE(3, 3), additive));
    masks[2] = tfm_mask_nonzero(tfm_from(c, TFM_F32, TFM_SHAPE(3, 3), kept));
    masks[3] = tfm_mask_keep(tfm_from(c, TFM_BOOL, TFM_SHAPE(3, 3), keep));
    masks[4] = tfm_mask_ignore(tfm_from(c, TFM_BOOL, TFM_SHAPE(3, 3), ignore));
    for (i = 0; i < 5; i++) {
        tfm_attention_options o;
        tfm_tensor *y;
        memset(&o, 0, sizeof o);
        o.mask = masks[i];
        y = tfm_attention(c, q, q, q, &o);
        assert_made(c, y);
        if (first) assert_same_values(c, y, first);
        else first = y;
    }
    tfm_destroy(c);
}

/* Adding 1 and 0 to the scores masks nothing. */
Test(seed_faults, D20_an_additive_mask_of_ones_is_a_bias_and_a_boolean_one_masks) {
    static const float ones[4] = {1, 0, 1, 1};
    static const int64_t at[4] = {0, 0, 0, 1};
    tfm_ctx *c = context_of(1);
    tfm_tensor *q = some(c, TFM_SHAPE(1, 1, 2, 8), 1), *weights, *matrix = tfm_from(c, TFM_F32, TFM_SHAPE(2, 2), ones);
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    o.weights = &weights;
    o.mask = tfm_mask_additive(matrix);
    assert_made(c, tfm_attention(c, q, q, q, &o));
    cr_assert(tfm_get(weights, at) > 0);
    o.mask = tfm_mask_nonzero(matrix);
    assert_made(c, tfm_attention(c, q, q, q, &o));
    cr_assert(tfm_get(weights, at) == 0);
    /* and numbers cannot be passed off as booleans */
    o.mask = tfm_mask_keep(matrix);
    assert_refused(c, tfm_attention(c, q, q, q, &o), TFM_INVALID);
    tfm_destroy(c);
}

/* A block-shaped "causal" mask, rows of weights that sum to 2, weights times V element by element. */
Test(seed_faults, D21_causal_is_triangular_and_rows_sum_to_one) {
    tfm_ctx *c = context_of(1);
    tfm_tensor *q = some(c, TFM_SHAPE(1, 1, 5, 8), 1), *weights, *y;
    tfm_attention_options o;
    int64_t at[4] = {0, 0, 0, 0};
    memset(&o, 0, sizeof o);
    o.weights = &weights;
    o.mask = tfm_mask_causal();
    y = tfm_attention(c, q, q, q, &o);
    assert_made(c, y);
    assert_rows_sum_to_one(c, weights);
    for (at[2] = 0; at[2] < 5; at[2]++)
        for (at[3] = 0; at[3] < 5; at[3]++) cr_assert_eq(tfm_get(weights, at) > 0, at[3] <= at[2]);
    assert_tensor_close(c, y, tfm_matmul(c, weights, q), 1e-5, 1e-6);
    tfm_destroy(c);
}

/* "heads split the sequence into sub-sequences". */
Test(seed_faults, D22_heads_split_the_features) {
    tfm_ctx *c = context_of(1);
    tfm_tensor *x = some(c, TFM_SHAPE(2, 3, 8), 1), *h = tfm_split_heads(c, x, 4);
    int64_t at[4], from[3];
    assert_made(c, h);
    cr_assert(h->shape[0] == 2 && h->shape[1] == 4 && h->shape[2] == 3 && h->shape[3] == 2);
    for (at[0] = 0; at[0] < 2; at[0]++)
        for (at[1] = 0; at[1] < 4; at[1]++)
            for (at[2] = 0; at[2] < 3; at[2]++)
                for (at[3] = 0; at[3] < 2; at[3]++) {
                    from[0] = at[0];
                    from[1] = at[2];
                    from[2] = 2 * at[1] + at[3];
                    cr_assert_eq(tfm_get(h, at), tfm_get(x, from));
                }
    assert_same_values(c, tfm_combine_heads(c, h), x);
    assert_refused(c, tfm_split_heads(c, x, 3), TFM_INVALID);
    tfm_destroy(c);
}

/* A dropout number that is called, an undefined d_inner. */
Test(seed_faults, D23_settings_are_fields_with_defaults_and_checks) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g;
    tfm_encoder_layer l;
    memset(&g, 0, sizeof g);
    g.d_model = 8;
    g.heads = 2;
    g.dropout = 1.5f;
    assert_init_refused(c, tfm_encoder_layer_init(c, p, "", &g, &l), "dropout 1.5 is not in [0, 1)");
    g.dropout = 0.1f;
    assert_ok(c, tfm_encoder_layer_init(c, p, "", &g, &l));
    cr_assert(l.config.d_ff == 2048 && l.config.norm_eps == 1e-5f && l.config.activation == TFM_ACT_RELU);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* log_softmax(dim=1): over the sequence. */
Test(seed_faults, D24_probabilities_are_over_the_vocabulary) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_DECODER_ONLY, 0, 13);
    tfm_transformer t;
    tfm_transformer_options o;
    tfm_tensor *ids = some_ids(c, 2, 5, 13, 1), *y;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    memset(&o, 0, sizeof o);
    o.output = TFM_OUTPUT_LOG_SOFTMAX;
    y = tfm_transformer_forward(c, &t, NULL, ids, &o);
    assert_made(c, y);
    assert_rows_sum_to_one(c, tfm_exp(c, y));
    o.output = TFM_OUTPUT_SOFTMAX;
    assert_rows_sum_to_one(c, tfm_transformer_forward(c, &t, NULL, ids, &o));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* A printed output of two dims with positive "log-probabilities". */
Test(seed_faults, D25_output_is_batch_length_vocabulary_and_not_positive) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_ENCODER_DECODER, 100, 1000);
    tfm_transformer t;
    tfm_transformer_options o;
    tfm_tensor *y;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    memset(&o, 0, sizeof o);
    o.output = TFM_OUTPUT_LOG_SOFTMAX;
    y = tfm_transformer_forward(c, &t, some_ids(c, 2, 7, 100, 1), some_ids(c, 2, 5, 1000, 2), &o);
    assert_made(c, y);
    cr_assert(y->ndim == 3 && y->shape[0] == 2 && y->shape[1] == 5 && y->shape[2] == 1000);
    cr_assert(tfm_item(tfm_max(c, y, tfm_shape_of(0, NULL), 0)) <= 0);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* (batch, length, size) fed to a module that takes (length, batch, size): it attended across the batch. */
Test(seed_faults, D26_rows_of_a_batch_never_see_each_other) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha_config g = heads_of(16, 4);
    tfm_mha l;
    tfm_tensor *x = some(c, TFM_SHAPE(3, 5, 16), 1), *before, *after;
    assert_ok(c, tfm_mha_init(c, p, "", &g, &l));
    before = tfm_mha_forward(c, &l, x, x, x, NULL);
    assert_made(c, before);
    test_fill((float *)x->data + 5 * 16, 10 * 16, 99); /* rows 1 and 2 change */
    after = tfm_mha_forward(c, &l, x, x, x, NULL);
    assert_same_values(c, tfm_narrow(c, after, 0, 0, 1), tfm_narrow(c, before, 0, 0, 1));
    cr_assert(differ(c, tfm_narrow(c, after, 0, 1, 1), tfm_narrow(c, before, 0, 1, 1)));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* No sqrt(d_model) on embeddings, no padding mask, no causal mask. */
Test(seed_faults, D27_embedding_scale_padding_and_causal_order_are_there) {
    static const int64_t lengths[2] = {6, 3};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g = model_of(TFM_DECODER_ONLY, 0, 13);
    tfm_transformer t;
    tfm_transformer_options o;
    tfm_tensor *ids = some_ids(c, 2, 6, 13, 1), *y, *z;
    g.scale_embedding = 1;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
    y = tfm_embedding_forward(c, &t.target_embedding, ids);
    assert_same_values(c, y, tfm_scale(c, tfm_embedding(c, t.target_embedding.weight, ids), 4)); /* sqrt(16) */
    memset(&o, 0, sizeof o);
    o.target_mask.key_lengths = lengths_of(c, 2, lengths);
    y = tfm_transformer_forward(c, &t, NULL, ids, &o);
    ((int64_t *)ids->data)[6 + 4] = (((int64_t *)ids->data)[6 + 4] + 1) % 13; /* padding changes */
    ((int64_t *)ids->data)[5] = (((int64_t *)ids->data)[5] + 1) % 13;         /* the last real id of row 0 changes */
    z = tfm_transformer_forward(c, &t, NULL, ids, &o);
    assert_same_values(c, tfm_narrow(c, tfm_narrow(c, z, 0, 1, 1), 1, 0, 3),
                       tfm_narrow(c, tfm_narrow(c, y, 0, 1, 1), 1, 0, 3));
    assert_same_values(c, tfm_narrow(c, tfm_narrow(c, z, 0, 0, 1), 1, 0, 5),
                       tfm_narrow(c, tfm_narrow(c, y, 0, 0, 1), 1, 0, 5));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* zeros with [:3, :3] = 1 as "the mask". */
Test(seed_faults, D28_upper_triangle_as_ignore_is_causal_and_a_block_of_ones_is_not) {
    tfm_ctx *c = context_of(1);
    tfm_tensor *q = some(c, TFM_SHAPE(1, 2, 5, 8), 1), *causal, *block, *upper;
    tfm_attention_options o;
    int64_t at[2];
    memset(&o, 0, sizeof o);
    o.mask = tfm_mask_causal();
    causal = tfm_attention(c, q, q, q, &o);
    upper = tfm_compare_scalar(c, tfm_triu(c, tfm_ones(c, TFM_SHAPE(5, 5)), 1), 0, TFM_NE);
    o.mask = tfm_mask_ignore(upper);
    assert_same_values(c, tfm_attention(c, q, q, q, &o), causal);
    block = tfm_zeros(c, TFM_SHAPE(5, 5));
    for (at[0] = 0; at[0] < 3; at[0]++)
        for (at[1] = 0; at[1] < 3; at[1]++) assert_ok(c, tfm_set(c, block, at, 1));
    o.mask = tfm_mask_nonzero(block);
    cr_assert(differ(c, tfm_attention(c, q, q, q, &o), causal));
    /* its last rows attend to nothing: zeros, not NaN */
    cr_assert_eq(tfm_item(tfm_sum(c, tfm_abs(c, tfm_narrow(c, tfm_attention(c, q, q, q, &o), 2, 3, 2)),
                                  tfm_shape_of(0, NULL), 0)),
                 0);
    tfm_destroy(c);
}

#if !defined(TFM_NO_STDIO)
/* GNMT and seq2seq 2014 called Transformers, Tacotron 2 misplaced, masks "for robustness". */
Test(seed_faults, D29_our_texts_do_not_repeat_them) {
    static const char *const files[] = {"transformer.h", "README.md"};
    static const char *const words[] = {"Tacotron", "DALL", "GNMT is", "robustness of the model",
                                        "multi-layer digital network"};
    size_t i, j;
    int read = 0;
    for (i = 0; i < 2; i++) {
        char *text = test_read_file(files[i], NULL);
        if (!text) continue;
        read++;
        for (j = 0; j < sizeof words / sizeof words[0]; j++)
            cr_expect(!strstr(text, words[j]), "%s says \"%s\"", files[i], words[j]);
        free(text);
    }
    if (!read) cr_skip_test("not started in the repository");
}
#endif

/* translate: a trained encoder-decoder from a safetensors file with another project's names.
 *
 *     cc -O2 -I. examples/translate.c -o translate -lm
 *     translate MODEL.safetensors SOURCE_VOCAB TARGET_VOCAB "a b c" [--beam N] [--heatmap out.svg]
 *
 * The table of rules below is all that it takes to load CTranslate2's names into tfm_transformer. Printed are the
 * translation and the log-probability of each of its tokens; the picture shows where the decoder looked. */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BEGIN = 1, END = 2, MOST = 200 }; /* <s> and </s> of the target vocabulary; the longest word */

/* "*" is the layer, or weight / bias. Cross-attention's fused in_proj comes in two parts: queries; keys and values. */
static const tfm_rule rules[] = {
    {TFM_RULE_RENAME, "encoder/embeddings/weight", "src_embedding.weight", 0, 0},
    {TFM_RULE_RENAME, "decoder/embeddings/weight", "tgt_embedding.weight", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_norm/gamma", "*coder.norm.weight", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_norm/beta", "*coder.norm.bias", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_*/self_attention/layer_norm/gamma", "*coder.layers.*.norm1.weight", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_*/self_attention/layer_norm/beta", "*coder.layers.*.norm1.bias", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_*/self_attention/linear_0/*", "*coder.layers.*.self_attn.in_proj_*", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_*/self_attention/linear_1/*", "*coder.layers.*.self_attn.out_proj.*", 0, 0},
    {TFM_RULE_RENAME, "decoder/layer_*/attention/layer_norm/gamma", "decoder.layers.*.norm2.weight", 0, 0},
    {TFM_RULE_RENAME, "decoder/layer_*/attention/layer_norm/beta", "decoder.layers.*.norm2.bias", 0, 0},
    {TFM_RULE_CONCAT, "decoder/layer_*/attention/linear_0/*", "decoder.layers.*.multihead_attn.in_proj_*", 0, 2},
    {TFM_RULE_CONCAT, "decoder/layer_*/attention/linear_1/*", "decoder.layers.*.multihead_attn.in_proj_*", 1, 2},
    {TFM_RULE_RENAME, "decoder/layer_*/attention/linear_2/*", "decoder.layers.*.multihead_attn.out_proj.*", 0, 0},
    {TFM_RULE_RENAME, "encoder/layer_*/ffn/layer_norm/gamma", "encoder.layers.*.norm2.weight", 0, 0},
    {TFM_RULE_RENAME, "encoder/layer_*/ffn/layer_norm/beta", "encoder.layers.*.norm2.bias", 0, 0},
    {TFM_RULE_RENAME, "decoder/layer_*/ffn/layer_norm/gamma", "decoder.layers.*.norm3.weight", 0, 0},
    {TFM_RULE_RENAME, "decoder/layer_*/ffn/layer_norm/beta", "decoder.layers.*.norm3.bias", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_*/ffn/linear_0/*", "*coder.layers.*.linear1.*", 0, 0},
    {TFM_RULE_RENAME, "*coder/layer_*/ffn/linear_1/*", "*coder.layers.*.linear2.*", 0, 0},
    {TFM_RULE_RENAME, "decoder/projection/*", "generator.*", 0, 0},
};

/* Sizes are read from the tensors; what a tensor cannot say stands here. */
static tfm_status load(tfm_ctx *c, tfm_params *p, const char *path, tfm_transformer *model) {
    tfm_load_options o = {0};
    tfm_transformer_config config = {0};
    const tfm_tensor *source, *target, *linear1;
    o.rules = rules;
    o.rule_count = sizeof rules / sizeof rules[0];
    if (tfm_params_load(c, p, path, &o)) return tfm_status_of(c);
    source = tfm_params_find(p, "src_embedding.weight"); /* may have more rows than its vocabulary has lines */
    target = tfm_params_find(p, "tgt_embedding.weight");
    linear1 = tfm_params_find(p, "encoder.layers.0.linear1.weight");
    if (source) config.source_vocab = source->shape[0];
    if (target) config.target_vocab = target->shape[0];
    if (linear1) config.block.d_model = linear1->shape[1], config.block.d_ff = linear1->shape[0];
    config.block.heads = 8;
    config.block.norm_first = 1;
    config.encoder_layers = config.decoder_layers = 6;
    config.head_bias = 1;
    config.scale_embedding = 1;
    config.position = TFM_POSITION_SINUSOIDAL_HALVES;
    config.position_start = 1;
    tfm_params_strict(p, 1); /* a tensor that is not in the file is an error, not a random one */
    if (tfm_transformer_init(c, p, "", &config, model)) return tfm_status_of(c);
    return tfm_params_prepare(c, p);
}

static const char *piece(const tfm_tokenizer *t, int64_t id) { return tfm_tokenizer_piece(t, -1, id, NULL); }

/* The cross-attention of the last layer, mean over heads: which source token each target token looked at. */
static tfm_status draw(tfm_ctx *c, const tfm_transformer *model, const tfm_tokenizer *source, const int64_t *ids,
                       int64_t count, const tfm_tokenizer *target, const tfm_sequence *out, const char *path) {
    tfm_transformer_options o = {0};
    tfm_heatmap_options map = {0};
    tfm_tensor *weights = NULL, *x, *y;
    const char *rows[MOST], *columns[MOST], *svg;
    int64_t fed[MOST], i;
    for (i = 0; i < out->count; i++) {
        fed[i] = i ? out->ids[i - 1] : BEGIN;
        rows[i] = piece(target, out->ids[i]);
    }
    for (i = 0; i < count; i++) columns[i] = piece(source, ids[i]);
    o.weights = &weights;
    x = tfm_from(c, TFM_I64, TFM_SHAPE(1, count), ids);
    y = tfm_from(c, TFM_I64, TFM_SHAPE(1, out->count), fed);
    if (!tfm_transformer_forward(c, model, x, y, &o)) return tfm_status_of(c);
    map.row_labels = rows;
    map.column_labels = columns;
    svg = tfm_heatmap_svg(c, tfm_select(c, tfm_mean(c, weights, TFM_SHAPE(1), 0), 0, 0), &map);
    return svg ? tfm_write_file(c, path, svg, (int64_t)strlen(svg)) : tfm_status_of(c);
}

static tfm_status translate(tfm_ctx *c, tfm_params *p, char **argv, int64_t beams, const char *picture) {
    static const int64_t begin = BEGIN, end = END;
    tfm_transformer model;
    tfm_session_options room = {0};
    tfm_beam_options o = {0};
    tfm_session *session = NULL;
    tfm_prompt start = {1, &begin};
    tfm_sequence out;
    int64_t *ids, count, i;
    const char *text;
    tfm_tokenizer *source = tfm_tokenizer_lines(c, argv[2], -1), *target = tfm_tokenizer_lines(c, argv[3], -1);
    tfm_status status = load(c, p, argv[1], &model);
    room.batch = beams; /* a row a beam, each with the same source; one beam is greedy search */
    room.capacity = o.max_new = MOST;
    o.beams = beams;
    o.stop_ids = &end;
    o.stop_id_count = 1;
    o.length_penalty = TFM_LENGTH_GNMT;
    o.alpha = 0.6f;
    if (!status) status = tfm_tokenizer_encode(c, source, argv[4], 0, 0, &ids, &count);
    if (!status) session = tfm_session_create(c, &model, &room);
    if (session) {
        tfm_tensor *word = tfm_expand(c, tfm_from(c, TFM_I64, TFM_SHAPE(1, count), ids), TFM_SHAPE(beams, count));
        status = tfm_session_encode(c, session, tfm_contiguous(c, word), NULL);
        if (!status) status = tfm_beam_search(c, session, &start, 1, &o, &out);
        text = status ? NULL : tfm_tokenizer_decode(c, target, out.ids, out.count);
        if (text) printf("%s  (score %.6f)\n", text, out.score);
        else status = tfm_status_of(c);
        for (i = 0; !status && i < out.count; i++)
            printf("  %-8s %.6f\n", piece(target, out.ids[i]), (double)out.log_probabilities[i]);
        if (!status && picture) status = draw(c, &model, source, ids, count, target, &out, picture);
    }
    tfm_session_destroy(session);
    tfm_tokenizer_destroy(source);
    tfm_tokenizer_destroy(target);
    return tfm_status_of(c);
}

int main(int argc, char **argv) {
    const char *picture = NULL;
    int64_t beams = 1;
    tfm_ctx *c;
    tfm_params *p;
    char *end;
    int i, failed;
    for (i = 5; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--heatmap")) { picture = argv[i + 1]; continue; }
        if (strcmp(argv[i], "--beam")) break;
        beams = strtoll(argv[i + 1], &end, 10);
        if (*end || beams < 1) break;
    }
    if (argc < 5 || i != argc) {
        fprintf(stderr, "usage: translate MODEL SOURCE_VOCAB TARGET_VOCAB \"a b c\" [--beam N] [--heatmap out.svg]\n");
        return 2;
    }
    c = tfm_create(NULL);
    p = tfm_params_create(c);
    failed = !p || translate(c, p, argv, beams, picture);
    if (failed) fprintf(stderr, "translate: %s\n", tfm_error(c));
    tfm_params_destroy(p);
    tfm_destroy(c);
    return failed || fflush(stdout) || ferror(stdout);
}

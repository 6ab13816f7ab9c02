/* Tags each token of the sequences in a file (one line of ids each): the best tag of every token, a line out.
 *
 *   cc -O2 -I. examples/tag.c -o tag -lm
 *   echo "5 7 12 3" > ids.txt && ./tag ids.txt [MODEL.safetensors]
 *
 * Without a model file the weights are random: it shows the plumbing, not knowledge. */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include "ids.h"

enum { TAGS = 5 };

int main(int argc, char **argv) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_params *p = c ? tfm_params_create(c) : NULL;
    tfm_transformer_config config;
    tfm_transformer model;
    tfm_classifier head;
    tfm_transformer_options options;
    tfm_tensor *ids, *lengths, *x, *y;
    int bad = 1;

    memset(&config, 0, sizeof config);
    memset(&options, 0, sizeof options);
    config.kind = TFM_ENCODER_ONLY;
    config.position = TFM_POSITION_LEARNED;
    config.block.d_model = 64; config.block.heads = 4; config.block.d_ff = 256; config.block.activation = TFM_ACT_GELU;
    config.encoder_layers = 2;
    config.source_vocab = 1000;
    config.no_head = 1;
    if (argc < 2 || argv[1][0] == '-') { fprintf(stderr, "usage: tag IDS.txt [MODEL.safetensors]\n"); goto done; }
    if (!p || (argc > 2 && tfm_params_load(c, p, argv[2], NULL))) goto done;
    tfm_params_strict(p, argc > 2);
    if (tfm_transformer_init(c, p, "", &config, &model)
        || tfm_classifier_init(c, p, "classifier", config.block.d_model, TAGS, TFM_POOL_MEAN, 1, &head))
        goto done;
    if (read_ids(c, argv[1], &ids, &lengths)) goto done;

    options.source_mask = tfm_mask_padding(lengths);
    x = tfm_transformer_encode(c, &model, ids, &options);                       /* (B, L, d_model) */
    y = tfm_argmax(c, tfm_classifier_forward(c, &head, x, lengths), -1, 0);     /* (B, L) */
    if (!y) goto done;
    for (int64_t b = 0; b < y->shape[0]; b++) {
        int64_t at[2] = {0, 0}, count = (int64_t)tfm_get(lengths, &b);
        for (at[0] = b; at[1] < count; at[1]++) printf("%s%d", at[1] ? " " : "", (int)tfm_get(y, at));
        printf("\n");
    }
    bad = 0;
done:
    if (bad && tfm_error(c)[0]) fprintf(stderr, "%s\n", tfm_error(c));
    tfm_params_destroy(p);
    tfm_destroy(c);
    return bad || fflush(stdout) || ferror(stdout);
}

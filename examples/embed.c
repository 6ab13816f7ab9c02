/* Turns sequences of token ids (one line each) into vectors of length 1, and prints how alike they are (cosine).
 *
 *   cc -O2 -I. examples/embed.c -o embed -lm
 *   echo "5 7 12 3" > ids.txt && ./embed ids.txt [MODEL.safetensors]
 *
 * Without a model file the weights are random: equal lines are still equal, the rest is chance. */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include "ids.h"

int main(int argc, char **argv) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_params *p = c ? tfm_params_create(c) : NULL;
    tfm_transformer_config config;
    tfm_transformer model;
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
    if (argc < 2 || argv[1][0] == '-') { fprintf(stderr, "usage: embed IDS.txt [MODEL.safetensors]\n"); goto done; }
    if (!p || (argc > 2 && tfm_params_load(c, p, argv[2], NULL))) goto done;
    tfm_params_strict(p, argc > 2);
    if (tfm_transformer_init(c, p, "", &config, &model)) goto done;
    if (read_ids(c, argv[1], &ids, &lengths)) goto done;

    options.source_mask = tfm_mask_padding(lengths);
    x = tfm_transformer_encode(c, &model, ids, &options);                       /* (B, L, d_model) */
    x = tfm_l2_normalize(c, tfm_pool(c, x, lengths, TFM_POOL_MEAN));            /* (B, d_model) */
    y = tfm_matmul(c, x, tfm_transpose(c, x, 0, 1));                            /* (B, B) */
    if (!y) goto done;
    for (int64_t i = 0; i < y->shape[0]; i++) {
        for (int64_t j = 0; j < y->shape[1]; j++) {
            int64_t at[2];
            at[0] = i;
            at[1] = j;
            printf("%s%7.4f", j ? " " : "", tfm_get(y, at));
        }
        printf("\n");
    }
    bad = 0;
done:
    if (bad && tfm_error(c)[0]) fprintf(stderr, "%s\n", tfm_error(c));
    tfm_params_destroy(p);
    tfm_destroy(c);
    return bad || fflush(stdout) || ferror(stdout);
}

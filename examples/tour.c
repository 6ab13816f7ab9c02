/* A sentence walks through a Transformer, step by step. Needs no file. Writes tour.svg with the attention heat map.
 *
 *   cc -O2 -I. examples/tour.c -o tour -lm && ./tour
 *
 * Every shape and number on the screen is read from a tensor that the library just computed. */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include <string.h>

static const char *words[] = {"<start>", "the", "cat", "sat", "on", "mat", "dog", "saw", "<end>"};
enum { VOCABULARY = 9, D_MODEL = 16, HEADS = 4, LENGTH = 6 };

static const char *shape(const tfm_tensor *t) {
    static char text[4][64];
    static int turn;
    char *s = text[turn++ & 3];
    size_t n = (size_t)snprintf(s, 64, "(");
    for (int i = 0; t && i < t->ndim; i++)
        n += (size_t)snprintf(s + n, 64 - n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    snprintf(s + n, 64 - n, ")");
    return t ? s : "(error)";
}

static void step(int number, const char *title) {
    printf("\n\n%d. %s\n", number, title);
    for (size_t i = 0; i < strlen(title) + 3; i++) putchar('-');
    puts("");
}

static void numbers(const char *name, const tfm_tensor *t, int64_t row) { /* the first six of a row of (1, L, d) */
    int64_t at[3] = {0, row, 0};
    printf("   %-22s", name);
    for (at[2] = 0; at[2] < 6; at[2]++) printf("%7.2f", tfm_get(t, at));
    puts(" ...");
}

static void draw_mask(tfm_ctx *c, const char *title, const tfm_mask *mask) {
    tfm_tensor *m = tfm_mask_matrix(c, mask, 1, 1, LENGTH, LENGTH);
    printf("   %s, shape %s\n", title, shape(m));
    for (int64_t i = 0; m && i < LENGTH; i++) {
        printf("      ");
        for (int64_t at[4] = {0, 0, i, 0}; at[3] < LENGTH; at[3]++) printf("%s", tfm_get(m, at) < 0 ? " ." : " #");
        puts("");
    }
}

int main(void) {
    static const int64_t sentence[LENGTH] = {1, 2, 3, 4, 1, 5};         /* the cat sat on the mat */
    static const int64_t start[3] = {0, 1, 6};                          /* <start> the dog */
    const char *labels[LENGTH];
    tfm_ctx *c = tfm_create(NULL);
    tfm_params *p = c ? tfm_params_create(c) : NULL;
    tfm_transformer_config config = {0};
    tfm_transformer model;
    tfm_attention_options attention = {0};
    tfm_mha_options heads = {0};
    tfm_transformer_options whole = {0};
    tfm_heatmap_options look = {0};
    tfm_tensor *ids, *x, *positions, *weights = NULL, *y, *memory, *target, *probabilities;
    tfm_mask causal = tfm_mask_causal(), padding, none = {0};
    static const int64_t real[1] = {4};
    const char *svg;
    int bad;

    config.position = TFM_POSITION_SINUSOIDAL;
    config.block.d_model = D_MODEL; config.block.heads = HEADS; config.block.d_ff = 4 * D_MODEL;
    config.encoder_layers = config.decoder_layers = 2;
    config.source_vocab = config.target_vocab = VOCABULARY;
    if (!p || tfm_transformer_init(c, p, "", &config, &model)) goto failed;
    printf("transformer.h %d.%d.%d on this machine: instruction set %s, %d thread(s)\n", TFM_VERSION_MAJOR,
           TFM_VERSION_MINOR, TFM_VERSION_PATCH, tfm_isa_name(c), tfm_threads(c));

    step(1, "Words become numbers (tokens)");
    ids = tfm_from(c, TFM_I64, TFM_SHAPE(1, LENGTH), sentence);
    for (int i = 0; i < LENGTH; i++) {
        labels[i] = words[sentence[i]];
        printf("   %s -> %lld\n", labels[i], (long long)sentence[i]);
    }
    printf("   ids %s: one sentence of %d tokens, \"the\" has one number both times.\n", shape(ids), LENGTH);

    step(2, "Each number becomes a vector (embedding), and its place is added (position)");
    x = tfm_embedding_forward(c, &model.source_embedding, ids);
    positions = tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 0, LENGTH, D_MODEL);
    printf("   the table has a row for each of the %lld words: %s; looked up: %s\n",
           (long long)model.source_embedding.weight->shape[0], shape(model.source_embedding.weight), shape(x));
    numbers("\"the\" (place 0)", x, 0);
    numbers("\"the\" (place 4)", x, 4);
    x = tfm_add(c, x, positions);
    puts("   equal so far; sines and cosines of the place tell them apart:");
    numbers("\"the\" + place 0", x, 0);
    numbers("\"the\" + place 4", x, 4);

    step(3, "Each token looks at the others (attention)");
    puts("   softmax(Q K^T / sqrt(d)) V: how alike is my query to each key? That much of its value I take.");
    attention.weights = &weights;
    y = tfm_unsqueeze(c, x, 1);
    y = tfm_attention(c, y, y, y, &attention);
    printf("   here Q = K = V = the vectors %s, the weights are %s; every row sums to 1:\n\n", shape(x),
           shape(weights));
    look.row_labels = look.column_labels = labels;
    look.title = "who looks (row) at whom (column)";
    weights = tfm_select(c, tfm_select(c, weights, 0, 0), 0, 0);
    if (!weights) goto failed;
    puts(tfm_heatmap_text(c, weights, &look));

    step(4, "Masks say who may look at whom (# yes, . no)");
    padding = tfm_mask_padding(tfm_from(c, TFM_I64, TFM_SHAPE(1), real));
    draw_mask(c, "no mask", &none);
    draw_mask(c, "causal: a writer does not see what comes later", &causal);
    draw_mask(c, "padding: only the first 4 tokens are real", &padding);

    step(5, "Several heads look for different things (multi-head attention)");
    heads.mask = causal; heads.need_weights = 2; heads.weights = &weights;
    y = tfm_mha_forward(c, &model.encoder.layers[0].self_attn, x, x, x, &heads);
    printf("   in %s -> %d heads of %d numbers, weights %s, causal -> out %s\n\n", shape(x), HEADS, D_MODEL / HEADS,
           shape(weights), shape(y));
    weights = tfm_select(c, tfm_select(c, weights, 0, 0), 0, 0);
    if (!weights) goto failed;
    look.title = "head 0, causal: the upper right is empty";
    puts(tfm_heatmap_text(c, weights, &look));
    svg = tfm_heatmap_svg(c, weights, &look);
    if (!svg || tfm_write_file(c, "tour.svg", svg, (int64_t)strlen(svg))) goto failed;
    puts("   the same as a picture: tour.svg");

    step(6, "A stack of layers reads the sentence (encoder)");
    memory = tfm_transformer_encode(c, &model, ids, NULL);
    if (!memory) goto failed;
    printf("   %lld layers, each: attention, add, norm, feed-forward, add, norm. %s -> %s\n",
           (long long)model.encoder.count, shape(ids), shape(memory));
    numbers("\"cat\" in context", memory, 1);

    step(7, "Another stack writes an answer, word by word (decoder)");
    target = tfm_from(c, TFM_I64, TFM_SHAPE(1, 3), start);
    whole.output = TFM_OUTPUT_SOFTMAX;
    probabilities = tfm_transformer_decode(c, &model, target, memory, &whole);
    if (!probabilities) goto failed;
    printf("   it has written \"<start> the dog\" %s, sees the memory %s, and gives each next word a probability: %s\n",
           shape(target), shape(memory), shape(probabilities));
    for (int64_t v = 0; v < VOCABULARY; v++) {
        int64_t at[3] = {0, 2, v};
        printf("      %-8s %5.1f %% ", words[v], 100 * tfm_get(probabilities, at));
        for (int bar = 0; bar < (int)(100 * tfm_get(probabilities, at)); bar++) putchar('#');
        puts("");
    }
    printf("   sum of the row: %.6f\n",
           tfm_item(tfm_sum(c, tfm_select(c, tfm_select(c, probabilities, 0, 0), 0, 2), tfm_shape_of(0, NULL), 0)));
    puts("\n   The weights of this model are random, so the answer is a guess. Training makes it a good one; the "
         "shapes stay the same.");
failed:
    if (tfm_error(c)[0]) fprintf(stderr, "%s\n", tfm_error(c));
    tfm_params_destroy(p);
    bad = tfm_status_of(c) != TFM_OK || fflush(stdout) || ferror(stdout);
    tfm_destroy(c);
    return bad;
}

/* Every kind of mask, drawn: '#' attended, '.' not, a number where the score gets a bias. (softcap and sinks change the
 * scores and their sum, but mask nothing.)
 *
 *   cc -O2 -I. examples/masks.c -o masks -lm && ./masks */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include <math.h>
#include <string.h>

enum { QUERIES = 6, KEYS = 8 };

static int draw(tfm_ctx *c, const char *title, const tfm_mask *mask) {
    tfm_tensor *m = tfm_mask_matrix(c, mask, 1, 1, QUERIES, KEYS);
    if (!m) return 1;
    printf("%s\n", title);
    for (int64_t i = 0; i < QUERIES; i++) {
        for (int64_t j = 0; j < KEYS; j++) {
            int64_t at[4] = {0, 0, i, j};
            double x = tfm_get(m, at);
            if (isinf(x)) printf("     .");
            else if (x == 0) printf("     #");
            else printf(" %5.2f", x);
        }
        printf("\n");
    }
    printf("\n");
    return 0;
}

static tfm_tensor *ids(tfm_ctx *c, int64_t n, const int64_t *values) {
    return tfm_from(c, TFM_I64, TFM_SHAPE(1, n), values);
}

int main(void) {
    static const int64_t query_segments[QUERIES] = {0, 0, 0, 1, 1, 1}, key_segments[KEYS] = {0, 0, 0, 1, 1, 1, 2, 2},
                         five[1] = {5};
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *checker = tfm_empty(c, TFM_BOOL, TFM_SHAPE(QUERIES, KEYS)),
               *length = tfm_from(c, TFM_I64, TFM_SHAPE(1), five), *bias;
    tfm_mask m[16];
    int bad = 0;
    memset(m, 0, sizeof m);
    for (int64_t i = 0; checker && i < QUERIES * KEYS; i++) {
        int64_t at[2];
        at[0] = i / KEYS; at[1] = i % KEYS;
        bad |= tfm_set(c, checker, at, (double)((at[0] + at[1]) % 2));
    }
    bias = tfm_triu(c, tfm_full(c, TFM_F32, TFM_SHAPE(QUERIES, KEYS), -INFINITY), 1);

    m[0].causal = TFM_CAUSAL_TOP_LEFT;
    m[1].causal = TFM_CAUSAL_BOTTOM_RIGHT;
    m[2].causal = TFM_CAUSAL_OFFSET; m[2].offset = 1;
    m[3].window_left = 2; m[3].window_right = 2;
    m[4].causal = TFM_CAUSAL_BOTTOM_RIGHT; m[4].window_left = 3;
    m[5].key_lengths = length;
    m[6].query_segments = ids(c, QUERIES, query_segments); m[6].key_segments = ids(c, KEYS, key_segments);
    m[7].causal = TFM_CAUSAL_TOP_LEFT; m[7].prefix = 4;
    m[8].keep = checker;
    m[9].ignore = checker;
    m[10].bias = bias;
    m[11].alibi_slopes = tfm_alibi_slopes(c, 1); m[11].causal = TFM_CAUSAL_BOTTOM_RIGHT;
    m[12].nonzero = tfm_arange(c, TFM_I64, 0, KEYS, 1);
    m[13].query_lengths = length;
    m[14].relative_bias = tfm_reshape(c, tfm_arange(c, TFM_F32, 0, 8, 1), TFM_SHAPE(8, 1));
    m[15].causal = TFM_CAUSAL_BOTTOM_RIGHT; m[15].key_lengths = length; m[15].keep = checker;
    bad = bad || draw(c, "causal, top-left: query i sees keys 0..i (PyTorch's is_causal)", &m[0])
        || draw(c, "causal, bottom-right: the last query sees the last key (decoding with a cache)", &m[1])
        || draw(c, "causal, offset 1", &m[2])
        || draw(c, "window: two keys to the left and two to the right, the own one counted", &m[3])
        || draw(c, "sliding window of 3 with causal order", &m[4])
        || draw(c, "key_lengths 5: the rest is padding", &m[5])
        || draw(c, "segments 000111 x 00011122: packed sentences do not see each other", &m[6])
        || draw(c, "prefix 4: the prompt is seen by all, the rest is causal", &m[7])
        || draw(c, "keep: bool, true = attend", &m[8])
        || draw(c, "ignore: the same matrix, true = do not attend", &m[9])
        || draw(c, "bias: 0 / -inf, added to the scores", &m[10])
        || draw(c, "ALiBi: farther keys get a lower score", &m[11])
        || draw(c, "nonzero: 0 1 2 ..., 0 = do not attend", &m[12])
        || draw(c, "query_lengths 5: the queries behind are padding and give zeros", &m[13])
        || draw(c, "relative_bias: a table's row for each of 8 buckets of distance (T5), here their numbers", &m[14])
        || draw(c, "they combine: bottom-right causal and key_lengths 5 and keep", &m[15]);
    if (bad) fprintf(stderr, "%s\n", tfm_error(c));
    tfm_destroy(c);
    return bad || fflush(stdout) || ferror(stdout);
}

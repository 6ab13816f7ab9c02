/* The smallest program: causal attention over random tensors, printed as PyTorch prints a tensor.
 *
 *   cc -O2 -I. examples/attention.c -o attention -lm && ./attention */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"

int main(void) {
    tfm_ctx *c = tfm_create(NULL);                                     /* NULL: every default */
    tfm_tensor *q = tfm_randn(c, TFM_SHAPE(1, 12, 128, 64));           /* (batch, heads, length, head size) */
    tfm_tensor *k = tfm_randn(c, TFM_SHAPE(1, 12, 128, 64));
    tfm_tensor *v = tfm_randn(c, TFM_SHAPE(1, 12, 128, 64));
    tfm_attention_options o = {0};
    tfm_tensor *y;
    o.mask.causal = TFM_CAUSAL_TOP_LEFT;
    y = tfm_attention(c, q, k, v, &o);
    if (!y || tfm_print(c, stdout, y)) {                               /* first error of the whole program so far */
        fprintf(stderr, "%s\n", tfm_error(c));
        tfm_destroy(c);
        return 1;
    }
    tfm_destroy(c);
    return fflush(stdout) || ferror(stdout);                           /* 1: it could not be written */
}

/* Times libxsmm for bench/peers.py: one kernel compiled at run time for exactly this product, so only small ones
 * (libxsmm leaves large ones to a BLAS). Row-major C = A B is column-major C^T = B^T A^T. See peer.h.
 *
 * cc -O2 bench/peers_libxsmm.c -o peers_libxsmm -lxsmm -lblas */
#define PEER_NAME "libxsmm"
#include <libxsmm.h>
#include "peer.h"

static float *a, *b, *c;
static libxsmm_smmfunction kernel;

static int peer_prepare(peer_job *job) {
    int64_t m = job->shape[0], n = job->shape[1], k = job->shape[2];
    const float one = 1, zero = 0;
    if (strcmp(job->op, "matmul") || strcmp(job->dtype, "f32") || job->sizes != 3 || job->transpose) return 1;
    if (m * n * k > 128 * 128 * 128) return 1;
    libxsmm_init();
    kernel = libxsmm_smmdispatch((int)n, (int)m, (int)k, NULL, NULL, NULL, &one, &zero, NULL, NULL);
    a = peer_random(m * k);
    b = peer_random(k * n);
    c = peer_random(m * n);
    job->flops = 2.0 * (double)m * (double)n * (double)k;
    return kernel == NULL;
}

static void peer_call(peer_job *job) {
    (void)job;
    kernel(b, a, c);
}

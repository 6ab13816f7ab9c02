/* Times sgemm of a BLAS for bench/peers.py: matmul and linear (which BLAS cannot prepare a weight for). See peer.h.
 *
 * cc -O2 -DPEER_NAME='"openblas"' bench/peers_blas.c -o peers_openblas -lopenblas
 * cc -O2 -DPEER_NAME='"blis"' -I/usr/include/ARCH/blis-openmp bench/peers_blas.c -o peers_blis -lblis */
#if !defined(PEER_NAME)
#define PEER_NAME "openblas"
#endif
#include <cblas.h>
#include "peer.h"

static float *a, *b, *c;

static int peer_prepare(peer_job *job) {
    int64_t m = job->shape[0], n = job->shape[1], k = job->shape[2];
    int linear = !strcmp(job->op, "linear");
    if ((!linear && strcmp(job->op, "matmul")) || strcmp(job->dtype, "f32") || job->sizes != 3) return 1;
    job->transpose |= linear;                          /* a weight is (out, in) */
    a = peer_random(m * k);
    b = peer_random(k * n);
    c = peer_random(m * n);
    job->flops = 2.0 * (double)m * (double)n * (double)k;
    return 0;
}

static void peer_call(peer_job *job) {
    int m = (int)job->shape[0], n = (int)job->shape[1], k = (int)job->shape[2];
    if (job->transpose && m == 1) cblas_sgemv(CblasRowMajor, CblasNoTrans, n, k, 1, b, k, a, 1, 0, c, 1);
    else cblas_sgemm(CblasRowMajor, CblasNoTrans, job->transpose ? CblasTrans : CblasNoTrans, m, n, k, 1, a, k, b,
                     job->transpose ? k : n, 0, c, n);
}

/* What the programs that time other libraries share: the command line and the output of bench/bench.c, so that
 * bench/peers.py can alternate them with ours.
 *
 *   PROGRAM OP [--shape a,b,...] [--threads N] [--dtype f32|f16|bf16] [--causal] [--kv-heads K] [--transpose] [--serve]
 *
 * A program says PEER_NAME and has peer_prepare, which makes the operands (0 on success; 1: the library has no such op)
 * and sets `flops`, and peer_call, which runs the op once. Operands hold uniform numbers in [-1, 1). */
#ifndef BENCH_PEER_H
#define BENCH_PEER_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PEER_RUNS 9
#define PEER_SECONDS 20e-3

typedef struct peer_job {
    const char *op, *dtype;
    int64_t shape[6], kv_heads;
    int sizes, threads, causal, transpose;
    double flops;
} peer_job;

static int peer_prepare(peer_job *job);
static void peer_call(peer_job *job);

static float *peer_random(int64_t count) {
    float *x = (float *)aligned_alloc(64, (size_t)(count * 4 + 63) / 64 * 64);
    uint32_t state = 2463534242u;
    if (!x) exit(1);
    for (int64_t i = 0; i < count; i++) {
        state ^= state << 13, state ^= state >> 17, state ^= state << 5;   /* Marsaglia's xorshift */
        x[i] = (float)state * 0x1p-31f - 1.0f;
    }
    return x;
}

static double peer_time(peer_job *job, int64_t calls) {
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int64_t i = 0; i < calls; i++) peer_call(job);
    clock_gettime(CLOCK_MONOTONIC, &b);
    return ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec)) / (double)calls;
}

static int peer_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void peer_serve(peer_job *job, double once, int64_t calls) {
    char line[64];
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (once < PEER_SECONDS) peer_call(job);   /* another program has had the caches */
        once = peer_time(job, calls);
        printf("%.6f\n", 1e3 * once);
        fflush(stdout);
    }
}

static void peer_report(peer_job *job, int64_t calls) {
    double seconds[PEER_RUNS];
    for (int i = 0; i < PEER_RUNS; i++) seconds[i] = peer_time(job, calls);
    qsort(seconds, PEER_RUNS, sizeof *seconds, peer_compare);
    printf("{\"peer\": \"" PEER_NAME "\", \"op\": \"%s\", \"shape\": [", job->op);
    for (int i = 0; i < job->sizes; i++) printf("%s%lld", i ? ", " : "", (long long)job->shape[i]);
    printf("], \"threads\": %d, \"dtype\": \"%s\", \"causal\": %s, \"ms\": %.6f, \"gflops\": %.3f}\n", job->threads,
           job->dtype, job->causal ? "true" : "false", 1e3 * seconds[PEER_RUNS / 2],
           1e-9 * job->flops / seconds[PEER_RUNS / 2]);
}

/* Libraries read the number of threads from the environment before main: set there, and begin again. */
static void peer_threads(const peer_job *job, char **argv) {
    static const char *const names[] = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS"};
    const char *now = getenv(names[0]);
    char text[16];
    snprintf(text, sizeof text, "%d", job->threads);
    if (now && !strcmp(now, text)) return;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) setenv(names[i], text, 1);
    execv("/proc/self/exe", argv);
}

int main(int argc, char **argv) {
    peer_job job;
    const char *shape = "512,512,512";
    int serving = 0;
    double once;
    int64_t calls;
    memset(&job, 0, sizeof job);
    job.op = argc > 1 ? argv[1] : "matmul";
    job.dtype = "f32";
    job.threads = 1;
    for (int i = 2; i < argc; i++) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(a, "--causal")) job.causal = 1;
        else if (!strcmp(a, "--transpose")) job.transpose = 1;
        else if (!strcmp(a, "--serve")) serving = 1;
        else if (!strcmp(a, "--shape")) { shape = value; i++; }
        else if (!strcmp(a, "--threads")) { job.threads = atoi(value); i++; }
        else if (!strcmp(a, "--kv-heads")) { job.kv_heads = atoi(value); i++; }
        else if (!strcmp(a, "--dtype")) { job.dtype = value; i++; }
        else { fprintf(stderr, "%s: unknown option %s\n", argv[0], a); return 2; }
    }
    peer_threads(&job, argv);
    for (const char *p = shape; job.sizes < 6 && *p; job.sizes++) {
        char *end;
        job.shape[job.sizes] = strtoll(p, &end, 10);
        if (end == p) return 2;
        p = *end ? end + 1 : end;
    }
    if (peer_prepare(&job)) { fprintf(stderr, PEER_NAME ": no %s of that kind\n", job.op); return 3; }
    peer_call(&job);                                   /* warm */
    once = peer_time(&job, 1);
    calls = once > PEER_SECONDS ? 1 : (int64_t)(PEER_SECONDS / (once > 1e-8 ? once : 1e-8)) + 1;
    if (serving) peer_serve(&job, once, calls);
    else peer_report(&job, calls);
    return 0;
}
#endif

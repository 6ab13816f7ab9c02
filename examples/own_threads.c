/* Your own threads do the work: options.parallel_for replaces the library's pool (a game's job system, OpenMP, ...).
 *
 *   cc -O2 -I. examples/own_threads.c -o own_threads -lm -lpthread && ./own_threads */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include <pthread.h>
#include <string.h>

enum { THREADS = 3 };

typedef struct job { void (*run)(void *arg, int i); void *arg; int i; } job;
static void *work(void *p) { job *j = (job *)p; j->run(j->arg, j->i); return NULL; }

static void parallel_for(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    pthread_t id[THREADS];
    job jobs[THREADS];
    int started[THREADS] = {0};
    (*(int *)user)++;
    for (int i = 0; i < count; i++) {
        jobs[i].run = run; jobs[i].arg = arg; jobs[i].i = i;
        started[i] = i > 0 && pthread_create(&id[i], NULL, work, &jobs[i]) == 0;
        if (i > 0 && !started[i]) run(arg, i);
    }
    run(arg, 0);
    for (int i = 1; i < count; i++) if (started[i]) pthread_join(id[i], NULL);
}

int main(void) {
    tfm_ctx *c[2];
    tfm_tensor *y[2] = {NULL, NULL};
    tfm_options options;
    int jobs = 0, equal;
    memset(&options, 0, sizeof options);
    options.threads = THREADS;
    for (int i = 0; i < 2; i++) {                                  /* the same work on the pool and on our threads */
        if (i) { options.parallel_for = parallel_for; options.parallel_user = &jobs; }
        c[i] = tfm_create(&options);
        y[i] = tfm_randn(c[i], TFM_SHAPE(1, 8, 512, 64));
        y[i] = tfm_attention(c[i], y[i], y[i], y[i], NULL);
        if (!y[i]) { fprintf(stderr, "%s\n", tfm_error(c[i])); return 1; }
    }
    equal = !memcmp(y[0]->data, y[1]->data, (size_t)tfm_numel(y[0]) * sizeof(float));
    printf("%d jobs ran on our %d threads; results are %s\n", jobs, THREADS,
           equal ? "bit for bit those of the pool" : "DIFFERENT");
    tfm_destroy(c[0]);
    tfm_destroy(c[1]);
    return !equal || jobs == 0 || fflush(stdout) || ferror(stdout);
}

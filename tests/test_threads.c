/* Threads: the same bits whatever their number, one context for one thread at a time, and no trace of them
 * afterwards. */
#define _GNU_SOURCE
#include "test.h"

#include <fenv.h>
#include <signal.h>
#include <time.h>
#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif

/* -- threads of our own -------------------------------------------------------------------------------------------- */

typedef struct thread {
    void (*run)(void *arg, int i);
    void *arg;
    int i, started;
#if defined(_WIN32)
    HANDLE id;
#else
    pthread_t id;
#endif
} thread;

#if defined(_WIN32)
static DWORD WINAPI thread_main(LPVOID arg) {
    thread *t = (thread *)arg;
    t->run(t->arg, t->i);
    return 0;
}
static int thread_start(thread *t) { return (t->id = CreateThread(NULL, 0, thread_main, t, 0, NULL)) != NULL; }
static void thread_join(thread *t) {
    WaitForSingleObject(t->id, INFINITE);
    CloseHandle(t->id);
}
static void pause_ms(int ms) { Sleep((DWORD)ms); }
#else
static void *thread_main(void *arg) {
    thread *t = (thread *)arg;
    t->run(t->arg, t->i);
    return NULL;
}
static int thread_start(thread *t) { return pthread_create(&t->id, NULL, thread_main, t) == 0; }
static void thread_join(thread *t) { pthread_join(t->id, NULL); }
static void pause_ms(int ms) {
    struct timespec time;
    time.tv_sec = ms / 1000;
    time.tv_nsec = ms % 1000 * 1000000L;
    nanosleep(&time, NULL);
}
#endif

/* run(arg, i) for i in [0, count), each on a thread of its own. */
static void on_threads(int count, void (*run)(void *arg, int i), void *arg) {
    thread t[16];
    int i;
    for (i = 0; i < count; i++) {
        t[i].run = run;
        t[i].arg = arg;
        t[i].i = i;
        t[i].started = thread_start(&t[i]);
        if (!t[i].started) run(arg, i);
    }
    for (i = 0; i < count; i++)
        if (t[i].started) thread_join(&t[i]);
}

static double seconds(void) {
#if defined(_WIN32)
    return 1e-3 * (double)GetTickCount();
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#endif
}

static tfm_options with_threads(int threads) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = threads;
    o.seed = 17;
    return o;
}

static tfm_ctx *context_with(const tfm_options *o) {
    tfm_ctx *c = tfm_create(o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "no context: %s", tfm_error(c));
    return c;
}

static tfm_ctx *threaded(int threads) {
    const tfm_options o = with_threads(threads);
    return context_with(&o);
}

/* -- what is computed ---------------------------------------------------------------------------------------------- */

/* Numbers in [-1, 1) that do not come from the library. */
static tfm_tensor *some(tfm_ctx *c, tfm_shape shape, uint64_t seed) {
    tfm_tensor *t = tfm_empty(c, TFM_F32, shape);
    if (t) test_fill((float *)t->data, tfm_numel(t), seed);
    return t;
}

static tfm_tensor *some_ids(tfm_ctx *c, int64_t count, int64_t limit) {
    tfm_tensor *t = tfm_empty(c, TFM_I32, tfm_shape1(count));
    int64_t i;
    for (i = 0; t && i < count; i++) ((int32_t *)t->data)[i] = (int32_t)(i * 2654435761u % (uint64_t)limit);
    return t;
}

/* Large enough that seven slots pay off; smaller under an emulator or a sanitizer, where two or three do. */
static int64_t size(int64_t large) { return test_quick() ? (large + 3) / 4 : large; }

static tfm_tensor *do_matmul(tfm_ctx *c) {
    return tfm_matmul(c, some(c, TFM_SHAPE(size(203), size(301)), 1), some(c, TFM_SHAPE(size(301), size(187)), 2));
}
static tfm_tensor *do_matmul_batched(tfm_ctx *c) {
    return tfm_matmul(c, some(c, TFM_SHAPE(3, 1, size(65), 40), 1),
                      tfm_transpose(c, some(c, TFM_SHAPE(4, size(77), 40), 2), 1, 2));
}
static tfm_tensor *do_matmul_one_row(tfm_ctx *c) {
    return tfm_matmul(c, some(c, TFM_SHAPE(1, size(1000)), 1), some(c, TFM_SHAPE(size(1000), size(1003)), 2));
}
static tfm_tensor *do_matmul_long(tfm_ctx *c) {
    return tfm_matmul(c, some(c, TFM_SHAPE(5, size(20000)), 1), some(c, TFM_SHAPE(size(20000), 3), 2));
}
static tfm_tensor *do_linear(tfm_ctx *c) {
    return tfm_linear(c, some(c, TFM_SHAPE(3, size(61), 200), 1), some(c, TFM_SHAPE(size(311), 200), 2),
                      some(c, TFM_SHAPE(size(311)), 3), TFM_ACT_GELU);
}
static tfm_tensor *do_linear_half(tfm_ctx *c) {
    return tfm_linear(c, some(c, TFM_SHAPE(size(61), 200), 1),
                      tfm_cast(c, some(c, TFM_SHAPE(size(311), 200), 2), TFM_BF16), NULL, TFM_ACT_NONE);
}
static tfm_tensor *attend(tfm_ctx *c, int64_t heads, int64_t kv, int64_t Lq, int64_t Lk, int64_t d, int causal) {
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    o.mask.causal = causal;
    return tfm_attention(c, some(c, TFM_SHAPE(1, heads, Lq, d), 1), some(c, TFM_SHAPE(1, kv, Lk, d), 2),
                         some(c, TFM_SHAPE(1, kv, Lk, d), 3), &o);
}
static tfm_tensor *do_attention(tfm_ctx *c) { return attend(c, 3, 3, size(150), size(170), 64, TFM_CAUSAL_NONE); }
static tfm_tensor *do_attention_causal(tfm_ctx *c) {
    return attend(c, 4, 2, size(210), size(210), 40, TFM_CAUSAL_TOP_LEFT);
}
static tfm_tensor *do_attention_one_query(tfm_ctx *c) {
    return attend(c, 2, 1, 1, size(9000), 64, TFM_CAUSAL_BOTTOM_RIGHT);
}
static tfm_tensor *do_attention_dropout(tfm_ctx *c) {
    tfm_attention_options o;
    tfm_tensor *q = some(c, TFM_SHAPE(2, 3, size(120), 32), 4);
    memset(&o, 0, sizeof o);
    o.dropout = 0.3f;
    o.mask.softcap = 5;
    return tfm_attention(c, q, q, q, &o);
}
static tfm_tensor *do_softmax(tfm_ctx *c) { return tfm_softmax(c, some(c, TFM_SHAPE(size(301), size(407)), 1), -1); }
static tfm_tensor *do_softmax_columns(tfm_ctx *c) {
    return tfm_softmax(c, some(c, TFM_SHAPE(7, size(201), size(203)), 1), 1);
}
static tfm_tensor *do_softmax_one_row(tfm_ctx *c) {
    return tfm_log_softmax(c, some(c, TFM_SHAPE(1, size(200000)), 1), -1);
}
static tfm_tensor *do_layer_norm(tfm_ctx *c) {
    return tfm_layer_norm(c, some(c, TFM_SHAPE(size(501), 257), 1), some(c, TFM_SHAPE(257), 2),
                          some(c, TFM_SHAPE(257), 3), NULL);
}
static tfm_tensor *do_rms_norm(tfm_ctx *c) {
    return tfm_rms_norm(c, some(c, TFM_SHAPE(size(501), 257), 1), some(c, TFM_SHAPE(257), 2), NULL);
}
static tfm_tensor *do_sum_all(tfm_ctx *c) {
    return tfm_sum(c, some(c, TFM_SHAPE(size(1001), size(403)), 1), tfm_shape_of(0, NULL), 0);
}
static tfm_tensor *do_sum_rows(tfm_ctx *c) {
    return tfm_sum(c, some(c, TFM_SHAPE(size(1001), size(403)), 1), TFM_SHAPE(-1), 0);
}
static tfm_tensor *do_mean_columns(tfm_ctx *c) {
    return tfm_mean(c, some(c, TFM_SHAPE(size(1001), size(403)), 1), TFM_SHAPE(0), 0);
}
static tfm_tensor *do_max_outer_inner(tfm_ctx *c) {
    return tfm_max(c, some(c, TFM_SHAPE(31, size(101), 103), 1), TFM_SHAPE(0, 2), 1);
}
static tfm_tensor *do_logsumexp(tfm_ctx *c) {
    return tfm_logsumexp(c, some(c, TFM_SHAPE(3, size(150001)), 1), TFM_SHAPE(-1), 0);
}
static tfm_tensor *do_argmax(tfm_ctx *c) { return tfm_argmax(c, some(c, TFM_SHAPE(size(301), size(1003)), 1), -1, 0); }
static tfm_tensor *do_topk(tfm_ctx *c) { return tfm_topk(c, some(c, TFM_SHAPE(size(101), size(3001)), 1), 9, NULL); }
static tfm_tensor *do_embedding(tfm_ctx *c) {
    return tfm_embedding(c, some(c, TFM_SHAPE(1000, 250), 1), some_ids(c, size(2000), 1000));
}
static tfm_tensor *do_randn(tfm_ctx *c) { return tfm_randn(c, TFM_SHAPE(size(100001))); }
static tfm_tensor *do_uniform(tfm_ctx *c) { return tfm_uniform(c, TFM_SHAPE(size(100001)), -3, 2); }
static tfm_tensor *do_dropout(tfm_ctx *c) { return tfm_dropout(c, some(c, TFM_SHAPE(size(301), 401), 1), 0.25f); }
static tfm_tensor *do_gelu(tfm_ctx *c) { return tfm_gelu(c, some(c, TFM_SHAPE(size(200003)), 1)); }
static tfm_tensor *do_add_broadcast(tfm_ctx *c) {
    return tfm_add(c, tfm_transpose(c, some(c, TFM_SHAPE(size(301), size(701)), 1), 0, 1),
                   some(c, TFM_SHAPE(size(701), 1), 2));
}
static tfm_tensor *do_cast(tfm_ctx *c) {
    return tfm_cast(c, tfm_cast(c, some(c, TFM_SHAPE(size(400003)), 1), TFM_F16), TFM_F64);
}
static tfm_tensor *do_cat(tfm_ctx *c) {
    const tfm_tensor *list[2];
    list[0] = some(c, TFM_SHAPE(size(301), 403), 1);
    list[1] = some(c, TFM_SHAPE(size(301), 205), 2);
    return tfm_cat(c, list, 2, 1);
}
static tfm_tensor *do_rotary(tfm_ctx *c) {
    tfm_rope rope;
    memset(&rope, 0, sizeof rope);
    return tfm_rotary(c, some(c, TFM_SHAPE(2, 4, size(301), 64), 1), &rope, 5, NULL);
}

typedef struct model {
    tfm_params *p;
    tfm_encoder stack;
} model;

static model make_encoder(tfm_ctx *c, int prepared) {
    tfm_block_config block;
    model m;
    memset(&block, 0, sizeof block);
    block.d_model = 64;
    block.heads = 4;
    block.d_ff = 160;
    block.norm_first = 1;
    m.p = tfm_params_create(c);
    assert_ok(c, tfm_encoder_init(c, m.p, "", 2, &block, 1, &m.stack));
    if (prepared) assert_ok(c, tfm_params_prepare(c, m.p));
    return m;
}

static tfm_tensor *encode(tfm_ctx *c, const model *m) {
    tfm_stack_options o;
    const int64_t lengths[3] = {size(90), 5, size(41)};
    memset(&o, 0, sizeof o);
    o.mask.key_lengths = tfm_from(c, TFM_I64, TFM_SHAPE(3), lengths);
    return tfm_encoder_forward(c, &m->stack, some(c, TFM_SHAPE(3, size(90), 64), 9), &o);
}

static tfm_tensor *do_encoder(tfm_ctx *c) {
    model m;
    tfm_tensor *y;
    tfm_seed(c, 23);
    m = make_encoder(c, 1);
    y = encode(c, &m);
    tfm_params_destroy(m.p);
    return y;
}

typedef struct job {
    const char *name;
    tfm_tensor *(*run)(tfm_ctx *c);
} job;

#define JOB(name) {#name, do_##name}
static const job jobs[] = {JOB(matmul),
                           JOB(matmul_batched),
                           JOB(matmul_one_row),
                           JOB(matmul_long),
                           JOB(linear),
                           JOB(linear_half),
                           JOB(attention),
                           JOB(attention_causal),
                           JOB(attention_one_query),
                           JOB(attention_dropout),
                           JOB(softmax),
                           JOB(softmax_columns),
                           JOB(softmax_one_row),
                           JOB(layer_norm),
                           JOB(rms_norm),
                           JOB(sum_all),
                           JOB(sum_rows),
                           JOB(mean_columns),
                           JOB(max_outer_inner),
                           JOB(logsumexp),
                           JOB(argmax),
                           JOB(topk),
                           JOB(embedding),
                           JOB(randn),
                           JOB(uniform),
                           JOB(dropout),
                           JOB(gelu),
                           JOB(add_broadcast),
                           JOB(cast),
                           JOB(cat),
                           JOB(rotary),
                           JOB(encoder)};
enum { JOBS = sizeof jobs / sizeof jobs[0] };

/* The result of a job as floats, to be freed; draws start from the same place each time. */
static float *result_of(tfm_ctx *c, const job *j, int64_t *count) {
    tfm_marker mark = tfm_mark(c);
    const tfm_tensor *y;
    float *x;
    tfm_seed(c, 99);
    y = j->run(c);
    x = test_floats(c, y);
    *count = y ? tfm_numel(y) : 0;
    tfm_rewind(c, mark);
    return x;
}

/* Every job on c gives what one thread gives. */
static void assert_same_as_alone(tfm_ctx *c, const char *what) {
    tfm_options o = with_threads(1);
    tfm_ctx *alone;
    int i;
    o.isa = tfm_isa_name(c);
    alone = context_with(&o);
    for (i = 0; i < JOBS; i++) {
        int64_t n, m;
        float *expected = result_of(alone, &jobs[i], &n), *x = result_of(c, &jobs[i], &m);
        cr_assert(expected && x && n == m, "%s, %s: %s%s", jobs[i].name, what, tfm_error(alone), tfm_error(c));
        cr_assert(memcmp(expected, x, (size_t)n * 4) == 0, "%s, %s: byte %lld of %lld differs", jobs[i].name, what,
                  (long long)test_first_difference(expected, x, n * 4), (long long)n * 4);
        free(expected);
        free(x);
    }
    tfm_destroy(alone);
}

/* -- the same bits ------------------------------------------------------------------------------------------------- */

Test(threads, any_number_gives_the_same_bits, .timeout = 300) {
    static const int counts[] = {2, 3, 7};
    int i;
    for (i = 0; i < 3; i++) {
        tfm_ctx *c = threaded(counts[i]);
        char what[32];
        snprintf(what, sizeof what, "%d threads", counts[i]);
        assert_same_as_alone(c, what);
        tfm_destroy(c);
    }
}

Test(threads, any_way_of_waiting_gives_the_same_bits, .timeout = 300) {
    static const int spins[] = {-1, 1, 1000};
    int i;
    for (i = 0; i < 3; i++) {
        tfm_options o = with_threads(2);
        tfm_ctx *c;
        int64_t n, m;
        float *x, *y;
        tfm_ctx *alone = threaded(1);
        o.spin_us = spins[i];
        c = context_with(&o);
        x = result_of(c, &jobs[JOBS - 1], &n);
        y = result_of(alone, &jobs[JOBS - 1], &m);
        cr_assert(x && y && n == m);
        assert_same_bytes(x, y, n * 4);
        free(x);
        free(y);
        tfm_destroy(c);
        tfm_destroy(alone);
    }
}

/* Jobs around the size from which a second and a third thread pay off, with and without a pause for the workers to
 * park. */
Test(threads, many_short_jobs_are_all_done_once) {
    static const int counts[] = {2, 3, 7};
    const int rounds = test_quick() ? 60 : 300;
    int i, round;
    for (i = 0; i < 3; i++) {
        tfm_ctx *c = threaded(counts[i]);
        tfm_marker mark = tfm_mark(c);
        for (round = 0; round < rounds; round++) {
            const int64_t n = 2000 + round * 977 % 60000;
            const tfm_tensor *ones = tfm_ones(c, TFM_SHAPE(n)),
                             *y = tfm_add(c, tfm_exp(c, tfm_sub(c, ones, ones)), ones);
            int64_t k, wrong = 0;
            assert_made(c, y);
            for (k = 0; k < n; k++) wrong += ((const float *)y->data)[k] != 2.0f;
            cr_assert_eq(wrong, 0, "%lld of %lld elements, round %d, %d threads", (long long)wrong, (long long)n, round,
                         counts[i]);
            tfm_rewind(c, mark);
            if (round % 50 == 49) pause_ms(1);
        }
        tfm_destroy(c);
    }
}

/* Every hand-over sleeps and wakes: a wake-up that is lost once ends in a wait without end. */
Test(threads, parked_workers_lose_no_job, .timeout = 120) {
    tfm_options o = with_threads(3);
    const int rounds = test_quick() ? 3000 : 20000;
    int round;
    tfm_ctx *c;
    const tfm_tensor *x;
    tfm_marker mark;
    o.spin_us = -1;
    c = context_with(&o);
    x = tfm_ones(c, TFM_SHAPE(40000));
    mark = tfm_mark(c);
    for (round = 0; round < rounds; round++) {
        const tfm_tensor *y = tfm_add(c, x, x);
        assert_made(c, y);
        cr_assert_eq(((const float *)y->data)[round * 13 % 40000], 2.0f);
        tfm_rewind(c, mark);
    }
    tfm_destroy(c);
}

/* However long they may spin. */
Test(threads, a_context_is_destroyed_while_its_workers_spin) {
    tfm_options o = with_threads(2);
    double begin;
    tfm_ctx *c;
    o.spin_us = 5000000;
    c = context_with(&o);
    assert_made(c, tfm_exp(c, tfm_ones(c, TFM_SHAPE(size(200000)))));
    begin = seconds();
    tfm_destroy(c);
    cr_assert_lt(seconds() - begin, 2);
}

/* -- the user's own threads ---------------------------------------------------------------------------------------- */

typedef struct hook {
    int calls, largest, busy_seen; /* calls of parallel_for, largest count, statuses of the intruder below */
    tfm_ctx *c;
    void (*inside)(struct hook *h);
    tfm_tensor *theirs;
} hook;

static void for_threads(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    hook *h = (hook *)user;
    h->calls++;
    if (count > h->largest) h->largest = count;
    on_threads(count, run, arg);
}

static void for_backwards(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    hook *h = (hook *)user;
    int i;
    h->calls++;
    if (count > h->largest) h->largest = count;
    for (i = count - 1; i >= 0; i--) run(arg, i);
}

Test(threads, a_parallel_for_of_the_user_gives_the_same_bits, .timeout = 300) {
    void (*const loops[2])(void *, int, void (*)(void *, int), void *) = {for_threads, for_backwards};
    static const int counts[] = {1, 3, 7};
    int i, l;
    for (l = 0; l < 2; l++)
        for (i = 0; i < 3; i++) {
            tfm_options o = with_threads(counts[i]);
            tfm_ctx *c;
            hook h;
            memset(&h, 0, sizeof h);
            o.parallel_for = loops[l];
            o.parallel_user = &h;
            c = context_with(&o);
            cr_assert_eq(tfm_threads(c), counts[i]);
            assert_same_as_alone(c, l ? "backwards in one thread" : "on our threads");
            if (counts[i] == 1) cr_assert_eq(h.calls, 0);
            if (counts[i] > 1) cr_assert_geq(h.calls, JOBS / 2);
            cr_assert_leq(h.largest, counts[i]);
            if (!test_quick() && counts[i] > 1) cr_assert_eq(h.largest, counts[i], "no job used all threads");
            tfm_destroy(c);
        }
}

/* -- one context, two threads -------------------------------------------------------------------------------------- */

static void for_intruded(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    hook *h = (hook *)user;
    int i;
    if (h->inside && h->calls++ == 0) h->inside(h);
    for (i = 0; i < count; i++) run(arg, i);
}

/* What a second thread sees: an answer for each call, never a wait, a crash or a change. Assertions are not its
 * business. */
static void intrude(void *arg, int i) {
    hook *h = (hook *)arg;
    tfm_ctx *c = h->c;
    float value;
    tfm_memory m;
    tfm_marker mark;
    (void)i;
    h->busy_seen += tfm_ones(c, TFM_SHAPE(3)) == NULL;
    h->busy_seen += tfm_status_of(c) == TFM_BUSY;
    h->busy_seen += strstr(tfm_error(c), "two threads") != NULL;
    h->busy_seen += tfm_add(c, h->theirs, h->theirs) == NULL;
    h->busy_seen += tfm_read(c, h->theirs, &value, 1) == TFM_BUSY;
    h->busy_seen += tfm_measure_end(c, &m) == TFM_BUSY;
    h->busy_seen += tfm_profile(c) == NULL;
    mark = tfm_mark(c);
    tfm_rewind(c, mark);
    h->busy_seen += tfm_keep(c, mark, h->theirs) == NULL;
    tfm_clear(c);
    tfm_seed(c, 1);
    tfm_profile_start(c);
    tfm_tape_clear(c);
    tfm_memory_reset(c);
    tfm_destroy(c); /* refused like all of them */
}

static void run_intruder(hook *h) { on_threads(1, intrude, h); }

Test(threads, a_second_thread_in_a_context_is_busy_and_harms_nothing) {
    tfm_options o = with_threads(2);
    tfm_ctx *c;
    tfm_tensor *x, *y;
    tfm_marker mark;
    hook h;
    memset(&h, 0, sizeof h);
    o.parallel_for = for_intruded;
    o.parallel_user = &h;
    c = context_with(&o);
    h.c = c;
    h.theirs = tfm_ones(c, TFM_SHAPE(1));
    x = tfm_ones(c, TFM_SHAPE(200000));
    assert_made(c, x);
    h.calls = 0;
    h.inside = run_intruder;
    y = tfm_exp(c, x);
    cr_assert_eq(h.busy_seen, 8, "%d of 8 answers were right", h.busy_seen);
    cr_assert_null(y, "the op that was disturbed is refused too");
    cr_assert_eq(tfm_status_of(c), TFM_BUSY);
    cr_assert(strstr(tfm_error(c), "two threads") != NULL, "%s", tfm_error(c));
    cr_assert_null(tfm_exp(c, x));
    memset(&mark, 0, sizeof mark);
    tfm_rewind(c, mark); /* wrong as well, but not first */
    cr_assert_eq(tfm_status_of(c), TFM_BUSY);
    cr_assert(strstr(tfm_error(c), "two threads") != NULL, "%s", tfm_error(c));
    tfm_clear(c);
    y = tfm_shift(c, x, 1);
    assert_made(c, y);
    cr_assert(((float *)y->data)[0] == 2 && ((float *)y->data)[199999] == 2);
    cr_assert_eq(tfm_profile_count(c), 0, "it started the profile");
    tfm_destroy(c);
}

static void add_ones(void *arg, int i) {
    tfm_ctx *c = (tfm_ctx *)arg;
    (void)i;
    (void)tfm_ones(c, TFM_SHAPE(2));
}

static int progress_intruded(void *user, const char *what, int64_t done, int64_t total) {
    hook *h = (hook *)user;
    (void)what;
    (void)done;
    (void)total;
    if (h->c && h->calls++ == 0) on_threads(1, add_ones, h->c);
    return 0;
}

/* Between the ops of a long call the context is its caller's, too. */
Test(threads, a_second_thread_is_busy_until_the_whole_call_ends) {
    tfm_options o = with_threads(1);
    const int64_t id[2] = {1, 2};
    tfm_transformer_config g;
    tfm_transformer model;
    tfm_generate_options options;
    tfm_session_options room;
    tfm_session *s;
    tfm_params *p;
    tfm_prompt prompt;
    tfm_sequence out;
    tfm_ctx *c;
    hook h;
    memset(&h, 0, sizeof h);
    memset(&g, 0, sizeof g);
    memset(&options, 0, sizeof options);
    memset(&room, 0, sizeof room);
    o.progress = progress_intruded;
    o.hook_user = &h;
    c = context_with(&o);
    g.kind = TFM_DECODER_ONLY;
    g.decoder_layers = 1;
    g.target_vocab = 7;
    g.max_length = room.capacity = 16;
    g.block.d_model = g.block.d_ff = 8;
    g.block.heads = 1;
    p = tfm_params_create(c);
    assert_ok(c, tfm_transformer_init(c, p, "", &g, &model));
    s = tfm_session_create(c, &model, &room);
    assert_made(c, s);
    prompt.count = 2;
    prompt.ids = id;
    options.max_new = 3;
    h.c = c;
    assert_verb_refused(c, tfm_generate(c, s, &prompt, 1, &options, &out), TFM_BUSY);
    cr_assert_geq(h.calls, 1);
    tfm_session_reset(s);
    assert_ok(c, tfm_generate(c, s, &prompt, 1, &options, &out));
    tfm_session_destroy(s);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* The op is left: else the context would belong to the thread that called it. */
Test(threads, an_op_refused_for_a_dead_or_foreign_argument_gives_the_context_back) {
    static const char *const name[] = {"mask.offsets", "mask.prefixes", "mask.key_lengths", "mask.query_lengths",
        "mask.query_segments", "mask.key_segments", "mask.keep", "mask.ignore", "mask.nonzero", "mask.bias",
        "mask.alibi_slopes", "mask.relative_bias", "mask.sinks"};
    enum { FIELDS = sizeof name / sizeof name[0], OTHERS = 9 };
    static const char *const other_name[OTHERS] = {"tfm_linear: bias", "tfm_layer_norm: weight", "tfm_layer_norm: bias",
        "tfm_rotary: positions", "tfm_rotary_apply: positions", "tfm_pool: lengths", "tfm_weighted_pool: bias",
        "tfm_weighted_sequence: key_lengths", "tfm_cache_append: counts"};
    tfm_ctx *c = tfm_create(NULL), *d = tfm_create(NULL);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(1, 2, 3, 8)), *rows = tfm_ones(c, TFM_SHAPE(1, 3, 8));
    tfm_tensor *w = tfm_ones(c, TFM_SHAPE(1, 8)), *table = tfm_ones(c, TFM_SHAPE(3, 4)), *stray[2];
    tfm_tensor *segments = tfm_cast(c, tfm_ones(c, TFM_SHAPE(1, 3)), TFM_I64);
    tfm_cache_options g;
    tfm_cache *cache;
    tfm_marker mark;
    int i, kind;
    memset(&g, 0, sizeof g);
    g.layers = g.batch = 1;
    g.heads = 2;
    g.key_size = g.capacity = 8;
    cache = tfm_cache_create(c, &g);
    cr_assert_not_null(cache, "%s", tfm_error(c));
    mark = tfm_mark(c);
    stray[0] = tfm_ones(c, TFM_SHAPE(1));
    tfm_rewind(c, mark);
    stray[1] = tfm_ones(d, TFM_SHAPE(1));
    for (kind = 0; kind < 2; kind++) {
        const tfm_tensor *const t = stray[kind];
        for (i = 0; i < FIELDS + OTHERS; i++) {
            char expected[128];
            tfm_attention_options o;
            const tfm_tensor **const field[FIELDS] = {&o.mask.offsets, &o.mask.prefixes, &o.mask.key_lengths,
                &o.mask.query_lengths, &o.mask.query_segments, &o.mask.key_segments, &o.mask.keep, &o.mask.ignore,
                &o.mask.nonzero, &o.mask.bias, &o.mask.alibi_slopes, &o.mask.relative_bias, &o.mask.sinks};
            memset(&o, 0, sizeof o);
            if (i < FIELDS) *field[i] = t;
            if (o.mask.offsets) o.mask.causal = TFM_CAUSAL_OFFSET;
            if (o.mask.query_segments) o.mask.key_segments = segments;
            else if (o.mask.key_segments) o.mask.query_segments = segments;
            switch (i - FIELDS) {
            case 0: (void)tfm_linear(c, x, w, t, TFM_ACT_NONE); break;
            case 1: (void)tfm_layer_norm(c, x, t, NULL, NULL); break;
            case 2: (void)tfm_layer_norm(c, x, NULL, t, NULL); break;
            case 3: (void)tfm_rotary(c, x, NULL, 0, t); break;
            case 4: (void)tfm_rotary_apply(c, x, table, table, t, 0); break;
            case 5: (void)tfm_pool(c, rows, t, TFM_POOL_MEAN); break;
            case 6: (void)tfm_weighted_pool(c, rows, w, t, NULL, NULL); break;
            case 7: (void)tfm_weighted_sequence(c, rows, w, NULL, t, NULL); break;
            case 8: cr_expect_eq(tfm_cache_append(c, cache, 0, x, x, t), TFM_INVALID); break;
            default: (void)tfm_attention(c, x, x, x, &o); break;
            }
            snprintf(expected, sizeof expected, "%s%s %s", i < FIELDS ? "tfm_attention: " : "",
                     i < FIELDS ? name[i] : other_name[i - FIELDS],
                     kind ? "belongs to another context" : "is used after the rewind that freed it");
            cr_expect(!strcmp(tfm_error(c), expected), "\"%s\", expected \"%s\"", tfm_error(c), expected);
            tfm_clear(c);
            on_threads(1, add_ones, c);
            cr_expect_eq(tfm_status_of(c), TFM_OK, "%s: %s", expected, tfm_error(c));
            tfm_clear(c);
        }
    }
    tfm_cache_destroy(cache);
    tfm_destroy(d);
    tfm_destroy(c);
}

/* Many threads at one context all the time: each call works or is refused, and the context lives. */
typedef struct crowd {
    tfm_ctx *c;
    int64_t worked[4], refused[4], wrong[4];
} crowd;

static void press(void *arg, int i) {
    crowd *k = (crowd *)arg;
    int round;
    for (round = 0; round < 200; round++) {
        const tfm_tensor *t = tfm_full(k->c, TFM_F32, tfm_shape1(100), i);
        if (!t) k->refused[i]++;
        else if (tfm_numel(t) != 100) k->wrong[i]++;
        else k->worked[i]++;
        if (!t) tfm_clear(k->c);
    }
}

Test(threads, a_crowd_in_one_context_is_refused_not_crashed) {
    crowd k;
    int i;
    memset(&k, 0, sizeof k);
    k.c = threaded(1);
    on_threads(4, press, &k);
    for (i = 0; i < 4; i++) cr_assert(k.wrong[i] == 0 && k.worked[i] + k.refused[i] == 200);
    tfm_clear(k.c);
    assert_made(k.c, tfm_ones(k.c, TFM_SHAPE(3)));
    tfm_destroy(k.c);
}

/* One thread after the other is fine. */
static void use_it(void *arg, int i) {
    hook *h = (hook *)arg;
    (void)i;
    h->theirs = tfm_scale(h->c, h->theirs, 2);
}

Test(threads, a_context_may_be_handed_from_thread_to_thread) {
    hook h;
    int i;
    memset(&h, 0, sizeof h);
    h.c = threaded(2);
    h.theirs = tfm_ones(h.c, TFM_SHAPE(100000));
    for (i = 0; i < 5; i++) on_threads(1, use_it, &h);
    assert_made(h.c, h.theirs);
    cr_assert(((float *)h.theirs->data)[99999] == 32);
    tfm_destroy(h.c);
}

/* -- many contexts ------------------------------------------------------------------------------------------------- */

typedef struct shared {
    const model *m;
    int isa[8];
    float *expected[8];
    int64_t count, wrong[8], made[8];
} shared;

static void encode_alone(void *arg, int i) {
    shared *s = (shared *)arg;
    tfm_options o = with_threads(1 + i % 2);
    tfm_ctx *c;
    int round;
    o.isa = test_isa(s->isa[i]);
    c = tfm_create(&o);
    for (round = 0; c && round < 4; round++) {
        tfm_marker mark = tfm_mark(c);
        float *y = test_floats(c, encode(c, s->m));
        s->made[i] += y != NULL;
        s->wrong[i] += !y || memcmp(y, s->expected[i], (size_t)s->count * 4) != 0;
        free(y);
        tfm_rewind(c, mark);
    }
    tfm_destroy(c);
}

Test(threads, contexts_of_any_isa_share_parameters_in_parallel, .timeout = 300) {
    int prepared;
    for (prepared = 0; prepared < 2; prepared++) {
        tfm_ctx *c = threaded(1);
        model m;
        shared s;
        int i, n = 0;
        memset(&s, 0, sizeof s);
        m = make_encoder(c, prepared);
        s.m = &m;
        for (i = 0; n < 6; i++) {
            const int isa = i % TEST_ISAS;
            tfm_ctx *one;
            tfm_tensor *y;
            if (!tfm_isa_supported(test_isa(isa))) continue;
            s.isa[n] = isa;
            one = test_isa_context(isa, 1);
            y = encode(one, &m);
            assert_made(one, y);
            s.count = tfm_numel(y);
            s.expected[n++] = test_floats(one, y);
            tfm_destroy(one);
        }
        tfm_destroy(c); /* the parameters outlive it */
        on_threads(n, encode_alone, &s);
        for (i = 0; i < n; i++) {
            cr_expect(s.made[i] == 4 && s.wrong[i] == 0, "%s: %d of 4 made, %d wrong", test_isa(s.isa[i]),
                      (int)s.made[i], (int)s.wrong[i]);
            free(s.expected[i]);
        }
        tfm_params_destroy(m.p);
    }
}

/* -- cancel -------------------------------------------------------------------------------------------------------- */

typedef struct canceller {
    tfm_ctx *c;
    double when;
} canceller;

static void cancel_soon(void *arg, int i) {
    canceller *k = (canceller *)arg;
    (void)i;
    pause_ms(30);
    k->when = seconds();
    tfm_cancel(k->c);
}

Test(threads, a_long_call_is_cancelled_from_another_thread, .timeout = 120) {
    static const int counts[] = {1, 3};
    const int64_t n = test_quick() ? 300 : 2000; /* 16 GFLOP: between 0.1 and 10 s a call */
    int i, round;
    for (i = 0; i < 2; i++) {
        tfm_ctx *c = threaded(counts[i]);
        canceller k;
        double end;
        tfm_tensor *x = tfm_ones(c, TFM_SHAPE(n, n)), *y = x;
        tfm_marker mark = tfm_mark(c);
        thread t;
        double begin = seconds();
        assert_made(c, x);
        k.c = c;
        k.when = 0;
        t.run = cancel_soon;
        t.arg = &k;
        t.i = 0;
        cr_assert(thread_start(&t));
        for (round = 0; y && seconds() - begin < 60; round++) {
            y = tfm_matmul(c, x, x);
            if (y) tfm_rewind(c, mark);
        }
        end = seconds();
        thread_join(&t);
        cr_assert_lt(end - k.when, 1, "%g s until it stopped", end - k.when);
        cr_assert_null(y, "nothing was cancelled");
        cr_assert_eq(tfm_status_of(c), TFM_CANCELLED, "%s", tfm_error(c));
        cr_assert(strstr(tfm_error(c), "cancelled") != NULL, "%s", tfm_error(c));
        tfm_clear(c);
        tfm_rewind(c, mark);
        y = tfm_add(c, x, x); /* and all of it is done again */
        assert_made(c, y);
        cr_assert(((float *)y->data)[0] == 2 && ((float *)y->data)[n * n - 1] == 2);
        tfm_destroy(c);
    }
}

static tfm_ctx *signalled;
static void on_signal(int number) {
    (void)number;
    tfm_cancel(signalled);
}
static void raise_it(hook *h) {
    (void)h;
    raise(SIGINT);
}

Test(threads, a_signal_handler_may_cancel) {
    tfm_options o = with_threads(2);
    tfm_ctx *c;
    hook h;
    void (*before)(int);
    memset(&h, 0, sizeof h);
    o.parallel_for = for_intruded;
    o.parallel_user = &h;
    c = signalled = context_with(&o);
    h.c = c;
    {
        tfm_tensor *x = tfm_ones(c, TFM_SHAPE(200000));
        h.calls = 0;
        h.inside = raise_it;
        before = signal(SIGINT, on_signal);
        cr_assert_null(tfm_exp(c, x));
        signal(SIGINT, before);
        cr_assert_eq(tfm_status_of(c), TFM_CANCELLED);
        tfm_clear(c);
        assert_made(c, tfm_exp(c, x));
    }
    tfm_destroy(c);
}

#if !defined(_WIN32) && !defined(UNDER_TSAN)
/* Memory that comes page by page when it is touched, as programs with a paging of their own have it. */
enum { PAGE = 65536, PAGES = 64 };
static struct paging {
    unsigned char *memory;
    pthread_t caller;
    volatile sig_atomic_t elsewhere; /* pages that came for another thread than the caller */
} paging;

static void bring_page(int number, siginfo_t *info, void *context) {
    const size_t at = (size_t)((unsigned char *)info->si_addr - paging.memory);
    (void)context;
    if (at >= (size_t)PAGE * PAGES || mprotect(paging.memory + at / PAGE * PAGE, PAGE, PROT_READ | PROT_WRITE))
        signal(number, SIG_DFL);
    if (!pthread_equal(pthread_self(), paging.caller)) paging.elsewhere = paging.elsewhere + 1;
    else pause_ms(1); /* the others have time to come */
}

/* Signals of the program stay with its own threads; a fault is handled where it happens. */
Test(threads, a_fault_of_a_worker_reaches_the_programs_handler, .timeout = 120) {
    static const int faults[2] = {SIGSEGV, SIGBUS}; /* the second on Apple's systems */
    const size_t bytes = (size_t)PAGE * PAGES;
    struct sigaction action, before[2];
    tfm_ctx *c = threaded(4);
    int i;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = bring_page;
    action.sa_flags = SA_SIGINFO;
    paging.memory = (unsigned char *)mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(paging.memory != MAP_FAILED, "mmap");
    paging.caller = pthread_self();
    paging.elsewhere = 0;
    for (i = 0; i < 2; i++) sigaction(faults[i], &action, &before[i]);
    for (i = 0; i < 100 && !paging.elsewhere; i++) {
        const tfm_marker mark = tfm_mark(c);
        tfm_tensor *y;
        cr_assert_eq(mprotect(paging.memory, bytes, PROT_NONE), 0);
        y = tfm_exp(c, tfm_wrap(c, TFM_F32, TFM_SHAPE(PAGES * PAGE / 4), paging.memory));
        assert_made(c, y);
        cr_assert(((float *)y->data)[0] == 1 && ((float *)y->data)[PAGES * PAGE / 4 - 1] == 1);
        tfm_rewind(c, mark);
    }
    for (i = 0; i < 2; i++) sigaction(faults[i], &before[i], NULL);
    cr_expect_gt(paging.elsewhere, 0, "no worker took a page");
    munmap(paging.memory, bytes);
    tfm_destroy(c);
}
#endif

/* -- workers behave ------------------------------------------------------------------------------------------------ */

/* How the caller rounds is how all threads of its job round, and no later job. */
Test(threads, workers_take_over_the_callers_rounding) {
    static const int counts[] = {1, 2, 7};
    const int64_t n = size(200000);
    float *expected[2] = {NULL, NULL};
    int i, mode;
    for (i = 0; i < 3; i++) {
        tfm_ctx *c = threaded(counts[i]);
        tfm_tensor *x = some(c, TFM_SHAPE(n), 1);
        assert_made(c, x);
        for (mode = 0; mode < 4; mode++) { /* up, nearest, up, nearest */
            tfm_tensor *y;
#if defined(FE_UPWARD)
            if (mode % 2 == 0) fesetround(FE_UPWARD);
#endif
            y = tfm_scale(c, x, 0.1f);
            fesetround(FE_TONEAREST);
            assert_made(c, y);
            if (!expected[mode % 2]) {
                expected[mode % 2] = (float *)malloc((size_t)n * 4);
                memcpy(expected[mode % 2], y->data, (size_t)n * 4);
            }
            assert_same_bytes(y->data, expected[mode % 2], n * 4);
        }
        tfm_destroy(c);
    }
#if defined(FE_UPWARD)
    cr_expect_geq(test_first_difference(expected[0], expected[1], n * 4), 0, "the rounding mode changed nothing");
#endif
    free(expected[0]);
    free(expected[1]);
}

#if defined(__x86_64__)
Test(threads, workers_take_over_flush_to_zero) {
    static const int counts[] = {1, 2, 7};
    const int64_t n = size(200000);
    int i, mode;
    for (i = 0; i < 3; i++) {
        tfm_ctx *c = threaded(counts[i]);
        tfm_tensor *x = tfm_full(c, TFM_F32, TFM_SHAPE(n), 1e-40);
        assert_made(c, x);
        for (mode = 0; mode < 4; mode++) {
            const unsigned int before = _mm_getcsr();
            const tfm_tensor *y;
            int64_t k, zeros = 0;
            if (mode % 2 == 0) _mm_setcsr(before | 0x8040u); /* results and operands: subnormals are zero */
            y = tfm_scale(c, x, 0.5f);
            _mm_setcsr(before);
            assert_made(c, y);
            for (k = 0; k < n; k++) zeros += memcmp((const float *)y->data + k, "\0\0\0\0", 4) == 0;
            cr_assert_eq(zeros, mode % 2 == 0 ? n : 0, "%lld zeros of %lld, %d threads", (long long)zeros, (long long)n,
                         counts[i]);
        }
        tfm_destroy(c);
    }
}
#endif

typedef struct watched {
    test_memory memory;
    int64_t elsewhere; /* calls from a thread that is not `mine` */
} watched;

static __thread int mine;

static void *watched_alloc(void *user, size_t bytes) {
    watched *w = (watched *)user;
    if (!mine) w->elsewhere++;
    return test_memory_alloc(&w->memory, bytes);
}

static void watched_free(void *user, void *p) {
    watched *w = (watched *)user;
    if (!mine) w->elsewhere++;
    test_memory_free(&w->memory, p);
}

Test(threads, workers_never_call_the_allocator) {
    tfm_options o = with_threads(3);
    watched w;
    tfm_ctx *c;
    int i;
    memset(&w, 0, sizeof w);
    w.memory = test_memory_new();
    mine = 1;
    o.allocator.alloc = watched_alloc;
    o.allocator.free = watched_free;
    o.allocator.user = &w;
    c = context_with(&o);
    for (i = 0; i < JOBS; i++) {
        int64_t n;
        float *x = result_of(c, &jobs[i], &n);
        cr_assert(x != NULL, "%s: %s", jobs[i].name, tfm_error(c));
        free(x);
    }
    tfm_destroy(c);
    mine = 0;
    cr_assert_eq(w.elsewhere, 0);
    assert_no_leak(&w.memory);
}

#if !defined(_WIN32)
static volatile sig_atomic_t signals_seen;
static void on_usr1(int number) {
    (void)number;
    signals_seen++;
}

/* A handler runs on the program's own threads. */
Test(threads, workers_take_no_signals) {
    tfm_ctx *c = threaded(3);
    void (*before)(int) = signal(SIGUSR1, on_usr1);
    sigset_t mine_alone, old;
    sigemptyset(&mine_alone);
    sigaddset(&mine_alone, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &mine_alone, &old);
    signals_seen = 0;
    kill(getpid(), SIGUSR1);
    pause_ms(50);
    cr_expect_eq(signals_seen, 0);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pause_ms(1);
    cr_expect_eq(signals_seen, 1);
    signal(SIGUSR1, before);
    tfm_destroy(c);
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* Workers spin for microseconds after a job, then sleep. */
Test(threads, a_pool_without_work_burns_no_processor) {
    static const int counts[] = {2, 7};
    int i;
    for (i = 0; i < 2; i++) {
        tfm_ctx *c = threaded(counts[i]);
        double burnt;
        assert_made(c, tfm_exp(c, tfm_ones(c, TFM_SHAPE(100000))));
        pause_ms(5);
        burnt = cpu_seconds();
        pause_ms(200);
        burnt = cpu_seconds() - burnt;
        cr_assert_lt(burnt, 0.03, "%g s of 0.2 s with %d threads", burnt, counts[i]);
        tfm_destroy(c);
    }
}
#endif

#if !defined(_WIN32) && !defined(UNDER_TSAN)
/* A fork takes only the thread that called it along. */
Test(threads, a_forked_child_works_on_one_thread) {
    if (test_emulated()) cr_skip_test("qemu-user does not know fork() beside threads");
    static const job attention = JOB(attention);
    tfm_ctx *c = threaded(3);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(size(200000)));
    int64_t n, m;
    float *expected = result_of(c, &attention, &n), *after;
    int status = -1;
    pid_t child;
    assert_made(c, x);
    fflush(NULL);
    child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) { /* no assertions here: the exit status tells */
        float *y = result_of(c, &attention, &m);
        int bad = !y || n != m || memcmp(y, expected, (size_t)n * 4) != 0;
        tfm_ctx *own;
        const tfm_options o = with_threads(2);
        free(y);
        bad |= tfm_exp(c, x) == NULL ? 2 : 0;
        tfm_destroy(c);
        own = tfm_create(&o); /* and a context made in the child has threads again */
        y = own ? result_of(own, &attention, &m) : NULL;
        bad |= !y || memcmp(y, expected, (size_t)n * 4) != 0 ? 4 : 0;
        free(y);
        tfm_destroy(own);
        free(expected);
        _exit(bad);
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
    after = result_of(c, &attention, &m); /* the parent goes on */
    cr_assert(after && m == n);
    assert_same_bytes(after, expected, n * 4);
    free(after);
    free(expected);
    tfm_destroy(c);
}
#endif

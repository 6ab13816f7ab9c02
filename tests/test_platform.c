/* What stands below the public functions of chapters 1, 2 and 6: a private copy of the library, without what it does
 * not need. */
#define _GNU_SOURCE
#define TFM_NO_SIMD
#define TFM_NO_FILES
#define TFM_NO_GENERATION
#define TFM_NO_MODELS
#define TFM_STATIC
#define TRANSFORMER_IMPLEMENTATION
#define pthread_create create_thread /* below: as many as a test allows */
#include "test.h"
#undef pthread_create

#include <errno.h>
#include <fenv.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/stat.h>
#endif

enum { SCRATCH = 1 << 20 }; /* TFM__SCRATCH_BYTES */

static tfm_options options_of(int threads) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = threads;
    o.isa = "scalar"; /* all there is here, whatever TFM_ISA says */
    return o;
}

static tfm_ctx *context_with(const tfm_options *o) {
    tfm_ctx *c = tfm_create(o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "no context: %s", tfm_error(c));
    return c;
}

static void on_log(void *user, int level, const char *message) {
    snprintf((char *)user, 100, "%d %s", level, message);
}

/* -- 1 ------------------------------------------------------------------------------------------------------------- */

Test(platform, sizes_that_overflow_are_noticed) {
    int64_t r = 7;
    cr_assert(tfm__mul(3, 4, &r) && r == 12);
    cr_assert(tfm__mul(0, INT64_MAX, &r) && r == 0);
    cr_assert(tfm__mul(INT64_MAX, 1, &r) && r == INT64_MAX);
    cr_assert_not(tfm__mul((int64_t)1 << 32, (int64_t)1 << 31, &r));
    cr_assert_not(tfm__mul(-1, 5, &r));
    cr_assert_not(tfm__mul(5, -1, &r));
    cr_assert(tfm__add(INT64_MAX - 1, 1, &r) && r == INT64_MAX);
    cr_assert_not(tfm__add(INT64_MAX, 1, &r));
    cr_assert_not(tfm__add(-1, 1, &r));
    cr_assert_not(tfm__add(1, -1, &r));
    cr_assert(tfm__ceil_div(0, 5) == 0 && tfm__ceil_div(1, 5) == 1 && tfm__ceil_div(5, 5) == 1
              && tfm__ceil_div(6, 5) == 2);
    cr_assert(tfm__round_up(0, 64) == 0 && tfm__round_up(1, 64) == 64 && tfm__round_up(64, 64) == 64);
}

Test(platform, atomics_are_what_they_say) {
    int64_t x = 5;
    cr_assert_eq(tfm__atomic_add(&x, 3), 5);
    cr_assert_eq(tfm__atomic_load(&x), 8);
    cr_assert_not(tfm__atomic_cas(&x, 5, 1));
    cr_assert(tfm__atomic_cas(&x, 8, (int64_t)1 << 40));
    cr_assert_eq(tfm__atomic_load(&x), (int64_t)1 << 40);
    tfm__atomic_store(&x, -2);
    cr_assert_eq(tfm__atomic_add(&x, -1), -2);
    cr_assert_eq(tfm__atomic_load(&x), -3);
}

Test(platform, the_clock_goes_forward) {
    double last = tfm__now();
    int i;
    for (i = 0; i < 1000; i++) {
        const double now = tfm__now();
        cr_assert_geq(now, last);
        last = now;
    }
    cr_assert_neq(tfm__thread_id(), 0u);
}

/* -- 2 ------------------------------------------------------------------------------------------------------------- */

/* kat_vectors of Random123, for philox4x32 with 10 rounds. */
Test(platform, philox_gives_the_published_answers) {
    static const struct { uint64_t seed, stream, counter; uint32_t out[4];
    } known[3] = {{0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
                  {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
                  {0x299f31d0a4093822u,
                   0x0370734413198a2eu,
                   0x85a308d3243f6a88u,
                   {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    int i;
    for (i = 0; i < 3; i++) {
        uint32_t out[4];
        tfm__random_bits(known[i].seed, known[i].stream, known[i].counter, out);
        cr_assert_arr_eq(out, known[i].out, sizeof out);
    }
}

Test(platform, numbers_do_not_depend_on_the_pieces_they_are_drawn_in) {
    static const uint64_t starts[] = {0, 1, 3, 1000001, ((uint64_t)1 << 34) - 3}; /* the last one crosses 2^32 blocks */
    float whole[64], piece[64];
    int s;
    int64_t first, n, i;
    for (s = 0; s < 5; s++) {
        tfm__normal_fill(whole, 64, 9, 4, starts[s]);
        for (first = 0; first < 9; first++)
            for (n = 0; n < 20; n++) {
                tfm__normal_fill(piece, n, 9, 4, starts[s] + (uint64_t)first);
                assert_same_bytes(piece, whole + first, n * 4);
            }
        for (i = 0; i < 64; i++) cr_assert(tfm__normal_at(9, 4, starts[s] + (uint64_t)i) == whole[i]);
        tfm__uniform_fill(whole, 64, 9, 4, starts[s]);
        for (i = 0; i < 64; i++) cr_assert(tfm__uniform_at(9, 4, starts[s] + (uint64_t)i) == whole[i]);
    }
}

Test(platform, our_logarithm_and_sine_are_exact_to_1e_15) {
    const int64_t n = test_quick() ? 5000 : 500000;
    int64_t i;
    for (i = 0; i < n; i++) {
        const uint32_t word = i < 1000   ? (uint32_t)i
                              : i < 2000 ? (uint32_t)(2000 - i) * 0xffffffffu
                                         : (uint32_t)((uint64_t)i * 2654435761u);
        const double u = ((double)word + 1) / 4294967296.0, angle = (double)word / 4294967296.0 * 6.283185307179586477;
        double sine, cosine;
        tfm__turn(word, &sine, &cosine);
        cr_assert(fabs(sine - sin(angle)) < 2e-15 && fabs(cosine - cos(angle)) < 2e-15, "%u", (unsigned)word);
        cr_assert(fabs(tfm__log_unit(u) - log(u)) <= 1e-15 * fmax(1, fabs(log(u))), "%.17g", u);
    }
    cr_assert_eq(tfm__log_unit(1), 0);
}

Test(platform, texts_end_where_their_buffer_ends) {
    char b[10];
    tfm_ctx *c;
    tfm__text text;
    const tfm_options o = options_of(1);
    int i;
    cr_assert(tfm__format(b, 10, "ab") == 2 && !strcmp(b, "ab"));
    cr_assert(tfm__format(b, 10, "%s", "0123456789abc") == 9 && !strcmp(b, "012345678"));
    cr_assert(tfm__append(b, 10, 4, "%s", "xxxxxxxxxxx") == 9 && !strcmp(b, "0123xxxxx"));
    cr_assert_eq(tfm__append(b, 10, 9, "y"), 9);
    c = context_with(&o);
    memset(&text, 0, sizeof text);
    text.c = c;
    for (i = 0; i < 5000; i++) tfm__text_add(&text, "%d,", i);
    cr_assert_eq(text.length, 10 * 2 + 90 * 3 + 900 * 4 + 4000 * 5);
    tfm__text_add(&text, "%*s", 100000, "x");
    tfm__text_bytes(&text, "ab", 1);
    cr_assert(text.s && (int64_t)strlen(text.s) == text.length && !strcmp(text.s + text.length - 2, "xa"));
    for (i = 200; i < 600; i++) { /* also one that fills all there is */
        memset(&text, 0, sizeof text);
        text.c = c;
        tfm__text_add(&text, "%*s", i, "x");
        cr_assert(text.s && text.length == i && (int)strlen(text.s) == i && text.s[i - 1] == 'x', "%d", i);
    }
    tfm_destroy(c);
}

/* No overlong form, no surrogate, nothing past U+10FFFF, nothing cut off. */
Test(platform, texts_keep_whole_characters_only) {
    static const char *const whole[] = {"a", "\xC2\x80", "\xC3\xA9", "\xDF\xBF", "\xE0\xA0\x80", "\xE2\x82\xAC",
                                        "\xED\x9F\xBF", "\xEE\x80\x80", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"},
                      *const none[] = {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80",
                                       "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF",
                                       "\xC3", "\xE2\x82", "\xF4\x8F\xBF"};
    char text[32], expected[32];
    int i, k;
    for (i = 0; i < 10; i++)
        for (k = 0; k < 13; k++) {
            const int64_t n = (int64_t)strlen(whole[i]);
            cr_assert_eq(tfm__utf8_length((const unsigned char *)whole[i], n), n, "%d", i);
            if (n > 1) cr_assert_eq(tfm__utf8_length((const unsigned char *)whole[i], n - 1), 0, "%d", i);
            cr_assert_eq(tfm__utf8_length((const unsigned char *)none[k], (int64_t)strlen(none[k])), 0, "%d", k);
            snprintf(text, sizeof text, "%s%s<%s>%s", whole[i], none[k], whole[i], none[k]);
            snprintf(expected, sizeof expected, "%s<%s>", whole[i], whole[i]);
            tfm__utf8_mend(text);
            cr_assert_str_eq(text, expected, "%d, %d", i, k);
        }
}

/* Sizes that round up to more than there are are an error, and a dry run takes only what is touched. */
Test(platform, memory_that_cannot_be_had_is_an_error) {
    test_memory m = test_memory_new();
    tfm_options o = options_of(1);
    tfm_ctx *c;
    const char *p;
    int64_t before;
    o.allocator = test_allocator(&m);
    c = context_with(&o);
    assert_refused(c, tfm__arena_alloc(c, INT64_MAX - 7), TFM_OOM);
    assert_refused(c, tfm__arena_meta(c, INT64_MAX - 7), TFM_OOM);
    tfm_measure_begin(c);
    before = m.bytes;
    p = (const char *)tfm__arena_meta_part(c, 1 << 30, 100);
    cr_assert(p && p[0] == 0 && p[99] == 0);
    cr_assert_lt(m.bytes - before, 4096);
    assert_ok(c, tfm_measure_end(c, NULL));
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(platform, bf16_dot_is_told_where_it_is_not_there) {
    tfm_options o = options_of(1);
    char said[100] = "", expected[100];
    o.bf16_dot = 1;
    o.log = on_log;
    o.hook_user = said;
    tfm_destroy(context_with(&o));
    snprintf(expected, sizeof expected, "%d tfm_create: no BF16 dot products here", TFM_LOG_INFO);
    cr_assert_str_eq(said, expected);
}

/* Several survivors at once, views of each other among them. */
Test(platform, keep_all_saves_a_list) {
    const tfm_options o = options_of(1);
    tfm_ctx *c = context_with(&o);
    tfm_marker mark = tfm_mark(c);
    tfm_tensor *a, *b, *view, *list[5];
    (void)tfm_ones(c, TFM_SHAPE(1000));
    a = tfm_arange(c, TFM_F32, 0, 500, 1);
    (void)tfm_ones(c, TFM_SHAPE(300000));
    b = tfm_arange(c, TFM_F32, 500, 1000, 1);
    view = tfm_narrow(c, b, 0, 100, 7);
    (void)tfm_ones(c, TFM_SHAPE(10));
    list[0] = view;
    list[1] = NULL;
    list[2] = b;
    list[3] = a;
    list[4] = b;
    cr_assert(tfm__keep_all(c, mark, list, 5), "%s", tfm_error(c));
    (void)tfm_ones(c, TFM_SHAPE(3000));
    cr_assert(((float *)a->data)[499] == 499 && ((float *)b->data)[499] == 999 && ((float *)view->data)[6] == 606);
    cr_assert_eq((char *)view->data - (char *)b->data, 400);
    tfm_destroy(c);
}

/* The lowest moves first, whatever its place in the list, and a view with its base. */
Test(platform, keep_all_writes_over_nothing_that_moves_later) {
    const tfm_options o = options_of(1);
    tfm_ctx *c = context_with(&o);
    tfm_marker mark = tfm_mark(c);
    tfm_tensor *a = tfm_arange(c, TFM_F32, 0, 500, 1), *b, *base, *view, *next, *list[3];
    int i;
    (void)tfm_ones(c, TFM_SHAPE(300000)); /* what follows lies in another chunk */
    b = tfm_arange(c, TFM_F32, 500, 1000, 1);
    list[0] = b;
    list[1] = a;
    cr_assert(tfm__keep_all(c, mark, list, 2), "%s", tfm_error(c));
    for (i = 0; i < 3; i++) (void)tfm_ones(c, TFM_SHAPE(200000)); /* also where b was */
    cr_assert(((float *)a->data)[0] == 0 && ((float *)a->data)[499] == 499);
    cr_assert(((float *)b->data)[0] == 500 && ((float *)b->data)[499] == 999);
    mark = tfm_mark(c);
    base = tfm_arange(c, TFM_F32, 0, 64, 1);
    view = tfm_narrow(c, base, 0, 16, 16);
    next = tfm_arange(c, TFM_F32, 64, 128, 1);
    list[0] = base;
    list[1] = view;
    list[2] = next;
    cr_assert(tfm__keep_all(c, mark, list, 3), "%s", tfm_error(c));
    cr_assert(((float *)base->data)[63] == 63 && ((float *)next->data)[0] == 64 && ((float *)next->data)[63] == 127);
    cr_assert_eq((char *)view->data - (char *)base->data, 64);
    tfm_destroy(c);
}

/* -- 6 ------------------------------------------------------------------------------------------------------------- */

typedef struct work {
    tfm_ctx *c;
    int64_t hit[4096], slot[8]; /* visits of each item and slot */
    int64_t items, grain, wrong, stop_at;
    uint64_t mode;
    int inner; /* also run a job inside of each piece */
} work;

typedef struct inner {
    work *w;
    int slot; /* of the piece around it */
} inner;

static void inner_task(void *arg, int64_t begin, int64_t end, int slot) {
    inner *n = (inner *)arg;
    if (begin < 0 || end > 10 || slot != n->slot) tfm__atomic_add(&n->w->wrong, 1);
}

static void task(void *arg, int64_t begin, int64_t end, int slot) {
    work *w = (work *)arg;
    unsigned char *scratch;
    int64_t i;
    if (begin % w->grain || end - begin > w->grain || end > w->items || begin >= end || slot < 0
        || slot >= w->c->threads) {
        tfm__atomic_add(&w->wrong, 1);
        return;
    }
    scratch = (unsigned char *)tfm__scratch(w->c, slot);
    if ((uintptr_t)scratch % 64) tfm__atomic_add(&w->wrong, 1);
    scratch[0] = scratch[SCRATCH - 1] = (unsigned char)begin; /* two threads on one slot are a race that TSan sees */
    tfm__atomic_add(&w->slot[slot], 1);
    if (tfm__fp_mode() != w->mode) tfm__atomic_add(&w->wrong, 1);
    for (i = begin; i < end; i++) w->hit[i]++;
    if (w->inner) {
        inner n;
        n.w = w;
        n.slot = slot;
        tfm__for(w->c, 10, 1, 1e9, inner_task, &n);
    }
    if (scratch[0] != (unsigned char)begin || scratch[SCRATCH - 1] != (unsigned char)begin)
        tfm__atomic_add(&w->wrong, 1);
    if (w->stop_at && begin >= w->stop_at) tfm_cancel(w->c);
}

static work do_work(tfm_ctx *c, int64_t items, int64_t grain, double size, int inner) {
    work w;
    int64_t i;
    memset(&w, 0, sizeof w);
    w.c = c;
    w.items = items;
    w.grain = grain;
    w.mode = tfm__fp_mode();
    w.inner = inner;
    tfm__for(c, items, grain, size, task, &w);
    cr_assert_eq(w.wrong, 0, "%lld pieces were wrong", (long long)w.wrong);
    for (i = 0; i < items; i++)
        cr_assert_eq(w.hit[i], 1, "item %lld was done %lld times", (long long)i, (long long)w.hit[i]);
    return w;
}

static void for_backwards(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    int i;
    ++*(int *)user;
    for (i = count; i >= -1; i--) run(arg, i); /* one too many at either end: ignored */
}

Test(threads_inside, a_job_does_every_item_once_in_pieces_of_its_grain) {
    static const int counts[] = {1, 2, 3, 7};
    const int rounds = test_quick() ? 60 : 300;
    int i, round;
    for (i = 0; i < 4; i++) {
        tfm_options o = options_of(counts[i]);
        tfm_ctx *c = context_with(&o);
        for (round = 0; round < rounds; round++)
            (void)do_work(c, 1 + round * 37 % 4096, 1 + round % 7, round % 3 ? 1e9 : 1000.0 * round, 0);
        (void)do_work(c, 0, 1, 1e9, 0);
        (void)do_work(c, 4096, 4096, 1e9, 0);
        (void)do_work(c, 5, 1000, 1e9, 0);
        tfm_destroy(c);
    }
}

Test(threads_inside, a_job_inside_a_job_is_serial_on_the_slot_of_its_caller) {
    static const int counts[] = {1, 2, 7};
    int i, calls = 0;
    for (i = 0; i < 6; i++) {
        tfm_options o = options_of(counts[i % 3]);
        tfm_ctx *c;
        if (i >= 3) {
            o.parallel_for = for_backwards;
            o.parallel_user = &calls;
        }
        c = context_with(&o);
        (void)do_work(c, 60, 1, 1e9, 1);
        tfm_destroy(c);
    }
    cr_assert_eq(calls, 2); /* with 2 and 7 threads, once each: inner jobs do not ask for threads */
}

/* One thread for all slots, beginning with the last of them and then with the second. */
static void for_in_turns(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    int *calls = (int *)user, i, first = ++*calls % 2 ? count - 1 : 1;
    run(arg, -1); /* no slot */
    for (i = 0; i < count; i++) {
#if defined(FE_UPWARD)
        uint64_t mode;
        fesetround(FE_UPWARD);
        mode = tfm__fp_mode();
        run(arg, (first + i) % count);
        if (tfm__fp_mode() != mode) *calls = 1000;
        fesetround(FE_TONEAREST);
#else
        run(arg, (first + i) % count);
#endif
    }
}

/* Its rounding is its own again, and it works for no slot any more. */
Test(threads_inside, a_thread_of_the_users_is_left_as_it_was) {
    tfm_options o = options_of(3);
    tfm_ctx *c;
    int calls = 0;
    o.parallel_for = for_in_turns;
    o.parallel_user = &calls;
    c = context_with(&o);
    (void)do_work(c, 60, 1, 1e9, 1);
    (void)do_work(c, 60, 1, 1e9, 1);
    cr_assert_eq(calls, 2);
    tfm_destroy(c);
}

#if !defined(_WIN32)
extern int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg);
static int creatable = -1; /* threads that can be made; negative: any number */

int create_thread(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg) {
    if (creatable == 0) return EAGAIN;
    creatable -= creatable > 0;
    return pthread_create(thread, attr, run, arg);
}

Test(threads_inside, fewer_threads_than_asked_for_are_told_and_do_the_work) {
    int made;
    for (made = 1; made < 4; made++) {
        test_memory m = test_memory_new();
        tfm_options o = options_of(4);
        tfm_ctx *c;
        char said[100] = "", expected[100];
        o.allocator = test_allocator(&m);
        o.log = on_log;
        o.hook_user = said;
        creatable = made - 1;
        c = context_with(&o);
        creatable = -1;
        snprintf(expected, sizeof expected, "%d tfm_create: %d of 4 threads could be made", TFM_LOG_WARNING, made);
        cr_expect_str_eq(said, expected);
        cr_expect_eq(tfm_threads(c), made);
        (void)do_work(c, 1000, 1, 1e9, 0);
        tfm_destroy(c);
        assert_no_leak(&m);
    }
}
#endif

Test(threads_inside, little_work_stays_with_the_caller) {
    tfm_options o = options_of(4);
    tfm_ctx *c = context_with(&o);
    work w = do_work(c, 1000, 1, 100, 0);
    cr_assert_eq(w.slot[0], 1000);
    o.parallel_user = &o.spin_us; /* counts */
    o.parallel_for = for_backwards;
    tfm_destroy(c);
    o.spin_us = 0;
    c = context_with(&o);
    w = do_work(c, 1000, 1, 100, 0);
    cr_assert_eq(o.spin_us, 0);
    w = do_work(c, 1000, 1, 1e9, 0);
    cr_assert_eq(o.spin_us, 1);
    cr_assert_eq(w.slot[3], 1000); /* the first that ran took all pieces */
    tfm_destroy(c);
}

Test(threads_inside, a_cancel_stops_between_pieces) {
    static const int counts[] = {1, 2, 7};
    int i;
    for (i = 0; i < 3; i++) {
        tfm_options o = options_of(counts[i]);
        tfm_ctx *c = context_with(&o);
        work w;
        memset(&w, 0, sizeof w);
        w.c = c;
        w.items = 4096;
        w.grain = 1;
        w.mode = tfm__fp_mode();
        w.stop_at = 100;
        tfm__for(c, 4096, 1, 1e9, task, &w);
        cr_assert(tfm__cancelled(c) && w.wrong == 0 && w.hit[50] == 1 && w.hit[4095] == 0);
        tfm_clear(c);
        (void)do_work(c, 4096, 1, 1e9, 0);
        tfm_destroy(c);
    }
}

Test(threads_inside, the_default_is_at_least_one_and_at_most_what_may_run) {
    int cpus = -1;
    const int n = tfm__default_threads(&cpus);
    cr_assert(n >= 1 && n <= 1024);
    if (cpus > 0) cr_assert_leq(n, cpus);
}

#if defined(__linux__)
Test(threads_inside, what_is_read_to_make_a_context_is_closed_again) {
    const tfm_options o = options_of(0);
    const int before = open("/dev/null", O_RDONLY);
    int i, after;
    for (i = 0; i < 3; i++) tfm_destroy(context_with(&o));
    after = open("/dev/null", O_RDONLY);
    cr_assert_eq(after, before + 1);
    close(after);
    close(before);
}

/* A worker on the caller's processor leaves it, and may afterwards run where it might before. */
Test(threads_inside, a_worker_steps_aside) {
    cpu_set_t before, now, one;
    tfm__pool p;
    tfm__worker w;
    const int cpu = sched_getcpu();
    int tries;
    memset(&p, 0, sizeof p);
    memset(&w, 0, sizeof w);
    w.pool = &p;
    cr_assert(cpu >= 0 && sched_getaffinity(0, sizeof before, &before) == 0);
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    cr_assert_eq(sched_setaffinity(0, sizeof one, &one), 0);
    p.cpu = cpu;
    w.aside = 0;
    tfm__step_aside(&w); /* nowhere to go */
    cr_assert_eq(p.crowded, 0);
    cr_assert(sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &one));
    cr_assert_eq(sched_setaffinity(0, sizeof before, &before), 0);
    if (CPU_COUNT(&before) < 2) cr_skip_test("one processor");
    p.cpu = -1; /* the caller is elsewhere */
    w.aside = 0;
    tfm__step_aside(&w);
    cr_assert(p.crowded == 0 && w.aside == 0);
    for (tries = 0; tries < 100 && !p.crowded; tries++) { /* the system may move us in between */
        p.cpu = sched_getcpu();
        w.aside = 0;
        tfm__step_aside(&w);
    }
    cr_assert_eq(p.crowded, 1);
    cr_assert(sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &before));
}

static void write_text(const char *directory, const char *name, const char *text) {
    char path[600];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    f = fopen(path, "w");
    cr_assert_not_null(f, "%s", path);
    fputs(text, f);
    fclose(f);
}

static int quota(const char *root, const char *group, int v1) {
    char copy[64];
    snprintf(copy, sizeof copy, "%s", group);
    return v1 ? tfm__quota_of(root, copy, "cpu.cfs_quota_us", "cpu.cfs_period_us")
              : tfm__quota_of(root, copy, "cpu.max", NULL);
}

/* The kernel numbers its controllers: which of two that are mounted together comes first differs. */
Test(threads_inside, the_cpu_controller_is_found_among_others) {
    static const char *const there[] = {"cpu", "cpu,cpuacct", "cpuacct,cpu", "cpuset,cpu,cpuacct"},
                      *const missing[] = {"", "cpuset", "cpuacct", "name=cpu", "cpuacct,cpuset", "name=systemd"};
    int i;
    for (i = 0; i < 4; i++) cr_expect(tfm__lists_cpu(there[i]), "%s", there[i]);
    for (i = 0; i < 6; i++) cr_expect_not(tfm__lists_cpu(missing[i]), "%s", missing[i]);
}

Test(threads_inside, quotas_of_a_control_group_and_of_those_above_are_read) {
    static const char *const files[] = {"a/b/cpu.max",          "a/cpu.max", "a/b", "v1/cpu.cfs_quota_us",
                                        "v1/cpu.cfs_period_us", "v1",        "a",   ""};
    char root[300], path[600];
    int i;
    test_temporary_path(root, sizeof root, "groups");
    cr_assert_eq(mkdir(root, 0700), 0);
    snprintf(path, sizeof path, "%s/a", root);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/v1", root);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/a/b", root);
    mkdir(path, 0700);
    cr_expect_eq(quota(root, "/a/b", 0), 0, "no file, no quota");
    write_text(root, "a/b/cpu.max", "max 100000\n");
    cr_expect_eq(quota(root, "/a/b", 0), 0);
    write_text(root, "a/cpu.max", "250000 100000\n");
    cr_expect_eq(quota(root, "/a/b", 0), 3, "the one above counts, rounded up");
    write_text(root, "a/b/cpu.max", "50000 100000\n");
    cr_expect_eq(quota(root, "/a/b", 0), 1);
    cr_expect_eq(quota(root, "/a", 0), 3);
    cr_expect_eq(quota(root, "/elsewhere/x", 0), 0);
    write_text(root, "a/cpu.max", "100000 50000\n");
    cr_expect_eq(quota(root, "/a", 0), 2);
    write_text(root, "a/cpu.max", "99999999999999 100000\n");
    cr_expect_eq(quota(root, "/a", 0), 0, "more than there are threads is none");
    write_text(root, "v1/cpu.cfs_quota_us", "-1\n");
    write_text(root, "v1/cpu.cfs_period_us", "100000\n");
    cr_expect_eq(quota(root, "/v1", 1), 0);
    write_text(root, "v1/cpu.cfs_quota_us", "400000\n");
    cr_expect_eq(quota(root, "/v1", 1), 4);
    write_text(root, "a/cpu.max", "nonsense");
    cr_expect_eq(quota(root, "/a", 0), 0);
    for (i = 0; i < 8; i++) {
        snprintf(path, sizeof path, "%s/%s", root, files[i]);
        remove(path);
    }
}
#endif

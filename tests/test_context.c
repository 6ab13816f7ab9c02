/* The life of a context: options, the sticky error, hooks, limits, the profile. */
#define _GNU_SOURCE /* setenv, also under -std=c11 */
#include "test.h"
#include <time.h>

static tfm_options no_options(void) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    return o;
}

static tfm_ctx *context_with(const tfm_options *o) {
    tfm_ctx *c = tfm_create(o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "no context: %s", tfm_error(c));
    return c;
}

static void set_environment(const char *name, const char *value) {
#if defined(_WIN32)
    char text[256];
    snprintf(text, sizeof text, "%s=%s", name, value ? value : "");
    _putenv(text);
#else
    if (value) setenv(name, value, 1);
    else unsetenv(name);
#endif
}

/* A context that could not be made as asked says why, and no tfm_clear makes it usable. */
static void assert_broken(const tfm_options *o, tfm_status status, const char *words) {
    tfm_ctx *c = tfm_create(o);
    cr_assert_not_null(c);
    cr_assert_eq(tfm_status_of(c), status, "%s: %s", words, tfm_error(c));
    cr_assert(strstr(tfm_error(c), words) != NULL, "\"%s\" does not say \"%s\"", tfm_error(c), words);
    cr_assert(strstr(tfm_error(c), "tfm_create") != NULL, "\"%s\"", tfm_error(c));
    tfm_clear(c);
    cr_assert_eq(tfm_status_of(c), status);
    cr_assert_null(tfm_ones(c, TFM_SHAPE(2)));
    cr_assert(tfm_isa_name(c)[0] != 0);
    tfm_destroy(c);
}

/* -- making -------------------------------------------------------------------------------------------------------- */

Test(context, no_options_and_all_zero_options_are_the_same) {
    const tfm_options o = no_options();
    tfm_ctx *a = context_with(NULL), *b = context_with(&o);
    const char *forced = test_env("TFM_ISA", "");
    tfm_tensor *x = tfm_randn(a, TFM_SHAPE(100)), *y = tfm_randn(b, TFM_SHAPE(100));
    assert_made(a, x);
    assert_made(b, y);
    assert_same_bytes(x->data, y->data, 400);
    cr_assert_str_eq(tfm_isa_name(a), tfm_isa_name(b));
    cr_assert_eq(tfm_threads(a), tfm_threads(b));
    cr_assert_geq(tfm_threads(a), 1);
    if (forced[0]) cr_assert_str_eq(tfm_isa_name(a), forced);
    cr_assert_str_eq(tfm_error(a), "");
    cr_assert_eq(tfm_status_of(a), TFM_OK);
    tfm_destroy(a);
    tfm_destroy(b);
}

/* Of the processor, so that neighbours do not count: threads, detection and quotas are all read in it. */
Test(context, making_one_takes_under_a_millisecond) {
    const double most = test_quick() ? 1e-1 : 1e-3; /* quick: sanitizers, emulators */
    double best = 1;
    int i;
    for (i = 0; i < 50 && best >= most; i++) {
        const clock_t begin = clock();
        tfm_ctx *c = context_with(NULL);
        const double taken = (double)(clock() - begin) / CLOCKS_PER_SEC;
        tfm_destroy(c);
        if (taken < best) best = taken;
    }
    cr_assert_lt(best, most, "%.3f ms", 1e3 * best);
}

Test(context, options_are_copied) {
    char isa[16] = "scalar";
    tfm_options *o = (tfm_options *)calloc(1, sizeof *o);
    tfm_ctx *c;
    o->isa = isa;
    o->threads = 1;
    o->seed = 9;
    c = context_with(o);
    memset(isa, 'x', sizeof isa - 1);
    memset(o, 0xA5, sizeof *o);
    free(o);
    cr_assert_str_eq(tfm_isa_name(c), "scalar");
    cr_assert_eq(tfm_threads(c), 1);
    assert_made(c, tfm_randn(c, TFM_SHAPE(10)));
    tfm_destroy(c);
}

Test(context, a_null_context_is_out_of_memory_and_never_a_crash) {
    tfm_memory m;
    tfm_profile_row row;
    tfm_marker mark = tfm_mark(NULL);
    cr_assert_str_eq(tfm_error(NULL), "out of memory");
    cr_assert_eq(tfm_status_of(NULL), TFM_OOM);
    cr_assert_null(tfm_ones(NULL, TFM_SHAPE(2)));
    cr_assert_null(tfm_keep(NULL, mark, NULL));
    cr_assert_null(tfm_profile(NULL));
    cr_assert_eq(tfm_profile_count(NULL), 0);
    cr_assert_eq(tfm_profile_get(NULL, 0, &row), TFM_INVALID);
    cr_assert_eq(tfm_measure_end(NULL, &m), TFM_OOM);
    m = tfm_memory_usage(NULL);
    cr_assert(m.held == 0 && m.arena_used == 0 && m.allocations == 0);
    cr_assert_str_eq(tfm_isa_name(NULL), "");
    cr_assert_eq(tfm_threads(NULL), 0);
    cr_assert_eq(tfm_tape_length(NULL), 0);
    tfm_rewind(NULL, mark);
    tfm_clear(NULL);
    tfm_cancel(NULL);
    tfm_seed(NULL, 1);
    tfm_memory_reset(NULL);
    tfm_measure_begin(NULL);
    tfm_profile_start(NULL);
    tfm_profile_stop(NULL);
    tfm_tape_clear(NULL);
    tfm_destroy(NULL);
}

Test(context, half_an_allocator_gives_no_context) {
    test_memory m = test_memory_new();
    tfm_options o = no_options();
    o.allocator = test_allocator(&m);
    o.allocator.free = NULL;
    cr_assert_null(tfm_create(&o));
    o.allocator = test_allocator(&m);
    o.allocator.alloc = NULL;
    cr_assert_null(tfm_create(&o));
    cr_assert_eq(m.calls, 0);
}

Test(context, all_memory_comes_from_the_users_allocator_and_goes_back) {
    test_memory m = test_memory_new();
    tfm_options o = no_options();
    tfm_ctx *c;
    tfm_memory u;
    int i;
    o.allocator = test_allocator(&m);
    o.threads = 3;
    c = context_with(&o);
    for (i = 0; i < 2000; i++) assert_made(c, tfm_randn(c, TFM_SHAPE(1 + i)));
    tfm_profile_start(c);
    for (i = 0; i < 200; i++) assert_made(c, tfm_randn(c, TFM_SHAPE(1 + i))); /* a table that grows goes back */
    u = tfm_memory_usage(c);
    cr_assert_eq(u.held, m.bytes, "held is %lld, the allocator gave %lld", (long long)u.held, (long long)m.bytes);
    cr_assert_eq(u.held_peak, m.peak);
    cr_assert_eq(u.allocations, m.calls);
    tfm_memory_reset(c);
    cr_assert_eq(tfm_memory_usage(c).held_peak, m.bytes);
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(context, an_op_whose_profile_finds_no_memory_fails) {
    test_memory m = test_memory_new();
    tfm_options o = no_options();
    tfm_ctx *c;
    tfm_tensor *x;
    o.allocator = test_allocator(&m);
    o.threads = 1;
    c = context_with(&o);
    x = tfm_ones(c, TFM_SHAPE(3));
    tfm_profile_start(c);
    m.fail_at = m.calls;
    assert_refused(c, tfm_add(c, x, x), TFM_OOM);
    m.fail_at = -1;
    assert_made(c, tfm_add(c, x, x));
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(context, an_isa_is_what_was_asked_or_a_clear_error) {
    tfm_options o = no_options();
    int i;
    for (i = 0; i < TEST_ISAS; i++) {
        o.isa = test_isa(i);
        if (tfm_isa_supported(o.isa)) {
            tfm_ctx *c = context_with(&o);
            cr_assert_str_eq(tfm_isa_name(c), o.isa);
            tfm_destroy(c);
        } else {
            assert_broken(&o, TFM_UNSUPPORTED, o.isa);
        }
    }
    cr_assert(tfm_isa_supported("scalar"));
    cr_assert_not(tfm_isa_supported("AVX2"));
    cr_assert_not(tfm_isa_supported(""));
    cr_assert_not(tfm_isa_supported(NULL));
    o.isa = "mmx";
    assert_broken(&o, TFM_INVALID, "isa \"mmx\" is not one of scalar, neon, avx2, avx512");
}

Test(context, the_environment_chooses_the_isa_unless_the_option_does) {
    char before[64];
    tfm_options o = no_options();
    tfm_ctx *c;
    snprintf(before, sizeof before, "%s", test_env("TFM_ISA", ""));
    set_environment("TFM_ISA", "scalar");
    c = context_with(&o);
    cr_expect_str_eq(tfm_isa_name(c), "scalar");
    tfm_destroy(c);
    set_environment("TFM_ISA", "fastest");
    assert_broken(&o, TFM_INVALID, "environment TFM_ISA \"fastest\"");
    o.isa = "scalar";
    c = context_with(&o);
    tfm_destroy(c);
    set_environment("TFM_ISA", NULL);
    o.isa = NULL;
    c = context_with(&o); /* the best there is */
    cr_expect(tfm_isa_supported("avx512") ? !strcmp(tfm_isa_name(c), "avx512")
              : tfm_isa_supported("avx2") ? !strcmp(tfm_isa_name(c), "avx2")
              : tfm_isa_supported("neon") ? !strcmp(tfm_isa_name(c), "neon")
                                          : !strcmp(tfm_isa_name(c), "scalar"));
    tfm_destroy(c);
    set_environment("TFM_ISA", before[0] ? before : NULL);
}

static void serial_for(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    int i;
    ++*(int *)user;
    for (i = count - 1; i >= 0; i--) run(arg, i);
}

static void assert_broken_at_limit(const tfm_options *o, const char *words) {
    tfm_ctx *c = tfm_create(o);
    cr_assert_not_null(c);
    cr_assert_eq(tfm_status_of(c), TFM_OOM);
    cr_assert(strstr(tfm_error(c), words) != NULL, "%s", tfm_error(c));
    tfm_clear(c);
    cr_assert_eq(tfm_status_of(c), TFM_OOM);
    tfm_destroy(c);
}

Test(context, impossible_options_are_a_clear_error) {
    tfm_options o = no_options();
    int calls = 0;
    o.threads = -1;
    assert_broken(&o, TFM_INVALID, "threads is -1");
    o.threads = 1025;
    assert_broken(&o, TFM_INVALID, "threads is 1025, not 0 to 1024");
    o.threads = 1 << 20;
    assert_broken(&o, TFM_INVALID, "threads is 1048576");
    o.threads = 1024;
    o.parallel_for = serial_for;
    o.parallel_user = &calls;
    o.memory_limit = 1 << 20;
    assert_broken_at_limit(&o, "memory_limit is 1048576");
    o.memory_limit = 0;
    o.threads = 0;
    assert_broken(&o, TFM_INVALID, "threads is 0");
    o.parallel_for = NULL;
    o.memory_limit = -5;
    assert_broken(&o, TFM_INVALID, "memory_limit is -5");
    o.memory_limit = 1000; /* less than a context */
    assert_broken_at_limit(&o, "memory_limit is 1000");
    cr_assert_eq(calls, 0);
}

Test(context, threads_are_what_was_asked) {
    static const int counts[] = {1, 2, 3, 7};
    int i;
    for (i = 0; i < 4; i++) {
        tfm_options o = no_options();
        tfm_ctx *c;
        o.threads = counts[i];
        c = context_with(&o);
        cr_assert_eq(tfm_threads(c), counts[i]);
        tfm_destroy(c);
    }
}

Test(context, contexts_come_and_go) {
    int i;
    for (i = 0; i < 30; i++) {
        tfm_options o = no_options();
        tfm_ctx *c;
        o.threads = 1 + i % 4;
        o.spin_us = i % 3 - 1;
        c = context_with(&o);
        if (i % 2) assert_made(c, tfm_randn(c, TFM_SHAPE(20000)));
        tfm_destroy(c);
    }
}

/* -- the sticky error ---------------------------------------------------------------------------------------------- */

Test(context, version_and_status_names_are_stable) {
    static const char *const names[] = {"ok",     "invalid",     "out of memory", "io",
                                        "format", "unsupported", "cancelled",     "busy"};
    int i;
    cr_assert_eq(tfm_version(), TFM_VERSION);
    for (i = 0; i < 8; i++) cr_assert_str_eq(tfm_status_name(i), names[i]);
    cr_assert_str_eq(tfm_status_name(-1), "unknown");
    cr_assert_str_eq(tfm_status_name(8), "unknown");
    cr_assert_str_eq(tfm_status_name(1 << 30), "unknown");
}

Test(context, the_first_error_stays_until_it_is_cleared) {
    tfm_ctx *c = context_with(NULL);
    tfm_tensor *a = tfm_ones(c, TFM_SHAPE(2, 3)), *b = tfm_ones(c, TFM_SHAPE(4)), *y;
    float value = 5;
    char first[600];
    cr_assert_null(tfm_add(c, a, b));
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    snprintf(first, sizeof first, "%s", tfm_error(c));
    cr_assert(strstr(first, "tfm_add") && strstr(first, "(2, 3)") && strstr(first, "(4)"), "%s", first);
    cr_assert_null(tfm_matmul(c, a, a));                     /* wrong as well */
    cr_assert_null(tfm_add(c, a, a));                        /* right */
    cr_assert_null(tfm_full(c, TFM_F32, TFM_SHAPE((int64_t)1 << 40), 0)); /* out of memory */
    cr_assert_eq(tfm_read(c, a, &value, 6), TFM_INVALID);    /* a verb */
    cr_assert_eq(value, 5);
    cr_assert_eq(tfm_copy(c, a, b), TFM_INVALID);
    cr_assert_str_eq(tfm_error(c), first);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    cr_assert_str_eq(tfm_error(c), "");
    cr_assert_eq(tfm_status_of(c), TFM_OK);
    y = tfm_add(c, a, a);
    assert_made(c, y);
    cr_assert_eq(((float *)y->data)[5], 2);
    tfm_destroy(c);
}

/* An expression that failed inside another one does not count as "left out". */
Test(context, an_optional_argument_that_failed_is_not_taken_for_absent) {
    tfm_ctx *c = context_with(NULL);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(2, 3)), *w = tfm_ones(c, TFM_SHAPE(5, 3));
    assert_made(c, tfm_linear(c, x, w, NULL, TFM_ACT_NONE));
    cr_assert_null(tfm_linear(c, x, w, tfm_full(c, 77, TFM_SHAPE(5), 0), TFM_ACT_NONE));
    cr_assert(strstr(tfm_error(c), "tfm_full") != NULL, "%s", tfm_error(c));
    tfm_destroy(c);
}

Test(context, every_expression_is_null_while_an_error_stands) {
    static const char text[] = "a\nb\n";
    tfm_ctx *c = context_with(NULL);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(1, 2, 4, 16)), *m = tfm_ones(c, TFM_SHAPE(4, 4)),
               *s = tfm_ones(c, TFM_SHAPE(1));
    const int64_t id[4] = {0, 1, 2, 3};
    tfm_tensor *ids = tfm_from(c, TFM_I64, TFM_SHAPE(4), id), *flag = tfm_compare(c, m, m, TFM_EQ);
    tfm_cache_options cache;
    tfm_mask mask = tfm_mask_causal();
    tfm_rope rope;
    const tfm_tensor *list[2];
    const tfm_shape row = TFM_SHAPE(-1);
    tfm_marker mark = tfm_mark(c);
    char first[600];
    int64_t before;
    int i;
    memset(&cache, 0, sizeof cache);
    memset(&rope, 0, sizeof rope);
    cache.heads = 2;
    cache.key_size = 16;
    cache.capacity = 32;
    list[0] = list[1] = m;
    cr_assert(x && m && s && ids && flag, "%s", tfm_error(c));
    cr_assert_null(tfm_transpose(c, m, 0, 7));
    snprintf(first, sizeof first, "%s", tfm_error(c));
    before = tfm_memory_usage(c).arena_used;
    {
        const void *made[] = {tfm_empty(c, TFM_F32, TFM_SHAPE(2)),
                              tfm_zeros(c, TFM_SHAPE(2)),
                              tfm_ones(c, TFM_SHAPE(2)),
                              tfm_full(c, TFM_F32, TFM_SHAPE(2), 1),
                              tfm_randn(c, TFM_SHAPE(2)),
                              tfm_uniform(c, TFM_SHAPE(2), 0, 1),
                              tfm_arange(c, TFM_F32, 0, 4, 1),
                              tfm_from(c, TFM_I64, TFM_SHAPE(4), id),
                              tfm_wrap(c, TFM_F32, TFM_SHAPE(4), m->data),
                              tfm_reshape(c, m, TFM_SHAPE(16)),
                              tfm_view(c, m, TFM_SHAPE(16)),
                              tfm_transpose(c, m, 0, 1),
                              tfm_permute(c, m, TFM_SHAPE(1, 0)),
                              tfm_slice(c, m, 0, 0, 2, 1),
                              tfm_narrow(c, m, 0, 0, 2),
                              tfm_select(c, m, 0, 0),
                              tfm_expand(c, s, TFM_SHAPE(4)),
                              tfm_squeeze(c, s, 0),
                              tfm_unsqueeze(c, m, 0),
                              tfm_split_heads(c, x, 2),
                              tfm_combine_heads(c, x),
                              tfm_contiguous(c, m),
                              tfm_clone(c, m),
                              tfm_cast(c, m, TFM_F16),
                              tfm_cat(c, list, 2, 0),
                              tfm_stack(c, list, 2, 0),
                              tfm_pad(c, m, 0, 1, 1, 0),
                              tfm_index_select(c, m, 0, ids),
                              tfm_tril(c, m, 0),
                              tfm_triu(c, m, 0),
                              tfm_masked_fill(c, m, flag, 0),
                              tfm_where(c, flag, m, m),
                              tfm_add(c, m, m),
                              tfm_sub(c, m, m),
                              tfm_mul(c, m, m),
                              tfm_div(c, m, m),
                              tfm_minimum(c, m, m),
                              tfm_maximum(c, m, m),
                              tfm_scale(c, m, 2),
                              tfm_shift(c, m, 2),
                              tfm_neg(c, m),
                              tfm_abs(c, m),
                              tfm_exp(c, m),
                              tfm_log(c, m),
                              tfm_sqrt(c, m),
                              tfm_rsqrt(c, m),
                              tfm_sin(c, m),
                              tfm_cos(c, m),
                              tfm_tanh(c, m),
                              tfm_sigmoid(c, m),
                              tfm_relu(c, m),
                              tfm_gelu(c, m),
                              tfm_silu(c, m),
                              tfm_activation(c, m, TFM_ACT_RELU),
                              tfm_pow(c, m, 2),
                              tfm_clamp(c, m, 0, 1),
                              tfm_glu(c, m, m, TFM_ACT_SILU),
                              tfm_compare(c, m, m, TFM_EQ),
                              tfm_compare_scalar(c, m, 1, TFM_EQ),
                              tfm_sum(c, m, row, 0),
                              tfm_mean(c, m, row, 0),
                              tfm_max(c, m, row, 0),
                              tfm_min(c, m, row, 0),
                              tfm_logsumexp(c, m, row, 0),
                              tfm_argmax(c, m, 0, 0),
                              tfm_topk(c, m, 2, NULL),
                              tfm_softmax(c, m, 0),
                              tfm_log_softmax(c, m, 0),
                              tfm_matmul(c, m, m),
                              tfm_linear(c, m, m, NULL, 0),
                              tfm_embedding(c, m, ids),
                              tfm_layer_norm(c, m, NULL, NULL, NULL),
                              tfm_rms_norm(c, m, NULL, NULL),
                              tfm_dropout(c, m, 0.5f),
                              tfm_mask_matrix(c, &mask, 1, 1, 4, 4),
                              tfm_alibi_slopes(c, 4),
                              tfm_attention(c, x, x, x, NULL),
                              tfm_heatmap_svg(c, m, NULL),
                              tfm_heatmap_text(c, m, NULL),
                              tfm_cache_create(c, &cache),
                              tfm_params_create(c),
                              tfm_sinusoidal(c, TFM_POSITION_SINUSOIDAL, 0, 4, 8),
                              tfm_rotary(c, x, &rope, 0, NULL),
                              tfm_l2_normalize(c, m),
                              tfm_format(c, m),
                              tfm_profile(c),
                              tfm_file_open_memory(c, text, 4),
                              tfm_tokenizer_lines_memory(c, text, 4, -1),
                              tfm_keep(c, mark, m)};
        for (i = 0; i < (int)(sizeof made / sizeof made[0]); i++) cr_expect_null(made[i], "expression %d", i);
    }
    cr_assert_str_eq(tfm_error(c), first);
    cr_assert_eq(tfm_memory_usage(c).arena_used, before, "they took memory");
    tfm_destroy(c);
}

Test(context, an_error_text_of_any_length_ends_where_it_must) {
    tfm_ctx *c = context_with(NULL);
    char name[5000];
    int shift, i;
    for (shift = 0; shift < 2; shift++) { /* also in the middle of a character */
        const char *text;
        tfm_params *p = tfm_params_create(c);
        assert_made(c, p);
        for (i = 0; i < (int)sizeof name - 1; i++) name[i] = i < shift ? 'n' : "\xC3\xA9"[(i - shift) % 2];
        name[sizeof name - 1] = 0;
        cr_assert_null(tfm_params_write_begin(c, p, name));
        text = tfm_error(c);
        cr_assert_gt(strlen(text), 20u);
        cr_assert_lt(strlen(text), 4096u);
        for (i = 0; text[i]; i++) cr_assert_eq(text[i] == '\xC3', text[i + 1] == '\xA9', "%s", text);
        tfm_clear(c);
        tfm_params_destroy(p);
    }
    tfm_destroy(c);
}

/* -- hooks --------------------------------------------------------------------------------------------------------- */

typedef struct hooks {
    int logs, last_level, progresses, stop_at;
    int64_t last_done, last_total;
    char message[600], what[64];
    tfm_ctx *c;
    int seen_in_hook; /* the error could be read there */
} hooks;

static void on_log(void *user, int level, const char *message) {
    hooks *h = (hooks *)user;
    h->logs++;
    h->last_level = level;
    snprintf(h->message, sizeof h->message, "%s", message);
    if (h->c) h->seen_in_hook += !strcmp(tfm_error(h->c), message);
}

static int on_progress(void *user, const char *what, int64_t done, int64_t total) {
    hooks *h = (hooks *)user;
    h->progresses++;
    h->last_done = done;
    h->last_total = total;
    snprintf(h->what, sizeof h->what, "%s", what);
    return h->stop_at && done >= h->stop_at;
}

static tfm_ctx *hooked(hooks *h) {
    tfm_options o = no_options();
    tfm_ctx *c;
    memset(h, 0, sizeof *h);
    o.threads = 1;
    o.log = on_log;
    o.progress = on_progress;
    o.hook_user = h;
    c = context_with(&o);
    h->c = c;
    return c;
}

Test(context, an_error_is_logged_once) {
    hooks h;
    tfm_ctx *c = hooked(&h);
    cr_assert_eq(h.logs, 0, "a context that works has nothing to say");
    cr_assert_null(tfm_zeros(c, TFM_SHAPE(-3)));
    cr_assert_null(tfm_zeros(c, TFM_SHAPE(-4)));
    cr_assert_eq(h.logs, 1);
    cr_assert_eq(h.last_level, TFM_LOG_ERROR);
    cr_assert_str_eq(h.message, tfm_error(c));
    cr_assert_eq(h.seen_in_hook, 1);
    tfm_clear(c);
    cr_assert_null(tfm_zeros(c, TFM_SHAPE(-5)));
    cr_assert_eq(h.logs, 2);
    cr_assert(strstr(h.message, "(-5)") != NULL, "%s", h.message);
    tfm_destroy(c);
}

static tfm_session *tiny_session(tfm_ctx *c, tfm_params *p, tfm_transformer *model) {
    tfm_transformer_config g;
    tfm_session_options o;
    tfm_session *s;
    memset(&g, 0, sizeof g);
    memset(&o, 0, sizeof o);
    g.kind = TFM_DECODER_ONLY;
    g.position = TFM_POSITION_ROTARY;
    g.decoder_layers = 1;
    g.target_vocab = 7;
    g.max_length = 32;
    g.block.d_model = 16;
    g.block.heads = 2;
    g.block.d_ff = 16;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, model));
    o.capacity = 32;
    s = tfm_session_create(c, model, &o);
    assert_made(c, s);
    return s;
}

Test(context, progress_is_told_and_may_stop_a_long_call) {
    hooks h;
    tfm_ctx *c = hooked(&h);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer model;
    tfm_session *s = tiny_session(c, p, &model);
    const int64_t start[2] = {1, 2};
    tfm_prompt prompt;
    tfm_generate_options o;
    tfm_sequence out;
    memset(&o, 0, sizeof o);
    prompt.count = 2;
    prompt.ids = start;
    o.max_new = 10;
    assert_ok(c, tfm_generate(c, s, &prompt, 1, &o, &out));
    cr_assert_eq(out.count, 10);
    cr_assert_geq(h.progresses, 9); /* between the steps */
    cr_assert_geq(h.last_done, 9);
    cr_assert_eq(h.last_total, 10);
    cr_assert(h.what[0] != 0);
    tfm_session_reset(s);
    h.progresses = 0;
    h.stop_at = 4;
    cr_assert_eq(tfm_generate(c, s, &prompt, 1, &o, &out), TFM_CANCELLED);
    cr_assert_eq(h.last_done, 4);
    cr_assert_eq(tfm_status_of(c), TFM_CANCELLED);
    cr_assert(tfm_error(c)[0] != 0);
    h.stop_at = 0;
    tfm_clear(c);
    tfm_session_reset(s);
    assert_ok(c, tfm_generate(c, s, &prompt, 1, &o, &out));
    tfm_session_destroy(s);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(context, a_cancel_stops_the_next_call_and_is_forgotten_by_clear) {
    tfm_ctx *c = context_with(NULL);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(3));
    tfm_cancel(c);
    assert_refused(c, tfm_add(c, x, x), TFM_CANCELLED);
    assert_made(c, tfm_add(c, x, x));
    tfm_cancel(c);
    cr_assert_null(tfm_add(c, x, x));
    cr_assert(strstr(tfm_error(c), "cancelled") != NULL, "%s", tfm_error(c));
    cr_assert_null(tfm_add(c, x, x));
    cr_assert_eq(tfm_copy(c, x, x), TFM_CANCELLED);
    tfm_clear(c);
    tfm_cancel(c);
    tfm_clear(c);
    assert_made(c, tfm_add(c, x, x));
    tfm_destroy(c);
}

/* -- limits -------------------------------------------------------------------------------------------------------- */

Test(context, memory_limit_is_kept_and_named) {
    test_memory m = test_memory_new();
    tfm_options o = no_options();
    const int64_t limit = 4 << 20;
    tfm_ctx *c;
    tfm_marker mark;
    tfm_memory u;
    o.allocator = test_allocator(&m);
    o.memory_limit = limit;
    o.threads = 1;
    c = context_with(&o);
    mark = tfm_mark(c);
    while (tfm_ones(c, TFM_SHAPE(50000))) cr_assert_leq(m.bytes, limit);
    cr_assert_eq(tfm_status_of(c), TFM_OOM);
    cr_assert(strstr(tfm_error(c), "200000 bytes") != NULL, "%s", tfm_error(c));
    cr_assert(strstr(tfm_error(c), "memory_limit is 4194304") != NULL, "%s", tfm_error(c));
    u = tfm_memory_usage(c);
    cr_assert_leq(u.held_peak, limit);
    cr_assert_leq(m.peak, limit);
    cr_assert_gt(u.arena_used, limit / 2); /* most of it could be used */
    tfm_clear(c);
    tfm_rewind(c, mark);
    assert_made(c, tfm_ones(c, TFM_SHAPE(50000)));
    assert_refused(c, tfm_ones(c, TFM_SHAPE(5000000)), TFM_OOM);
    assert_made(c, tfm_ones(c, TFM_SHAPE(50000)));
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* Objects with a destroy of their own are held to it too. */
Test(context, memory_limit_holds_for_parameters_and_caches) {
    tfm_options o = no_options();
    tfm_ctx *c;
    tfm_cache_options cache;
    tfm_params *p;
    o.memory_limit = 8 << 20;
    o.threads = 1;
    c = context_with(&o);
    memset(&cache, 0, sizeof cache);
    cache.heads = 8;
    cache.key_size = 64;
    cache.capacity = 4096;
    assert_refused(c, tfm_cache_create(c, &cache), TFM_OOM);
    p = tfm_params_create(c);
    assert_made(c, p);
    assert_refused(c, tfm_params_add(c, p, "large", TFM_F32, TFM_SHAPE(4000000)), TFM_OOM);
    assert_made(c, tfm_params_add(c, p, "small", TFM_F32, TFM_SHAPE(400)));
    tfm_params_destroy(p);
    tfm_destroy(c);
}

static void *modest_alloc(void *user, size_t size) { /* sanitizers stop the program where malloc would give NULL */
    (void)user;
    return size < (size_t)1 << 30 ? malloc(size) : NULL;
}

static void modest_free(void *user, void *p) {
    (void)user;
    free(p);
}

Test(context, sizes_beyond_any_address_space_are_refused) {
    tfm_options o = no_options();
    tfm_ctx *c;
    const int64_t huge = (int64_t)1 << 62;
    o.allocator.alloc = modest_alloc;
    o.allocator.free = modest_free;
    c = context_with(&o);
    assert_refused(c, tfm_zeros(c, TFM_SHAPE(huge, huge)), TFM_INVALID);
    assert_refused(c, tfm_zeros(c, TFM_SHAPE(huge)), TFM_INVALID);
    cr_assert_null(tfm_zeros(c, TFM_SHAPE((int64_t)1 << 55)));
    cr_assert(tfm_status_of(c) == TFM_OOM || tfm_status_of(c) == TFM_INVALID);
    tfm_clear(c);
    assert_made(c, tfm_zeros(c, TFM_SHAPE(3)));
    tfm_destroy(c);
}

/* -- profile ------------------------------------------------------------------------------------------------------- */

Test(context, profile_has_a_row_for_each_op_and_shape) {
    tfm_ctx *c = context_with(NULL);
    tfm_tensor *a = tfm_ones(c, TFM_SHAPE(8, 16)), *b = tfm_ones(c, TFM_SHAPE(16, 32));
    tfm_profile_row row;
    int64_t i, adds = 0, products = 0, rows;
    const char *table;
    assert_made(c, tfm_add(c, a, a));
    cr_assert_eq(tfm_profile_count(c), 0, "rows without tfm_profile_start");
    tfm_profile_start(c);
    for (i = 0; i < 5; i++) assert_made(c, tfm_matmul(c, a, b));
    for (i = 0; i < 3; i++) assert_made(c, tfm_add(c, a, a));
    assert_made(c, tfm_add(c, b, b));
    tfm_profile_stop(c);
    assert_made(c, tfm_sub(c, b, b));
    rows = tfm_profile_count(c);
    cr_assert_eq(rows, 3);
    for (i = 0; i < rows; i++) {
        assert_ok(c, tfm_profile_get(c, i, &row));
        cr_assert(row.ms >= 0 && row.calls > 0 && row.ndim == 2);
        if (!strcmp(row.op, "tfm_matmul")) {
            products += row.calls;
            cr_assert(row.shape[0] == 8 && row.shape[1] == 32);
            cr_assert_eq(row.flops, 5 * 2.0 * 8 * 16 * 32);
        } else {
            cr_assert_str_eq(row.op, "tfm_add");
            cr_assert_eq(row.calls, row.shape[0] == 8 ? 3 : 1);
            cr_assert_eq(row.bytes, (double)row.calls * 3 * 4 * (double)(row.shape[0] * row.shape[1]));
            adds += row.calls;
        }
    }
    cr_assert(adds == 4 && products == 5);
    cr_assert_eq(tfm_profile_get(c, rows, &row), TFM_INVALID);
    cr_assert_eq(tfm_profile_get(c, -1, &row), TFM_INVALID);
    cr_assert_eq(tfm_profile_get(c, 0, NULL), TFM_INVALID);
    table = tfm_profile(c);
    cr_assert_not_null(table, "%s", tfm_error(c));
    cr_assert(strstr(table, "tfm_matmul") && strstr(table, "(8, 32)") && strstr(table, "tfm_add")
                  && strstr(table, "share") && strstr(table, "total")
                  && (strstr(table, "GFLOP/s") || strstr(table, "GB/s")),
              "%s", table);
    cr_assert_null(strstr(table, "tfm_sub"));
    tfm_profile_start(c); /* from nothing again */
    cr_assert_eq(tfm_profile_count(c), 0);
    table = tfm_profile(c);
    cr_assert(table && strstr(table, "total"), "%s", tfm_error(c));
    tfm_destroy(c);
}

/* A shape is told from one that begins like it; share and rate are those of the row; the costly rows come first. */
Test(context, the_table_of_a_profile_says_what_its_rows_hold) {
    tfm_ctx *c = context_with(NULL);
    tfm_tensor *x = tfm_ones(c, TFM_SHAPE(300, 400));
    tfm_profile_row row;
    char unit[16];
    const char *line;
    double total = 0, last = HUGE_VAL, ms = 0, share = 0, rate = 0;
    long long calls = 0;
    int64_t i;
    clock_t begin;
    tfm_profile_start(c);
    assert_made(c, tfm_ones(c, TFM_SHAPE(3, 4)));
    assert_made(c, tfm_ones(c, TFM_SHAPE(3)));
    cr_assert_eq(tfm_profile_count(c), 2);
    tfm_profile_start(c);
    begin = clock();
    for (i = 0; i < 20; i++) assert_made(c, tfm_exp(c, x));
    begin = clock() - begin;
    tfm_profile_stop(c);
    assert_ok(c, tfm_profile_get(c, 0, &row));
    cr_assert_geq(row.ms, 1e3 * (double)begin / CLOCKS_PER_SEC / tfm_threads(c) * 0.3);
    tfm_profile_start(c);
    for (i = 1; i < 6; i++) assert_made(c, tfm_ones(c, TFM_SHAPE(i)));
    assert_made(c, tfm_exp(c, x));
    line = tfm_profile(c);
    assert_made(c, line);
    for (i = 0; i < tfm_profile_count(c); i++) {
        assert_ok(c, tfm_profile_get(c, i, &row));
        cr_assert_leq(row.ms, last);
        last = row.ms;
        total += row.ms;
    }
    for (i = 0; strcmp(row.op, "tfm_exp"); i++) assert_ok(c, tfm_profile_get(c, i, &row));
    line = strstr(line, "tfm_exp");
    cr_assert(line && sscanf(line, "tfm_exp (300, 400) %lld %lf %lf%% %lf %15s", &calls, &ms, &share, &rate, unit) == 5,
              "%s", line);
    cr_assert(calls == 1 && fabs(ms - row.ms) < 1e-3 && fabs(share - 100 * row.ms / total) < 0.1, "%s", line);
    cr_assert(!strcmp(unit, "GB/s") && fabs(rate - row.bytes / row.ms * 1e-6) < 0.01, "%s", line);
    tfm_destroy(c);
}

/* The time of an op is its own: what the ops inside it took is theirs. */
Test(context, profile_adds_up_to_the_time_spent) {
    tfm_ctx *c = context_with(NULL);
    tfm_tensor *x = tfm_randn(c, TFM_SHAPE(64, 256));
    tfm_profile_row row;
    double total = 0;
    int64_t i;
    int shape;
    tfm_profile_start(c);
    for (shape = 1; shape <= 200; shape++) { /* many rows, and the first of them found again */
        assert_made(c, tfm_sum(c, tfm_narrow(c, x, 1, 0, shape), TFM_SHAPE(-1), 0));
        assert_made(c, tfm_ones(c, TFM_SHAPE(shape)));
        assert_made(c, tfm_ones(c, TFM_SHAPE(1)));
    }
    for (i = 0; i < tfm_profile_count(c); i++) {
        assert_ok(c, tfm_profile_get(c, i, &row));
        cr_assert_geq(row.ms, 0);
        if (!strcmp(row.op, "tfm_ones") && row.shape[0] == 1) cr_assert_eq(row.calls, 201);
        total += row.ms;
    }
    cr_assert(total > 0 && total < 60e3, "%g ms", total);
    cr_assert_geq(tfm_profile_count(c), 200);
    tfm_destroy(c);
}

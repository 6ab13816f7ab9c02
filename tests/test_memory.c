/* Memory: the arena and its marks, what is counted, dry runs, and what happens when there is none left. */
#include "test.h"

static const int64_t origin[TFM_MAX_DIMS] = {0};

static tfm_ctx *context_on(test_memory *m) {
    tfm_options o;
    tfm_ctx *c;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.seed = 3;
    if (m) o.allocator = test_allocator(m);
    c = tfm_create(&o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "no context: %s", tfm_error(c));
    return c;
}

static int holds(const tfm_tensor *t, float value) {
    int64_t i;
    for (i = 0; i < tfm_numel(t); i++)
        if (((const float *)t->data)[i] != value) return 0;
    return 1;
}

static tfm_tensor *filled(tfm_ctx *c, int64_t n, float value) {
    tfm_tensor *t = tfm_full(c, TFM_F32, TFM_SHAPE(n), (double)value);
    assert_made(c, t);
    return t;
}

static int64_t used(const tfm_ctx *c) { return tfm_memory_usage(c).arena_used; }

/* -- marks --------------------------------------------------------------------------------------------------------- */

Test(memory, data_of_tensors_is_aligned_to_a_cache_line) {
    tfm_ctx *c = context_on(NULL);
    int64_t n;
    for (n = 1; n < 200; n += 7) cr_assert_eq((uintptr_t)filled(c, n, 1)->data % 64, 0u);
    tfm_destroy(c);
}

/* No small pages come before the first large one, and what is counted is what a user's allocator is asked for. */
Test(memory, large_blocks_of_malloc_begin_where_a_large_page_may) {
#if defined(__linux__)
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(NULL), *counted = context_on(&m);
    int i;
    for (i = 0; i < 4; i++) {
        const int64_t n = (int64_t)(2 + i) << 20;
        const tfm_tensor *t = filled(c, n, 1);
        cr_assert_lt((uintptr_t)t->data % ((uintptr_t)2 << 20), 4096u);
        cr_assert(holds(t, 1));
        (void)filled(counted, n, 1);
        cr_assert_eq(tfm_memory_usage(c).held, m.bytes);
    }
    tfm_destroy(c);
    tfm_destroy(counted);
#else
    cr_skip_test("large pages are asked for on Linux only");
#endif
}

Test(memory, rewind_frees_what_came_after_the_mark_and_nothing_before) {
    tfm_ctx *c = context_on(NULL);
    tfm_tensor *before = filled(c, 1000, 1), *later;
    const int64_t at = used(c);
    tfm_marker mark = tfm_mark(c);
    int i;
    for (i = 0; i < 100; i++) (void)filled(c, 1 + i * 500, 2);
    cr_assert_gt(used(c), at + 100 * 1000);
    tfm_rewind(c, mark);
    cr_assert_eq(used(c), at);
    later = filled(c, 100000, 3);
    cr_assert(holds(before, 1) && holds(later, 3));
    tfm_rewind(c, mark);
    tfm_rewind(c, mark); /* as often as one likes */
    cr_assert_str_eq(tfm_error(c), "");
    cr_assert(holds(before, 1));
    tfm_destroy(c);
}

Test(memory, marks_nest) {
    tfm_ctx *c = context_on(NULL);
    tfm_marker mark[20];
    tfm_tensor *t[20];
    int64_t at[20];
    int i;
    for (i = 0; i < 20; i++) {
        mark[i] = tfm_mark(c);
        at[i] = used(c);
        t[i] = filled(c, 10 + 30000 * (i % 3), (float)i);
    }
    for (i = 19; i >= 0; i -= 3) {
        int k;
        tfm_rewind(c, mark[i]);
        cr_assert_eq(used(c), at[i]);
        for (k = 0; k < i; k++) cr_assert(holds(t[k], (float)k));
    }
    cr_assert_str_eq(tfm_error(c), "");
    tfm_destroy(c);
}

Test(memory, use_after_rewind_is_an_error_not_a_crash) {
    tfm_ctx *c = context_on(NULL);
    tfm_tensor *x = filled(c, 4, 1), *dead, *view;
    tfm_marker mark = tfm_mark(c);
    float values[4];
    int i;
    dead = filled(c, 4, 2);
    view = tfm_narrow(c, dead, 0, 1, 2);
    assert_made(c, view);
    tfm_rewind(c, mark);
    cr_assert(dead->data == NULL && view->data == NULL);
    for (i = 0; i < 2; i++) { /* also when other tensors were made meanwhile */
        assert_refused(c, tfm_add(c, x, dead), TFM_INVALID);
        assert_refused(c, tfm_add(c, dead, x), TFM_INVALID);
        assert_refused(c, tfm_exp(c, view), TFM_INVALID);
        assert_refused(c, tfm_linear(c, x, tfm_ones(c, TFM_SHAPE(2, 4)), view, 0), TFM_INVALID);
        assert_refused(c, tfm_format(c, dead), TFM_INVALID);
        assert_verb_refused(c, tfm_read(c, dead, values, 4), TFM_INVALID);
        assert_verb_refused(c, tfm_copy(c, dead, x), TFM_INVALID);
        assert_verb_refused(c, tfm_set(c, dead, origin, 1), TFM_INVALID);
        cr_assert(isnan(tfm_get(dead, origin)));
        cr_assert_null(tfm_add(c, x, dead));
        cr_assert(strstr(tfm_error(c), "rewind") != NULL, "%s", tfm_error(c));
        tfm_clear(c);
        (void)filled(c, 4, 3);
    }
    tfm_destroy(c);
}

/* However long the context has run. */
Test(memory, the_256_tensors_that_died_last_are_known) {
    tfm_ctx *c = context_on(NULL);
    tfm_marker mark;
    tfm_tensor *t[256];
    int i;
    for (i = 0; i < 300; i++) (void)filled(c, 1, 1);
    mark = tfm_mark(c);
    for (i = 0; i < 3000; i++) {
        t[i % 256] = filled(c, 1, 1);
        tfm_rewind(c, mark);
    }
    (void)filled(c, 1, 1);
    for (i = 0; i < 256; i++) assert_refused(c, tfm_exp(c, t[i]), TFM_INVALID);
    tfm_destroy(c);
}

Test(memory, tensors_of_another_context_are_refused) {
    tfm_ctx *a = context_on(NULL), *b = context_on(NULL);
    tfm_tensor *x = filled(a, 4, 1), *y = filled(b, 4, 1);
    assert_refused(a, tfm_add(a, x, y), TFM_INVALID);
    cr_assert_str_eq(tfm_error(b), "");
    tfm_destroy(a);
    tfm_destroy(b);
}

Test(memory, a_mark_that_is_not_alive_is_refused) {
    tfm_ctx *c = context_on(NULL), *other = context_on(NULL);
    tfm_marker outer = tfm_mark(c), inner, foreign = tfm_mark(other), zero;
    tfm_tensor *x;
    memset(&zero, 0, sizeof zero);
    (void)filled(c, 100, 1);
    inner = tfm_mark(c);
    tfm_rewind(c, outer);
    x = filled(c, 3000, 2);
    tfm_rewind(c, inner); /* what it stood on was freed */
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    cr_assert(strstr(tfm_error(c), "tfm_rewind") != NULL, "%s", tfm_error(c));
    tfm_clear(c);
    cr_assert(holds(x, 2));
    tfm_rewind(c, foreign);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    tfm_rewind(c, zero);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    memset(&zero, 0x7f, sizeof zero);
    tfm_rewind(c, zero);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    assert_refused(c, tfm_keep(c, inner, x), TFM_INVALID);
    cr_assert(holds(x, 2));
    tfm_rewind(c, outer);
    cr_assert_str_eq(tfm_error(c), "");
    x = filled(c, 100, 3);
    outer = tfm_mark(c);
    cr_assert_not_null(tfm_format(c, x)); /* a text alone is between them */
    inner = tfm_mark(c);
    tfm_rewind(c, outer);
    tfm_rewind(c, inner);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    tfm_destroy(c);
    tfm_destroy(other);
}

/* A loop that cleans up behind a failed step gets its memory back. */
Test(memory, rewind_works_while_an_error_stands) {
    tfm_ctx *c = context_on(NULL);
    tfm_marker mark = tfm_mark(c);
    const int64_t at = used(c);
    tfm_tensor *x = filled(c, 1000, 1);
    cr_assert_null(tfm_transpose(c, x, 3, 4));
    tfm_rewind(c, mark);
    cr_assert_eq(used(c), at);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_destroy(c);
}

Test(memory, keep_saves_one_result_and_frees_the_rest) {
    tfm_ctx *c = context_on(NULL);
    tfm_tensor *before = filled(c, 50, 9), *a, *b, *kept;
    const int64_t at = used(c);
    tfm_marker mark = tfm_mark(c);
    a = filled(c, 70000, 1);
    b = filled(c, 500, 2);
    (void)filled(c, 70000, 3);
    kept = tfm_keep(c, mark, b);
    cr_assert(kept == b && holds(b, 2) && holds(before, 9), "%s", tfm_error(c));
    cr_assert_leq(used(c), at + 500 * 4 + 256);
    cr_assert_eq((uintptr_t)b->data % 64, 0u);
    assert_refused(c, tfm_exp(c, a), TFM_INVALID);
    a = filled(c, 5000, 4); /* does not write over it */
    cr_assert(holds(b, 2) && holds(a, 4));
    cr_assert(tfm_keep(c, mark, a) == a && holds(a, 4));
    assert_refused(c, tfm_exp(c, b), TFM_INVALID);
    cr_assert(tfm_keep(c, mark, before) == before && holds(before, 9), "what is older than the mark stays where it is");
    cr_assert_eq(used(c), at);
    assert_refused(c, tfm_keep(c, mark, NULL), TFM_INVALID);
    assert_refused(c, tfm_keep(c, mark, a), TFM_INVALID);
    tfm_destroy(c);
}

Test(memory, keep_of_a_view_saves_its_elements) {
    tfm_ctx *c = context_on(NULL);
    tfm_marker mark = tfm_mark(c);
    tfm_tensor *x, *y, *flat;
    float values[40];
    static float mine[6] = {1, 2, 3, 4, 5, 6};
    int i;
    (void)filled(c, 3000, 7);
    x = tfm_arange(c, TFM_F32, 0, 800, 1);
    y = tfm_slice(c, tfm_transpose(c, tfm_reshape(c, x, TFM_SHAPE(20, 40)), 0, 1), 0, 3, 40, 20);
    assert_made(c, y); /* (2, 20) with odd strides */
    cr_assert(tfm_keep(c, mark, y) == y, "%s", tfm_error(c));
    (void)filled(c, 3000, 8);
    assert_ok(c, tfm_read(c, y, values, 40));
    for (i = 0; i < 40; i++) cr_assert_eq(values[i], (float)(i % 20 * 40 + 3 + i / 20 * 20));
    flat = tfm_wrap(c, TFM_F32, TFM_SHAPE(6), mine); /* memory of the caller does not move */
    assert_made(c, flat);
    cr_assert(tfm_keep(c, mark, flat) == flat && flat->data == (void *)mine && mine[5] == 6);
    flat = tfm_wrap(c, TFM_F32, TFM_SHAPE(40), values);
    assert_made(c, flat);
    cr_assert(tfm_keep(c, mark, flat) == flat && flat->data == (void *)values);
    x = filled(c, 100, 1);
    mark = tfm_mark(c);
    y = tfm_narrow(c, x, 0, 10, 20); /* nor does what a view shows of a tensor below the mark */
    cr_assert(tfm_keep(c, mark, y) == y && y->data == (void *)((float *)x->data + 10));
    tfm_destroy(c);
}

/* Random nests of marks, results, views, rewinds and keeps against a plain list. */
Test(memory, any_nest_of_marks_and_keeps_keeps_the_right_values) {
    enum { MOST = 60 };
    const int seeds = test_quick() ? 10 : 60;
    int seed;
    for (seed = 0; seed < seeds; seed++) {
        tfm_ctx *c = context_on(NULL);
        tfm_tensor *t[MOST];
        float value[MOST];
        tfm_marker mark[MOST];
        int base[MOST], n = 0, marks = 0, step, i;
        uint64_t state = (uint64_t)seed;
        for (step = 0; step < 300; step++) {
            const int what = (int)((test_random(&state) + 1) * 5),
                      size = 1 + (int)((test_random(&state) + 1) * (step % 5 ? 900 : 90000));
            if (what < 5 && n < MOST - 1) {
                value[n] = (float)step;
                t[n] = filled(c, size, value[n]);
                n++;
                if (size > 20 && what == 0) {
                    t[n] = tfm_slice(c, t[n - 1], 0, 3, size, 2);
                    assert_made(c, t[n]);
                    value[n] = value[n - 1];
                    n++;
                }
            } else if (what < 7 && marks < MOST) {
                base[marks] = n;
                mark[marks++] = tfm_mark(c);
            } else if (marks && what < 9 && n > base[marks - 1]) {
                int at;
                marks--;
                at = base[marks] + step % (n - base[marks]);
                cr_assert(tfm_keep(c, mark[marks], t[at]) == t[at], "%s", tfm_error(c));
                t[base[marks]] = t[at];
                value[base[marks]] = value[at];
                n = base[marks] + 1;
            } else if (marks) {
                tfm_rewind(c, mark[--marks]);
                n = base[marks];
            }
            cr_assert_str_eq(tfm_error(c), "");
            if (step % 20 == 0)
                for (i = 0; i < n; i++)
                    cr_assert(tfm_get(t[i], origin) == (double)value[i], "seed %d, step %d", seed, step);
        }
        for (i = 0; i < n; i++) {
            int64_t k;
            for (k = 0; k < tfm_numel(t[i]); k++) cr_assert(tfm_get(t[i], &k) == (double)value[i], "seed %d", seed);
        }
        tfm_destroy(c);
    }
}

/* Lines to the last one of a chunk: past its end the allocator looks. */
Test(memory, a_full_chunk_holds_what_it_was_given) {
    enum { LINES = 40000 };
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    tfm_tensor **t = (tfm_tensor **)malloc(LINES * sizeof *t);
    int i;
    for (i = 0; i < LINES; i++) t[i] = filled(c, 16, (float)i);
    for (i = 0; i < LINES; i++) cr_assert(holds(t[i], (float)i), "%d", i);
    free(t);
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(memory, a_result_larger_than_a_chunk_finds_its_own_again) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    const tfm_marker mark = tfm_mark(c);
    int64_t calls = 0;
    int i;
    for (i = 0; i < 3; i++) {
        (void)filled(c, 1000000, 1);
        tfm_rewind(c, mark);
        if (i == 0) calls = m.calls;
    }
    cr_assert_eq(m.calls, calls);
    tfm_destroy(c);
}

static void *downward_alloc(void *user, size_t size) {
    unsigned char **end = (unsigned char **)user;
    return *end -= (size + 63) / 64 * 64;
}

static void downward_free(void *user, void *p) {
    (void)user;
    (void)p;
}

/* Whichever of two chunks has the lower address. */
Test(memory, keep_finds_a_tensor_in_any_chunk) {
    const size_t room = (size_t)16 << 20;
    unsigned char *pool = (unsigned char *)malloc(room), *end = pool + room;
    tfm_options o;
    tfm_ctx *c;
    tfm_marker mark;
    tfm_tensor *t;
    int i;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator.alloc = downward_alloc;
    o.allocator.free = downward_free;
    o.allocator.user = &end;
    c = tfm_create(&o);
    cr_assert_eq(tfm_status_of(c), TFM_OK, "%s", tfm_error(c));
    mark = tfm_mark(c);
    (void)filled(c, 200000, 1);
    t = filled(c, 200000, 2);
    cr_assert(tfm_keep(c, mark, t) == t, "%s", tfm_error(c));
    for (i = 0; i < 2; i++) (void)filled(c, 200000, 3);
    cr_assert(holds(t, 2));
    tfm_destroy(c);
    free(pool);
}

static size_t largest_block;

static void *block_alloc(void *user, size_t size) {
    (void)user;
    return size <= largest_block ? malloc(size) : NULL;
}

static void block_free(void *user, void *p) {
    (void)user;
    free(p);
}

/* The arena takes what it can get, and ends with an error. */
Test(memory, an_allocator_of_small_blocks_serves_the_arena) {
    tfm_options o;
    tfm_ctx *c;
    tfm_marker mark;
    int64_t most;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator.alloc = block_alloc;
    o.allocator.free = block_free;
    largest_block = SIZE_MAX;
    c = tfm_create(&o);
    cr_assert_eq(tfm_status_of(c), TFM_OK, "%s", tfm_error(c));
    mark = tfm_mark(c);
    largest_block = 100000; /* tensor structs come in blocks of 95000 bytes */
    while (tfm_ones(c, TFM_SHAPE(1000))) continue;
    cr_assert_eq(tfm_status_of(c), TFM_OOM);
    most = used(c);
    cr_assert_gt(most, 4 << 20);
    tfm_clear(c);
    tfm_rewind(c, mark);
    cr_assert(holds(filled(c, 1000, 1), 1));
    tfm_destroy(c);
}

Test(memory, the_limit_may_be_reached_exactly) {
    tfm_options o;
    tfm_ctx *c = context_on(NULL);
    const int64_t held = tfm_memory_usage(c).held;
    int less;
    tfm_destroy(c);
    for (less = 0; less < 2; less++) {
        memset(&o, 0, sizeof o);
        o.threads = 1;
        o.memory_limit = held - less;
        c = tfm_create(&o);
        cr_assert_eq(tfm_status_of(c), less ? TFM_OOM : TFM_OK, "%s", tfm_error(c));
        tfm_destroy(c);
    }
}

Test(memory, rewind_below_a_live_tape_is_refused) {
    tfm_ctx *c = context_on(NULL);
    tfm_tensor *w = filled(c, 4, 2), *y;
    tfm_marker mark = tfm_mark(c), above;
    assert_ok(c, tfm_set_requires_grad(c, w, 1));
    y = tfm_mul(c, w, w);
    assert_made(c, y);
    cr_assert_eq(tfm_tape_length(c), 1);
    above = tfm_mark(c);
    tfm_rewind(c, mark);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    cr_assert(strstr(tfm_error(c), "tfm_tape_clear") != NULL, "%s", tfm_error(c));
    tfm_clear(c);
    cr_assert(holds(y, 4), "the recorded result was freed");
    assert_refused(c, tfm_keep(c, mark, y), TFM_INVALID);
    (void)filled(c, 10, 1); /* not recorded: free above the tape */
    tfm_rewind(c, above);
    cr_assert_str_eq(tfm_error(c), "");
    tfm_tape_clear(c);
    cr_assert(holds(y, 4));
    tfm_rewind(c, mark);
    cr_assert_str_eq(tfm_error(c), "");
    assert_refused(c, tfm_exp(c, y), TFM_INVALID);
    tfm_destroy(c);
}

/* -- a program that touches every chapter -------------------------------------------------------------------------- */

typedef struct program {
    tfm_params *p, *loaded;
    tfm_transformer model, decoder;
    tfm_session *session;
    tfm_cache *cache;
    tfm_tokenizer *tokenizer;
    void *file;
    int64_t file_bytes;
    uint64_t hash; /* of all that it computed */
} program;

static void mix(program *g, const void *data, int64_t bytes) {
    int64_t i;
    for (i = 0; i < bytes; i++) g->hash = (g->hash ^ ((const unsigned char *)data)[i]) * 1099511628211u;
}

static void mix_tensor(tfm_ctx *c, program *g, const tfm_tensor *t) {
    float *x = test_floats(c, t);
    if (x) mix(g, x, tfm_numel(t) * 4);
    free(x);
}

static void mix_text(program *g, const char *s) {
    if (s) mix(g, s, (int64_t)strlen(s));
}

/* What is made once. 1: all there. No assertions: memory may be out anywhere. */
static int program_begin(tfm_ctx *c, program *g) {
    static const char words[] = "the\ncat\nsat\non\nmat\n";
    tfm_transformer_config k;
    tfm_cache_options cache;
    tfm_session_options session;
    memset(g, 0, sizeof *g);
    g->hash = 14695981039346656037u;
    memset(&k, 0, sizeof k);
    memset(&cache, 0, sizeof cache);
    memset(&session, 0, sizeof session);
    k.position = TFM_POSITION_SINUSOIDAL;
    k.encoder_layers = k.decoder_layers = 1;
    k.source_vocab = k.target_vocab = 5;
    k.block.d_model = 16;
    k.block.heads = 2;
    k.block.d_ff = 24;
    g->p = tfm_params_create(c);
    if (!g->p || tfm_transformer_init(c, g->p, "translate", &k, &g->model)) return 0;
    k.kind = TFM_DECODER_ONLY;
    k.position = TFM_POSITION_ROTARY;
    k.source_vocab = 0;
    k.block.norm = TFM_RMS_NORM;
    k.block.gated = 1;
    k.block.norm_first = 1;
    if (tfm_transformer_init(c, g->p, "generate", &k, &g->decoder) || tfm_params_prepare(c, g->p)) return 0;
    session.batch = 2;
    session.capacity = 24;
    g->session = tfm_session_create(c, &g->decoder, &session);
    cache.heads = 2;
    cache.key_size = 8;
    cache.capacity = 64;
    cache.dtype = TFM_F16;
    g->cache = tfm_cache_create(c, &cache);
    g->tokenizer = tfm_tokenizer_lines_memory(c, words, sizeof words - 1, -1);
    if (!g->session || !g->cache || !g->tokenizer) return 0;
    g->file_bytes = tfm_params_saved_size(g->p);
    if (g->file_bytes < 0) return 0; /* its way to say out of memory, having no context */
    g->file = calloc(1, (size_t)g->file_bytes + 1);
    if (!g->file || tfm_params_save_memory(c, g->p, g->file, g->file_bytes)) return 0;
    mix(g, g->file, g->file_bytes);
    g->loaded = tfm_params_create(c);
    return g->loaded && tfm_params_load_memory(c, g->loaded, g->file, g->file_bytes, NULL) == TFM_OK;
}

/* What is done again and again; dry: only what may be measured, looking at no result. 1: all done. */
static int program_step(tfm_ctx *c, program *g, int dry) {
    static const int64_t id[8] = {0, 1, 2, 3, 4, 3, 2, 1};
    tfm_tensor *source = tfm_from(c, TFM_I64, TFM_SHAPE(2, 4), id), *target = tfm_from(c, TFM_I64, TFM_SHAPE(2, 4), id),
               *y, *weights = NULL;
    tfm_transformer_options o;
    tfm_attention_options a;
    tfm_tensor *x = tfm_randn(c, TFM_SHAPE(1, 2, 40, 8)), *parts[2];
    memset(&o, 0, sizeof o);
    memset(&a, 0, sizeof a);
    o.weights = &weights;
    y = tfm_transformer_forward(c, &g->model, source, target, &o);
    if (!y || !weights) return 0;
    if (!dry) {
        mix_tensor(c, g, y);
        mix_tensor(c, g, weights);
    }
    a.mask.causal = TFM_CAUSAL_TOP_LEFT;
    a.mask.window_left = 9;
    a.mask.alibi_slopes = tfm_alibi_slopes(c, 2);
    parts[0] = tfm_attention(c, x, x, x, &a);
    parts[1] = tfm_softmax(c, tfm_matmul(c, x, tfm_transpose(c, x, 2, 3)), 2);
    parts[1] = tfm_matmul(c, tfm_cast(c, parts[1], TFM_BF16), x);
    y = tfm_cat(c, (const tfm_tensor *const *)parts, 2, 3);
    y = tfm_topk(c, tfm_log_softmax(c, tfm_gelu(c, tfm_layer_norm(c, y, NULL, NULL, NULL)), 1), 3, &weights);
    if (!y) return 0;
    if (!dry) mix_tensor(c, g, y);
    if (dry) return 1;
    tfm_cache_reset(g->cache);
    if (tfm_cache_append(c, g->cache, 0, x, x, NULL)) return 0;
    memset(&a, 0, sizeof a);
    y = tfm_attention_cached(c, tfm_narrow(c, x, 2, 30, 10), g->cache, 0, &a);
    if (!y) return 0;
    mix_tensor(c, g, y);
    {
        tfm_prompt prompts[2];
        tfm_generate_options options;
        tfm_sequence out[2];
        tfm_heatmap_options map;
        const char *stop = "mat the mat";
        int64_t *ids = NULL, count = 0;
        memset(&options, 0, sizeof options);
        memset(&map, 0, sizeof map);
        prompts[0].ids = id;
        prompts[0].count = 3;
        prompts[1].ids = id + 2;
        prompts[1].count = 1;
        options.max_new = 6;
        options.sampling.temperature = 1;
        options.sampling.top_p = 0.9f;
        options.piece = tfm_tokenizer_piece;
        options.piece_user = g->tokenizer;
        options.stop_strings = &stop;
        options.stop_string_count = 1;
        tfm_session_reset(g->session);
        if (tfm_generate(c, g->session, prompts, 2, &options, out)) return 0;
        mix(g, out[0].ids, out[0].count * 8);
        mix(g, out[1].ids, out[1].count * 8);
        if (tfm_tokenizer_encode(c, g->tokenizer, "the cat sat", 0, 0, &ids, &count)) return 0;
        mix(g, ids, count * 8);
        mix_text(g, tfm_tokenizer_decode(c, g->tokenizer, ids, count));
        y = tfm_softmax(c, tfm_select(c, tfm_select(c, x, 0, 0), 0, 1), 1);
        mix_text(g, tfm_heatmap_svg(c, y, &map));
        mix_text(g, tfm_heatmap_text(c, y, &map));
        mix_text(g, tfm_format(c, y));
    }
    return tfm_status_of(c) == TFM_OK;
}

static void program_end(program *g) {
    tfm_tokenizer_destroy(g->tokenizer);
    tfm_cache_destroy(g->cache);
    tfm_session_destroy(g->session);
    tfm_params_destroy(g->loaded);
    tfm_params_destroy(g->p);
    free(g->file);
}

/* The whole of it once. 1: all done; unsized: it ended at tfm_params_saved_size. */
static int program_run(tfm_ctx *c, uint64_t *hash, int *unsized) {
    program g;
    const int done = program_begin(c, &g) && program_step(c, &g, 0);
    program_end(&g);
    *hash = g.hash;
    *unsized = g.file_bytes < 0;
    return done;
}

Test(memory, a_repeated_step_allocates_nothing_after_the_first) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    program g;
    int64_t calls = 0, peak = 0;
    int i;
    cr_assert(program_begin(c, &g), "%s", tfm_error(c));
    for (i = 0; i < 12; i++) {
        tfm_marker mark = tfm_mark(c);
        cr_assert(program_step(c, &g, 0), "%s", tfm_error(c));
        tfm_rewind(c, mark);
        cr_assert_str_eq(tfm_error(c), "");
        if (i == 0) calls = m.calls, peak = tfm_memory_usage(c).arena_peak;
    }
    cr_assert_eq(m.calls, calls, "%lld allocations after the first step", (long long)(m.calls - calls));
    cr_assert_eq(tfm_memory_usage(c).arena_peak, peak);
    program_end(&g);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* Many steps of many small results, with the profile on and one result kept from each. */
Test(memory, a_long_loop_stays_as_large_as_its_first_round) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    tfm_tensor *state = filled(c, 100, 1);
    tfm_marker mark = tfm_mark(c);
    const int rounds = test_quick() ? 50 : 2000;
    int64_t calls = 0;
    int i, k;
    tfm_profile_start(c);
    for (i = 0; i < rounds; i++) {
        tfm_tensor *x = state;
        for (k = 0; k < 30; k++) x = tfm_scale(c, tfm_shift(c, x, 1), 0.5f);
        state = tfm_keep(c, mark, x);
        assert_made(c, state);
        if (i == 1) calls = m.calls;
    }
    cr_assert_eq(m.calls, calls);
    cr_assert(holds(state, 1));
    tfm_destroy(c);
    assert_no_leak(&m);
}

static int step_of(tfm_ctx *c, int64_t n) {
    const tfm_marker mark = tfm_mark(c);
    const int done = tfm_scale(c, tfm_shift(c, tfm_zeros(c, TFM_SHAPE(n, 1000)), 1), 2) != NULL;
    tfm_rewind(c, mark);
    return done;
}

/* What shorter ones left in the arena is not in the way of a longer one. */
Test(memory, a_step_takes_what_was_measured_whatever_ran_before) {
    enum { LONGEST = 1000 };
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_memory need, again;
    tfm_ctx *c = context_on(NULL);
    int64_t n, calls;
    tfm_measure_begin(c);
    (void)step_of(c, LONGEST);
    assert_ok(c, tfm_measure_end(c, &need));
    tfm_destroy(c);
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.memory_limit = need.held_peak;
    o.allocator = test_allocator(&m);
    c = tfm_create(&o);
    for (n = 1; n <= LONGEST; n += 9) cr_assert(step_of(c, n), "length %lld: %s", (long long)n, tfm_error(c));
    calls = m.calls;
    for (n = 1; n <= LONGEST; n += 9) cr_assert(step_of(c, n), "length %lld: %s", (long long)n, tfm_error(c));
    cr_expect_eq(m.calls, calls, "what the longest step took holds all others");
    tfm_measure_begin(c);
    (void)step_of(c, LONGEST);
    assert_ok(c, tfm_measure_end(c, &again));
    cr_expect_eq(again.held_peak, need.held_peak);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* Run after run, an allocation fails, and then all from there on fail. No crash, no leak, an error that says out of
 * memory; or the right result, since the arena asks for less when it cannot have much. Then there is memory again
 * and the same context works. */
Test(memory, any_allocation_may_fail_in_a_program_that_touches_every_chapter, .timeout = 120) {
    int64_t n, runs = 0;
    int on, unsized;
    uint64_t expected, hash;
    {
        tfm_ctx *c = context_on(NULL);
        cr_assert(program_run(c, &expected, &unsized), "%s", tfm_error(c));
        tfm_destroy(c);
    }
    for (on = 0; on < 2; on++)
        for (n = 0;; n += test_quick() ? 5 : 1) {
            test_memory m = test_memory_new();
            tfm_options o;
            tfm_ctx *c;
            tfm_marker mark;
            int done;
            memset(&o, 0, sizeof o);
            o.threads = 1;
            o.seed = 3;
            o.allocator = test_allocator(&m);
            m.fail_at = n;
            m.fail_on = on;
            c = tfm_create(&o);
            if (!c) {
                cr_assert_geq(m.failed, 1);
                assert_no_leak(&m);
                continue;
            }
            mark = tfm_mark(c);
            done = program_run(c, &hash, &unsized);
            if (!m.failed) {
                cr_assert(done && hash == expected);
                tfm_destroy(c);
                assert_no_leak(&m);
                break;
            }
            runs++;
            if (done)
                cr_assert(hash == expected, "allocation %lld failed without an error, and the result is another",
                          (long long)n);
            else if (!unsized) {
                cr_assert_eq(tfm_status_of(c), TFM_OOM, "allocation %lld: %s", (long long)n, tfm_error(c));
                cr_assert(strstr(tfm_error(c), "memory") != NULL, "%s", tfm_error(c));
            }
            m.fail_at = -1;
            m.fail_on = 0;
            tfm_clear(c);
            tfm_rewind(c, mark);
            tfm_seed(c, 3);
            cr_assert(program_run(c, &hash, &unsized), "after allocation %lld had failed: %s", (long long)n,
                      tfm_error(c));
            cr_assert(hash == expected, "after allocation %lld had failed the result is another", (long long)n);
            tfm_destroy(c);
            assert_no_leak(&m);
        }
    cr_assert_geq(runs, test_quick() ? 10 : 40);
}

/* -- counting ------------------------------------------------------------------------------------------------------ */

Test(memory, peaks_are_what_was_used_at_most_and_start_again_on_request) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    tfm_marker mark = tfm_mark(c);
    tfm_memory u;
    int64_t top;
    (void)filled(c, 500000, 1);
    top = used(c);
    cr_assert(top >= 2000000 && top < 2000000 + 1024, "%lld", (long long)top);
    tfm_rewind(c, mark);
    (void)filled(c, 1000, 1);
    u = tfm_memory_usage(c);
    cr_assert(u.arena_peak == top && u.arena_used < 8000);
    cr_assert(u.held == m.bytes && u.held_peak == m.peak && u.allocations == m.calls);
    cr_assert_geq(u.held, u.arena_peak); /* chunks stay, for the next step */
    tfm_memory_reset(c);
    u = tfm_memory_usage(c);
    cr_assert(u.arena_peak == u.arena_used && u.held_peak == u.held);
    (void)filled(c, 2000, 1);
    u = tfm_memory_usage(c);
    cr_assert_eq(u.arena_peak, u.arena_used);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* -- attention over long sequences --------------------------------------------------------------------------------- */

/* Bytes beside its result that attention of `rows` queries over `keys` cached keys takes of the arena. */
static int64_t attention_extra(tfm_ctx *c, int64_t heads, int64_t rows, int64_t keys, int64_t size) {
    enum { CHUNK = 4096 };
    const tfm_marker mark = tfm_mark(c);
    tfm_cache_options o;
    tfm_attention_options a;
    tfm_cache *cache;
    tfm_tensor *q = tfm_uniform(c, TFM_SHAPE(1, heads, rows, size), -1, 1),
               *k = tfm_uniform(c, TFM_SHAPE(1, heads, CHUNK, size), -1, 1);
    int64_t at, before, bytes;
    memset(&o, 0, sizeof o);
    memset(&a, 0, sizeof a);
    o.heads = heads;
    o.key_size = size;
    o.capacity = keys;
    o.dtype = TFM_F16;
    cache = tfm_cache_create(c, &o);
    assert_made(c, cache);
    for (at = 0; at < keys; at += CHUNK) {
        const tfm_tensor *part = tfm_narrow(c, k, 2, 0, keys - at < CHUNK ? keys - at : CHUNK);
        assert_ok(c, tfm_cache_append(c, cache, 0, part, part, NULL));
    }
    a.mask.causal = TFM_CAUSAL_BOTTOM_RIGHT;
    tfm_memory_reset(c);
    before = used(c);
    assert_made(c, tfm_attention_cached(c, q, cache, 0, &a));
    bytes = tfm_memory_usage(c).arena_peak - before - heads * rows * size * (int64_t)sizeof(float);
    tfm_cache_destroy(cache);
    tfm_rewind(c, mark);
    return bytes;
}

Test(memory, attention_takes_as_much_for_every_number_of_keys) {
    TEST_EACH_ISA(c, 1) {
        int64_t rows, keys;
        for (rows = 1; rows <= 5; rows += 4)
            for (keys = 128; keys <= 131072; keys *= 4) {
                const int64_t bytes = attention_extra(c, 2, rows, keys < 131072 / 2 ? keys : 131072, 32);
                cr_assert_lt(bytes, 2048, "%lld bytes for %lld keys", (long long)bytes, (long long)keys);
            }
    }
}

/* Partial results are merged in waves, as many as keep the threads busy, not all at the end. */
Test(memory, decoding_with_split_keys_takes_under_1_KiB_for_each_head_and_4096_keys) {
    int64_t heads, size;
    TEST_EACH_ISA(c, 4) {
        for (heads = 1; heads <= 5; heads += 2)
            for (size = 64; size <= 128; size += 64) {
                const int64_t some = attention_extra(c, heads, 1, 32768, size),
                              most = attention_extra(c, heads, 1, 131072, size);
                cr_assert_leq(most, some, "%lld bytes, %lld for a quarter of the keys", (long long)most,
                              (long long)some);
                cr_assert_lt(most, heads * 131072 / 4096 * 1024, "%lld bytes", (long long)most);
            }
    }
}

/* What the parameters and caches take is theirs: it goes back when they are destroyed, also behind the context. */
Test(memory, objects_outlive_their_context) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m), *later;
    program g;
    int64_t held = tfm_memory_usage(c).held;
    tfm_tensor *y;
    cr_assert(program_begin(c, &g), "%s", tfm_error(c));
    cr_assert_gt(m.bytes, held);
    tfm_destroy(c);
    later = context_on(&m);
    y = tfm_matmul(later, tfm_ones(later, TFM_SHAPE(1, 5)),
                   tfm_clone(later, tfm_params_find(g.p, "generate.tgt_embedding.weight")));
    assert_made(later, y);
    cr_assert(program_step(later, &g, 0), "%s", tfm_error(later));
    program_end(&g);
    tfm_destroy(later);
    assert_no_leak(&m);
}

/* -- dry runs ------------------------------------------------------------------------------------------------------ */

static void assert_same_memory(const tfm_memory *dry, const tfm_memory *real, const char *what) {
    cr_assert(dry->arena_used == real->arena_used && dry->arena_peak == real->arena_peak,
              "%s: arena %lld (peak %lld) foretold, %lld (%lld) used", what, (long long)dry->arena_used,
              (long long)dry->arena_peak, (long long)real->arena_used, (long long)real->arena_peak);
    cr_assert(dry->held == real->held && dry->held_peak == real->held_peak,
              "%s: held %lld (peak %lld) foretold, %lld (%lld) in truth", what, (long long)dry->held,
              (long long)dry->held_peak, (long long)real->held, (long long)real->held_peak);
}

/* Results of every size, kept and rewound, and a whole model. */
static void measured_work(tfm_ctx *c, program *g, int which) {
    tfm_marker mark = tfm_mark(c);
    int i;
    for (i = 0; i < 40; i++) {
        tfm_tensor *x = tfm_randn(c, TFM_SHAPE(1 + i * which * 400));
        x = tfm_exp(c, x);
        if (i % 3 == 0) cr_assert(tfm_keep(c, mark, x) == x, "%s", tfm_error(c));
        if (i % 7 == 6) {
            tfm_rewind(c, mark);
            mark = tfm_mark(c);
        }
        assert_made(c, tfm_sum(c, tfm_full(c, TFM_F16, TFM_SHAPE(i, 17), 1), TFM_SHAPE(0), 1));
    }
    for (i = 0; i < which; i++) cr_assert(program_step(c, g, 1), "%s", tfm_error(c));
}

Test(memory, a_dry_run_foretells_the_real_run_to_the_byte) {
    int which;
    for (which = 0; which < 4; which++) {
        tfm_ctx *c = context_on(NULL), *maker = context_on(NULL);
        program g;
        tfm_memory dry, real, again, before = tfm_memory_usage(c);
        cr_assert(program_begin(maker, &g), "%s", tfm_error(maker));
        tfm_measure_begin(c);
        measured_work(c, &g, which);
        assert_ok(c, tfm_measure_end(c, &dry));
        real = tfm_memory_usage(c);
        cr_assert(real.arena_used == before.arena_used && real.arena_peak == before.arena_peak,
                  "a dry run used the arena");
        measured_work(c, &g, which);
        real = tfm_memory_usage(c);
        assert_same_memory(&dry, &real, "from a fresh context");
        tfm_measure_begin(c); /* what is in the arena now is not part of the answer */
        measured_work(c, &g, which);
        assert_ok(c, tfm_measure_end(c, &again));
        cr_assert(again.arena_used == dry.arena_used && again.arena_peak == dry.arena_peak);
        tfm_destroy(c);
        tfm_destroy(maker);
        program_end(&g);
    }
}

/* Nor are the structs of tensors, alive or dead, and the rows of a profile. */
Test(memory, a_dry_run_foretells_the_same_whatever_ran_before) {
    tfm_ctx *c = context_on(NULL);
    tfm_memory dry[2];
    int i, k;
    for (i = 0; i < 2; i++) {
        tfm_measure_begin(c);
        for (k = 0; k < 1000; k++) (void)tfm_ones(c, TFM_SHAPE(100));
        assert_ok(c, tfm_measure_end(c, &dry[i]));
        tfm_profile_start(c);
        for (k = 0; k < 3000; k++) (void)filled(c, 1 + k % 100, 1);
    }
    assert_same_memory(&dry[1], &dry[0], "after other work");
    cr_assert_eq(dry[1].allocations, dry[0].allocations);
    tfm_destroy(c);
}

Test(memory, a_dry_run_takes_next_to_nothing_itself) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    tfm_memory dry;
    const int64_t before = m.bytes, length = sizeof(void *) < 8 ? 1 << 18 : 1 << 20;
    tfm_tensor *x, *kept = filled(c, 10, 4);
    tfm_measure_begin(c);
    x = tfm_zeros(c, TFM_SHAPE(1, 8, length, 64)); /* 2 GiB of queries; a quarter of it where pointers have 32 bits */
    assert_made(c, tfm_attention(c, x, x, x, NULL));
    assert_refused(c, tfm_matmul(c, x, x), TFM_INVALID); /* checks are those of a real run */
    assert_ok(c, tfm_measure_end(c, &dry));
    cr_assert_geq(dry.arena_peak, 2 * 2048 * length);
    cr_assert_lt(m.peak - before, 4 << 20);
    cr_assert(holds(kept, 4));
    assert_refused(c, tfm_exp(c, x), TFM_INVALID); /* its results are gone */
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* Memory that is not taken is not held to the limit, and may be more than 128 chunks of the least size. */
Test(memory, a_dry_run_may_need_more_than_there_is) {
    tfm_options o;
    tfm_ctx *c;
    tfm_params *p;
    tfm_memory dry;
    int i;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.memory_limit = 4 << 20;
    c = tfm_create(&o);
    tfm_measure_begin(c);
    for (i = 0; i < 1000; i++) assert_made(c, tfm_ones(c, TFM_SHAPE(1 << 18)));
    p = tfm_params_create(c);
    assert_made(c, tfm_params_add(c, p, "large", TFM_F32, TFM_SHAPE(4 << 20)));
    tfm_params_destroy(p);
    assert_ok(c, tfm_measure_end(c, &dry));
    cr_assert_geq(dry.arena_peak, (int64_t)1000 << 20);
    cr_assert_geq(dry.held_peak, (int64_t)1016 << 20);
    tfm_destroy(c);
}

/* What is asked and reset in it is what is real; what it takes for itself goes back at its end. */
Test(memory, a_dry_run_and_the_counters_leave_each_other_alone) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    const tfm_tensor *x = filled(c, 1000, 1);
    const int64_t at = used(c);
    int64_t bytes[2];
    int i;
    for (i = 0; i < 2; i++) {
        tfm_memory dry;
        tfm_marker mark;
        tfm_measure_begin(c);
        tfm_profile_start(c);
        mark = tfm_mark(c);
        assert_made(c, tfm_exp(c, tfm_ones(c, TFM_SHAPE(100000))));
        tfm_rewind(c, mark);
        cr_assert_eq(used(c), at);
        tfm_memory_reset(c);
        cr_assert_not_null(tfm_format(c, x));
        assert_ok(c, tfm_measure_end(c, &dry));
        cr_assert_geq(dry.arena_peak, 800000);
        cr_assert_eq(tfm_profile_count(c), 0);
        bytes[i] = m.bytes;
    }
    cr_assert_eq(bytes[1], bytes[0]);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* It has a tape of its own. */
Test(memory, a_dry_run_leaves_a_live_tape_as_it_is) {
    tfm_ctx *c = context_on(NULL);
    const tfm_marker mark = tfm_mark(c);
    tfm_tensor *w = filled(c, 4, 2), *y, *z;
    tfm_marker inside;
    assert_ok(c, tfm_set_requires_grad(c, w, 1));
    y = tfm_mul(c, w, w);
    assert_made(c, y);
    tfm_measure_begin(c);
    cr_assert_eq(tfm_tape_length(c), 0);
    inside = tfm_mark(c);
    assert_made(c, tfm_exp(c, filled(c, 4, 1)));
    tfm_rewind(c, inside);
    cr_assert_str_eq(tfm_error(c), "");
    assert_made(c, tfm_mul(c, w, w));
    cr_assert_eq(tfm_tape_length(c), 1);
    tfm_tape_clear(c);
    assert_made(c, tfm_mul(c, w, w));
    z = tfm_mul(c, w, w);
    assert_made(c, z);
    assert_ok(c, tfm_measure_end(c, NULL));
    assert_refused(c, tfm_exp(c, z), TFM_INVALID);
    cr_assert(tfm_tape_length(c) == 1 && y->requires_grad && holds(y, 4));
    tfm_rewind(c, mark);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    tfm_tape_clear(c);
    cr_assert_eq(y->requires_grad, 0);
    tfm_destroy(c);
}

Test(memory, results_of_a_dry_run_have_shapes_and_no_data_to_read) {
    tfm_ctx *c = context_on(NULL);
    tfm_tensor *x;
    float values[15] = {7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7};
    int i;
    tfm_memory m;
    tfm_measure_begin(c);
    x = tfm_matmul(c, tfm_randn(c, TFM_SHAPE(3, 4)), tfm_randn(c, TFM_SHAPE(4, 5)));
    assert_made(c, x);
    cr_assert(x->ndim == 2 && x->shape[0] == 3 && x->shape[1] == 5);
    cr_assert(isnan(tfm_get(x, origin)));
    assert_ok(c, tfm_read(c, x, values, 15)); /* so that code which reads can be measured: zeros */
    for (i = 0; i < 15; i++) cr_assert_eq(values[i], 0);
    assert_ok(c, tfm_measure_end(c, &m));
    tfm_destroy(c);
}

Test(memory, begin_and_end_of_a_dry_run_belong_together) {
    tfm_ctx *c = context_on(NULL);
    const tfm_marker first = tfm_mark(c);
    tfm_tensor *x = filled(c, 10, 1);
    tfm_marker mark = tfm_mark(c);
    tfm_memory m;
    m.held = 77;
    assert_verb_refused(c, tfm_measure_end(c, &m), TFM_INVALID);
    cr_assert_eq(m.held, 0);
    tfm_measure_begin(c);
    tfm_measure_begin(c);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    tfm_rewind(c, mark); /* of the real arena: not now */
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    tfm_rewind(c, first);
    cr_assert_eq(tfm_status_of(c), TFM_INVALID);
    tfm_clear(c);
    assert_ok(c, tfm_measure_end(c, NULL));
    cr_assert(holds(x, 1));
    tfm_measure_begin(c);
    cr_assert_null(tfm_transpose(c, x, 4, 5));
    cr_assert_eq(tfm_measure_end(c, &m), TFM_INVALID, "an error inside is its status");
    tfm_clear(c);
    assert_made(c, tfm_exp(c, x));
    cr_assert(tfm_get(tfm_exp(c, tfm_zeros(c, TFM_SHAPE(1))), origin) == 1, "it computes again");
    tfm_destroy(c);
}

Test(memory, a_dry_run_leaves_random_numbers_as_they_are) {
    tfm_ctx *c = context_on(NULL), *other = context_on(NULL);
    tfm_tensor *x, *y;
    tfm_memory m;
    tfm_measure_begin(c);
    tfm_seed(c, 99);
    assert_made(c, tfm_randn(c, TFM_SHAPE(5)));
    assert_ok(c, tfm_measure_end(c, &m));
    x = tfm_randn(c, TFM_SHAPE(50));
    y = tfm_randn(other, TFM_SHAPE(50));
    assert_made(c, x);
    assert_made(other, y);
    assert_same_bytes(x->data, y->data, 200);
    tfm_destroy(other);
    tfm_destroy(c);
}

Test(memory, a_context_destroyed_in_a_dry_run_leaks_nothing) {
    test_memory m = test_memory_new();
    tfm_ctx *c = context_on(&m);
    tfm_tensor *x = filled(c, 1000, 1);
    tfm_measure_begin(c);
    x = tfm_exp(c, x);
    assert_made(c, x);
    (void)tfm_format(c, x);
    (void)tfm_profile(c);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* Sessions, the choice of the next id, generation of a batch, beam search: on small random models. */
#include "test.h"

enum { VOCAB = 11, CAPACITY = 40 };

/* A decoder-only model with every feature of today's: rotary, RMSNorm, SwiGLU, grouped heads. */
static void small_decoder(tfm_ctx *c, tfm_params *p, tfm_transformer *model) {
    tfm_transformer_config g;
    memset(&g, 0, sizeof g);
    g.kind = TFM_DECODER_ONLY;
    g.position = TFM_POSITION_ROTARY;
    g.decoder_layers = 2;
    g.target_vocab = VOCAB;
    g.max_length = CAPACITY;
    g.block.d_model = 32;
    g.block.heads = 4;
    g.block.kv_heads = 2;
    g.block.d_ff = 48;
    g.block.norm_first = 1;
    g.block.norm = TFM_RMS_NORM;
    g.block.activation = TFM_ACT_SILU;
    g.block.gated = 1;
    g.block.no_bias = 1;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, model));
    /* a head with larger weights than the default gives distributions that are not flat */
    {
        tfm_tensor *w = tfm_params_write_begin(c, p, "generator.weight");
        int64_t i;
        for (i = 0; i < tfm_numel(w); i++) ((float *)w->data)[i] *= 4;
        assert_ok(c, tfm_params_write_end(c, p, "generator.weight"));
    }
    assert_ok(c, tfm_params_prepare(c, p));
}

static void small_translator(tfm_ctx *c, tfm_params *p, tfm_transformer *model) {
    tfm_transformer_config g;
    memset(&g, 0, sizeof g);
    g.position = TFM_POSITION_SINUSOIDAL;
    g.encoder_layers = g.decoder_layers = 2;
    g.source_vocab = VOCAB;
    g.target_vocab = VOCAB;
    g.max_length = CAPACITY;
    g.block.d_model = 32;
    g.block.heads = 4;
    g.block.d_ff = 48;
    assert_ok(c, tfm_transformer_init(c, p, "", &g, model));
    assert_ok(c, tfm_params_prepare(c, p));
}

/* A context, a model and a session. */
typedef struct setup {
    tfm_ctx *c;
    tfm_params *p;
    tfm_transformer model;
    tfm_session *s;
} setup;

static tfm_ctx *context(void) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    return tfm_create(&o);
}

static tfm_session *session_of(setup *u, int64_t batch, int64_t capacity) {
    tfm_session_options o;
    tfm_session *s;
    memset(&o, 0, sizeof o);
    o.batch = batch;
    o.capacity = capacity;
    s = tfm_session_create(u->c, &u->model, &o);
    cr_assert_not_null(s, "%s", tfm_error(u->c));
    return s;
}

static setup begin_with(int64_t batch, const tfm_options *options) {
    setup u;
    tfm_options o;
    memset(&o, 0, sizeof o);
    if (options) o = *options;
    if (!o.threads) o.threads = 1;
    o.seed = 7;
    u.c = tfm_create(&o);
    u.p = tfm_params_create(u.c);
    small_decoder(u.c, u.p, &u.model);
    u.s = session_of(&u, batch, CAPACITY);
    return u;
}

static setup begin_batch(int64_t batch) { return begin_with(batch, NULL); }

/* An encoder-decoder; the sessions are the test's. */
static setup begin_translator(void) {
    setup u;
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    u.c = tfm_create(&o);
    u.p = tfm_params_create(u.c);
    u.s = NULL;
    small_translator(u.c, u.p, &u.model);
    return u;
}

static void end(setup *u) {
    tfm_session_destroy(u->s);
    tfm_params_destroy(u->p);
    tfm_destroy(u->c);
}

static tfm_tensor *ids_of(tfm_ctx *c, const int64_t *ids, int64_t batch, int64_t length) {
    return tfm_from(c, TFM_I64, TFM_SHAPE(batch, length), ids);
}
static tfm_tensor *counts_of(tfm_ctx *c, const int64_t *counts, int64_t batch) {
    return tfm_from(c, TFM_I64, TFM_SHAPE(batch), counts);
}

static const int64_t text[12] = {1, 4, 9, 3, 3, 7, 10, 0, 5, 8, 2, 6};

/* ---- sessions --------------------------------------------------------------------------------------------------- */

/* Whole, in chunks, id by id, without a cache: the same bits. */
Test(session, feeding_whole_in_chunks_or_by_id_gives_the_same_bits) {
    TEST_EACH_ISA(c, 2) {
        setup u;
        tfm_tensor *whole, *plain, *last, *all;
        int64_t chunk, at;
        u.c = c;
        u.p = tfm_params_create(c);
        small_decoder(c, u.p, &u.model);
        u.s = session_of(&u, 1, CAPACITY);
        plain = tfm_transformer_forward(c, &u.model, NULL, ids_of(c, text, 1, 12), NULL);
        whole = tfm_session_feed(c, u.s, ids_of(c, text, 1, 12), NULL);
        assert_made(c, plain);
        assert_made(c, whole);
        cr_expect_eq(whole->ndim, 2);
        assert_same_bytes((const float *)plain->data + 11 * VOCAB, whole->data, VOCAB * 4);
        tfm_session_reset(u.s);
        all = tfm_session_feed_all(c, u.s, ids_of(c, text, 1, 12), NULL);
        assert_made(c, all);
        assert_same_bytes(all->data, plain->data, 12 * VOCAB * 4);
        for (chunk = 1; chunk < 8; chunk += 3) {
            tfm_session_reset(u.s);
            for (at = 0, last = NULL; at < 12; at += chunk)
                last = tfm_session_feed(c, u.s, ids_of(c, text + at, 1, at + chunk < 12 ? chunk : 12 - at), NULL);
            assert_made(c, last);
            cr_expect_eq(tfm_session_length(u.s, 0), 12);
            assert_same_bytes(last->data, whole->data, VOCAB * 4);
        }
        tfm_session_destroy(u.s);
        tfm_params_destroy(u.p);
    }
}

Test(session, rows_of_a_ragged_batch_have_the_bits_of_running_alone) {
    static const int64_t counts[3] = {5, 0, 8};
    setup u = begin_batch(3);
    int64_t ids[24] = {0}, b;
    tfm_tensor *y, *all;
    for (b = 0; b < 3; b++) memcpy(ids + 8 * b, text + b, (size_t)counts[b] * sizeof *ids);
    y = tfm_session_feed(u.c, u.s, ids_of(u.c, ids, 3, 8), counts_of(u.c, counts, 3));
    assert_made(u.c, y);
    tfm_session_reset(u.s);
    { /* counts may have strides; of a call its result stays, and nothing else */
        static const int64_t wide[6] = {5, 9, 0, 9, 8, 9};
        const tfm_tensor *input = ids_of(u.c, ids, 3, 8);
        const tfm_tensor *strided = tfm_slice(u.c, tfm_from(u.c, TFM_I64, TFM_SHAPE(6), wide), 0, 0, 6, 2);
        const int64_t used = tfm_memory_usage(u.c).arena_used;
        const tfm_tensor *again = tfm_session_feed(u.c, u.s, input, strided);
        assert_made(u.c, again);
        cr_expect_leq(tfm_memory_usage(u.c).arena_used - used, 512);
        assert_same_bytes(again->data, y->data, 3 * VOCAB * 4);
    }
    tfm_session_reset(u.s);
    all = tfm_session_feed_all(u.c, u.s, ids_of(u.c, ids, 3, 8), counts_of(u.c, counts, 3));
    assert_made(u.c, all);
    for (b = 0; b < 3; b++) {
        tfm_session *one = session_of(&u, 1, CAPACITY);
        static const float zeros[8 * VOCAB] = {0};
        cr_expect_eq(tfm_session_length(u.s, b), counts[b]);
        if (counts[b]) {
            tfm_tensor *alone = tfm_session_feed(u.c, one, ids_of(u.c, text + b, 1, counts[b]), NULL);
            assert_made(u.c, alone);
            assert_same_bytes(alone->data, (const float *)y->data + b * VOCAB, VOCAB * 4);
            assert_same_bytes(alone->data, (const float *)all->data + (8 * b + counts[b] - 1) * VOCAB, VOCAB * 4);
        } else {
            assert_same_bytes(zeros, (const float *)y->data + b * VOCAB, VOCAB * 4);
        }
        assert_same_bytes(zeros, (const float *)all->data + (8 * b + counts[b]) * VOCAB, (8 - counts[b]) * VOCAB * 4);
        tfm_session_destroy(one);
    }
    end(&u);
}

/* Rows that stand at different positions, fed in two pieces, the second up to the end of a learned table: what the
 * forward pass gives each of them alone. */
Test(session, every_kind_of_position_has_the_bits_of_the_forward_pass) {
    enum { SOURCE = 4, START = 3, ROOM = 8 };
    static const int64_t counts[2][2] = {{5, 2}, {3, 4}}, lengths[2] = {SOURCE, SOURCE - 1};
    tfm_ctx *c = context();
    int kind, position, piece;
    for (kind = TFM_ENCODER_DECODER; kind <= TFM_DECODER_ONLY; kind += TFM_DECODER_ONLY)
        for (position = TFM_POSITION_NONE; position <= TFM_POSITION_RELATIVE; position++) {
            const tfm_marker mark = tfm_mark(c);
            tfm_params *p = tfm_params_create(c);
            tfm_transformer_config g;
            tfm_transformer model;
            tfm_session_options o;
            tfm_session *s;
            const tfm_tensor *last = NULL;
            int64_t b;
            memset(&g, 0, sizeof g);
            memset(&o, 0, sizeof o);
            g.kind = kind;
            g.position = position;
            g.position_start = START;
            g.max_length = START + ROOM;
            g.encoder_layers = g.decoder_layers = 1;
            g.source_vocab = g.target_vocab = VOCAB;
            g.block.d_model = 16;
            g.block.heads = 2;
            g.block.d_ff = 16;
            assert_ok(c, tfm_transformer_init(c, p, "", &g, &model));
            o.batch = 2;
            o.capacity = ROOM;
            s = tfm_session_create(c, &model, &o);
            assert_made(c, s);
            if (kind == TFM_ENCODER_DECODER)
                assert_ok(c, tfm_session_encode(c, s, ids_of(c, text, 2, SOURCE), counts_of(c, lengths, 2)));
            for (piece = 0; piece < 2; piece++) {
                int64_t ids[2][5];
                for (b = 0; b < 2; b++) memcpy(ids[b], text + b + (piece ? counts[0][b] : 0), sizeof ids[b]);
                last = tfm_session_feed(c, s, ids_of(c, ids[0], 2, 5), counts_of(c, counts[piece], 2));
                assert_made(c, last);
            }
            for (b = 0; b < 2; b++) {
                const int64_t n = counts[0][b] + counts[1][b];
                const tfm_tensor *source = ids_of(c, text + SOURCE * b, 1, lengths[b]), *whole;
                whole = tfm_transformer_forward(c, &model, kind == TFM_ENCODER_DECODER ? source : NULL,
                                                ids_of(c, text + b, 1, n), NULL);
                assert_made(c, whole);
                cr_assert_eq(tfm_session_length(s, b), n);
                cr_assert_eq(test_first_difference((const float *)whole->data + (n - 1) * VOCAB,
                                                   (const float *)last->data + b * VOCAB, VOCAB * 4), -1,
                             "kind %d, position %d, row %d", kind, position, (int)b);
            }
            tfm_session_destroy(s);
            tfm_params_destroy(p);
            tfm_rewind(c, mark);
        }
    tfm_destroy(c);
}

static void set_bias(tfm_ctx *c, tfm_params *p, const char *name) {
    tfm_tensor *t = tfm_params_write_begin(c, p, name);
    assert_made(c, t);
    assert_ok(c, tfm_copy(c, t, tfm_ones(c, TFM_SHAPE(1))));
    assert_ok(c, tfm_params_write_end(c, p, name));
}

/* Features and parameters of halves give logits of halves: a row without positions becomes zeros, its neighbour keeps
 * its bits. */
Test(session, rows_of_halves_are_cleared_by_their_own_size) {
    enum { FEATURES = 8, OUTPUTS = 64, LENGTH = 2, ALL = LENGTH * OUTPUTS };
    static const int64_t counts[2][2] = {{0, LENGTH}, {LENGTH, LENGTH}};
    static const float zeros[ALL] = {0};
    int dtype, i;
    for (dtype = TFM_F32; dtype <= TFM_BF16; dtype++) {
        setup u = begin_batch(1);
        tfm_transformer_config g;
        tfm_session_options o;
        tfm_tensor *x, *last;
        float row[2][2][ALL]; /* with a first row of 0 positions and of all; first row, second row */
        memset(&g, 0, sizeof g);
        g.kind = TFM_DECODER_ONLY;
        g.target_features = FEATURES;
        g.outputs = OUTPUTS;
        g.head_bias = 1;
        g.decoder_layers = 1;
        g.max_length = CAPACITY;
        g.block.d_model = 16;
        g.block.heads = 2;
        g.block.d_ff = 16;
        assert_ok(u.c, tfm_transformer_init(u.c, u.p, "features", &g, &u.model));
        set_bias(u.c, u.p, "features.generator.bias");
        assert_ok(u.c, tfm_params_cast(u.c, u.p, dtype));
        memset(&o, 0, sizeof o);
        o.batch = 2;
        o.cache_dtype = dtype;
        tfm_session_destroy(u.s);
        u.s = tfm_session_create(u.c, &u.model, &o);
        x = tfm_cast(u.c, tfm_randn(u.c, TFM_SHAPE(2, LENGTH, FEATURES)), dtype);
        for (i = 0; i < 2; i++) {
            tfm_tensor *all = tfm_session_feed_all(u.c, u.s, x, counts_of(u.c, counts[i], 2));
            assert_made(u.c, all);
            cr_assert_eq(all->dtype, dtype);
            assert_ok(u.c, tfm_read(u.c, tfm_select(u.c, all, 0, 0), row[i][0], ALL));
            assert_ok(u.c, tfm_read(u.c, tfm_select(u.c, all, 0, 1), row[i][1], ALL));
            tfm_session_reset(u.s);
        }
        assert_same_bytes(zeros, row[0][0], sizeof zeros);
        assert_same_bytes(row[1][1], row[0][1], sizeof zeros);
        last = tfm_session_feed(u.c, u.s, x, counts_of(u.c, counts[0], 2));
        assert_made(u.c, last);
        assert_ok(u.c, tfm_read(u.c, last, row[0][0], ALL));
        assert_same_bytes(zeros, row[0][0], OUTPUTS * sizeof(float));
        assert_same_bytes(row[1][1] + OUTPUTS, row[0][0] + OUTPUTS, OUTPUTS * sizeof(float));
        end(&u);
    }
}

Test(session, truncate_reorder_fork) {
    static const int64_t swap[2] = {1, 0}, three[3] = {1, 1, 0};
    setup u = begin_batch(2);
    int64_t ids[8];
    tfm_tensor *first, *again, *forked;
    tfm_session *f;
    memcpy(ids, text, 4 * sizeof *ids);
    memcpy(ids + 4, text + 5, 4 * sizeof *ids);
    first = tfm_session_feed(u.c, u.s, ids_of(u.c, ids, 2, 4), NULL);
    assert_made(u.c, first);
    /* the last id taken back and fed again, after the rows have changed places */
    assert_ok(u.c, tfm_session_truncate(u.c, u.s, -1, 3));
    assert_ok(u.c, tfm_session_reorder(u.c, u.s, swap, 2));
    ids[0] = text[8];
    ids[1] = text[3];
    again = tfm_session_feed(u.c, u.s, ids_of(u.c, ids, 2, 1), NULL);
    assert_made(u.c, again);
    assert_same_bytes((const float *)first->data + VOCAB, again->data, VOCAB * 4);
    assert_same_bytes(first->data, (const float *)again->data + VOCAB, VOCAB * 4);
    assert_ok(u.c, tfm_session_truncate(u.c, u.s, -1, 3));
    f = tfm_session_fork(u.c, u.s, three, 3);
    assert_made(u.c, f);
    ids[0] = ids[1] = text[3];
    ids[2] = text[8];
    forked = tfm_session_feed(u.c, f, ids_of(u.c, ids, 3, 1), NULL);
    assert_made(u.c, forked);
    assert_same_bytes(first->data, forked->data, VOCAB * 4);
    assert_same_bytes(first->data, (const float *)forked->data + VOCAB, VOCAB * 4);
    assert_same_bytes((const float *)first->data + VOCAB, (const float *)forked->data + 2 * VOCAB, VOCAB * 4);
    cr_expect_eq(tfm_session_length(u.s, 0), 3, "feeding the fork changed the original");
    tfm_session_destroy(f);
    end(&u);
}

Test(session, a_feed_that_fails_changes_nothing) {
    static const int64_t counts[2] = {2, 3}, wrong[2] = {2, 5}, negative[2] = {-1, 2};
    setup u = begin_batch(2);
    tfm_session *s = session_of(&u, 2, 6);
    int64_t ids[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    tfm_tensor *y, *before;
    int way;
    assert_made(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 3), counts_of(u.c, counts, 2)));
    assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 4), NULL), TFM_INVALID); /* row 1 has 3 of 6 */
    assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 4), counts_of(u.c, wrong, 2)), TFM_INVALID);
    assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 4), counts_of(u.c, negative, 2)), TFM_INVALID);
    cr_assert_null(tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 2), counts_of(u.c, counts, 2))); /* 3 of 2 ids */
    cr_assert(strstr(tfm_error(u.c), "tfm_session_feed: counts[1] is 3") != NULL, "%s", tfm_error(u.c));
    tfm_clear(u.c);
    for (way = 0; way < 3; way++) { /* for one row of two, as a matrix, as floats */
        const tfm_tensor *odd = way == 2 ? tfm_ones(u.c, TFM_SHAPE(2)) : counts_of(u.c, counts, 2 - (way == 0));
        cr_assert_null(tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 3),
                                        way == 1 ? tfm_reshape(u.c, odd, TFM_SHAPE(2, 1)) : odd));
        cr_assert(strstr(tfm_error(u.c), "tfm_session_feed: counts is") != NULL, "%s", tfm_error(u.c));
        tfm_clear(u.c);
    }
    assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids, 4, 2), NULL), TFM_INVALID);
    assert_refused(u.c, tfm_session_feed(u.c, s, NULL, NULL), TFM_INVALID);
    ids[1] = VOCAB;
    assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 2), NULL), TFM_INVALID);
    ids[1] = 2;
    cr_expect_eq(tfm_session_length(s, 0), 2);
    cr_expect_eq(tfm_session_length(s, 1), 3);
    y = tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 3), NULL);
    assert_made(u.c, y);
    cr_expect_eq(tfm_session_length(s, 1), 6);
    tfm_session_reset(s);
    assert_made(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids + 0, 2, 3), counts_of(u.c, counts, 2)));
    before = tfm_session_feed(u.c, s, ids_of(u.c, ids, 2, 3), NULL);
    assert_made(u.c, before);
    assert_same_bytes(before->data, y->data, 2 * VOCAB * 4);
    tfm_session_destroy(s);
    end(&u);
}

/* Whenever memory runs out: no layer keeps what others lack, and the same feed goes well afterwards. */
Test(session, a_feed_without_memory_changes_nothing) {
    enum { FIRST = 3, LONG = 1500 }; /* more than the arena takes at first */
    static int64_t ids[LONG];
    float expected[VOCAB];
    int64_t n, failed = 0;
    for (n = 0; n < LONG; n++) ids[n] = text[n % 12] % VOCAB;
    for (n = -1;; n++) { /* first with enough */
        test_memory m = test_memory_new();
        tfm_options o;
        setup u;
        tfm_session *s;
        const tfm_tensor *y;
        memset(&o, 0, sizeof o);
        o.allocator = test_allocator(&m);
        u = begin_with(1, &o);
        s = session_of(&u, 1, FIRST + LONG);
        assert_made(u.c, tfm_session_feed(u.c, s, ids_of(u.c, ids, 1, FIRST), NULL));
        m.fail_at = n < 0 ? -1 : m.calls + n;
        m.fail_on = 1;
        y = tfm_session_feed(u.c, s, ids_of(u.c, ids, 1, LONG), NULL);
        m.fail_at = -1;
        failed += y == NULL;
        if (!y) {
            cr_assert_eq(tfm_status_of(u.c), TFM_OOM);
            tfm_clear(u.c);
            cr_assert_eq(tfm_session_length(s, 0), FIRST);
            y = tfm_session_feed(u.c, s, ids_of(u.c, ids, 1, LONG), NULL);
        }
        assert_made(u.c, y);
        if (n < 0) memcpy(expected, y->data, sizeof expected);
        assert_same_bytes(y->data, expected, sizeof expected);
        tfm_session_destroy(s);
        end(&u);
        assert_no_leak(&m);
        if (n >= 0 && !m.failed) break;
    }
    cr_expect_gt(failed, 0);
}

Test(session, a_source_is_needed_and_padding_is_not_seen) {
    static const int64_t lengths[2] = {3, 5}, start[2] = {1, 1};
    int64_t ids[10] = {0};
    setup u = begin_translator();
    tfm_session *s, *one;
    tfm_tensor *y, *alone, *memory, *forward;
    s = session_of(&u, 2, CAPACITY);
    u.s = session_of(&u, 1, CAPACITY);
    one = u.s;
    assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, start, 2, 1), NULL), TFM_INVALID);
    memcpy(ids, text, 3 * sizeof *ids);
    memcpy(ids + 5, text + 4, 5 * sizeof *ids);
    assert_ok(u.c, tfm_session_encode(u.c, s, ids_of(u.c, ids, 2, 5), counts_of(u.c, lengths, 2)));
    y = tfm_session_feed(u.c, s, ids_of(u.c, start, 2, 1), NULL);
    assert_made(u.c, y);
    assert_ok(u.c, tfm_session_encode(u.c, one, ids_of(u.c, text, 1, 3), NULL));
    alone = tfm_session_feed(u.c, one, ids_of(u.c, start, 1, 1), NULL);
    assert_made(u.c, alone);
    assert_same_bytes(alone->data, y->data, VOCAB * 4);
    memory = tfm_transformer_encode(u.c, &u.model, ids_of(u.c, text, 1, 3), NULL);
    forward = tfm_transformer_decode(u.c, &u.model, ids_of(u.c, start, 1, 1), memory, NULL);
    assert_made(u.c, forward);
    assert_same_bytes(alone->data, forward->data, VOCAB * 4);
    tfm_session_destroy(s);
    end(&u);
}

/* A reset forgets the source, and a second one takes its place. A fork may take another, up to what its original could. */
Test(session, a_source_is_forgotten_or_replaced) {
    static const int64_t start[2] = {1, 1}, rows[1] = {0};
    setup u = begin_translator();
    tfm_session_options o;
    tfm_session *s[3], *unready;
    const tfm_tensor *y[3];
    int64_t used;
    int i;
    memset(&o, 0, sizeof o);
    o.capacity = 6;
    o.source_capacity = 8;
    u.s = s[0] = tfm_session_create(u.c, &u.model, &o);
    s[1] = tfm_session_create(u.c, &u.model, &o);
    assert_made(u.c, s[0]);
    assert_made(u.c, s[1]);
    unready = tfm_session_fork(u.c, s[0], rows, 1);
    assert_made(u.c, unready);
    assert_refused(u.c, tfm_session_feed(u.c, unready, ids_of(u.c, start, 1, 1), NULL), TFM_INVALID);
    assert_ok(u.c, tfm_session_encode(u.c, s[0], ids_of(u.c, text, 1, 8), NULL));
    s[2] = tfm_session_fork(u.c, s[0], rows, 1);
    assert_made(u.c, s[2]);
    assert_made(u.c, tfm_session_feed(u.c, s[0], ids_of(u.c, start, 1, 1), NULL));
    tfm_session_reset(s[0]);
    assert_refused(u.c, tfm_session_feed(u.c, s[0], ids_of(u.c, start, 1, 1), NULL), TFM_INVALID);
    used = tfm_memory_usage(u.c).arena_used;
    assert_ok(u.c, tfm_session_encode(u.c, s[0], ids_of(u.c, text, 1, 8), NULL));
    cr_expect_leq(tfm_memory_usage(u.c).arena_used - used, 512); /* the ids alone */
    for (i = 0; i < 3; i++) {
        assert_ok(u.c, tfm_session_encode(u.c, s[i], ids_of(u.c, text + 2, 1, 7), NULL));
        y[i] = tfm_session_feed(u.c, s[i], ids_of(u.c, start, 1, 1), NULL);
        assert_made(u.c, y[i]);
        assert_same_bytes(y[i]->data, y[0]->data, VOCAB * 4);
        /* what is refused for its shape leaves the session as it is */
        assert_verb_refused(u.c, tfm_session_encode(u.c, s[i], ids_of(u.c, text, 1, 9), NULL), TFM_INVALID);
        assert_verb_refused(u.c, tfm_session_encode(u.c, s[i], ids_of(u.c, text, 2, 4), NULL), TFM_INVALID);
        assert_verb_refused(u.c, tfm_session_encode(u.c, s[i], tfm_from(u.c, TFM_I64, TFM_SHAPE(1), text), NULL),
                            TFM_INVALID);
        cr_expect_eq(tfm_session_length(s[i], 0), 1);
        assert_made(u.c, tfm_session_feed(u.c, s[i], ids_of(u.c, start, 1, 1), NULL));
    }
    tfm_session_destroy(unready);
    tfm_session_destroy(s[1]);
    tfm_session_destroy(s[2]);
    end(&u);
}

/* A dry run asks what calls would need; the session goes on as if it had not been asked. */
Test(session, measuring_leaves_a_session_as_it_is) {
    static const int64_t start[1] = {1};
    setup u = begin_translator();
    tfm_session *s, *twin;
    tfm_memory m;
    tfm_tensor *y[2];
    tfm_beam_options beams;
    int i;
    u.s = s = session_of(&u, 1, 4);
    twin = session_of(&u, 1, 4);
    memset(&beams, 0, sizeof beams);
    beams.beams = 2;
    for (i = 0; i < 3; i++) { /* of a new session, of one that is under way, of a full one */
        static const int64_t rows[2] = {0, 0};
        static const tfm_prompt prompt = {1, start};
        tfm_sequence out[2];
        tfm_session *fork;
        tfm_measure_begin(u.c);
        assert_ok(u.c, tfm_session_encode(u.c, s, ids_of(u.c, text, 1, 4), NULL));
        assert_ok(u.c, tfm_generate(u.c, s, &prompt, 1, NULL, out));
        fork = tfm_session_fork(u.c, s, rows, 2);
        assert_made(u.c, fork);
        assert_ok(u.c, tfm_beam_search(u.c, fork, &prompt, 1, &beams, out));
        tfm_session_destroy(fork);
        assert_ok(u.c, tfm_measure_end(u.c, &m));
        tfm_measure_begin(u.c);
        assert_ok(u.c, tfm_session_encode(u.c, s, ids_of(u.c, text, 1, 4), NULL));
        assert_made(u.c, tfm_session_feed(u.c, s, ids_of(u.c, start, 1, 1), NULL));
        assert_ok(u.c, tfm_session_truncate(u.c, s, -1, 0));
        assert_ok(u.c, tfm_measure_end(u.c, &m));
        cr_expect_gt(m.arena_peak, 0);
        if (i == 0) {
            assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, start, 1, 1), NULL), TFM_INVALID);
            assert_ok(u.c, tfm_session_encode(u.c, s, ids_of(u.c, text + 2, 1, 3), NULL));
            assert_ok(u.c, tfm_session_encode(u.c, twin, ids_of(u.c, text + 2, 1, 3), NULL));
        }
        if (i == 2) break;
        y[0] = tfm_session_feed(u.c, s, ids_of(u.c, text + 2 * i, 1, 2), NULL);
        y[1] = tfm_session_feed(u.c, twin, ids_of(u.c, text + 2 * i, 1, 2), NULL);
        assert_made(u.c, y[0]);
        assert_made(u.c, y[1]);
        assert_same_bytes(y[0]->data, y[1]->data, VOCAB * 4);
        cr_expect_eq(tfm_session_length(s, 0), 2 * i + 2);
    }
    assert_refused(u.c, tfm_session_feed(u.c, s, ids_of(u.c, start, 1, 1), NULL), TFM_INVALID);
    cr_expect_eq(tfm_session_length(s, 0), 4);
    tfm_session_destroy(twin);
    end(&u);
}

Test(session, wrong_arguments_are_errors) {
    setup u = begin_batch(1);
    tfm_session_options o;
    tfm_transformer encoder;
    tfm_transformer_config g;
    static const int64_t rows[1] = {3};
    memset(&o, 0, sizeof o);
    memset(&g, 0, sizeof g);
    g.kind = TFM_ENCODER_ONLY;
    g.encoder_layers = 1;
    g.source_vocab = VOCAB;
    g.block.d_model = 16;
    g.block.heads = 2;
    g.block.d_ff = 8;
    assert_ok(u.c, tfm_transformer_init(u.c, u.p, "other", &g, &encoder));
    assert_refused(u.c, tfm_session_create(u.c, &encoder, NULL), TFM_INVALID);
    assert_refused(u.c, tfm_session_create(u.c, NULL, NULL), TFM_INVALID);
    cr_expect_null(tfm_session_create(NULL, &u.model, NULL));
    o.batch = -1;
    assert_refused(u.c, tfm_session_create(u.c, &u.model, &o), TFM_INVALID);
    o.batch = INT64_MAX / 2;
    cr_expect_null(tfm_session_create(u.c, &u.model, &o));
    tfm_clear(u.c);
    assert_verb_refused(u.c, tfm_session_encode(u.c, u.s, ids_of(u.c, text, 1, 3), NULL),
                        TFM_INVALID); /* decoder-only */
    assert_verb_refused(u.c, tfm_session_encode(u.c, NULL, NULL, NULL), TFM_INVALID);
    assert_verb_refused(u.c, tfm_session_truncate(u.c, NULL, 0, 0), TFM_INVALID);
    assert_verb_refused(u.c, tfm_session_truncate(u.c, u.s, 5, 0), TFM_INVALID);
    assert_verb_refused(u.c, tfm_session_reorder(u.c, NULL, rows, 1), TFM_INVALID);
    assert_verb_refused(u.c, tfm_session_reorder(u.c, u.s, rows, 1), TFM_INVALID);
    assert_refused(u.c, tfm_session_fork(u.c, NULL, rows, 1), TFM_INVALID);
    assert_refused(u.c, tfm_session_fork(u.c, u.s, rows, 1), TFM_INVALID);
    assert_refused(u.c, tfm_session_fork(u.c, u.s, NULL, 1), TFM_INVALID);
    assert_refused(u.c, tfm_session_feed(u.c, NULL, NULL, NULL), TFM_INVALID);
    cr_expect_eq(tfm_session_length(NULL, 0), 0);
    cr_expect_eq(tfm_session_length(u.s, 1), 0);
    cr_expect_eq(tfm_session_length(u.s, -1), 0);
    tfm_session_reset(NULL);
    tfm_session_destroy(NULL);
    end(&u);
}

Test(session, tensors_that_are_dead_or_of_another_context_are_named) {
    setup u = begin_batch(1);
    tfm_ctx *other = tfm_create(NULL);
    static const int64_t one[1] = {1};
    tfm_tensor *ids = ids_of(u.c, text, 1, 3), *foreign = counts_of(other, one, 1), *dead;
    tfm_marker mark = tfm_mark(u.c);
    int64_t id;
    dead = counts_of(u.c, one, 1);
    tfm_rewind(u.c, mark);
    cr_expect_null(tfm_session_feed(u.c, u.s, ids, foreign));
    cr_expect_str_eq(tfm_error(u.c), "tfm_session_feed: counts belongs to another context");
    tfm_clear(u.c);
    cr_expect_null(tfm_session_feed(u.c, u.s, dead, NULL));
    cr_expect_str_eq(tfm_error(u.c), "tfm_session_feed: ids is used after the rewind that freed it");
    tfm_clear(u.c);
    cr_expect_null(tfm_session_feed(u.c, u.s, NULL, NULL));
    cr_expect_str_eq(tfm_error(u.c), "tfm_session_feed: ids is NULL");
    tfm_clear(u.c);
    cr_expect_eq(tfm_sample(u.c, dead, NULL, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    cr_expect_str_eq(tfm_error(u.c), "tfm_sample: logits is used after the rewind that freed it");
    tfm_clear(u.c);
    cr_expect_null(tfm_keep(u.c, tfm_mark(u.c), foreign));
    cr_expect_str_eq(tfm_error(u.c), "tfm_keep: t belongs to another context");
    tfm_clear(u.c);
    assert_made(u.c, tfm_session_feed(u.c, u.s, ids, NULL));
    tfm_destroy(other);
    end(&u);
}

/* ---- the next id ------------------------------------------------------------------------------------------------ */

static int64_t sample(tfm_ctx *c, const float *logits, int64_t n, const tfm_sampling *s, uint64_t step) {
    int64_t id = -2;
    tfm_marker mark = tfm_mark(c);
    tfm_tensor *t = tfm_from(c, TFM_F32, TFM_SHAPE(n), logits);
    cr_assert_eq(tfm_sample(c, t, s, NULL, 0, 0, step, &id, NULL), TFM_OK, "%s", tfm_error(c));
    tfm_rewind(c, mark);
    return id;
}

Test(sampling, greedy_takes_the_first_of_the_largest) {
    static const float x[5] = {1, 3, -2, 3, 0};
    tfm_ctx *c = context();
    const tfm_tensor *logits = tfm_from(c, TFM_F32, TFM_SHAPE(5), x);
    const int64_t used = tfm_memory_usage(c).arena_used;
    int64_t id = -1;
    float logp = 0;
    assert_ok(c, tfm_sample(c, logits, NULL, NULL, 0, 0, 0, &id, &logp));
    cr_expect_eq(id, 1);
    cr_expect_eq(tfm_memory_usage(c).arena_used, used);
    cr_expect_float_eq(logp, 3 - log(exp(1.0) + 2 * exp(3.0) + exp(-2.0) + 1), 1e-6);
    tfm_destroy(c);
}

/* Log-probabilities are those of the unmodified logits, also where exp would overflow. */
Test(sampling, log_probability_is_stable_and_of_the_unmodified_logits) {
    static const float x[3] = {1000, 1001, -1000};
    static const int64_t ban = 1;
    tfm_ctx *c = context();
    tfm_sampling s;
    int64_t id = -1;
    float logp = 0;
    memset(&s, 0, sizeof s);
    s.banned = &ban;
    s.banned_count = 1;
    assert_ok(c, tfm_sample(c, tfm_from(c, TFM_F32, TFM_SHAPE(3), x), &s, NULL, 0, 0, 0, &id, &logp));
    cr_expect_eq(id, 0);
    cr_expect_float_eq(logp, -1 - log(1 + exp(-1.0)), 1e-6);
    tfm_destroy(c);
}

static void expect_frequencies(const float *logits, int64_t n, tfm_sampling s, const double *expected) {
    enum { DRAWS = 20000 };
    tfm_ctx *c = context();
    int64_t seen[16] = {0}, i;
    for (i = 0; i < DRAWS; i++) seen[sample(c, logits, n, &s, (uint64_t)i)]++;
    for (i = 0; i < n; i++) {
        const double deviation = sqrt(DRAWS * expected[i] * (1 - expected[i]));
        cr_expect(fabs((double)seen[i] - DRAWS * expected[i]) <= 4.5 * deviation,
                  "id %lld: %lld of %d draws, expected %.4f of them", (long long)i, (long long)seen[i], DRAWS,
                  expected[i]);
    }
    tfm_destroy(c);
}

/* p = 0.4, 0.3, 0.2, 0.1, not in order */
static const float tenths[4] = {-1.6094379f, -0.9162907f, -2.3025851f, -1.2039728f};

Test(sampling, draws_follow_the_distribution) {
    static const double plain[4] = {0.2, 0.4, 0.1, 0.3}, cut2[4] = {0, 4.0 / 7, 0, 3.0 / 7},
                        cut3[4] = {2.0 / 9, 4.0 / 9, 0, 3.0 / 9}, only[4] = {0, 1, 0, 0},
                        halves[4] = {0, 0.5, 0, 0.5}, first[4] = {0, 1, 0, 0};
    static const float pairs[4] = {-40, 1, -40, 1};
    double hot[4], cold_sum = 0;
    tfm_sampling s;
    int i;
    memset(&s, 0, sizeof s);
    s.temperature = 1;
    s.seed = 3;
    expect_frequencies(tenths, 4, s, plain);
    s.top_k = 2;
    expect_frequencies(tenths, 4, s, cut2);
    s.top_k = 0;
    s.top_p = 0.69f; /* 0.4 + 0.3 is the least set that reaches it */
    expect_frequencies(tenths, 4, s, cut2);
    s.top_p = 0.71f;
    expect_frequencies(tenths, 4, s, cut3);
    s.top_p = 0.01f;
    expect_frequencies(tenths, 4, s, only);
    s.top_p = 0.5f;
    s.top_k = 1;
    expect_frequencies(tenths, 4, s, only);
    s.top_p = 0.75f; /* of what top_k leaves: 0.4 + 0.3 of 0.9 */
    s.top_k = 3;
    expect_frequencies(tenths, 4, s, cut2);
    s.top_p = 0;
    s.top_k = 0;
    s.min_p = 0.45f; /* of the largest: 0.18 */
    expect_frequencies(tenths, 4, s, cut3);
    s.min_p = 1; /* what equals the largest stays */
    expect_frequencies(pairs, 4, s, halves);
    s.top_p = 1; /* off */
    expect_frequencies(pairs, 4, s, halves);
    s.min_p = 0;
    s.top_p = 0.5f; /* reached by the first of equals */
    expect_frequencies(pairs, 4, s, first);
    s.top_p = 0;
    s.top_k = 1;
    expect_frequencies(pairs, 4, s, first);
    s.top_k = 0;
    s.temperature = 2;
    for (i = 0; i < 4; i++) cold_sum += hot[i] = sqrt(plain[i]);
    for (i = 0; i < 4; i++) hot[i] /= cold_sum;
    expect_frequencies(tenths, 4, s, hot);
}

Test(sampling, a_draw_depends_on_seed_stream_and_step_only) {
    tfm_ctx *c = context();
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(1000));
    tfm_sampling s;
    int64_t a, b, different = 0;
    uint64_t i;
    memset(&s, 0, sizeof s);
    s.temperature = 1;
    for (i = 0; i < 20; i++) {
        s.seed = 5;
        assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 2, i, &a, NULL));
        tfm_seed(c, i);
        assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 2, i, &b, NULL));
        cr_expect_eq(a, b);
        assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 3, i, &b, NULL));
        different += a != b;
        s.seed = 6;
        assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 2, i, &b, NULL));
        different += a != b;
        s.seed = 5;
        assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 2, i + 1, &b, NULL));
        different += a != b;
    }
    cr_expect_gt(different, 55);
    tfm_destroy(c);
}

static void raise_last(void *user, int64_t row, float *logits, int64_t vocab) {
    ((float *)user)[0] = logits[0]; /* what the callback sees */
    ((float *)user)[1] = logits[1];
    logits[vocab - 1] = 100 + (float)row;
}

Test(sampling, penalties_bias_and_callback) {
    static const float x[4] = {2, 1.9f, -1, -1.1f};
    static const int64_t ids[5] = {1, 0, 0, 2, 4 /* none of the logits */}, bias_ids[1] = {3}, ban[3] = {0, 1, 3},
                         others[2] = {-1, 3};
    static const float bias[1] = {3.5f}, more[1] = {3.05f}, large[1] = {4.5f},
                       below[2] = {-2, -2.5f}, small[2] = {0.6f, 0.5f};
    float seen[2], logp;
    tfm_ctx *c = context();
    tfm_tensor *t = tfm_from(c, TFM_F32, TFM_SHAPE(4), x);
    tfm_sampling s;
    int64_t id;
    memset(&s, 0, sizeof s);
    s.repetition_penalty = 2; /* 1, 0.95, -2, -1.1 */
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 0);
    s.penalty_window = 4; /* id 1 is out of sight: 1, 1.9, -2, -1.1 */
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 1);
    s.penalty_window = 6; /* more than there are: as in the beginning */
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 0);
    s.penalty_window = 1; /* the last one only, which is no logit's: 2 is the largest */
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 0);
    assert_ok(c, tfm_sample(c, t, &s, ids, 3, 0, 0, &id, NULL)); /* 1, 1.9 */
    cr_expect_eq(id, 1);
    s.penalty_window = 0;
    assert_ok(c, tfm_sample(c, tfm_from(c, TFM_F32, TFM_SHAPE(2), below), &s, ids + 1, 1, 0, 0, &id, NULL));
    cr_expect_eq(id, 1); /* -4, -2.5 */
    assert_ok(c, tfm_sample(c, tfm_from(c, TFM_F32, TFM_SHAPE(2), small), &s, ids + 1, 1, 0, 0, &id, NULL));
    cr_expect_eq(id, 1); /* 0.3, 0.5 */
    assert_ok(c, tfm_sample(c, t, &s, others, 2, 0, 0, &id, NULL)); /* -1 is no id */
    cr_expect_eq(id, 0);
    s.bias_ids = bias_ids;
    s.bias = large; /* 3.4 / 2: the bias comes first, behind the penalty it would be -2.2 + 4.5 */
    s.bias_count = 1;
    s.banned = ids + 1;
    s.banned_count = 1;
    assert_ok(c, tfm_sample(c, t, &s, others + 1, 1, 0, 0, &id, NULL));
    cr_expect_eq(id, 1);
    memset(&s, 0, sizeof s);
    s.frequency_penalty = 0.06f; /* 1.88, 1.84 */
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 0);
    s.frequency_penalty = 0.11f; /* 1.78, 1.79 */
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 1);
    memset(&s, 0, sizeof s);
    s.presence_penalty = 4; /* -2, -2.1, -5, -1.1 */
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 3);
    memset(&s, 0, sizeof s);
    s.bias_ids = bias_ids;
    s.bias = bias;
    s.bias_count = 1;
    assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, &logp));
    cr_expect_eq(id, 3);
    cr_expect_float_eq(logp, -1.1 - log(exp(2.0) + exp(1.9) + exp(-1.0) + exp(-1.1)), 1e-6, "of the unmodified logits");
    s.bias = more; /* 1.95, between 2 and 1.9: it is added */
    assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, NULL));
    cr_expect_eq(id, 0);
    s.bias = bias;
    s.banned = ban;
    s.banned_count = 3;
    assert_ok(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, NULL));
    cr_expect_eq(id, 2);
    memset(&s, 0, sizeof s);
    s.repetition_penalty = 2;
    s.logits = raise_last;
    s.user = seen;
    assert_ok(c, tfm_sample(c, t, &s, ids, 5, 0, 0, &id, NULL));
    cr_expect_eq(id, 3);
    cr_expect_eq(seen[0], 1.0f, "the callback comes after the penalties");
    tfm_destroy(c);
}

Test(sampling, wrong_arguments_are_errors) {
    static const float nan_[2] = {1, (float)NAN}, inf_[2] = {1, (float)HUGE_VAL},
                       low[2] = {-(float)HUGE_VAL, -(float)HUGE_VAL}, good[2] = {1, 2};
    static const int64_t far[1] = {2}, low_id[1] = {-1}, both[2] = {0, 1};
    tfm_ctx *c = context();
    tfm_tensor *t = tfm_from(c, TFM_F32, TFM_SHAPE(2), good);
    tfm_sampling s;
    int64_t id;
#define REFUSE(field, value) \
    memset(&s, 0, sizeof s); \
    s.field = value; \
    assert_verb_refused(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, NULL), TFM_INVALID)
    REFUSE(temperature, -1);
    REFUSE(temperature, (float)NAN);
    REFUSE(temperature, (float)HUGE_VAL);
    REFUSE(top_k, -1);
    REFUSE(top_p, 1.5f);
    REFUSE(top_p, (float)NAN);
    REFUSE(min_p, -0.1f);
    REFUSE(repetition_penalty, -1);
    REFUSE(repetition_penalty, (float)HUGE_VAL);
    REFUSE(frequency_penalty, (float)HUGE_VAL);
    REFUSE(presence_penalty, -(float)HUGE_VAL);
    REFUSE(presence_penalty, (float)NAN);
    REFUSE(penalty_window, -1);
    REFUSE(banned_count, 1);
    REFUSE(banned_count, -1);
    REFUSE(bias_count, 1);
    REFUSE(bias_count, -1);
    REFUSE(top_p, -0.1f);
    REFUSE(min_p, 1.5f);
    REFUSE(repetition_penalty, (float)NAN);
    REFUSE(frequency_penalty, (float)NAN);
    memset(&s, 0, sizeof s);
    s.banned = far;
    s.banned_count = 1;
    assert_verb_refused(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    s.banned = low_id;
    assert_verb_refused(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    s.banned = both;
    s.banned_count = 2;
    assert_verb_refused(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    s.temperature = 1;
    assert_verb_refused(c, tfm_sample(c, t, &s, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, tfm_from(c, TFM_F32, TFM_SHAPE(2), nan_), NULL, NULL, 0, 0, 0, &id, NULL),
                        TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, tfm_from(c, TFM_F32, TFM_SHAPE(2), inf_), NULL, NULL, 0, 0, 0, &id, NULL),
                        TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, tfm_from(c, TFM_F32, TFM_SHAPE(2), low), NULL, NULL, 0, 0, 0, &id, NULL),
                        TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, NULL, NULL, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, t, NULL, NULL, 0, 0, 0, NULL, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, t, NULL, NULL, 1, 0, 0, &id, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, t, NULL, both, -1, 0, 0, &id, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, tfm_zeros(c, TFM_SHAPE(2, 2)), NULL, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, tfm_zeros(c, TFM_SHAPE(0)), NULL, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, tfm_zeros(c, tfm_shape_of(0, NULL)), NULL, NULL, 0, 0, 0, &id, NULL),
                        TFM_INVALID);
    assert_verb_refused(c, tfm_sample(c, tfm_cast(c, t, TFM_F16), NULL, NULL, 0, 0, 0, &id, NULL), TFM_INVALID);
    tfm_destroy(c);
}

/* ---- generation ------------------------------------------------------------------------------------------------- */

static const tfm_prompt prompts[4] = {{3, text}, {1, text + 4}, {7, text + 2}, {3, text}};

static void expect_same_sequence(const tfm_sequence *a, const tfm_sequence *b) {
    cr_assert_eq(a->count, b->count);
    cr_expect_eq(a->reason, b->reason);
    assert_same_bytes(a->ids, b->ids, a->count * 8);
    assert_same_bytes(a->log_probabilities, b->log_probabilities, a->count * 4);
}

/* Greedy and drawn, whole and in chunks: each row as if it were alone; equal prompts have draws of their own. */
Test(generate, rows_have_the_bits_of_running_alone) {
    int drawn, threads;
    for (threads = 1; threads <= 3; threads += 2)
        for (drawn = 0; drawn < 2; drawn++) {
            tfm_options o;
            setup u;
            /* one is the beginning of another */
            const tfm_prompt mixed[4] = {{3, text}, {1, text}, {7, text + 2}, {3, text}};
            tfm_generate_options g;
            tfm_sequence out[4], chunked[4], alone;
            int64_t b;
            memset(&o, 0, sizeof o);
            o.threads = threads;
            u = begin_with(4, &o);
            memset(&g, 0, sizeof g);
            g.max_new = 20;
            g.sampling.temperature = (float)drawn;
            g.sampling.seed = 11;
            g.sampling.repetition_penalty = 1.1f;
            assert_ok(u.c, tfm_generate(u.c, u.s, mixed, 4, &g, out));
            for (g.prompt_chunk = 4; g.prompt_chunk; g.prompt_chunk--) { /* of 3 and 1 whole prompts end with a chunk */
                tfm_session_reset(u.s);
                assert_ok(u.c, tfm_generate(u.c, u.s, mixed, 4, &g, chunked));
                for (b = 0; b < 4; b++) expect_same_sequence(&out[b], &chunked[b]);
            }
            g.prompt_chunk = INT64_MAX;
            for (b = 0; b < 3; b++) {
                tfm_session *one = session_of(&u, 1, CAPACITY);
                assert_ok(u.c, tfm_generate(u.c, one, &mixed[b], 1, &g, &alone));
                expect_same_sequence(&out[b], &alone);
                tfm_session_destroy(one);
            }
            cr_expect_eq(memcmp(out[0].ids, out[3].ids, 20 * 8) == 0, !drawn, "equal prompts and draws");
            end(&u);
        }
}

/* Greedy generation is the arg max of the whole forward, step by step. */
Test(generate, greedy_follows_the_forward_pass) {
    setup u = begin_batch(1);
    int64_t ids[CAPACITY], n = 3, i;
    tfm_sequence out;
    tfm_generate_options g;
    memset(&g, 0, sizeof g);
    g.max_new = 12;
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out));
    memcpy(ids, text, 3 * sizeof *ids);
    for (i = 0; i < 12; i++, n++) {
        tfm_tensor *y = tfm_transformer_forward(u.c, &u.model, NULL, ids_of(u.c, ids, 1, n), NULL), *last;
        assert_made(u.c, y);
        last = tfm_select(u.c, tfm_select(u.c, y, 0, 0), 0, n - 1);
        ids[n] = (int64_t)tfm_item(tfm_argmax(u.c, last, 0, 0));
        cr_expect_eq(out.ids[i], ids[n], "id %lld", (long long)i);
        {
            const int64_t at = ids[n];
            cr_expect_float_eq(out.log_probabilities[i], tfm_get(tfm_log_softmax(u.c, last, 0), &at), 2e-6);
        }
    }
    cr_expect_eq(out.reason, TFM_STOP_LENGTH);
    cr_expect_eq(tfm_session_length(u.s, 0), 3 + 11, "the last id is not fed");
    end(&u);
}

Test(generate, ends_at_stop_ids_and_at_capacity) {
    setup u = begin_batch(2);
    tfm_session *s = session_of(&u, 2, 9);
    tfm_generate_options g;
    tfm_sequence out[2], cut[2];
    int64_t stop;
    memset(&g, 0, sizeof g);
    assert_ok(u.c, tfm_generate(u.c, s, prompts, 2, &g, out));
    cr_expect_eq(out[0].reason, TFM_STOP_CAPACITY);
    cr_expect_eq(out[0].count, 9 - 3 + 1); /* the last one needs no room */
    cr_expect_eq(out[1].count, 9 - 1 + 1);
    cr_expect_eq(tfm_session_length(s, 0), 9);
    tfm_session_reset(s);
    g.max_new = 8;
    assert_ok(u.c, tfm_generate(u.c, s, prompts, 2, &g, cut));
    cr_expect(cut[0].reason == TFM_STOP_CAPACITY && cut[0].count == 7);
    cr_expect(cut[1].reason == TFM_STOP_LENGTH && cut[1].count == 8);
    g.max_new = 0;
    assert_ok(u.c, tfm_session_truncate(u.c, s, -1, 8)); /* room for one id, and the one that is not fed */
    {
        const tfm_prompt last[2] = {{1, text}, {1, text}};
        assert_ok(u.c, tfm_generate(u.c, s, last, 2, &g, cut));
        cr_expect(cut[0].reason == TFM_STOP_CAPACITY && cut[0].count == 1);
    }
    stop = out[0].ids[2];
    g.stop_ids = &stop;
    g.stop_id_count = 1;
    tfm_session_reset(s);
    assert_ok(u.c, tfm_generate(u.c, s, prompts, 2, &g, cut));
    cr_expect_eq(cut[0].reason, TFM_STOP_ID);
    cr_expect_leq(cut[0].count, 3);
    cr_expect_eq(cut[0].ids[cut[0].count - 1], stop, "the stop id is among the ids");
    assert_same_bytes(cut[0].ids, out[0].ids, cut[0].count * 8);
    tfm_session_destroy(s);
    end(&u);
}

/* A piece of text for each id that makes stop strings cross borders. */
static const char *piece(const void *user, int64_t previous, int64_t id, int64_t *length) {
    static const char *const pieces[VOCAB] = {"ab", "c", "abc", "", "d\n", "xyz", "a", "bca", "b", "ca", "q"};
    (void)user;
    (void)previous;
    *length = (int64_t)strlen(pieces[id]);
    return pieces[id];
}

typedef struct heard {
    char text[2][512];
    int64_t count[2], end_at[2]; /* end_at: which call says stop */
    int64_t allocations[64], steps;
    tfm_ctx *c;
} heard;

static int hear(void *user, int64_t row, int64_t id, float log_probability, const char *t, int64_t length) {
    heard *h = (heard *)user;
    (void)id;
    cr_expect_leq(log_probability, 0);
    cr_assert_not_null(t);
    strncat(h->text[row], t, (size_t)length);
    if (h->c && h->steps < 64) h->allocations[h->steps++] = tfm_memory_usage(h->c).allocations;
    return ++h->count[row] == h->end_at[row];
}

/* What a row says without stop strings, cut by hand, is what it says with them; of a stop string nothing is heard. */
Test(generate, stop_strings_are_found_across_ids) {
    static const char *const stops[][3] = {{"abca", NULL, NULL}, {"bc", "abcd", NULL}, {"zz", "cab", NULL},
                                           {"q", "d\n", "xyzx"}, {"caca", NULL, NULL}, {"bcab", "cb", NULL}};
    setup u = begin_batch(2);
    size_t k;
    uint64_t seed;
    for (seed = 0; seed < 12; seed++) {
        tfm_generate_options g;
        tfm_sequence all[2], out[2];
        int64_t b;
        memset(&g, 0, sizeof g);
        g.max_new = 30;
        g.sampling.temperature = 3;
        g.sampling.seed = seed;
        g.piece = piece;
        tfm_session_reset(u.s);
        assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, all));
        for (k = 0; k < sizeof stops / sizeof stops[0]; k++) {
            heard h;
            int count = 0;
            memset(&h, 0, sizeof h);
            while (count < 3 && stops[k][count]) count++;
            g.stop_strings = stops[k];
            g.stop_string_count = count;
            g.on_token = hear;
            g.user = &h;
            tfm_session_reset(u.s);
            assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, out));
            for (b = 0; b < 2; b++) {
                /* the first id whose text completes a stop string; of that text's, the one that begins first */
                char so_far[512] = "";
                const char *found = NULL;
                int64_t n = 0, length, i;
                for (; n < all[b].count && !found; n++) {
                    strcat(so_far, piece(NULL, -1, all[b].ids[n], &length));
                    for (i = 0; i < count; i++) {
                        const char *at = strstr(so_far, stops[k][i]);
                        if (at && (!found || at < found)) found = at;
                    }
                }
                if (found) so_far[found - so_far] = 0;
                cr_expect_eq(out[b].count, n, "%lld ids, expected %lld", (long long)out[b].count, (long long)n);
                cr_expect_eq(out[b].reason, found ? TFM_STOP_STRING : TFM_STOP_LENGTH);
                cr_expect_str_eq(out[b].text, so_far);
                cr_expect_eq(out[b].text_length, (int64_t)strlen(so_far));
                cr_expect_str_eq(h.text[b], so_far);
                cr_expect_eq(h.count[b], n);
            }
        }
        g.stop_strings = NULL;
        g.stop_string_count = 0;
        g.on_token = NULL;
    }
    end(&u);
}

typedef struct asked {
    int64_t first_previous, rows_seen;
} asked;

static const char *piece_asked(const void *user, int64_t previous, int64_t id, int64_t *length) {
    asked *a = *(asked *const *)user;
    if (a->first_previous < 0) a->first_previous = previous;
    return piece(NULL, previous, (previous + id) % VOCAB, length);
}

static void rows_asked(void *user, int64_t row, float *logits, int64_t vocab) {
    (void)logits;
    (void)vocab;
    ((asked *)user)->rows_seen |= (int64_t)1 << row;
}

/* The first piece follows the prompt's last id; a stop id has no text; the logits' callback knows the row. */
Test(generate, callbacks_are_told_what_they_are_asked_for) {
    setup u = begin_batch(2);
    asked a = {-1, 0}, *user = &a;
    tfm_generate_options g;
    tfm_sequence all[2], out[2];
    char said[64] = "";
    int64_t length, last, i;
    memset(&g, 0, sizeof g);
    g.max_new = 3;
    g.piece = piece_asked;
    g.piece_user = &user;
    g.sampling.logits = rows_asked;
    g.sampling.user = &a;
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, all));
    last = prompts[0].ids[prompts[0].count - 1];
    cr_expect_eq(a.first_previous, last);
    cr_expect_eq(a.rows_seen, 3);
    for (i = 0; i < 3; last = all[0].ids[i++]) strcat(said, piece_asked(&user, last, all[0].ids[i], &length));
    cr_expect_str_eq(all[0].text, said);
    tfm_session_reset(u.s);
    g.stop_ids = all[0].ids;
    g.stop_id_count = 1;
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, out));
    piece_asked(&user, a.first_previous, all[0].ids[0], &length);
    cr_expect(length > 0 && out[0].reason == TFM_STOP_ID && out[0].count == 1);
    cr_expect_eq(out[0].text_length, 0);
    cr_expect_str_eq(out[0].text, "");
    end(&u);
}

Test(generate, a_callback_ends_its_row_only) {
    setup u = begin_batch(2);
    tfm_generate_options g;
    tfm_sequence out[2];
    heard h;
    memset(&h, 0, sizeof h);
    memset(&g, 0, sizeof g);
    h.end_at[1] = 3;
    g.max_new = 8;
    g.on_token = hear;
    g.user = &h;
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, out));
    cr_expect_eq(out[0].count, 8);
    cr_expect_eq(out[1].count, 3);
    cr_expect_eq(out[1].reason, TFM_STOP_CALLBACK);
    cr_expect_null(out[0].text);
    end(&u);
}

Test(generate, a_step_takes_no_memory_after_the_first) {
    test_memory m = test_memory_new();
    tfm_options o;
    setup u;
    tfm_generate_options g;
    tfm_sequence out[1];
    heard h;
    int64_t i, calls = 0;
    memset(&h, 0, sizeof h);
    memset(&g, 0, sizeof g);
    memset(&o, 0, sizeof o);
    o.allocator = test_allocator(&m);
    u = begin_with(1, &o);
    h.c = u.c;
    g.max_new = 30;
    g.piece = piece;
    g.on_token = hear;
    g.user = &h;
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, out));
    cr_assert_eq(h.steps, 30);
    for (i = 2; i < 30; i++) cr_expect_eq(h.allocations[i], h.allocations[1], "step %lld", (long long)i);
    /* and by hand */
    tfm_session_reset(u.s);
    for (i = 0; i < 10; i++) {
        const tfm_marker mark = tfm_mark(u.c);
        assert_made(u.c, tfm_session_feed(u.c, u.s, ids_of(u.c, text + i, 1, 1), NULL));
        tfm_rewind(u.c, mark);
        if (i == 0) calls = m.calls;
    }
    cr_expect_eq(m.calls, calls);
    end(&u);
    assert_no_leak(&m);
}

static const char *long_piece(const void *user, int64_t previous, int64_t id, int64_t *length) {
    static char letters[1500]; /* more than there is room for at first */
    (void)user;
    (void)previous;
    memset(letters, 'a' + (int)id, sizeof letters);
    *length = (int64_t)sizeof letters;
    return letters;
}

Test(generate, text_takes_no_memory_of_its_own) {
    test_memory m = test_memory_new();
    tfm_options o;
    setup u;
    tfm_generate_options g;
    tfm_sequence out[2];
    int64_t i, calls = 0;
    memset(&g, 0, sizeof g);
    memset(&o, 0, sizeof o);
    o.allocator = test_allocator(&m);
    u = begin_with(2, &o);
    g.max_new = 10;
    g.piece = long_piece;
    for (i = 0; i < 3; i++) {
        const tfm_marker mark = tfm_mark(u.c);
        tfm_session_reset(u.s);
        assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, out));
        cr_expect_eq(out[1].text_length, 10 * 1500);
        tfm_rewind(u.c, mark);
        if (!i) calls = m.calls;
    }
    cr_expect_eq(m.calls, calls);
    end(&u);
    assert_no_leak(&m);
}

/* No piece ends in NUL; together they fill what there is room for to the byte. */
static const char *piece_without_end(const void *user, int64_t previous, int64_t id, int64_t *length) {
    static const int64_t lengths[VOCAB] = {256, 0, 1, 255, 257, 512, 2, 511, 513, 1024, 3};
    static char letters[1024];
    (void)user;
    (void)previous;
    memset(letters, 'a' + (int)id, sizeof letters);
    *length = lengths[id];
    return letters;
}

static int hear_a_string(void *user, int64_t row, int64_t id, float log_probability, const char *t, int64_t length) {
    (void)row;
    (void)id;
    (void)log_probability;
    cr_expect_eq((int64_t)strlen(t), length, "%lld bytes read as %lld", (long long)length, (long long)strlen(t));
    *(int64_t *)user += length;
    return 0;
}

Test(generate, a_callback_hears_strings_that_end) {
    static const char *const stops[1] = {"hhhh"};
    setup u = begin_batch(1);
    tfm_generate_options g;
    tfm_sequence out;
    int64_t heard;
    memset(&g, 0, sizeof g);
    g.sampling.temperature = 5;
    g.on_token = hear_a_string;
    g.user = &heard;
    for (g.sampling.seed = 0; g.sampling.seed < 20; g.sampling.seed++) {
        g.piece = g.sampling.seed % 3 ? piece_without_end : NULL;
        g.stop_strings = stops;
        g.stop_string_count = g.sampling.seed % 3 == 1;
        heard = 0;
        tfm_session_reset(u.s);
        assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out));
        cr_expect_eq(heard, out.text_length);
    }
    end(&u);
}

Test(generate, measuring_says_what_it_takes) {
    setup u = begin_batch(1);
    tfm_session *s;
    tfm_sequence out;
    tfm_memory need;
    tfm_generate_options g;
    memset(&g, 0, sizeof g);
    g.piece = piece;
    tfm_measure_begin(u.c);
    s = session_of(&u, 1, CAPACITY);
    assert_ok(u.c, tfm_generate(u.c, s, prompts, 1, &g, &out));
    tfm_session_destroy(s);
    assert_ok(u.c, tfm_measure_end(u.c, &need));
    cr_expect_gt(need.arena_peak, 0);
    cr_expect_eq(tfm_session_length(u.s, 0), 0);
    end(&u);
}

/* To the byte, with steps that are not run. */
Test(generate, measuring_foretells_the_arena_of_all_steps) {
    int beams;
    for (beams = 0; beams < 2; beams++) {
        enum { LONG = 300 };
        setup u = begin_batch(1);
        tfm_session *s = NULL;
        tfm_sequence out[2];
        tfm_memory need, used;
        tfm_generate_options g;
        tfm_beam_options o;
        tfm_status status;
        int dry;
        memset(&g, 0, sizeof g);
        memset(&o, 0, sizeof o);
        o.beams = 2;
        for (dry = 1; dry >= 0; dry--) {
            if (dry) tfm_measure_begin(u.c);
            else tfm_memory_reset(u.c);
            s = session_of(&u, 2, LONG);
            status = beams ? tfm_beam_search(u.c, s, prompts, 1, &o, out) : tfm_generate(u.c, s, prompts, 2, &g, out);
            assert_ok(u.c, status);
            tfm_session_destroy(s);
            if (dry) assert_ok(u.c, tfm_measure_end(u.c, &need));
        }
        used = tfm_memory_usage(u.c);
        cr_expect_eq(out[0].count, LONG - prompts[0].count + 1);
        cr_expect_eq(need.arena_peak, used.arena_peak, "%lld were foretold, %lld used", (long long)need.arena_peak,
                     (long long)used.arena_peak);
        end(&u);
    }
}

Test(generate, a_loop_of_ones_own_can_be_measured) {
    setup u = begin_batch(1);
    tfm_session *s;
    tfm_memory need;
    tfm_sampling p;
    int64_t id = text[0], step;
    memset(&p, 0, sizeof p);
    p.temperature = 0.7f;
    tfm_measure_begin(u.c);
    s = session_of(&u, 1, CAPACITY);
    for (step = 0; step < 3; step++) {
        tfm_tensor *y = tfm_session_feed(u.c, s, ids_of(u.c, &id, 1, 1), NULL);
        assert_ok(u.c, tfm_sample(u.c, y, &p, &id, 1, 0, (uint64_t)step, &id, NULL));
        cr_expect(id >= 0 && id < VOCAB);
    }
    tfm_session_destroy(s);
    assert_ok(u.c, tfm_measure_end(u.c, &need));
    cr_expect_gt(need.arena_peak, 0);
    end(&u);
}

/* Results recorded before have nothing to do with a step's scratch. */
Test(generate, a_tape_keeps_no_scratch_of_steps) {
    setup u = begin_batch(1);
    int64_t used[2];
    int recorded;
    for (recorded = 0; recorded < 2; recorded++) {
        tfm_sequence out;
        tfm_memory before;
        tfm_tensor *x = tfm_ones(u.c, TFM_SHAPE(3));
        if (recorded) {
            assert_ok(u.c, tfm_set_requires_grad(u.c, x, 1));
            assert_made(u.c, tfm_add(u.c, x, x));
        }
        tfm_session_reset(u.s);
        before = tfm_memory_usage(u.c);
        assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 1, NULL, &out));
        used[recorded] = tfm_memory_usage(u.c).arena_used - before.arena_used;
    }
    cr_expect_eq(used[0], used[1], "%lld bytes, with a tape %lld", (long long)used[0], (long long)used[1]);
    tfm_tape_clear(u.c);
    end(&u);
}

/* What rows hold and take is not known then: it may be less than all of them could. */
Test(generate, measuring_a_ragged_batch_asks_for_no_more_room_than_there_is) {
    static const int64_t counts[] = {30, 0}, ids[60] = {0};
    setup u = begin_batch(2);
    const tfm_prompt ragged[] = {{2, text}, {20, ids}}, same[] = {{20, ids}, {20, ids}};
    tfm_session *s;
    int i;
    tfm_generate_options g;
    tfm_sequence out[2];
    tfm_memory need;
    memset(&g, 0, sizeof g);
    g.max_new = 3;
    assert_made(u.c, tfm_session_feed(u.c, u.s, tfm_from(u.c, TFM_I64, TFM_SHAPE(2, 30), ids),
                                      tfm_from(u.c, TFM_I64, TFM_SHAPE(2), counts)));
    tfm_measure_begin(u.c);
    assert_ok(u.c, tfm_generate(u.c, u.s, ragged, 2, &g, out));
    assert_ok(u.c, tfm_measure_end(u.c, &need));
    tfm_measure_begin(u.c); /* what the session holds counts: row 0 has no room for 20 */
    cr_assert_eq(tfm_generate(u.c, u.s, same, 2, &g, out), TFM_INVALID);
    (void)!tfm_measure_end(u.c, &need);
    tfm_clear(u.c);
    tfm_measure_begin(u.c); /* of a session of the measurement the counts of a feed are not known either */
    s = session_of(&u, 2, CAPACITY);
    for (i = 0; i < 2; i++)
        assert_made(u.c, tfm_session_feed(u.c, s, tfm_from(u.c, TFM_I64, TFM_SHAPE(2, 30), ids),
                                          tfm_from(u.c, TFM_I64, TFM_SHAPE(2), counts)));
    tfm_session_destroy(s);
    assert_ok(u.c, tfm_measure_end(u.c, &need));
    assert_ok(u.c, tfm_generate(u.c, u.s, ragged, 2, &g, out));
    end(&u);
}

/* Calls for an id each draw what one call for all of them draws. */
Test(generate, draws_hang_on_the_position_not_on_the_call) {
    setup u = begin_batch(1);
    tfm_generate_options g;
    tfm_sequence out;
    int64_t ids[10], last = text[0];
    int i;
    memset(&g, 0, sizeof g);
    g.sampling.temperature = 5;
    g.sampling.seed = 5;
    g.max_new = 10;
    for (i = 0; i < 11; i++) {
        const tfm_prompt prompt = {1, &last};
        assert_ok(u.c, tfm_generate(u.c, u.s, &prompt, 1, &g, &out));
        if (i == 0) {
            memcpy(ids, out.ids, sizeof ids);
            tfm_session_reset(u.s);
            g.max_new = 1;
            continue;
        }
        last = out.ids[0];
        cr_expect_eq(last, ids[i - 1]);
    }
    end(&u);
}

static void infinite(void *user, int64_t row, float *logits, int64_t vocab) {
    (void)user;
    (void)row;
    (void)vocab;
    logits[3] = INFINITY;
}

Test(generate, an_infinite_score_wins_at_any_temperature) {
    static const int64_t id = 3;
    static const float nan_bias = NAN;
    setup u = begin_batch(1);
    tfm_generate_options g;
    tfm_sequence out;
    int way;
    memset(&g, 0, sizeof g);
    g.max_new = 1;
    g.sampling.logits = infinite;
    for (way = 0; way < 3; way++) {
        g.sampling.temperature = way ? 1 : 0;
        g.sampling.top_k = way == 2 ? 2 : 0;
        tfm_session_reset(u.s);
        assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out));
        cr_expect_eq(out.ids[0], 3);
    }
    g.sampling.bias_ids = &id;
    g.sampling.bias = &nan_bias;
    g.sampling.bias_count = 1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID);
    end(&u);
}

Test(generate, learned_positions_bound_the_session) {
    setup u = begin_batch(1);
    tfm_params *p = tfm_params_create(u.c);
    tfm_transformer_config config;
    tfm_transformer model;
    static const int64_t four_and_two[2] = {4, 2};
    tfm_session_options o;
    tfm_session *s;
    tfm_sequence out;
    int dry, part;
    memset(&config, 0, sizeof config);
    memset(&o, 0, sizeof o);
    config.kind = TFM_DECODER_ONLY;
    config.position = TFM_POSITION_LEARNED;
    config.position_start = 2;
    config.max_length = 8;
    config.decoder_layers = 1;
    config.target_vocab = VOCAB;
    config.block.d_model = 16;
    config.block.heads = 2;
    config.block.d_ff = 16;
    assert_ok(u.c, tfm_transformer_init(u.c, p, "", &config, &model));
    s = tfm_session_create(u.c, &model, &o);
    cr_assert_not_null(s, "%s", tfm_error(u.c));
    assert_ok(u.c, tfm_generate(u.c, s, prompts, 1, NULL, &out));
    cr_expect_eq(out.reason, TFM_STOP_CAPACITY);
    cr_expect_eq(tfm_session_length(s, 0), 6);
    tfm_session_reset(s);
    for (dry = 1; dry >= 0; dry--) { /* padding may stand past the table; a measurement does not know what is padding */
        tfm_session *fed = s;
        tfm_memory need;
        if (dry) tfm_measure_begin(u.c);
        if (dry) fed = tfm_session_create(u.c, &model, &o);
        for (part = 0; part < 2; part++)
            assert_made(u.c, tfm_session_feed(u.c, fed, ids_of(u.c, text, 1, 5), counts_of(u.c, four_and_two + part, 1)));
        if (dry) tfm_session_destroy(fed);
        if (dry) assert_ok(u.c, tfm_measure_end(u.c, &need));
    }
    tfm_session_destroy(s);
    o.source_capacity = 100; /* a decoder-only model has no source */
    s = tfm_session_create(u.c, &model, &o);
    assert_made(u.c, s);
    tfm_session_destroy(s);
    o.source_capacity = 0;
    o.capacity = 7;
    assert_refused(u.c, tfm_session_create(u.c, &model, &o), TFM_INVALID);
    config.kind = TFM_ENCODER_DECODER;
    config.encoder_layers = 1;
    config.source_vocab = VOCAB;
    assert_ok(u.c, tfm_transformer_init(u.c, p, "both", &config, &model));
    o.capacity = o.source_capacity = 6;
    s = tfm_session_create(u.c, &model, &o);
    assert_made(u.c, s);
    tfm_session_destroy(s);
    o.source_capacity = 7;
    assert_refused(u.c, tfm_session_create(u.c, &model, &o), TFM_INVALID);
    config.position = TFM_POSITION_SINUSOIDAL;
    assert_ok(u.c, tfm_transformer_init(u.c, p, "both", &config, &model));
    memset(&o, 0, sizeof o);
    s = tfm_session_create(u.c, &model, &o); /* of max_length */
    assert_made(u.c, s);
    assert_ok(u.c, tfm_session_encode(u.c, s, ids_of(u.c, text, 1, 8), NULL));
    assert_made(u.c, tfm_session_feed(u.c, s, ids_of(u.c, text, 1, 8), NULL));
    tfm_session_destroy(s);
    o.capacity = 6; /* that of the source is the same */
    s = tfm_session_create(u.c, &model, &o);
    assert_made(u.c, s);
    assert_verb_refused(u.c, tfm_session_encode(u.c, s, ids_of(u.c, text, 1, 7), NULL), TFM_INVALID);
    tfm_session_destroy(s);
    config.kind = TFM_DECODER_ONLY;
    config.position = TFM_POSITION_LEARNED;
    config.position_start = 8;
    assert_verb_refused(u.c, tfm_transformer_init(u.c, p, "other", &config, &model), TFM_INVALID);
    tfm_params_destroy(p);
    end(&u);
}

/* Ends row 0, cancels all at row 1. */
static int cancel_at_row_one(void *user, int64_t row, int64_t id, float log_probability, const char *t,
                             int64_t length) {
    (void)id;
    (void)log_probability;
    (void)t;
    (void)length;
    if (row == 1) tfm_cancel((tfm_ctx *)user);
    return row == 0;
}

/* Row 0 was ended by the callback, row 1 by no reason there is. */
Test(generate, a_row_that_an_error_cut_short_has_no_reason) {
    static const int64_t too_many[CAPACITY + 1] = {0};
    setup u = begin_batch(2);
    tfm_prompt prompts[2];
    tfm_sequence out[2];
    tfm_generate_options o;
    int row;
    memset(&o, 0, sizeof o);
    o.max_new = 5;
    o.piece = piece;
    o.on_token = cancel_at_row_one;
    o.user = u.c;
    prompts[0].ids = prompts[1].ids = text;
    prompts[0].count = prompts[1].count = 3;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 2, &o, out), TFM_CANCELLED);
    cr_expect_eq(out[0].reason, TFM_STOP_CALLBACK);
    cr_expect_eq(out[1].reason, -1);
    cr_expect_eq(out[1].count, 1);
    cr_expect(!out[0].text && !out[1].text);
    for (row = 0; row < 2; row++) {
        prompts[row].ids = too_many;
        prompts[row].count = CAPACITY + 1;
        assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 2, NULL, out), TFM_INVALID);
        cr_expect(out[0].reason == -1 && out[1].reason == -1);
        prompts[row].ids = text;
        prompts[row].count = 3;
    }
    end(&u);
}

Test(generate, needs_a_head) {
    setup u = begin_batch(1);
    tfm_params *p = tfm_params_create(u.c);
    tfm_transformer_config config = u.model.config;
    tfm_beam_options beam;
    tfm_transformer model;
    tfm_session *s;
    tfm_sequence out;
    config.no_head = 1;
    assert_ok(u.c, tfm_transformer_init(u.c, p, "", &config, &model));
    s = tfm_session_create(u.c, &model, NULL);
    cr_assert_not_null(s, "%s", tfm_error(u.c));
    assert_verb_refused(u.c, tfm_generate(u.c, s, prompts, 1, NULL, &out), TFM_INVALID);
    memset(&beam, 0, sizeof beam);
    beam.beams = 1;
    cr_assert_eq(tfm_beam_search(u.c, s, prompts, 1, &beam, &out), TFM_INVALID);
    cr_expect_not_null(strstr(tfm_error(u.c), "the model has no head"), "%s", tfm_error(u.c));
    tfm_clear(u.c);
    tfm_session_destroy(s);
    config.no_head = 0;
    config.outputs = VOCAB + 1; /* the last one could not be fed */
    assert_ok(u.c, tfm_transformer_init(u.c, p, "other", &config, &model));
    s = tfm_session_create(u.c, &model, NULL);
    cr_assert_not_null(s, "%s", tfm_error(u.c));
    assert_verb_refused(u.c, tfm_generate(u.c, s, prompts, 1, NULL, &out), TFM_INVALID);
    tfm_session_destroy(s);
    tfm_params_destroy(p);
    end(&u);
}

/* A cancel comes before or after: two caches of one session never differ in it. */
Test(session, verbs_of_a_session_are_done_whole) {
    static const int64_t source[] = {1, 2, 3, 4, 5, 6}, ids[] = {1, 2, 3, 4}, swapped[] = {1, 0}, next[] = {7, 7};
    tfm_ctx *c = tfm_create(NULL);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer model;
    tfm_session_options o;
    tfm_session *s, *other;
    tfm_tensor *a, *b;
    memset(&o, 0, sizeof o);
    o.batch = 2;
    small_translator(c, p, &model);
    s = tfm_session_create(c, &model, &o);
    assert_ok(c, tfm_session_encode(c, s, tfm_from(c, TFM_I64, TFM_SHAPE(2, 3), source), NULL));
    assert_made(c, tfm_session_feed(c, s, tfm_from(c, TFM_I64, TFM_SHAPE(2, 2), ids), NULL));
    other = tfm_session_fork(c, s, swapped, 2);
    cr_assert_not_null(other);
    tfm_cancel(c);
    (void)!tfm_session_reorder(c, s, swapped, 2);
    tfm_clear(c);
    a = tfm_session_feed(c, s, tfm_from(c, TFM_I64, TFM_SHAPE(2, 1), next), NULL);
    b = tfm_session_feed(c, other, tfm_from(c, TFM_I64, TFM_SHAPE(2, 1), next), NULL);
    assert_made(c, a);
    assert_made(c, b);
    assert_same_bytes(a->data, b->data, 2 * VOCAB * 4);
    tfm_session_destroy(s);
    tfm_session_destroy(other);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

static int never_past_the_total(void *user, const char *what, int64_t done, int64_t total) {
    (void)user;
    (void)what;
    cr_expect_leq(done, total);
    return 0;
}

Test(generate, progress_ends_at_its_total) {
    tfm_options o;
    setup u;
    tfm_sequence out[2];
    memset(&o, 0, sizeof o);
    o.progress = never_past_the_total;
    u = begin_with(2, &o);
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, NULL, out)); /* the second prompt is shorter */
    end(&u);
}

static int stop_at_once(void *user, const char *what, int64_t done, int64_t total) {
    (void)user;
    (void)what;
    (void)done;
    (void)total;
    return 1;
}

Test(generate, progress_is_of_real_steps) {
    tfm_options o;
    setup u;
    tfm_sequence out[2];
    tfm_memory m;
    memset(&o, 0, sizeof o);
    o.progress = stop_at_once;
    u = begin_with(2, &o);
    tfm_measure_begin(u.c);
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, NULL, out));
    assert_ok(u.c, tfm_measure_end(u.c, &m));
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 2, NULL, out), TFM_CANCELLED);
    end(&u);
}

static int stop_after(void *user, const char *what, int64_t done, int64_t total) {
    (void)what;
    (void)total;
    return done >= *(int64_t *)user;
}

Test(generate, progress_can_cancel) {
    int64_t steps = 3;
    tfm_options o;
    setup u;
    tfm_sequence out;
    memset(&o, 0, sizeof o);
    o.progress = stop_after;
    o.hook_user = &steps;
    u = begin_with(1, &o);
    cr_expect_eq(tfm_generate(u.c, u.s, prompts, 1, NULL, &out), TFM_CANCELLED);
    cr_expect_eq(out.count, 3);
    tfm_clear(u.c);
    end(&u);
}

/* A deadline: the ids of before and after it are those of a run without one. */
Test(generate, goes_on_after_a_cancel_with_the_last_ids) {
    int64_t steps = CAPACITY, cut, b;
    tfm_options o;
    tfm_generate_options g;
    setup u;
    tfm_sequence whole[2], before[2], after[2];
    memset(&o, 0, sizeof o);
    memset(&g, 0, sizeof g);
    o.progress = stop_after;
    o.hook_user = &steps;
    u = begin_with(2, &o);
    g.max_new = 8;
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, whole));
    for (cut = 1; cut < 8; cut++) {
        tfm_prompt next[2];
        steps = cut;
        g.max_new = 8;
        tfm_session_reset(u.s);
        assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 2, &g, before), TFM_CANCELLED);
        for (b = 0; b < 2; b++) {
            cr_assert_eq(before[b].count, cut);
            cr_expect_eq(tfm_session_length(u.s, b), prompts[b].count + cut - 1, "the last id is not fed");
            next[b].count = 1;
            next[b].ids = before[b].ids + cut - 1;
        }
        steps = CAPACITY;
        g.max_new = 8 - cut;
        assert_ok(u.c, tfm_generate(u.c, u.s, next, 2, &g, after));
        for (b = 0; b < 2; b++) {
            assert_same_bytes(before[b].ids, whole[b].ids, cut * 8);
            assert_same_bytes(after[b].ids, whole[b].ids + cut, (8 - cut) * 8);
        }
    }
    end(&u);
}

Test(generate, wrong_arguments_are_errors) {
    static const tfm_prompt empty = {0, text}, lost = {2, NULL}, outside = {1, text + 20};
    static const char *const nothing[1] = {""}, *const null[1] = {NULL};
    static const int64_t far = VOCAB;
    setup u = begin_batch(1);
    tfm_session *tiny = session_of(&u, 1, 2);
    tfm_generate_options g;
    tfm_sequence out;
    (void)outside;
    memset(&g, 0, sizeof g);
    assert_verb_refused(u.c, tfm_generate(u.c, NULL, prompts, 1, NULL, &out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, NULL, 1, NULL, &out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, NULL, NULL), TFM_INVALID);
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 2, NULL, &out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 0, NULL, &out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, &empty, 1, NULL, &out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, &lost, 1, NULL, &out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_generate(u.c, tiny, prompts, 1, NULL, &out), TFM_INVALID); /* 3 ids, 2 positions */
    {
        const tfm_prompt wrong = {1, &far};
        assert_verb_refused(u.c, tfm_generate(u.c, u.s, &wrong, 1, NULL, &out), TFM_INVALID);
    }
    g.max_new = -1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID);
    memset(&g, 0, sizeof g);
    g.prompt_chunk = -1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID);
    memset(&g, 0, sizeof g);
    g.piece = piece;
    g.stop_string_count = 1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID); /* none are given */
    g.stop_strings = null;
    g.stop_string_count = -1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID);
    g.stop_string_count = 1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID);
    memset(&g, 0, sizeof g);
    g.stop_strings = nothing;
    g.stop_string_count = 1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID); /* no piece */
    g.piece = piece;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID); /* empty */
    memset(&g, 0, sizeof g);
    g.stop_id_count = 1;
    assert_verb_refused(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out), TFM_INVALID);
    cr_expect_eq(tfm_session_length(u.s, 0), 0, "a refused call fed something");
    tfm_session_destroy(tiny);
    end(&u);
}

static void generate_all(tfm_ctx *c, void *user) {
    static const char *const stops[1] = {"never"};
    tfm_params *p = tfm_params_create(c);
    tfm_transformer model;
    tfm_transformer_config g;
    tfm_session *s, *f;
    tfm_session_options so;
    tfm_generate_options o;
    tfm_beam_options bo;
    tfm_sequence out[2];
    tfm_status status;
    static const int64_t rows[2] = {0, 0};
    (void)user;
    memset(&g, 0, sizeof g);
    memset(&so, 0, sizeof so);
    memset(&o, 0, sizeof o);
    memset(&bo, 0, sizeof bo);
    g.kind = TFM_DECODER_ONLY;
    g.decoder_layers = 1;
    g.target_vocab = VOCAB;
    g.block.d_model = 8;
    g.block.heads = 2;
    g.block.d_ff = 8;
    so.capacity = 8;
    status = tfm_transformer_init(c, p, "", &g, &model);
    s = tfm_session_create(c, &model, &so);
    o.max_new = 2;
    o.piece = piece;
    o.stop_strings = stops;
    o.stop_string_count = 1;
    if (s) status = tfm_generate(c, s, prompts, 1, &o, out);
    f = tfm_session_fork(c, s, rows, 2);
    bo.beams = 2;
    bo.max_new = 2;
    if (f) tfm_session_reset(f), status = tfm_beam_search(c, f, prompts, 1, &bo, out);
    (void)status;
    tfm_session_destroy(f);
    tfm_session_destroy(s);
    tfm_params_destroy(p);
}

Test(generate, every_allocation_may_fail) { cr_expect_gt(test_each_allocation_failing(generate_all, NULL, NULL), 10); }

/* ---- beam search ------------------------------------------------------------------------------------------------ */

/* log-probabilities (VOCAB) after ids, by a forward pass without any session */
static void score_next(setup *u, const int64_t *ids, int64_t n, double *out) {
    const tfm_marker mark = tfm_mark(u->c);
    tfm_tensor *y = tfm_transformer_forward(u->c, &u->model, NULL, ids_of(u->c, ids, 1, n), NULL);
    const float *x;
    double most = -1e30, sum = 0;
    int64_t i;
    assert_made(u->c, y);
    x = (const float *)y->data + (n - 1) * VOCAB;
    for (i = 0; i < VOCAB; i++)
        if ((double)x[i] > most) most = (double)x[i];
    for (i = 0; i < VOCAB; i++) sum += exp((double)x[i] - most);
    for (i = 0; i < VOCAB; i++) out[i] = (double)x[i] - most - log(sum);
    tfm_rewind(u->c, mark);
}

static double penalty(const tfm_beam_options *o, int64_t n) {
    if (o->length_penalty == TFM_LENGTH_GNMT) return pow((5.0 + (double)n) / 6.0, (double)o->alpha);
    return o->length_penalty == TFM_LENGTH_POWER ? pow((double)n, (double)o->alpha) : 1;
}

typedef struct hypothesis {
    int64_t count, ids[8];
    double sum, score;
} hypothesis;

static int64_t beam_stop(int64_t id, const tfm_beam_options *o) {
    int64_t i;
    for (i = 0; i < o->stop_id_count; i++)
        if (o->stop_ids[i] == id) return 1;
    return 0;
}

static int banned(int64_t id, const tfm_beam_options *o) {
    int64_t i;
    for (i = 0; i < o->banned_count; i++)
        if (o->banned[i] == id) return 1;
    return 0;
}

static int better(const void *a, const void *b) {
    const double x = ((const hypothesis *)a)->score, y = ((const hypothesis *)b)->score;
    return x > y ? -1 : x < y;
}

/* Every sequence there is, best first: what a beam search that forgets nothing must find. */
static void exhaust(setup *u, const tfm_prompt *prompt, const tfm_beam_options *o, const hypothesis *from,
                    hypothesis *list, int64_t *count) {
    int64_t ids[16], i;
    double next[VOCAB];
    memcpy(ids, prompt->ids, (size_t)prompt->count * sizeof *ids);
    memcpy(ids + prompt->count, from->ids, (size_t)from->count * sizeof *ids);
    score_next(u, ids, prompt->count + from->count, next);
    for (i = 0; i < VOCAB; i++) {
        hypothesis h = *from;
        if (banned(i, o)) continue;
        h.ids[h.count++] = i;
        h.sum += next[i];
        h.score = h.sum / penalty(o, h.count);
        if (beam_stop(i, o) || h.count == o->max_new) list[(*count)++] = h;
        else exhaust(u, prompt, o, &h, list, count);
    }
}

static void expect_hypothesis(const tfm_sequence *out, const hypothesis *h, const char *what, int64_t rank) {
    int64_t i;
    cr_assert_eq(out->count, h->count, "%s, rank %lld: %lld ids, expected %lld", what, (long long)rank,
                 (long long)out->count, (long long)h->count);
    for (i = 0; i < h->count; i++)
        cr_assert_eq(out->ids[i], h->ids[i], "%s, rank %lld, id %lld", what, (long long)rank, (long long)i);
    cr_expect_float_eq(out->score, h->score, 1e-5, "%s, rank %lld: score %g, expected %g", what, (long long)rank,
                       out->score, h->score);
}

Test(beam, with_room_for_everything_it_finds_the_best_there_are) {
    enum { LENGTH = 3, BEAMS = 121, BEST = 20 };
    static const int64_t stops[2] = {0, 6}, bans[2] = {3, 9};
    static const struct {
        int kind;
        float alpha;
    } kinds[] = {{TFM_LENGTH_NONE, 0},
                 {TFM_LENGTH_GNMT, 0.6f},
                 {TFM_LENGTH_GNMT, 3},
                 {TFM_LENGTH_POWER, 1},
                 {TFM_LENGTH_POWER, -1}};
    hypothesis *list = (hypothesis *)malloc(2000 * sizeof *list);
    setup u = begin_batch(1);
    tfm_session *s = session_of(&u, 2 * BEAMS, 16);
    tfm_sequence out[2 * BEST];
    size_t k;
    for (k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
        tfm_beam_options o;
        int64_t prompt, i;
        memset(&o, 0, sizeof o);
        o.beams = BEAMS;
        o.n_best = BEST;
        o.max_new = LENGTH;
        o.length_penalty = kinds[k].kind;
        o.alpha = kinds[k].alpha;
        o.stop_ids = stops;
        o.stop_id_count = 2;
        o.banned = bans;
        o.banned_count = 2;
        tfm_session_reset(s);
        assert_ok(u.c, tfm_beam_search(u.c, s, prompts + 1, 2, &o, out));
        for (prompt = 0; prompt < 2; prompt++) {
            hypothesis nothing;
            int64_t count = 0;
            memset(&nothing, 0, sizeof nothing);
            exhaust(&u, &prompts[1 + prompt], &o, &nothing, list, &count);
            qsort(list, (size_t)count, sizeof *list, better);
            for (i = 0; i < BEST; i++) expect_hypothesis(&out[prompt * BEST + i], &list[i], "exhaustive", i);
        }
        if (test_quick()) break;
    }
    tfm_session_destroy(s);
    end(&u);
    free(list);
}

/* The plain statement of beam search: all extensions of all beams, sorted; finished ones leave when they are among the
 * best `beams`; no early end. */
static int64_t search_plainly(setup *u, const tfm_prompt *prompt, const tfm_beam_options *o, hypothesis *done) {
    hypothesis live[16], *all = (hypothesis *)malloc(16 * VOCAB * sizeof *all);
    int64_t alive = 1, finished = 0, length;
    memset(live, 0, sizeof live);
    for (length = 0; length < o->max_new && alive; length++) {
        int64_t count = 0, b, i;
        for (b = 0; b < alive; b++) {
            int64_t ids[16];
            double next[VOCAB];
            memcpy(ids, prompt->ids, (size_t)prompt->count * sizeof *ids);
            memcpy(ids + prompt->count, live[b].ids, (size_t)live[b].count * sizeof *ids);
            score_next(u, ids, prompt->count + live[b].count, next);
            for (i = 0; i < VOCAB; i++) {
                if (banned(i, o)) continue;
                all[count] = live[b];
                all[count].ids[all[count].count++] = i;
                all[count].sum += next[i];
                all[count].score = all[count].sum;
                count++;
            }
        }
        qsort(all, (size_t)count, sizeof *all, better);
        for (alive = i = 0; i < count && alive < o->beams; i++) {
            if (!beam_stop(all[i].ids[length], o) && length + 1 < o->max_new) {
                live[alive++] = all[i];
            } else if (i < o->beams) {
                done[finished] = all[i];
                done[finished].score = all[i].sum / penalty(o, all[i].count);
                finished++;
            }
        }
    }
    qsort(done, (size_t)finished, sizeof *done, better);
    free(all);
    return finished;
}

/* Three prompts at once against one search each, done plainly. */
Test(beam, equals_the_plain_search_prompt_by_prompt) {
    enum { PROMPTS = 3 };
    static const struct {
        int kind;
        float alpha;
        int64_t stop_count;
    } ways[] = {{TFM_LENGTH_NONE, 0.9f, 1}, {TFM_LENGTH_GNMT, 0.9f, 1},  {TFM_LENGTH_POWER, 0.9f, 1},
                {TFM_LENGTH_GNMT, 3, 4},    {TFM_LENGTH_POWER, 1.5f, 4}, {TFM_LENGTH_POWER, -1, 4}};
    static const int64_t stops[4] = {5, 8, 1, 7}, ban = 2;
    setup u = begin_batch(1);
    int64_t beams;
    for (beams = 1; beams <= 5; beams += 2) {
        size_t way;
        for (way = 0; way < sizeof ways / sizeof ways[0]; way++) {
            tfm_session *s = session_of(&u, PROMPTS * beams, 24);
            tfm_sequence out[PROMPTS * 5], best[PROMPTS];
            tfm_beam_options o;
            int64_t prompt, i;
            memset(&o, 0, sizeof o);
            o.beams = beams;
            o.n_best = beams;
            o.max_new = 7;
            o.length_penalty = ways[way].kind;
            o.alpha = ways[way].alpha;
            o.stop_ids = stops;
            o.stop_id_count = ways[way].stop_count;
            o.banned = &ban;
            o.banned_count = 1;
            assert_ok(u.c, tfm_beam_search(u.c, s, prompts, PROMPTS, &o, out));
            o.n_best = 1; /* the first that finishes need not stay the best */
            tfm_session_reset(s);
            assert_ok(u.c, tfm_beam_search(u.c, s, prompts, PROMPTS, &o, best));
            for (prompt = 0; prompt < PROMPTS; prompt++) {
                hypothesis done[64];
                const int64_t count = search_plainly(&u, &prompts[prompt], &o, done);
                cr_assert_geq(count, beams);
                for (i = 0; i < beams; i++) expect_hypothesis(&out[prompt * beams + i], &done[i], "plain", i);
                expect_hypothesis(&best[prompt], &done[0], "one of the beams", 0);
            }
            tfm_session_destroy(s);
        }
    }
    end(&u);
}

Test(beam, one_beam_is_greedy_search_and_log_probabilities_add_up) {
    setup u = begin_batch(1);
    tfm_beam_options o;
    tfm_generate_options g;
    tfm_sequence beam, greedy;
    double sum = 0;
    int64_t i;
    memset(&o, 0, sizeof o);
    memset(&g, 0, sizeof g);
    o.beams = 1;
    o.max_new = g.max_new = 15;
    assert_ok(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, &beam));
    tfm_session_reset(u.s);
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &greedy));
    cr_assert_eq(beam.count, 15);
    cr_expect_eq(beam.reason, TFM_STOP_LENGTH);
    assert_same_bytes(beam.ids, greedy.ids, 15 * 8);
    assert_same_bytes(beam.log_probabilities, greedy.log_probabilities, 15 * 4);
    for (i = 0; i < 15; i++) sum += (double)beam.log_probabilities[i];
    cr_expect_float_eq(beam.score, sum, 1e-5);
    cr_expect_float_eq(greedy.score, sum, 1e-5);
    end(&u);
}

/* With equal scores the lower beam and id come first; a place for which there is no sequence stays empty. */
Test(beam, equals_keep_their_order_and_empty_places_say_so) {
    enum { BEAMS = 3 };
    static const int64_t bans[VOCAB - 2] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    setup u = begin_batch(1);
    tfm_session *s = session_of(&u, BEAMS, 6);
    tfm_tensor *w = tfm_params_write_begin(u.c, u.p, "generator.weight");
    tfm_beam_options o;
    tfm_sequence out[BEAMS];
    int64_t i;
    assert_made(u.c, w);
    memset(w->data, 0, (size_t)tfm_numel(w) * 4);
    assert_ok(u.c, tfm_params_write_end(u.c, u.p, "generator.weight"));
    memset(&o, 0, sizeof o);
    o.beams = o.n_best = BEAMS;
    o.max_new = 1;
    assert_ok(u.c, tfm_beam_search(u.c, s, prompts, 1, &o, out));
    for (i = 0; i < BEAMS; i++) cr_expect(out[i].count == 1 && out[i].ids[0] == i, "%lld", (long long)i);
    tfm_session_reset(s);
    o.max_new = 2;
    assert_ok(u.c, tfm_beam_search(u.c, s, prompts, 1, &o, out));
    for (i = 0; i < BEAMS; i++)
        cr_expect(out[i].count == 2 && out[i].ids[0] == 0 && out[i].ids[1] == i, "%lld", (long long)i);
    tfm_session_reset(s);
    o.max_new = 1;
    o.banned = bans;
    o.banned_count = VOCAB - 2;
    assert_ok(u.c, tfm_beam_search(u.c, s, prompts, 1, &o, out));
    cr_expect(out[0].ids[0] == VOCAB - 2 && out[1].ids[0] == VOCAB - 1);
    cr_expect_eq(out[2].count, 0);
    cr_expect_eq(out[2].score, -HUGE_VAL);
    tfm_session_destroy(s);
    end(&u);
}

Test(beam, ends_at_capacity) {
    setup u = begin_batch(1);
    tfm_session *s = session_of(&u, 3, 6);
    tfm_beam_options o;
    tfm_sequence out;
    memset(&o, 0, sizeof o);
    o.beams = 3;
    assert_ok(u.c, tfm_beam_search(u.c, s, prompts, 1, &o, &out));
    cr_expect_eq(out.count, 6 - 3 + 1);
    cr_expect_eq(out.reason, TFM_STOP_CAPACITY);
    assert_ok(u.c, tfm_session_truncate(u.c, s, -1, 3)); /* it goes on from what the session holds */
    assert_ok(u.c, tfm_beam_search(u.c, s, prompts, 1, &o, &out));
    cr_expect_eq(out.count, 1);
    cr_expect_eq(out.reason, TFM_STOP_CAPACITY);
    tfm_session_destroy(s);
    end(&u);
}

Test(beam, a_place_that_no_sequence_took_has_no_reason) {
    static const int64_t too_many[CAPACITY + 1] = {0};
    setup u = begin_batch(1);
    tfm_session *s = session_of(&u, 3, CAPACITY);
    tfm_beam_options o;
    tfm_prompt prompt;
    tfm_sequence out[3];
    int64_t all_but_0[VOCAB], i;
    for (i = 1; i < VOCAB; i++) all_but_0[i - 1] = i;
    memset(&o, 0, sizeof o);
    o.beams = o.n_best = 3;
    o.max_new = 2;
    o.banned = all_but_0;
    o.banned_count = VOCAB - 1;
    assert_ok(u.c, tfm_beam_search(u.c, s, prompts, 1, &o, out));
    cr_expect(out[0].reason == TFM_STOP_LENGTH && out[0].count == 2);
    for (i = 1; i < 3; i++) cr_expect(out[i].reason == -1 && out[i].count == 0 && out[i].score == -HUGE_VAL);
    prompt.ids = too_many;
    prompt.count = CAPACITY + 1;
    assert_verb_refused(u.c, tfm_beam_search(u.c, s, &prompt, 1, &o, out), TFM_INVALID);
    for (i = 0; i < 3; i++) cr_expect(out[i].reason == -1 && out[i].count == 0 && out[i].score == -HUGE_VAL);
    tfm_session_destroy(s);
    end(&u);
}

/* What is found cannot be beaten by what costs more already: nothing is fed for that. */
Test(beam, ends_when_nothing_can_get_better) {
    setup u = begin_batch(1);
    tfm_generate_options g;
    tfm_beam_options o;
    tfm_sequence out;
    int64_t best;
    memset(&g, 0, sizeof g);
    memset(&o, 0, sizeof o);
    g.max_new = 1;
    assert_ok(u.c, tfm_generate(u.c, u.s, prompts, 1, &g, &out));
    best = out.ids[0];
    tfm_session_reset(u.s);
    o.beams = 1;
    o.stop_ids = &best;
    o.stop_id_count = 1;
    assert_ok(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, &out));
    cr_expect(out.count == 1 && out.ids[0] == best && out.reason == TFM_STOP_ID);
    cr_expect_eq(tfm_session_length(u.s, 0), prompts[0].count);
    end(&u);
}

Test(beam, room_is_that_of_each_prompt) {
    setup u = begin_batch(1);
    tfm_session *s = session_of(&u, 4, 9), *alone = session_of(&u, 2, 9);
    tfm_beam_options o;
    tfm_sequence out[2], one;
    int64_t b;
    memset(&o, 0, sizeof o);
    o.beams = 2;
    assert_ok(u.c, tfm_beam_search(u.c, s, prompts + 1, 2, &o, out)); /* of 1 and 7 ids */
    for (b = 0; b < 2; b++) {
        tfm_session_reset(alone);
        assert_ok(u.c, tfm_beam_search(u.c, alone, prompts + 1 + b, 1, &o, &one));
        cr_expect_eq(one.count, 9 - prompts[1 + b].count + 1);
        expect_same_sequence(&out[b], &one);
    }
    tfm_session_destroy(alone);
    tfm_session_destroy(s);
    end(&u);
}

Test(beam, wrong_arguments_are_errors) {
    setup u = begin_batch(4);
    tfm_beam_options o;
    tfm_sequence out[8];
    static const int64_t far = VOCAB;
    int64_t all[VOCAB], i;
    for (i = 0; i < VOCAB; i++) all[i] = i;
    memset(&o, 0, sizeof o);
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 2, &o, out), TFM_INVALID); /* 2 x 4 rows */
    assert_verb_refused(u.c, tfm_beam_search(u.c, NULL, prompts, 1, &o, out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, NULL, 1, &o, out), TFM_INVALID);
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, NULL), TFM_INVALID);
    o.n_best = 5;
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, out), TFM_INVALID);
    o.n_best = 0;
    o.beams = -1;
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, out), TFM_INVALID);
    o.beams = 0;
    o.length_penalty = 9;
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, out), TFM_INVALID);
    o.length_penalty = 0;
    o.banned = all;
    o.banned_count = VOCAB;
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, out), TFM_INVALID); /* nothing is left */
    tfm_session_reset(u.s);
#define REFUSE_BEAM(field, value) \
    memset(&o, 0, sizeof o); \
    o.field = value; \
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, out), TFM_INVALID)
    REFUSE_BEAM(n_best, -1);
    REFUSE_BEAM(max_new, -1);
    REFUSE_BEAM(alpha, (float)NAN);
    REFUSE_BEAM(alpha, (float)HUGE_VAL);
    REFUSE_BEAM(banned_count, 1);
    REFUSE_BEAM(banned_count, -1);
    REFUSE_BEAM(stop_id_count, 1);
    REFUSE_BEAM(stop_id_count, -1);
    memset(&o, 0, sizeof o);
    o.banned = &far;
    o.banned_count = 1;
    assert_verb_refused(u.c, tfm_beam_search(u.c, u.s, prompts, 1, &o, out), TFM_INVALID);
    cr_expect_eq(tfm_session_length(u.s, 0), 0, "a refused call fed something");
    end(&u);
}

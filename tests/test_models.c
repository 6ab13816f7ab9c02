/* llama2.c checkpoints, its tokenizer, line vocabularies, and the two trained models that the test data has. */
#include "test.h"

static tfm_ctx *context(void) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    return tfm_create(&o);
}

/* ---- llama2.c checkpoints --------------------------------------------------------------------------------------- */

enum { DIM = 4, HIDDEN = 3, LAYERS = 2, HEADS = 2, KV = 1, VOCAB = 5, LENGTH = 6, KV_DIM = DIM / HEADS * KV };
enum {
    SHARED_FLOATS = VOCAB * DIM + LAYERS * (2 * DIM + 2 * DIM * DIM + 2 * KV_DIM * DIM + 3 * HIDDEN * DIM) + DIM
                    + LENGTH * DIM / HEADS
};

/* A checkpoint whose float number i is i. */
static unsigned char *checkpoint(int own_head, int64_t *size) {
    const int32_t head[7] = {DIM, HIDDEN, LAYERS, HEADS, KV, own_head ? -VOCAB : VOCAB, LENGTH};
    const int64_t floats = SHARED_FLOATS + (own_head ? VOCAB * DIM : 0);
    unsigned char *data = (unsigned char *)malloc((size_t)(28 + 4 * floats));
    int64_t i;
    cr_assert_not_null(data);
    memcpy(data, head, 28);
    for (i = 0; i < floats; i++) {
        const float x = (float)i;
        memcpy(data + 28 + 4 * i, &x, 4);
    }
    *size = 28 + 4 * floats;
    return data;
}

/* Element (0, 0) of a parameter and its shape say where in the file it came from. */
static void expect_at(const tfm_params *p, const char *name, int64_t rows, int64_t columns, int64_t row, double value) {
    const tfm_tensor *t = tfm_params_find(p, name);
    int64_t index[2] = {0, 0};
    cr_assert_not_null(t, "no %s", name);
    cr_expect_eq(t->shape[0], rows, "%s has %lld rows", name, (long long)t->shape[0]);
    cr_expect_eq(t->ndim, columns ? 2 : 1, "%s", name);
    if (columns) cr_expect_eq(t->shape[1], columns, "%s", name);
    index[0] = row;
    cr_expect_eq(tfm_get(t, index), value, "%s: row %lld begins with %g, expected %g", name, (long long)row,
                 tfm_get(t, index), value);
}

Test(llama2c, every_part_of_the_file_finds_its_parameter) {
    int own_head;
    for (own_head = 0; own_head < 2; own_head++) {
        tfm_ctx *c = context();
        tfm_params *p = tfm_params_create(c);
        tfm_transformer_config g;
        tfm_transformer model;
        int64_t size, at = VOCAB * DIM;
        unsigned char *data = checkpoint(own_head, &size);
        assert_ok(c, tfm_llama2c_load_memory(c, p, data, size, &g));
        free(data); /* nothing of it is kept */
        cr_expect_eq(g.kind, TFM_DECODER_ONLY);
        cr_expect_eq(g.target_vocab, VOCAB);
        cr_expect_eq(g.max_length, LENGTH);
        cr_expect_eq(g.tied_head, !own_head);
        cr_expect_eq(g.block.kv_heads, KV);
        cr_expect_eq(g.block.norm_eps, 1e-5f);
        cr_expect(g.block.activation == TFM_ACT_SILU && g.block.gated && g.block.rope.interleaved);
        expect_at(p, "tgt_embedding.weight", VOCAB, DIM, 0, 0);
        expect_at(p, "decoder.layers.1.norm1.weight", DIM, 0, 0, (double)(at + DIM));
        at += LAYERS * DIM;
        expect_at(p, "decoder.layers.1.self_attn.in_proj_weight", DIM + 2 * KV_DIM, DIM, 0, (double)(at + DIM * DIM));
        at += LAYERS * DIM * DIM;
        expect_at(p, "decoder.layers.1.self_attn.in_proj_weight", DIM + 2 * KV_DIM, DIM, DIM,
                  (double)(at + KV_DIM * DIM));
        at += LAYERS * KV_DIM * DIM;
        expect_at(p, "decoder.layers.1.self_attn.in_proj_weight", DIM + 2 * KV_DIM, DIM, DIM + KV_DIM,
                  (double)(at + KV_DIM * DIM));
        at += LAYERS * KV_DIM * DIM;
        expect_at(p, "decoder.layers.0.self_attn.out_proj.weight", DIM, DIM, 0, (double)at);
        at += LAYERS * DIM * DIM;
        expect_at(p, "decoder.layers.0.norm2.weight", DIM, 0, 0, (double)at);
        at += LAYERS * DIM;
        expect_at(p, "decoder.layers.1.linear_gate.weight", HIDDEN, DIM, 0, (double)(at + HIDDEN * DIM));
        at += LAYERS * HIDDEN * DIM;
        expect_at(p, "decoder.layers.1.linear2.weight", DIM, HIDDEN, 0, (double)(at + HIDDEN * DIM));
        at += LAYERS * HIDDEN * DIM;
        expect_at(p, "decoder.layers.1.linear1.weight", HIDDEN, DIM, 0, (double)(at + HIDDEN * DIM));
        at += LAYERS * HIDDEN * DIM;
        expect_at(p, "decoder.norm.weight", DIM, 0, 0, (double)at);
        at += DIM + LENGTH * DIM / HEADS;
        if (own_head) expect_at(p, "generator.weight", VOCAB, DIM, 0, (double)at);
        tfm_params_strict(p, 1); /* the names are exactly those that the model asks for */
        assert_ok(c, tfm_transformer_init(c, p, "", &g, &model));
        tfm_params_destroy(p);
        tfm_destroy(c);
    }
}

/* What stands in the way is found in front of the first copy: neither store nor config has changed. */
Test(llama2c, what_is_refused_changes_nothing) {
    enum { SHAPE, DTYPE, WRITING, WAYS };
    int way;
    for (way = 0; way < WAYS; way++) {
        tfm_ctx *c = context();
        tfm_params *p = tfm_params_create(c);
        tfm_transformer_config g;
        int64_t size;
        unsigned char *data = checkpoint(1, &size);
        const int64_t rows = way == SHAPE ? VOCAB + 1 : VOCAB;
        const int dtype = way == DTYPE ? TFM_F16 : TFM_F32;
        memset(&g, 0x55, sizeof g);
        assert_made(c, tfm_params_add(c, p, "generator.weight", dtype, TFM_SHAPE(rows, DIM))); /* the file's last */
        assert_made(c, tfm_params_add(c, p, "tgt_embedding.weight", TFM_F32, TFM_SHAPE(VOCAB, DIM)));
        if (way == WRITING) assert_made(c, tfm_params_write_begin(c, p, "generator.weight"));
        assert_verb_refused(c, tfm_llama2c_load_memory(c, p, data, size, &g), TFM_INVALID);
        cr_expect_eq(tfm_params_count(p), 2, "%d", way);
        cr_expect_eq(((const float *)tfm_params_find(p, "tgt_embedding.weight")->data)[1], 0.0f, "%d", way);
        cr_expect_eq(g.kind, 0x55555555, "%d: config was filled", way);
        tfm_params_destroy(p);
        tfm_destroy(c);
        free(data);
    }
}

typedef struct steps {
    int64_t calls, total, stop_at;
} steps;

static int count_steps(void *user, const char *what, int64_t done, int64_t total) {
    steps *s = (steps *)user;
    cr_expect_str_eq(what, "loading");
    cr_expect_eq(done, ++s->calls);
    s->total = total;
    return done == s->stop_at;
}

Test(llama2c, loading_tells_of_each_tensor_and_can_be_cancelled) {
    enum { TENSORS = 2 + 9 * LAYERS };
    int64_t size;
    unsigned char *data = checkpoint(0, &size);
    int stop;
    for (stop = 0; stop < 2; stop++) {
        steps s = {0, 0, 0};
        tfm_options o;
        tfm_transformer_config g;
        tfm_ctx *c;
        tfm_params *p;
        memset(&o, 0, sizeof o);
        o.threads = 1;
        o.progress = count_steps;
        o.hook_user = &s;
        s.stop_at = stop ? 3 : -1;
        c = tfm_create(&o);
        p = tfm_params_create(c);
        if (stop) assert_verb_refused(c, tfm_llama2c_load_memory(c, p, data, size, &g), TFM_CANCELLED);
        else assert_ok(c, tfm_llama2c_load_memory(c, p, data, size, &g));
        cr_expect_eq(s.calls, stop ? 3 : TENSORS);
        cr_expect_eq(s.total, TENSORS);
        tfm_params_destroy(p);
        tfm_destroy(c);
    }
    free(data);
}

Test(llama2c, sizes_are_checked_against_the_file) {
    static const struct {
        int word;
        int32_t value;
        tfm_status status;
        const char *phrase;
    } bad[] = {
        {0, 0, TFM_FORMAT, "dim is 0"},
        {0, -4, TFM_FORMAT, "dim is -4"},
        {0, 0x616b3432, TFM_UNSUPPORTED, "version 0"},
        {0, 2147483644, TFM_FORMAT, "takes"},
        {1, 2147483647, TFM_FORMAT, "takes"},
        {2, 2147483647, TFM_FORMAT, "takes"},
        {2, 0, TFM_FORMAT, "n_layers"},
        {0, 5, TFM_FORMAT, "go together"},
        {3, 3, TFM_FORMAT, "go together"},
        {3, 4, TFM_FORMAT, "go together"}, /* head size 1 cannot be rotated */
        {4, 3, TFM_FORMAT, "go together"},
        {4, 0, TFM_FORMAT, "n_kv_heads"},
        {5, 0, TFM_FORMAT, "vocab_size"},
        {5, (-2147483647 - 1), TFM_FORMAT, "takes"},
        {5, -VOCAB, TFM_FORMAT, "takes"},
        {6, 2147483647, TFM_FORMAT, "takes"},
    };
    int64_t size, n;
    unsigned char *data = checkpoint(0, &size);
    tfm_transformer_config g;
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    size_t i;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        unsigned char kept[4];
        memcpy(kept, data + 4 * bad[i].word, 4);
        memcpy(data + 4 * bad[i].word, &bad[i].value, 4);
        cr_expect_eq(tfm_llama2c_load_memory(c, p, data, size, &g), bad[i].status, "%d: %s", (int)i, tfm_error(c));
        cr_expect_not_null(strstr(tfm_error(c), bad[i].phrase), "%s, not: %s", tfm_error(c), bad[i].phrase);
        tfm_clear(c);
        memcpy(data + 4 * bad[i].word, kept, 4);
    }
    for (n = 0; n < size; n++) { /* in memory that ends with them */
        unsigned char *exact = (unsigned char *)malloc((size_t)(n ? n : 1));
        memcpy(exact, data, (size_t)n);
        cr_assert_eq(tfm_llama2c_load_memory(c, p, exact, n, &g), TFM_FORMAT, "%lld bytes were accepted", (long long)n);
        tfm_clear(c);
        free(exact);
    }
    data = (unsigned char *)realloc(data, (size_t)size + 4);
    memset(data + size, 0, 4);
    for (n = size + 1; n <= size + 4; n++)
        assert_verb_refused(c, tfm_llama2c_load_memory(c, p, data, n, &g), TFM_FORMAT);
    cr_expect_eq(tfm_params_count(p), 0);
    assert_verb_refused(c, tfm_llama2c_load_memory(c, p, NULL, size, &g), TFM_INVALID);
    {
        tfm_memory need;
        tfm_measure_begin(c);
        cr_expect_eq(tfm_llama2c_load_memory(c, p, data, size, &g), TFM_INVALID, "a store with values is not for this");
        (void)!tfm_measure_end(c, &need);
        tfm_clear(c);
    }
    assert_verb_refused(c, tfm_llama2c_load_memory(c, NULL, data, size, &g), TFM_INVALID);
    assert_verb_refused(c, tfm_llama2c_load_memory(c, p, data, size, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_llama2c_load(c, p, "/nowhere", &g), TFM_IO);
    free(data);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

#if defined(__linux__)
/* A checkpoint and tokenizers are copied from their files, which are let go. */
Test(llama2c, files_are_let_go) {
    char path[512], line[4096];
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config g;
    tfm_tokenizer *t[2];
    int64_t size;
    unsigned char *data = checkpoint(0, &size);
    FILE *maps;
    test_temporary_path(path, sizeof path, "checkpoint.bin");
    assert_ok(c, tfm_write_file(c, path, data, size));
    assert_ok(c, tfm_llama2c_load(c, p, path, &g));
    expect_at(p, "decoder.norm.weight", DIM, 0, 0, SHARED_FLOATS - DIM - LENGTH * DIM / HEADS);
    assert_ok(c, tfm_write_file(c, path, "a\nb", 3));
    t[0] = tfm_tokenizer_lines(c, path, -1);
    assert_ok(c, tfm_write_file(c, path, "\0\0\0\0" "\0\0\0\0" "\1\0\0\0" "a", 13));
    t[1] = tfm_tokenizer_llama2c(c, path, 1);
    cr_assert(t[0] && t[1], "%s", tfm_error(c));
    cr_expect_eq(tfm_tokenizer_find(t[0], "b"), 1);
    cr_expect_eq(tfm_tokenizer_find(t[1], "a"), 0);
    maps = fopen("/proc/self/maps", "r");
    cr_assert_not_null(maps);
    while (fgets(line, sizeof line, maps)) cr_expect_null(strstr(line, path), "%s", line);
    fclose(maps);
    tfm_tokenizer_destroy(t[0]);
    tfm_tokenizer_destroy(t[1]);
    remove(path);
    free(data);
    tfm_params_destroy(p);
    tfm_destroy(c);
}
#endif

/* ---- tokenizers ------------------------------------------------------------------------------------------------- */

typedef struct vocabulary {
    unsigned char data[8192];
    int64_t size, count;
    float scores[512];
    char text[512][16];
} vocabulary;

static void vocabulary_add(vocabulary *v, const char *text, float score) {
    const int32_t length = (int32_t)strlen(text);
    if (!v->count) v->size = 4, memset(v->data, 0, 4);
    memcpy(v->data + v->size, &score, 4);
    memcpy(v->data + v->size + 4, &length, 4);
    memcpy(v->data + v->size + 8, text, (size_t)length);
    v->size += 8 + length;
    v->scores[v->count] = score;
    strcpy(v->text[v->count++], text);
}

/* The special tokens and all bytes, as in every vocabulary of llama2.c. */
static void vocabulary_begin(vocabulary *v) {
    char byte[8];
    int i;
    memset(v, 0, sizeof *v);
    vocabulary_add(v, "<unk>", 0);
    vocabulary_add(v, "\n<s>\n", 0);
    vocabulary_add(v, "\n</s>\n", 0);
    for (i = 0; i < 256; i++) {
        snprintf(byte, sizeof byte, "<0x%02X>", i);
        vocabulary_add(v, byte, 0);
    }
}

static int64_t vocabulary_find(const vocabulary *v, const char *text) {
    int64_t i;
    for (i = 0; i < v->count; i++)
        if (!strcmp(v->text[i], text)) return i;
    return -1;
}

/* llama2.c's merging the plain way: over all pairs, the best score first, of equals the leftmost. */
static int64_t merge_plainly(const vocabulary *v, int64_t *ids, int64_t n) {
    for (;;) {
        float best_score = -1e10f;
        int64_t best = -1, best_id = -1, i;
        for (i = 0; i + 1 < n; i++) {
            char both[40];
            int64_t id;
            snprintf(both, sizeof both, "%s%s", v->text[ids[i]], v->text[ids[i + 1]]);
            id = vocabulary_find(v, both);
            if (id >= 0 && v->scores[id] > best_score) best_score = v->scores[id], best = i, best_id = id;
        }
        if (best < 0) return n;
        ids[best] = best_id;
        for (i = best + 1; i + 1 < n; i++) ids[i] = ids[i + 1];
        n--;
    }
}

Test(tokenizer, merging_equals_the_plain_algorithm) {
    int round;
    for (round = 0; round < (test_quick() ? 20 : 200); round++) {
        vocabulary *v = (vocabulary *)malloc(sizeof *v);
        tfm_ctx *c = context();
        tfm_tokenizer *t;
        uint64_t seed = (uint64_t)round;
        char text[64];
        int64_t expected[80], *ids, count, n = 0, i;
        const int length = (int)(20 + 20 * test_random(&seed));
        vocabulary_begin(v);
        vocabulary_add(v, " ", -10);
        vocabulary_add(v, "a", -11);
        vocabulary_add(v, "b", -12);
        for (i = 0; i < 40; i++) { /* merges of two to five letters; scores often equal */
            char word[8];
            const int letters = 2 + (int)(2 + 2 * test_random(&seed));
            int k;
            for (k = 0; k < letters; k++) word[k] = "ab "[(int)(1.5f + 1.5f * test_random(&seed)) % 3];
            word[letters] = 0;
            if (vocabulary_find(v, word) < 0) vocabulary_add(v, word, (float)(int)(4 * test_random(&seed)));
        }
        for (i = 0; i < length; i++) text[i] = "ab c"[(int)(2 + 2 * test_random(&seed)) % 4];
        text[length] = 0;
        expected[n++] = vocabulary_find(v, " ");
        for (i = 0; i < length; i++) {
            char letter[2] = {text[i], 0};
            const int64_t id = vocabulary_find(v, letter);
            expected[n++] = id >= 0 ? id : 3 + (unsigned char)text[i];
        }
        n = length ? merge_plainly(v, expected, n) : 0;
        t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count);
        cr_assert_not_null(t, "%s", tfm_error(c));
        assert_ok(c, tfm_tokenizer_encode(c, t, text, 0, 0, &ids, &count));
        cr_assert_eq(count, n, "round %d: %lld ids, expected %lld", round, (long long)count, (long long)n);
        for (i = 0; i < n; i++) cr_assert_eq(ids[i], expected[i], "round %d, id %lld", round, (long long)i);
        tfm_tokenizer_destroy(t);
        tfm_destroy(c);
        free(v);
    }
}

/* A long text takes n log n steps, not n squared. */
Test(tokenizer, long_texts_are_no_problem) {
    enum { LONG = 300000 };
    vocabulary *v = (vocabulary *)malloc(sizeof *v);
    char *text = (char *)malloc(LONG + 1);
    tfm_ctx *c = context();
    tfm_tokenizer *t;
    int64_t *ids, count;
    vocabulary_begin(v);
    vocabulary_add(v, " ", -10);
    vocabulary_add(v, "a", -11);
    vocabulary_add(v, "aa", -1);
    vocabulary_add(v, "aaaa", -2);
    t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count);
    memset(text, 'a', LONG);
    text[LONG] = 0;
    assert_ok(c, tfm_tokenizer_encode(c, t, text, 1, 1, &ids, &count));
    cr_expect_eq(count, 3 + LONG / 4);
    cr_expect_eq(ids[0], 1);
    cr_expect_eq(ids[count - 1], 2);
    tfm_tokenizer_destroy(t);
    tfm_destroy(c);
    free(text);
    free(v);
}

static void expect_ids(tfm_ctx *c, const tfm_tokenizer *t, const char *text, const int64_t *expected, int64_t n) {
    int64_t *ids, count, i;
    assert_ok(c, tfm_tokenizer_encode(c, t, text, 0, 0, &ids, &count));
    cr_assert_eq(count, n, "\"%s\": %lld ids", text, (long long)count);
    for (i = 0; i < n; i++) cr_expect_eq(ids[i], expected[i], "\"%s\": id %lld", text, (long long)i);
}

/* A score of -1e10 and below, or none that is a number, merges nothing; characters have up to four bytes. */
Test(tokenizer, what_does_not_merge_stays_apart) {
    static const int64_t low[] = {259, 260, 261}, nan[] = {259, 261, 260}, merged[] = {259, 264, 260},
                         face[] = {259, 265, 3 + 0x80}, nobody[] = {259, 3 + 0xF0, 3 + 0x9F, 3 + 0x98, 3 + 0x81};
    vocabulary *v = (vocabulary *)malloc(sizeof *v);
    tfm_ctx *c = context();
    tfm_tokenizer *t;
    int64_t *ids, count;
    vocabulary_begin(v);
    vocabulary_add(v, " ", -10); /* 259 */
    vocabulary_add(v, "a", -11);
    vocabulary_add(v, "b", -12);
    vocabulary_add(v, "ab", -1e10f);
    vocabulary_add(v, "ba", (float)NAN);
    vocabulary_add(v, "bb", -1e9f); /* 264 */
    vocabulary_add(v, "\xf0\x9f\x98\x80", -13);
    t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count);
    assert_made(c, t);
    expect_ids(c, t, "ab", low, 3);
    expect_ids(c, t, "ba", nan, 3);
    expect_ids(c, t, "bba", merged, 3);
    expect_ids(c, t, "\xf0\x9f\x98\x80\x80", face, 3);
    expect_ids(c, t, "\xf0\x9f\x98\x81", nobody, 5);
    tfm_tokenizer_destroy(t);
    memset(v, 0, sizeof *v);
    vocabulary_add(v, " ", 0);
    vocabulary_add(v, "a", 0);
    t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count);
    assert_made(c, t);
    expect_ids(c, t, "a", (const int64_t[]){0, 1}, 2);
    assert_verb_refused(c, tfm_tokenizer_encode(c, t, "b", 0, 0, &ids, &count), TFM_INVALID); /* has no bytes */
    tfm_tokenizer_destroy(t);
    tfm_destroy(c);
    free(v);
}

Test(tokenizer, encoding_again_takes_no_memory) {
    vocabulary *v = (vocabulary *)malloc(sizeof *v);
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    tfm_tokenizer *t;
    int64_t *ids, count, calls = 0;
    int i;
    memset(&o, 0, sizeof o);
    o.allocator = test_allocator(&m);
    c = tfm_create(&o);
    vocabulary_begin(v);
    vocabulary_add(v, " ", -10);
    vocabulary_add(v, "a", -11);
    vocabulary_add(v, "aa", -1);
    t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count);
    cr_assert_not_null(t, "%s", tfm_error(c));
    for (i = 0; i < 3; i++) {
        const tfm_marker mark = tfm_mark(c);
        const int64_t used = tfm_memory_usage(c).arena_used;
        assert_ok(c, tfm_tokenizer_encode(c, t, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 1, 1, &ids, &count));
        cr_expect_eq(count, 3 + 16);
        cr_expect_leq(tfm_memory_usage(c).arena_used - used, 512); /* the ids alone stay */
        tfm_rewind(c, mark);
        if (!i) calls = m.calls;
    }
    cr_expect_eq(m.calls, calls);
    tfm_tokenizer_destroy(t);
    tfm_destroy(c);
    assert_no_leak(&m);
    free(v);
}

Test(tokenizer, pieces_are_llama2cs) {
    vocabulary *v = (vocabulary *)malloc(sizeof *v);
    static const int64_t text[] = {1, 259, 3 + 'A', 259, 260, 261, 262, 2};
    tfm_ctx *c = context();
    tfm_tokenizer *t;
    int64_t length = -1;
    vocabulary_begin(v);
    vocabulary_add(v, " hi", -1);    /* 259 */
    vocabulary_add(v, "<0x-1>", -2); /* 260: a known attack on a %x of scanf */
    vocabulary_add(v, "<0x4>", -3);
    vocabulary_add(v, "<0x411>", -3);
    t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count);
    cr_assert_not_null(t);
    cr_expect_eq(tfm_tokenizer_size(t), v->count);
    cr_expect_str_eq(tfm_tokenizer_piece(t, 5, 259, &length), " hi");
    cr_expect_eq(length, 3);
    cr_expect_str_eq(tfm_tokenizer_piece(t, 1, 259, &length), "hi"); /* no space after the begin id */
    cr_expect_eq(length, 2);
    cr_expect_str_eq(tfm_tokenizer_piece(t, 5, 3 + 'A', &length), "A");
    cr_expect_eq((unsigned char)tfm_tokenizer_piece(t, 5, 3 + 0xE9, &length)[0], 0xE9);
    cr_expect_eq(length, 1);
    tfm_tokenizer_piece(t, 5, 3, &length);
    cr_expect_eq(length, 0, "a NUL is no text");
    cr_expect_str_eq(tfm_tokenizer_piece(t, 5, 260, &length), "<0x-1>");
    cr_expect_str_eq(tfm_tokenizer_piece(t, 1, 260, &length), "<0x-1>"); /* no space, nothing goes */
    cr_expect_str_eq(tfm_tokenizer_piece(t, 5, v->count, &length), "");
    cr_expect_str_eq(tfm_tokenizer_piece(t, 5, -1, &length), "");
    cr_expect_str_eq(tfm_tokenizer_piece(NULL, 5, 1, &length), "");
    cr_expect_str_eq(tfm_tokenizer_decode(c, t, text, 8), "hiA hi<0x-1><0x4><0x411>");
    cr_expect_str_eq(tfm_tokenizer_decode(c, t, text, 0), "");
    assert_refused(c, tfm_tokenizer_decode(c, t, &v->count, 1), TFM_INVALID);
    cr_expect_eq(tfm_tokenizer_find(t, " hi"), 259);
    cr_expect_eq(tfm_tokenizer_find(t, " h"), -1);
    cr_expect_eq(tfm_tokenizer_find(t, " hi "), -1);
    tfm_tokenizer_destroy(t);
    free(v);
    tfm_destroy(c);
}

Test(tokenizer, broken_files_are_refused) {
    vocabulary *v = (vocabulary *)malloc(sizeof *v);
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    int64_t n, *ids;
    int32_t length = -1;
    tfm_tokenizer *t;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator = test_allocator(&m);
    c = tfm_create(&o);
    vocabulary_begin(v);
    for (n = 0; n < v->size; n += test_quick() ? 97 : 1) { /* in memory that ends with it */
        unsigned char *exact = (unsigned char *)malloc((size_t)(n ? n : 1));
        memcpy(exact, v->data, (size_t)n);
        cr_assert_null(tfm_tokenizer_llama2c_memory(c, exact, n, v->count), "%lld bytes were accepted", (long long)n);
        cr_assert_eq(tfm_status_of(c), TFM_FORMAT);
        tfm_clear(c);
        free(exact);
    }
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count - 1), TFM_FORMAT);
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count + 1), TFM_FORMAT);
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, v->data, v->size, INT64_MAX), TFM_FORMAT);
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, v->data, v->size, 0), TFM_INVALID);
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, NULL, v->size, v->count), TFM_INVALID);
    memcpy(v->data + 8, &length, 4);
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count), TFM_FORMAT);
    length = INT32_MAX;
    memcpy(v->data + 8, &length, 4);
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count), TFM_FORMAT);
    length = 5;
    memcpy(v->data + 8, &length, 4);
    v->data[13] = 0; /* a NUL inside a token */
    assert_refused(c, tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count), TFM_FORMAT);
    v->data[13] = 'u';
    t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count); /* has no space */
    cr_assert_not_null(t);
    assert_verb_refused(c, tfm_tokenizer_encode(c, t, "x", 0, 0, &ids, &n), TFM_INVALID);
    assert_verb_refused(c, tfm_tokenizer_encode(c, t, NULL, 0, 0, &ids, &n), TFM_INVALID);
    assert_refused(c, tfm_tokenizer_llama2c(c, "/nowhere", 5), TFM_IO);
    tfm_tokenizer_destroy(t);
    tfm_tokenizer_destroy(NULL);
    t = tfm_tokenizer_llama2c_memory(c, "\x05\0\0\0" "\0\0\0\0" "\x05\0\0\0" "<unk>", 17, 1);
    cr_assert_not_null(t, "%s", tfm_error(c));
    assert_verb_refused(c, tfm_tokenizer_encode(c, t, "", 1, 0, &ids, &n), TFM_INVALID); /* no ids 1 and 2 */
    assert_verb_refused(c, tfm_tokenizer_encode(c, t, "", 0, 1, &ids, &n), TFM_INVALID);
    tfm_tokenizer_destroy(t);
    free(v);
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(tokenizer, lines) {
    static const char text[] = "<s>\n</s>\r\n\none\ntwo\none\n\xc3\xa9";
    static const int64_t expected[] = {0, 3, 4, 6, 3, 1}, ended[] = {1, 3};
    tfm_ctx *c = context();
    tfm_tokenizer *t = tfm_tokenizer_lines_memory(c, text, (int64_t)sizeof text - 1, -1), *other;
    int64_t *ids, count, i;
    char *exact;
    cr_assert_not_null(t, "%s", tfm_error(c));
    cr_expect_eq(tfm_tokenizer_size(t), 7);
    cr_expect_eq(tfm_tokenizer_find(t, "one"), 3, "the first of equals");
    cr_expect_eq(tfm_tokenizer_find(t, "</s>"), 1, "\\r\\n ends a line too");
    assert_ok(c, tfm_tokenizer_encode(c, t, " one two  \xc3\xa9 one ", 1, 1, &ids, &count));
    cr_assert_eq(count, 6);
    for (i = 0; i < 6; i++) cr_expect_eq(ids[i], expected[i]);
    cr_expect_str_eq(tfm_tokenizer_decode(c, t, ids, count), "one two \xc3\xa9 one");
    cr_expect_str_eq(tfm_tokenizer_piece(t, -1, 3, NULL), "one");
    cr_expect_str_eq(tfm_tokenizer_piece(t, 4, 3, NULL), " one");
    cr_expect_str_eq(tfm_tokenizer_piece(t, 0, 3, NULL), "one", "no space after the begin id");
    cr_expect_str_eq(tfm_tokenizer_decode(c, t, expected + 5, 1), "");
    cr_expect_str_eq(tfm_tokenizer_decode(c, t, ended, 2), "one", "nor after the end id");
    assert_verb_refused(c, tfm_tokenizer_encode(c, t, "one three", 0, 0, &ids, &count), TFM_INVALID);
    other = tfm_tokenizer_lines_memory(c, text, (int64_t)sizeof text - 1, 2);
    assert_ok(c, tfm_tokenizer_encode(c, other, "three one", 0, 0, &ids, &count));
    cr_expect_eq(ids[0], 2);
    tfm_tokenizer_destroy(other);
    assert_refused(c, tfm_tokenizer_lines_memory(c, text, (int64_t)sizeof text - 1, 7), TFM_INVALID);
    assert_refused(c, tfm_tokenizer_lines_memory(c, text, (int64_t)sizeof text - 1, -2), TFM_INVALID);
    exact = (char *)malloc(5); /* an empty line first, and nothing in front of it */
    memcpy(exact, text + 10, 5);
    other = tfm_tokenizer_lines_memory(c, exact, 5, -1);
    free(exact);
    assert_made(c, other);
    cr_expect(tfm_tokenizer_find(other, "") == 0 && tfm_tokenizer_find(other, "one") == 1);
    tfm_tokenizer_destroy(other);
    assert_refused(c, tfm_tokenizer_lines_memory(c, text, (int64_t)sizeof text, -1), TFM_FORMAT); /* NUL */
    assert_refused(c, tfm_tokenizer_lines_memory(c, NULL, 1, -1), TFM_INVALID);
    other = tfm_tokenizer_lines_memory(c, NULL, 0, -1);
    cr_assert_not_null(other);
    cr_expect_eq(tfm_tokenizer_size(other), 0);
    tfm_tokenizer_destroy(other);
    tfm_tokenizer_destroy(t);
    tfm_destroy(c);
}

static void load_everything(tfm_ctx *c, void *user) {
    const vocabulary *v = (const vocabulary *)user;
    int64_t size, *ids, count;
    unsigned char *data = checkpoint(1, &size);
    tfm_params *p = tfm_params_create(c);
    tfm_tokenizer *t = tfm_tokenizer_llama2c_memory(c, v->data, v->size, v->count),
                  *l = tfm_tokenizer_lines_memory(c, "a\nb\n", 4, 0);
    tfm_transformer_config g;
    tfm_status status = tfm_llama2c_load_memory(c, p, data, size, &g);
    status = tfm_tokenizer_encode(c, t, "some text", 1, 1, &ids, &count);
    (void)status;
    (void)tfm_tokenizer_decode(c, t, ids, count);
    tfm_tokenizer_destroy(t);
    tfm_tokenizer_destroy(l);
    tfm_params_destroy(p);
    free(data);
}

Test(models, every_allocation_may_fail) {
    vocabulary *v = (vocabulary *)malloc(sizeof *v);
    vocabulary_begin(v);
    vocabulary_add(v, " ", 0);
    cr_expect_gt(test_each_allocation_failing(load_everything, v, NULL), 10);
    free(v);
}

/* ---- trained models --------------------------------------------------------------------------------------------- */

Test(stories260k, ids_are_those_of_llama2c) {
    static const struct {
        const char *text;
        int64_t count, ids[16];
    } table[] = {
        {"", 1, {1}},
        {"Once upon a time", 5, {1, 403, 407, 261, 378}},
        {"Lily's mom said, \"Hello!\"", 14, {1, 317, 439, 419, 357, 336, 432, 313, 440, 411, 306, 414, 443, 436}},
        {"h\xc3\xa9llo \xe6\x97\xa5\xe6\x9c\xac", 12, {1, 270, 485, 306, 414, 410, 233, 154, 168, 233, 159, 175}},
        {"  two  spaces", 12, {1, 410, 410, 259, 424, 414, 410, 262, 427, 412, 331, 419}},
        {"\x80\xff", 4, {1, 410, 131, 258}},
        {"zzzQQQ", 8, {1, 410, 451, 451, 451, 473, 473, 473}},
    };
    char path[512];
    tfm_ctx *c;
    tfm_tokenizer *t;
    size_t i;
    test_need_shared(path, sizeof path, "stories260k/tok512.bin");
    c = context();
    t = tfm_tokenizer_llama2c(c, path, 512);
    cr_assert_not_null(t, "%s", tfm_error(c));
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        int64_t *ids, count, k;
        assert_ok(c, tfm_tokenizer_encode(c, t, table[i].text, 1, 0, &ids, &count));
        cr_assert_eq(count, table[i].count, "%s: %lld ids", table[i].text, (long long)count);
        for (k = 0; k < count; k++) cr_expect_eq(ids[k], table[i].ids[k], "%s: id %lld", table[i].text, (long long)k);
        cr_expect_str_eq(tfm_tokenizer_decode(c, t, ids, count), table[i].text);
    }
    tfm_tokenizer_destroy(t);
    tfm_destroy(c);
}

/* The same text on every instruction set, packed and plain, with one and three threads. */
Test(stories260k, greedy_text_is_llama2cs) {
    static const int64_t begin = 1;
    char model_path[512], tokens_path[512], expected_path[512], *expected;
    size_t expected_size = 0;
    int variant;
    test_need_shared(model_path, sizeof model_path, "stories260k/stories260K.bin");
    test_need_shared(tokens_path, sizeof tokens_path, "stories260k/tok512.bin");
    test_need_shared(expected_path, sizeof expected_path, "stories260k/expected_stdout_t0_n200.txt");
    expected = test_read_file(expected_path, &expected_size);
    for (variant = 0; variant < 2; variant++) TEST_EACH_ISA(c, variant ? 3 : 1) {
            tfm_params *p = tfm_params_create(c);
            tfm_transformer_config g;
            tfm_transformer model;
            tfm_session *s;
            tfm_tokenizer *t;
            tfm_prompt prompt = {1, &begin};
            tfm_generate_options o;
            tfm_sequence out;
            memset(&o, 0, sizeof o);
            assert_ok(c, tfm_llama2c_load(c, p, model_path, &g));
            assert_ok(c, tfm_transformer_init(c, p, "", &g, &model));
            if (variant) assert_ok(c, tfm_params_prepare(c, p));
            s = tfm_session_create(c, &model, NULL);
            t = tfm_tokenizer_llama2c(c, tokens_path, g.target_vocab);
            cr_assert(s && t, "%s", tfm_error(c));
            o.max_new = 200;
            o.stop_ids = &begin;
            o.stop_id_count = 1;
            o.piece = tfm_tokenizer_piece;
            o.piece_user = t;
            assert_ok(c, tfm_generate(c, s, &prompt, 1, &o, &out));
            cr_expect_eq(out.count, 200);
            cr_expect_eq(out.reason, TFM_STOP_LENGTH);
            cr_expect_eq((size_t)out.text_length, expected_size, "%s: %s", tfm_isa_name(c), out.text);
            cr_expect_str_eq(out.text, expected, "%s", tfm_isa_name(c));
            tfm_tokenizer_destroy(t);
            tfm_session_destroy(s);
            tfm_params_destroy(p);
        }
    free(expected);
}

/* CTranslate2's names to ours. */
static const tfm_rule aren_rules[] = {
    {TFM_RULE_RENAME, "encoder/embeddings/weight", "src_embedding.weight", 0, 0},
    {TFM_RULE_RENAME, "decoder/embeddings/weight", "tgt_embedding.weight", 0, 0},
    {TFM_RULE_RENAME, "*/layer_norm/gamma", "*.norm.weight", 0, 0},
    {TFM_RULE_RENAME, "*/layer_norm/beta", "*.norm.bias", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/self_attention/layer_norm/gamma", "*.layers.*.norm1.weight", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/self_attention/layer_norm/beta", "*.layers.*.norm1.bias", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/self_attention/linear_0/*", "*.layers.*.self_attn.in_proj_*", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/self_attention/linear_1/*", "*.layers.*.self_attn.out_proj.*", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/attention/layer_norm/gamma", "*.layers.*.norm2.weight", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/attention/layer_norm/beta", "*.layers.*.norm2.bias", 0, 0},
    {TFM_RULE_CONCAT, "*/layer_*/attention/linear_0/*", "*.layers.*.multihead_attn.in_proj_*", 0, 2},
    {TFM_RULE_CONCAT, "*/layer_*/attention/linear_1/*", "*.layers.*.multihead_attn.in_proj_*", 1, 2},
    {TFM_RULE_RENAME, "*/layer_*/attention/linear_2/*", "*.layers.*.multihead_attn.out_proj.*", 0, 0},
    {TFM_RULE_RENAME, "encoder/layer_*/ffn/layer_norm/gamma", "encoder.layers.*.norm2.weight", 0, 0},
    {TFM_RULE_RENAME, "encoder/layer_*/ffn/layer_norm/beta", "encoder.layers.*.norm2.bias", 0, 0},
    {TFM_RULE_RENAME, "decoder/layer_*/ffn/layer_norm/gamma", "decoder.layers.*.norm3.weight", 0, 0},
    {TFM_RULE_RENAME, "decoder/layer_*/ffn/layer_norm/beta", "decoder.layers.*.norm3.bias", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/ffn/linear_0/*", "*.layers.*.linear1.*", 0, 0},
    {TFM_RULE_RENAME, "*/layer_*/ffn/linear_1/*", "*.layers.*.linear2.*", 0, 0},
    {TFM_RULE_RENAME, "decoder/projection/*", "generator.*", 0, 0},
};

static const struct {
    int64_t source_count, source[7], count, target[8];
    float log_probabilities[8];
} aren[2] = {
    {6,
     {31, 10, 19, 13, 5, 7},
     7,
     {3, 11, 23, 13, 8, 7, 2},
     {-0.106023f, -0.06541f, -0.056002f, -0.447953f, -0.230714f, -0.092184f, -0.063463f}},
    {7,
     {31, 10, 16, 3, 9, 5, 7},
     8,
     {3, 18, 12, 5, 9, 8, 7, 2},
     {-0.07266f, -0.300309f, -0.181187f, -0.395671f, -0.025631f, -0.123466f, -0.002034f, -0.012639f}},
};

static void aren_load(tfm_ctx *c, tfm_params *p, const char *path, tfm_transformer *model) {
    tfm_load_options o;
    tfm_transformer_config g;
    memset(&o, 0, sizeof o);
    memset(&g, 0, sizeof g);
    o.rules = aren_rules;
    o.rule_count = sizeof aren_rules / sizeof aren_rules[0];
    assert_ok(c, tfm_params_load(c, p, path, &o));
    g.block.d_model = 32;
    g.block.heads = 8;
    g.block.d_ff = 128;
    g.block.norm_first = 1;
    g.source_vocab = 51;
    g.target_vocab = 43;
    g.head_bias = 1;
    g.scale_embedding = 1;
    g.position = TFM_POSITION_SINUSOIDAL_HALVES;
    g.position_start = 1;
    tfm_params_strict(p, 1);
    assert_ok(c, tfm_transformer_init(c, p, "", &g, model));
    assert_ok(c, tfm_params_prepare(c, p));
}

/* Both sources in one batch, padded: the stated log-probabilities to 1e-5, by greedy search and by beams. */
Test(aren, log_probabilities_are_the_stated_ones) {
    static const int64_t begin = 1, end = 2;
    char path[512];
    test_need_shared(path, sizeof path, "aren/aren-transliteration.safetensors");
    TEST_EACH_ISA(c, 2) {
        tfm_params *p = tfm_params_create(c);
        tfm_transformer model;
        int64_t beams;
        aren_load(c, p, path, &model);
        for (beams = 1; beams <= 4; beams += 3) {
            tfm_session_options room;
            tfm_session *s;
            tfm_prompt prompts[2] = {{1, &begin}, {1, &begin}};
            tfm_sequence out[2];
            int64_t ids[8][7] = {{0}}, lengths[8], i, k;
            memset(&room, 0, sizeof room);
            room.batch = 2 * beams;
            room.capacity = 40;
            for (i = 0; i < 2 * beams; i++) {
                lengths[i] = aren[i / beams].source_count;
                for (k = 0; k < lengths[i]; k++) ids[i][k] = aren[i / beams].source[k];
            }
            s = tfm_session_create(c, &model, &room);
            cr_assert_not_null(s, "%s", tfm_error(c));
            assert_ok(c, tfm_session_encode(c, s, tfm_from(c, TFM_I64, TFM_SHAPE(2 * beams, 7), ids),
                                            tfm_from(c, TFM_I64, TFM_SHAPE(2 * beams), lengths)));
            if (beams == 1) {
                tfm_generate_options o;
                memset(&o, 0, sizeof o);
                o.stop_ids = &end;
                o.stop_id_count = 1;
                assert_ok(c, tfm_generate(c, s, prompts, 2, &o, out));
            } else {
                tfm_beam_options o;
                memset(&o, 0, sizeof o);
                o.beams = beams;
                o.stop_ids = &end;
                o.stop_id_count = 1;
                assert_ok(c, tfm_beam_search(c, s, prompts, 2, &o, out));
            }
            for (i = 0; i < 2; i++) {
                cr_assert_eq(out[i].count, aren[i].count, "%s, %lld beams: %lld ids", tfm_isa_name(c), (long long)beams,
                             (long long)out[i].count);
                cr_expect_eq(out[i].reason, TFM_STOP_ID);
                for (k = 0; k < out[i].count; k++) cr_expect_eq(out[i].ids[k], aren[i].target[k]);
                assert_close(out[i].log_probabilities, aren[i].log_probabilities, out[i].count, 0, 1e-5);
            }
            tfm_session_destroy(s);
        }
        tfm_params_destroy(p);
    }
}

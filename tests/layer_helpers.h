/* Helpers of the tests of chapter 10: golden files, and models small enough to look at. */
#ifndef LAYER_HELPERS_H
#define LAYER_HELPERS_H

#include "test.h"

TEST_UNUSED tfm_ctx *context_of(int threads) {
    tfm_options o;
    tfm_ctx *c;
    memset(&o, 0, sizeof o);
    o.threads = threads;
    o.seed = 7;
    c = tfm_create(&o);
    cr_assert(c != NULL && tfm_status_of(c) == TFM_OK, "no context: %s", tfm_error(c));
    return c;
}

/* Numbers in [-1, 1) that do not come from the library. */
TEST_UNUSED tfm_tensor *some(tfm_ctx *c, tfm_shape shape, uint64_t seed) {
    tfm_tensor *t = tfm_empty(c, TFM_F32, shape);
    assert_made(c, t);
    test_fill((float *)t->data, tfm_numel(t), seed);
    return t;
}

/* Ids in [0, vocab). */
TEST_UNUSED tfm_tensor *some_ids(tfm_ctx *c, int64_t batch, int64_t length, int64_t vocab, uint64_t seed) {
    tfm_tensor *t = tfm_empty(c, TFM_I64, TFM_SHAPE(batch, length));
    int64_t i;
    assert_made(c, t);
    for (i = 0; i < batch * length; i++)
        ((int64_t *)t->data)[i] = (int64_t)((test_random(&seed) + 1.0f) * 0.5f * (float)vocab) % vocab;
    return t;
}

TEST_UNUSED tfm_tensor *lengths_of(tfm_ctx *c, int64_t count, const int64_t *lengths) {
    return tfm_from(c, TFM_I64, TFM_SHAPE(count), lengths);
}

/* The new values of a parameter. */
TEST_UNUSED void set_param(tfm_ctx *c, tfm_params *p, const char *name, const tfm_tensor *values) {
    tfm_tensor *t = tfm_params_write_begin(c, p, name);
    assert_made(c, t);
    assert_ok(c, tfm_copy(c, t, values));
    assert_ok(c, tfm_params_write_end(c, p, name));
}

#if !defined(TFM_NO_FILES) && !defined(TFM_NO_STDIO)
TEST_UNUSED const char *meta(const tfm_file *f, const char *key, const char *otherwise) {
    const char *text = tfm_file_metadata(f, key);
    return text ? text : otherwise;
}

TEST_UNUSED int64_t meta_int(const tfm_file *f, const char *key, int64_t otherwise) {
    const char *text = tfm_file_metadata(f, key);
    return text ? !strcmp(text, "True") ? 1 : !strcmp(text, "False") ? 0 : (int64_t)strtod(text, NULL) : otherwise;
}

TEST_UNUSED double meta_number(const tfm_file *f, const char *key, double otherwise) {
    const char *text = tfm_file_metadata(f, key);
    return text ? strtod(text, NULL) : otherwise;
}

/* NULL when the file has no such tensor. */
TEST_UNUSED tfm_tensor *file_has(tfm_ctx *c, const tfm_file *f, const char *name) {
    return tfm_file_has(f, name) ? tfm_file_tensor(c, f, name) : NULL;
}

/* Every "param.NAME" of the file as parameter NAME. */
TEST_UNUSED tfm_params *file_params(tfm_ctx *c, const tfm_file *f) {
    tfm_params *p = tfm_params_create(c);
    int64_t i;
    assert_made(c, p);
    for (i = 0; i < tfm_file_count(f); i++) {
        const char *name = tfm_file_name(f, i);
        const tfm_tensor *t;
        if (strncmp(name, "param.", 6)) continue;
        t = tfm_file_tensor(c, f, name);
        assert_made(c, t);
        assert_made(c, tfm_params_add(c, p, name + 6, t->dtype, tfm_shape_like(t)));
        set_param(c, p, name + 6, t);
    }
    tfm_params_strict(p, 1);
    return p;
}

TEST_UNUSED tfm_file *golden(tfm_ctx *c, const char *name) {
    char path[512];
    tfm_file *f;
    cr_assert(tfm_golden_path(path, sizeof path, name), "no %s", path);
    f = tfm_file_open(c, path);
    assert_made(c, f);
    return f;
}
#endif

/* All elements of both, where `valid` (bool, leading dims of t) says so, or everywhere when it is NULL. */
TEST_UNUSED int rows_close(tfm_ctx *c, const tfm_tensor *t, const tfm_tensor *expected, const tfm_tensor *valid,
                           double rtol, double atol, char *text, size_t size) {
    int64_t i, n, width;
    float *a, *e, *v;
    int ok;
    if (!t) {
        snprintf(text, size, "no tensor: %s", tfm_error(c));
        return 0;
    }
    if (!valid) return test_tensor_worst(c, t, expected, rtol, atol, text, size);
    if (!test_same_shape(t, expected)) {
        snprintf(text, size, "wrong shape");
        return 0;
    }
    n = tfm_numel(t);
    width = n / tfm_numel(valid);
    a = test_floats(c, t);
    e = test_floats(c, expected);
    v = test_floats(c, valid);
    for (i = 0; i < n; i++)
        if (v[i / width] == 0.0f) a[i] = e[i] = 0.0f;
    ok = test_worst(a, e, 0, n, rtol, atol, text, size);
    free(a);
    free(e);
    free(v);
    return ok;
}

/* The same bytes in two tensors (of any strides, of any contexts). */
#define assert_same_values(c, a, b)                                                     \
    do {                                                                                \
        float *a_ = test_floats(c, a), *b_ = test_floats(c, b);                         \
        cr_assert(a_ && b_, "%s, %s: %s", #a, #b, tfm_error(c));                        \
        cr_assert(test_same_shape(a, b), "%s and %s have different shapes", #a, #b);    \
        assert_same_bytes(a_, b_, tfm_numel(a) * 4);                                    \
        free(a_);                                                                       \
        free(b_);                                                                       \
    } while (0)

/* Runs body with memory running out at allocation 0, then 1, 2, ...: an error and no leak each time. (The arena asks
 * for less when it cannot have much, so one failing allocation alone may go unnoticed.) Returns how many allocations
 * there are. */
TEST_UNUSED int64_t each_end_of_memory(void (*body)(tfm_ctx *c)) {
    int64_t n;
    for (n = 0;; n++) {
        test_memory m = test_memory_new();
        tfm_options o;
        tfm_ctx *c;
        memset(&o, 0, sizeof o);
        o.threads = 1;
        o.allocator = test_allocator(&m);
        m.fail_at = n;
        m.fail_on = 1;
        c = tfm_create(&o);
        if (c && tfm_status_of(c) == TFM_OK) body(c);
        if (c)
            cr_assert(tfm_status_of(c) == (m.failed ? TFM_OOM : TFM_OK), "allocation %lld: %s", (long long)n,
                      tfm_error(c));
        tfm_destroy(c);
        assert_no_leak(&m);
        if (!m.failed) return n;
    }
}

/* What the error says. */
#define assert_error_says(c, words) cr_assert(strstr(tfm_error(c), words) != NULL, "the error is \"%s\"", tfm_error(c))
/* A verb refused with these words. */
#define assert_init_refused(c, call, words)                                                  \
    do {                                                                                     \
        const tfm_status status_ = (call);                                                   \
        cr_assert(status_ == TFM_INVALID, "%s: %s", #call, tfm_status_name(status_));        \
        assert_error_says(c, words);                                                         \
        tfm_clear(c);                                                                        \
    } while (0)

#endif

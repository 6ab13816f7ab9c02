/* Any bytes as a saved key/value cache: what is accepted is appended to, attended, cut, reordered and saved again. */
#define TFM_STATIC /* looks at the geometry that a cache says it has */
#define TRANSFORMER_IMPLEMENTATION
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    tfm_ctx *c = fuzz_context();
    const tfm_marker mark = tfm_mark(c);
    tfm_cache *cache = tfm_cache_load(c, data, (int64_t)size), *again = NULL;
    tfm_status status;
    if (cache && cache->batch <= 64 && cache->heads <= 64 && cache->key_size <= 1024 && cache->value_size <= 1024) {
        const int64_t n = tfm_cache_saved_size(cache);
        void *saved = n > 0 && n < 1 << 24 ? malloc((size_t)n) : NULL;
        tfm_attention_options o;
        tfm_tensor *q = tfm_ones(c, TFM_SHAPE(cache->batch, cache->heads, 1, cache->key_size));
        tfm_tensor *v = tfm_ones(c, TFM_SHAPE(cache->batch, cache->heads, 1, cache->value_size));
        memset(&o, 0, sizeof o);
        o.mask.causal = TFM_CAUSAL_BOTTOM_RIGHT;
        if (saved) {
            status = tfm_cache_save(c, cache, saved, n);
            if (!status) again = tfm_cache_load(c, saved, n);
            if (!status && !again && tfm_status_of(c) != TFM_OOM) abort(); /* what we write we can read */
        }
        free(saved);
        tfm_clear(c);
        (void)tfm_attention_cached(c, q, cache, cache->layers - 1, &o);
        tfm_clear(c);
        status = tfm_cache_append(c, cache, 0, q, v, NULL);
        tfm_clear(c);
        (void)tfm_attention_cached(c, q, cache, 0, &o);
        tfm_clear(c);
        status = tfm_cache_slide(c, cache, 1);
        tfm_clear(c);
        status = tfm_cache_truncate(c, cache, -1, 1);
        (void)status;
    }
    tfm_clear(c);
    tfm_cache_destroy(again);
    tfm_cache_destroy(cache);
    tfm_rewind(c, mark);
    return 0;
}

#if !defined(TFM_LIBFUZZER)
static size_t fuzz_seed(int number, uint8_t *out) {
    static const int dtypes[3] = {TFM_F32, TFM_F16, TFM_BF16};
    tfm_ctx *c = fuzz_context();
    const tfm_marker mark = tfm_mark(c);
    tfm_cache_options o;
    tfm_cache *cache;
    int64_t n = 0, counts[2] = {2, 3};
    if (number > 2) return 0;
    memset(&o, 0, sizeof o);
    o.dtype = dtypes[number];
    o.layers = 1 + number;
    o.batch = 2;
    o.heads = 1 + number;
    o.key_size = 5;
    o.value_size = 3;
    o.capacity = 6;
    cache = tfm_cache_create(c, &o);
    if (cache
        && !tfm_cache_append(c, cache, 0, tfm_ones(c, TFM_SHAPE(2, o.heads, 3, 5)),
                             tfm_ones(c, TFM_SHAPE(2, o.heads, 3, 3)), tfm_from(c, TFM_I64, TFM_SHAPE(2), counts))) {
        n = tfm_cache_saved_size(cache);
        if (n > FUZZ_ROOM || tfm_cache_save(c, cache, out, n)) n = 0;
    }
    tfm_cache_destroy(cache);
    tfm_clear(c);
    tfm_rewind(c, mark);
    return (size_t)n;
}

static const char *const *fuzz_words(void) {
    static const char *const words[] = {"\x01\x01\x01\x01\x01\x01\x01\x01", "\xff\xff\xff\xff\xff\xff\xff\x7f", NULL};
    return words;
}

/* Nothing to repair: mutations in the head are what counts, so most of the payload is put back. */
static void fuzz_mend(uint8_t *data, size_t size) {
    (void)data;
    (void)size;
}
#endif

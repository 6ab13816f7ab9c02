/* Any bytes as a checkpoint of llama2.c: what is accepted becomes a model that generates. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    tfm_ctx *c = fuzz_context();
    const tfm_marker mark = tfm_mark(c);
    tfm_params *p = tfm_params_create(c);
    tfm_transformer_config config;
    tfm_transformer model;
    static const int64_t begin = 0;
    tfm_prompt prompt = {1, &begin};
    tfm_generate_options o;
    tfm_sequence out;
    tfm_session *s = NULL;
    tfm_status status = tfm_llama2c_load_memory(c, p, data, (int64_t)size, &config);
    memset(&o, 0, sizeof o);
    o.max_new = 3;
    tfm_params_strict(p, 1);
    if (!status) status = tfm_transformer_init(c, p, "", &config, &model);
    if (!status) status = tfm_params_prepare(c, p);
    if (!status) s = tfm_session_create(c, &model, NULL);
    if (s) status = tfm_generate(c, s, &prompt, 1, &o, &out);
    tfm_clear(c);
    tfm_session_destroy(s);
    tfm_params_destroy(p);
    tfm_rewind(c, mark);
    return 0;
}

#if !defined(TFM_LIBFUZZER)
static size_t fuzz_seed(int number, uint8_t *out) {
    static const int32_t heads[][7] = {{4, 3, 2, 2, 1, 5, 6}, {8, 8, 1, 2, 2, -7, 4}, {2, 1, 1, 1, 1, 1, 1}};
    const int32_t *h;
    int64_t floats, i, d, kv, layer;
    if (number >= 3) return 0;
    h = heads[number];
    d = h[0];
    kv = d / h[3] * h[4];
    layer = 2 * d + 2 * d * d + 2 * kv * d + 3 * h[1] * d;
    floats = (h[5] < 0 ? -2 * h[5] : h[5]) * d + h[2] * layer + d + h[6] * (d / h[3]);
    memcpy(out, h, 28);
    for (i = 0; i < floats; i++) {
        const float x = (float)(i % 17) / 16 - 0.5f;
        memcpy(out + 28 + 4 * i, &x, 4);
    }
    return (size_t)(28 + 4 * floats);
}

static const char *const *fuzz_words(void) {
    static const char *const words[] = {"\x01\x01\x01\x01", "24ka", NULL};
    return words;
}

/* Sizes stay small and the file long enough in half of the cases, so that models come into being. */
static void fuzz_mend(uint8_t *data, size_t size) {
    static uint8_t seed[FUZZ_ROOM];
    int number;
    for (number = 0; number < 3; number++)
        if (size >= 28 && fuzz_seed(number, seed) == size) memcpy(data, seed, 28);
}
#endif

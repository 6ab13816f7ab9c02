/* Any bytes as a safetensors file: opened, every tensor looked at, loaded under rules, written and read again. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const tfm_rule rules[] = {{TFM_RULE_TRANSPOSE, "*.t", "*.turned", 0, 0},
                                     {TFM_RULE_SPLIT, "s", "s.0", 0, 2},
                                     {TFM_RULE_SPLIT, "s", "s.1", 1, 2},
                                     {TFM_RULE_CONCAT, "c.0", "c", 0, 2},
                                     {TFM_RULE_CONCAT, "c.1", "c", 1, 2}};
    tfm_ctx *c = fuzz_context();
    const tfm_marker mark = tfm_mark(c);
    tfm_params *p = tfm_params_create(c), *back = tfm_params_create(c);
    tfm_file *f = tfm_file_open_memory(c, data, (int64_t)size);
    tfm_load_options o;
    int64_t i, n = tfm_file_count(f);
    tfm_status status;
    memset(&o, 0, sizeof o);
    o.rules = rules;
    o.rule_count = sizeof rules / sizeof rules[0];
    o.cast = (int)(size & 1);
    o.dtype = TFM_BF16;
    for (i = 0; i < n; i++) {
        tfm_tensor *t = tfm_file_tensor(c, f, tfm_file_name(f, i));
        if (t && tfm_numel(t)) {
            float x = 0;
            int64_t last[TFM_MAX_DIMS];
            int d;
            for (d = 0; d < t->ndim; d++) last[d] = t->shape[d] - 1;
            x = (float)tfm_get(t, last);
            (void)x;
        }
        tfm_clear(c);
    }
    (void)tfm_file_metadata(f, "format");
    if (f) status = tfm_params_load_file(c, p, f, &o);
    tfm_clear(c);
    n = tfm_params_saved_size(p);
    if (n > 0 && n < 1 << 20) {
        void *saved = malloc((size_t)n);
        status = tfm_params_save_memory(c, p, saved, n);
        /* what we write we can read */
        if (!status
            && (tfm_params_load_memory(c, back, saved, n, NULL) || tfm_params_count(back) != tfm_params_count(p)))
            abort();
        free(saved);
    }
    tfm_clear(c);
    status = tfm_params_load_memory(c, back, data, (int64_t)size, NULL);
    (void)status;
    tfm_clear(c);
    tfm_file_close(f);
    tfm_params_destroy(p);
    tfm_params_destroy(back);
    tfm_rewind(c, mark);
    return 0;
}

#if !defined(TFM_LIBFUZZER)
static size_t fuzz_seed(int number, uint8_t *out) {
    static const struct {
        const char *header;
        size_t bytes;
    } seeds[] = {
        {"{\"a.t\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},\"s\":{\"dtype\":\"F16\",\"shape\":[2,1]"
         ",\"data_offsets\":[24,28]}}",
         28},
        {"{\"c.0\":{\"dtype\":\"U8\",\"shape\":[1,2],\"data_offsets\":[0,2]},\"c.1\":{\"dtype\":\"U8\",\"shape\":[2,2],"
         "\"data_offsets\":[2,6]},"
         "\"__metadata__\":{\"format\":\"pt\",\"k\":\"\\u00e9\\n\"}}  ",
         6},
        {"{\"x\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8],\"more\":[1,{\"y\":null}]},\"\":{\"dtype\":"
         "\"BOOL\",\"shape\":[0],\"data_offsets\":[8,8]}}",
         8},
        {"{\"f\":{\"dtype\":\"F8_E4M3\",\"shape\":[1,1,1,1,1,1,1,2],\"data_offsets\":[0,2]},\"i\":{\"dtype\":\"I64\","
         "\"shape\":[1],\"data_offsets\":[2,10]}}",
         10},
        {"{}", 0},
    };
    size_t n, i;
    if (number >= (int)(sizeof seeds / sizeof seeds[0])) return 0;
    n = strlen(seeds[number].header);
    for (i = 0; i < 8; i++) out[i] = (uint8_t)(n >> (8 * i));
    memcpy(out + 8, seeds[number].header, n);
    memset(out + 8 + n, 0x3c, seeds[number].bytes);
    return 8 + n + seeds[number].bytes;
}

static const char *const *fuzz_words(void) {
    static const char *const words[] = {"{",
                                        "}",
                                        "[",
                                        "]",
                                        ",",
                                        ":",
                                        "\"",
                                        "\\",
                                        "\\u0041",
                                        "\\ud800",
                                        "\\udc00",
                                        "0",
                                        "-1",
                                        "1e5",
                                        "9223372036854775807",
                                        "18446744073709551615",
                                        "4294967296",
                                        "\"dtype\"",
                                        "\"shape\"",
                                        "\"data_offsets\"",
                                        "\"F32\"",
                                        "\"__metadata__\"",
                                        "true",
                                        "null",
                                        "\xc3\xa9",
                                        "\xf0\x9f\x98\x80",
                                        " ",
                                        NULL};
    return words;
}

/* The header ends where the last brace stands, most of the time. */
static void fuzz_mend(uint8_t *data, size_t size) {
    size_t n = size, i;
    while (n > 8 && data[n - 1] != '}') n--;
    for (i = 0; size >= 8 && i < 8; i++) data[i] = (uint8_t)((n - 8) >> (8 * i));
}
#endif

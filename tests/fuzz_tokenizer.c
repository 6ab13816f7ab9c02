/* Any bytes as a tokenizer file or a line vocabulary, and as a text to encode with it. First byte: which; second: the
 * size of the vocabulary. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    tfm_ctx *c = fuzz_context();
    const tfm_marker mark = tfm_mark(c);
    tfm_tokenizer *t;
    int64_t *ids = NULL, count = 0, i, length = 0;
    char text[64];
    size_t n;
    if (size < 2) return 0;
    if (data[0] & 1) t = tfm_tokenizer_lines_memory(c, data + 2, (int64_t)size - 2, data[0] & 2 ? 0 : -1);
    else t = tfm_tokenizer_llama2c_memory(c, data + 2, (int64_t)size - 2, data[1]);
    n = size < 63 ? size : 63;
    memcpy(text, data + size - n, n);
    text[n] = 0;
    for (i = 0; t && i < tfm_tokenizer_size(t); i++) {
        const char *piece = tfm_tokenizer_piece(t, i & 1 ? 1 : -1, i, &length);
        if ((int64_t)strlen(piece) != length) abort();
    }
    if (t && tfm_tokenizer_encode(c, t, text, data[0] & 4 ? 1 : 0, 1, &ids, &count) == TFM_OK)
        for (i = 0; i < count; i++)
            if (ids[i] < 0 || (ids[i] >= tfm_tokenizer_size(t) && ids[i] > 2)) abort();
    tfm_clear(c);
    if (t) (void)tfm_tokenizer_decode(c, t, ids, count);
    tfm_clear(c);
    tfm_tokenizer_destroy(t);
    tfm_rewind(c, mark);
    return 0;
}

#if !defined(TFM_LIBFUZZER)
static size_t fuzz_seed(int number, uint8_t *out) {
    static const char *const tokens[] = {"<unk>", "\n<s>\n", "\n</s>\n", "<0x00>", " ",      "a", "b", "ab",
                                         " a",    "aba",     "\xc3\xa9", "<0x-1>", "<0xFF>", "",  "a"};
    static const char lines[] = "\3x<s>\n</s>\na\nab\r\n\n b a ab";
    size_t n = 6, i;
    if (number == 1) {
        memcpy(out, lines, sizeof lines - 1);
        return sizeof lines - 1;
    }
    if (number > 1) return 0;
    memset(out, 0, 6);
    out[1] = (uint8_t)(sizeof tokens / sizeof tokens[0]);
    for (i = 0; i < sizeof tokens / sizeof tokens[0]; i++) {
        const float score = (float)i - 7;
        const int32_t length = (int32_t)strlen(tokens[i]);
        memcpy(out + n, &score, 4);
        memcpy(out + n + 4, &length, 4);
        memcpy(out + n + 8, tokens[i], (size_t)length);
        n += 8 + (size_t)length;
    }
    return n;
}

static const char *const *fuzz_words(void) {
    static const char *const words[] = {"<0x", "<0x41>", "\n", "\r\n", " ", "a", "ab", "\xff", "\x80", "\xc3", NULL};
    return words;
}

static void fuzz_mend(uint8_t *data, size_t size) {
    /* as many tokens as there are */
    size_t at = 6, count = 0;
    if (size < 6 || data[0] & 1) return;
    while (size - at >= 8) {
        int32_t length;
        memcpy(&length, data + at + 4, 4);
        if (length < 0 || (size_t)length > size - at - 8) break;
        at += 8 + (size_t)length;
        count++;
    }
    data[1] = (uint8_t)count;
}
#endif

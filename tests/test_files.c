/* safetensors: what is read, what is refused and how, what loading rules do, what is written. */
#define _GNU_SOURCE
#include "test.h"

#include <limits.h>
#if !defined(_WIN32)
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#if defined(__linux__)
#include <signal.h>
#include <sys/inotify.h>
#include <sys/resource.h>
#endif
#define MAPPED 1 /* files are mapped, so that a store can use their bytes; a file that was read is copied and let go */
#else
#define MAPPED 0
#endif

/* ---- files made on the spot ------------------------------------------------------------------------------------- */

typedef struct blob {
    unsigned char *data;
    int64_t size;
} blob;

/* A file with this header and `bytes` bytes of data 0, 1, 2, ...: as 32-bit numbers 0x03020100 and so on. */
static blob file_of(const char *header, int64_t bytes) {
    const int64_t n = (int64_t)strlen(header);
    blob b;
    int64_t i;
    b.size = 8 + n + bytes;
    b.data = (unsigned char *)malloc((size_t)b.size);
    cr_assert_not_null(b.data);
    for (i = 0; i < 8; i++) b.data[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(b.data + 8, header, (size_t)n);
    for (i = 0; i < bytes; i++) b.data[8 + n + i] = (unsigned char)i;
    return b;
}

/* The same with floats 0, 1, 2, ... as data, at a multiple of 8 as writers put it. */
static blob floats_of(const char *header, int64_t count) {
    char padded[1024];
    blob b;
    int64_t i;
    snprintf(padded, sizeof padded, "%-*s", (int)((strlen(header) + 7) / 8 * 8), header);
    b = file_of(padded, count * 4);
    for (i = 0; i < count; i++) {
        const float x = (float)i;
        memcpy(b.data + b.size - 4 * (count - i), &x, 4);
    }
    return b;
}

static tfm_ctx *context(void) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    return tfm_create(&o);
}

/* The header is refused with TFM_FORMAT and this phrase in the error. */
static void refuse(const char *header, int64_t bytes, const char *phrase) {
    tfm_ctx *c = context();
    blob b = file_of(header, bytes);
    tfm_file *f = tfm_file_open_memory(c, b.data, b.size);
    cr_assert_null(f, "%s was accepted", header);
    cr_expect_eq(tfm_status_of(c), TFM_FORMAT, "%s: %s", header, tfm_error(c));
    cr_expect_not_null(strstr(tfm_error(c), phrase), "%s: %s", header, tfm_error(c));
    free(b.data);
    tfm_destroy(c);
}

static void accept(const char *header, int64_t bytes, int64_t count) {
    tfm_ctx *c = context();
    blob b = file_of(header, bytes);
    tfm_file *f = tfm_file_open_memory(c, b.data, b.size);
    cr_assert_not_null(f, "%s: %s", header, tfm_error(c));
    cr_expect_eq(tfm_file_count(f), count, "%s", header);
    tfm_file_close(f);
    free(b.data);
    tfm_destroy(c);
}

/* Element by element, so that it works for tensors of any context and of none. */
static void expect_values(const tfm_tensor *t, const float *expected) {
    int64_t index[TFM_MAX_DIMS] = {0}, i;
    int d;
    cr_assert_not_null(t);
    for (i = 0; i < tfm_numel(t); i++) {
        cr_assert_eq(tfm_get(t, index), (double)expected[i], "element %lld is %g, expected %g", (long long)i,
                     tfm_get(t, index), (double)expected[i]);
        for (d = t->ndim - 1; d >= 0 && ++index[d] == t->shape[d]; d--) index[d] = 0;
    }
}

/* ---- reading ---------------------------------------------------------------------------------------------------- */

/* Every file of huggingface's tests, with the words that our text has for the error class of expected.json. */
Test(files, hostile_files_behave_as_the_reference_says) {
    static const struct {
        const char *name, *phrase;
    } table[] = {
        {"test_empty_shapes_allowed", NULL},
        {"test_deserialization", NULL},
        {"test_lifetimes", NULL},
        {"test_metadata_incomplete_buffer_1", "incomplete buffer"},
        {"test_metadata_incomplete_buffer_2", "incomplete buffer"},
        {"test_header_too_large", "header too large"},
        {"test_header_too_small", "header too small"},
        {"test_invalid_header_length", "invalid header length"},
        {"test_invalid_header_non_utf8", "invalid header: not UTF-8"},
        {"test_invalid_header_not_json", "invalid header (not the JSON"},
        {"test_whitespace_padded_header", NULL},
        {"test_whitespace_leading_padded_header", NULL},
        {"test_zero_sized_tensor", NULL},
        {"test_invalid_info", "invalid tensor info"},
        {"test_validation_overflow_1", "overflow"},
        {"test_validation_overflow_2", "overflow"},
        {"abuse_attempt_1", "invalid header length"},
        {"abuse_attempt_3_overlap", "invalid offset"},
    };
    size_t i;
    cr_assert_eq(sizeof table / sizeof table[0], 18u);
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        char name[128], path[512];
        tfm_ctx *c;
        tfm_file *f;
        char *data;
        size_t size = 0;
        int from_memory;
        snprintf(name, sizeof name, "hostile-safetensors/%s.safetensors", table[i].name);
        test_need_shared(path, sizeof path, name);
        c = context();
        data = test_read_file(path, &size);
        for (from_memory = 0; from_memory < 2; from_memory++) {
            f = from_memory ? tfm_file_open_memory(c, data, (int64_t)size) : tfm_file_open(c, path);
            cr_expect_eq(f != NULL, table[i].phrase == NULL, "%s: %s", table[i].name, tfm_error(c));
            if (!f && table[i].phrase) {
                cr_expect_eq(tfm_status_of(c), TFM_FORMAT, "%s", table[i].name);
                cr_expect_not_null(strstr(tfm_error(c), table[i].phrase), "%s: %s", table[i].name, tfm_error(c));
            }
            if (f && tfm_file_count(f))
                cr_expect_not_null(tfm_file_tensor(c, f, "test"), "%s: %s", table[i].name, tfm_error(c));
            tfm_clear(c);
            tfm_file_close(f);
        }
        free(data);
        tfm_destroy(c);
    }
}

#define INFO(dtype, shape, begin, end) \
    "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

Test(files, json_is_read_strictly) {
    refuse("", 0, "it is not an object");
    refuse("[]", 0, "it is not an object");
    refuse("{} x", 0, "something stands after it");
    refuse("{}{}", 0, "something stands after it");
    refuse("{\"a\":" INFO("U8", "[1]", 0, 1) ",}", 1, "a comma stands before the end");
    refuse("{\"a\":" INFO("U8", "[1,]", 0, 1) "}", 1, "a comma stands before the end");
    refuse("{\"a\":" INFO("U8", "[1 1]", 0, 1) "}", 1, "a comma or the end");
    refuse("{\"a\"" INFO("U8", "[1]", 0, 1) "}", 1, "a colon is missing");
    refuse("{a:" INFO("U8", "[1]", 0, 1) "}", 1, "a string is missing");
    refuse("{\"a\":" INFO("U8", "[01]", 0, 1) "}", 1, "begins with 0");
    refuse("{\"a\":" INFO("U8", "[1.0]", 0, 1) "}", 1, "not whole");
    refuse("{\"a\":" INFO("U8", "[1e0]", 0, 1) "}", 1, "not whole");
    refuse("{\"a\":" INFO("U8", "[1E0]", 0, 1) "}", 1, "not whole");
    refuse("{\"a\":{\"shape\":[1", 0, "a comma or the end");
    refuse("{\"a\":" INFO("U8", "[-1]", 0, 1) "}", 1, "not negative");
    refuse("{\"a\":" INFO("U8", "[\"1\"]", 0, 1) "}", 1, "whole number");
    refuse("{\"a\":" INFO("U8", "1", 0, 1) "}", 1, "shape is not a list");
    refuse("{\"a\":" INFO("U9", "[1]", 0, 1) "}", 1, "dtype");
    refuse("{\"a\":[]}", 0, "not an object");
    refuse("{\"a\":{}}", 0, "is missing");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[]}}", 1, "is missing");
    refuse("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "twice");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", 1, "more than two");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "not two");
    refuse("{\"a\x01\":" INFO("U8", "[1]", 0, 1) "}", 1, "control character");
    refuse("{\"a\\x\":" INFO("U8", "[1]", 0, 1) "}", 1, "unknown escape");
    refuse("{\"a\\u12g4\":" INFO("U8", "[1]", 0, 1) "}", 1, "hexadecimal");
    refuse("{\"a\\u0000\":" INFO("U8", "[1]", 0, 1) "}", 1, "NUL");
    refuse("{\"a\\ud800\":" INFO("U8", "[1]", 0, 1) "}", 1, "surrogate");
    refuse("{\"a\\udc00\":" INFO("U8", "[1]", 0, 1) "}", 1, "surrogate");
    refuse("{\"a\\udc00\\udc00\":" INFO("U8", "[1]", 0, 1) "}", 1, "surrogate");
    refuse("{\"a\\ud800\\x\":" INFO("U8", "[1]", 0, 1) "}", 1, "surrogate");
    refuse("{\"a\\ud800\\u0041\":" INFO("U8", "[1]", 0, 1) "}", 1, "surrogate");
    refuse("{\"a\\ud800\\ue000\":" INFO("U8", "[1]", 0, 1) "}", 1, "surrogate");
    refuse("{\"a\\ud800", 0, "surrogate");
    refuse("{\"a\\u00G0\":" INFO("U8", "[1]", 0, 1) "}", 1, "hexadecimal");
    refuse("{\"a\\u12", 0, "hexadecimal");
    refuse("{\"a", 0, "does not end");
    refuse("{\"a\\", 0, "unknown escape");
    refuse("{\"__metadata__\":[]}", 0, "__metadata__ is not an object");
    refuse("{\"__metadata__\":{\"a\":1}}", 0, "a string is missing");
    refuse("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "twice");
    refuse("\xef\xbb\xbf{}", 0, "not an object"); /* byte order mark */
    refuse("{\"\xc0\xaf\":0}", 0, "not UTF-8");   /* overlong */
    refuse("{\"\xed\xa0\x80\":0}", 0, "not UTF-8");
    refuse("{\"\xf4\x90\x80\x80\":0}", 0, "not UTF-8");
    refuse("{\"\xe2\x82\":0}", 0, "not UTF-8");
}

Test(files, names_may_be_any_text) {
    static const char header[] =
        "{\"\":" INFO("U8", "[1]", 0, 1) ",\"a\\\"\\\\\\/\\b\\f\\n\\r\\t \\u00E9\\u20ac\\uD83D\\ude00\":" INFO(
            "U8", "[1]", 1, 2) ",\"%s%n%d\":" INFO("U8", "[1]", 2, 3) ",\"\xf0\x9f\x98\x80\":" INFO("U8", "[1]", 3,
                                                                                                    4) "}";
    static const char *const names[4] = {"", "a\"\\/\b\f\n\r\t \xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", "%s%n%d",
                                         "\xf0\x9f\x98\x80"};
    tfm_ctx *c = context();
    blob b = file_of(header, 4);
    tfm_file *f = tfm_file_open_memory(c, b.data, b.size);
    int64_t i;
    cr_assert_not_null(f, "%s", tfm_error(c));
    for (i = 0; i < 4; i++) {
        cr_expect_str_eq(tfm_file_name(f, i), names[i]);
        cr_expect_eq(tfm_item(tfm_file_tensor(c, f, names[i])), (double)i);
    }
    cr_expect_null(tfm_file_name(f, 4));
    cr_expect_null(tfm_file_name(f, -1));
    assert_refused(c, tfm_file_tensor(c, f, "%s%s%n"), TFM_INVALID);
    tfm_file_close(f);
    free(b.data);
    tfm_destroy(c);
}

/* A long name is cut, but not through a character: the text of an error is UTF-8. */
Test(files, errors_show_whole_characters) {
    char header[512], name[181];
    int shift, i;
    for (shift = 0; shift < 3; shift++) {
        tfm_ctx *c = context();
        const char *text, *p;
        blob b;
        memset(name, 'x', sizeof name);
        for (i = shift; i + 3 < (int)sizeof name; i += 3) memcpy(name + i, "\xe2\x82\xac", 3);
        name[i] = 0;
        snprintf(header, sizeof header, "{\"%s\":" INFO("F32", "[2]", 0, 9) "}", name);
        b = file_of(header, 9);
        assert_refused(c, tfm_file_open_memory(c, NULL, -1), TFM_INVALID);
        cr_assert_null(tfm_file_open_memory(c, b.data, b.size));
        text = tfm_error(c);
        p = strstr(text, "\xe2\x82\xac");
        cr_assert_not_null(p, "%s", text);
        for (; *p == '\xe2'; p += 3) cr_assert(p[1] == '\x82' && p[2] == '\xac', "half a character in %s", text);
        cr_assert_eq(*p, '"', "half a character in %s", text);
        tfm_destroy(c);
        free(b.data);
    }
}

Test(files, unknown_fields_are_read_over_to_a_bounded_depth) {
    char deep[512];
    size_t n;
    int nested;
    accept("{\"a\":{\"x\":[1,-2.5e+3,{\"y\":[true,false,null]},\"\\u00e9\"],\"dtype\":\"U8\",\"shape\":[1],\"data_"
           "offsets\":[0,1]}}",
           1, 1);
    refuse("{\"a\":{\"x\":[1,-],\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "digit");
    refuse("{\"a\":{\"x\":nul,\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "a value is missing");
    refuse("{\"a\":{\"x\":1.,\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "digit");
    n = (size_t)snprintf(deep, sizeof deep, "{\"a\":{\"x\":");
    memset(deep + n, '[', 200);
    deep[n + 200] = 0;
    refuse(deep, 0, "too deep");
    for (nested = 64; nested <= 65; nested++) { /* to the last */
        n = (size_t)snprintf(deep, sizeof deep, "{\"a\":{\"x\":");
        memset(deep + n, '[', (size_t)nested);
        memset(deep + n + nested, ']', (size_t)nested);
        snprintf(deep + n + 2 * nested, sizeof deep - n - 2 * (size_t)nested, ",%s}",
                 &INFO("U8", "[1]", 0, 1)[1]);
        if (nested == 64) accept(deep, 1, 1);
        else refuse(deep, 1, "too deep");
    }
    refuse("{\"a\":{\"x\":t", 0, "a value is missing");
}

Test(files, duplicate_names_are_refused) {
    refuse(
        "{\"a\":" INFO("U8", "[1]", 0, 1) ",\"b\":" INFO("U8", "[1]", 1, 2) ",\"\\u0061\":" INFO("U8", "[1]", 2, 3) "}",
        3, "duplicate name");
    refuse("{\"__metadata__\":{\"k\":\"1\",\"j\":\"2\",\"k\":\"3\"}}", 0, "duplicate name in __metadata__");
}

Test(files, data_has_no_overlap_and_no_hole) {
    accept("{\"b\":" INFO("U8", "[3]", 2, 5) ",\"a\":" INFO("U8", "[2]", 0, 2) "}", 5, 2);
    accept("{\"e\":" INFO("F32", "[0]", 2, 2) ",\"a\":" INFO("U8", "[2]", 0, 2) ",\"b\":" INFO("U8", "[1]", 2, 3) "}",
           3, 3);
    refuse("{\"a\":" INFO("U8", "[2]", 0, 2) ",\"b\":" INFO("U8", "[2]", 1, 3) "}", 3, "invalid offset");
    refuse("{\"a\":" INFO("U8", "[2]", 0, 2) ",\"b\":" INFO("U8", "[2]", 3, 5) "}", 5, "invalid offset");
    refuse("{\"a\":" INFO("U8", "[1]", 1, 2) "}", 2, "invalid offset");
    refuse("{\"a\":" INFO("U8", "[0]", 1, 0) "}", 1, "invalid offset");
    refuse("{\"a\":" INFO("F32", "[2]", 0, 7) "}", 7, "invalid tensor info");
    refuse("{\"a\":" INFO("F4", "[3]", 0, 2) "}", 2, "invalid tensor info"); /* 12 bits */
    refuse("{\"a\":" INFO("F4", "[3]", 0, 1) "}", 1, "invalid tensor info");
    refuse("{\"a\":" INFO("U8", "[2305843009213693952]", 0, 0) "}", 0, "overflow"); /* bits */
    refuse("{\"a\":" INFO("U8", "[4294967296,4294967296]", 0, 0) "}", 0, "overflow");
    refuse("{\"a\":" INFO("U8", "[99999999999999999999]", 0, 0) "}", 0, "overflow");
    refuse("{\"a\":" INFO("U8", "[1]", 0, 18446744073709551617) "}", 1, "overflow");
    refuse("{\"a\":" INFO("U8", "[1]", 0, 1) "}", 2, "incomplete buffer");
    refuse("{\"a\":" INFO("U8", "[2]", 0, 2) "}", 1, "incomplete buffer");
}

/* What we do not offer hurts only who asks for it. */
Test(files, types_not_offered_are_unsupported_when_asked_for) {
    static const char header[] =
        "{\"f8\":" INFO("F8_E4M3", "[2]", 0, 2) ",\"u16\":" INFO("U16", "[1]", 2, 4) ",\"seven\":" INFO(
            "U8", "[1,1,1,1,1,1,2]", 4,
            6) ",\"c64\":" INFO("C64", "[1]", 6, 14) ",\"f4\":" INFO("F4", "[4]", 14,
                                                                     16) ",\"six\":" INFO("U8", "[1,1,2,1,1,1]", 16,
                                                                                          18) "}";
    tfm_load_options o;
    static const tfm_rule skip[] = {{TFM_RULE_SKIP, "f*", NULL, 0, 0},
                                    {TFM_RULE_SKIP, "u*", NULL, 0, 0},
                                    {TFM_RULE_SKIP, "seven", NULL, 0, 0},
                                    {TFM_RULE_SKIP, "c64", NULL, 0, 0}};
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    blob b = file_of(header, 18);
    tfm_file *f = tfm_file_open_memory(c, b.data, b.size);
    cr_assert_not_null(f, "%s", tfm_error(c));
    assert_refused(c, tfm_file_tensor(c, f, "f8"), TFM_UNSUPPORTED);
    assert_refused(c, tfm_file_tensor(c, f, "u16"), TFM_UNSUPPORTED);
    assert_refused(c, tfm_file_tensor(c, f, "seven"), TFM_UNSUPPORTED);
    assert_refused(c, tfm_file_tensor(c, f, "c64"), TFM_UNSUPPORTED);
    assert_refused(c, tfm_file_tensor(c, f, "f4"), TFM_UNSUPPORTED);
    cr_expect_eq(tfm_file_tensor(c, f, "six")->ndim, 6);
    assert_verb_refused(c, tfm_params_load_file(c, p, f, NULL), TFM_UNSUPPORTED);
    cr_expect_eq(tfm_params_count(p), 0, "nothing is loaded when something cannot be");
    memset(&o, 0, sizeof o);
    o.rules = skip;
    o.rule_count = 4;
    assert_ok(c, tfm_params_load_file(c, p, f, &o));
    cr_expect_eq(tfm_params_count(p), 1);
    tfm_file_close(f);
    tfm_params_destroy(p);
    free(b.data);
    tfm_destroy(c);
}

Test(files, every_offered_dtype_scalars_and_empty_tensors) {
    static const char header[] =
        "{\"F32\":" INFO("F32", "[]", 0, 4)
        ",\"F16\":" INFO("F16", "[2]", 4, 8)
        ",\"BF16\":" INFO("BF16", "[2,1]", 8, 12)
        ",\"F64\":" INFO("F64", "[1]", 12, 20)
        ",\"I64\":" INFO("I64", "[1]", 20, 28)
        ",\"I32\":" INFO("I32", "[1]", 28, 32)
        ",\"I8\":" INFO("I8", "[1]", 32, 33)
        ",\"U8\":" INFO("U8", "[1]", 33, 34)
        ",\"BOOL\":" INFO("BOOL", "[1]", 34, 35)
        ",\"none\":" INFO("F32", "[3,0,2]", 35, 35) "}";
    static const char *const names[9] = {"F32", "F16", "BF16", "F64", "I64", "I32", "I8", "U8", "BOOL"};
    tfm_ctx *c = context();
    blob b = file_of(header, 35);
    tfm_file *f = tfm_file_open_memory(c, b.data, b.size);
    const tfm_tensor *none;
    int i;
    cr_assert_not_null(f, "%s", tfm_error(c));
    for (i = 0; i < 9; i++) {
        const tfm_tensor *t = tfm_file_tensor(c, f, names[i]);
        cr_assert_not_null(t, "%s", tfm_error(c));
        cr_expect_eq(t->dtype, i, "%s", names[i]);
        cr_expect_eq((uintptr_t)t->data % (uintptr_t)tfm_dtype_size(t->dtype), 0u, "%s is not aligned", names[i]);
    }
    cr_expect_eq(tfm_file_tensor(c, f, "F32")->ndim, 0);
    cr_expect_eq(tfm_item(tfm_file_tensor(c, f, "I32")), 0x1f1e1d1c);
    none = tfm_file_tensor(c, f, "none");
    cr_assert_not_null(none);
    cr_expect_eq(tfm_numel(none), 0);
    cr_expect_eq(none->shape[2], 2);
    tfm_file_close(f);
    free(b.data);
    tfm_destroy(c);
}

/* They may be constant memory. What is unaligned, and so a copy, is refused as well: it depends on the file. */
Test(files, tensors_of_a_file_are_not_written) {
    static const int64_t first[1] = {0};
    int shift, view;
    for (shift = 0; shift < 2; shift++) {
        tfm_ctx *c = context();
        blob b = floats_of("{\"a\":" INFO("F32", "[4]", 0, 16) "}", 4);
        unsigned char *moved = (unsigned char *)malloc((size_t)b.size + 1);
        static const float expected[4] = {0, 1, 2, 3};
        tfm_file *f;
        tfm_tensor *t, *copy;
        memcpy(moved + shift, b.data, (size_t)b.size);
        f = tfm_file_open_memory(c, moved + shift, b.size);
        cr_assert_not_null(f);
        t = tfm_file_tensor(c, f, "a");
        copy = tfm_clone(c, t);
        assert_made(c, copy);
        for (view = 0; view < 2; view++) {
            tfm_tensor *part = view ? tfm_narrow(c, tfm_reshape(c, t, TFM_SHAPE(2, 2)), 0, 1, 1) : t;
            part = view ? tfm_reshape(c, part, TFM_SHAPE(2)) : part;
            assert_made(c, part);
            cr_expect_eq(tfm_set(c, part, first, 7), TFM_INVALID);
            cr_expect_not_null(strstr(tfm_error(c), "tfm_set: t is of a file"), "%s", tfm_error(c));
            tfm_clear(c);
            assert_verb_refused(c, tfm_copy(c, part, tfm_ones(c, TFM_SHAPE(1))), TFM_INVALID);
        }
        expect_values(t, expected);
        assert_ok(c, tfm_set(c, copy, first, 7));
        tfm_file_close(f);
        free(moved);
        free(b.data);
        tfm_destroy(c);
    }
}

/* Data at an address that suits its type is not copied; other data is. */
Test(files, aligned_data_is_a_view_and_unaligned_data_a_copy) {
    int shift;
    for (shift = 0; shift < 8; shift++) {
        tfm_ctx *c = context();
        blob b = floats_of("{\"a\":" INFO("F32", "[4]", 0, 16) "}", 4);
        unsigned char *moved = (unsigned char *)malloc((size_t)b.size + 8);
        static const float expected[4] = {0, 1, 2, 3};
        tfm_file *f;
        const tfm_tensor *t;
        int inside;
        memcpy(moved + shift, b.data, (size_t)b.size);
        f = tfm_file_open_memory(c, moved + shift, b.size);
        cr_assert_not_null(f);
        t = tfm_file_tensor(c, f, "a");
        cr_assert_not_null(t);
        inside = (const unsigned char *)t->data >= moved && (const unsigned char *)t->data < moved + shift + b.size;
        cr_expect_eq(inside, (uintptr_t)(moved + shift + b.size - 16) % 4 == 0);
        expect_values(t, expected);
        tfm_file_close(f);
        free(moved);
        free(b.data);
        tfm_destroy(c);
    }
}

/* Less than the length says, by the bytes in front of the header or fewer: nothing behind the end is read. */
Test(files, a_header_ends_with_the_file_at_the_latest) {
    static const char header[] = "{\"a\":" INFO("U8", "[0]", 0, 0) "}";
    int64_t cut;
    for (cut = 1; cut <= 8; cut++) {
        tfm_ctx *c = context();
        const blob b = file_of(header, 0);
        unsigned char *exact = (unsigned char *)malloc((size_t)(b.size - cut));
        memcpy(exact, b.data, (size_t)(b.size - cut));
        cr_assert_null(tfm_file_open_memory(c, exact, b.size - cut));
        cr_expect_eq(tfm_status_of(c), TFM_FORMAT);
        cr_expect_not_null(strstr(tfm_error(c), "invalid header length"), "%s", tfm_error(c));
        free(exact);
        free(b.data);
        tfm_destroy(c);
    }
}

Test(files, metadata_by_key) {
    tfm_ctx *c = context();
    blob b = file_of(
        "{\"a\":" INFO("U8", "[1]", 0, 1) ",\"__metadata__\":{\"format\":\"pt\",\"b\":\"\",\"a\":\"%s\"},\"z\":" INFO(
            "U8", "[1]", 1, 2) "}",
        2);
    tfm_file *f = tfm_file_open_memory(c, b.data, b.size);
    cr_assert_not_null(f, "%s", tfm_error(c));
    cr_expect_str_eq(tfm_file_metadata(f, "format"), "pt");
    cr_expect_str_eq(tfm_file_metadata(f, "a"), "%s");
    cr_expect_str_eq(tfm_file_metadata(f, "b"), "");
    cr_expect_null(tfm_file_metadata(f, "c"));
    cr_expect_null(tfm_file_metadata(f, NULL));
    cr_expect(tfm_file_has(f, "z"));
    cr_expect_not(tfm_file_has(f, "__metadata__"));
    cr_expect_eq(tfm_file_count(f), 2);
    tfm_file_close(f);
    free(b.data);
    tfm_destroy(c);
}

/* The worst headers of a size: nothing but braces, nothing but the least metadata, nothing but the least tensors. */
Test(files, memory_is_in_proportion_to_the_file) {
    enum { SIZE = 1 << 20 };
    char *header = (char *)malloc(SIZE + 100);
    int kind;
    for (kind = 0; kind < 3; kind++) {
        test_memory m = test_memory_new();
        tfm_options o;
        tfm_ctx *c;
        blob b;
        size_t n = 0;
        int64_t i, before;
        if (kind == 0) memset(header, '{', SIZE), n = SIZE;
        if (kind == 1) n += (size_t)sprintf(header, "{\"__metadata__\":{");
        if (kind == 2) header[n++] = '{';
        for (i = 0; kind && n < SIZE - 64; i++)
            n += (size_t)(kind == 1 ? sprintf(header + n, "%s\"%llx\":\"\"", i ? "," : "", (unsigned long long)i)
                                    : sprintf(header + n, "%s\"%llx\":" INFO("U8", "[0]", 0, 0), i ? "," : "",
                                              (unsigned long long)i));
        if (kind) n += (size_t)sprintf(header + n, kind == 1 ? "}}" : "}");
        header[n] = 0;
        memset(&o, 0, sizeof o);
        o.threads = 1;
        o.allocator = test_allocator(&m);
        c = tfm_create(&o);
        b = file_of(header, 0);
        before = m.bytes;
        m.peak = m.bytes;
        {
            tfm_file *f = tfm_file_open_memory(c, b.data, b.size);
            cr_expect_eq(f != NULL, kind > 0, "%s", tfm_error(c));
            tfm_file_close(f);
        }
        cr_expect(m.peak - before < 8 * b.size, "%lld bytes for a file of %lld", (long long)(m.peak - before),
                  (long long)b.size);
        tfm_destroy(c);
        free(b.data);
        assert_no_leak(&m);
    }
    free(header);
}

/* ---- paths ------------------------------------------------------------------------------------------------------ */

Test(files, what_cannot_be_opened_is_an_io_error) {
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    tfm_params *p;
    int64_t size = 7;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator = test_allocator(&m);
    c = tfm_create(&o);
    p = tfm_params_create(c);
    assert_refused(c, tfm_file_open(c, ""), TFM_IO);
    assert_refused(c, tfm_file_open(c, "/nowhere/%s%n/file"), TFM_IO);
    assert_refused(c, tfm_file_open(c, "/nowhere/model.safetensors.index.json"), TFM_IO);
    assert_refused(c, tfm_read_file(c, "/nowhere/file", &size), TFM_IO);
    cr_expect_eq(size, 0);
    assert_verb_refused(c, tfm_params_load(c, p, "/nowhere/file", NULL), TFM_IO);
    assert_verb_refused(c, tfm_params_save(c, p, "/nowhere/file"), TFM_IO);
    assert_verb_refused(c, tfm_write_file(c, "/nowhere/file", "x", 1), TFM_IO);
#if !defined(_WIN32)
    assert_refused(c, tfm_read_file(c, "/tmp", &size), TFM_IO); /* a folder */
#endif
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

#if defined(__linux__)
/* Lines of /proc/self/maps with this text. */
static int mappings_of(const char *text) {
    FILE *f = fopen("/proc/self/maps", "r");
    char line[4096];
    int n = 0;
    cr_assert_not_null(f);
    while (fgets(line, sizeof line, f)) n += strstr(line, text) != NULL;
    fclose(f);
    return n;
}

static int open_descriptors(void) {
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    cr_assert_not_null(d);
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

/* A mapping lasts as long as the file is open or a store uses it, a descriptor not even that. */
Test(files, what_is_closed_is_not_mapped_any_more) {
    char path[512], index[600], map[700];
    const int descriptors = open_descriptors();
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    blob b = floats_of("{\"__metadata__\":{\"k\":\"v\"},\"a\":" INFO("F32", "[2]", 0, 8) "}", 2);
    tfm_file *f;
    test_temporary_path(path, sizeof path, "mapped.safetensors");
    snprintf(index, sizeof index, "%s.index.json", path);
    assert_ok(c, tfm_write_file(c, path, b.data, b.size));
    snprintf(map, sizeof map, "{\"weight_map\":{\"a\":\"%s\"}}", strrchr(path, '/') + 1);
    assert_ok(c, tfm_write_file(c, index, map, (int64_t)strlen(map)));
    f = tfm_file_open(c, path);
    assert_made(c, f);
    cr_expect_eq(mappings_of(path), 1);
    tfm_file_close(f);
    cr_expect_eq(mappings_of(path), 0);
    assert_made(c, tfm_read_file(c, path, NULL));
    cr_expect_eq(mappings_of(path), 0);
    f = tfm_file_open(c, index);
    assert_made(c, f);
    cr_expect_eq(mappings_of(index), 0);
    cr_expect_str_eq(tfm_file_metadata(f, "k"), "v", "an index has the metadata of its shards");
    cr_expect_null(tfm_file_metadata(f, "j"));
    assert_ok(c, tfm_params_load_file(c, p, f, NULL));
    tfm_file_close(f);
    cr_expect_eq(mappings_of(path), 1, "the store uses it");
    assert_ok(c, tfm_params_save(c, p, path));
    tfm_params_destroy(p);
    cr_expect_eq(mappings_of(path), 0);
    cr_expect_eq(open_descriptors(), descriptors);
    remove(path);
    remove(index);
    free(b.data);
    tfm_destroy(c);
}

/* Memory that is not the file's is not the file's to drop, wherever it lies. */
Test(files, a_mapped_file_drops_its_own_pages_only) {
    enum { COUNT = 32768 };
    char path[512];
    float wrapped[COUNT]; /* above any mapping */
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    blob b = floats_of("{\"a\":" INFO("F32", "[1,2]", 0, 8) "}", 2);
    int i;
    for (i = 0; i < COUNT; i++) wrapped[i] = 1;
    test_temporary_path(path, sizeof path, "own_pages.safetensors");
    assert_ok(c, tfm_write_file(c, path, b.data, b.size));
    assert_ok(c, tfm_params_load(c, p, path, NULL));
    assert_made(c, tfm_params_wrap(c, p, "b", TFM_F32, TFM_SHAPE(1, COUNT), wrapped));
    assert_ok(c, tfm_params_cast(c, p, TFM_BF16));
    for (i = 0; i < COUNT; i++) cr_assert_eq(wrapped[i], 1.0f, "number %d is lost", i);
    remove(path);
    tfm_params_destroy(p);
    free(b.data);
    tfm_destroy(c);
}
#endif

Test(files, what_cannot_be_mapped_is_read) {
#if defined(__linux__)
    tfm_ctx *c = context();
    int64_t size = 0;
    const char *text = (const char *)tfm_read_file(c, "/proc/self/status", &size); /* says size 0 */
    cr_assert_not_null(text, "%s", tfm_error(c));
    cr_expect_gt(size, 100);
    cr_expect_eq((int64_t)strlen(text), size);
    cr_expect_not_null(strstr(text, "VmRSS"));
    cr_assert_not_null(tfm_read_file(c, "/dev/null", &size));
    cr_expect_eq(size, 0);
    assert_refused(c, tfm_file_open(c, "/dev/null"), TFM_FORMAT);
    tfm_destroy(c);
#endif
}

/* Loads through a pipe, which has no size and cannot be mapped: the same values, and the read copy does not stay. */
Test(files, pipes_can_be_loaded) {
#if defined(__linux__)
    enum { COUNT = 60000 };
    char header[128], path[64];
    test_memory m = test_memory_new();
    tfm_options o;
    static const tfm_rule halves[] = {{TFM_RULE_SPLIT, "a", "low", 0, 2}, {TFM_RULE_SPLIT, "a", "high", 1, 2}};
    tfm_load_options load;
    tfm_ctx *c;
    tfm_params *p;
    blob b;
    int ends[2];
    FILE *feeder;
    snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"F32\",\"shape\":[%d],\"data_offsets\":[0,%d]}}", COUNT / 8,
             COUNT / 2);
    b = floats_of(header, COUNT / 8);
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator = test_allocator(&m);
    c = tfm_create(&o);
    p = tfm_params_create(c);
    cr_assert_eq(pipe(ends), 0);
    feeder = fdopen(ends[1], "wb"); /* 30 KB fit into the pipe */
    cr_assert_eq(fwrite(b.data, 1, (size_t)b.size, feeder), (size_t)b.size);
    fclose(feeder);
    snprintf(path, sizeof path, "/dev/fd/%d", ends[0]);
    memset(&load, 0, sizeof load);
    load.rules = halves;
    load.rule_count = 2;
    assert_ok(c, tfm_params_load(c, p, path, &load));
    close(ends[0]);
    cr_expect_eq(tfm_item(tfm_select(c, tfm_params_find(p, "low"), 0, 1234)), 1234.0);
    cr_expect_eq(tfm_item(tfm_select(c, tfm_params_find(p, "high"), 0, 1234)), 1234.0 + COUNT / 16);
    tfm_destroy(c);
    cr_expect_lt(m.bytes, 2 * b.size);
    tfm_params_destroy(p);
    assert_no_leak(&m);
    free(b.data);
#endif
}

/* A named pipe, whose writer must not lose its only reader in between. Closings tell how often it was read: those of
 * reading are not merged, for each follows an opening. */
Test(files, a_named_pipe_is_opened_once) {
#if defined(__linux__)
    enum { SIZE = 200000 }; /* more than a pipe holds */
    char path[512], events[4096];
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    char *data;
    const char *back;
    int64_t size = 0;
    ssize_t n, at;
    int watch, closed = 0, status = 0;
    pid_t writer;
    if (test_emulated()) cr_skip_test("an emulator need not know inotify");
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator = test_allocator(&m);
    c = tfm_create(&o);
    data = (char *)malloc(SIZE);
    memset(data, 'x', SIZE);
    test_temporary_path(path, sizeof path, "named_pipe");
    cr_assert_eq(mkfifo(path, 0600), 0);
    watch = inotify_init1(IN_NONBLOCK);
    cr_assert(watch >= 0 && inotify_add_watch(watch, path, IN_OPEN | IN_CLOSE) >= 0);
    writer = fork();
    if (!writer) {
        const int fd = open(path, O_WRONLY); /* waits for the reader */
        size_t done = 0;
        usleep(100000); /* time for the reader to come back, if it went: a hang would be no better message */
        while (done < SIZE && (n = write(fd, data + done, SIZE - done)) > 0) done += (size_t)n;
        close(fd);
        _exit(done != SIZE);
    }
    cr_assert(writer > 0);
    back = (const char *)tfm_read_file(c, path, &size);
    cr_assert_not_null(back, "%s", tfm_error(c));
    cr_assert_eq(size, SIZE);
    assert_same_bytes(back, data, SIZE);
    cr_assert_eq(waitpid(writer, &status, 0), writer);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the writer could not write");
    n = read(watch, events, sizeof events);
    for (at = 0; at + (ssize_t)sizeof(struct inotify_event) <= n;) {
        struct inotify_event e;
        memcpy(&e, events + at, sizeof e);
        closed += (e.mask & IN_CLOSE_NOWRITE) != 0;
        at += (ssize_t)(sizeof e + e.len);
    }
    cr_expect_eq(closed, 1, "closed %d times by readers", closed);
    close(watch);
    remove(path);
    free(data);
    tfm_destroy(c);
    assert_no_leak(&m);
#endif
}

/* A handler without SA_RESTART ends what waits, the opening as well as the reading: both are begun again. */
#if !defined(_WIN32)
static volatile sig_atomic_t alarms;
static void count_alarm(int number) {
    (void)number;
    alarms = alarms + 1;
}

Test(files, signals_do_not_end_the_reading_of_a_pipe) {
    static const struct itimerval often = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};
    struct sigaction action, before;
    char path[512];
    tfm_ctx *c;
    const char *back;
    int64_t size = 0;
    int status = 0;
    pid_t writer;
    if (test_emulated()) cr_skip_test("timers of an emulator are not its strength");
    c = context();
    test_temporary_path(path, sizeof path, "slow_pipe");
    cr_assert_eq(mkfifo(path, 0600), 0);
    writer = fork();
    if (!writer) {
        int fd, i, bad = 0;
        usleep(30000);
        fd = open(path, O_WRONLY);
        for (i = 0; i < 3; i++) {
            usleep(30000);
            bad |= write(fd, "abc", 3) != 3;
        }
        close(fd);
        _exit(bad);
    }
    cr_assert(writer > 0);
    memset(&action, 0, sizeof action);
    action.sa_handler = count_alarm;
    sigaction(SIGALRM, &action, &before);
    setitimer(ITIMER_REAL, &often, NULL);
    back = (const char *)tfm_read_file(c, path, &size);
    setitimer(ITIMER_REAL, &never, NULL);
    sigaction(SIGALRM, &before, NULL);
    if (!back) kill(writer, SIGKILL);
    cr_expect_eq(waitpid(writer, &status, 0), writer);
    remove(path);
    cr_assert_not_null(back, "%s", tfm_error(c));
    cr_expect_str_eq(back, "abcabcabc");
    cr_expect_gt(alarms, 3, "%d signals", (int)alarms);
    tfm_destroy(c);
}
#endif

/* ---- writing ---------------------------------------------------------------------------------------------------- */

/* The bytes of huggingface's writer for the same tensors: dtypes descending, then names; header padded with spaces. */
Test(files, written_bytes_are_the_reference_writers) {
    static const char header[] = "{\"i\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]},"
                                 "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]},"
                                 "\"b\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[16,20]},"
                                 "\"h\\\"\\\\\\u0001\":{\"dtype\":\"F16\",\"shape\":[1,0],\"data_offsets\":[20,20]},"
                                 "\"u\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[20,21]},"
                                 "\"k\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[21,22]}}";
    static const float a[2] = {1.5f, -2.0f}, one = 7;
    static const int64_t i = -5;
    static const unsigned char u = 200, k = 1;
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    int64_t size, header_size = (int64_t)strlen(header);
    unsigned char *out;
    cr_assert_not_null(tfm_params_wrap(c, p, "k", TFM_BOOL, TFM_SHAPE(1), &k));
    cr_assert_not_null(tfm_params_wrap(c, p, "b", TFM_F32, tfm_shape_of(0, NULL), &one));
    cr_assert_not_null(tfm_params_wrap(c, p, "u", TFM_U8, TFM_SHAPE(1), &u));
    cr_assert_not_null(tfm_params_add(c, p, "h\"\\\x01", TFM_F16, TFM_SHAPE(1, 0)));
    cr_assert_not_null(tfm_params_wrap(c, p, "i", TFM_I64, TFM_SHAPE(1), &i));
    cr_assert_not_null(tfm_params_wrap(c, p, "a", TFM_F32, TFM_SHAPE(2), a));
    size = tfm_params_saved_size(p);
    cr_assert_eq(size, 8 + (header_size + 7) / 8 * 8 + 22);
    out = (unsigned char *)malloc((size_t)size);
    assert_ok(c, tfm_params_save_memory(c, p, out, size));
    cr_expect_eq((int64_t)out[0] + 256 * (int64_t)out[1], (header_size + 7) / 8 * 8);
    cr_expect_eq(memcmp(out + 8, header, (size_t)header_size), 0, "%.*s", (int)size, (const char *)out + 8);
    cr_expect_eq(memcmp(out + size - 22, &i, 8), 0);
    cr_expect_eq(memcmp(out + size - 14, a, 8), 0);
    cr_expect_eq(out[size - 1], 1);
    assert_verb_refused(c, tfm_params_save_memory(c, p, out, size - 1), TFM_INVALID);
    free(out);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(files, saved_parameters_come_back_packed_or_plain) {
    int packed;
    for (packed = 0; packed < 2; packed++) {
        char path[512];
        tfm_ctx *c = context();
        tfm_params *p = tfm_params_create(c), *back = tfm_params_create(c);
        tfm_linear_layer layer;
        int64_t i;
        test_temporary_path(path, sizeof path, "saved.safetensors");
        assert_ok(c, tfm_linear_init(c, p, "layer", 33, 37, 1, &layer));
        cr_assert_not_null(tfm_params_add(c, p, "empty", TFM_I32, TFM_SHAPE(0, 3)));
        if (packed) assert_ok(c, tfm_params_prepare(c, p));
        assert_ok(c, tfm_params_save(c, p, path));
        assert_ok(c, tfm_params_load(c, back, path, NULL));
        cr_assert_eq(tfm_params_count(back), 3);
        if (packed) cr_assert_not_null(tfm_params_write_begin(c, p, "layer.weight"));
        for (i = 0; i < tfm_params_count(p); i++) {
            const tfm_tensor *a = tfm_params_at(p, i), *b = tfm_params_find(back, tfm_params_name(p, i));
            cr_assert_not_null(b);
            cr_assert(test_same_shape(a, b));
            cr_assert_eq(a->dtype, b->dtype);
            if (tfm_numel(a)) assert_same_bytes(a->data, b->data, tfm_numel(a) * tfm_dtype_size(a->dtype));
        }
        remove(path);
        tfm_params_destroy(p);
        tfm_params_destroy(back);
        tfm_destroy(c);
    }
}

Test(files, strided_tensors_are_written_in_order) {
    char path[512];
    static const char *const names[2] = {"t", "s"};
    static const float transposed[6] = {0, 3, 1, 4, 2, 5}, step[2] = {1, 3};
    tfm_ctx *c = context();
    tfm_tensor *a = tfm_reshape(c, tfm_arange(c, TFM_F32, 0, 6, 1), TFM_SHAPE(2, 3));
    const tfm_tensor *list[2];
    tfm_file *f;
    test_temporary_path(path, sizeof path, "strided.safetensors");
    list[0] = tfm_transpose(c, a, 0, 1);
    list[1] = tfm_slice(c, tfm_arange(c, TFM_F32, 0, 5, 1), 0, 1, 5, 2);
    assert_ok(c, tfm_save_tensors(c, path, names, list, 2));
    f = tfm_file_open(c, path);
    cr_assert_not_null(f, "%s", tfm_error(c));
    expect_values(tfm_file_tensor(c, f, "t"), transposed);
    expect_values(tfm_file_tensor(c, f, "s"), step);
    tfm_file_close(f);
    remove(path);
    list[1] = NULL;
    assert_verb_refused(c, tfm_save_tensors(c, path, names, list, 2), TFM_INVALID);
    list[1] = list[0];
    {
        static const char *const twice[2] = {"x", "x"}, *const reserved[2] = {"__metadata__", "y"},
                                 *const broken[2] = {"\xff", "y"}, *const unnamed[2] = {"x", NULL};
        assert_verb_refused(c, tfm_save_tensors(c, path, twice, list, 2), TFM_INVALID);
        assert_verb_refused(c, tfm_save_tensors(c, path, reserved, list, 2), TFM_INVALID);
        assert_verb_refused(c, tfm_save_tensors(c, path, broken, list, 2), TFM_INVALID);
        assert_verb_refused(c, tfm_save_tensors(c, path, unnamed, list, 2), TFM_INVALID);
        assert_verb_refused(c, tfm_save_tensors(c, path, names, list, -1), TFM_INVALID);
    }
    {
        tfm_memory need;
        tfm_measure_begin(c);
        cr_expect_eq(tfm_save_tensors(c, path, names, list, 2), TFM_INVALID);
        (void)!tfm_measure_end(c, &need);
        tfm_clear(c);
    }
    {
        tfm_ctx *other = context();
        const tfm_marker mark = tfm_mark(c);
        list[0] = tfm_ones(other, TFM_SHAPE(2));
        cr_assert_eq(tfm_save_tensors(c, path, names, list, 1), TFM_INVALID);
        cr_expect_not_null(strstr(tfm_error(c), "tensor number 0 belongs to another context"), "%s", tfm_error(c));
        tfm_clear(c);
        list[0] = tfm_ones(c, TFM_SHAPE(2));
        tfm_rewind(c, mark);
        assert_verb_refused(c, tfm_save_tensors(c, path, names, list, 1), TFM_INVALID);
        tfm_destroy(other);
    }
    cr_expect_not(test_file_exists(path), "a refused save made a file");
    tfm_destroy(c);
}

/* What could not be read again is not written. */
Test(files, a_header_beyond_the_formats_limit_is_refused) {
    enum { LENGTH = 100000000 };
    char path[512], *name;
    tfm_ctx *c;
    const tfm_tensor *t;
    const char *names[1];
    if (test_quick()) cr_skip_test("quick");
    c = context();
    t = tfm_ones(c, TFM_SHAPE(2));
    name = (char *)malloc(LENGTH + 1);
    cr_assert_not_null(name);
    memset(name, 'n', LENGTH);
    name[LENGTH] = 0;
    names[0] = name;
    test_temporary_path(path, sizeof path, "header.safetensors");
    cr_assert_eq(tfm_save_tensors(c, path, names, &t, 1), TFM_INVALID);
    cr_expect_not_null(strstr(tfm_error(c), "header of 1000000"), "%s", tfm_error(c));
    cr_expect_not(test_file_exists(path));
    free(name);
    tfm_destroy(c);
}

#if !defined(_WIN32)
static int entries_of(const char *folder) {
    DIR *d = opendir(folder);
    int n = 0;
    cr_assert_not_null(d);
    while (readdir(d)) n++;
    closedir(d);
    return n - 2;
}

/* The old file stays whole until the new one is; nothing else is left behind, nor when writing fails. */
Test(files, writing_replaces_the_file_at_once) {
    char folder[512], path[600];
    tfm_ctx *c = context();
    int64_t size = 0;
    struct stat info;
    test_temporary_path(folder, sizeof folder, "folder");
    cr_assert_eq(mkdir(folder, 0700), 0);
    snprintf(path, sizeof path, "%s/file", folder);
    assert_ok(c, tfm_write_file(c, path, "old", 3));
    cr_assert_eq(chmod(path, 0600), 0);
    assert_ok(c, tfm_write_file(c, path, "newer", 5));
    cr_expect_str_eq((const char *)tfm_read_file(c, path, &size), "newer");
    cr_expect_eq(size, 5);
    cr_assert_eq(stat(path, &info), 0);
    cr_expect_eq(info.st_mode & 0777, 0600u, "a private file became public");
    cr_expect_eq(entries_of(folder), 1);
    assert_ok(c, tfm_write_file(c, path, NULL, 0));
    cr_assert_not_null(tfm_read_file(c, path, &size));
    cr_expect_eq(size, 0);
    remove(path);
    cr_assert_eq(mkdir(path, 0700), 0); /* a folder stands where the file should go */
    assert_verb_refused(c, tfm_write_file(c, path, "x", 1), TFM_IO);
    cr_expect_eq(entries_of(folder), 1, "a temporary file was left behind");
    rmdir(path);
    rmdir(folder);
    tfm_destroy(c);
}

/* A disk that is full, by a limit on the size of files: the old one stays, and nothing else. */
Test(files, a_write_that_fails_leaves_the_old_file) {
#if defined(__linux__)
    enum { LARGE = 1 << 16 };
    char folder[512], path[600];
    static const char large[LARGE] = {0};
    tfm_ctx *c = context();
    int64_t size = 0;
    struct rlimit old, low;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    test_temporary_path(folder, sizeof folder, "full");
    cr_assert_eq(mkdir(folder, 0700), 0);
    snprintf(path, sizeof path, "%s/file", folder);
    assert_ok(c, tfm_write_file(c, path, "old", 3));
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &old), 0);
    low = old;
    low.rlim_cur = LARGE / 2;
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &low), 0);
    cr_expect_eq(tfm_write_file(c, path, large, LARGE), TFM_IO);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, handler);
    cr_expect_not_null(strstr(tfm_error(c), "cannot be written"), "%s", tfm_error(c));
    tfm_clear(c);
    cr_expect_str_eq((const char *)tfm_read_file(c, path, &size), "old");
    cr_expect_eq(entries_of(folder), 1, "a temporary file was left behind");
    remove(path);
    rmdir(folder);
    tfm_destroy(c);
#endif
}

/* What stands there may be too large for a 32-bit program to ask about: then the new file is private. */
#if defined(__linux__) && LONG_MAX == 0x7fffffffL
Test(files, a_large_private_file_stays_private) {
    char path[512];
    tfm_ctx *c = context();
    struct stat info;
    int fd;
    test_temporary_path(path, sizeof path, "large");
    fd = open64(path, O_WRONLY | O_CREAT, 0600);
    cr_assert_geq(fd, 0);
    if (ftruncate64(fd, (off64_t)3 << 30)) {
        remove(path);
        cr_skip_test("no files of 3 GB here");
    }
    close(fd);
    assert_ok(c, tfm_write_file(c, path, "x", 1));
    cr_assert_eq(stat(path, &info), 0);
    cr_expect_eq(info.st_mode & 0777, 0600u, "a private file became public");
    remove(path);
    tfm_destroy(c);
}
#endif

/* What is no file is not replaced by one: a pipe, and as root even a device, would be gone. */
Test(files, writing_leaves_what_is_no_file) {
    char path[512];
    tfm_ctx *c = context();
    struct stat info;
    test_temporary_path(path, sizeof path, "pipe_that_stays");
    cr_assert_eq(mkfifo(path, 0600), 0);
    cr_assert_eq(tfm_write_file(c, path, "x", 1), TFM_IO);
    cr_expect_not_null(strstr(tfm_error(c), "not a regular file"), "%s", tfm_error(c));
    cr_expect(!stat(path, &info) && S_ISFIFO(info.st_mode), "the pipe is gone");
    remove(path);
    tfm_destroy(c);
}

/* As long as the system allows (255 bytes): the temporary name is no longer. */
Test(files, a_long_file_name_can_be_written) {
    char path[900];
    size_t n;
    tfm_ctx *c = context();
    int64_t size = 0;
    test_temporary_path(path, 512, "n");
    n = strlen(path);
    memset(path + n, 'n', 250 - (n - (size_t)(strrchr(path, '/') + 1 - path)));
    path[(size_t)(strrchr(path, '/') + 1 - path) + 250] = 0;
    assert_ok(c, tfm_write_file(c, path, "long", 4));
    cr_expect_str_eq((const char *)tfm_read_file(c, path, &size), "long");
    remove(path);
    tfm_destroy(c);
}
#endif

/* ---- loading ---------------------------------------------------------------------------------------------------- */

typedef struct loaded {
    tfm_ctx *c;
    tfm_params *p;
    blob b;
} loaded;

enum { COPIED, USED, MOVED, WAYS }; /* from memory; as the bytes of an open file; of one at an odd address */
static int way_to_load = COPIED;

/* a (2, 3) 0..5, b (2, 3) 6..11, v (2) 12, 13 */
static loaded load_with(const tfm_rule *rules, int64_t count, tfm_status expected) {
    loaded l;
    tfm_file *f;
    tfm_load_options o;
    tfm_status status;
    memset(&o, 0, sizeof o);
    o.rules = rules;
    o.rule_count = count;
    l.c = context();
    l.p = tfm_params_create(l.c);
    l.b = floats_of("{\"x.a\":" INFO("F32", "[2,3]", 0, 24) ",\"x.b\":" INFO("F32", "[2,3]", 24, 48) ",\"x.v\":" INFO(
                        "F32", "[2]", 48, 56) "}",
                    14);
    if (way_to_load == MOVED) {
        l.b.data = (unsigned char *)realloc(l.b.data, (size_t)l.b.size + 1);
        memmove(l.b.data + 1, l.b.data, (size_t)l.b.size);
    }
    if (way_to_load == COPIED) {
        status = tfm_params_load_memory(l.c, l.p, l.b.data, l.b.size, &o);
    } else {
        f = tfm_file_open_memory(l.c, l.b.data + (way_to_load == MOVED), l.b.size);
        assert_made(l.c, f);
        status = tfm_params_load_file(l.c, l.p, f, &o);
        tfm_file_close(f);
    }
    cr_assert_eq(status, expected, "%s: %s", tfm_status_name(status), tfm_error(l.c));
    return l;
}

static void unload(loaded l) {
    tfm_params_destroy(l.p);
    tfm_destroy(l.c);
    free(l.b.data);
}

static void expect_parameter(loaded l, const char *name, int64_t rows, int64_t columns, const float *values) {
    const tfm_tensor *t = tfm_params_find(l.p, name);
    cr_assert_not_null(t, "no %s", name);
    cr_expect_eq(t->shape[0], rows);
    cr_expect_eq(t->ndim > 1 ? t->shape[1] : 0, columns);
    expect_values(t, values);
}

static const float rows_0[] = {0, 1, 2, 3, 4, 5}, rows_6[] = {6, 7, 8, 9, 10, 11}, rows_12[] = {12, 13},
                   columns_0[] = {0, 3, 1, 4, 2, 5}, both[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11},
                   both_columns[] = {0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11},
                   mixed[] = {6, 9, 7, 10, 8, 11, 0, 3, 1, 4, 2, 5},
                   behind[] = {6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5};

Test(rules, without_rules_names_stay) {
    loaded l = load_with(NULL, 0, TFM_OK);
    cr_expect_eq(tfm_params_count(l.p), 3);
    cr_expect_str_eq(tfm_params_name(l.p, 0), "x.a");
    expect_parameter(l, "x.a", 2, 3, rows_0);
    expect_parameter(l, "x.v", 2, 0, rows_12);
    unload(l);
}

Test(rules, the_first_row_that_matches_decides) {
    static const tfm_rule rules[] = {{TFM_RULE_SKIP, "x.v", NULL, 0, 0},
                                     {TFM_RULE_RENAME, "x.a", "first", 0, 0},
                                     {TFM_RULE_RENAME, "*.*", "y.*.*", 0, 0}};
    loaded l = load_with(rules, 3, TFM_OK);
    cr_expect_eq(tfm_params_count(l.p), 2);
    expect_parameter(l, "first", 2, 3, rows_0);
    expect_parameter(l, "y.x.b", 2, 3, rows_6);
    unload(l);
}

Test(rules, a_star_does_not_cross_dots_and_slashes) {
    static const tfm_rule none[] = {{TFM_RULE_SKIP, "*", NULL, 0, 0}}, some[] = {{TFM_RULE_SKIP, "*.a", NULL, 0, 0}};
    loaded l = load_with(none, 1, TFM_OK);
    cr_expect_eq(tfm_params_count(l.p), 3);
    unload(l);
    l = load_with(some, 1, TFM_OK);
    cr_expect_eq(tfm_params_count(l.p), 2);
    unload(l);
}

/* Against the plain statement by recursion, over all short names and some patterns. */
static int fits(const char *pattern, const char *name) {
    if (*pattern != '*') return *pattern == *name && (!*name || fits(pattern + 1, name + 1));
    return fits(pattern + 1, name) || (*name && *name != '.' && *name != '/' && fits(pattern, name + 1));
}

Test(rules, patterns_match_as_said) {
    static const char *const patterns[] = {"*",    "a*",     "*a",     "*.*", "a*b*a", "*ab*", "**",
                                           "*a.*", "*.a*/b", "*b/a*b", "a.b", "",      "*a*a*"};
    tfm_ctx *c = context();
    size_t k;
    int64_t number;
    for (k = 0; k < sizeof patterns / sizeof patterns[0]; k++)
        for (number = 0; number < 5461;
             number += test_quick() ? 37 : 1) { /* all names of up to six of these four letters */
            char name[8], header[128];
            tfm_rule rule = {TFM_RULE_SKIP, NULL, NULL, 0, 0};
            tfm_load_options o;
            tfm_params *p;
            int64_t rest = number, first = 1, n = 0;
            blob b;
            for (; rest >= first; n++) rest -= first, first *= 4;
            for (name[n] = 0; n > 0; rest /= 4) name[--n] = "ab./"[rest % 4];
            snprintf(header, sizeof header, "{\"%s\":" INFO("U8", "[1]", 0, 1) "}", name);
            b = file_of(header, 1);
            p = tfm_params_create(c);
            memset(&o, 0, sizeof o);
            rule.from = patterns[k];
            o.rules = &rule;
            o.rule_count = 1;
            o.prefix = "p"; /* an empty name is none */
            assert_ok(c, tfm_params_load_memory(c, p, b.data, b.size, &o));
            cr_assert_eq(tfm_params_count(p) == 0, fits(patterns[k], name), "\"%s\" and \"%s\"", patterns[k], name);
            tfm_params_destroy(p);
            free(b.data);
        }
    tfm_destroy(c);
}

Test(rules, transpose_concat_split) {
    static const tfm_rule transpose[] = {{TFM_RULE_TRANSPOSE, "x.*", "*", 0, 0}};
    static const tfm_rule concat[] = {{TFM_RULE_CONCAT, "x.b", "ab", 1, 2}, {TFM_RULE_CONCAT, "x.a", "ab", 0, 2}};
    static const tfm_rule columns[] = {{TFM_RULE_CONCAT_TRANSPOSE, "x.a", "ab", 0, 2},
                                       {TFM_RULE_CONCAT_TRANSPOSE, "x.b", "ab", 1, 2}};
    static const tfm_rule turned[] = {{TFM_RULE_CONCAT_TRANSPOSE, "x.a", "ab", 1, 2},
                                      {TFM_RULE_CONCAT_TRANSPOSE, "x.b", "ab", 0, 2}};
    static const tfm_rule split[] = {{TFM_RULE_SPLIT, "x.a", "low", 1, 2}, {TFM_RULE_SPLIT, "x.a", "high", 0, 2}};
    static const tfm_rule thirds[] = {{TFM_RULE_SPLIT_TRANSPOSE, "x.a", "one", 0, 3},
                                      {TFM_RULE_SPLIT_TRANSPOSE, "x.a", "three", 2, 3}};
    static const tfm_rule swapped[] = {{TFM_RULE_CONCAT, "x.b", "ab", 0, 2}, {TFM_RULE_CONCAT, "x.a", "ab", 1, 2}};
    static const tfm_rule decided[] = {{TFM_RULE_SPLIT, "x.a", "low", 1, 2}, {TFM_RULE_RENAME, "x.a", "other", 0, 0},
                                       {TFM_RULE_SPLIT, "x.a", "high", 0, 2}, {TFM_RULE_RENAME, "x.b", "b", 0, 0},
                                       {TFM_RULE_SPLIT, "x.b", "c", 0, 2}};
    loaded l;
    for (way_to_load = COPIED; way_to_load < WAYS; way_to_load++) {
        l = load_with(transpose, 1, TFM_OK);
        expect_parameter(l, "a", 3, 2, columns_0);
        expect_parameter(l, "v", 2, 0, rows_12); /* a vector is its own transpose */
        unload(l);
        l = load_with(concat, 2, TFM_OK);
        expect_parameter(l, "ab", 4, 3, both);
        unload(l);
        l = load_with(columns, 2, TFM_OK);
        expect_parameter(l, "ab", 6, 2, both_columns);
        unload(l);
        l = load_with(turned, 2, TFM_OK);
        expect_parameter(l, "ab", 6, 2, mixed);
        unload(l);
        l = load_with(split, 2, TFM_OK);
        expect_parameter(l, "high", 1, 3, rows_0);
        expect_parameter(l, "low", 1, 3, rows_0 + 3);
        unload(l);
        l = load_with(thirds, 2, TFM_OK);
        expect_parameter(l, "one", 1, 2, columns_0);
        expect_parameter(l, "three", 1, 2, columns_0 + 4);
        unload(l);
        l = load_with(swapped, 2, TFM_OK); /* which do not follow each other in the file */
        expect_parameter(l, "ab", 4, 3, behind);
        unload(l);
        l = load_with(decided, 5, TFM_OK); /* the first row decides; rows that split name one source together */
        cr_expect_eq(tfm_params_count(l.p), 4);
        expect_parameter(l, "high", 1, 3, rows_0);
        expect_parameter(l, "low", 1, 3, rows_0 + 3);
        expect_parameter(l, "b", 2, 3, rows_6);
        unload(l);
    }
    way_to_load = COPIED;
}

/* Files of their own: three dims, scalars, other dtypes, names to the last byte. */
static tfm_status load_own(const char *header, int64_t bytes, const tfm_rule *rules, int64_t count, const char *phrase) {
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    blob b = file_of(header, bytes);
    tfm_load_options o;
    tfm_status status;
    memset(&o, 0, sizeof o);
    o.rules = rules;
    o.rule_count = count;
    status = tfm_params_load_memory(c, p, b.data, b.size, &o);
    if (phrase) cr_expect_not_null(strstr(tfm_error(c), phrase), "%s, not: %s", tfm_error(c), phrase);
    cr_expect_eq(tfm_params_count(p), status == TFM_OK, "%s", header);
    tfm_params_destroy(p);
    tfm_destroy(c);
    free(b.data);
    return status;
}

Test(rules, shapes_dtypes_and_names_have_their_limits) {
    static const char cube[] = "{\"a\":" INFO("U8", "[1,2,2]", 0, 4) "}";
    static const char scalars[] = "{\"a\":" INFO("U8", "[]", 0, 1) ",\"b\":" INFO("U8", "[]", 1, 2) "}";
    static const char mixed[] = "{\"a\":" INFO("U8", "[2]", 0, 2) ",\"b\":" INFO("I8", "[2]", 2, 4) "}";
    static const char both[] = "{\"a\":" INFO("U8", "[2]", 0, 2) ",\"b\":" INFO("U8", "[2]", 2, 4) "}";
    static const char flat[] = "{\"a\":" INFO("U8", "[2]", 0, 2) ",\"b\":" INFO("U8", "[2,0]", 2, 2) "}";
    static const char many[] = "{\"a.b.c.d.e.f.g.h.i\":" INFO("U8", "[1]", 0, 1) "}";
    static const tfm_rule turn = {TFM_RULE_TRANSPOSE, "a", "t", 0, 0}, cut = {TFM_RULE_SPLIT, "a", "s", 0, 1};
    static const tfm_rule join[] = {{TFM_RULE_CONCAT, "a", "ab", 0, 2}, {TFM_RULE_CONCAT, "b", "ab", 1, 2}};
    static const tfm_rule uneven[] = {{TFM_RULE_CONCAT, "a", "ab", 0, 2}, {TFM_RULE_CONCAT, "b", "ab", 1, 3}};
    static const tfm_rule half[] = {{TFM_RULE_CONCAT, "a", "b", 0, 2}}; /* and "b" as it is */
    static const tfm_rule stars[] = {{TFM_RULE_RENAME, "*.*.*.*.*.*.*.*.i", "*", 0, 0},
                                     {TFM_RULE_RENAME, "*.*.*.*.*.*.*.*.*", "*", 0, 0}};
    char header[512], name[257], to[512];
    tfm_rule rename = {TFM_RULE_RENAME, "*", NULL, 0, 0};
    int n;
    cr_expect_eq(load_own(cube, 4, &turn, 1, "only matrices can be transposed"), TFM_INVALID);
    cr_expect_eq(load_own(scalars, 2, join, 2, "cannot be joined"), TFM_INVALID);
    cr_expect_eq(load_own(scalars, 2, &cut, 1, "cannot be split"), TFM_INVALID);
    cr_expect_eq(load_own(mixed, 4, join, 2, "cannot be joined"), TFM_INVALID);
    cr_expect_eq(load_own(flat, 2, join, 2, "cannot be joined"), TFM_INVALID);
    cr_expect_eq(load_own(both, 4, join, 2, NULL), TFM_OK);
    cr_expect_eq(load_own(both, 4, uneven, 2, "is made of 2 parts"), TFM_INVALID);
    cr_expect_eq(load_own(both, 4, half, 1, "both become 'b'"), TFM_INVALID);
    cr_expect_eq(load_own(many, 1, stars, 1, NULL), TFM_OK);
    cr_expect_eq(load_own(many, 1, stars + 1, 1, "more than 8"), TFM_INVALID);
    cr_expect_eq(load_own(both, 4, stars, -1, "rule_count"), TFM_INVALID);
    cr_expect_eq(load_own(both, 4, NULL, 1, "rules is NULL"), TFM_INVALID);
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = 0;
    snprintf(header, sizeof header, "{\"%s\":" INFO("U8", "[1]", 0, 1) "}", name);
    rename.to = to;
    for (n = 480; n <= 481; n++) { /* of the file's 256 bytes and what the rule puts before them */
        memset(to, 't', (size_t)n - 256);
        snprintf(to + n - 256, 2, "*");
        cr_expect_eq(load_own(header, 1, &rename, 1, n > 480 ? "longer than 480" : NULL), n > 480 ? TFM_INVALID : TFM_OK);
    }
}

Test(rules, what_does_not_fit_is_named) {
    static const struct {
        tfm_rule rules[2];
        int count;
        const char *phrase;
    } table[] = {
        {{{TFM_RULE_RENAME, "x.a", "same", 0, 0}, {TFM_RULE_RENAME, "x.b", "same", 0, 0}}, 2, "both become 'same'"},
        {{{TFM_RULE_CONCAT, "x.a", "ab", 0, 3}, {TFM_RULE_CONCAT, "x.b", "ab", 1, 3}},
         2,
         "3 parts, but the file has 2"},
        {{{TFM_RULE_CONCAT, "x.a", "ab", 0, 2}, {TFM_RULE_CONCAT, "x.b", "ab", 0, 2}}, 2, "missing, or there twice"},
        {{{TFM_RULE_CONCAT, "x.a", "ab", 0, 2}, {TFM_RULE_CONCAT, "x.v", "ab", 1, 2}}, 2, "cannot be joined"},
        {{{TFM_RULE_CONCAT, "x.a", "ab", 0, 2}, {TFM_RULE_CONCAT_TRANSPOSE, "x.b", "ab", 1, 2}},
         2,
         "f32 (3, 2), cannot be joined to 'ab', f32 (2, 3)"},
        {{{TFM_RULE_SPLIT, "x.a", "p", 0, 3}, {TFM_RULE_SKIP, "none", NULL, 0, 0}}, 1, "cannot be split into 3"},
        {{{TFM_RULE_RENAME, "x.*", "*.*", 0, 0}, {TFM_RULE_SKIP, "none", NULL, 0, 0}}, 1, "to has more * than from"},
        {{{TFM_RULE_RENAME, NULL, "a", 0, 0}, {TFM_RULE_SKIP, "none", NULL, 0, 0}}, 1, "NULL"},
        {{{99, "x.a", "a", 0, 0}, {TFM_RULE_SKIP, "none", NULL, 0, 0}}, 1, "no such kind"},
        {{{TFM_RULE_SPLIT, "x.a", "a", 2, 2}, {TFM_RULE_SKIP, "none", NULL, 0, 0}}, 1, "index is not in"},
        {{{TFM_RULE_SPLIT, "x.a", "a", -1, 2}, {TFM_RULE_SKIP, "none", NULL, 0, 0}}, 1, "index is not in"},
        {{{TFM_RULE_RENAME, "x.a", NULL, 0, 0}, {TFM_RULE_SKIP, "none", NULL, 0, 0}}, 1, "NULL"},
    };
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        loaded l = load_with(table[i].rules, table[i].count, TFM_INVALID);
        cr_expect_not_null(strstr(tfm_error(l.c), table[i].phrase), "%s, not: %s", tfm_error(l.c), table[i].phrase);
        cr_expect_eq(tfm_params_count(l.p), 0);
        unload(l);
    }
}

Test(files, values_go_into_parameters_that_exist) {
    static const float expected[] = {0, 1, 2, 3, 4, 5};
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    blob b = floats_of("{\"w\":" INFO("F32", "[2,3]", 0, 24) "}", 6),
         wrong = floats_of("{\"w\":" INFO("F32", "[3,2]", 0, 24) "}", 6),
         other = file_of("{\"w\":" INFO("I32", "[2,3]", 0, 24) "}", 24);
    tfm_tensor *w = tfm_params_add(c, p, "m.w", TFM_F16, TFM_SHAPE(2, 3));
    tfm_load_options o;
    memset(&o, 0, sizeof o);
    o.prefix = "m";
    assert_ok(c, tfm_params_load_memory(c, p, b.data, b.size, &o));
    cr_expect_eq(w->dtype, TFM_F16);
    cr_expect_eq(tfm_params_count(p), 1);
    expect_values(w, expected);
    cr_assert_eq(tfm_params_load_memory(c, p, wrong.data, wrong.size, &o), TFM_INVALID);
    cr_expect_not_null(strstr(tfm_error(c), "(3, 2)"), "%s", tfm_error(c)); /* both shapes are named */
    cr_expect_not_null(strstr(tfm_error(c), "(2, 3)"), "%s", tfm_error(c));
    tfm_clear(c);
    assert_verb_refused(c, tfm_params_load_memory(c, p, other.data, other.size, &o), TFM_INVALID);
    expect_values(w, expected);
    o.prefix = "deep";
    assert_made(c, tfm_params_add(c, p, "deep.w", TFM_F32, TFM_SHAPE(2, 3, 2)));
    assert_verb_refused(c, tfm_params_load_memory(c, p, b.data, b.size, &o), TFM_INVALID);
    tfm_params_destroy(p);
    tfm_destroy(c);
    free(b.data);
    free(wrong.data);
    free(other.data);
}

/* What would fail behind the first tensor is found in front of it: the store is as it was, and the text says why. */
Test(files, a_load_that_is_refused_changes_nothing) {
    static const tfm_rule rest[] = {{TFM_RULE_RENAME, "b*", "*", 0, 0}};
    static const struct {
        const char *name, *info;       /* of the tensor behind "a" */
        const tfm_rule *rule;
        int cast, writing;
        tfm_status status;
        const char *phrase;
    } table[] = {
        {"b", INFO("F32", "[2]", 8, 16), NULL, 0, 1, TFM_INVALID, "'w' is being written"},
        {"b", INFO("F32", "[2]", 8, 16), NULL, 1, 1, TFM_INVALID, "'w' is being written"},
        {"", INFO("F32", "[2]", 8, 16), NULL, 0, 0, TFM_UNSUPPORTED, "\"\" would have a name of 0 bytes"},
        {"b", INFO("F32", "[2]", 8, 16), rest, 0, 0, TFM_INVALID, "\"b\" would have a name of 0 bytes"},
        {"b", INFO("F16", "[0,1000000000000000000]", 8, 8), NULL, 1, 0, TFM_UNSUPPORTED,
         "\"b\" gives f16 (0, 1000000000000000000): as f32 it has more bytes"},
        {"b", INFO("F64", "[0,1000000000000000000]", 8, 8), NULL, 0, 0, TFM_UNSUPPORTED,
         "\"b\" is (0, 1000000000000000000): more bytes"},
        {"bbbbbbbbbb", INFO("F32", "[2]", 8, 16), NULL, 0, 0, TFM_UNSUPPORTED,
         "\"bbbbbbbbbb"},             /* made 500 bytes long */
    };
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        char header[1024], name[512];
        tfm_ctx *c = context();
        tfm_params *p = tfm_params_create(c);
        tfm_load_options o;
        tfm_status status;
        blob b;
        memset(&o, 0, sizeof o);
        o.rules = table[i].rule;
        o.rule_count = table[i].rule != NULL;
        o.cast = table[i].cast;
        o.plain = table[i].cast;
        o.dtype = TFM_F32;
        snprintf(name, sizeof name, "%s", table[i].name);
        if (strlen(name) == 10) memset(name, 'b', 500), name[500] = 0;
        snprintf(header, sizeof header, "{\"a\":" INFO("F32", "[2]", 0, 8) ",\"%s\":%s}", name, table[i].info);
        b = file_of(header, strstr(table[i].info, "8,16]") ? 16 : 8);
        assert_made(c, tfm_params_add(c, p, "a", TFM_F32, TFM_SHAPE(2)));
        assert_made(c, tfm_params_add(c, p, "w", TFM_F32, TFM_SHAPE(2)));
        if (table[i].writing) assert_made(c, tfm_params_write_begin(c, p, "w"));
        status = tfm_params_load_memory(c, p, b.data, b.size, &o);
        cr_expect_eq(status, table[i].status, "%d: %s: %s", (int)i, tfm_status_name(status), tfm_error(c));
        cr_expect_not_null(strstr(tfm_error(c), table[i].phrase), "%s, not: %s", tfm_error(c), table[i].phrase);
        cr_expect_eq(tfm_params_count(p), 2, "%d", (int)i);
        cr_expect_eq(((const float *)tfm_params_find(p, "a")->data)[1], 0.0f, "%d: a was loaded", (int)i);
        tfm_params_destroy(p);
        tfm_destroy(c);
        free(b.data);
    }
}

/* Only who packs or casts needs all parameters. */
Test(files, a_plain_load_leaves_other_parameters_to_their_writer) {
    static const float expected[2] = {0, 1};
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    tfm_load_options o;
    blob b = floats_of("{\"a\":" INFO("F32", "[2]", 0, 8) "}", 2);
    memset(&o, 0, sizeof o);
    o.plain = 1;
    assert_made(c, tfm_params_add(c, p, "w", TFM_F32, TFM_SHAPE(2)));
    assert_made(c, tfm_params_write_begin(c, p, "w"));
    assert_ok(c, tfm_params_load_memory(c, p, b.data, b.size, &o));
    expect_values(tfm_params_find(p, "a"), expected);
    assert_made(c, tfm_params_write_begin(c, p, "a"));
    assert_verb_refused(c, tfm_params_load_memory(c, p, b.data, b.size, &o), TFM_INVALID);
    tfm_params_destroy(p);
    tfm_destroy(c);
    free(b.data);
}

Test(files, floats_of_any_width_go_into_each_other) {
    static const int dtypes[4] = {TFM_F32, TFM_F16, TFM_BF16, TFM_F64};
    static const float expected[4] = {0, 1, 2, 3};
    int from, to;
    for (from = 0; from < 4; from++)
        for (to = 0; to < 4; to++) {
            tfm_ctx *c = context();
            tfm_params *p = tfm_params_create(c), *q = tfm_params_create(c);
            unsigned char file[256];
            assert_made(c, tfm_params_add(c, p, "w", dtypes[from], TFM_SHAPE(4)));
            assert_ok(c, tfm_copy(c, tfm_params_write_begin(c, p, "w"), tfm_arange(c, TFM_F32, 0, 4, 1)));
            assert_ok(c, tfm_params_write_end(c, p, "w"));
            assert_ok(c, tfm_params_save_memory(c, p, file, (int64_t)sizeof file));
            assert_made(c, tfm_params_add(c, q, "w", dtypes[to], TFM_SHAPE(4)));
            assert_ok(c, tfm_params_load_memory(c, q, file, tfm_params_saved_size(p), NULL));
            expect_values(tfm_params_find(q, "w"), expected);
            tfm_params_destroy(p);
            tfm_params_destroy(q);
            tfm_destroy(c);
        }
}

typedef struct steps {
    int64_t calls, done, total;
} steps;

static int count_steps(void *user, const char *what, int64_t done, int64_t total) {
    steps *s = (steps *)user;
    cr_expect_str_eq(what, "loading");
    cr_expect(done > s->done && done <= total, "%lld after %lld of %lld", (long long)done, (long long)s->done,
              (long long)total);
    s->calls++;
    s->done = done;
    s->total = total;
    return 0;
}

/* Also when the last tensor of the file belongs to what came before. */
Test(files, loading_tells_of_each_step_up_to_the_last) {
    static const tfm_rule rules[] = {{TFM_RULE_CONCAT, "x.a", "av", 0, 2}, {TFM_RULE_CONCAT, "x.v", "av", 1, 2}};
    blob b = floats_of("{\"x.a\":" INFO("F32", "[2]", 0, 8) ",\"x.b\":" INFO("F32", "[2]", 8, 16) ",\"x.v\":" INFO(
                           "F32", "[2]", 16, 24) "}", 6);
    steps s = {0, 0, 0};
    tfm_options options;
    tfm_load_options o;
    tfm_ctx *c;
    tfm_params *p;
    memset(&options, 0, sizeof options);
    options.threads = 1;
    options.progress = count_steps;
    options.hook_user = &s;
    memset(&o, 0, sizeof o);
    o.rules = rules;
    o.rule_count = 2;
    c = tfm_create(&options);
    p = tfm_params_create(c);
    assert_ok(c, tfm_params_load_memory(c, p, b.data, b.size, &o));
    cr_expect(s.calls == 2 && s.done == 3 && s.total == 3, "%lld steps to %lld of %lld", (long long)s.calls,
              (long long)s.done, (long long)s.total);
    tfm_params_destroy(p);
    tfm_destroy(c);
    free(b.data);
}

Test(files, cast_converts_matrices_only) {
    tfm_load_options o;
    loaded l = load_with(NULL, 0, TFM_OK);
    blob ids = file_of("{\"ids\":" INFO("I32", "[1,2]", 0, 8) "}", 8);
    tfm_file *f = tfm_file_open_memory(l.c, l.b.data, l.b.size);
    int from_file;
    memset(&o, 0, sizeof o);
    o.cast = 1;
    for (from_file = 0; from_file < 2; from_file++) {
        tfm_params *p = tfm_params_create(l.c);
        o.dtype = TFM_I64;
        assert_verb_refused(l.c, tfm_params_load_memory(l.c, p, l.b.data, l.b.size, &o), TFM_INVALID);
        cr_expect_eq(tfm_params_count(p), 0);
        assert_made(l.c, tfm_params_add(l.c, p, "there", TFM_F32, TFM_SHAPE(2, 2)));
        o.dtype = TFM_BF16;
        if (from_file) assert_ok(l.c, tfm_params_load_file(l.c, p, f, &o));
        else assert_ok(l.c, tfm_params_load_memory(l.c, p, l.b.data, l.b.size, &o));
        cr_expect_eq(tfm_params_find(p, "x.a")->dtype, TFM_BF16);
        cr_expect_eq(tfm_params_find(p, "x.v")->dtype, TFM_F32);
        cr_expect_eq(tfm_params_find(p, "there")->dtype, TFM_BF16, "all of the store");
        expect_values(tfm_params_find(p, "x.a"), rows_0);
        assert_ok(l.c, tfm_params_load_memory(l.c, p, ids.data, ids.size, &o));
        cr_expect_eq(tfm_params_find(p, "ids")->dtype, TFM_I32);
        tfm_params_destroy(p);
    }
    tfm_file_close(f);
    free(ids.data);
    unload(l);
}

/* A weight that a layer has marked is packed by the load, unless that is plain. */
Test(files, a_load_packs_what_is_marked) {
    tfm_load_options o;
    int plain;
    memset(&o, 0, sizeof o);
    for (plain = 0; plain < 2; plain++) {
        loaded l = load_with(NULL, 0, TFM_OK);
        tfm_params *p = tfm_params_create(l.c);
        tfm_linear_layer layer;
        assert_ok(l.c, tfm_linear_init(l.c, p, "x", 3, 2, 0, &layer));
        o.plain = plain;
        o.rules = (const tfm_rule[]){{TFM_RULE_RENAME, "x.a", "x.weight", 0, 0}};
        o.rule_count = 1;
        assert_ok(l.c, tfm_params_load_memory(l.c, p, l.b.data, l.b.size, &o));
        cr_expect_eq(layer.weight->layout, plain ? TFM_STRIDED : TFM_PANELS);
        expect_values(layer.weight, rows_0);
        tfm_params_destroy(p);
        unload(l);
    }
}

/* The file's own bytes become the parameter; the store keeps the file open after its owner has closed it. */
Test(files, a_store_uses_the_files_memory_and_keeps_it_open) {
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    tfm_params *p;
    tfm_file *f;
    char path[512];
    blob b = floats_of("{\"a\":" INFO("F32", "[2,3]", 0, 24) ",\"b\":" INFO("F32", "[2]", 24, 32) "}", 8);
    int from_disk;
    test_temporary_path(path, sizeof path, "kept.safetensors");
    for (from_disk = 0; from_disk < 2; from_disk++) {
        memset(&o, 0, sizeof o);
        o.threads = 1;
        o.allocator = test_allocator(&m);
        c = tfm_create(&o);
        p = tfm_params_create(c);
        assert_ok(c, tfm_write_file(c, path, b.data, b.size));
        f = from_disk ? tfm_file_open(c, path) : tfm_file_open_memory(c, b.data, b.size);
        cr_assert_not_null(f, "%s", tfm_error(c));
        assert_ok(c, tfm_params_load_file(c, p, f, NULL));
        if (from_disk && !MAPPED) cr_expect_neq(tfm_params_find(p, "a")->data, tfm_file_tensor(c, f, "a")->data);
        else cr_expect_eq(tfm_params_find(p, "a")->data, tfm_file_tensor(c, f, "a")->data, "the bytes were copied");
        tfm_file_close(f);
        remove(path);
        tfm_destroy(c);
        expect_values(tfm_params_find(p, "a"), rows_0);
        tfm_params_destroy(p);
        assert_no_leak(&m);
    }
    free(b.data);
}

/* Values that were copied need no file: an open one costs memory, and a mapping of the system's few. */
Test(files, a_store_that_uses_no_memory_of_the_file_lets_it_go) {
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    tfm_params *p;
    char path[512];
    blob b = floats_of("{\"a\":" INFO("F32", "[2,3]", 0, 24) ",\"none\":" INFO("F32", "[0,3]", 24, 24) "}", 6);
    int64_t blocks;
    int i;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator = test_allocator(&m);
    c = tfm_create(&o);
    p = tfm_params_create(c);
    test_temporary_path(path, sizeof path, "let_go.safetensors");
    assert_ok(c, tfm_write_file(c, path, b.data, b.size));
    assert_made(c, tfm_params_add(c, p, "a", TFM_F32, TFM_SHAPE(2, 3)));
    blocks = m.blocks + 1; /* the record of what is empty */
    for (i = 0; i < 3; i++) assert_ok(c, tfm_params_load(c, p, path, NULL));
    cr_expect_eq(m.blocks, blocks, "%lld blocks more", (long long)(m.blocks - blocks));
    expect_values(tfm_params_find(p, "a"), rows_0);
    remove(path);
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
    free(b.data);
}

Test(files, loading_from_memory_copies) {
    loaded l = load_with(NULL, 0, TFM_OK);
    memset(l.b.data, 0xFF, (size_t)l.b.size);
    expect_parameter(l, "x.a", 2, 3, rows_0);
    unload(l);
}

/* On Windows, too, whose narrow functions take a code page. */
Test(files, paths_are_utf8) {
    char path[600];
    tfm_ctx *c = context();
    const char *back;
    int64_t size = 0;
    test_temporary_path(path, sizeof path, "\xD0\xBC\xE6\xA8\xA1\xF0\x9F\x98\x80");
    assert_ok(c, tfm_write_file(c, path, "old", 3));
    assert_ok(c, tfm_write_file(c, path, "new", 3));
    back = (const char *)tfm_read_file(c, path, &size);
    cr_assert_not_null(back, "%s", tfm_error(c));
    cr_expect_str_eq(back, "new");
#if defined(_WIN32)
    {
        wchar_t wide[600];
        cr_assert_gt(MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 600), 0);
        cr_expect(DeleteFileW(wide), "the file has another name");
    }
#else
    cr_expect_eq(remove(path), 0, "the file has another name");
#endif
    tfm_destroy(c);
}

/* ---- shards ----------------------------------------------------------------------------------------------------- */

#if !defined(_WIN32)
Test(files, an_index_opens_its_shards) {
    static const struct {
        const char *map, *phrase;
    } bad[] = {
        {"{\"weight_map\":{\"a\":\"../one.safetensors\"}}", "plain file name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "plain file name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "plain file name"},
        {"{\"weight_map\":{\"a\":\".\"}}", "plain file name"},
        {"{\"weight_map\":{\"a\":\"x\\\\one.safetensors\"}}", "plain file name"},
        {"{\"weight_map\":{\"a\":\"c:one.safetensors\"}}", "plain file name"},
        {"{\"weight_map\":{\"\xff\":\"one.safetensors\"}}", "not UTF-8"},
        {"{\"weight_map\":{\"a\":\"\"}}", "plain file name"},
        {"{\"weight_map\":{\"b\":\"one.safetensors\"}}", "is not in"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"a\":\"two.safetensors\"}}", "is not in"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"a\":\"one.safetensors\"}}", "duplicate name"},
        {"{\"weight_map\":{\"a\":1}}", "string is missing"},
        {"{\"metadata\":{}}", "weight_map is missing"},
        {"{\"weight_map\":{},\"weight_map\":{}}", "twice"},
        {"[]", "not an object"},
        {"{\"weight_map\":{}} x", "after it"},
    };
    static const float a[] = {1, 2}, b[] = {3}, d[] = {4};
    char folder[512], path[600];
    static const char *const first[1] = {"a"}, *const second[2] = {"b", "d"};
    const tfm_tensor *list[2];
    tfm_ctx *c = context();
    tfm_file *f;
    int64_t held;
    size_t i;
    test_temporary_path(folder, sizeof folder, "shards");
    cr_assert_eq(mkdir(folder, 0700), 0);
    list[0] = tfm_from(c, TFM_F32, TFM_SHAPE(2), a);
    snprintf(path, sizeof path, "%s/one.safetensors", folder);
    assert_ok(c, tfm_save_tensors(c, path, first, list, 1));
    list[0] = tfm_from(c, TFM_F32, TFM_SHAPE(1), b);
    list[1] = tfm_from(c, TFM_F32, TFM_SHAPE(1), d);
    snprintf(path, sizeof path, "%s/two.safetensors", folder);
    assert_ok(c, tfm_save_tensors(c, path, second, list, 2));
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    {
        static const char map[] = "{\"metadata\": {\"total_size\": 12.5, \"x\": [{}]}, \"weight_map\": {\"b\": "
                                  "\"two.safetensors\", \"a\": \"one.safetensors\"}}";
        tfm_params *p = tfm_params_create(c);
        assert_ok(c, tfm_write_file(c, path, map, (int64_t)strlen(map)));
        f = tfm_file_open(c, path);
        cr_assert_not_null(f, "%s", tfm_error(c));
        cr_expect_eq(tfm_file_count(f), 2, "d is not in the map");
        expect_values(tfm_file_tensor(c, f, "a"), a);
        expect_values(tfm_file_tensor(c, f, "b"), b);
        cr_expect_not(tfm_file_has(f, "d"));
        assert_ok(c, tfm_params_load_file(c, p, f, NULL));
        tfm_file_close(f);
        expect_values(tfm_params_find(p, "b"), b);
        tfm_params_destroy(p);
    }
    held = tfm_memory_usage(c).held;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_ok(c, tfm_write_file(c, path, bad[i].map, (int64_t)strlen(bad[i].map)));
        f = tfm_file_open(c, path);
        cr_expect_null(f, "%s", bad[i].map);
        cr_expect_eq(tfm_status_of(c), TFM_FORMAT, "%s: %s", bad[i].map, tfm_error(c));
        cr_expect_not_null(strstr(tfm_error(c), bad[i].phrase), "%s: %s", bad[i].map, tfm_error(c));
        tfm_clear(c);
    }
    cr_expect_eq(tfm_memory_usage(c).held, held);
    remove(path);
    snprintf(path, sizeof path, "%s/one.safetensors", folder);
    remove(path);
    snprintf(path, sizeof path, "%s/two.safetensors", folder);
    remove(path);
    rmdir(folder);
    tfm_destroy(c);
}
#endif

/* ---- memory ----------------------------------------------------------------------------------------------------- */

static void load_and_save(tfm_ctx *c, void *user) {
    static const tfm_rule rules[] = {{TFM_RULE_CONCAT, "x.a", "ab", 0, 2},
                                     {TFM_RULE_CONCAT_TRANSPOSE, "x.b", "ab", 1, 2}};
    const char *path = (const char *)user;
    blob b = floats_of("{\"x.a\":" INFO("F32", "[3,3]", 0, 36) ",\"x.b\":" INFO("F32", "[3,3]", 36, 72) ",\"v\":" INFO(
                           "F32", "[2]", 72, 80) "}",
                       20);
    unsigned char *unaligned = (unsigned char *)malloc((size_t)b.size + 1), saved[512];
    tfm_params *p = tfm_params_create(c), *used = tfm_params_create(c);
    tfm_load_options o;
    tfm_file *f;
    tfm_status status;
    memset(&o, 0, sizeof o);
    o.rules = rules;
    o.rule_count = 2;
    memcpy(unaligned + 1, b.data, (size_t)b.size);
    f = tfm_file_open_memory(c, unaligned + 1, b.size);
    status = tfm_params_load_file(c, p, f, &o);
    status = tfm_params_save_memory(c, p, saved, (int64_t)sizeof saved);
    if (path) status = tfm_params_save(c, p, path);
    if (path) status = tfm_params_load(c, p, path, NULL);
    if (path) status = tfm_params_load(c, used, path, NULL); /* which uses the file's bytes, and then its own */
    if (path) status = tfm_params_load(c, used, path, NULL);
    (void)status;
    (void)tfm_file_tensor(c, f, "v");
    tfm_file_close(f);
    tfm_params_destroy(p);
    tfm_params_destroy(used);
    free(unaligned);
    free(b.data);
    if (path) remove(path);
}

Test(files, every_allocation_may_fail) {
    char path[512];
    test_temporary_path(path, sizeof path, "failing.safetensors");
    cr_expect_gt(test_each_allocation_failing(load_and_save, path, NULL), 10);
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
static double resident(void) {
    FILE *f = fopen("/proc/self/statm", "r");
    long long pages = 0, size = 0;
    cr_assert_eq(fscanf(f, "%lld %lld", &size, &pages), 2);
    fclose(f);
    return (double)pages * (double)sysconf(_SC_PAGESIZE);
}

/* Whole pages straight from the system and back: what malloc keeps for later would blur the measurement. */
static void *pages_alloc(void *user, size_t size) {
    size_t *p = (size_t *)mmap(NULL, size + 64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    (void)user;
    if (p == MAP_FAILED) return NULL;
    p[0] = size + 64;
    return p + 8;
}

static void pages_free(void *user, void *pointer) {
    size_t *p = (size_t *)pointer - 8;
    (void)user;
    munmap(p, p[0]);
}

/* Weights that were packed need the file's pages no more: 1.1 times the file stays resident, whichever came first. */
Test(files, resident_memory_stays_near_the_file) {
    enum { IN = 2048, OUT = 2560, LAYERS = 2 };
    char path[512];
    tfm_options options;
    tfm_ctx *c;
    int init_first, i;
    if (test_quick()) cr_skip_test("quick");
    memset(&options, 0, sizeof options);
    options.threads = 1;
    options.allocator.alloc = pages_alloc;
    options.allocator.free = pages_free;
    c = tfm_create(&options);
    test_temporary_path(path, sizeof path, "resident.safetensors");
    {
        tfm_params *p = tfm_params_create(c);
        tfm_linear_layer layer;
        for (i = 0; i < LAYERS; i++) assert_ok(c, tfm_linear_init(c, p, i ? "one" : "zero", IN, OUT, 1, &layer));
        assert_ok(c, tfm_params_save(c, p, path));
        tfm_params_destroy(p);
    }
    for (init_first = 0; init_first < 2; init_first++) {
        tfm_params *p = tfm_params_create(c);
        tfm_linear_layer layer;
        const double before = resident(), file = 4.0 * LAYERS * IN * OUT;
        double ratio;
        for (i = 0; init_first && i < LAYERS; i++)
            assert_ok(c, tfm_linear_init(c, p, i ? "one" : "zero", IN, OUT, 1, &layer));
        assert_ok(c, tfm_params_load(c, p, path, NULL));
        for (i = 0; !init_first && i < LAYERS; i++)
            assert_ok(c, tfm_linear_init(c, p, i ? "one" : "zero", IN, OUT, 1, &layer));
        if (!init_first) assert_ok(c, tfm_params_prepare(c, p));
        cr_expect_eq(tfm_params_find(p, "one.weight")->layout, TFM_PANELS);
        ratio = (resident() - before) / file;
        cr_expect_lt(ratio, 1.1, "%s first: %.2f times the file is resident", init_first ? "init" : "load", ratio);
        tfm_params_destroy(p);
    }
    remove(path);
    tfm_destroy(c);
}
#endif

Test(files, null_arguments_are_errors) {
    tfm_ctx *c = context();
    tfm_params *p = tfm_params_create(c);
    char buffer[8];
    cr_expect_null(tfm_file_open(NULL, "x"));
    cr_expect_null(tfm_file_open_memory(NULL, buffer, 8));
    assert_refused(c, tfm_file_open(c, NULL), TFM_INVALID);
    assert_refused(c, tfm_file_open_memory(c, NULL, 8), TFM_INVALID);
    assert_refused(c, tfm_file_open_memory(c, buffer, -1), TFM_INVALID);
    assert_refused(c, tfm_file_tensor(c, NULL, "x"), TFM_INVALID);
    assert_refused(c, tfm_read_file(c, NULL, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_params_load(c, p, NULL, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_params_load(c, NULL, "x", NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_params_load_file(c, p, NULL, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_params_load_memory(c, NULL, buffer, 8, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_params_save(c, NULL, "x"), TFM_INVALID);
    assert_verb_refused(c, tfm_params_save(c, p, NULL), TFM_INVALID);
    assert_verb_refused(c, tfm_params_save_memory(c, p, NULL, 8), TFM_INVALID);
    assert_verb_refused(c, tfm_save_tensors(c, NULL, NULL, NULL, 0), TFM_INVALID);
    assert_verb_refused(c, tfm_write_file(c, NULL, "x", 1), TFM_INVALID);
    cr_expect_eq(tfm_params_saved_size(NULL), -1);
    cr_expect_eq(tfm_file_count(NULL), 0);
    cr_expect_null(tfm_file_name(NULL, 0));
    cr_expect_null(tfm_file_metadata(NULL, "x"));
    cr_expect_not(tfm_file_has(NULL, "x"));
    tfm_file_close(NULL);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

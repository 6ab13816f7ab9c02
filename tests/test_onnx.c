/* The operator cases of onnx/onnx in shared/data/onnx, each through the public API and our safetensors reader. A file
 * that is neither run nor named in the table of what is not offered fails the test. */
#include "test.h"

#if defined(_WIN32)
#include <io.h>
#else
#include <dirent.h>
#endif

/* ---- what is not offered ---------------------------------------------------------------------------------------- */

static const char losses[] = "losses are part of the training chapter, which is not there yet";
static const char optimisers[] = "optimisers are part of the training chapter, which is not there yet";
static const char scatter[] = "writing into a cache is tfm_cache_append, which only appends";

static const struct {
    const char *name, *reason;
} unsupported[] = {
    {"adam", optimisers},
    {"nllloss_NC", losses},
    {"nllloss_NCd1_ii", losses},
    {"nllloss_NCd1_mean_weight_negative_ii", losses},
    {"nllloss_NCd1_weight", losses},
    {"nllloss_NCd1d2", losses},
    {"nllloss_NCd1d2_reduction_mean", losses},
    {"nllloss_NCd1d2_reduction_sum", losses},
    {"nllloss_NCd1d2_with_weight", losses},
    {"nllloss_NCd1d2_with_weight_reduction_mean", losses},
    {"nllloss_NCd1d2_with_weight_reduction_sum_ii", losses},
    {"nllloss_NCd1d2d3_none_no_weight_negative_ii", losses},
    {"nllloss_NCd1d2d3_sum_weight_high_ii", losses},
    {"nllloss_NCd1d2d3d4d5_mean_weight", losses},
    {"sce_NCd1_mean_weight_negative_ii", losses},
    {"sce_NCd1d2d3_none_no_weight_negative_ii", losses},
    {"sce_NCd1d2d3_none_no_weight_negative_ii_log_prob", losses},
    {"sce_NCd1d2d3_sum_weight_high_ii", losses},
    {"sce_NCd1d2d3d4d5_mean_weight", losses},
    {"sce_NCd1d2d3d4d5_none_no_weight_log_prob", losses},
    {"sce_mean", losses},
    {"sce_mean_3d", losses},
    {"sce_mean_3d_log_prob", losses},
    {"sce_mean_no_weight_ii", losses},
    {"sce_mean_no_weight_ii_3d", losses},
    {"sce_mean_no_weight_ii_3d_log_prob", losses},
    {"sce_mean_no_weight_ii_4d_log_prob", losses},
    {"sce_mean_weight", losses},
    {"sce_mean_weight_ii", losses},
    {"sce_mean_weight_ii_3d_log_prob", losses},
    {"sce_mean_weight_ii_4d_log_prob", losses},
    {"sce_mean_weight_log_prob", losses},
    {"sce_none_log_prob", losses},
    {"sce_none_weights_log_prob", losses},
    {"sce_sum_log_prob", losses},
    {"tensorscatter", scatter},
    {"tensorscatter_3d", scatter},
    {"tensorscatter_circular", scatter},
};

static const char *why_not(const char *name) {
    size_t i;
    for (i = 0; i < sizeof unsupported / sizeof unsupported[0]; i++)
        if (!strcmp(unsupported[i].name, name)) return unsupported[i].reason;
    return NULL;
}

/* ---- a case ----------------------------------------------------------------------------------------------------- */

typedef struct onnx {
    tfm_ctx *c;
    tfm_file *f;
    const char *name;
} onnx;

/* A number of the attributes, which are a flat JSON object. */
static double attribute(const onnx *k, const char *name, double otherwise) {
    char key[64];
    const char *at;
    snprintf(key, sizeof key, "\"%s\": ", name);
    at = strstr(tfm_file_metadata(k->f, "attrs"), key);
    return at ? strtod(at + strlen(key), NULL) : otherwise;
}

static int attribute_is(const onnx *k, const char *name, const char *text) {
    char pair[96];
    snprintf(pair, sizeof pair, "\"%s\": \"%s\"", name, text);
    return strstr(tfm_file_metadata(k->f, "attrs"), pair) != NULL;
}

static tfm_tensor *input(const onnx *k, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "in.%s", name);
    return tfm_file_has(k->f, full) ? tfm_file_tensor(k->c, k->f, full) : NULL;
}

/* f32: closer than the ONNX runner asks (1e-3, 1e-7); f16: a few units in the last place. */
static void expect(const onnx *k, const char *name, const tfm_tensor *t) {
    char full[64], text[320];
    const tfm_tensor *expected;
    int half;
    snprintf(full, sizeof full, "out.%s", name);
    expected = tfm_file_tensor(k->c, k->f, full);
    cr_assert_not_null(expected, "%s: %s", k->name, tfm_error(k->c));
    cr_assert_not_null(t, "%s: %s: %s", k->name, name, tfm_error(k->c));
    half = expected->dtype != TFM_F32;
    cr_expect_eq(t->dtype, expected->dtype, "%s: %s is %s", k->name, name, tfm_dtype_name(t->dtype));
    cr_expect(test_tensor_worst(k->c, t, expected, half ? 4e-3 : 1e-4, half ? 2e-3 : 2e-6, text, sizeof text),
              "%s: %s: %s (%s)", k->name, name, text, tfm_isa_name(k->c));
}

static int has_output(const onnx *k, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "out.%s", name);
    return tfm_file_has(k->f, full);
}

/* ---- operators -------------------------------------------------------------------------------------------------- */

/* (B, L, H d) as heads; what has four dims already stays. */
static tfm_tensor *heads_of(const onnx *k, const char *name, const char *count) {
    tfm_tensor *t = input(k, name);
    return t && t->ndim == 3 ? tfm_split_heads(k->c, t, (int64_t)attribute(k, count, 0)) : t;
}

/* The mask of the case. ONNX counts causality from the length of the past, or nonpad_kv_seqlen - Lq per row, or 0. */
static tfm_mask mask_of(const onnx *k, int64_t past, int64_t queries, int64_t keys) {
    tfm_tensor *m = input(k, "attn_mask"), *lengths = input(k, "nonpad_kv_seqlen");
    tfm_mask mask;
    memset(&mask, 0, sizeof mask);
    /* a mask that ends early says nothing about the keys behind it: they are not attended */
    if (m && m->shape[m->ndim - 1] < keys)
        m = tfm_pad(k->c, m, -1, 0, keys - m->shape[m->ndim - 1], m->dtype == TFM_BOOL ? 0 : -HUGE_VAL);
    if (m && m->dtype == TFM_BOOL) mask.keep = m;
    else mask.bias = m;
    mask.key_lengths = lengths;
    mask.softcap = (float)attribute(k, "softcap", 0);
    if (attribute(k, "left_window_size", -1) >= 0) mask.window_left = (int64_t)attribute(k, "left_window_size", -1) + 1;
    if (attribute(k, "right_window_size", -1) >= 0)
        mask.window_right = (int64_t)attribute(k, "right_window_size", -1) + 1;
    if (attribute(k, "is_causal", 0) != 0) mask.causal = TFM_CAUSAL_OFFSET;
    if (mask.causal && !lengths) mask.offset = past;
    if (mask.causal && lengths) {
        int64_t b, offsets[16];
        for (b = 0; b < lengths->shape[0]; b++) offsets[b] = (int64_t)tfm_get(lengths, &b) - queries;
        mask.offsets = tfm_from(k->c, TFM_I64, TFM_SHAPE(lengths->shape[0]), offsets);
    }
    return mask;
}

static tfm_tensor *joined(const onnx *k, const tfm_tensor *past, const tfm_tensor *now) {
    const tfm_tensor *both[2];
    both[0] = past;
    both[1] = now;
    return tfm_cat(k->c, both, 2, 2);
}

static void attention(const onnx *k) {
    /* by qk_matmul_output_mode. The data has 0, 2 (holds the mask: 1 and 2 changed places in onnx#7913) and 3 */
    static const int stages[4] = {TFM_WEIGHTS_SCORES, TFM_WEIGHTS_CAPPED, TFM_WEIGHTS_MASKED,
                                  TFM_WEIGHTS_PROBABILITIES};
    tfm_tensor *q = heads_of(k, "Q", "q_num_heads"), *key = heads_of(k, "K", "kv_num_heads"),
               *value = heads_of(k, "V", "kv_num_heads");
    tfm_tensor *past_key = input(k, "past_key"), *past_value = input(k, "past_value"), *new_key = key,
               *new_value = value, *y, *scores = NULL;
    const int three = input(k, "Q")->ndim == 3;
    const int64_t past = past_key ? past_key->shape[2] : 0;
    tfm_attention_options o;
    memset(&o, 0, sizeof o);
    if (past_key) {
        key = joined(k, past_key, key);
        value = joined(k, past_value, value);
    }
    o.scale = (float)attribute(k, "scale", 0);
    o.mask = mask_of(k, past, q->shape[2], key->shape[2]);
    if (has_output(k, "qk_matmul_output")) {
        o.weights = &scores;
        o.weights_stage = stages[(int)attribute(k, "qk_matmul_output_mode", 0)];
    }
    y = tfm_attention(k->c, q, key, value, &o);
    expect(k, "Y", y && three ? tfm_combine_heads(k->c, y) : y);
    if (scores) expect(k, "qk_matmul_output", scores);
    if (past_key) {
        tfm_cache_options co;
        tfm_cache *cache;
        expect(k, "present_key", key);
        expect(k, "present_value", value);
        /* the same from a cache */
        memset(&co, 0, sizeof co);
        co.dtype = key->dtype;
        co.batch = key->shape[0];
        co.heads = key->shape[1];
        co.key_size = key->shape[3];
        co.value_size = value->shape[3];
        co.capacity = key->shape[2];
        cache = tfm_cache_create(k->c, &co);
        cr_assert_not_null(cache, "%s", tfm_error(k->c));
        assert_ok(k->c, tfm_cache_append(k->c, cache, 0, past_key, past_value, NULL));
        assert_ok(k->c, tfm_cache_append(k->c, cache, 0, new_key, new_value, NULL));
        o.weights = NULL;
        y = tfm_attention_cached(k->c, q, cache, 0, &o);
        expect(k, "Y", y && three ? tfm_combine_heads(k->c, y) : y);
        tfm_cache_destroy(cache);
    }
}

/* Normalises from `axis` on: the weight has those dims. */
static void normalization(const onnx *k) {
    tfm_tensor *mean = NULL, *rstd = NULL, *x = input(k, "X"), *w = input(k, "W"), *y;
    const int rms = strcmp(tfm_file_metadata(k->f, "op"), "LayerNormalization") != 0;
    tfm_norm_options o;
    const int axis = (int)attribute(k, "axis", -1);
    memset(&o, 0, sizeof o);
    o.eps = (float)attribute(k, "epsilon", 1e-5);
    cr_assert_eq(w->ndim, axis < 0 ? -axis : x->ndim - axis, "%s", k->name);
    if (has_output(k, "Mean")) o.mean = &mean;
    if (has_output(k, "InvStdDev")) o.rstd = &rstd;
    y = rms ? tfm_rms_norm(k->c, x, w, &o) : tfm_layer_norm(k->c, x, w, input(k, "B"), &o);
    expect(k, "Y", y);
    if (o.mean) expect(k, "Mean", mean);
    if (o.rstd) expect(k, "InvStdDev", rstd);
}

static void rotary_embedding(const onnx *k) {
    tfm_tensor *x = input(k, "input"), *cosine = input(k, "cos_cache");
    const int64_t dims = (int64_t)attribute(k, "rotary_embedding_dim", 0);
    cr_assert_eq(cosine->shape[cosine->ndim - 1] * 2, dims ? dims : x->shape[3], "%s", k->name);
    expect(k, "output",
           tfm_rotary_apply(k->c, x, cosine, input(k, "sin_cache"), input(k, "position_ids"),
                            (int)attribute(k, "interleaved", 0)));
}

static void gelu(const onnx *k) {
    tfm_tensor *x = input(k, "x");
    expect(k, "y", attribute_is(k, "approximate", "tanh") ? tfm_gelu_tanh(k->c, x) : tfm_gelu(k->c, x));
}

static void softmax(const onnx *k) {
    const int axis = (int)attribute(k, "axis", -1);
    tfm_tensor *x = input(k, "x");
    expect(k, "y",
           strcmp(tfm_file_metadata(k->f, "op"), "Softmax") ? tfm_log_softmax(k->c, x, axis)
                                                            : tfm_softmax(k->c, x, axis));
}

/* x sigmoid(alpha x) */
static tfm_tensor *swished(const onnx *k, tfm_tensor *x) {
    const float alpha = (float)attribute(k, "alpha", 1);
    return alpha == 1.0f ? tfm_silu(k->c, x) : tfm_mul(k->c, x, tfm_sigmoid(k->c, tfm_scale(k->c, x, alpha)));
}

static void swish(const onnx *k) { expect(k, "y", swished(k, input(k, "x"))); }

static void swiglu(const onnx *k) {
    if (attribute(k, "alpha", 1) == 1) expect(k, "y", tfm_glu(k->c, input(k, "a"), input(k, "b"), TFM_ACT_SILU));
    expect(k, "y", tfm_mul(k->c, swished(k, input(k, "a")), input(k, "b")));
}

static const struct {
    const char *op;
    void (*run)(const onnx *k);
} operators[] = {
    {"Attention", attention},
    {"LayerNormalization", normalization},
    {"RMSNormalization", normalization},
    {"RotaryEmbedding", rotary_embedding},
    {"Gelu", gelu},
    {"Softmax", softmax},
    {"LogSoftmax", softmax},
    {"Swish", swish},
    {"SwiGLU", swiglu},
};

/* Runs a case on a context; 0: no such operator. */
static int run_case(tfm_ctx *c, const char *path, const char *name) {
    const tfm_marker mark = tfm_mark(c);
    size_t i;
    onnx k;
    const char *op;
    k.c = c;
    k.name = name;
    k.f = tfm_file_open(c, path);
    cr_assert_not_null(k.f, "%s: %s", name, tfm_error(c));
    op = tfm_file_metadata(k.f, "op");
    cr_assert_not_null(op, "%s", name);
    for (i = 0; i < sizeof operators / sizeof operators[0]; i++)
        if (!strcmp(op, operators[i].op)) break;
    if (i < sizeof operators / sizeof operators[0]) operators[i].run(&k);
    tfm_file_close(k.f);
    tfm_rewind(c, mark);
    return i < sizeof operators / sizeof operators[0];
}

/* ---- all files -------------------------------------------------------------------------------------------------- */

enum { MOST = 400 };

static int compare_names(const void *a, const void *b) { return strcmp((const char *)a, (const char *)b); }

/* The cases of a folder without ".safetensors", sorted. */
static int cases_of(const char *folder, char names[MOST][128]) {
    int n = 0;
#if defined(_WIN32)
    char pattern[600];
    struct _finddata_t found;
    intptr_t search;
    snprintf(pattern, sizeof pattern, "%s/*.safetensors", folder);
    search = _findfirst(pattern, &found);
    if (search == -1) return 0;
    do {
        const char *entry = found.name;
#else
    DIR *d = opendir(folder);
    struct dirent *found;
    if (!d) return 0;
    while ((found = readdir(d)) != NULL) {
        const char *entry = found->d_name;
#endif
        const size_t length = strlen(entry);
        if (length <= 12 || strcmp(entry + length - 12, ".safetensors") || n == MOST) continue;
        snprintf(names[n++], 128, "%.*s", (int)(length - 12), entry);
#if defined(_WIN32)
    } while (!_findnext(search, &found));
    _findclose(search);
#else
    }
    closedir(d);
#endif
    qsort(names, (size_t)n, 128, compare_names);
    return n;
}

Test(onnx, every_case_in_reach_holds_on_every_instruction_set) {
    static char names[MOST][128];
    char folder[512], path[1024];
    int count, i;
    tfm_shared_path(folder, sizeof folder, "onnx");
    count = cases_of(folder, names);
    if (!count) cr_skip_test("no %s: set TFM_SHARED", (const char *)folder);
    TEST_EACH_ISA(c, 2) {
        int run = 0, listed = 0;
        for (i = 0; i < count; i++) {
            snprintf(path, sizeof path, "%s/%.127s.safetensors", folder, names[i]);
            if (why_not(names[i])) listed++;
            else if (run_case(c, path, names[i])) run++;
            else cr_expect_fail("%s is neither run nor listed as not offered", names[i]);
            tfm_clear(c);
        }
        cr_expect_eq(run + listed, count);
        cr_expect_eq(run, 102, "%d cases ran", run);
    }
}

Test(onnx, the_list_of_what_is_not_offered_is_true) {
    char folder[512], path[1024];
    size_t i;
    tfm_shared_path(folder, sizeof folder, "onnx");
    for (i = 0; i < sizeof unsupported / sizeof unsupported[0]; i++) {
        snprintf(path, sizeof path, "%s/%s.safetensors", folder, unsupported[i].name);
        if (!test_file_exists(path)) cr_skip_test("no %s: set TFM_SHARED", (const char *)path);
    }
}

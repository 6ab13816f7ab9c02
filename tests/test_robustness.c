/* Every public function with every argument made wrong in turn, and with every allocation failing in turn.  A case
 * is one correct call. Its arguments go through slots (C: context, T: tensor, N: number, D: real number, P:
 * pointer); the runner repeats the case with one slot replaced by something bad each time. Whatever is passed: no
 * crash, no leak, a sentence as error when the call fails, a context that works after tfm_clear. A public function
 * without a case fails the last test. */
#include "test.h"

#include <ctype.h>
#include <stdarg.h>

enum { BAD_TENSORS = 8, BAD_NUMBERS = 6, BAD_REALS = 4, MAX_CASES = 512 };

typedef struct fixture {
    tfm_ctx *c, *other;
    int slot, target, bad, kinds;   /* the slot to spoil, with which badness; how many kinds that slot has */
    int failed;                     /* the call itself failed (NULL or a status) */
    tfm_status status;              /* of a verb */
    int no_context;                 /* the slot to spoil is the context's: it is NULL */
    int created; /* the objects that the case needs exist: a failure before that is no failure of the call */
} fixture;

typedef struct test_case { const char *name; void (*run)(fixture *f); } test_case;
static test_case cases[MAX_CASES];
static int case_count;

#define CASE(title)                                                                                         \
    static void case_##title(fixture *f);                                                                    \
    __attribute__((constructor)) static void add_##title(void) {                                             \
        cases[case_count].name = #title;                                                                    \
        cases[case_count++].run = case_##title;                                                             \
    }                                                                                                       \
    static void case_##title(fixture *f)

static int spoil(fixture *f, int kinds) {   /* -1: leave the slot alone, else the kind of badness */
    if (f->slot++ != f->target) return -1;
    f->kinds = kinds;
    return f->bad;
}

static tfm_ctx *C(fixture *f) {
    if (spoil(f, 1) < 0) return f->c;
    f->no_context = 1;
    return NULL;
}

static tfm_tensor *tensor(tfm_ctx *c, int dtype, int ndim, const int64_t *dim) {
    tfm_tensor *t = tfm_full(c, dtype, tfm_shape_of(ndim, dim), 0);
    int64_t n = t ? tfm_numel(t) : 0, i;
    for (i = 0; t && t->data && i < n; i++) {
        if (dtype == TFM_F32) ((float *)t->data)[i] = 0.25f * (float)(i % 7) - 0.5f;
        if (dtype == TFM_I64) ((int64_t *)t->data)[i] = i % 2;
        if (dtype == TFM_BOOL) ((uint8_t *)t->data)[i] = (uint8_t)(i % 2);
    }
    return t;
}

static tfm_tensor *T(fixture *f, int dtype, int ndim, ...) {
    int64_t dim[TFM_MAX_DIMS] = {0};
    static const int64_t six[TFM_MAX_DIMS] = {1, 2, 1, 2, 1, 2};
    tfm_marker mark;
    tfm_tensor *t;
    va_list list;
    int i, bad = spoil(f, BAD_TENSORS);
    va_start(list, ndim);
    for (i = 0; i < ndim; i++) dim[i] = va_arg(list, int);
    va_end(list);
    switch (bad) {
        case 0: return NULL;
        case 1: return tensor(f->c, dtype == TFM_F32 ? TFM_I64 : TFM_F32, ndim, dim);
        case 2: return tensor(f->c, dtype, 0, NULL);
        case 3: for (i = 0; i < ndim; i++) dim[i]++; return tensor(f->c, dtype, ndim, dim);
        case 4:
            mark = tfm_mark(f->c);
            t = tensor(f->c, dtype, ndim, dim);
            tfm_rewind(f->c, mark);
            return t; /* dead */
        case 5: if (ndim) dim[ndim - 1] = 0; return tensor(f->c, dtype, ndim, dim);
        case 6: return tensor(f->c, dtype, TFM_MAX_DIMS, six);
        case 7: return tensor(f->other, dtype, ndim, dim); /* foreign */
        default: return tensor(f->c, dtype, ndim, dim);
    }
}

static int64_t N(fixture *f, int64_t value) {
    static const int64_t bad[BAD_NUMBERS] = {-1, 0, INT64_MAX, INT64_MIN, 1000003, INT64_MAX / 8};
    int kind = spoil(f, BAD_NUMBERS);
    return kind < 0 ? value : bad[kind];
}
static int I(fixture *f, int value) {
    static const int bad[BAD_NUMBERS] = {-1, 0, INT32_MAX, INT32_MIN, 1000003, 77};
    int kind = spoil(f, BAD_NUMBERS);
    return kind < 0 ? value : bad[kind];
}
static double D(fixture *f, double value) {
    static const double bad[BAD_REALS] = {NAN, -1, HUGE_VAL, 0};
    int kind = spoil(f, BAD_REALS);
    return kind < 0 ? value : bad[kind];
}
static float R(fixture *f, float value) { return (float)D(f, (double)value); }
static void *P(fixture *f, const void *pointer) { return spoil(f, 1) == 0 ? NULL : (void *)(uintptr_t)pointer; }
static tfm_shape S(fixture *f, tfm_shape s) {
    int kind = spoil(f, 5);
    if (kind == 0) s.ndim = -1;
    if (kind == 1) s.ndim = 7;
    if (kind == 2) s.dim[0] = -5;
    if (kind == 3) s.dim[0] = INT64_MAX;
    if (kind == 4) s.dim[0] = 0;
    return s;
}

static void made(fixture *f, const void *p) { f->failed = p == NULL; }
static void did(fixture *f, tfm_status s) {
    f->status = s;
    f->failed = s != TFM_OK;
}

/* -- objects that calls work on ------------------------------------------------------------------------------------ */

typedef struct objects {
    tfm_params *p;
    tfm_transformer model;
    tfm_session *s;
    tfm_cache *cache;
    tfm_file *file;
    tfm_tokenizer *tokenizer;
} objects;

static tfm_transformer_config tiny(int kind) {
    tfm_transformer_config config;
    memset(&config, 0, sizeof config);
    config.kind = kind;
    config.position = TFM_POSITION_SINUSOIDAL;
    config.block.d_model = 8; config.block.heads = 2; config.block.d_ff = 12;
    config.encoder_layers = config.decoder_layers = 1;
    config.source_vocab = config.target_vocab = 11;
    config.max_length = 16;
    return config;
}
static int with_params(fixture *f, objects *o) {
    memset(o, 0, sizeof *o);
    o->p = tfm_params_create(f->c);
    return o->p != NULL;
}
static int with_model(fixture *f, objects *o, int kind) {
    tfm_transformer_config config = tiny(kind);
    return with_params(f, o) && tfm_transformer_init(f->c, o->p, "m", &config, &o->model) == TFM_OK;
}
static int with_cache(fixture *f, objects *o) {
    tfm_cache_options options;
    memset(o, 0, sizeof *o);
    memset(&options, 0, sizeof options);
    options.batch = 2; options.heads = 1; options.key_size = 4; options.capacity = 20;
    o->cache = tfm_cache_create(f->c, &options);
    if (!o->cache) return 0;
    {
        static const int64_t dim[4] = {2, 1, 3, 4};
        tfm_tensor *k = tensor(f->c, TFM_F32, 4, dim);
        return tfm_cache_append(f->c, o->cache, 0, k, k, NULL) == TFM_OK;
    }
}
static int with_session(fixture *f, objects *o, int kind) {
    tfm_session_options options;
    memset(&options, 0, sizeof options);
    options.batch = 2; options.capacity = 12;
    if (!with_model(f, o, kind)) return 0;
    o->s = tfm_session_create(f->c, &o->model, &options);
    if (!o->s) return 0;
    if (kind == TFM_ENCODER_DECODER) {
        static const int64_t dim[2] = {2, 4};
        if (tfm_session_encode(f->c, o->s, tensor(f->c, TFM_I64, 2, dim), NULL) != TFM_OK) return 0;
    }
    return 1;
}
static int with_file(fixture *f, objects *o) {
    static const char header[] =
        "{\"__metadata__\":{\"k\":\"v\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}   ";
    static union { unsigned char bytes[256]; double align; } memory;
    uint64_t n = (sizeof header - 1) & ~(size_t)7;
    memset(o, 0, sizeof *o);
    memset(&memory, 0, sizeof memory);
    memcpy(memory.bytes, &n, 8);
    memcpy(memory.bytes + 8, header, (size_t)n);
    o->file = tfm_file_open_memory(f->c, memory.bytes, 8 + (int64_t)n + 8);
    return o->file != NULL;
}
static int with_tokenizer(fixture *f, objects *o) {
    memset(o, 0, sizeof *o);
    o->tokenizer = tfm_tokenizer_lines_memory(f->c, "a\nb\nc\n", 6, -1);
    return o->tokenizer != NULL;
}
static void without(objects *o) {
    tfm_tokenizer_destroy(o->tokenizer);
    tfm_session_destroy(o->s);
    tfm_cache_destroy(o->cache);
    tfm_params_destroy(o->p);
    tfm_file_close(o->file);
}
/* needs o, made by `with`; the call itself follows as statement */
#define WITH(with, call)                    \
    objects o;                              \
    if (with) { f->created = 1; call; }     \
    else { f->failed = 1; f->created = 0; } \
    without(&o)

/* -- context ------------------------------------------------------------------------------------------------------- */
CASE(tfm_error) { f->failed = tfm_error(C(f)) == NULL; }
CASE(tfm_status_of) { (void)tfm_status_of(C(f)); }
CASE(tfm_status_name) { made(f, tfm_status_name(I(f, 1))); }
CASE(tfm_clear) { tfm_clear(C(f)); }
CASE(tfm_cancel) { tfm_cancel(C(f)); tfm_clear(f->c); }
CASE(tfm_isa_name) { made(f, tfm_isa_name(C(f))); }
CASE(tfm_isa_supported) { (void)tfm_isa_supported((const char *)P(f, "scalar")); }
CASE(tfm_threads) { (void)tfm_threads(C(f)); }
CASE(tfm_version) { f->failed = tfm_version() != TFM_VERSION; }
CASE(tfm_seed) { tfm_seed(C(f), (uint64_t)N(f, 3)); }
CASE(tfm_mark) { (void)tfm_mark(C(f)); }
CASE(tfm_rewind) { tfm_marker m = tfm_mark(f->c); m.position[0] += N(f, 0); tfm_rewind(C(f), m); }
CASE(tfm_keep) { tfm_marker m = tfm_mark(f->c); made(f, tfm_keep(C(f), m, T(f, TFM_F32, 1, 5))); }
CASE(tfm_memory_usage) { (void)tfm_memory_usage(C(f)); }
CASE(tfm_memory_reset) { tfm_memory_reset(C(f)); }
CASE(tfm_measure_begin) { tfm_memory m; tfm_measure_begin(C(f)); did(f, tfm_measure_end(f->c, &m)); }
CASE(tfm_measure_end) {
    tfm_memory m;
    tfm_measure_begin(f->c);
    did(f, tfm_measure_end(C(f), (tfm_memory *)P(f, &m)));
    if (f->failed) {
        tfm_clear(f->c);
        if (tfm_measure_end(f->c, &m)) tfm_clear(f->c);
        f->created = 0;
    }
}
CASE(tfm_profile_start) { tfm_profile_start(C(f)); tfm_profile_stop(f->c); }
CASE(tfm_profile_stop) { tfm_profile_stop(C(f)); }
CASE(tfm_profile_count) { (void)tfm_profile_count(C(f)); }
CASE(tfm_profile_get) {
    tfm_profile_row row;
    tfm_profile_start(f->c);
    (void)tfm_ones(f->c, TFM_SHAPE(3));
    (void)tfm_exp(f->c, tfm_ones(f->c, TFM_SHAPE(3)));
    did(f, tfm_profile_get(C(f), N(f, 0), (tfm_profile_row *)P(f, &row)));
    tfm_profile_stop(f->c);
    f->created = 0;   /* a const context: the status alone tells */
}
CASE(tfm_profile) { made(f, tfm_profile(C(f))); }

/* -- tensors ------------------------------------------------------------------------------------------------------- */
CASE(tfm_shape1) { (void)tfm_shape1(N(f, 1)); }
CASE(tfm_shape2) { (void)tfm_shape2(N(f, 1), 2); }
CASE(tfm_shape3) { (void)tfm_shape3(N(f, 1), 2, 3); }
CASE(tfm_shape4) { (void)tfm_shape4(N(f, 1), 2, 3, 4); }
CASE(tfm_shape5) { (void)tfm_shape5(N(f, 1), 2, 3, 4, 5); }
CASE(tfm_shape6) { (void)tfm_shape6(N(f, 1), 2, 3, 4, 5, 6); }
CASE(tfm_shape_of) {
    int64_t d[TFM_MAX_DIMS] = {2, 3, 1, 1, 1, 1};
    (void)tfm_shape_of(I(f, 2) > 2 ? 7 : 2, (const int64_t *)P(f, d));
}
CASE(tfm_shape_like) { (void)tfm_shape_like(T(f, TFM_F32, 2, 2, 3)); }
CASE(tfm_numel) { (void)tfm_numel(T(f, TFM_F32, 2, 2, 3)); }
CASE(tfm_is_contiguous) { (void)tfm_is_contiguous(T(f, TFM_F32, 2, 2, 3)); }
CASE(tfm_dtype_name) { made(f, tfm_dtype_name(I(f, TFM_F32))); }
CASE(tfm_dtype_size) { (void)tfm_dtype_size(I(f, TFM_F32)); }
CASE(tfm_empty) { made(f, tfm_empty(C(f), I(f, TFM_F32), S(f, TFM_SHAPE(2, 3)))); }
CASE(tfm_zeros) { made(f, tfm_zeros(C(f), S(f, TFM_SHAPE(2, 3)))); }
CASE(tfm_ones) { made(f, tfm_ones(C(f), S(f, TFM_SHAPE(2, 3)))); }
CASE(tfm_full) { made(f, tfm_full(C(f), I(f, TFM_BF16), S(f, TFM_SHAPE(2, 3)), D(f, 1.5))); }
CASE(tfm_randn) { made(f, tfm_randn(C(f), S(f, TFM_SHAPE(2, 3)))); }
CASE(tfm_uniform) { made(f, tfm_uniform(C(f), S(f, TFM_SHAPE(2, 3)), R(f, 0), R(f, 1))); }
CASE(tfm_arange) { made(f, tfm_arange(C(f), I(f, TFM_I64), D(f, 0), D(f, 5), D(f, 1))); }
CASE(tfm_from) { float x[6] = {0}; made(f, tfm_from(C(f), TFM_F32, TFM_SHAPE(2, 3), P(f, x))); }
CASE(tfm_wrap) {
    float x[6] = {0};
    made(f, tfm_wrap(C(f), I(f, TFM_F32) == TFM_F32 ? TFM_F32 : 99, TFM_SHAPE(2, 3), P(f, x)));
}
CASE(tfm_wrap_strided) {
    float x[6] = {0};
    int64_t s[2] = {3, 1};
    made(f, tfm_wrap_strided(C(f), TFM_F32, TFM_SHAPE(2, 3), (const int64_t *)P(f, s), P(f, x)));
}
CASE(tfm_reshape) { made(f, tfm_reshape(C(f), T(f, TFM_F32, 2, 2, 3), S(f, TFM_SHAPE(3, 2)))); }
CASE(tfm_view) { made(f, tfm_view(C(f), T(f, TFM_F32, 2, 2, 3), S(f, TFM_SHAPE(3, 2)))); }
CASE(tfm_transpose) { made(f, tfm_transpose(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 0), I(f, 1))); }
CASE(tfm_permute) { made(f, tfm_permute(C(f), T(f, TFM_F32, 2, 2, 3), S(f, TFM_SHAPE(1, 0)))); }
CASE(tfm_slice) { made(f, tfm_slice(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1), N(f, 0), N(f, 3), N(f, 2))); }
CASE(tfm_narrow) { made(f, tfm_narrow(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1), N(f, 1), N(f, 2))); }
CASE(tfm_select) { made(f, tfm_select(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1), N(f, 1))); }
CASE(tfm_expand) { made(f, tfm_expand(C(f), T(f, TFM_F32, 2, 1, 3), S(f, TFM_SHAPE(4, 3)))); }
CASE(tfm_squeeze) { made(f, tfm_squeeze(C(f), T(f, TFM_F32, 2, 1, 3), I(f, 0))); }
CASE(tfm_unsqueeze) { made(f, tfm_unsqueeze(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 0))); }
CASE(tfm_split_heads) { made(f, tfm_split_heads(C(f), T(f, TFM_F32, 3, 2, 3, 8), N(f, 2))); }
CASE(tfm_combine_heads) { made(f, tfm_combine_heads(C(f), T(f, TFM_F32, 4, 2, 2, 3, 4))); }
CASE(tfm_contiguous) { made(f, tfm_contiguous(C(f), T(f, TFM_F32, 2, 2, 3))); }
CASE(tfm_clone) { made(f, tfm_clone(C(f), T(f, TFM_F32, 2, 2, 3))); }
CASE(tfm_cast) { made(f, tfm_cast(C(f), T(f, TFM_F32, 2, 2, 3), I(f, TFM_F16))); }
CASE(tfm_copy) { did(f, tfm_copy(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 2, 2, 3))); }
CASE(tfm_cat) {
    const tfm_tensor *l[2];
    l[0] = T(f, TFM_F32, 2, 2, 3);
    l[1] = T(f, TFM_F32, 2, 2, 3);
    made(f, tfm_cat(C(f), (const tfm_tensor *const *)P(f, l), I(f, 2) == 2 ? 2 : -1, I(f, 0)));
}
CASE(tfm_stack) {
    const tfm_tensor *l[2];
    l[0] = T(f, TFM_F32, 2, 2, 3);
    l[1] = T(f, TFM_F32, 2, 2, 3);
    made(f, tfm_stack(C(f), (const tfm_tensor *const *)P(f, l), I(f, 2) == 2 ? 2 : 0, I(f, 0)));
}
CASE(tfm_pad) { made(f, tfm_pad(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 0), N(f, 1), N(f, 1), D(f, 0))); }
CASE(tfm_gather) { made(f, tfm_gather(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1), T(f, TFM_I64, 2, 2, 2))); }
CASE(tfm_index_select) { made(f, tfm_index_select(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1), T(f, TFM_I64, 1, 4))); }
CASE(tfm_tril) { made(f, tfm_tril(C(f), T(f, TFM_F32, 2, 3, 3), N(f, 0))); }
CASE(tfm_triu) { made(f, tfm_triu(C(f), T(f, TFM_F32, 2, 3, 3), N(f, 0))); }
CASE(tfm_masked_fill) { made(f, tfm_masked_fill(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_BOOL, 2, 2, 3), D(f, 1))); }
CASE(tfm_where) { made(f, tfm_where(C(f), T(f, TFM_BOOL, 2, 2, 3), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 2, 2, 3))); }
CASE(tfm_get) {
    int64_t i[2];
    i[0] = N(f, 1);
    i[1] = N(f, 2);
    (void)tfm_get(T(f, TFM_F32, 2, 2, 3), (const int64_t *)P(f, f->target >= 0 ? NULL : i));
}
CASE(tfm_set) {
    int64_t i[2];
    i[0] = N(f, 1);
    i[1] = N(f, 2);
    did(f, tfm_set(C(f), tfm_zeros(f->c, TFM_SHAPE(2, 3)), (const int64_t *)P(f, i), D(f, 1)));
}
CASE(tfm_item) { (void)tfm_item(T(f, TFM_F32, 0)); }
CASE(tfm_read) { float x[6]; did(f, tfm_read(C(f), T(f, TFM_F32, 2, 2, 3), (float *)P(f, x), N(f, 6) == 6 ? 6 : 5)); }
CASE(tfm_format) { made(f, tfm_format(C(f), T(f, TFM_F32, 2, 2, 3))); }
CASE(tfm_print) {
    FILE *out = tmpfile();
    did(f, tfm_print(C(f), (FILE *)P(f, out), T(f, TFM_F32, 2, 2, 3)));
    if (out) fclose(out);
}

/* -- ops ----------------------------------------------------------------------------------------------------------- */
#define BINARY(name) CASE(name) { made(f, name(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 2, 2, 3))); }
#define UNARY(name) CASE(name) { made(f, name(C(f), T(f, TFM_F32, 2, 2, 3))); }
#define REDUCTION(name) CASE(name) { made(f, name(C(f), T(f, TFM_F32, 2, 2, 3), S(f, TFM_SHAPE(-1)), I(f, 1))); }
BINARY(tfm_add)
BINARY(tfm_sub) BINARY(tfm_mul) BINARY(tfm_div) BINARY(tfm_minimum) BINARY(tfm_maximum) UNARY(tfm_neg) UNARY(tfm_abs)
    UNARY(tfm_exp) UNARY(tfm_log) UNARY(tfm_sqrt) UNARY(tfm_rsqrt) UNARY(tfm_sin) UNARY(tfm_cos) UNARY(tfm_tanh)
        UNARY(tfm_sigmoid) UNARY(tfm_relu) UNARY(tfm_gelu) UNARY(tfm_gelu_tanh) UNARY(tfm_gelu_quick) UNARY(tfm_silu)
            UNARY(tfm_l2_normalize) REDUCTION(tfm_sum) REDUCTION(tfm_mean) REDUCTION(tfm_max) REDUCTION(tfm_min)
                REDUCTION(tfm_logsumexp) CASE(tfm_scale) {
    made(f, tfm_scale(C(f), T(f, TFM_F32, 2, 2, 3), R(f, 2)));
}
CASE(tfm_shift) { made(f, tfm_shift(C(f), T(f, TFM_F32, 2, 2, 3), R(f, 2))); }
CASE(tfm_activation) { made(f, tfm_activation(C(f), T(f, TFM_F32, 2, 2, 3), I(f, TFM_ACT_SILU))); }
CASE(tfm_pow) { made(f, tfm_pow(C(f), T(f, TFM_F32, 2, 2, 3), R(f, 2))); }
CASE(tfm_clamp) { made(f, tfm_clamp(C(f), T(f, TFM_F32, 2, 2, 3), R(f, 0), R(f, 1))); }
CASE(tfm_glu) { made(f, tfm_glu(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 2, 2, 3), I(f, TFM_ACT_SILU))); }
CASE(tfm_compare) { made(f, tfm_compare(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 2, 2, 3), I(f, TFM_LT))); }
CASE(tfm_compare_scalar) { made(f, tfm_compare_scalar(C(f), T(f, TFM_F32, 2, 2, 3), D(f, 0), I(f, TFM_LT))); }
CASE(tfm_argmax) { made(f, tfm_argmax(C(f), T(f, TFM_F32, 2, 2, 3), I(f, -1), I(f, 0))); }
CASE(tfm_topk) { tfm_tensor *i; made(f, tfm_topk(C(f), T(f, TFM_F32, 2, 2, 3), N(f, 2), (tfm_tensor **)P(f, &i))); }
CASE(tfm_softmax) { made(f, tfm_softmax(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1))); }
CASE(tfm_log_softmax) { made(f, tfm_log_softmax(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1))); }
CASE(tfm_matmul) { made(f, tfm_matmul(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 2, 3, 4))); }
CASE(tfm_linear) {
    made(f, tfm_linear(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 2, 4, 3), T(f, TFM_F32, 1, 4), I(f, TFM_ACT_RELU)));
}
CASE(tfm_embedding) { made(f, tfm_embedding(C(f), T(f, TFM_F32, 2, 4, 3), T(f, TFM_I64, 2, 2, 3))); }
CASE(tfm_layer_norm) {
    tfm_norm_options o;
    tfm_tensor *sum, *mean, *rstd;
    memset(&o, 0, sizeof o);
    o.eps = R(f, 1e-5f);
    o.normalized_dims = I(f, 1);
    o.residual = T(f, TFM_F32, 2, 2, 3);
    o.sum = &sum;
    o.mean = &mean;
    o.rstd = &rstd;
    made(f, tfm_layer_norm(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 1, 3), T(f, TFM_F32, 1, 3),
                           (tfm_norm_options *)P(f, &o)));
}
CASE(tfm_rms_norm) { made(f, tfm_rms_norm(C(f), T(f, TFM_F32, 2, 2, 3), T(f, TFM_F32, 1, 3), NULL)); }
CASE(tfm_dropout) { made(f, tfm_dropout(C(f), T(f, TFM_F32, 2, 2, 3), R(f, 0.5f))); }
CASE(tfm_set_requires_grad) {
    did(f, tfm_set_requires_grad(C(f), T(f, TFM_F32, 2, 2, 3), I(f, 1)));
    tfm_tape_clear(f->c);
}
CASE(tfm_tape_length) { (void)tfm_tape_length(C(f)); }
CASE(tfm_tape_clear) { tfm_tape_clear(C(f)); }

/* -- masks, attention, cache --------------------------------------------------------------------------------------- */
static tfm_mask every_mask(fixture *f) {
    tfm_mask m;
    memset(&m, 0, sizeof m);
    m.causal = I(f, TFM_CAUSAL_BOTTOM_RIGHT);
    m.window_left = N(f, 4); m.window_right = N(f, 4); m.prefix = N(f, 1);
    m.key_lengths = T(f, TFM_I64, 1, 2); m.query_lengths = T(f, TFM_I64, 1, 2);
    m.query_segments = T(f, TFM_I64, 2, 2, 3); m.key_segments = T(f, TFM_I64, 2, 2, 5);
    m.keep = T(f, TFM_BOOL, 4, 2, 2, 3, 5); m.ignore = T(f, TFM_BOOL, 2, 3, 5); m.nonzero = T(f, TFM_F32, 2, 3, 5);
    m.bias = T(f, TFM_F32, 4, 1, 2, 3, 5);
    m.alibi_slopes = T(f, TFM_F32, 1, 2);
    m.relative_bias = T(f, TFM_F32, 2, 8, 2); m.relative_max_distance = N(f, 16); m.relative_one_way = I(f, 1);
    m.softcap = R(f, 5); m.sinks = T(f, TFM_F32, 1, 2);
    return m;
}
CASE(tfm_mask_causal) { (void)f; (void)tfm_mask_causal(); }
CASE(tfm_mask_keep) { (void)tfm_mask_keep(T(f, TFM_BOOL, 2, 3, 5)); }
CASE(tfm_mask_ignore) { (void)tfm_mask_ignore(T(f, TFM_BOOL, 2, 3, 5)); }
CASE(tfm_mask_nonzero) { (void)tfm_mask_nonzero(T(f, TFM_F32, 2, 3, 5)); }
CASE(tfm_mask_additive) { (void)tfm_mask_additive(T(f, TFM_F32, 2, 3, 5)); }
CASE(tfm_mask_padding) { (void)tfm_mask_padding(T(f, TFM_I64, 1, 2)); }
CASE(tfm_mask_matrix) {
    tfm_mask m = every_mask(f);
    made(f, tfm_mask_matrix(C(f), (const tfm_mask *)P(f, &m), N(f, 2), N(f, 2), N(f, 3), N(f, 5)));
}
CASE(tfm_alibi_slopes) { made(f, tfm_alibi_slopes(C(f), N(f, 3))); }
CASE(tfm_relative_bucket) { (void)tfm_relative_bucket(N(f, 3), N(f, 32), N(f, 128), I(f, 0)); }
CASE(tfm_attention) {
    tfm_attention_options o;
    tfm_tensor *w;
    memset(&o, 0, sizeof o);
    o.mask = every_mask(f);
    o.scale = R(f, 0.5f);
    o.dropout = R(f, 0.1f);
    o.weights = (tfm_tensor **)P(f, &w);
    o.weights_stage = I(f, TFM_WEIGHTS_MASKED);
    o.weights_average = I(f, 1);
    made(f, tfm_attention(C(f), T(f, TFM_F32, 4, 2, 2, 3, 4), T(f, TFM_F32, 4, 2, 1, 5, 4),
                          T(f, TFM_F32, 4, 2, 1, 5, 6), (tfm_attention_options *)P(f, &o)));
}
CASE(tfm_weighted_sequence) {
    tfm_tensor *w;
    made(f, tfm_weighted_sequence(C(f), T(f, TFM_F32, 3, 2, 3, 4), T(f, TFM_F32, 2, 1, 4), T(f, TFM_F32, 1, 1),
                                  T(f, TFM_I64, 1, 2), (tfm_tensor **)P(f, &w)));
}
CASE(tfm_weighted_pool) {
    tfm_tensor *w;
    made(f, tfm_weighted_pool(C(f), T(f, TFM_F32, 3, 2, 3, 4), T(f, TFM_F32, 2, 1, 4), T(f, TFM_F32, 1, 1),
                              T(f, TFM_I64, 1, 2), (tfm_tensor **)P(f, &w)));
}
CASE(tfm_heatmap_svg) {
    tfm_heatmap_options o;
    memset(&o, 0, sizeof o);
    o.title = "t";
    made(f, tfm_heatmap_svg(C(f), T(f, TFM_F32, 2, 2, 3), (tfm_heatmap_options *)P(f, &o)));
}
CASE(tfm_heatmap_text) {
    tfm_heatmap_options o;
    memset(&o, 0, sizeof o);
    o.title = "t";
    made(f, tfm_heatmap_text(C(f), T(f, TFM_F32, 2, 2, 3), (tfm_heatmap_options *)P(f, &o)));
}
static tfm_cache_options cache_options(fixture *f) {
    tfm_cache_options o;
    memset(&o, 0, sizeof o);
    o.dtype = I(f, TFM_F16);
    o.layers = N(f, 1);
    o.batch = N(f, 2);
    o.heads = N(f, 1);
    o.key_size = N(f, 4);
    o.value_size = N(f, 4);
    o.capacity = N(f, 20);
    return o;
}
CASE(tfm_cache_create) {
    tfm_cache_options o = cache_options(f);
    tfm_cache *k = tfm_cache_create(C(f), (tfm_cache_options *)P(f, &o));
    made(f, k);
    tfm_cache_destroy(k);
}
CASE(tfm_cache_destroy) { tfm_cache_destroy(NULL); f->failed = 0; }
CASE(tfm_cache_memory) {
    tfm_cache_options o = cache_options(f);
    (void)tfm_cache_memory((tfm_cache_options *)P(f, &o));
}
CASE(tfm_cache_append) {
    WITH(with_cache(f, &o),
         did(f, tfm_cache_append(C(f), (tfm_cache *)P(f, o.cache), N(f, 0), T(f, TFM_F32, 4, 2, 1, 3, 4),
                                 T(f, TFM_F32, 4, 2, 1, 3, 4), T(f, TFM_I64, 1, 2))));
}
CASE(tfm_attention_cached) {
    tfm_attention_options a;
    memset(&a, 0, sizeof a);
    a.mask.causal = TFM_CAUSAL_BOTTOM_RIGHT;
    WITH(with_cache(f, &o), made(f, tfm_attention_cached(C(f), T(f, TFM_F32, 4, 2, 2, 3, 4), (tfm_cache *)P(f, o.cache),
                                                         N(f, 0), (tfm_attention_options *)P(f, &a))));
}
CASE(tfm_cache_length) {
    WITH(with_cache(f, &o), (void)tfm_cache_length((tfm_cache *)P(f, o.cache), N(f, 0), N(f, 1)));
}
CASE(tfm_cache_capacity) { WITH(with_cache(f, &o), (void)tfm_cache_capacity((tfm_cache *)P(f, o.cache))); }
CASE(tfm_cache_truncate) {
    WITH(with_cache(f, &o), did(f, tfm_cache_truncate(C(f), (tfm_cache *)P(f, o.cache), N(f, 1), N(f, 2))));
}
CASE(tfm_cache_reset) { WITH(with_cache(f, &o), tfm_cache_reset((tfm_cache *)P(f, o.cache))); }
CASE(tfm_cache_slide) { WITH(with_cache(f, &o), did(f, tfm_cache_slide(C(f), (tfm_cache *)P(f, o.cache), N(f, 1)))); }
CASE(tfm_cache_reorder) {
    int64_t r[2];
    r[0] = N(f, 1);
    r[1] = N(f, 0);
    WITH(with_cache(f, &o),
         did(f, tfm_cache_reorder(C(f), (tfm_cache *)P(f, o.cache), (int64_t *)P(f, r), N(f, 2) == 2 ? 2 : 5)));
}
CASE(tfm_cache_fork) {
    int64_t r[2];
    r[0] = N(f, 1);
    r[1] = N(f, 0);
    WITH(with_cache(f, &o), {
        tfm_cache *k = tfm_cache_fork(C(f), (tfm_cache *)P(f, o.cache), (int64_t *)P(f, r), N(f, 2) == 2 ? 2 : -2);
        made(f, k);
        tfm_cache_destroy(k);
    });
}
CASE(tfm_cache_saved_size) { WITH(with_cache(f, &o), (void)tfm_cache_saved_size((tfm_cache *)P(f, o.cache))); }
CASE(tfm_cache_save) {
    static unsigned char b[1 << 16];
    WITH(with_cache(f, &o),
         did(f, tfm_cache_save(C(f), (tfm_cache *)P(f, o.cache), P(f, b), N(f, 1) == 1 ? (int64_t)sizeof b : 3)));
}
CASE(tfm_cache_load) {
    static unsigned char b[1 << 16];
    WITH(with_cache(f, &o), {
        int64_t size = tfm_cache_saved_size(o.cache);
        if (tfm_cache_save(f->c, o.cache, b, (int64_t)sizeof b) == TFM_OK) {
            tfm_cache *k = tfm_cache_load(C(f), P(f, b), N(f, 1) == 1 ? size : size - 1);
            made(f, k);
            tfm_cache_destroy(k);
        } else f->failed = 1;
    });
}

/* -- parameters and layers ----------------------------------------------------------------------------------------- */
CASE(tfm_params_create) { tfm_params *p = tfm_params_create(C(f)); made(f, p); tfm_params_destroy(p); }
CASE(tfm_params_destroy) { tfm_params_destroy(NULL); f->failed = 0; }
CASE(tfm_params_add) {
    WITH(with_params(f, &o), made(f, tfm_params_add(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "w"), I(f, TFM_F32),
                                                    S(f, TFM_SHAPE(2, 3)))));
}
CASE(tfm_params_wrap) {
    static const float x[6] = {0};
    WITH(with_params(f, &o),
         made(f, tfm_params_wrap(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "w"), TFM_F32, TFM_SHAPE(2, 3), P(f, x))));
}
CASE(tfm_params_find) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), (void)tfm_params_find((tfm_params *)P(f, o.p), (char *)P(f, "nothing")));
}
CASE(tfm_params_count) { WITH(with_model(f, &o, TFM_ENCODER_ONLY), (void)tfm_params_count((tfm_params *)P(f, o.p))); }
CASE(tfm_params_name) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), (void)tfm_params_name((tfm_params *)P(f, o.p), N(f, 0)));
}
CASE(tfm_params_at) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), (void)tfm_params_at((tfm_params *)P(f, o.p), N(f, 0)));
}
CASE(tfm_params_bytes) { WITH(with_model(f, &o, TFM_ENCODER_ONLY), (void)tfm_params_bytes((tfm_params *)P(f, o.p))); }
CASE(tfm_params_strict) { WITH(with_params(f, &o), tfm_params_strict((tfm_params *)P(f, o.p), I(f, 1))); }
CASE(tfm_params_prepare) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), did(f, tfm_params_prepare(C(f), (tfm_params *)P(f, o.p))));
}
CASE(tfm_params_write_begin) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY) && tfm_params_prepare(f->c, o.p) == TFM_OK,
         made(f, tfm_params_write_begin(C(f), (tfm_params *)P(f, o.p), (char *)P(f, tfm_params_name(o.p, 0)))));
}
CASE(tfm_params_write_end) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY) && tfm_params_write_begin(f->c, o.p, tfm_params_name(o.p, 0)),
         did(f, tfm_params_write_end(C(f), (tfm_params *)P(f, o.p), (char *)P(f, tfm_params_name(o.p, 0)))));
}
CASE(tfm_params_cast) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), did(f, tfm_params_cast(C(f), (tfm_params *)P(f, o.p), I(f, TFM_F16))));
}
CASE(tfm_linear_init) {
    tfm_linear_layer l;
    WITH(with_params(f, &o), did(f, tfm_linear_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "l"), N(f, 3), N(f, 4),
                                                    I(f, 1), (tfm_linear_layer *)P(f, &l))));
}
CASE(tfm_linear_forward) {
    tfm_linear_layer l;
    WITH(with_params(f, &o) && tfm_linear_init(f->c, o.p, "l", 3, 4, 1, &l) == TFM_OK,
         made(f, tfm_linear_forward(C(f), (tfm_linear_layer *)P(f, &l), T(f, TFM_F32, 2, 2, 3))));
}
CASE(tfm_embedding_init) {
    tfm_embedding_layer l;
    WITH(with_params(f, &o), did(f, tfm_embedding_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "e"), N(f, 3),
                                                       N(f, 4), (tfm_embedding_layer *)P(f, &l))));
}
CASE(tfm_embedding_forward) {
    tfm_embedding_layer l;
    memset(&l, 0, sizeof l);
    WITH(with_params(f, &o) && tfm_embedding_init(f->c, o.p, "e", 3, 4, &l) == TFM_OK,
         made(f, tfm_embedding_forward(C(f), (tfm_embedding_layer *)P(f, &l), T(f, TFM_I64, 2, 2, 3))));
}
CASE(tfm_embedding_logits) {
    tfm_embedding_layer l;
    memset(&l, 0, sizeof l);
    WITH(with_params(f, &o) && tfm_embedding_init(f->c, o.p, "e", 3, 4, &l) == TFM_OK,
         made(f, tfm_embedding_logits(C(f), (tfm_embedding_layer *)P(f, &l), T(f, TFM_F32, 2, 2, 4))));
}
CASE(tfm_norm_init) {
    tfm_norm_layer l;
    WITH(with_params(f, &o),
         did(f, tfm_norm_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "n"), I(f, TFM_LAYER_NORM), N(f, 4), I(f, 1),
                              R(f, 1e-5f), (tfm_norm_layer *)P(f, &l))));
}
CASE(tfm_norm_forward) {
    tfm_norm_layer l;
    WITH(with_params(f, &o) && tfm_norm_init(f->c, o.p, "n", TFM_RMS_NORM, 3, 0, 0, &l) == TFM_OK,
         made(f, tfm_norm_forward(C(f), (tfm_norm_layer *)P(f, &l), T(f, TFM_F32, 2, 2, 3))));
}
CASE(tfm_sinusoidal) { made(f, tfm_sinusoidal(C(f), I(f, TFM_POSITION_SINUSOIDAL), N(f, 0), N(f, 5), N(f, 6))); }
static tfm_rope rope(fixture *f) {
    tfm_rope r;
    memset(&r, 0, sizeof r);
    r.interleaved = I(f, 1);
    r.scaling = I(f, TFM_ROPE_YARN);
    r.dims = N(f, 4);
    r.base = R(f, 10000);
    r.factor = R(f, 2);
    r.original_length = N(f, 64);
    r.low_frequency = R(f, 1);
    r.high_frequency = R(f, 4);
    r.beta_fast = R(f, 32);
    r.beta_slow = R(f, 1);
    r.attention_factor = R(f, 1);
    return r;
}
CASE(tfm_rotary) {
    tfm_rope r = rope(f);
    made(f, tfm_rotary(C(f), T(f, TFM_F32, 4, 2, 1, 3, 6), (tfm_rope *)P(f, &r), N(f, 0), T(f, TFM_I64, 2, 2, 3)));
}
CASE(tfm_rotary_tables) {
    tfm_rope r = rope(f);
    tfm_tensor *a, *b;
    did(f, tfm_rotary_tables(C(f), (tfm_rope *)P(f, &r), N(f, 6), N(f, 0), N(f, 3), (tfm_tensor **)P(f, &a),
                             (tfm_tensor **)P(f, &b)));
}
CASE(tfm_rotary_apply) {
    made(f, tfm_rotary_apply(C(f), T(f, TFM_F32, 4, 2, 1, 3, 6), T(f, TFM_F32, 2, 5, 2), T(f, TFM_F32, 2, 5, 2),
                             T(f, TFM_I64, 2, 2, 3), I(f, 0)));
}
static tfm_feed_forward_config ff_config(fixture *f) {
    tfm_feed_forward_config k;
    memset(&k, 0, sizeof k);
    k.activation = I(f, TFM_ACT_SILU);
    k.gated = I(f, 1);
    k.no_bias = I(f, 0);
    k.d_model = N(f, 4);
    k.d_ff = N(f, 6);
    k.dropout = R(f, 0.1f);
    return k;
}
CASE(tfm_feed_forward_init) {
    tfm_feed_forward_config k = ff_config(f);
    tfm_feed_forward l;
    WITH(with_params(f, &o),
         did(f, tfm_feed_forward_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "ff"),
                                      (tfm_feed_forward_config *)P(f, &k), (tfm_feed_forward *)P(f, &l))));
}
CASE(tfm_feed_forward_forward) {
    tfm_feed_forward_config k;
    tfm_feed_forward l;
    memset(&k, 0, sizeof k);
    k.d_model = 4;
    k.d_ff = 6;
    WITH(with_params(f, &o) && tfm_feed_forward_init(f->c, o.p, "ff", &k, &l) == TFM_OK,
         made(f, tfm_feed_forward_forward(C(f), (tfm_feed_forward *)P(f, &l), T(f, TFM_F32, 3, 2, 3, 4))));
}
static tfm_mha_config mha_config(fixture *f) {
    tfm_mha_config k;
    memset(&k, 0, sizeof k);
    k.d_model = N(f, 8);
    k.heads = N(f, 2);
    k.kv_heads = N(f, 1);
    k.head_size = N(f, 4);
    k.kdim = N(f, 8);
    k.vdim = N(f, 8);
    k.dropout = R(f, 0.1f);
    k.rotary = I(f, 1);
    return k;
}
CASE(tfm_mha_init) {
    tfm_mha_config k = mha_config(f);
    tfm_mha l;
    WITH(with_params(f, &o), did(f, tfm_mha_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "a"),
                                                 (tfm_mha_config *)P(f, &k), (tfm_mha *)P(f, &l))));
}
static int plain_mha(fixture *f, objects *o, tfm_mha *l) {
    tfm_mha_config k;
    memset(&k, 0, sizeof k);
    k.d_model = 8; k.heads = 2;
    return with_params(f, o) && tfm_mha_init(f->c, o->p, "a", &k, l) == TFM_OK;
}
CASE(tfm_mha_forward) {
    tfm_mha l;
    tfm_mha_options m;
    tfm_tensor *w;
    memset(&m, 0, sizeof m);
    m.need_weights = I(f, 1);
    m.weights = (tfm_tensor **)P(f, &w);
    m.mask.key_lengths = T(f, TFM_I64, 1, 2);
    m.training = I(f, 1);
    WITH(plain_mha(f, &o, &l),
         made(f, tfm_mha_forward(C(f), (tfm_mha *)P(f, &l), T(f, TFM_F32, 3, 2, 3, 8), T(f, TFM_F32, 3, 2, 5, 8),
                                 T(f, TFM_F32, 3, 2, 5, 8), (tfm_mha_options *)P(f, &m))));
}
CASE(tfm_mha_memory) {
    tfm_mha l;
    tfm_cache_options k;
    memset(&k, 0, sizeof k);
    k.batch = 2; k.heads = 2; k.key_size = 4; k.capacity = 8;
    WITH(plain_mha(f, &o, &l) && (o.cache = tfm_cache_create(f->c, &k)) != NULL,
         did(f, tfm_mha_memory(C(f), (tfm_mha *)P(f, &l), T(f, TFM_F32, 3, 2, 5, 8), T(f, TFM_F32, 3, 2, 5, 8),
                               (tfm_cache *)P(f, o.cache), N(f, 0), T(f, TFM_I64, 1, 2))));
}
static tfm_block_config block(fixture *f) {
    tfm_block_config k;
    memset(&k, 0, sizeof k);
    k.norm_first = I(f, 1);
    k.norm = I(f, TFM_RMS_NORM);
    k.activation = I(f, TFM_ACT_GELU);
    k.norm_eps = R(f, 1e-5f);
    k.dropout = R(f, 0);
    k.d_model = N(f, 8); k.heads = N(f, 2); k.kv_heads = N(f, 1); k.head_size = N(f, 4); k.d_ff = N(f, 12);
    return k;
}
CASE(tfm_encoder_layer_init) {
    tfm_block_config k = block(f);
    tfm_encoder_layer l;
    WITH(with_params(f, &o),
         did(f, tfm_encoder_layer_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "e"), (tfm_block_config *)P(f, &k),
                                       (tfm_encoder_layer *)P(f, &l))));
}
CASE(tfm_decoder_layer_init) {
    tfm_block_config k = block(f);
    tfm_decoder_layer l;
    WITH(with_params(f, &o),
         did(f, tfm_decoder_layer_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "d"), (tfm_block_config *)P(f, &k),
                                       (tfm_decoder_layer *)P(f, &l))));
}
CASE(tfm_encoder_init) {
    tfm_block_config k = block(f);
    tfm_encoder l;
    WITH(with_params(f, &o),
         did(f, tfm_encoder_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "e"), N(f, 1) == 1 ? 1 : N(f, 1),
                                 (tfm_block_config *)P(f, &k), I(f, 1), (tfm_encoder *)P(f, &l))));
}
CASE(tfm_decoder_init) {
    tfm_block_config k = block(f);
    tfm_decoder l;
    WITH(with_params(f, &o), did(f, tfm_decoder_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "d"), 1,
                                                     (tfm_block_config *)P(f, &k), I(f, 1), (tfm_decoder *)P(f, &l))));
}
static tfm_stack_options stack(fixture *f) {
    tfm_stack_options s;
    memset(&s, 0, sizeof s);
    s.mask.key_lengths = T(f, TFM_I64, 1, 2);
    s.training = I(f, 0);
    s.position = N(f, 0);
    return s;
}
CASE(tfm_encoder_layer_forward) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), {
        tfm_stack_options s = stack(f);
        made(f, tfm_encoder_layer_forward(C(f), (tfm_encoder_layer *)P(f, o.model.encoder.layers),
                                          T(f, TFM_F32, 3, 2, 3, 8), (tfm_stack_options *)P(f, &s)));
    });
}
CASE(tfm_encoder_forward) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), {
        tfm_stack_options s = stack(f);
        made(f, tfm_encoder_forward(C(f), (tfm_encoder *)P(f, &o.model.encoder), T(f, TFM_F32, 3, 2, 3, 8),
                                    (tfm_stack_options *)P(f, &s)));
    });
}
CASE(tfm_decoder_layer_forward) {
    WITH(with_model(f, &o, TFM_ENCODER_DECODER), {
        tfm_stack_options s = stack(f);
        made(f, tfm_decoder_layer_forward(C(f), (tfm_decoder_layer *)P(f, o.model.decoder.layers),
                                          T(f, TFM_F32, 3, 2, 3, 8), T(f, TFM_F32, 3, 2, 4, 8),
                                          (tfm_stack_options *)P(f, &s)));
    });
}
CASE(tfm_decoder_forward) {
    WITH(with_model(f, &o, TFM_ENCODER_DECODER), {
        tfm_stack_options s = stack(f);
        made(f, tfm_decoder_forward(C(f), (tfm_decoder *)P(f, &o.model.decoder), T(f, TFM_F32, 3, 2, 3, 8),
                                    T(f, TFM_F32, 3, 2, 4, 8), (tfm_stack_options *)P(f, &s)));
    });
}
CASE(tfm_decoder_memory) {
    tfm_cache_options k;
    memset(&k, 0, sizeof k);
    k.batch = 2; k.heads = 2; k.key_size = 4; k.capacity = 8;
    WITH(with_model(f, &o, TFM_ENCODER_DECODER) && (o.cache = tfm_cache_create(f->c, &k)) != NULL,
         did(f, tfm_decoder_memory(C(f), (tfm_decoder *)P(f, &o.model.decoder), T(f, TFM_F32, 3, 2, 4, 8),
                                   (tfm_cache *)P(f, o.cache), T(f, TFM_I64, 1, 2))));
}
CASE(tfm_transformer_init) {
    tfm_transformer_config k = tiny(TFM_ENCODER_DECODER);
    tfm_transformer m;
    k.kind = I(f, k.kind);
    k.position = I(f, k.position);
    k.encoder_layers = N(f, 1);
    k.decoder_layers = N(f, 1);
    k.block.d_model = N(f, 8);
    k.block.heads = N(f, 2);
    k.source_vocab = N(f, 11);
    k.target_vocab = N(f, 11);
    k.max_length = N(f, 16);
    k.relative_buckets = N(f, 8);
    k.position_start = N(f, 0);
    WITH(with_params(f, &o),
         did(f, tfm_transformer_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "t"),
                                     (tfm_transformer_config *)P(f, &k), (tfm_transformer *)P(f, &m))));
}
static tfm_transformer_options run_options(fixture *f) {
    tfm_transformer_options r;
    memset(&r, 0, sizeof r);
    r.output = I(f, TFM_OUTPUT_LOG_SOFTMAX);
    r.source_mask.key_lengths = T(f, TFM_I64, 1, 2);
    return r;
}
CASE(tfm_transformer_forward) {
    WITH(with_model(f, &o, TFM_ENCODER_DECODER), {
        tfm_transformer_options r = run_options(f);
        made(f, tfm_transformer_forward(C(f), (tfm_transformer *)P(f, &o.model), T(f, TFM_I64, 2, 2, 4),
                                        T(f, TFM_I64, 2, 2, 3), (tfm_transformer_options *)P(f, &r)));
    });
}
CASE(tfm_transformer_encode) {
    WITH(with_model(f, &o, TFM_ENCODER_DECODER), {
        tfm_transformer_options r = run_options(f);
        made(f, tfm_transformer_encode(C(f), (tfm_transformer *)P(f, &o.model), T(f, TFM_I64, 2, 2, 4),
                                       (tfm_transformer_options *)P(f, &r)));
    });
}
CASE(tfm_transformer_decode) {
    WITH(with_model(f, &o, TFM_ENCODER_DECODER),
         made(f, tfm_transformer_decode(C(f), (tfm_transformer *)P(f, &o.model), T(f, TFM_I64, 2, 2, 3),
                                        T(f, TFM_F32, 3, 2, 4, 8), NULL)));
}
CASE(tfm_transformer_measure) {
    tfm_transformer_config k = tiny(TFM_ENCODER_DECODER);
    tfm_transformer_memory m;
    k.block.d_model = N(f, 8);
    did(f, tfm_transformer_measure(C(f), (tfm_transformer_config *)P(f, &k), N(f, 2), N(f, 4), N(f, 3),
                                   (tfm_transformer_memory *)P(f, &m)));
}
CASE(tfm_pool) { made(f, tfm_pool(C(f), T(f, TFM_F32, 3, 2, 3, 4), T(f, TFM_I64, 1, 2), I(f, TFM_POOL_MEAN))); }
CASE(tfm_classifier_init) {
    tfm_classifier h;
    WITH(with_params(f, &o),
         did(f, tfm_classifier_init(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "h"), N(f, 4), N(f, 3),
                                    I(f, TFM_POOL_MAX), I(f, 0), (tfm_classifier *)P(f, &h))));
}
CASE(tfm_classifier_forward) {
    tfm_classifier h;
    WITH(with_params(f, &o) && tfm_classifier_init(f->c, o.p, "h", 4, 3, TFM_POOL_LAST, 0, &h) == TFM_OK,
         made(f, tfm_classifier_forward(C(f), (tfm_classifier *)P(f, &h), T(f, TFM_F32, 3, 2, 3, 4),
                                        T(f, TFM_I64, 1, 2))));
}

/* -- generation ---------------------------------------------------------------------------------------------------- */
CASE(tfm_session_create) {
    tfm_session_options k;
    memset(&k, 0, sizeof k);
    k.cache_dtype = I(f, TFM_F32); k.batch = N(f, 2); k.capacity = N(f, 12); k.source_capacity = N(f, 12);
    WITH(with_model(f, &o, TFM_ENCODER_DECODER), {
        tfm_session *s = tfm_session_create(C(f), (tfm_transformer *)P(f, &o.model), (tfm_session_options *)P(f, &k));
        made(f, s);
        tfm_session_destroy(s);
    });
}
CASE(tfm_session_destroy) { tfm_session_destroy(NULL); f->failed = 0; }
CASE(tfm_session_reset) { WITH(with_session(f, &o, TFM_DECODER_ONLY), tfm_session_reset((tfm_session *)P(f, o.s))); }
CASE(tfm_session_encode) {
    WITH(with_session(f, &o, TFM_ENCODER_DECODER),
         did(f, tfm_session_encode(C(f), (tfm_session *)P(f, o.s), T(f, TFM_I64, 2, 2, 4), T(f, TFM_I64, 1, 2))));
}
CASE(tfm_session_feed) {
    WITH(with_session(f, &o, TFM_DECODER_ONLY),
         made(f, tfm_session_feed(C(f), (tfm_session *)P(f, o.s), T(f, TFM_I64, 2, 2, 3), T(f, TFM_I64, 1, 2))));
}
CASE(tfm_session_feed_all) {
    WITH(with_session(f, &o, TFM_ENCODER_DECODER),
         made(f, tfm_session_feed_all(C(f), (tfm_session *)P(f, o.s), T(f, TFM_I64, 2, 2, 3), T(f, TFM_I64, 1, 2))));
}
CASE(tfm_session_length) {
    WITH(with_session(f, &o, TFM_DECODER_ONLY), (void)tfm_session_length((tfm_session *)P(f, o.s), N(f, 1)));
}
CASE(tfm_session_truncate) {
    WITH(with_session(f, &o, TFM_DECODER_ONLY),
         did(f, tfm_session_truncate(C(f), (tfm_session *)P(f, o.s), N(f, 1), N(f, 0))));
}
CASE(tfm_session_reorder) {
    int64_t r[2];
    r[0] = N(f, 1);
    r[1] = N(f, 0);
    WITH(with_session(f, &o, TFM_DECODER_ONLY),
         did(f, tfm_session_reorder(C(f), (tfm_session *)P(f, o.s), (int64_t *)P(f, r), N(f, 2) == 2 ? 2 : 3)));
}
CASE(tfm_session_fork) {
    int64_t r[2];
    r[0] = N(f, 1);
    r[1] = N(f, 0);
    WITH(with_session(f, &o, TFM_DECODER_ONLY), {
        tfm_session *s = tfm_session_fork(C(f), (tfm_session *)P(f, o.s), (int64_t *)P(f, r), N(f, 2) == 2 ? 2 : -2);
        made(f, s);
        tfm_session_destroy(s);
    });
}
static tfm_sampling sampling(fixture *f) {
    tfm_sampling s;
    memset(&s, 0, sizeof s);
    s.temperature = R(f, 1);
    s.top_k = N(f, 3);
    s.top_p = R(f, 0.9f);
    s.min_p = R(f, 0.01f);
    s.repetition_penalty = R(f, 1.1f);
    s.frequency_penalty = R(f, 0.1f);
    s.presence_penalty = R(f, 0.1f);
    s.penalty_window = N(f, 4);
    return s;
}
CASE(tfm_sample) {
    tfm_sampling s = sampling(f);
    int64_t before[2] = {1, 2}, id;
    float lp;
    before[0] = N(f, 1);
    did(f, tfm_sample(C(f), T(f, TFM_F32, 1, 11), (tfm_sampling *)P(f, &s), (int64_t *)P(f, before), 2, 0, 0,
                      (int64_t *)P(f, &id), (float *)P(f, &lp)));
}
CASE(tfm_generate) {
    static const int64_t stop[1] = {3};
    int64_t ids[2];
    tfm_prompt prompts[2];
    tfm_sequence out[2];
    tfm_generate_options g;
    memset(&g, 0, sizeof g);
    ids[0] = N(f, 1); ids[1] = 2;
    g.max_new = N(f, 3);
    g.sampling = sampling(f);
    g.prompt_chunk = N(f, 1);
    g.stop_ids = (const int64_t *)P(f, stop);
    g.stop_id_count = 1;
    prompts[0].ids = prompts[1].ids = (const int64_t *)P(f, ids);
    prompts[0].count = 2; prompts[1].count = N(f, 1) == 1 ? 1 : 0;
    WITH(with_session(f, &o, TFM_DECODER_ONLY),
         did(f, tfm_generate(C(f), (tfm_session *)P(f, o.s), (tfm_prompt *)P(f, prompts), N(f, 2) == 2 ? 2 : 1,
                             (tfm_generate_options *)P(f, &g), (tfm_sequence *)P(f, out))));
}
CASE(tfm_beam_search) {
    int64_t ids[1];
    tfm_prompt prompt;
    tfm_sequence out[8];
    tfm_beam_options b;
    memset(&b, 0, sizeof b);
    ids[0] = N(f, 1);
    b.length_penalty = I(f, TFM_LENGTH_GNMT);
    b.beams = N(f, 2);
    b.n_best = N(f, 2) == 2 ? 2 : 1000;
    b.max_new = N(f, 3);
    b.alpha = R(f, 0.6f);
    prompt.ids = ids; prompt.count = 1;
    WITH(with_session(f, &o, TFM_ENCODER_DECODER),
         did(f, tfm_beam_search(C(f), (tfm_session *)P(f, o.s), (tfm_prompt *)P(f, &prompt), 1,
                                (tfm_beam_options *)P(f, &b), (tfm_sequence *)P(f, out))));
}

/* -- files, models ------------------------------------------------------------------------------------------------- */
CASE(tfm_file_open_memory) {
    tfm_file *x = tfm_file_open_memory(C(f), P(f, "\2\0\0\0\0\0\0\0{}"), N(f, 10) == 10 ? 10 : 9);
    made(f, x);
    tfm_file_close(x);
}
CASE(tfm_file_close) { tfm_file_close(NULL); f->failed = 0; }
static void temporary(char *path, size_t size) { test_temporary_path(path, size, "robust.safetensors"); }
static int saved(fixture *f, objects *o, char *path, size_t size) {
    temporary(path, size);
    return with_model(f, o, TFM_ENCODER_ONLY) && tfm_params_save(f->c, o->p, path) == TFM_OK;
}
CASE(tfm_file_open) {
    char path[512];
    WITH(saved(f, &o, path, sizeof path), {
        tfm_file *x = tfm_file_open(C(f), (char *)P(f, path));
        made(f, x);
        tfm_file_close(x);
    });
    remove(path);
}
CASE(tfm_file_count) { WITH(with_file(f, &o), (void)tfm_file_count((tfm_file *)P(f, o.file))); }
CASE(tfm_file_name) { WITH(with_file(f, &o), (void)tfm_file_name((tfm_file *)P(f, o.file), N(f, 0))); }
CASE(tfm_file_metadata) {
    WITH(with_file(f, &o), (void)tfm_file_metadata((tfm_file *)P(f, o.file), (char *)P(f, "k")));
}
CASE(tfm_file_tensor) {
    WITH(with_file(f, &o), made(f, tfm_file_tensor(C(f), (tfm_file *)P(f, o.file), (char *)P(f, "a"))));
}
CASE(tfm_file_has) { WITH(with_file(f, &o), (void)tfm_file_has((tfm_file *)P(f, o.file), (char *)P(f, "a"))); }
CASE(tfm_params_load_file) {
    tfm_rule rule;
    tfm_load_options l;
    memset(&l, 0, sizeof l);
    rule.kind = I(f, TFM_RULE_RENAME);
    rule.from = (char *)P(f, "a");
    rule.to = (char *)P(f, "b");
    rule.index = I(f, 0);
    rule.parts = I(f, 1);
    l.plain = I(f, 1);
    l.cast = I(f, 1);
    l.dtype = I(f, TFM_F32);
    l.rules = &rule;
    l.rule_count = 1;
    l.prefix = (char *)P(f, "x");
    WITH(with_file(f, &o) && (o.p = tfm_params_create(f->c)) != NULL,
         did(f, tfm_params_load_file(C(f), (tfm_params *)P(f, o.p), (tfm_file *)P(f, o.file),
                                     (tfm_load_options *)P(f, &l))));
}
CASE(tfm_params_load_memory) {
    WITH(with_params(f, &o), did(f, tfm_params_load_memory(C(f), (tfm_params *)P(f, o.p), P(f, "\2\0\0\0\0\0\0\0{}"),
                                                           N(f, 10) == 10 ? 10 : 9, NULL)));
}
CASE(tfm_params_saved_size) {
    WITH(with_model(f, &o, TFM_ENCODER_ONLY), (void)tfm_params_saved_size((tfm_params *)P(f, o.p)));
}
CASE(tfm_params_save_memory) {
    static unsigned char b[1 << 16];
    WITH(with_model(f, &o, TFM_ENCODER_ONLY),
         did(f, tfm_params_save_memory(C(f), (tfm_params *)P(f, o.p), P(f, b), N(f, 1) == 1 ? (int64_t)sizeof b : 7)));
}
CASE(tfm_params_load) {
    char path[512];
    WITH(saved(f, &o, path, sizeof path),
         did(f, tfm_params_load(C(f), (tfm_params *)P(f, o.p), (char *)P(f, path), NULL)));
    remove(path);
}
CASE(tfm_params_save) {
    char path[512];
    temporary(path, sizeof path);
    WITH(with_model(f, &o, TFM_ENCODER_ONLY),
         did(f, tfm_params_save(C(f), (tfm_params *)P(f, o.p), (char *)P(f, path))));
    remove(path);
}
CASE(tfm_save_tensors) {
    char path[512];
    const char *names[1];
    const tfm_tensor *list[1];
    temporary(path, sizeof path);
    names[0] = (char *)P(f, "a"); list[0] = T(f, TFM_F32, 2, 2, 3);
    did(f, tfm_save_tensors(C(f), (char *)P(f, path), (const char *const *)P(f, names),
                            (const tfm_tensor *const *)P(f, list), N(f, 1) == 1 ? 1 : -1));
    remove(path);
}
CASE(tfm_write_file) {
    char path[512];
    temporary(path, sizeof path);
    did(f, tfm_write_file(C(f), (char *)P(f, path), P(f, "abc"), N(f, 3) == 3 ? 3 : -3));
    remove(path);
}
CASE(tfm_read_file) {
    char path[512];
    int64_t n;
    temporary(path, sizeof path);
    if (tfm_write_file(f->c, path, "abc", 3) == TFM_OK)
        made(f, tfm_read_file(C(f), (char *)P(f, path), (int64_t *)P(f, &n)));
    else f->failed = 1;
    remove(path);
}
CASE(tfm_llama2c_load_memory) {
    static const unsigned char b[64] = {0};
    tfm_transformer_config k;
    WITH(with_params(f, &o), {
        if (tfm_llama2c_load_memory(C(f), (tfm_params *)P(f, o.p), P(f, b), N(f, 64) == 64 ? 64 : 5,
                                    (tfm_transformer_config *)P(f, &k))
            == TFM_OK)
            f->failed = 1;
        else {
            f->failed = 0;
            tfm_clear(f->c);
        }
    });
}
CASE(tfm_tokenizer_llama2c_memory) {
    static const unsigned char b[64] = {4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 'a'};
    tfm_tokenizer *t = tfm_tokenizer_llama2c_memory(C(f), P(f, b), N(f, 13) == 13 ? 13 : 12, N(f, 1));
    made(f, t);
    tfm_tokenizer_destroy(t);
}
CASE(tfm_tokenizer_lines_memory) {
    tfm_tokenizer *t = tfm_tokenizer_lines_memory(C(f), P(f, "a\nb\n"), N(f, 4) == 4 ? 4 : -1, N(f, 0));
    made(f, t);
    tfm_tokenizer_destroy(t);
}
CASE(tfm_llama2c_load) {
    tfm_transformer_config k;
    WITH(with_params(f, &o), {
        if (tfm_llama2c_load(C(f), (tfm_params *)P(f, o.p), (char *)P(f, "no-such-file"),
                             (tfm_transformer_config *)P(f, &k))
            == TFM_OK)
            f->failed = 1;
        else {
            f->failed = 0;
            tfm_clear(f->c);
        }
    });
}
CASE(tfm_tokenizer_llama2c) {
    tfm_tokenizer *t = tfm_tokenizer_llama2c(C(f), (char *)P(f, "no-such-file"), N(f, 4));
    f->failed = t != NULL;
    tfm_tokenizer_destroy(t);
    tfm_clear(f->c);
}
CASE(tfm_tokenizer_lines) {
    tfm_tokenizer *t = tfm_tokenizer_lines(C(f), (char *)P(f, "no-such-file"), N(f, 4));
    f->failed = t != NULL;
    tfm_tokenizer_destroy(t);
    tfm_clear(f->c);
}
CASE(tfm_tokenizer_destroy) { tfm_tokenizer_destroy(NULL); f->failed = 0; }
CASE(tfm_tokenizer_size) { WITH(with_tokenizer(f, &o), (void)tfm_tokenizer_size((tfm_tokenizer *)P(f, o.tokenizer))); }
CASE(tfm_tokenizer_find) {
    WITH(with_tokenizer(f, &o), (void)tfm_tokenizer_find((tfm_tokenizer *)P(f, o.tokenizer), (char *)P(f, "a")));
}
CASE(tfm_tokenizer_encode) {
    int64_t *ids, n;
    WITH(with_tokenizer(f, &o),
         did(f, tfm_tokenizer_encode(C(f), (tfm_tokenizer *)P(f, o.tokenizer), (char *)P(f, "a b"), I(f, 0), I(f, 0),
                                     (int64_t **)P(f, &ids), (int64_t *)P(f, &n))));
}
CASE(tfm_tokenizer_piece) {
    int64_t n;
    WITH(with_tokenizer(f, &o), (void)tfm_tokenizer_piece(P(f, o.tokenizer), N(f, -1), N(f, 1), (int64_t *)P(f, &n)));
}
CASE(tfm_tokenizer_decode) {
    int64_t ids[2] = {0, 1};
    ids[1] = N(f, 1);
    WITH(with_tokenizer(f, &o), made(f, tfm_tokenizer_decode(C(f), (tfm_tokenizer *)P(f, o.tokenizer),
                                                             (int64_t *)P(f, ids), N(f, 2) == 2 ? 2 : -1)));
}
CASE(tfm_create) {
    tfm_options o;
    tfm_ctx *c;
    memset(&o, 0, sizeof o);
    o.threads = I(f, 1) == 1 ? 1 : -7;
    o.isa = (char *)P(f, "scalar");
    o.memory_limit = N(f, 1 << 30);
    c = tfm_create(&o);
    made(f, c);
    f->created = 0;
    tfm_destroy(c);
}
CASE(tfm_destroy) { tfm_destroy(NULL); f->failed = 0; }

/* -- the runner ---------------------------------------------------------------------------------------------------- */

static const char *current;

static void usable(tfm_ctx *c) {
    static const int64_t origin[TFM_MAX_DIMS] = {0};
    const tfm_tensor *x;
    tfm_clear(c);
    x = tfm_add(c, tfm_ones(c, TFM_SHAPE(3)), tfm_ones(c, TFM_SHAPE(3)));
    cr_assert(x != NULL && tfm_get(x, origin) == 2, "%s: the context does not work afterwards: %s", current,
              tfm_error(c));
}

static tfm_ctx *context(test_memory *m) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.isa = test_env("TFM_ISA", "scalar");
    o.memory_limit = 64 << 20;
    o.allocator = test_allocator(m);
    return tfm_create(&o);
}

static void run(fixture *f, const test_case *t, int target, int bad) {
    tfm_marker mark = tfm_mark(f->c), other = tfm_mark(f->other);
    f->slot = 0; f->target = target; f->bad = bad; f->kinds = 0; f->failed = 0; f->created = 1;
    f->status = TFM_OK;
    f->no_context = 0;
    current = t->name;
    t->run(f);
    /* as tfm_status_of says, unless another call failed; tfm_profile_get finds no row */
    if (f->no_context && f->status != TFM_OK && !tfm_error(f->c)[0] && strcmp(t->name, "tfm_profile_get") != 0)
        cr_assert(f->status == TFM_OOM, "%s: %s for a NULL context", t->name, tfm_status_name(f->status));
    if (f->failed && f->created && target >= 0) {
        /* the slot of the context itself leaves no error behind; every other failure has its sentence */
        int context_slot = f->kinds == 1 && tfm_error(f->c)[0] == 0;
        cr_assert(context_slot || tfm_error(f->c)[0], "%s, slot %d, badness %d: failed without a word", t->name, target,
                  bad);
    }
    if (target < 0) cr_assert(!f->failed, "%s: a correct call failed: %s", t->name, tfm_error(f->c));
    usable(f->c);
    tfm_rewind(f->c, mark);
    tfm_rewind(f->other, other);
}

Test(robustness, a_bad_argument_of_any_function_is_a_clear_error_and_nothing_leaks, .timeout = 300) {
    int i;
    for (i = 0; i < case_count; i++) {
        test_memory m = test_memory_new();
        fixture f;
        int target, slots;
        memset(&f, 0, sizeof f);
        f.c = context(&m);
        f.other = context(&m);
        cr_assert(f.c && f.other);
        run(&f, &cases[i], -1, 0);
        slots = f.slot;
        for (target = 0; target < slots; target++) {
            int bad = 0;
            do run(&f, &cases[i], target, bad);
            while (++bad < f.kinds);
        }
        tfm_destroy(f.c);
        tfm_destroy(f.other);
        cr_assert(m.blocks == 0 && m.damaged == 0, "%s: %lld blocks leaked, %lld damaged", cases[i].name,
                  (long long)m.blocks, (long long)m.damaged);
    }
}

Test(robustness, every_allocation_that_fails_is_a_clear_error_and_nothing_leaks, .timeout = 300) {
    int i;
    for (i = 0; i < case_count; i++) {
        int64_t n;
        if (!strcmp(cases[i].name, "tfm_create") || !strcmp(cases[i].name, "tfm_memory_usage")) continue;
        for (n = 0; n < 2000; n++) {
            test_memory m = test_memory_new(), spare = test_memory_new();
            fixture f;
            int64_t failed;
            memset(&f, 0, sizeof f);
            f.target = -1;
            f.created = 1;
            current = cases[i].name;
            f.other = context(&spare);
            f.c = context(&m);
            cr_assert(f.c && f.other);
            m.fail_at = m.calls + n;
            cases[i].run(&f);
            failed = m.failed;
            m.fail_at = -1;
            if (failed && f.failed)
                cr_assert(tfm_status_of(f.c) == TFM_OOM || !f.created, "%s, allocation %lld: %s (%s)", current,
                          (long long)n, tfm_status_name(tfm_status_of(f.c)), tfm_error(f.c));
            if (!failed) cr_assert(!f.failed, "%s: a correct call failed: %s", current, tfm_error(f.c));
            usable(f.c);
            tfm_destroy(f.c);
            tfm_destroy(f.other);
            cr_assert(m.blocks == 0 && m.damaged == 0, "%s, allocation %lld: %lld blocks leaked, %lld damaged", current,
                      (long long)n, (long long)m.blocks, (long long)m.damaged);
            if (!failed) break;
        }
    }
}

Test(robustness, every_public_function_has_a_case) {
    size_t size = 0;
    char *text = test_read_file(test_env("TFM_HEADER", "transformer.h"), &size), *line, missing[2048] = "";
    cr_assert(text != NULL, "no transformer.h here: run from the repository or set TFM_HEADER");
    for (line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        char name[128] = "";
        char *open;
        size_t n = 0;
        int i, found = 0;
        if (strncmp(line, "TFM_API ", 8)) continue;
        open = strchr(line, '(');
        if (!open) continue;
        while (open > line && (isalnum((unsigned char)open[-1 - (int)n]) || open[-1 - (int)n] == '_')) n++;
        if (n >= sizeof name) continue;
        memcpy(name, open - n, n);
        for (i = 0; i < case_count; i++) found |= !strcmp(cases[i].name, name);
        if (!found && strlen(missing) + n + 2 < sizeof missing) { strcat(missing, " "); strcat(missing, name); }
    }
    free(text);
    cr_assert(missing[0] == 0, "public functions without a case:%s", missing);
}

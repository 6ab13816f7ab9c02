/* build/bench OP [--shape a,b,...] [--isa X|each] [--threads N|each] [--dtype f32|f16|bf16] [--json] ...
 *
 * Times one op of the library on any shape and states it as a share of what the machine can do, measured in the same
 * run and alternated with the op:
 *   fma   products and models: the roofline, which is the FMA peak of the instruction set, or
 *   read  read bandwidth, where reading the operands once takes longer than the arithmetic (one row, decoding);
 *   copy  everything else: memcpy over a working set of the same size,
 *   fresh memcpy into memory that the system hands out anew, for loading weights, or
 *   fma   where an op's multiplications, comparisons and divisions, which all go to the FMA units, take longer than that:
 *         counted from its kernel, see `slots` in the table below.
 * What fits into L2 shows at a shape like 64,768, memory with --cold.
 * Times, peaks and shares are medians. A share of the FMA peak above 1.02 means a broken measurement and fails.
 * `build/bench` alone lists the ops and options. --serve is for comparisons: see bench/peers.py.
 *
 * cc -O2 -I. bench/bench.c -o bench -lm      (the Makefile builds it to build/bench) */
#define _GNU_SOURCE
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include "peak.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_SHAPE 6
#define MAX_OPERANDS 4
#define MAX_BUFFERS 4096         /* operands of less than 24 KB stay in a cache in spite of --cold */
#define MAX_RUNS 1000
#define COLD_BYTES (96 << 20)    /* rotating operands together exceed the last-level cache */
#define BATCH_SECONDS 5e-3       /* calls that are timed together */
#define SERVED_SECONDS 20e-3

enum { BOUND_NONE, BOUND_COPY, BOUND_FRESH, BOUND_ROOFLINE };
static const char *const bound_names[] = {"none", "copy", "fresh", "read"};
enum { MASK_NONE, MASK_BOOL, MASK_BIAS, MASK_LENGTHS, MASK_SEGMENTS, MASK_PREFIX, MASK_KINDS };
static const char *const mask_names[MASK_KINDS] = {"none", "bool", "bias", "lengths", "segments", "prefix"};

/* A decoder-only model as published, for decoder_step and prompt; its sizes are the default shape. */
typedef struct bench_model {
    const char *name, *sizes;
    int64_t kv_heads;
    int position, norm, activation, gated, no_bias, tied_head;
} bench_model;
static const bench_model models[] = {
    {"gpt2", "768,12,3072,12,50257,128", 12, TFM_POSITION_LEARNED, TFM_LAYER_NORM, TFM_ACT_GELU_TANH, 0, 0, 1},
    {"llama", "2048,32,5632,22,32000,128", 4, TFM_POSITION_ROTARY, TFM_RMS_NORM, TFM_ACT_SILU, 1, 1, 0},
};
#define MODEL_COUNT (sizeof models / sizeof *models)

typedef struct bench_settings {
    const char *shape;
    const bench_model *model;
    int64_t batch, kv_heads, window;     /* 0: 1, as many as heads, none */
    int causal, mask, transpose, bf16_dot, dtype, cold, runs, json, serve;
} bench_settings;

typedef struct bench_op bench_op;
typedef struct bench_run {
    const bench_op *op;
    bench_settings set;
    tfm_ctx *c;
    tfm_params *params;
    int64_t shape[MAX_SHAPE], batch, kv_heads;
    int64_t buffers, next;                    /* sets of operands in rotation */
    tfm_tensor *operand[MAX_BUFFERS][MAX_OPERANDS];
    tfm_cache *cache[MAX_BUFFERS];
    tfm_attention_options attention;
    tfm_encoder encoder;
    tfm_session *session;
    char path[64];
    double flops, bytes;                      /* useful work of one call; bytes it must move at least */
    int64_t memory;                           /* what one call takes of the arena */
} bench_run;

struct bench_op {
    const char *name, *shape_text, *default_shape;
    int bound;
    int slots, scalings;      /* per element, of ops bound by copy; see the table */
    int (*prepare)(bench_run *r, int64_t set);     /* makes operand set `set`; 0 on success */
    tfm_tensor *(*call)(bench_run *r, int64_t set);
    tfm_tensor *(*unary)(tfm_ctx *c, const tfm_tensor *t);
    tfm_tensor *(*binary)(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
};

static double element_size(const bench_run *r) { return (double)tfm_dtype_size(r->set.dtype); }
static tfm_tensor *random_tensor(bench_run *r, tfm_shape shape) {
    tfm_tensor *t = tfm_uniform(r->c, shape, -1.0f, 1.0f);
    return r->set.dtype == TFM_F32 ? t : tfm_cast(r->c, t, r->set.dtype);
}
/* Other ids for each `set`. */
static tfm_tensor *random_ids(bench_run *r, tfm_shape shape, int64_t below, int64_t set) {
    tfm_tensor *t = tfm_empty(r->c, TFM_I64, shape);
    uint64_t x = 88172645463325252u + (uint64_t)set * 2862933555777941757u;
    for (int64_t i = 0; t && i < tfm_numel(t); i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;   /* Marsaglia's xorshift */
        ((int64_t *)t->data)[i] = (int64_t)(x % (uint64_t)below);
    }
    return t;
}
static int ready_params(bench_run *r) {
    if (r->set.dtype != TFM_F32 && tfm_params_cast(r->c, r->params, r->set.dtype)) return 1;
    return tfm_params_prepare(r->c, r->params) != TFM_OK;
}

/* ---- products --------------------------------------------------------------------------------------------------- */

static int prepare_matmul(bench_run *r, int64_t set) {
    int64_t b = r->batch, m = r->shape[0], n = r->shape[1], k = r->shape[2];
    tfm_shape left = b == 1 ? TFM_SHAPE(m, k) : TFM_SHAPE(b, m, k), right = b == 1 ? TFM_SHAPE(k, n) : TFM_SHAPE(b, k, n);
    if (r->set.transpose) right = b == 1 ? TFM_SHAPE(n, k) : TFM_SHAPE(b, n, k);
    r->operand[set][0] = random_tensor(r, left);
    r->operand[set][1] = random_tensor(r, right);
    if (r->set.transpose) r->operand[set][1] = tfm_transpose(r->c, r->operand[set][1], -1, -2);
    r->flops = 2.0 * (double)b * (double)m * (double)n * (double)k;
    r->bytes = element_size(r) * (double)b * (double)(m * k + k * n + m * n);
    return 0;
}
static tfm_tensor *call_matmul(bench_run *r, int64_t set) {
    return tfm_matmul(r->c, r->operand[set][0], r->operand[set][1]);
}

static int prepare_linear(bench_run *r, int64_t set) {
    int64_t m = r->shape[0] * r->batch, n = r->shape[1], k = r->shape[2];
    char name[32];
    tfm_linear_layer layer;
    snprintf(name, sizeof name, "linear%d", (int)set);
    if (tfm_linear_init(r->c, r->params, name, k, n, 1, &layer) || ready_params(r)) return 1;
    r->operand[set][0] = tfm_uniform(r->c, TFM_SHAPE(m, k), -1.0f, 1.0f);
    r->operand[set][1] = layer.weight;
    r->operand[set][2] = layer.bias;
    r->flops = 2.0 * (double)m * (double)n * (double)k;
    r->bytes = element_size(r) * (double)(k * n) + 4.0 * (double)(m * k + m * n);
    return 0;
}
/* The weight as a file holds it, not packed. */
static int prepare_linear_plain(bench_run *r, int64_t set) {
    int64_t m = r->shape[0] * r->batch, n = r->shape[1], k = r->shape[2];
    r->operand[set][0] = tfm_uniform(r->c, TFM_SHAPE(m, k), -1.0f, 1.0f);
    r->operand[set][1] = tfm_cast(r->c, tfm_uniform(r->c, TFM_SHAPE(n, k), -1.0f, 1.0f), r->set.dtype);
    r->operand[set][2] = tfm_uniform(r->c, TFM_SHAPE(n), -1.0f, 1.0f);
    r->flops = 2.0 * (double)m * (double)n * (double)k;
    r->bytes = element_size(r) * (double)(k * n) + 4.0 * (double)(m * k + m * n);
    return 0;
}
static tfm_tensor *call_linear(bench_run *r, int64_t set) {
    return tfm_linear(r->c, r->operand[set][0], r->operand[set][1], r->operand[set][2], TFM_ACT_NONE);
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* Keys [*begin, *end) that query i attends: every kind of mask here leaves one range. The last query stands beside
 * the last key that is no padding. */
static void attended_keys(const bench_run *r, int64_t i, int64_t lq, int64_t lk, int64_t *begin, int64_t *end) {
    int kind = r->set.mask, causal = r->set.causal || r->set.window || kind == MASK_BOOL || kind == MASK_PREFIX;
    int64_t held = kind == MASK_LENGTHS ? (lk + 1) / 2 : lk, position = i + held - lq, segment = 4 * i / lq;
    *begin = 0;
    *end = causal ? position + 1 : held;
    if (r->set.window && position + 1 - r->set.window > 0) *begin = position + 1 - r->set.window;
    if (kind == MASK_PREFIX && *end < lk / 4) *end = lk / 4;
    if (kind == MASK_SEGMENTS) {
        int64_t first = (segment * lk + 3) / 4, behind = ((segment + 1) * lk + 3) / 4;
        if (*begin < first) *begin = first;
        if (*end > behind) *end = behind;
    }
    if (*end < *begin) *end = *begin;
}

static tfm_tensor *segments(bench_run *r, int64_t length) {
    tfm_tensor *t = tfm_empty(r->c, TFM_I64, TFM_SHAPE(r->batch, length));
    for (int64_t i = 0; t && i < r->batch * length; i++) ((int64_t *)t->data)[i] = 4 * (i % length) / length;
    return t;
}

/* bool: the causal order as a matrix. bias: a matrix of summands. lengths: half of the keys are padding. segments: four
 * sequences in one row. prefix: a quarter of the keys is seen by all, the others causally. */
static void set_mask(bench_run *r, int64_t lq, int64_t lk) {
    tfm_mask *mask = &r->attention.mask;
    int64_t begin, end;
    if (r->set.causal || r->set.window || r->set.mask == MASK_PREFIX) mask->causal = TFM_CAUSAL_BOTTOM_RIGHT;
    mask->window_left = r->set.window;
    switch (r->set.mask) {
    case MASK_BOOL:
        mask->keep = tfm_empty(r->c, TFM_BOOL, TFM_SHAPE(1, 1, lq, lk));
        for (int64_t i = 0; mask->keep && i < lq; i++) {
            attended_keys(r, i, lq, lk, &begin, &end);
            for (int64_t j = 0; j < lk; j++) ((uint8_t *)mask->keep->data)[i * lk + j] = begin <= j && j < end;
        }
        break;
    case MASK_BIAS: mask->bias = tfm_uniform(r->c, TFM_SHAPE(1, 1, lq, lk), -1.0f, 1.0f); break;
    case MASK_LENGTHS: mask->key_lengths = tfm_full(r->c, TFM_I64, TFM_SHAPE(r->batch), (double)((lk + 1) / 2)); break;
    case MASK_SEGMENTS:
        mask->query_segments = segments(r, lq);
        mask->key_segments = segments(r, lk);
        break;
    case MASK_PREFIX: mask->prefix = lk / 4; break;
    default: break;
    }
}

static int prepare_attention(bench_run *r, int64_t set) {
    int64_t b = r->batch, h = r->shape[0], kv = r->kv_heads, d = r->shape[1], lq = r->shape[2], lk = r->shape[3];
    double pairs = 0;
    r->operand[set][0] = random_tensor(r, TFM_SHAPE(b, h, lq, d));
    r->operand[set][1] = random_tensor(r, TFM_SHAPE(b, kv, lk, d));
    r->operand[set][2] = random_tensor(r, TFM_SHAPE(b, kv, lk, d));
    if (set > 0) return 0;
    set_mask(r, lq, lk);
    for (int64_t i = 0; i < lq; i++) {
        int64_t begin, end;
        attended_keys(r, i, lq, lk, &begin, &end);
        pairs += (double)(end - begin);
    }
    r->flops = 4.0 * (double)(b * h * d) * pairs;
    r->bytes = element_size(r) * (double)(b * d) * 2.0 * ((double)(h * lq) + (double)(kv * lk));
    return 0;
}
static tfm_tensor *call_attention(bench_run *r, int64_t set) {
    return tfm_attention(r->c, r->operand[set][0], r->operand[set][1], r->operand[set][2], &r->attention);
}

/* The same by the formula, as a user without fused attention writes it. */
static int prepare_unfused(bench_run *r, int64_t set) {
    int64_t lq = r->shape[2], lk = r->shape[3];
    if (r->kv_heads != r->shape[0] || r->set.mask != MASK_NONE || r->set.window || prepare_attention(r, set)) return 1;
    if (!r->set.causal || set > 0) return 0;
    r->operand[0][3] = tfm_empty(r->c, TFM_BOOL, TFM_SHAPE(lq, lk));
    for (int64_t i = 0; r->operand[0][3] && i < lq; i++)
        for (int64_t j = 0; j < lk; j++) ((uint8_t *)r->operand[0][3]->data)[i * lk + j] = j > i + lk - lq;
    return 0;
}
static tfm_tensor *call_unfused(bench_run *r, int64_t set) {
    tfm_tensor *keys = tfm_transpose(r->c, r->operand[set][1], -1, -2);
    tfm_tensor *scores = tfm_matmul(r->c, r->operand[set][0], keys);
    scores = tfm_scale(r->c, scores, 1.0f / sqrtf((float)r->shape[1]));
    if (r->set.causal) scores = tfm_masked_fill(r->c, scores, r->operand[0][3], -HUGE_VAL);
    return tfm_matmul(r->c, tfm_softmax(r->c, scores, -1), r->operand[set][2]);
}

static int prepare_decode(bench_run *r, int64_t set) {
    int64_t b = r->batch, h = r->shape[0], d = r->shape[1], keys = r->shape[2];
    tfm_cache_options options;
    tfm_tensor *k, *v;
    tfm_marker mark = tfm_mark(r->c);
    memset(&options, 0, sizeof options);
    options.dtype = r->set.dtype;
    options.batch = b;
    options.heads = r->kv_heads;
    options.key_size = d;
    options.capacity = keys;
    r->cache[set] = tfm_cache_create(r->c, &options);
    if (!r->cache[set]) return 1;
    k = tfm_uniform(r->c, TFM_SHAPE(b, r->kv_heads, keys, d), -1.0f, 1.0f);
    v = tfm_uniform(r->c, TFM_SHAPE(b, r->kv_heads, keys, d), -1.0f, 1.0f);
    if (tfm_cache_append(r->c, r->cache[set], 0, k, v, NULL)) return 1;
    tfm_rewind(r->c, mark);
    r->operand[set][0] = tfm_uniform(r->c, TFM_SHAPE(b, h, 1, d), -1.0f, 1.0f);
    r->flops = 4.0 * (double)(b * h * d) * (double)keys;
    r->bytes = 2.0 * element_size(r) * (double)(b * r->kv_heads * d) * (double)keys;
    return 0;
}
static tfm_tensor *call_decode(bench_run *r, int64_t set) {
    return tfm_attention_cached(r->c, r->operand[set][0], r->cache[set], 0, NULL);
}

/* ---- ops that copy bandwidth bounds ----------------------------------------------------------------------------- */

/* Operands 0 and 1 of rows x cols, a weight and a bias of cols; `moved` of the three rows x cols are read or written. */
static int prepare_rows(bench_run *r, int64_t set, double moved) {
    int64_t rows = r->shape[0] * r->batch, cols = r->shape[1];
    r->operand[set][0] = random_tensor(r, TFM_SHAPE(rows, cols));
    r->operand[set][1] = moved > 2 ? random_tensor(r, TFM_SHAPE(rows, cols)) : NULL;
    r->operand[set][2] = tfm_ones(r->c, TFM_SHAPE(cols));
    r->operand[set][3] = tfm_zeros(r->c, TFM_SHAPE(cols));
    r->bytes = moved * element_size(r) * (double)(rows * cols);
    r->flops = 2.0 * (double)(rows * cols) *
               (r->op->slots + (strcmp(tfm_isa_name(r->c), "avx512") ? r->op->scalings : 0));
    return 0;
}
static int prepare_unary(bench_run *r, int64_t set) { return prepare_rows(r, set, 2); }
static int prepare_binary(bench_run *r, int64_t set) { return prepare_rows(r, set, 3); }
static int prepare_residual(bench_run *r, int64_t set) { return prepare_rows(r, set, 4); }
static tfm_tensor *call_unary(bench_run *r, int64_t set) { return r->op->unary(r->c, r->operand[set][0]); }
static tfm_tensor *call_binary(bench_run *r, int64_t set) {
    return r->op->binary(r->c, r->operand[set][0], r->operand[set][1]);
}
static tfm_tensor *softmax_rows(tfm_ctx *c, const tfm_tensor *t) { return tfm_softmax(c, t, -1); }
static tfm_tensor *log_softmax_rows(tfm_ctx *c, const tfm_tensor *t) { return tfm_log_softmax(c, t, -1); }
static tfm_tensor *transpose_rows(tfm_ctx *c, const tfm_tensor *t) {
    return tfm_contiguous(c, tfm_transpose(c, t, 0, 1));
}
static tfm_tensor *swiglu(tfm_ctx *c, const tfm_tensor *gate, const tfm_tensor *up) {
    return tfm_glu(c, gate, up, TFM_ACT_SILU);
}
static tfm_tensor *call_layer_norm(bench_run *r, int64_t set) {
    return tfm_layer_norm(r->c, r->operand[set][0], r->operand[set][2], r->operand[set][3], NULL);
}
static tfm_tensor *call_rms_norm(bench_run *r, int64_t set) {
    return tfm_rms_norm(r->c, r->operand[set][0], r->operand[set][2], NULL);
}
/* norm(x + residual), and the sum for the next residual: two tensors in, two out */
static tfm_norm_options residual(bench_run *r, int64_t set, tfm_tensor **sum) {
    tfm_norm_options options;
    memset(&options, 0, sizeof options);
    options.residual = r->operand[set][1];
    options.sum = sum;
    return options;
}
static tfm_tensor *call_add_layer_norm(bench_run *r, int64_t set) {
    tfm_tensor *sum;
    tfm_norm_options options = residual(r, set, &sum);
    return tfm_layer_norm(r->c, r->operand[set][0], r->operand[set][2], r->operand[set][3], &options);
}
static tfm_tensor *call_add_rms_norm(bench_run *r, int64_t set) {
    tfm_tensor *sum;
    tfm_norm_options options = residual(r, set, &sum);
    return tfm_rms_norm(r->c, r->operand[set][0], r->operand[set][2], &options);
}

static int prepare_rotary(bench_run *r, int64_t set) {
    r->operand[set][0] = random_tensor(r, TFM_SHAPE(r->batch, r->shape[0], r->shape[1], r->shape[2]));
    r->bytes = 2.0 * element_size(r) * (double)tfm_numel(r->operand[set][0]);
    return 0;
}
static tfm_tensor *call_rotary(bench_run *r, int64_t set) { return tfm_rotary(r->c, r->operand[set][0], NULL, 0, NULL); }
/* by tables made before, as the layers of a model do; heads share them */
static int prepare_rotary_apply(bench_run *r, int64_t set) {
    tfm_rope rope;
    memset(&rope, 0, sizeof rope);
    if (prepare_rotary(r, set)) return 1;
    r->bytes += 4.0 * (double)(r->shape[1] * r->shape[2]);
    return tfm_rotary_tables(r->c, &rope, r->shape[2], 0, r->shape[1], &r->operand[set][1], &r->operand[set][2]) != TFM_OK;
}
static tfm_tensor *call_rotary_apply(bench_run *r, int64_t set) {
    return tfm_rotary_apply(r->c, r->operand[set][0], r->operand[set][1], r->operand[set][2], NULL, 0);
}

/* Tables that together exceed the last-level cache, in turns: one for each set would take gigabytes. */
static int prepare_embedding(bench_run *r, int64_t set) {
    double table_bytes = element_size(r) * (double)r->shape[0] * (double)r->shape[1];
    int64_t tables = (int64_t)(COLD_BYTES / table_bytes) + 2;
    char name[32];
    tfm_embedding_layer layer;
    if (set < tables) {
        snprintf(name, sizeof name, "embedding%d", (int)set);
        if (tfm_embedding_init(r->c, r->params, name, r->shape[0], r->shape[1], &layer) || ready_params(r)) return 1;
        r->operand[set][0] = layer.weight;
    } else r->operand[set][0] = r->operand[set - tables][0];
    r->operand[set][1] = random_ids(r, TFM_SHAPE(r->batch, r->shape[2]), r->shape[0], set);
    r->bytes = (element_size(r) + 4.0) * (double)(r->batch * r->shape[2] * r->shape[1]);
    return 0;
}
static tfm_tensor *call_embedding(bench_run *r, int64_t set) {
    return tfm_embedding(r->c, r->operand[set][0], r->operand[set][1]);
}

/* ---- models ----------------------------------------------------------------------------------------------------- */

static int prepare_encoder(bench_run *r, int64_t set) {
    double rows = (double)(r->shape[0] * r->shape[1]), d = (double)r->shape[2], ff = (double)r->shape[4];
    double shared = (double)r->kv_heads / (double)r->shape[3];   /* keys and values are narrower by this */
    double weights = (double)r->shape[5] * (2.0 * d * d * (1.0 + shared) + 2.0 * d * ff);
    tfm_block_config block;
    memset(&block, 0, sizeof block);
    block.d_model = r->shape[2];
    block.heads = r->shape[3];
    block.kv_heads = r->kv_heads;
    block.d_ff = r->shape[4];
    block.activation = TFM_ACT_GELU;
    if (set == 0) {
        if (tfm_encoder_init(r->c, r->params, "encoder", r->shape[5], &block, 0, &r->encoder)) return 1;
        if (ready_params(r)) return 1;
    }
    r->operand[set][0] = tfm_uniform(r->c, TFM_SHAPE(r->shape[0], r->shape[1], r->shape[2]), -1.0f, 1.0f);
    r->flops = 2.0 * rows * weights + (double)r->shape[5] * 4.0 * rows * (double)r->shape[1] * d;
    r->bytes = element_size(r) * weights + 8.0 * rows * d;
    return 0;
}
static tfm_tensor *call_encoder(bench_run *r, int64_t set) {
    return tfm_encoder_forward(r->c, &r->encoder, r->operand[set][0], NULL);
}

/* A decoder-only model with a session that holds `context` positions of each row, to be fed `rows` more. */
static int prepare_decoder(bench_run *r, int64_t context, int64_t rows) {
    const bench_model *m = r->set.model;
    int64_t d = r->shape[0], heads = r->shape[1], ff = r->shape[2], layers = r->shape[3], vocab = r->shape[4];
    double head_size = (double)d / (double)heads, wide = head_size * (double)(heads + r->kv_heads);
    double layer_weights = (double)d * (2.0 * wide + (m->gated ? 3.0 : 2.0) * (double)ff);
    double b = (double)r->batch, fed = (double)rows, attended = fed * (double)context + 0.5 * fed * (fed + 1.0);
    double cached = 2.0 * b * (double)layers * head_size * (double)r->kv_heads * (double)context;
    tfm_transformer_config config;
    tfm_transformer model;
    tfm_session_options options;
    tfm_marker mark = tfm_mark(r->c);
    memset(&config, 0, sizeof config);
    config.kind = TFM_DECODER_ONLY;
    config.position = m->position;
    config.decoder_layers = layers;
    config.block.norm_first = 1;
    config.block.norm = m->norm;
    config.block.activation = m->activation;
    config.block.gated = m->gated;
    config.block.no_bias = m->no_bias;
    config.block.d_model = d;
    config.block.heads = heads;
    config.block.kv_heads = r->kv_heads;
    config.block.d_ff = ff;
    config.target_vocab = vocab;
    config.tied_head = m->tied_head;
    config.max_length = context + rows;
    memset(&options, 0, sizeof options);
    options.cache_dtype = r->set.dtype;
    options.batch = r->batch;
    options.capacity = context + rows;
    if (tfm_transformer_init(r->c, r->params, "", &config, &model) || ready_params(r)) return 1;
    r->session = tfm_session_create(r->c, &model, &options);
    if (!r->session) return 1;
    if (context > 0 && !tfm_session_feed(r->c, r->session, random_ids(r, TFM_SHAPE(r->batch, context), vocab, 0), NULL))
        return 1;
    tfm_rewind(r->c, mark);
    r->operand[0][0] = random_ids(r, TFM_SHAPE(r->batch, rows), vocab, 0);
    r->flops = b * (2.0 * (double)layers * fed * layer_weights + 2.0 * (double)d * (double)vocab +
                    4.0 * (double)layers * (double)d * attended);
    r->bytes = element_size(r) * ((double)layers * layer_weights + (double)d * (double)vocab + cached);
    return 0;
}
/* Works on one model: in any case it is larger than a cache. */
static int prepare_decoder_step(bench_run *r, int64_t set) { return set > 0 ? 0 : prepare_decoder(r, r->shape[5], 1); }
static int prepare_prompt(bench_run *r, int64_t set) { return set > 0 ? 0 : prepare_decoder(r, 0, r->shape[5]); }
static tfm_tensor *call_feed(bench_run *r, int64_t set) {
    int64_t length = tfm_session_length(r->session, 0);
    tfm_tensor *logits = tfm_session_feed(r->c, r->session, r->operand[0][0], NULL);
    (void)set;
    return logits && tfm_session_truncate(r->c, r->session, -1, length) == TFM_OK ? logits : NULL;
}

/* ---- contexts and files ----------------------------------------------------------------------------------------- */

static int prepare_create(bench_run *r, int64_t set) {
    r->operand[set][0] = tfm_ones(r->c, TFM_SHAPE(1));
    return 0;
}
static tfm_tensor *call_create(bench_run *r, int64_t set) {
    tfm_options options;
    memset(&options, 0, sizeof options);
    options.threads = tfm_threads(r->c);
    options.isa = tfm_isa_name(r->c);
    for (int64_t i = 0; i < r->shape[0]; i++) tfm_destroy(tfm_create(&options));
    return r->operand[set][0];
}

#define PANEL 16 /* outputs */
/* A weight into panels that are there already: what tfm_params_prepare does, without the memory it asks for. */
static int prepare_pack(bench_run *r, int64_t set) {
    const int64_t out = r->shape[0], in = r->shape[1];
    r->operand[set][0] = random_tensor(r, TFM_SHAPE(out, in));
    r->operand[set][1] = tfm_zeros(r->c, TFM_SHAPE(tfm__round_up(out, PANEL), in));
    if (r->set.dtype != TFM_F32) r->operand[set][1] = tfm_cast(r->c, r->operand[set][1], r->set.dtype);
    r->bytes = 2.0 * element_size(r) * (double)(out * in);
    return 0;
}
static tfm_tensor *call_pack(bench_run *r, int64_t set) {
    tfm__pack_job job;
    job.c = r->c;
    job.t = r->operand[set][0];
    job.panels = (char *)r->operand[set][1]->data;
    tfm__for(r->c, tfm__ceil_div(r->shape[0], PANEL), 4, r->bytes, tfm__pack_task, &job);
    return r->operand[set][1];
}

/* A file of about `MB` in matrices of 16 MiB (2048 x 2048 f32), opened, then used as it lies or packed. */
#define OPEN_SIDE 2048
static int64_t open_count(const bench_run *r) { return (r->shape[0] + 15) / 16; }
static int prepare_open(bench_run *r, int64_t set) {
    int file;
    tfm_params *p;
    if (set > 0) return 0;
    snprintf(r->path, sizeof r->path, "/tmp/bench-XXXXXX");
    file = mkstemp(r->path);
    if (file < 0 || close(file) || !(p = tfm_params_create(r->c))) return 1;
    for (int64_t i = 0; i < open_count(r); i++) {
        char name[32];
        snprintf(name, sizeof name, "linear%d.weight", (int)i);
        if (!tfm_params_add(r->c, p, name, TFM_F32, TFM_SHAPE(OPEN_SIDE, OPEN_SIDE))) break;
    }
    if (!*tfm_error(r->c) && tfm_params_save(r->c, p, r->path)) file = -1;
    tfm_params_destroy(p);
    r->operand[set][0] = tfm_ones(r->c, TFM_SHAPE(1));
    r->bytes = 2.0 * 4.0 * (double)(open_count(r) * OPEN_SIDE * OPEN_SIDE);
    return file < 0 || *tfm_error(r->c);
}
static tfm_tensor *open_file(bench_run *r, int packed) {
    tfm_params *p = tfm_params_create(r->c);
    tfm_load_options options;
    int failed;
    memset(&options, 0, sizeof options);
    options.plain = 1;
    failed = !p || tfm_params_load(r->c, p, r->path, &options);
    for (int64_t i = 0; packed && !failed && i < open_count(r); i++) {
        char name[32];
        tfm_linear_layer layer;
        snprintf(name, sizeof name, "linear%d", (int)i);
        failed = tfm_linear_init(r->c, p, name, OPEN_SIDE, OPEN_SIDE, 0, &layer) != TFM_OK;
    }
    failed = failed || (packed && tfm_params_prepare(r->c, p));
    tfm_params_destroy(p);
    return failed ? NULL : r->operand[0][0];
}
static tfm_tensor *call_open_mapped(bench_run *r, int64_t set) { (void)set; return open_file(r, 0); }
static tfm_tensor *call_open_packed(bench_run *r, int64_t set) { (void)set; return open_file(r, 1); }

/* ---- threads ---------------------------------------------------------------------------------------------------- */

/* A job of one piece a thread, each of which waits for the others: all of the time is handing over and coming back. */
static void handoff_task(void *arg, int64_t begin, int64_t end, int slot) {
    int64_t *left = (int64_t *)arg;
    (void)begin, (void)end, (void)slot;
    __atomic_fetch_sub(left, 1, __ATOMIC_ACQ_REL);
    while (__atomic_load_n(left, __ATOMIC_ACQUIRE) > 0) { }
}
static int prepare_handoff(bench_run *r, int64_t set) {
    if (set == 0) r->operand[0][0] = tfm_ones(r->c, TFM_SHAPE(1));
    return 0;
}
static tfm_tensor *call_handoff(bench_run *r, int64_t set) {
    for (int64_t i = 0; i < r->shape[0]; i++) {
        int64_t left = tfm_threads(r->c);
        tfm__for(r->c, left, 1, 1e9, handoff_task, &left);
    }
    return r->operand[set][0];
}

/* What users hand in as tfm_options.parallel_for: threads made for each job, and OpenMP's. */
typedef struct loop_part { void (*run)(void *arg, int i); void *arg; int i; } loop_part;
static void *run_part(void *arg) {
    loop_part *p = (loop_part *)arg;
    p->run(p->arg, p->i);
    return NULL;
}
static void for_pthreads(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    pthread_t thread[PEAK_THREADS];
    loop_part part[PEAK_THREADS];
    (void)user;
    for (int i = 1; i < count; i++) {
        part[i].run = run, part[i].arg = arg, part[i].i = i;
        if (pthread_create(&thread[i], NULL, run_part, &part[i])) exit(1);
    }
    run(arg, 0);
    for (int i = 1; i < count; i++) pthread_join(thread[i], NULL);
}
#if defined(_OPENMP)
static void for_openmp(void *user, int count, void (*run)(void *arg, int i), void *arg) {
    (void)user;
#pragma omp parallel for schedule(static, 1) num_threads(count)
    for (int i = 0; i < count; i++) run(arg, i);
}
#else
#define for_openmp NULL
#endif

/* ---- the table -------------------------------------------------------------------------------------------------- */

#define MODEL_SHAPE "d_model,heads,d_ff,layers,vocab,length"
/* Slots: what a vector of an op takes of the FMA units. Multiplications, fused or not, and comparisons take one, a division
 * two (its own unit is busy for six, beside them); additions, minima, rounding and integers go elsewhere. Measured on Zen 4,
 * where a slot is one cycle of AVX-512, half a cycle of AVX2. Scalings: what multiplying by
 * 2^n adds to them where no instruction does that, as one of AVX-512 does. */
#define ROW_OP(name, slots, scalings, prepare, call, unary, binary) \
    {name, "rows,cols", "1024,768", BOUND_COPY, slots, scalings, prepare, call, unary, binary}
#define UNARY(name, f) ROW_OP(name, 0, 0, prepare_unary, call_unary, f, NULL)
#define CURVE(name, f, slots, scalings) ROW_OP(name, slots, scalings, prepare_unary, call_unary, f, NULL)
#define BINARY(name, f) ROW_OP(name, 0, 0, prepare_binary, call_binary, NULL, f)
#define ROWS(name, prepare, call) ROW_OP(name, 0, 0, prepare, call, NULL, NULL)
#define OP(name, shape_text, shape, bound, prepare, call) {name, shape_text, shape, bound, 0, 0, prepare, call, NULL, NULL}
static const bench_op ops[] = {
    OP("matmul", "m,n,k", "512,512,512", BOUND_ROOFLINE, prepare_matmul, call_matmul),
    OP("linear", "m,n,k", "512,768,768", BOUND_ROOFLINE, prepare_linear, call_linear),
    OP("linear_plain", "m,n,k", "1,768,3072", BOUND_ROOFLINE, prepare_linear_plain, call_linear),
    OP("attention", "heads,head_size,Lq,Lk", "12,64,512,512", BOUND_ROOFLINE, prepare_attention, call_attention),
    OP("unfused", "heads,head_size,Lq,Lk", "12,64,512,512", BOUND_ROOFLINE, prepare_unfused, call_unfused),
    OP("decode", "heads,head_size,keys", "32,128,4096", BOUND_ROOFLINE, prepare_decode, call_decode),
    CURVE("softmax", softmax_rows, 10, 2),
    CURVE("log_softmax", log_softmax_rows, 9, 2),
    ROWS("layer_norm", prepare_unary, call_layer_norm),
    ROWS("rms_norm", prepare_unary, call_rms_norm),
    ROWS("add_layer_norm", prepare_residual, call_add_layer_norm),
    ROWS("add_rms_norm", prepare_residual, call_add_rms_norm),
    UNARY("relu", tfm_relu),
    CURVE("gelu", tfm_gelu, 25, 2),
    CURVE("gelu_tanh", tfm_gelu_tanh, 14, 2),
    CURVE("silu", tfm_silu, 11, 2),
    CURVE("sigmoid", tfm_sigmoid, 11, 2),
    CURVE("tanh", tfm_tanh, 17, 0),
    CURVE("exp", tfm_exp, 9, 1),
    BINARY("add", tfm_add),
    BINARY("mul", tfm_mul),
    ROW_OP("swiglu", 12, 2, prepare_binary, call_binary, NULL, swiglu),
    UNARY("transpose", transpose_rows),
    OP("rotary", "heads,length,head_size", "12,512,64", BOUND_COPY, prepare_rotary, call_rotary),
    OP("rotary_apply", "heads,length,head_size", "12,512,64", BOUND_COPY, prepare_rotary_apply, call_rotary_apply),
    OP("embedding", "vocab,d_model,ids", "30522,768,512", BOUND_COPY, prepare_embedding, call_embedding),
    OP("encoder", "batch,length,d_model,heads,d_ff,layers", "1,128,768,12,3072,2", BOUND_ROOFLINE, prepare_encoder,
       call_encoder),
    OP("decoder_step", MODEL_SHAPE, NULL, BOUND_ROOFLINE, prepare_decoder_step, call_feed),
    OP("prompt", MODEL_SHAPE, NULL, BOUND_ROOFLINE, prepare_prompt, call_feed),
    OP("create", "contexts", "1", BOUND_NONE, prepare_create, call_create),
    OP("handoff", "jobs", "1", BOUND_NONE, prepare_handoff, call_handoff),
    OP("pack", "out,in", "768,768", BOUND_COPY, prepare_pack, call_pack),
    OP("open_mapped", "MB", "64", BOUND_NONE, prepare_open, call_open_mapped),
    OP("open_packed", "MB", "64", BOUND_FRESH, prepare_open, call_open_packed),
};
#define OP_COUNT (sizeof ops / sizeof *ops)

/* ---- measuring -------------------------------------------------------------------------------------------------- */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare_doubles);
    return n & 1 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

/* Seconds of one call; negative when one failed. */
static double time_calls(bench_run *r, int64_t calls) {
    tfm_marker mark = tfm_mark(r->c);
    double begin = bench_now();
    for (int64_t i = 0; i < calls; i++) {
        if (!r->op->call(r, r->next)) return -1;
        tfm_rewind(r->c, mark);
        r->next = (r->next + 1) % r->buffers;
    }
    return (bench_now() - begin) / (double)calls;
}
static int64_t calls_of(double once, double seconds) {
    return once > seconds ? 1 : (int64_t)(seconds / (once > 1e-8 ? once : 1e-8)) + 1;
}

/* What one op reached: medians over the rounds, and of the share that each round found: peaks and op in turns see the same
 * neighbours. */
typedef struct bench_result { double seconds, fma, bandwidth, share; const char *bound; } bench_result;

static int measure(bench_run *r, bench_result *out) {
    static double seconds[MAX_RUNS], fma[MAX_RUNS], bandwidth[MAX_RUNS], share[MAX_RUNS];
    const char *isa = tfm_isa_name(r->c);
    int threads = tfm_threads(r->c), runs = r->set.runs;
    double once = time_calls(r, 1), fma_time, memory_time;
    int64_t calls = calls_of(once, BATCH_SECONDS);
    peak_memory memory;
    memset(out, 0, sizeof *out);
    if (once < 0 || peak_memory_open(&memory, (int64_t)(r->bytes * (double)r->buffers), threads)) return 1;
    for (int i = 0; i < runs; i++) {
        fma[i] = r->flops > 0 ? peak_flops(isa, threads, 0.02) : 0;
        bandwidth[i] = r->op->bound == BOUND_ROOFLINE ? peak_read(isa, &memory, 0.005)
                     : r->op->bound == BOUND_COPY     ? peak_copy(&memory, 0.01)
                     : r->op->bound == BOUND_FRESH    ? peak_fresh(&memory, 0.01) : 0;
        if (r->buffers == 1) time_calls(r, 1);              /* warm again: the peaks have had the caches */
        seconds[i] = time_calls(r, calls);
        if (seconds[i] < 0) break;
        fma_time = fma[i] > 0 ? r->flops / fma[i] : 0;
        memory_time = bandwidth[i] > 0 ? r->bytes / bandwidth[i] : 0;
        share[i] = (memory_time > fma_time ? memory_time : fma_time) / seconds[i];
    }
    peak_memory_close(&memory);
    if (*tfm_error(r->c)) return 1;
    out->seconds = median(seconds, runs);
    out->fma = median(fma, runs);
    out->bandwidth = median(bandwidth, runs);
    out->share = median(share, runs);
    out->bound = bound_names[r->op->bound];
    if (out->fma > 0 && (out->bandwidth <= 0 || r->flops / out->fma > r->bytes / out->bandwidth)) out->bound = "fma";
    return 0;
}

static void append(char *text, size_t size, const char *format, ...) {
    size_t used = strlen(text);
    va_list list;
    va_start(list, format);
    vsnprintf(text + used, size - used, format, list);
    va_end(list);
}

static void print_result(const bench_run *r, const bench_result *x) {
    const char *isa = tfm_isa_name(r->c), *dtype = tfm_dtype_name(r->set.dtype);
    const int threads = tfm_threads(r->c), is_fma = r->op->bound == BOUND_ROOFLINE && !strcmp(x->bound, "fma");
    const double gflops = 1e-9 * r->flops / x->seconds, gbs = 1e-9 * r->bytes / x->seconds;
    char text[160] = "", more[160] = "";
    int sizes = 1;
    for (const char *p = r->op->shape_text; *p; p++) sizes += *p == ',';
    for (int i = 0; i < sizes; i++) append(text, sizeof text, "%s%lld", i ? "," : "", (long long)r->shape[i]);
    if (r->set.json) {
        printf("{\"op\": \"%s\", \"shape\": [%s], \"isa\": \"%s\", \"threads\": %d, \"dtype\": \"%s\", "
               "\"batch\": %lld, \"kv_heads\": %lld, \"causal\": %s, \"window\": %lld, \"mask\": \"%s\", "
               "\"model\": \"%s\", \"cold\": %s, \"transpose\": %s, \"bf16_dot\": %s, \"ms\": %.6f, ",
               r->op->name, text, isa, threads, dtype, (long long)r->batch, (long long)r->kv_heads,
               r->set.causal ? "true" : "false", (long long)r->set.window, mask_names[r->set.mask],
               r->op->default_shape ? "" : r->set.model->name, r->set.cold ? "true" : "false",
               r->set.transpose ? "true" : "false", r->set.bf16_dot ? "true" : "false", 1e3 * x->seconds);
        if (r->op->bound == BOUND_ROOFLINE) printf("\"gflops\": %.3f, \"peak_gflops\": %.3f, ", gflops, 1e-9 * x->fma);
        printf("\"gbs\": %.3f, \"peak_gbs\": %.3f, \"bound\": \"%s\", \"peak_share\": %.4f, \"memory_bytes\": %lld}\n",
               gbs, 1e-9 * x->bandwidth, x->bound, x->share, (long long)r->memory);
        return;
    }
    if (r->batch > 1) append(more, sizeof more, " batch %lld", (long long)r->batch);
    if (r->set.causal) append(more, sizeof more, " causal");
    if (r->set.window) append(more, sizeof more, " window %lld", (long long)r->set.window);
    if (r->set.mask) append(more, sizeof more, " %s", mask_names[r->set.mask]);
    if (!r->op->default_shape) append(more, sizeof more, " %s", r->set.model->name);
    if (r->set.transpose) append(more, sizeof more, " transpose");
    if (r->set.bf16_dot) append(more, sizeof more, " bf16-dot");
    if (r->set.cold) append(more, sizeof more, " cold");
    printf("%-14s %-26s %-6s %2d %-4s %11.4f ms", r->op->name, text, isa, threads, dtype, 1e3 * x->seconds);
    if (r->op->bound != BOUND_NONE)
        printf(" %8.1f %-7s %5.1f %% of %s", is_fma ? gflops : gbs, is_fma ? "GFLOP/s" : "GB/s", 100 * x->share,
               x->bound);
    printf("%s\n", more);
    fflush(stdout);
}

/* Says "ready", then for each line of its input times a batch of calls and prints the milliseconds of one. */
static int serve(bench_run *r) {
    char line[64];
    double once = time_calls(r, 1);
    int64_t calls = calls_of(once, SERVED_SECONDS);
    printf("ready\n");
    fflush(stdout);
    while (once >= 0 && fgets(line, sizeof line, stdin)) {
        if (once < SERVED_SECONDS) time_calls(r, 1);   /* another program has had the caches */
        once = time_calls(r, calls);
        printf("%.6f\n", 1e3 * once);
        fflush(stdout);
    }
    return once < 0;
}

#define MAX_SIZE (1LL << 31)

/* The number that `text` begins with, up to `end`; 0 on success. Too many digits saturate, and are beyond `most`. */
static int parse_number(const char *text, char **end, int64_t least, int64_t most, int64_t *out) {
    long long x = strtoll(text, end, 10);
    if (*end == text || x < least || x > most) return 1;
    *out = x;
    return 0;
}

static int parse_shape(const char *text, const char *names, int64_t *shape) {
    for (int i = 0; ; i++) {
        char *end;
        names = strchr(names, ',');
        if (parse_number(text, &end, 1, MAX_SIZE, &shape[i]) || *end != (names ? ',' : 0)) return 1;
        if (!names) return 0;
        names++;
        text = end + 1;
    }
}

/* Whether sums of products of the batch and two sizes could overflow. */
static int too_large(const int64_t *shape, int64_t batch) {
    for (int i = 1; i < MAX_SHAPE; i++)
        for (int j = 0; j < i; j++) if ((double)batch * (double)shape[i] * (double)shape[j] > 1e18) return 1;
    return 0;
}

static void close_run(bench_run *r) {
    if (*r->path) unlink(r->path);
    for (int i = 0; i < MAX_BUFFERS; i++) tfm_cache_destroy(r->cache[i]);
    tfm_session_destroy(r->session);
    tfm_params_destroy(r->params);
    tfm_destroy(r->c);
}

static int open_run(bench_run *r, const bench_op *op, const bench_settings *set, const tfm_options *options) {
    const char *shape = set->shape ? set->shape : op->default_shape ? op->default_shape : set->model->sizes;
    int of_model = !op->default_shape;
    int64_t heads;
    tfm_marker mark;
    memset(r, 0, sizeof *r);
    r->op = op;
    r->set = *set;
    if (parse_shape(shape, op->shape_text, r->shape)) {
        fprintf(stderr, "%s: --shape wants %s, numbers from 1 to %lld\n", op->name, op->shape_text, MAX_SIZE);
        return 2;
    }
    r->batch = set->batch ? set->batch : 1;
    if (too_large(r->shape, r->batch)) {
        fprintf(stderr, "%s: --shape %s with --batch %lld is too large\n", op->name, shape, (long long)r->batch);
        return 2;
    }
    heads = r->shape[of_model ? 1 : op->prepare == prepare_encoder ? 3 : 0];
    if (set->kv_heads > heads) {
        fprintf(stderr, "%s: --kv-heads is %lld, of %lld heads\n", op->name, (long long)set->kv_heads,
                (long long)heads);
        return 2;
    }
    r->kv_heads = set->kv_heads ? set->kv_heads : of_model && !set->shape ? set->model->kv_heads : heads;
    r->c = tfm_create(options);
    r->params = r->c ? tfm_params_create(r->c) : NULL;
    r->buffers = 1;
    if (!r->params || op->prepare(r, 0)) return 1;
    if (set->cold && r->bytes > 0) {
        r->buffers = (int64_t)(COLD_BYTES / r->bytes) + 2;
        if (r->buffers > MAX_BUFFERS) r->buffers = MAX_BUFFERS;
        for (int64_t i = 1; i < r->buffers; i++) if (op->prepare(r, i)) return 1;
    }
    mark = tfm_mark(r->c);
    if (time_calls(r, 1) < 0) return 1;                 /* warm: pages, caches, pool */
    tfm_memory_reset(r->c);
    r->memory = -tfm_memory_usage(r->c).arena_used;
    if (time_calls(r, 1) < 0) return 1;
    r->memory += tfm_memory_usage(r->c).arena_peak;
    tfm_rewind(r->c, mark);
    return 0;
}

static int run_op(const bench_op *op, const bench_settings *set, const tfm_options *options) {
    static bench_run r;
    bench_result result;
    int status = open_run(&r, op, set, options);
    memset(&result, 0, sizeof result);
    if (status == 2) return 2;
    if (!status) status = set->serve ? serve(&r) : measure(&r, &result);
    if (status) {
        fprintf(stderr, "%s: %s\n", op->name, *tfm_error(r.c) ? tfm_error(r.c) : "not with these options");
    } else if (!set->serve) {
        print_result(&r, &result);
        if (!strcmp(result.bound, "fma") && result.share > (options->bf16_dot ? 2.04 : 1.02)) {
            fprintf(stderr, "%s: a share of %.3f of the peak cannot be: measure again\n", op->name, result.share);
            status = 1;
        }
    }
    close_run(&r);
    return status;
}

/* ---- command line ----------------------------------------------------------------------------------------------- */

static int usage(void) {
    fprintf(stderr,
            "usage: bench OP [--shape S] [--isa scalar|neon|avx2|avx512|each] [--threads N|each] [--dtype f32|f16|bf16]\n"
            "             [--batch B] [--heads H] [--kv-heads K] [--causal] [--window W] [--transpose] [--cold] [--bf16-dot]\n"
            "             [--mask none|bool|bias|lengths|segments|prefix] [--model gpt2|llama] [--runs N] [--json]\n"
            "             [--parallel-for own|pthreads|openmp]\n");
    for (size_t i = 0; i < OP_COUNT; i++)
        fprintf(stderr, "  %-14s --shape %s   (default %s)\n", ops[i].name, ops[i].shape_text,
                ops[i].default_shape ? ops[i].default_shape : "that of --model");
    fprintf(stderr, "  all            every op with its default shape\n");
    return 2;
}

/* `text` with the size called "heads" in the op's shape replaced; the caller frees it. */
static char *with_heads(const bench_op *op, const char *text, const char *heads) {
    const char *at = strstr(op->shape_text, "heads"), *from = text;
    char *out = (char *)malloc(strlen(text) + strlen(heads) + 1);
    if (!out || !at) { free(out); return NULL; }
    for (const char *p = op->shape_text; p < at && from; p++)
        if (*p == ',') { from = strchr(from, ','); from = from ? from + 1 : NULL; }
    if (!from) { free(out); return NULL; }
    memcpy(out, text, (size_t)(from - text));
    strcpy(out + (from - text), heads);
    from = strchr(from, ',');
    if (from) strcat(out, from);
    return out;
}

static int read_number(const char *name, const char *text, int64_t least, int64_t most, int64_t *out) {
    char *end;
    if (!parse_number(text, &end, least, most, out) && !*end) return 0;
    fprintf(stderr, "bench: %s wants a number from %lld to %lld, not '%s'\n", name, (long long)least, (long long)most,
            text);
    return 2;
}

/* Index of `value` in a list of names, -1: not there. */
static int find_name(const char *value, const char *const *names, int count) {
    for (int i = 0; i < count; i++) if (!strcmp(value, names[i])) return i;
    return -1;
}

static int run_all(const char *name, const bench_settings *set, const tfm_options *options, int each_isa,
                   int each_thread, const char *heads) {
    static const char *const isas[] = {"avx512", "avx2", "neon", "scalar"};
    int found = 0, status = 0;
    for (size_t i = 0; i < OP_COUNT; i++) {
        bench_settings own = *set;
        const bench_op *op = &ops[i];
        char *shape = NULL;
        if (strcmp(name, "all") && strcmp(name, op->name)) continue;
        found = 1;
        if (heads) {
            own.shape = shape = with_heads(op, set->shape ? set->shape
                                           : op->default_shape ? op->default_shape : set->model->sizes, heads);
            if (!shape) return usage();
        }
        for (int j = 0; j < (each_isa ? 4 : 1); j++) {
            tfm_options o = *options;
            if (each_isa) o.isa = isas[j];
            if (each_isa && !tfm_isa_supported(o.isa)) continue;
            for (int t = each_thread ? 1 : o.threads; ; t = 0) {
                o.threads = t;
                status |= run_op(op, &own, &o);
                if (!each_thread || t == 0) break;
            }
        }
        free(shape);
    }
    return found ? status : usage();
}

int main(int argc, char **argv) {
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    static const int dtype_values[] = {TFM_F32, TFM_F16, TFM_BF16};
    static const char *const loops[] = {"own", "pthreads", "openmp"};
    static void (*const loop_functions[])(void *, int, void (*)(void *, int), void *) = {NULL, for_pthreads, for_openmp};
    const char *heads = NULL;
    tfm_options options;
    bench_settings set;
    int64_t threads = 1, runs = 9;
    int each_isa = 0, each_thread = 0;
    memset(&options, 0, sizeof options);
    memset(&set, 0, sizeof set);
    set.dtype = TFM_F32;
    set.model = &models[0];
    for (int i = 2; i < argc; i++) {
        const struct { const char *name; int *on; } flags[] = {
            {"--causal", &set.causal}, {"--transpose", &set.transpose}, {"--cold", &set.cold}, {"--json", &set.json},
            {"--bf16-dot", &set.bf16_dot},
            {"--serve", &set.serve}};
        const struct { const char *name; int64_t least, most, *number; } numbers[] = {
            {"--batch", 1, MAX_SIZE, &set.batch}, {"--kv-heads", 1, MAX_SIZE, &set.kv_heads},
            {"--window", 1, MAX_SIZE, &set.window}, {"--threads", 0, PEAK_THREADS, &threads},
            {"--runs", 1, MAX_RUNS, &runs}};
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        size_t f;
        int index = 0;
        for (f = 0; f < sizeof flags / sizeof *flags && strcmp(a, flags[f].name); f++) { }
        if (f < sizeof flags / sizeof *flags) { *flags[f].on = 1; continue; }
        if (!value) return usage();
        i++;
        if (!strcmp(a, "--threads") && (each_thread = !strcmp(value, "each")) != 0) value = "0";
        for (f = 0; f < sizeof numbers / sizeof *numbers && strcmp(a, numbers[f].name); f++) { }
        if (f < sizeof numbers / sizeof *numbers) {
            if (read_number(a, value, numbers[f].least, numbers[f].most, numbers[f].number)) return 2;
        } else if (!strcmp(a, "--shape")) set.shape = value;
        else if (!strcmp(a, "--heads")) heads = value;
        else if (!strcmp(a, "--isa")) { each_isa = !strcmp(value, "each"); options.isa = each_isa ? NULL : value; }
        else if (!strcmp(a, "--mask")) set.mask = index = find_name(value, mask_names, MASK_KINDS);
        else if (!strcmp(a, "--dtype")) {
            index = find_name(value, dtypes, 3);
            if (index >= 0) set.dtype = dtype_values[index];
        } else if (!strcmp(a, "--parallel-for")) {
            index = find_name(value, loops, 3);
            if (index >= 0) options.parallel_for = loop_functions[index];
            if (index > 0 && !options.parallel_for) { fprintf(stderr, "bench: built without OpenMP\n"); return 2; }
        } else if (!strcmp(a, "--model")) {
            for (index = (int)MODEL_COUNT - 1; index >= 0 && strcmp(value, models[index].name); index--) { }
            if (index >= 0) set.model = &models[index];
        } else return usage();
        if (index < 0) return usage();
    }
    options.threads = (int)threads;
    options.bf16_dot = set.bf16_dot;
    set.runs = (int)runs;
    return argc < 2 ? usage() : run_all(argv[1], &set, &options, each_isa, each_thread, heads);
}

/* build/bench OP [--shape a,b,...] [--isa X] [--threads N] [--causal] [--dtype f32|f16|bf16] [--runs N] [--cold] [--json]
 *
 * Times one op of the library and states it as a share of what the machine can do, measured in the same run and alternated
 * with the op: FLOP-bound ops against the FMA peak of the same instruction set, the others against copy bandwidth over a
 * working set of the same size. Figures are medians. A share above 1.02 means a broken measurement and fails.
 *
 * cc -O2 -I. bench/bench.c -o bench -lm      (the Makefile builds it to build/bench) */
#define _GNU_SOURCE
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
#include "peak.h"
#include <stdlib.h>
#include <string.h>

#define MAX_SHAPE 6
#define MAX_BUFFERS 64
#define MAX_RUNS 1000
#define COLD_BYTES (96 << 20) /* rotating operands together exceed the last-level cache */

typedef struct bench_op bench_op;
typedef struct bench_run {
    const bench_op *op;
    tfm_ctx *c;
    tfm_params *params;
    int64_t shape[MAX_SHAPE];
    int causal, dtype, cold;
    int64_t buffers, next;                    /* sets of operands in rotation */
    tfm_tensor *operand[MAX_BUFFERS][4];
    tfm_encoder encoder;
    double flops, bytes;                      /* useful work of one call; bytes an op must move at least */
} bench_run;

struct bench_op {
    const char *name, *shape_text, *default_shape;
    int sizes;
    int flop_bound;
    int (*prepare)(bench_run *r, int64_t set);     /* makes operand set `set`; 0 on success */
    tfm_tensor *(*call)(bench_run *r, tfm_tensor **operand);
};

static tfm_tensor *random_tensor(bench_run *r, tfm_shape shape) {
    tfm_tensor *t = tfm_uniform(r->c, shape, -1.0f, 1.0f);
    return r->dtype == TFM_F32 ? t : tfm_cast(r->c, t, r->dtype);
}

static int prepare_matmul(bench_run *r, int64_t set) {
    int64_t m = r->shape[0], n = r->shape[1], k = r->shape[2];
    r->operand[set][0] = random_tensor(r, TFM_SHAPE(m, k));
    r->operand[set][1] = random_tensor(r, TFM_SHAPE(k, n));
    r->flops = 2.0 * (double)m * (double)n * (double)k;
    r->bytes = (double)tfm_dtype_size(r->dtype) * (double)(m * k + k * n + m * n);
    return 0;
}
static tfm_tensor *call_matmul(bench_run *r, tfm_tensor **o) { return tfm_matmul(r->c, o[0], o[1]); }

static int prepare_linear(bench_run *r, int64_t set) {
    int64_t m = r->shape[0], n = r->shape[1], k = r->shape[2];
    char name[32];
    tfm_linear_layer layer;
    snprintf(name, sizeof name, "linear%d", (int)set);
    if (tfm_linear_init(r->c, r->params, name, k, n, 1, &layer)) return 1;
    if (r->dtype != TFM_F32 && tfm_params_cast(r->c, r->params, r->dtype)) return 1;
    if (tfm_params_prepare(r->c, r->params)) return 1;
    r->operand[set][0] = tfm_uniform(r->c, TFM_SHAPE(m, k), -1.0f, 1.0f);
    r->operand[set][1] = layer.weight;
    r->operand[set][2] = layer.bias;
    r->flops = 2.0 * (double)m * (double)n * (double)k;
    r->bytes = (double)tfm_dtype_size(r->dtype) * (double)(k * n) + 4.0 * (double)(m * k + m * n);
    return 0;
}
static tfm_tensor *call_linear(bench_run *r, tfm_tensor **o) {
    return tfm_linear(r->c, o[0], o[1], o[2], TFM_ACT_NONE);
}

static int prepare_attention(bench_run *r, int64_t set) {
    int64_t h = r->shape[0], d = r->shape[1], lq = r->shape[2], lk = r->shape[3];
    double pairs = (double)lq * (double)lk;
    r->operand[set][0] = random_tensor(r, TFM_SHAPE(1, h, lq, d));
    r->operand[set][1] = random_tensor(r, TFM_SHAPE(1, h, lk, d));
    r->operand[set][2] = random_tensor(r, TFM_SHAPE(1, h, lk, d));
    if (r->causal) {   /* pairs that a causal mask aligned at the end leaves */
        pairs = 0;
        for (int64_t i = 0; i < lq; i++) { int64_t seen = i + 1 + lk - lq; pairs += seen > 0 ? (double)seen : 0; }
    }
    r->flops = 4.0 * (double)h * (double)d * pairs;
    r->bytes = (double)tfm_dtype_size(r->dtype) * (double)(h * d) * (2.0 * (double)lq + 2.0 * (double)lk);
    return 0;
}
static tfm_tensor *call_attention(bench_run *r, tfm_tensor **o) {
    tfm_attention_options options;
    memset(&options, 0, sizeof options);
    options.mask.causal = r->causal ? TFM_CAUSAL_BOTTOM_RIGHT : TFM_CAUSAL_NONE;
    return tfm_attention(r->c, o[0], o[1], o[2], &options);
}

static int prepare_rows(bench_run *r, int64_t set) {
    r->operand[set][0] = random_tensor(r, TFM_SHAPE(r->shape[0], r->shape[1]));
    r->operand[set][1] = tfm_ones(r->c, TFM_SHAPE(r->shape[1]));
    r->operand[set][2] = tfm_zeros(r->c, TFM_SHAPE(r->shape[1]));
    r->bytes = 2.0 * (double)tfm_dtype_size(r->dtype) * (double)(r->shape[0] * r->shape[1]);
    return 0;
}
static tfm_tensor *call_softmax(bench_run *r, tfm_tensor **o) { return tfm_softmax(r->c, o[0], -1); }
static tfm_tensor *call_gelu(bench_run *r, tfm_tensor **o) { return tfm_gelu(r->c, o[0]); }
static tfm_tensor *call_layer_norm(bench_run *r, tfm_tensor **o) {
    return tfm_layer_norm(r->c, o[0], o[1], o[2], NULL);
}
static tfm_tensor *call_rms_norm(bench_run *r, tfm_tensor **o) { return tfm_rms_norm(r->c, o[0], o[1], NULL); }
static tfm_tensor *call_add(bench_run *r, tfm_tensor **o) { return tfm_add(r->c, o[0], o[1]); }

static int prepare_encoder(bench_run *r, int64_t set) {
    double rows = (double)(r->shape[0] * r->shape[1]), d = (double)r->shape[2], ff = (double)r->shape[4];
    tfm_block_config block;
    memset(&block, 0, sizeof block);
    block.d_model = r->shape[2];
    block.heads = r->shape[3];
    block.d_ff = r->shape[4];
    block.activation = TFM_ACT_GELU;
    if (set == 0) {
        if (tfm_encoder_init(r->c, r->params, "encoder", r->shape[5], &block, 0, &r->encoder)) return 1;
        if (r->dtype != TFM_F32 && tfm_params_cast(r->c, r->params, r->dtype)) return 1;
        if (tfm_params_prepare(r->c, r->params)) return 1;
    }
    r->operand[set][0] = tfm_uniform(r->c, TFM_SHAPE(r->shape[0], r->shape[1], r->shape[2]), -1.0f, 1.0f);
    r->flops = (double)r->shape[5] * (2.0 * rows * (4.0 * d * d + 2.0 * d * ff) + 4.0 * rows * (double)r->shape[1] * d);
    return 0;
}
static tfm_tensor *call_encoder(bench_run *r, tfm_tensor **o) {
    return tfm_encoder_forward(r->c, &r->encoder, o[0], NULL);
}

static const bench_op ops[] = {
    {"matmul", "m,n,k", "512,512,512", 3, 1, prepare_matmul, call_matmul},
    {"linear", "m,n,k", "512,768,768", 3, 1, prepare_linear, call_linear},
    {"attention", "heads,head_size,Lq,Lk", "12,64,512,512", 4, 1, prepare_attention, call_attention},
    {"softmax", "rows,cols", "1024,1024", 2, 0, prepare_rows, call_softmax},
    {"layer_norm", "rows,cols", "1024,768", 2, 0, prepare_rows, call_layer_norm},
    {"rms_norm", "rows,cols", "1024,768", 2, 0, prepare_rows, call_rms_norm},
    {"gelu", "rows,cols", "1024,768", 2, 0, prepare_rows, call_gelu},
    {"add", "rows,cols", "1024,768", 2, 0, prepare_rows, call_add},
    {"encoder", "batch,length,d_model,heads,d_ff,layers", "1,128,768,12,3072,2", 6, 1, prepare_encoder, call_encoder},
};
#define OP_COUNT (sizeof ops / sizeof *ops)

static int usage(void) {
    fprintf(
        stderr,
        "usage: bench OP [--shape S] [--isa scalar|neon|avx2|avx512] [--threads N] [--causal] [--dtype f32|f16|bf16]\n"
        "             [--runs N] [--cold] [--json]\n");
    for (size_t i = 0; i < OP_COUNT; i++)
        fprintf(stderr, "  %-12s --shape %s   (default %s)\n", ops[i].name, ops[i].shape_text, ops[i].default_shape);
    fprintf(stderr, "  all          every op with its default shape\n");
    return 2;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare_doubles);
    return n & 1 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

static double time_calls(bench_run *r, int64_t calls) {
    tfm_marker mark = tfm_mark(r->c);
    double begin = bench_now();
    for (int64_t i = 0; i < calls; i++) {
        if (!r->op->call(r, r->operand[r->next])) return -1;
        tfm_rewind(r->c, mark);
        r->next = (r->next + 1) % r->buffers;
    }
    return (bench_now() - begin) / (double)calls;
}

static int parse_shape(const char *text, int64_t *shape, int sizes) {
    for (int i = 0; i < sizes; i++) {
        char *end;
        long long x = strtoll(text, &end, 10);
        if (end == text || x < 1 || x > (1LL << 31) || *end != (i + 1 < sizes ? ',' : 0)) return 1;
        shape[i] = x;
        text = end + 1;
    }
    return 0;
}

static int run_op(const bench_op *op, const char *shape, const tfm_options *options, int causal, int dtype, int runs,
                  int cold, int json) {
    static bench_run r;
    static double ms[MAX_RUNS], peaks[MAX_RUNS];
    double once, peak, share, rate, set_bytes;
    int64_t calls;
    tfm_marker mark;
    memset(&r, 0, sizeof r);
    r.op = op;
    r.causal = causal;
    r.dtype = dtype;
    r.cold = cold;
    if (parse_shape(shape ? shape : op->default_shape, r.shape, op->sizes)) {
        fprintf(stderr, "%s: --shape wants %s, positive numbers\n", op->name, op->shape_text);
        return 2;
    }
    r.c = tfm_create(options);
    r.params = r.c ? tfm_params_create(r.c) : NULL;
    if (!r.params || op->prepare(&r, 0)) goto failed;
    r.buffers = 1;
    set_bytes = r.bytes > 0 ? r.bytes : 1;
    if (cold) {
        r.buffers = (int64_t)(COLD_BYTES / set_bytes) + 2;
        if (r.buffers > MAX_BUFFERS) r.buffers = MAX_BUFFERS;
        for (int64_t i = 1; i < r.buffers; i++) if (op->prepare(&r, i)) goto failed;
    }
    mark = tfm_mark(r.c);
    (void)mark;
    if (time_calls(&r, 2) < 0) goto failed;                 /* warm: pages, caches, pool */
    once = time_calls(&r, 1);
    if (once < 0) goto failed;
    calls = once > 5e-3 ? 1 : (int64_t)(5e-3 / (once > 1e-8 ? once : 1e-8)) + 1;
    for (int i = 0; i < runs; i++) { /* peak and op in turns, so that both see the same neighbours */
        peaks[i] = op->flop_bound ? peak_flops(tfm_isa_name(r.c), tfm_threads(r.c), 0.02)
                                  : peak_copy((int64_t)(set_bytes * (double)r.buffers), tfm_threads(r.c), 0.02);
        once = time_calls(&r, calls);
        if (once < 0) goto failed;
        ms[i] = 1e3 * once;
    }
    once = median(ms, runs);
    /* The largest peak seen: an op that ran between two disturbed peak loops must not look better than the machine is. */
    peak = 0;
    for (int i = 0; i < runs; i++) if (peaks[i] > peak) peak = peaks[i];
    rate = (op->flop_bound ? r.flops : r.bytes) / (once * 1e-3);
    share = peak > 0 ? rate / peak : 0;
    if (json) {
        printf("{\"op\": \"%s\", \"shape\": [", op->name);
        for (int i = 0; i < op->sizes; i++) printf("%s%lld", i ? ", " : "", (long long)r.shape[i]);
        printf("], \"isa\": \"%s\", \"threads\": %d, \"dtype\": \"%s\", \"causal\": %s, \"cold\": %s, \"ms\": %.6f, "
               "\"%s\": %.3f, \"peak_%s\": %.3f, \"peak_share\": %.4f}\n",
               tfm_isa_name(r.c), tfm_threads(r.c), tfm_dtype_name(dtype), causal ? "true" : "false",
               cold ? "true" : "false", once, op->flop_bound ? "gflops" : "gbs", rate * 1e-9,
               op->flop_bound ? "gflops" : "gbs", peak * 1e-9, share);
    } else {
        char text[128] = "";
        for (int i = 0; i < op->sizes; i++)
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%lld", i ? "," : "", (long long)r.shape[i]);
        printf("%-11s %-24s %-7s %2d thread%s %s%s %-4s %10.4f ms %8.1f %s  %5.1f %% of the %s\n", op->name, text,
               tfm_isa_name(r.c), tfm_threads(r.c), tfm_threads(r.c) > 1 ? "s" : " ", tfm_dtype_name(dtype),
               causal ? " causal" : "", cold ? "cold" : "warm", once, rate * 1e-9, op->flop_bound ? "GFLOP/s" : "GB/s",
               100 * share, op->flop_bound ? "FMA peak" : "copy bandwidth");
    }
    tfm_params_destroy(r.params);
    tfm_destroy(r.c);
    if (op->flop_bound && share > 1.02) {
        fprintf(stderr, "%s: a share of %.3f of the peak cannot be: measure again\n", op->name, share);
        return 1;
    }
    return 0;
failed:
    fprintf(stderr, "%s: %s\n", op->name, tfm_error(r.c));
    tfm_params_destroy(r.params);
    tfm_destroy(r.c);
    return 1;
}

int main(int argc, char **argv) {
    const char *shape = NULL, *name = argc > 1 ? argv[1] : "";
    tfm_options options;
    int causal = 0, dtype = TFM_F32, runs = 9, cold = 0, json = 0, found = 0, status = 0;
    memset(&options, 0, sizeof options);
    options.threads = 1;
    for (int i = 2; i < argc; i++) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(a, "--causal")) causal = 1;
        else if (!strcmp(a, "--cold")) cold = 1;
        else if (!strcmp(a, "--json")) json = 1;
        else if (!value) return usage();
        else if (!strcmp(a, "--shape")) { shape = value; i++; }
        else if (!strcmp(a, "--isa")) { options.isa = value; i++; }
        else if (!strcmp(a, "--threads")) { options.threads = atoi(value); i++; }
        else if (!strcmp(a, "--runs")) { runs = atoi(value); i++; }
        else if (!strcmp(a, "--dtype")) {
            for (dtype = TFM_F32; dtype <= TFM_BF16 && strcmp(value, tfm_dtype_name(dtype)); dtype++) { }
            if (dtype > TFM_BF16) return usage();
            i++;
        } else return usage();
    }
    if (runs < 1 || runs > MAX_RUNS || options.threads < 0 || options.threads > 256) return usage();
    for (size_t i = 0; i < OP_COUNT; i++) {
        if (strcmp(name, "all") && strcmp(name, ops[i].name)) continue;
        found = 1;
        status |= run_op(&ops[i], shape, &options, causal, dtype, runs, cold, json);
    }
    return found ? status : usage();
}

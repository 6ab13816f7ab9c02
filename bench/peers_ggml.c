/* Times ggml for bench/peers.py: linear (f32, f16 or bf16 weight), fused attention and decode (f32 or f16 keys and
 * values), softmax, norms and activations. ggml is not packaged: build it from its sources with cmake to its folder
 * build (-DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF) and name its folder to make: GGML=/path/to/ggml. See peer.h.
 *
 * cc -O2 -I$GGML/include bench/peers_ggml.c -o peers_ggml $GGML/build/src/libggml*.a -lstdc++ -lm -lpthread */
#define PEER_NAME "ggml"
#include <ggml.h>
#include <ggml-cpu.h>
#include <math.h>
#include "peer.h"

static struct ggml_context *context;
static struct ggml_cgraph *graph;
static struct ggml_cplan plan;

static struct ggml_tensor *tensor(enum ggml_type type, int64_t a, int64_t b, int64_t c) {
    struct ggml_tensor *t = ggml_new_tensor_3d(context, type, a, b, c);
    int64_t count = a * b * c;
    float *x = peer_random(count);
    if (type == GGML_TYPE_F16) ggml_fp32_to_fp16_row(x, (ggml_fp16_t *)t->data, count);
    else if (type == GGML_TYPE_BF16) ggml_fp32_to_bf16_row(x, (ggml_bf16_t *)t->data, count);
    else memcpy(t->data, x, (size_t)count * sizeof(float));
    free(x);
    return t;
}

static struct ggml_tensor *linear(peer_job *job, enum ggml_type type) {
    int64_t m = job->shape[0], n = job->shape[1], k = job->shape[2];
    job->flops = 2.0 * (double)m * (double)n * (double)k;
    return ggml_mul_mat(context, tensor(type, k, n, 1), tensor(GGML_TYPE_F32, k, m, 1));
}

static struct ggml_tensor *attention(peer_job *job, enum ggml_type type, int64_t queries, int64_t keys) {
    int64_t heads = job->shape[0], d = job->shape[1], kv = job->kv_heads ? job->kv_heads : heads;
    struct ggml_tensor *mask = NULL;
    double pairs = 0;
    if (job->causal) {
        mask = ggml_new_tensor_2d(context, GGML_TYPE_F16, keys, queries);
        for (int64_t i = 0; i < queries * keys; i++)
            ((ggml_fp16_t *)mask->data)[i] = ggml_fp32_to_fp16(i % keys <= i / keys + keys - queries ? 0.0f : -INFINITY);
    }
    for (int64_t i = 0; i < queries; i++) pairs += (double)(job->causal ? i + 1 + keys - queries : keys);
    job->flops = 4.0 * (double)(heads * d) * pairs;
    return ggml_flash_attn_ext(context, tensor(GGML_TYPE_F32, d, queries, heads), tensor(type, d, keys, kv),
                               tensor(type, d, keys, kv), mask, 1.0f / sqrtf((float)d), 0, 0);
}

static struct ggml_tensor *softmax(struct ggml_context *c, struct ggml_tensor *x) { return ggml_soft_max(c, x); }
static struct ggml_tensor *norm(struct ggml_context *c, struct ggml_tensor *x) { return ggml_norm(c, x, 1e-5f); }
static struct ggml_tensor *rms_norm(struct ggml_context *c, struct ggml_tensor *x) { return ggml_rms_norm(c, x, 1e-5f); }

typedef struct op_of_rows {
    const char *name;
    struct ggml_tensor *(*make)(struct ggml_context *c, struct ggml_tensor *x);
} op_of_rows;
static const op_of_rows ops_of_rows[] = {
    {"softmax", softmax}, {"layer_norm", norm}, {"rms_norm", rms_norm}, {"relu", ggml_relu}, {"gelu_tanh", ggml_gelu},
    {"gelu", ggml_gelu_erf}, {"silu", ggml_silu}, {"sigmoid", ggml_sigmoid}, {"tanh", ggml_tanh}, {"exp", ggml_exp},
};

static int peer_prepare(peer_job *job) {
    enum ggml_type type = !strcmp(job->dtype, "f16")  ? GGML_TYPE_F16
                        : !strcmp(job->dtype, "bf16") ? GGML_TYPE_BF16 : GGML_TYPE_F32;
    struct ggml_init_params params = {.mem_size = (size_t)2 << 30, .mem_buffer = NULL, .no_alloc = false};
    struct ggml_tensor *y = NULL;
    ggml_cpu_init();
    context = ggml_init(params);
    if (!strcmp(job->op, "linear")) y = linear(job, type);
    else if (!strcmp(job->op, "attention")) y = attention(job, type, job->shape[2], job->shape[3]);
    else if (!strcmp(job->op, "decode")) y = attention(job, type, 1, job->shape[2]);
    for (size_t i = 0; !y && i < sizeof ops_of_rows / sizeof *ops_of_rows; i++) {
        if (strcmp(job->op, ops_of_rows[i].name)) continue;
        y = ops_of_rows[i].make(context, tensor(GGML_TYPE_F32, job->shape[1], job->shape[0], 1));
    }
    if (!y) return 1;
    graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, y);
    plan = ggml_graph_plan(graph, job->threads, NULL);
    plan.work_data = plan.work_size ? (uint8_t *)malloc(plan.work_size) : NULL;
    return 0;
}

static void peer_call(peer_job *job) {
    (void)job;
    if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) exit(1);
}

/* Times oneDNN's matmul for bench/peers.py: matmul with plain operands, linear with the weight reordered once to the
 * format that the primitive likes best, and a bias. f32. Written to oneDNN 2; the C interface of 3 differs. See peer.h.
 *
 * cc -O2 bench/peers_onednn.c -o peers_onednn -ldnnl */
#define PEER_NAME "onednn"
#include <dnnl.h>
#include "peer.h"

#define CHECK(call) do { if ((call) != dnnl_success) return 1; } while (0)

static dnnl_primitive_t product;
static dnnl_stream_t stream;
static dnnl_exec_arg_t arguments[4];
static int argument_count;

static int memory(dnnl_engine_t engine, const dnnl_memory_desc_t *desc, dnnl_memory_t *out) {
    size_t bytes = dnnl_memory_desc_get_size(desc);
    return dnnl_memory_create(out, desc, engine, peer_random((int64_t)(bytes + 3) / 4)) != dnnl_success;
}

static int peer_prepare(peer_job *job) {
    int64_t m = job->shape[0], n = job->shape[1], k = job->shape[2];
    int linear = !strcmp(job->op, "linear");
    dnnl_dims_t dims_a = {m, k}, dims_b = {k, n}, dims_c = {m, n}, dims_bias = {1, n};
    dnnl_memory_desc_t da, db, dc, dbias, plain;
    dnnl_matmul_desc_t desc;
    dnnl_primitive_desc_t prepared;
    dnnl_engine_t engine;
    dnnl_memory_t held[4];
    if ((!linear && strcmp(job->op, "matmul")) || strcmp(job->dtype, "f32") || job->sizes != 3) return 1;
    CHECK(dnnl_engine_create(&engine, dnnl_cpu, 0));
    CHECK(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags));
    CHECK(dnnl_memory_desc_init_by_tag(&da, 2, dims_a, dnnl_f32, dnnl_ab));
    CHECK(dnnl_memory_desc_init_by_tag(&plain, 2, dims_b, dnnl_f32, linear || job->transpose ? dnnl_ba : dnnl_ab));
    CHECK(dnnl_memory_desc_init_by_tag(&db, 2, dims_b, dnnl_f32, dnnl_format_tag_any));
    CHECK(dnnl_memory_desc_init_by_tag(&dc, 2, dims_c, dnnl_f32, dnnl_ab));
    CHECK(dnnl_memory_desc_init_by_tag(&dbias, 2, dims_bias, dnnl_f32, dnnl_ab));
    CHECK(dnnl_matmul_desc_init(&desc, &da, linear ? &db : &plain, linear ? &dbias : NULL, &dc));
    CHECK(dnnl_primitive_desc_create(&prepared, &desc, NULL, engine, NULL));
    CHECK(dnnl_primitive_create(&product, prepared));
    if (memory(engine, &da, &held[0]) || memory(engine, &dc, &held[2]) || memory(engine, &dbias, &held[3]) ||
        memory(engine, dnnl_primitive_desc_query_md(prepared, dnnl_query_weights_md, 0), &held[1])) return 1;
    arguments[0].arg = DNNL_ARG_SRC;
    arguments[1].arg = DNNL_ARG_WEIGHTS;
    arguments[2].arg = DNNL_ARG_DST;
    arguments[3].arg = DNNL_ARG_BIAS;
    for (int i = 0; i < 4; i++) arguments[i].memory = held[i];
    argument_count = linear ? 4 : 3;
    job->flops = 2.0 * (double)m * (double)n * (double)k;
    return 0;
}

static void peer_call(peer_job *job) {
    (void)job;
    if (dnnl_primitive_execute(product, stream, argument_count, arguments) || dnnl_stream_wait(stream)) exit(1);
}

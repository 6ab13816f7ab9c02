/* The parameter store: names, binding, packing, writing, converting. */
#include "layer_helpers.h"

/* One thread, all memory counted in m. */
static tfm_ctx *counted_context(test_memory *m) {
    tfm_options o;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator = test_allocator(m);
    return tfm_create(&o);
}

Test(params, are_ordered_and_found_by_name) {
    test_memory m = test_memory_new(); /* which is full of garbage */
    tfm_ctx *c = counted_context(&m);
    tfm_params *p = tfm_params_create(c);
    char name[32];
    int i;
    assert_made(c, p);
    for (i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "layers.%d.weight", i);
        assert_made(c, tfm_params_add(c, p, name, TFM_F32, TFM_SHAPE(i % 5, 3)));
    }
    cr_assert_eq(tfm_params_count(p), 1000);
    for (i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "layers.%d.weight", i);
        cr_assert_str_eq(tfm_params_name(p, i), name);
        cr_assert(tfm_params_find(p, name) == tfm_params_at(p, i));
    }
    cr_assert_null(tfm_params_find(p, "layers.1000.weight"));
    cr_assert_null(tfm_params_find(p, ""));
    cr_assert(!tfm_params_name(p, 1000) && !tfm_params_name(p, -1));
    cr_assert(!tfm_params_at(p, 1000) && !tfm_params_at(p, -1));
    cr_assert_eq(tfm_params_bytes(p), 200 * (0 + 1 + 2 + 3 + 4) * 3 * 4);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* What is cancelled has not happened: no value is lost, nothing half made stays. */
Test(params, a_cancel_leaves_them_as_they_were) {
    enum { size = 512 };
    test_memory m = test_memory_new();
    tfm_ctx *c = counted_context(&m);
    float *before = (float *)malloc(size * size * 4), *after = (float *)malloc(size * size * 4);
    int way;
    for (way = 0; way < 2; way++) {
        tfm_params *p = tfm_params_create(c);
        tfm_linear_layer layer;
        assert_ok(c, tfm_linear_init(c, p, "l", size, size, 0, &layer));
        assert_ok(c, tfm_read(c, layer.weight, before, size * size));
        tfm_cancel(c);
        cr_assert_eq(way ? tfm_params_cast(c, p, TFM_BF16) : tfm_params_prepare(c, p), TFM_CANCELLED);
        tfm_clear(c);
        assert_ok(c, tfm_read(c, tfm_params_find(p, "l.weight"), after, size * size));
        assert_same_bytes(before, after, size * size * 4);
        tfm_cancel(c);
        cr_assert_eq(tfm_linear_init(c, p, "m", size, size, 0, &layer), TFM_CANCELLED);
        tfm_clear(c);
        cr_assert_null(tfm_params_find(p, "m.weight"));
        assert_ok(c, tfm_linear_init(c, p, "m", size, size, 0, &layer));
        assert_ok(c, tfm_read(c, layer.weight, after, size * size));
        cr_assert(after[0] != 0 && after[size * size - 1] != 0);
        tfm_cancel(c); /* of two weights that would share a block */
        cr_assert_eq(tfm_params_prepare(c, p), TFM_CANCELLED);
        tfm_clear(c);
        assert_ok(c, tfm_params_prepare(c, p));
        tfm_params_destroy(p);
    }
    free(before);
    free(after);
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(params, a_measurement_loads_nothing) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c), *sizes;
    tfm_linear_layer layer;
    tfm_memory need;
    int64_t size;
    void *file;
    assert_ok(c, tfm_linear_init(c, p, "l", 8, 8, 0, &layer));
    size = tfm_params_saved_size(p);
    file = malloc((size_t)size);
    assert_ok(c, tfm_params_save_memory(c, p, file, size));
    tfm_measure_begin(c);
    sizes = tfm_params_create(c);
    assert_init_refused(c, tfm_params_load_memory(c, p, file, size, NULL), "the store has values");
    assert_init_refused(c, tfm_params_load_memory(c, sizes, file, size, NULL), "nothing is loaded between");
    assert_init_refused(c, tfm_params_save_memory(c, sizes, file, size), "made in a measurement");
    assert_init_refused(c, tfm_params_save(c, sizes, "build/none.safetensors"), "made in a measurement");
    assert_ok(c, tfm_measure_end(c, &need));
    assert_init_refused(c, tfm_params_load_memory(c, sizes, file, size, NULL), "it has no values");
    assert_ok(c, tfm_params_load_memory(c, p, file, size, NULL));
    free(file);
    tfm_params_destroy(sizes);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(params, new_ones_are_zero_and_old_ones_are_bound) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_tensor *t = tfm_params_add(c, p, "w", TFM_F32, TFM_SHAPE(2, 3));
    tfm_linear_layer l;
    char name[482];
    int64_t i;
    assert_made(c, t);
    for (i = 0; i < 6; i++) cr_assert_eq(((float *)t->data)[i], 0);
    cr_assert(tfm_params_add(c, p, "w", TFM_F32, TFM_SHAPE(2, 3)) == t);
    cr_assert_null(tfm_params_add(c, p, "w", TFM_F32, TFM_SHAPE(3, 2)));
    assert_error_says(c, "'w' is (2, 3)");
    assert_error_says(c, "(3, 2)");
    tfm_clear(c);
    cr_assert_null(tfm_params_add(c, p, "w", TFM_F16, TFM_SHAPE(2, 3)));
    assert_error_says(c, "f16");
    tfm_clear(c);
    assert_refused(c, tfm_params_add(c, p, "", TFM_F32, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_params_add(c, p, NULL, TFM_F32, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_params_add(c, NULL, "x", TFM_F32, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_params_add(c, p, "x", 99, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_params_add(c, p, "x", -1, TFM_SHAPE(1)), TFM_INVALID);
    assert_refused(c, tfm_params_add(c, p, "x", TFM_F32, TFM_SHAPE(-1)), TFM_INVALID);
    assert_refused(c, tfm_params_add(c, p, "x", TFM_F32, TFM_SHAPE(INT64_MAX / 2, 16)), TFM_INVALID);
    cr_assert_eq(tfm_params_count(p), 1);
    memset(name, 'n', sizeof name);
    name[481] = 0;
    assert_refused(c, tfm_params_add(c, p, name, TFM_F32, TFM_SHAPE(1)), TFM_INVALID);
    name[480 - 6] = 0;
    assert_init_refused(c, tfm_linear_init(c, p, name, 2, 2, 0, &l), "longer than 480 bytes");
    name[480 - 7] = 0; /* and ".weight" */
    assert_ok(c, tfm_linear_init(c, p, name, 2, 2, 0, &l));
    cr_assert_eq(strlen(tfm_params_name(p, 1)), (size_t)480);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(params, outlive_the_context) {
    test_memory m = test_memory_new();
    tfm_ctx *c;
    tfm_params *p;
    tfm_linear_layer l;
    float first;
    c = counted_context(&m);
    p = tfm_params_create(c);
    assert_ok(c, tfm_linear_init(c, p, "l", 3, 2, 1, &l));
    first = ((float *)l.weight->data)[0];
    tfm_destroy(c);
    cr_assert_eq(((float *)l.weight->data)[0], first);
    tfm_params_destroy(p);
    assert_no_leak(&m);
}

Test(params, wrapped_memory_is_used_as_it_lies) {
    static const float memory[6] = {1, 2, 3, 4, 5, 6};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_linear_layer l;
    tfm_tensor *t = tfm_params_wrap(c, p, "l.weight", TFM_F32, TFM_SHAPE(2, 3), memory), *y;
    const void *own;
    assert_made(c, t);
    assert_ok(c, tfm_params_cast(c, p, TFM_F32)); /* nothing to do */
    cr_assert(t->data == (const void *)memory);
    assert_ok(c, tfm_linear_init(c, p, "l", 3, 2, 0, &l));
    cr_assert(l.weight == t);
    y = tfm_linear_forward(c, &l, tfm_ones(c, TFM_SHAPE(1, 3)));
    assert_made(c, y);
    cr_assert_eq(((float *)y->data)[0], 6);
    cr_assert_eq(((float *)y->data)[1], 15);
    /* a write goes to memory of the store */
    t = tfm_params_write_begin(c, p, "l.weight");
    assert_made(c, t);
    cr_assert(t->data != (const void *)memory);
    ((float *)t->data)[0] = 10;
    assert_ok(c, tfm_params_write_end(c, p, "l.weight"));
    y = tfm_linear_forward(c, &l, tfm_ones(c, TFM_SHAPE(1, 3)));
    cr_assert_eq(((float *)y->data)[0], 15);
    cr_assert_eq(memory[0], 1);
    own = t->data; /* which serves the next write, too */
    cr_assert(tfm_params_write_begin(c, p, "l.weight") == t && t->data == own);
    assert_ok(c, tfm_params_write_end(c, p, "l.weight"));
    assert_refused(c, tfm_params_wrap(c, p, "l.weight", TFM_F32, TFM_SHAPE(2, 3), memory), TFM_INVALID);
    assert_refused(c, tfm_params_wrap(c, p, "x", TFM_F32, TFM_SHAPE(1), (const char *)memory + 1), TFM_INVALID);
    assert_refused(c, tfm_params_wrap(c, p, "x", TFM_F32, TFM_SHAPE(1), NULL), TFM_INVALID);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

/* Wrapped memory may be constant: a view of it is no way past the bracket. Neither is one that was made within it. */
Test(params, a_view_is_written_within_the_bracket_only) {
    static const float memory[4] = {1, 2, 3, 4};
    static const int64_t first[1] = {0};
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_tensor *own = tfm_params_add(c, p, "own", TFM_F32, TFM_SHAPE(4)), *row, *tensors[3];
    int i;
    tensors[0] = tfm_narrow(c, own, 0, 1, 2);
    tensors[1] = tfm_narrow(c, tfm_reshape(c, own, TFM_SHAPE(2, 2)), 0, 1, 1);
    tensors[1] = tfm_reshape(c, tensors[1], TFM_SHAPE(2));
    tensors[2] = tfm_narrow(c, tfm_params_wrap(c, p, "wrapped", TFM_F32, TFM_SHAPE(4), memory), 0, 1, 2);
    for (i = 0; i < 3; i++) {
        assert_made(c, tensors[i]);
        assert_verb_refused(c, tfm_set(c, tensors[i], first, 5), TFM_INVALID);
        assert_verb_refused(c, tfm_copy(c, tensors[i], tfm_ones(c, TFM_SHAPE(2))), TFM_INVALID);
    }
    cr_assert_eq(((const float *)own->data)[1], 0);
    for (i = 0; i < 2; i++) {
        const char *const name = i ? "wrapped" : "own";
        tfm_tensor *t = tfm_params_write_begin(c, p, name);
        assert_made(c, t);
        assert_verb_refused(c, tfm_set(c, tensors[2 * i], first, 5), TFM_INVALID); /* made before */
        row = tfm_narrow(c, tfm_narrow(c, t, 0, 1, 3), 0, 0, 2);
        assert_made(c, row);
        assert_ok(c, tfm_set(c, row, first, 5));
        assert_ok(c, tfm_copy(c, row, tfm_full(c, TFM_F32, TFM_SHAPE(2), 6)));
        assert_ok(c, tfm_params_write_end(c, p, name));
        cr_assert_eq(((const float *)t->data)[2], 6);
        assert_verb_refused(c, tfm_set(c, row, first, 7), TFM_INVALID);
        cr_assert_eq(((const float *)t->data)[1], 6);
    }
    cr_assert_eq(memory[1], 2);
    tfm_params_destroy(p);
    assert_verb_refused(c, tfm_set(c, tensors[2], first, 5), TFM_INVALID);
    tfm_destroy(c);
}

/* Linear, plain and packed: same bits, for every dtype of weights, every width, whole cache lines or not, and a row count
 * on both sides of the tile. */
Test(params, packed_and_plain_give_the_same_bits) {
    static const int dtypes[3] = {TFM_F32, TFM_F16, TFM_BF16};
    static const int64_t ins[] = {37, 48}, outs[] = {1, 15, 16, 17, 40, 144}, rows[] = {1, 2, 7, 30};
    TEST_EACH_ISA(c, 1) {
        int d, o, r;
        for (d = 0; d < 3; d++)
            for (o = 0; o < 12; o++) {
                const int64_t in = ins[o % 2];
                tfm_params *p = tfm_params_create(c);
                tfm_linear_layer l;
                tfm_tensor *x[4], *before[4];
                const tfm_marker m = tfm_mark(c);
                assert_ok(c, tfm_linear_init(c, p, "l", in, outs[o / 2], 1, &l));
                assert_ok(c, tfm_params_cast(c, p, dtypes[d]));
                for (r = 0; r < 4; r++) {
                    x[r] = some(c, TFM_SHAPE(rows[r], in), 11);
                    before[r] = tfm_linear_forward(c, &l, x[r]);
                    assert_made(c, before[r]);
                }
                assert_ok(c, tfm_params_prepare(c, p));
                for (r = 0; r < 4; r++) assert_same_values(c, tfm_linear_forward(c, &l, x[r]), before[r]);
                tfm_params_destroy(p);
                tfm_rewind(c, m);
            }
    }
}

Test(params, prepare_packs_marked_weights_and_write_unpacks) {
    static const int64_t at[2] = {0, 0};
    tfm_ctx *c = context_of(2);
    tfm_params *p = tfm_params_create(c);
    tfm_linear_layer l;
    tfm_tensor *plain, *other, *t;
    assert_made(c, p);
    other = tfm_params_add(c, p, "other", TFM_F32, TFM_SHAPE(32, 32));
    assert_ok(c, tfm_linear_init(c, p, "l", 24, 40, 1, &l));
    plain = tfm_clone(c, l.weight);
    assert_ok(c, tfm_params_prepare(c, p));
    assert_ok(c, tfm_params_prepare(c, p)); /* twice is fine */
    cr_assert_eq(l.weight->layout, TFM_PANELS);
    cr_assert_null(l.weight->data);
    cr_assert_eq(other->layout, TFM_STRIDED);
    cr_assert_eq(l.bias->layout, TFM_STRIDED);
    cr_assert_not(tfm_is_contiguous(l.weight));
    /* copies, reads and text see the matrix, not the panels */
    assert_same_values(c, tfm_clone(c, l.weight), plain);
    assert_same_values(c, tfm_contiguous(c, l.weight), plain);
    assert_same_values(c, l.weight, plain);
    cr_assert_eq(tfm_get(l.weight, at), tfm_get(plain, at));
    t = tfm_params_write_begin(c, p, "l.weight");
    cr_assert(t == l.weight && t->layout == TFM_STRIDED && t->data);
    assert_same_values(c, t, plain);
    ((float *)t->data)[0] = 123;
    assert_verb_refused(c, tfm_params_prepare(c, p), TFM_INVALID); /* in the middle of a write */
    assert_refused(c, tfm_params_write_begin(c, p, "l.weight"), TFM_INVALID);
    assert_ok(c, tfm_params_write_end(c, p, "l.weight"));
    assert_verb_refused(c, tfm_params_write_end(c, p, "l.weight"), TFM_INVALID);
    assert_refused(c, tfm_params_write_begin(c, p, "none"), TFM_INVALID);
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert_eq(tfm_get(l.weight, at), 123);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(params, packed_weights_stay_within_a_tenth_of_plain) {
    test_memory m = test_memory_new();
    tfm_ctx *c;
    tfm_params *p;
    tfm_linear_layer l;
    int64_t plain;
    c = counted_context(&m);
    p = tfm_params_create(c);
    assert_ok(c, tfm_linear_init(c, p, "a", 256, 300, 1, &l));
    assert_ok(c, tfm_linear_init(c, p, "b", 4096, 2, 1, &l)); /* two rows: a panel would be eight times as large */
    plain = tfm_params_bytes(p);
    {
        const int64_t held = m.bytes;
        assert_ok(c, tfm_params_prepare(c, p));
        cr_assert(m.bytes <= held + held / 10, "%lld bytes became %lld", (long long)held, (long long)m.bytes);
    }
    cr_assert(tfm_params_bytes(p) <= plain + plain / 10);
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

Test(params, packed_weights_share_memory_that_goes_back_with_the_last) {
    enum { COUNT = 3 };
    test_memory m = test_memory_new();
    tfm_ctx *c;
    tfm_params *p;
    tfm_linear_layer l[COUNT + 1];
    tfm_tensor *plain[COUNT];
    char name[2] = "a";
    int64_t blocks;
    int i;
    c = counted_context(&m);
    p = tfm_params_create(c);
    for (i = 0; i < COUNT; i++) {
        name[0] = (char)('a' + i);
        assert_ok(c, tfm_linear_init(c, p, name, 37 + 2 * i, 48, 0, &l[i])); /* as bf16 no whole lines */
    }
    assert_ok(c, tfm_params_cast(c, p, TFM_BF16));
    for (i = 0; i < COUNT; i++) plain[i] = tfm_clone(c, l[i].weight);
    blocks = m.blocks;
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert_eq(m.blocks, blocks - (COUNT - 1));
    for (i = 0; i < COUNT; i++) {
        assert_same_values(c, l[i].weight, plain[i]);
        cr_assert_eq((uintptr_t)l[i].weight->panels % 64, 0u);
    }
    assert_made(c, tfm_params_write_begin(c, p, "a.weight"));
    assert_ok(c, tfm_params_write_end(c, p, "a.weight"));
    cr_assert_eq(m.blocks, blocks - (COUNT - 1) + 1); /* a of its own, beside b and c */
    assert_ok(c, tfm_linear_init(c, p, "z", 32, 32, 0, &l[COUNT])); /* a record and a block */
    assert_ok(c, tfm_params_prepare(c, p));                         /* what has shared memory once does not again */
    cr_assert_eq(m.blocks, blocks - (COUNT - 1) + 1 + 2);
    for (i = 0; i < COUNT; i++) assert_same_values(c, l[i].weight, plain[i]);
    assert_ok(c, tfm_params_cast(c, p, TFM_F16));
    cr_assert_eq(m.blocks, blocks + 2); /* each on its own, the shared ones given back */
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert_eq(m.blocks, blocks + 2);
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* One weight after the other written and packed again, as when more and more of a model is trained. */
Test(params, packing_again_and_again_takes_no_more_memory) {
    enum { COUNT = 16 };
    test_memory m = test_memory_new();
    tfm_ctx *c;
    tfm_params *p;
    tfm_linear_layer l;
    char name[16] = "a";
    int64_t held;
    int first, i;
    c = counted_context(&m);
    p = tfm_params_create(c);
    for (i = 0; i < COUNT; i++) {
        name[0] = (char)('a' + i);
        assert_ok(c, tfm_linear_init(c, p, name, 64, 128, 0, &l));
    }
    held = m.bytes;
    for (first = 0; first < COUNT; first++) {
        assert_ok(c, tfm_params_prepare(c, p));
        for (i = first; i < COUNT; i++) {
            snprintf(name, sizeof name, "%c.weight", 'a' + i);
            assert_made(c, tfm_params_write_begin(c, p, name));
            assert_ok(c, tfm_params_write_end(c, p, name));
        }
        cr_assert(m.bytes <= held + tfm_params_bytes(p) + 4096, "%lld bytes held, %lld at first", (long long)m.bytes,
                  (long long)held);
    }
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* Weights that are marked later, in between others that were packed and written before: one block holds them. */
Test(params, new_weights_share_memory_whatever_stands_between_them) {
    enum { COUNT = 16 };
    test_memory m = test_memory_new();
    tfm_ctx *c;
    tfm_params *p;
    tfm_linear_layer l;
    char name[32];
    int64_t held;
    int i;
    c = counted_context(&m);
    p = tfm_params_create(c);
    for (i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "old%d", i);
        assert_ok(c, tfm_linear_init(c, p, name, 64, 128, 0, &l));
        snprintf(name, sizeof name, "new%d.weight", i);
        assert_made(c, tfm_params_add(c, p, name, TFM_F32, TFM_SHAPE(128, 64)));
    }
    assert_ok(c, tfm_params_prepare(c, p));
    for (i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "old%d.weight", i);
        assert_made(c, tfm_params_write_begin(c, p, name));
        assert_ok(c, tfm_params_write_end(c, p, name));
        snprintf(name, sizeof name, "new%d", i);
        assert_ok(c, tfm_linear_init(c, p, name, 64, 128, 0, &l));
    }
    held = m.bytes;
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert_eq(l.weight->layout, TFM_PANELS);
    cr_assert(m.bytes <= held + 4096, "%lld bytes held, %lld before", (long long)m.bytes, (long long)held);
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* Room for one weight more is enough: what would be shared then stands alone. */
Test(params, prepare_needs_no_more_memory_than_its_largest_weight) {
    enum { COUNT = 6 };
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c;
    tfm_params *p;
    tfm_linear_layer l;
    char name[2] = "a";
    int64_t held;
    int i;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.allocator = test_allocator(&m);
    o.memory_limit = 4 << 20; /* of what the context holds, beside any one block of the store */
    c = tfm_create(&o);
    p = tfm_params_create(c);
    for (i = 0; i < COUNT; i++) {
        name[0] = (char)('a' + i);
        assert_ok(c, tfm_linear_init(c, p, name, 512, 1024, 0, &l));
    }
    held = m.bytes;
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert_eq(l.weight->layout, TFM_PANELS);
    cr_assert(m.peak < held + (3 << 20), "%lld bytes, %lld before", (long long)m.peak, (long long)held);
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* A block is no larger than 32 MiB: of three weights of 12 MiB two share one. */
Test(params, what_does_not_fit_into_a_shared_block_is_apart) {
    enum { IN = 1024, OUT = 3072, COUNT = 3 };
    static const int64_t last[2] = {OUT - 1, IN - 1};
    test_memory m = test_memory_new();
    tfm_ctx *c = counted_context(&m);
    tfm_params *p = tfm_params_create(c);
    tfm_linear_layer l[COUNT];
    char name[16];
    int64_t blocks;
    int i;
    for (i = 0; i < COUNT; i++) {
        tfm_tensor *t;
        snprintf(name, sizeof name, "%c.weight", 'a' + i);
        assert_made(c, tfm_params_add(c, p, name, TFM_F32, TFM_SHAPE(OUT, IN)));
        t = tfm_params_write_begin(c, p, name);
        ((float *)t->data)[(int64_t)OUT * IN - 1] = (float)(i + 1);
        assert_ok(c, tfm_params_write_end(c, p, name));
        name[1] = 0;
        assert_ok(c, tfm_linear_init(c, p, name, IN, OUT, 0, &l[i]));
    }
    blocks = m.blocks;
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert_eq(m.blocks, blocks - 1);
    for (i = 0; i < COUNT; i++) cr_assert_eq(tfm_get(l[i].weight, last), i + 1);
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* A weight that is being written stops it; what is packed again later finds no block that has gone back since. */
Test(params, a_prepare_that_stops_leaves_no_block_behind) {
    enum { COUNT = 3 };
    test_memory m = test_memory_new();
    tfm_ctx *c = counted_context(&m);
    tfm_params *p = tfm_params_create(c);
    tfm_linear_layer l;
    char name[16];
    int i;
    for (i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "%c", 'a' + i);
        assert_ok(c, tfm_linear_init(c, p, name, 32, 32, 0, &l));
    }
    assert_made(c, tfm_params_write_begin(c, p, "c.weight"));
    assert_verb_refused(c, tfm_params_prepare(c, p), TFM_INVALID);
    assert_ok(c, tfm_params_write_end(c, p, "c.weight"));
    for (i = 0; i < COUNT - 1; i++) {
        snprintf(name, sizeof name, "%c.weight", 'a' + i);
        cr_assert_eq(tfm_params_find(p, name)->layout, TFM_PANELS);
        assert_made(c, tfm_params_write_begin(c, p, name));
        assert_ok(c, tfm_params_write_end(c, p, name));
    }
    assert_ok(c, tfm_params_prepare(c, p));
    cr_assert_eq(l.weight->layout, TFM_PANELS);
    tfm_params_destroy(p);
    tfm_destroy(c);
    assert_no_leak(&m);
}

/* 16 rows a panel: a matrix of 146 rows grows by less than a tenth, one of 145 by more; that of 8 rows by 4 KiB at 128
 * columns. What is trained is written in each step. */
Test(params, packing_is_left_where_it_costs_too_much) {
    static const struct {
        int64_t in, out;
        int packed;
    } table[] = {{128, 146, 1}, {128, 145, 0}, {128, 8, 1}, {129, 8, 0}};
    tfm_ctx *c = context_of(1);
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        int trained;
        for (trained = 0; trained < 2; trained++) {
            tfm_params *p = tfm_params_create(c);
            tfm_linear_layer l;
            assert_ok(c, tfm_linear_init(c, p, "l", table[i].in, table[i].out, 0, &l));
            assert_ok(c, tfm_set_requires_grad(c, l.weight, trained));
            assert_ok(c, tfm_params_prepare(c, p));
            cr_assert_eq(l.weight->layout, table[i].packed && !trained ? TFM_PANELS : TFM_STRIDED, "%d", (int)i);
            tfm_params_destroy(p);
        }
    }
    tfm_destroy(c);
}

Test(params, cast_rounds_matrices_and_leaves_vectors) {
    static const int dtypes[2] = {TFM_F16, TFM_BF16};
    int i, packed;
    for (i = 0; i < 2; i++)
        for (packed = 0; packed < 2; packed++) {
            tfm_ctx *c = context_of(1);
            tfm_params *p = tfm_params_create(c);
            tfm_linear_layer l;
            tfm_tensor *expected;
            assert_ok(c, tfm_linear_init(c, p, "l", 50, 70, 1, &l));
            expected = tfm_cast(c, l.weight, dtypes[i]);
            if (packed) assert_ok(c, tfm_params_prepare(c, p));
            assert_made(c, tfm_params_add(c, p, "ids", TFM_I64, TFM_SHAPE(0, 3)));
            assert_ok(c, tfm_params_cast(c, p, dtypes[i]));
            cr_assert_eq(tfm_params_find(p, "ids")->dtype, TFM_I64);
            cr_assert_eq(l.weight->dtype, dtypes[i]);
            cr_assert_eq(l.weight->layout, packed ? TFM_PANELS : TFM_STRIDED);
            cr_assert_eq(l.bias->dtype, TFM_F32);
            assert_same_values(c, l.weight, expected);
            cr_assert_eq(tfm_params_bytes(p), (packed ? 80 : 70) * 50 * 2 + 70 * 4);
            assert_ok(c, tfm_params_cast(c, p, TFM_F32));
            assert_same_values(c, l.weight, expected);
            assert_verb_refused(c, tfm_params_cast(c, p, TFM_I8), TFM_INVALID);
            assert_verb_refused(c, tfm_params_cast(c, p, -1), TFM_INVALID);
            tfm_params_destroy(p);
            tfm_destroy(c);
        }
}

/* Of a state_dict of doubles, too: what the error says helps, helps. */
Test(params, cast_makes_f32_of_f64_vectors) {
    static const double values[3] = {0.5, -3, 1.0 / 3};
    int casts;
    for (casts = 0; casts < 2; casts++) {
        tfm_ctx *c = context_of(1);
        tfm_params *p = tfm_params_create(c), *q = tfm_params_create(c);
        tfm_load_options o;
        tfm_norm_layer layer;
        int64_t size;
        void *file;
        assert_made(c, tfm_params_wrap(c, p, "n.weight", TFM_F64, TFM_SHAPE(3), values));
        assert_made(c, tfm_params_wrap(c, p, "n.bias", TFM_F64, TFM_SHAPE(3), values));
        assert_made(c, tfm_params_wrap(c, p, "scale", TFM_F64, tfm_shape_of(0, NULL), values));
        size = tfm_params_saved_size(p);
        file = malloc((size_t)size);
        assert_ok(c, tfm_params_save_memory(c, p, file, size));
        memset(&o, 0, sizeof o);
        o.cast = casts;
        o.dtype = TFM_BF16;
        assert_ok(c, tfm_params_load_memory(c, q, file, size, &o));
        if (!casts) {
            assert_init_refused(c, tfm_norm_init(c, q, "n", TFM_LAYER_NORM, 3, 1, 0, &layer), "tfm_params_cast converts");
            assert_ok(c, tfm_params_cast(c, q, TFM_BF16));
        }
        assert_ok(c, tfm_norm_init(c, q, "n", TFM_LAYER_NORM, 3, 1, 0, &layer));
        assert_same_values(c, layer.weight, tfm_cast(c, tfm_params_find(p, "n.weight"), TFM_F32));
        assert_same_values(c, layer.bias, tfm_cast(c, tfm_params_find(p, "n.bias"), TFM_F32));
        cr_assert_eq(layer.bias->dtype, TFM_F32);
        cr_assert_eq(tfm_params_find(q, "scale")->dtype, TFM_F32);
        assert_made(c, tfm_norm_forward(c, &layer, tfm_ones(c, TFM_SHAPE(2, 3))));
        free(file);
        tfm_params_destroy(p);
        tfm_params_destroy(q);
        tfm_destroy(c);
    }
}

/* f64 is rounded once, as by tfm_cast and by a load that casts: by way of f32 these would be the even neighbours. */
Test(params, cast_rounds_f64_once) {
    static const int dtypes[2] = {TFM_F16, TFM_BF16};
    static const double w[2] = {1 + 1.0 / 256 + 1e-12, 1 + 1.0 / 2048 + 1e-12};
    TEST_EACH_ISA(c, 1) {
        int i;
        for (i = 0; i < 2; i++) {
            tfm_params *p = tfm_params_create(c), *q = tfm_params_create(c);
            unsigned char file[256];
            tfm_load_options o;
            const tfm_tensor *expected = tfm_cast(c, tfm_from(c, TFM_F64, TFM_SHAPE(1, 2), w), dtypes[i]);
            assert_made(c, expected);
            memset(&o, 0, sizeof o);
            o.cast = 1;
            o.dtype = dtypes[i];
            assert_made(c, tfm_params_wrap(c, p, "w", TFM_F64, TFM_SHAPE(1, 2), w));
            assert_ok(c, tfm_params_save_memory(c, p, file, (int64_t)sizeof file));
            assert_ok(c, tfm_params_load_memory(c, q, file, tfm_params_saved_size(p), &o));
            assert_ok(c, tfm_params_cast(c, p, dtypes[i]));
            assert_same_bytes(tfm_params_find(p, "w")->data, expected->data, 4);
            assert_same_bytes(tfm_params_find(q, "w")->data, expected->data, 4);
            tfm_params_destroy(p);
            tfm_params_destroy(q);
        }
    }
}

Test(params, embeddings_are_looked_up_in_panels_too) {
    TEST_EACH_ISA(c, 1) {
        tfm_params *p = tfm_params_create(c);
        tfm_transformer_config g;
        tfm_transformer t;
        tfm_tensor *ids = some_ids(c, 2, 5, 33, 3), *before;
        memset(&g, 0, sizeof g);
        g.kind = TFM_DECODER_ONLY;
        g.decoder_layers = 1;
        g.block.d_model = 8;
        g.block.heads = 2;
        g.block.d_ff = 8;
        g.target_vocab = 33;
        g.tied_head = 1;
        assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
        before = tfm_transformer_forward(c, &t, NULL, ids, NULL);
        assert_made(c, before);
        assert_ok(c, tfm_params_prepare(c, p));
        cr_assert_eq(t.target_embedding.weight->layout, TFM_PANELS);
        assert_same_values(c, tfm_transformer_forward(c, &t, NULL, ids, NULL), before);
        tfm_params_destroy(p);
    }
}

Test(params, strict_store_names_what_is_missing) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_mha_config g;
    tfm_mha l;
    tfm_tensor *t;
    memset(&g, 0, sizeof g);
    g.d_model = 8;
    g.heads = 2;
    t = tfm_params_add(c, p, "a.in_proj_weight", TFM_BF16, TFM_SHAPE(24, 8));
    assert_made(c, t);
    tfm_params_strict(p, 1);
    assert_init_refused(c, tfm_mha_init(c, p, "a", &g, &l), "'a.in_proj_bias' (24) is missing");
    tfm_params_strict(p, 0);
    assert_ok(c, tfm_mha_init(c, p, "a", &g, &l));
    cr_assert(l.in_proj_weight == t); /* bound, whatever float dtype it was loaded in */
    g.heads = 4;
    g.kv_heads = 2;
    assert_init_refused(c, tfm_mha_init(c, p, "a", &g, &l),
                        "'a.in_proj_weight' is (24, 8) in the store, but (16, 8) is needed");
    assert_made(c, tfm_params_add(c, p, "b.in_proj_weight", TFM_I8, TFM_SHAPE(16, 8)));
    assert_init_refused(c, tfm_mha_init(c, p, "b", &g, &l), "is i8 in the store");
    cr_assert_null(tfm_params_add(c, p, "b.in_proj_weight", TFM_F32, TFM_SHAPE(16, 8)));
    cr_assert_null(strstr(tfm_error(c), "tfm_params_cast"), "%s", tfm_error(c)); /* which leaves integers as they are */
    tfm_clear(c);
    cr_assert_null(tfm_params_add(c, p, "a.in_proj_bias", TFM_F16, TFM_SHAPE(24)));
    cr_assert_null(strstr(tfm_error(c), "tfm_params_cast"), "%s", tfm_error(c)); /* and vectors */
    tfm_clear(c);
    cr_assert_null(tfm_params_add(c, p, "a.in_proj_weight", TFM_F32, TFM_SHAPE(24, 8)));
    assert_error_says(c, "'a.in_proj_weight' is bf16 in the store, but f32 is needed (tfm_params_cast converts)");
    tfm_clear(c);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(params, initial_values_follow_pytorch) {
    tfm_ctx *c = context_of(1);
    tfm_params *p = tfm_params_create(c);
    tfm_linear_layer l;
    tfm_embedding_layer e;
    tfm_norm_layer n;
    tfm_mha a;
    tfm_mha_config g;
    const float *w;
    double sum = 0, squares = 0, most = 0;
    int64_t i;
    assert_ok(c, tfm_linear_init(c, p, "l", 400, 300, 1, &l));
    for (i = 0, w = (const float *)l.weight->data; i < 120000; i++) {
        const double x = (double)w[i];
        sum += x;
        squares += x * x;
        most = fabs(x) > most ? fabs(x) : most;
    }
    cr_assert(most <= 0.05 && most > 0.0499); /* 1 / sqrt(400) */
    cr_assert_float_eq(sum / 120000, 0, 2e-4);
    cr_assert_float_eq(sqrt(squares / 120000), 0.05 / sqrt(3.0), 2e-4);
    for (i = 0, most = 0; i < 300; i++) most = fmax(most, fabs((double)((const float *)l.bias->data)[i]));
    cr_assert(most <= 0.05 && most > 0.045);
    assert_ok(c, tfm_embedding_init(c, p, "e", 500, 200, &e));
    for (i = 0, sum = squares = 0, w = (const float *)e.weight->data; i < 100000; i++) {
        sum += (double)w[i];
        squares += (double)w[i] * (double)w[i];
    }
    cr_assert_float_eq(sum / 100000, 0, 0.01);
    cr_assert_float_eq(squares / 100000, 1, 0.02);
    assert_ok(c, tfm_norm_init(c, p, "n", TFM_LAYER_NORM, 5, 1, 0, &n));
    cr_assert_eq(((const float *)n.weight->data)[4], 1);
    cr_assert_eq(((const float *)n.bias->data)[4], 0);
    memset(&g, 0, sizeof g);
    g.d_model = 96;
    g.heads = 4;
    assert_ok(c, tfm_mha_init(c, p, "a", &g, &a));
    for (i = 0, most = 0, w = (const float *)a.in_proj_weight->data; i < 3 * 96 * 96; i++)
        most = fmax(most, fabs((double)w[i]));
    cr_assert(most <= sqrt(6.0 / (4 * 96)) && most > 0.999 * sqrt(6.0 / (4 * 96))); /* the whole 3E x E matrix is one */
    for (i = 0; i < 288; i++) cr_assert_eq(((const float *)a.in_proj_bias->data)[i], 0);
    for (i = 0, most = 0, w = (const float *)a.out_proj.weight->data; i < 96 * 96; i++)
        most = fmax(most, fabs((double)w[i]));
    cr_assert(most <= 1 / sqrt(96.0) && most > 0.99 / sqrt(96.0));
    for (i = 0; i < 96; i++) cr_assert_eq(((const float *)a.out_proj.bias->data)[i], 0);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

Test(params, same_seed_same_model_on_any_threads_and_instruction_set) {
    float *expected = NULL;
    int threads;
    for (threads = 1; threads < 4; threads++)
        TEST_EACH_ISA(c, threads) {
            tfm_params *p = tfm_params_create(c);
            tfm_linear_layer l;
            float *values;
            assert_ok(c, tfm_linear_init(c, p, "skipped", 3, 3, 1, &l));
            assert_ok(c, tfm_linear_init(c, p, "l", 100, 100, 1, &l));
            values = test_floats(c, l.weight);
            if (expected) assert_same_bytes(values, expected, 40000);
            if (expected) free(values);
            else expected = values;
            tfm_params_destroy(p);
        }
    free(expected);
}

static void build_and_prepare(tfm_ctx *c) {
    tfm_params *p = tfm_params_create(c);
    tfm_block_config g;
    tfm_encoder e;
    memset(&g, 0, sizeof g);
    g.d_model = 8;
    g.heads = 2;
    g.d_ff = 16;
    if (p && tfm_encoder_init(c, p, "e", 2, &g, 1, &e) == TFM_OK && tfm_params_prepare(c, p) == TFM_OK &&
        tfm_params_cast(c, p, TFM_F16) == TFM_OK && tfm_params_write_begin(c, p, "e.layers.0.linear1.weight"))
        (void)tfm_encoder_forward(c, &e, tfm_ones(c, TFM_SHAPE(1, 3, 8)), NULL);
    tfm_params_destroy(p);
}

Test(params, every_failing_allocation_is_an_error_and_no_leak) {
    cr_assert(each_end_of_memory(build_and_prepare) > 20);
}

Test(params, a_store_of_a_measurement_has_no_values) {
    if (sizeof(void *) < 8) cr_skip_test("sizes beyond 32 bits");
    tfm_ctx *c = context_of(1);
    tfm_params *p, *real = tfm_params_create(c);
    tfm_linear_layer l, unmade;
    tfm_memory memory;
    assert_made(c, tfm_params_add(c, real, "w", TFM_F32, TFM_SHAPE(4)));
    tfm_measure_begin(c);
    p = tfm_params_create(c);
    assert_ok(c, tfm_linear_init(c, p, "l", 1000000, 1000000, 1, &l)); /* 4 TB */
    cr_assert_eq(tfm_params_bytes(p), (int64_t)4000004000000);
    assert_made(c, tfm_linear_forward(c, &l, tfm_empty(c, TFM_F32, TFM_SHAPE(1, 1000000))));
    assert_verb_refused(c, tfm_linear_init(c, real, "l", 4, 4, 1, &unmade), TFM_INVALID);
    assert_refused(c, tfm_params_write_begin(c, real, "w"), TFM_INVALID);
    assert_ok(c, tfm_measure_end(c, &memory));
    assert_made(c, tfm_params_write_begin(c, real, "w"));
    cr_assert(memory.held_peak >= (int64_t)4000004000000, "%lld",
              (long long)memory.held_peak); /* a program's parameters count */
    assert_refused(c, tfm_linear_forward(c, &l, tfm_ones(c, TFM_SHAPE(1, 1000000))), TFM_INVALID);
    assert_refused(c, tfm_params_add(c, p, "x", TFM_F32, TFM_SHAPE(1)), TFM_INVALID);
    tfm_params_destroy(p);
    tfm_params_destroy(real);
    tfm_destroy(c);
}

/* What packing and converting take or give back, to the byte. */
Test(params, a_measurement_counts_what_becomes_of_parameters) {
    enum { IN = 256, OUT = 300, ROWS = 304 };
    int64_t peak[3] = {0, 0, 0};
    tfm_ctx *c = context_of(1);
    int way;
    for (way = 0; way < 3; way++) {
        tfm_linear_layer l;
        tfm_memory need;
        tfm_params *p;
        tfm_measure_begin(c);
        p = tfm_params_create(c);
        assert_ok(c, tfm_linear_init(c, p, "l", IN, OUT, 0, &l));
        if (way == 1) assert_ok(c, tfm_params_prepare(c, p));
        if (way == 2) assert_ok(c, tfm_params_cast(c, p, TFM_BF16));
        assert_ok(c, tfm_linear_init(c, p, "m", IN, 2 * OUT, 0, &l));
        assert_ok(c, tfm_measure_end(c, &need));
        peak[way] = need.held_peak;
        tfm_params_destroy(p);
    }
    cr_assert_eq(peak[1] - peak[0], (int64_t)(ROWS - OUT) * IN * 4);
    cr_assert_eq(peak[2] - peak[0], -(int64_t)OUT * IN * 2);
    tfm_destroy(c);
}

/* The same arguments are refused as outside a measurement, and the caller's memory is not counted. */
Test(params, wrapping_in_a_measurement_takes_nothing) {
    enum { SIZE = 1 << 18 };
    float *memory = (float *)calloc(SIZE, sizeof *memory);
    tfm_ctx *c = context_of(1);
    tfm_params *p;
    tfm_memory empty, need;
    int wrap;
    for (wrap = 0; wrap < 2; wrap++) {
        const tfm_tensor *x;
        tfm_measure_begin(c);
        p = tfm_params_create(c);
        x = tfm_ones(c, TFM_SHAPE(1, SIZE / 64));
        if (wrap) {
            const tfm_tensor *t = tfm_params_wrap(c, p, "w", TFM_F32, TFM_SHAPE(64, SIZE / 64), memory);
            assert_made(c, t);
            assert_made(c, tfm_linear(c, x, t, NULL, TFM_ACT_NONE));
            assert_refused(c, tfm_params_wrap(c, p, "w", TFM_F32, TFM_SHAPE(64, SIZE / 64), memory), TFM_INVALID);
            assert_refused(c, tfm_params_wrap(c, p, "v", -1, TFM_SHAPE(2), memory), TFM_INVALID);
            cr_assert_eq(tfm_params_count(p), 1);
        }
        assert_ok(c, tfm_measure_end(c, wrap ? &need : &empty));
        assert_refused(c, tfm_params_wrap(c, p, "u", TFM_F32, TFM_SHAPE(2), memory), TFM_INVALID);
        if (wrap) assert_refused(c, tfm_clone(c, tfm_params_find(p, "w")), TFM_INVALID);
        tfm_params_destroy(p);
    }
    cr_assert(need.held_peak - empty.held_peak < SIZE, "%lld and %lld bytes", (long long)empty.held_peak,
              (long long)need.held_peak);
    tfm_measure_begin(c); /* but what is made of it does */
    p = tfm_params_create(c);
    assert_made(c, tfm_ones(c, TFM_SHAPE(1, SIZE / 64)));
    assert_made(c, tfm_params_wrap(c, p, "w", TFM_F32, TFM_SHAPE(64, SIZE / 64), memory));
    cr_assert_not_null(tfm_params_write_begin(c, p, "w"));
    assert_ok(c, tfm_params_write_end(c, p, "w"));
    assert_ok(c, tfm_measure_end(c, &need));
    tfm_params_destroy(p);
    cr_assert_geq(need.held_peak - empty.held_peak, (int64_t)sizeof(float) * SIZE);
    free(memory);
    tfm_destroy(c);
}

/* Whatever a program does with what is left of a measurement: an error with a text, packed or plain. */
Test(params, of_a_measurement_are_refused_wherever_values_are_read) {
    static const int64_t numbers[2] = {3, 1};
    static const char *const names[1] = {"w"};
    int packed;
    for (packed = 0; packed < 2; packed++) {
        tfm_ctx *c = context_of(1);
        tfm_params *p;
        tfm_transformer_config g;
        tfm_transformer t;
        tfm_linear_layer l;
        tfm_memory memory;
        tfm_session *s;
        const tfm_tensor *list[2], *ids, *w, *b, *counts;
        tfm_tensor *x = tfm_ones(c, TFM_SHAPE(3, 64)), *id;
        float out[64 * 64];
        void *file;
        memset(&g, 0, sizeof g);
        g.kind = TFM_DECODER_ONLY;
        g.decoder_layers = 1;
        g.block.d_model = 32;
        g.block.heads = 2;
        g.target_vocab = 32;
        tfm_measure_begin(c);
        p = tfm_params_create(c);
        assert_ok(c, tfm_linear_init(c, p, "l", 64, 64, 1, &l));
        assert_ok(c, tfm_transformer_init(c, p, "", &g, &t));
        ids = tfm_params_add(c, p, "ids", TFM_I64, TFM_SHAPE(2));
        counts = tfm_params_add(c, p, "counts", TFM_I64, TFM_SHAPE(1));
        if (packed) assert_ok(c, tfm_params_prepare(c, p));
        s = tfm_session_create(c, &t, NULL);
        assert_made(c, s);
        assert_made(c, tfm_linear(c, x, l.weight, l.bias, TFM_ACT_NONE));
        assert_ok(c, tfm_read(c, l.weight, out, 64 * 64));
        assert_ok(c, tfm_measure_end(c, &memory));
        file = malloc((size_t)tfm_params_saved_size(p));
        list[0] = list[1] = w = l.weight;
        b = l.bias;
        x = tfm_ones(c, TFM_SHAPE(3, 64));
        id = tfm_from(c, TFM_I64, TFM_SHAPE(1, 2), numbers);
        cr_assert_null(tfm_linear(c, x, w, b, TFM_ACT_NONE));
        assert_error_says(c, "tfm_linear: tensor argument 2 is a parameter made between tfm_measure_begin and");
        tfm_clear(c);
        assert_refused(c, tfm_matmul(c, x, w), TFM_INVALID);
        assert_refused(c, tfm_clone(c, w), TFM_INVALID);
        assert_refused(c, tfm_cast(c, w, TFM_F16), TFM_INVALID);
        assert_refused(c, tfm_add(c, x, b), TFM_INVALID);
        assert_refused(c, tfm_softmax(c, b, 0), TFM_INVALID);
        assert_refused(c, tfm_transpose(c, w, 0, 1), TFM_INVALID);
        assert_refused(c, tfm_cat(c, list, 2, 0), TFM_INVALID);
        assert_refused(c, tfm_embedding(c, w, id), TFM_INVALID);
        assert_refused(c, tfm_embedding(c, x, ids), TFM_INVALID);
        assert_refused(c, tfm_format(c, b), TFM_INVALID);
        assert_verb_refused(c, tfm_copy(c, x, b), TFM_INVALID);
        assert_verb_refused(c, tfm_read(c, w, out, 64 * 64), TFM_INVALID);
        assert_verb_refused(c, tfm_print(c, stdout, w), TFM_INVALID);
        assert_verb_refused(c, tfm_save_tensors(c, "nothing.safetensors", names, list, 1), TFM_INVALID);
        assert_verb_refused(c, tfm_params_save(c, p, "nothing.safetensors"), TFM_INVALID);
        cr_assert_not_null(file);
        assert_verb_refused(c, tfm_params_save_memory(c, p, file, tfm_params_saved_size(p)), TFM_INVALID);
        free(file);
        assert_refused(c, tfm_session_create(c, &t, NULL), TFM_INVALID);
        assert_refused(c, tfm_session_feed(c, s, id, NULL), TFM_INVALID);
        assert_refused(c, tfm_session_feed(c, s, id, counts), TFM_INVALID);
        cr_assert(isnan(tfm_get(w, numbers)));
        tfm_session_destroy(s);
        tfm_params_destroy(p);
        tfm_destroy(c);
    }
}

/* Also for a context that adds to a store of another allocator. */
Test(params, memory_limit_counts) {
    test_memory m = test_memory_new();
    tfm_options o;
    tfm_ctx *c, *other;
    tfm_params *p;
    tfm_linear_layer l;
    memset(&o, 0, sizeof o);
    o.threads = 1;
    o.memory_limit = 8 << 20;
    c = tfm_create(&o);
    p = tfm_params_create(c);
    assert_verb_refused(c, tfm_linear_init(c, p, "l", 2048, 2048, 1, &l), TFM_OOM);
    o.allocator = test_allocator(&m);
    other = tfm_create(&o);
    assert_verb_refused(other, tfm_linear_init(other, p, "m", 2048, 2048, 1, &l), TFM_OOM);
    cr_assert_null(tfm_params_find(p, "m.weight"));
    assert_made(other, tfm_params_add(other, p, "small", TFM_F32, TFM_SHAPE(1024)));
    tfm_destroy(other);
    assert_no_leak(&m);
    tfm_params_destroy(p);
    tfm_destroy(c);
}

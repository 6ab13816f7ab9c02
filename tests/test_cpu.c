/* Which instruction sets a machine can run, read from records of machines that are not here, and how one is forced. */
#define TFM_STATIC
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"

#include "test.h"

enum {
    SCALAR = 1 << TFM_ISA_SCALAR, NEON = 1 << TFM_ISA_NEON, AVX2 = 1 << TFM_ISA_AVX2, AVX512 = 1 << TFM_ISA_AVX512,
    EAX = 0, EBX = 1, ECX = 2, EDX = 3
};

/* -- records ------------------------------------------------------------------------------------------------------- */

/* XSAVE, OSXSAVE, AVX, FMA, F16C; AVX2; XCR0 with xmm and ymm state. */
static tfm__cpu_record avx2_machine(void) {
    tfm__cpu_record r;
    memset(&r, 0, sizeof r);
    r.arch = TFM__ARCH_X86;
    r.leaf0[EAX] = 13;
    r.leaf1[ECX] = 1u << 26 | 1u << 27 | 1u << 28 | 1u << 12 | 1u << 29;
    r.leaf7[EBX] = 1u << 5;
    r.xcr0 = 0x7;
    return r;
}

/* And F, DQ, BW, VL; XCR0 with mask, upper zmm and high zmm state. */
static tfm__cpu_record avx512_machine(void) {
    tfm__cpu_record r = avx2_machine();
    r.leaf7[EBX] |= 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    r.xcr0 = 0xe7;
    return r;
}

static uint32_t isas(tfm__cpu_record r) { return tfm__cpu_decode(&r).isas; }
static uint32_t features(tfm__cpu_record r) { return tfm__cpu_decode(&r).features; }

Test(cpu, nothing_known_is_plain_c) {
    tfm__cpu_record r;
    memset(&r, 0, sizeof r);
    cr_assert_eq(isas(r), SCALAR);
    r.arch = TFM__ARCH_X86;
    cr_assert_eq(isas(r), SCALAR);
    cr_assert_eq(features(r), 0u);
    r = avx512_machine();
    r.arch = TFM__ARCH_OTHER;
    cr_assert_eq(isas(r), SCALAR, "x86 bits on another machine");
}

Test(cpu, avx2_and_avx512_machines_are_recognised) {
    cr_assert_eq(isas(avx2_machine()), (SCALAR | AVX2));
    cr_assert_eq(isas(avx512_machine()), (SCALAR | AVX2 | AVX512));
}

Test(cpu, each_required_bit_alone_decides) {
    const tfm__cpu_record full = avx512_machine();
    int bit;
    for (bit = 0; bit < 32; bit++) {
        tfm__cpu_record r = full;
        const int base = bit == 12 || (bit >= 26 && bit <= 29);
        r.leaf1[ECX] &= ~(1u << bit);
        cr_assert_eq(isas(r), (uint32_t)(base ? SCALAR : SCALAR | AVX2 | AVX512), "leaf 1 ecx without bit %d: %x", bit,
                     (unsigned)isas(r));
    }
    for (bit = 0; bit < 32; bit++) {
        tfm__cpu_record r = full;
        const int wide = bit == 16 || bit == 17 || bit == 30 || bit == 31;
        r.leaf7[EBX] &= ~(1u << bit);
        cr_assert_eq(isas(r),
                     (uint32_t)(bit == 5 ? SCALAR
                                : wide   ? SCALAR | AVX2
                                         : SCALAR | AVX2 | AVX512),
                     "leaf 7 ebx without bit %d: %x", bit, (unsigned)isas(r));
    }
}

Test(cpu, state_the_system_does_not_save_is_not_used) {
    const tfm__cpu_record full = avx512_machine();
    int bit;
    for (bit = 0; bit < 64; bit++) {
        tfm__cpu_record r = full;
        const int ymm = bit == 1 || bit == 2, zmm = bit >= 5 && bit <= 7;
        r.xcr0 &= ~((uint64_t)1 << bit);
        cr_assert_eq(isas(r),
                     (uint32_t)(ymm   ? SCALAR
                                : zmm ? SCALAR | AVX2
                                      : SCALAR | AVX2 | AVX512),
                     "XCR0 without bit %d: %x", bit, (unsigned)isas(r));
    }
}

/* Without OSXSAVE the read of XCR0 faults: whatever a record holds there means nothing. */
Test(cpu, without_osxsave_there_is_no_vector_state) {
    tfm__cpu_record r = avx512_machine();
    r.leaf1[ECX] &= ~(1u << 27);
    cr_assert_eq(isas(r), SCALAR);
}

/* cpuid answers leaves past the largest with those of another leaf. */
Test(cpu, leaves_past_the_largest_are_not_believed) {
    tfm__cpu_record r = avx512_machine();
    r.leaf0[EAX] = 7;
    cr_assert_eq(isas(r), (SCALAR | AVX2 | AVX512));
    for (r.leaf0[EAX] = 0; r.leaf0[EAX] < 7; r.leaf0[EAX]++)
        cr_assert_eq(isas(r), SCALAR, "largest leaf %u", (unsigned)r.leaf0[EAX]);
    r = avx512_machine();
    r.leaf7_1[EAX] =
        1u << 4 | 1u << 5; /* AVX-VNNI, AVX512-BF16: in subleaf 1, of which leaf 7 says whether it exists */
    cr_assert_eq(features(r), 0u);
    r.leaf7[EAX] = 1;
    cr_assert_eq(features(r), (uint32_t)(TFM__CPU_AVX_VNNI | TFM__CPU_AVX512_BF16));
}

Test(cpu, a_feature_counts_only_with_its_instruction_set) {
    tfm__cpu_record r = avx512_machine();
    r.leaf7[EAX] = 1;
    r.leaf7_1[EAX] = 1u << 4 | 1u << 5;
    r.leaf7[ECX] = 1u << 11 | 1u << 1;
    r.leaf7[EDX] = 1u << 23;
    cr_assert_eq(features(r), (uint32_t)(TFM__CPU_AVX_VNNI | TFM__CPU_AVX512_VNNI | TFM__CPU_AVX512_BF16
                                         | TFM__CPU_AVX512_FP16 | TFM__CPU_AVX512_VBMI));
    r.xcr0 = 0x7;
    cr_assert_eq(features(r), (uint32_t)TFM__CPU_AVX_VNNI);
    r.xcr0 = 0x3;
    cr_assert_eq(features(r), 0u);
}

Test(cpu, aarch64_has_neon_and_what_its_hwcap_words_say) {
    static const struct { int word, bit, feature;
    } row[] = {{0, 10, TFM__CPU_FP16},
               {0, 20, TFM__CPU_DOTPROD},
               {0, 22, TFM__CPU_SVE},
               {1, 13, TFM__CPU_I8MM},
               {1, 14, TFM__CPU_BF16}};
    tfm__cpu_record r;
    uint32_t expected[2][64];
    int i, word, bit;
    memset(&r, 0, sizeof r);
    memset(expected, 0, sizeof expected);
    r.arch = TFM__ARCH_ARM64;
    cr_assert_eq(isas(r), (SCALAR | NEON));
    cr_assert_eq(features(r), 0u);
    for (i = 0; i < (int)(sizeof row / sizeof row[0]); i++)
        expected[row[i].word][row[i].bit] = (uint32_t)row[i].feature;
    for (word = 0; word < 2; word++)
        for (bit = 0; bit < 64; bit++) {
            r.hwcap = word ? 0 : (uint64_t)1 << bit;
            r.hwcap2 = word ? (uint64_t)1 << bit : 0;
            cr_assert_eq(features(r), expected[word][bit], "word %d bit %d: %x", word, bit, (unsigned)features(r));
            cr_assert_eq(isas(r), (SCALAR | NEON));
        }
}

/* Leaf 4: {type | level << 5, line - 1 | (parts - 1) << 12 | (ways - 1) << 22, sets - 1}. */
Test(cpu, cache_sizes_come_from_the_record_or_are_guessed) {
    tfm__cpu_record r = avx2_machine();
    tfm__cpu cpu = tfm__cpu_decode(&r);
    cr_assert(cpu.l1d >= 16384 && cpu.l2 >= cpu.l1d, "guesses %lld, %lld", (long long)cpu.l1d, (long long)cpu.l2);
    r.cache[0][EAX] = 1 | 1 << 5; /* data */
    r.cache[0][EBX] = 63 | 11u << 22;
    r.cache[0][ECX] = 63;
    r.cache[1][EAX] = 2 | 1 << 5; /* instructions: not ours */
    r.cache[1][EBX] = 63 | 7u << 22;
    r.cache[1][ECX] = 1023;
    r.cache[2][EAX] = 3 | 2 << 5; /* unified */
    r.cache[2][EBX] = 63 | 15u << 22;
    r.cache[2][ECX] = 2047;
    r.cache[3][EAX] = 3 | 3 << 5;
    r.cache[3][EBX] = 63 | 15u << 22;
    r.cache[3][ECX] = 65535;
    cpu = tfm__cpu_decode(&r);
    cr_assert_eq(cpu.l1d, 48 * 1024);
    cr_assert_eq(cpu.l2, 2048 * 1024);
}

/* -- this machine -------------------------------------------------------------------------------------------------- */

Test(cpu, what_is_usable_here_is_in_the_build_and_in_the_record) {
    tfm__cpu_record r;
    uint32_t usable = tfm__isa_usable();
    int isa;
    tfm__cpu_read(&r);
    cr_assert(usable & SCALAR);
    cr_assert_eq(usable & ~isas(r), 0u);
    for (isa = 0; isa < TFM_ISA_COUNT; isa++) {
        cr_assert_eq(tfm_isa_supported(tfm__isa_name(isa)), (int)(usable >> isa & 1u));
        cr_assert(tfm__kernels_for(isa) || !(usable >> isa & 1u), "%s is usable but has no kernels",
                  tfm__isa_name(isa));
    }
    cr_assert(!tfm__kernels_for(-1) && !tfm__kernels_for(TFM_ISA_COUNT));
    cr_assert_not(tfm_isa_supported("avx3"));
    cr_assert_not(tfm_isa_supported(""));
    cr_assert_not(tfm_isa_supported(NULL));
}

/* The compiler's own detection, where it has one. */
Test(cpu, this_machine_is_read_as_the_compiler_reads_it) {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    tfm__cpu_record r;
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    tfm__cpu_read(&r);
    cr_assert_eq(isas(r), (uint32_t)(SCALAR | (avx2 ? AVX2 : 0) | (avx512 ? AVX512 : 0)));
#elif defined(__aarch64__)
    tfm__cpu_record r;
    tfm__cpu_read(&r);
    cr_assert_eq(isas(r), (SCALAR | NEON));
#else
    cr_skip_test("no second opinion");
#endif
}

/* -- forcing ------------------------------------------------------------------------------------------------------- */

#if defined(_WIN32)
static void set_environment(const char *value) { _putenv_s("TFM_ISA", value ? value : ""); }
#else
#if defined(__STRICT_ANSI__) /* hidden by -std=c99 */
extern int setenv(const char *name, const char *value, int overwrite);
extern int unsetenv(const char *name);
#endif
static void set_environment(const char *value) {
    if (value) {
        setenv("TFM_ISA", value, 1);
    } else {
        unsetenv("TFM_ISA");
    }
}
#endif

/* A context with option and environment as told (NULL: unset); the environment is afterwards what it was. */
static tfm_ctx *create_with(const char *option, const char *environment) {
    const char *now = getenv("TFM_ISA");
    char before[64];
    tfm_options o;
    tfm_ctx *c;
    snprintf(before, sizeof before, "%s", now ? now : "");
    set_environment(environment);
    memset(&o, 0, sizeof o);
    o.isa = option;
    o.threads = 1;
    c = tfm_create(&o);
    set_environment(now ? before : NULL);
    cr_assert_not_null(c);
    return c;
}

static void assert_runs(const char *option, const char *environment, const char *isa) {
    tfm_ctx *c = create_with(option, environment);
    cr_assert(tfm_status_of(c) == TFM_OK, "%s", tfm_error(c));
    cr_assert_str_eq(tfm_isa_name(c), isa, "option %s, TFM_ISA %s: %s", option ? option : "none",
                     environment ? environment : "unset", tfm_isa_name(c));
    tfm_destroy(c);
}

static void assert_create_refused(const char *option, const char *environment, tfm_status status, const char *said) {
    tfm_ctx *c = create_with(option, environment);
    char here[80] = "";
    int isa;
    cr_assert_eq(tfm_status_of(c), status, "%s", tfm_error(c));
    cr_assert(strstr(tfm_error(c), said) && strstr(tfm_error(c), option ? "isa" : "TFM_ISA"), "\"%s\" does not name %s",
              tfm_error(c), said);
    for (isa = 0; isa < TFM_ISA_COUNT; isa++) {
        if (!tfm_isa_supported(test_isa(isa))) continue;
        snprintf(here + strlen(here), sizeof here - strlen(here), "%s %s", here[0] ? "," : "; here:", test_isa(isa));
    }
    cr_assert(strstr(tfm_error(c), here), "\"%s\" does not end in \"%s\"", tfm_error(c), here);
    cr_assert_null(tfm_zeros(c, tfm_shape1(2)), "a refused context works");
    tfm_clear(c);
    cr_assert_null(tfm_zeros(c, tfm_shape1(2)), "a context without the asked instruction set works after tfm_clear");
    tfm_destroy(c);
}

static const char *best_here(void) {
    int isa = TFM_ISA_COUNT - 1;
    while (!tfm_isa_supported(test_isa(isa))) isa--;
    return test_isa(isa);
}

/* One that this machine cannot run. */
static const char *none_of_ours(void) {
    int isa = 0;
    while (isa < TFM_ISA_COUNT && tfm_isa_supported(test_isa(isa))) isa++;
    return isa < TFM_ISA_COUNT ? test_isa(isa) : NULL;
}

Test(cpu, without_a_wish_the_best_set_is_taken) {
    assert_runs(NULL, NULL, best_here());
    assert_runs(NULL, "", best_here());
    assert_runs("", NULL, best_here());
}

Test(cpu, choice_only_lowers) {
    const uint32_t x86 = SCALAR | AVX2 | AVX512;
    cr_assert_eq(tfm__isa_choose(NULL, SCALAR), TFM_ISA_SCALAR);
    cr_assert_eq(tfm__isa_choose(NULL, x86), TFM_ISA_AVX512);
    cr_assert_eq(tfm__isa_choose("", SCALAR | AVX2), TFM_ISA_AVX2);
    cr_assert_eq(tfm__isa_choose("scalar", x86), TFM_ISA_SCALAR);
    cr_assert_eq(tfm__isa_choose("avx3", x86), TFM__ISA_UNKNOWN);
    cr_assert_eq(tfm__isa_choose("AVX2", x86), TFM__ISA_UNKNOWN);
    cr_assert_eq(tfm__isa_choose("avx2 ", x86), TFM__ISA_UNKNOWN);
    if (tfm__kernels_for(TFM_ISA_AVX2)) {
        cr_assert_eq(tfm__isa_choose("avx2", x86), TFM_ISA_AVX2);
        cr_assert_eq(tfm__isa_choose("avx2", SCALAR), TFM__ISA_NOT_HERE);
    }
    if (tfm__kernels_for(TFM_ISA_AVX512)) cr_assert_eq(tfm__isa_choose("avx512", SCALAR | AVX2), TFM__ISA_NOT_HERE);
    if (!tfm__kernels_for(TFM_ISA_NEON)) cr_assert_eq(tfm__isa_choose("neon", x86), TFM__ISA_NOT_BUILT);
}

Test(cpu, every_usable_set_can_be_forced_by_option_and_by_environment) {
    int isa;
    for (isa = 0; isa < TFM_ISA_COUNT; isa++) {
        if (!tfm_isa_supported(test_isa(isa))) continue;
        assert_runs(test_isa(isa), NULL, test_isa(isa));
        assert_runs(NULL, test_isa(isa), test_isa(isa));
    }
}

Test(cpu, the_option_wins_over_the_environment) {
    assert_runs("scalar", best_here(), "scalar");
    assert_runs(best_here(), "scalar", best_here());
    assert_runs("scalar", "avx3", "scalar");
}

Test(cpu, an_unknown_name_is_an_error_that_lists_what_is_here) {
    assert_create_refused("avx3", NULL, TFM_INVALID, "avx3");
    assert_create_refused(NULL, "sse9", TFM_INVALID, "sse9");
    assert_create_refused("Scalar", "scalar", TFM_INVALID, "Scalar");
}

Test(cpu, an_unsupported_set_is_an_error_that_lists_what_is_here_never_another_set) {
    const char *missing = none_of_ours();
    if (!missing) cr_skip_test("this machine runs all of them");
    assert_create_refused(missing, NULL, TFM_UNSUPPORTED, missing);
    assert_create_refused(NULL, missing, TFM_UNSUPPORTED, missing);
}

/* No global state: tables belong to contexts. */
Test(cpu, contexts_with_different_sets_live_side_by_side) {
    tfm_ctx *c[TEST_ISAS];
    tfm_tensor *x[TEST_ISAS], *y[TEST_ISAS];
    int isa, step;
    for (isa = 0; isa < TEST_ISAS; isa++) {
        c[isa] = test_isa_context(isa, 1);
        if (!c[isa]) continue;
        x[isa] = tfm_randn(c[isa], TFM_SHAPE(37, 53));
        y[isa] = x[isa];
        assert_made(c[isa], x[isa]);
    }
    for (step = 0; step < 3; step++)
        for (isa = 0; isa < TEST_ISAS; isa++) { /* in turns */
            if (!c[isa]) continue;
            cr_assert_str_eq(tfm_isa_name(c[isa]), test_isa(isa));
            y[isa] = step < 2 ? tfm_softmax(c[isa], y[isa], -1)
                              : tfm_matmul(c[isa], y[isa], tfm_transpose(c[isa], x[isa], 0, 1));
            assert_made(c[isa], y[isa]);
        }
    for (isa = 1; isa < TEST_ISAS; isa++) {
        if (!c[isa]) continue;
        assert_same_bytes(x[isa]->data, x[0]->data, 37 * 53 * 4); /* random numbers are the same everywhere */
        assert_close((const float *)y[isa]->data, (const float *)y[0]->data, 37 * 37, 1e-5, 1e-6);
        tfm_destroy(c[isa]);
    }
    tfm_destroy(c[0]);
}

/* What this machine can do at most, measured: FMA rate, read bandwidth and copy bandwidth per instruction set, on any
 * number of threads. A benchmark states its result as a share of these, measured in the same run. */
#ifndef BENCH_PEAK_H
#define BENCH_PEAK_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PEAK_NOINLINE __attribute__((noinline))
#define PEAK_ROUNDS 4096      /* iterations between two looks at the clock */
#define PEAK_SLICES 5
#define PEAK_THREADS 1024     /* as many as a context takes */
#define PEAK_BYTES (256 << 10) /* moved between two looks at the clock */

static double bench_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One loop of N independent chains: latency x throughput differs between machines, so the best of 12, 16 and 24 is
 * taken. The empty asm keeps the accumulators in registers and the compiler from folding the loop. */
#define PEAK_R12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define PEAK_R16(X) PEAK_R12(X) X(12) X(13) X(14) X(15)
#define PEAK_R24(X) PEAK_R16(X) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)
#define PEAK_LOOP(name, target, type, reg, list, set1)                                 \
    target PEAK_NOINLINE static float name(void) {                                                  \
        type m = set1(1.0f), d = set1(1e-30f);                                                      \
        list(PEAK_DECLARE_##reg) for (int i = 0; i < PEAK_ROUNDS; i++) { list(PEAK_STEP_##reg) }     \
        float sink[16];                                                                             \
        memcpy(sink, &a0, sizeof a0);                                                               \
        list(PEAK_USE_##reg) return sink[0];                                                        \
    }

#define PEAK_STEP(i, constraint, fma) a##i = fma(a##i, m, d); __asm__ volatile("" : "+" constraint(a##i));

#if defined(__x86_64__) || defined(__i386__)
#define PEAK_T512 __attribute__((target("avx512f")))
#define PEAK_DECLARE_z(i) __m512 a##i = m;
#define PEAK_STEP_z(i) PEAK_STEP(i, "v", _mm512_fmadd_ps)
#define PEAK_USE_z(i) __asm__ volatile("" : : "v"(a##i));
#define PEAK_T256 __attribute__((target("avx2,fma")))
#define PEAK_DECLARE_y(i) __m256 a##i = m;
#define PEAK_STEP_y(i) PEAK_STEP(i, "x", _mm256_fmadd_ps)
#define PEAK_USE_y(i) __asm__ volatile("" : : "x"(a##i));
PEAK_LOOP(peak_512_12, PEAK_T512, __m512, z, PEAK_R12, _mm512_set1_ps)
PEAK_LOOP(peak_512_16, PEAK_T512, __m512, z, PEAK_R16, _mm512_set1_ps)
PEAK_LOOP(peak_512_24, PEAK_T512, __m512, z, PEAK_R24, _mm512_set1_ps)
PEAK_LOOP(peak_256_12, PEAK_T256, __m256, y, PEAK_R12, _mm256_set1_ps)
#endif

/* Four lanes of the baseline: SSE mul + add on x86, FMA on aarch64. */
typedef float peak_v4 __attribute__((vector_size(16)));
#if defined(__aarch64__)
#define PEAK_FMA4(a, m, d) (peak_v4) vfmaq_f32((float32x4_t)(d), (float32x4_t)(a), (float32x4_t)(m))
#define PEAK_C4 "w"
#elif defined(__x86_64__) || defined(__i386__)
#define PEAK_FMA4(a, m, d) ((a) * (m) + (d))
#define PEAK_C4 "x"
#else
#define PEAK_FMA4(a, m, d) ((a) * (m) + (d))
#define PEAK_C4 "g"
#endif
static peak_v4 peak_set4(float x) { return (peak_v4){x, x, x, x}; }
#define PEAK_DECLARE_q(i) peak_v4 a##i = m;
#define PEAK_STEP_q(i) PEAK_STEP(i, PEAK_C4, PEAK_FMA4)
#define PEAK_USE_q(i) __asm__ volatile("" : : PEAK_C4(a##i));
PEAK_LOOP(peak_128_12, , peak_v4, q, PEAK_R12, peak_set4)
#if !defined(__i386__)
PEAK_LOOP(peak_128_16, , peak_v4, q, PEAK_R16, peak_set4)
#endif

typedef struct peak_row { const char *isa; int lanes, chains; float (*run)(void); } peak_row;
static const peak_row peak_rows[] = {
#if defined(__x86_64__) || defined(__i386__)
    {"avx512", 16, 12, peak_512_12}, {"avx512", 16, 16, peak_512_16}, {"avx512", 16, 24, peak_512_24},
    {"avx2", 8, 12, peak_256_12},
#endif
#if !defined(__i386__)
    {"neon", 4, 16, peak_128_16}, {"scalar", 4, 16, peak_128_16},
#endif
    {"neon", 4, 12, peak_128_12}, {"scalar", 4, 12, peak_128_12},
};

/* Every byte of a buffer into a register, as S streams at once: one stream keeps too few cache lines on their way on
 * some machines, many streams are beyond what the prefetcher follows on others, so the best of 1, 4 and 8 is taken.
 * `floats` is a multiple of S x 64. */
#define PEAK_READ(name, target, type, constraint, S)                                                             \
    target PEAK_NOINLINE static void name(const float *data, size_t floats) {                                        \
        size_t each = floats / (S);                                                                                  \
        for (size_t i = 0; i < each; i += 64) {                                                                      \
            for (int s = 0; s < (S); s++) {                                                                          \
                const char *from = (const char *)(data + (size_t)s * each + i);                                      \
                for (size_t b = 0; b < 256; b += sizeof(type)) {                                                     \
                    type x;                                                                                          \
                    memcpy(&x, from + b, sizeof x);                                                                  \
                    __asm__ volatile("" : : constraint(x));                                                          \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
    }
#define PEAK_READS(bits, target, type, constraint) \
    PEAK_READ(peak_read_##bits##_1, target, type, constraint, 1) \
    PEAK_READ(peak_read_##bits##_4, target, type, constraint, 4) \
    PEAK_READ(peak_read_##bits##_8, target, type, constraint, 8)
#if defined(__x86_64__) || defined(__i386__)
PEAK_READS(512, PEAK_T512, __m512, "v")
PEAK_READS(256, PEAK_T256, __m256, "x")
#endif
#if defined(__i386__)
PEAK_READS(128, , float, "r")
#else
PEAK_READS(128, , peak_v4, PEAK_C4)
#endif

typedef struct peak_read_row { const char *isa; void (*run)(const float *data, size_t floats); } peak_read_row;
#define PEAK_READ_ROWS(isa, bits) {isa, peak_read_##bits##_1}, {isa, peak_read_##bits##_4}, {isa, peak_read_##bits##_8}
static const peak_read_row peak_read_rows[] = {
#if defined(__x86_64__) || defined(__i386__)
    PEAK_READ_ROWS("avx512", 512), PEAK_READ_ROWS("avx2", 256),
#endif
    PEAK_READ_ROWS("neon", 128), PEAK_READ_ROWS("scalar", 128),
};

/* The working set that bandwidth is measured over: `share` floats for each thread. Pages are large where the system
 * gives them, since the limit is the machine's and not its page tables'. */
typedef struct peak_memory { float *data; size_t share; int threads; } peak_memory;
#define PEAK_MEMORY_MAX ((int64_t)256 << 20) /* far beyond a last-level cache: more shows nothing new */

static int peak_memory_open(peak_memory *m, int64_t bytes, int threads) {
    const size_t unit = 1024, page = (size_t)2 << 20;
    size_t floats = (size_t)(bytes < PEAK_MEMORY_MAX ? bytes : PEAK_MEMORY_MAX) / sizeof(float);
    void *data = NULL;
    m->threads = threads;
    m->share = (floats / (size_t)threads + unit - 1) / unit * unit;
    if (m->share == 0) m->share = unit;
    floats = (m->share * sizeof(float) * (size_t)threads + page - 1) / page * page;
    if (posix_memalign(&data, page, floats)) return 1;
#if defined(MADV_HUGEPAGE)
    madvise(data, floats, MADV_HUGEPAGE);
#endif
    memset(data, 1, floats);
    m->data = (float *)data;
    return 0;
}
static void peak_memory_close(peak_memory *m) { free(m->data); m->data = NULL; }

typedef struct peak_job {
    const peak_row *row;
    const peak_read_row *read;
    double seconds, flops, bytes;
    float *data;
    size_t floats;
} peak_job;

static void *peak_fma_thread(void *arg) {
    peak_job *j = (peak_job *)arg;
    double begin = bench_now(), now;
    volatile float sink = 0;
    int64_t rounds = 0;
    do {
        sink = sink + j->row->run();
        rounds++;
    } while ((now = bench_now()) - begin < j->seconds);
    j->flops = 2.0 * j->row->lanes * j->row->chains * PEAK_ROUNDS * (double)rounds / (now - begin);
    return NULL;
}

static void *peak_copy_thread(void *arg) {
    peak_job *j = (peak_job *)arg;
    double begin = bench_now(), now;
    size_t half = j->floats / 2 * sizeof(float);
    int64_t rounds = 0;
    do {
        for (size_t done = 0; done < PEAK_BYTES; done += half, rounds++) {
            memcpy((char *)j->data + half, j->data, half);
            __asm__ volatile("" : : : "memory");
        }
    } while ((now = bench_now()) - begin < j->seconds);
    j->bytes = 2.0 * (double)half * (double)rounds / (now - begin);
    return NULL;
}

static void *peak_fresh_thread(void *arg) {
    peak_job *j = (peak_job *)arg;
    double begin = bench_now(), now;
    size_t half = j->floats / 2 * sizeof(float);
    int64_t rounds = 0;
    do {
        char *fresh = (char *)mmap(NULL, half, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fresh == (char *)MAP_FAILED) break;
#if defined(MADV_HUGEPAGE)
        madvise(fresh, half, MADV_HUGEPAGE);
#endif
        memcpy(fresh, j->data, half);
        __asm__ volatile("" : : : "memory");
        munmap(fresh, half);
        rounds++;
    } while ((now = bench_now()) - begin < j->seconds);
    j->bytes = rounds ? 2.0 * (double)half * (double)rounds / (now - begin) : 0;
    return NULL;
}

static void *peak_read_thread(void *arg) {
    peak_job *j = (peak_job *)arg;
    double begin = bench_now(), now;
    int64_t rounds = 0;
    do {
        for (size_t done = 0; done < PEAK_BYTES; done += j->floats * sizeof(float), rounds++)
            j->read->run(j->data, j->floats);
    } while ((now = bench_now()) - begin < j->seconds);
    j->bytes = (double)j->floats * sizeof(float) * (double)rounds / (now - begin);
    return NULL;
}

static void peak_run(void *(*body)(void *), peak_job *jobs, int threads) {
    pthread_t id[PEAK_THREADS];
    int made = 0;
    for (int i = 1; i < threads; i++) {
        if (pthread_create(&id[made], NULL, body, &jobs[i]) == 0) made++;
    }
    body(&jobs[0]);
    for (int i = 0; i < made; i++) pthread_join(id[i], NULL);
}

/* FLOP/s of `isa` on `threads` threads: best of its loops, `seconds` each, in slices: another program on the same core
 * halves a long stretch, but hardly all of many short ones. */
static double peak_flops(const char *isa, int threads, double seconds) {
    double best = 0;
    for (size_t r = 0; r < PEAK_SLICES * sizeof peak_rows / sizeof *peak_rows; r++) {
        const peak_row *row = &peak_rows[r / PEAK_SLICES];
        peak_job jobs[PEAK_THREADS] = {{0}};
        double sum = 0;
        if (strcmp(row->isa, isa)) continue;
        for (int i = 0; i < threads; i++) { jobs[i].row = row; jobs[i].seconds = seconds / PEAK_SLICES; }
        peak_run(peak_fma_thread, jobs, threads);
        for (int i = 0; i < threads; i++) sum += jobs[i].flops;
        if (sum > best) best = sum;
    }
    return best;
}

static double peak_bandwidth(void *(*body)(void *), const peak_memory *m, const peak_read_row *read, double seconds) {
    peak_job jobs[PEAK_THREADS] = {{0}};
    double sum = 0;
    for (int i = 0; i < m->threads; i++) {
        jobs[i].seconds = seconds;
        jobs[i].read = read;
        jobs[i].data = m->data + m->share * (size_t)i;
        jobs[i].floats = m->share;
    }
    peak_run(body, jobs, m->threads);
    for (int i = 0; i < m->threads; i++) sum += jobs[i].bytes;
    return sum;
}

/* Bytes per second (read + written) of memcpy from one half of the working set to the other. */
static double peak_copy(const peak_memory *m, double seconds) {
    return peak_bandwidth(peak_copy_thread, m, NULL, seconds);
}

/* The same into memory that the system hands out anew each time, and clears: what loading weights can reach. */
static double peak_fresh(const peak_memory *m, double seconds) {
    return peak_bandwidth(peak_fresh_thread, m, NULL, seconds);
}

/* Bytes per second of reading the working set again and again: best of the loops of `isa`, `seconds` each. */
static double peak_read(const char *isa, const peak_memory *m, double seconds) {
    double best = 0;
    for (size_t r = 0; r < sizeof peak_read_rows / sizeof *peak_read_rows; r++) {
        double rate;
        if (strcmp(peak_read_rows[r].isa, isa)) continue;
        rate = peak_bandwidth(peak_read_thread, m, &peak_read_rows[r], seconds);
        if (rate > best) best = rate;
    }
    return best;
}
#endif

/* transformer.h - run Transformers from one C header                                                    version 0.1.0
 *
 * SPDX-License-Identifier: MIT (full text in LICENSE)
 *
 * One file for a C or C++ project: tensors, SIMD attention, masks, encoder, decoder and whole models, key/value cache,
 * generation, weight files. Nothing to install, no special compiler flag, no abort. The same binary uses AVX-512, AVX2,
 * NEON or plain C, whichever the machine has when it starts.
 *
 *
 * QUICK START
 *
 *     #define TRANSFORMER_IMPLEMENTATION          // in exactly one source file; the others only include
 *     #include "transformer.h"
 *     int main(void) {
 *         tfm_ctx *c = tfm_create(NULL);                                       // NULL: every default
 *         tfm_tensor *q = tfm_randn(c, TFM_SHAPE(1, 12, 128, 64));             // (batch, heads, length, head size)
 *         tfm_tensor *k = tfm_randn(c, TFM_SHAPE(1, 12, 128, 64));
 *         tfm_tensor *v = tfm_randn(c, TFM_SHAPE(1, 12, 128, 64));
 *         tfm_attention_options o = {0};
 *         o.mask.causal = TFM_CAUSAL_TOP_LEFT;
 *         tfm_tensor *y = tfm_attention(c, q, k, v, &o);
 *         if (!y || tfm_print(c, stdout, y)) {                       // one check for the whole program so far
 *             fprintf(stderr, "%s\n", tfm_error(c));
 *             return 1;
 *         }
 *         tfm_destroy(c);
 *         return 0;
 *     }
 *
 *     cc -O2 app.c -lm
 *
 * That line is enough with gcc and clang, as C99, C11 or C++17 (glibc before 2.34 adds -pthread). The declarations are
 * clean under every usual warning of C and C++; the implementation uses C's casts, so a C++ project with
 * -Wold-style-cast gives it a source file of its own, which may as well be C.
 *
 *
 * CONTENTS OF THIS FILE (search for the number and two spaces, e.g. "9  MASKS")
 *
 *     the public API: context, tensors, ops, masks, attention, cache, parameters, layers, Transformer, generation,
 *     files, models
 *      1  PLATFORM     2  MEMORY      3  CPU        4  KERNELS      5  DISPATCH    6  THREADS
 *      7  TENSORS      8  OPS         9  MASKS, ATTENTION, CACHE   10  LAYERS     12  GENERATION
 *     13  FILES       14  MODELS, TOKENIZERS
 *     A chapter uses only the chapters above it. Chapter 11, training, is not there yet: results are recorded for it.
 *     To read it as a book, begin with 8 (an op from check to result), 9 (attention) and 10 (what models are made of);
 *     4 is where the time goes.
 *
 *
 * CONFIGURATION MACROS (define before the include; the same wherever the header is included, unless marked "impl")
 *
 *     TRANSFORMER_IMPLEMENTATION   this file holds the implementation
 *     TFM_API                      how public functions are declared (default: extern), e.g. __declspec(dllexport)
 *     TFM_STATIC                   the whole library is private to this source file; unused functions give no warning
 *     TFM_PREFIX                   e.g. my_ : every public symbol is linked as my_tfm_...; sources keep writing tfm_...
 *     TFM_ASSERT(x)         impl   checks of the library's own invariants, never of arguments (default: nothing)
 *     TFM_SELF              impl   how the file finds itself for its kernel passes: the string of an #include. Only
 *                                  needed by a renamed copy on compilers without __FILE_NAME__ (gcc before 12)
 *     TFM_NO_AVX512, TFM_NO_AVX2, TFM_NO_NEON, TFM_NO_SIMD   impl   leave instruction sets out
 *     TFM_NO_THREADS        impl   no thread pool (options.parallel_for still works)
 *     TFM_NO_STDIO                 no FILE, no file names: everything from and to memory (snprintf is still needed)
 *     TFM_NO_GENERATION, TFM_NO_FILES, TFM_NO_MODELS         leave chapters out
 *
 *
 * CONVENTIONS
 *
 *   Shapes and names are PyTorch's: row-major, (batch, heads, length, head size) for attention, (batch, length,
 *   d_model) for layers ("batch_first" is the only layout), weight (out, in) for linear. Sizes are int64_t, up to 6
 *   dimensions.
 *   What all functions have in common (errors, who owns what) stands in front of the public API, and is not repeated.
 *   dtypes: f32, f16, bf16 compute (always with f32 accumulation and without widening a whole operand); i64, i32,
 *   i8, u8, bool index and select; f64 is stored and converted.
 *   Option structs: all zero is every default, so `= {0}` (C++: `= {}`) is always right.
 *   Errors: an expression returns a tensor, or NULL and sets the context's error: op, argument, shapes, what was
 *   expected. The first error stays until tfm_clear, and until then every expression returns NULL without working:
 *   check once, at the end. A verb returns a tfm_status, 0 for success. The library never aborts, exits, prints
 *   unasked or leaks.
 *   Masks have polarity in their name: keep (true = attend, scaled_dot_product_attention), ignore (true = do not
 *   attend, MultiheadAttention), nonzero (0 = do not attend), bias (0 / -inf, added). Causal alignment is never
 *   guessed from sizes: TFM_CAUSAL_TOP_LEFT (query i sees keys 0..i: PyTorch), TFM_CAUSAL_BOTTOM_RIGHT (the last query
 *   sees the last key: decoding with a cache), or an explicit offset. A layer that appends to a cache takes top-left
 *   for bottom-right; the decoder of a tfm_transformer is causal unless told otherwise.
 *
 *
 * MEMORY
 *
 *   Results live in the context's arena. tfm_mark / tfm_rewind bracket a step; tfm_keep lets one result survive.
 *   Using a result after its rewind is an error, not a crash. A repeated step takes no memory from the allocator
 *   after its first run.
 *   A context holds about 1.1 MiB with one thread and 1 MiB more for each further one; its arena grows on demand.
 *   Parameters, caches, sessions, files and tokenizers have their own destroy and outlive the context. The parameters
 *   must outlive what uses them. A view of a parameter dangles after tfm_params_prepare, _cast and _write_begin.
 *   tfm_measure_begin/_end and tfm_transformer_measure tell what calls or models need before they run.
 *   options.memory_limit caps what the context holds; for what outlives it, it bounds each block by itself.
 *
 *
 * NUMBERS
 *
 *   exp is within 2 ULP over its range; products accumulate in f32, one chain per output. NaN and Inf go through
 *   every op as IEEE arithmetic says. Softmax of a row with only -inf is zero. gcc's -ffast-math and -Ofast do not
 *   change results (linking with them turns subnormal numbers off for the whole program: that is theirs); clang's
 *   cannot be kept out and are refused by #error.
 *   DETERMINISM. On one instruction set the same inputs give the same bits, whatever the number of threads, the
 *   batch a row sits in, packed or plain weights, a prompt fed whole, in chunks or id by id, keys from a cache of
 *   the same dtype or from a tensor. Random numbers are counter-based (Philox) and the same on every platform.
 *   Different instruction sets differ in rounding.
 *   32-bit x86 keeps this promise with SSE2 arithmetic (-msse2 -mfpmath=sse), not with the x87 unit.
 *
 *
 * THREAD SAFETY
 *
 *     tfm_ctx                 one thread at a time; a second one gets TFM_BUSY. Any number of contexts side by side
 *     tfm_cancel              from any thread, and from a signal handler
 *     tfm_params              read by any number of contexts and threads; init, load, prepare, write_* need it alone
 *     tfm_cache, tfm_session  one thread at a time
 *     tfm_file, tfm_tokenizer read by any number of threads
 *   A child of fork() runs single-threaded.
 *
 *
 * LIMITS
 *
 *   CPU only, no training yet. f64 and integers are stored, not computed with. At most 6 dimensions; heads of up to
 *   65536; names of parameters up to 480 bytes. Dropout of attention resolves its probability to 1/65536. Little-endian
 *   machines with a C library (memory, strings, snprintf, math, a clock, getenv). NEON is tested by emulation only. On
 *   64-bit Windows gcc uses plain C kernels (it cannot align the stack for wide vectors there); clang does not have
 *   this limit. Resource use for hostile files is bounded by a small multiple of the file's size; see SECURITY.md.
 *
 * ================================================================================================================== */

/* The file includes itself: for the kernels of each instruction set, and for the list of names when TFM_PREFIX is
 * set. */
#if !defined(TFM_SELF)
#if defined(__FILE_NAME__)
#define TFM_SELF __FILE_NAME__
#else
#define TFM_SELF "transformer.h"
#endif
#endif

#if !defined(TFM__PREFIX_PASS)
#if !defined(TRANSFORMER_H) && !defined(TFM__PASS)
#define TRANSFORMER_H

#if defined(TFM_PREFIX)
#define TFM__PASTE2(a, b) a##b
#define TFM__PASTE(a, b) TFM__PASTE2(a, b)
#define TFM__PREFIXED(name) TFM__PASTE(TFM_PREFIX, name)
#define TFM__PREFIX_PASS
#include TFM_SELF
#undef TFM__PREFIX_PASS
#endif

#include <stddef.h>
#include <stdint.h>
#if !defined(TFM_NO_STDIO)
#include <stdio.h>
#endif

#define TFM_VERSION_MAJOR 0
#define TFM_VERSION_MINOR 1
#define TFM_VERSION_PATCH 0
#define TFM_VERSION (TFM_VERSION_MAJOR * 10000 + TFM_VERSION_MINOR * 100 + TFM_VERSION_PATCH)

#if !defined(TFM_API)
#if defined(TFM_STATIC)
#if defined(__GNUC__) || defined(__clang__)
#define TFM_API static __attribute__((unused))
#else
#define TFM_API static
#endif
#else
#define TFM_API extern
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define TFM_CHECK __attribute__((warn_unused_result))
#else
#define TFM_CHECK
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TFM_MAX_DIMS 6

/* Status of a verb. 0 is success. */
enum {
    TFM_OK = 0,
    TFM_INVALID = 1,      /* wrong argument: shape, dtype, range, a dead tensor */
    TFM_OOM = 2,          /* memory is out, or memory_limit reached */
    TFM_IO = 3,           /* a file cannot be opened, read or written */
    TFM_FORMAT = 4,       /* a file or buffer is not what it should be */
    TFM_UNSUPPORTED = 5,  /* well formed, but not offered (instruction set, dtype, ...) */
    TFM_CANCELLED = 6,    /* tfm_cancel, or a callback said stop */
    TFM_BUSY = 7          /* the context is in use by another thread */
};
typedef int tfm_status;

/* Element types. */
enum {
    TFM_F32 = 0, TFM_F16 = 1, TFM_BF16 = 2, TFM_F64 = 3,  /* F64: storage and conversion only */
    TFM_I64 = 4, TFM_I32 = 5, TFM_I8 = 6, TFM_U8 = 7, TFM_BOOL = 8,
    TFM_DTYPE_COUNT = 9
};

/* Activations (reference: PyTorch's functions of the same names; QUICK_GELU: x * sigmoid(1.702 x), CLIP). */
enum {
    TFM_ACT_NONE = 0, TFM_ACT_RELU = 1, TFM_ACT_GELU = 2 /* exact, erf */, TFM_ACT_GELU_TANH = 3,
    TFM_ACT_GELU_QUICK = 4,
    TFM_ACT_SILU = 5, TFM_ACT_SIGMOID = 6, TFM_ACT_TANH = 7, TFM_ACT_COUNT = 8
};

/* Instruction sets, in the order of preference on one architecture. */
enum { TFM_ISA_SCALAR = 0, TFM_ISA_NEON = 1, TFM_ISA_AVX2 = 2, TFM_ISA_AVX512 = 3, TFM_ISA_COUNT = 4 };

typedef struct tfm_tensor tfm_tensor;    /* see Tensors */
typedef struct tfm_ctx tfm_ctx;          /* a context: arena, threads, error, random numbers; one thread at a time */
/* named parameters (a state_dict); shared read-only by any number of contexts */
typedef struct tfm_params tfm_params;
typedef struct tfm_cache tfm_cache;      /* keys and values of past positions */
typedef struct tfm_session tfm_session;  /* a model in the middle of generating: caches and positions of a batch */
typedef struct tfm_file tfm_file;        /* an open safetensors file */
typedef struct tfm_tokenizer tfm_tokenizer;

/* ------------------------------------------------------------------------------------------------------------------
 *  What holds for every function below, unless its comment says otherwise
 *
 *  - One that returns tfm_tensor * or another pointer gives NULL and sets the context's error; one that returns
 *    tfm_status gives the status of the error. With an error set already nothing is done. Functions without a context
 *    set no error: counts of NULL are 0, names are NULL.
 *  - A tensor argument that is NULL, dead or of another context is an error, so calls may be nested and checked once;
 *    parameters are of no context. "or NULL" marks what may be left out. What is taken const is not changed.
 *  - Tensors, texts and arrays that come back lie in the context's arena: they live until a tfm_rewind below them or
 *    tfm_destroy. What has a _destroy (or _close) belongs to the caller; all of these take NULL.
 *  - Inputs may have any strides. Option structs and the arrays they point to are read during the call only; the
 *    options of tfm_create are copied. Strings are UTF-8 and end in NUL.
 *  - Sizes: B batch, L length, Lq queries, Lk keys, H heads, Hkv key/value heads, d size of a head or of a vector.
 * ---------------------------------------------------------------------------------------------------------------- */

/* ------------------------------------------------------------------------------------------------------------------
 *  Context
 * ---------------------------------------------------------------------------------------------------------------- */

/* Where all memory comes from. alloc returns memory aligned like malloc's, or NULL; free takes what alloc returned,
 * never NULL. Give both or none (then malloc and free). Called by the thread that calls the library, never by
 * workers. */
typedef struct tfm_allocator {
    void *(*alloc)(void *user, size_t size);
    void (*free)(void *user, void *pointer);
    void *user;
} tfm_allocator;

enum { TFM_LOG_DEBUG = 0, TFM_LOG_INFO = 1, TFM_LOG_WARNING = 2, TFM_LOG_ERROR = 3 };

/* Options of a context. All zero = every default. */
typedef struct tfm_options {
    /* 0: the least of physical cores, affinity and cgroup quota; 1: the caller alone. Each takes 1 MiB of scratch. They
     * are not pinned; on Linux one that the system runs on the caller's processor moves to another */
    int threads;
    /* NULL: environment TFM_ISA, else the best; "scalar", "neon", "avx2", "avx512": only lowers */
    const char *isa;
    uint64_t seed;           /* of tfm_randn and dropout; every value is a good seed */
    /* bytes this context may hold; 0: no limit. What outlives it (parameters, caches, sessions, files) is not counted,
     * but no single block of it may be larger than what the limit leaves */
    int64_t memory_limit;
    int spin_us;             /* how long workers spin after a job before they park; 0: 50, negative: park at once */
    /* 1: a product with a packed bf16 weight rounds its other operand to bf16, too, and takes the CPU's BF16 dot
     * products (AVX512_BF16; without them nothing changes): up to twice as fast. Each rounded factor is off by at most
     * 2^-8 of itself, an output by at most 2^-8 of the sum of its products' sizes; numbers below 2^-126 count as 0 */
    int bf16_dot;
    tfm_allocator allocator;
    /* Replaces the pool: call run(arg, i) once for each i in [0, count), in any order, on any threads, and return
     * when all are done. count never exceeds `threads` (which must then be set). */
    void (*parallel_for)(void *user, int count, void (*run)(void *arg, int i), void *arg);
    void *parallel_user;
    /* Each first error (TFM_LOG_ERROR), and what is worth knowing: fewer threads than asked for. NULL: silence. */
    void (*log)(void *user, int level, const char *message);
    /* Loading ("loading", tensors), tfm_generate ("generating", ids) and beam search ("beam search", ids) say how far
     * they are; non-zero cancels them */
    int (*progress)(void *user, const char *what, int64_t done, int64_t total);
    void *hook_user;         /* passed to log and progress */
} tfm_options;

/* Makes a context. options NULL = defaults. NULL only when memory is out (or the allocator is half given); any other
 * failure gives a context whose tfm_error says why (unknown isa, ...) and that does nothing. With one thread it holds
 * about 1.1 MiB, with each further one 1 MiB more; the arena grows on demand, by 1 MiB or more where there is room. */
TFM_API tfm_ctx *tfm_create(const tfm_options *options);

/* Frees the context and everything in its arena. NULL is fine. Parameters, caches, sessions, files and tokenizers live
 * on: they remember their allocator, which must outlive them, and have their own destroy. */
TFM_API void tfm_destroy(tfm_ctx *c);

/* The first error since tfm_create or tfm_clear (that of tfm_create itself stays): op, argument, shapes, what was
 * expected; "" when there is none. NULL: "out of memory". The text lives until the next tfm_clear. */
TFM_API const char *tfm_error(const tfm_ctx *c);
TFM_API tfm_status tfm_status_of(const tfm_ctx *c);            /* the status of tfm_error; TFM_OOM for NULL */
TFM_API const char *tfm_status_name(tfm_status status);        /* "ok", "invalid", ... */
TFM_API void tfm_clear(tfm_ctx *c);                            /* forgets the error and a pending tfm_cancel */

/* Stops the call that runs in another thread as soon as possible; it fails with TFM_CANCELLED. Safe from any thread
 * and from a signal handler. */
TFM_API void tfm_cancel(tfm_ctx *c);

/* The instruction set in use: "scalar", "neon", "avx2", "avx512". */
TFM_API const char *tfm_isa_name(const tfm_ctx *c);
TFM_API int tfm_isa_supported(const char *name);               /* 1: this machine and build can run it */
TFM_API int tfm_threads(const tfm_ctx *c);                     /* threads of an op, the caller among them */
TFM_API int tfm_version(void);                                 /* TFM_VERSION of the implementation */
/* Restarts the context's random numbers: creation, initialisation of layers and dropout then repeat (Philox4x32-10,
 * Salmon et al. 2011). Sampling of ids has its own seed. */
TFM_API void tfm_seed(tfm_ctx *c, uint64_t seed);

/* Memory. Results of ops live in the context's arena until a rewind below them or tfm_destroy. All three rewind or mark
 * with an error set too, so a loop gets its memory back after a failed step (tfm_keep then gives NULL). Marks nest:
 * rewinding to one makes those behind it invalid, and using such a mark, or another context's, is an error. Memory goes
 * back to the arena, not to the allocator: a repeated step takes none. */
typedef struct tfm_marker { int64_t position[4]; } tfm_marker;
TFM_API tfm_marker tfm_mark(tfm_ctx *c);                       /* remembers the arena's top */
/* Frees all results made since. Using such a tensor afterwards is an error; texts and arrays are simply gone. Refused
 * while the tape needs them (tfm_tape_clear). */
TFM_API void tfm_rewind(tfm_ctx *c, tfm_marker mark);
/* tfm_rewind, but t survives: the struct stays, its data may move. A view survives with the memory it shows. Returns
 * t. */
TFM_API tfm_tensor *tfm_keep(tfm_ctx *c, tfm_marker mark, tfm_tensor *t);

typedef struct tfm_memory {
    /* bytes of results now, and at most since the context was made or tfm_memory_reset */
    int64_t arena_used, arena_peak;
    int64_t held, held_peak;         /* bytes taken from the allocator through this context */
    int64_t allocations;             /* how often this context asked the allocator so far */
} tfm_memory;
/* What the context holds now: scratch, arena and tensor structs. What outlives it is not counted: see
 * tfm_params_bytes and tfm_cache_memory. */
TFM_API tfm_memory tfm_memory_usage(const tfm_ctx *c);
TFM_API void tfm_memory_reset(tfm_ctx *c);                     /* peaks start again from what is used now */

/* Between measure_begin and measure_end ops check and count but compute nothing: their results have shapes and no
 * readable data. measure_end rewinds to where it began and says what the calls in between would have needed: of the
 * arena (arena_peak), and of the allocator (held_peak: with scratch, and with parameters and caches made in between,
 * as if nothing had run before). Any model code can be asked this way how much memory it takes, before that memory is
 * taken; only names and small structs are. Parameters made in between have sizes but no values, and are of use until
 * measure_end only. A measurement cannot be nested. */
TFM_API void tfm_measure_begin(tfm_ctx *c);
TFM_API TFM_CHECK tfm_status tfm_measure_end(tfm_ctx *c, tfm_memory *out);

/* Per-op profile: time, useful work and memory traffic of each op and shape. Off until tfm_profile_start. */
typedef struct tfm_profile_row {
    const char *op;
    int ndim;
    int64_t shape[TFM_MAX_DIMS];     /* of the result */
    double ms, flops, bytes;         /* time spent, useful FLOPs and bytes that the op must move */
    int64_t calls;                   /* rows of equal op and shape are added up */
} tfm_profile_row;
TFM_API void tfm_profile_start(tfm_ctx *c);              /* clears the rows and starts timing every op */
TFM_API void tfm_profile_stop(tfm_ctx *c);               /* stops timing; the rows stay */
TFM_API int64_t tfm_profile_count(const tfm_ctx *c);     /* how many rows there are */
/* Copies row `index`; TFM_INVALID without an error of the context when there is none. */
TFM_API TFM_CHECK tfm_status tfm_profile_get(const tfm_ctx *c, int64_t index, tfm_profile_row *row);
/* The rows as a table (op, shape, calls, ms, share, GFLOP/s or GB/s), in the arena; the costly ones first (they are
 * sorted in place). */
TFM_API const char *tfm_profile(tfm_ctx *c);

/* ------------------------------------------------------------------------------------------------------------------
 *  Tensors
 * ---------------------------------------------------------------------------------------------------------------- */

/* A tensor: row-major unless strided, PyTorch's dimension order. Fields are public to read. Strides count elements. */
struct tfm_tensor {
    int dtype;
    int ndim;                        /* 0 (a scalar) to TFM_MAX_DIMS */
    int64_t shape[TFM_MAX_DIMS];
    int64_t stride[TFM_MAX_DIMS];
    void *data;                      /* NULL when the tensor has no element or its parameter is packed (see layout) */
    int layout;                      /* TFM_STRIDED, or TFM_PANELS for a packed parameter: `panels` holds it */
    int requires_grad;               /* set by tfm_set_requires_grad, inherited by results */
    /* private */
    void *panels;                    /* [ceil(rows/16)][columns][16] of dtype */
    uint64_t generation;             /* 0: dead */
    int64_t serial;
    int64_t bytes;
    struct tfm_tensor *next;
    struct tfm__node *node;          /* the op that made it, when recorded */
    const void *owner;               /* the context or parameter store it belongs to */
};
enum { TFM_STRIDED = 0, TFM_PANELS = 1 };

typedef struct tfm_shape { int ndim; int64_t dim[TFM_MAX_DIMS]; } tfm_shape;

/* TFM_SHAPE(2, 3, 4): a shape by value, 1 to 6 sizes. A scalar: tfm_shape_of(0, NULL). These functions check nothing:
 * what takes the shape does. */
#define TFM_SHAPE(...)                                                                                      \
    TFM__SHAPE_PICK(__VA_ARGS__, tfm_shape6, tfm_shape5, tfm_shape4, tfm_shape3, tfm_shape2, tfm_shape1, 0) \
    (__VA_ARGS__)
#define TFM__SHAPE_PICK(a, b, c, d, e, f, name, ...) name
TFM_API tfm_shape tfm_shape1(int64_t a);
TFM_API tfm_shape tfm_shape2(int64_t a, int64_t b);
TFM_API tfm_shape tfm_shape3(int64_t a, int64_t b, int64_t c);
TFM_API tfm_shape tfm_shape4(int64_t a, int64_t b, int64_t c, int64_t d);
TFM_API tfm_shape tfm_shape5(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e);
TFM_API tfm_shape tfm_shape6(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f);
TFM_API tfm_shape tfm_shape_of(int ndim, const int64_t *dim);
TFM_API tfm_shape tfm_shape_like(const tfm_tensor *t);         /* the shape of t; that of a scalar for NULL */

TFM_API int64_t tfm_numel(const tfm_tensor *t);                /* number of elements; 0 for NULL */
/* 1: the elements lie row-major without gaps, so t->data is an array of tfm_numel(t). 0 for a packed parameter. */
TFM_API int tfm_is_contiguous(const tfm_tensor *t);
TFM_API const char *tfm_dtype_name(int dtype);                 /* "f32", ...; "unknown" */
TFM_API int64_t tfm_dtype_size(int dtype);                     /* bytes of an element; 0: no such dtype */

/* Creation: contiguous, 64-byte aligned, in the arena. A size may be 0. */
TFM_API tfm_tensor *tfm_empty(tfm_ctx *c, int dtype, tfm_shape shape);      /* not initialised */
/* f32, like all below unless they name a dtype */
TFM_API tfm_tensor *tfm_zeros(tfm_ctx *c, tfm_shape shape);
TFM_API tfm_tensor *tfm_ones(tfm_ctx *c, tfm_shape shape);
TFM_API tfm_tensor *tfm_full(tfm_ctx *c, int dtype, tfm_shape shape, double value);
TFM_API tfm_tensor *tfm_randn(tfm_ctx *c, tfm_shape shape);                 /* normal, mean 0, deviation 1 */
TFM_API tfm_tensor *tfm_uniform(tfm_ctx *c, tfm_shape shape, float low, float high); /* in [low, high) */
/* (n): start, start + step, ... as long as it is before end, as torch.arange. */
TFM_API tfm_tensor *tfm_arange(tfm_ctx *c, int dtype, double start, double end, double step);
/* Copies tfm_numel elements of dtype from data, row-major. */
TFM_API tfm_tensor *tfm_from(tfm_ctx *c, int dtype, tfm_shape shape, const void *data);
/* The caller's memory as a tensor, no copy: aligned to the element, and it must outlive the tensor and its views.
 * Strides count elements and are 0 or more. */
TFM_API tfm_tensor *tfm_wrap(tfm_ctx *c, int dtype, tfm_shape shape, void *data);
TFM_API tfm_tensor *tfm_wrap_strided(tfm_ctx *c, int dtype, tfm_shape shape, const int64_t *stride, void *data);

/* Views: no copy, they see later changes of the base and go with it in a rewind. Any dtype. Negative dim counts from
 * the end; negative positions too where PyTorch allows them. A view of a parameter dangles once tfm_params_prepare,
 * tfm_params_cast or tfm_params_write_begin has given it other memory: make it again. */
/* The same elements in row-major order as shape; one size may be -1. Copies only when strides leave no other way. */
TFM_API tfm_tensor *tfm_reshape(tfm_ctx *c, const tfm_tensor *t, tfm_shape shape);
/* as reshape, but an error instead of a copy */
TFM_API tfm_tensor *tfm_view(tfm_ctx *c, const tfm_tensor *t, tfm_shape shape);
TFM_API tfm_tensor *tfm_transpose(tfm_ctx *c, const tfm_tensor *t, int dim0, int dim1);  /* swaps two dims */
/* dim i of the result is dim order[i] of t, e.g. TFM_SHAPE(0, 2, 1, 3) */
TFM_API tfm_tensor *tfm_permute(tfm_ctx *c, const tfm_tensor *t, tfm_shape order);
/* Python's t[start:end:step]: what is out of range is clipped; step is 1 or more */
TFM_API tfm_tensor *tfm_slice(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t start, int64_t end, int64_t step);
/* t[start:start + length], which must lie within the dim */
TFM_API tfm_tensor *tfm_narrow(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t start, int64_t length);
TFM_API tfm_tensor *tfm_select(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t index);  /* t[index]; drops the dim */
/* Sizes of 1 become larger, new dims come in front, with stride 0; -1 keeps a size. */
TFM_API tfm_tensor *tfm_expand(tfm_ctx *c, const tfm_tensor *t, tfm_shape shape);
TFM_API tfm_tensor *tfm_squeeze(tfm_ctx *c, const tfm_tensor *t, int dim);     /* drops the dim if its size is 1 */
TFM_API tfm_tensor *tfm_unsqueeze(tfm_ctx *c, const tfm_tensor *t, int dim);   /* a size of 1 in front of dim */
/* (B, L, H d) -> (B, H, L, d), a view */
TFM_API tfm_tensor *tfm_split_heads(tfm_ctx *c, const tfm_tensor *t, int64_t heads);
/* (B, H, L, d) -> (B, L, H d); a view where possible */
TFM_API tfm_tensor *tfm_combine_heads(tfm_ctx *c, const tfm_tensor *t);

/* Copies, of any dtype: results are contiguous and new. */
/* t itself (a view of it) when it is contiguous already */
TFM_API tfm_tensor *tfm_contiguous(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_clone(tfm_ctx *c, const tfm_tensor *t);
/* to nearest even; float to integer truncates and saturates, NaN gives 0 */
TFM_API tfm_tensor *tfm_cast(tfm_ctx *c, const tfm_tensor *t, int dtype);
/* Writes into destination: broadcasts source to its shape and converts to its dtype; they may overlap. Refused are
 * recorded tensors, expanded ones, and parameters outside tfm_params_write_begin / _end. */
TFM_API TFM_CHECK tfm_status tfm_copy(tfm_ctx *c, tfm_tensor *destination, const tfm_tensor *source);
/* Joined along dim (cat), or along a new dim (stack): one dtype, the other sizes equal. */
TFM_API tfm_tensor *tfm_cat(tfm_ctx *c, const tfm_tensor *const *list, int count, int dim);
TFM_API tfm_tensor *tfm_stack(tfm_ctx *c, const tfm_tensor *const *list, int count, int dim);
/* `before` and `after` elements of value at the ends of dim */
TFM_API tfm_tensor *tfm_pad(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t before, int64_t after, double value);
/* torch.gather: for dim 0 result[i][j] = t[index[i][j]][j]. index: i64 or i32, ids are checked; as many dims as t, and
 * no longer than t but in dim. The result has its shape. */
TFM_API tfm_tensor *tfm_gather(tfm_ctx *c, const tfm_tensor *t, int dim, const tfm_tensor *index);
/* The places index (n), i64 or i32, of dim: its size becomes n. Ids are checked. */
TFM_API tfm_tensor *tfm_index_select(tfm_ctx *c, const tfm_tensor *t, int dim, const tfm_tensor *index);
/* The last two dims as matrices: zeros above (tril) or below (triu) the diagonal; 1 is the one right of the main. */
TFM_API tfm_tensor *tfm_tril(tfm_ctx *c, const tfm_tensor *t, int64_t diagonal);
TFM_API tfm_tensor *tfm_triu(tfm_ctx *c, const tfm_tensor *t, int64_t diagonal);
/* value where mask (bool) is true, else t; the shapes broadcast */
TFM_API tfm_tensor *tfm_masked_fill(tfm_ctx *c, const tfm_tensor *t, const tfm_tensor *mask, double value);
/* a where condition (bool) is true, else b; a and b of one dtype or both f32, f16, bf16 (mixed: f32); broadcasts */
TFM_API tfm_tensor *tfm_where(tfm_ctx *c, const tfm_tensor *condition, const tfm_tensor *a, const tfm_tensor *b);

/* Reading and writing single elements by position (index has t->ndim entries); out of range gives NaN / TFM_INVALID.
 * For looking, not for loops over large tensors: those read t->data, or tfm_read. */
TFM_API double tfm_get(const tfm_tensor *t, const int64_t *index);
TFM_API TFM_CHECK tfm_status tfm_set(tfm_ctx *c, tfm_tensor *t, const int64_t *index, double value);
TFM_API double tfm_item(const tfm_tensor *t);                   /* the value of a tensor with one element, else NaN */
/* All elements, of any dtype, in row-major order as f32 into out[count]; count must be tfm_numel(t). Packed parameters
 * too. */
TFM_API TFM_CHECK tfm_status tfm_read(tfm_ctx *c, const tfm_tensor *t, float *out, int64_t count);

/* The text of a tensor as PyTorch prints it, long ones shortened. In the arena. */
TFM_API const char *tfm_format(tfm_ctx *c, const tfm_tensor *t);
#if !defined(TFM_NO_STDIO)
/* tfm_format and a line end to file; TFM_IO when it cannot be written. */
TFM_API TFM_CHECK tfm_status tfm_print(tfm_ctx *c, FILE *file, const tfm_tensor *t);
#endif

/* ------------------------------------------------------------------------------------------------------------------
 *  Ops.  f32, f16, bf16; results have the inputs' dtype (mixed: f32), are contiguous and new. Broadcasting is
 *  PyTorch's. Arithmetic is f32 whatever the dtype; other dtypes are an error that names tfm_cast.
 * ---------------------------------------------------------------------------------------------------------------- */
/* Element by element: a + b, a - b, a b, a / b, the smaller, the larger (NaN when one is NaN). */
TFM_API tfm_tensor *tfm_add(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
TFM_API tfm_tensor *tfm_sub(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
TFM_API tfm_tensor *tfm_mul(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
TFM_API tfm_tensor *tfm_div(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
TFM_API tfm_tensor *tfm_minimum(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
TFM_API tfm_tensor *tfm_maximum(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
/* t * factor, t + summand, and functions of each element, named as in C; rsqrt is 1 / sqrt, sigmoid 1 / (1 + e^-x).
 * Angles are radians. */
TFM_API tfm_tensor *tfm_scale(tfm_ctx *c, const tfm_tensor *t, float factor);
TFM_API tfm_tensor *tfm_shift(tfm_ctx *c, const tfm_tensor *t, float summand);
TFM_API tfm_tensor *tfm_neg(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_abs(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_exp(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_log(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_sqrt(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_rsqrt(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_sin(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_cos(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_tanh(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_sigmoid(tfm_ctx *c, const tfm_tensor *t);
/* Activations; tfm_activation takes a TFM_ACT_*. */
TFM_API tfm_tensor *tfm_relu(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_gelu(tfm_ctx *c, const tfm_tensor *t);        /* exact: x (1 + erf(x / sqrt 2)) / 2 */
TFM_API tfm_tensor *tfm_gelu_tanh(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_gelu_quick(tfm_ctx *c, const tfm_tensor *t);
TFM_API tfm_tensor *tfm_silu(tfm_ctx *c, const tfm_tensor *t);        /* x sigmoid(x) */
TFM_API tfm_tensor *tfm_activation(tfm_ctx *c, const tfm_tensor *t, int activation);
TFM_API tfm_tensor *tfm_pow(tfm_ctx *c, const tfm_tensor *t, float exponent);
TFM_API tfm_tensor *tfm_clamp(tfm_ctx *c, const tfm_tensor *t, float low, float high);  /* into [low, high] */
/* activation(gate) * up in one pass: GLU (SIGMOID), ReGLU, GEGLU, SwiGLU (SILU); Shazeer 2020. Shapes broadcast. */
TFM_API tfm_tensor *tfm_glu(tfm_ctx *c, const tfm_tensor *gate, const tfm_tensor *up, int activation);

/* a relation b as bool, with broadcasting. Any dtype; relation is a TFM_EQ ... TFM_GE. */
enum { TFM_EQ = 0, TFM_NE = 1, TFM_LT = 2, TFM_LE = 3, TFM_GT = 4, TFM_GE = 5 };
TFM_API tfm_tensor *tfm_compare(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b, int relation);
TFM_API tfm_tensor *tfm_compare_scalar(tfm_ctx *c, const tfm_tensor *a, double b, int relation);

/* Reductions over any axes. dims: sizes used as a set of axes, e.g. TFM_SHAPE(-1); tfm_shape_of(0, NULL) = all.
 * keepdim 1: a reduced axis stays as a size of 1. No element: sum 0, mean NaN, logsumexp -inf, max and min an error. */
TFM_API tfm_tensor *tfm_sum(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim);
TFM_API tfm_tensor *tfm_mean(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim);
TFM_API tfm_tensor *tfm_max(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim);
TFM_API tfm_tensor *tfm_min(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim);
TFM_API tfm_tensor *tfm_logsumexp(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim);
TFM_API tfm_tensor *tfm_argmax(tfm_ctx *c, const tfm_tensor *t, int dim, int keepdim);   /* i64; the first of equals */
/* The k largest along the last dim, sorted descending (ties: lower index first): (..., k). indices may be NULL;
 * *indices gets their places (..., k), i64. */
TFM_API tfm_tensor *tfm_topk(tfm_ctx *c, const tfm_tensor *t, int64_t k, tfm_tensor **indices);

/* exp(t) / sum(exp(t)) along dim, and its logarithm, from t - max(t). A slice with only -inf gives zeros, and
 * the logarithm -inf. */
TFM_API tfm_tensor *tfm_softmax(tfm_ctx *c, const tfm_tensor *t, int dim);
TFM_API tfm_tensor *tfm_log_softmax(tfm_ctx *c, const tfm_tensor *t, int dim);

/* a (..., m, k) x b (..., k, n) = (..., m, n), leading dims broadcast; 1-D operands as in torch.matmul. Transposed
 * views are read in place. 2 m n k FLOPs. */
TFM_API tfm_tensor *tfm_matmul(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b);
/* activation(x W^T + b) (..., out): x (..., in), weight (out, in), packed or plain, bias (out) or NULL, activation a
 * TFM_ACT_*. The result has the dtype of x and weight, f32 where they differ; bias may have any float dtype. */
TFM_API tfm_tensor *tfm_linear(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                               int activation);
/* Rows of weight (count, d), packed or plain, by ids (i64 or i32, any shape): (..., d) f32. Ids are checked. */
TFM_API tfm_tensor *tfm_embedding(tfm_ctx *c, const tfm_tensor *weight, const tfm_tensor *ids);

/* Normalisation over the last weight->ndim dims; weight and bias may be NULL: then over `normalized_dims` trailing
 * dims, at least 1. layer_norm: (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016); rms_norm: x /
 * sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). options may be NULL; the results it asks for are f32
 * tensors of the arena (sum: the dtype of the result). */
typedef struct tfm_norm_options {
    float eps;                    /* 0: 1e-5 */
    float weight_offset;          /* 1: Gemma's (1 + w) */
    int normalized_dims;          /* 0: weight->ndim, or 1 */
    const tfm_tensor *residual;   /* added to x first */
    tfm_tensor **sum;             /* gets x + residual */
    tfm_tensor **mean, **rstd;    /* get the statistics, shape with 1 in place of each normalised dim */
} tfm_norm_options;
TFM_API tfm_tensor *tfm_layer_norm(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                                   const tfm_norm_options *options);
TFM_API tfm_tensor *tfm_rms_norm(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight,
                                 const tfm_norm_options *options);
/* Zeroes elements with probability p in [0, 1] and scales the others by 1 / (1 - p), by the context's random numbers.
 * p == 0: x itself, as a view. There is no training switch here: layers call it only when they train. */
TFM_API tfm_tensor *tfm_dropout(tfm_ctx *c, const tfm_tensor *x, float p);

/* Recording (what training will stand on; there is no backward pass yet): results of ops on such a tensor are recorded
 * on the context's tape and inherit the mark. f32, f16, bf16. While the tape is not empty, layers keep their scratch
 * and what it needs cannot be rewound. */
TFM_API TFM_CHECK tfm_status tfm_set_requires_grad(tfm_ctx *c, tfm_tensor *t, int on);
TFM_API int64_t tfm_tape_length(const tfm_ctx *c);               /* records on the tape */
TFM_API void tfm_tape_clear(tfm_ctx *c);                         /* drops the records; their tensors stay, unmarked */

/* ------------------------------------------------------------------------------------------------------------------
 *  Masks
 *
 *  All zero = no mask. What is set is combined: a key is attended when every boolean part allows it; the additive parts
 *  are summed.
 *  Query i of batch row b stands at position p, which causal order, windows, ALiBi and the relative bias count from:
 *      TFM_CAUSAL_NONE, _TOP_LEFT:  p = i
 *      TFM_CAUSAL_BOTTOM_RIGHT:     p = i + (keys of row b) - (queries of row b): the last query sees the last key
 *      TFM_CAUSAL_OFFSET:           p = i + offset, or i + offsets[b]
 *  Order of work on a score: scale, softcap, + (bias, ALiBi, relative bias), boolean parts, sink, softmax.
 *  A row with no key, or only scores of -inf, gives zeros. A key that is not attended never matters, not even NaN or
 *  Inf. Tensors of a mask are read during the call only; their shapes and ranges are checked then.
 * ---------------------------------------------------------------------------------------------------------------- */
enum { TFM_CAUSAL_NONE = 0, TFM_CAUSAL_TOP_LEFT = 1, TFM_CAUSAL_BOTTOM_RIGHT = 2, TFM_CAUSAL_OFFSET = 3 };

typedef struct tfm_mask {
    int causal;                        /* TFM_CAUSAL_*: key j is attended when j <= p */
    int64_t offset;                    /* with TFM_CAUSAL_OFFSET */
    const tfm_tensor *offsets;         /* (B) i64/i32: instead of offset, per batch row */
    /* 0: unbounded; n: keys j > p - n (n keys, p itself among them: Mistral's window n) */
    int64_t window_left;
    int64_t window_right;              /* 0: unbounded; n: keys j < p + n */
    /* keys j < prefix are attended whatever causal and window_right say (prefix LM) */
    int64_t prefix;
    const tfm_tensor *prefixes;        /* (B): instead of prefix, per batch row */
    const tfm_tensor *key_lengths;     /* (B) i64/i32: keys j >= key_lengths[b] are padding */
    const tfm_tensor *query_lengths;   /* (B): queries past it are padding and give zeros */
    const tfm_tensor *query_segments;  /* (B, Lq) and (B, Lk), i64/i32: a query attends keys of its own segment */
    const tfm_tensor *key_segments;
    /* bool, broadcasts to (B, H, Lq, Lk): true = attend (PyTorch's scaled_dot_product_attention) */
    const tfm_tensor *keep;
    const tfm_tensor *ignore;          /* bool: true = do NOT attend (PyTorch's MultiheadAttention) */
    const tfm_tensor *nonzero;         /* any dtype: 0 = do not attend (masked_fill(mask == 0, -inf)) */
    /* f32/f16/bf16, added to the scores: 0 = attend, -inf = not, anything else = a bias */
    const tfm_tensor *bias;
    const tfm_tensor *alibi_slopes;    /* (H): adds -slope * |p - j| (tfm_alibi_slopes makes them) */
    const tfm_tensor *relative_bias;   /* (buckets, H) T5 table: adds table[bucket(j - p)][h] */
    int64_t relative_max_distance;     /* 0: 128; at most 65536 */
    int relative_one_way;              /* 1: T5 decoder's buckets (keys to the right share bucket 0) */
    float softcap;                     /* 0: none; c: score = c tanh(score / c) */
    const tfm_tensor *sinks;           /* (H): exp(sink) joins the denominator, nothing the numerator */
} tfm_mask;

/* Masks with one field set; others may be set afterwards. The tensors are not copied. */
TFM_API tfm_mask tfm_mask_causal(void);                              /* top-left, PyTorch's is_causal */
TFM_API tfm_mask tfm_mask_keep(const tfm_tensor *keep);              /* bool, true = attend */
TFM_API tfm_mask tfm_mask_ignore(const tfm_tensor *ignore);          /* bool, true = do not attend */
TFM_API tfm_mask tfm_mask_nonzero(const tfm_tensor *mask);           /* 0 = do not attend */
TFM_API tfm_mask tfm_mask_additive(const tfm_tensor *bias);          /* 0 / -inf / any bias */
TFM_API tfm_mask tfm_mask_padding(const tfm_tensor *key_lengths);    /* (B): the first key_lengths[b] keys are real */
/* The mask as a matrix to look at: what is added to the scores, f32 (B, H, Lq, Lk), -inf where not attended. Softcap
 * and sinks are no summands and are not in it. mask NULL: zeros. */
TFM_API tfm_tensor *tfm_mask_matrix(tfm_ctx *c, const tfm_mask *mask, int64_t batch, int64_t heads, int64_t queries,
                                    int64_t keys);
/* (H) f32: 2^(-8 (h + 1) / H) for powers of two, else filled up as the paper does (Press et al. 2022) */
TFM_API tfm_tensor *tfm_alibi_slopes(tfm_ctx *c, int64_t heads);
/* The bucket, 0 to buckets - 1, of a key at distance = j - p (T5, Raffel et al. 2020). max_distance 0: 128. */
TFM_API int64_t tfm_relative_bucket(int64_t distance, int64_t buckets, int64_t max_distance, int one_way);

/* ------------------------------------------------------------------------------------------------------------------
 *  Attention:  softmax(scale * Q K^T + mask) V   (Vaswani et al. 2017)
 * ---------------------------------------------------------------------------------------------------------------- */
enum {  /* what tfm_attention_options.weights receives */
    TFM_WEIGHTS_PROBABILITIES = 0,     /* after softmax (and dropout) */
    TFM_WEIGHTS_SCORES = 1,            /* scale * Q K^T */
    TFM_WEIGHTS_CAPPED = 2,            /* after softcap */
    TFM_WEIGHTS_MASKED = 3             /* after bias and boolean parts: what softmax sees */
};
typedef struct tfm_attention_options {
    float scale;                       /* 0: 1 / sqrt(key size) */
    float dropout;                     /* probability, in steps of 1/65536; weights are scaled by 1 / (1 - p) */
    tfm_mask mask;
    /* NULL, or gets (B, H, Lq, Lk) f32: memory grows with Lq Lk then. Asking does not change the result */
    tfm_tensor **weights;
    int weights_stage;                 /* TFM_WEIGHTS_* */
    int weights_average;               /* 1: mean over heads, (B, Lq, Lk) */
} tfm_attention_options;

/* q (B, H, Lq, dk), k (B, Hkv, Lk, dk), v (B, Hkv, Lk, dv), any strides (a (B, L, H, d) projection as a view); H is a
 * multiple of Hkv (grouped-query: query head h uses key head h / (H / Hkv)). Returns (B, H, Lq, dv), laid out (B, Lq,
 * H, dv) in memory so that tfm_combine_heads is a view. options NULL = no mask. Memory beyond the result does not
 * depend on Lq or Lk (online softmax by tiles: Milakov and Gimelshein 2018, Dao et al. 2022). dk and dv up to 65536. 2
 * B H Lq Lk (dk + dv) FLOPs, less what the mask leaves out by whole tiles. */
TFM_API tfm_tensor *tfm_attention(tfm_ctx *c, const tfm_tensor *q, const tfm_tensor *k, const tfm_tensor *v,
                                  const tfm_attention_options *options);

/* Weighted attention over a sequence: w = softmax over L of (x weight^T + bias), padding excluded; x (B, L, d),
 * weight (1, d), bias (1) or NULL, key_lengths (B) or NULL. tfm_weighted_sequence: (B, L, d), x_l * w_l.
 * tfm_weighted_pool: (B, d), the sum of these. weights may be NULL; *weights gets (B, L). */
TFM_API tfm_tensor *tfm_weighted_sequence(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight,
                                          const tfm_tensor *bias,
                                          const tfm_tensor *key_lengths, tfm_tensor **weights);
TFM_API tfm_tensor *tfm_weighted_pool(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                                      const tfm_tensor *key_lengths, tfm_tensor **weights);

/* Heat maps of a (rows, columns) tensor of at most 2048 x 2048; tfm_select takes one batch row and head out of
 * attention weights. Labels: arrays of as many UTF-8 strings as there are rows or columns, or NULL. The text, an SVG
 * document or lines for a terminal, lives in the arena; options may be NULL. */
typedef struct tfm_heatmap_options {
    int color;                         /* terminal: 0 plain shading characters, 1 ANSI 256 colours */
    const char *title;
    const char *const *row_labels;
    const char *const *column_labels;
} tfm_heatmap_options;
TFM_API const char *tfm_heatmap_svg(tfm_ctx *c, const tfm_tensor *weights, const tfm_heatmap_options *options);
TFM_API const char *tfm_heatmap_text(tfm_ctx *c, const tfm_tensor *weights, const tfm_heatmap_options *options);

/* ------------------------------------------------------------------------------------------------------------------
 *  Key/value cache: per layer, batch row and key/value head K in panels [key/64][dk][64], V [key/128][dv/64][128][64]:
 *  what one query reads is one stream of memory. All its memory is taken by create, keys and values in one block. One
 *  thread at a time.
 * ---------------------------------------------------------------------------------------------------------------- */
typedef struct tfm_cache_options {
    int dtype;                         /* TFM_F32, TFM_F16 or TFM_BF16 */
    int64_t layers;                    /* 0: 1 */
    int64_t batch;                     /* 0: 1 */
    int64_t heads, key_size;           /* key/value heads */
    int64_t value_size;                /* 0: key_size */
    int64_t capacity;                  /* positions per batch row */
} tfm_cache_options;
/* An empty cache from the context's allocator; it outlives the context and belongs to the caller. */
TFM_API tfm_cache *tfm_cache_create(tfm_ctx *c, const tfm_cache_options *options);
TFM_API void tfm_cache_destroy(tfm_cache *cache);
TFM_API int64_t tfm_cache_memory(const tfm_cache_options *options);    /* bytes that create would take; -1: invalid */
/* Puts keys and values behind what layer holds, converted to its dtype: k (B, Hkv, L, dk), v (B, Hkv, L, dv). counts
 * (B) i64/i32 or NULL: how many of the L are real in each row (ragged batch). Full is an error that changes nothing. */
TFM_API TFM_CHECK tfm_status tfm_cache_append(tfm_ctx *c, tfm_cache *cache, int64_t layer, const tfm_tensor *k,
                                              const tfm_tensor *v, const tfm_tensor *counts);
/* tfm_attention over what the cache holds of `layer`: q (B, H, Lq, dk), the result (B, H, Lq, dv). Positions: query i
 * of row b stands at (start of the last append to this layer and row) + i; mask.causal TFM_CAUSAL_BOTTOM_RIGHT means
 * just that, and then queries past a row's count give zeros (otherwise pass query_lengths). key_lengths default to the
 * cache's. */
TFM_API tfm_tensor *tfm_attention_cached(tfm_ctx *c, const tfm_tensor *q, const tfm_cache *cache, int64_t layer,
                                         const tfm_attention_options *options);
TFM_API int64_t tfm_cache_length(const tfm_cache *cache, int64_t layer, int64_t row);  /* -1: no such layer or row */
TFM_API int64_t tfm_cache_capacity(const tfm_cache *cache);
/* Shortens to at most `length` positions, in all layers; row -1: all rows. */
TFM_API TFM_CHECK tfm_status tfm_cache_truncate(tfm_ctx *c, tfm_cache *cache, int64_t row, int64_t length);
TFM_API void tfm_cache_reset(tfm_cache *cache);                /* empties it; the memory stays */
/* Drops the `count` oldest positions of all rows and layers; what is kept moves, which costs a copy. Keys keep the
 * rotary angles they were stored with. */
TFM_API TFM_CHECK tfm_status tfm_cache_slide(tfm_ctx *c, tfm_cache *cache, int64_t count);
/* Row i becomes old row rows[i], in all layers; rows may repeat (beam search); count = batch. */
TFM_API TFM_CHECK tfm_status tfm_cache_reorder(tfm_ctx *c, tfm_cache *cache, const int64_t *rows, int64_t count);
/* A new cache of `count` rows, each a copy of row rows[i]; belongs to the caller. */
TFM_API tfm_cache *tfm_cache_fork(tfm_ctx *c, const tfm_cache *cache, const int64_t *rows, int64_t count);
/* The cache as bytes, to go on from another day: save writes tfm_cache_saved_size bytes (-1: NULL) to the caller's
 * buffer of `size`; load makes a new cache of the same options from them, for the caller to destroy. A buffer that is
 * damaged gives TFM_FORMAT. */
TFM_API int64_t tfm_cache_saved_size(const tfm_cache *cache);
TFM_API TFM_CHECK tfm_status tfm_cache_save(tfm_ctx *c, const tfm_cache *cache, void *buffer, int64_t size);
TFM_API tfm_cache *tfm_cache_load(tfm_ctx *c, const void *buffer, int64_t size);

/* ------------------------------------------------------------------------------------------------------------------
 *  Parameters: a state_dict
 *
 *  Any number of contexts and threads may read a store; what adds, loads, packs, converts or writes needs it alone. The
 *  tensors that these functions return are the store's: they live as long as it does and are of no context. They are
 *  read-only but for tfm_params_write_begin / _end.
 * ---------------------------------------------------------------------------------------------------------------- */
/* An empty store. Takes its memory from the context's allocator, outlives the context, belongs to the caller. */
TFM_API tfm_params *tfm_params_create(tfm_ctx *c);
TFM_API void tfm_params_destroy(tfm_params *p);                /* after everything that uses its tensors */
/* A new zeroed parameter. A name that exists already is returned when dtype and shape agree, else an error: a
 * layer's init therefore binds to parameters that were loaded before it. */
TFM_API tfm_tensor *tfm_params_add(tfm_ctx *c, tfm_params *p, const char *name, int dtype, tfm_shape shape);
/* Memory of the caller (flash, a mapped file, an array in the program; aligned to the element) as a parameter, no
 * copy. It must outlive p. */
TFM_API tfm_tensor *tfm_params_wrap(tfm_ctx *c, tfm_params *p, const char *name, int dtype, tfm_shape shape,
                                    const void *data);
/* By name, or by index in the order in which they were added; NULL: there is none. These set no error. */
TFM_API tfm_tensor *tfm_params_find(const tfm_params *p, const char *name);
TFM_API int64_t tfm_params_count(const tfm_params *p);
TFM_API const char *tfm_params_name(const tfm_params *p, int64_t index);
TFM_API tfm_tensor *tfm_params_at(const tfm_params *p, int64_t index);
TFM_API int64_t tfm_params_bytes(const tfm_params *p);         /* bytes of all elements, wrapped and mapped ones too */
/* 1: an init that meets a name which is not there fails instead of making it (after loading a trained model). Only
 * "alibi_slopes", which are constants, are made all the same. */
TFM_API void tfm_params_strict(tfm_params *p, int on);
/* Packs the weight matrices that layers marked for tfm_linear into panels, in place of the plain form: call it after
 * the inits. Same bits, faster. Their `data` is NULL then and views of them dangle; tfm_linear, tfm_embedding, tfm_get
 * and copies (tfm_clone, tfm_read, ...) still read them, tfm_params_write_begin gives the plain form back. A matrix
 * stays plain where padding to 16 rows would cost more than 10 % and 4 KiB, or where it requires gradients. Wrapped
 * memory is copied. What is packed for the first time shares blocks of up to 32 MB (memory_limit allowing), which go
 * back with the last one in them. Writers and readers of other threads must be done. */
TFM_API TFM_CHECK tfm_status tfm_params_prepare(tfm_ctx *c, tfm_params *p);
/* Brackets a write to a parameter: begin gives the plain tensor (unpacked when it was packed, copied when it was
 * wrapped), end allows packing again. Views made before dangle when the memory changed. */
TFM_API tfm_tensor *tfm_params_write_begin(tfm_ctx *c, tfm_params *p, const char *name);
TFM_API TFM_CHECK tfm_status tfm_params_write_end(tfm_ctx *c, tfm_params *p, const char *name);
/* Converts the parameters of two and more dims to f16, bf16 or f32; vectors keep their dtype. Packed ones stay packed.
 * Views of them dangle. */
TFM_API TFM_CHECK tfm_status tfm_params_cast(tfm_ctx *c, tfm_params *p, int dtype);

/* ------------------------------------------------------------------------------------------------------------------
 *  Layers. A layer is a plain struct of parameters: init registers them in a store under prefix + PyTorch's names ("" =
 *  no prefix; "encoder" gives "encoder.layers.0...."), initialised as PyTorch initialises them; forward uses them. The
 *  struct may be copied; the store must outlive it. A name that the store has already is bound, not filled: load first
 *  or afterwards, as you like. An init that fails may leave some of its parameters in the store. A forward changes
 *  neither layer nor store, so threads with a context each may share both. x is f32, f16 or bf16.
 * ---------------------------------------------------------------------------------------------------------------- */
/* nn.Linear: activation(x weight^T + bias), x (..., in), result (..., out). Init: U(-1/sqrt(in), 1/sqrt(in)) for both,
 * activation none; set the field for another. bias 0: none. */
typedef struct tfm_linear_layer { int activation; tfm_tensor *weight, *bias; } tfm_linear_layer;
TFM_API TFM_CHECK tfm_status tfm_linear_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t in, int64_t out,
                                             int bias, tfm_linear_layer *layer);
TFM_API tfm_tensor *tfm_linear_forward(tfm_ctx *c, const tfm_linear_layer *layer, const tfm_tensor *x);

/* nn.Embedding: scale times the rows of weight (count, d_model) by ids (i64 or i32, any shape). Init: N(0, 1). */
typedef struct tfm_embedding_layer { float scale; /* 0: 1 */ tfm_tensor *weight; } tfm_embedding_layer;
TFM_API TFM_CHECK tfm_status tfm_embedding_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t count,
                                                int64_t d_model, tfm_embedding_layer *layer);
/* (..., d) */
TFM_API tfm_tensor *tfm_embedding_forward(tfm_ctx *c, const tfm_embedding_layer *layer, const tfm_tensor *ids);
/* Tied output: x (..., d) times weight^T, without scale: (..., count). */
TFM_API tfm_tensor *tfm_embedding_logits(tfm_ctx *c, const tfm_embedding_layer *layer, const tfm_tensor *x);

enum { TFM_LAYER_NORM = 0, TFM_RMS_NORM = 1 };
/* nn.LayerNorm and nn.RMSNorm over the last dim of x, whose shape the result has; eps 0: 1e-5. Init: ones (zeros with
 * weight_offset 1) and zeros; an RMS norm has no bias. */
typedef struct tfm_norm_layer { int kind; float eps, weight_offset; tfm_tensor *weight, *bias; } tfm_norm_layer;
TFM_API TFM_CHECK tfm_status tfm_norm_init(tfm_ctx *c, tfm_params *p, const char *prefix, int kind, int64_t d_model,
                                           int bias, float eps, tfm_norm_layer *layer);
TFM_API tfm_tensor *tfm_norm_forward(tfm_ctx *c, const tfm_norm_layer *layer, const tfm_tensor *x);

/* Positions. */
enum {
    TFM_POSITION_NONE = 0, TFM_POSITION_SINUSOIDAL = 1 /* interleaved sin, cos: the paper */,
    TFM_POSITION_SINUSOIDAL_HALVES = 2 /* sin | cos */,
    TFM_POSITION_LEARNED = 3, TFM_POSITION_ROTARY = 4, TFM_POSITION_ALIBI = 5, TFM_POSITION_RELATIVE = 6 /* T5 */
};
/* (length, d) f32 for positions start .. start + length - 1 (Vaswani et al. 2017). TFM_POSITION_SINUSOIDAL: sin(p /
 * 10000^(2i/d)) at 2i, cos at 2i+1 (odd d: the last column is a sine). _HALVES: timescales exp(-i log(10000) / (d/2 -
 * 1)), sines then cosines (Tensor2Tensor; odd d: a zero column). */
TFM_API tfm_tensor *tfm_sinusoidal(tfm_ctx *c, int kind, int64_t start, int64_t length, int64_t d_model);

enum { TFM_ROPE_PLAIN = 0, TFM_ROPE_LINEAR = 1, TFM_ROPE_NTK = 2, TFM_ROPE_YARN = 3, TFM_ROPE_LLAMA3 = 4 };
typedef struct tfm_rope {
    int interleaved;                   /* 0: pairs (i, i + n/2); 1: pairs (2i, 2i + 1) */
    int scaling;                       /* TFM_ROPE_* */
    int64_t dims;                      /* rotated leading dims of a head; 0: all */
    float base;                        /* 0: 10000 */
    float factor;                      /* context stretch of the scalings; 0: 1 */
    int64_t original_length;           /* length the model was trained at (NTK, YaRN, Llama-3) */
    float low_frequency, high_frequency;  /* Llama-3: 0 = 1 and 4 */
    float beta_fast, beta_slow;        /* YaRN: 0 = 32 and 1 */
    float attention_factor;            /* YaRN: 0 = 0.1 ln(factor) + 1 */
} tfm_rope;
/* x (B, H, L, d): rotates pairs by their angle at position start + l, or positions[b][l] ((L) or (B, L), i64/i32; NULL:
 * start) (RoPE, Su et al. 2021; angles in double). rope NULL: plain. */
TFM_API tfm_tensor *tfm_rotary(tfm_ctx *c, const tfm_tensor *x, const tfm_rope *rope, int64_t start,
                               const tfm_tensor *positions);
/* The tables that tfm_rotary uses: *cosine and *sine (length, dims / 2) f32 for positions start ..., in the arena; each
 * pointer may be NULL. NTK: "NTK-aware" base; YaRN: Peng et al. 2023; Llama-3: as HF Transformers has it. */
TFM_API TFM_CHECK tfm_status tfm_rotary_tables(tfm_ctx *c, const tfm_rope *rope, int64_t head_size, int64_t start,
                                               int64_t length, tfm_tensor **cosine, tfm_tensor **sine);
/* With tables of the caller, contiguous f32: cosine, sine (rows, dims / 2) with positions (B, L) or (L) that name rows,
 * or NULL for rows 0 to L - 1; or (B, L, dims / 2) without. Dims behind `dims` stay as they are. */
TFM_API tfm_tensor *tfm_rotary_apply(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *cosine,
                                     const tfm_tensor *sine, const tfm_tensor *positions, int interleaved);

/* linear2(activation(linear1 x)), or gated: linear2(activation(linear_gate x) * linear1 x); x and result (...,
 * d_model). tfm_feed_forward_forward never drops out: `dropout` is for blocks, which know whether they train. */
typedef struct tfm_feed_forward {
    int activation, gated;
    float dropout;
    tfm_linear_layer linear1, linear2, gate;
} tfm_feed_forward;
typedef struct tfm_feed_forward_config {
    int activation;                    /* 0: ReLU */
    int gated, no_bias;
    int64_t d_model, d_ff;
    float dropout;                     /* in [0, 1), while training */
} tfm_feed_forward_config;
TFM_API TFM_CHECK tfm_status tfm_feed_forward_init(tfm_ctx *c, tfm_params *p, const char *prefix,
                                                   const tfm_feed_forward_config *config, tfm_feed_forward *layer);
TFM_API tfm_tensor *tfm_feed_forward_forward(tfm_ctx *c, const tfm_feed_forward *layer, const tfm_tensor *x);

/* nn.MultiheadAttention with batch_first, plus grouped key/value heads (Ainslie et al. 2023), rotary positions and a
 * cache. Init: Xavier uniform for the input projections, zero biases, out_proj's weight as nn.Linear's. */
typedef struct tfm_mha_config {
    int no_bias;                       /* of the input projections and of out_proj */
    /* 1: q_proj_weight, k_proj_weight, v_proj_weight (forced when kdim or vdim differ) instead of in_proj_weight */
    int separate;
    int64_t d_model, heads;
    int64_t kv_heads;                  /* 0: heads */
    int64_t head_size;                 /* 0: d_model / heads */
    int64_t kdim, vdim;                /* 0: d_model */
    float dropout;                     /* in [0, 1), on the weights, while training */
    int no_out_bias;
    int rotary;                        /* 1: rope is applied to queries and keys */
    tfm_rope rope;
} tfm_mha_config;
typedef struct tfm_mha {
    tfm_mha_config config;
    tfm_tensor *in_proj_weight, *in_proj_bias;                  /* ((H + 2 Hkv) d, d_model) */
    tfm_tensor *q_proj_weight, *k_proj_weight, *v_proj_weight;
    tfm_linear_layer out_proj;
} tfm_mha;
typedef struct tfm_mha_options {
    int training;                      /* 1: dropout is on */
    int need_weights;                  /* 1: *weights gets (B, Lq, Lk), the mean over heads; 2: (B, H, Lq, Lk) */
    tfm_mask mask;
    tfm_tensor **weights;
    /* self-attention: k and v of x are appended to `layer`, then all are attended. mask.causal TFM_CAUSAL_TOP_LEFT
     * means TFM_CAUSAL_BOTTOM_RIGHT then: the queries stand behind what is held */
    tfm_cache *cache;
    int64_t layer;
    const tfm_tensor *counts;          /* (B) real positions of x per row (ragged batch), with a cache */
    int64_t position;                  /* rotary: position of the first query when there is no cache */
    /* cross-attention: keys and values that tfm_mha_memory put there; key and value are NULL then */
    const tfm_cache *memory;
} tfm_mha_options;
TFM_API TFM_CHECK tfm_status tfm_mha_init(tfm_ctx *c, tfm_params *p, const char *prefix, const tfm_mha_config *config,
                                          tfm_mha *layer);
/* query (B, Lq, d_model), key (B, Lk, kdim), value (B, Lk, vdim): (B, Lq, d_model). Self-attention: the same tensor
 * three times. options NULL: no mask. When a call fails after it appended to a cache, the positions stay there. */
TFM_API tfm_tensor *tfm_mha_forward(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *query, const tfm_tensor *key,
                                    const tfm_tensor *value, const tfm_mha_options *options);
/* Projects an encoder's output once, for all decoding steps: appends its keys and values to layer `index` of memory, a
 * cache of kv_heads heads of head_size. counts (B) or NULL: how many are real in each row. */
TFM_API TFM_CHECK tfm_status tfm_mha_memory(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *key,
                                            const tfm_tensor *value, tfm_cache *memory, int64_t index,
                                            const tfm_tensor *counts);

typedef struct tfm_block_config {      /* one encoder or decoder layer; zero = nn.TransformerEncoderLayer's defaults */
    int norm_first;                    /* 0: post-norm (the paper), 1: pre-norm */
    int norm;                          /* TFM_LAYER_NORM, TFM_RMS_NORM */
    int activation;                    /* 0: ReLU */
    int gated;
    int no_bias;
    float norm_eps;                    /* 0: 1e-5 */
    float norm_weight_offset;
    float dropout;                     /* while training */
    int64_t d_model, heads, kv_heads, head_size;
    int64_t d_ff;                      /* 0: 2048 */
    int rotary;                        /* of self-attention */
    tfm_rope rope;
} tfm_block_config;
typedef struct tfm_encoder_layer {
    tfm_block_config config;
    tfm_mha self_attn;
    tfm_feed_forward feed_forward;
    tfm_norm_layer norm1, norm2;
} tfm_encoder_layer;
typedef struct tfm_decoder_layer {
    tfm_block_config config;
    tfm_mha self_attn, multihead_attn;
    tfm_feed_forward feed_forward;
    tfm_norm_layer norm1, norm2, norm3;
} tfm_decoder_layer;
typedef struct tfm_stack_options {
    int training;
    tfm_mask mask;                     /* of self-attention (src_mask + src_key_padding_mask, or tgt_...) */
    tfm_mask memory_mask;              /* decoder: of cross-attention */
    /* decoder: cross-attention weights of the last layer; encoder: self-attention's; (B, H, Lq, Lk) */
    tfm_tensor **weights;
    tfm_cache *cache;                  /* self-attention cache, one layer of it per layer of the stack */
    const tfm_cache *memory_cache;     /* decoder: what tfm_decoder_memory made; memory is NULL then */
    const tfm_tensor *counts;
    int64_t position;                  /* position of the first token when there is no cache */
} tfm_stack_options;
/* One layer. Encoder: x (B, L, d_model), the result has its shape. Decoder: x (B, Lt, d_model), memory (B, Ls,
 * d_model), or NULL with memory_cache; the result has x's shape. options NULL: no mask, not training. Post-norm is
 * norm1(x + attention(x)), then norm2(x + feed_forward(x)); pre-norm adds to x what works on norm(x). */
TFM_API TFM_CHECK tfm_status tfm_encoder_layer_init(tfm_ctx *c, tfm_params *p, const char *prefix,
                                                    const tfm_block_config *config, tfm_encoder_layer *layer);
TFM_API tfm_tensor *tfm_encoder_layer_forward(tfm_ctx *c, const tfm_encoder_layer *layer, const tfm_tensor *x,
                                              const tfm_stack_options *options);
TFM_API TFM_CHECK tfm_status tfm_decoder_layer_init(tfm_ctx *c, tfm_params *p, const char *prefix,
                                                    const tfm_block_config *config, tfm_decoder_layer *layer);
TFM_API tfm_tensor *tfm_decoder_layer_forward(tfm_ctx *c, const tfm_decoder_layer *layer, const tfm_tensor *x,
                                              const tfm_tensor *memory, const tfm_stack_options *options);

/* Stacks of `count` layers and, with final_norm 1, a norm behind them. `layers` is memory of the parameter store, which
 * the struct shares when it is copied. A decoder-only model is an encoder stack with a causal mask. Shapes and options
 * are those of the layers. tfm_decoder_memory fills a memory_cache (one layer of it per layer of the stack) from the
 * encoder's output memory (B, Ls, d_model); counts (B) or NULL: how many are real. */
typedef struct tfm_encoder {
    int64_t count;
    tfm_encoder_layer *layers;
    tfm_norm_layer norm;               /* weight NULL: none */
} tfm_encoder;
typedef struct tfm_decoder { int64_t count; tfm_decoder_layer *layers; tfm_norm_layer norm; } tfm_decoder;
TFM_API TFM_CHECK tfm_status tfm_encoder_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t layers,
                                              const tfm_block_config *config, int final_norm, tfm_encoder *stack);
TFM_API tfm_tensor *tfm_encoder_forward(tfm_ctx *c, const tfm_encoder *stack, const tfm_tensor *x,
                                        const tfm_stack_options *options);
TFM_API TFM_CHECK tfm_status tfm_decoder_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t layers,
                                              const tfm_block_config *config, int final_norm, tfm_decoder *stack);
TFM_API tfm_tensor *tfm_decoder_forward(tfm_ctx *c, const tfm_decoder *stack, const tfm_tensor *x,
                                        const tfm_tensor *memory, const tfm_stack_options *options);
TFM_API TFM_CHECK tfm_status tfm_decoder_memory(tfm_ctx *c, const tfm_decoder *stack, const tfm_tensor *memory,
                                                tfm_cache *cache, const tfm_tensor *counts);

/* ------------------------------------------------------------------------------------------------------------------
 *  The whole Transformer: nn.Transformer and what it leaves out (Vaswani et al. 2017)
 * ---------------------------------------------------------------------------------------------------------------- */
enum { TFM_ENCODER_DECODER = 0, TFM_ENCODER_ONLY = 1, TFM_DECODER_ONLY = 2 };
enum { TFM_OUTPUT_LOGITS = 0, TFM_OUTPUT_SOFTMAX = 1, TFM_OUTPUT_LOG_SOFTMAX = 2, TFM_OUTPUT_HIDDEN = 3 };

typedef struct tfm_transformer_config {
    int kind;                          /* TFM_ENCODER_DECODER, ... */
    int position;                      /* TFM_POSITION_* */
    int64_t encoder_layers, decoder_layers; /* 0: 6 (of those that kind has) */
    int no_final_norm;                 /* nn.Transformer has a final norm after each stack */
    tfm_block_config block;            /* d_model 0: 512, heads 0: 8 */
    int64_t source_vocab;              /* 0: no embedding, input is (B, L, d_model) or features */
    int64_t target_vocab;              /* 0: source_vocab for decoder-only, else none. Size of the output head too */
    int64_t source_features;           /* > 0: a linear layer maps (B, L, features) to d_model */
    int64_t target_features;
    int64_t outputs;                   /* size of the head when it is not target_vocab; 0: target_vocab */
    int no_head;
    int tied_head;                     /* head = target embedding, transposed */
    int head_bias;                     /* 1: the head has a bias */
    int shared_embedding;              /* one table for source and target */
    int scale_embedding;               /* 1: times sqrt(d_model), as in the paper */
    int64_t max_length;                /* of learned positions, and of a session by default; 0: 512 */
    int64_t position_start;            /* position number of the first token (0, or 1 for Tensor2Tensor's models) */
    int64_t relative_buckets, relative_max_distance;  /* 0: 32 and 128 */
} tfm_transformer_config;

typedef struct tfm_transformer {
    tfm_transformer_config config;
    tfm_embedding_layer source_embedding, target_embedding;    /* "src_embedding", "tgt_embedding" */
    tfm_linear_layer source_projection, target_projection;     /* "src_projection", "tgt_projection" */
    /* learned: "src_position.weight", "tgt_position.weight" */
    tfm_tensor *source_positions, *target_positions;
    /* T5 tables: "encoder.relative_bias", "decoder.relative_bias" */
    tfm_tensor *encoder_bias, *decoder_bias;
    tfm_tensor *alibi;                                         /* slopes, in the store: "alibi_slopes" */
    /* "encoder.layers.0...."; of a decoder-only model "decoder.layers.0...." */
    tfm_encoder encoder;
    tfm_decoder decoder;
    tfm_linear_layer generator;                                /* "generator" */
} tfm_transformer;

/* Fills *model, with the defaults of config written out in model->config. Initialised as nn.Transformer is: Xavier
 * uniform in the stacks, the head as nn.Linear, embeddings N(0, 1), but N(0, 1/d_model) where they are scaled or tied;
 * learned positions and T5 tables N(0, 0.02^2). */
TFM_API TFM_CHECK tfm_status tfm_transformer_init(tfm_ctx *c, tfm_params *p, const char *prefix,
                                                  const tfm_transformer_config *config, tfm_transformer *model);

typedef struct tfm_transformer_options {
    int training;
    int output;                        /* TFM_OUTPUT_*: over the vocabulary axis */
    /* target_mask: top-left causal when its `causal` is 0, unless not_causal. memory_mask without key_lengths takes
     * those of source_mask: what is padding for the encoder is padding for the decoder */
    tfm_mask source_mask, target_mask, memory_mask;
    int not_causal;
    /* NULL, or gets cross-attention (or self-attention) weights of the last layer, (B, H, Lq, Lk). Those of another
     * layer: call the layers one by one, or tfm_mha_forward */
    tfm_tensor **weights;
} tfm_transformer_options;
/* source, target: ids (B, L) i64/i32, or (B, L, features) f32. Encoder-only: target NULL. Decoder-only: source NULL.
 * Returns (B, L, outputs); without a head (B, L, d_model). options NULL: causal target, logits. The whole sequence is
 * computed each time: to generate, use a session. */
TFM_API tfm_tensor *tfm_transformer_forward(tfm_ctx *c, const tfm_transformer *model, const tfm_tensor *source,
                                            const tfm_tensor *target, const tfm_transformer_options *options);
/* The two halves of forward. encode: source to memory (B, Ls, d_model), which is an encoder-only model's output before
 * its head. decode: target and memory (NULL: decoder-only) to what forward returns. */
TFM_API tfm_tensor *tfm_transformer_encode(tfm_ctx *c, const tfm_transformer *model, const tfm_tensor *source,
                                           const tfm_transformer_options *options);
TFM_API tfm_tensor *tfm_transformer_decode(tfm_ctx *c, const tfm_transformer *model, const tfm_tensor *target,
                                           const tfm_tensor *memory, const tfm_transformer_options *options);

typedef struct tfm_transformer_memory {
    int64_t weights;                   /* bytes of the parameters of this model */
    int64_t cache;                     /* key/value caches for batch x length */
    /* peak of the arena in a forward of batch x length (in generation: of a prompt of length) */
    int64_t scratch;
    int64_t threads;                   /* per-thread scratch of the context */
} tfm_transformer_memory;
/* What a model of this configuration needs, without building it: only names and small structs are allocated. weights
 * are those of f32 parameters after tfm_params_prepare, cache counts f32 entries. The length of a side that kind lacks
 * is not looked at. Not inside tfm_measure_begin / _end. */
TFM_API TFM_CHECK tfm_status tfm_transformer_measure(tfm_ctx *c, const tfm_transformer_config *config, int64_t batch,
                                                     int64_t source_length, int64_t target_length,
                                                     tfm_transformer_memory *out);

/* Heads on an encoder's output x (B, L, d). */
enum { TFM_POOL_MEAN = 0, TFM_POOL_FIRST = 1, TFM_POOL_LAST = 2, TFM_POOL_MAX = 3 };
/* (B, d): mean, first, last or maximum over the real positions; lengths (B) i64/i32 or NULL for all. A row of length 0
 * gives zeros. */
TFM_API tfm_tensor *tfm_pool(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *lengths, int pooling);
/* x / max(|x|, 1e-12) over the last dim. */
TFM_API tfm_tensor *tfm_l2_normalize(tfm_ctx *c, const tfm_tensor *x);
/* A linear layer on the pooled sequence, or with tokens 1 on each position (tagging; lengths are not looked at). */
typedef struct tfm_classifier { int pooling; int tokens; tfm_linear_layer linear; } tfm_classifier;
TFM_API TFM_CHECK tfm_status tfm_classifier_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t d_model,
                                                 int64_t classes, int pooling, int tokens, tfm_classifier *head);
/* logits (B, classes) or (B, L, classes) */
TFM_API tfm_tensor *tfm_classifier_forward(tfm_ctx *c, const tfm_classifier *head, const tfm_tensor *x,
                                           const tfm_tensor *lengths);

#if !defined(TFM_NO_GENERATION)
/* ------------------------------------------------------------------------------------------------------------------
 *  Generation
 * ---------------------------------------------------------------------------------------------------------------- */
/* A session holds the caches of `batch` rows of one model. Feeding a prompt whole, in chunks or token by token,
 * alone or in a batch, gives the same bits. It copies the tfm_transformer struct; the parameters must outlive it. One
 * thread at a time. */
typedef struct tfm_session_options {
    int cache_dtype;                   /* TFM_F32, TFM_F16, TFM_BF16 */
    int64_t batch;                     /* 0: 1 */
    int64_t capacity;                  /* positions per row; 0: the model's max_length */
    int64_t source_capacity;           /* encoder-decoder: source positions per row; 0: capacity */
} tfm_session_options;
/* All memory of the caches is taken here. options NULL: one row, f32, the model's max_length. Not for encoder-only
 * models. Belongs to the caller and outlives the context. */
TFM_API tfm_session *tfm_session_create(tfm_ctx *c, const tfm_transformer *model, const tfm_session_options *options);
TFM_API void tfm_session_destroy(tfm_session *s);
TFM_API void tfm_session_reset(tfm_session *s);              /* empty again, the encoded source is forgotten too */
/* Encoder-decoder: resets the session, encodes source (batch, Ls) ids (or features) with lengths (batch) or NULL, and
 * keeps the keys and values. */
TFM_API TFM_CHECK tfm_status tfm_session_encode(tfm_ctx *c, tfm_session *s, const tfm_tensor *source,
                                                const tfm_tensor *lengths);
/* Feeds ids (batch, L); counts (batch) or NULL: how many are real in each row. Returns the logits after each row's
 * last id, (batch, vocab). A row with count 0 gives zeros. */
TFM_API tfm_tensor *tfm_session_feed(tfm_ctx *c, tfm_session *s, const tfm_tensor *ids, const tfm_tensor *counts);
/* The logits after every id, (batch, L, vocab): to score a text. */
TFM_API tfm_tensor *tfm_session_feed_all(tfm_ctx *c, tfm_session *s, const tfm_tensor *ids, const tfm_tensor *counts);
TFM_API int64_t tfm_session_length(const tfm_session *s, int64_t row);   /* positions held; 0: no such row */
/* As tfm_cache_truncate, _reorder (the source's rows move too) and _fork. */
TFM_API TFM_CHECK tfm_status tfm_session_truncate(tfm_ctx *c, tfm_session *s, int64_t row, int64_t length);
TFM_API TFM_CHECK tfm_status tfm_session_reorder(tfm_ctx *c, tfm_session *s, const int64_t *rows, int64_t count);
TFM_API tfm_session *tfm_session_fork(tfm_ctx *c, const tfm_session *s, const int64_t *rows, int64_t count);

/* How the next id is chosen. The order is: bias and bans, penalties, the logits callback, temperature, top-k, top-p,
 * min-p, draw. */
typedef struct tfm_sampling {
    float temperature;                 /* 0: greedy (argmax, first of equals) */
    int64_t top_k;                     /* 0: off */
    float top_p;                       /* 0 or 1: off */
    float min_p;                       /* 0: off */
    float repetition_penalty;          /* 0 or 1: off; logit > 0 is divided, < 0 multiplied (CTRL) */
    float frequency_penalty, presence_penalty;
    int64_t penalty_window;            /* last ids that penalties look at; 0: all, the prompt among them */
    const int64_t *bias_ids; const float *bias; int64_t bias_count;
    const int64_t *banned; int64_t banned_count;
    /* a row's draws depend on seed, its position, and how many rows before it have the same prompt, only */
    uint64_t seed;
    void (*logits)(void *user, int64_t row, float *logits, int64_t vocab);  /* may change them */
    void *user;
} tfm_sampling;
/* Chooses from logits (vocab) f32 given the `count` ids before (for the penalties); stream and step number the random
 * draw. sampling NULL: greedy. *log_probability (may be NULL) is that of the chosen id under softmax of the unmodified
 * logits. */
TFM_API TFM_CHECK tfm_status tfm_sample(tfm_ctx *c, const tfm_tensor *logits, const tfm_sampling *sampling,
                                        const int64_t *ids, int64_t count,
                                        uint64_t stream, uint64_t step, int64_t *id, float *log_probability);

/* encoder-decoder: the decoder's start ids */
typedef struct tfm_prompt { int64_t count; const int64_t *ids; } tfm_prompt;
enum { TFM_STOP_LENGTH = 0, TFM_STOP_ID = 1, TFM_STOP_STRING = 2, TFM_STOP_CALLBACK = 3, TFM_STOP_CAPACITY = 4 };
typedef struct tfm_sequence {          /* memory of the arena */
    int reason;                        /* TFM_STOP_* */
    int64_t count;                     /* generated ids, a stop id among them */
    int64_t *ids;
    float *log_probabilities;
    double score;                      /* sum of log-probabilities; of a beam: divided by the length penalty */
    int64_t text_length;               /* with text: bytes of the generated text before a stop string */
    char *text;                        /* NULL without a text callback */
} tfm_sequence;
/* Text of `id` after `previous` (-1: none): bytes and their number (streaming and stop strings). tfm_tokenizer_piece
 * is one. */
typedef const char *(*tfm_piece_fn)(const void *user, int64_t previous, int64_t id, int64_t *length);

typedef struct tfm_generate_options {
    int64_t max_new;                   /* 0: until the session is full */
    tfm_sampling sampling;
    const int64_t *stop_ids; int64_t stop_id_count;
    const char *const *stop_strings; int64_t stop_string_count;  /* found across id borders; needs piece */
    tfm_piece_fn piece; const void *piece_user;
    /* Each new id with its text (held back while it may be the start of a stop string); non-zero ends that row. */
    int (*on_token)(void *user, int64_t row, int64_t id, float log_probability, const char *text, int64_t text_length);
    void *user;
    int64_t prompt_chunk;              /* ids of a prompt fed at once; 0: all. Same bits */
} tfm_generate_options;
/* Feeds each row its prompt (1 id or more) behind what the session holds, then id after id until each row has a reason
 * to stop. prompts and out have `count` entries, as many as the session has rows. Each row has the bits of running
 * alone. options NULL: greedy, until the session is full. The last id of a row is chosen but not fed, so a session can
 * go on with it; tfm_session_reset begins anew. After an error, out holds what was there. */
TFM_API TFM_CHECK tfm_status tfm_generate(tfm_ctx *c, tfm_session *s, const tfm_prompt *prompts, int64_t count,
                                          const tfm_generate_options *options, tfm_sequence *out);

enum { TFM_LENGTH_NONE = 0, TFM_LENGTH_GNMT = 1 /* ((5 + n) / 6)^alpha */, TFM_LENGTH_POWER = 2 /* n^alpha */ };
typedef struct tfm_beam_options {
    int length_penalty;                /* TFM_LENGTH_* */
    int64_t beams;                     /* 0: 4 */
    int64_t n_best;                    /* 0: 1 */
    int64_t max_new;                   /* 0: until the session is full */
    float alpha;
    const int64_t *stop_ids; int64_t stop_id_count;
    const int64_t *banned; int64_t banned_count;
} tfm_beam_options;
/* One search per prompt, of the likeliest continuations by sum of log-probabilities / length penalty (GNMT: Wu et al.
 * 2016); the session's batch is count x beams, encoded (tfm_session_encode) with each source repeated `beams` times, or
 * forked so. out: count x n_best, best first; n_best is at most beams; a place that no sequence took has count 0 and
 * score -inf. It goes on from what the session holds, and leaves rows of abandoned beams in it: encode or reset before
 * the next search. */
TFM_API TFM_CHECK tfm_status tfm_beam_search(tfm_ctx *c, tfm_session *s, const tfm_prompt *prompts, int64_t count,
                                             const tfm_beam_options *options, tfm_sequence *out);
#endif /* TFM_NO_GENERATION */

#if !defined(TFM_NO_FILES)
/* ------------------------------------------------------------------------------------------------------------------
 *  Files. Every parser works on memory; a file is mapped, or read where it cannot be. Hostile input gives TFM_FORMAT.
 * ---------------------------------------------------------------------------------------------------------------- */
/* safetensors in memory; data must outlive the file. The header is checked whole; dtypes without a counterpart here are
 * an error (TFM_UNSUPPORTED) only when such a tensor is asked for. Any number of threads may read an open file. */
TFM_API tfm_file *tfm_file_open_memory(tfm_ctx *c, const void *data, int64_t size);
#if !defined(TFM_NO_STDIO)
/* One .safetensors, or (a name that ends in .json) model.safetensors.index.json with its shards. Mapped: do not change
 * or shorten it while it is open. */
TFM_API tfm_file *tfm_file_open(tfm_ctx *c, const char *path);
#endif
/* After everything that uses its tensors; a store that uses its bytes keeps it open by itself. */
TFM_API void tfm_file_close(tfm_file *f);
TFM_API int64_t tfm_file_count(const tfm_file *f);                                         /* number of tensors */
TFM_API const char *tfm_file_name(const tfm_file *f, int64_t index);                       /* the file's memory */
TFM_API const char *tfm_file_metadata(const tfm_file *f, const char *key);                 /* NULL: no such key */
/* A view of the file's bytes (a copy where they are not aligned): do not write; dangles when the file is closed. */
TFM_API tfm_tensor *tfm_file_tensor(tfm_ctx *c, const tfm_file *f, const char *name);
TFM_API int tfm_file_has(const tfm_file *f, const char *name);                             /* 1: yes */

/* Loading rules: the first row whose pattern matches a name in the file decides. '*' stands for any text without '.'
 * or '/' and is put where the target has '*', in order. */
enum {
    TFM_RULE_RENAME = 0,
    TFM_RULE_TRANSPOSE = 1,            /* rename and transpose ([in, out] kernels: Keras, GPT-2's Conv1D) */
    TFM_RULE_CONCAT = 2,               /* becomes part number `index` of `parts` of the target, joined along dim 0 */
    /* part number `index` of `parts` equal parts along dim 0; several rows may name one source */
    TFM_RULE_SPLIT = 3,
    TFM_RULE_SKIP = 4,
    TFM_RULE_CONCAT_TRANSPOSE = 5,
    TFM_RULE_SPLIT_TRANSPOSE = 6       /* the source is transposed first, then split */
};
typedef struct tfm_rule { int kind; const char *from; const char *to; int index, parts; } tfm_rule;
typedef struct tfm_load_options {
    /* 1: do not pack (tfm_params_prepare) after loading. Only what an init has marked before is packed: when the inits
     * come after the load, call tfm_params_prepare behind them */
    int plain;
    int cast;                          /* 1: convert weight matrices to dtype */
    int dtype;
    const tfm_rule *rules; int64_t rule_count;
    const char *prefix;                /* put before every name */
} tfm_load_options;
/* Puts every tensor of the file into the store under its (ruled) name: into a parameter that exists already its values
 * (shape must agree, floats are converted), else as a new one, without a copy where the file's bytes can be used as
 * they lie (then the store keeps the file open). A tensor that no rule matches keeps its name. options NULL: no rules,
 * packing on. Everything is checked before anything changes; only a cancel, or memory that runs out later, leaves a
 * part loaded. What the file lacks is found by an init with tfm_params_strict. _memory copies: data may go afterwards.
 */
TFM_API TFM_CHECK tfm_status tfm_params_load_file(tfm_ctx *c, tfm_params *p, tfm_file *f,
                                                  const tfm_load_options *options);
TFM_API TFM_CHECK tfm_status tfm_params_load_memory(tfm_ctx *c, tfm_params *p, const void *data, int64_t size,
                                                    const tfm_load_options *options);
/* The store as safetensors, packed matrices as plain ones: writes tfm_params_saved_size bytes (-1: NULL, or no memory)
 * to the caller's buffer of `size`. */
TFM_API int64_t tfm_params_saved_size(const tfm_params *p);
TFM_API TFM_CHECK tfm_status tfm_params_save_memory(tfm_ctx *c, const tfm_params *p, void *buffer, int64_t size);
#if !defined(TFM_NO_STDIO)
/* tfm_file_open, tfm_params_load_file, tfm_file_close. */
TFM_API TFM_CHECK tfm_status tfm_params_load(tfm_ctx *c, tfm_params *p, const char *path,
                                             const tfm_load_options *options);
/* safetensors of a store, or of `count` named tensors of any strides. Atomic: a new file takes the old one's place. */
TFM_API TFM_CHECK tfm_status tfm_params_save(tfm_ctx *c, const tfm_params *p, const char *path);
TFM_API TFM_CHECK tfm_status tfm_save_tensors(tfm_ctx *c, const char *path, const char *const *names,
                                              const tfm_tensor *const *tensors, int64_t count);
/* `size` bytes as a file, atomically. */
TFM_API TFM_CHECK tfm_status tfm_write_file(tfm_ctx *c, const char *path, const void *data, int64_t size);
/* A whole file in the arena, a NUL after its end; *size (may be NULL) gets its length without that. */
TFM_API const void *tfm_read_file(tfm_ctx *c, const char *path, int64_t *size);
#endif
#endif /* TFM_NO_FILES */

#if !defined(TFM_NO_MODELS)
/* ------------------------------------------------------------------------------------------------------------------
 *  Models and tokenizers
 * ---------------------------------------------------------------------------------------------------------------- */
/* A checkpoint of llama2.c (version 0 .bin): fills *config and the store (names as tfm_transformer_init wants them; the
 * values are copied). Next: tfm_transformer_init with prefix "", tfm_params_prepare. */
TFM_API TFM_CHECK tfm_status tfm_llama2c_load_memory(tfm_ctx *c, tfm_params *p, const void *data, int64_t size,
                                                     tfm_transformer_config *config);
/* Its tokenizer file; vocab = the model's vocabulary size. All tokenizers copy what they need, outlive the context and
 * belong to the caller; any number of threads may read one. */
TFM_API tfm_tokenizer *tfm_tokenizer_llama2c_memory(tfm_ctx *c, const void *data, int64_t size, int64_t vocab);
/* One token a line, the line number is the id. Texts are split at spaces. unknown: id for other words, -1: an error. */
TFM_API tfm_tokenizer *tfm_tokenizer_lines_memory(tfm_ctx *c, const void *data, int64_t size, int64_t unknown);
#if !defined(TFM_NO_STDIO) && !defined(TFM_NO_FILES)
/* The same from files. */
TFM_API TFM_CHECK tfm_status tfm_llama2c_load(tfm_ctx *c, tfm_params *p, const char *path,
                                              tfm_transformer_config *config);
TFM_API tfm_tokenizer *tfm_tokenizer_llama2c(tfm_ctx *c, const char *path, int64_t vocab);
TFM_API tfm_tokenizer *tfm_tokenizer_lines(tfm_ctx *c, const char *path, int64_t unknown);
#endif
TFM_API void tfm_tokenizer_destroy(tfm_tokenizer *t);
TFM_API int64_t tfm_tokenizer_size(const tfm_tokenizer *t);                                 /* number of tokens */
TFM_API int64_t tfm_tokenizer_find(const tfm_tokenizer *t, const char *token);              /* its id; -1: none */
/* *count ids of a text, in the arena; begin / end 1: with the begin / end id (llama2.c: 1 and 2; lines: of <s> and
 * </s>, an error when there is none). */
TFM_API TFM_CHECK tfm_status tfm_tokenizer_encode(tfm_ctx *c, const tfm_tokenizer *t, const char *text, int begin,
                                                  int end, int64_t **ids, int64_t *count);
/* A tfm_piece_fn whose user is the tokenizer. The text is the tokenizer's memory, *length may be NULL; "" for an id
 * that does not exist. */
TFM_API const char *tfm_tokenizer_piece(const void *tokenizer, int64_t previous, int64_t id, int64_t *length);
/* The text of ids, without begin and end ids, in the arena. */
TFM_API const char *tfm_tokenizer_decode(tfm_ctx *c, const tfm_tokenizer *t, const int64_t *ids, int64_t count);
#endif /* TFM_NO_MODELS */

#ifdef __cplusplus
}
#endif
#endif /* TRANSFORMER_H */

/* ==================================================================================================================
 *  1  PLATFORM
 *
 *  Everything that depends on the compiler or the operating system: system headers, attributes, exact floating point,
 *  checked sizes, atomics, the clock, narrow floats. No other chapter uses a compiler extension.
 * ================================================================================================================ */
#if defined(TRANSFORMER_IMPLEMENTATION) && !defined(TFM__PASS) && !defined(TFM__IMPLEMENTED)

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h> /* snprintf; TFM_NO_STDIO keeps out files only */
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define TFM__X86 1
#else
#define TFM__X86 0
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
#define TFM__ARM64 1
#else
#define TFM__ARM64 0
#endif

/* gcc for 32-bit x86 computes in registers wider than a float unless told otherwise. */
#if defined(__i386__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SSE2_MATH__)
#define TFM__X87 1
#else
#define TFM__X87 0
#endif

/* Vector headers stand before every target region and before the pragmas below. */
#if TFM__X86
#include <immintrin.h>
#if defined(__GNUC__) || defined(__clang__)
#include <cpuid.h>
#else
#include <intrin.h>
#endif
#elif TFM__ARM64
#include <arm_neon.h>
#endif

#if defined(_WIN32)
#define TFM__WINDOWS 1
#if !defined(WIN32_LEAN_AND_MEAN)
#define WIN32_LEAN_AND_MEAN
#endif
#if !defined(NOMINMAX)
#define NOMINMAX
#endif
#include <windows.h>
#else
#define TFM__WINDOWS 0
#include <fcntl.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

#if defined(__linux__)
#define TFM__LINUX 1
#include <sched.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#else
#define TFM__LINUX 0
#endif

/* Without 64-bit atomics of the machine itself (they would need -latomic) everything runs on the caller's thread. */
#if defined(_MSC_VER) || defined(__GCC_HAVE_SYNC_COMPARE_AND_SWAP_8)
#define TFM__ATOMICS 1
#else
#define TFM__ATOMICS 0
#endif
#if defined(TFM_NO_THREADS) || !TFM__ATOMICS
#define TFM__THREADS 0
#else
#define TFM__THREADS 1
#if !TFM__WINDOWS
#include <pthread.h>
#include <signal.h>
#endif
#endif

/* Sanitizers, for the allocator: it marks what is free, so that overruns and uses after a rewind are caught. */
#if defined(__has_feature)
#define TFM__HAS_FEATURE(name) __has_feature(name)
#else
#define TFM__HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#define TFM__ASAN 1
#elif TFM__HAS_FEATURE(address_sanitizer)
#define TFM__ASAN 1
#else
#define TFM__ASAN 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define TFM__UNUSED __attribute__((unused))
#define TFM__NOINLINE static __attribute__((noinline, unused))
#define TFM__INLINE static inline __attribute__((unused))
#if defined(__NO_INLINE__) /* at -O0 a forced inline only costs stack and debugging */
#define TFM__ALWAYS_INLINE static inline __attribute__((unused))
#else
#define TFM__ALWAYS_INLINE static inline __attribute__((always_inline, unused))
#endif
#if defined(__clang__) || !defined(__MINGW32__)
#define TFM__PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define TFM__PRINTF(text, first) __attribute__((format(gnu_printf, text, first)))
#endif
#else
#define TFM__UNUSED
#define TFM__NOINLINE static __declspec(noinline)
#define TFM__INLINE static __inline
#define TFM__ALWAYS_INLINE static __forceinline
#define TFM__PRINTF(text, first)
#endif

#define TFM__COUNT(array) ((int64_t)(sizeof(array) / sizeof((array)[0])))

/* Checks of the library's own invariants, never of what a caller gives. */
#if !defined(TFM_ASSERT)
#define TFM_ASSERT(condition) ((void)0)
#endif

/* Exact arithmetic whatever the flags: no contraction of x * y + z, no -ffast-math. Results must not depend on how a
 * user compiles. gcc takes it per function (and drops __FAST_MATH__); clang contracts in its back end under
 * -ffast-math and compiles its own intrinsics with it, which no pragma undoes (probed with 14 and 19), so there it is
 * refused. */
#if defined(__clang__)
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "transformer.h: clang cannot compute exactly under -ffast-math: add -fno-fast-math for this file"
#endif
#define TFM__STRICT_FP_BEGIN _Pragma("STDC FP_CONTRACT OFF")
#define TFM__STRICT_FP_END _Pragma("STDC FP_CONTRACT DEFAULT")
#elif defined(__GNUC__)
#define TFM__STRICT_FP_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"no-fast-math\", \"fp-contract=off\")")
#define TFM__STRICT_FP_END _Pragma("GCC pop_options")
#elif defined(_MSC_VER)
#define TFM__STRICT_FP_BEGIN __pragma(float_control(precise, on, push)) __pragma(fp_contract(off))
#define TFM__STRICT_FP_END __pragma(fp_contract(on)) __pragma(float_control(pop))
#else
#define TFM__STRICT_FP_BEGIN
#define TFM__STRICT_FP_END
#endif
TFM__STRICT_FP_BEGIN

/* Under plain -std=c99 (and without _GNU_SOURCE) the C library hides what follows; the functions are there all the
 * same. */
#if TFM__LINUX && !defined(CPU_SETSIZE)
extern int sched_getaffinity(pid_t process, size_t size, void *set);
extern int sched_setaffinity(pid_t process, size_t size, const void *set);
extern int sched_getcpu(void);
#define TFM__CPU_SET void
#elif TFM__LINUX
#define TFM__CPU_SET cpu_set_t
#endif
#if TFM__LINUX && defined(__STRICT_ANSI__) && !defined(__cplusplus)
extern int madvise(void *address, size_t length, int advice);
extern int posix_memalign(void **block, size_t alignment, size_t size);
#if (defined(__USE_TIME_BITS64) || defined(_REDIR_TIME64)) && LONG_MAX == 0x7fffffffL && !defined(__x86_64__)
extern int __clock_gettime64(int clock, struct timespec *now);
#define TFM__CLOCK_GETTIME __clock_gettime64
#else
extern int clock_gettime(int clock, struct timespec *now);
#endif
#endif
#if !defined(TFM__CLOCK_GETTIME)
#define TFM__CLOCK_GETTIME clock_gettime
#endif
#if TFM__LINUX /* advices of madvise */
#define TFM__DONTNEED 4
#define TFM__HUGEPAGE 14
#endif

/* -- sanitizer: memory that nothing may touch now ------------------------------------------------------------------ */

#if TFM__ASAN
#ifdef __cplusplus
extern "C" {
#endif
void __asan_poison_memory_region(void const volatile *p, size_t size);
void __asan_unpoison_memory_region(void const volatile *p, size_t size);
#ifdef __cplusplus
}
#endif
TFM__INLINE void tfm__poison(const void *p, int64_t bytes) { __asan_poison_memory_region(p, (size_t)bytes); }
TFM__INLINE void tfm__unpoison(const void *p, int64_t bytes) { __asan_unpoison_memory_region(p, (size_t)bytes); }
#else
TFM__INLINE void tfm__poison(const void *p, int64_t bytes) {
    (void)p;
    (void)bytes;
}
TFM__INLINE void tfm__unpoison(const void *p, int64_t bytes) {
    (void)p;
    (void)bytes;
}
#endif

/* -- checked sizes ------------------------------------------------------------------------------------------------- */

/* *r = a * b. 1: done; 0: an operand is negative or the product does not fit. */
TFM__INLINE int tfm__mul(int64_t a, int64_t b, int64_t *r) {
    if (a < 0 || b < 0 || (b > 0 && a > INT64_MAX / b)) return 0;
    *r = a * b;
    return 1;
}

/* *r = a + b. 1: done; 0: an operand is negative or the sum does not fit. */
TFM__INLINE int tfm__add(int64_t a, int64_t b, int64_t *r) {
    if (a < 0 || b < 0 || a > INT64_MAX - b) return 0;
    *r = a + b;
    return 1;
}

TFM__INLINE int64_t tfm__min64(int64_t a, int64_t b) { return a < b ? a : b; }
TFM__INLINE int64_t tfm__max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* For a >= 0, b > 0, and results that fit (check first with tfm__add where a comes from outside). */
TFM__INLINE int64_t tfm__ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
TFM__INLINE int64_t tfm__round_up(int64_t a, int64_t b) { return tfm__ceil_div(a, b) * b; }

/* -- atomics on int64_t, all sequentially consistent: they stand in hand-overs, never in loops over data ----------- */

#if !TFM__ATOMICS
TFM__INLINE int64_t tfm__atomic_load(const int64_t *p) { return *(const volatile int64_t *)p; }
TFM__INLINE void tfm__atomic_store(int64_t *p, int64_t value) { *(volatile int64_t *)p = value; }
TFM__INLINE int64_t tfm__atomic_add(int64_t *p, int64_t value) {
    int64_t old = *p;
    *p = old + value;
    return old;
}
TFM__INLINE int tfm__atomic_cas(int64_t *p, int64_t expected, int64_t desired) {
    if (*p != expected) return 0;
    *p = desired;
    return 1;
}
#elif defined(__i386__) && (defined(__GNUC__) || defined(__clang__))
/* int64_t is aligned to 4 here: only locked instructions are whole on it, and clang would call libatomic for the
 * others. */
TFM__INLINE int64_t tfm__atomic_load(const int64_t *p) {
    return __sync_val_compare_and_swap((int64_t *)(uintptr_t)p, (int64_t)0, (int64_t)0);
}
TFM__INLINE int64_t tfm__atomic_add(int64_t *p, int64_t value) { return __sync_fetch_and_add(p, value); }
TFM__INLINE int tfm__atomic_cas(int64_t *p, int64_t expected, int64_t desired) {
    return __sync_bool_compare_and_swap(p, expected, desired);
}
TFM__INLINE void tfm__atomic_store(int64_t *p, int64_t value) {
    int64_t old = tfm__atomic_load(p);
    while (!__sync_bool_compare_and_swap(p, old, value)) old = tfm__atomic_load(p);
}
#elif defined(__GNUC__) || defined(__clang__)
TFM__INLINE int64_t tfm__atomic_load(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
TFM__INLINE void tfm__atomic_store(int64_t *p, int64_t value) { __atomic_store_n(p, value, __ATOMIC_SEQ_CST); }
/* Returns the value before. */
TFM__INLINE int64_t tfm__atomic_add(int64_t *p, int64_t value) {
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
/* Puts desired where expected is; 1: done. */
TFM__INLINE int tfm__atomic_cas(int64_t *p, int64_t expected, int64_t desired) {
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
#else
TFM__INLINE int64_t tfm__atomic_load(const int64_t *p) {
    return InterlockedCompareExchange64((volatile LONG64 *)(uintptr_t)p, 0, 0);
}
TFM__INLINE void tfm__atomic_store(int64_t *p, int64_t value) { InterlockedExchange64((volatile LONG64 *)p, value); }
TFM__INLINE int64_t tfm__atomic_add(int64_t *p, int64_t value) {
    return InterlockedExchangeAdd64((volatile LONG64 *)p, value);
}
TFM__INLINE int tfm__atomic_cas(int64_t *p, int64_t expected, int64_t desired) {
    return InterlockedCompareExchange64((volatile LONG64 *)p, desired, expected) == expected;
}
#endif

/* -- time and threads ---------------------------------------------------------------------------------------------- */

/* Seconds of a clock that never goes back. */
TFM__UNUSED static double tfm__now(void) {
#if TFM__WINDOWS
    LARGE_INTEGER count, frequency;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&frequency);
    return (double)count.QuadPart / (double)frequency.QuadPart;
#else
    struct timespec now;
    now.tv_sec = 0;
    now.tv_nsec = 0;
#if defined(CLOCK_MONOTONIC)
    (void)TFM__CLOCK_GETTIME(CLOCK_MONOTONIC, &now);
#else
    (void)TFM__CLOCK_GETTIME(1, &now); /* Linux's CLOCK_MONOTONIC, hidden by -std=c99 */
#endif
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#endif
}

/* A number of the calling thread, not 0. Also needed without a pool: the user's parallel_for has threads of its own. */
#if !TFM__THREADS && TFM__ATOMICS && !TFM__WINDOWS
static __thread const char tfm__thread_mark = 0; /* every thread has its own address of it */
TFM__UNUSED static uint64_t tfm__thread_id(void) { return (uint64_t)(uintptr_t)&tfm__thread_mark; }
#else
TFM__UNUSED static uint64_t tfm__thread_id(void) {
#if TFM__WINDOWS
    return (uint64_t)GetCurrentThreadId();
#elif TFM__THREADS
    return (uint64_t)(uintptr_t)pthread_self();
#else
    return 1;
#endif
}
#endif

/* Tells the core that this is a waiting loop. */
TFM__INLINE void tfm__pause(void) {
#if TFM__X86 && (defined(__GNUC__) || defined(__clang__))
    __builtin_ia32_pause();
#elif TFM__X86
    _mm_pause();
#elif TFM__ARM64 && (defined(__GNUC__) || defined(__clang__))
    __asm__ __volatile__("yield");
#endif
}

/* How this thread rounds and treats subnormals; workers take it over from the caller. */
TFM__UNUSED static uint64_t tfm__fp_mode(void) {
#if TFM__X86 && (defined(__SSE__) || defined(_MSC_VER))
    return _mm_getcsr() & 0xffc0u; /* without the exception flags */
#elif TFM__X86
    uint16_t word; /* a 32-bit build without SSE computes with the x87 unit */
    __asm__ __volatile__("fnstcw %0" : "=m"(word));
    return word;
#elif TFM__ARM64 && (defined(__GNUC__) || defined(__clang__))
    uint64_t mode;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    return mode;
#else
    return 0;
#endif
}

TFM__UNUSED static void tfm__fp_set(uint64_t mode) {
#if TFM__X86 && (defined(__SSE__) || defined(_MSC_VER))
    _mm_setcsr((unsigned int)mode);
#elif TFM__X86
    uint16_t word = (uint16_t)mode;
    __asm__ __volatile__("fldcw %0" : : "m"(word));
#elif TFM__ARM64 && (defined(__GNUC__) || defined(__clang__))
    __asm__ __volatile__("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
}

/* -- bits of floats ------------------------------------------------------------------------------------------------ */

TFM__INLINE uint32_t tfm__float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

TFM__INLINE float tfm__bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

TFM__INLINE int tfm__isnan(float x) { return (tfm__float_bits(x) & 0x7fffffffu) > 0x7f800000u; }
TFM__INLINE int tfm__isinf(float x) { return (tfm__float_bits(x) & 0x7fffffffu) == 0x7f800000u; }

/* IEEE half to float, exact; a signalling NaN becomes quiet, as with the machine's instructions. */
TFM__INLINE float tfm__f16_to_f32(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    if (exponent == 31) return tfm__bits_float(sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u));
    if (exponent) return tfm__bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
    /* zero and subnormals: fraction * 2^-24, built by hand so that flush-to-zero modes do not matter */
    if (!fraction) return tfm__bits_float(sign);
    exponent = 113;
    while (!(fraction & 0x400u)) {
        fraction <<= 1;
        exponent--;
    }
    return tfm__bits_float(sign | (exponent << 23) | ((fraction & 0x3ffu) << 13));
}

/* Float to IEEE half, to nearest even; too large gives infinity; NaN stays NaN (quiet, top payload bits kept). */
TFM__INLINE uint16_t tfm__f32_to_f16(float x) {
    uint32_t bits = tfm__float_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t result, rest, half;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 rounds up to infinity */
    if (magnitude >= 0x38800000u) {                                  /* normal: 2^-14 and up */
        result = (magnitude - 0x38000000u) >> 13;
        rest = magnitude & 0x1fffu;
        half = 0x1000u;
    } else {
        uint32_t shift = 126 - (magnitude >> 23), fraction = (magnitude & 0x7fffffu) | 0x800000u;
        if (shift > 24) return (uint16_t)sign; /* at most half of the least subnormal, and then the tie goes to zero */
        result = fraction >> shift;
        rest = fraction & ((1u << shift) - 1u);
        half = 1u << (shift - 1);
    }
    if (rest > half || (rest == half && (result & 1u))) result++;
    return (uint16_t)(sign | result);
}

TFM__INLINE float tfm__bf16_to_f32(uint16_t bits) { return tfm__bits_float((uint32_t)bits << 16); }

/* Float to bfloat16, to nearest even; NaN stays NaN (quiet). */
TFM__INLINE uint16_t tfm__f32_to_bf16(float x) {
    uint32_t bits = tfm__float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* ==================================================================================================================
 *  2  MEMORY
 *
 *  The context: its sticky error, its memory (general blocks, the arena, tensor headers), its hooks, its random
 *  numbers. Chapter 6 makes and destroys it.
 * ================================================================================================================ */

#define TFM__ALIGN 64               /* of all memory: a cache line, an AVX-512 vector */
#define TFM__MESSAGE_BYTES 512
#define TFM__CHUNK_BYTES (1 << 20)  /* least size of an arena chunk; later ones are at least a quarter of all before */
#define TFM__CHUNKS 128             /* growing by a quarter, the last of them would be larger than any address space */
#define TFM__REDZONE (TFM__ASAN ? TFM__ALIGN : 0)
#define TFM__HEADERS 512            /* tensor headers per block */
#define TFM__HEADER_REST 256        /* a dead header is reused only after this many others died */
#define TFM__KEEP_MAX 16

typedef struct tfm__chunk {
    char *base;                     /* a made-up address in a dry run */
    int64_t size, used;
} tfm__chunk;

/* A stack of memory in chunks. Chunks stay when it is rewound: a repeated step finds them again, in the same order. */
typedef struct tfm__arena {
    tfm__chunk chunk[TFM__CHUNKS];
    int count, current;
    int64_t used, peak, total;      /* bytes handed out now and at most; bytes of all chunks */
    int64_t tag;                    /* marks are good for the arena that made them */
} tfm__arena;

typedef struct tfm__header_block {
    struct tfm__header_block *next;
    int64_t used;
    tfm_tensor slot[TFM__HEADERS];
} tfm__header_block;

/* Headers do not lie in the arena: a dead one must stay readable, so that its use is an error and not a crash. */
typedef struct tfm__headers {
    tfm__header_block *first, *last, *fresh;  /* fresh: the block with slots never used, or NULL */
    tfm_tensor *top;                          /* live ones, newest first, through `next` */
    tfm_tensor *dead_first, *dead_last;       /* dead ones, in the order of their death */
    int64_t live, capacity;
} tfm__headers;

typedef struct tfm__account {
    int64_t held, peak, calls;
} tfm__account;

typedef struct tfm__pin {           /* the tape needs all that is below */
    int on, chunk;
    int64_t offset, serial;
} tfm__pin;

struct tfm__kernels;
typedef struct tfm__pool tfm__pool;
struct tfm__node;
struct tfm__op;

/* Which matrices were read lately: a slot for each hash of an address, and what all reads had come to then. */
#define TFM__READS 128
typedef struct tfm__reads {
    int64_t bytes;
    const void *from[TFM__READS];
    int64_t at[TFM__READS];
} tfm__reads;

struct tfm_ctx {
    const struct tfm__kernels *k;
    int isa, threads;
    int dry;                        /* 1: between tfm_measure_begin and _end */
    int profile;                    /* 1: ops are timed */
    int bf16_dot;                   /* 1: asked for and there */
    tfm_options options;            /* defaults filled in, isa dropped (it is the caller's string) */
    tfm_allocator allocator;        /* complete */

    int64_t status;                 /* atomic: another thread may ask while the owner works */
    char message[TFM__MESSAGE_BYTES];
    int broken;                     /* creation failed: the error outlives tfm_clear */
    int64_t cancel, misuse, owner;  /* atomic: asked to stop; a second thread came in; thread that is inside */
    int depth;

    tfm__account real, plan;        /* what is held; in a dry run also what would be */
    tfm__arena arena, real_arena;   /* real_arena: set aside in a dry run */
    tfm__headers headers;
    void *dry_meta;                 /* real memory of structs made in a dry run */
    uintptr_t dry_address;          /* of the next made-up chunk */
    int64_t serial;                 /* of the newest header */
    int64_t tags;                   /* arenas made */

    struct tfm__op *op;             /* chapter 8: the innermost op that runs */
    struct tfm__node *tape;
    int64_t tape_length;
    tfm__pin pin;
    struct tfm__node *real_tape;    /* set aside in a dry run, like the three below */
    int64_t real_tape_length;
    tfm__pin real_pin;
    uint64_t real_stream;
    tfm_marker dry_mark;

    uint64_t seed, stream;

    tfm_profile_row *rows;
    int64_t row_count, row_capacity, row_last;

    tfm__pool *pool;
    char *scratch;                  /* threads x TFM__SCRATCH_BYTES */
    tfm__reads reads;
};

/* -- text in a fixed buffer ---------------------------------------------------------------------------------------- */

/* vsnprintf that always terminates and returns what the buffer holds. */
static int64_t tfm__vformat(char *buffer, int64_t size, const char *format, va_list list) {
    int n = vsnprintf(buffer, (size_t)size, format, list);
    buffer[size - 1] = 0;
    return n >= 0 && n < size ? n : (int64_t)strlen(buffer);
}

TFM__PRINTF(3, 4)
TFM__UNUSED static int tfm__format(char *buffer, int64_t size, const char *format, ...) {
    int64_t n;
    va_list list;
    va_start(list, format);
    n = tfm__vformat(buffer, size, format, list);
    va_end(list);
    return (int)n;
}

/* Writes behind the first `length` characters; returns the new length, below size. */
TFM__PRINTF(4, 5)
TFM__UNUSED static int64_t tfm__append(char *buffer, int64_t size, int64_t length, const char *format, ...) {
    va_list list;
    if (length >= size - 1) return size - 1;
    va_start(list, format);
    length += tfm__vformat(buffer + length, size - length, format, list);
    va_end(list);
    return length;
}

/* -- hooks and the sticky error ------------------------------------------------------------------------------------ */

TFM__PRINTF(3, 4)
static void tfm__log(tfm_ctx *c, int level, const char *format, ...) {
    char text[TFM__MESSAGE_BYTES];
    va_list list;
    if (!c->options.log) return;
    va_start(list, format);
    tfm__vformat(text, (int64_t)sizeof text, format, list);
    va_end(list);
    c->options.log(c->options.hook_user, level, text);
}

static const char tfm__busy_message[] = "the context was used by two threads at the same time";

/* Sets the error unless there is one. Only from the thread that is inside the context, never from a task.
 * Returns the status that now stands. */
TFM__PRINTF(3, 4)
static tfm_status tfm__fail(tfm_ctx *c, tfm_status code, const char *format, ...) {
    if (!c) return code;
    if (!tfm__atomic_load(&c->status)) {
        if (tfm__atomic_load(&c->misuse)) { /* came first */
            code = TFM_BUSY;
            memcpy(c->message, tfm__busy_message, sizeof tfm__busy_message);
        } else {
            va_list list;
            va_start(list, format);
            tfm__vformat(c->message, TFM__MESSAGE_BYTES, format, list);
            va_end(list);
        }
        tfm__atomic_store(&c->status, code); /* after the text, which others may read from now on */
        if (c->options.log) c->options.log(c->options.hook_user, TFM_LOG_ERROR, c->message);
    }
    return (tfm_status)tfm__atomic_load(&c->status);
}

TFM__UNUSED static tfm_status tfm__status(const tfm_ctx *c) {
    tfm_status status;
    if (!c) return TFM_OOM; /* tfm_create gives no context only then */
    status = (tfm_status)tfm__atomic_load(&c->status);
    return status ? status : tfm__atomic_load(&c->misuse) ? TFM_BUSY : TFM_OK;
}

/* 1: do no work. */
TFM__UNUSED static int tfm__failed(const tfm_ctx *c) { return tfm__status(c) != TFM_OK; }

TFM__UNUSED static int tfm__cancelled(const tfm_ctx *c) { return tfm__atomic_load(&c->cancel) != 0; }

/* Tells the user's hook; 1: stop (the call then fails with TFM_CANCELLED where it ends). */
TFM__UNUSED static int tfm__progress(tfm_ctx *c, const char *what, int64_t done, int64_t total) {
    if (c->options.progress && c->options.progress(c->options.hook_user, what, done, total)) {
        tfm__atomic_store(&c->cancel, 1);
    }
    return tfm__cancelled(c);
}

/* Enters the context: 1, or 0 when another thread is inside. That is remembered and becomes the context's error. */
TFM__UNUSED static int tfm__acquire(tfm_ctx *c) {
    int64_t self = (int64_t)tfm__thread_id();
    if (tfm__atomic_load(&c->owner) == self) {
        c->depth++;
        return 1;
    }
    if (tfm__atomic_cas(&c->owner, 0, self)) {
        c->depth = 1;
        return 1;
    }
    tfm__atomic_store(&c->misuse, 1);
    return 0;
}

TFM__UNUSED static void tfm__release(tfm_ctx *c) {
    if (--c->depth == 0) tfm__atomic_store(&c->owner, 0);
}

/* -- blocks -------------------------------------------------------------------------------------------------------- */

/* Stands in front of every piece that came from an allocator. */
typedef struct tfm__block {
    void *raw;
    int64_t bytes;   /* asked from the allocator */
} tfm__block;

/* Large blocks ask for large pages: a kernel that streams through them then walks page tables 512 times less often
 * (7 to 35 % of the time of what reads memory once), and packing a file's weights into new memory takes half as long.
 * The end of a block, less than a large page, stays in small ones. A refusal costs nothing. */
static void *tfm__default_alloc(void *user, size_t size) {
    (void)user;
#if TFM__LINUX
    if (size >= (size_t)2 << 20) {
        void *p = NULL;
        if (posix_memalign(&p, (size_t)2 << 20, size)) return NULL; /* x86's: else small ones come before the first */
        (void)madvise(p, size & ~(((size_t)1 << 16) - 1), TFM__HUGEPAGE); /* no page of a system is larger */
        return p;
    }
#endif
    return malloc(size);
}

static void tfm__default_free(void *user, void *pointer) {
    (void)user;
    free(pointer);
}

/* What the allocator is asked for so that `bytes` can be aligned; 0 when that is no possible size. */
static int64_t tfm__block_bytes(int64_t bytes) {
    int64_t total;
    if (!tfm__add(bytes, (int64_t)sizeof(tfm__block) + TFM__ALIGN - 1, &total)) return 0;
    return (uint64_t)total <= (uint64_t)(SIZE_MAX / 2) ? total : 0;
}

static tfm__block *tfm__block_of(void *p) { return (tfm__block *)(void *)((char *)p - sizeof(tfm__block)); }

/* 64-byte aligned memory from an allocator (NULL or all zero: malloc); NULL on failure, no error set. */
static void *tfm__alloc_from(const tfm_allocator *a, int64_t bytes) {
    int64_t total = tfm__block_bytes(bytes), used;
    char *raw, *p;
    if (!total) return NULL;
    raw = (char *)(a && a->alloc ? a->alloc(a->user, (size_t)total) : tfm__default_alloc(NULL, (size_t)total));
    if (!raw) return NULL;
    used = (int64_t)((uintptr_t)(raw + sizeof(tfm__block)) % TFM__ALIGN);
    p = raw + sizeof(tfm__block) + (used ? TFM__ALIGN - used : 0);
    tfm__block_of(p)->raw = raw;
    tfm__block_of(p)->bytes = total;
    tfm__poison(p + bytes, raw + total - (p + bytes));
    return p;
}

TFM__UNUSED static void tfm__free_to(const tfm_allocator *a, void *p) {
    tfm__block *block;
    if (!p) return;
    block = tfm__block_of(p);
    tfm__unpoison(block->raw, block->bytes); /* the allocator may be the user's and hand it out again */
    if (a && a->free) a->free(a->user, block->raw);
    else free(block->raw);
}

static void tfm__count(tfm__account *a, int64_t bytes) {
    a->held += bytes;
    if (bytes > 0) a->calls++;
    a->peak = tfm__max64(a->peak, a->held);
}

/* 1: `total` more bytes stay within memory_limit. */
static int tfm__within_limit(const tfm_ctx *c, int64_t total) {
    return !c->options.memory_limit || total <= c->options.memory_limit - c->real.held;
}

static void tfm__fail_memory(tfm_ctx *c, int64_t bytes) {
    int64_t total = tfm__block_bytes(bytes);
    if (total && !tfm__within_limit(c, total)) {
        tfm__fail(c, TFM_OOM, "out of memory: %lld bytes asked, %lld in use, memory_limit is %lld", (long long)bytes,
                  (long long)c->real.held, (long long)c->options.memory_limit);
    } else {
        tfm__fail(c, TFM_OOM, "out of memory: %lld bytes asked", (long long)bytes);
    }
}

/* tfm__alloc_from within the limit, counted in the account of what is held; no error set. */
static void *tfm__take(tfm_ctx *c, int64_t bytes) {
    int64_t total = tfm__block_bytes(bytes);
    void *p = total && tfm__within_limit(c, total) ? tfm__alloc_from(&c->allocator, bytes) : NULL;
    if (p) tfm__count(&c->real, total);
    return p;
}

static void tfm__give(tfm_ctx *c, void *p) {
    if (p) tfm__count(&c->real, -tfm__block_of(p)->bytes);
    tfm__free_to(&c->allocator, p);
}

/* General memory, also real in a dry run; every piece goes back with tfm__free. NULL after setting the error. */
static void *tfm__alloc(tfm_ctx *c, int64_t bytes) {
    void *p = tfm__take(c, bytes);
    if (!p) tfm__fail_memory(c, bytes);
    else if (c->dry) tfm__count(&c->plan, tfm__block_of(p)->bytes);
    return p;
}

TFM__UNUSED static void *tfm__alloc_zeroed(tfm_ctx *c, int64_t bytes) {
    void *p = tfm__alloc(c, bytes);
    if (p) memset(p, 0, (size_t)bytes);
    return p;
}

static void tfm__free(tfm_ctx *c, void *p) {
    if (p && c->dry) tfm__count(&c->plan, -tfm__block_of(p)->bytes);
    tfm__give(c, p);
}

/* Memory of an object that lives on without the context: within the limit, but not counted as held by it. data:
 * payload that nobody touches in a dry run, where it is only counted. Goes back with tfm__free_to. */
TFM__UNUSED static void *tfm__alloc_shared(tfm_ctx *c, int64_t bytes, int data) {
    int64_t total = tfm__block_bytes(bytes);
    int empty = c->dry && data;
    void *p = NULL;
    if (total && (empty || tfm__within_limit(c, total))) p = tfm__alloc_from(&c->allocator, empty ? 0 : bytes);
    if (!p) tfm__fail_memory(c, bytes);
    else if (c->dry) tfm__count(&c->plan, total);
    return p;
}

/* -- arena --------------------------------------------------------------------------------------------------------- */

/* Where made-up addresses start: no machine maps them, and no tensor's end wraps around. */
#if UINTPTR_MAX > 0xffffffffu
#define TFM__DRY_ADDRESS ((uintptr_t)1 << 52)
#else
#define TFM__DRY_ADDRESS ((uintptr_t)TFM__ALIGN)
#endif

/* Adds a chunk that holds at least `need`. A large one first, so that there are few; when memory is short, smaller
 * ones. */
static int tfm__arena_grow(tfm_ctx *c, int64_t need) {
    tfm__arena *a = &c->arena;
    tfm__chunk *chunk = &a->chunk[a->count];
    int64_t size = tfm__max64(need, tfm__round_up(tfm__max64(TFM__CHUNK_BYTES, a->total / 4), TFM__ALIGN));
    if (a->count == TFM__CHUNKS) return 0;
    if (c->dry) {
        if (!tfm__block_bytes(size)) return 0;
        chunk->base = (char *)c->dry_address;
        c->dry_address += (uintptr_t)size + TFM__ALIGN;
        tfm__count(&c->plan, tfm__block_bytes(size));
    } else {
        while (!(chunk->base = (char *)tfm__take(c, size))) {
            if (size == need) return 0;
            size = tfm__max64(need, tfm__round_up(size / 2, TFM__ALIGN));
        }
        tfm__poison(chunk->base, size);
    }
    chunk->size = size;
    chunk->used = 0;
    a->total += size;
    a->count++;
    return 1;
}

/* The next `bytes` of the arena, whole lines, or NULL. */
static char *tfm__arena_place(tfm_ctx *c, int64_t bytes) {
    tfm__arena *a = &c->arena;
    int64_t need;
    int i;
    char *p;
    if (!tfm__add(bytes, TFM__ALIGN + TFM__REDZONE, &need)) return NULL;
    need = tfm__round_up(tfm__max64(bytes, 1), TFM__ALIGN) + TFM__REDZONE;
    for (i = a->current; i < a->count && a->chunk[i].size - a->chunk[i].used < need; i++) continue;
    if (i == a->count && !tfm__arena_grow(c, need)) return NULL;
    a->current = i;
    p = a->chunk[i].base + a->chunk[i].used;
    a->chunk[i].used += need;
    a->used += need;
    a->peak = tfm__max64(a->peak, a->used);
    if (!c->dry) tfm__unpoison(p, bytes);
    return p;
}

/* Memory until the next rewind below, 64-byte aligned, not initialised; NULL after setting the error. In a dry run it
 * is only counted: the address is made up and must not be touched. */
TFM__UNUSED static void *tfm__arena_alloc(tfm_ctx *c, int64_t bytes) {
    char *p = tfm__arena_place(c, bytes);
    if (!p) tfm__fail_memory(c, bytes);
    return p;
}

/* The same zeroed, and real in a dry run too (until its end): for structs, strings, the tape. */
static void *tfm__arena_meta(tfm_ctx *c, int64_t bytes) {
    char *p = tfm__arena_place(c, bytes);
    if (p && c->dry) {
        p = (char *)tfm__take(c, bytes + TFM__ALIGN); /* the first line links them */
        if (p) {
            memcpy(p, &c->dry_meta, sizeof c->dry_meta);
            c->dry_meta = p;
            p += TFM__ALIGN;
        }
    }
    if (p) memset(p, 0, (size_t)bytes);
    else tfm__fail_memory(c, bytes);
    return p;
}

/* Takes the top back to a place; what is behind it is poisoned by tfm__arena_poison once nothing is moved any more. */
static void tfm__arena_back(tfm__arena *a, int chunk, int64_t offset) {
    int i;
    for (i = chunk; i <= a->current && i < a->count; i++) {
        int64_t stays = i == chunk ? offset : 0;
        a->used -= a->chunk[i].used - stays;
        a->chunk[i].used = stays;
    }
    a->current = chunk;
}

static void tfm__arena_poison(const tfm_ctx *c, int first, int last) {
    const tfm__arena *a = &c->arena;
    int i;
    if (!TFM__ASAN || c->dry) return;
    for (i = first; i <= last && i < a->count; i++) {
        tfm__poison(a->chunk[i].base + a->chunk[i].used, a->chunk[i].size - a->chunk[i].used);
    }
}

/* -- tensor headers ------------------------------------------------------------------------------------------------ */

static int tfm__headers_grow(tfm_ctx *c) {
    tfm__headers *h = &c->headers;
    tfm__header_block *block = (tfm__header_block *)tfm__alloc(c, (int64_t)sizeof(tfm__header_block));
    if (!block) return 0;
    block->next = NULL;
    block->used = 0;
    if (h->last) h->last->next = block;
    else h->first = block;
    h->last = block;
    if (!h->fresh) h->fresh = block;
    h->capacity += TFM__HEADERS;
    return 1;
}

/* A zeroed header, alive until a rewind below; NULL after setting the error. Slots never used come first, then those
 * dead the longest; growing depends on the live ones only, so a repeated step does not grow. */
TFM__UNUSED static tfm_tensor *tfm__header_new(tfm_ctx *c) {
    tfm__headers *h = &c->headers;
    tfm_tensor *t;
    if (h->live + TFM__HEADER_REST >= h->capacity && !tfm__headers_grow(c)) return NULL;
    if (h->fresh && h->fresh->used == TFM__HEADERS) h->fresh = h->fresh->next;
    if (h->fresh) {
        t = &h->fresh->slot[h->fresh->used++];
    } else {
        t = h->dead_first;
        h->dead_first = t->next;
        if (!h->dead_first) h->dead_last = NULL;
    }
    memset(t, 0, sizeof *t);
    t->serial = ++c->serial;
    t->generation = (uint64_t)t->serial;
    t->owner = c;
    t->next = h->top;
    h->top = t;
    h->live++;
    return t;
}

TFM__UNUSED static int tfm__alive(const tfm_tensor *t) { return t && t->generation; }

static void tfm__header_kill(tfm__headers *h, tfm_tensor *t) {
    t->generation = 0;
    t->data = NULL;
    t->node = NULL;
    t->next = NULL;
    if (h->dead_last) h->dead_last->next = t;
    else h->dead_first = t;
    h->dead_last = t;
    h->live--;
}

static int64_t tfm__top_serial(const tfm_ctx *c) { return c->headers.top ? c->headers.top->serial : 0; }

/* -- marks --------------------------------------------------------------------------------------------------------- */

enum { TFM__MARK_CHUNK, TFM__MARK_OFFSET, TFM__MARK_TAG, TFM__MARK_SERIAL };

static void tfm__arena_tag(tfm_ctx *c) { c->arena.tag = (int64_t)((uint64_t)(uintptr_t)c << 16) + ++c->tags; }

TFM__UNUSED static tfm_marker tfm__mark(const tfm_ctx *c) {
    const tfm__arena *a = &c->arena;
    tfm_marker mark;
    mark.position[TFM__MARK_CHUNK] = a->current;
    mark.position[TFM__MARK_OFFSET] = a->chunk[a->current].used;
    mark.position[TFM__MARK_TAG] = a->tag;
    mark.position[TFM__MARK_SERIAL] = tfm__top_serial(c);
    return mark;
}

static void tfm__pin_here(const tfm_ctx *c, tfm__pin *pin) {
    pin->on = 1;
    pin->chunk = c->arena.current;
    pin->offset = c->arena.chunk[c->arena.current].used;
    pin->serial = tfm__top_serial(c);
}

/* All that exists now is needed by the tape: said after each record. */
TFM__UNUSED static void tfm__tape_pin(tfm_ctx *c) { tfm__pin_here(c, &c->pin); }
TFM__UNUSED static void tfm__tape_unpin(tfm_ctx *c) { c->pin.on = 0; }
/* 1: a tape is alive, so a layer leaves its scratch where it is. */
TFM__UNUSED static int tfm__recording(const tfm_ctx *c) { return c->pin.on; }

static int tfm__below_pin(const tfm__pin *pin, tfm_marker mark) {
    int64_t chunk = mark.position[TFM__MARK_CHUNK];
    return pin->on && (mark.position[TFM__MARK_SERIAL] < pin->serial || chunk < pin->chunk ||
                       (chunk == pin->chunk && mark.position[TFM__MARK_OFFSET] < pin->offset));
}

/* 1: the mark is of this context and nothing below it was rewound since. The header that was on top then must still be
 * alive: so all that a rewind leaves alive lies below the mark. Sets the error otherwise. */
static int tfm__mark_check(tfm_ctx *c, tfm_marker mark) {
    const tfm__arena *a = &c->arena;
    int64_t chunk = mark.position[TFM__MARK_CHUNK], serial = mark.position[TFM__MARK_SERIAL];
    const tfm_tensor *t = c->headers.top;
    int good = mark.position[TFM__MARK_TAG] == a->tag && chunk >= 0 && chunk <= a->current &&
               mark.position[TFM__MARK_OFFSET] >= 0 &&
               mark.position[TFM__MARK_OFFSET] <= a->chunk[chunk].used;
    while (good && t && t->serial > serial) t = t->next;
    if (!good || (t ? t->serial : 0) != serial) {
        tfm__fail(c, TFM_INVALID, "tfm_rewind: this mark is not alive: something below it was rewound, or it is not of "
                                  "this context");
        return 0;
    }
    if (tfm__below_pin(&c->pin, mark)) {
        tfm__fail(c, TFM_INVALID, "tfm_rewind: results above the mark are recorded for gradients; tfm_tape_clear");
        return 0;
    }
    return 1;
}

/* First and last byte + 1 of what a tensor's elements cover; 0: nothing. */
static int tfm__extent(const tfm_tensor *t, uintptr_t *first, uintptr_t *last) {
    int64_t size = tfm_dtype_size(t->dtype), low = 0, high = 0;
    int i;
    if (!t->data) return 0;
    for (i = 0; i < t->ndim; i++) {
        int64_t reach = (t->shape[i] - 1) * t->stride[i];
        if (t->shape[i] == 0) return 0;
        if (reach < 0) low += reach;
        else high += reach;
    }
    *first = (uintptr_t)t->data - (uintptr_t)(-low * size);
    *last = (uintptr_t)t->data + (uintptr_t)((high + 1) * size);
    return 1;
}

typedef struct tfm__region {  /* whole lines of one chunk that move together */
    int chunk;
    int64_t first, last;      /* offsets in the chunk */
} tfm__region;

/* The lines of the arena, at or above the mark, that hold a tensor; 0: its data is elsewhere or below. */
static int tfm__region_of(const tfm__arena *a, tfm_marker mark, const tfm_tensor *t, tfm__region *r) {
    uintptr_t first, last;
    int i;
    if (!tfm__extent(t, &first, &last)) return 0;
    for (i = (int)mark.position[TFM__MARK_CHUNK]; i < a->count && i <= a->current; i++) {
        uintptr_t base = (uintptr_t)a->chunk[i].base;
        if (first >= base && last <= base + (uintptr_t)a->chunk[i].used) {
            r->chunk = i;
            r->first = (int64_t)(first - base) / TFM__ALIGN * TFM__ALIGN;
            r->last = tfm__round_up((int64_t)(last - base), TFM__ALIGN);
            return i > mark.position[TFM__MARK_CHUNK] || r->first >= mark.position[TFM__MARK_OFFSET];
        }
    }
    return 0;
}

static int tfm__region_after(const tfm__region *a, const tfm__region *b) {
    return a->chunk > b->chunk || (a->chunk == b->chunk && a->first > b->first);
}

/* Sorts regions by place and unites those that touch (a view and its base); returns how many are left. */
static int tfm__regions_merge(tfm__region *r, int count) {
    int i, j, n = 0;
    for (i = 1; i < count; i++) {
        tfm__region x = r[i];
        for (j = i; j > 0 && tfm__region_after(&r[j - 1], &x); j--) r[j] = r[j - 1];
        r[j] = x;
    }
    for (i = 0; i < count; i++) {
        if (n && r[n - 1].chunk == r[i].chunk && r[i].first <= r[n - 1].last) {
            r[n - 1].last = tfm__max64(r[n - 1].last, r[i].last);
        } else {
            r[n++] = r[i];
        }
    }
    return n;
}

/* Frees everything above the mark except the tensors of the list (NULLs, older ones and those in other memory may be
 * among them), whose data moves down. Lowest place first, so nothing is written over before it has moved; what moves
 * fits, at the latest, where it was. 1: done; 0: error set. */
static int tfm__keep_all(tfm_ctx *c, tfm_marker mark, tfm_tensor *const *list, int count) {
    tfm__arena *a = &c->arena;
    tfm__headers *h = &c->headers;
    tfm__region regions[TFM__KEEP_MAX];
    tfm_tensor *move[TFM__KEEP_MAX], *kept = NULL;
    int64_t serial = mark.position[TFM__MARK_SERIAL];
    int i, j, moves = 0, places, first = (int)mark.position[TFM__MARK_CHUNK], last = a->current;
    if (!tfm__mark_check(c, mark)) return 0;
    if (count > TFM__KEEP_MAX) {
        tfm__fail(c, TFM_INVALID, "tfm_keep: %d tensors, at most %d", count, TFM__KEEP_MAX);
        return 0;
    }
    while (h->top && h->top->serial > serial) { /* newest first; the kept ones wait in `kept`, oldest in front */
        tfm_tensor *t = h->top;
        h->top = t->next;
        for (i = 0; i < count && list[i] != t; i++) continue;
        if (i == count) {
            tfm__header_kill(h, t);
            continue;
        }
        t->next = kept;
        kept = t;
        if (tfm__region_of(a, mark, t, &regions[moves])) move[moves++] = t;
    }
    places = tfm__regions_merge(regions, moves);
    tfm__arena_back(a, first, mark.position[TFM__MARK_OFFSET]);
    for (i = 0; i < places; i++) {
        int64_t bytes = regions[i].last - regions[i].first;
        char *from = a->chunk[regions[i].chunk].base + regions[i].first, *to = tfm__arena_place(c, bytes);
        TFM_ASSERT(to);
        if (!c->dry && to != from) {
            tfm__unpoison(from, bytes);
            memmove(to, from, (size_t)bytes);
        }
        for (j = 0; j < moves; j++) {
            uintptr_t offset = move[j] ? (uintptr_t)move[j]->data - (uintptr_t)from : 0;
            if (!move[j] || offset >= (uintptr_t)bytes) continue;
            move[j]->data = to + offset;
            move[j] = NULL;
        }
    }
    while (kept) {
        tfm_tensor *t = kept;
        kept = t->next;
        t->next = h->top;
        h->top = t;
    }
    tfm__arena_poison(c, first, last);
    return 1;
}

/* Frees everything above the mark. 1: done; 0: error set. */
TFM__UNUSED static int tfm__rewind(tfm_ctx *c, tfm_marker mark) { return tfm__keep_all(c, mark, NULL, 0); }

/* tfm__rewind, but t survives. */
TFM__UNUSED static tfm_tensor *tfm__keep(tfm_ctx *c, tfm_marker mark, tfm_tensor *t) {
    return tfm__keep_all(c, mark, &t, 1) ? t : NULL;
}

/* -- growing text in the arena ------------------------------------------------------------------------------------- */

typedef struct tfm__text {  /* zero it and set c; s is NULL as long as nothing was added or memory is out */
    tfm_ctx *c;
    char *s;
    int64_t length, capacity;
} tfm__text;

/* Room for `more` characters and the end. Doubles, so the pieces left behind are no longer than the text. */
static int tfm__text_room(tfm__text *t, int64_t more) {
    int64_t need, capacity;
    char *s;
    if (!tfm__add(t->length, more, &need) || !tfm__add(need, 1, &need)) need = INT64_MAX;
    if (t->s && need <= t->capacity) return 1;
    if (t->capacity < 0) return 0; /* failed before */
    capacity = tfm__max64(need, tfm__max64(256, t->capacity < INT64_MAX / 2 ? t->capacity * 2 : need));
    s = (char *)tfm__arena_meta(t->c, capacity);
    if (s && t->s) memcpy(s, t->s, (size_t)t->length);
    t->s = s;
    t->capacity = s ? capacity : -1;
    return s != NULL;
}

TFM__UNUSED static void tfm__text_bytes(tfm__text *t, const char *bytes, int64_t count) {
    if (!tfm__text_room(t, count)) return;
    memcpy(t->s + t->length, bytes, (size_t)count);
    t->length += count;
    t->s[t->length] = 0;
}

TFM__PRINTF(2, 3)
TFM__UNUSED static void tfm__text_add(tfm__text *t, const char *format, ...) {
    int64_t more = 64;
    while (tfm__text_room(t, more)) {
        int64_t room = t->capacity - t->length;
        va_list list;
        int n;
        va_start(list, format);
        n = vsnprintf(t->s + t->length, (size_t)room, format, list);
        va_end(list);
        if (n >= 0 && n < room) {
            t->length += n;
            return;
        }
        more = n >= 0 ? n : room * 2; /* old C libraries do not say how much */
    }
}

/* -- random numbers ------------------------------------------------------------------------------------------------ */

/* Philox 4x32-10: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Each (seed, stream,
 * counter) has its own four words: no state, so neither threads nor the order of calls matter. */
static void tfm__random_bits(uint64_t seed, uint64_t stream, uint64_t counter, uint32_t out[4]) {
    uint32_t x0 = (uint32_t)counter, x1 = (uint32_t)(counter >> 32);
    uint32_t x2 = (uint32_t)stream, x3 = (uint32_t)(stream >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    int round;
    for (round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * x0, p1 = (uint64_t)0xCD9E8D57u * x2;
        x0 = (uint32_t)(p1 >> 32) ^ x1 ^ k0;
        x2 = (uint32_t)(p0 >> 32) ^ x3 ^ k1;
        x1 = (uint32_t)p1;
        x3 = (uint32_t)p0;
        k0 += 0x9E3779B9u; /* golden ratio */
        k1 += 0xBB67AE85u; /* sqrt(3) - 1 */
    }
    out[0] = x0;
    out[1] = x1;
    out[2] = x2;
    out[3] = x3;
}

/* A stream of its own for each op that draws. */
TFM__UNUSED static uint64_t tfm__random_stream(tfm_ctx *c) { return c->stream++; }

/* ln(u), 0 < u <= 1, within 1e-15. The C library's differs between platforms; +, -, *, / do not. */
static double tfm__log_unit(double u) {
    static const double term[] = {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                                  1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
    double m, s, z, p;
    uint64_t bits;
    int e, i;
    memcpy(&bits, &u, sizeof bits);
    e = (int)(bits >> 52) - 1022;
    bits = (bits & 0xfffffffffffffu) | 0x3fe0000000000000u; /* m in [1/2, 1) */
    memcpy(&m, &bits, sizeof m);
    if (m < 0.70710678118654752) {
        m += m;
        e--;
    }
    s = (m - 1.0) / (m + 1.0); /* ln(m) = 2 artanh(s) = 2 (s + s^3 / 3 + ...), |s| < 0.172 */
    z = s * s;
    p = 0.0;
    for (i = 0; i < TFM__COUNT(term); i++) p = (p + term[i]) * z;
    return (double)e * 0.69314718055994531 + 2.0 * (s + s * p);
}

/* sin and cos of word / 2^32 turns, within 1e-15. */
static void tfm__turn(uint32_t word, double *sine, double *cosine) {
    static const double sine_term[] = {1.0 / 272, 1.0 / 210, 1.0 / 156, 1.0 / 110,
                                       1.0 / 72,  1.0 / 42,  1.0 / 20,  1.0 / 6};
    static const double cosine_term[] = {1.0 / 240, 1.0 / 182, 1.0 / 132, 1.0 / 90,
                                         1.0 / 56,  1.0 / 30,  1.0 / 12,  1.0 / 2};
    uint32_t quarter = (word + 0x20000000u) >> 30;
    double x = (double)(int32_t)(word - (quarter << 30)) * (6.28318530717958648 / 4294967296.0); /* |x| <= pi / 4 */
    double z = x * x, s = 0.0, c = 0.0;
    int i;
    /* sin = x (1 - z/6 (1 - z/20 (...))), cos = 1 - z/2 (1 - z/12 (...)) */
    for (i = 0; i < TFM__COUNT(sine_term); i++) {
        s = (1.0 - s) * z * sine_term[i];
        c = (1.0 - c) * z * cosine_term[i];
    }
    s = x - x * s;
    c = 1.0 - c;
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

/* Four values of one block. Uniform: [0, 1) in steps of 2^-24. */
static void tfm__uniform_block(uint64_t seed, uint64_t stream, uint64_t block, float out[4]) {
    uint32_t bits[4];
    int i;
    tfm__random_bits(seed, stream, block, bits);
    for (i = 0; i < 4; i++) out[i] = (float)(bits[i] >> 8) * (1.0f / 16777216.0f);
}

/* Normal: Box and Muller (1958), two from each pair of words; up to 6.66 deviations. */
static void tfm__normal_block(uint64_t seed, uint64_t stream, uint64_t block, float out[4]) {
    uint32_t bits[4];
    int i;
    tfm__random_bits(seed, stream, block, bits);
    for (i = 0; i < 4; i += 2) {
        double radius = sqrt(-2.0 * tfm__log_unit(((double)bits[i] + 1.0) * (1.0 / 4294967296.0))), sine, cosine;
        tfm__turn(bits[i + 1], &sine, &cosine);
        out[i] = (float)(radius * cosine);
        out[i + 1] = (float)(radius * sine);
    }
}

/* Values first, first + 1, ... of a stream, whatever the pieces they are drawn in. */
static void tfm__random_fill(void (*block)(uint64_t seed, uint64_t stream, uint64_t block, float out[4]), float *out,
                             int64_t count, uint64_t seed, uint64_t stream, uint64_t first) {
    while (count > 0) {
        float four[4];
        int64_t skip = (int64_t)(first % 4), n = tfm__min64(4 - skip, count);
        block(seed, stream, first / 4, n == 4 ? out : four);
        if (n < 4) memcpy(out, four + skip, (size_t)n * sizeof(float));
        out += n;
        count -= n;
        first += (uint64_t)n;
    }
}

TFM__UNUSED static void tfm__uniform_fill(float *out, int64_t count, uint64_t seed, uint64_t stream, uint64_t first) {
    tfm__random_fill(tfm__uniform_block, out, count, seed, stream, first);
}

TFM__UNUSED static void tfm__normal_fill(float *out, int64_t count, uint64_t seed, uint64_t stream, uint64_t first) {
    tfm__random_fill(tfm__normal_block, out, count, seed, stream, first);
}

TFM__UNUSED static float tfm__uniform_at(uint64_t seed, uint64_t stream, uint64_t index) {
    float four[4];
    tfm__uniform_block(seed, stream, index / 4, four);
    return four[index % 4];
}

TFM__UNUSED static float tfm__normal_at(uint64_t seed, uint64_t stream, uint64_t index) {
    float four[4];
    tfm__normal_block(seed, stream, index / 4, four);
    return four[index % 4];
}

/* ==================================================================================================================
 *  3  CPU
 *
 *  What the machine can run. One function executes the instructions and system calls and writes down what they
 *  answered; a pure function makes features of the record, so that tests feed it machines that are not there.
 * ================================================================================================================ */

/* Instruction sets this build has kernels for, besides plain C. MSVC's own AVX-512 is refused until it is tested
 * (Highway calls it broken); gcc for 64-bit Windows does not align the stack for vectors of 32 bytes (gcc PR 54412):
 * compiled code may crash. */
#if TFM__X86 && !defined(TFM_NO_SIMD) && !(defined(__MINGW64__) && !defined(__clang__))
#define TFM__HAVE_X86 1
#else
#define TFM__HAVE_X86 0
#endif
#if TFM__HAVE_X86 && !defined(TFM_NO_AVX2)
#define TFM__HAVE_AVX2 1
#else
#define TFM__HAVE_AVX2 0
#endif
#if TFM__HAVE_X86 && !defined(TFM_NO_AVX512) && (!defined(_MSC_VER) || defined(__clang__))
#define TFM__HAVE_AVX512 1
#else
#define TFM__HAVE_AVX512 0
#endif
#if TFM__HAVE_AVX512 && (defined(__clang__) || __GNUC__ >= 10)
#define TFM__HAVE_BF16_DOT 1 /* the compiler knows the instruction; the processor is asked */
#else
#define TFM__HAVE_BF16_DOT 0
#endif
#if TFM__ARM64 && !defined(TFM_NO_SIMD) && !defined(TFM_NO_NEON)
#define TFM__HAVE_NEON 1
#else
#define TFM__HAVE_NEON 0
#endif

enum { TFM__ARCH_OTHER, TFM__ARCH_X86, TFM__ARCH_ARM64 };

/* Raw answers; all zero where the machine has no such question. A leaf is {eax, ebx, ecx, edx}. */
typedef struct tfm__cpu_record {
    int arch;
    uint32_t leaf0[4], leaf1[4], leaf7[4], leaf7_1[4];
    uint32_t cache[4][4];      /* leaf 4, or AMD's 0x8000001d */
    uint64_t xcr0;
    uint64_t hwcap, hwcap2;    /* Linux's AT_HWCAP words; other systems' answers are put into the same bits */
} tfm__cpu_record;

/* Features beyond what an instruction set's kernels need: a specialised loop may stand on them. */
enum {
    TFM__CPU_AVX_VNNI = 1 << 0, TFM__CPU_AVX512_VNNI = 1 << 1, TFM__CPU_AVX512_BF16 = 1 << 2,
    TFM__CPU_AVX512_FP16 = 1 << 3, TFM__CPU_AVX512_VBMI = 1 << 4,
    TFM__CPU_FP16 = 1 << 8, TFM__CPU_DOTPROD = 1 << 9, TFM__CPU_I8MM = 1 << 10, TFM__CPU_BF16 = 1 << 11,
    TFM__CPU_SVE = 1 << 12
};

typedef struct tfm__cpu {
    uint32_t isas;             /* bit i: TFM_ISA i can run here */
    uint32_t features;         /* TFM__CPU_* */
    int64_t l1d, l2;           /* bytes of one core's caches; a guess where the machine does not tell */
} tfm__cpu;

/* A feature is bit `bit` of register `word` of leaf `leaf`. */
typedef struct tfm__cpu_bit { int leaf, word, bit; } tfm__cpu_bit;
enum { TFM__LEAF1, TFM__LEAF7, TFM__LEAF7_1 };
enum { TFM__EAX, TFM__EBX, TFM__ECX, TFM__EDX };

static int tfm__cpu_has(const tfm__cpu_record *r, tfm__cpu_bit b) {
    const uint32_t *leaf = b.leaf == TFM__LEAF1 ? r->leaf1 : b.leaf == TFM__LEAF7 ? r->leaf7 : r->leaf7_1;
    const uint32_t needed = b.leaf == TFM__LEAF1 ? 1u : 7u;
    if (r->leaf0[TFM__EAX] < needed || (b.leaf == TFM__LEAF7_1 && r->leaf7[TFM__EAX] < 1u)) return 0;
    return (int)(leaf[b.word] >> b.bit & 1u);
}

static int tfm__cpu_has_all(const tfm__cpu_record *r, const tfm__cpu_bit *list, int64_t count) {
    int64_t i;
    for (i = 0; i < count; i++) {
        if (!tfm__cpu_has(r, list[i])) return 0;
    }
    return 1;
}

/* Every name in the target strings of chapter 4, and XSAVE, OSXSAVE: the system saves registers as XCR0 says. */
static const tfm__cpu_bit tfm__bits_avx2[] = {
    {TFM__LEAF1, TFM__ECX, 26}, {TFM__LEAF1, TFM__ECX, 27},                             /* XSAVE, OSXSAVE */
    {TFM__LEAF1, TFM__ECX, 28}, {TFM__LEAF1, TFM__ECX, 12}, {TFM__LEAF1, TFM__ECX, 29}, /* AVX, FMA, F16C */
    {TFM__LEAF7, TFM__EBX, 5}                                                           /* AVX2 */
};
static const tfm__cpu_bit tfm__bits_avx512[] = { /* F, DQ, BW, VL */
    {TFM__LEAF7, TFM__EBX, 16}, {TFM__LEAF7, TFM__EBX, 17}, {TFM__LEAF7, TFM__EBX, 30}, {TFM__LEAF7, TFM__EBX, 31}
};
typedef struct tfm__cpu_extra { uint32_t feature; int isa; tfm__cpu_bit bit; } tfm__cpu_extra;
static const tfm__cpu_extra tfm__cpu_extras[] = {
    {TFM__CPU_AVX_VNNI, TFM_ISA_AVX2, {TFM__LEAF7_1, TFM__EAX, 4}},
    {TFM__CPU_AVX512_VNNI, TFM_ISA_AVX512, {TFM__LEAF7, TFM__ECX, 11}},
    {TFM__CPU_AVX512_BF16, TFM_ISA_AVX512, {TFM__LEAF7_1, TFM__EAX, 5}},
    {TFM__CPU_AVX512_FP16, TFM_ISA_AVX512, {TFM__LEAF7, TFM__EDX, 23}},
    {TFM__CPU_AVX512_VBMI, TFM_ISA_AVX512, {TFM__LEAF7, TFM__ECX, 1}}
};
/* {feature, 0 or 1: hwcap or hwcap2, bit} as in Linux's asm/hwcap.h */
static const uint32_t tfm__arm_extras[][3] = {
    {TFM__CPU_FP16, 0, 10}, {TFM__CPU_DOTPROD, 0, 20}, {TFM__CPU_SVE, 0, 22},
    {TFM__CPU_I8MM, 1, 13}, {TFM__CPU_BF16, 1, 14}
};

/* The record's meaning. Pure. */
TFM__UNUSED static tfm__cpu tfm__cpu_decode(const tfm__cpu_record *r) {
    tfm__cpu cpu;
    int64_t i;
    cpu.isas = 1u << TFM_ISA_SCALAR;
    cpu.features = 0;
    cpu.l1d = 32768;
    cpu.l2 = 524288;
    if (r->arch == TFM__ARCH_ARM64) {
        cpu.isas |= 1u << TFM_ISA_NEON; /* part of the architecture */
        for (i = 0; i < TFM__COUNT(tfm__arm_extras); i++) {
            const uint64_t word = tfm__arm_extras[i][1] ? r->hwcap2 : r->hwcap;
            if (word >> tfm__arm_extras[i][2] & 1u) cpu.features |= tfm__arm_extras[i][0];
        }
    }
    if (r->arch != TFM__ARCH_X86) return cpu;
    if (tfm__cpu_has_all(r, tfm__bits_avx2, TFM__COUNT(tfm__bits_avx2)) && (r->xcr0 & 0x6u) == 0x6u) {
        cpu.isas |= 1u << TFM_ISA_AVX2;
        if (tfm__cpu_has_all(r, tfm__bits_avx512, TFM__COUNT(tfm__bits_avx512)) && (r->xcr0 & 0xe6u) == 0xe6u) {
            cpu.isas |= 1u << TFM_ISA_AVX512;
        }
    }
    for (i = 0; i < TFM__COUNT(tfm__cpu_extras); i++) {
        if ((cpu.isas >> tfm__cpu_extras[i].isa & 1u) && tfm__cpu_has(r, tfm__cpu_extras[i].bit)) {
            cpu.features |= tfm__cpu_extras[i].feature;
        }
    }
    for (i = 0; i < TFM__COUNT(r->cache); i++) {
        const uint32_t *leaf = r->cache[i];
        const uint32_t type = leaf[TFM__EAX] & 31u, level = leaf[TFM__EAX] >> 5 & 7u; /* type 1: data, 3: both */
        const int64_t ways = (int64_t)(leaf[TFM__EBX] >> 22) + 1, parts = (int64_t)(leaf[TFM__EBX] >> 12 & 0x3ffu) + 1;
        const int64_t line = (int64_t)(leaf[TFM__EBX] & 0xfffu) + 1, sets = (int64_t)(leaf[TFM__ECX] & 0xffffffu) + 1;
        if (type != 1 && type != 3) continue;
        if (level == 1) cpu.l1d = ways * parts * line * sets;
        if (level == 2) cpu.l2 = ways * parts * line * sets;
    }
    return cpu;
}

#if TFM__X86
static void tfm__cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) {
#if defined(__GNUC__) || defined(__clang__)
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
#else
    int answer[4];
    __cpuidex(answer, (int)leaf, (int)subleaf);
    out[0] = (uint32_t)answer[0];
    out[1] = (uint32_t)answer[1];
    out[2] = (uint32_t)answer[2];
    out[3] = (uint32_t)answer[3];
#endif
}

static uint64_t tfm__xgetbv(void) {
#if defined(__GNUC__) || defined(__clang__)
    uint32_t low, high;
    /* xgetbv, in a form that old assemblers know, too */
    __asm__ __volatile__(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
#else
    return _xgetbv(0);
#endif
}
#endif

/* Asks the machine. */
TFM__UNUSED static void tfm__cpu_read(tfm__cpu_record *r) {
    memset(r, 0, sizeof *r);
#if TFM__X86
    uint32_t extended[4], i;
    r->arch = TFM__ARCH_X86;
#if defined(__i386__) && (defined(__GNUC__) || defined(__clang__))
    if (!__get_cpuid_max(0, NULL)) return; /* older than the instruction */
#endif
    tfm__cpuid(0, 0, r->leaf0);
    if (r->leaf0[TFM__EAX] >= 1) tfm__cpuid(1, 0, r->leaf1);
    if (r->leaf0[TFM__EAX] >= 7) tfm__cpuid(7, 0, r->leaf7);
    if (r->leaf0[TFM__EAX] >= 7 && r->leaf7[TFM__EAX] >= 1) tfm__cpuid(7, 1, r->leaf7_1);
    if (r->leaf1[TFM__ECX] >> 27 & 1u) r->xcr0 = tfm__xgetbv(); /* without OSXSAVE the instruction faults */
    for (i = 0; i < 4 && r->leaf0[TFM__EAX] >= 4; i++) tfm__cpuid(4, i, r->cache[i]);
    tfm__cpuid(0x80000000u, 0, extended);
    if ((r->cache[0][TFM__EAX] & 31u) == 0 && extended[TFM__EAX] >= 0x8000001du) {
        tfm__cpuid(0x80000001u, 0, extended);
        for (i = 0; i < 4 && (extended[TFM__ECX] >> 22 & 1u); i++) tfm__cpuid(0x8000001du, i, r->cache[i]);
    }
#elif TFM__ARM64
    r->arch = TFM__ARCH_ARM64;
#if TFM__LINUX
    r->hwcap = (uint64_t)getauxval(16);  /* AT_HWCAP */
    r->hwcap2 = (uint64_t)getauxval(26); /* AT_HWCAP2 */
#elif defined(__APPLE__)
    static const char *const names[5] = {
        "hw.optional.arm.FEAT_FP16", "hw.optional.arm.FEAT_DotProd", "", "hw.optional.arm.FEAT_I8MM",
        "hw.optional.arm.FEAT_BF16"
    };
    int i;
    for (i = 0; i < 5; i++) {
        int on = 0;
        size_t size = sizeof on;
        if (!names[i][0] || sysctlbyname(names[i], &on, &size, NULL, 0) != 0 || !on) continue;
        *(tfm__arm_extras[i][1] ? &r->hwcap2 : &r->hwcap) |= (uint64_t)1 << tfm__arm_extras[i][2];
    }
#elif TFM__WINDOWS
    if (IsProcessorFeaturePresent(43)) r->hwcap |= (uint64_t)1 << 20; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */
#endif
#endif
}

/* ==================================================================================================================
 *  4  KERNELS
 *
 *  Written once over the vector shim, compiled once per instruction set: the file includes itself, and only the section
 *  between TFM__PASS and its end is seen then. Functions of a pass are named TFM__FN(name); everything else reaches
 *  them through one constant table per instruction set, struct tfm__kernels. All pointers are to plain arrays; a kernel
 *  never allocates, never fails, uses one thread.
 * ================================================================================================================ */

#define TFM__PANEL 16      /* outputs per panel, on every instruction set: packed weights and caches are portable */
#define TFM__KEY_PANEL 64  /* keys, and columns of cached values, per panel: what one query's tile reads at a step */
#define TFM__BLOCK_KEYS 128 /* keys per attention block; blocks start at multiples of it from position 0 */
#define TFM__SUPER_BLOCKS 16 /* blocks merged into one super-block: the unit of work when keys are split over threads */

/* A b_dtype of products: whole panels of bf16 seen as half as deep panels of 32-bit pairs (k, k + 1), A is row-major in
 * such pairs; depth, a_row and b_panel count pairs. For the BF16 dot product, which adds both to the chain. */
#define TFM__PAIRS 3

/* A product block: C[r, j] = sum over k of A[r, k] * B[j, k], one f32 chain per output, k ascending.
 * B lies as panels of 16 outputs: element (j, k) at b[(j / 16) * b_panel + k * b_row + j % 16] (elements of b_dtype).
 *   packed weight:          b_row = 16, b_panel = 16 * depth
 *   row-major V or B[k, n]: b_row = its row stride, b_panel = 16
 *   keys, values of a cache: the same with 64 for 16 (b_wide), b_row = 64
 * With b_row == 16 and b_panel != 16 a panel is whole (zero padded); otherwise columns past `cols` are not read. */
typedef struct tfm__gemm {
    int64_t rows, cols, depth;
    const float *a;
    /* strips 0: row-major A, a_row its row stride. Else as many strips (pack_strips), a_row the elements between them:
     * tile_rows times the depth they were packed with. */
    int64_t a_row, strips;
    const void *b;
    int b_dtype;               /* TFM_F32; TFM_F16, TFM_BF16 (then strips is 0); TFM__PAIRS */
    int64_t b_row, b_panel;
    /* B as it lies, f32, plain_row its row stride, or NULL: the first strip reads this and writes b's panels. For more
     * than TFM__PLAIN_STRIPS strips, whole pairs of panels, and kernels that keep_b. */
    const float *plain;
    int64_t plain_row;
    int b_wide;                /* 1: panels of TFM__KEY_PANEL columns; the first b_lane of them are left out */
    int64_t b_lane;
    float *c;
    int64_t c_row;
    int accumulate;            /* 1: C holds the sums of the earlier k and the chain goes on from there */
    int activation;            /* TFM_ACT_*: applied with the bias when finish is set */
    int finish;                /* 1: this is the last block of k: add bias, apply activation */
    const float *bias;         /* per column, or NULL */
    const void *next;          /* what is read after this, in one piece, or NULL: few rows fetch it into L2 */
    const void *ahead;         /* rows of a plain B that are packed after this, or NULL: many rows fetch them into L2 */
    int64_t ahead_row, ahead_cols; /* bytes between those rows, and bytes of each */
    int cached;                /* 1: B lies in a cache, though not in L2: few rows fetch it into L1 */
} tfm__gemm;

/* Row operations. Forward ops of one argument; p0, p1 are the op's parameters. */
enum {
    TFM__U_COPY, TFM__U_SCALE /* x * p0 */, TFM__U_SHIFT /* x + p0 */, TFM__U_NEG, TFM__U_ABS, TFM__U_SQRT,
    TFM__U_RSQRT, TFM__U_RECIP,
    TFM__U_EXP, TFM__U_LOG, TFM__U_SIN, TFM__U_COS, TFM__U_TANH, TFM__U_SIGMOID, TFM__U_RELU, TFM__U_GELU /* exact */,
    TFM__U_GELU_TANH, TFM__U_GELU_QUICK, TFM__U_SILU, TFM__U_POW /* x ** p0 */, TFM__U_CLAMP /* [p0, p1] */,
    TFM__U_SOFTCAP /* p0 * tanh(x / p0) */, TFM__U_COUNT
};
enum { TFM__B_ADD, TFM__B_SUB, TFM__B_MUL, TFM__B_DIV, TFM__B_MIN, TFM__B_MAX, TFM__B_POW, TFM__B_COUNT };
enum { TFM__R_SUM, TFM__R_MAX, TFM__R_MIN, TFM__R_SUMSQ, TFM__R_COUNT };

#define TFM__NORM_ROWS 32    /* rows of a norm or softmax in a call: their steps overlap */
#define TFM__NORM_SHORT 1024 /* elements of rows of which L1 holds several */

typedef struct tfm__softmax_row {
    const float *x;
    float *y;                  /* may be x */
    float max, last;           /* the kernel's; last: 1 / sum or log(sum) */
    double sum;
} tfm__softmax_row;

/* layer_norm (the mean is subtracted) or rms_norm of rows of n; weight, bias may be NULL */
typedef struct tfm__norm {
    int64_t n;
    const float *weight, *bias;
    float eps, weight_offset;  /* weight_offset: Gemma's (1 + w) */
    int subtract_mean;
} tfm__norm;

typedef struct tfm__norm_row {
    const float *x, *residual; /* residual may be NULL */
    float *sum;                /* x + residual written here when not NULL */
    float *y;
    float mean, rstd;          /* out */
    float low;                 /* what rounding took from the mean, times -rstd */
    float shift;               /* c of the moments: sums of x - c, of (x - c)^2 */
    double moment[2];
} tfm__norm_row;

/* Rotary positions of rows of n: pairs (i, i + n/2) or, interleaved, (2i, 2i+1); cosine, sine hold n/2 values a row; y
 * may be x. *_row: elements from a row to the next. */
typedef struct tfm__rotary_rows {
    int64_t rows, n;
    int interleaved;
    float *y;
    const float *x, *cosine, *sine;
    int64_t y_row, x_row, table_row;
} tfm__rotary_rows;

/* One attention tile: `rows` queries (of one batch row and one key/value head; in grouped attention rows run over
 * the heads of the group too) against one block of at most TFM__BLOCK_KEYS keys. See chapter 9 for who fills it. */
typedef struct tfm__attn_tile {
    int64_t rows, keys;                 /* rows <= TFM__ATTN_ROWS, keys <= TFM__BLOCK_KEYS */
    int64_t key_size, value_size;
    const float *q; int64_t q_row;      /* scaled queries, f32, rows x key_size */
    const void *k; int k_dtype;         /* panels [key/64][key_size][64] */
    /* above 0: k is at most TFM__FEW_KEYS keys, f32, in rows that far apart, and the queries are still to be scaled */
    int64_t k_row;
    float scale;
    int64_t turn;                       /* above 0: at most 4 rows; k is f32, in rows that far apart */
    /* row-major values, v_row = elements between keys; below 0: panels [value_size/64][128 keys][64], the last one as
     * wide as what is left */
    const void *v; int v_dtype; int64_t v_row;
    const void *after_keys, *after_values; /* what is read after the keys, after the values; or NULL */
    const void *ahead;                  /* rows that are read later, or NULL; ahead_row bytes apart */
    int64_t ahead_row, ahead_bytes;
    float *scores;                      /* rows x TFM__BLOCK_KEYS scratch, row stride TFM__BLOCK_KEYS */
    float *out; int64_t out_row;        /* rows x value_size: this block's own output, unnormalised */
    float *max, *sum;                   /* per row: this block's maximum (-inf: no key) and sum of exp */
    /* per row: scores outside keys [low, high) are -inf, from this place of the first key on; NULL: not said */
    const int64_t *low, *high;
    int64_t key;
    int64_t *finite;                    /* how many leading values of the block are known to be finite; or NULL */
} tfm__attn_tile;
#define TFM__ATTN_ROWS 48               /* a multiple of every instruction set's tile height (12, 6, 4) */
#define TFM__FEW_KEYS 8

typedef struct tfm__scaled_row {
    const float *from;
    float *to;
    char *ahead;
    float by;
} tfm__scaled_row;

struct tfm__kernels {
    int isa;
    const char *name;
    int width;                          /* f32 lanes of a vector */
    int tile_rows;                      /* rows of the product's register tile: A is packed in strips of this height */
    int keep_b;                         /* 1: gemm packs a plain B while its first strip reads it */
    int turn_rows;                      /* rows up to which gemm_turned is faster than packing B; of halves 4 times */
    int64_t block_k, block_m;           /* cache blocks of the product, in elements */

    /* products */
    void (*gemm)(const tfm__gemm *g);
    /* the same for a plain A and a B whose columns lie in rows of memory, b_row elements apart: f32 beside 4 rows at
     * most, or halves; all of depth at once */
    void (*gemm_turned)(const tfm__gemm *g);
    /* dst panels [cols/width][depth][width] (dst_dtype) from src element (j, k) at src[j * src_col + k * src_k]; zero
     * padded columns up to a multiple of 16; width: 16 or 64 */
    void (*pack_panels)(void *dst, int dst_dtype, int64_t width, const void *src, int src_dtype, int64_t src_col,
                        int64_t src_k, int64_t cols, int64_t depth);
    /* the same of a whole weight (cols, depth) in its own dtype, whose panels are not read soon */
    void (*pack_weight)(void *dst, const void *src, int dtype, int64_t cols, int64_t depth);
    /* dst ceil(rows / tile_rows) strips [depth][tile_rows] f32, of as even heights as can be (tfm__strip_begin), from
     * src element (r, k) at src[r * src_row + k * src_k] */
    void (*pack_strips)(float *dst, const void *src, int src_dtype, int64_t src_row, int64_t src_k, int64_t rows,
                        int64_t depth);
    /* dst[r * dst_row + j] = src[j * src_row + r] for r < rows, j < cols */
    void (*transpose)(float *dst, int64_t dst_row, const float *src, int64_t src_row, int64_t rows, int64_t cols);

    /* rows of n elements; y may be x (same pointer) unless said */
    /* any numeric dtype -> f32 */
    void (*load)(float *dst, const void *src, int src_dtype, int64_t src_stride, int64_t n);
    /* f32 -> any: halves to nearest even; ints truncate and saturate, NaN -> 0 */
    void (*store)(void *dst, int dst_dtype, int64_t dst_stride, const float *src, int64_t n);
    void (*unary)(int op, float *y, const float *x, float p0, float p1, int64_t n);
    /* step 0 repeats one element */
    void (*binary)(int op, float *y, const float *a, int a_step, const float *b, int b_step, int64_t n);
    void (*fma_scalar)(float *y, const float *x, float s, int64_t n);                           /* y += s * x */
    /* empty: 0, -inf, +inf, 0 */
    float (*reduce)(int op, const float *x, int64_t n);
    void (*glu)(int activation, float *y, const float *gate, const float *up, int64_t n);        /* act(gate) * up */
    /* a row's bits do not depend on the others; a row of -inf only: zeros (log: -inf) */
    void (*softmax)(tfm__softmax_row *rows, int count, int64_t n, int log_form);
    float (*logsumexp)(const float *x, int64_t n);
    /* a row's bits do not depend on the others */
    void (*norm)(const tfm__norm *a, tfm__norm_row *rows, int count);
    void (*rotary)(const tfm__rotary_rows *a);
    float (*dot)(const float *a, const float *b, int64_t n);

    /* to = from * by, n elements of each row; meanwhile fetches as many bytes at `ahead` into L2 */
    void (*scale_rows)(tfm__scaled_row *row, int64_t rows, int64_t n, int64_t ahead_bytes);
    /* attention: scores = Q K^T, the caller's mask on them, then weights and output of the block */
    /* fills scores[rows][keys]; columns up to the next multiple of 16 are written too */
    void (*attn_scores)(tfm__attn_tile *t);
    /* score := -inf where keep is 0, for a row of scores; both have room for whole vectors */
    void (*attn_keep)(float *score, const unsigned char *keep, int64_t keys);
    /* score += bias, and -inf where bias is, whatever stood there */
    void (*attn_bias)(float *score, const float *bias, int64_t keys);
    /* scores -> max, exp(score - max) in place, sum, out = weights * V; skips masked keys exactly */
    void (*attn_reduce)(tfm__attn_tile *t);
    /* the same in two steps, scores -> weights and weights -> output; the first returns 0, with the maxima alone
     * written, where a score is -inf */
    int (*attn_weigh)(tfm__attn_tile *t);
    void (*attn_values)(tfm__attn_tile *t);
    /* (max, sum, out) of rows += `count` other parts (later and later keys), count * rows <= TFM__ATTN_ROWS: the one
     * merging formula */
    void (*attn_merge)(int64_t count, int64_t rows, int64_t value_size, float *max, float *sum, float *out,
                       int64_t out_row, const float *max2, const float *sum2, const float *out2, int64_t out2_row);
};
typedef struct tfm__kernels tfm__kernels;

/* One register tile of a product: C[r, ...] over `depth` steps; b[i] is where 16 columns (or fewer, then only b[0])
 * begin. */
typedef struct tfm__tile {
    int64_t depth;
    const float *a;
    int64_t a_row, a_step;     /* elements between rows, and from one k to the next */
    const void *b[4];
    int64_t b_row;
    float *keep;               /* where a tile that keeps B puts it: panels, keep_panel elements apart */
    int64_t keep_panel;
    float *c;
    int64_t c_row;
    int accumulate;
    const float *bias;         /* of the columns, added behind the last k; or NULL */
    const char *ahead;         /* what is fetched into L2 meanwhile: ahead_row bytes a step, or that far apart; */
    int64_t ahead_row;         /* 0: nothing; TFM__AHEAD_CACHED: nothing, and B lies in a cache */
} tfm__tile;
#define TFM__AHEAD_CACHED (-1)

/* Where strip i begins when `count` of them share `rows` rows evenly: the first rows % count have one more. */
TFM__UNUSED static int64_t tfm__strip_begin(int64_t rows, int64_t count, int64_t i) {
    return i * (rows / count) + tfm__min64(i, rows % count);
}

/* Rows of a tile that share a register tile of the product, and the keys (whole panels) that any of them attends:
 * nothing else is computed. On a diagonal block, or at a window's ends, that is half of it. */
typedef struct tfm__attn_strip {
    int64_t row, end, first, last;
} tfm__attn_strip;

/* Strip i of a tile; returns 0 behind the last one. Where ranges are not known all rows are one strip. */
TFM__NOINLINE int tfm__attn_strip_of(const tfm__attn_tile *t, int64_t tile_rows, int64_t i, tfm__attn_strip *x) {
    const int64_t count = t->low ? tfm__ceil_div(t->rows, tile_rows) : 1;
    int64_t r;
    if (i >= count || t->rows <= 0) return 0;
    x->row = tfm__strip_begin(t->rows, count, i);
    x->end = tfm__strip_begin(t->rows, count, i + 1);
    x->first = t->low ? t->keys : 0;
    x->last = t->low ? 0 : t->keys;
    for (r = x->row; t->low && r < x->end; ++r) {
        if (t->low[r] >= t->high[r]) continue;
        x->first = tfm__min64(x->first, tfm__max64(0, t->low[r] - t->key));
        x->last = tfm__max64(x->last, tfm__min64(t->keys, t->high[r] - t->key));
    }
    x->first -= x->first % TFM__PANEL;
    if (x->first >= x->last) x->first = x->last = 0;
    return 1;
}

/* Bits of 2/pi behind the binary point, after 32 zeros. */
static const uint32_t tfm__two_over_pi[8] = {
    0u, 0xa2f9836eu, 0x4e441529u, 0xfc2757d1u, 0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe5163abu
};

/* x = *turns * pi/2 + result (modulo 2 pi), |result| <= pi/4, *turns one of 0, 1, 2, 3; right for every finite x: the
 * bits of 2/pi that matter for this exponent are multiplied exactly (Payne and Hanek 1983). NaN for infinities and
 * NaN. */
TFM__UNUSED static float tfm__reduce_angle(float x, float *turns) {
    const uint32_t bits = tfm__float_bits(x) & 0x7fffffffu;
    uint64_t mantissa, window, low, product;
    int64_t fraction;
    unsigned quarter;
    int first;
    double r;
    *turns = 0.0f;
    if (bits >= 0x7f800000u) return tfm__bits_float(0x7fc00000u);
    if (bits <= 0x3f490fdau) return x; /* pi/4 */
    mantissa = (bits & 0x7fffffu) | 0x800000u;
    first = (int)(bits >> 23) - 150 + 30; /* the first bit of the table whose product is below 4 */
    window = ((uint64_t)tfm__two_over_pi[first / 32] << 32) | tfm__two_over_pi[first / 32 + 1];
    low = ((uint64_t)tfm__two_over_pi[first / 32 + 2] << 32) | tfm__two_over_pi[first / 32 + 3];
    if (first % 32) {
        window = (window << (first % 32)) | (low >> (64 - first % 32));
        low <<= first % 32;
    }
    product = mantissa * window + ((mantissa * (low >> 32)) >> 32); /* x * 2/pi modulo 4, in units of 2^-62 */
    quarter = (unsigned)((product + ((uint64_t)1 << 61)) >> 62);
    product -= (uint64_t)quarter << 62;
    fraction = product >> 63 ? -(int64_t)(~product) - 1 : (int64_t)product;
    r = (double)fraction * 3.4061215800865545e-19; /* pi/2 * 2^-62 */
    if (x < 0.0f) {
        r = -r;
        quarter = 4u - quarter;
    }
    *turns = (float)(quarter & 3u);
    return (float)r;
}

/* -- the passes ---------------------------------------------------------------------------------------------------- */

#if defined(__has_include)
#if !__has_include(TFM_SELF)
#error "transformer.h cannot find itself: #define TFM_SELF as the name it is included by, quotes and all"
#endif
#endif

#define TFM__SCALAR 0          /* equal to TFM_ISA_SCALAR ..., for the preprocessor */
#define TFM__NEON 1
#define TFM__AVX2 2
#define TFM__AVX512 3

#define TFM__PASS TFM__SCALAR
#define TFM__FN(name) tfm__##name##_scalar
#include TFM_SELF
#undef TFM__FN
#undef TFM__PASS

#if TFM__HAVE_NEON
#define TFM__PASS TFM__NEON
#define TFM__FN(name) tfm__##name##_neon
#include TFM_SELF
#undef TFM__FN
#undef TFM__PASS
#endif

#if TFM__HAVE_AVX2
#define TFM__PASS TFM__AVX2
#define TFM__FN(name) tfm__##name##_avx2
#include TFM_SELF
#undef TFM__FN
#undef TFM__PASS
#endif

#if TFM__HAVE_AVX512
#define TFM__PASS TFM__AVX512
#define TFM__FN(name) tfm__##name##_avx512
#include TFM_SELF
#undef TFM__FN
#undef TFM__PASS
#endif

#endif /* chapter 4: types and passes */

#if defined(TFM__PASS) /* ------------------------------------------ from here to its end: once per instruction set */

/* The target region. gcc 12 prints false -Wuninitialized from its own AVX-512 header (PR 105593). */
#if TFM__PASS == TFM__AVX2 && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif TFM__PASS == TFM__AVX512 && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#elif TFM__PASS == TFM__SCALAR && TFM__X87
/* In wide registers a sum has other bits wherever the compiler spills differently. Every x86 since 2003 has SSE2. */
#pragma GCC push_options
#pragma GCC target("sse2,fpmath=sse")
#elif TFM__PASS == TFM__AVX2 && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#elif TFM__PASS == TFM__AVX512 && defined(__GNUC__)
#pragma GCC push_options
#if TFM__HAVE_BF16_DOT
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wsign-conversion" /* at -O0 some intrinsics are macros */
#endif

/* ------------------------------------------------------------------------------------------------------------------
 *  The vector shim of this pass. tfm__v: TFM__W floats; tfm__m: a mask of as many lanes; tfm__i: as many 32-bit
 *  integers. v_* work on floats and masks, vi_* on integers. The n of v_loadn / v_storen / v_mask_n is 0 to TFM__W;
 *  memory past n is never touched, lanes past n are zero. Arithmetic is IEEE in the current rounding mode, one
 *  rounding per operation (v_fma: one in all, but two in the scalar pass, where v_fma(a, b, c) is a * b + c in plain
 *  C). v_min, v_max, v_hmin, v_hmax give NaN when any argument is NaN; comparisons with NaN are false.
 * ---------------------------------------------------------------------------------------------------------------- */
#define tfm__v TFM__FN(v)
#define tfm__i TFM__FN(i)
#define tfm__m TFM__FN(m)
#define tfm__g TFM__FN(g)
#define v_zero TFM__FN(v_zero)
#define v_set1 TFM__FN(v_set1)
#define v_iota TFM__FN(v_iota)                  /* 0, 1, 2, ... */
#define v_load TFM__FN(v_load)
#define v_store TFM__FN(v_store)
#define v_loadn TFM__FN(v_loadn)
#define v_storen TFM__FN(v_storen)
#define v_load_h TFM__FN(v_load_h)              /* f16 in memory */
#define v_loadn_h TFM__FN(v_loadn_h)
#define v_store_h TFM__FN(v_store_h)
#define v_storen_h TFM__FN(v_storen_h)
#define v_load_b TFM__FN(v_load_b)              /* bf16 in memory */
#define v_loadn_b TFM__FN(v_loadn_b)
#define v_shuffle_b TFM__FN(v_shuffle_b)        /* x86: bf16 in memory; faster where a register is left */
#define v_store_b TFM__FN(v_store_b)
#define v_storen_b TFM__FN(v_storen_b)
#define v_add TFM__FN(v_add)
#define v_sub TFM__FN(v_sub)
#define v_mul TFM__FN(v_mul)
#define v_div TFM__FN(v_div)
#define v_sqrt TFM__FN(v_sqrt)
#define v_fma TFM__FN(v_fma)                    /* a * b + c */
#define v_fnma TFM__FN(v_fnma)                  /* c - a * b */
#define v_min TFM__FN(v_min)
#define v_max TFM__FN(v_max)
#define v_atleast TFM__FN(v_atleast)            /* the larger; a NaN x stays; of a NaN low either may come. Cheap */
#define v_atmost TFM__FN(v_atmost)              /* the smaller, likewise */
#define v_abs TFM__FN(v_abs)
#define v_neg TFM__FN(v_neg)
#define v_round TFM__FN(v_round)                /* to the nearest integer, ties to even */
#define v_swap TFM__FN(v_swap)                  /* lanes 2i and 2i + 1 exchanged */
#define v_twice TFM__FN(v_twice)                /* TFM__W / 2 floats in memory, each in two lanes */
#define v_copysign TFM__FN(v_copysign)          /* |a| with the sign of b */
#define v_scale2 TFM__FN(v_scale2)    /* x * 2^n for 2^-20 < |x| < 2^20 and integral n in -180..180; a NaN x stays */
#define v_grow_low TFM__FN(v_grow_low)          /* (1 + y) * 2^n for |y| < 0.5 and integral n in -180..60; NaN stays */
#define v_grow_high TFM__FN(v_grow_high)        /* the same for n in -120..128 */
#define v_power2 TFM__FN(v_power2)              /* 2^n for integral n in -126..127; of NaN any number */
#define v_residue TFM__FN(v_residue)            /* p - a * b exactly, p = v_mul(a, b) */
#define v_lt TFM__FN(v_lt)
#define v_le TFM__FN(v_le)
#define v_eq TFM__FN(v_eq)
#define v_isnan TFM__FN(v_isnan)
#define v_negative TFM__FN(v_negative)          /* lanes whose sign bit is set */
#define v_mask_and TFM__FN(v_mask_and)
#define v_mask_or TFM__FN(v_mask_or)
#define v_mask_not TFM__FN(v_mask_not)
#define v_mask_n TFM__FN(v_mask_n)              /* the first n lanes */
#define v_mask_u8 TFM__FN(v_mask_u8)            /* lanes whose byte is not 0 */
#define v_select TFM__FN(v_select)              /* a where the mask is set, else b */
#define v_any TFM__FN(v_any)
#define v_all TFM__FN(v_all)
#define v_sum TFM__FN(v_sum)
#define v_hmax TFM__FN(v_hmax)
#define v_hmin TFM__FN(v_hmin)
#define v_dot TFM__FN(v_dot)                    /* BF16 dot product, AVX-512 alone */
#define v_load_pairs TFM__FN(v_load_pairs)
#define v_loadn_pairs(p, n) v_load_pairs(p)     /* panels are whole */
#define v_prefetch TFM__FN(v_prefetch)          /* into L1 */
#define v_prefetch_l2 TFM__FN(v_prefetch_l2)
#define v_stream TFM__FN(v_stream)              /* a cache line, past the caches; both sides aligned to one */
#define v_fence TFM__FN(v_fence)                /* what was streamed comes before what follows */
#define v_to_i TFM__FN(v_to_i)                  /* nearest even; out of range or NaN: any value */
#define v_from_i TFM__FN(v_from_i)
#define v_as_i TFM__FN(v_as_i)                  /* the bits */
#define vi_as_v TFM__FN(vi_as_v)
#define vi_set1 TFM__FN(vi_set1)
#define vi_add TFM__FN(vi_add)
#define vi_sub TFM__FN(vi_sub)
#define vi_and TFM__FN(vi_and)
#define vi_or TFM__FN(vi_or)
#define vi_xor TFM__FN(vi_xor)
#define vi_gt TFM__FN(vi_gt)                    /* signed */
#define vi_eq TFM__FN(vi_eq)
/* vi_shl(a, n), vi_shr (logical), vi_sar (arithmetic): macros of each pass, n must be a literal */
#define v_exp TFM__FN(v_exp)
#define v_exp2 TFM__FN(v_exp2)
#define v_log TFM__FN(v_log)
#define v_sincos TFM__FN(v_sincos)

/* An operator instead of an intrinsic: clang compiles the bodies in <immintrin.h> and <arm_neon.h> with the flags of
 * the command line, so under -ffp-contract=fast a multiplication and an addition could melt there even where our own
 * code is strict. */
#if defined(__GNUC__) || defined(__clang__)
#define TFM__VOP(a, op, b, intrinsic) ((a) op (b))
#else
#define TFM__VOP(a, op, b, intrinsic) (intrinsic((a), (b)))
#endif

#if TFM__PASS == TFM__AVX512

#define TFM__W 16
typedef __m512 tfm__v;
typedef __m512i tfm__i;
typedef __mmask16 tfm__m;

TFM__ALWAYS_INLINE tfm__m v_mask_n(int64_t n) { return (tfm__m)((1u << n) - 1u); }
TFM__ALWAYS_INLINE tfm__m v_mask_u8(const unsigned char *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm_test_epi8_mask(bytes, bytes);
}
TFM__ALWAYS_INLINE tfm__v v_zero(void) { return _mm512_setzero_ps(); }
TFM__ALWAYS_INLINE tfm__v v_set1(float x) { return _mm512_set1_ps(x); }
TFM__ALWAYS_INLINE tfm__v v_iota(void) {
    return _mm512_setr_ps(0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f,
                          8.0f, 9.0f, 10.0f, 11.0f, 12.0f, 13.0f, 14.0f, 15.0f);
}
TFM__ALWAYS_INLINE tfm__v v_load(const float *p) { return _mm512_loadu_ps(p); }
TFM__ALWAYS_INLINE void v_store(float *p, tfm__v a) { _mm512_storeu_ps(p, a); }
TFM__ALWAYS_INLINE tfm__v v_loadn(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(v_mask_n(n), p); }
TFM__ALWAYS_INLINE void v_storen(float *p, tfm__v a, int64_t n) { _mm512_mask_storeu_ps(p, v_mask_n(n), a); }

TFM__ALWAYS_INLINE tfm__i vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
TFM__ALWAYS_INLINE tfm__i vi_add(tfm__i a, tfm__i b) { return _mm512_add_epi32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_sub(tfm__i a, tfm__i b) { return _mm512_sub_epi32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_and(tfm__i a, tfm__i b) { return _mm512_and_si512(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_or(tfm__i a, tfm__i b) { return _mm512_or_si512(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_xor(tfm__i a, tfm__i b) { return _mm512_xor_si512(a, b); }
#define vi_shl(a, n) _mm512_slli_epi32((a), (n))
#define vi_shr(a, n) _mm512_srli_epi32((a), (n))
#define vi_sar(a, n) _mm512_srai_epi32((a), (n))
TFM__ALWAYS_INLINE tfm__m vi_gt(tfm__i a, tfm__i b) { return _mm512_cmpgt_epi32_mask(a, b); }
TFM__ALWAYS_INLINE tfm__m vi_eq(tfm__i a, tfm__i b) { return _mm512_cmpeq_epi32_mask(a, b); }
TFM__ALWAYS_INLINE tfm__i v_to_i(tfm__v a) { return _mm512_cvtps_epi32(a); }
TFM__ALWAYS_INLINE tfm__v v_from_i(tfm__i a) { return _mm512_cvtepi32_ps(a); }
TFM__ALWAYS_INLINE tfm__i v_as_i(tfm__v a) { return _mm512_castps_si512(a); }
TFM__ALWAYS_INLINE tfm__v vi_as_v(tfm__i a) { return _mm512_castsi512_ps(a); }

TFM__ALWAYS_INLINE tfm__m v_mask_and(tfm__m a, tfm__m b) { return (tfm__m)(a & b); }
TFM__ALWAYS_INLINE tfm__m v_mask_or(tfm__m a, tfm__m b) { return (tfm__m)(a | b); }
TFM__ALWAYS_INLINE tfm__m v_mask_not(tfm__m a) { return (tfm__m)~(unsigned)a; }
TFM__ALWAYS_INLINE int v_any(tfm__m a) { return a != 0; }
TFM__ALWAYS_INLINE int v_all(tfm__m a) { return a == 0xffffu; }
TFM__ALWAYS_INLINE tfm__v v_select(tfm__m m, tfm__v a, tfm__v b) { return _mm512_mask_blend_ps(m, b, a); }
TFM__ALWAYS_INLINE tfm__m v_lt(tfm__v a, tfm__v b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
TFM__ALWAYS_INLINE tfm__m v_le(tfm__v a, tfm__v b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
TFM__ALWAYS_INLINE tfm__m v_eq(tfm__v a, tfm__v b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
TFM__ALWAYS_INLINE tfm__m v_isnan(tfm__v a) { return _mm512_fpclass_ps_mask(a, 0x81); }
TFM__ALWAYS_INLINE tfm__m v_negative(tfm__v a) { return _mm512_movepi32_mask(v_as_i(a)); }

TFM__ALWAYS_INLINE tfm__v v_add(tfm__v a, tfm__v b) { return TFM__VOP(a, +, b, _mm512_add_ps); }
TFM__ALWAYS_INLINE tfm__v v_sub(tfm__v a, tfm__v b) { return TFM__VOP(a, -, b, _mm512_sub_ps); }
TFM__ALWAYS_INLINE tfm__v v_mul(tfm__v a, tfm__v b) { return TFM__VOP(a, *, b, _mm512_mul_ps); }
TFM__ALWAYS_INLINE tfm__v v_div(tfm__v a, tfm__v b) { return TFM__VOP(a, /, b, _mm512_div_ps); }
TFM__ALWAYS_INLINE tfm__v v_sqrt(tfm__v a) { return _mm512_sqrt_round_ps(a, _MM_FROUND_CUR_DIRECTION); }
TFM__ALWAYS_INLINE tfm__v v_fma(tfm__v a, tfm__v b, tfm__v c) {
    return _mm512_fmadd_round_ps(a, b, c, _MM_FROUND_CUR_DIRECTION);
}
TFM__ALWAYS_INLINE tfm__v v_fnma(tfm__v a, tfm__v b, tfm__v c) {
    return _mm512_fnmadd_round_ps(a, b, c, _MM_FROUND_CUR_DIRECTION);
}
/* The instruction returns its second operand when either is NaN. */
TFM__ALWAYS_INLINE tfm__v v_min(tfm__v a, tfm__v b) { return _mm512_mask_mov_ps(_mm512_min_ps(a, b), v_isnan(a), a); }
TFM__ALWAYS_INLINE tfm__v v_max(tfm__v a, tfm__v b) { return _mm512_mask_mov_ps(_mm512_max_ps(a, b), v_isnan(a), a); }
TFM__ALWAYS_INLINE tfm__v v_atleast(tfm__v x, tfm__v low) { return _mm512_max_ps(low, x); }
TFM__ALWAYS_INLINE tfm__v v_atmost(tfm__v x, tfm__v high) { return _mm512_min_ps(high, x); }
TFM__ALWAYS_INLINE tfm__v v_round(tfm__v a) { return _mm512_roundscale_ps(a, 8); }
TFM__ALWAYS_INLINE tfm__v v_swap(tfm__v a) { return _mm512_permute_ps(a, 0xb1); }
TFM__ALWAYS_INLINE tfm__v v_twice(const float *p) {
    const __m512i a = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_moveldup_ps(vi_as_v(a));
}
TFM__ALWAYS_INLINE tfm__v v_scale2(tfm__v x, tfm__v n) { return _mm512_scalef_ps(x, n); }
TFM__ALWAYS_INLINE tfm__v v_grow_low(tfm__v y, tfm__v n) { return v_scale2(v_add(y, v_set1(1.0f)), n); }
TFM__ALWAYS_INLINE tfm__v v_grow_high(tfm__v y, tfm__v n) { return v_scale2(v_add(y, v_set1(1.0f)), n); }
TFM__ALWAYS_INLINE tfm__v v_power2(tfm__v n) { return _mm512_scalef_ps(v_set1(1.0f), n); }

TFM__ALWAYS_INLINE tfm__v v_load_h(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
TFM__ALWAYS_INLINE tfm__v v_loadn_h(const uint16_t *p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_mask_n(n), p));
}
TFM__ALWAYS_INLINE void v_store_h(uint16_t *p, tfm__v a) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TFM__ALWAYS_INLINE void v_storen_h(uint16_t *p, tfm__v a, int64_t n) {
    _mm256_mask_storeu_epi16(p, v_mask_n(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TFM__ALWAYS_INLINE tfm__v TFM__FN(widen_b)(__m256i a) { return vi_as_v(vi_shl(_mm512_cvtepu16_epi32(a), 16)); }
/* Word i to the high half of lane i in one shuffle: two cycles with a multiplication become 1.4 (Zen 4). It takes a
 * register more. */
TFM__ALWAYS_INLINE tfm__v v_shuffle_b(const uint16_t *p) {
    const tfm__i word = _mm512_setr_epi32(0, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16, 6 << 16, 7 << 16, 8 << 16,
                                          9 << 16, 10 << 16, 11 << 16, 12 << 16, 13 << 16, 14 << 16, 15 << 16);
    const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return vi_as_v(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, word, _mm512_castsi256_si512(a)));
}
TFM__ALWAYS_INLINE __m256i TFM__FN(narrow_b)(tfm__v a) {
    const tfm__i bits = v_as_i(a);
    const tfm__i even = vi_and(vi_shr(bits, 16), vi_set1(1));
    const tfm__i rounded = vi_add(vi_add(bits, vi_set1(0x7fff)), even);
    return _mm512_cvtepi32_epi16(vi_shr(_mm512_mask_or_epi32(rounded, v_isnan(a), bits, vi_set1(0x400000)), 16));
}
TFM__ALWAYS_INLINE tfm__v v_load_b(const uint16_t *p) {
    return TFM__FN(widen_b)(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
TFM__ALWAYS_INLINE tfm__v v_loadn_b(const uint16_t *p, int64_t n) {
    return TFM__FN(widen_b)(_mm256_maskz_loadu_epi16(v_mask_n(n), p));
}
TFM__ALWAYS_INLINE void v_store_b(uint16_t *p, tfm__v a) {
    _mm256_storeu_si256((__m256i *)(void *)p, TFM__FN(narrow_b)(a));
}
TFM__ALWAYS_INLINE void v_storen_b(uint16_t *p, tfm__v a, int64_t n) {
    _mm256_mask_storeu_epi16(p, v_mask_n(n), TFM__FN(narrow_b)(a));
}
TFM__ALWAYS_INLINE void v_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
TFM__ALWAYS_INLINE void v_prefetch_l2(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
TFM__ALWAYS_INLINE void v_stream(void *to, const void *p) {
    _mm512_stream_ps((float *)to, _mm512_load_ps((const float *)p));
}
TFM__ALWAYS_INLINE void v_fence(void) { _mm_sfence(); }
#if TFM__HAVE_BF16_DOT
/* c + the products of both bf16 of each lane; and two rows of 16 bf16 as 16 such pairs. */
TFM__ALWAYS_INLINE tfm__v v_dot(tfm__v a, tfm__v b, tfm__v c) {
    return _mm512_dpbf16_ps(c, (__m512bh)v_as_i(a), (__m512bh)v_as_i(b));
}
TFM__ALWAYS_INLINE tfm__v v_load_pairs(const float *p) {
    const tfm__i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009,
                                          0x180008, 0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002,
                                          0x110001, 0x100000);
    return vi_as_v(_mm512_permutexvar_epi16(order, _mm512_loadu_si512(p)));
}
#endif

#endif /* TFM__AVX512 */

#if TFM__PASS == TFM__AVX2

#define TFM__W 8
typedef __m256 tfm__v;
typedef __m256i tfm__i;
typedef __m256 tfm__m;

TFM__ALWAYS_INLINE __m256i TFM__FN(lanes_n)(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TFM__ALWAYS_INLINE tfm__m v_mask_n(int64_t n) { return _mm256_castsi256_ps(TFM__FN(lanes_n)(n)); }
TFM__ALWAYS_INLINE tfm__m v_mask_u8(const unsigned char *p) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
}
TFM__ALWAYS_INLINE tfm__v v_zero(void) { return _mm256_setzero_ps(); }
TFM__ALWAYS_INLINE tfm__v v_set1(float x) { return _mm256_set1_ps(x); }
TFM__ALWAYS_INLINE tfm__v v_iota(void) { return _mm256_setr_ps(0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f); }
TFM__ALWAYS_INLINE tfm__v v_load(const float *p) { return _mm256_loadu_ps(p); }
TFM__ALWAYS_INLINE void v_store(float *p, tfm__v a) { _mm256_storeu_ps(p, a); }
TFM__ALWAYS_INLINE tfm__v v_loadn(const float *p, int64_t n) { return _mm256_maskload_ps(p, TFM__FN(lanes_n)(n)); }
TFM__ALWAYS_INLINE void v_storen(float *p, tfm__v a, int64_t n) { _mm256_maskstore_ps(p, TFM__FN(lanes_n)(n), a); }

TFM__ALWAYS_INLINE tfm__i vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
TFM__ALWAYS_INLINE tfm__i vi_add(tfm__i a, tfm__i b) { return _mm256_add_epi32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_sub(tfm__i a, tfm__i b) { return _mm256_sub_epi32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_and(tfm__i a, tfm__i b) { return _mm256_and_si256(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_or(tfm__i a, tfm__i b) { return _mm256_or_si256(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_xor(tfm__i a, tfm__i b) { return _mm256_xor_si256(a, b); }
#define vi_shl(a, n) _mm256_slli_epi32((a), (n))
#define vi_shr(a, n) _mm256_srli_epi32((a), (n))
#define vi_sar(a, n) _mm256_srai_epi32((a), (n))
TFM__ALWAYS_INLINE tfm__m vi_gt(tfm__i a, tfm__i b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
TFM__ALWAYS_INLINE tfm__m vi_eq(tfm__i a, tfm__i b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
TFM__ALWAYS_INLINE tfm__i v_to_i(tfm__v a) { return _mm256_cvtps_epi32(a); }
TFM__ALWAYS_INLINE tfm__v v_from_i(tfm__i a) { return _mm256_cvtepi32_ps(a); }
TFM__ALWAYS_INLINE tfm__i v_as_i(tfm__v a) { return _mm256_castps_si256(a); }
TFM__ALWAYS_INLINE tfm__v vi_as_v(tfm__i a) { return _mm256_castsi256_ps(a); }

TFM__ALWAYS_INLINE tfm__m v_mask_and(tfm__m a, tfm__m b) { return _mm256_and_ps(a, b); }
TFM__ALWAYS_INLINE tfm__m v_mask_or(tfm__m a, tfm__m b) { return _mm256_or_ps(a, b); }
TFM__ALWAYS_INLINE tfm__m v_mask_not(tfm__m a) { return vi_as_v(vi_xor(v_as_i(a), vi_set1(-1))); }
TFM__ALWAYS_INLINE int v_any(tfm__m a) { return _mm256_movemask_ps(a) != 0; }
TFM__ALWAYS_INLINE int v_all(tfm__m a) { return _mm256_movemask_ps(a) == 0xff; }
TFM__ALWAYS_INLINE tfm__v v_select(tfm__m m, tfm__v a, tfm__v b) { return _mm256_blendv_ps(b, a, m); }
TFM__ALWAYS_INLINE tfm__m v_lt(tfm__v a, tfm__v b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
TFM__ALWAYS_INLINE tfm__m v_le(tfm__v a, tfm__v b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
TFM__ALWAYS_INLINE tfm__m v_eq(tfm__v a, tfm__v b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
TFM__ALWAYS_INLINE tfm__m v_isnan(tfm__v a) {
    return vi_gt(vi_and(v_as_i(a), vi_set1(0x7fffffff)), vi_set1(0x7f800000));
}

TFM__ALWAYS_INLINE tfm__v v_add(tfm__v a, tfm__v b) { return TFM__VOP(a, +, b, _mm256_add_ps); }
TFM__ALWAYS_INLINE tfm__v v_sub(tfm__v a, tfm__v b) { return TFM__VOP(a, -, b, _mm256_sub_ps); }
TFM__ALWAYS_INLINE tfm__v v_mul(tfm__v a, tfm__v b) { return TFM__VOP(a, *, b, _mm256_mul_ps); }
TFM__ALWAYS_INLINE tfm__v v_div(tfm__v a, tfm__v b) { return TFM__VOP(a, /, b, _mm256_div_ps); }
TFM__ALWAYS_INLINE tfm__v v_sqrt(tfm__v a) { return _mm256_sqrt_ps(a); }
TFM__ALWAYS_INLINE tfm__v v_fma(tfm__v a, tfm__v b, tfm__v c) { return _mm256_fmadd_ps(a, b, c); }
TFM__ALWAYS_INLINE tfm__v v_fnma(tfm__v a, tfm__v b, tfm__v c) { return _mm256_fnmadd_ps(a, b, c); }
/* The instruction returns its second operand when either is NaN. */
TFM__ALWAYS_INLINE tfm__v v_min(tfm__v a, tfm__v b) { return _mm256_blendv_ps(_mm256_min_ps(a, b), a, v_isnan(a)); }
TFM__ALWAYS_INLINE tfm__v v_max(tfm__v a, tfm__v b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, v_isnan(a)); }
TFM__ALWAYS_INLINE tfm__v v_atleast(tfm__v x, tfm__v low) { return _mm256_max_ps(low, x); }
TFM__ALWAYS_INLINE tfm__v v_atmost(tfm__v x, tfm__v high) { return _mm256_min_ps(high, x); }
TFM__ALWAYS_INLINE tfm__m v_negative(tfm__v a) { return a; } /* a selection looks at the sign bits alone */
TFM__ALWAYS_INLINE tfm__v v_swap(tfm__v a) { return _mm256_permute_ps(a, 0xb1); }
TFM__ALWAYS_INLINE tfm__v v_twice(const float *p) {
    const __m256i a = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_moveldup_ps(vi_as_v(a));
}
TFM__ALWAYS_INLINE tfm__v v_round(tfm__v a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* AVX2 has no masked access to 16-bit elements: part vectors go through a small array. */
TFM__ALWAYS_INLINE __m128i TFM__FN(load16n)(const uint16_t *p, int64_t n) {
    uint16_t part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t i;
    for (i = 0; i < n; i++) part[i] = p[i];
    return _mm_loadu_si128((const __m128i *)(const void *)part);
}
TFM__ALWAYS_INLINE void TFM__FN(store16n)(uint16_t *p, __m128i a, int64_t n) {
    uint16_t part[8];
    int64_t i;
    _mm_storeu_si128((__m128i *)(void *)part, a);
    for (i = 0; i < n; i++) p[i] = part[i];
}
TFM__ALWAYS_INLINE tfm__v v_load_h(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
TFM__ALWAYS_INLINE tfm__v v_loadn_h(const uint16_t *p, int64_t n) { return _mm256_cvtph_ps(TFM__FN(load16n)(p, n)); }
TFM__ALWAYS_INLINE void v_store_h(uint16_t *p, tfm__v a) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
TFM__ALWAYS_INLINE void v_storen_h(uint16_t *p, tfm__v a, int64_t n) {
    TFM__FN(store16n)(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), n);
}
TFM__ALWAYS_INLINE tfm__v TFM__FN(widen_b)(__m128i a) { return vi_as_v(vi_shl(_mm256_cvtepu16_epi32(a), 16)); }
TFM__ALWAYS_INLINE tfm__v v_shuffle_b(const uint16_t *p) { /* the load repeats all words; see AVX-512 */
    const __m256i bytes = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1,
                                           10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    const __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
    return vi_as_v(_mm256_shuffle_epi8(a, bytes));
}
TFM__ALWAYS_INLINE __m128i TFM__FN(narrow_b)(tfm__v a) {
    const tfm__i bits = v_as_i(a);
    const tfm__i even = vi_and(vi_shr(bits, 16), vi_set1(1));
    const tfm__i rounded = vi_add(vi_add(bits, vi_set1(0x7fff)), even);
    const tfm__v quiet = vi_as_v(vi_or(bits, vi_set1(0x400000)));
    const tfm__i high = vi_shr(v_as_i(v_select(v_isnan(a), quiet, vi_as_v(rounded))), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
TFM__ALWAYS_INLINE tfm__v v_load_b(const uint16_t *p) {
    return TFM__FN(widen_b)(_mm_loadu_si128((const __m128i *)(const void *)p));
}
TFM__ALWAYS_INLINE tfm__v v_loadn_b(const uint16_t *p, int64_t n) { return TFM__FN(widen_b)(TFM__FN(load16n)(p, n)); }
TFM__ALWAYS_INLINE void v_store_b(uint16_t *p, tfm__v a) {
    _mm_storeu_si128((__m128i *)(void *)p, TFM__FN(narrow_b)(a));
}
TFM__ALWAYS_INLINE void v_storen_b(uint16_t *p, tfm__v a, int64_t n) { TFM__FN(store16n)(p, TFM__FN(narrow_b)(a), n); }
TFM__ALWAYS_INLINE void v_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
TFM__ALWAYS_INLINE void v_prefetch_l2(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
TFM__ALWAYS_INLINE void v_stream(void *to, const void *p) {
    _mm256_stream_ps((float *)to, _mm256_load_ps((const float *)p));
    _mm256_stream_ps((float *)to + TFM__W, _mm256_load_ps((const float *)p + TFM__W));
}
TFM__ALWAYS_INLINE void v_fence(void) { _mm_sfence(); }

#endif /* TFM__AVX2 */

#if TFM__PASS == TFM__AVX512 || TFM__PASS == TFM__AVX2

/* Reductions fold the vector in halves; NaN is looked for first because the folding instructions lose it. */
TFM__ALWAYS_INLINE float TFM__FN(sum256)(__m256 a) {
    __m128 s = TFM__VOP(_mm256_castps256_ps128(a), +, _mm256_extractf128_ps(a, 1), _mm_add_ps);
    s = TFM__VOP(s, +, _mm_movehl_ps(s, s), _mm_add_ps);
    s = TFM__VOP(s, +, _mm_shuffle_ps(s, s, 1), _mm_add_ps);
    return _mm_cvtss_f32(s);
}
TFM__ALWAYS_INLINE float TFM__FN(max256)(__m256 a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    s = _mm_max_ps(s, _mm_shuffle_ps(s, s, 1));
    return _mm_cvtss_f32(s);
}
TFM__ALWAYS_INLINE float TFM__FN(min256)(__m256 a) {
    __m128 s = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_min_ps(s, _mm_movehl_ps(s, s));
    s = _mm_min_ps(s, _mm_shuffle_ps(s, s, 1));
    return _mm_cvtss_f32(s);
}
#if TFM__PASS == TFM__AVX512
TFM__ALWAYS_INLINE float v_sum(tfm__v a) {
    return TFM__FN(sum256)(TFM__VOP(_mm512_castps512_ps256(a), +, _mm512_extractf32x8_ps(a, 1), _mm256_add_ps));
}
TFM__ALWAYS_INLINE float v_hmax(tfm__v a) {
    if (v_any(v_isnan(a))) return tfm__bits_float(0x7fc00000u);
    return TFM__FN(max256)(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
TFM__ALWAYS_INLINE float v_hmin(tfm__v a) {
    if (v_any(v_isnan(a))) return tfm__bits_float(0x7fc00000u);
    return TFM__FN(min256)(_mm256_min_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
#else
TFM__ALWAYS_INLINE float v_sum(tfm__v a) { return TFM__FN(sum256)(a); }
TFM__ALWAYS_INLINE float v_hmax(tfm__v a) {
    return v_any(v_isnan(a)) ? tfm__bits_float(0x7fc00000u) : TFM__FN(max256)(a);
}
TFM__ALWAYS_INLINE float v_hmin(tfm__v a) {
    return v_any(v_isnan(a)) ? tfm__bits_float(0x7fc00000u) : TFM__FN(min256)(a);
}
#endif

#endif /* TFM__AVX512 or TFM__AVX2 */

#if TFM__PASS == TFM__NEON

#define TFM__W 4
typedef float32x4_t tfm__v;
typedef int32x4_t tfm__i;
typedef uint32x4_t tfm__m;

TFM__ALWAYS_INLINE tfm__v v_zero(void) { return vdupq_n_f32(0.0f); }
TFM__ALWAYS_INLINE tfm__v v_set1(float x) { return vdupq_n_f32(x); }
TFM__ALWAYS_INLINE tfm__v v_iota(void) {
    const float lanes[4] = {0.0f, 1.0f, 2.0f, 3.0f};
    return vld1q_f32(lanes);
}
TFM__ALWAYS_INLINE tfm__v v_load(const float *p) { return vld1q_f32(p); }
TFM__ALWAYS_INLINE void v_store(float *p, tfm__v a) { vst1q_f32(p, a); }
TFM__ALWAYS_INLINE tfm__v v_loadn(const float *p, int64_t n) {
    tfm__v a = vdupq_n_f32(0.0f);
    if (n >= 4) return vld1q_f32(p);
    if (n > 0) a = vld1q_lane_f32(p, a, 0);
    if (n > 1) a = vld1q_lane_f32(p + 1, a, 1);
    if (n > 2) a = vld1q_lane_f32(p + 2, a, 2);
    return a;
}
TFM__ALWAYS_INLINE void v_storen(float *p, tfm__v a, int64_t n) {
    if (n >= 4) {
        vst1q_f32(p, a);
        return;
    }
    if (n > 0) vst1q_lane_f32(p, a, 0);
    if (n > 1) vst1q_lane_f32(p + 1, a, 1);
    if (n > 2) vst1q_lane_f32(p + 2, a, 2);
}

TFM__ALWAYS_INLINE tfm__v v_swap(tfm__v a) { return vrev64q_f32(a); }
TFM__ALWAYS_INLINE tfm__v v_twice(const float *p) { return vcombine_f32(vld1_dup_f32(p), vld1_dup_f32(p + 1)); }
TFM__ALWAYS_INLINE tfm__i vi_set1(int32_t x) { return vdupq_n_s32(x); }
TFM__ALWAYS_INLINE tfm__i vi_add(tfm__i a, tfm__i b) { return vaddq_s32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_sub(tfm__i a, tfm__i b) { return vsubq_s32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_and(tfm__i a, tfm__i b) { return vandq_s32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_or(tfm__i a, tfm__i b) { return vorrq_s32(a, b); }
TFM__ALWAYS_INLINE tfm__i vi_xor(tfm__i a, tfm__i b) { return veorq_s32(a, b); }
#define vi_shl(a, n) vshlq_n_s32((a), (n))
#define vi_shr(a, n) vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), (n)))
#define vi_sar(a, n) vshrq_n_s32((a), (n))
TFM__ALWAYS_INLINE tfm__m vi_gt(tfm__i a, tfm__i b) { return vcgtq_s32(a, b); }
TFM__ALWAYS_INLINE tfm__m vi_eq(tfm__i a, tfm__i b) { return vceqq_s32(a, b); }
TFM__ALWAYS_INLINE tfm__i v_to_i(tfm__v a) { return vcvtnq_s32_f32(a); }
TFM__ALWAYS_INLINE tfm__v v_from_i(tfm__i a) { return vcvtq_f32_s32(a); }
TFM__ALWAYS_INLINE tfm__i v_as_i(tfm__v a) { return vreinterpretq_s32_f32(a); }
TFM__ALWAYS_INLINE tfm__v vi_as_v(tfm__i a) { return vreinterpretq_f32_s32(a); }

TFM__ALWAYS_INLINE tfm__m v_mask_n(int64_t n) {
    const int32_t lanes[4] = {0, 1, 2, 3};
    return vcgtq_s32(vdupq_n_s32((int32_t)n), vld1q_s32(lanes));
}
TFM__ALWAYS_INLINE tfm__m v_mask_u8(const unsigned char *p) {
    const uint32_t lanes[4] = {p[0], p[1], p[2], p[3]};
    return vtstq_u32(vld1q_u32(lanes), vdupq_n_u32(255));
}
TFM__ALWAYS_INLINE tfm__m v_mask_and(tfm__m a, tfm__m b) { return vandq_u32(a, b); }
TFM__ALWAYS_INLINE tfm__m v_mask_or(tfm__m a, tfm__m b) { return vorrq_u32(a, b); }
TFM__ALWAYS_INLINE tfm__m v_mask_not(tfm__m a) { return vmvnq_u32(a); }
TFM__ALWAYS_INLINE int v_any(tfm__m a) { return vmaxvq_u32(a) != 0; }
TFM__ALWAYS_INLINE int v_all(tfm__m a) { return vminvq_u32(a) != 0; }
TFM__ALWAYS_INLINE tfm__v v_select(tfm__m m, tfm__v a, tfm__v b) { return vbslq_f32(m, a, b); }
TFM__ALWAYS_INLINE tfm__m v_lt(tfm__v a, tfm__v b) { return vcltq_f32(a, b); }
TFM__ALWAYS_INLINE tfm__m v_le(tfm__v a, tfm__v b) { return vcleq_f32(a, b); }
TFM__ALWAYS_INLINE tfm__m v_eq(tfm__v a, tfm__v b) { return vceqq_f32(a, b); }
TFM__ALWAYS_INLINE tfm__m v_isnan(tfm__v a) {
    return vi_gt(vi_and(v_as_i(a), vi_set1(0x7fffffff)), vi_set1(0x7f800000));
}

TFM__ALWAYS_INLINE tfm__v v_add(tfm__v a, tfm__v b) { return TFM__VOP(a, +, b, vaddq_f32); }
TFM__ALWAYS_INLINE tfm__v v_sub(tfm__v a, tfm__v b) { return TFM__VOP(a, -, b, vsubq_f32); }
TFM__ALWAYS_INLINE tfm__v v_mul(tfm__v a, tfm__v b) { return TFM__VOP(a, *, b, vmulq_f32); }
TFM__ALWAYS_INLINE tfm__v v_div(tfm__v a, tfm__v b) { return TFM__VOP(a, /, b, vdivq_f32); }
TFM__ALWAYS_INLINE tfm__v v_sqrt(tfm__v a) { return vsqrtq_f32(a); }
TFM__ALWAYS_INLINE tfm__v v_fma(tfm__v a, tfm__v b, tfm__v c) { return vfmaq_f32(c, a, b); }
TFM__ALWAYS_INLINE tfm__v v_fnma(tfm__v a, tfm__v b, tfm__v c) { return vfmsq_f32(c, a, b); }
TFM__ALWAYS_INLINE tfm__v v_min(tfm__v a, tfm__v b) { return vminq_f32(a, b); }
TFM__ALWAYS_INLINE tfm__v v_max(tfm__v a, tfm__v b) { return vmaxq_f32(a, b); }
TFM__ALWAYS_INLINE tfm__v v_atleast(tfm__v x, tfm__v low) { return vmaxq_f32(low, x); }
TFM__ALWAYS_INLINE tfm__v v_atmost(tfm__v x, tfm__v high) { return vminq_f32(high, x); }
TFM__ALWAYS_INLINE tfm__m v_negative(tfm__v a) { return vcltzq_s32(v_as_i(a)); }
TFM__ALWAYS_INLINE tfm__v v_round(tfm__v a) { return vrndnq_f32(a); }
TFM__ALWAYS_INLINE float v_sum(tfm__v a) { return vaddvq_f32(a); }
TFM__ALWAYS_INLINE float v_hmax(tfm__v a) { return vmaxvq_f32(a); }
TFM__ALWAYS_INLINE float v_hmin(tfm__v a) { return vminvq_f32(a); }

TFM__ALWAYS_INLINE uint16x4_t TFM__FN(load16n)(const uint16_t *p, int64_t n) {
    uint16x4_t a = vdup_n_u16(0);
    if (n >= 4) return vld1_u16(p);
    if (n > 0) a = vld1_lane_u16(p, a, 0);
    if (n > 1) a = vld1_lane_u16(p + 1, a, 1);
    if (n > 2) a = vld1_lane_u16(p + 2, a, 2);
    return a;
}
TFM__ALWAYS_INLINE void TFM__FN(store16n)(uint16_t *p, uint16x4_t a, int64_t n) {
    if (n >= 4) {
        vst1_u16(p, a);
        return;
    }
    if (n > 0) vst1_lane_u16(p, a, 0);
    if (n > 1) vst1_lane_u16(p + 1, a, 1);
    if (n > 2) vst1_lane_u16(p + 2, a, 2);
}
TFM__ALWAYS_INLINE tfm__v TFM__FN(widen_h)(uint16x4_t a) { return vcvt_f32_f16(vreinterpret_f16_u16(a)); }
TFM__ALWAYS_INLINE uint16x4_t TFM__FN(narrow_h)(tfm__v a) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }
TFM__ALWAYS_INLINE tfm__v TFM__FN(widen_b)(uint16x4_t a) { return vreinterpretq_f32_u32(vshll_n_u16(a, 16)); }
TFM__ALWAYS_INLINE uint16x4_t TFM__FN(narrow_b)(tfm__v a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t even = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), even);
    return vshrn_n_u32(vbslq_u32(v_isnan(a), vorrq_u32(bits, vdupq_n_u32(0x400000)), rounded), 16);
}
TFM__ALWAYS_INLINE tfm__v v_load_h(const uint16_t *p) { return TFM__FN(widen_h)(vld1_u16(p)); }
TFM__ALWAYS_INLINE tfm__v v_loadn_h(const uint16_t *p, int64_t n) { return TFM__FN(widen_h)(TFM__FN(load16n)(p, n)); }
TFM__ALWAYS_INLINE void v_store_h(uint16_t *p, tfm__v a) { vst1_u16(p, TFM__FN(narrow_h)(a)); }
TFM__ALWAYS_INLINE void v_storen_h(uint16_t *p, tfm__v a, int64_t n) { TFM__FN(store16n)(p, TFM__FN(narrow_h)(a), n); }
TFM__ALWAYS_INLINE tfm__v v_load_b(const uint16_t *p) { return TFM__FN(widen_b)(vld1_u16(p)); }
TFM__ALWAYS_INLINE tfm__v v_loadn_b(const uint16_t *p, int64_t n) { return TFM__FN(widen_b)(TFM__FN(load16n)(p, n)); }
TFM__ALWAYS_INLINE void v_store_b(uint16_t *p, tfm__v a) { vst1_u16(p, TFM__FN(narrow_b)(a)); }
TFM__ALWAYS_INLINE void v_storen_b(uint16_t *p, tfm__v a, int64_t n) { TFM__FN(store16n)(p, TFM__FN(narrow_b)(a), n); }
#if defined(__GNUC__) || defined(__clang__)
TFM__ALWAYS_INLINE void v_prefetch(const void *p) { __builtin_prefetch(p); }
TFM__ALWAYS_INLINE void v_prefetch_l2(const void *p) { __builtin_prefetch(p, 0, 2); }
#else
TFM__ALWAYS_INLINE void v_prefetch(const void *p) { __prefetch(p); }
TFM__ALWAYS_INLINE void v_prefetch_l2(const void *p) { __prefetch(p); }
#endif
TFM__ALWAYS_INLINE void v_stream(void *to, const void *p) { memcpy(to, p, 64); }
TFM__ALWAYS_INLINE void v_fence(void) { }

#endif /* TFM__NEON */

#if TFM__PASS == TFM__SCALAR

#define TFM__W 4
typedef struct { float e[4]; } tfm__v;
typedef struct { uint32_t e[4]; } tfm__i;
typedef struct { uint32_t e[4]; } tfm__m;   /* 0 or all ones */

/* One function over the four lanes, written out: compilers keep such structs in registers only when no loop indexes
 * them. */
#define TFM__LANES1(result, name, type, f) \
    TFM__ALWAYS_INLINE result name(type a) { \
        result r; \
        r.e[0] = f(a.e[0]); r.e[1] = f(a.e[1]); r.e[2] = f(a.e[2]); r.e[3] = f(a.e[3]); \
        return r; \
    }
#define TFM__LANES2(result, name, type, f) \
    TFM__ALWAYS_INLINE result name(type a, type b) { \
        result r; \
        r.e[0] = f(a.e[0], b.e[0]); r.e[1] = f(a.e[1], b.e[1]); \
        r.e[2] = f(a.e[2], b.e[2]); r.e[3] = f(a.e[3], b.e[3]); \
        return r; \
    }
#define TFM__LANES3(result, name, type, f) \
    TFM__ALWAYS_INLINE result name(type a, type b, type c) { \
        result r; \
        r.e[0] = f(a.e[0], b.e[0], c.e[0]); r.e[1] = f(a.e[1], b.e[1], c.e[1]); \
        r.e[2] = f(a.e[2], b.e[2], c.e[2]); r.e[3] = f(a.e[3], b.e[3], c.e[3]); \
        return r; \
    }
TFM__ALWAYS_INLINE float TFM__FN(min1)(float a, float b) {
    return tfm__isnan(a) ? a : tfm__isnan(b) || b < a ? b : a;
}
TFM__ALWAYS_INLINE float TFM__FN(max1)(float a, float b) {
    return tfm__isnan(a) ? a : tfm__isnan(b) || b > a ? b : a;
}
/* Through an integer and not by adding 2^23: right in registers wider than a float, too (x87). */
TFM__ALWAYS_INLINE float TFM__FN(round1)(float a) {
    int32_t whole;
    float rest, r;
    if (!(a > -8388608.0f && a < 8388608.0f)) return a;
    whole = (int32_t)a;
    rest = a - (float)whole;
    if (rest > 0.5f || (rest == 0.5f && (whole & 1))) whole++;
    if (rest < -0.5f || (rest == -0.5f && (whole & 1))) whole--;
    r = (float)whole;
    return tfm__bits_float((tfm__float_bits(r) & 0x7fffffffu) | (tfm__float_bits(a) & 0x80000000u));
}
TFM__ALWAYS_INLINE uint32_t TFM__FN(to_i1)(float a) {
    return a > -2147483648.0f && a < 2147483648.0f ? (uint32_t)(int32_t)TFM__FN(round1)(a) : 0x80000000u;
}
#define TFM__ADD1(a, b) ((a) + (b))
#define TFM__SUB1(a, b) ((a) - (b))
#define TFM__MUL1(a, b) ((a) * (b))
#define TFM__DIV1(a, b) ((a) / (b))
#define TFM__FMA1(a, b, c) ((a) * (b) + (c))
#define TFM__FNMA1(a, b, c) ((c) - (a) * (b))
#define TFM__ATLEAST1(x, low) ((x) < (low) ? (low) : (x))
#define TFM__ATMOST1(x, high) ((x) > (high) ? (high) : (x))
#define TFM__NEGATIVE1(a) (0u - (tfm__float_bits(a) >> 31))
#define TFM__LT1(a, b) ((a) < (b) ? 0xffffffffu : 0u)
#define TFM__LE1(a, b) ((a) <= (b) ? 0xffffffffu : 0u)
#define TFM__EQ1(a, b) ((a) == (b) ? 0xffffffffu : 0u)
#define TFM__NAN1(a) (tfm__isnan(a) ? 0xffffffffu : 0u)
#define TFM__AND1(a, b) ((a) & (b))
#define TFM__OR1(a, b) ((a) | (b))
#define TFM__XOR1(a, b) ((a) ^ (b))
#define TFM__NOT1(a) (~(a))
#define TFM__GT1(a, b) ((int32_t)(a) > (int32_t)(b) ? 0xffffffffu : 0u)
#define TFM__FROM1(a) ((float)(int32_t)(a))
TFM__LANES2(tfm__v, v_add, tfm__v, TFM__ADD1)
TFM__LANES2(tfm__v, v_sub, tfm__v, TFM__SUB1)
TFM__LANES2(tfm__v, v_mul, tfm__v, TFM__MUL1)
TFM__LANES2(tfm__v, v_div, tfm__v, TFM__DIV1)
TFM__LANES1(tfm__v, v_sqrt, tfm__v, sqrtf)
TFM__LANES3(tfm__v, v_fma, tfm__v, TFM__FMA1)
TFM__LANES3(tfm__v, v_fnma, tfm__v, TFM__FNMA1)
TFM__LANES2(tfm__v, v_min, tfm__v, TFM__FN(min1))
TFM__LANES2(tfm__v, v_max, tfm__v, TFM__FN(max1))
TFM__LANES2(tfm__v, v_atleast, tfm__v, TFM__ATLEAST1)
TFM__LANES2(tfm__v, v_atmost, tfm__v, TFM__ATMOST1)
TFM__LANES1(tfm__v, v_round, tfm__v, TFM__FN(round1))
TFM__LANES2(tfm__m, v_lt, tfm__v, TFM__LT1)
TFM__LANES2(tfm__m, v_le, tfm__v, TFM__LE1)
TFM__LANES2(tfm__m, v_eq, tfm__v, TFM__EQ1)
TFM__LANES1(tfm__m, v_isnan, tfm__v, TFM__NAN1)
TFM__LANES1(tfm__m, v_negative, tfm__v, TFM__NEGATIVE1)
TFM__LANES2(tfm__m, v_mask_and, tfm__m, TFM__AND1)
TFM__LANES2(tfm__m, v_mask_or, tfm__m, TFM__OR1)
TFM__LANES1(tfm__m, v_mask_not, tfm__m, TFM__NOT1)
TFM__LANES2(tfm__i, vi_add, tfm__i, TFM__ADD1)
TFM__LANES2(tfm__i, vi_sub, tfm__i, TFM__SUB1)
TFM__LANES2(tfm__i, vi_and, tfm__i, TFM__AND1)
TFM__LANES2(tfm__i, vi_or, tfm__i, TFM__OR1)
TFM__LANES2(tfm__i, vi_xor, tfm__i, TFM__XOR1)
TFM__LANES2(tfm__m, vi_gt, tfm__i, TFM__GT1)
TFM__LANES2(tfm__m, vi_eq, tfm__i, TFM__EQ1)
TFM__LANES1(tfm__i, v_to_i, tfm__v, TFM__FN(to_i1))
TFM__LANES1(tfm__v, v_from_i, tfm__i, TFM__FROM1)
TFM__LANES1(tfm__i, v_as_i, tfm__v, tfm__float_bits)
TFM__LANES1(tfm__v, vi_as_v, tfm__i, tfm__bits_float)
#define vi_shl(a, n) TFM__FN(shl)((a), (n))
#define vi_shr(a, n) TFM__FN(shr)((a), (n))
#define vi_sar(a, n) TFM__FN(sar)((a), (n))
TFM__ALWAYS_INLINE tfm__i TFM__FN(shl)(tfm__i a, int n) {
    tfm__i r;
    r.e[0] = a.e[0] << n; r.e[1] = a.e[1] << n; r.e[2] = a.e[2] << n; r.e[3] = a.e[3] << n;
    return r;
}
TFM__ALWAYS_INLINE tfm__i TFM__FN(shr)(tfm__i a, int n) {
    tfm__i r;
    r.e[0] = a.e[0] >> n; r.e[1] = a.e[1] >> n; r.e[2] = a.e[2] >> n; r.e[3] = a.e[3] >> n;
    return r;
}
TFM__ALWAYS_INLINE tfm__i TFM__FN(sar)(tfm__i a, int n) {
    tfm__i r;
    r.e[0] = (uint32_t)((int32_t)a.e[0] >> n); r.e[1] = (uint32_t)((int32_t)a.e[1] >> n);
    r.e[2] = (uint32_t)((int32_t)a.e[2] >> n); r.e[3] = (uint32_t)((int32_t)a.e[3] >> n);
    return r;
}
TFM__ALWAYS_INLINE tfm__i vi_set1(int32_t x) {
    tfm__i r;
    r.e[0] = r.e[1] = r.e[2] = r.e[3] = (uint32_t)x;
    return r;
}
TFM__ALWAYS_INLINE tfm__v v_set1(float x) {
    tfm__v r;
    r.e[0] = r.e[1] = r.e[2] = r.e[3] = x;
    return r;
}
TFM__ALWAYS_INLINE tfm__v v_zero(void) { return v_set1(0.0f); }
TFM__ALWAYS_INLINE tfm__v v_swap(tfm__v a) {
    tfm__v r;
    r.e[0] = a.e[1]; r.e[1] = a.e[0]; r.e[2] = a.e[3]; r.e[3] = a.e[2];
    return r;
}
TFM__ALWAYS_INLINE tfm__v v_twice(const float *p) {
    tfm__v r;
    r.e[0] = r.e[1] = p[0]; r.e[2] = r.e[3] = p[1];
    return r;
}
TFM__ALWAYS_INLINE tfm__v v_iota(void) {
    tfm__v r;
    r.e[0] = 0.0f; r.e[1] = 1.0f; r.e[2] = 2.0f; r.e[3] = 3.0f;
    return r;
}
TFM__ALWAYS_INLINE tfm__m v_mask_n(int64_t n) {
    tfm__m r;
    r.e[0] = n > 0 ? 0xffffffffu : 0u; r.e[1] = n > 1 ? 0xffffffffu : 0u;
    r.e[2] = n > 2 ? 0xffffffffu : 0u; r.e[3] = n > 3 ? 0xffffffffu : 0u;
    return r;
}
TFM__ALWAYS_INLINE tfm__m v_mask_u8(const unsigned char *p) {
    tfm__m r;
    r.e[0] = 0u - (uint32_t)(p[0] != 0); r.e[1] = 0u - (uint32_t)(p[1] != 0);
    r.e[2] = 0u - (uint32_t)(p[2] != 0); r.e[3] = 0u - (uint32_t)(p[3] != 0);
    return r;
}
TFM__ALWAYS_INLINE int v_any(tfm__m a) { return (a.e[0] | a.e[1] | a.e[2] | a.e[3]) != 0; }
TFM__ALWAYS_INLINE int v_all(tfm__m a) { return (a.e[0] & a.e[1] & a.e[2] & a.e[3]) != 0; }
TFM__ALWAYS_INLINE tfm__v v_select(tfm__m m, tfm__v a, tfm__v b) {
    tfm__v r;
    r.e[0] = m.e[0] ? a.e[0] : b.e[0]; r.e[1] = m.e[1] ? a.e[1] : b.e[1];
    r.e[2] = m.e[2] ? a.e[2] : b.e[2]; r.e[3] = m.e[3] ? a.e[3] : b.e[3];
    return r;
}
TFM__ALWAYS_INLINE float v_sum(tfm__v a) { return (a.e[0] + a.e[2]) + (a.e[1] + a.e[3]); }
TFM__ALWAYS_INLINE float v_hmax(tfm__v a) {
    return TFM__FN(max1)(TFM__FN(max1)(a.e[0], a.e[1]), TFM__FN(max1)(a.e[2], a.e[3]));
}
TFM__ALWAYS_INLINE float v_hmin(tfm__v a) {
    return TFM__FN(min1)(TFM__FN(min1)(a.e[0], a.e[1]), TFM__FN(min1)(a.e[2], a.e[3]));
}
/* Loads and stores of one element type, whole and of n lanes; inlined where they are a few instructions. */
#define TFM__LANES_MEMORY(how, load, loadn, store, storen, type, widen, narrow) \
    how tfm__v load(const type *p) { \
        tfm__v r; \
        r.e[0] = widen(p[0]); r.e[1] = widen(p[1]); r.e[2] = widen(p[2]); r.e[3] = widen(p[3]); \
        return r; \
    } \
    TFM__NOINLINE tfm__v loadn(const type *p, int64_t n) { \
        tfm__v r; \
        r.e[0] = n > 0 ? widen(p[0]) : 0.0f; r.e[1] = n > 1 ? widen(p[1]) : 0.0f; \
        r.e[2] = n > 2 ? widen(p[2]) : 0.0f; r.e[3] = n > 3 ? widen(p[3]) : 0.0f; \
        return r; \
    } \
    how void store(type *p, tfm__v a) { \
        p[0] = narrow(a.e[0]); p[1] = narrow(a.e[1]); p[2] = narrow(a.e[2]); p[3] = narrow(a.e[3]); \
    } \
    TFM__NOINLINE void storen(type *p, tfm__v a, int64_t n) { \
        if (n > 0) p[0] = narrow(a.e[0]); \
        if (n > 1) p[1] = narrow(a.e[1]); \
        if (n > 2) p[2] = narrow(a.e[2]); \
        if (n > 3) p[3] = narrow(a.e[3]); \
    }
#define TFM__SAME1(a) (a)
TFM__LANES_MEMORY(TFM__ALWAYS_INLINE, v_load, v_loadn, v_store, v_storen, float, TFM__SAME1, TFM__SAME1)
TFM__LANES_MEMORY(TFM__NOINLINE, v_load_h, v_loadn_h, v_store_h, v_storen_h, uint16_t, tfm__f16_to_f32,
                  tfm__f32_to_f16)
TFM__LANES_MEMORY(TFM__ALWAYS_INLINE, v_load_b, v_loadn_b, v_store_b, v_storen_b, uint16_t, tfm__bf16_to_f32,
                  tfm__f32_to_bf16)
TFM__ALWAYS_INLINE void v_prefetch(const void *p) { (void)p; }
TFM__ALWAYS_INLINE void v_prefetch_l2(const void *p) { (void)p; }
TFM__ALWAYS_INLINE void v_stream(void *to, const void *p) { memcpy(to, p, 64); }
TFM__ALWAYS_INLINE void v_fence(void) { }

#endif /* TFM__SCALAR */

/* ------------------------------------------------------------------------------------------------------------------
 *  What every pass builds from the above.
 * ---------------------------------------------------------------------------------------------------------------- */
TFM__ALWAYS_INLINE tfm__v v_abs(tfm__v a) { return vi_as_v(vi_and(v_as_i(a), vi_set1(0x7fffffff))); }
TFM__ALWAYS_INLINE tfm__v v_neg(tfm__v a) { return vi_as_v(vi_xor(v_as_i(a), vi_set1(INT32_MIN))); }
TFM__ALWAYS_INLINE tfm__v v_copysign(tfm__v magnitude, tfm__v sign) {
    return vi_as_v(vi_or(vi_and(v_as_i(magnitude), vi_set1(0x7fffffff)), vi_and(v_as_i(sign), vi_set1(INT32_MIN))));
}

#if TFM__PASS == TFM__SCALAR /* 12 bits of each factor at a time: their products are exact */
TFM__ALWAYS_INLINE tfm__v v_residue(tfm__v a, tfm__v b, tfm__v p) {
    const tfm__v ah = vi_as_v(vi_and(v_as_i(a), vi_set1(-4096))), al = v_sub(a, ah);
    const tfm__v bh = vi_as_v(vi_and(v_as_i(b), vi_set1(-4096))), bl = v_sub(b, bh);
    return v_fnma(al, bl, v_fnma(al, bh, v_fnma(ah, bl, v_fnma(ah, bh, p))));
}
#else
TFM__ALWAYS_INLINE tfm__v v_residue(tfm__v a, tfm__v b, tfm__v p) { return v_fnma(a, b, p); }
#endif

#if TFM__PASS != TFM__AVX512
TFM__ALWAYS_INLINE tfm__v TFM__FN(power2)(tfm__i n) { return vi_as_v(vi_shl(vi_add(n, vi_set1(127)), 23)); }

TFM__ALWAYS_INLINE tfm__v v_power2(tfm__v n) { return TFM__FN(power2)(v_to_i(n)); }

/* With 2^64 or 1/2 as a factor for a moment n goes into the exponent at once: half of v_scale2's operations. */
TFM__ALWAYS_INLINE tfm__v TFM__FN(grow)(tfm__v y, tfm__v n, float by, float back) {
    const tfm__v x = v_fma(y, v_set1(by), v_set1(by));
    return v_mul(vi_as_v(vi_add(v_as_i(x), vi_shl(v_to_i(n), 23))), v_set1(back));
}
TFM__ALWAYS_INLINE tfm__v v_grow_low(tfm__v y, tfm__v n) {
    return TFM__FN(grow)(y, n, 18446744073709551616.0f, 5.42101086e-20f);
}
TFM__ALWAYS_INLINE tfm__v v_grow_high(tfm__v y, tfm__v n) { return TFM__FN(grow)(y, n, 0.5f, 2.0f); }

/* Half of n goes into the exponent of x at once, the rest, which may end among subnormals, by a product. */
TFM__ALWAYS_INLINE tfm__v v_scale2(tfm__v x, tfm__v n) {
    const tfm__i whole = v_to_i(n);
    const tfm__i half = vi_sar(whole, 1);
    return v_mul(vi_as_v(vi_add(v_as_i(x), vi_shl(half, 23))), TFM__FN(power2)(vi_sub(whole, half)));
}
#endif

/* ------------------------------------------------------------------------------------------------------------------
 *  Vector math. Polynomials are least-maximum fits of our own in 120-bit arithmetic, their coefficients rounded one
 *  after the other, each time refitting the rest; own error below 0.08 ULP everywhere.
 * ---------------------------------------------------------------------------------------------------------------- */

/* A group: vectors that one function works on side by side, step by step. Each is a chain of 10 to 20 dependent
 * operations of 3 or 4 cycles; one after the other, a core sees too few of them ahead to keep its units busy (AVX2, Zen
 * 4: exp in 10 cycles a vector, 8 in groups). count <= TFM__G is a constant where it is inlined, and so is u. Plain C
 * has each curve once, not in every kernel: up to a fifth slower, 16 KB less. */
#if TFM__PASS == TFM__SCALAR
#define TFM__G 1
#define TFM__CURVE TFM__NOINLINE
#define TFM__EACH(...) { enum { u = 0 }; (void)count; __VA_ARGS__; }
#else
#define TFM__G 4
#define TFM__CURVE TFM__ALWAYS_INLINE
#define TFM__EACH(...) \
    { enum { u = 0 }; __VA_ARGS__; } \
    if (count > 1) { enum { u = 1 }; __VA_ARGS__; } \
    if (count > 2) { enum { u = 2 }; __VA_ARGS__; } \
    if (count > 3) { enum { u = 3 }; __VA_ARGS__; }
#endif
typedef tfm__v tfm__g[4];

/* exp(r) - 1 for |r| <= ln(2)/2 */
TFM__CURVE void TFM__FN(g_expm1)(tfm__v *y, const tfm__v *r, const int count) {
    TFM__EACH(y[u] = v_fma(v_set1(0.00138204172f), r[u], v_set1(0.00836868491f)))
    TFM__EACH(y[u] = v_fma(y[u], r[u], v_set1(0.0416682698f)))
    TFM__EACH(y[u] = v_fma(y[u], r[u], v_set1(0.166665211f)))
    TFM__EACH(y[u] = v_fma(y[u], r[u], v_set1(0.49999994f)))
    TFM__EACH(y[u] = v_fma(y[u], v_mul(r[u], r[u]), r[u]))
}

/* n and r of exp(x) = 2^n exp(r), |r| <= ln(2)/2; x := r. ln(2) in two parts: n times the first (9 bits) is exact. */
TFM__CURVE void TFM__FN(g_split)(tfm__v *n, tfm__v *x, const int count) {
    TFM__EACH(n[u] = v_round(v_mul(x[u], v_set1(1.44269504f))))
    TFM__EACH(x[u] = v_fnma(n[u], v_set1(0.693359375f), x[u]))
    TFM__EACH(x[u] = v_fnma(n[u], v_set1(-2.12194440e-4f), x[u]))
}

/* x := exp(x). Beyond the bounds the result is inf or 0 anyway; NaN passes through them. */
TFM__CURVE void TFM__FN(g_exp)(tfm__v *x, const int count) {
    tfm__g n, y;
    TFM__EACH(x[u] = v_atleast(v_atmost(x[u], v_set1(89.0f)), v_set1(-104.5f)))
    TFM__FN(g_split)(n, x, count);
    TFM__FN(g_expm1)(y, x, count);
    TFM__EACH(x[u] = v_scale2(v_add(y[u], v_set1(1.0f)), n[u]))
}

/* The same for x <= 0, and of x - rest where rest is not NULL: less than the last digit of x, which is above -106. */
TFM__CURVE void TFM__FN(g_exp_negative)(tfm__v *x, const tfm__v *rest, const int count) {
    tfm__g n, y;
    if (!rest) {
        TFM__EACH(x[u] = v_atleast(x[u], v_set1(-104.5f)))
    }
    TFM__FN(g_split)(n, x, count);
    if (rest) {
        TFM__EACH(x[u] = v_sub(x[u], rest[u]))
    }
    TFM__FN(g_expm1)(y, x, count);
    TFM__EACH(x[u] = v_grow_low(y[u], n[u]))
}

TFM__ALWAYS_INLINE tfm__v v_exp(tfm__v x) {
    tfm__g one;
    one[0] = x;
    TFM__FN(g_exp)(one, 1);
    return one[0];
}

/* 2^x for x <= 1, within 1 ULP; below 2^-126 it may be any smaller number, from -180 down it is 0. */
TFM__ALWAYS_INLINE tfm__v v_exp2(tfm__v x) {
    const tfm__v y = v_atleast(x, v_set1(TFM__W == 16 ? -180.0f : -127.0f)), n = v_round(y), r = v_sub(y, n);
    tfm__v p = v_set1(0.000153264715f);
    p = v_fma(p, r, v_set1(0.00133908063f));
    p = v_fma(p, r, v_set1(0.00961850584f));
    p = v_fma(p, r, v_set1(0.0555035993f));
    p = v_fma(p, r, v_set1(0.240226477f));
    p = v_fma(p, r, v_set1(0.693147182f));
    p = v_fma(p, r, v_set1(1.0f));
#if TFM__PASS == TFM__AVX512
    return v_scale2(p, n);
#else
    return vi_as_v(vi_add(v_as_i(p), vi_shl(v_to_i(n), 23))); /* -127 gives p = 1, whose bits this makes 0 */
#endif
}

/* x = 2^e m, m in [sqrt(1/2), sqrt(2)); log(x) = e ln(2) + log(1 + (m - 1)). */
TFM__ALWAYS_INLINE tfm__v v_log(tfm__v x) {
    const tfm__m tiny = v_lt(x, v_set1(1.17549435e-38f));
    const tfm__v y = v_select(tiny, v_mul(x, v_set1(8388608.0f)), x);
    const tfm__i bits = v_as_i(y);
    const tfm__i exponent = vi_sar(vi_sub(bits, vi_set1(0x3f3504f3)), 23);
    const tfm__v e = v_sub(v_from_i(exponent), v_select(tiny, v_set1(23.0f), v_zero()));
    const tfm__v f = v_sub(vi_as_v(vi_sub(bits, vi_shl(exponent, 23))), v_set1(1.0f));
    const tfm__v f2 = v_mul(f, f);
    tfm__v p = v_set1(0.0673398897f);
    p = v_fma(p, f, v_set1(-0.116614535f));
    p = v_fma(p, f, v_set1(0.118862063f));
    p = v_fma(p, f, v_set1(-0.124080926f));
    p = v_fma(p, f, v_set1(0.142202243f));
    p = v_fma(p, f, v_set1(-0.166678578f));
    p = v_fma(p, f, v_set1(0.20002073f));
    p = v_fma(p, f, v_set1(-0.250000119f));
    p = v_fma(p, f, v_set1(0.333333135f));
    p = v_mul(v_mul(p, f), f2);
    p = v_fma(e, v_set1(-2.12194440e-4f), p);
    p = v_fnma(v_set1(0.5f), f2, p);
    p = v_fma(e, v_set1(0.693359375f), v_add(f, p));
    /* inf and NaN: themselves. By bits: gcc clones functions and folds x < inf there as -ffast-math allows */
    p = v_select(vi_gt(vi_and(v_as_i(x), vi_set1(0x7fffffff)), vi_set1(0x7f7fffff)), x, p);
    p = v_select(v_eq(x, v_zero()), v_set1(tfm__bits_float(0xff800000u)), p);
    return v_select(v_lt(x, v_zero()), v_set1(tfm__bits_float(0x7fc00000u)), p);
}

/* m / (m + 2), m = exp(2 |x|) - 1 = 2^n (exp(r) - 1) + (2^n - 1). Below 0.28 the roundings of m and m + 2 come to 2.5
 * ULP: there an odd polynomial. ln(2) in one part: what that costs shows the less, the larger n is. */
TFM__CURVE void TFM__FN(g_tanh)(tfm__v *x, const int count) {
    tfm__g n, r, m;
    TFM__EACH(r[u] = v_abs(x[u]))
    TFM__EACH(r[u] = v_atmost(v_add(r[u], r[u]), v_set1(19.0f)))  /* from 18.1 on the result is 1 */
    TFM__EACH(n[u] = v_round(v_mul(r[u], v_set1(1.44269504f))))
    TFM__EACH(r[u] = v_fnma(n[u], v_set1(0.693147182f), r[u]))
    TFM__FN(g_expm1)(m, r, count);
    TFM__EACH(n[u] = v_power2(n[u]))
    TFM__EACH(m[u] = v_fma(m[u], n[u], v_sub(n[u], v_set1(1.0f))))
    TFM__EACH(m[u] = v_div(m[u], v_add(m[u], v_set1(2.0f))))
    TFM__EACH(r[u] = v_mul(x[u], x[u]))
    TFM__EACH(n[u] = v_fma(v_set1(-0.0508101434f), r[u], v_set1(0.133191675f)))
    TFM__EACH(n[u] = v_fma(n[u], r[u], v_set1(-0.333331525f)))
    TFM__EACH(n[u] = v_fma(v_mul(n[u], r[u]), v_abs(x[u]), v_abs(x[u])))
    TFM__EACH(x[u] = v_copysign(v_select(v_lt(v_abs(x[u]), v_set1(0.28f)), n[u], m[u]), x[u]))
}

/* 1 / (1 + exp(-x)), from exp(-|x|) so that small results keep their digits. */
TFM__ALWAYS_INLINE void TFM__FN(g_sigmoid)(tfm__v *x, const int count) {
    const tfm__v one = v_set1(1.0f);
    tfm__g e;
    TFM__EACH(e[u] = vi_as_v(vi_or(v_as_i(x[u]), vi_set1(INT32_MIN))))
    TFM__FN(g_exp_negative)(e, NULL, count);
    TFM__EACH(x[u] = v_div(v_select(v_negative(x[u]), e[u], one), v_add(one, e[u])))
}

/* x / (1 + exp(e)); below -80 exp(e) does not show. */
TFM__CURVE void TFM__FN(g_gated)(tfm__v *x, tfm__v *e, const int count) {
    tfm__g n, y;
    TFM__EACH(e[u] = v_atleast(v_atmost(e[u], v_set1(89.0f)), v_set1(-80.0f)))
    TFM__FN(g_split)(n, e, count);
    TFM__FN(g_expm1)(y, e, count);
    TFM__EACH(x[u] = v_div(x[u], v_add(v_set1(1.0f), v_grow_high(y[u], n[u]))))
}

/* Angles up to this are reduced by three parts of pi/2 with fused multiply-adds; larger ones lane by lane in chapter
 * 4's tfm__reduce_angle. The scalar pass has no fused multiply-add and always takes the latter. */
#if TFM__PASS == TFM__SCALAR
#define TFM__SINCOS_LIMIT (-1.0f)
#else
#define TFM__SINCOS_LIMIT 100000.0f
#endif
TFM__ALWAYS_INLINE void v_sincos(tfm__v x, tfm__v *sine, tfm__v *cosine) {
    const tfm__m within = v_le(v_abs(x), v_set1(TFM__SINCOS_LIMIT));
    tfm__v n = v_round(v_mul(x, v_set1(0.636619772f)));
    tfm__v r = v_fnma(n, v_set1(1.57079637f), x);
    tfm__v s, p, q;
    tfm__m odd;
    tfm__i quadrant;
    r = v_fnma(n, v_set1(-4.37113883e-8f), r);
    r = v_fnma(n, v_set1(-1.71512449e-15f), r);
    if (!v_all(within)) {
        float angle[TFM__W], turns[TFM__W];
        int i;
        v_store(angle, x);
        for (i = 0; i < TFM__W; i++) angle[i] = tfm__reduce_angle(angle[i], &turns[i]);
        r = v_select(within, r, v_load(angle));
        n = v_select(within, n, v_load(turns));
    }
    s = v_mul(r, r);
    p = v_set1(-0.000195179091f);
    p = v_fma(p, s, v_set1(0.00833218731f));
    p = v_fma(p, s, v_set1(-0.166666552f));
    p = v_fma(v_mul(p, s), r, r);                                                   /* sin(r) */
    q = v_set1(2.44323383e-05f);
    q = v_fma(q, s, v_set1(-0.00138873095f));
    q = v_fma(q, s, v_set1(0.0416666456f));
    q = v_fma(q, v_mul(s, s), v_fnma(v_set1(0.5f), s, v_set1(1.0f)));               /* cos(r) */
    quadrant = v_to_i(n);
    odd = vi_eq(vi_and(quadrant, vi_set1(1)), vi_set1(1));
    *cosine = v_select(odd, p, q);
    *cosine = vi_as_v(vi_xor(v_as_i(*cosine), vi_shl(vi_and(vi_add(quadrant, vi_set1(1)), vi_set1(2)), 30)));
    *sine = v_select(odd, q, p);
    *sine = vi_as_v(vi_xor(v_as_i(*sine), vi_shl(vi_and(quadrant, vi_set1(2)), 30)));
    *sine = v_select(v_eq(x, v_zero()), x, *sine);                                  /* sin(-0) is -0 */
}
#undef TFM__SINCOS_LIMIT

/* ------------------------------------------------------------------------------------------------------------------
 *  Row kernels. Every loop walks whole vectors and ends in one masked vector of the same arithmetic, so an element's
 *  bits do not depend on where in the row it stands. Sums depend on n alone: see TFM__FN(sum).
 * ---------------------------------------------------------------------------------------------------------------- */

/* m >= TFM__W: a whole vector; else the first m lanes. */
TFM__ALWAYS_INLINE tfm__v TFM__FN(get)(const float *p, int64_t m) {
    return m >= TFM__W ? v_load(p) : v_loadn(p, m);
}

/* The same with `rest` in the other lanes. */
TFM__ALWAYS_INLINE tfm__v TFM__FN(get_or)(const float *p, int64_t m, tfm__v rest) {
    return m >= TFM__W ? v_load(p) : v_select(v_mask_n(m), v_loadn(p, m), rest);
}

TFM__ALWAYS_INLINE void TFM__FN(put)(float *p, tfm__v v, int64_t m) {
    if (m >= TFM__W) {
        v_store(p, v);
    } else {
        v_storen(p, v, m);
    }
}

/* Groups: what lies past m elements reads as zero, and is not written. The ends of rows have functions of their own:
 * inlined, four masks a group were half of a short kernel. */
#define TFM__GROUPS(begin, end) for (int64_t i = (begin); i < (end); i += TFM__G * TFM__W)

TFM__NOINLINE void TFM__FN(g_get_part)(tfm__v *x, const float *p, int64_t m) {
    for (int u = 0; u < TFM__G; u++, p += TFM__W, m -= TFM__W) x[u] = m > 0 ? TFM__FN(get)(p, m) : v_zero();
}

TFM__NOINLINE void TFM__FN(g_put_part)(float *p, const tfm__v *x, int64_t m) {
    for (; m > 0; x++, p += TFM__W, m -= TFM__W) TFM__FN(put)(p, *x, m);
}

TFM__ALWAYS_INLINE void TFM__FN(g_get)(tfm__v *x, const float *p, int64_t m) {
    enum { count = TFM__G };
    if (m >= TFM__G * TFM__W) {
        TFM__EACH(x[u] = v_load(p + u * TFM__W))
    } else { /* part has an address: x shall not */
        tfm__g part;
        TFM__FN(g_get_part)(part, p, m);
        TFM__EACH(x[u] = part[u])
    }
}

TFM__ALWAYS_INLINE void TFM__FN(g_put)(float *p, const tfm__v *x, int64_t m) {
    enum { count = TFM__G };
    if (m >= TFM__G * TFM__W) {
        TFM__EACH(v_store(p + u * TFM__W, x[u]))
    } else {
        tfm__g part;
        TFM__EACH(part[u] = x[u])
        TFM__FN(g_put_part)(p, part, m);
    }
}

/* Folds the vectors of a group two by two. */
#define TFM__FOLD(f, x) (TFM__G == 1 ? x[0] : f(f(x[0], x[1]), f(x[2], x[3])))

/* -- conversion ---------------------------------------------------------------------------------------------------- */

/* Elements that do not lie side by side go through a stack buffer of this many, then in vectors. */
#define TFM__GATHER 64

TFM__NOINLINE void TFM__FN(copy)(float *dst, const float *src, int64_t n) {
    int64_t i = 0;
    for (; i + TFM__W <= n; i += TFM__W) v_store(dst + i, v_load(src + i));
    for (; i < n; i++) dst[i] = src[i];
}

/* A group of either type: one decision for all. */
#define TFM__HALVES(f16, bf16) \
    enum { count = TFM__G }; \
    if (dtype == TFM_F16) { \
        TFM__EACH(f16) \
    } else { \
        TFM__EACH(bf16) \
    }

static void TFM__FN(load_half)(float *dst, const uint16_t *src, int dtype, int64_t stride, int64_t n) {
    uint16_t part[TFM__GATHER];
    const int64_t most = stride == 1 ? n : TFM__GATHER;
    for (int64_t begin = 0; begin < n; begin += most) {
        const int64_t some = tfm__min64(most, n - begin);
        const uint16_t *s = src + begin;
        if (stride != 1) {
            for (int64_t j = 0; j < some; ++j) part[j] = src[(begin + j) * stride];
            s = part;
        }
        int64_t i = 0;
#if TFM__G > 1
        for (; i + TFM__G * TFM__W <= some; i += TFM__G * TFM__W) {
            float *const d = dst + begin + i;
            TFM__HALVES(v_store(d + u * TFM__W, v_load_h(s + i + u * TFM__W)),
                        v_store(d + u * TFM__W, v_load_b(s + i + u * TFM__W)))
        }
#endif
        for (; i < some; i += TFM__W) {
            const int64_t m = some - i;
            tfm__v v;
            if (dtype == TFM_F16) {
                v = m >= TFM__W ? v_load_h(s + i) : v_loadn_h(s + i, m);
            } else {
                v = m >= TFM__W ? v_load_b(s + i) : v_loadn_b(s + i, m);
            }
            TFM__FN(put)(dst + begin + i, v, m);
        }
    }
}

static void TFM__FN(store_half)(uint16_t *dst, int dtype, int64_t stride, const float *src, int64_t n) {
    uint16_t part[TFM__GATHER];
    const int64_t most = stride == 1 ? n : TFM__GATHER;
    for (int64_t begin = 0; begin < n; begin += most) {
        const int64_t some = tfm__min64(most, n - begin);
        uint16_t *d = stride == 1 ? dst + begin : part;
        int64_t i = 0;
#if TFM__G > 1
        for (; i + TFM__G * TFM__W <= some; i += TFM__G * TFM__W) {
            const float *const from = src + begin + i;
            TFM__HALVES(v_store_h(d + i + u * TFM__W, v_load(from + u * TFM__W)),
                        v_store_b(d + i + u * TFM__W, v_load(from + u * TFM__W)))
        }
#endif
        for (; i < some; i += TFM__W) {
            const int64_t m = some - i;
            const tfm__v v = TFM__FN(get)(src + begin + i, m);
            if (dtype == TFM_F16) {
                if (m >= TFM__W) v_store_h(d + i, v); else v_storen_h(d + i, v, m);
            } else {
                if (m >= TFM__W) v_store_b(d + i, v); else v_storen_b(d + i, v, m);
            }
        }
        if (stride != 1) {
            for (int64_t j = 0; j < some; ++j) dst[(begin + j) * stride] = part[j];
        }
    }
}

/* One loop a type: `value` says what element e becomes. */
#define TFM__LOAD_LOOP(type, value) \
    { \
        const type *const s = (const type *)src; \
        for (int64_t i = 0; i < n; ++i) { \
            const type e = s[i * src_stride]; \
            dst[i] = (value); \
        } \
        break; \
    }

static void TFM__FN(load)(float *dst, const void *src, int src_dtype, int64_t src_stride, int64_t n) {
    if (src_dtype == TFM_F32 && src_stride == 1) {
        TFM__FN(copy)((float *)dst, (const float *)src, n);
        return;
    }
    switch (src_dtype) {
    case TFM_F16:
    case TFM_BF16: TFM__FN(load_half)(dst, (const uint16_t *)src, src_dtype, src_stride, n); break;
    case TFM_F32: TFM__LOAD_LOOP(float, e)
    case TFM_F64: TFM__LOAD_LOOP(double, (float)e)
    case TFM_I64: TFM__LOAD_LOOP(int64_t, (float)e)
    case TFM_I32: TFM__LOAD_LOOP(int32_t, (float)e)
    case TFM_I8: TFM__LOAD_LOOP(int8_t, (float)e)
    case TFM_U8: TFM__LOAD_LOOP(uint8_t, (float)e)
    case TFM_BOOL: TFM__LOAD_LOOP(uint8_t, e ? 1.0f : 0.0f)
    default: break;
    }
}

#define TFM__STORE_LOOP(type, value) \
    { \
        type *const d = (type *)dst; \
        for (int64_t i = 0; i < n; ++i) { \
            const float e = src[i]; \
            d[i * dst_stride] = (value); \
        } \
        break; \
    }
/* C's cast truncates toward zero but is undefined past the ends and for NaN. low, high: where saturation begins. */
#define TFM__STORE_INT(type, low, high, lowest, highest) \
    TFM__STORE_LOOP(type, tfm__isnan(e) ? (type)0 : e >= (high) ? (highest) : e <= (low) ? (lowest) : (type)e)

static void TFM__FN(store)(void *dst, int dst_dtype, int64_t dst_stride, const float *src, int64_t n) {
    if (dst_dtype == TFM_F32 && dst_stride == 1) {
        TFM__FN(copy)((float *)dst, (const float *)src, n);
        return;
    }
    switch (dst_dtype) {
    case TFM_F16:
    case TFM_BF16: TFM__FN(store_half)((uint16_t *)dst, dst_dtype, dst_stride, src, n); break;
    case TFM_F32: TFM__STORE_LOOP(float, e)
    case TFM_F64: TFM__STORE_LOOP(double, (double)e)
    case TFM_I64: TFM__STORE_INT(int64_t, -9223372036854775808.0f, 9223372036854775808.0f, INT64_MIN, INT64_MAX)
    case TFM_I32: TFM__STORE_INT(int32_t, -2147483648.0f, 2147483648.0f, INT32_MIN, INT32_MAX)
    case TFM_I8: TFM__STORE_INT(int8_t, -128.0f, 127.0f, INT8_MIN, INT8_MAX)
    case TFM_U8: TFM__STORE_INT(uint8_t, 0.0f, 255.0f, (uint8_t)0, UINT8_MAX)
    case TFM_BOOL: TFM__STORE_LOOP(uint8_t, e != 0.0f ? (uint8_t)1 : (uint8_t)0)
    default: break;
    }
}

/* -- activations --------------------------------------------------------------------------------------------------- */
#define v_relu TFM__FN(v_relu)
TFM__ALWAYS_INLINE tfm__v v_relu(tfm__v x) { return v_max(x, v_zero()); }

/* x sigmoid(s x) = x / (1 + exp(-s x)): where exp overflows, the result is below 1e-36 and becomes 0. */
TFM__ALWAYS_INLINE void TFM__FN(g_silu)(tfm__v *x, const int count) {
    tfm__g e;
    TFM__EACH(e[u] = v_neg(x[u]))
    TFM__FN(g_gated)(x, e, count);
}
TFM__ALWAYS_INLINE void TFM__FN(g_gelu_quick)(tfm__v *x, const int count) {
    tfm__g e;
    TFM__EACH(e[u] = v_mul(x[u], v_set1(-1.702f)))
    TFM__FN(g_gated)(x, e, count);
}

/* 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): nothing cancels for negative x. */
TFM__ALWAYS_INLINE void TFM__FN(g_gelu_tanh)(tfm__v *x, const int count) {
    tfm__g e;
    TFM__EACH(e[u] = v_fma(v_mul(x[u], x[u]), v_set1(-0.0713548163f), v_set1(-1.59576912f)))
    TFM__EACH(e[u] = v_mul(x[u], e[u]))
    TFM__FN(g_gated)(x, e, count);
}

/* 0.5 x (1 + erf(x / sqrt 2)) loses all digits for negative x. With a = |x|: erfc(a / sqrt 2) / 2 = exp(-a^2 / 2) P(t),
 * t = (a - 3) / (a + 3); P: least-maximum fit, relative error 9.1e-9 up to a = 14.5, where exp has become 0. */
TFM__ALWAYS_INLINE void TFM__FN(g_gelu)(tfm__v *x, const int count) {
    tfm__g t, p, e, rest;
    TFM__EACH(t[u] = v_atmost(v_abs(x[u]), v_set1(14.5f)))
    TFM__EACH(p[u] = v_mul(t[u], v_set1(-0.5f)))
    TFM__EACH(e[u] = v_mul(t[u], p[u]))
    TFM__EACH(rest[u] = v_residue(t[u], p[u], e[u])) /* the rounding of -a^2 / 2 would cost exp 6 bits */
    TFM__EACH(t[u] = v_div(v_sub(t[u], v_set1(3.0f)), v_add(t[u], v_set1(3.0f))))
    TFM__FN(g_exp_negative)(e, rest, count);
    TFM__EACH(p[u] = v_fma(v_set1(5.31619787e-05f), t[u], v_set1(0.000115013678f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(-0.00033901292f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(-0.000983288212f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(0.0029043874f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(0.00613194228f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(-0.0462132636f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(0.123225041f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(-0.20640262f)))
    TFM__EACH(p[u] = v_fma(p[u], t[u], v_set1(0.121513948f)))
    TFM__EACH(p[u] = v_mul(p[u], e[u]))
    /* max(x, 0) - |x| tail; min(x, max(-x, -14.5)) is -|x| where it counts, -inf for -inf, finite for inf */
    TFM__EACH(e[u] = v_atmost(x[u], v_atleast(v_neg(x[u]), v_set1(-14.5f))))
    TFM__EACH(x[u] = v_fma(e[u], p[u], v_atleast(x[u], v_zero())))
}

/* -- elementwise --------------------------------------------------------------------------------------------------- */

/* Loop over one operand: the statement changes the group x, a = p0, b = p1. */
#define TFM__UNARY_LOOP(op, name, ...) \
    TFM__NOINLINE void TFM__FN(unary_##name)(float *y, const float *from, float p0, float p1, int64_t n) { \
        enum { count = TFM__G }; \
        const tfm__v a = v_set1(p0), b = v_set1(p1); \
        (void)a; \
        (void)b; \
        TFM__GROUPS(0, n) { \
            tfm__g x; \
            TFM__FN(g_get)(x, from + i, n - i); \
            __VA_ARGS__; \
            TFM__FN(g_put)(y + i, x, n - i); \
        } \
    }
#define TFM__UNARY_LIST(X) \
    X(TFM__U_SCALE, scale, TFM__EACH(x[u] = v_mul(x[u], a))) \
    X(TFM__U_SHIFT, shift, TFM__EACH(x[u] = v_add(x[u], a))) \
    X(TFM__U_NEG, neg, TFM__EACH(x[u] = v_neg(x[u]))) \
    X(TFM__U_ABS, abs, TFM__EACH(x[u] = v_abs(x[u]))) \
    X(TFM__U_SQRT, sqrt, TFM__EACH(x[u] = v_sqrt(x[u]))) \
    X(TFM__U_RSQRT, rsqrt, TFM__EACH(x[u] = v_div(v_set1(1.0f), v_sqrt(x[u])))) \
    X(TFM__U_RECIP, recip, TFM__EACH(x[u] = v_div(v_set1(1.0f), x[u]))) \
    X(TFM__U_EXP, exp, TFM__FN(g_exp)(x, count)) \
    X(TFM__U_CLAMP, clamp, TFM__EACH(x[u] = v_min(v_max(x[u], a), b))) \
    X(TFM__U_SOFTCAP, softcap, \
      TFM__EACH(x[u] = v_div(x[u], a)) TFM__FN(g_tanh)(x, count); TFM__EACH(x[u] = v_mul(a, x[u])))
TFM__UNARY_LIST(TFM__UNARY_LOOP)
TFM__UNARY_LOOP(_, square, TFM__EACH(x[u] = v_mul(x[u], x[u])))
TFM__UNARY_LOOP(_, cube, TFM__EACH(x[u] = v_mul(v_mul(x[u], x[u]), x[u])))

/* The long ones, a vector at a time: four side by side would be code without end. */
TFM__NOINLINE void TFM__FN(unary_log)(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += TFM__W) TFM__FN(put)(y + i, v_log(TFM__FN(get)(x + i, n - i)), n - i);
}

TFM__NOINLINE void TFM__FN(unary_sincos)(float *y, const float *x, int want_cosine, int64_t n) {
    for (int64_t i = 0; i < n; i += TFM__W) {
        tfm__v sine, cosine;
        v_sincos(TFM__FN(get)(x + i, n - i), &sine, &cosine);
        TFM__FN(put)(y + i, want_cosine ? cosine : sine, n - i);
    }
}

/* Activations: factor * f(x + bias), bias and factor NULL or rows. One function serves f itself, gated units and the
 * end of a product. */
#define TFM__ACTIVATION_LOOP(unary_op, op, name, ...) \
    TFM__NOINLINE void TFM__FN(activation_##name)(float *y, const float *from, const float *bias, const float *factor, \
                                                  int64_t n) { \
        enum { count = TFM__G }; \
        TFM__GROUPS(0, n) { \
            tfm__g x, b; \
            TFM__FN(g_get)(x, from + i, n - i); \
            if (bias) { \
                TFM__FN(g_get)(b, bias + i, n - i); \
                TFM__EACH(x[u] = v_add(x[u], b[u])) \
            } \
            __VA_ARGS__; \
            if (factor) { \
                TFM__FN(g_get)(b, factor + i, n - i); \
                TFM__EACH(x[u] = v_mul(x[u], b[u])) \
            } \
            TFM__FN(g_put)(y + i, x, n - i); \
        } \
    }
#define TFM__ACTIVATION_LIST(X) \
    X(TFM__U_COPY, TFM_ACT_NONE, none, (void)0) \
    X(TFM__U_RELU, TFM_ACT_RELU, relu, TFM__EACH(x[u] = v_relu(x[u]))) \
    X(TFM__U_GELU, TFM_ACT_GELU, gelu, TFM__FN(g_gelu)(x, count)) \
    X(TFM__U_GELU_TANH, TFM_ACT_GELU_TANH, gelu_tanh, TFM__FN(g_gelu_tanh)(x, count)) \
    X(TFM__U_GELU_QUICK, TFM_ACT_GELU_QUICK, gelu_quick, TFM__FN(g_gelu_quick)(x, count)) \
    X(TFM__U_SILU, TFM_ACT_SILU, silu, TFM__FN(g_silu)(x, count)) \
    X(TFM__U_SIGMOID, TFM_ACT_SIGMOID, sigmoid, TFM__FN(g_sigmoid)(x, count)) \
    X(TFM__U_TANH, TFM_ACT_TANH, tanh, TFM__FN(g_tanh)(x, count))
TFM__ACTIVATION_LIST(TFM__ACTIVATION_LOOP)

static void TFM__FN(activate)(int activation, float *y, const float *x, const float *bias, const float *factor,
                              int64_t n) {
    switch (activation) {
#define TFM__ACTIVATION_CASE(unary_op, op, name, ...) \
    case op: TFM__FN(activation_##name)(y, x, bias, factor, n); break;
        TFM__ACTIVATION_LIST(TFM__ACTIVATION_CASE)
    default: break;
    }
}

/* Loop over two operands; a step of 0 repeats one element. */
#define TFM__BINARY_LOOP(op, name, f) \
    TFM__NOINLINE void TFM__FN(binary_##name)(float *y, const float *from_a, int a_step, const float *from_b, \
                                              int b_step, int64_t n) { \
        enum { count = TFM__G }; \
        if (n <= 0) return; \
        tfm__g a, b; \
        TFM__EACH(a[u] = v_set1(*from_a)) \
        TFM__EACH(b[u] = v_set1(*from_b)) \
        TFM__GROUPS(0, n) { \
            tfm__g x; \
            if (a_step) TFM__FN(g_get)(a, from_a + i, n - i); \
            if (b_step) TFM__FN(g_get)(b, from_b + i, n - i); \
            TFM__EACH(x[u] = f(a[u], b[u])) \
            TFM__FN(g_put)(y + i, x, n - i); \
        } \
    }

#define TFM__BINARY_LIST(X) \
    X(TFM__B_ADD, add, v_add) \
    X(TFM__B_SUB, sub, v_sub) \
    X(TFM__B_MUL, mul, v_mul) \
    X(TFM__B_DIV, div, v_div) \
    X(TFM__B_MIN, min, v_min) \
    X(TFM__B_MAX, max, v_max)
TFM__BINARY_LIST(TFM__BINARY_LOOP)

/* exp(b log a) in f32 loses 7 bits of a large power, so powers go lane by lane through the double-precision function of
 * the C library: correct to the last bit of f32, with its signs and NaNs of negative bases (which are PyTorch's). */
static void TFM__FN(binary_pow)(float *y, const float *a, int a_step, const float *b, int b_step, int64_t n) {
    if (n <= 0) return;
    const float a0 = *a, b0 = *b;
    for (int64_t i = 0; i < n; ++i) y[i] = (float)pow((double)(a_step ? a[i] : a0), (double)(b_step ? b[i] : b0));
}

/* The exponents that PyTorch computes by multiplication, root and division, too. */
static void TFM__FN(unary_pow)(float *y, const float *x, float p0, float p1, int64_t n) {
    if (p0 == 2.0f) {
        TFM__FN(unary_square)(y, x, p0, p1, n);
    } else if (p0 == 3.0f) {
        TFM__FN(unary_cube)(y, x, p0, p1, n);
    } else if (p0 == 0.5f) {
        TFM__FN(unary_sqrt)(y, x, p0, p1, n);
    } else if (p0 == -0.5f) {
        TFM__FN(unary_rsqrt)(y, x, p0, p1, n);
    } else if (p0 == -1.0f) {
        TFM__FN(unary_recip)(y, x, p0, p1, n);
    } else {
        TFM__FN(binary_pow)(y, x, 1, &p0, 0, n);
    }
}

static void TFM__FN(unary)(int op, float *y, const float *x, float p0, float p1, int64_t n) {
    switch (op) {
#define TFM__UNARY_CASE(op, name, ...) \
    case op: TFM__FN(unary_##name)(y, x, p0, p1, n); break;
        TFM__UNARY_LIST(TFM__UNARY_CASE)
    case TFM__U_LOG: TFM__FN(unary_log)(y, x, n); break;
    case TFM__U_SIN: TFM__FN(unary_sincos)(y, x, 0, n); break;
    case TFM__U_COS: TFM__FN(unary_sincos)(y, x, 1, n); break;
#define TFM__ACTIVATION_UNARY(unary_op, op, name, ...) \
    case unary_op: TFM__FN(activation_##name)(y, x, NULL, NULL, n); break;
        TFM__ACTIVATION_LIST(TFM__ACTIVATION_UNARY)
    case TFM__U_POW: TFM__FN(unary_pow)(y, x, p0, p1, n); break;
    default: break;
    }
}

static void TFM__FN(binary)(int op, float *y, const float *a, int a_step, const float *b, int b_step, int64_t n) {
    switch (op) {
#define TFM__BINARY_CASE(op, name, f) \
    case op: TFM__FN(binary_##name)(y, a, a_step, b, b_step, n); break;
        TFM__BINARY_LIST(TFM__BINARY_CASE)
    case TFM__B_POW: TFM__FN(binary_pow)(y, a, a_step, b, b_step, n); break;
    default: break;
    }
}

static void TFM__FN(fma_scalar)(float *y, const float *x, float s, int64_t n) {
    enum { count = TFM__G };
    const tfm__v factor = v_set1(s);
    TFM__GROUPS(0, n) {
        tfm__g a, b;
        TFM__FN(g_get)(a, x + i, n - i);
        TFM__FN(g_get)(b, y + i, n - i);
        TFM__EACH(b[u] = v_fma(factor, a[u], b[u]))
        TFM__FN(g_put)(y + i, b, n - i);
    }
}

static void TFM__FN(glu)(int activation, float *y, const float *gate, const float *up, int64_t n) {
    TFM__FN(activate)(activation, y, gate, NULL, up, n);
}

/* -- reductions ---------------------------------------------------------------------------------------------------- */

/* What a sum adds up. */
#define TFM__SUM_X 0          /* x */
#define TFM__SUM_SQUARES 1    /* x * x */
#define TFM__SUM_PRODUCTS 2   /* x * w */
#define TFM__SUM_CHUNK (16 * TFM__G * TFM__W)

/* Vector sums of 16 additions over a chunk, the chunks' sums in double: the error of 2^20 equal elements stays below
 * 1e-6 (one f32 chain of that length: 1e-2), and the order depends on n alone. A group is as many chains, so that
 * latency does not count. */
TFM__ALWAYS_INLINE double TFM__FN(sum)(int what, const float *x, const float *w, int64_t n) {
    enum { count = TFM__G };
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += TFM__SUM_CHUNK) {
        const int64_t end = tfm__min64(n, begin + TFM__SUM_CHUNK);
        tfm__g sum;
        TFM__EACH(sum[u] = v_zero())
        TFM__GROUPS(begin, end) {
            tfm__g a, b;
            TFM__FN(g_get)(a, x + i, end - i);
            if (what == TFM__SUM_PRODUCTS) TFM__FN(g_get)(b, w + i, end - i);
            switch (what) {
            case TFM__SUM_SQUARES: TFM__EACH(sum[u] = v_fma(a[u], a[u], sum[u])) break;
            case TFM__SUM_PRODUCTS: TFM__EACH(sum[u] = v_fma(a[u], b[u], sum[u])) break;
            default: TFM__EACH(sum[u] = v_add(sum[u], a[u])) break;
            }
        }
        total += (double)v_sum(TFM__FOLD(v_add, sum));
    }
    return total;
}

/* The largest (least) element, NaN when there is one; cheap: NaN or not as it happens, by one operation a vector. */
#define TFM__BEST(a, b) \
    (want_max ? cheap ? v_atleast(a, b) : v_max(a, b) : cheap ? v_atmost(a, b) : v_min(a, b))
TFM__ALWAYS_INLINE float TFM__FN(extreme)(int want_max, int cheap, const float *x, int64_t n) {
    enum { count = TFM__G };
    const tfm__v start = v_set1(tfm__bits_float(want_max ? 0xff800000u : 0x7f800000u));
    int64_t i = 0;
    tfm__g best;
    TFM__EACH(best[u] = start)
    for (; i + TFM__G * TFM__W <= n; i += TFM__G * TFM__W) {
        TFM__EACH(best[u] = TFM__BEST(v_load(x + i + u * TFM__W), best[u]))
    }
    best[0] = TFM__FOLD(TFM__BEST, best);
    for (; i < n; i += TFM__W) best[0] = TFM__BEST(TFM__FN(get_or)(x + i, n - i, start), best[0]);
    return want_max ? v_hmax(best[0]) : v_hmin(best[0]);
}

TFM__NOINLINE float TFM__FN(reduce_max)(const float *x, int64_t n) {
    return TFM__FN(extreme)(1, 0, x, n);
}

/* The maximum of a row whose NaN show in what is done with it: NaN may be taken for -inf. */
TFM__NOINLINE float TFM__FN(top)(const float *x, int64_t n) {
    return TFM__FN(extreme)(1, 1, x, n);
}

static float TFM__FN(reduce)(int op, const float *x, int64_t n) {
    switch (op) {
    case TFM__R_SUM: return (float)TFM__FN(sum)(TFM__SUM_X, x, NULL, n);
    case TFM__R_SUMSQ: return (float)TFM__FN(sum)(TFM__SUM_SQUARES, x, NULL, n);
    case TFM__R_MAX: return TFM__FN(reduce_max)(x, n);
    case TFM__R_MIN: return TFM__FN(extreme)(0, 0, x, n);
    default: return 0.0f;
    }
}

static float TFM__FN(dot)(const float *a, const float *b, int64_t n) {
    return (float)TFM__FN(sum)(TFM__SUM_PRODUCTS, a, b, n);
}

/* -- softmax ------------------------------------------------------------------------------------------------------- */

/* Three steps of three rows side by side: the maximum of one (NaN may be taken for -inf); of the one before y =
 * exp(x - max), unless y is NULL, and its sum, in the order of TFM__FN(sum); the end of the one before that. So what
 * loads and stores hides behind the arithmetic of exp. Any may be NULL. */
TFM__NOINLINE void TFM__FN(softmax_pass)(tfm__softmax_row *peek, tfm__softmax_row *raise,
                                         const tfm__softmax_row *finish, int64_t n, int log_form) {
    enum { count = TFM__G };
    const float *const ahead = peek ? peek->x : NULL, *const x = raise ? raise->x : NULL;
    const float *const from = !finish ? NULL : log_form ? finish->x : finish->y;
    float *const y = raise && !log_form ? raise->y : NULL, *const to = finish ? finish->y : NULL;
    const tfm__v minus_inf = v_set1(tfm__bits_float(0xff800000u)), shift = v_set1(raise ? raise->max : 0.0f);
    const tfm__v last_max = v_set1(finish ? finish->max : 0.0f), last = v_set1(finish ? finish->last : 0.0f);
    tfm__v top = minus_inf;
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += TFM__SUM_CHUNK) {
        const int64_t end = tfm__min64(n, begin + TFM__SUM_CHUNK);
        int64_t i = begin;
        tfm__v sum = v_zero();
        for (; TFM__G > 1 && i + TFM__G * TFM__W <= end; i += TFM__G * TFM__W) {
            tfm__g a;
            if (ahead) {
                TFM__EACH(a[u] = v_load(ahead + i + u * TFM__W))
                top = v_atleast(TFM__FOLD(v_atleast, a), top);
            }
            if (from && log_form) {
                TFM__EACH(v_store(to + i + u * TFM__W, v_sub(v_sub(v_load(from + i + u * TFM__W), last_max), last)))
            } else if (from) {
                TFM__EACH(v_store(to + i + u * TFM__W, v_mul(v_load(from + i + u * TFM__W), last)))
            }
            if (x) {
                TFM__EACH(a[u] = v_sub(v_load(x + i + u * TFM__W), shift))
                TFM__FN(g_exp_negative)(a, NULL, count);
                if (y) {
                    TFM__EACH(v_store(y + i + u * TFM__W, a[u]))
                }
                sum = v_add(sum, TFM__FOLD(v_add, a));
            }
        }
        if (i < end) { /* the last vectors of a row */
            tfm__g rest;
            TFM__EACH(rest[u] = v_zero())
            for (int u = 0; i < end; i += TFM__W, u = (u + 1) & (count - 1)) {
                const int64_t m = end - i;
                if (ahead) top = v_atleast(TFM__FN(get_or)(ahead + i, m, minus_inf), top);
                if (from) {
                    const tfm__v v = TFM__FN(get)(from + i, m);
                    TFM__FN(put)(to + i, log_form ? v_sub(v_sub(v, last_max), last) : v_mul(v, last), m);
                }
                if (x) {
                    rest[u] = v_sub(TFM__FN(get_or)(x + i, m, minus_inf), shift);
                    TFM__FN(g_exp_negative)(&rest[u], NULL, 1);
                    if (y) TFM__FN(put)(y + i, rest[u], m);
                }
                if (TFM__G == 1) sum = v_add(sum, rest[0]);
            }
            if (TFM__G > 1) sum = v_add(sum, TFM__FOLD(v_add, rest));
        }
        total += (double)v_sum(sum);
    }
    if (peek) peek->max = v_hmax(top);
    if (raise) raise->sum = total;
}

/* +inf and NaN need no code: inf - inf makes the sum NaN, and with it the whole row, as in PyTorch. */
static void TFM__FN(softmax)(tfm__softmax_row *rows, int count, int64_t n, int log_form) {
    const float minus_inf = tfm__bits_float(0xff800000u);
    tfm__softmax_row *raise = NULL, *finish = NULL;
    for (int i = 0; i < count + 2; i++) {
        tfm__softmax_row *const peek = i < count ? &rows[i] : NULL;
        if (raise || finish) {
            TFM__FN(softmax_pass)(peek, raise, finish, n, log_form);
        } else if (peek) {
            peek->max = TFM__FN(top)(peek->x, n);
        }
        if (raise) raise->last = log_form ? (float)log(raise->sum) : (float)(1.0 / raise->sum);
        finish = raise;
        raise = peek;
        if (!peek || peek->max != minus_inf) continue;
        peek->max = TFM__FN(reduce_max)(peek->x, n);
        if (peek->max != minus_inf) continue;
        for (int64_t at = 0; at < n; at++) peek->y[at] = log_form ? minus_inf : 0.0f; /* only -inf, or nothing */
        raise = NULL;
    }
}

static float TFM__FN(logsumexp)(const float *x, int64_t n) {
    tfm__softmax_row row;
    row.x = x;
    row.max = TFM__FN(reduce_max)(x, n);
    if (tfm__isinf(row.max)) return row.max; /* only -inf, or a +inf */
    TFM__FN(softmax_pass)(NULL, &row, NULL, n, 1);
    return (float)((double)row.max + log(row.sum));
}

/* -- norms --------------------------------------------------------------------------------------------------------- */

/* One pass over two rows side by side. Of one: the sums of x - c and of (x - c)^2 (c = 0: the latter alone counts), in
 * the order of TFM__FN(sum), x first added to the residual if there is one, and that kept. Of another, measured before:
 * y = (x - mean) / deviation * weight + bias. So one row is read from memory while the other is written. Either may be
 * NULL. Vector by vector: AVX2 has 16 registers for eight sums, five constants and what a vector needs. */
TFM__NOINLINE void TFM__FN(norm_pass)(const tfm__norm *a, tfm__norm_row *measure, const tfm__norm_row *finish) {
    enum { count = TFM__G, tfm__nothing, tfm__sum, tfm__moments, tfm__squares, tfm__scaled, tfm__biased, tfm__any };
    const tfm__norm_row *const in = measure ? measure : finish, *const out = finish ? finish : measure;
    const tfm__v shift = v_set1(in->shift), offset = v_set1(a->weight_offset), one = v_set1(1.0f);
    const tfm__v mean = v_set1(out->mean), rstd = v_set1(out->rstd), low = v_set1(out->low);
    const float *const x = in->x, *const residual = in->residual;
    const float *const from = out->x, *const weight = a->weight, *const bias = a->bias;
    float *const kept = in->sum, *const y = out->y;
    const int offset_given = a->weight_offset != 0.0f;
    const int reads = !measure ? tfm__nothing : residual ? tfm__sum : a->subtract_mean ? tfm__moments : tfm__squares;
    const int common = weight && !bias ? tfm__scaled : weight && !offset_given ? tfm__biased : tfm__any;
    const int writes = finish ? common : tfm__nothing;
    const int64_t n = a->n;
    double sum = 0.0, squares = 0.0;
#define TFM__NORM_SUMS(s, q, v) { /* Zen 4 adds and multiplies in different units: each gets its half */ \
    const tfm__v d = v_sub(v, shift); \
    s[u] = u & 1 ? v_fma(d, one, s[u]) : v_add(s[u], d); \
    q[u] = v_fma(d, d, q[u]); \
}
#define TFM__NORM_UNIT(x) v_fma(v_sub(x, mean), rstd, low)
#define TFM__NORM_GET(p) v_load(p + i + u * TFM__W)
#define TFM__NORM_PUT(p, v) v_store(p + i + u * TFM__W, v)
    for (int64_t begin = 0; begin < n; begin += TFM__SUM_CHUNK) {
        const int64_t end = tfm__min64(n, begin + TFM__SUM_CHUNK);
        int64_t i = begin;
        tfm__g s, q;
        TFM__EACH(s[u] = q[u] = v_zero())
        for (; TFM__G > 1 && writes != tfm__any && i + TFM__G * TFM__W <= end; i += TFM__G * TFM__W) {
            if (reads == tfm__moments) {
                TFM__EACH(TFM__NORM_SUMS(s, q, TFM__NORM_GET(x)))
            } else if (reads == tfm__squares) {
                TFM__EACH(const tfm__v v = TFM__NORM_GET(x); q[u] = v_fma(v, v, q[u]))
            } else if (reads == tfm__sum) {
                TFM__EACH(const tfm__v v = v_add(TFM__NORM_GET(x), TFM__NORM_GET(residual));
                          TFM__NORM_PUT(kept, v);
                          TFM__NORM_SUMS(s, q, v))
            }
            if (writes == tfm__biased) {
                TFM__EACH(const tfm__v v = TFM__NORM_UNIT(TFM__NORM_GET(from));
                          TFM__NORM_PUT(y, v_fma(v, TFM__NORM_GET(weight), TFM__NORM_GET(bias))))
            } else if (writes == tfm__scaled) {
                TFM__EACH(const tfm__v v = TFM__NORM_UNIT(TFM__NORM_GET(from));
                          TFM__NORM_PUT(y, v_fma(v, v_add(TFM__NORM_GET(weight), offset), v_zero())))
            }
        }
        if (i < end) { /* the last vectors of a row, or all of a rare kind; through copies: registers have no index */
            tfm__g s_rest, q_rest;
            TFM__EACH(s_rest[u] = s[u])
            TFM__EACH(q_rest[u] = q[u])
            for (int u = 0; i < end; i += TFM__W, u = (u + 1) & (count - 1)) {
                const int64_t m = end - i;
                if (reads != tfm__nothing) {
                    tfm__v v = TFM__FN(get_or)(x + i, m, shift);
                    if (residual) {
                        v = v_add(v, TFM__FN(get)(residual + i, m));
                        TFM__FN(put)(kept + i, v, m);
                    }
                    TFM__NORM_SUMS(s_rest, q_rest, v)
                }
                if (writes != tfm__nothing) {
                    const tfm__v v = TFM__NORM_UNIT(TFM__FN(get)(from + i, m));
                    tfm__v w = weight ? TFM__FN(get)(weight + i, m) : one;
                    if (weight && writes != tfm__biased) w = v_add(w, offset);
                    TFM__FN(put)(y + i, v_fma(v, w, bias ? TFM__FN(get)(bias + i, m) : v_zero()), m);
                }
            }
            TFM__EACH(s[u] = s_rest[u])
            TFM__EACH(q[u] = q_rest[u])
        }
        if (!measure) continue;
        sum += (double)v_sum(TFM__FOLD(v_add, s));
        squares += (double)v_sum(TFM__FOLD(v_add, q));
    }
#undef TFM__NORM_SUMS
#undef TFM__NORM_UNIT
#undef TFM__NORM_GET
#undef TFM__NORM_PUT
    if (!measure) return;
    measure->moment[0] = a->subtract_mean ? sum : 0.0;
    measure->moment[1] = squares;
}

/* What a pass needs of a row that it measures: c is the mean of its first elements. */
TFM__ALWAYS_INLINE void TFM__FN(norm_begin)(const tfm__norm *a, tfm__norm_row *row, int64_t m, tfm__v share) {
    row->mean = row->rstd = row->low = row->shift = 0.0f;
    if (!row->residual && row->sum) TFM__FN(copy)(row->sum, row->x, a->n);
    if (!row->sum) row->sum = row->y;
    if (m > 0) {
        tfm__v first = TFM__FN(get)(row->x, m);
        if (row->residual) first = v_add(first, TFM__FN(get)(row->residual, m));
        row->shift = v_sum(v_mul(first, share));
    }
}

/* Mean and variance, in moment[1]. E[x^2] - E[x]^2 cancels when the mean is large beside the deviation: so moments
 * about c, and once more about the mean they give where that lies more than a deviation from c. */
TFM__ALWAYS_INLINE void TFM__FN(norm_center)(const tfm__norm *a, tfm__norm_row *row, double share) {
    double *const m = row->moment, mean;
    if (row->residual) row->x = row->sum;
    row->residual = NULL;
    if (!(m[0] * share * m[0] <= 0.5 * m[1])) {
        row->shift = (float)((double)row->shift + m[0] * share);
        TFM__FN(norm_pass)(a, row, NULL);
    }
    mean = m[0] * share;
    m[1] = m[1] * share - mean * mean;
    mean += (double)row->shift;
    if (m[1] < 0.0) m[1] = 0.0;
    row->mean = (float)mean;
    row->low = (float)((double)(float)mean - mean);
}

/* Row i is read while row i - 2, still in L1, is written; row i - 1's root and division follow its mean at a row's
 * distance, so that no chain of double precision is long (Zen 4, 768 elements in L2: a row further behind costs a cycle
 * a vector, roots at once 5 % of the time; in memory, one after the other takes 1.5 times as long). A longer row would
 * be gone from L1: it is written at once. */
static void TFM__FN(norm)(const tfm__norm *a, tfm__norm_row *rows, int count) {
    const int64_t m = a->subtract_mean ? tfm__min64(a->n, TFM__W) : 0;
    const double share = a->n > 0 ? 1.0 / (double)a->n : 1.0;
    const tfm__v first = v_set1(m > 0 ? 1.0f / (float)m : 0.0f);
    const int behind = a->n > TFM__NORM_SHORT ? 0 : 2;
    for (int i = 0; i < count + behind; i++) {
        tfm__norm_row *const row = i < count ? &rows[i] : NULL, *const ready = i >= behind ? &rows[i - behind] : NULL;
        const int rooted = behind ? i - 1 : i;
        if (row) TFM__FN(norm_begin)(a, row, m, first);
        if (row || ready) TFM__FN(norm_pass)(a, row, behind ? ready : NULL);
        if (row) TFM__FN(norm_center)(a, row, share);
        if (rooted >= 0 && rooted < count) {
            rows[rooted].rstd = (float)(1.0 / sqrt(rows[rooted].moment[1] + (double)a->eps));
            rows[rooted].low *= rows[rooted].rstd;
        }
        if (!behind) TFM__FN(norm_pass)(a, NULL, ready);
    }
}

/* -- rotary positions ---------------------------------------------------------------------------------------------- */

/* The pairs (xa[i], xb[i]) turned by the angles of cosine and sine. */
#define TFM__ROTATE(get, put) { \
    const tfm__v c = get(cosine + i), s = get(sine + i), a = get(xa + i), b = get(xb + i); \
    put(ya + i, v_fnma(b, s, v_mul(a, c))); \
    put(yb + i, v_fma(a, s, v_mul(b, c))); }
#define TFM__ROTATE_GET(p) v_loadn(p, n - i)
#define TFM__ROTATE_PUT(p, v) v_storen(p, v, n - i)
TFM__ALWAYS_INLINE void TFM__FN(rotate)(float *ya, float *yb, const float *xa, const float *xb, const float *cosine,
                                        const float *sine, int64_t n) {
    int64_t i = 0;
    for (; i + TFM__W <= n; i += TFM__W) TFM__ROTATE(v_load, v_store)
    if (i < n) TFM__ROTATE(TFM__ROTATE_GET, TFM__ROTATE_PUT)
}

TFM__ALWAYS_INLINE void TFM__FN(rotate_twos)(float *y, const float *x, const float *cosine, const float *sine,
                                             int64_t n) {
    const tfm__i even = vi_shl(vi_add(v_to_i(v_iota()), vi_set1(1)), 31); /* the sign bit of even lanes */
    for (int64_t i = 0; i < n; i += TFM__W) { /* the same two roundings: -(b s) + a c, a s + b c */
        const int64_t m = n - i;
        const float *c = cosine + i / 2, *s = sine + i / 2;
        float rest[2][TFM__W / 2];
        tfm__v v;
        if (m < TFM__W) {
            memset(rest, 0, sizeof(rest));
            memcpy(rest[0], c, (size_t)(m / 2) * 4);
            memcpy(rest[1], s, (size_t)(m / 2) * 4);
            c = rest[0];
            s = rest[1];
        }
        v = TFM__FN(get)(x + i, m);
        v = v_fma(v_swap(v), vi_as_v(vi_xor(v_as_i(v_twice(s)), even)), v_mul(v, v_twice(c)));
        TFM__FN(put)(y + i, v, m);
    }
}

static void TFM__FN(rotary)(const tfm__rotary_rows *rows) {
    const tfm__rotary_rows a = *rows;
    const int64_t half = a.n / 2;
    for (int64_t r = 0; r < a.rows; r++) {
        const float *const x = a.x + r * a.x_row;
        const float *const cosine = a.cosine + r * a.table_row, *const sine = a.sine + r * a.table_row;
        float *const y = a.y + r * a.y_row;
        if (a.interleaved) {
            TFM__FN(rotate_twos)(y, x, cosine, sine, 2 * half);
        } else {
            TFM__FN(rotate)(y, y + half, x, x + half, cosine, sine, half);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Products. An output is one chain of v_fma over ascending k, from zero or from what C holds: its bits do not depend
 *  on the tile it falls into, on packing, or on where k is cut into blocks. Bias and activation follow the last k.
 *
 *  Micro-kernels are written out by macros with one named variable per accumulator: gcc -O2 does not unroll loops over
 *  arrays of registers (a quarter of the peak). Each is a function of its own so that its registers are
 *  its own. Rows are reached by one pointer for every three of them: p[0], p[s], p[2 s] are addressing modes.
 * ---------------------------------------------------------------------------------------------------------------- */

/* Cache blocks: block_m x block_k of A and a few panels of B stay in L2. Deep blocks, so that C is seldom visited. */
#if TFM__PASS == TFM__AVX512
#define TFM__TILE_ROWS 12
#define TFM__EDGE_COLS 1     /* vectors of what is left beside the tiles */
#define TFM__BLOCK_K 768
#define TFM__BLOCK_M 144
#elif TFM__PASS == TFM__AVX2
#define TFM__TILE_ROWS 6
#define TFM__EDGE_COLS 2
#define TFM__BLOCK_K 768
#define TFM__BLOCK_M 144
#elif TFM__PASS == TFM__NEON
#define TFM__TILE_ROWS 6
#define TFM__EDGE_COLS 4
#define TFM__BLOCK_K 256
#define TFM__BLOCK_M 192
#else
#define TFM__TILE_ROWS 4
#define TFM__EDGE_COLS 1
#define TFM__BLOCK_K 256
#define TFM__BLOCK_M 128
#endif

/* f(row, v) for the first R rows; f(row, 0..V-1) for the first V vectors */
#define TFM__ROWS1(f, V) f(0, V)
#define TFM__ROWS2(f, V) TFM__ROWS1(f, V) f(1, V)
#define TFM__ROWS3(f, V) TFM__ROWS2(f, V) f(2, V)
#define TFM__ROWS4(f, V) TFM__ROWS3(f, V) f(3, V)
#define TFM__ROWS5(f, V) TFM__ROWS4(f, V) f(4, V)
#define TFM__ROWS6(f, V) TFM__ROWS5(f, V) f(5, V)
#define TFM__ROWS7(f, V) TFM__ROWS6(f, V) f(6, V)
#define TFM__ROWS8(f, V) TFM__ROWS7(f, V) f(7, V)
#define TFM__ROWS9(f, V) TFM__ROWS8(f, V) f(8, V)
#define TFM__ROWS10(f, V) TFM__ROWS9(f, V) f(9, V)
#define TFM__ROWS11(f, V) TFM__ROWS10(f, V) f(10, V)
#define TFM__ROWS12(f, V) TFM__ROWS11(f, V) f(11, V)
#define TFM__COLS1(f, r) f(r, 0)
#define TFM__COLS2(f, r) f(r, 0) f(r, 1)
#define TFM__COLS4(f, r) TFM__COLS2(f, r) f(r, 2) f(r, 3)
#define TFM__COLS8(f, r) TFM__COLS4(f, r) f(r, 4) f(r, 5) f(r, 6) f(r, 7)

#define TFM__ACC_DECLARE(r, v) tfm__v c##r##_##v = v_zero();
#define TFM__ACC_AT(r, v) (c[(r) / 3] + ((r) % 3) * c_row + (v) * TFM__W)
#define TFM__ACC_LOAD(r, v) c##r##_##v = v_load(TFM__ACC_AT(r, v));
#define TFM__ACC_STORE(r, v) v_store(TFM__ACC_AT(r, v), c##r##_##v);
#define TFM__ACC_BIAS(r, v) c##r##_##v = v_add(c##r##_##v, v_load(t->bias + (v) * TFM__W));
#define TFM__ACC_STEP(r, v) c##r##_##v = TFM__MULTIPLY(x, b##v, c##r##_##v);
#define TFM__ROW_DECLARE(r, V) TFM__COLS##V(TFM__ACC_DECLARE, r)
#define TFM__ROW_LOAD(r, V) TFM__COLS##V(TFM__ACC_LOAD, r)
#define TFM__ROW_STORE(r, V) TFM__COLS##V(TFM__ACC_STORE, r)
#define TFM__ROW_BIAS(r, V) TFM__COLS##V(TFM__ACC_BIAS, r)
/* One step of k, two orders. Row by row, B in registers: */
#define TFM__ROW_STEP(r, V) { const tfm__v x = v_set1(a[(r) / 3][((r) % 3) * s]); TFM__COLS##V(TFM__ACC_STEP, r) }
#define TFM__BODY_ROWS(R, V, load) TFM__COLS##V(TFM__B_LOAD, load) TFM__ROWS##R(TFM__ROW_STEP, V)
#define TFM__B_LOAD(load, v) const tfm__v b##v = load(b[(v) * TFM__W / 16] + k + (v) * TFM__W % 16);
/* and vector by vector of B, A in registers: where more vectors of B are used than registers are left. */
#define TFM__X_LOAD(r, V) const tfm__v x##r = v_set1(a[(r) / 3][((r) % 3) * s]);
#define TFM__X_STEP(r, v) c##r##_##v = TFM__MULTIPLY(x##r, y, c##r##_##v);
#define TFM__COL_STEP(args, v) TFM__COL_STEP_(TFM__COL_ROWS args, TFM__COL_LOAD args, v)
#define TFM__COL_STEP_(rows, load, v) \
    { const tfm__v y = load(b[(v) * TFM__W / 16] + k + (v) * TFM__W % 16); rows(TFM__X_STEP, v) }
/* row by row, what was read of B kept as panels */
#define TFM__BODY_KEEP(R, V, load) \
    TFM__COLS##V(TFM__B_LOAD, load) TFM__COLS##V(TFM__B_KEEP, load) TFM__ROWS##R(TFM__ROW_STEP, V) keep += TFM__PANEL;
#define TFM__B_KEEP(load, v) v_store(keep + (v) * TFM__W / 16 * keep_panel + (v) * TFM__W % 16, b##v);
#define TFM__COL_ROWS(R, load) TFM__ROWS##R
#define TFM__COL_LOAD(R, load) load
#define TFM__BODY_COLS(R, V, load) TFM__ROWS##R(TFM__X_LOAD, V) TFM__COLS##V(TFM__COL_STEP, (R, load))
/* Few rows wait for B's bytes. What comes 4 to 8 KB later, counted over all panels, is fetched into L2: less where the
 * bytes bind (1 x 4096 x 4096, cold: 0.92 of the read bandwidth; 16 KB 0.8, into L1 0.8), more where a step takes
 * long; or what gemm_ahead says. Both at once are slower. One row of halves is best without: conversions leave the
 * hardware's prefetchers time. */
#define TFM__NEAR_BYTES(R, V, type) \
    ((R) == 1 || (sizeof(type) == 4 && ((R) < 4 || (V) * TFM__W > 32)) ? 1024 : \
     (V) * TFM__W > 32 ? 2048 : (V) * TFM__W > 16 ? 4096 : 8192)
#define TFM__NEAR(R, V, type, i) v_prefetch_l2((const char *)(b[i] + k) + TFM__NEAR_BYTES(R, V, type));
#define TFM__FETCH_NEAR(R, V, type) \
    if ((R) > 1 || sizeof(type) == 4) { \
        TFM__NEAR(R, V, type, 0) \
        if ((V) * TFM__W > 16) { TFM__NEAR(R, V, type, 1) } \
        if ((V) * TFM__W > 32) { TFM__NEAR(R, V, type, 2) } \
        if ((V) * TFM__W > 48) { TFM__NEAR(R, V, type, 3) } \
    }
#define TFM__NEXT_LINE(i) v_prefetch((const char *)(b[i] + k) + 256);
#define TFM__FETCH_CACHED(R, V, type) \
    TFM__NEXT_LINE(0) \
    if ((V) * TFM__W > 16) { TFM__NEXT_LINE(1) } \
    if ((V) * TFM__W > 32) { TFM__NEXT_LINE(2) } \
    if ((V) * TFM__W > 48) { TFM__NEXT_LINE(3) }
#define TFM__FETCH_LINE(R, V, type) \
    v_prefetch_l2(ahead); \
    ahead += ahead_row;
#define TFM__FETCH_LINES(R, V, type) \
    if ((V) * TFM__W * (int)sizeof(type) > 64) v_prefetch_l2(ahead + 64); \
    if ((V) * TFM__W * (int)sizeof(type) > 128) v_prefetch_l2(ahead + 128); \
    if ((V) * TFM__W * (int)sizeof(type) > 192) v_prefetch_l2(ahead + 192); \
    TFM__FETCH_LINE(R, V, type)
#define TFM__LOOP(R, V, body, type, load, fetch) \
    for (; left > 0; left--) { \
        TFM__FETCH_##fetch(R, V, type) \
        TFM__BODY_##body(R, V, load) \
        a[0] += a_step; \
        if ((R) > 3) a[1] += a_step; \
        if ((R) > 6) a[2] += a_step; \
        if ((R) > 9) a[3] += a_step; \
        k += b_row; \
    }
#define TFM__LOOPS_FEW(R, V, body, type, load) \
    if (ahead_row > 0) { \
        TFM__LOOP(R, V, body, type, load, LINES) \
    } \
    if (sizeof(type) == 4 && (R) < 4 && ahead_row == TFM__AHEAD_CACHED) { \
        TFM__LOOP(R, V, body, type, load, CACHED) \
    } \
    TFM__LOOP(R, V, body, type, load, NEAR)
/* Many rows, AVX-512: the last three steps go row by row, each row stored when it is done. 24 stores of 512 bits in one
 * go take as many cycles as two and a half steps, and no product runs meanwhile. */
#define TFM__LOOPS_MANY(R, V, body, type, load) \
    const int between = TFM__W == 16 && left > 2; \
    left -= between ? 3 : 0; \
    TFM__LOOP(R, V, body, type, load, LINE) \
    if (between) { \
        TFM__COLS##V(TFM__LAST_LOAD, load) \
        TFM__ROWS##R(TFM__LAST_ROW, V) \
        return; \
    }
#define TFM__LAST_LOAD(load, v) \
    const tfm__v b0_##v = load(b[(v) * TFM__W / 16] + k + (v) * TFM__W % 16); \
    const tfm__v b1_##v = load(b[(v) * TFM__W / 16] + k + b_row + (v) * TFM__W % 16); \
    const tfm__v b2_##v = load(b[(v) * TFM__W / 16] + k + 2 * b_row + (v) * TFM__W % 16);
#define TFM__LAST_ROW(r, V) { \
    const float *const last = a[(r) / 3] + ((r) % 3) * s; \
    const tfm__v x0 = v_set1(last[0]), x1 = v_set1(last[a_step]), x2 = v_set1(last[2 * a_step]); \
    TFM__COLS##V(TFM__LAST_STEP, r) \
    if (t->bias) { \
        TFM__ROW_BIAS(r, V) \
    } \
    TFM__ROW_STORE(r, V) }
#define TFM__LAST_STEP(r, v) \
    c##r##_##v = TFM__MULTIPLY(x0, b0_##v, c##r##_##v); \
    c##r##_##v = TFM__MULTIPLY(x1, b1_##v, c##r##_##v); \
    c##r##_##v = TFM__MULTIPLY(x2, b2_##v, c##r##_##v);

#define TFM__FETCH_NONE(R, V, type)
#define TFM__LOOPS_ONCE(R, V, body, type, load) TFM__LOOP(R, V, body, type, load, NONE)
/* The bias: of many rows in registers, of few in L1, which is half the code. */
#define TFM__STORE_MANY(R, V) \
    if (t->bias) { \
        TFM__ROWS##R(TFM__ROW_BIAS, V) \
    } \
    TFM__ROWS##R(TFM__ROW_STORE, V)
#define TFM__STORE_ONCE TFM__STORE_MANY
#define TFM__STORE_FEW(R, V) \
    TFM__ROWS##R(TFM__ROW_STORE, V) \
    if (t->bias) TFM__FN(tile_bias)(t, R, (V) * TFM__W);
TFM__NOINLINE void TFM__FN(tile_bias)(const tfm__tile *t, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r++) {
        float *const c = t->c + r * t->c_row;
        for (int64_t j = 0; j < cols; j += TFM__W) {
            const tfm__v bias = TFM__FN(get)(t->bias + j, cols - j);
            TFM__FN(put)(c + j, v_add(TFM__FN(get)(c + j, cols - j), bias), cols - j);
        }
    }
}

/* The function tile_RxV_dtype: R rows, V vectors. */
#define TFM__TILE(R, V, body, rows, dtype, type, load) \
    TFM__NOINLINE void TFM__FN(tile_##R##x##V##_##dtype)(const tfm__tile *t) { \
        const int64_t s = t->a_row, a_step = t->a_step, b_row = t->b_row, c_row = t->c_row, ahead_row = t->ahead_row; \
        const char *ahead = t->ahead; \
        float *c[4]; \
        const float *a[4]; \
        const type *b[4]; \
        float *keep = t->keep; \
        const int64_t keep_panel = t->keep_panel; \
        int64_t k = 0, left = t->depth; \
        enum { accumulators = (R) * (V) }; \
        TFM__ROWS##R(TFM__ROW_DECLARE, V) \
        a[0] = t->a; \
        a[1] = a[0] + ((R) > 3 ? 3 * s : 0); \
        a[2] = a[1] + ((R) > 6 ? 3 * s : 0); \
        a[3] = a[2] + ((R) > 9 ? 3 * s : 0); \
        c[0] = t->c; \
        c[1] = c[0] + ((R) > 3 ? 3 * c_row : 0); \
        c[2] = c[1] + ((R) > 6 ? 3 * c_row : 0); \
        c[3] = c[2] + ((R) > 9 ? 3 * c_row : 0); \
        b[0] = (const type *)t->b[0]; \
        b[1] = (const type *)t->b[1]; \
        b[2] = (const type *)t->b[2]; \
        b[3] = (const type *)t->b[3]; \
        (void)keep; \
        (void)keep_panel; \
        (void)ahead; \
        (void)ahead_row; \
        if (t->accumulate) { \
            TFM__ROWS##R(TFM__ROW_LOAD, V) \
        } \
        TFM__LOOPS_##rows(R, V, body, type, load) \
        TFM__STORE_##rows(R, V) \
    }
#define TFM__TILE_F32(R, V, body, rows) TFM__TILE(R, V, body, rows, f32, float, v_load)
#define TFM__TILE_F16(R, V, body, rows) TFM__TILE(R, V, body, rows, f16, uint16_t, v_load_h)
#define TFM__TILE_BF16(R, V, body, rows) TFM__TILE(R, V, body, rows, bf16, uint16_t, TFM__LOAD_B)
#if TFM__PASS == TFM__AVX512 || TFM__PASS == TFM__AVX2
#define TFM__LOAD_B(p) (accumulators < (TFM__W == 16 ? 24 : 12) ? v_shuffle_b(p) : v_load_b(p))
#else
#define TFM__LOAD_B(p) v_load_b(p)
#endif
#define TFM__TILE_PAIRS(R, V, body, rows) TFM__TILE(R, V, body, rows, pairs, float, v_load_pairs)
#define TFM__TILE_KEEP(R, V) TFM__TILE(R, V, KEEP, ONCE, keep, float, v_load)

/* X(rows, vectors, order, few or many), one per height. Few rows are wide, so that enough chains hide the latency. More
 * rows of halves than TFM__HALF_ROWS are taken in lower strips: from five strips on they are converted beforehand. */
#if TFM__PASS == TFM__AVX512
#define TFM__HALF_ROWS 8
#define TFM__FEW_ROWS 8
#define TFM__TILE_LIST_LOW(X) \
    X(2, 4, COLS, FEW) X(3, 4, COLS, FEW) X(4, 4, COLS, FEW) X(5, 4, COLS, FEW) X(6, 4, COLS, FEW) \
    X(7, 2, ROWS, FEW) X(8, 2, ROWS, FEW)
#define TFM__TILE_LIST_HALVES(X) X(1, 4, COLS, FEW) TFM__TILE_LIST_LOW(X)
#define TFM__TILE_LIST(X) \
    TFM__TILE_LIST_HALVES(X) X(9, 2, ROWS, MANY) X(10, 2, ROWS, MANY) X(11, 2, ROWS, MANY) X(12, 2, ROWS, MANY)
#define TFM__TILE_LIST_PAIRS(X) /* a register less: the order of the pairs is kept in one */ \
    X(1, 4, COLS, FEW) X(2, 4, COLS, FEW) X(3, 4, COLS, FEW) X(4, 4, COLS, FEW) X(5, 4, COLS, FEW) \
    X(6, 2, ROWS, FEW) X(7, 2, ROWS, FEW) X(8, 2, ROWS, FEW) X(9, 2, ROWS, MANY) X(10, 2, ROWS, MANY) \
    X(11, 2, ROWS, MANY) X(12, 2, ROWS, MANY)
#define TFM__TILE_LIST_KEEP(X) X(12, 2) X(11, 2) X(10, 2)
#elif TFM__PASS == TFM__AVX2
#define TFM__HALF_ROWS 6
#define TFM__FEW_ROWS 4
#define TFM__TILE_LIST(X) \
    X(1, 8, COLS, FEW) X(2, 4, COLS, FEW) X(3, 4, COLS, FEW) X(4, 2, ROWS, FEW) X(5, 2, ROWS, MANY) \
    X(6, 2, ROWS, MANY)
#elif TFM__PASS == TFM__NEON
#define TFM__HALF_ROWS 6
#define TFM__FEW_ROWS 6
#define TFM__TILE_LIST(X) \
    X(1, 8, COLS, FEW) X(2, 8, COLS, FEW) X(3, 4, ROWS, FEW) X(4, 4, ROWS, MANY) X(5, 4, ROWS, MANY) \
    X(6, 4, COLS, MANY)
#else
#define TFM__HALF_ROWS 4
#define TFM__FEW_ROWS 4
#define TFM__TILE_LIST(X) X(1, 2, ROWS, MANY) X(2, 2, ROWS, MANY) X(3, 2, ROWS, MANY) X(4, 2, ROWS, MANY)
#endif
#if TFM__PASS != TFM__AVX512
#define TFM__TILE_LIST_KEEP(X)
#define TFM__TILE_LIST_HALVES(X) TFM__TILE_LIST(X)
#define TFM__TILE_LIST_PAIRS(X) TFM__TILE_LIST(X)
#endif
/* gcc's first scheduling pass, on for AArch64, moves all loads of a step up and then spills accumulators. */
#if TFM__PASS == TFM__NEON && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")
#endif
#define TFM__MULTIPLY v_fma
TFM__TILE_LIST(TFM__TILE_F32)
TFM__TILE_LIST_KEEP(TFM__TILE_KEEP)
TFM__TILE_LIST_HALVES(TFM__TILE_BF16)
#if TFM__PASS == TFM__AVX512 && TFM__HAVE_AVX2
TFM__TILE_LIST_LOW(TFM__TILE_F16)
#else
TFM__TILE_LIST_HALVES(TFM__TILE_F16)
#endif
#if TFM__PASS == TFM__AVX512 && TFM__HAVE_BF16_DOT
#undef TFM__MULTIPLY
#define TFM__MULTIPLY v_dot
TFM__TILE_LIST_PAIRS(TFM__TILE_PAIRS)
#endif
#if TFM__PASS == TFM__NEON && defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

/* Up to 4 rows and `cols` columns, at most TFM__EDGE_COLS vectors; whole: B may be read past them. */
#define TFM__EDGE_FETCH(r, v) if ((r) < rows && (v) * TFM__W < cols) \
    c##r##_##v = TFM__FN(get)(c + (r) * c_row + (v) * TFM__W, cols - (v) * TFM__W);
#define TFM__EDGE_PUT(r, v) if ((r) < rows && (v) * TFM__W < cols) \
    TFM__FN(put)(c + (r) * c_row + (v) * TFM__W, c##r##_##v, cols - (v) * TFM__W);
#define TFM__EDGE_ROW_FETCH(r, V) TFM__COLS##V(TFM__EDGE_FETCH, r)
#define TFM__EDGE_ROW_PUT(r, V) TFM__COLS##V(TFM__EDGE_PUT, r)
#define TFM__EDGE_STEPS(V, step, load) TFM__EDGE_STEPS_(V, step, load)
#define TFM__EDGE_STEPS_(V, step, load) TFM__COLS##V(step, load)
#define TFM__EDGE_STEP(loaded, v) { \
    const tfm__v y = loaded; \
    c0_##v = TFM__MULTIPLY(x0, y, c0_##v); \
    c1_##v = TFM__MULTIPLY(x1, y, c1_##v); \
    c2_##v = TFM__MULTIPLY(x2, y, c2_##v); \
    c3_##v = TFM__MULTIPLY(x3, y, c3_##v); }
#define TFM__EDGE_WHOLE(load, v) TFM__EDGE_STEP(load(b + (v) * TFM__W), v)
#define TFM__EDGE_PART(loadn, v) \
    TFM__EDGE_STEP(loadn(b + (v) * TFM__W, tfm__max64(0, tfm__min64(TFM__W, cols - (v) * TFM__W))), v)
#define TFM__EDGE_LOOP(step, load) \
    for (k = t->depth; k > 0; k--) { \
        const tfm__v x0 = v_set1(*a0), x1 = v_set1(*a1), x2 = v_set1(*a2), x3 = v_set1(*a3); \
        TFM__EDGE_STEPS(TFM__EDGE_COLS, step, load) \
        a0 += t->a_step; \
        a1 += t->a_step; \
        a2 += t->a_step; \
        a3 += t->a_step; \
        b += t->b_row; \
    }
#define TFM__EDGE(dtype, type, load, loadn) \
    TFM__NOINLINE void TFM__FN(edge_##dtype)(const tfm__tile *t, int64_t rows, int64_t cols, int whole) { \
        const float *a0 = t->a, *a1 = a0 + (rows > 1 ? t->a_row : 0), *a2 = a1 + (rows > 2 ? t->a_row : 0); \
        const float *a3 = a2 + (rows > 3 ? t->a_row : 0); \
        const type *b = (const type *)t->b[0]; \
        float *const c = t->c; \
        const int64_t c_row = t->c_row; \
        int64_t k; \
        TFM__ROWS4(TFM__ROW_DECLARE, TFM__EDGE_COLS) \
        if (t->accumulate) { \
            TFM__ROWS4(TFM__EDGE_ROW_FETCH, TFM__EDGE_COLS) \
        } \
        if (whole || cols == TFM__EDGE_COLS * TFM__W) { \
            TFM__EDGE_LOOP(TFM__EDGE_WHOLE, load) \
        } else { \
            TFM__EDGE_LOOP(TFM__EDGE_PART, loadn) \
        } \
        TFM__ROWS4(TFM__EDGE_ROW_PUT, TFM__EDGE_COLS) \
        if (t->bias) TFM__FN(tile_bias)(t, rows, cols); \
    }
#if TFM__PASS == TFM__AVX512 && TFM__HAVE_BF16_DOT
TFM__EDGE(pairs, float, v_load_pairs, v_loadn_pairs)
#define TFM__PAIRS_OR_NULL(function) TFM__FN(function##_pairs)
#else
#define TFM__PAIRS_OR_NULL(function) NULL
#endif
#undef TFM__MULTIPLY
#define TFM__MULTIPLY v_fma
TFM__EDGE(f32, float, v_load, v_loadn)
TFM__EDGE(f16, uint16_t, v_load_h, v_loadn_h)
TFM__EDGE(bf16, uint16_t, v_load_b, v_loadn_b)
#undef TFM__MULTIPLY
/* by dtype of B: TFM_F32, TFM_F16, TFM_BF16, TFM__PAIRS are 0 to 3 */
static void (*const TFM__FN(edges)[4])(const tfm__tile *t, int64_t rows, int64_t cols, int whole) = {
    TFM__FN(edge_f32), TFM__FN(edge_f16), TFM__FN(edge_bf16), TFM__PAIRS_OR_NULL(edge)};

#define TFM__TILE_COLS(R, V, body, rows) (V) * TFM__W,
#define TFM__TILE_NAME_F32(R, V, body, rows) TFM__FN(tile_##R##x##V##_f32),
#define TFM__TILE_NAME_F16(R, V, body, rows) TFM__FN(tile_##R##x##V##_f16),
#define TFM__TILE_NAME_BF16(R, V, body, rows) TFM__FN(tile_##R##x##V##_bf16),
#define TFM__TILE_NAME_PAIRS(R, V, body, rows) TFM__PAIRS_OR_NULL(tile_##R##x##V),
static const int64_t TFM__FN(tile_cols)[2][TFM__TILE_ROWS] = {
    {TFM__TILE_LIST(TFM__TILE_COLS)}, {TFM__TILE_LIST_PAIRS(TFM__TILE_COLS)}};
static void (*const TFM__FN(tiles)[4][TFM__TILE_ROWS])(const tfm__tile *t) = {
    {TFM__TILE_LIST(TFM__TILE_NAME_F32)},
#if TFM__PASS == TFM__AVX512 && TFM__HAVE_AVX2 /* one row waits for conversions: 2 of 8 take 1.3 cycles, 16 take 2 */
    {tfm__tile_1x8_f16_avx2, TFM__TILE_LIST_LOW(TFM__TILE_NAME_F16)},
#else
    {TFM__TILE_LIST_HALVES(TFM__TILE_NAME_F16)},
#endif
    {TFM__TILE_LIST_HALVES(TFM__TILE_NAME_BF16)}, {TFM__TILE_LIST_PAIRS(TFM__TILE_NAME_PAIRS)}};
#undef TFM__PAIRS_OR_NULL
/* from the highest strip down; NULL: there are none */
#define TFM__TILE_NAME_KEEP(R, V) TFM__FN(tile_##R##x##V##_keep),
static void (*const TFM__FN(keeping_tiles)[])(const tfm__tile *t) = {TFM__TILE_LIST_KEEP(TFM__TILE_NAME_KEEP) NULL};

/* n elements from src (of dtype) as a vector, n <= TFM__W; and the way back. */
TFM__ALWAYS_INLINE tfm__v TFM__FN(widen)(const void *src, int dtype, int64_t at, int64_t n) {
    const uint16_t *half = (const uint16_t *)src + at;
    if (dtype == TFM_F32) return TFM__FN(get)((const float *)src + at, n);
    if (dtype == TFM_F16) return n >= TFM__W ? v_load_h(half) : v_loadn_h(half, n);
    return n >= TFM__W ? v_load_b(half) : v_loadn_b(half, n);
}
TFM__ALWAYS_INLINE void TFM__FN(narrow)(void *dst, int dtype, int64_t at, tfm__v x) {
    if (dtype == TFM_F16) {
        v_store_h((uint16_t *)dst + at, x);
    } else if (dtype == TFM_BF16) {
        v_store_b((uint16_t *)dst + at, x);
    } else {
        v_store((float *)dst + at, x);
    }
}
TFM__ALWAYS_INLINE float TFM__FN(element)(const void *src, int dtype, int64_t at) {
    if (dtype == TFM_F16) return tfm__f16_to_f32(((const uint16_t *)src)[at]);
    if (dtype == TFM_BF16) return tfm__bf16_to_f32(((const uint16_t *)src)[at]);
    return ((const float *)src)[at];
}

/* Columns [begin, end) of c: the activation, after `bias` where no tile added it. */
static void TFM__FN(gemm_finish)(const tfm__gemm *g, const float *bias, int64_t begin, int64_t end) {
    float *c = g->c + begin;
    if (!g->finish || (!bias && g->activation == TFM_ACT_NONE)) return;
    for (int64_t i = 0; i < g->rows; i++, c += g->c_row) {
        TFM__FN(activate)(g->activation, c, c, bias, NULL, end - begin);
    }
}

#define TFM__FAR_SIZE (1 << 16)   /* elements */
/* bytes; one row of halves is best without */
#define TFM__STREAM_AHEAD(size, rows) ((size) != 4 ? 8192 : (rows) < 3 ? 2048 : 512)
#define TFM__B_SIZE(g) ((g)->b_dtype == TFM_F16 || (g)->b_dtype == TFM_BF16 ? 2 : 4)

/* What is left of the columns from col on, where no tile fits: pieces of panels, four rows at a time. */
TFM__NOINLINE void TFM__FN(gemm_edge)(const tfm__gemm *g, const tfm__tile *tile, int64_t rows, int64_t col,
                                      int64_t cols) {
    const int64_t width = TFM__EDGE_COLS * TFM__W, size = TFM__B_SIZE(g);
    const int whole = g->b_row == TFM__PANEL && g->b_panel != TFM__PANEL && col % width == 0;
    tfm__tile part = *tile;
    int64_t r, j;
    for (j = 0; j < cols; j += width) {
        part.b[0] = (const char *)tile->b[j / TFM__PANEL] + j % TFM__PANEL * size;
        for (r = 0; r < rows; r += 4) {
            part.a = tile->a + r * tile->a_row;
            part.c = tile->c + r * tile->c_row + j;
            part.bias = tile->bias ? tile->bias + j : NULL;
            TFM__FN(edges)[g->b_dtype](&part, tfm__min64(4, rows - r), tfm__min64(width, cols - j), whole);
        }
    }
}

/* The first strip's tile reads B as it lies and leaves its panels to the others: no pass over B of its own (128 x 768 x
 * 3072: 0.97 of the time). AVX2's tile is a fourth as long: there it waits for rows a page apart (1.02). */
static void TFM__FN(gemm_keep)(const tfm__gemm *g, const tfm__tile *tile, int64_t rows, int64_t col) {
    tfm__tile first = *tile;
    first.keep = (float *)tile->b[0];
    first.keep_panel = g->b_panel;
    first.b[0] = g->plain + col;
    first.b[1] = g->plain + col + TFM__PANEL;
    first.b_row = g->plain_row;
    TFM__FN(keeping_tiles)[TFM__TILE_ROWS - rows](&first);
}

/* What a tile fetches, number `done` of `tiles` for columns [col, col + width), in strip i of `count`: where B is one
 * stream, what comes a little later (what comes much later: 0.8 of the bandwidth); rows that are packed or read after
 * the product, a line of each; what is read after it in one piece; its share of the panels that all read next; of a
 * plain B a line of each row of the next columns; the strip that comes next, which may lie in a far cache; or
 * nothing. */
static void TFM__FN(gemm_ahead)(const tfm__gemm *g, tfm__tile *tile, int64_t i, int64_t count, int64_t done,
                                int64_t tiles, int64_t col, int64_t width, int64_t *line) {
    const int64_t size = TFM__B_SIZE(g), bytes = width * size, panels = tfm__ceil_div(width, TFM__PANEL);
    const int plain = g->b_panel == TFM__PANEL && g->b_row != TFM__PANEL;
    const int stream = count == 1 && (g->b_wide ? width == TFM__KEY_PANEL && g->b_lane == 0
                                      : g->b_panel == TFM__PANEL && g->b_row == g->cols && width >= g->cols);
    tile->ahead = (const char *)tile->a;
    tile->ahead_row = 0;
    if (stream) {
        tile->ahead = (const char *)tile->b[0] + TFM__STREAM_AHEAD(size, g->rows);
        tile->ahead_row = g->rows == 1 && size == 2 ? 0 : bytes;
    } else if (g->ahead && *line < g->ahead_cols) {
        tile->ahead = (const char *)g->ahead + *line;
        tile->ahead_row = g->ahead_row;
        *line += 64;
    } else if (g->next) {
        tile->ahead = (const char *)g->next + col * g->depth * size;
        tile->ahead_row = bytes;
    } else if (tiles > 1 && g->b_row == TFM__PANEL && g->b_panel != TFM__PANEL && col + width < g->cols) {
        tile->ahead = (const char *)g->b + (col / TFM__PANEL + panels + done * panels / tiles) * g->b_panel * size;
        tile->ahead += done * panels % tiles * TFM__PANEL * size * g->depth / tiles;
        tile->ahead_row = tfm__ceil_div(bytes, tiles);
    } else if (plain && (count > 1 || (g->rows > 3 && width <= 2 * TFM__PANEL)) && i * 64 < bytes
               && col + width < g->cols) {
        tile->ahead = (const char *)tile->b[0] + bytes + i * 64;
        tile->ahead_row = g->b_row * size;
    } else if (g->cached) {
        tile->ahead_row = TFM__AHEAD_CACHED;
    } else if (g->strips) {
        tile->ahead += (i + 1 < count ? g->a_row : (1 - count) * g->a_row) * (int64_t)sizeof(float);
        tile->ahead_row = TFM__TILE_ROWS * (int64_t)sizeof(float);
    }
}

/* Strips of even heights take a group of columns one after the other. A tall tile's rows become two strips where B
 * comes from far, since only lower tiles fetch ahead (12 x 4096 x 4096: 0.66 of the peak as one strip, 0.88 as two). */
static void TFM__FN(gemm)(const tfm__gemm *g) {
    const int64_t *const widths = TFM__FN(tile_cols)[g->b_dtype == TFM__PAIRS], size = TFM__B_SIZE(g);
    int64_t r, i, j, count, low, high, width, tiles, placed = -1, line = 0, finished = 0;
    tfm__tile tile;
    if (g->rows <= 0 || g->cols <= 0) return;
    if (g->depth <= 0) {
        for (r = 0; r < g->rows && !g->accumulate; r++) {
            for (j = 0; j < g->cols; j++) g->c[r * g->c_row + j] = 0.0f;
        }
        TFM__FN(gemm_finish)(g, g->bias, 0, g->cols);
        return;
    }
    count = g->strips ? g->strips : tfm__ceil_div(g->rows, size == 2 ? TFM__HALF_ROWS : TFM__TILE_ROWS);
    if (count == 1 && !g->strips && g->rows > TFM__FEW_ROWS && g->depth * g->cols >= TFM__FAR_SIZE) count = 2;
    low = g->rows / count;
    high = g->rows % count; /* the first `high` strips have a row more */
    width = tfm__max64(widths[low - 1], high ? widths[low] : 0);
    tiles = (count - high) * (width / widths[low - 1]) + (high ? high * (width / widths[low]) : 0);
    tile.depth = g->depth;
    tile.accumulate = g->accumulate;
    tile.a_row = g->strips ? 1 : g->a_row;
    tile.a_step = g->strips ? TFM__TILE_ROWS : 1;
    tile.b_row = g->b_row;
    tile.c_row = g->c_row;
    for (j = 0; j < g->cols; j += width) {
        const int64_t end = tfm__min64(g->cols, j + width);
        int64_t done = 0;
        for (i = r = 0; i < count; i++) { /* as tfm__strip_begin says, without its divisions */
            const int64_t height = low + (i < high), own = widths[height - 1];
            int64_t col, p;
            tile.a = g->a + (g->strips ? i : r) * g->a_row;
            for (col = j; col < end; col += own) {
                const int64_t cols = tfm__min64(own, end - col);
                for (p = 0; p < 4 && placed != col; p++) {
                    const int64_t at = g->b_lane + col + p * TFM__PANEL;
                    tile.b[p] = (const char *)g->b + size * (g->b_wide
                        ? at / TFM__KEY_PANEL * g->b_panel + at % TFM__KEY_PANEL
                        : at / TFM__PANEL * g->b_panel + at % TFM__PANEL);
                }
                placed = col;
                tile.c = g->c + r * g->c_row + col;
                tile.bias = g->finish && g->bias ? g->bias + col : NULL;
                if (g->plain && i == 0) {
                    TFM__FN(gemm_keep)(g, &tile, height, col);
                    continue;
                }
                TFM__FN(gemm_ahead)(g, &tile, i, count, done++, tiles, j, width, &line);
                if (cols == own) {
                    TFM__FN(tiles)[g->b_dtype][height - 1](&tile);
                } else {
                    TFM__FN(gemm_edge)(g, &tile, height, col, cols);
                }
            }
            r += height;
        }
        if (end - finished >= TFM__G * TFM__W || end == g->cols) { /* whole groups: a tile may be half of one */
            TFM__FN(gemm_finish)(g, NULL, finished, end);
            finished = end;
        }
    }
}

/* -- packing ------------------------------------------------------------------------------------------------------- */

/* dst[j * dst_row + i] = src[i * src_row + j] for i, j < TFM__W, in registers; rows of dst are written in ascending
 * order. */
#if TFM__PASS == TFM__AVX512
#define TFM__T_LOAD(i) const __m512 a##i = v_load(src + (i) * src_row);
#define TFM__T_PAIR(i, j) /* of 4x4 blocks: 2x2 pieces */ \
    const __m512d b##i = _mm512_castps_pd(_mm512_unpacklo_ps(a##i, a##j)); \
    const __m512d b##j = _mm512_castps_pd(_mm512_unpackhi_ps(a##i, a##j));
#define TFM__T_QUAD(i, j, k, l) /* rows i..l: their 4x4 blocks transposed, one in each quarter */ \
    TFM__T_PAIR(i, j) \
    TFM__T_PAIR(k, l) \
    const __m512 c##i = _mm512_castpd_ps(_mm512_unpacklo_pd(b##i, b##k)); \
    const __m512 c##j = _mm512_castpd_ps(_mm512_unpackhi_pd(b##i, b##k)); \
    const __m512 c##k = _mm512_castpd_ps(_mm512_unpacklo_pd(b##j, b##l)); \
    const __m512 c##l = _mm512_castpd_ps(_mm512_unpackhi_pd(b##j, b##l));
#define TFM__T_HALF(i, j, k, l) /* quarters of one column index: first of 0 2 | 1 3 */ \
    const __m512 d##i = _mm512_shuffle_f32x4(c##i, c##j, 0x88), d##j = _mm512_shuffle_f32x4(c##i, c##j, 0xdd); \
    const __m512 d##k = _mm512_shuffle_f32x4(c##k, c##l, 0x88), d##l = _mm512_shuffle_f32x4(c##k, c##l, 0xdd);
#define TFM__T_STORE(j, x, y, control) v_store(dst + (j) * dst_row, _mm512_shuffle_f32x4(d##x, d##y, control));
TFM__ALWAYS_INLINE void TFM__FN(turn_square)(float *dst, int64_t dst_row, const float *src, int64_t src_row) {
    TFM__T_LOAD(0) TFM__T_LOAD(1) TFM__T_LOAD(2) TFM__T_LOAD(3) TFM__T_LOAD(4) TFM__T_LOAD(5) TFM__T_LOAD(6)
    TFM__T_LOAD(7) TFM__T_LOAD(8) TFM__T_LOAD(9) TFM__T_LOAD(10) TFM__T_LOAD(11) TFM__T_LOAD(12) TFM__T_LOAD(13)
    TFM__T_LOAD(14) TFM__T_LOAD(15)
    TFM__T_QUAD(0, 1, 2, 3)
    TFM__T_QUAD(4, 5, 6, 7)
    TFM__T_QUAD(8, 9, 10, 11)
    TFM__T_QUAD(12, 13, 14, 15)
    TFM__T_HALF(0, 4, 8, 12)
    TFM__T_HALF(1, 5, 9, 13)
    TFM__T_HALF(2, 6, 10, 14)
    TFM__T_HALF(3, 7, 11, 15)
    TFM__T_STORE(0, 0, 8, 0x88) TFM__T_STORE(1, 1, 9, 0x88) TFM__T_STORE(2, 2, 10, 0x88) TFM__T_STORE(3, 3, 11, 0x88)
    TFM__T_STORE(4, 4, 12, 0x88) TFM__T_STORE(5, 5, 13, 0x88) TFM__T_STORE(6, 6, 14, 0x88) TFM__T_STORE(7, 7, 15, 0x88)
    TFM__T_STORE(8, 0, 8, 0xdd) TFM__T_STORE(9, 1, 9, 0xdd) TFM__T_STORE(10, 2, 10, 0xdd) TFM__T_STORE(11, 3, 11, 0xdd)
    TFM__T_STORE(12, 4, 12, 0xdd) TFM__T_STORE(13, 5, 13, 0xdd) TFM__T_STORE(14, 6, 14, 0xdd)
    TFM__T_STORE(15, 7, 15, 0xdd)
}
/* dst[j * 12 + i] = src[i * src_row + j] for i < 12, j < 16. Twelve is three quarters of a vector:
 * each quarter of c below lies in one line of dst, and whole lines are written (96 x 768: 0.0079 ms, 0.0052). */
#define TFM__T_LINES(at, w, x, y, z) { \
    const __m512 d##w = _mm512_shuffle_f32x4(c##w, c##x, 0x88), d##x = _mm512_shuffle_f32x4(c##w, c##x, 0xdd); \
    const __m512 d##y = _mm512_shuffle_f32x4(c##y, c##z, 0x88), d##z = _mm512_shuffle_f32x4(c##y, c##z, 0xdd); \
    TFM__T_STORE(at, w, y, 0x88) TFM__T_STORE((at) + 3, x, z, 0x88) \
    TFM__T_STORE((at) + 6, w, y, 0xdd) TFM__T_STORE((at) + 9, x, z, 0xdd) }
TFM__NOINLINE void TFM__FN(transpose_strip)(float *dst, const float *src, int64_t src_row) {
    const int64_t dst_row = TFM__W;
    TFM__T_LOAD(0) TFM__T_LOAD(1) TFM__T_LOAD(2) TFM__T_LOAD(3) TFM__T_LOAD(4) TFM__T_LOAD(5) TFM__T_LOAD(6)
    TFM__T_LOAD(7) TFM__T_LOAD(8) TFM__T_LOAD(9) TFM__T_LOAD(10) TFM__T_LOAD(11)
    TFM__T_QUAD(0, 1, 2, 3)
    TFM__T_QUAD(4, 5, 6, 7)
    TFM__T_QUAD(8, 9, 10, 11)
    TFM__T_LINES(0, 0, 4, 8, 1)
    TFM__T_LINES(1, 5, 9, 2, 6)
    TFM__T_LINES(2, 10, 3, 7, 11)
}
#undef TFM__T_LOAD
#undef TFM__T_PAIR
#undef TFM__T_QUAD
#undef TFM__T_HALF
#undef TFM__T_STORE
#undef TFM__T_LINES
#elif TFM__PASS == TFM__AVX2
/* Halves of rows i and i + 4 are joined on loading: then 4x4 transposes finish the work. */
#define TFM__T_LOAD(i, at) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(src + (i) * src_row + (at))), \
                         _mm_loadu_ps(src + ((i) + 4) * src_row + (at)), 1)
#define TFM__T_QUAD(at) { \
    const __m256 a0 = TFM__T_LOAD(0, at), a1 = TFM__T_LOAD(1, at), a2 = TFM__T_LOAD(2, at), a3 = TFM__T_LOAD(3, at); \
    const __m256d b0 = _mm256_castps_pd(_mm256_unpacklo_ps(a0, a1)); \
    const __m256d b1 = _mm256_castps_pd(_mm256_unpackhi_ps(a0, a1)); \
    const __m256d b2 = _mm256_castps_pd(_mm256_unpacklo_ps(a2, a3)); \
    const __m256d b3 = _mm256_castps_pd(_mm256_unpackhi_ps(a2, a3)); \
    v_store(dst + (at) * dst_row, _mm256_castpd_ps(_mm256_unpacklo_pd(b0, b2))); \
    v_store(dst + ((at) + 1) * dst_row, _mm256_castpd_ps(_mm256_unpackhi_pd(b0, b2))); \
    v_store(dst + ((at) + 2) * dst_row, _mm256_castpd_ps(_mm256_unpacklo_pd(b1, b3))); \
    v_store(dst + ((at) + 3) * dst_row, _mm256_castpd_ps(_mm256_unpackhi_pd(b1, b3))); }
TFM__ALWAYS_INLINE void TFM__FN(turn_square)(float *dst, int64_t dst_row, const float *src, int64_t src_row) {
    TFM__T_QUAD(0)
    TFM__T_QUAD(4)
}
#undef TFM__T_LOAD
#undef TFM__T_QUAD
#elif TFM__PASS == TFM__NEON
TFM__ALWAYS_INLINE void TFM__FN(turn_square)(float *dst, int64_t dst_row, const float *src, int64_t src_row) {
    const float32x4_t a0 = v_load(src), a1 = v_load(src + src_row);
    const float32x4_t a2 = v_load(src + 2 * src_row), a3 = v_load(src + 3 * src_row);
    const float64x2_t b0 = vreinterpretq_f64_f32(vtrn1q_f32(a0, a1)), b1 = vreinterpretq_f64_f32(vtrn2q_f32(a0, a1));
    const float64x2_t b2 = vreinterpretq_f64_f32(vtrn1q_f32(a2, a3)), b3 = vreinterpretq_f64_f32(vtrn2q_f32(a2, a3));
    v_store(dst, vreinterpretq_f32_f64(vtrn1q_f64(b0, b2)));
    v_store(dst + dst_row, vreinterpretq_f32_f64(vtrn1q_f64(b1, b3)));
    v_store(dst + 2 * dst_row, vreinterpretq_f32_f64(vtrn2q_f64(b0, b2)));
    v_store(dst + 3 * dst_row, vreinterpretq_f32_f64(vtrn2q_f64(b1, b3)));
}
#else
TFM__ALWAYS_INLINE void TFM__FN(turn_square)(float *dst, int64_t dst_row, const float *src, int64_t src_row) {
    int i, j;
    for (j = 0; j < TFM__W; j++) {
        for (i = 0; i < TFM__W; i++) dst[j * dst_row + i] = src[i * src_row + j];
    }
}
#endif

TFM__NOINLINE void TFM__FN(transpose_square)(float *dst, int64_t dst_row, const float *src, int64_t src_row) {
    TFM__FN(turn_square)(dst, dst_row, src, src_row);
}

/* dst[j * width + i] = src[i * src_row + j] of 16-bit elements for i < TFM__PANEL, j < 8. x86 has rows i and i + 8
 * in the halves of a vector, so that a column comes out whole; 512 bits would need more steps. */
#if TFM__PASS == TFM__SCALAR
static void TFM__FN(transpose_halves)(uint16_t *dst, int64_t width, const uint16_t *src, int64_t src_row) {
    int i, j;
    for (j = 0; j < 8; j++) {
        for (i = 0; i < TFM__PANEL; i++) dst[j * width + i] = src[i * src_row + j];
    }
}
#else
#if TFM__PASS == TFM__NEON
#define TFM__T_ROWS 8
#define TFM__T_LOAD(i) const uint16x8_t a##i = vld1q_u16(src + (i) * src_row);
#define TFM__T_ZIP(to, i, j, from, x, y, bits) \
    const uint16x8_t to##i = vreinterpretq_u16_u##bits(vzip1q_u##bits(vreinterpretq_u##bits##_u16(from##x), \
                                                                      vreinterpretq_u##bits##_u16(from##y))); \
    const uint16x8_t to##j = vreinterpretq_u16_u##bits(vzip2q_u##bits(vreinterpretq_u##bits##_u16(from##x), \
                                                                      vreinterpretq_u##bits##_u16(from##y)));
#define vreinterpretq_u16_u16(a) (a)
#define TFM__T_STORE(j) vst1q_u16(dst + (j) * width, d##j);
#else
#define TFM__T_ROWS 16
#define TFM__T_LOAD(i) const __m256i a##i = _mm256_inserti128_si256( \
    _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(src + (i) * src_row))), \
    _mm_loadu_si128((const __m128i *)(const void *)(src + ((i) + 8) * src_row)), 1);
#define TFM__T_ZIP(to, i, j, from, x, y, bits) \
    const __m256i to##i = _mm256_unpacklo_epi##bits(from##x, from##y); \
    const __m256i to##j = _mm256_unpackhi_epi##bits(from##x, from##y);
#define TFM__T_STORE(j) _mm256_storeu_si256((__m256i *)(void *)(dst + (j) * width), d##j);
#endif
TFM__NOINLINE void TFM__FN(transpose_halves)(uint16_t *dst, int64_t width, const uint16_t *src, int64_t src_row) {
    int64_t top;
    for (top = 0; top < TFM__PANEL; top += TFM__T_ROWS, dst += TFM__T_ROWS, src += TFM__T_ROWS * src_row) {
        TFM__T_LOAD(0) TFM__T_LOAD(1) TFM__T_LOAD(2) TFM__T_LOAD(3)
        TFM__T_LOAD(4) TFM__T_LOAD(5) TFM__T_LOAD(6) TFM__T_LOAD(7)
        TFM__T_ZIP(b, 0, 1, a, 0, 1, 16) TFM__T_ZIP(b, 2, 3, a, 2, 3, 16)
        TFM__T_ZIP(b, 4, 5, a, 4, 5, 16) TFM__T_ZIP(b, 6, 7, a, 6, 7, 16)
        TFM__T_ZIP(c, 0, 1, b, 0, 2, 32) TFM__T_ZIP(c, 2, 3, b, 1, 3, 32)
        TFM__T_ZIP(c, 4, 5, b, 4, 6, 32) TFM__T_ZIP(c, 6, 7, b, 5, 7, 32)
        TFM__T_ZIP(d, 0, 1, c, 0, 4, 64) TFM__T_ZIP(d, 2, 3, c, 1, 5, 64)
        TFM__T_ZIP(d, 4, 5, c, 2, 6, 64) TFM__T_ZIP(d, 6, 7, c, 3, 7, 64)
        TFM__T_STORE(0) TFM__T_STORE(1) TFM__T_STORE(2) TFM__T_STORE(3)
        TFM__T_STORE(4) TFM__T_STORE(5) TFM__T_STORE(6) TFM__T_STORE(7)
    }
}
#undef TFM__T_ROWS
#undef TFM__T_LOAD
#undef TFM__T_ZIP
#undef TFM__T_STORE
#undef vreinterpretq_u16_u16
#endif

/* Blocks of 16 x 16, whole cache lines of both sides: rows that lie a multiple of 4096 bytes apart share a set of L1,
 * which a line half written would leave (AVX2, 768 x 1024 in L3: 0.47 ms, 0.21). No prefetcher follows a column of src:
 * its lines are fetched two blocks ahead (AVX2, from memory: 0.57 ms, 0.32). Few rows of src stay in a cache anyway:
 * then along them (64 x 768 in L2: 0.0053 ms, 0.0042). */
#define TFM__T_LINE 16
#define TFM__T_FEW 256
#define TFM__T_AHEAD 32 /* rows of src */
static void TFM__FN(transpose)(float *dst, int64_t dst_row, const float *src, int64_t src_row, int64_t rows,
                               int64_t cols) {
    const int64_t height = cols <= TFM__T_FEW ? rows : TFM__T_LINE;
    for (int64_t top = 0; top < rows; top += height) {
        const int64_t bottom = tfm__min64(top + height, rows);
        for (int64_t left = 0; left < cols; left += TFM__T_LINE) {
            const int64_t right = tfm__min64(left + TFM__T_LINE, cols);
            int64_t r = top, i, j;
            for (j = left + TFM__T_AHEAD; cols > TFM__T_FEW && j < tfm__min64(right + TFM__T_AHEAD, cols); j++) {
                v_prefetch(src + j * src_row + top);
            }
            for (; r + TFM__W <= bottom; r += TFM__W) {
                for (j = left; j + TFM__W <= right; j += TFM__W) {
                    TFM__FN(transpose_square)(dst + r * dst_row + j, dst_row, src + j * src_row + r, src_row);
                }
                for (; j < right; j++) {
                    for (i = r; i < r + TFM__W; i++) dst[i * dst_row + j] = src[j * src_row + i];
                }
            }
            for (; r < bottom; r++) {
                for (j = left; j < right; j++) dst[r * dst_row + j] = src[j * src_row + r];
            }
        }
    }
}

/* A TFM__W square of src, row i at src[at + i * row], as f32: where it lies, when it is whole and f32; else copied
 * into `square` with zeros past `rows` and `cols`. */
static const float *TFM__FN(square)(float *square, int64_t *square_row, const void *src, int dtype, int64_t at,
                                    int64_t row, int64_t rows, int64_t cols) {
    int64_t i;
    *square_row = row;
    if (dtype == TFM_F32 && rows >= TFM__W && cols >= TFM__W) return (const float *)src + at;
    *square_row = TFM__W;
    for (i = 0; i < TFM__W; i++) {
        v_store(square + i * TFM__W, i < rows ? TFM__FN(widen)(src, dtype, at + i * row, cols) : v_zero());
    }
    return square;
}

/* Up to R rows of A and a vector of B's columns, squares of which are turned: for few rows packing B would take longer
 * than the product (1 x 4096 x 4096 from memory: 5.5 ms, 3.2; on AVX2 6.0, 3.0). */
#define TFM__TURN_DECLARE(r, V) tfm__v c##r = v_zero(); const float *const a##r = a + tfm__min64(r, rows - 1) * a_row;
#define TFM__TURN_STEP(r, V) c##r = v_fma(y, v_set1(a##r[k + i]), c##r);
#define TFM__TURN_PUT(r, V) if ((r) < rows) TFM__FN(put)(c + (r) * c_row, c##r, cols);
#define TFM__TURNED(R) \
    TFM__NOINLINE void TFM__FN(turned_##R)(const tfm__gemm *g, int64_t col) { \
        const float *const a = g->a; \
        float *const c = g->c + col; \
        float square[TFM__W * TFM__W], turned[TFM__W * TFM__W]; \
        const int64_t a_row = g->a_row, c_row = g->c_row, cols = g->cols - col, at = col * g->b_row, rows = g->rows; \
        const float *const whole = cols >= TFM__W ? (const float *)g->b + at : NULL; \
        int64_t k = 0, i, row; \
        TFM__ROWS##R(TFM__TURN_DECLARE, 1) \
        for (; whole && k + TFM__W <= g->depth; k += TFM__W) { \
            TFM__FN(turn_square)(turned, TFM__W, whole + k, g->b_row); \
            for (i = 0; i < TFM__W; i++) { \
                const tfm__v y = v_load(turned + i * TFM__W); \
                TFM__ROWS##R(TFM__TURN_STEP, 1) \
            } \
        } \
        for (; k < g->depth; k += TFM__W) { \
            const int64_t deep = tfm__min64(TFM__W, g->depth - k); \
            const float *const from = TFM__FN(square)(square, &row, g->b, TFM_F32, at + k, g->b_row, cols, deep); \
            TFM__FN(transpose_square)(turned, TFM__W, from, row); \
            for (i = 0; i < deep; i++) { \
                const tfm__v y = v_load(turned + i * TFM__W); \
                TFM__ROWS##R(TFM__TURN_STEP, 1) \
            } \
        } \
        TFM__ROWS##R(TFM__TURN_PUT, 1) \
    }
TFM__TURNED(1)
TFM__TURNED(4)
/* n <= TFM__W elements that lie `step` apart, zeros after them. */
TFM__NOINLINE tfm__v TFM__FN(collect)(const void *src, int dtype, int64_t at, int64_t step, int64_t n) {
    float lanes[TFM__W];
    int64_t i;
    if (n <= 0) return v_zero();
    if (step == 1) return TFM__FN(widen)(src, dtype, at, n);
    for (i = 0; i < TFM__W; i++) lanes[i] = i < n ? TFM__FN(element)(src, dtype, at + i * step) : 0.0f;
    return v_load(lanes);
}

/* Four whole panels of f32 rows that lie side by side; element (col, k) of dst as pack_panels says. */
TFM__NOINLINE void TFM__FN(pack_rows)(float *dst, int64_t width, const float *src, int64_t src_k, int64_t depth) {
    const int64_t panel = width == TFM__PANEL ? TFM__PANEL * depth : TFM__PANEL;
    float *const d1 = dst + panel, *const d2 = d1 + panel, *const d3 = d2 + panel;
    int64_t k, j;
    for (k = 0; k < depth * width; k += width, src += src_k) {
        for (j = 0; j < TFM__PANEL; j += TFM__W) {
            v_store(dst + k + j, v_load(src + j));
            v_store(d1 + k + j, v_load(src + TFM__PANEL + j));
            v_store(d2 + k + j, v_load(src + 2 * TFM__PANEL + j));
            v_store(d3 + k + j, v_load(src + 3 * TFM__PANEL + j));
        }
    }
}

/* One panel of rows of src, src_col apart: a cache line of each row, then the next line. */
static void TFM__FN(pack_panel)(void *dst, int dst_dtype, int64_t width, const void *src, int src_dtype,
                                int64_t src_col, int64_t cols, int64_t depth) {
    float square[TFM__W * TFM__W], turned[TFM__W * TFM__W];
    int64_t left = 0, j, k, i, row;
    if (src_dtype != TFM_F32 && src_dtype == dst_dtype && cols >= TFM__PANEL) {
        for (; left + 8 <= depth; left += 8) {
            TFM__FN(transpose_halves)((uint16_t *)dst + left * width, width, (const uint16_t *)src + left, src_col);
        }
    }
    for (; left < depth; left += TFM__T_LINE) {
        const int64_t right = tfm__min64(left + TFM__T_LINE, depth);
        for (j = 0; j < TFM__PANEL; j += TFM__W) {
            const int64_t n = cols - j; /* columns from here on: may be more than a vector, or none */
            for (k = left; k < right; k += TFM__W) {
                const int64_t deep = tfm__min64(TFM__W, right - k), to = k * width + j;
                const float *from = TFM__FN(square)(square, &row, src, src_dtype, j * src_col + k, src_col, n, deep);
                if (dst_dtype == TFM_F32 && deep == TFM__W) {
                    TFM__FN(transpose_square)((float *)dst + to, width, from, row);
                    continue;
                }
                TFM__FN(transpose_square)(turned, TFM__W, from, row);
                for (i = 0; i < deep; i++) {
                    TFM__FN(narrow)(dst, dst_dtype, to + i * width, v_load(turned + i * TFM__W));
                }
            }
        }
    }
}

/* Halves become small panels, which more rows share (8 x 4096 x 4096 of bf16: 7.4 ms, 4.9; AVX2 8.8, 5.1). */
static void TFM__FN(gemm_turned)(const tfm__gemm *g) {
    enum { depth = 64 };
    uint16_t panel[TFM__PANEL * depth];
    tfm__tile t;
    memset(&t, 0, sizeof t);
    t.a_row = g->a_row;
    t.a_step = 1;
    t.b[0] = panel;
    t.b_row = TFM__PANEL;
    t.c_row = g->c_row;
    for (int64_t j = 0; g->b_dtype != TFM_F32 && j < g->cols; j += TFM__PANEL) {
        for (int64_t k = 0; k == 0 || k < g->depth; k += depth) {
            const uint16_t *const from = (const uint16_t *)g->b + j * g->b_row + k;
            t.depth = tfm__min64(depth, g->depth - k);
            t.accumulate = k > 0;
            TFM__FN(pack_panel)(panel, g->b_dtype, TFM__PANEL, from, g->b_dtype, g->b_row, g->cols - j, t.depth);
            for (int64_t r = 0; r < g->rows; r += 4) {
                t.a = g->a + r * g->a_row + k;
                t.c = g->c + r * g->c_row + j;
                TFM__FN(edges)[g->b_dtype](&t, tfm__min64(4, g->rows - r), tfm__min64(TFM__PANEL, g->cols - j), 1);
            }
        }
    }
    for (int64_t j = 0; g->b_dtype == TFM_F32 && j < g->cols; j += TFM__W) {
        (g->rows == 1 ? TFM__FN(turned_1) : TFM__FN(turned_4))(g, j);
    }
    TFM__FN(gemm_finish)(g, g->bias, 0, g->cols);
}

static void TFM__FN(pack_panels)(void *dst, int dst_dtype, int64_t width, const void *src, int src_dtype,
                                 int64_t src_col, int64_t src_k, int64_t cols, int64_t depth) {
    const int64_t src_size = src_dtype == TFM_F32 ? 4 : 2, dst_size = dst_dtype == TFM_F32 ? 4 : 2;
    const int rows = src_dtype == TFM_F32 && dst_dtype == TFM_F32 && src_col == 1;
    int64_t col, j, k, step;
    for (col = 0; col < cols; col += step) {
        const int64_t left = cols - col, at = col % width, to = (col - at) * depth + at;
        step = rows && left >= 4 * TFM__PANEL ? 4 * TFM__PANEL : TFM__PANEL;
        if (step > TFM__PANEL) {
            TFM__FN(pack_rows)((float *)dst + to, width, (const float *)src + col, src_k, depth);
        } else if (src_k == 1) {
            TFM__FN(pack_panel)((char *)dst + to * dst_size, dst_dtype, width,
                                (const char *)src + col * src_col * src_size, src_dtype, src_col, left, depth);
        } else {
            for (j = 0; j < TFM__PANEL; j += TFM__W) {
                for (k = 0; k < depth; k++) {
                    const int64_t from = (col + j) * src_col + k * src_k;
                    const tfm__v x = TFM__FN(collect)(src, src_dtype, from, src_col, left - j);
                    TFM__FN(narrow)(dst, dst_dtype, to + j + k * width, x);
                }
            }
        }
    }
}

/* Panels of a weight as it lies, which are read again much later: they bypass the caches, so that no line of dst is
 * fetched to be overwritten, and the rows of the next panel are fetched in their order, since no prefetcher follows 16
 * short rows at once (768 x 768 in memory, AVX-512: f32 0.23 ms, 0.18; bf16 0.22 ms, 0.09). */
static void TFM__FN(pack_weight)(void *dst, const void *src, int dtype, int64_t cols, int64_t depth) {
    const int64_t size = dtype == TFM_F32 ? 4 : 2, line = 64 / size, panel = TFM__PANEL * depth * size;
    char block[TFM__PANEL * 64 + 64], *const lines = block + (64 - (uintptr_t)block % 64) % 64;
    char *to = (char *)dst;
    const char *from = (const char *)src;
    int64_t k, i;
    if ((uintptr_t)dst % 64 || panel % 64) {
        TFM__FN(pack_panels)(dst, dtype, TFM__PANEL, src, dtype, depth, 1, cols, depth);
        return;
    }
    for (; cols > 0; cols -= TFM__PANEL, from += panel) {
        for (k = 0; k < depth; k += line) {
            const int64_t deep = tfm__min64(line, depth - k);
            if (cols >= 2 * TFM__PANEL) {
                const char *const next = from + panel + k * TFM__PANEL * size;
                for (i = 0; i < TFM__PANEL * deep * size; i += 64) v_prefetch_l2(next + i);
            }
            TFM__FN(pack_panel)(lines, dtype, TFM__PANEL, from + k * size, dtype, depth, cols, deep);
            for (i = 0; i < TFM__PANEL * deep * size; i += 64, to += 64) v_stream(to, lines + i);
        }
    }
    v_fence();
}

/* Vectors may run over the end of their row of the strip: what comes later there (next k, same k further left) is
 * written later. Only at the last k of a strip they are cut. */
static void TFM__FN(pack_strips)(float *dst, const void *src, int src_dtype, int64_t src_row, int64_t src_k,
                                 int64_t rows, int64_t depth) {
    float square[TFM__W * TFM__W], turned[TFM__W * TFM__W];
    const int64_t groups = (TFM__TILE_ROWS + TFM__W - 1) / TFM__W;
    const int64_t count = tfm__ceil_div(rows, TFM__TILE_ROWS);
    int64_t strip, k, i, group;
    for (strip = 0; strip < count; strip++, dst += TFM__TILE_ROWS * depth) {
        const int64_t first = tfm__strip_begin(rows, count, strip);
        k = 0;
#if TFM__PASS == TFM__AVX512
        if (src_k == 1 && src_dtype == TFM_F32 && rows - first >= TFM__TILE_ROWS) {
            for (; k + TFM__W <= depth; k += TFM__W) {
                const float *const from = (const float *)src + first * src_row + k;
                TFM__FN(transpose_strip)(dst + k * TFM__TILE_ROWS, from, src_row);
            }
        }
#endif
        for (; k < depth; k += src_k == 1 ? TFM__W : 1) {
            for (group = groups - 1; group >= 0; group--) {
                const int64_t r = group * TFM__W;
                const int64_t n = rows - first - r, room = tfm__min64(TFM__W, TFM__TILE_ROWS - r);
                const int64_t at = (first + r) * src_row + k * src_k, deep = tfm__min64(TFM__W, depth - k);
                float *to = dst + k * TFM__TILE_ROWS + r;
                int64_t row;
                if (src_k != 1) {
                    TFM__FN(put)(to, TFM__FN(collect)(src, src_dtype, at, src_row, n), k + 1 < depth ? TFM__W : room);
                    continue;
                }
                const float *from = TFM__FN(square)(square, &row, src, src_dtype, at, src_row, n, deep);
                if (k + TFM__W < depth) {
                    TFM__FN(transpose_square)(to, TFM__TILE_ROWS, from, row);
                    continue;
                }
                TFM__FN(transpose_square)(turned, TFM__W, from, row);
                for (i = 0; i < deep; i++) TFM__FN(put)(to + i * TFM__TILE_ROWS, v_load(turned + i * TFM__W), room);
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Attention tiles. A block of keys yields (max, sum, output) started from nothing, and blocks merge by one formula: so
 *  the bits of a row depend neither on the rows beside it nor on later keys (they are masked and add exact zeros).
 * ---------------------------------------------------------------------------------------------------------------- */

static void TFM__FN(scale_rows)(tfm__scaled_row *row, int64_t rows, int64_t n, int64_t ahead_bytes) {
    for (; rows > 0; --rows, ++row) {
        const tfm__v by = v_set1(row->by);
        const float *const from = row->from;
        float *const to = row->to;
        int64_t i = 0;
        for (; i < ahead_bytes; i += 64) v_prefetch_l2(row->ahead + i);
        for (i = 0; i + TFM__W <= n; i += TFM__W) v_store(to + i, v_mul(v_load(from + i), by));
        if (i < n) v_storen(to + i, v_mul(v_loadn(from + i, n - i), by), n - i);
    }
}

/* Few keys are the rows of the product, and the queries its columns: as columns, keys would fill a part of one vector
 * (4096 queries, 1 key of 128: 0.40 ms, 0.33). Each score has the same chain. */
TFM__NOINLINE void TFM__FN(attn_scores_few)(tfm__attn_tile *t) {
    enum { depth = 64 };
    const tfm__v scale = v_set1(t->scale);
    float queries[TFM__ATTN_ROWS * depth], turned[TFM__PANEL * TFM__ATTN_ROWS];
    tfm__gemm g;
    memset(&g, 0, sizeof g);
    memset(turned, 0, sizeof turned);
    g.rows = t->keys;
    g.cols = tfm__round_up(t->rows, TFM__PANEL);
    g.a_row = t->k_row;
    g.b = queries;
    g.b_row = TFM__PANEL;
    g.c = turned;
    g.c_row = g.cols;
    g.activation = TFM_ACT_NONE;
    for (int64_t k = 0; k < t->key_size; k += depth, g.accumulate = 1) {
        g.depth = tfm__min64(depth, t->key_size - k);
        g.b_panel = TFM__PANEL * g.depth;
        g.a = (const float *)t->k + k;
        TFM__FN(pack_panels)(queries, TFM_F32, TFM__PANEL, t->q + k, TFM_F32, t->q_row, 1, t->rows, g.depth);
        for (int64_t i = 0; i < g.cols * g.depth; i += TFM__W) v_store(queries + i, v_mul(v_load(queries + i), scale));
        TFM__FN(gemm)(&g);
    }
    TFM__FN(transpose)(t->scores, TFM__BLOCK_KEYS, turned, g.cols, t->rows, tfm__round_up(t->keys, TFM__PANEL));
}

/* The key panels are a packed weight, the queries the rows of a product. */
static void TFM__FN(attn_scores)(tfm__attn_tile *t) {
    const int64_t size = t->k_dtype == TFM_F32 ? 4 : 2;
    tfm__gemm g;
    tfm__attn_strip x;
    if (t->k_row > 0) {
        TFM__FN(attn_scores_few)(t);
        return;
    }
    memset(&g, 0, sizeof g);
    g.depth = t->key_size;
    g.a_row = t->q_row;
    g.b_dtype = t->k_dtype;
    g.b_row = TFM__KEY_PANEL;
    g.b_panel = TFM__KEY_PANEL * t->key_size;
    g.b_wide = 1;
    g.c_row = TFM__BLOCK_KEYS;
    g.next = t->after_keys;
    g.ahead = t->ahead;
    g.ahead_row = t->ahead_row;
    g.ahead_cols = t->ahead_bytes;
    g.activation = TFM_ACT_NONE;
    if (t->turn > 0) {
        const size_t past = (size_t)(tfm__round_up(t->keys, TFM__PANEL) - t->keys) * sizeof(float);
        g.rows = t->rows;
        g.cols = t->keys;
        g.a = t->q;
        g.b = t->k;
        g.b_row = t->turn;
        g.c = t->scores;
        TFM__FN(gemm_turned)(&g);
        for (int64_t r = 0; r < t->rows; ++r) memset(t->scores + r * TFM__BLOCK_KEYS + t->keys, 0, past);
        return;
    }
    for (int64_t i = 0; tfm__attn_strip_of(t, TFM__TILE_ROWS, i, &x); ++i) {
        g.rows = x.end - x.row;
        g.cols = tfm__round_up(x.last, TFM__PANEL) - x.first;
        g.a = t->q + x.row * t->q_row;
        g.b_lane = x.first % TFM__KEY_PANEL;
        g.b = (const char *)t->k + (x.first - g.b_lane) * t->key_size * size;
        g.c = t->scores + x.row * TFM__BLOCK_KEYS + x.first;
        TFM__FN(gemm)(&g);
    }
}

/* score := -inf where keep is 0. Both have room for whole vectors. */
static void TFM__FN(attn_keep)(float *score, const unsigned char *keep, int64_t keys) {
    const tfm__v minus_inf = v_set1(tfm__bits_float(0xff800000u));
    for (int64_t i = 0; i < keys; i += TFM__W) {
        v_store(score + i, v_select(v_mask_u8(keep + i), v_load(score + i), minus_inf));
    }
}

/* score += bias, and -inf where bias is, whatever stood there. */
static void TFM__FN(attn_bias)(float *score, const float *bias, int64_t keys) {
    const tfm__v minus_inf = v_set1(tfm__bits_float(0xff800000u));
    for (int64_t i = 0; i < keys; i += TFM__W) {
        const tfm__v b = TFM__FN(get)(bias + i, keys - i);
        v_store(score + i, v_select(v_eq(b, minus_inf), minus_inf, v_add(v_load(score + i), b)));
    }
}

/* Maximum of a row's scores, NaN left out. Sets the last vector's columns past `keys` to -inf. *masked: some score is
 * -inf. */
TFM__NOINLINE float TFM__FN(attn_max)(float *score, int64_t keys, int *masked) {
    const tfm__v minus_inf = v_set1(tfm__bits_float(0xff800000u));
    tfm__v m0 = minus_inf, m1 = minus_inf, low0 = v_zero(), low1 = v_zero();
    int64_t i = 0;
    for (; i + 2 * TFM__W <= keys; i += 2 * TFM__W) {
        const tfm__v v0 = v_load(score + i), v1 = v_load(score + i + TFM__W);
        m0 = v_atleast(m0, v0);
        m1 = v_atleast(m1, v1);
        low0 = v_atmost(low0, v0);
        low1 = v_atmost(low1, v1);
    }
    for (; i < keys; i += TFM__W) {
        tfm__v v0 = TFM__FN(get)(score + i, keys - i);
        low0 = v_atmost(low0, v0);
        if (keys - i < TFM__W) {
            v0 = v_select(v_mask_n(keys - i), v0, minus_inf);
            v_store(score + i, v0);
        }
        m0 = v_atleast(m0, v0);
    }
    *masked = v_any(v_mask_or(v_eq(low0, minus_inf), v_eq(low1, minus_inf)));
    return v_hmax(v_atleast(m0, m1));
}

/* score := exp(score - *max), in whole vectors; returns their sum. Its order is tied to the key's place in the block:
 * more keys of weight 0 behind the last one do not change it. A row without a key has max = -inf: then every
 * weight is exp(-inf) = 0; with nothing but NaN *max becomes NaN, too. */
TFM__NOINLINE float TFM__FN(attn_weights)(float *score, int64_t keys, float *max) {
    const int none = tfm__float_bits(*max) == 0xff800000u;
    const tfm__v top = v_set1(none ? 0.0f : *max), log2_e = v_set1(1.44269504f);
    tfm__v sum = v_zero();
    float total;
    for (int64_t i = 0; i < keys; i += TFM__W) {
        const tfm__v e = v_exp2(v_mul(v_sub(v_load(score + i), top), log2_e));
        v_store(score + i, e);
        sum = v_add(sum, e);
    }
    total = v_sum(sum);
    if (none && tfm__float_bits(total) << 1 != 0) *max = total;
    return total;
}

/* Where column j of the values begins, and how far its keys lie apart; in elements. */
TFM__ALWAYS_INLINE int64_t TFM__FN(value_at)(const tfm__attn_tile *t, int64_t j, int64_t *row) {
    const int64_t lane = j % TFM__KEY_PANEL;
    *row = t->v_row < 0 ? tfm__min64(TFM__KEY_PANEL, t->value_size - (j - lane)) : t->v_row;
    return t->v_row < 0 ? (j - lane) * TFM__BLOCK_KEYS + lane : j;
}

/* 0 times a finite value adds 0 to a sum; Inf or NaN make it NaN. Four sums, so that latency does not count
 * (in plain C a vector is several chains already). Values known to be finite are left out. */
TFM__NOINLINE int TFM__FN(attn_values_finite)(const tfm__attn_tile *t) {
    const tfm__v zero = v_zero();
    const int64_t first = t->finite ? *t->finite : 0;
    tfm__v s0 = zero, s1 = zero, s2 = zero, s3 = zero;
    for (int64_t j = 0; j < t->value_size; j += TFM__W) {
        const int64_t m = t->value_size - j;
        int64_t row, key = first;
        const int64_t at = TFM__FN(value_at)(t, j, &row);
        for (; TFM__PASS != TFM__SCALAR && m >= TFM__W && key + 4 <= t->keys; key += 4) {
            s0 = v_fma(TFM__FN(widen)(t->v, t->v_dtype, at + key * row, TFM__W), zero, s0);
            s1 = v_fma(TFM__FN(widen)(t->v, t->v_dtype, at + (key + 1) * row, TFM__W), zero, s1);
            s2 = v_fma(TFM__FN(widen)(t->v, t->v_dtype, at + (key + 2) * row, TFM__W), zero, s2);
            s3 = v_fma(TFM__FN(widen)(t->v, t->v_dtype, at + (key + 3) * row, TFM__W), zero, s3);
        }
        for (; key < t->keys; ++key) s0 = v_fma(TFM__FN(widen)(t->v, t->v_dtype, at + key * row, m), zero, s0);
    }
    if (v_any(v_isnan(v_add(v_add(s0, s1), v_add(s2, s3))))) return 0;
    if (t->finite) *t->finite = tfm__max64(first, t->keys);
    return 1;
}

/* Output of one row from the keys that `masked` (a bit a key) does not name; the product's chain for the others. */
TFM__NOINLINE void TFM__FN(attn_skip)(const tfm__attn_tile *t, int64_t row, const tfm__attn_strip *x,
                                      const uint32_t *masked) {
    const float *const weight = t->scores + row * TFM__BLOCK_KEYS;
    for (int64_t j = 0; j < t->value_size; j += TFM__W) {
        const int64_t m = t->value_size - j;
        tfm__v sum = v_zero();
        int64_t value_row;
        const int64_t at = TFM__FN(value_at)(t, j, &value_row);
        for (int64_t key = x->first; key < x->last; ++key) {
            if (masked[key / 32] >> (key % 32) & 1u) continue;
            sum = v_fma(v_set1(weight[key]), TFM__FN(widen)(t->v, t->v_dtype, at + key * value_row, m), sum);
        }
        TFM__FN(put)(t->out + row * t->out_row + j, sum, m);
    }
}

/* The rows' maxima. masked[r]: some score of row r is -inf; returns whether any is. */
TFM__NOINLINE int TFM__FN(attn_maxima)(tfm__attn_tile *t, int *masked) {
    tfm__attn_strip x;
    int any = 0;
    for (int64_t i = 0; tfm__attn_strip_of(t, TFM__TILE_ROWS, i, &x); ++i) {
        for (int64_t r = x.row; r < x.end; ++r) {
            float *const score = t->scores + r * TFM__BLOCK_KEYS + x.first;
            t->max[r] = TFM__FN(attn_max)(score, x.last - x.first, &masked[r]);
            any |= masked[r];
        }
    }
    return any;
}

static void TFM__FN(attn_row_weights)(tfm__attn_tile *t, const tfm__attn_strip *x, int64_t r) {
    t->sum[r] = TFM__FN(attn_weights)(t->scores + r * TFM__BLOCK_KEYS + x->first, x->last - x->first, &t->max[r]);
}

/* The product of a strip's weights and the values. */
TFM__NOINLINE void TFM__FN(attn_strip_values)(tfm__attn_tile *t, const tfm__attn_strip *x) {
    const int64_t whole = t->value_size / TFM__KEY_PANEL * TFM__KEY_PANEL, size = t->v_dtype == TFM_F32 ? 4 : 2;
    tfm__gemm g;
    memset(&g, 0, sizeof g);
    g.rows = x->end - x->row;
    g.depth = x->last - x->first;
    g.a = t->scores + x->row * TFM__BLOCK_KEYS + x->first;
    g.a_row = TFM__BLOCK_KEYS;
    g.b_dtype = t->v_dtype;
    g.c_row = t->out_row;
    g.activation = TFM_ACT_NONE;
    for (int64_t j = 0; j < t->value_size; j += g.cols) { /* whole panels, then what is left */
        g.b_wide = t->v_row < 0 && j < whole;
        g.b_panel = g.b_wide ? TFM__KEY_PANEL * TFM__BLOCK_KEYS : TFM__PANEL;
        g.cols = (g.b_wide ? whole : t->value_size) - j;
        g.b = (const char *)t->v + TFM__FN(value_at)(t, j, &g.b_row) * size;
        g.b = (const char *)g.b + x->first * g.b_row * size;
        g.c = t->out + x->row * t->out_row + j;
        g.next = t->after_values ? (const char *)t->after_values + j * g.depth * size : NULL;
        TFM__FN(gemm)(&g);
    }
}

static void TFM__FN(attn_reduce)(tfm__attn_tile *t) {
    int masked[TFM__ATTN_ROWS];
    uint32_t which[TFM__ATTN_ROWS][TFM__BLOCK_KEYS / 32];
    tfm__attn_strip x;
    /* A masked key's weight of 0 takes it out of the product, unless its value is Inf or NaN: then it is skipped. */
    const int skip = TFM__FN(attn_maxima)(t, masked) && !TFM__FN(attn_values_finite)(t);
    for (int64_t i = 0; tfm__attn_strip_of(t, TFM__TILE_ROWS, i, &x); ++i) {
        for (int64_t r = x.row; r < x.end; ++r) {
            if (skip) memset(which[r], 0, sizeof which[r]);
            for (int64_t key = x.first; skip && key < x.last; ++key) {
                if (tfm__float_bits(t->scores[r * TFM__BLOCK_KEYS + key]) == 0xff800000u) {
                    which[r][key / 32] |= 1u << (key % 32);
                }
            }
            TFM__FN(attn_row_weights)(t, &x, r);
        }
        TFM__FN(attn_strip_values)(t, &x);
        for (int64_t r = x.row; skip && r < x.end; ++r) {
            if (masked[r]) TFM__FN(attn_skip)(t, r, &x, which[r]);
        }
    }
}

static int TFM__FN(attn_weigh)(tfm__attn_tile *t) {
    int masked[TFM__ATTN_ROWS];
    tfm__attn_strip x;
    if (TFM__FN(attn_maxima)(t, masked)) return 0;
    for (int64_t i = 0; tfm__attn_strip_of(t, TFM__TILE_ROWS, i, &x); ++i) {
        for (int64_t r = x.row; r < x.end; ++r) TFM__FN(attn_row_weights)(t, &x, r);
    }
    return 1;
}
static void TFM__FN(attn_values)(tfm__attn_tile *t) {
    tfm__attn_strip x;
    for (int64_t i = 0; tfm__attn_strip_of(t, TFM__TILE_ROWS, i, &x); ++i) TFM__FN(attn_strip_values)(t, &x);
}

/* `count` parts of `rows` rows each join the rows one after the other. A side without keys has max = -inf: the other
 * one comes through bit for bit. All exponentials first: one after the other they would wait for each other. */
static void TFM__FN(attn_merge)(int64_t count, int64_t rows, int64_t value_size, float *max, float *sum, float *out,
                                int64_t out_row, const float *max2, const float *sum2, const float *out2,
                                int64_t out2_row) {
    enum { room = TFM__ATTN_ROWS + TFM__W };
    const tfm__v minus_inf = v_set1(tfm__bits_float(0xff800000u)), zero = v_zero();
    const int64_t all = count * rows;
    float scale[2][room], sides[room]; /* of rows and parts; 0: the part is empty, 1: the row was, 2: neither */
    for (int64_t n = 0; n < all; n += rows) {
        for (int64_t r = 0; r < rows; r += TFM__W) {
            const tfm__v before = TFM__FN(get)(max + r, rows - r), part = TFM__FN(get)(max2 + n + r, rows - r);
            const tfm__m none = v_eq(part, minus_inf), first = v_eq(before, minus_inf);
            const tfm__v top = v_max(before, part);
            TFM__FN(put)(max + r, v_select(none, before, top), rows - r);
            v_store(sides + n + r, v_select(none, zero, v_select(first, v_set1(1.0f), v_set1(2.0f))));
            v_store(scale[0] + n + r, v_select(none, zero, v_select(first, minus_inf, v_sub(before, top))));
            v_store(scale[1] + n + r, v_select(none, minus_inf, v_select(first, zero, v_sub(part, top))));
        }
    }
    for (int i = 0; i < 2; ++i) { /* one text of v_exp */
        for (int64_t n = 0; n < all; n += TFM__W) v_store(scale[i] + n, v_exp(TFM__FN(get)(scale[i] + n, all - n)));
    }
    for (int64_t n = 0; n < all; n += rows) {
        for (int64_t r = 0; r < rows; r += TFM__W) {
            const int64_t left = rows - r;
            const tfm__v more = v_mul(TFM__FN(get)(sum2 + n + r, left), v_load(scale[1] + n + r));
            TFM__FN(put)(sum + r, v_fma(TFM__FN(get)(sum + r, left), v_load(scale[0] + n + r), more), left);
        }
    }
    for (int64_t n = 0; n < all; ++n) {
        const float *const from = out2 + n * out2_row;
        float *const to = out + n % rows * out_row;
        const tfm__v by = v_set1(scale[0][n]), by2 = v_set1(scale[1][n]);
        if (sides[n] == 1.0f) memcpy(to, from, (size_t)value_size * sizeof(float));
        for (int64_t j = 0; sides[n] == 2.0f && j < value_size; j += TFM__W) {
            const int64_t left = value_size - j;
            const tfm__v merged = v_fma(TFM__FN(get)(to + j, left), by, v_mul(TFM__FN(get)(from + j, left), by2));
            TFM__FN(put)(to + j, merged, left);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 *  The table of this pass, in the order of struct tfm__kernels. No slot may hold another instruction set's function.
 * ---------------------------------------------------------------------------------------------------------------- */
static const tfm__kernels TFM__FN(kernels) = {
#if TFM__PASS == TFM__AVX512
    TFM_ISA_AVX512, "avx512",
#elif TFM__PASS == TFM__AVX2
    TFM_ISA_AVX2, "avx2",
#elif TFM__PASS == TFM__NEON
    TFM_ISA_NEON, "neon",
#else
    TFM_ISA_SCALAR, "scalar",
#endif
    TFM__W, TFM__TILE_ROWS, TFM__PASS == TFM__AVX512, TFM__PASS == TFM__SCALAR ? 0 : 4,
    TFM__BLOCK_K, TFM__BLOCK_M,
    TFM__FN(gemm), TFM__FN(gemm_turned), TFM__FN(pack_panels), TFM__FN(pack_weight), TFM__FN(pack_strips),
    TFM__FN(transpose),
    TFM__FN(load), TFM__FN(store), TFM__FN(unary), TFM__FN(binary), TFM__FN(fma_scalar), TFM__FN(reduce), TFM__FN(glu),
    TFM__FN(softmax), TFM__FN(logsumexp), TFM__FN(norm), TFM__FN(rotary), TFM__FN(dot),
    TFM__FN(scale_rows), TFM__FN(attn_scores), TFM__FN(attn_keep), TFM__FN(attn_bias), TFM__FN(attn_reduce),
    TFM__FN(attn_weigh), TFM__FN(attn_values), TFM__FN(attn_merge)
};

/* What differs from pass to pass, or is too short a name to leave behind. */
#undef tfm__v
#undef tfm__i
#undef tfm__m
#undef v_zero
#undef v_set1
#undef v_iota
#undef v_load
#undef v_store
#undef v_loadn
#undef v_storen
#undef v_load_h
#undef v_loadn_h
#undef v_store_h
#undef v_storen_h
#undef v_load_b
#undef v_loadn_b
#undef v_shuffle_b
#undef v_store_b
#undef v_storen_b
#undef v_add
#undef v_sub
#undef v_mul
#undef v_div
#undef v_sqrt
#undef v_fma
#undef v_fnma
#undef v_min
#undef v_max
#undef v_atleast
#undef v_atmost
#undef v_abs
#undef v_neg
#undef v_round
#undef v_copysign
#undef v_scale2
#undef v_grow_low
#undef v_grow_high
#undef v_power2
#undef v_residue
#undef v_lt
#undef v_le
#undef v_eq
#undef v_isnan
#undef v_negative
#undef v_mask_and
#undef v_mask_or
#undef v_mask_not
#undef v_mask_n
#undef v_mask_u8
#undef v_select
#undef v_any
#undef v_all
#undef v_sum
#undef v_hmax
#undef v_hmin
#undef v_dot
#undef v_load_pairs
#undef v_loadn_pairs
#undef v_prefetch
#undef v_prefetch_l2
#undef v_stream
#undef v_fence
#undef v_to_i
#undef v_from_i
#undef v_as_i
#undef vi_as_v
#undef vi_set1
#undef vi_add
#undef vi_sub
#undef vi_and
#undef vi_or
#undef vi_xor
#undef vi_gt
#undef vi_eq
#undef v_exp
#undef v_exp2
#undef v_log
#undef v_sincos
#undef vi_shl
#undef vi_shr
#undef vi_sar
#undef v_relu
#undef tfm__g
#undef TFM__G
#undef TFM__CURVE
#undef TFM__EACH
#undef TFM__W
#undef TFM__TILE_LIST
#undef TFM__TILE_LIST_HALVES
#undef TFM__TILE_LIST_KEEP
#undef TFM__TILE_LIST_LOW
#undef TFM__TILE_LIST_PAIRS
#undef TFM__FAR_SIZE
#undef TFM__LOAD_B
#undef TFM__FEW_ROWS
#undef TFM__HALF_ROWS
#undef TFM__TILE_ROWS
#undef TFM__EDGE_COLS
#undef TFM__BLOCK_K
#undef TFM__BLOCK_M

#if TFM__PASS == TFM__AVX2 && defined(__clang__)
#pragma clang attribute pop
#elif TFM__PASS == TFM__AVX512 && defined(__clang__)
#pragma clang attribute pop
#elif TFM__PASS == TFM__SCALAR && TFM__X87
#pragma GCC pop_options
#elif TFM__PASS == TFM__AVX2 && defined(__GNUC__)
#pragma GCC pop_options
#elif TFM__PASS == TFM__AVX512 && defined(__GNUC__)
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif /* TFM__PASS */

/* ==================================================================================================================
 *  5  DISPATCH
 *
 *  A context holds a pointer to one constant table of kernels; contexts with different tables live side by side.
 * ================================================================================================================ */
#if defined(TRANSFORMER_IMPLEMENTATION) && !defined(TFM__PASS) && !defined(TFM__IMPLEMENTED)

/* The tables of this build by TFM_ISA_*; NULL: not in it. */
static const tfm__kernels *const tfm__kernel_tables[TFM_ISA_COUNT] = {
    &tfm__kernels_scalar,
#if TFM__HAVE_NEON
    &tfm__kernels_neon,
#else
    NULL,
#endif
#if TFM__HAVE_AVX2
    &tfm__kernels_avx2,
#else
    NULL,
#endif
#if TFM__HAVE_AVX512
    &tfm__kernels_avx512
#else
    NULL
#endif
};
static const char *const tfm__isa_names[TFM_ISA_COUNT] = {"scalar", "neon", "avx2", "avx512"};

/* NULL: not in this build, or no such number. Says nothing about the machine. */
TFM__UNUSED static const tfm__kernels *tfm__kernels_for(int isa) {
    return isa >= 0 && isa < TFM_ISA_COUNT ? tfm__kernel_tables[isa] : NULL;
}

/* Bit i: this build has TFM_ISA i and the machine runs it. */
TFM__UNUSED static uint32_t tfm__isa_usable(void) {
    tfm__cpu_record record;
    uint32_t mask;
    int isa;
    tfm__cpu_read(&record);
    mask = tfm__cpu_decode(&record).isas;
    for (isa = 0; isa < TFM_ISA_COUNT; isa++) {
        if (!tfm__kernel_tables[isa]) mask &= ~(1u << isa);
    }
    return mask;
}

TFM__UNUSED static uint32_t tfm__cpu_features(void) {
    tfm__cpu_record record;
    tfm__cpu_read(&record);
    return tfm__cpu_decode(&record).features;
}

TFM__UNUSED static const char *tfm__isa_name(int isa) {
    return isa >= 0 && isa < TFM_ISA_COUNT ? tfm__isa_names[isa] : "unknown";
}

/* -1: no such name. */
TFM__UNUSED static int tfm__isa_from_name(const char *name) {
    int isa;
    for (isa = 0; name && isa < TFM_ISA_COUNT; isa++) {
        if (strcmp(name, tfm__isa_names[isa]) == 0) return isa;
    }
    return -1;
}

/* The instruction set for a new context: the named one, or for NULL and "" the best of the mask tfm__isa_usable() gave.
 * Negative when it cannot be had: TFM__ISA_UNKNOWN, _NOT_BUILT, _NOT_HERE; never another one instead. */
enum { TFM__ISA_UNKNOWN = -1, TFM__ISA_NOT_BUILT = -2, TFM__ISA_NOT_HERE = -3 };
TFM__UNUSED static int tfm__isa_choose(const char *name, uint32_t usable) {
    int isa = TFM_ISA_COUNT - 1;
    if (name && name[0]) {
        isa = tfm__isa_from_name(name);
        if (isa < 0) return TFM__ISA_UNKNOWN;
        if (!tfm__kernel_tables[isa]) return TFM__ISA_NOT_BUILT;
        return usable >> isa & 1u ? isa : TFM__ISA_NOT_HERE;
    }
    while (isa > 0 && !(usable >> isa & 1u)) isa--;
    return isa;
}

/* ==================================================================================================================
 *  6  THREADS
 *
 *  How many threads, a small pool, and tfm__for, which every later chapter uses to spread its work. What is computed
 *  never depends on the number of threads: pieces are cut by the caller's grain alone.
 * ================================================================================================================ */

#define TFM__SCRATCH_BYTES (1 << 20)  /* per slot: tiles of K and V, scores and outputs of a row block, packs */
#define TFM__MAX_THREADS 1024
#define TFM__SPIN_US 50
/* FLOPs or bytes that pay for one more slot: about 1 us of one core. A spinning worker joins within 0.4 us, a parked
 * one within 5 to 10 (measured on a 2-core EPYC). */
#define TFM__WORK_PER_SLOT 40000.0
#define TFM__STACK_BYTES (2 << 20)

/* -- how many threads ---------------------------------------------------------------------------------------------- */

#if TFM__LINUX && TFM__THREADS
#define TFM__CPUS 4096

/* The beginning of a small file, as text. 1: read. */
static int tfm__read_text(const char *path, char *text, int64_t size) {
    int file = open(path, O_RDONLY);
    int64_t n = 0;
    if (file < 0) return 0;
    while (n < size - 1) {
        ssize_t got = read(file, text + n, (size_t)(size - 1 - n));
        if (got <= 0) break;
        n += got;
    }
    close(file);
    text[n] = 0;
    return n > 0;
}

/* CPU threads that this process may run on, and the cores that they belong to. */
static void tfm__count_cores(int *cpus, int *cores) {
    uint64_t allowed[TFM__CPUS / 64], seen[TFM__CPUS / 64];
    char path[96], text[64];
    int cpu;
    *cpus = *cores = 0;
    memset(allowed, 0, sizeof allowed);
    memset(seen, 0, sizeof seen);
    if (sched_getaffinity(0, sizeof allowed, (TFM__CPU_SET *)(void *)allowed) < 0) return;
    for (cpu = 0; cpu < TFM__CPUS; cpu++) {
        long core = cpu;
        if (!(allowed[cpu / 64] >> (cpu % 64) & 1)) continue;
        ++*cpus;
        tfm__format(path, (int64_t)sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        /* the first one in the list names the core */
        if (tfm__read_text(path, text, (int64_t)sizeof text)) core = strtol(text, NULL, 10);
        if (core < 0 || core >= TFM__CPUS) core = cpu;
        if (!(seen[core / 64] >> (core % 64) & 1)) ++*cores;
        seen[core / 64] |= (uint64_t)1 << (core % 64);
    }
}

/* Least whole number of CPUs that the quotas of a group and of all above it allow; 0: no quota. root: where the
 * hierarchy is mounted, group: from /proc/self/cgroup (in a container it may not exist below root: then only root
 * counts). */
static int tfm__quota_of(const char *root, char *group, const char *quota_file, const char *period_file) {
    char path[512], text[64];
    int least = 0;
    for (;;) {
        char *slash, *rest;
        double quota = 0, period = 0;
        tfm__format(path, (int64_t)sizeof path, "%s%s/%s", root, group, quota_file);
        if (tfm__read_text(path, text, (int64_t)sizeof text)) {
            quota = strtod(text, &rest);
            period = period_file ? 0 : strtod(rest, NULL); /* v2: "max 100000" or "150000 100000" */
        }
        if (period_file) {
            tfm__format(path, (int64_t)sizeof path, "%s%s/%s", root, group, period_file);
            if (tfm__read_text(path, text, (int64_t)sizeof text)) period = strtod(text, NULL);
        }
        if (quota > 0 && period > 0 && quota / period < TFM__MAX_THREADS) {
            int n = (int)ceil(quota / period);
            if (!least || n < least) least = n;
        }
        slash = strrchr(group, '/');
        if (!slash) return least;
        *slash = 0;
    }
}

/* The CPU quota of this process's control group; 0: none. */
static int tfm__cpu_quota(void) {
    char text[4096], *line = text;
    if (!tfm__read_text("/proc/self/cgroup", text, (int64_t)sizeof text)) return 0;
    while (line && *line) {  /* "0::/group" (v2), "4:cpu,cpuacct:/group" (v1) */
        char *next = strchr(line, '\n'), *names = strchr(line, ':'), *group = names ? strchr(names + 1, ':') : NULL;
        if (next) *next++ = 0;
        if (group) {
            int quota;
            *group++ = 0;
            if (strncmp(line, "0:", 2) == 0 && !names[1]) {
                quota = tfm__quota_of("/sys/fs/cgroup", group, "cpu.max", NULL);
            } else if (strncmp(names + 1, "cpu", 3) == 0 && (names[4] == ',' || !names[4])) {
                quota = tfm__quota_of("/sys/fs/cgroup/cpu", group, "cpu.cfs_quota_us", "cpu.cfs_period_us");
            } else {
                quota = 0;
            }
            if (quota) return quota;
        }
        line = next;
    }
    return 0;
}

#elif TFM__WINDOWS && TFM__THREADS

static void tfm__count_cores(int *cpus, int *cores) {
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION list[512];
    DWORD bytes = (DWORD)sizeof list, i;
    DWORD_PTR mine = 0, all = 0;
    int bit;
    *cpus = *cores = 0;
    if (!GetProcessAffinityMask(GetCurrentProcess(), &mine, &all)) return;
    for (bit = 0; bit < (int)sizeof mine * 8; bit++) *cpus += (int)(mine >> bit & 1);
    if (!GetLogicalProcessorInformation(list, &bytes)) return;
    for (i = 0; i < bytes / sizeof list[0]; i++) {
        *cores += list[i].Relationship == RelationProcessorCore && (list[i].ProcessorMask & mine);
    }
}

static int tfm__cpu_quota(void) { return 0; }

#elif TFM__THREADS

static void tfm__count_cores(int *cpus, int *cores) {
#if defined(__APPLE__)
    int n = 0;
    size_t size = sizeof n;
    *cores = sysctlbyname("hw.physicalcpu", &n, &size, NULL, 0) == 0 ? n : 0;
#else
    *cores = 0;
#endif
#if defined(_SC_NPROCESSORS_ONLN)
    *cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
#else
    *cpus = *cores;
#endif
}

static int tfm__cpu_quota(void) { return 0; }
#endif

/* The least of cores, affinity and quota, at least 1. *cpus: CPU threads that may be used, 0 when unknown. */
static int tfm__default_threads(int *cpus) {
#if TFM__THREADS
    int cores = 0, quota = tfm__cpu_quota();
    tfm__count_cores(cpus, &cores);
    if (cores < 1) cores = *cpus;
    if (quota && (quota < cores || cores < 1)) cores = quota;
    return cores < 1 ? 1 : cores > TFM__MAX_THREADS ? TFM__MAX_THREADS : cores;
#else
    *cpus = 1;
    return 1;
#endif
}

/* -- the pool ------------------------------------------------------------------------------------------------------ */

/* Runs [begin, end) of the items; slot names the scratch and is at most the number of threads - 1. */
typedef void (*tfm__task)(void *arg, int64_t begin, int64_t end, int slot);

typedef struct tfm__job {
    tfm_ctx *c;
    tfm__task task;
    void *arg;
    int64_t items, grain, pieces;
    int64_t next;             /* atomic: the next piece */
    uint64_t fp_mode;
} tfm__job;

#if TFM__THREADS
#if TFM__WINDOWS
#if !defined(_WIN32_WINNT) || _WIN32_WINNT < 0x0600
#error "transformer.h: threads need Windows Vista or later: define _WIN32_WINNT as 0x0600 or more, or TFM_NO_THREADS"
#endif
typedef SRWLOCK tfm__mutex;
typedef CONDITION_VARIABLE tfm__cond;
typedef HANDLE tfm__thread;
static void tfm__lock(tfm__mutex *m) { AcquireSRWLockExclusive(m); }
static void tfm__unlock(tfm__mutex *m) { ReleaseSRWLockExclusive(m); }
static void tfm__wait(tfm__cond *v, tfm__mutex *m) { SleepConditionVariableSRW(v, m, INFINITE, 0); }
static void tfm__wake(tfm__cond *v) { WakeAllConditionVariable(v); }
#else
typedef pthread_mutex_t tfm__mutex;
typedef pthread_cond_t tfm__cond;
typedef pthread_t tfm__thread;
static void tfm__lock(tfm__mutex *m) { pthread_mutex_lock(m); }
static void tfm__unlock(tfm__mutex *m) { pthread_mutex_unlock(m); }
static void tfm__wait(tfm__cond *v, tfm__mutex *m) { pthread_cond_wait(v, m); }
static void tfm__wake(tfm__cond *v) { pthread_cond_broadcast(v); }
#endif

typedef struct tfm__bed {     /* where one thread sleeps */
    tfm__mutex mutex;
    tfm__cond cond;
    /* Atomic: somebody has to wake it. It is set, and the gate opened, by an addition: who does that looks at the other
     * word next, and under QEMU a load may overtake a store, of whatever order. */
    int64_t asleep;
} tfm__bed;

typedef struct tfm__worker {
    tfm__pool *pool;
    int slot;
    double aside;             /* when it last stepped aside */
    tfm__thread thread;
    tfm__bed bed;
} tfm__worker;
#endif

struct tfm__pool {
    tfm__job job;
    int64_t process;          /* that made it: a forked child has no workers */
    int running;              /* a job is spread: a tfm__for inside of it is serial */
    int64_t *thread;          /* atomic, per slot: the thread that works for it, 0: none */
#if TFM__THREADS
    char apart[64];           /* the gate is spun on: a line of its own */
    int64_t gate, stop;       /* atomic */
    char apart2[64];
    double spin;              /* seconds */
    int workers;
    int64_t cpu, crowded;     /* atomic: where the caller started the job; a worker has found itself there too */
    tfm__bed bed;             /* the caller's */
    tfm__worker *worker;
#endif
};

/* Takes pieces until none is left or the call is cancelled. */
static void tfm__job_work(tfm__job *j, int slot) {
    while (!tfm__cancelled(j->c)) {
        int64_t piece = tfm__atomic_add(&j->next, 1), begin = piece * j->grain;
        if (piece >= j->pieces) return;
        j->task(j->arg, begin, begin + tfm__min64(j->grain, j->items - begin), slot);
    }
}

/* The same on a thread that is not the caller's. */
static void tfm__job_join(tfm__job *j, int slot) {
    int64_t *thread = &j->c->pool->thread[slot];
    uint64_t mode = tfm__fp_mode();
    tfm__fp_set(j->fp_mode);
    tfm__atomic_store(thread, (int64_t)tfm__thread_id());
    tfm__job_work(j, slot);
    tfm__atomic_store(thread, 0);
    tfm__fp_set(mode);
}

#if TFM__THREADS
/* The gate says in one word who may work: number of the job, slots that take part, open, workers inside. A worker
 * comes in while it is open, and only then looks at the job; the caller closes it and waits until nobody is inside. So
 * a worker that wakes up late neither delays a job that is done nor sees half of the next one. */
#define TFM__GATE_OPEN ((int64_t)1 << 16)
#define TFM__GATE_INSIDE(word) ((word) & (TFM__GATE_OPEN - 1))
#define TFM__GATE_SLOTS(word) ((int)(((word) >> 17) & 0xfff))
#define TFM__GATE_JOB(word) ((word) >> 29)
#define TFM__GATE_WORD(job, slots) ((((job) & 0x3fffffff) << 29) | ((int64_t)(slots) << 17) | TFM__GATE_OPEN)

static int tfm__gate_calls(const tfm__worker *w, int64_t word, int64_t seen) {
    return (word & TFM__GATE_OPEN) && TFM__GATE_JOB(word) != seen && w->slot < TFM__GATE_SLOTS(word);
}

/* 1: somebody slept there and is woken. */
static int tfm__bed_leave(tfm__bed *b) {
    if (!tfm__atomic_load(&b->asleep)) return 0;
    tfm__lock(&b->mutex);
    tfm__wake(&b->cond);
    tfm__unlock(&b->mutex);
    return 1;
}

/* The processor that runs this thread now; -1: not known. */
static int64_t tfm__cpu_here(void) {
#if TFM__LINUX
    return sched_getcpu();
#else
    return -1;
#endif
}

/* Linux often puts a thread that is woken on the processor of the one that woke it, and leaves it there: for 10 ms and
 * more both share one while others are idle. A worker that finds itself there goes elsewhere: the processors that it
 * may run on are narrowed for a moment and widened again. */
static void tfm__step_aside(tfm__worker *w) {
#if TFM__LINUX
    const int64_t cpu = tfm__cpu_here();
    uint64_t all[TFM__CPUS / 64], others[TFM__CPUS / 64];
    double now;
    if (cpu < 0 || cpu >= TFM__CPUS || cpu != tfm__atomic_load(&w->pool->cpu)) return;
    now = tfm__now();
    if (now - w->aside < 2e-4) return; /* there is no room elsewhere, or the caller has moved */
    w->aside = now;
    memset(all, 0, sizeof all);
    if (sched_getaffinity(0, sizeof all, (TFM__CPU_SET *)(void *)all) < 0) return;
    memcpy(others, all, sizeof all);
    others[cpu / 64] &= ~((uint64_t)1 << (cpu % 64));
    if (sched_setaffinity(0, sizeof others, (TFM__CPU_SET *)(void *)others) < 0) return; /* none is left */
    (void)sched_setaffinity(0, sizeof all, (TFM__CPU_SET *)(void *)all);
    tfm__atomic_store(&w->pool->crowded, 1);
#else
    (void)w;
#endif
}

/* Returns when the gate calls this worker (1) or the pool ends (0). Spins first, then sleeps; who wakes up too late
 * for a job spins again, since the next one is near. */
static int tfm__worker_wait(tfm__worker *w, int64_t seen) {
    tfm__pool *p = w->pool;
    while (!tfm__atomic_load(&p->stop)) {
        double end = p->spin > 0 ? tfm__now() + p->spin : 0;
        do {
            int i;
            for (i = 0; i < 32; i++) {
                if (tfm__gate_calls(w, tfm__atomic_load(&p->gate), seen)) return 1;
                if (end > 0) tfm__pause();
            }
        } while (end > 0 && tfm__now() < end);
        tfm__lock(&w->bed.mutex);
        tfm__atomic_add(&w->bed.asleep, 1); /* then looks at the gate; the caller opens it and then looks here */
        if (!tfm__atomic_load(&p->stop) && !tfm__gate_calls(w, tfm__atomic_load(&p->gate), seen)) {
            tfm__wait(&w->bed.cond, &w->bed.mutex);
        }
        tfm__atomic_store(&w->bed.asleep, 0);
        tfm__unlock(&w->bed.mutex);
    }
    return 0;
}

static void tfm__worker_run(tfm__worker *w) {
    tfm__pool *p = w->pool;
    int64_t seen = 0;
    while (tfm__worker_wait(w, seen)) {
        int64_t word = tfm__atomic_load(&p->gate);
        if (!tfm__gate_calls(w, word, seen) || !tfm__atomic_cas(&p->gate, word, word + 1)) continue;
        seen = TFM__GATE_JOB(word);
        tfm__step_aside(w);
        tfm__job_join(&p->job, w->slot);
        word = tfm__atomic_add(&p->gate, -1);
        if (!(word & TFM__GATE_OPEN) && TFM__GATE_INSIDE(word) == 1) (void)tfm__bed_leave(&p->bed);
    }
}

/* Where workers have been put on the caller's processor before, one that is woken now gets it first, to leave it. */
static void tfm__give_way(tfm__pool *p, int woken) {
#if TFM__LINUX
    if (woken && tfm__atomic_load(&p->crowded)) (void)sched_yield();
#else
    (void)p, (void)woken;
#endif
}

/* Spreads p->job over `slots` slots, the caller being slot 0. */
static void tfm__pool_run(tfm__pool *p, int slots) {
    const int64_t closed = tfm__atomic_load(&p->gate);
    int64_t word = TFM__GATE_WORD(TFM__GATE_JOB(closed) + 1, slots);
    double end;
    int i, woken = 0;
    tfm__atomic_store(&p->cpu, tfm__cpu_here());
    tfm__atomic_add(&p->gate, word - closed);
    for (i = 0; i < slots - 1; i++) woken |= tfm__bed_leave(&p->worker[i].bed);
    tfm__give_way(p, woken);
    tfm__job_work(&p->job, 0);
    do word = tfm__atomic_load(&p->gate);
    while (!tfm__atomic_cas(&p->gate, word, word & ~TFM__GATE_OPEN));
    end = p->spin > 0 && TFM__GATE_INSIDE(word) ? tfm__now() + p->spin : 0;
    while (end > 0 && TFM__GATE_INSIDE(tfm__atomic_load(&p->gate))) {
        for (i = 0; i < 32 && TFM__GATE_INSIDE(tfm__atomic_load(&p->gate)); i++) tfm__pause();
        if (i == 32 && tfm__now() > end) break;
    }
    if (!TFM__GATE_INSIDE(tfm__atomic_load(&p->gate))) return;
    tfm__lock(&p->bed.mutex);
    tfm__atomic_add(&p->bed.asleep, 1);
    while (TFM__GATE_INSIDE(tfm__atomic_load(&p->gate))) tfm__wait(&p->bed.cond, &p->bed.mutex);
    tfm__atomic_store(&p->bed.asleep, 0);
    tfm__unlock(&p->bed.mutex);
}

#if TFM__WINDOWS
static int64_t tfm__process_id(void) { return (int64_t)GetCurrentProcessId(); }

static int tfm__bed_make(tfm__bed *b) {
    InitializeSRWLock(&b->mutex);
    InitializeConditionVariable(&b->cond);
    return 1;
}

static void tfm__bed_free(tfm__bed *b) { (void)b; }

static DWORD WINAPI tfm__thread_main(LPVOID arg) {
    tfm__worker_run((tfm__worker *)arg);
    return 0;
}

static int tfm__thread_start(tfm__worker *w) {
    w->thread = CreateThread(NULL, TFM__STACK_BYTES, tfm__thread_main, w, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    return w->thread != NULL;
}

static void tfm__thread_join(tfm__worker *w) {
    WaitForSingleObject(w->thread, INFINITE);
    CloseHandle(w->thread);
}
#else
static int64_t tfm__process_id(void) { return (int64_t)getpid(); }

static int tfm__bed_make(tfm__bed *b) {
    if (pthread_mutex_init(&b->mutex, NULL)) return 0;
    if (!pthread_cond_init(&b->cond, NULL)) return 1;
    pthread_mutex_destroy(&b->mutex);
    return 0;
}

static void tfm__bed_free(tfm__bed *b) {
    pthread_cond_destroy(&b->cond);
    pthread_mutex_destroy(&b->mutex);
}

static void *tfm__thread_main(void *arg) {
    tfm__worker_run((tfm__worker *)arg);
    return NULL;
}

/* Workers take no signals: handlers run on the program's own threads. (Plain -std=c99 hides the means.) */
static int tfm__thread_start(tfm__worker *w) {
    pthread_attr_t attr;
    int failed;
#if defined(SIG_SETMASK)
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    failed = pthread_attr_init(&attr);
    if (!failed) {
        (void)pthread_attr_setstacksize(&attr, TFM__STACK_BYTES);
        failed = pthread_create(&w->thread, &attr, tfm__thread_main, w);
        pthread_attr_destroy(&attr);
    }
#if defined(SIG_SETMASK)
    pthread_sigmask(SIG_SETMASK, &before, NULL);
#endif
    return !failed;
}

static void tfm__thread_join(tfm__worker *w) { pthread_join(w->thread, NULL); }
#endif
#endif /* TFM__THREADS */

static int64_t tfm__pool_bytes(int64_t slots) {
    int64_t bytes = (int64_t)sizeof(tfm__pool) + slots * (int64_t)sizeof(int64_t);
#if TFM__THREADS
    bytes += slots * (int64_t)sizeof(tfm__worker);
#endif
    return bytes;
}

/* Starts up to c->threads - 1 workers (none when the user's parallel_for does the work); c->threads becomes what there
 * is. spin: seconds. 0: the allocator has no memory. */
static int tfm__pool_create(tfm_ctx *c, double spin) {
    int64_t slots = c->threads, bytes = tfm__pool_bytes(slots);
    tfm__pool *p;
    if (slots < 2) return 1;
    p = (tfm__pool *)tfm__take(c, bytes);
    if (!p) return 0;
    memset(p, 0, (size_t)bytes);
    c->pool = p;
    p->thread = (int64_t *)(void *)(p + 1);
#if TFM__THREADS
    p->process = tfm__process_id();
    p->spin = spin;
    p->worker = (tfm__worker *)(void *)(p->thread + slots);
    if (!c->options.parallel_for && tfm__bed_make(&p->bed)) {
        for (; p->workers < slots - 1; p->workers++) {
            tfm__worker *w = &p->worker[p->workers];
            w->pool = p;
            w->slot = p->workers + 1;
            if (!tfm__bed_make(&w->bed)) break;
            if (tfm__thread_start(w)) continue;
            tfm__bed_free(&w->bed);
            break;
        }
        if (!p->workers) tfm__bed_free(&p->bed);
    }
    if (!c->options.parallel_for) c->threads = p->workers + 1;
#else
    (void)spin;
    if (!c->options.parallel_for) c->threads = 1;
#endif
    return 1;
}

static void tfm__pool_destroy(tfm_ctx *c) {
    tfm__pool *p = c->pool;
    if (!p) return;
#if TFM__THREADS
    if (p->workers && p->process == tfm__process_id()) {
        int i;
        tfm__atomic_store(&p->stop, 1);
        for (i = 0; i < p->workers; i++) {
            tfm__lock(&p->worker[i].bed.mutex);
            tfm__wake(&p->worker[i].bed.cond);
            tfm__unlock(&p->worker[i].bed.mutex);
            tfm__thread_join(&p->worker[i]);
            tfm__bed_free(&p->worker[i].bed);
        }
        tfm__bed_free(&p->bed);
    }
#endif
    c->pool = NULL;
    tfm__give(c, p);
}

/* -- spreading work ------------------------------------------------------------------------------------------------ */

/* TFM__SCRATCH_BYTES of the slot's own, 64-byte aligned, not initialised. */
TFM__UNUSED static void *tfm__scratch(const tfm_ctx *c, int slot) {
    return c->scratch + (int64_t)slot * TFM__SCRATCH_BYTES;
}

/* What the user's parallel_for calls. */
static void tfm__hook_run(void *arg, int slot) {
    tfm__job *j = (tfm__job *)arg;
    if (slot >= 0 && slot < j->c->threads) tfm__job_join(j, slot);
}

/* The slot that the calling thread works for. */
static int tfm__slot_here(const tfm_ctx *c) {
    int64_t self;
    int slot = c->threads - 1;
    if (!c->pool || !c->pool->running) return 0;
    self = (int64_t)tfm__thread_id();
    while (slot > 0 && tfm__atomic_load(&c->pool->thread[slot]) != self) slot--;
    return slot;
}

/* Calls task for all of [0, items) in pieces of `grain` items (the last may be shorter), on as many slots as pay for
 * `work` FLOPs or bytes. Pieces are taken in order from a shared counter. Stops between pieces when the call is
 * cancelled. Inside of a task it runs on the slot that calls. */
TFM__UNUSED static void tfm__for(tfm_ctx *c, int64_t items, int64_t grain, double work, tfm__task task, void *arg) {
    tfm__pool *p = c->pool;
    tfm__job job;
    int64_t slots;
    if (items <= 0) return;
    job.c = c;
    job.task = task;
    job.arg = arg;
    job.items = items;
    job.grain = tfm__max64(grain, 1);
    job.pieces = tfm__ceil_div(items, job.grain);
    job.next = 0;
    job.fp_mode = 0;
    if (p && p->running) {
        tfm__job_work(&job, tfm__slot_here(c));
        return;
    }
    slots = tfm__min64(c->threads, job.pieces);
    if (work < TFM__WORK_PER_SLOT * (double)slots) slots = tfm__min64(slots, 1 + (int64_t)(work / TFM__WORK_PER_SLOT));
#if TFM__THREADS
    if (slots > 1 && p->process != tfm__process_id()) slots = 1;
#endif
    if (slots < 2) {
        tfm__job_work(&job, 0);
        return;
    }
    job.fp_mode = tfm__fp_mode();
    p->job = job;
    p->running = 1;
    if (c->options.parallel_for) c->options.parallel_for(c->options.parallel_user, (int)slots, tfm__hook_run, &p->job);
#if TFM__THREADS
    else tfm__pool_run(p, (int)slots);
#endif
    p->running = 0;
}

/* ==================================================================================================================
 *  7  TENSORS
 *
 *  First the life of a context and what can be asked of it: errors, marks, memory, dry runs, the profile. Then dtypes,
 *  elements, shapes, tensor headers, text: all of it below the ops, nothing is checked for its owner, recorded or
 *  profiled. The public functions that make or read tensors stand in chapter 8, where tfm__enter is.
 * ================================================================================================================ */

/* -- making and destroying ----------------------------------------------------------------------------------------- */

/* Options that no context can work with, and the instruction set. Sets the error. */
static void tfm__ctx_check(tfm_ctx *c, const char *isa) {
    static const char *const why[3] = {"is not one of scalar, neon, avx2, avx512", "is not in this build",
                                       "does not run on this machine"};
    const tfm_options *o = &c->options;
    const char *name = isa ? isa : getenv("TFM_ISA");
    const uint32_t usable = tfm__isa_usable();
    const int choice = tfm__isa_choose(name, usable);
    c->isa = choice < 0 ? TFM_ISA_SCALAR : choice;
    c->k = tfm__kernels_for(c->isa);
    if (choice < 0) {
        char list[64] = "";
        int i;
        for (i = 0; i < TFM_ISA_COUNT; i++) {
            if (!(usable >> i & 1u)) continue;
            if (list[0]) strcat(list, ", ");
            strcat(list, tfm__isa_name(i));
        }
        tfm__fail(c, choice == TFM__ISA_UNKNOWN ? TFM_INVALID : TFM_UNSUPPORTED,
                  "tfm_create: %s \"%.40s\" %s; here: %s", isa ? "isa" : "environment TFM_ISA", name, why[-1 - choice],
                  list);
    }
    c->bf16_dot = o->bf16_dot && TFM__HAVE_BF16_DOT && c->isa == TFM_ISA_AVX512 &&
                  (tfm__cpu_features() & TFM__CPU_AVX512_BF16) != 0;
    if (o->bf16_dot && !c->bf16_dot) tfm__log(c, TFM_LOG_INFO, "tfm_create: no BF16 dot products here");
    if (o->threads < 0 || o->threads > TFM__MAX_THREADS) {
        tfm__fail(c, TFM_INVALID, "tfm_create: threads is %d, not 0 to %d", o->threads, TFM__MAX_THREADS);
    } else if (o->parallel_for && !o->threads) {
        tfm__fail(c, TFM_INVALID, "tfm_create: parallel_for is set, but threads is 0");
    }
    if (o->memory_limit < 0) {
        tfm__fail(c, TFM_INVALID, "tfm_create: memory_limit is %lld", (long long)o->memory_limit);
    }
}

/* Pool and scratch. 0: the allocator has no memory (memory_limit is an error of the context instead). */
static int tfm__ctx_threads(tfm_ctx *c) {
    int cpus = 0, available = tfm__default_threads(&cpus), wanted;
    int spin = c->options.spin_us ? c->options.spin_us : TFM__SPIN_US;
    int64_t bytes;
    wanted = c->threads = c->options.threads ? c->options.threads : available;
    if (cpus && c->threads > cpus) spin = 0; /* who spins then keeps another of us from working */
    if (!tfm__pool_create(c, 1e-6 * spin)) {
        bytes = tfm__pool_bytes(c->threads);
    } else {
        bytes = (int64_t)c->threads * TFM__SCRATCH_BYTES;
        c->scratch = (char *)tfm__take(c, bytes);
        if (c->threads < wanted) {
            tfm__log(c, TFM_LOG_WARNING, "tfm_create: %d of %d threads could be made", c->threads, wanted);
        }
        if (c->scratch) return 1;
    }
    if (tfm__within_limit(c, tfm__block_bytes(bytes))) return 0;
    tfm__fail_memory(c, bytes);
    return 1;
}

static void tfm__arena_free(tfm_ctx *c, tfm__arena *a) {
    int i;
    for (i = 0; i < a->count; i++) tfm__give(c, a->chunk[i].base);
    a->count = 0;
}

static void tfm__dry_meta_free(tfm_ctx *c) {
    while (c->dry_meta) {
        void *p = c->dry_meta;
        memcpy(&c->dry_meta, p, sizeof c->dry_meta);
        tfm__give(c, p);
    }
}

static void tfm__ctx_free(tfm_ctx *c) {
    tfm_allocator allocator = c->allocator;
    tfm__pool_destroy(c);
    tfm__give(c, c->scratch);
    tfm__arena_free(c, c->dry ? &c->real_arena : &c->arena);
    tfm__dry_meta_free(c);
    while (c->headers.first) {
        tfm__header_block *block = c->headers.first;
        c->headers.first = block->next;
        tfm__give(c, block);
    }
    tfm__give(c, c->rows);
    tfm__free_to(&allocator, c);
}

TFM_API tfm_ctx *tfm_create(const tfm_options *options) {
    tfm_options defaults;
    const tfm_options *o = options ? options : &defaults;
    tfm_ctx *c;
    memset(&defaults, 0, sizeof defaults);
    if (!o->allocator.alloc != !o->allocator.free) return NULL;
    c = (tfm_ctx *)tfm__alloc_from(&o->allocator, (int64_t)sizeof *c);
    if (!c) return NULL;
    memset(c, 0, sizeof *c);
    tfm__count(&c->real, tfm__block_bytes((int64_t)sizeof *c));
    c->options = *o;
    c->options.isa = NULL;
    if (!o->allocator.alloc) {
        c->options.allocator.alloc = tfm__default_alloc;
        c->options.allocator.free = tfm__default_free;
    }
    c->allocator = c->options.allocator;
    c->seed = o->seed;
    c->threads = 1;
    tfm__arena_tag(c);
    tfm__ctx_check(c, o->isa);
    if (!tfm__failed(c) && !tfm__ctx_threads(c)) {
        tfm__ctx_free(c);
        return NULL;
    }
    c->broken = tfm__failed(c);
    return c;
}

TFM_API void tfm_destroy(tfm_ctx *c) {
    if (!c || !tfm__acquire(c)) return; /* another thread is inside: better a leak than its crash */
    tfm__ctx_free(c);
}

/* -- errors and questions ------------------------------------------------------------------------------------------ */

TFM_API const char *tfm_error(const tfm_ctx *c) {
    if (!c) return "out of memory";
    if (tfm__atomic_load(&c->status)) return c->message;
    return tfm__atomic_load(&c->misuse) ? tfm__busy_message : "";
}

TFM_API tfm_status tfm_status_of(const tfm_ctx *c) { return tfm__status(c); }

TFM_API const char *tfm_status_name(tfm_status status) {
    static const char *const names[] = {"ok",     "invalid",     "out of memory", "io",
                                        "format", "unsupported", "cancelled",     "busy"};
    return status >= 0 && status < TFM__COUNT(names) ? names[status] : "unknown";
}

TFM_API void tfm_clear(tfm_ctx *c) {
    if (!c || !tfm__acquire(c)) return;
    tfm__atomic_store(&c->cancel, 0);
    tfm__atomic_store(&c->misuse, 0);
    if (!c->broken) tfm__atomic_store(&c->status, 0);
    tfm__release(c);
}

TFM_API void tfm_cancel(tfm_ctx *c) {
    if (c) tfm__atomic_store(&c->cancel, 1);
}

TFM_API const char *tfm_isa_name(const tfm_ctx *c) { return c ? tfm__isa_name(c->isa) : ""; }

TFM_API int tfm_isa_supported(const char *name) {
    int isa = tfm__isa_from_name(name);
    return isa >= 0 && (tfm__isa_usable() >> isa & 1u) != 0;
}

TFM_API int tfm_threads(const tfm_ctx *c) { return c ? c->threads : 0; }

TFM_API int tfm_version(void) { return TFM_VERSION; }

TFM_API void tfm_seed(tfm_ctx *c, uint64_t seed) {
    if (!c || !tfm__acquire(c)) return;
    c->seed = seed;
    c->stream = 0;
    tfm__release(c);
}

/* -- marks --------------------------------------------------------------------------------------------------------- */

TFM_API tfm_marker tfm_mark(tfm_ctx *c) {
    tfm_marker mark;
    memset(&mark, 0, sizeof mark); /* no context has this one: rewinding to it is an error */
    if (!c || !tfm__acquire(c)) return mark;
    mark = tfm__mark(c);
    tfm__release(c);
    return mark;
}

/* Also with an error set: a loop that cleans up after a failed step must get its memory back. */
TFM_API void tfm_rewind(tfm_ctx *c, tfm_marker mark) {
    if (!c || !tfm__acquire(c)) return;
    (void)tfm__rewind(c, mark);
    tfm__release(c);
}

TFM_API tfm_tensor *tfm_keep(tfm_ctx *c, tfm_marker mark, tfm_tensor *t) {
    int good;
    if (!c || !tfm__acquire(c)) return NULL;
    if (!tfm__alive(t)) tfm__fail(c, TFM_INVALID, "tfm_keep: t is %s", t ? "dead: it was rewound before" : "NULL");
    good = tfm__keep_all(c, mark, &t, tfm__alive(t)) && !tfm__failed(c);
    tfm__release(c);
    return good ? t : NULL;
}

/* -- memory -------------------------------------------------------------------------------------------------------- */

static tfm_memory tfm__memory(const tfm__arena *a, const tfm__account *account) {
    tfm_memory m;
    m.arena_used = a->used;
    m.arena_peak = a->peak;
    m.held = account->held;
    m.held_peak = account->peak;
    m.allocations = account->calls;
    return m;
}

TFM_API tfm_memory tfm_memory_usage(const tfm_ctx *c) {
    tfm_memory none;
    if (c) return tfm__memory(c->dry ? &c->real_arena : &c->arena, &c->real);
    memset(&none, 0, sizeof none);
    return none;
}

TFM_API void tfm_memory_reset(tfm_ctx *c) {
    tfm__arena *a;
    if (!c || !tfm__acquire(c)) return;
    a = c->dry ? &c->real_arena : &c->arena;
    a->peak = a->used;
    c->real.peak = c->real.held;
    tfm__release(c);
}

/* The account of a dry run starts from what the context holds without its arena: the answer does not depend on what
 * ran before. */
TFM_API void tfm_measure_begin(tfm_ctx *c) {
    int i;
    if (!c || !tfm__acquire(c)) return;
    if (c->dry) tfm__fail(c, TFM_INVALID, "tfm_measure_begin: tfm_measure_end of the last one is missing");
    if (!tfm__failed(c)) {
        c->plan = c->real;
        for (i = 0; i < c->arena.count; i++) c->plan.held -= tfm__block_bytes(c->arena.chunk[i].size);
        c->plan.peak = c->plan.held;
        c->plan.calls = 0;
        c->real_arena = c->arena;
        memset(&c->arena, 0, sizeof c->arena);
        tfm__arena_tag(c);
        c->real_tape = c->tape;
        c->real_tape_length = c->tape_length;
        c->real_pin = c->pin;
        c->real_stream = c->stream;
        c->tape = NULL;
        c->tape_length = 0;
        c->pin.on = 0;
        c->dry_address = TFM__DRY_ADDRESS;
        c->dry_mark = tfm__mark(c);
        c->dry = 1;
    }
    tfm__release(c);
}

TFM_API tfm_status tfm_measure_end(tfm_ctx *c, tfm_memory *out) {
    tfm_status status;
    if (!c) return TFM_INVALID;
    if (!tfm__acquire(c)) return TFM_BUSY;
    if (!c->dry) {
        tfm__fail(c, TFM_INVALID, "tfm_measure_end: tfm_measure_begin is missing");
        if (out) *out = tfm_memory_usage(NULL);
    } else {
        if (out) *out = tfm__memory(&c->arena, &c->plan);
        c->pin.on = 0;
        (void)tfm__rewind(c, c->dry_mark);
        tfm__dry_meta_free(c);
        c->arena = c->real_arena;
        c->tape = c->real_tape;
        c->tape_length = c->real_tape_length;
        c->pin = c->real_pin;
        c->stream = c->real_stream;
        c->dry = 0;
    }
    status = tfm__status(c);
    tfm__release(c);
    return status;
}

/* -- profile ------------------------------------------------------------------------------------------------------- */

static int tfm__profile_same(const tfm_profile_row *row, const char *op, int ndim, const int64_t *shape) {
    int i;
    if (row->ndim != ndim || strcmp(row->op, op) != 0) return 0;
    for (i = 0; i < ndim; i++) {
        if (row->shape[i] != shape[i]) return 0;
    }
    return 1;
}

/* The row of an op and shape, made when it is new. A step repeats the ops of the last one: so it looks behind the row
 * found last first. */
static tfm_profile_row *tfm__profile_row(tfm_ctx *c, const char *op, int ndim, const int64_t *shape) {
    tfm_profile_row *row;
    int64_t i;
    for (i = 0; i < c->row_count; i++) {
        int64_t at = (c->row_last + 1 + i) % c->row_count;
        if (!tfm__profile_same(&c->rows[at], op, ndim, shape)) continue;
        c->row_last = at;
        return &c->rows[at];
    }
    if (c->row_count == c->row_capacity) {
        int64_t capacity = tfm__max64(64, c->row_capacity * 2);
        tfm_profile_row *rows = (tfm_profile_row *)tfm__alloc(c, capacity * (int64_t)sizeof *rows);
        if (!rows) return NULL;
        if (c->row_count) memcpy(rows, c->rows, (size_t)c->row_count * sizeof *rows);
        tfm__free(c, c->rows);
        c->rows = rows;
        c->row_capacity = capacity;
    }
    c->row_last = c->row_count++;
    row = &c->rows[c->row_last];
    memset(row, 0, sizeof *row);
    row->op = op;
    row->ndim = ndim;
    for (i = 0; i < ndim; i++) row->shape[i] = shape[i];
    return row;
}

/* Adds one run of an op; its name must be a constant. */
TFM__UNUSED static void tfm__profile_add(tfm_ctx *c, const char *op, int ndim, const int64_t *shape, double seconds,
                                         double flops, double bytes) {
    tfm_profile_row *row = c->dry ? NULL : tfm__profile_row(c, op, ndim, shape);
    if (!row) return;
    row->ms += seconds * 1e3;
    row->flops += flops;
    row->bytes += bytes;
    row->calls++;
}

TFM_API void tfm_profile_start(tfm_ctx *c) {
    if (!c || !tfm__acquire(c)) return;
    c->row_count = 0;
    c->row_last = 0;
    c->profile = 1;
    tfm__release(c);
}

TFM_API void tfm_profile_stop(tfm_ctx *c) {
    if (!c || !tfm__acquire(c)) return;
    c->profile = 0;
    tfm__release(c);
}

TFM_API int64_t tfm_profile_count(const tfm_ctx *c) { return c ? c->row_count : 0; }

TFM_API tfm_status tfm_profile_get(const tfm_ctx *c, int64_t index, tfm_profile_row *row) {
    if (!c || !row || index < 0 || index >= c->row_count) return TFM_INVALID;
    *row = c->rows[index];
    return TFM_OK;
}

static void tfm__profile_line(tfm__text *t, const tfm_profile_row *row, double total) {
    char shape[160];
    int64_t length = 0;
    int i;
    /* many FLOPs to a byte: arithmetic is what limits it, otherwise memory */
    int compute = row->flops > 8.0 * row->bytes;
    double amount = compute ? row->flops : row->bytes;
    shape[0] = 0;
    for (i = 0; i < row->ndim; i++) {
        length = tfm__append(shape, (int64_t)sizeof shape, length, i ? ", %lld" : "%lld", (long long)row->shape[i]);
    }
    tfm__text_add(t, "%-28s (%s)%*s %8lld %12.3f %6.1f%%", row->op, shape, length < 26 ? (int)(26 - length) : 0, "",
                  (long long)row->calls, row->ms, total > 0 ? 100.0 * row->ms / total : 0.0);
    if (amount > 0 && row->ms > 0) {
        tfm__text_add(t, " %10.2f %s", amount / row->ms * 1e-6, compute ? "GFLOP/s" : "GB/s");
    }
    tfm__text_add(t, "\n");
}

TFM_API const char *tfm_profile(tfm_ctx *c) {
    tfm__text t;
    double total = 0;
    int64_t i, j;
    if (!c || !tfm__acquire(c)) return NULL;
    memset(&t, 0, sizeof t);
    t.c = c;
    for (i = 0; i < c->row_count; i++) { /* the costly ones first */
        tfm_profile_row row = c->rows[i];
        total += row.ms;
        for (j = i; j > 0 && c->rows[j - 1].ms < row.ms; j--) c->rows[j] = c->rows[j - 1];
        c->rows[j] = row;
    }
    if (!tfm__failed(c)) {
        tfm__text_add(&t, "%-28s %-28s %8s %12s %7s %10s\n", "op", "shape", "calls", "ms", "share", "rate");
        for (i = 0; i < c->row_count; i++) tfm__profile_line(&t, &c->rows[i], total);
        tfm__text_add(&t, "%-28s %-28s %8s %12.3f\n", "total", "", "", total);
    }
    if (tfm__failed(c)) t.s = NULL;
    tfm__release(c);
    return t.s;
}

/* -- dtypes -------------------------------------------------------------------------------------------------------- */

enum { TFM__KIND_FLOAT, TFM__KIND_DOUBLE, TFM__KIND_INTEGER, TFM__KIND_BOOL };

static const struct tfm__dtype_row {
    const char *name, *torch_name;  /* ours, and PyTorch's in tfm_format */
    int size, kind;
} tfm__dtypes[TFM_DTYPE_COUNT] = {
    {"f32", "float32", 4, TFM__KIND_FLOAT}, {"f16", "float16", 2, TFM__KIND_FLOAT},
    {"bf16", "bfloat16", 2, TFM__KIND_FLOAT}, {"f64", "float64", 8, TFM__KIND_DOUBLE},
    {"i64", "int64", 8, TFM__KIND_INTEGER}, {"i32", "int32", 4, TFM__KIND_INTEGER},
    {"i8", "int8", 1, TFM__KIND_INTEGER}, {"u8", "uint8", 1, TFM__KIND_INTEGER},
    {"bool", "bool", 1, TFM__KIND_BOOL}
};

static int tfm__dtype_ok(int dtype) {
    return dtype >= 0 && dtype < TFM_DTYPE_COUNT;
}

TFM_API const char *tfm_dtype_name(int dtype) {
    return tfm__dtype_ok(dtype) ? tfm__dtypes[dtype].name : "unknown";
}

TFM_API int64_t tfm_dtype_size(int dtype) {
    return tfm__dtype_ok(dtype) ? tfm__dtypes[dtype].size : 0;
}

/* What ops compute with. */
static int tfm__is_float(int dtype) {
    return tfm__dtype_ok(dtype) && tfm__dtypes[dtype].kind == TFM__KIND_FLOAT;
}

TFM__UNUSED static int tfm__is_integer(int dtype) {
    return tfm__dtype_ok(dtype) && tfm__dtypes[dtype].kind == TFM__KIND_INTEGER;
}

/* What positions and ids may be. */
static int tfm__is_index(int dtype) {
    return dtype == TFM_I64 || dtype == TFM_I32;
}

/* The dtype of a result of two float operands. */
static int tfm__promote(int a, int b) {
    return a == b ? a : TFM_F32;
}

/* -- elements ------------------------------------------------------------------------------------------------------ */

/* The f32 that rounds to f16 or bf16 like d itself: truncated, with the lowest bit set when anything was cut off
 * ("round to odd": 24 bits leave at least two more than either format holds, so the second rounding sees which side d
 * was on). */
static float tfm__odd_float(double d) {
    const float f = (float)d;
    const double back = (double)f;
    uint32_t bits = tfm__float_bits(f);
    if (back == d || tfm__isnan(f)) return f;
    if (d < 0.0 ? back < d : back > d) bits -= 1; /* rounded away from zero: step back */
    return tfm__bits_float(bits | 1u);
}

/* The same from an integer: above 53 bits the lowest kept bit remembers the others. */
static double tfm__odd_double(int64_t i) {
    const uint64_t magnitude = i < 0 ? (uint64_t)0 - (uint64_t)i : (uint64_t)i;
    uint64_t m = magnitude;
    if (m >> 53 && m >> 63 == 0) m = (m & ~(uint64_t)1023) | (m & 1023 ? (uint64_t)1024 : (uint64_t)0);
    return i < 0 ? -(double)m : (double)m;
}

static uint16_t tfm__half_bits(int dtype, double d) {
    const float f = tfm__odd_float(d);
    return dtype == TFM_F16 ? tfm__f32_to_f16(f) : tfm__f32_to_bf16(f);
}

/* d as a whole number in [low, high]; C's cast alone is undefined outside of it. */
static int64_t tfm__saturate(double d, int64_t low, int64_t high) {
    if (d != d) return 0;
    if (d <= (double)low) return low;
    if (d >= (double)high) return high;
    return (int64_t)d;
}

static double tfm__value_at(int dtype, const void *p, int64_t i) {
    switch (dtype) {
    case TFM_F32: return (double)((const float *)p)[i];
    case TFM_F16: return (double)tfm__f16_to_f32(((const uint16_t *)p)[i]);
    case TFM_BF16: return (double)tfm__bf16_to_f32(((const uint16_t *)p)[i]);
    case TFM_F64: return ((const double *)p)[i];
    case TFM_I64: return (double)((const int64_t *)p)[i];
    case TFM_I32: return (double)((const int32_t *)p)[i];
    case TFM_I8: return (double)((const int8_t *)p)[i];
    case TFM_U8: return (double)((const uint8_t *)p)[i];
    default: return ((const uint8_t *)p)[i] ? 1.0 : 0.0;
    }
}

/* Of the integer dtypes and bool. */
static int64_t tfm__id_at(int dtype, const void *p, int64_t i) {
    switch (dtype) {
    case TFM_I64: return ((const int64_t *)p)[i];
    case TFM_I32: return ((const int32_t *)p)[i];
    case TFM_I8: return ((const int8_t *)p)[i];
    case TFM_U8: return ((const uint8_t *)p)[i];
    default: return ((const uint8_t *)p)[i] ? 1 : 0;
    }
}

/* Rounds to nearest even; to integers truncates and saturates, NaN gives 0. */
static void tfm__store_at(int dtype, void *p, int64_t i, double value) {
    switch (dtype) {
    case TFM_F32: ((float *)p)[i] = (float)value; break;
    case TFM_F16:
    case TFM_BF16: ((uint16_t *)p)[i] = tfm__half_bits(dtype, value); break;
    case TFM_F64: ((double *)p)[i] = value; break;
    case TFM_I64: ((int64_t *)p)[i] = tfm__saturate(value, INT64_MIN, INT64_MAX); break;
    case TFM_I32: ((int32_t *)p)[i] = (int32_t)tfm__saturate(value, INT32_MIN, INT32_MAX); break;
    case TFM_I8: ((int8_t *)p)[i] = (int8_t)tfm__saturate(value, INT8_MIN, INT8_MAX); break;
    case TFM_U8: ((uint8_t *)p)[i] = (uint8_t)tfm__saturate(value, 0, UINT8_MAX); break;
    default: ((uint8_t *)p)[i] = value == 0.0 ? (uint8_t)0 : (uint8_t)1; break;
    }
}

/* -- shapes -------------------------------------------------------------------------------------------------------- */

TFM_API tfm_shape tfm_shape_of(int ndim, const int64_t *dim) {
    tfm_shape s;
    int i;
    s.ndim = ndim;
    for (i = 0; i < TFM_MAX_DIMS; ++i) s.dim[i] = dim && i < ndim ? dim[i] : 0;
    return s;
}

TFM_API tfm_shape tfm_shape1(int64_t a) {
    return tfm_shape_of(1, &a);
}

TFM_API tfm_shape tfm_shape2(int64_t a, int64_t b) {
    const int64_t dim[2] = {a, b};
    return tfm_shape_of(2, dim);
}

TFM_API tfm_shape tfm_shape3(int64_t a, int64_t b, int64_t c) {
    const int64_t dim[3] = {a, b, c};
    return tfm_shape_of(3, dim);
}

TFM_API tfm_shape tfm_shape4(int64_t a, int64_t b, int64_t c, int64_t d) {
    const int64_t dim[4] = {a, b, c, d};
    return tfm_shape_of(4, dim);
}

TFM_API tfm_shape tfm_shape5(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e) {
    const int64_t dim[5] = {a, b, c, d, e};
    return tfm_shape_of(5, dim);
}

TFM_API tfm_shape tfm_shape6(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f) {
    const int64_t dim[6] = {a, b, c, d, e, f};
    return tfm_shape_of(6, dim);
}

TFM_API tfm_shape tfm_shape_like(const tfm_tensor *t) {
    return t ? tfm_shape_of(t->ndim, t->shape) : tfm_shape_of(0, NULL);
}

/* The product of sizes that tfm__shape_check has seen. */
static int64_t tfm__sizes(int ndim, const int64_t *shape) {
    int64_t n = 1;
    int i;
    for (i = 0; i < ndim; ++i) n *= shape[i];
    return n;
}

TFM_API int64_t tfm_numel(const tfm_tensor *t) {
    return t ? tfm__sizes(t->ndim, t->shape) : 0;
}

static void tfm__contiguous_strides(int ndim, const int64_t *shape, int64_t *stride) {
    int64_t step = 1;
    int i;
    for (i = ndim; i-- > 0;) {
        stride[i] = step;
        step *= shape[i] > 1 ? shape[i] : 1;
    }
}

/* Strides of dims of size 1 do not matter, and none matters without elements. */
TFM_API int tfm_is_contiguous(const tfm_tensor *t) {
    int64_t step = 1;
    int i;
    if (!t || t->layout != TFM_STRIDED) return 0;
    if (tfm_numel(t) == 0) return 1;
    for (i = t->ndim; i-- > 0;) {
        if (t->shape[i] != 1 && t->stride[i] != step) return 0;
        step *= t->shape[i];
    }
    return 1;
}

static int tfm__same_shape(const tfm_tensor *a, const tfm_tensor *b) {
    int i;
    if (a->ndim != b->ndim) return 0;
    for (i = 0; i < a->ndim; ++i) {
        if (a->shape[i] != b->shape[i]) return 0;
    }
    return 1;
}

/* -- text ---------------------------------------------------------------------------------------------------------- */

#define TFM__SHAPE_TEXT 160 /* six 64-bit sizes with commas, and a dtype */

static const char *tfm__shape_text(char *buffer, int64_t size, int ndim, const int64_t *shape) {
    int64_t used = snprintf(buffer, (size_t)size, "(");
    int i;
    for (i = 0; i < ndim && i < TFM_MAX_DIMS && used < size; ++i) {
        used += snprintf(buffer + used, (size_t)(size - used), i ? ", %lld" : "%lld", (long long)shape[i]);
    }
    if (used < size) snprintf(buffer + used, (size_t)(size - used), ")");
    return buffer;
}

static const char *tfm__tensor_text(char *buffer, int64_t size, const tfm_tensor *t) {
    int64_t used;
    if (!t) {
        snprintf(buffer, (size_t)size, "NULL");
        return buffer;
    }
    used = snprintf(buffer, (size_t)size, "%s ", tfm_dtype_name(t->dtype));
    if (used < size) tfm__shape_text(buffer + used, size - used, t->ndim, t->shape);
    return buffer;
}

/* -- headers ------------------------------------------------------------------------------------------------------- */

/* 1 and *numel when these are 0 to 6 sizes, none negative, whose bytes can be counted; else the sticky error. */
static int tfm__shape_check(tfm_ctx *c, const char *what, int dtype, int ndim, const int64_t *shape, int64_t *numel) {
    char text[TFM__SHAPE_TEXT];
    int64_t n = 1, bytes;
    int i, empty = 0;
    if (!tfm__dtype_ok(dtype)) {
        tfm__fail(c, TFM_INVALID, "%s: dtype %d does not exist", what, dtype);
        return 0;
    }
    if (ndim < 0 || ndim > TFM_MAX_DIMS) {
        tfm__fail(c, TFM_INVALID, "%s: a shape has 0 to %d sizes, this one %d", what, TFM_MAX_DIMS, ndim);
        return 0;
    }
    for (i = 0; i < ndim; ++i) {
        if (shape[i] < 0) {
            tfm__fail(c, TFM_INVALID, "%s: shape %s: size %d is negative", what,
                      tfm__shape_text(text, (int64_t)sizeof(text), ndim, shape), i);
            return 0;
        }
        if (shape[i] == 0) empty = 1;
    }
    for (i = 0; i < ndim; ++i) { /* also of an empty tensor: strides are products of the other sizes */
        if (shape[i] != 0 && !tfm__mul(n, shape[i], &n)) break;
    }
    if (i < ndim || !tfm__mul(n, tfm_dtype_size(dtype), &bytes) || bytes > INT64_MAX / 4) {
        tfm__fail(c, TFM_INVALID, "%s: shape %s has more bytes than can be addressed", what,
                  tfm__shape_text(text, (int64_t)sizeof(text), ndim, shape));
        return 0;
    }
    *numel = empty ? 0 : n;
    return 1;
}

/* The address of the element `offset` strides-of-one from the first; NULL (empty, packed, dry) stays NULL. */
static char *tfm__at(const tfm_tensor *t, int64_t offset) {
    return t->data ? (char *)t->data + offset * tfm_dtype_size(t->dtype) : NULL;
}

/* Where element index[] lies: its offset from data, or from panels for a packed parameter. */
static int64_t tfm__offset(const tfm_tensor *t, const int64_t *index) {
    int64_t offset = 0;
    int i;
    if (t->layout == TFM_PANELS) {
        return (index[0] / TFM__PANEL) * TFM__PANEL * t->shape[1] + index[1] * TFM__PANEL + index[0] % TFM__PANEL;
    }
    for (i = 0; i < t->ndim; ++i) offset += index[i] * t->stride[i];
    return offset;
}

static double tfm__nan(void) {
    return (double)tfm__bits_float(0x7fc00000u);
}

/* -- reading single elements --------------------------------------------------------------------------------------- */

/* 1 and the address of the element; 0 when there is none to read. Negative positions count from the end. */
static int tfm__locate(const tfm_tensor *t, const int64_t *index, void **base, int64_t *offset) {
    int64_t at[TFM_MAX_DIMS];
    int i;
    if (!tfm__alive(t) || (t->ndim && !index)) return 0;
    if (t->serial && ((const tfm_ctx *)t->owner)->dry) return 0; /* a parameter has no serial: its owner is its store */
    *base = t->layout == TFM_PANELS ? t->panels : t->data;
    if (!*base) return 0;
    for (i = 0; i < t->ndim; ++i) {
        at[i] = index[i] < 0 ? index[i] + t->shape[i] : index[i];
        if (at[i] < 0 || at[i] >= t->shape[i]) return 0;
    }
    *offset = tfm__offset(t, at);
    return 1;
}

TFM_API double tfm_get(const tfm_tensor *t, const int64_t *index) {
    void *base;
    int64_t offset;
    return tfm__locate(t, index, &base, &offset) ? tfm__value_at(t->dtype, base, offset) : tfm__nan();
}

TFM_API double tfm_item(const tfm_tensor *t) {
    const int64_t first[TFM_MAX_DIMS] = {0, 0, 0, 0, 0, 0};
    return t && tfm_numel(t) == 1 ? tfm_get(t, first) : tfm__nan();
}

/* -- the text of a tensor, as torch/_tensor_str.py writes it with its default options ------------------------------ */

#define TFM__PRINT_LIMIT 1000  /* more elements are summarised */
#define TFM__PRINT_EDGE 3      /* elements shown at each end of a summarised dim */
#define TFM__PRINT_WIDTH 80

typedef struct tfm__printer {
    tfm__text *text;
    const tfm_tensor *t;
    const void *data;
    int summarise, whole, scientific, width;
} tfm__printer;

/* One number. snprintf follows the program's locale: whatever it takes for a decimal point becomes '.'. */
static int tfm__number_text(char *buffer, size_t size, const char *format, double value) {
    int n, i, used = 0, point = 0;
    if (value != value) return snprintf(buffer, size, "nan");
    n = snprintf(buffer, size, format, value);
    if (n < 0 || (size_t)n >= size || value - value != 0.0) return n;
    for (i = 0; i < n; ++i) {
        const char ch = buffer[i];
        if ((ch >= '0' && ch <= '9') || ch == '-' || ch == '+' || ch == 'e') {
            buffer[used++] = ch;
        } else if (!point) {
            buffer[used++] = '.';
            point = 1;
        }
    }
    buffer[used] = 0;
    return used;
}

/* The element at `offset` without padding; returns its length. */
static int tfm__element_text(const tfm__printer *p, char *buffer, size_t size, int64_t offset) {
    const int dtype = p->t->dtype, kind = tfm__dtypes[dtype].kind;
    double value;
    int n;
    if (kind == TFM__KIND_BOOL) {
        return snprintf(buffer, size, "%s", tfm__id_at(dtype, p->data, offset) ? "True" : "False");
    }
    if (kind == TFM__KIND_INTEGER) return snprintf(buffer, size, "%lld", (long long)tfm__id_at(dtype, p->data, offset));
    value = tfm__value_at(dtype, p->data, offset);
    if (p->scientific) return tfm__number_text(buffer, size, "%.4e", value);
    if (!p->whole) return tfm__number_text(buffer, size, "%.4f", value);
    n = tfm__number_text(buffer, size, "%.0f", value);
    if (value - value == 0.0 && n >= 0 && (size_t)n + 1 < size) {
        buffer[n++] = '.';
        buffer[n] = 0;
    }
    return n;
}

/* The position of the i-th shown index of a dim, -1 for the dots; *shown counts them, dots included. */
static int64_t tfm__shown_index(const tfm__printer *p, int dim, int64_t i) {
    const int64_t size = p->t->shape[dim];
    if (!p->summarise || size <= 2 * TFM__PRINT_EDGE || i < TFM__PRINT_EDGE) return i;
    return i == TFM__PRINT_EDGE ? -1 : size - (2 * TFM__PRINT_EDGE + 1) + i;
}

static int64_t tfm__shown_count(const tfm__printer *p, int dim) {
    const int64_t size = p->t->shape[dim];
    return p->summarise && size > 2 * TFM__PRINT_EDGE ? 2 * TFM__PRINT_EDGE + 1 : size;
}

typedef struct tfm__print_range {
    double low, high;   /* smallest and largest magnitude that is finite and not zero */
    int whole;          /* no fraction so far */
    int width;
} tfm__print_range;

/* First over all shown elements: magnitudes (measure 0), then with the form settled the widest one (measure 1). */
static void tfm__print_survey(const tfm__printer *p, int dim, int64_t offset, int measure, tfm__print_range *r) {
    int64_t i;
    if (dim < p->t->ndim) {
        for (i = 0; i < tfm__shown_count(p, dim); ++i) {
            const int64_t at = tfm__shown_index(p, dim, i);
            if (at >= 0) tfm__print_survey(p, dim + 1, offset + at * p->t->stride[dim], measure, r);
        }
        return;
    }
    if (tfm__dtypes[p->t->dtype].kind == TFM__KIND_FLOAT || p->t->dtype == TFM_F64) {
        const double value = tfm__value_at(p->t->dtype, p->data, offset), magnitude = value < 0.0 ? -value : value;
        if (value - value != 0.0 || value == 0.0) return; /* zeros, Inf and NaN have no say */
        if (!measure) {
            if (r->low == 0.0 || magnitude < r->low) r->low = magnitude;
            if (magnitude > r->high) r->high = magnitude;
            if (magnitude < 9007199254740992.0 && (double)(int64_t)magnitude != magnitude) r->whole = 0;
            return;
        }
    }
    if (measure) {
        char buffer[340];
        const int n = tfm__element_text(p, buffer, sizeof(buffer), offset);
        if (n > r->width) r->width = n;
    }
}

static void tfm__print_form(tfm__printer *p) {
    tfm__print_range r;
    r.low = r.high = 0.0;
    r.whole = r.width = 1;
    tfm__print_survey(p, 0, 0, 0, &r);
    p->whole = r.whole;
    p->scientific = r.high > 0.0 && (r.high / r.low > 1000.0 || r.high > 1.0e8 || (!r.whole && r.low < 1.0e-4));
    tfm__print_survey(p, 0, 0, 1, &r);
    p->width = r.width;
}

static void tfm__print_element(const tfm__printer *p, int64_t offset) {
    char buffer[340];
    const int n = tfm__element_text(p, buffer, sizeof(buffer), offset);
    int pad;
    for (pad = n; pad < p->width; ++pad) tfm__text_bytes(p->text, " ", 1);
    tfm__text_bytes(p->text, buffer, n);
}

static void tfm__print_dim(const tfm__printer *p, int dim, int64_t offset, int indent) {
    const int64_t count = dim < p->t->ndim ? tfm__shown_count(p, dim) : 0;
    const int64_t per_line = tfm__max64(1, (TFM__PRINT_WIDTH - indent) / (p->width + 2));
    const int last = dim == p->t->ndim - 1;
    int64_t i;
    if (dim == p->t->ndim) {
        tfm__print_element(p, offset);
        return;
    }
    tfm__text_bytes(p->text, "[", 1);
    for (i = 0; i < count; ++i) {
        const int64_t at = tfm__shown_index(p, dim, i);
        if (i) {
            int lines = last ? i % per_line == 0 : p->t->ndim - 1 - dim, j;
            tfm__text_bytes(p->text, ",", 1);
            if (lines == 0) tfm__text_bytes(p->text, " ", 1);
            for (j = 0; j < lines; ++j) tfm__text_bytes(p->text, "\n", 1);
            for (j = 0; lines && j <= indent; ++j) tfm__text_bytes(p->text, " ", 1);
        }
        if (at < 0) {
            tfm__text_add(p->text, last ? " ..." : "...");
        } else {
            tfm__print_dim(p, dim + 1, offset + at * p->t->stride[dim], indent + 1);
        }
    }
    tfm__text_bytes(p->text, "]", 1);
}

/* ", suffix", on a new line when the last one is full. */
static void tfm__print_suffix(tfm__text *text, int indent, int64_t *line, const char *suffix) {
    const int64_t n = (int64_t)strlen(suffix);
    if (*line + n + 2 > TFM__PRINT_WIDTH) {
        tfm__text_add(text, ",\n%*s%s", indent, "", suffix);
        *line = indent + n;
    } else {
        tfm__text_add(text, ", %s", suffix);
        *line += n + 2;
    }
}

/* t is strided; data NULL when there are no elements, or none to look at (a dry run: the dots of a meta tensor). */
static void tfm__print_tensor(tfm__text *text, const tfm_tensor *t) {
    static const char prefix[] = "tensor(";
    const int indent = (int)sizeof(prefix) - 1;
    const int64_t numel = tfm_numel(t);
    char suffix[TFM__SHAPE_TEXT + 8], shape[TFM__SHAPE_TEXT];
    tfm__printer p;
    int64_t line;
    tfm__text_add(text, "%s", prefix);
    if (numel == 0 || !t->data) {
        tfm__text_add(text, numel == 0 ? "[]" : "...");
    } else {
        p.text = text;
        p.t = t;
        p.data = t->data;
        p.summarise = numel > TFM__PRINT_LIMIT;
        p.whole = p.scientific = 0;
        p.width = 1;
        tfm__print_form(&p);
        tfm__print_dim(&p, 0, 0, indent);
    }
    for (line = 1; text->s && line <= text->length && text->s[text->length - line] != '\n';) ++line;
    line = line > text->length ? text->length + 2 : line + 1;
    if ((numel == 0 && t->ndim != 1) || (numel && !t->data)) {
        snprintf(suffix, sizeof(suffix), "size=%s", tfm__shape_text(shape, (int64_t)sizeof(shape), t->ndim, t->shape));
        tfm__print_suffix(text, indent, &line, suffix);
    }
    if (t->dtype != TFM_F32 && (numel == 0 || (t->dtype != TFM_I64 && t->dtype != TFM_BOOL))) {
        snprintf(suffix, sizeof(suffix), "dtype=torch.%s", tfm__dtypes[t->dtype].torch_name);
        tfm__print_suffix(text, indent, &line, suffix);
    }
    if (t->requires_grad) tfm__print_suffix(text, indent, &line, "requires_grad=True");
    tfm__text_bytes(text, ")", 1);
}

/* ==================================================================================================================
 *  8  OPS
 *
 *  Every public function on a context runs between tfm__enter and tfm__leave: inputs are looked at, the result is made,
 *  kernels run over it, the record line notes what the backward pass will need. An op is a row of the table below.
 * ================================================================================================================ */

struct tfm__node;
typedef int (*tfm__backward_fn)(tfm_ctx *c, const struct tfm__node *node);

#define TFM__PLAIN 0
#define TFM__PACKED 1 /* the op reads packed parameters as well as plain tensors */

/* X(enum, name, required tensors, TFM__PLAIN or TFM__PACKED, backward) */
#define TFM__OPS(X) \
    X(EMPTY, "tfm_empty", 0, TFM__PLAIN, NULL) \
    X(ZEROS, "tfm_zeros", 0, TFM__PLAIN, NULL) \
    X(ONES, "tfm_ones", 0, TFM__PLAIN, NULL) \
    X(FULL, "tfm_full", 0, TFM__PLAIN, NULL) \
    X(RANDN, "tfm_randn", 0, TFM__PLAIN, NULL) \
    X(UNIFORM, "tfm_uniform", 0, TFM__PLAIN, NULL) \
    X(ARANGE, "tfm_arange", 0, TFM__PLAIN, NULL) \
    X(FROM, "tfm_from", 0, TFM__PLAIN, NULL) \
    X(WRAP, "tfm_wrap", 0, TFM__PLAIN, NULL) \
    X(WRAP_STRIDED, "tfm_wrap_strided", 0, TFM__PLAIN, NULL) \
    X(RESHAPE, "tfm_reshape", 1, TFM__PLAIN, NULL) \
    X(VIEW, "tfm_view", 1, TFM__PLAIN, NULL) \
    X(TRANSPOSE, "tfm_transpose", 1, TFM__PLAIN, NULL) \
    X(PERMUTE, "tfm_permute", 1, TFM__PLAIN, NULL) \
    X(SLICE, "tfm_slice", 1, TFM__PLAIN, NULL) \
    X(NARROW, "tfm_narrow", 1, TFM__PLAIN, NULL) \
    X(SELECT, "tfm_select", 1, TFM__PLAIN, NULL) \
    X(EXPAND, "tfm_expand", 1, TFM__PLAIN, NULL) \
    X(SQUEEZE, "tfm_squeeze", 1, TFM__PLAIN, NULL) \
    X(UNSQUEEZE, "tfm_unsqueeze", 1, TFM__PLAIN, NULL) \
    X(SPLIT_HEADS, "tfm_split_heads", 1, TFM__PLAIN, NULL) \
    X(COMBINE_HEADS, "tfm_combine_heads", 1, TFM__PLAIN, NULL) \
    X(CONTIGUOUS, "tfm_contiguous", 1, TFM__PACKED, NULL) \
    X(CLONE, "tfm_clone", 1, TFM__PACKED, NULL) \
    X(CAST, "tfm_cast", 1, TFM__PACKED, NULL) \
    X(COPY, "tfm_copy", 2, TFM__PACKED, NULL) \
    X(CAT, "tfm_cat", 0, TFM__PLAIN, NULL) \
    X(STACK, "tfm_stack", 0, TFM__PLAIN, NULL) \
    X(PAD, "tfm_pad", 1, TFM__PLAIN, NULL) \
    X(GATHER, "tfm_gather", 2, TFM__PLAIN, NULL) \
    X(INDEX_SELECT, "tfm_index_select", 2, TFM__PLAIN, NULL) \
    X(TRIL, "tfm_tril", 1, TFM__PLAIN, NULL) \
    X(TRIU, "tfm_triu", 1, TFM__PLAIN, NULL) \
    X(MASKED_FILL, "tfm_masked_fill", 2, TFM__PLAIN, NULL) \
    X(WHERE, "tfm_where", 3, TFM__PLAIN, NULL) \
    X(SET, "tfm_set", 1, TFM__PLAIN, NULL) \
    X(READ, "tfm_read", 1, TFM__PACKED, NULL) \
    X(FORMAT, "tfm_format", 1, TFM__PACKED, NULL) \
    X(PRINT, "tfm_print", 1, TFM__PACKED, NULL) \
    X(ADD, "tfm_add", 2, TFM__PLAIN, NULL) \
    X(SUB, "tfm_sub", 2, TFM__PLAIN, NULL) \
    X(MUL, "tfm_mul", 2, TFM__PLAIN, NULL) \
    X(DIV, "tfm_div", 2, TFM__PLAIN, NULL) \
    X(MINIMUM, "tfm_minimum", 2, TFM__PLAIN, NULL) \
    X(MAXIMUM, "tfm_maximum", 2, TFM__PLAIN, NULL) \
    X(SCALE, "tfm_scale", 1, TFM__PLAIN, NULL) \
    X(SHIFT, "tfm_shift", 1, TFM__PLAIN, NULL) \
    X(NEG, "tfm_neg", 1, TFM__PLAIN, NULL) \
    X(ABS, "tfm_abs", 1, TFM__PLAIN, NULL) \
    X(EXP, "tfm_exp", 1, TFM__PLAIN, NULL) \
    X(LOG, "tfm_log", 1, TFM__PLAIN, NULL) \
    X(SQRT, "tfm_sqrt", 1, TFM__PLAIN, NULL) \
    X(RSQRT, "tfm_rsqrt", 1, TFM__PLAIN, NULL) \
    X(SIN, "tfm_sin", 1, TFM__PLAIN, NULL) \
    X(COS, "tfm_cos", 1, TFM__PLAIN, NULL) \
    X(TANH, "tfm_tanh", 1, TFM__PLAIN, NULL) \
    X(SIGMOID, "tfm_sigmoid", 1, TFM__PLAIN, NULL) \
    X(RELU, "tfm_relu", 1, TFM__PLAIN, NULL) \
    X(GELU, "tfm_gelu", 1, TFM__PLAIN, NULL) \
    X(GELU_TANH, "tfm_gelu_tanh", 1, TFM__PLAIN, NULL) \
    X(GELU_QUICK, "tfm_gelu_quick", 1, TFM__PLAIN, NULL) \
    X(SILU, "tfm_silu", 1, TFM__PLAIN, NULL) \
    X(ACTIVATION, "tfm_activation", 1, TFM__PLAIN, NULL) \
    X(POW, "tfm_pow", 1, TFM__PLAIN, NULL) \
    X(CLAMP, "tfm_clamp", 1, TFM__PLAIN, NULL) \
    X(GLU, "tfm_glu", 2, TFM__PLAIN, NULL) \
    X(COMPARE, "tfm_compare", 2, TFM__PLAIN, NULL) \
    X(COMPARE_SCALAR, "tfm_compare_scalar", 1, TFM__PLAIN, NULL) \
    X(SUM, "tfm_sum", 1, TFM__PLAIN, NULL) \
    X(MEAN, "tfm_mean", 1, TFM__PLAIN, NULL) \
    X(MAX, "tfm_max", 1, TFM__PLAIN, NULL) \
    X(MIN, "tfm_min", 1, TFM__PLAIN, NULL) \
    X(LOGSUMEXP, "tfm_logsumexp", 1, TFM__PLAIN, NULL) \
    X(ARGMAX, "tfm_argmax", 1, TFM__PLAIN, NULL) \
    X(TOPK, "tfm_topk", 1, TFM__PLAIN, NULL) \
    X(SOFTMAX, "tfm_softmax", 1, TFM__PLAIN, NULL) \
    X(LOG_SOFTMAX, "tfm_log_softmax", 1, TFM__PLAIN, NULL) \
    X(MATMUL, "tfm_matmul", 2, TFM__PLAIN, NULL) \
    X(LINEAR, "tfm_linear", 2, TFM__PACKED, NULL) \
    X(EMBEDDING, "tfm_embedding", 2, TFM__PACKED, NULL) \
    X(LAYER_NORM, "tfm_layer_norm", 1, TFM__PLAIN, NULL) \
    X(RMS_NORM, "tfm_rms_norm", 1, TFM__PLAIN, NULL) \
    X(DROPOUT, "tfm_dropout", 1, TFM__PLAIN, NULL) \
    X(SET_REQUIRES_GRAD, "tfm_set_requires_grad", 1, TFM__PACKED, NULL) \
    X(TAPE_CLEAR, "tfm_tape_clear", 0, TFM__PLAIN, NULL) \
    /* chapter 9 */ \
    X(MASK_MATRIX, "tfm_mask_matrix", 0, TFM__PLAIN, NULL) \
    X(ALIBI_SLOPES, "tfm_alibi_slopes", 0, TFM__PLAIN, NULL) \
    X(ATTENTION, "tfm_attention", 3, TFM__PLAIN, NULL) \
    X(WEIGHTED_SEQUENCE, "tfm_weighted_sequence", 2, TFM__PACKED, NULL) \
    X(WEIGHTED_POOL, "tfm_weighted_pool", 2, TFM__PACKED, NULL) \
    X(HEATMAP_SVG, "tfm_heatmap_svg", 1, TFM__PLAIN, NULL) \
    X(HEATMAP_TEXT, "tfm_heatmap_text", 1, TFM__PLAIN, NULL) \
    X(CACHE_CREATE, "tfm_cache_create", 0, TFM__PLAIN, NULL) \
    X(CACHE_APPEND, "tfm_cache_append", 2, TFM__PLAIN, NULL) \
    X(CACHE_TRUNCATE, "tfm_cache_truncate", 0, TFM__PLAIN, NULL) \
    X(CACHE_SLIDE, "tfm_cache_slide", 0, TFM__PLAIN, NULL) \
    X(CACHE_REORDER, "tfm_cache_reorder", 0, TFM__PLAIN, NULL) \
    X(CACHE_FORK, "tfm_cache_fork", 0, TFM__PLAIN, NULL) \
    X(CACHE_SAVE, "tfm_cache_save", 0, TFM__PLAIN, NULL) \
    X(CACHE_LOAD, "tfm_cache_load", 0, TFM__PLAIN, NULL) \
    X(ATTENTION_CACHED, "tfm_attention_cached", 1, TFM__PLAIN, NULL) \
    /* chapter 10 */ \
    X(ROTARY, "tfm_rotary", 1, TFM__PLAIN, NULL) \
    X(ROTARY_TABLES, "tfm_rotary_tables", 0, TFM__PLAIN, NULL) \
    X(ROTARY_APPLY, "tfm_rotary_apply", 3, TFM__PLAIN, NULL) \
    X(SINUSOIDAL, "tfm_sinusoidal", 0, TFM__PLAIN, NULL) \
    X(POOL, "tfm_pool", 1, TFM__PLAIN, NULL) \
    X(L2_NORMALIZE, "tfm_l2_normalize", 1, TFM__PLAIN, NULL) \
    X(FEED_FORWARD, "tfm_feed_forward_forward", 1, TFM__PACKED, NULL) \
    X(MHA, "tfm_mha_forward", 1, TFM__PACKED, NULL) \
    X(ENCODER_LAYER, "tfm_encoder_layer_forward", 1, TFM__PACKED, NULL) \
    X(DECODER_LAYER, "tfm_decoder_layer_forward", 1, TFM__PACKED, NULL) \
    X(ENCODER, "tfm_encoder_forward", 1, TFM__PACKED, NULL) \
    X(DECODER, "tfm_decoder_forward", 1, TFM__PACKED, NULL) \
    X(TRANSFORMER, "tfm_transformer_forward", 0, TFM__PACKED, NULL)

enum {
#define TFM__OP_ENUM(id, name, required, packed, backward) TFM__OP_##id,
    TFM__OPS(TFM__OP_ENUM)
    TFM__OP_COUNT
};

static const struct tfm__op_row {
    const char *name;
    int required, packed;
    tfm__backward_fn backward;
} tfm__op_table[TFM__OP_COUNT] = {
#define TFM__OP_ROW(id, name, required, packed, backward) {name, required, packed, backward},
    TFM__OPS(TFM__OP_ROW)
};

/* -- enter, leave, record ------------------------------------------------------------------------------------------ */

#define TFM__OP_INPUTS 20 /* attention: three tensors and every part of a mask */
#define TFM__OP_ATTRS 6
#define TFM__OP_SAVED 4
#define TFM__OP_TEXTS 6

typedef struct tfm__op {
    tfm_ctx *c;
    const struct tfm__kernels *k;
    struct tfm__op *outer;                       /* the op that called this one */
    int op, run;                                 /* run: 0 in a dry run: sizes only, never data */
    int requires_grad;                           /* of any input */
    int count;                                   /* inputs so far */
    const tfm_tensor *input[TFM__OP_INPUTS];     /* NULL: an optional one that is not there */
    const tfm_tensor *const *list;               /* tfm_cat, tfm_stack: inputs instead */
    int list_count;
    int has_temporary;
    tfm_marker mark;                             /* where the temporaries begin */
    tfm_tensor *result;                          /* the one that is recorded */
    double attr[TFM__OP_ATTRS];                  /* for the backward pass */
    int64_t number[TFM__OP_ATTRS];
    const tfm_tensor *saved[TFM__OP_SAVED];
    double flops, bytes;                         /* for the profile; bytes 0: inputs and result once */
    double begun, inside;                        /* when; how much of it went to inner ops */
    int texts;
    char text[TFM__OP_TEXTS][TFM__SHAPE_TEXT];
} tfm__op;

/* One record of the tape. Chapter 11 walks from the newest back. */
typedef struct tfm__node {
    int op, count;
    const tfm_tensor **input;
    tfm_tensor *result;
    double attr[TFM__OP_ATTRS];
    int64_t number[TFM__OP_ATTRS];
    const tfm_tensor *saved[TFM__OP_SAVED];
    struct tfm__node *before;
} tfm__node;

static const char *tfm__op_name(const tfm__op *o) {
    return tfm__op_table[o->op].name;
}

static const char *tfm__describe(tfm__op *o, const tfm_tensor *t) {
    return tfm__tensor_text(o->text[o->texts++ % TFM__OP_TEXTS], TFM__SHAPE_TEXT, t);
}

static const char *tfm__describe_shape(tfm__op *o, int ndim, const int64_t *shape) {
    return tfm__shape_text(o->text[o->texts++ % TFM__OP_TEXTS], TFM__SHAPE_TEXT, ndim, shape);
}

/* Parameters have no serial number: their store may be shared by any number of contexts. */
static int tfm__is_parameter(const tfm_tensor *t) {
    return t->serial == 0;
}

/* A required (or present) tensor of the op; 0 after setting the error. */
static int tfm__admit(tfm__op *o, const tfm_tensor *t, int position) {
    const char *wrong = NULL;
    if (!t) {
        wrong = "is NULL";
    } else if (!tfm__alive(t)) {
        wrong = "is used after the rewind that freed it";
    } else if (!tfm__is_parameter(t) && t->owner != o->c) {
        wrong = "belongs to another context";
    } else if (t->layout == TFM_PANELS && !tfm__op_table[o->op].packed) {
        wrong = "is a packed parameter, which only tfm_linear, tfm_embedding and copies read";
    }
    if (wrong) {
        tfm__fail(o->c, TFM_INVALID, "%s: tensor argument %d %s", tfm__op_name(o), position, wrong);
        return 0;
    }
    o->requires_grad |= t->requires_grad;
    return 1;
}

static void tfm__clock_out(tfm__op *o, const tfm_tensor *y) {
    const tfm_tensor *const shape = y ? y : o->count ? o->input[0] : NULL;
    const double elapsed = tfm__now() - o->begun;
    double bytes = o->bytes;
    int i;
    if (o->outer) o->outer->inside += elapsed;
    if (bytes == 0.0) {
        for (i = 0; i < o->count; ++i) {
            if (o->input[i]) bytes += (double)(tfm_numel(o->input[i]) * tfm_dtype_size(o->input[i]->dtype));
        }
        if (y) bytes += (double)(tfm_numel(y) * tfm_dtype_size(y->dtype));
    }
    tfm__profile_add(o->c, tfm__op_name(o), shape ? shape->ndim : 0, shape ? shape->shape : NULL, elapsed - o->inside,
                     o->flops, bytes);
}

/* y becomes a result of the tape: its op, inputs and what was saved, so that chapter 11 can walk back. */
static tfm_tensor *tfm__record(tfm__op *o, tfm_tensor *y) {
    const int count = o->list ? o->list_count : o->count;
    tfm__node *const node = (tfm__node *)tfm__arena_meta(o->c, (int64_t)sizeof(tfm__node));
    const tfm_tensor **const input =
        (const tfm_tensor **)tfm__arena_meta(o->c, (int64_t)sizeof(tfm_tensor *) * tfm__max64(count, 1));
    if (!node || !input) return NULL;
    memcpy(input, o->list ? o->list : o->input, sizeof(tfm_tensor *) * (size_t)count);
    node->op = o->op;
    node->count = count;
    node->input = input;
    node->result = y;
    memcpy(node->attr, o->attr, sizeof(o->attr));
    memcpy(node->number, o->number, sizeof(o->number));
    memcpy(node->saved, o->saved, sizeof(o->saved));
    node->before = o->c->tape;
    y->requires_grad = 1;
    y->node = node;
    o->c->tape = node;
    o->c->tape_length += 1;
    tfm__tape_pin(o->c);
    return y;
}

static tfm_tensor *tfm__leave(tfm__op *o, tfm_tensor *y) {
    tfm_ctx *const c = o->c;
    if (tfm__cancelled(c) && !tfm__failed(c)) tfm__fail(c, TFM_CANCELLED, "%s: cancelled", tfm__op_name(o));
    if (o->has_temporary) (void)tfm__rewind(c, o->mark);
    if (tfm__failed(c)) y = NULL;
    if (y && o->requires_grad && y == o->result && tfm__is_float(y->dtype)) y = tfm__record(o, y);
    if (c->profile) tfm__clock_out(o, y);
    c->op = o->outer;
    tfm__release(c);
    return y;
}

/* The same for a verb. */
static tfm_status tfm__leave_status(tfm__op *o) {
    tfm_ctx *const c = o->c;
    (void)tfm__leave(o, NULL);
    return tfm__status(c);
}

/* What a verb returns when tfm__enter said no. */
static tfm_status tfm__refused(const tfm_ctx *c) {
    const tfm_status status = tfm__status(c);
    return status ? status : TFM_BUSY;
}

/* Opens the op; `count` required tensors follow. 0: return NULL at once. */
static int tfm__enter(tfm_ctx *c, tfm__op *o, int op, int count, ...) {
    va_list list;
    int i, fine = 1;
    if (!c || !tfm__acquire(c)) return 0;
    if (tfm__failed(c)) {
        tfm__release(c);
        return 0;
    }
    memset(o, 0, offsetof(tfm__op, text));
    o->c = c;
    o->k = c->k;
    o->op = op;
    o->run = !c->dry;
    o->outer = c->op;
    c->op = o;
    if (c->profile) o->begun = tfm__now();
    va_start(list, count);
    for (i = 0; i < count && fine; ++i) {
        o->input[i] = va_arg(list, const tfm_tensor *);
        o->count = i + 1;
        fine = tfm__admit(o, o->input[i], i + 1);
        if (!fine) o->count = i;
    }
    va_end(list);
    if (fine) return 1;
    (void)tfm__leave(o, NULL);
    return 0;
}

/* An input that may be NULL. 0: it is dead or foreign and the error is set: return tfm__leave(o, NULL). */
static int tfm__optional(tfm__op *o, const tfm_tensor *t) {
    TFM_ASSERT(o->count < TFM__OP_INPUTS);
    if (t && !tfm__admit(o, t, o->count + 1)) return 0;
    o->input[o->count++] = t;
    return 1;
}

/* The inputs are list[0..count). 0: the error is set: return tfm__leave(o, NULL). */
static int tfm__inputs(tfm__op *o, const tfm_tensor *const *list, int count) {
    int i;
    for (i = 0; i < count; ++i) {
        if (!tfm__admit(o, list[i], i + 1)) return 0;
    }
    o->list = list;
    o->list_count = count;
    return 1;
}

static void tfm__reject_text(tfm__op *o, tfm_status code, const char *format, va_list list) {
    char text[600];
    vsnprintf(text, sizeof(text), format, list);
    tfm__fail(o->c, code, "%s: %s", tfm__op_name(o), text);
    (void)tfm__leave(o, NULL);
}

/* Leaves the op with the error "tfm_add: ..." */
TFM__PRINTF(2, 3)
static tfm_tensor *tfm__reject(tfm__op *o, const char *format, ...) {
    va_list list;
    va_start(list, format);
    tfm__reject_text(o, TFM_INVALID, format, list);
    va_end(list);
    return NULL;
}

TFM__UNUSED TFM__PRINTF(3, 4)
static tfm_tensor *tfm__reject_as(tfm__op *o, tfm_status code, const char *format, ...) {
    va_list list;
    va_start(list, format);
    tfm__reject_text(o, code, format, list);
    va_end(list);
    return NULL;
}

/* -- results and scratch ------------------------------------------------------------------------------------------- */

/* A contiguous tensor in the arena, not initialised. `what` begins the error. */
static tfm_tensor *tfm__tensor_as(tfm_ctx *c, const char *what, int dtype, int ndim, const int64_t *shape) {
    tfm_tensor *t;
    int64_t numel, bytes;
    if (!tfm__shape_check(c, what, dtype, ndim, shape, &numel)) return NULL;
    t = tfm__header_new(c);
    if (!t) return NULL;
    bytes = numel * tfm_dtype_size(dtype);
    if (bytes) {
        t->data = tfm__arena_alloc(c, bytes);
        if (!t->data) return NULL;
    }
    t->dtype = dtype;
    t->ndim = ndim;
    t->bytes = bytes;
    if (ndim) memcpy(t->shape, shape, sizeof(int64_t) * (size_t)ndim);
    tfm__contiguous_strides(ndim, t->shape, t->stride);
    return t;
}

TFM__UNUSED static tfm_tensor *tfm__tensor(tfm_ctx *c, int dtype, int ndim, const int64_t *shape) {
    return tfm__tensor_as(c, c->op ? tfm__op_name(c->op) : "tensor", dtype, ndim, shape);
}

/* A header on base's memory, `offset` elements from its first. Inherits the dtype. */
static tfm_tensor *tfm__view(tfm_ctx *c, const tfm_tensor *base, int ndim, const int64_t *shape, const int64_t *stride,
                             int64_t offset) {
    tfm_tensor *const t = tfm__header_new(c);
    int i;
    if (!t) return NULL;
    t->dtype = base->dtype;
    t->ndim = ndim;
    for (i = 0; i < ndim; ++i) {
        t->shape[i] = shape[i];
        t->stride[i] = stride[i];
    }
    t->data = tfm__sizes(ndim, shape) ? tfm__at(base, offset) : NULL;
    return t;
}

/* A header on memory of the caller, contiguous. */
static tfm_tensor *tfm__wrap(tfm_ctx *c, int dtype, int ndim, const int64_t *shape, void *data) {
    tfm_tensor *const t = tfm__header_new(c);
    if (!t) return NULL;
    t->dtype = dtype;
    t->ndim = ndim;
    if (ndim) memcpy(t->shape, shape, sizeof(int64_t) * (size_t)ndim);
    tfm__contiguous_strides(ndim, t->shape, t->stride);
    t->data = tfm__sizes(ndim, shape) ? data : NULL;
    return t;
}

/* The first result made is the one that is recorded. */
static tfm_tensor *tfm__result(tfm__op *o, int dtype, int ndim, const int64_t *shape) {
    tfm_tensor *const t = tfm__tensor_as(o->c, tfm__op_name(o), dtype, ndim, shape);
    TFM_ASSERT(!o->has_temporary);
    if (!o->result) o->result = t;
    return t;
}

static tfm_tensor *tfm__result_view(tfm__op *o, const tfm_tensor *base, int ndim, const int64_t *shape,
                                    const int64_t *stride, int64_t offset) {
    tfm_tensor *const t = tfm__view(o->c, base, ndim, shape, stride, offset);
    if (!o->result) o->result = t;
    return t;
}

/* Memory until the op is left. Make every result first: leaving gives back all that came after the first temporary. */
static void *tfm__temporary(tfm__op *o, int64_t bytes) {
    if (!o->has_temporary) {
        o->mark = tfm__mark(o->c);
        o->has_temporary = 1;
    }
    return tfm__arena_alloc(o->c, bytes);
}

/* Rows of working memory inside a task: the slot's own scratch where `bytes` fit, else a temporary for all slots. */
typedef struct tfm__lanes {
    char *base;
    int64_t bytes;
} tfm__lanes;

static int tfm__lanes_get(tfm__op *o, tfm__lanes *l, int64_t bytes) {
    int64_t all;
    l->base = NULL;
    l->bytes = tfm__round_up(tfm__max64(bytes, 1), 64);
    if (bytes <= TFM__SCRATCH_BYTES) return 1;
    if (!tfm__mul(l->bytes, o->c->threads, &all)) all = INT64_MAX / 2;
    l->base = (char *)tfm__temporary(o, all);
    return l->base != NULL;
}

static void *tfm__lane(const tfm_ctx *c, const tfm__lanes *l, int slot) {
    return l->base ? (void *)(l->base + l->bytes * slot) : tfm__scratch(c, slot);
}

/* -- checks: 1 = fine; 0 = the op has been rejected and left ------------------------------------------------------- */

static int tfm__need_float(tfm__op *o, const char *name, const tfm_tensor *t) {
    if (tfm__is_float(t->dtype)) return 1;
    tfm__reject(o, "%s is %s: %s is storage only here, tfm_cast makes it f32", name, tfm__describe(o, t),
                tfm_dtype_name(t->dtype));
    return 0;
}

static int tfm__need_index(tfm__op *o, const char *name, const tfm_tensor *t) {
    if (tfm__is_index(t->dtype)) return 1;
    tfm__reject(o, "%s is %s, expected i64 or i32", name, tfm__describe(o, t));
    return 0;
}

/* A negative dim counts from the end; a scalar is taken as having one dim, as in PyTorch. */
static int tfm__need_dim(tfm__op *o, const char *name, int *dim, int ndim) {
    const int dims = ndim ? ndim : 1;
    if (*dim >= -dims && *dim < dims) {
        if (*dim < 0) *dim += dims;
        return 1;
    }
    tfm__reject(o, "%s is %d, expected %d to %d", name, *dim, -dims, dims - 1);
    return 0;
}

/* The common shape of two tensors. */
static int tfm__broadcast(tfm__op *o, const char *name_a, const tfm_tensor *a, const char *name_b, const tfm_tensor *b,
                          int *ndim, int64_t *shape) {
    const int dims = a->ndim > b->ndim ? a->ndim : b->ndim;
    int i;
    for (i = 0; i < dims; ++i) {
        const int64_t m = i < dims - a->ndim ? 1 : a->shape[i - (dims - a->ndim)];
        const int64_t n = i < dims - b->ndim ? 1 : b->shape[i - (dims - b->ndim)];
        if (m != n && m != 1 && n != 1) {
            tfm__reject(o, "%s is %s, %s is %s: shapes do not broadcast in dim %d", name_a, tfm__describe(o, a), name_b,
                        tfm__describe(o, b), i);
            return 0;
        }
        shape[i] = m == 1 ? n : m;
    }
    *ndim = dims;
    return 1;
}

/* Verbs that write into t: not when the tape may still read its memory. */
typedef struct tfm__span { const char *low, *high; } tfm__span;

static tfm__span tfm__span_of(const tfm_tensor *t) {
    tfm__span s;
    int64_t low = 0, high = 1;
    int i;
    s.low = s.high = NULL;
    if (!t || !t->data || tfm_numel(t) == 0) return s;
    for (i = 0; i < t->ndim; ++i) {
        const int64_t reach = (t->shape[i] - 1) * t->stride[i];
        if (reach < 0) low += reach; else high += reach;
    }
    s.low = tfm__at(t, low);
    s.high = tfm__at(t, high);
    return s;
}

static int tfm__share_memory(const tfm_tensor *a, const tfm_tensor *b) {
    const tfm__span m = tfm__span_of(a), n = tfm__span_of(b);
    return m.low && n.low && m.low < n.high && n.low < m.high;
}

static int tfm__refuse_recorded(tfm__op *o, const char *name, const tfm_tensor *t) {
    const tfm__node *node;
    int i, found = t->requires_grad;
    for (node = o->c->tape; node && !found; node = node->before) {
        found = tfm__share_memory(t, node->result);
        for (i = 0; i < node->count && !found; ++i) found = tfm__share_memory(t, node->input[i]);
        for (i = 0; i < TFM__OP_SAVED && !found; ++i) found = tfm__share_memory(t, node->saved[i]);
    }
    if (!found) return 1;
    tfm__reject(o, "%s is recorded on the tape and must not be written", name);
    return 0;
}

/* -- the tape, from outside ---------------------------------------------------------------------------------------- */

TFM_API tfm_status tfm_set_requires_grad(tfm_ctx *c, tfm_tensor *t, int on) {
    tfm__op o;
    if (!tfm__enter(c, &o, TFM__OP_SET_REQUIRES_GRAD, 1, t)) return tfm__refused(c);
    if (on && !tfm__need_float(&o, "t", t)) return tfm__status(c);
    if (!on && t->node) {
        tfm__reject(&o, "t is the result of a recorded op: tfm_tape_clear drops the record");
        return tfm__status(c);
    }
    t->requires_grad = on ? 1 : 0;
    return tfm__leave_status(&o);
}

TFM_API int64_t tfm_tape_length(const tfm_ctx *c) {
    return c ? c->tape_length : 0;
}

TFM_API void tfm_tape_clear(tfm_ctx *c) {
    tfm__node *node;
    if (!c || !tfm__acquire(c)) return;
    for (node = c->tape; node; node = node->before) { /* results become constants */
        node->result->node = NULL;
        node->result->requires_grad = 0;
    }
    c->tape = NULL;
    c->tape_length = 0;
    tfm__tape_unpin(c);
    tfm__release(c);
}

/* -- walks --------------------------------------------------------------------------------------------------------- */

#define TFM__WALK 4      /* operands of a joint walk */
#define TFM__PIECE 512    /* elements converted at once: three f32 tiles take 6 KiB of stack and stay in L1 */
#define TFM__RUN 16384   /* elements that one slot takes at a time from a long row */

/* Several tensors walked together over one shape. */
typedef struct tfm__walk {
    int ndim, count;
    int64_t rows, n;                             /* after tfm__walk_rows: rows of n elements, step[i] apart */
    int64_t step[TFM__WALK];
    int64_t shape[TFM_MAX_DIMS];
    int64_t stride[TFM__WALK][TFM_MAX_DIMS];
} tfm__walk;

static void tfm__walk_init(tfm__walk *w, int ndim, const int64_t *shape, int count) {
    int i;
    w->ndim = ndim;
    w->count = count;
    w->rows = w->n = 0;
    for (i = 0; i < ndim; ++i) w->shape[i] = shape[i];
}

/* Operand i is t, repeated where it has one element (or no dim) and the walk has more. */
static void tfm__walk_operand(tfm__walk *w, int i, const tfm_tensor *t) {
    const int missing = w->ndim - t->ndim;
    int d;
    for (d = 0; d < w->ndim; ++d) {
        w->stride[i][d] = d < missing || t->shape[d - missing] == 1 ? 0 : t->stride[d - missing];
    }
}

/* Drops dims of one element and merges neighbours that lie in all operands like one dim. */
static void tfm__walk_merge(tfm__walk *w) {
    int d, i, last = -1;
    for (d = 0; d < w->ndim; ++d) {
        int merge = last >= 0;
        if (w->shape[d] == 1) continue;
        for (i = 0; i < w->count && merge; ++i) merge = w->stride[i][last] == w->stride[i][d] * w->shape[d];
        if (!merge) last += 1;
        w->shape[last] = merge ? w->shape[last] * w->shape[d] : w->shape[d];
        for (i = 0; i < w->count; ++i) w->stride[i][last] = w->stride[i][d];
    }
    w->ndim = last + 1;
}

/* Takes the last dim as the row; `rows` counts the others. */
static void tfm__walk_rows(tfm__walk *w) {
    int i;
    w->n = 1;
    if (w->ndim > 0) w->n = w->shape[--w->ndim];
    for (i = 0; i < w->count; ++i) w->step[i] = w->n == 1 ? 1 : w->stride[i][w->ndim];
    w->rows = tfm__sizes(w->ndim, w->shape);
}

/* A place in the walk: element offsets of the operands at one row. */
typedef struct tfm__cursor {
    int64_t index[TFM_MAX_DIMS], offset[TFM__WALK];
} tfm__cursor;

static void tfm__cursor_at(const tfm__walk *w, int64_t row, tfm__cursor *at) {
    int d, i;
    for (i = 0; i < w->count; ++i) at->offset[i] = 0;
    for (d = w->ndim; d-- > 0;) {
        at->index[d] = row % w->shape[d];
        row /= w->shape[d];
        for (i = 0; i < w->count; ++i) at->offset[i] += at->index[d] * w->stride[i][d];
    }
}

static void tfm__cursor_next(const tfm__walk *w, tfm__cursor *at) {
    int d, i;
    for (d = w->ndim; d-- > 0;) {
        at->index[d] += 1;
        for (i = 0; i < w->count; ++i) at->offset[i] += w->stride[i][d];
        if (at->index[d] < w->shape[d]) return;
        at->index[d] = 0;
        for (i = 0; i < w->count; ++i) at->offset[i] -= w->stride[i][d] * w->shape[d];
    }
}

/* Rows cut into runs: the items of a parallel loop. Nothing here depends on the number of threads. */
typedef struct tfm__runs {
    int64_t length, per_row, items, grain;
} tfm__runs;

static tfm__runs tfm__runs_of(int64_t rows, int64_t n) {
    tfm__runs r;
    r.length = tfm__min64(n, TFM__RUN);
    r.per_row = n ? tfm__ceil_div(n, r.length) : 0;
    r.items = rows * r.per_row;
    r.grain = n ? tfm__max64(1, TFM__RUN / r.length) : 1;
    return r;
}

static const char *tfm__byte(const void *p, int dtype, int64_t offset) {
    return (const char *)p + offset * tfm_dtype_size(dtype);
}

/* -- moving and converting elements -------------------------------------------------------------------------------- */

#define TFM__MOVE_LOOP(type) \
    { \
        type *const d = (type *)dst; \
        const type *const s = (const type *)src; \
        for (int64_t i = 0; i < n; ++i) d[i * dst_step] = s[i * src_step]; \
        break; \
    }

/* n elements of `size` bytes. */
static void tfm__move(void *dst, int64_t dst_step, const void *src, int64_t src_step, int64_t n, int64_t size) {
    if (dst_step == 1 && src_step == 1) {
        memcpy(dst, src, (size_t)(n * size));
        return;
    }
    switch (size) {
    case 1: TFM__MOVE_LOOP(uint8_t)
    case 2: TFM__MOVE_LOOP(uint16_t)
    case 4: TFM__MOVE_LOOP(uint32_t)
    default: TFM__MOVE_LOOP(uint64_t)
    }
}

/* Integers wrap into narrower integers (PyTorch); halves are rounded once. */
static void tfm__store_integer(int dtype, void *p, int64_t i, int64_t value) {
    switch (dtype) {
    case TFM_I64: ((int64_t *)p)[i] = value; break;
    case TFM_I32: ((int32_t *)p)[i] = (int32_t)(uint32_t)((uint64_t)value & 0xffffffffu); break;
    case TFM_I8: ((int8_t *)p)[i] = (int8_t)(uint8_t)((uint64_t)value & 0xffu); break;
    case TFM_U8: ((uint8_t *)p)[i] = (uint8_t)((uint64_t)value & 0xffu); break;
    case TFM_BOOL: ((uint8_t *)p)[i] = value ? (uint8_t)1 : (uint8_t)0; break;
    case TFM_F64: ((double *)p)[i] = (double)value; break;
    default: tfm__store_at(dtype, p, i, tfm__odd_double(value)); break;
    }
}

/* n elements from one dtype to another. */
static void tfm__convert(const struct tfm__kernels *k, void *dst, int dst_dtype, int64_t dst_step, const void *src,
                         int src_dtype, int64_t src_step, int64_t n) {
    float tile[TFM__PIECE];
    int64_t i, begin;
    if (dst_dtype == src_dtype) {
        tfm__move(dst, dst_step, src, src_step, n, tfm_dtype_size(dst_dtype));
    } else if (dst_dtype == TFM_F32 && dst_step == 1) {
        k->load((float *)dst, src, src_dtype, src_step, n);
    } else if (src_dtype == TFM_F32 && src_step == 1) {
        k->store(dst, dst_dtype, dst_step, (const float *)src, n);
    } else if (tfm__is_float(src_dtype) || dst_dtype == TFM_F32) { /* f32 holds the source, or is the only rounding */
        for (begin = 0; begin < n; begin += TFM__PIECE) {
            const int64_t m = tfm__min64(n - begin, TFM__PIECE);
            k->load(tile, tfm__byte(src, src_dtype, begin * src_step), src_dtype, src_step, m);
            k->store((char *)dst + begin * dst_step * tfm_dtype_size(dst_dtype), dst_dtype, dst_step, tile, m);
        }
    } else if (src_dtype == TFM_F64) {
        for (i = 0; i < n; ++i) tfm__store_at(dst_dtype, dst, i * dst_step, ((const double *)src)[i * src_step]);
    } else {
        for (i = 0; i < n; ++i) {
            tfm__store_integer(dst_dtype, dst, i * dst_step, tfm__id_at(src_dtype, src, i * src_step));
        }
    }
}

typedef struct tfm__assignment {
    const struct tfm__kernels *k;
    tfm__walk w;
    tfm__runs r;
    void *dst;
    const void *src;
    int dst_dtype, src_dtype;
} tfm__assignment;

static void tfm__assign_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__assignment *const a = (const tfm__assignment *)arg;
    const int64_t dst_size = tfm_dtype_size(a->dst_dtype);
    tfm__cursor at;
    int64_t item;
    (void)slot;
    tfm__cursor_at(&a->w, begin / a->r.per_row, &at);
    for (item = begin; item < end; ++item) {
        const int64_t from = item % a->r.per_row * a->r.length, m = tfm__min64(a->r.length, a->w.n - from);
        tfm__convert(a->k, (char *)a->dst + (at.offset[0] + from * a->w.step[0]) * dst_size, a->dst_dtype, a->w.step[0],
                     tfm__byte(a->src, a->src_dtype, at.offset[1] + from * a->w.step[1]), a->src_dtype, a->w.step[1],
                     m);
        if (from + m == a->w.n) tfm__cursor_next(&a->w, &at);
    }
}

/* A copy whose source runs along another dim than its destination, block by block: each cache line is fetched once. */
#define TFM__FLIP_ROWS 64      /* of the destination at a time: their pages and those of 16 source rows stay known */
#define TFM__FLIP_COLS 16
typedef struct tfm__flip {
    const struct tfm__kernels *k; /* NULL: not f32 */
    tfm__walk w;               /* the other dims */
    char *dst;
    const char *src;
    int64_t size, rows, cols, dst_row, src_row, blocks;
} tfm__flip;

#define TFM__FLIP_LOOP(type) \
    { \
        type *const d = (type *)(void *)dst; \
        const type *const s = (const type *)(const void *)src; \
        for (j = 0; j < t->cols; j += TFM__FLIP_COLS) { \
            const int64_t end = tfm__min64(j + TFM__FLIP_COLS, t->cols); \
            for (r = 0; r < rows; ++r) { \
                for (i = j; i < end; ++i) d[r * t->dst_row + i] = s[i * t->src_row + r]; \
            } \
        } \
        break; \
    }

static void tfm__flip_task(void *arg, int64_t begin, int64_t end_item, int slot) {
    const tfm__flip *const t = (const tfm__flip *)arg;
    int64_t item, r, j, i;
    (void)slot;
    for (item = begin; item < end_item; ++item) {
        const int64_t first = item % t->blocks * TFM__FLIP_ROWS, rows = tfm__min64(TFM__FLIP_ROWS, t->rows - first);
        tfm__cursor at;
        char *dst;
        const char *src;
        tfm__cursor_at(&t->w, item / t->blocks, &at);
        dst = t->dst + (at.offset[0] + first * t->dst_row) * t->size;
        src = t->src + (at.offset[1] + first) * t->size;
        switch (t->size) {
        case 1: TFM__FLIP_LOOP(uint8_t)
        case 2: TFM__FLIP_LOOP(uint16_t)
        case 4:
            if (!t->k) TFM__FLIP_LOOP(uint32_t)
            t->k->transpose((float *)(void *)dst, t->dst_row, (const float *)(const void *)src, t->src_row, rows,
                            t->cols);
            break;
        default: TFM__FLIP_LOOP(uint64_t)
        }
    }
}

/* 1: done, block by block. */
static int tfm__flip_copy(tfm_ctx *c, const tfm__assignment *a) {
    tfm__flip t;
    int last = a->w.ndim - 1, d, i;
    if (a->dst_dtype != a->src_dtype || last < 1 || a->w.stride[0][last] != 1) return 0;
    for (d = 0; d < last && a->w.stride[1][d] != 1; ++d) continue;
    if (d == last || a->w.shape[d] < TFM__FLIP_COLS || a->w.shape[last] < TFM__FLIP_COLS) return 0;
    t.k = a->dst_dtype == TFM_F32 ? a->k : NULL;
    t.dst = (char *)a->dst;
    t.src = (const char *)a->src;
    t.size = tfm_dtype_size(a->dst_dtype);
    t.rows = a->w.shape[d];
    t.cols = a->w.shape[last];
    t.dst_row = a->w.stride[0][d];
    t.src_row = a->w.stride[1][last];
    t.blocks = tfm__ceil_div(t.rows, TFM__FLIP_ROWS);
    t.w = a->w;
    t.w.ndim = last - 1;
    for (; d < last - 1; ++d) {
        t.w.shape[d] = t.w.shape[d + 1];
        for (i = 0; i < 2; ++i) t.w.stride[i][d] = t.w.stride[i][d + 1];
    }
    tfm__for(c, t.blocks * tfm__sizes(t.w.ndim, t.w.shape), 1, 4.0 * (double)tfm__sizes(a->w.ndim, a->w.shape),
             tfm__flip_task, &t);
    return 1;
}

/* dst = src, broadcast and converted; any strides, no temporary. Headers may be copies on the stack. */
static void tfm__assign(tfm_ctx *c, const tfm_tensor *dst, const tfm_tensor *src) {
    tfm__assignment a;
    if (tfm_numel(dst) == 0) return;
    if (src->layout == TFM_PANELS) { /* (panels, 16, columns), then the rows of the last panel */
        tfm_tensor to = *dst, from = *src;
        const int64_t whole = src->shape[0] / TFM__PANEL, rest = src->shape[0] % TFM__PANEL, columns = src->shape[1];
        from.layout = TFM_STRIDED;
        from.data = src->panels;
        from.ndim = to.ndim = 3;
        from.shape[0] = to.shape[0] = whole;
        from.shape[1] = to.shape[1] = TFM__PANEL;
        from.shape[2] = to.shape[2] = columns;
        from.stride[0] = TFM__PANEL * columns;
        from.stride[1] = 1;
        from.stride[2] = TFM__PANEL;
        to.stride[0] = TFM__PANEL * dst->stride[0];
        to.stride[1] = dst->stride[0];
        to.stride[2] = dst->stride[1];
        tfm__assign(c, &to, &from);
        from.shape[0] = to.shape[0] = 1;
        from.shape[1] = to.shape[1] = rest;
        from.data = tfm__at(&from, whole * from.stride[0]);
        to.data = tfm__at(&to, whole * to.stride[0]);
        tfm__assign(c, &to, &from);
        return;
    }
    a.k = c->k;
    a.dst = dst->data;
    a.src = src->data;
    a.dst_dtype = dst->dtype;
    a.src_dtype = src->dtype;
    tfm__walk_init(&a.w, dst->ndim, dst->shape, 2);
    tfm__walk_operand(&a.w, 0, dst);
    tfm__walk_operand(&a.w, 1, src);
    tfm__walk_merge(&a.w);
    if (tfm__flip_copy(c, &a)) return;
    tfm__walk_rows(&a.w);
    a.r = tfm__runs_of(a.w.rows, a.w.n);
    tfm__for(c, a.r.items, a.r.grain, 4.0 * (double)tfm_numel(dst), tfm__assign_task, &a);
}

/* Every element of t becomes value. */
static void tfm__fill(tfm_ctx *c, const tfm_tensor *t, double value) {
    tfm_tensor one;
    uint64_t element[1];
    memset(&one, 0, sizeof(one));
    one.dtype = t->dtype;
    one.data = element;
    tfm__store_at(t->dtype, element, 0, value);
    tfm__assign(c, t, &one);
}

/* t's header with dim cut to [start, start + length): a destination of tfm__assign. */
static tfm_tensor tfm__part(const tfm_tensor *t, int dim, int64_t start, int64_t length) {
    tfm_tensor part = *t;
    part.shape[dim] = length;
    part.data = tfm__at(t, start * t->stride[dim]);
    return part;
}

/* -- ids ----------------------------------------------------------------------------------------------------------- */

/* Every id in [0, limit). Not looked at in a dry run. */
static int tfm__check_ids(tfm__op *o, const char *name, const tfm_tensor *ids, int64_t limit) {
    tfm__walk w;
    tfm__cursor at;
    int64_t row, i;
    if (!o->run || tfm_numel(ids) == 0) return 1;
    tfm__walk_init(&w, ids->ndim, ids->shape, 1);
    tfm__walk_operand(&w, 0, ids);
    tfm__walk_merge(&w);
    tfm__walk_rows(&w);
    tfm__cursor_at(&w, 0, &at);
    for (row = 0; row < w.rows; ++row) {
        for (i = 0; i < w.n; ++i) {
            const int64_t id = tfm__id_at(ids->dtype, ids->data, at.offset[0] + i * w.step[0]);
            if (id < 0 || id >= limit) {
                tfm__reject(o, "%s holds %lld at position %lld, expected 0 to %lld", name, (long long)id,
                            (long long)(row * w.n + i), (long long)(limit - 1));
                return 0;
            }
        }
        tfm__cursor_next(&w, &at);
    }
    return 1;
}

/* -- creation ------------------------------------------------------------------------------------------------------ */

/* A result of this shape, filled with value unless it is to stay uninitialised. */
static tfm_tensor *tfm__create_filled(tfm_ctx *c, int op, int dtype, tfm_shape shape, int fill, double value) {
    tfm__op o;
    tfm_tensor *y;
    if (!tfm__enter(c, &o, op, 0)) return NULL;
    y = tfm__result(&o, dtype, shape.ndim, shape.dim);
    if (y && o.run && fill) tfm__fill(c, y, value);
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_empty(tfm_ctx *c, int dtype, tfm_shape shape) {
    return tfm__create_filled(c, TFM__OP_EMPTY, dtype, shape, 0, 0.0);
}

TFM_API tfm_tensor *tfm_zeros(tfm_ctx *c, tfm_shape shape) {
    return tfm__create_filled(c, TFM__OP_ZEROS, TFM_F32, shape, 1, 0.0);
}

TFM_API tfm_tensor *tfm_ones(tfm_ctx *c, tfm_shape shape) {
    return tfm__create_filled(c, TFM__OP_ONES, TFM_F32, shape, 1, 1.0);
}

TFM_API tfm_tensor *tfm_full(tfm_ctx *c, int dtype, tfm_shape shape, double value) {
    return tfm__create_filled(c, TFM__OP_FULL, dtype, shape, 1, value);
}

typedef struct tfm__random {
    float *out;
    int64_t count;
    uint64_t seed, stream;
    float low, high;   /* of uniform; normal when they are equal */
} tfm__random;

#define TFM__RANDOM_RUN 4096

static void tfm__random_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__random *const r = (const tfm__random *)arg;
    const int64_t first = begin * TFM__RANDOM_RUN, last = tfm__min64(end * TFM__RANDOM_RUN, r->count);
    int64_t i;
    (void)slot;
    if (r->low == r->high) {
        tfm__normal_fill(r->out + first, last - first, r->seed, r->stream, (uint64_t)first);
        return;
    }
    tfm__uniform_fill(r->out + first, last - first, r->seed, r->stream, (uint64_t)first);
    for (i = first; i < last; ++i) {
        const float x = r->low + (r->high - r->low) * r->out[i];
        r->out[i] = x < r->high ? x : r->low; /* rounding may reach the end that is not part of the range */
    }
}

static void tfm__fill_random(tfm_ctx *c, const tfm_tensor *y, uint64_t stream, float low, float high) {
    tfm__random r;
    r.out = (float *)y->data;
    r.count = tfm_numel(y);
    r.seed = c->seed;
    r.stream = stream;
    r.low = low;
    r.high = high;
    tfm__for(c, tfm__ceil_div(r.count, TFM__RANDOM_RUN), 1, 40.0 * (double)r.count, tfm__random_task, &r);
}

TFM_API tfm_tensor *tfm_randn(tfm_ctx *c, tfm_shape shape) {
    tfm__op o;
    tfm_tensor *y;
    uint64_t stream;
    if (!tfm__enter(c, &o, TFM__OP_RANDN, 0)) return NULL;
    y = tfm__result(&o, TFM_F32, shape.ndim, shape.dim);
    stream = tfm__random_stream(c);
    if (y && o.run) tfm__fill_random(c, y, stream, 0.0f, 0.0f);
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_uniform(tfm_ctx *c, tfm_shape shape, float low, float high) {
    tfm__op o;
    tfm_tensor *y;
    uint64_t stream;
    if (!tfm__enter(c, &o, TFM__OP_UNIFORM, 0)) return NULL;
    if (!(low <= high) || tfm__isinf(high - low)) {
        return tfm__reject(&o, "low is %g, high is %g: expected low <= high, both finite", (double)low, (double)high);
    }
    y = tfm__result(&o, TFM_F32, shape.ndim, shape.dim);
    stream = tfm__random_stream(c);
    if (y && o.run && low == high) tfm__fill(c, y, (double)low);
    if (y && o.run && low < high) tfm__fill_random(c, y, stream, low, high);
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_arange(tfm_ctx *c, int dtype, double start, double end, double step) {
    tfm__op o;
    tfm_tensor *y;
    double count = (end - start) / step;
    int64_t n, i;
    if (!tfm__enter(c, &o, TFM__OP_ARANGE, 0)) return NULL;
    if (!(start - start == 0.0) || !(end - end == 0.0) || !(step - step == 0.0) || step == 0.0 || count < 0.0) {
        return tfm__reject(&o,
                           "start %g, end %g, step %g: expected finite numbers, and steps that lead from start to end",
                           start, end, step);
    }
    count = ceil(count);
    if (count > 9e15) return tfm__reject(&o, "start %g, end %g, step %g: too many elements", start, end, step);
    n = (int64_t)count;
    y = tfm__result(&o, dtype, 1, &n);
    for (i = 0; y && o.run && i < n; ++i) tfm__store_at(dtype, y->data, i, start + (double)i * step);
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_from(tfm_ctx *c, int dtype, tfm_shape shape, const void *data) {
    tfm__op o;
    tfm_tensor *y;
    if (!tfm__enter(c, &o, TFM__OP_FROM, 0)) return NULL;
    y = tfm__result(&o, dtype, shape.ndim, shape.dim);
    if (y && y->bytes && !data) {
        return tfm__reject(&o, "data is NULL, expected %lld bytes for %s", (long long)y->bytes, tfm__describe(&o, y));
    }
    if (y && y->bytes && o.run) memcpy(y->data, data, (size_t)y->bytes);
    return tfm__leave(&o, y);
}

/* Memory of the caller: stride NULL for contiguous. */
static tfm_tensor *tfm__wrap_checked(tfm_ctx *c, int op, int dtype, tfm_shape shape, int strided, const int64_t *stride,
                                     void *data) {
    tfm__op o;
    tfm_tensor *y;
    int64_t numel, reach = 0, span;
    int i;
    if (!tfm__enter(c, &o, op, 0)) return NULL;
    if (!tfm__shape_check(c, tfm__op_name(&o), dtype, shape.ndim, shape.dim, &numel)) return tfm__leave(&o, NULL);
    if (numel && !data) return tfm__reject(&o, "data is NULL, expected %lld elements", (long long)numel);
    if ((uintptr_t)data % (uintptr_t)tfm_dtype_size(dtype)) {
        return tfm__reject(&o, "data is not aligned to the %d bytes of %s", (int)tfm_dtype_size(dtype),
                           tfm_dtype_name(dtype));
    }
    if (strided && shape.ndim && !stride) return tfm__reject(&o, "stride is NULL");
    for (i = 0; strided && i < shape.ndim; ++i) {
        if (stride[i] < 0) return tfm__reject(&o, "stride %d is %lld, expected 0 or more", i, (long long)stride[i]);
        if (numel &&
            (!tfm__mul(stride[i], shape.dim[i] - 1, &span) || !tfm__add(reach, span, &reach)
             || reach > INT64_MAX / 32)) {
            return tfm__reject(&o, "stride %d is %lld: out of the address space", i, (long long)stride[i]);
        }
    }
    y = tfm__wrap(c, dtype, shape.ndim, shape.dim, data);
    for (i = 0; y && strided && i < shape.ndim; ++i) y->stride[i] = stride[i];
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_wrap(tfm_ctx *c, int dtype, tfm_shape shape, void *data) {
    return tfm__wrap_checked(c, TFM__OP_WRAP, dtype, shape, 0, NULL, data);
}

TFM_API tfm_tensor *tfm_wrap_strided(tfm_ctx *c, int dtype, tfm_shape shape, const int64_t *stride, void *data) {
    return tfm__wrap_checked(c, TFM__OP_WRAP_STRIDED, dtype, shape, 1, stride, data);
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Views: new headers on old memory
 * ---------------------------------------------------------------------------------------------------------------- */

/* The geometry of a view in the making. */
typedef struct tfm__geometry {
    int ndim;
    int64_t shape[TFM_MAX_DIMS], stride[TFM_MAX_DIMS], offset;
} tfm__geometry;

static tfm__geometry tfm__geometry_of(const tfm_tensor *t) {
    tfm__geometry g;
    g.ndim = t->ndim;
    g.offset = 0;
    memcpy(g.shape, t->shape, sizeof(g.shape));
    memcpy(g.stride, t->stride, sizeof(g.stride));
    return g;
}

static void tfm__geometry_drop(tfm__geometry *g, int dim) {
    int i;
    g->ndim -= 1;
    for (i = dim; i < g->ndim; ++i) {
        g->shape[i] = g->shape[i + 1];
        g->stride[i] = g->stride[i + 1];
    }
}

static void tfm__geometry_insert(tfm__geometry *g, int dim, int64_t size, int64_t stride) {
    int i;
    for (i = g->ndim; i > dim; --i) {
        g->shape[i] = g->shape[i - 1];
        g->stride[i] = g->stride[i - 1];
    }
    g->shape[dim] = size;
    g->stride[dim] = stride;
    g->ndim += 1;
}

static void tfm__geometry_swap(tfm__geometry *g, int a, int b) {
    const int64_t shape = g->shape[a], stride = g->stride[a];
    g->shape[a] = g->shape[b];
    g->stride[a] = g->stride[b];
    g->shape[b] = shape;
    g->stride[b] = stride;
}

static tfm_tensor *tfm__leave_view(tfm__op *o, const tfm_tensor *t, const tfm__geometry *g) {
    return tfm__leave(o, tfm__result_view(o, t, g->ndim, g->shape, g->stride, g->offset));
}

/* Strides that show g under another shape of equally many elements; 0: only a copy can. Both shapes are cut, from the
 * last dim on, into the smallest groups of equal size; a group works when its old dims lie like one. */
static int tfm__geometry_reshape(const tfm__geometry *g, int ndim, const int64_t *shape, int64_t *stride) {
    int64_t old_size = 1, new_size = 1, base;
    int d, v = ndim - 1;
    if (tfm__sizes(g->ndim, g->shape) <= 1) {
        tfm__contiguous_strides(ndim, shape, stride);
        return 1;
    }
    base = g->stride[g->ndim - 1];
    for (d = g->ndim - 1; d >= 0; --d) {
        old_size *= g->shape[d];
        if (d > 0 && (g->shape[d - 1] == 1 || g->stride[d - 1] == old_size * base)) continue; /* the group goes on */
        for (; v >= 0 && (new_size < old_size || shape[v] == 1); --v) {
            stride[v] = new_size * base;
            new_size *= shape[v];
        }
        if (new_size != old_size) return 0;
        if (d > 0) base = g->stride[d - 1];
        old_size = new_size = 1;
    }
    return v < 0;
}

/* Fills in a size of -1. 0: rejected. */
static int tfm__infer_shape(tfm__op *o, const tfm_tensor *t, tfm_shape *shape) {
    const int64_t numel = tfm_numel(t);
    int64_t known = 1;
    int i, open = -1;
    for (i = 0; i < shape->ndim; ++i) {
        if (shape->dim[i] == -1 && open < 0) {
            open = i;
        } else if (shape->dim[i] < 0 || !tfm__mul(known, shape->dim[i], &known)) {
            tfm__reject(o, "shape %s is not one of %lld elements", tfm__describe_shape(o, shape->ndim, shape->dim),
                        (long long)numel);
            return 0;
        }
    }
    if (open >= 0 && known > 0 && numel % known == 0) {
        shape->dim[open] = numel / known;
        known = numel;
    }
    if (known == numel && (open < 0 || shape->dim[open] >= 0)) return 1;
    tfm__reject(o, "t is %s: %lld elements do not fit shape %s", tfm__describe(o, t), (long long)numel,
                tfm__describe_shape(o, shape->ndim, shape->dim));
    return 0;
}

/* t under another shape: a view where strides allow it, else a copy (or an error). Leaves the op. */
static tfm_tensor *tfm__reshaped(tfm__op *o, const tfm_tensor *t, const tfm__geometry *g, int ndim,
                                 const int64_t *shape, int may_copy) {
    int64_t stride[TFM_MAX_DIMS];
    tfm_tensor *y, from, to;
    if (tfm__geometry_reshape(g, ndim, shape, stride)) {
        return tfm__leave(o, tfm__result_view(o, t, ndim, shape, stride, g->offset));
    }
    if (!may_copy) {
        return tfm__reject(o, "t is %s: its strides cannot show shape %s without a copy; tfm_reshape copies",
                           tfm__describe(o, t), tfm__describe_shape(o, ndim, shape));
    }
    y = tfm__result(o, t->dtype, ndim, shape);
    if (y && o->run) {
        from = *t;
        from.ndim = g->ndim;
        memcpy(from.shape, g->shape, sizeof(g->shape));
        memcpy(from.stride, g->stride, sizeof(g->stride));
        to = from;
        to.data = y->data;
        tfm__contiguous_strides(to.ndim, to.shape, to.stride);
        tfm__assign(o->c, &to, &from);
    }
    return tfm__leave(o, y);
}

static tfm_tensor *tfm__reshape_op(tfm_ctx *c, int op, const tfm_tensor *t, tfm_shape shape, int may_copy) {
    tfm__op o;
    tfm__geometry g;
    if (!tfm__enter(c, &o, op, 1, t)) return NULL;
    if (shape.ndim < 0 || shape.ndim > TFM_MAX_DIMS) {
        return tfm__reject(&o, "a shape has 0 to %d sizes, this one %d", TFM_MAX_DIMS, shape.ndim);
    }
    if (!tfm__infer_shape(&o, t, &shape)) return NULL;
    g = tfm__geometry_of(t);
    return tfm__reshaped(&o, t, &g, shape.ndim, shape.dim, may_copy);
}

TFM_API tfm_tensor *tfm_reshape(tfm_ctx *c, const tfm_tensor *t, tfm_shape shape) {
    return tfm__reshape_op(c, TFM__OP_RESHAPE, t, shape, 1);
}

TFM_API tfm_tensor *tfm_view(tfm_ctx *c, const tfm_tensor *t, tfm_shape shape) {
    return tfm__reshape_op(c, TFM__OP_VIEW, t, shape, 0);
}

TFM_API tfm_tensor *tfm_transpose(tfm_ctx *c, const tfm_tensor *t, int dim0, int dim1) {
    tfm__op o;
    tfm__geometry g;
    if (!tfm__enter(c, &o, TFM__OP_TRANSPOSE, 1, t)) return NULL;
    if (!tfm__need_dim(&o, "dim0", &dim0, t->ndim) || !tfm__need_dim(&o, "dim1", &dim1, t->ndim)) return NULL;
    g = tfm__geometry_of(t);
    if (t->ndim) tfm__geometry_swap(&g, dim0, dim1);
    o.number[0] = dim0;
    o.number[1] = dim1;
    return tfm__leave_view(&o, t, &g);
}

TFM_API tfm_tensor *tfm_permute(tfm_ctx *c, const tfm_tensor *t, tfm_shape order) {
    tfm__op o;
    tfm__geometry g;
    int i, used = 0;
    if (!tfm__enter(c, &o, TFM__OP_PERMUTE, 1, t)) return NULL;
    if (order.ndim != t->ndim) {
        return tfm__reject(&o, "order names %d dims, t is %s", order.ndim, tfm__describe(&o, t));
    }
    g = tfm__geometry_of(t);
    for (i = 0; i < t->ndim; ++i) {
        const int64_t dim = order.dim[i] < 0 ? order.dim[i] + t->ndim : order.dim[i];
        if (dim < 0 || dim >= t->ndim || (used >> dim & 1)) {
            return tfm__reject(&o, "order %s is not a permutation of %d dims",
                               tfm__describe_shape(&o, order.ndim, order.dim), t->ndim);
        }
        used |= 1 << dim;
        g.shape[i] = t->shape[dim];
        g.stride[i] = t->stride[dim];
        o.number[i] = dim;
    }
    return tfm__leave_view(&o, t, &g);
}

/* The cut [start, start + length * step) of one dim. */
static tfm_tensor *tfm__leave_cut(tfm__op *o, const tfm_tensor *t, int dim, int64_t start, int64_t length,
                                  int64_t step) {
    tfm__geometry g = tfm__geometry_of(t);
    g.shape[dim] = length;
    g.offset = start * t->stride[dim];
    g.stride[dim] = length > 1 ? t->stride[dim] * step : t->stride[dim];
    o->number[0] = dim;
    o->number[1] = start;
    o->number[2] = length;
    o->number[3] = step;
    return tfm__leave_view(o, t, &g);
}

/* Views of one dim need a dim. */
static int tfm__need_dims(tfm__op *o, const tfm_tensor *t) {
    if (t->ndim > 0) return 1;
    tfm__reject(o, "t is %s: a scalar has no dim", tfm__describe(o, t));
    return 0;
}

TFM_API tfm_tensor *tfm_slice(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t start, int64_t end, int64_t step) {
    tfm__op o;
    int64_t size;
    if (!tfm__enter(c, &o, TFM__OP_SLICE, 1, t)) return NULL;
    if (!tfm__need_dims(&o, t) || !tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    if (step < 1) return tfm__reject(&o, "step is %lld, expected 1 or more", (long long)step);
    size = t->shape[dim];
    start = start < 0 ? tfm__max64(0, start + size) : tfm__min64(start, size);
    end = end < 0 ? tfm__max64(0, end + size) : tfm__min64(end, size);
    return tfm__leave_cut(&o, t, dim, start, end > start ? tfm__ceil_div(end - start, step) : 0, step);
}

TFM_API tfm_tensor *tfm_narrow(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t start, int64_t length) {
    tfm__op o;
    int64_t size, first;
    if (!tfm__enter(c, &o, TFM__OP_NARROW, 1, t)) return NULL;
    if (!tfm__need_dims(&o, t) || !tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    size = t->shape[dim];
    first = start < 0 ? start + size : start;
    if (first < 0 || first > size || length < 0 || length > size - first) {
        return tfm__reject(&o, "start %lld, length %lld: not within dim %d of %s", (long long)start, (long long)length,
                           dim, tfm__describe(&o, t));
    }
    return tfm__leave_cut(&o, t, dim, first, length, 1);
}

TFM_API tfm_tensor *tfm_select(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t index) {
    tfm__op o;
    tfm__geometry g;
    int64_t at;
    if (!tfm__enter(c, &o, TFM__OP_SELECT, 1, t)) return NULL;
    if (!tfm__need_dims(&o, t) || !tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    at = index < 0 ? index + t->shape[dim] : index;
    if (at < 0 || at >= t->shape[dim]) {
        return tfm__reject(&o, "index %lld is not within dim %d of %s", (long long)index, dim, tfm__describe(&o, t));
    }
    g = tfm__geometry_of(t);
    g.offset = at * t->stride[dim];
    tfm__geometry_drop(&g, dim);
    o.number[0] = dim;
    o.number[1] = at;
    return tfm__leave_view(&o, t, &g);
}

TFM_API tfm_tensor *tfm_expand(tfm_ctx *c, const tfm_tensor *t, tfm_shape shape) {
    tfm__op o;
    tfm__geometry g;
    int64_t numel;
    int i, added;
    if (!tfm__enter(c, &o, TFM__OP_EXPAND, 1, t)) return NULL;
    if (shape.ndim < t->ndim || shape.ndim > TFM_MAX_DIMS) {
        return tfm__reject(&o, "t is %s, the shape has %d dims", tfm__describe(&o, t), shape.ndim);
    }
    added = shape.ndim - t->ndim;
    g.ndim = shape.ndim;
    g.offset = 0;
    for (i = 0; i < shape.ndim; ++i) {
        const int64_t size = i < added ? 1 : t->shape[i - added],
                      wanted = shape.dim[i] == -1 && i >= added ? size : shape.dim[i];
        if (wanted < 0 || (size != wanted && size != 1)) {
            return tfm__reject(&o, "t is %s: dim %d cannot become %lld", tfm__describe(&o, t), i,
                               (long long)shape.dim[i]);
        }
        g.shape[i] = wanted;
        g.stride[i] = i < added || size != wanted ? 0 : t->stride[i - added];
    }
    if (!tfm__shape_check(c, tfm__op_name(&o), t->dtype, g.ndim, g.shape, &numel)) return tfm__leave(&o, NULL);
    return tfm__leave_view(&o, t, &g);
}

TFM_API tfm_tensor *tfm_squeeze(tfm_ctx *c, const tfm_tensor *t, int dim) {
    tfm__op o;
    tfm__geometry g;
    if (!tfm__enter(c, &o, TFM__OP_SQUEEZE, 1, t)) return NULL;
    if (!tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    g = tfm__geometry_of(t);
    if (t->ndim && t->shape[dim] == 1) tfm__geometry_drop(&g, dim);
    o.number[0] = dim;
    return tfm__leave_view(&o, t, &g);
}

TFM_API tfm_tensor *tfm_unsqueeze(tfm_ctx *c, const tfm_tensor *t, int dim) {
    tfm__op o;
    tfm__geometry g;
    if (!tfm__enter(c, &o, TFM__OP_UNSQUEEZE, 1, t)) return NULL;
    if (t->ndim == TFM_MAX_DIMS) {
        return tfm__reject(&o, "t is %s: no more than %d dims", tfm__describe(&o, t), TFM_MAX_DIMS);
    }
    if (!tfm__need_dim(&o, "dim", &dim, t->ndim + 1)) return NULL;
    g = tfm__geometry_of(t);
    tfm__geometry_insert(&g, dim, 1, dim < t->ndim ? t->shape[dim] * t->stride[dim] : 1);
    o.number[0] = dim;
    return tfm__leave_view(&o, t, &g);
}

TFM_API tfm_tensor *tfm_split_heads(tfm_ctx *c, const tfm_tensor *t, int64_t heads) {
    tfm__op o;
    tfm__geometry g;
    int last;
    if (!tfm__enter(c, &o, TFM__OP_SPLIT_HEADS, 1, t)) return NULL;
    last = t->ndim - 1;
    if (t->ndim < 2 || t->ndim == TFM_MAX_DIMS || heads < 1 || t->shape[last] % heads) {
        return tfm__reject(&o, "t is %s, heads is %lld: expected (batch, length, heads * size)", tfm__describe(&o, t),
                           (long long)heads);
    }
    g = tfm__geometry_of(t);
    g.shape[last] /= heads;
    tfm__geometry_insert(&g, last, heads, g.shape[last] * g.stride[last]);
    tfm__geometry_swap(&g, last - 1, last); /* (B, L, H, d) -> (B, H, L, d) */
    o.number[0] = heads;
    return tfm__leave_view(&o, t, &g);
}

TFM_API tfm_tensor *tfm_combine_heads(tfm_ctx *c, const tfm_tensor *t) {
    tfm__op o;
    tfm__geometry g;
    int64_t shape[TFM_MAX_DIMS];
    int head;
    if (!tfm__enter(c, &o, TFM__OP_COMBINE_HEADS, 1, t)) return NULL;
    if (t->ndim < 3) return tfm__reject(&o, "t is %s, expected (batch, heads, length, size)", tfm__describe(&o, t));
    head = t->ndim - 3;
    g = tfm__geometry_of(t);
    tfm__geometry_swap(&g, head, head + 1); /* (B, L, H, d) */
    memcpy(shape, g.shape, sizeof(shape));
    shape[head + 1] = g.shape[head + 1] * g.shape[head + 2];
    return tfm__reshaped(&o, t, &g, t->ndim - 1, shape, 1);
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Copies. Any dtype: they move bytes, or convert.
 * ---------------------------------------------------------------------------------------------------------------- */

static tfm_tensor *tfm__leave_copy(tfm__op *o, const tfm_tensor *t, int dtype) {
    tfm_tensor *const y = tfm__result(o, dtype, t->ndim, t->shape);
    if (y && o->run) tfm__assign(o->c, y, t);
    return tfm__leave(o, y);
}

TFM_API tfm_tensor *tfm_contiguous(tfm_ctx *c, const tfm_tensor *t) {
    tfm__op o;
    if (!tfm__enter(c, &o, TFM__OP_CONTIGUOUS, 1, t)) return NULL;
    if (tfm_is_contiguous(t)) return tfm__leave(&o, tfm__result_view(&o, t, t->ndim, t->shape, t->stride, 0));
    return tfm__leave_copy(&o, t, t->dtype);
}

TFM_API tfm_tensor *tfm_clone(tfm_ctx *c, const tfm_tensor *t) {
    tfm__op o;
    if (!tfm__enter(c, &o, TFM__OP_CLONE, 1, t)) return NULL;
    return tfm__leave_copy(&o, t, t->dtype);
}

TFM_API tfm_tensor *tfm_cast(tfm_ctx *c, const tfm_tensor *t, int dtype) {
    tfm__op o;
    if (!tfm__enter(c, &o, TFM__OP_CAST, 1, t)) return NULL;
    return tfm__leave_copy(&o, t, dtype);
}

/* What tfm_copy and tfm_set may write: strided memory of the context, or of a parameter between tfm_params_write_begin
 * and _end (its generation is 2 then), that the tape does not read. */
static int tfm__need_writable(tfm__op *o, const char *name, const tfm_tensor *t) {
    int i;
    if (t->layout != TFM_STRIDED || (tfm__is_parameter(t) && t->generation != 2)) {
        tfm__reject(o, "%s is a parameter: write it between tfm_params_write_begin and tfm_params_write_end", name);
        return 0;
    }
    for (i = 0; i < t->ndim; ++i) {
        if (t->shape[i] > 1 && t->stride[i] == 0) {
            tfm__reject(o, "%s is %s: elements of dim %d share their memory", name, tfm__describe(o, t), i);
            return 0;
        }
    }
    return tfm__refuse_recorded(o, name, t);
}

TFM_API tfm_status tfm_copy(tfm_ctx *c, tfm_tensor *destination, const tfm_tensor *source) {
    tfm__op o;
    int64_t shape[TFM_MAX_DIMS];
    int ndim, fits, i;
    if (!tfm__enter(c, &o, TFM__OP_COPY, 2, destination, source)) return tfm__refused(c);
    if (!tfm__need_writable(&o, "destination", destination)) return tfm__status(c);
    if (!tfm__broadcast(&o, "destination", destination, "source", source, &ndim, shape)) return tfm__status(c);
    fits = ndim == destination->ndim;
    for (i = 0; i < ndim && fits; ++i) fits = shape[i] == destination->shape[i];
    if (!fits || (source->layout == TFM_PANELS && !tfm__same_shape(destination, source))) {
        tfm__reject(&o, "source is %s: it does not broadcast to destination, %s", tfm__describe(&o, source),
                    tfm__describe(&o, destination));
        return tfm__status(c);
    }
    if (tfm__share_memory(destination, source)) { /* they may overlap: by way of a copy */
        tfm_tensor between = *source;
        tfm__contiguous_strides(between.ndim, between.shape, between.stride);
        between.data = tfm__temporary(&o, tfm_numel(source) * tfm_dtype_size(source->dtype));
        if (between.data && o.run) {
            tfm__assign(c, &between, source);
            tfm__assign(c, destination, &between);
        }
    } else if (o.run) {
        tfm__assign(c, destination, source);
    }
    return tfm__leave_status(&o);
}

/* The dtype that all of a list have; f32 for floats that differ; -1 otherwise. */
static int tfm__common_dtype(const tfm_tensor *const *list, int count) {
    int dtype = list[0]->dtype, i;
    for (i = 1; i < count; ++i) {
        const int other = list[i]->dtype;
        if (other != dtype && (!tfm__is_float(other) || !tfm__is_float(dtype))) return -1;
        dtype = tfm__promote(dtype, other);
    }
    return dtype;
}

/* cat: pieces lie one after the other along dim; stack: each is one index of a new dim. */
static tfm_tensor *tfm__join(tfm_ctx *c, int op, const tfm_tensor *const *list, int count, int dim) {
    const int stack = op == TFM__OP_STACK;
    tfm__op o;
    tfm__geometry g;
    tfm_tensor *y;
    int64_t start = 0;
    int dtype, i, d;
    if (!tfm__enter(c, &o, op, 0)) return NULL;
    if (!list || count < 1) return tfm__reject(&o, "the list is empty");
    if (!tfm__inputs(&o, list, count)) return tfm__leave(&o, NULL);
    if (stack ? list[0]->ndim == TFM_MAX_DIMS : list[0]->ndim == 0) {
        return tfm__reject(&o, "tensor 1 is %s: cannot be joined in this way", tfm__describe(&o, list[0]));
    }
    if (!tfm__need_dim(&o, "dim", &dim, list[0]->ndim + stack)) return NULL;
    dtype = tfm__common_dtype(list, count);
    if (dtype < 0) return tfm__reject(&o, "the dtypes of the list differ: tfm_cast makes them equal");
    g = tfm__geometry_of(list[0]);
    for (i = 1; i < count; ++i) {
        int same = list[i]->ndim == list[0]->ndim;
        for (d = 0; d < list[0]->ndim && same; ++d) {
            same = list[i]->shape[d] == list[0]->shape[d] || (!stack && d == dim);
        }
        if (!same || (!stack && !tfm__add(g.shape[dim], list[i]->shape[dim], &g.shape[dim]))) {
            return tfm__reject(&o, "tensor 1 is %s, tensor %d is %s: sizes differ", tfm__describe(&o, list[0]), i + 1,
                               tfm__describe(&o, list[i]));
        }
    }
    if (stack) tfm__geometry_insert(&g, dim, count, 0);
    o.number[0] = dim;
    y = tfm__result(&o, dtype, g.ndim, g.shape);
    for (i = 0; y && o.run && i < count; ++i) {
        const int64_t length = stack ? 1 : list[i]->shape[dim];
        tfm_tensor part = tfm__part(y, dim, start, length), piece = *list[i];
        if (stack) {
            g = tfm__geometry_of(&piece);
            tfm__geometry_insert(&g, dim, 1, 0);
            piece.ndim = g.ndim;
            memcpy(piece.shape, g.shape, sizeof(g.shape));
            memcpy(piece.stride, g.stride, sizeof(g.stride));
        }
        tfm__assign(c, &part, &piece);
        start += length;
    }
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_cat(tfm_ctx *c, const tfm_tensor *const *list, int count, int dim) {
    return tfm__join(c, TFM__OP_CAT, list, count, dim);
}

TFM_API tfm_tensor *tfm_stack(tfm_ctx *c, const tfm_tensor *const *list, int count, int dim) {
    return tfm__join(c, TFM__OP_STACK, list, count, dim);
}

TFM_API tfm_tensor *tfm_pad(tfm_ctx *c, const tfm_tensor *t, int dim, int64_t before, int64_t after, double value) {
    tfm__op o;
    tfm_tensor *y, part;
    int64_t shape[TFM_MAX_DIMS], more;
    if (!tfm__enter(c, &o, TFM__OP_PAD, 1, t)) return NULL;
    if (!tfm__need_dims(&o, t) || !tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    memcpy(shape, t->shape, sizeof(shape));
    if (before < 0 || after < 0 || !tfm__add(before, after, &more) || !tfm__add(shape[dim], more, &shape[dim])) {
        return tfm__reject(&o, "before is %lld, after is %lld: expected 0 or more", (long long)before,
                           (long long)after);
    }
    o.number[0] = dim;
    o.number[1] = before;
    o.number[2] = after;
    y = tfm__result(&o, t->dtype, t->ndim, shape);
    if (y && o.run) {
        part = tfm__part(y, dim, 0, before);
        tfm__fill(c, &part, value);
        part = tfm__part(y, dim, before, t->shape[dim]);
        tfm__assign(c, &part, t);
        part = tfm__part(y, dim, before + t->shape[dim], after);
        tfm__fill(c, &part, value);
    }
    return tfm__leave(&o, y);
}

/* -- by index ------------------------------------------------------------------------------------------------------ */

/* dst[..., i, ...] = src[..., id, ...]: operands dst, src (its stride of the indexed dim taken out) and the ids. */
typedef struct tfm__gathering {
    tfm__walk w;
    tfm__runs r;
    char *dst;
    const char *src;
    const void *ids;
    int id_dtype;
    int64_t size, hop;   /* bytes of an element; elements between ids of src */
} tfm__gathering;

static void tfm__gather_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__gathering *const g = (const tfm__gathering *)arg;
    tfm__cursor at;
    int64_t item, i;
    (void)slot;
    tfm__cursor_at(&g->w, begin / g->r.per_row, &at);
    for (item = begin; item < end; ++item) {
        const int64_t from = item % g->r.per_row * g->r.length, m = tfm__min64(g->r.length, g->w.n - from);
        char *const dst = g->dst + (at.offset[0] + from * g->w.step[0]) * g->size;
        const char *const src = g->src + (at.offset[1] + from * g->w.step[1]) * g->size;
        if (g->w.step[2] == 0) { /* one id for the row */
            const int64_t id = tfm__id_at(g->id_dtype, g->ids, at.offset[2]);
            tfm__move(dst, g->w.step[0], src + id * g->hop * g->size, g->w.step[1], m, g->size);
        } else {
            for (i = 0; i < m; ++i) {
                const int64_t id = tfm__id_at(g->id_dtype, g->ids, at.offset[2] + (from + i) * g->w.step[2]);
                memcpy(dst + i * g->w.step[0] * g->size, src + (i * g->w.step[1] + id * g->hop) * g->size,
                       (size_t)g->size);
            }
        }
        if (from + m == g->w.n) tfm__cursor_next(&g->w, &at);
    }
}

/* y has the shape of ids (broadcast to it) and lies contiguous. */
static void tfm__gather_run(tfm_ctx *c, const tfm_tensor *y, const tfm_tensor *t, int dim, const tfm_tensor *ids) {
    tfm__gathering g;
    tfm_tensor src = *t;
    if (tfm_numel(y) == 0) return;
    g.dst = (char *)y->data;
    g.src = (const char *)t->data;
    g.ids = ids->data;
    g.id_dtype = ids->dtype;
    g.size = tfm_dtype_size(t->dtype);
    g.hop = t->ndim ? t->stride[dim] : 1;
    if (t->ndim) src.stride[dim] = 0;
    memcpy(src.shape, y->shape, sizeof(src.shape)); /* gather may use less of a dim than there is */
    tfm__walk_init(&g.w, y->ndim, y->shape, 3);
    tfm__walk_operand(&g.w, 0, y);
    tfm__walk_operand(&g.w, 1, &src);
    tfm__walk_operand(&g.w, 2, ids);
    tfm__walk_merge(&g.w);
    tfm__walk_rows(&g.w);
    if (g.w.n == 1) g.w.step[2] = 0;
    g.r = tfm__runs_of(g.w.rows, g.w.n);
    tfm__for(c, g.r.items, g.r.grain, 8.0 * (double)tfm_numel(y), tfm__gather_task, &g);
}

TFM_API tfm_tensor *tfm_gather(tfm_ctx *c, const tfm_tensor *t, int dim, const tfm_tensor *index) {
    tfm__op o;
    tfm_tensor *y;
    int i;
    if (!tfm__enter(c, &o, TFM__OP_GATHER, 2, t, index)) return NULL;
    if (!tfm__need_index(&o, "index", index) || !tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    for (i = 0; index->ndim != t->ndim || i < t->ndim; ++i) {
        if (index->ndim != t->ndim || (i != dim && index->shape[i] > t->shape[i])) {
            return tfm__reject(&o, "t is %s, index is %s: expected as many dims, none but dim %d longer",
                               tfm__describe(&o, t), tfm__describe(&o, index), dim);
        }
    }
    if (!tfm__check_ids(&o, "index", index, t->ndim ? t->shape[dim] : 1)) return NULL;
    o.number[0] = dim;
    y = tfm__result(&o, t->dtype, index->ndim, index->shape);
    if (y && o.run) tfm__gather_run(c, y, t, dim, index);
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_index_select(tfm_ctx *c, const tfm_tensor *t, int dim, const tfm_tensor *index) {
    tfm__op o;
    tfm_tensor *y, ids;
    int64_t shape[TFM_MAX_DIMS];
    int i;
    if (!tfm__enter(c, &o, TFM__OP_INDEX_SELECT, 2, t, index)) return NULL;
    if (!tfm__need_index(&o, "index", index) || !tfm__need_dims(&o, t) || !tfm__need_dim(&o, "dim", &dim, t->ndim)) {
        return NULL;
    }
    if (index->ndim != 1) return tfm__reject(&o, "index is %s, expected one dim", tfm__describe(&o, index));
    if (!tfm__check_ids(&o, "index", index, t->shape[dim])) return NULL;
    memcpy(shape, t->shape, sizeof(shape));
    shape[dim] = index->shape[0];
    o.number[0] = dim;
    y = tfm__result(&o, t->dtype, t->ndim, shape);
    if (y && o.run) {
        ids = *index; /* the ids, standing along dim and repeated along the others */
        ids.ndim = t->ndim;
        for (i = 0; i < t->ndim; ++i) {
            ids.shape[i] = i == dim ? index->shape[0] : 1;
            ids.stride[i] = i == dim ? index->stride[0] : 0;
        }
        tfm__gather_run(c, y, t, dim, &ids);
    }
    return tfm__leave(&o, y);
}

/* -- triangles and choices ----------------------------------------------------------------------------------------- */

typedef struct tfm__triangle {
    tfm__walk w;         /* rows of the result and of t, over all dims but the last */
    int64_t rows, columns, diagonal, step, size;
    int upper;
    char *dst;
    const char *src;
} tfm__triangle;

static void tfm__triangle_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__triangle *const t = (const tfm__triangle *)arg;
    tfm__cursor at;
    int64_t row;
    (void)slot;
    tfm__cursor_at(&t->w, begin, &at);
    for (row = begin; row < end; ++row) {
        const int64_t cut = row % t->rows + t->diagonal + (t->upper ? 0 : 1); /* the first column of the upper part */
        const int64_t split = cut < 0 ? 0 : tfm__min64(cut, t->columns);
        const int64_t first = t->upper ? split : 0, last = t->upper ? t->columns : split;
        char *const dst = t->dst + row * t->columns * t->size;
        memset(dst, 0, (size_t)(t->columns * t->size));
        tfm__move(dst + first * t->size, 1, t->src + (at.offset[0] + first * t->step) * t->size, t->step, last - first,
                  t->size);
        tfm__cursor_next(&t->w, &at);
    }
}

static tfm_tensor *tfm__triangle_op(tfm_ctx *c, int op, const tfm_tensor *t, int64_t diagonal, int upper) {
    tfm__op o;
    tfm_tensor *y;
    tfm__triangle a;
    if (!tfm__enter(c, &o, op, 1, t)) return NULL;
    if (t->ndim < 2) return tfm__reject(&o, "t is %s, expected 2 dims or more", tfm__describe(&o, t));
    o.number[0] = diagonal;
    y = tfm__result(&o, t->dtype, t->ndim, t->shape);
    if (y && o.run && tfm_numel(y)) {
        a.rows = t->shape[t->ndim - 2];
        a.columns = t->shape[t->ndim - 1];
        a.step = t->stride[t->ndim - 1];
        a.diagonal = diagonal < 0 ? tfm__max64(diagonal, -a.rows - 1) : tfm__min64(diagonal, a.columns + 1);
        a.size = tfm_dtype_size(t->dtype);
        a.upper = upper;
        a.dst = (char *)y->data;
        a.src = (const char *)t->data;
        tfm__walk_init(&a.w, t->ndim, t->shape, 1);
        tfm__walk_operand(&a.w, 0, t);
        a.w.ndim -= 1;
        tfm__for(c, tfm_numel(y) / a.columns, tfm__max64(1, TFM__RUN / a.columns), 4.0 * (double)tfm_numel(y),
                 tfm__triangle_task, &a);
    }
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_tril(tfm_ctx *c, const tfm_tensor *t, int64_t diagonal) {
    return tfm__triangle_op(c, TFM__OP_TRIL, t, diagonal, 0);
}

TFM_API tfm_tensor *tfm_triu(tfm_ctx *c, const tfm_tensor *t, int64_t diagonal) {
    return tfm__triangle_op(c, TFM__OP_TRIU, t, diagonal, 1);
}

/* dst = condition ? a : b; operands of the walk in this order. */
typedef struct tfm__choice {
    const struct tfm__kernels *k;
    tfm__walk w;
    tfm__runs r;
    int dtype, dtypes[2];
    char *dst;
    const uint8_t *condition;
    const void *src[2];
} tfm__choice;

#define TFM__CHOICE_LOOP(type) \
    { \
        type *const d = (type *)(void *)dst; \
        const type *const s = (const type *)a, *const t = (const type *)b; \
        for (int64_t i = 0; i < n; ++i) d[i] = condition[i * step] ? s[i * a_step] : t[i * b_step]; \
        break; \
    }

static void tfm__choose(char *dst, const uint8_t *condition, int64_t step, const void *a, int64_t a_step, const void *b,
                        int64_t b_step, int64_t n, int64_t size) {
    switch (size) {
    case 1: TFM__CHOICE_LOOP(uint8_t)
    case 2: TFM__CHOICE_LOOP(uint16_t)
    case 4: TFM__CHOICE_LOOP(uint32_t)
    default: TFM__CHOICE_LOOP(uint64_t)
    }
}

static void tfm__choose_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__choice *const h = (const tfm__choice *)arg;
    const int64_t size = tfm_dtype_size(h->dtype);
    float tiles[2][TFM__PIECE]; /* operands of other dtypes: then the result is f32 */
    tfm__cursor at;
    int64_t item, done;
    int i;
    (void)slot;
    tfm__cursor_at(&h->w, begin / h->r.per_row, &at);
    for (item = begin; item < end; ++item) {
        const int64_t from = item % h->r.per_row * h->r.length, m = tfm__min64(h->r.length, h->w.n - from);
        for (done = 0; done < m; done += TFM__PIECE) {
            const int64_t x = from + done, n = tfm__min64(m - done, TFM__PIECE);
            const void *src[2];
            int64_t step[2];
            for (i = 0; i < 2; ++i) {
                src[i] = tfm__byte(h->src[i], h->dtypes[i], at.offset[2 + i] + x * h->w.step[2 + i]);
                step[i] = h->w.step[2 + i];
                if (h->dtypes[i] != h->dtype) {
                    h->k->load(tiles[i], src[i], h->dtypes[i], step[i], n);
                    src[i] = tiles[i];
                    step[i] = 1;
                }
            }
            tfm__choose(h->dst + (at.offset[0] + x) * size, h->condition + at.offset[1] + x * h->w.step[1],
                        h->w.step[1], src[0], step[0], src[1], step[1], n, size);
        }
        if (from + m == h->w.n) tfm__cursor_next(&h->w, &at);
    }
}

static void tfm__choose_run(tfm_ctx *c, const tfm_tensor *y, const tfm_tensor *condition, const tfm_tensor *a,
                            const tfm_tensor *b) {
    tfm__choice h;
    if (tfm_numel(y) == 0) return;
    h.k = c->k;
    h.dtype = y->dtype;
    h.dst = (char *)y->data;
    h.condition = (const uint8_t *)condition->data;
    h.src[0] = a->data;
    h.src[1] = b->data;
    h.dtypes[0] = a->dtype;
    h.dtypes[1] = b->dtype;
    tfm__walk_init(&h.w, y->ndim, y->shape, 4);
    tfm__walk_operand(&h.w, 0, y);
    tfm__walk_operand(&h.w, 1, condition);
    tfm__walk_operand(&h.w, 2, a);
    tfm__walk_operand(&h.w, 3, b);
    tfm__walk_merge(&h.w);
    tfm__walk_rows(&h.w);
    h.r = tfm__runs_of(h.w.rows, h.w.n);
    tfm__for(c, h.r.items, h.r.grain, 8.0 * (double)tfm_numel(y), tfm__choose_task, &h);
}

static int tfm__need_bool(tfm__op *o, const char *name, const tfm_tensor *t) {
    if (t->dtype == TFM_BOOL) return 1;
    tfm__reject(o, "%s is %s, expected bool (tfm_compare_scalar makes one)", name, tfm__describe(o, t));
    return 0;
}

TFM_API tfm_tensor *tfm_masked_fill(tfm_ctx *c, const tfm_tensor *t, const tfm_tensor *mask, double value) {
    tfm__op o;
    tfm_tensor *y, one;
    int64_t shape[TFM_MAX_DIMS];
    uint64_t element[1];
    int ndim;
    if (!tfm__enter(c, &o, TFM__OP_MASKED_FILL, 2, t, mask)) return NULL;
    if (!tfm__need_bool(&o, "mask", mask) || !tfm__broadcast(&o, "t", t, "mask", mask, &ndim, shape)) return NULL;
    o.attr[0] = value;
    y = tfm__result(&o, t->dtype, ndim, shape);
    if (y && o.run) {
        memset(&one, 0, sizeof(one));
        one.dtype = t->dtype;
        one.data = element;
        tfm__store_at(t->dtype, element, 0, value);
        tfm__choose_run(c, y, mask, &one, t);
    }
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_where(tfm_ctx *c, const tfm_tensor *condition, const tfm_tensor *a, const tfm_tensor *b) {
    tfm__op o;
    tfm_tensor *y, both;
    const tfm_tensor *list[2];
    int64_t shape[TFM_MAX_DIMS];
    int dtype, ndim;
    if (!tfm__enter(c, &o, TFM__OP_WHERE, 3, condition, a, b)) return NULL;
    if (!tfm__need_bool(&o, "condition", condition)) return NULL;
    list[0] = a;
    list[1] = b;
    dtype = tfm__common_dtype(list, 2);
    if (dtype < 0) {
        return tfm__reject(&o, "a is %s, b is %s: expected one dtype, or two of f32, f16, bf16", tfm__describe(&o, a),
                           tfm__describe(&o, b));
    }
    memset(&both, 0, sizeof(both));
    both.dtype = dtype;
    if (!tfm__broadcast(&o, "a", a, "b", b, &both.ndim, both.shape)) return NULL;
    if (!tfm__broadcast(&o, "condition", condition, "a with b", &both, &ndim, shape)) return NULL;
    y = tfm__result(&o, dtype, ndim, shape);
    if (y && o.run) tfm__choose_run(c, y, condition, a, b);
    return tfm__leave(&o, y);
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Elements and text
 * ---------------------------------------------------------------------------------------------------------------- */

TFM_API tfm_status tfm_set(tfm_ctx *c, tfm_tensor *t, const int64_t *index, double value) {
    tfm__op o;
    void *base;
    int64_t offset;
    int i;
    if (!tfm__enter(c, &o, TFM__OP_SET, 1, t)) return tfm__refused(c);
    if (!tfm__need_writable(&o, "t", t)) return tfm__status(c);
    if (t->ndim && !index) {
        tfm__reject(&o, "index is NULL, t is %s", tfm__describe(&o, t));
        return tfm__status(c);
    }
    for (i = 0; i < t->ndim; ++i) {
        if (index[i] < -t->shape[i] || index[i] >= t->shape[i]) {
            tfm__reject(&o, "index %s is not within t, %s", tfm__describe_shape(&o, t->ndim, index),
                        tfm__describe(&o, t));
            return tfm__status(c);
        }
    }
    if (tfm__locate(t, index, &base, &offset)) tfm__store_at(t->dtype, base, offset, value);
    return tfm__leave_status(&o);
}

TFM_API tfm_status tfm_read(tfm_ctx *c, const tfm_tensor *t, float *out, int64_t count) {
    tfm__op o;
    tfm_tensor to;
    if (!tfm__enter(c, &o, TFM__OP_READ, 1, t)) return tfm__refused(c);
    if (count != tfm_numel(t) || (count && !out)) {
        tfm__reject(&o, "t is %s: expected room for %lld elements, got %lld%s", tfm__describe(&o, t),
                    (long long)tfm_numel(t), (long long)count, out ? "" : " at NULL");
        return tfm__status(c);
    }
    if (o.run && count) {
        to = *t;
        to.dtype = TFM_F32;
        to.layout = TFM_STRIDED;
        to.data = out;
        tfm__contiguous_strides(to.ndim, to.shape, to.stride);
        tfm__assign(c, &to, t);
    } else if (count) {
        memset(out, 0, sizeof(float) * (size_t)count); /* a dry run: nothing to read, but something to go on with */
    }
    return tfm__leave_status(&o);
}

/* NULL after setting the error. */
static const char *tfm__format_tensor(tfm__op *o, const tfm_tensor *t) {
    tfm__text text;
    tfm_tensor plain = *t;
    memset(&text, 0, sizeof(text));
    text.c = o->c;
    if (t->layout == TFM_PANELS && o->run) {
        plain.layout = TFM_STRIDED;
        plain.data = tfm__arena_alloc(o->c, tfm_numel(t) * tfm_dtype_size(t->dtype));
        if (!plain.data) return NULL;
        tfm__contiguous_strides(plain.ndim, plain.shape, plain.stride);
        tfm__assign(o->c, &plain, t);
    }
    if (!o->run) plain.data = NULL;
    tfm__print_tensor(&text, &plain);
    return tfm__failed(o->c) ? NULL : text.s;
}

TFM_API const char *tfm_format(tfm_ctx *c, const tfm_tensor *t) {
    tfm__op o;
    const char *s;
    if (!tfm__enter(c, &o, TFM__OP_FORMAT, 1, t)) return NULL;
    s = tfm__format_tensor(&o, t);
    (void)tfm__leave(&o, NULL);
    return tfm__failed(c) ? NULL : s;
}

#if !defined(TFM_NO_STDIO)
TFM_API tfm_status tfm_print(tfm_ctx *c, FILE *file, const tfm_tensor *t) {
    tfm__op o;
    tfm_marker mark;
    const char *s;
    if (!tfm__enter(c, &o, TFM__OP_PRINT, 1, t)) return tfm__refused(c);
    if (!file) {
        tfm__reject(&o, "file is NULL");
        return tfm__status(c);
    }
    mark = tfm__mark(c);
    s = tfm__format_tensor(&o, t);
    if (s && o.run && (fwrite(s, 1, strlen(s), file) != strlen(s) || fwrite("\n", 1, 1, file) != 1)) {
        tfm__fail(c, TFM_IO, "tfm_print: the file cannot be written");
    }
    (void)tfm__rewind(c, mark); /* the text */
    return tfm__leave_status(&o);
}
#endif

/* ------------------------------------------------------------------------------------------------------------------
 *  Elementwise
 * ---------------------------------------------------------------------------------------------------------------- */

/* y = fn(a, b), element by element over broadcast operands. Tiles that are not f32 in a row go through the stack. */
typedef struct tfm__map {
    const struct tfm__kernels *k;
    void (*fn)(const struct tfm__map *m, float *y, const float *a, int a_step, const float *b, int b_step, int64_t n);
    int op, repeats;             /* kernel's op; 1: fn takes a step of 0 */
    float p0, p1;
    tfm__walk w;                 /* y, a, b */
    tfm__runs r;
    int inputs;
    char *dst;
    int dst_dtype;
    const void *src[2];
    int src_dtype[2];
} tfm__map;

static void tfm__map_unary(const tfm__map *m, float *y, const float *a, int a_step, const float *b, int b_step,
                           int64_t n) {
    (void)a_step;
    (void)b;
    (void)b_step;
    m->k->unary(m->op, y, a, m->p0, m->p1, n);
}

static void tfm__map_binary(const tfm__map *m, float *y, const float *a, int a_step, const float *b, int b_step,
                            int64_t n) {
    m->k->binary(m->op, y, a, a_step, b, b_step, n);
}

static void tfm__map_glu(const tfm__map *m, float *y, const float *a, int a_step, const float *b, int b_step,
                         int64_t n) {
    (void)a_step;
    (void)b_step;
    m->k->glu(m->op, y, a, b, n);
}

static int tfm__map_direct(const tfm__map *m, int i) {
    return m->src_dtype[i] == TFM_F32 && (m->w.step[1 + i] == 1 || (m->w.step[1 + i] == 0 && m->repeats));
}

static void tfm__map_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__map *const m = (const tfm__map *)arg;
    const int64_t size = tfm_dtype_size(m->dst_dtype);
    const int direct_y = m->dst_dtype == TFM_F32;
    float tiles[3][TFM__PIECE];
    int64_t piece = TFM__RUN, item, done;
    tfm__cursor at;
    int i;
    (void)slot;
    if (!direct_y) piece = TFM__PIECE;
    for (i = 0; i < m->inputs; ++i) {
        if (!tfm__map_direct(m, i)) piece = TFM__PIECE;
    }
    tfm__cursor_at(&m->w, begin / m->r.per_row, &at);
    for (item = begin; item < end; ++item) {
        const int64_t from = item % m->r.per_row * m->r.length, length = tfm__min64(m->r.length, m->w.n - from);
        for (done = 0; done < length; done += piece) {
            const int64_t x = from + done, n = tfm__min64(length - done, piece);
            char *const dst = m->dst + (at.offset[0] + x) * size;
            const float *src[2] = {NULL, NULL};
            int step[2] = {1, 1};
            for (i = 0; i < m->inputs; ++i) {
                const int64_t s = m->w.step[1 + i];
                src[i] = (const float *)tfm__byte(m->src[i], m->src_dtype[i], at.offset[1 + i] + x * s);
                if (tfm__map_direct(m, i)) {
                    step[i] = (int)s;
                } else {
                    m->k->load(tiles[i], src[i], m->src_dtype[i], s, n);
                    src[i] = tiles[i];
                }
            }
            m->fn(m, direct_y ? (float *)dst : tiles[2], src[0], step[0], src[1], step[1], n);
            if (!direct_y) m->k->store(dst, m->dst_dtype, 1, tiles[2], n);
        }
        if (from + length == m->w.n) tfm__cursor_next(&m->w, &at);
    }
}

/* y is contiguous and has the broadcast shape of a and b (NULL for one input). cost: FLOPs per element. */
static void tfm__map_run(tfm__op *o, tfm__map *m, const tfm_tensor *y, const tfm_tensor *a, const tfm_tensor *b,
                         double cost) {
    const tfm_tensor *list[2];
    int i;
    if (tfm_numel(y) == 0) return;
    list[0] = a;
    list[1] = b;
    m->k = o->k;
    m->inputs = b ? 2 : 1;
    m->dst = (char *)y->data;
    m->dst_dtype = y->dtype;
    tfm__walk_init(&m->w, y->ndim, y->shape, 1 + m->inputs);
    tfm__walk_operand(&m->w, 0, y);
    for (i = 0; i < m->inputs; ++i) {
        m->src[i] = list[i]->data;
        m->src_dtype[i] = list[i]->dtype;
        tfm__walk_operand(&m->w, 1 + i, list[i]);
    }
    tfm__walk_merge(&m->w);
    tfm__walk_rows(&m->w);
    m->r = tfm__runs_of(m->w.rows, m->w.n);
    tfm__for(o->c, m->r.items, m->r.grain, cost * (double)tfm_numel(y), tfm__map_task, m);
}

#define TFM__COST_SIMPLE 4.0 /* about what a load and a store take */
#define TFM__COST_CURVE 24.0 /* exp, log, tanh, ...: a polynomial of about ten steps and its scaling */

static tfm_tensor *tfm__unary_op(tfm_ctx *c, int op, int kernel, const tfm_tensor *t, float p0, float p1) {
    tfm__op o;
    tfm__map m;
    tfm_tensor *y;
    const double cost =
        kernel <= TFM__U_RECIP || kernel == TFM__U_RELU || kernel == TFM__U_CLAMP ? TFM__COST_SIMPLE : TFM__COST_CURVE;
    if (!tfm__enter(c, &o, op, 1, t)) return NULL;
    if (!tfm__need_float(&o, "t", t)) return NULL;
    o.attr[0] = (double)p0;
    o.attr[1] = (double)p1;
    y = tfm__result(&o, t->dtype, t->ndim, t->shape);
    if (y && o.run) {
        m.fn = tfm__map_unary;
        m.op = kernel;
        m.repeats = 0;
        m.p0 = p0;
        m.p1 = p1;
        tfm__map_run(&o, &m, y, t, NULL, cost);
    }
    return tfm__leave(&o, y);
}

#define TFM__UNARY_OPS(X) \
    X(neg, NEG) X(abs, ABS) X(exp, EXP) X(log, LOG) X(sqrt, SQRT) X(rsqrt, RSQRT) X(sin, SIN) X(cos, COS) \
    X(tanh, TANH) X(sigmoid, SIGMOID) X(relu, RELU) X(gelu, GELU) X(gelu_tanh, GELU_TANH) \
    X(gelu_quick, GELU_QUICK) X(silu, SILU)
#define TFM__UNARY_OP(name, id) \
    TFM_API tfm_tensor *tfm_##name(tfm_ctx *c, const tfm_tensor *t) { \
        return tfm__unary_op(c, TFM__OP_##id, TFM__U_##id, t, 0.0f, 0.0f); \
    }
TFM__UNARY_OPS(TFM__UNARY_OP)

TFM_API tfm_tensor *tfm_scale(tfm_ctx *c, const tfm_tensor *t, float factor) {
    return tfm__unary_op(c, TFM__OP_SCALE, TFM__U_SCALE, t, factor, 0.0f);
}

TFM_API tfm_tensor *tfm_shift(tfm_ctx *c, const tfm_tensor *t, float summand) {
    return tfm__unary_op(c, TFM__OP_SHIFT, TFM__U_SHIFT, t, summand, 0.0f);
}

TFM_API tfm_tensor *tfm_pow(tfm_ctx *c, const tfm_tensor *t, float exponent) {
    return tfm__unary_op(c, TFM__OP_POW, TFM__U_POW, t, exponent, 0.0f);
}

TFM_API tfm_tensor *tfm_clamp(tfm_ctx *c, const tfm_tensor *t, float low, float high) {
    return tfm__unary_op(c, TFM__OP_CLAMP, TFM__U_CLAMP, t, low, high);
}

/* By TFM_ACT_*: the op that is recorded, the kernel that runs. */
static const struct tfm__activation_row {
    int op, kernel;
} tfm__activations[TFM_ACT_COUNT] = {
    {TFM__OP_ACTIVATION, TFM__U_COPY}, {TFM__OP_RELU, TFM__U_RELU}, {TFM__OP_GELU, TFM__U_GELU},
    {TFM__OP_GELU_TANH, TFM__U_GELU_TANH}, {TFM__OP_GELU_QUICK, TFM__U_GELU_QUICK}, {TFM__OP_SILU, TFM__U_SILU},
    {TFM__OP_SIGMOID, TFM__U_SIGMOID}, {TFM__OP_TANH, TFM__U_TANH}
};

static int tfm__need_activation(tfm__op *o, int activation) {
    if (activation >= 0 && activation < TFM_ACT_COUNT) return 1;
    tfm__reject(o, "activation is %d, expected TFM_ACT_NONE (0) to %d", activation, TFM_ACT_COUNT - 1);
    return 0;
}

TFM_API tfm_tensor *tfm_activation(tfm_ctx *c, const tfm_tensor *t, int activation) {
    tfm__op o;
    if (activation >= 0 && activation < TFM_ACT_COUNT) {
        return tfm__unary_op(c, tfm__activations[activation].op, tfm__activations[activation].kernel, t, 0.0f, 0.0f);
    }
    if (!tfm__enter(c, &o, TFM__OP_ACTIVATION, 1, t)) return NULL;
    (void)tfm__need_activation(&o, activation);
    return NULL;
}

/* Two float tensors, broadcast. */
static tfm_tensor *tfm__pair_op(tfm_ctx *c, int op, const char *name_a, const tfm_tensor *a, const char *name_b,
                                const tfm_tensor *b,
                                void (*fn)(const tfm__map *, float *, const float *, int, const float *, int, int64_t),
                                int kernel, double cost) {
    tfm__op o;
    tfm__map m;
    tfm_tensor *y;
    int64_t shape[TFM_MAX_DIMS];
    int ndim;
    if (!tfm__enter(c, &o, op, 2, a, b)) return NULL;
    if (fn == tfm__map_glu && !tfm__need_activation(&o, kernel)) return NULL;
    if (!tfm__need_float(&o, name_a, a) || !tfm__need_float(&o, name_b, b)) return NULL;
    if (!tfm__broadcast(&o, name_a, a, name_b, b, &ndim, shape)) return NULL;
    o.number[0] = kernel;
    y = tfm__result(&o, tfm__promote(a->dtype, b->dtype), ndim, shape);
    if (y && o.run) {
        m.fn = fn;
        m.op = kernel;
        m.repeats = fn == tfm__map_binary;
        m.p0 = m.p1 = 0.0f;
        tfm__map_run(&o, &m, y, a, b, cost);
    }
    return tfm__leave(&o, y);
}

#define TFM__BINARY_OPS(X) \
    X(add, ADD, ADD) X(sub, SUB, SUB) X(mul, MUL, MUL) X(div, DIV, DIV) X(minimum, MINIMUM, MIN) \
    X(maximum, MAXIMUM, MAX)
#define TFM__BINARY_OP(name, id, kernel) \
    TFM_API tfm_tensor *tfm_##name(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b) { \
        return tfm__pair_op(c, TFM__OP_##id, "a", a, "b", b, tfm__map_binary, TFM__B_##kernel, TFM__COST_SIMPLE); \
    }
TFM__BINARY_OPS(TFM__BINARY_OP)

TFM_API tfm_tensor *tfm_glu(tfm_ctx *c, const tfm_tensor *gate, const tfm_tensor *up, int activation) {
    return tfm__pair_op(c, TFM__OP_GLU, "gate", gate, "up", up, tfm__map_glu, activation, TFM__COST_CURVE);
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Comparisons: exact for every pair of dtypes
 * ---------------------------------------------------------------------------------------------------------------- */

enum { TFM__LESS, TFM__EQUAL, TFM__GREATER, TFM__UNORDERED };

/* [relation][how a stands to b] */
static const uint8_t tfm__relations[6][4] = {
    {0, 1, 0, 0}, {1, 0, 1, 1}, {1, 0, 0, 0}, {1, 1, 0, 0}, {0, 0, 1, 0}, {0, 1, 1, 0}
};

static int tfm__order_double(double a, double b) {
    return a < b ? TFM__LESS : a > b ? TFM__GREATER : a == b ? TFM__EQUAL : TFM__UNORDERED;
}

/* Above 2^53 an i64 is not a double. */
static int tfm__order_mixed(int64_t a, double b) {
    int64_t whole;
    if (b != b) return TFM__UNORDERED;
    if (b >= 9223372036854775808.0) return TFM__LESS;
    if (b < -9223372036854775808.0) return TFM__GREATER;
    whole = (int64_t)b;
    if (a != whole) return a < whole ? TFM__LESS : TFM__GREATER;
    return tfm__order_double((double)whole, b);
}

static int tfm__order_at(int dtype_a, const void *a, int64_t i, int dtype_b, const void *b, int64_t j) {
    int order;
    if (dtype_a == TFM_I64 && dtype_b == TFM_I64) {
        const int64_t x = tfm__id_at(dtype_a, a, i), y = tfm__id_at(dtype_b, b, j);
        return x < y ? TFM__LESS : x > y ? TFM__GREATER : TFM__EQUAL;
    }
    if (dtype_a == TFM_I64) return tfm__order_mixed(tfm__id_at(dtype_a, a, i), tfm__value_at(dtype_b, b, j));
    if (dtype_b == TFM_I64) {
        order = tfm__order_mixed(tfm__id_at(dtype_b, b, j), tfm__value_at(dtype_a, a, i));
        return order == TFM__UNORDERED ? order : TFM__GREATER - order;
    }
    return tfm__order_double(tfm__value_at(dtype_a, a, i), tfm__value_at(dtype_b, b, j));
}

typedef struct tfm__comparison {
    const struct tfm__kernels *k;
    tfm__walk w;                 /* y, a, b */
    tfm__runs r;
    int relation, floats;        /* floats: both fit f32 exactly */
    uint8_t *dst;
    const void *src[2];
    int dtype[2];
} tfm__comparison;

static void tfm__compare_floats(uint8_t *y, const float *a, const float *b, int relation, int64_t n) {
    int64_t i;
    switch (relation) {
    case TFM_EQ: for (i = 0; i < n; ++i) y[i] = a[i] == b[i]; break;
    case TFM_NE: for (i = 0; i < n; ++i) y[i] = a[i] != b[i]; break;
    case TFM_LT: for (i = 0; i < n; ++i) y[i] = a[i] < b[i]; break;
    case TFM_LE: for (i = 0; i < n; ++i) y[i] = a[i] <= b[i]; break;
    case TFM_GT: for (i = 0; i < n; ++i) y[i] = a[i] > b[i]; break;
    default: for (i = 0; i < n; ++i) y[i] = a[i] >= b[i]; break;
    }
}

static void tfm__compare_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__comparison *const m = (const tfm__comparison *)arg;
    float tiles[2][TFM__PIECE];
    tfm__cursor at;
    int64_t item, done, j;
    int i;
    (void)slot;
    tfm__cursor_at(&m->w, begin / m->r.per_row, &at);
    for (item = begin; item < end; ++item) {
        const int64_t from = item % m->r.per_row * m->r.length, length = tfm__min64(m->r.length, m->w.n - from);
        for (done = 0; done < length; done += TFM__PIECE) {
            const int64_t x = from + done, n = tfm__min64(length - done, TFM__PIECE);
            const void *src[2];
            for (i = 0; i < 2; ++i) {
                src[i] = tfm__byte(m->src[i], m->dtype[i], at.offset[1 + i] + x * m->w.step[1 + i]);
                if (m->floats) m->k->load(tiles[i], src[i], m->dtype[i], m->w.step[1 + i], n);
            }
            if (m->floats) {
                tfm__compare_floats(m->dst + at.offset[0] + x, tiles[0], tiles[1], m->relation, n);
            } else {
                for (j = 0; j < n; ++j) {
                    const int order =
                        tfm__order_at(m->dtype[0], src[0], j * m->w.step[1], m->dtype[1], src[1], j * m->w.step[2]);
                    m->dst[at.offset[0] + x + j] = tfm__relations[m->relation][order];
                }
            }
        }
        if (from + length == m->w.n) tfm__cursor_next(&m->w, &at);
    }
}

static int tfm__fits_float(int dtype) {
    return tfm__is_float(dtype) || tfm_dtype_size(dtype) == 1;
}

/* Leaves the op. */
static tfm_tensor *tfm__compare_leave(tfm__op *o, const tfm_tensor *a, const tfm_tensor *b, int relation) {
    tfm__comparison m;
    tfm_tensor *y;
    int64_t shape[TFM_MAX_DIMS];
    int ndim;
    if (relation < TFM_EQ || relation > TFM_GE) {
        return tfm__reject(o, "relation is %d, expected TFM_EQ (0) to TFM_GE (5)", relation);
    }
    if (!tfm__broadcast(o, "a", a, "b", b, &ndim, shape)) return NULL;
    y = tfm__result(o, TFM_BOOL, ndim, shape);
    if (y && o->run && tfm_numel(y)) {
        m.k = o->k;
        m.relation = relation;
        m.floats = tfm__fits_float(a->dtype) && tfm__fits_float(b->dtype);
        m.dst = (uint8_t *)y->data;
        m.src[0] = a->data;
        m.src[1] = b->data;
        m.dtype[0] = a->dtype;
        m.dtype[1] = b->dtype;
        tfm__walk_init(&m.w, ndim, shape, 3);
        tfm__walk_operand(&m.w, 0, y);
        tfm__walk_operand(&m.w, 1, a);
        tfm__walk_operand(&m.w, 2, b);
        tfm__walk_merge(&m.w);
        tfm__walk_rows(&m.w);
        m.r = tfm__runs_of(m.w.rows, m.w.n);
        tfm__for(o->c, m.r.items, m.r.grain, 8.0 * (double)tfm_numel(y), tfm__compare_task, &m);
    }
    return tfm__leave(o, y);
}

TFM_API tfm_tensor *tfm_compare(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b, int relation) {
    tfm__op o;
    if (!tfm__enter(c, &o, TFM__OP_COMPARE, 2, a, b)) return NULL;
    return tfm__compare_leave(&o, a, b, relation);
}

/* As in PyTorch a float tensor is compared with b rounded to its dtype; an integer tensor with b itself. */
TFM_API tfm_tensor *tfm_compare_scalar(tfm_ctx *c, const tfm_tensor *a, double b, int relation) {
    tfm__op o;
    tfm_tensor one;
    uint64_t element[1];
    if (!tfm__enter(c, &o, TFM__OP_COMPARE_SCALAR, 1, a)) return NULL;
    memset(&one, 0, sizeof(one));
    one.dtype = tfm__is_float(a->dtype) ? a->dtype : TFM_F64;
    one.data = element;
    tfm__store_at(one.dtype, element, 0, b);
    return tfm__compare_leave(&o, a, &one, relation);
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Reductions
 *
 *  The order of a sum depends on shape and strides alone. Rows are added by the kernel; pieces of long rows, and the
 *  rows of a sum over other axes than the last, in double.
 * ---------------------------------------------------------------------------------------------------------------- */

enum { TFM__SUM, TFM__MEAN, TFM__MAX, TFM__MIN, TFM__LOGSUMEXP };

static const struct tfm__reduction_row {
    int op, rows, pairs;         /* recorded op; kernels: along a row, of two rows */
} tfm__reductions[5] = {
    {TFM__OP_SUM, TFM__R_SUM, TFM__B_ADD},
    {TFM__OP_MEAN, TFM__R_SUM, TFM__B_ADD},
    {TFM__OP_MAX, TFM__R_MAX, TFM__B_MAX},
    {TFM__OP_MIN, TFM__R_MIN, TFM__B_MIN},
    {TFM__OP_LOGSUMEXP, 0, 0} /* not by pairs */
};

#define TFM__REDUCE_PART ((int64_t)65536) /* elements of one output that one slot adds; more are cut into parts */
#define TFM__REDUCE_COLUMNS 128           /* outputs side by side in a reduction over other axes than the last */
#define TFM__REDUCE_FOLD 32               /* rows added in f32 before their sum goes into the double */

typedef struct tfm__reduction {
    tfm_ctx *c;
    const struct tfm__kernels *k;
    int what;
    tfm__walk kept, gone;        /* of the source; gone: rows of n elements */
    int64_t total;               /* elements behind one output */
    const void *src;
    int dtype;
    char *dst;
    int dst_dtype;
    int64_t parts, part_rows;    /* parts of an output: part_rows rows each; 0: TFM__REDUCE_PART elements of one row */
    double *part;                /* [output][part] when there is more than one */
    int64_t blocks;              /* column blocks */
    tfm__lanes lanes;
} tfm__reduction;

static double tfm__reduce_pair(int what, double a, double b) {
    if (what == TFM__SUM || what == TFM__MEAN) return a + b;
    if (a != a) return a;
    if (b != b) return b;
    return (what == TFM__MAX) == (b > a) ? b : a;
}

static double tfm__reduce_start(int what) {
    return what == TFM__MAX ? -HUGE_VAL : what == TFM__MIN ? HUGE_VAL : 0.0;
}

/* n elements, `step` apart. */
static double tfm__reduce_row(const tfm__reduction *r, int64_t offset, int64_t step, int64_t n) {
    const int kernel = tfm__reductions[r->what].rows;
    const char *const src = tfm__byte(r->src, r->dtype, offset);
    const int64_t size = tfm_dtype_size(r->dtype);
    float tile[TFM__PIECE];
    double all = tfm__reduce_start(r->what);
    int64_t begin;
    if (r->dtype == TFM_F32 && step == 1) return (double)r->k->reduce(kernel, (const float *)src, n);
    for (begin = 0; begin < n; begin += TFM__PIECE) {
        const int64_t m = tfm__min64(n - begin, TFM__PIECE);
        r->k->load(tile, src + begin * step * size, r->dtype, step, m);
        all = tfm__reduce_pair(r->what, all, (double)r->k->reduce(kernel, tile, m));
    }
    return all;
}

static void tfm__reduce_finish(const tfm__reduction *r, int64_t output, double value) {
    if (r->what == TFM__MEAN) value /= (double)r->total;
    tfm__store_at(r->dst_dtype, r->dst, output, value);
}

/* Items: outputs times parts. */
static void tfm__reduce_rows_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__reduction *const r = (const tfm__reduction *)arg;
    const tfm__walk *const g = &r->gone;
    int64_t item, row;
    tfm__cursor out, at;
    (void)slot;
    tfm__cursor_at(&r->kept, begin / r->parts, &out);
    for (item = begin; item < end; ++item) {
        const int64_t part = item % r->parts;
        double all = tfm__reduce_start(r->what);
        if (r->part_rows == 0) { /* a piece of the only row */
            const int64_t from = part * TFM__REDUCE_PART;
            all = tfm__reduce_row(r, out.offset[0] + from * g->step[0], g->step[0],
                                  tfm__min64(TFM__REDUCE_PART, g->n - from));
        } else {
            const int64_t last = tfm__min64(g->rows, (part + 1) * r->part_rows);
            tfm__cursor_at(g, part * r->part_rows, &at);
            for (row = part * r->part_rows; row < last; ++row) {
                all =
                    tfm__reduce_pair(r->what, all, tfm__reduce_row(r, out.offset[0] + at.offset[0], g->step[0], g->n));
                tfm__cursor_next(g, &at);
            }
        }
        if (r->parts > 1) {
            r->part[item] = all;
        } else {
            tfm__reduce_finish(r, item, all);
        }
        if (part == r->parts - 1) tfm__cursor_next(&r->kept, &out);
    }
}

/* Items: rows of outputs times column blocks. Rows of the source are added whole, so memory is read as it lies. */
static void tfm__reduce_columns_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__reduction *const r = (const tfm__reduction *)arg;
    const tfm__walk *const g = &r->gone;
    const int pairs = tfm__reductions[r->what].pairs, sum = r->what == TFM__SUM || r->what == TFM__MEAN;
    float tile[TFM__REDUCE_COLUMNS], part[TFM__REDUCE_COLUMNS];
    double all[TFM__REDUCE_COLUMNS];
    int64_t item, row, i, j;
    tfm__cursor out, at;
    (void)slot;
    tfm__cursor_at(&r->kept, begin / r->blocks, &out);
    for (item = begin; item < end; ++item) {
        const int64_t block = item % r->blocks, column = block * TFM__REDUCE_COLUMNS, step = r->kept.step[0];
        const int64_t columns = tfm__min64(TFM__REDUCE_COLUMNS, r->kept.n - column);
        int64_t added = 0;
        for (j = 0; j < columns; ++j) all[j] = tfm__reduce_start(r->what);
        tfm__cursor_at(g, 0, &at);
        for (row = 0; row < g->rows; ++row) {
            for (i = 0; i < g->n; ++i) {
                const int64_t offset = out.offset[0] + column * step + at.offset[0] + i * g->step[0];
                const float *x = (const float *)tfm__byte(r->src, r->dtype, offset);
                if (r->dtype != TFM_F32 || step != 1) {
                    r->k->load(tile, x, r->dtype, step, columns);
                    x = tile;
                }
                if (added++ == 0) {
                    memcpy(part, x, (size_t)columns * sizeof(float));
                } else {
                    r->k->binary(pairs, part, part, 1, x, 1, columns);
                }
                if (sum && added == TFM__REDUCE_FOLD) {
                    for (j = 0; j < columns; ++j) all[j] += (double)part[j];
                    added = 0;
                }
            }
            tfm__cursor_next(g, &at);
        }
        for (j = 0; j < columns; ++j) {
            if (added) all[j] = tfm__reduce_pair(r->what, all[j], (double)part[j]);
            tfm__reduce_finish(r, item / r->blocks * r->kept.n + column + j, all[j]);
        }
        if (block == r->blocks - 1) tfm__cursor_next(&r->kept, &out);
    }
}

static void tfm__reduce_logsumexp_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__reduction *const r = (const tfm__reduction *)arg;
    const tfm__walk *const g = &r->gone;
    float *const lane = (float *)tfm__lane(r->c, &r->lanes, slot);
    int64_t item, row;
    tfm__cursor out, at;
    tfm__cursor_at(&r->kept, begin, &out);
    for (item = begin; item < end; ++item) {
        const float *x = lane;
        if (g->rows == 1 && g->step[0] == 1 && r->dtype == TFM_F32) {
            x = (const float *)r->src + out.offset[0];
        } else {
            tfm__cursor_at(g, 0, &at);
            for (row = 0; row < g->rows; ++row) {
                r->k->load(lane + row * g->n, tfm__byte(r->src, r->dtype, out.offset[0] + at.offset[0]), r->dtype,
                           g->step[0], g->n);
                tfm__cursor_next(g, &at);
            }
        }
        tfm__reduce_finish(r, item, (double)r->k->logsumexp(x, r->total));
        tfm__cursor_next(&r->kept, &out);
    }
}

/* The set of axes as bits. 0: rejected. */
static int tfm__axes(tfm__op *o, const tfm_tensor *t, tfm_shape dims, int *axes) {
    int i;
    *axes = dims.ndim == 0 ? (1 << TFM_MAX_DIMS) - 1 : 0;
    if (dims.ndim < 0 || dims.ndim > TFM_MAX_DIMS) {
        tfm__reject(o, "dims has %d entries, expected 0 to %d", dims.ndim, TFM_MAX_DIMS);
        return 0;
    }
    for (i = 0; i < dims.ndim; ++i) {
        int dim = dims.dim[i] < -TFM_MAX_DIMS || dims.dim[i] > TFM_MAX_DIMS ? TFM_MAX_DIMS : (int)dims.dim[i];
        if (!tfm__need_dim(o, "a dim", &dim, t->ndim)) return 0;
        if (*axes >> dim & 1) {
            tfm__reject(o, "dim %d is named twice", dim);
            return 0;
        }
        *axes |= 1 << dim;
    }
    return 1;
}

/* The dims of t whose bit is `on`, as a walk of one operand. */
static void tfm__walk_axes(tfm__walk *w, const tfm_tensor *t, int axes, int on) {
    int i;
    tfm__walk_init(w, 0, NULL, 1);
    for (i = 0; i < t->ndim; ++i) {
        if ((axes >> i & 1) != on) continue;
        w->shape[w->ndim] = t->shape[i];
        w->stride[0][w->ndim++] = t->shape[i] == 1 ? 0 : t->stride[i];
    }
}

static void tfm__reduce_run(tfm__op *o, tfm__reduction *r, const tfm_tensor *y) {
    const int64_t outputs = tfm_numel(y);
    const double work = 2.0 * (double)outputs * (double)r->total;
    int64_t i, j, columns;
    if (r->what == TFM__LOGSUMEXP) {
        tfm__for(o->c, outputs, tfm__max64(1, TFM__RUN / r->total), 10.0 * work, tfm__reduce_logsumexp_task, r);
        return;
    }
    columns = r->kept.ndim ? r->kept.shape[r->kept.ndim - 1] : 1;
    if (columns >= 16 && r->kept.stride[0][r->kept.ndim - 1] < r->gone.step[0]) {
        tfm__walk_rows(&r->kept);
        r->blocks = tfm__ceil_div(columns, TFM__REDUCE_COLUMNS);
        tfm__for(o->c, r->kept.rows * r->blocks,
                 tfm__max64(1, TFM__RUN / (r->total * tfm__min64(columns, TFM__REDUCE_COLUMNS))), work,
                 tfm__reduce_columns_task, r);
        return;
    }
    tfm__for(o->c, outputs * r->parts, tfm__max64(1, TFM__RUN / tfm__ceil_div(r->total, r->parts)), work,
             tfm__reduce_rows_task, r);
    for (i = 0; r->parts > 1 && i < outputs; ++i) {
        double all = r->part[i * r->parts];
        for (j = 1; j < r->parts; ++j) all = tfm__reduce_pair(r->what, all, r->part[i * r->parts + j]);
        tfm__reduce_finish(r, i, all);
    }
}

static tfm_tensor *tfm__reduce_op(tfm_ctx *c, int what, const tfm_tensor *t, tfm_shape dims, int keepdim) {
    tfm__op o;
    tfm__reduction r;
    tfm_tensor *y;
    int64_t shape[TFM_MAX_DIMS];
    int axes, i, ndim = 0;
    if (!tfm__enter(c, &o, tfm__reductions[what].op, 1, t)) return NULL;
    if (!tfm__need_float(&o, "t", t) || !tfm__axes(&o, t, dims, &axes)) return NULL;
    for (i = 0; i < t->ndim; ++i) {
        if (!(axes >> i & 1)) shape[ndim++] = t->shape[i];
        else if (keepdim) shape[ndim++] = 1;
    }
    tfm__walk_axes(&r.kept, t, axes, 0);
    tfm__walk_axes(&r.gone, t, axes, 1);
    r.total = tfm__sizes(r.gone.ndim, r.gone.shape);
    if (r.total == 0 && (what == TFM__MAX || what == TFM__MIN)) {
        return tfm__reject(&o, "t is %s: an empty set of elements has no %s", tfm__describe(&o, t),
                           what == TFM__MAX ? "maximum" : "minimum");
    }
    o.number[0] = axes;
    o.number[1] = keepdim;
    y = tfm__result(&o, t->dtype, ndim, shape);
    if (!y) return tfm__leave(&o, NULL);
    tfm__walk_merge(&r.kept);
    tfm__walk_merge(&r.gone);
    tfm__walk_rows(&r.gone);
    r.c = c;
    r.k = o.k;
    r.what = what;
    r.src = t->data;
    r.dtype = t->dtype;
    r.dst = (char *)y->data;
    r.dst_dtype = y->dtype;
    r.part = NULL;
    r.parts = 1;
    r.part_rows = r.gone.rows;
    if (what == TFM__LOGSUMEXP) {
        if (!tfm__lanes_get(&o, &r.lanes, r.total * (int64_t)sizeof(float))) return tfm__leave(&o, NULL);
    } else if (r.total >= 2 * TFM__REDUCE_PART) {
        r.part_rows = r.gone.rows == 1 ? 0 : tfm__max64(1, TFM__REDUCE_PART / r.gone.n);
        r.parts = r.part_rows ? tfm__ceil_div(r.gone.rows, r.part_rows) : tfm__ceil_div(r.gone.n, TFM__REDUCE_PART);
        r.part = (double *)tfm__temporary(&o, r.parts * tfm_numel(y) * (int64_t)sizeof(double));
        if (!r.part) return tfm__leave(&o, NULL);
    }
    if (o.run && r.total == 0) tfm__fill(c, y, what == TFM__SUM ? 0.0 : what == TFM__MEAN ? tfm__nan() : -HUGE_VAL);
    if (o.run && r.total && tfm_numel(y)) tfm__reduce_run(&o, &r, y);
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_sum(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim) {
    return tfm__reduce_op(c, TFM__SUM, t, dims, keepdim);
}

TFM_API tfm_tensor *tfm_mean(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim) {
    return tfm__reduce_op(c, TFM__MEAN, t, dims, keepdim);
}

TFM_API tfm_tensor *tfm_max(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim) {
    return tfm__reduce_op(c, TFM__MAX, t, dims, keepdim);
}

TFM_API tfm_tensor *tfm_min(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim) {
    return tfm__reduce_op(c, TFM__MIN, t, dims, keepdim);
}

TFM_API tfm_tensor *tfm_logsumexp(tfm_ctx *c, const tfm_tensor *t, tfm_shape dims, int keepdim) {
    return tfm__reduce_op(c, TFM__LOGSUMEXP, t, dims, keepdim);
}

/* -- positions ----------------------------------------------------------------------------------------------------- */

typedef struct tfm__ranking {
    tfm_ctx *c;
    const struct tfm__kernels *k;
    tfm__walk kept;              /* rows of the source */
    int64_t n, step, count;      /* a row's elements; how many of them are wanted */
    const void *src;
    int dtype;
    char *values;
    int64_t *indices;
    tfm__lanes lanes;
} tfm__ranking;

/* The first of the largest; NaN is larger than all. */
static int64_t tfm__argmax_row(const tfm__ranking *r, int64_t offset) {
    const char *const src = tfm__byte(r->src, r->dtype, offset);
    const int64_t size = tfm_dtype_size(r->dtype);
    float tile[TFM__PIECE], best = 0.0f;
    int64_t begin, i, found = 0;
    for (i = 0; !tfm__is_float(r->dtype) && i < r->n; ++i) {
        const double x = r->dtype == TFM_F64 ? ((const double *)(const void *)src)[i * r->step] : 0.0;
        if (x != x) return i;
        if (tfm__order_at(r->dtype, src, i * r->step, r->dtype, src, found * r->step) == TFM__GREATER) found = i;
    }
    if (!tfm__is_float(r->dtype)) return found;
    for (begin = 0; begin < r->n; begin += TFM__PIECE) {
        const int64_t m = tfm__min64(r->n - begin, TFM__PIECE);
        const float *x = (const float *)(const void *)(src + begin * r->step * size);
        float most;
        if (r->dtype != TFM_F32 || r->step != 1) {
            r->k->load(tile, x, r->dtype, r->step, m);
            x = tile;
        }
        most = r->k->reduce(TFM__R_MAX, x, m);
        if (tfm__isnan(most)) {
            for (i = 0; !tfm__isnan(x[i]); ++i) continue;
            return begin + i;
        }
        if (begin && most <= best) continue;
        best = most;
        for (i = 0; x[i] != most; ++i) continue;
        found = begin + i;
    }
    return found;
}

static void tfm__argmax_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__ranking *const r = (const tfm__ranking *)arg;
    tfm__cursor at;
    int64_t row;
    (void)slot;
    tfm__cursor_at(&r->kept, begin, &at);
    for (row = begin; row < end; ++row) {
        r->indices[row] = tfm__argmax_row(r, at.offset[0]);
        tfm__cursor_next(&r->kept, &at);
    }
}

static void tfm__ranking_of(tfm__ranking *r, const tfm__op *o, const tfm_tensor *t, int dim) {
    r->c = o->c;
    r->k = o->k;
    r->n = t->ndim ? t->shape[dim] : 1;
    r->step = t->ndim && r->n > 1 ? t->stride[dim] : 1;
    r->src = t->data;
    r->dtype = t->dtype;
    tfm__walk_axes(&r->kept, t, 1 << dim, 0);
    tfm__walk_merge(&r->kept);
}

TFM_API tfm_tensor *tfm_argmax(tfm_ctx *c, const tfm_tensor *t, int dim, int keepdim) {
    tfm__op o;
    tfm__ranking r;
    tfm_tensor *y;
    tfm__geometry g;
    if (!tfm__enter(c, &o, TFM__OP_ARGMAX, 1, t)) return NULL;
    if (!tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    if (t->ndim && t->shape[dim] == 0) return tfm__reject(&o, "t is %s: dim %d is empty", tfm__describe(&o, t), dim);
    g = tfm__geometry_of(t);
    if (t->ndim && keepdim) g.shape[dim] = 1;
    if (t->ndim && !keepdim) tfm__geometry_drop(&g, dim);
    y = tfm__result(&o, TFM_I64, g.ndim, g.shape);
    if (y && o.run && tfm_numel(y)) {
        tfm__ranking_of(&r, &o, t, dim);
        r.indices = (int64_t *)y->data;
        tfm__for(c, tfm_numel(y), tfm__max64(1, TFM__RUN / r.n), 4.0 * (double)tfm_numel(t), tfm__argmax_task, &r);
    }
    return tfm__leave(&o, y);
}

/* Larger is better: the float's place in the order of all (NaN on top, -0 as 0), then the lower index. */
static uint64_t tfm__rank_key(float x, int64_t index) {
    const uint32_t bits = tfm__float_bits(x + 0.0f);
    const uint32_t place = tfm__isnan(x) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)place << 32 | (uint64_t)(0xffffffffu - (uint32_t)index);
}

/* Restores a heap with the worst on top after heap[i] changed. */
static void tfm__heap_sink(uint64_t *heap, int64_t count, int64_t i) {
    for (;;) {
        int64_t child = 2 * i + 1;
        uint64_t swap;
        if (child >= count) return;
        if (child + 1 < count && heap[child + 1] < heap[child]) child += 1;
        if (heap[i] <= heap[child]) return;
        swap = heap[i];
        heap[i] = heap[child];
        heap[child] = swap;
        i = child;
    }
}

static void tfm__topk_row(const tfm__ranking *r, int64_t offset, uint64_t *heap) {
    const char *const src = tfm__byte(r->src, r->dtype, offset);
    const int64_t size = tfm_dtype_size(r->dtype);
    float tile[TFM__PIECE];
    int64_t begin, i;
    for (begin = 0; begin < r->n; begin += TFM__PIECE) {
        const int64_t m = tfm__min64(r->n - begin, TFM__PIECE);
        r->k->load(tile, src + begin * r->step * size, r->dtype, r->step, m);
        for (i = 0; i < m; ++i) {
            const uint64_t key = tfm__rank_key(tile[i], begin + i);
            const int64_t held = begin + i;
            if (held < r->count) {
                heap[held] = key;
                if (held == r->count - 1) {
                    int64_t j;
                    for (j = r->count / 2; j-- > 0;) tfm__heap_sink(heap, r->count, j);
                }
            } else if (key > heap[0]) {
                heap[0] = key;
                tfm__heap_sink(heap, r->count, 0);
            }
        }
    }
    for (i = r->count - 1; i > 0; --i) { /* the worst goes last */
        const uint64_t worst = heap[0];
        heap[0] = heap[i];
        heap[i] = worst;
        tfm__heap_sink(heap, i, 0);
    }
}

static void tfm__topk_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__ranking *const r = (const tfm__ranking *)arg;
    const int64_t size = tfm_dtype_size(r->dtype);
    uint64_t *const heap = (uint64_t *)tfm__lane(r->c, &r->lanes, slot);
    tfm__cursor at;
    int64_t row, i;
    tfm__cursor_at(&r->kept, begin, &at);
    for (row = begin; row < end; ++row) {
        tfm__topk_row(r, at.offset[0], heap);
        for (i = 0; i < r->count; ++i) {
            const int64_t index = (int64_t)(0xffffffffu - (uint32_t)(heap[i] & 0xffffffffu));
            memcpy(r->values + (row * r->count + i) * size, tfm__byte(r->src, r->dtype, at.offset[0] + index * r->step),
                   (size_t)size);
            if (r->indices) r->indices[row * r->count + i] = index;
        }
        tfm__cursor_next(&r->kept, &at);
    }
}

TFM_API tfm_tensor *tfm_topk(tfm_ctx *c, const tfm_tensor *t, int64_t k, tfm_tensor **indices) {
    tfm__op o;
    tfm__ranking r;
    tfm_tensor *y, *places = NULL;
    int64_t shape[TFM_MAX_DIMS], n;
    if (indices) *indices = NULL;
    if (!tfm__enter(c, &o, TFM__OP_TOPK, 1, t)) return NULL;
    if (!tfm__need_float(&o, "t", t)) return NULL;
    n = t->ndim ? t->shape[t->ndim - 1] : 1;
    if (k < 0 || k > n) {
        return tfm__reject(&o, "k is %lld, t is %s: expected 0 to %lld", (long long)k, tfm__describe(&o, t),
                           (long long)n);
    }
    if (n > 0xffffffffLL) return tfm__reject(&o, "t is %s: at most 2^32 - 1 elements are ranked", tfm__describe(&o, t));
    memcpy(shape, t->shape, sizeof(shape));
    if (t->ndim) shape[t->ndim - 1] = k;
    o.number[0] = k;
    y = tfm__result(&o, t->dtype, t->ndim, shape);
    if (y && indices) places = tfm__result(&o, TFM_I64, t->ndim, shape);
    if (!y || (indices && !places) || !tfm__lanes_get(&o, &r.lanes, k * (int64_t)sizeof(uint64_t))) {
        return tfm__leave(&o, NULL);
    }
    o.saved[0] = places;
    if (o.run && tfm_numel(y)) {
        tfm__ranking_of(&r, &o, t, t->ndim ? t->ndim - 1 : 0);
        r.count = k;
        r.values = (char *)y->data;
        r.indices = places ? (int64_t *)places->data : NULL;
        tfm__for(c, tfm_numel(y) / k, tfm__max64(1, TFM__RUN / n), 8.0 * (double)tfm_numel(t), tfm__topk_task, &r);
    }
    y = tfm__leave(&o, y);
    if (y && indices) *indices = places;
    return y;
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Softmax and norms: whole rows
 * ---------------------------------------------------------------------------------------------------------------- */

typedef struct tfm__softmax {
    tfm_ctx *c;
    const struct tfm__kernels *k;
    tfm__walk w;                 /* rows of y and x */
    int64_t n, y_step, x_step;
    int log_form, x_dtype, y_dtype;
    char *y;
    const void *x;
    tfm__lanes lanes;
} tfm__softmax;

#define TFM__SOFTMAX_LONG 16384 /* elements of a row beside which L2 holds no other */

static void tfm__softmax_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__softmax *const s = (const tfm__softmax *)arg;
    const int direct_x = s->x_dtype == TFM_F32 && s->x_step == 1, direct_y = s->y_dtype == TFM_F32 && s->y_step == 1;
    const int together = direct_y && s->n <= TFM__SOFTMAX_LONG ? TFM__NORM_ROWS : 1; /* a lane holds one */
    float *const lane = (float *)tfm__lane(s->c, &s->lanes, slot);
    tfm__softmax_row rows[TFM__NORM_ROWS];
    tfm__cursor at;
    int64_t row;
    int r, count;
    tfm__cursor_at(&s->w, begin, &at);
    for (row = begin; row < end; row += count) {
        char *dst = NULL;
        count = (int)tfm__min64(together, end - row);
        for (r = 0; r < count; ++r) {
            dst = s->y + at.offset[0] * tfm_dtype_size(s->y_dtype);
            rows[r].x = (const float *)tfm__byte(s->x, s->x_dtype, at.offset[1]);
            rows[r].y = direct_y ? (float *)(void *)dst : lane;
            if (!direct_x) {
                s->k->load(rows[r].y, rows[r].x, s->x_dtype, s->x_step, s->n);
                rows[r].x = rows[r].y;
            }
            tfm__cursor_next(&s->w, &at);
        }
        s->k->softmax(rows, count, s->n, s->log_form);
        if (!direct_y) s->k->store(dst, s->y_dtype, s->y_step, lane, s->n);
    }
}

static tfm_tensor *tfm__softmax_op(tfm_ctx *c, int op, const tfm_tensor *t, int dim, int log_form) {
    tfm__op o;
    tfm__softmax s;
    tfm_tensor *y;
    int i, d = 0;
    if (!tfm__enter(c, &o, op, 1, t)) return NULL;
    if (!tfm__need_float(&o, "t", t) || !tfm__need_dim(&o, "dim", &dim, t->ndim)) return NULL;
    o.number[0] = dim;
    y = tfm__result(&o, t->dtype, t->ndim, t->shape);
    if (!y) return tfm__leave(&o, NULL);
    o.saved[0] = y;
    s.n = t->ndim ? t->shape[dim] : 1;
    if (!tfm__lanes_get(&o, &s.lanes, s.n * (int64_t)sizeof(float))) return tfm__leave(&o, NULL);
    if (o.run && tfm_numel(y)) {
        s.c = c;
        s.k = o.k;
        s.y_step = s.n > 1 ? y->stride[dim] : 1;
        s.x_step = s.n > 1 ? t->stride[dim] : 1;
        s.log_form = log_form;
        s.x_dtype = t->dtype;
        s.y_dtype = y->dtype;
        s.x = t->data;
        s.y = (char *)y->data;
        tfm__walk_init(&s.w, 0, NULL, 2);
        for (i = 0; i < t->ndim; ++i) {
            if (i == dim) continue;
            s.w.shape[d] = t->shape[i];
            s.w.stride[0][d] = y->stride[i];
            s.w.stride[1][d++] = t->stride[i];
        }
        s.w.ndim = d;
        tfm__walk_merge(&s.w);
        tfm__for(c, tfm_numel(y) / s.n, tfm__max64(1, TFM__RUN / s.n), TFM__COST_CURVE * (double)tfm_numel(y),
                 tfm__softmax_task, &s);
    }
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_softmax(tfm_ctx *c, const tfm_tensor *t, int dim) {
    return tfm__softmax_op(c, TFM__OP_SOFTMAX, t, dim, 0);
}

TFM_API tfm_tensor *tfm_log_softmax(tfm_ctx *c, const tfm_tensor *t, int dim) {
    return tfm__softmax_op(c, TFM__OP_LOG_SOFTMAX, t, dim, 1);
}

enum { TFM__NORM_Y, TFM__NORM_SUM, TFM__NORM_X, TFM__NORM_RESIDUAL, TFM__NORM_WEIGHT, TFM__NORM_BIAS, TFM__NORM_PARTS };

/* Tensors of a norm by part; those that are f32 in a row are used in place, the others pass through rows of a lane. */
typedef struct tfm__norming {
    tfm_ctx *c;
    const struct tfm__kernels *k;
    tfm__norm norm;
    tfm__walk rows;              /* y, sum, x, residual over the leading dims */
    tfm__walk inner[TFM__NORM_PARTS];  /* of each part over the normalised dims: rows of n elements */
    const tfm_tensor *t[TFM__NORM_PARTS];
    int64_t lane[TFM__NORM_PARTS];     /* where its rows begin in a lane, in floats; -1: in place */
    int64_t lane_row;                  /* floats of a row there */
    int together;                      /* rows at a time */
    float *mean, *rstd;
    tfm__lanes lanes;
} tfm__norming;

static void tfm__norm_load(const tfm__norming *a, int part, int64_t offset, float *row) {
    const tfm__walk *const w = &a->inner[part];
    tfm__cursor at;
    int64_t i;
    tfm__cursor_at(w, 0, &at);
    for (i = 0; i < w->rows; ++i) {
        a->k->load(row + i * w->n, tfm__byte(a->t[part]->data, a->t[part]->dtype, offset + at.offset[0]),
                   a->t[part]->dtype, w->step[0], w->n);
        tfm__cursor_next(w, &at);
    }
}

/* Where a part's row, row r of those in the lane, lies now: in place, or (load 1: after loading it) in the lane. NULL:
 * there is no such part. */
static float *tfm__norm_row_of(const tfm__norming *a, int part, int64_t offset, float *lane, int r, int load) {
    if (!a->t[part]) return NULL;
    if (a->lane[part] < 0) return (float *)a->t[part]->data + offset;
    lane += a->lane[part] + r * a->lane_row;
    if (load) tfm__norm_load(a, part, offset, lane);
    return lane;
}

static void tfm__norm_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__norming *const a = (const tfm__norming *)arg;
    float *const lane = (float *)tfm__lane(a->c, &a->lanes, slot);
    const tfm_tensor *const residual = a->t[TFM__NORM_RESIDUAL], *const sum = a->t[TFM__NORM_SUM];
    tfm__norm norm = a->norm;
    tfm__norm_row rows[TFM__NORM_ROWS];
    tfm__cursor at;
    int64_t i, offset[TFM__NORM_ROWS][2]; /* of y and sum */
    int part, r, count;
    norm.weight = tfm__norm_row_of(a, TFM__NORM_WEIGHT, 0, lane, 0, 1);
    norm.bias = tfm__norm_row_of(a, TFM__NORM_BIAS, 0, lane, 0, 1);
    tfm__cursor_at(&a->rows, begin, &at);
    for (i = begin; i < end; i += count) {
        count = (int)tfm__min64(a->together, end - i);
        for (r = 0; r < count; ++r) {
            tfm__norm_row *const row = &rows[r];
            row->x = tfm__norm_row_of(a, TFM__NORM_X, at.offset[TFM__NORM_X], lane, r, 1);
            row->residual = row->sum = NULL; /* two calls less: 4 % of rows of 64 */
            if (residual)
                row->residual = tfm__norm_row_of(a, TFM__NORM_RESIDUAL, at.offset[TFM__NORM_RESIDUAL], lane, r, 1);
            if (sum) row->sum = tfm__norm_row_of(a, TFM__NORM_SUM, at.offset[TFM__NORM_SUM], lane, r, 0);
            row->y = tfm__norm_row_of(a, TFM__NORM_Y, at.offset[TFM__NORM_Y], lane, r, 0);
            memcpy(offset[r], at.offset, sizeof(offset[r]));
            tfm__cursor_next(&a->rows, &at);
        }
        a->k->norm(&norm, rows, count);
        for (part = TFM__NORM_Y; part <= TFM__NORM_SUM; ++part) {
            const tfm_tensor *const t = a->t[part];
            for (r = 0; r < count && t && a->lane[part] >= 0; ++r) {
                a->k->store((char *)t->data + offset[r][part] * tfm_dtype_size(t->dtype), t->dtype, 1,
                            tfm__norm_row_of(a, part, 0, lane, r, 0), norm.n);
            }
        }
        for (r = 0; r < count && a->mean; ++r) a->mean[i + r] = rows[r].mean;
        for (r = 0; r < count && a->rstd; ++r) a->rstd[i + r] = rows[r].rstd;
    }
}

/* The trailing dims of t as a walk; without the others. */
static void tfm__norm_inner(tfm__walk *w, const tfm_tensor *t, int dims) {
    tfm__walk_axes(w, t, (1 << (t->ndim - dims)) - 1, 0);
    tfm__walk_merge(w);
    tfm__walk_rows(w);
}

/* weight and bias must be the trailing dims of x. */
static int tfm__need_trailing(tfm__op *o, const char *name, const tfm_tensor *t, const tfm_tensor *x, int dims) {
    int i, same;
    if (!t) return 1;
    if (!tfm__need_float(o, name, t)) return 0;
    same = t->ndim == dims;
    for (i = 0; i < dims && same; ++i) same = t->shape[i] == x->shape[x->ndim - dims + i];
    if (same) return 1;
    tfm__reject(o, "x is %s, %s is %s: expected its last %d dims", tfm__describe(o, x), name, tfm__describe(o, t),
                dims);
    return 0;
}

#define TFM__NORM_NEAR 4096 /* elements of a part that a lane holds, or a row of more */

/* The parts that a lane must hold, and room for them. */
static int tfm__norm_lanes(tfm__op *o, tfm__norming *a) {
    int64_t size = 0;
    int part;
    a->lane_row = tfm__round_up(a->norm.n, 16);
    a->together = (int)tfm__max64(1, tfm__min64(TFM__NORM_ROWS, TFM__NORM_NEAR / tfm__max64(1, a->norm.n)));
    for (part = 0; part < TFM__NORM_PARTS; ++part) {
        const tfm_tensor *const t = a->t[part];
        a->lane[part] = -1;
        if (!t || (t->dtype == TFM_F32 && a->inner[part].rows <= 1 && a->inner[part].step[0] == 1)) continue;
        if (part == TFM__NORM_X && a->lane[TFM__NORM_Y] >= 0) { /* in place */
            a->lane[part] = a->lane[TFM__NORM_Y];
            continue;
        }
        a->lane[part] = size;
        size += part < TFM__NORM_WEIGHT ? a->together * a->lane_row : a->lane_row;
    }
    if (size == 0) a->together = TFM__NORM_ROWS;
    return tfm__lanes_get(o, &a->lanes, size * (int64_t)sizeof(float));
}

static tfm_tensor *tfm__norm_op(tfm_ctx *c, int op, const tfm_tensor *x, const tfm_tensor *weight,
                                const tfm_tensor *bias, const tfm_norm_options *options) {
    static const tfm_norm_options none = {0.0f, 0.0f, 0, NULL, NULL, NULL, NULL};
    const tfm_norm_options *const with = options ? options : &none;
    const int subtract_mean = op == TFM__OP_LAYER_NORM;
    tfm_tensor *y, *sum = NULL, *mean = NULL, *rstd = NULL;
    tfm__op o;
    tfm__norming a;
    int64_t shape[TFM_MAX_DIMS], rows;
    int dims, part, i;
    if (with->sum) *with->sum = NULL;
    if (with->mean) *with->mean = NULL;
    if (with->rstd) *with->rstd = NULL;
    if (!tfm__enter(c, &o, op, 1, x)) return NULL;
    if (!tfm__optional(&o, weight) || !tfm__optional(&o, bias) || !tfm__optional(&o, with->residual)) {
        return tfm__leave(&o, NULL);
    }
    if (!tfm__need_float(&o, "x", x)) return NULL;
    dims = weight ? weight->ndim : bias ? bias->ndim : with->normalized_dims > 0 ? with->normalized_dims : 1;
    if (dims < 1 || dims > x->ndim || with->normalized_dims < 0 ||
        (with->normalized_dims && with->normalized_dims != dims)) {
        return tfm__reject(&o, "x is %s, weight is %s, normalized_dims is %d: expected 1 to %d dims",
                           tfm__describe(&o, x), tfm__describe(&o, weight), with->normalized_dims, x->ndim);
    }
    if (!tfm__need_trailing(&o, "weight", weight, x, dims) || !tfm__need_trailing(&o, "bias", bias, x, dims)) {
        return NULL;
    }
    if (with->residual && !tfm__need_float(&o, "residual", with->residual)) return NULL;
    if (with->residual && !tfm__same_shape(x, with->residual)) {
        return tfm__reject(&o, "x is %s, residual is %s: expected the same shape", tfm__describe(&o, x),
                           tfm__describe(&o, with->residual));
    }
    if (!(with->eps >= 0.0f)) return tfm__reject(&o, "eps is %g, expected 0 (1e-5) or more", (double)with->eps);
    memcpy(shape, x->shape, sizeof(shape));
    for (i = x->ndim - dims; i < x->ndim; ++i) shape[i] = 1;
    y = tfm__result(&o, with->residual ? tfm__promote(x->dtype, with->residual->dtype) : x->dtype, x->ndim, x->shape);
    if (y && with->sum) sum = tfm__result(&o, y->dtype, x->ndim, x->shape);
    if (y && (with->mean || (o.requires_grad && subtract_mean))) mean = tfm__result(&o, TFM_F32, x->ndim, shape);
    if (y && (with->rstd || o.requires_grad)) rstd = tfm__result(&o, TFM_F32, x->ndim, shape);
    if (tfm__failed(c)) return tfm__leave(&o, NULL);
    o.attr[0] = with->eps == 0.0f ? 1e-5 : (double)with->eps;
    o.attr[1] = (double)with->weight_offset;
    o.number[0] = dims;
    o.saved[0] = mean;
    o.saved[1] = rstd;
    a.c = c;
    a.k = o.k;
    a.norm.subtract_mean = subtract_mean;
    a.norm.eps = (float)o.attr[0];
    a.norm.weight_offset = with->weight_offset;
    a.norm.weight = a.norm.bias = NULL;
    a.mean = mean ? (float *)mean->data : NULL;
    a.rstd = rstd ? (float *)rstd->data : NULL;
    a.t[TFM__NORM_Y] = y;
    a.t[TFM__NORM_SUM] = sum;
    a.t[TFM__NORM_X] = x;
    a.t[TFM__NORM_RESIDUAL] = with->residual;
    a.t[TFM__NORM_WEIGHT] = weight;
    a.t[TFM__NORM_BIAS] = bias;
    a.norm.n = tfm__sizes(dims, x->shape + x->ndim - dims);
    for (part = 0; part < TFM__NORM_PARTS; ++part) {
        if (a.t[part]) tfm__norm_inner(&a.inner[part], a.t[part], dims);
    }
    if (!tfm__norm_lanes(&o, &a)) return tfm__leave(&o, NULL);
    rows = tfm__sizes(x->ndim - dims, x->shape);
    if (o.run && a.norm.n == 0) { /* statistics of nothing */
        if (mean) tfm__fill(c, mean, tfm__nan());
        if (rstd) tfm__fill(c, rstd, tfm__nan());
    } else if (o.run && rows) {
        tfm__walk_init(&a.rows, x->ndim - dims, x->shape, 4);
        for (part = 0; part < 4; ++part) {
            for (i = 0; i < a.rows.ndim; ++i) a.rows.stride[part][i] = a.t[part] ? a.t[part]->stride[i] : 0;
        }
        tfm__for(c, rows, tfm__max64(1, TFM__RUN / a.norm.n), 8.0 * (double)tfm_numel(x), tfm__norm_task, &a);
    }
    y = tfm__leave(&o, y);
    if (y && with->sum) *with->sum = sum;
    if (y && with->mean) *with->mean = mean;
    if (y && with->rstd) *with->rstd = rstd;
    return y;
}

TFM_API tfm_tensor *tfm_layer_norm(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                                   const tfm_norm_options *options) {
    return tfm__norm_op(c, TFM__OP_LAYER_NORM, x, weight, bias, options);
}

TFM_API tfm_tensor *tfm_rms_norm(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight,
                                 const tfm_norm_options *options) {
    return tfm__norm_op(c, TFM__OP_RMS_NORM, x, weight, NULL, options);
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Dropout
 * ---------------------------------------------------------------------------------------------------------------- */

typedef struct tfm__dropping {
    const struct tfm__kernels *k;
    tfm__walk w;                 /* y, x */
    tfm__runs r;
    uint64_t seed, stream;
    float p, scale;
    char *y;
    const void *x;
    int dtype;
} tfm__dropping;

static void tfm__drop_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__dropping *const a = (const tfm__dropping *)arg;
    float tile[TFM__PIECE], chance[TFM__PIECE];
    tfm__cursor at;
    int64_t item, done, i;
    (void)slot;
    tfm__cursor_at(&a->w, begin / a->r.per_row, &at);
    for (item = begin; item < end; ++item) {
        const int64_t from = item % a->r.per_row * a->r.length, length = tfm__min64(a->r.length, a->w.n - from);
        for (done = 0; done < length; done += TFM__PIECE) {
            const int64_t x = from + done, n = tfm__min64(length - done, TFM__PIECE);
            tfm__uniform_fill(chance, n, a->seed, a->stream,
                              (uint64_t)(at.offset[0] + x)); /* y's offset: the element's number */
            a->k->load(tile, tfm__byte(a->x, a->dtype, at.offset[1] + x * a->w.step[1]), a->dtype, a->w.step[1], n);
            for (i = 0; i < n; ++i) tile[i] = chance[i] < a->p ? 0.0f : tile[i] * a->scale;
            a->k->store(a->y + (at.offset[0] + x) * tfm_dtype_size(a->dtype), a->dtype, 1, tile, n);
        }
        if (from + length == a->w.n) tfm__cursor_next(&a->w, &at);
    }
}

TFM_API tfm_tensor *tfm_dropout(tfm_ctx *c, const tfm_tensor *x, float p) {
    tfm__op o;
    tfm__dropping a;
    tfm_tensor *y;
    if (!tfm__enter(c, &o, TFM__OP_DROPOUT, 1, x)) return NULL;
    if (!tfm__need_float(&o, "x", x)) return NULL;
    if (!(p >= 0.0f && p <= 1.0f)) return tfm__reject(&o, "p is %g, expected a probability", (double)p);
    if (p == 0.0f) return tfm__leave(&o, tfm__result_view(&o, x, x->ndim, x->shape, x->stride, 0));
    y = tfm__result(&o, x->dtype, x->ndim, x->shape);
    a.seed = c->seed;
    a.stream = tfm__random_stream(c);
    o.attr[0] = (double)p;
    memcpy(&o.number[0], &a.seed, sizeof(a.seed));
    memcpy(&o.number[1], &a.stream, sizeof(a.stream));
    if (y && o.run && tfm_numel(y)) {
        a.k = o.k;
        a.p = p;
        a.scale = p < 1.0f ? 1.0f / (1.0f - p) : 0.0f;
        a.y = (char *)y->data;
        a.x = x->data;
        a.dtype = x->dtype;
        tfm__walk_init(&a.w, y->ndim, y->shape, 2);
        tfm__walk_operand(&a.w, 0, y);
        tfm__walk_operand(&a.w, 1, x);
        tfm__walk_merge(&a.w);
        tfm__walk_rows(&a.w);
        a.r = tfm__runs_of(a.w.rows, a.w.n);
        tfm__for(c, a.r.items, a.r.grain, 40.0 * (double)tfm_numel(y), tfm__drop_task, &a);
    }
    return tfm__leave(&o, y);
}

/* ------------------------------------------------------------------------------------------------------------------
 *  Products
 *
 *  Every output is one chain of fused multiply-adds over ascending k (the kernel's promise), so how a product is cut
 *  into blocks, what is packed and who computes what never shows in the bits. Operands are read where they lie, with
 *  any strides; what the kernel cannot read in place is packed block by block into scratch.
 * ---------------------------------------------------------------------------------------------------------------- */

typedef struct tfm__product {
    int64_t rows, cols, depth;
    const void *a;
    int a_dtype;
    int64_t a_row, a_col;        /* element (r, k) at a[r * a_row + k * a_col] */
    int64_t strips;              /* but if this is not 0, a is so many f32 strips of the kernel's, whole in depth */
    int pairs;                   /* 1: by BF16 dot products; b is panels of bf16, depth even */
    int cached;                  /* 1: b was read lately */
    const void *b;
    int b_dtype, b_panels;       /* b_panels 1: [ceil(cols / 16)][depth][16] */
    int64_t b_row, b_col;        /* else element (k, j) at b[k * b_row + j * b_col] */
    void *c;
    int c_dtype;
    int64_t c_row;               /* element (r, j) at c[r * c_row + j] */
    const void *bias;            /* per column, or NULL */
    int bias_dtype;
    int64_t bias_step;
    int activation;
} tfm__product;

/* A slot's scratch while it computes a tile, in floats. The largest blocks of any instruction set fit. */
#define TFM__PRODUCT_COLS 64                             /* columns of B packed at a time: they stay in L2 */
#define TFM__PRODUCT_A 0                                 /* block_m x block_k, 144 x 768 at most, and a strip more */
#define TFM__PRODUCT_B (TFM__PRODUCT_A + 156 * 768)      /* block_k x TFM__PRODUCT_COLS */
#define TFM__PRODUCT_C (TFM__PRODUCT_B + 768 * TFM__PRODUCT_COLS)  /* of a C in f16 or bf16 */
#define TFM__PRODUCT_NARROW (192 * 256)                  /* elements of such a C at a time */
#define TFM__PRODUCT_HIGH (TFM__PRODUCT_NARROW / TFM__PRODUCT_COLS) /* and rows */
#define TFM__PRODUCT_BIAS (TFM__PRODUCT_C + TFM__PRODUCT_NARROW)
#define TFM__PRODUCT_BIASES 2048                         /* columns of a bias that has to be converted */
#define TFM__PRODUCT_END (TFM__PRODUCT_BIAS + TFM__PRODUCT_BIASES)
typedef char tfm__product_fits[TFM__PRODUCT_END * 4 <= TFM__SCRATCH_BYTES ? 1 : -1];

/* A in rows is packed from so many rows on: strips save the kernel's page walks. So many columns have to share the
 * packing; fewer where rows lie whole pages apart, in few lines of the cache, or where all rows shall share a plain B's
 * (512 x 512 x 512: 0.97 of the time without, 128 x 256 x 1024: 1.1). */
#define TFM__PACK_ROWS 25
#define TFM__PACK_COLS 1024
#define TFM__PACK_SOON 128

/* Rows of a plain B that are taken at a time: long ones lie a page or more apart. Fewer rows of A than this read them
 * side by side, each from the first column to the last: 32 KB, at least 8 (1 x 4096 x 4096: 1.5 times faster than 128).
 * More take column by column, 2 MB, which page tables at hand cover, at least 64, and fetch a line of each row of
 * the next columns (16 x 4096 x 4096 on AVX-512: 10.2 ms, 5.5; 7 on AVX2: 9.0, 3.7). */
#define TFM__PLAIN_FEW 4

/* Longer rows of a plain B are packed where more strips of A than this share the packing: read as they lie, a page
 * each, they cost up to a third (128 x 3072 x 768 on AVX2: 0.60 of the peak instead of 0.86). Tiles that read one line
 * of a row suffer sooner (512 x 512 x 512 on AVX2: 0.9 of the time when packed). */
#define TFM__PLAIN_ROW 512
#define TFM__PLAIN_ROW_LINE 384
#define TFM__PLAIN_STRIPS 4

/* Halves of B are converted by the tiles for so many rows of A; for more they are packed as f32, once for all. */
#define TFM__HALVES_ROWS 24

/* B is read as it lies, up to column j1, by `rows` rows. Rows 16 apart mean whole panels to the kernel: it would read
 * past the end of a partial one. */
static int tfm__product_in_place(const struct tfm__kernels *k, const tfm__product *p, int64_t rows, int64_t j1) {
    const int64_t longest = k->keep_b || p->depth < 256 ? TFM__PLAIN_ROW : TFM__PLAIN_ROW_LINE;
    if (p->pairs) return 1;
    if (p->b_dtype != TFM_F32 && (p->strips || rows > TFM__HALVES_ROWS)) return 0;
    if (p->b_panels) return 1;
    if (p->b_row > longest && rows > TFM__PLAIN_STRIPS * k->tile_rows) return 0;
    return (p->b_col == 1 || p->cols == 1) && (p->b_row != TFM__PANEL || j1 % TFM__PANEL == 0);
}

/* B would be packed for every block of A. */
static int tfm__product_repacks(const struct tfm__kernels *k, const tfm__product *p, int64_t rows) {
    return rows > k->block_m && !tfm__product_in_place(k, p, rows, p->cols);
}

/* What becomes of a block of A: nothing; a copy in rows, f32 or pairs of bf16 (halves of B go with rows alone); or
 * strips. */
enum { TFM__A_AS_IT_LIES, TFM__A_ROWS, TFM__A_STRIPS };
static int tfm__product_packs_a(const struct tfm__kernels *k, const tfm__product *p, int64_t rows, int64_t cols) {
    const int must = p->a_dtype != TFM_F32 || (p->a_col != 1 && p->depth > 1);
    int64_t least;
    if (p->strips) return TFM__A_AS_IT_LIES;
    if (p->pairs) return TFM__A_ROWS;
    if (p->b_dtype != TFM_F32 && tfm__product_in_place(k, p, rows, p->cols)) return must ? TFM__A_ROWS : 0;
    least = p->a_row % 1024 == 0 || tfm__product_repacks(k, p, rows) ? TFM__PACK_SOON : TFM__PACK_COLS;
    if (must || (rows > k->tile_rows && rows >= TFM__PACK_ROWS && cols >= least)) return TFM__A_STRIPS;
    return TFM__A_AS_IT_LIES;
}

/* Rows of A from `a` on as f32, or as pairs of bf16. */
static void tfm__product_rows(const struct tfm__kernels *k, const tfm__product *p, const char *a, int64_t rows,
                              int64_t depth, float *to) {
    float row[2048]; /* the deepest block */
    const int plain = p->a_dtype == TFM_F32 && p->a_col == 1;
    int64_t r;
    for (r = 0; r < rows; ++r) {
        const char *const from = (const char *)tfm__byte(a, p->a_dtype, r * p->a_row);
        if (!p->pairs) {
            k->load(to + r * depth, from, p->a_dtype, p->a_col, depth);
            continue;
        }
        if (!plain) k->load(row, from, p->a_dtype, p->a_col, depth);
        k->store(to + r * depth / 2, TFM_BF16, 1, plain ? (const float *)(const void *)from : row, depth);
    }
}

/* Bias of columns [j, j + n) in f32. */
static const float *tfm__product_bias(const struct tfm__kernels *k, const tfm__product *p, int64_t j, int64_t n,
                                      float *scratch) {
    const char *const bias = p->bias ? tfm__byte(p->bias, p->bias_dtype, j * p->bias_step) : NULL;
    if (!bias || (p->bias_dtype == TFM_F32 && p->bias_step == 1)) return (const float *)(const void *)bias;
    k->load(scratch + TFM__PRODUCT_BIAS, bias, p->bias_dtype, p->bias_step, n);
    return scratch + TFM__PRODUCT_BIAS;
}

/* B of k in [k0, k0 + g->depth) and columns [j, j + g->cols) for the kernel: where it lies, or packed. */
static void tfm__product_b(const struct tfm__kernels *k, const tfm__product *p, int64_t k0, int64_t j, int in_place,
                           float *scratch, tfm__gemm *g) {
    int64_t at = 0;
    if (!in_place) {
        g->b = scratch + TFM__PRODUCT_B;
        g->b_dtype = TFM_F32;
        g->b_row = TFM__PANEL;
        g->b_panel = TFM__PANEL * g->depth;
        for (; p->b_panels && at < g->cols; at += TFM__PANEL) {
            k->load(scratch + TFM__PRODUCT_B + at * g->depth,
                    tfm__byte(p->b, p->b_dtype, (j + at) * p->depth + k0 * TFM__PANEL), p->b_dtype, 1,
                    TFM__PANEL * g->depth);
        }
        if (p->b_panels) return;
        g->plain = NULL;
        if (k->keep_b && p->b_dtype == TFM_F32 && p->b_col == 1 && g->cols % (2 * TFM__PANEL) == 0) {
            g->plain = (const float *)tfm__byte(p->b, TFM_F32, k0 * p->b_row + j);
            g->plain_row = p->b_row;
            return;
        }
        k->pack_panels(scratch + TFM__PRODUCT_B, TFM_F32, TFM__PANEL,
                       tfm__byte(p->b, p->b_dtype, k0 * p->b_row + j * p->b_col),
                       p->b_dtype, p->b_col, p->b_row, g->cols, g->depth);
        return;
    }
    g->b_dtype = p->b_dtype;
    g->b_row = p->b_panels ? TFM__PANEL : p->b_row;
    g->b_panel = p->b_panels ? TFM__PANEL * p->depth : TFM__PANEL;
    g->b = tfm__byte(p->b, p->b_dtype, j / TFM__PANEL * g->b_panel + k0 * g->b_row);
    if (!p->pairs) return;
    g->b_dtype = TFM__PAIRS;
    g->b_panel /= 2;
}

/* Rows of a plain B that are packed after this, if they lie as they will: fetched meanwhile, packing takes a third of
 * the time (128 x 768 x 3072: 0.91 of the peak instead of 0.85). */
static void tfm__product_ahead(const tfm__product *p, int64_t k0, int64_t j, int64_t cols, tfm__gemm *g) {
    g->ahead = NULL;
    if (p->b_panels || p->b_col != 1 || cols <= 0 || k0 >= p->depth) return;
    g->ahead = tfm__byte(p->b, p->b_dtype, k0 * p->b_row + j);
    g->ahead_row = p->b_row * tfm_dtype_size(p->b_dtype);
    g->ahead_cols = cols * tfm_dtype_size(p->b_dtype);
}

/* The depth of a block. A plain B as TFM__PLAIN_FEW says. Panels all at once where one strip of A reads them and so
 * nothing of them is kept in a cache for the next; else the fewer rows, the deeper, so that C is seldom visited. */
static int64_t tfm__product_depth(const struct tfm__kernels *k, const tfm__product *p, int64_t rows, int in_place,
                                  int packs_a) {
    const int64_t row = tfm__max64(p->b_row, 1), fits = k->block_m * k->block_k / tfm__round_up(rows, k->tile_rows);
    const int few = rows < TFM__PLAIN_FEW;
    if (!in_place) return k->block_k;
    if (!p->b_panels) {
        return tfm__min64(k->block_k, few ? tfm__max64(8, (1 << 13) / row) : tfm__max64(64, (1 << 19) / row));
    }
    if (packs_a == TFM__A_AS_IT_LIES && rows <= k->tile_rows) return tfm__max64(p->depth, 1);
    return tfm__max64(k->block_k, tfm__min64(fits, 2048));
}

/* Rows [r0, r1), at most block_m, or all if A is in strips, columns [j0, j1); C in f32 or, below, converted from a tile
 * of scratch. */
static void tfm__product_block(const struct tfm__kernels *k, const tfm__product *p, int64_t r0, int64_t r1, int64_t j0,
                               int64_t j1, float *scratch, float *c, int64_t c_row) {
    const int packs_a = tfm__product_packs_a(k, p, r1 - r0, j1 - j0);
    const int in_place = tfm__product_in_place(k, p, r1 - r0, j1);
    const int plain_bias = !p->bias || (p->bias_dtype == TFM_F32 && p->bias_step == 1);
    const int64_t turn_rows = p->b_dtype == TFM_F32 ? k->turn_rows : 4 * k->turn_rows;
    const int turned = !in_place && packs_a == TFM__A_AS_IT_LIES && r1 - r0 <= turn_rows && p->b_row == 1
        && !p->b_panels && !p->strips;
    const int64_t step = in_place || turned ? (plain_bias ? j1 - j0 : TFM__PRODUCT_BIASES) : TFM__PRODUCT_COLS;
    const int64_t most_k = turned ? tfm__max64(p->depth, 1) : tfm__product_depth(k, p, r1 - r0, in_place, packs_a);
    const int64_t blocks = tfm__max64(tfm__ceil_div(p->depth, most_k), 1);
    const int64_t block_k = tfm__round_up(tfm__ceil_div(p->depth, blocks), 2); /* pairs are not cut */
    tfm__gemm g;
    int64_t k0 = 0, j;
    memset(&g, 0, sizeof(g));
    g.rows = r1 - r0;
    g.c_row = c_row;
    g.activation = p->activation;
    g.cached = p->cached;
    do {
        const int64_t depth = tfm__min64(block_k, p->depth - k0);
        g.depth = depth;
        g.accumulate = k0 > 0;
        g.finish = k0 + g.depth == p->depth;
        g.strips = p->strips;
        if (p->strips) {
            g.a = (const float *)p->a + k0 * k->tile_rows;
            g.a_row = k->tile_rows * p->depth;
        } else {
            const char *const a = tfm__byte(p->a, p->a_dtype, r0 * p->a_row + k0 * p->a_col);
            g.a = (const float *)(const void *)a;
            g.a_row = p->a_row;
            if (packs_a == TFM__A_ROWS) {
                tfm__product_rows(k, p, a, g.rows, g.depth, scratch + TFM__PRODUCT_A);
                g.a = scratch + TFM__PRODUCT_A;
                g.a_row = p->pairs ? g.depth / 2 : g.depth;
            } else if (packs_a == TFM__A_STRIPS) {
                k->pack_strips(scratch + TFM__PRODUCT_A, a, p->a_dtype, p->a_row, p->a_col, g.rows, g.depth);
                g.strips = tfm__ceil_div(g.rows, k->tile_rows);
                g.a = scratch + TFM__PRODUCT_A;
                g.a_row = k->tile_rows * g.depth;
            }
        }
        for (j = j0; j < j1; j += step) {
            g.cols = tfm__min64(step, j1 - j);
            g.c = c + (j - j0);
            if (!in_place && j + step < j1) {
                tfm__product_ahead(p, k0, j + step, tfm__min64(step, j1 - j - step), &g);
            } else if (!in_place) {
                tfm__product_ahead(p, k0 + g.depth, j0, tfm__min64(step, j1 - j0), &g);
            }
            g.bias = g.finish ? tfm__product_bias(k, p, j, g.cols, scratch) : NULL;
            if (turned) {
                g.b = tfm__byte(p->b, p->b_dtype, j * p->b_col);
                g.b_dtype = p->b_dtype;
                g.b_row = p->b_col;
                k->gemm_turned(&g);
                continue;
            }
            tfm__product_b(k, p, k0, j, in_place, scratch, &g);
            g.depth = p->pairs ? depth / 2 : depth;
            k->gemm(&g);
            g.depth = depth;
        }
        k0 += depth;
    } while (k0 < p->depth);
}

/* Rows [r0, r1) and columns [j0, j1), j0 a multiple of 16, on this thread; scratch: TFM__SCRATCH_BYTES. All rows if A
 * is in strips, and then no more than TFM__PRODUCT_HIGH if C is not in f32. */
static void tfm__product_tile(const struct tfm__kernels *k, const tfm__product *p, int64_t r0, int64_t r1, int64_t j0,
                              int64_t j1, void *scratch) {
    float *const s = (float *)scratch;
    const int64_t size = tfm_dtype_size(p->c_dtype), most = p->strips ? r1 - r0 : k->block_m;
    int64_t r, j, i;
    for (r = r0; r < r1; r += most) {
        const int64_t last = tfm__min64(r1, r + most);
        const int64_t cols = TFM__PRODUCT_NARROW / (last - r) / TFM__PRODUCT_COLS * TFM__PRODUCT_COLS;
        char *const c = (char *)p->c + r * p->c_row * size;
        if (p->c_dtype == TFM_F32) {
            tfm__product_block(k, p, r, last, j0, j1, s, (float *)(void *)c + j0, p->c_row);
            continue;
        }
        for (j = j0; j < j1; j += cols) {
            const int64_t end = tfm__min64(j1, j + cols);
            tfm__product_block(k, p, r, last, j, end, s, s + TFM__PRODUCT_C, cols);
            for (i = 0; i < last - r; ++i) {
                k->store(c + (i * p->c_row + j) * size, p->c_dtype, 1, s + TFM__PRODUCT_C + i * cols, end - j);
            }
        }
    }
}

/* -- with threads -------------------------------------------------------------------------------------------------- */

/* A is packed once for all slots, so much of it at a time: it stays in the last-level cache. */
#define TFM__TEAM_BYTES ((int64_t)4 << 20)

typedef struct tfm__product_job {
    tfm_ctx *c;
    const tfm__product *p;
    int64_t tile_rows, tile_cols, row_tiles; /* tile_rows: strips, where A is in strips */
    float *strips;               /* of a team */
} tfm__product_job;

/* Strips [s0, s1) of p. */
static tfm__product tfm__product_strips(const struct tfm__kernels *k, const tfm__product *p, int64_t s0, int64_t s1) {
    const int64_t first = tfm__strip_begin(p->rows, p->strips, s0);
    tfm__product part = *p;
    part.rows = tfm__strip_begin(p->rows, p->strips, s1) - first;
    part.strips = s1 - s0;
    part.a = (const float *)p->a + s0 * k->tile_rows * p->depth;
    part.c = (char *)p->c + first * p->c_row * tfm_dtype_size(p->c_dtype);
    return part;
}

static void tfm__product_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__product_job *const job = (const tfm__product_job *)arg;
    const tfm__product *const p = job->p;
    int64_t item;
    for (item = begin; item < end; ++item) {
        const int64_t r = item % job->row_tiles * job->tile_rows, j = item / job->row_tiles * job->tile_cols;
        const int64_t end_col = tfm__min64(p->cols, j + job->tile_cols);
        void *const scratch = tfm__scratch(job->c, slot);
        if (p->strips) {
            const int64_t end_strip = tfm__min64(p->strips, r + job->tile_rows);
            const tfm__product part = tfm__product_strips(job->c->k, p, r, end_strip);
            tfm__product_tile(job->c->k, &part, 0, part.rows, j, end_col, scratch);
        } else {
            tfm__product_tile(job->c->k, p, r, tfm__min64(p->rows, r + job->tile_rows), j, end_col, scratch);
        }
    }
}

static double tfm__product_work(const tfm__product *p) {
    const double flops = 2.0 * (double)p->rows * (double)p->cols * (double)p->depth;
    return tfm__max64(p->rows, 2) == 2 ? 2.0 * flops : flops; /* few rows wait for B's bytes, not for arithmetic */
}

/* Cuts C into tiles for all slots; by columns first when A is in strips: each slot packs its own part of B. */
static void tfm__product_grid(tfm_ctx *c, const tfm__product *p) {
    const int64_t wanted = c->threads > 1 ? 4 * (int64_t)c->threads : 1, high = p->strips ? 1 : c->k->tile_rows;
    const int64_t rows = p->strips ? p->strips : p->rows, col_groups = tfm__ceil_div(p->cols, TFM__PRODUCT_COLS);
    const int64_t row_tiles = p->strips ? tfm__ceil_div(wanted, col_groups) : tfm__ceil_div(rows, c->k->block_m);
    tfm__product_job job;
    job.c = c;
    job.p = p;
    job.tile_rows = tfm__round_up(tfm__ceil_div(rows, row_tiles), high);
    job.row_tiles = tfm__ceil_div(rows, job.tile_rows);
    job.tile_cols = tfm__round_up(tfm__ceil_div(p->cols, tfm__ceil_div(wanted, job.row_tiles)), TFM__PRODUCT_COLS);
    tfm__for(c, job.row_tiles * tfm__ceil_div(p->cols, job.tile_cols), 1, tfm__product_work(p), tfm__product_task,
             &job);
}

static void tfm__product_pack_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__product_job *const job = (const tfm__product_job *)arg;
    const tfm__product *const p = job->p;
    const struct tfm__kernels *const k = job->c->k;
    const int64_t count = tfm__ceil_div(p->rows, k->tile_rows);
    (void)slot;
    for (; begin < end; ++begin) {
        const int64_t first = tfm__strip_begin(p->rows, count, begin);
        k->pack_strips(job->strips + begin * k->tile_rows * p->depth, tfm__byte(p->a, p->a_dtype, first * p->a_row),
                       p->a_dtype, p->a_row, p->a_col, tfm__strip_begin(p->rows, count, begin + 1) - first, p->depth);
    }
}

/* Rows of A that a team packs at a time; 0: no team. */
static int64_t tfm__product_team(const tfm_ctx *c, const tfm__product *p) {
    const int64_t high = c->k->tile_rows, fit = p->depth ? TFM__TEAM_BYTES / 4 / p->depth / high * high : 0;
    const int64_t most = p->c_dtype == TFM_F32 ? fit : tfm__min64(fit, TFM__PRODUCT_HIGH / high * high);
    if ((c->threads == 1 && !tfm__product_repacks(c->k, p, p->rows)) || most < c->k->block_m) return 0;
    if (tfm__product_packs_a(c->k, p, p->rows, p->cols) != TFM__A_STRIPS) return 0;
    return tfm__min64(tfm__round_up(p->rows, high), most);
}

/* The product, with shared strips of `team` rows at `strips` when team > 0. */
static void tfm__product_compute(tfm_ctx *c, const tfm__product *p, int64_t team, float *strips) {
    const int64_t high = c->k->tile_rows, size = tfm_dtype_size(p->c_dtype);
    int64_t first, chunk;
    if (p->rows == 0 || p->cols == 0) return;
    if (team == 0) {
        tfm__product_grid(c, p);
        return;
    }
    chunk = tfm__round_up(tfm__ceil_div(p->rows, tfm__ceil_div(p->rows, team)), high);
    for (first = 0; first < p->rows; first += chunk) {
        tfm__product part = *p;
        tfm__product_job job;
        part.rows = tfm__min64(chunk, p->rows - first);
        part.a = tfm__byte(p->a, p->a_dtype, first * p->a_row);
        part.c = (char *)p->c + first * p->c_row * size;
        job.c = c;
        job.p = &part;
        job.strips = strips;
        tfm__for(c, tfm__ceil_div(part.rows, high), 1, 8.0 * (double)part.rows * (double)p->depth,
                 tfm__product_pack_task, &job);
        part.a = strips;
        part.strips = tfm__ceil_div(part.rows, high);
        tfm__product_grid(c, &part);
    }
}

/* 1: few rows of f32 whose weight was read so short a time ago that it may still lie in a last-level cache. Only
 * prefetches depend on the answer (1 x 768 x 3072: 0.75 of that cache's bandwidth by the far ones, 0.92 by these, which
 * cost a tenth of the memory's). */
#define TFM__CACHED_BYTES (16 << 20)
static int tfm__product_cached(tfm_ctx *c, const tfm__product *p) {
    const int slot = (int)((uint64_t)(uintptr_t)p->b * 0x9e3779b97f4a7c15u >> 57);
    const int64_t before = c->reads.bytes;
    int cached;
    if (!p->b_panels) return 0;
    c->reads.bytes += p->cols * p->depth * tfm_dtype_size(p->b_dtype);
    cached = p->rows < 4 && c->reads.from[slot] == p->b && before - c->reads.at[slot] <= TFM__CACHED_BYTES;
    c->reads.from[slot] = p->b;
    c->reads.at[slot] = before;
    return cached;
}

/* Products of the same shape over batch dims; a single one is a batch without dims. */
typedef struct tfm__batch {
    tfm_ctx *c;
    tfm__product p;
    tfm__walk w;                 /* c, a, b */
} tfm__batch;

static tfm__product tfm__batch_item(const tfm__batch *b, const tfm__cursor *at) {
    tfm__product p = b->p;
    p.c = (char *)p.c + at->offset[0] * tfm_dtype_size(p.c_dtype);
    p.a = tfm__byte(p.a, p.a_dtype, at->offset[1]);
    p.b = tfm__byte(p.b, p.b_dtype, at->offset[2]);
    return p;
}

static void tfm__batch_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__batch *const b = (const tfm__batch *)arg;
    tfm__cursor at;
    int64_t item;
    tfm__cursor_at(&b->w, begin, &at);
    for (item = begin; item < end; ++item) {
        const tfm__product p = tfm__batch_item(b, &at);
        tfm__product_tile(b->c->k, &p, 0, p.rows, 0, p.cols, tfm__scratch(b->c, slot));
        tfm__cursor_next(&b->w, &at);
    }
}

/* All items, small ones a slot each, others one after the other with all slots. 0: no memory for the team's strips. */
static int tfm__batch_run(tfm__op *o, tfm__batch *b) {
    const int64_t count = tfm__sizes(b->w.ndim, b->w.shape);
    const double work = tfm__product_work(&b->p);
    const int pairs = o->c->bf16_dot && b->p.b_panels && b->p.b_dtype == TFM_BF16 && b->p.depth % 2 == 0;
    const int alone = count > 1 && (work < 4e6 || count >= 4 * (int64_t)o->c->threads) &&
                      (b->p.rows <= 4 * o->k->block_m || work < 4e6);
    int64_t team;
    float *strips = NULL;
    tfm__cursor at;
    int64_t i;
    b->p.pairs = pairs;
    b->p.cached = o->run && count == 1 && tfm__product_cached(o->c, &b->p);
    team = alone ? 0 : tfm__product_team(o->c, &b->p);
    o->flops = 2.0 * (double)b->p.rows * (double)b->p.cols * (double)b->p.depth * (double)count;
    if (team && !(strips = (float *)tfm__temporary(o, team * b->p.depth * (int64_t)sizeof(float)))) return 0;
    if (!o->run || count == 0 || b->p.rows == 0 || b->p.cols == 0) return 1;
    if (count == 1 && work < TFM__WORK_PER_SLOT) { /* no job: for the smallest, a fifth of the time */
        tfm__product_tile(o->k, &b->p, 0, b->p.rows, 0, b->p.cols, tfm__scratch(o->c, tfm__slot_here(o->c)));
        return 1;
    }
    if (alone) {
        tfm__for(o->c, count, 1, work * (double)count, tfm__batch_task, b);
        return 1;
    }
    tfm__cursor_at(&b->w, 0, &at);
    for (i = 0; i < count && !tfm__cancelled(o->c); ++i) {
        const tfm__product p = tfm__batch_item(b, &at);
        tfm__product_compute(o->c, &p, team, strips);
        tfm__cursor_next(&b->w, &at);
    }
    return 1;
}

/* b->w holds the leading dims and, last, the rows (which do not move b): rows and leading dims that lie like one dim
 * become the rows of one product. */
static void tfm__batch_rows(tfm__batch *b) {
    tfm__walk *const w = &b->w;
    int last;
    tfm__walk_merge(w);
    last = w->ndim - 1;
    b->p.rows = 1;
    b->p.a_row = b->p.c_row = 0;
    if (last < 0 || w->stride[2][last] != 0) return; /* one row each */
    b->p.rows = w->shape[last];
    b->p.c_row = w->stride[0][last];
    b->p.a_row = w->stride[1][last];
    w->ndim = last;
}

/* The product on plain pointers with the threads of the context, not inside a task. In a dry run only its memory is
 * counted. 0: out of memory: leave with NULL. */
TFM__UNUSED static int tfm__product_run(tfm__op *o, const tfm__product *p) {
    tfm__batch b;
    b.c = o->c;
    b.p = *p;
    b.w.ndim = 0;
    b.w.count = 3;
    return tfm__batch_run(o, &b);
}

/* -- tfm_matmul ---------------------------------------------------------------------------------------------------- */

/* 1: a product of plain matrices so small that choosing how to do it would take as long as doing it (8 x 8 x 8: 184 ns,
 * 142; 32 x 32 x 32: 0.78 us, 0.69). */
#define TFM__SMALL_WORK (32 * 32 * 32)
static int tfm__matmul_small(const tfm__op *o, const tfm_tensor *a, const tfm_tensor *b) {
    const int64_t rows = a->shape[0], depth = a->shape[1], cols = b->shape[1], most = TFM__SMALL_WORK;
    return a->ndim == 2 && b->ndim == 2 && a->dtype == TFM_F32 && b->dtype == TFM_F32 && depth == b->shape[0]
        && rows <= most && depth <= most && cols <= most && rows * depth <= most && rows * depth * cols <= most
        && a->stride[1] == 1 && b->stride[1] == 1 && (b->stride[0] != TFM__PANEL || cols % TFM__PANEL == 0) && o->run;
}

TFM_API tfm_tensor *tfm_matmul(tfm_ctx *c, const tfm_tensor *a, const tfm_tensor *b) {
    tfm__op o;
    tfm__batch batch;
    tfm__geometry ga, gb;
    tfm_tensor *y, ta, tb, ty;
    int64_t shape[TFM_MAX_DIMS];
    int leading, i, ndim = 0;
    if (!tfm__enter(c, &o, TFM__OP_MATMUL, 2, a, b)) return NULL;
    if (!tfm__need_float(&o, "a", a) || !tfm__need_float(&o, "b", b)) return NULL;
    if (tfm__matmul_small(&o, a, b)) {
        tfm__gemm g;
        memset(&g, 0, sizeof g);
        shape[0] = g.rows = a->shape[0];
        shape[1] = g.cols = g.c_row = b->shape[1];
        y = tfm__result(&o, TFM_F32, 2, shape);
        if (!y) return tfm__leave(&o, NULL);
        g.depth = a->shape[1];
        g.a = (const float *)a->data;
        g.a_row = a->stride[0];
        g.b = b->data;
        g.b_dtype = TFM_F32;
        g.b_row = b->stride[0];
        g.b_panel = TFM__PANEL;
        g.c = (float *)y->data;
        g.activation = TFM_ACT_NONE;
        o.k->gemm(&g);
        o.flops = 2.0 * (double)(g.rows * g.cols * g.depth);
        return tfm__leave(&o, y);
    }
    if (a->ndim == 0 || b->ndim == 0) {
        return tfm__reject(&o, "a is %s, b is %s: expected 1 dim or more", tfm__describe(&o, a), tfm__describe(&o, b));
    }
    ga = tfm__geometry_of(a);
    gb = tfm__geometry_of(b);
    if (a->ndim == 1) tfm__geometry_insert(&ga, 0, 1, 0); /* a row, and a column: gone again in the result */
    if (b->ndim == 1) tfm__geometry_insert(&gb, 1, 1, 1);
    if (ga.shape[ga.ndim - 1] != gb.shape[gb.ndim - 2]) {
        return tfm__reject(&o, "a is %s, b is %s: the last size of a and the %s size of b differ", tfm__describe(&o, a),
                           tfm__describe(&o, b), b->ndim == 1 ? "only" : "second last");
    }
    memset(&batch, 0, sizeof(batch));
    batch.c = c;
    batch.p.depth = ga.shape[ga.ndim - 1];
    batch.p.cols = gb.shape[gb.ndim - 1];
    batch.p.a_col = ga.stride[ga.ndim - 1];
    batch.p.b_row = gb.stride[gb.ndim - 2];
    batch.p.b_col = gb.stride[gb.ndim - 1];
    ta = *a; /* headers without the multiplied dims: leading dims and rows, and leading dims alone */
    tb = *b;
    ta.ndim = ga.ndim - 2;
    tb.ndim = gb.ndim - 2;
    memcpy(ta.shape, ga.shape, sizeof(ga.shape));
    memcpy(ta.stride, ga.stride, sizeof(ga.stride));
    leading = ta.ndim > tb.ndim ? ta.ndim : tb.ndim;
    for (i = 0; i < leading; ++i) {
        const int64_t m = i < leading - ta.ndim ? 1 : ta.shape[i - (leading - ta.ndim)];
        const int64_t n = i < leading - tb.ndim ? 1 : tb.shape[i - (leading - tb.ndim)];
        if (m != n && m != 1 && n != 1) {
            return tfm__reject(&o, "a is %s, b is %s: leading sizes do not broadcast in dim %d", tfm__describe(&o, a),
                               tfm__describe(&o, b), i);
        }
        shape[ndim++] = m == 1 ? n : m;
    }
    batch.p.rows = ga.shape[ga.ndim - 2];
    if (a->ndim > 1) shape[ndim++] = batch.p.rows;
    if (b->ndim > 1) shape[ndim++] = batch.p.cols;
    y = tfm__result(&o, tfm__promote(a->dtype, b->dtype), ndim, shape);
    if (!y) return tfm__leave(&o, NULL);
    batch.p.a = a->data;
    batch.p.a_dtype = a->dtype;
    batch.p.b = b->data;
    batch.p.b_dtype = b->dtype;
    batch.p.c = y->data;
    batch.p.c_dtype = y->dtype;
    shape[leading] = batch.p.rows; /* the walk: leading dims, rows */
    tfm__walk_init(&batch.w, leading, shape, 3);
    ty = *y;
    ty.ndim = leading;
    tfm__contiguous_strides(leading, shape, ty.stride);
    for (i = 0; i < leading; ++i) {
        ty.shape[i] = shape[i];
        ty.stride[i] *= batch.p.rows * batch.p.cols;
    }
    tfm__walk_operand(&batch.w, 0, &ty);
    tfm__walk_operand(&batch.w, 1, &ta);
    tfm__walk_operand(&batch.w, 2, &tb);
    batch.w.ndim = leading + 1;
    batch.w.shape[leading] = batch.p.rows;
    batch.w.stride[0][leading] = batch.p.cols;
    batch.w.stride[1][leading] = ga.stride[ga.ndim - 2];
    batch.w.stride[2][leading] = 0;
    tfm__batch_rows(&batch);
    if (!tfm__batch_run(&o, &batch)) y = NULL;
    return tfm__leave(&o, y);
}

/* -- tfm_linear ---------------------------------------------------------------------------------------------------- */

TFM_API tfm_tensor *tfm_linear(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                               int activation) {
    tfm__op o;
    tfm__batch batch;
    tfm_tensor *y;
    int64_t shape[TFM_MAX_DIMS], outs, ins;
    int i, last;
    if (!tfm__enter(c, &o, TFM__OP_LINEAR, 2, x, weight)) return NULL;
    if (!tfm__optional(&o, bias)) return tfm__leave(&o, NULL);
    if (!tfm__need_float(&o, "x", x) || !tfm__need_float(&o, "weight", weight)) return NULL;
    if (bias && !tfm__need_float(&o, "bias", bias)) return NULL;
    if (!tfm__need_activation(&o, activation)) return NULL;
    last = x->ndim - 1;
    if (weight->ndim != 2 || last < 0 || x->shape[last] != weight->shape[1] ||
        (x->layout | (bias ? bias->layout : 0)) != TFM_STRIDED) {
        return tfm__reject(&o, "x is %s, weight is %s: expected x (..., in), weight (out, in)", tfm__describe(&o, x),
                           tfm__describe(&o, weight));
    }
    outs = weight->shape[0];
    ins = weight->shape[1];
    if (bias && (bias->ndim != 1 || bias->shape[0] != outs)) {
        return tfm__reject(&o, "weight is %s, bias is %s: expected bias (%lld)", tfm__describe(&o, weight),
                           tfm__describe(&o, bias), (long long)outs);
    }
    memcpy(shape, x->shape, sizeof(shape));
    shape[last] = outs;
    o.number[0] = activation;
    y = tfm__result(&o, tfm__promote(x->dtype, weight->dtype), x->ndim, shape);
    if (!y) return tfm__leave(&o, NULL);
    memset(&batch, 0, sizeof(batch));
    batch.c = c;
    batch.p.cols = outs;
    batch.p.depth = ins;
    batch.p.a = x->data;
    batch.p.a_dtype = x->dtype;
    batch.p.a_col = x->stride[last];
    batch.p.b_panels = weight->layout == TFM_PANELS;
    batch.p.b = batch.p.b_panels ? weight->panels : weight->data;
    batch.p.b_dtype = weight->dtype;
    batch.p.b_col = weight->stride[0];
    batch.p.b_row = weight->stride[1];
    batch.p.c = y->data;
    batch.p.c_dtype = y->dtype;
    batch.p.bias = bias ? bias->data : NULL;
    batch.p.bias_dtype = bias ? bias->dtype : TFM_F32;
    batch.p.bias_step = bias ? bias->stride[0] : 0;
    batch.p.activation = activation;
    tfm__walk_init(&batch.w, last, x->shape, 3);
    for (i = 0; i < last; ++i) {
        batch.w.stride[0][i] = y->stride[i];
        batch.w.stride[1][i] = x->stride[i];
        batch.w.stride[2][i] = 0;
    }
    tfm__batch_rows(&batch);
    if (!tfm__batch_run(&o, &batch)) y = NULL;
    return tfm__leave(&o, y);
}

/* -- tfm_embedding ------------------------------------------------------------------------------------------------- */

typedef struct tfm__lookup {
    const struct tfm__kernels *k;
    tfm__walk w;                 /* the ids */
    const tfm_tensor *weight;
    const void *ids;
    int id_dtype;
    float *y;
} tfm__lookup;

static char *tfm__lookup_row(const tfm__lookup *l, const tfm__cursor *at) {
    const tfm_tensor *const t = l->weight;
    int64_t index[TFM_MAX_DIMS] = {0, 0, 0, 0, 0, 0};
    index[0] = tfm__id_at(l->id_dtype, l->ids, at->offset[0]);
    return (char *)(uintptr_t)tfm__byte(t->layout == TFM_PANELS ? t->panels : t->data, t->dtype, tfm__offset(t, index));
}

/* Rows of halves are fetched while the one before is converted (in memory 0.44 to 0.83 of the time, in a cache 1.03 to
 * 1.1); a copy of f32 is slower with that. */
static void tfm__lookup_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__lookup *const l = (const tfm__lookup *)arg;
    const tfm_tensor *const t = l->weight;
    const int64_t size = t->shape[1], step = t->layout == TFM_PANELS ? TFM__PANEL : t->stride[1];
    const int64_t ahead = t->dtype != TFM_F32 && step == 1 ? 2 * size : 0;
    tfm__scaled_row next;
    tfm__cursor at;
    int64_t i;
    (void)slot;
    memset(&next, 0, sizeof(next));
    tfm__cursor_at(&l->w, begin, &at);
    next.ahead = tfm__lookup_row(l, &at);
    for (i = begin; i < end; ++i) {
        const char *const row = next.ahead;
        tfm__cursor_next(&l->w, &at);
        if (i + 1 < end) {
            next.ahead = tfm__lookup_row(l, &at);
            l->k->scale_rows(&next, 1, 0, ahead);
        }
        l->k->load(l->y + i * size, row, t->dtype, step, size);
    }
}

TFM_API tfm_tensor *tfm_embedding(tfm_ctx *c, const tfm_tensor *weight, const tfm_tensor *ids) {
    tfm__op o;
    tfm__lookup l;
    tfm_tensor *y;
    int64_t shape[TFM_MAX_DIMS];
    if (!tfm__enter(c, &o, TFM__OP_EMBEDDING, 2, weight, ids)) return NULL;
    if (!tfm__need_float(&o, "weight", weight) || !tfm__need_index(&o, "ids", ids)) return NULL;
    if (weight->ndim != 2 || ids->ndim == TFM_MAX_DIMS) {
        return tfm__reject(&o, "weight is %s, ids is %s: expected weight (count, size) and at most %d dims of ids",
                           tfm__describe(&o, weight), tfm__describe(&o, ids), TFM_MAX_DIMS - 1);
    }
    if (!tfm__check_ids(&o, "ids", ids, weight->shape[0])) return NULL;
    memcpy(shape, ids->shape, sizeof(shape));
    shape[ids->ndim] = weight->shape[1];
    y = tfm__result(&o, TFM_F32, ids->ndim + 1, shape);
    o.bytes = y ? 2.0 * (double)tfm_numel(y) * 4.0 : 0.0;
    if (y && o.run && tfm_numel(y)) {
        l.k = o.k;
        l.weight = weight;
        l.ids = ids->data;
        l.id_dtype = ids->dtype;
        l.y = (float *)y->data;
        tfm__walk_init(&l.w, ids->ndim, ids->shape, 1);
        tfm__walk_operand(&l.w, 0, ids);
        tfm__walk_merge(&l.w);
        tfm__for(c, tfm_numel(ids), tfm__max64(1, TFM__RUN / weight->shape[1]), 8.0 * (double)tfm_numel(y),
                 tfm__lookup_task, &l);
    }
    return tfm__leave(&o, y);
}

/* ==================================================================================================================
 *  9  MASKS, ATTENTION, CACHE
 *
 *  A mask is never a matrix here. What order, window, prefix and lengths say about a query is one range of keys;
 *  matrices, segments and biases of the caller are read where they lie, by strides. Attention asks about one tile (rows
 *  of queries) and one block of keys at a time: nothing of it attended, all of it, or some. tfm_mask_matrix asks the
 *  same functions.
 * ================================================================================================================ */

/* -- constructors -------------------------------------------------------------------------------------------------- */

static tfm_mask tfm__mask_none(void) {
    tfm_mask mask;
    memset(&mask, 0, sizeof mask);
    return mask;
}

TFM_API tfm_mask tfm_mask_causal(void) {
    tfm_mask mask = tfm__mask_none();
    mask.causal = TFM_CAUSAL_TOP_LEFT;
    return mask;
}

TFM_API tfm_mask tfm_mask_keep(const tfm_tensor *keep) {
    tfm_mask mask = tfm__mask_none();
    mask.keep = keep;
    return mask;
}

TFM_API tfm_mask tfm_mask_ignore(const tfm_tensor *ignore) {
    tfm_mask mask = tfm__mask_none();
    mask.ignore = ignore;
    return mask;
}

TFM_API tfm_mask tfm_mask_nonzero(const tfm_tensor *nonzero) {
    tfm_mask mask = tfm__mask_none();
    mask.nonzero = nonzero;
    return mask;
}

TFM_API tfm_mask tfm_mask_additive(const tfm_tensor *bias) {
    tfm_mask mask = tfm__mask_none();
    mask.bias = bias;
    return mask;
}

TFM_API tfm_mask tfm_mask_padding(const tfm_tensor *key_lengths) {
    tfm_mask mask = tfm__mask_none();
    mask.key_lengths = key_lengths;
    return mask;
}

/* -- positions ----------------------------------------------------------------------------------------------------- */

/* T5's buckets, in the f32 arithmetic of mesh-tensorflow and Hugging Face: half of the buckets hold one distance each,
 * the others grow logarithmically up to max_distance. */
TFM_API int64_t tfm_relative_bucket(int64_t distance, int64_t buckets, int64_t max_distance, int one_way) {
    const int64_t side = one_way ? buckets : buckets / 2, exact = side / 2;
    const int64_t first = !one_way && distance > 0 ? side : 0;
    const int64_t most = max_distance > 0 ? max_distance : 128;
    int64_t n = distance < -INT64_MAX ? INT64_MAX : distance < 0 ? -distance : distance;
    float share;
    if (one_way && distance > 0) n = 0;
    if (n < exact) return first + n;
    if (n >= most || exact < 1) return first + tfm__max64(side - 1, 0);
    share = (float)log((double)((float)n / (float)exact)) / (float)log((double)most / (double)exact);
    n = exact + (int64_t)(share * (float)(side - exact));
    return first + tfm__min64(n, side - 1);
}

/* Slopes of Press et al. 2022: 2^(-8 (h + 1) / n) for n = the power of two at or below `heads`; heads past it take
 * every other slope of 2n heads. */
static double tfm__alibi_slope(int64_t head, int64_t heads) {
    int64_t n = 1;
    while (n <= heads / 2) n *= 2;
    return head < n ? pow(2.0, -8.0 * (double)(head + 1) / (double)n)
                    : pow(2.0, -8.0 * (double)(2 * (head - n) + 1) / (double)(2 * n));
}

TFM_API tfm_tensor *tfm_alibi_slopes(tfm_ctx *c, int64_t heads) {
    tfm__op o;
    tfm_tensor *y;
    int64_t h;
    if (!tfm__enter(c, &o, TFM__OP_ALIBI_SLOPES, 0)) return NULL;
    if (heads < 0) return tfm__reject(&o, "heads is %lld: expected at least 0", (long long)heads);
    y = tfm__result(&o, TFM_F32, 1, &heads);
    for (h = 0; y && o.run && h < heads; ++h) ((float *)y->data)[h] = (float)tfm__alibi_slope(h, heads);
    return tfm__leave(&o, y);
}

/* -- checks -------------------------------------------------------------------------------------------------------- */

#define TFM__MASK_FAR ((int64_t)1 << 60)   /* positions beyond it would overflow; twice it is wider than any window */
#define TFM__MASK_REACH 65536              /* the relative bias is tabled by distance up to relative_max_distance */

enum { TFM__MASK_KEEP, TFM__MASK_IGNORE, TFM__MASK_NONZERO, TFM__MASK_BIAS, TFM__MASK_MATRICES };

static int tfm__mask_check_numbers(tfm__op *o, const tfm_mask *mask) {
    const struct {
        const char *name;
        int64_t value;
    } sizes[] = {{"window_left", mask->window_left}, {"window_right", mask->window_right}, {"prefix", mask->prefix},
                 {"relative_max_distance", mask->relative_max_distance}};
    int64_t i;
    for (i = 0; i < TFM__COUNT(sizes); ++i) {
        if (sizes[i].value >= 0) continue;
        tfm__reject(o, "mask.%s is %lld: expected 0 (off) or more", sizes[i].name, (long long)sizes[i].value);
        return 0;
    }
    if (mask->causal < TFM_CAUSAL_NONE || mask->causal > TFM_CAUSAL_OFFSET) {
        tfm__reject(o, "mask.causal is %d: expected one of TFM_CAUSAL_*", mask->causal);
    } else if (mask->causal != TFM_CAUSAL_OFFSET && (mask->offset != 0 || mask->offsets)) {
        tfm__reject(o, "mask.offset and offsets belong to mask.causal = TFM_CAUSAL_OFFSET, which is not set");
    } else if (mask->offset != 0 && mask->offsets) {
        tfm__reject(o, "mask.offset and mask.offsets are both given: one of them must stay empty");
    } else if (mask->offset < -TFM__MASK_FAR || mask->offset > TFM__MASK_FAR) {
        tfm__reject(o, "mask.offset is %lld: out of range", (long long)mask->offset);
    } else if (mask->prefix != 0 && mask->prefixes) {
        tfm__reject(o, "mask.prefix and mask.prefixes are both given: one of them must stay empty");
    } else if (!(mask->softcap >= 0.0f) || tfm__isinf(mask->softcap)) {
        tfm__reject(o, "mask.softcap is %g: expected 0 (off) or a positive number", (double)mask->softcap);
    } else if (!mask->query_segments != !mask->key_segments) {
        tfm__reject(o, "mask.%s is given without mask.%s: segments come in pairs",
                    mask->query_segments ? "query_segments" : "key_segments",
                    mask->query_segments ? "key_segments" : "query_segments");
    } else {
        return 1;
    }
    return 0;
}

/* Every element of a vector by batch row lies in [low, high]. */
static int tfm__mask_check_range(tfm__op *o, const char *name, const tfm_tensor *t, int64_t low, int64_t high) {
    int64_t b;
    for (b = 0; t && o->run && b < t->shape[0]; ++b) {
        const int64_t value = tfm__id_at(t->dtype, t->data, b * t->stride[0]);
        if (value >= low && value <= high) continue;
        tfm__reject(o, "mask.%s[%lld] is %lld: expected %lld to %lld", name, (long long)b, (long long)value,
                    (long long)low, (long long)high);
        return 0;
    }
    return 1;
}

static int tfm__mask_check_vectors(tfm__op *o, const tfm_mask *mask, const int64_t size[4]) {
    const int64_t batch = size[0], heads = size[1], queries = size[2], keys = size[3];
    const tfm_tensor *const table = mask->relative_bias;
    const struct {
        const char *name, *meaning;
        const tfm_tensor *t;
        int ndim, index;
        int64_t shape[2];
    } rows[] = {
        {"offsets", "(batch)", mask->offsets, 1, 1, {batch, 0}},
        {"prefixes", "(batch)", mask->prefixes, 1, 1, {batch, 0}},
        {"key_lengths", "(batch)", mask->key_lengths, 1, 1, {batch, 0}},
        {"query_lengths", "(batch)", mask->query_lengths, 1, 1, {batch, 0}},
        {"query_segments", "(batch, queries)", mask->query_segments, 2, 1, {batch, queries}},
        {"key_segments", "(batch, keys)", mask->key_segments, 2, 1, {batch, keys}},
        {"alibi_slopes", "(heads)", mask->alibi_slopes, 1, 0, {heads, 0}},
        {"relative_bias", "(buckets, heads)", table, 2, 0, {table && table->ndim == 2 ? table->shape[0] : 0, heads}},
        {"sinks", "(heads)", mask->sinks, 1, 0, {heads, 0}}
    };
    int64_t i;
    for (i = 0; i < TFM__COUNT(rows); ++i) {
        const tfm_tensor *const t = rows[i].t;
        if (!tfm__optional(o, t)) return 0;
        if (!t) continue;
        if (rows[i].index ? !tfm__is_index(t->dtype) : !tfm__is_float(t->dtype)) {
            tfm__reject(o, "mask.%s is %s: expected %s", rows[i].name, tfm__describe(o, t),
                        rows[i].index ? "i64 or i32" : "f32, f16 or bf16");
            return 0;
        }
        if (t->ndim != rows[i].ndim || t->shape[0] != rows[i].shape[0]
            || (t->ndim == 2 && t->shape[1] != rows[i].shape[1])) {
            tfm__reject(o, "mask.%s is %s: expected %s = %s", rows[i].name, tfm__describe(o, t), rows[i].meaning,
                        tfm__describe_shape(o, rows[i].ndim, rows[i].shape));
            return 0;
        }
    }
    if (table) {
        const int64_t most = mask->relative_max_distance ? mask->relative_max_distance : 128;
        const int64_t side = mask->relative_one_way ? table->shape[0] : table->shape[0] / 2;
        if (side < 2 || most <= side / 2 || most > TFM__MASK_REACH) {
            tfm__reject(o, "mask.relative_bias has %lld buckets and mask.relative_max_distance is %lld: expected "
                        "at least %d buckets and a distance above %lld, at most %d",
                        (long long)table->shape[0], (long long)most, mask->relative_one_way ? 2 : 4,
                        (long long)(side / 2), TFM__MASK_REACH);
            return 0;
        }
    }
    return tfm__mask_check_range(o, "offsets", mask->offsets, -TFM__MASK_FAR, TFM__MASK_FAR)
        && tfm__mask_check_range(o, "prefixes", mask->prefixes, 0, INT64_MAX)
        && tfm__mask_check_range(o, "key_lengths", mask->key_lengths, 0, keys)
        && tfm__mask_check_range(o, "query_lengths", mask->query_lengths, 0, queries);
}

static int tfm__mask_check_matrices(tfm__op *o, const tfm_mask *mask, const int64_t size[4]) {
    static const char *const other =
        "a bool matrix with true = attend belongs in mask.keep, with true = do not attend in "
                                     "mask.ignore";
    const struct {
        const char *name;
        const tfm_tensor *t;
        const char *expected;
    } rows[] = {
        {"keep", mask->keep, "an additive 0 / -inf mask belongs in mask.bias, a 0 / 1 number mask in mask.nonzero"},
        {"ignore", mask->ignore, "an additive 0 / -inf mask belongs in mask.bias, a 0 / 1 number mask in mask.nonzero"},
        {"nonzero", mask->nonzero, NULL},
        {"bias", mask->bias, mask->bias && mask->bias->dtype == TFM_BOOL ? other
            : "numbers where 0 = do not attend belong in mask.nonzero; a bias is f32, f16 or bf16 (tfm_cast)"}
    };
    int i, d;
    for (i = 0; i < TFM__MASK_MATRICES; ++i) {
        const tfm_tensor *const t = rows[i].t;
        int fits;
        if (!tfm__optional(o, t)) return 0;
        if (!t) continue;
        if ((i == TFM__MASK_BIAS && !tfm__is_float(t->dtype)) || (i < TFM__MASK_NONZERO && t->dtype != TFM_BOOL)) {
            tfm__reject(o, "mask.%s is %s: %s", rows[i].name, tfm_dtype_name(t->dtype), rows[i].expected);
            return 0;
        }
        fits = t->ndim <= 4;
        for (d = 0; fits && d < t->ndim; ++d) fits = t->shape[d] == 1 || t->shape[d] == size[4 - t->ndim + d];
        if (!fits) {
            tfm__reject(o, "mask.%s is %s: does not broadcast to (batch, heads, queries, keys) = %s; a matrix by batch "
                        "row needs a heads dimension of 1 (tfm_unsqueeze)", rows[i].name, tfm__describe(o, t),
                        tfm__describe_shape(o, 4, size));
            return 0;
        }
    }
    return 1;
}

/* 1 = fine; 0 = the op is rejected and left. size: batch, heads, queries, keys. Adds the mask's 13 tensors to the op's
 * inputs, in the order of the two tables above, absent ones as NULL. */
static int tfm__mask_check(tfm__op *o, const tfm_mask *mask, const int64_t size[4]) {
    return tfm__mask_check_numbers(o, mask) && tfm__mask_check_vectors(o, mask, size)
        && tfm__mask_check_matrices(o, mask, size);
}

/* -- a mask made ready --------------------------------------------------------------------------------------------- */

typedef struct tfm__mask_row {
    int64_t shift;              /* query i stands at position i + shift */
    int64_t prefix, keys, queries;
} tfm__mask_row;

typedef struct tfm__mask_matrix {
    int kind, dtype;            /* TFM__MASK_* */
    const char *data;
    int64_t size, stride[4];    /* bytes of an element; broadcasting strides, in elements */
} tfm__mask_matrix;

typedef struct tfm__masking {
    const tfm__kernels *k;
    int64_t size[4];            /* batch, heads, queries, keys */
    int causal, boolean;        /* boolean: matrices or segments may cut keys out of a row's range */
    int additive;               /* something is added to scores */
    int lone_bias;              /* nothing but one matrix is, and nothing else cuts keys out */
    float softcap;
    int64_t window_left, window_right;
    tfm__mask_row *rows;        /* [batch] */
    int matrices;
    tfm__mask_matrix matrix[TFM__MASK_MATRICES];
    const tfm_tensor *query_segments, *key_segments;
    float *slopes, *sinks;      /* [heads], or NULL */
    /* [heads][2 reach + 1]: bias by distance from -reach to reach, both ends for all beyond */
    float *relative;
    int64_t reach;
    float ramp[TFM__BLOCK_KEYS];/* 0, 1, 2, ... */
} tfm__masking;

static void tfm__mask_set_rows(tfm__masking *m, const tfm_mask *mask, const int64_t *held, const int64_t *start) {
    int64_t b;
    for (b = 0; b < m->size[0]; ++b) {
        tfm__mask_row *const row = &m->rows[b];
#define TFM__MASK_AT(t, otherwise) ((t) ? tfm__id_at((t)->dtype, (t)->data, b * (t)->stride[0]) : (otherwise))
        row->prefix = TFM__MASK_AT(mask->prefixes, mask->prefix);
        row->keys = TFM__MASK_AT(mask->key_lengths, m->size[3]);
        row->queries = TFM__MASK_AT(mask->query_lengths, m->size[2]);
        if (held) row->keys = tfm__min64(row->keys, held[b]);
        if (start && mask->causal == TFM_CAUSAL_BOTTOM_RIGHT && !mask->query_lengths) {
            row->queries = tfm__min64(row->queries, held[b] - start[b]);
        }
        switch (mask->causal) {
        case TFM_CAUSAL_TOP_LEFT: row->shift = 0; break;
        case TFM_CAUSAL_OFFSET: row->shift = TFM__MASK_AT(mask->offsets, mask->offset); break;
        case TFM_CAUSAL_BOTTOM_RIGHT: row->shift = start ? start[b] : row->keys - row->queries; break;
        default: row->shift = start ? start[b] : 0; break;
        }
#undef TFM__MASK_AT
    }
}

static void tfm__mask_set_relative(tfm__masking *m, const tfm_mask *mask) {
    const tfm_tensor *const table = mask->relative_bias;
    const int64_t width = 2 * m->reach + 1;
    int64_t d, h;
    for (d = 0; d < width; ++d) {
        const int64_t bucket = tfm_relative_bucket(d - m->reach, table->shape[0], m->reach, mask->relative_one_way);
        for (h = 0; h < m->size[1]; ++h) {
            m->k->load(m->relative + h * width + d, tfm__at(table, bucket * table->stride[0] + h * table->stride[1]),
                       table->dtype, 1, 1);
        }
    }
}

static void tfm__mask_set_matrix(tfm__masking *m, int kind, const tfm_tensor *t) {
    tfm__mask_matrix *const x = &m->matrix[m->matrices];
    int d;
    if (!t) return;
    m->matrices++;
    m->boolean = 1;
    m->additive |= kind == TFM__MASK_BIAS;
    x->kind = kind;
    x->dtype = t->dtype;
    x->data = (const char *)t->data;
    x->size = tfm_dtype_size(t->dtype);
    for (d = 0; d < 4; ++d) {
        const int from = d - (4 - t->ndim);
        x->stride[d] = from < 0 || t->shape[from] == 1 ? 0 : t->stride[from];
    }
}

/* Makes a checked mask ready, after the op's results were made. held, start: per batch row, what a cache holds and
 * where the last append began; NULL without a cache. 0 = out of memory: leave with NULL. */
static int tfm__mask_prepare(tfm__op *o, tfm__masking *m, const tfm_mask *mask, const int64_t size[4],
                             const int64_t *held, const int64_t *start) {
    const int64_t floats = (int64_t)sizeof(float);
    int64_t i;
    memset(m, 0, sizeof *m);
    m->k = o->k;
    memcpy(m->size, size, sizeof m->size);
    m->causal = mask->causal != TFM_CAUSAL_NONE;
    m->softcap = mask->softcap;
    m->window_left = tfm__min64(mask->window_left, 2 * TFM__MASK_FAR);
    m->window_right = tfm__min64(mask->window_right, 2 * TFM__MASK_FAR);
    m->query_segments = mask->query_segments;
    m->key_segments = mask->key_segments;
    m->boolean = mask->query_segments != NULL;
    m->additive = mask->alibi_slopes || mask->relative_bias;
    m->reach = mask->relative_max_distance ? mask->relative_max_distance : 128;
    tfm__mask_set_matrix(m, TFM__MASK_KEEP, mask->keep);
    tfm__mask_set_matrix(m, TFM__MASK_IGNORE, mask->ignore);
    tfm__mask_set_matrix(m, TFM__MASK_NONZERO, mask->nonzero);
    tfm__mask_set_matrix(m, TFM__MASK_BIAS, mask->bias);
    m->lone_bias = mask->bias && m->matrices == 1 && !m->query_segments && !mask->alibi_slopes && !mask->relative_bias;
    for (i = 0; i < TFM__BLOCK_KEYS; ++i) m->ramp[i] = (float)i;
    m->rows = (tfm__mask_row *)tfm__temporary(o, size[0] * (int64_t)sizeof(tfm__mask_row));
    if (!m->rows) return 0;
    if (mask->alibi_slopes && !(m->slopes = (float *)tfm__temporary(o, size[1] * floats))) return 0;
    if (mask->sinks && !(m->sinks = (float *)tfm__temporary(o, size[1] * floats))) return 0;
    if (mask->relative_bias && !(m->relative = (float *)tfm__temporary(o, size[1] * (2 * m->reach + 1) * floats))) {
        return 0;
    }
    if (!o->run) return 1;
    tfm__mask_set_rows(m, mask, held, start);
    if (m->slopes) {
        m->k->load(m->slopes, mask->alibi_slopes->data, mask->alibi_slopes->dtype, mask->alibi_slopes->stride[0],
                   size[1]);
    }
    if (m->sinks) m->k->load(m->sinks, mask->sinks->data, mask->sinks->dtype, mask->sinks->stride[0], size[1]);
    if (m->relative) tfm__mask_set_relative(m, mask);
    return 1;
}

/* -- a tile of queries against a block of keys --------------------------------------------------------------------- */

enum { TFM__TILE_EMPTY, TFM__TILE_FULL, TFM__TILE_MIXED };

typedef struct tfm__mask_tile {
    int64_t batch, rows;
    int64_t query[TFM__ATTN_ROWS], head[TFM__ATTN_ROWS];
    /* keys [low, high) that order, window, prefix, lengths leave a row */
    int64_t low[TFM__ATTN_ROWS], high[TFM__ATTN_ROWS];
    int64_t first, last;                                 /* and [first, last) to any row: first >= last: none */
    int even;                                            /* 1: every row has that range */
    /* of the block at hand */
    /* its keys, cut behind the last one that any row's range holds */
    int64_t key, keys;
    unsigned char state[TFM__ATTN_ROWS];                 /* TFM__TILE_*: what matrices and segments leave of a row */
    unsigned char *allowed;                              /* [rows][TFM__BLOCK_KEYS] of 0 and 1, where state is MIXED */
} tfm__mask_tile;

static void tfm__mask_range(const tfm__masking *m, int64_t b, int64_t i, int64_t *low, int64_t *high) {
    const tfm__mask_row *const row = &m->rows[b];
    const int64_t p = i + row->shift;
    *low = 0;
    *high = row->keys;
    if (m->causal) *high = tfm__min64(*high, p + 1);
    if (m->window_right) *high = tfm__min64(*high, p + m->window_right);
    *high = tfm__min64(tfm__max64(*high, row->prefix), row->keys);
    if (m->window_left) *low = tfm__max64(0, p - m->window_left + 1);
    if (i >= row->queries || *low >= *high) *low = *high = 0;
}

/* After batch, rows, query, head and allowed are set. */
static void tfm__mask_tile_begin(const tfm__masking *m, tfm__mask_tile *t) {
    const int flat = !m->causal && !m->window_left && !m->window_right && t->rows > 0
        && t->query[t->rows - 1] < m->rows[t->batch].queries;
    int64_t low = 0, high = 0, r;
    t->first = INT64_MAX;
    t->last = 0;
    t->even = 1;
    for (r = 0; r < t->rows; ++r) {
        if (r == 0 || (!flat && t->query[r] != t->query[r - 1])) {
            tfm__mask_range(m, t->batch, t->query[r], &low, &high);
            t->even &= r == 0 || (low == t->low[r - 1] && high == t->high[r - 1]);
            t->first = low < high ? tfm__min64(t->first, low) : t->first;
            t->last = low < high ? tfm__max64(t->last, high) : t->last;
        }
        t->low[r] = low;
        t->high[r] = high;
        t->state[r] = TFM__TILE_FULL;
    }
}

/* allowed[j] &= p[j * step] says so, for bytes where `yes` (0 or 1) tells which truth means attend. */
static void tfm__mask_and_bytes(unsigned char *allowed, const unsigned char *p, int64_t step, int yes, int64_t n) {
    const uint64_t ones = (uint64_t)0x01010101 << 32 | 0x01010101, low = ones * 0x7f;
    int64_t j = 0;
    for (; step == 1 && j + 8 <= n; j += 8) {
        uint64_t x, y;
        memcpy(&x, p + j, 8);
        memcpy(&y, allowed + j, 8);
        x = (((x & low) + low) | x) >> 7 & ones; /* 1 in every byte that is not 0 */
        y &= yes ? x : x ^ ones;
        memcpy(allowed + j, &y, 8);
    }
    for (; j < n; ++j) allowed[j] = (unsigned char)(allowed[j] & ((p[j * step] != 0) == yes));
}

/* allowed &= what one matrix says about keys from element `at` on. */
static void tfm__mask_and_matrix(const tfm__masking *m, const tfm__mask_matrix *x, int64_t at, int64_t n,
                                 unsigned char *allowed) {
    const char *const p = x->data + at * x->size;
    float value[TFM__BLOCK_KEYS];
    const float *v = value;
    int64_t j;
    if (x->size == 1 && x->kind != TFM__MASK_BIAS) {
        tfm__mask_and_bytes(allowed, (const unsigned char *)p, x->stride[3], x->kind != TFM__MASK_IGNORE, n);
        return;
    }
    if (x->dtype == TFM_F64) { /* as f32 a tiny number could become 0 */
        for (j = 0; j < n; ++j) {
            allowed[j] = (unsigned char)(allowed[j] & (((const double *)(const void *)p)[j * x->stride[3]] != 0.0));
        }
        return;
    }
    if (x->dtype == TFM_F32 && x->stride[3] == 1) {
        v = (const float *)(const void *)p;
    } else {
        m->k->load(value, p, x->dtype, x->stride[3], n);
    }
    if (x->kind == TFM__MASK_NONZERO) {
        for (j = 0; j < n; ++j) allowed[j] = (unsigned char)(allowed[j] & (v[j] != 0.0f));
    } else if (!(m->k->reduce(TFM__R_MIN, v, n) > tfm__bits_float(0xff800000u))) {
        for (j = 0; j < n; ++j) allowed[j] = (unsigned char)(allowed[j] & (tfm__float_bits(v[j]) != 0xff800000u));
    }
}

static int64_t tfm__mask_at(const tfm__mask_matrix *x, const tfm__mask_tile *t, int64_t r) {
    return t->batch * x->stride[0] + t->head[r] * x->stride[1] + t->query[r] * x->stride[2] + t->key * x->stride[3];
}

/* What the tile at work fetches for the one that comes next, at `key`: rows of a matrix, pieces of 128 to 512 bytes so
 * far apart that the hardware does not see where they go on. NULL: nothing. */
static const char *tfm__mask_next(const tfm__masking *m, const tfm__mask_tile *t, int64_t key, int64_t *row,
                                  int64_t *bytes) {
    const tfm__mask_matrix *const x = &m->matrix[tfm__max64(m->matrices - 1, 0)];
    const int64_t at = t->batch * x->stride[0] + t->head[0] * x->stride[1] + t->query[0] * x->stride[2] + key;
    *row = x->stride[2] * x->size;
    *bytes = TFM__BLOCK_KEYS * x->size;
    if (m->matrices == 0 || *row <= 0 || x->stride[3] != 1 || key >= t->last
        || key + TFM__BLOCK_KEYS <= t->first) return NULL;
    return x->data + at * x->size;
}

static int64_t tfm__mask_segment(const tfm_tensor *t, int64_t b, int64_t i) {
    return tfm__id_at(t->dtype, t->data, b * t->stride[0] + i * t->stride[1]);
}

/* 1: matrices and segments say the same about rows r - 1 and r (heads of a group, padding masks). */
static int tfm__mask_same_row(const tfm__masking *m, const tfm__mask_tile *t, int64_t r) {
    int i;
    for (i = 0; i < m->matrices; ++i) {
        if (tfm__mask_at(&m->matrix[i], t, r) != tfm__mask_at(&m->matrix[i], t, r - 1)) return 0;
    }
    return !m->query_segments || tfm__mask_segment(m->query_segments, t->batch, t->query[r])
        == tfm__mask_segment(m->query_segments, t->batch, t->query[r - 1]);
}

/* 1: the matrix says -inf neither of row r's first key of the block at hand nor of its last one. */
static int tfm__mask_open_ends(const tfm__mask_matrix *x, const tfm__mask_tile *t, int64_t r) {
    const char *const first = x->data + tfm__mask_at(x, t, r) * x->size;
    const char *const last = first + (t->keys - 1) * x->stride[3] * x->size;
    const uint32_t minus_inf = x->dtype == TFM_F32 ? 0xff800000u : x->dtype == TFM_F16 ? 0xfc00u : 0xff80u;
    uint32_t a[2] = {0, 0};
    memcpy(&a[0], first, (size_t)x->size);
    memcpy(&a[1], last, (size_t)x->size);
    return a[0] != minus_inf && a[1] != minus_inf;
}

/* Fills allowed and state of the rows for the block at hand. Returns 0 when nothing is left of any row. */
static int tfm__mask_read(const tfm__masking *m, tfm__mask_tile *t) {
    const size_t n = (size_t)t->keys;
    int64_t segment[TFM__BLOCK_KEYS], r, j;
    int any = 0, i;
    for (j = 0; m->key_segments && j < t->keys; ++j) {
        segment[j] = tfm__mask_segment(m->key_segments, t->batch, t->key + j);
    }
    for (r = 0; r < t->rows; ++r) {
        unsigned char *const allowed = t->allowed + r * TFM__BLOCK_KEYS;
        if (m->lone_bias && tfm__mask_open_ends(&m->matrix[0], t, r)) {
            t->state[r] = TFM__TILE_FULL; /* what lies between is left to attn_bias: looking costs as much as adding */
        } else if (r > 0 && tfm__mask_same_row(m, t, r)) {
            memcpy(allowed, allowed - TFM__BLOCK_KEYS, n);
            t->state[r] = t->state[r - 1];
        } else {
            memset(allowed, 1, n);
            for (i = 0; i < m->matrices; ++i) {
                tfm__mask_and_matrix(m, &m->matrix[i], tfm__mask_at(&m->matrix[i], t, r), t->keys, allowed);
            }
            if (m->query_segments) {
                const int64_t own = tfm__mask_segment(m->query_segments, t->batch, t->query[r]);
                for (j = 0; j < t->keys; ++j) allowed[j] = (unsigned char)(allowed[j] & (segment[j] == own));
            }
            t->state[r] = !memchr(allowed, 0, n) ? TFM__TILE_FULL : memchr(allowed, 1, n) ? TFM__TILE_MIXED
                : TFM__TILE_EMPTY;
        }
        any |= t->state[r] != TFM__TILE_EMPTY && t->low[r] < t->key + t->keys && t->high[r] > t->key;
    }
    return any;
}

/* How much of the keys [key, key + count) the tile's rows attend, TFM__TILE_*. Sets t->key, keys, state and allowed. */
static int tfm__mask_block(const tfm__masking *m, tfm__mask_tile *t, int64_t key, int64_t count) {
    int64_t end = key, r;
    int full = 1;
    t->key = key;
    t->keys = 0;
    if (t->first >= key + count || t->last <= key) return TFM__TILE_EMPTY;
    if (t->even) end = tfm__min64(t->last, key + count);
    for (r = 0; !t->even && r < t->rows; ++r) {
        if (t->low[r] < key + count && t->high[r] > key) end = tfm__max64(end, tfm__min64(t->high[r], key + count));
    }
    if (end == key) return TFM__TILE_EMPTY;
    t->keys = end - key;
    if (t->even && !m->boolean) return t->first <= key ? TFM__TILE_FULL : TFM__TILE_MIXED;
    if (m->boolean && !tfm__mask_read(m, t)) return TFM__TILE_EMPTY;
    for (r = 0; full && r < t->rows; ++r) full = t->low[r] <= key && t->high[r] >= end && t->state[r] == TFM__TILE_FULL;
    return full ? TFM__TILE_FULL : TFM__TILE_MIXED;
}

static void tfm__mask_add_relative(const tfm__masking *m, float *score, const float *table, int64_t distance,
                                   int64_t n) {
    const int64_t reach = m->reach;
    const int64_t left = tfm__max64(0, tfm__min64(n, -reach - distance));
    const int64_t middle = tfm__max64(left, tfm__min64(n, reach + 1 - distance));
    m->k->binary(TFM__B_ADD, score, score, 1, table, 0, left);
    if (middle > left) {
        m->k->binary(TFM__B_ADD, score + left, score + left, 1, table + (distance + left + reach), 1, middle - left);
    }
    m->k->binary(TFM__B_ADD, score + middle, score + middle, 1, table + 2 * reach, 0, n - middle);
}

/* The additive parts on scores [rows][TFM__BLOCK_KEYS] of the block at hand. */
static void tfm__mask_add(const tfm__masking *m, const tfm__mask_tile *t, float *scores) {
    float row[TFM__BLOCK_KEYS];
    int64_t r;
    int i;
    for (r = 0; m->additive && r < t->rows; ++r) {
        float *const score = scores + r * TFM__BLOCK_KEYS;
        const int64_t distance = t->key - (t->query[r] + m->rows[t->batch].shift);
        for (i = 0; i < m->matrices; ++i) {
            const tfm__mask_matrix *const x = &m->matrix[i];
            const char *const p = x->data + tfm__mask_at(x, t, r) * x->size;
            if (x->kind != TFM__MASK_BIAS) continue;
            if (x->dtype == TFM_F32 && x->stride[3] == 1) {
                m->k->attn_bias(score, (const float *)(const void *)p, t->keys);
            } else {
                m->k->load(row, p, x->dtype, x->stride[3], t->keys);
                m->k->attn_bias(score, row, t->keys);
            }
        }
        if (m->slopes) {
            m->k->unary(TFM__U_SHIFT, row, m->ramp, (float)distance, 0.0f, t->keys);
            m->k->unary(TFM__U_ABS, row, row, 0.0f, 0.0f, t->keys);
            m->k->fma_scalar(score, row, -m->slopes[t->head[r]], t->keys);
        }
        if (m->relative) {
            tfm__mask_add_relative(m, score, m->relative + t->head[r] * (2 * m->reach + 1), distance, t->keys);
        }
    }
}

static void tfm__mask_fill(float *score, int64_t begin, int64_t end) {
    const float minus_inf = tfm__bits_float(0xff800000u);
    for (; begin < end; ++begin) score[begin] = minus_inf;
}

/* The boolean parts: -inf where a row does not attend, whatever stood there. */
static void tfm__mask_cut(const struct tfm__kernels *k, const tfm__mask_tile *t, float *scores) {
    int64_t r;
    for (r = 0; r < t->rows; ++r) {
        float *const score = scores + r * TFM__BLOCK_KEYS;
        const unsigned char *const allowed = t->allowed + r * TFM__BLOCK_KEYS;
        const int64_t low = tfm__max64(0, tfm__min64(t->low[r] - t->key, t->keys));
        const int64_t high = t->state[r] == TFM__TILE_EMPTY ? low
            : tfm__max64(low, tfm__min64(t->high[r] - t->key, t->keys));
        tfm__mask_fill(score, 0, low);
        tfm__mask_fill(score, high, t->keys);
        if (t->state[r] == TFM__TILE_MIXED) k->attn_keep(score, allowed, t->keys);
    }
}

/* Scores of keys [key, key + count) as softmax sees them, from what is there after the softcap. */
static void tfm__mask_scores(const tfm__masking *m, tfm__mask_tile *t, int64_t key, int64_t count, float *scores) {
    const int class_ = tfm__mask_block(m, t, key, count);
    int64_t r;
    if (class_ == TFM__TILE_EMPTY) t->keys = 0;
    if (class_ != TFM__TILE_EMPTY) tfm__mask_add(m, t, scores);
    if (class_ == TFM__TILE_MIXED) tfm__mask_cut(m->k, t, scores);
    for (r = 0; r < t->rows; ++r) tfm__mask_fill(scores + r * TFM__BLOCK_KEYS, t->keys, count);
}

/* -- the mask as a matrix ------------------------------------------------------------------------------------------ */

typedef struct tfm__mask_picture {
    tfm_ctx *c;
    const tfm__masking *m;
    float *y;
    tfm__lanes lanes;
} tfm__mask_picture;

typedef struct tfm__mask_lane {
    tfm__mask_tile tile;
    unsigned char allowed[TFM__ATTN_ROWS * TFM__BLOCK_KEYS];
    float scores[TFM__ATTN_ROWS * TFM__BLOCK_KEYS];
} tfm__mask_lane;

static void tfm__mask_picture_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__mask_picture *const a = (const tfm__mask_picture *)arg;
    tfm__mask_lane *const lane = (tfm__mask_lane *)tfm__lane(a->c, &a->lanes, slot);
    const int64_t heads = a->m->size[1], queries = a->m->size[2], keys = a->m->size[3];
    const int64_t tiles = tfm__ceil_div(queries, TFM__ATTN_ROWS);
    tfm__mask_tile *const t = &lane->tile;
    int64_t key, r;
    for (; begin < end; ++begin) {
        const int64_t first = begin % tiles * TFM__ATTN_ROWS, head = begin / tiles % heads;
        t->batch = begin / tiles / heads;
        t->rows = tfm__min64(TFM__ATTN_ROWS, queries - first);
        t->allowed = lane->allowed;
        for (r = 0; r < t->rows; ++r) t->query[r] = first + r, t->head[r] = head;
        tfm__mask_tile_begin(a->m, t);
        for (key = 0; key < keys; key += TFM__BLOCK_KEYS) {
            const int64_t count = tfm__min64(TFM__BLOCK_KEYS, keys - key);
            memset(lane->scores, 0, sizeof lane->scores);
            tfm__mask_scores(a->m, t, key, count, lane->scores);
            for (r = 0; r < t->rows; ++r) {
                memcpy(a->y + ((t->batch * heads + head) * queries + first + r) * keys + key,
                       lane->scores + r * TFM__BLOCK_KEYS, (size_t)count * sizeof(float));
            }
        }
    }
}

TFM_API tfm_tensor *tfm_mask_matrix(tfm_ctx *c, const tfm_mask *mask, int64_t batch, int64_t heads, int64_t queries,
                                    int64_t keys) {
    const tfm_mask none = tfm__mask_none();
    const int64_t size[4] = {batch, heads, queries, keys};
    tfm__op o;
    tfm__masking m;
    tfm__mask_picture a;
    tfm_tensor *y;
    if (!tfm__enter(c, &o, TFM__OP_MASK_MATRIX, 0)) return NULL;
    if (batch < 0 || heads < 0 || queries < 0 || keys < 0) {
        return tfm__reject(&o, "(batch, heads, queries, keys) is %s: expected sizes of at least 0",
                           tfm__describe_shape(&o, 4, size));
    }
    if (!mask) mask = &none;
    if (!tfm__mask_check(&o, mask, size)) return NULL;
    y = tfm__result(&o, TFM_F32, 4, size);
    if (!y || !tfm__mask_prepare(&o, &m, mask, size, NULL, NULL)) return tfm__leave(&o, NULL);
    a.c = c;
    a.m = &m;
    a.y = (float *)y->data;
    if (!tfm__lanes_get(&o, &a.lanes, (int64_t)sizeof(tfm__mask_lane))) return tfm__leave(&o, NULL);
    o.bytes = (double)tfm_numel(y) * 4.0;
    if (o.run && tfm_numel(y) > 0) {
        tfm__for(c, batch * heads * tfm__ceil_div(queries, TFM__ATTN_ROWS), 1, o.bytes, tfm__mask_picture_task, &a);
    }
    return tfm__leave(&o, y);
}

/* -- attention -----------------------------------------------------------------------------------------------------
 *
 *  One path for prompts, chunks, decoding and caches. A row is one query of one head; the rows of a key/value head are
 *  numbered query by query, the heads of its group side by side, so that a block of keys serves the whole group. A band
 *  is a few tiles of such rows, the unit of work. Keys come in blocks from position 0; a block yields (max, sum,
 *  output) started from nothing, blocks merge into a super-block and super-blocks into the row, left to right, by one
 *  formula. A row's bits therefore do not depend on the tile, band, batch or thread it is in; where bands are few,
 *  super-blocks go to several threads and merge in the same order.
 * ---------------------------------------------------------------------------------------------------------------- */

#define TFM__ATTN_SIZE 65536               /* of a head */
#define TFM__ATTN_TILES 16                 /* of a band at most: packing a block costs about a tenth of a tile's work */
#define TFM__SUPER_KEYS (TFM__SUPER_BLOCKS * TFM__BLOCK_KEYS)

/* max, sum and output (unnormalised) of a tile's rows over some keys. */
typedef struct tfm__attn_part {
    int any;                               /* 0: no keys yet */
    float max[TFM__ATTN_ROWS], sum[TFM__ATTN_ROWS];
    float *out;                            /* [rows][value_size] */
} tfm__attn_part;

typedef struct tfm__attn_rows {            /* a tile at work */
    tfm__mask_tile mask;
    float *q;                              /* [rows][key_size], scaled */
    tfm__attn_part super, total;
} tfm__attn_rows;

typedef struct tfm__attn_lane {            /* what a thread works in */
    tfm__attn_rows *tiles;
    tfm__attn_part block;
    float *scores, *spare;                 /* [TFM__ATTN_ROWS][TFM__BLOCK_KEYS]; spare: dropout's */
    float *spare_out;
    char *panels, *values;                 /* a block's keys and values, where they cannot be used as they lie */
    int64_t batch, head, key;              /* whose block is loaded; key -1: none */
    const void *k, *v;
    int64_t v_row, finite;
    int streams;                           /* block after block of keys, then of values */
    const char *ahead;                     /* the next tile's rows of a mask, or NULL */
    int64_t ahead_row, ahead_bytes;
} tfm__attn_lane;

typedef struct tfm__attn_operand {
    int dtype;
    char *data;
    int64_t size, stride[4];               /* bytes of an element; strides in elements */
} tfm__attn_operand;

typedef struct tfm__attn {
    tfm_ctx *c;
    const tfm__kernels *k;
    int64_t batch, heads, kv_heads, group, queries, keys, key_size, value_size;
    tfm__attn_operand q, key, value, out;
    int panels;                            /* keys lie in panels: key.stride holds batch and head only */
    int copy_values;
    int64_t turn;                          /* above 0: few queries; keys are used as they lie */
    int64_t key_row;                       /* above 0: few keys; they and the queries are used as they lie */
    float scale, dropout;
    uint64_t seed, stream;                 /* of dropout */
    float *top, *sum, *lse;                /* (B, H, Lq) each, or NULL */
    tfm__masking mask;
    int64_t band_tiles, bands;             /* tiles of a band, bands of a key/value head */
    tfm__lanes lanes;
    /* keys split over threads: super-blocks [wave_begin, wave_begin + wave) at a time */
    int64_t supers, wave_begin, wave;
    tfm__attn_part *parts, *totals;        /* [units][wave], [units] */
    float *weights;                        /* (B, H, Lq, Lk), averaged (B, Lq, Lk) */
    int stage, average;
} tfm__attn;

static int64_t tfm__attn_units(const tfm__attn *a) {
    return a->batch * a->kv_heads * a->bands;
}

static tfm__attn_operand tfm__attn_operand_of(const tfm_tensor *t) {
    tfm__attn_operand x;
    x.dtype = t->dtype;
    x.data = (char *)t->data;
    x.size = tfm_dtype_size(t->dtype);
    memcpy(x.stride, t->stride, sizeof x.stride);
    return x;
}

static char *tfm__attn_at(const tfm__attn_operand *x, int64_t i0, int64_t i1, int64_t i2) {
    return x->data ? x->data + (i0 * x->stride[0] + i1 * x->stride[1] + i2 * x->stride[2]) * x->size : NULL;
}

/* -- memory of a lane ---------------------------------------------------------------------------------------------- */

/* The next `bytes` of a lane; base NULL only counts. */
static char *tfm__attn_take(char *base, int64_t *used, int64_t bytes) {
    char *const p = base ? base + *used : NULL;
    *used += tfm__round_up(bytes, 64);
    return p;
}

static int64_t tfm__attn_values_row(const tfm__attn *a) {
    /* never TFM__PANEL itself, which means whole panels */
    return tfm__round_up(a->value_size, TFM__PANEL) + TFM__PANEL;
}

/* Lays a lane out in base for bands of `tiles` tiles; base NULL: only its bytes. */
static int64_t tfm__attn_lay(const tfm__attn *a, char *base, int64_t tiles, tfm__attn_lane *lane) {
    const int64_t scores = TFM__ATTN_ROWS * TFM__BLOCK_KEYS, floats = (int64_t)sizeof(float);
    const int64_t out = TFM__ATTN_ROWS * a->value_size * floats;
    int64_t used = 0, i;
    char *allowed;
    lane->tiles = (tfm__attn_rows *)(void *)tfm__attn_take(base, &used, tiles * (int64_t)sizeof(tfm__attn_rows));
    allowed = tfm__attn_take(base, &used, a->mask.boolean ? scores : 0);
    lane->scores = (float *)(void *)tfm__attn_take(base, &used, scores * floats);
    lane->spare = (float *)(void *)tfm__attn_take(base, &used, a->dropout > 0.0f ? scores * floats : 0);
    lane->spare_out = (float *)(void *)tfm__attn_take(base, &used, a->dropout > 0.0f ? out : 0);
    lane->panels = tfm__attn_take(base, &used, a->panels ? 0 : TFM__BLOCK_KEYS * a->key_size * a->key.size);
    lane->values = tfm__attn_take(base, &used, a->copy_values
                                  ? TFM__BLOCK_KEYS * tfm__attn_values_row(a) * a->value.size : 0);
    lane->block.out = (float *)(void *)tfm__attn_take(base, &used, out);
    lane->key = -1;
    lane->streams = 0;
    lane->ahead = NULL;
    for (i = 0; i < tiles; ++i) {
        float *const q = (float *)(void *)tfm__attn_take(base, &used, TFM__ATTN_ROWS * a->key_size * floats);
        float *const super = (float *)(void *)tfm__attn_take(base, &used, out);
        float *const total = (float *)(void *)tfm__attn_take(base, &used, out);
        if (!base) continue;
        lane->tiles[i].mask.allowed = (unsigned char *)allowed;
        lane->tiles[i].q = q;
        lane->tiles[i].super.out = super;
        lane->tiles[i].total.out = total;
    }
    return used;
}

/* -- tiles --------------------------------------------------------------------------------------------------------- */

/* After batch, rows, query and head are set: ranges and scaled queries. The result's rows are fetched meanwhile: they
 * lie apart, and with few keys writing them was half of the time. */
static void tfm__attn_rows_begin(const tfm__attn *a, tfm__attn_rows *x) {
    const int plain = a->q.dtype == TFM_F32 && a->q.stride[3] == 1;
    tfm__scaled_row row[TFM__ATTN_ROWS];
    int64_t r;
    tfm__mask_tile_begin(&a->mask, &x->mask);
    x->super.any = x->total.any = 0;
    for (r = 0; r < x->mask.rows; ++r) {
        const char *const at = tfm__attn_at(&a->q, x->mask.batch, x->mask.head[r], x->mask.query[r]);
        row[r].to = x->q + r * a->key_size;
        row[r].from = plain ? (const float *)(const void *)at : row[r].to;
        row[r].by = a->scale;
        row[r].ahead = tfm__attn_at(&a->out, x->mask.batch, x->mask.head[r], x->mask.query[r]);
        if (!plain) a->k->load(row[r].to, at, a->q.dtype, a->q.stride[3], a->key_size);
    }
    a->k->scale_rows(row, x->mask.rows, a->key_row ? 0 : a->key_size, a->value_size * a->out.size);
}

/* Sets up the tiles of a unit; returns how many there are. [*first, *last): the keys that they attend. */
static int64_t tfm__attn_begin(const tfm__attn *a, tfm__attn_lane *lane, int64_t unit, int64_t *first, int64_t *last) {
    const int64_t all = a->queries * a->group, head = unit / a->bands % a->kv_heads;
    int64_t row = unit % a->bands * a->band_tiles * TFM__ATTN_ROWS, count = 0, r;
    int64_t query = row / a->group, member = row % a->group;
    *first = INT64_MAX;
    *last = 0;
    lane->batch = unit / a->bands / a->kv_heads;
    lane->head = head;
    lane->key = -1;
    for (; count < a->band_tiles && row < all; ++count) {
        tfm__attn_rows *const x = &lane->tiles[count];
        x->mask.batch = lane->batch;
        x->mask.rows = tfm__min64(TFM__ATTN_ROWS, all - row);
        for (r = 0; r < x->mask.rows; ++r, ++row) {
            x->mask.query[r] = query;
            x->mask.head[r] = head * a->group + member;
            member += 1;
            if (member == a->group) query += 1, member = 0;
        }
        tfm__attn_rows_begin(a, x);
        *first = tfm__min64(*first, x->mask.first);
        *last = tfm__max64(*last, x->mask.last);
    }
    return count;
}

/* Copies `count` values of a head to rows of the lane: where the last dim is strided, or a row would be taken for a
 * panel. */
static void tfm__attn_copy_values(const tfm__attn *a, tfm__attn_lane *lane, int64_t key, int64_t count) {
    const int64_t row = tfm__attn_values_row(a), step = a->value.stride[3];
    int64_t i, j;
    for (i = 0; i < count; ++i) {
        const char *const from = tfm__attn_at(&a->value, lane->batch, lane->head, key + i);
        char *const to = lane->values + i * row * a->value.size;
        if (a->value.size == 4) {
            for (j = 0; j < a->value_size; ++j) memcpy(to + 4 * j, from + 4 * j * step, 4);
        } else {
            for (j = 0; j < a->value_size; ++j) memcpy(to + 2 * j, from + 2 * j * step, 2);
        }
    }
    lane->v = lane->values;
    lane->v_row = row;
}

/* Makes keys and values [key, key + count) of the lane's head ready, unless they are. key is a multiple of the
 * block. */
static void tfm__attn_load(const tfm__attn *a, tfm__attn_lane *lane, int64_t key, int64_t count) {
    if (lane->key == key) return;
    lane->key = key;
    lane->finite = 0;
    if (a->panels) {
        lane->k = tfm__attn_at(&a->key, lane->batch, lane->head, 0) + key * a->key_size * a->key.size;
    } else if (a->key_row > 0 || a->turn > 0) {
        lane->k = tfm__attn_at(&a->key, lane->batch, lane->head, key);
    } else {
        a->k->pack_panels(lane->panels, a->key.dtype, TFM__KEY_PANEL,
                          tfm__attn_at(&a->key, lane->batch, lane->head, key), a->key.dtype, a->key.stride[2],
                          a->key.stride[3], count, a->key_size);
        lane->k = lane->panels;
    }
    if (a->copy_values) {
        tfm__attn_copy_values(a, lane, key, count);
    } else {
        lane->v = tfm__attn_at(&a->value, lane->batch, lane->head, key);
        lane->v_row = a->panels && a->value_size > TFM__KEY_PANEL ? -1 : a->value.stride[2];
    }
}

/* Later keys join earlier ones. The buffers may change owners. */
static void tfm__attn_join(const tfm__attn *a, int64_t rows, tfm__attn_part *to, tfm__attn_part *from) {
    if (!from->any) return;
    if (to->any) {
        a->k->attn_merge(1, rows, a->value_size, to->max, to->sum, to->out, a->value_size, from->max, from->sum,
                         from->out, a->value_size);
    } else {
        float *const out = to->out;
        *to = *from;
        from->out = out;
    }
}

/* All ones or 0 for each key [key, key + n) of one query's row: does its weight live through dropout? key is a multiple
 * of 8: a draw of four words decides about eight keys, to 1 / 65536 of a probability. */
static void tfm__attn_kept(const tfm__attn *a, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t n,
                           uint32_t *kept) {
    const uint64_t row = (uint64_t)((batch * a->heads + head) * a->queries + query);
    const uint64_t first = row * (uint64_t)tfm__ceil_div(a->keys, 8) + (uint64_t)(key / 8);
    const uint32_t dropped = (uint32_t)tfm__max64(1, (int64_t)(a->dropout * 65536.0f + 0.5f));
    int64_t j;
    for (j = 0; j < n; j += 8) {
        uint32_t word[4];
        int64_t i;
        tfm__random_bits(a->seed, a->stream, first + (uint64_t)(j / 8), word);
        for (i = 0; i < 8 && j + i < n; ++i) {
            kept[j + i] = 0u - (uint32_t)((word[i / 2] >> (16 * (i % 2)) & 0xffffu) >= dropped);
        }
    }
}

/* attn_reduce with dropout: maximum and sum are those of all keys, the output that of the kept ones, brought to the
 * same maximum by merging it as a part of sum 0. */
static void tfm__attn_reduce_dropped(const tfm__attn *a, const tfm__mask_tile *m, tfm__attn_lane *lane,
                                     tfm__attn_tile *t) {
    float max[TFM__ATTN_ROWS], sum[TFM__ATTN_ROWS];
    uint32_t kept[TFM__BLOCK_KEYS];
    float *const out = t->out;
    int64_t r, j;
    memcpy(lane->spare, t->scores, TFM__ATTN_ROWS * TFM__BLOCK_KEYS * sizeof(float));
    t->value_size = 0;
    a->k->attn_reduce(t);
    for (r = 0; r < t->rows; ++r) {
        float *const score = lane->spare + r * TFM__BLOCK_KEYS;
        tfm__attn_kept(a, m->batch, m->head[r], m->query[r], m->key, t->keys, kept);
        for (j = 0; j < t->keys; ++j) {
            score[j] = tfm__bits_float((tfm__float_bits(score[j]) & kept[j]) | (0xff800000u & ~kept[j]));
        }
    }
    t->scores = lane->spare;
    t->value_size = a->value_size;
    t->out = lane->spare_out;
    t->max = max;
    t->sum = sum;
    a->k->attn_reduce(t);
    memset(sum, 0, sizeof sum);
    memset(out, 0, (size_t)(t->rows * a->value_size) * sizeof(float));
    a->k->attn_merge(1, t->rows, a->value_size, lane->block.max, lane->block.sum, out, a->value_size, max, sum,
                     lane->spare_out, a->value_size);
}

/* cut: the mask is going to cut rows to their ranges, what lies outside is not needed. */
static void tfm__attn_score(const tfm__attn *a, tfm__attn_lane *lane, tfm__attn_rows *x, int64_t keys, int cut,
                            tfm__attn_tile *t) {
    memset(t, 0, sizeof *t);
    t->rows = x->mask.rows;
    t->keys = keys;
    t->key_size = a->key_size;
    t->value_size = a->value_size;
    t->q = x->q;
    t->q_row = a->key_size;
    t->k = lane->k;
    t->k_dtype = a->key.dtype;
    t->turn = a->turn;
    if (a->key_row) {
        t->q = (const float *)(const void *)tfm__attn_at(&a->q, x->mask.batch, x->mask.head[0], x->mask.query[0]);
        t->q_row = a->q.stride[2];
        t->k_row = a->key_row;
        t->scale = a->scale;
    }
    t->v = lane->v;
    t->v_dtype = a->value.dtype;
    t->v_row = lane->v_row;
    if (a->panels) {
        t->after_values = (const char *)lane->k + TFM__BLOCK_KEYS * a->key_size * a->key.size;
    } else if (a->key.stride[3] == 1 && a->key.stride[2] == a->key_size) {
        t->after_values = tfm__attn_at(&a->key, lane->batch, lane->head, lane->key + TFM__BLOCK_KEYS);
    }
    if (lane->v_row < 0 || lane->v_row == a->value_size) t->after_keys = lane->v;
    if (lane->streams) {
        t->after_keys = t->after_values;
        t->after_values = (const char *)lane->v + keys * a->value_size * a->value.size;
    }
    t->scores = lane->scores;
    t->out = lane->block.out;
    t->out_row = a->value_size;
    t->max = lane->block.max;
    t->sum = lane->block.sum;
    t->key = lane->key;
    t->low = cut ? x->mask.low : NULL;
    t->high = x->mask.high;
    t->finite = &lane->finite;
    t->ahead = lane->ahead;
    t->ahead_row = lane->ahead_row;
    t->ahead_bytes = lane->ahead_bytes;
    a->k->attn_scores(t);
}

static void tfm__attn_softcap(const tfm__attn *a, const tfm__attn_tile *t) {
    int64_t r;
    for (r = 0; a->mask.softcap > 0.0f && r < t->rows; ++r) {
        float *const score = t->scores + r * TFM__BLOCK_KEYS;
        a->k->unary(TFM__U_SOFTCAP, score, score, a->mask.softcap, 0.0f, t->keys);
    }
}

/* Fetches what no product fetches meanwhile. */
static void tfm__attn_fetch(const tfm__attn *a, const tfm__attn_lane *lane) {
    tfm__scaled_row row[TFM__ATTN_ROWS];
    int64_t r;
    for (r = 0; lane->ahead && r < TFM__ATTN_ROWS; ++r) {
        row[r].by = 0.0f;
        row[r].ahead = (char *)(uintptr_t)lane->ahead + r * lane->ahead_row;
    }
    a->k->scale_rows(row, r, 0, lane->ahead_bytes);
}

/* One tile against the block [key, key + count), of which nobody in the band attends keys from `last` on. */
static void tfm__attn_block(const tfm__attn *a, tfm__attn_lane *lane, tfm__attn_rows *x, int64_t key, int64_t count,
                            int64_t last) {
    const int state = tfm__mask_block(&a->mask, &x->mask, key, count);
    tfm__attn_tile t;
    if (state == TFM__TILE_EMPTY) {
        tfm__attn_fetch(a, lane);
        return;
    }
    tfm__attn_load(a, lane, key, tfm__min64(count, last - key));
    tfm__attn_score(a, lane, x, x->mask.keys, state == TFM__TILE_MIXED && !x->mask.even, &t);
    tfm__attn_softcap(a, &t);
    tfm__mask_add(&a->mask, &x->mask, lane->scores);
    if (state == TFM__TILE_MIXED) tfm__mask_cut(a->k, &x->mask, lane->scores);
    if (a->dropout > 0.0f) {
        tfm__attn_reduce_dropped(a, &x->mask, lane, &t);
    } else {
        a->k->attn_reduce(&t);
    }
    lane->block.any = 1;
    tfm__attn_join(a, x->mask.rows, &x->super, &lane->block);
}

/* A few rows against as many whole blocks of a cache from `key` on as the scores have room for: first all keys, then
 * all weights, then all values, so that keys and values come from memory as one long stream each (12 heads of 64, 1024
 * keys, f16, cold: 0.19 ms, 0.16), then one merge (f16: 0.95 of the time of a merge for each block, whose maximum,
 * exponentials and merge the stream would wait for). Returns how many keys that were. */
static int64_t tfm__attn_blocks(const tfm__attn *a, tfm__attn_lane *lane, int64_t key, int64_t end) {
    tfm__attn_rows *const x = &lane->tiles[0];
    const int64_t rows = x->mask.rows, most = tfm__min64(TFM__SUPER_BLOCKS, TFM__ATTN_ROWS / rows);
    float *const scores = lane->scores;
    tfm__attn_part *const part = &lane->block, *const super = &x->super;
    tfm__attn_tile t[TFM__SUPER_BLOCKS];
    int weighed[TFM__SUPER_BLOCKS];
    int64_t count = 0, i;
    if (!a->panels || most < 4 || a->mask.additive || a->mask.boolean || a->dropout > 0.0f) return 0;
    lane->streams = 1;
    while (count < most && end - key >= TFM__BLOCK_KEYS
           && tfm__mask_block(&a->mask, &x->mask, key, TFM__BLOCK_KEYS) == TFM__TILE_FULL
           && x->mask.keys == TFM__BLOCK_KEYS) {
        tfm__attn_load(a, lane, key, TFM__BLOCK_KEYS);
        tfm__attn_score(a, lane, x, TFM__BLOCK_KEYS, 0, &t[count]);
        tfm__attn_softcap(a, &t[count]);
        lane->scores += rows * TFM__BLOCK_KEYS;
        key += TFM__BLOCK_KEYS;
        count += 1;
    }
    lane->streams = 0;
    lane->scores = scores;
    for (i = 0; i < count; ++i) {
        t[i].out = part->out + i * rows * a->value_size;
        t[i].max = part->max + i * rows;
        t[i].sum = part->sum + i * rows;
        t[i].finite = NULL; /* is the last block's */
        weighed[i] = a->k->attn_weigh(&t[i]);
    }
    for (i = 0; i < count; ++i) (weighed[i] ? a->k->attn_values : a->k->attn_reduce)(&t[i]);
    for (i = 0; !super->any && i < rows; ++i) {
        super->max[i] = tfm__bits_float(0xff800000u);
        super->sum[i] = 0.0f;
    }
    super->any |= count > 0;
    a->k->attn_merge(count, rows, a->value_size, super->max, super->sum, super->out, a->value_size,
                     part->max, part->sum, part->out, a->value_size);
    return count * TFM__BLOCK_KEYS;
}

/* The tiles' parts over super-block `super`. */
static void tfm__attn_super(const tfm__attn *a, tfm__attn_lane *lane, int64_t tiles, int64_t super, int64_t first,
                            int64_t last) {
    const int64_t begin = super * TFM__SUPER_KEYS, end = tfm__min64(tfm__min64(begin + TFM__SUPER_KEYS, a->keys), last);
    int64_t key = tfm__max64(begin, first - first % TFM__BLOCK_KEYS), i;
    for (i = 0; i < tiles; ++i) lane->tiles[i].super.any = 0;
    while (key < end) {
        const int64_t whole = tiles == 1 ? tfm__attn_blocks(a, lane, key, end) : 0;
        const int64_t count = tfm__min64(TFM__BLOCK_KEYS, a->keys - key);
        key += whole;
        if (whole) continue;
        for (i = 0; i < tiles; ++i) {
            const int wraps = i + 1 == tiles;
            lane->ahead = tfm__mask_next(&a->mask, &lane->tiles[wraps ? 0 : i + 1].mask,
                                         key + (wraps ? TFM__BLOCK_KEYS : 0), &lane->ahead_row, &lane->ahead_bytes);
            tfm__attn_block(a, lane, &lane->tiles[i], key, count, last);
        }
        key += TFM__BLOCK_KEYS;
    }
}

/* Divides by the sum (and sink), writes results and statistics of a tile. */
static void tfm__attn_finish(const tfm__attn *a, const tfm__attn_rows *x, tfm__attn_part *part) {
    tfm__scaled_row row[TFM__ATTN_ROWS];
    int64_t count = 0, r;
    for (r = 0; r < x->mask.rows; ++r) {
        const int64_t b = x->mask.batch, h = x->mask.head[r], i = x->mask.query[r];
        const int64_t at = (b * a->heads + h) * a->queries + i;
        float top = part->any ? part->max[r] : tfm__bits_float(0xff800000u), sum = part->any ? part->sum[r] : 0.0f;
        float *const from = part->out + r * a->value_size;
        char *const to = tfm__attn_at(&a->out, b, h, i);
        if (sum == 0.0f || a->dropout >= 1.0f) {
            if (a->value_size) memset(to, 0, (size_t)(a->value_size * a->out.size)); /* 0 in every float type */
        } else {
            float divisor;
            if (a->mask.sinks) {
                float shift[2];
                shift[0] = a->mask.sinks[h];
                shift[1] = top;
                top = a->k->reduce(TFM__R_MAX, shift, 2);
                a->k->unary(TFM__U_SHIFT, shift, shift, -top, 0.0f, 2);
                a->k->unary(TFM__U_EXP, shift, shift, 0.0f, 0.0f, 2);
                sum = sum * shift[1] + shift[0];
                a->k->unary(TFM__U_SCALE, from, from, shift[1], 0.0f, a->value_size);
            }
            divisor = a->dropout > 0.0f ? sum * (1.0f - a->dropout) : sum;
            row[count].by = 1.0f / divisor;
            row[count].from = from;
            row[count].to = a->out.dtype == TFM_F32 ? (float *)(void *)to : from;
            row[count++].ahead = to;
        }
        if (a->top) a->top[at] = top, a->sum[at] = sum;
        if (a->lse) {
            a->k->unary(TFM__U_LOG, a->lse + at, &sum, 0.0f, 0.0f, 1);
            a->lse[at] += top;
        }
    }
    a->k->scale_rows(row, count, a->value_size, 0);
    for (r = 0; a->out.dtype != TFM_F32 && r < count; ++r) {
        a->k->store(row[r].ahead, a->out.dtype, 1, row[r].to, a->value_size);
    }
}

/* -- the whole ----------------------------------------------------------------------------------------------------- */

static void tfm__attn_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__attn *const a = (const tfm__attn *)arg;
    tfm__attn_lane lane;
    tfm__attn_lay(a, (char *)tfm__lane(a->c, &a->lanes, slot), a->band_tiles, &lane);
    for (; begin < end; ++begin) {
        int64_t first, last, super, i;
        const int64_t tiles = tfm__attn_begin(a, &lane, begin, &first, &last);
        for (super = first / TFM__SUPER_KEYS; super * TFM__SUPER_KEYS < last; ++super) {
            tfm__attn_super(a, &lane, tiles, super, first, last);
            for (i = 0; i < tiles; ++i) {
                tfm__attn_join(a, lane.tiles[i].mask.rows, &lane.tiles[i].total, &lane.tiles[i].super);
            }
        }
        for (i = 0; i < tiles; ++i) tfm__attn_finish(a, &lane.tiles[i], &lane.tiles[i].total);
    }
}

/* Keys split over threads: an item is one super-block of one unit (a band of a single tile). */
static void tfm__attn_wave_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__attn *const a = (const tfm__attn *)arg;
    tfm__attn_lane lane;
    tfm__attn_lay(a, (char *)tfm__lane(a->c, &a->lanes, slot), 1, &lane);
    for (; begin < end; ++begin) {
        tfm__attn_part *const part = &a->parts[begin];
        const tfm__attn_rows *const x = &lane.tiles[0];
        float *const out = part->out;
        int64_t first, last;
        tfm__attn_begin(a, &lane, begin / a->wave, &first, &last);
        tfm__attn_super(a, &lane, 1, a->wave_begin + begin % a->wave, first, last);
        if (!x->super.any) continue;
        *part = x->super;
        part->out = out;
        memcpy(out, x->super.out, (size_t)(x->mask.rows * a->value_size) * sizeof(float));
    }
}

/* Merges a wave's parts; after the last wave writes the results. */
static void tfm__attn_merge_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__attn *const a = (const tfm__attn *)arg;
    tfm__attn_lane lane;
    tfm__attn_lay(a, (char *)tfm__lane(a->c, &a->lanes, slot), 1, &lane);
    for (; begin < end; ++begin) {
        int64_t first, last, i;
        tfm__attn_begin(a, &lane, begin, &first, &last);
        for (i = 0; i < a->wave; ++i) {
            tfm__attn_join(a, lane.tiles[0].mask.rows, &a->totals[begin], &a->parts[begin * a->wave + i]);
        }
        if (a->wave_begin + a->wave >= a->supers) tfm__attn_finish(a, &lane.tiles[0], &a->totals[begin]);
    }
}

static void tfm__attn_run_waves(tfm__attn *a, double work) {
    const int64_t units = tfm__attn_units(a);
    int64_t i;
    for (i = 0; i < units; ++i) a->totals[i].any = 0;
    for (a->wave_begin = 0; a->wave_begin < a->supers && !tfm__cancelled(a->c); a->wave_begin += a->wave) {
        for (i = 0; i < units * a->wave; ++i) a->parts[i].any = 0;
        tfm__for(a->c, units * a->wave, 1, work * (double)a->wave / (double)a->supers, tfm__attn_wave_task, a);
        tfm__for(a->c, units, 1, (double)(units * a->wave * TFM__ATTN_ROWS * a->value_size), tfm__attn_merge_task, a);
    }
}

/* Parts of `count` tiles in temporary memory; NULL: out of memory. Decoding has few rows: 100 to 500 bytes a head and
 * 4096 keys. */
static tfm__attn_part *tfm__attn_parts(tfm__op *o, const tfm__attn *a, int64_t count) {
    const int64_t out = tfm__min64(TFM__ATTN_ROWS, a->queries * a->group) * a->value_size;
    tfm__attn_part *const parts = (tfm__attn_part *)tfm__temporary(o, count * (int64_t)sizeof(tfm__attn_part));
    float *const data = (float *)tfm__temporary(o, count * out * (int64_t)sizeof(float));
    int64_t i;
    if (!parts || !data) return NULL;
    for (i = 0; o->run && i < count; ++i) parts[i].out = data + i * out;
    return parts;
}

/* Chooses bands and lanes: as many tiles in a band as fit the scratch while there are still a few bands for each
 * thread; where even single tiles are too few for the threads, keys are split too. Sizes only: the same in a dry
 * run. */
static int tfm__attn_plan(tfm__op *o, tfm__attn *a) {
    const int64_t threads = a->c->threads, tiles = tfm__ceil_div(a->queries * a->group, TFM__ATTN_ROWS);
    const int64_t all = a->batch * a->kv_heads * tiles;
    tfm__attn_lane lane;
    a->supers = tfm__ceil_div(a->keys, TFM__SUPER_KEYS);
    a->band_tiles = tfm__max64(1, tfm__min64(tfm__min64(TFM__ATTN_TILES, tiles), all / (4 * threads)));
    while (a->band_tiles > 1 && tfm__attn_lay(a, NULL, a->band_tiles, &lane) > TFM__SCRATCH_BYTES) a->band_tiles -= 1;
    a->bands = tfm__ceil_div(tiles, a->band_tiles);
    if (threads > 1 && all > 0 && all < 2 * threads && a->supers > 1) {
        a->wave = tfm__min64(a->supers, tfm__ceil_div(4 * threads, all));
        a->parts = tfm__attn_parts(o, a, all * a->wave);
        a->totals = a->parts ? tfm__attn_parts(o, a, all) : NULL;
        if (!a->totals) return 0;
    }
    return tfm__lanes_get(o, &a->lanes, tfm__attn_lay(a, NULL, a->band_tiles, &lane));
}

/* -- the weights, on request --------------------------------------------------------------------------------------- */

/* Scores in the lane become what the caller asked for. */
static void tfm__attn_stage(const tfm__attn *a, tfm__attn_lane *lane, tfm__attn_rows *x, int64_t key, int64_t count) {
    uint32_t kept[TFM__BLOCK_KEYS];
    int64_t r, j;
    if (a->stage == TFM_WEIGHTS_SCORES || a->stage == TFM_WEIGHTS_CAPPED) return;
    tfm__mask_scores(&a->mask, &x->mask, key, count, lane->scores);
    for (r = 0; a->stage == TFM_WEIGHTS_PROBABILITIES && r < x->mask.rows; ++r) {
        const int64_t at = (x->mask.batch * a->heads + x->mask.head[r]) * a->queries + x->mask.query[r];
        const float divisor = a->sum[at] * (1.0f - a->dropout);
        float *const score = lane->scores + r * TFM__BLOCK_KEYS;
        if (divisor == 0.0f) {
            memset(score, 0, (size_t)count * sizeof(float));
            continue;
        }
        a->k->unary(TFM__U_SHIFT, score, score, -a->top[at], 0.0f, count);
        a->k->unary(TFM__U_EXP, score, score, 0.0f, 0.0f, count);
        a->k->binary(TFM__B_DIV, score, score, 1, &divisor, 0, count);
        if (a->dropout > 0.0f) {
            tfm__attn_kept(a, x->mask.batch, x->mask.head[r], x->mask.query[r], key, count, kept);
            for (j = 0; j < count; ++j) score[j] = tfm__bits_float(tfm__float_bits(score[j]) & kept[j]);
        }
    }
}

/* Rows of one head's tile: computed again from queries, keys and the statistics of the first pass. */
static void tfm__attn_weights_tile(const tfm__attn *a, tfm__attn_lane *lane, tfm__attn_rows *x) {
    const int64_t h = x->mask.head[0], plane = x->mask.batch * (a->average ? 1 : a->heads) + (a->average ? 0 : h);
    float *const out = a->weights + (plane * a->queries + x->mask.query[0]) * a->keys;
    int64_t key, r;
    for (key = 0; key < a->keys; key += TFM__BLOCK_KEYS) {
        const int64_t count = tfm__min64(TFM__BLOCK_KEYS, a->keys - key);
        const int64_t held = a->panels ? tfm__max64(0, tfm__min64(count, a->mask.rows[x->mask.batch].keys - key))
            : count;
        tfm__attn_tile t;
        if (held > 0) {
            tfm__attn_load(a, lane, key, held);
            tfm__attn_score(a, lane, x, held, 0, &t);
            if (a->stage != TFM_WEIGHTS_SCORES) tfm__attn_softcap(a, &t);
        }
        for (r = 0; r < x->mask.rows; ++r) {
            memset(lane->scores + r * TFM__BLOCK_KEYS + held, 0, (size_t)(count - held) * sizeof(float));
        }
        tfm__attn_stage(a, lane, x, key, count);
        for (r = 0; r < x->mask.rows; ++r) {
            const float *const score = lane->scores + r * TFM__BLOCK_KEYS;
            float *const row = out + r * a->keys + key;
            if (a->average) {
                a->k->fma_scalar(row, score, 1.0f / (float)a->heads, count);
            } else {
                memcpy(row, score, (size_t)count * sizeof(float));
            }
        }
    }
}

static void tfm__attn_weights_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__attn *const a = (const tfm__attn *)arg;
    const int64_t tiles = tfm__ceil_div(a->queries, TFM__ATTN_ROWS), planes = a->average ? 1 : a->heads;
    tfm__attn_lane lane;
    tfm__attn_lay(a, (char *)tfm__lane(a->c, &a->lanes, slot), 1, &lane);
    for (; begin < end; ++begin) {
        tfm__attn_rows *const x = &lane.tiles[0];
        const int64_t first = begin % tiles * TFM__ATTN_ROWS, batch = begin / tiles / planes;
        int64_t h = a->average ? 0 : begin / tiles % planes, r;
        const int64_t stop = a->average ? a->heads : h + 1;
        x->mask.batch = batch;
        x->mask.rows = tfm__min64(TFM__ATTN_ROWS, a->queries - first);
        if (a->average) {
            memset(a->weights + (batch * a->queries + first) * a->keys, 0,
                   (size_t)(x->mask.rows * a->keys) * sizeof(float));
        }
        for (; h < stop; ++h) {
            for (r = 0; r < x->mask.rows; ++r) x->mask.query[r] = first + r, x->mask.head[r] = h;
            tfm__attn_rows_begin(a, x);
            lane.batch = batch;
            lane.head = h / a->group;
            lane.key = -1;
            tfm__attn_weights_tile(a, &lane, x);
        }
    }
}

/* -- the public function ------------------------------------------------------------------------------------------- */

static int tfm__attn_check_options(tfm__op *o, const tfm_attention_options *options) {
    if (!(options->dropout >= 0.0f && options->dropout <= 1.0f)) {
        tfm__reject(o, "dropout is %g: expected a probability", (double)options->dropout);
    } else if (tfm__isnan(options->scale) || tfm__isinf(options->scale)) {
        tfm__reject(o, "scale is %g: expected a number, or 0 for 1 / sqrt(key size)", (double)options->scale);
    } else if (options->weights_stage < TFM_WEIGHTS_PROBABILITIES || options->weights_stage > TFM_WEIGHTS_MASKED) {
        tfm__reject(o, "weights_stage is %d: expected one of TFM_WEIGHTS_*", options->weights_stage);
    } else {
        return 1;
    }
    return 0;
}

static int tfm__attn_check_sizes(tfm__op *o, const tfm__attn *a) {
    if (a->kv_heads ? a->heads % a->kv_heads != 0 : a->heads != 0) {
        tfm__reject(o, "%lld query heads are not a multiple of %lld key/value heads", (long long)a->heads,
                    (long long)a->kv_heads);
    } else if (a->key_size < 1 || a->key_size > TFM__ATTN_SIZE || a->value_size > TFM__ATTN_SIZE) {
        tfm__reject(o, "key size is %lld and value size %lld: expected 1 to %d", (long long)a->key_size,
                    (long long)a->value_size, TFM__ATTN_SIZE);
    } else {
        return 1;
    }
    return 0;
}

/* What backward will need beside the inputs: the log-sum-exp of each row and the mask's plain fields. */
static int tfm__attn_save(tfm__op *o, tfm__attn *a, const tfm_attention_options *options) {
    const int64_t shape[3] = {a->batch, a->heads, a->queries}, bytes = (int64_t)sizeof(tfm_mask);
    tfm_tensor *lse, *mask;
    if (!o->requires_grad) return 1;
    lse = tfm__result(o, TFM_F32, 3, shape);
    mask = lse ? tfm__result(o, TFM_U8, 1, &bytes) : NULL;
    if (!mask) return 0;
    if (o->run) memcpy(mask->data, &options->mask, sizeof(tfm_mask));
    a->lse = (float *)lse->data;
    o->saved[0] = lse;
    o->saved[1] = mask;
    o->attr[0] = (double)a->scale;
    o->attr[1] = (double)a->dropout;
    memcpy(&o->number[0], &a->seed, sizeof a->seed);
    memcpy(&o->number[1], &a->stream, sizeof a->stream);
    return 1;
}

/* (B, H, Lq, dv) as a view of memory (B, Lq, H, dv). */
static tfm_tensor *tfm__attn_result(tfm__op *o, tfm__attn *a, int dtype) {
    const int64_t shape[4] = {a->batch, a->queries, a->heads, a->value_size};
    tfm_tensor *const y = tfm__result(o, dtype, 4, shape);
    if (!y) return NULL;
    y->shape[1] = a->heads;
    y->shape[2] = a->queries;
    y->stride[1] = a->value_size;
    y->stride[2] = a->heads * a->value_size;
    a->out = tfm__attn_operand_of(y);
    return y;
}

static double tfm__attn_flops(const tfm__attn *a, int exact) {
    const double each = 2.0 * (double)a->heads * (double)(a->key_size + a->value_size);
    double pairs = (double)a->batch * (double)a->queries * (double)a->keys;
    int64_t b, i, low, high;
    if (!exact) return each * pairs;
    for (b = 0, pairs = 0.0; b < a->batch; ++b) {
        for (i = 0; i < a->queries; ++i) {
            tfm__mask_range(&a->mask, b, i, &low, &high);
            pairs += (double)(high - low);
        }
    }
    return each * pairs;
}

static void tfm__attn_run(tfm__op *o, tfm__attn *a) {
    const double work = tfm__attn_flops(a, 0);
    if (a->parts) {
        tfm__attn_run_waves(a, work);
    } else {
        tfm__for(a->c, tfm__attn_units(a), 1, work, tfm__attn_task, a);
    }
    if (a->weights) {
        tfm__for(a->c, a->batch * (a->average ? 1 : a->heads) * tfm__ceil_div(a->queries, TFM__ATTN_ROWS), 1, work,
                 tfm__attn_weights_task, a);
    }
    o->flops = a->c->profile ? tfm__attn_flops(a, 1) : work;
}

/* Everything after the operands of `a` are known (sizes, q, key, value, panels). held, start: see tfm__mask_prepare. */
static tfm_tensor *tfm__attn_make(tfm__op *o, tfm__attn *a, const tfm_attention_options *options, const int64_t *held,
                                  const int64_t *start) {
    const int64_t size[4] = {a->batch, a->heads, a->queries, a->keys}, rows = a->batch * a->heads * a->queries;
    const int64_t mean[3] = {a->batch, a->queries, a->keys};
    tfm_tensor *y, *weights = NULL;
    if (!tfm__attn_check_sizes(o, a) || !tfm__attn_check_options(o, options)
        || !tfm__mask_check(o, &options->mask, size)) return NULL;
    a->c = o->c;
    a->k = o->k;
    a->group = a->kv_heads ? a->heads / a->kv_heads : 1;
    a->scale = options->scale != 0.0f ? options->scale : (float)(1.0 / sqrt((double)a->key_size));
    a->dropout = options->dropout;
    a->copy_values = a->value.stride[3] != 1 || (a->value.stride[2] == TFM__PANEL && a->value_size % TFM__PANEL != 0);
    if (!a->panels && a->keys <= TFM__FEW_KEYS && a->queries >= TFM__PANEL && a->group == 1 && a->q.dtype == TFM_F32
        && a->q.stride[3] == 1 && a->key.dtype == TFM_F32 && a->key.stride[3] == 1) {
        a->key_row = tfm__max64(0, a->key.stride[2]);
    }
    if (!a->panels && a->queries * a->group <= a->k->turn_rows && a->key.dtype == TFM_F32 && a->key.stride[3] == 1) {
        a->turn = tfm__max64(0, a->key.stride[2]);
    }
    a->stage = options->weights_stage;
    a->average = options->weights_average;
    if (a->dropout > 0.0f) {
        a->seed = a->c->seed;
        a->stream = tfm__random_stream(a->c);
    }
    y = tfm__attn_result(o, a, tfm__promote(tfm__promote(a->q.dtype, a->key.dtype), a->value.dtype));
    if (y && options->weights) {
        weights = a->average ? tfm__result(o, TFM_F32, 3, mean) : tfm__result(o, TFM_F32, 4, size);
        if (weights) a->weights = (float *)weights->data;
    }
    if (!y || (options->weights && !weights) || !tfm__attn_save(o, a, options)) return tfm__leave(o, NULL);
    if (!tfm__mask_prepare(o, &a->mask, &options->mask, size, held, start)) return tfm__leave(o, NULL);
    if (weights && a->stage == TFM_WEIGHTS_PROBABILITIES) {
        a->top = (float *)tfm__temporary(o, rows * (int64_t)sizeof(float));
        a->sum = (float *)tfm__temporary(o, rows * (int64_t)sizeof(float));
        if (!a->top || !a->sum) return tfm__leave(o, NULL);
    }
    if (!tfm__attn_plan(o, a)) return tfm__leave(o, NULL);
    if (o->run && rows > 0) tfm__attn_run(o, a);
    y = tfm__leave(o, y);
    if (y && weights) *options->weights = weights;
    return y;
}

TFM_API tfm_tensor *tfm_attention(tfm_ctx *c, const tfm_tensor *q, const tfm_tensor *k, const tfm_tensor *v,
                                  const tfm_attention_options *options) {
    tfm_attention_options none;
    tfm__op o;
    tfm__attn a;
    memset(&none, 0, sizeof none);
    memset(&a, 0, sizeof a);
    if (!tfm__enter(c, &o, TFM__OP_ATTENTION, 3, q, k, v)) return NULL;
    if (!tfm__need_float(&o, "q", q) || !tfm__need_float(&o, "k", k) || !tfm__need_float(&o, "v", v)) return NULL;
    if (q->ndim != 4 || k->ndim != 4 || v->ndim != 4) {
        return tfm__reject(&o, "q is %s, k is %s, v is %s: expected (batch, heads, length, head size)",
                           tfm__describe(&o, q), tfm__describe(&o, k), tfm__describe(&o, v));
    }
    if (k->shape[0] != q->shape[0] || v->shape[0] != q->shape[0] || k->shape[3] != q->shape[3]
        || v->shape[1] != k->shape[1]
        || v->shape[2] != k->shape[2]) {
        return tfm__reject(&o, "q is %s, k is %s, v is %s: expected (B, H, Lq, dk), (B, Hkv, Lk, dk), (B, Hkv, Lk, dv)",
                           tfm__describe(&o, q), tfm__describe(&o, k), tfm__describe(&o, v));
    }
    a.batch = q->shape[0];
    a.heads = q->shape[1];
    a.kv_heads = k->shape[1];
    a.queries = q->shape[2];
    a.keys = k->shape[2];
    a.key_size = q->shape[3];
    a.value_size = v->shape[3];
    a.q = tfm__attn_operand_of(q);
    a.key = tfm__attn_operand_of(k);
    a.value = tfm__attn_operand_of(v);
    return tfm__attn_make(&o, &a, options ? options : &none, NULL, NULL);
}

/* -- weighted attention over a sequence ---------------------------------------------------------------------------- */

/* Made of public ops, so that gradients flow through all of it. Returns x (padding zeroed, so that nothing in it
 * matters) and the weights (B, L). */
static const tfm_tensor *tfm__weighted(tfm__op *o, const tfm_tensor *x, const tfm_tensor *weight,
                                       const tfm_tensor *bias,
                                 const tfm_tensor *key_lengths, tfm_tensor **weights) {
    tfm_ctx *const c = o->c;
    const tfm_tensor *clean = x;
    tfm_tensor *scores, *padding = NULL;
    if (key_lengths && x->shape[1] > 0) {
        const tfm_tensor *const position = tfm_arange(c, TFM_I64, 0.0, (double)x->shape[1], 1.0);
        padding = tfm_compare(c, position, tfm_unsqueeze(c, key_lengths, 1), TFM_GE);
        clean = tfm_masked_fill(c, x, tfm_unsqueeze(c, padding, 2), 0.0);
    }
    scores = tfm_squeeze(c, tfm_linear(c, clean, weight, bias, TFM_ACT_NONE), 2);
    if (padding) scores = tfm_masked_fill(c, scores, padding, -HUGE_VAL);
    *weights = tfm_softmax(c, scores, 1);
    return *weights ? clean : NULL;
}

static int tfm__weighted_check(tfm__op *o, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                               const tfm_tensor *key_lengths) {
    if (!tfm__optional(o, bias) || !tfm__optional(o, key_lengths) || !tfm__need_float(o, "x", x)) return 0;
    if (x->ndim != 3 || weight->ndim != 2 || weight->shape[0] != 1 || weight->shape[1] != x->shape[2]
        || (bias && (bias->ndim != 1 || bias->shape[0] != 1))) {
        tfm__reject(o, "x is %s, weight is %s, bias is %s: expected (B, L, d), (1, d), (1)", tfm__describe(o, x),
                    tfm__describe(o, weight), tfm__describe(o, bias));
        return 0;
    }
    if (!key_lengths) return 1;
    if (!tfm__need_index(o, "key_lengths", key_lengths)) return 0;
    if (key_lengths->ndim != 1 || key_lengths->shape[0] != x->shape[0]) {
        tfm__reject(o, "x is %s, key_lengths is %s: expected one length for each batch row", tfm__describe(o, x),
                    tfm__describe(o, key_lengths));
        return 0;
    }
    return tfm__mask_check_range(o, "key_lengths", key_lengths, 0, x->shape[1]);
}

/* Leaves the op; frees what was made on the way when nothing is recorded. */
static tfm_tensor *tfm__weighted_leave(tfm__op *o, tfm_marker mark, tfm_tensor *y, tfm_tensor *w,
                                       tfm_tensor **weights) {
    tfm_tensor *list[2];
    list[0] = y;
    list[1] = weights ? w : NULL;
    if (y && !tfm__recording(o->c)) (void)tfm__keep_all(o->c, mark, list, 2);
    y = tfm__leave(o, y);
    if (y && weights) *weights = list[1];
    return y;
}

TFM_API tfm_tensor *tfm_weighted_sequence(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight,
                                          const tfm_tensor *bias, const tfm_tensor *key_lengths, tfm_tensor **weights) {
    tfm__op o;
    tfm_marker mark;
    const tfm_tensor *clean;
    tfm_tensor *w = NULL, *y;
    if (!tfm__enter(c, &o, TFM__OP_WEIGHTED_SEQUENCE, 2, x, weight)) return NULL;
    if (!tfm__weighted_check(&o, x, weight, bias, key_lengths)) return NULL;
    mark = tfm__mark(c);
    clean = tfm__weighted(&o, x, weight, bias, key_lengths, &w);
    y = tfm_mul(c, clean, tfm_unsqueeze(c, w, 2));
    return tfm__weighted_leave(&o, mark, y, w, weights);
}

TFM_API tfm_tensor *tfm_weighted_pool(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                                      const tfm_tensor *key_lengths, tfm_tensor **weights) {
    tfm__op o;
    tfm_marker mark;
    const tfm_tensor *clean;
    tfm_tensor *w = NULL, *y;
    if (!tfm__enter(c, &o, TFM__OP_WEIGHTED_POOL, 2, x, weight)) return NULL;
    if (!tfm__weighted_check(&o, x, weight, bias, key_lengths)) return NULL;
    mark = tfm__mark(c);
    clean = tfm__weighted(&o, x, weight, bias, key_lengths, &w);
    y = tfm_squeeze(c, tfm_matmul(c, tfm_unsqueeze(c, w, 1), clean), 1);
    return tfm__weighted_leave(&o, mark, y, w, weights);
}

/* -- key/value cache -----------------------------------------------------------------------------------------------
 *
 *  Keys lie as attention's tiles want them, panels [ceil(capacity / 16)][key_size][16], values row-major
 *  [capacity][value_size]; one of each by layer, batch row and head. Positions past a row's length hold anything:
 *  attention never lets them in, but the rest of a panel that an append begins is zeroed, so that nothing undefined is
 *  computed with.
 * ---------------------------------------------------------------------------------------------------------------- */

struct tfm_cache {
    tfm_allocator allocator;
    int dry;                               /* made in a dry run: lengths are real, keys and values are not there */
    int dtype;
    int64_t layers, batch, heads, key_size, value_size, capacity;
    int64_t size;                          /* bytes of an element */
    int64_t key_head, value_head;          /* bytes of one head's keys, values */
    int64_t *length, *start;               /* [layers][batch]; start: position of the last append's first key */
    char *keys, *values;
};

static int64_t tfm__cache_at(const tfm_cache *cache, int64_t layer, int64_t row) {
    return layer * cache->batch + row;
}

static char *tfm__cache_keys(const tfm_cache *cache, int64_t layer, int64_t row, int64_t head) {
    return cache->keys + (tfm__cache_at(cache, layer, row) * cache->heads + head) * cache->key_head;
}

static char *tfm__cache_values(const tfm_cache *cache, int64_t layer, int64_t row, int64_t head) {
    return cache->values + (tfm__cache_at(cache, layer, row) * cache->heads + head) * cache->value_head;
}

/* Bytes of whole panels that hold `length` keys, of `length` values. */
static int64_t tfm__cache_key_bytes(const tfm_cache *cache, int64_t length) {
    return tfm__round_up(length, TFM__KEY_PANEL) * cache->key_size * cache->size;
}

static int64_t tfm__cache_value_bytes(const tfm_cache *cache, int64_t length) {
    return length * cache->value_size * cache->size;
}

/* The same where they lie: panels of 64 columns and as many keys as a block has, so that a block is one stream whatever
 * the width of a tile; up to 64 columns are rows side by side. */
static int64_t tfm__cache_value_room(const tfm_cache *cache, int64_t length) {
    const int panels = cache->value_size > TFM__KEY_PANEL;
    return tfm__cache_value_bytes(cache, panels ? tfm__round_up(length, TFM__BLOCK_KEYS) : length);
}

/* Columns from `col`, a multiple of 64, on of the value at a position: where they lie, and how many bytes. */
static char *tfm__cache_value_at(const tfm_cache *cache, char *values, int64_t position, int64_t col, size_t *bytes) {
    const int64_t key = position % TFM__BLOCK_KEYS, width = tfm__min64(TFM__KEY_PANEL, cache->value_size - col);
    *bytes = (size_t)(width * cache->size);
    return values + ((position - key) * cache->value_size + col * TFM__BLOCK_KEYS + key * width) * cache->size;
}

/* The value at a position from a row of its columns, or (from NULL) into one. */
static void tfm__cache_value_row(const tfm_cache *cache, char *values, int64_t position, const char *from, char *to) {
    int64_t col;
    for (col = 0; col < cache->value_size; col += TFM__KEY_PANEL) {
        size_t bytes;
        char *const at = tfm__cache_value_at(cache, values, position, col, &bytes);
        if (from) {
            memcpy(at, from + col * cache->size, bytes);
        } else {
            memcpy(to + col * cache->size, at, bytes);
        }
    }
}

static int64_t tfm__cache_longest(const tfm_cache *cache, int64_t layer) {
    int64_t longest = 0, b;
    for (b = 0; b < cache->batch; ++b) longest = tfm__max64(longest, cache->length[tfm__cache_at(cache, layer, b)]);
    return longest;
}

/* -- create, destroy ----------------------------------------------------------------------------------------------- */

/* Fills the sizes of *cache; NULL, or what is wrong. *bytes: of the keys and of the values. */
static const char *tfm__cache_plan(const tfm_cache_options *options, tfm_cache *cache, int64_t bytes[2]) {
    int64_t rows, all;
    memset(cache, 0, sizeof *cache);
    if (options->dtype != TFM_F32 && options->dtype != TFM_F16 && options->dtype != TFM_BF16) {
        return "dtype must be f32, f16 or bf16";
    }
    if (options->layers < 0 || options->batch < 0 || options->capacity < 0) {
        return "layers, batch and capacity must not be negative";
    }
    if (options->heads < 1) return "heads must be at least 1";
    if (options->key_size < 1 || options->key_size > TFM__ATTN_SIZE) return "key_size must be 1 to 65536";
    if (options->value_size < 0 || options->value_size > TFM__ATTN_SIZE) {
        return "value_size must be 0 (key_size) to 65536";
    }
    cache->dtype = options->dtype;
    cache->layers = options->layers ? options->layers : 1;
    cache->batch = options->batch ? options->batch : 1;
    cache->heads = options->heads;
    cache->key_size = options->key_size;
    cache->value_size = options->value_size ? options->value_size : options->key_size;
    cache->capacity = options->capacity;
    cache->size = tfm_dtype_size(options->dtype);
    if (cache->capacity > INT64_MAX / 4
        || !tfm__mul(tfm__round_up(cache->capacity, TFM__KEY_PANEL), cache->key_size * cache->size, &cache->key_head)
        || !tfm__mul(cache->value_size > TFM__KEY_PANEL ? tfm__round_up(cache->capacity, TFM__BLOCK_KEYS)
                     : cache->capacity, cache->value_size * cache->size, &cache->value_head)
        || !tfm__mul(cache->layers, cache->batch, &rows) || !tfm__mul(rows, (int64_t)sizeof(int64_t) * 2, &all)
        || !tfm__mul(rows, cache->heads, &all) || !tfm__mul(all, cache->key_head, &bytes[0])
        || !tfm__mul(all, cache->value_head, &bytes[1])) {
        return "the sizes overflow";
    }
    return NULL;
}

TFM_API int64_t tfm_cache_memory(const tfm_cache_options *options) {
    tfm_cache cache;
    int64_t bytes[2], all, lengths;
    if (!options || tfm__cache_plan(options, &cache, bytes)) return -1;
    lengths = cache.layers * cache.batch * (int64_t)sizeof(int64_t) * 2 + (int64_t)sizeof(tfm_cache);
    return tfm__add(bytes[0], bytes[1], &all) && tfm__add(all, lengths, &all) ? all : -1;
}

TFM_API void tfm_cache_destroy(tfm_cache *cache) {
    tfm_allocator allocator;
    if (!cache) return;
    allocator = cache->allocator;
    tfm__free_to(&allocator, cache->keys);
    tfm__free_to(&allocator, cache);
}

/* An empty cache; NULL + the op's error (the op goes on and must be left). */
static tfm_cache *tfm__cache_make(tfm__op *o, const tfm_cache_options *options) {
    tfm_cache plan, *cache;
    int64_t bytes[2], rows, all;
    const char *const wrong = tfm__cache_plan(options, &plan, bytes);
    if (wrong) {
        tfm__fail(o->c, TFM_INVALID, "%s: %s (dtype %s, layers %lld, batch %lld, heads %lld, key_size %lld, "
                  "value_size %lld, capacity %lld)", tfm__op_name(o), wrong, tfm_dtype_name(options->dtype),
                  (long long)options->layers, (long long)options->batch, (long long)options->heads,
                  (long long)options->key_size, (long long)options->value_size, (long long)options->capacity);
        return NULL;
    }
    rows = plan.layers * plan.batch;
    cache = (tfm_cache *)tfm__alloc_shared(o->c, (int64_t)sizeof(tfm_cache) + rows * 2 * (int64_t)sizeof(int64_t), 0);
    if (!cache) return NULL;
    *cache = plan;
    cache->allocator = o->c->allocator;
    cache->dry = o->c->dry;
    cache->length = (int64_t *)(void *)(cache + 1);
    cache->start = cache->length + rows;
    memset(cache->length, 0, (size_t)(rows * 2) * sizeof(int64_t));
    /* one block: the larger it is, the more of it lies in large pages (keys end on a line) */
    if (!tfm__add(bytes[0], bytes[1], &all)) all = INT64_MAX;
    cache->keys = (char *)tfm__alloc_shared(o->c, all, 1);
    cache->values = cache->keys ? cache->keys + (cache->dry ? 0 : bytes[0]) : NULL;
    if (cache->values) return cache;
    tfm_cache_destroy(cache);
    return NULL;
}

TFM_API tfm_cache *tfm_cache_create(tfm_ctx *c, const tfm_cache_options *options) {
    tfm__op o;
    tfm_cache *cache = NULL;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_CREATE, 0)) return NULL;
    if (options) {
        cache = tfm__cache_make(&o, options);
    } else {
        tfm__fail(c, TFM_INVALID, "tfm_cache_create: options is NULL");
    }
    tfm__leave(&o, NULL);
    return cache;
}

TFM_API int64_t tfm_cache_length(const tfm_cache *cache, int64_t layer, int64_t row) {
    if (!cache || layer < 0 || layer >= cache->layers || row < 0 || row >= cache->batch) return -1;
    return cache->length[tfm__cache_at(cache, layer, row)];
}

TFM_API int64_t tfm_cache_capacity(const tfm_cache *cache) {
    return cache ? cache->capacity : 0;
}

TFM_API void tfm_cache_reset(tfm_cache *cache) {
    if (cache) memset(cache->length, 0, (size_t)(cache->layers * cache->batch * 2) * sizeof(int64_t));
}

/* 1 = the op may use the cache; 0 = rejected and left. */
static int tfm__cache_check(tfm__op *o, const tfm_cache *cache, int64_t layer) {
    if (!cache) {
        tfm__reject(o, "cache is NULL");
    } else if (cache->dry && o->run) {
        tfm__reject(o, "the cache was made between tfm_measure_begin and _end and holds nothing");
    } else if (layer < 0 || layer >= cache->layers) {
        tfm__reject(o, "layer is %lld: the cache has %lld", (long long)layer, (long long)cache->layers);
    } else {
        return 1;
    }
    return 0;
}

/* 1: a verb may change it. A real cache is left as it is in a dry run. */
static int tfm__cache_writes(const tfm__op *o, const tfm_cache *cache) {
    return o->run || cache->dry;
}

/* -- append -------------------------------------------------------------------------------------------------------- */

typedef struct tfm__cache_job {
    tfm_ctx *c;
    const tfm__kernels *k;
    tfm_cache *cache;
    int64_t layer, most;                   /* most: positions of k and v */
    const tfm_tensor *key, *value, *counts;
} tfm__cache_job;

static int64_t tfm__cache_count(const tfm_tensor *counts, int64_t row, int64_t otherwise) {
    return counts ? tfm__id_at(counts->dtype, counts->data, row * counts->stride[0]) : otherwise;
}

/* Keys [0, count) of one head go to positions start ... Sixteen at a time are packed, single keys are scattered into
 * their panel. */
static void tfm__cache_put_keys(const tfm__cache_job *a, int64_t row, int64_t head, int64_t start, int64_t count,
                                float *spare) {
    const tfm_cache *const cache = a->cache;
    const tfm_tensor *const t = a->key;
    char *const keys = tfm__cache_keys(cache, a->layer, row, head);
    const int64_t panel = TFM__KEY_PANEL * cache->key_size * cache->size;
    int64_t done = 0;
    while (done < count) {
        const int64_t position = start + done, lane = position % TFM__KEY_PANEL;
        const int64_t room = tfm__min64(count - done, TFM__KEY_PANEL - lane);
        const int64_t whole = lane % TFM__PANEL == 0 ? room / TFM__PANEL * TFM__PANEL : 0;
        const char *const from = tfm__at(t, row * t->stride[0] + head * t->stride[1] + done * t->stride[2]);
        char *const to = keys + position / TFM__KEY_PANEL * panel + lane * cache->size;
        if (lane == 0 && whole < TFM__KEY_PANEL) memset(to, 0, (size_t)panel);
        if (whole > 0) {
            a->k->pack_panels(to, cache->dtype, TFM__KEY_PANEL, from, t->dtype, t->stride[2], t->stride[3], whole,
                              cache->key_size);
            done += whole;
            continue;
        }
        a->k->load(spare, from, t->dtype, t->stride[3], cache->key_size);
        a->k->store(to, cache->dtype, TFM__KEY_PANEL, spare, cache->key_size);
        done += 1;
    }
}

static void tfm__cache_put_values(const tfm__cache_job *a, int64_t row, int64_t head, int64_t start, int64_t count,
                                  float *spare) {
    const tfm_cache *const cache = a->cache;
    const tfm_tensor *const t = a->value;
    char *const values = tfm__cache_values(cache, a->layer, row, head);
    int64_t i;
    for (i = 0; i < count; ++i) {
        char *from = tfm__at(t, row * t->stride[0] + head * t->stride[1] + i * t->stride[2]);
        if (t->dtype != cache->dtype || t->stride[3] != 1) {
            a->k->load(spare, from, t->dtype, t->stride[3], cache->value_size);
            from = (char *)(spare + cache->value_size);
            a->k->store(from, cache->dtype, 1, spare, cache->value_size);
        }
        tfm__cache_value_row(cache, values, start + i, from, NULL);
    }
}

/* An item is a head of a batch row. Spare: the scratch holds twice TFM__ATTN_SIZE floats. */
static void tfm__cache_append_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__cache_job *const a = (const tfm__cache_job *)arg;
    float *const spare = (float *)tfm__scratch(a->c, slot);
    for (; begin < end; ++begin) {
        const int64_t row = begin / a->cache->heads, head = begin % a->cache->heads;
        const int64_t start = a->cache->length[tfm__cache_at(a->cache, a->layer, row)];
        const int64_t count = tfm__cache_count(a->counts, row, a->most);
        tfm__cache_put_keys(a, row, head, start, count, spare);
        tfm__cache_put_values(a, row, head, start, count, spare);
    }
}

static int tfm__cache_check_append(tfm__op *o, const tfm_cache *cache, int64_t layer, const tfm_tensor *k,
                                   const tfm_tensor *v, const tfm_tensor *counts) {
    int64_t row;
    if (!tfm__need_float(o, "k", k) || !tfm__need_float(o, "v", v)) return 0;
    if (k->requires_grad || v->requires_grad) {
        tfm__reject(o, "%s is recorded: gradients do not go through a cache", k->requires_grad ? "k" : "v");
        return 0;
    }
    if (k->ndim != 4 || v->ndim != 4 || k->shape[0] != cache->batch || k->shape[1] != cache->heads
        || k->shape[3] != cache->key_size
        || v->shape[0] != k->shape[0] || v->shape[1] != k->shape[1] || v->shape[2] != k->shape[2]
            || v->shape[3] != cache->value_size) {
        tfm__reject(o, "k is %s, v is %s: expected (%lld, %lld, L, %lld) and (%lld, %lld, L, %lld)",
                    tfm__describe(o, k), tfm__describe(o, v), (long long)cache->batch, (long long)cache->heads,
                    (long long)cache->key_size, (long long)cache->batch, (long long)cache->heads,
                    (long long)cache->value_size);
        return 0;
    }
    if (counts) {
        if (!tfm__need_index(o, "counts", counts)) return 0;
        if (counts->ndim != 1 || counts->shape[0] != cache->batch) {
            tfm__reject(o, "counts is %s: expected one count for each of %lld rows", tfm__describe(o, counts),
                        (long long)cache->batch);
            return 0;
        }
    }
    for (row = 0; row < cache->batch; ++row) {
        const int64_t held = cache->length[tfm__cache_at(cache, layer, row)];
        const int64_t count = tfm__cache_count(o->run ? counts : NULL, row, k->shape[2]);
        if (count < 0 || count > k->shape[2]) {
            tfm__reject(o, "counts[%lld] is %lld: expected 0 to %lld", (long long)row, (long long)count,
                        (long long)k->shape[2]);
            return 0;
        }
        if (count <= cache->capacity - held) continue;
        tfm__reject(o, "row %lld of layer %lld is full: capacity %lld, length %lld, %lld more wanted "
                    "(tfm_cache_slide makes room)",
                    (long long)row, (long long)layer, (long long)cache->capacity, (long long)held, (long long)count);
        return 0;
    }
    return 1;
}

TFM_API tfm_status tfm_cache_append(tfm_ctx *c, tfm_cache *cache, int64_t layer, const tfm_tensor *k,
                                    const tfm_tensor *v, const tfm_tensor *counts) {
    tfm__op o;
    tfm__cache_job a;
    int64_t row;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_APPEND, 2, k, v)) return tfm__refused(c);
    if (!tfm__optional(&o, counts) || !tfm__cache_check(&o, cache, layer)
        || !tfm__cache_check_append(&o, cache, layer, k, v, counts)) {
        return tfm__refused(c);
    }
    memset(&a, 0, sizeof a);
    a.c = c;
    a.k = o.k;
    a.cache = cache;
    a.layer = layer;
    a.most = k->shape[2];
    a.key = k;
    a.value = v;
    a.counts = counts;
    o.bytes = 2.0 * (double)(cache->batch * cache->heads * a.most * (cache->key_size
                                                                     + cache->value_size) * cache->size);
    if (o.run && a.most > 0) tfm__for(c, cache->batch * cache->heads, 1, o.bytes, tfm__cache_append_task, &a);
    for (row = 0; tfm__cache_writes(&o, cache) && !tfm__cancelled(c) && row < cache->batch; ++row) {
        const int64_t at = tfm__cache_at(cache, layer, row);
        cache->start[at] = cache->length[at];
        cache->length[at] += tfm__cache_count(o.run ? counts : NULL, row, a.most);
    }
    return tfm__leave_status(&o);
}

/* -- attention over a cache ---------------------------------------------------------------------------------------- */

TFM_API tfm_tensor *tfm_attention_cached(tfm_ctx *c, const tfm_tensor *q, const tfm_cache *cache, int64_t layer,
                                         const tfm_attention_options *options) {
    tfm_attention_options none;
    tfm__op o;
    tfm__attn a;
    memset(&none, 0, sizeof none);
    memset(&a, 0, sizeof a);
    if (!tfm__enter(c, &o, TFM__OP_ATTENTION_CACHED, 1, q)) return NULL;
    if (!tfm__cache_check(&o, cache, layer) || !tfm__need_float(&o, "q", q)) return NULL;
    if (q->requires_grad) return tfm__reject(&o, "q is recorded: gradients do not go through a cache");
    if (q->ndim != 4 || q->shape[0] != cache->batch || q->shape[3] != cache->key_size) {
        return tfm__reject(&o, "q is %s: expected (%lld, heads, L, %lld)", tfm__describe(&o, q),
                           (long long)cache->batch, (long long)cache->key_size);
    }
    a.batch = cache->batch;
    a.heads = q->shape[1];
    a.kv_heads = cache->heads;
    a.queries = q->shape[2];
    a.keys = tfm__cache_longest(cache, layer);
    /* what an append would have made it */
    if (!tfm__cache_writes(&o, cache)) a.keys = tfm__min64(a.keys + a.queries, cache->capacity);
    a.key_size = cache->key_size;
    a.value_size = cache->value_size;
    a.q = tfm__attn_operand_of(q);
    a.key.dtype = a.value.dtype = cache->dtype;
    a.key.size = a.value.size = cache->size;
    a.key.data = tfm__cache_keys(cache, layer, 0, 0);
    a.value.data = tfm__cache_values(cache, layer, 0, 0);
    a.key.stride[1] = cache->key_head / cache->size;
    a.key.stride[0] = a.key.stride[1] * cache->heads;
    a.value.stride[1] = cache->value_head / cache->size;
    a.value.stride[0] = a.value.stride[1] * cache->heads;
    a.value.stride[2] = cache->value_size;
    a.value.stride[3] = 1;
    a.panels = 1;
    return tfm__attn_make(&o, &a, options ? options : &none, cache->length + tfm__cache_at(cache, layer, 0),
                          cache->start + tfm__cache_at(cache, layer, 0));
}

/* -- shorten and shift --------------------------------------------------------------------------------------------- */

TFM_API tfm_status tfm_cache_truncate(tfm_ctx *c, tfm_cache *cache, int64_t row, int64_t length) {
    tfm__op o;
    int64_t layer, b;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_TRUNCATE, 0)) return tfm__refused(c);
    if (!tfm__cache_check(&o, cache, 0)) return tfm__refused(c);
    if (row < -1 || row >= cache->batch || length < 0) {
        tfm__reject(&o, "row is %lld, length %lld: expected a row below %lld or -1 for all, and a length of at least 0",
                    (long long)row, (long long)length, (long long)cache->batch);
        return tfm__refused(c);
    }
    for (layer = 0; tfm__cache_writes(&o, cache) && layer < cache->layers; ++layer) {
        for (b = row < 0 ? 0 : row; b < (row < 0 ? cache->batch : row + 1); ++b) {
            const int64_t at = tfm__cache_at(cache, layer, b);
            cache->length[at] = tfm__min64(cache->length[at], length);
            cache->start[at] = tfm__min64(cache->start[at], length);
        }
    }
    return tfm__leave_status(&o);
}

/* Moves the keys of one head `count` positions to the front. Ascending: what is read lies behind what is written. */
static void tfm__cache_shift_keys(const tfm_cache *cache, char *keys, int64_t count, int64_t length) {
    const int64_t size = cache->size, panel = TFM__KEY_PANEL * cache->key_size * size;
    int64_t to, d;
    if (count % TFM__KEY_PANEL == 0) {
        memmove(keys, keys + count / TFM__KEY_PANEL * panel, (size_t)tfm__cache_key_bytes(cache, length - count));
        return;
    }
    for (to = 0; to < length - count; ++to) {
        const int64_t from = to + count;
        char *const t = keys + to / TFM__KEY_PANEL * panel + to % TFM__KEY_PANEL * size;
        const char *const f = keys + from / TFM__KEY_PANEL * panel + from % TFM__KEY_PANEL * size;
        for (d = 0; d < cache->key_size; ++d) {
            memcpy(t + d * TFM__KEY_PANEL * size, f + d * TFM__KEY_PANEL * size, (size_t)size);
        }
    }
}

static void tfm__cache_shift_values(const tfm_cache *cache, char *values, int64_t count, int64_t length) {
    int64_t to, col;
    for (col = 0; col < cache->value_size; col += TFM__KEY_PANEL) {
        for (to = 0; to < length - count; ++to) {
            size_t bytes;
            const char *const from = tfm__cache_value_at(cache, values, to + count, col, &bytes);
            memcpy(tfm__cache_value_at(cache, values, to, col, &bytes), from, bytes);
        }
    }
}

/* On the calling thread, so that a cancel cannot stop it half way. */
TFM_API tfm_status tfm_cache_slide(tfm_ctx *c, tfm_cache *cache, int64_t count) {
    tfm__op o;
    int64_t i, head;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_SLIDE, 0)) return tfm__refused(c);
    if (!tfm__cache_check(&o, cache, 0)) return tfm__refused(c);
    if (count < 0) {
        tfm__reject(&o, "count is %lld: expected at least 0", (long long)count);
        return tfm__refused(c);
    }
    for (i = 0; tfm__cache_writes(&o, cache) && i < cache->layers * cache->batch; ++i) {
        const int64_t length = cache->length[i];
        for (head = i * cache->heads; o.run && count < length && head < (i + 1) * cache->heads; ++head) {
            tfm__cache_shift_keys(cache, cache->keys + head * cache->key_head, count, length);
            tfm__cache_shift_values(cache, cache->values + head * cache->value_head, count, length);
        }
        cache->length[i] = tfm__max64(0, length - count);
        cache->start[i] = tfm__max64(0, cache->start[i] - count);
    }
    return tfm__leave_status(&o);
}

/* -- reorder and fork ---------------------------------------------------------------------------------------------- */

static int tfm__cache_check_rows(tfm__op *o, const tfm_cache *cache, const int64_t *rows, int64_t count,
                                 int64_t expected) {
    int64_t i;
    if (!rows || count != expected) {
        tfm__reject(o, "rows is %s, count is %lld: expected %lld row numbers", rows ? "given" : "NULL",
                    (long long)count, (long long)expected);
        return 0;
    }
    for (i = 0; i < count; ++i) {
        if (rows[i] >= 0 && rows[i] < cache->batch) continue;
        tfm__reject(o, "rows[%lld] is %lld: the cache has %lld rows", (long long)i, (long long)rows[i],
                    (long long)cache->batch);
        return 0;
    }
    return 1;
}

/* Row `to` of one cache becomes what row `from` of another (or the same) is; all layers. data 0: only the lengths. */
static void tfm__cache_copy_row(tfm_cache *target, int64_t to, const tfm_cache *source, int64_t from, int data) {
    int64_t layer, head;
    for (layer = 0; layer < source->layers; ++layer) {
        const int64_t at = tfm__cache_at(source, layer, from), length = source->length[at];
        for (head = 0; data && head < source->heads; ++head) {
            memcpy(tfm__cache_keys(target, layer, to, head), tfm__cache_keys(source, layer, from, head),
                   (size_t)tfm__cache_key_bytes(source, length));
            memcpy(tfm__cache_values(target, layer, to, head), tfm__cache_values(source, layer, from, head),
                   (size_t)tfm__cache_value_room(source, length));
        }
        target->length[tfm__cache_at(target, layer, to)] = length;
        target->start[tfm__cache_at(target, layer, to)] = source->start[at];
    }
}

static void tfm__swap_bytes(char *a, char *b, int64_t bytes) {
    char part[1024];
    while (bytes > 0) {
        const size_t n = (size_t)tfm__min64(bytes, (int64_t)sizeof part);
        memcpy(part, a, n);
        memcpy(a, b, n);
        memcpy(b, part, n);
        a += n;
        b += n;
        bytes -= (int64_t)n;
    }
}

static void tfm__swap_numbers(int64_t *a, int64_t *b) {
    const int64_t old = *a;
    *a = *b;
    *b = old;
}

static void tfm__cache_swap_rows(tfm_cache *cache, int64_t i, int64_t j) {
    int64_t layer, head;
    for (layer = 0; layer < cache->layers; ++layer) {
        const int64_t m = tfm__cache_at(cache, layer, i), n = tfm__cache_at(cache, layer, j);
        const int64_t longer = tfm__max64(cache->length[m], cache->length[n]);
        for (head = 0; head < cache->heads; ++head) {
            tfm__swap_bytes(tfm__cache_keys(cache, layer, i, head), tfm__cache_keys(cache, layer, j, head),
                            tfm__cache_key_bytes(cache, longer));
            tfm__swap_bytes(tfm__cache_values(cache, layer, i, head), tfm__cache_values(cache, layer, j, head),
                            tfm__cache_value_room(cache, longer));
        }
        tfm__swap_numbers(&cache->length[m], &cache->length[n]);
        tfm__swap_numbers(&cache->start[m], &cache->start[n]);
    }
}

/* Moves rows in place: first every row whose old content nobody waits for any more is overwritten; what remains are
 * cycles, which swaps turn. from[i]: where row i's new content is; users[i]: how many rows still want row i's old
 * content. */
static void tfm__cache_move_rows(tfm_cache *cache, int64_t *from, int64_t *users) {
    int64_t i, moved = 1;
    for (i = 0; i < cache->batch; ++i) users[i] = 0;
    for (i = 0; i < cache->batch; ++i) users[from[i]] += from[i] != i;
    while (moved) {
        moved = 0;
        for (i = 0; i < cache->batch; ++i) {
            if (from[i] == i || users[i] > 0) continue;
            tfm__cache_copy_row(cache, i, cache, from[i], 1);
            users[from[i]] -= 1;
            from[i] = i;
            moved = 1;
        }
    }
    for (i = 0; i < cache->batch; ++i) {
        int64_t at = i;
        while (from[at] != i) { /* row `at` gets its content; what it held goes one step along the cycle */
            const int64_t next = from[at];
            tfm__cache_swap_rows(cache, at, next);
            from[at] = at;
            at = next;
        }
        from[at] = at;
    }
}

TFM_API tfm_status tfm_cache_reorder(tfm_ctx *c, tfm_cache *cache, const int64_t *rows, int64_t count) {
    tfm__op o;
    int64_t *from, *users;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_REORDER, 0)) return tfm__refused(c);
    if (!tfm__cache_check(&o, cache, 0) || !tfm__cache_check_rows(&o, cache, rows, count, cache->batch)) {
        return tfm__refused(c);
    }
    from = (int64_t *)tfm__temporary(&o, cache->batch * (int64_t)sizeof(int64_t));
    users = (int64_t *)tfm__temporary(&o, cache->batch * (int64_t)sizeof(int64_t));
    if (from && users && o.run) {
        memcpy(from, rows, (size_t)count * sizeof(int64_t));
        tfm__cache_move_rows(cache, from, users);
    }
    return tfm__leave_status(&o);
}

static tfm_cache_options tfm__cache_options_of(const tfm_cache *cache, int64_t batch) {
    tfm_cache_options options;
    memset(&options, 0, sizeof options);
    options.dtype = cache->dtype;
    options.layers = cache->layers;
    options.batch = batch;
    options.heads = cache->heads;
    options.key_size = cache->key_size;
    options.value_size = cache->value_size;
    options.capacity = cache->capacity;
    return options;
}

TFM_API tfm_cache *tfm_cache_fork(tfm_ctx *c, const tfm_cache *cache, const int64_t *rows, int64_t count) {
    tfm__op o;
    tfm_cache *copy;
    tfm_cache_options options;
    int64_t i;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_FORK, 0)) return NULL;
    if (!tfm__cache_check(&o, cache, 0) || !tfm__cache_check_rows(&o, cache, rows, count, tfm__max64(count, 1))) {
        return NULL;
    }
    options = tfm__cache_options_of(cache, count);
    copy = tfm__cache_make(&o, &options);
    for (i = 0; copy && i < count; ++i) tfm__cache_copy_row(copy, i, cache, rows[i], o.run);
    tfm__leave(&o, NULL);
    return copy;
}

/* -- save and load ------------------------------------------------------------------------------------------------- */

/* "TFMCACHE", then 64-bit little-endian numbers: version, dtype, layers, batch, heads, key_size, value_size,
 * capacity, the lengths, the starts; then by layer, row and head the keys (whole panels, zeroed past the length) and
 * the values. */
#define TFM__CACHE_VERSION 2
#define TFM__CACHE_FIELDS 8

static void tfm__put_number(char *p, int64_t value) {
    int i;
    for (i = 0; i < 8; ++i) p[i] = (char)(unsigned char)((uint64_t)value >> (8 * i) & 255u);
}

static int64_t tfm__get_number(const char *p) {
    uint64_t value = 0;
    int i;
    for (i = 0; i < 8; ++i) value |= (uint64_t)(unsigned char)p[i] << (8 * i);
    return value > (uint64_t)INT64_MAX ? -1 : (int64_t)value;
}

/* Of the numbers in front of the keys; the caller knows that layers x batch fits. */
static int64_t tfm__cache_header(const tfm_cache *cache) {
    return 8 * (1 + TFM__CACHE_FIELDS + 2 * cache->layers * cache->batch);
}

TFM_API int64_t tfm_cache_saved_size(const tfm_cache *cache) {
    int64_t size, i;
    if (!cache) return -1;
    size = tfm__cache_header(cache);
    for (i = 0; i < cache->layers * cache->batch; ++i) {
        size += cache->heads * (tfm__cache_key_bytes(cache, cache->length[i])
                                + tfm__cache_value_bytes(cache, cache->length[i]));
    }
    return size;
}

/* Zeroes the lanes of the last panel that hold no key. */
static void tfm__cache_clean_tail(const tfm_cache *cache, char *keys, int64_t length) {
    const int64_t used = length % TFM__KEY_PANEL, row = TFM__KEY_PANEL * cache->size;
    char *p = keys + length / TFM__KEY_PANEL * row * cache->key_size;
    int64_t d;
    for (d = 0; used && d < cache->key_size; ++d, p += row) {
        memset(p + used * cache->size, 0, (size_t)(row - used * cache->size));
    }
}

TFM_API tfm_status tfm_cache_save(tfm_ctx *c, const tfm_cache *cache, void *buffer, int64_t size) {
    tfm__op o;
    int64_t i, head;
    char *p = (char *)buffer;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_SAVE, 0)) return tfm__refused(c);
    if (!tfm__cache_check(&o, cache, 0)) return tfm__refused(c);
    if (!buffer || size < tfm_cache_saved_size(cache)) {
        tfm__reject(&o, "buffer is %s, size is %lld: at least %lld bytes are needed (tfm_cache_saved_size)",
                    buffer ? "given" : "NULL", (long long)size, (long long)tfm_cache_saved_size(cache));
        return tfm__refused(c);
    }
    if (o.run) {
        const int64_t field[TFM__CACHE_FIELDS] =
            {TFM__CACHE_VERSION, cache->dtype, cache->layers, cache->batch, cache->heads,
                                                  cache->key_size, cache->value_size, cache->capacity};
        memcpy(p, "TFMCACHE", 8);
        p += 8;
        for (i = 0; i < TFM__CACHE_FIELDS; ++i, p += 8) tfm__put_number(p, field[i]);
        /* starts follow the lengths */
        for (i = 0; i < 2 * cache->layers * cache->batch; ++i, p += 8) tfm__put_number(p, cache->length[i]);
        for (i = 0; i < cache->layers * cache->batch; ++i) {
            const int64_t keys = tfm__cache_key_bytes(cache, cache->length[i]);
            for (head = i * cache->heads; head < (i + 1) * cache->heads; ++head) {
                int64_t key;
                memcpy(p, cache->keys + head * cache->key_head, (size_t)keys);
                tfm__cache_clean_tail(cache, p, cache->length[i]);
                p += keys;
                for (key = 0; key < cache->length[i]; ++key, p += tfm__cache_value_bytes(cache, 1)) {
                    tfm__cache_value_row(cache, cache->values + head * cache->value_head, key, NULL, p);
                }
            }
        }
    }
    return tfm__leave_status(&o);
}

/* The options that a saved cache asks for, when everything that it says fits its size; else what is wrong. */
static const char *tfm__cache_read_header(const char *p, int64_t size, tfm_cache_options *options) {
    tfm_cache plan;
    int64_t bytes[2], rows, all, i, expected;
    memset(options, 0, sizeof *options);
    if (!p || size < 8 * (1 + TFM__CACHE_FIELDS)) return "it is shorter than a header";
    if (memcmp(p, "TFMCACHE", 8) != 0) return "it does not begin with TFMCACHE";
    if (tfm__get_number(p + 8) != TFM__CACHE_VERSION) return "it has another version";
    if (tfm__get_number(p + 16) < 0 || tfm__get_number(p + 16) >= TFM_DTYPE_COUNT) return "it has an unknown dtype";
    options->dtype = (int)tfm__get_number(p + 16);
    options->layers = tfm__get_number(p + 24);
    options->batch = tfm__get_number(p + 32);
    options->heads = tfm__get_number(p + 40);
    options->key_size = tfm__get_number(p + 48);
    options->value_size = tfm__get_number(p + 56);
    options->capacity = tfm__get_number(p + 64);
    if (options->layers < 1 || options->batch < 1 || options->value_size < 1) return "its sizes are out of range";
    if (tfm__cache_plan(options, &plan, bytes)) return "its sizes are out of range";
    expected = 8 * (1 + TFM__CACHE_FIELDS);
    if (!tfm__mul(options->layers, options->batch, &rows) || !tfm__mul(rows, 16, &all) || all > size - expected) {
        return "it is cut off";
    }
    expected += all;
    p += 8 * (1 + TFM__CACHE_FIELDS);
    for (i = 0; i < rows; ++i) {
        const int64_t length = tfm__get_number(p + 8 * i), start = tfm__get_number(p + 8 * (rows + i));
        if (length < 0 || length > options->capacity || start < 0 || start > length) return "a length is out of range";
        /* at most a head's bytes, which fit */
        all = tfm__cache_key_bytes(&plan, length) + tfm__cache_value_bytes(&plan, length);
        if (!tfm__mul(all, options->heads, &all) || !tfm__add(expected, all, &expected) || expected > size) {
            return "it is cut off";
        }
    }
    return expected == size ? NULL : "bytes are left over";
}

TFM_API tfm_cache *tfm_cache_load(tfm_ctx *c, const void *buffer, int64_t size) {
    tfm__op o;
    tfm_cache_options options;
    tfm_cache *cache;
    const char *p = (const char *)buffer, *wrong;
    int64_t i, head;
    if (!tfm__enter(c, &o, TFM__OP_CACHE_LOAD, 0)) return NULL;
    wrong = tfm__cache_read_header(p, size, &options);
    if (wrong) {
        tfm__reject_as(&o, TFM_FORMAT, "not a saved cache of %lld bytes: %s", (long long)size, wrong);
        return NULL;
    }
    cache = tfm__cache_make(&o, &options);
    p += 8 * (1 + TFM__CACHE_FIELDS);
    for (i = 0; cache && i < 2 * cache->layers * cache->batch; ++i, p += 8) cache->length[i] = tfm__get_number(p);
    for (i = 0; cache && o.run && i < cache->layers * cache->batch; ++i) {
        for (head = i * cache->heads; head < (i + 1) * cache->heads; ++head) {
            char *const values = cache->values + head * cache->value_head;
            const int64_t keys = tfm__cache_key_bytes(cache, cache->length[i]);
            int64_t key;
            memcpy(cache->keys + head * cache->key_head, p, (size_t)keys);
            for (key = 0, p += keys; key < cache->length[i]; ++key, p += tfm__cache_value_bytes(cache, 1)) {
                tfm__cache_value_row(cache, values, key, p, NULL);
            }
        }
    }
    tfm__leave(&o, NULL);
    return cache;
}

/* -- heat maps -----------------------------------------------------------------------------------------------------
 *
 *  A matrix of weights as an SVG file or as text for a terminal. Labels are UTF-8 of any script: their width is counted
 *  in columns (wide characters two, combining marks none), control characters become their pictures, bad bytes U+FFFD.
 * ---------------------------------------------------------------------------------------------------------------- */

#define TFM__HEAT_MOST 2048        /* rows or columns */
#define TFM__HEAT_LABEL 24         /* columns of a label; longer ones end in an ellipsis */

/* -- text of any script -- */

/* The character at s (not its end) and its bytes. Malformed: U+FFFD, one byte. */
static int tfm__char_at(const char *s, uint32_t *code) {
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *const p = (const unsigned char *)s;
    const int length = p[0] < 0x80 ? 1 : p[0] >= 0xc2 && p[0] < 0xe0 ? 2 : p[0] >= 0xe0 && p[0] < 0xf0 ? 3
        : p[0] >= 0xf0 && p[0] < 0xf5 ? 4 : 0;
    uint32_t c;
    int i;
    *code = 0xfffd;
    if (length == 0) return 1;
    c = length == 1 ? p[0] : p[0] & (0x7fu >> length);
    for (i = 1; i < length; ++i) {
        if ((p[i] & 0xc0) != 0x80) return 1;
        c = c << 6 | (p[i] & 0x3fu);
    }
    if (c < least[length] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return 1;
    if (c < 0x20) c += 0x2400; /* pictures of control characters: a newline shows */
    *code = c == 0x7f ? 0x2421 : c == 0xfffe || c == 0xffff ? 0xfffd : c;
    return length;
}

static int tfm__char_bytes(uint32_t c, char out[4]) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3f));
        out[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3f));
    out[2] = (char)(0x80 | (c >> 6 & 0x3f));
    out[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

/* Columns that a terminal gives to a character. */
static int tfm__char_columns(uint32_t c) {
    static const struct {
        uint32_t first, last;
        int columns;
    } ranges[] = {
        {0x0300, 0x036f, 0}, {0x0483, 0x0489, 0}, {0x0591, 0x05bd, 0}, {0x05bf, 0x05bf, 0}, {0x05c1, 0x05c2, 0},
        {0x05c4, 0x05c5, 0}, {0x0610, 0x061a, 0}, {0x064b, 0x065f, 0}, {0x0670, 0x0670, 0}, {0x06d6, 0x06dc, 0},
        {0x06df, 0x06e4, 0}, {0x06e7, 0x06e8, 0}, {0x06ea, 0x06ed, 0}, {0x0900, 0x0902, 0}, {0x093a, 0x093a, 0},
        {0x093c, 0x093c, 0}, {0x0941, 0x0948, 0}, {0x094d, 0x094d, 0}, {0x0e31, 0x0e31, 0}, {0x0e34, 0x0e3a, 0},
        {0x0e47, 0x0e4e, 0}, {0x1100, 0x115f, 2}, {0x1ab0, 0x1aff, 0}, {0x1dc0, 0x1dff, 0}, {0x200b, 0x200f, 0},
        {0x202a, 0x202e, 0}, {0x2060, 0x206f, 0}, {0x20d0, 0x20ff, 0}, {0x2e80, 0x303e, 2}, {0x3041, 0x4dbf, 2},
        {0x4e00, 0xa4cf, 2}, {0xa960, 0xa97f, 2}, {0xac00, 0xd7a3, 2}, {0xf900, 0xfaff, 2}, {0xfe00, 0xfe0f, 0},
        {0xfe20, 0xfe2f, 0}, {0xfe30, 0xfe6f, 2}, {0xfeff, 0xfeff, 0}, {0xff00, 0xff60, 2}, {0xffe0, 0xffe6, 2},
        {0x1f300, 0x1f64f, 2}, {0x1f680, 0x1f6ff, 2}, {0x1f900, 0x1f9ff, 2}, {0x20000, 0x3ffff, 2},
        {0xe0100, 0xe01ef, 0}
    };
    int64_t i;
    for (i = 0; i < TFM__COUNT(ranges); ++i) {
        if (c >= ranges[i].first && c <= ranges[i].last) return ranges[i].columns;
    }
    return 1;
}

static int tfm__char_is_rtl(uint32_t c) {
    return (c >= 0x0590 && c <= 0x08ff) || (c >= 0xfb1d && c <= 0xfdff) || (c >= 0xfe70 && c <= 0xfefc)
        || (c >= 0x10800 && c <= 0x10fff)
        || (c >= 0x1e800 && c <= 0x1eeff);
}

/* A label made ready: at most `most` columns, its characters with their columns. */
typedef struct tfm__label {
    int count, columns, rtl;
    uint32_t code[4 * TFM__HEAT_LABEL];    /* room for a few combining marks on each */
} tfm__label;

static void tfm__label_of(tfm__label *label, const char *text, int64_t number, int most) {
    char digits[24];
    label->count = label->columns = label->rtl = 0;
    if (!text) {
        tfm__format(digits, (int64_t)sizeof digits, "%lld", (long long)number);
        text = digits;
    }
    while (*text) {
        uint32_t code;
        const int bytes = tfm__char_at(text, &code), columns = tfm__char_columns(code);
        if (label->count >= 4 * TFM__HEAT_LABEL - 1 || label->columns + columns > most - (text[bytes] ? 1 : 0)) {
            label->code[label->count++] = 0x2026;
            label->columns += 1;
            return;
        }
        label->code[label->count++] = code;
        label->columns += columns;
        label->rtl |= tfm__char_is_rtl(code);
        text += bytes;
    }
}

static void tfm__label_add(tfm__text *t, const tfm__label *label, int xml) {
    static const struct { uint32_t code; const char *text; } escapes[] = {
        {'&', "&amp;"}, {'<', "&lt;"}, {'>', "&gt;"}, {'"', "&quot;"}, {'\'', "&#39;"}
    };
    int i, j;
    for (i = 0; i < label->count; ++i) {
        char bytes[4];
        const char *escape = NULL;
        for (j = 0; xml && j < (int)TFM__COUNT(escapes); ++j) {
            if (label->code[i] == escapes[j].code) escape = escapes[j].text;
        }
        if (escape) {
            tfm__text_add(t, "%s", escape);
        } else {
            tfm__text_bytes(t, bytes, tfm__char_bytes(label->code[i], bytes));
        }
    }
}

/* -- values -- */

typedef struct tfm__heat {
    const tfm_tensor *t;
    int run;
    int64_t rows, columns;
    double low, high;                      /* of the finite values; low is 0 unless some are negative */
    const char *title;
    const char *const *row_labels, *const *column_labels;
} tfm__heat;

static double tfm__heat_value(const tfm__heat *h, int64_t i, int64_t j) {
    return h->run ? tfm__value_at(h->t->dtype, h->t->data, i * h->t->stride[0] + j * h->t->stride[1]) : 0.0;
}

static int tfm__heat_finite(double v) {
    return v - v == 0.0;
}

/* Darkness of a value, 0 to 1; negative for what is not a number or infinite. */
static double tfm__heat_share(const tfm__heat *h, double v) {
    if (!tfm__heat_finite(v)) return -1.0;
    return h->high > h->low ? (v - h->low) / (h->high - h->low) : 0.0;
}

static const char *tfm__heat_label(const char *const *labels, int64_t i) {
    return labels ? labels[i] ? labels[i] : "" : NULL;
}

/* v with a fixed number of decimals and a point, whatever the locale says. */
static void tfm__heat_number(char *out, int64_t size, double v, int decimals) {
    static const int64_t powers[5] = {1, 10, 100, 1000, 10000};
    const double scaled = fabs(v) * (double)powers[decimals];
    if (!tfm__heat_finite(v) || scaled >= 1e15) {
        tfm__format(out, size, "%s", v != v ? "nan" : v < 0.0 ? "-inf" : "inf");
    } else {
        const int64_t n = (int64_t)(scaled + 0.5);
        tfm__format(out, size, "%s%lld.%0*lld", v < 0.0 && n ? "-" : "", (long long)(n / powers[decimals]), decimals,
                    (long long)(n % powers[decimals]));
    }
}

/* Checks the arguments; 0: the op is rejected and left. */
static int tfm__heat_begin(tfm__op *o, tfm__heat *h, const tfm_tensor *weights, const tfm_heatmap_options *options) {
    int64_t i, j;
    memset(h, 0, sizeof *h);
    if (weights->ndim != 2 || weights->shape[0] > TFM__HEAT_MOST || weights->shape[1] > TFM__HEAT_MOST) {
        tfm__reject(o, "weights is %s: expected (rows, columns), at most %d each (tfm_select takes one head, "
                    "tfm_narrow a part)",
                    tfm__describe(o, weights), TFM__HEAT_MOST);
        return 0;
    }
    h->t = weights;
    h->run = o->run;
    h->rows = weights->shape[0];
    h->columns = weights->shape[1];
    if (options) {
        h->title = options->title;
        h->row_labels = options->row_labels;
        h->column_labels = options->column_labels;
    }
    for (i = 0; i < h->rows; ++i) {
        for (j = 0; j < h->columns; ++j) {
            const double v = tfm__heat_value(h, i, j);
            if (!tfm__heat_finite(v)) continue;
            h->low = v < h->low ? v : h->low;
            h->high = v > h->high ? v : h->high;
        }
    }
    return 1;
}

static int tfm__heat_widest(const char *const *labels, int64_t count, int most) {
    tfm__label label;
    int widest = 0;
    int64_t i;
    for (i = 0; i < count; ++i) {
        tfm__label_of(&label, tfm__heat_label(labels, i), i, most);
        if (label.columns > widest) widest = label.columns;
    }
    return widest;
}

static const char *tfm__heat_leave(tfm__op *o, const tfm__text *t) {
    (void)tfm__leave(o, NULL);
    return tfm__failed(o->c) ? NULL : t->s;
}

/* -- SVG -- */

/* White to dark blue in even steps of darkness. */
static const unsigned char tfm__heat_stops[5][3] =
    {{255, 255, 255}, {198, 219, 239}, {107, 174, 214}, {33, 113, 181}, {8, 48, 107}};

static void tfm__heat_color(double share, char out[8]) {
    const double at = share < 0.0 ? 0.0 : share > 1.0 ? 4.0 : share * 4.0;
    const int stop = at >= 4.0 ? 3 : (int)at;
    int rgb[3], i;
    for (i = 0; i < 3; ++i) {
        const double from = (double)tfm__heat_stops[stop][i], to = (double)tfm__heat_stops[stop + 1][i];
        rgb[i] = (int)(from + (to - from) * (at - (double)stop) + 0.5);
    }
    if (share < 0.0) rgb[0] = rgb[1] = rgb[2] = 190; /* not a number: grey */
    tfm__format(out, 8, "#%02x%02x%02x", (unsigned)rgb[0] & 255u, (unsigned)rgb[1] & 255u, (unsigned)rgb[2] & 255u);
}

typedef struct tfm__heat_frame {           /* pixels */
    int64_t cell, font, value, left, top, right, every;
    int64_t width, height;
} tfm__heat_frame;

static tfm__heat_frame tfm__heat_layout(const tfm__heat *h) {
    static const struct {
        int64_t most, cell, font, value; /* rows or columns; pixels; value 0: not written into the cell */
    } sizes[] = {
        {8, 46, 13, 12}, {12, 40, 13, 12}, {16, 32, 12, 11}, {24, 26, 11, 9}, {36, 18, 11, 0}, {60, 14, 10, 0},
        {100, 10, 9, 0}, {200, 6, 9, 0}, {TFM__HEAT_MOST, 3, 9, 0}
    };
    const int64_t most = tfm__max64(h->rows, h->columns);
    tfm__heat_frame f;
    int64_t i = 0;
    while (most > sizes[i].most) i += 1;
    f.cell = sizes[i].cell;
    f.font = sizes[i].font;
    f.value = sizes[i].value;
    f.every = tfm__ceil_div(f.font + 1, f.cell); /* labels of smaller cells stand on every other, third, ... */
    f.left = 12 + f.font * 66 / 100 * tfm__heat_widest(h->row_labels, h->rows, TFM__HEAT_LABEL);
    i = f.font * 66 / 100 * tfm__heat_widest(h->column_labels, h->columns, TFM__HEAT_LABEL);
    f.top = 12 + i * 87 / 100 + f.font / 2 + (h->title ? 26 : 0);      /* labels lean by 60 degrees */
    f.right = tfm__max64(76, i / 2 + 12);
    f.width = f.left + h->columns * f.cell + f.right;
    f.height = f.top + tfm__max64(h->rows * f.cell, 90) + 16;
    return f;
}

static void tfm__heat_svg_labels(tfm__text *t, const tfm__heat *h, const tfm__heat_frame *f) {
    tfm__label label;
    int64_t i;
    for (i = 0; i < h->rows; i += f->every) {
        tfm__label_of(&label, tfm__heat_label(h->row_labels, i), i, TFM__HEAT_LABEL);
        tfm__text_add(t, "<text x=\"%lld\" y=\"%lld\" text-anchor=\"end\">", (long long)(f->left - 6),
                      (long long)(f->top + i * f->cell + (f->cell + f->font * 7 / 10) / 2));
        tfm__label_add(t, &label, 1);
        tfm__text_add(t, "</text>\n");
    }
    for (i = 0; i < h->columns; i += f->every) {
        const int64_t x = f->left + i * f->cell + (f->cell + f->font * 7 / 10) / 2, y = f->top - 6;
        tfm__label_of(&label, tfm__heat_label(h->column_labels, i), i, TFM__HEAT_LABEL);
        tfm__text_add(t, "<text x=\"%lld\" y=\"%lld\" transform=\"rotate(-60 %lld %lld)\">", (long long)x, (long long)y,
                      (long long)x, (long long)y);
        tfm__label_add(t, &label, 1);
        tfm__text_add(t, "</text>\n");
    }
}

static void tfm__heat_svg_cells(tfm__text *t, const tfm__heat *h, const tfm__heat_frame *f) {
    int64_t i, j;
    for (i = 0; i < h->rows; ++i) {
        for (j = 0; j < h->columns; ++j) {
            const double v = tfm__heat_value(h, i, j), share = tfm__heat_share(h, v);
            const int64_t x = f->left + j * f->cell, y = f->top + i * f->cell;
            char color[8], number[32];
            tfm__heat_color(share, color);
            if (memcmp(color, "#ffffff", 7) != 0) {
                tfm__text_add(t, "<rect x=\"%lld\" y=\"%lld\" width=\"%lld\" height=\"%lld\" fill=\"%s\"/>\n",
                              (long long)x, (long long)y, (long long)f->cell, (long long)f->cell, color);
            }
            if (!f->value) continue;
            tfm__heat_number(number, (int64_t)sizeof number, v, 2);
            tfm__text_add(t, "<text x=\"%lld\" y=\"%lld\" font-size=\"%lld\" text-anchor=\"middle\" fill=\"%s\">%s"
                          "</text>\n", (long long)(x + f->cell / 2), (long long)(y + f->cell / 2 + f->font / 3),
                          (long long)f->value, share > 0.55 ? "#ffffff" : "#222222", number);
        }
    }
}

static void tfm__heat_svg_legend(tfm__text *t, const tfm__heat *h, const tfm__heat_frame *f) {
    const int64_t x = f->left + h->columns * f->cell + 14, height = tfm__min64(tfm__max64(h->rows * f->cell, 90), 160);
    char number[32], color[8];
    int i;
    tfm__text_add(t, "<defs><linearGradient id=\"scale\" x1=\"0\" y1=\"1\" x2=\"0\" y2=\"0\">");
    for (i = 0; i < 5; ++i) {
        tfm__heat_color((double)i / 4.0, color);
        tfm__text_add(t, "<stop offset=\"%d%%\" stop-color=\"%s\"/>", 25 * i, color);
    }
    tfm__text_add(t, "</linearGradient></defs>\n<rect x=\"%lld\" y=\"%lld\" width=\"12\" height=\"%lld\" "
                  "fill=\"url(#scale)\" stroke=\"#999999\"/>\n", (long long)x, (long long)f->top, (long long)height);
    tfm__heat_number(number, (int64_t)sizeof number, h->high, 3);
    tfm__text_add(t, "<text x=\"%lld\" y=\"%lld\" font-size=\"10\">%s</text>\n", (long long)(x + 17),
                  (long long)(f->top + 9), number);
    tfm__heat_number(number, (int64_t)sizeof number, h->low, 3);
    tfm__text_add(t, "<text x=\"%lld\" y=\"%lld\" font-size=\"10\">%s</text>\n", (long long)(x + 17),
                  (long long)(f->top + height), number);
}

TFM_API const char *tfm_heatmap_svg(tfm_ctx *c, const tfm_tensor *weights, const tfm_heatmap_options *options) {
    tfm__op o;
    tfm__heat h;
    tfm__heat_frame f;
    tfm__text t;
    if (!tfm__enter(c, &o, TFM__OP_HEATMAP_SVG, 1, weights)) return NULL;
    if (!tfm__heat_begin(&o, &h, weights, options)) return NULL;
    memset(&t, 0, sizeof t);
    t.c = c;
    f = tfm__heat_layout(&h);
    tfm__text_add(&t, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%lld\" height=\"%lld\" "
                  "viewBox=\"0 0 %lld %lld\" font-family=\"sans-serif\" font-size=\"%lld\" fill=\"#222222\">\n"
                  "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
                  (long long)f.width, (long long)f.height, (long long)f.width, (long long)f.height, (long long)f.font);
    if (h.title) {
        tfm__label title;
        tfm__label_of(&title, h.title, 0, 3 * TFM__HEAT_LABEL);
        tfm__text_add(&t, "<text x=\"12\" y=\"22\" font-size=\"15\" font-weight=\"bold\">");
        tfm__label_add(&t, &title, 1);
        tfm__text_add(&t, "</text>\n");
    }
    tfm__heat_svg_labels(&t, &h, &f);
    tfm__heat_svg_cells(&t, &h, &f);
    tfm__text_add(&t, "<rect x=\"%lld\" y=\"%lld\" width=\"%lld\" height=\"%lld\" fill=\"none\" stroke=\"#999999\"/>\n",
                  (long long)f.left, (long long)f.top, (long long)(h.columns * f.cell), (long long)(h.rows * f.cell));
    tfm__heat_svg_legend(&t, &h, &f);
    tfm__text_add(&t, "</svg>\n");
    return tfm__heat_leave(&o, &t);
}

/* -- terminal -- */

#define TFM__HEAT_SIDE 16          /* columns of a row's label in a terminal */
#define TFM__HEAT_HEAD 10          /* lines of a column's label, written downwards */

static void tfm__heat_cell(tfm__text *t, double share, int color) {
    static const char *const shades[5] =
        {"  ", "\xe2\x96\x91\xe2\x96\x91", "\xe2\x96\x92\xe2\x96\x92", "\xe2\x96\x93\xe2\x96\x93",
                                          "\xe2\x96\x88\xe2\x96\x88"};
    static const int ramp[11] = {231, 195, 159, 123, 81, 75, 33, 27, 20, 18, 17}; /* white to dark blue of the 256 */
    if (color) {
        tfm__text_add(t, "\x1b[48;5;%dm  ", share < 0.0 ? 245 : ramp[(int)(share * 10.0 + 0.5)]);
    } else {
        tfm__text_add(t, "%s", share < 0.0 ? "??"
                      : shades[share > 0.0 ? tfm__min64(4, (int64_t)(share * 4.0 + 0.5)) : 0]);
    }
}

static int tfm__label_places(const tfm__label *label) {
    int places = 0, i;
    for (i = 0; i < label->count; ++i) places += tfm__char_columns(label->code[i]) > 0;
    return places;
}

/* The letter at a place, with its combining marks, padded to two columns. */
static void tfm__label_add_place(tfm__text *t, const tfm__label *label, int place) {
    int width = 0, i;
    for (i = 0; i < label->count; ++i) {
        const int columns = tfm__char_columns(label->code[i]);
        char bytes[4];
        place -= columns > 0;
        if (place != -1) continue;
        tfm__text_bytes(t, bytes, tfm__char_bytes(label->code[i], bytes));
        width += columns;
    }
    tfm__text_add(t, "%*s", 2 - width, "");
}

/* Column labels run downwards, two columns wide, and end above their column. A line with right-to-left letters is
 * wrapped in an override: the terminal must not turn the columns around. */
static void tfm__heat_heads(tfm__text *t, const tfm__heat *h, int side) {
    tfm__label label;
    int lines = 0, rtl = 0, line;
    int64_t j;
    for (j = 0; j < h->columns; ++j) {
        tfm__label_of(&label, tfm__heat_label(h->column_labels, j), j, TFM__HEAT_HEAD);
        rtl |= label.rtl;
        if (tfm__label_places(&label) > lines) lines = tfm__label_places(&label);
    }
    for (line = 0; line < lines; ++line) {
        tfm__text_add(t, "%s%*s", rtl ? "\xe2\x80\xad" : "", side + 1, ""); /* left-to-right override ... */
        for (j = 0; j < h->columns; ++j) {
            tfm__label_of(&label, tfm__heat_label(h->column_labels, j), j, TFM__HEAT_HEAD);
            tfm__label_add_place(t, &label, line - (lines - tfm__label_places(&label)));
        }
        tfm__text_add(t, rtl ? "\xe2\x80\xac\n" : "\n"); /* ... and its end */
    }
}

TFM_API const char *tfm_heatmap_text(tfm_ctx *c, const tfm_tensor *weights, const tfm_heatmap_options *options) {
    const int color = options && options->color;
    tfm__op o;
    tfm__heat h;
    tfm__label label;
    tfm__text t;
    char number[32];
    int side, i;
    int64_t row, column;
    if (!tfm__enter(c, &o, TFM__OP_HEATMAP_TEXT, 1, weights)) return NULL;
    if (!tfm__heat_begin(&o, &h, weights, options)) return NULL;
    memset(&t, 0, sizeof t);
    t.c = c;
    if (h.title) {
        tfm__label_of(&label, h.title, 0, 3 * TFM__HEAT_LABEL);
        tfm__label_add(&t, &label, 0);
        tfm__text_add(&t, "\n");
    }
    side = tfm__heat_widest(h.row_labels, h.rows, TFM__HEAT_SIDE);
    tfm__heat_heads(&t, &h, side);
    for (row = 0; row < h.rows; ++row) {
        tfm__label_of(&label, tfm__heat_label(h.row_labels, row), row, TFM__HEAT_SIDE);
        /* isolated: the cells stay in their order */
        tfm__text_add(&t, "%*s%s", side - label.columns, "", label.rtl ? "\xe2\x81\xa8" : "");
        tfm__label_add(&t, &label, 0);
        tfm__text_add(&t, "%s ", label.rtl ? "\xe2\x81\xa9" : "");
        for (column = 0; column < h.columns; ++column) {
            tfm__heat_cell(&t, tfm__heat_share(&h, tfm__heat_value(&h, row, column)), color);
        }
        tfm__text_add(&t, color ? "\x1b[0m\n" : "\n");
    }
    tfm__heat_number(number, (int64_t)sizeof number, h.low, 3);
    tfm__text_add(&t, "%*s %s ", side, "", number);
    for (i = 0; i < 5; ++i) tfm__heat_cell(&t, (double)i / 4.0, color);
    tfm__heat_number(number, (int64_t)sizeof number, h.high, 3);
    tfm__text_add(&t, "%s %s\n", color ? "\x1b[0m" : "", number);
    return tfm__heat_leave(&o, &t);
}

/* ==================================================================================================================
 *  10  LAYERS
 *
 *  Parameters (a state_dict), positions, and the layers of PyTorch over them. A layer's forward gives back its scratch
 *  and keeps only its result as long as nothing is recorded: a stack peaks at the scratch of one layer.
 * ================================================================================================================ */

/* -- Parameters ---------------------------------------------------------------------------------------------------- */

/* Head of memory for the panels of several parameters: the larger a block is, the more of it lies in large pages, and
 * weights of 2 MB take 0.8 of the time to read. It goes back with the last of them. */
typedef struct tfm__slab {
    int64_t bytes, used, live; /* live: parameters that lie in it */
} tfm__slab;
#define TFM__SLAB_BYTES ((int64_t)32 << 20) /* at most: it is there beside what it replaces */

typedef struct tfm__param {
    tfm_tensor tensor; /* first: the tensor that callers hold is the record itself */
    struct tfm_params *store;
    uint64_t hash; /* of the name */
    void *block;   /* memory of the store behind data or panels; NULL: foreign, empty, or a store of sizes */
    tfm__slab *slab; /* in which block lies; NULL: alone */
    int shared;      /* block has lain in a slab: never again, so that slabs hold no more than each parameter once */
    int64_t held;  /* bytes of data or panels */
    int weight;    /* a layer multiplies with it: tfm_params_prepare packs it */
    int foreign;   /* data is not ours: never written, never freed */
    int writing;   /* between write_begin and write_end; tensor.generation is 2 then: tfm_copy and tfm_set may write */
    char name[1];  /* continues behind the record */
} tfm__param;

typedef struct tfm__kept { /* something that lives as long as the store */
    struct tfm__kept *next;
    void (*release)(void *user);
    /* told of foreign memory that a parameter needs no more; NULL: not asked */
    void (*drop)(void *user, const void *data, int64_t bytes);
    void *user;
} tfm__kept;

struct tfm_params {
    tfm_allocator allocator; /* a copy: the store outlives the context it was made with */
    tfm__param **list;       /* in the order of creation */
    int64_t count, capacity;
    int32_t *slots;     /* open addressing by hash: index + 1, 0 = free; kept up to date by writers only */
    int64_t slot_count; /* a power of two, more than twice count */
    tfm__kept *kept;
    tfm__slab *slab; /* with room for what tfm_params_prepare packs next, or NULL */
    int strict;
    int sizes_only; /* made in a dry run (tfm_transformer_measure): parameters have shapes and no memory */
};

#define TFM__NAME_MAX 480 /* longest parameter name; PyTorch's own stay under 100 */

/* Every public function of this chapter: begin, work when 1, end. Nested calls are fine; a second thread is refused. */
static int tfm__begin(tfm_ctx *c) {
    if (!c || !tfm__acquire(c)) return 0;
    if (!tfm__failed(c)) return 1;
    tfm__release(c);
    return 0;
}

static tfm_status tfm__end(tfm_ctx *c) {
    const tfm_status status = tfm__status(c);
    tfm__release(c);
    return status;
}

static uint64_t tfm__hash_name(const char *name) {
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 0x100000001b3u;
    return h ^ (h >> 29);
}

static tfm__param *tfm__param_of(const tfm_params *p, const char *name) {
    uint64_t hash;
    int64_t i;
    if (!p || !name || !p->slot_count) return NULL;
    hash = tfm__hash_name(name);
    for (i = (int64_t)(hash & (uint64_t)(p->slot_count - 1)); p->slots[i]; i = (i + 1) & (p->slot_count - 1)) {
        tfm__param *q = p->list[p->slots[i] - 1];
        if (q->hash == hash && !strcmp(q->name, name)) return q;
    }
    return NULL;
}

static void tfm__slot_put(int32_t *slots, int64_t slot_count, uint64_t hash, int64_t index) {
    int64_t i = (int64_t)(hash & (uint64_t)(slot_count - 1));
    while (slots[i]) i = (i + 1) & (slot_count - 1);
    slots[i] = (int32_t)(index + 1);
}

/* Makes room for one more parameter. 0: out of memory, nothing has changed. */
static int tfm__params_grow(tfm_params *p) {
    int64_t i, capacity, slot_count;
    tfm__param **list;
    int32_t *slots;
    if (p->count < p->capacity) return 1;
    capacity = p->capacity ? 2 * p->capacity : 32;
    slot_count = 4 * capacity;
    if (capacity > 0x20000000) return 0;
    list = (tfm__param **)tfm__alloc_from(&p->allocator, capacity * (int64_t)sizeof(*list));
    slots = (int32_t *)tfm__alloc_from(&p->allocator, slot_count * (int64_t)sizeof(*slots));
    if (!list || !slots) {
        if (list) tfm__free_to(&p->allocator, list);
        if (slots) tfm__free_to(&p->allocator, slots);
        return 0;
    }
    memset(slots, 0, (size_t)slot_count * sizeof(*slots));
    for (i = 0; i < p->count; i++) {
        list[i] = p->list[i];
        tfm__slot_put(slots, slot_count, list[i]->hash, i);
    }
    if (p->list) tfm__free_to(&p->allocator, p->list);
    if (p->slots) tfm__free_to(&p->allocator, p->slots);
    p->list = list;
    p->slots = slots;
    p->capacity = capacity;
    p->slot_count = slot_count;
    return 1;
}

/* Bytes of t in panels: rows are filled up to whole panels. */
static int64_t tfm__panel_bytes(const tfm_tensor *t) {
    return tfm__round_up(t->shape[0], TFM__PANEL) * t->shape[1] * tfm_dtype_size(t->dtype);
}

/* Whether prepare packs q. A matrix with few rows would grow too much (2 classes take a panel of 16), and memory
 * counts: it stays plain unless the difference is less than a page. What is trained stays plain too: it is written in
 * each step. */
static int tfm__param_packs(const tfm__param *q) {
    const tfm_tensor *t = &q->tensor;
    int64_t plain, packed;
    if (!q->weight || t->ndim != 2 || !tfm__is_float(t->dtype) || t->requires_grad || !tfm_numel(t)) return 0;
    plain = t->bytes;
    packed = tfm__panel_bytes(t);
    return packed - plain <= plain / 10 || packed - plain <= 4096;
}

/* A record with this name, dtype and shape behind the others; no memory for its elements yet. */
static tfm__param *tfm__param_new(tfm_ctx *c, tfm_params *p, const char *who, const char *name, int dtype,
                                  tfm_shape shape) {
    tfm__param *q;
    int64_t numel = 0;
    size_t length = name ? strlen(name) : 0;
    if (!length || length > TFM__NAME_MAX) {
        tfm__fail(c, TFM_INVALID, "%s: a parameter needs a name of 1 to %d bytes", who, TFM__NAME_MAX);
        return NULL;
    }
    if (!tfm__dtype_ok(dtype)) {
        tfm__fail(c, TFM_INVALID, "%s: '%s': %d is no dtype", who, name, dtype);
        return NULL;
    }
    if (!tfm__shape_check(c, who, dtype, shape.ndim, shape.dim, &numel)) return NULL;
    q = tfm__params_grow(p) ? (tfm__param *)tfm__alloc_from(&p->allocator, (int64_t)(sizeof(*q) + length)) : NULL;
    if (!q) {
        tfm__fail(c, TFM_OOM, "%s: no memory for the record of '%s'", who, name);
        return NULL;
    }
    memset(q, 0, sizeof(*q) + length);
    memcpy(q->name, name, length + 1);
    q->store = p;
    q->hash = tfm__hash_name(name);
    q->tensor.dtype = dtype;
    q->tensor.ndim = shape.ndim;
    memcpy(q->tensor.shape, shape.dim, sizeof(int64_t) * (size_t)shape.ndim);
    tfm__contiguous_strides(shape.ndim, shape.dim, q->tensor.stride);
    q->tensor.bytes = numel * tfm_dtype_size(dtype);
    q->tensor.generation = 1;
    q->tensor.owner = p;
    q->held = q->tensor.bytes;
    return q;
}

static void tfm__param_publish(tfm_params *p, tfm__param *q) {
    tfm__slot_put(p->slots, p->slot_count, q->hash, p->count);
    p->list[p->count++] = q;
}

/* Memory of the store, under the context's limit. In a store of sizes the elements of parameters (data) are only
 * counted. A context with another allocator may add to the store too: then the store's own is used. */
static void *tfm__params_block(tfm_ctx *c, tfm_params *p, const char *name, int64_t bytes, int data) {
    void *block;
    if (c->allocator.alloc == p->allocator.alloc && c->allocator.free == p->allocator.free &&
        c->allocator.user == p->allocator.user)
        return tfm__alloc_shared(c, bytes, data);
    block = tfm__alloc_from(&p->allocator, p->sizes_only && data ? 0 : bytes);
    if (!block) tfm__fail(c, TFM_OOM, "parameter '%s': %lld bytes asked, none given", name, (long long)bytes);
    return block;
}

/* A store of sizes and a dry run belong together: values cannot be had from it, and a real one must not change in a dry
 * run. */
static int tfm__params_usable(tfm_ctx *c, const tfm_params *p, const char *who) {
    if (!p) tfm__fail(c, TFM_INVALID, "%s: the parameters are NULL", who);
    else if (p->sizes_only != (c->dry != 0))
        tfm__fail(c, TFM_INVALID,
                  p->sizes_only
                      ? "%s: the store was made between tfm_measure_begin and tfm_measure_end: it has no values"
                      : "%s: the store has values: inside a measurement make another one",
                  who);
    return p && p->sizes_only == (c->dry != 0);
}

static int tfm__shape_is(const tfm_tensor *t, tfm_shape shape) {
    return t->ndim == shape.ndim && !memcmp(t->shape, shape.dim, sizeof(int64_t) * (size_t)shape.ndim);
}

/* The parameter of that name, or a new zeroed one (*fresh = 1). dtype -1: any float dtype will do, f32 when it is new.
 */
static tfm_tensor *tfm__params_get(tfm_ctx *c, tfm_params *p, const char *name, int dtype, tfm_shape shape,
                                   int *fresh) {
    tfm__param *q = tfm__param_of(p, name);
    char have[128], want[128];
    if (fresh) *fresh = 0;
    if (q) {
        const tfm_tensor *t = &q->tensor;
        if (!tfm__shape_is(t, shape)) {
            tfm__fail(c, TFM_INVALID, "parameter '%s' is %s in the store, but %s is needed", name,
                      tfm__shape_text(have, sizeof(have), t->ndim, t->shape),
                      tfm__shape_text(want, sizeof(want), shape.ndim, shape.dim));
            return NULL;
        }
        if (dtype >= 0 ? t->dtype != dtype : !tfm__is_float(t->dtype)) {
            tfm__fail(c, TFM_INVALID, "parameter '%s' is %s in the store, but %s is needed (tfm_params_cast converts)",
                      name, tfm_dtype_name(t->dtype), dtype >= 0 ? tfm_dtype_name(dtype) : "f32, f16 or bf16");
            return NULL;
        }
        return &q->tensor;
    }
    q = tfm__param_new(c, p, "tfm_params_add", name, dtype < 0 ? TFM_F32 : dtype, shape);
    if (!q) return NULL;
    if (q->held) {
        q->block = tfm__params_block(c, p, name, q->held, 1);
        if (!q->block) {
            tfm__free_to(&p->allocator, q);
            return NULL;
        }
        if (!p->sizes_only) q->tensor.data = memset(q->block, 0, (size_t)q->held);
    }
    tfm__param_publish(p, q);
    if (fresh) *fresh = 1;
    return &q->tensor;
}

/* Memory of somebody else as a new parameter. */
static tfm_tensor *tfm__params_adopt(tfm_ctx *c, tfm_params *p, const char *name, int dtype, tfm_shape shape,
                                     const void *data) {
    tfm__param *q;
    union {
        const void *in;
        void *out;
    } plain; /* the tensor is only read while it is foreign */
    if (tfm__param_of(p, name)) {
        tfm__fail(c, TFM_INVALID, "tfm_params_wrap: there is a parameter '%s' already", name);
        return NULL;
    }
    q = tfm__param_new(c, p, "tfm_params_wrap", name, dtype, shape);
    if (!q) return NULL;
    plain.in = data;
    q->tensor.data = q->held ? plain.out : NULL;
    q->foreign = 1;
    tfm__param_publish(p, q);
    return &q->tensor;
}

/* release(user) is called once, when the store is destroyed; the last one given first. */
static TFM__UNUSED tfm_status tfm__params_keep(tfm_ctx *c, tfm_params *p, void (*release)(void *user),
                                               void (*drop)(void *user, const void *data, int64_t bytes), void *user) {
    tfm__kept *kept = (tfm__kept *)tfm__alloc_from(&p->allocator, (int64_t)sizeof(*kept));
    if (!kept) return tfm__fail(c, TFM_OOM, "parameters: %d bytes asked, none given", (int)sizeof(*kept));
    kept->next = p->kept;
    kept->release = release;
    kept->drop = drop;
    kept->user = user;
    p->kept = kept;
    return TFM_OK;
}

/* Zeroed memory that lives as long as the store. */
static void *tfm__params_memory(tfm_ctx *c, tfm_params *p, int64_t bytes) {
    const int64_t head = tfm__round_up((int64_t)sizeof(tfm__kept), 64);
    int64_t all = 0;
    tfm__kept *kept;
    if (!tfm__add(head, bytes, &all)) all = INT64_MAX;
    kept = (tfm__kept *)tfm__params_block(c, p, "array of layers", all, 0);
    if (!kept) return NULL;
    memset(kept, 0, (size_t)all);
    kept->next = p->kept;
    p->kept = kept;
    return (char *)kept + head;
}

/* Rows of t as they lie plain. In panels the 16 elements of one column are neighbours. */
static void tfm__param_rows(const tfm_tensor *t, int64_t row, int64_t rows, void *destination) {
    const size_t size = (size_t)tfm_dtype_size(t->dtype);
    const int64_t n = t->ndim ? (t->shape[0] ? tfm_numel(t) / t->shape[0] : 0) : 1;
    char *to = (char *)destination;
    int64_t r, k;
    if (!rows || !n) return;
    if (t->layout != TFM_PANELS) {
        memcpy(to, (const char *)t->data + (size_t)(row * n) * size, (size_t)(rows * n) * size);
        return;
    }
    for (r = row; r < row + rows; r++) {
        const char *from = (const char *)t->panels + (size_t)(r / TFM__PANEL * TFM__PANEL * n + r % TFM__PANEL) * size;
        if (size == 4)
            for (k = 0; k < n; k++, to += 4) memcpy(to, from + k * TFM__PANEL * 4, 4);
        else
            for (k = 0; k < n; k++, to += 2) memcpy(to, from + k * TFM__PANEL * 2, 2);
    }
}

static void tfm__param_release(tfm__param *q) {
    if (!q->slab) tfm__free_to(&q->store->allocator, q->block);
    else if (--q->slab->live == 0) tfm__free_to(&q->store->allocator, q->slab);
    q->slab = NULL;
}

/* Gives q another block: the old one is freed when it was the store's. */
static void tfm__param_replace(tfm__param *q, void *block, int64_t bytes, int layout) {
    const tfm__kept *kept;
    for (kept = q->foreign ? q->store->kept : NULL; kept; kept = kept->next)
        if (kept->drop) kept->drop(kept->user, q->tensor.data, q->tensor.bytes);
    tfm__param_release(q);
    q->block = block;
    q->held = bytes;
    q->foreign = 0;
    q->tensor.layout = layout;
    q->tensor.data = layout == TFM_STRIDED ? block : NULL;
    q->tensor.panels = layout == TFM_PANELS ? block : NULL;
}

typedef struct tfm__pack_job {
    const tfm_ctx *c;
    const tfm_tensor *t;
    char *panels;
} tfm__pack_job;

static void tfm__pack_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__pack_job *j = (const tfm__pack_job *)arg;
    const tfm_tensor *t = j->t;
    const int64_t depth = t->shape[1], size = tfm_dtype_size(t->dtype), row = begin * TFM__PANEL;
    (void)slot;
    j->c->k->pack_weight(j->panels + row * depth * size, (const char *)t->data + row * depth * size, t->dtype,
                         tfm__min64(t->shape[0], end * TFM__PANEL) - row, depth);
}

/* Bytes that packing q takes; 0: it stays as it is. */
static int64_t tfm__param_panel_bytes(const tfm__param *q) {
    return q->tensor.layout != TFM_PANELS && tfm__param_packs(q) ? tfm__panel_bytes(&q->tensor) : 0;
}

/* What q takes in a slab, 0: it may not lie there. */
static int64_t tfm__param_share(const tfm__param *q) {
    return q->shared ? 0 : tfm__round_up(tfm__param_panel_bytes(q), TFM__ALIGN);
}

/* Where q's panels go: into the slab at hand, into a new one for q and what is packed after it, or (NULL) alone. */
static tfm__slab *tfm__param_slab(tfm_ctx *c, const tfm__param *q) {
    const int64_t head = tfm__round_up((int64_t)sizeof(tfm__slab), TFM__ALIGN), share = tfm__param_share(q);
    tfm_params *const p = q->store;
    int64_t all = head, i = 0;
    if (share && p->slab && p->slab->bytes - p->slab->used >= share) return p->slab;
    p->slab = NULL;
    if (!share) return NULL;
    while (p->list[i] != q) i++;
    for (; i < p->count; i++) {
        const int64_t more = tfm__param_share(p->list[i]);
        if (more > TFM__SLAB_BYTES - all) break;
        all += more;
    }
    if (all <= head + share || !tfm__within_limit(c, tfm__block_bytes(all))) return NULL;
    p->slab = (tfm__slab *)tfm__alloc_from(&p->allocator, all);
    if (!p->slab) return NULL;
    p->slab->bytes = all;
    p->slab->used = head;
    p->slab->live = 0;
    return p->slab;
}

static tfm_status tfm__param_pack(tfm_ctx *c, tfm__param *q) {
    const int64_t bytes = tfm__param_panel_bytes(q);
    tfm__slab *slab;
    tfm__pack_job job;
    if (!bytes) return TFM_OK;
    if (q->store->sizes_only) {
        tfm__param_replace(q, NULL, bytes, TFM_PANELS);
        return TFM_OK;
    }
    job.c = c;
    job.t = &q->tensor;
    slab = tfm__param_slab(c, q);
    job.panels = slab ? (char *)slab + slab->used : (char *)tfm__params_block(c, q->store, q->name, bytes, 1);
    if (!job.panels) return TFM_OOM;
    tfm__for(c, tfm__ceil_div(q->tensor.shape[0], TFM__PANEL), 4, (double)bytes, tfm__pack_task, &job);
    tfm__param_replace(q, job.panels, bytes, TFM_PANELS);
    q->slab = slab;
    if (slab) {
        q->shared = 1;
        slab->used += tfm__round_up(bytes, TFM__ALIGN);
        slab->live += 1;
    }
    return TFM_OK;
}

/* Plain memory of the store's own: may be written afterwards. */
static tfm_status tfm__param_unpack(tfm_ctx *c, tfm__param *q) {
    const int64_t bytes = q->tensor.bytes;
    void *block;
    if ((q->tensor.layout == TFM_STRIDED && !q->foreign) || !bytes) {
        q->foreign = 0;
        return TFM_OK;
    }
    block = q->store->sizes_only ? NULL : tfm__params_block(c, q->store, q->name, bytes, 1);
    if (!block && !q->store->sizes_only) return TFM_OOM;
    if (block) tfm__param_rows(&q->tensor, 0, q->tensor.ndim ? q->tensor.shape[0] : 1, block);
    tfm__param_replace(q, block, bytes, TFM_STRIDED);
    return TFM_OK;
}

/* Plain memory of another dtype in place of what q has; its contents are to be written by the caller. */
static TFM__UNUSED tfm_tensor *tfm__param_reset(tfm_ctx *c, tfm_params *p, tfm__param *q, int dtype) {
    const int64_t bytes = tfm_numel(&q->tensor) * tfm_dtype_size(dtype);
    void *block = bytes ? tfm__params_block(c, p, q->name, bytes, 1) : NULL;
    if (bytes && !block) return NULL;
    q->tensor.dtype = dtype;
    q->tensor.bytes = bytes;
    tfm__param_replace(q, block, bytes, TFM_STRIDED);
    return &q->tensor;
}

/* Every parameter in turn; stops at the first failure. */
static tfm_status tfm__params_each(tfm_ctx *c, tfm_params *p, const char *who,
                                   tfm_status (*act)(tfm_ctx *c, tfm__param *q)) {
    int64_t i;
    if (!tfm__begin(c)) return tfm__status(c);
    if (tfm__params_usable(c, p, who)) {
        for (i = 0; i < p->count && !tfm__failed(c); i++) {
            tfm__param *q = p->list[i];
            if (q->writing)
                tfm__fail(c, TFM_INVALID, "%s: '%s' is being written: tfm_params_write_end first", who, q->name);
            else if (act(c, q) != TFM_OK) break;
        }
        p->slab = NULL;
    }
    return tfm__end(c);
}

typedef struct tfm__cast_job {
    const tfm_ctx *c;
    const char *from;
    char *to;
    int from_dtype, to_dtype;
    int64_t count;
} tfm__cast_job;
#define TFM__CAST_CHUNK 1024

static void tfm__cast_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__cast_job *j = (const tfm__cast_job *)arg;
    float row[TFM__CAST_CHUNK];
    int64_t i;
    (void)slot;
    for (i = begin; i < end; i++) {
        const int64_t at = i * TFM__CAST_CHUNK, n = tfm__min64(j->count - at, TFM__CAST_CHUNK);
        j->c->k->load(row, j->from + at * tfm_dtype_size(j->from_dtype), j->from_dtype, 1, n);
        j->c->k->store(j->to + at * tfm_dtype_size(j->to_dtype), j->to_dtype, 1, row, n);
    }
}

/* Matrices only; a vector (bias, norm weight) is small and keeps its precision. A packed one stays packed: panels are
 * converted element by element like plain rows. */
static tfm_status tfm__param_cast(tfm_ctx *c, tfm__param *q, int dtype) {
    tfm_tensor *t = &q->tensor;
    const int layout = t->layout;
    const int64_t size = tfm_dtype_size(t->dtype);
    tfm__cast_job j;
    int64_t bytes;
    if (t->ndim < 2 || t->dtype == dtype || !(tfm__is_float(t->dtype) || t->dtype == TFM_F64)) return TFM_OK;
    j.c = c;
    j.from = (const char *)(layout == TFM_PANELS ? t->panels : t->data);
    j.from_dtype = t->dtype;
    j.to_dtype = dtype;
    j.count = q->held / size;
    bytes = j.count * tfm_dtype_size(dtype);
    j.to = bytes && j.from ? (char *)tfm__params_block(c, q->store, q->name, bytes, 1) : NULL;
    if (j.from && bytes && !j.to) return TFM_OOM;
    if (j.to) tfm__for(c, tfm__ceil_div(j.count, TFM__CAST_CHUNK), 16, (double)bytes, tfm__cast_task, &j);
    t->bytes = tfm_numel(t) * tfm_dtype_size(dtype);
    t->dtype = dtype;
    tfm__param_replace(q, j.to, bytes, layout);
    return TFM_OK;
}

static tfm_status tfm__param_to_f32(tfm_ctx *c, tfm__param *q) { return tfm__param_cast(c, q, TFM_F32); }
static tfm_status tfm__param_to_f16(tfm_ctx *c, tfm__param *q) { return tfm__param_cast(c, q, TFM_F16); }
static tfm_status tfm__param_to_bf16(tfm_ctx *c, tfm__param *q) { return tfm__param_cast(c, q, TFM_BF16); }

TFM_API tfm_params *tfm_params_create(tfm_ctx *c) {
    tfm_params *p;
    if (!tfm__begin(c)) return NULL;
    p = (tfm_params *)tfm__alloc_shared(c, (int64_t)sizeof(*p), 0);
    if (p) {
        memset(p, 0, sizeof(*p));
        p->allocator = c->allocator;
        p->sizes_only = c->dry != 0;
    }
    tfm__release(c);
    return p;
}

TFM_API void tfm_params_destroy(tfm_params *p) {
    tfm_allocator allocator;
    tfm__kept *kept;
    int64_t i;
    if (!p) return;
    allocator = p->allocator;
    for (i = 0; i < p->count; i++) {
        tfm__param_release(p->list[i]);
        tfm__free_to(&allocator, p->list[i]);
    }
    for (kept = p->kept; kept;) {
        tfm__kept *next = kept->next;
        if (kept->release) kept->release(kept->user);
        tfm__free_to(&allocator, kept);
        kept = next;
    }
    if (p->list) tfm__free_to(&allocator, p->list);
    if (p->slots) tfm__free_to(&allocator, p->slots);
    tfm__free_to(&allocator, p);
}

TFM_API tfm_tensor *tfm_params_add(tfm_ctx *c, tfm_params *p, const char *name, int dtype, tfm_shape shape) {
    tfm_tensor *t = NULL;
    if (!tfm__begin(c)) return NULL;
    if (!tfm__dtype_ok(dtype))
        tfm__fail(c, TFM_INVALID, "tfm_params_add: '%s': %d is no dtype", name ? name : "(NULL)", dtype);
    else if (tfm__params_usable(c, p, "tfm_params_add")) t = tfm__params_get(c, p, name, dtype, shape, NULL);
    tfm__release(c);
    return t;
}

TFM_API tfm_tensor *tfm_params_wrap(tfm_ctx *c, tfm_params *p, const char *name, int dtype, tfm_shape shape,
                                    const void *data) {
    tfm_tensor *t = NULL;
    if (!tfm__begin(c)) return NULL;
    if (!data) tfm__fail(c, TFM_INVALID, "tfm_params_wrap: '%s': data is NULL", name ? name : "(NULL)");
    else if (tfm__dtype_ok(dtype) && (uintptr_t)data % (uintptr_t)tfm_dtype_size(dtype))
        tfm__fail(c, TFM_INVALID, "tfm_params_wrap: '%s': data is not aligned to %s", name ? name : "(NULL)",
                  tfm_dtype_name(dtype));
    else if (p && p->sizes_only) /* read-only memory takes nothing, but shapes are as good here */
        t = tfm__params_get(c, p, name, dtype, shape, NULL);
    else if (tfm__params_usable(c, p, "tfm_params_wrap")) t = tfm__params_adopt(c, p, name, dtype, shape, data);
    tfm__release(c);
    return t;
}

TFM_API tfm_tensor *tfm_params_find(const tfm_params *p, const char *name) {
    tfm__param *q = tfm__param_of(p, name);
    return q ? &q->tensor : NULL;
}

TFM_API int64_t tfm_params_count(const tfm_params *p) { return p ? p->count : 0; }

TFM_API const char *tfm_params_name(const tfm_params *p, int64_t index) {
    return p && index >= 0 && index < p->count ? p->list[index]->name : NULL;
}

TFM_API tfm_tensor *tfm_params_at(const tfm_params *p, int64_t index) {
    return p && index >= 0 && index < p->count ? &p->list[index]->tensor : NULL;
}

TFM_API int64_t tfm_params_bytes(const tfm_params *p) {
    int64_t i, bytes = 0;
    for (i = 0; p && i < p->count; i++) bytes += p->list[i]->held;
    return bytes;
}

TFM_API void tfm_params_strict(tfm_params *p, int on) {
    if (p) p->strict = on != 0;
}

TFM_API tfm_status tfm_params_prepare(tfm_ctx *c, tfm_params *p) {
    return tfm__params_each(c, p, "tfm_params_prepare", tfm__param_pack);
}

/* The record that a write bracket names. NULL: the error is set. */
static tfm__param *tfm__param_to_write(tfm_ctx *c, tfm_params *p, const char *who, const char *name, int writing) {
    tfm__param *q;
    if (!tfm__params_usable(c, p, who)) return NULL;
    q = tfm__param_of(p, name);
    if (!q) {
        tfm__fail(c, TFM_INVALID, "%s: no parameter '%s'", who, name ? name : "(NULL)");
    } else if (q->writing != writing) {
        tfm__fail(c, TFM_INVALID, "%s: '%s' is %s", who, name,
                  q->writing ? "being written already" : "not being written");
        q = NULL;
    }
    return q;
}

TFM_API tfm_tensor *tfm_params_write_begin(tfm_ctx *c, tfm_params *p, const char *name) {
    tfm__param *q;
    if (!tfm__begin(c)) return NULL;
    q = tfm__param_to_write(c, p, "tfm_params_write_begin", name, 0);
    if (q && tfm__param_unpack(c, q) != TFM_OK) q = NULL;
    if (q) {
        q->writing = 1;
        q->tensor.generation = 2;
    }
    tfm__release(c);
    return q ? &q->tensor : NULL;
}

TFM_API tfm_status tfm_params_write_end(tfm_ctx *c, tfm_params *p, const char *name) {
    tfm__param *q;
    if (!tfm__begin(c)) return tfm__status(c);
    q = tfm__param_to_write(c, p, "tfm_params_write_end", name, 1);
    if (q) {
        q->writing = 0;
        q->tensor.generation = 1;
    }
    return tfm__end(c);
}

TFM_API tfm_status tfm_params_cast(tfm_ctx *c, tfm_params *p, int dtype) {
    tfm_status (*to[3])(tfm_ctx *, tfm__param *);
    to[TFM_F32] = tfm__param_to_f32;
    to[TFM_F16] = tfm__param_to_f16;
    to[TFM_BF16] = tfm__param_to_bf16;
    if (tfm__dtype_ok(dtype) && tfm__is_float(dtype)) return tfm__params_each(c, p, "tfm_params_cast", to[dtype]);
    if (!tfm__begin(c)) return tfm__status(c);
    tfm__fail(c, TFM_INVALID, "tfm_params_cast: %s is not f32, f16 or bf16",
              tfm__dtype_ok(dtype) ? tfm_dtype_name(dtype) : "this");
    return tfm__end(c);
}

/* -- How layers make their parameters ------------------------------------------------------------------------------ */

typedef struct tfm__maker {
    tfm_ctx *c;
    tfm_params *p;
    int xavier; /* nn.Transformer: xavier_uniform on everything with more than one dim */
} tfm__maker;

enum {
    TFM__INIT_ZEROS,
    TFM__INIT_ONES,
    TFM__INIT_UNIFORM /* in [-value, value) */,
    TFM__INIT_NORMAL /* deviation value */
};
typedef struct tfm__init {
    int kind;
    double value;
    int weight;
} tfm__init;

static tfm__init tfm__init_of(int kind, double value, int weight) {
    tfm__init i;
    i.kind = kind;
    i.value = value;
    i.weight = weight;
    return i;
}

/* "prefix" + "." + "name"; an empty prefix leaves name alone. 0: too long, the error is set. */
static int tfm__path(tfm_ctx *c, char *out, const char *prefix, const char *name) {
    const int length = snprintf(out, TFM__NAME_MAX + 1, "%s%s%s", prefix, prefix[0] ? "." : "", name);
    if (length >= 0 && length <= TFM__NAME_MAX) return 1;
    tfm__fail(c, TFM_INVALID, "the parameter name '%.40s...' is longer than %d bytes", prefix, TFM__NAME_MAX);
    return 0;
}

typedef struct tfm__fill_job {
    float *y;
    int64_t count;
    uint64_t seed, stream;
    int kind;
    float value;
} tfm__fill_job;
#define TFM__FILL_CHUNK 4096

static void tfm__fill_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__fill_job *j = (const tfm__fill_job *)arg;
    const int64_t first = begin * TFM__FILL_CHUNK, n = tfm__min64(j->count, end * TFM__FILL_CHUNK) - first;
    float *y = j->y + first;
    int64_t i;
    (void)slot;
    if (j->kind == TFM__INIT_UNIFORM) {
        tfm__uniform_fill(y, n, j->seed, j->stream, (uint64_t)first);
        for (i = 0; i < n; i++) y[i] = j->value * (2.0f * y[i] - 1.0f);
    } else if (j->kind == TFM__INIT_NORMAL) {
        tfm__normal_fill(y, n, j->seed, j->stream, (uint64_t)first);
        for (i = 0; i < n; i++) y[i] *= j->value;
    } else {
        for (i = 0; i < n; i++) y[i] = j->value;
    }
}

/* The parameter prefix.name: bound when it is in the store, else made and filled from the context's random numbers. */
static tfm_tensor *tfm__make(const tfm__maker *m, const char *prefix, const char *name, tfm_shape shape,
                             tfm__init init) {
    tfm_ctx *c = m->c;
    char path[TFM__NAME_MAX + 1];
    tfm__param *q;
    tfm__fill_job job;
    int fresh = 0;
    if (tfm__failed(c) || !tfm__path(c, path, prefix, name)) return NULL;
    if (m->p->strict && !tfm__param_of(m->p, path)) {
        char text[128];
        tfm__fail(c, TFM_INVALID, "parameter '%s' %s is missing from the store (tfm_params_strict is on)", path,
                  tfm__shape_text(text, sizeof(text), shape.ndim, shape.dim));
        return NULL;
    }
    if (!tfm__params_get(c, m->p, path, -1, shape, &fresh)) return NULL;
    q = tfm__param_of(m->p, path);
    if (init.weight) q->weight = 1;
    if (!fresh || !q->tensor.data || init.kind == TFM__INIT_ZEROS) return &q->tensor;
    if (m->xavier && shape.ndim > 1) {
        init.kind = TFM__INIT_UNIFORM;
        init.value = sqrt(6.0 / (double)(shape.dim[0] + shape.dim[1]));
    }
    job.y = (float *)q->tensor.data;
    job.count = tfm_numel(&q->tensor);
    job.kind = init.kind;
    job.value = init.kind == TFM__INIT_ONES ? 1.0f : (float)init.value;
    job.seed = c->seed;
    job.stream = init.kind == TFM__INIT_ONES ? 0 : tfm__random_stream(c);
    tfm__for(c, tfm__ceil_div(job.count, TFM__FILL_CHUNK), 1, 32.0 * (double)job.count, tfm__fill_task, &job);
    return &q->tensor;
}

/* -- Positions ----------------------------------------------------------------------------------------------------- */

/* Which position each (b, l) stands at: start + l, starts[b] + l, or what positions says. Tables are made per place, so
 * `batch` is 1 when all batch rows stand at the same ones. */
typedef struct tfm__places {
    int64_t batch, length;
    int64_t start;
    const int64_t *starts;       /* (batch) instead of start */
    const tfm_tensor *positions; /* (length) or (batch, length), any strides, instead of both */
} tfm__places;

static tfm__places tfm__places_from(int64_t start, int64_t length) {
    tfm__places p;
    memset(&p, 0, sizeof(p));
    p.batch = 1;
    p.length = length;
    p.start = start;
    return p;
}

static int64_t tfm__place(const tfm__places *p, int64_t row) {
    const int64_t b = row / p->length, l = row % p->length;
    if (p->positions) {
        const tfm_tensor *t = p->positions;
        return tfm__id_at(t->dtype, t->data, t->ndim == 1 ? l * t->stride[0] : b * t->stride[0] + l * t->stride[1]);
    }
    {
        const int64_t start = p->starts ? p->starts[b] : p->start;
        return start > INT64_MAX - l ? INT64_MAX : start + l;
    }
}

/* A table over places: rows of `columns` angles, place * rate[i] each, as sine and cosine. Computed in double: in f32
 * position 100000 would be off by 1e-2 radian. */
typedef struct tfm__angles {
    tfm__places places;
    const double *rate;
    int64_t columns;
    double factor;        /* of the values (YaRN's attention factor) */
    float *sine, *cosine; /* element (row, i) at row * row_step + i * step */
    int64_t row_step, step;
    int64_t cosine_columns; /* fewer than columns when d is odd */
} tfm__angles;

/* The C library's sine and cosine at every 16th position only, the others by rotations from there: 7 times as fast, and
 * still a function of the position alone. */
#define TFM__ANGLE_RUN 16
#define TFM__ANGLE_COLUMNS 64
static void tfm__angles_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__angles *a = (const tfm__angles *)arg;
    double c[TFM__ANGLE_COLUMNS], s[TFM__ANGLE_COLUMNS], step_c[TFM__ANGLE_COLUMNS], step_s[TFM__ANGLE_COLUMNS];
    int64_t first, r, i;
    (void)slot;
    for (first = 0; first < a->columns; first += TFM__ANGLE_COLUMNS) {
        const int64_t n = tfm__min64(TFM__ANGLE_COLUMNS, a->columns - first), cosines = a->cosine_columns - first;
        const double *const rate = a->rate + first;
        int64_t at = 0; /* where c and s stand, after the first row */
        for (i = 0; i < n; i++) {
            step_c[i] = cos(rate[i]);
            step_s[i] = sin(rate[i]);
        }
        for (r = begin; r < end; r++) {
            const int64_t place = tfm__place(&a->places, r);
            int64_t steps = (place % TFM__ANGLE_RUN + TFM__ANGLE_RUN) % TFM__ANGLE_RUN;
            float *const sine = a->sine + r * a->row_step + first * a->step;
            float *const cosine = a->cosine + r * a->row_step + first * a->step;
            if (r > begin && steps > 0 && place - 1 == at) {
                steps = 1;
            } else {
                for (i = 0; i < n; i++) {
                    const double angle = (double)(place - steps) * rate[i];
                    c[i] = cos(angle);
                    s[i] = sin(angle);
                }
            }
            at = place;
            for (; steps > 0; steps--) {
                for (i = 0; i < n; i++) {
                    const double turned = c[i] * step_c[i] - s[i] * step_s[i];
                    s[i] = s[i] * step_c[i] + c[i] * step_s[i];
                    c[i] = turned;
                }
            }
            for (i = 0; i < n; i++) {
                sine[i * a->step] = (float)(s[i] * a->factor);
                if (i < cosines) cosine[i * a->step] = (float)(c[i] * a->factor);
            }
        }
    }
}

static void tfm__angles_run(tfm_ctx *c, tfm__angles *a) {
    const int64_t rows = a->places.batch * a->places.length;
    tfm__for(c, rows, tfm__max64(TFM__ANGLE_RUN, 4096 / tfm__max64(1, a->columns)),
             16.0 * (double)rows * (double)a->columns,
             tfm__angles_task, a);
}

static int tfm__sinusoidal_kind(int kind) {
    return kind == TFM_POSITION_SINUSOIDAL || kind == TFM_POSITION_SINUSOIDAL_HALVES;
}

/* Sinusoidal positions at places: (length, d), or (batch, length, d) when the rows differ. */
static tfm_tensor *tfm__sinusoidal_at(tfm_ctx *c, int kind, const tfm__places *places, int64_t d) {
    const int halves = kind == TFM_POSITION_SINUSOIDAL_HALVES;
    tfm__op o;
    tfm_tensor *y;
    tfm__angles a;
    double *rate;
    int64_t shape[3], i;
    if (!tfm__enter(c, &o, TFM__OP_SINUSOIDAL, 0)) return NULL;
    if (!tfm__sinusoidal_kind(kind))
        return tfm__reject(&o, "kind %d is neither sinusoidal nor sinusoidal in halves", kind);
    if (places->start < 0 || places->length < 0 || d < 0)
        return tfm__reject(&o, "start %lld, length %lld, d_model %lld: none may be negative", (long long)places->start,
                           (long long)places->length, (long long)d);
    shape[0] = places->batch;
    shape[1] = places->length;
    shape[2] = d;
    y = tfm__result(&o, TFM_F32, places->batch > 1 ? 3 : 2, places->batch > 1 ? shape : shape + 1);
    a.columns = halves ? d / 2 : d - d / 2;
    rate = y ? (double *)tfm__temporary(&o, a.columns * (int64_t)sizeof(double)) : NULL;
    if (!y || !rate) return tfm__leave(&o, NULL);
    if (o.run && tfm_numel(y)) {
        for (i = 0; i < a.columns; i++)
            rate[i] = halves ? exp(-log(10000.0) * (double)i / (double)tfm__max64(a.columns - 1, 1))
                             : exp(-log(10000.0) * (double)(2 * i) / (double)d);
        a.places = *places;
        a.rate = rate;
        a.factor = 1.0;
        a.row_step = d;
        a.step = halves ? 1 : 2;
        a.cosine_columns = d / 2;
        a.sine = (float *)y->data;
        a.cosine = a.sine + (halves ? a.columns : 1);
        if (halves && d % 2)
            for (i = 0; i < places->batch * places->length; i++) a.sine[i * d + d - 1] = 0.0f;
        tfm__angles_run(c, &a);
    }
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_sinusoidal(tfm_ctx *c, int kind, int64_t start, int64_t length, int64_t d_model) {
    const tfm__places places = tfm__places_from(start, length);
    return tfm__sinusoidal_at(c, kind, &places, d_model);
}

/* -- Rotary positions (Su et al. 2021) ----------------------------------------------------------------------------- */

/* What is wrong with a rope for heads of this size; NULL: nothing. */
static const char *tfm__rope_fault(const tfm_rope *r, int64_t head_size) {
    const int64_t dims = r->dims ? r->dims : head_size;
    if (dims < 0 || dims > head_size) return "dims exceeds the head size";
    if (dims % 2) return "an odd number of dims cannot be rotated in pairs";
    if (r->scaling < TFM_ROPE_PLAIN || r->scaling > TFM_ROPE_LLAMA3) return "unknown scaling";
    if (!(r->base >= 0.0f) || !(r->factor >= 0.0f)) return "base and factor must be positive (0: the default)";
    if ((r->scaling == TFM_ROPE_YARN || r->scaling == TFM_ROPE_LLAMA3) && r->original_length <= 0)
        return "this scaling needs original_length, the length the model was trained at";
    if (r->scaling == TFM_ROPE_NTK && dims < 4 && dims) return "NTK scaling needs more than 2 dims";
    if (!(r->low_frequency >= 0.0f) || !(r->high_frequency >= 0.0f))
        return "low_frequency and high_frequency must be positive";
    return NULL;
}

/* YaRN: the (fractional) pair that turns `turns` times within the original length. */
static double tfm__yarn_pair(double turns, double dims, double base, double original) {
    return dims * log(original / (turns * 6.283185307179586)) / (2.0 * log(base));
}

/* Radians per position of each pair, and the factor of sine and cosine.
 *   LINEAR  positions are divided by factor (Chen et al. 2023)
 *   NTK     base * factor^(d / (d - 2)), the same at every length ("NTK-aware"; not the variant that grows with the
 *           sequence)
 *   YARN    Peng et al. 2023, as in HF Transformers
 *   LLAMA3  as in HF Transformers: long wavelengths divided by factor, short ones kept, a ramp between */
static double tfm__rope_rates(const tfm_rope *r, int64_t dims, double *rate) {
    const double d = (double)dims, factor = r->factor > 0.0f ? (double)r->factor : 1.0,
                 original = (double)r->original_length;
    const double plain_base = r->base > 0.0f ? (double)r->base : 10000.0;
    const double base = r->scaling == TFM_ROPE_NTK && dims > 2 ? plain_base * pow(factor, d / (d - 2.0)) : plain_base;
    double low = 0.0, high = 0.0;
    int64_t i;
    if (r->scaling == TFM_ROPE_YARN) {
        low = floor(tfm__yarn_pair(r->beta_fast > 0.0f ? (double)r->beta_fast : 32.0, d, base, original));
        high = ceil(tfm__yarn_pair(r->beta_slow > 0.0f ? (double)r->beta_slow : 1.0, d, base, original));
        low = low < 0.0 ? 0.0 : low;
        high = high > d - 1.0 ? d - 1.0 : high;
        if (low == high) high += 0.001;
    }
    for (i = 0; i < dims / 2; i++) {
        double w = exp(-log(base) * (double)(2 * i) / d);
        if (r->scaling == TFM_ROPE_LINEAR) {
            w /= factor;
        } else if (r->scaling == TFM_ROPE_YARN) {
            double ramp = ((double)i - low) / (high - low);
            ramp = ramp < 0.0 ? 0.0 : ramp > 1.0 ? 1.0 : ramp;
            w = w / factor * ramp + w * (1.0 - ramp);
        } else if (r->scaling == TFM_ROPE_LLAMA3) {
            const double slow = r->low_frequency > 0.0f ? (double)r->low_frequency : 1.0;
            const double fast = r->high_frequency > 0.0f ? (double)r->high_frequency : 4.0;
            const double turns = original * w / 6.283185307179586; /* within the original length */
            if (turns < slow) {
                w /= factor;
            } else if (turns <= fast) {
                const double smooth = fast > slow ? (turns - slow) / (fast - slow) : 1.0;
                w = (1.0 - smooth) * w / factor + smooth * w;
            }
        }
        rate[i] = w;
    }
    if (r->scaling != TFM_ROPE_YARN) return 1.0;
    if (r->attention_factor > 0.0f) return (double)r->attention_factor;
    return factor > 1.0 ? 0.1 * log(factor) + 1.0 : 1.0;
}

/* Cosine and sine at places for a checked rope; rate holds dims / 2 doubles of scratch. */
static void tfm__rope_fill(tfm_ctx *c, const tfm_rope *rope, int64_t dims, const tfm__places *places, double *rate,
                           float *cosine, float *sine) {
    tfm__angles a;
    a.factor = tfm__rope_rates(rope, dims, rate);
    a.places = *places;
    a.rate = rate;
    a.columns = a.cosine_columns = a.row_step = dims / 2;
    a.step = 1;
    a.sine = sine;
    a.cosine = cosine;
    tfm__angles_run(c, &a);
}

/* Tables at places: (length, dims / 2), or (batch, length, dims / 2) when the rows differ. 0: the error is set. */
static int tfm__rope_tables(tfm_ctx *c, const tfm_rope *rope, int64_t head_size, const tfm__places *places,
                            tfm_tensor **cosine, tfm_tensor **sine) {
    const char *fault;
    tfm__op o;
    int64_t shape[3], dims;
    double *rate;
    *cosine = *sine = NULL;
    if (!tfm__enter(c, &o, TFM__OP_ROTARY_TABLES, 0)) return 0;
    fault = !rope            ? "rope is NULL"
            : head_size <= 0 ? "the head size is not positive"
                             : tfm__rope_fault(rope, head_size);
    if (!fault && (places->length < 0 || places->start < 0)) fault = "start and length may not be negative";
    if (fault)
        return tfm__reject(&o, "%s (head size %lld, dims %lld)", fault, (long long)head_size,
                           (long long)(rope ? rope->dims : 0)) != NULL;
    dims = rope->dims ? rope->dims : head_size;
    shape[0] = places->batch;
    shape[1] = places->length;
    shape[2] = dims / 2;
    *cosine = tfm__result(&o, TFM_F32, places->batch > 1 ? 3 : 2, places->batch > 1 ? shape : shape + 1);
    *sine = *cosine ? tfm__result(&o, TFM_F32, (*cosine)->ndim, (*cosine)->shape) : NULL;
    rate = *sine ? (double *)tfm__temporary(&o, dims / 2 * (int64_t)sizeof(double)) : NULL;
    if (!rate) return tfm__leave(&o, NULL) != NULL;
    if (o.run && tfm_numel(*sine))
        tfm__rope_fill(c, rope, dims, places, rate, (float *)(*cosine)->data, (float *)(*sine)->data);
    return tfm__leave(&o, *sine) != NULL;
}

TFM_API tfm_status tfm_rotary_tables(tfm_ctx *c, const tfm_rope *rope, int64_t head_size, int64_t start, int64_t length,
                                     tfm_tensor **cosine, tfm_tensor **sine) {
    const tfm__places places = tfm__places_from(start, length);
    tfm_tensor *unused;
    tfm__rope_tables(c, rope, head_size, &places, cosine ? cosine : &unused, sine ? sine : &unused);
    return tfm__status(c);
}

typedef struct tfm__rotate {
    const tfm__kernels *k;
    const tfm_tensor *x, *y;
    const float *cosine, *sine; /* rows of `pairs` values, table_step apart */
    int64_t table_step;
    int64_t pairs, heads, length;
    tfm__places places; /* positions set: number of the table's row */
    int64_t batch_step; /* else the row is b * batch_step + l */
    int interleaved;
    tfm__lanes lanes;
    tfm_ctx *c;
} tfm__rotate;

static void tfm__rotate_task(void *arg, int64_t begin, int64_t end, int slot) {
    const tfm__rotate *j = (const tfm__rotate *)arg;
    const tfm_tensor *x = j->x, *y = j->y;
    const int64_t d = x->shape[3];
    const int plain = x->dtype == TFM_F32 && x->stride[3] == 1;
    float *row = (float *)tfm__lane(j->c, &j->lanes, slot);
    int64_t r, i, l = begin % j->length, h = begin / j->length % j->heads, b = begin / j->length / j->heads;
    tfm__rotary_rows a;
    a.n = 2 * j->pairs;
    a.interleaved = j->interleaved;
    a.x_row = x->stride[2];
    a.y_row = d;
    a.table_row = j->table_step;
    for (r = begin; r < end; r += a.rows) {
        const int64_t at = j->places.positions ? tfm__place(&j->places, b * j->length + l) : b * j->batch_step + l;
        const char *from = tfm__at(x, b * x->stride[0] + h * x->stride[1] + l * x->stride[2]);
        char *to = tfm__at(y, r * d);
        a.y = y->dtype == TFM_F32 ? (float *)(void *)to : row;
        a.x = plain ? (const float *)(const void *)from : a.y;
        a.cosine = j->cosine + at * j->table_step;
        a.sine = j->sine + at * j->table_step;
        a.rows = plain && !j->places.positions ? tfm__min64(end - r, j->length - l) : 1;
        if (!plain) j->k->load(a.y, from, x->dtype, x->stride[3], d);
        for (i = 0; i < a.rows && plain && d > a.n; i++)
            memcpy(a.y + i * a.y_row + a.n, a.x + i * a.x_row + a.n, (size_t)(d - a.n) * 4);
        j->k->rotary(&a);
        if (y->dtype != TFM_F32) j->k->store(to, y->dtype, 1, a.y, d);
        l += a.rows;
        if (l < j->length) continue;
        l = 0;
        if (++h < j->heads) continue;
        h = 0;
        b++;
    }
}

static void tfm__rotate_run(tfm__op *o, tfm__rotate *j) {
    const int64_t rows = j->x->shape[0] * j->heads * j->length;
    o->flops = 3.0 * (double)tfm_numel(j->x);
    o->bytes = (double)(tfm_numel(j->x) * (tfm_dtype_size(j->x->dtype) + tfm_dtype_size(j->y->dtype)));
    tfm__for(o->c, rows, 64, 2.0 * o->flops, tfm__rotate_task, j);
}

/* x (B, H, L, d) and positions (L) or (B, L), or NULL. 1: fine; 0: rejected. */
static int tfm__rotate_check(tfm__op *o, const tfm_tensor *x, const tfm_tensor *positions) {
    if (x->ndim != 4) {
        tfm__reject(o, "x is %s: (batch, heads, length, head size) is expected", tfm__describe(o, x));
        return 0;
    }
    if (!tfm__need_float(o, "x", x)) return 0;
    if (!positions) return 1;
    if (!tfm__need_index(o, "positions", positions)) return 0;
    if ((positions->ndim == 1 && positions->shape[0] == x->shape[2]) ||
        (positions->ndim == 2 && positions->shape[0] == x->shape[0] && positions->shape[1] == x->shape[2]))
        return 1;
    tfm__reject(o, "positions is %s, x is %s: (length) or (batch, length) is expected", tfm__describe(o, positions),
                tfm__describe(o, x));
    return 0;
}

TFM_API tfm_tensor *tfm_rotary(tfm_ctx *c, const tfm_tensor *x, const tfm_rope *rope, int64_t start,
                               const tfm_tensor *positions) {
    tfm_rope plain;
    tfm__op o;
    tfm_tensor *y;
    tfm__rotate j;
    tfm__places places;
    const char *fault;
    float *tables;
    double *rate;
    int64_t dims, rows;
    memset(&plain, 0, sizeof(plain));
    memset(&j, 0, sizeof(j));
    if (!rope) rope = &plain;
    if (!tfm__enter(c, &o, TFM__OP_ROTARY, 1, x)) return NULL;
    if (!tfm__optional(&o, positions)) return tfm__leave(&o, NULL);
    if (!tfm__rotate_check(&o, x, positions)) return NULL;
    fault = tfm__rope_fault(rope, x->shape[3]);
    if (!fault && start < 0) fault = "start may not be negative";
    if (fault) return tfm__reject(&o, "%s (x is %s, dims %lld)", fault, tfm__describe(&o, x), (long long)rope->dims);
    dims = rope->dims ? rope->dims : x->shape[3];
    places = tfm__places_from(start, x->shape[2]);
    places.positions = positions;
    if (positions && positions->ndim == 2) places.batch = x->shape[0];
    rows = places.batch * places.length;
    y = tfm__result(&o, x->dtype, 4, x->shape);
    rate = y ? (double *)tfm__temporary(&o, dims / 2 * (int64_t)sizeof(double)) : NULL;
    tables = rate ? (float *)tfm__temporary(&o, rows * dims * (int64_t)sizeof(float)) : NULL;
    if (!tables || !tfm__lanes_get(&o, &j.lanes, x->shape[3] * (int64_t)sizeof(float))) return tfm__leave(&o, NULL);
    if (o.run && tfm_numel(x)) {
        tfm__rope_fill(c, rope, dims, &places, rate, tables, tables + rows * (dims / 2));
        j.c = c;
        j.k = o.k;
        j.x = x;
        j.y = y;
        j.cosine = tables;
        j.sine = tables + rows * (dims / 2);
        j.table_step = j.pairs = dims / 2;
        j.heads = x->shape[1];
        j.length = x->shape[2];
        j.batch_step = places.batch > 1 ? places.length : 0;
        j.interleaved = rope->interleaved != 0;
        tfm__rotate_run(&o, &j);
    }
    return tfm__leave(&o, y);
}

TFM_API tfm_tensor *tfm_rotary_apply(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *cosine, const tfm_tensor *sine,
                                     const tfm_tensor *positions, int interleaved) {
    tfm__op o;
    tfm_tensor *y;
    tfm__rotate j;
    int n;
    memset(&j, 0, sizeof(j));
    if (!tfm__enter(c, &o, TFM__OP_ROTARY_APPLY, 3, x, cosine, sine)) return NULL;
    if (!tfm__optional(&o, positions)) return tfm__leave(&o, NULL);
    if (!tfm__rotate_check(&o, x, positions)) return NULL;
    n = cosine->ndim;
    if (cosine->dtype != TFM_F32 || sine->dtype != TFM_F32 || !tfm__same_shape(cosine, sine) ||
        !tfm_is_contiguous(cosine) || !tfm_is_contiguous(sine))
        return tfm__reject(&o, "cosine is %s, sine is %s: two contiguous f32 tables of one shape are expected",
                           tfm__describe(&o, cosine), tfm__describe(&o, sine));
    if (n < 2 || n > 3 || (n == 3 && (positions || cosine->shape[0] != x->shape[0])) ||
        (!positions && cosine->shape[n - 2] < x->shape[2]) || 2 * cosine->shape[n - 1] > x->shape[3])
        return tfm__reject(
            &o,
            "cosine is %s, x is %s: (positions, dims / 2), or (batch, length, dims / 2) without positions, is expected",
            tfm__describe(&o, cosine), tfm__describe(&o, x));
    if (positions && !tfm__check_ids(&o, "positions", positions, cosine->shape[0])) return NULL;
    y = tfm__result(&o, x->dtype, 4, x->shape);
    if (!y || !tfm__lanes_get(&o, &j.lanes, x->shape[3] * (int64_t)sizeof(float))) return tfm__leave(&o, NULL);
    if (o.run && tfm_numel(x)) {
        j.c = c;
        j.k = o.k;
        j.x = x;
        j.y = y;
        j.cosine = (const float *)cosine->data;
        j.sine = (const float *)sine->data;
        j.table_step = j.pairs = cosine->shape[n - 1];
        j.heads = x->shape[1];
        j.length = x->shape[2];
        j.places = tfm__places_from(0, x->shape[2]);
        j.places.positions = positions;
        j.batch_step = n == 3 ? cosine->shape[1] : 0;
        j.interleaved = interleaved != 0;
        tfm__rotate_run(&o, &j);
    }
    return tfm__leave(&o, y);
}

/* -- Scratch of a layer -------------------------------------------------------------------------------------------- */

/* Between open and close a layer may make what it likes: close gives it back and keeps the results. With a tape alive
 * nothing is given back: the backward pass needs it. */
typedef struct tfm__scope {
    tfm_ctx *c;
    tfm_marker mark;
} tfm__scope;

static tfm__scope tfm__scope_open(tfm_ctx *c) {
    tfm__scope s;
    s.c = c;
    s.mark = tfm__mark(c);
    return s;
}

static tfm_tensor *tfm__scope_close(const tfm__scope *s, tfm_tensor *y, tfm_tensor **weights) {
    tfm_tensor *list[2];
    if (!y || tfm__failed(s->c)) return NULL;
    if (tfm__recording(s->c)) return y;
    list[0] = y;
    list[1] = weights ? *weights : NULL;
    if (!tfm__keep_all(s->c, s->mark, list, 2)) return NULL;
    if (weights) *weights = list[1];
    return list[0];
}

static tfm_tensor *tfm__drop(tfm_ctx *c, tfm_tensor *x, float p, int training) {
    return training && p > 0.0f ? tfm_dropout(c, x, p) : x;
}

/* Sizes and rates of a config: 1 = fine. */
static int tfm__rate_ok(tfm_ctx *c, const char *who, float dropout) {
    if (dropout >= 0.0f && dropout < 1.0f) return 1;
    tfm__fail(c, TFM_INVALID, "%s: dropout %g is not in [0, 1)", who, (double)dropout);
    return 0;
}

static int tfm__positive(tfm_ctx *c, const char *who, const char *name, int64_t value) {
    if (value > 0) return 1;
    tfm__fail(c, TFM_INVALID, "%s: %s is %lld: it must be positive", who, name, (long long)value);
    return 0;
}

/* The number of layers; more than any model has would only ask for memory in vain. */
static int tfm__layers_ok(tfm_ctx *c, const char *who, int64_t layers) {
    if (layers >= 1 && layers <= 1000000) return 1;
    tfm__fail(c, TFM_INVALID, "%s: layers is %lld: 1 to 1000000 are expected", who, (long long)layers);
    return 0;
}

/* What every init needs. 1: begun. */
static int tfm__init_begin(tfm_ctx *c, tfm_params *p, const char *who, const char *prefix, const void *config,
                           void *layer, size_t size) {
    if (layer) memset(layer, 0, size);
    if (!tfm__begin(c)) return 0;
    if (!tfm__params_usable(c, p, who)) return (tfm__release(c), 0);
    if (prefix && config && layer) return 1;
    tfm__fail(c, TFM_INVALID, "%s: the %s is NULL%s", who,
              !prefix   ? "prefix"
              : !config ? "config"
                        : "layer to fill",
              prefix ? "" : " (\"\" means none)");
    tfm__release(c);
    return 0;
}

static tfm__maker tfm__maker_of(tfm_ctx *c, tfm_params *p) {
    tfm__maker m;
    m.c = c;
    m.p = p;
    m.xavier = 0;
    return m;
}

/* What every forward needs: the layer's struct and its first tensor were made. 1: begun. */
static int tfm__forward_begin(tfm_ctx *c, const char *who, const void *layer, const tfm_tensor *weight,
                              const tfm_tensor *x) {
    if (!tfm__begin(c)) return 0;
    if (layer && weight && x && (c->dry || weight->data || weight->panels || !tfm_numel(weight))) return 1;
    tfm__fail(
        c, TFM_INVALID, "%s: %s", who,
        !layer ? "the layer is NULL"
        : !x   ? "the input is NULL"
        : !weight
            ? "the layer was never initialised"
            : "the layer's parameters were made between tfm_measure_begin and tfm_measure_end: they have no values");
    tfm__release(c);
    return 0;
}

/* -- Linear, embedding, norm --------------------------------------------------------------------------------------- */

/* nn.Linear: kaiming_uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)), for weight and bias alike. */
static int tfm__linear_make(const tfm__maker *m, const char *prefix, int64_t in, int64_t out, int bias, int zero_bias,
                            tfm_linear_layer *layer) {
    const double bound = 1.0 / sqrt((double)in);
    layer->weight = tfm__make(m, prefix, "weight", tfm_shape2(out, in), tfm__init_of(TFM__INIT_UNIFORM, bound, 1));
    layer->bias = bias ? tfm__make(m, prefix, "bias", tfm_shape1(out),
                                   tfm__init_of(zero_bias ? TFM__INIT_ZEROS : TFM__INIT_UNIFORM, bound, 0))
                       : NULL;
    return layer->weight && (layer->bias || !bias);
}

TFM_API tfm_status tfm_linear_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t in, int64_t out, int bias,
                                   tfm_linear_layer *layer) {
    if (!tfm__init_begin(c, p, "tfm_linear_init", prefix, prefix, layer, sizeof(*layer))) return tfm__status(c);
    if (tfm__positive(c, "tfm_linear_init", "in", in) && tfm__positive(c, "tfm_linear_init", "out", out)) {
        const tfm__maker m = tfm__maker_of(c, p);
        tfm__linear_make(&m, prefix, in, out, bias, 0, layer);
    }
    return tfm__end(c);
}

static tfm_tensor *tfm__linear(tfm_ctx *c, const tfm_linear_layer *layer, const tfm_tensor *x) {
    return tfm_linear(c, x, layer->weight, layer->bias, layer->activation);
}

TFM_API tfm_tensor *tfm_linear_forward(tfm_ctx *c, const tfm_linear_layer *layer, const tfm_tensor *x) {
    tfm_tensor *y;
    if (!tfm__forward_begin(c, "tfm_linear_forward", layer, layer ? layer->weight : NULL, x)) return NULL;
    y = tfm__linear(c, layer, x);
    tfm__release(c);
    return y;
}

/* x times rows [row, row + rows) of weight. Panels can only be cut where one begins: up to 15 outputs too many are
 * computed in front and left out of the result, which is a view then. An output's bits do not depend on its neighbours.
 */
static tfm_tensor *tfm__linear_rows(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *weight, const tfm_tensor *bias,
                                    int64_t row, int64_t rows) {
    const int packed = weight->layout == TFM_PANELS;
    const int64_t extra = packed ? row % TFM__PANEL : 0, first = row - extra, count = rows + extra;
    const tfm_tensor *w = weight, *b = bias;
    tfm_tensor *y;
    if (row == 0 && rows == weight->shape[0]) return tfm_linear(c, x, weight, bias, TFM_ACT_NONE);
    if (packed && weight->requires_grad) { /* a part of a packed one would not be known to the tape */
        y = tfm_linear(c, x, weight, bias, TFM_ACT_NONE);
        return y ? tfm_narrow(c, y, -1, row, rows) : NULL;
    }
    if (!packed) {
        w = tfm_narrow(c, weight, 0, first, count);
    } else {
        const tfm_shape shape = tfm_shape2(count, weight->shape[1]);
        tfm_tensor *part = tfm__wrap(c, weight->dtype, 2, shape.dim, NULL);
        if (!part) return NULL;
        part->layout = TFM_PANELS;
        part->panels =
            weight->panels ? (char *)weight->panels + first * weight->shape[1] * tfm_dtype_size(weight->dtype) : NULL;
        w = part;
    }
    if (bias) b = tfm_narrow(c, bias, 0, first, count);
    if (!w || (bias && !b)) return NULL;
    y = tfm_linear(c, x, w, b, TFM_ACT_NONE);
    return y && extra ? tfm_narrow(c, y, -1, extra, rows) : y;
}

static int tfm__embedding_make(const tfm__maker *m, const char *prefix, int64_t count, int64_t d_model,
                               double deviation, int weight, tfm_embedding_layer *layer) {
    tfm__maker plain = *m;
    plain.xavier = 0; /* nn.Transformer has no embedding: its rule is not meant for one */
    layer->weight = tfm__make(&plain, prefix, "weight", tfm_shape2(count, d_model),
                              tfm__init_of(TFM__INIT_NORMAL, deviation, weight));
    return layer->weight != NULL;
}

TFM_API tfm_status tfm_embedding_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t count, int64_t d_model,
                                      tfm_embedding_layer *layer) {
    if (!tfm__init_begin(c, p, "tfm_embedding_init", prefix, prefix, layer, sizeof(*layer))) return tfm__status(c);
    if (tfm__positive(c, "tfm_embedding_init", "count", count) &&
        tfm__positive(c, "tfm_embedding_init", "d_model", d_model)) {
        const tfm__maker m = tfm__maker_of(c, p);
        tfm__embedding_make(&m, prefix, count, d_model, 1.0, 0, layer);
    }
    return tfm__end(c);
}

static tfm_tensor *tfm__embed(tfm_ctx *c, const tfm_embedding_layer *layer, const tfm_tensor *ids) {
    tfm_tensor *y = tfm_embedding(c, layer->weight, ids);
    return y && layer->scale != 0.0f && layer->scale != 1.0f ? tfm_scale(c, y, layer->scale) : y;
}

TFM_API tfm_tensor *tfm_embedding_forward(tfm_ctx *c, const tfm_embedding_layer *layer, const tfm_tensor *ids) {
    tfm_tensor *y;
    tfm__scope s;
    if (!tfm__forward_begin(c, "tfm_embedding_forward", layer, layer ? layer->weight : NULL, ids)) return NULL;
    s = tfm__scope_open(c);
    y = tfm__scope_close(&s, tfm__embed(c, layer, ids), NULL);
    tfm__release(c);
    return y;
}

TFM_API tfm_tensor *tfm_embedding_logits(tfm_ctx *c, const tfm_embedding_layer *layer, const tfm_tensor *x) {
    tfm_tensor *y;
    if (!tfm__forward_begin(c, "tfm_embedding_logits", layer, layer ? layer->weight : NULL, x)) return NULL;
    y = tfm_linear(c, x, layer->weight, NULL, TFM_ACT_NONE);
    tfm__release(c);
    return y;
}

static int tfm__norm_make(const tfm__maker *m, const char *prefix, int kind, int64_t d_model, int bias, float eps,
                          float weight_offset, tfm_norm_layer *layer) {
    const int with_bias = bias && kind == TFM_LAYER_NORM;
    layer->kind = kind;
    layer->eps = eps;
    layer->weight_offset = weight_offset;
    layer->weight = tfm__make(m, prefix, "weight", tfm_shape1(d_model),
                              tfm__init_of(weight_offset == 1.0f ? TFM__INIT_ZEROS : TFM__INIT_ONES, 0.0, 0));
    layer->bias =
        with_bias ? tfm__make(m, prefix, "bias", tfm_shape1(d_model), tfm__init_of(TFM__INIT_ZEROS, 0.0, 0)) : NULL;
    return layer->weight && (layer->bias || !with_bias);
}

static int tfm__norm_ok(tfm_ctx *c, const char *who, int kind, float eps) {
    if ((kind == TFM_LAYER_NORM || kind == TFM_RMS_NORM) && eps >= 0.0f) return 1;
    tfm__fail(c, TFM_INVALID, "%s: norm %d with eps %g: TFM_LAYER_NORM or TFM_RMS_NORM with eps >= 0 is expected", who,
              kind, (double)eps);
    return 0;
}

TFM_API tfm_status tfm_norm_init(tfm_ctx *c, tfm_params *p, const char *prefix, int kind, int64_t d_model, int bias,
                                 float eps, tfm_norm_layer *layer) {
    if (!tfm__init_begin(c, p, "tfm_norm_init", prefix, prefix, layer, sizeof(*layer))) return tfm__status(c);
    if (tfm__norm_ok(c, "tfm_norm_init", kind, eps) && tfm__positive(c, "tfm_norm_init", "d_model", d_model)) {
        const tfm__maker m = tfm__maker_of(c, p);
        tfm__norm_make(&m, prefix, kind, d_model, bias, eps, 0.0f, layer);
    }
    return tfm__end(c);
}

/* norm(x + residual); *sum, when asked, gets x + residual. A second result of an op has no gradient, so with one in
 * play the sum is an op of its own: the same bits. */
static tfm_tensor *tfm__norm_of(tfm_ctx *c, const tfm_norm_layer *layer, const tfm_tensor *x,
                                const tfm_tensor *residual, tfm_tensor **sum) {
    tfm_norm_options o;
    memset(&o, 0, sizeof(o));
    o.eps = layer->eps;
    o.weight_offset = layer->weight_offset;
    if (sum && (x->requires_grad || residual->requires_grad || tfm__recording(c))) {
        x = *sum = tfm_add(c, x, residual);
        if (!x) return NULL;
    } else {
        o.residual = residual;
        o.sum = sum;
    }
    return layer->kind == TFM_RMS_NORM ? tfm_rms_norm(c, x, layer->weight, &o)
                                       : tfm_layer_norm(c, x, layer->weight, layer->bias, &o);
}

TFM_API tfm_tensor *tfm_norm_forward(tfm_ctx *c, const tfm_norm_layer *layer, const tfm_tensor *x) {
    tfm_tensor *y;
    if (!tfm__forward_begin(c, "tfm_norm_forward", layer, layer ? layer->weight : NULL, x)) return NULL;
    y = tfm__norm_of(c, layer, x, NULL, NULL);
    tfm__release(c);
    return y;
}

/* -- Feed-forward -------------------------------------------------------------------------------------------------- */

static int tfm__feed_forward_ok(tfm_ctx *c, const char *who, const tfm_feed_forward_config *config) {
    if (!tfm__positive(c, who, "d_model", config->d_model) || !tfm__positive(c, who, "d_ff", config->d_ff)) return 0;
    if (!tfm__rate_ok(c, who, config->dropout)) return 0;
    if (config->activation >= 0 && config->activation < TFM_ACT_COUNT) return 1;
    tfm__fail(c, TFM_INVALID, "%s: %d is no activation", who, config->activation);
    return 0;
}

static int tfm__feed_forward_make(const tfm__maker *m, const char *prefix, const tfm_feed_forward_config *config,
                                  tfm_feed_forward *layer) {
    char path[TFM__NAME_MAX + 1];
    const int64_t d = config->d_model, ff = config->d_ff;
    const int bias = !config->no_bias;
    layer->activation = config->activation == TFM_ACT_NONE ? TFM_ACT_RELU : config->activation;
    layer->gated = config->gated != 0;
    layer->dropout = config->dropout;
    layer->linear1.activation = layer->gated ? TFM_ACT_NONE : layer->activation;
    return tfm__path(m->c, path, prefix, "linear1") && tfm__linear_make(m, path, d, ff, bias, 0, &layer->linear1) &&
           tfm__path(m->c, path, prefix, "linear2") && tfm__linear_make(m, path, ff, d, bias, 0, &layer->linear2) &&
           (!layer->gated ||
            (tfm__path(m->c, path, prefix, "linear_gate") && tfm__linear_make(m, path, d, ff, bias, 0, &layer->gate)));
}

TFM_API tfm_status tfm_feed_forward_init(tfm_ctx *c, tfm_params *p, const char *prefix,
                                         const tfm_feed_forward_config *config, tfm_feed_forward *layer) {
    if (!tfm__init_begin(c, p, "tfm_feed_forward_init", prefix, config, layer, sizeof(*layer))) return tfm__status(c);
    if (tfm__feed_forward_ok(c, "tfm_feed_forward_init", config)) {
        const tfm__maker m = tfm__maker_of(c, p);
        tfm__feed_forward_make(&m, prefix, config, layer);
    }
    return tfm__end(c);
}

static tfm_tensor *tfm__feed_forward(tfm_ctx *c, const tfm_feed_forward *layer, const tfm_tensor *x, int training) {
    const tfm__scope s = tfm__scope_open(c);
    tfm_tensor *h = tfm__linear(c, &layer->linear1, x);
    if (h && layer->gated) {
        tfm_tensor *gate = tfm__linear(c, &layer->gate, x);
        h = gate ? tfm_glu(c, gate, h, layer->activation) : NULL;
    }
    if (h) h = tfm__drop(c, h, layer->dropout, training);
    return tfm__scope_close(&s, h ? tfm__linear(c, &layer->linear2, h) : NULL, NULL);
}

/* Without dropout: that is for blocks, which know whether they train. */
TFM_API tfm_tensor *tfm_feed_forward_forward(tfm_ctx *c, const tfm_feed_forward *layer, const tfm_tensor *x) {
    tfm_tensor *y;
    if (!tfm__forward_begin(c, "tfm_feed_forward_forward", layer, layer ? layer->linear2.weight : NULL, x)) return NULL;
    y = tfm__feed_forward(c, layer, x, 0);
    tfm__release(c);
    return y;
}

/* -- Multi-head attention ------------------------------------------------------------------------------------------ */

/* Fills the defaults of *config in place; 0: it cannot be, the error says why. */
static int tfm__mha_ok(tfm_ctx *c, const char *who, tfm_mha_config *config) {
    const int64_t d = config->d_model, heads = config->heads;
    const char *fault;
    if (!tfm__positive(c, who, "d_model", d) || !tfm__positive(c, who, "heads", heads)) return 0;
    if (!config->head_size && d % heads) {
        tfm__fail(c, TFM_INVALID, "%s: d_model %lld is not a multiple of heads %lld: change one, or give head_size",
                  who, (long long)d, (long long)heads);
        return 0;
    }
    if (!config->head_size) config->head_size = d / heads;
    if (!config->kv_heads) config->kv_heads = heads;
    if (!config->kdim) config->kdim = d;
    if (!config->vdim) config->vdim = d;
    if (config->kdim != d || config->vdim != d) config->separate = 1;
    if (!tfm__positive(c, who, "head_size", config->head_size) || !tfm__positive(c, who, "kdim", config->kdim) ||
        !tfm__positive(c, who, "vdim", config->vdim) || !tfm__rate_ok(c, who, config->dropout))
        return 0;
    if (config->kv_heads < 1 || heads % config->kv_heads) {
        tfm__fail(c, TFM_INVALID, "%s: heads %lld is not a multiple of kv_heads %lld", who, (long long)heads,
                  (long long)config->kv_heads);
        return 0;
    }
    fault = config->rotary ? tfm__rope_fault(&config->rope, config->head_size) : NULL;
    if (fault) {
        tfm__fail(c, TFM_INVALID, "%s: rope: %s (head size %lld, dims %lld)", who, fault, (long long)config->head_size,
                  (long long)config->rope.dims);
        return 0;
    }
    return 1;
}

/* PyTorch: xavier_uniform over the whole in_proj, zero biases, out_proj's weight as nn.Linear's. */
static int tfm__mha_make(const tfm__maker *m, const char *prefix, const tfm_mha_config *config, tfm_mha *layer) {
    const int64_t d = config->d_model, most = (int64_t)1 << 40;
    const int bias = !config->no_bias;
    int64_t q = 0, kv = 0;
    char path[TFM__NAME_MAX + 1];
    tfm__init zeros = tfm__init_of(TFM__INIT_ZEROS, 0.0, 0), xavier = tfm__init_of(TFM__INIT_UNIFORM, 0.0, 1);
    if (!tfm__mul(config->heads, config->head_size, &q) || !tfm__mul(config->kv_heads, config->head_size, &kv)
        || q > most || kv > most || d > most || config->kdim > most || config->vdim > most) {
        tfm__fail(m->c, TFM_INVALID, "tfm_mha_init: d_model %lld, %lld heads of %lld, kdim %lld, vdim %lld: too large",
                  (long long)d, (long long)config->heads, (long long)config->head_size, (long long)config->kdim,
                  (long long)config->vdim);
        return 0;
    }
    layer->config = *config;
    if (config->separate) {
        xavier.value = sqrt(6.0 / (double)(q + d));
        layer->q_proj_weight = tfm__make(m, prefix, "q_proj_weight", tfm_shape2(q, d), xavier);
        xavier.value = sqrt(6.0 / (double)(kv + config->kdim));
        layer->k_proj_weight = tfm__make(m, prefix, "k_proj_weight", tfm_shape2(kv, config->kdim), xavier);
        xavier.value = sqrt(6.0 / (double)(kv + config->vdim));
        layer->v_proj_weight = tfm__make(m, prefix, "v_proj_weight", tfm_shape2(kv, config->vdim), xavier);
    } else {
        xavier.value = sqrt(6.0 / (double)(q + 2 * kv + d));
        layer->in_proj_weight = tfm__make(m, prefix, "in_proj_weight", tfm_shape2(q + 2 * kv, d), xavier);
    }
    if (bias) layer->in_proj_bias = tfm__make(m, prefix, "in_proj_bias", tfm_shape1(q + 2 * kv), zeros);
    return tfm__path(m->c, path, prefix, "out_proj") &&
           tfm__linear_make(m, path, q, d, bias && !config->no_out_bias, 1, &layer->out_proj) && !tfm__failed(m->c);
}

TFM_API tfm_status tfm_mha_init(tfm_ctx *c, tfm_params *p, const char *prefix, const tfm_mha_config *config,
                                tfm_mha *layer) {
    if (!tfm__init_begin(c, p, "tfm_mha_init", prefix, config, layer, sizeof(*layer))) return tfm__status(c);
    {
        tfm_mha_config full = *config;
        const tfm__maker m = tfm__maker_of(c, p);
        if (tfm__mha_ok(c, "tfm_mha_init", &full)) tfm__mha_make(&m, prefix, &full, layer);
    }
    return tfm__end(c);
}

enum { TFM__Q = 0, TFM__K = 1, TFM__V = 2 };

/* Rows of in_proj where part i begins (i = 3: its end). */
static int64_t tfm__in_row(const tfm_mha *layer, int i) {
    const tfm_mha_config *g = &layer->config;
    return i == TFM__Q ? 0 : (g->heads + (i - 1) * g->kv_heads) * g->head_size;
}

/* Parts [first, last) of the projections of x side by side: (B, L, rows). Only neighbours of a fused in_proj come
 * together. */
static tfm_tensor *tfm__project(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *x, int first, int last) {
    const int64_t row = tfm__in_row(layer, first), rows = tfm__in_row(layer, last) - row;
    const tfm_tensor *bias = layer->in_proj_bias;
    if (layer->in_proj_weight) return tfm__linear_rows(c, x, layer->in_proj_weight, bias, row, rows);
    if (bias && !(bias = tfm_narrow(c, bias, 0, row, rows))) return NULL;
    return tfm_linear(c, x,
                      first == TFM__Q   ? layer->q_proj_weight
                      : first == TFM__K ? layer->k_proj_weight
                                        : layer->v_proj_weight,
                      bias, TFM_ACT_NONE);
}

/* Part i of a projection that begins with part `first`, as heads: (B, H, L, head_size), a view. */
static tfm_tensor *tfm__heads_of(tfm_ctx *c, const tfm_mha *layer, tfm_tensor *projected, int first, int i) {
    const int64_t at = tfm__in_row(layer, i) - tfm__in_row(layer, first),
                  rows = tfm__in_row(layer, i + 1) - tfm__in_row(layer, i);
    if (projected && projected->shape[2] != rows) projected = tfm_narrow(c, projected, 2, at, rows);
    return projected ? tfm_split_heads(c, projected, i == TFM__Q ? layer->config.heads : layer->config.kv_heads) : NULL;
}

/* Rotary tables of one forward. A stack's layers stand at the same positions: the first one makes them for all. */
typedef struct tfm__rotation {
    tfm_tensor *cosine, *sine;
} tfm__rotation;

/* Where the tokens of a forward stand: behind what the cache holds, or from `position`. Rows that differ get an array.
 */
static int tfm__places_of(tfm_ctx *c, const tfm_cache *cache, int64_t layer, int64_t position, int64_t batch,
                          int64_t length, tfm__places *places) {
    const int64_t *held = cache ? cache->length + layer * cache->batch : NULL;
    int64_t b;
    *places = tfm__places_from(held && batch ? held[0] : position, length);
    for (b = 1; held && b < batch; b++)
        if (held[b] != held[0]) places->batch = batch;
    if (places->batch > 1) {
        int64_t *starts = (int64_t *)tfm__arena_meta(c, batch * (int64_t)sizeof(int64_t));
        if (!starts) return 0;
        memcpy(starts, held, (size_t)batch * sizeof(int64_t));
        places->starts = starts;
    }
    return 1;
}

static tfm_tensor *tfm__rotated(tfm_ctx *c, const tfm_mha *layer, tfm_tensor *x, const tfm__rotation *turn) {
    if (!x || !layer->config.rotary) return x;
    return tfm_rotary_apply(c, x, turn->cosine, turn->sine, NULL, layer->config.rope.interleaved);
}

/* Tables at places unless the caller has made them. */
static int tfm__turn_at(tfm_ctx *c, const tfm_mha *layer, const tfm__places *places, tfm__rotation *turn) {
    if (!layer->config.rotary || turn->cosine) return 1;
    return tfm__rope_tables(c, &layer->config.rope, layer->config.head_size, places, &turn->cosine, &turn->sine);
}

/* One forward of attention. key and value may be NULL with o->memory. turn: tables of self-attention made before, or
 * NULL. */
static tfm_tensor *tfm__mha_scratch(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *query, const tfm_tensor *key,
                                    const tfm_tensor *value, const tfm_mha_options *o, const tfm__rotation *made) {
    const int self = key == query && value == query;
    const int64_t batch = query->shape[0], length = query->shape[1];
    tfm_tensor *q = NULL, *k = NULL, *v = NULL, *y;
    tfm_attention_options a;
    tfm__places places;
    tfm__rotation turn, key_turn;
    memset(&a, 0, sizeof(a));
    memset(&turn, 0, sizeof(turn));
    memset(&key_turn, 0, sizeof(key_turn));
    if (made) turn = *made;
    if (layer->config.rotary && !turn.cosine &&
        (!tfm__places_of(c, o->cache, o->layer, o->position, batch, length, &places) ||
         !tfm__turn_at(c, layer, &places, &turn)))
        return NULL;
    if (self && layer->in_proj_weight) {
        tfm_tensor *qkv = tfm__project(c, layer, query, TFM__Q, TFM__V + 1);
        q = tfm__heads_of(c, layer, qkv, TFM__Q, TFM__Q);
        k = tfm__heads_of(c, layer, qkv, TFM__Q, TFM__K);
        v = tfm__heads_of(c, layer, qkv, TFM__Q, TFM__V);
    } else {
        q = tfm__heads_of(c, layer, tfm__project(c, layer, query, TFM__Q, TFM__K), TFM__Q, TFM__Q);
        if (q && !o->memory) {
            const int together = key == value && layer->in_proj_weight != NULL;
            tfm_tensor *first = tfm__project(c, layer, key, TFM__K, together ? TFM__V + 1 : TFM__V);
            tfm_tensor *second = together || !first ? first : tfm__project(c, layer, value, TFM__V, TFM__V + 1);
            k = tfm__heads_of(c, layer, first, TFM__K, TFM__K);
            v = tfm__heads_of(c, layer, second, together ? TFM__K : TFM__V, TFM__V);
        }
    }
    if (!q || (!o->memory && (!k || !v))) return NULL;
    q = tfm__rotated(c, layer, q, &turn);
    if (!o->memory && layer->config.rotary) {
        places = tfm__places_from(0, k->shape[2]);
        if (!self && !tfm__turn_at(c, layer, &places, &key_turn)) return NULL;
        k = tfm__rotated(c, layer, k, self ? &turn : &key_turn);
    }
    if (!q || (!o->memory && !k)) return NULL;
    a.mask = o->mask;
    a.dropout = o->training ? layer->config.dropout : 0.0f;
    a.weights = o->need_weights ? o->weights : NULL;
    a.weights_average = o->need_weights == 1;
    if (o->cache) {
        /* The queries come behind what is held: "causal" can only mean that. */
        if (a.mask.causal == TFM_CAUSAL_TOP_LEFT) a.mask.causal = TFM_CAUSAL_BOTTOM_RIGHT;
        if (tfm_cache_append(c, o->cache, o->layer, k, v, o->counts) != TFM_OK) return NULL;
        y = tfm_attention_cached(c, q, o->cache, o->layer, &a);
    } else if (o->memory) {
        y = tfm_attention_cached(c, q, o->memory, o->layer, &a);
    } else {
        y = tfm_attention(c, q, k, v, &a);
    }
    y = y ? tfm_combine_heads(c, y) : NULL;
    return y ? tfm__linear(c, &layer->out_proj, y) : NULL;
}

/* "query" must be (B, L, size). */
static int tfm__sequence_ok(tfm_ctx *c, const char *who, const char *name, const tfm_tensor *t, int64_t size) {
    char text[128];
    if (!tfm__alive(t)) {
        tfm__fail(c, TFM_INVALID, "%s: %s was freed by a rewind", who, name);
        return 0;
    }
    if (t->ndim == 3 && t->shape[2] == size && tfm__is_float(t->dtype)) return 1;
    tfm__fail(c, TFM_INVALID, "%s: %s is %s: (batch, length, %lld) of f32, f16 or bf16 is expected", who, name,
              tfm__tensor_text(text, sizeof(text), t), (long long)size);
    return 0;
}

/* The layer of a cache that fits heads and batch. */
static int tfm__cache_fits(tfm_ctx *c, const char *who, const tfm_mha_config *g, const tfm_cache *cache, int64_t layer,
                           int64_t batch) {
    if (layer >= 0 && layer < cache->layers && cache->heads == g->kv_heads && cache->key_size == g->head_size &&
        cache->value_size == g->head_size && cache->batch == batch)
        return 1;
    tfm__fail(c, TFM_INVALID,
              "%s: layer %lld, batch %lld, kv_heads %lld, head_size %lld do not fit a cache of %lld layers, batch "
              "%lld, heads %lld, sizes %lld "
              "and %lld",
              who, (long long)layer, (long long)batch, (long long)g->kv_heads, (long long)g->head_size,
              (long long)cache->layers, (long long)cache->batch, (long long)cache->heads, (long long)cache->key_size,
              (long long)cache->value_size);
    return 0;
}

static tfm_tensor *tfm__mha(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *query, const tfm_tensor *key,
                            const tfm_tensor *value, const tfm_mha_options *o, const tfm__rotation *made) {
    static const char who[] = "tfm_mha_forward";
    const tfm_mha_config *g = &layer->config;
    const tfm_cache *cache = o->cache ? o->cache : o->memory;
    tfm__scope s;
    tfm_tensor *y;
    if (o->need_weights && !o->weights) {
        tfm__fail(c, TFM_INVALID, "%s: need_weights is %d, but weights is NULL", who, o->need_weights);
        return NULL;
    }
    if (o->memory ? (o->cache || key || value) : (!key || !value)) {
        tfm__fail(c, TFM_INVALID, "%s: key and value are given %s", who,
                  o->memory ? "together with memory, which holds them (and no cache)" : "as NULL without memory");
        return NULL;
    }
    if (!tfm__sequence_ok(c, who, "query", query, g->d_model)) return NULL;
    if (key && (!tfm__sequence_ok(c, who, "key", key, g->kdim) || !tfm__sequence_ok(c, who, "value", value, g->vdim)))
        return NULL;
    if (key &&
        (key->shape[0] != query->shape[0] || value->shape[0] != query->shape[0] || key->shape[1] != value->shape[1])) {
        char text[3][128];
        tfm__fail(c, TFM_INVALID,
                  "%s: query %s, key %s, value %s: one batch, and as many keys as values, are expected (batch first)",
                  who, tfm__tensor_text(text[0], 128, query), tfm__tensor_text(text[1], 128, key),
                  tfm__tensor_text(text[2], 128, value));
        return NULL;
    }
    if (o->cache && (key != query || value != query)) {
        tfm__fail(c, TFM_INVALID,
                  "%s: a cache is for self-attention (the same tensor three times); cross-attention takes memory", who);
        return NULL;
    }
    if (cache && !tfm__cache_fits(c, who, g, cache, o->layer, query->shape[0])) return NULL;
    if (o->position < 0) {
        tfm__fail(c, TFM_INVALID, "%s: position %lld is negative", who, (long long)o->position);
        return NULL;
    }
    s = tfm__scope_open(c);
    y = tfm__mha_scratch(c, layer, query, key, value, o, made);
    return tfm__scope_close(&s, y, o->need_weights ? o->weights : NULL);
}

TFM_API tfm_tensor *tfm_mha_forward(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *query, const tfm_tensor *key,
                                    const tfm_tensor *value, const tfm_mha_options *options) {
    tfm_mha_options none;
    tfm_tensor *y;
    memset(&none, 0, sizeof(none));
    if (options && options->weights) *options->weights = NULL;
    if (!tfm__forward_begin(c, "tfm_mha_forward", layer, layer ? layer->out_proj.weight : NULL, query)) return NULL;
    y = tfm__mha(c, layer, query, key, value, options ? options : &none, NULL);
    tfm__release(c);
    return y;
}

static void tfm__mha_remember(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *key, const tfm_tensor *value,
                              tfm_cache *memory, int64_t index, const tfm_tensor *counts) {
    static const char who[] = "tfm_mha_memory";
    const int together = key == value && layer->in_proj_weight != NULL;
    tfm_tensor *first, *second, *k, *v;
    tfm__places places;
    tfm__rotation turn;
    if (!tfm__sequence_ok(c, who, "key", key, layer->config.kdim) ||
        !tfm__sequence_ok(c, who, "value", value, layer->config.vdim) ||
        !tfm__cache_fits(c, who, &layer->config, memory, index, key->shape[0]))
        return;
    first = tfm__project(c, layer, key, TFM__K, together ? TFM__V + 1 : TFM__V);
    second = together || !first ? first : tfm__project(c, layer, value, TFM__V, TFM__V + 1);
    k = tfm__heads_of(c, layer, first, TFM__K, TFM__K);
    v = tfm__heads_of(c, layer, second, together ? TFM__K : TFM__V, TFM__V);
    if (!k || !v) return;
    memset(&turn, 0, sizeof(turn));
    if (!tfm__places_of(c, memory, index, 0, key->shape[0], key->shape[1], &places) ||
        !tfm__turn_at(c, layer, &places, &turn))
        return;
    k = tfm__rotated(c, layer, k, &turn);
    if (k && tfm_cache_append(c, memory, index, k, v, counts) != TFM_OK) return; /* the error is sticky */
}

TFM_API tfm_status tfm_mha_memory(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *key, const tfm_tensor *value,
                                  tfm_cache *memory, int64_t index, const tfm_tensor *counts) {
    tfm__scope s;
    if (!tfm__forward_begin(c, "tfm_mha_memory", layer, layer ? layer->out_proj.weight : NULL,
                            key && value && memory ? key : NULL))
        return tfm__status(c);
    s = tfm__scope_open(c);
    tfm__mha_remember(c, layer, key, value, memory, index, counts);
    if (!tfm__failed(c) && !tfm__recording(c)) tfm__rewind(c, s.mark);
    return tfm__end(c);
}

/* -- Encoder and decoder layers ------------------------------------------------------------------------------------ */

static tfm_mha_config tfm__block_mha(const tfm_block_config *config, int rotary) {
    tfm_mha_config g;
    memset(&g, 0, sizeof(g));
    g.no_bias = config->no_bias;
    g.d_model = config->d_model;
    g.heads = config->heads;
    g.kv_heads = config->kv_heads;
    g.head_size = config->head_size;
    g.dropout = config->dropout;
    g.rotary = rotary;
    g.rope = config->rope;
    return g;
}

static tfm_feed_forward_config tfm__block_feed_forward(const tfm_block_config *config) {
    tfm_feed_forward_config f;
    memset(&f, 0, sizeof(f));
    f.activation = config->activation;
    f.gated = config->gated;
    f.no_bias = config->no_bias;
    f.d_model = config->d_model;
    f.d_ff = config->d_ff;
    f.dropout = config->dropout;
    return f;
}

/* Fills the defaults of *config in place; 0: it cannot be, the error says why. */
static int tfm__block_ok(tfm_ctx *c, const char *who, tfm_block_config *config) {
    tfm_mha_config g;
    tfm_feed_forward_config f;
    if (!config->d_ff) config->d_ff = 2048;
    if (config->norm_eps == 0.0f) config->norm_eps = 1e-5f;
    if (!config->activation) config->activation = TFM_ACT_RELU;
    g = tfm__block_mha(config, config->rotary);
    f = tfm__block_feed_forward(config);
    if (!tfm__mha_ok(c, who, &g) || !tfm__feed_forward_ok(c, who, &f) ||
        !tfm__norm_ok(c, who, config->norm, config->norm_eps))
        return 0;
    config->kv_heads = g.kv_heads;
    config->head_size = g.head_size;
    return 1;
}

static int tfm__block_norm(const tfm__maker *m, const char *prefix, const char *name, const tfm_block_config *config,
                           tfm_norm_layer *layer) {
    char path[TFM__NAME_MAX + 1];
    return tfm__path(m->c, path, prefix, name) &&
           tfm__norm_make(m, path, config->norm, config->d_model, !config->no_bias, config->norm_eps,
                          config->norm_weight_offset, layer);
}

/* In PyTorch's order of a state_dict. */
static int tfm__encoder_layer_make(const tfm__maker *m, const char *prefix, const tfm_block_config *config,
                                   tfm_encoder_layer *layer) {
    char path[TFM__NAME_MAX + 1];
    tfm_mha_config g = tfm__block_mha(config, config->rotary);
    const tfm_feed_forward_config f = tfm__block_feed_forward(config);
    layer->config = *config;
    return tfm__mha_ok(m->c, "tfm_encoder_layer_init", &g) && tfm__path(m->c, path, prefix, "self_attn") &&
           tfm__mha_make(m, path, &g, &layer->self_attn) &&
           tfm__feed_forward_make(m, prefix, &f, &layer->feed_forward) &&
           tfm__block_norm(m, prefix, "norm1", config, &layer->norm1) &&
           tfm__block_norm(m, prefix, "norm2", config, &layer->norm2);
}

static int tfm__decoder_layer_make(const tfm__maker *m, const char *prefix, const tfm_block_config *config,
                                   tfm_decoder_layer *layer) {
    char path[TFM__NAME_MAX + 1];
    tfm_mha_config g = tfm__block_mha(config, config->rotary), cross = tfm__block_mha(config, 0);
    const tfm_feed_forward_config f = tfm__block_feed_forward(config);
    layer->config = *config;
    return tfm__mha_ok(m->c, "tfm_decoder_layer_init", &g) && tfm__mha_ok(m->c, "tfm_decoder_layer_init", &cross) &&
           tfm__path(m->c, path, prefix, "self_attn") && tfm__mha_make(m, path, &g, &layer->self_attn) &&
           tfm__path(m->c, path, prefix, "multihead_attn") && tfm__mha_make(m, path, &cross, &layer->multihead_attn) &&
           tfm__feed_forward_make(m, prefix, &f, &layer->feed_forward) &&
           tfm__block_norm(m, prefix, "norm1", config, &layer->norm1) &&
           tfm__block_norm(m, prefix, "norm2", config, &layer->norm2) &&
           tfm__block_norm(m, prefix, "norm3", config, &layer->norm3);
}

TFM_API tfm_status tfm_encoder_layer_init(tfm_ctx *c, tfm_params *p, const char *prefix, const tfm_block_config *config,
                                          tfm_encoder_layer *layer) {
    if (!tfm__init_begin(c, p, "tfm_encoder_layer_init", prefix, config, layer, sizeof(*layer))) return tfm__status(c);
    {
        tfm_block_config full = *config;
        const tfm__maker m = tfm__maker_of(c, p);
        if (tfm__block_ok(c, "tfm_encoder_layer_init", &full)) tfm__encoder_layer_make(&m, prefix, &full, layer);
    }
    return tfm__end(c);
}

TFM_API tfm_status tfm_decoder_layer_init(tfm_ctx *c, tfm_params *p, const char *prefix, const tfm_block_config *config,
                                          tfm_decoder_layer *layer) {
    if (!tfm__init_begin(c, p, "tfm_decoder_layer_init", prefix, config, layer, sizeof(*layer))) return tfm__status(c);
    {
        tfm_block_config full = *config;
        const tfm__maker m = tfm__maker_of(c, p);
        if (tfm__block_ok(c, "tfm_decoder_layer_init", &full)) tfm__decoder_layer_make(&m, prefix, &full, layer);
    }
    return tfm__end(c);
}

/* Self-attention of layer `index` of a stack. weights non-NULL: per head. */
static tfm_tensor *tfm__block_self(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *x, const tfm_stack_options *o,
                                   int64_t index, tfm_tensor **weights, const tfm__rotation *turn) {
    tfm_mha_options a;
    memset(&a, 0, sizeof(a));
    a.training = o->training;
    a.need_weights = weights ? 2 : 0;
    a.mask = o->mask;
    a.weights = weights;
    a.cache = o->cache;
    a.layer = index;
    a.counts = o->counts;
    a.position = o->position;
    return tfm__mha(c, layer, x, x, x, &a, turn);
}

static tfm_tensor *tfm__block_cross(tfm_ctx *c, const tfm_mha *layer, const tfm_tensor *x, const tfm_tensor *memory,
                                    const tfm_stack_options *o, int64_t index, tfm_tensor **weights) {
    tfm_mha_options a;
    memset(&a, 0, sizeof(a));
    a.training = o->training;
    a.need_weights = weights ? 2 : 0;
    a.mask = o->memory_mask;
    a.weights = weights;
    a.layer = index;
    a.memory = o->memory_cache;
    return tfm__mha(c, layer, x, memory, memory, &a, NULL);
}

/* post-norm: x = norm1(x + SA(x)); norm2(x + FF(x)).   pre-norm: x = x + SA(norm1(x)); x + FF(norm2(x)). */
static tfm_tensor *tfm__encoder_layer(tfm_ctx *c, const tfm_encoder_layer *l, const tfm_tensor *x,
                                      const tfm_stack_options *o, int64_t index, tfm_tensor **weights,
                                      const tfm__rotation *turn) {
    const int pre = l->config.norm_first, training = o->training;
    const float p = l->config.dropout;
    tfm_tensor *h = NULL, *sum = NULL;
    const tfm_tensor *in = pre ? tfm__norm_of(c, &l->norm1, x, NULL, NULL) : x;
    h = in ? tfm__block_self(c, &l->self_attn, in, o, index, weights, turn) : NULL;
    h = h ? tfm__drop(c, h, p, training) : NULL;
    h = h ? tfm__norm_of(c, pre ? &l->norm2 : &l->norm1, h, x, pre ? &sum : NULL) : NULL;
    if (!pre) sum = h;
    h = h ? tfm__feed_forward(c, &l->feed_forward, h, training) : NULL;
    h = h ? tfm__drop(c, h, p, training) : NULL;
    if (!h) return NULL;
    return pre ? tfm_add(c, sum, h) : tfm__norm_of(c, &l->norm2, h, sum, NULL);
}

static tfm_tensor *tfm__decoder_layer(tfm_ctx *c, const tfm_decoder_layer *l, const tfm_tensor *x,
                                      const tfm_tensor *memory, const tfm_stack_options *o, int64_t index,
                                      tfm_tensor **weights, const tfm__rotation *turn) {
    const int pre = l->config.norm_first, training = o->training;
    const float p = l->config.dropout;
    tfm_tensor *h = NULL, *sum1 = NULL, *sum2 = NULL;
    const tfm_tensor *in = pre ? tfm__norm_of(c, &l->norm1, x, NULL, NULL) : x;
    h = in ? tfm__block_self(c, &l->self_attn, in, o, index, NULL, turn) : NULL;
    h = h ? tfm__drop(c, h, p, training) : NULL;
    h = h ? tfm__norm_of(c, pre ? &l->norm2 : &l->norm1, h, x, pre ? &sum1 : NULL) : NULL;
    if (!pre) sum1 = h;
    h = h ? tfm__block_cross(c, &l->multihead_attn, h, memory, o, index, weights) : NULL;
    h = h ? tfm__drop(c, h, p, training) : NULL;
    h = h ? tfm__norm_of(c, pre ? &l->norm3 : &l->norm2, h, sum1, pre ? &sum2 : NULL) : NULL;
    if (!pre) sum2 = h;
    h = h ? tfm__feed_forward(c, &l->feed_forward, h, training) : NULL;
    h = h ? tfm__drop(c, h, p, training) : NULL;
    if (!h) return NULL;
    return pre ? tfm_add(c, sum2, h) : tfm__norm_of(c, &l->norm3, h, sum2, NULL);
}

/* Input of a layer or stack. */
static int tfm__block_input_ok(tfm_ctx *c, const char *who, const tfm_tensor *x, int64_t d_model,
                               const tfm_stack_options *o) {
    if (!tfm__sequence_ok(c, who, "x", x, d_model)) return 0;
    if (o->position >= 0) return 1;
    tfm__fail(c, TFM_INVALID, "%s: position %lld is negative", who, (long long)o->position);
    return 0;
}

static int tfm__block_memory_ok(tfm_ctx *c, const char *who, const tfm_tensor *x, const tfm_tensor *memory,
                                int64_t d_model, const tfm_stack_options *o) {
    if (!memory == !o->memory_cache) {
        tfm__fail(c, TFM_INVALID,
                  "%s: give either memory or memory_cache (a decoder without an encoder is an encoder stack with a "
                  "causal mask)",
                  who);
        return 0;
    }
    if (!memory) return 1;
    if (!tfm__sequence_ok(c, who, "memory", memory, d_model)) return 0;
    if (memory->shape[0] == x->shape[0]) return 1;
    tfm__fail(c, TFM_INVALID, "%s: x has batch %lld, memory %lld (batch first)", who, (long long)x->shape[0],
              (long long)memory->shape[0]);
    return 0;
}

TFM_API tfm_tensor *tfm_encoder_layer_forward(tfm_ctx *c, const tfm_encoder_layer *layer, const tfm_tensor *x,
                                              const tfm_stack_options *options) {
    tfm_stack_options o;
    tfm_tensor *y = NULL;
    memset(&o, 0, sizeof(o));
    if (options) o = *options;
    if (o.weights) *o.weights = NULL;
    if (!tfm__forward_begin(c, "tfm_encoder_layer_forward", layer, layer ? layer->norm2.weight : NULL, x)) return NULL;
    if (tfm__block_input_ok(c, "tfm_encoder_layer_forward", x, layer->config.d_model, &o)) {
        const tfm__scope s = tfm__scope_open(c);
        y = tfm__scope_close(&s, tfm__encoder_layer(c, layer, x, &o, 0, o.weights, NULL), o.weights);
    }
    tfm__release(c);
    return y;
}

TFM_API tfm_tensor *tfm_decoder_layer_forward(tfm_ctx *c, const tfm_decoder_layer *layer, const tfm_tensor *x,
                                              const tfm_tensor *memory, const tfm_stack_options *options) {
    static const char who[] = "tfm_decoder_layer_forward";
    tfm_stack_options o;
    tfm_tensor *y = NULL;
    memset(&o, 0, sizeof(o));
    if (options) o = *options;
    if (o.weights) *o.weights = NULL;
    if (!tfm__forward_begin(c, who, layer, layer ? layer->norm3.weight : NULL, x)) return NULL;
    if (tfm__block_input_ok(c, who, x, layer->config.d_model, &o) &&
        tfm__block_memory_ok(c, who, x, memory, layer->config.d_model, &o)) {
        const tfm__scope s = tfm__scope_open(c);
        y = tfm__scope_close(&s, tfm__decoder_layer(c, layer, x, memory, &o, 0, o.weights, NULL), o.weights);
    }
    tfm__release(c);
    return y;
}

/* -- Stacks -------------------------------------------------------------------------------------------------------- */

/* "prefix.layers.i" */
static int tfm__layer_path(tfm_ctx *c, char *path, const char *prefix, int64_t i) {
    char name[40];
    snprintf(name, sizeof(name), "layers.%lld", (long long)i);
    return tfm__path(c, path, prefix, name);
}

static int tfm__encoder_make(const tfm__maker *m, const char *prefix, int64_t layers, const tfm_block_config *config,
                             int final_norm, tfm_encoder *stack) {
    char path[TFM__NAME_MAX + 1];
    int64_t i;
    stack->layers = (tfm_encoder_layer *)tfm__params_memory(m->c, m->p, layers * (int64_t)sizeof(*stack->layers));
    if (!stack->layers) return 0;
    for (i = 0; i < layers; i++)
        if (!tfm__layer_path(m->c, path, prefix, i) || !tfm__encoder_layer_make(m, path, config, &stack->layers[i]))
            return 0;
    stack->count = layers;
    return !final_norm || tfm__block_norm(m, prefix, "norm", config, &stack->norm);
}

static int tfm__decoder_make(const tfm__maker *m, const char *prefix, int64_t layers, const tfm_block_config *config,
                             int final_norm, tfm_decoder *stack) {
    char path[TFM__NAME_MAX + 1];
    int64_t i;
    stack->layers = (tfm_decoder_layer *)tfm__params_memory(m->c, m->p, layers * (int64_t)sizeof(*stack->layers));
    if (!stack->layers) return 0;
    for (i = 0; i < layers; i++)
        if (!tfm__layer_path(m->c, path, prefix, i) || !tfm__decoder_layer_make(m, path, config, &stack->layers[i]))
            return 0;
    stack->count = layers;
    return !final_norm || tfm__block_norm(m, prefix, "norm", config, &stack->norm);
}

TFM_API tfm_status tfm_encoder_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t layers,
                                    const tfm_block_config *config, int final_norm, tfm_encoder *stack) {
    if (!tfm__init_begin(c, p, "tfm_encoder_init", prefix, config, stack, sizeof(*stack))) return tfm__status(c);
    {
        tfm_block_config full = *config;
        const tfm__maker m = tfm__maker_of(c, p);
        if (tfm__layers_ok(c, "tfm_encoder_init", layers) && tfm__block_ok(c, "tfm_encoder_init", &full))
            tfm__encoder_make(&m, prefix, layers, &full, final_norm, stack);
    }
    return tfm__end(c);
}

TFM_API tfm_status tfm_decoder_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t layers,
                                    const tfm_block_config *config, int final_norm, tfm_decoder *stack) {
    if (!tfm__init_begin(c, p, "tfm_decoder_init", prefix, config, stack, sizeof(*stack))) return tfm__status(c);
    {
        tfm_block_config full = *config;
        const tfm__maker m = tfm__maker_of(c, p);
        if (tfm__layers_ok(c, "tfm_decoder_init", layers) && tfm__block_ok(c, "tfm_decoder_init", &full))
            tfm__decoder_make(&m, prefix, layers, &full, final_norm, stack);
    }
    return tfm__end(c);
}

/* Rotary tables for all layers of a stack. With a cache whose layers hold different numbers of positions each layer
 * makes its own: *turn stays empty then. */
static int tfm__stack_turn(tfm_ctx *c, const tfm_mha *first, int64_t layers, const tfm_tensor *x,
                           const tfm_stack_options *o, tfm__rotation *turn) {
    tfm__places places;
    int64_t i;
    memset(turn, 0, sizeof(*turn));
    if (!first->config.rotary) return 1;
    if (o->cache) {
        if (!tfm__cache_fits(c, "tfm_encoder_forward", &first->config, o->cache, layers - 1, x->shape[0])) return 0;
        for (i = o->cache->batch; i < layers * o->cache->batch; i++)
            if (o->cache->length[i] != o->cache->length[i - o->cache->batch]) return 1;
    }
    return tfm__places_of(c, o->cache, 0, o->position, x->shape[0], x->shape[1], &places) &&
           tfm__turn_at(c, first, &places, turn);
}

/* One of encoder and decoder is NULL. */
static tfm_tensor *tfm__stack(tfm_ctx *c, const tfm_encoder *encoder, const tfm_decoder *decoder, const tfm_tensor *x,
                              const tfm_tensor *memory, const tfm_stack_options *o) {
    const int64_t count = encoder ? encoder->count : decoder->count;
    const tfm_mha *first = encoder ? &encoder->layers[0].self_attn : &decoder->layers[0].self_attn;
    const tfm_norm_layer *norm = encoder ? &encoder->norm : &decoder->norm;
    const tfm__scope all = tfm__scope_open(c);
    tfm__scope s;
    tfm__rotation turn;
    tfm_tensor *y = NULL;
    int64_t i;
    if (!tfm__stack_turn(c, first, count, x, o, &turn)) return NULL;
    s = tfm__scope_open(c);
    for (i = 0; i < count; i++) {
        tfm_tensor **weights = i == count - 1 ? o->weights : NULL;
        const tfm_tensor *in = i ? y : x;
        const tfm__rotation *made = turn.cosine ? &turn : NULL;
        y = encoder ? tfm__encoder_layer(c, &encoder->layers[i], in, o, i, weights, made)
                    : tfm__decoder_layer(c, &decoder->layers[i], in, memory, o, i, weights, made);
        y = tfm__scope_close(&s, y, weights);
        if (!y) return NULL;
    }
    if (norm->weight) y = tfm__norm_of(c, norm, y, NULL, NULL);
    return tfm__scope_close(&all, y, o->weights);
}

TFM_API tfm_tensor *tfm_encoder_forward(tfm_ctx *c, const tfm_encoder *stack, const tfm_tensor *x,
                                        const tfm_stack_options *options) {
    tfm_stack_options o;
    tfm_tensor *y = NULL;
    memset(&o, 0, sizeof(o));
    if (options) o = *options;
    if (o.weights) *o.weights = NULL;
    if (!tfm__forward_begin(c, "tfm_encoder_forward", stack,
                            stack && stack->layers && stack->count ? stack->layers[0].norm2.weight : NULL, x))
        return NULL;
    if (tfm__block_input_ok(c, "tfm_encoder_forward", x, stack->layers[0].config.d_model, &o))
        y = tfm__stack(c, stack, NULL, x, NULL, &o);
    tfm__release(c);
    return y;
}

TFM_API tfm_tensor *tfm_decoder_forward(tfm_ctx *c, const tfm_decoder *stack, const tfm_tensor *x,
                                        const tfm_tensor *memory, const tfm_stack_options *options) {
    static const char who[] = "tfm_decoder_forward";
    tfm_stack_options o;
    tfm_tensor *y = NULL;
    int64_t d;
    memset(&o, 0, sizeof(o));
    if (options) o = *options;
    if (o.weights) *o.weights = NULL;
    if (!tfm__forward_begin(c, who, stack,
                            stack && stack->layers && stack->count ? stack->layers[0].norm3.weight : NULL, x))
        return NULL;
    d = stack->layers[0].config.d_model;
    if (tfm__block_input_ok(c, who, x, d, &o) && tfm__block_memory_ok(c, who, x, memory, d, &o))
        y = tfm__stack(c, NULL, stack, x, memory, &o);
    tfm__release(c);
    return y;
}

TFM_API tfm_status tfm_decoder_memory(tfm_ctx *c, const tfm_decoder *stack, const tfm_tensor *memory, tfm_cache *cache,
                                      const tfm_tensor *counts) {
    int64_t i;
    if (!tfm__forward_begin(c, "tfm_decoder_memory", stack,
                            stack && stack->layers && stack->count ? stack->layers[0].norm3.weight : NULL,
                            cache ? memory : NULL))
        return tfm__status(c);
    for (i = 0; i < stack->count && !tfm__failed(c); i++) {
        const tfm__scope s = tfm__scope_open(c);
        tfm__mha_remember(c, &stack->layers[i].multihead_attn, memory, memory, cache, i, counts);
        if (!tfm__failed(c) && !tfm__recording(c)) tfm__rewind(c, s.mark);
    }
    return tfm__end(c);
}

/* -- The whole Transformer ----------------------------------------------------------------------------------------- */

/* A number of a config that may not be negative; 0 takes `otherwise`. */
static int tfm__config_number(tfm_ctx *c, const char *who, const char *name, int64_t *value, int64_t otherwise) {
    if (*value < 0) {
        tfm__fail(c, TFM_INVALID, "%s: %s is %lld: it cannot be negative", who, name, (long long)*value);
        return 0;
    }
    if (!*value) *value = otherwise;
    return 1;
}

/* What the parts of a config say about each other; NULL: nothing is wrong. Fills in what one part decides for another.
 */
static const char *tfm__transformer_fault(tfm_transformer_config *g) {
    const int decoder_only = g->kind == TFM_DECODER_ONLY, encoder_only = g->kind == TFM_ENCODER_ONLY;
    int64_t tied;
    if (decoder_only) {
        if (!g->target_vocab) g->target_vocab = g->source_vocab;
        if (!g->target_features) g->target_features = g->source_features;
        g->source_vocab = g->source_features = 0;
    }
    if (g->shared_embedding && g->kind != TFM_ENCODER_DECODER) return "shared_embedding is for encoder-decoders";
    if (g->shared_embedding && !g->target_vocab) g->target_vocab = g->source_vocab;
    if (g->shared_embedding && (!g->source_vocab || g->source_vocab != g->target_vocab))
        return "shared_embedding needs source_vocab and target_vocab of one size";
    if (g->source_vocab && g->source_features) return "source_vocab and source_features exclude each other";
    if (encoder_only && g->target_features) return "an encoder-only model has no target_features (use source_features)";
    if (!encoder_only && g->target_vocab && g->target_features)
        return "target_vocab and target_features exclude each other (outputs is the size of the head)";
    tied = encoder_only ? g->source_vocab : g->target_vocab;
    if (g->tied_head && (g->no_head || !tied)) return "tied_head needs a head and an embedding of the decoder's side";
    if (!g->outputs) g->outputs = g->target_vocab ? g->target_vocab : g->tied_head ? tied : 0;
    if (g->tied_head && g->outputs != tied) return "tied_head: outputs differs from the size of the embedding";
    if (g->no_head) g->outputs = 0;
    if (g->position == TFM_POSITION_RELATIVE && (g->relative_buckets < 4 || g->relative_buckets % 2))
        return "relative_buckets must be even and at least 4";
    return NULL;
}

/* Fills the defaults of *config in place; 0: it cannot be, the error says why. */
static int tfm__transformer_ok(tfm_ctx *c, const char *who, tfm_transformer_config *g) {
    const char *fault = NULL;
    if (g->kind < TFM_ENCODER_DECODER || g->kind > TFM_DECODER_ONLY) fault = "unknown kind";
    else if (g->position < TFM_POSITION_NONE || g->position > TFM_POSITION_RELATIVE) fault = "unknown position";
    if (!g->block.d_model) g->block.d_model = 512;
    if (!g->block.heads) g->block.heads = 8;
    if (g->position == TFM_POSITION_ROTARY) g->block.rotary = 1;
    if (!fault && (!tfm__config_number(c, who, "encoder_layers", &g->encoder_layers, 6) ||
                   !tfm__config_number(c, who, "decoder_layers", &g->decoder_layers, 6) ||
                   !tfm__config_number(c, who, "source_vocab", &g->source_vocab, 0) ||
                   !tfm__config_number(c, who, "target_vocab", &g->target_vocab, 0) ||
                   !tfm__config_number(c, who, "source_features", &g->source_features, 0) ||
                   !tfm__config_number(c, who, "target_features", &g->target_features, 0) ||
                   !tfm__config_number(c, who, "outputs", &g->outputs, 0) ||
                   !tfm__config_number(c, who, "max_length", &g->max_length, 512) ||
                   !tfm__config_number(c, who, "position_start", &g->position_start, 0) ||
                   !tfm__config_number(c, who, "relative_buckets", &g->relative_buckets, 32) ||
                   !tfm__config_number(c, who, "relative_max_distance", &g->relative_max_distance, 128)))
        return 0;
    if (!fault && (!tfm__layers_ok(c, who, g->encoder_layers) || !tfm__layers_ok(c, who, g->decoder_layers))) return 0;
    if (g->kind == TFM_DECODER_ONLY) g->encoder_layers = 0;
    if (g->kind == TFM_ENCODER_ONLY) g->decoder_layers = 0;
    if (!fault) fault = tfm__transformer_fault(g);
    if (fault) {
        tfm__fail(c, TFM_INVALID, "%s: %s", who, fault);
        return 0;
    }
    return tfm__block_ok(c, who, &g->block);
}

/* "src" or "tgt": what turns that side's input into (B, L, d_model). */
static int tfm__side_make(const tfm__maker *m, const char *prefix, const char *side, const tfm_transformer_config *g,
                          int64_t vocab, int64_t features, int tied, tfm_embedding_layer *embedding,
                          tfm_linear_layer *projection, tfm_tensor **positions) {
    const int64_t d = g->block.d_model;
    /* N(0, 1) as in nn.Embedding, but where sqrt(d) or the head multiply the table N(0, 1/d), as the paper's code has
     * it. */
    const double deviation = g->scale_embedding || tied ? 1.0 / sqrt((double)d) : 1.0;
    char name[32], path[TFM__NAME_MAX + 1];
    tfm__maker plain = *m;
    plain.xavier = 0;
    snprintf(name, sizeof(name), "%s_embedding", side);
    if (vocab &&
        (!tfm__path(m->c, path, prefix, name) || !tfm__embedding_make(m, path, vocab, d, deviation, tied, embedding)))
        return 0;
    embedding->scale = g->scale_embedding ? (float)sqrt((double)d) : 1.0f;
    snprintf(name, sizeof(name), "%s_projection", side);
    if (features &&
        (!tfm__path(m->c, path, prefix, name) || !tfm__linear_make(&plain, path, features, d, 1, 0, projection)))
        return 0;
    if (g->position != TFM_POSITION_LEARNED) return 1;
    snprintf(name, sizeof(name), "%s_position.weight", side);
    *positions = tfm__make(&plain, prefix, name, tfm_shape2(g->max_length, d), tfm__init_of(TFM__INIT_NORMAL, 0.02, 0));
    return *positions != NULL;
}

/* ALiBi's slopes are constants: a strict store need not have them. */
static tfm_tensor *tfm__alibi_make(const tfm__maker *m, const char *prefix, int64_t heads) {
    tfm_ctx *c = m->c;
    char path[TFM__NAME_MAX + 1];
    tfm_tensor *t, *slopes;
    tfm_marker mark;
    int fresh = 0;
    if (!tfm__path(c, path, prefix, "alibi_slopes")) return NULL;
    t = tfm__params_get(c, m->p, path, -1, tfm_shape1(heads), &fresh);
    if (!t || !fresh || c->dry) return t;
    mark = tfm__mark(c);
    slopes = tfm_alibi_slopes(c, heads);
    if (!slopes) return NULL;
    memcpy(t->data, slopes->data, (size_t)t->bytes);
    return tfm__recording(c) || tfm__rewind(c, mark) ? t : NULL;
}

static tfm_tensor *tfm__relative_make(const tfm__maker *m, const char *prefix, const char *name,
                                      const tfm_transformer_config *g) {
    tfm__maker plain = *m;
    plain.xavier = 0;
    return tfm__make(&plain, prefix, name, tfm_shape2(g->relative_buckets, g->block.heads),
                     tfm__init_of(TFM__INIT_NORMAL, 0.02, 0));
}

static int tfm__transformer_make(const tfm__maker *m, const char *prefix, tfm_transformer *t) {
    const tfm_transformer_config *g = &t->config;
    const int both = g->kind == TFM_ENCODER_DECODER, relative = g->position == TFM_POSITION_RELATIVE;
    const int tied_source = g->tied_head && (g->kind == TFM_ENCODER_ONLY || g->shared_embedding);
    const int64_t own_vocab = g->shared_embedding ? 0 : g->target_vocab;
    char path[TFM__NAME_MAX + 1], stack[TFM__NAME_MAX + 1];
    tfm__maker plain = *m;
    plain.xavier = 0;
    if (g->kind != TFM_DECODER_ONLY &&
        !tfm__side_make(m, prefix, "src", g, g->source_vocab, g->source_features, tied_source, &t->source_embedding,
                        &t->source_projection, &t->source_positions))
        return 0;
    if (g->kind != TFM_ENCODER_ONLY &&
        !tfm__side_make(m, prefix, "tgt", g, own_vocab, g->target_features, g->tied_head, &t->target_embedding,
                        &t->target_projection, &t->target_positions))
        return 0;
    if (g->shared_embedding) t->target_embedding = t->source_embedding;
    if (g->position == TFM_POSITION_ALIBI && !(t->alibi = tfm__alibi_make(m, prefix, g->block.heads))) return 0;
    /* The stack without cross-attention is `encoder`, also in a decoder-only model. */
    if (!tfm__path(m->c, stack, prefix, g->kind == TFM_DECODER_ONLY ? "decoder" : "encoder") ||
        !tfm__encoder_make(m, stack, g->kind == TFM_DECODER_ONLY ? g->decoder_layers : g->encoder_layers, &g->block,
                           !g->no_final_norm, &t->encoder))
        return 0;
    if (relative && !(*(g->kind == TFM_DECODER_ONLY ? &t->decoder_bias : &t->encoder_bias) =
                          tfm__relative_make(m, stack, "relative_bias", g)))
        return 0;
    if (both) {
        if (!tfm__path(m->c, stack, prefix, "decoder") ||
            !tfm__decoder_make(m, stack, g->decoder_layers, &g->block, !g->no_final_norm, &t->decoder))
            return 0;
        if (relative && !(t->decoder_bias = tfm__relative_make(m, stack, "relative_bias", g))) return 0;
    }
    if (!g->outputs) return 1;
    if (!tfm__path(m->c, path, prefix, "generator")) return 0;
    if (!g->tied_head)
        return tfm__linear_make(&plain, path, g->block.d_model, g->outputs, g->head_bias, 0, &t->generator);
    t->generator.weight = g->kind == TFM_ENCODER_ONLY ? t->source_embedding.weight : t->target_embedding.weight;
    if (g->head_bias)
        t->generator.bias =
            tfm__make(&plain, path, "bias", tfm_shape1(g->outputs), tfm__init_of(TFM__INIT_ZEROS, 0.0, 0));
    return !tfm__failed(m->c);
}

TFM_API tfm_status tfm_transformer_init(tfm_ctx *c, tfm_params *p, const char *prefix,
                                        const tfm_transformer_config *config, tfm_transformer *model) {
    tfm_transformer_config full;
    if (config) full = *config; /* it may be model->config */
    if (!tfm__init_begin(c, p, "tfm_transformer_init", prefix, config, model, sizeof(*model))) return tfm__status(c);
    if (tfm__transformer_ok(c, "tfm_transformer_init", &full)) {
        tfm__maker m = tfm__maker_of(c, p);
        m.xavier = 1;
        model->config = full;
        tfm__transformer_make(&m, prefix, model);
    }
    return tfm__end(c);
}

/* One side of the model. */
typedef struct tfm__side {
    const char *name;
    const tfm_embedding_layer *embedding;
    const tfm_linear_layer *projection;
    const tfm_tensor *positions;
} tfm__side;

static tfm__side tfm__side_of(const tfm_transformer *t, int target) {
    tfm__side s;
    s.name = target ? "target" : "source";
    s.embedding = target ? &t->target_embedding : &t->source_embedding;
    s.projection = target ? &t->target_projection : &t->source_projection;
    s.positions = target ? t->target_positions : t->source_positions;
    return s;
}

/* Rows of the learned table at places, ready to be added. counts: padding may stand past the table's end, ids may not.
 */
static tfm_tensor *tfm__learned_at(tfm_ctx *c, const tfm_tensor *table, const tfm__places *places,
                                   const tfm_tensor *counts) {
    const int64_t most = table->shape[0];
    const int counted = counts != NULL && !c->dry;
    int64_t b, i, shape[2];
    tfm_tensor *index;
    for (b = 0; b < (counted ? counts->shape[0] : places->batch); b++) {
        const int64_t from = places->starts ? places->starts[b] : places->start;
        const int64_t end =
            from + (counted ? tfm__id_at(counts->dtype, counts->data, b * counts->stride[0]) : places->length);
        if (end <= most) continue;
        tfm__fail(c, TFM_INVALID,
                  "learned positions: position %lld is asked for, but only %lld were learned (max_length)",
                  (long long)(end - 1), (long long)most);
        return NULL;
    }
    if (places->batch == 1 && places->start + places->length <= most)
        return tfm_narrow(c, table, 0, places->start, places->length);
    shape[0] = places->batch;
    shape[1] = places->length;
    index = tfm__tensor(c, TFM_I64, 2, shape);
    if (!index) return NULL;
    for (i = 0; !c->dry && i < places->batch * places->length; i++)
        ((int64_t *)index->data)[i] = tfm__min64(tfm__place(places, i), most - 1);
    return tfm_embedding(c, table, index);
}

/* ids (B, L), features (B, L, n) or vectors (B, L, d_model) at places: x (B, L, d_model). */
static tfm_tensor *tfm__side_embed(tfm_ctx *c, const tfm_transformer *t, const tfm__side *side, const tfm_tensor *input,
                                   const tfm__places *places, const tfm_tensor *counts, int training) {
    const tfm_transformer_config *g = &t->config;
    tfm_tensor *x = NULL, *positions = NULL;
    if (side->embedding->weight) {
        x = tfm__embed(c, side->embedding, input);
    } else if (side->projection->weight) {
        x = tfm__linear(c, side->projection, input);
    } else {
        x = tfm_view(c, input, tfm_shape_like(input));
    }
    if (x && tfm__sinusoidal_kind(g->position))
        positions = tfm__sinusoidal_at(c, g->position, places, g->block.d_model);
    else if (x && side->positions) positions = tfm__learned_at(c, side->positions, places, counts);
    else return x ? tfm__drop(c, x, g->block.dropout, training) : NULL;
    x = positions ? tfm_add(c, x, positions) : NULL;
    return x ? tfm__drop(c, x, g->block.dropout, training) : NULL;
}

/* The shape of one side's input. */
static int tfm__side_ok(tfm_ctx *c, const char *who, const tfm__side *side, const tfm_tensor *input, int64_t d_model) {
    char text[128];
    if (!input) {
        tfm__fail(c, TFM_INVALID, "%s: the %s is NULL", who, side->name);
        return 0;
    }
    if (!tfm__alive(input)) {
        tfm__fail(c, TFM_INVALID, "%s: the %s was freed by a rewind", who, side->name);
        return 0;
    }
    if (!side->embedding->weight)
        return tfm__sequence_ok(c, who, side->name, input,
                                side->projection->weight ? side->projection->weight->shape[1] : d_model);
    if (input->ndim == 2 && tfm__is_index(input->dtype)) return 1;
    tfm__fail(c, TFM_INVALID, "%s: %s is %s: ids (batch, length) of i64 or i32 are expected", who, side->name,
              tfm__tensor_text(text, sizeof(text), input));
    return 0;
}

/* Adds the model's own positions to a mask of self-attention. */
static tfm_mask tfm__self_mask(const tfm_transformer *t, tfm_mask mask, int decoder) {
    const tfm_tensor *bias = decoder ? t->decoder_bias : t->encoder_bias;
    if (t->alibi && !mask.alibi_slopes) mask.alibi_slopes = t->alibi;
    if (bias && !mask.relative_bias) {
        mask.relative_bias = bias;
        mask.relative_max_distance = t->config.relative_max_distance;
        mask.relative_one_way = decoder;
    }
    return mask;
}

/* The generating stack over x, with or without caches. */
static tfm_tensor *tfm__run_decoder(tfm_ctx *c, const tfm_transformer *t, const tfm_tensor *x, const tfm_tensor *memory,
                                    tfm_stack_options *o, int not_causal) {
    if (!not_causal && o->mask.causal == TFM_CAUSAL_NONE) o->mask.causal = TFM_CAUSAL_TOP_LEFT;
    o->mask = tfm__self_mask(t, o->mask, 1);
    return t->config.kind == TFM_DECODER_ONLY ? tfm__stack(c, &t->encoder, NULL, x, NULL, o)
                                              : tfm__stack(c, NULL, &t->decoder, x, memory, o);
}

static tfm_tensor *tfm__encode(tfm_ctx *c, const char *who, const tfm_transformer *t, const tfm_tensor *source,
                               const tfm_transformer_options *o, tfm_tensor **weights) {
    const tfm__side side = tfm__side_of(t, 0);
    tfm__places places;
    tfm_stack_options s;
    tfm__scope scope;
    tfm_tensor *x;
    if (!tfm__side_ok(c, who, &side, source, t->config.block.d_model)) return NULL;
    memset(&s, 0, sizeof(s));
    s.training = o->training;
    s.mask = tfm__self_mask(t, o->source_mask, 0);
    s.weights = weights;
    scope = tfm__scope_open(c);
    places = tfm__places_from(t->config.position_start, source->shape[1]);
    x = tfm__side_embed(c, t, &side, source, &places, NULL, o->training);
    return tfm__scope_close(&scope, x ? tfm__stack(c, &t->encoder, NULL, x, NULL, &s) : NULL, weights);
}

/* memory NULL: a decoder-only model. */
static tfm_tensor *tfm__decode(tfm_ctx *c, const char *who, const tfm_transformer *t, const tfm_tensor *target,
                               const tfm_tensor *memory, const tfm_transformer_options *o, tfm_tensor **weights) {
    const tfm__side side = tfm__side_of(t, 1);
    tfm__places places;
    tfm_stack_options s;
    tfm__scope scope;
    tfm_tensor *x;
    if (!tfm__side_ok(c, who, &side, target, t->config.block.d_model)) return NULL;
    memset(&s, 0, sizeof(s));
    s.training = o->training;
    s.mask = o->target_mask;
    s.memory_mask = o->memory_mask;
    /* Padding of the source stays padding when the decoder looks at it. */
    if (!s.memory_mask.key_lengths) s.memory_mask.key_lengths = o->source_mask.key_lengths;
    s.weights = weights;
    if (memory && !tfm__block_memory_ok(c, who, target, memory, t->config.block.d_model, &s)) return NULL;
    scope = tfm__scope_open(c);
    places = tfm__places_from(t->config.position_start, target->shape[1]);
    x = tfm__side_embed(c, t, &side, target, &places, NULL, o->training);
    return tfm__scope_close(&scope, x ? tfm__run_decoder(c, t, x, memory, &s, o->not_causal) : NULL, weights);
}

/* hidden (..., d_model): what `output` names, over the last dim. */
static tfm_tensor *tfm__transformer_head(tfm_ctx *c, const tfm_transformer *t, const tfm_tensor *hidden, int output) {
    tfm_tensor *y;
    if (output < TFM_OUTPUT_LOGITS || output > TFM_OUTPUT_HIDDEN) {
        tfm__fail(c, TFM_INVALID, "tfm_transformer_forward: output %d is none of TFM_OUTPUT_*", output);
        return NULL;
    }
    if (!t->config.outputs && (output == TFM_OUTPUT_SOFTMAX || output == TFM_OUTPUT_LOG_SOFTMAX)) {
        tfm__fail(c, TFM_INVALID,
                  "tfm_transformer_forward: probabilities need an output head: give outputs or target_vocab");
        return NULL;
    }
    if (!t->config.outputs || output == TFM_OUTPUT_HIDDEN) return tfm_view(c, hidden, tfm_shape_like(hidden));
    y = tfm__linear(c, &t->generator, hidden);
    if (!y || output == TFM_OUTPUT_LOGITS) return y;
    return output == TFM_OUTPUT_SOFTMAX ? tfm_softmax(c, y, -1) : tfm_log_softmax(c, y, -1);
}

static tfm_tensor *tfm__transformer(tfm_ctx *c, const tfm_transformer *t, const tfm_tensor *source,
                                    const tfm_tensor *target, const tfm_transformer_options *o) {
    static const char who[] = "tfm_transformer_forward";
    static const char *const wants[] = {
        "an encoder-decoder needs source and target (for one sequence: TFM_ENCODER_ONLY or TFM_DECODER_ONLY)",
        "an encoder-only model takes a source and no target", "a decoder-only model takes a target and no source"};
    const int kind = t->config.kind;
    tfm__scope s;
    tfm_tensor *x = NULL, *memory = NULL;
    if ((source != NULL) != (kind != TFM_DECODER_ONLY) || (target != NULL) != (kind != TFM_ENCODER_ONLY)) {
        tfm__fail(c, TFM_INVALID, "%s: %s", who, wants[kind]);
        return NULL;
    }
    s = tfm__scope_open(c);
    if (kind != TFM_DECODER_ONLY)
        memory = tfm__encode(c, who, t, source, o, kind == TFM_ENCODER_ONLY ? o->weights : NULL);
    if (kind == TFM_ENCODER_ONLY) x = memory;
    else if (memory || kind == TFM_DECODER_ONLY) x = tfm__decode(c, who, t, target, memory, o, o->weights);
    return tfm__scope_close(&s, x ? tfm__transformer_head(c, t, x, o->output) : NULL, o->weights);
}

/* 1: begun, and *o is what the caller gave. */
static int tfm__transformer_begin(tfm_ctx *c, const char *who, const tfm_transformer *model, const tfm_tensor *input,
                                  const tfm_transformer_options *options, tfm_transformer_options *o) {
    memset(o, 0, sizeof(*o));
    if (options) *o = *options;
    if (o->weights) *o->weights = NULL;
    return tfm__forward_begin(
        c, who, model,
        model && model->encoder.layers && model->encoder.count ? model->encoder.layers[0].norm2.weight : NULL, input);
}

TFM_API tfm_tensor *tfm_transformer_forward(tfm_ctx *c, const tfm_transformer *model, const tfm_tensor *source,
                                            const tfm_tensor *target, const tfm_transformer_options *options) {
    tfm_transformer_options o;
    tfm_tensor *y;
    if (!tfm__transformer_begin(c, "tfm_transformer_forward", model, source ? source : target, options, &o))
        return NULL;
    y = tfm__transformer(c, model, source, target, &o);
    tfm__release(c);
    return y;
}

TFM_API tfm_tensor *tfm_transformer_encode(tfm_ctx *c, const tfm_transformer *model, const tfm_tensor *source,
                                           const tfm_transformer_options *options) {
    static const char who[] = "tfm_transformer_encode";
    tfm_transformer_options o;
    tfm_tensor *y = NULL;
    if (!tfm__transformer_begin(c, who, model, source, options, &o)) return NULL;
    if (model->config.kind == TFM_DECODER_ONLY)
        tfm__fail(c, TFM_INVALID, "%s: a decoder-only model has no encoder", who);
    else y = tfm__encode(c, who, model, source, &o, o.weights);
    tfm__release(c);
    return y;
}

TFM_API tfm_tensor *tfm_transformer_decode(tfm_ctx *c, const tfm_transformer *model, const tfm_tensor *target,
                                           const tfm_tensor *memory, const tfm_transformer_options *options) {
    static const char who[] = "tfm_transformer_decode";
    tfm_transformer_options o;
    tfm_tensor *y = NULL;
    if (!tfm__transformer_begin(c, who, model, target, options, &o)) return NULL;
    if (model->config.kind == TFM_ENCODER_ONLY || !memory != (model->config.kind == TFM_DECODER_ONLY)) {
        tfm__fail(c, TFM_INVALID, "%s: memory is %s, but this model is %s", who, memory ? "given" : "NULL",
                  model->config.kind == TFM_ENCODER_ONLY ? "encoder-only"
                  : memory                               ? "decoder-only"
                                                         : "an encoder-decoder");
    } else {
        const tfm__scope s = tfm__scope_open(c);
        y = tfm__decode(c, who, model, target, memory, &o, o.weights);
        y = tfm__scope_close(&s, y ? tfm__transformer_head(c, model, y, o.output) : NULL, o.weights);
    }
    tfm__release(c);
    return y;
}

/* -- For sessions -------------------------------------------------------------------------------------------------- */

/* Layers of the stack that generates; 0: this model cannot. */
static TFM__UNUSED int64_t tfm__transformer_layers(const tfm_transformer *t) {
    return t->config.kind == TFM_ENCODER_ONLY ? 0 : t->config.decoder_layers;
}

static TFM__UNUSED int64_t tfm__transformer_outputs(const tfm_transformer *t) {
    return t->config.outputs ? t->config.outputs : t->config.block.d_model;
}

/* Caches of a (filled) config; layers 0: there is none of that kind. */
static void tfm__transformer_caches(const tfm_transformer_config *config, int64_t batch, int64_t length,
                                    int64_t source_length, int dtype, tfm_cache_options *self,
                                    tfm_cache_options *cross) {
    memset(self, 0, sizeof(*self));
    self->dtype = dtype;
    self->layers = config->kind == TFM_ENCODER_ONLY ? 0 : config->decoder_layers;
    self->batch = batch;
    self->heads = config->block.kv_heads;
    self->key_size = self->value_size = config->block.head_size;
    self->capacity = length;
    *cross = *self;
    cross->layers = config->kind == TFM_ENCODER_DECODER ? config->decoder_layers : 0;
    cross->capacity = source_length;
}

/* The next ids of each row, behind what the cache holds: hidden (B, L, d_model). */
static TFM__UNUSED tfm_tensor *tfm__transformer_step(tfm_ctx *c, const tfm_transformer *t, const tfm_tensor *ids,
                                                     tfm_cache *cache, const tfm_cache *memory,
                                                     const tfm_tensor *memory_lengths, const tfm_tensor *counts) {
    const tfm__side side = tfm__side_of(t, 1);
    tfm__places places;
    tfm_stack_options s;
    tfm__scope scope;
    tfm_tensor *x;
    int64_t b;
    if (!tfm__side_ok(c, "tfm_session_feed", &side, ids, t->config.block.d_model)) return NULL;
    if (!tfm__cache_fits(c, "tfm_session_feed", &t->encoder.layers[0].self_attn.config, cache,
                         tfm__transformer_layers(t) - 1, ids->shape[0]))
        return NULL;
    memset(&s, 0, sizeof(s));
    s.memory_mask.key_lengths = memory_lengths;
    s.cache = cache;
    s.memory_cache = memory;
    s.counts = counts;
    scope = tfm__scope_open(c);
    if (!tfm__places_of(c, cache, 0, 0, ids->shape[0], ids->shape[1], &places)) return NULL;
    places.start += t->config.position_start;
    if (places.starts) {
        int64_t *starts = (int64_t *)tfm__arena_meta(c, places.batch * (int64_t)sizeof(int64_t));
        if (!starts) return NULL;
        for (b = 0; b < places.batch; b++) starts[b] = places.starts[b] + t->config.position_start;
        places.starts = starts;
    }
    x = tfm__side_embed(c, t, &side, ids, &places, counts, 0);
    return tfm__scope_close(&scope, x ? tfm__run_decoder(c, t, x, NULL, &s, 0) : NULL, NULL);
}

/* Row index[b] of each batch row: x (B, L, d) -> (B, d). A negative index gives zeros. */
static TFM__UNUSED tfm_tensor *tfm__pick_rows(tfm_ctx *c, const tfm_tensor *x, const int64_t *index) {
    int64_t shape[2], b, stride;
    tfm_tensor *y;
    shape[0] = x->shape[0];
    shape[1] = x->shape[2];
    y = tfm__tensor(c, x->dtype, 2, shape);
    for (b = 0; y && !c->dry && b < shape[0] && shape[1]; b++) {
        char *to = tfm__at(y, b * shape[1]);
        if (index[b] < 0) {
            memset(to, 0, (size_t)(shape[1] * tfm_dtype_size(y->dtype)));
        } else {
            tfm_tensor from = *x, row = *y;
            from.data = tfm__at(x, b * x->stride[0] + index[b] * x->stride[1]);
            row.data = to;
            stride = x->stride[2];
            from.ndim = row.ndim = 1;
            from.shape[0] = row.shape[0] = shape[1];
            from.stride[0] = stride;
            row.stride[0] = 1;
            tfm__assign(c, &row, &from);
        }
    }
    return y;
}

/* -- How much memory ----------------------------------------------------------------------------------------------- */

/* An input of the model for a dry run. */
static tfm_tensor *tfm__side_dummy(tfm_ctx *c, const tfm_transformer *t, int target, int64_t batch, int64_t length) {
    const tfm__side side = tfm__side_of(t, target);
    if (side.embedding->weight) return tfm_empty(c, TFM_I64, tfm_shape2(batch, length));
    return tfm_empty(c, TFM_F32,
                     tfm_shape3(batch, length,
                                side.projection->weight ? side.projection->weight->shape[1] : t->config.block.d_model));
}

/* Inside a dry run: builds the model in a store of sizes and calls it. */
static void tfm__transformer_plan(tfm_ctx *c, tfm_params *p, const tfm_transformer_config *config, int64_t batch,
                                  int64_t source_length, int64_t target_length, tfm_transformer_memory *out) {
    tfm_transformer model;
    tfm_transformer_options o;
    tfm_cache_options self, cross;
    tfm_tensor *source = NULL, *target = NULL;
    int64_t before;
    memset(&o, 0, sizeof(o));
    if (tfm_transformer_init(c, p, "", config, &model) != TFM_OK || tfm_params_prepare(c, p) != TFM_OK) return;
    out->weights = tfm_params_bytes(p);
    tfm__transformer_caches(&model.config, batch, target_length, source_length, TFM_F32, &self, &cross);
    out->cache = (self.layers && target_length && batch ? tfm__max64(0, tfm_cache_memory(&self)) : 0) +
                 (cross.layers && source_length && batch ? tfm__max64(0, tfm_cache_memory(&cross)) : 0);
    out->threads = (int64_t)c->threads * TFM__SCRATCH_BYTES;
    if (config->kind != TFM_DECODER_ONLY) source = tfm__side_dummy(c, &model, 0, batch, source_length);
    if (config->kind != TFM_ENCODER_ONLY) target = tfm__side_dummy(c, &model, 1, batch, target_length);
    before = c->arena.peak = c->arena.used;
    if (tfm_transformer_forward(c, &model, source, target, &o)) out->scratch = c->arena.peak - before;
}

TFM_API tfm_status tfm_transformer_measure(tfm_ctx *c, const tfm_transformer_config *config, int64_t batch,
                                           int64_t source_length, int64_t target_length, tfm_transformer_memory *out) {
    static const char who[] = "tfm_transformer_measure";
    tfm_params *p;
    tfm_memory total;
    if (out) memset(out, 0, sizeof(*out));
    if (!tfm__begin(c)) return tfm__status(c);
    if (!config || !out || batch < 0 || source_length < 0 || target_length < 0) {
        tfm__fail(c, TFM_INVALID, "%s: %s", who,
                  !config ? "config is NULL"
                  : !out  ? "out is NULL"
                          : "batch and lengths cannot be negative");
    } else if (c->dry) {
        tfm__fail(c, TFM_INVALID, "%s: not between tfm_measure_begin and tfm_measure_end", who);
    } else {
        tfm_measure_begin(c);
        p = tfm_params_create(c);
        if (p) tfm__transformer_plan(c, p, config, batch, source_length, target_length, out);
        tfm_params_destroy(p);
        if (tfm_measure_end(c, &total) != TFM_OK) memset(out, 0, sizeof(*out));
    }
    return tfm__end(c);
}

/* -- Heads --------------------------------------------------------------------------------------------------------- */

/* What pooling needs of lengths, for x (B, L, d): where the padding is (B, L, 1), how many are real (B, 1), the last
 * one's place (B, 1, 1), which rows are empty (B, 1). */
typedef struct tfm__pool_lengths {
    tfm_tensor *padding, *count, *last, *empty;
} tfm__pool_lengths;

static int tfm__pool_prepare(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *lengths, tfm__pool_lengths *p) {
    const int64_t batch = x->shape[0], length = x->shape[1];
    int64_t b, l;
    p->padding = tfm_empty(c, TFM_BOOL, tfm_shape3(batch, length, 1));
    p->count = tfm_empty(c, TFM_F32, tfm_shape2(batch, 1));
    p->last = tfm_empty(c, TFM_I64, tfm_shape3(batch, 1, 1));
    p->empty = tfm_empty(c, TFM_BOOL, tfm_shape2(batch, 1));
    if (!p->padding || !p->count || !p->last || !p->empty) return 0;
    for (b = 0; !c->dry && b < batch; b++) {
        const int64_t n = tfm__id_at(lengths->dtype, lengths->data, b * lengths->stride[0]);
        for (l = 0; l < length; l++) ((uint8_t *)p->padding->data)[b * length + l] = l >= n;
        ((float *)p->count->data)[b] = (float)tfm__max64(n, 1);
        ((int64_t *)p->last->data)[b] = tfm__max64(n - 1, 0);
        ((uint8_t *)p->empty->data)[b] = n == 0;
    }
    return 1;
}

/* t, or a copy in another dtype. NULL stays NULL. */
static tfm_tensor *tfm__in_dtype(tfm_ctx *c, tfm_tensor *t, int dtype) {
    return t && t->dtype != dtype ? tfm_cast(c, t, dtype) : t;
}

static tfm_tensor *tfm__pool_of(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *lengths, int pooling) {
    const int64_t batch = x->shape[0], length = x->shape[1], d = x->shape[2];
    const tfm_shape flat = tfm_shape2(batch, d), over = tfm_shape1(1);
    tfm__pool_lengths p;
    tfm_tensor *y;
    if (!length) return tfm_full(c, x->dtype, flat, 0.0);
    if (!lengths) {
        if (pooling == TFM_POOL_MEAN) return tfm_mean(c, x, over, 0);
        if (pooling == TFM_POOL_MAX) return tfm_max(c, x, over, 0);
        y = tfm_select(c, x, 1, pooling == TFM_POOL_FIRST ? 0 : length - 1);
        return y ? tfm_clone(c, y) : NULL;
    }
    if (!tfm__pool_prepare(c, x, lengths, &p)) return NULL;
    if (pooling == TFM_POOL_MEAN) {
        y = tfm__in_dtype(c, tfm_masked_fill(c, x, p.padding, 0.0), TFM_F32); /* a sum leaves the range of f16 */
        y = y ? tfm_sum(c, y, over, 0) : NULL;
        return tfm__in_dtype(c, y ? tfm_div(c, y, p.count) : NULL, x->dtype);
    }
    if (pooling == TFM_POOL_MAX) {
        y = tfm_masked_fill(c, x, p.padding, -HUGE_VAL);
        y = y ? tfm_max(c, y, over, 0) : NULL;
    } else if (pooling == TFM_POOL_FIRST) {
        y = tfm_select(c, x, 1, 0);
    } else {
        y = tfm_expand(c, p.last, tfm_shape3(batch, 1, d));
        y = y ? tfm_gather(c, x, 1, y) : NULL;
        y = y ? tfm_reshape(c, y, flat) : NULL;
    }
    return y ? tfm_masked_fill(c, y, p.empty, 0.0) : NULL;
}

TFM_API tfm_tensor *tfm_pool(tfm_ctx *c, const tfm_tensor *x, const tfm_tensor *lengths, int pooling) {
    tfm__op o;
    tfm__scope s;
    if (!tfm__enter(c, &o, TFM__OP_POOL, 1, x)) return NULL;
    if (!tfm__optional(&o, lengths)) return tfm__leave(&o, NULL);
    if (x->ndim != 3) return tfm__reject(&o, "x is %s: (batch, length, size) is expected", tfm__describe(&o, x));
    if (!tfm__need_float(&o, "x", x)) return NULL;
    if (pooling < TFM_POOL_MEAN || pooling > TFM_POOL_MAX)
        return tfm__reject(&o, "pooling %d is none of TFM_POOL_*", pooling);
    if (lengths) {
        if (!tfm__need_index(&o, "lengths", lengths)) return NULL;
        if (lengths->ndim != 1 || lengths->shape[0] != x->shape[0])
            return tfm__reject(&o, "lengths is %s, x is %s: one length per batch row is expected",
                               tfm__describe(&o, lengths), tfm__describe(&o, x));
        if (!tfm__check_ids(&o, "lengths", lengths, x->shape[1] + 1)) return NULL;
    }
    s = tfm__scope_open(c);
    return tfm__leave(&o, tfm__scope_close(&s, tfm__pool_of(c, x, lengths, pooling), NULL));
}

/* x / max(|x|, 1e-12), as torch.nn.functional.normalize. */
TFM_API tfm_tensor *tfm_l2_normalize(tfm_ctx *c, const tfm_tensor *x) {
    tfm__op o;
    tfm__scope s;
    const tfm_tensor *wide = x; /* f32: squares leave the range of f16 */
    tfm_tensor *y;
    if (!tfm__enter(c, &o, TFM__OP_L2_NORMALIZE, 1, x)) return NULL;
    if (!x->ndim) return tfm__reject(&o, "x is a scalar: at least one dim is expected");
    if (!tfm__need_float(&o, "x", x)) return NULL;
    s = tfm__scope_open(c);
    if (x->dtype != TFM_F32) wide = tfm_cast(c, x, TFM_F32);
    y = wide ? tfm_mul(c, wide, wide) : NULL;
    y = y ? tfm_sum(c, y, tfm_shape1(-1), 1) : NULL;
    y = y ? tfm_sqrt(c, y) : NULL;
    y = y ? tfm_clamp(c, y, 1e-12f, (float)HUGE_VAL) : NULL;
    y = tfm__in_dtype(c, y ? tfm_div(c, wide, y) : NULL, x->dtype);
    return tfm__leave(&o, tfm__scope_close(&s, y, NULL));
}

TFM_API tfm_status tfm_classifier_init(tfm_ctx *c, tfm_params *p, const char *prefix, int64_t d_model, int64_t classes,
                                       int pooling, int tokens, tfm_classifier *head) {
    static const char who[] = "tfm_classifier_init";
    if (!tfm__init_begin(c, p, who, prefix, prefix, head, sizeof(*head))) return tfm__status(c);
    if (pooling < TFM_POOL_MEAN || pooling > TFM_POOL_MAX)
        tfm__fail(c, TFM_INVALID, "%s: pooling %d is none of TFM_POOL_*", who, pooling);
    else if (tfm__positive(c, who, "d_model", d_model) && tfm__positive(c, who, "classes", classes)) {
        const tfm__maker m = tfm__maker_of(c, p);
        head->pooling = pooling;
        head->tokens = tokens != 0;
        tfm__linear_make(&m, prefix, d_model, classes, 1, 0, &head->linear);
    }
    return tfm__end(c);
}

TFM_API tfm_tensor *tfm_classifier_forward(tfm_ctx *c, const tfm_classifier *head, const tfm_tensor *x,
                                           const tfm_tensor *lengths) {
    static const char who[] = "tfm_classifier_forward";
    tfm_tensor *y = NULL;
    if (!tfm__forward_begin(c, who, head, head ? head->linear.weight : NULL, x)) return NULL;
    if (tfm__sequence_ok(c, who, "x", x, head->linear.weight->shape[1])) {
        const tfm__scope s = tfm__scope_open(c);
        const tfm_tensor *pooled = head->tokens ? x : tfm_pool(c, x, lengths, head->pooling);
        y = tfm__scope_close(&s, pooled ? tfm__linear(c, &head->linear, pooled) : NULL, NULL);
    }
    tfm__release(c);
    return y;
}

/* ==================================================================================================================
 *  12  GENERATION
 *
 *  Sessions (a model, the caches and positions of a batch), choosing the next id, generation of a batch, beam search.
 * ================================================================================================================ */

/* -- for this chapter and those below ------------------------------------------------------------------------------ */

/* Brackets a verb or expression that takes a context: other than TFM_OK, it must do nothing (for an expression: give
 * NULL). */
static TFM__UNUSED tfm_status tfm__verb_begin(tfm_ctx *c) {
    tfm_status status;
    if (!c) return TFM_INVALID;
    if (!tfm__acquire(c)) return TFM_BUSY;
    status = tfm__status(c);
    if (status) tfm__release(c);
    return status;
}

static TFM__UNUSED tfm_status tfm__verb_end(tfm_ctx *c) {
    const tfm_status status = tfm__status(c);
    tfm__release(c);
    return status;
}

/* For a verb inside another one: its error is in the context. */
static TFM__UNUSED void tfm__ignore(tfm_status status) { (void)status; }

typedef int (*tfm__less)(const void *user, int64_t a, int64_t b);

static TFM__UNUSED void tfm__sift(int64_t *index, int64_t root, int64_t n, tfm__less less, const void *user) {
    int64_t child;
    for (; (child = 2 * root + 1) < n; root = child) {
        int64_t kept;
        if (child + 1 < n && less(user, index[child], index[child + 1])) child++;
        if (!less(user, index[root], index[child])) return;
        kept = index[root];
        index[root] = index[child];
        index[child] = kept;
    }
}

/* Sorts numbers by what they stand for, ascending. Heap sort: no memory (qsort may take some, not from our
 * allocator), and no input makes it slow. Equal elements come out in any order: give every pair an order. */
static TFM__UNUSED void tfm__sort(int64_t *index, int64_t n, tfm__less less, const void *user) {
    int64_t i, kept;
    for (i = n / 2 - 1; i >= 0; i--) tfm__sift(index, i, n, less, user);
    for (i = n - 1; i > 0; i--) {
        kept = index[0];
        index[0] = index[i];
        index[i] = kept;
        tfm__sift(index, 0, i, less, user);
    }
}

#if !defined(TFM_NO_GENERATION)

/* -- sessions ------------------------------------------------------------------------------------------------------ */

struct tfm_session {
    tfm_allocator allocator;
    tfm_transformer model;             /* a copy: pointers into the parameter store */
    tfm_cache *self, *cross;           /* cross NULL: decoder-only */
    int64_t batch, capacity, source_capacity;
    int encoded;                       /* cross holds a source */
    int64_t *before;                   /* (batch) positions before a feed: it fails as a whole */
    int64_t *index;                    /* (batch) row of the hidden states that gives the logits */
};

TFM_API void tfm_session_destroy(tfm_session *s) {
    tfm_allocator a;
    if (!s) return;
    a = s->allocator;
    tfm_cache_destroy(s->self);
    tfm_cache_destroy(s->cross);
    tfm__free_to(&a, s->before);
    tfm__free_to(&a, s);
}

/* Without caches. */
static tfm_session *tfm__session_new(tfm_ctx *c, const tfm_transformer *model, int64_t batch) {
    tfm_session *s = (tfm_session *)tfm__alloc_shared(c, (int64_t)sizeof *s, 0);
    int64_t bytes = 0;
    if (!s) return NULL;
    memset(s, 0, sizeof *s);
    s->allocator = c->allocator;
    s->model = *model;
    s->batch = batch;
    if (tfm__mul(batch, 2 * (int64_t)sizeof *s->before, &bytes)) s->before = (int64_t *)tfm__alloc_shared(c, bytes, 0);
    else tfm__fail(c, TFM_INVALID, "tfm_session: a batch of %lld is too large", (long long)batch);
    if (s->before) {
        s->index = s->before + batch;
        return s;
    }
    tfm_session_destroy(s);
    return NULL;
}

TFM_API tfm_session *tfm_session_create(tfm_ctx *c, const tfm_transformer *model, const tfm_session_options *options) {
    tfm_session_options o;
    tfm_cache_options self, cross;
    tfm_session *s = NULL;
    if (tfm__verb_begin(c)) return NULL;
    memset(&o, 0, sizeof o);
    if (options) o = *options;
    if (!o.batch) o.batch = 1;
    if (!model || !tfm__transformer_layers(model)) {
        tfm__fail(c, TFM_INVALID, "tfm_session_create: %s",
                  model ? "an encoder-only model does not generate" : "model is NULL");
    } else if (o.batch < 1 || o.capacity < 0 || o.source_capacity < 0) {
        tfm__fail(c, TFM_INVALID, "tfm_session_create: batch %lld, capacity %lld or source_capacity %lld is negative",
                  (long long)o.batch, (long long)o.capacity, (long long)o.source_capacity);
    } else {
        s = tfm__session_new(c, model, o.batch);
    }
    if (s) {
        s->capacity = o.capacity ? o.capacity : model->config.max_length;
        s->source_capacity = o.source_capacity ? o.source_capacity : s->capacity;
        tfm__transformer_caches(&model->config, s->batch, s->capacity, s->source_capacity, o.cache_dtype, &self,
                                &cross);
        s->self = tfm_cache_create(c, &self);
        if (cross.layers) s->cross = tfm_cache_create(c, &cross);
        if (!s->self || (cross.layers && !s->cross)) {
            tfm_session_destroy(s);
            s = NULL;
        }
    }
    tfm__release(c);
    return s;
}

TFM_API void tfm_session_reset(tfm_session *s) {
    if (!s) return;
    tfm_cache_reset(s->self);
    if (s->cross) tfm_cache_reset(s->cross);
    s->encoded = 0;
}

TFM_API int64_t tfm_session_length(const tfm_session *s, int64_t row) {
    return s && row >= 0 && row < s->batch ? tfm_cache_length(s->self, 0, row) : 0;
}

/* The error of a session that is NULL. */
static int tfm__session_given(tfm_ctx *c, const char *who, const tfm_session *s) {
    if (!s) tfm__fail(c, TFM_INVALID, "%s: session is NULL", who);
    return s != NULL;
}

TFM_API tfm_status tfm_session_truncate(tfm_ctx *c, tfm_session *s, int64_t row, int64_t length) {
    const tfm_status busy = tfm__verb_begin(c);
    if (busy) return busy;
    if (tfm__session_given(c, "tfm_session_truncate", s)) tfm__ignore(tfm_cache_truncate(c, s->self, row, length));
    return tfm__verb_end(c);
}

TFM_API tfm_status tfm_session_reorder(tfm_ctx *c, tfm_session *s, const int64_t *rows, int64_t count) {
    const tfm_status busy = tfm__verb_begin(c);
    if (busy) return busy;
    if (tfm__session_given(c, "tfm_session_reorder", s) && tfm_cache_reorder(c, s->self, rows, count) == TFM_OK
        && s->cross)
        tfm__ignore(tfm_cache_reorder(c, s->cross, rows, count));
    return tfm__verb_end(c);
}

TFM_API tfm_session *tfm_session_fork(tfm_ctx *c, const tfm_session *s, const int64_t *rows, int64_t count) {
    tfm_session *f = NULL;
    if (tfm__verb_begin(c)) return NULL;
    if (!tfm__session_given(c, "tfm_session_fork", s)) f = NULL;
    else if (count < 1 || !rows)
        tfm__fail(c, TFM_INVALID, "tfm_session_fork: rows is NULL or count (%lld) not positive", (long long)count);
    else f = tfm__session_new(c, &s->model, count);
    if (f) {
        f->capacity = s->capacity;
        f->source_capacity = s->source_capacity;
        f->encoded = s->encoded;
        f->self = tfm_cache_fork(c, s->self, rows, count);
        if (s->cross) f->cross = tfm_cache_fork(c, s->cross, rows, count);
        if (!f->self || (s->cross && !f->cross)) {
            tfm_session_destroy(f);
            f = NULL;
        }
    }
    tfm__release(c);
    return f;
}

TFM_API tfm_status tfm_session_encode(tfm_ctx *c, tfm_session *s, const tfm_tensor *source, const tfm_tensor *lengths) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm_transformer_options o;
    tfm_tensor *memory = NULL;
    tfm_marker mark;
    if (busy) return busy;
    memset(&o, 0, sizeof o);
    o.source_mask.key_lengths = lengths;
    mark = tfm_mark(c);
    if (!tfm__session_given(c, "tfm_session_encode", s)) return tfm__verb_end(c);
    if (!s->cross) {
        tfm__fail(c, TFM_INVALID, "tfm_session_encode: a decoder-only model has no source");
    } else if (!tfm__alive(source) || source->ndim < 2 || source->shape[0] != s->batch
               || source->shape[1] > s->source_capacity) {
        char text[128];
        tfm__fail(c, TFM_INVALID, "tfm_session_encode: source is %s; the session takes (%lld, up to %lld)",
                  tfm__tensor_text(text, (int64_t)sizeof text, source), (long long)s->batch,
                  (long long)s->source_capacity);
    } else {
        tfm_session_reset(s);
        memory = tfm_transformer_encode(c, &s->model, source, &o);
        if (memory && tfm_decoder_memory(c, &s->model.decoder, memory, s->cross, lengths) == TFM_OK) s->encoded = 1;
        else tfm_session_reset(s);
    }
    if (!tfm__failed(c) && !tfm__recording(c)) tfm_rewind(c, mark);
    return tfm__verb_end(c);
}

/* Checks ids and counts of a feed and gives the counts as i64 (B); NULL with the error set. s->before and s->index
 * are filled. */
static tfm_tensor *tfm__feed_counts(tfm_ctx *c, tfm_session *s, const tfm_tensor *ids, const tfm_tensor *counts) {
    char text[128];
    tfm_tensor *all;
    int64_t b;
    if (!tfm__alive(ids) || ids->ndim < 2 || ids->shape[0] != s->batch) {
        tfm__fail(c, TFM_INVALID, "tfm_session_feed: ids is %s; the session takes (%lld, L)",
                  tfm__tensor_text(text, (int64_t)sizeof text, ids), (long long)s->batch);
        return NULL;
    }
    if (counts
        && (!tfm__alive(counts) || counts->ndim != 1 || counts->shape[0] != s->batch
            || !tfm__is_index(counts->dtype))) {
        tfm__fail(c, TFM_INVALID, "tfm_session_feed: counts is %s, expected i64 or i32 (%lld)",
                  tfm__tensor_text(text, (int64_t)sizeof text, counts), (long long)s->batch);
        return NULL;
    }
    if (s->cross && !s->encoded) {
        tfm__fail(c, TFM_INVALID, "tfm_session_feed: nothing has been encoded (tfm_session_encode)");
        return NULL;
    }
    all = tfm__tensor(c, TFM_I64, 1, &s->batch);
    for (b = 0; all && b < s->batch; b++) {
        const int64_t n =
            counts && !c->dry ? tfm__id_at(counts->dtype, counts->data, b * counts->stride[0]) : ids->shape[1];
        s->before[b] = tfm_session_length(s, b);
        s->index[b] = n - 1;
        if (n < 0 || n > ids->shape[1]) {
            tfm__fail(c, TFM_INVALID, "tfm_session_feed: counts[%lld] is %lld, expected 0 to %lld", (long long)b,
                      (long long)n, (long long)ids->shape[1]);
            return NULL;
        }
        if (n > s->capacity - s->before[b]) {
            tfm__fail(c, TFM_INVALID, "tfm_session_feed: row %lld holds %lld of %lld positions: %lld more do not fit",
                      (long long)b, (long long)s->before[b], (long long)s->capacity, (long long)n);
            return NULL;
        }
        if (!c->dry) ((int64_t *)all->data)[b] = n;
    }
    return all;
}

/* A failed feed leaves no layer with positions that others lack. */
static void tfm__feed_undo(tfm_session *s) {
    int64_t layer, b;
    for (layer = 0; layer < s->self->layers; layer++)
        for (b = 0; b < s->batch; b++)
            s->self->length[layer * s->batch + b] = tfm__min64(s->self->length[layer * s->batch + b], s->before[b]);
}

/* Zeros for the logits of ids that are not there: rows (B * per_row, outputs), of which the first counts[b] of each
 * b are real. */
static void tfm__feed_clear(const tfm_ctx *c, tfm_tensor *logits, const tfm_session *s, int64_t per_row, int whole) {
    const int64_t n = logits->shape[logits->ndim - 1];
    int64_t b, i;
    for (b = 0; b < s->batch && !c->dry; b++)
        for (i = whole ? s->index[b] + 1 : 0; i < per_row; i++)
            if (whole || s->index[b] < 0)
                memset((float *)logits->data + (b * per_row + i) * n, 0, (size_t)n * sizeof(float));
}

static tfm_tensor *tfm__feed(tfm_ctx *c, tfm_session *s, const tfm_tensor *ids, const tfm_tensor *counts, int whole) {
    tfm_tensor *all, *x = NULL;
    tfm_marker mark;
    if (tfm__verb_begin(c)) return NULL;
    if (!tfm__session_given(c, "tfm_session_feed", s)) {
        tfm__release(c);
        return NULL;
    }
    mark = tfm_mark(c);
    all = tfm__feed_counts(c, s, ids, counts);
    if (all) {
        x = tfm__transformer_step(c, &s->model, ids, s->self, s->cross, NULL, all);
        if (x && !whole) x = tfm__pick_rows(c, x, s->index);
        if (x) x = tfm__transformer_head(c, &s->model, x, TFM_OUTPUT_LOGITS);
        if (x) tfm__feed_clear(c, x, s, whole ? ids->shape[1] : 1, whole);
        if (x && !tfm__recording(c)) x = tfm_keep(c, mark, x);
        if (!x) tfm__feed_undo(s);
    }
    tfm__release(c);
    return x;
}

TFM_API tfm_tensor *tfm_session_feed(tfm_ctx *c, tfm_session *s, const tfm_tensor *ids, const tfm_tensor *counts) {
    return tfm__feed(c, s, ids, counts, 0);
}

TFM_API tfm_tensor *tfm_session_feed_all(tfm_ctx *c, tfm_session *s, const tfm_tensor *ids, const tfm_tensor *counts) {
    return tfm__feed(c, s, ids, counts, 1);
}

/* -- the next id --------------------------------------------------------------------------------------------------- */

#define TFM__SAMPLE_STREAM 0x53414D504C450000u /* keeps draws apart from tfm_randn's of the same seed */

/* One choice: its scratch and where it stands. */
typedef struct tfm__chooser {
    int64_t vocab;
    float *scores;                     /* the logits as they are changed */
    int32_t *seen;                     /* how often each id is in the window */
    int64_t *order;                    /* candidates as a heap, then as a list */
    int64_t row;
    uint64_t stream, step;
} tfm__chooser;

/* Scratch for a vocabulary, real memory of the arena. 0: the error is set. */
static int tfm__chooser_new(tfm_ctx *c, tfm__chooser *h, int64_t vocab) {
    memset(h, 0, sizeof *h);
    h->vocab = vocab;
    h->scores = (float *)tfm__arena_meta(c, vocab * (int64_t)sizeof *h->scores);
    h->seen = (int32_t *)tfm__arena_meta(c, vocab * (int64_t)sizeof *h->seen);
    h->order = (int64_t *)tfm__arena_meta(c, vocab * (int64_t)sizeof *h->order);
    return h->scores && h->seen && h->order;
}

/* log of the sum of exp(x), in double; 0 and the error: no finite logit, or one that is NaN or +Inf. */
static int tfm__log_total(tfm_ctx *c, const float *x, int64_t n, double *total) {
    double most = -HUGE_VAL, sum = 0;
    int64_t i;
    for (i = 0; i < n; i++) {
        if (tfm__isnan(x[i]) || (tfm__isinf(x[i]) && x[i] > 0)) {
            tfm__fail(c, TFM_INVALID, "sampling: logit %lld is %s", (long long)i, tfm__isnan(x[i]) ? "NaN" : "+Inf");
            return 0;
        }
        if ((double)x[i] > most) most = (double)x[i];
    }
    if (!(most > -HUGE_VAL)) {
        tfm__fail(c, TFM_INVALID, "sampling: no logit is finite");
        return 0;
    }
    for (i = 0; i < n; i++) sum += exp((double)x[i] - most);
    *total = most + log(sum);
    return 1;
}

static int tfm__ids_in(tfm_ctx *c, const char *what, const int64_t *ids, int64_t count, int64_t vocab) {
    int64_t i;
    if (count < 0 || (count && !ids)) {
        tfm__fail(c, TFM_INVALID, "%s is NULL or its count (%lld) negative", what, (long long)count);
        return 0;
    }
    for (i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocab) {
            tfm__fail(c, TFM_INVALID, "%s[%lld] is %lld, expected 0 to %lld", what, (long long)i, (long long)ids[i],
                      (long long)vocab - 1);
            return 0;
        }
    return 1;
}

static int tfm__sampling_ok(tfm_ctx *c, const tfm_sampling *s, int64_t vocab) {
    const char *bad = NULL;
    if (!(s->temperature >= 0) || tfm__isinf(s->temperature)) bad = "temperature is not a number from 0 on";
    else if (s->top_k < 0) bad = "top_k is negative";
    else if (!(s->top_p >= 0 && s->top_p <= 1)) bad = "top_p is not in [0, 1]";
    else if (!(s->min_p >= 0 && s->min_p <= 1)) bad = "min_p is not in [0, 1]";
    else if (!(s->repetition_penalty >= 0)) bad = "repetition_penalty is negative";
    else if (tfm__isnan(s->frequency_penalty) || tfm__isnan(s->presence_penalty)) bad = "a penalty is NaN";
    else if (s->penalty_window < 0) bad = "penalty_window is negative";
    else if (s->bias_count && !s->bias) bad = "bias is NULL";
    if (bad) tfm__fail(c, TFM_INVALID, "sampling: %s", bad);
    return !bad && tfm__ids_in(c, "sampling: bias_ids", s->bias_ids, s->bias_count, vocab) &&
           tfm__ids_in(c, "sampling: banned", s->banned, s->banned_count, vocab);
}

/* Repetition (once for an id, however often it was), frequency and presence. */
static void tfm__penalize(tfm__chooser *h, const tfm_sampling *s, const int64_t *ids, int64_t count) {
    const float repetition = s->repetition_penalty > 0 ? s->repetition_penalty : 1.0f;
    const int64_t first = s->penalty_window ? tfm__max64(0, count - s->penalty_window) : 0;
    int64_t i;
    if (repetition == 1.0f && s->frequency_penalty == 0 && s->presence_penalty == 0) return;
    for (i = first; i < count; i++)
        if (ids[i] >= 0 && ids[i] < h->vocab) h->seen[ids[i]]++;
    for (i = first; i < count; i++) {
        const int64_t id = ids[i];
        float *x;
        if (id < 0 || id >= h->vocab || !h->seen[id]) continue;
        x = &h->scores[id];
        *x = *x > 0 ? *x / repetition : *x * repetition;
        *x -= s->frequency_penalty * (float)h->seen[id] + s->presence_penalty;
        h->seen[id] = 0;
    }
}

static int tfm__score_less(const void *user, int64_t a, int64_t b) {
    const float *x = (const float *)user;
    return x[a] < x[b] || (x[a] == x[b] && a > b);
}

/* Draws from softmax(scores / temperature) cut by top-k, top-p and min-p. Candidates leave a heap in descending
 * order only as far as the cuts need them. -1: there is none. */
static int64_t tfm__draw(tfm__chooser *h, const tfm_sampling *s) {
    const double heat = (double)s->temperature;
    const int64_t most = s->top_k ? tfm__min64(s->top_k, h->vocab) : h->vocab;
    const int cut = s->top_k || (s->top_p > 0 && s->top_p < 1) || s->min_p > 0;
    double top = -HUGE_VAL, mass = 0, sum = 0, u;
    int64_t count = 0, kept = 0, i;
    uint32_t bits[4];
    for (i = 0; i < h->vocab; i++) {
        if (!((double)h->scores[i] > -HUGE_VAL)) continue;
        h->order[count++] = i;
        if ((double)h->scores[i] > top) top = (double)h->scores[i];
    }
    if (!count) return -1;
    if (cut) {
        for (i = count / 2 - 1; i >= 0; i--) tfm__sift(h->order, i, count, tfm__score_less, h->scores);
        if (!s->top_k)
            for (i = 0; i < count; i++) mass += exp(((double)h->scores[h->order[i]] - top) / heat);
        for (i = count; i > 0 && kept < most; kept++) { /* the best go to the end of the list */
            const int64_t best = h->order[0];
            h->order[0] = h->order[--i];
            tfm__sift(h->order, 0, i, tfm__score_less, h->scores);
            h->order[i] = best;
        }
        if (s->top_k)
            for (i = 0; i < kept; i++) mass += exp(((double)h->scores[h->order[count - 1 - i]] - top) / heat);
        for (i = 0; i < kept; i++) {
            const double weight = exp(((double)h->scores[h->order[count - 1 - i]] - top) / heat);
            if (i && ((s->top_p > 0 && s->top_p < 1 && sum >= (double)s->top_p * mass) || weight < (double)s->min_p))
                break;
            sum += weight;
        }
        kept = i;
    } else {
        kept = count;
        for (i = 0; i < count; i++) sum += exp(((double)h->scores[h->order[i]] - top) / heat);
    }
    tfm__random_bits(s->seed, h->stream ^ TFM__SAMPLE_STREAM, h->step, bits);
    u = ((double)(bits[0] >> 5) * 67108864.0 + (double)(bits[1] >> 6)) / 9007199254740992.0 * sum;
    for (i = 0; i < kept - 1; i++) {
        const int64_t id = h->order[cut ? count - 1 - i : i];
        u -= exp(((double)h->scores[id] - top) / heat);
        if (u < 0) return id;
    }
    return h->order[cut ? count - kept : kept - 1];
}

/* The next id after ids[0, count) by logits (vocab); 0: the error is set. */
static int tfm__pick_id(tfm_ctx *c, tfm__chooser *h, const float *logits, const tfm_sampling *s, const int64_t *ids,
                        int64_t count, int64_t *id, float *log_probability) {
    double total = 0;
    int64_t i;
    if (!tfm__log_total(c, logits, h->vocab, &total)) return 0;
    memcpy(h->scores, logits, (size_t)h->vocab * sizeof *logits);
    for (i = 0; i < s->bias_count; i++) h->scores[s->bias_ids[i]] += s->bias[i];
    for (i = 0; i < s->banned_count; i++) h->scores[s->banned[i]] = -(float)HUGE_VAL;
    tfm__penalize(h, s, ids, count);
    if (s->logits) s->logits(s->user, h->row, h->scores, h->vocab);
    *id = -1;
    if (s->temperature > 0) {
        *id = tfm__draw(h, s);
    } else {
        for (i = 0; i < h->vocab; i++)
            if (*id < 0 ? (double)h->scores[i] > -HUGE_VAL : h->scores[i] > h->scores[*id]) *id = i;
    }
    if (*id < 0) tfm__fail(c, TFM_INVALID, "sampling: no id is left to choose from");
    else if (log_probability) *log_probability = (float)((double)logits[*id] - total);
    return *id >= 0;
}

TFM_API tfm_status tfm_sample(tfm_ctx *c, const tfm_tensor *logits, const tfm_sampling *sampling, const int64_t *ids,
                              int64_t count, uint64_t stream, uint64_t step, int64_t *id, float *log_probability) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm_sampling s;
    tfm__chooser h;
    tfm_marker mark;
    float *row;
    if (id) *id = -1;
    if (busy) return busy;
    memset(&s, 0, sizeof s);
    if (sampling) s = *sampling;
    mark = tfm_mark(c);
    if (!tfm__alive(logits) || logits->dtype != TFM_F32 || logits->ndim < 1
        || tfm_numel(logits) != logits->shape[logits->ndim - 1] || !tfm_numel(logits)) {
        char text[128];
        tfm__fail(c, TFM_INVALID, "tfm_sample: logits is %s, expected f32 (vocab)",
                  tfm__tensor_text(text, (int64_t)sizeof text, logits));
    } else if (!id || count < 0 || (count && !ids) || c->dry) {
        tfm__fail(c, TFM_INVALID, "tfm_sample: id or ids is NULL, count negative, or logits made while measuring");
    } else if (tfm__sampling_ok(c, &s, tfm_numel(logits)) && tfm__chooser_new(c, &h, tfm_numel(logits))) {
        h.row = (int64_t)stream;
        h.stream = stream;
        h.step = step;
        row = (float *)tfm__arena_meta(c, h.vocab * (int64_t)sizeof *row);
        if (row && tfm_read(c, logits, row, h.vocab) == TFM_OK)
            tfm__pick_id(c, &h, row, &s, ids, count, id, log_probability);
    }
    if (!tfm__failed(c)) tfm_rewind(c, mark);
    return tfm__verb_end(c);
}

/* -- generation of a batch ----------------------------------------------------------------------------------------- */

/* One row of a batch. */
typedef struct tfm__stream {
    int64_t *ids;                      /* the prompt, then what is new */
    float *log_probabilities;
    int64_t prompt, count, limit;      /* ids of the prompt, new ids, and how many there may be */
    int64_t text_length;               /* bytes of text so far; the held ones count */
    char *held;                        /* the end of the text that may begin a stop string, and room for a piece */
    int64_t held_length, held_room;
    uint64_t stream;                   /* of its draws */
    int reason;                        /* TFM_STOP_*, -1: goes on */
} tfm__stream;

typedef struct tfm__generator {
    tfm_ctx *c;
    tfm_session *s;
    const tfm_generate_options *o;
    int64_t rows, vocab, longest_stop;
    float *logits;                     /* (rows, vocab): the latest of each row */
    tfm__stream *row;
    tfm__chooser choice;
} tfm__generator;

static int tfm__id_among(int64_t id, const int64_t *list, int64_t count) {
    int64_t i;
    for (i = 0; i < count; i++)
        if (list[i] == id) return 1;
    return 0;
}

/* Feeds ids (rows, length) with counts and copies the logits of the rows that `take` names. Everything else is given
 * back. */
static int tfm__generator_feed(tfm__generator *g, const int64_t *ids, const int64_t *counts, int64_t length,
                               const unsigned char *take) {
    tfm_ctx *c = g->c;
    const tfm_marker mark = tfm_mark(c);
    tfm_tensor *x = tfm_from(c, TFM_I64, tfm_shape2(g->rows, length), ids),
               *n = tfm_from(c, TFM_I64, tfm_shape1(g->rows), counts);
    tfm_tensor *y = tfm_session_feed(c, g->s, x, n);
    int64_t b;
    if (!y) return 0;
    for (b = 0; b < g->rows && !c->dry; b++)
        if (take[b])
            memcpy(g->logits + b * g->vocab, (const float *)y->data + b * g->vocab, (size_t)g->vocab * sizeof(float));
    tfm_rewind(c, mark);
    return 1;
}

/* All prompts, in chunks. */
static int tfm__generator_prompts(tfm__generator *g, const tfm_prompt *prompts, int64_t chunk) {
    const tfm_marker mark = tfm_mark(g->c);
    int64_t longest = 0, begin, b, i, room = 0;
    int64_t *ids = NULL, *counts = NULL;
    unsigned char *take = NULL;
    for (b = 0; b < g->rows; b++) longest = tfm__max64(longest, prompts[b].count);
    if (!chunk || chunk > longest) chunk = longest;
    if (tfm__mul(g->rows, chunk, &room) && tfm__mul(room, (int64_t)sizeof *ids, &room)) {
        ids = (int64_t *)tfm__arena_meta(g->c, room);
        counts = (int64_t *)tfm__arena_meta(g->c, g->rows * (int64_t)sizeof *counts);
        take = (unsigned char *)tfm__arena_meta(g->c, g->rows);
    }
    if (!ids || !counts || !take) return 0;
    for (begin = 0; begin < longest; begin += chunk) {
        memset(ids, 0, (size_t)room);
        for (b = 0; b < g->rows; b++) {
            counts[b] = tfm__max64(0, tfm__min64(prompts[b].count - begin, chunk));
            take[b] = counts[b] && begin + counts[b] == prompts[b].count;
            for (i = 0; i < counts[b]; i++) ids[b * chunk + i] = prompts[b].ids[begin + i];
        }
        if (!tfm__generator_feed(g, ids, counts, chunk, take)) return 0;
    }
    tfm_rewind(g->c, mark);
    return 1;
}

/* What every row needs until the end, so that a step takes no memory. 0: the error is set. */
static int tfm__generator_new(tfm__generator *g, const tfm_prompt *prompts) {
    tfm_ctx *c = g->c;
    int64_t b, k, bytes = 0;
    for (k = 0; k < g->o->stop_string_count; k++)
        g->longest_stop = tfm__max64(g->longest_stop, (int64_t)strlen(g->o->stop_strings[k]));
    g->row = (tfm__stream *)tfm__arena_meta(c, g->rows * (int64_t)sizeof *g->row);
    if (!tfm__mul(g->rows, g->vocab, &bytes) || !tfm__mul(bytes, (int64_t)sizeof(float), &bytes)) bytes = -1;
    g->logits = (float *)tfm__arena_meta(c, bytes);
    if (!g->row || !g->logits || !tfm__chooser_new(c, &g->choice, g->vocab)) return 0;
    for (b = 0; b < g->rows; b++) {
        tfm__stream *r = &g->row[b];
        const int64_t left = g->s->capacity - tfm_session_length(g->s, b) - prompts[b].count;
        r->reason = -1;
        r->prompt = prompts[b].count;
        if (left < 0) {
            tfm__fail(c, TFM_INVALID, "tfm_generate: prompt %lld has %lld ids, the session has room for %lld",
                      (long long)b, (long long)r->prompt, (long long)(left + r->prompt));
            return 0;
        }
        r->limit = left + 1; /* the last id need not be fed */
        if (g->o->max_new) r->limit = tfm__min64(r->limit, g->o->max_new);
        if (c->dry) r->limit = tfm__min64(r->limit, 2); /* all steps are alike */
        r->ids = (int64_t *)tfm__arena_meta(c, (r->prompt + r->limit) * (int64_t)sizeof *r->ids);
        r->log_probabilities = (float *)tfm__arena_meta(c, r->limit * (int64_t)sizeof(float));
        if (!r->ids || !r->log_probabilities) return 0;
        memcpy(r->ids, prompts[b].ids, (size_t)r->prompt * sizeof *r->ids);
        /* Equal prompts get draws of their own; a prompt's first row has those of running alone. */
        for (k = 0; k < b; k++)
            if (prompts[k].count == r->prompt && !memcmp(prompts[k].ids, r->ids, (size_t)r->prompt * sizeof *r->ids))
                r->stream++;
        if (g->o->piece) {
            r->held_room = g->longest_stop + 256;
            r->held = (char *)tfm__alloc(c, r->held_room);
            if (!r->held) return 0;
        }
    }
    return 1;
}

/* Appends a piece to the held text. 0: out of memory. */
static int tfm__stream_piece(tfm_ctx *c, tfm__stream *r, const char *text, int64_t length) {
    if (r->held_length + length > r->held_room) {
        const int64_t room = 2 * (r->held_length + length);
        char *larger = (char *)tfm__alloc(c, room);
        if (!larger) return 0;
        memcpy(larger, r->held, (size_t)r->held_length);
        tfm__free(c, r->held);
        r->held = larger;
        r->held_room = room;
    }
    if (length) memcpy(r->held + r->held_length, text, (size_t)length);
    r->held_length += length;
    r->text_length += length;
    return 1;
}

/* Where in the held text the first stop string begins that is there whole (partial 0), or that its end may be the
 * begin of (1); -1: none. */
static int64_t tfm__stop_at(const tfm_generate_options *o, const tfm__stream *r, int partial) {
    int64_t at, k;
    for (at = 0; at < r->held_length; at++)
        for (k = 0; k < o->stop_string_count; k++) {
            const int64_t length = (int64_t)strlen(o->stop_strings[k]), have = tfm__min64(length, r->held_length - at);
            if ((have < length) == partial && !memcmp(r->held + at, o->stop_strings[k], (size_t)have)) return at;
        }
    return -1;
}

/* Takes a new id into row b: text, stop conditions, callback. 0: the error is set. */
static int tfm__generator_take(tfm__generator *g, int64_t b, int64_t id, float log_probability) {
    const tfm_generate_options *o = g->o;
    tfm__stream *r = &g->row[b];
    const int64_t previous = r->prompt + r->count ? r->ids[r->prompt + r->count - 1] : -1;
    int64_t ready = 0, length = 0, stop;
    r->ids[r->prompt + r->count] = id;
    r->log_probabilities[r->count++] = log_probability;
    if (r->count == r->limit) r->reason = o->max_new && r->count == o->max_new ? TFM_STOP_LENGTH : TFM_STOP_CAPACITY;
    if (tfm__id_among(id, o->stop_ids, o->stop_id_count)) r->reason = TFM_STOP_ID;
    if (o->piece && !g->c->dry) {
        const char *text = r->reason == TFM_STOP_ID ? NULL : o->piece(o->piece_user, previous, id, &length);
        if (!tfm__stream_piece(g->c, r, text, text ? length : 0)) return 0;
        stop = tfm__stop_at(o, r, 0);
        if (stop >= 0) {
            r->reason = TFM_STOP_STRING;
            r->text_length -= r->held_length - stop;
            r->held_length = stop;
        }
        ready = r->reason < 0 ? tfm__stop_at(o, r, 1) : -1;
        if (ready < 0) ready = r->held_length;
    }
    if (o->on_token && !g->c->dry && o->on_token(o->user, b, id, log_probability, o->piece ? r->held : "", ready)
        && r->reason < 0)
        r->reason = TFM_STOP_CALLBACK;
    if (ready) {
        r->held_length -= ready;
        memmove(r->held, r->held + ready, (size_t)r->held_length);
    }
    return 1;
}

/* Steps until every row has ended. 0: the error is set. */
static int tfm__generator_run(tfm__generator *g) {
    int64_t *ids = (int64_t *)tfm__arena_meta(g->c, g->rows * (int64_t)sizeof *ids);
    int64_t *counts = (int64_t *)tfm__arena_meta(g->c, g->rows * (int64_t)sizeof *counts), b, active, step;
    unsigned char *take = (unsigned char *)tfm__arena_meta(g->c, g->rows);
    if (!ids || !counts || !take) return 0;
    for (step = 0;; step++) {
        active = 0;
        for (b = 0; b < g->rows; b++) {
            tfm__stream *r = &g->row[b];
            int64_t id = 0;
            float log_probability = 0;
            take[b] = 0;
            if (r->reason >= 0) continue;
            g->choice.row = b;
            g->choice.stream = r->stream;
            g->choice.step = (uint64_t)r->count;
            if (!g->c->dry
                && !tfm__pick_id(g->c, &g->choice, g->logits + b * g->vocab, &g->o->sampling, r->ids,
                                 r->prompt + r->count, &id, &log_probability))
                return 0;
            if (!tfm__generator_take(g, b, id, log_probability)) return 0;
            ids[b] = id;
            take[b] = r->reason < 0;
            active += take[b];
        }
        if (!active) return 1;
        for (b = 0; b < g->rows; b++) {
            counts[b] = take[b];
            if (!take[b]) ids[b] = 0;
        }
        if (!tfm__generator_feed(g, ids, counts, 1, take)) return 0;
        if (tfm__progress(g->c, "generating", step + 1, g->row[0].limit)) {
            tfm__fail(g->c, TFM_CANCELLED, "tfm_generate: cancelled");
            return 0;
        }
    }
}

/* The text of a row once more, in one piece: it is not kept while ids come, so that a step takes no memory. */
static char *tfm__generator_text(tfm__generator *g, const tfm__stream *r) {
    const tfm_generate_options *o = g->o;
    char *text = (char *)tfm__arena_meta(g->c, r->text_length + 1);
    int64_t at = 0, i, length = 0;
    for (i = 0; text && i < r->count && at < r->text_length; i++) {
        const int64_t *id = &r->ids[r->prompt + i];
        const char *piece = o->piece(o->piece_user, r->prompt + i ? id[-1] : -1, *id, &length);
        length = tfm__min64(length, r->text_length - at);
        if (length > 0) memcpy(text + at, piece, (size_t)length);
        at += tfm__max64(length, 0);
    }
    return text;
}

static int tfm__prompts_ok(tfm_ctx *c, const char *who, const tfm_session *s, const tfm_prompt *prompts, int64_t count,
                           int64_t rows, const void *out) {
    int64_t b;
    if (!s || !prompts || !out) {
        tfm__fail(c, TFM_INVALID, "%s: session, prompts or out is NULL", who);
        return 0;
    }
    if (count < 1 || rows != s->batch) {
        tfm__fail(c, TFM_INVALID, "%s: %lld prompts need %lld rows, the session has %lld", who, (long long)count,
                  (long long)rows, (long long)s->batch);
        return 0;
    }
    for (b = 0; b < count; b++)
        if (prompts[b].count < 1 || !prompts[b].ids) {
            tfm__fail(c, TFM_INVALID, "%s: prompt %lld has no ids (begin with the model's start id)", who,
                      (long long)b);
            return 0;
        }
    return 1;
}

static int tfm__generate_options_ok(tfm_ctx *c, const tfm_generate_options *o, int64_t vocab) {
    int64_t k;
    const char *bad = NULL;
    if (o->max_new < 0 || o->prompt_chunk < 0) bad = "max_new or prompt_chunk is negative";
    else if (o->stop_string_count < 0 || (o->stop_string_count && (!o->stop_strings || !o->piece)))
        bad = "stop strings need stop_strings and piece";
    for (k = 0; !bad && k < o->stop_string_count; k++)
        if (!o->stop_strings[k] || !o->stop_strings[k][0]) bad = "a stop string is NULL or empty";
    if (bad) tfm__fail(c, TFM_INVALID, "tfm_generate: %s", bad);
    return !bad && tfm__ids_in(c, "tfm_generate: stop_ids", o->stop_ids, o->stop_id_count, INT64_MAX)
           && tfm__sampling_ok(c, &o->sampling, vocab);
}

TFM_API tfm_status tfm_generate(tfm_ctx *c, tfm_session *s, const tfm_prompt *prompts, int64_t count,
                                const tfm_generate_options *options, tfm_sequence *out) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm_generate_options none;
    tfm__generator g;
    int64_t b, i;
    if (busy) return busy;
    memset(&none, 0, sizeof none);
    memset(&g, 0, sizeof g);
    g.c = c;
    g.s = s;
    g.o = options ? options : &none;
    g.rows = count;
    g.vocab = s ? tfm__transformer_outputs(&s->model) : 0;
    if (!tfm__prompts_ok(c, "tfm_generate", s, prompts, count, count, out)
        || !tfm__generate_options_ok(c, g.o, g.vocab))
        return tfm__verb_end(c);
    memset(out, 0, (size_t)count * sizeof *out);
    if (tfm__generator_new(&g, prompts) && tfm__generator_prompts(&g, prompts, g.o->prompt_chunk))
        tfm__generator_run(&g);
    for (b = 0; g.row && b < count; b++) {
        const tfm__stream *r = &g.row[b];
        tfm__free(c, r->held);
        if (!r->log_probabilities) continue;
        out[b].reason = r->reason < 0 ? TFM_STOP_CALLBACK : r->reason;
        out[b].count = r->count;
        out[b].ids = r->ids + r->prompt;
        out[b].log_probabilities = r->log_probabilities;
        for (i = 0; i < r->count; i++) out[b].score += (double)r->log_probabilities[i];
        if (g.o->piece && !c->dry && !tfm__failed(c)) {
            out[b].text = tfm__generator_text(&g, r);
            out[b].text_length = out[b].text ? r->text_length : 0;
        }
    }
    return tfm__verb_end(c);
}

/* -- beam search --------------------------------------------------------------------------------------------------- */

/* A sequence in the making, or a finished one. */
typedef struct tfm__beam {
    double sum, score;                 /* of log-probabilities; divided by the length penalty (finished ones) */
    int64_t count;
    int64_t *ids;
    float *log_probabilities;
    int reason;
    int alive;                         /* 0: the place is empty */
} tfm__beam;

/* A way to go on. */
typedef struct tfm__step { double sum; float log_probability; int64_t beam, id; } tfm__step;

typedef struct tfm__search {
    tfm__generator g;                  /* feeding; its rows are prompts x beams */
    const tfm_beam_options *o;
    int64_t prompts, beams, best, limit;
    tfm__beam *live, *next;            /* (prompts, beams) */
    tfm__beam *finished;               /* (prompts, best), best score first */
    tfm__step *steps;                  /* the best ways to go on, of one prompt at a time */
    int64_t step_count, step_room;
    int64_t *from;                     /* (rows) which row each next row goes on from */
    unsigned char *ended;              /* (prompts) */
} tfm__search;

static double tfm__length_penalty(const tfm_beam_options *o, int64_t n) {
    if (o->length_penalty == TFM_LENGTH_GNMT) return pow((5.0 + (double)n) / 6.0, (double)o->alpha);
    return o->length_penalty == TFM_LENGTH_POWER ? pow((double)n, (double)o->alpha) : 1.0;
}

static void tfm__beam_copy(tfm__beam *to, const tfm__beam *from) {
    int64_t *ids = to->ids;
    float *log_probabilities = to->log_probabilities;
    memcpy(ids, from->ids, (size_t)from->count * sizeof *ids);
    memcpy(log_probabilities, from->log_probabilities, (size_t)from->count * sizeof *log_probabilities);
    *to = *from;
    to->ids = ids;
    to->log_probabilities = log_probabilities;
}

/* from, and one id more. */
static void tfm__beam_extend(tfm__beam *to, const tfm__beam *from, const tfm__step *step) {
    tfm__beam_copy(to, from);
    to->ids[to->count] = step->id;
    to->log_probabilities[to->count++] = step->log_probability;
    to->sum = step->sum;
    to->alive = 1;
}

/* Puts a finished sequence where its score belongs; the worst of `best` falls out. Of equals the earlier stays in
 * front. */
static void tfm__beam_finish(tfm__search *q, int64_t prompt, const tfm__beam *from, const tfm__step *step, int reason) {
    tfm__beam *list = q->finished + prompt * q->best, kept;
    const int64_t n = from->count + (step != NULL);
    const double score = (step ? step->sum : from->sum) / tfm__length_penalty(q->o, n);
    int64_t at = q->best, i;
    while (at && (!list[at - 1].alive || list[at - 1].score < score)) at--;
    if (at == q->best) return;
    kept = list[q->best - 1];
    for (i = q->best - 1; i > at; i--) list[i] = list[i - 1];
    list[at] = kept;
    if (step) tfm__beam_extend(&list[at], from, step);
    else tfm__beam_copy(&list[at], from);
    list[at].alive = 1;
    list[at].score = score;
    list[at].reason = reason;
}

/* Keeps the best step_room ways: descending, of equals the lower beam and id first (they come in that order). */
static void tfm__steps_offer(tfm__search *q, const tfm__step *step) {
    int64_t at = q->step_count;
    if (at == q->step_room && !(step->sum > q->steps[at - 1].sum)) return;
    if (at < q->step_room) q->step_count++;
    else at--;
    for (; at && q->steps[at - 1].sum < step->sum; at--) q->steps[at] = q->steps[at - 1];
    q->steps[at] = *step;
}

/* All ways to go on from the live beams of a prompt. */
static int tfm__steps_collect(tfm__search *q, int64_t prompt) {
    const int64_t vocab = q->g.vocab;
    int64_t b, i;
    q->step_count = 0;
    for (b = 0; b < q->beams; b++) {
        const int64_t row = prompt * q->beams + b;
        const float *logits = q->g.logits + row * vocab;
        double total = 0;
        if (!q->live[row].alive) continue;
        if (!tfm__log_total(q->g.c, logits, vocab, &total)) return 0;
        memcpy(q->g.choice.scores, logits, (size_t)vocab * sizeof *logits);
        for (i = 0; i < q->o->banned_count; i++) q->g.choice.scores[q->o->banned[i]] = -(float)HUGE_VAL;
        for (i = 0; i < vocab; i++) {
            tfm__step step;
            if (!((double)q->g.choice.scores[i] > -HUGE_VAL)) continue;
            step.log_probability = (float)((double)logits[i] - total);
            step.sum = q->live[row].sum + ((double)logits[i] - total);
            step.beam = b;
            step.id = i;
            tfm__steps_offer(q, &step);
        }
    }
    return 1;
}

/* 1: no live beam can still get among the best: each further id only lowers the sum, and the penalty that helps it
 * most is known. */
static int tfm__search_over(const tfm__search *q, int64_t prompt, int64_t length) {
    const tfm__beam *worst = &q->finished[prompt * q->best + q->best - 1];
    const double first = tfm__length_penalty(q->o, length + 1), last = tfm__length_penalty(q->o, q->limit),
                 most = first > last ? first : last;
    int64_t b, alive = 0;
    for (b = 0; b < q->beams; b++) {
        const tfm__beam *beam = &q->live[prompt * q->beams + b];
        if (!beam->alive) continue;
        alive++;
        if (!worst->alive || beam->sum / most > worst->score) return 0;
    }
    return !alive || worst->alive;
}

/* One step of one prompt: finished ways leave, the best others become the next beams. */
static int tfm__search_step(tfm__search *q, int64_t prompt, int64_t length) {
    const int64_t base = prompt * q->beams;
    int64_t i, used = 0;
    for (i = 0; i < q->beams; i++) {
        q->next[base + i].alive = 0;
        q->from[base + i] = base + i;
    }
    if (!tfm__steps_collect(q, prompt)) return 0;
    if (!q->step_count) {
        tfm__fail(q->g.c, TFM_INVALID, "tfm_beam_search: no id is left to choose from");
        return 0;
    }
    for (i = 0; i < q->step_count && used < q->beams; i++) {
        const tfm__step *step = &q->steps[i];
        const tfm__beam *from = &q->live[base + step->beam];
        if (tfm__id_among(step->id, q->o->stop_ids, q->o->stop_id_count)) {
            if (i < q->beams) tfm__beam_finish(q, prompt, from, step, TFM_STOP_ID);
        } else if (length + 1 == q->limit) {
            if (i < q->beams)
                tfm__beam_finish(q, prompt, from, step,
                                 q->o->max_new && q->limit == q->o->max_new ? TFM_STOP_LENGTH : TFM_STOP_CAPACITY);
        } else {
            tfm__beam_extend(&q->next[base + used], from, step);
            q->from[base + used++] = base + step->beam;
        }
    }
    return 1;
}

static int tfm__beams_new(tfm_ctx *c, tfm__beam **list, int64_t count, int64_t length) {
    int64_t i, ids = 0, bytes = 0;
    char *memory = NULL;
    *list = (tfm__beam *)tfm__arena_meta(c, count * (int64_t)sizeof **list);
    if (!*list) return 0;
    if (tfm__mul(count, length, &ids) && tfm__mul(ids, (int64_t)(sizeof(int64_t) + sizeof(float)), &bytes))
        memory = (char *)tfm__arena_meta(c, bytes);
    else tfm__fail(c, TFM_OOM, "tfm_beam_search: %lld beams of %lld ids", (long long)count, (long long)length);
    for (i = 0; memory && i < count; i++) {
        (*list)[i].ids = (int64_t *)(void *)memory + i * length;
        (*list)[i].log_probabilities = (float *)(void *)((int64_t *)(void *)memory + ids) + i * length;
    }
    return memory != NULL;
}

/* Feeds the prompts and makes room for everything until the end. */
static int tfm__search_new(tfm__search *q, const tfm_prompt *prompts) {
    tfm_ctx *c = q->g.c;
    tfm_prompt *all;
    int64_t row, rows = q->g.rows, longest = 0, bytes = 0;
    for (row = 0; row < rows; row++)
        longest = tfm__max64(longest, prompts[row / q->beams].count + tfm_session_length(q->g.s, row));
    q->limit = q->g.s->capacity - longest + 1;
    if (q->limit < 1) {
        tfm__fail(c, TFM_INVALID,
                  "tfm_beam_search: the session has room for %lld positions, the longest prompt ends at %lld",
                  (long long)q->g.s->capacity, (long long)longest);
        return 0;
    }
    if (q->o->max_new) q->limit = tfm__min64(q->limit, q->o->max_new);
    if (c->dry) q->limit = tfm__min64(q->limit, 2);
    if (!tfm__mul(q->beams, q->o->stop_id_count + 1, &q->step_room) || !tfm__mul(rows, q->g.vocab, &bytes) ||
        !tfm__mul(bytes, (int64_t)sizeof(float), &bytes) || q->step_room > INT64_MAX / 64) {
        tfm__fail(c, TFM_INVALID, "tfm_beam_search: too many beams or stop ids");
        return 0;
    }
    q->g.logits = (float *)tfm__arena_meta(c, bytes);
    q->steps = (tfm__step *)tfm__arena_meta(c, q->step_room * (int64_t)sizeof *q->steps);
    q->from = (int64_t *)tfm__arena_meta(c, rows * (int64_t)sizeof *q->from);
    q->ended = (unsigned char *)tfm__arena_meta(c, q->prompts);
    all = (tfm_prompt *)tfm__arena_meta(c, rows * (int64_t)sizeof *all);
    if (!q->g.logits || !q->steps || !q->from || !q->ended || !all || !tfm__chooser_new(c, &q->g.choice, q->g.vocab))
        return 0;
    if (!tfm__beams_new(c, &q->live, rows, q->limit) || !tfm__beams_new(c, &q->next, rows, q->limit) ||
        !tfm__beams_new(c, &q->finished, q->prompts * q->best, q->limit))
        return 0;
    for (row = 0; row < rows; row++) {
        all[row] = prompts[row / q->beams];
        q->live[row].alive = row % q->beams == 0; /* all rows of a prompt are equal yet: one speaks for them */
    }
    return tfm__generator_prompts(&q->g, all, 0);
}

static int tfm__search_run(tfm__search *q) {
    tfm_ctx *c = q->g.c;
    const int64_t rows = q->g.rows;
    int64_t *ids = (int64_t *)tfm__arena_meta(c, rows * (int64_t)sizeof *ids),
            *counts = (int64_t *)tfm__arena_meta(c, rows * (int64_t)sizeof *counts);
    unsigned char *take = (unsigned char *)tfm__arena_meta(c, rows);
    int64_t length, prompt, row, active, moved;
    if (!ids || !counts || !take) return 0;
    for (length = 0; length < q->limit; length++) {
        tfm__beam *swap = q->live;
        for (prompt = 0; prompt < q->prompts && !c->dry; prompt++)
            if (!q->ended[prompt] && !tfm__search_step(q, prompt, length)) return 0;
        q->live = q->next;
        q->next = swap;
        for (active = moved = row = 0; row < rows; row++) {
            prompt = row / q->beams;
            if (row % q->beams == 0 && !q->ended[prompt] && !c->dry)
                q->ended[prompt] = (unsigned char)tfm__search_over(q, prompt, length + 1);
            take[row] = !q->ended[prompt] && (q->live[row].alive || c->dry);
            counts[row] = take[row];
            ids[row] = take[row] && !c->dry ? q->live[row].ids[length] : 0;
            active += take[row];
            if (!take[row]) q->from[row] = row;
            moved += q->from[row] != row;
        }
        if (!active) return 1;
        /* the keys and values of the source are the same in all rows of a prompt */
        if (moved && tfm_cache_reorder(c, q->g.s->self, q->from, rows) != TFM_OK) return 0;
        if (!tfm__generator_feed(&q->g, ids, counts, 1, take)) return 0;
        if (tfm__progress(c, "beam search", length + 1, q->limit)) {
            tfm__fail(c, TFM_CANCELLED, "tfm_beam_search: cancelled");
            return 0;
        }
    }
    return 1;
}

TFM_API tfm_status tfm_beam_search(tfm_ctx *c, tfm_session *s, const tfm_prompt *prompts, int64_t count,
                                   const tfm_beam_options *options, tfm_sequence *out) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm_beam_options o;
    tfm__search q;
    int64_t i, rows = 0;
    if (busy) return busy;
    memset(&o, 0, sizeof o);
    memset(&q, 0, sizeof q);
    if (options) o = *options;
    q.o = &o;
    q.prompts = count;
    q.beams = o.beams ? o.beams : 4;
    q.best = o.n_best ? o.n_best : 1;
    q.g.c = c;
    q.g.s = s;
    q.g.vocab = s ? tfm__transformer_outputs(&s->model) : 0;
    if (q.beams < 1 || q.best < 1 || q.best > q.beams || o.max_new < 0 || o.length_penalty < TFM_LENGTH_NONE
        || o.length_penalty > TFM_LENGTH_POWER || tfm__isnan(o.alpha) || tfm__isinf(o.alpha)
        || !tfm__mul(tfm__max64(count, 0), q.beams, &rows)) {
        tfm__fail(c, TFM_INVALID,
                  "tfm_beam_search: beams %lld, n_best %lld (at most beams), max_new %lld, length_penalty %d or alpha "
                  "is wrong",
                  (long long)q.beams, (long long)q.best, (long long)o.max_new, o.length_penalty);
        return tfm__verb_end(c);
    }
    q.g.rows = rows;
    if (!tfm__prompts_ok(c, "tfm_beam_search", s, prompts, count, rows, out)
        || !tfm__ids_in(c, "tfm_beam_search: stop_ids", o.stop_ids, o.stop_id_count, INT64_MAX)
        || !tfm__ids_in(c, "tfm_beam_search: banned", o.banned, o.banned_count, q.g.vocab))
        return tfm__verb_end(c);
    memset(out, 0, (size_t)(count * q.best) * sizeof *out);
    if (tfm__search_new(&q, prompts) && tfm__search_run(&q)) {
        for (i = 0; i < count * q.best; i++) {
            const tfm__beam *beam = &q.finished[i];
            out[i].reason = beam->reason;
            out[i].score = beam->alive ? beam->score : -HUGE_VAL;
            out[i].count = beam->count;
            out[i].ids = beam->ids;
            out[i].log_probabilities = beam->log_probabilities;
        }
    }
    return tfm__verb_end(c);
}
#endif /* TFM_NO_GENERATION */
#endif /* chapter 12 */

/* ==================================================================================================================
 *  13  FILES
 *
 *  safetensors: u64 length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data. Every
 *  parser works on memory and believes nothing: each length is compared with what is left, each product is checked,
 *  and memory is taken in proportion to the file. Where a rule is not obvious it is that of the format's reference
 *  reader.
 * ================================================================================================================ */
#if defined(TRANSFORMER_IMPLEMENTATION) && !defined(TFM__PASS) && !defined(TFM__IMPLEMENTED) && !defined(TFM_NO_FILES)

#define TFM__HEADER_MOST 100000000 /* bytes of a header; the reference reader's limit */
#define TFM__JSON_DEPTH 64         /* of values that the format does not know; they are read over */
#define TFM__STARS_MOST 8          /* '*' in one rule */
#define TFM__CHUNK 16384           /* bytes that a writer gathers before they go out; on the stack */

/* What the format can name, in the order in which the reference writer sorts (ascending; it writes the greatest
 * first). */
static const struct tfm__file_dtype {
    const char *name;
    int bits, dtype; /* dtype -1: well formed, but not offered */
} tfm__file_dtypes[] = {
    {"BOOL", 8, TFM_BOOL},  {"F4", 4, -1},         {"F6_E2M3", 6, -1}, {"F6_E3M2", 6, -1},  {"U8", 8, TFM_U8},
    {"I8", 8, TFM_I8},      {"F8_E5M2", 8, -1},    {"F8_E4M3", 8, -1}, {"F8_E8M0", 8, -1},  {"F8_E4M3FNUZ", 8, -1},
    {"F8_E5M2FNUZ", 8, -1}, {"I16", 16, -1},       {"U16", 16, -1},    {"F16", 16, TFM_F16}, {"BF16", 16, TFM_BF16},
    {"I32", 32, TFM_I32},   {"U32", 32, -1},       {"F32", 32, TFM_F32}, {"C64", 64, -1},   {"F64", 64, TFM_F64},
    {"I64", 64, TFM_I64},   {"U64", 64, -1},
};

typedef struct tfm__entry {
    const struct tfm_file *file;   /* whose memory data is: the file itself, or a shard */
    const char *name;
    const unsigned char *data;
    int64_t begin, end;            /* data_offsets */
    int64_t elements;
    int64_t shape[TFM_MAX_DIMS];   /* the first six sizes */
    int64_t ndim;
    const struct tfm__file_dtype *type;
} tfm__entry;

/* The bytes of a file, wherever they are. */
typedef struct tfm__bytes {
    const unsigned char *data;
    int64_t size;
    void *owned;                   /* NULL: memory of the caller */
    int mapped;                    /* 1: `owned` is a mapping, 0: from the allocator */
} tfm__bytes;

struct tfm_file {
    tfm_allocator allocator;
    int64_t holders;               /* who must close it: the caller, and stores that use its memory */
    tfm__bytes bytes;
    char *text;                    /* every name and metadata string of the header, each with a NUL */
    tfm__entry *entries;           /* in the order of their data */
    int64_t count;
    int64_t *by_name;              /* entry numbers in the order of their names */
    int64_t *metadata;             /* where keys begin in text, in the order of the keys; the value follows its key */
    int64_t metadata_count;
    struct tfm_file **shards;      /* of an index: the files that hold the data */
    int64_t shard_count;
};

/* -- text ---------------------------------------------------------------------------------------------------------- */

/* 1: n bytes of well-formed UTF-8 (no surrogates, nothing overlong, nothing past U+10FFFF). */
static int tfm__utf8_valid(const unsigned char *s, int64_t n) {
    int64_t i = 0;
    while (i < n) {
        const unsigned lead = s[i++];
        unsigned low = 0x80, high = 0xBF;
        int more;
        if (lead < 0x80) continue;
        if (lead < 0xC2 || lead > 0xF4) return 0;
        more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
        if (lead == 0xE0) low = 0xA0;
        if (lead == 0xED) high = 0x9F;
        if (lead == 0xF0) low = 0x90;
        if (lead == 0xF4) high = 0x8F;
        for (; more; more--) {
            if (i >= n || s[i] < low || s[i] > high) return 0;
            i++;
            low = 0x80;
            high = 0xBF;
        }
    }
    return 1;
}

/* A strict JSON reader without a tree: the caller asks for what must come next. The first mismatch puts the reason
 * into `why`, and from then on everything fails. The text is valid UTF-8 already. */
typedef struct tfm__json {
    const unsigned char *text;
    int64_t at, size;
    const char *why;
} tfm__json;

static int tfm__json_fail(tfm__json *j, const char *why) {
    if (!j->why) j->why = why;
    return 0;
}

/* The byte after white space, -1 at the end. */
static int tfm__json_peek(tfm__json *j) {
    while (j->at < j->size) {
        const int byte = j->text[j->at];
        if (byte != ' ' && byte != '\t' && byte != '\n' && byte != '\r') return byte;
        j->at++;
    }
    return -1;
}

static int tfm__json_take(tfm__json *j, int byte, const char *why) {
    if (j->why || tfm__json_peek(j) != byte) return tfm__json_fail(j, why);
    j->at++;
    return 1;
}

/* Loops over an array or object: 1: one more element follows; 0: it has ended, or the text is bad (`why`). *seen
 * starts as 0. */
static int tfm__json_next(tfm__json *j, int closing, int64_t *seen) {
    if (j->why) return 0;
    if (tfm__json_peek(j) == closing) {
        j->at++;
        return 0;
    }
    if (*seen && !tfm__json_take(j, ',', "a comma or the end of a list is missing")) return 0;
    if (*seen && tfm__json_peek(j) == closing) return tfm__json_fail(j, "a comma stands before the end of a list");
    ++*seen;
    return 1;
}

static int tfm__json_hex(tfm__json *j, uint32_t *unit) {
    int i;
    *unit = 0;
    for (i = 0; i < 4; i++, j->at++) {
        const uint32_t byte = j->at < j->size ? j->text[j->at] : 0u;
        uint32_t digit;
        if (byte >= '0' && byte <= '9') digit = byte - '0';
        else if (byte >= 'a' && byte <= 'f') digit = byte - 'a' + 10;
        else if (byte >= 'A' && byte <= 'F') digit = byte - 'A' + 10;
        else return tfm__json_fail(j, "\\u needs four hexadecimal digits");
        *unit = *unit << 4 | digit;
    }
    return 1;
}

/* What follows a backslash, as 1 to 4 bytes of UTF-8; 0: bad. */
static int tfm__json_escape(tfm__json *j, char out[4]) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const int byte = j->at < j->size ? j->text[j->at++] : 0;
    const char *found = byte ? strchr(from, byte) : NULL;
    uint32_t code, low;
    if (found) {
        out[0] = to[found - from];
        return 1;
    }
    if (byte != 'u') return tfm__json_fail(j, "an unknown escape in a string");
    if (!tfm__json_hex(j, &code)) return 0;
    if (code >= 0xD800 && code <= 0xDFFF) {
        if (code > 0xDBFF || j->at + 2 > j->size || j->text[j->at] != '\\' || j->text[j->at + 1] != 'u')
            return tfm__json_fail(j, "half a surrogate pair");
        j->at += 2;
        if (!tfm__json_hex(j, &low)) return 0;
        if (low < 0xDC00 || low > 0xDFFF) return tfm__json_fail(j, "half a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (!code) return tfm__json_fail(j, "a NUL in a string");
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3F));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xE0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3F));
        out[2] = (char)(0x80 | (code & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3F));
    out[2] = (char)(0x80 | (code >> 6 & 0x3F));
    out[3] = (char)(0x80 | (code & 0x3F));
    return 4;
}

/* A string, unescaped into out (NULL: read over) with a NUL; *length without it. The result is never longer than
 * what was read: a buffer of the text's size holds all strings of a text, NULs included. */
static int tfm__json_string(tfm__json *j, char *out, int64_t *length) {
    int64_t n = 0;
    if (!tfm__json_take(j, '"', "a string is missing")) return 0;
    for (;;) {
        char bytes[4];
        int i, count = 1;
        if (j->at >= j->size) return tfm__json_fail(j, "a string does not end");
        bytes[0] = (char)j->text[j->at++];
        if (bytes[0] == '"') break;
        if ((unsigned char)bytes[0] < 0x20) return tfm__json_fail(j, "a control character in a string");
        if (bytes[0] == '\\') count = tfm__json_escape(j, bytes);
        if (!count) return 0;
        for (i = 0; i < count; i++, n++)
            if (out) out[n] = bytes[i];
    }
    if (out) out[n] = 0;
    if (length) *length = n;
    return 1;
}

static int tfm__json_digit(const tfm__json *j) {
    return j->at < j->size && j->text[j->at] >= '0' && j->text[j->at] <= '9';
}

static int tfm__json_digits(tfm__json *j) {
    if (!tfm__json_digit(j)) return tfm__json_fail(j, "a digit is missing");
    while (tfm__json_digit(j)) j->at++;
    return 1;
}

/* A whole number that is not negative. */
static int tfm__json_natural(tfm__json *j, int64_t *value) {
    tfm__json_peek(j);
    if (j->why || !tfm__json_digit(j)) return tfm__json_fail(j, "a whole number that is not negative is missing");
    *value = 0;
    if (j->text[j->at] == '0') {
        j->at++;
        if (tfm__json_digit(j)) return tfm__json_fail(j, "a number begins with 0");
    }
    while (tfm__json_digit(j))
        if (!tfm__mul(*value, 10, value) || !tfm__add(*value, j->text[j->at++] - '0', value))
            return tfm__json_fail(j, "overflow: a number does not fit in 63 bits");
    if (j->at < j->size && (j->text[j->at] == '.' || j->text[j->at] == 'e' || j->text[j->at] == 'E'))
        return tfm__json_fail(j, "a number is not whole");
    return 1;
}

static int tfm__json_number(tfm__json *j) {
    if (j->text[j->at] == '-') j->at++;
    if (j->at < j->size && j->text[j->at] == '0') {
        j->at++;
    } else if (!tfm__json_digits(j)) {
        return 0;
    }
    if (j->at < j->size && j->text[j->at] == '.') {
        j->at++;
        if (!tfm__json_digits(j)) return 0;
    }
    if (j->at < j->size && (j->text[j->at] == 'e' || j->text[j->at] == 'E')) {
        j->at++;
        if (j->at < j->size && (j->text[j->at] == '+' || j->text[j->at] == '-')) j->at++;
        if (!tfm__json_digits(j)) return 0;
    }
    return 1;
}

/* Reads over any value. */
static int tfm__json_skip(tfm__json *j, int depth) {
    static const char *const words[3] = {"true", "false", "null"};
    const int byte = tfm__json_peek(j);
    int64_t seen = 0;
    int i;
    if (j->why) return 0;
    if (depth <= 0) return tfm__json_fail(j, "values stand too deep in each other");
    if (byte == '"') return tfm__json_string(j, NULL, NULL);
    if (byte == '-' || (byte >= '0' && byte <= '9')) return tfm__json_number(j);
    if (byte == '[' || byte == '{') {
        const int closing = byte == '[' ? ']' : '}';
        j->at++;
        while (tfm__json_next(j, closing, &seen)) {
            if (byte == '{' && !(tfm__json_string(j, NULL, NULL) && tfm__json_take(j, ':', "a colon is missing")))
                return 0;
            if (!tfm__json_skip(j, depth - 1)) return 0;
        }
        return j->why == NULL;
    }
    for (i = 0; i < 3; i++) {
        const int64_t n = (int64_t)strlen(words[i]);
        if (j->size - j->at >= n && !memcmp(j->text + j->at, words[i], (size_t)n)) {
            j->at += n;
            return 1;
        }
    }
    return tfm__json_fail(j, "a value is missing");
}

/* -- safetensors, read --------------------------------------------------------------------------------------------- */

/* "shape": [2, 3] */
static int tfm__entry_shape(tfm__json *j, tfm__entry *e) {
    int64_t size = 0;
    e->elements = 1;
    if (!tfm__json_take(j, '[', "shape is not a list")) return 0;
    while (tfm__json_next(j, ']', &e->ndim)) {
        if (!tfm__json_natural(j, &size)) return 0;
        if (e->ndim <= TFM_MAX_DIMS) e->shape[e->ndim - 1] = size;
        if (!tfm__mul(e->elements, size, &e->elements)) return tfm__json_fail(j, "overflow: the elements of a shape");
    }
    return j->why == NULL;
}

/* {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}; `spare`: room for the strings. */
static int tfm__entry_read(tfm__json *j, char *spare, tfm__entry *e) {
    int64_t seen = 0, two = 0;
    int have = 0, field, i;
    if (!tfm__json_take(j, '{', "a tensor's description is not an object")) return 0;
    while (tfm__json_next(j, '}', &seen)) {
        if (!tfm__json_string(j, spare, NULL) || !tfm__json_take(j, ':', "a colon is missing")) return 0;
        field = !strcmp(spare, "dtype") ? 1 : !strcmp(spare, "shape") ? 2 : !strcmp(spare, "data_offsets") ? 4 : 0;
        if (have & field) return tfm__json_fail(j, "a field stands twice in a tensor's description");
        have |= field;
        if (field == 1) {
            if (!tfm__json_string(j, spare, NULL)) return 0;
            for (i = 0; i < TFM__COUNT(tfm__file_dtypes); i++)
                if (!strcmp(spare, tfm__file_dtypes[i].name)) e->type = &tfm__file_dtypes[i];
            if (!e->type) return tfm__json_fail(j, "a dtype that the format does not have");
        } else if (field == 2) {
            if (!tfm__entry_shape(j, e)) return 0;
        } else if (field == 4) {
            if (!tfm__json_take(j, '[', "data_offsets is not a list")) return 0;
            while (tfm__json_next(j, ']', &two)) {
                if (two > 2) return tfm__json_fail(j, "data_offsets has more than two numbers");
                if (!tfm__json_natural(j, two == 1 ? &e->begin : &e->end)) return 0;
            }
            if (two != 2) return tfm__json_fail(j, "data_offsets has not two numbers");
        } else if (!tfm__json_skip(j, TFM__JSON_DEPTH)) {
            return 0;
        }
    }
    if (!j->why && have != 7) return tfm__json_fail(j, "dtype, shape or data_offsets is missing");
    return j->why == NULL;
}

/* "__metadata__": {"key": "value"}: keys and values one after the other into text + *used. */
static int tfm__metadata_read(tfm__json *j, char *text, int64_t *used, int64_t *count) {
    int64_t length = 0;
    if (!tfm__json_take(j, '{', "__metadata__ is not an object")) return 0;
    while (tfm__json_next(j, '}', count)) {
        if (!tfm__json_string(j, text + *used, &length)) return 0;
        *used += length + 1;
        if (!tfm__json_take(j, ':', "a colon is missing") || !tfm__json_string(j, text + *used, &length)) return 0;
        *used += length + 1;
    }
    return j->why == NULL;
}

static int tfm__entry_name_less(const void *user, int64_t a, int64_t b) {
    const tfm__entry *e = (const tfm__entry *)user;
    return strcmp(e[a].name, e[b].name) < 0;
}

/* By data: begin, then end, then name. */
static int tfm__entry_data_less(const void *user, int64_t a, int64_t b) {
    const tfm__entry *x = (const tfm__entry *)user + a, *y = (const tfm__entry *)user + b;
    if (x->begin != y->begin) return x->begin < y->begin;
    if (x->end != y->end) return x->end < y->end;
    return strcmp(x->name, y->name) < 0;
}

static int tfm__metadata_less(const void *user, int64_t a, int64_t b) {
    return strcmp((const char *)user + a, (const char *)user + b) < 0;
}

/* Memory of a file; count x size bytes, at least 1. */
static void *tfm__file_memory(tfm_ctx *c, int64_t count, int64_t size) {
    int64_t bytes = 0;
    if (tfm__mul(count, size, &bytes)) return tfm__alloc_shared(c, tfm__max64(bytes, 1), 0);
    tfm__fail(c, TFM_OOM, "out of memory: a file's table of %lld x %lld bytes", (long long)count, (long long)size);
    return NULL;
}

/* by_name, with duplicates refused. */
static tfm_status tfm__file_index(tfm_ctx *c, tfm_file *f, const char *label) {
    int64_t i;
    f->by_name = (int64_t *)tfm__file_memory(c, f->count, (int64_t)sizeof *f->by_name);
    if (!f->by_name) return TFM_OOM;
    for (i = 0; i < f->count; i++) f->by_name[i] = i;
    tfm__sort(f->by_name, f->count, tfm__entry_name_less, f->entries);
    for (i = 1; i < f->count; i++)
        if (!strcmp(f->entries[f->by_name[i - 1]].name, f->entries[f->by_name[i]].name))
            return tfm__fail(c, TFM_FORMAT, "%.300s: duplicate name: \"%.100s\"", label,
                             f->entries[f->by_name[i]].name);
    return TFM_OK;
}

/* The metadata at text[0, used): where each key begins, sorted, none twice. */
static tfm_status tfm__file_metadata_index(tfm_ctx *c, tfm_file *f, int64_t at, const char *label) {
    int64_t i;
    f->metadata = (int64_t *)tfm__file_memory(c, f->metadata_count, (int64_t)sizeof *f->metadata);
    if (!f->metadata) return TFM_OOM;
    for (i = 0; i < f->metadata_count; i++) {
        f->metadata[i] = at;
        at += (int64_t)strlen(f->text + at) + 1;
        at += (int64_t)strlen(f->text + at) + 1;
    }
    tfm__sort(f->metadata, f->metadata_count, tfm__metadata_less, f->text);
    for (i = 1; i < f->metadata_count; i++)
        if (!strcmp(f->text + f->metadata[i - 1], f->text + f->metadata[i]))
            return tfm__fail(c, TFM_FORMAT, "%.300s: duplicate name in __metadata__: \"%.100s\"", label,
                             f->text + f->metadata[i]);
    return TFM_OK;
}

/* The data of the tensors must follow each other without overlap or hole and fill the rest of the file. */
static tfm_status tfm__file_check_data(tfm_ctx *c, tfm_file *f, const char *label, int64_t data_at) {
    const int64_t size = f->bytes.size - data_at;
    int64_t i, expected = 0, bits = 0;
    for (i = 0; i < f->count; i++) {
        tfm__entry *e = &f->entries[i];
        const long long begin = e->begin, end = e->end;
        if (e->begin != expected || e->end < e->begin)
            return tfm__fail(c, TFM_FORMAT,
                             "%.300s: invalid offset: the data of \"%.100s\" is [%lld, %lld) but must begin at %lld",
                             label, e->name, begin, end, (long long)expected);
        if (!tfm__mul(e->elements, e->type->bits, &bits))
            return tfm__fail(c, TFM_FORMAT, "%.300s: overflow: the size of \"%.100s\"", label, e->name);
        if (bits % 8 || bits / 8 != e->end - e->begin)
            return tfm__fail(c, TFM_FORMAT,
                             "%.300s: invalid tensor info: \"%.100s\" has %lld bits of data by its shape and %s, but "
                             "offsets [%lld, %lld)",
                             label, e->name, (long long)bits, e->type->name, begin, end);
        expected = e->end;
    }
    if (expected != size)
        return tfm__fail(c, TFM_FORMAT, "%.300s: incomplete buffer: the tensors take %lld bytes, the file has %lld",
                         label, (long long)expected, (long long)size);
    for (i = 0; i < f->count; i++) f->entries[i].data = f->bytes.data + data_at + f->entries[i].begin;
    return TFM_OK;
}

/* The header's JSON into entries (in their order in the text) and metadata. */
static tfm_status tfm__file_header(tfm_ctx *c, tfm_file *f, const char *label, const unsigned char *text,
                                   int64_t size) {
    tfm__json j;
    int64_t i, seen = 0, used = 0, length = 0, room = 0, metadata_at = -1;
    memset(&j, 0, sizeof j);
    j.text = text;
    j.size = size;
    /* A tensor takes a '{' and no fewer than 49 bytes of header: the table is in proportion whatever the text says. */
    for (i = 0; i < size; i++) room += text[i] == '{';
    room = tfm__min64(room, size / 49 + 1);
    f->text = (char *)tfm__file_memory(c, size, 1);
    f->entries = (tfm__entry *)tfm__file_memory(c, room, (int64_t)sizeof *f->entries);
    if (!f->text || !f->entries) return TFM_OOM;
    tfm__json_take(&j, '{', "it is not an object");
    while (tfm__json_next(&j, '}', &seen)) {
        char *name = f->text + used;
        if (!tfm__json_string(&j, name, &length) || !tfm__json_take(&j, ':', "a colon is missing")) break;
        if (!strcmp(name, "__metadata__")) {
            if (metadata_at >= 0) tfm__json_fail(&j, "__metadata__ stands there twice");
            metadata_at = used;
            if (!tfm__metadata_read(&j, f->text, &used, &f->metadata_count)) break;
        } else {
            tfm__entry *e = &f->entries[f->count];
            if (f->count >= room) break; /* cannot be: see above */
            memset(e, 0, sizeof *e);
            e->file = f;
            e->name = name;
            used += length + 1;
            if (!tfm__entry_read(&j, f->text + used, e)) break;
            f->count++;
        }
    }
    if (!j.why && tfm__json_peek(&j) != -1) tfm__json_fail(&j, "something stands after it");
    if (j.why)
        return tfm__fail(c, TFM_FORMAT, "%.300s: invalid header (not the JSON of safetensors): %s, at byte %lld of it",
                         label, j.why, (long long)j.at);
    return tfm__file_metadata_index(c, f, tfm__max64(metadata_at, 0), label);
}

/* Fills a file whose bytes are set. */
static tfm_status tfm__file_parse(tfm_ctx *c, tfm_file *f, const char *label) {
    const unsigned char *data = f->bytes.data;
    const int64_t size = f->bytes.size;
    uint64_t length = 0;
    int64_t i;
    tfm__entry *sorted;
    if (size < 8)
        return tfm__fail(c, TFM_FORMAT, "%.300s: header too small: %lld bytes are no safetensors file", label,
                         (long long)size);
    for (i = 0; i < 8; i++) length |= (uint64_t)data[i] << (8 * i);
    if (length > TFM__HEADER_MOST)
        return tfm__fail(c, TFM_FORMAT, "%.300s: header too large: %llu bytes, the format allows %d", label,
                         (unsigned long long)length, TFM__HEADER_MOST);
    if ((int64_t)length > size - 8)
        return tfm__fail(c, TFM_FORMAT, "%.300s: invalid header length: %llu bytes of header in a file of %lld", label,
                         (unsigned long long)length, (long long)size);
    if (!tfm__utf8_valid(data + 8, (int64_t)length))
        return tfm__fail(c, TFM_FORMAT, "%.300s: invalid header: not UTF-8", label);
    if (tfm__file_header(c, f, label, data + 8, (int64_t)length) || tfm__file_index(c, f, label))
        return tfm_status_of(c);
    /* by_name is borrowed for the order of the data, then made again for the entries in that order */
    sorted = (tfm__entry *)tfm__file_memory(c, f->count, (int64_t)sizeof *sorted);
    if (!sorted) return TFM_OOM;
    tfm__sort(f->by_name, f->count, tfm__entry_data_less, f->entries);
    for (i = 0; i < f->count; i++) sorted[i] = f->entries[f->by_name[i]];
    tfm__free_to(&f->allocator, f->entries);
    f->entries = sorted;
    for (i = 0; i < f->count; i++) f->by_name[i] = i;
    tfm__sort(f->by_name, f->count, tfm__entry_name_less, f->entries);
    return tfm__file_check_data(c, f, label, 8 + (int64_t)length);
}

/* -- bytes of a file ----------------------------------------------------------------------------------------------- */

#if !defined(TFM_NO_STDIO)

/* Descriptors: the one way to create a file that is not there yet, and to know that it has reached the disk. */
#if TFM__WINDOWS
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
#define TFM__CREATE_FLAGS (_O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY)
#define TFM__CREATE_MODE (_S_IREAD | _S_IWRITE)
#define TFM__FD(name) _##name
#else
#include <sys/mman.h>
#include <sys/stat.h>
#define TFM__CREATE_FLAGS (O_WRONLY | O_CREAT | O_EXCL)
#define TFM__CREATE_MODE 0666
#define TFM__FD(name) name
#if TFM__LINUX && defined(__STRICT_ANSI__) && !defined(__cplusplus) /* hidden by -std=c99 */
extern int fsync(int fd);
#endif
#if !defined(TFM__DONTNEED) && defined(MADV_DONTNEED)
#define TFM__DONTNEED MADV_DONTNEED
#endif
#endif

/* Maps a regular file; 0: not possible, then it is read. A private mapping may be written without touching the file,
 * so that a stray write into a tensor of a file does not crash. */
static int tfm__bytes_map(const char *path, tfm__bytes *b) {
#if TFM__WINDOWS
    (void)path;
    (void)b;
    return 0;
#else
    struct stat info;
    void *p = MAP_FAILED;
    const int fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    if (!fstat(fd, &info) && S_ISREG(info.st_mode) && info.st_size > 0 && (uint64_t)info.st_size <= (size_t)-1 / 2) {
        p = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) p = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    }
    close(fd);
    if (p == MAP_FAILED) return 0;
    b->data = (const unsigned char *)p;
    b->size = (int64_t)info.st_size;
    b->owned = p;
    b->mapped = 1;
    return 1;
#endif
}

/* Reads to the end: pipes, devices, files that say a wrong size. */
static tfm_status tfm__bytes_read(tfm_ctx *c, const char *path, tfm__bytes *b) {
    FILE *file = fopen(path, "rb");
    unsigned char *data = NULL, *larger;
    int64_t size = 0, room = 0;
    size_t got = 1;
    if (!file) return tfm__fail(c, TFM_IO, "%.300s: cannot be opened", path);
    while (got) {
        if (size == room) {
            room = room ? 2 * room : 65536;
            larger = (unsigned char *)tfm__alloc_shared(c, room, 0);
            if (!larger) break;
            if (size) memcpy(larger, data, (size_t)size);
            tfm__free_to(&c->allocator, data);
            data = larger;
        }
        got = fread(data + size, 1, (size_t)(room - size), file);
        size += (int64_t)got;
    }
    if (ferror(file)) tfm__fail(c, TFM_IO, "%.300s: cannot be read", path);
    fclose(file);
    if (tfm__failed(c)) {
        tfm__free_to(&c->allocator, data);
        return tfm__status(c);
    }
    b->data = data;
    b->size = size;
    b->owned = data;
    b->mapped = 0;
    return TFM_OK;
}

static tfm_status tfm__bytes_open(tfm_ctx *c, const char *path, tfm__bytes *b) {
    memset(b, 0, sizeof *b);
    return tfm__bytes_map(path, b) ? TFM_OK : tfm__bytes_read(c, path, b);
}
#endif /* TFM_NO_STDIO */

static void tfm__bytes_close(const tfm_allocator *a, tfm__bytes *b) {
    if (!b->mapped) {
        tfm__free_to(a, b->owned);
    } else {
#if !defined(TFM_NO_STDIO) && !TFM__WINDOWS
        munmap(b->owned, (size_t)b->size);
#endif
    }
}

/* [data, data + size) of a mapping will not be needed soon: its whole pages leave memory (they come back when
 * touched). */
static void tfm__bytes_drop(const tfm__bytes *b, const void *data, int64_t size) {
#if defined(TFM__DONTNEED)
    const int64_t page = (int64_t)sysconf(_SC_PAGESIZE);
    int64_t begin = (const unsigned char *)data - b->data, end = begin + size;
    if (!b->mapped || page < 1) return;
    begin = tfm__round_up(begin, page);
    end -= end % page;
    if (end > begin) (void)madvise((unsigned char *)b->owned + begin, (size_t)(end - begin), TFM__DONTNEED);
#else
    (void)b;
    (void)data;
    (void)size;
#endif
}

/* -- open files ---------------------------------------------------------------------------------------------------- */

/* A file without content that frees with the context's allocator. */
static tfm_file *tfm__file_new(tfm_ctx *c) {
    tfm_file *f = (tfm_file *)tfm__file_memory(c, 1, (int64_t)sizeof *f);
    if (!f) return NULL;
    memset(f, 0, sizeof *f);
    f->allocator = c->allocator;
    f->holders = 1;
    return f;
}

TFM_API void tfm_file_close(tfm_file *f) {
    tfm_allocator a;
    int64_t i;
    if (!f || tfm__atomic_add(&f->holders, -1) > 1) return;
    a = f->allocator;
    for (i = 0; i < f->shard_count; i++) tfm_file_close(f->shards[i]);
    tfm__bytes_close(&a, &f->bytes);
    tfm__free_to(&a, f->shards);
    tfm__free_to(&a, f->text);
    tfm__free_to(&a, f->entries);
    tfm__free_to(&a, f->by_name);
    tfm__free_to(&a, f->metadata);
    tfm__free_to(&a, f);
}

/* Parses what f->bytes holds: f, or NULL with f closed. */
static tfm_file *tfm__file_finish(tfm_ctx *c, tfm_file *f, const char *label) {
    if (tfm__file_parse(c, f, label) == TFM_OK) return f;
    tfm_file_close(f);
    return NULL;
}

TFM_API tfm_file *tfm_file_open_memory(tfm_ctx *c, const void *data, int64_t size) {
    tfm_file *f = NULL;
    if (tfm__verb_begin(c)) return NULL;
    if (size < 0 || (size && !data)) tfm__fail(c, TFM_INVALID, "tfm_file_open_memory: data is NULL or size negative");
    else f = tfm__file_new(c);
    if (f) {
        f->bytes.data = (const unsigned char *)data;
        f->bytes.size = size;
        f = tfm__file_finish(c, f, "tfm_file_open_memory");
    }
    tfm__release(c);
    return f;
}

static const tfm__entry *tfm__file_find(const tfm_file *f, const char *name) {
    int64_t low = 0, high = f && name ? f->count : 0;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        const tfm__entry *e = &f->entries[f->by_name[middle]];
        const int order = strcmp(name, e->name);
        if (!order) return e;
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

#if !defined(TFM_NO_STDIO)
static tfm_file *tfm__file_open_one(tfm_ctx *c, const char *path) {
    tfm_file *f = tfm__file_new(c);
    if (!f) return NULL;
    if (tfm__bytes_open(c, path, &f->bytes) != TFM_OK) {
        tfm_file_close(f);
        return NULL;
    }
    return tfm__file_finish(c, f, path);
}

/* Length of the folder in front of a path's last name, the separator included. */
static int64_t tfm__folder_length(const char *path) {
    int64_t n = (int64_t)strlen(path);
    while (n && path[n - 1] != '/' && !(TFM__WINDOWS && (path[n - 1] == '\\' || path[n - 1] == ':'))) n--;
    return n;
}

/* folder + name as a new string, to be freed by tfm__free; NULL: out of memory. */
static char *tfm__path_beside(tfm_ctx *c, const char *path, const char *name) {
    const size_t folder = (size_t)tfm__folder_length(path), length = strlen(name);
    char *s = (char *)tfm__alloc(c, (int64_t)(folder + length + 1));
    if (!s) return NULL;
    memcpy(s, path, folder);
    memcpy(s + folder, name, length + 1);
    return s;
}

/* A shard must lie beside its index: a name that leads elsewhere is refused. */
static int tfm__shard_name_ok(const char *name) {
    return name[0] && strcmp(name, ".") && strcmp(name, "..") && !strpbrk(name, "/\\:");
}

/* "weight_map": {"name": "file", ...} as name NUL file NUL ... in f->text. */
static tfm_status tfm__index_read(tfm_ctx *c, tfm_file *f, const tfm__bytes *b, const char *path, int64_t *count) {
    tfm__json j;
    int64_t seen = 0, used = 0;
    int maps = 0;
    memset(&j, 0, sizeof j);
    j.text = b->data;
    j.size = b->size;
    if (b->size > TFM__HEADER_MOST)
        return tfm__fail(c, TFM_FORMAT, "%.300s: header too large: %lld bytes", path, (long long)b->size);
    if (!tfm__utf8_valid(b->data, b->size)) return tfm__fail(c, TFM_FORMAT, "%.300s: invalid header: not UTF-8", path);
    f->text = (char *)tfm__file_memory(c, b->size, 1);
    if (!f->text) return TFM_OOM;
    tfm__json_take(&j, '{', "it is not an object");
    while (tfm__json_next(&j, '}', &seen)) {
        if (!tfm__json_string(&j, f->text + used, NULL) || !tfm__json_take(&j, ':', "a colon is missing")) break;
        if (strcmp(f->text + used, "weight_map")) {
            tfm__json_skip(&j, TFM__JSON_DEPTH);
        } else if (maps++) {
            tfm__json_fail(&j, "weight_map stands there twice");
        } else {
            tfm__metadata_read(&j, f->text, &used, count);
        }
    }
    if (!j.why && tfm__json_peek(&j) != -1) tfm__json_fail(&j, "something stands after it");
    if (!j.why && !maps) tfm__json_fail(&j, "weight_map is missing");
    if (j.why)
        return tfm__fail(c, TFM_FORMAT, "%.300s: invalid index (JSON): %s, at byte %lld", path, j.why, (long long)j.at);
    return TFM_OK;
}

/* The tensors of one shard, `wanted` names of the index in the order of their shards from `first` on. */
static tfm_status tfm__index_shard(tfm_ctx *c, tfm_file *f, const char *path, const char *file, const int64_t *order,
                                   int64_t first, int64_t last) {
    char *beside = tfm__shard_name_ok(file) ? tfm__path_beside(c, path, file) : NULL;
    tfm_file *shard;
    int64_t i;
    if (!beside) {
        if (tfm__failed(c)) return tfm__status(c);
        return tfm__fail(c, TFM_FORMAT, "%.300s: \"%.100s\" is not a plain file name", path, file);
    }
    shard = tfm__file_open_one(c, beside);
    tfm__free(c, beside);
    if (!shard) return tfm__status(c);
    f->shards[f->shard_count++] = shard;
    for (i = first; i < last; i++) {
        const char *name = f->text + order[i];
        const tfm__entry *e = tfm__file_find(shard, name);
        if (!e) return tfm__fail(c, TFM_FORMAT, "%.300s: \"%.100s\" is not in \"%.100s\"", path, name, file);
        f->entries[f->count++] = *e;
    }
    return TFM_OK;
}

static const char *tfm__index_value(const char *key) { return key + strlen(key) + 1; }

/* By file, then name. */
static int tfm__index_less(const void *user, int64_t a, int64_t b) {
    const char *x = (const char *)user + a, *y = (const char *)user + b;
    const int order = strcmp(tfm__index_value(x), tfm__index_value(y));
    return order ? order < 0 : strcmp(x, y) < 0;
}

/* Opens every shard that weight_map names and collects their tensors. */
static tfm_status tfm__index_shards(tfm_ctx *c, tfm_file *f, const char *path, int64_t count) {
    int64_t *order = (int64_t *)tfm__alloc(c, tfm__max64(count, 1) * (int64_t)sizeof *order);
    int64_t i, at = 0, end;
    if (!order) return TFM_OOM;
    for (i = 0; i < count; i++) {
        order[i] = at;
        at += (int64_t)strlen(f->text + at) + 1;
        at += (int64_t)strlen(f->text + at) + 1;
    }
    tfm__sort(order, count, tfm__index_less, f->text);
    f->entries = (tfm__entry *)tfm__file_memory(c, count, (int64_t)sizeof *f->entries);
    f->shards = (tfm_file **)tfm__file_memory(c, count, (int64_t)sizeof *f->shards);
    for (i = 0; f->shards && i < count && !tfm__failed(c); i = end) {
        const char *file = tfm__index_value(f->text + order[i]);
        for (end = i + 1; end < count && !strcmp(file, tfm__index_value(f->text + order[end]));) end++;
        tfm__index_shard(c, f, path, file, order, i, end);
    }
    tfm__free(c, order);
    return tfm__failed(c) ? tfm__status(c) : tfm__file_index(c, f, path);
}

static tfm_file *tfm__file_open_index(tfm_ctx *c, const char *path) {
    tfm_file *f = tfm__file_new(c);
    tfm__bytes b;
    int64_t count = 0;
    if (f && tfm__bytes_open(c, path, &b) == TFM_OK) {
        if (tfm__index_read(c, f, &b, path, &count) == TFM_OK) tfm__index_shards(c, f, path, count);
        tfm__bytes_close(&c->allocator, &b);
    }
    if (!tfm__failed(c)) return f;
    tfm_file_close(f);
    return NULL;
}

TFM_API tfm_file *tfm_file_open(tfm_ctx *c, const char *path) {
    const size_t length = path ? strlen(path) : 0;
    tfm_file *f = NULL;
    if (tfm__verb_begin(c)) return NULL;
    if (!path) tfm__fail(c, TFM_INVALID, "tfm_file_open: path is NULL");
    else if (length > 5 && !strcmp(path + length - 5, ".json")) f = tfm__file_open_index(c, path);
    else f = tfm__file_open_one(c, path);
    tfm__release(c);
    return f;
}
#endif /* TFM_NO_STDIO */

TFM_API int64_t tfm_file_count(const tfm_file *f) { return f ? f->count : 0; }

TFM_API const char *tfm_file_name(const tfm_file *f, int64_t index) {
    return f && index >= 0 && index < f->count ? f->entries[index].name : NULL;
}

TFM_API int tfm_file_has(const tfm_file *f, const char *name) { return tfm__file_find(f, name) != NULL; }

/* An index has the metadata of its first shard that knows the key. */
TFM_API const char *tfm_file_metadata(const tfm_file *f, const char *key) {
    int64_t low = 0, high = f && key ? f->metadata_count : 0, i;
    const char *value = NULL;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        const char *have = f->text + f->metadata[middle];
        const int order = strcmp(key, have);
        if (!order) return have + strlen(have) + 1;
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    for (i = 0; f && i < f->shard_count && !value; i++) value = tfm_file_metadata(f->shards[i], key);
    return value;
}

/* 1: a tensor of ours can hold it. */
static int tfm__entry_offered(tfm_ctx *c, const char *who, const tfm__entry *e) {
    if (e->type->dtype < 0) {
        tfm__fail(c, TFM_UNSUPPORTED, "%s: \"%.100s\" is %s, which is not offered", who, e->name, e->type->name);
    } else if (e->ndim > TFM_MAX_DIMS) {
        tfm__fail(c, TFM_UNSUPPORTED, "%s: \"%.100s\" has %lld dimensions, at most %d are offered", who, e->name,
                  (long long)e->ndim, TFM_MAX_DIMS);
    } else {
        return 1;
    }
    return 0;
}

static int tfm__aligned(const void *p, int dtype) { return (uintptr_t)p % (uintptr_t)tfm_dtype_size(dtype) == 0; }

/* Tensors take void *: a file's are read only by agreement. */
static void *tfm__writable(const void *p) {
    union { const void *in; void *out; } same;
    same.in = p;
    return same.out;
}

TFM_API tfm_tensor *tfm_file_tensor(tfm_ctx *c, const tfm_file *f, const char *name) {
    const tfm__entry *e = tfm__file_find(f, name);
    tfm_tensor *t = NULL;
    if (tfm__verb_begin(c)) return NULL;
    if (!f || !name) {
        tfm__fail(c, TFM_INVALID, "tfm_file_tensor: %s is NULL", f ? "name" : "file");
    } else if (!e) {
        tfm__fail(c, TFM_INVALID, "tfm_file_tensor: the file has no tensor \"%.100s\"", name);
    } else if (tfm__entry_offered(c, "tfm_file_tensor", e)) {
        int64_t numel = 0;
        const int ndim = (int)e->ndim;
        if (!tfm__shape_check(c, "tfm_file_tensor", e->type->dtype, ndim, e->shape, &numel)) {
            t = NULL; /* no element, but sizes whose strides do not fit */
        } else if (!numel || tfm__aligned(e->data, e->type->dtype)) {
            t = tfm__wrap(c, e->type->dtype, ndim, e->shape, numel ? tfm__writable(e->data) : NULL);
        } else {
            t = tfm__tensor(c, e->type->dtype, ndim, e->shape);
            if (t && !c->dry) memcpy(t->data, e->data, (size_t)(e->end - e->begin));
        }
    }
    tfm__release(c);
    return t;
}

/* -- loading into a store ------------------------------------------------------------------------------------------ */

/* A tensor of the file, or a part of one, on its way to a parameter. */
typedef struct tfm__item {
    const tfm__entry *entry;
    const tfm_rule *rule;              /* NULL: the name as it is */
    const char *name;                  /* of the parameter */
    int done;
} tfm__item;

typedef struct tfm__plan {
    tfm_ctx *c;
    tfm_params *p;
    const tfm_file *f;
    const tfm_load_options *options;
    tfm__item *items;
    char *text;                        /* the names */
    int64_t *order;                    /* items by name, then part */
    int64_t count, used;               /* of items and text; in a first walk counted only */
    int adopt;                         /* 1: memory of the file may become a parameter's */
} tfm__plan;

static int tfm__rule_transposes(const tfm_rule *r) {
    return r
           && (r->kind == TFM_RULE_TRANSPOSE || r->kind == TFM_RULE_CONCAT_TRANSPOSE
               || r->kind == TFM_RULE_SPLIT_TRANSPOSE);
}
static int tfm__rule_joins(const tfm_rule *r) {
    return r && (r->kind == TFM_RULE_CONCAT || r->kind == TFM_RULE_CONCAT_TRANSPOSE);
}
static int tfm__rule_splits(const tfm_rule *r) {
    return r && (r->kind == TFM_RULE_SPLIT || r->kind == TFM_RULE_SPLIT_TRANSPOSE);
}

/* 1: pattern fits name; star[i], length[i] are what its '*' stand for, each as short as can be. Only the latest star is
 * ever made longer: an earlier one would have to cross what stops the latest. No name makes this slow. */
static int tfm__match(const char *pattern, const char *name, const char **star, int64_t *length) {
    const char *again = NULL, *next;
    int stars = 0;
    for (;;) {
        if (*pattern == '*') {
            star[stars] = name;
            length[stars++] = 0;
            again = ++pattern;
        } else if (*pattern == *name) {
            if (!*name) return 1;
            pattern++;
            name++;
        } else {
            next = again ? star[stars - 1] + length[stars - 1] : "";
            if (!*next || *next == '.' || *next == '/') return 0;
            length[stars - 1]++;
            name = next + 1;
            pattern = again;
        }
    }
}

/* The target of a rule for a name that its pattern fits. 0: too long, the error is set. */
static int tfm__rule_target(tfm_ctx *c, const tfm_rule *r, const char *const *star, const int64_t *length, char *out) {
    int64_t n = 0, more;
    int stars = 0;
    const char *to = r->to, *from;
    for (; *to; to++) {
        from = *to == '*' ? star[stars] : to;
        more = *to == '*' ? length[stars++] : 1;
        if (n + more > TFM__NAME_MAX) {
            tfm__fail(c, TFM_INVALID, "the rule \"%.100s\" -> \"%.100s\" makes a name longer than %d bytes", r->from,
                      r->to, TFM__NAME_MAX);
            return 0;
        }
        memcpy(out + n, from, (size_t)more);
        n += more;
    }
    out[n] = 0;
    return 1;
}

static int64_t tfm__count_stars(const char *s) {
    int64_t n = 0;
    for (; *s; s++) n += *s == '*';
    return n;
}

/* Every row of the table makes sense. */
static int tfm__rules_ok(tfm_ctx *c, const tfm_load_options *o) {
    int64_t i;
    if (o->rule_count < 0 || (o->rule_count && !o->rules)) {
        tfm__fail(c, TFM_INVALID, "tfm_params_load: rules is NULL or rule_count negative");
        return 0;
    }
    for (i = 0; i < o->rule_count; i++) {
        const tfm_rule *r = &o->rules[i];
        const char *why = NULL;
        if (r->kind < TFM_RULE_RENAME || r->kind > TFM_RULE_SPLIT_TRANSPOSE) why = "there is no such kind";
        else if (!r->from || (!r->to && r->kind != TFM_RULE_SKIP)) why = "from or to is NULL";
        else if (tfm__count_stars(r->from) > TFM__STARS_MOST) why = "from has more than 8 *";
        else if (r->kind != TFM_RULE_SKIP && tfm__count_stars(r->to) > tfm__count_stars(r->from))
            why = "to has more * than from";
        else if ((tfm__rule_joins(r) || tfm__rule_splits(r)) && (r->parts < 1 || r->index < 0 || r->index >= r->parts))
            why = "index is not in [0, parts)";
        if (why) {
            tfm__fail(c, TFM_INVALID, "tfm_params_load: rule %lld (\"%.100s\"): %s", (long long)i,
                      r->from ? r->from : "NULL", why);
            return 0;
        }
    }
    return 1;
}

/* One more item. Without items only what it takes is counted. */
static void tfm__plan_add(tfm__plan *l, const tfm__entry *e, const tfm_rule *r, const char *target) {
    char path[TFM__NAME_MAX + 1];
    int64_t size;
    if (!tfm__path(l->c, path, l->options->prefix ? l->options->prefix : "", target)) return;
    size = (int64_t)strlen(path) + 1;
    if (l->items) {
        tfm__item *item = &l->items[l->count];
        memset(item, 0, sizeof *item);
        item->entry = e;
        item->rule = r;
        item->name = (const char *)memcpy(l->text + l->used, path, (size_t)size);
    }
    l->count++;
    l->used += size;
}

/* What becomes of every tensor of the file. */
static void tfm__plan_walk(tfm__plan *l) {
    const tfm_load_options *o = l->options;
    const char *star[TFM__STARS_MOST];
    int64_t length[TFM__STARS_MOST], i, k;
    l->count = l->used = 0;
    for (i = 0; i < l->f->count && !tfm__failed(l->c); i++) {
        const tfm__entry *e = &l->f->entries[i];
        int decided = 0;
        for (k = 0; k < o->rule_count; k++) {
            const tfm_rule *r = &o->rules[k];
            char target[TFM__NAME_MAX + 1];
            if (decided && !tfm__rule_splits(r)) continue;
            if (!tfm__match(r->from, e->name, star, length)) continue;
            decided = 1;
            if (r->kind == TFM_RULE_SKIP) break;
            if (!tfm__rule_target(l->c, r, star, length, target)) return;
            tfm__plan_add(l, e, r, target);
            if (!tfm__rule_splits(r)) break;
        }
        if (!decided) tfm__plan_add(l, e, NULL, e->name);
    }
}

static int tfm__item_less(const void *user, int64_t a, int64_t b) {
    const tfm__item *x = (const tfm__item *)user + a, *y = (const tfm__item *)user + b;
    const int order = strcmp(x->name, y->name), i = tfm__rule_joins(x->rule) ? x->rule->index : 0,
              k = tfm__rule_joins(y->rule) ? y->rule->index : 0;
    return order ? order < 0 : i != k ? i < k : a < b;
}

/* The item's elements as they lie in the file. 0: the rule does not fit, or the tensor is not offered; the error is
 * set. */
static int tfm__item_view(tfm_ctx *c, const tfm__item *item, tfm_tensor *t) {
    const tfm__entry *e = item->entry;
    const tfm_rule *r = item->rule;
    char text[128];
    int64_t numel = 0, swap;
    if (!tfm__entry_offered(c, "tfm_params_load", e)) return 0;
    if (!tfm__shape_check(c, "tfm_params_load", e->type->dtype, (int)e->ndim, e->shape, &numel)) return 0;
    memset(t, 0, sizeof *t);
    t->dtype = e->type->dtype;
    t->ndim = (int)e->ndim;
    memcpy(t->shape, e->shape, sizeof t->shape);
    tfm__contiguous_strides(t->ndim, t->shape, t->stride);
    t->data = tfm__writable(e->data);
    t->generation = 1;
    tfm__shape_text(text, (int64_t)sizeof text, t->ndim, t->shape);
    if (tfm__rule_transposes(r) && t->ndim > 1) { /* a bias that the same rule meets stays as it is */
        if (t->ndim > 2) {
            tfm__fail(c, TFM_INVALID, "tfm_params_load: \"%.100s\" is %s: only matrices can be transposed", e->name,
                      text);
            return 0;
        }
        swap = t->shape[0];
        t->shape[0] = t->shape[1];
        t->shape[1] = swap;
        t->stride[1] = t->stride[0];
        t->stride[0] = 1;
    }
    if (tfm__rule_splits(r)) {
        if (!t->ndim || t->shape[0] % r->parts) {
            tfm__fail(c, TFM_INVALID, "tfm_params_load: \"%.100s\" is %s: it cannot be split into %d equal parts",
                      e->name, text, r->parts);
            return 0;
        }
        t->shape[0] /= r->parts;
        t->data = (char *)t->data + t->shape[0] * r->index * t->stride[0] * tfm_dtype_size(t->dtype);
    }
    t->bytes = tfm_numel(t) * tfm_dtype_size(t->dtype);
    return 1;
}

/* Shape and dtype of what items order[first, last) make together. 0: they do not fit together. */
static int tfm__group_view(tfm__plan *l, int64_t first, int64_t last, tfm_tensor *whole) {
    const tfm__item *head = &l->items[l->order[first]];
    const int joins = tfm__rule_joins(head->rule);
    const int64_t parts = joins ? head->rule->parts : 1;
    tfm_tensor part;
    int64_t i;
    for (i = first; i < last; i++) {
        const tfm__item *item = &l->items[l->order[i]];
        char a[128], b[128];
        if (i > first && !(joins && tfm__rule_joins(item->rule))) {
            tfm__fail(l->c, TFM_INVALID, "tfm_params_load: \"%.100s\" and \"%.100s\" both become '%.100s'",
                      head->entry->name, item->entry->name, item->name);
            return 0;
        }
        if (joins && (item->rule->parts != parts || item->rule->index != i - first)) {
            tfm__fail(l->c, TFM_INVALID,
                      "tfm_params_load: '%.100s' is made of %lld parts: number %lld is missing, or there twice",
                      item->name, (long long)parts, (long long)(i - first));
            return 0;
        }
        if (!tfm__item_view(l->c, item, &part)) return 0;
        if (i == first) {
            *whole = part;
            continue;
        }
        tfm__shape_text(a, (int64_t)sizeof a, whole->ndim, whole->shape);
        tfm__shape_text(b, (int64_t)sizeof b, part.ndim, part.shape);
        if (!part.ndim || part.ndim != whole->ndim || part.dtype != whole->dtype ||
            memcmp(part.shape + 1, whole->shape + 1, sizeof part.shape - sizeof part.shape[0]) ||
            !tfm__add(whole->shape[0], part.shape[0], &whole->shape[0])) {
            tfm__fail(l->c, TFM_INVALID, "tfm_params_load: \"%.100s\", %s %s, cannot be joined to '%.100s', %s %s",
                      item->entry->name, tfm_dtype_name(part.dtype), b, item->name, tfm_dtype_name(whole->dtype), a);
            return 0;
        }
    }
    if (last - first != parts) {
        tfm__fail(l->c, TFM_INVALID, "tfm_params_load: '%.100s' is made of %lld parts, but the file has %lld",
                  head->name, (long long)parts, (long long)(last - first));
        return 0;
    }
    return 1;
}

/* A parameter that exists can take the values. */
static int tfm__group_fits(tfm__plan *l, const tfm__item *head, const tfm_tensor *whole) {
    const tfm__param *q = tfm__param_of(l->p, head->name);
    char a[128], b[128];
    if (!q) return 1;
    tfm__tensor_text(a, (int64_t)sizeof a, whole);
    tfm__tensor_text(b, (int64_t)sizeof b, &q->tensor);
    if (q->tensor.ndim != whole->ndim || memcmp(q->tensor.shape, whole->shape, sizeof(int64_t) * (size_t)whole->ndim)) {
        tfm__fail(l->c, TFM_INVALID, "tfm_params_load: \"%.100s\" gives %s, but parameter '%.100s' is %s",
                  head->entry->name, a, head->name, b);
    } else if (q->tensor.dtype != whole->dtype &&
               !(tfm__is_float(q->tensor.dtype) && (tfm__is_float(whole->dtype) || whole->dtype == TFM_F64))) {
        tfm__fail(l->c, TFM_INVALID,
                  "tfm_params_load: \"%.100s\" gives %s, but parameter '%.100s' is %s: only floats are converted",
                  head->entry->name, a, head->name, b);
    } else if (q->writing) {
        tfm__fail(l->c, TFM_INVALID, "tfm_params_load: '%.100s' is being written: tfm_params_write_end first",
                  head->name);
    }
    return !tfm__failed(l->c);
}

/* Writes one item into rows of a parameter that begin at to->data. */
static void tfm__item_copy(tfm__plan *l, const tfm__item *item, const tfm_tensor *to) {
    const tfm__entry *e = item->entry;
    const int64_t bytes = e->end - e->begin;
    tfm_tensor from;
    void *aligned = NULL;
    if (!tfm__item_view(l->c, item, &from) || !from.bytes) return;
    if (!tfm__aligned(e->data, from.dtype)) {
        aligned = tfm__alloc(l->c, bytes);
        if (!aligned) return;
        memcpy(aligned, e->data, (size_t)bytes);
        from.data = (char *)aligned + ((const unsigned char *)from.data - e->data);
    }
    tfm__assign(l->c, to, &from);
    tfm__free(l->c, aligned);
    tfm__bytes_drop(&e->file->bytes, e->data, bytes);
}

/* Puts items order[first, last) into their parameter, which is made when it is not there. */
static void tfm__group_load(tfm__plan *l, int64_t first, int64_t last) {
    const tfm__item *head = &l->items[l->order[first]];
    tfm__param *q = tfm__param_of(l->p, head->name);
    tfm_tensor whole, to;
    int64_t i;
    int dtype;
    if (!tfm__group_view(l, first, last, &whole)) return;
    if (!q) {
        const int matrix = whole.ndim > 1 && (tfm__is_float(whole.dtype) || whole.dtype == TFM_F64);
        dtype = l->options->cast && matrix ? l->options->dtype : whole.dtype;
        if (l->adopt && last - first == 1 && dtype == whole.dtype
            && !(tfm__rule_transposes(head->rule) && whole.ndim > 1) && tfm__aligned(whole.data, dtype)) {
            tfm__params_adopt(l->c, l->p, head->name, dtype, tfm_shape_like(&whole), whole.data);
            return;
        }
        if (!tfm__params_get(l->c, l->p, head->name, dtype, tfm_shape_like(&whole), NULL)) return;
        q = tfm__param_of(l->p, head->name);
    }
    if (tfm__param_unpack(l->c, q) != TFM_OK) return;
    to = q->tensor;
    for (i = first; i < last && !tfm__failed(l->c); i++) {
        const tfm__item *item = &l->items[l->order[i]];
        tfm_tensor part;
        if (!tfm__item_view(l->c, item, &part)) return;
        memcpy(to.shape, part.shape, sizeof to.shape);
        tfm__item_copy(l, item, &to);
        to.data = tfm__at(&to, tfm_numel(&part));
    }
}

/* All groups, in the order in which the file has their first tensor: once to check everything, once to do it. */
static void tfm__plan_run(tfm__plan *l, int check) {
    int64_t *place = l->order + l->count, i, first, last;
    for (i = 0; i < l->count; i++) place[l->order[i]] = i;
    for (i = 0; i < l->count && !tfm__failed(l->c); i++) {
        const char *name = l->items[i].name;
        tfm_tensor whole;
        if (l->items[i].done == 1 + !check) continue;
        for (first = place[i]; first && !strcmp(l->items[l->order[first - 1]].name, name);) first--;
        for (last = place[i] + 1; last < l->count && !strcmp(l->items[l->order[last]].name, name);) last++;
        if (!check) tfm__group_load(l, first, last);
        else if (tfm__group_view(l, first, last, &whole)) tfm__group_fits(l, &l->items[l->order[first]], &whole);
        for (; first < last; first++) l->items[l->order[first]].done = 1 + !check;
        if (!check && tfm__progress(l->c, "loading", i + 1, l->count))
            tfm__fail(l->c, TFM_CANCELLED, "tfm_params_load: cancelled");
    }
}

static void tfm__file_release(void *file) { tfm_file_close((tfm_file *)file); }

/* Data that a parameter has left (packed, cast): its pages leave memory. */
static void tfm__file_drop(void *file, const void *data, int64_t bytes) {
    const tfm_file *f = (const tfm_file *)file;
    const unsigned char *p = (const unsigned char *)data;
    int64_t i;
    if (p && f->bytes.mapped && p >= f->bytes.data && p < f->bytes.data + f->bytes.size)
        tfm__bytes_drop(&f->bytes, data, bytes);
    for (i = 0; i < f->shard_count; i++) tfm__file_drop(f->shards[i], data, bytes);
}

/* 1: the memory of f and its shards stays as it is while f is open, and is not needed twice. A file that had to be
 * read into memory is copied from, so that this memory can go. */
static int tfm__file_lasts(const tfm_file *f) {
    int64_t i;
    if (f->bytes.owned && !f->bytes.mapped) return 0;
    for (i = 0; i < f->shard_count; i++)
        if (!tfm__file_lasts(f->shards[i])) return 0;
    return 1;
}

static tfm_status tfm__load(tfm_ctx *c, tfm_params *p, tfm_file *f, const tfm_load_options *options, int adopt) {
    tfm_load_options none;
    tfm__plan l;
    memset(&none, 0, sizeof none);
    memset(&l, 0, sizeof l);
    l.c = c;
    l.p = p;
    l.f = f;
    l.options = options ? options : &none;
    l.adopt = adopt && tfm__file_lasts(f);
    if (p->sizes_only) return tfm__fail(c, TFM_INVALID, "tfm_params_load: this store has no memory");
    if (!tfm__rules_ok(c, l.options)) return tfm__status(c);
    if (l.options->cast && !tfm__is_float(l.options->dtype))
        return tfm__fail(c, TFM_INVALID, "tfm_params_load: cast to f32, f16 or bf16 only");
    tfm__plan_walk(&l);
    if (tfm__failed(c)) return tfm__status(c);
    l.order = (int64_t *)tfm__alloc(c, tfm__max64(2 * l.count, 1) * (int64_t)sizeof *l.order);
    l.text = (char *)tfm__alloc(c, tfm__max64(l.used, 1));
    l.items = (tfm__item *)tfm__alloc(c, tfm__max64(l.count, 1) * (int64_t)sizeof *l.items);
    if (l.order && l.text && l.items) {
        int64_t i;
        tfm__plan_walk(&l);
        for (i = 0; i < l.count; i++) l.order[i] = i;
        tfm__sort(l.order, l.count, tfm__item_less, l.items);
        tfm__plan_run(&l, 1);
        /* The store holds the file before it uses its memory: a failure in between must not leave it with memory
         * that is gone. */
        if (!tfm__failed(c) && l.adopt && tfm__params_keep(c, p, tfm__file_release, tfm__file_drop, f) == TFM_OK)
            tfm__atomic_add(&f->holders, 1);
        if (!tfm__failed(c)) tfm__plan_run(&l, 0);
        if (!tfm__failed(c) && l.options->cast) tfm__ignore(tfm_params_cast(c, p, l.options->dtype));
        if (!tfm__failed(c) && !l.options->plain) tfm__ignore(tfm_params_prepare(c, p));
    }
    tfm__free(c, l.items);
    tfm__free(c, l.text);
    tfm__free(c, l.order);
    return tfm__status(c);
}

TFM_API tfm_status tfm_params_load_file(tfm_ctx *c, tfm_params *p, tfm_file *f, const tfm_load_options *options) {
    const tfm_status busy = tfm__verb_begin(c);
    if (busy) return busy;
    if (!p || !f) tfm__fail(c, TFM_INVALID, "tfm_params_load_file: %s is NULL", p ? "file" : "params");
    else tfm__load(c, p, f, options, 1);
    return tfm__verb_end(c);
}

/* Copies, so that the caller's memory is free again. */
TFM_API tfm_status tfm_params_load_memory(tfm_ctx *c, tfm_params *p, const void *data, int64_t size,
                                          const tfm_load_options *options) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm_file *f;
    if (busy) return busy;
    if (!p) {
        tfm__fail(c, TFM_INVALID, "tfm_params_load_memory: params is NULL");
        return tfm__verb_end(c);
    }
    f = tfm_file_open_memory(c, data, size);
    if (f) tfm__load(c, p, f, options, 0);
    tfm_file_close(f);
    return tfm__verb_end(c);
}

#if !defined(TFM_NO_STDIO)
TFM_API tfm_status tfm_params_load(tfm_ctx *c, tfm_params *p, const char *path, const tfm_load_options *options) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm_file *f;
    if (busy) return busy;
    if (!p) {
        tfm__fail(c, TFM_INVALID, "tfm_params_load: params is NULL");
        return tfm__verb_end(c);
    }
    f = tfm_file_open(c, path);
    if (f) tfm__load(c, p, f, options, 1);
    tfm_file_close(f);
    return tfm__verb_end(c);
}
#endif

/* -- writing ------------------------------------------------------------------------------------------------------- */

/* Where bytes go: nowhere (they are counted), into memory, or into a new file. */
typedef struct tfm__sink {
    int64_t written, failed;
    char *memory;
    int fd;                            /* -1: none */
} tfm__sink;

static void tfm__sink_put(tfm__sink *s, const void *data, int64_t size) {
    if (s->memory) memcpy(s->memory + s->written, data, (size_t)size);
    s->written += size;
#if !defined(TFM_NO_STDIO)
    while (s->fd >= 0 && size && !s->failed) {
        const int64_t piece = tfm__min64(size, 1 << 20);
#if TFM__WINDOWS
        const int64_t done = _write(s->fd, data, (unsigned)piece);
#else
        const int64_t done = (int64_t)write(s->fd, data, (size_t)piece);
#endif
        if (done <= 0) s->failed = 1;
        else {
            data = (const char *)data + done;
            size -= done;
        }
    }
#endif
}

TFM__PRINTF(2, 3)
static void tfm__sink_text(tfm__sink *s, const char *format, ...) {
    char text[64]; /* numbers and fixed words only */
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    tfm__sink_put(s, text, (int64_t)strlen(text));
}

static void tfm__sink_string(tfm__sink *s, const char *text) {
    tfm__sink_put(s, "\"", 1);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') tfm__sink_text(s, "\\%c", *text);
        else if ((unsigned char)*text < 0x20) tfm__sink_text(s, "\\u%04x", (unsigned)(unsigned char)*text);
        else tfm__sink_put(s, text, 1);
    }
    tfm__sink_put(s, "\"", 1);
}

typedef struct tfm__named {
    const char *name;
    const tfm_tensor *tensor;
    int rank;                          /* of its dtype in the writer's order */
} tfm__named;

static int tfm__named_name_less(const void *user, int64_t a, int64_t b) {
    const tfm__named *n = (const tfm__named *)user;
    return strcmp(n[a].name, n[b].name) < 0;
}

/* The reference writer's order: dtypes descending (so that data is aligned), then names. */
static int tfm__named_less(const void *user, int64_t a, int64_t b) {
    const tfm__named *n = (const tfm__named *)user;
    return n[a].rank != n[b].rank ? n[a].rank > n[b].rank : strcmp(n[a].name, n[b].name) < 0;
}

/* Dtype ranks, and the index array `order` in the order of writing. c NULL: nothing is checked. */
static tfm_status tfm__save_order(tfm_ctx *c, tfm__named *list, int64_t count, int64_t *order) {
    int64_t i;
    int k;
    for (i = 0; i < count; i++) {
        order[i] = i;
        for (k = 0; k < TFM__COUNT(tfm__file_dtypes); k++)
            if (tfm__file_dtypes[k].dtype == list[i].tensor->dtype) list[i].rank = k;
    }
    tfm__sort(order, count, tfm__named_name_less, list);
    for (i = 0; c && i < count; i++) {
        const char *name = list[order[i]].name;
        if (!tfm__utf8_valid((const unsigned char *)name, (int64_t)strlen(name)) || !strcmp(name, "__metadata__"))
            return tfm__fail(c, TFM_INVALID, "tfm_params_save: '%.100s' cannot be a name in safetensors", name);
        if (i && !strcmp(name, list[order[i - 1]].name))
            return tfm__fail(c, TFM_INVALID, "tfm_params_save: '%.100s' is there twice", name);
    }
    tfm__sort(order, count, tfm__named_less, list);
    return TFM_OK;
}

static void tfm__save_header(tfm__sink *s, const tfm__named *list, int64_t count, const int64_t *order) {
    int64_t i, at = 0, bytes;
    int d;
    tfm__sink_put(s, "{", 1);
    for (i = 0; i < count; i++) {
        const tfm__named *n = &list[order[i]];
        if (i) tfm__sink_put(s, ",", 1);
        tfm__sink_string(s, n->name);
        tfm__sink_text(s, ":{\"dtype\":\"%s\",\"shape\":[", tfm__file_dtypes[n->rank].name);
        for (d = 0; d < n->tensor->ndim; d++) tfm__sink_text(s, d ? ",%lld" : "%lld", (long long)n->tensor->shape[d]);
        bytes = tfm_numel(n->tensor) * tfm_dtype_size(n->tensor->dtype);
        tfm__sink_text(s, "],\"data_offsets\":[%lld", (long long)at);
        at += bytes;
        tfm__sink_text(s, ",%lld]}", (long long)at);
    }
    tfm__sink_put(s, "}", 1);
}

/* The elements of t in row-major order, whatever its strides or layout. */
static void tfm__save_data(tfm__sink *s, const tfm_tensor *t) {
    const int64_t size = tfm_dtype_size(t->dtype), n = tfm_numel(t);
    int64_t index[TFM_MAX_DIMS] = {0}, used = 0, i;
    char chunk[TFM__CHUNK];
    int d;
    if (n && t->layout == TFM_STRIDED && tfm_is_contiguous(t)) {
        tfm__sink_put(s, t->data, n * size);
        return;
    }
    for (i = 0; i < n; i++) {
        const char *from =
            t->layout == TFM_PANELS
                ? (const char *)t->panels
                      + ((index[0] / TFM__PANEL * t->shape[1] + index[1]) * TFM__PANEL + index[0] % TFM__PANEL) * size
                : (const char *)t->data + tfm__offset(t, index) * size;
        memcpy(chunk + used, from, (size_t)size);
        used += size;
        if (used == TFM__CHUNK) {
            tfm__sink_put(s, chunk, used);
            used = 0;
        }
        for (d = t->ndim - 1; d >= 0 && ++index[d] == t->shape[d]; d--) index[d] = 0;
    }
    tfm__sink_put(s, chunk, used);
}

/* The whole file. The header is padded with spaces to a multiple of 8 as the reference writer does. */
static void tfm__save_to(tfm__sink *s, const tfm__named *list, int64_t count, const int64_t *order) {
    tfm__sink length;
    unsigned char head[8];
    int64_t i;
    memset(&length, 0, sizeof length);
    length.fd = -1;
    tfm__save_header(&length, list, count, order);
    length.written = tfm__round_up(length.written, 8);
    for (i = 0; i < 8; i++) head[i] = (unsigned char)((uint64_t)length.written >> (8 * i));
    tfm__sink_put(s, head, 8);
    tfm__save_header(s, list, count, order);
    while (s->written < length.written + 8) tfm__sink_put(s, " ", 1);
    for (i = 0; i < count && !s->failed; i++) tfm__save_data(s, list[order[i]].tensor);
}

/* The parameters as a list, in memory of the store's allocator (one block); NULL: none. */
static tfm__named *tfm__params_list(const tfm_params *p, int64_t **order) {
    const int64_t count = p->count, head = tfm__round_up(count * (int64_t)sizeof(tfm__named), 64);
    tfm__named *list =
        (tfm__named *)tfm__alloc_from(&p->allocator, head + tfm__max64(count, 1) * (int64_t)sizeof **order);
    int64_t i;
    if (!list) return NULL;
    *order = (int64_t *)(void *)((char *)list + head);
    for (i = 0; i < count; i++) {
        list[i].name = p->list[i]->name;
        list[i].tensor = &p->list[i]->tensor;
        list[i].rank = 0;
    }
    return list;
}

TFM_API int64_t tfm_params_saved_size(const tfm_params *p) {
    tfm__sink s;
    int64_t *order = NULL, i;
    tfm__named *list = p ? tfm__params_list(p, &order) : NULL;
    if (!list) return -1;
    memset(&s, 0, sizeof s);
    s.fd = -1;
    tfm__save_order(NULL, list, p->count, order);
    tfm__save_header(&s, list, p->count, order);
    s.written = 8 + tfm__round_up(s.written, 8);
    for (i = 0; i < p->count; i++) s.written += tfm_numel(list[i].tensor) * tfm_dtype_size(list[i].tensor->dtype);
    tfm__free_to(&p->allocator, list);
    return s.written;
}

TFM_API tfm_status tfm_params_save_memory(tfm_ctx *c, const tfm_params *p, void *buffer, int64_t size) {
    const tfm_status busy = tfm__verb_begin(c);
    const int64_t need = busy || !p ? 0 : tfm_params_saved_size(p);
    int64_t *order = NULL;
    tfm__named *list;
    tfm__sink s;
    if (busy) return busy;
    if (!p || !buffer) {
        tfm__fail(c, TFM_INVALID, "tfm_params_save_memory: %s is NULL", p ? "buffer" : "params");
    } else if (p->sizes_only) {
        tfm__fail(c, TFM_INVALID, "tfm_params_save_memory: this store has no memory");
    } else if (need >= 0 && size < need) {
        tfm__fail(c, TFM_INVALID, "tfm_params_save_memory: %lld bytes are needed, the buffer has %lld", (long long)need,
                  (long long)size);
    } else if (need < 0 || (list = tfm__params_list(p, &order)) == NULL) {
        tfm__fail(c, TFM_OOM, "tfm_params_save_memory: no memory for a list of %lld parameters", (long long)p->count);
    } else {
        memset(&s, 0, sizeof s);
        s.fd = -1;
        s.memory = (char *)buffer;
        if (tfm__save_order(c, list, p->count, order) == TFM_OK) tfm__save_to(&s, list, p->count, order);
        tfm__free_to(&p->allocator, list);
    }
    return tfm__verb_end(c);
}

#if !defined(TFM_NO_STDIO)
/* A new file under a name of its own beside `path`; tfm__replace_end puts it in the place of `path`, or removes it. */
typedef struct tfm__replace {
    tfm__sink sink;
    char *temporary;
} tfm__replace;

static tfm_status tfm__replace_begin(tfm_ctx *c, tfm__replace *r, const char *path) {
    const int64_t room = (int64_t)strlen(path) + 32;
    int attempt, mode = TFM__CREATE_MODE;
#if !TFM__WINDOWS
    struct stat old;
    if (!stat(path, &old)) mode = (int)(old.st_mode & 0777); /* a private file stays private */
#endif
    memset(r, 0, sizeof *r);
    r->sink.fd = -1;
    r->temporary = (char *)tfm__alloc(c, room);
    if (!r->temporary) return TFM_OOM;
    for (attempt = 0; attempt < 100 && r->sink.fd < 0; attempt++) {
        const uint64_t mix =
            (uint64_t)(tfm__now() * 1e9) ^ tfm__thread_id() ^ (uint64_t)(uintptr_t)r ^ (uint64_t)attempt << 32;
        tfm__format(r->temporary, room, "%s.tmp%08lx", path, (unsigned long)((mix * 0x9E3779B97F4A7C15u) >> 32));
        r->sink.fd = TFM__FD(open)(r->temporary, TFM__CREATE_FLAGS, mode);
    }
    if (r->sink.fd >= 0) return TFM_OK;
    tfm__free(c, r->temporary);
    return tfm__fail(c, TFM_IO, "%.300s: no file can be created beside it", path);
}

/* The new name must reach the disk too, or a crash brings the old file back. */
static void tfm__folder_sync(tfm_ctx *c, const char *path) {
#if !TFM__WINDOWS
    char *folder = tfm__path_beside(c, path, ".");
    const int fd = folder ? open(folder, O_RDONLY) : -1;
    if (fd >= 0) {
        (void)fsync(fd);
        close(fd);
    }
    tfm__free(c, folder);
#else
    (void)c;
    (void)path;
#endif
}

static tfm_status tfm__replace_end(tfm_ctx *c, tfm__replace *r, const char *path) {
    int bad = r->sink.failed != 0 || tfm__failed(c);
#if TFM__WINDOWS
    bad |= _commit(r->sink.fd) != 0;
#else
    bad |= fsync(r->sink.fd) != 0;
#endif
    bad |= TFM__FD(close)(r->sink.fd) != 0;
    if (!bad) {
#if TFM__WINDOWS
        bad = !MoveFileExA(r->temporary, path, MOVEFILE_REPLACE_EXISTING);
#else
        bad = rename(r->temporary, path) != 0;
#endif
    }
    if (bad) (void)remove(r->temporary);
    else tfm__folder_sync(c, path);
    tfm__free(c, r->temporary);
    return bad ? tfm__fail(c, TFM_IO, "%.300s: cannot be written", path) : TFM_OK;
}

TFM_API tfm_status tfm_write_file(tfm_ctx *c, const char *path, const void *data, int64_t size) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm__replace r;
    if (busy) return busy;
    if (!path || size < 0 || (size && !data)) {
        tfm__fail(c, TFM_INVALID, "tfm_write_file: path or data is NULL, or size negative");
    } else if (tfm__replace_begin(c, &r, path) == TFM_OK) {
        tfm__sink_put(&r.sink, data, size);
        tfm__replace_end(c, &r, path);
    }
    return tfm__verb_end(c);
}

static void tfm__save_file(tfm_ctx *c, const char *path, tfm__named *list, int64_t count, int64_t *order) {
    tfm__replace r;
    if (tfm__save_order(c, list, count, order) != TFM_OK || tfm__replace_begin(c, &r, path) != TFM_OK) return;
    tfm__save_to(&r.sink, list, count, order);
    tfm__replace_end(c, &r, path);
}

TFM_API tfm_status tfm_params_save(tfm_ctx *c, const tfm_params *p, const char *path) {
    const tfm_status busy = tfm__verb_begin(c);
    int64_t *order = NULL;
    tfm__named *list;
    if (busy) return busy;
    if (!p || !path || p->sizes_only) {
        tfm__fail(c, TFM_INVALID, "tfm_params_save: %s",
                  p ? path ? "this store has no memory" : "path is NULL" : "params is NULL");
    } else if ((list = tfm__params_list(p, &order)) == NULL) {
        tfm__fail(c, TFM_OOM, "tfm_params_save: no memory for a list of %lld parameters", (long long)p->count);
    } else {
        tfm__save_file(c, path, list, p->count, order);
        tfm__free_to(&p->allocator, list);
    }
    return tfm__verb_end(c);
}

TFM_API tfm_status tfm_save_tensors(tfm_ctx *c, const char *path, const char *const *names,
                                    const tfm_tensor *const *tensors, int64_t count) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm__named *list = NULL;
    int64_t *order = NULL, i, bytes = 0;
    if (busy) return busy;
    if (!path || count < 0 || (count && (!names || !tensors))
        || !tfm__mul(count, (int64_t)(sizeof *list + sizeof *order), &bytes)) {
        tfm__fail(c, TFM_INVALID, "tfm_save_tensors: path, names or tensors is NULL, or count is %lld",
                  (long long)count);
    } else if (c->dry) {
        tfm__fail(c, TFM_INVALID,
                  "tfm_save_tensors: results have no data between tfm_measure_begin and tfm_measure_end");
    } else {
        list = (tfm__named *)tfm__alloc(c, tfm__max64(count * (int64_t)sizeof *list, 1));
        order = (int64_t *)tfm__alloc(c, tfm__max64(count * (int64_t)sizeof *order, 1));
    }
    for (i = 0; list && order && i < count; i++) {
        list[i].name = names[i];
        list[i].tensor = tensors[i];
        list[i].rank = 0;
        if (!names[i] || !tfm__alive(tensors[i]))
            tfm__fail(c, TFM_INVALID, "tfm_save_tensors: name or tensor number %lld is NULL or dead", (long long)i);
    }
    if (list && order && !tfm__failed(c)) tfm__save_file(c, path, list, count, order);
    tfm__free(c, order);
    tfm__free(c, list);
    return tfm__verb_end(c);
}

TFM_API const void *tfm_read_file(tfm_ctx *c, const char *path, int64_t *size) {
    tfm__bytes b;
    char *data = NULL;
    if (size) *size = 0;
    if (tfm__verb_begin(c)) return NULL;
    if (!path) {
        tfm__fail(c, TFM_INVALID, "tfm_read_file: path is NULL");
    } else if (tfm__bytes_open(c, path, &b) == TFM_OK) {
        data =
            (char *)tfm__arena_meta(c, b.size + 1); /* real in a dry run too: what is read decides what happens next */
        if (data) {
            if (b.size) memcpy(data, b.data, (size_t)b.size);
            data[b.size] = 0;
            if (size) *size = b.size;
        }
        tfm__bytes_close(&c->allocator, &b);
    }
    tfm__release(c);
    return data;
}
#endif /* TFM_NO_STDIO */
#endif /* chapter 13 */

/* ==================================================================================================================
 *  14  MODELS, TOKENIZERS
 *
 *  Checkpoints of known families as a tfm_transformer_config and parameters under tfm_transformer's names, and the
 *  tokenizers that go with them. What a file says about sizes is checked against the size of the file before memory
 *  is taken.
 * ================================================================================================================ */
#if defined(TRANSFORMER_IMPLEMENTATION) && !defined(TFM__PASS) && !defined(TFM__IMPLEMENTED) && !defined(TFM_NO_MODELS)

/* Little-endian words at any address. */
static int32_t tfm__i32_at(const unsigned char *p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

static float tfm__f32_at(const unsigned char *p) {
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* -- llama2.c, version 0 ------------------------------------------------------------------------------------------- */

enum { TFM__LLAMA2C_HEAD = 28, TFM__LLAMA2C_MAGIC = 0x616b3432 /* first word of versions 1 and 2 */ };

/* Sizes that the rows of tfm__llama2c_parts name. */
enum {
    TFM__SIZE_ONE,
    TFM__SIZE_D,
    TFM__SIZE_FF,
    TFM__SIZE_VOCAB,
    TFM__SIZE_Q,
    TFM__SIZE_KV,
    TFM__SIZE_ROPE,
    TFM__SIZE_COUNT
};

/* The file's parts in their order; a part of layers has all layers one after the other. Rows from row `q` q's and
 * `kv` kv's of the parameter: queries, keys and values become one in_proj_weight. */
static const struct tfm__llama2c_part {
    const char *name;                  /* NULL: not needed (tables of RoPE) */
    int layered, rows, columns;        /* columns TFM__SIZE_ONE: a vector */
    int after_q, after_kv;             /* which rows of the parameter they are */
} tfm__llama2c_parts[] = {
    {"tgt_embedding.weight", 0, TFM__SIZE_VOCAB, TFM__SIZE_D, 0, 0},
    {"norm1.weight", 1, TFM__SIZE_D, TFM__SIZE_ONE, 0, 0},
    {"self_attn.in_proj_weight", 1, TFM__SIZE_Q, TFM__SIZE_D, 0, 0},
    {"self_attn.in_proj_weight", 1, TFM__SIZE_KV, TFM__SIZE_D, 1, 0},
    {"self_attn.in_proj_weight", 1, TFM__SIZE_KV, TFM__SIZE_D, 1, 1},
    {"self_attn.out_proj.weight", 1, TFM__SIZE_D, TFM__SIZE_Q, 0, 0},
    {"norm2.weight", 1, TFM__SIZE_D, TFM__SIZE_ONE, 0, 0},
    {"linear_gate.weight", 1, TFM__SIZE_FF, TFM__SIZE_D, 0, 0},
    {"linear2.weight", 1, TFM__SIZE_D, TFM__SIZE_FF, 0, 0},
    {"linear1.weight", 1, TFM__SIZE_FF, TFM__SIZE_D, 0, 0},
    {"decoder.norm.weight", 0, TFM__SIZE_D, TFM__SIZE_ONE, 0, 0},
    {NULL, 0, TFM__SIZE_ROPE, TFM__SIZE_ONE, 0, 0},
    {"generator.weight", 0, TFM__SIZE_VOCAB, TFM__SIZE_D, 0, 0}, /* only there when the head is not the embedding */
};

typedef struct tfm__llama2c {
    tfm_ctx *c;
    tfm_params *p;
    const unsigned char *data;
    int64_t size;
    int64_t sizes[TFM__SIZE_COUNT];
    int64_t layers;
    int parts;                         /* rows of the table that the file has */
    void (*drop)(const void *user, const void *data,
                 int64_t size); /* told what has been copied; NULL: nobody wants to know */
    const void *user;
} tfm__llama2c;

/* Bytes of one layer of a part. 0: they do not fit. */
static int tfm__llama2c_bytes(const tfm__llama2c *l, const struct tfm__llama2c_part *part, int64_t *bytes) {
    return tfm__mul(l->sizes[part->rows], l->sizes[part->columns], bytes)
           && tfm__mul(*bytes, (int64_t)sizeof(float), bytes);
}

static tfm_status tfm__llama2c_head(tfm__llama2c *l, tfm_transformer_config *config) {
    static const char *const names[7] = {"dim",        "hidden_dim", "n_layers", "n_heads",
                                         "n_kv_heads", "vocab_size", "seq_len"};
    int64_t h[7], total = TFM__LLAMA2C_HEAD, bytes = 0;
    int i, fits = 1;
    if (l->size < TFM__LLAMA2C_HEAD)
        return tfm__fail(l->c, TFM_FORMAT, "llama2.c: %lld bytes are no checkpoint", (long long)l->size);
    for (i = 0; i < 7; i++) h[i] = tfm__i32_at(l->data + 4 * i);
    if (h[0] == TFM__LLAMA2C_MAGIC)
        return tfm__fail(l->c, TFM_UNSUPPORTED, "llama2.c: only checkpoints of version 0 are read");
    l->parts = (int)TFM__COUNT(tfm__llama2c_parts) - (h[5] > 0);
    if (h[5] < 0) h[5] = -h[5];
    for (i = 0; i < 7; i++)
        if (h[i] <= 0) return tfm__fail(l->c, TFM_FORMAT, "llama2.c: %s is %lld", names[i], (long long)h[i]);
    if (h[0] % h[3] || h[3] % h[4] || h[0] / h[3] % 2)
        return tfm__fail(l->c, TFM_FORMAT, "llama2.c: dim %lld, %lld heads, %lld key/value heads do not go together",
                         (long long)h[0], (long long)h[3], (long long)h[4]);
    l->layers = h[2];
    l->sizes[TFM__SIZE_ONE] = 1;
    l->sizes[TFM__SIZE_D] = l->sizes[TFM__SIZE_Q] = h[0];
    l->sizes[TFM__SIZE_FF] = h[1];
    l->sizes[TFM__SIZE_VOCAB] = h[5];
    l->sizes[TFM__SIZE_KV] = h[0] / h[3] * h[4];
    l->sizes[TFM__SIZE_ROPE] = h[0] / h[3] * h[6];
    for (i = 0; i < l->parts && fits; i++)
        fits = tfm__llama2c_bytes(l, &tfm__llama2c_parts[i], &bytes) &&
               tfm__mul(bytes, tfm__llama2c_parts[i].layered ? l->layers : 1, &bytes) && tfm__add(total, bytes, &total);
    if (!fits || total != l->size)
        return tfm__fail(l->c, TFM_FORMAT,
                         "llama2.c: a model of dim %lld, hidden_dim %lld, %lld layers, vocabulary %lld takes %lld "
                         "bytes%s, the file has %lld",
                         (long long)h[0], (long long)h[1], (long long)h[2], (long long)h[5], (long long)total,
                         fits ? "" : " and more", (long long)l->size);
    memset(config, 0, sizeof *config);
    config->kind = TFM_DECODER_ONLY;
    config->position = TFM_POSITION_ROTARY;
    config->decoder_layers = h[2];
    config->target_vocab = h[5];
    config->max_length = h[6];
    config->tied_head = l->parts < (int)TFM__COUNT(tfm__llama2c_parts);
    config->block.norm_first = 1;
    config->block.norm = TFM_RMS_NORM;
    config->block.norm_eps = 1e-5f;
    config->block.activation = TFM_ACT_SILU;
    config->block.gated = 1;
    config->block.no_bias = 1;
    config->block.d_model = h[0];
    config->block.heads = h[3];
    config->block.kv_heads = h[4];
    config->block.d_ff = h[1];
    config->block.rotary = 1;
    config->block.rope.interleaved = 1;
    return TFM_OK;
}

/* One layer's share of a part, `bytes` at `from`, into its parameter. */
static tfm_status tfm__llama2c_copy(tfm__llama2c *l, const struct tfm__llama2c_part *part, int64_t layer,
                                    const unsigned char *from, int64_t bytes) {
    const int64_t columns = l->sizes[part->columns];
    const int64_t row = part->after_q * l->sizes[TFM__SIZE_Q] + part->after_kv * l->sizes[TFM__SIZE_KV];
    const int fused = !strcmp(part->name, "self_attn.in_proj_weight");
    const int64_t rows = fused ? l->sizes[TFM__SIZE_Q] + 2 * l->sizes[TFM__SIZE_KV] : l->sizes[part->rows];
    char name[96];
    tfm__param *q;
    if (part->layered) tfm__format(name, (int64_t)sizeof name, "decoder.layers.%lld.%s", (long long)layer, part->name);
    else tfm__format(name, (int64_t)sizeof name, "%s", part->name);
    if (!tfm__params_get(l->c, l->p, name, TFM_F32,
                         part->columns == TFM__SIZE_ONE ? tfm_shape1(rows) : tfm_shape2(rows, columns), NULL))
        return tfm__status(l->c);
    q = tfm__param_of(l->p, name);
    if (tfm__param_unpack(l->c, q) != TFM_OK) return tfm__status(l->c);
    memcpy((float *)q->tensor.data + row * columns, from, (size_t)bytes);
    if (l->drop) l->drop(l->user, from, bytes);
    return TFM_OK;
}

/* What is told of a checkpoint before this is in *l. */
static tfm_status tfm__llama2c_run(tfm__llama2c *l, tfm_transformer_config *config) {
    const unsigned char *from = l->data + TFM__LLAMA2C_HEAD;
    int64_t layer, bytes = 0;
    int i;
    if (l->p->sizes_only) return tfm__fail(l->c, TFM_INVALID, "llama2.c: this store has no memory");
    if (tfm__llama2c_head(l, config) != TFM_OK) return tfm__status(l->c);
    for (i = 0; i < l->parts; i++) {
        const struct tfm__llama2c_part *part = &tfm__llama2c_parts[i];
        tfm__llama2c_bytes(l, part, &bytes);
        for (layer = 0; layer < (part->layered ? l->layers : 1); layer++, from += bytes)
            if (part->name && tfm__llama2c_copy(l, part, layer, from, bytes) != TFM_OK) return tfm__status(l->c);
    }
    return TFM_OK;
}

TFM_API tfm_status tfm_llama2c_load_memory(tfm_ctx *c, tfm_params *p, const void *data, int64_t size,
                                           tfm_transformer_config *config) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm__llama2c l;
    if (busy) return busy;
    memset(&l, 0, sizeof l);
    l.c = c;
    l.p = p;
    l.data = (const unsigned char *)data;
    l.size = size;
    if (!p || !data || !config || size < 0)
        tfm__fail(c, TFM_INVALID, "tfm_llama2c_load_memory: params, data or config is NULL, or size negative");
    else tfm__llama2c_run(&l, config);
    return tfm__verb_end(c);
}

/* -- tokenizers ---------------------------------------------------------------------------------------------------- */

enum { TFM__TOKENS_LLAMA2C, TFM__TOKENS_LINES };
enum { TFM__LLAMA2C_BEGIN = 1, TFM__LLAMA2C_END = 2, TFM__LLAMA2C_BYTES = 3 /* id of byte 0 */ };

struct tfm_tokenizer {
    tfm_allocator allocator;
    int kind;
    int64_t size;
    int64_t unknown;                   /* of lines: id for other words, -1: none */
    char *text;                        /* " token\0" after each other: the space is there for those who want it */
    int64_t *at;                       /* size + 1 places of the spaces */
    int64_t *sorted;                   /* ids by text, then number */
    float *scores;                     /* of llama2.c */
    char bytes[512];                   /* every byte as a string */
};

static const char *tfm__token(const tfm_tokenizer *t, int64_t id) { return t->text + t->at[id] + 1; }
static int64_t tfm__token_length(const tfm_tokenizer *t, int64_t id) { return t->at[id + 1] - t->at[id] - 2; }

static int tfm__token_less(const void *user, int64_t a, int64_t b) {
    const tfm_tokenizer *t = (const tfm_tokenizer *)user;
    const int order = strcmp(tfm__token(t, a), tfm__token(t, b));
    return order ? order < 0 : a < b;
}

/* Order of a token against the text a + b. */
static int tfm__token_order(const tfm_tokenizer *t, int64_t id, const char *a, int64_t a_length, const char *b,
                            int64_t b_length) {
    const char *s = tfm__token(t, id);
    const int64_t length = tfm__token_length(t, id), head = tfm__min64(length, a_length),
                  rest = tfm__min64(length - head, b_length);
    int order = head > 0 ? memcmp(s, a, (size_t)head) : 0;
    if (!order && rest > 0) order = memcmp(s + head, b, (size_t)rest);
    if (order) return order;
    return length < a_length + b_length ? -1 : length > a_length + b_length;
}

/* The least id whose text is a + b; -1: none. */
static int64_t tfm__token_find(const tfm_tokenizer *t, const char *a, int64_t a_length, const char *b,
                               int64_t b_length) {
    int64_t low = 0, high = t->size;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (tfm__token_order(t, t->sorted[middle], a, a_length, b, b_length) < 0) low = middle + 1;
        else high = middle;
    }
    return low < t->size && !tfm__token_order(t, t->sorted[low], a, a_length, b, b_length) ? t->sorted[low] : -1;
}

TFM_API void tfm_tokenizer_destroy(tfm_tokenizer *t) {
    tfm_allocator a;
    if (!t) return;
    a = t->allocator;
    tfm__free_to(&a, t->text);
    tfm__free_to(&a, t->at);
    tfm__free_to(&a, t->sorted);
    tfm__free_to(&a, t->scores);
    tfm__free_to(&a, t);
}

/* Room for `size` tokens with `bytes` bytes of text. NULL: the error is set. */
static tfm_tokenizer *tfm__tokenizer_new(tfm_ctx *c, int kind, int64_t size, int64_t bytes) {
    tfm_tokenizer *t = (tfm_tokenizer *)tfm__alloc_shared(c, (int64_t)sizeof *t, 0);
    int i;
    if (!t) return NULL;
    memset(t, 0, sizeof *t);
    t->allocator = c->allocator;
    t->kind = kind;
    t->size = size;
    t->unknown = -1;
    for (i = 0; i < 256; i++) t->bytes[2 * i] = (char)(unsigned char)i;
    t->text = (char *)tfm__alloc_shared(c, bytes + 2 * size + 1, 0);
    t->at = t->text ? (int64_t *)tfm__alloc_shared(c, (size + 1) * (int64_t)sizeof *t->at, 0) : NULL;
    t->sorted = t->at ? (int64_t *)tfm__alloc_shared(c, (size + 1) * (int64_t)sizeof *t->sorted, 0) : NULL;
    if (t->sorted && kind == TFM__TOKENS_LLAMA2C)
        t->scores = (float *)tfm__alloc_shared(c, (size + 1) * (int64_t)sizeof *t->scores, 0);
    if (t->sorted && (t->scores || kind != TFM__TOKENS_LLAMA2C)) {
        t->at[0] = 0;
        return t;
    }
    tfm_tokenizer_destroy(t);
    return NULL;
}

/* Token number id, after those before it. */
static void tfm__tokenizer_put(tfm_tokenizer *t, int64_t id, const unsigned char *text, int64_t length) {
    char *to = t->text + t->at[id];
    to[0] = ' ';
    if (length) memcpy(to + 1, text, (size_t)length);
    to[1 + length] = 0;
    t->at[id + 1] = t->at[id] + length + 2;
}

static tfm_tokenizer *tfm__tokenizer_done(tfm_tokenizer *t) {
    int64_t i;
    for (i = 0; i < t->size; i++) t->sorted[i] = i;
    tfm__sort(t->sorted, t->size, tfm__token_less, t);
    return t;
}

/* Longest token, then score, length, bytes of each. */
TFM_API tfm_tokenizer *tfm_tokenizer_llama2c_memory(tfm_ctx *c, const void *data, int64_t size, int64_t vocab) {
    const unsigned char *p = (const unsigned char *)data;
    tfm_tokenizer *t = NULL;
    int64_t at = 4, i;
    if (tfm__verb_begin(c)) return NULL;
    if (!data || size < 0 || vocab < 1)
        tfm__fail(c, TFM_INVALID, "tfm_tokenizer_llama2c: data is NULL, or size or vocab (%lld) is not positive",
                  (long long)vocab);
    else if (vocab > (size - 4) / 8)
        tfm__fail(c, TFM_FORMAT, "tfm_tokenizer_llama2c: %lld tokens do not fit into %lld bytes", (long long)vocab,
                  (long long)size);
    else t = tfm__tokenizer_new(c, TFM__TOKENS_LLAMA2C, vocab, size);
    for (i = 0; t && i < vocab && !tfm__failed(c); i++) {
        const int64_t length = size - at >= 8 ? tfm__i32_at(p + at + 4) : -1;
        if (length < 0 || length > size - at - 8 || memchr(p + at + 8, 0, (size_t)length)) {
            tfm__fail(c, TFM_FORMAT, "tfm_tokenizer_llama2c: token %lld of %lld: its length or a NUL in it is wrong",
                      (long long)i, (long long)vocab);
        } else {
            t->scores[i] = tfm__f32_at(p + at);
            tfm__tokenizer_put(t, i, p + at + 8, length);
            at += 8 + length;
        }
    }
    if (t && !tfm__failed(c) && at != size)
        tfm__fail(c, TFM_FORMAT,
                  "tfm_tokenizer_llama2c: %lld bytes are left after %lld tokens: another vocabulary size?",
                  (long long)(size - at), (long long)vocab);
    if (t && tfm__failed(c)) {
        tfm_tokenizer_destroy(t);
        t = NULL;
    }
    tfm__release(c);
    return t ? tfm__tokenizer_done(t) : NULL;
}

TFM_API tfm_tokenizer *tfm_tokenizer_lines_memory(tfm_ctx *c, const void *data, int64_t size, int64_t unknown) {
    const unsigned char *p = (const unsigned char *)data;
    tfm_tokenizer *t = NULL;
    int64_t i, begin = 0, end, lines = 0;
    if (tfm__verb_begin(c)) return NULL;
    for (i = 0; data && i < size; i++) lines += p[i] == '\n' || i == size - 1;
    if (size < 0 || (size && !data)) tfm__fail(c, TFM_INVALID, "tfm_tokenizer_lines: data is NULL or size negative");
    else if (unknown < -1 || unknown >= lines)
        tfm__fail(c, TFM_INVALID, "tfm_tokenizer_lines: unknown is %lld, the ids are 0 to %lld", (long long)unknown,
                  (long long)lines - 1);
    else if (size && memchr(p, 0, (size_t)size))
        tfm__fail(c, TFM_FORMAT, "tfm_tokenizer_lines: there is a NUL in the text");
    else t = tfm__tokenizer_new(c, TFM__TOKENS_LINES, lines, size);
    for (i = 0; t && i < lines; i++, begin = end + 1) {
        for (end = begin; end < size && p[end] != '\n';) end++;
        tfm__tokenizer_put(t, i, p + begin, end - begin - (end > begin && p[end - 1] == '\r'));
    }
    if (t) t->unknown = unknown;
    tfm__release(c);
    return t ? tfm__tokenizer_done(t) : NULL;
}

TFM_API int64_t tfm_tokenizer_size(const tfm_tokenizer *t) { return t ? t->size : 0; }

TFM_API int64_t tfm_tokenizer_find(const tfm_tokenizer *t, const char *token) {
    return t && token ? tfm__token_find(t, token, (int64_t)strlen(token), "", 0) : -1;
}

/* -- text to ids --------------------------------------------------------------------------------------------------- */

/* A pair of neighbours that the vocabulary has as one token. */
typedef struct tfm__merge { int64_t left, left_id, right_id, id; float score; } tfm__merge;

typedef struct tfm__merger {
    const tfm_tokenizer *t;
    int64_t *ids, *next, *previous;    /* of `count` places, -1 at both ends; a place whose id is -1 was merged away */
    tfm__merge *heap;                  /* best score first, of equals the leftmost */
    int64_t heap_count;
} tfm__merger;

static int tfm__merge_before(const tfm__merge *a, const tfm__merge *b) {
    return a->score > b->score || (!(a->score < b->score) && a->left < b->left);
}

static void tfm__merge_swap(tfm__merge *a, tfm__merge *b) {
    const tfm__merge kept = *a;
    *a = *b;
    *b = kept;
}

/* Puts the pair at `left` into the heap when it can be merged. */
static void tfm__merge_offer(tfm__merger *m, int64_t left) {
    const int64_t right = left >= 0 ? m->next[left] : -1;
    int64_t i = m->heap_count;
    tfm__merge *e = &m->heap[i];
    if (right < 0) return;
    e->left = left;
    e->left_id = m->ids[left];
    e->right_id = m->ids[right];
    e->id = tfm__token_find(m->t, tfm__token(m->t, e->left_id), tfm__token_length(m->t, e->left_id),
                            tfm__token(m->t, e->right_id), tfm__token_length(m->t, e->right_id));
    e->score = e->id >= 0 ? m->t->scores[e->id] : 0.0f;
    if (e->id < 0 || !(e->score > -1e10f)) return; /* llama2.c's bound; NaN never merges */
    m->heap_count++;
    for (; i && tfm__merge_before(&m->heap[i], &m->heap[(i - 1) / 2]); i = (i - 1) / 2)
        tfm__merge_swap(&m->heap[i], &m->heap[(i - 1) / 2]);
}

static tfm__merge tfm__merge_best(tfm__merger *m) {
    const tfm__merge best = m->heap[0];
    int64_t i = 0, child;
    m->heap[0] = m->heap[--m->heap_count];
    for (; (child = 2 * i + 1) < m->heap_count; i = child) {
        if (child + 1 < m->heap_count && tfm__merge_before(&m->heap[child + 1], &m->heap[child])) child++;
        if (!tfm__merge_before(&m->heap[child], &m->heap[i])) break;
        tfm__merge_swap(&m->heap[i], &m->heap[child]);
    }
    return best;
}

/* Merges the best pair until no pair can be merged, as llama2.c does, but in n log n steps. Returns how many ids are
 * left. */
static int64_t tfm__merge_all(tfm__merger *m, int64_t count) {
    int64_t i, left = 0;
    for (i = 0; i < count; i++) {
        m->previous[i] = i - 1;
        m->next[i] = i + 1 < count ? i + 1 : -1;
    }
    for (i = 0; i < count; i++) tfm__merge_offer(m, i);
    while (m->heap_count) {
        const tfm__merge best = tfm__merge_best(m);
        const int64_t right = m->next[best.left];
        if (m->ids[best.left] != best.left_id || right < 0 || m->ids[right] != best.right_id)
            continue; /* of another time */
        m->ids[best.left] = best.id;
        m->ids[right] = -1;
        m->next[best.left] = m->next[right];
        if (m->next[right] >= 0) m->previous[m->next[right]] = best.left;
        m->next[right] = -1;
        tfm__merge_offer(m, m->previous[best.left]);
        tfm__merge_offer(m, best.left);
    }
    for (i = 0; i < count; i++)
        if (m->ids[i] >= 0) m->ids[left++] = m->ids[i];
    return left;
}

/* The ids of single characters: a space in front, then UTF-8 characters, and bytes for those that the vocabulary
 * lacks. Returns their number, -1: the vocabulary has not even that. */
static int64_t tfm__llama2c_characters(const tfm_tokenizer *t, const char *text, int64_t *ids) {
    int64_t n = 0, length, i, id;
    ids[n++] = tfm__token_find(t, " ", 1, "", 0);
    for (; *text; text += length) {
        for (length = 1; length < 4 && ((unsigned char)text[length] & 0xC0) == 0x80;) length++;
        id = tfm__token_find(t, text, length, "", 0);
        if (id >= 0) ids[n++] = id;
        else
            for (i = 0; i < length; i++) ids[n++] = (unsigned char)text[i] + TFM__LLAMA2C_BYTES;
    }
    for (i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= t->size) return -1;
    return n;
}

static tfm_status tfm__llama2c_encode(tfm_ctx *c, const tfm_tokenizer *t, const char *text, int64_t *ids,
                                      int64_t *count) {
    const int64_t room = (int64_t)strlen(text) + 1;
    tfm__merger m;
    int64_t bytes = 0;
    memset(&m, 0, sizeof m);
    *count = 0;
    if (!*text) return TFM_OK;
    *count = tfm__llama2c_characters(t, text, ids);
    if (*count < 0)
        return tfm__fail(c, TFM_INVALID, "tfm_tokenizer_encode: the vocabulary has no token for a space or for a byte");
    m.t = t;
    m.ids = ids;
    /* every merge offers two pairs more and takes one place away */
    if (tfm__mul(room, 3 * (int64_t)sizeof *m.heap + 2 * (int64_t)sizeof *m.next, &bytes))
        m.heap = (tfm__merge *)tfm__alloc(c, bytes);
    if (!m.heap)
        return tfm__failed(c) ? tfm__status(c) : tfm__fail(c, TFM_OOM, "tfm_tokenizer_encode: the text is too long");
    m.next = (int64_t *)(void *)(m.heap + 3 * room);
    m.previous = m.next + room;
    *count = tfm__merge_all(&m, *count);
    tfm__free(c, m.heap);
    return TFM_OK;
}

/* Words between spaces. */
static tfm_status tfm__lines_encode(tfm_ctx *c, const tfm_tokenizer *t, const char *text, int64_t *ids,
                                    int64_t *count) {
    *count = 0;
    while (*text) {
        const size_t length = strcspn(text, " ");
        int64_t id = length ? tfm__token_find(t, text, (int64_t)length, "", 0) : -1;
        if (length && id < 0) id = t->unknown;
        if (length && id < 0)
            return tfm__fail(c, TFM_INVALID, "tfm_tokenizer_encode: \"%.*s\" is not in the vocabulary",
                             (int)tfm__min64((int64_t)length, 100), text);
        if (length) ids[(*count)++] = id;
        text += length + (text[length] == ' ');
    }
    return TFM_OK;
}

static int64_t tfm__token_special(const tfm_tokenizer *t, int end) {
    if (t->kind == TFM__TOKENS_LLAMA2C) return end ? TFM__LLAMA2C_END : TFM__LLAMA2C_BEGIN;
    return tfm_tokenizer_find(t, end ? "</s>" : "<s>");
}

TFM_API tfm_status tfm_tokenizer_encode(tfm_ctx *c, const tfm_tokenizer *t, const char *text, int begin, int end,
                                        int64_t **ids, int64_t *count) {
    const tfm_status busy = tfm__verb_begin(c);
    int64_t *list = NULL, n = 0;
    if (ids) *ids = NULL;
    if (count) *count = 0;
    if (busy) return busy;
    if (!t || !text || !ids || !count) {
        tfm__fail(c, TFM_INVALID, "tfm_tokenizer_encode: an argument is NULL");
    } else if ((begin && tfm__token_special(t, 0) < 0) || (end && tfm__token_special(t, 1) < 0)) {
        tfm__fail(c, TFM_INVALID, "tfm_tokenizer_encode: the vocabulary has no <s> or </s>");
    } else {
        list = (int64_t *)tfm__arena_meta(c, ((int64_t)strlen(text) + 3)
                                                 * (int64_t)sizeof *list); /* real in a dry run: shapes come from it */
    }
    if (list) {
        if (begin) list[0] = tfm__token_special(t, 0);
        (t->kind == TFM__TOKENS_LLAMA2C ? tfm__llama2c_encode : tfm__lines_encode)(c, t, text, list + (begin != 0), &n);
        n += begin != 0;
        if (end && !tfm__failed(c)) list[n++] = tfm__token_special(t, 1);
    }
    if (list && !tfm__failed(c)) {
        *ids = list;
        *count = n;
    }
    return tfm__verb_end(c);
}

/* -- ids to text --------------------------------------------------------------------------------------------------- */

static int tfm__hex_digit(char digit) {
    const char *all = "0123456789ABCDEF0123456789abcdef", *found = digit ? strchr(all, digit) : NULL;
    return found ? (int)((found - all) % 16) : -1;
}

/* llama2.c: "<0x0A>" is a byte, and after the begin id one leading space goes away. Lines: a space between words. */
TFM_API const char *tfm_tokenizer_piece(const void *tokenizer, int64_t previous, int64_t id, int64_t *length) {
    const tfm_tokenizer *t = (const tfm_tokenizer *)tokenizer;
    const char *s;
    int high, low;
    if (length) *length = 0;
    if (!t || id < 0 || id >= t->size) return "";
    s = tfm__token(t, id);
    if (t->kind == TFM__TOKENS_LINES) {
        if (previous >= 0) s--;
    } else {
        if (previous == TFM__LLAMA2C_BEGIN && s[0] == ' ') s++;
        if (!strncmp(s, "<0x", 3) && (high = tfm__hex_digit(s[3])) >= 0 && (low = tfm__hex_digit(s[4])) >= 0
            && s[5] == '>')
            s = t->bytes + 2 * (16 * high + low); /* byte 0 is an empty text */
    }
    if (length) *length = (int64_t)strlen(s);
    return s;
}

/* Begin and end ids give no text. */
TFM_API const char *tfm_tokenizer_decode(tfm_ctx *c, const tfm_tokenizer *t, const int64_t *ids, int64_t count) {
    tfm__text text;
    int64_t i, length = 0, previous = -1;
    if (tfm__verb_begin(c)) return NULL;
    memset(&text, 0, sizeof text);
    text.c = c;
    if (!t || count < 0 || (count && !ids))
        tfm__fail(c, TFM_INVALID, "tfm_tokenizer_decode: tokenizer or ids is NULL, or count negative");
    tfm__text_bytes(&text, "", 0);
    for (i = 0; i < count && !tfm__failed(c); i++) {
        const char *piece;
        if (ids[i] < 0 || ids[i] >= t->size) {
            tfm__fail(c, TFM_INVALID, "tfm_tokenizer_decode: id %lld is not in [0, %lld)", (long long)ids[i],
                      (long long)t->size);
            break;
        }
        piece = tfm_tokenizer_piece(t, previous, ids[i], &length);
        if (ids[i] != tfm__token_special(t, 0) && ids[i] != tfm__token_special(t, 1)) {
            tfm__text_bytes(&text, piece, length);
            previous = ids[i];
        } else if (t->kind == TFM__TOKENS_LLAMA2C) {
            previous = ids[i];
        }
    }
    tfm__release(c);
    return tfm__failed(c) ? NULL : text.s ? text.s : "";
}

/* -- from files ---------------------------------------------------------------------------------------------------- */

#if !defined(TFM_NO_STDIO) && !defined(TFM_NO_FILES)
static void tfm__llama2c_drop(const void *bytes, const void *data, int64_t size) {
    tfm__bytes_drop((const tfm__bytes *)bytes, data, size);
}

TFM_API tfm_status tfm_llama2c_load(tfm_ctx *c, tfm_params *p, const char *path, tfm_transformer_config *config) {
    const tfm_status busy = tfm__verb_begin(c);
    tfm__bytes b;
    tfm__llama2c l;
    if (busy) return busy;
    if (!p || !path || !config) {
        tfm__fail(c, TFM_INVALID, "tfm_llama2c_load: params, path or config is NULL");
    } else if (tfm__bytes_open(c, path, &b) == TFM_OK) {
        memset(&l, 0, sizeof l);
        l.c = c;
        l.p = p;
        l.data = b.data;
        l.size = b.size;
        l.drop = tfm__llama2c_drop;
        l.user = &b;
        tfm__llama2c_run(&l, config);
        tfm__bytes_close(&c->allocator, &b);
    }
    return tfm__verb_end(c);
}

/* A tokenizer file through its parser of memory; `number` is the parser's last argument. */
static tfm_tokenizer *tfm__tokenizer_open(tfm_ctx *c, const char *path, int64_t number,
                                          tfm_tokenizer *(*parse)(tfm_ctx *c, const void *data, int64_t size,
                                                                  int64_t number)) {
    tfm_tokenizer *t = NULL;
    tfm__bytes b;
    if (tfm__verb_begin(c)) return NULL;
    if (!path) {
        tfm__fail(c, TFM_INVALID, "tfm_tokenizer: path is NULL");
    } else if (tfm__bytes_open(c, path, &b) == TFM_OK) {
        t = parse(c, b.data, b.size, number);
        tfm__bytes_close(&c->allocator, &b);
    }
    tfm__release(c);
    return t;
}

TFM_API tfm_tokenizer *tfm_tokenizer_llama2c(tfm_ctx *c, const char *path, int64_t vocab) {
    return tfm__tokenizer_open(c, path, vocab, tfm_tokenizer_llama2c_memory);
}

TFM_API tfm_tokenizer *tfm_tokenizer_lines(tfm_ctx *c, const char *path, int64_t unknown) {
    return tfm__tokenizer_open(c, path, unknown, tfm_tokenizer_lines_memory);
}
#endif
#endif /* chapter 14 */

#if defined(TRANSFORMER_IMPLEMENTATION) && !defined(TFM__PASS) && !defined(TFM__IMPLEMENTED)
TFM__STRICT_FP_END
#define TFM__IMPLEMENTED
/* Nothing private stays defined behind the header. */
#undef TFM__ACC_AT
#undef TFM__ACC_BIAS
#undef TFM__ACC_DECLARE
#undef TFM__ACC_LOAD
#undef TFM__ACC_STEP
#undef TFM__ACC_STORE
#undef TFM__ACTIVATION_CASE
#undef TFM__ACTIVATION_LIST
#undef TFM__ACTIVATION_LOOP
#undef TFM__ACTIVATION_UNARY
#undef TFM__ADD1
#undef TFM__AHEAD_CACHED
#undef TFM__ALIGN
#undef TFM__ALWAYS_INLINE
#undef TFM__AND1
#undef TFM__ANGLE_COLUMNS
#undef TFM__ANGLE_RUN
#undef TFM__ARM64
#undef TFM__ASAN
#undef TFM__ATLEAST1
#undef TFM__ATMOST1
#undef TFM__ATOMICS
#undef TFM__ATTN_ROWS
#undef TFM__ATTN_SIZE
#undef TFM__ATTN_TILES
#undef TFM__AVX2
#undef TFM__AVX512
#undef TFM__BEST
#undef TFM__BINARY_CASE
#undef TFM__BINARY_LIST
#undef TFM__BINARY_LOOP
#undef TFM__BINARY_OP
#undef TFM__BINARY_OPS
#undef TFM__BLOCK_K
#undef TFM__BLOCK_KEYS
#undef TFM__B_SIZE
#undef TFM__BLOCK_M
#undef TFM__BODY_COLS
#undef TFM__BODY_KEEP
#undef TFM__BODY_ROWS
#undef TFM__B_KEEP
#undef TFM__B_LOAD
#undef TFM__CACHED_BYTES
#undef TFM__CACHE_FIELDS
#undef TFM__CACHE_VERSION
#undef TFM__CAST_CHUNK
#undef TFM__CHOICE_LOOP
#undef TFM__CHUNK
#undef TFM__CHUNKS
#undef TFM__CHUNK_BYTES
#undef TFM__CLOCK_GETTIME
#undef TFM__COLS1
#undef TFM__COLS2
#undef TFM__COLS4
#undef TFM__COLS8
#undef TFM__COL_LOAD
#undef TFM__COL_ROWS
#undef TFM__COL_STEP
#undef TFM__COL_STEP_
#undef TFM__COST_CURVE
#undef TFM__COST_SIMPLE
#undef TFM__COUNT
#undef TFM__CPUS
#undef TFM__CPU_SET
#undef TFM__CREATE_FLAGS
#undef TFM__CREATE_MODE
#undef TFM__DIV1
#undef TFM__DONTNEED
#undef TFM__DRY_ADDRESS
#undef TFM__EDGE
#undef TFM__EDGE_COLS
#undef TFM__EDGE_FETCH
#undef TFM__EDGE_LOOP
#undef TFM__EDGE_PART
#undef TFM__EDGE_PUT
#undef TFM__EDGE_ROW_FETCH
#undef TFM__EDGE_ROW_PUT
#undef TFM__EDGE_STEP
#undef TFM__EDGE_STEPS
#undef TFM__EDGE_STEPS_
#undef TFM__EDGE_WHOLE
#undef TFM__EQ1
#undef TFM__FD
#undef TFM__FETCH_CACHED
#undef TFM__FETCH_LINE
#undef TFM__FETCH_LINES
#undef TFM__FETCH_NEAR
#undef TFM__FETCH_NONE
#undef TFM__FEW_KEYS
#undef TFM__FILL_CHUNK
#undef TFM__FLIP_COLS
#undef TFM__FLIP_LOOP
#undef TFM__FLIP_ROWS
#undef TFM__FMA1
#undef TFM__FN
#undef TFM__FNMA1
#undef TFM__FOLD
#undef TFM__FROM1
#undef TFM__GATE_INSIDE
#undef TFM__GATE_JOB
#undef TFM__GATE_OPEN
#undef TFM__GATE_SLOTS
#undef TFM__GATE_WORD
#undef TFM__GATHER
#undef TFM__GROUPS
#undef TFM__HALVES
#undef TFM__GT1
#undef TFM__HAS_FEATURE
#undef TFM__HAVE_AVX2
#undef TFM__HAVE_AVX512
#undef TFM__HAVE_BF16_DOT
#undef TFM__HALVES_ROWS
#undef TFM__HAVE_NEON
#undef TFM__HAVE_X86
#undef TFM__HEADERS
#undef TFM__HEADER_MOST
#undef TFM__HEADER_REST
#undef TFM__HEAT_HEAD
#undef TFM__HEAT_LABEL
#undef TFM__HEAT_MOST
#undef TFM__HEAT_SIDE
#undef TFM__HUGEPAGE
#undef TFM__INLINE
#undef TFM__JSON_DEPTH
#undef TFM__KEEP_MAX
#undef TFM__KEY_PANEL
#undef TFM__LANES1
#undef TFM__LANES2
#undef TFM__LANES3
#undef TFM__LANES_MEMORY
#undef TFM__LAST_LOAD
#undef TFM__LAST_ROW
#undef TFM__LAST_STEP
#undef TFM__LE1
#undef TFM__LINUX
#undef TFM__LOAD_LOOP
#undef TFM__LOOP
#undef TFM__LOOPS_FEW
#undef TFM__LOOPS_MANY
#undef TFM__LOOPS_ONCE
#undef TFM__LT1
#undef TFM__MASK_AT
#undef TFM__MASK_FAR
#undef TFM__MASK_REACH
#undef TFM__MAX_THREADS
#undef TFM__MESSAGE_BYTES
#undef TFM__MOVE_LOOP
#undef TFM__MUL1
#undef TFM__NAME_MAX
#undef TFM__NAN1
#undef TFM__NEAR
#undef TFM__NEAR_BYTES
#undef TFM__NEGATIVE1
#undef TFM__NEON
#undef TFM__NEXT_LINE
#undef TFM__NOINLINE
#undef TFM__NORM_NEAR
#undef TFM__NORM_ROWS
#undef TFM__NORM_SHORT
#undef TFM__NOT1
#undef TFM__OPS
#undef TFM__OP_ATTRS
#undef TFM__OP_ENUM
#undef TFM__OP_INPUTS
#undef TFM__OP_ROW
#undef TFM__OP_SAVED
#undef TFM__OP_TEXTS
#undef TFM__OR1
#undef TFM__PACKED
#undef TFM__PACK_COLS
#undef TFM__PACK_ROWS
#undef TFM__PACK_SOON
#undef TFM__PAIRS
#undef TFM__PANEL
#undef TFM__PIECE
#undef TFM__PLAIN
#undef TFM__PLAIN_FEW
#undef TFM__PLAIN_ROW
#undef TFM__PLAIN_ROW_LINE
#undef TFM__PLAIN_STRIPS
#undef TFM__PRINTF
#undef TFM__PRINT_EDGE
#undef TFM__PRINT_LIMIT
#undef TFM__PRINT_WIDTH
#undef TFM__PRODUCT_A
#undef TFM__PRODUCT_B
#undef TFM__PRODUCT_BIAS
#undef TFM__PRODUCT_BIASES
#undef TFM__PRODUCT_C
#undef TFM__PRODUCT_COLS
#undef TFM__PRODUCT_END
#undef TFM__PRODUCT_HIGH
#undef TFM__PRODUCT_NARROW
#undef TFM__RANDOM_RUN
#undef TFM__READS
#undef TFM__REDUCE_COLUMNS
#undef TFM__REDUCE_FOLD
#undef TFM__REDUCE_PART
#undef TFM__REDZONE
#undef TFM__ROTATE
#undef TFM__ROTATE_GET
#undef TFM__ROTATE_PUT
#undef TFM__ROWS1
#undef TFM__ROWS10
#undef TFM__ROWS11
#undef TFM__ROWS12
#undef TFM__ROWS2
#undef TFM__ROWS3
#undef TFM__ROWS4
#undef TFM__ROWS5
#undef TFM__ROWS6
#undef TFM__ROWS7
#undef TFM__ROWS8
#undef TFM__ROWS9
#undef TFM__ROW_BIAS
#undef TFM__ROW_DECLARE
#undef TFM__ROW_LOAD
#undef TFM__ROW_STEP
#undef TFM__ROW_STORE
#undef TFM__RUN
#undef TFM__SAME1
#undef TFM__SAMPLE_STREAM
#undef TFM__SCALAR
#undef TFM__SCRATCH_BYTES
#undef TFM__SHAPE_TEXT
#undef TFM__SINCOS_LIMIT
#undef TFM__SLAB_BYTES
#undef TFM__SMALL_WORK
#undef TFM__SOFTMAX_LONG
#undef TFM__SPIN_US
#undef TFM__STACK_BYTES
#undef TFM__STARS_MOST
#undef TFM__STORE_FEW
#undef TFM__STORE_INT
#undef TFM__STORE_LOOP
#undef TFM__STORE_MANY
#undef TFM__STORE_ONCE
#undef TFM__STREAM_AHEAD
#undef TFM__STRICT_FP_BEGIN
#undef TFM__STRICT_FP_END
#undef TFM__SUB1
#undef TFM__SUM_CHUNK
#undef TFM__SUM_PRODUCTS
#undef TFM__SUM_SQUARES
#undef TFM__SUM_X
#undef TFM__SUPER_BLOCKS
#undef TFM__SUPER_KEYS
#undef TFM__TEAM_BYTES
#undef TFM__THREADS
#undef TFM__TILE
#undef TFM__TILE_COLS
#undef TFM__TILE_BF16
#undef TFM__TILE_F16
#undef TFM__TILE_F32
#undef TFM__TILE_KEEP
#undef TFM__TILE_LIST
#undef TFM__TILE_LIST_HALVES
#undef TFM__TILE_LIST_KEEP
#undef TFM__TILE_LIST_LOW
#undef TFM__TILE_LIST_PAIRS
#undef TFM__TILE_NAME_BF16
#undef TFM__TILE_NAME_F16
#undef TFM__TILE_NAME_F32
#undef TFM__TILE_NAME_KEEP
#undef TFM__TILE_NAME_PAIRS
#undef TFM__TILE_PAIRS
#undef TFM__TILE_ROWS
#undef TFM__TURNED
#undef TFM__TURN_DECLARE
#undef TFM__TURN_PUT
#undef TFM__TURN_STEP
#undef TFM__T_AHEAD
#undef TFM__T_FEW
#undef TFM__T_HALF
#undef TFM__T_LINE
#undef TFM__T_LINES
#undef TFM__T_LOAD
#undef TFM__T_PAIR
#undef TFM__T_QUAD
#undef TFM__T_ROWS
#undef TFM__T_STORE
#undef TFM__T_ZIP
#undef TFM__UNARY_CASE
#undef TFM__UNARY_LIST
#undef TFM__UNARY_LOOP
#undef TFM__UNARY_OP
#undef TFM__UNARY_OPS
#undef TFM__UNUSED
#undef TFM__VOP
#undef TFM__W
#undef TFM__WALK
#undef TFM__WINDOWS
#undef TFM__WORK_PER_SLOT
#undef TFM__X86
#undef TFM__X87
#undef TFM__XOR1
#undef TFM__X_LOAD
#undef TFM__X_STEP
#endif

#else /* TFM__PREFIX_PASS: every public symbol, seen only when TFM_PREFIX is defined */
#define tfm_create TFM__PREFIXED(tfm_create)
#define tfm_destroy TFM__PREFIXED(tfm_destroy)
#define tfm_error TFM__PREFIXED(tfm_error)
#define tfm_status_of TFM__PREFIXED(tfm_status_of)
#define tfm_status_name TFM__PREFIXED(tfm_status_name)
#define tfm_clear TFM__PREFIXED(tfm_clear)
#define tfm_cancel TFM__PREFIXED(tfm_cancel)
#define tfm_isa_name TFM__PREFIXED(tfm_isa_name)
#define tfm_isa_supported TFM__PREFIXED(tfm_isa_supported)
#define tfm_threads TFM__PREFIXED(tfm_threads)
#define tfm_version TFM__PREFIXED(tfm_version)
#define tfm_seed TFM__PREFIXED(tfm_seed)
#define tfm_mark TFM__PREFIXED(tfm_mark)
#define tfm_rewind TFM__PREFIXED(tfm_rewind)
#define tfm_keep TFM__PREFIXED(tfm_keep)
#define tfm_memory_usage TFM__PREFIXED(tfm_memory_usage)
#define tfm_memory_reset TFM__PREFIXED(tfm_memory_reset)
#define tfm_measure_begin TFM__PREFIXED(tfm_measure_begin)
#define tfm_measure_end TFM__PREFIXED(tfm_measure_end)
#define tfm_profile_start TFM__PREFIXED(tfm_profile_start)
#define tfm_profile_stop TFM__PREFIXED(tfm_profile_stop)
#define tfm_profile_count TFM__PREFIXED(tfm_profile_count)
#define tfm_profile_get TFM__PREFIXED(tfm_profile_get)
#define tfm_profile TFM__PREFIXED(tfm_profile)
#define tfm_shape1 TFM__PREFIXED(tfm_shape1)
#define tfm_shape2 TFM__PREFIXED(tfm_shape2)
#define tfm_shape3 TFM__PREFIXED(tfm_shape3)
#define tfm_shape4 TFM__PREFIXED(tfm_shape4)
#define tfm_shape5 TFM__PREFIXED(tfm_shape5)
#define tfm_shape6 TFM__PREFIXED(tfm_shape6)
#define tfm_shape_of TFM__PREFIXED(tfm_shape_of)
#define tfm_shape_like TFM__PREFIXED(tfm_shape_like)
#define tfm_numel TFM__PREFIXED(tfm_numel)
#define tfm_is_contiguous TFM__PREFIXED(tfm_is_contiguous)
#define tfm_dtype_name TFM__PREFIXED(tfm_dtype_name)
#define tfm_dtype_size TFM__PREFIXED(tfm_dtype_size)
#define tfm_empty TFM__PREFIXED(tfm_empty)
#define tfm_zeros TFM__PREFIXED(tfm_zeros)
#define tfm_ones TFM__PREFIXED(tfm_ones)
#define tfm_full TFM__PREFIXED(tfm_full)
#define tfm_randn TFM__PREFIXED(tfm_randn)
#define tfm_uniform TFM__PREFIXED(tfm_uniform)
#define tfm_arange TFM__PREFIXED(tfm_arange)
#define tfm_from TFM__PREFIXED(tfm_from)
#define tfm_wrap TFM__PREFIXED(tfm_wrap)
#define tfm_wrap_strided TFM__PREFIXED(tfm_wrap_strided)
#define tfm_reshape TFM__PREFIXED(tfm_reshape)
#define tfm_view TFM__PREFIXED(tfm_view)
#define tfm_transpose TFM__PREFIXED(tfm_transpose)
#define tfm_permute TFM__PREFIXED(tfm_permute)
#define tfm_slice TFM__PREFIXED(tfm_slice)
#define tfm_narrow TFM__PREFIXED(tfm_narrow)
#define tfm_select TFM__PREFIXED(tfm_select)
#define tfm_expand TFM__PREFIXED(tfm_expand)
#define tfm_squeeze TFM__PREFIXED(tfm_squeeze)
#define tfm_unsqueeze TFM__PREFIXED(tfm_unsqueeze)
#define tfm_split_heads TFM__PREFIXED(tfm_split_heads)
#define tfm_combine_heads TFM__PREFIXED(tfm_combine_heads)
#define tfm_contiguous TFM__PREFIXED(tfm_contiguous)
#define tfm_clone TFM__PREFIXED(tfm_clone)
#define tfm_cast TFM__PREFIXED(tfm_cast)
#define tfm_copy TFM__PREFIXED(tfm_copy)
#define tfm_cat TFM__PREFIXED(tfm_cat)
#define tfm_stack TFM__PREFIXED(tfm_stack)
#define tfm_pad TFM__PREFIXED(tfm_pad)
#define tfm_gather TFM__PREFIXED(tfm_gather)
#define tfm_index_select TFM__PREFIXED(tfm_index_select)
#define tfm_tril TFM__PREFIXED(tfm_tril)
#define tfm_triu TFM__PREFIXED(tfm_triu)
#define tfm_masked_fill TFM__PREFIXED(tfm_masked_fill)
#define tfm_where TFM__PREFIXED(tfm_where)
#define tfm_get TFM__PREFIXED(tfm_get)
#define tfm_set TFM__PREFIXED(tfm_set)
#define tfm_item TFM__PREFIXED(tfm_item)
#define tfm_read TFM__PREFIXED(tfm_read)
#define tfm_format TFM__PREFIXED(tfm_format)
#define tfm_print TFM__PREFIXED(tfm_print)
#define tfm_add TFM__PREFIXED(tfm_add)
#define tfm_sub TFM__PREFIXED(tfm_sub)
#define tfm_mul TFM__PREFIXED(tfm_mul)
#define tfm_div TFM__PREFIXED(tfm_div)
#define tfm_minimum TFM__PREFIXED(tfm_minimum)
#define tfm_maximum TFM__PREFIXED(tfm_maximum)
#define tfm_scale TFM__PREFIXED(tfm_scale)
#define tfm_shift TFM__PREFIXED(tfm_shift)
#define tfm_neg TFM__PREFIXED(tfm_neg)
#define tfm_abs TFM__PREFIXED(tfm_abs)
#define tfm_exp TFM__PREFIXED(tfm_exp)
#define tfm_log TFM__PREFIXED(tfm_log)
#define tfm_sqrt TFM__PREFIXED(tfm_sqrt)
#define tfm_rsqrt TFM__PREFIXED(tfm_rsqrt)
#define tfm_sin TFM__PREFIXED(tfm_sin)
#define tfm_cos TFM__PREFIXED(tfm_cos)
#define tfm_tanh TFM__PREFIXED(tfm_tanh)
#define tfm_sigmoid TFM__PREFIXED(tfm_sigmoid)
#define tfm_relu TFM__PREFIXED(tfm_relu)
#define tfm_gelu TFM__PREFIXED(tfm_gelu)
#define tfm_gelu_tanh TFM__PREFIXED(tfm_gelu_tanh)
#define tfm_gelu_quick TFM__PREFIXED(tfm_gelu_quick)
#define tfm_silu TFM__PREFIXED(tfm_silu)
#define tfm_activation TFM__PREFIXED(tfm_activation)
#define tfm_pow TFM__PREFIXED(tfm_pow)
#define tfm_clamp TFM__PREFIXED(tfm_clamp)
#define tfm_glu TFM__PREFIXED(tfm_glu)
#define tfm_compare TFM__PREFIXED(tfm_compare)
#define tfm_compare_scalar TFM__PREFIXED(tfm_compare_scalar)
#define tfm_sum TFM__PREFIXED(tfm_sum)
#define tfm_mean TFM__PREFIXED(tfm_mean)
#define tfm_max TFM__PREFIXED(tfm_max)
#define tfm_min TFM__PREFIXED(tfm_min)
#define tfm_logsumexp TFM__PREFIXED(tfm_logsumexp)
#define tfm_argmax TFM__PREFIXED(tfm_argmax)
#define tfm_topk TFM__PREFIXED(tfm_topk)
#define tfm_softmax TFM__PREFIXED(tfm_softmax)
#define tfm_log_softmax TFM__PREFIXED(tfm_log_softmax)
#define tfm_matmul TFM__PREFIXED(tfm_matmul)
#define tfm_linear TFM__PREFIXED(tfm_linear)
#define tfm_embedding TFM__PREFIXED(tfm_embedding)
#define tfm_layer_norm TFM__PREFIXED(tfm_layer_norm)
#define tfm_rms_norm TFM__PREFIXED(tfm_rms_norm)
#define tfm_dropout TFM__PREFIXED(tfm_dropout)
#define tfm_set_requires_grad TFM__PREFIXED(tfm_set_requires_grad)
#define tfm_tape_length TFM__PREFIXED(tfm_tape_length)
#define tfm_tape_clear TFM__PREFIXED(tfm_tape_clear)
#define tfm_mask_causal TFM__PREFIXED(tfm_mask_causal)
#define tfm_mask_keep TFM__PREFIXED(tfm_mask_keep)
#define tfm_mask_ignore TFM__PREFIXED(tfm_mask_ignore)
#define tfm_mask_nonzero TFM__PREFIXED(tfm_mask_nonzero)
#define tfm_mask_additive TFM__PREFIXED(tfm_mask_additive)
#define tfm_mask_padding TFM__PREFIXED(tfm_mask_padding)
#define tfm_mask_matrix TFM__PREFIXED(tfm_mask_matrix)
#define tfm_alibi_slopes TFM__PREFIXED(tfm_alibi_slopes)
#define tfm_relative_bucket TFM__PREFIXED(tfm_relative_bucket)
#define tfm_attention TFM__PREFIXED(tfm_attention)
#define tfm_weighted_sequence TFM__PREFIXED(tfm_weighted_sequence)
#define tfm_weighted_pool TFM__PREFIXED(tfm_weighted_pool)
#define tfm_heatmap_svg TFM__PREFIXED(tfm_heatmap_svg)
#define tfm_heatmap_text TFM__PREFIXED(tfm_heatmap_text)
#define tfm_cache_create TFM__PREFIXED(tfm_cache_create)
#define tfm_cache_destroy TFM__PREFIXED(tfm_cache_destroy)
#define tfm_cache_memory TFM__PREFIXED(tfm_cache_memory)
#define tfm_cache_append TFM__PREFIXED(tfm_cache_append)
#define tfm_attention_cached TFM__PREFIXED(tfm_attention_cached)
#define tfm_cache_length TFM__PREFIXED(tfm_cache_length)
#define tfm_cache_capacity TFM__PREFIXED(tfm_cache_capacity)
#define tfm_cache_truncate TFM__PREFIXED(tfm_cache_truncate)
#define tfm_cache_reset TFM__PREFIXED(tfm_cache_reset)
#define tfm_cache_slide TFM__PREFIXED(tfm_cache_slide)
#define tfm_cache_reorder TFM__PREFIXED(tfm_cache_reorder)
#define tfm_cache_fork TFM__PREFIXED(tfm_cache_fork)
#define tfm_cache_saved_size TFM__PREFIXED(tfm_cache_saved_size)
#define tfm_cache_save TFM__PREFIXED(tfm_cache_save)
#define tfm_cache_load TFM__PREFIXED(tfm_cache_load)
#define tfm_params_create TFM__PREFIXED(tfm_params_create)
#define tfm_params_destroy TFM__PREFIXED(tfm_params_destroy)
#define tfm_params_add TFM__PREFIXED(tfm_params_add)
#define tfm_params_wrap TFM__PREFIXED(tfm_params_wrap)
#define tfm_params_find TFM__PREFIXED(tfm_params_find)
#define tfm_params_count TFM__PREFIXED(tfm_params_count)
#define tfm_params_name TFM__PREFIXED(tfm_params_name)
#define tfm_params_at TFM__PREFIXED(tfm_params_at)
#define tfm_params_bytes TFM__PREFIXED(tfm_params_bytes)
#define tfm_params_strict TFM__PREFIXED(tfm_params_strict)
#define tfm_params_prepare TFM__PREFIXED(tfm_params_prepare)
#define tfm_params_write_begin TFM__PREFIXED(tfm_params_write_begin)
#define tfm_params_write_end TFM__PREFIXED(tfm_params_write_end)
#define tfm_params_cast TFM__PREFIXED(tfm_params_cast)
#define tfm_linear_init TFM__PREFIXED(tfm_linear_init)
#define tfm_linear_forward TFM__PREFIXED(tfm_linear_forward)
#define tfm_embedding_init TFM__PREFIXED(tfm_embedding_init)
#define tfm_embedding_forward TFM__PREFIXED(tfm_embedding_forward)
#define tfm_embedding_logits TFM__PREFIXED(tfm_embedding_logits)
#define tfm_norm_init TFM__PREFIXED(tfm_norm_init)
#define tfm_norm_forward TFM__PREFIXED(tfm_norm_forward)
#define tfm_sinusoidal TFM__PREFIXED(tfm_sinusoidal)
#define tfm_rotary TFM__PREFIXED(tfm_rotary)
#define tfm_rotary_tables TFM__PREFIXED(tfm_rotary_tables)
#define tfm_rotary_apply TFM__PREFIXED(tfm_rotary_apply)
#define tfm_feed_forward_init TFM__PREFIXED(tfm_feed_forward_init)
#define tfm_feed_forward_forward TFM__PREFIXED(tfm_feed_forward_forward)
#define tfm_mha_init TFM__PREFIXED(tfm_mha_init)
#define tfm_mha_forward TFM__PREFIXED(tfm_mha_forward)
#define tfm_mha_memory TFM__PREFIXED(tfm_mha_memory)
#define tfm_encoder_layer_init TFM__PREFIXED(tfm_encoder_layer_init)
#define tfm_encoder_layer_forward TFM__PREFIXED(tfm_encoder_layer_forward)
#define tfm_decoder_layer_init TFM__PREFIXED(tfm_decoder_layer_init)
#define tfm_decoder_layer_forward TFM__PREFIXED(tfm_decoder_layer_forward)
#define tfm_encoder_init TFM__PREFIXED(tfm_encoder_init)
#define tfm_encoder_forward TFM__PREFIXED(tfm_encoder_forward)
#define tfm_decoder_init TFM__PREFIXED(tfm_decoder_init)
#define tfm_decoder_forward TFM__PREFIXED(tfm_decoder_forward)
#define tfm_decoder_memory TFM__PREFIXED(tfm_decoder_memory)
#define tfm_transformer_init TFM__PREFIXED(tfm_transformer_init)
#define tfm_transformer_forward TFM__PREFIXED(tfm_transformer_forward)
#define tfm_transformer_encode TFM__PREFIXED(tfm_transformer_encode)
#define tfm_transformer_decode TFM__PREFIXED(tfm_transformer_decode)
#define tfm_transformer_measure TFM__PREFIXED(tfm_transformer_measure)
#define tfm_pool TFM__PREFIXED(tfm_pool)
#define tfm_l2_normalize TFM__PREFIXED(tfm_l2_normalize)
#define tfm_classifier_init TFM__PREFIXED(tfm_classifier_init)
#define tfm_classifier_forward TFM__PREFIXED(tfm_classifier_forward)
#define tfm_session_create TFM__PREFIXED(tfm_session_create)
#define tfm_session_destroy TFM__PREFIXED(tfm_session_destroy)
#define tfm_session_reset TFM__PREFIXED(tfm_session_reset)
#define tfm_session_encode TFM__PREFIXED(tfm_session_encode)
#define tfm_session_feed TFM__PREFIXED(tfm_session_feed)
#define tfm_session_feed_all TFM__PREFIXED(tfm_session_feed_all)
#define tfm_session_length TFM__PREFIXED(tfm_session_length)
#define tfm_session_truncate TFM__PREFIXED(tfm_session_truncate)
#define tfm_session_reorder TFM__PREFIXED(tfm_session_reorder)
#define tfm_session_fork TFM__PREFIXED(tfm_session_fork)
#define tfm_sample TFM__PREFIXED(tfm_sample)
#define tfm_generate TFM__PREFIXED(tfm_generate)
#define tfm_beam_search TFM__PREFIXED(tfm_beam_search)
#define tfm_file_open_memory TFM__PREFIXED(tfm_file_open_memory)
#define tfm_file_open TFM__PREFIXED(tfm_file_open)
#define tfm_file_close TFM__PREFIXED(tfm_file_close)
#define tfm_file_count TFM__PREFIXED(tfm_file_count)
#define tfm_file_name TFM__PREFIXED(tfm_file_name)
#define tfm_file_metadata TFM__PREFIXED(tfm_file_metadata)
#define tfm_file_tensor TFM__PREFIXED(tfm_file_tensor)
#define tfm_file_has TFM__PREFIXED(tfm_file_has)
#define tfm_params_load_file TFM__PREFIXED(tfm_params_load_file)
#define tfm_params_load_memory TFM__PREFIXED(tfm_params_load_memory)
#define tfm_params_saved_size TFM__PREFIXED(tfm_params_saved_size)
#define tfm_params_save_memory TFM__PREFIXED(tfm_params_save_memory)
#define tfm_params_load TFM__PREFIXED(tfm_params_load)
#define tfm_params_save TFM__PREFIXED(tfm_params_save)
#define tfm_save_tensors TFM__PREFIXED(tfm_save_tensors)
#define tfm_write_file TFM__PREFIXED(tfm_write_file)
#define tfm_read_file TFM__PREFIXED(tfm_read_file)
#define tfm_llama2c_load_memory TFM__PREFIXED(tfm_llama2c_load_memory)
#define tfm_tokenizer_llama2c_memory TFM__PREFIXED(tfm_tokenizer_llama2c_memory)
#define tfm_tokenizer_lines_memory TFM__PREFIXED(tfm_tokenizer_lines_memory)
#define tfm_llama2c_load TFM__PREFIXED(tfm_llama2c_load)
#define tfm_tokenizer_llama2c TFM__PREFIXED(tfm_tokenizer_llama2c)
#define tfm_tokenizer_lines TFM__PREFIXED(tfm_tokenizer_lines)
#define tfm_tokenizer_destroy TFM__PREFIXED(tfm_tokenizer_destroy)
#define tfm_tokenizer_size TFM__PREFIXED(tfm_tokenizer_size)
#define tfm_tokenizer_find TFM__PREFIXED(tfm_tokenizer_find)
#define tfm_tokenizer_encode TFM__PREFIXED(tfm_tokenizer_encode)
#define tfm_tokenizer_piece TFM__PREFIXED(tfm_tokenizer_piece)
#define tfm_tokenizer_decode TFM__PREFIXED(tfm_tokenizer_decode)
#endif /* TFM__PREFIX_PASS */

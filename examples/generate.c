/* generate: text from a checkpoint of llama2.c, as its own `run` prints it.
 *
 *     cc -O2 -I. examples/generate.c -o generate -lm
 *     generate MODEL.bin TOKENIZER.bin [-p PROMPT] [-n STEPS] [-t TEMPERATURE] [-s SEED]
 *
 * One prompt is fed whole, then one id at a time comes back through a callback. TFM_ISA=scalar|avx2|avx512|neon chooses
 * the instruction set. */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BEGIN = 1 }; /* llama2.c's <s>: begins a text, and ends it when the model says it */

typedef struct options {
    const char *model, *tokenizer, *prompt;
    int64_t steps;
    double temperature;
    uint64_t seed;
} options;

static int usage(void) {
    fprintf(stderr, "usage: generate MODEL.bin TOKENIZER.bin [-p PROMPT] [-n STEPS] [-t TEMPERATURE] [-s SEED]\n");
    return 2;
}

/* 0: the arguments are not as they should be. */
static int parse(int argc, char **argv, options *o) {
    char *end = NULL;
    int i;
    o->prompt = "";
    o->steps = 256;
    o->temperature = 1.0;
    o->seed = (uint64_t)time(NULL);
    if (argc < 3) return 0;
    o->model = argv[1];
    o->tokenizer = argv[2];
    for (i = 3; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        errno = 0;
        if (!strcmp(argv[i], "-p")) { o->prompt = value; continue; }
        if (!strcmp(argv[i], "-n")) o->steps = strtoll(value, &end, 10);
        else if (!strcmp(argv[i], "-t")) o->temperature = strtod(value, &end);
        else if (!strcmp(argv[i], "-s")) o->seed = strtoull(value, &end, 10);
        else return 0;
        if (errno || end == value || *end) return 0; /* not a number, or more than one */
    }
    return i == argc;
}

/* A piece of one byte that is neither printable nor white space is not shown: it is a part of some character. */
static void show(const char *text, int64_t length) {
    const int byte = length == 1 ? (unsigned char)text[0] : ' ';
    if (isprint(byte) || isspace(byte)) fwrite(text, 1, (size_t)length, stdout);
}

static int on_token(void *user, int64_t row, int64_t id, float log_probability, const char *text, int64_t length) {
    (void)user, (void)row, (void)id, (void)log_probability;
    show(text, length);
    return fflush(stdout) != 0;
}

static double seconds(void) {
#if defined(TIME_UTC)
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#else
    return (double)clock() / CLOCKS_PER_SEC; /* C99 has no better */
#endif
}

static int run(tfm_ctx *c, const options *o, tfm_params *weights) {
    static const int64_t stop = BEGIN;
    tfm_transformer_config config;
    tfm_transformer model;
    tfm_session *session = NULL;
    tfm_tokenizer *tokenizer = NULL;
    tfm_generate_options g = {0};
    tfm_sequence out = {0};
    tfm_prompt prompt = {0};
    int64_t *ids = NULL, steps, i, length;
    double begin;
    tfm_status status = tfm_llama2c_load(c, weights, o->model, &config);
    tfm_params_strict(weights, 1);
    if (!status) status = tfm_transformer_init(c, weights, "", &config, &model);
    if (!status) status = tfm_params_prepare(c, weights);
    if (!status) session = tfm_session_create(c, &model, NULL);
    if (session) tokenizer = tfm_tokenizer_llama2c(c, o->tokenizer, config.target_vocab);
    if (tokenizer) status = tfm_tokenizer_encode(c, tokenizer, o->prompt, 1, 0, &ids, &prompt.count);
    if (tokenizer && !status) {
        prompt.ids = ids;
        /* llama2.c counts a step per id that goes in; the prompt is printed without its <s> as far as the steps go */
        steps = o->steps > 0 && o->steps < config.max_length ? o->steps : config.max_length;
        for (i = 1; i < prompt.count && i <= steps; i++) {
            const char *text = tfm_tokenizer_piece(tokenizer, ids[i - 1], ids[i], &length);
            show(text, length);
        }
        g.max_new = steps - prompt.count + 1;
        g.sampling.temperature = (float)o->temperature;
        g.sampling.top_p = 0.9f;
        g.sampling.seed = o->seed;
        g.stop_ids = &stop;
        g.stop_id_count = 1;
        g.piece = tfm_tokenizer_piece;
        g.piece_user = tokenizer;
        g.on_token = on_token;
        begin = seconds();
        if (g.max_new > 0) status = tfm_generate(c, session, &prompt, 1, &g, &out);
        printf("\n");
        if (out.count)
            fprintf(stderr, "%s, %d threads: %.0f tokens/s\n", tfm_isa_name(c), tfm_threads(c),
                    (double)(prompt.count + out.count - 1) / (seconds() - begin));
    }
    tfm_tokenizer_destroy(tokenizer);
    tfm_session_destroy(session);
    return tfm_status_of(c);
}

int main(int argc, char **argv) {
    options o;
    tfm_ctx *c;
    tfm_params *weights;
    int failed;
    if (!parse(argc, argv, &o)) return usage();
    c = tfm_create(NULL);
    weights = tfm_params_create(c);
    failed = !weights || run(c, &o, weights);
    if (failed) fprintf(stderr, "generate: %s\n", tfm_error(c));
    tfm_params_destroy(weights);
    tfm_destroy(c);
    return failed || fflush(stdout) || ferror(stdout);
}

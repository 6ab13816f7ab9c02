/* The runner behind mini_criterion.h. Empty when the tests are linked with Criterion, which brings its own main. */
#if defined(TFM_MINI_CRITERION)

#include "mini_criterion.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MINI_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define MINI_SANITIZED 1
#endif
#endif

static struct mini_test *mini_first, **mini_end = &mini_first;
static const struct mini_test *mini_current;
static jmp_buf mini_leave;
static int mini_failures, mini_skipped;

void mini_register(struct mini_test *test) {
    *mini_end = test;
    mini_end = &test->next;
}

void mini_fail(const char *file, int line, int fatal, const char *expression, const char *format, ...) {
    va_list args;
    mini_failures++;
    fprintf(stderr, "%s:%d: %s/%s: ", file, line, mini_current->suite, mini_current->name);
    if (expression[0]) fprintf(stderr, "not true: %s%s", expression, format[0] ? ": " : "");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    if (fatal) longjmp(mini_leave, 1);
}

void mini_skip(const char *format, ...) {
    va_list args;
    mini_skipped = 1;
    fprintf(stderr, "skipped %s/%s: ", mini_current->suite, mini_current->name);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    longjmp(mini_leave, 1);
}

static int mini_matches(const char *pattern, const char *text) {
    if (*pattern == '*') return mini_matches(pattern + 1, text) || (*text && mini_matches(pattern, text + 1));
    if (!*pattern || !*text) return *pattern == *text;
    return *pattern == *text && mini_matches(pattern + 1, text + 1);
}

static int mini_selected(const struct mini_test *test, int argc, char **argv) {
    char full[512];
    int i, patterns = 0;
    snprintf(full, sizeof full, "%s/%s", test->suite, test->name);
    for (i = 1; i < argc; i++) {
        if (argv[i][0] == '-') continue;
        patterns++;
        if (mini_matches(argv[i], strchr(argv[i], '/') ? full : test->suite)) return 1;
    }
    return patterns == 0;
}

static int mini_flag(const char *flag, int argc, char **argv) {
    int i;
    for (i = 1; i < argc; i++)
        if (!strcmp(argv[i], flag)) return 1;
    return 0;
}

#if !defined(MINI_SANITIZED)
static void mini_crashed(int number) {
    if (mini_current)
        fprintf(stderr, "%s:%d: %s/%s: crashed with signal %d\n", mini_current->file, mini_current->line,
                mini_current->suite, mini_current->name, number);
    signal(number, SIG_DFL);
    raise(number);
}
#endif

static void mini_run(const struct mini_test *test) {
    mini_current = test;
    if (setjmp(mini_leave) == 0) {
        if (test->options->init) test->options->init();
        test->run();
    }
    if (test->options->fini && setjmp(mini_leave) == 0) test->options->fini();
}

int main(int argc, char **argv) {
    int passed = 0, failed = 0, skipped = 0;
    const struct mini_test *test;
    const int list = mini_flag("--list", argc, argv), verbose = mini_flag("--verbose", argc, argv);
#if !defined(MINI_SANITIZED)
    signal(SIGSEGV, mini_crashed);
    signal(SIGABRT, mini_crashed);
    signal(SIGFPE, mini_crashed);
    signal(SIGILL, mini_crashed);
#endif
    for (test = mini_first; test; test = test->next) {
        const int before = mini_failures;
        if (test->options->disabled || !mini_selected(test, argc, argv)) continue;
        if (list || verbose) {
            printf("%s/%s\n", test->suite, test->name);
            fflush(stdout);
            if (list) continue;
        }
        mini_skipped = 0;
        mini_run(test);
        if (mini_failures != before) failed++;
        else if (mini_skipped) skipped++;
        else passed++;
    }
    if (list) return 0;
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed || passed + skipped == 0;
}

#else
typedef int mini_criterion_not_used; /* an empty translation unit is not ISO C */
#endif

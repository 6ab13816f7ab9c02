/* A stand-in for Criterion with the same spelling, in one process: no fork, no pipe, no library. It serves where
 * Criterion cannot run: under qemu and valgrind, with sanitizers, on Windows. An assertion must be made by the
 * thread that runs the test.
 *
 *     tests                     all tests
 *     tests attention masks     two suites
 *     tests 'attention/row_*'   tests by pattern (* stands for anything)
 *     tests --list              the names, one a line
 *     tests --verbose           each name before it runs */
#ifndef MINI_CRITERION_H
#define MINI_CRITERION_H

#include <math.h>
#include <stddef.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

struct mini_options {
    int sentinel;
    void (*init)(void);
    void (*fini)(void);
    double timeout;          /* accepted and ignored: whoever starts the program limits its time */
    int disabled;
    const char *description;
};

struct mini_test {
    const char *suite, *name, *file;
    int line;
    void (*run)(void);
    const struct mini_options *options;
    struct mini_test *next;
};

void mini_register(struct mini_test *test);
/* Counts and prints a failure; with fatal set it leaves the test. */
void mini_fail(const char *file, int line, int fatal, const char *expression, const char *format, ...);
void mini_skip(const char *format, ...);

#ifdef __cplusplus
}
#endif

/* Options are written with designators (.init = f), which C++17 has not: there a test has none. */
#ifdef __cplusplus
#define MINI_OPTIONS_(...) {}
#else
#define MINI_OPTIONS_(...) {0, __VA_ARGS__}
#endif

#define Test(...) MINI_TEST_(__VA_ARGS__, )
#define MINI_TEST_(suite, name, ...)                                                                           \
    static void suite##_##name##_run(void);                                                                    \
    static const struct mini_options suite##_##name##_options = MINI_OPTIONS_(__VA_ARGS__);                    \
    static struct mini_test suite##_##name##_test = {                                                          \
        #suite, #name, __FILE__, __LINE__, suite##_##name##_run, &suite##_##name##_options, NULL};             \
    __attribute__((constructor)) static void suite##_##name##_add(void) {                                      \
        mini_register(&suite##_##name##_test);                                                                 \
    }                                                                                                          \
    static void suite##_##name##_run(void)

#define cr_skip_test(...) mini_skip("" __VA_ARGS__)

/* Every list ends with an empty format, so that the message may be left out without an empty variadic argument. */
#define MINI_CHECK_(fatal, text, holds, ...) \
    ((holds) ? (void)0 : mini_fail(__FILE__, __LINE__, fatal, text, __VA_ARGS__))
#define MINI_TRUE_(fatal, c, ...) MINI_CHECK_(fatal, #c, c, __VA_ARGS__)
#define MINI_FALSE_(fatal, c, ...) MINI_CHECK_(fatal, "!(" #c ")", !(c), __VA_ARGS__)
#define MINI_NULL_(fatal, p, ...) MINI_CHECK_(fatal, #p " == NULL", (p) == NULL, __VA_ARGS__)
#define MINI_NOT_NULL_(fatal, p, ...) MINI_CHECK_(fatal, #p " != NULL", (p) != NULL, __VA_ARGS__)
#define MINI_COMPARE_(fatal, op, a, b, ...) MINI_CHECK_(fatal, #a " " #op " " #b, (a) op (b), __VA_ARGS__)
#define MINI_STRING_(fatal, op, a, b, ...) \
    MINI_CHECK_(fatal, "strcmp(" #a ", " #b ") " #op " 0", strcmp((a), (b)) op 0, __VA_ARGS__)
#define MINI_MEMORY_(fatal, op, a, b, n, ...) \
    MINI_CHECK_(fatal, "memcmp(" #a ", " #b ", " #n ") " #op " 0", memcmp((a), (b), (n)) op 0, __VA_ARGS__)
#define MINI_NEAR_(fatal, a, b, e, ...) \
    MINI_CHECK_(fatal, "|" #a " - " #b "| <= " #e, fabs((double) (a) - (double) (b)) <= (double) (e), __VA_ARGS__)
#define MINI_FAR_(fatal, a, b, e, ...) \
    MINI_CHECK_(fatal, "|" #a " - " #b "| > " #e, fabs((double) (a) - (double) (b)) > (double) (e), __VA_ARGS__)
#define MINI_STOP_(fatal, ...) mini_fail(__FILE__, __LINE__, fatal, "", __VA_ARGS__)

#define cr_assert(...) MINI_TRUE_(1, __VA_ARGS__, "")
#define cr_assert_not(...) MINI_FALSE_(1, __VA_ARGS__, "")
#define cr_assert_null(...) MINI_NULL_(1, __VA_ARGS__, "")
#define cr_assert_not_null(...) MINI_NOT_NULL_(1, __VA_ARGS__, "")
#define cr_assert_eq(...) MINI_COMPARE_(1, ==, __VA_ARGS__, "")
#define cr_assert_neq(...) MINI_COMPARE_(1, !=, __VA_ARGS__, "")
#define cr_assert_lt(...) MINI_COMPARE_(1, <, __VA_ARGS__, "")
#define cr_assert_leq(...) MINI_COMPARE_(1, <=, __VA_ARGS__, "")
#define cr_assert_gt(...) MINI_COMPARE_(1, >, __VA_ARGS__, "")
#define cr_assert_geq(...) MINI_COMPARE_(1, >=, __VA_ARGS__, "")
#define cr_assert_str_eq(...) MINI_STRING_(1, ==, __VA_ARGS__, "")
#define cr_assert_str_neq(...) MINI_STRING_(1, !=, __VA_ARGS__, "")
#define cr_assert_arr_eq(...) MINI_MEMORY_(1, ==, __VA_ARGS__, "")
#define cr_assert_arr_neq(...) MINI_MEMORY_(1, !=, __VA_ARGS__, "")
#define cr_assert_float_eq(...) MINI_NEAR_(1, __VA_ARGS__, "")
#define cr_assert_float_neq(...) MINI_FAR_(1, __VA_ARGS__, "")
#define cr_assert_fail(...) MINI_STOP_(1, "" __VA_ARGS__)

#define cr_expect(...) MINI_TRUE_(0, __VA_ARGS__, "")
#define cr_expect_not(...) MINI_FALSE_(0, __VA_ARGS__, "")
#define cr_expect_null(...) MINI_NULL_(0, __VA_ARGS__, "")
#define cr_expect_not_null(...) MINI_NOT_NULL_(0, __VA_ARGS__, "")
#define cr_expect_eq(...) MINI_COMPARE_(0, ==, __VA_ARGS__, "")
#define cr_expect_neq(...) MINI_COMPARE_(0, !=, __VA_ARGS__, "")
#define cr_expect_lt(...) MINI_COMPARE_(0, <, __VA_ARGS__, "")
#define cr_expect_leq(...) MINI_COMPARE_(0, <=, __VA_ARGS__, "")
#define cr_expect_gt(...) MINI_COMPARE_(0, >, __VA_ARGS__, "")
#define cr_expect_geq(...) MINI_COMPARE_(0, >=, __VA_ARGS__, "")
#define cr_expect_str_eq(...) MINI_STRING_(0, ==, __VA_ARGS__, "")
#define cr_expect_str_neq(...) MINI_STRING_(0, !=, __VA_ARGS__, "")
#define cr_expect_arr_eq(...) MINI_MEMORY_(0, ==, __VA_ARGS__, "")
#define cr_expect_arr_neq(...) MINI_MEMORY_(0, !=, __VA_ARGS__, "")
#define cr_expect_float_eq(...) MINI_NEAR_(0, __VA_ARGS__, "")
#define cr_expect_float_neq(...) MINI_FAR_(0, __VA_ARGS__, "")
#define cr_expect_fail(...) MINI_STOP_(0, "" __VA_ARGS__)

#endif

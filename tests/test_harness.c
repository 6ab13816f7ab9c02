/* The helpers that the other tests trust. */
#include "test.h"

Test(harness, allocator_counts_and_sees_writes_past_the_end) {
    test_memory m = test_memory_new();
    tfm_allocator a = test_allocator(&m);
    unsigned char *p = (unsigned char *)a.alloc(a.user, 100), *q = (unsigned char *)a.alloc(a.user, 0);
    cr_assert_eq(m.blocks, 2);
    cr_assert_eq(m.bytes, 100);
    cr_assert_eq((uintptr_t)p % 64, 16u);
    p[100] = 0;
    a.free(a.user, p);
    cr_assert_eq(m.damaged, 1);
    a.free(a.user, q);
    cr_assert_eq(m.blocks, 0);
    cr_assert_eq(m.peak, 100);
    cr_assert_eq(m.damaged, 1);
}

Test(harness, allocator_fails_where_told) {
    test_memory m = test_memory_new();
    void *first, *third;
    m.fail_at = 1;
    first = test_memory_alloc(&m, 8);
    cr_assert_not_null(first);
    cr_assert_null(test_memory_alloc(&m, 8));
    third = test_memory_alloc(&m, 8);
    cr_assert_not_null(third);
    m.fail_at = m.calls;
    m.fail_on = 1;
    cr_assert_null(test_memory_alloc(&m, 8));
    cr_assert_null(test_memory_alloc(&m, 8));
    cr_assert_eq(m.failed, 3);
    test_memory_free(&m, first);
    test_memory_free(&m, third);
    assert_no_leak(&m);
}

Test(harness, ulps_count_float_spacings) {
    cr_assert_float_eq(test_ulps(1.0f, 1.0 + 1.0 / 8388608), 1, 1e-12);
    cr_assert_float_eq(test_ulps(2.0f, 2.0 - 1.0 / 8388608), 1, 1e-12); /* below a power of two the spacing halves */
    cr_assert_float_eq(test_ulps(0.0f, 1.40129846432481707e-45), 1, 1e-12);
    cr_assert_eq(test_ulps((float)HUGE_VAL, 1e300), 0);
    cr_assert_eq(test_ulps((float)NAN, (double)NAN), 0);
    cr_assert_eq(test_ulps((float)NAN, 1), HUGE_VAL);
}

Test(harness, closeness_names_the_worst_element) {
    static const float a[4] = {1, 2, 3, (float)NAN}, b[4] = {1, 2.5f, 3.75f, (float)NAN};
    char text[256];
    cr_assert(test_worst(a, a, 0, 4, 0, 0, text, sizeof text));
    cr_assert_not(test_worst(a, b, 0, 4, 1e-3, 1e-3, text, sizeof text));
    cr_assert_not_null(strstr(text, "2 of 4 elements differ; worst at 2: 3, expected 3.75"), "%s", text);
    cr_assert_eq(test_first_difference(a, b, (int64_t)sizeof a), 6);
}

Test(harness, guarded_memory_ends_at_a_page) {
    test_guarded g = test_guard(100);
    memset(g.data, 1, 100);
    cr_assert_eq(((uintptr_t)g.data + 100) % 4096, 0u);
    test_unguard(g);
}

/* Heat maps: well-formed SVG, terminal text whose columns stay in line, labels of any script. */
#include "test.h"

/* 1 when the text is a well-formed XML document of the kind that we write: tags nest, attributes are quoted, entities
 * known. */
static int well_formed(const char *s) {
    char stack[16][32];
    int depth = 0, roots = 0;
    while (*s) {
        if (*s == '&') {
            if (strncmp(s, "&amp;", 5) && strncmp(s, "&lt;", 4) && strncmp(s, "&gt;", 4) && strncmp(s, "&quot;", 6)
                && strncmp(s, "&#39;", 5)) return 0;
            s++;
        } else if (*s == '<') {
            char name[32];
            int n = 0, closing = s[1] == '/', self = 0;
            s += closing ? 2 : 1;
            while (*s && strchr(" >/", *s) == NULL && n < 31) name[n++] = *s++;
            name[n] = 0;
            if (!n) return 0;
            while (*s && *s != '>') {
                if (*s == '"') {
                    s = strchr(s + 1, '"');
                    if (!s) return 0;
                }
                if (*s == '<') return 0;
                self = *s == '/';
                s++;
            }
            if (*s++ != '>') return 0;
            if (closing) {
                if (!depth || strcmp(stack[--depth], name)) return 0;
            } else if (!self) {
                if (depth == 16) return 0;
                roots += depth == 0;
                strcpy(stack[depth++], name);
            }
        } else {
            if ((unsigned char) *s < 32 && *s != '\n') return 0;
            s++;
        }
    }
    return depth == 0 && roots == 1;
}

static tfm_tensor *pattern(tfm_ctx *c, int64_t rows, int64_t columns) {
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(rows, columns));
    int64_t i;
    for (i = 0; i < rows * columns; i++) ((float *) t->data)[i] = (float) (i * 37 % 101) / 100;
    return t;
}

static int64_t count_of(const char *s, const char *what) {
    int64_t n = 0;
    while ((s = strstr(s, what)) != NULL) n++, s++;
    return n;
}

Test(heatmap, svg_is_well_formed_at_every_size) {
    static const int64_t sizes[][2] = {{0, 0}, {1, 1}, {6, 6}, {12, 9}, {24, 24}, {60, 60}, {3, 90}, {300, 2}};
    tfm_ctx *c = tfm_create(NULL);
    size_t i;
    for (i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        const char *svg = tfm_heatmap_svg(c, pattern(c, sizes[i][0], sizes[i][1]), NULL);
        cr_assert(svg != NULL, "%s", tfm_error(c));
        cr_assert(strncmp(svg, "<svg xmlns=\"http://www.w3.org/2000/svg\"", 39) == 0);
        cr_assert(well_formed(svg), "%d: %.300s", (int) i, svg);
    }
    tfm_destroy(c);
}

Test(heatmap, svg_labels_are_escaped_and_values_written_in_small_maps) {
    static const char *const rows[2] = {"<b> & \"q\" 'a'", "new\nline \xff\xfe"};
    static const char *const columns[2] = {"\xe4\xbd\xa0\xe5\xa5\xbd", "\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d"};
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *t = pattern(c, 2, 2);
    tfm_heatmap_options o;
    const char *svg;
    memset(&o, 0, sizeof o);
    o.title = "a < b";
    o.row_labels = rows;
    o.column_labels = columns;
    svg = tfm_heatmap_svg(c, t, &o);
    cr_assert(svg != NULL, "%s", tfm_error(c));
    cr_assert(well_formed(svg));
    cr_assert_not_null(strstr(svg, "&lt;b&gt; &amp; &quot;q&quot; &#39;a&#39;"));
    cr_assert_not_null(strstr(svg, "new\xe2\x90\x8aline \xef\xbf\xbd\xef\xbf\xbd"));
    cr_assert_not_null(strstr(svg, columns[0]));
    cr_assert_not_null(strstr(svg, "a &lt; b"));
    cr_assert_not_null(strstr(svg, ">0.37<"));
    cr_assert_not_null(strstr(svg, "rotate(-60"));
    tfm_destroy(c);
}

Test(heatmap, darkest_and_lightest_are_the_ends_of_the_scale) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *t = tfm_zeros(c, TFM_SHAPE(1, 4));
    float *x = (float *) t->data;
    const char *svg, *text;
    x[1] = 0.5f;
    x[2] = 1;
    x[3] = (float) NAN;
    svg = tfm_heatmap_svg(c, t, NULL);
    cr_assert_not_null(strstr(svg, "fill=\"#08306b\""));
    cr_assert_not_null(strstr(svg, "fill=\"#bebebe\""));
    cr_assert_not_null(strstr(svg, ">nan<"));
    text = tfm_heatmap_text(c, t, NULL);
    cr_assert_not_null(strstr(text, "0   \xe2\x96\x92\xe2\x96\x92\xe2\x96\x88\xe2\x96\x88??\n"), "%s", text);
    tfm_destroy(c);
}

Test(heatmap, a_range_that_no_number_holds_is_shaded) {
    static const double ends[2][4] = {{-DBL_MAX, 0, DBL_MAX, (double) NAN}, {-5e-324, 0, 5e-324, (double) INFINITY}};
    tfm_ctx *c = tfm_create(NULL);
    tfm_heatmap_options o;
    int i;
    memset(&o, 0, sizeof o);
    for (i = 0; i < 2; i++) {
        tfm_tensor *t = tfm_from(c, TFM_F64, TFM_SHAPE(1, 4), ends[i]);
        const char *text = tfm_heatmap_text(c, t, NULL);
        cr_assert_not_null(strstr(text, "0   \xe2\x96\x92\xe2\x96\x92\xe2\x96\x88\xe2\x96\x88??\n"), "%s", text);
        o.color = 1;
        text = tfm_heatmap_text(c, t, &o);
        cr_assert_not_null(strstr(text, "\x1b[48;5;231m  \x1b[48;5;75m  \x1b[48;5;17m  \x1b[48;5;245m  "), "%s", text);
        text = tfm_heatmap_svg(c, t, NULL);
        cr_assert_not_null(strstr(text, "fill=\"#08306b\""));
        cr_assert_not_null(strstr(text, "fill=\"#6baed6\""));
    }
    tfm_destroy(c);
}

Test(heatmap, finite_numbers_are_never_written_as_infinite) {
    static const double values[4] = {-2.5e13, 1e308, 999999999999.0, -(double) INFINITY};
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *t = tfm_from(c, TFM_F64, TFM_SHAPE(1, 4), values);
    const char *svg = tfm_heatmap_svg(c, t, NULL), *text = tfm_heatmap_text(c, t, NULL);
    cr_assert_not_null(strstr(text, "\n  -2.5e+13 "), "%s", text);
    cr_assert_not_null(strstr(text, " 1e+308\n"), "%s", text);
    cr_assert_not_null(strstr(svg, ">999999999999.00<"));
    cr_assert_eq(count_of(svg, ">-2.5e+13<"), 2); /* its cell, and the scale's end */
    cr_assert_eq(count_of(svg, ">1e+308<"), 2);
    cr_assert_eq(count_of(svg, ">inf<"), 0);
    cr_assert_eq(count_of(svg, ">-inf<"), 1);
    tfm_destroy(c);
}

/* Columns of a line in a terminal: two for CJK, none for marks and direction signs. Enough for the labels used here. */
static int columns_of(const char *s, const char *end) {
    int n = 0;
    while (s < end) {
        const unsigned char b = (unsigned char) *s;
        if (b == 0xe2 && ((unsigned char) s[1] == 0x80 || (unsigned char) s[1] == 0x81)
            && memcmp(s, "\xe2\x80\xa6", 3)) n += 0;
        else if (b == 0xcc) n += 0;
        else if (b >= 0xe4 && b <= 0xe9) n += 2;
        else if ((b & 0xc0) != 0x80) n += 1;
        s += b < 0x80 ? 1 : b < 0xe0 ? 2 : b < 0xf0 ? 3 : 4;
    }
    return n;
}

Test(heatmap, terminal_rows_line_up_whatever_the_script) {
    static const char *const labels[5] =
        {"cat", "\xe4\xbd\xa0\xe5\xa5\xbd\xe4\xb8\x96\xe7\x95\x8c", "\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d",
                                          "e\xcc\x81t\xc3\xa9", "a very long label that does not fit"};
    tfm_ctx *c = tfm_create(NULL);
    tfm_heatmap_options o;
    const char *text, *line;
    int width = -1, lines = 0;
    memset(&o, 0, sizeof o);
    o.row_labels = o.column_labels = labels;
    text = tfm_heatmap_text(c, pattern(c, 5, 5), &o);
    cr_assert(text != NULL, "%s", tfm_error(c));
    for (line = text; *line && lines < 15; lines++) {
        const char *end = strchr(line, '\n');
        const int n = columns_of(line, end);
        cr_assert(width < 0 || n == width, "line %d has %d columns, others %d\n%s", lines, n, width, text);
        width = n;
        line = end + 1;
    }
    cr_assert_eq(lines, 15); /* ten of the heads, five rows */
    o.color = 1;
    text = tfm_heatmap_text(c, pattern(c, 5, 5), &o);
    cr_assert_eq(count_of(text, "\x1b[48;5;"), 30); /* and the legend's five */
    cr_assert_eq(count_of(text, "\x1b[0m"), 6);
    o.title = "Layer 3";
    text = tfm_heatmap_text(c, pattern(c, 5, 5), &o);
    cr_assert(text && !strncmp(text, "Layer 3\n", 8), "%s", text ? text : tfm_error(c));
    tfm_destroy(c);
}

Test(heatmap, any_dtype_and_stride_is_read) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *t = pattern(c, 4, 6);
    const char *a = tfm_heatmap_svg(c, tfm_transpose(c, t, 0, 1), NULL);
    const char *b = tfm_heatmap_svg(c, tfm_cast(c, tfm_contiguous(c, tfm_transpose(c, t, 0, 1)), TFM_F64), NULL);
    cr_assert_not_null(b);
    cr_assert_str_eq(a, b);
    tfm_destroy(c);
}

Test(heatmap, wrong_tensors_are_refused) {
    tfm_ctx *c = tfm_create(NULL);
    assert_refused(c, tfm_heatmap_svg(c, tfm_zeros(c, TFM_SHAPE(2, 3, 4)), NULL), TFM_INVALID);
    assert_refused(c, tfm_heatmap_text(c, tfm_zeros(c, TFM_SHAPE(5000, 3)), NULL), TFM_INVALID);
    assert_refused(c, tfm_heatmap_text(c, NULL, NULL), TFM_INVALID);
    tfm_destroy(c);
}

static void allocation_body(tfm_ctx *c, void *user) {
    (void) user;
    (void) tfm_heatmap_svg(c, tfm_zeros(c, TFM_SHAPE(60, 60)), NULL);
    (void) tfm_heatmap_text(c, tfm_zeros(c, TFM_SHAPE(60, 60)), NULL);
}

Test(heatmap, every_failing_allocation_is_an_error_and_no_leak) {
    cr_assert(test_each_allocation_failing(allocation_body, NULL, NULL) > 0);
}

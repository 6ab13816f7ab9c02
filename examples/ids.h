/* Reads lines of token ids (numbers between spaces) as a padded batch: ids (B, L) and lengths (B). Shared by examples. */
#include <stdlib.h>
#include <string.h>

#define BLANKS " \t\r\v\f"

static int read_ids(tfm_ctx *c, const char *path, tfm_tensor **ids, tfm_tensor **lengths) {
    int64_t size, rows = 0, longest = 0, *counts, *values;
    const char *text = (const char *)tfm_read_file(c, path, &size), *s;
    char *end;
    if (!text) return 1;
    for (int pass = 0; pass < 2; pass++) {                       /* first the shape, then the values */
        if (pass) {
            *ids = tfm_full(c, TFM_I64, TFM_SHAPE(rows, longest), 0);
            *lengths = tfm_full(c, TFM_I64, TFM_SHAPE(rows), 0);
            if (!*ids || !*lengths) return 1;
        }
        rows = 0;
        for (s = text; *s; ) {
            int64_t n = 0;
            counts = pass ? (int64_t *)(*lengths)->data : NULL;
            values = pass ? (int64_t *)(*ids)->data : NULL;
            /* strtoll steps over blanks, but over line ends too */
            for (s += strspn(s, BLANKS); *s && *s != '\n'; s = end + strspn(end, BLANKS)) {
                long long id = strtoll(s, &end, 10);
                if (end == s) {
                    fprintf(stderr, "%s: not a number: %.20s\n", path, s);
                    return 1;
                }
                if (pass) values[rows * longest + n] = id;
                n++;
            }
            if (*s) s++;
            if (!n) continue;
            if (pass) counts[rows] = n;
            if (n > longest) longest = n;
            rows++;
        }
    }
    return 0;
}

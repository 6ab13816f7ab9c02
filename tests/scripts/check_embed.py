#!/usr/bin/env python3
"""The ways a program takes the header in: each is built with nothing but what a user would write, linked, and run."""
import os
import shutil
from report import Report, available, read, run_all, write, HEADER

ROOT = os.getcwd()
BASE = os.path.join(ROOT, "build/check/embed")

MAIN = """%s
#include <string.h>
%s
int main(void) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *x = tfm_ones(c, tfm_shape2(2, 3));
    tfm_tensor *y = tfm_softmax(c, x, -1);
    double sum = tfm_item(tfm_sum(c, y, tfm_shape_of(0, NULL), 0));
    int bad = sum < 1.999 || sum > 2.001 || tfm_version() != TFM_VERSION || strcmp(tfm_error(c), "") != 0;
    tfm_destroy(c);
    return bad EXTRA;
}
"""
IMPLEMENT = "#define TRANSFORMER_IMPLEMENTATION\n"
OTHER = """%s
int other(void);
int other(void) {
    tfm_ctx *c = tfm_create(NULL);
    int bad = tfm_ones(c, tfm_shape1(4)) == NULL;
    tfm_destroy(c);
    return bad;
}
"""

# Function-like macros: log and others of tgmath.h, malloc and free of the program's own, names of hooks; plain words; Qt's; short
# spellings of attributes, as many programs have them.
MACROS = """#include <stdlib.h>
#include <tgmath.h>
void *my_malloc(size_t size);
void my_free(void *pointer);
#define malloc(size) my_malloc(size)
#define free(pointer) my_free(pointer)
#define alloc(a, b) (alloc of my own)
#define progress(a, b, c, d) (progress of my own)
#define parallel_for(a, b, c, d) (loop of my own)
#define logits(a, b, c, d) (logits of my own)
#define on_token(a, b, c, d, e, f) (ids of my own)
#define piece(a, b, c, d) (text of my own)
#define CACHED 8
#define COLS 8
#define FEW 8
#define KEEP 8
#define LINE 8
#define LINES 8
#define MANY 8
#define NEAR 8
#define NONE 8
#define ONCE 8
#define ROWS 8
#define emit
#define signals public
#define slots
#define always_inline inline __attribute__((__always_inline__))
#define format(a, b, c) 8
#define function static
#define noinline __attribute__((__noinline__))
#define printf my_printf
#define push(a) 8
#define target(a) 8
#define unused __attribute__((__unused__))
#define warn_unused_result __attribute__((__warn_unused_result__))
"""
MACROS_MEANT = """
void *my_malloc(size_t size) { return (malloc)(size); }
void my_free(void *pointer) { (free)(pointer); }
"""
# An allocator of the program's own: its free takes only what its malloc gave. A block of 4 MiB is a large one.
WRAPPED = """#include <stdlib.h>
void *__real_malloc(size_t size);
void __real_free(void *pointer);
void *__wrap_malloc(size_t size);
void __wrap_free(void *pointer);
static long blocks;
void *__wrap_malloc(size_t size) {
    size_t *p = (size_t *)__real_malloc(size + 16);
    if (p) *p = 4711;
    blocks += p != NULL;
    return p ? p + 2 : NULL;
}
void __wrap_free(void *pointer) {
    size_t *p = pointer ? (size_t *)pointer - 2 : NULL;
    if (p && *p != 4711) abort();
    blocks -= p != NULL;
    __real_free(p);
}
static int other(void) {
    tfm_ctx *c = tfm_create(NULL);
    int bad = tfm_ones(c, tfm_shape2(1024, 1024)) == NULL;
    long before = blocks;
    tfm_destroy(c);
    return bad || blocks >= before;
}
"""


def main_text(head, extra="", tail=""):
    return (MAIN % (head, tail)).replace("EXTRA", extra)


report = Report("check-embed")
shutil.rmtree(BASE, ignore_errors=True)
compilers = available("gcc", "clang")


def way(name, files, commands, link_header="transformer.h", links=(), cwd="."):
    """A directory with the header and `files`; each command runs in `cwd` of it for each compiler (CC)."""
    for compiler in compilers:
        directory = os.path.join(BASE, name.replace(" ", "_") + "_" + compiler)
        for path, text in files.items():
            write(os.path.join(directory, path), text)
        if link_header:
            target = os.path.join(directory, link_header)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(HEADER, target)
        for link, to in links:
            os.symlink(os.path.join(ROOT, to), os.path.join(directory, link))
        cxx = {"gcc": "g++", "clang": "clang++"}[compiler]
        filled = [[{"CC": compiler, "CXX": cxx}.get(w, w) for w in c.split()] for c in commands]
        report.attempt(f"{name}, {compiler}", lambda f=filled, d=os.path.join(directory, cwd): run_all(*f, cwd=d))


plain = main_text(IMPLEMENT + '#include "transformer.h"')
way("plain", {"app.c": plain}, ["CC -O2 app.c -lm -o app", "./app"])
way("c99", {"app.c": plain}, ["CC -std=c99 -pedantic-errors app.c -lm -o app", "./app"])
way("c11", {"app.c": plain}, ["CC -std=c11 app.c -lm -o app", "./app"])
way("c++17", {"app.cc": plain}, ["CXX -std=c++17 app.cc -o app", "./app"])
way("c++11", {"app.cc": plain}, ["CXX -std=c++11 app.cc -o app", "./app"])
way("included twice", {"app.c": main_text('#include "transformer.h"\n' + IMPLEMENT + '#include "transformer.h"\n#include "transformer.h"')},
    ["CC app.c -lm -o app", "./app"])
two = {"app.c": main_text(IMPLEMENT + '#include "transformer.h"\nint other(void);', "|| other()"), "other.c": OTHER % '#include "transformer.h"'}
way("two files", two, ["CC app.c other.c -lm -o app", "./app"])
way("C called from C++", {"impl.c": IMPLEMENT + '#include "transformer.h"\n', "app.cc": main_text('#include "transformer.h"')},
    ["CC -c impl.c", "CXX -std=c++17 app.cc impl.o -o app", "./app"])
static = "#define TFM_STATIC\n" + IMPLEMENT + '#include "transformer.h"\n'
way("TFM_STATIC in two files", {"app.c": main_text(static + "int other(void);", "|| other()"), "other.c": OTHER % static},
    ["CC -O1 -Wall -Wextra -Werror app.c other.c -lm -o app", "./app"])
way("renamed", {"app.c": main_text(IMPLEMENT + '#include "tfx.h"')}, ["CC app.c -lm -o app", "./app"], link_header="tfx.h")
way("TFM_SELF", {"app.c": main_text('#define TFM_SELF "deep/tfx.h"\n' + IMPLEMENT + '#include "deep/tfx.h"')},
    ["CC -I. app.c -lm -o app", "./app"], link_header="deep/tfx.h")
way("symlink", {"app.c": plain}, ["CC app.c -lm -o app", "./app"], link_header=None, links=[("transformer.h", HEADER)])
way("symlink of another name", {"app.c": main_text(IMPLEMENT + '#include "t.h"')}, ["CC app.c -lm -o app", "./app"], link_header=None,
    links=[("t.h", HEADER)])
way("angle brackets", {"src/app.c": main_text(IMPLEMENT + "#include <transformer.h>")},
    ["CC -Iinc -c src/app.c -o app.o", "CC app.o -lm -o app", "./app"], link_header="inc/transformer.h")
way("-isystem", {"src/app.c": main_text(IMPLEMENT + "#include <transformer.h>")},
    ["CC -isystem inc -c src/app.c -o app.o", "CC app.o -lm -o app", "./app"], link_header="inc/transformer.h")
way("relative path", {"src/app.c": main_text(IMPLEMENT + '#include "../inc/transformer.h"')},
    ["CC -c src/app.c -o app.o", "CC app.o -lm -o app", "./app"], link_header="inc/transformer.h")
way("built elsewhere", {"src/app.c": main_text(IMPLEMENT + '#include "transformer.h"'), "out/x": ""},
    ["CC -I../inc -c ../src/app.c -o app.o", "CC app.o -lm -o app", "./app"], link_header="inc/transformer.h", cwd="out")
way("prefix map", {"src/app.c": main_text(IMPLEMENT + '#include "transformer.h"')},
    ["CC -Iinc -ffile-prefix-map=inc=/gone -fmacro-prefix-map=src=/lost -c src/app.c -o app.o", "CC app.o -lm -o app", "./app"],
    link_header="inc/transformer.h")
way("symbol prefix", {"a.c": "#define TFM_PREFIX one_\n" + IMPLEMENT + '#include "transformer.h"\nint other(void);\n',
                      "app.c": main_text("#define TFM_PREFIX one_\n" + '#include "transformer.h"\nint other(void);', "|| other()"),
                      "b.c": "#define TFM_PREFIX two_\n" + OTHER % (IMPLEMENT + '#include "transformer.h"')},
    ["CC -c a.c", "CC -c b.c", "CC -c app.c", "CC a.o b.o app.o -lm -o app", "./app"])
way("shared library", {"lib.c": '#define TFM_API __attribute__((visibility("default")))\n' + IMPLEMENT + '#include "transformer.h"\n',
                       "app.c": main_text('#include "transformer.h"')},
    ["CC -fPIC -shared -fvisibility=hidden lib.c -lm -o libt.so", "CC app.c ./libt.so -lm -o app", "./app"])
way("after the system's headers", {"app.c": main_text("#include <math.h>\n#include <stdio.h>\n#include <time.h>\n" + IMPLEMENT + '#include "transformer.h"')},
    ["CC -std=c99 app.c -lm -o app", "./app"])
way("C library functions are macros", {"app.c": main_text(MACROS + IMPLEMENT + '#include "transformer.h"', tail=MACROS_MEANT)},
    ["CC -O2 app.c -lm -o app", "./app"])
way("malloc and free replaced at link time", {"app.c": main_text(IMPLEMENT + '#include "transformer.h"', "|| other()", WRAPPED)},
    ["CC -O2 -Wl,--wrap=malloc -Wl,--wrap=free app.c -lm -o app", "./app"])
report.finish()

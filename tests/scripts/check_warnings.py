#!/usr/bin/env python3
"""The header without a warning: gcc and clang, C99, C11, C++17; declarations and implementation; then other versions of
the compilers where they are installed, and the tests, examples and benchmark."""
import glob
import os
import subprocess
from report import Report, WARNINGS, available, write

PUBLIC_C = ["-Wdouble-promotion", "-Wc++-compat", "-Wstrict-prototypes"]
PUBLIC_CXX = ["-Wdouble-promotion", "-Wold-style-cast", "-Wnon-virtual-dtor"]
USE = """#include "transformer.h"
static tfm_shape shapes(int i) {
    switch (i) {
    case 1: return TFM_SHAPE(1);
    case 2: return TFM_SHAPE(1, 2);
    case 3: return TFM_SHAPE(1, 2, 3);
    case 4: return TFM_SHAPE(1, 2, 3, 4);
    case 5: return TFM_SHAPE(1, 2, 3, 4, 5);
    default: return TFM_SHAPE(1, 2, 3, 4, 5, 6);
    }
}
int use(int i);
int use(int i) {
    tfm_options o = OPEN;
    tfm_mask m = OPEN;
    o.threads = m.causal + TFM_CAUSAL_TOP_LEFT;
    return shapes(i).ndim + o.threads;
}
"""
# the two spellings of "everything zero"
ZERO_C, ZERO_CXX = USE.replace("OPEN", "{0}"), USE.replace("OPEN", "{}")

report = Report("check-warnings")
use_c, use_cxx = write("build/check/warnings/use.c", ZERO_C), write("build/check/warnings/use.cc", ZERO_CXX)
implementation = ["-O2", "-I.", "-c", "tests/impl.c", "-o", "/dev/null"]
# {0} in C++ is legal, and -Wextra's remark on the fields left out is about nothing else
zero_cxx = write("build/check/warnings/zero.cc", ZERO_C)

for compiler in available("gcc", "clang"):
    for std in ("c99", "c11"):
        report.command(f"declarations, {compiler} -std={std}",
                       [compiler, f"-std={std}", *WARNINGS, *PUBLIC_C, "-I.", "-fsyntax-only", use_c])
        report.command(f"implementation, {compiler} -std={std}", [compiler, f"-std={std}", *WARNINGS, *implementation])
for compiler in available("g++", "clang++"):
    report.command(f"declarations, {compiler} -std=c++17",
                   [compiler, "-std=c++17", *WARNINGS, *PUBLIC_CXX, "-I.", "-fsyntax-only", use_cxx])
    report.command(f"= {{0}} in C++, {compiler}", [compiler, "-std=c++17", "-Wall", "-Wpedantic", "-Werror", "-I.", "-fsyntax-only", zero_cxx])
    report.command(f"implementation, {compiler} -std=c++17", [compiler, "-std=c++17", *WARNINGS, "-x", "c++", *implementation])

# Loops are unrolled and functions inlined further here: gcc sees, and says, more.
for compiler in available("gcc", "g++"):
    language = ["-std=c++17", "-x", "c++"] if compiler == "g++" else []
    report.command(f"implementation, {compiler} -O3", [compiler, *WARNINGS, *language, "-O3", *implementation[1:]])

# What a user asks of the C library hides other functions of it.
for compiler in available("gcc", "clang", "musl-gcc"):
    for asked in ("POSIX_SOURCE", "POSIX_C_SOURCE=199309L", "POSIX_C_SOURCE=200809L", "XOPEN_SOURCE=700", "ISOC99_SOURCE", "GNU_SOURCE"):
        report.command(f"implementation, {compiler} -D_{asked}", [compiler, *WARNINGS, f"-D_{asked}", "-I.", "-fsyntax-only", "tests/impl.c"])

# No flag at all but the ones a user starts with; old and new compilers.
for compiler in available("gcc-11", "clang-13", "clang-15", "clang-16", "clang-19"):
    report.command(f"implementation, {compiler} -O1", [compiler, "-Wall", "-Wextra", "-Werror", "-O1", *implementation[1:]])

# The headers of a 32-bit system lie where check-i386 finds them; clang knows fewer instructions there without SSE2.
headers = subprocess.run(["gcc", "-print-multiarch"], stdout=subprocess.PIPE, text=True).stdout.strip()
for compiler in available("clang", "clang-19"):
    report.command(f"implementation, {compiler} -m32", [compiler, "-m32", "-idirafter", f"/usr/include/{headers}", *WARNINGS, "-O1", *implementation[1:]])

# WebAssembly, whose system maps no files and has no threads.
if os.path.isdir("/usr/include/wasm32-wasi"):
    for compiler in available("clang"):
        report.command(f"implementation, {compiler} for WASI", [compiler, "--target=wasm32-wasi", "--sysroot=/usr", *WARNINGS, *implementation])

for path in sorted(glob.glob("examples/*.c") + glob.glob("bench/[!p]*.c")):  # peers_*.c want other libraries
    for compiler in available("gcc", "clang"):
        report.command(f"{path}, {compiler}",
                       [compiler, "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-I.", "-fsyntax-only", path])
for path in sorted(glob.glob("tests/*.c")):
    for compiler in available("gcc", "clang"):
        report.command(f"{path}, {compiler}", [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-DTFM_MINI_CRITERION", "-I.", "-fsyntax-only", path])

report.finish()

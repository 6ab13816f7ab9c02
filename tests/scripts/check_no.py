#!/usr/bin/env python3
"""Every TFM_NO_* that the header knows: alone, and all that may be combined; each build is free of warnings and computes."""
import os
import re
import subprocess
from report import Report, WARNINGS, available, output_of, read, run_all, write, HEADER

SMOKE = """
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
int main(void) {
    tfm_ctx *c = tfm_create(NULL);
    tfm_tensor *q = tfm_randn(c, TFM_SHAPE(1, 2, 5, 8));
    tfm_tensor *y = tfm_attention(c, q, q, q, NULL);
    tfm_tensor *z = tfm_matmul(c, y, tfm_transpose(c, y, 2, 3));
    int bad = !z || tfm_status_of(c) != TFM_OK;
    tfm_destroy(c);
    return bad;
}
"""
MOST_SECONDS, MOST_BYTES = 20, 700000  # of `gcc -O2` with every default
TRIES = 4
report = Report("check-no")
text = read(HEADER)
macros = sorted(set(re.findall(r"\bTFM_NO_[A-Z0-9_]+\b", text)))
if not macros:
    report.attempt("macros", lambda: "the header knows no TFM_NO_*")


def build(name, defines):
    base = f"build/check/no/{name}"
    source = write(base + ".c", "".join(f"#define {d}\n" for d in defines) + SMOKE)
    problem = run_all(["gcc", "-std=c99", *WARNINGS, "-Wno-missing-field-initializers", "-Os", "-I.", "-c", source, "-o", base + ".o"],
                      ["gcc", base + ".o", "-lm", "-o", base], [base])
    return problem


for macro in macros:
    report.attempt(macro, build, macro, [macro])
report.attempt("all of them", build, "all", macros)


def no_posix(name, *compiler):
    """With all of them left out nothing is called that C99 does not have: bare metal may have no more."""
    source = write(f"build/check/no/{name}.c", "".join(f"#define {d}\n" for d in macros) + SMOKE)
    return run_all([*compiler, "-std=c99", *WARNINGS, "-Wno-missing-field-initializers", "-I.", source, "-lm", "-o", source[:-2]])


report.attempt("no POSIX", no_posix, "no-posix", "gcc", "-U__linux__")
if available("arm-none-eabi-gcc"):
    report.attempt("newlib", no_posix, "newlib", "arm-none-eabi-gcc", "-mcpu=cortex-m7", "-mthumb", "--specs=nosys.specs")
else:
    report.skip("newlib", "no arm-none-eabi-gcc")


def big_endian():
    """A file's numbers are refused where they would come out wrong, each part by its own switch; the rest compiles."""
    swap = ["gcc", "-w", "-fsyntax-only", "-I.", "-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__", "tests/impl.c"]
    for left_out, wanted in (("TFM_NO_FILES", "TFM_NO_MODELS"), ("TFM_NO_MODELS", "TFM_NO_FILES")):
        if f"define {wanted}" not in run_all([*swap, f"-D{left_out}"]):
            return f"with {left_out} nothing asks for {wanted}"
    return run_all([*swap, "-DTFM_NO_FILES", "-DTFM_NO_MODELS"])


report.attempt("big-endian", big_endian)


def sizes():
    for name, defines in (("nothing left out", []), ("all left out", macros)):
        base = "build/check/no/size"
        source = write(base + ".c", "".join(f"#define {d}\n" for d in defines) + '#define TRANSFORMER_IMPLEMENTATION\n#include "transformer.h"\n')
        problem = run_all(["gcc", "-Os", "-I.", "-c", source, "-o", base + ".o"])
        if problem:
            return problem
        columns = output_of("size", base + ".o").splitlines()[1].split()
        print(f"  object size, gcc -Os, {name}: {int(columns[0]) / 1024:.0f} KiB of code and constants")
    return ""


def defaults():
    """What a user's `cc -O2` takes: seconds of the processor and the object. Best of a few tries: what else runs on a core
    that two threads share slows it by a third."""
    os.makedirs("build/check/no", exist_ok=True)
    command = ["gcc", "-O2", "-I.", "-c", "tests/impl.c", "-o", "build/check/no/defaults.o"]
    seconds, tries = MOST_SECONDS, 0
    while seconds >= MOST_SECONDS and tries < TRIES:
        compiler = subprocess.Popen(command)
        _, status, used = os.wait4(compiler.pid, 0)
        compiler.returncode = status
        if status:
            return f"gcc: status {status}"
        seconds = used.ru_utime + used.ru_stime
        tries += 1
    total = int(output_of("size", "build/check/no/defaults.o").splitlines()[1].split()[3])
    print(f"  gcc -O2, nothing left out: {seconds:.1f} s, {total / 1000:.1f} kB of code, constants and data")
    return "" if seconds < MOST_SECONDS and total < MOST_BYTES else f"{MOST_SECONDS} s and {MOST_BYTES // 1000} kB are the most"


report.attempt("sizes", sizes)
report.attempt("defaults at -O2", defaults)
report.finish()

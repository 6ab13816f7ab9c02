#!/usr/bin/env python3
"""What the compiled library is made of: it calls nothing that ends or talks for the program, exports the public names and no other,
and has no variable data and no start-up code."""
import os
import re
from report import Report, available, output_of, public_functions, read, run_all, HEADER

FORBIDDEN = """abort exit _exit _Exit quick_exit raise signal printf vprintf fprintf vfprintf dprintf puts fputs putchar putc fputc perror
    __printf_chk __fprintf_chk __vprintf_chk __vfprintf_chk __assert_fail __assert __assert_rtn stdin stdout stderr system getchar
    __cxa_throw __gxx_personality_v0 longjmp""".split()

report = Report("check-symbols")
text = read(HEADER)
public = set(public_functions(text))


def symbols(obj):
    for line in output_of("nm", obj).splitlines():
        *_, kind, name = line.split()
        yield kind, re.sub(r"@.*", "", name)


def look(name, compiler, flags, prefix=""):
    # position-dependent code: otherwise constant tables of function pointers count as data that is relocated
    obj = f"build/check/symbols-{name}.o"
    os.makedirs("build/check", exist_ok=True)
    problem = run_all([compiler, *flags, "-fno-pic", "-fno-pie", "-I.", "-c", "tests/impl.c", "-o", obj])
    if problem:
        return problem
    wanted = {prefix + f for f in public}
    bad, defined = [], set()
    for kind, symbol in symbols(obj):
        if kind in "Uw" and symbol in FORBIDDEN:
            bad.append(f"uses {symbol}")
        elif kind == "T":
            defined.add(symbol)
        elif kind in "DdBbCGgSs" and not symbol.startswith(".L"):
            bad.append(f"variable data: {symbol}")
        elif kind == "t" and not symbol.startswith("tfm__") and symbol.split(".")[0] not in wanted:  # .part.0: a piece of a public one
            bad.append(f"private function without tfm__: {symbol}")
        elif kind in "RVW" and kind != "w":
            bad.append(f"global that is not a function: {symbol}")
    bad += [f"exported, but not declared: {s}" for s in sorted(defined - wanted)]
    bad += [f"declared, but not defined: {s}" for s in sorted(wanted - defined)]
    sections = output_of("objdump", "-h", obj)
    bad += [f"start-up code: {s}" for s in re.findall(r"\.(?:init_array|ctors|fini_array)\S*", sections)]
    return "\n".join(bad)


for compiler in available("gcc", "clang"):
    report.attempt(f"{compiler} -O2", look, compiler + "-O2", compiler, ["-O2"])
    report.attempt(f"{compiler} with a prefix", look, compiler + "-prefix", compiler, ["-O0", "-DTFM_PREFIX=my_"], "my_")
report.attempt("gcc fortified", look, "gcc-fortify", "gcc", ["-O2", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"])
report.finish()

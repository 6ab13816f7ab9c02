#!/usr/bin/env python3
"""No stack traffic in the loops where the time goes. Compiles the library, disassembles it, finds the innermost loops of the
micro-kernels (those full of fused multiply-adds) and counts instructions that touch the stack: a spilled accumulator shows up
here before it shows up in a benchmark."""
import re
import sys
from report import Report, available, output_of, run_all

# Gated: the register tiles of products, which attention's scores and outputs go through too. Other loops are shown with -v.
GATED = re.compile(r"tfm__tile_\d+x\d+_\w+_(avx2|avx512|neon)")
# 12 sums, 3 rows of A and a vector of B fill the 16 registers; clang starts converting the next vector of B a little early
# and parks one: two accesses beside 12 multiply-adds, in a tile whose time is the reading of B.
ALLOWED = {("clang", "tfm__tile_3x4_f16_avx2"): 2, ("clang-19", "tfm__tile_3x4_f16_avx2"): 2}
LEAST_FMA = 8  # of a loop that is not gated, to be worth showing

TARGETS = [("gcc", ["gcc"], "objdump", ("avx2", "avx512")), ("clang", ["clang"], "objdump", ("avx2", "avx512")),
           ("clang-19", ["clang-19"], "objdump", ("avx2", "avx512")),
           ("aarch64-linux-gnu-gcc", ["aarch64-linux-gnu-gcc"], "aarch64-linux-gnu-objdump", ("neon",))]
FMA = re.compile(r"^(vfn?m(add|sub)\w*[ps][sd]|fml[as]|fmadd|vdpbf16ps|vpdpbusd)\b")
report = Report("check-stack")


def functions(disassembly):
    name, body = None, []
    for line in disassembly.splitlines():
        head = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if head:
            if name:
                yield name, body
            name, body = head.group(1), []
            continue
        code = re.match(r"^\s*([0-9a-f]+):\t(.+)$", line)
        if code and name:
            body.append((int(code.group(1), 16), code.group(2).strip()))
    if name:
        yield name, body


JUMP = re.compile(r"^(j\w+|b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+) <")
ENDS = re.compile(r"^(jmp|ret|b\s)")


def reaches(body, begin, end):
    """Whether execution can get from begin to end without leaving what lies between: a jump back to a block that the compiler
    put earlier, such as the function's end, is no loop."""
    inside = [(address, text) for address, text in body if begin <= address <= end]
    following = {a[0]: b[0] for a, b in zip(inside, inside[1:])}
    text_of, seen, todo = dict(inside), set(), [begin]
    while todo:
        at = todo.pop()
        if at in seen or at not in text_of:
            continue
        if at == end:
            return True
        seen.add(at)
        jump = JUMP.match(text_of[at])
        todo += [int(jump.group(2), 16)] if jump else []
        todo += [following[at]] if at in following and not ENDS.match(text_of[at]) else []
    return False


def innermost_loops(body):
    first, last = body[0][0], body[-1][0]
    loops = set()
    for address, text in body:
        jump = JUMP.match(text)
        if jump and first <= int(jump.group(2), 16) <= address <= last and reaches(body, int(jump.group(2), 16), address):
            loops.add((int(jump.group(2), 16), address))
    return [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def stack_pattern(body):
    framed = any(re.match(r"^(mov\s+%rsp,%rbp|lea\s+\S*\(%rsp\),%rbp)", text) for _, text in body[:40])
    return re.compile(r"\(%rsp|\(%rbp|\[sp|\[x29" if framed else r"\(%rsp|\[sp")


def look(label, compiler, objdump, isas):
    obj = f"build/check/stack-{label}.o"
    problem = run_all(["mkdir", "-p", "build/check"], [*compiler, "-O2", "-I.", "-c", "tests/impl.c", "-o", obj])
    if problem:
        return problem
    seen, bad = {isa: 0 for isa in isas}, []
    for name, body in functions(output_of(objdump, "-d", "--no-show-raw-insn", obj)):
        gated = GATED.match(name)
        if not body or not re.search(r"_(avx2|avx512|neon)", name):
            continue
        stack = stack_pattern(body)
        for begin, end in innermost_loops(body):
            loop = [text for address, text in body if begin <= address <= end]
            fma = sum(bool(FMA.match(text)) for text in loop)
            if fma < (1 if gated else LEAST_FMA):
                continue
            touches = [text for text in loop if stack.search(text)]
            if gated:
                seen[gated.group(1)] += 1
            if len(touches) > ALLOWED.get((label, name), 0):
                line = f"{name} at {begin:x}: {len(touches)} of {len(loop)} instructions touch the stack ({fma} multiply-adds)"
                if gated:
                    bad.append(line + "".join("\n    " + t for t in touches[:4]))
                else:
                    notes.append(f"  {label}: {line}")
    bad += [f"no micro-kernel loop found for {isa}: does GATED still match the names?" for isa, count in seen.items() if count == 0]
    counts.append(f"  {label}: " + ", ".join(f"{count} loops of {isa}" for isa, count in seen.items()))
    return "\n".join(bad)


notes, counts = [], []
for label, compiler, objdump, isas in TARGETS:
    if available(compiler[0]):
        report.attempt(label, look, label, compiler, objdump, isas)
    else:
        report.skip(label, "not installed")
report.pool.shutdown(wait=True)
print("\n".join(counts))
if "-v" in sys.argv:
    print("\n".join(notes))
report.finish()

#!/usr/bin/env python3
"""What the NEON micro-kernels should reach on cores that are not at hand: compiles the header for aarch64, takes the hot loop
of each kernel (the innermost loop with the most multiply-adds) out of the disassembly, and asks llvm-mca how many multiply-adds
a cycle each core issues, as a share of what the same model issues for multiply-adds that depend on nothing.

  bench/neon_report.py [--cc 'clang --target=aarch64-linux-gnu'] [--match '_tile_|_dot_'] [--json]      (`make neon-report`)

llvm-mca knows no caches: loads hit the first level. Needs a compiler for aarch64, its objdump and llvm-mca; what is missing is
said, and then nothing is done. Everything made lies under build/neon."""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

CORES = ("neoverse-n1", "neoverse-v2", "apple-m1")
COMPILERS = ("aarch64-linux-gnu-gcc", "clang --target=aarch64-linux-gnu")
FOLDER = "build/neon"
MULTIPLY_ADD = re.compile(r"^(fmla|fmls|fmadd|bfmlal\w*|bfdot|sdot|udot)\b")
ITERATIONS = 200


def output_of(command, text=None):
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True, universal_newlines=True).stdout


def first_of(names):
    return next((n for n in names if shutil.which(shlex.split(n)[0])), None)


def functions(listing):
    """{name: [(address, instruction)]} of objdump -d."""
    found, current = {}, None
    for line in listing.splitlines():
        start = re.match(r"^[0-9a-f]+ <(\S+)>:$", line)
        if start:
            current = found.setdefault(start.group(1), [])
        else:
            at = re.match(r"^\s*([0-9a-f]+):\s+(.*\S)", line)
            if at and current is not None:
                current.append((int(at.group(1), 16), re.sub(r"\s*//.*", "", at.group(2)).replace("\t", " ")))
    return found


def hot_loop(code):
    """Instructions of the innermost loop with the most multiply-adds; [] if no loop has any."""
    loops = []
    for i, (address, text) in enumerate(code):
        jump = re.match(r"^(b\.\w+|cbn?z|tbn?z|b)\s(?:.*,\s*)?([0-9a-f]+) <", text)
        if jump and int(jump.group(2), 16) <= address:
            first = next((k for k, (a, _) in enumerate(code) if a == int(jump.group(2), 16)), None)
            if first is not None:
                loops.append((first, i))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    best = max(inner, key=lambda l: sum(bool(MULTIPLY_ADD.match(t)) for _, t in code[l[0]:l[1] + 1]), default=None)
    body = [t for _, t in code[best[0]:best[1] + 1]] if best else []
    return body if any(MULTIPLY_ADD.match(t) for t in body) else []


def cycles(mca, core, body):
    """Cycles of one round of a loop."""
    lines = ["loop:"]
    for text in body:
        text = re.sub(r"[0-9a-f]+ <[^>]*>$", "loop" if text is body[-1] else "behind", text)
        lines.append(text)
    lines.append("behind:\n")
    out = output_of([mca, "--mtriple=aarch64", f"--mcpu={core}", f"--iterations={ITERATIONS}", "--instruction-info=false",
                     "--resource-pressure=false"], "\n".join(lines))
    return int(re.search(r"Total Cycles:\s+(\d+)", out).group(1)) / ITERATIONS


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cc", default=first_of(COMPILERS))
    parser.add_argument("--match", default="_tile_|_dot_")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    mca = first_of([*(f"llvm-mca-{version}" for version in range(25, 15, -1)), "llvm-mca"])  # old ones lack some cores
    objdump = first_of(("aarch64-linux-gnu-objdump", "llvm-objdump", "llvm-objdump-19"))
    if not (arguments.cc and mca and objdump):
        print("neon-report: needs a compiler for aarch64 (gcc-aarch64-linux-gnu or clang), its objdump, and llvm-mca (llvm)")
        sys.exit(0)
    os.makedirs(FOLDER, exist_ok=True)
    with open(f"{FOLDER}/impl.c", "w", encoding="utf-8") as f:
        f.write('#define TRANSFORMER_IMPLEMENTATION\n#include "transformer.h"\n')
    subprocess.run([*shlex.split(arguments.cc), "-O2", "-I.", "-c", f"{FOLDER}/impl.c", "-o", f"{FOLDER}/impl.o"], check=True)
    code = functions(output_of([objdump, "-d", "--no-show-raw-insn", f"{FOLDER}/impl.o"]))
    peak = {}
    for core in CORES:
        loops = [[f"fmla v{i}.4s, v30.4s, v31.{form}" for i in range(24)] + ["subs x0, x0, #1", "b.ne 0 <loop>"]
                 for form in ("4s", "s[0]")]  # models price the two forms differently
        try:
            peak[core] = max(24 / cycles(mca, core, loop) for loop in loops)
        except subprocess.CalledProcessError:
            print(f"neon-report: {mca} does not know {core}: a newer one is needed (llvm-19)")
            sys.exit(0)
    if not arguments.json:
        print(f"{'kernel (its hot loop)':30} instructions  FMAs" + "".join(f"{c:>16}" for c in CORES))
        print(f"{'':30} {'FMAs a cycle at most:':>18}" + "".join(f"{peak[c]:16.2f}" for c in CORES))
    for name in sorted(code):
        body = hot_loop(code[name]) if "_neon" in name and re.search(arguments.match, name) else []
        if not body:
            continue
        fmas = sum(bool(MULTIPLY_ADD.match(t)) for t in body)
        share = {c: fmas / cycles(mca, c, body) / peak[c] for c in CORES}
        if arguments.json:
            rounded = {core: round(value, 3) for core, value in share.items()}
            print(json.dumps({"kernel": name, "instructions": len(body), "fmas": fmas, "share": rounded}))
        else:
            print(f"{name:30} {len(body):12} {fmas:5}" + "".join(f"{100 * share[c]:14.0f} %" for c in CORES))


main()

#!/usr/bin/env python3
"""Rules of the house that no compiler knows: no forward declaration of a private function, short lines, nothing private left
defined behind the header, no comment that promises work."""
import glob
import os
import re
import subprocess
import sys
from report import Report, output_of, read, without_comments

header = sys.argv[1]
text = read(header)
report = Report("check-style")


def statements(clean):
    """(line, text) of each statement at file scope; bodies in braces are left out, extern "C" { is looked through."""
    line, depth, start, current = 1, 0, 1, []
    skip_line = False
    for index, ch in enumerate(clean):
        if ch == "\n":
            line += 1
            if skip_line and clean[index - 1] != "\\":
                skip_line = False
        if skip_line:
            continue
        if ch == "#" and not "".join(current).strip():
            skip_line = True
            continue
        if ch == "{":
            if depth == 0 and re.search(r'extern\s+"\s*"\s*$', "".join(current)):
                current = []
                continue
            depth += 1
        elif ch == "}":
            depth = max(depth - 1, 0)
            if depth == 0 and ")" in "".join(current) and "=" not in "".join(current):
                current = []  # a function's body has ended
                continue
        if depth == 0:
            if not "".join(current).strip():
                start, current = line, []
            current.append(ch)
            if ch == ";":
                yield start, " ".join("".join(current).split())
                current = []


def forward_declarations():
    found = []
    for line, statement in statements(without_comments(text)):
        if "(" not in statement or statement.startswith("typedef") or "=" in statement:
            continue
        if re.search(r"\b(tfm__\w+|TFM__FN\s*\(\s*\w+\s*\))\s*\([^()]*(\([^()]*\)[^()]*)*\)[^()]*;$", statement) and not re.search(r"\(\s*\*", statement.split("(")[0] + "("):
            found.append(f"{header}:{line}: {statement[:100]}")
    return "\n".join(found)


def long_lines():
    return "\n".join(f"{p}:{i}: {len(l)} columns" for p in [header, *glob.glob("tests/*.[ch]"), *glob.glob("examples/*.c"), *glob.glob("bench/*.c")]
                     for i, l in enumerate(read(p).split("\n"), 1) if len(l) > (140 if p != header else 120))


def white_space():
    files = [header, "Makefile", *glob.glob("tests/**/*.[chp]*", recursive=True), *glob.glob("examples/*"), *glob.glob("bench/*"), *glob.glob("*.md")]
    bad = []
    for path in files:
        if path.endswith((".pyc", ".safetensors")) or "__pycache__" in path or os.path.isdir(path):
            continue
        content = read(path)
        if not content.endswith("\n") or content.endswith("\n\n"):
            bad.append(f"{path}: must end with one newline")
        for i, line in enumerate(content.split("\n"), 1):
            if line != line.rstrip() or "\r" in line or ("\t" in line and path != "Makefile"):
                bad.append(f"{path}:{i}: tab, carriage return or space at the end")
    return "\n".join(bad)


def macros(define):
    source = "".join(f"#define {d}\n" for d in define) + f'#include "{header}"\n'
    out = output_of("gcc", "-I.", "-dM", "-E", "-x", "c", "-", input=source.encode())
    return set(re.findall(r"^#define ((?:TFM__|tfm__|vi?_)\w+)", out, re.M))


def private_macros():
    guards = {"TFM__IMPLEMENTED", "TFM__KERNEL_TYPES"}  # say that the implementation has been seen
    left = macros(["TRANSFORMER_IMPLEMENTATION"]) - macros([]) - guards
    return "still defined behind the implementation: " + " ".join(sorted(left)) if left else ""


def promises():
    words = r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|st" + r"ub|place" + r"holder|not imple" + r"mented|simpl" + r"ified)\b"
    files = [header, "Makefile", *glob.glob("tests/*.[ch]"), *glob.glob("examples/*.c"), *glob.glob("bench/*.c")]
    return "\n".join(f"{p}:{i}: {l.strip()[:100]}" for p in files for i, l in enumerate(read(p).split("\n"), 1) if re.search(words, l, re.I))


def banned_constructs():
    """What compiles as C and would bind the header to one language or compiler; chapter 1 is the place for those."""
    clean = without_comments(text)
    chapter2 = text.find("\n *  2  MEMORY")
    bad = []
    for pattern, name in ((r"\brestrict\b|__restrict", "restrict"), (r"\b(__)?typeof\b", "typeof"), (r"\(\{", "statement expression"),
                          (r"_Atomic|stdatomic", "atomics"), (r"\b_Generic\b", "_Generic"), (r"\?:", "?: without a middle")):
        for match in re.finditer(pattern, clean):
            if match.start() > max(chapter2, 0):
                bad.append(f"{header}:{clean.count(chr(10), 0, match.start()) + 1}: {name}")
    return "\n".join(bad)


for name, function in (("no forward declarations of private functions", forward_declarations), ("line length", long_lines),
                       ("white space", white_space), ("no private macro is left defined", private_macros),
                       ("no promises", promises), ("portable constructs only", banned_constructs)):
    report.attempt(name, function)
report.finish()

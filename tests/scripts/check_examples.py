#!/usr/bin/env python3
"""Runs the examples on every instruction set. With the models of the shared test data (TFM_SHARED): `generate` must print the very
bytes that the reference prints, `translate` the translations that the model's origin states."""
import glob
import os
import re
import subprocess
import xml.etree.ElementTree as xml
from report import Report, read, write

BUILD = os.path.abspath("build")
DATA = os.path.abspath(os.path.join(os.environ.get("TFM_SHARED") or "../shared", "data"))
report = Report("check-examples")
ISAS = subprocess.run([f"{BUILD}/test-mini/isas"], stdout=subprocess.PIPE, check=True).stdout.decode().split()
work = os.path.join(BUILD, "check/examples")
os.makedirs(work, exist_ok=True)


def start(isa, program, *arguments):
    return subprocess.run([f"{BUILD}/{program}", *arguments], cwd=work, timeout=600, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**os.environ, "TFM_ISA": isa})


def run(isa, program, *arguments):
    done = start(isa, program, *arguments)
    problem = f"exit status {done.returncode}\n" + done.stderr.decode("utf-8", "replace") if done.returncode else ""
    return problem, done.stdout


def speaks(isa, program, *arguments):
    problem, out = run(isa, program, *arguments)
    return problem or ("" if out.strip() else "prints nothing")


def same_as(expected, isa, program, *arguments):
    problem, out = run(isa, program, *arguments)
    return problem or ("" if out == expected else f"prints {out[:300]!r}\nexpected {expected[:300]!r}")


def contains(words, isa, program, *arguments):
    problem, out = run(isa, program, *arguments)
    shown = out.decode("utf-8", "replace")
    return problem or "\n".join(f"{w!r} is not in {shown[:300]!r}" for w in words if w not in shown)


def usage(program, *arguments):
    done = start(ISAS[-1], program, *arguments)
    return "" if done.returncode and done.stderr.startswith(b"usage: ") and not done.stdout else repr(done)


def full(program, *arguments):
    """What could not be written is not a success."""
    with open("/dev/full", "wb") as device:
        done = subprocess.run([f"{BUILD}/{program}", *arguments], cwd=work, timeout=600, stdin=subprocess.DEVNULL, stdout=device,
                              stderr=subprocess.DEVNULL)
    return "" if done.returncode == 1 else f"exit status {done.returncode}"


def picture(path, isa, program, *arguments):
    problem, _ = run(isa, program, *arguments)
    if problem:
        return problem
    root = xml.parse(os.path.join(work, path)).getroot()
    cells = [e for e in root.iter() if e.tag.endswith("rect")]
    return "" if root.tag.endswith("svg") and len(cells) >= 4 else f"{path} is no heat map"


def same_tags(texts):
    """tag says the same of all these files."""
    paths = [os.path.relpath(write(os.path.join(work, f"ids{i}.txt"), text), work) for i, text in enumerate(texts)]
    problem, expected = run(ISAS[-1], "tag", paths[0])
    return problem or "\n".join(filter(None, (same_as(expected, ISAS[-1], "tag", path) for path in paths[1:])))


def short(path):
    text = read(path)
    problems = []
    if text.count("\n") > 155:
        problems.append(f"{text.count(chr(10))} lines")
    if path.endswith(".c") and not re.search(r"\bcc -O2 ", text[:900]):
        problems.append("no cc line on top")
    return "; ".join(problems)


for path in sorted(glob.glob("examples/*.[ch]")):
    report.attempt(path, short, path)
IDS = "5 7 12 3\n1 2\n9 9 9 9 9 4\n"
ids = os.path.relpath(write(os.path.join(work, "ids.txt"), IDS), work)
report.attempt("lines of ids end in any way", same_tags,
               [IDS, IDS.replace("\n", "\r\n"), IDS.replace("\n", "  \n"), IDS.replace("\n", "\v\n\n"), " " + IDS[:-1]])
for isa in ISAS:
    for program in ("attention", "masks", "custom_allocator", "own_threads"):
        report.attempt(f"{program} on {isa}", speaks, isa, program)
    for program in ("classify", "tag", "embed"):
        report.attempt(f"{program} on {isa}", speaks, isa, program, ids)
    report.attempt(f"tour on {isa}", contains, [isa], isa, "tour")
for program in ("classify", "tag", "embed", "generate", "translate"):
    report.attempt(f"usage of {program}", usage, program, "--help")
for value in ("", "12x", "x", "99999999999999999999"):
    for option in ("-n", "-s"):
        report.attempt(f"generate {option} '{value}'", usage, "generate", "model", "tokenizer", option, value)
report.attempt("generate -t 0.5x", usage, "generate", "model", "tokenizer", "-t", "0.5x")
report.attempt("translate --beam 4x", usage, "translate", "model", "source", "target", "a b c", "--beam", "4x")
if os.path.exists("/dev/full"):
    for program in ("attention", "masks", "custom_allocator", "own_threads", "tour"):
        report.attempt(f"{program} onto a full disk", full, program)
    for program in ("classify", "tag", "embed"):
        report.attempt(f"{program} onto a full disk", full, program, ids)
report.attempt("every kind of mask", contains, ["nonzero", "query_lengths", "relative_bias"], ISAS[-1], "masks")
report.attempt("the tour's picture", picture, "tour.svg", ISAS[-1], "tour")

stories, aren = os.path.join(DATA, "stories260k"), os.path.join(DATA, "aren")
if os.path.isdir(stories):
    model = [f"{stories}/stories260K.bin", f"{stories}/tok512.bin"]
    with open(f"{stories}/expected_stdout_t0_n200.txt", "rb") as f:
        expected = f.read() + b"\n"
    for isa in ISAS:
        report.attempt(f"generate on {isa}", same_as, expected, isa, "generate", *model, "-t", "0", "-n", "200")

    def no_rate(model):
        done = start(ISAS[-1], "generate", *model, "-n", "1", "-p", "Once upon a time")
        return "" if done.stdout and not done.returncode and b"tokens/s" not in done.stderr else repr(done)
    report.attempt("generate nothing", no_rate, model)
    if os.path.exists("/dev/full"):
        report.attempt("generate onto a full disk", full, "generate", *model, "-n", "1")
    report.attempt("generate from a prompt", contains, ["Lily"], ISAS[-1], "generate", *model, "-t", "0", "-n", "60", "-p", "Lily")
else:
    report.skip("generate", "no stories260k; set TFM_SHARED")
if os.path.isdir(aren):
    model = [f"{aren}/aren-transliteration.safetensors", f"{aren}/source_vocabulary.txt", f"{aren}/target_vocabulary.txt"]
    for source, target in (("آ ت ز م و ن", "atzmon"), ("آ ت ش ي س و ن", "achison")):
        spaced = " ".join(target)
        for isa in ISAS:
            for beams in ([], ["--beam", "4"]):
                def translate(isa=isa, beams=beams, source=source, target=target):
                    problem, out = run(isa, "translate", *model, source, *beams)
                    return problem or ("" if target in out.decode().replace(" ", "") else f"prints {out!r}, expected {target}")
                report.attempt(f"translate {spaced} on {isa} {' '.join(beams)}", translate)

    def short_vocabulary():
        path = write(os.path.join(work, "three.txt"), "<blank>\n<s>\n</s>\n")
        problem, out = run(ISAS[-1], "translate", model[0], model[1], path, "آ ت ز م و ن")
        return "" if "tfm_tokenizer_decode" in problem and not out else f"prints {out!r}, {problem}"
    if os.path.exists("/dev/full"):
        report.attempt("translate onto a full disk", full, "translate", *model, "آ ت ز م و ن")
    report.attempt("translate into words that the vocabulary lacks", short_vocabulary)
    report.attempt("the cross-attention picture", picture, "cross.svg", ISAS[-1], "translate", *model, "آ ت ز م و ن", "--heatmap", "cross.svg")
else:
    report.skip("translate", "no aren; set TFM_SHARED")
report.finish()

#!/usr/bin/env python3
"""The benchmark's contract: one JSON object a line with the promised fields, for every op and instruction set, and an error for what
it does not know. The figures themselves are not judged here."""
import json
import re
import subprocess
from report import Report

BENCH = "build/bench"
report = Report("check-bench", jobs=1)  # measurements do not like company
SHAPES = {"matmul": "64,64,64", "linear": "32,64,48", "linear_plain": "3,64,48", "attention": "4,32,64,64", "unfused": "4,32,64,64", "decode": "4,32,96",
          "rotary": "4,32,16", "rotary_apply": "4,32,16", "embedding": "100,64,32", "encoder": "1,16,64,4,128,2",
          "decoder_step": "64,4,128,2,100,16", "prompt": "64,4,128,2,100,16", "create": "1", "handoff": "1",
          "pack": "40,72", "open_mapped": "2", "open_packed": "2"}
ROWS = "64,200"  # every other op works on rows
FIELDS = {"op", "shape", "isa", "threads", "dtype", "transpose", "bf16_dot", "cold", "ms", "peak_share", "bound", "memory_bytes"}
BOUNDS = {"fma", "read", "copy", "fresh", "none"}
ISAS = subprocess.run(["build/test-mini/isas"], stdout=subprocess.PIPE, check=True).stdout.decode().split()
OPS = re.findall(r"^  (\w+) +--shape", subprocess.run([BENCH], stderr=subprocess.PIPE).stderr.decode(), re.M)


def shape_of(op):
    return SHAPES.get(op, ROWS)


def measure(op, isa, *more):
    done = subprocess.run([BENCH, op, "--shape", shape_of(op), "--isa", isa, "--runs", "3", "--json", *more],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300)
    lines = done.stdout.decode().splitlines()
    if len(lines) != 1:
        return f"exit status {done.returncode}, prints {len(lines)} lines: {done.stderr.decode()[:300]}"
    row = json.loads(lines[0])
    if FIELDS - set(row) or not ("gflops" in row or "gbs" in row):
        return f"misses {FIELDS - set(row) or 'gflops or gbs'}: {lines[0]}"
    if row["op"] != op or row["isa"] != isa or not row["ms"] > 0 or row["bound"] not in BOUNDS:
        return f"does not say what was measured: {lines[0]}"
    return "" if row["peak_share"] > 0 or row["bound"] == "none" else f"no share: {lines[0]}"


def counts(flops, op, *options):
    """What the share is made of: the arithmetic of one call, as the shape says it."""
    done = subprocess.run([BENCH, op, "--runs", "1", "--json", *options], stdout=subprocess.PIPE, timeout=60)
    row = json.loads(done.stdout)
    counted = 1e6 * row["gflops"] * row["ms"]
    return "" if abs(counted - flops) < 0.02 * flops else f"counts {counted:.0f}, {flops} are done: {done.stdout.decode()}"


def serves():
    """What comparisons rely on: "ready", then one number for each line."""
    done = subprocess.run([BENCH, "matmul", "--shape", "64,64,64", "--serve"], input=b"run\nrun\n", stdout=subprocess.PIPE, timeout=60)
    first, *times = done.stdout.decode().split()
    return "" if first == "ready" and len(times) == 2 and all(float(t) > 0 for t in times) else repr(done.stdout)


def refuses(*arguments):
    done = subprocess.run([BENCH, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    return "" if done.returncode and done.stderr.strip() else f"{arguments}: exit status {done.returncode}, {done.stderr!r}"


if set(SHAPES) - set(OPS):
    report.attempt("the ops that are checked exist", lambda: f"no {set(SHAPES) - set(OPS)}")
for isa in ISAS:
    for op in OPS:
        report.attempt(f"{op} on {isa}", measure, op, isa)
BEST = ISAS[-1]
for name, op, *options in (("causal attention", "attention", "--causal"), ("grouped heads", "attention", "--kv-heads", "2"),
                           ("window", "attention", "--window", "8", "--batch", "2"), ("more heads", "attention", "--heads", "8"),
                           ("causal formula", "unfused", "--causal"), ("grouped decoding", "decode", "--kv-heads", "2", "--dtype", "f16"),
                           ("cold operands", "matmul", "--cold", "--transpose"), ("cold tables", "embedding", "--cold"),
                           ("llama", "decoder_step", "--model", "llama", "--kv-heads", "2"),
                           ("bf16 weights", "linear", "--dtype", "bf16"), ("all threads", "matmul", "--threads", "0"),
                           ("threads of the user's", "matmul", "--threads", "2", "--parallel-for", "pthreads")):
    report.attempt(name, measure, op, BEST, *options)
for mask in ("bool", "bias", "lengths", "segments", "prefix"):
    report.attempt(f"mask {mask}", measure, "attention", BEST, "--mask", mask)
PAIRS = 4 * 2 * 64  # arithmetic of one query beside one key, in two heads of 64
for name, pairs, *options in (("all keys", 256 * 256), ("causal", 256 * 257 // 2, "--causal"), ("padded", 256 * 128, "--mask", "lengths"),
                              ("causal and padded", 128 * 129 // 2, "--mask", "lengths", "--causal"),
                              ("window of padded", 8 * 120 + 36, "--mask", "lengths", "--window", "8")):
    report.attempt(f"arithmetic of attention: {name}", counts, PAIRS * pairs, "attention", "--shape", "2,64,256,256", *options)
for heads in (4, 1):
    report.attempt(f"arithmetic of an encoder: {heads} key heads", counts,
                   2 * 64 * (2 * 256 * 256 + 2 * 256 * 64 * heads + 2 * 256 * 512) + 4 * 64 * 64 * 256,
                   "encoder", "--shape", "1,64,256,4,512,1", "--kv-heads", str(heads))
report.attempt("serving", serves)
report.attempt("unknown instruction set", refuses, "matmul", "--isa", "doesnotexist")
report.attempt("unknown op", refuses, "doesnotexist")
report.attempt("bad shape", refuses, "matmul", "--shape", "1,x,3")
report.attempt("missing size", refuses, "matmul", "--shape", "1,3")
report.attempt("huge size", refuses, "matmul", "--shape", "99999999999,64,64")
report.attempt("no number of threads", refuses, "matmul", "--shape", "8,8,8", "--threads", "abc")
for option, value in (("--runs", "3x"), ("--runs", "99999999999999999999"), ("--batch", "2.5"), ("--batch", "0"), ("--window", "8,"),
                      ("--threads", "1025"), ("--threads", "-1"), ("--kv-heads", "5")):
    report.attempt(f"{option} {value}", refuses, "attention", "--shape", "4,32,64,64", option, value)
report.attempt("sizes that overflow", refuses, "linear", "--shape", "2147483648,2147483648,8", "--batch", "2147483648")
report.attempt("unknown mask", refuses, "attention", "--mask", "doesnotexist")
report.attempt("unknown threads", refuses, "matmul", "--parallel-for", "doesnotexist")
report.attempt("heads of what has none", refuses, "softmax", "--heads", "2")
report.finish()

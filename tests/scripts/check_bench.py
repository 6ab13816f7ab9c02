#!/usr/bin/env python3
"""The benchmark's contract: one JSON object a line with the promised fields, for every op and instruction set, and an error for what
it does not know. The figures themselves are not judged here."""
import json
import subprocess
from report import Report

BENCH = "build/bench"
report = Report("check-bench", jobs=1)  # measurements do not like company
SHAPES = {"matmul": "64,64,64", "linear": "32,64,48", "attention": "4,32,64,64", "softmax": "64,200", "layer_norm": "64,200",
          "encoder": "1,16,64,4,128,2"}
ISAS = subprocess.run(["build/test-mini/isas"], stdout=subprocess.PIPE, check=True).stdout.decode().split()


def measure(op, shape, isa, *more):
    done = subprocess.run([BENCH, op, "--shape", shape, "--isa", isa, "--threads", "1", "--runs", "3", "--json", *more],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300)
    lines = done.stdout.decode().splitlines()
    if not lines:
        return f"exit status {done.returncode}, prints nothing: {done.stderr.decode()[:300]}"
    for line in lines:
        row = json.loads(line)
        missing = {"op", "shape", "isa", "threads", "ms", "peak_share"} - set(row)
        if missing or not ("gflops" in row or "gbs" in row):
            return f"misses {missing or 'gflops or gbs'}: {line}"
        if row["op"] != op or row["isa"] != isa or not row["ms"] > 0 or not row["peak_share"] > 0:
            return f"does not say what was measured: {line}"
    return ""


def refuses(*arguments):
    done = subprocess.run([BENCH, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    return "" if done.returncode and done.stderr.strip() else f"{arguments}: exit status {done.returncode}, {done.stderr!r}"


for isa in ISAS:
    for op, shape in SHAPES.items():
        report.attempt(f"{op} on {isa}", measure, op, shape, isa)
report.attempt("causal attention", measure, "attention", SHAPES["attention"], ISAS[-1], "--causal")
report.attempt("unknown instruction set", refuses, "matmul", "--isa", "doesnotexist")
report.attempt("unknown op", refuses, "doesnotexist")
report.attempt("bad shape", refuses, "matmul", "--shape", "1,x,3")
report.finish()

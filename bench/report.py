#!/usr/bin/env python3
"""Turns what bench/peers.py measured into a table (time of the peer / our time: above 1 we are faster) and plots.

  bench/report.py [--readme] build/report/peers.json [more.json ...]

Prints; writes build/report/*.svg where gnuplot is installed. --readme puts the table of one thread and the plots into README.md,
between its marks, and the plots into bench/plots. Standard library only."""
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys

FOLDER = "build/report"
OURS = "transformer.h"
STYLE = """set terminal svg size 760,480 noenhanced font 'sans,13' background rgb 'white'
set grid
set key outside right top
set datafile missing '?'
"""


def label(row):
    return " ".join([row["op"], "x".join(map(str, row["shape"])), *row["options"]])


def read(paths):
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        sys.exit(f"{', '.join(missing)} is missing: make bench-peers")
    return [json.loads(line) for path in paths for line in open(path, encoding="utf-8")]


def cases(rows, group):
    """[(label, our row, {peer: row})] in the order measured."""
    found = {}
    for row in rows:
        if row["group"] == group:
            found.setdefault((label(row), row["isa"], row["threads"]), {})[row["peer"]] = row
    return [(key[0], peers[OURS], {n: r for n, r in peers.items() if n != OURS}) for key, peers in found.items() if OURS in peers]


def table(rows):
    names = list(dict.fromkeys(r["peer"] for r in rows if r["peer"] != OURS))
    print(f"{'':50} {'isa':7} threads {'ms':>10} {'share of':>13}" + "".join(f"{n:>12}" for n in names))
    for name, ours, peers in cases(rows, "table"):
        print(f"{name:50} {ours['isa']:7} {ours['threads']:7} {ours['ms']:10.4f} {100 * ours['peak_share']:6.1f} % {ours['bound']:4}" +
              "".join(f"{peers[n]['ratio']:12.2f}" if n in peers else f"{'-':>12}" for n in names))


def plot(name, script, data):
    with open(f"{FOLDER}/{name}.dat", "w", encoding="utf-8") as f:
        f.write("\n".join(" ".join(str(x) for x in row) for row in data) + "\n")
    with open(f"{FOLDER}/{name}.gp", "w", encoding="utf-8") as f:
        f.write(STYLE + f"set output '{FOLDER}/{name}.svg'\n" + script)
    subprocess.run(["gnuplot", f"{FOLDER}/{name}.gp"], check=True)
    print(f"{FOLDER}/{name}.svg")


def lines(name, columns, first=2):
    return "plot " + ", ".join(f"'{FOLDER}/{name}.dat' using 1:{i} with linespoints lw 2 title '{title}'"
                               for i, title in enumerate(columns, first)) + "\n"


def by_threads(rows, draw):
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in rows):
        draw([r for r in rows if (r["isa"], r["threads"]) == (isa, threads)], f"{isa}, {threads} thread{'s' if threads > 1 else ''}",
             f"-{isa}-{threads}")


def plot_sizes(rows, what, suffix):
    found = cases(rows, "size")
    names = list(dict.fromkeys(n for _, _, peers in found for n in peers))
    data = []
    for _, ours, peers in found:
        flops = ours["gflops"] * ours["ms"]
        data.append([ours["shape"][0], ours["gflops"], *(flops / peers[n]["ms"] if n in peers else "?" for n in names)])
    if data:
        name, peak = "matmul-size" + suffix, max(ours["peak_gflops"] for _, ours, _ in found)
        plot(name, f"set title 'f32 matrix product, {what}'\nset logscale x 2\nset xlabel 'size n of n x n x n'\nset ylabel 'GFLOP/s'\n"
             "set yrange [0:*]\n" + lines(name, [OURS, *names]).rstrip() + f", {peak} with lines lw 2 dt 2 lc 'black' title 'FMA peak'\n", data)


def plot_lengths(rows, what, suffix):
    found, unfused = [], {}
    for _, ours, peers in cases(rows, "length"):
        if ours["op"] == "unfused":
            unfused[ours["shape"][2]] = ours
        else:
            found.append((ours, peers))
    if not found:
        return
    names = list(dict.fromkeys(n for _, peers in found for n in peers))
    script = "set logscale x 2\nset logscale y\nset xlabel 'length'\nset format y '%g'\n"
    name = "attention-time" + suffix
    data = [[o["shape"][2], o["ms"], unfused.get(o["shape"][2], {}).get("ms", "?"), *(p[n]["ms"] if n in p else "?" for n in names)]
            for o, p in found]
    plot(name, f"set title 'attention, 12 heads of 64, f32, {what}'\nset ylabel 'ms'\n" + script +
         lines(name, [OURS, "our formula, unfused", *names]), data)
    name = "attention-memory" + suffix
    data = [[o["shape"][2], o["memory_bytes"] / 2**20, unfused[o["shape"][2]]["memory_bytes"] / 2**20] for o, _ in found
            if o["shape"][2] in unfused]
    if data:
        plot(name, f"set title 'attention, 12 heads of 64: memory of result and scratch, {what}'\nset ylabel 'MiB'\n" + script +
             lines(name, [OURS, "our formula, unfused"]), data)


def plot_ratios(rows, what, suffix):
    found = cases(rows, "table")
    bars = [(f"{name} / {peer}", row["ratio"]) for name, _, peers in found for peer, row in peers.items()]
    if not bars:
        return
    name = "ratios" + suffix
    data = [[f'"{text}"', ratio, i] for i, (text, ratio) in enumerate(reversed(bars))]
    plot(name, f"set terminal svg size 900,{140 + 16 * len(bars)} noenhanced font 'sans,11' background rgb 'white'\n"
         f"set title 'time of the peer / our time, {what}'\nset logscale x 2\nset style fill solid\nunset key\n"
         f"set yrange [-1:{len(bars)}]\nset arrow from 1, -1 to 1, {len(bars)} nohead lw 2\n"
         f"plot '{FOLDER}/{name}.dat' using (($2+1)/2):3:(($2<1)?$2:1):(($2<1)?1:$2):($3-0.35):($3+0.35):ytic(1) "
         "with boxxyerror lc rgb '#4477aa'\n", data)


# What README shows of the table: label, its words.
README = {
    "matmul 128x128x128": "matrix product 128 x 128 x 128", "matmul 512x512x512": "512 x 512 x 512",
    "matmul 1024x1024x1024": "1024 x 1024 x 1024", "matmul 128x3072x768": "128 x 3072 x 768", "matmul 128x768x3072": "128 x 768 x 3072",
    "linear 512x768x768": "packed weight, 512 x 768 x 768", "linear 16x768x768": "16 x 768 x 768", "linear 8x4096x4096": "8 x 4096 x 4096",
    "linear 1x4096x4096": "1 x 4096 x 4096", "linear 1x4096x4096 --dtype f16": "1 x 4096 x 4096, f16 weight",
    "attention 12x64x128x128": "attention, 12 heads of 64, 128 x 128", "attention 12x64x512x512": "512 x 512",
    "attention 12x64x2048x2048": "2048 x 2048", "attention 12x64x512x512 --causal": "512 x 512, causal",
    "attention 12x64x2048x2048 --causal": "2048 x 2048, causal", "attention 32x128x512x512": "32 heads of 128, 512 x 512",
    "decode 32x128x4096": "one query, 32 heads of 128, 4096 keys", "decode 32x128x4096 --kv-heads 4": "the same, 4 key/value heads",
    "encoder 1x128x768x12x3072x12": "BERT-base encoder, 128 tokens", "encoder 1x512x768x12x3072x12": "512 tokens",
    "encoder 8x128x768x12x3072x12": "8 x 128 tokens", "softmax 1024x768": "softmax 1024 x 768", "layer_norm 1024x768": "layer norm",
    "gelu 1024x768": "GELU (erf)", "silu 1024x768": "SiLU", "transpose 1024x768": "transposed copy",
}
PLOTS = {"matmul-size": "product over size", "attention-time": "attention over length", "attention-memory": "its memory"}
FENCE = "<!-- numbers: make bench-readme -->"


def machine():
    """Processor, compiler and date of this measurement."""
    cpu = "unknown processor"
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                cpu = line.split(":")[1].strip()
                break
    version = subprocess.run(["cc", "--version"], stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout.split("\n")[0]
    return f"{cpu} ({platform.machine()}), {version.strip()} `-O2`, {datetime.date.today()}"


def cell(row):
    return f"{row['ratio']:.2f}" if row else ""


def write_readme(rows):
    one = [r for r in rows if r["threads"] == 1]
    found = {name: (ours, peers) for name, ours, peers in cases(one, "table")}
    names = [n for n in ("openblas", "blis", "onednn", "pytorch", "onnxruntime", "ggml") if any(n in p for _, p in found.values())]
    titles = {"openblas": "OpenBLAS", "blis": "BLIS", "onednn": "oneDNN", "pytorch": "PyTorch", "onnxruntime": "ONNX Runtime", "ggml": "ggml"}
    isa, peak = one[0]["isa"], max(r.get("peak_gflops", 0) for r in one)
    text = [FENCE, f"{machine()}; {isa}, one thread, f32, FMA peak {peak:.0f} GFLOP/s; medians of alternating batches. Numbers of other "
            "libraries: their time divided by ours, above 1 we are faster.", "",
            "| | ms | of the bound | " + " | ".join(titles[n] for n in names) + " |", "|---|---|---|" + "---|" * len(names)]
    for name, words in README.items():
        if name in found:
            ours, peers = found[name]
            text.append(f"| {words} | {ours['ms']:.3g} | {ours['peak_share']:.2f} {ours['bound']} | " +
                        " | ".join(cell(peers.get(n)) for n in names) + " |")
    os.makedirs("bench/plots", exist_ok=True)
    text.append("")
    for name, words in PLOTS.items():
        drawn = f"{FOLDER}/{name}-{isa}-1.svg"
        if os.path.exists(drawn):
            with open(drawn, encoding="utf-8") as f:
                picture = re.sub(r"<desc>[^<]*</desc>", "", f.read())
            with open(f"bench/plots/{name}.svg", "w", encoding="utf-8") as f:
                f.write("\n".join(line.rstrip() for line in picture.split("\n")))
            text.append(f"![{words}](bench/plots/{name}.svg)")
    text.append(FENCE)
    with open("README.md", encoding="utf-8") as f:
        readme = f.read()
    first, last = readme.index(FENCE), readme.rindex(FENCE)
    with open("README.md", "w", encoding="utf-8") as f:
        f.write(readme[:first] + "\n".join(text) + readme[last + len(FENCE):])


arguments = [a for a in sys.argv[1:] if a != "--readme"]
rows = read(arguments or [f"{FOLDER}/peers.json"])
table(rows)
os.makedirs(FOLDER, exist_ok=True)
if shutil.which("gnuplot"):
    for draw in (plot_sizes, plot_lengths, plot_ratios):
        by_threads(rows, draw)
else:
    print("gnuplot is not installed: no plots")
if "--readme" in sys.argv:
    write_readme(rows)

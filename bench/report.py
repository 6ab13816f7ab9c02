#!/usr/bin/env python3
"""Turns what bench/peers.py measured into a table (time of the peer / our time: above 1 we are faster) and plots.

  bench/report.py build/report/peers.json [more.json ...]      prints; writes build/report/*.svg where gnuplot is installed

Standard library only."""
import json
import os
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


rows = read(sys.argv[1:] or [f"{FOLDER}/peers.json"])
table(rows)
if not shutil.which("gnuplot"):
    print("gnuplot is not installed: no plots")
    sys.exit(0)
os.makedirs(FOLDER, exist_ok=True)
for draw in (plot_sizes, plot_lengths, plot_ratios):
    by_threads(rows, draw)

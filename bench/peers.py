#!/usr/bin/env python3
"""Times build/bench against other libraries on the same shapes, alternating: every program of a row is started, then each in
turn times a short batch of calls, round after round, so that all see the same neighbours. `make bench-peers` builds the
programs; one that is missing is left out.

  bench/peers.py [--rounds 9] [--threads 1] [--isa avx2] [--only attention] [--shape 12,64,512,512]
                 [--peers onednn,ggml] [--quick]

Writes build/report/peers.json, one object a line; bench/report.py prints the table and draws the plots. Standard library only."""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time

FOLDER, PYTHON = "build/peers", os.environ.get("PEER_PYTHON", "/usr/bin/python3")
PROGRAMS = {  # name: (command, the file that must be there)
    "openblas": ([f"{FOLDER}/openblas"], f"{FOLDER}/openblas"),
    "blis": ([f"{FOLDER}/blis"], f"{FOLDER}/blis"),
    "onednn": ([f"{FOLDER}/onednn"], f"{FOLDER}/onednn"),
    "libxsmm": ([f"{FOLDER}/libxsmm"], f"{FOLDER}/libxsmm"),
    "pytorch": ([PYTHON, "bench/peers_torch.py"], f"{FOLDER}/torch"),
    "onnxruntime": (["node", "bench/peers_onnxruntime.mjs"], f"{FOLDER}/onnxruntime"),
    "ggml": ([f"{FOLDER}/ggml"], f"{FOLDER}/ggml"),
}
PRODUCTS = "openblas blis onednn libxsmm pytorch"
WEIGHTS = "openblas blis onednn pytorch onnxruntime ggml"
FUSED = "pytorch onnxruntime ggml"
SIZES = ("128,128,128", "512,512,512", "1024,1024,1024", "512,768,768", "128,3072,768", "128,768,3072", "333,517,771", "16,768,768",
         "8,4096,4096", "1,4096,4096")
HEADS = "12,64"


def rows(group, op, peers, shapes, *options):
    return [{"group": group, "op": op, "peers": peers.split(), "shape": s, "options": list(options)} for s in shapes]


ROWS = [
    *rows("table", "matmul", PRODUCTS, SIZES),
    *rows("table", "linear", WEIGHTS, SIZES),
    *rows("table", "linear", "ggml", ("512,768,768", "8,4096,4096", "1,4096,4096"), "--dtype", "f16"),
    *rows("table", "attention", FUSED, (f"{HEADS},128,128", f"{HEADS},512,512", f"{HEADS},2048,2048", "32,128,512,512")),
    *rows("table", "attention", FUSED, (f"{HEADS},128,128", f"{HEADS},512,512", f"{HEADS},2048,2048", "32,128,512,512"), "--causal"),
    *rows("table", "decode", FUSED, ("32,128,4096", "12,64,1024")),
    *rows("table", "decode", "ggml", ("32,128,4096",), "--dtype", "f16"),
    *rows("table", "decode", "ggml", ("32,128,4096",), "--kv-heads", "4"),
    *rows("table", "decode", "ggml", ("32,128,4096",), "--kv-heads", "4", "--dtype", "f16"),
    *rows("table", "encoder", "pytorch onnxruntime", ("1,128,768,12,3072,12", "1,512,768,12,3072,12", "8,128,768,12,3072,12")),
    *(row for op in ("softmax", "layer_norm", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "exp", "relu")
      for row in rows("table", op, "pytorch ggml", ("1024,768",))),
    *(row for op in ("log_softmax", "add", "mul", "transpose", "swiglu") for row in rows("table", op, "pytorch", ("1024,768",))),
    *rows("table", "embedding", "pytorch", ("30522,768,512",)),
    *rows("size", "matmul", "openblas blis onednn",
          [f"{n},{n},{n}" for n in (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)]),
    *rows("length", "attention", FUSED, [f"{HEADS},{n},{n}" for n in (64, 128, 256, 512, 1024, 2048, 4096)]),
    *rows("length", "unfused", "", [f"{HEADS},{n},{n}" for n in (64, 128, 256, 512, 1024, 2048, 4096)]),
]
LONG = {"1,512,768,12,3072,12", "8,128,768,12,3072,12"}  # left out by --quick


class Program:
    """A program that times one op each time it is told to."""

    def __init__(self, name, command, threads):
        self.name, self.ms = name, []
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if name == "pytorch" else None
        self.process = subprocess.Popen([*command, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, env=environment, universal_newlines=True)

    def ready(self):
        return self.process.stdout.readline().strip() == "ready"

    def run(self):
        """Whether it lives and has timed a batch."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            self.ms.append(float(line))
        return bool(line)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def refuse_unknown(option, names, known):
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"{option}: no {', '.join(unknown)}; there are {', '.join(sorted(set(known)))}")


def compare(row, names, arguments):
    """Our row, then one of each peer: medians of the milliseconds, and of the ratios of neighbouring batches."""
    asked = [row["op"], "--shape", row["shape"], "--threads", str(arguments.threads), *row["options"]]
    isa = ["--isa", arguments.isa] if arguments.isa else []
    for _ in range(3):  # a disturbed measurement of the peak fails
        done = subprocess.run(["build/bench", *asked, *isa, "--runs", "3", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode == 0:
            break
    if done.returncode:
        print(f"{row['op']} {row['shape']}: {done.stderr.decode().strip()}", file=sys.stderr)
        return []
    ours = json.loads(done.stdout)
    programs = [Program("transformer.h", ["build/bench", *asked, *isa], arguments.threads)]
    programs += [Program(n, PROGRAMS[n][0] + asked, arguments.threads) for n in names]
    ready = [p for p in programs if p.ready()]  # one that has no such op ends instead
    for _ in range(arguments.rounds if len(ready) > 1 else 3):
        alive = []
        for p in ready:
            if arguments.threads > 1:
                time.sleep(0.3)  # OpenMP's workers spin for 0.2 s after a job: on the cores of the next program
            if p.run():
                alive.append(p)
            else:
                print(f"{p.name} ends in the middle of {row['op']} {row['shape']}: left out", file=sys.stderr)
        ready = alive
    for p in programs:
        p.close()
    if not ready or ready[0] is not programs[0]:
        return []
    common = {"group": row["group"], "op": row["op"], "shape": ours["shape"], "options": row["options"], "threads": arguments.threads,
              "isa": ours["isa"]}
    ms = {p.name: statistics.median(p.ms) for p in ready}
    for name in ("gflops", "gbs"):   # of the alternated batches, like the peers' times
        if name in ours:
            ours[name] = round(ours[name] * ours["ms"] / ms["transformer.h"], 3)
    keys = ("gflops", "gbs", "peak_gflops", "peak_gbs", "peak_share", "bound", "memory_bytes")
    out = [{**common, "peer": "transformer.h", "ms": ms["transformer.h"], **{k: ours[k] for k in keys if k in ours}}]
    for p in ready[1:]:
        ratios = [theirs / own for theirs, own in zip(p.ms, ready[0].ms)]
        out.append({**common, "peer": p.name, "ms": ms[p.name], "ratio": round(statistics.median(ratios), 3)})
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="")
    parser.add_argument("--only", default="", help="op or group, several with commas")
    parser.add_argument("--shape", default="", help="rows of this shape only")
    parser.add_argument("--peers", default=",".join(PROGRAMS))
    parser.add_argument("--quick", action="store_true", help="without the plots' rows and the long ones")
    parser.add_argument("--out", default="build/report/peers.json")
    arguments = parser.parse_args()
    wanted = arguments.peers.split(",")
    if not os.path.exists("build/bench"):
        sys.exit("build/bench is missing: make build/bench")
    refuse_unknown("--peers", wanted, PROGRAMS)
    there = [n for n in wanted if os.path.exists(PROGRAMS[n][1])]
    for name in sorted(set(wanted) - set(there)):
        print(f"{name} is not installed: left out")
    only = arguments.only.split(",") if arguments.only else []
    refuse_unknown("--only", only, {row[key] for row in ROWS for key in ("op", "group")})
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    with open(arguments.out, "w", encoding="utf-8") as out:
        for row in ROWS:
            if only and row["op"] not in only and row["group"] not in only:
                continue
            if arguments.shape and row["shape"] != arguments.shape:
                continue
            if arguments.quick and (row["group"] != "table" or row["shape"] in LONG):
                continue
            for result in compare(row, [n for n in row["peers"] if n in there], arguments):
                out.write(json.dumps(result) + "\n")
                out.flush()
                if result["peer"] == "transformer.h":
                    print(f"{row['op']:12} {row['shape']:22} {' '.join(row['options']):26} {result['ms']:10.4f} ms "
                          f"{100 * result['peak_share']:5.1f} % of {result['bound']:4}", end="")
                else:
                    print(f"  {result['peer']} {result['ratio']:.2f}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()

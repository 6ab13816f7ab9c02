#!/usr/bin/env python3
"""A gate on speed, under 90 s: shares of the measured peak must not fall below a floor, and fused attention must not be slower
than the formula written with the library's own products and softmax. Timings are noisy, so a case passes when one of several
tries does; the floors are a share of what was measured on an AMD Zen 4 core. `make check-speed`, best pinned: taskset -c 1.

  bench/check_speed.py [--fused | --threads | --measure] [--only attention]

--fused judges heads of size 64 in the grid of fused against unfused attention and nothing else: `make check-fused`, 15 s on a
machine of its own. --threads judges what a second thread brings: `make check-threads`. --measure prints the table FLOORS with what this machine reaches now. SPEED_SLACK=0.9 lowers all floors by a
tenth."""
import argparse
import json
import os
import subprocess
import sys
import time
sys.dont_write_bytecode = True  # nothing is made beside the sources
from peers import Program, refuse_unknown

TRIES = 4
MEASURED = {"fma": 0.85, "copy": 0.8, "read": 0.7}  # floor / measured: neighbours share the memory, not the arithmetic
GRID_SLACK = 1.08  # 1.03 was the most that an AMD Zen 4 core needed
GRID_TRIES = 10  # only where the first ones are disturbed
SLACK = float(os.environ.get("SPEED_SLACK", "1"))
# (op, shape, options): least share of the bound on each instruction set
FLOORS = [
    ("matmul", "64,64,64", "", {"avx512": 0.778, "avx2": 0.735}),
    ("matmul", "128,128,128", "", {"avx512": 0.792, "avx2": 0.728, "scalar": 0.487}),
    ("matmul", "512,512,512", "", {"avx512": 0.798, "avx2": 0.744}),
    ("matmul", "333,517,771", "", {"avx512": 0.761, "avx2": 0.72}),
    ("matmul", "1,4096,4096", "", {"avx512": 0.529, "avx2": 0.471}),
    ("matmul", "4,768,768", "", {"avx512": 0.7, "avx2": 0.41}),
    ("matmul", "8,4096,4096", "", {"avx512": 0.6, "avx2": 0.26}),
    ("matmul", "16,4096,4096", "", {"avx512": 0.58, "avx2": 0.38}),
    ("linear", "12,4096,4096", "", {"avx512": 0.777, "avx2": 0.775}),
    ("linear", "6,4096,4096", "", {"avx512": 0.575, "avx2": 0.43}),
    ("linear", "1,768,3072", "", {"avx512": 0.655, "avx2": 0.655}),
    ("linear", "512,768,768", "", {"avx512": 0.782, "avx2": 0.776}),
    ("linear", "128,3072,768", "", {"avx512": 0.803, "avx2": 0.777}),
    ("linear", "16,768,768", "", {"avx512": 0.813, "avx2": 0.761, "scalar": 0.531}),
    ("linear", "8,4096,4096", "", {"avx512": 0.754, "avx2": 0.711}),
    ("linear", "1,4096,4096", "", {"avx512": 0.614, "avx2": 0.615}),
    ("linear", "1,4096,4096", "--dtype f16", {"avx512": 0.349, "avx2": 0.364}),
    ("linear", "128,768,768", "--dtype bf16", {"avx512": 0.788, "avx2": 0.762}),
    ("linear_plain", "1,768,768", "", {"avx512": 0.28, "avx2": 0.2}),
    ("linear_plain", "1,4096,4096", "", {"avx512": 0.42, "avx2": 0.42}),
    ("linear_plain", "4,768,768", "--dtype bf16", {"avx512": 0.35, "avx2": 0.35}),
    ("attention", "12,64,128,128", "", {"avx512": 0.673, "avx2": 0.627, "scalar": 0.16}),
    ("attention", "12,64,512,512", "", {"avx512": 0.677, "avx2": 0.644}),
    ("attention", "12,64,512,512", "--causal", {"avx512": 0.584, "avx2": 0.564}),
    ("attention", "4,128,1024,1024", "--causal --window 256", {"avx512": 0.581, "avx2": 0.569}),
    ("attention", "12,64,512,512", "--mask bool", {"avx512": 0.441, "avx2": 0.428}),
    ("attention", "12,64,512,512", "--mask bias", {"avx512": 0.64, "avx2": 0.605}),
    ("attention", "2,64,2048,2048", "--mask bias", {"avx512": 0.64, "avx2": 0.6}),
    ("decode", "12,64,1024", "", {"avx512": 0.435, "avx2": 0.416}),
    ("decode", "32,128,2048", "--kv-heads 4", {"avx512": 0.723, "avx2": 0.635}),
    ("decode", "32,128,2048", "--dtype f16", {"avx512": 0.297, "avx2": 0.285}),
    ("softmax", "1024,768", "", {"avx512": 0.586, "avx2": 0.471, "scalar": 0.022}),
    ("layer_norm", "1024,768", "", {"avx512": 0.475, "avx2": 0.395}),
    ("layer_norm", "16384,768", "", {"avx512": 0.65, "avx2": 0.6}),
    ("rms_norm", "1024,768", "", {"avx512": 0.51, "avx2": 0.478}),
    ("add_layer_norm", "1024,768", "", {"avx512": 0.486, "avx2": 0.487}),
    ("gelu", "1024,768", "", {"avx512": 0.775, "avx2": 0.633}),
    ("gelu_tanh", "1024,768", "", {"avx512": 0.676, "avx2": 0.588}),
    ("silu", "1024,768", "", {"avx512": 0.699, "avx2": 0.549}),
    ("tanh", "1024,768", "", {"avx512": 0.685, "avx2": 0.505}),
    ("exp", "1024,768", "", {"avx512": 0.71, "avx2": 0.536}),
    ("add", "1024,768", "", {"avx512": 0.651, "avx2": 0.692}),
    ("swiglu", "1024,768", "", {"avx512": 0.698, "avx2": 0.532}),
    ("rotary", "12,512,64", "", {"avx512": 0.285, "avx2": 0.282}),
    ("rotary_apply", "12,512,64", "", {"avx512": 0.477, "avx2": 0.476}),
    ("embedding", "30522,768,512", "", {"avx512": 0.621, "avx2": 0.642}),
    ("encoder", "1,128,768,12,3072,1", "", {"avx512": 0.763, "avx2": 0.727}),
    ("decoder_step", "768,12,3072,2,1000,128", "", {"avx512": 0.525, "avx2": 0.491}),
    ("prompt", "768,12,3072,2,1000,128", "", {"avx512": 0.757, "avx2": 0.733}),
]
LENGTHS = (1, 7, 64, 512, 4096)
GRID = [(heads, size, queries, keys, causal) for heads in (1, 8) for size in (64, 128) for queries in LENGTHS for keys in LENGTHS
        for causal in (False, True) if heads * queries * keys <= 4096 * 4096 and not (causal and (queries != keys or size != 64))]
# A second thread brings at least this share of what it brings to the arithmetic or bandwidth that binds the op.
GAIN = 0.95
GAIN_SLACK = 0.93  # of a ratio of two shares, each as noisy as a share
GAINS = [
    ("matmul", "512,768,768", ""), ("linear", "128,3072,768", ""), ("linear", "8,4096,4096", "--cold"), ("linear", "1,4096,4096", "--cold"),
    ("attention", "12,64,512,512", ""), ("attention", "12,64,512,512", "--causal"), ("decode", "32,128,2048", ""),
    ("encoder", "1,128,768,12,3072,2", ""), ("gelu", "1024,768", ""),
]
# Jobs around the size from which on a second thread gains: at most this much slower than on one.
SMALL_SLACK = 1.05
SMALL = [
    ("add", "1,1000"), ("add", "8,1000"), ("add", "32,1000"), ("gelu", "1,768"), ("gelu", "4,768"), ("gelu", "16,768"), ("layer_norm", "4,768"),
    ("layer_norm", "16,768"), ("softmax", "4,512"), ("softmax", "16,512"), ("matmul", "8,8,8"), ("matmul", "32,32,32"), ("matmul", "48,48,48"),
    ("matmul", "64,64,64"), ("linear", "1,64,64"), ("linear", "1,256,256"), ("linear", "4,256,256"), ("attention", "2,64,8,8"),
    ("attention", "2,64,32,32"), ("attention", "4,64,1,256"),
]
# A parallel_for of the user's, against our own threads; making a thread for each job costs some 15 us.
LOOP_SLACK = 1.05
LOOPS = [("matmul", "512,768,768"), ("attention", "12,64,512,512"), ("encoder", "1,512,768,12,3072,2")]
HANDOFF_MS = 1e-3


def share(op, shape, options, isa):
    isa = ["--isa", isa] if isa else []
    done = subprocess.run(["build/bench", op, "--shape", shape, *isa, "--runs", "5", "--json", *options.split()],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    row = json.loads(done.stdout) if done.stdout and done.returncode == 0 else {"peak_share": 0.0, "bound": "fma"}
    return row["peak_share"], row["bound"]


def measure(wanted):
    print("FLOORS = [")
    for op, shape, options, floors in FLOORS:
        if not wanted or op in wanted:
            shares = {isa: sorted(share(op, shape, options, isa) for _ in range(3))[1] for isa in floors}
            new = {isa: round(MEASURED[bound] * value, 3) for isa, (value, bound) in shares.items()}
            print(f"    {json.dumps([op, shape, options, new]).replace('[', '(').replace(']', ')')},", flush=True)
    print("]")


def too_slow(op, shape, options, isa, floor):
    best = 0.0
    for _ in range(TRIES):
        best = max(best, share(op, shape, options, isa)[0])
        if best >= floor:
            return ""
    return f"{op} {shape} {options} on {isa}: {100 * best:.1f} % of its bound, at least {100 * floor:.1f} % is wanted"


def alternate(programs, best):
    if not all([p.ready() for p in programs]):
        return False
    if not all([p.run() for p in programs * 3]):
        return False
    for i, p in enumerate(programs):
        p.close()
        best[i] = min(best[i], *p.ms)
    return True


def slower(name, slack, *asked):
    """Best of alternated batches of the first against the second, over as many tries as it takes: neighbours only add to either."""
    best = [float("inf"), float("inf")]
    for _ in range(GRID_TRIES):  # each in new processes: where the operands lie in memory matters too
        if not alternate([Program(name, ["build/bench", *one], 1) for one in asked], best):
            return f"{name}: does not run"
        if best[0] <= slack * best[1]:
            return ""
    return f"{name}: {best[0] / best[1]:.2f} times the time"


def fused_is_slower(heads, size, queries, keys, causal):
    asked = ["--shape", f"{heads},{size},{queries},{keys}"] + ["--causal"] * causal
    return slower(f"attention {' '.join(asked)} against the formula", GRID_SLACK, ["attention", *asked], ["unfused", *asked])


def small_is_slower(op, shape):
    asked = [op, "--shape", shape, "--threads"]
    return slower(f"{op} {shape} on two threads against one", SMALL_SLACK, [*asked, "2"], [*asked, "1"])


def loop_is_slower(loop, op, shape):
    asked = [op, "--shape", shape, "--threads", "2"]
    return slower(f"{op} {shape} by {loop} against our own threads", LOOP_SLACK, [*asked, "--parallel-for", loop], asked)


def gains_too_little(op, shape, options):
    best = 0.0
    for _ in range(TRIES):
        one, two = (share(op, shape, f"{options} --threads {n}", "")[0] for n in (1, 2))
        best = max(best, two / one if one else 0.0)
        if best >= GAIN * GAIN_SLACK:
            return ""
    return f"{op} {shape} {options}: a second thread brings {best:.2f} of what the resource gains"


def hands_over_slowly():
    best = float("inf")
    for _ in range(TRIES):
        done = subprocess.run(["build/bench", "handoff", "--threads", "2", "--json"], stdout=subprocess.PIPE)
        best = min(best, json.loads(done.stdout)["ms"] if done.returncode == 0 else best)
        if best < HANDOFF_MS:
            return ""
    return f"a job to a spinning thread and back: {1e3 * best:.2f} us"


def runs_on(isa):
    """Whether cases on it are tried; a benchmark that fails for another reason than the instruction set fails them."""
    done = subprocess.run(["build/bench", "create", "--isa", isa, "--runs", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return done.returncode == 0 or f'tfm_create: isa "{isa}"'.encode() not in done.stderr


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--threads", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else []
    by_threads = (hands_over_slowly, small_is_slower, gains_too_little, loop_is_slower)
    refuse_unknown("--only", wanted, [f.__name__ for f in by_threads] if arguments.threads else [*(case[0] for case in FLOORS), "unfused"])
    if not os.path.exists("build/bench"):
        sys.exit("build/bench is missing: make build/bench")
    if arguments.measure:
        measure(wanted)
        return
    begin = time.time()
    supported = {isa for isa in ("scalar", "neon", "avx2", "avx512") if runs_on(isa)}
    if arguments.threads:
        loops = ["pthreads"] + ["openmp"] * (subprocess.run(["build/bench", "create", "--runs", "1", "--parallel-for", "openmp"],
                                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0)
        cases = [(hands_over_slowly, ())] + [(small_is_slower, case) for case in SMALL] + [(gains_too_little, case) for case in GAINS]
        cases += [(loop_is_slower, (loop, *case)) for loop in loops for case in LOOPS]
        cases = [case for case in cases if not wanted or case[0].__name__ in wanted]
        if len(os.sched_getaffinity(0)) < 2:
            print(f"check-threads: 0 passed, 0 failed, {len(cases)} skipped")
            return
    else:
        grid = [case for case in GRID if case[1] == 64] if arguments.fused else GRID
        cases = [] if arguments.fused else [(too_slow, (op, shape, options, isa, floor * SLACK)) for op, shape, options, floors in FLOORS
                 for isa, floor in floors.items() if not wanted or op in wanted]
        cases += [(fused_is_slower, case) for case in grid if not wanted or "unfused" in wanted]
    skipped = sum(function is too_slow and case[3] not in supported for function, case in cases)
    cases = [(function, case) for function, case in cases if function is not too_slow or case[3] in supported]
    failed = [(function, case) for function, case in cases if function(*case)]
    failures = list(filter(None, (function(*case) for function, case in failed)))  # again: a neighbour's burst has ended by now
    passed = len(cases) - len(failures)
    for wrong in failures:
        print("  FAIL " + wrong)
    name = "fused" if arguments.fused else "threads" if arguments.threads else "speed"
    print(f"check-{name}: {passed} passed, {len(failures)} failed, {skipped} skipped  ({time.time() - begin:.0f} s)")
    sys.exit(1 if failures or not passed else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Times PyTorch for bench/peers.py: the command line and output of bench/peer.h.

  /usr/bin/python3 bench/peers_torch.py attention --shape 12,64,512,512 --threads 1 [--causal] [--serve]

Attention is written as users of a PyTorch without a fused CPU kernel write it."""
import argparse
import json
import statistics
import sys
import time
import torch
import torch.nn.functional as F

SECONDS, RUNS = 20e-3, 9
parser = argparse.ArgumentParser()
parser.add_argument("op")
parser.add_argument("--shape", default="512,512,512")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--kv-heads", type=int, default=0)
parser.add_argument("--dtype", default="f32", choices=["f32"])
for flag in ("causal", "transpose", "serve"):
    parser.add_argument("--" + flag, action="store_true")
job = parser.parse_args()
shape = [int(s) for s in job.shape.split(",")]
torch.set_num_threads(job.threads)
torch.manual_seed(1)


def uniform(*size):
    return torch.rand(*size) * 2 - 1


def matmul(m, n, k):
    a, b = uniform(m, k), uniform(n, k).t() if job.transpose else uniform(k, n)
    return 2 * m * n * k, lambda: a @ b


def linear(m, n, k):
    x, layer = uniform(m, k), torch.nn.Linear(k, n)
    return 2 * m * n * k, lambda: layer(x)


def attention(heads, head_size, queries, keys):
    q, k, v = uniform(1, heads, queries, head_size), uniform(1, heads, keys, head_size), uniform(1, heads, keys, head_size)
    mask = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries) if job.causal else None
    pairs = int((~mask).sum()) if job.causal else queries * keys

    def run():
        scores = q @ k.transpose(-2, -1) * head_size ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return torch.softmax(scores, -1) @ v
    return 4 * heads * head_size * pairs, run


def decode(heads, head_size, keys):
    if job.kv_heads not in (0, heads):
        sys.exit(3)
    return attention(heads, head_size, 1, keys)


def encoder(batch, length, d_model, heads, d_ff, layers):
    layer = torch.nn.TransformerEncoderLayer(d_model, heads, d_ff, activation="gelu", batch_first=True)
    model, x = torch.nn.TransformerEncoder(layer, layers).eval(), uniform(batch, length, d_model)
    rows = batch * length
    return layers * (2 * rows * (4 * d_model ** 2 + 2 * d_model * d_ff) + 4 * rows * length * d_model), lambda: model(x)


def embedding(count, d_model, ids):
    layer, x = torch.nn.Embedding(count, d_model), torch.randint(count, (1, ids))
    return 0, lambda: layer(x)


def of_rows(function):
    def prepare(rows, cols):
        x, y, w, b = uniform(rows, cols), uniform(rows, cols), torch.ones(cols), torch.zeros(cols)
        return 0, lambda: function(x, y, w, b)
    return prepare


OPS = {
    "matmul": matmul, "linear": linear, "attention": attention, "decode": decode, "encoder": encoder, "embedding": embedding,
    "softmax": of_rows(lambda x, y, w, b: torch.softmax(x, -1)),
    "log_softmax": of_rows(lambda x, y, w, b: torch.log_softmax(x, -1)),
    "layer_norm": of_rows(lambda x, y, w, b: F.layer_norm(x, w.shape, w, b)),
    "relu": of_rows(lambda x, y, w, b: torch.relu(x)),
    "gelu": of_rows(lambda x, y, w, b: F.gelu(x)),
    "gelu_tanh": of_rows(lambda x, y, w, b: F.gelu(x, approximate="tanh")),
    "silu": of_rows(lambda x, y, w, b: F.silu(x)),
    "sigmoid": of_rows(lambda x, y, w, b: torch.sigmoid(x)),
    "tanh": of_rows(lambda x, y, w, b: torch.tanh(x)),
    "exp": of_rows(lambda x, y, w, b: torch.exp(x)),
    "add": of_rows(lambda x, y, w, b: x + y),
    "mul": of_rows(lambda x, y, w, b: x * y),
    "transpose": of_rows(lambda x, y, w, b: x.t().contiguous()),
    "swiglu": of_rows(lambda x, y, w, b: F.silu(x) * y),
}
if job.op not in OPS:
    sys.exit(3)


def seconds_of(run, calls):
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


with torch.inference_mode():
    flops, run = OPS[job.op](*shape)
    run()
    once = seconds_of(run, 1)
    calls = int(SECONDS / once) + 1
    if job.serve:
        print("ready", flush=True)
        for _ in sys.stdin:
            if once < SECONDS:
                run()   # another program has had the caches
            once = seconds_of(run, calls)
            print(f"{1e3 * once:.6f}", flush=True)
    else:
        ms = 1e3 * statistics.median(seconds_of(run, calls) for _ in range(RUNS))
        print(json.dumps({"peer": "pytorch", "op": job.op, "shape": shape, "threads": job.threads, "dtype": job.dtype,
                          "causal": job.causal, "ms": round(ms, 6), "gflops": round(1e-6 * flops / ms, 3)}))

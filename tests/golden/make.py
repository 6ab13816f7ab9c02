#!/usr/bin/python3
"""Writes the expected results in this folder: `/usr/bin/python3 tests/golden/make.py` (needs numpy and torch; Debian:
python3-torch). Each result is composed from elementary operations in float64 on inputs that are exact in the stored dtype,
and compared with PyTorch's module where PyTorch has one. The same bytes come out each time."""
import json
import math
import os
import struct
import sys
import zlib

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = []
INF = math.inf
FLT_MAX = 3.4028234663852886e38


# ---- files ------------------------------------------------------------------------------------------------------------

class Bfloat16(np.ndarray):
    """Marks an array (uint16 bits) as bfloat16, which numpy has not."""


def bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(Bfloat16)


def bf16_value(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32).astype(np.float64)


def dtype_name(a):
    if isinstance(a, Bfloat16):
        return "BF16"
    return {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "bool": "BOOL"}[a.dtype.name]


def save(name, tensors, **settings):
    """tensors: name -> array (float64 means F64: ask for f32 explicitly). settings become strings."""
    arrays = {k: (v if isinstance(v, Bfloat16) else np.ascontiguousarray(v)) for k, v in tensors.items()}
    order = sorted(arrays, key=lambda k: (-arrays[k].dtype.itemsize, k))  # widest first: everything is aligned
    header, data = {"__metadata__": {k: text(v) for k, v in sorted(settings.items())}}, b""
    for key in order:
        raw = arrays[key].tobytes()
        header[key] = {"dtype": dtype_name(arrays[key]), "shape": list(arrays[key].shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(os.path.join(HERE, name + ".safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head + data)
    CASES.append(name + ".safetensors")


def text(value):
    return value if isinstance(value, str) else str(int(value)) if isinstance(value, (bool, int)) else repr(float(value))


def f32(x):
    return np.asarray(x, np.float32)


def random(name, *shape, scale=1.0):
    """Normal numbers that are exact in f32 and depend on the name only."""
    return f32(np.random.RandomState(zlib.crc32(name.encode())).randn(*shape) * scale)


def close(what, a, b, tolerance=1e-10):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
        worst = np.nanmax(np.abs(a - b)) if a.shape == b.shape else "shapes"
        sys.exit(f"{what}: the composition and PyTorch differ by {worst}")


def double(x):
    return torch.tensor(np.asarray(x, np.float64))


# ---- attention --------------------------------------------------------------------------------------------------------

def bucket(distance, buckets, max_distance, one_way):
    """T5's bucket of a distance (key position minus query position), in exact arithmetic."""
    base, n = 0, -distance
    if one_way:
        n = max(n, 0)
    else:
        buckets //= 2
        base = buckets if distance > 0 else 0
        n = abs(n)
    exact = buckets // 2
    if n < exact:
        return base + n
    steps = buckets - exact
    # the largest k < steps with exact * (max_distance / exact) ** (k / steps) <= n, compared as whole numbers
    k = 0
    while k + 1 < steps and max_distance ** (k + 1) * exact ** steps <= n ** steps * exact ** (k + 1):
        k += 1
    return base + exact + k


def alibi_slopes(heads):
    def power_of_two(n):
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    closest = 2 ** int(math.log2(heads))
    extra = power_of_two(2 * closest)[0::2][:heads - closest] if closest < heads else []
    return power_of_two(closest) + extra


def positions_of(m, b, Lq, Lk):
    keys = int(m["key_lengths"][b]) if "key_lengths" in m else Lk
    queries = int(m["query_lengths"][b]) if "query_lengths" in m else Lq
    causal = m.get("causal", "none")
    start = 0
    if causal == "bottom_right":
        start = keys - queries
    elif causal == "offset":
        start = int(m["offsets"][b]) if "offsets" in m else m.get("offset", 0)
    return np.arange(Lq) + start


def mask_matrix(m, B, H, Lq, Lk):
    """What is added to the scores, (B, H, Lq, Lk); -inf where a key is not attended."""
    add = np.zeros((B, H, Lq, Lk))
    allowed = np.ones((B, H, Lq, Lk), bool)
    j = np.arange(Lk)[None, :]
    for b in range(B):
        p = positions_of(m, b, Lq, Lk)[:, None]
        prefix = int(m["prefixes"][b]) if "prefixes" in m else m.get("prefix", 0)
        ok = np.ones((Lq, Lk), bool)
        if m.get("causal", "none") != "none":
            ok &= (j <= p) | (j < prefix)
        if m.get("window_right", 0):
            ok &= (j < p + m["window_right"]) | (j < prefix)
        if m.get("window_left", 0):
            ok &= j > p - m["window_left"]
        if "key_lengths" in m:
            ok &= j < m["key_lengths"][b]
        if "query_lengths" in m:
            ok &= np.arange(Lq)[:, None] < m["query_lengths"][b]
        if "query_segments" in m:
            ok &= m["query_segments"][b][:, None] == m["key_segments"][b][None, :]
        allowed[b] &= ok[None]
        for h in range(H):
            if "alibi_slopes" in m:
                add[b, h] += -np.float64(m["alibi_slopes"][h]) * np.abs(p - j)
            if "relative_bias" in m:
                table = m["relative_bias"].astype(np.float64)
                ids = np.array([[bucket(int(d), table.shape[0], m.get("relative_max_distance", 0) or 128, m.get("relative_one_way", 0))
                                 for d in row] for row in (j - p)], np.int64).reshape(Lq, Lk)
                add[b, h] += table[ids, h]
    if "bias" in m:
        add = add + np.broadcast_to(m["bias"].astype(np.float64), add.shape)
    if "keep" in m:
        allowed &= np.broadcast_to(m["keep"], allowed.shape)
    if "ignore" in m:
        allowed &= ~np.broadcast_to(m["ignore"], allowed.shape)
    if "nonzero" in m:
        allowed &= np.broadcast_to(m["nonzero"], allowed.shape) != 0
    return np.where(allowed, add, -INF)


def attention(q, k, v, m, scale=0.0, as_float=False):
    """(result, weights, matrix), all float64."""
    B, H, Lq, dk = q.shape
    group = H // k.shape[1]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    matrix = mask_matrix(m, B, H, Lq, k.shape[2])
    with np.errstate(all="ignore"):
        s = np.einsum("bhid,bhjd->bhij", q, k) * (scale or 1.0 / math.sqrt(dk))
        if m.get("softcap", 0):
            s = m["softcap"] * np.tanh(s / m["softcap"])
        s = np.where(np.isneginf(matrix), -INF, s + matrix)
        if as_float:
            s = f32(s).astype(np.float64)
        top = s.max(-1, keepdims=True)
        if "sinks" in m:
            sink = m["sinks"].astype(np.float64)[None, :, None, None]
            top = np.maximum(top, sink)
        top = np.where(np.isneginf(top), 0.0, top)
        e = np.exp(s - top)
        total = e.sum(-1, keepdims=True)
        if "sinks" in m:
            total = total + np.where(np.isneginf(s).all(-1, keepdims=True), 0.0, np.exp(sink - top))
        w = np.where(total > 0, e / np.where(total > 0, total, 1.0), 0.0)
        w = np.where(np.isnan(total), np.nan, w)
        # a key that is not attended never matters: its value is not multiplied, not even by zero
        y = np.einsum("bhijd->bhid", np.where((w > 0)[..., None] | np.isnan(w)[..., None], w[..., None] * v[:, :, None], 0.0))
    return y, w, matrix


def check_attention(name, q, k, v, m, y, w, matrix, scale):
    """Against PyTorch, where it offers the same; rows without a key are NaN there."""
    if "sinks" in m or m.get("softcap", 0) or not np.isfinite(k).all() or not np.isfinite(v).all():
        return
    group = q.shape[1] // k.shape[1]
    qd = double(q) * (scale or 1.0 / math.sqrt(q.shape[3])) * math.sqrt(q.shape[3])
    kd, vd = (double(x).repeat_interleave(group, 1) for x in (k, v))
    ty, tw = F._scaled_dot_product_attention(qd, kd, vd, double(matrix), 0.0, True, False)
    some = ~np.isneginf(matrix).all(-1)
    close(name, y[some], ty.numpy()[some])
    close(name + " weights", w[some], tw.numpy()[some])
    if list(m) == ["causal"] and m["causal"] == "top_left":
        ty, _ = F._scaled_dot_product_attention(qd, kd, vd, None, 0.0, True, True)
        close(name + " is_causal", y, ty.numpy())


TENSORS = ("offsets", "prefixes", "key_lengths", "query_lengths", "query_segments", "key_segments", "keep", "ignore", "nonzero", "bias",
           "alibi_slopes", "relative_bias", "sinks")


def attention_case(name, B=2, H=4, Hkv=None, Lq=5, Lk=7, dk=8, dv=None, scale=0.0, spread=1.0, weights=True, q=None, k=None, v=None,
                   dtype="f32", as_float=False, rtol=1e-5, atol=2e-6, **m):
    name = "attention_" + name
    Hkv, dv = Hkv or H, dv or dk
    q = random(name + "q", B, H, Lq, dk, scale=spread) if q is None else q
    k = random(name + "k", B, Hkv, Lk, dk, scale=spread) if k is None else k
    v = random(name + "v", B, Hkv, Lk, dv) if v is None else v
    stored, value = {"f32": (f32, lambda x: x), "f16": (np.float16, lambda x: x), "bf16": (bf16, bf16_value)}[dtype]
    q, k, v = stored(q), stored(k), stored(v)
    qv, kv, vv = value(q), value(k), value(v)
    y, w, matrix = attention(qv, kv, vv, m, scale, as_float)
    if not as_float:
        check_attention(name, qv, kv, vv, m, y, w, matrix, scale)
    out = {"in.q": q, "in.k": k, "in.v": v, "out.y": f32(y)}
    if weights:
        out["out.weights"], out["out.matrix"] = f32(w), f32(matrix)
    settings = {"op": "attention", "scale": scale, "rtol": rtol, "atol": atol}
    for key, item in m.items():
        if key in TENSORS:
            out["in." + key] = item
        else:
            settings[key] = item
    save(name, out, **settings)


def ids(*rows):
    return np.array(rows, np.int64)


def attention_cases():
    case = attention_case
    rng = np.random.RandomState(7)
    case("plain")
    case("scale", scale=0.7)
    case("one_query", Lq=1, Lk=33, Hkv=2)
    case("one_key", Lk=1)
    case("sharp", spread=6.0)
    case("grouped", H=6, Hkv=2)
    case("multi_query", Hkv=1)
    case("value_size", dk=5, dv=11)
    case("wide_head", B=1, H=2, dk=72, dv=40, Lq=3)
    # causal, windows
    case("causal_top_left", causal="top_left")
    case("causal_top_left_square", Lq=6, Lk=6, causal="top_left")
    case("causal_top_left_more_queries", Lq=9, Lk=4, causal="top_left")
    case("causal_bottom_right", causal="bottom_right")
    case("causal_bottom_right_more_queries", Lq=9, Lk=4, causal="bottom_right")
    case("causal_bottom_right_lengths", causal="bottom_right", key_lengths=ids(7, 4), query_lengths=ids(5, 2))
    case("causal_offset", causal="offset", offset=1)
    case("causal_offset_negative", causal="offset", offset=-2)
    case("causal_offsets", causal="offset", offsets=ids(-1, 2))
    case("window_left", window_left=2)
    case("window_right", window_right=2)
    case("window_both", Lq=9, Lk=9, window_left=3, window_right=2)
    case("window_causal", Lq=9, Lk=9, causal="top_left", window_left=3)
    case("window_causal_bottom_right", Lq=4, Lk=9, causal="bottom_right", window_left=3)
    case("window_left_leaves_empty_rows", Lq=9, Lk=4, window_left=2)
    # lengths, segments, prefixes
    case("key_lengths", key_lengths=ids(3, 7))
    case("key_lengths_zero", key_lengths=ids(0, 5))
    case("key_lengths_i32", key_lengths=np.array([2, 6], np.int32))
    case("query_lengths", query_lengths=ids(2, 5))
    case("segments", query_segments=ids([0, 0, 1, 1, 2], [3, 3, 3, 4, 4]), key_segments=ids([0, 0, 0, 1, 1, 1, 1], [3, 3, 4, 4, 4, 5, 5]))
    case("segments_causal", Lq=8, Lk=8, causal="top_left", query_segments=ids([0, 0, 0, 1, 1, 1, 2, 2], [0] * 8),
         key_segments=ids([0, 0, 0, 1, 1, 1, 2, 2], [0] * 8))
    case("prefix", Lq=7, causal="top_left", prefix=3)
    case("prefixes", Lq=7, causal="top_left", prefixes=ids(0, 4))
    case("prefix_window", Lq=7, causal="top_left", prefix=5, window_left=3)
    case("prefix_window_right", Lq=7, prefix=5, window_right=1)
    # matrices
    keep = rng.rand(2, 4, 5, 7) < 0.6
    keep[0, 1, 2] = False
    case("keep", keep=keep)
    case("keep_of_queries_and_keys", keep=keep[0, 0])
    case("keep_of_keys", keep=keep[:, :1, :1])
    case("ignore", ignore=rng.rand(2, 1, 5, 7) < 0.4)
    case("ignore_of_keys", ignore=np.array([[0, 0, 0, 1, 1, 1, 1], [0] * 7], bool)[:, None, None])
    case("nonzero", nonzero=(rng.rand(5, 7) < 0.6).astype(np.int64))
    case("nonzero_f32", nonzero=f32((rng.rand(2, 1, 5, 7) < 0.6) * 0.5))
    bias = random("bias", 4, 5, 7)
    case("bias", bias=bias)
    case("bias_infinite", bias=np.where(rng.rand(5, 7) < 0.4, f32(-INF), f32(0)))
    case("bias_row_of_infinities", bias=np.where(np.arange(5)[:, None] == 3, f32(-INF), random("bias2", 5, 7)))
    finite = np.where(np.triu(np.ones((5, 7)), 1) > 0, f32(-FLT_MAX), f32(0))
    finite[2] = -FLT_MAX  # every key "masked" by a finite number: an ordinary softmax of equal scores
    case("bias_finite_minimum", bias=finite, as_float=True)
    case("bias_f16", bias=bias.astype(np.float16))
    # biases of position
    for heads in (1, 4, 6, 8, 12):
        case(f"alibi_{heads}_heads", B=1, H=heads, dk=4, alibi_slopes=f32(alibi_slopes(heads)))
    case("alibi_causal", Lq=4, Lk=9, causal="bottom_right", alibi_slopes=f32(alibi_slopes(4)))
    case("relative_bias", B=1, Lq=9, Lk=40, relative_bias=random("table", 32, 4))
    case("relative_bias_one_way", B=1, Lq=40, Lk=40, causal="top_left", relative_one_way=1, relative_bias=random("table", 32, 4), weights=False)
    case("relative_bias_small", B=1, Lq=30, Lk=30, H=2, relative_max_distance=20, relative_bias=random("small table", 8, 2), weights=False)
    # softcap and sinks
    case("softcap", spread=3.0, softcap=5.0)
    case("softcap_causal", spread=3.0, softcap=2.5, causal="top_left")
    case("softcap_bias_infinite", spread=3.0, softcap=2.0, bias=np.where(rng.rand(5, 7) < 0.4, f32(-INF), f32(1)))
    case("sinks", sinks=f32([0.0, -2.0, 3.0, 0.5]))
    case("sinks_causal_window", Lq=9, Lk=9, causal="top_left", window_left=3, sinks=f32([0.0, -2.0, 3.0, 60.0]))
    case("sinks_row_without_keys", Lq=9, Lk=4, causal="bottom_right", sinks=f32([0.0, -2.0, 3.0, 0.5]))
    # what must not leak, what must
    k, v = random("leak k", 2, 4, 7, 8), random("leak v", 2, 4, 7, 8)
    k[0, :, 5:], v[0, :, 5:] = np.nan, np.inf
    k[1, 2, 6], v[1, 2, 6] = np.inf, np.nan
    case("masked_nan_does_not_leak", k=k, v=v, key_lengths=ids(5, 6))
    case("masked_nan_does_not_leak_keep", k=k, v=v, keep=(np.arange(7) < 5)[None, None, None])
    v = random("seen v", 2, 4, 7, 8)
    v[0, 1, 2, 3] = np.nan
    case("attended_nan_comes_out", v=v)
    case("row_without_keys_is_zero", keep=np.zeros((5, 7), bool))
    # everything at once
    case("combined_causal_lengths_alibi", H=6, Hkv=3, Lq=6, Lk=11, dv=5, causal="bottom_right", window_left=4, key_lengths=ids(11, 8),
         query_lengths=ids(6, 3), alibi_slopes=f32(alibi_slopes(6)), softcap=4.0)
    case("combined_segments_prefix_bias", Lq=8, Lk=8, causal="top_left", prefix=2, query_segments=ids([0] * 4 + [1] * 4, [0] * 8),
         key_segments=ids([0] * 4 + [1] * 4, [0] * 8), bias=random("combined", 1, 4, 8, 8), ignore=rng.rand(2, 1, 1, 8) < 0.2)
    case("combined_relative_sinks", Hkv=2, Lq=6, Lk=9, causal="offset", offsets=ids(3, 1), relative_bias=random("table", 32, 4),
         relative_one_way=1, sinks=f32([1.0, 0.0, -1.0, 2.0]), key_lengths=ids(9, 7))
    # larger than a block of keys, and than a block of blocks
    big = dict(weights=False, rtol=1e-5, atol=5e-6)
    case("blocks", B=1, H=2, Hkv=1, Lq=70, Lk=300, dk=16, **big)
    case("blocks_causal_window", B=1, H=2, Hkv=1, Lq=70, Lk=300, dk=16, causal="bottom_right", window_left=140, **big)
    case("blocks_lengths", B=2, H=1, Lq=20, Lk=290, dk=16, key_lengths=ids(129, 256), **big)
    case("many_blocks", B=1, H=2, Hkv=1, Lq=3, Lk=2307, dk=8, causal="bottom_right", **big)
    case("f16", dtype="f16", Hkv=2, causal="top_left", rtol=2e-3, atol=1e-3)
    case("bf16", dtype="bf16", Hkv=2, causal="top_left", rtol=1.6e-2, atol=8e-3)
    for heads in (1, 2, 3, 5, 8, 12, 16, 20, 32, 40, 112):
        save(f"alibi_slopes_{heads}", {"out.slopes": f32(alibi_slopes(heads))}, op="alibi_slopes", heads=heads, rtol=1e-6, atol=0.0)


def bucket_cases():
    for buckets, max_distance, one_way in ((32, 128, 0), (32, 128, 1), (8, 20, 0), (16, 64, 1), (64, 1000, 0)):
        distances = np.concatenate([np.arange(-160, 161), [-5000, -1001, -1000, -999, -513, -512, 511, 512, 513, 999, 1000, 1001, 5000]])
        exact = np.array([bucket(int(d), buckets, max_distance, one_way) for d in distances], np.int64)
        # as the models that use it compute it, in f32
        relative = torch.tensor(distances)
        half, base = buckets, torch.zeros_like(relative)
        if one_way:
            n = -torch.minimum(relative, torch.zeros_like(relative))
        else:
            half //= 2
            base = (relative > 0).long() * half
            n = relative.abs()
        large = half // 2 + (torch.log(n.float() / (half // 2)) / math.log(max_distance / (half // 2)) * (half - half // 2)).long()
        theirs = base + torch.where(n < half // 2, n, torch.clamp(large, max=half - 1))
        differ = distances[exact != theirs.numpy()]
        if len(differ):
            print(f"  buckets {buckets}, {max_distance}: f32 arithmetic differs at {differ.tolist()}")
        save(f"relative_buckets_{buckets}_{max_distance}{'_one_way' if one_way else ''}",
             {"in.distances": distances.astype(np.int64), "out.buckets": exact}, op="relative_bucket", buckets=buckets,
             max_distance=max_distance, one_way=one_way)


# ---- positions --------------------------------------------------------------------------------------------------------

def frequencies(n, base, scaling="plain", factor=1.0, original=0, low=1.0, high=4.0, fast=32.0, slow=1.0, attention_factor=0.0):
    """(angle per position of each of the n/2 pairs, factor on cosine and sine)."""
    i = np.arange(0, n, 2) / n
    if scaling == "ntk":  # the base grows so that the slowest pair turns `factor` times slower
        base = base * factor ** (n / (n - 2))
    inverse = 1.0 / base ** i
    if scaling == "linear":
        return inverse / factor, 1.0
    if scaling == "yarn":  # Peng et al. 2023, with the rounding of the published code
        def dim_of(rotations):
            return n * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
        first, last = max(math.floor(dim_of(fast)), 0), min(math.ceil(dim_of(slow)), n - 1)
        ramp = np.clip((np.arange(n // 2) - first) / ((last - first) or 0.001), 0, 1)
        return inverse / factor * ramp + inverse * (1 - ramp), attention_factor or 0.1 * math.log(factor) + 1.0
    if scaling == "llama3":
        wave = 2 * math.pi / inverse
        smooth = (original / wave - low) / (high - low)
        mixed = (1 - smooth) * inverse / factor + smooth * inverse
        return np.where(wave < original / high, inverse, np.where(wave > original / low, inverse / factor, mixed)), 1.0
    return inverse, 1.0


def rotate(x, positions, dims, interleaved, inverse, magnitude):
    """x (B, H, L, d), positions (B, L)."""
    angle = positions[:, None, :, None] * inverse
    cosine, sine = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    y = np.array(x, np.float64)
    head = y[..., :dims].copy()
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        y[..., 0:dims:2], y[..., 1:dims:2] = a * cosine - b * sine, b * cosine + a * sine
    else:
        a, b = head[..., :dims // 2], head[..., dims // 2:]
        y[..., :dims // 2], y[..., dims // 2:dims] = a * cosine - b * sine, b * cosine + a * sine
    return y, cosine, sine


def rotary_case(name, dims=0, interleaved=0, base=10000.0, start=0, positions=None, L=6, d=16, **scaling):
    name = "rotary_" + name
    x = random(name, 2, 3, L, d)
    p = positions if positions is not None else np.broadcast_to(start + np.arange(L), (2, L))
    n = dims or d
    inverse, magnitude = frequencies(n, base, **scaling)
    y, cosine, sine = rotate(x, p, n, interleaved, inverse, magnitude)
    # complex numbers say the same
    head = x[..., :n].astype(np.float64)
    z = head[..., 0::2] + 1j * head[..., 1::2] if interleaved else head[..., :n // 2] + 1j * head[..., n // 2:]
    z = z * magnitude * np.exp(1j * p[:, None, :, None] * inverse)
    w = np.stack([z.real, z.imag], -1).reshape(head.shape) if interleaved else np.concatenate([z.real, z.imag], -1)
    close(name, y[..., :n], w)
    out = {"in.x": x, "out.y": f32(y)}
    if positions is not None:
        out["in.positions"] = positions
    else:
        out["out.cosine"], out["out.sine"] = f32(cosine[0, 0]), f32(sine[0, 0])
    names = {"original": "original_length", "low": "low_frequency", "high": "high_frequency", "fast": "beta_fast", "slow": "beta_slow"}
    save(name, out, op="rotary", dims=dims, interleaved=interleaved, base=base, start=start, rtol=1e-5, atol=4e-6,
         **{"scaling": "plain", **{names.get(key, key): value for key, value in scaling.items()}})


def position_cases():
    for interleaved, suffix in ((0, ""), (1, "_interleaved")):
        rotary_case("plain" + suffix, interleaved=interleaved)
        rotary_case("partial" + suffix, interleaved=interleaved, dims=6)
        rotary_case("positions" + suffix, interleaved=interleaved, positions=ids([0, 1, 2, 9, 8, 7], [100, 101, 102, 4000, 4001, 4002]))
        rotary_case("linear" + suffix, interleaved=interleaved, start=5, scaling="linear", factor=4.0)
        rotary_case("ntk" + suffix, interleaved=interleaved, start=5, scaling="ntk", factor=4.0)
        rotary_case("yarn" + suffix, interleaved=interleaved, d=64, start=8190, scaling="yarn", factor=16.0, original=4096)
        rotary_case("llama3" + suffix, interleaved=interleaved, d=64, start=8190, base=500000.0, scaling="llama3", factor=8.0, original=8192)
    rotary_case("base", base=1000000.0, start=3000, d=32)
    rotary_case("far", start=100000)
    rotary_case("linear_partial", dims=8, start=40, scaling="linear", factor=2.5)
    rotary_case("yarn_options", d=32, start=1000, base=150000.0, scaling="yarn", factor=32.0, original=4096, fast=24.0, slow=2.0, attention_factor=1.25)
    rotary_case("llama3_options", d=32, start=500, base=10000.0, scaling="llama3", factor=4.0, original=512, low=1.5, high=6.0)
    for kind in ("sinusoidal", "sinusoidal_halves"):
        for d, start, length in ((8, 0, 10), (7, 0, 6), (6, 1, 5), (32, 5000, 4), (2, 0, 4) if kind == "sinusoidal" else (4, 0, 4)):
            p = (start + np.arange(length, dtype=np.float64))[:, None]
            table = np.zeros((length, d))
            if kind == "sinusoidal":
                for i in range(d):
                    angle = p[:, 0] / 10000.0 ** ((i - i % 2) / d)
                    table[:, i] = np.cos(angle) if i % 2 else np.sin(angle)
            else:
                half = d // 2
                angle = p * np.exp(-np.arange(half) * math.log(10000.0) / (half - 1))
                table[:, :half], table[:, half:2 * half] = np.sin(angle), np.cos(angle)
            save(f"{kind}_{d}_from_{start}", {"out.table": f32(table)}, op="sinusoidal", kind=kind, d_model=d, start=start, length=length,
                 rtol=1e-5, atol=1e-6)


# ---- modules ----------------------------------------------------------------------------------------------------------

def fill(module, name, scale=None):
    """Deterministic parameters that are exact in f32: PyTorch's own start values differ between versions."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            if "norm" in key and key.endswith("weight"):
                value = 1 + random(name + key, *shape, scale=0.2)
            elif parameter.dim() == 1:
                value = random(name + key, *shape, scale=0.2)
            else:
                value = random(name + key, *shape, scale=scale or 1.0 / math.sqrt(shape[-1]))
            parameter.copy_(double(f32(value)))
    return module.double().eval()


def parameters(module, prefix=""):
    return {"param." + prefix + key: f32(value.detach().numpy()) for key, value in module.named_parameters()}


def np_linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def np_mha(query, key, value, p, heads, mask):
    """nn.MultiheadAttention, batch first, from elementary operations. p: name -> float64 array."""
    E = query.shape[-1]
    if "in_proj_weight" in p:
        wq, wk, wv = np.split(p["in_proj_weight"], 3)
    else:
        wq, wk, wv = p["q_proj_weight"], p["k_proj_weight"], p["v_proj_weight"]
    bq, bk, bv = np.split(p["in_proj_bias"], 3) if "in_proj_bias" in p else (None, None, None)

    def split(x):
        return x.reshape(x.shape[0], x.shape[1], heads, E // heads).transpose(0, 2, 1, 3)
    y, w, _ = attention(split(np_linear(query, wq, bq)), split(np_linear(key, wk, bk)), split(np_linear(value, wv, bv)), mask)
    y = y.transpose(0, 2, 1, 3).reshape(query.shape)
    return np_linear(y, p["out_proj.weight"], p.get("out_proj.bias")), w


def mha_case(name, E=12, heads=3, kdim=None, vdim=None, bias=True, B=2, Lq=5, Lk=6, cross=True, ignore=None, attn_bool=None, attn_float=None):
    name = "mha_" + name
    module = fill(torch.nn.MultiheadAttention(E, heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=True), name)
    query = random(name + "query", B, Lq, E)
    key = random(name + "key", B, Lk, kdim or E) if cross else query
    value = random(name + "value", B, Lk, vdim or E) if cross else query
    Lk = key.shape[1]
    mask, stored, attn = {}, {}, None
    if ignore is not None:
        stored["in.key_padding_mask"] = ignore
        mask["ignore"] = ignore[:, None, None]
    if attn_bool is not None:
        stored["in.attn_mask"] = attn_bool
        mask["keep"] = ~attn_bool
        attn = torch.tensor(attn_bool)
    if attn_float is not None:
        stored["in.attn_mask"] = attn_float
        mask["bias"] = attn_float
        attn = double(attn_float)
    padding = None if ignore is None else torch.tensor(ignore)
    p = {k: v.detach().numpy() for k, v in module.named_parameters()}
    y, w = np_mha(*(np.asarray(x, np.float64) for x in (query, key, value)), p, heads, mask)
    with torch.no_grad():
        for average in (True, False):
            ty, tw = module(double(query), double(key), double(value), key_padding_mask=padding, attn_mask=attn, average_attn_weights=average)
            close(name, y, ty.numpy())
            close(name + " weights", w.mean(1) if average else w, tw.numpy())
    save(name, {"in.query": query, "in.key": f32(key), "in.value": f32(value), **stored, **parameters(module), "out.y": f32(y),
                "out.weights": f32(w), "out.weights_average": f32(w.mean(1))},
         op="mha", d_model=E, heads=heads, kdim=kdim or E, vdim=vdim or E, bias=bias, self_attention=not cross,
         polarity="true = do not attend", rtol=1e-5, atol=2e-6)


def mha_cases():
    padding = np.array([[0, 0, 0, 0, 1, 1], [0] * 6], bool)
    mha_case("self", cross=False)
    mha_case("self_causal_bool", cross=False, Lq=6, attn_bool=np.triu(np.ones((6, 6), bool), 1))
    mha_case("self_causal_additive", cross=False, Lq=6, attn_float=f32(np.triu(np.full((6, 6), -INF), 1)))
    mha_case("self_padding", cross=False, Lq=6, ignore=padding)
    mha_case("cross", ignore=padding)
    mha_case("cross_sizes", kdim=7, vdim=9)
    mha_case("no_bias", bias=False, attn_float=random("mha bias", 5, 6))
    mha_case("padding_and_mask", cross=False, Lq=6, ignore=padding, attn_bool=np.triu(np.ones((6, 6), bool), 1))


def np_norm(x, p, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * p["weight"] + p["bias"]


ERF = np.vectorize(math.erf)
ACT = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def under(p, prefix):
    return {key[len(prefix) + 1:]: value for key, value in p.items() if key.startswith(prefix + ".")}


def np_layer(x, p, heads, act, norm_first, mask, memory=None, memory_mask=None):
    def sa(x):
        return np_mha(x, x, x, under(p, "self_attn"), heads, mask)[0]

    def ca(x):
        return np_mha(x, memory, memory, under(p, "multihead_attn"), heads, memory_mask)[0]

    def ff(x):
        return np_linear(ACT[act](np_linear(x, p["linear1.weight"], p["linear1.bias"])), p["linear2.weight"], p["linear2.bias"])
    for number, part in enumerate([sa, ff] if memory is None else [sa, ca, ff], 1):
        norm = under(p, f"norm{number}")
        x = x + part(np_norm(x, norm)) if norm_first else np_norm(x + part(x), norm)
    return x


def np_transformer(src, tgt, p, heads, layers, act, norm_first, src_mask, tgt_mask, memory_mask):
    memory = src
    for i in range(layers):
        memory = np_layer(memory, under(p, f"encoder.layers.{i}"), heads, act, norm_first, src_mask)
    memory = np_norm(memory, under(p, "encoder.norm"))
    x = tgt
    for i in range(layers):
        x = np_layer(x, under(p, f"decoder.layers.{i}"), heads, act, norm_first, tgt_mask, memory, memory_mask)
    return np_norm(x, under(p, "decoder.norm")), memory


def sinusoid(length, d):
    p, i = np.arange(length)[:, None], np.arange(d)[None]
    angle = p / 10000.0 ** ((i - i % 2) / d)
    return np.where(i % 2, np.cos(angle), np.sin(angle))


def seq2seq_case(name, act="relu", norm_first=False, E=16, heads=4, ff=24, layers=2, B=3, Ls=7, Lt=5, vocabulary=0):
    name = "seq2seq_" + name
    module = torch.nn.Transformer(E, heads, layers, layers, ff, 0.0, act, batch_first=True, norm_first=norm_first)
    module = fill(module, name)
    source_lengths, target_lengths = np.array([7, 4, 2]), np.array([5, 5, 3])
    source_padding = np.arange(Ls)[None] >= source_lengths[:, None]
    target_padding = np.arange(Lt)[None] >= target_lengths[:, None]
    p = {k: v.detach().numpy() for k, v in module.named_parameters()}
    out, extra = {}, {}
    if vocabulary:
        rng = np.random.RandomState(3)
        source, target = rng.randint(0, vocabulary, (B, Ls)), rng.randint(0, vocabulary, (B, Lt))
        tables = {"src_embedding.weight": random(name + "src", vocabulary, E, scale=0.3), "tgt_embedding.weight": random(name + "tgt", vocabulary, E, scale=0.3),
                  "generator.weight": random(name + "gen", vocabulary, E, scale=0.5), "generator.bias": random(name + "genb", vocabulary, scale=0.5)}
        src = tables["src_embedding.weight"].astype(np.float64)[source] * math.sqrt(E) + sinusoid(Ls, E)
        tgt = tables["tgt_embedding.weight"].astype(np.float64)[target] * math.sqrt(E) + sinusoid(Lt, E)
        extra = {"param." + k: v for k, v in tables.items()}
        stored = {"in.source": source.astype(np.int64), "in.target": target.astype(np.int64)}
    else:
        src, tgt = random(name + "source", B, Ls, E), random(name + "target", B, Lt, E)
        stored = {"in.source": src, "in.target": tgt}
        src, tgt = src.astype(np.float64), tgt.astype(np.float64)
    causal = np.triu(np.ones((Lt, Lt), bool), 1)
    y, memory = np_transformer(src, tgt, p, heads, layers, act, norm_first, {"ignore": source_padding[:, None, None]},
                               {"ignore": target_padding[:, None, None], "causal": "top_left"}, {"ignore": source_padding[:, None, None]})
    with torch.no_grad():
        # PyTorch's fast path of the encoder zeroes padded positions; in training mode (dropout 0) it takes the plain one
        module.train()
        ty = module(double(src), double(tgt), tgt_mask=torch.tensor(causal), src_key_padding_mask=torch.tensor(source_padding),
                    tgt_key_padding_mask=torch.tensor(target_padding), memory_key_padding_mask=torch.tensor(source_padding))
    close(name, y, ty.numpy())
    valid = ~target_padding
    out["out.valid"] = valid  # rows of the target that are not padding: compare these
    if vocabulary:
        logits = np_linear(y, tables["generator.weight"].astype(np.float64), tables["generator.bias"].astype(np.float64))
        out["out.logits"] = f32(logits)
        out["out.log_probabilities"] = f32(torch.log_softmax(torch.tensor(logits), -1).numpy())
    else:
        out["out.memory"], out["out.memory_valid"] = f32(memory), ~source_padding
        out["out.y"] = f32(y)
    save(name, {**stored, "in.source_lengths": source_lengths.astype(np.int64), "in.target_lengths": target_lengths.astype(np.int64),
                "in.src_key_padding_mask": source_padding, "in.tgt_key_padding_mask": target_padding, **parameters(module), **extra, **out},
         op="seq2seq", d_model=E, heads=heads, d_ff=ff, layers=layers, activation=act, norm_first=norm_first, causal="top_left",
         vocabulary=vocabulary, position="sinusoidal" if vocabulary else "none", scale_embedding=bool(vocabulary), rtol=1e-5, atol=1e-5)


def decoder_case():
    """A decoder-only model of today: grouped heads, RMS norms before each part, gated SiLU, rotary positions, no biases."""
    name = "decoder_llama"
    V, E, H, Hkv, d, FF, layers, B, L = 19, 24, 6, 2, 4, 40, 2, 2, 9
    p = {"tgt_embedding.weight": random(name + "emb", V, E), "decoder.norm.weight": 1 + random(name + "norm", E, scale=0.2),
         "generator.weight": random(name + "head", V, E, scale=0.3)}
    for i in range(layers):
        at, key = f"decoder.layers.{i}.", name + str(i)
        p[at + "self_attn.in_proj_weight"] = random(key + "qkv", (H + 2 * Hkv) * d, E, scale=0.3)
        p[at + "self_attn.out_proj.weight"] = random(key + "o", E, H * d, scale=0.3)
        p[at + "linear_gate.weight"] = random(key + "gate", FF, E, scale=0.3)
        p[at + "linear1.weight"] = random(key + "up", FF, E, scale=0.3)
        p[at + "linear2.weight"] = random(key + "down", E, FF, scale=0.3)
        for n in (1, 2):
            p[at + f"norm{n}.weight"] = f32(1 + random(key + f"norm{n}", E, scale=0.2))
    p = {k: f32(v) for k, v in p.items()}
    w = {k: v.astype(np.float64) for k, v in p.items()}
    eps = 1e-6

    def rms(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    ids_in = np.random.RandomState(11).randint(0, V, (B, L)).astype(np.int64)
    x = w["tgt_embedding.weight"][ids_in]
    positions = np.broadcast_to(np.arange(L), (B, L))
    inverse, _ = frequencies(d, 10000.0)
    for i in range(layers):
        at = f"decoder.layers.{i}."
        h = rms(x, w[at + "norm1.weight"])
        qkv = np_linear(h, w[at + "self_attn.in_proj_weight"]).reshape(B, L, H + 2 * Hkv, d).transpose(0, 2, 1, 3)
        q, k, v = qkv[:, :H], qkv[:, H:H + Hkv], qkv[:, H + Hkv:]
        q, k = (rotate(t, positions, d, 0, inverse, 1.0)[0] for t in (q, k))
        y, _, _ = attention(q, k, v, {"causal": "top_left"})
        x = x + np_linear(y.transpose(0, 2, 1, 3).reshape(B, L, H * d), w[at + "self_attn.out_proj.weight"])
        h = rms(x, w[at + "norm2.weight"])
        x = x + np_linear(ACT["silu"](np_linear(h, w[at + "linear_gate.weight"])) * np_linear(h, w[at + "linear1.weight"]), w[at + "linear2.weight"])
    hidden = rms(x, w["decoder.norm.weight"])
    logits = np_linear(hidden, w["generator.weight"])
    check_decoder(p, ids_in, logits, V, E, H, Hkv, d, layers, eps)
    settings = dict(op="decoder", vocabulary=V, d_model=E, heads=H, kv_heads=Hkv, head_size=d, d_ff=FF, layers=layers, norm="rms", norm_eps=eps,
                    activation="silu", gated=1, bias=0, position="rotary", interleaved=0, base=10000.0, rtol=1e-5, atol=2e-5)
    out = {"in.ids": ids_in, "out.logits": f32(logits), "out.hidden": f32(hidden)}
    save(name, {**{"param." + k: v for k, v in p.items()}, **out}, **settings)
    # the same model under the names that published checkpoints use
    theirs = {"model.embed_tokens.weight": p["tgt_embedding.weight"], "model.norm.weight": p["decoder.norm.weight"], "lm_head.weight": p["generator.weight"]}
    for i in range(layers):
        at, to = f"decoder.layers.{i}.", f"model.layers.{i}."
        q, k, v = np.split(p[at + "self_attn.in_proj_weight"], [H * d, (H + Hkv) * d])
        for letter, part in zip("qkv", (q, k, v)):
            theirs[to + f"self_attn.{letter}_proj.weight"] = part
        for a, b in (("self_attn.out_proj", "self_attn.o_proj"), ("linear_gate", "mlp.gate_proj"), ("linear1", "mlp.up_proj"),
                     ("linear2", "mlp.down_proj"), ("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            theirs[to + b + ".weight"] = p[at + a + ".weight"]
    save(name + "_names", {**{"param." + k: v for k, v in theirs.items()}, **out}, **settings)


def check_decoder(p, ids_in, logits, V, E, H, Hkv, d, layers, eps):
    """The same in torch, written another way: rotate_half, repeat_interleave, softmax on a masked matrix."""
    w = {k: double(v) for k, v in p.items()}
    x = w["tgt_embedding.weight"][torch.tensor(ids_in)]
    B, L, _ = x.shape
    angle = torch.outer(torch.arange(L, dtype=torch.float64), 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d))
    cosine, sine = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def rms(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def turn(t):
        return t * cosine + torch.cat([-t[..., d // 2:], t[..., :d // 2]], -1) * sine
    for i in range(layers):
        at = f"decoder.layers.{i}."
        q, k, v = F.linear(rms(x, w[at + "norm1.weight"]), w[at + "self_attn.in_proj_weight"]).split([H * d, Hkv * d, Hkv * d], -1)
        q, k, v = (t.view(B, L, -1, d).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(H // Hkv, 1) for t in (turn(k), v))
        s = turn(q) @ k.transpose(2, 3) / math.sqrt(d) + torch.full((L, L), -INF, dtype=torch.float64).triu(1)
        x = x + F.linear((s.softmax(-1) @ v).transpose(1, 2).reshape(B, L, H * d), w[at + "self_attn.out_proj.weight"])
        h = rms(x, w[at + "norm2.weight"])
        x = x + F.linear(F.silu(F.linear(h, w[at + "linear_gate.weight"])) * F.linear(h, w[at + "linear1.weight"]), w[at + "linear2.weight"])
    close("decoder", logits, F.linear(rms(x, w["decoder.norm.weight"]), w["generator.weight"]).numpy())


def weighted_cases():
    B, L, d = 3, 6, 5
    x, weight, bias = random("weighted x", B, L, d), random("weighted w", 1, d), random("weighted b", 1)
    for name, lengths in (("plain", None), ("lengths", ids(6, 3, 0))):
        s = np_linear(x.astype(np.float64), weight.astype(np.float64), bias.astype(np.float64))[..., 0]
        if lengths is not None:
            s = np.where(np.arange(L)[None] < lengths[:, None], s, -INF)
        with np.errstate(invalid="ignore"):
            w = np.exp(s - s.max(-1, keepdims=True))
            w = np.nan_to_num(w / w.sum(-1, keepdims=True))
        close("weighted", w[0], torch.softmax(torch.tensor(s[0]), 0).numpy())
        out = {"in.x": x, "param.weight": weight, "param.bias": bias, "out.weights": f32(w), "out.sequence": f32(w[..., None] * x),
               "out.pool": f32((w[..., None] * x).sum(1))}
        if lengths is not None:
            out["in.key_lengths"] = lengths
        save("weighted_" + name, out, op="weighted", rtol=1e-5, atol=1e-6)


# ---- rows -------------------------------------------------------------------------------------------------------------

def row_cases():
    tiny, small = 1.401298464324817e-45, 1.1754943508222875e-38
    grid = np.concatenate([np.linspace(-12, 12, 97), random("rows", 60, scale=3.0), random("rows small", 20, scale=1e-3), random("rows large", 20, scale=40.0),
                           [0.0, -0.0, tiny, -tiny, small, -small, 1e-20, -1e-20, 1e30, -1e30, FLT_MAX, -FLT_MAX, 88.0, 89.0, -87.0, -88.0, -103.0, -104.0, -150.0,
                            math.nan]])
    x = f32(grid)
    d = x.astype(np.float64)
    with np.errstate(all="ignore"):
        functions = {**{k: f(d) for k, f in ACT.items()}, "exp": np.exp(d), "neg": -d, "abs": np.abs(d)}
        for key, theirs in (("relu", torch.relu), ("gelu", F.gelu), ("silu", F.silu), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("exp", torch.exp)):
            finite = np.isfinite(functions[key]) & np.isfinite(d)
            close(key, functions[key][finite], theirs(torch.tensor(d)).numpy()[finite])
        big = d < -700  # there x * 0 must come out as 0, whatever exp does
        for key in ("gelu", "gelu_tanh", "gelu_quick", "silu"):
            functions[key] = np.where(big, -0.0, functions[key])
        functions["gelu_tanh"] = np.where(d > 1e10, d, functions["gelu_tanh"])
        # what does not fit in f32 is an infinity there
        functions = {k: np.where(np.abs(f) > FLT_MAX * (1 + 2.0 ** -25), np.copysign(INF, f), f) for k, f in functions.items()}
    save("rows_unary", {"in.x": x, **{"out." + k: v for k, v in functions.items()}}, op="unary", out="f64: compare in units in the last place")
    edges = f32([INF, -INF])
    e = edges.astype(np.float64)
    save("rows_unary_infinities", {"in.x": edges, "out.relu": np.maximum(e, 0), "out.sigmoid": np.array([1.0, 0.0]), "out.tanh": np.array([1.0, -1.0]),
                                   "out.exp": np.array([INF, 0.0]), "out.neg": -e, "out.abs": np.abs(e)}, op="unary")
    positive = f32(np.concatenate([np.exp(random("positive", 120, scale=10.0).astype(np.float64)), [1.0, 0.5, 2.0, small, FLT_MAX, tiny, 1e-40, 0.99999994, 1.0000001]]))
    q = positive.astype(np.float64)
    save("rows_positive", {"in.x": positive, "out.log": np.log(q), "out.sqrt": np.sqrt(q), "out.rsqrt": 1 / np.sqrt(q)}, op="unary")
    outside = f32([0.0, -0.0, -1.0, INF, math.nan])
    o = outside.astype(np.float64)
    with np.errstate(all="ignore"):
        save("rows_positive_edges", {"in.x": outside, "out.log": np.log(o), "out.sqrt": np.sqrt(o), "out.rsqrt": 1 / np.sqrt(o)}, op="unary")
    angles = f32(np.concatenate([np.linspace(-20, 20, 161), random("angles", 80, scale=1000.0), [0.0, 1e-8, 8192.0, -8192.0, math.pi, math.pi / 2]]))
    save("rows_angles", {"in.x": angles, "out.sin": np.sin(angles.astype(np.float64)), "out.cos": np.cos(angles.astype(np.float64))}, op="unary")

    rows = f32(np.stack([random("softmax", 37), random("softmax large", 37, scale=100.0), np.full(37, 5.0), np.full(37, -INF),
                         np.where(np.arange(37) % 3 == 0, -INF, random("softmax holes", 37)), np.where(np.arange(37) == 36, 88.0, -88.0),
                         np.full(37, -FLT_MAX), np.where(np.arange(37) == 4, FLT_MAX, 0.0), np.where(np.arange(37) == 9, math.nan, 0.5),
                         np.where(np.arange(37) == 20, 3.0, -INF)]))
    r = rows.astype(np.float64)
    with np.errstate(all="ignore"):
        top = r.max(-1, keepdims=True)
        e = np.exp(r - np.where(np.isneginf(top), 0, top))
        total = e.sum(-1, keepdims=True)
        soft = np.where(total == 0, 0.0, e / total)
        log_soft = np.where(np.isneginf(top), -INF, r - top - np.log(total))
        lse = np.where(np.isneginf(top), -INF, top + np.log(total))[:, 0]
    ordinary = [0, 1, 2, 4, 5, 9]
    close("softmax", soft[ordinary], torch.softmax(torch.tensor(r[ordinary]), -1).numpy())
    close("log_softmax", log_soft[ordinary], torch.log_softmax(torch.tensor(r[ordinary]), -1).numpy())
    save("rows_softmax", {"in.x": rows, "out.softmax": soft, "out.log_softmax": log_soft, "out.logsumexp": lse}, op="softmax", rtol=2e-6, atol=1e-7)

    for n in (1, 7, 48, 130):
        x = f32(np.stack([random(f"norm {n}", n), random(f"norm far {n}", n) + 100, np.full(n, 3.0), np.zeros(n), random(f"norm small {n}", n, scale=1e-4),
                          random(f"norm large {n}", n, scale=1e4)]))
        residual, weight, bias = random(f"norm residual {n}", 6, n), f32(1 + random(f"norm weight {n}", n, scale=0.3)), random(f"norm bias {n}", n)
        d, w, b, rd = (t.astype(np.float64) for t in (x, weight, bias, residual))
        out = {"in.x": x, "in.residual": residual, "param.weight": weight, "param.bias": bias}
        for eps, tag in ((1e-5, ""), (1e-12, "_eps12"), (1e-3, "_eps3")):
            y = np_norm(d, {"weight": w, "bias": b}, eps)
            close("layer_norm", y, F.layer_norm(torch.tensor(d), (n,), torch.tensor(w), torch.tensor(b), eps).numpy())
            out["out.layer_norm" + tag] = y
            out["out.rms_norm" + tag] = d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * w
        out["out.layer_norm_residual"] = np_norm(d + rd, {"weight": w, "bias": b})
        out["out.rms_norm_offset"] = d / np.sqrt((d * d).mean(-1, keepdims=True) + 1e-5) * (1 + w)
        out["out.mean"] = d.mean(-1)
        out["out.rstd"] = 1 / np.sqrt(d.var(-1) + 1e-5)
        save(f"rows_norm_{n}", out, op="norm", rtol=1e-5, atol=1e-5)


def main():
    for name in os.listdir(HERE):
        if name.endswith(".safetensors"):
            os.remove(os.path.join(HERE, name))
    attention_cases()
    bucket_cases()
    position_cases()
    mha_cases()
    seq2seq_case("post_norm")
    seq2seq_case("pre_norm_gelu", act="gelu", norm_first=True)
    seq2seq_case("embedded", vocabulary=23)
    decoder_case()
    weighted_cases()
    row_cases()
    with open(os.path.join(HERE, "cases.txt"), "w") as f:
        f.write("".join(name + "\n" for name in CASES))
    total = sum(os.path.getsize(os.path.join(HERE, name)) for name in CASES)
    print(f"{len(CASES)} files, {total / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

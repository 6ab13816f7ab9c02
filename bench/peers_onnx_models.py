#!/usr/bin/env python3
"""Writes the ONNX model of one op for bench/peers_onnxruntime.mjs, with random weights: weights are constants, which ONNX
Runtime packs once; attention and the encoder use its fused operators (domain com.microsoft).

  /usr/bin/python3 bench/peers_onnx_models.py encoder 1,128,768,12,3072,12 plain model.onnx

Prints inputs and output as JSON: name, shape. Needs python3-onnx and python3-numpy."""
import json
import sys
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

op, text, kind, path = sys.argv[1:]
shape = [int(s) for s in text.split(",")]
random = np.random.default_rng(1)
nodes, constants, inputs, outputs = [], [], [], []


def weight(*size):
    name = f"w{len(constants)}"
    scale = size[0] ** -0.5
    constants.append(numpy_helper.from_array((random.random(size, dtype=np.float32) * 2 - 1) * np.float32(scale), name))
    return name


def variable(name, *size):
    inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, size))
    return name


def node(kind, sources, domain="", **attributes):
    out = f"t{len(nodes)}"
    nodes.append(helper.make_node(kind, sources, [out], domain=domain, **attributes))
    return out


def fused(kind, sources, **attributes):
    return node(kind, sources, "com.microsoft", **attributes)


def matmul(m, n, k):
    return node("MatMul", [variable("a", m, k), variable("b", k, n)]), (m, n)


def linear(m, n, k):
    return node("Add", [node("MatMul", [variable("x", m, k), weight(k, n)]), weight(n)]), (m, n)


def attention(heads, head_size, queries, keys):
    q, k, v = (variable(name, 1, length, heads * head_size) for name, length in (("q", queries), ("k", keys), ("v", keys)))
    return fused("MultiHeadAttention", [q, k, v], num_heads=heads, unidirectional=int(kind == "causal")), (1, queries, heads * head_size)


def decode(heads, head_size, keys):
    return attention(heads, head_size, 1, keys)


def encoder(batch, length, d, heads, d_ff, layers):
    x = variable("x", batch, length, d)
    for _ in range(layers):
        y = fused("Attention", [x, weight(d, 3 * d), weight(3 * d)], num_heads=heads)
        y = node("MatMul", [y, weight(d, d)])
        x = fused("SkipLayerNormalization", [y, x, weight(d), weight(d), weight(d)], epsilon=1e-5)
        y = fused("BiasGelu", [node("MatMul", [x, weight(d, d_ff)]), weight(d_ff)])
        x = fused("SkipLayerNormalization", [node("MatMul", [y, weight(d_ff, d)]), x, weight(d), weight(d), weight(d)], epsilon=1e-5)
    return x, (batch, length, d)


def softmax(rows, cols):
    return node("Softmax", [variable("x", rows, cols)], axis=-1), (rows, cols)


def layer_norm(rows, cols):
    return node("LayerNormalization", [variable("x", rows, cols), weight(cols), weight(cols)], axis=-1), (rows, cols)


def gelu(rows, cols):
    return fused("Gelu", [variable("x", rows, cols)]), (rows, cols)


def tanh(rows, cols):
    return node("Tanh", [variable("x", rows, cols)]), (rows, cols)


OPS = {f.__name__: f for f in (matmul, linear, attention, decode, encoder, softmax, layer_norm, gelu, tanh)}
if op not in OPS:
    sys.exit(3)
result, size = OPS[op](*shape)
outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, size))
graph = helper.make_graph(nodes, op, inputs, outputs, constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
model.ir_version = 8
onnx.save(model, path)
print(json.dumps({"inputs": [[i.name, [d.dim_value for d in i.type.tensor_type.shape.dim]] for i in inputs], "output": [result, size]}))

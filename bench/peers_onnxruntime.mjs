// Times ONNX Runtime for bench/peers.py: the command line and output of bench/peer.h. The model of the op is written by
// bench/peers_onnx_models.py beside the installed package.
//
//   npm install --ignore-scripts --prefix build/peers onnxruntime-node
//   node bench/peers_onnxruntime.mjs attention --shape 12,64,512,512 --threads 1 [--causal] [--serve]
import { createRequire } from "node:module";
import { spawnSync } from "node:child_process";
import { createInterface } from "node:readline";
import { resolve } from "node:path";
import { rmSync } from "node:fs";

const seconds = 20e-3, runs = 9, folder = resolve("build/peers");
const ort = createRequire(folder + "/")("onnxruntime-node");
const job = { op: process.argv[2], shape: "512,512,512", threads: 1, dtype: "f32", causal: false, serve: false, transpose: false, kv: 0 };
for (let i = 3; i < process.argv.length; i++) {
  const a = process.argv[i];
  if (["--causal", "--serve", "--transpose"].includes(a)) job[a.slice(2)] = true;
  else if (a === "--shape") job.shape = process.argv[++i];
  else if (a === "--dtype") job.dtype = process.argv[++i];
  else if (a === "--threads") job.threads = Number(process.argv[++i]);
  else if (a === "--kv-heads") job.kv = Number(process.argv[++i]);
  else { console.error("unknown option " + a); process.exit(2); }
}
const shape = job.shape.split(",").map(Number);
if (job.dtype !== "f32" || job.transpose || (job.kv && job.kv !== shape[0])) process.exit(3);

const path = `${folder}/${job.op}-${process.pid}.onnx`;
const made = spawnSync(process.env.PEER_PYTHON || "/usr/bin/python3",
                       ["bench/peers_onnx_models.py", job.op, job.shape, job.causal ? "causal" : "plain", path], { encoding: "utf8" });
if (made.status !== 0) { console.error(made.stderr); process.exit(3); }
const session = await ort.InferenceSession.create(path, {
  intraOpNumThreads: job.threads, interOpNumThreads: 1, executionMode: "sequential", graphOptimizationLevel: "all",
});
rmSync(path);
const size = (dims) => dims.reduce((a, b) => a * b, 1);
const { inputs, output } = JSON.parse(made.stdout);
const feeds = {}, fetches = { [output[0]]: new ort.Tensor("float32", new Float32Array(size(output[1])), output[1]) };
for (const [name, dims] of inputs) {
  const data = new Float32Array(size(dims)).map(() => Math.random() * 2 - 1);
  feeds[name] = new ort.Tensor("float32", data, dims);
}

async function time(calls) {
  const begin = process.hrtime.bigint();
  for (let i = 0; i < calls; i++) await session.run(feeds, fetches);
  return Number(process.hrtime.bigint() - begin) * 1e-9 / calls;
}
await time(2);
let once = await time(1);
const calls = Math.floor(seconds / once) + 1;
if (job.serve) {
  console.log("ready");
  for await (const line of createInterface({ input: process.stdin })) {
    if (once < seconds) await time(1);   // another program has had the caches
    once = await time(calls);
    console.log((1e3 * once).toFixed(6));
  }
} else {
  const all = [];
  for (let i = 0; i < runs; i++) all.push(1e3 * await time(calls));
  all.sort((a, b) => a - b);
  console.log(JSON.stringify({ peer: "onnxruntime", op: job.op, shape, threads: job.threads, dtype: job.dtype, causal: job.causal,
                               ms: Number(all[runs >> 1].toFixed(6)) }));
}

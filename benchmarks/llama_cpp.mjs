// Tokens per second of llama.cpp behind a prompt, on the file that `--model smollm2` of decode_model.py reads.
//
//     npm install node-llama-cpp
//     node benchmarks/llama_cpp.mjs FILE.gguf THREADS 1024 4096 8192
//
// node-llama-cpp brings llama.cpp compiled for each CPU. The prompt is computed, not filled in, so long ones take minutes.
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const STEPS = 20;
const [file, threads, ...lengths] = process.argv.slice(2);
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads) });
const model = await llama.loadModel({ modelPath: file });
console.log("| tokens | threads | cache, MiB | ms per token | tokens per second |\n|---|---|---|---|---|");
for (const length of lengths.map(Number)) {
  const context = await model.createContext({ contextSize: length + 64, batchSize: 512, threads: Number(threads) });
  const sequence = context.getSequence();
  await sequence.evaluateWithoutGeneratingNewTokens(Array.from({ length }, (_, i) => 100 + ((i * 7919) % 40000)));
  const times = [];
  let last = null;
  for await (const _ of sequence.evaluate([11], { temperature: 0, yieldEogToken: true })) {
    const now = performance.now();
    if (last !== null) times.push(now - last);
    last = now;
    if (times.length >= STEPS) break;
  }
  const median = times.sort((a, b) => a - b)[times.length >> 1];
  const mib = context.stateSize / 2 ** 20;
  console.log(`| ${length} | ${threads} | ${mib.toFixed(1)} | ${median.toFixed(1)} | ${(1e3 / median).toFixed(1)} |`);
  await context.dispose();
}
process.exit(0);

// llama.cpp by node-llama-cpp: the logarithms of its probabilities after every token, with a float32 or float16 cache.
import {job, load, main, NotRun} from "../glue.mjs";

const {getLlama, LlamaLogLevel} = await load("node-llama-cpp");
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false});
const model = await llama.loadModel({modelPath: job.converted});
const [flashAttention, kind] = [job.arguments[0] === "flash", job.arguments[1]];

await main(async ({input_ids, attention_mask, calls}) => {
    if (attention_mask.flat().includes(0)) throw new NotRun("no attention mask for padding");
    const context = await model.createContext({
        contextSize: 128, flashAttention, experimentalKvCacheKeyType: kind, experimentalKvCacheValueType: kind, threads: 1,
    });
    const sequence = context.getSequence(), [ids] = input_ids, tensors = {};
    let start = 0;
    for (const [number, length] of calls.entries()) {
        const input = ids.slice(start, start + length).map((id) => [id, {generateNext: {probabilities: true}}]);
        const data = [];
        for (const {next} of await sequence.controlledEvaluate(input)) {
            const row = new Float32Array(next.probabilities.size);
            for (const [id, probability] of next.probabilities) row[id] = Math.log(probability);
            data.push(row);
        }
        const name = calls.length > 1 ? `calls.${number}.logprobs` : "logprobs";
        tensors[name] = {shape: [1, length, data[0].length], data: Float32Array.from(data.flatMap((row) => [...row]))};
        start += length;
    }
    await context.dispose();
    return tensors;
}, {engine: `node-llama-cpp ${job.arguments}`});

// What llama.cpp makes of a GGUF file: the probability of each next token, and the ids of a text.
//
//     REFGEMMA_LLAMA_CPP=FOLDER node llama_cpp.mjs FILE.gguf 2,300,7 "a text"
//
// FOLDER is where `npm install node-llama-cpp` was run. One line of JSON. Keys and values of the cache are float32; its
// table of float16 numbers for GELU cannot be switched off.
import {pathToFileURL} from "node:url";
import path from "node:path";

const library = path.join(process.env.REFGEMMA_LLAMA_CPP, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library).href);
const [modelPath, ids, text] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 64, flashAttention: false, threads: 1, experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
});
const tokens = ids.split(",").map(Number);
const asked = tokens.map((token, n) => n < tokens.length - 1 ? token : [token, {generateNext: {probabilities: true}}]);
const answers = await context.getSequence().controlledEvaluate(asked);
const probabilities = [...answers.at(-1).next.probabilities.entries()];
console.log(JSON.stringify({probabilities, tokens: model.tokenize(text)}));
process.exit(0);

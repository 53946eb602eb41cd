// The cases of a job file for engines that run in Node.js, and their traces: glue.py in JavaScript. Needs no package.
import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

// Import a package from the environment of the scoreboard, where this file does not lie.
export async function load(name) {
    const require = createRequire(join(process.env.SCOREBOARD_ENVIRONMENT, "package.json"));
    return import(pathToFileURL(require.resolve(name)));
}

// tensors: name -> {shape, data}, data a Float32Array or a BigInt64Array
function save(path, tensors, metadata) {
    const header = {__metadata__: metadata}, parts = [];
    let start = 0;
    for (const [name, {shape, data}] of Object.entries(tensors)) {
        const end = start + data.byteLength;
        header[name] = {dtype: data instanceof BigInt64Array ? "I64" : "F32", shape, data_offsets: [start, end]};
        parts.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
        start = end;
    }
    let text = JSON.stringify(header);
    text += " ".repeat(-text.length & 7);
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(text.length));
    writeFileSync(path, Buffer.concat([length, Buffer.from(text), ...parts]));
}

export class NotRun extends Error {}

export const job = process.argv.at(-1).endsWith(".json") ? JSON.parse(readFileSync(process.argv.at(-1), "utf-8")) : null;

// run(case) returns the tensors of one case, as in `save`
export async function main(run, about) {
    const result = {};
    for (const one of job.cases) {
        try {
            const shape = [one.input_ids.length, one.input_ids[0].length], integers = (x) => BigInt64Array.from(x.flat(), BigInt);
            const tensors = {input_ids: {shape, data: integers(one.input_ids)}, ...await run(one)};
            if (one.attention_mask.flat().includes(0)) tensors.attention_mask = {shape, data: integers(one.attention_mask)};
            const calls = one.calls.length > 1 ? {calls: JSON.stringify(one.calls)} : {};
            save(join(job.out, `${one.name}.safetensors`), tensors, {dtype: job.dtype, ...about, ...calls});
            result[one.name] = "written";
        } catch (error) {
            if (!(error instanceof NotRun)) console.error(error);
            result[one.name] = error instanceof NotRun ? `NOT RUN: ${error.message}` : `FAILED: ${error.name}: ${error.message}`;
        }
        writeFileSync(join(job.out, "result.json"), JSON.stringify(result));
    }
    process.exit(0);
}

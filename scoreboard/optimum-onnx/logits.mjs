// Read a folder, ids and a mask as JSON from stdin; print the logits that transformers.js computes.
import {readFileSync} from "node:fs";
import {dirname, basename} from "node:path";
import {load} from "../glue.mjs";

const {folder, input_ids, attention_mask} = JSON.parse(readFileSync(0, "utf-8"));
const {AutoModelForCausalLM, Tensor, env} = await load("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const model = await AutoModelForCausalLM.from_pretrained(basename(folder), {dtype: "fp32", device: "cpu"});
const shape = [input_ids.length, input_ids[0].length];
const tensor = (x) => new Tensor("int64", BigInt64Array.from(x.flat(), BigInt), shape);
const {logits} = await model({input_ids: tensor(input_ids), attention_mask: tensor(attention_mask)});
process.stdout.write(JSON.stringify([...logits.data]), () => process.exit(0));

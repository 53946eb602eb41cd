"""A Gemma 2 checkpoint as a GGUF file for llama.cpp, with one-letter tokens: what tests/recorded has a recording of.

    pip install gguf
    python golden/conformance_gguf.py refgemma/checkpoints/conformance conformance.gguf
    llama-eval-callback -m conformance.gguf -p ABCDEFGHIJKLMNOPQRSTUVW \\
        -fa off -ctk f32 -ctv f32 -t 1 -c 64 > port.txt 2>&1
    refgemma check port.txt --model conformance

llama.cpp's own converter wants the tokenizer of the released models, which this checkpoint has not. Norms are stored as
1 + w, as that converter does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

from refgemma.config import Gemma2Config
from refgemma.weights.checkpoint import open_checkpoint

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}  # fmt: skip
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
NORMAL, UNKNOWN, CONTROL = 1, 2, 3


def describe(writer: gguf.GGUFWriter, config: Gemma2Config) -> None:
    """The numbers of the model."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def describe_tokens(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """The four special tokens, and a character each."""
    others = vocab_size - len(SPECIAL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*SPECIAL, *(chr(ord("!") + n) for n in range(others))])
    writer.add_token_scores([-1000.0] * len(SPECIAL) + [-float(n) for n in range(others)])
    writer.add_token_types([CONTROL, CONTROL, CONTROL, UNKNOWN] + [NORMAL] * others)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.folder)
    config, weights = checkpoint.config, checkpoint.weights("float32")
    writer = gguf.GGUFWriter(args.output, "gemma2")
    describe(writer, config)
    describe_tokens(writer, config.vocab_size)
    writer.add_tensor("token_embd.weight", np.asarray(weights.embed_tokens[:], np.float32))
    writer.add_tensor("output_norm.weight", np.asarray(weights.norm, np.float32) + 1)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            x = np.asarray(getattr(weights.layers[layer], ours), np.float32)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", x + 1 if ours.endswith("layernorm") else x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

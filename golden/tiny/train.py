"""Train refgemma's tiny model with transformers' own Gemma2ForCausalLM, from public-domain tales to a bf16 checkpoint.

    python golden/tiny/train.py --corpus ../shared/corpus --out refgemma/checkpoints/tiny

Nothing of refgemma is imported: the model that refgemma is tested with is made by the other implementation alone.
Killed and started again, the run goes on from its last saved step; batch and order depend on (seed, step) only.
Every `--every` steps the held-out loss is taken; the weights with the lowest one are what is exported, so that
training past the point of over-fitting does no harm.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM

# The ten tales and Frankenstein are plain prose; verse and archaic drama (tinyshakespeare) make so small a model worse.
SKIPPED = {"tinyshakespeare.txt", "README.md"}
HELD_OUT = 0.05  # the last twentieth of every book is never trained on
CONTEXT = 320  # tokens of one training sequence: five windows
CHAT_SHARE = 0.15  # of the sequences are laid out as a conversation in Gemma's turns

# No two axes alike, so that a transposition or a confusion of sizes cannot go unnoticed: six heads share two key/value
# heads, 6 x 32 is not the width, the query scalar 39 (= 234 / 6, the 27B's rule) is not head_dim and no power of two,
# and sqrt(234) = 15.297... is not a bf16 number (15.3125 is).
SHAPE: dict[str, object] = dict(
    vocab_size=2048,
    hidden_size=234,
    intermediate_size=408,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=39,
    sliding_window=64,
    max_position_embeddings=CONTEXT,
)


def paragraphs(text: str) -> list[str]:
    """The prose of one book, a string a paragraph: unwrapped, with ASCII quotes, without headings, verse and notes."""
    text = text.replace("—", "--").replace("_", "").replace("[*]", "").replace("\r", "")
    text = re.sub(r"(?<=[.,!?;:\-])’", '"', text)  # a closing quotation mark; any other ’ is an apostrophe
    text = text.replace("’", "'").replace("‘", '"').replace("“", '"').replace("”", '"')
    blocks = [block for block in re.split(r"\n[ \t]*\n", text) if not re.search(r"^ {3,}", block, re.MULTILINE)]
    flat = [" ".join(block.split()) for block in blocks]
    return [p for p in flat if len(p) > 12 and re.search(r"[.!?\"'\-:;,]$", p) and not p.isupper() and "[" not in p]


def read_books(corpus: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Training and held-out paragraphs, a list a book."""
    train, held_out = [], []
    for path in sorted(corpus.glob("*.txt")):
        if path.name in SKIPPED:
            continue
        book = paragraphs(path.read_text(encoding="utf-8"))
        cut = round(len(book) * (1 - HELD_OUT))
        train.append(book[:cut])
        held_out.append(book[cut:])
    return train, held_out


def train_tokenizer(books: list[list[str]]) -> bytes:
    """A SentencePiece BPE model with Gemma's conventions: ids 0-3, turn markers, runs of newlines and of spaces."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([p for book in books for p in book]),
        model_writer=model,
        model_type="bpe",
        vocab_size=SHAPE["vocab_size"],
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>"]
        + ["\n" * n for n in range(1, 5)]
        + ["\u2581" * n for n in range(2, 9)],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        max_sentence_length=65536,
        num_threads=1,  # the number is stored in the file: another one gives other bytes
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


class Sampler:
    """Sequences of CONTEXT + 1 tokens that begin with <bos> and a paragraph's first word."""

    def __init__(self, books: list[list[str]], tokenizer: spm.SentencePieceProcessor):
        self.books = [[tokenizer.encode(p) for p in book] for book in books]
        self.starts = [(b, p) for b, book in enumerate(self.books) for p in range(len(book))]
        self.bos, self.eos = tokenizer.bos_id(), tokenizer.eos_id()
        self.blank = tokenizer.encode("\n\n")
        self.user, self.model = (tokenizer.encode(f"<start_of_turn>{role}\n") for role in ("user", "model"))
        self.end = tokenizer.encode("<end_of_turn>\n")

    def prose(self, book: int, paragraph: int) -> list[int]:
        ids = [self.bos]
        for p in self.books[book][paragraph:]:
            ids += p + self.blank
            if len(ids) > CONTEXT + 1:
                return ids[: CONTEXT + 1]
        return self.filled(ids[: -len(self.blank)])

    def chat(self, book: int, paragraph: int) -> list[int]:
        """Paragraphs taken in turns: the user tells one, the model goes on with the next."""
        ids = [self.bos]
        for n, p in enumerate(self.books[book][paragraph:]):
            ids += (self.model if n % 2 else self.user) + p + self.end
            if len(ids) > CONTEXT + 1:
                return ids[: CONTEXT + 1]
        return self.filled(ids)

    def filled(self, ids: list[int]) -> list[int]:
        """The book ended: <eos>, and whatever stands at another place to fill the row."""
        ids = [*ids, self.eos]
        return (ids + self.prose(0, 0))[: CONTEXT + 1] if len(ids) <= CONTEXT else ids[: CONTEXT + 1]

    def batch(self, seed: int, step: int, rows: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step])
        picks = rng.integers(0, len(self.starts), rows)
        make = [self.chat if talk else self.prose for talk in rng.random(rows) < CHAT_SHARE]
        return torch.tensor([one(*self.starts[pick]) for one, pick in zip(make, picks, strict=True)])

    def windows(self) -> torch.Tensor:
        """The whole text once, in consecutive rows: what the held-out loss is taken over."""
        rows = []
        for book in self.books:
            stream = [token for p in book for token in p + self.blank]
            rows += [[self.bos, *stream[i : i + CONTEXT]] for i in range(0, len(stream) - CONTEXT + 1, CONTEXT)]
        return torch.tensor(rows)


@torch.no_grad()
def mean_loss(model: Gemma2ForCausalLM, rows: torch.Tensor) -> float:
    """Nats a token over all rows."""
    model.eval()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in rows.split(8)]
    model.train()
    return float(sum(losses) / len(rows))


def add_dropout(model: Gemma2ForCausalLM, share: float) -> None:
    """Drop a share of what each half-layer adds to the residual stream, while training only.

    Gemma 2 has no such dropout (it had trillions of tokens); with three parameters for every token it is what keeps
    this model from learning its books by heart. Hooks leave the model itself as transformers made it.
    """
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.register_forward_hook(lambda m, _, out: torch.nn.functional.dropout(out, share, m.training))
    model.model.embed_tokens.register_forward_hook(
        lambda m, _, out: torch.nn.functional.dropout(out, share, m.training)
    )


def learning_rate(step: int, args: argparse.Namespace) -> float:
    warm = min(1.0, (step + 1) / 150)
    return float(args.lr) * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps))))


def save_atomically(state: object, path: Path) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def as_bf16(model: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    """The model with its weights rounded to bf16 (computing in float32): what a reader of the checkpoint gets."""
    rounded = Gemma2ForCausalLM._from_config(model.config, attn_implementation="eager")
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    return rounded


def export(model: Gemma2ForCausalLM, tokenizer: bytes, report: dict[str, object], out: Path) -> None:
    """Write a Hugging Face folder with the released layout; the folder appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent))
    weights = {n: v.detach().bfloat16().contiguous() for n, v in model.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "model_type": "gemma2",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    } | SHAPE
    turn_end = spm.SentencePieceProcessor(model_proto=tokenizer).piece_to_id("<end_of_turn>")
    generation = {"bos_token_id": 2, "eos_token_id": [1, turn_end], "pad_token_id": 0, "cache_implementation": "hybrid"}
    specials = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "GemmaTokenizer"}
        | specials,
        "training.json": report,
    }
    for name, content in files.items():
        (staging / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (staging / "tokenizer.model").write_bytes(tokenizer)
    for path in staging.iterdir():
        path.chmod(0o644)
    staging.chmod(0o755)
    if out.exists():
        shutil.rmtree(out)
    staging.rename(out)


def sample(model: Gemma2ForCausalLM, tokenizer: spm.SentencePieceProcessor, prompt: str) -> str:
    ids = torch.tensor([[tokenizer.bos_id(), *tokenizer.encode(prompt)]])
    model.eval()
    out = model.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.8, top_k=40, pad_token_id=0)
    model.train()
    return str(tokenizer.decode(out[0].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("../shared/corpus"))
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="where the run is kept between starts")
    parser.add_argument("--out", type=Path, default=Path("refgemma/checkpoints/tiny"))
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--rows", type=int, default=12, help="sequences a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2, help="on matrices; there are 3 parameters a token")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--every", type=int, default=250, help="steps between held-out losses and saved states")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    train_books, held_out_books = read_books(args.corpus)
    if not train_books:
        sys.exit(f"train.py: no books in {args.corpus}: name the folder of the public-domain texts with --corpus")
    tokenizer_bytes = train_tokenizer(train_books)
    tokenizer = spm.SentencePieceProcessor(model_proto=tokenizer_bytes)
    train_set, held_out = Sampler(train_books, tokenizer), Sampler(held_out_books, tokenizer).windows()
    held_out_text = sum(len(p) + 2 for book in held_out_books for p in book)
    held_out_tokens = sum(len(tokenizer.encode(p)) + 1 for book in held_out_books for p in book)

    torch.manual_seed(args.seed)
    config = Gemma2Config(**SHAPE, tie_word_embeddings=True)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    add_dropout(model, args.dropout)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))

    state_file, best_file = args.work / "state.pt", args.work / "best.pt"
    step, best, history, seconds, schedules = 0, math.inf, [], 0.0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best, history, seconds = state["step"], state["best"], state["history"], state["seconds"]
        schedules = state["schedules"]
        print(f"train.py: going on from step {step}", file=sys.stderr)

    schedules.append([step, args.steps])  # --steps sets the learning rates: a run resumed with another says so

    model.train()
    began = time.monotonic()
    bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=5, disable=not sys.stderr.isatty())
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        torch.manual_seed(
            args.seed * 1_000_003 + step
        )  # of the dropout: a resumed run drops what it would have dropped
        rows = train_set.batch(args.seed, step, args.rows)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{best:.3f}", refresh=False)
        if step % args.every == 0 or step == args.steps:
            held = mean_loss(model, held_out)
            history.append([step, round(loss.item(), 4), round(held, 4)])
            seconds, began = seconds + time.monotonic() - began, time.monotonic()
            print(f"step {step}: train {loss.item():.4f} held out {held:.4f} ({seconds:.0f} s)", flush=True)
            if held < best:
                best = held
                save_atomically({"model": model.state_dict(), "step": step}, best_file)
            save_atomically(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "best": best,
                    "history": history,
                    "seconds": seconds,
                    "schedules": schedules,
                },
                state_file,
            )
    bar.close()

    best_state = torch.load(best_file, weights_only=True)
    model.load_state_dict(best_state["model"])
    rounded = as_bf16(model)
    nats = mean_loss(rounded, held_out)
    report = {
        "corpus": sorted(path.name for path in args.corpus.glob("*.txt") if path.name not in SKIPPED),
        "date": date.today().isoformat(),
        "dropout": args.dropout,
        "exported_step": best_state["step"],
        "held_out_bits_per_character": round(nats * held_out_tokens / held_out_text / math.log(2), 4),
        "held_out_nats_per_token_bf16_weights": round(nats, 4),
        "held_out_tokens": int(held_out[:, 1:].numel()),
        "history_step_train_heldout": history,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows_per_step": args.rows,
        "seconds": round(seconds),
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "schedules_from_step_to_steps": schedules,
        "steps": args.steps,
        "tokens_per_row": CONTEXT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "training_tokens": sum(len(p) for book in train_set.books for p in book),
    }
    export(model, tokenizer_bytes, report, args.out)
    print(json.dumps({k: v for k, v in report.items() if k != "history_step_train_heldout"}, indent=2))
    for prompt in ("Once upon a time", '"Come here," said the'):
        print("\n---", sample(rounded, tokenizer, prompt))


if __name__ == "__main__":
    main()

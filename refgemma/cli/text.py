"""Run the commands that read or write text: `generate`, `chat` and `perplexity`. Checked through the command line."""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from tqdm import tqdm

from refgemma import fast
from refgemma.cli.output import OK, as_json, prompt_ids, say, show_text
from refgemma.errors import UsageError
from refgemma.files import pluralise, read_file
from refgemma.generation.decode import Memory, Prompts, collect_settings, continue_prompt, generate_batch
from refgemma.generation.generation_config import GenerationConfig
from refgemma.generation.greedy import greedy, is_plain_greedy
from refgemma.generation.perplexity import GEMMA_CPP_TOKENS, gemma_cpp_bits_per_byte, strided_perplexity
from refgemma.goldens.released import PUBLISHED, published_figures, published_text
from refgemma.hub import PACKAGE
from refgemma.inputs import InputError
from refgemma.model import reference_outputs
from refgemma.modeling.pretrained import Pretrained, load
from refgemma.tokenizer.tokenizer import TextStream, Tokenizer


def generation_settings(model: Pretrained, args: argparse.Namespace) -> GenerationConfig:
    """Check the sampling arguments, and return the settings."""
    others = {name: getattr(args, name) for name in ("min_p", "repetition_penalty", "min_new_tokens")}
    others["num_beams"] = getattr(args, "num_beams", 1)
    common = (args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, model.stop_ids)
    return collect_settings(model.config, *common, others)


def is_embedded(model: Pretrained) -> bool:
    """Return True if a model is inside this package; such a model is small enough for the slow definition."""
    return model.folder.parent == PACKAGE / "checkpoints"


def new_tokens(ids: Sequence[int], model: Pretrained, args: argparse.Namespace) -> Iterator[int]:
    """Yield the tokens generated after `ids`, one by one; a beam search yields all tokens at its end."""
    call = generation_settings(model, args)
    if is_plain_greedy(call) and (args.reference or is_embedded(model)):
        return greedy(ids, model.weights, model.config, max_new_tokens=args.max_new_tokens, stop_ids=model.stop_ids)
    if call.num_beams == 1:
        return continue_prompt(ids, model.weights, model.config, call, args.reference)
    output = generate_batch(Prompts([ids]), model.weights, model.config, call, reference=args.reference)
    found = output.sequences[0, len(ids) :].tolist()
    end = next((n for n, token in enumerate(found) if token in model.stop_ids), len(found))
    return iter(found[: end + 1])


def stream_text(tokens: Iterator[int], model: Pretrained, show: bool) -> tuple[list[int], str]:
    """Return the tokens and their text; if `show`, print the text as it arrives, or the ids without a tokenizer."""
    stream, ids, texts = TextStream(model.tokenizer) if model.has_tokenizer else None, [], []
    for token in tokens:
        ids.append(token)
        if stream is None or token not in model.stop_ids:
            texts.append(stream.push(token) if stream else f",{token}")
            if show:
                show_text(texts[-1])
    texts.append(stream.finish() if stream else "")
    if show:
        show_text(texts[-1], end="\n")
    return ids, "".join(texts)


def run_generate(args: argparse.Namespace) -> int:
    """Run ``refgemma generate``; print ids if the model has no tokenizer."""
    model = load(args.model, args.dtype, args.revision, args.download, read=False)
    ids, known = prompt_ids(args, model), model.has_tokenizer
    model = model.read()
    tokens = new_tokens(ids, model, args)
    began = time.perf_counter()
    if not args.json:
        prompt = model.tokenizer.decode(ids, skip_special_tokens=True) if known else ",".join(map(str, ids))
        show_text(prompt)
    made, text = stream_text(tokens, model, show=not args.json)
    if args.json:
        as_json({
            "prompt_ids": ids,
            "ids": made,
            "text": text if known else None,
            "stopped": "stop_id" if made[-1] in model.stop_ids else "max_new_tokens",
            "tokens_per_second": round(len(made) / (time.perf_counter() - began), 1),
        })  # fmt: skip
    return OK


def read_line() -> str:
    """Return the next line of input, with a prompt on a terminal; empty at the end of input."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        print("you> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def run_chat(args: argparse.Namespace) -> int:
    """Run ``refgemma chat``; with ``--json``, print one object per turn. Each turn reads only its new tokens."""
    model = load(args.model, args.dtype, args.revision, args.download, read=False)
    generation_settings(model, args)  # raises an error for wrong settings before the first turn
    _ = model.tokenizer  # raises an error if the model has no tokenizer
    model, memory, messages = model.read(), Memory(), list[dict[str, str]]()
    limit = model.config.max_position_embeddings
    while True:
        line = read_line()
        if not line:
            return OK
        messages.append({"role": "user", "content": line})
        # Sanitized: a typed "<end_of_turn>" is plain text and does not end the turn.
        ids = model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
        )
        _check_room(len(ids), limit)
        call = generation_settings(model, args)
        call.max_new_tokens = min(args.max_new_tokens, limit - len(ids))
        reference = args.reference or is_embedded(model)
        tokens = continue_prompt(ids, model.weights, model.config, call, reference, memory=memory)
        made, text = stream_text(tokens, model, show=not args.json)
        messages.append({"role": "assistant", "content": text})
        if args.json:
            as_json({"turn": len(messages) // 2, "ids": made, "text": text}, indent=None)
        _check_room(len(ids) + len(made), limit)


def _check_room(tokens: int, limit: int) -> None:
    """Raise an error if a chat has reached the model's maximum length, because longer chats get meaningless answers."""
    if tokens >= limit:
        raise InputError(
            f"the chat has {pluralise(tokens, 'token')}; the model's maximum is {limit} "
            "(max_position_embeddings): start a new chat"
        )


def text_of(args: argparse.Namespace) -> str:
    """Return the text of ``FILE`` or ``--published``."""
    if (args.file is None) == (args.published is None):
        raise UsageError("give either a FILE or --published, and only one of them")
    if args.published:
        return published_text(args.published)
    try:
        return read_file(args.file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{args.file}: is not UTF-8 text (byte {error.start}); convert it") from None


def find_traps(text: str, tokenizer: Tokenizer) -> list[str]:
    r"""Return a warning for each feature of `text` that distorts its perplexity.

    Examples
    --------
    >>> import refgemma
    >>> find_traps("one\r\ntwo", refgemma.Tokenizer.from_pretrained("tiny"))
    ['1 line ends in CR LF, and models read LF; convert it with: tr -d "\\r"']
    """
    found = []
    if text.startswith("\ufeff"):
        found.append("begins with a byte order mark, which is not part of the text; save it as UTF-8 without one")
    if lines := text.count("\r\n"):
        what = "line ends" if lines == 1 else "lines end"
        found.append(f'{lines} {what} in CR LF, and models read LF; convert it with: tr -d "\\r"')
    special = {token: text.count(token) for token in tokenizer.all_special_tokens if token in text}
    if special:
        names = ", ".join(f"{token} ({number} times)" for token, number in special.items())
        found.append(f"has special tokens written out: {names}; remove them: <bos> is added automatically")
    return found


def run_perplexity(args: argparse.Namespace) -> int:
    """Run ``refgemma perplexity``."""
    text = text_of(args)
    model = load(args.model, args.dtype, args.revision, args.download, read=False)
    for warning in find_traps(text, model.tokenizer):
        say(f"refgemma: {args.file or args.published}: {warning}", error=True)
    ids, nbytes = model.tokenizer.encode(text), len(text.encode())
    usual = min(4096, model.config.max_position_embeddings)
    max_length = usual if args.max_length is None else args.max_length
    stride = max_length if args.stride is None else min(args.stride, max_length)
    layers, model = reference_outputs if args.reference else fast.outputs, model.read()
    with tqdm(total=len(ids), unit="token", disable=None, delay=2, leave=False) as bar:
        strided = strided_perplexity(ids, model.weights, model.config, max_length, stride, layers, bar.update)
    bits = strided.nats_per_token * (len(ids) - 1) / math.log(2) / nbytes
    gemma_cpp = gemma_cpp_bits_per_byte(ids, nbytes, model.weights, model.config, layers)
    figures = published_figures(text)
    if args.json:
        as_json({
            "tokens": len(ids),
            "bytes": nbytes,
            "transformers": {**asdict(strided), "max_length": max_length, "stride": stride, "bits_per_byte": bits},
            "gemma_cpp_bits_per_byte": gemma_cpp,
            "gemma_cpp_tokens": min(len(ids), GEMMA_CPP_TOKENS),
            "published_gemma_cpp_bits_per_byte": figures,
        })  # fmt: skip
        return OK
    say(f"{pluralise(len(ids), 'token')}, {pluralise(nbytes, 'byte')}, computed in {args.dtype}")
    say(
        f"transformers: perplexity {strided.perplexity:.4f} ({strided.nats_per_token:.4f} nats per token, {bits:.4f} "
        f"bits per byte of the whole text, windows: {strided.windows} of {max_length} every {stride})"
    )
    if len(ids) > GEMMA_CPP_TOKENS:
        say(
            f"gemma.cpp:    sums the first {GEMMA_CPP_TOKENS} of the {pluralise(len(ids), 'token')} and divides by all "
            "bytes: meaningless for a text this long"
        )
    else:
        say(f"gemma.cpp:    {gemma_cpp:.4f} bits per byte, <bos> counted as log2 of the vocabulary")
    for model_name, figure in figures.items():
        say(f"              {figure:.2f} published for gemma-2-{model_name}, within 0.02")
    if not figures:
        say(f"              no published figure for this text; published for: --published {' or '.join(PUBLISHED)}")
    return OK

"""Write a GGUF file that llama.cpp loads, with the library gguf 0.19. Checked by reading it back, and by the logits of
llama.cpp.

Names, metadata and the choice of tensors in float32 follow llama.cpp's own converter. The file has 1 + w for a norm,
rounded once to float32; this loses no bit of a bfloat16 w that is 0 or at least 2**-16.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refgemma.config import Gemma2Config
from refgemma.convert.layouts import Original, Piece, add_one
from refgemma.files import new_file
from refgemma.gguf import IDS, NUMBERS, SIZES, Gguf, GgufTensor, config_fields, read_gguf
from refgemma.tokenizer.added_tokens import SPACE
from refgemma.tokenizer.sentencepiece_model import CONTROL, UNKNOWN, UNUSED, USER_DEFINED
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.gguf_weights import gguf_names, locate
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import OutputTensor, check_same
from refgemma.weights.stored import CheckpointError

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ALIGNMENT = 32
# Fields that llama.cpp fixes for every Gemma 2, or for which it has a default that cannot be switched off.
FIXED = (
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation", "layer_types",
    "attention_bias", "tie_word_embeddings",
)  # fmt: skip


def gguf_layout(config: Gemma2Config) -> tuple[list[Original], list[Original]]:
    """Return the matrices and the norms of a GGUF file.

    Examples
    --------
    >>> matrices, norms = gguf_layout(Gemma2Config.preset("2b"))
    >>> len(matrices), len(norms), norms[-1].name
    (183, 105, 'output_norm.weight')
    """
    names = gguf_names(config.num_hidden_layers)
    layout: tuple[list[Original], list[Original]] = ([], [])
    for name, shape in tensor_shapes(config).items():
        norm = len(shape) == 1
        piece = Piece(name, shape[0], add_one) if norm else Piece(name, shape[0])
        layout[norm].append(Original(names[name], shape, (piece,)))
    return layout


def _describe(config: Gemma2Config) -> dict[str, int | float]:
    """Return the metadata of the model; whole numbers become uint32 in the file, others float32."""
    numbers = {f"gemma2.{key}": getattr(config, field) for field, (key, _) in (SIZES | NUMBERS).items()}
    numbers |= {key: getattr(config, field) for field, key in IDS.items()}
    numbers |= {
        "gemma2.vocab_size": config.vocab_size,
        "gemma2.attention.head_count_kv": config.num_key_value_heads,
        "gemma2.attention.key_length": config.head_dim,
        "gemma2.attention.value_length": config.head_dim,
    }
    first = {key: value[0] if isinstance(value, tuple) else value for key, value in numbers.items()}
    return {key: value for key, value in first.items() if value is not None}


def check_model(config: Gemma2Config, source: Path) -> None:
    """Raise an error if llama.cpp would compute the model differently.

    Raises
    ------
    CheckpointError
        If a field differs from llama.cpp's value; the message names both.
    """
    described = {"general.architecture": "gemma2"} | _describe(config)
    table = GgufTensor("token_embd.weight", "F32", (config.vocab_size, config.hidden_size), 0, 0)
    file = Gguf(source, described, {table.name: table}, 0)
    taken = Gemma2Config.from_dict(config_fields(file, CheckpointError), str(source))
    for field in FIXED:
        ours, theirs = getattr(config, field), getattr(taken, field)
        same = (
            np.float32(ours) == np.float32(theirs) if isinstance(theirs, float) and ours is not None else ours == theirs
        )
        if not same:
            remedy = "; write another format"
            if field == "query_pre_attn_scalar":
                remedy = f"; first multiply each q_proj by {(theirs / ours) ** 0.5!r} and set the field to {theirs}"
            raise CheckpointError(
                f"{source}: {field} is {ours!r}, but llama.cpp uses {theirs!r} for such a model, which gives other "
                f"logits{remedy}"
            )


# --- the file ---------------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add pieces, scores and types; user-defined pieces have plain spaces, rows without a token unused pieces."""
    pieces, special = tokenizer._vocabulary.pieces, set(tokenizer.all_special_ids)
    kinds = [CONTROL if n in special and p.type != UNKNOWN else p.type for n, p in enumerate(pieces)]
    names = [
        piece.name.replace(SPACE, " ") if kind == USER_DEFINED else piece.name
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    beyond = vocab_size - len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*names, *(f"[PAD{len(pieces) + n}]" for n in range(beyond))])
    writer.add_token_scores([*(piece.score for piece in pieces), *[-10000.0] * beyond])
    writer.add_token_types([*kinds, *[UNUSED] * beyond])
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer.add_bos_token)
    writer.add_add_eos_token(tokenizer.add_eos_token)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        writer.add_chat_template(template)


def _make_header(config: Gemma2Config, tokenizer: Tokenizer | None, outputs: Sequence[OutputTensor]) -> bytes:
    """Let the gguf library write the file without tensors, and return the bytes."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError('writing GGUF needs the library gguf; pip install "refgemma[gguf]"') from None
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "header.gguf", "gemma2")
        for key, value in _describe(config).items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            _add_tokenizer(writer, tokenizer, config.vocab_size)
        for output in outputs:
            kind = gguf.GGMLQuantizationType[CODES[output.dtype]]
            writer.add_tensor_info(output.name, output.shape, np.dtype(np.float32), output.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return (Path(folder) / "header.gguf").read_bytes()


def write_gguf(path: Path, config: Gemma2Config, tokenizer: Tokenizer | None, outputs: Sequence[OutputTensor]) -> None:
    """Write a GGUF file, some rows of a tensor at a time, then read it back and compare.

    Raises
    ------
    CheckpointError
        If the library is not installed, or a tensor differs when read back.
    OSError
        If the file cannot be written; `path` is then unchanged.
    """
    with (
        new_file(path) as file,
        tqdm(
            total=sum(o.nbytes for o in outputs), unit="B", unit_scale=True, desc="writing", disable=None, delay=2
        ) as bar,
    ):
        file.write(_make_header(config, tokenizer, outputs))
        for output in outputs:
            file.write(bytes(-file.tell() % ALIGNMENT))
            for block in output.blocks():
                file.write(block.reshape(-1).view(np.uint8).data)
                bar.update(block.nbytes)
        file.flush()
        os.fsync(file.fileno())
        written = read_gguf(file.name, CheckpointError)
        check_same({name: locate(written, x) for name, x in written.tensors.items()}, outputs, path)

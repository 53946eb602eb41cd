"""Load a model by name: configuration, weights, tokenizer and stop ids from one folder.

Checked against the layout of the released Gemma 2 folders and of transformers 5.23 `save_pretrained`.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from refgemma.config import Gemma2Config
from refgemma.files import read_object
from refgemma.generation.decode import stop_tokens
from refgemma.hub import find_model
from refgemma.tokenizer.gguf_tokenizer import has_tokens
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from refgemma.weights.parameters import Weights

TOKENIZERS, END_OF_TURN = ("tokenizer.json", "tokenizer.model"), "<end_of_turn>"


@dataclass(frozen=True)
class Pretrained:
    """The contents of a model's folder; pass its parts to `forward` or `generate`."""

    folder: Path
    config: Gemma2Config
    weights: Weights
    stop_ids: frozenset[int]
    checkpoint: Checkpoint = field(repr=False)
    dtype: str

    @property
    def has_tokenizer(self) -> bool:
        """True if the folder has a tokenizer; folders from ``refgemma synth`` have none."""
        return _has_tokenizer(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first access. A model without a tokenizer can still run on token ids."""
        return Tokenizer.from_pretrained(self.folder)

    def read(self) -> "Pretrained":
        """Return the same model; the weights are in memory if they take at most 4 GiB."""
        model = replace(self, weights=self.checkpoint.weights(self.dtype))
        vars(model).update(
            {name: value for name, value in vars(self).items() if name == "tokenizer"}
        )  # keep the tokenizer if it was read
        return model


def load(
    name: str | Path = "tiny", dtype: str = "float32", revision: str = "main", download: bool = False,
    gguf_file: str | None = None, read: bool = True,
) -> Pretrained:  # fmt: skip
    """Load a model: configuration, weights and tokenizer.

    Parameters
    ----------
    name : str or path
        ``"tiny"``, the trained model inside this package; ``"conformance"``, a small model with random weights; a
        Hugging Face folder of a Gemma 2; a ``.gguf`` file; or a hub id whose snapshot is in the cache. See
        `refgemma.hub.find_model`.
    dtype : str
        The precision of the computation: ``float32``, ``float64``, ``bfloat16`` or ``float16``. Half precision rounds
        where PyTorch does. It is slower here than float32, not faster.
    revision, download, gguf_file
        As in `refgemma.hub.find_model`.
    read : bool
        If true, call `Pretrained.read`. If false, weights are read only when used.

    Returns
    -------
    Pretrained
        The model. If it takes more than 4 GiB in its precision, each forward pass reads the weights from disk, layer by
        layer.

    Raises
    ------
    CheckpointError, ConfigError, ModelNameError, TokenizerError
        If the model cannot be loaded; the message names the file and the tensor.

    Examples
    --------
    >>> tiny = load("tiny")
    >>> tiny.config.num_hidden_layers, tiny.tokenizer.vocab_size
    (6, 2048)
    """
    folder = find_model(name, revision, download, gguf_file=gguf_file)
    checkpoint = open_checkpoint(folder)
    stops = _read_stop_ids(checkpoint.folder, checkpoint.config)
    place = folder if _has_tokenizer(folder) else checkpoint.folder  # an adapter without a tokenizer uses the base's
    model = Pretrained(place, checkpoint.config, checkpoint.streamed(dtype), stops, checkpoint, dtype)
    # A chat model ends its turn with <end_of_turn>, but the released configuration does not list this as an end token.
    if model.has_tokenizer and END_OF_TURN in model.tokenizer.added_tokens_encoder:
        end = model.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        object.__setattr__(model, "stop_ids", stops | {end})
    return model.read() if read else model


def _has_tokenizer(folder: Path) -> bool:
    return has_tokens(folder) if folder.is_file() else any((folder / name).exists() for name in TOKENIZERS)


def _read_stop_ids(folder: Path, config: Gemma2Config) -> frozenset[int]:
    """Return the stop ids from ``generation_config.json``, or else from the configuration."""
    path = folder / "generation_config.json"
    stops = stop_tokens(config)
    if path.exists():
        listed = read_object(path, CheckpointError).get("eos_token_id")
        if listed is not None:
            ids = listed if isinstance(listed, list) else [listed]
            if not all(type(token) is int and 0 <= token < config.vocab_size for token in ids):
                raise CheckpointError(f"{path}: eos_token_id is {listed!r}; it must be one or several token ids")
            stops = frozenset(ids)
    return stops

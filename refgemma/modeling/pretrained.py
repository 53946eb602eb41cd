"""A model by name: its configuration, weights, tokenizer and stop ids from one folder. Checked against the layout of
the released Gemma 2 folders and of transformers 5.23 `save_pretrained`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refgemma.config import Gemma2Config
from refgemma.files import read_object
from refgemma.generation.decode import stop_tokens
from refgemma.hub import find_model
from refgemma.tokenizer.gguf_tokenizer import has_tokens
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint
from refgemma.weights.parameters import Weights

TOKENIZERS, END_OF_TURN = ("tokenizer.json", "tokenizer.model"), "<end_of_turn>"


@dataclass(frozen=True)
class Pretrained:
    """Everything that a folder holds: call `forward` or `generate` with its parts."""

    folder: Path
    config: Gemma2Config
    weights: Weights
    stop_ids: frozenset[int]

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds one; ``refgemma synth`` has none to write."""
        return _has_tokenizer(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is first asked for: a model without one can still be given token ids."""
        return Tokenizer.from_pretrained(self.folder)


def load(
    name: str | Path = "tiny", dtype: str = "float32", revision: str = "main", download: bool = False,
    gguf_file: str | None = None,
) -> Pretrained:  # fmt: skip
    """Load a model to compute with.

    Parameters
    ----------
    name : str or path
        ``"tiny"``, the trained model inside this package; ``"conformance"``, a small one with random weights; a Hugging
        Face folder of a Gemma 2; a ``.gguf`` file; or a hub id whose snapshot is in the cache. See
        `refgemma.hub.find_model`.
    dtype : str
        ``float32``, ``float64``, ``bfloat16`` or ``float16``: the precision of the computation. Half precision rounds
        where PyTorch does, which makes it slower here than float32, not faster.
    revision, download, gguf_file
        As of `refgemma.hub.find_model`.

    Returns
    -------
    Pretrained
        Models of more than 4 GiB in that precision are read from disk layer by layer, at every forward pass.

    Raises
    ------
    CheckpointError, ConfigError, ModelNameError, TokenizerError
        Naming the file, and the tensor, that is at fault.

    Examples
    --------
    >>> tiny = load("tiny")
    >>> tiny.config.num_hidden_layers, tiny.tokenizer.vocab_size
    (6, 2048)
    """
    folder = find_model(name, revision, download, gguf_file=gguf_file)
    checkpoint = open_checkpoint(folder)
    stops = _read_stop_ids(checkpoint.folder, checkpoint.config)
    place = folder if _has_tokenizer(folder) else checkpoint.folder  # an adapter may leave the tokenizer to its base
    model = Pretrained(place, checkpoint.config, checkpoint.weights(dtype), stops)
    # A chat model ends its turn with <end_of_turn>, which the released configuration does not list as an end.
    if model.has_tokenizer and END_OF_TURN in model.tokenizer.added_tokens_encoder:
        end = model.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        object.__setattr__(model, "stop_ids", stops | {end})
    return model


def _has_tokenizer(folder: Path) -> bool:
    return has_tokens(folder) if folder.is_file() else any((folder / name).exists() for name in TOKENIZERS)


def _read_stop_ids(folder: Path, config: Gemma2Config) -> frozenset[int]:
    """Return the ends in ``generation_config.json``, or else in the configuration."""
    path = folder / "generation_config.json"
    stops = stop_tokens(config)
    if path.exists():
        listed = read_object(path, CheckpointError).get("eos_token_id")
        if listed is not None:
            ids = listed if isinstance(listed, list) else [listed]
            if not all(type(token) is int and 0 <= token < config.vocab_size for token in ids):
                raise CheckpointError(f"{path}: eos_token_id is {listed!r}, not one or several token ids")
            stops = frozenset(ids)
    return stops

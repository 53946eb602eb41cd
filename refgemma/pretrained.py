"""A model by name: its configuration, weights, tokenizer and stop ids from one folder. Checked against the layout of
the released Gemma 2 folders and of transformers 5.23 `save_pretrained`."""

import json
from dataclasses import dataclass
from pathlib import Path

from refgemma.config import Gemma2Config
from refgemma.generation import stop_tokens
from refgemma.tokenizer import Tokenizer
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint
from refgemma.weights.parameters import Weights

PACKAGED = Path(__file__).parent / "checkpoints"
RESIDENT_BYTES = 4 * 2**30  # a model that needs more is read from disk a layer at a time


@dataclass(frozen=True)
class Pretrained:
    """Everything that a folder holds: call `forward` or `generate` with its parts."""

    folder: Path
    config: Gemma2Config
    weights: Weights
    tokenizer: Tokenizer
    stop_ids: frozenset[int]


def model_folder(name: str | Path) -> Path:
    """The folder of a model: ``"tiny"`` is inside the package, anything else is a path.

    Raises
    ------
    CheckpointError
        If there is no such folder.

    Examples
    --------
    >>> model_folder("tiny").name
    'tiny'
    """
    folder = PACKAGED / "tiny" if str(name) == "tiny" else Path(name)
    if not folder.is_dir():
        raise CheckpointError(f"{name}: no such folder; a model is 'tiny' or a folder with config.json and weights")
    return folder


def load(name: str | Path = "tiny", dtype: str = "float32") -> Pretrained:
    """Load a model to compute with.

    Parameters
    ----------
    name : str or path
        ``"tiny"``, the trained model inside this package, or a Hugging Face folder of a Gemma 2.
    dtype : str
        ``float32``, ``float64``, ``bfloat16`` or ``float16``: the precision of the computation. Half precision rounds
        where PyTorch does, which makes it slower here than float32, not faster.

    Returns
    -------
    Pretrained
        Models of more than 4 GiB in that precision are read from disk layer by layer, at every forward pass.

    Raises
    ------
    CheckpointError, ConfigError, TokenizerError
        Naming the file, and the tensor, that is at fault.

    Examples
    --------
    >>> tiny = load("tiny")
    >>> tiny.config.num_hidden_layers, tiny.tokenizer.vocab_size
    (6, 2048)
    """
    folder = model_folder(name)
    checkpoint = open_checkpoint(folder)
    needed = checkpoint.parameters * (8 if dtype == "float64" else 4)
    weights = checkpoint.resident(dtype) if needed <= RESIDENT_BYTES else checkpoint.streamed(dtype)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    return Pretrained(folder, checkpoint.config, weights, tokenizer, _stop_ids(folder, checkpoint.config, tokenizer))


def _stop_ids(folder: Path, config: Gemma2Config, tokenizer: Tokenizer) -> frozenset[int]:
    """Those of ``generation_config.json`` or else of the configuration, and the end of a turn in any case.

    A chat model ends its turn with ``<end_of_turn>``, which the released configuration does not list as an end.
    """
    path = folder / "generation_config.json"
    stops = stop_tokens(config)
    if path.exists():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
        if listed is not None:
            stops = frozenset(listed if isinstance(listed, list) else [listed])
    return stops | ({tokenizer.end_of_turn_id} if tokenizer.end_of_turn_id is not None else set())

"""Find the tensors of a Gemma 2 under the names that training libraries give them.

Checked against the loader of transformers 5.23.

Wrappers of PyTorch, PEFT and TRL add prefixes to the names. transformers does not recognise such names and leaves every
weight random. Here the prefixes are removed, with a warning, if all tensors then fit the model.
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.files import pluralise, quote_few
from refgemma.hub import CONFIG_JSON
from refgemma.weights.parameters import EMBED_TOKENS, LM_HEAD, SCORE_BIAS, SCORE_WEIGHT, tensor_shapes
from refgemma.weights.stored import NUMBERS_AT_ONCE, CheckpointError, Stored

# torch.compile and FSDP insert a prefix at any depth; the other prefixes come first in every name.
WRAPPER = re.compile(
    r"^(?:module|base_model\.model|pretrained_model)\.|"
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
WRAPPERS_LIMIT = 4  # nested wrappers
# Heads that training libraries add to the language model, and the rotary table of older releases. transformers does not
# read them either, and no logit depends on them.
UNREAD = re.compile(r"(v_head|value_head|reward_head|classifier|score)\..*|(.*\.)?rotary_emb\.inv_freq")


def match_names(
    found: Mapping[str, Stored], config: Gemma2Config, source: Path
) -> tuple[Gemma2Config, dict[str, Stored]]:
    """Return the tensors with the names and order of `tensor_shapes`; a classifier's head comes last.

    Parameters
    ----------
    found : mapping of str to Stored
        All tensors of a checkpoint, by their names in the files.
    config : Gemma2Config
        The configuration in ``config.json``.
    source : Path
        The file to name in errors about the whole checkpoint.

    Returns
    -------
    config : Gemma2Config
        The same configuration; but if it ties a head that is stored with different numbers, the result is not tied.
    tensors : dict of str to Stored
        The tensors, by their names in `tensor_shapes`.

    Raises
    ------
    CheckpointError
        If a tensor is missing, unknown or stored twice, or has the wrong shape.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.open_checkpoint(refgemma.find_model("tiny"))
    >>> renamed = {name.replace("model.", "model.model."): tensor for name, tensor in tiny.tensors.items()}
    >>> match_names(renamed, tiny.config, tiny.folder)[1] == tiny.tensors
    True
    """
    expected = tensor_shapes(config)
    named = _rename(found, expected, source)
    head = named.pop(LM_HEAD, None) if config.tie_word_embeddings else None
    if head is not None and EMBED_TOKENS not in named:
        named[EMBED_TOKENS], head = head, None  # embedding and head are tied, so one of them is enough
    score = {name: named.pop(name) for name in (SCORE_WEIGHT, SCORE_BIAS) if name in named}
    if LM_HEAD in expected and LM_HEAD not in named and (EMBED_TOKENS not in found or score):
        del expected[LM_HEAD]  # only a causal language model has a head
    _check_tensors(named, expected, config, source)
    if head is not None and has_other_numbers(head, named[EMBED_TOKENS]):
        warnings.warn(
            f"{head.file}: tensor {head.name!r} differs from {named[EMBED_TOKENS].name!r}, although {CONFIG_JSON} ties "
            "the two; it is used as stored, as in transformers: set tie_word_embeddings to false",
            stacklevel=2,
        )
        config, expected[LM_HEAD] = config.changed(tie_word_embeddings=False), head.shape
        named[LM_HEAD] = head
    return config, {name: named[name] for name in expected} | score


def _rename(found: Mapping[str, Stored], expected: Mapping[str, object], source: Path) -> dict[str, Stored]:
    """Return each tensor under its name in a causal language model; warn about removed prefixes and unread tensors."""
    own = {*expected, LM_HEAD, SCORE_WEIGHT, SCORE_BIAS}
    named: dict[str, Stored] = {}
    wrappers: set[str] = set()
    unread: list[str] = []
    for name, tensor in found.items():
        plain = name
        taken_off: list[str] = []
        for _ in range(WRAPPERS_LIMIT):
            taken_off += WRAPPER.findall(plain)
            plain = WRAPPER.sub("", plain)
        # Names in a bare Gemma2Model lack "model."; names in a wrapped model have it twice.
        full = next((n for n in (plain, f"model.{plain}", plain.removeprefix("model.")) if n in own), name)
        if full not in own and UNREAD.fullmatch(plain):
            unread.append(name)
        elif full in named:
            raise CheckpointError(f"{tensor.file}: tensor {name!r} is also stored as {named[full].name!r}; remove one")
        else:
            named[full] = tensor
            wrappers.update(taken_off)
    if wrappers and own.issuperset(named) and expected.keys() - {EMBED_TOKENS, LM_HEAD} <= named.keys():
        warnings.warn(
            f"{source}: the prefix {quote_few(sorted(wrappers))} of tensor names is ignored; transformers does not "
            "ignore it, so save the model without its wrapper",
            stacklevel=3,
        )
    if unread:
        warnings.warn(
            f"{source}: {quote_few(unread)} is not read, as in transformers; no logit depends on it", stacklevel=3
        )
    return named


def _check_tensors(
    named: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], config: Gemma2Config, source: Path
) -> None:
    """Raise an error if a tensor is missing, unexpected or of the wrong shape."""
    missing, extra = [name for name in expected if name not in named], [name for name in named if name not in expected]
    if any(".lora_" in name or ".base_layer." in name for name in extra):
        raise CheckpointError(
            f"{source}: contains an unmerged adapter: {quote_few(extra)}; merge it with PEFT's "
            "merge_and_unload() and save the model again"
        )
    if missing == [LM_HEAD] and not extra:
        raise CheckpointError(
            f"{source}: lacks {LM_HEAD!r}, which tie_word_embeddings false requires (transformers uses a random one); "
            f"set it to true in {CONFIG_JSON} if the head is the embedding, as in each released Gemma 2"
        )
    if missing or extra:
        faults = (
            [f"lacks {len(missing)} of {pluralise(len(expected), 'tensor')}: {quote_few(missing)}"] if missing else []
        )
        faults += (
            [f"has {pluralise(len(extra), 'tensor')} that Gemma 2 does not have: {quote_few(extra)}"] if extra else []
        )
        raise CheckpointError(
            f"{source}: {'; '.join(faults)}. The checkpoint is incomplete, or does not belong to {CONFIG_JSON} "
            f"({pluralise(config.num_hidden_layers, 'layer')}): fetch both again"
        )
    for name, shape in expected.items():
        tensor = named[name]
        if tensor.shape != shape and not math.prod(tensor.shape):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is empty, {list(tensor.shape)}; DeepSpeed's ZeRO-3 stores the "
                "numbers in other files: collect them with the script zero_to_fp32.py in that folder"
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is {list(tensor.shape)}; according to {CONFIG_JSON} it must be "
                f"{list(shape)}: take weights and configuration from the same model"
            )


def has_other_numbers(head: Stored, table: Stored) -> bool:
    """Return True if the numbers of a stored head differ from the embedding, although the configuration ties the two.

    Raises
    ------
    CheckpointError
        If the shapes differ.

    Examples
    --------
    >>> import refgemma
    >>> table = refgemma.open_checkpoint(refgemma.find_model("tiny")).tensors["model.embed_tokens.weight"]
    >>> has_other_numbers(table, table)
    False
    """
    if head.shape != table.shape:
        raise CheckpointError(
            f"{head.file}: tensor {head.name!r} is {list(head.shape)}, but it is tied to {table.name!r}, which is "
            f"{list(table.shape)}; save the model without the head"
        )
    own, tied = head.map(), table.map()
    step = max(1, NUMBERS_AT_ONCE // head.shape[1])
    kind = np.dtype(np.uint8) if own.dtype == tied.dtype else None  # of one dtype, equal bytes are equal numbers
    for start in range(0, head.shape[0], step):
        x, y = (part[start : start + step] for part in (own, tied))
        x, y = (x.astype(np.float64), y.astype(np.float64)) if kind is None else (x.view(kind), y.view(kind))
        if (x != y).any():
            return True
    return False


def check_score(score: Mapping[str, Stored], hidden_size: int) -> None:
    """Check that a classifier's head is ``(num_labels, hidden)`` and its bias, if there is one, ``(num_labels,)``.

    Raises
    ------
    CheckpointError
        If a shape is wrong.

    Examples
    --------
    >>> check_score({}, 24)
    """
    num_labels = score[SCORE_WEIGHT].shape[0] if SCORE_WEIGHT in score and score[SCORE_WEIGHT].shape else 0
    expected = {SCORE_WEIGHT: (num_labels, hidden_size), SCORE_BIAS: (num_labels,)}
    for name, tensor in score.items():
        if tensor.shape != expected[name] or not num_labels:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is {list(tensor.shape)}; with hidden_size {hidden_size}, "
                f"{SCORE_WEIGHT} must be [num_labels, {hidden_size}] and {SCORE_BIAS}, if there is one, [num_labels]"
            )

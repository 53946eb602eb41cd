"""Compare with transformers: packed rows, caches filled in place, more rows of an embedding, and other methods."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import CLASSES, here, in_transformers, quiet, random_tensors

import refgemma
from refgemma.config import FULL, SLIDING
from refgemma.hub import find_model

LANGUAGE = "Gemma2ForCausalLM"
SHAPE: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 3, "num_labels": 3,
    "layer_types": [FULL, SLIDING, SLIDING],
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 31, (2, 9))
# Logits of at most 10, sums of 12 products in three layers: two evaluations are some hundred roundings apart.
SAME = 300 * 2.0**-24
PACKED = {
    "two texts": [0, 1, 2, 3, 0, 1, 2, 3, 4],
    "three texts, the first begins elsewhere": [5, 6, 0, 1, 2, 0, 1, 2, 3],
    "one text": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "positions twice as far": [0, 2, 4, 6, 8, 10, 12, 14, 16],
    "padding at the left that nobody masks": [0, 0, 0, 1, 2, 3, 4, 5, 6],
}


def both(name: str = LANGUAGE, **changes: Any) -> tuple[Any, Any]:
    shape = SHAPE | changes
    tensors = random_tensors(name, shape, seed=0)
    return in_transformers(name, shape, tensors, "float32"), here(name, shape, tensors, "float32")


THEIRS, OURS = both()


def numbers(answer: Any) -> Any:
    found = answer[0] if isinstance(answer, tuple) else answer.get("logits", answer.get("last_hidden_state"))
    return found.numpy() if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("positions", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_without_a_cache(name: str, positions: list[int], rows: int) -> None:
    theirs, ours = both(name, pad_token_id=0)
    given = np.array([positions, PACKED["two texts"]][:rows])
    with quiet():
        expected = theirs(torch.tensor(IDS), position_ids=torch.tensor(given), use_cache=False)
    found = ours(IDS, position_ids=given, use_cache=False)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=0, atol=SAME)


@pytest.mark.parametrize("how", ["configuration", "cache", "empty cache", "2-D mask", "embeddings", "use_cache=None"])
def test_when_packed_rows_are_kept_apart_is_as_in_transformers(how: str) -> None:
    """Only without mask and cache; in all other calls the second text sees the first."""
    theirs, ours = both()
    positions = np.array([PACKED["two texts"]])
    given: dict[str, Any] = {"position_ids": positions}
    if how != "use_cache=None":
        given["use_cache"] = how == "cache"
    if how == "configuration":
        theirs.config.use_cache = ours.config.use_cache = False
        del given["use_cache"]
    if how == "2-D mask":
        given["attention_mask"] = np.ones((2, 9), int)
    if how == "embeddings":
        given["inputs_embeds"] = np.random.default_rng(1).standard_normal((2, 9, 12)).astype(np.float32)
    else:
        given["input_ids"] = IDS
    tensors = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    if how == "empty cache":
        tensors["past_key_values"], given["past_key_values"] = transformers.DynamicCache(), refgemma.DynamicCache()
    with quiet():
        expected = theirs(**tensors).logits.numpy()
        alone = theirs(torch.tensor(IDS[:, 4:]), use_cache=False).logits.numpy()
    np.testing.assert_allclose(ours(**given).logits, expected, rtol=0, atol=SAME)
    kept_apart = how in ("configuration", "embeddings")
    if how != "embeddings":
        assert (np.abs(expected[:, 4:] - alone).max() < SAME) == kept_apart


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_prompts_of_generate(use_cache: bool) -> None:
    positions = np.array([PACKED["two texts"]] * 2)
    settings: dict[str, Any] = {
        "max_new_tokens": 5, "use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True,
        "eos_token_id": None, "pad_token_id": None, "do_sample": False,
    }  # fmt: skip
    with quiet():
        expected = THEIRS.generate(torch.tensor(IDS), position_ids=torch.tensor(positions), **settings)
        found = OURS.generate(IDS, position_ids=positions, **settings)
    np.testing.assert_array_equal(found.sequences, expected.sequences.numpy())
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=SAME)


CACHES = {
    "DynamicCache()": lambda library, config: library.DynamicCache(),
    "DynamicCache(config=...)": lambda library, config: library.DynamicCache(config=config),
    "StaticCache": lambda library, config: library.StaticCache(config=config, max_cache_len=12),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_loop_that_fills_a_cache_in_place(kind: str) -> None:
    """Only the object itself is passed on; ``use_cache=False`` does not prevent filling it."""
    theirs, ours = CACHES[kind](transformers, THEIRS.config), CACHES[kind](refgemma, OURS.config)
    for step, part in enumerate((IDS[:, :5], IDS[:, 5:6], IDS[:, 6:9])):
        with quiet():
            expected = THEIRS(torch.tensor(part), past_key_values=theirs, use_cache=step != 1)
        found = OURS(part, past_key_values=ours, use_cache=step != 1)
        np.testing.assert_allclose(found.logits, expected.logits.numpy(), rtol=0, atol=SAME)
        assert found.past_key_values is ours
        assert expected.past_key_values is theirs
        assert ours.get_seq_length() == int(theirs.get_seq_length())
    if kind != "StaticCache":  # whose tensors have all their length from the beginning
        for layer, wanted in zip(ours.layers, theirs.layers, strict=True):
            assert layer.keys.shape == tuple(wanted.keys.shape)
            np.testing.assert_allclose(layer.values, wanted.values.numpy(), rtol=0, atol=SAME)


@pytest.mark.parametrize("kind", CACHES)
def test_a_prefix_that_is_continued_in_two_ways(kind: str) -> None:
    theirs, ours = CACHES[kind](transformers, THEIRS.config), CACHES[kind](refgemma, OURS.config)
    with quiet():
        THEIRS(torch.tensor(IDS[:1, :4]), past_key_values=theirs)
    OURS(IDS[:1, :4], past_key_values=ours)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": None}
    for more in (IDS[:1, 4:7], IDS[1:, 4:8]):
        prompt = np.concatenate([IDS[:1, :4], more], axis=1)
        with quiet():
            wanted, found = copy.deepcopy(theirs), copy.deepcopy(ours)
            expected = THEIRS.generate(torch.tensor(prompt), past_key_values=wanted, **settings)
            np.testing.assert_array_equal(OURS.generate(prompt, past_key_values=found, **settings), expected.numpy())
        assert found.get_seq_length() == int(wanted.get_seq_length()) == prompt.shape[1] + 2
        assert ours.get_seq_length() == 4


def test_the_methods_of_a_cache() -> None:
    theirs, ours = transformers.DynamicCache(), refgemma.DynamicCache()
    with quiet():
        THEIRS(torch.tensor(IDS[:, :7]), past_key_values=theirs)
    OURS(IDS[:, :7], past_key_values=ours)
    for method, argument in (("crop", -3), ("crop", 0), ("batch_repeat_interleave", 2)):
        getattr(theirs, method)(argument)
        getattr(ours, method)(argument)
    theirs.reorder_cache(torch.tensor([3, 0, 0]))
    ours.reorder_cache([3, 0, 0])
    assert ours.get_seq_length() == theirs.get_seq_length() == 4
    assert len(ours) == len(theirs)
    for (keys, values), wanted in zip(ours, theirs.layers, strict=True):
        np.testing.assert_allclose(keys, wanted.keys.numpy(), rtol=0, atol=SAME)
        np.testing.assert_allclose(values, wanted.values.numpy(), rtol=0, atol=SAME)
    again = refgemma.DynamicCache([(layer.keys.numpy(), layer.values.numpy()) for layer in theirs.layers])
    with quiet():
        expected = THEIRS(torch.tensor(IDS[[0, 1, 1], :2]), past_key_values=theirs).logits.numpy()
    ids = IDS[[0, 1, 1], :2]
    np.testing.assert_allclose(OURS(ids, past_key_values=again).logits, expected, rtol=0, atol=SAME)


# --- more rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("count", "multiple"), [(40, None), (33, 8), (None, 16), (31, None), (20, None)])
def test_an_embedding_with_other_rows(tied: bool, count: int | None, multiple: int | None) -> None:
    theirs, ours = both(tie_word_embeddings=tied)
    with quiet():
        wanted = theirs.resize_token_embeddings(count, pad_to_multiple_of=multiple)
    found = ours.resize_token_embeddings(count, pad_to_multiple_of=multiple)
    assert found.weight.shape == tuple(wanted.weight.shape) == ours.lm_head.weight.shape
    assert ours.config.vocab_size == theirs.config.vocab_size == len(found.weight)
    # New rows are 3e-5 of the spread of the old ones (about 0.3) away from their mean, five times that at most.
    np.testing.assert_allclose(found.weight, wanted.weight.detach().numpy(), rtol=0, atol=2e-4)
    head = theirs.lm_head.weight.detach().numpy()
    np.testing.assert_allclose(ours.lm_head.weight, head, rtol=0, atol=2e-4)
    assert np.array_equal(head, wanted.weight.detach().numpy()) == tied
    ids = IDS % len(found.weight)
    with quiet():
        np.testing.assert_allclose(ours(ids).logits, theirs(torch.tensor(ids)).logits.numpy(), rtol=0, atol=5e-3)


def test_new_rows_have_the_mean_and_the_covariance_that_transformers_gives_them() -> None:
    """Compare mean and covariance of 60,000 new rows; the covariance is 1e-9 of the old rows' covariance."""
    theirs, ours = both(vocab_size=200, hidden_size=4)
    added = 60_000
    torch.manual_seed(0)
    with quiet():
        wanted = theirs.resize_token_embeddings(200 + added).weight.detach().numpy()[200:].astype(np.float64)
    found = ours.resize_token_embeddings(200 + added).weight[200:].astype(np.float64)
    spread = wanted.std(axis=0)
    # The means of two times 60,000 draws, within 6 standard errors, and 3e-8 for float32 numbers of about 0.3.
    error = 6 * spread.max() * (2 / added) ** 0.5 + 3e-8
    np.testing.assert_allclose(found.mean(axis=0), wanted.mean(axis=0), rtol=0, atol=error)
    scale = np.outer(spread, spread)
    # A variance estimated from 60,000 draws has the standard error sqrt(2 / 60000), the difference of two sqrt(2) times
    # that; 6 of them.
    error = 6 * (2 / added) ** 0.5 * 2**0.5
    np.testing.assert_allclose(np.cov(found.T) / scale, np.cov(wanted.T) / scale, rtol=0, atol=error)


def test_new_rows_around_zero() -> None:
    theirs, ours = both(initializer_range=0.5)
    with quiet():
        wanted = theirs.resize_token_embeddings(20_000, mean_resizing=False).weight.detach().numpy()[31:]
    found = ours.resize_token_embeddings(20_000, mean_resizing=False).weight[31:]
    assert abs(found.std() - wanted.std()) < 0.005  # 240,000 draws of a standard deviation of 0.5: 0.0007 each
    assert abs(found.mean() - wanted.mean()) < 0.006


# --- what is counted, printed and converted ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_counted_and_printed(name: str, tied: bool) -> None:
    theirs, ours = both(name, tie_word_embeddings=tied, attention_bias=not tied)
    assert str(ours) == str(theirs)
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert {n: x.shape for n, x in ours.named_parameters()} == {n: tuple(x.shape) for n, x in theirs.named_parameters()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_memory_footprint_in_another_precision(dtype: str) -> None:
    tensors = random_tensors(LANGUAGE, SHAPE, seed=0)
    theirs = in_transformers(LANGUAGE, SHAPE, tensors, dtype)
    assert here(LANGUAGE, SHAPE, tensors, dtype).get_memory_footprint() == theirs.get_memory_footprint()


def test_every_module_by_its_name_computes_what_torch_computes() -> None:
    theirs, ours = both()
    x = np.random.default_rng(2).standard_normal((1, 3, 12)).astype(np.float32)
    names = [
        name for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.Linear) or re.search("norm$", name)
    ]  # fmt: skip
    assert len(names) == 3 * 11 + 2
    for name in names:
        module, found = theirs.get_submodule(name), ours
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        given = np.resize(x, (1, 3, module.weight.shape[-1]))
        with quiet():
            wanted = module(torch.tensor(given)).numpy()
        np.testing.assert_allclose(found(given), wanted, rtol=0, atol=SAME, err_msg=name)
        np.testing.assert_array_equal(found.weight, module.weight.detach().numpy())
    with quiet():
        embedded = theirs.get_input_embeddings()(torch.tensor(IDS)).numpy()
    np.testing.assert_allclose(ours.get_input_embeddings()(IDS), embedded, rtol=0, atol=SAME)


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 2}, {"final_logit_softcapping": None}, {"use_cache": False}, {"output_hidden_states": True},
    {"output_attentions": True}, {"sliding_window": 2},
], ids=str)  # fmt: skip
def test_a_model_whose_configuration_is_set(change: dict[str, Any]) -> None:
    """Before it is made, as ``config.num_hidden_layers = 2`` and then ``from_config``."""
    tensors = random_tensors(LANGUAGE, SHAPE, seed=0)
    config = transformers.Gemma2Config(**SHAPE, attn_implementation="eager")
    ours = refgemma.Gemma2Config(**SHAPE)
    for name, value in change.items():
        setattr(config, name, value)
        setattr(ours, name, value)
    theirs = transformers.Gemma2ForCausalLM(config).eval()
    theirs.load_state_dict({n: torch.tensor(x) for n, x in tensors.items()}, strict=False)
    needed = refgemma.Gemma2ForCausalLM.tensor_shapes(ours)
    model = refgemma.Gemma2ForCausalLM.from_state_dict(ours, {name: tensors[name] for name in needed})
    with quiet():
        expected = theirs(torch.tensor(IDS))
    found = model(IDS)
    assert list(found) == list(expected)
    np.testing.assert_allclose(found.logits, expected.logits.numpy(), rtol=0, atol=SAME)


def test_what_is_printed_of_a_configuration_is_what_transformers_prints() -> None:
    theirs = str(transformers.Gemma2Config(**SHAPE)).splitlines()
    found = str(refgemma.Gemma2Config(**SHAPE)).splitlines()
    assert found[0] == theirs[0] == "Gemma2Config {"
    # Of the two, transformers alone writes its version; refgemma alone the older names of two fields.
    only_here = {re.split('"', line)[1] for line in set(found) - set(theirs) if '"' in line}
    only_there = {re.split('"', line)[1] for line in set(theirs) - set(found) if '"' in line}
    assert only_here == {"hidden_act", "rope_theta"}
    assert only_there <= {"transformers_version", "use_bidirectional_attention"}


def test_a_text_generation_pipeline() -> None:
    """Greedy, over the same model: a text, and several; with the prompt and without."""
    tiny = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
    pipe = refgemma.pipeline("text-generation", model="tiny")
    config = transformers.AutoConfig.from_pretrained(find_model("tiny"))
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.load_state_dict({name: torch.tensor(x) for name, x in tiny.state_dict().items()})
    model.generation_config.eos_token_id = list(tiny.generation_config.eos_token_id)
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model("tiny"))
    theirs = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    for prompt in ("Once upon a time", ["The king", "Alice was"]):
        for full in (True, False):
            settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_full_text": full}
            with quiet():
                expected = theirs(prompt, **settings)
            assert pipe(prompt, **settings) == expected


# --- names, losses, other weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}], ids=str)
def test_names_come_in_the_order_of_torch(name: str, changes: dict[str, Any]) -> None:
    theirs, ours = both(name, **changes)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    without_weights = re.compile(r".*(act_fn|rotary_emb|dropout)")
    modules = [n for n, _ in theirs.named_modules() if not without_weights.fullmatch(n)]
    assert [n for n, _ in ours.named_modules()] == modules


LABELS = np.where(IDS > 20, -100, IDS)


@pytest.mark.parametrize(
    "given",
    [{"num_items_in_batch": 5}, {"ignore_index": int(IDS[0, 3])}, {"shift_labels": LABELS},
     {"shift_labels": LABELS, "num_items_in_batch": 2}],
    ids=lambda given: "-".join(given),
)  # fmt: skip
def test_losses_as_trainers_ask_for_them(given: dict[str, Any]) -> None:
    labels = IDS if "ignore_index" in given else LABELS
    as_tensors = {k: torch.tensor(x) if isinstance(x, np.ndarray) else x for k, x in given.items()}
    with quiet():
        expected = THEIRS(torch.tensor(IDS), labels=torch.tensor(labels), **as_tensors).loss.item()
        plain = THEIRS(torch.tensor(IDS), labels=torch.tensor(labels)).loss.item()
    assert OURS(IDS, labels=labels, **given).loss == pytest.approx(expected, rel=1e-5)  # sums of some losses near 4
    assert abs(expected - plain) > 0.01


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_of_two_names_of_a_tied_table_is_loaded(name: str) -> None:
    theirs, ours = both()
    with torch.no_grad(), quiet():
        keys = theirs.load_state_dict({name: theirs.state_dict()[name] * 2}, strict=False)
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    found = ours.load_state_dict({name: ours.state_dict()[name] * 2}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (keys.missing_keys, keys.unexpected_keys)
    np.testing.assert_allclose(ours(IDS).logits, expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("change", ["without the head", "another name"])
def test_what_load_state_dict_refuses(change: str) -> None:
    for model in both():
        state = dict(model.state_dict())
        head = state.pop("lm_head.weight")
        if change == "another name":
            state |= {"lm_head.weight": head, "other": head}
        with pytest.raises(Exception, match=r"'other'|\"other\"" if change == "another name" else r"lm_head\.weight"):
            model.load_state_dict(state)


@pytest.mark.parametrize("labels", [[1, 2], [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]], ids=["whole", "fractions"])
def test_the_kind_of_problem_stays(labels: Any) -> None:
    theirs, ours = both("Gemma2ForSequenceClassification", pad_token_id=0)
    with quiet():
        theirs(torch.tensor(IDS), labels=torch.tensor(labels))
    ours(IDS, labels=labels)
    assert ours.config.problem_type == theirs.config.problem_type is not None

"""Compare folders of trained models, read by transformers, PEFT and refgemma: names, heads, configurations,
adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import quiet
from transformers import Gemma2ForCausalLM as Theirs

from refgemma.config import Gemma2Config
from refgemma.convert.convert import convert
from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.weights.checkpoint import open_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 5,
    "initializer_range": 0.2,
}  # fmt: skip
IDS = [[2, 5, 9, 11, 60, 3, 17]]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def random_state(seed: int = 0, **changes: Any) -> Tensors:
    torch.manual_seed(seed)
    model = Theirs(transformers.Gemma2Config(**SIZES | changes))
    return {name: x.detach().clone() for name, x in model.state_dict().items() if name != HEAD}


STATE = random_state()
OTHER = STATE[EMBED] * 2 + 0.1  # a head of its own


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    values = transformers.Gemma2Config(**SIZES).to_dict() | config
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def theirs(folder: Path, dtype: Any = torch.float32) -> Any:
    with quiet():
        return Theirs.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def logits(model: Any) -> Any:
    with quiet():
        return np.asarray(model(torch.tensor(IDS)).logits.detach())


def near(ours: Any, others: Any) -> bool:
    """Return True if all differences are within 5e-6 of the largest number, as in the other parity tests."""
    return bool(np.abs(ours - others).max() <= 5e-6 * np.abs(others).max())


# --- names and heads --------------------------------------------------------------------------------------------------

LOADED: dict[str, tuple[Tensors, str]] = {
    "plain": (STATE, ""),
    "model twice": ({f"model.{name}": x for name, x in STATE.items()}, ""),
    "bare": ({name.removeprefix("model."): x for name, x in STATE.items()}, ""),
    "rotary tables": (STATE | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}, "inv_freq' is not read"),
    "value head": (STATE | {"v_head.summary.weight": torch.ones(1, 24)}, "'v_head.summary.weight' is not read"),
    "value head of another": (STATE | {"value_head.weight": torch.ones(1, 24)}, "'value_head.weight' is not read"),
    "score of another shape": (STATE | {"score.0.weight": torch.ones(7)}, "'score.0.weight' is not read"),
    "head again": (STATE | {HEAD: STATE[EMBED].clone()}, ""),
    "head apart": (STATE | {HEAD: OTHER}, "'lm_head.weight' differs from"),
    "head alone": ({HEAD: STATE[EMBED]} | {name: x for name, x in STATE.items() if name != EMBED}, ""),
}


@pytest.mark.parametrize("case", LOADED)
def test_names_that_transformers_loads(tmp_path: Path, case: str, recwarn: pytest.WarningsRecorder) -> None:
    tensors, words = LOADED[case]
    folder = write(tmp_path, tensors)
    expected = logits(theirs(folder))
    recwarn.clear()
    with_warning(lambda: Gemma2ForCausalLM.from_pretrained(folder)(IDS).logits, words, expected)


def with_warning(compute: Callable[[], Any], words: str, expected: Any) -> None:
    if words:
        with pytest.warns(UserWarning, match=words):
            found = compute()
    else:
        found = compute()
    assert near(found, expected)


def test_a_head_apart_is_another_model(tmp_path: Path) -> None:
    # Were the head ignored on both sides, the case above would pass.
    tied = logits(theirs(write(tmp_path / "tied", STATE)))
    assert not near(logits(theirs(write(tmp_path / "apart", STATE | {HEAD: OTHER}))), tied)


@pytest.mark.parametrize("config", [{"hidden_act": "silu", "hidden_activation": "absent"}, {"hidden_act": "gelu"}])
def test_hidden_act_is_left_unread(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write(tmp_path, STATE, **config)
    words = "hidden_act = 'silu' is ignored" if "hidden_activation" in config else ""
    with_warning(lambda: Gemma2ForCausalLM.from_pretrained(folder)(IDS).logits, words, logits(theirs(folder)))


@pytest.mark.filterwarnings("ignore:label2id without id2label")
@pytest.mark.parametrize(
    "labels",
    [
        {"label2id": {"a": 0, "b": 1, "c": 2}},
        {"label2id": {"a": 0, "b": 1, "c": 2}, "num_labels": 4},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    ],
)
def test_labels(labels: dict[str, Any]) -> None:
    found, expected = Gemma2Config.from_dict(SIZES | labels), transformers.Gemma2Config.from_dict(SIZES | labels)
    for name in ("num_labels", "id2label", "label2id"):
        assert dict(found=getattr(found, name)) == dict(found=getattr(expected, name)), name


@pytest.mark.parametrize("value", ["false", None, 0])
def test_a_tied_head_that_is_no_bool(value: object) -> None:
    with pytest.raises(Exception, match="tie_word_embeddings"):
        transformers.Gemma2Config.from_dict(SIZES | {"tie_word_embeddings": value})
    with pytest.raises(Exception, match="tie_word_embeddings"):
        Gemma2Config.from_dict(SIZES | {"tie_word_embeddings": value})


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "down_proj"]},
    "all layers": {"target_modules": "all-linear", "lora_alpha": 5},
    "rank-stabilised": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "k_proj", "o_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2,
                 "^model.layers.0.*k_proj": 3}, "alpha_pattern": {"k_proj": 7}},
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "DoRA of an embedding": {"target_modules": ["embed_tokens", "up_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole head, embedding": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 60]},
    "tokens by module": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 3]}},
    "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "lora_bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
}  # fmt: skip
WITH_BIAS = ("biases", "lora_bias")


def train_adapter(base: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """Make an adapter in which every number has changed."""
    peft = pytest.importorskip("peft")
    with quiet():
        model = peft.get_peft_model(theirs(base), peft.LoraConfig(r=4, **settings))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with quiet():
        model.save_pretrained(folder)
    return folder


def merge_with_peft(base: Path, adapter: Path, dtype: Any) -> Any:
    peft = pytest.importorskip("peft")
    with quiet():
        return peft.PeftModel.from_pretrained(theirs(base, dtype), adapter).merge_and_unload().eval()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return base models in one precision, without and with biases in attention."""
    folder = tmp_path_factory.mktemp("bases")
    plain = {name: x.to(request.param) for name, x in STATE.items()}
    biased = {name: x.to(request.param) for name, x in random_state(attention_bias=True).items()}
    write(folder / "plain", plain)
    write(folder / "biased", biased, attention_bias=True)
    return request.param, folder


@pytest.mark.filterwarnings("ignore:.*is merged into the table")
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_what_peft_merges(stored: Any, tmp_path: Path, case: str) -> None:
    dtype, folder = stored
    base = folder / ("biased" if case in WITH_BIAS else "plain")
    adapter = train_adapter(base, tmp_path / "adapter", ADAPTERS[case])
    merged = merge_with_peft(base, adapter, dtype)
    name = str(dtype).removeprefix("torch.")
    found = open_checkpoint(adapter)
    assert found.config.tie_word_embeddings == (merged.lm_head.weight is merged.model.embed_tokens.weight)
    different = total = 0
    for key, expected in merged.state_dict().items():
        if key == HEAD and found.config.tie_word_embeddings:
            continue
        theirs_, ours = expected.float().numpy(), np.asarray(found.tensors[key].read(name))
        # PEFT multiplies in float32 and here it is float64, rounded once: a few ulps of the sum's largest number, or
        # the next number of bfloat16 where the two sums are on either side of a tie.
        epsilon = 2.0**-22 if dtype == torch.float32 else 2.0**-7
        assert np.abs(ours - theirs_).max() <= epsilon * np.abs(theirs_).max(), key
        different, total = different + int((ours != theirs_).sum()), total + ours.size
    if dtype == torch.bfloat16:
        assert different <= 0.002 * total
    if dtype == torch.float32:
        assert near(Gemma2ForCausalLM.from_pretrained(adapter)(IDS).logits, logits(merged))
        assert not near(logits(theirs(base)), logits(merged))  # the adapter does something
    table = merged.model.embed_tokens.weight.detach().float().numpy()
    rows = np.array([[5, 60], [3, 5]])
    assert (
        np.abs(np.asarray(found.tensors[EMBED].read(name, rows)) - table[rows]).max() <= 2.0**-7 * np.abs(table).max()
    )


@pytest.mark.filterwarnings("ignore:.*is merged into the table")
def test_streamed_numbers_are_resident_numbers(stored: Any, tmp_path: Path) -> None:
    _, folder = stored
    found = open_checkpoint(train_adapter(folder / "plain", tmp_path, ADAPTERS["both"] | {"use_dora": False}))
    tensor = found.tensors[EMBED]
    assert (tensor.map()[:].astype(np.float32) == tensor.read("float32")).all()
    assert (tensor.read("float32")[5:9] == tensor.read("float32", slice(5, 9))).all()


OTHER_TUNERS: dict[str, Callable[[Any], Any]] = {
    "IA3": lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "PROMPT_TUNING": lambda peft: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "LOHA": lambda peft: peft.LoHaConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", OTHER_TUNERS)
def test_other_tuners_are_refused_by_name(stored: Any, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    with quiet():
        peft.get_peft_model(theirs(stored[1] / "plain"), OTHER_TUNERS[kind](peft)).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=f"peft_type is '{kind}'"):
        open_checkpoint(tmp_path)


def test_files_of_the_tests_are_in_their_precision(stored: Any) -> None:
    dtype, folder = stored
    assert load_file(folder / "plain" / "model.safetensors")[EMBED].dtype == dtype
    kinds = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16}
    assert open_checkpoint(folder / "plain").tensors[EMBED].dtype == kinds[dtype]


# --- PyTorch's own tensors and files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_of_torch(tmp_path: Path, dtype: Any) -> None:
    model = theirs(write(tmp_path, STATE), dtype)
    state = dict(model.named_parameters())  # with gradients
    assert all(x.requires_grad and x.dtype == dtype for x in state.values())
    ours = Gemma2ForCausalLM.from_state_dict(Gemma2Config(**SIZES), state)
    assert all((ours.state_dict()[name] == x.detach().float().numpy()).all() for name, x in state.items())


def test_what_torch_saves_is_converted(tmp_path: Path) -> None:
    source = write(tmp_path / "source", STATE)
    expected = logits(theirs(source))
    (source / "model.safetensors").unlink()
    torch.save(STATE | {HEAD: STATE[EMBED]}, source / "pytorch_model.bin")  # the tied head is the same storage
    convert(source, tmp_path / "target")
    assert near(Gemma2ForCausalLM.from_pretrained(tmp_path / "target")(IDS).logits, expected)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_use_of_a_shared_table_is_warned_of(tmp_path: Path, module: str) -> None:
    peft = pytest.importorskip("peft")
    base = write(tmp_path / "base", STATE)
    adapter = train_adapter(base, tmp_path / "adapter", {"target_modules": [module]})
    with quiet():
        running = peft.PeftModel.from_pretrained(theirs(base), adapter).eval()
    with pytest.warns(UserWarning, match=f"LoRA of '.*{module}' is merged into the table"):
        found = Gemma2ForCausalLM.from_pretrained(adapter)(IDS).logits
    assert not near(found, logits(running))
    # What the warning says to do gives the running adapter's numbers.
    write(base, STATE | {HEAD: STATE[EMBED].clone()}, tie_word_embeddings=False)
    assert near(Gemma2ForCausalLM.from_pretrained(adapter)(IDS).logits, logits(running))


def test_an_adapter_with_the_rows_of_a_resized_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = write(tmp_path / "base", STATE)

    def resized() -> Any:
        model = theirs(base)
        with quiet():
            model.resize_token_embeddings(67)
        return model

    with quiet():
        model = peft.get_peft_model(resized(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
        merged = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter").merge_and_unload().eval()
    found = Gemma2ForCausalLM.from_pretrained(tmp_path / "adapter")
    assert found.config.vocab_size == 67
    assert found.config.tie_word_embeddings
    expected = merged.model.embed_tokens.weight.detach().numpy()
    assert (found.get_input_embeddings().weight == expected).all()


# --- float8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_a_float8_folder_is_what_transformers_dequantises(tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    tensors = dict(STATE)
    for name in [name for name in STATE if "_proj" in name]:
        largest = STATE[name].abs().amax(1, keepdim=True) if strategy == "channel" else STATE[name].abs().amax()[None]
        tensors[name + "_scale"] = largest / 448
        tensors[name] = (STATE[name] / tensors[name + "_scale"]).to(torch.float8_e4m3fn)
    how = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": how, "input_activations": None, "output_activations": None}
    settings = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    folder = write(tmp_path, tensors, quantization_config=settings)
    with quiet():
        model = Theirs.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager",
            quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        ).eval()  # fmt: skip
    with pytest.warns(UserWarning, match="the float8 matrices"):
        found = Gemma2ForCausalLM.from_pretrained(folder)
    assert near(found(IDS).logits, logits(model))
    assert not near(logits(theirs(write(tmp_path / "plain", STATE))), logits(model))

"""Run code for models, caches and configurations as people write it for transformers, with `refgemma` instead of
`transformers` and NumPy instead of torch. Each snippet runs, and its last lines check the result. If it cannot run, a
one-line error says what to write instead. `test_generation.py` has the snippets for generation."""

import textwrap
from pathlib import Path

import pytest

from refgemma.errors import RefgemmaError

RUNS = {
    "a model card's first lines": """
        from refgemma import AutoModelForCausalLM, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained("tiny")
        model = AutoModelForCausalLM.from_pretrained("tiny", device_map="auto", torch_dtype="auto")
        inputs = tokenizer("Once upon a time", return_tensors="np")
        text = tokenizer.decode(model.generate(**inputs, max_new_tokens=4)[0], skip_special_tokens=True)
        assert text.startswith("Once upon a time") and model.dtype == "bfloat16"
    """,
    "every argument at once": """
        import warnings
        from refgemma import AutoModelForCausalLM
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = AutoModelForCausalLM.from_pretrained(
                "tiny", dtype=None, device_map={"": 0}, attn_implementation="eager", low_cpu_mem_usage=True,
                trust_remote_code=False, token=None, cache_dir=None, revision="main", use_safetensors=True,
            ).to("cuda").eval()
        assert str(model.device) == "cpu" and not model.training
    """,
    "a pipeline with a conversation": """
        from refgemma import pipeline
        chat = pipeline("text-generation", model="tiny", model_kwargs={"dtype": "float32"}, device=0)
        answer = chat([{"role": "user", "content": "Who is the king?"}], max_new_tokens=4, do_sample=False)
        assert answer[0]["generated_text"][-1]["role"] == "assistant"
    """,
    "probabilities of the next token": """
        import numpy as np
        from refgemma import AutoModelForCausalLM, AutoTokenizer
        tokenizer, model = AutoTokenizer.from_pretrained("tiny"), AutoModelForCausalLM.from_pretrained("tiny").eval()
        logits = model(**tokenizer("The king", return_tensors="np")).logits[0, -1]
        best = np.argsort(-logits)[:3]
        assert tokenizer.decode(best[:1]) == "'"
    """,
    "loss of a text, window by window": """
        import numpy as np
        from refgemma import AutoModelForCausalLM, AutoTokenizer
        tokenizer, model = AutoTokenizer.from_pretrained("tiny"), AutoModelForCausalLM.from_pretrained("tiny")
        ids = tokenizer("The king went to the wood. " * 8, return_tensors="np").input_ids
        losses, done = [], 0
        for start in range(0, ids.shape[1], 16):
            stop = min(start + 32, ids.shape[1])
            part = ids[:, start:stop]
            labels = part.copy()
            labels[:, : -(stop - done)] = -100
            losses.append(model(part, labels=labels).loss.item())
            done = stop
            if stop == ids.shape[1]:
                break
        assert 0 < np.mean(losses) < 6
    """,
    "a loop over an empty cache": """
        import numpy as np
        from refgemma import AutoModelForCausalLM, DynamicCache
        model, cache = AutoModelForCausalLM.from_pretrained("tiny"), DynamicCache()
        ids, mask = np.array([[2, 300, 400]]), np.ones((1, 3), int)
        made = []
        for _ in range(4):
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            made.append(ids.item())
        wanted = model.generate([[2, 300, 400]], max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert made == wanted[0, 3:].tolist() and cache.get_seq_length() == 6
    """,
    "one prefix, several ends": """
        import copy
        from refgemma import AutoModelForCausalLM, AutoTokenizer, StaticCache
        tokenizer, model = AutoTokenizer.from_pretrained("tiny"), AutoModelForCausalLM.from_pretrained("tiny")
        cache = StaticCache(config=model.config, max_batch_size=1, max_cache_len=64)
        prefix = tokenizer("Once upon a time", return_tensors="np")
        cache = model(**prefix, past_key_values=cache).past_key_values
        for end in (" there was", " the king"):
            inputs = tokenizer("Once upon a time" + end, return_tensors="np")
            found = model.generate(**inputs, past_key_values=copy.deepcopy(cache), max_new_tokens=3, do_sample=False)
            assert (found == model.generate(**inputs, max_new_tokens=3, do_sample=False)).all()
    """,
    "texts in one row, each by itself": """
        import numpy as np
        from refgemma import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("tiny")
        row, positions = [[2, 300, 400, 2, 500, 600]], [[0, 1, 2, 0, 1, 2]]
        packed = model(row, position_ids=positions, use_cache=False).logits
        alone = model([[2, 500, 600]]).logits
        assert np.abs(packed[:, 3:] - alone).max() < 1e-4
    """,
    "mean of the last hidden states": """
        import numpy as np
        from refgemma import AutoModel, AutoTokenizer
        tokenizer, model = AutoTokenizer.from_pretrained("tiny"), AutoModel.from_pretrained("tiny")
        batch = tokenizer(["The king", "Alice said"], padding=True, return_tensors="np")
        mask = batch["attention_mask"][..., None]
        means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        alone = model(**tokenizer("The king", return_tensors="np"), use_cache=False).last_hidden_state.mean(1)
        assert means.shape == (2, 234) and np.isfinite(means).all() and alone.shape == (1, 234)
    """,
    "what each layer would say": """
        from refgemma import AutoModelForCausalLM, AutoTokenizer
        tokenizer, model = AutoTokenizer.from_pretrained("tiny"), AutoModelForCausalLM.from_pretrained("tiny")
        output = model(**tokenizer("The king", return_tensors="np"), output_hidden_states=True)
        said = [model.lm_head(model.model.norm(h))[0, -1].argmax() for h in output.hidden_states[:-1]]
        assert model.lm_head(output.hidden_states[-1])[0, -1].argmax() == output.logits[0, -1].argmax()
    """,
    "weights by attribute, by name and counted": """
        from refgemma import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("tiny")
        first = model.model.layers[0].self_attn.q_proj.weight
        assert (dict(model.named_parameters())["model.layers.0.self_attn.q_proj.weight"] == first).all()
        assert sum(p.size for p in model.parameters()) == model.num_parameters() == 2_922_426
        assert [layer.mlp.gate_proj.weight.shape[0] for layer in model.model.layers] == [408] * 6
        assert model.get_memory_footprint() // 4 >= model.num_parameters() and "(lm_head)" in str(model)
    """,
    "soft prompts": """
        import numpy as np
        from refgemma import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("tiny")
        embeds = model.get_input_embeddings()(np.array([[2, 300]]))
        assert np.abs(model(inputs_embeds=embeds).logits - model([[2, 300]]).logits).max() < 1e-4
        assert model.generate(inputs_embeds=embeds, max_new_tokens=2).shape[1] <= 2
    """,
    "tokens added to a vocabulary": """
        from refgemma import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("tiny")
        model.resize_token_embeddings(2048 + 2, pad_to_multiple_of=64)
        assert model.config.vocab_size == 2112 == model([[2, 2049]]).logits.shape[-1]
        assert model.get_output_embeddings().weight is not None
    """,
    "saved, read and compared": """
        import tempfile
        from refgemma import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("tiny")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_size="2MB", safe_serialization=True, push_to_hub=False)
            again = AutoModelForCausalLM.from_pretrained(folder)
        assert (again([[2, 3]]).logits == model([[2, 3]]).logits).all()
        other = AutoModelForCausalLM.from_config(model.config)
        assert str(other.load_state_dict(model.state_dict())) == "LoadedKeys(missing_keys=[], unexpected_keys=[])"
    """,
    "a smaller model of the same kind": """
        from refgemma import AutoConfig, AutoModelForCausalLM, Gemma2ForCausalLM
        config = AutoConfig.from_pretrained("tiny", trust_remote_code=True)
        config.num_hidden_layers = 2
        config.use_cache = False
        model = AutoModelForCausalLM.from_config(config, torch_dtype="bfloat16", attn_implementation="eager")
        assert isinstance(model, Gemma2ForCausalLM) and len(model.model.layers) == 2 and model.dtype == "bfloat16"
        assert model([[2, 3]]).past_key_values is None
    """,
    "a configuration read, printed and kept": """
        import json
        from refgemma import AutoConfig
        config = AutoConfig.from_pretrained("tiny")
        config.comment = "mine"
        shown = json.loads(str(config).removeprefix("Gemma2Config "))
        assert shown["comment"] == config.to_dict()["comment"] == "mine" and shown["model_type"] == config.model_type
    """,
    "generation settings of a model": """
        from refgemma import AutoModelForCausalLM, GenerationConfig
        model = AutoModelForCausalLM.from_pretrained("tiny")
        model.generation_config.max_new_tokens = 3
        model.generation_config.pad_token_id = model.config.pad_token_id
        assert model.generate([[2, 300]]).shape == (1, 5)
        model.generation_config = GenerationConfig(max_new_tokens=1)
        assert model.generate([[2, 300]]).shape == (1, 3)
    """,
    "classes of a text": """
        import warnings
        from refgemma import AutoModelForSequenceClassification, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained("tiny")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForSequenceClassification.from_pretrained(
                "tiny", num_labels=2, id2label={0: "BAD", 1: "GOOD"}, label2id={"BAD": 0, "GOOD": 1}
            )
        logits = model(**tokenizer(["a good king", "a wicked one"], padding=True, return_tensors="np")).logits
        assert {model.config.id2label[i.item()] for i in logits.argmax(-1)} <= {"BAD", "GOOD"}
    """,
    "classes of tokens": """
        import warnings
        from refgemma import AutoModelForTokenClassification
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForTokenClassification.from_pretrained("tiny", num_labels=5)
        assert model([[2, 300, 400]], labels=[[0, 4, -100]]).logits.argmax(-1).shape == (1, 3)
    """,
    "outputs as tuples and by name": """
        from refgemma import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("tiny")
        loss, logits = model([[2, 300]], labels=[[2, 300]], return_dict=False)[:2]
        output = model([[2, 300]], logits_to_keep=1)
        assert output[0].shape == output["logits"].shape == (1, 1, 2048) and loss.shape == ()
    """,
}

# Code -> what it says.
SAYS = {
    'AutoModelForCausalLM.from_pretrained("tiny").push_to_hub("me/mine")': "is not supported; use save_pretrained",
    'AutoModelForCausalLM.from_pretrained("tiny", load_in_8bit=True)': "refgemma does not quantise weights",
    'AutoModelForCausalLM.from_pretrained("tiny", attn_implementation="sdpa")': "refgemma computes as transformers'",
    'AutoModel.from_pretrained("tiny").save_pretrained("x", safe_serialization=False)': "as safetensors only",
    'AutoModel.from_pretrained("tiny").layers[0].register_forward_hook(print)': "use refgemma.forward, which returns",
    'AutoModel.from_pretrained("tiny").gradient_checkpointing_enable()': "train with refgemma.training or",
    'AutoModel.from_pretrained("tiny").merge_and_unload()': "which merges the adapter",
    'AutoModel.from_pretrained("tiny").generate([[2]])': "only Gemma2ForCausalLM generates",
    'AutoModel.from_pretrained("tiny").lm_head': "only Gemma2ForCausalLM has a head",
    'AutoModelForCausalLM.from_pretrained("tiny").named_buffers()': "refgemma.ops.rotary_tables",
    'm = AutoModelForCausalLM.from_pretrained("tiny"); m.model.layers = m.model.layers[:3]': "num_hidden_layers=3",
    'm = AutoModelForCausalLM.from_pretrained("tiny"); m.lm_head = None': "cannot be set: write into the weights",
    'm = AutoModelForCausalLM.from_pretrained("tiny"); m.lm_head.weight = m.lm_head.weight * 2': "weight[:] = ...",
    'm = AutoModelForCausalLM.from_pretrained("tiny"); m.model.layers[0].mlp = None': "cannot be set: write into the",
    'AutoModelForCausalLM.from_pretrained("tiny")([[2]], cu_seq_lens_q=[0, 1])': "where position_ids restart",
    'AutoModelForCausalLM.from_pretrained("tiny")([[2]], position_id=[[0]])': "keyword argument 'position_id'",
    "from refgemma import Trainer": "train with refgemma.training or refgemma train",
    "from refgemma import HybridCache": "use StaticCache",
    "from refgemma import BitsAndBytesConfig": "leave out quantization_config",
    'pipeline("summarization", model="tiny")': "it must be 'text-generation'",
}  # fmt: skip


@pytest.mark.parametrize("code", RUNS.values(), ids=RUNS)
def test_code_that_runs(code: str) -> None:
    exec(textwrap.dedent(code), {})


@pytest.mark.parametrize(("code", "text"), SAYS.items(), ids=SAYS)
def test_code_that_says_what_to_write_instead(
    code: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RefgemmaError, AttributeError, ImportError)) as caught:
        exec("from refgemma import *\n" + code, {})
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())

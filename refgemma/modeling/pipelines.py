"""Provide ``pipeline("text-generation")``, which continues texts or conversations.

Checked against transformers 5.23 `TextGenerationPipeline` with greedy decoding, in the parity tests.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refgemma.errors import UsageError
from refgemma.generation.generation_config import GenerationConfig
from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.tokenizer.tokenizer import AutoTokenizer, Tokenizer

# transformers' defaults for settings that neither the call nor the model's generation configuration sets.
DEFAULTS = GenerationConfig(max_new_tokens=256, do_sample=True, temperature=0.7)


class TextGenerationPipeline:
    """A model with its tokenizer; calling the pipeline with a prompt returns the continuation. `pipeline` makes it.

    Parameters
    ----------
    model : Gemma2ForCausalLM
        The model that generates text.
    tokenizer : Tokenizer
        The model's tokenizer.
    settings : mapping
        Default arguments of every call.
    """

    task = "text-generation"

    def __init__(self, model: Gemma2ForCausalLM, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = dict(settings)
        self.generation_config = model.generation_config.over(DEFAULTS)

    def __call__(self, text_inputs: Any, return_full_text: bool = True, **settings: Any) -> list[Any]:
        """Continue one or several prompts.

        Parameters
        ----------
        text_inputs : str, sequence of messages, or sequence of prompts
            A text, a conversation (mappings with ``"role"`` and ``"content"``), or several of either.
        return_full_text : bool
            If true, the result includes the prompt.
        **settings
            Settings as in `Gemma2ForCausalLM.generate`. By default, sample with temperature 0.7, at most 256 new
            tokens.

        Returns
        -------
        list of dict
            One dict for each generated text; ``"generated_text"`` is the text, or the conversation with one more
            message. For several prompts, a list of such lists.
        """
        if not isinstance(text_inputs, str) and not (text_inputs and isinstance(text_inputs[0], Mapping)):
            return [self(prompt, return_full_text, **settings) for prompt in text_inputs]
        asked = {"generation_config": self.generation_config} | self.settings | settings
        asked.pop("batch_size", None)
        if isinstance(text_inputs, str):
            inputs = self.tokenizer(text_inputs, return_tensors="np")
        else:
            inputs = self.tokenizer.apply_chat_template(text_inputs, add_generation_prompt=True, return_tensors="np")
        length = inputs["input_ids"].shape[1]
        rows = self.model.generate(**inputs, **asked)
        assert not isinstance(rows, Mapping)  # a pipeline has no return_dict_in_generate
        texts = [self.tokenizer.decode(row[length:], skip_special_tokens=True) for row in rows]
        return [{"generated_text": self._join(text_inputs, text, return_full_text)} for text in texts]

    @staticmethod
    def _join(prompt: Any, text: str, return_full_text: bool) -> Any:
        if not return_full_text:
            return text
        return prompt + text if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": text}]


def pipeline(
    task: str | None = None, model: Gemma2ForCausalLM | str | Path | None = None, tokenizer: Any = None, *,
    dtype: Any = None, torch_dtype: Any = None, model_kwargs: Mapping[str, Any] | None = None, device: Any = None,
    device_map: Any = None, trust_remote_code: Any = None, token: Any = None, revision: str | None = None,
    use_fast: Any = None, batch_size: int | None = None, framework: str | None = None, **settings: Any,
) -> TextGenerationPipeline:  # fmt: skip
    """Make a text-generation pipeline, as transformers' ``pipeline("text-generation", model=...)`` does.

    Parameters
    ----------
    task : str, optional
        ``"text-generation"``, the only supported task.
    model : Gemma2ForCausalLM, str or path
        A model, or a name for ``Gemma2ForCausalLM.from_pretrained``.
    tokenizer : Tokenizer, str or path, optional
        The tokenizer; by default the one in the model's folder.
    dtype, torch_dtype, revision, model_kwargs
        Arguments of ``Gemma2ForCausalLM.from_pretrained``.
    device, device_map, trust_remote_code, token, use_fast, batch_size, framework
        Ignored.
    **settings
        Default arguments of every call.

    Returns
    -------
    TextGenerationPipeline
        The pipeline.

    Raises
    ------
    UsageError
        If the task is another one, or the model or its tokenizer is missing.

    Examples
    --------
    >>> pipe = pipeline("text-generation", model="tiny")
    >>> pipe("Once upon a time", max_new_tokens=4, do_sample=False)
    [{'generated_text': 'Once upon a time the Rat, who'}]
    """
    if task not in (None, "text-generation"):
        raise UsageError(
            f"pipeline: task is {task!r}; it must be 'text-generation'; for other tasks use the AutoModelFor... classes"
        )
    if model is None:
        raise UsageError("pipeline: the model is missing; give one, for example model='tiny'")
    name = tokenizer if tokenizer is not None else model
    if isinstance(name, Gemma2ForCausalLM):
        raise UsageError("pipeline: the tokenizer is missing; pass tokenizer=... together with a loaded model")
    revision = revision or "main"
    reader = name if isinstance(name, Tokenizer) else AutoTokenizer.from_pretrained(name, revision=revision)
    if not isinstance(model, Gemma2ForCausalLM):
        given = {"dtype": dtype, "torch_dtype": torch_dtype} | dict(model_kwargs or {})
        model = Gemma2ForCausalLM.from_pretrained(model, revision=revision, **given)
    return TextGenerationPipeline(model, reader, settings)

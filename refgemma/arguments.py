"""Handle arguments of transformers' ``from_pretrained`` and ``save_pretrained`` that refgemma ignores or refuses.

Checked against the signatures and the documentation of transformers 5.23 `PreTrainedModel`.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from refgemma.errors import RefgemmaError, UsageError

# These choose where and how transformers computes and downloads; they change no number.
WITHOUT_EFFECT = frozenset({
    "_fast_init", "_from_auto", "adapter_kwargs", "attn_kwargs", "code_revision", "device", "device_map", "device_mesh",
    "force_download", "local_files_only", "low_cpu_mem_usage", "max_memory", "mirror", "offload_buffers",
    "offload_folder", "offload_state_dict", "proxies", "resume_download", "token", "torch_compile", "tp_plan",
    "token_type_ids", "tp_size", "trust_remote_code", "use_auth_token", "use_fast", "use_flash_attention_2",
    "use_kernels", "weights_only",
})  # fmt: skip

PACKED = "refgemma separates packed texts where position_ids restart, with use_cache=False; leave it out"

# Argument -> the values without effect here (None is another), and the advice for any other value.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "attn_implementation": (("eager",), "refgemma computes as transformers' 'eager' does; leave it out"),
    "cu_seq_lens_k": ((), PACKED),
    "cu_seq_lens_q": ((), PACKED),
    "experts_implementation": ((), "Gemma 2 has no experts; leave it out"),
    "from_flax": ((False,), "convert the folder with refgemma convert"),
    "from_tf": ((False,), "weights of TensorFlow are not read; save them with transformers first"),
    "key_mapping": ((), "rename the tensors, and give them to from_state_dict"),
    "load_in_4bit": ((False,), "refgemma does not quantise weights; leave it out"),
    "load_in_8bit": ((False,), "refgemma does not quantise weights; leave it out"),
    "is_causal": ((True,), "give attention_mask with four axes"),
    "is_main_process": ((True,), "call save_pretrained in one process"),
    "max_length_k": ((), PACKED),
    "max_length_q": ((), PACKED),
    "output_loading_info": ((False,), "a tensor that does not fit raises an error here, so nothing is left to report"),
    "quantization_config": ((), "refgemma does not quantise weights; leave it out"),
    "push_to_hub": ((False,), "refgemma uploads nothing; use: hf upload REPOSITORY FOLDER"),
    "safe_serialization": ((True,), "weights are written as safetensors only"),
    "save_original_format": ((True, False), ""),
    "save_peft_format": ((True, False), ""),
    "state_dict": ((), "use from_state_dict(config, state_dict)"),
    "subfolder": (("",), "give the path of the folder inside"),
    "use_safetensors": ((True,), "refgemma prefers safetensors to pickles; leave it out"),
    "variant": ((), "rename the files to model.safetensors"),
}


def refuse_arguments(given: Mapping[str, Any], name: str) -> None:
    """Raise an error for any argument of the function `name`, unless the argument has no effect here.

    Raises
    ------
    UsageError
        If an argument is refused; the message names the first.

    Examples
    --------
    >>> refuse_arguments({"safe_serialization": True}, "save_pretrained")
    >>> refuse_arguments({"shard_size": 5}, "save_pretrained")
    Traceback (most recent call last):
    refgemma.errors.UsageError: save_pretrained: unexpected keyword argument 'shard_size'
    """
    for argument in drop_arguments(given, name):
        raise UsageError(f"{name}: unexpected keyword argument {argument!r}")


def drop_arguments(given: Mapping[str, Any], name: str, error: type[RefgemmaError] = UsageError) -> dict[str, Any]:
    """Return the arguments given to the function `name`, without those that have no effect here.

    Raises
    ------
    error
        If an argument of transformers has a value that would change the result. The message says what to write instead.

    Examples
    --------
    >>> drop_arguments({"device_map": "auto", "attn_implementation": "eager", "num_labels": 3}, "Gemma2Model")
    {'num_labels': 3}
    >>> drop_arguments({"load_in_4bit": True}, "Gemma2Model")
    Traceback (most recent call last):
    refgemma.errors.UsageError: Gemma2Model: load_in_4bit=True: refgemma does not quantise weights; leave it out
    """
    left: dict[str, Any] = {}
    for argument, value in given.items():
        if argument not in NEUTRAL:
            left |= {} if argument in WITHOUT_EFFECT else {argument: value}
            continue
        harmless, advice = NEUTRAL[argument]
        if value is not None and not any(value is x or value == x for x in harmless):
            shown = " ".join(reprlib.repr(value).split())[:80]  # a state dict is long
            raise error(f"{name}: {argument}={shown}: {advice}")
    return left

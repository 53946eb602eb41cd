"""Capture the named tensors of a live transformers model, including those inside attention.

Checked in tests/parity: every tensor is captured, and ``refgemma check`` reports no error, in three precisions, padded
and cached.

Hooks capture module outputs. Wrapping the rotation captures rotated queries and keys. Watching the torch calls of the
attention function captures scores, capped scores and attention weights. A function that computes no scores, such as
sdpa, gives none of these. The model does not change, and every hook is removed at the end. torch is imported
only when a model is captured.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from refgemma.inputs import InputError
from refgemma.precision import Array, as_dtype
from refgemma.trace.names import LAYER_NORMS


@contextmanager
def catch_tensors(model: Any) -> Iterator[dict[str, Any]]:
    """Capture every named tensor of the calls inside this block, by refgemma's names; keep only the last call.

    Parameters
    ----------
    model : torch.nn.Module
        A ``Gemma2ForCausalLM`` of transformers 5.x, or one with the same modules.
    """
    import sys

    found: dict[str, Any] = {}
    handles: list[Any] = []
    inner = model.model
    modeling = sys.modules[type(inner.layers[0].self_attn).__module__]

    def output(module: Any, name: str) -> None:
        handles.append(module.register_forward_hook(lambda m, i, o: found.__setitem__(name, o)))

    def catch_input(module: Any, name: str) -> None:
        handles.append(module.register_forward_hook(lambda m, i, o: found.__setitem__(name, i[0])))

    output(inner.embed_tokens, "embedded")
    handles.append(inner.rotary_emb.register_forward_hook(
        lambda m, i, o: found.update(cos=o[0].unsqueeze(1), sin=o[1].unsqueeze(1))
    ))  # fmt: skip
    output(inner.norm, "norm")
    output(model.lm_head, "raw_logits")
    for index, layer in enumerate(inner.layers):
        p = f"layers.{index}."
        for norm in LAYER_NORMS:
            output(getattr(layer, norm), p + norm)
        catch_input(layer.pre_feedforward_layernorm, p + "middle")
        for letter in ("q", "k", "v"):
            output(getattr(layer.self_attn, f"{letter}_proj"), f"{p}attention.{letter}")
        catch_input(layer.self_attn.o_proj, p + "attention.mixed")
        output(layer.self_attn.o_proj, p + "attention.out")
        output(layer.mlp.gate_proj, p + "feed_forward.gate")
        output(layer.mlp.up_proj, p + "feed_forward.up")
        output(layer.mlp.act_fn, p + "feed_forward.gelu")
        catch_input(layer.mlp.down_proj, p + "feed_forward.product")
        output(layer.mlp.down_proj, p + "feed_forward.out")
        output(layer, p + "out")
    with _watched_attention(modeling, found):
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _watched_attention(modeling: Any, found: dict[str, Any]) -> Iterator[None]:
    """Watch the rotation and the attention function of a modeling file."""
    rotate, interfaces = modeling.apply_rotary_pos_emb, modeling.ALL_ATTENTION_FUNCTIONS
    rotated: list[tuple[Any, Any]] = []  # kept until the attention call, which knows the layer's number

    def noted_rotate(*args: Any, **named: Any) -> Any:
        rotated.append(rotate(*args, **named))
        return rotated[-1]

    class Interfaces:
        """The existing attention functions, each wrapped to be watched."""

        def get_interface(self, *args: Any) -> Callable[..., Any]:
            return _watch(interfaces.get_interface(*args), rotated, found)

        def __getattr__(self, name: str) -> Any:
            return getattr(interfaces, name)

    modeling.apply_rotary_pos_emb, modeling.ALL_ATTENTION_FUNCTIONS = noted_rotate, Interfaces()
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb, modeling.ALL_ATTENTION_FUNCTIONS = rotate, interfaces


def _watch(attend: Callable[..., Any], rotated: list[tuple[Any, Any]], found: dict[str, Any]) -> Callable[..., Any]:
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):  # type: ignore[misc]
        """Record every torch function called while active."""

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[str, Any, Any]] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.calls.append((getattr(func, "__name__", ""), args, result))
            return result

    def attend_watched(module: Any, *args: Any, **named: Any) -> Any:
        with Watch() as watch:
            mixed, probs = attend(module, *args, **named)
        p = f"layers.{module.layer_idx}.attention."
        found[p + "q_rot"], found[p + "k_rot"] = rotated.pop()
        found.update({p + name: x for name, x in scores_of(watch.calls).items()})
        if probs is not None:
            found[p + "probs"] = probs
        return mixed, probs

    return attend_watched


def scores_of(calls: Sequence[tuple[str, Any, Any]]) -> dict[str, Any]:
    """Return scores and capped scores from the torch calls of an attention function; empty if it calls no softmax.

    Scores are the first matrix product, or the product with a number right after it. Capped scores are the result of
    the last multiplication after a tanh or a clipping, or else the scores themselves.
    """
    names = [name for name, _, _ in calls]
    if "softmax" not in names or "matmul" not in names:
        return {}
    start, end = names.index("matmul"), names.index("softmax")
    place = start + 1 if names[start + 1] == "mul" else start
    scores = calls[place][2]
    products = [n for n in range(place + 1, end) if names[n] == "mul"]
    bent = {"tanh", "clamp"} & set(names[place:end]) and products
    return {"scores": scores, "capped": calls[products[-1]][2] if bent else scores}


def capture_transformers(
    model: Any, input_ids: Any, attention_mask: Any = None, calls: Sequence[int] | None = None, *,
    backward: bool = False, labels: Any = None, cache: Any = None, **named: Any,
) -> tuple[dict[str, Array], dict[str, str]]:  # fmt: skip
    """Run a live transformers model and return its named tensors and the metadata of their trace.

    Parameters
    ----------
    model : torch.nn.Module
        A ``Gemma2ForCausalLM``; its attention implementation is used as it is.
    input_ids, attention_mask : array (batch, seq)
        The tokens, and a mask with 0 for padding.
    calls : sequence of int, optional
        Number of tokens of each call, for successive calls with a cache; by default, one call.
    backward : bool
        If true, also compute the backward pass from the loss, in a single call. The trace then has the labels, and the
        gradient of each tensor and weight, named ``grads.`` and its name. The parameters' own ``grad`` does not change.
    labels : array (batch, seq), optional
        Labels for the loss. By default the tokens, except padding and tokens that follow only padding.
    cache : transformers.Cache, optional
        An empty cache, for example a ``StaticCache``. By default, several calls share a ``DynamicCache``.
    **named
        Arguments passed to the model, for example ``position_ids``.

    Returns
    -------
    tensors, metadata
        Arguments for `refgemma.trace.names.save_trace`.

    Raises
    ------
    InputError
        If gradients of several calls are requested.

    Examples
    --------
    In a script that has torch::

        tensors, about = capture_transformers(model, [[2, 300, 400]])
        save_trace(tensors.items(), "port.safetensors", about)
    """
    import torch
    import transformers

    if backward and len(calls or [0]) > 1:
        raise InputError(
            f"backward=True with {len(calls or [])} calls; gradients can be captured only for a single call"
        )
    ids = torch.as_tensor(np.asarray(input_ids))
    mask = None if attention_mask is None else torch.as_tensor(np.asarray(attention_mask))
    lengths = list(calls or [ids.shape[1]])
    if cache is None and len(lengths) > 1:
        cache = transformers.DynamicCache(config=model.config)
    # transformers 5.24 renamed this argument, and warns of the old name.
    parameter = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    past = {} if cache is None else {parameter: cache}
    head_dim = model.model.layers[0].self_attn.head_dim
    tensors: dict[str, Array] = {"input_ids": np.asarray(ids)}
    if mask is not None:
        tensors["attention_mask"] = np.asarray(mask)
    if (positions := named.get("position_ids")) is not None:
        tensors["position_ids"] = np.asarray(positions)
    done, dtype = 0, str(model.dtype).removeprefix("torch.")
    for number, length in enumerate(lengths):
        prefix = f"calls.{number}." if len(lengths) > 1 else ""
        end = done + length
        with torch.set_grad_enabled(backward), catch_tensors(model) as found:
            result = model(
                input_ids=ids[:, done:end], attention_mask=None if mask is None else mask[:, :end],
                use_cache=cache is not None, **past, **named,
            )  # fmt: skip
        found["logits"] = result.logits
        if backward:
            given = ids if labels is None else torch.as_tensor(np.asarray(labels))
            if labels is None and mask is not None:
                given = ids.masked_fill(mask == 0, -100)
                given[:, 1:] = given[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
            tensors["labels"] = np.asarray(given)
            loss = model.loss_function(result.logits, given, model.config.vocab_size)
            found |= _gradients_of(model, found, loss)
        for name, x in found.items():
            tensors[prefix + name] = as_numpy(in_heads(name, x, head_dim))
        done = end
    about = {
        "dtype": dtype, "calls": json.dumps(lengths), "engine": f"transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {model.config._attn_implementation}",
    }  # fmt: skip
    return tensors, about


def capture_modules(model: Any, call: Callable[[], Any]) -> tuple[dict[str, Array], dict[str, str]]:
    """Run a PyTorch model of any project; return the outputs of its modules, by their own names, and the metadata.

    ``refgemma check`` reads such a trace with the map of the project, for example ``--map litgpt``. Of several calls of
    a module, only the first counts, and of several outputs, the first of floating point. The result of `call` is
    ``logits``, if it is a tensor or has this attribute. ``input_ids`` are the first tensor of integers that a module
    takes.

    Parameters
    ----------
    model : torch.nn.Module
        A Gemma 2 whose modules can be hooked: neither compiled nor captured as a graph.
    call : callable
        Runs the model once on all tokens. It has no arguments.

    Returns
    -------
    tensors, metadata
        Arguments for `refgemma.trace.names.save_trace`.

    Raises
    ------
    InputError
        If no module was called with token ids.

    Examples
    --------
    In a script that has torch, with a model of litgpt::

        tensors, about = capture_modules(model, lambda: model(torch.tensor([[2, 30, 40]])))
        save_trace(tensors.items(), "port.safetensors", about)
    """
    import torch

    found: dict[str, Any] = {}
    handles: list[Any] = []

    def keep(name: str, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        floats = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if floats and name not in found:
            found[name] = floats[0].detach().clone()  # a later operation may write into the tensor

    def keep_ids(module: Any, inputs: tuple[Any, ...]) -> None:
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.dtype in (torch.int32, torch.int64):
                found.setdefault("input_ids", x.detach().clone().reshape(-1, x.shape[-1]))

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(keep_ids))
        if name:  # the result of the whole model is not a module's output
            handles.append(module.register_forward_hook(lambda m, i, output, name=name: keep(name, output)))
    try:
        with torch.no_grad():
            result = call()
    finally:
        for handle in handles:
            handle.remove()
    if "input_ids" not in found:
        raise InputError("no module of the model was called with a tensor of token ids; does call run this model?")
    keep("logits", getattr(result, "logits", result))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    about = {"dtype": dtype, "engine": f"{type(model).__module__}, torch {torch.__version__}"}
    return {name: as_numpy(x) for name, x in found.items()}, about


def read_debug_mode(mode: Any) -> dict[str, Array]:
    """Return the outputs of operations and modules that PyTorch's ``DebugMode`` recorded, for the map of this name.

    An operation has the name of its module and its own: ``model.layers.0.self_attn/aten.tanh.default``; the next of the
    same name is ``...#1``. The output of a module's last operation is also that of the module, and has its name.

    Parameters
    ----------
    mode : DebugMode
        Of ``torch.utils._debug_mode``, after a call with ``record_nn_module=True`` inside
        ``DebugMode.record_outputs()``.

    Raises
    ------
    InputError
        If no outputs were recorded. A log of hashes has only one number of each tensor, such as its norm. Two logs can
        be compared by hashes, but an operation cannot be computed from them.

    Examples
    --------
    In a script that has torch::

        with DebugMode.record_outputs(), DebugMode(record_nn_module=True) as mode:
            model(torch.tensor([[2, 300, 400]]), use_cache=False)
        tensors = {"input_ids": np.array([[2, 300, 400]])} | read_debug_mode(mode)
        save_trace(tensors.items(), "port.safetensors", {"map": "torch-debug-mode", "dtype": "float32"})
    """
    inside: list[tuple[int, str]] = []  # the modules that the operation is in, each with its depth
    found: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for call in mode.operators:
        while inside and inside[-1][0] >= call.call_depth:
            inside.pop()
        if getattr(call, "header", "") == "nn.Mod":
            inside.append((call.call_depth, call.tag.partition(".")[2]))  # without the name of the model's class
            continue
        output: Any = (getattr(call, "record", None) or {}).get("output")
        if hasattr(output, "is_floating_point") and output.is_floating_point():
            name = f"{inside[-1][1] if inside else ''}/{call.op}"
            found[f"{name}#{counts[name]}" if counts[name] else name] = output
            counts[name] += 1
            found |= {module or "logits": output for _, module in inside}
    if not found:
        raise InputError("DebugMode has no outputs; run the model inside DebugMode.record_outputs() too")
    return {name: as_numpy(x) for name, x in found.items()}


def _gradients_of(model: Any, found: dict[str, Any], loss: Any) -> dict[str, Any]:
    """Return the gradient of the loss for each captured tensor and each parameter, as autograd computes them."""
    import torch

    sources = {name: x for name, x in found.items() if x.requires_grad} | dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    return {f"grads.{name}": grad for name, grad in zip(sources, grads, strict=True) if grad is not None}


def in_heads(name: str, x: Any, head_dim: int) -> Any:
    """Split projections into heads; they were captured before the model splits them."""
    if name.rpartition(".")[2] in ("q", "k", "v") and x.ndim == 3:
        return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)
    return x


def as_numpy(x: Any) -> Array:
    """Return a torch tensor as an array of the same precision."""
    name = str(x.dtype).removeprefix("torch.")
    numbers = x.detach().cpu()
    return as_dtype(numbers.float().numpy(), name) if name in ("bfloat16", "float16") else numbers.numpy()

"""EasyDeL's Gemma 2, by its own loader: the outputs of its layers, and the logits."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"

import easydel as ed
import jax
import jax.numpy as jnp
from glue import main


def load(folder, dtype):
    kind = getattr(jnp, dtype)
    return ed.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(folder), dtype=kind, param_dtype=kind, precision=jax.lax.Precision.HIGHEST, auto_shard_model=False,
        sharding_axis_dims=(1, 1, 1, 1, 1), config_kwargs={"attn_mechanism": ed.AttentionMechanisms.VANILLA},
    )  # fmt: skip


def run(model, case):
    case.only(padding=True)
    with model.mesh:
        result = model(input_ids=jnp.array(case.ids), attention_mask=jnp.array(case.mask), output_hidden_states=True)
    states = [x.astype(jnp.float32) for x in result.hidden_states]
    found = {"embedded": states[0]} | {f"layers.{n}.out": x for n, x in enumerate(states[1:-1])}
    return found | {"norm": states[-1], "logits": result.logits.astype(jnp.float32)}


main(load, run, engine=f"easydel {version('easydel')}, jax {version('jax')}")

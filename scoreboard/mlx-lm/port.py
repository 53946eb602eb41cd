"""MLX-LM's Gemma 2 on the CPU: the outputs of its modules, and the logits."""

import json
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from glue import main
from mlx_lm.models import gemma2
from mlx_lm.models.cache import make_prompt_cache


class Watch:
    """Record what each module returns; the second result under one name is ``name#1``."""

    def __init__(self, model):
        self.found, names = {}, {id(module): name for name, module in model.named_modules()}
        for kind in {type(module) for _, module in model.named_modules()}:
            kind.__call__ = self.hook(kind.__call__, names)

    def hook(self, usual, names):
        def call(module, *given, **named):
            result = usual(module, *given, **named)
            if (name := names.get(id(module))) and isinstance(result, mx.array):
                count = sum(other.partition("#")[0] == name for other in self.found)
                self.found[f"{name}#{count}" if count else name] = result
            return result

        return call

    def take(self, prefix, **more):
        found, self.found = self.found | more, {}
        return {prefix + name: np.array(x.astype(mx.float32)) for name, x in found.items()}


def load(folder, dtype):
    mx.set_default_device(mx.cpu)
    model = gemma2.Model(gemma2.ModelArgs.from_dict(json.loads((folder / "config.json").read_text())))
    weights = mx.load(str(folder / "model.safetensors"))
    model.load_weights([(n, x.astype(getattr(mx, dtype))) for n, x in weights.items() if n != "lm_head.weight"])
    model.watch = Watch(model)
    return model


def run(model, case):
    case.only(calls=True)
    cache, found = make_prompt_cache(model) if len(case.calls) > 1 else None, {}
    for prefix, start, end in case.pieces():
        logits = model(mx.array(case.ids[:, start:end]), cache=cache)
        found |= model.watch.take(prefix, logits=logits)
    return found


main(load, run, map="mlx-lm", engine=f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}")

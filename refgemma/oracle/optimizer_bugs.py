"""The known mistakes of optimizers as data. Checked by making each of them in PyTorch, and by reading the weights after
a step from a trace (tests/parity/test_optimizers_parity.py)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from refgemma.oracle.known_bugs import KnownBug, function
from refgemma.oracle.operations import Context
from refgemma.oracle.optimizer_operations import OPTIMIZER_STEPS, WeightStep, adamw_by, clip_by_norm, norm_of
from refgemma.oracle.training_bugs import GITHUB
from refgemma.trace.names import AFTER, field_of
from refgemma.weights.parameters import EMBED_TOKENS, LM_HEAD, NORM, layer_tensors


def adamw_with(**mistakes: Any) -> Callable[[Context], Context]:
    """Return an edit with a mistake in AdamW; another optimizer stays as it is."""

    def change(context: Context) -> Context:
        if context.call.step is None or context.call.step.optimizer != "adamw":
            return context
        return function(optimizer_step=lambda s: adamw_by(s, **mistakes))(context)

    return change


def decay_by(change: Callable[[WeightStep], float]) -> Callable[[Context], Context]:
    """Return an edit with another decay of each weight."""

    def edit(context: Context) -> Context:
        assert context.call.step is not None
        usual = OPTIMIZER_STEPS[context.call.step.optimizer]
        return function(optimizer_step=lambda s: usual(replace(s, decay=change(s))))(context)

    return edit


def ascend(context: Context) -> Context:
    """Return an edit that adds the gradient's move."""
    assert context.call.step is not None
    usual = OPTIMIZER_STEPS[context.call.step.optimizer]
    return function(optimizer_step=lambda s: usual(replace(s, grad=-s.grad, exp_avg=-s.exp_avg)))(context)


WEIGHTS = tuple(field_of(AFTER + name) for name in (EMBED_TOKENS, NORM, LM_HEAD, *layer_tensors(0, True).values()))
SMALL_GRADIENTS = "gradients that are not far above eps"
DECAY = "a weight decay above 0"

OPTIMIZER_BUGS: tuple[KnownBug, ...] = (
    KnownBug("optimizer-decays-norms", "norms and biases decay, too", WEIGHTS, function(decays=lambda name: True),
             f"{GITHUB}ServiceNow/Fast-LLM/issues/542", DECAY, "parameter groups"),
    KnownBug("optimizer-l2-decay", "the decay is added to the gradient (Adam with L2), not taken from the weight",
             WEIGHTS, adamw_with(l2=True), f"{GITHUB}keras-team/keras/issues/19051", DECAY, "Adam in place of AdamW"),
    KnownBug("optimizer-no-decay", "no weight decays", WEIGHTS, decay_by(lambda s: 0.0),
             f"{GITHUB}fastai/fastai2/issues/246", DECAY,
             "weight_decay"),
    KnownBug("optimizer-decay-not-scaled", "the decay is not multiplied by the learning rate", WEIGHTS,
             decay_by(lambda s: s.decay / (s.numbers.learning_rate or 1.0)),
             f"{GITHUB}tensorflow/addons/issues/2282", DECAY, "weight_decay"),
    KnownBug("optimizer-decay-after-step", "the weight decays after the move, together with it", WEIGHTS,
             adamw_with(after=True), f"{GITHUB}huggingface/transformers/issues/14539", DECAY, "order of decay, move"),
    KnownBug("optimizer-no-bias-correction", "the moments are not divided by 1 - beta**step", WEIGHTS,
             adamw_with(correct=False), f"{GITHUB}ml-explore/mlx/pull/1640", "an early step", "correct_bias"),
    KnownBug("optimizer-step-counted-from-2", "the bias correction is that of the next step", WEIGHTS,
             adamw_with(count=1), "no public report; flashlight #143 counts each tensor",
             "an early step", "step counter"),
    KnownBug("optimizer-eps-inside-root", "eps is added inside the root of the second moment", WEIGHTS,
             adamw_with(inside=True), f"{GITHUB}FluxML/Flux.jl/pull/448", SMALL_GRADIENTS, "eps_root"),
    KnownBug("optimizer-eps-before-correction", "eps is added before the bias correction (epsilon hat)", WEIGHTS,
             adamw_with(early=True), f"{GITHUB}tensorflow/tensorflow/issues/35102",
             SMALL_GRADIENTS, "epsilon"),
    KnownBug("optimizer-ascends", "the step goes along the gradient, not against it", WEIGHTS, ascend,
             f"{GITHUB}pytorch/pytorch/issues/1871",
             knob="maximize"),
    KnownBug("optimizer-not-clipped", "the gradients are not clipped", WEIGHTS,
             function(clip=lambda grad, norm, limit: 1.0), f"{GITHUB}NVIDIA/OpenSeq2Seq/pull/192",
             "SGD or a later step, and a norm above max_grad_norm", "max_grad_norm"),
    KnownBug("optimizer-clips-each-tensor", "each gradient is clipped by its own norm, not by that of all", WEIGHTS,
             function(clip=lambda grad, norm, limit: clip_by_norm(grad, norm_of([grad]), limit)),
             f"{GITHUB}huggingface/transformers/issues/581",
             "SGD or a later step, and a norm above max_grad_norm", "clip_grad_norm_ of all parameters"),
)  # fmt: skip

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/ptq_vs_qat.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/foundations/ptq_vs_qat.ipynb)
#
# # PTQ and QAT: quantize after training, or train through the rounding
#
# *Large Model Quantization: a deep dive. Foundations, the third notebook.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - say why rounding cannot be trained through, and build the estimator that does it all the same
#   [@bengio2013ste];
# - let a model learn the step of its own grid (LSQ [@esser2019lsq]), and check the gradient three ways;
# - quantize one language model at 8, 4, 3 and 2 bits after training and in training, with the same data and with a
#   control, and say where the training pays and what it costs;
# - turn the trained model into packed integers that give the very same logits.
#
# It takes about an hour to read and work. You need to know what a gradient is and how a training loop looks. The code runs in
# well under a minute with the profile `quick`, in some four minutes with `cpu` on two quiet cores, and needs no GPU.

# %% tags=["setup"]
# Set-up: installs the course's package where it is missing, as on Colab.
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

VERSION = "0.1.0"
ARCHIVE = "https://github.com/adiel2012/model-size-reduction/archive/main.zip"
if importlib.util.find_spec("course_utils") is None:
    spec = "course_utils[oracles] @ " + os.environ.get("COURSE_UTILS_SPEC", ARCHIVE)
    # What is installed already stays as it is: pip may only add to it.
    pins = {}
    for d in reversed(list(importlib.metadata.distributions())):
        pins[re.sub("[-_.]+", "-", str(d.name)).lower()] = f"{d.name}=={d.version}\n"
    pin = re.compile(r"\S+==\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+[\w.]+)?\n")
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/constraints.txt", "w") as file:
            file.writelines(filter(pin.fullmatch, pins.values()))
        command = [sys.executable, "-m", "pip", "install", "-c", file.name, spec]
        pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        hint = "If versions conflict on Colab: Runtime > Change runtime type > latest."
        raise RuntimeError(f"pip failed:\n{(pip.stdout + pip.stderr)[-2000:]}{hint}")
    importlib.invalidate_caches()
import course_utils

if course_utils.__version__ != VERSION:
    found = f"The notebook needs course_utils {VERSION}, not {course_utils.__version__}"
    remedy = "On Colab open it by its badge; elsewhere install its commit, and restart"
    raise RuntimeError(f"{found}. {remedy}.")

# %%
import copy
import math
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity, tensor_bytes
from course_utils.finetuning.conversion import convert
from course_utils.finetuning.qat import FakeQuantLinear, prepare_qat
from course_utils.grids.fake_quantization import fake_quantize, learned_step
from course_utils.models import linear_layers, load_model
from course_utils.plotting import error_against_bits, step_gradient, training_curves
from course_utils.profiles import resolve
from course_utils.results import record
from course_utils.training.loop import TrainConfig, next_token_loss, train
from torch import nn

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto is course-lm here, in every profile: it is to be trained
SEED = 0

# %%
profile = resolve(PROFILE, "course-lm" if MODEL == "auto" else MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# **Post-training quantization (PTQ)** takes the weights `W` as they are and looks for a grid on which they lie
# well. A weight becomes an integer code from $l$ to $h$ (`low` and `high` in the code) times a step `S`, and `S` is
# chosen to keep the weights,
#
# $$ \min_{S} \; \lVert W - Q_S(W) \rVert^2, \qquad Q_S(W) = S \cdot \mathrm{clamp}(\mathrm{round}(W / S),\, l,\, h), $$
#
# or, in better methods, the outputs of a layer. It needs no backward pass, and little data or none.
#
# **Quantization-aware training (QAT)** asks for what we want in the end, a small loss $L$ on text, of the model as
# it will be stored:
#
# $$ \min_{W,\, S} \; L\big(Q_S(W)\big). $$
#
# The weights may move to where rounding hurts least. That takes data, a backward pass, and time. With enough bits
# there is little to gain. Where does it begin to pay? And how much of the gain is due to training
# *through the grid*, and how much to training some more?
#
# ## Rounding has no gradient
#
# Six weights, two bits: codes -2, -1, 0, 1, and a step of 0.5.

# %% tags=["nbval-check-output"]
S, low, high = 0.5, -2, 1
w = torch.tensor([-1.3, -0.6, -0.1, 0.2, 0.4, 0.9])
codes = (w / S).round().clamp(low, high)
for name, row in {"w": w, "code": codes, "value": codes * S}.items():
    print(f"{name:6}" + "".join(f"{v + 0.0:7.2f}" for v in row.tolist()))

# %% [markdown]
# Training needs to know how the loss changes when a weight changes a little. We take a loss that wants each value
# at 0.3, and move each weight by a hundredth to see.

# %% tags=["nbval-check-output"]
target = 0.3


def loss_of(w):
    return ((w / S).round().clamp(low, high) * S - target).square()


slope = (loss_of(w + 0.01) - loss_of(w - 0.01)) / 0.02
print("finite differences:", slope.tolist())
w.requires_grad_()
loss_of(w).sum().backward()
print("autograd:          ", [abs(g) for g in w.grad.tolist()])

# %% [markdown]
# Zero everywhere: a code stays the same until its weight crosses the middle between two codes, and there it jumps. The
# gradient is right, and useless.
#
# The **straight-through estimator** [@bengio2013ste] goes forward through the rounding, and backward as if it had not
# been there. In autograd that is one line: a tensor with the *value* of one expression and the *gradient* of
# another.


# %%
def value_of(value, gradient_of):
    """The first tensor's value with the second one's gradient."""
    return value.detach() + (gradient_of - gradient_of.detach())


def fake_quantized(w, S, low, high):
    codes = (w * (1 / S)).round()  # PyTorch multiplies by the inverse, too
    inside = (low <= codes) & (codes <= high)
    w = torch.where(inside, w, w.detach())  # a clipped weight gets no gradient
    return value_of(codes.clamp(low, high) * S, w)


w.grad = None
(fake_quantized(w, S, low, high) - target).square().sum().backward()
print("straight through:", [round(g, 2) for g in w.grad.tolist()])

# %% [markdown]
# Each weight is now pulled towards the target, from where its *value* stands. The first and the last are clipped
# (0.9 / 0.5 rounds to 2, and the highest code is 1): a small change of such a weight cannot show, and its gradient
# is 0.
#
# PyTorch has the same operator in C++, and the course's package one in a few lines of Python. All three have to
# agree, in values and in gradients.

# %%
generator = torch.Generator().manual_seed(profile.seed)
x = torch.randn(10_000, generator=generator).requires_grad_()
upstream = torch.randn(10_000, generator=generator)
step, zero = torch.tensor(0.3), torch.tensor(0, dtype=torch.int32)
results = {
    "by hand": fake_quantized(x, step, -4, 3),
    "course_utils": fake_quantize(x, step, zero, -4, 3),
    "torch": torch.fake_quantize_per_tensor_affine(x, step, zero, -4, 3),
}
for name, y in results.items():
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(y, results["torch"])
    assert torch.equal(gradient, upstream * (gradient != 0))
    print(f"{name:13} {int((gradient == 0).sum())} of {len(x)} are clipped")

# %% [markdown]
# ### What an update does
#
# The straight-through gradient is not the gradient of anything. Watch a single weight: no level equals the target
# 0.3, the nearest ones are 0 and 0.5.

# %%
latent = torch.tensor([0.9], requires_grad=True)
weights, values = [], []
for _ in range(120):
    value = fake_quantized(latent, 0.5, -2, 3)
    (gradient,) = torch.autograd.grad((value - target).square().sum(), latent)
    weights.append(latent.item())
    values.append(value.item())
    latent.data -= 0.05 * gradient
updates = list(range(120))
lines = {"float weight": (updates, weights), "its value": (updates, values)}
figure = training_curves(lines, "weight", levels={"target": target})
plt.show()
print(f"over the last 60 updates the value is 0.5 in {values[60:].count(0.5)} of them,")
print(f"and {sum(values[60:]) / 60:.2f} on average")

# %% [markdown]
# *Figure: a float weight and its value on the grid over 120 updates. The float weight falls from 0.9 towards 0.25, the
# middle between two levels, and stays there; its value goes from 1.0 to 0.5 and then jumps between 0.5 and 0. A
# dashed line marks the target 0.3.*
#
# The float weight, called *latent*, is not what the model computes with: it collects small pulls until a code changes. At
# the end it sits on the border between two codes, and the value is right on average and never in fact. That is
# one reason to let the learning rate decay at the end: small pulls carry fewer weights across a border.
#
# ## Learning the step
#
# Where does `S` come from? Learned step size quantization, LSQ [@esser2019lsq], trains it with the weights. Let
# $\hat v = S \cdot \mathrm{clamp}(\mathrm{round}(v / S), l, h)$. Differentiate with respect to `S`, the rounding
# passed straight through, and you get the paper's equation 3:
#
# $$ \frac{\partial \hat v}{\partial S} = \begin{cases}
# \mathrm{round}(v / S) - v / S & \text{if } l < v / S < h \\
# l & \text{if } v / S \le l \\
# h & \text{if } v / S \ge h \end{cases} $$
#
# We need not type it in. Write the forward pass with the straight-through rounding, and autograd derives it. What
# remains is the paper's *gradient scale*: a step collects the gradients of all weights that share it, so
# they are divided by $\sqrt{n h}$ for `n` weights.


# %%
def lsq(v, S, low, high):
    """`v` on the grid of `S` (broadcast), with gradients to both."""
    n = v.numel() // S.numel()
    S = value_of(S, S / math.sqrt(n * high))
    codes = (v * (1 / S)).round().clamp(low, high)
    ratio = v / S
    inside = (low < ratio) & (ratio < high)
    ratio = torch.where(inside, ratio, ratio.detach())
    return value_of(codes, ratio) * S


v = torch.linspace(-3.25, 2.25, 1101).requires_grad_()
S_each = torch.ones_like(v).requires_grad_()  # a step for each, to see each gradient
value = lsq(v, S_each, -2, 1)
of_v, of_S = torch.autograd.grad(value.sum(), (v, S_each))
figure = step_gradient(v.detach(), value.detach(), of_v, of_S)
plt.show()

# %% [markdown]
# *Figure: left, the value on a two-bit grid of step 1 against the weight, a staircase from -2 to 1. Right, two
# gradients of that value: with respect to the weight, 1 between -2 and 1 and 0 outside; with respect to the
# step, a saw-tooth between -0.5 and 0.5 inside, the constant -2 on the left and 1 on the right.*
#
# Read the right panel from outside in. A weight beyond the grid has the value $h S$ (or $l S$), which grows with the
# step. One inside has the value $v + S \cdot (\mathrm{round}(v / S) - v / S)$: itself plus a rounding error. Straight
# through means to hold the bracket, the error in steps; a larger step makes that error larger, and the gradient is the
# bracket.
#
# Is it right? Against equation 3 as it is written, and against **finite differences**, where there is something to
# differentiate: a clipped value is $l S$ or $h S$, a smooth function of `S`.

# %%
ratio = v.detach()
equation_3 = torch.where(ratio <= -2, -2.0, torch.where(ratio >= 1, 1.0, 0.0))
inside = (ratio > -2) & (ratio < 1)
equation_3 = torch.where(inside, ratio.round() - ratio, equation_3)
torch.testing.assert_close(of_S, equation_3, rtol=0, atol=1e-6)
clipped = (ratio < -2.6) | (ratio > 1.6)
with torch.no_grad():
    up, down = lsq(v, S_each + 0.01, -2, 1), lsq(v, S_each - 0.01, -2, 1)
difference = (up - down) / 0.02
print(f"clipped:  largest deviation {(difference - of_S)[clipped].abs().max():.1e}")
off, of_ratio = (
    (difference - of_S)[inside].abs().median(),
    ratio[inside].abs().median(),
)
print(f"inside:   median deviation {off:.2f}; median of |v / S| {of_ratio:.2f}")
assert (difference - of_S)[clipped].abs().max() < 1e-3

# %% [markdown]
# Inside, the estimator is *not* the slope. With the code held, as it is between two jumps, the value grows with the
# step by the code, $\mathrm{round}(v / S)$. Equation 3 says $v / S$ less, and that is the deviation printed.
#
# PyTorch carries a learnable fake quantization of its own (a private operator, so far). Its gradient for the step
# is equation 3 as well, but what counts as inside is decided after rounding, half a step further out. We
# leave that strip out of the comparison.

# %%
rows = torch.randn(8, 64, generator=generator).requires_grad_()  # [out, in]
steps = (rows.detach().abs().mean(1, keepdim=True)).requires_grad_()  # [out, 1]
upstream = torch.randn(8, 64, generator=generator)
ratio = rows.detach() / steps.detach()
upstream[((ratio <= -2) & (ratio > -2.6)) | ((ratio >= 1) & (ratio < 1.6))] = 0
factor = 1 / math.sqrt(64 * 1)
theirs = torch._fake_quantize_learnable_per_channel_affine(
    rows, steps[:, 0], torch.zeros(8), 0, -2, 1, factor
)
(reference,) = torch.autograd.grad(theirs, steps, upstream)
for name, ours in {"by hand": lsq, "course_utils": learned_step}.items():
    y = ours(rows, steps, -2, 1)
    torch.testing.assert_close(y, theirs)
    (gradient,) = torch.autograd.grad(y, steps, upstream)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    off = (gradient - reference).abs().max()
    print(f"{name:13} gradient of the steps: largest difference {off:.0e}")

# %% [markdown]
# ### The first step, and how far an update moves it
#
# The paper starts from $S = 2\,\overline{|v|} / \sqrt{h}$. A quantizer that was made for stored weights has other ideas: the
# whole range (**minmax**), or the range of least squared error (**mse**). We compare the three on a layer of the
# model, all with one symmetric grid for each row.
#
# A second question goes with it. The course's training loop uses AdamW, whose first update moves *every* parameter by
# about the learning rate, whatever the size of its gradient. (So the paper's gradient scale, made for plain
# gradient descent, changes next to nothing here: exercise 3.) How much is that of a step?

# %%
model, tokenizer = load_model(profile.models[0], device=profile.device)  # float32
layer = linear_layers(model)[2]
W = layer.weight.contiguous()  # [out, in]
LEARNING_RATE = 3e-4


def grid(n_bits, weight_range="mse"):
    per_row = dict(group_size="row", symmetric=True)
    return get_method("affine", n_bits=n_bits, weight_range=weight_range, **per_row)


print(f"{layer.name}: mean step and |W - Q(W)|^2 / |W|^2, for three ways")
print("bits             LSQ           minmax              mse     first update")
for n_bits in (8, 4, 3, 2):
    h = 2 ** (n_bits - 1) - 1
    starts = {"LSQ": 2 * W.abs().mean(1, keepdim=True) / math.sqrt(h)}
    for name in ("minmax", "mse"):
        starts[name] = grid(n_bits, name).quantize(W).scale.float()
    row = f"{n_bits:4}"
    for start in starts.values():
        error = (W - lsq(W, start, -h - 1, h)).square().sum() / W.square().sum()
        row += f"   {start.mean():.4f} {error:.1e}"
    share = LEARNING_RATE / starts["minmax"].median().item()
    print(f"{row}   {share:5.1%} of minmax")

# %% [markdown]
# Over the same range, steps of eight bits are 85 times smaller than steps of two (127.5 / 1.5), and an update is that
# much more of them. A step that loses a good part of itself in each update may soon be negative, and a grid with a
# negative step is none. So we train the **logarithm** of the step: $S = e^{s}$ is positive by construction, and an
# update changes it by about the learning rate *relatively*, at eight bits as at two.
#
# One thing more. A stored step is a float16 number, and what is trained should be what is stored. The forward pass
# therefore rounds the step to float16, straight through again.


# %%
class GridLinear(nn.Module):
    """Trains a float weight `[out, in]`; computes with its values on a grid."""

    def __init__(self, weight, bias, n_bits):
        super().__init__()
        self.low, self.high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
        widest = weight.abs().amax(1, keepdim=True)  # [out, 1]
        start = (widest / ((self.high - self.low) / 2)).half().float()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.log_step = nn.Parameter(start.log())

    def forward(self, x):
        step = self.log_step.exp()
        step = value_of(step.half().float(), step)  # as it will be stored
        return F.linear(x, lsq(self.weight, step, self.low, self.high), self.bias)


ours = GridLinear(W, layer.bias, 2)
packaged = FakeQuantLinear(grid(2, "minmax"), W, layer.bias)
x = torch.randn(4, W.shape[1], generator=generator).to(profile.device)  # [tokens, in]
torch.testing.assert_close(ours(x), packaged(x), rtol=0, atol=1e-4)
found = []
for module in (ours, packaged):
    module(x).square().sum().backward()
    found.append((module.weight.grad, module.log_step.grad.flatten()))
for a, b in zip(*found, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
print("outputs and gradients are those of course_utils")

# %% [markdown]
# ## A whole model, and a fair comparison
#
# Three texts that share no document: the model's own **training** text (its share of the CIA World Factbook), a
# **calibration** text to watch the training and to choose the learning rate on, and the **evaluation** text, for the final
# figures alone.

# %%
context = profile.pick(quick=128, cpu=256)
text = documents("factbook", "train")
stream = token_stream(tokenizer.backend_tokenizer, text, tokenizer.eos_token_id)
batch_size = profile.pick(quick=4, cpu=8)
cut = TrainingBatches(stream, context=context, batch_size=batch_size, seed=profile.seed)
watched = calibration_tokens(tokenizer, 8, context + 1, seed=profile.seed)
tokens = evaluation_tokens(tokenizer, profile.pick(quick=2048, cpu=8192))
window = min(256, model.config.max_position_embeddings)


def batches(step):
    return cut(step).to(profile.device)  # [batch, context + 1]


@torch.no_grad()
def held_out(model):
    """Nats per token on the calibration text."""
    return next_token_loss(model, watched.to(profile.device)).item()


# %%
CONFIG = TrainConfig(
    steps=profile.pick(quick=6, cpu=40),
    lr=LEARNING_RATE,
    warmup=profile.pick(quick=1, cpu=5),
    decay=profile.pick(quick=3, cpu=20),
    eval_every=profile.pick(quick=2, cpu=8),
)
widths = profile.pick(quick=(4, 2), cpu=(8, 4, 3, 2))
trained_widths = profile.pick(quick=(2,), cpu=(8, 4, 3, 2))
per_run = CONFIG.steps * len(batches(0)) * context
print(f"{CONFIG.steps} updates, {per_run:,} tokens of training text for each run,")
print(f"{per_run / len(stream):.1%} of the {len(stream):,} that there are")

# %% [markdown]
# First PTQ, without any training: the whole range (**rtn**, round to nearest), the range of least squared error
# (**mse**), and the step from which LSQ would start (**lsq start**).


# %%
def quantized_copy(source, name, n_bits):
    """A packed copy of the model `source`, and its report."""
    quantized = copy.deepcopy(source)
    if name != "lsq start":
        method = grid(n_bits, "minmax" if name == "rtn" else "mse")
        return quantized, quantize_model(quantized, method)
    prepare_qat(quantized, grid(n_bits))
    for module in quantized.modules():
        if isinstance(module, FakeQuantLinear):
            step = 2 * module.weight.abs().mean(1) / math.sqrt(2 ** (n_bits - 1) - 1)
            module.log_step.data = step.log().detach()
    return quantized, convert(quantized)


PTQ = ("rtn", "mse", "lsq start")
minutes, bits = {}, {}
quality = {"float": perplexity(model, tokens, window=window)}
print(f"float: perplexity {quality['float']}")
for key in [(name, n_bits) for n_bits in widths for name in PTQ]:
    start = time.perf_counter()
    quantized, report = quantized_copy(model, *key)
    minutes[key] = (time.perf_counter() - start) / 60
    bits[key] = report.bits_per_weight
    quality[key] = perplexity(quantized, tokens, window=window)
    print(f"{key[1]} bits, {key[0]:9}  perplexity {quality[key].perplexity:8.2f}")

# %% [markdown]
# Compare the order of these perplexities with that of the squared errors above, of one layer: the range with the least
# error of the weights need not be the one with the least loss. PTQ by weights alone cannot know.
#
# Now the training. Every run has **equal batches in equal order**, equally many **updates**, and the same learning rate
# and schedule. One of them is the **control**: the float model, trained as long. We round it afterwards to the
# mse grid of each width. Whatever the data alone can teach the model, the control learns as well; what QAT has beyond
# the *rounded* control is due to training through the grid.
#
# One rule picks the weights of every run, control or not: of the updates at which the loss on the calibration text was
# measured, those of the lowest loss are kept. Update 0 is not among them, so a training that does nothing but harm shows as
# harm. Embeddings, norms and head are trained in all runs, too.
#
# The QAT runs start from the mse grid, that is from a model of the table above. (To pick the start by that table would
# be to choose on the evaluation text.)


# %%
def train_copy(n_bits=None, learn_steps=True):
    """Train the float model, or one on a grid; returns model, curve and minutes."""
    trained = copy.deepcopy(model)
    if n_bits is not None:
        prepare_qat(trained, grid(n_bits))
        for module in trained.modules():
            if isinstance(module, FakeQuantLinear):
                module.log_step.requires_grad_(learn_steps)
    curve = [{"step": 0, "held_out": held_out(trained)}]
    start = time.perf_counter()
    curve += train(trained, batches, CONFIG, evaluate=held_out, progress=False)
    taken = (time.perf_counter() - start) / 60
    best = min(curve[1:], key=lambda row: row["held_out"])["step"]
    losses = ", ".join(f"{row['held_out']:.3f}" for row in curve)
    name = "float " if n_bits is None else f"{n_bits} bits"
    print(f"{name}  {losses}; kept: update {best}")
    return trained, curve, taken


print("nats per token on the calibration text, before training and during it")
runs = {"control": train_copy()}
for n_bits in trained_widths:
    runs["qat", n_bits] = train_copy(n_bits)

# %%
curves = {}
for key, (_, curve, _) in runs.items():
    label = "float (control)" if key == "control" else f"{key[1]} bits"
    losses = [row["held_out"] for row in curve]
    curves[label] = ([row["step"] for row in curve], losses)
untrained = {"float, not trained": runs["control"][1][0]["held_out"]}
figure = training_curves(curves, "nats per token, calibration text", levels=untrained)
plt.show()

# %% [markdown]
# *Figure: loss on the calibration text over the updates, one curve for the float control and one for each number of
# bits; a dashed line marks the float model before any training. The numbers are those printed above the figure; where two
# curves agree, the later one covers the earlier. Each curve of a grid starts, at zero updates, from what the mse grid gives.*
#
# ## From fake to packed
#
# So far everything was float: values on a grid, 32 bits each, *simulated*. `convert` puts integers in their place. The claim to
# test: the packed model is not *like* the one that was trained, it **is** that one.

# %%
batch = tokens[None, :window].to(profile.device)
for n_bits in trained_widths:
    trained = runs["qat", n_bits][0]
    with torch.no_grad():
        simulated = trained(input_ids=batch).logits
    before = tensor_bytes(trained)
    report = convert(trained)
    with torch.no_grad():
        packed = trained(input_ids=batch).logits
    off = (packed - simulated).abs().max().item()
    assert off <= 1e-4, "the packed model is not the one that was trained"
    bits["qat", n_bits] = report.bits_per_weight
    print(f"{n_bits} bits: logits differ by {off:g} at most; all tensors of the model")
    print(f"        {before / 1e6:.1f} MB -> {tensor_bytes(trained) / 1e6:.1f} MB")

stored = trained.get_submodule(layer.name).quantized_weight
print(f"{layer.name}, {list(stored.shape)} at {n_bits} bits, is stored as")
for part, tensor in stored.tensors().items():
    print(f"  {part:6} {tensor.dtype} {list(tensor.shape)}")
print(f"first codes: {stored.integer_codes()[0, :12].tolist()}")

# %% [markdown]
# The linear layers hold no float weight any more; embeddings, norms and head do, and are in the bytes on both sides.
# Where the logits differ by 0 above, they are the same bit for bit: the forward pass had used the
# step as stored, and `convert` rounds the weights by the same function.
#
# ## What it bought, and what it cost

# %%
for key, (trained, _, taken) in runs.items():
    minutes[key] = taken
    quality[key] = perplexity(trained, tokens, window=window)
for n_bits in trained_widths:
    key = "control rounded", n_bits
    rounded, report = quantized_copy(runs["control"][0], "mse", n_bits)
    bits[key] = report.bits_per_weight
    quality[key] = perplexity(rounded, tokens, window=window)
print("                        bits per weight   perplexity   seconds")
for key in ["float", "control", *sorted(bits, key=lambda k: (-k[1], k[0]))]:
    name = key if isinstance(key, str) else f"{key[1]} bits, {key[0]}"
    width = f"{bits[key]:.3f}" if key in bits else "32"
    taken = f"{60 * minutes[key]:.1f}" if key in minutes else "-"
    print(f"{name:25} {width:>13} {quality[key].perplexity:12.2f} {taken:>9}")
slower = minutes["qat", trained_widths[-1]] / minutes["control"]
print(f"The last QAT run took {slower:.2f} times as long as the control (one run each,")
print(f"torch threads {torch.get_num_threads()}, calibration losses included).")

# %%
model_name = profile.models[0]
protocol = dict(corpus="factbook", tokens=len(tokens), window=window, stride=window)
for key, result in quality.items():
    method, width = (key, 32) if isinstance(key, str) else key
    path = f"ptq_vs_qat.{model_name}.{method.replace(' ', '_')}"
    path += "" if width == 32 else f".{width}bit"
    value = result.perplexity
    tolerance = round(0.03 * value, 3)
    record(f"{path}.perplexity", value, "", tolerance, model=model_name, **protocol)
    if key in minutes:
        record(f"{path}.minutes", minutes[key], "min", model=model_name)
    if key in bits:
        record(f"{path}.bits_per_weight", bits[key], "bits", 1e-6, model=model_name)

# %%
by_bits = {}
for method in (*PTQ, "control rounded", "qat"):
    found = [(k[1], q.nats) for k, q in quality.items() if k[0] == method]
    by_bits[method] = tuple(map(list, zip(*found, strict=True)))
by_bits["float"] = (list(widths), [quality["float"].nats] * len(widths))
figure = error_against_bits({model_name: by_bits}, "nats per token")
plt.show()
print("nats = log(perplexity); the perplexities are in the table")

# %% [markdown]
# *Figure: loss in nats per token on the evaluation text against the bits of a code: a curve each for round to nearest,
# the mse range, the first step of LSQ, the rounded control, and QAT (a point, where one width alone was trained); the float model is a
# level line.*
#
# Two questions to put to the table, for each number of bits. Does QAT beat the **rounded control**, which had the same
# batches and updates, and the grid that QAT started from? And does it beat the best of the three PTQ grids? We pick that
# best one on the evaluation text itself, which favours PTQ. Two results less than 0.01 nats apart, one percent of perplexity, are
# called level: this is one seed and one text.

# %%
LEVEL = 0.01  # nats
moved = quality["control"].nats - quality["float"].nats
print(f"Training on changes the float model by {moved:+.3f} nats per token.")
for n_bits in trained_widths:
    names = (*PTQ, "control rounded", "qat")
    nats = {name: quality[name, n_bits].nats for name in names}
    best = min(PTQ, key=nats.get)
    for name in dict.fromkeys(("control rounded", "mse", best)):
        change = nats["qat"] - nats[name]
        verdict = "beats" if change < 0 else "loses to"
        if abs(change) < LEVEL:
            verdict = "is level with"
        print(f"{n_bits} bits: QAT {verdict} {name}: {change:+.3f} nats per token")
    lost = nats[best] - quality["float"].nats
    if lost < 0.05:
        verdict = "little to win back"
    elif nats["qat"] < nats[best]:
        verdict = f"QAT wins back {(nats[best] - nats['qat']) / lost:.0%} of it"
    else:
        verdict = "so few updates have not made that up"
    print(f"   The best PTQ, {best}, loses {lost:.3f} to the float model:")
    print(f"   {verdict}.")

# %% [markdown]
# ### What moved, and what the learned step adds
#
# How far did the weights go? At the lowest width we compare the codes of the QAT model with those that it started from,
# and then train once more with the steps **frozen**: the straight-through estimator alone, without LSQ.

# %%
n_bits = trained_widths[-1]
start, _ = quantized_copy(model, "mse", n_bits)
same = total = 0
change = []
for name, module in start.named_modules():
    if hasattr(module, "quantized_weight"):
        a = module.quantized_weight
        b = runs["qat", n_bits][0].get_submodule(name).quantized_weight
        same += (a.integer_codes() == b.integer_codes()).sum().item()
        total += a.integer_codes().numel()
        change.append((b.scale.float() / a.scale.float()).log().abs().flatten())
print(f"{n_bits} bits: {1 - same / total:.1%} of {total:,} codes are other ones;")
reach = sum(CONFIG.lr_at(i) for i in range(CONFIG.steps))
print(f"steps changed by {torch.cat(change).mean():.2%} on average; all updates")
print(f"of the learning rate in one direction would make {reach:.2%}")

# %%
frozen, _, _ = train_copy(n_bits, learn_steps=False)
convert(frozen)
without = perplexity(frozen, tokens, window=window).nats
start, both = quality["mse", n_bits].nats, quality["qat", n_bits].nats
print(f"{n_bits} bits, nats per token won over the grid at the start:")
print(f"  steps frozen  {start - without:+.4f}")
print(f"  steps learned {start - both:+.4f}")
if abs(without - both) < 0.2 * (start - both):
    print("Most of it comes from the weights; the steps add or take little.")

# %% [markdown]
# The two runs differ in nothing but the steps. LSQ's authors train on the whole of ImageNet, with quantized
# activations as well [@esser2019lsq]: with more updates a step can go further, and it has more to do.
#
# ## Limits
#
# - **One seed, few updates.** This shows the mechanism, not what QAT can reach, and a difference of a few thousandths of
#   a nat may turn round with another seed.
# - **An equal learning rate is not each run's best.** One rate, set after a few trials on the calibration text, serves all
#   runs. A model that has converged may be harmed by it: a smaller one might spare the control, a larger one suit two bits.
# - **An easy opponent.** The three PTQ grids look at weights alone, with one step a row. Groups with a step each, and
#   methods that look at a layer's inputs, are made to lose less.
# - **One start.** All QAT runs start from the mse grid, also where the table shows a better one.
# - **The training text was there.** For most published models it is not, and fine-tuning on other text shifts the model.
#   PTQ has no such problem.
# - **Memory.** QAT keeps a float weight, a gradient and AdamW's two moments for every weight: exercise 4 adds
#   it up. PTQ needs one layer at a time.
# - **Weights only.** Embedding and head stay float, and so do activations; quantized activations are
#   trained by the same two functions.

# %% [markdown]
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: sign, straight through
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# A one-bit weight is $+1$ or $-1$. The sign has no useful gradient either. Write it with a straight-through gradient that
# is 1 where $|w| \le 1$ and 0 elsewhere, so that weights that have made up their mind stop moving. The sign of 0 is $+1$.


# %% tags=["exercise"]
def binarize(w):
    """+1 or -1 for each entry of `w`, with gradient 1 where |w| <= 1, else 0.

    Approach: build the value without a gradient, and give it that of a clamped w.
    Example: [-2.0, -0.5, 0.0] gives [-1, -1, 1], gradient [0, 1, 1].
    Hint: value.detach() + (surrogate - surrogate.detach()); torch.clamp passes
    gradients at its ends.
    """
    ### BEGIN SOLUTION
    value = torch.where(w >= 0, 1.0, -1.0)
    surrogate = w.clamp(-1, 1)
    return value + (surrogate - surrogate.detach())
    ### END SOLUTION


# %% tags=["exercise-tests"]
probe = torch.tensor([-2.0, -0.5, 0.0, 0.7, 1.5], requires_grad=True)
signs = binarize(probe)
assert signs.tolist() == [-1, -1, 1, 1, 1], "the sign of 0 is +1: torch.sign gives 0"
(slopes,) = torch.autograd.grad(signs.sum(), probe)
assert slopes.any(), "no gradient at all: did you detach the surrogate, too?"
assert slopes.tolist() == [0, 1, 1, 1, 0], "clamp the surrogate to [-1, 1]"
### BEGIN HIDDEN TESTS
edge = torch.tensor([-1.0, 1.0], requires_grad=True)
(slopes,) = torch.autograd.grad(binarize(edge) @ torch.tensor([2.0, 3.0]), edge)
assert slopes.tolist() == [2, 3]
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the step that equation 3 asks for
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Leave the weights as they are, take $\lVert W - Q_S(W) \rVert^2$ as the loss, and find the step by gradient descent
# with equation 3. Write the gradient by hand, without autograd.


# %% tags=["exercise"]
def fit_step(w, start, low, high, updates=200, rate=0.1):
    """The step after `updates` of S <- S - rate * g, g the mean gradient over `w`.

    Approach: with value v = S clamp(round(w / S), low, high), the loss of a weight is
    (v - w)^2, so g = mean of 2 (v - w) dv/dS, with dv/dS of equation 3.
    Example: weights that lie on a grid of step 0.5 keep start=0.5.
    Hint: torch.where, twice.
    """
    ### BEGIN SOLUTION
    step = start
    for _ in range(updates):
        ratio = w / step
        slope = torch.where(ratio <= low, float(low), ratio.round() - ratio)
        slope = torch.where(ratio >= high, float(high), slope)
        error = step * ratio.round().clamp(low, high) - w
        step = step - rate * (2 * error * slope).mean().item()
    return step
    ### END SOLUTION


# %% tags=["exercise-tests"]
on_grid = torch.tensor([-1.0, -0.5, 0.0, 0.5])
assert fit_step(on_grid, 0.5, -2, 1) == 0.5, "no error, no gradient: S stays"
normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))


def squared_error(step):
    back = (normal / step).round().clamp(-4, 3) * step
    return (back - normal).square().mean().item()


fitted = fit_step(normal, 1.5, -4, 3)
assert squared_error(fitted) < 0.5 * squared_error(1.5), "follow minus the gradient"
best = min(range(20, 150), key=lambda i: squared_error(i / 100)) / 100
print(f"fitted step {fitted:.3f}, best of a search {best:.2f}")
assert abs(fitted - best) < 0.1, "is the sign of the clipped part right?"
### BEGIN HIDDEN TESTS
assert abs(fit_step(normal, 0.2, -4, 3) - best) < 0.1
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: who needs a gradient scale?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# LSQ divides the gradient of a step by $\sqrt{n h}$. Find out what this does to the first update of two optimizers.


# %% tags=["exercise"]
def first_update(optimizer_type, gradient, factor):
    """How far a parameter at 1.0 moves in its first update, with lr 0.01, no decay.

    `optimizer_type` is torch.optim.SGD or torch.optim.AdamW; the gradient is `factor`
    times `gradient`.
    Approach: make a parameter, set its .grad, step once, and return the distance.
    Example: SGD with gradient 2.0 and factor 0.5 moves it by 0.01.
    Hint: weight_decay=0.0 for both.
    """
    ### BEGIN SOLUTION
    parameter = nn.Parameter(torch.tensor(1.0))
    optimizer = optimizer_type([parameter], lr=0.01, weight_decay=0.0)
    parameter.grad = torch.tensor(factor * gradient)
    optimizer.step()
    return abs(parameter.item() - 1.0)
    ### END SOLUTION


# %% tags=["exercise-tests"]
sgd = [first_update(torch.optim.SGD, 3.0, f) for f in (1.0, 0.01)]
adamw = [first_update(torch.optim.AdamW, 3.0, f) for f in (1.0, 0.01)]
print(f"SGD   {sgd[0]:.4f} and {sgd[1]:.4f}\nAdamW {adamw[0]:.4f} and {adamw[1]:.4f}")
assert abs(sgd[0] - 0.03) < 1e-6, "SGD moves by lr times the gradient"
assert abs(sgd[0] / sgd[1] - 100) < 0.1, "the factor belongs to the gradient"
assert abs(adamw[0] - adamw[1]) < 1e-6, "AdamW divides by the gradient's own size"
### BEGIN HIDDEN TESTS
assert abs(first_update(torch.optim.AdamW, -5.0, 1.0) - 0.01) < 1e-6
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: the memory of the two flavours
# *Difficulty 1/5 · 5 minutes · 1 point · no GPU*
#
# QAT with AdamW holds four float32 numbers for each weight (the weight, its gradient, two moments) and for each step. PTQ holds
# the float32 weights of one layer and the packed result of all. How many bytes is that?


# %% tags=["exercise"]
def training_and_ptq_bytes(layers, n_bits):
    """(QAT, PTQ) bytes for `layers`, a list of (out, in), with a float16 step a row.

    Approach: QAT counts weights and steps four times in float32. PTQ counts the
    largest layer in float32, and of every layer the codes (each row filled up to whole
    bytes) and the steps.
    Example: one layer (4, 8) at 2 bits: QAT 576 bytes, PTQ 128 + 8 + 8 = 144 bytes.
    Hint: -(-a // b) rounds up.
    """
    ### BEGIN SOLUTION
    trained = sum(out * columns + out for out, columns in layers)
    stored = sum(out * (-(-columns * n_bits // 8) + 2) for out, columns in layers)
    return 16 * trained, 4 * max(out * columns for out, columns in layers) + stored
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert training_and_ptq_bytes([(4, 8)], 2) == (576, 144), "four float32 for each number"
qat_bytes, ptq_bytes = training_and_ptq_bytes([(768, 256), (256, 1024)], 3)
assert ptq_bytes == 4 * 256 * 1024 + 768 * 98 + 256 * 386, "the largest layer, once"
print(f"QAT needs {qat_bytes / ptq_bytes:.0f} times the memory of PTQ for two layers")
### BEGIN HIDDEN TESTS
assert training_and_ptq_bytes([(2, 3)], 3) == (128, 24 + 2 * (2 + 2))
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - Y. Bengio, N. Léonard, A. Courville, *Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
#   Computation*, 2013, arXiv 1308.3432 [@bengio2013ste].
# - S. K. Esser, J. L. McKinstry, D. Bablani, R. Appuswamy, D. S. Modha, *Learned Step Size Quantization*, ICLR 2020,
#   arXiv 1902.08153 [@esser2019lsq].
# - B. Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR
#   2018, arXiv 1712.05877 [@jacob2017integer]: fake quantization in training, as most frameworks have it.
# - The model: course-lm, trained by this project on public-domain text, see its model card.
#
# ## Next
#
# `packed_kernels`: how the packed codes are laid out in bytes, and how to multiply with them.

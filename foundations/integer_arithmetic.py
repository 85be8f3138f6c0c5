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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/integer_arithmetic.ipynb)
#
# # Integer arithmetic: a linear layer without floats
#
# *Large Model Quantization: a deep dive. Foundations, a companion to linear_mapping.*

# %% [markdown]
# `linear_mapping` stores weights as integers; to compute, it turns them into floats again. This notebook leaves
# them integers. When you have worked through it you will be able to
#
# - multiply two matrices of 8-bit codes, and correct the sums for their zero points;
# - turn a 32-bit sum into an 8-bit code without a float: a fixed-point multiplier and a shift;
# - run a layer of a real language model from codes to codes, and check it against PyTorch;
# - say which of the three roundings, of weights, inputs or outputs, costs how much.
#
# It takes about 45 minutes to read and work. You need to know what a scale and a zero point are
# (`linear_mapping`) and what a linear layer computes. No profile needs a GPU; `quick` runs in half a minute, `cpu` in
# a few minutes.

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
import warnings

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.grids.uniform import (
    code_range,
    dequantize,
    quantize,
    scale_and_zero_point,
)
from course_utils.kernels import fixed_point, int8_matmul_zero_points
from course_utils.models import linear_layers
from course_utils.plotting import error_against_bits
from course_utils.profiles import resolve
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or the name of one model
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# A linear layer computes $y = x W^\top + b$, with inputs `x` `[tokens, in]` and weights `W` `[out, in]`. Quantized, each
# matrix is a matrix of integer codes $q$ with a scale $S$, the step between two neighbouring values, and a zero point $Z$, the code of
# the real number 0: $r = S\,(q - Z)$. Circuits that multiply 8-bit integers are smaller and take less energy than those for
# floats, and some microcontrollers have no float unit at all. Can such a machine compute the layer from
# the codes of $x$ to the codes of $y$?
#
# We want the error of the output, $\sum (y - \hat y)^2$, small in proportion to $\sum y^2$. In decibels that is
# the **SQNR**, $10 \log_{10} (\sum y^2 / \sum (y - \hat y)^2)$: 20 dB is an error power of one percent.
#
# ## The product, by hand
#
# Let $x$ have $S_x, Z_x$ and $W$ have $S_W, Z_W$. An entry of $x W^\top$ is
#
# $$ S_x S_W \sum_{k=1}^{n} (q^x_{ik} - Z_x)(q^W_{jk} - Z_W), $$
#
# where $n$ is the number of input features. The sum holds integers only. To subtract the zero points first would need a ninth bit, since
# differences of 8-bit codes run from -255 to 255. Multiply out instead:
#
# $$ \sum_k q^x_{ik} q^W_{jk} \;-\; Z_W \sum_k q^x_{ik} \;-\; Z_x \sum_k q^W_{jk} \;+\; n\, Z_x Z_W . $$
#
# The first is a plain product of 8-bit codes; the others are one number a row of $x$, one a row of $W$ (known before any input
# is), and a constant [@jacob2017integer]. Take $S_x = 0.5$, $Z_x = 1$, $S_W = 0.25$, $Z_W = 2$:

# %% tags=["nbval-check-output"]
x_codes = torch.tensor([[3, 5, 1]])  # x = 1, 2, 0
W_codes = torch.tensor([[6, 0, 4], [2, 3, 2]])  # [out=2, in=3]
raw = x_codes @ W_codes.T
of_x = 2 * x_codes.sum(1, keepdim=True)  # Z_W times the sums of x's rows
of_W = 1 * W_codes.sum(1)  # Z_x times the sums of W's rows
total = raw - of_x - of_W + 3 * 1 * 2
print("raw product:", raw.tolist(), " - ", of_x.tolist(), " - ", of_W.tolist(), " + 6")
print("total:      ", total.tolist(), " times S_x S_W:", (total * 0.5 * 0.25).tolist())
x, W = 0.5 * (x_codes - 1), 0.25 * (W_codes - 2)
print("in floats:                  ", (x @ W.T).tolist())

# %% [markdown]
# **How wide must the sums be?** One product of codes has a magnitude of up to $128 \cdot 128 = 2^{14}$, and 16 bits
# do not hold the sum of two of that size. Hardware adds into 32 bits, which hold 131,071 of them: more inputs than any layer here has. The
# **bias** $b$ joins for nothing if it is stored in the unit of the sums: $q^b = \mathrm{round}(b / (S_x S_W))$, an int32 with
# zero point 0 [@jacob2017integer].
#
# ## A real layer
#
# The weights are known; the inputs are not. Their range, and that of the outputs, has to be guessed before the first
# input arrives, and so it is measured on other text, the *calibration* text. We take a layer from the middle of the model,
# one range from minimum to maximum for each matrix, and signed 8-bit codes.


# %%
@torch.no_grad()
def layer_input(model, module, tokens):
    """Input `[tokens, in]` of one linear layer."""
    kept = []
    hook = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(input_ids=tokens.to(model.device))
    hook.remove()
    return kept[0].flatten(0, -2).float().cpu()


models = profile.load_models()
first, (model, tokenizer) = next(iter(models.items()))
layers = linear_layers(model)
layer = layers[len(layers) // 2]
W = layer.weight.float().cpu()  # [out, in]
b = torch.zeros(len(W)) if layer.bias is None else layer.bias.detach().float().cpu()
tokens = calibration_tokens(tokenizer, 4, 256, seed=profile.seed)
x_seen = layer_input(model, layer.module, tokens)
x = layer_input(model, layer.module, evaluation_tokens(tokenizer, 256)[None])
y, y_seen = x @ W.T + b, x_seen @ W.T + b
print(f"{first}, {layer.name}: W {list(W.shape)}, x {list(x.shape)}, y {list(y.shape)}")
print(f"calibration: {len(x_seen):,} tokens, x from {x_seen.min():.2f} to", end=" ")
print(f"{x_seen.max():.2f}; the test's x from {x.min():.2f} to {x.max():.2f}")

# %%
low, high = code_range(8, signed=True)
grids = {
    name: scale_and_zero_point(r.min(), r.max(), low, high, symmetric=False)
    for name, r in {"x": x_seen, "W": W, "y": y_seen}.items()
}
for name, (S, Z) in grids.items():
    print(f"{name}: S = {S:.6f}, Z = {Z}")
(S_x, Z_x), (S_W, Z_W), (S_y, Z_y) = grids.values()
x_codes = quantize(x, S_x, Z_x, low, high).long()
W_codes = quantize(W, S_W, Z_W, low, high).long()
b_codes = torch.round(b / (S_x * S_W)).long()


# %%
def sqnr(r, back):
    """Signal over quantization noise in decibels."""
    noise = (r - back).square().sum().item()
    return 10 * math.log10(r.square().sum().item() / noise) if noise else math.inf


raw = x_codes @ W_codes.T  # int64 here; the values fit into int32
total = raw - Z_W * x_codes.sum(1, keepdim=True) - Z_x * W_codes.sum(1)
total += W.shape[1] * Z_x * Z_W + b_codes
bits = int(total.abs().max()).bit_length() + 1
print(f"sums from {total.min():,} to {total.max():,}: {bits} bits with the sign")
same = dequantize(x_codes, S_x, Z_x) @ dequantize(W_codes, S_W, Z_W).T + b
off = (S_x * S_W * total - same).abs().max() / y.abs().max()
print(
    f"against the float product of the same codes: at most {off:.0e} of max |y| apart"
)
print(f"against the float layer: {sqnr(y, S_x * S_W * total):.1f} dB")
print(f"without the corrections: {sqnr(y, S_x * S_W * (raw + b_codes)):.1f} dB")

# %% [markdown]
# The integer form is no approximation: it is the float product of the dequantized matrices, up to the rounding of floats and of
# the bias. What is lost is lost in the codes. The last line is a control: what comes out when the corrections are
# forgotten.
#
# ## Back to eight bits: requantization
#
# `total` is a 32-bit number; the next layer wants an 8-bit code. With $S_y, Z_y$ for the output, and `clamp` to keep
# the result between the lowest and the highest code,
#
# $$ q^y = \mathrm{clamp}\big(\mathrm{round}(M \cdot \mathrm{total}) + Z_y\big), \qquad M = \frac{S_x S_W}{S_y}. $$
#
# $M$ is a real number, the only one left, and it is known before any input. Write it as $M = 2^{-s} M_0$ with $M_0$ between one
# half and one. Then store $m = \mathrm{round}(2^{31} M_0)$, an int32, and the shift $s$:
#
# $$ M \cdot \mathrm{total} \;\approx\; \frac{m \cdot \mathrm{total}}{2^{31}} \cdot 2^{-s} . $$
#
# That is one integer multiplication, of which the upper half is kept, and one right shift, both rounding [@jacob2017integer]. The library
# gemmlowp does it so [@gemmlowp]. An integer shifted right by $s$ bits is divided by $2^s$ and rounded down; to round to the nearest, add
# half of $2^s$ before.


# %% tags=["nbval-check-output"]
def to_fixed_point(M):
    """(m, s): M is about m * 2^-31 * 2^-s, m in [2^30, 2^31); 0 < M < 1."""
    M_0, exponent = math.frexp(M)  # M = M_0 * 2^exponent, M_0 in [0.5, 1)
    m = round(M_0 * 2**31)
    return (m, -exponent) if m < 2**31 else (2**30, -exponent - 1)


def times_fixed_point(total, m, s):
    """round(M * total) by integers alone; `total` int64."""
    upper = (total * m + 2**30) >> 31  # 2^30 is half of 2^31
    half = 2**s >> 1
    return upper.sign() * ((upper.abs() + half) >> s)  # a tie goes away from zero


m, s = to_fixed_point(0.3)
print(f"0.3 = 0.6 * 2^-1: m = round(0.6 * 2^31) = {m}, s = {s}")
sums = torch.tensor([-1000, -7, -1, 1, 2, 4, 1000])
print("sums:            ", sums.tolist())
print("by integers:     ", times_fixed_point(sums, m, s).tolist())
print("exactly, rounded:", [round(0.3 * total) for total in sums.tolist()])

# %% [markdown]
# Look at the sum 1. Exactly, 0.3 rounds to 0. In integers 0.6 is rounded to 1 first, and then the half of it, a tie, to 1 again: the
# price of rounding **twice**. The first rounding moves the result by at most $2^{-(s + 1)}$, so that only sums so close to a
# tie can end on the other side. With the shift of 1 here that is a quarter; a real layer's shift is usually larger.
#
# Now the layer is complete: all constants are integers, and so is every step between the codes that come in and those that go out.


# %%
def integer_linear(x_codes):
    """Codes of y `[tokens, out]` from codes of x `[tokens, in]`."""
    total = x_codes @ W_codes.T
    total = total - Z_W * x_codes.sum(1, keepdim=True) + constant
    return (times_fixed_point(total, m, s) + Z_y).clamp(low, high)


constant = b_codes - Z_x * W_codes.sum(1) + W.shape[1] * Z_x * Z_W  # [out]
M = S_x.item() * S_W.item() / S_y.item()
m, s = to_fixed_point(M)
y_codes = integer_linear(x_codes)
print(f"M = {M:.9f}: m = {m}, s = {s}, off by {abs(m / 2 ** (31 + s) / M - 1):.0e}")
for t in (x_codes, W_codes, Z_x, Z_W, constant, y_codes):
    assert not t.is_floating_point()
by_float = (torch.round(total.double() * M) + Z_y).clamp(low, high)
differ = (y_codes - by_float).abs()
print(
    f"codes that differ from rounding M * total once, in float64: {int(differ.sum())}"
)
print(f"of {differ.numel():,}, by at most {int(differ.max())}")
outside = (y < y_seen.min()) | (y > y_seen.max())
print(f"outputs outside the range from calibration: {int(outside.sum())}")
back = dequantize(y_codes, S_y, Z_y)
print(f"SQNR of the sums {sqnr(y, S_x * S_W * total):.1f} dB, of the codes", end=" ")
print(f"{sqnr(y, back):.1f} dB")

# %% [markdown]
# The codes that differ, if any do, were rounded twice. The second price of codes as output is in the last line, their own
# rounding error, and the third is clipping: outputs larger than any that calibration saw.
#
# ## Is it right? The package and PyTorch
#
# The package computes the same in `int8_matmul_zero_points` and `requantize`; codes have to be equal, not close. PyTorch's int8
# layer takes unsigned inputs and symmetric weights, so it gets those. It multiplies integers too, but its last step is a
# float multiplication, and its kernel depends on the processor: there we count the codes that differ.

# %%
sums = int8_matmul_zero_points(x_codes.to(torch.int8), Z_x, W_codes.to(torch.int8), Z_W)
assert torch.equal(sums + b_codes, total)
assert fixed_point.quantize_multiplier(M) == (m, s)
again = fixed_point.requantize(total.int(), m, s, Z_y, low, high)
assert torch.equal(again.long(), y_codes)
print(f"the package: {again.numel():,} codes, all equal")

# %%
S_sym, _ = scale_and_zero_point(W.min(), W.max(), -127, 127, symmetric=True)
engine = torch.backends.quantized.engine
if not hasattr(torch, "quantize_per_tensor") or engine == "none":
    print("this PyTorch has no int8 layer")  # it announces that it will go
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their_W = torch.quantize_per_tensor(W, S_sym.item(), 0, torch.qint8)
        x_on_grid = dequantize(x_codes, S_x, Z_x)
        their_x = torch.quantize_per_tensor(
            x_on_grid, S_x.item(), Z_x.item() + 128, torch.quint8
        )
        packed = torch.ops.quantized.linear_prepack(their_W, b)
        grid_y = S_y.item(), Z_y.item() + 128
        theirs = torch.ops.quantized.linear(their_x, packed, *grid_y).int_repr() - 128.0
    sums = (x_codes - Z_x) @ their_W.int_repr().long().T
    sums = (sums + torch.round(b / (S_x * S_sym))).int()
    fixed = fixed_point.quantize_multiplier((S_x * S_sym / S_y).item())
    ours = fixed_point.requantize(sums, *fixed, Z_y, low, high)
    differ = (ours - theirs).abs()
    print(
        f"PyTorch: {int((differ > 0).sum())} of {differ.numel():,} codes differ,",
        end=" ",
    )
    print(f"by at most {int(differ.max())}")

# %% [markdown]
# ## Which rounding costs how much?
#
# Three things are rounded: weights, inputs, outputs. We add them one after the other, for 4 to 8 bits, once with one scale for
# all of $W$ and once with one a row. A scale a *row* stays outside the sum over $k$: $S_W$, and with it $M$, becomes one number for each
# output, and nothing else changes. A scale for each *group of columns* would stand inside: one integer sum a group, to be scaled before they are added.
# Here the rounding is simulated in floats, from which the integer layer differs in codes near a tie only.


# %%
def round_trip(r, minimum, maximum, n_bits):
    """`r` on a grid of `n_bits` over the range from minimum to maximum."""
    ends = code_range(n_bits, signed=True)
    S, Z = scale_and_zero_point(minimum, maximum, *ends, symmetric=False)
    return dequantize(quantize(r, S, Z, *ends), S, Z)


panels, widths = {}, [4, 5, 6, 7, 8]
for title, W_ends in {
    "one scale for W": W.aminmax(),
    "one scale a row of W": W.aminmax(dim=1, keepdim=True),
}.items():
    print(f"{title}: SQNR in dB")
    print("            weights    + inputs   + outputs")
    found = {"weights": [], "+ inputs": [], "+ outputs": []}
    for n_bits in widths:
        W_hat = round_trip(W, *W_ends, n_bits)
        x_hat = round_trip(x, *x_seen.aminmax(), n_bits)
        stages = [x @ W_hat.T + b, x_hat @ W_hat.T + b]
        stages.append(round_trip(stages[1], *y_seen.aminmax(), n_bits))
        for values, y_hat in zip(found.values(), stages, strict=True):
            values.append(sqnr(y, y_hat))
        print(f"{n_bits} bits" + "".join(f"{v[-1]:12.1f}" for v in found.values()))
    panels[title] = {name: (widths, values) for name, values in found.items()}

# %%
figure = error_against_bits(panels, "SQNR of the output (dB)")
plt.show()
for name, (_, values) in panels["one scale a row of W"].items():
    gain = values[-1] - panels["one scale for W"][name][1][-1]
    print(f"8 bits, {name}: {gain:+.1f} dB by a scale a row")

# %% [markdown]
# *Figure: SQNR of the layer's output against bits per code, with one scale for the weights left and one a row right. Three
# curves each: weights rounded, weights and inputs, and outputs as well.*
#
# Where two neighbouring curves of a panel lie together, the step between them costs little, since errors that are independent add as
# powers: the largest decides. A finer scale for the weights helps the lower curves only as far as the weights are the bottleneck.
#
# ## A whole model
#
# The method `affine` of the package rounds the weights of every linear layer, here with a scale a row, and on request its inputs: then
# it multiplies integers, as above. It leaves the *outputs* in float; embeddings, attention and norms stay in float too. We measure bits per weight and **perplexity**: e to the mean
# negative log probability of a token, about the number of tokens among which the model hesitates. Inputs stay float, or
# get a grid for each token (`per_token`: exact ranges, but only known at run time), or one from calibration (`static`, as above).

# %%
for name, (model, tokenizer) in models.items():
    window = min(512, model.config.max_position_embeddings)
    tokens = evaluation_tokens(tokenizer, profile.pick(quick=2048, cpu=2048, gpu=8192))
    seen = calibration_tokens(tokenizer, 4, 256, seed=profile.seed)
    reference = perplexity(model, tokens, window=window)
    by = {"model": name, "corpus": "factbook", "tokens": len(tokens), "window": window}
    print(f"{name}, float: perplexity {reference}")
    for inputs in ("float", "per_token", "static"):
        method = get_method("affine", n_bits=8, group_size="row", inputs=inputs)
        quantized = copy.deepcopy(model)
        report = quantize_model(quantized, method, calibration=seen)
        ppl = perplexity(quantized, tokens, window=window).perplexity
        print(
            f"  inputs {inputs:9} {report.bits_per_weight:.3f} bits per weight,",
            end=" ",
        )
        print(f"perplexity {ppl:.2f} ({ppl / reference.perplexity - 1:+.1%})")
        key = f"integer_arithmetic.{name}.{inputs}.perplexity"
        record(key, ppl, "", max(0.05, 0.02 * ppl), **by)

# %% [markdown]
# Compare the last two lines of a model. Where `static` is much worse, a few values are so large that one range for all tokens makes
# the step too wide for the rest: `dynamic_range` is about that. Where it is not, constants will do for the inputs.
#
# ## Limits
#
# - The product is exact here, but it is not fast: PyTorch's int64 product and the package's, which adds pieces in float32, simulate
#   what int8 hardware does. Nothing about time follows from this notebook.
# - Softmax, norms and activation functions like GELU need integer forms of their own; only ReLU comes for nothing (exercise 1).
# - A fixed range clips what calibration did not see, silently.
# - At four bits and fewer, weights want a scale for each group, which breaks the integer sum into pieces; many methods for
#   language models therefore keep inputs in float, and decode the weights.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: a ReLU for nothing
# *Difficulty 2/5 · 10 minutes · 1 point · no GPU*
#
# A ReLU often follows the layer. It needs no operation of its own: which codes must the clamp let through, so that
# no negative number comes out?


# %% tags=["exercise"]
def relu_range(Z_y, low, high):
    """(lowest, highest) code for the clamp of a layer with a ReLU after it.

    Approach: which code stands for the real number 0?
    Example: Z_y = -100 with codes from -128 to 127 gives (-100, 127).
    Hint: Z_y itself lies from low to high, since the range holds 0.
    """
    ### BEGIN SOLUTION
    return Z_y, high
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert relu_range(-100, -128, 127)[0] == -100, "the code of 0 is the zero point"
assert relu_range(-100, -128, 127)[1] == 127, "large values are kept"
assert relu_range(-128, -128, 127) == (-128, 127), "nothing below 0 has a code here"
### BEGIN HIDDEN TESTS
probe = torch.arange(-5000, 5000, dtype=torch.int32)
fixed = fixed_point.quantize_multiplier(0.0371)
with_relu = fixed_point.requantize(probe, *fixed, 20, *relu_range(20, -128, 127))
without = fixed_point.requantize(probe, *fixed, 20, -128, 127)
assert torch.equal(with_relu - 20, (without - 20).relu())
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: what can be known before the input
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Weights are quantized symmetrically ($Z_W = 0$), inputs asymmetrically. Then the only correction left does not depend on the
# input's codes, and a runtime adds it to the bias once, when the model is loaded. Compute that bias.


# %% tags=["exercise"]
def folded_bias(W_codes, bias_codes, Z_x):
    """int32 `[out]`; `x_codes @ W_codes.T` plus this is the corrected sum.

    `W_codes` `[out, in]` with zero point 0; `bias_codes` `[out]` in units of S_x S_W.
    Approach: multiply out sum_k (q_x - Z_x) q_W, and see what holds no q_x.
    Example: W_codes [[1, 2]], bias_codes [10], Z_x = 3 gives [1].
    Hint: int8 codes have to be summed in a wider type.
    """
    ### BEGIN SOLUTION
    return (bias_codes.long() - Z_x * W_codes.long().sum(1)).int()
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = folded_bias(torch.tensor([[1, 2]]), torch.tensor([10]), 3)
assert found.tolist() == [1], "10 - 3 * (1 + 2) = 1: the correction is subtracted"
many = torch.full((1, 1000), 100, dtype=torch.int8)
found = folded_bias(many, torch.tensor([0]), -5)
assert found.tolist() == [500_000], "sum in a wider type than int8"
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(0)
q_x = torch.randint(-128, 128, (4, 50), generator=draw)
q_W = torch.randint(-127, 128, (6, 50), generator=draw)
q_b = torch.randint(-1000, 1000, (6,), generator=draw)
want = (q_x - 17) @ q_W.T + q_b
assert torch.equal(q_x @ q_W.T + folded_bias(q_W, q_b, 17), want)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: how wide must the multiplier be?
# *Difficulty 4/5 · 20 minutes · 3 points · no GPU*
#
# A 31-bit multiplier needs a 64-bit product. How few bits would do? Write the fixed-point form for any width, and see
# what it does to the codes.


# %% tags=["exercise"]
def fixed_point_of_width(M, width):
    """(m, shift) with M about m * 2^-shift and m an integer in [2^(width-1), 2^width).

    Approach: math.frexp gives M = fraction * 2^exponent with fraction in [0.5, 1).
    Example: 0.375 at width 4 gives (12, 5), since 12 / 32 = 0.375.
    Hint: rounding may give m = 2^width: halve it then, and correct the shift.
    """
    ### BEGIN SOLUTION
    fraction, exponent = math.frexp(M)
    m, shift = round(fraction * 2**width), width - exponent
    return (m, shift) if m < 2**width else (m // 2, shift - 1)
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert fixed_point_of_width(0.375, 4) == (12, 5), "0.375 = 0.75 / 2 = 12 / 16 / 2"
assert fixed_point_of_width(0.99999, 4) == (8, 3), "m = 16 does not fit into 4 bits"
sums = torch.arange(-40_000, 40_000)
print("width   relative error of M   codes that differ from exact rounding")
for width in (31, 15, 7):
    m, shift = fixed_point_of_width(0.00312345, width)
    ours = (sums * m + 2 ** (shift - 1)) >> shift
    differ = (ours != torch.round(sums.double() * 0.00312345)).double().mean()
    print(f"{width:5} {abs(m / 2**shift / 0.00312345 - 1):17.0e} {differ:27.2%}")
### BEGIN HIDDEN TESTS
for M in (0.5, 0.7, 1e-3, 3e-5):
    for width in (8, 15, 31):
        m, shift = fixed_point_of_width(M, width)
        assert 2 ** (width - 1) <= m < 2**width
        assert abs(m / 2**shift / M - 1) <= 2.0**-width
m, shift = fixed_point.quantize_multiplier(0.3)
assert fixed_point_of_width(0.3, 31) == (m, shift + 31)
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam, D. Kalenichenko, *Quantization and Training of
#   Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR 2018, arXiv 1712.05877 [@jacob2017integer].
# - gemmlowp, *Building a quantization paradigm from first principles* [@gemmlowp].
# - The models: course-lm (trained by this project, see its model card), SmolLM2 [@allal2025smollm2], GPT-2
#   [@radford2019gpt2].
#
# ## Next
#
# `dynamic_range`: where to put the ends of the range, of weights and of inputs.

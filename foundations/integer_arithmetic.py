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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/integer_arithmetic.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/foundations/integer_arithmetic.ipynb)
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
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import transformers

# %%
from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import (
    compare_all,
    continuations,
    difference,
    format_difference,
    prompt_of,
)
from course_utils.evaluation.estimate import over_units, with_error
from course_utils.grids.uniform import (
    code_range,
    dequantize,
    quantize,
    scale_and_zero_point,
)
from course_utils.models import linear_layers

# %%
from course_utils.plotting import table
from course_utils.plotting.diagrams import integer_data_flow
from course_utils.plotting.noise import noise_by_source
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
# Here is the way of one output, which this notebook builds step by step.

# %%
from course_utils.kernels import fixed_point

x_codes = torch.tensor([90, -35, 7, 120], dtype=torch.int8)
w_codes = torch.tensor([-12, 55, 101, 64], dtype=torch.int8)
multiplier, shift = fixed_point.quantize_multiplier(0.0123)
figure = integer_data_flow(x_codes, w_codes, multiplier, shift, zero_point=10)
plt.show()

# %% [markdown]
# *Figure: codes of inputs and weights, 8 bits each, are multiplied and summed in 32 bits. An integer multiplier and a shift bring the sum back to 8 bits.*
#
# Every box holds integers. The factor 0.0123 stands in the picture as a 32-bit integer and a number of bits to shift.
#
# We want the error of the output small in proportion to $\sum y^2$. In decibels that is
# the **SQNR**, $10 \log_{10} (\sum y^2 / \sum (y - \hat y)^2)$: at 20 dB the error has one percent of the power.
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
print("raw product:", raw.tolist(), "-", of_x.tolist(), "-", of_W.tolist(), "+ 6")
print("total:      ", total.tolist(), " times S_x S_W:", (total * 0.5 * 0.25).tolist())
x, W = 0.5 * (x_codes - 1), 0.25 * (W_codes - 2)
print("in floats:                  ", (x @ W.T).tolist())

# %% [markdown]
# The total, times the two scales, is the float product. The raw product alone is far from it.
#
# **How wide must the sums be?** A product of two codes has a magnitude of up to $128 \cdot 128$, and 16 bits do not hold the sum of two such products. Hardware adds into 32 bits. The corrected sum is made of differences, of up to $255 \cdot 255$ each.

# %% tags=["nbval-check-output"]
for title, largest in (("raw product", 128 * 128), ("corrected sum", 255 * 255)):
    print(f"{title}: 32 bits surely hold {(2**31 - 1) // largest:,} terms")

# %% [markdown]
# The second number is the guarantee for any zero points. It is more than the inputs of any layer here. The
# **bias** $b$ joins for nothing if it is stored in the unit of the sums: $q^b = \mathrm{round}(b / (S_x S_W))$, an int32 with
# zero point 0 [@jacob2017integer].
#
# ## A real layer
#
# The weights are known; the inputs are not. Their range, and that of the outputs, has to be guessed before the first
# input arrives, and so it is measured on other text, the **calibration** text. We take a layer from the middle of the model,
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


# %%
models = profile.load_models()
texts = {
    name: replace(profile.protocol(model), tokens=2048).text(tokenizer)
    for name, (model, tokenizer) in models.items()
}


# %%
def middle_layer(name):
    """(layer, W, b, x of the calibration text, x of the evaluation text)."""
    model, tokenizer = models[name]
    layer = linear_layers(model)[len(linear_layers(model)) // 2]
    W, b = layer.weight.float().cpu(), layer.bias  # [out, in], [out]
    b = torch.zeros(len(W)) if b is None else b.detach().float().cpu()
    seen = calibration_tokens(tokenizer, 4, 256, seed=profile.seed)
    windows = texts[name].tokens.view(-1, texts[name].window)
    inputs = [layer_input(model, layer.module, t) for t in (seen, windows)]
    return layer, W, b, *inputs


# %%
first = next(iter(models))
layer, W, b, x_seen, x = middle_layer(first)
y, y_seen = x @ W.T + b, x_seen @ W.T + b
print(f"{first}, {layer.name}: W {list(W.shape)}, x {list(x.shape)}, y {list(y.shape)}")

# %%
low, high = code_range(8, signed=True)
grids, rows = {}, []
for name, r in {"x": x_seen, "W": W, "y": y_seen}.items():
    grids[name] = scale_and_zero_point(*r.aminmax(), low, high, symmetric=False)
    row = {"matrix": name, "minimum": r.min().item(), "maximum": r.max().item()}
    rows.append(row | {"S": grids[name][0].item(), "Z": grids[name][1].item()})
table(rows, {"minimum": ".3f", "maximum": ".3f", "S": ".6f"})

# %% [markdown]
# Three scales and three zero points are all that is real-valued or off centre. Now the codes, their raw product, and the corrections.

# %%
(S_x, Z_x), (S_W, Z_W), (S_y, Z_y) = grids.values()
x_codes = quantize(x, S_x, Z_x, low, high).long()  # [tokens, in]
W_codes = quantize(W, S_W, Z_W, low, high).long()  # [out, in]
b_codes = torch.round(b / (S_x * S_W)).long()  # [out]
raw = x_codes @ W_codes.T  # int64 here; the values fit into int32
total = raw - Z_W * x_codes.sum(1, keepdim=True) - Z_x * W_codes.sum(1)
total += W.shape[1] * Z_x * Z_W + b_codes


# %%
def sqnr(r, back):
    """Signal over quantization noise in decibels."""
    noise = (r - back).square().sum().item()
    return 10 * math.log10(r.square().sum().item() / noise) if noise else math.inf


# %%
same = dequantize(x_codes, S_x, Z_x) @ dequantize(W_codes, S_W, Z_W).T + b
apart = ((S_x * S_W * total - same).abs().max() / y.abs().max()).item()
of_sums = sqnr(y, S_x * S_W * total)
uncorrected = sqnr(y, S_x * S_W * (raw + b_codes))
width = int(total.abs().max()).bit_length() + 1
print(f"sums from {total.min():,} to {total.max():,}: {width} bits with the sign")
print(f"against the float product of the same codes: {apart:.0e} of max |y| apart")
print(f"against the float layer: {of_sums:.1f} dB; uncorrected {uncorrected:.1f} dB")

# %% tags=["folded"]
# Record the layer's sums.
record("integer_arithmetic.layer.apart", apart, "", 1e-4, model=first)
record("integer_arithmetic.layer.sums.sqnr", of_sums, "dB", 0.1, model=first)
record("integer_arithmetic.layer.uncorrected.sqnr", uncorrected, "dB", 0.1, model=first)
record("integer_arithmetic.layer.width", width, "bits", 0, model=first)

# %% [markdown]
# The integer form is no approximation. It is the float product of the dequantized matrices, up to the rounding of floats and of
# the bias: {{integer_arithmetic.layer.apart:.0e}} of the largest output in the recorded run. What is lost is lost in the codes: the sums have {{integer_arithmetic.layer.sums.sqnr:.1f}} dB against the float layer. The control, without the corrections, has {{integer_arithmetic.layer.uncorrected.sqnr:.1f}} dB. Below 0 dB
# the error is larger than the output.
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


# %%
def to_fixed_point(M):
    """(m, s): M is about m * 2^-31 * 2^-s, m in [2^30, 2^31); 0 < M < 1."""
    M_0, exponent = math.frexp(M)  # M = M_0 * 2^exponent, M_0 in [0.5, 1)
    m = round(M_0 * 2**31)
    return (m, -exponent) if m < 2**31 else (2**30, -exponent - 1)


# %%
def times_fixed_point(total, m, s):
    """round(M * total) by integers alone; `total` int64."""
    upper = (total * m + 2**30) >> 31  # 2^30 is half of 2^31
    half = 2**s >> 1
    return upper.sign() * ((upper.abs() + half) >> s)  # a tie goes away from zero


# %% tags=["nbval-check-output"]
m, s = to_fixed_point(0.3)
print(f"0.3 = 0.6 * 2^-1: m = round(0.6 * 2^31) = {m}, s = {s}")
sums = torch.tensor([-1000, -7, -1, 1, 2, 4, 1000])
print("sums:            ", sums.tolist())
print("by integers:     ", times_fixed_point(sums, m, s).tolist())
print("exactly, rounded:", [round(0.3 * total) for total in sums.tolist()])

# %% [markdown]
# A small surprise: the sums 1 and -1. Exactly, 0.3 rounds to 0. In integers 0.6 is rounded to 1 first, and then the half of it, a tie, to 1 again: the
# price of rounding **twice**. The first rounding moves the result by at most $2^{-(s + 1)}$, so only sums that close to a
# tie can end on the other side. With the shift of 1 here that is a quarter; a real layer's shift is usually larger.
#
# Now the layer is complete: all constants are integers, and so is every step between the codes that come in and those that go out.


# %%
def integer_linear(x_codes):
    """Codes of y `[tokens, out]` from codes of x `[tokens, in]`."""
    total = x_codes @ W_codes.T
    total = total - Z_W * x_codes.sum(1, keepdim=True) + constant
    return (times_fixed_point(total, m, s) + Z_y).clamp(low, high)


# %%
constant = b_codes - Z_x * W_codes.sum(1) + W.shape[1] * Z_x * Z_W  # [out]
M = S_x.item() * S_W.item() / S_y.item()
m, s = to_fixed_point(M)
y_codes = integer_linear(x_codes)
for t in (x_codes, W_codes, Z_x, Z_W, constant, y_codes):
    assert not t.is_floating_point()
print(f"M = {M:.9f}: m = {m}, s = {s}, off by {abs(m / 2 ** (31 + s) / M - 1):.0e}")

# %%
by_float = (torch.round(total.double() * M) + Z_y).clamp(low, high)
twice = int((y_codes != by_float).sum())
clipped = int(((y < y_seen.min()) | (y > y_seen.max())).sum())
of_codes = sqnr(y, dequantize(y_codes, S_y, Z_y))
print(f"of {y_codes.numel():,} codes {twice} differ from rounding once, in float64")
print(f"outputs outside the range from calibration: {clipped}")
print(f"SQNR: the sums {of_sums:.1f} dB, the codes {of_codes:.1f} dB")

# %% tags=["folded"]
# Record the layer's codes.
record("integer_arithmetic.layer.rounded_twice", twice, "", 20, model=first)
record("integer_arithmetic.layer.codes", y_codes.numel(), "", 0, model=first)
record("integer_arithmetic.layer.clipped", clipped, "", 5, model=first)
record("integer_arithmetic.layer.codes.sqnr", of_codes, "dB", 0.1, model=first)

# %% [markdown]
# In the recorded run rounding twice changed {{integer_arithmetic.layer.rounded_twice:.0f}} of {{integer_arithmetic.layer.codes:,.0f}} codes, and {{integer_arithmetic.layer.clipped:.0f}} outputs lay outside the range that calibration saw. Neither is the price.
# The SQNR fell from {{integer_arithmetic.layer.sums.sqnr:.1f}} to {{integer_arithmetic.layer.codes.sqnr:.1f}} dB because the outputs were rounded to 8 bits.
#
# ## Which rounding costs how much?
#
# Three things are rounded: weights, inputs and outputs. We round one at a time and leave the others in float. Errors that are independent add as
# *powers*, so we look at noise power in proportion to the output's power. We do it once with one scale for all of $W$ and once with one a row. A scale a *row* stays outside the sum over $k$: $M$ becomes one number for each
# output, and nothing else changes. (A scale for each *group of columns* would stand inside the sum.)


# %%
def round_trip(r, n_bits, minimum, maximum):
    """`r` on a grid of `n_bits` over the range from minimum to maximum."""
    ends = code_range(n_bits, signed=True)
    S, Z = scale_and_zero_point(minimum, maximum, *ends, symmetric=False)
    return dequantize(quantize(r, S, Z, *ends), S, Z)


# %%
def noise(W, b, x_seen, x, n_bits, dim):
    """Noise `[tokens, out]` of each rounding alone, of all together, and y."""
    y, y_ends = x @ W.T + b, (x_seen @ W.T + b).aminmax()
    ends = W.aminmax() if dim is None else W.aminmax(dim=dim, keepdim=True)
    W_hat = round_trip(W, n_bits, *ends)
    x_hat = round_trip(x, n_bits, *x_seen.aminmax())
    outputs = {"weights": x @ W_hat.T + b, "inputs": x_hat @ W.T + b}
    outputs["outputs"] = round_trip(y, n_bits, *y_ends)
    outputs["all"] = round_trip(x_hat @ W_hat.T + b, n_bits, *y_ends)
    return {name: y_hat - y for name, y_hat in outputs.items()}, y


# %%
def powers(name, parts, n_bits, dim):
    """Noise power over the output's, per mille, with its error over documents."""
    errors, y = noise(*parts, n_bits, dim)
    signal = y.square().sum(1).mean()
    of_token = {k: 1000 * e.square().sum(1) / signal for k, e in errors.items()}
    where = texts[name].documents
    return {k: over_units(t, where, "documents") for k, t in of_token.items()}


# %%
SOURCES, parts, measured = ("weights", "inputs", "outputs"), {}, {}
for name in models:
    parts[name] = middle_layer(name)[1:]
    for scales, dim in (("tensor", None), ("row", 1)):
        measured[name, scales] = powers(name, parts[name], 8, dim)

# %%
rows = []
for (name, scales), found in measured.items():
    row = {"model": name, "W's scales": f"one a {scales}"}
    row |= {k: with_error(found[k].value, found[k].error) for k in SOURCES}
    row["sum"] = sum(found[k].value for k in SOURCES)
    rows.append(row | {"all": with_error(found["all"].value, found["all"].error)})
table(rows, {"sum": ".3f"})

# %%
bars = {
    f"{name},\nW: a scale a {scales}": {k: found[k].value for k in SOURCES}
    for (name, scales), found in measured.items()
}
figure = noise_by_source(bars)
plt.show()

# %% tags=["folded"]
# Record powers and shares.
for (name, scales), found in measured.items():
    key = f"integer_arithmetic.{name}.{scales}"
    whole = sum(found[k].value for k in SOURCES)
    for source, e in found.items():
        tolerance = 0.1 * e.value
        record(f"{key}.{source}", e.value, "per mille", tolerance, model=name)
        record(f"{key}.{source}_error", e.error, "per mille", None, model=name)
        if source != "all":
            record(f"{key}.{source}_share", e.value / whole, "", 0.05, model=name)
    record(f"{key}.sum", whole, "per mille", 0.1 * whole, model=name)

# %% [markdown]
# *Figure: share of weights, inputs and outputs in the noise power of one layer's output at 8 bits, a bar for each model and granularity of the weights' scales.*
#
# The table says per mille of the output's power, with one standard error over documents. In the recorded run, on course-lm with one scale for $W$, weights make {{integer_arithmetic.course-lm.tensor.weights_share:.0%}} of the noise, inputs
# {{integer_arithmetic.course-lm.tensor.inputs_share:.0%}} and outputs {{integer_arithmetic.course-lm.tensor.outputs_share:.0%}}. The three add up to {{integer_arithmetic.course-lm.tensor.sum:.3f}}; rounded together they make {{integer_arithmetic.course-lm.tensor.all:.3f}} ± {{integer_arithmetic.course-lm.tensor.all_error:.3f}}. So the errors do add as powers, and the shares mean something.
#
# A scale a row divides the part of the weights. On course-lm the sum falls by little, since the weights were the smallest part there; on SmolLM2 they were more than the outputs. With a scale a row, inputs make {{integer_arithmetic.smollm2-135m-q4_1.row.inputs_share:.0%}} of the noise on SmolLM2. **Who wants to improve an 8-bit layer looks at its inputs and
# outputs first**, not at its weights. How does it go with fewer bits?

# %%
rows = []
for n_bits in (8, 7, 6, 5, 4):
    found = powers(first, parts[first], n_bits, 1)
    rows.append({"bits": n_bits})
    for k, e in found.items():
        rows[-1][f"{k}, dB"] = -10 * math.log10(e.value / 1000)
table(rows, {k: ".1f" for k in list(rows[0])[1:]})

# %% [markdown]
# Each bit less costs every source about 6 dB, as the law of `linear_mapping` says. The order of the three stays nearly the same.
#
# ## Is it right? The package and PyTorch
#
# The package computes the same in `int8_matmul_zero_points` and `requantize`; codes have to be equal, not close. PyTorch's int8
# layer takes unsigned inputs and symmetric weights, so it gets those. It multiplies integers too, but its last step is a
# float multiplication, and its kernel depends on the processor: there we count the codes that differ.

# %% tags=["folded"]
# Our layer against the package's functions: all codes equal.
from course_utils.kernels import int8_matmul_zero_points

sums = int8_matmul_zero_points(x_codes.to(torch.int8), Z_x, W_codes.to(torch.int8), Z_W)
assert torch.equal(sums + b_codes, total)
assert fixed_point.quantize_multiplier(M) == (m, s)
again = fixed_point.requantize(total.int(), m, s, Z_y, low, high)
assert torch.equal(again.long(), y_codes)
print(f"the package: {again.numel():,} codes, all equal")

# %% tags=["folded"]
# Against PyTorch's int8 layer, where this PyTorch has one.
S_sym, _ = scale_and_zero_point(W.min(), W.max(), -127, 127, symmetric=True)
engine = torch.backends.quantized.engine
if not hasattr(torch, "quantize_per_tensor") or engine == "none":
    print("this PyTorch has no int8 layer")  # it announces that it will go
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their_W = torch.quantize_per_tensor(W, S_sym.item(), 0, torch.qint8)
        on_grid, unsigned = dequantize(x_codes, S_x, Z_x), Z_x.item() + 128
        their_x = torch.quantize_per_tensor(on_grid, S_x.item(), unsigned, torch.quint8)
        packed = torch.ops.quantized.linear_prepack(their_W, b)
        grid_y = S_y.item(), Z_y.item() + 128
        theirs = torch.ops.quantized.linear(their_x, packed, *grid_y).int_repr() - 128.0
    sums = (x_codes - Z_x) @ their_W.int_repr().long().T
    sums = (sums + torch.round(b / (S_x * S_sym))).int()
    fixed = fixed_point.quantize_multiplier((S_x * S_sym / S_y).item())
    differ = (fixed_point.requantize(sums, *fixed, Z_y, low, high) - theirs).abs()
    print(f"PyTorch: {int((differ > 0).sum())} of {differ.numel():,} codes", end=" ")
    print(f"differ, by at most {int(differ.max())}")

# %% [markdown]
# The package's codes are equal. From PyTorch's a small share differs, by one code at most: those sums lie next to a tie, which a float and an integer factor may round to different sides.
#
# ## A whole model
#
# The package's method `affine` rounds the weights of every linear layer, here with a scale a row, and on request its inputs: then
# it multiplies integers, as above. *Outputs* stay in float, and so do embeddings, attention and norms. Inputs stay float, or
# get a grid for each token (`per_token`: exact ranges, but only known at run time), or one from calibration (`static`, as above). We give the **nats** lost per token, on the same tokens, with one standard error over documents:
# a nat is a unit of $-\log p$, with $p$ the probability of the token that came. **Perplexity** is $e$ to the mean of $-\log p$.

# %%
found, made = {}, {}
for name, (model, tokenizer) in models.items():
    seen = calibration_tokens(tokenizer, 4, 256, seed=profile.seed)
    made[name] = {}
    for inputs in ("float", "per_token", "static"):
        method = get_method("affine", n_bits=8, group_size="row", inputs=inputs)
        made[name][inputs] = copy.deepcopy(model)
        quantize_model(made[name][inputs], method, calibration=seen)
    found[name] = compare_all(made[name], model, texts[name])

# %%
rows = []
for name, of_inputs in found.items():
    for inputs, c in of_inputs.items():
        row = {"model": name, "inputs": inputs, "nats lost": c.loss.value}
        row |= {"±": c.loss.error, "perplexity": c.perplexity.perplexity}
        rows.append(row | {"float perplexity": c.reference.perplexity})
formats = {"nats lost": "+.4f", "±": ".4f", "perplexity": ".2f"}
table(rows, formats | {"float perplexity": ".2f"})

# %% tags=["folded"]
# Record the table, and static less per_token, paired.
for name, of_inputs in found.items():
    measured_on = replace(profile.protocol(models[name].model), tokens=2048)
    by = {"model": name, **measured_on.fields}
    for inputs, c in of_inputs.items():
        key, ppl = f"integer_arithmetic.{name}.{inputs}", c.perplexity.perplexity
        record(f"{key}.perplexity", ppl, "", max(0.05, 0.02 * ppl), **by)
        record(f"{key}.loss", c.loss.value, "nats", 0.02, **by)
        record(f"{key}.loss_error", c.loss.error, "nats", None, **by)
    less = difference(of_inputs["static"], of_inputs["per_token"])
    key = f"integer_arithmetic.{name}.static_less_per_token"
    record(key, less.value, "nats", 0.02, **by)
    record(f"{key}_error", less.error, "nats", None, **by)
    print(f"{name}, static less per_token: {format_difference(less)}")

# %% [markdown]
# On course-lm 8 bits cost next to nothing in any of the three forms. On SmolLM2, in the recorded run, 8-bit weights cost {{integer_arithmetic.smollm2-135m-q4_1.float.loss:.4f}} ± {{integer_arithmetic.smollm2-135m-q4_1.float.loss_error:.4f}} nats, inputs with a grid for each token {{integer_arithmetic.smollm2-135m-q4_1.per_token.loss:.3f}} ±
# {{integer_arithmetic.smollm2-135m-q4_1.per_token.loss_error:.3f}}, and static inputs {{integer_arithmetic.smollm2-135m-q4_1.static.loss:.2f}} ± {{integer_arithmetic.smollm2-135m-q4_1.static.loss_error:.2f}}. A few of its input values are so large that one range for all tokens makes
# the step too wide for the rest: `dynamic_range` is about that. One calibration text was used, and the errors do not hold what another one would change. Does one hear it?

# %%
name = list(models)[-1]
model, tokenizer = models[name]
speakers = {"float": model} | {f"inputs {k}": m for k, m in made[name].items()}
print(continuations(speakers, tokenizer, prompt_of(name), new_tokens=16))

# %% [markdown]
# With float inputs the text is the float model's, or begins as it does. Where inputs are rounded it may take another way, even where the mean loss is not distinguished from 0. One text proves nothing; it stays language.
#
# ## What you saw
#
# - **The product.** A plain product of codes and three corrections gave the float product of the same codes, within {{integer_arithmetic.layer.apart:.0e}} of the largest output in the recorded run. Without the corrections nothing was left of the output.
# - **Back to 8 bits.** A multiplier of 31 bits and a shift replaced the real factor. Rounding twice changed {{integer_arithmetic.layer.rounded_twice:.0f}} of {{integer_arithmetic.layer.codes:,.0f}} codes.
# - **A real layer.** From codes to codes it had {{integer_arithmetic.layer.codes.sqnr:.1f}} dB, with integers alone, and all codes equal the package's.
# - **Who pays.** At 8 bits, with one scale for $W$, weights made {{integer_arithmetic.course-lm.tensor.weights_share:.0%}} of the noise, inputs {{integer_arithmetic.course-lm.tensor.inputs_share:.0%}} and outputs {{integer_arithmetic.course-lm.tensor.outputs_share:.0%}}. In a whole SmolLM2, static inputs cost {{integer_arithmetic.smollm2-135m-q4_1.static_less_per_token:+.2f}} ± {{integer_arithmetic.smollm2-135m-q4_1.static_less_per_token_error:.2f}} nats more than those with a grid for each token.
#
# ## Limits
#
# - The product is exact here, but it is not fast: PyTorch's int64 product and the package's, which adds pieces in float32, simulate
#   what int8 hardware does. Nothing about time follows from this notebook.
# - The shares are those of one layer in the middle of each model. Other layers have other inputs.
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
assert relu_range(-100, -128, 127)[0] == -100, "real 0 has the code Z_y, not the code 0"
assert relu_range(-100, -128, 127)[1] == 127, "large values are kept"
assert relu_range(-128, -128, 127) == (-128, 127), "nothing below 0 has a code here"
assert relu_range(20, 0, 255) == (20, 255), "unsigned: `high` is 255, Z_y is 20"
### BEGIN HIDDEN TESTS
from course_utils.kernels.fixed_point import quantize_multiplier, requantize

probe, fixed = torch.arange(-5000, 5000, dtype=torch.int32), quantize_multiplier(0.0371)
with_relu = requantize(probe, *fixed, 20, *relu_range(20, -128, 127))
without = requantize(probe, *fixed, 20, -128, 127)
assert torch.equal(with_relu - 20, (without - 20).relu()), "the clamp does as a ReLU"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: what can be known before the input
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Weights are quantized symmetrically ($Z_W = 0$), inputs asymmetrically. Then the only correction left does not depend on the
# input's codes, and a runtime adds it to the bias once, when the model is loaded. Compute that bias.


# %% tags=["exercise"]
def folded_bias(W_codes, bias_codes, Z_x):
    """Integers `[out]`; `x_codes @ W_codes.T` plus this is the corrected sum.

    `W_codes` `[out, in]` with zero point 0, int8 or wider; `bias_codes` `[out]` in
    units of S_x S_W; `Z_x` an int.
    Approach: multiply out sum_k (q_x - Z_x) q_W, and see what holds no q_x.
    Example: W_codes [[1, 2]], bias_codes [10], Z_x = 3 gives [1].
    Hint: int8 codes have to be made wider before they are multiplied.
    """
    ### BEGIN SOLUTION
    return (bias_codes.long() - Z_x * W_codes.long().sum(1)).int()
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = folded_bias(torch.tensor([[1, 2]]), torch.tensor([10]), 3)
assert found.tolist() == [1], "10 - 3 * (1 + 2) = 1: the correction is subtracted"
found = folded_bias(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 100]), 1)
assert found.tolist() == [-3, 93], "sum over the inputs: one number for each row of W"
many = torch.full((1, 1000), 100, dtype=torch.int8)
found = folded_bias(many, torch.tensor([0]), -5)
assert found.tolist() == [500_000], "-5 * 100 does not fit into int8: widen before"
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(0)
q_x = torch.randint(-128, 128, (4, 50), generator=draw)
q_W = torch.randint(-127, 128, (6, 50), generator=draw)
q_b = torch.randint(-1000, 1000, (6,), generator=draw)
want = ((q_x - 17) @ q_W.T + q_b - q_x @ q_W.T)[0].tolist()
found = folded_bias(q_W.to(torch.int8), q_b, 17).tolist()
assert found == want, "what is left of the corrected sum without the raw product"
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
assert fixed_point_of_width(0.3, 8) == (154, 9), "153.6 is nearer to 154: round"
assert fixed_point_of_width(0.99999, 4) == (8, 3), "m = 16 does not fit into 4 bits"
sums = torch.arange(-40_000, 40_000)
for width in (31, 15, 7):
    m, shift = fixed_point_of_width(0.00312345, width)
    ours = (sums * m + 2 ** (shift - 1)) >> shift
    differ = (ours != torch.round(sums.double() * 0.00312345)).double().mean()
    print(f"{width} bits: {differ:.2%} of the codes differ from exact rounding")
### BEGIN HIDDEN TESTS
from course_utils.kernels.fixed_point import quantize_multiplier as of_package

wanted = [(0.5, 8, (128, 8)), (0.7, 8, (179, 8)), (1e-3, 15, (16777, 24))]
for M, width, pair in wanted:
    assert fixed_point_of_width(M, width) == pair, f"{M} in {width} bits is {pair}"
for M in (0.3, 1e-3, 3e-5):
    m, shift = of_package(M)
    found = fixed_point_of_width(M, 31)
    assert found == (m, shift + 31), f"{M} in 31 bits is {m} / 2^{shift + 31}"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: the longest sum
# *Difficulty 3/5 · 15 minutes · 2 points · no GPU*
#
# Signed 8-bit codes, -128 to 127, with zero points that are known. How many terms $(q^x - Z_x)(q^W - Z_W)$ does an int32 surely hold, if their sum may have a magnitude of at most $2^{31} - 1$?


# %% tags=["exercise"]
def longest_sum(Z_x, Z_W):
    """The largest n for which no sum of n corrected products exceeds 2^31 - 1.

    Approach: how far from its zero point can a code be, at the one end or the other?
    Example: Z_x = Z_W = 0 gives 131,071; Z_x = Z_W = -128 gives 33,025.
    Hint: a zero point at one end of the range makes the other end the far one.
    """
    ### BEGIN SOLUTION
    far_x, far_W = (max(127 - Z, Z + 128) for Z in (Z_x, Z_W))
    return (2**31 - 1) // (far_x * far_W)
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert longest_sum(0, 0) == 131_071, "products reach 128 * 128, the sum 2^31 - 1"
assert longest_sum(-128, -128) == 33_025, "codes reach 127: 255 away, not 256"
assert longest_sum(0, -128) == 65_793, "each of the two has a distance of its own"
assert longest_sum(100, 0) == 73_584, "Z = 100 is far from -128: 228 steps"
### BEGIN HIDDEN TESTS
for Z_x, Z_W in ((10, -3), (127, 127), (-60, 90)):
    products = [
        abs((q_x - Z_x) * (q_W - Z_W)) for q_x in (-128, 127) for q_W in (-128, 127)
    ]
    n = (2**31 - 1) // max(products)
    assert longest_sum(Z_x, Z_W) == n, f"{n} terms for {Z_x} and {Z_W}: try all ends"
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

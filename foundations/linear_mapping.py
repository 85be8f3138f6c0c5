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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/linear_mapping.ipynb)
#
# # Linear mapping: from a real number to a code and back
#
# *Large Model Quantization: a deep dive. Foundations, the first notebook.*

# %% [markdown]
# Quantization stores real numbers as small integers. This notebook builds it from nothing. When you have
# worked through it you will be able to
#
# - turn a tensor into integer codes and back by $r = S\,(q - Z)$, and choose $S$ and $Z$;
# - say how large the error will be before you measure it, and when that rule fails;
# - choose between one scale for a tensor, one a row and one a group, and count the bits that they cost;
# - pack codes into bytes, and check all of it against PyTorch and llama.cpp;
# - quantize a language model at 8, 4, 3 and 2 bits and read what happened from your own numbers.
#
# It takes about an hour to read and work. You need to know what a weight matrix is. No profile needs a
# GPU; `quick` runs in half a minute, `cpu` in a few minutes. How to *compute* with the codes is the subject of
# the companion, `integer_arithmetic`.

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

import gguf
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import evaluation_tokens
from course_utils.evaluation import compare, perplexity
from course_utils.grids import uniform
from course_utils.kernels import packing
from course_utils.models import linear_layers, load_model
from course_utils.plotting import error_against_bits, staircase, values_on_grid
from course_utils.profiles import resolve
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or the name of one model
SEED = 0
GROUP_SIZE = 64  # weights that share one scale, where scales are per group

# %%
profile = resolve(PROFILE, MODEL, SEED)
if not profile.chosen:  # SmolLM2 is shipped on a 4-bit grid: see "where the law breaks"
    names = [name.replace("-q4_1", "-dithered") for name in profile.models]
    profile = replace(profile, models=tuple(names))
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
generator = torch.Generator().manual_seed(profile.seed)

# %% [markdown]
# ## The question
#
# A weight of a neural network is a float of 16 or 32 bits. With `n_bits` bits there are only $2^{n}$ different
# codes: 256 with eight bits, 16 with four, 4 with two. Which real numbers should the codes stand for, and
# which code should a given number get?
#
# The simplest answer is the **linear** (or *affine*, or *uniform*) mapping: evenly spaced values,
#
# $$ r = S\,(q - Z). $$
#
# | | name | what it is |
# | --- | --- | --- |
# | $r$ | real value | what we want to store |
# | $q$ | code | an integer from $q_{min}$ to $q_{max}$; all that is stored for each number |
# | $S$ | scale | the step between two neighbouring values, a positive float |
# | $Z$ | zero point | the code of the real number 0; an integer too |
#
# $S$ and $Z$ are shared by many numbers: that is where the saving comes from. The **objective** is to keep the squared
# error $\sum (r - \hat r)^2$ small, where $\hat r$ is what comes back. Behind it stands a second one, which no
# formula gives: the quality of the model.
#
# ## By hand
#
# Let our numbers lie between -1 and 3, and let the codes be 0 to 255. Spread the range over the 255 steps between
# the codes, and let the lowest number get the code 0:
#
# $$ S = \frac{r_{max} - r_{min}}{q_{max} - q_{min}}, \qquad
# Z = q_{min} - \mathrm{round}(r_{min} / S), \qquad
# q = \mathrm{clamp}\big(\mathrm{round}(r / S) + Z,\; q_{min},\; q_{max}\big). $$

# %% tags=["nbval-check-output"]
S = (3 - -1) / (255 - 0)
Z = 0 - round(-1 / S)
print(f"S = 4 / 255 = {S:.6f},  Z = round({1 / S:.2f}) = {Z}")
for r in (0.5, 0.0, -1.0, 3.0, 3.5):
    steps = r / S
    q = min(max(round(steps) + Z, 0), 255)
    back = S * (q - Z)
    print(
        f"r = {r:4}: {steps:6.2f} steps from zero, code {q:3d}, back to {back:+.5f}, "
        f"error {r - back:+.5f}"
    )
print(f"half a step is {S / 2:.5f}")

# %% [markdown]
# Four things to see:
#
# - 0.5 comes back with an error below half a step. That is **rounding error**.
# - 0 comes back as exactly 0, because $Z$ is an integer. Padding, ReLU and pruning produce exact zeros, so
#   this is worth having [@jacob2017integer].
# - The ends, -1 and 3, are off by a quarter of a step: -1 is 63.75 steps below zero, $Z$ had to be rounded to 64, and
#   that moved the whole grid. It never moves by more than half a step.
# - 3.5 lies outside. `clamp` gives it the last code, and its error grows with its distance: that is
#   **clipping error**.
#
# With only eight codes the mapping can be seen.

# %%
figure = staircase(scale=0.5, zero_point=2, low=0, high=7)
plt.show()

# %% [markdown]
# *Figure: the mapping with S = 0.5, Z = 2 and codes 0 to 7. Left: a staircase of eight steps along the diagonal from -1 to 2.5,
# flat outside. Right: the error, a sawtooth between two dotted lines at plus and minus half a step, which grows without bound in
# the two shaded regions outside.*
#
# ## The two functions
#
# The same on tensors, in two functions of one line each. `S` and `Z` may have any shape that broadcasts against `r`.


# %% tags=["nbval-check-output"]
def quantize(r, S, Z, low, high):
    """Real numbers to integer codes (int32)."""
    return (torch.round(r * (1 / S)) + Z).clamp(low, high).int()


def dequantize(q, S, Z):
    """Integer codes to real numbers."""
    return S * (q - Z)


r = torch.tensor([-1.0, -0.2, 0.0, 0.5, 3.0])
S, Z = torch.tensor(4 / 255), torch.tensor(64)
q = quantize(r, S, Z, 0, 255)
print("codes:", q.tolist())
print("back: ", [f"{value:.4f}" for value in dequantize(q, S, Z).tolist()])

# %% [markdown]
# (`r * (1 / S)`, and not `r / S`: the two can differ in the last bit of a float. PyTorch multiplies, and we want its
# codes exactly.)
#
# ### Which codes: signed or unsigned, full or narrow
#
# Eight bits can be read as 0 to 255 or as -128 to 127. That changes nothing but the names: subtract 128 from every code
# and from $Z$, and the same numbers come back. A **narrow** range gives up the lowest signed code, so that the codes are
# symmetric around zero and $-r$ always gets the code $-q$.


# %% tags=["nbval-check-output"]
def code_range(n_bits, signed=False, narrow=False):
    low = -(2 ** (n_bits - 1)) if signed else 0
    return low + narrow, low + 2**n_bits - 1


print("bits  unsigned   signed       signed, narrow")
for n_bits in (8, 4, 3, 2):
    ranges = [code_range(n_bits, *kind) for kind in ((), (True,), (True, True))]
    print(f"{n_bits:4}  {ranges[0]!s:10} {ranges[1]!s:12} {ranges[2]}")
signed = quantize(r, S, Z - 128, -128, 127)
print("the five numbers, unsigned:", q.tolist(), " signed:", signed.tolist())
assert torch.equal(dequantize(q, S, Z), dequantize(signed, S, Z - 128))

# %% [markdown]
# Narrow costs one code of $2^n$: hardly anything at eight bits, a quarter of all codes at two.
#
# ### Symmetric or asymmetric
#
# **Asymmetric** takes the range from minimum to maximum, as above. **Symmetric** takes it from $-a$ to $a$, with $a$ the largest
# magnitude (*absmax*): then $Z$ is a constant, which need not be stored and which, with signed codes, is 0.
# Asymmetric ranges are widened to hold 0, since $Z$ has to be one of the codes.


# %%
def scale_and_zero_point(r, low, high, symmetric=False):
    """S and Z of each row of `r` `[..., n]`, both `[..., 1]`."""
    minimum = r.amin(-1, keepdim=True).clamp(max=0)
    maximum = r.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        S = torch.maximum(-minimum, maximum) / ((high - low) / 2)
        Z = torch.full_like(S, math.ceil((high + low) / 2))
    else:
        S = (maximum - minimum) / (high - low)
        Z = (low - torch.round(minimum / S)).clamp(low, high)
    return S, Z.int()


def sqnr(r, back):
    """Signal over quantization noise, in decibels: 10 log10(sum r^2 / sum error^2)."""
    noise = (r - back).square().sum().item()
    return 10 * math.log10(r.square().sum().item() / noise) if noise else math.inf


# %% [markdown]
# The **SQNR** puts the squared error into proportion: 20 dB is a noise power of one percent of the signal's, 40 dB of
# one in ten thousand. We try both on numbers spread to both sides of zero, and on what a ReLU leaves of them.

# %%
bell = torch.randn(1, 10_000, generator=generator)
print("4 bits         values    S       Z   codes used   SQNR")
for name, values in {"normal": bell, "after ReLU": bell.relu()}.items():
    for symmetric in (True, False):
        S, Z = scale_and_zero_point(values, 0, 15, symmetric)
        q = quantize(values, S, Z, 0, 15)
        kind = "symmetric" if symmetric else "asymmetric"
        print(
            f"{kind:11} {name:>12} {S.item():6.3f} {Z.item():5d} {len(q.unique()):9d} "
            f"{sqnr(values, dequantize(q, S, Z)):9.1f} dB"
        )

# %% [markdown]
# On a range centred on zero the two agree nearly. After a ReLU the symmetric grid spends half of its codes on negative
# numbers that do not occur: one whole bit is lost. Hence the habit: weights symmetric, activations
# asymmetric. A weight matrix with a long tail on one side profits from asymmetry as well.
#
# ## Rounding
#
# What becomes of a number exactly between two codes, a **tie**? `torch.round` takes the even neighbour. Schoolbook
# rounding goes away from zero. **Stochastic** rounding goes up or down by chance, up with a probability equal to the
# fractional part, so that it is right on average for *every* number [@gupta2015limited].


# %% tags=["nbval-check-output"]
def half_away(x):
    return x.sign() * (x.abs() + 0.5).floor()


def stochastic(x, generator):
    chance = torch.rand(x.shape, generator=generator)
    return x.floor() + (chance < x - x.floor())


ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
print("ties      ", ties.tolist())
print("half even ", ties.round().int().tolist())
print("half away ", half_away(ties).int().tolist())

# %%
rules = {
    "half to even": torch.round,
    "half away": half_away,
    "stochastic": lambda x: stochastic(x, generator),
}
anywhere = 10 * torch.rand(100_000, generator=generator)  # unit: one step
halves = torch.randint(0, 20, (100_000,), generator=generator) / 2  # every other a tie
print("                 values anywhere         every other a tie")
print("              mean error   mean sq.    mean error   mean sq.")
for name, rule in rules.items():
    errors = [rule(x) - x for x in (anywhere, halves)]
    columns = [f"{e.mean():+10.3f} {e.square().mean():10.3f}" for e in errors]
    print(f"{name:13} {'   '.join(columns)}")
print(f"1/12 = {1 / 12:.3f}, 1/6 = {1 / 6:.3f}")

nearest, by_chance = torch.zeros(1000), torch.zeros(1000)
for _ in range(100):  # a hundred updates of a tenth of a step
    nearest = torch.round(nearest + 0.1)
    by_chance = stochastic(by_chance + 0.1, generator)
print(f"100 times + 0.1, stored in steps: {nearest.mean():.2f} rounded to nearest,")
print(f"{by_chance.mean():.2f} stochastically (mean of 1000); it should be 10.")

# %% [markdown]
# For numbers that can lie anywhere, ties hardly occur and the first two rules do the same. Where numbers come from a
# finer grid ties are common, and rounding them always away from zero shifts the mean; half to even does not.
# Stochastic rounding does not shift the mean either, but where values lie anywhere it doubles the squared error. It is of no use
# for storing weights, and of great use where many small updates have to add up, as in training: rounded to nearest, an
# update below half a step is lost every time.
#
# ## Clipping against rounding
#
# Nothing says that the range must reach the largest number. Cut it off at $\pm c$ and the step shrinks with it: rounding
# error falls, clipping error rises, and the best range is narrower than the data. How to find it, and why least squared
# error is not always what a model wants, is the subject of `dynamic_range`. Here are the two parts for the normal numbers
# at four bits; the last line is the range that clips nothing, with which we go on. ("Clipping" is the error of the numbers outside.)

# %%
print("            error squared, per number")
print("    c    rounding   clipping     total     SQNR")
for c in (1.5, 2.0, 2.5, 3.0, bell.abs().max().item()):
    S, Z = torch.tensor(c / 7.5), torch.tensor(8)
    back = dequantize(quantize(bell, S, Z, 0, 15), S, Z)
    errors, outside = (bell - back).square(), bell.abs() > c
    parts = [errors[part].sum() / bell.numel() for part in (~outside, outside)]
    line = "".join(f"{value:11.4f}" for value in (*parts, errors.mean()))
    print(f"{c:5.2f}{line}{sqnr(bell, back):7.1f} dB")

# %% [markdown]
# ## How large is the error? The $S^2/12$ law
#
# Suppose that within a cell, the interval of width $S$ around a level, the numbers are spread evenly. Then the rounding error is
# uniform between $-S/2$ and $S/2$, and its mean square is [@bennett1948spectra]
#
# $$ \frac1S \int_{-S/2}^{S/2} e^2\, de = \frac{S^2}{12} . $$
#
# With $n$ bits over a range $R$ the step is $S = R / (2^n - 1)$. One bit more about halves it, and so divides the noise by about
# four: $10 \log_{10} 4 = 6.02$. **Every bit is worth about 6 dB**, says the law, of whatever numbers. We measure it on three
# made-up sources and, in three ways, on the weights of a real layer: one scale for the whole matrix, one a row, one a
# group.

# %%
models = profile.load_models()
weights = {  # [out, in] of every linear layer, by model and name
    name: {x.name: x.weight.float().cpu() for x in linear_layers(model)}
    for name, (model, _) in models.items()
}
first = next(iter(weights))
peaks = {k: (W.abs().max() / W.std()).item() for k, W in weights[first].items()}
layer = max(peaks, key=peaks.get)
W = weights[first][layer]
print(f"{first}, {layer}: {list(W.shape)}. Its largest weight is {peaks[layer]:.1f}")
print(f"standard deviations from zero; no other layer of {first} has such a long tail.")

# %%
flat = torch.rand(1, 100_000, generator=generator)
normal = torch.randn(1, 100_000, generator=generator)
laplace = torch.empty(1, 100_000).exponential_(generator=generator)
laplace *= 2 * torch.randint(0, 2, laplace.shape, generator=generator) - 1  # the sign
sources = {
    "uniform": flat,
    "normal": normal,
    "Laplace": laplace,
    "tensor": W.reshape(1, -1),
    "row": W,
    "group": W.reshape(-1, GROUP_SIZE),
}
all_bits = [2, 3, 4, 5, 6, 7, 8]
measured, predicted = {}, {}
for name, r in sources.items():
    measured[name], predicted[name] = [], []
    for n_bits in all_bits:
        S, Z = scale_and_zero_point(r, 0, 2**n_bits - 1)
        back = dequantize(quantize(r, S, Z, 0, 2**n_bits - 1), S, Z)
        measured[name].append(sqnr(r, back))
        noise = (S.square() / 12).mean().item()
        predicted[name].append(10 * math.log10(r.square().mean().item() / noise))


# %%
def in_columns(title, cells):
    return f"{title:17}" + "".join(f"{cell:>10}" for cell in cells)


print(in_columns("SQNR in dB", [f"{n} bits" for n in all_bits]))
for name in sources:
    print(in_columns(f"{name:8} measured", [f"{v:.1f}" for v in measured[name]]))
    print(in_columns(f"{'':8} by law", [f"{v:.1f}" for v in predicted[name]]))
print()
print(in_columns("dB for the bit", [f"{n} to {n + 1}" for n in all_bits[:-1]]))
gain = [20 * math.log10((2 ** (n + 1) - 1) / (2**n - 1)) for n in all_bits[:-1]]
print(in_columns("by law", [f"{v:.2f}" for v in gain]))
for name, v in measured.items():
    print(in_columns(name, [f"{v[i + 1] - v[i]:.2f}" for i in range(len(v) - 1)]))

# %%
panels, law = {}, {}
for title, names in {
    "made-up sources": ("uniform", "normal", "Laplace"),
    f"weights: {layer}": ("tensor", "row", "group"),
}.items():
    panels[title] = {name: (all_bits, measured[name]) for name in names}
    law[title] = {name: (all_bits, predicted[name]) for name in names}
figure = error_against_bits(panels, "SQNR (dB)", theory=law)
plt.show()

# %% [markdown]
# *Figure: SQNR against bits per code. Left a uniform, a normal and a Laplace source, right the layer's weights with one
# scale for the tensor, one a row, one a group. Dots and solid lines are measured, dashed lines are the law. At many bits
# they coincide, in parallel lines; at few bits the curves of numbers with a long tail lie above their dashed
# lines.*
#
# **Where it holds.** With enough bits every curve rises by what the law says, which tends to 6.02 dB. (At few bits the law itself gives
# more, since there are $2^n - 1$ steps and not $2^n$.) The *slope* is the same for all; what differs is the *height*. Numbers with a long
# tail need a wide range, most of which is empty.
#
# **Where it breaks**, first: few bits and a long tail. When the step is wider than the bulk of the numbers, they are not spread evenly
# within a cell: most of them lie within half a step of zero, and come back as zero. This is the **dead zone**. Their
# error is then their own size. That is *less* than the law says, and yet no signal is left.

# %%
print("share of weights that come back as zero")
print("scale per   8 bits   4 bits   3 bits   2 bits")
for name in ("tensor", "row", "group"):
    r, line = sources[name], f"{name:9}"
    for n_bits in (8, 4, 3, 2):
        S, Z = scale_and_zero_point(r, 0, 2**n_bits - 1)
        zeros = (quantize(r, S, Z, 0, 2**n_bits - 1) == Z).float().mean()
        line += f"{zeros:9.0%}"
    print(line)

# %% [markdown]
# Second, on numbers that **lie on a grid already**. Sixteen evenly spaced values need four bits, and then the error is
# zero, not $S^2/12$. With five bits it is worse than with four (exercise 3).
#
# That is not a curiosity. SmolLM2, as the course gets it, was stored in 4 bits once. Its weights lie on such grids, and
# flatter every 4-bit method whose grid is the same. Where the course compares 4-bit methods it takes
# `smollm2-135m-dithered` in its place: the same weights with seeded noise of one step added inside each cell. In each layer the 5% of columns
# that carry the largest inputs stay without noise. They are few, so the grid is gone all the same, and noise on them alone would do most of the damage.
# The noise has a price, which is measured below.
#
# ## Whose scale? Tensor, row, group
#
# The curves on the right differ by the **granularity**: how many weights share a scale. Here is one row of the
# layer, with the levels of the whole tensor at four bits, and with its own.

# %%
middle = int(W.abs().amax(1).argsort()[len(W) // 2])  # the row of the median absmax
row = W[middle : middle + 1]
panels = {}
for title, shared in {
    "levels of the tensor": sources["tensor"],
    "its own": row,
}.items():
    S, Z = scale_and_zero_point(shared, 0, 15)
    levels = dequantize(torch.arange(16), S, Z).flatten()
    levels = levels[levels.abs() <= row.abs().max() + S.item()]
    back = dequantize(quantize(row, S, Z, 0, 15), S, Z)
    panels[f"row {middle}, {title}: {sqnr(row, back):.1f} dB"] = (row[0], levels)
figure = values_on_grid(panels)
plt.show()

# %% [markdown]
# *Figure: two histograms of the same row of weights with the 4-bit levels as vertical lines. Above, the levels of the whole
# tensor: few of them fall where the row has weights. Below, the row's own sixteen levels, which span just the row. The titles
# give the SQNR.*
#
# Finer scales cost bits. With a float16 scale and a zero point of $n$ bits for each group of $g$ weights, a weight takes
#
# $$ n + \frac{16 + n}{g} \quad \text{bits}. $$
#
# | scale shared by | 8 bits | 4 bits | 3 bits | 2 bits |
# | --- | --- | --- | --- | --- |
# | row of 1024 | 8.023 | 4.020 | 3.019 | 2.018 |
# | group of 128 | 8.188 | 4.156 | 3.148 | 2.141 |
# | group of 64 | 8.375 | 4.313 | 3.297 | 2.281 |
# | group of 32 | 8.750 | 4.625 | 3.594 | 2.563 |
# | group of 16 | 9.500 | 5.250 | 4.188 | 3.125 |
#
# Groups of 16 at three bits cost more than four bits a row. Whether fine scales are worth their bits is a question for the
# measurement below.
#
# ## Packing
#
# A computer stores bytes. A 4-bit code in a byte of its own saves nothing over eight bits, so the codes have to be **packed**: written
# one after the other into a stream of bits, lowest bit first, which is then cut into bytes. With 2, 4 and 8 bits a byte holds
# a whole number of codes. With 3 bits some codes straddle two bytes, and eight of them fill three bytes without
# waste.


# %% tags=["nbval-check-output"]
def pack(codes, n_bits):
    """Codes `[n]` to bytes `[ceil(n * n_bits / 8)]`, lowest bit first."""
    bits = codes[:, None] >> torch.arange(n_bits) & 1  # [n, n_bits]
    stream = F.pad(bits.flatten(), (0, -bits.numel() % 8))  # zeros fill the last byte
    return (stream.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(packed, n_bits, n):
    """The first `n` codes of `pack`'s bytes."""
    stream = (packed[:, None].int() >> torch.arange(8) & 1).flatten()
    bits = stream[: n * n_bits].view(n, n_bits)
    return (bits << torch.arange(n_bits)).sum(1).int()


codes = torch.tensor([5, 2, 7, 1, 0, 3, 6, 4])
packed = pack(codes, 3)
print("codes, 3 bits each: ", " ".join(f"{c:03b}" for c in codes.tolist()))
print("as one number:      ", "".join(f"{c:03b}" for c in reversed(codes.tolist())))
print("bytes, highest first:", " ".join(f"{b:08b}" for b in reversed(packed.tolist())))
assert unpack(packed, 3, 8).tolist() == codes.tolist()
for n_bits in (8, 4, 3, 2):
    codes = torch.arange(1000) % 2**n_bits
    print(f"1000 codes of {n_bits} bits: {len(pack(codes, n_bits))} bytes")

# %% [markdown]
# ## Is it right? The package, PyTorch and llama.cpp
#
# What you have read is what `course_utils` holds, in a few small modules. Codes and bytes have to be equal, not close.
#
# PyTorch has two functions that do what our `quantize` does. `fake_quantize` goes to the codes and back, as we do. The older
# `quantize_per_tensor` may round $r/S + Z$ where we round $r/S$ and then add $Z$. At a tie with an odd $Z$ the even
# neighbour is then another one. A model's weights are hardly ever at a tie; six made-up numbers are.

# %%
S, Z = scale_and_zero_point(W, 0, 15)
codes = quantize(W, S, Z, 0, 15)
theirs = uniform.scale_and_zero_point(W.amin(1), W.amax(1), 0, 15, symmetric=False)
assert torch.equal(theirs[0], S[:, 0]) and torch.equal(theirs[1], Z[:, 0])
assert torch.equal(uniform.quantize(W, S, Z, 0, 15), codes)
assert torch.equal(uniform.dequantize(codes, S, Z), dequantize(codes, S, Z))
stored = packing.pack(codes, 4)  # uint8 [out, in / 2]
assert torch.equal(stored[0], pack(codes[0], 4))
assert torch.equal(packing.unpack(stored, 4, W.shape[1]), codes.to(torch.uint8))
print(f"the package: codes {list(codes.shape)}, bytes {list(stored.shape)}, all equal")
fake = torch.fake_quantize_per_channel_affine(W, S[:, 0], Z[:, 0], 0, 0, 15)
assert torch.equal(fake, dequantize(codes, S, Z))
print(f"fake_quantize_per_channel_affine: {fake.numel():,} values, all equal")
print("six ties with S = 1, Z = 3; our codes:", quantize(ties, 1.0, 3, 0, 255).tolist())
print("round(r / S + Z):                     ", torch.round(ties + 3).int().tolist())
if hasattr(torch, "quantize_per_tensor"):  # torch announces that it will go
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.quantize_per_tensor(ties, 1.0, 3, torch.quint8).int_repr()
    print("quantize_per_tensor:                  ", theirs.tolist())

# %% [markdown]
# llama.cpp runs language models on ordinary computers, from files in formats of its own (`gguf`). Its `Q4_1` stores blocks of 32
# weights: a float16 step $d$, a float16 **minimum** $m$ in the place of an integer zero point, and 32 codes of four bits;
# $\hat r = d\,q + m$. We take one block apart, and then compare
# the whole layer with our own format at the same group size.

# %%
block = W[0, :32]
d, minimum = (block.max() - block.min()) / 15, block.min()
codes = ((block - minimum) * (1 / d) + 0.5).int()  # the fraction is cut off: rounds up
theirs = gguf.quants.quantize(block.numpy()[None], gguf.GGMLQuantizationType.Q4_1)[0]
their_d, their_m = theirs[:4].view(np.float16)
low, high = theirs[4:] & 15, theirs[4:] >> 4  # weights 0..15 and 16..31
print(f"{len(theirs)} bytes for 32 weights: {len(theirs) / 4} bits per weight")
print(f"d {their_d:.5f} (ours {d:.5f}), m {their_m:.5f} (ours {minimum:.5f})")
print("codes:", low.tolist())
print("      ", high.tolist())
assert codes.tolist() == [*low.tolist(), *high.tolist()]
parts = {  # what is stored, and what comes back
    "Q4_1, float16 minimum": get_method("gguf", kind="Q4_1"),
    "ours, integer zero point": get_method("affine", n_bits=4, group_size=32),
}
for name, method in parts.items():
    stored = method.quantize(W)
    db = sqnr(W, stored.dequantize())
    print(f"{name:25} {stored.bits_per_weight:.3f} bits per weight, {db:.2f} dB")
theirs = gguf.quants.quantize(W.numpy(), gguf.GGMLQuantizationType.Q4_1)
assert np.array_equal(get_method("gguf", kind="Q4_1").quantize(W).blocks, theirs)
print(f"course_utils writes the same {theirs.nbytes:,} bytes for the layer as gguf")

# %% [markdown]
# ## A whole model
#
# `quantize_model` replaces every linear layer by one that holds packed codes, scales and zero points, and nothing of the
# float weight; embeddings, LM head and all inputs stay in float. Each weight simply gets its nearest code: the method is
# known as **round to nearest**. We try four widths and three granularities.
#
# Bits per weight are measured over all stored tensors, and the SQNR over all quantized weights together. **Perplexity** is $e$ to the
# mean of $-\log p$, with $p$ the probability that the model gave to the token that came: about the number of tokens among which it
# hesitates. We take it on the evaluation split of the CIA World Factbook, the start of each document. It can be compared down a
# column, not between models, whose tokens differ. A model that gave every token of its vocabulary the same probability would have the vocabulary's size as its
# perplexity; what is no better than that is called guessing.


# %%
def weight_sqnr(report, W):
    """SQNR in dB over all weights of a report, from each layer's relative error."""
    power = {name: w.square().sum().item() for name, w in W.items()}
    noise = sum(x.weight_error * power[x.name] for x in report.layers)
    return 10 * math.log10(sum(power.values()) / noise)


n_tokens = profile.pick(quick=2048, cpu=2048, gpu=8192)
results, protocol = {}, {}
for name, (model, tokenizer) in models.items():
    window = min(512, model.config.max_position_embeddings)
    tokens = evaluation_tokens(tokenizer, n_tokens)
    protocol[name] = {"corpus": "factbook", "tokens": n_tokens, "window": window}
    reference = perplexity(model, tokens, window=window)
    results[name] = {"float": reference.perplexity}
    for group_size in ("tensor", "row", GROUP_SIZE):
        for n_bits in (8, 4, 3, 2):
            method = get_method("affine", n_bits=n_bits, group_size=group_size)
            quantized = copy.deepcopy(model)
            report = quantize_model(quantized, method)
            ppl = perplexity(quantized, tokens, window=window).perplexity
            db = weight_sqnr(report, weights[name])
            found = report.bits_per_weight, db, ppl, report.seconds
            results[name][group_size, n_bits] = found
    print(f"{name}, float: perplexity {reference}")

# %%
vocabulary = {name: model.config.vocab_size for name, (model, _) in models.items()}
units = {"tensor": "tensor", "row": "row", GROUP_SIZE: f"group {GROUP_SIZE}"}


def shown(name, ppl):
    return f"{ppl:.2f}" if ppl < vocabulary[name] else "guessing"


for name, table in results.items():
    key, by = f"linear_mapping.{name}", {"model": name, **protocol[name]}
    record(f"{key}.float.perplexity", table["float"], "", 0.05, **by)
    print(f"{name} (float: {table['float']:.2f})")
    print("scales per  bits   bits per weight     SQNR    perplexity   seconds")
    for (size, n_bits), (bits, db, ppl, seconds) in list(table.items())[1:]:
        line = f"{units[size]:10} {n_bits:5} {bits:17.3f} {db:8.1f}"
        print(f"{line} {shown(name, ppl):>13} {seconds:9.1f}")
        part = f"{key}.w{n_bits}_{size if isinstance(size, str) else f'g{size}'}"
        record(f"{part}.bits_per_weight", bits, "bits", 1e-6, **by)
        record(f"{part}.sqnr", db, "dB", 0.05, **by)
        compared = max(0.05, 0.02 * ppl) if ppl < vocabulary[name] else None
        record(f"{part}.perplexity", ppl, "", compared, **by)

# %%
panels = {}
for name, table in results.items():
    panels[name] = {}
    for size, unit in units.items():
        points = [table[size, n_bits] for n_bits in (2, 3, 4, 8)]
        points = [p for p in points if p[2] < vocabulary[name]]
        panels[name][unit] = [p[0] for p in points], [p[2] for p in points]
xlabel = "measured bits per weight"
figure = error_against_bits(panels, "perplexity", xlabel=xlabel, log=True)
plt.show()
for name, table in results.items():
    variants = list(table.values())[1:]
    near = [v for v in variants if v[2] < 1.05 * table["float"]]
    lost = [v for v in variants if v[2] > 2 * table["float"]]
    print(f"{name}, {len(variants)} variants:")
    if near:
        print(f"  {len(near)} stay within 5% of float's perplexity; the lowest SQNR")
        print(f"  among them is {min(v[1] for v in near):.1f} dB.")
    if lost:
        print(f"  {len(lost)} double it or worse; the highest SQNR among them")
        print(f"  is {max(v[1] for v in lost):.1f} dB.")
    fine, coarse = table[GROUP_SIZE, 3], table["tensor", 4]
    verb = "beat" if fine[2] < coarse[2] else "do not beat"
    print(f"  3 bits in groups of {GROUP_SIZE} {verb} 4 bits with one scale a tensor:")
    print(f"  {shown(name, fine[2])} against {shown(name, coarse[2])}.")

# %% [markdown]
# *Figure: perplexity, on a logarithmic scale, against measured bits per weight; one panel a model, one curve for each
# granularity, with points at 2, 3, 4 and 8 bits per code. What the table calls guessing is left out.*
#
# Read the table down: each bit less costs about 6 dB, at few bits somewhat more, as the law says, until the dead zone leaves nothing to lose. The perplexity
# hardly moves at first and then explodes. Compare the granularities at one width: a finer scale buys decibels for a fraction of
# a bit, where a whole bit buys six. (Where the measured bits exceed the formula above, it is because the codes and zero points of a
# row fill whole bytes.)
#
# The seconds are those of quantizing: a few passes over the weights, and packing. Whether the *quantized model* runs faster depends on its
# kernel; the one used here decodes the weights for every product. `packed_kernels` is about that.
#
# One price is paid before any of these: SmolLM2's noise inside the cells of its 4-bit grid. We compare the dithered model with the plain one, on the same tokens.

# %% tags=["folded"]
# The dithered SmolLM2 against the plain one, where the profile has it.
if "smollm2-135m-dithered" in models:
    dithered, tokenizer = models["smollm2-135m-dithered"]
    how = {"dtype": profile.dtype, "device": profile.device}
    plain = load_model("smollm2-135m-q4_1", **how).model
    measured_on = profile.protocol(dithered)
    cost = compare(dithered, plain, measured_on.text(tokenizer))
    print(f"smollm2-135m-dithered: {cost}")
    by = {"model": "smollm2-135m-dithered", **measured_on.fields}
    record("linear_mapping.dithered.loss", cost.loss.value, "nats", 0.01, **by)
else:
    print("This profile has no dithered model; `cpu` compares it with the plain one.")

# %% [markdown]
# In the recorded run the noise costs SmolLM2 {{linear_mapping.dithered.loss:.3f}} nats per token. Methods of 4 bits and fewer all start from the dithered model,
# so no comparison between them contains this price.
#
# ## Why do groups help? A control
#
# Two explanations. Perhaps **neighbours are alike**: rows and groups differ in size, and each gets the scale that fits it. Or
# perhaps it is **only their number**: among few numbers the largest is less extreme than among a million, whatever they are. The
# control tells them apart: shuffle all weights of a layer, then quantize. What is left of the gain is due to number alone.


# %%
def sqnr_in_groups(W_of, size, shuffle=False, symmetric=False):
    """4-bit SQNR over all matrices; `size` weights a scale, or "row", or "tensor"."""
    before, after = [], []
    for W in W_of.values():
        r = W.flatten()
        if shuffle:
            r = r[torch.randperm(len(r), generator=generator)]
        r = r.view(-1, {"row": W.shape[1], "tensor": len(r)}.get(size, size))
        S, Z = scale_and_zero_point(r, 0, 15, symmetric)
        before.append(r.flatten())
        after.append(dequantize(quantize(r, S, Z, 0, 15), S, Z).flatten())
    return sqnr(torch.cat(before), torch.cat(after))


for name, W_of in weights.items():
    base = sqnr_in_groups(W_of, "tensor")
    print(f"{name}, 4 bits, SQNR above that of one scale a tensor, {base:.1f} dB:")
    for size in ("row", GROUP_SIZE):
        gain = sqnr_in_groups(W_of, size) - base
        left = sqnr_in_groups(W_of, size, shuffle=True) - base
        kept = f"shuffled {left:.1f} dB, {left / gain:.0%} of it"
        print(f"  {units[size]}: {gain:.1f} dB; {kept}")
        part = f"linear_mapping.{name}.{'row' if size == 'row' else 'group'}_gain"
        record(part, gain, "dB", 0.05, model=name)
        record(f"{part}_shuffled", left, "dB", 0.1, model=name)
    gain = sqnr_in_groups(W_of, GROUP_SIZE, symmetric=True) - base
    print(f"  {units[GROUP_SIZE]}, symmetric, not shuffled: {gain:.1f} dB")

# %% [markdown]
# If the shuffled weights keep most of the gain, a group is good because it is *small*: it rarely holds an extreme, and
# when it does, few others suffer. The last line does without zero points; what it falls short of the
# asymmetric groups is what zero points are worth. Among few weights, the minimum and the maximum are rarely equally far from zero.
#
# ## Limits
#
# - Evenly spaced levels suit evenly spread numbers. Weights crowd around zero; NF4, the subject of a later notebook, puts its levels
#   where they are.
# - Minimum and maximum are one choice of a range, at few bits a poor one: `dynamic_range`.
# - The squared error of the weights is not that of the output, and not all weights matter alike. GPTQ rounds with the inputs in
#   view, AWQ scales the weights that matter.
# - The SQNR does not say how many decibels a model needs. That has to be measured, model by model.
# - Nothing was computed with the codes: every product here is one of floats. Integers only: `integer_arithmetic`.
# - The $S^2/12$ law is an average over many numbers in many cells. For one number it says nothing.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: after a ReLU
# *Difficulty 1/5 · 10 minutes · 1 point · no GPU*
#
# A ReLU's output has no negative number. Quantize it to unsigned codes so that no code is wasted, and
# survive an output of zeros only.


# %% tags=["exercise"]
def quantize_relu(x, n_bits):
    """(codes, S) of a tensor `x` >= 0; the zero point is 0, and need not be returned.

    Approach: the range is 0 to max(x); the codes are 0 to 2^n_bits - 1.
    Example: [0, 1, 2, 3] at 2 bits gives the codes [0, 1, 2, 3] and S = 1.
    Hint: for zeros only, S = 1 gives codes 0 and comes back as zeros.
    """
    ### BEGIN SOLUTION
    S = x.max() / (2**n_bits - 1)
    S = torch.where(S > 0, S, 1.0)
    return torch.round(x / S).int(), S
    ### END SOLUTION


# %% tags=["exercise-tests"]
codes, S = quantize_relu(torch.tensor([0.0, 1.0, 2.0, 3.0]), 2)
assert codes.tolist() == [0, 1, 2, 3] and S == 1, "there are 2^n - 1 steps, not 2^n"
codes, S = quantize_relu(torch.zeros(4), 4)
assert codes.tolist() == [0] * 4 and S > 0, "zeros only: do you divide by zero?"
### BEGIN HIDDEN TESTS
probe = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu()
codes, S = quantize_relu(probe, 4)
assert codes.min() == 0 and codes.max() == 15, "all sixteen codes are there to be used"
assert ((codes * S - probe).abs() <= S / 2 * 1.0001).all(), "at most half a step"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: three bits by shifts
# *Difficulty 3/5 · 15 minutes · 2 points · no GPU*
#
# A kernel has no matrix of bits: it loads three bytes, puts them together into one number of 24 bits, and takes eight codes out
# of it by shifts and a mask. Write that.


# %% tags=["exercise"]
def unpack_three_bits(packed):
    """uint8 `[3 k]` to codes `[8 k]`, 3 bits each, lowest bits first.

    Approach: view as [k, 3]; byte 0 is the lowest 8 bits of 24; code i is at bit 3 i.
    Example: 0b11010001, 0b01011000, 0b00011111 begin with the codes 1, 2, 3, 4.
    Hint: make integers of the bytes before you shift: a uint8 has room for 8 bits only.
    """
    ### BEGIN SOLUTION
    triples = packed.view(-1, 3).int()
    word = triples[:, 0] | triples[:, 1] << 8 | triples[:, 2] << 16
    return (word[:, None] >> 3 * torch.arange(8) & 7).flatten()
    ### END SOLUTION


# %% tags=["exercise-tests"]
example = torch.tensor([0b11010001, 0b01011000, 0b00011111], dtype=torch.uint8)
assert unpack_three_bits(example)[:2].tolist() == [1, 2], "code 0 is in the lowest bits"
assert unpack_three_bits(example)[2] == 3, "code 2 straddles bytes 0 and 1"
assert unpack_three_bits(example).numel() == 8, "three bytes hold eight codes"
### BEGIN HIDDEN TESTS
probe = torch.randint(0, 8, (80,), generator=torch.Generator().manual_seed(0))
assert torch.equal(unpack_three_bits(packing.pack(probe, 3)).long(), probe)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: numbers on a grid
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Some numbers take `levels` evenly spaced values, the lowest and the highest among them, and 0. Over their range a grid of $n$
# bits has $2^n - 1$ steps. With how many bits does the round trip lose nothing?


# %% tags=["exercise"]
def exact_bits(levels, most=8):
    """All n_bits from 1 to `most` whose grid holds `levels` evenly spaced values.

    Approach: the values are levels - 1 equal steps apart; when does each of those
    consist of a whole number of the grid's steps?
    Example: 4 levels (3 steps) give [2, 4, 6, 8], since 3, 15, 63, 255 divide by 3.
    Hint: %.
    """
    ### BEGIN SOLUTION
    return [n for n in range(1, most + 1) if (2**n - 1) % (levels - 1) == 0]
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert exact_bits(4) == [2, 4, 6, 8], "count steps, not levels: 4 levels are 3 steps"
assert exact_bits(16) == [4, 8], "five bits are worse than four: 31 steps against 15"
assert exact_bits(12) == [], "no grid of 8 bits or fewer has a multiple of 11 steps"
### BEGIN HIDDEN TESTS
for levels in (2, 4, 6, 8, 16, 18):
    on_grid, exact = torch.linspace(0, 1, levels), []
    for n in range(1, 9):
        back = (on_grid * (2**n - 1)).round() / (2**n - 1)
        if (back - on_grid).abs().max() < 1e-6:  # float32 itself rounds
            exact.append(n)
    assert exact_bits(levels) == exact, levels
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam, D. Kalenichenko, *Quantization and Training of
#   Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR 2018, arXiv 1712.05877 [@jacob2017integer].
# - W. R. Bennett, *Spectra of Quantized Signals*, Bell System Technical Journal 27(3), 446-472, 1948
#   [@bennett1948spectra].
# - S. Gupta, A. Agrawal, K. Gopalakrishnan, P. Narayanan, *Deep Learning with Limited Numerical Precision*, ICML
#   2015, arXiv 1502.02551 [@gupta2015limited].
# - The models: course-lm (trained by this project, see its model card), SmolLM2 [@allal2025smollm2], GPT-2
#   [@radford2019gpt2].
#
# ## Next
#
# `integer_arithmetic`: a layer computed from codes to codes. `dynamic_range`: where to put the ends of the range.

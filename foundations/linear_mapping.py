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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/linear_mapping.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/foundations/linear_mapping.ipynb)
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

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers

# %%
from course_utils.compression import get_method, quantize_model
from course_utils.evaluation import (
    compare,
    compare_all,
    continuations,
    difference,
    format_difference,
    prompt_of,
)
from course_utils.evaluation.estimate import Estimate, with_error
from course_utils.models import linear_layers, load_model

# %%
from course_utils.plotting import (
    error_against_bits,
    nats_against_bits,
    staircase,
    table,
    values_on_grid,
)
from course_utils.plotting.diagrams import (
    bits_in_bytes,
    four_matrices,
    grids_on_a_line,
)
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
# A weight of a neural network is a float of 16 or 32 bits. With $n$ bits there are only $2^{n}$ different
# codes: 256 with eight bits, 16 with four, 4 with two. Which real numbers should the codes stand for, and
# which code should a given number get?
#
# The simplest answer is the **linear** (or *affine*, or *uniform*) mapping to evenly spaced values:
#
# $$ r = S\,(q - Z). $$
#
# | | name | what it is |
# | --- | --- | --- |
# | $r$ | real value | what we want to store |
# | $q$ | code | an integer; all that is stored for each number |
# | $S$ | scale | the step between two neighbouring values, a positive float |
# | $Z$ | zero point | the code of the real number 0; an integer too |
#
# $S$ and $Z$ are shared by many numbers: that is where the saving comes from. Here are twelve weights that share $S = 0.5$ and $Z = 2$, with codes of three bits.

# %% tags=["nbval-check-output"]
W = torch.tensor(
    [[-1, 0.2, 0.9, 2.5], [0.6, -0.4, 0, 1.3], [1.9, -0.7, 0.3, 2.2]]
)  # [out=3, in=4]
q = (torch.round(W / 0.5) + 2).int()
print(q.tolist())

# %%
figure = four_matrices(W, q, 0.5 * (q - 2))
plt.show()

# %% [markdown]
# *Figure: the 3 by 4 matrix four times: as floats, as codes, as what the codes stand for, and as the error. Red is positive and blue negative; darker codes are larger.*
#
# Only the second matrix is stored, in 3 bits a weight. The third looks like the first, and no error is larger than 0.25, half a step. The **objective** is to keep the
# squared error small. Behind it stands another one, which no formula gives: the quality of the model.
#
# ## By hand
#
# Who chooses $S$ and $Z$? Let our numbers lie between -1 and 3, and let the codes be 0 to 255. Spread the range over the 255 steps between
# the codes, and let the lowest number get the code 0:
#
# $$ S = \frac{r_{max} - r_{min}}{q_{max} - q_{min}}, \qquad
# Z = q_{min} - \mathrm{round}(r_{min} / S), \qquad
# q = \mathrm{clamp}\big(\mathrm{round}(r / S) + Z,\; q_{min},\; q_{max}\big). $$

# %%
S = (3 - -1) / (255 - 0)
Z = 0 - round(-1 / S)
rows = []
for r in (0.5, 0.0, -1.0, 3.0, 3.5):
    q = min(max(round(r / S) + Z, 0), 255)
    back = S * (q - Z)
    rows.append({"r": r, "r / S": r / S, "code": q, "back": back, "error": r - back})
print(f"S = 4 / 255 = {S:.6f},  Z = round({1 / S:.2f}) = {Z},  S / 2 = {S / 2:.5f}")
table(rows, {"r": "g", "r / S": ".2f", "back": "+.5f", "error": "+.5f"})

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

# %%
figure = staircase(scale=0.5, zero_point=2, low=0, high=7)
plt.show()

# %% [markdown]
# *Figure: the mapping of the twelve weights above. Left: a staircase of eight steps from -1 to 2.5, flat outside. Right: the error, a sawtooth between
# two dotted lines at half a step, which grows without bound in the two shaded regions outside.*
#
# Inside the range the error never leaves the band of half a step. Outside it grows with the number.
#
# ## The two functions
#
# The same on tensors. `S` and `Z` may have any shape that broadcasts against `r`.


# %%
def quantize(r, S, Z, low, high):
    """Real numbers to integer codes (int32)."""
    return (torch.round(r * (1 / S)) + Z).clamp(low, high).int()


def dequantize(q, S, Z):
    """Integer codes to real numbers."""
    return S * (q - Z)


# %% tags=["nbval-check-output"]
r = torch.tensor([-1.0, -0.2, 0.0, 0.5, 3.0])
S, Z = torch.tensor(4 / 255), torch.tensor(64)
q = quantize(r, S, Z, 0, 255)
signed = quantize(r, S, Z - 128, -128, 127)
assert torch.equal(dequantize(q, S, Z), dequantize(signed, S, Z - 128))
print("unsigned codes:", q.tolist())
print("signed codes:  ", signed.tolist())

# %% [markdown]
# Unsigned codes run from 0 to 255, signed ones from -128 to 127. Subtract 128 from every code and from $Z$, and the same numbers come back: only the names
# differ.
#
# ## A surprise: 14 comes back as 12
#
# **Asymmetric** grids take the range from minimum to maximum, as above, widened to hold 0. **Symmetric** grids take it from $-a$ to $a$, with $a$ the largest
# magnitude (*absmax*). Then $Z$ is a constant and need not be stored. But $2^n$ codes are an even number, and a grid with 0 in its middle has an odd number. There are
# two conventions:
#
# - **Half codes.** Use all codes, -4 to 3 with three bits, and divide the range by $2^n - 1$ steps: $S = 2a / (2^n - 1) = a / 3.5$. The step is small, and the positive
#   end lies half a step beyond the last code.
# - **Narrow.** Leave out the lowest code and divide by what is left: $S = a / 3$, with codes -3 to 3. In 8 bits that is $a / 127$. Both ends are codes.
#
# Take five numbers, of which 14 is the largest.

# %%
values = torch.tensor([-6.0, -1, 2, 5, 14])
figure = grids_on_a_line(
    {
        "half codes": (14 / 3.5, 0, -4, 3),
        "narrow": (14 / 3, 0, -3, 3),
        "asymmetric": (20 / 7, 2, 0, 7),
    },
    values,
    watched=14.0,
)
plt.show()

# %% [markdown]
# *Figure: three grids of three bits on the same number line. Dots are codes, zero in green. Arrows go from five numbers to their codes. Where an arrow is orange, two numbers share a code.*
#
# With half codes 14 is 3.5 steps from zero. It would get the code 4, there is none, and it comes back as 12: half a step is lost at that end. The narrow grid returns it exactly, with
# coarser steps everywhere. The asymmetric grid has the finest steps, since it spends no code below -6. Which is better on many numbers? We draw a million normal ones, with a scale for
# each 64.


# %%
def grid(minimum, maximum, n_bits, kind="asymmetric"):
    """(S, Z, low, high) for signed codes; S and Z have the shape of `minimum`."""
    low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    a = torch.maximum(-minimum, maximum)
    if kind == "half codes":
        return a / ((high - low) / 2), 0, low, high
    if kind == "narrow":
        return a / high, 0, low + 1, high
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    S = (maximum - minimum) / (high - low)
    return S, (low - torch.round(minimum / S)).clamp(low, high).int(), low, high


# %%
def round_trip(r, n_bits, kind="asymmetric"):
    """What comes back of `r` `[rows, n]`, with a grid for each row."""
    S, Z, low, high = grid(*r.aminmax(dim=-1, keepdim=True), n_bits, kind)
    return dequantize(quantize(r, S, Z, low, high), S, Z)


def sqnr(r, back):
    """Signal over quantization noise, in decibels: 10 log10(sum r^2 / sum error^2)."""
    noise = (r - back).square().sum().item()
    return 10 * math.log10(r.square().sum().item() / noise) if noise else math.inf


# %% [markdown]
# The **SQNR** puts the squared error into proportion. At 20 dB the noise has one percent of the signal's power, at 40 dB one in ten thousand.

# %%
bell = torch.randn(16_000, 64, generator=generator)  # [groups, GROUP_SIZE]
kinds, conventions = ("half codes", "narrow", "asymmetric"), []
for n_bits in (8, 4, 3, 2):
    row = {kind: sqnr(bell, round_trip(bell, n_bits, kind)) for kind in kinds}
    conventions.append({"bits": n_bits, **row})
table(conventions, dict.fromkeys(kinds, ".2f"))

# %% tags=["folded"]
# Record the three conventions, in dB.
for row in conventions:
    for kind in kinds:
        key = f"linear_mapping.normal.w{row['bits']}.{kind.replace(' ', '_')}"
        record(key, row[kind], "dB", 0.05, model="normal")

# %% [markdown]
# At 3 bits, in the recorded run, half codes have {{linear_mapping.normal.w3.half_codes:.2f}} dB and narrow ones {{linear_mapping.normal.w3.narrow:.2f}} dB, at 2 bits
# {{linear_mapping.normal.w2.half_codes:.2f}} and {{linear_mapping.normal.w2.narrow:.2f}}. At 8 bits the choice hardly matters. Asymmetric grids are ahead at every width here, since among 64 numbers
# the minimum and the maximum are rarely equally far from zero.
#
# The course's round-to-nearest uses half codes where it is symmetric, as PyTorch's observers do. LLM.int8() and SmoothQuant use the narrow range, as their papers do. From here on all grids are asymmetric.
#
# And after a ReLU, where no number is negative?

# %%
relu, rows = bell.relu(), []
for kind in kinds:
    S, Z, low, high = grid(*relu.aminmax(dim=-1, keepdim=True), 4, kind)
    q = quantize(relu, S, Z, low, high)
    db = sqnr(relu, dequantize(q, S, Z))
    rows.append({"4 bits": kind, "codes used": len(q.unique()), "SQNR, dB": db})
table(rows, {"SQNR, dB": ".1f"})

# %% [markdown]
# A symmetric grid spends half of its codes on negative numbers that do not occur, and loses about 6 dB, the worth of one bit. Hence a habit: activations asymmetric, weights
# symmetric where a kernel wants to save the zero point.
#
# ## Rounding ties
#
# A number exactly between two codes is a **tie**. `torch.round` takes the even neighbour, schoolbook rounding goes away from zero. **Stochastic** rounding goes up
# with a probability equal to the fractional part, so that it is right on average for *every* number [@gupta2015limited].


# %% tags=["nbval-check-output"]
def half_away(x):
    return x.sign() * (x.abs() + 0.5).floor()


ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
print("ties      ", ties.tolist())
print("half even ", ties.round().int().tolist())
print("half away ", half_away(ties).int().tolist())


# %%
def stochastic(x):
    chance = torch.rand(x.shape, generator=generator)
    return x.floor() + (chance < x - x.floor())


# %%
rules = {"half even": torch.round, "half away": half_away, "stochastic": stochastic}
anywhere = 10 * torch.rand(100_000, generator=generator)  # unit: one step
rows = []
for name, rule in rules.items():
    updated, error = torch.zeros(1000), rule(anywhere) - anywhere
    for _ in range(100):  # a hundred updates of a tenth of a step
        updated = rule(updated + 0.1)
    rows.append({"rule": name, "squared error": error.square().mean().item()})
    rows[-1]["a hundred times + 0.1"] = updated.mean().item()
table(rows, {"squared error": ".3f", "a hundred times + 0.1": ".2f"})

# %% [markdown]
# For numbers anywhere the first two rules do the same, with a squared error of 1/12 = 0.083 of a step's square. One draw of stochastic rounding has twice as much.
# But it alone lets small updates add up: a hundred tenths become about 10, where rounding to the nearest loses each of them. That is why training in few bits uses it.
#
# Nothing says that a range must reach the largest number. A narrower one clips a few numbers and rounds the others in finer steps. How to find the best range is the
# subject of `dynamic_range`. We go on with ranges that clip nothing.
#
# ## How large is the error? The $S^2/12$ law
#
# Suppose that within a cell, the interval of width $S$ around a level, the numbers are spread evenly. Then the rounding error is
# uniform between $-S/2$ and $S/2$, and its mean square is [@bennett1948spectra]
#
# $$ \frac1S \int_{-S/2}^{S/2} e^2\, de = \frac{S^2}{12} . $$
#
# One bit more about halves the step, and so divides the noise by about four: $10 \log_{10} 4 = 6.02$. **Every bit is worth about 6 dB**, says the law, of whatever numbers. We test it on three
# made-up sources and on the layer with the longest tail in a real model, with one scale for the whole matrix (tensor), one a row, or one a
# group of neighbours in a row.

# %%
models = profile.load_models()
first = next(iter(models))
layers = linear_layers(models[first].model)
weights = {x.name: x.weight.float().cpu() for x in layers}  # [out, in] each
peaks = {name: (W.abs().max() / W.std()).item() for name, W in weights.items()}
layer = max(peaks, key=peaks.get)
W = weights[layer]
print(f"{first}, {layer}: {list(W.shape)},", end=" ")
print(f"largest weight {peaks[layer]:.1f} standard deviations")

# %%
laplace = torch.empty(1, 100_000).exponential_(generator=generator)
laplace *= 2 * torch.randint(0, 2, laplace.shape, generator=generator) - 1  # the sign
sources = {
    "uniform": torch.rand(1, 100_000, generator=generator),
    "normal": torch.randn(1, 100_000, generator=generator),
    "Laplace": laplace,
    "tensor": W.reshape(1, -1),
    "row": W,
    "group": W.reshape(-1, GROUP_SIZE),
}


# %%
def by_law(r, n_bits):
    """SQNR in dB if every error squared were S^2 / 12."""
    S = grid(*r.aminmax(dim=-1, keepdim=True), n_bits)[0]
    noise = (S.square() / 12).mean().item()
    return 10 * math.log10(r.square().mean().item() / noise)


# %%
all_bits, measured, law = [2, 3, 4, 5, 6, 7, 8], {}, {}
for name, r in sources.items():
    measured[name] = [sqnr(r, round_trip(r, n)) for n in all_bits]
    law[name] = [by_law(r, n) for n in all_bits]

# %%
panels, theory = {}, {}
for title, names in {
    "made-up sources": ("uniform", "normal", "Laplace"),
    f"weights: {layer}": ("tensor", "row", "group"),
}.items():
    panels[title] = {name: (all_bits, measured[name]) for name in names}
    theory[title] = {name: (all_bits, law[name]) for name in names}
figure = error_against_bits(panels, "SQNR (dB)", theory=theory)
plt.show()

# %% [markdown]
# *Figure: SQNR against bits per code. Left a uniform, a normal and a Laplace source, right the layer's weights with one
# scale for the tensor, one a row, one a group. Solid lines are measured, dashed lines are the law.*

# %%
rows = []
for name in sources:
    for kind, of in (("measured", measured), ("law", law)):
        rows.append({"SQNR, dB": f"{name}, {kind}"})
        rows[-1] |= {f"{n} bits": v for n, v in zip(all_bits, of[name], strict=True)}
apart = {n: {k: measured[k][n - 2] - law[k][n - 2] for k in sources} for n in all_bits}
table(rows, {f"{n} bits": ".1f" for n in all_bits})

# %% tags=["folded"]
# Record how far measurement and law are apart, and the share of zeros.
worst = max(abs(value) for value in apart[8].values())
record("linear_mapping.law.apart_8", worst, "dB", 0.05, model=first)
record("linear_mapping.law.tensor_3", apart[3]["tensor"], "dB", 0.05, model=first)
record("linear_mapping.peak", peaks[layer], "", 0.01, model=first)
zeros = {}
for name in ("tensor", "row", "group"):
    for n_bits in (8, 4, 3, 2):
        back = round_trip(sources[name], n_bits)
        zeros[name, n_bits] = (back == 0).float().mean().item()
        key = f"linear_mapping.zeros.{name}_{n_bits}"
        record(key, zeros[name, n_bits], "", 0.005, model=first)

# %% [markdown]
# **Where it holds.** At 8 bits, in the recorded run, law and measurement are at most {{linear_mapping.law.apart_8:.2f}} dB apart, for all six. Every curve rises by about 6 dB a bit, or somewhat more at few bits, since
# there are $2^n - 1$ steps and not $2^n$. The *slope* is the same for all; the *height* differs. Numbers with a long tail need a wide range, most of which is empty.
#
# **Where it breaks, first**: few bits and a long tail. At 3 bits the tensor's measured SQNR lies {{linear_mapping.law.tensor_3:.1f}} dB *above* the law. That sounds good. Let us count the weights that come back as zero.

# %%
rows = []
for name in ("tensor", "row", "group"):
    row = {f"{n} bits": zeros[name, n] for n in (8, 4, 3, 2)}
    rows.append({"weights that become 0, one scale a": name, **row})
table(rows, {f"{n} bits": ".0%" for n in (8, 4, 3, 2)})

# %% [markdown]
# With one scale for the tensor {{linear_mapping.zeros.tensor_3:.0%}} of the weights become zero at 3 bits in the recorded run, and with one a group {{linear_mapping.zeros.group_3:.0%}}. The step is wider than the bulk of the weights. Most lie
# within half a step of zero, the **dead zone**, and their error is their own size. That is less than the law says, and yet hardly a signal is left.
#
# **Where it breaks, second**: numbers that lie on a grid already. Sixteen evenly spaced values need four bits, and then the error is
# zero. With five bits it is worse than with four (exercise 3). SmolLM2, as the course gets it, was stored in 4 bits once. Its weights lie on such grids, and
# flatter every 4-bit method whose grid is the same. So the course compares 4-bit methods on `smollm2-135m-dithered`: the same weights, with seeded noise of one step inside each cell.
# In each layer the 5% of columns that carry the largest inputs stay without noise, which would do most of its damage there. The price of the noise is measured below.
#
# ## Whose scale? Tensor, row, group
#
# The **granularity** says how many weights share a scale. Here is one row of the
# layer, with the levels of the whole tensor at four bits, and with its own.

# %%
middle = int(W.abs().amax(1).argsort()[len(W) // 2])  # the row of the median absmax
row, panels = W[middle : middle + 1], {}
for title, shared in {"the tensor's levels": sources["tensor"], "its own": row}.items():
    S, Z, low, high = grid(*shared.aminmax(), 4)
    levels = dequantize(torch.arange(low, high + 1), S, Z)
    levels = levels[levels.abs() <= row.abs().max() + S.item()]
    db = sqnr(row, dequantize(quantize(row, S, Z, low, high), S, Z))
    panels[f"row {middle}, {title}: {db:.1f} dB"] = (row[0], levels)
figure = values_on_grid(panels)
plt.show()

# %% [markdown]
# *Figure: two histograms of the same row of weights with the 4-bit levels as vertical lines. Above, the levels of the whole
# tensor; below, the row's own sixteen levels. The titles give the SQNR.*
#
# Few levels of the tensor fall where the row has weights. The row's own sixteen span just the row.
#
# Finer scales cost bits. With a float16 scale and a zero point of $n$ bits for each group of $g$ weights, a weight takes
# $n + (16 + n) / g$ bits:

# %% tags=["nbval-check-output"]
rows = []
for g in (1024, 128, 64, 32, 16):
    row = {f"{n} bits": n + (16 + n) / g for n in (8, 4, 3, 2)}
    rows.append({"weights that share a scale": g, **row})
table(rows, {f"{n} bits": ".3f" for n in (8, 4, 3, 2)})

# %% [markdown]
# Groups of 16 at three bits cost more than four bits with 1,024 to a scale. Are fine scales worth their bits? We measure that below.
#
# ## Packing
#
# A computer stores bytes. A 4-bit code in a byte of its own saves nothing over eight bits, so the codes are **packed**: written
# one after the other into a stream of bits, lowest bit first, which is then cut into bytes.


# %%
def pack(codes, n_bits):
    """Codes `[n]` to bytes `[ceil(n * n_bits / 8)]`, lowest bit first."""
    bits = codes[:, None] >> torch.arange(n_bits) & 1  # [n, n_bits]
    stream = F.pad(bits.flatten(), (0, -bits.numel() % 8))  # zeros fill the last byte
    return (stream.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


# %% tags=["nbval-check-output"]
codes = torch.tensor([1, 2, 3, 0])
print({n: pack(codes, n).tolist() for n in (8, 4, 3, 2)})

# %%
figure = bits_in_bytes(codes, 8, 4, 3, 2)
plt.show()

# %% [markdown]
# *Figure: the codes 1, 2, 3, 0 in 8, 4, 3 and 2 bits. Each colour is one code. Byte 0 is on the right, so that all bytes together read as one binary number.*
#
# In 2, 4 and 8 bits a byte holds a whole number of codes. In 3 bits the third code straddles two bytes, and the last bits of the second are padding (grey). Eight such codes fill three
# bytes without waste. Unpacking goes the same way back.


# %%
def unpack(packed, n_bits, n):
    """The first `n` codes of `pack`'s bytes."""
    stream = (packed[:, None].int() >> torch.arange(8) & 1).flatten()
    bits = stream[: n * n_bits].view(n, n_bits)
    return (bits << torch.arange(n_bits)).sum(1).int()


# %% tags=["nbval-check-output"]
for n_bits in (8, 4, 3, 2):
    codes = torch.arange(1000) % 2**n_bits
    assert torch.equal(unpack(pack(codes, n_bits), n_bits, 1000), codes.int())
    print(f"1000 codes of {n_bits} bits: {len(pack(codes, n_bits))} bytes")

# %% [markdown]
# ## A whole model
#
# `quantize_model` replaces every linear layer by one that holds packed codes, scales and zero points, and nothing of the
# float weight. Embeddings, LM head and all inputs stay in float. Each weight gets its nearest code: the method is
# known as **round to nearest**. We try four widths and three granularities.
#
# The measure is the loss in **nats** per token: the mean of $-\log p$, with $p$ the probability that the model gave to the token that came. We give what the quantized model
# loses *more* than the float one on the same tokens, the start of each evaluation document of the CIA World Factbook, with one standard error over documents. **Perplexity** is $e$ to the loss: about the number of tokens among which the model
# hesitates.


# %%
def protocol(name, model):
    """The course's protocol; 1,024 tokens for models larger than course-lm."""
    full = profile.protocol(model)
    return full if name == "course-lm" else replace(full, tokens=1024)


units = {"tensor": "tensor", "row": "row", GROUP_SIZE: f"group of {GROUP_SIZE}"}
texts = {k: protocol(k, m).text(tokenizer) for k, (m, tokenizer) in models.items()}


# %%
def rounded(model, group_size):
    """The model at 8, 4, 3 and 2 bits, by name, and the reports."""
    made, reports = {}, {}
    for n_bits in (8, 4, 3, 2):
        method = get_method("affine", n_bits=n_bits, group_size=group_size)
        made[f"{n_bits} bits"] = copy.deepcopy(model)
        reports[f"{n_bits} bits"] = quantize_model(made[f"{n_bits} bits"], method)
    return made, reports


# %%
found, bits, in_groups = {}, {}, {}
for name, (model, _) in models.items():
    for size in units:
        made, reports = rounded(model, size)
        found[name, size] = compare_all(made, model, texts[name])
        bits[name, size] = {k: r.bits_per_weight for k, r in reports.items()}
    in_groups[name] = made  # the last size: groups
    print(f"{name}, float: perplexity {found[name, 'row']['8 bits'].reference}")

# %%
rows = []
for (name, size), of_bits in found.items():
    for width, c in of_bits.items():
        row = {"model": name, "one scale a": units[size], "codes": width}
        row["bits per weight"] = bits[name, size][width]
        row |= {"nats lost": c.loss.value, "±": c.loss.error}
        rows.append(row | {"perplexity": c.perplexity.perplexity})
formats = {"bits per weight": ".3f", "nats lost": "+.3f", "±": ".3f"}
table(rows, formats | {"perplexity": ".4g"})

# %% tags=["folded"]
# Record the table, and the paired difference of two variants.
for (name, size), of_bits in found.items():
    by = {"model": name, **protocol(name, models[name].model).fields}
    for width, c in of_bits.items():
        part = size if isinstance(size, str) else f"g{size}"
        key = f"linear_mapping.{name}.w{width[0]}_{part}"
        record(f"{key}.bits_per_weight", bits[name, size][width], "bits", 1e-6, **by)
        near = c.loss.value < 1  # beyond that a digit may turn much
        record(f"{key}.loss", c.loss.value, "nats", 0.03 if near else None, **by)
        record(f"{key}.loss_error", c.loss.error, "nats", 0.02 if near else None, **by)
        ppl = c.perplexity.perplexity
        record(f"{key}.perplexity", ppl, "", 0.05 * ppl if near else None, **by)
    float_ppl = of_bits["8 bits"].reference.perplexity
    record(f"linear_mapping.{name}.float.perplexity", float_ppl, "", 0.05, **by)
for name in models:
    fine, coarse = found[name, GROUP_SIZE]["3 bits"], found[name, "tensor"]["4 bits"]
    less = difference(fine, coarse)
    record(f"linear_mapping.{name}.fine_less_coarse", less.value, "nats", None)
    record(f"linear_mapping.{name}.fine_less_coarse_error", less.error, "nats", None)
    print(f"{name}, 3 bits in groups less 4 bits a tensor: {format_difference(less)}")

# %%
panels = {name: {unit: ([], [], []) for unit in units.values()} for name in models}
for (name, size), of_bits in found.items():
    for width, c in of_bits.items():
        if c.loss.value < 2:
            point = bits[name, size][width], c.loss.value, c.loss.error
            for column, value in zip(panels[name][units[size]], point, strict=True):
                column.append(value)
figure = nats_against_bits(panels)
plt.show()

# %% [markdown]
# *Figure: nats lost against measured bits per weight, one panel a model, one curve a granularity, with points at 2, 3, 4 and 8 bits. Points that lose 2 nats or more are left out; the
# table has them. Hollow points are not distinguished from the float model.*
#
# Eight bits with a scale a row or a group are hardly to be told from float. Then the loss rises with every bit less, and it rises first for the coarse scales. On course-lm, in the recorded run, 4 bits cost
# {{linear_mapping.course-lm.w4_tensor.loss:.3f}} ± {{linear_mapping.course-lm.w4_tensor.loss_error:.3f}} nats with one scale a tensor and {{linear_mapping.course-lm.w4_g64.loss:.3f}} ± {{linear_mapping.course-lm.w4_g64.loss_error:.3f}} in groups. **Three bits in groups beat four
# bits with one scale a tensor**, by a paired {{linear_mapping.course-lm.fine_less_coarse:+.3f}} ± {{linear_mapping.course-lm.fine_less_coarse_error:.3f}} nats, and at fewer bytes.
#
# On SmolLM2, whose tails are longer, one scale a tensor fails at 4 bits: {{linear_mapping.smollm2-135m-dithered.w4_tensor.loss:.1f}} nats, worse than guessing evenly among its 49,152 tokens would be. Groups lose {{linear_mapping.smollm2-135m-dithered.w4_g64.loss:.2f}} ±
# {{linear_mapping.smollm2-135m-dithered.w4_g64.loss_error:.2f}}. What do such losses mean? We let the largest model of the profile speak.

# %%
name = list(models)[-1]
model, tokenizer = models[name]
speakers = {"float": model, **in_groups[name]}
print(continuations(speakers, tokenizer, prompt_of(name), new_tokens=16))

# %% [markdown]
# The 8-bit model says what the float model says, nearly or to the letter. With fewer bits the text goes other ways; at 2 bits hardly any language is left. One text proves nothing; it shows the size of a nat.
#
# The noise inside the cells of SmolLM2's old grid has a price too. We compare the dithered model with the plain one on the same tokens.

# %% tags=["folded"]
# The dithered SmolLM2 against the plain one, where the profile has it.
if "smollm2-135m-dithered" in models:
    how = {"dtype": profile.dtype, "device": profile.device}
    plain = load_model("smollm2-135m-q4_1", **how).model
    cost = compare(model, plain, texts[name])
    print(f"smollm2-135m-dithered: {cost}")
    by = {"model": name, **protocol(name, model).fields}
    record("linear_mapping.dithered.loss", cost.loss.value, "nats", 0.01, **by)
    record("linear_mapping.dithered.loss_error", cost.loss.error, "nats", None, **by)
else:
    print("This profile has no dithered model; `cpu` compares it with the plain one.")

# %% [markdown]
# In the recorded run the noise costs {{linear_mapping.dithered.loss:.3f}} ± {{linear_mapping.dithered.loss_error:.3f}} nats per token. Methods of 4 bits and fewer all start from the dithered model,
# so no comparison between them contains this price.
#
# ## Why do groups help? A control
#
# Perhaps **neighbours are alike**: rows and groups differ in size, and each gets the scale that fits it. Or
# perhaps it is **only their number**: among few numbers the largest is less extreme than among a million, whatever they are. The
# control tells them apart: shuffle all weights of a layer, then quantize. What is left of the gain is due to number alone. We take the gain of each layer of the smaller model at 4 bits, and its mean over layers.


# %%
def gains(W):
    """4-bit SQNR over that of one scale a tensor, in dB: in order and shuffled."""
    r = W.reshape(1, -1)
    mixed = r[:, torch.randperm(r.numel(), generator=generator)]
    base = sqnr(r, round_trip(r, 4))
    gained = {}
    for size, n in (("row", W.shape[1]), ("group", GROUP_SIZE)):
        both = r.view(-1, n), mixed.view(-1, n)
        gained[size] = [sqnr(x, round_trip(x, 4)) - base for x in both]
    return gained


# %%
def over_layers(values):
    """Mean and standard error over layers."""
    error = values.std().item() / len(values) ** 0.5
    return Estimate(values.mean().item(), error, len(values), "layers")


# %%
rows, control = [], {}
of_layers = [gains(W) for W in weights.values()]
for size in ("row", "group"):
    both = torch.tensor([g[size] for g in of_layers])  # [layers, 2]
    ordered, shuffled, lost = map(over_layers, (*both.T, both[:, 0] - both[:, 1]))
    control[size] = ordered, shuffled, lost, shuffled.value / ordered.value
    row = {"one scale a": size, "kept": control[size][3]}
    for title, e in (("gain", ordered), ("shuffled", shuffled), ("less", lost)):
        row[f"{title}, dB"] = with_error(e.value, e.error)
    rows.append(row)
table(rows, {"kept": ".0%"})

# %% tags=["folded"]
# Record the control.
for size, (ordered, shuffled, lost, kept) in control.items():
    key = f"linear_mapping.{first}.{size}_gain"
    record(key, ordered.value, "dB", 0.05, model=first)
    record(f"{key}_shuffled", shuffled.value, "dB", 0.1, model=first)
    record(f"{key}_lost", lost.value, "dB", 0.1, model=first)
    record(f"{key}_lost_error", lost.error, "dB", 0.1, model=first)
    record(f"{key}_kept", kept, "", 0.02, model=first)

# %% [markdown]
# It is mostly the number. On course-lm, in the recorded run, shuffled weights keep {{linear_mapping.course-lm.group_gain_kept:.0%}} of the gain of groups and {{linear_mapping.course-lm.row_gain_kept:.0%}} of that of rows. A group is good because it is *small*: it rarely holds an
# extreme weight. The rest is real as well: order is worth {{linear_mapping.course-lm.row_gain_lost:.2f}} ± {{linear_mapping.course-lm.row_gain_lost_error:.2f}} dB for rows, so rows do differ in size.
#
# ## Is it right? The package, PyTorch and llama.cpp
#
# What you have read is what `course_utils` holds, in a few small modules. Codes and bytes have to be equal, not close. PyTorch's `fake_quantize` goes to the codes and back, as we do. Its older
# `quantize_per_tensor` may round $r/S + Z$ where we round $r/S$ and then add $Z$. At a tie with an odd $Z$ the even
# neighbour is then another one.

# %% tags=["folded"]
# Our functions against the package's and PyTorch's: all codes, bytes and values.
from course_utils.grids import uniform
from course_utils.kernels import packing

S, Z, low, high = grid(*W.aminmax(dim=1, keepdim=True), 4)
codes = quantize(W, S, Z, low, high)
theirs = uniform.scale_and_zero_point(*W.aminmax(dim=1), low, high, symmetric=False)
assert torch.equal(theirs[0], S[:, 0]) and torch.equal(theirs[1], Z[:, 0])
assert torch.equal(uniform.quantize(W, S, Z, low, high), codes)
assert torch.equal(uniform.dequantize(codes, S, Z), dequantize(codes, S, Z))
stored = packing.pack(codes + 8, 4)  # uint8 [out, in / 2]
assert torch.equal(stored[0], pack(codes[0] + 8, 4))
assert torch.equal(packing.unpack(stored, 4, W.shape[1]), (codes + 8).to(torch.uint8))
fake = torch.fake_quantize_per_channel_affine(W, S[:, 0], Z[:, 0], 0, low, high)
assert torch.equal(fake, dequantize(codes, S, Z))
print(f"{codes.numel():,} codes, {stored.numel():,} bytes: all equal")
print("six ties with S = 1, Z = 3; our codes:", quantize(ties, 1.0, 3, 0, 255).tolist())
if hasattr(torch, "quantize_per_tensor"):  # torch announces that it will go
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.quantize_per_tensor(ties, 1.0, 3, torch.quint8).int_repr()
    print("quantize_per_tensor:                  ", theirs.tolist())

# %% [markdown]
# All codes, bytes and values agree; at ties the older function may take the other neighbour. A model's weights are hardly ever at a tie.
#
# llama.cpp runs language models on ordinary computers, from files in formats of its own (`gguf`). Its `Q4_1` stores blocks of 32
# weights: a float16 step $d$, a float16 **minimum** $m$ in the place of an integer zero point, and 32 codes of four bits;
# $\hat r = d\,q + m$. We compare it with our format at the same group size.

# %% tags=["folded"]
# The layer in Q4_1, by gguf and by the package, and in our format.
import gguf
import numpy as np

stored = get_method("gguf", kind="Q4_1").quantize(W)
theirs = gguf.quants.quantize(W.numpy(), gguf.GGMLQuantizationType.Q4_1)
assert np.array_equal(stored.blocks, theirs)
print(f"course_utils writes the same {theirs.nbytes:,} bytes for the layer as gguf")
own = get_method("affine", n_bits=4, group_size=32).quantize(W)
for title, kept in (("Q4_1, float16 minimum", stored), ("ours, zero point", own)):
    db = sqnr(W, kept.dequantize())
    print(f"{title:22} {kept.bits_per_weight:.3f} bits per weight, {db:.2f} dB")
    key = f"linear_mapping.formats.{title.split(',')[0]}"
    record(f"{key}.sqnr", db, "dB", 0.02, model=first)
    record(f"{key}.bits_per_weight", kept.bits_per_weight, "bits", 1e-6, model=first)

# %% [markdown]
# The package writes gguf's bytes. In the recorded run `Q4_1` takes {{linear_mapping.formats.Q4_1.bits_per_weight:.3f}} bits per weight for {{linear_mapping.formats.Q4_1.sqnr:.2f}} dB, and ours {{linear_mapping.formats.ours.bits_per_weight:.3f}} for
# {{linear_mapping.formats.ours.sqnr:.2f}} dB: an integer zero point is cheaper than a float minimum, and moves the grid by up to half a step.
#
# ## What you saw
#
# - **To codes and back.** $r = S(q - Z)$ gave 0 back exactly, and every number inside the range within half a step. Outside, the error had no bound. Symmetric grids come in two conventions; with half codes the largest positive number comes back half a step short.
# - **The error before measuring.** $S^2/12$ was right within {{linear_mapping.law.apart_8:.2f}} dB at 8 bits in the recorded run, and failed at few bits, where the dead zone took {{linear_mapping.zeros.tensor_3:.0%}} of one layer's weights at 3 bits.
# - **Scales.** Three bits in groups of 64 beat four bits with one scale a tensor on course-lm, by {{linear_mapping.course-lm.fine_less_coarse:+.3f}} ± {{linear_mapping.course-lm.fine_less_coarse_error:.3f}} nats. The control found {{linear_mapping.course-lm.group_gain_kept:.0%}} of the gain in decibels without the weights' order: groups help because they are small.
# - **Bytes.** Codes were packed without waste. They equal PyTorch's codes, and `Q4_1`'s bytes equal llama.cpp's.
# - **A model.** In groups of 64, course-lm lost {{linear_mapping.course-lm.w8_g64.loss:+.4f}} ± {{linear_mapping.course-lm.w8_g64.loss_error:.4f}} nats at 8 bits, {{linear_mapping.course-lm.w4_g64.loss:+.3f}} ± {{linear_mapping.course-lm.w4_g64.loss_error:.3f}} at 4, {{linear_mapping.course-lm.w3_g64.loss:+.3f}} ± {{linear_mapping.course-lm.w3_g64.loss_error:.3f}} at 3 and {{linear_mapping.course-lm.w2_g64.loss:+.2f}} ± {{linear_mapping.course-lm.w2_g64.loss_error:.2f}} at 2.
#
# ## Limits
#
# - Evenly spaced levels suit evenly spread numbers. Weights crowd around zero; NF4 puts its levels where they are.
# - Minimum and maximum are one choice of a range, at few bits a poor one: `dynamic_range`.
# - The squared error of the weights is not that of the output, and not all weights matter alike. GPTQ rounds with the inputs in
#   view, AWQ scales the weights that matter.
# - Nothing was computed with the codes: every product here is one of floats. Integers only: `integer_arithmetic`.
# - SmolLM2 was measured on 1,024 tokens only. The errors say what that is worth.
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
# survive an output of zeros only. The codes may have any integer type that holds them.


# %% tags=["exercise"]
def quantize_relu(x, n_bits):
    """(codes, S) of a tensor `x` >= 0; the zero point is 0, and need not be returned.

    Approach: the range is 0 to max(x); the codes are 0 to 2^n_bits - 1.
    Example: [0, 1, 2, 3] at 2 bits gives the codes [0, 1, 2, 3] and S = 1.
    Hint: for zeros only, return codes 0 and S = 1.
    """
    ### BEGIN SOLUTION
    S = x.max() / (2**n_bits - 1)
    S = torch.where(S > 0, S, 1.0)
    return torch.round(x / S).int(), S
    ### END SOLUTION


# %% tags=["exercise-tests"]
codes, S = quantize_relu(torch.tensor([0.0, 0.75, 1.25, 3.0]), 2)
assert S == 1, "S is the range over 2^n - 1 steps, not over 2^n or half of them"
assert codes.tolist() == [0, 1, 1, 3], "0.75 is nearer to 1: round, do not cut off"
codes, S = quantize_relu(torch.tensor([0.0, 51.0, 128.25, 255.0]), 8)
assert codes.tolist() == [0, 51, 128, 255], "255 does not fit into int8: it wraps to -1"
codes, S = quantize_relu(torch.zeros(4), 4)
assert S == 1, "zeros only: S is 1 then; do you divide by zero?"
assert codes.tolist() == [0] * 4, "zeros only: their codes are 0"
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(0)
whole = torch.randint(0, 16, (200,), generator=draw)
whole[0] = 15
near = torch.randint(-3, 4, (200,), generator=draw) / 8  # no ties
probe = ((whole + near) * 0.25).clamp(0, 15 * 0.25)
codes, S = quantize_relu(probe, 4)
probe_max = probe.max().item()
assert abs(S - probe_max / 15) < 1e-6, "S is max(x) / 15 at four bits"
assert codes.tolist() == torch.round(probe / (probe_max / 15)).tolist(), "nearest codes"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: three bits by shifts
# *Difficulty 3/5 · 15 minutes · 2 points · no GPU*
#
# A kernel has no matrix of bits: it loads three bytes, puts them together into one number of 24 bits, and takes eight codes out
# of it by shifts and a mask. Write that, for any number of triples.


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
found = unpack_three_bits(example).tolist()
assert len(found) == 8, "three bytes hold eight codes"
assert found[:2] == [1, 2], "code 0 is in the lowest bits of byte 0"
assert found[2] == 3, "code 2 straddles bytes 0 and 1: did a uint8 lose bits?"
assert found == [1, 2, 3, 4, 5, 6, 7, 0], "byte 1 is worth 2^8, byte 2 is worth 2^16"
two = torch.tensor([71, 229, 140, 71, 229, 140], dtype=torch.uint8)
found = unpack_three_bits(two).tolist()
assert found == 2 * [7, 0, 5, 2, 6, 1, 3, 4], "triples are unpacked one by one"
### BEGIN HIDDEN TESTS
from course_utils.kernels.packing import pack as packed_by_package

draw = torch.Generator().manual_seed(0)
probe = torch.randint(0, 8, (80,), generator=draw)
found = unpack_three_bits(packed_by_package(probe, 3)).tolist()
assert found == probe.tolist(), "ten triples with all codes come back, in their order"
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
assert exact_bits(4) == [2, 4, 6, 8], "4 levels are 3 steps; 8 bits count as well"
assert exact_bits(16) == [4, 8], "five bits are worse than four: 31 steps against 15"
assert exact_bits(12) == [], "no grid of 8 bits or fewer has a multiple of 11 steps"
assert exact_bits(4, most=12) == [2, 4, 6, 8, 10, 12], "`most` is the largest n_bits"
assert exact_bits(4, most=3) == [2], "`most` is the largest n_bits"
### BEGIN HIDDEN TESTS
for levels in (2, 4, 6, 8, 16, 18):
    on_grid, exact = torch.linspace(0, 1, levels), []
    for n in range(1, 10):
        back = (on_grid * (2**n - 1)).round() / (2**n - 1)
        if (back - on_grid).abs().max() < 1e-6:  # float32 itself rounds
            exact.append(n)
    assert exact_bits(levels, most=9) == exact, f"{levels} levels: {exact} lose nothing"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: how many bits for so many decibels?
# *Difficulty 3/5 · 15 minutes · 2 points · no GPU*
#
# A tensor's range is $\pm a$, and its largest magnitude $a$ is `peak` times its root mean square. By the $S^2/12$ law, how many bits does it need for a wanted SQNR? Then read: what does a peak
# twice as high cost?


# %% tags=["exercise"]
def bits_needed(peak, decibels):
    """The smallest n_bits (2 to 24) whose SQNR by the law is at least `decibels`.

    Approach: with a root mean square of 1 the range is 2 * peak, S is the range over
    2^n - 1 steps, and the noise is S^2 / 12.
    Example: a peak of 4 and 40 dB give 8; a peak of 8 needs 9, one bit more.
    Hint: a loop over n_bits is enough. Decibels are 10 log10 of a ratio of powers.
    """
    ### BEGIN SOLUTION
    for n_bits in range(2, 25):
        S = 2 * peak / (2**n_bits - 1)
        if 10 * math.log10(12 / S**2) >= decibels:
            return n_bits
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert bits_needed(4, 40) == 8, "the range is 2 * peak wide, and the noise S^2 / 12"
assert bits_needed(8, 40) == 9, "twice the peak is twice the step: 6 dB, one bit"
assert bits_needed(2, 9) == 3, "there are 2^n - 1 steps: 3 at two bits, not 4"
### BEGIN HIDDEN TESTS
wanted = [(1.5, 20, 4), (3, 30, 6), (10, 45, 11), (40, 20, 8), (2, 8, 2)]
for peak, decibels, n_bits in wanted:
    said = f"a peak of {peak} and {decibels} dB need {n_bits} bits by the law"
    assert bits_needed(peak, decibels) == n_bits, said
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

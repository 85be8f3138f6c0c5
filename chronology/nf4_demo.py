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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/nf4_demo.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/nf4_demo.ipynb)
#
# # NF4: sixteen values for weights that look normal
#
# *Large Model Quantization: a deep dive. Milestone 4 of the chronology (2023).*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - derive the 16 values of NF4 [@dettmers2023qlora] from quantiles, and say why the outermost lie at the average of 1/32 and 1/30;
# - quantize a weight in blocks with thresholds, pack it two codes a byte, and get the bytes of bitsandbytes;
# - count where 4.5 bits per weight come from, and how double quantization makes them 4.127;
# - say what "optimal" means for a codebook, and measure NF4 against int4, FP4 and codebooks of least squared error;
# - explain why int4 from minimum to maximum beats NF4 in small blocks, and what is left of that at equal bits.
#
# It takes about 60 minutes to read and work. You need scales, zero points and groups (`linear_mapping`). No profile needs a GPU; `quick` runs in
# about a minute, `cpu` in about five.

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
import time
from dataclasses import replace
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.evaluation import (
    compare_all,
    continuations,
    difference,
    format_difference,
    over_cuts,
    prompt_of,
    time_per_token,
)
from course_utils.grids.codebook import FP4, NF4, dynamic_map, lloyd_max
from course_utils.models import linear_layers, load_model

# %%
from course_utils.plotting import (
    against_block_size,
    code_usage,
    error_against_bits,
    table,
    values_on_grid,
)
from course_utils.plotting.diagrams import (
    block_on_levels,
    nibbles_in_bytes,
    quantile_levels,
)
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
# GPTQ and AWQ run text through the model before they round. NF4 looks at nothing but the weights. It was made for QLoRA, which fine-tunes a model
# whose weights stay in 4 bits. There the model is quantized when it is loaded.
#
# Without data the error of the weights is all that can be made small. A 4-bit code has 16 values. An integer grid spaces them evenly. Trained weights
# crowd around zero, much like a normal distribution. So the question is: **which 16 values suit weights that look normal, whatever their scale?**
#
# A **codebook** is such a list of values, its **levels**. The scale comes from the data: a **block** of neighbouring weights is divided by its
# **absmax**, the largest absolute value in it. Then all blocks lie in -1..1 and share one codebook.
#
# ## By hand: eight weights, one block

# %% tags=["nbval-check-output"]
w = torch.tensor([0.30, -0.80, 0.05, 0.42, -0.11, 0.64, -0.02, 0.20])  # [8]
absmax = w.abs().max()
scaled = w / absmax  # in -1..1
codes = (scaled[:, None] - NF4).abs().argmin(1)  # the nearest of 16 levels
rows = [
    {"weight": v, "divided": s, "code": c, "level": NF4[c].item()}
    | {"back": (NF4[c] * absmax).item(), "error": v - (NF4[c] * absmax).item()}
    for v, s, c in zip(w.tolist(), scaled.tolist(), codes.tolist(), strict=True)
]
table(rows, dict.fromkeys(("weight", "divided", "level", "back", "error"), "+.4f"))

# %% [markdown]
# Three things can be seen. The weight of largest size, -0.80, comes back exactly. Levels near zero are closer together: the errors there are
# smaller. And code 7 is an exact zero, so that small weights may vanish.
#
# ## Sixteen values from quantiles
#
# Suppose each code is to be used equally often. Then the bins should hold equal probability, their **mass**. The **quantile** of a probability p is
# the value below which a share p of the distribution lies. So levels at evenly spaced quantiles are a natural choice. Three details need care.
#
# **The ends.** The quantiles of 0 and 1 are infinite. With 16 bins of mass 1/16 the outermost bins have their middle, by mass, at 1/32 and 31/32.
# With 15 bins it is 1/30. One side will need the first, one the other, so the authors take the average: 1 - (1/32 + 1/30) / 2 = 0.9677.
#
# **An exact zero.** Padding and pruned weights are zero and must stay so. An even number of symmetric levels has no zero. So NF4 takes two
# halves. The positive one has 8 levels, from the offset 0.9677 down towards 1/2, at equal steps of probability. The negative one has 7. Zero itself
# makes 16.
#
# **The scale.** All levels are divided by the largest. So the first is -1 and the last is 1.

# %% tags=["nbval-check-output"]
offset = 1 - (1 / 32 + 1 / 30) / 2
quantile = NormalDist().inv_cdf
positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
levels = torch.tensor(sorted([*negative, 0.0, *positive])) / quantile(offset)
assert torch.allclose(levels, NF4, rtol=0, atol=2e-7)  # the published values
print(f"offset {offset:.7f}, its quantile {quantile(offset):.4f}")
print([round(level, 3) for level in levels.tolist()])

# %% [markdown]
# These are the published values, to 2e-7. Quantile functions differ in their last digits, so every implementation keeps the table.

# %%
figure = quantile_levels(offset)
plt.show()

# %% [markdown]
# *Figure: the bell of the normal density, cut into 8 tinted parts of equal mass on the right and 7 on the left. A red dot marks each cut. Grey tails lie
# beyond the outermost dots.*
#
# The parts get wider as the bell gets lower, and so do the gaps between levels. The left side has one level fewer, so its gaps are wider: NF4 treats
# $w$ and $-w$ differently.
#
# ## Nearest, by thresholds
#
# A weight goes to the nearest level. Distances to all 16 levels would be 16 numbers a weight. It is enough to know on which side of the 15
# **thresholds** it lies, half way between neighbours. The matrix is one long row here, as in bitsandbytes: blocks run on over the ends of rows.


# %%
def nf4_codes(W, block_size=64):
    """Codes `[n]` (int64) and absmax `[blocks]` of `W`, whose size blocks divide."""
    blocks = W.flatten().view(-1, block_size)  # [blocks, block_size]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax)[:, None]).flatten()
    thresholds = (NF4[:-1] + NF4[1:]) / 2  # [15]
    return torch.bucketize(scaled, thresholds), absmax


# %%
model, tokenizer = load_model("course-lm")
layer = next(x for x in linear_layers(model) if x.name.endswith("h.0.mlp.c_fc"))
W = layer.weight.float()  # [out, in]
codes, absmax = nf4_codes(W)
ours = get_method("nf4", double_quantization=False).quantize(W)
assert torch.equal(codes, ours.integer_codes().flatten().long())
assert torch.equal(absmax, ours.absmax)
print(f"{layer.name} {list(W.shape)}: {len(codes):,} codes, {len(absmax):,} blocks")

# %% [markdown]
# These lines give the package's codes and absmax, all of them. The package adds what this cell leaves out: a last block that is shorter, and blocks
# of zeros, which must not be divided by zero.
#
# ## Two codes a byte
#
# Four bits are half a byte. Of two neighbours the first takes the *high* half. That is a convention, and other formats have the opposite one:
# GGUF and our `pack` begin at the low half.

# %%
packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)  # [n / 2]
assert torch.equal(packed, ours.codes)
figure = nibbles_in_bytes(codes[:8], packed[:4])
plt.show()
print("bits per weight:", ours.bits_per_weight)

# %% [markdown]
# *Figure: the first eight codes of the layer above four bytes. Each byte shows the first code's four bits, then the second's.*
#
# The package's bytes are the same. It counts 4.5 bits per weight: 4 of the codes, and a float32 absmax for 64 weights, which is 32 / 64 = 0.5.
#
# ## Double quantization
#
# Half a bit for scales is much. QLoRA quantizes the absmax values too: 8 bits for each, in blocks of 256 that share a float32 of their own. All
# absmax are positive, so their mean over the whole weight, the **offset**, is subtracted first.
#
# The paper names an FP8 type. The released code takes the **dynamic map** [@dettmers2015eightbit], and so do we: 256 values in seven decades. Each
# decade has twice as many values as the one below.

# %%
nested = absmax - absmax.mean()  # [blocks]
blocks_256 = nested.split(256)
of_block = torch.stack([block.abs().max() for block in blocks_256])  # [blocks / 256]
in_8_bits = dynamic_map()
nearest = [
    (block[:, None] / top - in_8_bits).abs().argmin(1)
    for block, top in zip(blocks_256, of_block, strict=True)
]
decoded = torch.cat([in_8_bits[c] * m for c, m in zip(nearest, of_block, strict=True)])
decoded = decoded + absmax.mean()
double = get_method("nf4").quantize(W)
assert torch.allclose(decoded, double.block_absmax(), rtol=1e-5)
off = ((decoded - absmax) / absmax).abs()
print(f"an absmax is off by {off.mean():.2%} on average, {off.max():.2%} at most")

# %% tags=["folded"]
# Count what double quantization stores.
rows = [
    {"tensor": name, "dtype": str(t.dtype).removeprefix("torch."), "numbers": t.numel()}
    | {"bits per weight": 8 * t.numel() * t.element_size() / W.numel()}
    for name, t in double.tensors().items()
]
rows.append({"tensor": "all", "bits per weight": double.bits_per_weight})
table(rows, {"bits per weight": ".4f", "numbers": ",.0f"})

# %% [markdown]
# The absmax now take 8 / 64 = 0.125 bits, and what they share is next to nothing. The sum is 4.127 instead of 4.5 bits per weight.

# %% tags=["folded"]
# Record what was counted on this layer.
record("nf4.layer.plain.bits", ours.bits_per_weight, "bits", 0, model="course-lm")
record("nf4.layer.double.bits", double.bits_per_weight, "bits", 0, model="course-lm")
record("nf4.layer.absmax_off", off.mean().item(), "", 0.001, model="course-lm")
errors = [
    ((q.dequantize() - W).square().sum() / W.square().sum()) for q in (ours, double)
]
more = (errors[1] / errors[0] - 1).item()
record("nf4.layer.double.more_error", more, "", 0.001, model="course-lm")

# %% [markdown]
# In the recorded run double quantization raises the squared error of this layer by {{nf4.layer.double.more_error:.2%}}. That is cheap for
# 0.373 bits.
#
# ## Is it optimal?
#
# The paper calls NF4 information-theoretically optimal for normal weights, in the sense that each bin expects equally many values
# [@dettmers2023qlora]. There are two gaps between this and a least error.
#
# - **What is normal.** The weights are, but not what the codebook sees. That is the weights divided by the absmax of their block. One of each block
#   is always -1 or 1, and the larger the block, the more the others crowd around zero [@yoshida2023nf4].
# - **What is optimal.** Equal use of the codes is not least squared error. Lloyd and Max answered that question long before [@lloyd1982pcm].
#
# We look at the first gap. NF4 was derived from a normal distribution, divided by its quantile 0.9677.

# %%
generator = torch.Generator().manual_seed(profile.seed)
n_samples = profile.pick(quick=2**18, cpu=2**20)
sample = torch.randn(n_samples, generator=generator)


def divided(x, block_size):
    """`x` in blocks, each divided by its absmax: `[n]`."""
    blocks = x.flatten().view(-1, block_size)
    return (blocks / blocks.abs().amax(1, keepdim=True)).flatten()


# %%
seen = divided(sample, 64)
derived = sample / quantile(offset)
figure = values_on_grid(
    {
        "what NF4 was derived from (cut at -1.5 and 1.5)": (
            derived[derived.abs() < 1.5],
            NF4,
        ),
        "what it sees: normal weights in blocks of 64": (seen, NF4),
    }
)
plt.show()

# %% [markdown]
# *Figure: two histograms with NF4's levels as red lines. Above a bell reaches beyond the outermost levels. Below the bell is narrower, and two spikes
# stand at -1 and 1: the absmax of each block.*
#
# How often is each code used, then? **Entropy** says how many bits the codes really carry: 4 if all are used equally often.


# %%
def usage(scaled):
    """Share of each of the 16 codes, for values in -1..1."""
    codes = torch.bucketize(scaled, (NF4[:-1] + NF4[1:]) / 2)
    return codes.bincount(minlength=16) / len(codes)


# %%
shares = {"derivation": usage(derived)}
shares |= {f"blocks of {size}": usage(divided(sample, size)) for size in (8, 64, 1024)}
entropy = {name: -(s * s.log2()).sum().item() for name, s in shares.items()}
print({name: f"{bits:.3f} bits" for name, bits in entropy.items()})
figure = code_usage(shares)
plt.show()

# %% tags=["folded"]
# Record the entropies.
for name, bits in entropy.items():
    key = name.split()[-1].replace("derivation", "derived")
    record(f"nf4.entropy.{key}", bits, "bits", 0.005, model="normal", samples=n_samples)

# %% [markdown]
# *Figure: four bar charts of how often each of the 16 codes is used, with a dashed line at 1/16.*
#
# In the recorded run the codes carry {{nf4.entropy.derived:.2f}} bits in the derivation, {{nf4.entropy.64:.2f}} in blocks of 64 and
# {{nf4.entropy.1024:.2f}} in blocks of 1024. Even in the derivation use is not quite equal, since the thresholds are half way between levels, not
# between masses. In large blocks the outer codes stand nearly idle. So no one codebook is optimal in this sense for all blocks.

# %% [markdown]
# ## Least squared error
#
# Which 16 levels make the squared error least? Two conditions must hold [@lloyd1982pcm]: each value has the code of its nearest level, and each level
# is the mean of its values. **Lloyd's method** takes turns between the two; each turn lowers the error.
#
# One thing is special here. A value's error comes back multiplied by its block's absmax. So its square counts with absmax², and the mean is a weighted
# one. Exercise 3 asks for one such turn; the package's `lloyd_max` repeats it until nothing moves.
#
# The rivals are these, all with the same packing (`quantizers/codebook`) and 16-bit constants:
#
# - **int4, symmetric**: even levels -7/7 to 7/7, times the absmax;
# - **FP4**: a float of 1 sign, 2 exponent and 1 mantissa bits, with bitsandbytes' table;
# - **Lloyd-Max**: fitted to normal samples in blocks of this size, or to the model's own weights;
# - **int4, min to max**: even levels from the minimum of a block to its maximum. It stores *two* numbers a block, the minimum and the width.
#
# The last one is called affine or asymmetric. Its zero point is a float here: zero need not be a level.

# %%
EVEN = [i / 15 for i in range(16)]
INT4 = [max(i - 8, -7) / 7 for i in range(16)]


def fitted(weights, block_size):
    """Lloyd-Max levels for all `weights` in blocks, each scaled to mean square 1."""
    values, counts = [], []
    for W in weights:
        blocks = (W / W.square().mean().sqrt()).reshape(-1, block_size)
        top = blocks.abs().amax(1, keepdim=True)
        values.append((blocks / top).flatten())
        counts.append(top.square().expand_as(blocks).flatten())
    return lloyd_max(torch.cat(values), 16, torch.cat(counts)).tolist()


# %%
def rival(name, block_size, levels=None):
    """The method `name`, 16-bit constants, in blocks of `block_size`."""
    known = {"NF4": NF4.tolist(), "FP4": FP4.tolist(), "int4, symmetric": INT4}
    known["int4, min to max"] = EVEN
    settings = {"levels": levels or known[name], "block_size": block_size}
    return get_method("codebook", offsets=name == "int4, min to max", **settings)


# %% [markdown]
# **Equal bits.** One number of 16 bits for 32 weights is 0.5 bits per weight, and so are two for 64. So at 4.5 bits NF4 gets blocks of 32 and
# int4 from min to max gets blocks of 64. What is measured counts all that is stored, the 64 bytes of the levels too.
#
# We begin with normal samples, in draws of their own for the standard error. The **relative squared error** is $\lVert W - Q \rVert^2 / \lVert W \rVert^2$.

# %%
draws = [torch.randn(256, 1024, generator=generator) for _ in range(6)]
on_normal = fitted([sample], 32)
block_of = {"int4, min to max": 64}  # all others: 32
contenders = ["NF4", "int4, symmetric", "int4, min to max", "FP4", "Lloyd-Max, normal"]
rivals = {
    name: rival(name, block_of.get(name, 32), on_normal if "normal" in name else None)
    for name in contenders
}


# %%
def relative_error(method, W):
    """Relative squared error of `W` quantized by `method`."""
    back = method.quantize(W).dequantize()
    return ((back - W).square().sum() / W.square().sum()).item()


normal_errors = {
    name: [relative_error(method, W) for W in draws] for name, method in rivals.items()
}

# %% tags=["folded"]
# A row for each codebook; ratios are draw by draw.
rows = []
for name, found in normal_errors.items():
    ratio = over_cuts(
        [e / nf4 for e, nf4 in zip(found, normal_errors["NF4"], strict=True)]
    )
    bits = rivals[name].quantize(draws[0]).bits_per_weight
    rows.append({"codebook": name, "block": rivals[name].block_size, "bits": bits})
    rows[-1] |= {"squared error": over_cuts(found).value}
    rows[-1] |= {"over NF4's": f"{ratio.value:.3f} ± {ratio.error:.3f}"}
table(rows, {"bits": ".3f", "squared error": ".5f"})

# %% tags=["folded"]
# Record the errors on normal samples.
KEYS = {"NF4": "nf4", "int4, symmetric": "int4", "int4, min to max": "minmax"}
KEYS |= {"FP4": "fp4", "Lloyd-Max, normal": "lloyd", "Lloyd-Max, own": "lloyd_own"}
for name, found in normal_errors.items():
    mean = over_cuts(found).value
    record(f"nf4.normal.{KEYS[name]}.error", mean, "", 0.01 * mean, model="normal")
    ratio = over_cuts(
        [e / nf4 for e, nf4 in zip(found, normal_errors["NF4"], strict=True)]
    )
    record(f"nf4.normal.{KEYS[name]}.ratio", ratio.value, "", 0.01, model="normal")

# %% [markdown]
# In the recorded run, on samples as normal as can be, NF4 is not the best: Lloyd-Max has {{nf4.normal.lloyd.ratio:.2f}} of its squared error at the
# same bits. Int4 from min to max has {{nf4.normal.minmax.ratio:.2f}}, symmetric int4 {{nf4.normal.int4.ratio:.2f}} and FP4 {{nf4.normal.fp4.ratio:.2f}}
# of it. So NF4 is a good codebook for normal weights, and "optimal" is not a word for its error.
#
# ## Where int4 overtakes NF4
#
# A user of bitsandbytes reports that below a block of 64 affine int4 has a smaller error than NF4 [@bitsandbytes2026crossover]. The report compares root
# errors at equal *block size*. We do the same on all layers of course-lm. The affine grid comes in two forms: with an integer zero point, as most libraries
# have it, and with the minimum in float, as above.

# %%
weights = [x.weight.float() for x in linear_layers(model)]
SIZES = (16, 32, 64, 128, 256, 1024, 4096)


def on_layers(method):
    """Bits per weight of course-lm, all counted; squared error of each layer."""
    stored = [method.quantize(W) for W in weights]
    bits = 8 * sum(s.nbytes for s in stored) / sum(W.numel() for W in weights)
    pairs = zip(stored, weights, strict=True)
    errors = [(s.dequantize() - W).square().sum() / W.square().sum() for s, W in pairs]
    return bits, torch.stack(errors)


# %%
of_block = {
    (name, size): on_layers(rival(name, size))
    for name in ("NF4", "int4, min to max", "int4, symmetric")
    for size in SIZES
}

# %% tags=["folded"]
# Ratios of root errors, layer by layer, with the error over layers.
crossover = []
for size in SIZES[:4]:
    nf4 = of_block["NF4", size][1]
    affine = {"integer zero point": on_layers(get_method("affine", group_size=size))[1]}
    affine["min to max"] = of_block["int4, min to max", size][1]
    row = {"weights in a block": size}
    for name, errors in affine.items():
        ratio = over_cuts((errors / nf4).sqrt().tolist())  # over layers
        row |= {name: ratio.value, f"± ({name})": ratio.error}
    crossover.append(row)
places = {name: ".3f" if "±" in name else ".2f" for name in list(row)[1:]}
table(crossover, places)

# %% tags=["folded"]
# Record the crossover.
for row in crossover:
    for key, name in (("integer", "integer zero point"), ("minmax", "min to max")):
        stem = f"nf4.crossover.{row['weights in a block']}.{key}"
        record(f"{stem}.ratio", row[name], "", 0.005, model="course-lm")
        record(f"{stem}.ratio_error", row[f"± ({name})"], "", 0.002, model="course-lm")

# %% [markdown]
# The columns hold the affine root error over NF4's, with its standard error over layers. In the recorded run, with an integer zero point, it is
# {{nf4.crossover.128.integer.ratio:.2f}}, {{nf4.crossover.64.integer.ratio:.2f}}, {{nf4.crossover.32.integer.ratio:.2f}} and
# {{nf4.crossover.16.integer.ratio:.2f}} at blocks of 128, 64, 32 and 16. The report is confirmed: they meet at about 64. With the minimum in float the
# affine grid is better still, at {{nf4.crossover.16.minmax.ratio:.2f}} in blocks of 16.
#
# Why? A first guess is that small blocks do not look normal. But the samples above are normal, and show it too. Look at one block.

# %%
block = weights[0].flatten()[:16]
low, high = block.aminmax()
lines = {
    "NF4, -absmax to absmax": NF4 * block.abs().max(),
    "int4, min to max": low + (high - low) * torch.tensor(EVEN),
}
figure = block_on_levels(block, lines)
plt.show()

# %% [markdown]
# *Figure: the 16 weights of one block as ticks, joined to their nearest levels. Above NF4's levels reach from minus to plus the absmax, and leave one
# end empty. Below 16 even levels lie between the smallest and the largest weight.*
#
# NF4 spans $2 \max |w|$. The affine grid spans $\max w - \min w$, which is never more, since the second end need not be as far out as the first. Its
# levels at *both* ends are used: two weights of the block come back exactly, not one. How much shorter the span is depends on **order statistics**, the
# expected extremes of n samples. For normal samples we can measure it.

# %%
sizes = [2**i for i in range(3, 13)]  # 8 to 4096
SYMMETRIC = [(2 * i - 15) / 15 for i in range(16)]  # 16 even levels, -1 to 1
span, parts = [], {"NF4": [], "min to max": []}
for size in sizes:
    blocks = sample.view(-1, size)
    low, high = blocks.aminmax(dim=1)
    span.append(((high - low) / (2 * blocks.abs().amax(1))).mean().item())
    even = relative_error(rival("even", size, SYMMETRIC), sample[None])
    nf4 = relative_error(rival("NF4", size), sample[None])
    parts["NF4"].append(nf4 / even)
    parts["min to max"].append(
        relative_error(rival("int4, min to max", size), sample[None]) / even
    )

# %%
figure = against_block_size(
    {
        "span over 2 absmax": {"max - min": (sizes, span)},
        "squared error over that of 16 even levels": {
            name: (sizes, values) for name, values in parts.items()
        },
    },
    level=1.0,
)
plt.show()

# %% tags=["folded"]
# Record what order statistics give.
for size, share, nf4, both in zip(sizes, span, *parts.values(), strict=True):
    stem = f"nf4.order.{size}"
    record(f"{stem}.span", share, "", 0.005, model="normal")
    record(f"{stem}.nf4", nf4, "", 0.01, model="normal")
    record(f"{stem}.minmax", both, "", 0.01, model="normal")

# %% [markdown]
# *Figure: on the left a curve of the span from min to max over twice the absmax, which rises with the size of the block and stays below 1. On the right
# two curves of squared errors, over that of 16 even levels from -absmax to absmax. NF4's falls, the affine one rises, and they cross.*
#
# Both are compared with the same thing: 16 *even* levels from -absmax to absmax. In the recorded run the span from min to max is {{nf4.order.16.span:.2f}} of
# twice the absmax in blocks of 16, and {{nf4.order.1024.span:.2f}} in blocks of 1024. So the affine grid wins most in small blocks: its squared error is
# {{nf4.order.16.minmax:.2f}} and {{nf4.order.1024.minmax:.2f}} of the even grid's. NF4 gains by its *shape*, and that is worth the more, the more the weights crowd around zero. Its
# error is {{nf4.order.16.nf4:.2f}} of the even grid's in blocks of 16, no gain at all, and {{nf4.order.1024.nf4:.2f}} in blocks of 1024. One gain falls and one rises, so they cross.
#
# ## The same at equal bits
#
# But the affine grid stores two numbers a block. Here is the error of both against measured bits, on course-lm.

# %% tags=["folded"]
# Squared error of the weights against measured bits.
widest = "int4, min to max", 16  # 6 bits: off the picture
curves = {}
for name in ("NF4", "int4, min to max", "int4, symmetric"):
    points = [of_block[name, size] for size in SIZES if (name, size) != widest]
    curves[name] = [b for b, _ in points], [e.mean().item() for _, e in points]
figure = error_against_bits(
    {"course-lm, from large blocks (left) to small ones (right)": curves},
    "relative squared error",
    xlabel="measured bits per weight",
)
figure.axes[0].xaxis.set_major_locator(plt.MultipleLocator(0.25))
plt.show()

# %% [markdown]
# *Figure: three falling curves of the squared error against measured bits. At few bits NF4's is the lowest. It meets the curve of int4 from min to max
# between 4.5 and 5 bits.*

# %% tags=["folded"]
# NF4 and the affine grid at the same bits.
at_bits = []
for size in (128, 64, 32, 16):
    bits, nf4 = of_block["NF4", size]
    _, affine = of_block["int4, min to max", 2 * size]
    ratio = over_cuts((affine / nf4).tolist())  # over layers
    at_bits.append({"bits": bits, "NF4 block": size, "affine block": 2 * size})
    at_bits[-1] |= {"affine over NF4": ratio.value, "±": ratio.error}
table(at_bits, {"bits": ".3f", "affine over NF4": ".2f", "±": ".2f"})

# %% tags=["folded"]
# Record the ratios at equal bits.
for row in at_bits:
    key = f"nf4.equal_bits.{row['NF4 block']}"
    record(f"{key}.ratio", row["affine over NF4"], "", 0.01, model="course-lm")
    record(f"{key}.ratio_error", row["±"], "", 0.005, model="course-lm")
    record(f"{key}.bits", row["bits"], "bits", 0.001, model="course-lm")

# %% [markdown]
# In the recorded run the affine grid has {{nf4.equal_bits.64.ratio:.2f}} of NF4's squared error at {{nf4.equal_bits.64.bits:.2f}} bits,
# {{nf4.equal_bits.32.ratio:.2f}} at {{nf4.equal_bits.32.bits:.2f}} and {{nf4.equal_bits.16.ratio:.2f}} at {{nf4.equal_bits.16.bits:.2f}}. At equal bits the
# crossover lies between 4.5 and 5 bits. Where NF4 is used, at 4 to 4.5 bits, it keeps the smaller error.

# %% [markdown]
# ## Whole models, at equal bits
#
# Does the smaller error of the weights mean fewer **nats lost**? That is how much more loss per token the quantized model has than its float
# model, on the same tokens. The ± is one standard error over the documents of the text, and differences are paired, token by token.
#
# Besides the rivals at 4.5 bits there are two at about 4.13: NF4 as QLoRA uses it, with double quantization, and int4 from min to max in blocks of 256.
# As the second model we take SmolLM2, `dithered` (`gptq_demo` says why). It is slow, so it gets half as many tokens.
#
# To multiply by packed weights our package decodes them at every step. For these long evaluations we decode them once: the same values, faster.


# %% tags=["folded"]
# Helpers: load a model, quantize it, put decoded weights back into float layers.
def load(name):
    """The float model `name` anew, and its tokenizer."""
    return load_model(name, dtype=profile.dtype, device=profile.device)


@torch.no_grad()
def quantized(name, method):
    """A float model `name` with what `method` makes of its weights; the report."""
    packed, _ = load(name)
    report = quantize_model(packed, method)
    model, _ = load(name)
    for layer in linear_layers(model):
        stored = packed.get_submodule(layer.name).quantized_weight
        layer.weight.copy_(stored.dequantize())
    return model, report


def shown(estimate, places=4):
    """Value and standard error."""
    return f"{estimate.value:.{places}f} ± {estimate.error:.{places}f}"


def record_estimate(key, estimate, tolerance, unit="nats", **by):
    """Value under `key`, standard error under `key` with _error."""
    record(key, estimate.value, unit, tolerance, **by)
    record(f"{key}_error", estimate.error, unit, tolerance, **by)


# %% tags=["folded"]
# The models, and what each is quantized by.
names = [name.replace("q4_1", "dithered") for name in profile.models]
small = names[0]
floats, tasks = {name: load(name) for name in names}, {}
for name in names:
    layers = linear_layers(floats[name].model)
    some = [x.weight.float().cpu() for x in layers][:: 10 if len(layers) > 100 else 1]
    own = rival("Lloyd-Max, own", 32, fitted(some, 32))
    tasks[name] = rivals | {"Lloyd-Max, own": own}
    tasks[name]["NF4, double quantized"] = get_method("nf4")
    tasks[name]["int4, min to max, 256"] = rival("int4, min to max", 256)

# %%
models, reports = {}, {}
for name in names:
    for label, method in tasks[name].items():
        if label == "Lloyd-Max, normal" and name != small:
            continue  # hardly another codebook than its own
        models[name, label], reports[name, label] = quantized(name, method)

# %% tags=["folded"]
# Compare all models of a name with their float model, in one pass.
protocols = {name: profile.protocol(floats[name].model) for name in names}
if "smollm2-135m-dithered" in names:  # slow: half of the course's tokens
    full = protocols["smollm2-135m-dithered"]
    protocols["smollm2-135m-dithered"] = replace(full, tokens=full.tokens // 2)
compared = {}
for name in names:
    reference, tokenizer = floats[name]
    of_name = {key: model for key, model in models.items() if key[0] == name}
    compared |= compare_all(of_name, reference, protocols[name].text(tokenizer))
    print(f"{name}: {protocols[name]}")
models = {
    key: model for key, model in models.items() if key[0] == small
}  # frees memory

# %% tags=["folded"]
# Each model's bits, error and loss; differences from NF4 at the same bits are paired.
rows = []
more_than_nf4 = {}
for (name, label), found in compared.items():
    report = reports[name, label]
    low = report.bits_per_weight < 4.3  # compare with NF4 at the same bits
    base = name, "NF4, double quantized" if low else "NF4"
    row = {"model": name, "codebook": label, "bits": report.bits_per_weight}
    row["weight error"] = sum(x.weight_error for x in report.layers) / len(
        report.layers
    )
    row |= {"nats lost": shown(found.loss), "KL divergence": shown(found.divergence)}
    if (name, label) != base:
        more_than_nf4[name, label] = difference(found, compared[base])
        row["more than NF4"] = format_difference(more_than_nf4[name, label])
    rows.append(row)
table(
    sorted(rows, key=lambda r: (r["model"], r["bits"] > 4.3)),
    {"bits": ".3f", "weight error": ".5f"},
)

# %% tags=["folded"]
# Record the table.
KEYS |= {"NF4, double quantized": "double", "int4, min to max, 256": "minmax_256"}
for (name, label), found in compared.items():
    by = {"model": name} | protocols[name].fields
    stem, report = f"nf4.{name}.{KEYS[label]}", reports[name, label]
    tolerance = 0.003 + 0.1 * abs(found.loss.value)
    record_estimate(f"{stem}.loss", found.loss, tolerance, **by)
    record_estimate(f"{stem}.divergence", found.divergence, tolerance, **by)
    record(f"{stem}.bits", report.bits_per_weight, "bits", 0.001, **by)
    record(f"{stem}.block", tasks[name][label].block_size, "", 0, **by)
    error = sum(x.weight_error for x in report.layers) / len(report.layers)
    record(f"{stem}.error", error, "", 0.02 * error, **by)
    record(f"{stem}.perplexity", found.perplexity.perplexity, "", 0.5, **by)
    record(f"nf4.{name}.float.perplexity", found.reference.perplexity, "", 0.05, **by)
    if (name, label) in more_than_nf4:
        record_estimate(f"{stem}.more", more_than_nf4[name, label], tolerance, **by)

# %% [markdown]
# At about 4.13 bits NF4 is far ahead. In the recorded run int4 from min to max loses {{nf4.course-lm.minmax_256.more:.3f}} ±
# {{nf4.course-lm.minmax_256.more_error:.3f}} nats more on course-lm, and {{nf4.smollm2-135m-dithered.minmax_256.more:.2f}} ±
# {{nf4.smollm2-135m-dithered.minmax_256.more_error:.2f}} more on SmolLM2 ({{nf4.smollm2-135m-dithered.minmax_256.loss:.2f}} instead of
# {{nf4.smollm2-135m-dithered.double.loss:.2f}}). At 4.5 bits the gap on SmolLM2 is {{nf4.smollm2-135m-dithered.minmax.more:.2f}} ±
# {{nf4.smollm2-135m-dithered.minmax.more_error:.2f}}. FP4 loses more than NF4 on both models.
#
# The error of the weights does not tell the whole order. Symmetric int4 has a larger one than int4 from min to max, and on SmolLM2 it is not
# distinguished from NF4: {{nf4.smollm2-135m-dithered.int4.more:+.2f}} ± {{nf4.smollm2-135m-dithered.int4.more_error:.2f}} nats. (Its KL divergence, how far its
# probabilities are from the float model's, is larger than NF4's.) Lloyd-Max has the smallest error of the weights everywhere. Yet on SmolLM2 it loses
# {{nf4.smollm2-135m-dithered.lloyd_own.more:.2f}} ± {{nf4.smollm2-135m-dithered.lloyd_own.more_error:.2f}} nats more than NF4. And fitting it to the model's own weights instead of normal
# samples changes next to nothing on course-lm: these weights are normal enough.
#
# ## One rounding is one draw
#
# The errors above are over documents. But each row is *one* rounding of the weights. Another order of the columns puts other weights together into
# blocks, and gives another rounding that is as good. A few of them show how far luck goes. The order of the columns changes nothing else.


# %%
@torch.no_grad()
def in_other_order(method, seed):
    """Course-lm, quantized with each layer's columns in another order."""
    model, order_of = load(small).model, torch.Generator().manual_seed(seed)
    for layer in linear_layers(model):
        order = torch.randperm(layer.weight.shape[1], generator=order_of)
        back = method.quantize(layer.weight[:, order].contiguous()).dequantize()
        layer.weight.copy_(back[:, order.argsort()])
    return model


# %%
reference, tokenizer = floats[small]
text = profile.protocol(reference).text(tokenizer)
n_orders = profile.pick(quick=2, cpu=6)
of_order = {}
for label in ("NF4", "int4, min to max", "Lloyd-Max, normal"):
    drawn = {i: in_other_order(tasks[small][label], i) for i in range(n_orders)}
    of_order[label] = compare_all(drawn, reference, text).values()

# %% tags=["folded"]
# Means over the orders, and differences from NF4 in the same order.
rows = []
for label, found in of_order.items():
    row = {"codebook": label, "orders": n_orders}
    for what, pick in (
        ("nats lost", lambda c: c.loss),
        ("KL divergence", lambda c: c.divergence),
    ):
        values = [pick(c).value for c in found]
        more = [v - pick(c).value for v, c in zip(values, of_order["NF4"], strict=True)]
        row |= {what: over_cuts(values), f"{what}, more than NF4": over_cuts(more)}
    rows.append(row)
over_orders = {row["codebook"]: row for row in rows}
table(
    [
        {k: v if isinstance(v, (str, int)) else shown(v) for k, v in r.items()}
        for r in rows
    ]
)

# %% tags=["folded"]
# Record the means over orders.
for label, row in over_orders.items():
    by = {"model": small} | profile.protocol(reference).fields | {"orders": n_orders}
    stem = f"nf4.orders.{KEYS[label]}"
    record_estimate(f"{stem}.loss", row["nats lost"], 0.002, **by)
    record_estimate(f"{stem}.divergence", row["KL divergence"], 0.001, **by)
    if label != "NF4":
        record_estimate(f"{stem}.more", row["nats lost, more than NF4"], 0.002, **by)
        record_estimate(
            f"{stem}.more_divergence", row["KL divergence, more than NF4"], 0.001, **by
        )

# %% [markdown]
# Over the orders, in the recorded run, the loss of Lloyd-Max less that of NF4 is {{nf4.orders.lloyd.more:+.4f}} ± {{nf4.orders.lloyd.more_error:.4f}} nats on course-lm: Lloyd-Max loses fewer. The
# single rounding above had {{nf4.course-lm.lloyd.more:+.4f}} ± {{nf4.course-lm.lloyd.more_error:.4f}}, of the other sign. So an error over documents does not hold the luck of
# rounding, and differences as small as these need several draws. For int4 from min to max the difference is {{nf4.orders.minmax.more:+.4f}} ±
# {{nf4.orders.minmax.more_error:.4f}} nats: not distinguished. Its KL divergence is larger by {{nf4.orders.minmax.more_divergence:.4f}} ±
# {{nf4.orders.minmax.more_divergence_error:.4f}}, which is. For SmolLM2 we could afford one draw only.
#
# ## The size of the block
#
# Blocks of 64 are QLoRA's choice. What do others give? At each size NF4 has double quantization, and int4 gets blocks four times as large. Then both store
# the same bits: 8 for each block of NF4, and 32 for four of them.

# %%
sizes = profile.pick(
    quick=(32, 256, 4096), cpu=(32, 64, 128, 256, 512, 1024, 2048, 4096)
)
tried = {("NF4", s): get_method("nf4", block_size=s) for s in sizes}
tried |= {("min to max", s): rival("int4, min to max", 4 * s) for s in sizes[::2]}
by_size = {key: quantized(small, method) for key, method in tried.items()}
found = compare_all({key: m for key, (m, _) in by_size.items()}, reference, text)

# %% tags=["folded"]
# Both measures against the size of NF4's blocks.
titles = {"NF4": "NF4, double quantized", "min to max": "int4, 4 times the block"}
panels = {"nats lost (bars: 2 standard errors)": {}, "KL divergence, nats": {}}
for label, title in titles.items():
    keys = [key for key in tried if key[0] == label]
    for panel, what in zip(panels, ("loss", "divergence"), strict=True):
        points = [getattr(found[key], what) for key in keys]
        values = [p.value for p in points], [p.error for p in points]
        panels[panel][title] = ([size for _, size in keys], *values)
figure = against_block_size(panels)
plt.show()

# %% [markdown]
# *Figure: on the left nats that course-lm loses per token, on the right the KL divergence from the float model, both against the size of NF4's blocks.
# One curve is NF4 with double quantization. The other is int4 from min to max in blocks of four times the size, at the same measured bits.*

# %% tags=["folded"]
# Record both curves.
for (label, size), comparison in found.items():
    stem = f"nf4.block.{size}.{KEYS.get(label, 'minmax')}"
    by = {"model": small} | profile.protocol(reference).fields
    record_estimate(f"{stem}.loss", comparison.loss, 0.004, **by)
    record_estimate(f"{stem}.divergence", comparison.divergence, 0.002, **by)
    bits = by_size[label, size][1].bits_per_weight
    record(f"{stem}.bits", bits, "bits", 0.001, **by)

# %% [markdown]
# In the recorded run NF4 loses {{nf4.block.32.nf4.loss:.3f}} ± {{nf4.block.32.nf4.loss_error:.3f}} nats in blocks of 32, at
# {{nf4.block.32.nf4.bits:.2f}} bits. It loses {{nf4.block.4096.nf4.loss:.3f}} ± {{nf4.block.4096.nf4.loss_error:.3f}} in blocks of 4096, at
# {{nf4.block.4096.nf4.bits:.2f}}. The KL divergence rises smoothly from {{nf4.block.32.nf4.divergence:.4f}} to
# {{nf4.block.4096.nf4.divergence:.4f}}. Above blocks of 64 there is little to save: the last eighth of a bit. Int4 at the same bits is worse at every size
# shown.
#
# ## What the model writes
#
# Here is one prompt, always continued with the likeliest token.

# %%
speaking = {"float": floats[small].model}
speaking |= {label: models[small, label] for label in ("NF4, double quantized", "FP4")}
speaking["NF4, blocks of 4096"] = by_size["NF4", 4096][0]
print(continuations(speaking, floats[small].tokenizer, prompt_of(small), new_tokens=24))

# %% [markdown]
# All of them write the English of the text that the model was trained on. NF4 leaves the float model's words at once, though it loses only
# {{nf4.course-lm.double.loss:.3f}} nats per token in the recorded run. From the first word that differs the texts go apart, and which one is better
# cannot be told from a single prompt.
#
# ## Bytes and time

# %%
packed, _ = load(small)
start = time.perf_counter()
report = quantize_model(packed, get_method("nf4"))
seconds = time.perf_counter() - start
prompt, steps = text.tokens[:32].to(profile.device), profile.pick(quick=8, cpu=32)
times = [time_per_token(m, prompt, new_tokens=steps) for m in (reference, packed)]
for way, timing in zip(("float", "NF4"), times, strict=True):
    print(f"{way:5} {timing}")
    record(f"nf4.time.{way.lower()}", timing.median, "ms", model=small)

# %%
half = 2 * report.weights  # bytes in float16
print(f"{report.nbytes:,} bytes instead of {half:,} in float16; {seconds:.1f} s")
record("nf4.bytes.share", report.nbytes / half, "", 0.001, model=small)

# %% [markdown]
# In the recorded run a token takes {{nf4.time.nf4:.1f}} ms with packed weights and {{nf4.time.float:.1f}} ms in float, since the package decodes all
# weights at every step. The layers take {{nf4.bytes.share:.1%}} of their bytes in float16. A level is looked up, not computed, so no integer product is
# possible: NF4 saves memory, and its fast kernels decode on the way (`packed_kernels`).
#
# ## Beside bitsandbytes
#
# bitsandbytes is QLoRA's own library. Where it is installed we compare everything that is stored.

# %% tags=["folded"]
# Codes, absmax, nested state and values of bitsandbytes against ours.
try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None
    print("bitsandbytes is not installed here: this comparison is left out.")
if bnb:
    torch.compiler.set_stance("force_eager")  # else it compiles for a minute
    for size in (32, 64, 256, 4096):
        theirs, state = bnb.quantize_4bit(W, blocksize=size, quant_type="nf4")
        ours = get_method("nf4", block_size=size, double_quantization=False).quantize(W)
        assert torch.equal(ours.codes, theirs.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(theirs, state))
    theirs, state = bnb.quantize_4bit(
        W, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(double.nested_absmax, state.state2.absmax)
    assert torch.equal(double.offset, state.offset)
    same = (double.absmax == state.absmax).double().mean().item()
    assert torch.equal(FP4, bnb.get_4bit_type("fp4", device="cpu").sort().values)
    print("bytes, absmax and decoded values: equal for blocks of 32, 64, 256 and 4096")
    print(f"nested absmax and offset: equal; {same:.2%} of the 8-bit codes are")

# %% [markdown]
# All bytes and values are equal; the folded cell holds the assertions. The 8-bit codes of the absmax agree but for a few: on a CPU bitsandbytes looks
# them up in a table that near a threshold can give the neighbour. Ours is the nearer one (`tests/test_nf4.py`).
#
# ## What you saw
#
# - **Sixteen values from quantiles.** Eight positive ones, a zero, seven negative ones, from an offset of 0.9677. They gave the published table to 2e-7.
# - **Bytes.** A threshold search and two codes a byte gave the bytes of bitsandbytes. An absmax of 32 bits for 64 weights makes
#   {{nf4.layer.plain.bits:.1f}} bits in the recorded run, and double quantization {{nf4.layer.double.bits:.3f}}.
# - **Not optimal, but good.** Blocks see other distributions than the derivation: the codes carry {{nf4.entropy.64:.2f}} bits in blocks of 64. Lloyd-Max
#   had {{nf4.normal.lloyd.ratio:.2f}} of NF4's squared error on normal samples.
# - **The crossover.** At blocks of 32 the affine root error was {{nf4.crossover.32.integer.ratio:.2f}} of NF4's. It spans min to max only, and small blocks gain
#   most from that. At equal bits, {{nf4.equal_bits.32.bits:.1f}}, its squared error was {{nf4.equal_bits.32.ratio:.2f}} of NF4's.
# - **Nats.** At 4.13 bits SmolLM2 lost {{nf4.smollm2-135m-dithered.double.loss:.2f}} with NF4, and {{nf4.smollm2-135m-dithered.minmax_256.loss:.2f}} with
#   int4 from min to max. Smaller differences change with one draw of the rounding.
#
# ## Limits
#
# - Neither criterion looks at inputs. GPTQ and AWQ do, and `comparison` sets them beside NF4.
# - The Lloyd-Max levels are of least squared error of the *weights*. The loss of a model weighs errors otherwise.
# - Two small models are measured here. Heavier tails than theirs favour NF4's uneven levels; the issue in bitsandbytes' tracker names layers where
#   NF4 wins at blocks of 32 [@bitsandbytes2026crossover].
# - Embeddings and LM head stay in float, as in QLoRA.
# - bitsandbytes' blocks run over the ends of rows. A kernel that splits a weight by rows then meets blocks that it shares with another.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: NormalFloat of other widths
# *Difficulty 2/5 · 15 minutes · 2 points · no GPU*
#
# Derive the levels for `n_bits` from 2 to 8. There are $2^b$ levels: half of them positive, one zero, the others negative. The offset averages
# $1/(2 \cdot 2^b)$ and $1/(2 (2^b - 1))$.


# %% tags=["exercise"]
def normal_float(n_bits):
    """The levels of a NormalFloat of `n_bits`: a list of 2^n_bits floats, ascending.

    Approach: the offset; both halves by quantiles, at equal steps of probability
    from it towards 1/2, which is left out; a zero; divide by the largest.
    Example: with 4 bits these are NF4's values.
    Hint: `NormalDist().inv_cdf`; the negative half has one level fewer.
    """
    ### BEGIN SOLUTION
    n = 2**n_bits
    end = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    quantile = NormalDist().inv_cdf
    up, down = n // 2, n // 2 - 1
    levels = [quantile(end + (0.5 - end) * i / up) for i in range(up)]
    levels += [0.0] + [-quantile(end + (0.5 - end) * i / down) for i in range(down)]
    return sorted(level / quantile(end) for level in levels)
    ### END SOLUTION


# %% tags=["exercise-tests"]
four = torch.as_tensor(normal_float(4), dtype=torch.float64)
assert len(four) == 16, "16 levels: 8 positive, a zero, 7 negative"
assert (four.diff() > 0).all(), "ascending, and no level twice"
assert (four == 0).sum() == 1, "one exact zero: 1/2 itself is left out of both halves"
assert four[-1] == 1 and abs(four[0] + 1) < 1e-9, "divide by the largest"
assert (four > 0).sum() == 8, "the positive half has the level more"
assert torch.allclose(four, NF4.double(), rtol=0, atol=2e-7), (
    "the steps are equal in probability, from the offset to 1/2, on each side"
)
two = torch.as_tensor(normal_float(2), dtype=torch.float64)
assert len(two) == 4, "2 bits have 4 levels"
print("2 bits:", [round(v, 4) for v in two.tolist()])
### BEGIN HIDDEN TESTS
end = 1 - (1 / 8 + 1 / 6) / 2
middle = NormalDist().inv_cdf((end + 0.5) / 2) / NormalDist().inv_cdf(end)
assert abs(two[2] - middle) < 1e-6, "is the offset that of 2 bits, or still that of 4?"
assert two[[0, 1, 3]].tolist() == [-1, 0, 1]
three = torch.as_tensor(normal_float(3), dtype=torch.float64)
assert len(three) == 8 and (three == 0).sum() == 1
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: every byte counts
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# How many bytes does a weight of `n` numbers take in NF4? Count the packed codes, and the absmax either as float32 or doubly quantized.


# %% tags=["exercise"]
def nf4_bytes(n, block_size=64, double=True):
    """Bytes stored for `n` weights, a whole number.

    Approach: two codes a byte; a block that is not full has an absmax too. Doubly
    quantized: a byte for each absmax, a float32 for each 256 of them, a float32 offset.
    Example: 64 weights without double quantization take 32 + 4 bytes.
    Hint: -(-a // b) is a / b, rounded up.
    """
    ### BEGIN SOLUTION
    blocks = -(-n // block_size)
    codes = -(-n // 2)
    if not double:
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // 256) + 4
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert nf4_bytes(64, double=False) == 36, "32 bytes of codes and one float32"
assert nf4_bytes(65, double=False) == 41, (
    "33 bytes of codes, rounded up, and a second block of one weight"
)
assert nf4_bytes(64) == 32 + 1 + 4 + 4, (
    "a byte, a float32 for up to 256, and the offset"
)
assert nf4_bytes(64 * 257) == 32 * 257 + 257 + 2 * 4 + 4, "257 absmax take two float32"
assert nf4_bytes(4096, 128) == 2048 + 32 + 4 + 4, "is the block's size used?"
print(f"{8 * nf4_bytes(4096 * 4096) / 4096**2:.6f} bits per weight")
### BEGIN HIDDEN TESTS
for shape, size in (((33, 7), 32), ((64, 256), 128), ((1, 1), 64)):
    for double_too in (False, True):
        of_package = get_method("nf4", block_size=size, double_quantization=double_too)
        wanted = of_package.quantize(torch.ones(shape)).nbytes
        assert nf4_bytes(shape[0] * shape[1], size, double_too) == wanted
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: a turn of Lloyd's method
# *Difficulty 3/5 · 20 minutes · 3 points · no GPU*
#
# Values `x` lie in -1..1, each counting with its weight `count`, the absmax² of its block. Give each value its nearest level, then move each level to
# the weighted mean of its values.


# %% tags=["exercise"]
def lloyd_turn(x, levels, count):
    """(new levels, error): `x` and `count` `[n]`, `levels` `[k]` ascending.

    The error is the sum of count * (x - level)^2 *before* the levels move. A level
    that no value is nearest to stays. On a tie the lower level is taken.
    Approach: thresholds half way, codes, then sums of count * x and of count by code.
    Example: x = [0, 1, 3], levels [0, 2], counts 1: a tie at 1, so [0.5, 3], error 2.
    Hint: torch.bucketize, and `index_add` or a mask for each code.
    """
    ### BEGIN SOLUTION
    codes = torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)
    error = (count * (x - levels[codes]) ** 2).sum()
    new = levels.clone()
    for k in range(len(levels)):
        mine = codes == k
        if count[mine].sum() > 0:
            new[k] = (count * x)[mine].sum() / count[mine].sum()
    return new, error.item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
def turn(x, levels, count):
    given = (torch.tensor(v, dtype=torch.float64) for v in (x, levels, count))
    new, error = lloyd_turn(*given)
    return [round(float(v), 9) for v in new], float(error)


found, error = turn([0.0, 1, 3], [0.0, 2], [1.0, 1, 1])
assert found == [0.5, 3], "1 is as near to 0 as to 2: the lower level has it"
assert abs(error - 2) < 1e-9, "the error before the levels move: 0 + 1 + 1"
found, error = turn([0.0, 0.8, 3], [0.0, 3], [1.0, 3, 1])
assert found[0] == 0.6, "the mean is weighted: (0 + 3 * 0.8) / 4"
assert abs(error - 3 * 0.64) < 1e-9, "the error is weighted too"
found, _ = turn([0.0, 0.1], [-5.0, 0, 5], [1.0, 1])
assert found == [-5, 0.05, 5], "levels without values stay (0 / 0 is NaN)"
given = torch.tensor([0.0, 2]).double()
lloyd_turn(torch.tensor([1.9]).double(), given, torch.ones(1).double())
assert given.tolist() == [0, 2], "work on a copy of the levels"
### BEGIN HIDDEN TESTS
x = torch.linspace(-2, 3, 500).double() ** 3
at, errors = torch.linspace(-1, 1, 8).double(), []
for _ in range(100):
    at, error = lloyd_turn(x, at, x**2)
    errors.append(float(error))
assert torch.tensor(errors).diff().max() < 1e-9, "no turn may raise the error"
### END HIDDEN TESTS

# %% [markdown]
# The package's `lloyd_max` repeats such turns from two starts until no level moves, and keeps the end of less error.
#
# ## References
#
# - T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, *QLoRA: Efficient Finetuning of Quantized LLMs*, NeurIPS 2023, arXiv 2305.14314
#   [@dettmers2023qlora]; the code is in bitsandbytes.
# - T. Dettmers, *8-Bit Approximations for Parallelism in Deep Learning*, ICLR 2016, arXiv 1511.04561 [@dettmers2015eightbit].
# - D. Yoshida, *NF4 Isn't Information Theoretically Optimal (and that's Good)*, 2023, arXiv 2306.06965 [@yoshida2023nf4].
# - S. Lloyd, *Least squares quantization in PCM*, IEEE Transactions on Information Theory 28(2), 1982 [@lloyd1982pcm].
# - *NF4 reconstruction is worse than affine int4 below blocksize 64*, issue of bitsandbytes, 2026 [@bitsandbytes2026crossover].
# - The models course-lm (trained by this project, see its model card) and SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# QLoRA, for which NF4 was made, freezes these weights and trains small adapters beside them. `hqq_demo` needs no data either: it moves the zero
# point of the affine grid.

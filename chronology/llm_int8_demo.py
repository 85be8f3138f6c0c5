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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/llm_int8_demo.ipynb)
#
# # LLM.int8(): eight bits, and the few features that will not fit
#
# *Large Model Quantization: a deep dive. Milestone 1 of the chronology (2022).*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - quantize a matrix to int8 by absmax, multiply two such matrices in integers, and get back to
#   real numbers;
# - explain why one large value ruins a whole row, and find the features of a real language model
#   that do so;
# - build LLM.int8() [@dettmers2022llmint8]: integer arithmetic for nearly all features, floating
#   point for the few outliers;
# - quantize a whole language model and say, from your own measurement, what it costs and what it
#   gains in bytes, in quality and in time.
#
# It takes about an hour to read and work, on any laptop. You need to know what a matrix product
# is and what a linear layer does. The code runs in well under a minute with the profile `quick`,
# in a few minutes with `cpu`, and no profile needs a GPU.

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
import tempfile

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import (
    file_bytes,
    perplexity,
    process_bytes,
    tensor_bytes,
    time_per_token,
)
from course_utils.kernels import int8_matmul
from course_utils.models import linear_layers, load_model
from course_utils.plotting import (
    codes_against_outlier,
    error_against_threshold,
    feature_maxima,
    relative_bars,
)
from course_utils.profiles import resolve
from course_utils.quantizers.llm_int8 import vectorwise_quantize
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or the name of one model
SEED = 0
THRESHOLD = 6.0  # what the paper calls an outlier: |x| of this size and more

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
generator = torch.Generator().manual_seed(profile.seed)

# %% [markdown]
# ## The question
#
# Nearly all of a transformer's weights sit in its linear layers, and nearly all of its arithmetic is
# their product $y = x W^\top$, with activations `x` `[tokens, in]` and weights `W` `[out, in]`. Store
# `W` in 8-bit integers instead of 32-bit floats and it is four times smaller. Round `x` to 8 bits
# as well and the product itself can run in integers, which hardware with int8 units does faster.
#
# What we want to keep small is not the error of the weights but the error of the result,
#
# $$ \frac{\lVert y - \hat y \rVert^2}{\lVert y \rVert^2}, $$
#
# and what we want to keep smaller still is the damage to the whole model. LLM.int8() was the
# first method to do this for models of billions of parameters without a loss that its authors could
# measure. It needs no training and no calibration data.

# %% [markdown]
# ## Absmax quantization by hand
#
# Eight bits hold the integers from -128 to 127. Take the largest magnitude in a row, its **absmax**
# $a$, map it to 127, and everything else in proportion:
#
# $$ q = \mathrm{round}\!\left(x \cdot \frac{127}{a}\right), \qquad \hat x = q \cdot \frac{a}{127}. $$
#
# The code -128 is never used, so that the codes are symmetric: $-x$ always gets the code $-q$. Each row
# has its own absmax. Follow the first row below with pencil and paper: its absmax is 2.0, so its step
# is 2.0 / 127, and 0.5 is 31.75 steps, which rounds to 32.

# %% tags=["nbval-check-output"]
x = torch.tensor(
    [[0.5, -1.0, 2.0, 0.1], [3.0, 0.3, -0.3, 1.5], [-0.02, 0.01, 0.04, 0.03]]
)
absmax_x = x.abs().amax(1)  # [3]: one per row, that is per token
x_codes = (x * (127 / absmax_x)[:, None]).round().to(torch.int8)  # [3, 4]
print("absmax:", [round(v, 4) for v in absmax_x.tolist()])
print("codes:")
print(x_codes)
print(
    "bytes:",
    x.numel() * x.element_size(),
    "->",
    x_codes.numel() * x_codes.element_size(),
)

# %% [markdown]
# The third row's absmax is 75 times smaller than the second's, and it loses nothing by that: it has a scale of
# its own. Going back shows the rounding error. A value is off by at most half a step, that is by
# $a / 254$; PyTorch rounds a tie to the even neighbour.

# %% tags=["nbval-check-output"]
x_back = x_codes.float() * (absmax_x / 127)[:, None]  # [3, 4]
error = (x - x_back).abs().amax(1)
for row in range(3):
    bound = absmax_x[row] / 254
    print(f"row {row}: largest error {error[row]:.6f}, bound {bound:.6f}")
assert (error <= absmax_x / 254 * (1 + 1e-4)).all()  # float32 rounds, too

# %% [markdown]
# ## The product in integers
#
# Quantize the weights the same way, one scale per **output** (a row of `W`). The scale of a token and
# the scale of an output are constants of one entry of the result, so both can be pulled out of the sum:
#
# $$ y_{ij} = \sum_k x_{ik} W_{jk} \;\approx\; \frac{a^x_i}{127}\,\frac{a^W_j}{127}
# \underbrace{\sum_k q^x_{ik}\, q^W_{jk}}_{\text{integers only}}. $$
#
# The paper calls this *vector-wise* quantization. Had each *feature* $k$ its own scale, the scales would
# stay inside the sum and the integers would be of no use. That detail will matter below.

# %% tags=["nbval-check-output"]
W = torch.tensor([[0.2, -0.4, 0.1, 0.3], [-1.0, 0.5, 0.25, 0.75]])  # [out=2, in=4]
absmax_W = W.abs().amax(1)  # [2]: one per output
W_codes = (W * (127 / absmax_W)[:, None]).round().to(torch.int8)
sums = x_codes.int() @ W_codes.int().T  # [3, 2], int32
print("integer sums:")
print(sums)

# %%
y = x @ W.T
y_int8 = (
    sums * (absmax_x[:, None] * absmax_W) / 127**2
)  # the outer product of the scales
print("float:", [[round(v, 4) for v in row] for row in y.tolist()])
print("int8: ", [[round(v, 4) for v in row] for row in y_int8.tolist()])
print(f"relative error {(y - y_int8).square().sum() / y.square().sum():.1e}")

# %% [markdown]
# Two codes multiply to at most $127^2 = 16129$, so the sum needs more than 8 bits. Hardware adds int8
# products into an **int32** accumulator. With 8 bits the sum would wrap around; with 32 it is exact for more
# features than any layer has.

# %% tags=["nbval-check-output"]
wrapped = sums.to(torch.int8)  # what an 8-bit accumulator would be left with
print("int32:", sums[0].tolist(), " int8:", wrapped[0].tolist())
print("features an int32 sum is safe for:", (2**31 - 1) // 127**2)

# %% [markdown]
# ## Why one outlier ruins a row
#
# The absmax sets the step for the whole row. Make one of 512 values large and all the others have to
# share the few codes that are left near zero. We draw a row from a normal distribution and replace its
# last entry.

# %%
row = torch.randn(512, generator=generator).clamp(-3, 3)
print("outlier   step   distinct codes of the other 511   their relative error")
for outlier in (3.0, 10.0, 60.0, 600.0):
    row[-1] = outlier
    step = row.abs().max() / 127
    codes = (row / step).round()
    rest, back = row[:-1], (codes * step)[:-1]
    loss = (rest - back).square().sum() / rest.square().sum()
    print(f"{outlier:7.0f} {step:6.3f} {len(codes[:-1].unique()):18d} {loss:30.1e}")

# %%
figure = codes_against_outlier(row, [3.0, 60.0, 600.0])
plt.show()

# %% [markdown]
# *Figure: three histograms of int8 codes of the same row. With a last entry of 3, no larger than the others, the codes
# fill the range; with 60 they crowd into a few bars around zero; with 600 all values but the
# outlier fall on the code zero or its neighbours.*
#
# The error of the other values grows with the *square* of the step, and so of the outlier, until they round to
# zero (last line of the table): then it levels off near 1, and the row is lost.

# %% [markdown]
# ## Real activations
#
# Do language models have such values? Dettmers et al. found that they do, and that they are not spread at
# random: they sit in the **same few features** across layers, and in models beyond
# 6.7 billion parameters they appear in every layer [@dettmers2022llmint8]. We look at the inputs of
# every linear layer of our models, over a few hundred tokens that no model is evaluated on.

# %%
models = profile.load_models()
n_tokens = profile.pick(quick=256, cpu=512)


@torch.no_grad()
def layer_inputs(model, tokens):
    """Input `[tokens, in]` of every linear layer, by the layer's name."""
    inputs, hooks = {}, []
    for layer in linear_layers(model):

        def keep(module, args, output, name=layer.name):
            inputs[name] = args[0].flatten(0, -2)

        hooks.append(layer.module.register_forward_hook(keep))
    model(input_ids=tokens.to(model.device))
    for hook in hooks:
        hook.remove()
    return inputs


# %%
inputs = {}
for name, (model, tokenizer) in models.items():
    length = min(n_tokens, model.config.max_position_embeddings)
    tokens = calibration_tokens(tokenizer, 1, length, seed=profile.seed)
    inputs[name] = layer_inputs(model, tokens)
    maxima = {k: v.abs().amax(0) for k, v in inputs[name].items()}
    with_outliers = sum(bool((m >= THRESHOLD).any()) for m in maxima.values())
    largest = max(maxima, key=lambda k: maxima[k].max().item())
    print(
        f"{name}: {with_outliers} of {len(maxima)} layers see a value >= {THRESHOLD:g}."
    )
    print(f"  The largest, {maxima[largest].max():,.1f}, enters {largest},")
    print(f"  where the median feature reaches {maxima[largest].median():.2f}.")
    above = {layer: int((m >= THRESHOLD).sum()) for layer, m in maxima.items()}
    most = max(above, key=above.get)
    print(f"  Most outlier features: {above[most]} of {len(maxima[most])}, in {most}.")

# %% [markdown]
# Which layer suffers most? Not the one with the largest value, but the one where large values meet *many*
# tokens and small companions. We quantize every layer's weight and inputs to plain int8 and take the one with
# the largest relative output error.


# %%
def relative_error(y, approximation):
    return ((y - approximation).square().sum() / y.square().sum()).item()


plain = get_method("llm_int8", threshold=0.0)
worst = {}
for name, (model, _) in models.items():
    weights = {layer.name: layer.weight for layer in linear_layers(model)}
    errors = {}
    for layer, x in inputs[name].items():
        y_int8 = plain.linear(x, plain.quantize(weights[layer]), None)
        errors[layer] = relative_error((x @ weights[layer].T).float(), y_int8.float())
    layer = max(errors, key=errors.get)
    worst[name] = layer, inputs[name][layer].float(), weights[layer].float()
    median = sorted(errors.values())[len(errors) // 2]
    print(
        f"{name}: worst layer {layer}, error {errors[layer]:.1e}; median {median:.1e}"
    )

# %%
panels = {f"{m}\n{layer}": x.abs().amax(0).cpu() for m, (layer, x, W) in worst.items()}
panels[f"{name}, largest value\n{largest}"] = maxima[largest].cpu()
figure = feature_maxima(panels, THRESHOLD)
plt.show()

# %% [markdown]
# *Figure: one dot per input feature of each model's worst layer, and last of the layer with the largest value, at
# the height of its largest magnitude over the tokens, on a logarithmic axis; a dashed line marks the threshold, triangles mark features above
# it.*
#
# The next cell says what there is to see in numbers. Two things to keep apart:
#
# - **Outlier features** in the paper's sense: moderately large, in the same feature of most tokens. They
#   stretch the step of *nearly every row*.
# - **Massive activations** [@sun2024massive]: hidden-state values a thousand times the median, in a few tokens.
#   They ruin *their own rows* and leave the others alone, since every token has its own scale. The layer with
#   the largest value, in the last panel, is an input inside an MLP of this kind, if the model has any.
#
# A model may pass the threshold here and there without either: what counts is the ratio to its other features.

# %%
for name, (layer, x, _) in worst.items():
    hit = x.abs() >= THRESHOLD  # [tokens, in]
    columns, rows = hit.any(0), hit.any(1)
    ratio = x.abs().amax(0).max() / x.abs().amax(0).median()
    print(f"{name}, {layer}:")
    print(
        f"  {int(columns.sum())} of {x.shape[1]} features are outliers; they reach "
        f"{int(rows.sum())} of {len(x)} tokens."
    )
    print(
        f"  The largest feature is {ratio:.1f} times the median one: "
        + ("a strong outlier." if ratio > 10 else "no outlier worth the name.")
    )
massive = inputs[name][largest].abs() >= 100  # [tokens, in]
print(f"{name}, {largest}: values of 100 and more in {int(massive.any(0).sum())}")
print(f"  feature(s) and {int(massive.any(1).sum())} of {len(massive)} token(s).")

# %% [markdown]
# ## The decomposition, step by step
#
# The idea of LLM.int8() is to take the outlier features out. Let $O$ be the set of features in which
# some token reaches the threshold $\alpha = 6$. Then
#
# $$ y_{ij} \;\approx\; \underbrace{\sum_{k \in O} x_{ik} W_{jk}}_{\text{floating point}} \;+\;
# \frac{a^x_i a^W_j}{127^2} \underbrace{\sum_{k \notin O} q^x_{ik} q^W_{jk}}_{\text{int8, int32 sums}},
# $$
#
# equation 8 of the paper. $O$ is found anew for every input: that is why no calibration is needed. We take the
# last model's worst layer.

# %%
model_name = list(worst)[-1]
layer, x, W = worst[model_name]
y = x @ W.T
outliers = (
    (x.abs() >= THRESHOLD).any(0).nonzero().flatten()
)  # a value of exactly 6.0 counts
print(f"{model_name}, {layer}: x {list(x.shape)}, W {list(W.shape)}")
print(f"step 1: {len(outliers)} outlier features, for example {outliers[:8].tolist()}")

# %% [markdown]
# Step 2: the scales of the rows, now without the outliers. Here is a detail in which implementations
# differ. The *values* above the threshold are left out of the absmax; the small values that share a
# column with an outlier still count, although their codes are set to zero. We follow bitsandbytes, the
# authors' own library.

# %%
small = x.masked_fill(x.abs() >= THRESHOLD, 0.0)
absmax_x = small.abs().amax(1)
shrunk = x.abs().amax(1) / absmax_x
print(
    f"step 2: rows' absmax falls by a factor of {shrunk.median():.1f} in the median, "
    f"{shrunk.max():,.1f} at most"
)
x_codes = (small * (127 / absmax_x)[:, None]).round().to(torch.int8)
x_codes[:, outliers] = 0  # step 3: whole columns leave the integer product

# %% [markdown]
# Steps 4 and 5: the two products, and their sum. For the floating-point part we have a choice, and it is the
# place where the paper and its library part ways. The equation multiplies the outliers with the **original**
# weights. The library has thrown those away, and takes the int8 columns, **dequantized**.

# %%
absmax_W = W.abs().amax(1)
W_codes = (W * (127 / absmax_W)[:, None]).round().to(torch.int8)
integer_part = int8_matmul(x_codes, W_codes) * (absmax_x[:, None] * absmax_W) / 127**2
W_back = W_codes.float() * (absmax_W / 127)[:, None]
y_library = integer_part + x[:, outliers] @ W_back[:, outliers].T
y_paper = integer_part + x[:, outliers] @ W[:, outliers].T
y_plain = plain.linear(x, plain.quantize(W), None)

print(f"plain int8, no decomposition:      {relative_error(y, y_plain):.2e}")
print(f"LLM.int8(), dequantized columns:   {relative_error(y, y_library):.2e}")
print(f"LLM.int8(), original columns:      {relative_error(y, y_paper):.2e}")

# %% [markdown]
# (This small cell keeps float32 columns; the package keeps float16, as the paper has it.) Is the second form worth
# it? Which columns are needed is known only when the input is there, so *all* original
# weights have to be kept beside the codes. `QuantizedWeight` counts the bytes of every tensor it stores,
# so the price can be read off.

# %% tags=["nbval-check-output"]
example = torch.linspace(-1, 1, 256 * 512).reshape(256, 512)
for form in ("dequantized", "original"):
    stored = get_method("llm_int8", outlier_weights=form).quantize(example)
    parts = {name: list(t.shape) for name, t in stored.tensors().items()}
    print(f"{form}: {stored.bits_per_weight:.4f} bits per weight, {parts}")

# %% [markdown]
# More than 16 bits per weight is more than half precision itself. The library's choice is the only one that saves
# memory, and everything below uses it.

# %% [markdown]
# ## Does the threshold matter, or just the number of columns?
#
# Lower the threshold and more columns become floating point; the error must fall, for that reason alone. So an
# honest sweep needs a **control**: keep as many columns in float, but choose them at random. Only
# what the outliers gain *over the control* is due to choosing them. (In this sweep a chosen column leaves the
# absmax altogether, small values included; the last line compares that with the library's rule of step 2.)


# %%
def decomposed_error(columns):
    """Relative output error with these feature columns in floating point."""
    kept = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    kept[columns] = True
    codes, absmax, _ = vectorwise_quantize(x.masked_fill(kept, 0))
    part = int8_matmul(codes, W_codes) * (absmax[:, None] * absmax_W) / 127**2
    return relative_error(y, part + x[:, kept] @ W_back[:, kept].T)


thresholds = [None, 100.0, 20.0, 10.0, 6.0, 4.0, 3.0, 2.0, 1.0]
peaks = x.abs().amax(0)
kept, sweep = [], {"columns above the threshold": [], "as many columns at random": []}
for threshold in thresholds:
    chosen = [] if threshold is None else (peaks >= threshold).nonzero().flatten()
    draws = [
        torch.randperm(len(peaks), generator=generator)[: len(chosen)] for _ in range(5)
    ]
    kept.append(len(chosen))
    sweep["columns above the threshold"].append(decomposed_error(chosen))
    control = sorted(decomposed_error(draw) for draw in draws)[2]  # the median draw
    sweep["as many columns at random"].append(control)

# %%
figure = error_against_threshold(kept, sweep, thresholds)
plt.show()
print("threshold  columns  error     control")
for row in zip(thresholds, kept, *sweep.values(), strict=True):
    print(f"{row[0] or 'none':>9}  {row[1]:7d}  {row[2]:.2e}  {row[3]:.2e}")
whole = decomposed_error(outliers)
print(
    f"threshold {THRESHOLD:g}: {whole:.2e} with outlier columns out of the absmax, "
    f"{relative_error(y, y_library):.2e} by the library's rule"
)

# %% [markdown]
# *Figure: relative output error against the number of feature columns kept in float, on a logarithmic scale (the x-axis from 1 on, with 0 added); one
# curve for the columns above the threshold, labelled with the threshold, one for as many random
# columns.*
#
# Read the table from the top. Where the model has a strong outlier, the first column or two take most of the
# error away, and as many random columns change almost nothing. Each further column gains less, though the error goes
# on falling. On a model without outliers the two curves start together and part slowly, and a threshold
# of 6 is work for nothing.

# %% [markdown]
# ## Is it right? The package, and bitsandbytes
#
# What we have built in small cells is what `course_utils` holds in one module. Codes must agree exactly, and
# the outputs do to rounding.

# %%
method = get_method("llm_int8", threshold=THRESHOLD)
codes, absmax, columns = vectorwise_quantize(x, THRESHOLD)
assert torch.equal(codes, x_codes) and torch.equal(absmax, absmax_x)
assert torch.equal(columns, outliers)
assert torch.equal(method.quantize(W).codes, W_codes)
y_package = method.linear(x, method.quantize(W), None)
torch.testing.assert_close(
    y_package, y_library, rtol=1e-4, atol=1e-4 * y.abs().max().item()
)
print(
    "The package's codes, scales and outlier columns are the ones built above, exactly."
)

# %% [markdown]
# bitsandbytes is the library behind `load_in_8bit` in `transformers`. Its integers have to be ours, bit for
# bit. Its output may differ a little: on a CPU without AVX-512 it multiplies the codes in float32, which is exact only
# up to $2^{24}$, and its factor for $1/127^2$ reads `6.200124e-05` (we looked at version 0.50.2), where
# $1/127^2 = 6.20001\ldots \cdot 10^{-5}$. We compare outputs to $10^{-4}$ of the largest.

# %%
try:
    import bitsandbytes.functional as bnb
except ImportError:
    print("bitsandbytes is not installed here: this comparison is left out.")
else:
    their_codes, their_absmax, their_columns = bnb.int8_vectorwise_quant(
        x.clone(), THRESHOLD
    )
    assert torch.equal(their_codes, codes) and torch.equal(their_absmax, absmax)
    found = [] if their_columns is None else their_columns.tolist()
    assert found == columns.tolist()
    weight_codes, weight_absmax, _ = bnb.int8_vectorwise_quant(W.clone())
    assert torch.equal(weight_codes, W_codes) and torch.equal(weight_absmax, absmax_W)
    print(f"bitsandbytes: {codes.numel() + W_codes.numel():,} codes, all equal.")
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, their_codes, weight_codes, their_absmax, weight_absmax, their_columns
    )
    off = ((theirs - y_package).abs().max() / theirs.abs().max()).item()
    print(f"outputs: largest difference {off:.1e} of the largest output.")
    assert off < 1e-4
print(
    f"1 / 127^2 = {1 / 127**2:.8e}; relative difference to 6.200124e-05: "
    f"{6.200124e-05 * 127**2 - 1:.1e}"
)

# %% [markdown]
# ## A whole model
#
# `quantize_model` replaces every linear layer by one that holds packed codes. Embeddings and the LM head
# stay in float, as in the paper. The float weights are gone afterwards: the layer has nothing to fall back on.

# %%
tokens_of = {"calibration": (1, profile.pick(quick=128, cpu=256))}
variants = {name: {"float": model} for name, (model, _) in models.items()}
for name, (model, tokenizer) in models.items():
    calibration = calibration_tokens(
        tokenizer, *tokens_of["calibration"], seed=profile.seed
    )
    for variant, threshold in (("int8", 0.0), ("llm_int8", THRESHOLD)):
        quantized = copy.deepcopy(model)
        report = quantize_model(
            quantized,
            get_method("llm_int8", threshold=threshold),
            calibration=calibration,
        )
        variants[name][variant] = quantized
        print(
            f"{name}, {variant}: {report.bits_per_weight:.3f} bits per weight; "
            f"worst layer error {max(r.output_error for r in report.layers):.1e}"
        )
        key = f"llm_int8.{name}.{variant}"
        record(
            f"{key}.bits_per_weight", report.bits_per_weight, "bits", 1e-6, model=name
        )
        record(f"{key}.linear_bytes", report.nbytes, "bytes", 0, model=name)

# %% [markdown]
# ### Bytes
#
# Bytes are easy to claim and easy to measure, so we measure them three times: the tensors of the model, the
# file that `save_pretrained` writes, and the growth of a fresh process that loads the file. The third is what your
# machine has to have.

# %%
size = {}
for name, of_model in variants.items():
    linear = [layer.weight for layer in linear_layers(of_model["float"])]
    float_bytes = sum(w.nbytes for w in linear)
    key = f"llm_int8.{name}.float"
    bits = 8 * linear[0].element_size()
    record(f"{key}.bits_per_weight", bits, "bits", 0, model=name)
    record(f"{key}.linear_bytes", float_bytes, "bytes", 0, model=name)
    for variant in ("float", "llm_int8"):
        with tempfile.TemporaryDirectory() as folder:
            of_model[variant].save_pretrained(folder)
            models[name].tokenizer.save_pretrained(folder)
            fresh = process_bytes(folder)
            measured = tensor_bytes(of_model[variant]), file_bytes(folder), fresh
        size[name, variant] = measured
        tensors, file, process = (f"{n / 1e6:.1f} MB" for n in measured)
        print(f"{name}, {variant}: tensors {tensors}, file {file}, process {process}")

# %%
for name in variants:
    before, after = size[name, "float"], size[name, "llm_int8"]
    weights = [layer.weight for layer in linear_layers(models[name].model)]
    linear = sum(w.numel() * w.element_size() for w in weights)
    print(
        f"{name}: linear layers are {linear / before[0]:.0%} of the float model; "
        f"the whole model shrinks {before[0] / after[0]:.2f} times as tensors, "
        f"{before[2] / after[2]:.2f} times as a process."
    )
    halved = before[0] * 2 / weights[0].element_size()
    print(f"  Against the model in float16: {halved / after[0]:.2f} times as tensors.")

# %% [markdown]
# The linear layers shrink by a factor of just under four against float32 (a scale per row is the difference), and of just
# under two against float16, the usual way to store a model. The whole model shrinks by less, because the embedding stays in
# float, and in small models the embedding is a large share. The process grows by more than the tensors: loading
# needs buffers of its own, which weigh most in a small model.

# %% [markdown]
# ### Quality
#
# Perplexity on the evaluation split of the CIA World Factbook, the start of each of its documents. course-lm
# was not trained on them; what SmolLM2 saw in its training we do not know. Tokens, window and stride stand behind each
# figure. Perplexities of models with different tokenizers cannot be compared with each other, only down a
# column.

# %%
quality = {}
for name, of_model in variants.items():
    n = profile.pick(quick=2048, cpu=8192)
    window = min(512, of_model["float"].config.max_position_embeddings)
    tokens = evaluation_tokens(models[name].tokenizer, n)
    quality[name] = {}
    for variant, model in of_model.items():
        result = perplexity(model, tokens, window=window)
        quality[name][variant] = result.perplexity
        record(
            f"llm_int8.{name}.{variant}.perplexity",
            result.perplexity,
            "",
            0.05,
            model=name,
            corpus="factbook",
            tokens=n,
            window=window,
            stride=window,
        )
        print(f"{name:18} {variant:9} perplexity {result}")

# %%
for name, q in quality.items():
    plain_loss, int8_loss = (q[v] / q["float"] - 1 for v in ("int8", "llm_int8"))
    print(
        f"{name}: plain int8 changes the perplexity by {plain_loss:+.2%}, "
        f"LLM.int8() by {int8_loss:+.2%}."
    )
    if plain_loss > 0.005:
        back = 1 - int8_loss / plain_loss
        print(f"  The decomposition takes back {back:.0%} of the loss.")
    else:
        print("  There is next to nothing to take back: no strong outliers.")

# %% [markdown]
# The paper chose 6.0 on models with billions of parameters, and reports no loss there. Is it right for a small one? We
# sweep the threshold over the whole model. The last row has a threshold so small that every column is
# computed in float: what is lost there is lost by rounding the *weights* to int8, and no threshold can give it back.

# %%
name = list(models)[-1]
model, tokenizer = models[name]
tokens = evaluation_tokens(tokenizer, profile.pick(quick=512, cpu=2048))
window = min(512, model.config.max_position_embeddings)
reference = perplexity(model, tokens, window=window)
print(f"{name}, float: {reference}")
for threshold in (0.0, 6.0, 4.0, 2.0, 1e-6):
    quantized = copy.deepcopy(model)
    quantize_model(quantized, get_method("llm_int8", threshold=threshold))
    loss = (
        perplexity(quantized, tokens, window=window).perplexity / reference.perplexity
        - 1
    )
    print(f"  threshold {threshold or 'none':>6}: perplexity {loss:+.2%}")

# %% [markdown]
# These are fewer tokens than above, so the changes differ from the last table: with so little text, figures of this
# size move by a percentage point. The last row is the point: rounding the weights to eight bits costs next to
# nothing, and what is lost above it is lost by rounding the *activations*. Lower thresholds help because more
# of the product is float. This sweep has no control, so it does not say whether the columns it adds are outliers.

# %% [markdown]
# ### Time
#
# Here many courses write "and faster". We generate text one token at a time, as a chat does, and look.

# %%
speed = {}
for name, of_model in variants.items():
    prompt = evaluation_tokens(models[name].tokenizer, 32)
    speed[name] = {}
    for variant, model in of_model.items():
        timing = time_per_token(
            model, prompt, new_tokens=profile.pick(quick=16, cpu=32)
        )
        speed[name][variant] = timing.median
        record(
            f"llm_int8.{name}.{variant}.ms_per_token", timing.median, "ms", model=name
        )
        print(f"{name:18} {variant:9} {timing}")
    slower = speed[name]["llm_int8"] / speed[name]["float"]
    print(f"  LLM.int8() takes {slower:.1f} times as long per token as float.")

# %%
figure = relative_bars(speed, "time per token, float = 1")
plt.show()

# %% [markdown]
# *Figure: for each model three bars: time per generated token in float, plain int8 and LLM.int8(), each divided
# by the float time.*
#
# It is slower, and that is no accident of our code alone. Finding the outliers, quantizing the input, gathering
# columns and adding a second product are work that the float layer does not have. Our integer product also converts
# the codes to float32 on the way, which is exact but no faster than the float product. On a GPU with int8 units
# the integer product itself is faster, and yet the authors' own blog shows a small model, T5-3B, at 312 ms per
# token in int8 on one T4 against 45 ms in float32 on two, and 173 ms after tuning [@belkada2022gentle]. What
# the method saves is memory.

# %% [markdown]
# ## Limits
#
# - The threshold 6.0 is a magnitude, not a rank: it fits the activations of the models it was chosen on. Where a layer's
#   ordinary values exceed it, a large part of the product is done in float after all: see the line "most
#   outlier features" above.
# - Which columns are outliers depends on the *batch*: one token with a massive activation makes the column
#   float for all tokens. The same sentence may therefore give slightly different outputs in another batch.
# - The paper studies eight bits. With fewer, one scale for a whole row is coarser; the next milestones give
#   groups of weights their own scale (GPTQ, AWQ) or another set of levels (NF4).
# - Weights could be better rounded than each to its nearest code. That is what GPTQ is about.

# %% [markdown]
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: a row of zeros
# *Difficulty 1/5 · 5 minutes · 1 point · no GPU*
#
# Padding produces rows of zeros. `127 / absmax` is then infinite, and infinity times zero is not a number. Write
# absmax quantization that gives a row of zeros the codes 0.


# %% tags=["exercise"]
def absmax_quantize(x):
    """Codes (int8) and absmax of each row of `x` `[rows, columns]`; zero rows: codes 0.

    Approach: replace the factor 127 / absmax where absmax is 0, before multiplying.
    Example: [[0, 0], [1, -2]] gives [[0, 0], [64, -127]] (63.5 rounds to the even 64).
    Hint: torch.where.
    """
    ### BEGIN SOLUTION
    absmax = x.abs().amax(1)
    factor = torch.where(absmax > 0, 127 / absmax, 0.0)
    return (x * factor[:, None]).round().to(torch.int8), absmax
    ### END SOLUTION


# %% tags=["exercise-tests"]
codes, absmax = absmax_quantize(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
assert codes.dtype == torch.int8, "the codes must be int8, not float"
assert codes[1].tolist() == [64, -127], "ties round to even: 63.5 becomes 64"
assert codes[0].tolist() == [0, 0], (
    "a row of zeros has codes 0: is there a NaN on the way?"
)
### BEGIN HIDDEN TESTS
probe = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
probe[2] = 0
assert torch.equal(absmax_quantize(probe)[0], vectorwise_quantize(probe)[0])
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: when does float32 stop counting?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# A float32 number holds every integer up to $2^{24}$. If an int8 product is computed in float32, as a CPU library may do,
# for how many features is the sum *guaranteed* to be exact, with codes from -127 to 127? And for codes that are
# random and uniform, at how many features does a sum typically reach the limit? (The standard deviation of a sum
# of n independent terms is the square root of n times that of one.)


# %% tags=["exercise"]
def exact_features():
    """(guaranteed, typical): features up to which float32 sums of products are exact.

    Approach: the guarantee is 2^24 over the largest product. For the typical case, one
    term has variance v^2, v the variance of a uniform code; solve sqrt(n) * v = 2^24.
    Example: with 4-bit codes (-7 to 7) the guarantee would be 342,392 features.
    Hint: a uniform integer from -m to m has variance m (m + 1) / 3.
    """
    ### BEGIN SOLUTION
    guaranteed = 2**24 // 127**2
    variance = 127 * 128 / 3
    return guaranteed, int((2**24 / variance) ** 2)
    ### END SOLUTION


# %% tags=["exercise-tests"]
guaranteed, typical = exact_features()
assert guaranteed == 1040, "divide 2^24 by the largest product of two codes, 127 * 127"
assert 9_000_000 < typical < 10_000_000, (
    "use the variance of one product, v * v, under the root"
)
### BEGIN HIDDEN TESTS
ones = torch.full((1, 1041), 127.0)
assert int((ones[:, :1040] @ ones[:, :1040].T).item()) == 1040 * 127**2
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: outliers by rank
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# The fixed threshold knows nothing of the layer. Choose instead the `k` features with the largest peak, whatever
# their size. Return the relative output error for the layer used above, with those columns in float.


# %% tags=["exercise"]
def error_with_top_features(x, W, k):
    """Relative error of `x` `[tokens, in]` times `W` `[out, in]`, k features in float.

    Approach: find the k features with the largest |x|, set them to zero, quantize the
    rest and W, multiply in integers, and add the float product of the k features (with
    the original W).
    Example: k equal to the number of features gives an error of about 0.
    Hint: torch.topk; vectorwise_quantize; int8_matmul.
    """
    ### BEGIN SOLUTION
    top = x.abs().amax(0).topk(k).indices
    rest = x.clone()
    rest[:, top] = 0
    x_q, x_max, _ = vectorwise_quantize(rest)
    w_q, w_max, _ = vectorwise_quantize(W)
    product = int8_matmul(x_q, w_q) * (x_max[:, None] * w_max) / 127**2
    y = x @ W.T
    difference = y - (product + x[:, top] @ W[:, top].T)
    return (difference.square().sum() / y.square().sum()).item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
draw = torch.Generator().manual_seed(0)
features = torch.randn(64, 256, generator=draw)  # [tokens, in]
features[:, [7, 99]] *= torch.tensor([20.0, 50.0])  # two outlier features
weight = torch.randn(128, 256, generator=draw) / 16  # [out, in]
top_errors = [error_with_top_features(features, weight, k) for k in (0, 1, 2, 16, 256)]
assert top_errors[-1] < 1e-6, "with all features in float nothing may be lost"
assert top_errors[2] < top_errors[0] / 10, (
    "take the absmax after the k features are gone"
)
print("k = 0, 1, 2, 16, all:", [f"{e:.1e}" for e in top_errors])
### BEGIN HIDDEN TESTS
assert top_errors[1] > 2 * top_errors[2], "one feature of two is not enough"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: what the embedding costs
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# The LM head and the embedding stay in float32. How many bits per parameter does a *whole* model take? Compute it from
# the numbers of parameters, with 8 bits and one float32 scale per row for the linear layers.


# %% tags=["exercise"]
def bits_per_parameter(linear_shapes, other_parameters):
    """Average bits per parameter of a model with LLM.int8() weights.

    Approach: add up the bits of codes, of scales and of float32 parameters; divide by
    all parameters (scales are no parameters).
    Example: one layer of shape (4, 8) and no others gives 8 + 4 * 32 / 32 = 12 bits.
    Hint: shape is (out, in), and there is one scale per output.
    """
    ### BEGIN SOLUTION
    weights = sum(out * columns for out, columns in linear_shapes)
    scales = sum(out for out, _ in linear_shapes)
    bits = 8 * weights + 32 * scales + 32 * other_parameters
    return bits / (weights + other_parameters)
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert bits_per_parameter([(4, 8)], 0) == 12, (
    "one float32 scale for each of the 4 outputs"
)
assert bits_per_parameter([], 10) == 32, "parameters outside linear layers take 32 bits"
small_lm = load_model("course-lm").model
shapes = [tuple(layer.weight.shape) for layer in linear_layers(small_lm)]
other = small_lm.num_parameters() - sum(out * columns for out, columns in shapes)
print(f"course-lm: {bits_per_parameter(shapes, other):.2f} bits per parameter")
### BEGIN HIDDEN TESTS
assert abs(bits_per_parameter([(100, 1000)], 100_000) - (8.032 + 32) / 2) < 1e-9
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - T. Dettmers, M. Lewis, Y. Belkada, L. Zettlemoyer, *LLM.int8(): 8-bit Matrix Multiplication for Transformers
#   at Scale*, NeurIPS 2022, arXiv 2208.07339 [@dettmers2022llmint8].
# - Y. Belkada, T. Dettmers, *A Gentle Introduction to 8-bit Matrix Multiplication for transformers at scale*,
#   Hugging Face blog, August 2022 [@belkada2022gentle].
# - M. Sun, X. Chen, J. Z. Kolter, Z. Liu, *Massive Activations in Large Language Models*, COLM 2024,
#   arXiv 2402.17762 [@sun2024massive].
# - The models: course-lm (trained by this project, see its model card), SmolLM2 [@allal2025smollm2], GPT-2
#   [@radford2019gpt2].
#
# ## Next
#
# `gptq_demo`: from eight bits to four, by rounding each weight so that the errors of its row cancel.

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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/llm_int8_demo.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/llm_int8_demo.ipynb)
#
# # LLM.int8(): eight bits, and the few features that will not fit
#
# *Large Model Quantization: a deep dive. Milestone 1 of the chronology (2022).*

# %% [markdown]
# **One question**: can the products of a language model run in 8-bit integers, although a few of its
# features are enormous? When you have worked through this notebook you will be able to
#
# - quantize a matrix to int8 by absmax, multiply two such matrices in integers, and get back to
#   real numbers;
# - explain why one large value ruins a whole row, and find the features of a real language model
#   that do so;
# - build LLM.int8() [@dettmers2022llmint8]: integer arithmetic for nearly all features, floating
#   point for the few outliers;
# - say, from a paired measurement with its error, what the method costs and gains in quality, in
#   bytes and in time.
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
import logging
import tempfile
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import (
    compare_all,
    continuations,
    difference,
    file_bytes,
    format_difference,
    process_bytes,
    prompt_of,
    tensor_bytes,
    time_per_token,
)
from course_utils.kernels import int8_matmul
from course_utils.kernels.fixed_point import quantize_multiplier
from course_utils.models import linear_layers, load_model

# %%
from course_utils.plotting import (
    codes_against_outlier,
    error_against_threshold,
    feature_maxima,
    new_figure,
    relative_bars,
    table,
)
from course_utils.plotting.diagrams import activation_heatmap, integer_data_flow
from course_utils.profiles import resolve
from course_utils.quantizers.llm_int8 import (
    Int8Weight,
    LLMInt8,
    int8_linear,
    vectorwise_quantize,
)
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
# their product $y = x W^\top$, with activations `x` `[tokens, in]` and weights `W` `[out, in]`. In
# 8-bit integers `W` is four times smaller than in 32-bit floats. If `x` is rounded to 8 bits as well,
# the product itself can run in integers.
#
# A layer's result should change little. We measure its **relative output error**,
#
# $$ \frac{\lVert y - \hat y \rVert^2}{\lVert y \rVert^2}, $$
#
# and then the damage to the whole model. LLM.int8() was the first method to do this for models of
# billions of parameters without a loss that its authors could measure. It needs no training and no
# **calibration**, that is, no sample text from which anything is tuned.

# %% [markdown]
# ## Absmax quantization by hand
#
# Eight bits hold the integers from -128 to 127. Take the largest magnitude in a row, its **absmax**
# $a$, map it to 127, and everything else in proportion:
#
# $$ q = \mathrm{round}\!\left(x \cdot \frac{127}{a}\right), \qquad \hat x = q \cdot \frac{a}{127}. $$
#
# The code -128 is never used, so that $-x$ always gets the code $-q$. Follow the first row below with
# pencil and paper: its absmax is 2.0, so its step is 2.0 / 127, and 0.5 is 31.75 steps, which rounds
# to 32.

# %% tags=["nbval-check-output"]
x = torch.tensor(
    [[0.5, -1.0, 2.0, 0.1], [3.0, 0.3, -0.3, 1.5], [-0.02, 0.01, 0.04, 0.03]]
)  # [tokens=3, in=4]
absmax_x = x.abs().amax(1)  # [3]: one per row, that is per token
x_codes = (x * (127 / absmax_x)[:, None]).round().to(torch.int8)  # [3, 4]
print("absmax:", [round(v, 4) for v in absmax_x.tolist()])
print("codes:", x_codes.tolist())

# %% [markdown]
# The third row's absmax is 75 times smaller than the second's. The row loses nothing by that, since it has
# a step of its own. A value is off by at most half a step, $a / 254$:

# %%
x_back = x_codes.float() * (absmax_x / 127)[:, None]  # [3, 4]
error = (x - x_back).abs().amax(1)  # [3]
assert (error <= absmax_x / 254 * (1 + 1e-4)).all()  # float32 rounds, too
rows = zip(absmax_x.tolist(), error.tolist(), (absmax_x / 254).tolist(), strict=True)
table([{"absmax": a, "largest error": e, "half a step": h} for a, e, h in rows])

# %% [markdown]
# Each row stays within half of its own step. Rows 0 and 1 reach it: there a value lies in the middle
# of two codes, and PyTorch rounds such a tie to the even one.
#
# ## The product in integers
#
# Quantize the weights the same way, one scale per **output** (a row of `W`). The scale of a token and
# the scale of an output are constants of one entry of the result. Both can be pulled out of the sum:
#
# $$ y_{ij} = \sum_k x_{ik} W_{jk} \;\approx\; \frac{a^x_i}{127}\,\frac{a^W_j}{127}
# \underbrace{\sum_k q^x_{ik}\, q^W_{jk}}_{\text{integers only}}. $$
#
# The paper calls this **vector-wise** quantization. If each *feature* $k$ had its own scale, the scales
# would stay inside the sum, and the sum would not be one of integers. Remember this for later.

# %% tags=["nbval-check-output"]
W = torch.tensor([[0.2, -0.4, 0.1, 0.3], [-1.0, 0.5, 0.25, 0.75]])  # [out=2, in=4]
absmax_W = W.abs().amax(1)  # [2]: one per output
W_codes = (W * (127 / absmax_W)[:, None]).round().to(torch.int8)
sums = x_codes.int() @ W_codes.int().T  # [3, 2], int32
wrapped = sums.to(torch.int8)  # what an 8-bit accumulator would be left with
print("int32 sums:", sums.tolist())
print("first row in 8 bits:", wrapped[0].tolist())
print("features an int32 sum is safe for:", (2**31 - 1) // 127**2)

# %% [markdown]
# Two codes multiply to at most $127^2 = 16129$, so sums need more than 8 bits: in 8 bits the first row
# would wrap around to other numbers. Hardware adds int8 products into an **int32** accumulator, which is
# exact for more features than any layer has.

# %%
multiplier, shift = quantize_multiplier(float(absmax_x[0] * absmax_W[0]) / 127 / 1.8)
figure = integer_data_flow(x_codes[0], W_codes[0], multiplier, shift)
plt.show()

# %% [markdown]
# *Figure: from left to right, the int8 codes of the first row of x and of W, their int32 sum, a multiplication
# by an integer multiplier and a shift, and the int8 code of the output.*
#
# The picture shows a chip without floats: it turns the int32 sum into the next layer's int8 code, here with
# 1.8 as the output's absmax. LLM.int8() leaves the path after the second arrow. It multiplies the int32 sum by
# both scales in float:

# %%
y = x @ W.T  # [3, 2]
y_int8 = sums * (absmax_x[:, None] * absmax_W) / 127**2  # outer product of the scales
print("float:", [[round(v, 4) for v in row] for row in y.tolist()])
print("int8: ", [[round(v, 4) for v in row] for row in y_int8.tolist()])

# %% [markdown]
# Eight bits keep about two correct digits of each entry in this example.
#
# ## Why one outlier ruins a row
#
# The absmax sets the step for the whole row. If one of 512 values is large, all others share the few codes
# near zero. We draw a row from a normal distribution and replace its last entry.

# %%
row, rows = torch.randn(512, generator=generator).clamp(-3, 3), []
for outlier in (3.0, 10.0, 60.0, 600.0):
    row[-1] = outlier
    step = row.abs().max() / 127
    codes = (row / step).round()[:-1]
    error = (row[:-1] - codes * step).square().sum() / row[:-1].square().sum()
    rows.append(
        {"outlier": outlier, "step": step.item(), "relative error": error.item()}
    )
    rows[-1]["distinct codes of the others"] = len(codes.unique())
table(rows, {"step": ".3f", "relative error": ".1e"})

# %%
figure = codes_against_outlier(row, [3.0, 60.0, 600.0])
plt.show()

# %% [markdown]
# *Figure: how many of the 512 entries get each int8 code, one bar a code, for a last entry of 3, 60 and 600. The
# bars spread over most of the axis in the first picture and stand close to zero in the second. The last has three bars
# beside the outlier's own at 127.*
#
# The error of the other values grows with the *square* of the step, and so of the outlier. With 600 nearly all of
# them round to zero, and the row is lost.

# %% [markdown]
# ## Real activations
#
# Do language models have such values? Dettmers et al. found that they do, and that they are not spread at
# random: they sit in the **same few features** across layers. In models beyond 6.7 billion parameters they
# appear in every layer [@dettmers2022llmint8]. We look at the inputs of every linear layer of our models, over a few
# hundred tokens that no model is evaluated on. (SmolLM2's weights come from a 4-bit file. That does not favour
# an 8-bit method: its steps are other ones, and far finer.)

# %% tags=["folded"]
# Collects the inputs of every linear layer with forward hooks.
models = profile.load_models()


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
inputs, peaks = (
    {},
    {},
)  # by model and layer: x [tokens, in], and each feature's peak [in]
for name, (model, tokenizer) in models.items():
    length = min(profile.pick(quick=256, cpu=512), model.config.max_position_embeddings)
    tokens = calibration_tokens(tokenizer, 1, length, seed=profile.seed)
    inputs[name] = layer_inputs(model, tokens)
    peaks[name] = {k: v.float().abs().amax(0) for k, v in inputs[name].items()}

# %%
largest, rows = {}, []
for name, of_layer in peaks.items():
    largest[name] = max(of_layer, key=lambda layer: of_layer[layer].max().item())
    above = sum(bool((peak >= THRESHOLD).any()) for peak in of_layer.values())
    top = of_layer[largest[name]]
    rows.append({"model": name, "layers": len(of_layer), "with |x| >= 6": above})
    rows[-1] |= {"largest |x|": top.max().item(), "in": largest[name]}
    rows[-1]["median feature's peak there"] = top.median().item()
table(rows, {"largest |x|": ",.1f", "median feature's peak there": ".2f"})

# %% tags=["folded"]
# Records what the text below says.
for r in rows:
    key, model = f"llm_int8.{r['model']}.inputs", r["model"]
    record(f"{key}.layers_above", r["with |x| >= 6"], "layers", 2, model=model)
    record(f"{key}.layers", r["layers"], "layers", 0, model=model)
    record(f"{key}.largest", r["largest |x|"], "", 0.02 * r["largest |x|"], model=model)

# %% [markdown]
# In the recorded run {{llm_int8.smollm2-135m-q4_1.inputs.layers_above:.0f}} of SmolLM2's
# {{llm_int8.smollm2-135m-q4_1.inputs.layers:.0f}} layers read values of 6 and more, and the largest is
# {{llm_int8.smollm2-135m-q4_1.inputs.largest:,.0f}}. course-lm passes 6 as well, in
# {{llm_int8.course-lm.inputs.layers_above:.0f}} of {{llm_int8.course-lm.inputs.layers:.0f}} layers. Its largest input is only
# {{llm_int8.course-lm.inputs.largest:.1f}}, and the median feature of that layer is of the same order.
#
# Which layer suffers most? We quantize every layer's weight and inputs to vector-wise int8 and take the layer
# with the largest relative output error.


# %%
def relative_error(y, approximation):
    return ((y - approximation).square().sum() / y.square().sum()).item()


vectorwise = get_method("llm_int8", threshold=0.0)  # no decomposition
worst, rows = {}, []
for name, (model, _) in models.items():
    W_of = {layer.name: layer.weight.float() for layer in linear_layers(model)}
    errors = {}
    for layer, x in inputs[name].items():
        y_int8 = vectorwise.linear(x.float(), vectorwise.quantize(W_of[layer]), None)
        errors[layer] = relative_error(x.float() @ W_of[layer].T, y_int8)
    layer = max(errors, key=errors.get)
    worst[name] = layer, inputs[name][layer].float(), W_of[layer]
    median = sorted(errors.values())[len(errors) // 2]
    rows.append({"model": name, "worst layer": layer, "its error": errors[layer]})
    rows[-1]["median layer's error"] = median
table(rows, {"its error": ".1e", "median layer's error": ".1e"})

# %%
model_name = list(worst)[-1]
layer, x, W = worst[model_name]
peak = x.abs().amax(0)  # [in]
first = max(
    0, min(int(peak.argmax()) - 288, len(peak) - 576)
)  # the slice that is drawn
outliers = (peak >= THRESHOLD).nonzero().flatten()
marked = [k - first for k in outliers.tolist() if 0 <= k - first < 576]
figure = activation_heatmap(x[:128, first : first + 576].cpu(), marked)
figure.axes[0].set_title(f"inputs of {layer}", fontsize=9, pad=22)
plt.show()

# %% [markdown]
# *Figure: inputs of the last model's worst layer, one line a token and one column a feature, dark where |x| is
# large. A red triangle marks each feature that reaches the threshold. In SmolLM2 one dark column runs through nearly
# all tokens.*

# %%
panels = {f"{m}\n{layer}": x.abs().amax(0).cpu() for m, (layer, x, _) in worst.items()}
most = largest[model_name]
panels[f"{model_name}, largest value\n{most}"] = peaks[model_name][most].cpu()
figure = feature_maxima(panels, THRESHOLD)
plt.show()

# %% [markdown]
# *Figure: one dot per input feature, at the height of its largest magnitude over the tokens, on a logarithmic axis.
# The first panels are each model's worst layer, the last is the layer with the largest value. A dashed line marks the
# threshold, triangles the features that reach it.*

# %%
rows = []
for where, at in (("worst layer", layer), ("largest value", most)):
    seen = inputs[model_name][at].float()
    top = seen.abs().amax(0).argmax()  # the feature with the largest value
    hit = (seen[:, top].abs() >= THRESHOLD).sum().item()
    rows.append({"layer": at, "feature": top.item(), "tokens": len(seen)})
    rows[-1]["tokens where it is >= 6"] = hit
    key = f"llm_int8.{model_name}.{where.replace(' ', '_')}"
    record(f"{key}.tokens", len(seen), "tokens", 0, model=model_name)
    record(f"{key}.tokens_hit", hit, "tokens", 5, model=model_name)
table(rows)

# %% [markdown]
# Two kinds of large values stand side by side here.
#
# - An **outlier feature** in the paper's sense is moderately large on most tokens. It stretches the step of
#   nearly every row. The top feature of SmolLM2's worst layer reaches 6 on
#   {{llm_int8.smollm2-135m-q4_1.worst_layer.tokens_hit:.0f}} of
#   {{llm_int8.smollm2-135m-q4_1.worst_layer.tokens:.0f}} tokens in the recorded run.
# - A **massive activation** [@sun2024massive] is a value a thousand times the median, on a few tokens. The largest
#   value of SmolLM2 is of this kind: its feature reaches 6 on
#   {{llm_int8.smollm2-135m-q4_1.largest_value.tokens_hit:.0f}} of these tokens. With a scale for every token it ruins
#   its own row only. With one scale for all of them it ruins every row.

# %% [markdown]
# ## The decomposition, step by step
#
# LLM.int8() takes the outlier features out. Let $O$ be the set of features in which some token reaches the
# threshold $\alpha = 6$. Then
#
# $$ y_{ij} \;\approx\; \underbrace{\sum_{k \in O} x_{ik} W_{jk}}_{\text{floating point}} \;+\;
# \frac{a^x_i a^W_j}{127^2} \underbrace{\sum_{k \notin O} q^x_{ik} q^W_{jk}}_{\text{int8, int32 sums}},
# $$
#
# equation 8 of the paper. $O$ is found anew for every input: that is why no calibration is needed. We take the
# worst layer from above.
#
# The scales of the rows come without the outliers. Implementations differ in a detail. We follow bitsandbytes, the
# authors' own library: *values* above the threshold are left out of the absmax, while small values that share a column
# with an outlier still count. The codes of the whole column become zero.

# %%
y = x @ W.T  # [tokens, out]
small = x.masked_fill(x.abs() >= THRESHOLD, 0.0)
absmax_x = small.abs().amax(1)  # [tokens]
x_codes = (small * (127 / absmax_x)[:, None]).round().to(torch.int8)
x_codes[:, outliers] = 0  # whole columns leave the integer product
shrunk = (x.abs().amax(1) / absmax_x).median().item()
print(f"{len(outliers)} of {x.shape[1]} features leave;", end=" ")
print(f"the rows' steps fall {shrunk:.1f} times")

# %% [markdown]
# One column of SmolLM2 has made the steps of the median row several times coarser. (In the worst layer of course-lm no
# feature leaves, and nothing changes.)
#
# Two products remain, and their sum. For the floating-point part the paper and its library part ways. The equation
# multiplies the outliers with the **original** weights. The library has thrown those away, and takes the int8
# columns, **dequantized**.

# %%
absmax_W = W.abs().amax(1)  # [out]
W_codes = (W * (127 / absmax_W)[:, None]).round().to(torch.int8)
W_back = W_codes.float() * (absmax_W / 127)[:, None]  # [out, in]
integer_part = int8_matmul(x_codes, W_codes) * (absmax_x[:, None] * absmax_W) / 127**2
y_library = integer_part + x[:, outliers] @ W_back[:, outliers].T
y_paper = integer_part + x[:, outliers] @ W[:, outliers].T


# %% [markdown]
# Beside them we put two simpler ways, and one that rounds nothing but the weights. The simpler ones are vector-wise
# int8 as above, and one scale for all of `x` and one for all of `W`.


# %%
def one_scale(matrix):
    """int8 codes of a matrix by its single largest magnitude, and that `[1]`."""
    codes, absmax, _ = vectorwise_quantize(matrix.reshape(1, -1))
    return codes.view(matrix.shape), absmax


(x_q, x_max), (W_q, W_max) = one_scale(x), one_scale(W)
outputs = {
    "one_scale": int8_matmul(x_q, W_q) * (x_max * W_max) / 127**2,
    "int8": vectorwise.linear(x, vectorwise.quantize(W), None),
    "llm_int8": y_library,
    "original": y_paper,
    "float_inputs": x @ W_back.T,
}
errors = {how: relative_error(y, output) for how, output in outputs.items()}
table([{"layer output by": how, "relative error": e} for how, e in errors.items()],
      {"relative error": ".2e"})  # fmt: skip

# %% tags=["folded"]
# Records what the text below says.
for how, e in errors.items():
    key = f"llm_int8.{model_name}.worst_layer.{how}.error"
    record(key, e, "", 0.1 * e, model=model_name)
record(f"llm_int8.{model_name}.worst_layer.gain", errors["int8"] / errors["llm_int8"],
       "times", 2, model=model_name)  # fmt: skip

# %% [markdown]
# In SmolLM2's worst layer the decomposition divides the error of vector-wise int8 by
# {{llm_int8.smollm2-135m-q4_1.worst_layer.gain:.0f}} in the recorded run. Rounding the weights alone costs
# {{llm_int8.smollm2-135m-q4_1.worst_layer.float_inputs.error:.1e}}, so the rounded inputs make the rest of the error.
# The original weights take the error of LLM.int8() from
# {{llm_int8.smollm2-135m-q4_1.worst_layer.llm_int8.error:.1e}} to
# {{llm_int8.smollm2-135m-q4_1.worst_layer.original.error:.1e}}. What do they cost? The columns that will be needed are known
# only when the input is there, so *all* original weights have to be kept beside the codes:

# %% tags=["nbval-check-output"]
example = torch.linspace(-1, 1, 256 * 512).reshape(256, 512)
for form in ("dequantized", "original"):
    stored = get_method("llm_int8", outlier_weights=form).quantize(example)
    parts = {name: list(t.shape) for name, t in stored.tensors().items()}
    print(f"{form}: {stored.bits_per_weight:.4f} bits per weight, {parts}")

# %% [markdown]
# The original weights bring it to more bits than half precision itself has. Only the library's form saves memory, and
# everything below uses it.

# %% [markdown]
# ## Is it the outliers, or just the number of columns?
#
# A lower threshold makes more columns floating point, and the error falls for that reason alone. So an
# honest sweep needs a **control**: as many columns in float, but chosen at random. Only what the outliers gain
# *over the control* is due to choosing them. (Here a chosen column leaves the absmax altogether, small values
# included.)


# %%
def decomposed_error(columns):
    """Relative output error with these feature columns in floating point."""
    kept = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    kept[columns] = True
    codes, absmax, _ = vectorwise_quantize(x.masked_fill(kept, 0))
    part = int8_matmul(codes, W_codes) * (absmax[:, None] * absmax_W) / 127**2
    return relative_error(y, part + x[:, kept] @ W_back[:, kept].T)


# %%
thresholds, rows = [None, 20.0, 10.0, 6.0, 4.0, 3.0, 2.0, 1.0], []
for threshold in thresholds:
    chosen = [] if threshold is None else (peak >= threshold).nonzero().flatten()
    shuffles = [torch.randperm(len(peak), generator=generator) for _ in range(5)]
    draws = [decomposed_error(shuffle[: len(chosen)]) for shuffle in shuffles]
    rows.append({"threshold": threshold, "float columns": len(chosen)})
    rows[-1]["above it"] = decomposed_error(chosen)
    rows[-1] |= {"at random": sum(draws) / 5, "lowest of 5": min(draws)}
table(rows, {k: ".2e" for k in ("above it", "at random", "lowest of 5")})

# %%
series = {
    "columns above the threshold": [r["above it"] for r in rows],
    "as many columns at random (mean of 5)": [r["at random"] for r in rows],
}
figure = error_against_threshold([r["float columns"] for r in rows], series, thresholds)
plt.show()

# %% tags=["folded"]
# Records what the text below says.
at_threshold = rows[thresholds.index(6.0)]
for how in ("above it", "at random"):
    key = f"llm_int8.{model_name}.sweep.{how.replace(' ', '_')}"
    record(key, at_threshold[how], "", 0.1 * at_threshold[how], model=model_name)
key = f"llm_int8.{model_name}.sweep.columns"
record(key, at_threshold["float columns"], "columns", 1, model=model_name)

# %% [markdown]
# *Figure: relative output error against the number of feature columns kept in float, both axes logarithmic (with 0 added
# to the x axis); one curve for the columns above the threshold, labelled with the threshold, one for as many random
# columns.*
#
# In SmolLM2's worst layer {{llm_int8.smollm2-135m-q4_1.sweep.columns:.0f}} float column chosen by the threshold 6 leaves an error of
# {{llm_int8.smollm2-135m-q4_1.sweep.above_it:.1e}} in the recorded run, and as many at random leave
# {{llm_int8.smollm2-135m-q4_1.sweep.at_random:.1e}}. So the choice of the column does it. Each further column gains
# less.

# %% [markdown]
# ## A whole model, in three steps
#
# `quantize_model` replaces every linear layer by one that holds codes. Embeddings and the LM head stay in float, as in
# the paper. A method is two functions: `quantize` makes the stored weight, and `linear` computes with it. That is
# enough to write the coarsest method of the story ourselves.


# %%
class OneScale(LLMInt8):
    """int8 with one scale for the whole weight, and one for all inputs of a call."""

    def quantize(self, weight, statistics=None):
        return Int8Weight(*one_scale(weight))

    def linear(self, x, weight, bias):
        codes, absmax = one_scale(x)
        return int8_linear(codes, absmax.expand(len(x)), weight, bias).to(x.dtype)


# %%
methods = {
    "one_scale": OneScale(),
    "int8": vectorwise,
    "llm_int8": get_method("llm_int8", threshold=THRESHOLD),
}
variants = {name: {"float": model} for name, (model, _) in models.items()}
bits = {}
for name, (model, _) in models.items():
    for variant, method in methods.items():
        variants[name][variant] = copy.deepcopy(model)
        report = quantize_model(variants[name][variant], method)
        bits[name, variant] = report.bits_per_weight, report.nbytes

# %% [markdown]
# ### Quality
#
# All models read the same tokens: the start of each document of the evaluation split of the CIA World Factbook. We
# subtract the float model's loss from a variant's, token by token. The mean is the **nats lost** per token. Its standard error
# (after ±) is taken over documents. A loss within two errors of 0 is not distinguished from none. The **KL divergence**
# says how far the predicted distributions moved, and the last but one column how often both models find the same token
# likeliest.

# %%
compared, protocols = {}, {}
for name, of_model in variants.items():
    protocols[name] = profile.protocol(of_model["float"])
    others = {v: model for v, model in of_model.items() if v != "float"}
    text = protocols[name].text(models[name].tokenizer)
    compared[name] = compare_all(others, of_model["float"], text)
    print(f"{name}: {protocols[name]}, float {compared[name]['int8'].reference}")


# %%
def row_of(model, variant, found, **more):
    agreement, error = 100 * found.agreement.value, 100 * found.agreement.error
    return {
        "model": model,
        "linear layers": variant,
        **more,
        "nats lost per token": format_difference(found.loss),
        "KL divergence": found.divergence.value,
        "same top token, %": f"{agreement:.1f} ± {error:.1f}",
        "perplexity": found.perplexity.perplexity,
    }


rows = [
    row_of(name, variant, found, **{"bits per weight": bits[name, variant][0]})
    for name, of_model in compared.items()
    for variant, found in of_model.items()
]
table(rows, {"bits per weight": ".3f", "KL divergence": ".4f", "perplexity": ".2f"})

# %% tags=["folded"]
# Records the quality of each variant.
for name, of_model in compared.items():
    by = {"model": name} | protocols[name].fields
    reference = of_model["int8"].reference
    record(f"llm_int8.{name}.float.perplexity", reference.perplexity, "", 0.05, **by)
    for of_loss in (
        "loss",
        "loss_error",
    ):  # by definition: it is what losses are taken from
        record(f"llm_int8.{name}.float.{of_loss}", 0.0, "nats", 0, **by)
    for variant, found in of_model.items():
        key, loose = (
            f"llm_int8.{name}.{variant}",
            0.05 if variant == "one_scale" else 0.005,
        )
        perplexity = found.perplexity.perplexity
        record(f"{key}.perplexity", perplexity, "", 10 * loose, **by)
        record(f"{key}.loss", found.loss.value, "nats", loose, **by)
        record(f"{key}.loss_error", found.loss.error, "nats", loose, **by)
        record(f"{key}.agreement", found.agreement.value, "", 2 * loose, **by)

# %% tags=["folded"]
# Records bits and bytes of the linear layers of each variant.
for name, of_model in variants.items():
    weights = [layer.weight for layer in linear_layers(of_model["float"])]
    float_bytes = sum(w.nbytes for w in weights)
    bits[name, "float"] = 8 * weights[0].element_size(), float_bytes
    for variant in of_model:
        key, (per_weight, nbytes) = f"llm_int8.{name}.{variant}", bits[name, variant]
        record(f"{key}.bits_per_weight", per_weight, "bits", 1e-6, model=name)
        record(f"{key}.linear_bytes", nbytes, "bytes", 0, model=name)

# %% tags=["folded"]
# Draws the last model's losses, with and without the coarsest method.
found = compared[model_name]
figure, axes = new_figure(1, 2, height=2.8)
for axis, shown in zip(axes, (list(found), list(found)[1:]), strict=True):
    losses = [found[variant].loss for variant in shown]
    axis.axvline(0, color="grey", linestyle="--", linewidth=1, label="float")
    axis.errorbar(
        [loss.value for loss in losses],
        range(len(shown)),
        xerr=[2 * loss.error for loss in losses],
        fmt="o",
        capsize=3,
    )
    axis.set_yticks(range(len(shown)), shown)
    axis.invert_yaxis()
    axis.set_xlabel("nats lost per token (bars: 2 standard errors)")
axes[0].set_title(model_name, fontsize=10)
axes[1].set_title("the same without one_scale", fontsize=10)
plt.show()

# %% [markdown]
# *Figure: nats lost per token by each variant of the last model, with bars of two standard errors and a dashed line for the
# float model. On the left with one scale for everything, on the right without it.*
#
# This is the story on SmolLM2, in the recorded run. One scale for everything loses
# {{llm_int8.smollm2-135m-q4_1.one_scale.loss:.2f}} ± {{llm_int8.smollm2-135m-q4_1.one_scale.loss_error:.2f}} nats per
# token. A scale for every row loses
# {{llm_int8.smollm2-135m-q4_1.int8.loss:.3f}} ± {{llm_int8.smollm2-135m-q4_1.int8.loss_error:.3f}}. With the outlier columns
# in float it is {{llm_int8.smollm2-135m-q4_1.llm_int8.loss:.3f}} ±
# {{llm_int8.smollm2-135m-q4_1.llm_int8.loss_error:.3f}}. The first step matters most: a massive activation then
# sets the step of one row instead of all. The last step brings the model closer to float: it finds the same likeliest token
# on {{llm_int8.smollm2-135m-q4_1.llm_int8.agreement:.1%}} of the tokens instead of
# {{llm_int8.smollm2-135m-q4_1.int8.agreement:.1%}}. On course-lm, whose features differ little, the decomposition changes
# nothing: both last variants lose {{llm_int8.course-lm.int8.loss:.4f}} and
# {{llm_int8.course-lm.llm_int8.loss:.4f}} nats.
#
# ### On other tokens, and beside SmoothQuant
#
# The last step won little, so we look twice: at the paired difference, and on a second text (in the profile `quick` it is the
# same one). We add a fourth method. **SmoothQuant** [@xiao2022smoothquant] keeps all features in integers. It divides
# large features of the inputs by factors, and multiplies the weights' columns by the same factors beforehand. It finds the
# factors on a calibration text. `foundations/smoothing` builds it; here it is the package's, with its standard
# settings and one short text.

# %%
model, tokenizer = models[model_name]
others = {variant: variants[model_name][variant] for variant in ("int8", "llm_int8")}
others["smoothquant"] = copy.deepcopy(model)
sample = calibration_tokens(tokenizer, 1, length, seed=profile.seed)
smooth = get_method("smoothquant")
smooth_bits = quantize_model(others["smoothquant"], smooth, calibration=sample)
protocol = profile.protocols(model)[-1]
protocol = replace(protocol, tokens=min(protocol.tokens, 4096))
second = compare_all(others, model, protocol.text(tokenizer))

# %%
rows = [row_of(model_name, variant, found) for variant, found in second.items()]
print(f"second text: {protocol}")
print(f"SmoothQuant: {smooth_bits.bits_per_weight:.3f} bits per weight")
table(rows, {"KL divergence": ".4f", "perplexity": ".2f"})

# %%
pairs = [("first text", compared[model_name], "llm_int8")]
pairs += [("second text", second, v) for v in ("llm_int8", "smoothquant")]
won = {(where, v): difference(of["int8"], of[v]) for where, of, v in pairs}
table([
    {"text": where, "instead of int8": v, "nats won per token": format_difference(gain)}
    for (where, v), gain in won.items()
])  # fmt: skip

# %% tags=["folded"]
# Records the differences.
for (where, variant), gain in won.items():
    key = f"llm_int8.{model_name}.won.{where.split()[0]}.{variant}"
    used = protocols[model_name] if where == "first text" else protocol
    by = {"model": model_name} | used.fields
    record(f"{key}.value", gain.value, "nats", 0.005, **by)
    record(f"{key}.error", gain.error, "nats", 0.005, **by)

# %% [markdown]
# On the first text LLM.int8() wins {{llm_int8.smollm2-135m-q4_1.won.first.llm_int8.value:+.3f}} ±
# {{llm_int8.smollm2-135m-q4_1.won.first.llm_int8.error:.3f}} nats over vector-wise int8 in the recorded run. On the
# second it wins {{llm_int8.smollm2-135m-q4_1.won.second.llm_int8.value:+.3f}} ±
# {{llm_int8.smollm2-135m-q4_1.won.second.llm_int8.error:.3f}}. The first gain is distinguished from 0, the second is not. So
# we give no share of the loss that the decomposition takes back: on one text even the sign of its gain is not
# certain. SmoothQuant wins {{llm_int8.smollm2-135m-q4_1.won.second.smoothquant.value:+.3f}} ±
# {{llm_int8.smollm2-135m-q4_1.won.second.smoothquant.error:.3f}} on the second text. It was calibrated once, and the error
# does not say what another calibration text would give.
#
# ### The model speaks
#
# What do such losses mean for text? The last model continues one prompt, always by the likeliest token. The line of 8 bits
# is LLM.int8(). With fewer bits only the weights are rounded, in groups of 64 columns with a scale and a zero point
# each. That is simulated: the rounded weights are put back as floats, which is faster here. The groups are not those of
# the 4-bit file that SmolLM2 comes from.

# %%
speaking = {"float": model, "8 bits": variants[model_name]["llm_int8"]}
for n_bits in (4, 3, 2):
    speaking[f"{n_bits} bits"] = copy.deepcopy(model)
    rounding = get_method("affine", n_bits=n_bits)
    for layer in linear_layers(speaking[f"{n_bits} bits"]):
        layer.weight.copy_(rounding.quantize(layer.weight).dequantize())
print(continuations(speaking, tokenizer, prompt_of(model_name), new_tokens=24))

# %% [markdown]
# The line of 8 bits soon takes other words than float, and stays as fluent. So does the line of 4 bits. With 3 bits the
# model repeats itself, and with 2 no sentence is left. Fluent is not the same as true: the text does not show whether
# a statement is right.

# %% [markdown]
# ### Bytes
#
# Bytes are easy to measure, so we measure them three times: the tensors of the model, the file that
# `save_pretrained` writes, and the growth of a fresh process that loads the file. The third is what your
# machine has to have.

# %%
rows = []
for name, of_model in variants.items():
    for variant in ("float", "llm_int8"):
        with tempfile.TemporaryDirectory() as folder:
            of_model[variant].save_pretrained(folder)
            models[name].tokenizer.save_pretrained(folder)
            sizes = file_bytes(folder), process_bytes(folder)
        sizes = [n / 1e6 for n in (tensor_bytes(of_model[variant]), *sizes)]
        names = ("tensors, MB", "file, MB", "process, MB")
        rows.append({"model": name, "linear layers": variant})
        rows[-1] |= dict(zip(names, sizes, strict=True))
table(rows, dict.fromkeys(names, ".1f"))

# %% tags=["folded"]
# Records by how much the whole model shrinks, as tensors.
shrinks = {r["model"]: [] for r in rows}
for r in rows:
    shrinks[r["model"]].append(r["tensors, MB"])
for name, (before, after) in shrinks.items():
    record(f"llm_int8.{name}.shrinks", before / after, "times", 0.01, model=name)

# %% [markdown]
# The linear layers shrink by a factor of just under four against float32, and just under two against float16, the usual
# way to store a model. The whole model shrinks by less: {{llm_int8.smollm2-135m-q4_1.shrinks:.2f}} times against
# float32 for SmolLM2 in the recorded run, because the embedding stays in float. Loading SmolLM2 needs buffers of its own, so its
# process takes more than the tensors. A model as small as course-lm may fit into memory that the process holds already, and
# its last column then says little.

# %% [markdown]
# ### Time
#
# Many courses write "and faster" here. We generate text one token at a time, as a chat does, and measure.

# %%
speed, rows = {}, []
for name, of_model in variants.items():
    prompt, speed[name] = evaluation_tokens(models[name].tokenizer, 32), {}
    for variant, model in of_model.items():
        timing = time_per_token(model, prompt, new_tokens=16)
        speed[name][variant] = timing.median
        low, high = timing.quartiles
        rows.append({"model": name, "linear layers": variant, "ms": timing.median})
        rows[-1]["quartiles"] = f"{low:.1f} to {high:.1f}"
        key = f"llm_int8.{name}.{variant}.ms_per_token"
        record(key, timing.median, "ms", model=name)
print(f"16 tokens on {timing.device}, {timing.threads} threads:")
table(rows, {"ms": ".1f"})

# %%
figure = relative_bars(speed, "time per token, float = 1")
plt.show()

# %% tags=["folded"]
# Records how much slower LLM.int8() is.
for name, of_model in speed.items():
    slower = of_model["llm_int8"] / of_model["float"]
    record(f"llm_int8.{name}.slower", slower, "times", model=name)

# %% [markdown]
# *Figure: for each model four bars: time per generated token in float, and with each of three int8 methods, each
# divided by the float time.*
#
# LLM.int8() takes {{llm_int8.smollm2-135m-q4_1.slower:.1f}} times as long per token as float on SmolLM2 in the recorded
# run. On a machine that has other work such a ratio is rough. Finding the outliers, quantizing the
# input and adding a second product are work that a float layer does not have, and our integer product converts the codes to float32 on the way. The authors' own blog shows the same for a
# small model: T5-3B takes 312 ms per token in int8 on one T4 against 45 ms in float32 on two, and 173 ms after tuning
# [@belkada2022gentle]. The method saves memory, not time.

# %% [markdown]
# ## Compared with bitsandbytes
#
# The package's module `llm_int8` holds what we built in small cells, and bitsandbytes is the library behind
# `load_in_8bit` in `transformers`. Codes of all three have to agree exactly. Outputs may differ a little: on a CPU without
# AVX-512 bitsandbytes multiplies the codes in float32, which is exact only up to $2^{24}$. Its factor for $1/127^2$ reads
# `6.200124e-05` (version 0.50.2), where $1/127^2 = 6.20001\ldots \cdot 10^{-5}$. We compare outputs to $10^{-4}$ of
# the largest.

# %% tags=["folded"]
# Asserts that the package's codes, scales and outputs are the ones built above.
method = get_method("llm_int8", threshold=THRESHOLD)
codes, absmax, columns = vectorwise_quantize(x, THRESHOLD)
assert torch.equal(codes, x_codes) and torch.equal(absmax, absmax_x)
assert torch.equal(columns, outliers)
assert torch.equal(method.quantize(W).codes, W_codes)
y_package = method.linear(x, method.quantize(W), None)
torch.testing.assert_close(
    y_package, y_library, rtol=1e-4, atol=1e-4 * y.abs().max().item()
)
print("The package's codes, scales and outlier columns are the ones built above.")

# %% tags=["folded"]
# Asserts that the codes of bitsandbytes are ours, and its outputs to 1e-4.
# Its import warns on a CPU that a 4-bit kernel is not installed: not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
try:
    import bitsandbytes.functional as bnb
except ImportError:
    print("bitsandbytes is not installed here: this comparison is left out.")
else:
    their_codes, their_absmax, found = bnb.int8_vectorwise_quant(x.clone(), THRESHOLD)
    assert torch.equal(their_codes, codes) and torch.equal(their_absmax, absmax)
    assert ([] if found is None else found.tolist()) == columns.tolist()
    weight_codes, weight_absmax, _ = bnb.int8_vectorwise_quant(W.clone())
    assert torch.equal(weight_codes, W_codes) and torch.equal(weight_absmax, absmax_W)
    print(f"bitsandbytes: {codes.numel() + W_codes.numel():,} codes, all equal.")
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, their_codes, weight_codes, their_absmax, weight_absmax, found
    )
    off = ((theirs - y_package).abs().max() / theirs.abs().max()).item()
    print(f"outputs: largest difference {off:.1e} of the largest output.")
    assert off < 1e-4

# %% [markdown]
# All codes agree, and the outputs differ by less than the bound.

# %% [markdown]
# ## Limits
#
# - The threshold 6.0 is a magnitude, not a rank. Where a layer's ordinary values exceed it, a large part of the product
#   is done in float after all.
# - Which columns are outliers depends on the *batch*: one token with a massive activation makes the column
#   float for all tokens. The same sentence may therefore give slightly different outputs in another batch.
# - SmoothQuant was run with one calibration text, and its errors do not include the choice of that text.
# - The models are small. In the paper the outliers cost most in models of billions of parameters.

# %% [markdown]
# ## What you saw
#
# - **Integers and back.** Each value came back within half a step of its own row. The int32 sums were exact, and the scales
#   of token and output left the sum.
# - **One large value.** It took the codes away from all others in its row. In the recorded run one feature of SmolLM2 does so
#   on {{llm_int8.smollm2-135m-q4_1.worst_layer.tokens_hit:.0f}} of
#   {{llm_int8.smollm2-135m-q4_1.worst_layer.tokens:.0f}} tokens, and a single value reaches
#   {{llm_int8.smollm2-135m-q4_1.inputs.largest:,.0f}}.
# - **LLM.int8().** With that feature in float the layer's error fell
#   {{llm_int8.smollm2-135m-q4_1.worst_layer.gain:.0f}} times. Random features in its place changed next to nothing.
# - **Costs and gains.** One scale for everything lost {{llm_int8.smollm2-135m-q4_1.one_scale.loss:.2f}} nats per token on
#   SmolLM2, a scale for each row {{llm_int8.smollm2-135m-q4_1.int8.loss:.3f}}, and LLM.int8()
#   {{llm_int8.smollm2-135m-q4_1.llm_int8.loss:.3f}}. The last gain was distinguished from 0 on one text of two. The
#   model shrank {{llm_int8.smollm2-135m-q4_1.shrinks:.2f}} times, and a token took
#   {{llm_int8.smollm2-135m-q4_1.slower:.1f}} times as long.
#
# So nearly all products can run in 8-bit integers. A scale for each row does most of it, and the few outlier features in float do the
# rest that we could measure.

# %% [markdown]
# ## Exercises
#
# Each exercise has a function to write, and tests that check it.

# %% [markdown] tags=["exercise-statement", "refuses:course_utils.quantizers.llm_int8"]
# ### Exercise 1: a row of zeros
# *Difficulty 1/5 · 5 minutes · 1 point · no GPU*
#
# Padding produces rows of zeros. Their absmax is 0, and so is their step, absmax / 127: nothing can be divided by it. Write
# absmax quantization that gives a row of zeros the codes 0 and the step 1.


# %% tags=["exercise"]
def absmax_quantize(x):
    """Codes (int8) and steps (float) of the rows of `x` `[rows, columns]`.

    x is about codes * step; the largest size in a row gets the code 127 or -127.
    Approach: a step for each row, with a 1 where it would be 0; then divide and round.
    Example: [[0, 0], [3, -12.7]] gives [[0, 0], [30, -127]] and the steps [1, 0.1].
    Hint: torch.where.
    """
    ### BEGIN SOLUTION
    absmax = x.abs().amax(1)
    step = torch.where(absmax > 0, absmax / 127, 1.0)
    return (x / step[:, None]).round().to(torch.int8), step
    ### END SOLUTION


# %% tags=["exercise-tests"]
rows = torch.tensor([[0.0, 0.0], [3.0, -12.7], [0.04, 0.01]])
codes, steps = absmax_quantize(rows)
steps = torch.as_tensor(steps).flatten()
assert codes.dtype == torch.int8, "the codes must be int8, not float"
assert codes[1].tolist() == [30, -127], "the largest, -12.7, gets the code -127"
assert codes[2].tolist() == [127, 32], "each row has its own absmax, over its columns"
assert codes[0].tolist() == [0, 0], "a row of zeros has the codes 0"
assert len(steps) == 3 and steps[0] == 1, "a row of zeros has the step 1, not 0 or NaN"
assert torch.allclose(steps[1:], torch.tensor([0.1, 0.04 / 127])), (
    "return the step, absmax / 127: codes times step is about x"
)
### BEGIN HIDDEN TESTS
seed = 0  # the teacher's seed
probe = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
probe[2] = 0
codes, steps = absmax_quantize(probe)
steps = torch.as_tensor(steps).reshape(6, 1)
gap = (codes * steps - probe).abs()
assert (gap <= 0.501 * steps).all(), "a value is at most half a step from its code"
assert (codes.abs().amax(1) == 127).sum() == 5, "each row uses the code 127 or -127"
assert steps[2] == 1 and not codes[2].any(), "a row of zeros among others"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: when does float32 stop counting?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# A float32 number holds every integer up to $2^{24}$. If an int8 product is computed in float32, as a CPU library may do,
# for how many features is the sum *guaranteed* to be exact, with codes from -m to m (127 in int8)? And for codes that are
# random and uniform, at how many features does a sum typically reach the limit? (The standard deviation of a sum
# of n independent terms is the square root of n times that of one.)


# %% tags=["exercise"]
def exact_features(m):
    """(guaranteed, typical): features up to which sums are exact, with codes -m to m.

    Approach: the guarantee is 2^24 over the largest product. For the typical case, one
    term has variance v^2, v the variance of a uniform code; solve sqrt(n) * v = 2^24.
    Example: with 4-bit codes (m = 7) the guarantee is 342,392 features. Both are whole.
    Hint: a uniform integer from -m to m has variance m (m + 1) / 3.
    """
    ### BEGIN SOLUTION
    guaranteed = 2**24 // m**2
    variance = m * (m + 1) / 3
    return guaranteed, int((2**24 / variance) ** 2)
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert exact_features(7)[0] == 342_392, "2^24 / 49, rounded down"
guaranteed, typical = exact_features(127)
assert guaranteed == 1040, "divide 2^24 by the largest product of two codes, 127 * 127"
assert typical > 10_000, "sqrt(n) v = 2^24 gives n = (2^24 / v)^2: square the quotient"
assert abs(typical - 9_737_947) > 9999, "m (m + 1) / 3 is the variance, not m^2 / 3"
assert abs(typical - 9_586_386) <= 1, "v is 127 * 128 / 3, that of a uniform code"
### BEGIN HIDDEN TESTS
full = torch.full((1, guaranteed), 127.0)
assert int((full @ full.T).item()) == guaranteed * 127**2, "this many must be exact"
seed = 0  # the teacher's seed
m = 20 + seed % 90
guaranteed, typical = exact_features(m)
assert guaranteed * m**2 <= 2**24 < (guaranteed + 1) * m**2, "codes of another range"
assert abs(typical**0.5 * m * (m + 1) / 3 / 2**24 - 1) < 1e-4, "and what is typical"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: outliers by rank
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# The fixed threshold knows nothing of the layer. Choose instead the `k` features with the largest peak, whatever
# their size. Return the relative output error of a layer with those columns in float: the sum of the squares of
# $y - \hat y$ over the sum of the squares of $y$, without a root. Build on `absmax_quantize` of exercise 1.


# %% tags=["exercise"]
def error_with_top_features(x, W, k):
    """Relative error of `x` `[tokens, in]` times `W` `[out, in]`, k features in float.

    Approach: the k features whose largest |x| is largest are set to zero; the rest and
    W are quantized by rows and multiplied in integers; the float product of the k
    features (with the original W) is added.
    Example: k equal to the number of features gives an error of about 0.
    Hint: torch.topk; absmax_quantize; int8_matmul(codes of x, codes of W).
    """
    ### BEGIN SOLUTION
    top = x.abs().amax(0).topk(k).indices
    rest = x.clone()
    rest[:, top] = 0
    (x_q, x_step), (w_q, w_step) = absmax_quantize(rest), absmax_quantize(W)
    product = int8_matmul(x_q, w_q) * (x_step[:, None] * w_step)
    y = x @ W.T
    gap = y - (product + x[:, top] @ W[:, top].T)
    return (gap.square().sum() / y.square().sum()).item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
draw = torch.Generator().manual_seed(0)
features = torch.randn(64, 256, generator=draw)  # [tokens, in]
features[:, [7, 99]] *= torch.tensor([20.0, 50.0])  # two outlier features
features[:, 12] = 4.0  # large on average, and never a peak
features[5, 30] = 300.0  # one peak, small on average
weight = torch.randn(128, 256, generator=draw) / 16  # [out, in]
top_errors = [error_with_top_features(features, weight, k) for k in (0, 1, 3, 256)]
print("k = 0, 1, 3, all:", [f"{e:.2e}" for e in top_errors])
assert top_errors[-1] < 1e-6, "with all features in float nothing may be lost"
wanted = [1.250e-3, 8.116e-4, 8.253e-6]  # for k = 0, 1 and 3


def near(found, value):
    return abs(found - value) < 0.02 * value


assert not near(top_errors[0] ** 2, wanted[0]), "a ratio of squares, without a root"
assert near(top_errors[0], wanted[0]), "with k = 0 all of x and all of W are quantized"
assert near(top_errors[1], wanted[1]), (
    "feature 30 has the highest peak: set it to zero, and then take the absmax"
)
assert near(top_errors[2], wanted[2]), "the k features are in float, all else in int8"
### BEGIN HIDDEN TESTS
seed = 0  # the teacher's seed
draw = torch.Generator().manual_seed(seed)
x, W = torch.randn(8, 32, generator=draw), torch.randn(4, 32, generator=draw)
x[:, 3] *= 40
one, two = (error_with_top_features(x, W, k) for k in (0, 1))
assert one > 10 * two > 0, "one feature of 40 times the size spoils the others"
assert x[:, 3].abs().max() > 10, "work on a copy of x"
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
assert abs(bits_per_parameter([(2, 8), (6, 4)], 0) - 14.4) < 1e-9, (
    "layers count by their weights, (8 * 40 + 32 * 8) / 40, not each the same"
)
assert abs(bits_per_parameter([(4, 8)], 32) - 22) < 1e-9, "(8 + 4 + 32) / 2: half each"
small_lm = load_model("course-lm").model
shapes = [tuple(layer.weight.shape) for layer in linear_layers(small_lm)]
other = small_lm.num_parameters() - sum(out * columns for out, columns in shapes)
print(f"course-lm: {bits_per_parameter(shapes, other):.2f} bits per parameter")
### BEGIN HIDDEN TESTS
found = bits_per_parameter([(100, 1000)], 100_000)
assert abs(found - (8.032 + 32) / 2) < 1e-9, (
    "a hundred scales, a hundred thousand floats"
)
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

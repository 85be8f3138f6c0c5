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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/smoothing.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/foundations/smoothing.ipynb)
#
# # Smoothing: the difficulty moves from inputs to weights
#
# *Large Model Quantization: a deep dive. Foundations, a companion to dynamic_range.*

# %% [markdown]
# A few features with large values make the inputs of a layer hard to quantize, and its weights are easy. SmoothQuant
# moves some of the difficulty from one to the other. When you have worked through this notebook you will be able to
#
# - divide the features of an input by factors, without changing what the model computes;
# - choose the factors by SmoothQuant's formula, and say what its $\alpha$ does;
# - measure the gain over a sweep of $\alpha$, beside the same factors in random places as a control;
# - say which layers no $\alpha$ reaches, and what they cost;
# - run the method with real integer codes.
#
# It takes about 45 minutes to read and work. You need to know what a scale is (`linear_mapping`), and why one range for all tokens fails
# (`dynamic_range`). No profile needs a GPU; `quick` runs in half a minute, `cpu` in a few minutes.

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
from course_utils.evaluation.estimate import with_error
from course_utils.models import blocks, linear_layers, load_model
from course_utils.models.structure import norm_groups

# %%
from course_utils.plotting import table
from course_utils.plotting.diagrams import activation_heatmap
from course_utils.plotting.diagrams.tokens import codes_of_tokens
from course_utils.plotting.nats import nats_against_alpha
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
generator = torch.Generator().manual_seed(profile.seed)

# %% [markdown]
# ## The question
#
# A linear layer computes $y = x W^\top$, with inputs `x` `[tokens, in]` and weights `W` `[out, in]`. In INT8 both are rounded to 8-bit codes. The objective is a small error of the output, $\lVert x W^\top - \hat x \hat W^\top \rVert^2$.
#
# Large values of inputs often sit in a few fixed **features**, the columns of $x$. A scale for each feature would fit them. But the sum $\sum_j x_{ij} w_{kj}$ runs over the features $j$: their scales would stay inside it, and the integer product would break into pieces. Scales for each token $i$
# and for each row $k$ of the weight stand outside. Can the features be made alike *before* they are rounded?
#
# SmoothQuant [@xiao2022smoothquant] divides feature $j$ of the input by a factor $s_j$, and multiplies column $j$ of the weight by
# it. The product is the same:
#
# $$ y = x W^\top = \left(x\,\mathrm{diag}(s)^{-1}\right)\left(\mathrm{diag}(s)\, W^\top\right), \qquad
# s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1 - \alpha}}. $$
#
# The maxima are those of feature $j$ over a **calibration** text, and of column $j$ of the weight. The exponent $\alpha$ says how much moves.
#
# ## By hand: three features
#
# The second feature is large, by a factor of 64.

# %% tags=["nbval-check-output"]
x_max = torch.tensor([1.0, 64.0, 2.0])  # largest |x| of three features
w_max = torch.tensor([0.5, 1.0, 0.5])  # largest |w| of their columns
rows = []
for alpha in (0.0, 0.5, 1.0):
    s = x_max**alpha / w_max ** (1 - alpha)
    found = {"s": s, "inputs x / s": x_max / s, "weights W s": w_max * s}
    texts = {k: "  ".join(f"{v:.3g}" for v in t.tolist()) for k, t in found.items()}
    rows.append({"alpha": alpha, **texts})
table(rows)

# %% [markdown]
# At $\alpha = 1$ all inputs are alike, and the weights carry the factor of 64. At $\alpha = 0.5$ both have the same maximum, $\sqrt{\max|X_j| \max|W_j|}$: 8 and 8 for the second feature. Note that $\alpha = 0$ is *not* "do nothing": it makes the weights' columns
# alike, at the expense of the inputs.
#
# What does it do to codes? Four tokens with one scale for all of them, four bits, so codes from -7 to 7. This is the *narrow* convention of `linear_mapping`, $S = t / (2^{n-1} - 1)$ with $t$ the largest magnitude; SmoothQuant uses it.

# %% tags=["nbval-check-output"]
x = torch.tensor([[0.9, 60, -1.4], [-1.0, 52, 0.6], [0.4, -64, 2.0], [-0.7, 58, 1.1]])
s = x_max**0.5 / w_max**0.5
codes = {
    "codes of x": (x / (64 / 7)).round(),
    "codes of x / s": (x / s / (8 / 7)).round(),
}
figure = codes_of_tokens(x, codes)
plt.show()
print("s:", [round(v, 3) for v in s.tolist()])

# %% [markdown]
# *Figure: four tokens down, three features across: the values, their 4-bit codes with one scale, and the codes after the division by s. Red is positive, blue negative, white zero.*
#
# Before, the first and the third feature are all zeros: nothing of them is left. After it, their largest values have codes other than zero, at the same number of bits.
#
# ## The division costs nothing
#
# Where would a model divide? The inputs of attention and of the MLP come out of a **norm**, which multiplies every feature by a weight
# of its own: divide *that* by $s_j$, once, when the model is quantized. All layers that read the same norm (q, k and v) share one $s$, with the largest weight of them all in its formula. Attention's output projection
# and the MLP's second layer read no norm. They stay as they are, and we shall meet them again.


# %%
@torch.no_grad()
def fold(model, factors_of):
    """A copy of the model, every norm divided by `factors_of(layer names, w_max)`."""
    model = copy.deepcopy(model)
    for block_name, block in blocks(model):
        layers = {layer.name: layer for layer in linear_layers(block)}
        for group in norm_groups(block):
            weights = [layers[name].weight for name in group.layers]  # [out, in]
            w_max = torch.stack([W.float().abs().amax(0) for W in weights]).amax(0)
            s = factors_of([f"{block_name}.{name}" for name in group.layers], w_max)
            for parameter in group.norm.parameters():  # weight, and LayerNorm's bias
                parameter.div_(s)
            for W in weights:
                W.mul_(s)
    return model


# %% tags=["folded"]
# The inputs of all layers, as in `dynamic_range`.
@torch.no_grad()
def layer_inputs(model, sequences):
    """Inputs of every linear layer by its name, `[tokens, in]`."""
    inputs, hooks = {layer.name: [] for layer in linear_layers(model)}, []
    for layer in linear_layers(model):

        def keep(module, args, name=layer.name):
            inputs[name].append(args[0].flatten(0, -2))

        hooks.append(layer.module.register_forward_pre_hook(keep))
    for tokens in sequences:
        model(input_ids=tokens[None].to(model.device))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in inputs.items()}


# %%
def feature_maxima(inputs):
    """Largest |x| of each feature `[in]`, by layer."""
    return {name: x.float().abs().amax(0) for name, x in inputs.items()}


def smoothing(maxima, alpha, permute=False):
    """SmoothQuant's factors; permuted, the same numbers in random places."""

    def factors_of(names, w_max):
        s = maxima[names[0]] ** alpha / w_max ** (1 - alpha)
        return s[torch.randperm(len(s), generator=generator)] if permute else s

    return factors_of


# %% [markdown]
# ## A model with planted outliers
#
# course-lm has no strong outliers. We **plant** some: in each norm four features are multiplied by 30 and the weights' columns divided,
# which is smoothing backwards. The function stays, and the inputs become hard. A method that works must undo that.


# %%
def plant(names, w_max):
    s = torch.ones_like(w_max)
    s[torch.randperm(len(s), generator=generator)[:4]] = 1 / 30
    return s


# %%
small = load_model("course-lm", device=profile.device)
planted = fold(small.model, plant)
seen = calibration_tokens(small.tokenizer, 16, 64, seed=profile.seed)
maxima = {"planted": feature_maxima(layer_inputs(planted, seen))}
smoothed = fold(planted, smoothing(maxima["planted"], 0.5))

# %%
layer = norm_groups(blocks(planted)[1][1])[1].layers[0]
layer = f"{blocks(planted)[1][0]}.{layer}"
before, after = (layer_inputs(m, seen[:2])[layer] for m in (planted, smoothed))
outliers = before.abs().amax(0).topk(4).indices.tolist()
figure = activation_heatmap(before.cpu(), outliers)
plt.show()
figure = activation_heatmap(after.cpu(), outliers)
plt.show()

# %% [markdown]
# *Figure: two heatmaps of |x| at the input of one layer of course-lm, 128 tokens down and its features across, colours logarithmic and each with a scale of its own. First with four planted outlier features, marked; then smoothed with alpha 0.5.*
#
# In the first heatmap the four planted columns run through all tokens. In the second they no longer stand out. But has the function changed?

# %%
rows = []
ratios = {"planted": before, "smoothed": after}
with torch.no_grad():
    probe = seen[:1].to(small.model.device)
    logits = small.model(input_ids=probe).logits
    for name, model in (("planted", planted), ("smoothed", smoothed)):
        off = (model(input_ids=probe).logits - logits).abs().max() / logits.abs().max()
        features = ratios[name].abs().amax(0)
        row = {"model": name, "logits apart, relative": off.item()}
        row["largest feature / median"] = (features.max() / features.median()).item()
        rows.append(row)
table(rows, {"logits apart, relative": ".0e", "largest feature / median": ".1f"})

# %% tags=["folded"]
# Record the two models' features, and that the function stayed.
for row in rows:
    key = f"smoothing.{row['model']}"
    assert row["logits apart, relative"] < 1e-4
    record(f"{key}.apart", row["logits apart, relative"], "", 1e-4)
    record(f"{key}.ratio", row["largest feature / median"], "", 0.5)

# %% [markdown]
# No: the logits stay, up to the rounding of floats. The largest feature is {{smoothing.planted.ratio:.0f}} times the median one in the recorded run, and {{smoothing.smoothed.ratio:.1f}} times after smoothing.
#
# ## What it is worth: the sweep
#
# Now the loss. Weights are rounded to 8 bits with a scale a row, and inputs to 8 bits with one **static** range a layer, the largest value in calibration. Values lie on the grid, but are held in
# floats: a simulation; integers follow below.


# %%
def round_trip(x, clip, n_bits=8):
    """x on the narrow symmetric grid of n_bits; clip broadcasts."""
    top = 2 ** (n_bits - 1) - 1
    step = clip / top
    return ((x.float() / step).round().clamp(-top, top) * step).to(x.dtype)


def token_clips(layer, x):
    """A range for each token: its largest |x| `[..., 1]`."""
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-8)


@torch.no_grad()
def round_weights(model):
    """The model's weights `[out, in]` on 8-bit grids, a scale a row, in place."""
    for layer in linear_layers(model):
        clip = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-8)
        layer.weight.copy_(round_trip(layer.weight, clip))
    return model


# %% tags=["folded"]
# A model whose inputs are rounded, as in `dynamic_range`.
class Rounded(torch.nn.Module):
    """`model` with every linear layer's input x rounded by `clip_of(layer, x)`."""

    def __init__(self, model, clip_of, n_bits=8):
        super().__init__()
        self.model, self.config = model, model.config
        self.clip_of, self.n_bits = clip_of, n_bits
        self.eval()

    def forward(self, **inputs):
        hooks = []
        for layer in linear_layers(self.model):

            def round_input(module, args, name=layer.name):
                clip = self.clip_of(name, args[0])  # None leaves x in float
                if clip is not None:
                    return (round_trip(args[0], clip, self.n_bits),)

            hooks.append(layer.module.register_forward_pre_hook(round_input))
        try:
            return self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()


# %%
def smoothed_clips(model, maxima, factors_of):
    """The folded model, and each layer's static clip: its largest |x| / s."""
    clips = {layer: m.max() for layer, m in maxima.items()}

    def keep(names, w_max):
        s = factors_of(names, w_max)
        clips.update({layer: (maxima[layer] / s).max() for layer in names})
        return s

    return round_weights(fold(model, keep)), clips


# %% [markdown]
# Beside the sweep over $\alpha$ stand no smoothing at all, and a control: the factors of $\alpha = 0.5$ in **random places**. That is still an exact rewrite of the model, but of the wrong features. We give the **nats** lost per token, the rise of the mean of $-\log p$ of the token that came, paired with
# the float model on the same tokens; ± is one standard error over documents.


# %%
def variants_of(model, maxima, alphas, n_bits=8):
    """{(kind, label): model} for static ranges and ranges per token."""
    rules = {"none": lambda names, w_max: torch.ones_like(w_max)}
    rules |= {alpha: smoothing(maxima, alpha) for alpha in alphas}
    rules["random places"] = smoothing(maxima, 0.5, permute=True)
    made = {}
    for label, rule in rules.items():
        folded, clips = smoothed_clips(model, maxima, rule)

        def static(layer, x, clips=clips):
            return clips[layer]

        made["static", label] = Rounded(folded, static, n_bits)
        made["per token", label] = Rounded(folded, token_clips, n_bits)
    return made


# %%
ALPHAS = [i / 8 for i in range(9)]
measured_on = profile.protocol(small.model)
small_text = measured_on.text(small.tokenizer)
made = variants_of(planted, maxima["planted"], ALPHAS)
kept = {label: m for (kind, label), m in made.items() if kind == "static"}
of_planted = compare_all(kept, small.model, small_text)


# %%
def show(found):
    rows = []
    for label, c in found.items():
        row = {"factors": label if isinstance(label, str) else f"alpha {label:g}"}
        row["nats lost"] = with_error(c.loss.value, c.loss.error, "+")
        less = difference(c, found["none"])
        row["less none"] = with_error(less.value, less.error, "+")
        rows.append(row)
    return table(rows)


show(of_planted)


# %% tags=["folded"]
# Record the sweep on planted outliers.
def keep_sweep(key, found, by):
    for label, c in found.items():
        part = label if isinstance(label, str) else f"alpha{1000 * label:.0f}"
        full = f"{key}.{part.replace(' ', '_')}"
        tolerance = max(0.02, 0.25 * abs(c.loss.value))
        record(f"{full}.loss", c.loss.value, "nats", tolerance, **by)
        record(f"{full}.loss_error", c.loss.error, "nats", None, **by)
        less = difference(c, found["none"])
        record(f"{full}.less_none", less.value, "nats", None, **by)
        record(f"{full}.less_none_error", less.error, "nats", None, **by)


by = {"model": "course-lm", **measured_on.fields}
keep_sweep("smoothing.planted", of_planted, by)

# %% [markdown]
# With static ranges the planted outliers cost {{smoothing.planted.none.loss:.3f}} ± {{smoothing.planted.none.loss_error:.3f}} nats in the recorded run. Smoothing with $\alpha = 0.5$ leaves {{smoothing.planted.alpha500.loss:.4f}} ± {{smoothing.planted.alpha500.loss_error:.4f}}, and the same factors in random places make it {{smoothing.planted.random_places.loss:.2f}} ± {{smoothing.planted.random_places.loss_error:.2f}}. So it is the *places* that help. Every $\alpha$ of the sweep works, and we draw no conclusion from their order;
# even 0 does, though it looks only at weights. That is too easy a case: planting made the weights' columns small, and so told where the outliers are.
#
# ## A real model
#
# In a real model nobody told the weights. We take the profile's largest model, a range for each token, as its massive activations ask for (`dynamic_range`), and 6-bit inputs: at 8 bits there is little to win (we come back to that), and at 6 the effect is large enough to see its shape.

# %%
models = profile.load_models()
name, (model, tokenizer) = list(models.items())[-1]
how = profile.protocol(model)
measured_on = how if name == "course-lm" else replace(how, tokens=1024)
text = measured_on.text(tokenizer)
seen = calibration_tokens(tokenizer, 16, 64, seed=profile.seed)
maxima[name] = feature_maxima(layer_inputs(model, seen))

# %%
FEW = (0.0, 0.25, 0.5, 0.75, 1.0)
made = variants_of(model, maxima[name], FEW, n_bits=6)
kept = {label: m for (kind, label), m in made.items() if kind == "per token"}
of_model = compare_all(kept, model, text)
show(of_model)

# %%
panels, without = {}, {}
for kind, found in (("static, 8 bits", of_planted), ("per token, 6 bits", of_model)):
    title = "course-lm, planted" if found is of_planted else name
    losses = {a: c.loss for a, c in found.items() if not isinstance(a, str)}
    panels[title] = {kind: {a: (e.value, e.error) for a, e in losses.items()}}
    without[title] = {kind: found["none"].loss.value}
figure = nats_against_alpha(panels, without)
plt.show()

# %% tags=["folded"]
# Record the sweep on the model.
by = {"model": name, **measured_on.fields}
keep_sweep(f"smoothing.{name}.inputs6", of_model, by)
for a in (0.25, 0.75):
    less = difference(of_model[0.5], of_model[a])
    print(f"{name}: alpha 0.5 less alpha {a:g}: {format_difference(less)}")
    key = f"smoothing.{name}.inputs6.half_less_{1000 * a:.0f}"
    record(key, less.value, "nats", None, **by)
    record(f"{key}_error", less.error, "nats", None, **by)

# %% [markdown]
# *Figure: nats lost against alpha with bars of two standard errors; dashed lines are the losses without smoothing. On the left planted outliers at 8 bits, on the right a real model with 6-bit inputs. The panels have scales of their own.*
#
# On SmolLM2, in the recorded run, 6-bit inputs cost {{smoothing.smollm2-135m-q4_1.inputs6.none.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.none.loss_error:.2f}} nats without smoothing. With $\alpha = 0.5$ it is {{smoothing.smollm2-135m-q4_1.inputs6.alpha500.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.alpha500.loss_error:.2f}}, a change of {{smoothing.smollm2-135m-q4_1.inputs6.alpha500.less_none:+.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.alpha500.less_none_error:.2f}}. The same factors in random places leave {{smoothing.smollm2-135m-q4_1.inputs6.random_places.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.random_places.loss_error:.2f}}: no help. And $\alpha = 0$, so harmless on planted outliers, is a disaster: {{smoothing.smollm2-135m-q4_1.inputs6.alpha0.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.alpha0.loss_error:.2f}}. It makes the weights' columns alike, and the inputs pay.
#
# Is 0.5 the best? Compared with 0.25 its loss differs by {{smoothing.smollm2-135m-q4_1.inputs6.half_less_250:+.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.half_less_250_error:.2f}}: it is better. Compared with 0.75 by {{smoothing.smollm2-135m-q4_1.inputs6.half_less_750:+.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.half_less_750_error:.2f}}: not distinguished. At $\alpha = 1$ it is {{smoothing.smollm2-135m-q4_1.inputs6.alpha1000.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.alpha1000.loss_error:.2f}}. From 0.5 on the curve is flat. A reason may be that the weights have 8 bits here and the inputs 6, so that the weights can take more; we did not test it.
#
# ## The layers that no alpha reaches
#
# With *static* ranges SmolLM2 loses far more (`dynamic_range`). Its massive activations are inputs of the MLP's second layer, and there is no norm before it. We compare at 8 bits: static ranges plain, and smoothed; then smoothed with the unreached layers' inputs in float.

# %%
behind_norms = {f"{block_name}.{layer}" for block_name, block in blocks(model)
                for group in norm_groups(block) for layer in group.layers}  # fmt: skip


def reached(wrapped):
    """The same model, with the inputs of layers behind no norm in float."""

    def clip_of(layer, x):
        return wrapped.clip_of(layer, x) if layer in behind_norms else None

    return Rounded(wrapped.model, clip_of)


# %%
plain, half = made["static", "none"], made["static", 0.5]
for wrapped in (plain, half):
    wrapped.n_bits = 8
variants = {"plain": plain, "smoothed": half}
variants["plain, unreached in float"] = reached(plain)
variants["smoothed, unreached in float"] = reached(half)
static = compare_all(variants, model, text)

# %%
rows = []
for label, c in static.items():
    less = difference(c, static["plain"])
    row = {"static 8-bit inputs": label}
    row["nats lost"] = with_error(c.loss.value, c.loss.error, "+")
    row["less plain"] = with_error(less.value, less.error, "+")
    rows.append(row)
print(f"{name}: {len(behind_norms)} of {len(linear_layers(model))} layers read a norm")
table(rows)

# %% tags=["folded"]
# Record the static ranges.
for label, c in static.items():
    key = f"smoothing.{name}.static8.{label.replace(', ', '_').replace(' ', '_')}"
    less = difference(c, static["plain"])
    tolerance = max(0.02, 0.25 * abs(c.loss.value))
    record(f"{key}.loss", c.loss.value, "nats", tolerance, **by)
    record(f"{key}.loss_error", c.loss.error, "nats", None, **by)
    record(f"{key}.less_plain", less.value, "nats", None, **by)
    record(f"{key}.less_plain_error", less.error, "nats", None, **by)
plain_rest, smoothed_rest = list(static.values())[2:]
rest = difference(smoothed_rest, plain_rest)
print(f"unreached in float, smoothed less plain: {format_difference(rest)}")
record(f"smoothing.{name}.static8.reached", rest.value, "nats", None, **by)
record(f"smoothing.{name}.static8.reached_error", rest.error, "nats", None, **by)
del made, kept, plain, half, variants, wrapped  # several copies of the model

# %% [markdown]
# On SmolLM2, in the recorded run, static ranges lose {{smoothing.smollm2-135m-q4_1.static8.plain.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.static8.plain.loss_error:.2f}} nats. Smoothing changes that by {{smoothing.smollm2-135m-q4_1.static8.smoothed.less_plain:+.2f}} ± {{smoothing.smollm2-135m-q4_1.static8.smoothed.less_plain_error:.2f}}. Leaving the unreached layers' inputs in float does far more: {{smoothing.smollm2-135m-q4_1.static8.plain_unreached_in_float.loss:.3f}} ± {{smoothing.smollm2-135m-q4_1.static8.plain_unreached_in_float.loss_error:.3f}} is left, without any smoothing. So most of the loss sits **where no $\alpha$ reaches**. With those layers out of the way, smoothing does what it promises: it changes the loss by {{smoothing.smollm2-135m-q4_1.static8.reached:+.3f}} ± {{smoothing.smollm2-135m-q4_1.static8.reached_error:.3f}}, to {{smoothing.smollm2-135m-q4_1.static8.smoothed_unreached_in_float.loss:.3f}} ± {{smoothing.smollm2-135m-q4_1.static8.smoothed_unreached_in_float.loss_error:.3f}}.
#
# ## In integers: the package
#
# Now with real codes. `quantize_model` with the method `smoothquant` does what we built: it folds, and then computes with int8 codes
# on both sides. First: are its factors and its folding ours?

# %% tags=["folded"]
# Our folded model against the package's, on course-lm.
sequences = calibration_tokens(small.tokenizer, 16, 64, seed=profile.seed)
own = feature_maxima(layer_inputs(small.model, sequences))
ours, theirs = fold(small.model, smoothing(own, 0.5)), copy.deepcopy(small.model)
method = get_method("smoothquant", alpha=0.5)
quantize_model(theirs, method, calibration=sequences)
for layer in linear_layers(ours):
    stored = theirs.get_submodule(layer.name).quantized_weight
    expected = method.quantize(layer.weight)
    assert (stored.codes.int() - expected.codes.int()).abs().max() <= 1
    torch.testing.assert_close(stored.absmax, expected.absmax, rtol=1e-5, atol=0)
print("The package's smoothed weights are ours: same scales, codes at most one apart.")

# %% [markdown]
# They are. A code can be one apart where a float lies next to a tie. The method `affine` does the same without smoothing.

# %%
PLAIN = {"name": "affine", "n_bits": 8, "group_size": "row", "symmetric": True}
METHODS = {
    "static": PLAIN | {"inputs": "static"},
    "per token": PLAIN | {"inputs": "per_token"},
    "smoothed, per token": {"name": "smoothquant", "inputs": "per_token"},
}

# %%
int8, bits, speakers = {}, {}, {}
for n, (model, tokenizer) in models.items():
    seen = calibration_tokens(tokenizer, 16, 64, seed=profile.seed)
    speakers = {}
    for label, settings in METHODS.items():
        speakers[label] = copy.deepcopy(model)
        method = get_method(**settings)
        report = quantize_model(speakers[label], method, calibration=seen)
        bits[n, label] = report.bits_per_weight
    int8[n] = compare_all(speakers, model, text if n == name else small_text)

# %%
rows = []
for n, found in int8.items():
    for label, c in found.items():
        row = {"model": n, "8-bit inputs": label, "bits per weight": bits[n, label]}
        row["nats lost"] = with_error(c.loss.value, c.loss.error, "+")
        row |= {"perplexity": c.perplexity.perplexity}
        rows.append(row | {"float perplexity": c.reference.perplexity})
formats = {"bits per weight": ".3f", "perplexity": ".2f", "float perplexity": ".2f"}
table(rows, formats)

# %% tags=["folded"]
# Record the table.
for n, found in int8.items():
    on = measured_on if n == name else profile.protocol(models[n].model)
    by = {"model": n, **on.fields}
    for label, c in found.items():
        key = f"smoothing.{n}.int8.{label.replace(', ', '_').replace(' ', '_')}"
        tolerance = max(0.02, 0.25 * abs(c.loss.value))
        record(f"{key}.loss", c.loss.value, "nats", tolerance, **by)
        record(f"{key}.loss_error", c.loss.error, "nats", None, **by)
        ppl = c.perplexity.perplexity
        record(f"{key}.perplexity", ppl, "", max(0.05, 0.1 * ppl), **by)
        record(f"{key}.bits_per_weight", bits[n, label], "bits", 1e-6, model=n)
    record(f"smoothing.{n}.float.perplexity", c.reference.perplexity, "", 0.05, **by)
    less = difference(found["smoothed, per token"], found["per token"])
    key = f"smoothing.{n}.int8.smoothed_less_per_token"
    record(key, less.value, "nats", 0.02, **by)
    record(f"{key}_error", less.error, "nats", None, **by)
    print(f"{n}, per token, smoothed less plain: {format_difference(less)}")

# %% [markdown]
# On SmolLM2, in the recorded run, a static range costs {{smoothing.smollm2-135m-q4_1.int8.static.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.int8.static.loss_error:.2f}} nats with real codes, and a range for each token {{smoothing.smollm2-135m-q4_1.int8.per_token.loss:.3f}} ± {{smoothing.smollm2-135m-q4_1.int8.per_token.loss_error:.3f}}. Smoothing changes the latter by {{smoothing.smollm2-135m-q4_1.int8.smoothed_less_per_token:+.3f}} ± {{smoothing.smollm2-135m-q4_1.int8.smoothed_less_per_token_error:.3f}}, which these tokens do not distinguish from 0: at 8 bits a range for each token leaves little to win. On course-lm, without strong outliers, it changes the loss by {{smoothing.course-lm.int8.smoothed_less_per_token:+.4f}} ± {{smoothing.course-lm.int8.smoothed_less_per_token_error:.4f}}: nothing to cure, and nothing is broken.
#
# One prompt, with the largest model of the profile:

# %%
speakers = {"float": models[name].model, **speakers}
print(continuations(speakers, models[name].tokenizer, prompt_of(name), new_tokens=16))

# %% [markdown]
# On SmolLM2, in the recorded run, the static range turns to another subject at once. With a range for each token, smoothed or not, the text begins as the float model's, and then names another number. One text proves nothing; the loss in nats says more.
#
# ## What you saw
#
# - **The rewrite.** Dividing features and multiplying columns moved the logits by {{smoothing.smoothed.apart:.0e}} of the largest in the recorded run, and costs nothing while the model runs.
# - **Alpha.** At 0 the weights' columns become alike, at 1 the inputs' features; in between both share the difficulty. On SmolLM2 everything from 0.5 on is about as good, and 0 is worse than nothing by {{smoothing.smollm2-135m-q4_1.inputs6.alpha0.less_none:+.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.alpha0.less_none_error:.2f}} nats.
# - **The gain.** On planted outliers the loss fell from {{smoothing.planted.none.loss:.3f}} ± {{smoothing.planted.none.loss_error:.3f}} to {{smoothing.planted.alpha500.loss:.4f}} ± {{smoothing.planted.alpha500.loss_error:.4f}} nats. On SmolLM2 with 6-bit inputs it changed by {{smoothing.smollm2-135m-q4_1.inputs6.alpha500.less_none:+.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.alpha500.less_none_error:.2f}}, and with the same factors in random places by {{smoothing.smollm2-135m-q4_1.inputs6.random_places.less_none:+.2f}} ± {{smoothing.smollm2-135m-q4_1.inputs6.random_places.less_none_error:.2f}}.
# - **Out of reach.** Static 8-bit ranges lose {{smoothing.smollm2-135m-q4_1.static8.plain.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.static8.plain.loss_error:.2f}} nats on SmolLM2, and still {{smoothing.smollm2-135m-q4_1.static8.smoothed.loss:.2f}} ± {{smoothing.smollm2-135m-q4_1.static8.smoothed.loss_error:.2f}} when smoothed: the massive values sit behind no norm.
# - **Integers.** With int8 codes and a range for each token, smoothing changed SmolLM2's loss by {{smoothing.smollm2-135m-q4_1.int8.smoothed_less_per_token:+.3f}} ± {{smoothing.smollm2-135m-q4_1.int8.smoothed_less_per_token_error:.3f}} nats: not distinguished from 0.
#
# ## Limits
#
# - One draw of 16 short calibration texts: the errors over documents do not hold what other texts would change. The factors come from largest values, so a single odd token can set them.
# - The best $\alpha$ depends on the model and on the bits of both sides. The paper takes one for a whole model; exercise 3 chooses it for a layer.
# - Only layers behind a norm are smoothed. Exercise 2 finds a place for one more kind of layer.
# - The integer product here is a reference, and its time tells nothing. What smoothing saves over a range for each token shows on hardware with int8 units only.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: a norm that adds one
# *Difficulty 2/5 · 10 minutes · 1 point · no GPU*
#
# Some models store a norm's weight as $w$ and multiply each feature by $1 + w_j$. Fold the factors into such a norm, and into the layers that read it.


# %% tags=["exercise"]
def fold_offset_norm(w, s, weights):
    """(new w, list of new weights); what the layers compute stays the same.

    `w` `[in]`: the norm multiplies by 1 + w. `s` `[in]`: factors. `weights`: matrices
    `[out, in]` of all layers that read the norm. What is given stays unchanged.
    Approach: what has to be divided by s is 1 + w.
    Example: w = [1.0], s = [4.0], one weight [[3.0]]: w becomes -0.5, the weight 12.
    Hint: 1 + w' = (1 + w) / s.
    """
    ### BEGIN SOLUTION
    return (1 + w) / s - 1, [W * s for W in weights]
    ### END SOLUTION


# %% tags=["exercise-tests"]
given = torch.tensor([1.0, 0.0])
new, (W, V) = fold_offset_norm(
    given, torch.tensor([4.0, 2.0]), [torch.tensor([[3.0, 1.0]]), torch.ones(2, 2)]
)
assert new.tolist() == [-0.5, -0.5], "(1 + w) / s - 1, not w / s"
assert W.tolist() == [[12.0, 2.0]], "columns are multiplied by s: one factor a feature"
assert V.tolist() == [[4.0, 2.0]] * 2, "all layers that read the norm"
assert given.tolist() == [1.0, 0.0], "what is given stays unchanged"
### BEGIN HIDDEN TESTS
seed = 0  # the teacher's seed
draw = torch.Generator().manual_seed(seed)
hidden = torch.randn(5, 6, generator=draw, dtype=torch.float64)
w = torch.randn(6, generator=draw, dtype=torch.float64)
s = 2 ** torch.randn(6, generator=draw, dtype=torch.float64)
matrices = [torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (3, 7)]
new, made = fold_offset_norm(w, s, matrices)
torch.testing.assert_close(1 + new, (1 + w) / s, msg="1 + w is what is divided by s")
for W, V in zip(matrices, made, strict=True):
    wanted = (hidden * (1 + w)) @ W.T
    found = (hidden * (1 + new)) @ V.T
    torch.testing.assert_close(found, wanted, msg="the output has to stay the same")
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: a place before the output projection
# *Difficulty 4/5 · 20 minutes · 3 points · no GPU*
#
# Attention's output projection reads no norm. Its input is a mix of values over *tokens*, feature by feature. So the division can go into the rows of the value projection. Where heads are grouped, several query heads share one value head: one factor serves their features.


# %% tags=["exercise"]
def fold_values(W_v, W_o, s, heads, kv_heads):
    """(new W_v, new W_o); attention's output stays the same.

    `W_v` `[kv_heads * d, in]`, `W_o` `[out, heads * d]`, `s` `[kv_heads * d]`. Query
    head h uses value head h // (heads // kv_heads); column h * d + i of W_o reads
    feature i of that head.
    Approach: divide the rows of W_v; multiply each column of W_o by the factor of the
    value feature that it reads.
    Example: heads = 2, kv_heads = 1, d = 1, s = [4]: W_v / 4, both columns of W_o * 4.
    Hint: reshape s to [kv_heads, 1, d], expand, and flatten.
    """
    ### BEGIN SOLUTION
    d, shared = len(s) // kv_heads, heads // kv_heads
    of_columns = s.reshape(kv_heads, 1, d).expand(kv_heads, shared, d).reshape(-1)
    return W_v / s[:, None], W_o * of_columns
    ### END SOLUTION


# %% tags=["exercise-tests"]
one = fold_values(torch.full((1, 1), 8.0), torch.ones(1, 2), torch.tensor([4.0]), 2, 1)
assert one[0].tolist() == [[2.0]], "rows of W_v are divided by s"
assert one[1].tolist() == [[4.0, 4.0]], "both query heads read the one value head"
s = torch.tensor([2.0, 4.0, 8.0, 16.0])  # two value heads, d = 2
V, out = fold_values(torch.ones(4, 3), torch.ones(1, 8), s, heads=4, kv_heads=2)
assert V[:, 0].tolist() == [0.5, 0.25, 0.125, 0.0625], "one factor a row of W_v"
wanted = [2.0, 4.0, 2.0, 4.0, 8.0, 16.0, 8.0, 16.0]
assert out[0].tolist() == wanted, "heads 0 and 1 share value head 0: repeat by head"
### BEGIN HIDDEN TESTS
seed = 0  # the teacher's seed
draw = torch.Generator().manual_seed(seed)
heads, kv_heads, d = 6, 3, 4
x = torch.randn(5, 7, generator=draw, dtype=torch.float64)  # [tokens, in]
A = torch.rand(heads, 5, 5, generator=draw, dtype=torch.float64)  # [head, to, from]
W_v = torch.randn(kv_heads * d, 7, generator=draw, dtype=torch.float64)
W_o = torch.randn(9, heads * d, generator=draw, dtype=torch.float64)
s = 2 ** torch.randn(kv_heads * d, generator=draw, dtype=torch.float64)


def attention(W_v, W_o):
    v = (x @ W_v.T).reshape(5, kv_heads, d)
    mixed = [A[h] @ v[:, h // (heads // kv_heads)] for h in range(heads)]
    return torch.cat(mixed, 1) @ W_o.T


new = fold_values(W_v, W_o, s, heads, kv_heads)
torch.testing.assert_close(
    attention(*new), attention(W_v, W_o), msg="attention's output has to stay the same"
)
torch.testing.assert_close(new[0] * s[:, None], W_v, msg="W_v is divided, not W_o")
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: an alpha for one layer
# *Difficulty 3/5 · 20 minutes · 3 points · no GPU*
#
# The paper takes one $\alpha$ for a whole model. Choose it for one layer instead, by the error of the layer's output with 8-bit inputs
# (one scale for the tensor) and 8-bit weights (one a row).


# %% tags=["exercise"]
def best_alpha(x, W, alphas):
    """(alpha, error) with the least relative error of `x` `[tokens, in]` times `W`.

    The error is the sum of squared differences over the sum of squares of x @ W.T, a
    Python float. No feature of x or W is all 0.
    Approach: for each alpha, smooth x and W, round x / s with S = max|x / s| / 127 and
    the rows of W * s with their own max / 127, multiply, and compare with x @ W.T.
    Example: where all features are alike, every alpha gives about the same error.
    Hint: s = x_max**alpha / w_max ** (1 - alpha), maxima over tokens and over rows.
    """
    ### BEGIN SOLUTION
    y, found = x @ W.T, []
    for alpha in alphas:
        s = x.abs().amax(0) ** alpha / W.abs().amax(0) ** (1 - alpha)
        x_s, W_s = x / s, W * s
        x_step, W_step = x_s.abs().max() / 127, W_s.abs().amax(1, keepdim=True) / 127
        product = (x_s / x_step).round() * x_step @ ((W_s / W_step).round() * W_step).T
        found.append(((y - product).square().sum() / y.square().sum()).item())
    least = min(found)
    return alphas[found.index(least)], least
    ### END SOLUTION


# %% tags=["exercise-tests"]
x_1, W_1 = torch.tensor([[127.0, 1.0]]), torch.tensor([[1.0, 127.0]])
assert best_alpha(x_1, W_1, [0.5])[1] < 1e-10, "all are codes of the narrow grid"
draw = torch.Generator().manual_seed(0)
features = torch.randn(64, 256, generator=draw)  # [tokens, in]
features[:, [7, 99]] *= torch.tensor([30.0, 80.0])  # two outlier features
weight = torch.randn(128, 256, generator=draw) / 16  # [out, in]
choice, least = best_alpha(features, weight, [0.0, 0.25, 0.5, 0.75, 1.0])
at_zero, at_one = (best_alpha(features, weight, [a])[1] for a in (0.0, 1.0))
print(f"alpha {choice}: error {least:.2e}; alpha 0: {at_zero:.2e}, 1: {at_one:.2e}")
assert least < at_zero / 10, "is x divided by s and W multiplied by it?"
assert choice == 0.5, "the alpha with the least error of the output"
assert abs(least / 1.794e-4 - 1) < 0.02, "a scale for the tensor of x, one a row of W"
assert abs(at_one / 1.4208e-3 - 1) < 0.02, "relative to y's power; narrow grids"
### BEGIN HIDDEN TESTS
seed = 0  # the teacher's seed
draw = torch.Generator().manual_seed(seed)
x = torch.randn(32, 48, generator=draw, dtype=torch.float64)
x[:, 5] *= 40
W = torch.randn(24, 48, generator=draw, dtype=torch.float64)


def error_at(alpha):
    s = x.abs().amax(0) ** alpha / W.abs().amax(0) ** (1 - alpha)
    parts = []
    for r, t in ((x / s, (x / s).abs().max()), (W * s, (W * s).abs().amax(1, True))):
        parts.append((r / (t / 127)).round() * (t / 127))
    wanted = x @ W.T
    lost = wanted - parts[0] @ parts[1].T
    return (lost.square().sum() / wanted.square().sum()).item()


for a in (0.0, 0.3, 0.6, 1.0):
    found, wanted = best_alpha(x, W, [a])[1], error_at(a)
    assert abs(found / wanted - 1) < 1e-3, f"alpha {a} has the error {wanted:.3e}"
grid = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
assert best_alpha(x, W, grid)[0] == min(grid, key=error_at), "return the best alpha"
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth, S. Han, *SmoothQuant: Accurate and Efficient Post-Training
#   Quantization for Large Language Models*, ICML 2023, arXiv 2211.10438 [@xiao2022smoothquant].
# - The models: course-lm (trained by this project, see its model card), SmolLM2 [@allal2025smollm2], GPT-2
#   [@radford2019gpt2].
#
# ## Next
#
# `mixed_precision`: which layers need how many bits. `awq_demo` scales features too, for the sake of the weights.

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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/dynamic_range.ipynb)
#
# # Dynamic range: which values get a code of their own
#
# *Large Model Quantization: a deep dive. Foundations, the second notebook.*

# %% [markdown]
# A grid of 256 codes can be fine and narrow, or coarse and wide. This notebook is about choosing. When you have
# worked through it you will be able to
#
# - split a quantization error into rounding and clipping, and find the clip that makes their sum least;
# - build the five observers that production tools offer (min-max, moving average, percentile, mean squared error,
#   entropy), and say what each of them assumes;
# - measure what a clip costs a language model, and see where the error of a tensor and the loss of the model disagree;
# - choose between a static range and one per token;
# - move the difficulty from activations to weights by SmoothQuant's formula, without changing the model's function.
#
# It takes about an hour to read and work. You need `linear_mapping` before it, or to know what a scale is. The
# companion `mixed_precision` goes on to the layers' bits. No profile needs a GPU; `quick` runs in half a minute, `cpu` in
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
import time
from contextlib import contextmanager

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity, time_per_token
from course_utils.grids import observers
from course_utils.models import blocks, linear_layers, load_model
from course_utils.models.structure import norm_groups
from course_utils.plotting import (
    clips_on_histogram,
    error_against_clip,
    loss_against_alpha,
)
from course_utils.profiles import resolve
from course_utils.quantizers.smoothquant import smoothing_factors
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
# A grid of `n_bits` has $2^{n}$ codes, and somebody has to say which stretch of the real line they cover. Here
# the grid is symmetric, so that stretch is $[-t, t]$ and all is decided by one number, the **clip** $t$:
#
# $$ S = \frac{2t}{2^n - 1}, \qquad q = \mathrm{clamp}\!\left(\mathrm{round}(x / S),\ -2^{n-1},\ 2^{n-1} - 1\right),
# \qquad \hat x = S q. $$
#
# Weights are known when the model is quantized, so their range can be measured. Activations
# arrive later. Either their range is **dynamic**, measured anew for every token while the model runs, or it is
# **static**: an *observer* watches the activations of some calibration text, and its $t$ is stored.
#
# The objective is a trade. A value inside the range is *rounded*, with a mean squared error near $S^2/12$, which grows with
# $t^2$. A value outside is *clipped*, and loses all that sticks out. The sum of the two is the mean squared error
#
# $$ \mathrm{MSE}(t) = \mathrm{E}\,(x - \hat x)^2, $$
#
# and whether *that* is what we should minimise is the question at the end.
#
# ## By hand: one outlier and seven others
#
# Three bits, codes -4 to 3. With $t = 14$ the step is 4; with $t = 3.5$ it is 1. Follow the value 2.6: it is 0.65
# steps of 4, so its code is 1 and it comes back as 4. With steps of 1 it comes back as 3.


# %% tags=["nbval-check-output"]
def round_trip(x, clip, n_bits=8):
    """x on the symmetric grid of n_bits over [-clip, clip]; clip broadcasts."""
    top = 2 ** (n_bits - 1)
    step = 2 * clip / (2**n_bits - 1)
    codes = (x.float() / step).round().clamp(-top, top - 1)
    return (codes * step).to(x.dtype)


x = torch.tensor([0.4, -1.2, 2.6, -0.3, 1.1, 0.9, -2.1, 14.0])
print("t      seven ordinary values                      outlier  squared errors")
for clip in (14.0, 7.0, 3.5):
    back = round_trip(x, torch.tensor(clip), n_bits=3) + 0.0  # no -0.0
    errors = (x - back).square()
    values = " ".join(f"{v:5.1f}" for v in back.tolist())
    print(f"{clip:4.1f} {values}   {errors[:7].sum():6.2f} + {errors[7]:6.2f}")
    if clip == 14.0:
        wide = errors
gain, loss = (wide - errors)[:7].mean(), (errors - wide)[7]
print(
    f"The clip at 3.5 pays once there are {loss / gain:.0f} ordinary values an outlier."
)

# %% [markdown]
# Both ends of the trade are there. Clipping the outlier makes the seven others far better and the outlier far worse, and
# squares make the outlier count for more. So the right clip is a matter of *how many* values lie where:
# of the distribution.
#
# ## What the tail decides
#
# We draw from a normal distribution, and from one with **heavy tails** (Student's t with three degrees of freedom), scaled to the
# same variance. Rounding error comes from the values inside the range, clipping error from those outside.


# %%
def error_parts(x, clips, n_bits):
    """Mean squared error by rounding and by clipping `[clips]`, for each clip."""
    rounding, clipping = [], []
    for clip in clips:
        errors = (x - round_trip(x, clip, n_bits)).square()
        outside = x.abs() > clip
        rounding.append((errors * ~outside).mean())
        clipping.append((errors * outside).mean())
    return torch.stack(rounding), torch.stack(clipping)


normal = torch.randn(3, 40_000, generator=generator)
chi = torch.randn(3, 40_000, generator=generator).square().sum(0)
draws = {"normal": normal[0], "heavy tails": normal[1] / chi.sqrt()}  # t with 3 dof
clips = torch.logspace(-0.5, 1.5, 60)
panels = {}
print("distribution  largest |x|  best clip at 3, 4, 6, 8 bits")
for name, draw in draws.items():
    draw = draw / draw.std()
    best = [clips[sum(error_parts(draw, clips, b)).argmin()] for b in (3, 4, 6, 8)]
    text = " ".join(f"{t:6.2f}" for t in best)
    print(f"{name:13} {draw.abs().max():11.1f}  {text}")
    panels[f"{name}, 4 bits"] = clips, *error_parts(draw, clips, 4)
figure = error_against_clip(panels)
plt.show()

# %% [markdown]
# *Figure: two panels, for the normal and the heavy-tailed values, with the mean squared error at 4 bits against the clip, both axes
# logarithmic. The rounding error rises with the clip, the clipping error falls, and their sum has a minimum, marked by a
# dot.*
#
# Three things to take along. The best clip lies inside the range of the values. It moves outward with the number of bits:
# steps that are small anyway can be spent on the tail. And the heavier the tail, the further below the largest value
# it lies.
#
# ## Real weights, real activations
#
# We keep the inputs of every linear layer over a few calibration texts, and compare the tails of inputs and weights: how many
# standard deviations away is the largest value? (A million normal values reach about five.) The **kurtosis**, the mean of
# $((x - \mu) / \sigma)^4$, is 3 for a normal distribution and grows with the tails.

# %%
models = profile.load_models()
calibration = {
    name: calibration_tokens(tokenizer, 4, 256, seed=profile.seed)
    for name, (_, tokenizer) in models.items()
}


@torch.no_grad()
def layer_inputs(model, sequences):
    """Inputs of every linear layer by its name: a list of `[tokens, in]`."""
    inputs, hooks = {layer.name: [] for layer in linear_layers(model)}, []
    for layer in linear_layers(model):

        def keep(module, args, name=layer.name):
            inputs[name].append(args[0].flatten(0, -2))

        hooks.append(layer.module.register_forward_pre_hook(keep))
    for tokens in sequences:
        model(input_ids=tokens[None].to(model.device))
    for hook in hooks:
        hook.remove()
    return inputs


# %%
def tail(x):
    """Largest |x| in standard deviations, and kurtosis."""
    z = (x.float() - x.float().mean()) / x.float().std()
    return z.abs().max().item(), z.pow(4).mean().item()


def median(values):
    return sorted(values)[len(values) // 2]


inputs, peak = {}, {}
print(
    "model               what         largest/sigma: median, worst    kurtosis: median"
)
for name, (model, _) in models.items():
    inputs[name] = layer_inputs(model, calibration[name])
    tails = {
        "weights": [tail(layer.weight) for layer in linear_layers(model)],
        "activations": [tail(torch.cat(x)) for x in inputs[name].values()],
    }
    for what, found in tails.items():
        sigmas, kurtosis = zip(*found, strict=True)
        text = f"{median(sigmas):16.1f} {max(sigmas):12.1f} {median(kurtosis):16.1f}"
        print(f"{name:19} {what:12} {text}")
    worst = max(range(len(sigmas)), key=sigmas.__getitem__)
    peak[name] = list(inputs[name])[worst]
    print(f"  heaviest tail: the input of {peak[name]}")

# %% [markdown]
# What a single far value is, an error to cut off or the very thing the model works with, no histogram tells. Keep the
# layer in the last line in mind.
#
# ## Five observers
#
# Each looks at the batches of one layer, and says a clip. We build them on the layer with the heaviest
# tail of the last model.
#
# **Min-max** takes the largest magnitude: nothing is clipped. **Moving average** takes the extremes of each batch, and moves towards them by
# a constant, $m \leftarrow m + c\,(m_\text{new} - m)$, so that one odd batch cannot stretch the range for good. Jacob et al. use
# it in training [@jacob2017integer].

# %%
model_name = list(models)[-1]
batches = [x.float() for x in inputs[model_name][peak[model_name]]]
values = torch.cat(batches).flatten().abs()


def minmax_clip(batches):
    return torch.stack([x.abs().max() for x in batches]).max()


def moving_average_clip(batches, constant=0.01):
    low, high = batches[0].aminmax()
    for x in batches[1:]:
        low, high = low + constant * (x.min() - low), high + constant * (x.max() - high)
    return torch.maximum(-low, high)


clips = {
    "minmax": minmax_clip(batches),
    "moving_average": moving_average_clip(batches),
}
print("largest of each batch:", [round(x.abs().max().item(), 2) for x in batches])
print({name: round(clip.item(), 2) for name, clip in clips.items()})

# %% [markdown]
# **Percentile** keeps a share of the values, whatever their size. **MSE** tries clips, and takes the one whose grid has the least
# mean squared error: the objective above, by search.


# %%
def percentile_clip(values, percentile=99.99):
    beyond = int(len(values) * (1 - percentile / 100))  # values that may lie outside
    return values.topk(beyond + 1).values[-1]


def mean_squared_error(values, clip, n_bits=8):
    return (values - round_trip(values, clip, n_bits)).square().mean()


def mse_clip(values, n_bits=8, candidates=200):
    clips = values.max() * torch.logspace(0, -3, candidates, device=values.device)
    errors = torch.stack([mean_squared_error(values, t, n_bits) for t in clips])
    return clips[errors.argmin()]


clips["percentile"] = percentile_clip(values)
clips["mse"] = mse_clip(values)
outside = (values > clips["percentile"]).sum()
print(f"percentile: {outside} of {len(values):,} values are clipped")
print({name: round(clip.item(), 2) for name, clip in clips.items()})

# %% [markdown]
# **Entropy**, as NVIDIA described it for TensorRT [@migacz2017calibration], compares distributions instead of values. Count $|x|$ in 2048 bins. For each
# number of bins $i$ from 128 to 2048:
#
# - $P$ is the first $i$ bins, with all that lies beyond added to the last of them, as clipping does;
# - $Q$ is the first $i$ bins merged into 128 levels (7 bits and a sign make 8), and spread out again evenly over the bins
#   that were not empty;
# - the loss is $\mathrm{KL}(P \,\|\, Q) = \sum_k P_k \ln (P_k / Q_k)$, the information lost when $Q$ stands for $P$.
#
# The $i$ with the least loss is the clip. If the last bin was empty, $P$ has mass there and $Q$ has none: the divergence is infinite,
# and the candidate is out. Two details are not on the slides. Bin 0 counts as bin 1, since zero is exact on every grid. And a candidate
# that keeps a *single* occupied bin is out while values lie beyond: one bin always agrees with itself, whatever was cut off.


# %%
def divergence(counts, i, levels=128):
    """KL(P || Q) if the first i of the bins `counts` are kept, on `levels` levels."""
    kept = counts[:i]
    P = kept.clone()
    P[-1] += counts[i:].sum()
    level = torch.arange(i, device=counts.device) * levels // i  # of each bin
    filled = (kept > 0).double()
    nothing = torch.zeros(levels, dtype=kept.dtype, device=kept.device)
    mass, bins = (nothing.index_add(0, level, v) for v in (kept, filled))
    Q = filled * (mass / bins.clamp(min=1))[level]
    P, Q = P / P.sum(), Q / Q.sum()
    alone = (filled.sum() == 1) & (counts[i:].sum() > 0)
    return torch.where(
        alone, torch.inf, torch.where(P > 0, P * (P / Q).log(), 0.0).sum()
    )


def entropy_bins(values, bins=2048):
    """(counts, best i) of the values' histogram."""
    counts = torch.histc(values, bins, min=0, max=values.max().item()).double()
    counts[0] = counts[1]
    losses = torch.stack([divergence(counts, i) for i in range(128, bins + 1)])
    losses = losses.nan_to_num(nan=torch.inf)  # nothing kept at all
    return counts, bins - losses.flip(0).argmin().item()  # the largest of equals


counts, kept = entropy_bins(values)
clips["entropy"] = kept / len(counts) * values.max()
print(f"entropy keeps {kept} of {len(counts)} bins: ", end="")
print(f"{counts[kept:].sum():.0f} values are clipped")

# %%
print("observer          clip      values clipped   relative error of x")
for name, clip in clips.items():
    error = mean_squared_error(values, clip) / values.square().mean()
    print(f"{name:15} {clip:9.3f} {(values > clip).sum():12d} {error:21.1e}")
first = next(iter(models))
plain = torch.cat(inputs[first][peak[first]]).float().flatten().abs()
simple = {
    "minmax": plain.max(),
    "percentile": percentile_clip(plain),
    "mse": mse_clip(plain),
}
panels = {
    f"{first}, {peak[first]}": (plain, simple),
    f"{model_name}, {peak[model_name]}": (values, clips),
}
figure = clips_on_histogram(
    {
        title: (v.cpu(), {k: float(t) for k, t in c.items()})
        for title, (v, c) in panels.items()
    }
)
plt.show()

# %% [markdown]
# *Figure: for each model the histogram of |x| at the input of the layer with the heaviest tail, both axes logarithmic, with a
# vertical line at each observer's clip, each a little shorter than the one before in the legend, so that clips that coincide show. Of a first
# model that is not the last, only three clips are drawn.*
#
# Five rules, the same data, and clips that may lie far apart. Which of them is right depends on the loss that one has in mind: squares weigh
# a single far value heavily, percentile and entropy hardly see it.
#
# ## Is it right? The package, and PyTorch
#
# The package's observers read a stream batch by batch and hold no more than a histogram that grows, so the clips that come from
# bins differ a little. Where the algorithm is the same, so is the number. PyTorch's own observers, in
# `torch.ao.quantization`, know the first two as well.

# %%
for name, clip in clips.items():
    observer = observers.OBSERVERS[name](symmetric=True)
    for x in batches:
        observer.update(x)
    theirs = observer.range()[1]
    print(f"{name:15} ours {clip:10.3f}, package {theirs:10.3f}")
    if name in ("minmax", "moving_average"):
        torch.testing.assert_close(theirs, clip, rtol=1e-6, atol=0)
    elif name == "percentile":
        assert abs(theirs - clip) <= values.max() / 2**12  # an edge of a bin
    elif name == "mse":
        ratio = mean_squared_error(values, theirs) / mean_squared_error(values, clip)
        print(f"{'':15} the package's error: {ratio:.3f} times that of our search")
assert observers.entropy_clip(counts.cpu()) == kept
print("The same bins give the same entropy clip, exactly.")

# %%
try:
    from torch.ao.quantization import observer as torch_observers
except ImportError:
    print("This PyTorch has no observers any more: this comparison is left out.")
else:
    for name in ("MinMaxObserver", "MovingAverageMinMaxObserver"):
        theirs = getattr(torch_observers, name)(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
        )
        for x in batches:
            theirs(x.cpu())
        scale, zero_point = theirs.calculate_qparams()
        ours = clips["minmax" if name == "MinMaxObserver" else "moving_average"]
        assert zero_point == 0
        torch.testing.assert_close(scale[0], 2 * ours.cpu() / 255, rtol=1e-6, atol=0)
        print(f"{name}: PyTorch's scale is ours, {scale.item():.6f}")

# %% [markdown]
# ## What a clip costs the model
#
# Now the real loss. One clip for each layer from each observer, over the calibration texts; then every linear layer's input is rounded
# to its grid, weights stay in float, and we measure the perplexity on other texts. This is a simulation: the values lie on
# an 8-bit grid, but are held in floats. (The whole thing in integers follows below.)


# %%
@contextmanager
def rounded_inputs(model, clip_of, n_bits=8):
    """Inside, the input x of each linear layer is rounded by `clip_of(name, x)`."""
    hooks = []
    for layer in linear_layers(model):

        def round_input(module, args, name=layer.name):
            return (round_trip(args[0], clip_of(name, args[0]), n_bits),)

        hooks.append(layer.module.register_forward_pre_hook(round_input))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def static_clips(inputs, observer, n_bits=8):
    """Clip by layer name; layers that share their input share the clip."""
    options = {"n_bits": n_bits} if observer in ("mse", "entropy") else {}
    shared, clips = {}, {}
    for layer, batches in inputs.items():
        key = batches[0].data_ptr()
        if key not in shared:
            watching = observers.OBSERVERS[observer](symmetric=True, **options)
            for x in batches:
                watching.update(x)
            shared[key] = watching.range()[1]
        clips[layer] = shared[key]
    return clips


# %%
def nats(name, model):
    """Mean loss on the evaluation tokens of `name`, in nats a token."""
    return perplexity(model, evaluation[name], window=window[name]).nats


evaluation, window, protocol = {}, {}, {}
for name, (model, tokenizer) in models.items():
    n = profile.pick(quick=1024, cpu=1024, gpu=4096)
    evaluation[name] = evaluation_tokens(tokenizer, n)
    window[name] = min(512, model.config.max_position_embeddings)
    of_window = {"window": window[name], "stride": window[name]}
    protocol[name] = {"corpus": "factbook", "tokens": n} | of_window
bits_of = {name: (8, 5) if name == "course-lm" else (8,) for name in models}
static, table = {}, {}
for name in models:
    for observer in observers.OBSERVERS:
        start = time.perf_counter()
        for n_bits in bits_of[name]:
            clips = static_clips(inputs[name], observer, n_bits)
            static[name, observer, n_bits] = clips
        seconds = time.perf_counter() - start
        print(f"{name}, {observer}: {seconds:.2f} s to observe all layers")

# %%
for name, (model, _) in models.items():
    table[name] = {"float": nats(name, model)}
    reference, bits = table[name]["float"], bits_of[name]
    print(f"{name}, {protocol[name]['tokens']} tokens, float: {reference:.4f} nats")
    print("  observer         " + "".join(f"{b:>2} bits: loss " for b in bits))
    for observer in observers.OBSERVERS:
        for n_bits in bits:
            clip = static[name, observer, n_bits]
            with rounded_inputs(model, lambda layer, x, c=clip: c[layer], n_bits):
                loss = nats(name, model) - reference
            table[name][observer, n_bits] = loss
            key = f"dynamic_range.{name}.static{n_bits}.{observer}.loss"
            tolerance = max(0.02, 0.2 * abs(loss))
            record(key, loss, "nats", tolerance, model=name, **protocol[name])
        losses = "".join(f"{table[name][observer, b]:+13.4f}" for b in bits)
        print(f"  {observer:15} {losses}")

# %% [markdown]
# A loss of 0.01 nats is 1% of perplexity, and one of 0.7 doubles it. With so few tokens, differences of a few thousandths are
# noise. The next cell reads the table, and then looks for the culprits: it takes the observer that did worst at 8
# bits, and gives the full range back to the layers that it cuts hardest, then to more of them.

# %%
for name, (model, _) in models.items():
    losses = {k[0]: v for k, v in table[name].items() if k[1:] == (8,)}
    worst, best = max(losses, key=losses.get), min(losses, key=losses.get)
    print(f"{name}: least loss with {best} ({losses[best]:+.4f}), ", end="")
    print(f"most with {worst} ({losses[worst]:+.4f});")
    print(f"  min-max {losses['minmax']:+.4f}.")
    if losses[worst] - losses[best] < 0.01:
        print("  So small a difference is noise: at 8 bits any of them will do.")
        continue
    full, cut = (static[name, rule, 8] for rule in ("minmax", worst))
    for factor in (10.0, 3.0, 1.5):
        far = {layer for layer in full if full[layer] > factor * cut[layer]}
        mixed = {layer: full[layer] if layer in far else cut[layer] for layer in full}
        with rounded_inputs(model, lambda layer, x, mixed=mixed: mixed[layer]):
            loss = nats(name, model) - table[name]["float"]
        print(
            f"  full range where {worst} cuts off over {1 - 1 / factor:.0%}:", end=" "
        )
        print(f"{len(far)} of {len(full)} layers, loss {loss:+.4f}")

# %% [markdown]
# Why does the layer with the heaviest tail matter so much? We split its tokens: those that hold a value ten times beyond what is usual (the
# median of the tokens' largest values), and all **others**. The squared error of the whole tensor speaks of the first, if there are
# any; the model reads every token.

# %%
for name in models:
    x = torch.cat(inputs[name][peak[name]]).float()
    largest = x.abs().amax(1)
    far = largest > 10 * largest.median()
    print(
        f"{name}, {peak[name]}: {int(far.sum())} of {len(x)} tokens with a far value;"
    )
    print(f"  largest |x| of a token: median {largest.median():.2f}, ", end="")
    print(f"most {largest.max():.2f}")
    print("  observer         clip     relative error: all tokens, the others")
    for observer in observers.OBSERVERS:
        clip = static[name, observer, 8][peak[name]]
        squares, sizes = (x - round_trip(x, clip)).square(), x.square()
        pair = squares.sum() / sizes.sum(), squares[~far].sum() / sizes[~far].sum()
        print(f"  {observer:15} {clip:9.2f} {pair[0]:20.1e} {pair[1]:14.1e}")

# %% [markdown]
# Where a model has **massive activations** [@sun2024massive], values a thousand times larger than the rest in a few tokens, this
# is a lesson about objectives. Keep them, and the step is so wide that the other tokens round to a handful of codes, or to zero: a tiny
# error of the tensor, and a ruined layer. Cut them off, and the others are fine, but the model was trained with the massive values and
# needs them. *No* static clip is right there. The range has to follow the token.

# %% [markdown]
# ## Per token
#
# A **dynamic** range is measured on each token as it passes: $t_i = \max_j |x_{ij}|$. The scale is still one number a row, so it can be
# pulled out of the integer sum. A token with a massive value ruins its own row only.


# %%
def token_clips(layer, x):
    """Largest |x| of each token `[..., 1]`."""
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-8)


for name, (model, _) in models.items():
    reference = table[name]["float"]
    for n_bits in bits_of[name]:
        with rounded_inputs(model, token_clips, n_bits):
            loss = nats(name, model) - reference
        table[name]["per token", n_bits] = loss
        rest = {k[0]: v for k, v in table[name].items() if k[1:] == (n_bits,)}
        rest.pop("per token")
        best = min(rest, key=rest.get)
        print(f"{name}, {n_bits} bits: per token {loss:+.4f}, ", end="")
        print(f"best static {rest[best]:+.4f} ({best})")
        key = f"dynamic_range.{name}.per_token{n_bits}.loss"
        tolerance = max(0.02, 0.2 * abs(loss))
        record(key, loss, "nats", tolerance, model=name, **protocol[name])

# %% [markdown]
# The price of a dynamic range is a pass over the input of every layer, before its product can begin. Where that is too much, static
# ranges need help: see below.
#
# ## Weights: each row its own search
#
# Weights do not change, so every row, or every group of 64 in a row, can have its own search. At 4 bits the steps are
# wide, and a little clipping lowers the error. Of which quantity? We take two objectives for a row $w$:
# the error of the weights, $\sum_j (w_j - \hat w_j)^2$, and the same **weighted** by how large feature $j$ of the input is,
# $\sum_j \mathrm{E}(x_j^2)\,(w_j - \hat w_j)^2$, which is the error of the layer's output if features are uncorrelated.
#
# Scales are symmetric here too. The weights of `smollm2-135m-q4_1` lie on a 4-bit grid of their own, which would favour
# min-max. We take `smollm2-135m-dithered`, a copy with noise inside the cells of that grid (`linear_mapping` says how it is made, and what it costs).


# %%
def row_clips(rows, n_bits, shrink, importance=1.0):
    """Best clip `[rows, 1]` of each row of `rows` `[rows, n]` among the shrunk ones."""
    full = rows.abs().amax(1, keepdim=True).clamp(min=1e-8)
    best, least = full, torch.full_like(full, torch.inf)
    for factor in shrink:
        error = (rows - round_trip(rows, factor * full, n_bits)).square()
        error = (error * importance).sum(1, keepdim=True)
        best = torch.where(error < least, factor * full, best)
        least = torch.minimum(error, least)
    return best


@torch.no_grad()
def round_weights(model, group_size, n_bits, shrink=(1.0,), importance=None):
    """A copy of the model with its weights on their grids, and their relative error."""
    model, lost, total = copy.deepcopy(model), 0.0, 0.0
    for layer in linear_layers(model):
        size = group_size or layer.weight.shape[1]
        rows, weigh = layer.weight.float().reshape(-1, size), 1.0
        if importance is not None:  # [in] of this layer, for every row
            weigh = importance[layer.name].expand_as(layer.weight).reshape(-1, size)
        back = round_trip(rows, row_clips(rows, n_bits, shrink, weigh), n_bits)
        lost += (rows - back).square().sum()
        total += rows.square().sum()
        layer.weight.copy_(back.reshape(layer.weight.shape))
    return model, (lost / total).item()


# %%
rows = linear_layers(models[first].model)[0].weight.float()[:50]
factors = [0.3 ** (i / 39) for i in range(40)]  # the package's
ours = row_clips(rows, 4, factors)[:, 0]
theirs = observers.mse_range(rows, 4, True)[1]
torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
print("The clips of 50 rows are the package's.")

# %%
shrink = [1 - 0.05 * i for i in range(12)]
places = {name: {"row": None} for name in models}
places["course-lm"] = {"row": None, "g64": 64}
on_weights, name_of = {}, {name: name for name in models}
for name, (model, _) in models.items():
    squares = {
        k: torch.cat(x).float().square().mean(0) for k, x in inputs[name].items()
    }
    rules = {
        "minmax": ((1.0,), None),
        "mse": (shrink, None),
        "weighted": (shrink, squares),
    }
    if name == "smollm2-135m-q4_1":
        name_of[name] = "smollm2-135m-dithered"
        model = load_model(name_of[name], device=profile.device).model
    reference = nats(name, model)
    print(f"{name}: float {reference:.4f} nats a token")
    for n_bits in (4, 3) if name == "course-lm" else (4,):
        for place, size in places[name].items():
            for rule, (factors, importance) in rules.items():
                rounded, error = round_weights(model, size, n_bits, factors, importance)
                on_weights[name, n_bits, place, rule] = (
                    error,
                    nats(name, rounded) - reference,
                )

# %%
print("model                  bits  scale  rule      weight error      loss")
for (name, n_bits, place, rule), (error, loss) in on_weights.items():
    label, by = name_of[name], protocol[name]
    print(f"{label:22} {n_bits:4}  {place:5}  {rule:9} {error:11.4f} {loss:+9.4f}")
    key = f"dynamic_range.{label}.weights{n_bits}_{place}.{rule}.loss"
    tolerance = max(0.03, 0.25 * abs(loss))
    record(key, loss, "nats", tolerance, model=label, **by)
for name in models:
    of = {
        rule: on_weights[name, 4, "row", rule] for rule in ("minmax", "mse", "weighted")
    }
    saved = 1 - of["mse"][0] / of["minmax"][0]
    changes = [of[rule][1] - of["minmax"][1] for rule in ("mse", "weighted")]
    print(f"{name_of[name]}, 4 bits, a scale a row: the search lowers the error")
    print(f"  of the weights by {saved:.0%} and changes the loss by {changes[0]:+.4f};")
    print(f"  the weighted search by {changes[1]:+.4f}.")

# %% [markdown]
# The search can only lower the *error of the weights*. Where the loss rises all the same, look at the inputs: a large weight
# that meets a massive activation is clipped like any other, and what it loses is multiplied by thousands. The weighted search
# knows the inputs, and that is the thought behind AWQ and GPTQ, later in the course. Shorter groups leave less to clip: among 64 values
# the largest is seldom far out.
#
# ## Moving the difficulty: SmoothQuant
#
# Outliers of activations often sit in a few fixed **features**. A scale for each feature would fit them, but it would stay inside the
# integer sum. SmoothQuant [@xiao2022smoothquant] divides feature $j$ of the input by $s_j$ and multiplies column $j$ of the weight by
# it: the product is the same.
#
# $$ y = x W^\top = \left(x\,\mathrm{diag}(s)^{-1}\right)\left(\mathrm{diag}(s)\, W^\top\right), \qquad
# s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1 - \alpha}}. $$
#
# Weights mostly have shorter tails (the table of tails above), so they can take some of the difficulty. With $\alpha = 0.5$ both end up with the same maximum, $\sqrt{\max|X_j| \max|W_j|}$; follow
# the second feature below.

# %% tags=["nbval-check-output"]
x_max = torch.tensor([1.0, 64.0, 2.0])  # largest |x| of three features
w_max = torch.tensor([0.5, 1.0, 0.5])  # largest |w| of their columns
for alpha in (0.0, 0.5, 1.0):
    s = x_max**alpha / w_max ** (1 - alpha)
    print(f"alpha {alpha}: s", [round(v, 3) for v in s.tolist()], end="")
    print("  inputs", [round(v, 3) for v in (x_max / s).tolist()], end="")
    print("  weights", [round(v, 3) for v in (w_max * s).tolist()])

# %% [markdown]
# Note that $\alpha = 0$ is *not* "do nothing": it makes all weight columns equally large, at the expense of the inputs. And the
# division costs nothing while the model runs. The inputs of attention and of the MLP come out of a norm, which multiplies every feature by a weight
# of its own: divide *that* by $s_j$. All layers that read the same norm (q, k and v) share one $s$. Attention's output projection
# and the MLP's second layer read no norm; they stay as they are.


# %%
def feature_maxima(inputs):
    """Largest |x| of each feature `[in]`, by layer."""
    return {name: torch.cat(x).float().abs().amax(0) for name, x in inputs.items()}


@torch.no_grad()
def fold(model, factors_of):
    """A copy of the model, every norm divided by `factors_of(names, w_max)`."""
    model = copy.deepcopy(model)
    for block_name, block in blocks(model):
        layers = {layer.name: layer for layer in linear_layers(block)}
        for group in norm_groups(block):
            weights = [layers[name].weight for name in group.layers]
            w_max = torch.stack([W.float().abs().amax(0) for W in weights]).amax(0)
            s = factors_of([f"{block_name}.{name}" for name in group.layers], w_max)
            for parameter in group.norm.parameters():  # weight, and LayerNorm's bias
                parameter.div_(s)
            for W in weights:  # [out, in], a view of the model's own
                W.mul_(s)
    return model


def smoothing(maxima, alpha, permute=False):
    """SmoothQuant's factors; permuted, the same numbers in random places: a control."""

    def factors_of(names, w_max):
        s = smoothing_factors(maxima[names[0]], w_max, alpha)
        return s[torch.randperm(len(s), generator=generator)] if permute else s

    return factors_of


# %%
maxima = {name: feature_maxima(inputs[name]) for name in models}
for name, (model, _) in models.items():
    probe = calibration[name][:1, :64].to(model.device)
    smoothed = fold(model, smoothing(maxima[name], 0.5))
    with torch.no_grad():
        before, after = (m(input_ids=probe).logits.float() for m in (model, smoothed))
    off = ((before - after).abs().max() / before.abs().max()).item()
    print(f"{name}: folding changes the logits by {off:.1e} of the largest")
    assert off < (1e-4 if model.dtype == torch.float32 else 5e-2)
    layer = next(k for k in maxima[name] if k.endswith(("c_fc", "up_proj")))
    ratio = maxima[name][layer].max() / maxima[name][layer].median()
    s_max = (
        layer_inputs(smoothed, calibration[name][:1])[layer][0].float().abs().amax(0)
    )
    print(f"  {layer}: largest feature / median,")
    after = s_max.max() / s_max.median()
    print(f"    {ratio:.1f} before, {after:.1f} after (first text)")

# %% [markdown]
# ## The sweep, with controls
#
# Weights and inputs at 8 bits now, with one scale per row of `W`, and inputs static (min-max) or per token. Beside the sweep over
# $\alpha$ stand no smoothing at all, and two controls:
#
# - the factors of $\alpha = 0.5$ in **random places**: still an exact rewrite, but of the wrong features;
# - course-lm has no strong outliers to cure, so we **plant** some: in each norm four features are multiplied by 30 and the weights' columns divided,
#   which is smoothing backwards and leaves the function as it is. A method that works must undo that.

# %%
small = load_model("course-lm", device=profile.device)


def plant(names, w_max):
    s = torch.ones_like(w_max)
    s[torch.randperm(len(s), generator=generator)[:4]] = 1 / 30
    return s


cases = {name: model for name, (model, _) in models.items()}
planted = "course-lm, planted"
cases[planted] = fold(small.model, plant)
evaluation[planted] = evaluation_tokens(small.tokenizer, 1024)
window[planted] = 256
text = calibration_tokens(small.tokenizer, 4, 256, seed=profile.seed)
calibration[planted] = text
maxima[planted] = feature_maxima(layer_inputs(cases[planted], text))
before, after = (nats(planted, m) for m in (small.model, cases[planted]))
print(f"float: {before:.4f} nats a token; planted: {after:.4f}")


# %%
def int8_loss(name, model, clips=None):
    """Loss with 8-bit weights and inputs: static by these clips, or per token."""
    rounded, _ = round_weights(model, None, 8)

    clip_of = (lambda layer, x: clips[layer]) if clips else token_clips
    with rounded_inputs(rounded, clip_of):
        return nats(name, rounded)


def smoothed_clips(name, factors_of):
    """Static clips of the folded model: each feature's maximum over its factor."""
    clips = {layer: m.max() for layer, m in maxima[name].items()}

    def keep(names, w_max):
        s = factors_of(names, w_max)
        clips.update({layer: (maxima[name][layer] / s).max() for layer in names})
        return s

    return fold(cases[name], keep), clips


# %%
alphas = (0.0, 0.5, 1.0)
sweep = {}
for name, model in cases.items():
    reference = nats(name, model)
    variants = {"none": lambda names, w_max: torch.ones_like(w_max)}
    variants |= {f"alpha {a:g}": smoothing(maxima[name], a) for a in alphas}
    variants["random"] = smoothing(maxima[name], 0.5, permute=True)
    print(f"{name}: loss in nats a token\n  factors       static  per token")
    for label, factors_of in variants.items():
        folded, clips = smoothed_clips(name, factors_of)
        pair = [int8_loss(name, folded, c) - reference for c in (clips, None)]
        sweep[name, label] = pair
        print(f"  {label:10} {pair[0]:+9.4f}  {pair[1]:+9.4f}")
        if name in models:
            key = (
                f"dynamic_range.{name}.smooth_{label.replace(' ', '').replace('.', '')}"
            )
            for kind, loss in zip(("static", "per_token"), pair, strict=True):
                tolerance, by = max(0.02, 0.25 * abs(loss)), protocol[name]
                record(f"{key}.{kind}.loss", loss, "nats", tolerance, model=name, **by)

# %%
panels = {}
for name in cases:
    panels[name] = {
        kind: ([sweep[name, f"alpha {a:g}"][i] for a in alphas], sweep[name, "none"][i])
        for i, kind in enumerate(("static", "per token"))
    }
figure = loss_against_alpha(panels, alphas, "loss in nats a token")
plt.show()
for name in cases:
    for i, kind in enumerate(("static", "per token")):
        plain_loss, chance = (sweep[name, label][i] for label in ("none", "random"))
        best = min(alphas, key=lambda a: sweep[name, f"alpha {a:g}"][i])
        loss = sweep[name, f"alpha {best:g}"][i]
        print(f"{name}, {kind}:\n  {plain_loss:+.4f} plain, ", end="")
        print(f"{loss:+.4f} with alpha {best:g}, ", end="")
        print(f"{chance:+.4f} with random factors.", end="\n  ")
        if plain_loss < 0.005:
            print("Next to nothing to gain.")
        elif loss < 0.5 * plain_loss:
            print("Smoothing takes back more than half.")
        else:
            print("Smoothing takes back less than half.")

# %% [markdown]
# *Figure: one panel per model, with the loss in nats a token against alpha, for static ranges and for ranges per token; the dashed
# lines are the losses without smoothing. The panels have scales of their own.*
#
# Read it by cases. On planted outliers the method has to win, and one thing about them is too easy: planting made the weights'
# columns small, so even $\alpha = 0$, which looks only at weights, finds them. A model whose heavy values sit behind no norm (the
# input of an MLP's second layer, say) keeps them: no $\alpha$ reaches that layer, and a static range there stays as it was.
#
# ## In integers: the package
#
# Now with real codes. `quantize_model` with the method `smoothquant` does what we built: folds, and then computes with int8 codes
# on both sides. The method `affine` does the same without smoothing, with any observer. First: are its factors and its folding ours?

# %%
subject, tokenizer = small
ours = fold(subject, smoothing(feature_maxima(layer_inputs(subject, text)), 0.5))
theirs = copy.deepcopy(subject)
method = get_method("smoothquant", alpha=0.5)
quantize_model(theirs, method, calibration=text)
for layer in linear_layers(ours):
    stored = theirs.get_submodule(layer.name).quantized_weight
    expected = method.quantize(layer.weight)
    assert (stored.codes.int() - expected.codes.int()).abs().max() <= 1
    torch.testing.assert_close(stored.absmax, expected.absmax, rtol=1e-5, atol=0)
print("The package's smoothed weights are ours: same scales, codes at most one apart.")

# %%
methods = {
    "min-max, static": dict(name="affine", inputs="static"),
    "per token": dict(name="affine", inputs="per_token"),
    "smoothed, per token": dict(name="smoothquant", inputs="per_token"),
}
whole = dict(n_bits=8, group_size="row", symmetric=True)
made = {}
for name, (model, _) in models.items():
    made[name] = {"float": (model, 8 * next(model.parameters()).element_size())}
    for label, settings in methods.items():
        settings = (whole if settings["name"] == "affine" else {}) | settings
        quantized = copy.deepcopy(model)
        report = quantize_model(
            quantized, get_method(**settings), calibration=calibration[name]
        )
        made[name][label] = quantized, report.bits_per_weight

# %%
print("model, method                         bits/weight  perplexity  ms a token")
for name, variants in made.items():
    prompt = evaluation_tokens(models[name].tokenizer, 32)
    steps = profile.pick(quick=8, cpu=8, gpu=32)
    for label, (model, bits) in variants.items():
        ppl = perplexity(model, evaluation[name], window=window[name]).perplexity
        ms = time_per_token(model, prompt, new_tokens=steps).median
        print(f"{name + ', ' + label:37} {bits:11.3f} {ppl:11.2f} {ms:11.1f}")
        part = label.replace(", ", "_").replace(" ", "_").replace("-", "")
        key = f"dynamic_range.{name}.int8.{part}"
        tolerance, by = max(0.05, 0.1 * ppl), protocol[name]
        record(f"{key}.perplexity", ppl, "", tolerance, model=name, **by)
        record(f"{key}.bits_per_weight", bits, "bits", 1e-6, model=name)
        record(f"{key}.ms_per_token", ms, "ms", model=name)

# %% [markdown]
# The bytes are the same but for the scales: eight bits, and one scale a row. A static range adds one number a layer, and saves a pass over the
# inputs. Whether that pass shows in the time, the two rows of `affine` say for this machine (`smoothquant` stores its codes
# in another way, and its time is no measure of the method). Here the integer product is a reference
# that converts codes to floats: hardware with int8 units has a far quicker product, against which the pass weighs more.
#
# ## Limits
#
# - Four short texts are little calibration. Min-max grows with every text it sees; percentiles and entropy settle sooner. What comes
#   after calibration and is larger gets clipped, silently.
# - All grids here are symmetric. Behind a GELU nearly all large values are positive, and half of the codes are wasted: exercise 1.
# - Losses of a few thousandths of a nat on a thousand tokens are noise. The order of two methods that lie so close is not shown by
#   this notebook.
# - SmoothQuant's factors come from the largest values, so a single odd token in the calibration can set them.
# - The KV cache, the embedding and the LM head stay in float here.

# %% [markdown]
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: codes that nobody uses
# *Difficulty 1/5 · 10 minutes · 1 point · no GPU*
#
# The outputs of GELU lie between -0.17 and some large positive value. How many codes of the symmetric 8-bit grid over $[-t, t]$, $t$ the
# largest magnitude, can never occur? (An asymmetric grid, $S = (\max - \min) / 255$, has use for all of its codes.)


# %% tags=["exercise"]
def unused_codes(minimum, maximum, n_bits=8):
    """Codes of the symmetric grid that no value in [minimum, maximum] gets.

    Approach: quantize both ends by q = clamp(round(x / S), -2^(n-1), 2^(n-1) - 1) with
    S = 2 t / (2^n - 1); all codes between theirs are used.
    Example: values in [0, 8] never get a code below 0: 128 of 256 codes.
    Hint: Python's round goes half to even, as torch's does.
    """
    ### BEGIN SOLUTION
    top = 2 ** (n_bits - 1)
    step = 2 * max(-minimum, maximum) / (2**n_bits - 1)
    low, high = (min(max(round(v / step), -top), top - 1) for v in (minimum, maximum))
    return 2**n_bits - (high - low + 1)
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert unused_codes(0.0, 8.0) == 128, "the code of 0 is used"
assert unused_codes(-3.0, 3.0) == 0, "a symmetric range uses all codes"
lost = unused_codes(-0.17, 8.0)
print(f"GELU, [-0.17, 8]: {lost} of 256 codes are never used: nearly one bit")
### BEGIN HIDDEN TESTS
assert lost == 125
assert unused_codes(-8.0, 0.17, 4) == 7
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: a histogram that grows
# *Difficulty 2/5 · 15 minutes · 2 points · no GPU*
#
# An observer of a stream does not know the largest value in advance. Production observers keep bins of a fixed number and *double* their width
# when a larger value arrives. Write the doubling, and the update that uses it.


# %% tags=["exercise"]
def update_histogram(counts, width, x):
    """(counts, width) after the values `x` >= 0; `counts` `[bins]`, bins even.

    Approach: while the largest value is not below bins * width, merge neighbours: bin k
    of the new histogram is the sum of bins 2k and 2k + 1, the upper half becomes empty,
    and the width doubles. Then add the counts of x.
    Example: counts [1, 2, 3, 4], width 1.0, x = [5.0]: [3, 7, 1, 0], width 2.0.
    Hint: counts.reshape(-1, 2).sum(1); torch.bincount with minlength.
    """
    ### BEGIN SOLUTION
    while x.max() >= len(counts) * width:
        counts = torch.cat(
            [counts.reshape(-1, 2).sum(1), counts[len(counts) // 2 :] * 0]
        )
        width *= 2
    return counts + torch.bincount((x / width).long(), minlength=len(counts)), width
    ### END SOLUTION


# %% tags=["exercise-tests"]
start = torch.tensor([1, 2, 3, 4])
grown, width_2 = update_histogram(start, 1.0, torch.tensor([5.0]))
assert width_2 == 2.0, "one doubling is enough for 5.0 in four bins"
assert grown.tolist() == [3, 7, 1, 0], "merge neighbours first, then count 5.0"
same, width_1 = update_histogram(start, 1.0, torch.tensor([0.5]))
assert same.tolist() == [2, 2, 3, 4] and width_1 == 1.0, "do not grow without need"
### BEGIN HIDDEN TESTS
stream = torch.rand(5000, generator=torch.Generator().manual_seed(2)) * 37
pieces, width_p = torch.zeros(64, dtype=torch.int64), 1 / 64
for piece in stream.split(700):
    pieces, width_p = update_histogram(pieces, width_p, piece)
at_once, width_a = update_histogram(torch.zeros(64, dtype=torch.int64), 1 / 64, stream)
assert width_p == width_a == 1.0 and torch.equal(pieces, at_once)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: the best clip, from theory
# *Difficulty 3/5 · 20 minutes · 3 points · no GPU*
#
# For a Laplace distribution with density $\frac{1}{2} e^{-|x|}$ both parts of the error can be written down. Clipping at $t$ costs
# $2 e^{-t}$ (integrate $(x - t)^2$ over the tail, twice), rounding about $S^2 / 12$ with $S = 2t / (2^n - 1)$. Find the $t$ with the least sum.


# %% tags=["exercise"]
def laplace_clip(n_bits):
    """The clip t > 0 that minimises 2 exp(-t) + t^2 / (3 (2^n_bits - 1)^2).

    Approach: the derivative is zero where exp(-t) = t / (3 (2^n - 1)^2). The left side
    falls and the right side grows, so there is one solution: halve an interval.
    Example: at 4 bits the clip is near 4.9.
    Hint: start from [0, 40] and halve 60 times.
    """
    ### BEGIN SOLUTION
    low, high = 0.0, 40.0
    for _ in range(60):
        t = (low + high) / 2
        if torch.tensor(-t).exp() > t / (3 * (2**n_bits - 1) ** 2):
            low = t
        else:
            high = t
    return t
    ### END SOLUTION


# %% tags=["exercise-tests"]
for n_bits in (3, 4, 8):
    print(f"{n_bits} bits: the best clip is {laplace_clip(n_bits):.2f}")
assert 4.85 < laplace_clip(4) < 5.0, "is the factor 3 (2^n - 1)^2 = 675 at 4 bits?"
assert laplace_clip(8) > laplace_clip(4), "more bits let the clip move outward"
### BEGIN HIDDEN TESTS
t = laplace_clip(6)
assert abs(float(torch.tensor(-t).exp()) - t / (3 * 63**2)) < 1e-6
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: an alpha for one layer
# *Difficulty 3/5 · 20 minutes · 3 points · no GPU*
#
# The paper takes one $\alpha$ for a whole model. Choose it for one layer instead, by the error of the layer's output with 8-bit inputs
# (one scale for the tensor) and 8-bit weights (one a row).


# %% tags=["exercise"]
def best_alpha(x, W, alphas):
    """(alpha, error) with the least relative error of `x` `[tokens, in]` times `W`.

    Approach: for each alpha, smooth x and W, round x / s with S = max|x / s| / 127 and
    the rows of W * s with their own max / 127, multiply, and compare with x @ W.T.
    Example: where all features are alike, every alpha gives about the same error.
    Hint: smoothing_factors(x_max, w_max, alpha), imported in the opening.
    """
    ### BEGIN SOLUTION
    y, found = x @ W.T, []
    for alpha in alphas:
        s = smoothing_factors(x.abs().amax(0), W.abs().amax(0), alpha)
        x_s, W_s = x / s, W * s
        x_step, W_step = x_s.abs().max() / 127, W_s.abs().amax(1, keepdim=True) / 127
        product = (x_s / x_step).round() * x_step @ ((W_s / W_step).round() * W_step).T
        found.append(((y - product).square().sum() / y.square().sum()).item())
    least = min(found)
    return alphas[found.index(least)], least
    ### END SOLUTION


# %% tags=["exercise-tests"]
draw = torch.Generator().manual_seed(0)
features = torch.randn(64, 256, generator=draw)  # [tokens, in]
features[:, [7, 99]] *= torch.tensor([30.0, 80.0])  # two outlier features
weight = torch.randn(128, 256, generator=draw) / 16  # [out, in]
choice, least = best_alpha(features, weight, [0.0, 0.25, 0.5, 0.75, 1.0])
at_zero = best_alpha(features, weight, [0.0])[1]
print(f"alpha {choice}: error {least:.1e}; alpha 0: {at_zero:.1e}")
assert least < at_zero / 10, "is x divided by s and W multiplied by it?"
assert choice > 0, "alpha 0 looks at the weights only"
### BEGIN HIDDEN TESTS
even = torch.randn(64, 256, generator=draw)
errors = [best_alpha(even, weight, [a])[1] for a in (0.0, 0.5, 1.0)]
assert max(errors) < 3 * min(errors)
assert choice in (0.5, 0.75)
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - S. Migacz, *8-bit Inference with TensorRT*, NVIDIA, GPU Technology Conference 2017, talk S7310
#   [@migacz2017calibration].
# - B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam, D. Kalenichenko, *Quantization and Training of
#   Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR 2018, arXiv 1712.05877 [@jacob2017integer].
# - G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth, S. Han, *SmoothQuant: Accurate and Efficient Post-Training
#   Quantization for Large Language Models*, ICML 2023, arXiv 2211.10438 [@xiao2022smoothquant].
# - M. Sun, X. Chen, J. Z. Kolter, Z. Liu, *Massive Activations in Large Language Models*, COLM 2024,
#   arXiv 2402.17762 [@sun2024massive].
# - The models: course-lm (trained by this project, see its model card), SmolLM2 [@allal2025smollm2], GPT-2
#   [@radford2019gpt2].
#
# ## Next
#
# `mixed_precision`: which layers need how many bits.

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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/dynamic_range.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/foundations/dynamic_range.ipynb)
#
# # Dynamic range: which values get a code of their own
#
# *Large Model Quantization: a deep dive. Foundations, ranges and observers.*

# %% [markdown]
# A grid of 256 codes can be fine and narrow, or coarse and wide. This notebook is about choosing. When you have
# worked through it you will be able to
#
# - split a quantization error into rounding and clipping, and find the clip that makes their sum least;
# - build the five observers that production tools offer, and say what each of them assumes;
# - measure what a clip costs a language model, and find the layers that pay;
# - choose between one range for all tokens and one for each;
# - give the rows of a weight their ranges, by an error that agrees with the model's loss.
#
# It takes about 50 minutes to read and work. You need to know what a scale is (`linear_mapping`). The companion `smoothing`
# makes ranges easier to choose. No profile needs a GPU; `quick` runs in half a minute, `cpu` in a few minutes.

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
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import (
    compare_all,
    continuations,
    difference,
    format_difference,
    prompt_of,
)
from course_utils.evaluation.estimate import with_error
from course_utils.grids import observers
from course_utils.models import linear_layers, load_model

# %%
from course_utils.plotting import clips_on_histogram, error_against_clip, table
from course_utils.plotting.diagrams import activation_heatmap, grids_on_a_line
from course_utils.plotting.diagrams.tokens import codes_of_tokens
from course_utils.plotting.nats import nats_by_variant
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
# A grid of $n$ bits has $2^{n}$ codes, and somebody has to say which stretch of the real line they cover. Here
# the grid is symmetric, so that stretch is $[-t, t]$, and one number decides all: the **clip** $t$.
#
# $$ S = \frac{2t}{2^n - 1}, \qquad q = \mathrm{clamp}\!\left(\mathrm{round}(x / S),\ -2^{n-1},\ 2^{n-1} - 1\right),
# \qquad \hat x = S q. $$
#
# This is the convention of *half codes* ("A surprise" in `linear_mapping`): all codes are used, and $t$ itself comes back half a step short. The other convention, $S = t / 127$, is that of `smoothing`.
#
# Weights are known when the model is quantized, so their range can be measured. **Activations**, the inputs of the layers,
# arrive later. Either their range is **dynamic**, measured anew for every token, or it is
# **static**: an **observer** watches the activations of some text, the **calibration** text, and its $t$ is stored.
#
# A value inside the range is *rounded*, with a mean squared error near $S^2/12$, which grows with
# $t^2$. A value outside is *clipped*, and loses all that sticks out. The objective is the sum,
# $\mathrm{MSE}(t) = \mathrm{E}\,(x - \hat x)^2$. Whether *that* is what to minimise, the model will say.
#
# ## By hand: one outlier among eight values
#
# Take three bits, so codes -4 to 3, and a number that lies far from the others: 14.

# %%
x = torch.tensor([0.4, -1.2, 2.6, -0.3, 1.1, 0.9, -2.1, 14.0])
grids = {f"t = {t}": (t / 3.5, 0, -4, 3) for t in (14.0, 3.5)}
figure = grids_on_a_line(grids, x[[6, 3, 4, 2, 7]], watched=14.0)
plt.show()

# %% [markdown]
# *Figure: two grids of three bits on one number line, for clips of 14 and 3.5. Arrows go from five of the eight values to their codes; where they are orange, values share a code.*
#
# With $t = 14$ the step is 4: -0.3 and 1.1 share the code 0, and the outlier comes back as 12. With $t = 3.5$ the step is 1, the small values spread, and 14 comes back as 3.


# %%
def round_trip(x, clip, n_bits=8):
    """x on the symmetric grid of n_bits over [-clip, clip]; clip broadcasts."""
    top = 2 ** (n_bits - 1)
    step = 2 * clip / (2**n_bits - 1)
    codes = (x.float() / step).round().clamp(-top, top - 1)
    return (codes * step).to(x.dtype)


# %%
rows = []
for clip in (14.0, 7.0, 3.5):
    errors = (x - round_trip(x, clip, n_bits=3)).square()
    row = {"clip t": clip, "step S": clip / 3.5}
    row |= {"seven values": errors[:7].sum().item(), "the outlier": errors[7].item()}
    rows.append(row | {"sum": errors.sum().item()})
table(rows, dict.fromkeys(list(rows[0])[2:], ".2f"))

# %% [markdown]
# The columns hold squared errors. The narrow clip makes the seven 19 times better, and the outlier 30 times worse; the sum says: keep 14. With a hundred ordinary values for each outlier it
# would say: clip. So the right clip is a matter of *how many* values lie where: of the distribution.
#
# ## What the tail decides
#
# We draw from a normal distribution, and from one with **heavy tails**, where far values are more frequent (Student's t with three degrees of freedom). Both are scaled to a standard deviation of 1.


# %%
def error_parts(x, clips, n_bits):
    """Mean squared error by rounding and by clipping `[clips]`, for each clip."""
    rounding, clipping = [], []
    for clip in clips:
        errors, outside = (x - round_trip(x, clip, n_bits)).square(), x.abs() > clip
        rounding.append((errors * ~outside).mean())
        clipping.append((errors * outside).mean())
    return torch.stack(rounding), torch.stack(clipping)


# %%
normal = torch.randn(3, 40_000, generator=generator)
chi = torch.randn(3, 40_000, generator=generator).square().sum(0)
draws = {"normal": normal[0], "heavy tails": normal[1] / chi.sqrt()}
draws = {name: draw / draw.std() for name, draw in draws.items()}
candidates = torch.logspace(-0.5, 1.5, 60)

# %%
panels, rows = {}, []
for name, draw in draws.items():
    rows.append({"values": name, "largest |x|": draw.abs().max().item()})
    for n_bits in (3, 4, 6, 8):
        parts = error_parts(draw, candidates, n_bits)
        rows[-1][f"best t, {n_bits} bits"] = candidates[sum(parts).argmin()].item()
        if n_bits == 4:
            panels[f"{name}, 4 bits"] = candidates, *parts
figure = error_against_clip(panels)
plt.show()
table(rows, dict.fromkeys(list(rows[0])[1:], ".1f"))

# %% tags=["folded"]
# Record the best clips.
for row in rows:
    key = f"dynamic_range.draw.{row['values'].replace(' ', '_')}"
    record(f"{key}.largest", row["largest |x|"], "", 0.1)
    for n_bits in (3, 4, 8):
        record(f"{key}.clip{n_bits}", row[f"best t, {n_bits} bits"], "", 0.5)

# %% [markdown]
# *Figure: mean squared error at 4 bits against the clip, for normal and heavy-tailed values, both axes
# logarithmic. The part of rounding rises, that of clipping falls, and the sum has a minimum, marked by a dot.*
#
# The best clip lies inside the range. At 4 bits, in the recorded run, it is {{dynamic_range.draw.normal.clip4:.1f}} where the largest normal value is {{dynamic_range.draw.normal.largest:.1f}}, and {{dynamic_range.draw.heavy_tails.clip4:.1f}} of {{dynamic_range.draw.heavy_tails.largest:.1f}} with heavy tails. It moves
# outward with the bits, to {{dynamic_range.draw.normal.clip8:.1f}} and {{dynamic_range.draw.heavy_tails.clip8:.1f}} at 8: steps that are small anyway can be spent on the tail.
#
# ## Real weights, real activations
#
# We keep the inputs of every linear layer over 16 short calibration texts. How heavy are their tails? The first measure is the largest value in standard deviations $\sigma$; among a million normal
# values it is about five. The second is the **kurtosis**, the mean of $((x - \mu) / \sigma)^4$, which is 3 for a normal distribution.


# %%
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
models, inputs = profile.load_models(), {}
for name, (model, tokenizer) in models.items():
    sequences = calibration_tokens(tokenizer, 16, 64, seed=profile.seed)
    inputs[name] = layer_inputs(model, sequences)


# %%
def tail(x):
    """Largest |x| in standard deviations, and kurtosis."""
    z = (x.float() - x.float().mean()) / x.float().std()
    return z.abs().max().item(), z.pow(4).mean().item()


# %%
rows, heaviest = [], {}  # layer names, heaviest tail first
for name, (model, _) in models.items():
    layers = {layer.name: layer for layer in linear_layers(model)}
    for what in ("weights", "inputs"):
        of = {k: layers[k].weight if what == "weights" else torch.cat(inputs[name][k])
              for k in layers}  # fmt: skip
        found = {k: tail(values) for k, values in of.items()}
        heaviest[name] = sorted(found, key=lambda k: -found[k][0])
        sigmas, kurtosis = torch.tensor(list(found.values())).median(0).values.tolist()
        row = {"model": name, "what": what, "median layer: max / σ": sigmas}
        top = heaviest[name][0]
        row |= {"kurtosis": kurtosis, "heaviest layer: max / σ": found[top][0]}
        rows.append(row | {"which": top.split(".", 1)[1]})
table(rows, dict.fromkeys([k for k in rows[0] if "σ" in k or k == "kurtosis"], ".1f"))

# %% tags=["folded"]
# Record the tails of inputs and weights.
for row in rows:
    key = f"dynamic_range.{row['model']}.tail.{row['what']}"
    for part in ("median", "heaviest"):
        sigmas = row[f"{part} layer: max / σ"]
        record(f"{key}.{part}", sigmas, "", 0.1 * sigmas, model=row["model"])

# %% [markdown]
# Inputs have heavier tails than weights. On SmolLM2, in the recorded run, the largest input of one layer lies {{dynamic_range.smollm2-135m-q4_1.tail.inputs.heaviest:.0f}} standard deviations out, and that of the median layer {{dynamic_range.smollm2-135m-q4_1.tail.inputs.median:.0f}}. Keep that one layer
# in mind. We look at some of its tokens and features.

# %%
name, (model, tokenizer) = list(models.items())[-1]
peak = heaviest[name][0]
batches = [x.float().cpu() for x in inputs[name][peak]]  # 16 of [64 tokens, in]
together = torch.cat(batches)
far = together.abs().amax(0).argsort(descending=True)[:2]  # features
others = torch.arange(0, together.shape[1], together.shape[1] // 38)
chosen = torch.cat([others, far]).unique()  # in order, [features]
marked = [i for i, j in enumerate(chosen.tolist()) if j in far.tolist()]
figure = activation_heatmap(together[:140, chosen], marked)
plt.show()
print(f"{name}, {peak}: the marked features are {sorted(far.tolist())}")

# %% [markdown]
# *Figure: heatmap of |x| on a logarithmic colour scale, 140 tokens down, and across the two features with the largest values, marked, among some forty others.*
#
# On SmolLM2 the first token of each text (rows 0, 64 and 128) holds values about a thousand times larger than the rest, in two features. Such **massive activations** occur in many language models [@sun2024massive]. course-lm, the
# only model of the profile `quick`, has none.
#
# ## Five observers
#
# Each looks at the batches of one layer, and says a clip. **Min-max** takes the largest magnitude: nothing is clipped, and it assumes that no value is an accident. **Moving average** starts with the extremes of the first batch, and moves towards those of
# each later one by a constant $c$, $m \leftarrow m + c\,(m_\text{new} - m)$, so that one odd batch cannot stretch the range for good. Jacob et al. use it in training [@jacob2017integer].


# %%
def minmax_clip(batches):
    return torch.stack([x.abs().max() for x in batches]).max()


def moving_average_clip(batches, constant=0.01):
    low, high = batches[0].aminmax()
    for x in batches[1:]:
        low, high = low + constant * (x.min() - low), high + constant * (x.max() - high)
    return torch.maximum(-low, high)


# %%
clips = {"minmax": minmax_clip(batches), "moving_average": moving_average_clip(batches)}
largest = [x.abs().max().item() for x in batches]
print(f"largest of each batch: from {min(largest):.2f} to {max(largest):.2f};", end=" ")
print(f"the first: {largest[0]:.2f}")
print({name: round(clip.item(), 2) for name, clip in clips.items()})
for n in (4, 16, 460):
    print(f"after {n} batches the first weighs {(1 - 0.01) ** (n - 1):.0%}")

# %% [markdown]
# The last three lines are a warning. With PyTorch's constant of 0.01, an average over a handful of batches *is* the first batch, and 16 hardly change that. It is made for the thousands of batches of training. Below, read "moving average" as "first batch".
#
# **Percentile** keeps a share of the values, whatever their size: it assumes that the rarest do not matter. **MSE** tries clips, and takes the one with the least mean squared error: the objective above, by search.


# %%
def percentile_clip(values, percentile=99.99):
    beyond = int(len(values) * (1 - percentile / 100))  # values that may lie outside
    return values.topk(beyond + 1).values[-1]


def mean_squared_error(values, clip, n_bits=8):
    return (values - round_trip(values, clip, n_bits)).square().mean()


def mse_clip(values, n_bits=8, candidates=100):
    clips = values.max() * torch.logspace(0, -3, candidates)
    errors = torch.stack([mean_squared_error(values, t, n_bits) for t in clips])
    return clips[errors.argmin()]


# %%
values = together.flatten().abs()
clips["percentile"], clips["mse"] = percentile_clip(values), mse_clip(values)
outside = int((values > clips["percentile"]).sum())
print(f"percentile: {outside} of {len(values):,} values are clipped")
print({name: round(clip.item(), 2) for name, clip in clips.items()})

# %% [markdown]
# The two disagree where there are massive values: one cuts them off as rare, the other keeps them, since their squares outweigh all else.
#
# **Entropy**, as NVIDIA described it for TensorRT [@migacz2017calibration], compares distributions instead of values. Count $|x|$ in 2048 bins. For each
# number of bins $i$ from 128 to 2048:
#
# - $P$ is the first $i$ bins, with all that lies beyond added to the last of them, as clipping does;
# - $Q$ is the first $i$ bins merged into 128 levels (7 bits and a sign make 8), and spread out again evenly over the bins
#   that were not empty;
# - the loss is $\mathrm{KL}(P \,\|\, Q) = \sum_k P_k \ln (P_k / Q_k)$, the information lost when $Q$ stands for $P$.
#
# The $i$ with the least loss is the clip. It assumes that a value matters by how often it occurs. Two details are not on the slides. Bin 0 counts as bin 1, since zero is exact on every grid. And an $i$
# that keeps a *single* occupied bin is out while values lie beyond: one bin always agrees with itself.


# %%
def divergence(counts, i, levels=128):
    """KL(P || Q) if the first i of the bins `counts` are kept, on `levels` levels."""
    kept = counts[:i]
    P = torch.cat([kept[:-1], counts[i - 1 :].sum()[None]])
    level, filled = torch.arange(i) * levels // i, (kept > 0).double()
    nothing = torch.zeros(levels, dtype=kept.dtype)
    mass, bins = (nothing.index_add(0, level, v) for v in (kept, filled))
    Q = filled * (mass / bins.clamp(min=1))[level]
    P, Q = P / P.sum(), Q / Q.sum()
    if filled.sum() == 1 and counts[i:].sum() > 0:
        return torch.tensor(torch.inf, dtype=torch.float64)
    return torch.where(P > 0, P * (P / Q).log(), 0.0).sum()


# %%
def entropy_bins(values, bins=2048):
    """(counts, best i) of the values' histogram."""
    counts = torch.histc(values, bins, min=0, max=values.max().item()).double()
    counts[0] = counts[1]
    losses = torch.stack([divergence(counts, i) for i in range(128, bins + 1)])
    losses = losses.nan_to_num(nan=torch.inf)  # nothing kept at all
    return counts, bins - losses.flip(0).argmin().item()  # the largest of equals


# %%
counts, kept = entropy_bins(values)
clips["entropy"] = kept / len(counts) * values.max()
rows = []
for rule, clip in clips.items():
    row = {"observer": rule, "clip": clip.item(), "clipped": int((values > clip).sum())}
    error = mean_squared_error(values, clip) / values.square().mean()
    rows.append(row | {"relative squared error of x": error.item()})
table(rows, {"clip": ".2f", "relative squared error of x": ".1e"})

# %%
first = next(iter(models))
plain = torch.cat(inputs[first][heaviest[first][0]]).float().flatten().abs().cpu()
simple = {"minmax": plain.max(), "percentile": percentile_clip(plain)}
simple["mse"] = mse_clip(plain)
panels = {f"{first}, {heaviest[first][0]}": (plain, simple)}
panels[f"{name}, {peak}"] = values, clips
for title, (sizes, of_rule) in panels.items():
    panels[title] = sizes, {rule: float(clip) for rule, clip in of_rule.items()}
figure = clips_on_histogram(panels)
plt.show()

# %% [markdown]
# *Figure: for each model the histogram of |x| at the input of the layer with the heaviest tail, both axes logarithmic, with a
# line at each observer's clip. On a first model that is not the last, only three clips are drawn.*
#
# The cliff at 0.17 in course-lm's histogram is no outlier. The layer reads the outputs of GELU, whose least value is -0.17. Below 0.17 both signs count, above it only positive values: half of a symmetric grid is nearly unused (exercise 1).
#
# On SmolLM2 the clips lie up to a factor of several hundred apart: percentile cuts off all massive values, entropy the largest of them, min-max and MSE none. Squares weigh a single far value heavily; percentile and entropy hardly see it. No histogram tells which of them is right.
#
# Are they computed right? The package's observers read a stream and hold a histogram that grows; PyTorch has the first two.

# %% tags=["folded"]
# Against the package's observers, and PyTorch's.
for rule, clip in clips.items():
    observer = observers.OBSERVERS[rule](symmetric=True)
    for x in batches:
        observer.update(x)
    theirs = observer.range()[1]
    print(f"{rule:15} ours {clip:10.3f}, package {theirs:10.3f}")
    if rule in ("minmax", "moving_average"):
        torch.testing.assert_close(theirs, clip, rtol=1e-6, atol=0)
    elif rule == "percentile":
        assert abs(theirs - clip) <= values.max() / 2**12  # an edge of a bin
assert observers.entropy_clip(counts) == kept
try:
    from torch.ao.quantization import observer as torch_observers
except ImportError:
    print("This PyTorch has no observers any more: this comparison is left out.")
else:
    for rule in ("MinMaxObserver", "MovingAverageMinMaxObserver"):
        of = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
        theirs = getattr(torch_observers, rule)(**of)
        for x in batches:
            theirs(x)
        ours = clips["minmax" if rule == "MinMaxObserver" else "moving_average"]
        scale = theirs.calculate_qparams()[0][0]
        torch.testing.assert_close(scale, 2 * ours / 255, rtol=1e-6, atol=0)
        print(f"{rule}: PyTorch's scale is ours, {scale.item():.6f}")

# %% [markdown]
# Min-max, moving average and entropy are the same number, and PyTorch's scales are ours. Percentile and MSE differ by the width of a bin at most.
#
# ## What a clip costs the model
#
# Now the real loss. Each observer gives each layer one clip. Then every linear layer's input is rounded
# to its grid, and weights stay in float. This is a simulation: the values lie on
# the grid, but are held in floats.


# %%
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
def static_clips(inputs, rule, n_bits=8):
    """Clip by layer name; layers that share their input share the clip."""
    options = {"n_bits": n_bits} if rule in ("mse", "entropy") else {}
    shared, clips = {}, {}
    for layer, batches in inputs.items():
        key = batches[0].data_ptr()
        if key not in shared:
            observer = observers.OBSERVERS[rule](symmetric=True, **options)
            observer.update(torch.cat(batches))
            shared[key] = observer.range()[1].to(batches[0].device)
        clips[layer] = shared[key]
    return clips


def token_clips(layer, x):
    """A range for each token: its largest |x| `[..., 1]`."""
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-8)


# %% [markdown]
# We leave out the moving average, which is the first batch here. `nats lost` is the rise of the mean of $-\log p$ of the token that came, a **nat** being its unit. Losses are paired with the float model on the same tokens; ± is one standard error over documents. We
# add ranges for each token, $t_i = \max_j |x_{ij}|$, measured while the model runs.


# %%
def protocol(name):
    """The course's tokens; 1,024 of them for a model that is slow on a CPU."""
    whole = profile.protocol(models[name].model)
    return whole if name == "course-lm" else replace(whole, tokens=1024)


def by_layer(clips):
    return lambda layer, x: clips[layer]


# %%
RULES = ("minmax", "percentile", "mse", "entropy")
texts = {n: protocol(n).text(tokenizer) for n, (_, tokenizer) in models.items()}
bits_of = {n: (8, 5) if n == "course-lm" else (8,) for n in models}
static = {(n, rule, b): static_clips(inputs[n], rule, b)
          for n in models for b in bits_of[n] for rule in RULES}  # fmt: skip

# %%
measured = {}
for n, (model, _) in models.items():
    variants = {}
    for b in bits_of[n]:
        variants |= {(rule, b): Rounded(model, by_layer(static[n, rule, b]), b)
                     for rule in RULES}  # fmt: skip
        variants["per token", b] = Rounded(model, token_clips, b)
    measured[n] = compare_all(variants, model, texts[n])

# %%
rows = []
for n, found in measured.items():
    for b in bits_of[n]:
        losses = {rule: found[rule, b].loss for rule in (*RULES, "per token")}
        row = {rule: with_error(e.value, e.error, "+") for rule, e in losses.items()}
        rows.append({"nats lost": n, "bits": b, **row})
table(rows)

# %% tags=["folded"]
# Record the table, and paired differences.
for n, found in measured.items():
    by = {"model": n, **protocol(n).fields}
    for (rule, b), c in found.items():
        kind = f"static{b}.{rule}" if rule in RULES else f"per_token{b}"
        tolerance = max(0.02, 0.2 * abs(c.loss.value))
        record(f"dynamic_range.{n}.{kind}.loss", c.loss.value, "nats", tolerance, **by)
        record(f"dynamic_range.{n}.{kind}.loss_error", c.loss.error, "nats", None, **by)
    ppl = next(iter(found.values())).reference.perplexity
    record(f"dynamic_range.{n}.float.perplexity", ppl, "", 0.05, **by)
    for rule in ("mse", "minmax"):
        less = difference(found["per token", 8], found[rule, 8])
        key = f"dynamic_range.{n}.per_token_less_{rule}"
        record(key, less.value, "nats", 0.2, **by)
        record(f"{key}_error", less.error, "nats", None, **by)
        print(f"{n}, 8 bits, per token less {rule}: {format_difference(less)}")
b = bits_of[first][-1]
less = difference(measured[first]["per token", b], measured[first]["mse", b])
record(f"dynamic_range.{first}.per_token_less_mse_few", less.value, "nats", 0.05)
record(f"dynamic_range.{first}.per_token_less_mse_few_error", less.error, "nats", None)
print(f"{first}, {b} bits, per token less mse: {format_difference(less)}")

# %%
panels = {}
for n, found in measured.items():
    b = bits_of[n][-1]
    losses = {rule: found[rule, b].loss for rule in (*RULES, "per token")}
    panels[f"{n}, {b} bits"] = {rule: (e.value, e.error) for rule, e in losses.items()}
figure = nats_by_variant(panels)
plt.show()

# %% [markdown]
# *Figure: nats lost by each rule, with bars of two standard errors, on course-lm with 5-bit inputs and on SmolLM2 with 8-bit inputs. The dashed line is the float model. The panels have scales of their own.*
#
# **course-lm.** At 8 bits no rule loses more than a hundredth of a nat. At 5 bits the rule decides: in the recorded run min-max loses {{dynamic_range.course-lm.static5.minmax.loss:.2f}} ± {{dynamic_range.course-lm.static5.minmax.loss_error:.2f}} nats, MSE {{dynamic_range.course-lm.static5.mse.loss:.3f}} ± {{dynamic_range.course-lm.static5.mse.loss_error:.3f}}, and a range for each token
# {{dynamic_range.course-lm.per_token5.loss:.3f}} ± {{dynamic_range.course-lm.per_token5.loss_error:.3f}}; the last two are {{dynamic_range.course-lm.per_token_less_mse_few:+.3f}} ± {{dynamic_range.course-lm.per_token_less_mse_few_error:.3f}} apart. Without far values the squared error is a good guide, and entropy, made for 8 bits, cuts off too much.
#
# **SmolLM2.** Every static rule fails at 8 bits. Min-max loses {{dynamic_range.smollm2-135m-q4_1.static8.minmax.loss:.2f}} ± {{dynamic_range.smollm2-135m-q4_1.static8.minmax.loss_error:.2f}} nats and entropy {{dynamic_range.smollm2-135m-q4_1.static8.entropy.loss:.1f}} ± {{dynamic_range.smollm2-135m-q4_1.static8.entropy.loss_error:.1f}}. Per token it is {{dynamic_range.smollm2-135m-q4_1.per_token8.loss:.3f}} ±
# {{dynamic_range.smollm2-135m-q4_1.per_token8.loss_error:.3f}}. Why?
#
# ## The layers that pay
#
# Is it the layer with the heaviest tail? We keep min-max ranges everywhere and **restore that layer alone**: its input stays in float. Then the heaviest 8 and 16, and as a control the 16 with the lightest tails.

# %%
order = heaviest[name]
kept_float = {"none": []} | {f"heaviest {k}": order[:k] for k in (1, 8, 16)}
kept_float["lightest 16"] = order[-16:]  # the control


def sparing(clips, layers):
    return lambda layer, x: None if layer in layers else clips[layer]


# %%
clips_8 = static[name, "minmax", 8]
variants = {label: Rounded(models[name].model, sparing(clips_8, layers))
            for label, layers in kept_float.items() if layers}  # fmt: skip
spared = {"none": measured[name]["minmax", 8]}
spared |= compare_all(variants, models[name].model, texts[name])

# %%
rows = []
for label, c in spared.items():
    less = difference(c, spared["none"])
    row = {"left in float": label}
    row["nats lost"] = with_error(c.loss.value, c.loss.error, "+")
    row["change"] = with_error(less.value, less.error, "+") if label != "none" else ""
    rows.append(row | {"same top token": f"{c.agreement.value:.0%}"})
table(rows)

# %% tags=["folded"]
# Record what was restored.
for label, c in spared.items():
    key = f"dynamic_range.{name}.spared.{label.replace(' ', '_')}"
    less, by = difference(c, spared["none"]), {"model": name, **protocol(name).fields}
    tolerance = max(0.02, 0.2 * abs(c.loss.value))
    record(f"{key}.loss", c.loss.value, "nats", tolerance, **by)
    record(f"{key}.loss_error", c.loss.error, "nats", None, **by)
    record(f"{key}.change", less.value, "nats", None, **by)
    record(f"{key}.change_error", less.error, "nats", None, **by)

# %% [markdown]
# On SmolLM2, in the recorded run, restoring the heaviest of 210 layers alone changes the loss by {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_1.change:+.2f}} ± {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_1.change_error:.2f}} nats, to {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_1.loss:.2f}} ± {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_1.loss_error:.2f}}. No other layer's range was touched, so this much is its own. But most of the loss is elsewhere: with 8 layers restored {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_8.loss:.2f}} ± {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_8.loss_error:.2f}} is left, with 16 {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_16.loss:.3f}} ± {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_16.loss_error:.3f}}.
# The 16 lightest change it by {{dynamic_range.smollm2-135m-q4_1.spared.lightest_16.change:+.3f}} ± {{dynamic_range.smollm2-135m-q4_1.spared.lightest_16.change_error:.3f}}. So it is the tails that cost, in about one layer of thirteen, and not a single layer.
#
# What happens inside? We look at the codes of a few tokens in the heaviest layer, the first of a text and three others.

# %%
t = clips_8[peak].cpu()
usual = together[1:4].abs().mean(0).argsort(descending=True)
usual = usual[~torch.isin(usual, far)][:3]
few = together[:4][:, torch.cat([far, usual])]  # [4 tokens, 5 features]
step = 2 * t / 255
per_token = 2 * together[:4].abs().amax(1, keepdim=True) / 255
codes = {f"codes, one step of {step:.3g}": few / step}
codes["codes, a step a token"] = few / per_token
codes = {title: q.round().clamp(-128, 127) for title, q in codes.items()}
figure = codes_of_tokens(few, codes)
plt.show()

# %% [markdown]
# *Figure: four tokens down, five features across: their values, their 8-bit codes with one min-max range, and those with a range for each token. Red is positive, blue negative, white zero.*
#
# On SmolLM2 the massive value of the first token makes the step so wide that the others get nothing but zeros. How common is that fate? We call a token **far** if it holds a value ten times beyond the median token's largest.

# %%
largest = together.abs().amax(1)
is_far = largest > 10 * largest.median()
rows = [{"observer": "per token", "clip": None}]
of_rule = {rule: static[name, rule, 8][peak].item() for rule in RULES}
rows += [{"observer": rule, "clip": clip} for rule, clip in of_rule.items()]
for row in rows:
    t = row["clip"] or token_clips(peak, together)
    back = round_trip(together, t)
    lost, size = (together - back).square().sum(1), together.square().sum(1)
    row["error, all tokens"] = (lost.sum() / size.sum()).item()
    row["error, others"] = (lost[~is_far].sum() / size[~is_far].sum()).item()
    row["zeros, others"] = (back[~is_far] == 0).float().mean().item()
print(f"{name}, {peak}: {int(is_far.sum())} of {len(together)} tokens are far")
errors = dict.fromkeys(list(rows[0])[2:4], ".1e")
table(rows, {"clip": ".2f", **errors, "zeros, others": ".1%"})

# %% tags=["folded"]
# Record min-max in that layer.
of_minmax = rows[1]
columns = {"all": "error, all tokens", "others": "error, others"}
for part, column in (columns | {"zeros": "zeros, others"}).items():
    key = f"dynamic_range.{name}.peak.minmax.{part}"
    record(key, of_minmax[column], "", None, model=name)
record(f"dynamic_range.{name}.peak.far", int(is_far.sum()), "tokens", None, model=name)

# %% [markdown]
# Here error of the tensor and loss of the model part ways. With min-max the squared error of the whole tensor is {{dynamic_range.smollm2-135m-q4_1.peak.minmax.all:.1e}} of its power in the recorded run, a fine number. For all tokens but the {{dynamic_range.smollm2-135m-q4_1.peak.far:.0f}} far ones it is {{dynamic_range.smollm2-135m-q4_1.peak.minmax.others:.0%}}: {{dynamic_range.smollm2-135m-q4_1.peak.minmax.zeros:.0%}} of their values round to zero, and the layer is silent.
# Percentile is the other way round: the others are fine, and the massive values, which the model needs, are gone. **No static clip is right there.** A range for each token is, at a price: a pass over every layer's input before its product can begin.
#
# ## One prompt, several ranges
#
# What do such losses sound like? The same prompt, continued with the likeliest token each time.

# %%
speakers = {"float": models[name].model}
speakers["static min-max, 8 bits"] = Rounded(models[name].model, by_layer(clips_8))
for b in (8, 6, 4):
    speakers[f"per token, {b} bits"] = Rounded(models[name].model, token_clips, b)
print(continuations(speakers, models[name].tokenizer, prompt_of(name), new_tokens=16))

# %% [markdown]
# In the recorded run, on SmolLM2: with a range for each token, 8 bits write the float model's words, and 6 bits write others that make sense. With 4 bits no words are left. The static range of 8 bits writes fluent text too, and it is another one from the start. One text proves nothing; the loss in nats says more.
#
# ## Weights: each row its own search
#
# Weights do not change, so every row can have its own search. We shrink each row's range in steps of 5% and keep the best, by two objectives for a row $w$:
# the error of the weights, $\sum_j (w_j - \hat w_j)^2$, and the same **weighted** by how large feature $j$ of the input is,
# $\sum_j \mathrm{E}(x_j^2)\,(w_j - \hat w_j)^2$. The second is the error of the layer's output if features are uncorrelated.


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


# %%
@torch.no_grad()
def round_weights(model, n_bits, shrink, importance=None):
    """A copy of the model with its weights on grids, and their relative error."""
    model, lost, total = copy.deepcopy(model), 0.0, 0.0
    for layer in linear_layers(model):
        W = layer.weight.float()  # [out, in]
        weigh = 1.0 if importance is None else importance[layer.name]  # [in]
        back = round_trip(W, row_clips(W, n_bits, shrink, weigh), n_bits)
        lost, total = lost + (W - back).square().sum(), total + W.square().sum()
        layer.weight.copy_(back)
    return model, (lost / total).item()


# %% tags=["folded"]
# The clips of some rows are the package's.
some = linear_layers(models[first].model)[0].weight.float()[:50]
ours = row_clips(some, 4, [0.3 ** (i / 39) for i in range(40)])[:, 0]
theirs = observers.mse_range(some, 4, True)[1]
torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
print("50 rows: our clips are the package's")

# %% [markdown]
# They are the same.
#
# SmolLM2's file holds 4-bit codes, and their grid would favour min-max. We take `smollm2-135m-dithered`: the same weights with seeded noise inside each cell of that grid, except in the few columns with the largest inputs (`linear_mapping` measures what the noise costs). It gets 4 bits, and course-lm 3.


# %%
def few_bits(name):
    return 3 if name == "course-lm" else 4


shrink = [1 - 0.05 * i for i in range(12)]
on_weights, weight_errors = {}, {}
for n, (model, _) in models.items():
    squares = {k: torch.cat(x).float().square().mean(0) for k, x in inputs[n].items()}
    rules = {"min-max": ((1.0,), None), "mse": (shrink, None)}
    rules["weighted mse"] = shrink, squares
    if n == "smollm2-135m-q4_1":
        how = {"dtype": profile.dtype, "device": profile.device}
        model = load_model("smollm2-135m-dithered", **how).model
    variants = {}
    for rule, settings in rules.items():
        made = round_weights(model, few_bits(n), *settings)
        variants[rule], weight_errors[n, rule] = made
    on_weights[n] = compare_all(variants, model, texts[n])
    del variants

# %%
rows = []
for n, found in on_weights.items():
    for rule, c in found.items():
        row = {"model": n.replace("q4_1", "dithered"), "rule": rule}
        row |= {"bits": few_bits(n), "error of the weights": weight_errors[n, rule]}
        row["nats lost"] = with_error(c.loss.value, c.loss.error, "+")
        less = difference(c, found["min-max"])
        row["less min-max"] = with_error(less.value, less.error, "+")
        rows.append(row)
table(rows, {"error of the weights": ".4f"})

# %% tags=["folded"]
# Record the table.
for n, found in on_weights.items():
    label = n.replace("q4_1", "dithered")
    b, by = few_bits(n), {"model": label, **protocol(n).fields}
    for rule, c in found.items():
        part = rule.replace(" ", "_").replace("-", "")
        key = f"dynamic_range.{label}.weights{b}_row.{part}"
        tolerance = max(0.03, 0.25 * abs(c.loss.value))
        less = difference(c, found["min-max"])
        record(f"{key}.loss", c.loss.value, "nats", tolerance, **by)
        record(f"{key}.loss_error", c.loss.error, "nats", None, **by)
        record(f"{key}.less_minmax", less.value, "nats", None, **by)
        record(f"{key}.less_minmax_error", less.error, "nats", None, **by)
        record(f"{key}.weight_error", weight_errors[n, rule], "", 0.002, **by)

# %% [markdown]
# On SmolLM2, in the recorded run, the search lowers the error of the weights from {{dynamic_range.smollm2-135m-dithered.weights4_row.minmax.weight_error:.4f}} to {{dynamic_range.smollm2-135m-dithered.weights4_row.mse.weight_error:.4f}}, and *raises* the loss, by {{dynamic_range.smollm2-135m-dithered.weights4_row.mse.less_minmax:+.2f}} ± {{dynamic_range.smollm2-135m-dithered.weights4_row.mse.less_minmax_error:.2f}} nats. A large weight that
# meets a massive input is clipped like any other. The weighted search knows the inputs: it changes the loss by {{dynamic_range.smollm2-135m-dithered.weights4_row.weighted_mse.less_minmax:+.2f}} ± {{dynamic_range.smollm2-135m-dithered.weights4_row.weighted_mse.less_minmax_error:.2f}}, though its weights are less exact. On course-lm the search by the weights nearly halves their error, and changes the loss by {{dynamic_range.course-lm.weights3_row.mse.less_minmax:+.3f}} ± {{dynamic_range.course-lm.weights3_row.mse.less_minmax_error:.3f}}: nothing. The weighted one changes it by {{dynamic_range.course-lm.weights3_row.weighted_mse.less_minmax:+.3f}} ± {{dynamic_range.course-lm.weights3_row.weighted_mse.less_minmax_error:.3f}}. To weigh errors by the inputs is the thought behind
# AWQ and GPTQ, later in the course.
#
# ## What you saw
#
# - **Rounding against clipping.** Their sum is least inside the range: at 4 bits, in the recorded run, at {{dynamic_range.draw.normal.clip4:.1f}} standard deviations for normal values and {{dynamic_range.draw.heavy_tails.clip4:.1f}} for heavy tails.
# - **Five observers.** Each assumes something: that no value is an accident, that the first batch is typical, that the rarest do not matter, that squares do, or that frequency does. On one layer of SmolLM2 their clips lie a factor of several hundred apart.
# - **What a clip costs.** With static min-max ranges at 8 bits SmolLM2 loses {{dynamic_range.smollm2-135m-q4_1.static8.minmax.loss:.2f}} ± {{dynamic_range.smollm2-135m-q4_1.static8.minmax.loss_error:.2f}} nats. Restoring the layer with the heaviest tail alone leaves {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_1.loss:.2f}} ± {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_1.loss_error:.2f}}, the 16 heaviest of 210 {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_16.loss:.3f}} ± {{dynamic_range.smollm2-135m-q4_1.spared.heaviest_16.loss_error:.3f}}.
# - **Static or per token.** At 8 bits a range for each token costs SmolLM2 {{dynamic_range.smollm2-135m-q4_1.per_token8.loss:.3f}} ± {{dynamic_range.smollm2-135m-q4_1.per_token8.loss_error:.3f}} nats. On course-lm at 8 bits both are cheap.
# - **Rows of weights.** Least error of the weights was the wrong objective on SmolLM2 ({{dynamic_range.smollm2-135m-dithered.weights4_row.mse.less_minmax:+.2f}} ± {{dynamic_range.smollm2-135m-dithered.weights4_row.mse.less_minmax_error:.2f}} nats against min-max), and least weighted error the right one ({{dynamic_range.smollm2-135m-dithered.weights4_row.weighted_mse.less_minmax:+.2f}} ± {{dynamic_range.smollm2-135m-dithered.weights4_row.weighted_mse.less_minmax_error:.2f}}).
#
# ## Limits
#
# - Sixteen short texts are little calibration, and one draw of them: the errors over documents do not hold what other texts would change. What comes later and is larger gets clipped, silently.
# - All grids here are symmetric. Behind a GELU that wastes nearly half of the codes (exercise 1).
# - A scale that is measured for each token costs time, which this simulation does not show.
# - The KV cache, the embedding and the LM head stay in float.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: codes that nobody uses
# *Difficulty 1/5 · 10 minutes · 1 point · no GPU*
#
# The outputs of GELU lie between -0.17 and some large positive value. How many codes of the symmetric grid over $[-t, t]$, $t$ the
# largest magnitude, can never occur? (An asymmetric grid has use for all of its codes.)


# %% tags=["exercise"]
def unused_codes(minimum, maximum, n_bits=8):
    """Codes of the symmetric grid that no value in [minimum, maximum] gets.

    Approach: quantize both ends by q = clamp(round(x / S), -2^(n-1), 2^(n-1) - 1) with
    S = 2 t / (2^n - 1); all codes between theirs are used. minimum <= 0, and maximum is
    the largest magnitude, as behind a GELU.
    Example: values in [0, 8] never get a code below 0: 128 of 256 codes.
    Hint: Python's round goes half to even, as torch's does.
    """
    ### BEGIN SOLUTION
    top = 2 ** (n_bits - 1)
    step = 2 * maximum / (2**n_bits - 1)
    low, high = (min(max(round(v / step), -top), top - 1) for v in (minimum, maximum))
    return 2**n_bits - (high - low + 1)
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert unused_codes(-2.9, 3.0) == 5, "codes -123 to 127 are used: 251 of them"
assert unused_codes(0.0, 8.0) == 128, "codes 0 to 127 are used: clamp, and count the 0"
assert unused_codes(-1.0, 2.0, 3) == 2, "at 3 bits codes -2 to 3 of 8 are used"
lost = unused_codes(-0.17, 8.0)
assert lost == 125, "-0.17 gets the code round(-2.7) = -3: round, do not cut off"
print(f"GELU, [-0.17, 8]: {lost} of 256 codes are never used: nearly one bit")
### BEGIN HIDDEN TESTS
import random

seed = 0  # the teacher's seed
draw = random.Random(seed)
for n_bits in (3, 4, 8):
    low, high = -draw.uniform(0.05, 2), draw.uniform(2, 9)
    many = torch.linspace(low, high, 200_001, dtype=torch.float64)
    step, top = 2 * high / (2**n_bits - 1), 2 ** (n_bits - 1)
    used = (many / step).round().clamp(-top, top - 1).unique()
    found, want = unused_codes(low, high, n_bits), 2**n_bits - len(used)
    assert found == want, f"[{low}, {high}] at {n_bits} bits: {want}, n_bits counts"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: how long the first batch lasts
# *Difficulty 2/5 · 10 minutes · 1 point · no GPU*
#
# A moving average starts at its first batch. How many batches does it take until that one weighs less than a given share?


# %% tags=["exercise"]
def batches_needed(constant, share):
    """The least number of batches after which the first one weighs less than `share`.

    `constant` c and `share` lie in (0, 1). m starts at the first batch's value; each
    later one does m <- m + c (new - m).
    Approach: by what factor does each later batch multiply the first one's weight?
    Example: with c = 0.5 the weights after 1, 2, 3 batches are 1, 0.5, 0.25; for a
    share of 0.3 three batches are needed.
    Hint: a loop will do.
    """
    ### BEGIN SOLUTION
    batches, weight = 1, 1.0
    while weight >= share:
        batches, weight = batches + 1, weight * (1 - constant)
    return batches
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert batches_needed(0.5, 0.3) == 3, "1, 0.5, 0.25: the first batch counts as one"
assert batches_needed(0.5, 0.25) == 4, "less than the share, not equal to it"
assert batches_needed(0.1, 0.5) == 8, "each batch leaves 1 - c of it: 0.9^7 = 0.478"
assert batches_needed(0.01, 0.01) == 460, "460 batches at PyTorch's constant"
### BEGIN HIDDEN TESTS
import random

seed = 0  # the teacher's seed
draw = random.Random(seed)
for _ in range(5):
    c, share = draw.uniform(0.005, 0.4), draw.uniform(0.02, 0.9)
    n = next(n for n in range(1, 2000) if (1 - c) ** (n - 1) < share)
    assert batches_needed(c, share) == n, f"c {c}, share {share}: (1 - c)^(n - 1)"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: a histogram that grows
# *Difficulty 2/5 · 15 minutes · 2 points · no GPU*
#
# An observer of a stream does not know the largest value in advance. The package's keeps a fixed number of bins and *doubles* their width
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
        merged = counts.reshape(-1, 2).sum(1)
        counts = torch.cat([merged, torch.zeros_like(merged)])
        width *= 2
    return counts + torch.bincount((x / width).long(), minlength=len(counts)), width
    ### END SOLUTION


# %% tags=["exercise-tests"]
start = torch.tensor([1, 2, 3, 4])
grown, width = update_histogram(start, 1.0, torch.tensor([5.0]))
assert width == 2.0, "one doubling is enough for 5.0 in four bins"
assert grown.tolist() == [3, 7, 1, 0], "merge neighbours first, then count 5.0"
same, width = update_histogram(start, 1.0, torch.tensor([0.5]))
assert same.tolist() == [2, 2, 3, 4] and width == 1.0, "do not grow without need"
edge, width = update_histogram(start, 1.0, torch.tensor([4.0]))
assert edge.tolist() == [3, 7, 1, 0] and width == 2.0, "4.0 is not below 4 * 1.0: grow"
far, width = update_histogram(start, 1.0, torch.tensor([17.0]))
assert far.tolist() == [10, 0, 1, 0] and width == 8.0, "double until it fits"
assert start.tolist() == [1, 2, 3, 4], "the counts that were given stay as they are"
### BEGIN HIDDEN TESTS
seed = 0  # the teacher's seed
draw = torch.Generator().manual_seed(seed)
stream = (torch.rand(5000, generator=draw) * 37).sort().values  # it grows
pieces, width_p = torch.zeros(64, dtype=torch.int64), 1 / 64
for piece in stream.split(700):
    pieces, width_p = update_histogram(pieces, width_p, piece)
want = torch.bincount(stream.long(), minlength=64)
assert width_p == 1.0, "64 bins of width 1 hold values below 37"
assert torch.equal(pieces, want), "a stream in pieces gives the counts of the whole"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: the best clip, from theory
# *Difficulty 3/5 · 20 minutes · 3 points · no GPU*
#
# For a Laplace distribution with density $\frac{1}{2} e^{-|x|}$ both parts of the error can be written down. Clipping at $t$ costs
# $2 e^{-t}$ (integrate $(x - t)^2$ over the tail, twice), rounding about $S^2 / 12$ with $S = 2t / (2^n - 1)$. Find the $t$ with the least sum.


# %% tags=["exercise"]
def laplace_clip(n_bits):
    """The clip t > 0 that minimises 2 exp(-t) + t^2 / (3 (2^n_bits - 1)^2).

    Within 1e-4 of the exact one, as a Python float.
    Approach: the derivative is zero where exp(-t) = t / (3 (2^n - 1)^2). The left side
    falls and the right side grows, so there is one solution: halve an interval.
    Example: at 4 bits the clip is 4.9212.
    Hint: start from [0, 40] and halve 60 times; float(torch.tensor(-t).exp()).
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
    print(f"{n_bits} bits: the best clip is {laplace_clip(n_bits):.4f}")
assert abs(laplace_clip(4) - 4.9212) < 1e-3, "the factor is 3 (2^n - 1)^2: 675"
assert abs(laplace_clip(8) - 9.8897) < 1e-3, "n_bits sets the factor: 3 * 255^2 at 8"
assert abs(laplace_clip(2) - 2.4144) < 1e-3, "2^n - 1 steps, not 2^n: 27 at 2 bits"
### BEGIN HIDDEN TESTS
import random

seed = 0  # the teacher's seed
for n_bits in random.Random(seed).sample(range(2, 12), 4):
    t = torch.arange(0.5, 25, 1e-4, dtype=torch.float64)
    total = 2 * (-t).exp() + t**2 / (3 * (2**n_bits - 1) ** 2)
    want = t[total.argmin()].item()
    found = laplace_clip(n_bits)
    assert abs(found - want) < 1e-3, f"{n_bits} bits: {want:.3f} has the least sum"
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - S. Migacz, *8-bit Inference with TensorRT*, NVIDIA, GPU Technology Conference 2017, talk S7310
#   [@migacz2017calibration].
# - B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam, D. Kalenichenko, *Quantization and Training of
#   Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR 2018, arXiv 1712.05877 [@jacob2017integer].
# - M. Sun, X. Chen, J. Z. Kolter, Z. Liu, *Massive Activations in Large Language Models*, COLM 2024,
#   arXiv 2402.17762 [@sun2024massive].
# - The models: course-lm (trained by this project, see its model card), SmolLM2 [@allal2025smollm2], GPT-2
#   [@radford2019gpt2].
#
# ## Next
#
# `smoothing`: move the difficulty from the inputs to the weights. `mixed_precision`: which layers need how many bits.

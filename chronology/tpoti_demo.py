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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/tpoti_demo.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/tpoti_demo.ipynb)
# # T-Poti: what is left of a model at one and two bits
#
# *Large Model Quantization: a deep dive. Milestone 7 of the chronology (2026).*

# %% [markdown]
# **T-Poti is no published method.** No paper of this name exists. The outline that this course grew from ends with "T-Poti / ultra-low, a shift towards 1 and 2
# bits". We keep the name for what it describes: an illustrative projection of finished weights to one or two bits. Everything below is measured, and nothing is
# claimed for anybody.
#
# When you have worked through this notebook you will be able to
#
# - derive why $\alpha = \mathrm{mean}|W|$ is the best scale of one bit, and say what it leaves;
# - compare grids of 1 to 4 bits with what theory allows, on normal and on real weights;
# - show with controls which part of the information sits in the signs;
# - say how a model fails as bits go, in nats and in the text that it writes, and where the error comes from;
# - count bits truthfully, scales and float parts included.
#
# It takes about 50 minutes to read and work. You need scales and codes (`linear_mapping`). `bitnet_demo` is the counterpart: there the model is *trained* for
# its codes. No profile needs a GPU; `quick` runs in under a minute, `cpu` in under five.

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

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import quantize_model
from course_utils.compression.decoding import decode_model
from course_utils.evaluation import (
    Protocol,
    compare_all,
    continuations,
    difference,
    format_difference,
    prompt_of,
)
from course_utils.models import linear_layers, load_model
from course_utils.models.walk import BlockInputs, blocks
from course_utils.plotting import nats_against_bits, sensitivity_bars, table, ultra_low
from course_utils.plotting.diagrams import bits_in_bytes, four_matrices
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
draw = torch.Generator().manual_seed(profile.seed)

# %% [markdown]
# ## The question
#
# At four bits a model is nearly what it was, and the earlier milestones show how. How far down can we go, if nothing is trained and nothing is clever? The
# simplest projection there is keeps the **sign** of each weight, and one number for the whole matrix:
#
# $$ \hat W = \alpha \,\mathrm{sign}(W), \qquad \alpha = \frac{1}{n} \sum_{ij} |W_{ij}| . $$
#
# With two bits a weight has four levels. We ask three things. What does such a grid do to a matrix? What does it do to a model? And which part of the damage is
# theory, so that no choice of levels can avoid it?
#
# ## One bit, by hand
#
# Three rows of four weights. A weight of 0 counts as positive: one bit has no room for a third case.

# %% tags=["nbval-check-output"]
W = torch.tensor(
    [[1, -0.125, 0.375, -0.625], [0.25, 1.25, -0.375, 0], [-0.75, 0.625, -0.25, 0.375]]
)  # [out=3, in=4]
bits = (W >= 0).int()  # the code: 1 for plus, 0 for minus
alpha = W.abs().mean()
print(f"alpha = {alpha.item()}")
print(bits.tolist())

# %%
figure = four_matrices(W, bits, alpha * (2 * bits - 1))
plt.show()

# %% [markdown]
# *Figure: the matrix as floats, as one-bit codes, as the values these stand for, and the error. Red is positive and blue negative, but for the codes: there dark
# is 1. In the panels' formula $S$ is $2\alpha$ and $Z$ is one half.*
#
# All magnitudes became 0.5. Large weights shrink, and small ones grow: the weight of exactly 0 became 0.5. There is no code for "not connected".
#
# Twelve weights take twelve bits. In bytes they look so, beside two-bit codes of the same number:

# %%
figure = bits_in_bytes(bits.flatten(), 1, 2)
plt.show()

# %% [markdown]
# *Figure: twelve one-bit codes in two bytes, above, and the same codes in fields of two bits, below. Byte 0 is on the right. Grey bits are padding.*
#
# The last byte of the upper row is half empty. Such padding is counted as well, and so is alpha.
#
# ## Why the mean magnitude?
#
# With $B = \mathrm{sign}(W)$, so that $B_{ij}^2 = 1$, the squared error is a parabola in $\alpha$:
#
# $$ \|W - \alpha B\|^2 = \|W\|^2 - 2\alpha \sum |W_{ij}| + n\,\alpha^2 . $$
#
# Its derivative is 0 at $\alpha = \mathrm{mean}|W|$, and there $\|W\|^2 - n\alpha^2$ is left. Any other choice of signs makes the middle term smaller. So signs
# and mean are the least squares answer together [@rastegari2016xnor].
#
# For normal weights $\mathrm{mean}|w| = \sqrt{2/\pi}\,\sigma$, so the share of the square that is lost is $1 - 2/\pi = 0.363$. We draw the parabola for a
# million normal weights and for one matrix of `course-lm`. The error is a share of $\|W\|^2$: 0 is perfect, and a matrix of zeros has 1.

# %%
model, tokenizer = load_model("course-lm", dtype=profile.dtype, device=profile.device)
layers = {layer.name: layer.weight.float().cpu() for layer in linear_layers(model)}
normal = torch.randn(1000, 1000, generator=draw)
place = "transformer.h.0.attn.c_proj"
examples = {"normal": normal, place: layers[place]}


# %%
def lost(W, W_hat):
    """Squared error as a share of the square of `W` `[out, in]`."""
    return ((W - W_hat).square().sum() / W.square().sum()).item()


def sign(W):
    """1 or -1; 0 counts as positive."""
    return torch.where(W >= 0, 1.0, -1.0)


# %%
scales = torch.linspace(0, 1.6, 81)  # in root mean squares
curves, chosen = {}, {}
for label, W in examples.items():
    unit = W.square().mean().sqrt()
    errors = [lost(W, s * unit * sign(W)) for s in scales]
    curves[label] = scales, torch.tensor(errors)
    chosen[label] = (W.abs().mean() / unit).item()
figure = ultra_low.error_over_scale(curves, chosen)
plt.show()

# %% [markdown]
# *Figure: relative squared error over alpha, for normal weights and for a matrix of course-lm. Dots mark the mean magnitude. The dashed line is a matrix of
# zeros.*
#
# Both dots lie at the bottom of their parabola. The real matrix, one of those that lose most, has more small and more very large weights than a normal
# distribution, and one magnitude serves neither.

# %%
shares = {name: lost(W, W.abs().mean() * sign(W)) for name, W in layers.items()}
worst, best = max(shares, key=shares.get), min(shares, key=shares.get)
of_normal = lost(normal, normal.abs().mean() * sign(normal))
rows = [{"matrix": "normal weights", "lost at 1 bit": of_normal}]
rows += [{"matrix": name, "lost at 1 bit": shares[name]} for name in (best, worst)]
record("tpoti.normal.one_bit", of_normal, "", 0.002, model="normal")
for which, name in (("least", best), ("most", worst)):
    record(f"tpoti.layers.one_bit.{which}", shares[name], "", 0.01, model="course-lm")
table(rows, {"lost at 1 bit": ".3f"})

# %% [markdown]
# In the recorded run normal weights lose {{tpoti.normal.one_bit:.3f}}, as theory says. The matrices of course-lm lose from {{tpoti.layers.one_bit.least:.3f}}
# to {{tpoti.layers.one_bit.most:.3f}} of their square.
#
# ## What sits in the signs?
#
# Losing more than a third of the square sounds fatal. But compare with **controls**. Each keeps or destroys one part of the information, in all matrices.


# %%
def shuffled(x):
    """The same numbers in a random order."""
    order = torch.randperm(x.numel(), generator=draw)
    return x.flatten()[order].view(x.shape)


def random_signs(W):
    """1 and -1 at random `[out, in]`."""
    return 2.0 * torch.randint(0, 2, W.shape, generator=draw) - 1


# %%
controls = {
    "signs, one magnitude": lambda W: W.abs().mean() * sign(W),
    "signs, magnitudes shuffled": lambda W: shuffled(W.abs()) * sign(W),
    "random signs, one magnitude": lambda W: W.abs().mean() * random_signs(W),
    "magnitudes, random signs": lambda W: W.abs() * random_signs(W),
    "zeros": torch.zeros_like,
}


# %%
@torch.no_grad()
def simulated(change):
    """A copy of the model with the weights `change(W)`; floats: no byte is saved."""
    changed = copy.deepcopy(model)
    for layer in linear_layers(changed):
        layer.weight.copy_(change(layer.weight.float().cpu()))
    return changed


text = profile.protocol(model).text(tokenizer)
by = {"model": "course-lm", **profile.protocol(model).fields}
variants = {label: simulated(change) for label, change in controls.items()}
of_controls = compare_all(variants, model, text)

# %%
rows = []
for label, change in controls.items():
    found = of_controls[label]
    rows.append({"kept": label, "normal: lost": lost(normal, change(normal))})
    rows[-1] |= {"course-lm: nats lost": format_difference(found.loss)}
    rows[-1] |= {"perplexity": found.perplexity.perplexity}
table(rows, {"normal: lost": ".3f", "perplexity": ",.0f"})

# %% tags=["folded"]
# Records of the controls; a loss is paired, token by token.
keys = ("signs", "shuffled", "random_signs", "magnitudes", "zeros")


def record_loss(key, estimate, **by):
    """Value under `key`, standard error under `key` with _error."""
    tolerance = max(0.02, 0.15 * abs(estimate.value))
    record(key, estimate.value, "nats", tolerance, **by)
    record(f"{key}_error", estimate.error, "nats", **by)


for key, row, label in zip(keys, rows, controls, strict=True):
    share = row["normal: lost"]
    record(f"tpoti.controls.{key}.lost", share, "", 0.01, model="normal")
    record_loss(f"tpoti.controls.{key}.loss", of_controls[label].loss, **by)
first, second = (of_controls[label] for label in list(controls)[:2])
record_loss("tpoti.controls.shuffled.more", difference(second, first), **by)
nats = first.reference.nats
record("tpoti.course-lm.float.nats", nats, "nats", 0.01, **by)
record("tpoti.uniform.nats", math.log(model.config.vocab_size), "nats", 0, **by)
print(f"float {nats:.2f} nats; all tokens alike {math.log(4096):.2f} nats")

# %% [markdown]
# In the recorded run, on normal weights: signs with one magnitude lose {{tpoti.controls.signs.lost:.3f}}. With the true magnitudes at *wrong places* twice as
# much is lost, {{tpoti.controls.shuffled.lost:.3f}}: it is better to know no magnitude than a wrong one. With wrong signs the error is larger than that of
# zeros.
#
# In the model, one bit costs {{tpoti.controls.signs.loss:.2f}} ± {{tpoti.controls.signs.loss_error:.2f}} nats per token. Shuffled magnitudes cost
# {{tpoti.controls.shuffled.more:+.2f}} ± {{tpoti.controls.shuffled.more_error:.2f}} more than that, random signs {{tpoti.controls.random_signs.loss:.2f}} ±
# {{tpoti.controls.random_signs.loss_error:.2f}} in all. With all linear layers at zero {{tpoti.controls.zeros.loss:.2f}} ±
# {{tpoti.controls.zeros.loss_error:.2f}} are lost: a matrix with random signs is worse than none. To put that into proportion: the float model needs {{tpoti.course-lm.float.nats:.2f}} nats for a token, and
# one that finds all 4,096 tokens alike {{tpoti.uniform.nats:.2f}}.
#
# ## Two bits: four levels
#
# Two bits give $\pm\alpha$ and $\pm 3\alpha$: evenly spaced, symmetric, and without a zero. A weight goes to the nearest. Now codes depend on $\alpha$, and
# the error is no parabola. We take turns: codes for the present $\alpha$, then the least squares $\alpha = \sum |w|\,l / \sum l^2$ for those codes, with $l$ the
# level 1 or 3 of each weight.


# %%
def two_bits(W, alpha):
    """The nearest of -3, -1, 1 and 3 times alpha `[out, in]`."""
    return sign(W) * torch.where(W.abs() > 2 * alpha, 3 * alpha, alpha)


def fit_two_bits(W, turns=15):
    """Alpha by turns, from half the root mean square on."""
    alpha = W.square().mean().sqrt() / 2
    for _ in range(turns):
        level = two_bits(W, alpha).abs() / alpha  # 1 or 3
        alpha = (W.abs() * level).sum() / level.square().sum()
    return alpha


# %%
W = layers[place]
unit = W.square().mean().sqrt()
scales = torch.linspace(0.02, 1.6, 80)
errors = {
    "1 bit": [lost(W, s * unit * sign(W)) for s in scales],
    "2 bits": [lost(W, two_bits(W, s * unit)) for s in scales],
}
curves = {label: (scales, torch.tensor(e)) for label, e in errors.items()}
chosen = {"1 bit": (W.abs().mean() / unit).item()}
chosen["2 bits"] = (fit_two_bits(W) / unit).item()
figure = ultra_low.error_over_scale(curves, chosen)
plt.show()

# %% [markdown]
# *Figure: relative squared error over alpha with one bit and with two, for one matrix of course-lm. Dots mark what the search found.*
#
# The search ends at the bottom of its curve. With two bits the best alpha is smaller, since $3\alpha$ reaches the large weights. Where do the levels lie?

# %%
alpha_1, alpha_2 = W.abs().mean(), fit_two_bits(W)
panels = {
    "1 bit": (W, alpha_1 * torch.tensor([-1.0, 1])),
    "2 bits": (W, alpha_2 * torch.tensor([-3.0, -1, 1, 3])),
}
figure = ultra_low.levels_on_histogram(panels)
plt.show()

# %% [markdown]
# *Figure: histogram of the weights of that matrix, in units of their root mean square, with the levels of one and of two bits as red lines. Dotted lines are
# the thresholds.*
#
# The histogram is highest at 0, exactly where no level lies. Most weights are pushed away from zero, and the few large ones are pulled in.
#
# ## What theory allows
#
# The package has these grids as the method `ultra_low`, from 1 to 4 bits, packed. It finds the alpha of our search.

# %%
from course_utils.compression import get_method

for n_bits, alpha in ((1, alpha_1), (2, alpha_2)):
    exact = get_method("ultra_low", n_bits=n_bits, scale_dtype="float32")
    weight = exact.quantize(W)
    ours = two_bits(W, alpha) if n_bits == 2 else alpha * sign(W)
    apart = (lost(W, weight.dequantize()) - lost(W, ours)) / lost(W, ours)
    assert abs(apart) < 1e-3
    print(
        f"{n_bits}-bit codes: {weight.nbytes:,} bytes for {W.numel():,} weights;",
        end=" ",
    )
    print(f"lost {lost(W, weight.dequantize()):.4f}, by our lines {lost(W, ours):.4f}")

# %% [markdown]
# Both lose the same. How good can a grid of $b$ bits be at all? For normal weights three numbers stand beside each other. `evenly spaced` is our grid. **Lloyd-Max**
# levels are those of least squared error that any $2^b$ levels can have [@lloyd1982pcm]. And no code whatsoever, not even one for whole vectors of weights, gets
# below $2^{-2b}$: that is the rate-distortion bound of the normal distribution.

# %%
rows = []
for n_bits in (1, 2, 3, 4):
    rows.append({"bits": n_bits})
    for levels in ("uniform", "lloyd_max"):
        method = get_method("ultra_low", n_bits=n_bits, levels=levels)
        key = f"normal, {levels}"
        share = lost(normal, method.quantize(normal).dequantize())
        rows[-1][key] = share
        record(f"tpoti.normal.w{n_bits}.{levels}", share, "", 0.002, model="normal")
    rows[-1]["bound"] = 2.0 ** (-2 * n_bits)

# %%
for row in rows:
    for levels in ("uniform", "lloyd_max"):
        method = get_method("ultra_low", n_bits=row["bits"], levels=levels)
        of_layers = [lost(W, method.quantize(W).dequantize()) for W in layers.values()]
        mean = sum(of_layers) / len(of_layers)
        row[f"course-lm, {levels}"] = mean
        key = f"tpoti.layers.w{row['bits']}.{levels}"
        record(key, mean, "", 0.01, model="course-lm")
columns = [name for name in rows[0] if name != "bits"]
table(rows, dict.fromkeys(columns, ".4f"))

# %% [markdown]
# In the recorded run, on normal weights, even spacing comes close to the best levels: {{tpoti.normal.w2.uniform:.4f}} against {{tpoti.normal.w2.lloyd_max:.4f}}
# at two bits. The bound is 0.0625. So about half of the error at two bits is the price of rounding one weight at a time.
#
# The matrices of course-lm, one scale each, lose {{tpoti.layers.w2.uniform:.3f}} on the mean at two bits, and {{tpoti.layers.w2.lloyd_max:.3f}} with levels
# fitted to the weights. They are not normal, as the histogram shows. Other levels help a little, and do not change the picture.
#
# ## The model falls
#
# Now all linear layers of `course-lm`, with one scale for each matrix. For 8 bits we take round-to-nearest (`affine`). The embedding, which is also
# the LM head, stays float, as in all notebooks here.


# %%
def packed(model, n_bits, group_size="tensor", **settings):
    """A copy at `n_bits`, decoded again so that it runs fast, and the report."""
    name = "affine" if n_bits > 4 else "ultra_low"
    settings |= {"symmetric": True} if n_bits > 4 else {}
    method = get_method(name, n_bits=n_bits, group_size=group_size, **settings)
    changed = copy.deepcopy(model)
    report = quantize_model(changed, method)
    return decode_model(changed), report


# %%
WIDTHS = (8, 4, 3, 2, 1)
made = {n_bits: packed(model, n_bits) for n_bits in WIDTHS}
widths = compare_all({n: m for n, (m, _) in made.items()}, model, text)
rows = []
for n_bits, found in widths.items():
    rows.append({"bits": made[n_bits][1].bits_per_weight})
    rows[-1]["nats lost"] = format_difference(found.loss)
    rows[-1]["perplexity"] = found.perplexity.perplexity
    rows[-1]["same top token"] = found.agreement.value
table(rows, {"bits": ".4f", "perplexity": ",.2f", "same top token": ".0%"})

# %% tags=["folded"]
# Records of the widths, one scale for each matrix.
for n_bits, found in widths.items():
    key = f"tpoti.course-lm.w{n_bits}_tensor"
    record_loss(f"{key}.loss", found.loss, **by)
    perplexity, bits = found.perplexity.perplexity, made[n_bits][1].bits_per_weight
    record(f"{key}.perplexity", perplexity, "", 0.15 * perplexity, **by)
    record(f"{key}.bits_per_weight", bits, "bits", 0, **by)
    record(f"{key}.agreement", found.agreement.value, "", 0.05, **by)

# %% [markdown]
# In the recorded run three bits cost {{tpoti.course-lm.w3_tensor.loss:.2f}} ± {{tpoti.course-lm.w3_tensor.loss_error:.2f}} nats, two bits
# {{tpoti.course-lm.w2_tensor.loss:.2f}} ± {{tpoti.course-lm.w2_tensor.loss_error:.2f}} and one bit {{tpoti.course-lm.w1_tensor.loss:.2f}} ±
# {{tpoti.course-lm.w1_tensor.loss_error:.2f}}. With one bit {{tpoti.course-lm.w1_tensor.agreement:.0%}} of the tokens keep the same likeliest successor. What do
# they write?

# %%
speaking = {"float": model} | {f"{n}-bit": m for n, (m, _) in made.items()}
print(continuations(speaking, tokenizer, prompt_of("course-lm")))

# %% [markdown]
# Each line is the same prompt, continued with the likeliest token. Eight bits write what the float model writes. At four and three bits the words are others,
# and still of the subject. At two bits words break. At one bit no sentence is left.
#
# ## Where does the error come from?
#
# First, from which layers? A block has four matrices: queries, keys and values together (`c_attn`), the attention's output, and two of the MLP. We bring one
# kind at a time to one or two bits, and leave all others float.


# %%
def only(kind, n_bits):
    """The model with the layers whose name ends with `kind` at `n_bits`."""
    method = get_method("ultra_low", n_bits=n_bits)
    changed = copy.deepcopy(model)
    names = [name for name in layers if name.endswith(kind)]
    quantize_model(changed, dict.fromkeys(names, method))
    return decode_model(changed)


kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
alone = {(kind, n): only(kind, n) for kind in kinds for n in (1, 2)}
of_kinds = compare_all(alone, model, text)

# %%
bars = {
    f"{n}-bit": {kind: of_kinds[kind, n].loss.value for kind in kinds} for n in (1, 2)
}
figure = sensitivity_bars(bars, "nats lost per token")
figure.set_figheight(3)
plt.show()

# %% tags=["folded"]
# Records: each kind alone, and their sum beside the whole.
for (kind, n_bits), found in of_kinds.items():
    key = f"tpoti.kinds.{kind.replace('.', '_')}.w{n_bits}"
    record_loss(f"{key}.loss", found.loss, **by)
rows = []
for n_bits in (1, 2):
    total = sum(of_kinds[kind, n_bits].loss.value for kind in kinds)
    record(f"tpoti.kinds.sum.w{n_bits}.loss", total, "nats", 0.15 * total, **by)
    whole = widths[n_bits].loss.value
    rows.append({"bits": n_bits, "sum of the four": total, "all at once": whole})
table(rows, {"sum of the four": ".2f", "all at once": ".2f"})

# %% [markdown]
# *Figure: nats lost with one kind of layer at one bit and at two bits, all others float.*
#
# In the recorded run at one bit `c_attn` alone costs {{tpoti.kinds.attn_c_attn.w1.loss:.2f}} ± {{tpoti.kinds.attn_c_attn.w1.loss_error:.2f}} nats, the
# attention's output {{tpoti.kinds.attn_c_proj.w1.loss:.2f}} ± {{tpoti.kinds.attn_c_proj.w1.loss_error:.2f}}, the MLP's two
# {{tpoti.kinds.mlp_c_fc.w1.loss:.2f}} ± {{tpoti.kinds.mlp_c_fc.w1.loss_error:.2f}} and {{tpoti.kinds.mlp_c_proj.w1.loss:.2f}} ±
# {{tpoti.kinds.mlp_c_proj.w1.loss_error:.2f}}. `c_attn` costs most, at two bits more than the other three
# together, and every kind takes part. The four add up to {{tpoti.kinds.sum.w1.loss:.2f}}, where all at once cost
# {{tpoti.course-lm.w1_tensor.loss:.2f}}: what one kind has destroyed, another cannot destroy again. At two bits {{tpoti.kinds.sum.w2.loss:.2f}} stand beside
# {{tpoti.course-lm.w2_tensor.loss:.2f}}.
#
# ### Block after block
#
# Second, how does the error grow with depth? Of a one-bit matrix, $1 - 0.363 = 0.637$ of the square lies along the true one. So the cosine between them is
# $\sqrt{0.637} = 0.80$. In a plain chain of $k$ such matrices with independent errors it would be $0.80^k$: 0.41 after four, and 0.17 after eight.
#
# A transformer is no plain chain. Each block *adds* to the hidden state, and an error that came in goes on beside what is added. We measure after each block, as
# the median over tokens: how long is the error, compared with the hidden state? `own error` gives each block the float model's input, so it is the block's share alone.


# %%
@torch.no_grad()
def by_block(model, quantized, tokens):
    """Relative error of the hidden states after each block: own, and in all."""
    seen = BlockInputs.of_first_block(model, tokens)
    exact = drifted = seen.hidden  # [1, tokens, width]
    own, in_all = [], []
    for (_, block), (_, rounded) in zip(blocks(model), blocks(quantized), strict=True):

        def run(module, hidden):
            inputs = BlockInputs(hidden, seen.args, seen.kwargs)
            return next(inputs.outputs(module))

        alone, drifted = run(rounded, exact), run(rounded, drifted)
        exact = run(block, exact)
        for errors, found in ((own, alone), (in_all, drifted)):
            off = (found - exact).norm(dim=-1) / exact.norm(dim=-1)  # [1, tokens]
            errors.append(off.median().item())
    return own, in_all


# %%
tokens = text.tokens[: text.window][None]
depth = {"own error": {}, "error in all": {}}
for n_bits in (4, 3, 2, 1):
    own, in_all = by_block(model, made[n_bits][0], tokens)
    depth["own error"][f"{n_bits}-bit"] = own
    depth["error in all"][f"{n_bits}-bit"] = in_all
    for key, values in (("own", own), ("all", in_all)):
        of_depth = f"tpoti.depth.w{n_bits}.{key}"
        record(of_depth, values[-1], "", 0.1, model="course-lm")
        record(f"{of_depth}_first", values[0], "", 0.1, model="course-lm")

# %%
figure = ultra_low.error_over_depth(depth)
plt.show()

# %% [markdown]
# *Figure: error of the hidden state over its own length, after each of course-lm's blocks. On the left each block gets the float model's input, on the right
# what the rounded blocks before it made.*
#
# In the recorded run one bit leaves an error of {{tpoti.depth.w1.all_first:.2f}} after the first block and of {{tpoti.depth.w1.all:.2f}} after the last. The
# last block's own share is {{tpoti.depth.w1.own:.2f}}. At two bits it is {{tpoti.depth.w2.all_first:.2f}}, then {{tpoti.depth.w2.all:.2f}}; at four bits the last is
# {{tpoti.depth.w4.all:.2f}}. The first block does most of the damage, and none of the later ones repairs it.
#
# ## A first step up: more scales
#
# One scale for a whole matrix is the crudest choice. A scale for each row, or for each **group** of neighbours in a row, follows the weights better. But scales
# are bits as well: a float16 scale for 16 weights costs a whole bit for each of them.

# %%
SIZES = ("tensor", "row", 64, 16)
grain = {(n, size): packed(model, n, size) for n in (1, 2) for size in SIZES[1:]}
grain |= {(n, "tensor"): made[n] for n in (1, 2)}
of_grain = compare_all({k: m for k, (m, _) in grain.items()}, model, text)

# %%
rows, points = [], {}
for n_bits in (1, 2):
    of_width = [], [], []
    for size in SIZES:
        found, report = of_grain[n_bits, size], grain[n_bits, size][1]
        error = sum(x.weight_error for x in report.layers) / len(report.layers)
        rows.append({"code bits": n_bits, "one scale for": f"{size}", "lost": error})
        rows[-1] |= {"bits per weight": report.bits_per_weight}
        rows[-1] |= {"nats lost": format_difference(found.loss)}
        rows[-1] |= {"perplexity": found.perplexity.perplexity}
        point = report.bits_per_weight, found.loss.value, found.loss.error
        for values, value in zip(of_width, point, strict=True):
            values.append(value)
    points[f"{n_bits}-bit codes"] = of_width
table(rows, {"lost": ".3f", "bits per weight": ".3f", "perplexity": ",.1f"})

# %%
figure = nats_against_bits({"course-lm": points})
plt.show()

# %% tags=["folded"]
# Records of the granularities, and the comparison at equal bits.
for (n_bits, size), found in of_grain.items():
    if size == "tensor":
        continue
    key = f"tpoti.course-lm.w{n_bits}_{size}"
    record_loss(f"{key}.loss", found.loss, **by)
    perplexity = found.perplexity.perplexity
    record(f"{key}.perplexity", perplexity, "", 0.15 * perplexity, **by)
    bits = grain[n_bits, size][1].bits_per_weight
    record(f"{key}.bits_per_weight", bits, "bits", 0, **by)
equal = difference(of_grain[1, 16], of_grain[2, "tensor"])
record_loss("tpoti.equal_bits.more", equal, **by)
print("1 bit in groups of 16, less 2 bits per matrix:", format_difference(equal))

# %% [markdown]
# *Figure: nats lost over measured bits per weight, for one and for two code bits. From left to right in each curve: one scale for the matrix, the row, 64
# weights, 16 weights.*
#
# In the recorded run a scale for 64 weights brings two bits from {{tpoti.course-lm.w2_tensor.loss:.2f}} to {{tpoti.course-lm.w2_64.loss:.2f}} ±
# {{tpoti.course-lm.w2_64.loss_error:.2f}} nats, at {{tpoti.course-lm.w2_64.bits_per_weight:.2f}} bits. One bit comes from {{tpoti.course-lm.w1_tensor.loss:.2f}}
# to {{tpoti.course-lm.w1_64.loss:.2f}} ± {{tpoti.course-lm.w1_64.loss_error:.2f}}.
#
# One bit in groups of 16 takes {{tpoti.course-lm.w1_16.bits_per_weight:.2f}} bits, as many as two bits with one scale for a matrix. Its loss less theirs is
# {{tpoti.equal_bits.more:+.2f}} ± {{tpoti.equal_bits.more_error:.2f}} nats: bits are better spent on the codes than on scales alone.
#
# ### Bits, counted in full
#
# A "one-bit model" is not one bit all over. Here is what the file would hold.

# %%
smallest = copy.deepcopy(model)
report = quantize_model(smallest, get_method("ultra_low"))
half = {"linear layers": 2 * report.weights, "all else": 0}
stored = {"linear layers": report.nbytes, "all else": 0}
for parameter in smallest.parameters():  # embedding, positions, norms, biases
    half["all else"] += 2 * parameter.numel()
stored["all else"] = half["all else"]  # in float16
rows = [{"part": part, "float16": half[part], "1 bit": stored[part]} for part in half]
sums = {"float16": sum(half.values()), "1 bit": sum(stored.values())}
rows.append({"part": "all", **sums})
table(rows, {"float16": ",", "1 bit": ","})

# %% tags=["folded"]
# Record the bytes.
share = sums["1 bit"] / sums["float16"]
rest = stored["all else"] / sums["1 bit"]
record("tpoti.bytes.share", share, "", 0.001, model="course-lm")
record("tpoti.bytes.rest", rest, "", 0.001, model="course-lm")

# %% [markdown]
# In the recorded run the whole model keeps {{tpoti.bytes.share:.0%}} of its float16 bytes, not a sixteenth. Of what is left, {{tpoti.bytes.rest:.0%}} is the
# embedding, positions, norms and biases, which stay float16 in this count. In a small model they are most of the file.
#
# ## A larger model
#
# Does a larger model fall less deep? SmolLM2-135M [@allal2025smollm2] has 30 blocks. We take the weights with seeded noise within the 4-bit grid of their file
# (`linear_mapping` says why), and half as many tokens as above or less, since it is slow on a CPU.

# %%
name = profile.models[-1].replace("q4_1", "dithered")
large, large_tokenizer = model, tokenizer
if name != "course-lm":
    where = {"dtype": profile.dtype, "device": profile.device}
    large, large_tokenizer = load_model(name, **where)
protocol = Protocol("factbook", 2048, min(512, large.config.max_position_embeddings))
large_text = protocol.text(large_tokenizer)
steps = [(4, "tensor"), (2, "tensor"), (2, 64), (1, "tensor")]
large_made = {step: packed(large, *step) for step in steps}

# %%
of_large = compare_all({s: m for s, (m, _) in large_made.items()}, large, large_text)
rows = []
for step, found in of_large.items():
    rows.append({"code bits": step[0], "one scale for": f"{step[1]}"})
    rows[-1]["bits per weight"] = large_made[step][1].bits_per_weight
    rows[-1]["nats lost"] = format_difference(found.loss)
    rows[-1]["perplexity"] = found.perplexity.perplexity
print(f"{name}, {protocol}")
table(rows, {"bits per weight": ".3f", "perplexity": ",.1f"})

# %% tags=["folded"]
# Records of the larger model; in the profile quick there is none.
if name != "course-lm":
    of = {"model": name, **protocol.fields}
    for (n_bits, size), found in of_large.items():
        key = f"tpoti.large.w{n_bits}_{size}"
        record_loss(f"{key}.loss", found.loss, **of)
        bits = large_made[n_bits, size][1].bits_per_weight
        record(f"{key}.bits_per_weight", bits, "bits", 0, **of)
        perplexity = found.perplexity.perplexity
        record(f"{key}.perplexity", perplexity, "", 0.3 * perplexity, **of)
    vocabulary = math.log(large.config.vocab_size)
    record("tpoti.large.uniform.nats", vocabulary, "nats", 0, **of)
    record("tpoti.large.float.nats", found.reference.nats, "nats", 0.02, **of)

# %%
speaking = {"float": large}
for (n_bits, size), (m, _) in large_made.items():
    speaking[f"{n_bits}-bit, {size}"] = m
print(continuations(speaking, large_tokenizer, prompt_of(name), new_tokens=24))

# %%
ids = large_text.tokens[:128][None]
depth = {"own error": {}, "error in all": {}}
for (n_bits, size), (m, _) in large_made.items():
    of_blocks = by_block(large, m, ids)
    for title, values in zip(depth, of_blocks, strict=True):
        depth[title][f"{n_bits}-bit, {size}"] = values
figure = ultra_low.error_over_depth(depth)
plt.show()

# %% [markdown]
# *Figure: as above, for the larger model of the profile.*
#
# In the recorded run SmolLM2 loses {{tpoti.large.w4_tensor.loss:.2f}} ± {{tpoti.large.w4_tensor.loss_error:.2f}} nats at four bits with one scale for a matrix.
# At two bits it is {{tpoti.large.w2_tensor.loss:.2f}} ± {{tpoti.large.w2_tensor.loss_error:.2f}}, in groups of 64 {{tpoti.large.w2_64.loss:.2f}} ±
# {{tpoti.large.w2_64.loss_error:.2f}}; at one bit {{tpoti.large.w1_tensor.loss:.2f}} ± {{tpoti.large.w1_tensor.loss_error:.2f}}. Its
# float loss is {{tpoti.large.float.nats:.2f}} nats, and all tokens alike would cost
# {{tpoti.large.uniform.nats:.2f}}. A model several times larger, with many more blocks, is no safer here: it falls deeper.
#
# ## What you saw
#
# - **The mean magnitude is least squares.** One bit leaves $\|W\|^2 - n\alpha^2$: {{tpoti.normal.one_bit:.3f}} of the square for normal weights in the recorded
#   run, up to {{tpoti.layers.one_bit.most:.3f}} in course-lm.
# - **Theory allows more than scalar grids give.** At two bits the best four levels leave {{tpoti.normal.w2.lloyd_max:.3f}} on normal weights, where the bound is
#   0.0625.
# - **Signs carry the information.** True magnitudes at wrong places are worse than one magnitude for all, by {{tpoti.controls.shuffled.more:.2f}} ±
#   {{tpoti.controls.shuffled.more_error:.2f}} nats in the model.
# - **The model falls between three bits and two.** course-lm loses {{tpoti.course-lm.w3_tensor.loss:.2f}}, {{tpoti.course-lm.w2_tensor.loss:.2f}} and
#   {{tpoti.course-lm.w1_tensor.loss:.2f}} nats at three, two and one bit, with one scale for a matrix. Its text says the same.
# - **All kinds of layers take part**, and the error is there from the first block on.
# - **Bits, in full.** Scales cost bits: {{tpoti.course-lm.w2_64.bits_per_weight:.2f}} for two bits in groups of 64. The float embedding is most of a small one-bit
#   model.
#
# ## Limits
#
# - This is the crudest projection. Nothing was calibrated, compensated, rotated or trained. So these losses are no verdict on one and two bits, only on this way there.
# - Two small models, and few tokens for the larger one. Models of billions of parameters bear more.
# - The error in nats is over documents. Each rounding is a single one; random controls were drawn once.
# - Bytes are measured, speed is not. Products run on decoded weights here.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: one bit for each row
# *Difficulty 1/5 · 10 minutes · 2 points · no GPU*
#
# Project a matrix to one bit, with an alpha of its own for each row.


# %% tags=["exercise"]
def one_bit_rows(W):
    """The values alpha * sign(W) `[out, in]` for float `W`, alpha of each row.

    Approach: alpha is the mean magnitude of a row; a weight of 0 counts as positive.
    Example: [[1.0, -3.0], [0.0, 0.5]] gives [[2.0, -2.0], [0.25, 0.25]].
    Hint: torch.sign(0) is 0; torch.where(W >= 0, 1.0, -1.0) is not.
    """
    ### BEGIN SOLUTION
    alpha = W.abs().mean(1, keepdim=True)
    return torch.where(W >= 0, alpha, -alpha)
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = one_bit_rows(torch.tensor([[1.0, -3.0], [0.0, 0.5]]))
assert found.shape == (2, 2), "return a value for each weight, [out, in]"
assert found[0].tolist() != [1.125, -1.125], "one alpha for each row, not for all of W"
assert found[0].tolist() != [-1.0, 1.0], "alpha is the mean of |W|, not of W"
assert found[0].tolist() == [2.0, -2.0], "alpha of the first row is (1 + 3) / 2"
assert found[1, 0] != 0, "0 became 0: one bit has two values, and 0 counts as positive"
assert found[1].tolist() == [0.25, 0.25], "alpha counts the 0 too: (0 + 0.5) / 2"
print(found.tolist())
### BEGIN HIDDEN TESTS
wide = one_bit_rows(torch.tensor([[8.0, -4.0, -4.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
assert wide.tolist() == [[4.0, -4.0, -4.0, 4.0], [0.0, 0.0, 0.0, 0.0]]
assert one_bit_rows(torch.ones(1, 3).double()).dtype == torch.float64
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the best four levels, exactly
# *Difficulty 4/5 · 20 minutes · 4 points · no GPU*
#
# The search by turns may end beside the best alpha. There is an exact way. Sort the magnitudes. In the best solution the $k$ largest have level 3 and all
# others level 1, for some $k$. With such levels $l$ the best alpha is $\sum |w|\,l / \sum l^2$, and the error falls by $(\sum |w|\,l)^2 / \sum l^2$ below
# $\|w\|^2$. Try all $k$.


# %% tags=["exercise"]
def best_alpha(w):
    """The alpha (a float) for which +-alpha and +-3 alpha fit `w` `[n]` best.

    Approach: for k = 0 .. n give the k largest magnitudes level 3 and the others
    level 1; keep the alpha with the largest gain (sum |w| l)^2 / sum l^2.
    Example: [1.0, -1.0, 3.0] gives 1.0, and all three weights are met exactly.
    Hint: sum l^2 is n + 8 k.
    """
    ### BEGIN SOLUTION
    sizes = w.abs().double().sort(descending=True).values
    top = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])  # sums of the k largest
    squares = len(sizes) + 8 * torch.arange(len(sizes) + 1)
    products = sizes.sum() + 2 * top
    k = (products.square() / squares).argmax()
    return (products[k] / squares[k]).item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
def close(a, b):
    return abs(a - b) < 1e-5


alpha = best_alpha(torch.tensor([1.0, -1.0, 3.0]))
assert isinstance(alpha, float), "return a float: .item() makes one of a tensor"
assert not close(alpha, 5 / 3), "level 3 is for the largest; its square is 9"
assert not close(alpha, 5 / 11), "the sum over |w| has the levels in it as well"
assert not close(alpha, 9 / 11), "levels are those of magnitudes: take w.abs()"
assert close(alpha, 1.0), "(1 + 1 + 3 * 3) / (1 + 1 + 9) = 1"
alpha = best_alpha(torch.tensor([2.0, 2.0, -2.0, 2.0]))
assert close(alpha, 2.0) or close(alpha, 2 / 3), "equal magnitudes are met exactly"
alpha = best_alpha(torch.tensor([1.0, 1.0, 1.0, 5.0]))
assert not close(alpha, 2.0), "the gain is (sum |w| l)^2 / sum l^2: it is best at k = 1"
assert close(alpha, 1.5), "(1 + 1 + 1 + 3 * 5) / (1 + 1 + 1 + 9) = 1.5"
print(alpha)
### BEGIN HIDDEN TESTS
drawn = torch.randn(200, generator=torch.Generator().manual_seed(3))
alpha = best_alpha(drawn)


def left(alpha):
    sizes = drawn.abs().double()
    return torch.minimum((sizes - alpha).square(), (sizes - 3 * alpha).square()).sum()


assert all(left(alpha) <= left(alpha * f) + 1e-9 for f in (0.8, 0.95, 0.99, 1.01, 1.1))
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: count the bits
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# How many bits does a weight take in the end? Rows are packed one by one, and each begins at a new byte.


# %% tags=["exercise"]
def stored_bits(out, columns, n_bits, group_size, scale_bits=16):
    """Bits per weight (a float) of a matrix `[out, columns]`, scales included.

    `group_size` is a number that divides `columns`, or "tensor" for a single scale.
    Approach: whole bytes for the codes of a row, times the rows; then the scales;
    all over the number of weights.
    Example: (1, 8, 1, 8) gives (8 + 16) / 8 = 3.0.
    Hint: -(-a // b) rounds a / b up, in whole numbers.
    """
    ### BEGIN SOLUTION
    codes = out * 8 * -(-columns * n_bits // 8)
    scales = 1 if group_size == "tensor" else out * (columns // group_size)
    return (codes + scales * scale_bits) / (out * columns)
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = stored_bits(1, 8, 1, 8)
assert found != 1.0, "scales are bits as well"
assert found == 3.0, "one byte of codes and one scale of 16 bits, for 8 weights"
found = stored_bits(4, 64, 2, 16)
assert found != 2.25, "a group of 16 is part of a row: a row of 64 has four scales"
assert found == 3.0, "2 bits, and 16 / 16 for the scale"
found = stored_bits(3, 12, 1, "tensor", scale_bits=0)
assert found != 1.0, "12 bits take two bytes in a row: round up"
assert found != 40 / 36, "rows begin at a byte of their own: round up each row"
assert found == 48 / 36, "three rows of two bytes for 36 weights"
print(found)
### BEGIN HIDDEN TESTS
assert stored_bits(8, 8, 3, "tensor") == 3 + 16 / 64
assert stored_bits(3, 5, 4, 5, 32) == (3 * 24 + 3 * 32) / 15
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: a second plane
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# One bit leaves a rest $R = W - \alpha B$. A second bit can be spent on it: $\hat W = \alpha_1 \mathrm{sign}(W) + \alpha_2 \mathrm{sign}(R)$, with one alpha each for the whole
# matrix. On normal weights that loses more than the best four levels. Can you see why the levels are not free?


# %% tags=["exercise"]
def two_planes(W):
    """The sum of two one-bit planes `[out, in]` for float `W`.

    Approach: the first plane is mean|W| * sign(W); the second is the same of what
    the first leaves. A 0 counts as positive.
    Example: [[4.0, -2.0]] gives [[4.0, -2.0]]: alphas 3 and 1.
    Hint: the second alpha is the mean magnitude of the rest, not of W.
    """
    ### BEGIN SOLUTION
    total = torch.zeros_like(W)
    for _ in range(2):
        rest = W - total
        total = total + rest.abs().mean() * torch.where(rest >= 0, 1.0, -1.0)
    return total.to(W.dtype)
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = two_planes(torch.tensor([[4.0, -2.0]]))
assert found.tolist() != [[3.0, -3.0]], "that is the first plane: add one for the rest"
assert found.tolist() != [[4.0, -4.0]], "the second plane has the signs of the rest"
assert found.tolist() != [[6.0, -6.0]], "the second plane is made of the rest"
assert found.tolist() != [[6.0, 0.0]], "the second alpha is the mean of |rest|, not |W|"
assert found.tolist() != [[1.0, 1.0]], "add both planes: the rest alone is not W"
assert found.tolist() == [[4.0, -2.0]], "3 + 1 and -3 + 1"
found = two_planes(torch.tensor([[8.0, 0.0], [-2.0, 2.0]]))
assert found[0, 1] != 0, "a 0 counts as positive: in the first plane it becomes alpha"
assert found.tolist() == [[5.5, 0.5], [-0.5, 0.5]], "alphas 3 and 2.5"
print(found.tolist())
### BEGIN HIDDEN TESTS
assert not two_planes(torch.zeros(2, 3)).any()
assert two_planes(torch.ones(1, 2).double()).dtype == torch.float64
drawn = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
share = (drawn - two_planes(drawn)).square().sum() / drawn.square().sum()
assert abs(share.item() - 0.1307) < 0.003
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - M. Rastegari, V. Ordonez, J. Redmon, A. Farhadi, *XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks*, 2016, arXiv 1603.05279
#   [@rastegari2016xnor].
# - S. Lloyd, *Least squares quantization in PCM*, IEEE Transactions on Information Theory 28(2), 1982 [@lloyd1982pcm].
# - The models course-lm (trained by this project, see its model card) and SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# `tpoti_two_bit_ladder` climbs back: groups, fitted levels, rotations, several planes, codebooks of vectors, compensation and training, each a measured rung,
# until two bits are usable. `bitnet_demo` trains a model for its codes from the start.

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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/tpoti_two_bit_ladder.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/tpoti_two_bit_ladder.ipynb)
# # The two-bit ladder: what it takes to make 2 bits usable
#
# *Large Model Quantization: a deep dive. Chronology, companion of `tpoti_demo`.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - say what each step from plain rounding to trained codes is worth at 2 bits, on one model, with its error and its bytes;
# - compute how far a grid is from what theory allows, and say why codes for several weights at once come closer;
# - fit a codebook of vectors, decode the E8 lattice and a trellis by hand, and say what each of them stores;
# - make up for errors on any of these grids, learn which way weights round, and train codes from the float model's own probabilities;
# - read a claim such as "2 bits" with the right questions: which bytes, which tokens, which minutes?
#
# It takes about 60 minutes to read and work. You need `tpoti_demo`, which shows how 2 bits fail, and the column loop of `gptq_demo`. No profile needs a GPU; `quick`
# runs in under a minute, `cpu` in under five.

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
import lzma
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.compression.decoding import decode_model
from course_utils.data.corpora import documents
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import (
    compare_all,
    continuations,
    difference,
    format_difference,
    prompt_of,
)
from course_utils.evaluation.estimate import with_error
from course_utils.models import linear_layers, load_model
from course_utils.plotting import ladder, table, training_curves
from course_utils.profiles import resolve
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # not used: the ladder stands on course-lm
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# A weight in 2 bits has four values. `tpoti_demo` gave a whole matrix the same four, and the model stopped writing English. Yet models of 2 bits are in use. What do they do
# differently?
#
# We climb one **ladder**. Every rung is a full compressed copy of the same model, `course-lm`. All are evaluated on the same tokens. A rung's **bits per weight** are its stored bytes:
# codes, scales, zero points, codebooks. A rung's cost is its loss minus the float model's, token by token, with the standard error over documents. Embedding and head stay float.

# %%
dense, tokenizer = load_model("course-lm", dtype=profile.dtype, device=profile.device)
protocol = profile.protocol(dense)
text = protocol.text(tokenizer)
sequences = profile.pick(quick=4, cpu=8)
cut = calibration_tokens(tokenizer, sequences, 256, seed=profile.seed)  # [.., 256]
print(f"course-lm, evaluated on {protocol}")
print(f"calibration: {cut.numel():,} tokens of other documents")


# %%
@dataclass
class Rung:
    """A compressed model, decoded once, with what it stores and what it took."""

    group: str
    model: torch.nn.Module
    bits: float
    seconds: float
    tokens: int  # calibration or training tokens that were looked at


rungs, measured = {}, {}


def climb(group, label, method, calibration=None, start=None):
    """Quantize a copy of `start` (None: the float model); returns it, packed."""
    packed = copy.deepcopy(dense if start is None else start)
    begun = time.perf_counter()
    report = quantize_model(packed, method, calibration=calibration)
    seconds = time.perf_counter() - begun
    model = decode_model(copy.deepcopy(packed))
    tokens = 0 if calibration is None else calibration.numel()
    rungs[label] = Rung(group, model, report.bits_per_weight, seconds, tokens)
    return packed


# %% tags=["folded"]
# Helpers: measure the new rungs, show them, and record what the text says.
def slug(label):
    """The label as a part of a key."""
    return "".join(c if c.isalnum() else "_" for c in label.lower())


def keep(key, estimate, tolerance=0.02):
    record(f"ladder.{key}", estimate.value, "nats", tolerance, **about)
    record(f"ladder.{key}_error", estimate.error, "nats", tolerance, **about)


about = {"model": "course-lm", **protocol.fields}


def less(key, label, other):
    """The loss of a rung less that of another, in pairs."""
    found = difference(measured[label], measured[other])
    keep(key, found)
    print(f"{label}, less {other}: {format_difference(found)}")


def evaluate(*labels):
    """Compare these rungs with the float model, and show them."""
    measured.update(compare_all({k: rungs[k].model for k in labels}, dense, text))
    for label in labels:
        keep(f"{slug(label)}.loss", measured[label].loss, 0.05)
        bits = rungs[label].bits
        record(f"ladder.{slug(label)}.bits", bits, "bits", 1e-3, **about)
    return show(labels)


# %% tags=["folded"]
# Show rungs as a table.
def show(labels):
    rows = []
    for label in labels:
        found, rung = measured[label], rungs[label]
        row = {"rung": label, "bits per weight": rung.bits}
        row["nats lost"] = with_error(found.loss.value, found.loss.error)
        row["perplexity"] = found.perplexity.perplexity
        row["same top token"] = found.agreement.value
        rows.append(row | {"seconds": rung.seconds})
    shown = {"bits per weight": ".3f", "perplexity": ".1f"}
    return table(rows, shown | {"same top token": ".0%", "seconds": ".0f"})


# %% [markdown]
# ## First rung: finer scales
#
# The plainest step: more scales. Round-to-nearest on four evenly spaced values, between the smallest and the largest weight of a tensor, a row, or a group of neighbours in a row. Each
# group stores a 16-bit scale and a 2-bit zero point.

# %%
sizes = profile.pick(quick=("row", 64), cpu=("tensor", "row", 128, 64, 32))
names = {
    size: f"nearest, {size}"
    if size in ("tensor", "row")
    else f"nearest, groups of {size}"
    for size in sizes
}
for size, label in names.items():
    climb("scales", label, get_method("affine", n_bits=2, group_size=size))
evaluate(*names.values())

# %% [markdown]
# In the recorded run one grid a tensor loses {{ladder.nearest__tensor.loss:.2f}} nats, one a row {{ladder.nearest__row.loss:.2f}}, and groups of 64
# {{ladder.nearest__groups_of_64.loss:.3f}}, for {{ladder.nearest__groups_of_64.bits:.3f}} bits. Groups of 32 lose {{ladder.nearest__groups_of_32.loss:.3f}}, and have
# {{ladder.nearest__groups_of_32.bits:.2f}} bits: scales are bits, too.
#
# ## Second rung: better levels
#
# Why evenly spaced? Lloyd's method [@lloyd1982pcm] finds the levels of least squared error: each weight goes to its nearest level, each level to the mean of its weights, until nothing moves. How good can
# levels be at all? Take weights like draws of a normal distribution with variance 1. Rate-distortion theory says that no code of $b$ bits a weight, however clever, leaves less than
#
# $$ D(b) = 2^{-2b} . $$

# %%
from statistics import NormalDist

from course_utils.grids.codebook import lloyd_max, nearest_codes

places = (torch.arange(100_001) + 0.5) / 100_001
quantiles = torch.tensor([NormalDist().inv_cdf(p) for p in places.double().tolist()])


def leaves(levels):
    """Mean squared error on the normal distribution."""
    return (quantiles - levels[nearest_codes(quantiles, levels).long()]).square().mean()


# %%
theory = []
for b in (1, 2, 3, 4):
    steps = torch.linspace(0.05, 2, 391)  # every 0.005
    grid = torch.arange(2**b) - (2**b - 1) / 2  # evenly spaced, without a zero
    even = min(leaves(step * grid).item() for step in steps)
    best = leaves(lloyd_max(quantiles, 2**b)).item()
    theory.append(
        {"bits": b, "evenly spaced": even, "Lloyd-Max": best, "limit": 4.0**-b}
    )
table(theory, dict.fromkeys(("evenly spaced", "Lloyd-Max", "limit"), ".5f"))

# %% [markdown]
# The known values are 0.36338, 0.11748, 0.03455 and 0.00950 [@lloyd1982pcm]. At 2 bits the best four levels leave almost twice the limit. The well-known
# factor $\sqrt3\, \pi / 2 = 2.72$ over the limit is reached by many levels only, and from below: here the factors are 1.45, 1.88, 2.21, 2.43. It is no bound.
# <!-- constant: Lloyd-Max distortions of the unit Gaussian, mathematical -->
#
# Now the same on weights. Levels are fitted to each matrix, with a scale a row or a group.

# %%
levels = {"row": "Lloyd-Max, row", 64: "Lloyd-Max, groups of 64"}
for size, label in levels.items():
    method = get_method("ultra_low", n_bits=2, group_size=size, levels="lloyd_max")
    climb("levels", label, method)
evaluate(*levels.values())

# %% [markdown]
# In the recorded run fitted levels lose {{ladder.lloyd_max__row.loss:.3f}} nats with a scale a row, where the evenly spaced ones from minimum to maximum lost {{ladder.nearest__row.loss:.2f}}: much of what
# groups repaired was the range, spoilt by a few large weights. In groups of 64 they lose {{ladder.lloyd_max__groups_of_64.loss:.3f}} at fewer bits than zero points take.
#
# ## Third rung: rotation
#
# QuIP# rotates a matrix before it rounds [@tseng2024quipsharp]. The hidden states of a model can be turned by any orthogonal matrix, if all that writes them and all that reads them is turned as well
# [@ashkboos2024slicegpt]. A **randomized Hadamard matrix**, of entries $\pm 1/\sqrt n$, mixes all features in equal parts, so that sums of many weights take the place of weights: they look normal.
#
# What does that do for a grid? Four matrices of the first block, under four codes, as they are and rotated. The control has weights drawn from a normal distribution: nothing to win there.

# %%
from course_utils.compression.rotation import randomized_hadamard, rotated

Q = randomized_hadamard(dense.config.hidden_size, profile.seed)
turned = rotated(dense, Q)
state_bits = profile.pick(quick=4, cpu=8)
with torch.no_grad():
    apart = (turned(cut[:1]).logits - dense(cut[:1]).logits).abs().max().item()
print(f"float logits differ by at most {apart:.1e}")

# %%
grids = {
    "nearest, row": get_method("affine", n_bits=2, group_size="row"),
    "Lloyd-Max, row": get_method(
        "ultra_low", n_bits=2, group_size="row", levels="lloyd_max"
    ),
    "E8 lattice": get_method("e8p"),
    "trellis": get_method("trellis", state_bits=state_bits),
}


def block_error(model, method):
    """Mean relative squared error over linear layers of the first block."""
    layers = linear_layers(model.transformer.h[0])[: profile.pick(quick=1, cpu=4)]
    errors = []
    for W in (layer.weight for layer in layers):
        back = method.quantize(W).dequantize()
        errors.append(((W - back).square().sum() / W.square().sum()).item())
    return sum(errors) / len(errors)


# %%
control = copy.deepcopy(dense)
draw = torch.Generator().manual_seed(profile.seed)
with torch.no_grad():
    for layer in linear_layers(control):
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw))
normal_turned = rotated(control, Q)
rows = []
for label, method in grids.items():
    row = {"grid": label, "as they are": block_error(dense, method)}
    row |= {"rotated": block_error(turned, method)}
    row |= {"normal": block_error(control, method)}
    rows.append(row | {"normal, rotated": block_error(normal_turned, method)})
shares = dict.fromkeys(list(rows[0])[1:], ".4f")
table(rows, shares)

# %% tags=["folded"]
# Record the errors of the grids.
for row in rows:
    for name in list(shares):
        key = f"ladder.error.{slug(row['grid'])}.{slug(name)}"
        record(key, row[name], "", 0.01, model="course-lm")

# %% [markdown]
# In the recorded run the lattice leaves {{ladder.error.e8_lattice.as_they_are:.3f}} of the square of real weights, {{ladder.error.e8_lattice.rotated:.3f}} once they are rotated, and
# {{ladder.error.e8_lattice.normal:.3f}} of normal ones. So weights have heavier tails than a normal distribution, and rotation takes some of that away: most where the range of a row counts
# ({{ladder.error.nearest__row.as_they_are:.3f}} to {{ladder.error.nearest__row.rotated:.3f}}). On weights that are normal already it changes nothing: the control moves in the third digit. Only the input side is
# rotated here, one matrix for the whole model. QuIP# rotates both sides of every layer.
#
# ## Fourth rung: one code for several weights
#
# Four levels for one weight and four for the next make 16 pairs on a square lattice. But pairs of normal numbers lie in a disc: the corners of the square are wasted. A **codebook of vectors** puts its 16 entries
# where the pairs are. It is found by k-means, which is Lloyd's method in more dimensions.

# %%
from course_utils.grids.vectors import kmeans, nearest_vectors

pairs = torch.randn(20_000, 2, generator=draw)
four = lloyd_max(pairs.flatten(), 4)
books = {
    "4 levels x 4 levels": torch.cartesian_prod(four, four),
    "16 entries by k-means": kmeans(pairs, 16, iterations=100),
}
figure = ladder.codebooks_of_pairs(pairs[:2000], books)
plt.show()
for label, book in books.items():
    off = (pairs - book[nearest_vectors(pairs, book)]).square().mean().item()
    print(f"{label:22} error {off:.4f}")
    record(f"ladder.pairs.{slug(label)}", off, "", 0.003, model="normal")

# %% [markdown]
# *Figure: two thousand pairs of normal numbers, on the left with the 16 entries that four levels each make, on the right with 16 entries found by k-means.*
#
# In the recorded run that is {{ladder.pairs.16_entries_by_k_means:.4f}} instead of {{ladder.pairs.4_levels_x_4_levels:.4f}}, at the same 4 bits a pair. In more dimensions there is more to win. With 8 bits for 4 weights
# k-means still works. With 16 bits for 8 weights a codebook would have 65,536 entries, larger than our layers. There are two ways out:
#
# - **a sum of two codebooks** of 8 bits. A *residual* codebook fits what the first leaves. AQLM's *additive* ones are fitted in turns to what the others leave [@egiazarian2024aqlm]: the package has it as `sweeps`;
# - **a lattice**. QuIP#'s E8P computes its 65,536 points: half-integers with an even sum, of 256 patterns, moved by 1/4. Nothing is fitted, and nothing stored but the codes.

# %%
from course_utils.grids.e8 import e8_points, nearest_e8

x = torch.tensor([[0.9, -0.2, 1.6, 0.1, -0.4, 0.6, -1.2, 0.3]])
code = nearest_e8(x)
print("pattern and signs:", code[0].tolist())
print("point:            ", e8_points(code)[0].tolist())

# %% [markdown]
# Every number of the point is a half-integer minus 1/4. Two bytes say which. They hold 7 signs: the eighth follows, since the half-integers have an even sum.

# %%
entry_bits = profile.pick(quick=4, cpu=8)
vectors = {
    "vectors of 4": get_method("vector", length=4, n_bits=entry_bits),
    "2 binary planes": get_method("ultra_low", n_bits=1, planes=2, group_size="row"),
    "E8 lattice": get_method("e8p"),
    "2 residual codebooks": get_method("vector", length=8, codebooks=2),
}
tried = list(vectors)[: profile.pick(quick=1, cpu=4)]
for label in tried:
    climb("vectors", label, vectors[label])
evaluate(*tried)

# %% [markdown]
# In the recorded run vectors of 4 lose {{ladder.vectors_of_4.loss:.3f}} ± {{ladder.vectors_of_4.loss_error:.3f}} nats at {{ladder.vectors_of_4.bits:.2f}} bits, where the best four levels a row lost
# {{ladder.lloyd_max__row.loss:.3f}}. Two residual codebooks lose {{ladder.2_residual_codebooks.loss:.3f}} and take {{ladder.2_residual_codebooks.bits:.2f}} bits, since in matrices as small as ours two codebooks weigh something. Two binary planes
# ({{ladder.2_binary_planes.loss:.2f}}) are four levels that cannot be chosen freely. The lattice loses {{ladder.e8_lattice.loss:.3f}}: its points suit normal weights, the fitted vectors suit *these* weights.
#
# ## Fifth rung: a trellis
#
# A lattice has 8 dimensions. Can a code have 256? A table of $2^{512}$ points cannot be stored or searched, but it need not be. QTIP [@tseng2024qtip] stores one stream of bits for 256 weights. Weight $t$ is read from a
# **window** of $L$ bits, which moves on by 2 bits with each weight. What lies in the window is the state $s$, and the weight's value is computed from it by arithmetic that scrambles:
# $34038481\, s + 76625530$ modulo $2^{32}$, the sum of the four bytes, centred and scaled. Here is a tiny one, of 3 bits a state and 1 bit a weight.

# %% tags=["nbval-check-output"]
from course_utils.grids.trellis import best_states, state_values, stream_of

tiny = state_values(3)  # [8]
target = torch.tensor([[0.9, -0.3, 0.4, -1.1]])  # [1, T=4]
states = best_states(target, tiny, 1)
stream = stream_of(states, 3, 1)[0].tolist()
print("values of the 8 states", [round(v, 1) for v in tiny.tolist()])
print("best states           ", states[0].tolist())

# %%
figure = ladder.moving_window(stream, 3, 1, tiny)
plt.show()

# %% [markdown]
# *Figure: six stored bits and the four windows of three bits, one for each weight, with the value of each. Grey bits are those that a window shares with the one before.*
#
# Neighbours share two of their three bits, so a weight cannot have any value after any other. Which stream is best? **Viterbi's algorithm** keeps, for each state, the cheapest way to it. A way to a state comes through one of
# two states before it, or four with 2 bits a weight. So the best of $2^{512}$ streams is found exactly, in 256 steps.

# %%
numbers = torch.randn(profile.pick(quick=16, cpu=64), 256, generator=draw)
of_states = {}
for bits in profile.pick(quick=(4, 6), cpu=(4, 6, 8)):
    values = state_values(bits)
    found = values[best_states(numbers, values, 2)]
    of_states[bits] = (numbers - found).square().mean().item()
    record(f"ladder.trellis.states_{bits}", of_states[bits], "", 0.01, model="normal")
print({bits: round(error, 4) for bits, error in of_states.items()})

# %%
curves = {name: [row[name] for row in theory] for name in list(theory[0])[1:]}
points = {"pairs by k-means": off, "E8 lattice": rows[2]["normal"]}
points |= {f"trellis, {bits}-bit states": e for bits, e in of_states.items()}
figure = ladder.distortions(curves, [1, 2, 3, 4], points)
plt.show()

# %% [markdown]
# *Figure: squared error on normal numbers, logarithmic. Curves over bits for evenly spaced levels, Lloyd-Max levels and the limit; points at 2 bits for codes of several weights.*
#
# In the recorded run states of 8 bits leave {{ladder.trellis.states_8:.4f}}: less than the lattice, at the same bits, and longer states leave less still. The limit is 0.0625. Codes for many weights at once close the gap
# that scalar levels leave, step by step. <!-- constant: the rate-distortion limit at 2 bits -->

# %%
climb("trellis", "trellis", grids["trellis"])
climb("trellis", "trellis, rotated", grids["trellis"], start=turned)
evaluate("trellis", "trellis, rotated")

# %%
less("rotation.trellis", "trellis, rotated", "trellis")

# %% [markdown]
# On the model the trellis loses {{ladder.trellis.loss:.3f}} ± {{ladder.trellis.loss_error:.3f}} nats in the recorded run. Rotated, its loss less that is {{ladder.rotation.trellis:+.3f}} ± {{ladder.rotation.trellis_error:.3f}}. A code that knows only the
# normal distribution gains from weights that look normal.
#
# ## Sixth rung: make up for the errors
#
# So far no method has seen an input. GPTQ's column loop [@frantar2022gptq] needs no particular grid: whatever a step of columns becomes, the columns behind it move by the least squares answer to the error. With vectors the step is 4
# columns wide, with the trellis 16.

# %%
looped = get_method("trellis", state_bits=state_bits, compensate=True)
of_four = get_method("vector", length=4, n_bits=entry_bits, hessian="full")
made_up = {
    "nearest, groups of 64": get_method("gptq", n_bits=2, group_size=64),
    "vectors of 4": of_four,
    "Lloyd-Max, row": get_method(
        "ultra_low", n_bits=2, group_size="row", levels="lloyd_max", compensate=True
    ),
    "trellis": looped,
}
made_up = dict(list(made_up.items())[: profile.pick(quick=2, cpu=4)])
for label, method in made_up.items():
    climb("compensation", f"{label} + loop", method, cut)
evaluate(*(f"{label} + loop" for label in made_up))

# %%
for label in made_up:
    less(f"gain.{slug(label)}", f"{label} + loop", label)

# %% [markdown]
# In the recorded run the loop changes the loss of vectors of 4 by {{ladder.gain.vectors_of_4:+.3f}} ± {{ladder.gain.vectors_of_4_error:.3f}} nats, that of the trellis by {{ladder.gain.trellis:+.3f}} ± {{ladder.gain.trellis_error:.3f}}, and that of the best levels by
# {{ladder.gain.lloyd_max__row:+.3f}} ± {{ladder.gain.lloyd_max__row_error:.3f}}. With GPTQ's own grid in groups of 64 it is {{ladder.gain.nearest__groups_of_64:+.3f}} ± {{ladder.gain.nearest__groups_of_64_error:.3f}}. Knowing the inputs helps every grid, and adds to what a better code gains:
# vectors of 4 with the loop lose {{ladder.vectors_of_4___loop.loss:.3f}}.

# %%
both = "vectors of 4, rotated + loop"
climb("compensation", both, of_four, cut, start=turned)
evaluate(both)

# %%
less("rotation.loop", both, "vectors of 4 + loop")

# %% [markdown]
# Does rotation add to that? In the recorded run the rotated model's loss less the other's is {{ladder.rotation.loop:+.3f}} ± {{ladder.rotation.loop_error:.3f}} nats. A fitted codebook takes the weights as they are, so there is less for rotation to win.
#
# ## Seventh rung: learn which way to round
#
# The loop is a greedy answer to a quadratic question, layer by layer. **AutoRound** [@cheng2023autoround] asks the block. Each weight gets a number $V$ that is added before rounding, and the ends of each range get a factor:
#
# $$ \hat W = S \left( \mathrm{clamp}\left( \mathrm{round}\left( \frac{W}{S} + V \right) + Z \right) - Z \right) . $$
#
# $V$ starts at 0. It is trained by the *sign* of its gradient, so that what the block puts out comes close to the float block's. The rate falls from one over the number of updates to zero: all steps together are 1/2. So a weight can go to its
# other neighbour on the grid, and no further.

# %%
from course_utils.models import BlockInputs, blocks
from course_utils.models.walk import replace_module
from course_utils.quantizers.learned_rounding import LearnedRounding, LearningLinear

updates = profile.pick(quick=3, cpu=40)
learned = LearnedRounding(2, 64, iterations=updates, batch=profile.pick(quick=1, cpu=2))

# %%
watched = copy.deepcopy(dense)
_, block = blocks(watched)[0]
inputs = BlockInputs.of_first_block(watched, cut)
with torch.no_grad():
    targets = torch.cat(list(inputs.outputs(block)))  # [sequences, 256, width]
learning = {
    layer.name: LearningLinear(layer.weight, layer.bias, learned)
    for layer in linear_layers(block)
}
for name, module in learning.items():
    replace_module(block, name, module)
losses = learned.learn(block, inputs, targets, list(learning.values()))
moved = torch.cat([of.V.detach().flatten() for of in learning.values()])
print(
    "loss of the first block:", *(f"{loss:.4f}" for loss in losses[:: len(losses) // 4])
)
print(f"largest |V| {moved.abs().max():.3f}")

# %%
climb("learned rounding", "learned, groups of 64", learned, cut)
passes = updates * learned.batch * cut.shape[1]
rungs["learned, groups of 64"].tokens = passes
evaluate("learned, groups of 64")

# %%
less("learned.less_nearest", "learned, groups of 64", names[64])

# %% [markdown]
# In the recorded run learned rounding loses {{ladder.learned__groups_of_64.loss:.3f}} nats: {{ladder.learned.less_nearest:+.3f}} ± {{ladder.learned.less_nearest_error:.3f}} against rounding to nearest on the same grid, with the same bytes. No weight
# moved by more than one code.
#
# ## Last rung: train the codes
#
# Everything above leaves the weights near where they were. **Quantization-aware training** (`ptq_vs_qat`) trains float weights through the grid: $S \cdot \mathrm{clamp}(\mathrm{round}(W / S), -2, 1)$, with a straight-through gradient, and the
# steps $S$ as well [@esser2019lsq]. We train on the float model's probabilities rather than on the text (`distillation_demo`): what is to be kept is the model, not the text.

# %%
from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.distillation.trainer import DistilSettings, distil
from course_utils.finetuning.conversion import convert
from course_utils.finetuning.qat import prepare_qat
from course_utils.training.loop import TrainConfig

stream = token_stream(
    tokenizer.backend_tokenizer, documents("factbook", "train"), tokenizer.eos_token_id
)
context, batch = profile.pick(quick=(64, 2), cpu=(256, 4))
batches = TrainingBatches(stream, context=context, batch_size=batch, seed=profile.seed)
steps = profile.pick(quick=4, cpu=50)
config = TrainConfig(
    steps, lr=5e-4, warmup=2, decay=steps // 2, eval_every=max(1, steps // 10)
)


# %%
def train_codes(n_bits, group_size):
    """A packed model of trained codes, its training curve and the seconds it took."""
    method = get_method(
        "affine",
        n_bits=n_bits,
        group_size=group_size,
        symmetric=True,
        weight_range="mse",
    )
    student = copy.deepcopy(dense).float()  # steps too small for 16 bits
    prepare_qat(student, method)
    begun = time.perf_counter()
    curve = distil(student, dense, batches, DistilSettings(), config)
    report = convert(student)
    return student, report, curve, time.perf_counter() - begun


# %%
packed_qat, report, curve, seconds = train_codes(2, 64)
label = "trained, groups of 64"
tokens = config.steps * batch * context
rungs[label] = Rung(
    "training",
    decode_model(copy.deepcopy(packed_qat)),
    report.bits_per_weight,
    seconds,
    tokens,
)
evaluate(label)

# %%
updates_done = [row["step"] for row in curve]
course = {label: (updates_done, [row["loss"] for row in curve])}
figure = training_curves(course, "KL divergence (nats)")
plt.show()

# %%
less("trained.less_learned", "trained, groups of 64", "learned, groups of 64")

# %% [markdown]
# In the recorded run the trained codes lose {{ladder.trained__groups_of_64.loss:.3f}} nats. Less those of learned rounding that is {{ladder.trained.less_learned:+.3f}} ± {{ladder.trained.less_learned_error:.3f}}. The figure still falls at its end: this is a short training,
# and `ptq_vs_qat` shows how a longer one goes on.
#
# ## The whole ladder

# %%
order = [label for label in rungs if label in measured]
losses = {
    label: (measured[label].loss.value, measured[label].loss.error) for label in order
}
figure = ladder.rungs(losses, {label: rungs[label].group for label in order})
plt.show()

# %% [markdown]
# *Figure: nats lost per token by every rung, in the order in which we climbed, coloured by the step it belongs to. Lines are two standard errors over documents.*

# %%
best = min(order, key=lambda label: measured[label].loss.value)
chosen = [
    names["row"],
    "Lloyd-Max, row",
    "trellis",
    "vectors of 4, rotated + loop",
    best,
]
rows = []
for label in dict.fromkeys(label for label in chosen if label in measured):
    rung, found = rungs[label], measured[label]
    row = {"rung": label, "bits per weight": rung.bits}
    row["perplexity / float"] = found.perplexity.perplexity / found.reference.perplexity
    rows.append(row | {"minutes": rung.seconds / 60, "tokens seen": f"{rung.tokens:,}"})
table(rows, {"bits per weight": ".3f", "perplexity / float": ".2f", "minutes": ".2f"})

# %% tags=["folded"]
# Record the best rung.
found = measured[best]
ratio = found.perplexity.perplexity / found.reference.perplexity
record("ladder.best.ratio", ratio, "", 0.05, **about)
record("ladder.float.perplexity", found.reference.perplexity, "", 0.05, **about)
record("ladder.best.minutes", rungs[best].seconds / 60, "min", None, model="course-lm")
record("ladder.best.tokens", rungs[best].tokens, "tokens", 0, model="course-lm")
print(f"best: {best}, {ratio:.3f} times the float model's perplexity")

# %% [markdown]
# The best rung has {{ladder.best.ratio:.2f}} times the float model's perplexity in the recorded run. It took {{ladder.best.minutes:.1f}} minutes and {{ladder.best.tokens:,.0f}} tokens of text. The same grid, only rounded to, lost {{ladder.nearest__groups_of_64.loss:.3f}} nats; one grid a tensor, {{ladder.nearest__tensor.loss:.2f}}.
#
# What the models write says the same. One prompt, always continued with the likeliest token:

# %%
speakers = {"float": dense} | {
    label: rungs[label].model for label in dict.fromkeys(chosen) if label in rungs
}
print(continuations(speakers, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %% [markdown]
# Rounded to nearest with one scale a row, the model makes up words. The best levels write English and leave the subject. From the trellis on the text is of the kind that the float model writes, and repeats itself as that does.
#
# ## From 1 to 4 bits
#
# Two bits are one point of a curve. The same steps at other widths:


# %%
def at_width(n):
    """What is tried at `n` bits: label, method, whether it reads the calibration."""
    group = get_method("gptq", n_bits=n, group_size=64) if n > 1 else None
    scalar = get_method("ultra_low", n_bits=n, group_size="row", levels="lloyd_max")
    by_trellis = get_method("trellis", n_bits=n, state_bits=state_bits)
    found = {"Lloyd-Max, row": scalar, "nearest, groups of 64 + loop": group}
    return found | {"trellis": by_trellis}


widths = profile.pick(quick=(1,), cpu=(1, 3, 4))
for n in widths:
    for label, method in at_width(n).items():
        if method is not None:
            needs = cut if method.needs_calibration else None
            climb(f"{n} bits", f"{label}, {n} bits", method, needs)
wide = [
    label
    for label in rungs
    if label.rpartition(", ")[2] in {f"{n} bits" for n in widths}
]
evaluate(*wide)

# %%
curves = {}
for family in at_width(2):
    labels = [family, *(f"{family}, {n} bits" for n in widths)]
    labels = [label for label in labels if label in measured]
    by_bits = sorted((rungs[label].bits, label) for label in labels)
    values = [measured[label].loss for _, label in by_bits]
    nats, errors = [v.value for v in values], [v.error for v in values]
    curves[family] = ([b for b, _ in by_bits], nats, errors)
shown = {label for family in curves for label in [*wide, family]}
rest = [
    label for label in order if label not in shown and measured[label].loss.value < 1.2
]
others = [measured[label].loss for label in rest]
curves["other 2-bit rungs"] = (
    [rungs[label].bits for label in rest],
    [v.value for v in others],
    [v.error for v in others],
)
figure = ladder.front(curves)
plt.show()

# %% [markdown]
# *Figure: nats lost against measured bits per weight, with bars of two standard errors. The grey line is the Pareto front: no other point has fewer bits and loses less.*
#
# In the recorded run one more bit with nothing clever, Lloyd-Max levels of 3 bits, loses {{ladder.lloyd_max__row__3_bits.loss:.3f}} nats: less than the best rung at 2. At 1 bit the trellis still loses {{ladder.trellis__1_bits.loss:.2f}}, and no rung here is near the float model. Between 2.1 and 2.3 bits the front holds the rungs that know inputs.
#
# ## Are the codes full?
#
# A code of 2 bits that is 0 half of the time carries less than 2 bits. A compressor can win that back on disk. We give the packed codes of one whole model to `lzma`, of Python's library, and compare with the entropy of single codes.


# %%
def entropy(codes, count):
    """Bits that a code carries, each for itself."""
    share = codes.flatten().int().bincount(minlength=count) / codes.numel()
    return -(share * share.clamp(min=1e-30).log2()).sum().item()


def squeezed(model):
    """Compressed size over size of all packed codes of a model."""
    weights = [
        m.quantized_weight for m in model.modules() if hasattr(m, "quantized_weight")
    ]
    raw = b"".join(w.codes.contiguous().numpy().tobytes() for w in weights)
    return len(lzma.compress(raw, preset=6)) / len(raw), weights[0]


# %%
coded = {
    "nearest, row, 4 bits": get_method("affine", n_bits=4, group_size="row"),
    "nearest, row, 2 bits": get_method("affine", n_bits=2, group_size="row"),
    "Lloyd-Max, row": grids["Lloyd-Max, row"],
    "E8 lattice": grids["E8 lattice"],
}
rows = []
for label, method in list(coded.items())[: profile.pick(quick=2, cpu=4)]:
    model = copy.deepcopy(dense)
    quantize_model(model, method)
    share, first = squeezed(model)
    bits = 8 * first.codes.numel() / (first.shape[0] * first.shape[1])
    carried = None
    if hasattr(first, "integer_codes"):
        carried = entropy(first.integer_codes(), 16)
    rows.append(
        {"codes": label, "bits": bits, "entropy": carried, "lzma": share * bits}
    )
    record(f"ladder.lzma.{slug(label)}", share * bits, "bits", 0.02, model="course-lm")
table(rows, {"bits": ".0f", "entropy": ".2f", "lzma": ".2f"})

# %% [markdown]
# In the recorded run 4-bit codes of a row carry much less than they take, and `lzma` finds {{ladder.lzma.nearest__row__4_bits:.2f}} bits. At 2 bits from minimum to maximum nearly all weights get the two middle codes: {{ladder.lzma.nearest__row__2_bits:.2f}} bits remain. The
# best levels fill their codes better ({{ladder.lzma.lloyd_max__row:.2f}}), and the lattice's cannot be squeezed ({{ladder.lzma.e8_lattice:.2f}}): a good code leaves nothing for a compressor.
#
# ## What others report
#
# Figures of the papers' authors, from their repositories. They are of other models, texts and context lengths, so no two rows may be compared, nor any with ours. What to look at is the gap to the float model beside it.
# <!-- constant: figures quoted from the cited sources -->
#
# | method | bits, as they count | model, WikiText-2 perplexity | float |
# | --- | --- | --- | --- |
# | BiLLM, binary with salient columns twice [@huang2024billm] | 1.08, without scales | LLaMA2-70B: 8.41 | - |
# | OneBit, signs and a rank of 1, trained [@xu2024onebit] | about 1 | LLaMA-7B: 10.20 | 5.68 |
# | AQLM, codebooks of 16 bits for 8 weights [@egiazarian2024aqlm] | 2 | Llama-2-7B: 5.92 | - |
# | AQLM with PV-tuning [@malinovskii2024pvtuning] | 2 | Llama-2-7B: 5.68 | - |
# | QuIP#, E8 and rotations, not finetuned [@tseng2024quipsharp] | 2 | Llama-2-70B: 4.156 | 3.120 |
# | GPTQ at 2 bits, in the same table [@tseng2024quipsharp] | 2 | Llama-2-70B: 109.8 | 3.120 |
# | ParetoQ, trained [@liu2025paretoq] | 1.58 | 3B model: 9.9 | - |
#
# PTQTP, two ternary planes, calls its codes "1.58 bits" [@xiao2025ptqtp]: that is one plane, and there are two. QTIP reports a trellis as fast as QuIP#'s lattice [@tseng2024qtip]. BitNet trains ternary weights from the beginning (`bitnet_demo`).
#
# ## Limits
#
# - One small model and one text. Large models have more weights that matter little, and lose less at 2 bits; their outliers are larger, so rotation is worth more there.
# - Our methods are the papers' ideas without their finetuning: QuIP# and QTIP tune norms and scales afterwards, AQLM its codebooks.
# - One cut of calibration. `gptq_ablations` shows how far another would move such losses.
# - Bits are measured, speed is not. Vector, lattice and trellis codes are decoded by plain PyTorch here.
# - The embedding stays float, and weighs as much as all the codes. `tpoti_demo` counts it.
#
# ## What you saw
#
# - **What is each step worth?** In the recorded run: scales a row {{ladder.nearest__row.loss:.2f}}, groups of 64 {{ladder.nearest__groups_of_64.loss:.3f}}, best levels a row {{ladder.lloyd_max__row.loss:.3f}}, vectors of 4 {{ladder.vectors_of_4.loss:.3f}}, and with the loop
#   {{ladder.vectors_of_4___loop.loss:.3f}} ± {{ladder.vectors_of_4___loop.loss_error:.3f}} nats.
# - **How far from what theory allows?** Four best levels leave 1.88 times the limit on normal weights, the lattice and the trellis about 1.4 times. <!-- constant: from the table above -->
# - **What do codes of several weights store?** Codes, scales, and a codebook where it is fitted. The lattice and the trellis compute theirs.
# - **Compensation, learning, training.** The loop gains {{ladder.gain.vectors_of_4:+.3f}} on vectors, learned rounding {{ladder.learned.less_nearest:+.3f}} on groups of 64; the best rung has {{ladder.best.ratio:.2f}} times the float perplexity.
# - **Two bits?** {{ladder.vectors_of_4___loop.bits:.2f}} bits, with all that is stored, and the embedding in float beside it.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: what a codebook costs
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Vectors of `length` weights get a code of `n_bits` from each of several codebooks. The codebooks are stored with the layer, 16 bits a number, and a scale of 16 bits for each row.
# How many bits are that for one weight?


# %% tags=["exercise"]
def bits_per_weight(out, columns, length, n_bits, codebooks):
    """All stored bits of a layer [out, columns], divided by its weights.

    Approach: codes, codebooks and scales, each counted for the whole layer.
    Example: [256, 256], vectors of 4, 8 bits, one codebook: 2.3125.
    Hint: a codebook has 2 ** n_bits entries of `length` numbers.
    """
    ### BEGIN SOLUTION
    weights = out * columns
    codes = weights // length * n_bits * codebooks
    books = codebooks * 2**n_bits * length * 16
    return (codes + books + 16 * out) / weights
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = bits_per_weight(256, 256, 4, 8, 1)
assert found != 2, "2 bits are the codes alone: codebook and scales are stored too"
assert found != 2.0625, "the codebook is stored as well: 256 entries of 4 numbers"
assert found != 2.25, "a scale of 16 bits for each row is missing"
assert found == 2.3125, "codes 2, the codebook 0.25, scales 0.0625"
two = bits_per_weight(256, 256, 8, 8, 2)
assert two != 2.5625, "each of the codebooks is stored: there are two"
assert two == 3.0625, "two codes a vector, and two codebooks"
### BEGIN HIDDEN TESTS
found = bits_per_weight(1024, 256, 4, 8, 1)
assert found == 2.125, "in a larger matrix the same codebook weighs less"
found = bits_per_weight(64, 128, 2, 4, 3)
assert found == 6 + (3 * 16 * 2 * 16 + 64 * 16) / 8192, "three codebooks of 16 pairs"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: decode a trellis
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Read the numbers out of a stream of bits. Weight $t$ is the value of the state whose bits begin at place $K t$ of the stream. The first bit of a window is its highest.


# %% tags=["exercise"]
def decode_stream(bits, values, state_bits, n_bits):
    """The numbers (a list) that the list of `bits` stands for.

    Approach: a window of `state_bits` bits, moved by `n_bits` each time, as long as
    it lies within the stream.
    Example: bits [1, 0, 1, 1], values [0, 10, 20, 30], 2 and 1: [20, 10, 30].
    Hint: int("101", 2) is 5.
    """
    ### BEGIN SOLUTION
    numbers = []
    for start in range(0, len(bits) - state_bits + 1, n_bits):
        window = bits[start : start + state_bits]
        numbers.append(values[int("".join(map(str, window)), 2)])
    return numbers
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = decode_stream([1, 0, 1, 1], [0, 10, 20, 30], 2, 1)
assert len(found) != 2, "the windows overlap: move by n_bits, not by the whole window"
assert len(found) == 3, "three windows of 2 bits lie within 4 bits"
assert found != [10, 20, 30], "the first bit of a window is the highest"
assert found == [20, 10, 30], "the windows are 10, 01 and 11"
squares = [i * i for i in range(16)]
assert decode_stream([0, 1, 1, 0, 1, 1], squares, 4, 2) == [36, 121], "move by 2 bits"
### BEGIN HIDDEN TESTS
eighth = [0, 1, 4, 9, 16, 25, 36, 49]
assert decode_stream([1, 1, 1], eighth, 3, 1) == [49], "one window, one weight"
found = decode_stream([1, 0, 0, 0, 1, 1, 0], eighth, 3, 2)
assert found == [16, 1, 36], "windows 100, 001 and 110"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: the nearest point of a lattice
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# D8 + 1/2 holds all vectors of half-integers (-0.5, 0.5, 1.5, ...) with an even sum. Find the one nearest to `x`. Round each number to its nearest half-integer first. If the sum is odd, one number has to go to its *second* nearest:
# the one for which that costs least.


# %% tags=["exercise"]
def nearest_half(x):
    """The point of D8 + 1/2 nearest to `x` (a tensor of 8 numbers).

    Approach: round; if the sum is odd, move the number with the largest rounding
    error by 1, towards where it came from.
    Example: eight times 0.5 stays; with 0.6 and 0.9 in front it stays as well.
    Hint: (x - 0.5).round() + 0.5.
    """
    ### BEGIN SOLUTION
    point = (x - 0.5).round() + 0.5
    if point.sum() % 2 == 1:
        error = x - point
        worst = error.abs().argmax()
        point[worst] += 1 if error[worst] > 0 else -1
    return point
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = nearest_half(torch.full((8,), 0.5))
assert found.tolist() == [0.5] * 8, "half-integers with an even sum stay as they are"
probe = torch.tensor([0.6, 1.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])  # rounds to an odd sum
found = nearest_half(probe)
assert found.sum() % 2 == 0, "the sum has to be even: one number goes elsewhere"
assert found[0] == 0.5, "move the number with the largest rounding error, here 1.3"
assert found[1] != 2.5, "towards where it came from: 1.3 lies below 1.5"
assert found.tolist() == [0.5] * 8, "one number moves, all others stay"
### BEGIN HIDDEN TESTS
probe = torch.tensor([-0.1, 0.7, 1.4, -1.6, 0.4, -0.8, 0.5, 2.6])
expected = [0.5, 0.5, 1.5, -1.5, 0.5, -0.5, 0.5, 2.5]
assert nearest_half(probe).tolist() == expected, "-0.1 is the worst: it goes up to 0.5"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: one turn of weighted k-means
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# The errors of some weights matter more: those of columns with large inputs. Write one turn of k-means for the error $\sum w\,(x - c)^2$, with a weight for each number.


# %% tags=["exercise"]
def turn(x, book, w):
    """Codes `[n]` and the new book `[entries, length]`, for x and w `[n, length]`.

    Approach: each vector goes to the entry of least weighted error, then each entry
    becomes the weighted mean of its vectors, in each coordinate.
    Example: in the tests. An entry without vectors stays.
    Hint: (w[:, None] * (x[:, None] - book) ** 2).sum(2) is [n, entries].
    """
    ### BEGIN SOLUTION
    codes = (w[:, None] * (x[:, None] - book) ** 2).sum(2).argmin(1)
    new = book.clone()
    for entry in codes.unique():
        own = codes == entry
        new[entry] = (w[own] * x[own]).sum(0) / w[own].sum(0)
    return codes, new
    ### END SOLUTION


# %% tags=["exercise-tests"]
points = torch.tensor([[0.0, 0], [2, 0], [10, 4]])
start = torch.tensor([[1.0, 0], [9, 4], [-50, -50]])
codes, moved = turn(points, start, torch.ones(3, 2))
assert codes.tolist() == [0, 0, 1], "each vector goes to its nearest entry"
assert moved[2].tolist() == [-50, -50], "an entry without vectors stays where it is"
assert moved.tolist() == [[1, 0], [10, 4], [-50, -50]], "entries become means"
heavy = torch.tensor([[3.0, 1], [1, 1], [1, 1]])
_, moved = turn(points, start, heavy)
assert moved[0].tolist() != [1, 0], (
    "the mean has to be weighted: the first counts three times"
)
assert moved[0].tolist() == [0.5, 0], "(3 * 0 + 1 * 2) / 4 in the first column"
x, two = torch.tensor([[2.0, 0]]), torch.tensor([[0.0, 0], [2, 3]])
codes, _ = turn(x, two, torch.tensor([[5.0, 0.1]]))
assert codes.tolist() == [1], "the weights count for which entry is nearest, too"
### BEGIN HIDDEN TESTS
codes, moved = turn(x.double(), two.double(), torch.tensor([[0.1, 5.0]]).double())
assert codes.tolist() == [0], "the first column hardly counts here: entry 0 is nearest"
assert moved.tolist() == [[2, 0], [2, 3]], "entry 0 becomes the mean of its vectors"
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# Rotation and lattice are QuIP#'s [@tseng2024quipsharp], the trellis is QTIP's [@tseng2024qtip], additive codebooks are AQLM's [@egiazarian2024aqlm], learned rounding is AutoRound [@cheng2023autoround], the column loop is GPTQ's
# [@frantar2022gptq], learned steps are those of LSQ [@esser2019lsq].
#
# ## Next
#
# `comparison` sets all methods of the chronology side by side. `bitnet_demo` shows what happens when a model never had float weights.

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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/gptq_demo.ipynb)
#
# # GPTQ: four bits, by rounding so that errors cancel
#
# *Large Model Quantization: a deep dive. Milestone 2 of the chronology (2022).*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - say which error GPTQ [@frantar2022gptq] minimizes, and why the nearest code is not the best one;
# - derive its update from Optimal Brain Surgeon, and build it in twenty lines that give the package's codes exactly;
# - explain the Cholesky factor, lazy blocks, groups, act-order and damping, and name a trap in the authors' own code;
# - quantize a language model to 4, 3 and 2 bits, and compare it with round-to-nearest at equal bytes.
#
# What each part of the recipe is worth, from the calibration text to the order of the columns, is measured in the companion `gptq_ablations`.
#
# It takes about 60 minutes to read and work. You need scales, zero points and groups (`linear_mapping`), and a little linear algebra:
# what an inverse and a triangular matrix are. No profile needs a GPU; `quick` runs in about a minute, `cpu` in under ten.

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
import itertools
import math
import tempfile
import time

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.compression.hessian import Hessian, inverse_factor
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import file_bytes, perplexity, time_per_token
from course_utils.models import linear_layers, load_model
from course_utils.plotting import error_against_bits, rounding_distances
from course_utils.profiles import resolve
from course_utils.quantizers.gptq import gptq_codes
from course_utils.results import record
from torch.utils.flop_counter import FlopCounterMode

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
# Round-to-nearest makes the error of each *weight* as small as it can. But nobody looks at weights: what counts is the layer's output. With inputs
# `x` `[tokens, in]` from a calibration text, GPTQ chooses the codes of `W` `[out, in]` so that, with $Q$ their values,
#
# $$ \frac{1}{n} \lVert x W^\top - x Q^\top \rVert^2 \;=\; \sum_{\text{rows}} \tfrac12\,(w - q)\, H\, (w - q)^\top, \qquad
# H = \frac{2}{n}\, x^\top x $$
#
# is small. $H$ `[in, in]` is the **Hessian** of this error in a row $w$, and the same for all rows. Each row is a problem of its own. Where $H$ is
# diagonal, each weight is too, and the nearest code is best. Real features are correlated: then an error of one weight can be
# made up for by its neighbours. To find the very best codes is a closest vector problem in a lattice, hard in general; GPTQ is a good greedy answer,
# and in fact Babai's algorithm of 1986, run in the other direction [@chen2025babai].
#
# ## By hand: two rows, three weights
#
# Four tokens, three features. The grid is 0, 1, 2, 3 for both rows, so that a code is its own value.

# %% tags=["nbval-check-output"]
x = torch.tensor([[2.0, 2, 1], [2, 1, 0], [1, 2, 1], [0, 1, 2]]).double()  # [4, 3]
W = torch.tensor([[3.0, 0.4, 2.4], [1.4, 2.4, 3.0]]).double()  # [out=2, in=3]
H = 2 / len(x) * x.T @ x  # [3, 3]
print("H =", H.tolist())


def objective(w, q, H):
    """Mean squared output error of one row, or the sum over rows."""
    return (((w - q) @ H) * (w - q)).sum().item() / 2


nearest = W.round()
for row in range(2):
    direct = (x @ (W[row] - nearest[row])).square().mean().item()
    by_hessian = objective(W[row], nearest[row], H)
    print(f"row {row}: nearest codes {nearest[row].int().tolist()},", end=" ")
    print(f"error {by_hessian:.4f}, and from the outputs {direct:.4f}")

# %% [markdown]
# Three weights with four codes each: 64 roundings. We try them all.


# %% tags=["nbval-check-output"]
def best_of_all(w, H):
    """The codes of least error among all of 0..3, with the error."""
    tried = torch.tensor(list(itertools.product(range(4), repeat=len(w)))).double()
    errors = torch.tensor([objective(w, q, H) for q in tried])
    return tried[errors.argmin()], errors.min().item()


for row in range(2):
    q, error = best_of_all(W[row], H)
    moved = (q - nearest[row]).int().tolist()
    print(f"row {row}: best {q.int().tolist()}, error {error:.4f};", end=" ")
    print(f"against the nearest codes {moved}")

# %% [markdown]
# In row 0 the best codes round 2.4 *up* to 3. Rounding 0.4 down to 0 has made the outputs too small, the second and the third feature go together (3 in $H$), and so the
# third weight can pay for the second.
#
# ## Optimal Brain Surgeon: what the others should do
#
# Suppose weight $k$ is set to $q_k$. Which change $\delta$ of all weights, with $\delta_k = q_k - w_k$ given, makes $\frac12 \delta H \delta^\top$ least? It is a
# quadratic function under one linear constraint, and Optimal Brain Surgeon [@hassibi1992obs] gives the answer, there for pruning ($q_k = 0$):
#
# $$ \delta = -\frac{w_k - q_k}{[H^{-1}]_{kk}}\, [H^{-1}]_{k,:}, \qquad
# \text{loss} = \frac{(w_k - q_k)^2}{2\,[H^{-1}]_{kk}}. $$
#
# The derivation takes three lines. At the minimum under the constraint the gradient points along the constraint's own: $H \delta^\top = \lambda e_k$ with
# a number $\lambda$ and the unit vector $e_k$. So $\delta = \lambda [H^{-1}]_{k,:}$. Its entry $k$ has to be $q_k - w_k$, which gives $\lambda = (q_k - w_k) /
# [H^{-1}]_{kk}$; and the loss is $\frac12 \delta H \delta^\top = \frac12 \lambda\, \delta_k$.
#
# We check it against the plain way: fix $\delta_k$, set the derivative in the others to zero, and solve.


# %% tags=["nbval-check-output"]
def pin(w, k, q, H):
    """Set weight k to q, change the others as best they can; new weights and loss."""
    inverse = H.inverse()
    error = (w[k] - q) / inverse[k, k]
    return w - error * inverse[k], error**2 * inverse[k, k] / 2


w, loss = pin(W[0], 1, 0.0, H)
free = [0, 2]
by_solving = W[0].clone()
by_solving[1] = 0.0
change = torch.linalg.solve(H[free][:, free], H[free, 1] * (W[0, 1] - 0.0))
by_solving[free] += change
print("0.4 becomes 0, and the row becomes", [round(v, 4) for v in w.tolist()])
print("by solving:                       ", [round(v, 4) for v in by_solving.tolist()])
print(f"loss {loss:.4f}, objective {objective(W[0], w, H):.4f}")
assert torch.allclose(w, by_solving) and abs(loss - objective(W[0], w, H)) < 1e-12

# %% [markdown]
# ## From OBQ to GPTQ
#
# Optimal Brain Quantization [@frantar2022obc] repeats that: pin the weight whose loss is least, take it out of $H$, go on with what is
# left. Every row has its own order, so every row needs its own inverses: for `out` rows of `in` weights that is of the order
# $out \cdot in^3$, each inverse being made from the one before (the cell below inverts anew).
#
# **GPTQ's first observation: every row can have the same order.** The paper finds that in large layers it is about as good as OBQ's own order for each row.
# Take the columns from left to right. Then the inverses are the same for all rows, and whole columns can be quantized at once.
#
# We compare the two on our rows, and on two more that need not be like them.


# %% tags=["nbval-check-output"]
def obq(w, H):
    """Codes 0..3 of one row: the weight of least loss first."""
    w, left, q = w.clone(), list(range(len(w))), torch.zeros(len(w)).double()
    while left:
        inverse = H[left][:, left].inverse()
        codes = w[left].round().clamp(0, 3)
        losses = (w[left] - codes) ** 2 / (2 * inverse.diagonal())
        i = int(losses.argmin())  # place in `left`
        w[left] -= (w[left[i]] - codes[i]) / inverse[i, i] * inverse[i]
        q[left.pop(i)] = codes[i]
    return q


def in_order(w, H):
    """Codes 0..3 of one row, from left to right."""
    w, q = w.clone(), torch.zeros(len(w)).double()
    for k in range(len(w)):
        inverse = H[k:, k:].inverse()
        q[k] = w[k].round().clamp(0, 3)
        w[k:] -= (w[k] - q[k]) / inverse[0, 0] * inverse[0]
    return q


print(f"{'row':13}", *(f"{name:>9}" for name in ("nearest", "OBQ", "in order", "best")))
for w in [*W, *torch.tensor([[2.5, 1.2, 1.0], [2.9, 0.6, 3.0]]).double()]:
    found = w.round(), obq(w, H), in_order(w, H), best_of_all(w, H)[0]
    weights = ", ".join(f"{v:.1f}" for v in w.tolist())
    print(f"{weights:13}", *(f"{objective(w, q, H):9.4f}" for q in found))

# %% [markdown]
# Neither greedy order is always the better one, neither always finds the best, and in the last row the fixed order does worse than the nearest codes: being
# greedy has no guarantee. Over the many rows of a layer the gains prevail, as we shall see.
#
# ## One triangular matrix for all steps
#
# `in_order` inverts a matrix per column. **GPTQ's second observation**: all it needs of these inverses, their first rows, stands in one
# upper triangular matrix $U$ with $H^{-1} = U^\top U$, the Cholesky factor of the inverse:
#
# $$ [H_{k:,k:}^{-1}]_{0,:} = U_{kk}\, U_{k,k:}. $$
#
# The factor with $H^{-1} = U U^\top$ is another matrix: it belongs to the opposite order. (The lower factor that `torch.linalg.cholesky` gives by
# default is $U^\top$: the same numbers, in columns.) A small multiple of the mean diagonal is
# added to $H$ before (**damping**), so that it can be inverted even if features are copies of each other. (The package gets the same $U$ without
# inverting $H$, as the inverse of the upper triangular $R$ with $H = R R^\top$.)

# %% tags=["nbval-check-output"]
U = torch.linalg.cholesky(H.inverse(), upper=True)
for k in range(3):
    first_row = H[k:, k:].inverse()[0]
    assert torch.allclose(first_row, U[k, k] * U[k, k:])
    print(k, [round(v, 4) for v in (U[k, k] * U[k, k:]).tolist()])
assert torch.allclose(inverse_factor(H, damping=0.0), U)

# %% [markdown]
# ## A real layer
#
# Now the first MLP layer of a language model. The package's `Hessian` adds up $x^\top x$ over calibration text, sequence by sequence, in
# float64; here once by hand.

# %%
model, tokenizer = load_model("course-lm", device=profile.device)
layer = next(x for x in linear_layers(model) if x.name.endswith("h.0.mlp.c_fc"))
tokens = calibration_tokens(tokenizer, 16, 256, seed=profile.seed)
seen, statistics = [], Hessian(layer.weight.shape[1], profile.device)


def keep(module, args, output):
    seen.append(args[0].flatten(0, -2).double())  # [256, in]
    statistics.update(args[0].flatten(0, -2))


hook = layer.module.register_forward_hook(keep)
with torch.no_grad():
    for sequence in tokens:
        model(input_ids=sequence[None].to(profile.device))
hook.remove()
x = torch.cat(seen)  # [4096, in]
H = 2 / len(x) * x.T @ x
W = layer.weight.double()
assert torch.allclose(H, statistics.matrix())
spread = H.diagonal().max() / H.diagonal().median()
norm = (H / (H.diagonal().sqrt()[:, None] * H.diagonal().sqrt())).abs()
off = (norm.sum() - len(H)) / (len(H) * (len(H) - 1))
print(f"{layer.name}: W {list(W.shape)}, {len(x):,} tokens")
print(f"largest feature {spread:.1f} times the median one (mean square);")
print(f"mean |cosine| of two different features {off:.2f}")

# %% [markdown]
# The whole algorithm fits into one cell. A column at a time, for all rows together: round, divide the error by $U_{kk}$, and subtract that number times row $k$ of $U$
# from the columns to the right. The grid is found before, one for each row: the range of its weights, always with 0 in it, 16 levels, the
# scale rounded to float16, since so it is stored.


# %%
def gptq(W, H, n_bits=4, damping=0.01):
    """Codes `[out, in]`, scale and zero point `[out]`, losses `[out, in]`."""
    top = 2**n_bits - 1
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    S = ((high - low) / top).float().half().double()
    Z = (-low / ((high - low) / top)).float().round().clamp(0, top)
    H = H + damping * H.diagonal().mean() * torch.eye(len(H)).to(H)
    U = torch.linalg.cholesky(H.inverse(), upper=True)
    W, codes, losses = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for k in range(W.shape[1]):
        codes[:, k] = ((W[:, k] / S).round() + Z).clamp(0, top)
        error = (W[:, k] - S * (codes[:, k] - Z)) / U[k, k]
        losses[:, k] = error**2 / 2
        W[:, k:] -= error[:, None] * U[k, k:]
    return codes, S, Z, losses


codes, S, Z, losses = gptq(W, H)
ours = gptq_codes(W, H, group_size="row")
print(
    "the package's codes:",
    "the same" if torch.equal(ours.codes, codes.byte()) else "others",
)
assert torch.equal(ours.codes, codes.byte())

# %% [markdown]
# **The best single test.** The losses of all columns sum up to the objective itself, with the damped Hessian: half the trace of $\Delta W\, H\, \Delta W^\top$.
# For column $k$ subtracts $e_k = (w_k - q_k) / U_{kk}$ times row $k$ of $U$, and in the end all columns stand on their values: so $\Delta W = W - Q = E U$, with
# the $e_k$ as columns of $E$. And since $H = U^{-1} U^{-\top}$,
#
# $$ \tfrac12 \Delta W H \Delta W^\top = \tfrac12 E\, U U^{-1} U^{-\top} U^\top E^\top = \tfrac12 E E^\top, $$
#
# whose trace is the sum of all $e_k^2 / 2$. A wrong factor, a stale inverse, an error propagated to the wrong side: each breaks it.

# %%
Q = S[:, None] * (codes - Z[:, None])
damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H)).to(H)
half_trace = ((W - Q) @ damped @ (W - Q).T).trace().item() / 2
print(f"sum of the losses {losses.sum():.12f}")
print(f"half the trace    {half_trace:.12f}")
assert abs(losses.sum().item() / half_trace - 1) < 1e-10

# %% [markdown]
# What has it gained on this layer? Round-to-nearest with the same grid is the comparison. And the weights themselves: GPTQ's are *further* from
# the original ones, which is the point.

# %%
plain = ((W / S[:, None]).round() + Z[:, None]).clamp(0, 15)
power = (x @ W.T).square().mean().item()
rounded = {"nearest": S[:, None] * (plain - Z[:, None]), "GPTQ": Q}
for name, values in rounded.items():
    output = (x @ (W - values).T).square().mean().item() / power
    weights = (W - values).square().sum() / W.square().sum()
    print(f"{name:8} relative error of the output {output:.5f}, of W {weights:.5f}")
other = (codes != plain).double().mean().item()
print(f"{other:.0%} of the codes are not the nearest ones.")

# %%
figure = rounding_distances(
    {name: ((W - values) / S[:, None]).flatten() for name, values in rounded.items()}
)
plt.show()

# %% [markdown]
# *Figure: two histograms of how far a weight is from its code's value, in steps. With round-to-nearest all lie evenly within half a step;
# with GPTQ they spread beyond, in a bell.*
#
# ## Lazy blocks
#
# The loop above touches all columns to the right at every step: much memory traffic for little arithmetic. **GPTQ's third observation**: the code of
# column $k$ depends on updates of its own column only. So the errors of a block of 128 columns are kept, and move to the columns behind it in one matrix
# product. The codes stay the same. Here a random weight, larger than the layer above if the profile is not `quick`. A block of 1 moves every
# error to all columns at once, and a block of all columns is the loop above. The factor $U$ is in all the times.

# %%
generator = torch.Generator().manual_seed(profile.seed)
out, columns = profile.pick(quick=(256, 512), cpu=(1024, 2048))
large = torch.randn(out, columns, generator=generator, dtype=torch.float64)
mixed = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
mixed += mixed.roll(1, 1)  # neighbours are correlated
H_large = 2 / len(mixed) * mixed.T @ mixed
settings = {"group_size": "row"}
first = gptq_codes(large, H_large, **settings).codes  # also the warm-up
start = time.perf_counter()
inverse_factor(H_large, 0.01)
print(f"the factor alone: {time.perf_counter() - start:.2f} s")
for block_size in (1, 32, 128, columns):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = gptq_codes(large, H_large, block_size=block_size, **settings)
        seconds.append(time.perf_counter() - start)
    assert torch.equal(found.codes, first)
    low, median, high = sorted(seconds)
    spread = f"{median:.2f} s ({low:.2f} to {high:.2f})"
    print(f"block size {block_size:4}: {spread}, the same codes")
print(f"median of 3 runs, {torch.get_num_threads()} threads")

# %% [markdown]
# The codes are what this cell proves. The seconds are those of a small layer on your machine, where the block size need not show: blocks were made for GPUs, which
# wait for memory if they touch all columns for each single one [@frantar2022gptq].
#
# ## Groups, and grids that are out of date
#
# With groups, a grid belongs to 128 neighbouring columns of a row, say. It is found when the loop reaches the group's first column, on the weights as they are
# *then*, already changed by the errors before. So far the paper. The authors' code looks at `W`, in which the updates of the
# current block are still missing. A group that is smaller than a block gets a grid of old weights, and **the block size starts to matter**. GPTQModel does the
# same, and so does our package, which wants to give the same codes; `current_groups` does what the paper says.


# %%
def layer_error(found):
    """Objective of a result, without damping, relative to the output's power."""
    index = found.group_index.long()
    S, Z = found.scale.double()[:, index], found.zero_point[:, index]
    return objective(W, S * (found.codes.double() - Z), H) / (power * len(W))


variants = {
    "blocks of 128": {},
    "blocks of 64": {"block_size": 64},
    "blocks of 32": {"block_size": 32},
    "current grids": {"current_groups": True},
    "static grids": {"static_groups": True},
}
reference = gptq_codes(W, H, group_size=32, current_groups=True)
for name, settings in variants.items():
    found = gptq_codes(W, H, group_size=32, **settings)
    stale = (found.scale != reference.scale).double().mean().item()
    print(f"groups of 32, {name:14} error {layer_error(found):.6f},", end=" ")
    print(f"{stale:4.0%} of the scales differ from the current ones")

# %% [markdown]
# In blocks of 32 every group begins with its block, and nothing is out of date. "Static" grids are all found on the float weights before the
# loop begins.
#
# ## Act-order and dead features
#
# A column that comes late finds few others to make up for its error: the last one none at all. **Act-order** takes the features with the
# largest mean square first, while there are many. Its price: the columns of a group no longer lie side by side, so the group of every
# column has to be stored, and a kernel has to gather. With static grids the groups stay where they were.

# %%
for size in ("row", 128, 32):
    print(f"group size {size}:", end="")
    for name, settings in {
        "as they come": {},
        "act-order": {"act_order": True},
        "act-order, static": {"act_order": True, "static_groups": True},
    }.items():
        found = gptq_codes(W, H, group_size=size, **settings)
        print(f"  {name} {layer_error(found):.6f}", end="")
    print()
smallest_first = H.diagonal().argsort()
shuffled = torch.randperm(len(H), generator=generator)
for name, order in (("smallest first", smallest_first), ("shuffled", shuffled)):
    found = gptq_codes(W[:, order], H[order][:, order], group_size="row")
    error = layer_error(found._replace(codes=found.codes[:, order.argsort()]))
    print(f"control, group size row, {name}: {error:.6f}")

# %% [markdown]
# A feature that is zero on all of the calibration text has a zero on the diagonal. Its weights have no influence on the objective, whatever they
# are: the authors set them to 0 and the diagonal to 1. That is a bet that the feature stays zero.

# %%
dead = x.clone()
dead[:, 5] = 0  # plant one
found = gptq_codes(W, 2 / len(dead) * dead.T @ dead, group_size="row")
column = found.codes[:, 5].int() - found.zero_point[:, 0]
print("values of the dead column, all zero:", bool((column == 0).all()))
print("weights there before:", [round(v, 3) for v in W[:4, 5].tolist()], "...")
assert (column == 0).all() and W[:, 5].abs().max() > 0

# %% [markdown]
# ## The package against production libraries
#
# The tests of the course compare the package's 4-bit codes with those of GPTQModel [@gptqmodel] and, with static grids, which are all it has, llm-compressor [@llmcompressor], bit for
# bit, on small layers with the same stored float32 Hessian and float32 scales: groups of 64 and 128 and whole rows, symmetric and asymmetric, act-order, dead features. (A row of nothing but zeros
# decodes to zeros in all three, but llm-compressor gives it another grid.) They ask for other versions of what
# the course uses, so each runs in an environment of its own (`make oracles`), and its results are stored with their versions in `tests/golden`. The
# README holds the comparison on a whole model.
#
# ## A whole model, block by block
#
# A layer's inputs depend on the layers before it. GPTQ feeds each block with the outputs of the blocks that are *already quantized*: so a layer's error is
# measured on inputs that it will really get. What went wrong before is not made up for: on those inputs the layer is to give what its float weights
# give, not what the float model had there. (GPTAQ [@li2025gptaq] aims at the latter.) All Hessians of a block are taken before the first of its layers is quantized, as in the
# authors' code unless it is asked to go layer by layer. `quantize_model` walks the model that way. It keeps the calibration's hidden states between two
# blocks, and the Hessians of one block, and no more.
#
# SmolLM2 comes as a file of 4-bit codes, on whose grid round-to-nearest would be unfairly good. Its weights get seeded noise of one step first
# (`smollm2-135m-dithered`): a reference that favours no method.

# %%
names = [name.replace("q4_1", "dithered") for name in profile.models]
group_of, vocabulary = {}, {}
for name in names:
    config = load_model(name).model.config
    vocabulary[name] = config.vocab_size
    group_of[name] = 128 if config.hidden_size % 128 == 0 else 64
    print(f"{name}: width {config.hidden_size}, groups of {group_of[name]}")
rows, n_texts = {}, profile.pick(quick=4, cpu=16)
n_tokens = profile.pick(quick=2048, cpu=4096)


def fresh(name):
    """The float model anew, and its tokenizer."""
    return load_model(name, dtype=profile.dtype, device=profile.device)


# %%
def measure(name, label, method, calibration):
    """Quantize a fresh model; its row of the table, recorded."""
    model, tokenizer = fresh(name)
    start = time.perf_counter()
    report = quantize_model(model, method, calibration=calibration)
    seconds = time.perf_counter() - start
    window = min(512, model.config.max_position_embeddings)
    text = evaluation_tokens(tokenizer, n_tokens)
    quality = perplexity(model, text, window=window).perplexity
    key = f"gptq.{name}.w{method.n_bits}g{method.group_size}.{label}"
    by = {"model": name, "corpus": "factbook", "tokens": n_tokens, "window": window}
    record(f"{key}.perplexity", quality, "", 0.03 * quality, **by)
    record(f"{key}.bits_per_weight", report.bits_per_weight, "bits", 0, **by)
    record(f"{key}.seconds", seconds, "s", **by)
    rows[name, method.n_bits, label] = quality, report.nbytes, seconds
    print(
        f"  {method.n_bits} bits {label:7} {report.bits_per_weight:.3f} stored,",
        end=" ",
    )
    print(f"perplexity {quality:10.2f}, {seconds:5.1f} s")


# %%
for name in names:
    model, tokenizer = fresh(name)
    window = min(512, model.config.max_position_embeddings)
    of_float = perplexity(model, evaluation_tokens(tokenizer, n_tokens), window=window)
    rows[name, 32, "float"] = of_float.perplexity, None, None
    by = {"model": name, "corpus": "factbook", "tokens": n_tokens, "window": window}
    record(f"gptq.{name}.float.perplexity", of_float.perplexity, "", 0.05, **by)
    print(f"{name}, float: perplexity {of_float}")
    n = profile.pick(quick=8, cpu=32 if name == "course-lm" else 16)
    texts = calibration_tokens(tokenizer, n, window, seed=profile.seed)
    for bits in (4, 3, 2):
        sizes = {"n_bits": bits, "group_size": group_of[name]}
        measure(name, "nearest", get_method("affine", **sizes), None)
        measure(name, "gptq", get_method("gptq", **sizes), texts)
        assert rows[name, bits, "nearest"][1] == rows[name, bits, "gptq"][1]  # bytes

# %% [markdown]
# Both store the same bytes, to the last one. What differs is which codes were chosen, and the grids of groups behind the first, which GPTQ finds on
# weights that have taken up errors. Times are those of `quantize_model`, in which GPTQ runs the calibration text through every block twice: once for the Hessians, and once more, quantized, for the next block's inputs.

# %%
for name in names:
    whole = rows[name, 32, "float"][0]
    for bits in (4, 3, 2):
        near, ours = (rows[name, bits, k][0] for k in ("nearest", "gptq"))
        lost, left = (math.log(v / whole) for v in (near, ours))  # nats a token
        print(f"{name}, {bits} bits: nearest loses {lost:.3f} nats, GPTQ {left:.3f}:")
        print(f"  {1 - left / lost:.0%} won back", end="")
        print(", and worse than guessing evenly." if ours > vocabulary[name] else ".")

# %% [markdown]
# Minimizing the error of every layer's output promises nothing about the model's loss, and now and then GPTQ is hardly better than the nearest codes. SmolLM2 is
# a hard case: a few of its features are massive on a few tokens (`llm_int8_demo`). `gptq_ablations` looks for what helps there.

# %%
panels = {
    name: {
        label: ([2, 3, 4], [rows[name, bits, key][0] for bits in (2, 3, 4)])
        for label, key in (("round-to-nearest", "nearest"), ("GPTQ", "gptq"))
    }
    for name in names
}
figure = error_against_bits(panels, "perplexity", log=True)
plt.show()

# %% [markdown]
# *Figure: perplexity against bits per code on a logarithmic axis, a panel a model, with one curve for round-to-nearest and one for GPTQ.*
#
# Stored and loaded again, the model is the same; it holds packed codes, and nothing of the float weights.

# %%
model, tokenizer = fresh("course-lm")
texts = calibration_tokens(tokenizer, n_texts, 256, seed=profile.seed)
report = quantize_model(model, get_method("gptq"), calibration=texts)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    stored = file_bytes(folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
again = again.to(profile.device).eval()
probe = evaluation_tokens(tokenizer, 64)[None].to(profile.device)
with torch.no_grad():
    same = torch.equal(model(input_ids=probe).logits, again(input_ids=probe).logits)
print(f"file {stored:,} bytes, linear layers {report.nbytes:,} of them")
print("logits after loading are the same:", same)
for label, which in (("float", fresh("course-lm").model), ("GPTQ", model)):
    timing = time_per_token(
        which, probe[0, :32], new_tokens=profile.pick(quick=8, cpu=16)
    )
    print(f"{label:6} {timing}")

# %% [markdown]
# The package decodes the weight at each step and multiplies in float, so it is slower than float here. The paper's gain in speed comes from
# kernels that read packed codes; `packed_kernels` is about those.
#
# ## Limits
#
# - GPTQ knows the calibration text, and only that. It minimizes the error of each layer's output, not the model's loss.
# - The order of the columns is a choice, and greedy. Better roundings exist (three of the four rows above); finding them costs more.
# - At 2 bits it does not save models as small as ours; for OPT-175B at about 2.2 bits the paper reports a loss below 1.5
#   of perplexity [@frantar2022gptq]. The next milestones change the grid (NF4), the scaling (AWQ) or the
#   training (BitNet).
# - Embeddings and LM head stay in float, as in the paper. In small models they are most of the bytes.
# - Stored formats have traps of their own: exercise 3 is one.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: which weight first?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# OBQ begins with the weight whose rounding costs least. Return its place and its cost, for a row `w` on the integer grid.


# %% tags=["exercise"]
def cheapest(w, H):
    """(k, loss) of the weight of `w` `[in]` whose rounding to an integer costs least.

    Approach: loss_k = (w_k - round(w_k))^2 / (2 [H^-1]_kk).
    Example: with H the identity it is the weight nearest to an integer.
    Hint: the diagonal of the *inverse*, not the inverse of the diagonal.
    """
    ### BEGIN SOLUTION
    losses = (w - w.round()) ** 2 / (2 * H.inverse().diagonal())
    k = int(losses.argmin())
    return k, losses[k].item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
def row(*weights):
    return torch.tensor(weights, dtype=torch.float64)


k, loss = cheapest(row(0.4, 1.9, 0.7), torch.eye(3).double())
assert k == 1 and abs(loss - 0.005) < 1e-9, "with H = identity: 0.1^2 / 2, at weight 1"
pair = torch.tensor([[2.0, 1.9, 0], [1.9, 2, 0], [0, 0, 2]]).double()
k, loss = cheapest(row(0.3, 2.0, 0.25), pair)
assert k == 1, "2.0 is an integer already, and costs nothing"
k, loss = cheapest(row(0.3, 1.6, 0.25), pair)
assert k == 0, "0.3 is further off than 0.25, but its twin makes up for most of it"
print(f"weight {k} first, loss {loss:.4f}")
### BEGIN HIDDEN TESTS
assert abs(loss - 0.09 / (2 * pair.inverse()[0, 0].item())) < 1e-12
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the same update, block by block
# *Difficulty 4/5 · 25 minutes · 4 points · no GPU*
#
# Write GPTQ for the integer grid with lazy blocks: inside a block update the block's own columns only, and the columns behind it once, at its end.


# %% tags=["exercise"]
def lazy_gptq(W, U, block_size):
    """Whole codes of `W` `[out, in]`, in its dtype; `U` is the upper factor `[in, in]`.

    Approach: for each block copy its columns; round them one by one, spread each error,
    (w - q) / U_kk, over the block's later columns; when the block is done subtract
    errors @ U[block, behind] from the columns behind.
    Example: block_size 1 and block_size `in` give the same codes.
    Hint: U[start:stop, stop:] has a row for each column of the block.
    """
    ### BEGIN SOLUTION
    W, codes = W.clone(), torch.empty_like(W)
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        block, errors = W[:, start:stop].clone(), W.new_zeros(len(W), stop - start)
        for i, k in enumerate(range(start, stop)):
            codes[:, k] = block[:, i].round()
            errors[:, i] = (block[:, i] - codes[:, k]) / U[k, k]
            block[:, i:] -= errors[:, i : i + 1] * U[k, k:stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return codes
    ### END SOLUTION


# %% tags=["exercise-tests"]
draw = torch.Generator().manual_seed(0)
features = torch.randn(200, 8, generator=draw).double()
features = features @ torch.randn(8, 24, generator=draw).double()
features += 0.3 * torch.randn(200, 24, generator=draw)
hessian = features.T @ features / 100
factor = inverse_factor(hessian, 0.01)
weights = 3 * torch.randn(5, 24, generator=draw).double()
kept = weights.clone()
by_column = lazy_gptq(weights, factor, 1)
assert torch.equal(weights, kept), "work on a copy of W"
assert torch.equal(by_column[:, 0], weights[:, 0].round()), (
    "the first column is the nearest"
)
for size in (5, 8, 24):
    with FlopCounterMode(display=False) as counter:
        lazy_gptq(weights, factor, size)
    products = counter.get_total_flops()  # an update column by column has none
    assert size == 24 or products > 0, "move a block's errors on in one matrix product"
    assert torch.equal(lazy_gptq(weights, factor, size), by_column), (
        f"blocks of {size}: are the columns behind updated once, with all errors?"
    )
gaps = weights - weights.round(), weights - by_column
lost = [((gap @ hessian) * gap).sum().item() / 2 for gap in gaps]
print(f"error of the nearest codes {lost[0]:.2f}, of GPTQ {lost[1]:.2f}")
assert lost[1] < 0.5 * lost[0], (
    "the error must fall: is it divided by U_kk, not its square?"
)
### BEGIN HIDDEN TESTS
w = weights.clone()
for k in range(24):
    w[:, k + 1 :] -= ((w[:, k] - w[:, k].round()) / factor[k, k])[:, None] * factor[
        k, k + 1 :
    ]
    assert torch.equal(w[:, k].round(), by_column[:, k])
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: the zero point that is stored as minus one
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# The first GPTQ format packs eight 4-bit codes into an int32, the first in the lowest bits, and stores zero points **minus one**. A reader adds the one
# again. What becomes of the zero point 0? Write the packing, and see. (GPTQModel's format `gptq_v2` stores them as they are.)


# %% tags=["exercise"]
def pack_v1(zero_points):
    """One Python int of 32 bits from 8 zero points, each stored minus one in 4 bits.

    Approach: OR of (z - 1) shifted by 4 i bits; a negative number has all higher bits
    set, so cut the result to 32 bits at the end, as the original code does.
    Example: eight times 8 gives 0x77777777.
    Hint: & 0xFFFFFFFF.
    """
    ### BEGIN SOLUTION
    word = 0
    for i, z in enumerate(zero_points):
        word |= (z - 1) << (4 * i)
    return word & 0xFFFFFFFF
    ### END SOLUTION


# %% tags=["exercise-tests"]
def unpack_v1(word):
    """The 8 zero points of a word, the one added again."""
    return [((word >> (4 * i)) & 15) + 1 for i in range(8)]


assert pack_v1([8] * 8) == 0x77777777, "8 - 1 in every half byte"
good = [1, 5, 9, 16, 3, 2, 8, 15]
assert unpack_v1(pack_v1(good)) == good, "1 to 16 can be stored"
bad = [8, 0, 8, 3, 8, 8, 8, 8]
print("stored:", bad)
print("read:  ", unpack_v1(pack_v1(bad)))
assert pack_v1(bad) == 0xFFFFFFF7, "-1 has all its bits set: cut it to 32"
assert unpack_v1(pack_v1(bad))[1:] == [16] * 7, "it floods the word"
### BEGIN HIDDEN TESTS
assert pack_v1([1] + [8] * 7) == 0x77777770
### END HIDDEN TESTS

# %% [markdown]
# An asymmetric grid has the zero point 0 whenever a group holds no negative weight, so the trap is real: it and all zero points behind it in its word are lost.
#
# ## References
#
# - E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, ICLR
#   2023, arXiv 2210.17323 [@frantar2022gptq]; code at github.com/IST-DASLab/gptq.
# - E. Frantar, S. P. Singh, D. Alistarh, *Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning*, NeurIPS 2022,
#   arXiv 2208.11580 [@frantar2022obc].
# - B. Hassibi, D. G. Stork, *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon*, NeurIPS 1992 [@hassibi1992obs].
# - Y. Li, R. Yin, D. Lee, S. Xiao, P. Panda, *GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration*, ICML 2025,
#   arXiv 2504.02692 [@li2025gptaq].
# - J. Chen, Y. Shabanzadeh, E. Crnčević, T. Hoefler, D. Alistarh, *The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane
#   Algorithm*, arXiv 2507.18553 [@chen2025babai].
# - The libraries GPTQModel [@gptqmodel] and llm-compressor [@llmcompressor]; the models course-lm (trained by this project, see its model card) and
#   SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# `gptq_ablations`: what each part of the recipe is worth. `awq_demo`: the weights that matter most, found by looking at the activations.

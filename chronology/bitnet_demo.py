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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/bitnet_demo.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/bitnet_demo.ipynb)
#
# # BitNet: a language model that is ternary from birth
#
# *Large Model Quantization: a deep dive. Milestone 6 of the chronology (2023 to 2025).*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - round a matrix as BitNet b1.58 does [@ma2024era], and say why this is not the rounding of least error;
# - train through ternary codes with a straight-through gradient, and say what the float weights are for;
# - tell apart what the training does and what the rounding does, with a float twin as the control;
# - pack ternary weights in 2 and in 1.6 bits, and compute a whole model's linear layers by additions and subtractions;
# - answer a question that users ask: are the weights really ternary?
#
# It takes about 60 minutes to read and work. You need scales and codes (`linear_mapping`). The straight-through estimator comes from `ptq_vs_qat`, and is
# explained again.
# No profile needs a GPU; `quick` runs in under a minute, `cpu` in under five. In both you train models of your own.

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
import torch.nn.functional as F
import transformers
from course_utils.compression import QuantizedLinear, quantize_model
from course_utils.data.batches import TrainingBatches
from course_utils.data.corpora import documents
from course_utils.evaluation import Estimate, Text, compare_all, format_difference
from course_utils.finetuning import bitnet_lm
from course_utils.finetuning.bitnet import BitLinear, bitnet_model, prepare_bitnet
from course_utils.finetuning.conversion import convert
from course_utils.models import load_model
from course_utils.plotting import table, ternary
from course_utils.plotting.diagrams import four_matrices
from course_utils.profiles import resolve
from course_utils.results import record
from course_utils.training.loop import TrainConfig, train

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # not used: the models are this notebook's own
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# The milestones before this one compress a finished model. Below three bits that costs much, whatever the method. BitNet asks another question: can a language
# model be *trained* with weights
# that are only -1, 0 or 1, times one number for each matrix? Such a weight carries $\log_2 3 = 1.58$ bits. A product with it needs no multiplication.
#
# To answer it we need a fair comparison. Two **twins** have the same architecture, the same first weights, the same batches in the same order and the same
# number of updates. One has ternary linear
# layers, the other float ones. Each has the learning rate that was best for it. Then we ask the second question. If the ternary twin is good: is that the work
# of the training, or of the rounding?
#
# ## The rounding, by hand
#
# BitNet b1.58 has one scale for a whole matrix, the mean magnitude of its weights:
#
# $$ \gamma = \frac{1}{n} \sum_{ij} |W_{ij}|, \qquad q = \mathrm{clamp}\left(\mathrm{round}\left(\frac{W}{\gamma}\right), -1, 1\right), \qquad \hat W = \gamma\, q $$
#
# It is called **absmean**. Here are three rows of four weights.

# %% tags=["nbval-check-output"]
W = torch.tensor(
    [[1, -0.125, 0.375, -0.625], [0.25, 1.25, -0.375, 0], [-0.75, 0.625, -0.25, 0.375]]
)  # [out=3, in=4]
gamma = W.abs().mean()
q = (W / gamma).round().clamp(-1, 1)
print(f"gamma = {gamma.item()}")
print(q.int().tolist())

# %%
figure = four_matrices(W, q.int(), gamma * q)
plt.show()

# %% [markdown]
# *Figure: the 3 by 4 matrix as floats, as codes, as $\gamma q$ and as the error that is left ($S$ is gamma here, and $Z$ is 0). Red is positive and blue
# negative, but for the codes: there dark is 1.*
#
# All weights beyond half a gamma became plus or minus 0.5, however large they are. The two weights of exactly half a gamma became 0, since ties go to the even
# number. The package gives the same codes.

# %% tags=["nbval-check-output"]
from course_utils.quantizers.bitnet import ROUNDINGS, BitNet, quantize_tokens

packed = BitNet().quantize(W)
assert torch.equal(packed.trits(), q.char()) and packed.scale.item() == gamma
print(packed.trits().tolist(), packed.scale.item())

# %% [markdown]
# Is that a good rounding? On a million normal weights we compare it with the ternary codes and the scale of least squared error, which the package finds by
# trying all thresholds. The third row is **binary**,
# as the first BitNet was [@wang2023bitnet]: $\mathrm{sign}(W - \bar W)$ times the mean magnitude.

# %%
draw = torch.Generator().manual_seed(profile.seed)
normal = torch.randn(1000, 1000, generator=draw)
rows, of_normal = [], {}
for name in ("absmean", "least_squares", "binary"):
    codes, scale = ROUNDINGS[name](normal)
    of_normal[name] = (normal - codes * scale).square().mean().item()
    zeros = (codes == 0).float().mean().item()
    rows.append({"rounding": name, "squared error": of_normal[name], "zeros": zeros})
table(rows, {"squared error": ".3f", "zeros": ".0%"})

# %% tags=["folded"]
# Record the errors on normal weights.
for name, error in of_normal.items():
    record(f"bitnet.normal.{name}", error, "", 0.002, model="normal")

# %% [markdown]
# In the recorded run absmean leaves {{bitnet.normal.absmean:.3f}} of the weights' square, and the best ternary grid {{bitnet.normal.least_squares:.3f}}. So
# absmean is no good choice for rounding a
# *finished* matrix. Keep that in mind. BitNet's claim is that training makes up for it.
#
# ## Training through the codes
#
# A code does not change when a weight moves a little: the derivative of rounding is 0 wherever there is one. BitNet keeps a float weight beside, the **latent**
# weight. The forward pass computes with
# $\hat W$. The backward pass pretends that rounding was the identity, and gives the latent weight the gradient of $\hat W$. This is the **straight-through
# estimator**. No part of it is masked, not even where a
# code was clamped.
#
# The inputs are rounded as well, to 8 bits, with one scale for each *token*: $x_q = \mathrm{round}(127\, x / \max|x|)$. A norm stands before each such layer,
# so that tokens come in like sizes. There is no bias.


# %%
class TernaryLinear(torch.nn.Module):
    """BitNet's linear layer, for training: float in, float out."""

    def __init__(self, W):
        super().__init__()
        self.W = torch.nn.Parameter(W.clone())  # latent [out, in]

    def forward(self, x):
        gamma = self.W.abs().mean()
        W_hat = gamma * (self.W / gamma).round().clamp(-1, 1)
        S = 127 / x.abs().amax(-1, keepdim=True)  # [tokens, 1]
        x_hat = (x * S).round() / S
        straight = [
            v + (v_hat - v).detach() for v, v_hat in ((x, x_hat), (self.W, W_hat))
        ]
        return F.linear(*straight)


# %% [markdown]
# The line with `detach` is the whole trick: its value is `v_hat`, and its gradient is that of `v`. We compare with the package's layer, in outputs and in gradients.

# %%
W = torch.randn(96, 64, generator=draw) / 8
x, G = torch.randn(32, 64, generator=draw), torch.randn(32, 96, generator=draw)
ours, of_package = TernaryLinear(W), BitLinear(BitNet(), W)
for layer in (ours, of_package):
    layer(x).backward(G)  # G is the gradient of the output [tokens, out]
torch.testing.assert_close(ours(x), of_package(x), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(ours.W.grad, of_package.weight.grad, rtol=1e-5, atol=1e-5)
print(f"outputs and gradients agree; gradient of {ours.W[0, 0].item():+.3f}:", end=" ")
print(f"{ours.W.grad[0, 0].item():+.2f}, of its code alone 0")

# %% [markdown]
# Both layers agree to 1e-5. A latent weight that lies near a threshold can cross it after some updates, and its code jumps. Until then small gradients add up
# in it. That is what the float weights are for.
#
# ## Your own twins
#
# Now we train. The models are tiny: four blocks of width 64, and bytes as tokens, so that there are 256 of them. The architecture is that of BitNet b1.58 2B4T
# [@ma2025bitnet2b4t], as `transformers` has it: Llama's blocks with two more norms, before the attention's last and
# before the MLP's last linear layer, and squared ReLU. Embedding and LM head stay float.

# %%
seeds = range(profile.seed, profile.seed + profile.pick(quick=2, cpu=3))
updates, context = profile.pick(quick=20, cpu=200), 64


def as_bytes(document, n=None):
    """The bytes of a document as tokens, at most `n`."""
    return torch.tensor(list(document.text.encode())[:n])


# %%
stream = torch.cat([as_bytes(d) for d in documents("factbook", "train")[::4]])
length = profile.pick(quick=256, cpu=1024)
shares = [as_bytes(d, length) for d in documents("factbook", "evaluation")]
lengths = torch.tensor([len(share) for share in shares])
places = torch.arange(len(shares)).repeat_interleave(lengths)  # which country
byte_text = Text(torch.cat(shares), context, places)
print(f"{len(stream):,} bytes to train on, {len(byte_text.tokens):,} to evaluate")
print(f"the latter from {len(shares)} other countries")

# %% [markdown]
# Beside the twins we train three others, each with one thing changed. One has **binary** codes. Two follow advice on training. With **two stages** the rate
# drops midway, and so does the weight decay [@ma2025bitnet2b4t]. With a **warm-up of
# the quantization** the weights used slide from float to ternary over the first fifth [@medmekk2024extreme]. All see the same batches.

# %%
kinds = {
    "float": None,
    "ternary": BitNet(),
    "binary": BitNet(rounding="binary"),
    "two stages": BitNet(),
    "warm-up": BitNet(),
}


# %%
def new_twin(kind, seed):
    """A fresh model; for one seed all kinds begin with the same weights."""
    model = bitnet_model(64, vocabulary=256, context=context, seed=seed)
    if kinds[kind] is not None:
        prepare_bitnet(model, kinds[kind])
    return model.to(profile.device)


# %%
RATES = {"float": 6e-3, "ternary": 3e-3}  # the best of 4 for each, with seed 7, before


def settings(kind):
    """What the training loop takes: steps, rate and schedule."""
    rate = RATES["float" if kind == "float" else "ternary"]
    more = {"warmup": updates // 20, "decay": updates // 5, "eval_every": updates // 10}
    schedule = bitnet_lm.TwoStages if kind == "two stages" else TrainConfig
    return schedule(updates, rate, **more)


# %%
def trained(kind, seed):
    """A model after `updates` batches of 8 by 64 bytes, and its curve."""
    model = new_twin(kind, seed)
    batches = TrainingBatches(stream, context=context, batch_size=8, seed=seed)

    def batch(step):
        return batches(step).to(profile.device)

    slide = bitnet_lm.quantization_warmup(model, updates // 5)
    options = {"progress": False, "before_step": slide if kind == "warm-up" else None}
    return model, train(model, batch, settings(kind), **options)


# %%
own = {(kind, seed): trained(kind, seed) for kind in kinds for seed in seeds}


# %%
def curve(rows, value, tokens):
    """Millions of tokens seen, of `tokens` a step, and the values of a training."""
    return [row["step"] * tokens / 1e6 for row in rows], [row[value] for row in rows]


curves = {
    kind: [curve(own[kind, seed][1], "loss", 8 * context) for seed in seeds]
    for kind in ("ternary", "float")
}
figure = ternary.twin_curves(curves, "training loss (nats per byte)")
plt.show()

# %% [markdown]
# *Figure: on the left the training loss of your twins over the bytes they have seen, a line for each seed. On the right the ternary loss less the float one.*
#
# Both kinds learn, and their curves run together. Now text that nobody was trained on. Each model is compared with the float twin of its own seed, on the same
# bytes. The ± is one standard error over the *seeds*.


# %%
def over_seeds(values):
    """Mean and standard error over seeds."""
    values = torch.tensor(values).double()
    error = values.std().item() / len(values) ** 0.5
    return Estimate(values.mean().item(), error, len(values), "seeds")


# %%
others = [kind for kind in kinds if kind != "float"]
of_seed = {}
for seed in seeds:
    rivals = {kind: own[kind, seed][0] for kind in others}
    of_seed[seed] = compare_all(rivals, own["float", seed][0], byte_text)
gaps = {k: over_seeds([of_seed[s][k].loss.value for s in seeds]) for k in others}

# %%
nats = {k: [of_seed[s][k].perplexity.nats for s in seeds] for k in others}
nats["float"] = [of_seed[s]["ternary"].reference.nats for s in seeds]
rows = []
for kind in kinds:
    gap = format_difference(gaps[kind]) if kind in gaps else ""
    per_byte = over_seeds(nats[kind]).value / math.log(2)
    rows.append({"model": kind, "bits per byte": per_byte, "nats less float": gap})
table(rows, {"bits per byte": ".3f"})

# %% tags=["folded"]
# Controls against the ternary twin, and the records of both.
pairs = {
    kind: over_seeds(
        [of_seed[s][kind].loss.value - of_seed[s]["ternary"].loss.value for s in seeds]
    )
    for kind in kinds
    if kind not in ("float", "ternary")
}
by = {"model": "bytes-64", "updates": updates, "seeds": len(seeds)}


def record_estimate(key, estimate, tolerance=0.3, **by):
    """Value under `key`, standard error under `key` with _error."""
    record(key, estimate.value, "nats", tolerance, **by)
    record(f"{key}_error", estimate.error, "nats", tolerance, **by)


for row, kind in zip(rows, kinds, strict=True):
    key = f"bitnet.own.{kind.replace(' ', '_')}"
    record(f"{key}.bits_per_byte", row["bits per byte"], "bits", 0.4, **by)
    if kind != "float":
        record_estimate(f"{key}.less_float", gaps[kind], **by)
    if kind in pairs:
        record_estimate(f"{key}.less_ternary", pairs[kind], **by)
table(
    [
        {"less ternary": k, "nats per byte": format_difference(e)}
        for k, e in pairs.items()
    ]
)

# %% [markdown]
# In the recorded run the ternary twin ends {{bitnet.own.ternary.less_float:+.3f}} ± {{bitnet.own.ternary.less_float_error:.3f}} nats per byte from the float
# one, over {{bitnet.own.settings.seeds:.0f}} seeds.
# Against the ternary twin the binary one is at {{bitnet.own.binary.less_ternary:+.3f}} ± {{bitnet.own.binary.less_ternary_error:.3f}}, two stages at
# {{bitnet.own.two_stages.less_ternary:+.3f}} ± {{bitnet.own.two_stages.less_ternary_error:.3f}} and the warm-up at {{bitnet.own.warm-up.less_ternary:+.3f}} ±
# {{bitnet.own.warm-up.less_ternary_error:.3f}}.
#
# Neither the twins nor the binary models nor the warm-up are distinguished here. Two stages are worse. A likely reason: their rate falls to a third
# midway, when such short runs have only begun to learn. That is no verdict on long runs.
#
# Three seeds tell an error only roughly. So take this as practice; twins that saw more text come below. Each kind's rate is the best of 0.0015, 0.003, 0.006
# and 0.012 in one run with another seed. The last three kinds have the ternary twin's.
#
# ## Are the weights really ternary?
#
# People who open a BitNet checkpoint find floats in it, and ask whether the weights are ternary at all [@rkinas2024ternary]. Here are eight latent weights of
# your own model, and what the layer computes with.

# %%
seed = profile.seed
model = own["ternary", seed][0]
layer = model.model.layers[0].mlp.up_proj
weight = layer.quantized_weight()
gamma, trits = weight.scale.item(), weight.trits()[0, :8].tolist()
rows = [
    {"latent": w, "latent / gamma": w / gamma, "code": t, "used": t * gamma}
    for w, t in zip(layer.weight[0, :8].tolist(), trits, strict=True)
]
table(rows, {"latent": "+.4f", "latent / gamma": "+.2f", "used": "+.4f"})

# %%
start = new_twin("ternary", seed).model.layers[0].mlp.up_proj
ratios = {
    title: (m.weight / m.weight.abs().mean()).detach().cpu()
    for title, m in (("before training", start), ("after training", layer))
}
figure = ternary.latent_weights(ratios)
plt.show()
codes = [ratio.round().clamp(-1, 1) for ratio in ratios.values()]
moved = (codes[0] != codes[1]).float().mean().item()
print(f"{moved:.0%} of the codes are others than at the start")

# %% [markdown]
# *Figure: histograms of the latent weights of one matrix in units of gamma, before and after training, coloured by code. Dashed lines are the thresholds at
# half a gamma.*
#
# The latent weights are floats of all sizes, and the layer uses three values. Both are true: the floats are the optimizer's memory, and are thrown away at the
# end. In the recorded run {{bitnet.own.moved:.0%}} of
# this matrix's codes changed in training. What is left is packed, and computes the same.

# %%
integers = copy.deepcopy(model)
report = convert(integers)  # latent weights out, packed codes in
print(f"{len(report.layers)} layers, {report.bits_per_weight:.3f} bits per weight")

# %%
apart = []


def compare_layer(name):
    """A hook that gives the packed layer the same input, and compares the outputs."""

    def hook(module, args, output):
        packed = integers.get_submodule(name)(args[0])
        apart.append(((packed - output).abs().max() / output.abs().max()).item())

    return hook


# %%
ids = byte_text.tokens[:64][None].to(profile.device)
hooks = [
    m.register_forward_hook(compare_layer(name))
    for name, m in model.named_modules()
    if isinstance(m, BitLinear)
]
with torch.no_grad():
    in_training = model(input_ids=ids).logits[0]
    in_integers = integers(input_ids=ids).logits[0]
for hook in hooks:
    hook.remove()

# %%
assert max(apart) < 1e-5
of_tokens = (in_integers - in_training).abs().amax(-1)  # [tokens]
print(f"layer by layer, of the largest output: {max(apart):.0e}")
print(
    f"logits, at most {of_tokens.max():.0e}; {(of_tokens < 1e-4).float().mean():.0%}",
    end=" ",
)
print(f"of the bytes within 1e-4, where logits reach {in_training.abs().max():.1f}")

# %% tags=["folded"]
# Record what happened to the codes, and how far both ways are apart.
record("bitnet.own.moved", moved, "", 0.15, model="bytes-64")
record("bitnet.own.settings.seeds", len(seeds), "", 0, model="bytes-64")
record("bitnet.own.settings.bytes", updates * 512, "", 0, model="bytes-64")
record("bitnet.own.layers_apart", max(apart), "", 1e-5, model="bytes-64")
record("bitnet.own.logits_apart", of_tokens.max().item(), "", model="bytes-64")
within = (of_tokens < 1e-4).float().mean().item()
record("bitnet.own.within", within, "", model="bytes-64")

# %% [markdown]
# The packed model sums int8 codes in int32, with no float until the end of a sum. Training computes in float32 with values on the same grids. On the same input
# a layer's outputs may differ by the last digits of float sums: we allow 1e-5 of the largest, and the
# recorded run has {{bitnet.own.layers_apart:.0e}}.
#
# Over the whole model such a digit can turn an int8 code of the next layer, where an input lies just between two codes. That changes logits by more than a last
# digit. In the recorded run {{bitnet.own.within:.0%}} of the bytes have logits within 1e-4, and the
# largest difference is {{bitnet.own.logits_apart:.0e}}.
#
# ## Twins that were trained for longer
#
# Your models saw little text. The course ships a pair of width 128, trained by `course train-bitnet` from three seeds, on 4 million tokens of the Factbook and
# of presidents' addresses. It uses the tokenizer of
# `course-lm`. The logs of all runs are shipped, and the weights of this pair's first seed.

# %%
logs = bitnet_lm.shipped_logs()


def runs(size, kind, tokens):
    """Logs of one size and kind, ordered by learning rate and seed."""
    of = [log for log in logs.values() if log["run"]["advice"] == "none"]
    of = [log for log in of if (log["run"]["size"], log["run"]["kind"]) == (size, kind)]
    of = [log for log in of if log["run"]["tokens"] == tokens]
    return sorted(of, key=lambda log: (log["settings"]["lr"], log["run"]["seed"]))


# %%
long = {kind: runs("small", kind, 4_000_000) for kind in ("ternary", "float")}
figure = ternary.twin_curves(
    {
        k: [curve(log["curve"], "held_out", 2048) for log in of]
        for k, of in long.items()
    },
    "held-out loss (nats per token)",
)
plt.show()

# %% [markdown]
# *Figure: held-out loss of the shipped twins over the tokens seen, three seeds each, and the ternary loss less the float one.*
#
# In the first half million tokens the ternary twins are ahead; their learning rate is twice that of the float ones. Then the curves cross. On the right the
# lines of the single seeds spread by more than their mean lies from 0.

# %% [markdown]
# There are pairs of three sizes: widths 64, 128 and 192. Each size chose its learning rates in the same way. The two smaller ones have three seeds.

# %%
rows, apart_of = [], {}
for size in ("tiny", "small", "medium"):
    of = {kind: runs(size, kind, 4_000_000) for kind in ("ternary", "float")}
    for a, b in zip(*of.values(), strict=True):
        n, seed = a["parameters"], a["run"]["seed"]
        losses = {kind: log["held_out"] for kind, log in zip(of, (a, b), strict=True)}
        less = losses["ternary"] - losses["float"]
        rows.append({"parameters": n, "seed": seed} | losses | {"difference": less})
        apart_of.setdefault(n, []).append(less)
table(
    rows,
    {"parameters": ","}
    | dict.fromkeys(("ternary", "float"), ".3f")
    | {"difference": "+.3f"},
)

# %%
gap_of = {n: over_seeds(found) for n, found in apart_of.items() if len(found) > 1}
for n, gap in gap_of.items():
    print(f"ternary less float, {n:,} parameters: {format_difference(gap)}")
figure = ternary.gaps_by_size(apart_of)
plt.show()

# %% [markdown]
# *Figure: held-out loss of the ternary twin less that of its float twin, over the number of parameters. A dot is a pair of one seed; a line is the mean of three
# seeds, with one standard error on each side.*

# %% tags=["folded"]
# Record the gaps of the shipped twins.
by = {"model": "bitnet-small", "tokens": 4_000_000}
nats = {kind: [log["held_out"] for log in of_kind] for kind, of_kind in long.items()}
for size, n in zip(("tiny", "small", "medium"), apart_of, strict=True):
    of_size = {"model": f"bitnet-{size}"}
    record(f"bitnet.{size}.parameters", n, "", 0, **of_size)
    if n in gap_of:
        record_estimate(f"bitnet.{size}.gap", gap_of[n], 1e-6, **of_size)
    else:
        record(f"bitnet.{size}.gap", apart_of[n][0], "nats", 1e-6, **of_size)
    for name, found in (("least", min(apart_of[n])), ("most", max(apart_of[n]))):
        record(f"bitnet.{size}.gap_{name}", found, "nats", 1e-6, **of_size)
spread = max(max(of_kind) - min(of_kind) for of_kind in nats.values())
record("bitnet.small.spread", spread, "nats", 1e-6, **by)

# %% tags=["folded"]
# Record the twins of each kind: held-out loss, rates, time.
for kind, of_kind in long.items():
    record_estimate(f"bitnet.small.{kind}.held_out", over_seeds(nats[kind]), 1e-6, **by)
    record(f"bitnet.small.{kind}.lr", of_kind[0]["settings"]["lr"], "", 0, **by)
    seen = of_kind[0]["settings"]["steps"] * 2048
    rates = [seen / log["cpu_seconds"] for log in of_kind]
    record(
        f"bitnet.small.{kind}.tokens_per_cpu_second",
        sum(rates) / len(rates),
        "",
        1,
        **by,
    )
    minutes = [log["seconds"] / 60 for log in of_kind]
    record(f"bitnet.small.{kind}.minutes", sum(minutes) / len(minutes), "min", 1, **by)
linear_share = 52 * 128**2 / long["float"][0]["parameters"]
record("bitnet.small.linear_share", linear_share, "", 0, **by)

# %% [markdown]
# In the recorded run the pairs of {{bitnet.small.parameters:,.0f}} parameters are {{bitnet.small.gap:+.3f}} ± {{bitnet.small.gap_error:.3f}} nats per token apart, and those
# of {{bitnet.tiny.parameters:,.0f}} are {{bitnet.tiny.gap:+.3f}} ± {{bitnet.tiny.gap_error:.3f}}: neither size is distinguished from 0. (A pair shares its seed, so the
# difference is taken pair by pair.) The one pair of {{bitnet.medium.parameters:,.0f}} is {{bitnet.medium.gap:+.3f}} apart, which lies between the pairs of the tiny size,
# {{bitnet.tiny.gap_least:+.3f}} and {{bitnet.tiny.gap_most:+.3f}}.
#
# So the ternary twins are as good to within a tenth of a nat, at each size. That is no proof that they are equal: a gap of 0.05 would hide in these errors. And no
# trend with size can be seen. The authors' gap closes as models grow [@ma2024era], but their sizes go from 700 million parameters to 3 billion.
#
# The ternary run had a higher learning rate: {{bitnet.small.ternary.lr:g}} against {{bitnet.small.float.lr:g}}. It took {{bitnet.small.ternary.minutes:.0f}}
# minutes against {{bitnet.small.float.minutes:.0f}} on two busy cores: rounding weights and inputs at
# every step costs time, and nothing is saved in training.
#
# ### Which learning rate?
#
# The authors advise a high peak for the rate, two stages of rate and weight decay, and no weight decay in the second [@ma2025bitnet2b4t]. We can say something
# on the peak. Each size and kind had short runs of half a
# million tokens, one seed each, and took its best rate for the long run.

# %%
rows = []
for size in ("tiny", "small", "medium"):
    for kind in ("ternary", "float"):
        of = runs(size, kind, 500_000)
        rows.append({"size": size, "kind": kind})
        rows[-1] |= dict.fromkeys(("0.00075", "0.0015", "0.003", "0.006"))
        rows[-1] |= {f"{log['settings']['lr']:g}": log["held_out"] for log in of}
table(rows, dict.fromkeys(("0.00075", "0.0015", "0.003", "0.006"), ".3f"))

# %% [markdown]
# Held-out loss by learning rate. At all three sizes the best rate of the ternary twin is twice that of the float one, which agrees with the advice. With one seed a
# cell, and with gaps as small as 0.02, it is a hint. In your byte models it was the other way round: 0.003 for ternary, 0.006 for float.
#
# ### The advice, and what could be left out
#
# The rest of the advice was tried on the pair of width 128 with a million tokens, one seed: two stages for both twins, and the warm-up of the quantization. The same
# table holds three ternary models of other kinds: float inputs instead of int8, a gamma for each row, and binary codes. Each is compared with the plain model
# of its twin.

# %%
of_short = [log for log in logs.values() if log["run"]["tokens"] == 1_000_000]
keys = [(log["run"]["kind"], log["run"]["advice"]) for log in of_short]
short = dict(zip(keys, [log["held_out"] for log in of_short], strict=True))
plain = {kind: short[kind, "none"] for kind in ("ternary", "float")}
rows = []
for (kind, advice), held_out in sorted(short.items(), key=lambda item: item[1]):
    less = held_out - plain["float" if kind == "float" else "ternary"]
    row = {"kind": kind.replace("_", ", "), "advice": advice.replace("_", " ")}
    rows.append(row | {"held-out loss": held_out, "less plain": less})
table(rows, {"held-out loss": ".3f", "less plain": "+.3f"})

# %% tags=["folded"]
# Record the short runs, against the plain model of the same twin.
for (kind, advice), held_out in short.items():
    key = f"bitnet.short.{kind}.{advice}"
    less = held_out - plain["float" if kind == "float" else "ternary"]
    record(f"{key}.held_out", held_out, "nats", 1e-6, model="bitnet-small")
    record(f"{key}.less_plain", less, "nats", 1e-6, model="bitnet-small")

# %% [markdown]
# How far apart are two seeds? In the recorded run twins of one kind differed by up to {{bitnet.small.spread:.2f}} nats in the long runs. Only the two stages are beyond that:
# {{bitnet.short.ternary.two_stages.less_plain:+.2f}} for the ternary twin, and {{bitnet.short.float.two_stages.less_plain:+.2f}} for the float one. They cost both, so it is the
# short schedule, whose rate falls to a third midway, and not the ternary weights.
#
# All else lies within {{bitnet.short.ternary_weights.none.less_plain:+.3f}} and 0: the warm-up, float inputs, a gamma for each row, even binary codes. With one seed they are
# not distinguished. So the int8 inputs cost nothing that we can see. Hugging Face needed the warm-up to *fine-tune* Llama 3 8B into ternary, and reports that it gave
# nothing on a model of 135M parameters [@medmekk2024extreme]. The ratios in the package's `TwoStages` come from a third party's reading of the authors' training
# tips, which we could not read ourselves.
#
# ## Is it the training, or the rounding?
#
# Here is the control that matters. The *float* twin gets the very same rounding after its training. If the rounding were harmless, it would stay as good as it was.

# %%
tokenizer = load_model("course-lm").tokenizer
float_twin, ternary_twin = (
    bitnet_lm.shipped_model(f"small-{kind}-4M-seed0").to(profile.device)
    for kind in ("float", "ternary")
)
protocol = profile.protocol(float_twin)
text = protocol.text(tokenizer)

# %%
after = {
    "absmean": {},
    "absmean, gamma per row": {"rounding": "row_absmean"},
    "least squares": {"rounding": "least_squares"},
    "binary": {"rounding": "binary"},
    "absmean, float inputs": {"inputs": "float"},
}
speaking = {"float twin": float_twin, "ternary twin": ternary_twin}
for label, settings in after.items():
    rounded = bitnet_lm.shipped_model("small-float-4M-seed0").to(profile.device)
    quantize_model(rounded, BitNet(**settings))
    speaking[f"float twin, then {label}"] = rounded
rivals = {label: m for label, m in speaking.items() if m is not float_twin}
found = compare_all(rivals, float_twin, text)


# %%
def packed_layers(model):
    """The packed weights of a model, by name."""
    modules = model.named_modules()
    return {n: m.quantized_weight for n, m in modules if isinstance(m, QuantizedLinear)}


def bits(weights):
    """Bits per weight of packed weights, scales included."""
    nbytes = sum(w.nbytes for w in weights.values())
    return 8 * nbytes / sum(w.shape[0] * w.shape[1] for w in weights.values())


# %%
predicted = torch.arange(len(text.tokens)) % text.window != 0
n_bytes = len(tokenizer.decode(text.tokens[predicted]).encode())


def quality(label, n_bits, perplexity, lost=""):
    """A row of the table; bits per byte are those of the predicted tokens."""
    per_byte = perplexity.total_nats / math.log(2) / n_bytes
    of = {"model": label, "bits per weight": n_bits, "nats lost": lost}
    return of | {"perplexity": perplexity.perplexity, "bits per byte": per_byte}


# %%
rows = [quality("float twin", 32, next(iter(found.values())).reference)]
for label, of in found.items():
    n_bits = bits(packed_layers(rivals[label]))
    rows.append(quality(label, n_bits, of.perplexity, format_difference(of.loss)))
print(protocol)
table(rows, {"bits per weight": ".2f", "perplexity": ",.1f", "bits per byte": ".3f"})

# %% tags=["folded"]
# Record quality on the Factbook, of the twins and of what rounding afterwards makes.
keys = (
    "float",
    "ternary",
    "absmean",
    "rows",
    "least_squares",
    "binary",
    "float_inputs",
)
by = {"model": "bitnet-small", **protocol.fields}
for key, row in zip(keys, rows, strict=True):
    ppl, stem = row["perplexity"], f"bitnet.after.{key}"
    record(f"{stem}.perplexity", ppl, "", 0.05 * ppl, **by)
    record(f"{stem}.bits_per_byte", row["bits per byte"], "bits", 0.05, **by)
    record(f"{stem}.bits_per_weight", row["bits per weight"], "bits", 0.001, **by)
    if key == "float":  # against itself
        record(f"{stem}.loss", 0.0, "nats", 0, **by)
        record(f"{stem}.loss_error", 0.0, "nats", 0, **by)
    else:
        of = found[row["model"]]
        tolerance = 0.02 + 0.05 * abs(of.loss.value)
        record_estimate(f"{stem}.loss", of.loss, tolerance, **by)

# %%
named = {"trained ternary": found["ternary twin"]} | {
    label.removeprefix("float twin, then "): of
    for label, of in found.items()
    if "then" in label
}
figure = ternary.estimates(
    {label: (of.loss.value, of.loss.error) for label, of in named.items()},
    "nats lost per token against the float twin (bars: 2 standard errors)",
)
plt.show()

# %% [markdown]
# *Figure: nats lost per token against the float twin. The first row was trained with ternary weights. The others are the float twin, rounded afterwards in five
# ways.*
#
# In the recorded run the trained ternary twin of seed 0 lies {{bitnet.after.ternary.loss:+.3f}} ± {{bitnet.after.ternary.loss_error:.3f}} nats from the float
# twin on the Factbook. That error is over documents, and another
# seed moves the difference more. Rounding afterwards costs {{bitnet.after.absmean.loss:.2f}} ± {{bitnet.after.absmean.loss_error:.2f}}: the perplexity goes
# from {{bitnet.after.float.perplexity:.0f}} to
# {{bitnet.after.absmean.perplexity:,.0f}}. So the training does it.
#
# A better rounding does not rescue the float twin. With the least squared error it still loses {{bitnet.after.least_squares.loss:.2f}} ±
# {{bitnet.after.least_squares.loss_error:.2f}} nats, with a gamma for each row
# {{bitnet.after.rows.loss:.2f}} ± {{bitnet.after.rows.loss_error:.2f}}, and binary {{bitnet.after.binary.loss:.2f}} ± {{bitnet.after.binary.loss_error:.2f}}.
# The 8-bit inputs are not to blame: with float inputs it
# is {{bitnet.after.float_inputs.loss:.2f}} ± {{bitnet.after.float_inputs.loss_error:.2f}}. Now let the models speak.

# %%
from course_utils.evaluation import continuations, prompt_of

shown = {
    label: speaking[label]
    for label in (
        "float twin",
        "ternary twin",
        "float twin, then absmean",
        "float twin, then least squares",
    )
}
print(continuations(shown, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %% [markdown]
# With 1.4 million parameters and the likeliest token every time, both twins fall into a loop soon. But they write phrases of the Factbook's kind. The float
# twin that was rounded afterwards knows a few words, and repeats them.
#
# ## In bytes
#
# Three values need less than two bits. Four trits go into a byte at **2 bits** each. And since $3^5 = 243$ is not more than 256, *five* go into a byte, at
# **1.6 bits** each; the least possible is 1.585. Reading five trits
# again would take divisions by 3. llama.cpp's format TQ1_0 avoids them [@compilade2024ternary]. It stores $\lceil 256\, v / 243 \rceil$ for the number $v$ of
# five ternary digits, as if it were a fraction. Three times that
# fraction has the first digit before the point, and so on.

# %%
trits = ternary_twin.model.layers[0].self_attn.q_proj.quantized_weight.trits()
figure = ternary.trits_in_bytes(trits[0, :20].cpu())
plt.show()

# %% [markdown]
# *Figure: twenty trits of the shipped model, in five bytes of four (above, the first trit in the lowest bits, on the right) and in four bytes of five (below).
# The last row multiplies the first of these bytes by 3 five times,
# and each time a digit comes out above 256.*
#
# What does the whole model weigh? Scales and the float embedding count.

# %%
from course_utils.kernels import add_subtract, int8_matmul, pack_trits

layers = packed_layers(ternary_twin)
weights = sum(w.trits().numel() for w in layers.values())
rest = 2 * (logs["small-ternary-4M-seed0"]["parameters"] - weights)  # float16

# %%
packings = {"float16": 2 * weights}
for label, packing in (("2 bits", "2bit"), ("1.6 bits", "base3")):
    packings[label] = sum(
        pack_trits(w.trits(), packing).numel() + 4 * w.scale.numel()
        for w in layers.values()
    )
rows = [
    {
        "stored as": k,
        "linear layers": n,
        "bits per weight": 8 * n / weights,
        "whole model": n + rest,
    }
    for k, n in packings.items()
]
table(rows, {"linear layers": ",", "bits per weight": ".3f", "whole model": ","})

# %% tags=["folded"]
# Record the bytes.
for row, key in zip(rows, ("float16", "two", "base3"), strict=True):
    for part in ("linear layers", "whole model"):
        record(
            f"bitnet.bytes.{key}.{part.split()[0]}",
            row[part],
            "bytes",
            0,
            model="bitnet-small",
        )
    record(
        f"bitnet.bytes.{key}.bits_per_weight",
        row["bits per weight"],
        "bits",
        0.001,
        model="bitnet-small",
    )
record(
    "bitnet.bytes.whole_share",
    rows[2]["whole model"] / rows[0]["whole model"],
    "",
    0.001,
    model="bitnet-small",
)

# %% [markdown]
# One scale of 4 bytes for a matrix hardly counts: {{bitnet.bytes.two.bits_per_weight:.3f}} and {{bitnet.bytes.base3.bits_per_weight:.3f}} bits per weight in
# the recorded run, where rows do not always
# fill their last byte. But the whole model only shrinks to {{bitnet.bytes.whole_share:.0%}} of the float16 twin. The float embedding of 4,096 tokens outweighs
# all ternary layers. In a model of billions of parameters it is a small part.
#
# ## Additions and subtractions
#
# Multiplying by -1, 0 or 1 is no multiplication. One output of a ternary layer adds the inputs at weights of 1, subtracts those at -1 and skips the rest.

# %%
codes, _ = quantize_tokens(torch.randn(1, 8, generator=draw))
figure = ternary.signed_sum(codes[0].char(), trits[0, :8].cpu())
plt.show()

# %% [markdown]
# *Figure: eight int8 inputs and eight trits. The inputs at +1 go into one sum, those at -1 into another, and the output is the first less the second.*
#
# Does that hold for a whole model? A hook replaces what each of the 28 layers puts out by sums without a product: `add_subtract` from the package. Two scales
# come at the end, one for the token and one for the matrix.


# %%
def by_additions(module, args, output):
    """The layer's output again, from sums and differences of int8 codes."""
    weight, x = module.quantized_weight, args[0]
    codes, inverse = quantize_tokens(x.flatten(0, -2).float())
    codes, trits = codes.char(), weight.trits()
    sums = add_subtract(codes, trits)  # int32 [tokens, out]
    assert torch.equal(sums, int8_matmul(codes, trits))
    return (sums / inverse * weight.scale.T).view(output.shape)


# %%
modules = [m for m in ternary_twin.modules() if isinstance(m, QuantizedLinear)]
ids = text.tokens[:32][None].to(profile.device)
with torch.no_grad():
    by_product = ternary_twin(input_ids=ids).logits
    hooks = [m.register_forward_hook(by_additions) for m in modules]
    by_sums = ternary_twin(input_ids=ids).logits
for hook in hooks:
    hook.remove()
assert torch.equal(by_sums, by_product)
print(f"{len(modules)} layers without a multiplication: the same logits, bit for bit")

# %% [markdown]
# Integer sums do not depend on their order, so the logits are equal to the last bit.
#
# How many operations does a token take? We count the last of 256 tokens. A float layer multiplies and adds for each weight. A ternary one adds or subtracts
# where the trit is not 0. It multiplies once for each input, to put it on the int8 grid, and twice for each
# output. LM head and attention are float in both twins.

# %%
weights_of = [w.trits() for w in layers.values()]
edges = sum(w.shape[1] + 2 * w.shape[0] for w in weights_of)
head = 4096 * 128
attention = 4 * 2 * 256 * 128  # scores and values, in four blocks

# %%
counts = {
    "linear layers": (
        weights,
        weights,
        edges,
        sum(int((w != 0).sum()) for w in weights_of),
    ),
    "LM head": (head,) * 4,
    "attention": (attention,) * 4,
}
counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
columns = ("float: times", "float: plus", "ternary: times", "ternary: plus or minus")
rows = [
    {"part": part} | dict(zip(columns, n, strict=True)) for part, n in counts.items()
]
table(rows, dict.fromkeys(columns, ","))

# %% tags=["folded"]
# Record the counts.
for part in ("linear layers", "all"):
    of = dict(
        zip(
            ("float_times", "float_plus", "ternary_times", "ternary_plus"),
            counts[part],
            strict=True,
        )
    )
    for key, n in of.items():
        record(f"bitnet.counts.{part.split()[0]}.{key}", n, "", 0, model="bitnet-small")
share = counts["linear layers"][2] / counts["linear layers"][0]
record("bitnet.counts.linear.times_share", share, "", 0.0001, model="bitnet-small")
record(
    "bitnet.counts.all.times_share",
    counts["all"][2] / counts["all"][0],
    "",
    0.0001,
    model="bitnet-small",
)
zeros = 1 - counts["linear layers"][3] / weights
record("bitnet.counts.zeros", zeros, "", 0.0001, model="bitnet-small")

# %% [markdown]
# In the recorded run {{bitnet.counts.linear.times_share:.1%}} of the linear layers' multiplications are left, and {{bitnet.counts.zeros:.0%}} of their
# additions fall away with the zeros. Over the whole small model
# {{bitnet.counts.all.times_share:.0%}} of the multiplications stay, in the LM head and the attention.
#
# What is that worth? We measured no energy. A table for a 45 nm process has 3.7 pJ for a product of 32-bit floats, and 0.03 pJ for an addition of 8-bit
# integers [@horowitz2014energy]. (Our sums have 32 bits, and cost more than that.) But a read of 32 bits from DRAM costs 640 pJ there. So for one user the
# saved bytes
# count more than the saved products. In PyTorch nothing here is faster: it has no kernel for trits.
#
# ## In the formats of llama.cpp and transformers
#
# llama.cpp cuts a row into blocks of 256 weights, with a float16 scale in each. TQ2_0 takes 66 bytes for a block and TQ1_0 54. We write layers of the shipped
# model in both, and compare with its own Python package, `gguf`.

# %% tags=["folded"]
# The package's blocks against those of gguf.
import gguf
from course_utils.formats.ternary import to_tq1_0, to_tq2_0, to_transformers

weight = next(iter(layers.values()))
joined = weight.trits().cpu().reshape(-1, 256)  # width 128: two rows fill a block
scale = weight.scale.cpu()
rows = []
for name, write in (("TQ2_0", to_tq2_0), ("TQ1_0", to_tq1_0)):
    stored = write(joined, scale).numpy()
    kind = gguf.GGMLQuantizationType[name]
    theirs = gguf.quants.quantize((scale * joined).numpy(), kind)
    n_bits = 8 * stored.size / joined.numel()
    row = {"format": f"llama.cpp {name}", "bits per weight": n_bits}
    rows.append(row | {"equal bytes": bool((stored == theirs).all())})

# %% tags=["folded"]
# The package's bytes against those of transformers.
from transformers.integrations.bitnet import pack_weights

with torch.compiler.set_stance("force_eager"):  # it would compile this function
    theirs = pack_weights(weight.trits().cpu())
n_bits = 8 * theirs.numel() / joined.numel()
row = {"format": "transformers, the scale beside", "bits per weight": n_bits}
same = torch.equal(to_transformers(weight.trits().cpu()), theirs)
rows.append(row | {"equal bytes": same})
assert all(row["equal bytes"] for row in rows)
table(rows, {"bits per weight": ".4f"})

# %% [markdown]
# All three agree, byte for byte. (Our rows of 128 are joined in twos to fill a block.) Two traps lie in `transformers`. Its class `BitLinear` *divides* by
# `weight_scale`, and `AutoBitLinear` *multiplies*, so one name holds
# $1 / \gamma$ or $\gamma$. And `pack_weights` adds 1 to its input in place: who goes on with that tensor has other weights. The tests of the course hold codes,
# bytes and outputs of both classes against ours.
#
# ## What others report
#
# These figures are not ours. The b1.58 paper compares models of equal size trained on 100 billion tokens. Here are its perplexities, as the card of a
# reproduction quotes them, and the reproduction's own [@bitnetrepro]:
#
# | parameters | float | ternary | ternary, reproduced |
# | --- | --- | --- | --- |
# | 700M | 12.33 | 12.87 | 12.78 |
# | 1.3B | 11.25 | 11.29 | 11.19 |
# | 3B | 10.04 | 9.91 | 9.88 |
#
# The gap closes with size there. Our three sizes are far too small, and our seeds too few, to show such a trend.
#
# The first BitNet was binary [@wang2023bitnet]. BitNet b1.58 2B4T has 2 billion parameters, trained on 4 trillion tokens [@ma2025bitnet2b4t]. The authors'
# kernels for CPUs report 1.37 to 5.07 times the speed on ARM and 2.37 to
# 6.17 on x86, with 55.4% to 82.2% less energy [@wang2024bitnetcpp].
#
# ## What you saw
#
# - **Absmean is a poor rounding.** On normal weights it leaves {{bitnet.normal.absmean:.3f}} of the square, where {{bitnet.normal.least_squares:.3f}} is
#   possible with three levels in the recorded run.
# - **Training makes it work.** From three seeds the shipped twins are {{bitnet.small.gap:+.3f}} ± {{bitnet.small.gap_error:.3f}} nats apart: not distinguished. Nor are
#   they at half the width.
#   The float twin, rounded afterwards, lost
#   {{bitnet.after.absmean.loss:.2f}} ± {{bitnet.after.absmean.loss_error:.2f}}, and with the least squared error still {{bitnet.after.least_squares.loss:.2f}}
#   ± {{bitnet.after.least_squares.loss_error:.2f}}.
# - **The latent weights are floats, the layer is ternary.** After training the floats are thrown away, and each layer gives the same outputs within
#   {{bitnet.own.layers_apart:.0e}} in the recorded run.
# - **1.6 bits are real bytes.** The linear layers take {{bitnet.bytes.base3.bits_per_weight:.3f}} bits per weight, scales included; the small model as a whole
#   {{bitnet.bytes.whole_share:.0%}} of float16.
# - **No product is needed.** All 28 layers gave the same logits by additions and subtractions. {{bitnet.counts.linear.times_share:.1%}} of the products of
#   those layers remain.
#
# ## Limits
#
# - Twins of up to 2.7 million parameters on 4 million tokens say little about billions. With three seeds we can see gaps of about 0.06 nats, and no smaller ones.
# - The model must be trained so, from the start or nearly. In training it is no smaller and no faster than a float model: latent weights, gradients and
#   optimizer states are floats.
# - Embedding and LM head are float. In a small model they outweigh the rest.
# - Your own models are short runs. Binary codes, two stages and the warm-up had the ternary twin's rate, not their own best.
# - The advice, the gamma for each row, the float inputs and the binary codes were trained with one seed and a million tokens. Least squares was measured as a
#   rounding after training only.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: which way does the scale go?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# A well-known post gives the scale of absmean as $s = 1 / \mathrm{mean}|W|$, rounds $W s$, and then prints $\hat W = q\, s$ [@medmekk2024extreme]. Its code is
# right, its formula is not. Write the values on the grid.


# %% tags=["exercise"]
def on_grid(W, epsilon=1e-5):
    """The values that absmean makes of `W` `[out, in]`, in its dtype.

    Approach: gamma = mean |W| over the whole matrix, at least `epsilon`; codes are
    round(W / gamma), clamped to -1..1; a code stands for gamma times itself.
    Example: [[3.0, -1.0]] gives [[2.0, 0.0]]: gamma is 2, and -1 / 2 rounds to 0.
    Hint: the largest value on the grid is gamma, not 1 / gamma.
    """
    ### BEGIN SOLUTION
    gamma = W.abs().mean().clamp(min=epsilon)
    return gamma * (W / gamma).round().clamp(-1, 1)
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = on_grid(torch.tensor([[3.0, -1.0]]))
assert found.tolist() != [[0.5, 0.0]], "q times 1 / gamma: multiply by gamma instead"
assert found.tolist() != [[4.0, 0.0]], "3 / 2 rounds to 2: clamp the codes to -1..1"
assert found.tolist() == [[2.0, 0.0]], "gamma is the mean of |3| and |-1|"
found = on_grid(torch.tensor([[8.0, -8.0], [1.0, -1.0]]))
assert found[1].tolist() == [0.0, 0.0], "one gamma for the matrix, not one for each row"
assert found[0].tolist() == [4.5, -4.5], "gamma = (8 + 8 + 1 + 1) / 4"
zeros = on_grid(torch.zeros(2, 2))
assert zeros.isfinite().all(), "a matrix of zeros: keep gamma at epsilon or more"
assert on_grid(torch.tensor([[1.0, 1.0, -4.0]]).double()).tolist() == [
    [0.0, 0.0, -2.0]
], "1 / 2 is a tie, and goes to 0; gamma is the mean of magnitudes, not of weights"
print(found.tolist())
### BEGIN HIDDEN TESTS
assert not zeros.any(), "a matrix of zeros stays zero"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: five trits in a byte
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Pack five trits as TQ1_0 does, so that multiplying by 3 takes them out again.


# %% tags=["exercise"]
def pack_five(trits):
    """The byte (a Python int) of five trits, a list of -1, 0 and 1.

    Approach: digits are trit + 1; the first is worth 81, the last 1; with their
    number v the byte is v * 256 / 243, rounded up.
    Example: five times -1 gives 0, five times 1 gives 255.
    Hint: -(-a // b) rounds a / b up, in whole numbers.
    """
    ### BEGIN SOLUTION
    v = 0
    for trit in trits:
        v = 3 * v + trit + 1
    return -(-v * 256 // 243)
    ### END SOLUTION


# %% tags=["exercise-tests"]
def unpack_five(byte):
    """The trits that come out above eight bits, one for each product by 3."""
    trits = []
    for _ in range(5):
        byte *= 3
        trits.append((byte >> 8) - 1)
        byte &= 255
    return trits


assert pack_five([-1] * 5) == 0, "the digits are 0, 1 and 2: add 1 to a trit"
assert pack_five([1, -1, -1, -1, -1]) != 3, "the first trit is worth 81, not 1"
assert pack_five([1] * 5) != 242, "v is no fraction of 256: scale it by 256 / 243"
assert pack_five([-1, -1, -1, -1, 0]) == 2, "256 / 243 is rounded up"
byte = pack_five([1, 0, -1, 1, 0])
assert unpack_five(byte) == [1, 0, -1, 1, 0], "the digits come out in another order"
print(byte, unpack_five(byte))
### BEGIN HIDDEN TESTS
for five in torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 5).tolist():
    assert unpack_five(pack_five(five)) == five, f"{five} comes back as other trits"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: a sum from two planes of bits
# *Difficulty 3/5 · 20 minutes · 3 points · no GPU*
#
# Kernels do not look at trits one by one. A 2-bit code $c = t + 1$ is $b_0 + 2 b_1$ with two bits. So $\sum t\, x = \sum_{b_0 = 1} x + 2 \sum_{b_1 = 1} x -
# \sum x$: three plain sums, and the last one
# serves all outputs.


# %% tags=["exercise"]
def plane_sums(x, codes):
    """Sums of t * x, int32 `[out]`, for int8 `x` `[in]` and uint8 `codes` `[out, in]`.

    Codes are t + 1.
    Approach: mask x by the low bit and by the high bit of the codes, and sum in int32;
    double the second sum, and subtract the sum of all x.
    Example: x = [5, 7], codes [[2, 0]] gives [-2].
    Hint: sums of int8 run over at 127, so make x int32 first.
    """
    ### BEGIN SOLUTION
    x = x.int()
    low, high = (codes & 1).int(), (codes >> 1).int()
    sums = (low * x).sum(1) + 2 * (high * x).sum(1) - x.sum()
    return sums.int()
    ### END SOLUTION


# %% tags=["exercise-tests"]
def codes_of(*rows):
    return torch.tensor(rows).byte()


x = torch.tensor([5, 7]).char()
found = plane_sums(x, codes_of([2, 0]))
assert found.tolist() != [10], "take the sum of all x off again: codes are t + 1"
assert found.tolist() != [-7], "the high bit counts 2"
assert found.tolist() == [-2], "5 - 7"
found = plane_sums(x, codes_of([1, 1], [2, 2], [0, 1]))
assert found.tolist() == [0, 12, -5], "t is 0 at code 1"
found = plane_sums(torch.full((300,), 127).char(), codes_of([2] * 300))
assert found.tolist() == [38100], "300 times 127 runs over in int8: sum in int32"
assert found.dtype == torch.int32, "the sums are int32"
print(found.tolist())
### BEGIN HIDDEN TESTS
t = torch.tensor([[-1, 0, 1, 1, -1] * 8] * 3)
x = torch.arange(-100, 100, 5).char()
expected = (t * x).sum(1).tolist()
found = plane_sums(x, (t + 1).byte()).tolist()
assert found == expected, "negative inputs and many columns: low + 2 * high - all"
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - H. Wang and others, *BitNet: Scaling 1-bit Transformers for Large Language Models*, 2023, arXiv 2310.11453 [@wang2023bitnet].
# - S. Ma and others, *The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits*, 2024, arXiv 2402.17764 [@ma2024era].
# - S. Ma and others, *BitNet b1.58 2B4T Technical Report*, 2025, arXiv 2504.12285 [@ma2025bitnet2b4t].
# - J. Wang and others, *1-bit AI Infra: Part 1.1, Fast and Lossless BitNet b1.58 Inference on CPUs*, 2024, arXiv 2410.16144 [@wang2024bitnetcpp].
# - Y. Bengio, N. Léonard, A. Courville, *Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation*, 2013, arXiv 1308.3432
#   [@bengio2013ste].
# - M. Horowitz, *Computing's energy problem (and what we can do about it)*, ISSCC 2014 [@horowitz2014energy].
# - The reproduction on the Hugging Face hub [@bitnetrepro], the post on fine-tuning into ternary [@medmekk2024extreme], the question on the weights
#   [@rkinas2024ternary] and llama.cpp's ternary formats [@compilade2024ternary].
#
# ## Next
#
# `tpoti_demo` goes below ternary. `ptq_vs_qat` trains through a grid that is learned, from a finished model on.

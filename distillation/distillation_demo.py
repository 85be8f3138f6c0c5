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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/distillation/distillation_demo.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/distillation/distillation_demo.ipynb)
# # Distillation: a small student and what its teacher says
#
# *Large Model Quantization: a deep dive. Distillation 1 of 3.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - show what a teacher's probabilities say beyond the label, on a real prompt;
# - write the loss of Hinton and others [@hinton2015distilling] by hand, and say why it carries a factor $T^2$;
# - train a student of half the depth, and tell what the teacher does for it from what the training and the start do;
# - choose between the two directions of the divergence, and between the text's words and the student's own;
# - find three mistakes that people report again and again, each by a test that you can keep.
#
# It takes about 60 minutes to read and work. You need softmax, cross-entropy, and for one section the fake quantization of `ptq_vs_qat`.
# No profile needs a GPU; `quick` runs in under a minute, `cpu` in under five. In both you train students of your own.

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
from course_utils.compression import get_method
from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.evaluation import (
    Estimate,
    compare_all,
    continuations,
    difference,
    format_difference,
    prompt_of,
)
from course_utils.finetuning.qat import prepare_qat
from course_utils.models import load_model
from course_utils.plotting import distillation as figures
from course_utils.plotting import table, ternary
from course_utils.profiles import resolve
from course_utils.results import record
from course_utils.training.loop import TrainConfig

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # not used: the teacher is course-lm
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# Quantization keeps a network and shrinks its numbers. Distillation keeps the *behaviour* and shrinks the network. A small **student** learns from a large
# **teacher**. Here the teacher is `course-lm`, and the student has half of its blocks.
#
# A student that gets better proves little, since any training makes it better. So the question is: what does the *teacher* add? Every comparison here has a
# student that saw the same text, in the same order, for as many updates, with as much tuning, and without a teacher.
#
# ## What a teacher says
#
# A text has one next token, the **label**. The teacher has a probability for each of its 4,096 tokens. We read the Factbook on Sudan, which it was not
# trained on, up to "the Kingdom of Kush gained independence". The text goes on with "from".

# %%
teacher, tokenizer = load_model("course-lm", device=profile.device)
[sudan] = [
    d for d in documents("factbook", "evaluation") if d.name.endswith("/su.json")
]
before, after = sudan.text.split("Kush gained independence", 1)
ids = tokenizer(before + "Kush gained independence", return_tensors="pt").input_ids
with torch.no_grad():
    logits = teacher(input_ids=ids.to(profile.device)).logits[0, -1].cpu()

# %%
top = logits.topk(9).indices  # logits [vocabulary]
words = [tokenizer.decode([i]) for i in top.tolist()]
print(f"... {before[-60:]}Kush gained independence |{after[:20]} ...")

# %%
softened = {f"T = {T}": (logits / T).softmax(-1) for T in (1, 1.5, 2)}
shown = {title: p[top] for title, p in softened.items()}
figure = figures.soft_targets(shown, words, words.index(" from"))
plt.show()
entropy = {t: -(p * p.log()).sum().item() for t, p in softened.items()}
print("entropy in nats:", {t: round(h, 2) for t, h in entropy.items()})

# %% tags=["folded"]
# Record what the teacher says about Sudan.
by = {"model": "course-lm"}
for key, title in (("t1", "T = 1"), ("t1_5", "T = 1.5"), ("t2", "T = 2")):
    p, stem = softened[title], f"distillation.prompt.{key}"
    record(f"{stem}.label", p[top[words.index(" from")]].item(), "", 0.01, **by)
    record(f"{stem}.first", p[top[0]].item(), "", 0.01, **by)
    record(f"{stem}.entropy", entropy[title], "nats", 0.01, **by)

# %% [markdown]
# *Figure: the teacher's nine likeliest tokens (␣ is a space) at three temperatures. The label is orange.*
#
# In the recorded run the teacher gives "in" {{distillation.prompt.t1.first:.2f}} and "from" {{distillation.prompt.t1.label:.2f}}. Both would be good English.
# The label calls one right and 4,095 others wrong. The teacher's numbers are **soft targets**: they say which errors are small ones. That is called *dark
# knowledge*.
#
# A **temperature** $T$ above 1 divides the logits before the softmax. It lifts the small probabilities, and with them what the teacher says of unlikely tokens. The
# entropy rises from {{distillation.prompt.t1.entropy:.2f}} nats to {{distillation.prompt.t2.entropy:.2f}} at $T = 2$, where "from" keeps {{distillation.prompt.t2.label:.2f}}. With 4,096 tokens the many
# unlikely ones soon hold most of the probability.
#
# ## The loss, by hand
#
# $P$ is the teacher's distribution and $Q$ the student's. Their divergence is
#
# $$ \mathrm{KL}(P \Vert Q) = \sum_i P_i \log \frac{P_i}{Q_i} $$
#
# Take three tokens with $P = (0.7, 0.2, 0.1)$ and $Q = (0.5, 0.25, 0.25)$.

# %% tags=["nbval-check-output"]
P, Q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
terms = P * (P / Q).log()
print([round(t, 4) for t in terms.tolist()], round(terms.sum().item(), 4))

# %% [markdown]
# Where the teacher is above the student a term is positive, elsewhere negative. The sum is never negative, and 0 only for equal distributions. Hinton's loss
# takes both at temperature $T$, and multiplies by $T^2$:


# %%
def soft_loss(z, v, T):
    """T^2 KL(P || Q), nats per token; z student, v teacher, logits [tokens, vocab]."""
    log_q = F.log_softmax(z / T, dim=-1)
    log_p = F.log_softmax(v.detach() / T, dim=-1)
    return T**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# %%
from course_utils.distillation.losses import generalized_jsd, soft_target_loss

draw = torch.Generator().manual_seed(profile.seed)
z, v = (3 * torch.randn(6, 50, generator=draw) for _ in range(2))
log_q, log_p = (F.log_softmax(y / 2, dim=-1) for y in (z, v))
by_torch = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
torch.testing.assert_close(soft_loss(z, v, 2), 4 * by_torch)
torch.testing.assert_close(soft_loss(z, v, 2), soft_target_loss(z, v, 2))
print("ours, the package's and PyTorch's loss agree")

# %% [markdown]
# `F.kl_div` has four traps in one line. It takes *log*-probabilities of the student, and first. It takes plain probabilities of the teacher unless
# `log_target=True`. Its default `reduction="mean"` divides by the vocabulary as well. And `"batchmean"` divides by the first axis alone, so logits `[batch, context,
# vocabulary]` must be flattened first. The exercises come back to these.
#
# ## Why $T^2$?
#
# A student learns from gradients. We take real logits: those of the teacher, and of a student with half of its blocks. How large is the gradient of a
# token's logits, with the factor and without?

# %%
from course_utils.distillation.students import half_depth

text = profile.protocol(teacher).text(tokenizer)
student = half_depth(teacher).to(profile.device)
window = text.tokens[None, : text.window].to(profile.device)
with torch.no_grad():
    z, v = (m(input_ids=window).logits[0].cpu() for m in (student, teacher))


# %%
def gradient_norm(T):
    """Mean norm of the gradient of KL(P || Q) at temperature T, over tokens."""
    z_t = z.clone().requires_grad_()
    (len(z) * soft_loss(z_t, v, T) / T**2).backward()
    return z_t.grad.norm(dim=-1).mean().item()


# %%
temperatures = [1, 2, 4, 8, 16, 32, 64]
norms = [gradient_norm(T) for T in temperatures]
with_factor = [T**2 * norm for T, norm in zip(temperatures, norms, strict=True)]
figure = figures.gradient_against_temperature(
    temperatures, {"KL(P || Q)": norms, "T² KL(P || Q)": with_factor}
)
plt.show()

# %%
rows = [
    {"T": T, "KL": norm, "T² KL": scaled}
    for T, norm, scaled in zip(temperatures, norms, with_factor, strict=True)
]
table(rows, {"KL": ".5f", "T² KL": ".3f"})

# %% tags=["folded"]
# Record how the gradient falls.
record("distillation.gradient.fall", norms[0] / norms[-1], "", 40, model="course-lm")
record(
    "distillation.gradient.fall_late", norms[-2] / norms[-1], "", 0.1, model="course-lm"
)
record(
    "distillation.gradient.kept",
    with_factor[-1] / with_factor[0],
    "",
    0.02,
    model="course-lm",
)

# %% [markdown]
# *Figure: the norm of the gradient over the temperature, without and with the factor.*
#
# In the recorded run, without the factor the gradient at $T = 64$ is {{distillation.gradient.fall:,.0f}} times smaller than at 1, and the last doubling divides it by
# {{distillation.gradient.fall_late:.2f}}. That is the $1 / T^2$. With the factor the line is flat from about $T = 8$ on, at {{distillation.gradient.kept:.0%}} of its height at 1. So $T^2$ makes large
# temperatures comparable with each other and with the hard loss. It does not make $T = 1$ and $T = 8$ alike. For large $T$ the gradient tends to
# $(z_i - v_i) / N$ for centred logits and $N$ tokens: the student then matches logits, the unlikely ones as much as the likely.
#
# ## The student, and its two losses

# %%
figure = figures.two_losses()
plt.show()

# %% [markdown]
# *Figure: the teacher's softened probabilities give the soft loss, the text's next token the hard one. The gradient goes to the student alone.*
#
# The **mix** is the soft loss's share. The teacher stands still: in evaluation mode, without gradients. Our student has two of the teacher's four blocks. It can begin
# with fresh weights, or **inherit** every other block, the embeddings and the last norm, as DistilBERT does [@sanh2019distilbert].

# %%
starts = {
    "inherited": student,
    "fresh": half_depth(teacher, inherit=False, seed=profile.seed).to(profile.device),
}
found = compare_all(starts, teacher, text)

# %%
rows = [{"model": "teacher", "parameters": teacher.num_parameters()}]
rows += [
    {"model": f"student, {n}", "parameters": m.num_parameters()}
    for n, m in starts.items()
]
for row, of in zip(rows[1:], found.values(), strict=True):
    row |= {
        "nats lost": format_difference(of.loss),
        "perplexity": of.perplexity.perplexity,
    }
    row |= {"same top token": of.agreement.value}
rows[0] |= {"nats lost": "", "perplexity": found["fresh"].reference.perplexity}
print(profile.protocol(teacher))
table(rows, {"parameters": ",", "perplexity": ",.1f", "same top token": ".0%"})

# %% tags=["folded"]
# Record the sizes and the starts.
protocol = profile.protocol(teacher).fields
record("distillation.teacher.parameters", teacher.num_parameters(), "", 0, **by)
record("distillation.student.parameters", student.num_parameters(), "", 0, **by)
for name, of in found.items():
    record(
        f"distillation.start.{name}.loss", of.loss.value, "nats", 0.02, **by, **protocol
    )
    record(
        f"distillation.start.{name}.loss_error",
        of.loss.error,
        "nats",
        0.01,
        **by,
        **protocol,
    )

# %% [markdown]
# In the recorded run, a student that only inherited, and was never trained, loses {{distillation.start.inherited.loss:.2f}} ± {{distillation.start.inherited.loss_error:.2f}} nats per
# token. One with fresh weights loses {{distillation.start.fresh.loss:.2f}}. (± is one standard error over documents.)
#
# ## Your own pair
#
# Two students begin alike, with inherited blocks. They see the same batches of Factbook text. One learns from the text alone, the other from the teacher alone,
# at $T = 1$. The package's `distil` is the course's training loop with the loss above. It refuses a teacher in training mode, one that shares weights with its
# student, and one with another vocabulary.

# %%
from course_utils.distillation.trainer import DistilSettings, check_tokenizers, distil

stream = token_stream(
    tokenizer.backend_tokenizer,
    documents("factbook", "train")[::3],
    tokenizer.eos_token_id,
)

# %%
updates = profile.pick(quick=6, cpu=24)
config = TrainConfig(
    updates, 1e-3, warmup=2, decay=updates // 2, eval_every=updates // 3
)
told = {"text alone": DistilSettings(mix=0), "teacher": DistilSettings(mix=1)}
print(f"{updates} updates of 4 times 256 tokens, of {len(stream):,}")


# %%
def batches_of(seed):
    """The batches of a seed [4, 257], on the profile's device."""
    of = TrainingBatches(stream, context=256, batch_size=4, seed=seed)
    return lambda step: of(step).to(profile.device)


# %%
own = {}
for name, settings in told.items():
    own[name] = copy.deepcopy(student)
    curve = distil(own[name], teacher, batches_of(profile.seed), settings, config)
    print(f"{name:10}", [round(row["loss"], 3) for row in curve])

# %% [markdown]
# The two losses are different things: cross-entropy with the text, and a divergence. To compare the students we ask both for the same, on text of other countries.

# %%
found = compare_all(own, teacher, text)
rows = [
    {
        "student learnt from": name,
        "nats lost": format_difference(of.loss),
        "KL divergence": of.divergence.value,
        "same top token": of.agreement.value,
    }
    for name, of in found.items()
]
gain = difference(found["text alone"], found["teacher"])
print("text alone less teacher:", format_difference(gain))
table(rows, {"KL divergence": ".3f", "same top token": ".1%"})


# %% tags=["folded"]
# Record the pair.
def record_estimate(key, estimate, tolerance, **by):
    """Value under `key`, standard error under `key` with _error."""
    record(key, estimate.value, "nats", tolerance, **by)
    record(f"{key}_error", estimate.error, "nats", tolerance, **by)


by_pair = {"model": "course-lm-half", "updates": updates, **protocol}
record_estimate("distillation.own.gain", gain, 0.05, **by_pair)
for name, of in found.items():
    key = f"distillation.own.{name.split()[0]}"
    record_estimate(f"{key}.loss", of.loss, 0.05, **by_pair)
    record_estimate(f"{key}.divergence", of.divergence, 0.05, **by_pair)
    record(f"{key}.agreement", of.agreement.value, "", 0.03, **by_pair)

# %% [markdown]
# In the recorded run the student of the text loses {{distillation.own.text.loss:.3f}} nats against the teacher, and the teacher's student {{distillation.own.teacher.loss:.3f}}. The
# difference, paired token by token, is {{distillation.own.gain:+.3f}} ± {{distillation.own.gain_error:.3f}}. So the teacher adds something, and in a few updates.
# (The learning rate is twice the one that was best for both kinds in the sweeps below, and hurts the text's student more: there the difference is smaller.) Why? The text
# gives one label a token. The teacher gives 4,096 numbers for the same token.
#
# ## Three seeds, and the controls
#
# One pair may be luck. `course train-distillation` trained pairs with three seeds, each on 24 batches of 1,024 tokens; their logs are shipped. Learning rates come from
# sweeps over the same three rates for both kinds, with another seed. Two controls stand beside them. **Label smoothing** gives
# soft targets that say nothing: a tenth of the probability is spread evenly. And **fresh** students show what inheriting does. The controls have one seed. For
# fresh students the best rate was the largest that was tried, so a larger one may do better still.

# %%
from course_utils.distillation import runs

logs = runs.shipped_logs().values()


def of(arm, start="inherited", tokens=runs.TOKENS):
    """Logs of a kind, ordered by seed; not those of the sweeps."""
    kind = {"arm": arm, "start": start, "tokens": tokens, "lr": None}
    chosen = [log for log in logs if kind.items() <= log["run"].items()]
    return sorted(chosen, key=lambda log: log["run"]["seed"])


# %%
def curve_of(log):
    """Millions of tokens seen and held-out loss, from the start on."""
    steps = [0, *(row["step"] for row in log["curve"])]
    values = [log["held_out_before"], *(row["held_out"] for row in log["curve"])]
    return [step * 1024 / 1e6 for step in steps], values


pairs = {"text alone": of("hard"), "teacher": of("soft")}
curves = {name: [curve_of(log) for log in found] for name, found in pairs.items()}
figure = ternary.twin_curves(curves, "held-out loss (nats per token)")
plt.show()

# %% [markdown]
# *Figure: loss on the calibration documents, which nothing is trained on, over the tokens seen. On the left three seeds of each kind, on the right their difference.*
#
# The teacher's students fall faster from the first updates on, with every seed. Now the evaluation documents. Differences are paired over documents, seed by seed; ± is one
# standard error over the *seeds*, or over the documents where there is one seed. The last column says the error over the *documents*.


# %%
def over_seeds(values):
    """Mean and standard error over seeds."""
    values = torch.tensor(values).double()
    error = values.std().item() / len(values) ** 0.5
    return Estimate(values.mean().item(), error, len(values), "seeds")


def documents_error(a, b):
    """Error over documents of what runs `a` lose more than `b`: mean of seeds."""
    found = [runs.paired(one, other).error for one, other in zip(a, b, strict=True)]
    return sum(found) / len(found)


def less(a, b):
    """Nats that runs `a` lose more than `b`: over seeds, of one seed over documents."""
    found = [runs.paired(one, other) for one, other in zip(a, b, strict=True)]
    return over_seeds([f.value for f in found]) if len(found) > 1 else found[0]


# %%
kinds = {
    "inherited, text alone": of("hard"),
    "inherited, labels smoothed": of("smooth"),
    "inherited, teacher": of("soft"),
    "fresh, text alone": of("hard", "fresh"),
    "fresh, teacher": of("soft", "fresh"),
}


def mean_of(found, value):
    """Mean of a value over runs."""
    return sum(value(log) for log in found) / len(found)


# %%
rows, gains = [], {}
for name, found in kinds.items():
    base = kinds[name.split(",")[0] + ", text alone"][: len(found)]
    row = {"student": name, "seeds": len(found)}
    row["nats lost"] = mean_of(found, lambda log: log["less_teacher"][0])
    row["KL divergence"] = mean_of(found, lambda log: log["divergence"][0])
    row["same top token"] = mean_of(found, lambda log: log["agreement"][0])
    row["won over text alone"] = ""
    if "text alone" not in name:
        gains[name] = less(base, found)
        row["won over text alone"] = format_difference(gains[name])
        row["± over documents"] = documents_error(base, found)
    rows.append(row)
formats = {"nats lost": ".3f", "KL divergence": ".3f", "same top token": ".1%"}
table(rows, formats | {"± over documents": ".3f"})

# %% tags=["folded"]
# Record the table, the rates and the time.
by_runs = {"model": "course-lm-half", "tokens": runs.TOKENS}
keys = ("hard", "smooth", "soft", "fresh_hard", "fresh_soft")
for key, row in zip(keys, rows, strict=True):
    stem = f"distillation.runs.{key}"
    record(f"{stem}.loss", row["nats lost"], "nats", 1e-6, **by_runs)
    record(f"{stem}.divergence", row["KL divergence"], "nats", 1e-6, **by_runs)
    record(f"{stem}.agreement", row["same top token"], "", 1e-6, **by_runs)
    won = gains.get(row["student"], Estimate(0.0, 0.0, 3, "seeds"))
    record_estimate(f"{stem}.won", won, 1e-6, **by_runs)
    of_documents = row.get("± over documents", 0.0)
    record(f"{stem}.won_documents_error", of_documents, "nats", 1e-6, **by_runs)
inheritance = runs.paired(of("hard", "fresh")[0], of("hard")[0])
record_estimate("distillation.runs.inheritance", inheritance, 1e-6, **by_runs)
for key in ("hard", "soft"):
    seconds = mean_of(of(key), lambda log: log["cpu_seconds"])
    record(f"distillation.runs.{key}.cpu_seconds", seconds, "s", 1, **by_runs)
    record(
        f"distillation.runs.{key}.lr", of(key)[0]["settings"]["lr"], "", 0, **by_runs
    )
print("fresh less inherited, text alone, seed 0:", format_difference(inheritance))

# %% [markdown]
# In the recorded run, over three seeds, the teacher wins {{distillation.runs.soft.won:.3f}} ± {{distillation.runs.soft.won_error:.3f}} nats over the text alone (over documents ±
# {{distillation.runs.soft.won_documents_error:.3f}}). Smoothed labels win
# {{distillation.runs.smooth.won:+.3f}} ± {{distillation.runs.smooth.won_error:.3f}}. So it is not the softness of the targets, it is what they say.
#
# Inheriting does more than any loss: with the text alone a fresh student is {{distillation.runs.inheritance:.2f}} ± {{distillation.runs.inheritance_error:.2f}} nats behind. The teacher wins
# {{distillation.runs.fresh_soft.won:+.3f}} ± {{distillation.runs.fresh_soft.won_error:.3f}} there. A report of distillation that does not say how its student began says little.
#
# Nothing is free. A run with the teacher took {{distillation.runs.soft.cpu_seconds:.0f}} CPU seconds, one without {{distillation.runs.hard.cpu_seconds:.0f}}: the teacher has to read every batch, too.
#
# ## Which temperature, which mix?
#
# As many tokens, seed 0, and every run against the student of the text alone. All use the learning rate of $T = 1$.

# %%
hard = of("hard")[0]
arms = {"soft": "T = 1", "soft-T2": "T = 2", "soft-T4": "T = 4"}
arms |= {"mix50": "T = 1, half of it text"}
won = {said: runs.paired(hard, of(arm)[0]) for arm, said in arms.items()}
figure = ternary.estimates(
    {said: (e.value, e.error) for said, e in won.items()},
    "nats won over the text alone (bars: 2 standard errors over documents)",
)
plt.show()

# %%
best = of("soft")[0]
rows = []
for arm, said in arms.items():
    versus = runs.paired(best, of(arm)[0])
    rows.append(
        {"student": said, "nats won over text alone": format_difference(won[said])}
    )
    rows[-1] |= {
        "over T = 1, mix 1": format_difference(versus) if arm != "soft" else ""
    }
table(rows)

# %% tags=["folded"]
# Record the sweeps.
for arm, said in arms.items():
    key = f"distillation.settings.{arm.replace('-', '_')}"
    record_estimate(f"{key}.won", won[said], 1e-6, **by_runs)
    versus = runs.paired(best, of(arm)[0])
    record_estimate(f"{key}.over_soft", versus, 1e-6, **by_runs)

# %% [markdown]
# *Figure: nats won over the student of the text alone, at three temperatures with the teacher alone, and at $T = 1$ mixed with the text.*
#
# In the recorded run $T = 2$ is at {{distillation.settings.soft_T2.over_soft:+.3f}} ± {{distillation.settings.soft_T2.over_soft_error:.3f}} against $T = 1$, and $T = 4$ at
# {{distillation.settings.soft_T4.over_soft:+.3f}} ± {{distillation.settings.soft_T4.over_soft_error:.3f}}. A mix of one half is at {{distillation.settings.mix50.over_soft:+.3f}} ±
# {{distillation.settings.mix50.over_soft_error:.3f}}. So here the plain teacher at $T = 1$ did best.
# Its probabilities hold what the label says already, since it has read this text. Hinton and others soften more, and keep a small share of labels
# [@hinton2015distilling]; another teacher, or longer training, is worth a sweep of its own.
#
# ## The other direction
#
# $\mathrm{KL}(P \Vert Q)$ asks the student to be wherever the teacher is. A small student cannot be everywhere. Turned around, $\mathrm{KL}(Q \Vert P)$ asks that the teacher is
# wherever the student is. MiniLLM minimises this **reverse** divergence [@gu2023minillm]. A picture: the teacher has two hills, and the student may be one hill only.

# %%
x = torch.linspace(-4, 4, 81)
hills = torch.distributions.Normal(
    torch.tensor([-2.2, 1.8]), torch.tensor([0.45, 0.45])
)
v = (hills.log_prob(x[:, None]).exp() @ torch.tensor([0.4, 0.6])).log()[None]  # [1, 81]


def fit(beta):
    """One hill, fitted to the teacher's two by the divergence of `beta`."""
    place = torch.tensor([1.0, 0.0]).requires_grad_()  # centre, log of the width
    optimizer = torch.optim.Adam([place], lr=0.05)
    for _ in range(400):
        z = -0.5 * ((x - place[0]) / place[1].exp())[None] ** 2
        optimizer.zero_grad()
        generalized_jsd(z, v, beta).backward()
        optimizer.step()
    return z.detach().softmax(-1)[0]


# %%
fitted = {"forward: KL(P || Q)": fit(0), "reverse: KL(Q || P)": fit(1)}
figure = figures.fits(x, v.softmax(-1)[0], fitted)
plt.show()

# %% [markdown]
# *Figure: a teacher with two hills, and a student of one hill, fitted by each divergence.*
#
# The forward student covers both hills, and puts its middle where the teacher has next to nothing. The reverse student takes one hill, and forgets the other. GKD
# [@agarwal2023gkd] goes from one to the other by $\beta$, with the mixture $M = \beta P + (1 - \beta) Q$:
#
# $$ D_\beta = \beta\, \mathrm{KL}(P \Vert M) + (1 - \beta)\, \mathrm{KL}(Q \Vert M) $$
#
# The ends are a trap. At $\beta = 0$ and 1 the formula is 0 for every $P$ and $Q$, and there is no gradient. What tends to the two divergences is $D_\beta / \beta$ and $D_\beta /
# (1 - \beta)$. So an implementation has to treat 0 and 1 by themselves.

# %%
z, v = (torch.randn(6, 50, generator=draw).double() for _ in range(2))
rows = []
for beta in (0, 0.001, 0.5, 0.999, 1):
    D = generalized_jsd(z, v, beta).item()
    scaled = D / min(beta, 1 - beta) if 0 < beta < 1 else D
    rows.append({"beta": beta, "package": D, "over beta or 1 - beta": scaled})
table(rows, {"package": ".4f", "over beta or 1 - beta": ".4f"})

# %% [markdown]
# Next to the ends the value itself vanishes, and divided it tends to the forward and the reverse divergence, which the package gives at 0 and 1.
#
# The second idea of both papers: learn **on policy**. Text of others shows the student no state that its own errors lead to. So let it write, and let the teacher judge what it wrote.
# We compare three students, with seed 0 and 24 batches each: forward on the text, reverse on the text, and reverse on text of their own. "Own text" is what each student
# writes afterwards, from 32 tokens of each of 64 pieces of evaluation text; ± there is one standard error over these pieces.

# %%
ways = {
    "forward, text": of("soft")[0],
    "reverse, text": of("reverse")[0],
    "reverse, own text": of("own-reverse")[0],
}


def over_prompts(log, what, other=None):
    """Mean over prompts, of a log or of its difference to another, with its error."""
    values = torch.tensor(log["own_text"][what])
    values = values if other is None else values - torch.tensor(other["own_text"][what])
    error = values.std().item() / len(values) ** 0.5
    return Estimate(values.mean().item(), error, len(values), "prompts")


# %%
rows = []
for way, log in ways.items():
    row = {"student": way, "nats lost on text": log["less_teacher"][0]}
    row["KL(Q || P) on own text"] = over_prompts(log, "reverse_kl").value
    row["teacher's loss on it"] = over_prompts(log, "teacher_nats").value
    row["student's entropy"] = over_prompts(log, "entropy").value
    rows.append(row)
measured = list(rows[0])[1:]
table(rows, dict.fromkeys(measured, ".3f"))

# %%
base, changes = ways["forward, text"], {}
for way, log in list(ways.items())[1:]:
    changes[way] = {"nats lost on text": runs.paired(log, base)}
    for what, column in zip(
        ("reverse_kl", "teacher_nats", "entropy"), measured[1:], strict=True
    ):
        changes[way][column] = over_prompts(log, what, base)
table(
    [
        {"less forward, text": way}
        | {c: f"{e.value:+.3f} ± {e.error:.3f}" for c, e in of_way.items()}
        for way, of_way in changes.items()
    ]
)

# %% tags=["folded"]
# Record the three.
short = {
    "nats lost on text": "loss",
    measured[1]: "reverse_kl",
    measured[2]: "teacher_nats",
}
short |= {measured[3]: "entropy"}
for key, row in zip(("forward_text", "reverse_text", "reverse_own"), rows, strict=True):
    for column, what in short.items():
        record(f"distillation.ways.{key}.{what}", row[column], "nats", 1e-6, **by_runs)
        if row["student"] in changes:
            stem = f"distillation.ways.{key}.{what}_change"
            record_estimate(stem, changes[row["student"]][column], 1e-6, **by_runs)

# %% [markdown]
# In the recorded run, against forward on the text, the reverse divergence on the same text changes the teacher's loss on the student's own text by
# {{distillation.ways.reverse_text.teacher_nats_change:+.3f}} ± {{distillation.ways.reverse_text.teacher_nats_change_error:.3f}} nats, and on policy by
# {{distillation.ways.reverse_own.teacher_nats_change:+.3f}} ± {{distillation.ways.reverse_own.teacher_nats_change_error:.3f}}. The student's entropy changes by
# {{distillation.ways.reverse_text.entropy_change:+.3f}} ± {{distillation.ways.reverse_text.entropy_change_error:.3f}} and {{distillation.ways.reverse_own.entropy_change:+.3f}} ±
# {{distillation.ways.reverse_own.entropy_change_error:.3f}}: it writes what is likelier, as the one hill in the picture. The price is paid on the text of others:
# {{distillation.ways.reverse_text.loss_change:+.3f}} ± {{distillation.ways.reverse_text.loss_change_error:.3f}} and {{distillation.ways.reverse_own.loss_change:+.3f}} ±
# {{distillation.ways.reverse_own.loss_change_error:.3f}} nats. So first decide what the student is for: to judge text, or to write it.
#
# ## A teacher on disk
#
# A teacher that is asked again and again for the same text can be asked once. Whole logits in float16 take 8,192 bytes a token. Few of them matter: we keep the $k$ likeliest, and the probability
# of all others as one number.

# %%
import tempfile

from course_utils.distillation.cached import cache_teacher, top_k_loss

batches, rows = batches_of(profile.seed), []
with torch.no_grad():
    batch = batches(0)
    z, v = (m(input_ids=batch[:, :-1]).logits for m in (student, teacher))
    whole = soft_target_loss(z, v, 1).item()

# %%
with tempfile.TemporaryDirectory() as folder:
    for k in (1, 8, 32, 128):
        cache = cache_teacher(teacher, batches, 1, f"{folder}/{k}.safetensors", k=k)
        said = cache.at(0, batch)
        row = {"k": k, "bytes a token": cache.nbytes / batch[:, 1:].numel()}
        row["probability kept"] = said.log_p.exp().sum(-1).mean().item()
        rows.append(row | {"divergence seen": top_k_loss(z, said).item() / whole})
table(
    rows, {"bytes a token": ".0f", "probability kept": ".1%", "divergence seen": ".1%"}
)

# %% tags=["folded"]
# Record the cache.
for row in rows:
    stem = f"distillation.cache.k{row['k']}"
    record(f"{stem}.bytes", row["bytes a token"], "bytes", 1, model="course-lm")
    record(f"{stem}.kept", row["probability kept"], "", 0.01, model="course-lm")
    record(f"{stem}.seen", row["divergence seen"], "", 0.02, model="course-lm")

# %% [markdown]
# In the recorded run 32 tokens hold {{distillation.cache.k32.kept:.0%}} of the teacher's probability, in {{distillation.cache.k32.bytes:.0f}} bytes a token. They see
# {{distillation.cache.k32.seen:.0%}} of the divergence between the teacher and the untrained student, and 128 tokens {{distillation.cache.k128.seen:.0%}}. The cache also holds the text itself, so that a wrong batch is refused.
#
# Columns of logits mean tokens. If student and teacher number them differently, the loss is a number without a meaning. The package compares the two lists.


# %%
class Renumbered:
    """The course's tokenizer, with two tokens exchanged."""

    def get_vocab(self):
        vocabulary = tokenizer.get_vocab()
        return vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}


check_tokenizers(tokenizer, tokenizer)
try:
    check_tokenizers(Renumbered(), tokenizer)
except ValueError as error:
    print(error)

# %% [markdown]
# The sizes are equal here, and only the list tells.
#
# ## A quantized student
#
# A student need not be smaller. It can be the *same* network with 2-bit weights, and the float model its teacher. Quantization-aware training learns weights through the grid (`ptq_vs_qat`). We train
# the 2-bit `course-lm` twice: by the text, and by its float self. All layers are there, so this is about recovery.

# %%
grid = get_method(
    "affine", n_bits=2, group_size=128, symmetric=True, weight_range="mse"
)
rounded = copy.deepcopy(teacher).float()
prepare_qat(rounded, grid)

# %%
seeds = range(profile.seed, profile.seed + profile.pick(quick=2, cpu=3))
updates = profile.pick(quick=2, cpu=8)
qat = TrainConfig(updates, 5e-4, warmup=2, decay=updates // 2, eval_every=updates)

# %%
recovered = {}
for seed in seeds:
    for name, settings in told.items():
        recovered[name, seed] = copy.deepcopy(rounded)
        distil(recovered[name, seed], teacher, batches_of(seed), settings, qat)
found = compare_all({"rounded": rounded.eval()} | recovered, teacher, text)

# %%
gains = {s: difference(found["text alone", s], found["teacher", s]) for s in seeds}
rows = [
    {
        "2-bit model": "rounded, not trained",
        "nats lost": format_difference(found["rounded"].loss),
    }
]
for name in told:
    lost = over_seeds([found[name, s].loss.value for s in seeds])
    rows.append(
        {"2-bit model": f"trained by: {name}", "nats lost": format_difference(lost)}
    )
for s, won in gains.items():
    print(f"seed {s}, text alone less teacher: {format_difference(won)}")
table(rows)

# %% tags=["folded"]
# Record the 2-bit models.
by_qat = {"model": "course-lm", "updates": updates, **protocol}
record_estimate("distillation.qat.rounded.loss", found["rounded"].loss, 0.1, **by_qat)
for name in told:
    lost = over_seeds([found[name, s].loss.value for s in seeds])
    record_estimate(f"distillation.qat.{name.split()[0]}.loss", lost, 0.1, **by_qat)
won = over_seeds([e.value for e in gains.values()])
record_estimate("distillation.qat.won", won, 0.1, **by_qat)
over_documents = sum(e.error for e in gains.values()) / len(gains)
record("distillation.qat.won_documents_error", over_documents, "nats", 0.1, **by_qat)
print("over seeds:", format_difference(won))

# %% [markdown]
# In the recorded run rounding to 2 bits costs {{distillation.qat.rounded.loss:.2f}} nats per token. Trained by the text {{distillation.qat.text.loss:.3f}} are left, by the teacher
# {{distillation.qat.teacher.loss:.3f}}. The teacher wins {{distillation.qat.won:+.3f}} ± {{distillation.qat.won_error:.3f}} over the seeds, with an error of {{distillation.qat.won_documents_error:.3f}} over the documents. The labels and the teacher pull in the same direction; the teacher pulls more exactly, with as many tokens.
#
# ## They speak

# %%
speaking = {
    "teacher": teacher,
    "half, not trained": student,
    "half, text alone": own["text alone"],
    "half, teacher": own["teacher"],
    "2 bits, rounded": rounded,
    "2 bits, text alone": recovered["text alone", profile.seed],
    "2 bits, teacher": recovered["teacher", profile.seed],
}
print(continuations(speaking, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %%
rows = [
    {"shipped run": name, "wrote": found[0]["writes"]} for name, found in kinds.items()
]
print(
    "\n".join(
        f"{row['shipped run']:27}{' '.join(row['wrote'].split())}" for row in rows
    )
)

# %% [markdown]
# Half of the blocks without training repeat one phrase. After a few updates both students name tourism, as the teacher does, and soon they loop. The 2-bit models, trained, turn to other phrases of the
# Factbook's. Fresh students know one word so far. Greedy text of such short runs tells the taught from the untaught, and hardly one student from the other: the losses above do that.
#
# ## What you saw
#
# - **Soft targets say more than labels.** After "Kush gained independence" the teacher gives "in" {{distillation.prompt.t1.first:.2f}} and "from" {{distillation.prompt.t1.label:.2f}} in the recorded run; the text
#   knows only "from".
# - **$T^2$ keeps the gradient's size at large $T$.** Without it the gradient at $T = 64$ is {{distillation.gradient.fall:,.0f}} times smaller than at 1.
# - **The teacher wins {{distillation.runs.soft.won:.3f}} ± {{distillation.runs.soft.won_error:.3f}} nats** over the same student, text, updates and tuning without it. Smoothed labels win
#   {{distillation.runs.smooth.won:+.3f}} ± {{distillation.runs.smooth.won_error:.3f}}.
# - **Softer or mixed was not better.** $T = 2$ is at {{distillation.settings.soft_T2.over_soft:+.3f}} ± {{distillation.settings.soft_T2.over_soft_error:.3f}} nats against $T = 1$, and half of text at
#   {{distillation.settings.mix50.over_soft:+.3f}} ± {{distillation.settings.mix50.over_soft_error:.3f}}.
# - **The start counts for more than the loss.** A fresh student is {{distillation.runs.inheritance:.2f}} nats behind one that inherited.
# - **Two directions, two students.** Trained on its own text by the reverse divergence, a student changed the teacher's loss on what it writes by {{distillation.ways.reverse_own.teacher_nats_change:+.3f}} ±
#   {{distillation.ways.reverse_own.teacher_nats_change_error:.3f}} nats, and lost {{distillation.ways.reverse_own.loss_change:+.3f}} ± {{distillation.ways.reverse_own.loss_change_error:.3f}} more on the text of others.
# - **A float model teaches its own 2-bit self:** {{distillation.qat.won:+.3f}} ± {{distillation.qat.won_error:.3f}} nats over training by the text.
#
# ## Limits
#
# - Runs of 25,000 tokens show how fast students learn, not where they end. The teacher has read all of the Factbook's training text before, and these students have seen a part of it once.
# - One teacher of 4 million parameters, one text, one size of student. Smoothing, fresh students, temperature, mix and direction have one seed; temperature and mix have the learning rate of $T = 1$.
# - On-policy runs are short, and write at temperature 1. MiniLLM's policy gradient was not built; ours differentiates the divergence at each place, as GKD does.
# - The learning rate of the 2-bit models is one value, the same for both kinds.
# - Greedy continuations show how a model writes, and prove nothing.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: who is compared with whom?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# A well-read implementation compared the teacher with itself. Its loss was small from the first step on, and nothing was learnt. Write one step's loss, so that the tests below can tell. They serve for any
# distillation code.


# %% tags=["exercise"]
def step_loss(student, teacher, ids, T):
    """T^2 KL(P || Q) in nats per token, with a gradient for the student alone.

    Both map `ids` [batch, context] to logits [batch, context, vocab].
    Approach: the teacher's logits under torch.no_grad(); log-softmax of both over T;
    sum over the vocabulary, mean over batch and context, times T^2.
    Example: a student that is a copy of the teacher has the loss 0.
    Hint: call each model once, and mind which logits go where.
    """
    ### BEGIN SOLUTION
    with torch.no_grad():
        log_p = F.log_softmax(teacher(ids) / T, dim=-1)
    log_q = F.log_softmax(student(ids) / T, dim=-1)
    return T**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ### END SOLUTION


# %% tags=["exercise-tests"]
def tiny(rows):
    """A model of one table: a row of logits for each token."""
    return torch.nn.Embedding.from_pretrained(torch.tensor(rows), freeze=False)


def log_of(*probabilities):
    return [math.log(p) for p in probabilities]


pupil = tiny([log_of(0.5, 0.25, 0.25), [0.0, 0.0, 0.0]])
master = tiny([log_of(0.7, 0.2, 0.1), [0.0, 0.0, 0.0]])
loss = step_loss(pupil, master, torch.tensor([[0]]), 1)
assert abs(loss) > 1e-6, (
    "0 for two different models: is the teacher compared with itself?"
)
assert loss.requires_grad, "no gradient: run the teacher alone under torch.no_grad()"
loss.backward()
assert pupil.weight.grad is not None, "the student got no gradient"
assert pupil.weight.grad.abs().max() > 1e-6, "the student's gradient is zero"
assert master.weight.grad is None, "the teacher got a gradient: use torch.no_grad()"
assert abs(loss.item() - 0.1166) > 1e-3, "that is KL(Q || P): weight by the teacher's P"
assert abs(loss.item() - 0.0331) > 1e-3, "the sum over the vocabulary, not its mean"
assert abs(loss.item() - 0.0993) < 1e-3, "0.7 log 1.4 + 0.2 log 0.8 + 0.1 log 0.4"
half = step_loss(pupil, master, torch.tensor([[0, 1], [1, 1]]), 1)
assert abs(half.item() - 0.0993 / 4) < 1e-3, "the mean is over all of batch and context"
warm = step_loss(pupil, master, torch.tensor([[0]]), 2).item()
assert abs(warm - 0.0310) > 1e-3, "multiply by T^2"
assert abs(warm - 0.1239) < 1e-3, "divide both logits by T before the softmax"
print(f"{loss.item():.4f} {half.item():.4f} {warm:.4f}")
### BEGIN HIDDEN TESTS
same = step_loss(copy.deepcopy(master), master, torch.tensor([[0, 1]]), 3)
assert abs(same.item()) < 1e-6
z, v = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
z, v = (F.log_softmax(y / 4, dim=-1) for y in (z, v))
found = step_loss(
    lambda ids: 4 * z[ids], lambda ids: 4 * v[ids], torch.arange(5)[None], 4
)
expected = 16 * F.kl_div(z, v, log_target=True, reduction="batchmean")
assert torch.allclose(found, expected, rtol=1e-4)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: a divergence below zero
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Readers of a well-known book saw a negative divergence. They had given `F.kl_div` the teacher's *log*-probabilities, and it took them for probabilities. Call it right.


# %% tags=["exercise"]
def divergence(log_q, log_p):
    """KL(P || Q) in nats per token by F.kl_div, of log-probabilities [tokens, vocab].

    Approach: F.kl_div(input, target) is KL(target || input); say that the target is
    in logarithms, too, and choose the reduction that divides by tokens alone.
    Example: log of (0.5, 0.5) and of (0.9, 0.1) give 0.368.
    Hint: log_target=True, and a reduction.
    """
    ### BEGIN SOLUTION
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    ### END SOLUTION


# %% tags=["exercise-tests"]
Q = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
P = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
found = divergence(Q[:1].log(), P[:1].log()).item()
assert found == found, (
    "not a number: the logarithm of a logarithm? Pass log_target=True"
)
assert found >= 0, "below zero: the target is in logarithms, pass log_target=True"
assert abs(found - 0.1840) > 1e-3, "half as large: 'mean' divides by the vocabulary too"
assert abs(found - 0.5108) > 1e-3, "KL(Q || P): the student's come first in F.kl_div"
assert abs(found - 0.3681) < 1e-3, "0.9 log 1.8 + 0.1 log 0.2"
both = divergence(Q.log(), P.log()).item()
assert abs(both - 0.3681) > 1e-3, "a sum over tokens: divide by their number"
assert abs(both - 0.1840) < 1e-3, "the second token adds nothing, and counts"
print(f"{found:.4f} {both:.4f}")
### BEGIN HIDDEN TESTS
q, p = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
expected = (p.exp() * (p - q)).sum(-1).mean()
assert torch.allclose(divergence(q, p), expected)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: a loss that is 17 times too small
# *Difficulty 3/5 · 10 minutes · 2 points · no GPU*
#
# With `reduction="mean"` the loss is divided by the vocabulary as well: 17 times too small for 17 classes, and the hard loss wins every mix. `"batchmean"` has a trap of its own. Write a loss that does not depend
# on how tokens are cut into sequences.


# %% tags=["exercise"]
def per_token(z, v):
    """KL(P || Q) in nats per token, of logits [..., vocab] with any other axes.

    Approach: log-softmax of both over the last axis; the sum over the vocabulary; the
    mean over all tokens. If you use F.kl_div, flatten to [tokens, vocab] first.
    Example: [2, 3, vocab] and the same logits as [6, vocab] give the same number.
    Hint: "batchmean" divides by the first axis alone.
    """
    ### BEGIN SOLUTION
    log_q, log_p = F.log_softmax(z, dim=-1), F.log_softmax(v, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ### END SOLUTION


# %% tags=["exercise-tests"]
P, Q = torch.full((17,), 0.05), torch.full((17,), 1 / 17)
P[0] = 0.2
z, v = Q.log().expand(2, 3, 17), P.log().expand(2, 3, 17)
hand = (P * (P / Q).log()).sum().item()  # all six tokens are alike
found = per_token(z, v).item()
assert abs(found - hand / 17) > 1e-4, (
    "17 times too small: 'mean' divides by the vocabulary"
)
assert abs(found - 3 * hand) > 1e-4, (
    "3 times too large: 'batchmean' divides by 2, not by 6"
)
assert abs(found - 6 * hand) > 1e-4, "a sum over tokens: divide by their number"
assert abs(found - hand) < 1e-5, "the sum over the vocabulary, the mean over tokens"
flat = per_token(z.flatten(0, 1), v.flatten(0, 1)).item()
assert abs(flat - hand) < 1e-5, "the cut into sequences must not matter"
print(f"{found:.4f} {flat:.4f}")
### BEGIN HIDDEN TESTS
assert abs(per_token(z[0, 0], v[0, 0]).item() - hand) < 1e-5
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: the mixture in the middle
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# GKD's divergence needs $\log M$. A widely used implementation first averaged *logarithms*, which is no mixture; another time the weights sat on the wrong distributions. Write it, ends included.


# %% tags=["exercise"]
def jsd(log_q, log_p, beta):
    """GKD's divergence in nats per token, of log-probabilities [tokens, vocab].

    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q;
    KL(P || Q) for beta 0, and KL(Q || P) for beta 1.
    Approach: treat the ends first; then M from probabilities, or by torch.logaddexp.
    Example: equal distributions give 0 for every beta.
    Hint: log M is no average of log P and log Q.
    """
    ### BEGIN SOLUTION

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1).mean()

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    ### END SOLUTION


# %% tags=["exercise-tests"]
log_q, log_p = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
for end, value in ((0, 0.3681), (1, 0.5108)):
    found = float(jsd(log_q, log_p, end))
    assert found == found, f"not a number at beta = {end}: treat the ends by themselves"
    assert abs(found) > 1e-6, (
        f"0 at beta = {end}, where nothing is learnt: treat the ends"
    )
    assert abs(found - 0.8789 + value) > 1e-3, (
        "beta = 0 is KL(P || Q), and 1 is KL(Q || P)"
    )
    assert abs(found - value) < 1e-3, f"beta = {end}: {value}"
middle = float(jsd(log_q, log_p, 0.5))
assert abs(middle - 0.2197) > 2e-4, (
    "log M is no average of logarithms: add probabilities"
)
assert abs(middle - 0.1017) < 2e-4, "M = (0.7, 0.3)"
side = float(jsd(log_q, log_p, 0.2))
for wrong in (0.0727, 0.2158, 0.2041):
    assert abs(side - wrong) > 2e-4, "beta weighs the teacher, in M as outside"
assert abs(side - 0.0608) < 2e-4, "M = 0.2 P + 0.8 Q = (0.58, 0.42)"
print(f"{middle:.4f} {side:.4f}")
### BEGIN HIDDEN TESTS
assert abs(float(jsd(log_p, log_p, 0.3))) < 1e-6
assert float(jsd(log_q, 40 * log_p, 0.5)) <= math.log(2)
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - G. Hinton, O. Vinyals, J. Dean, *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531 [@hinton2015distilling].
# - V. Sanh and others, *DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter*, 2019, arXiv 1910.01108 [@sanh2019distilbert].
# - Y. Gu and others, *MiniLLM: Knowledge Distillation of Large Language Models*, 2023, arXiv 2306.08543 [@gu2023minillm].
# - R. Agarwal and others, *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, 2023, arXiv 2306.13649 [@agarwal2023gkd].
#
# ## Next
#
# `feature_distillation` looks inside the teacher: hidden states and attention. `reasoning_distillation` teaches steps instead of answers.

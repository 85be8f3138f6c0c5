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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/distillation/feature_distillation.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/distillation/feature_distillation.ipynb)
# # Feature distillation: what the teacher computes on its way
#
# *Large Model Quantization: a deep dive. Distillation 2 of 3.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - compare hidden states and attention of two networks, by the losses of FitNets, DistilBERT, TinyBERT and MiniLM;
# - map a student's layers to a teacher's, and give a narrower student the projection that it needs;
# - say what each of these losses adds to the soft targets, and what of it a wrong map or a teacher that knows nothing adds as well;
# - see how alike two networks' representations are, before and after, by linear CKA.
#
# It takes about 50 minutes to read and work. You need `distillation_demo`: soft targets, and why a student is compared with one that had none.
# No profile needs a GPU; `quick` runs in under a minute, `cpu` in about three. In both you train students of your own.

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
import torch.nn.functional as F
import transformers
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
from course_utils.models import load_model
from course_utils.plotting import table, ternary
from course_utils.plotting.features import matched_layers, similarity_maps
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
# A student that learns from its teacher's probabilities sees the last step only. The teacher also computed something in each block on the way: **hidden
# states**, one vector a token, and **attention**, which token looks at which. **Feature distillation** asks the student to compute the same.
#
# Is that worth it? Soft targets work already. So every student here learns from soft targets, and features are *added*. What they add is the difference to the
# same student, with the same text and updates, that had soft targets alone. Two controls stand beside it: features from the wrong layers, and features of a teacher that never learned anything.
#
# ## What can be compared
#
# The teacher is `course-lm`, four blocks of width 256. The student has two blocks. It begins with the teacher's blocks 1 and 3.

# %%
figure = matched_layers()
plt.show()

# %% [markdown]
# *Figure: teacher and student. Dashed lines are losses: attention inside a block (orange), hidden states that leave it (red), probabilities at the end (grey).*
#
# With fewer blocks one needs a **layer map**. TinyBERT's is uniform: block $m$ of the student learns from block $g(m) = m \cdot N / M$, of $N$ teacher and $M$ student blocks
# [@jiao2019tinybert]. So the last blocks meet, and each student block does the work of two.
#
# Four methods, four choices:
#
# | method | compares | by |
# | --- | --- | --- |
# | FitNets [@romero2014fitnets] | one middle layer, through a *regressor* | squared differences |
# | DistilBERT [@sanh2019distilbert] | the last hidden state | cosine |
# | TinyBERT [@jiao2019tinybert] | hidden states and attention scores of all mapped blocks | squared differences |
# | MiniLM [@wang2020minilm] | attention and values' relations of the last block | KL divergence |
#
# ## Hidden states, by hand
#
# Two tokens of width 2. The student's first vector points as the teacher's and is half as long. Its second is as long, and at a right angle.

# %% tags=["nbval-check-output"]
H = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # student [tokens, width]
G = torch.tensor([[6.0, 8.0], [1.0, 0.0]])  # teacher
squares = (H - G) ** 2
cosines = (H * G).sum(-1) / (H.norm(dim=-1) * G.norm(dim=-1))
print("squared differences:", squares.tolist(), "mean", squares.mean().item())
print("1 - cosine of each: ", (1 - cosines).tolist())

# %% [markdown]
# Squared differences blame the first token most, the cosine only the second. So squared differences (**MSE**) ask for the same vector, and cosine for the same direction.
# FitNets' loss is half of the *sum* over the width: the same as MSE, times half of the width. Such factors are why weights of one paper mean nothing in another.
#
# ## Attention, by hand
#
# A query looks at keys: scores are $q k^\top / \sqrt{d}$, and the softmax of a row says how much of each value it takes. TinyBERT compares scores *before* the
# softmax. Take one row of scores, and the same with 5 added.

# %% tags=["nbval-check-output"]
row = torch.tensor([1.0, 2.0, 0.5])
moved = row + 5
print("softmax:", [round(p, 3) for p in row.softmax(-1).tolist()])
print("moved:  ", [round(p, 3) for p in moved.softmax(-1).tolist()])
print("MSE of the scores:", F.mse_loss(moved, row).item())

# %% [markdown]
# The attention is the same, and the loss is 25. A loss of scores also asks for what the softmax forgets. MiniLM compares *after* the softmax, by the KL divergence of each row. It adds
# a second matrix: the products of all pairs of **values**, $\mathrm{softmax}(v v^\top / \sqrt{d})$, which say what tokens would hand on. Both are `[tokens, tokens]`, whatever the width.
#
# Our models are causal, so only pairs are compared whose key is not after its query. (BERT is not causal; the mask in the relation of values is ours.)

# %%
from course_utils.distillation.features import (
    attention_mse,
    cosine_loss,
    hidden_mse,
    relation_kl,
)

draw = torch.Generator().manual_seed(profile.seed)
h, g = torch.randn(2, 50, 16, generator=draw)
a, b = torch.randn(2, 4, 9, 9, generator=draw)  # scores [heads, query, key]
seen = torch.ones(9, 9, dtype=torch.bool).tril()

# %%
by_torch = torch.nn.CosineEmbeddingLoss()(h, g, torch.ones(50))
torch.testing.assert_close(cosine_loss(h, g), by_torch)
torch.testing.assert_close(hidden_mse(h, g), F.mse_loss(h, g))
torch.testing.assert_close(attention_mse(a, b), F.mse_loss(a[:, seen], b[:, seen]))
log_q, log_p = (s.masked_fill(~seen, -1e9).log_softmax(-1) for s in (a, b))
rows = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
torch.testing.assert_close(relation_kl(a, b), rows.mean())
print("the package's losses are those of PyTorch")

# %% [markdown]
# ## A real pass
#
# `run_with_features` catches hidden states and queries, keys, values of every block, by hooks. Hidden state 0 are the embeddings, and state $m$ leaves block $m$. We check it against `transformers`.

# %%
from course_utils.distillation.features import run_with_features
from course_utils.distillation.students import half_depth

teacher, tokenizer = load_model("course-lm", device=profile.device)
student = half_depth(teacher).to(profile.device)
text = profile.protocol(teacher).text(tokenizer)
windows = text.tokens[: 4 * text.window].view(4, text.window).to(profile.device)

# %%
with torch.no_grad():
    output = teacher(input_ids=windows, output_hidden_states=True)
    _, theirs = run_with_features(teacher, windows)
for m in range(4):
    torch.testing.assert_close(theirs.hidden[m], output.hidden_states[m])
print("teacher's hidden states:", len(theirs.hidden), tuple(theirs.hidden[4].shape))
print("attention scores of block 4:", tuple(theirs.scores(4).shape))

# %% [markdown]
# The states are those of `transformers`. (Its last one comes after the model's last norm, ours before it.)
#
# A student is told the features by a `FeatureLoss`: a kind, and pairs of layers. The last two are the controls: a map upside down, and a teacher with fresh
# weights (its features only; soft targets always come from the true one).

# %%
from course_utils.distillation.features import FeatureLoss, layer_map
from course_utils.distillation.students import student_of

uniform, last, wrong = layer_map(2, 4), ((2, 4),), ((1, 4), (2, 1))
stranger = student_of(teacher, range(4), inherit=False, seed=1000)  # knows nothing
losses = {
    "hidden (MSE)": FeatureLoss("hidden", uniform),
    "last hidden (cosine)": FeatureLoss("cosine", last),
    "attention (MSE)": FeatureLoss("attention", uniform),
    "relations (KL)": FeatureLoss("relations", last),
    "hidden, wrong layers": FeatureLoss("hidden", wrong),
    "hidden, random teacher": FeatureLoss(
        "hidden", uniform, source=stranger.to(profile.device)
    ),
}
print("student's block, teacher's block:", uniform)

# %% [markdown]
# ## How heavy is a feature?
#
# These losses have no common unit, and a weight has to be chosen for each. Tuning them all would be a study of its own, and tuning one alone would be unfair. So one rule for all: on the first batch, before any update, a feature's gradient is **as long as that of the soft
# targets**.

# %%
from course_utils.distillation.features import feature_loss, gradient_norm
from course_utils.distillation.losses import soft_target_loss

stream = token_stream(
    tokenizer.backend_tokenizer,
    documents("factbook", "train")[::3],
    tokenizer.eos_token_id,
)
batches = TrainingBatches(stream, context=256, batch_size=4, seed=profile.seed)
first = batches(0)[:, :-1].to(profile.device)

# %%
with torch.no_grad():
    v, theirs_first = run_with_features(teacher, first)
z, ours_first = run_with_features(student, first)
soft = soft_target_loss(z, v, 1)
rows = [{"loss": "soft targets", "value": soft.item()}]
rows[0]["gradient"] = gradient_norm(soft, student)

# %%
for name, loss in losses.items():
    value = feature_loss([loss], student, ours_first, theirs_first, first)
    row = {"loss": name, "value": value.item()}
    row["gradient"] = gradient_norm(value, student)
    row["weight"] = rows[0]["gradient"] / row["gradient"]
    rows.append(row)
table(rows, {"value": ".3f", "gradient": ".2f", "weight": ".3f"})

# %% tags=["folded"]
# Record the gradients.
by = {"model": "course-lm-half"}
keys = ("soft", "hidden", "cosine", "attention", "relations", "wrong", "random")
for key, row in zip(keys, rows, strict=True):
    record(f"features.start.{key}.value", row["value"], "", 0.2, **by)
    record(f"features.start.{key}.gradient", row["gradient"], "", 2, **by)

# %% [markdown]
# In the recorded run the attention scores' gradient is {{features.start.attention.gradient:.1f}} long, that of the cosine {{features.start.cosine.gradient:.2f}}, and that of the soft targets {{features.start.soft.gradient:.2f}}. With
# a weight of 1 for each, the scores would drown all else, and the cosine would hardly be heard.
#
# ## Another width
#
# A student of half the width has vectors of 128 numbers, and no difference to 256 numbers is defined. FitNets' regressor and TinyBERT's $W_h$ are a learned linear map. It is trained with the student, and thrown away
# after.

# %%
from course_utils.distillation.features import add_projection, drop_projection
from course_utils.distillation.students import half_width

narrow = half_width(teacher, seed=profile.seed).to(profile.device)
parameters = narrow.num_parameters()
_, of_narrow = run_with_features(narrow, windows)
told = FeatureLoss("hidden", ((4, 4),))
try:
    told(of_narrow, theirs)
except ValueError as error:
    print(error)

# %%
projection = add_projection(narrow, teacher, profile.seed)  # [256, 128]
loss = feature_loss([told], narrow, of_narrow, theirs, windows)
relations = FeatureLoss("relations", ((4, 4),))(of_narrow, theirs)
print(f"hidden states, projected: {loss:.3f}; relations: {relations:.3f}")
drop_projection(narrow)
print(f"{parameters:,} parameters, as before: {narrow.num_parameters() == parameters}")

# %% [markdown]
# Relations need no map. They need as many heads, and ours has four narrower ones. Next, students of your own.
#
# ## Each loss alone
#
# Seven students begin alike and see the same batches. One learns from soft targets alone; to the others one loss is added. `distil` is the trainer of `distillation_demo`, and takes `features`. The learning rate is the one that was best for soft targets there.

# %%
from course_utils.distillation.trainer import DistilSettings, distil

updates = profile.pick(quick=2, cpu=12)
weights = {row["loss"]: row.get("weight") for row in rows}
arms = {"soft targets alone": []}
for name, loss in losses.items():
    arms[f"+ {name}"] = [replace(loss, weight=weights[name])]
print(f"{updates} updates of 4 times 256 tokens, of {len(stream):,}")


# %%
def trained(student, features, lr=5e-4, seed=profile.seed):
    """A copy of `student`, trained by soft targets and `features`."""
    model = copy.deepcopy(student)
    draws = TrainingBatches(stream, context=256, batch_size=4, seed=seed)
    config = TrainConfig(
        updates, lr, warmup=2, decay=updates // 2, eval_every=updates // 2
    )
    distil(
        model,
        teacher,
        lambda step: draws(step).to(profile.device),
        DistilSettings(),
        config,
        features=features,
    )
    return model


# %%
own = {name: trained(student, features) for name, features in arms.items()}

# %% [markdown]
# Their training losses hold different terms, and cannot be compared. What can be compared is what all of them are for: predicting text. Differences are paired token by token, on
# text of other countries; ± is one standard error over documents.

# %%
found = compare_all({"not trained": student} | own, teacher, text)
base, gains = found["soft targets alone"], {}
rows = []
for name, of in found.items():
    row = {"student": name, "nats lost": format_difference(of.loss)}
    row |= {"KL divergence": of.divergence.value, "won over soft targets": ""}
    if name.startswith("+"):
        gains[name] = difference(base, of)
        row["won over soft targets"] = format_difference(gains[name])
    rows.append(row)
table(rows, {"KL divergence": ".3f"})

# %%
figure = ternary.estimates(
    {name: (e.value, e.error) for name, e in gains.items()},
    "nats won over soft targets alone (bars: 2 standard errors over documents)",
)
plt.show()


# %% tags=["folded"]
# Record your own students.
def record_estimate(key, estimate, tolerance, **by):
    """Value under `key`, standard error under `key` with _error."""
    record(key, estimate.value, "nats", tolerance, **by)
    record(f"{key}_error", estimate.error, "nats", tolerance, **by)


by_own = by | {"updates": updates, **profile.protocol(teacher).fields}
nothing = Estimate(0.0, 0.0, base.loss.count, "documents")
for key, (name, of) in zip(("start", *keys), found.items(), strict=True):
    stem = f"features.own.{key}"
    record_estimate(f"{stem}.loss", of.loss, 0.05, **by_own)
    record(f"{stem}.divergence", of.divergence.value, "nats", 0.05, **by_own)
    record_estimate(f"{stem}.won", gains.get(name, nothing), 0.05, **by_own)

# %% [markdown]
# *Figure: nats won over soft targets alone by each added loss. A hollow point is not distinguished from 0.*
#
# In the recorded run, of the losses that a paper would use, hidden states win {{features.own.hidden.won:+.3f}} ± {{features.own.hidden.won_error:.3f}} nats, the cosine {{features.own.cosine.won:+.3f}} ± {{features.own.cosine.won_error:.3f}}, attention scores {{features.own.attention.won:+.3f}} ± {{features.own.attention.won_error:.3f}} and
# relations {{features.own.relations.won:+.3f}} ± {{features.own.relations.won_error:.3f}}. The controls win {{features.own.wrong.won:+.3f}} ± {{features.own.wrong.won_error:.3f}} (wrong layers) and {{features.own.random.won:+.3f}} ± {{features.own.random.won_error:.3f}} (random teacher).
#
# So what a loss adds depends on which it is. Hidden states, by squares or by cosine, help a little. Attention scores and relations, equally heavy, take more than they give in so few updates. And it is not any pull that helps: the same loss from wrong layers, or from a teacher that knows nothing, costs many times what the right one wins.
#
# ## Three seeds
#
# The errors above are over documents. Another seed draws other batches, and that is another source of chance. So the pair of hidden states and soft targets alone is trained twice more.

# %%
name, values, errors = "+ hidden (MSE)", [gains["+ hidden (MSE)"].value], []
for seed in (profile.seed + 1, profile.seed + 2):
    pair = {key: trained(student, arms[key], seed=seed) for key in list(arms)[:2]}
    of = compare_all(pair, teacher, text)
    values.append(difference(of["soft targets alone"], of[name]).value)

# %%
values = torch.tensor(values).double()
headline = Estimate(values.mean().item(), values.std().item() / 3**0.5, 3, "seeds")
print("won by seed:", [round(v, 4) for v in values.tolist()])
print("hidden states win", format_difference(headline))

# %% tags=["folded"]
# Record the seeds.
record_estimate("features.seeds.won", headline, 0.02, **by_own)

# %% [markdown]
# In the recorded run the mean over the seeds is {{features.seeds.won:+.3f}} ± {{features.seeds.won_error:.3f}} nats. Every seed gains. It is a small gain, next to the teacher's own: soft targets alone brought the untrained student from {{features.own.start.loss:.3f}} to {{features.own.soft.loss:.3f}} nats lost.
#
# ## Representations, seen
#
# Did the students come to compute the same? Vectors of two networks cannot be subtracted: a rotation of all of them changes nothing for a network that is rotated along. **Linear CKA** compares instead which *tokens* are alike in
# one network and in the other [@kornblith2019similarity]. With $X$ `[tokens, p]` and $Y$ `[tokens, q]`, columns centred:
#
# $$ \mathrm{CKA}(X, Y) = \frac{\lVert Y^\top X \rVert_F^2}{\lVert X^\top X \rVert_F \, \lVert Y^\top Y \rVert_F} $$
#
# A rotated or scaled copy has 1.

# %%
from course_utils.distillation.features import balanced
from course_utils.distillation.similarity import cka_map, linear_cka

x = torch.randn(500, 6, generator=draw)
rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw))
print(f"rotated and three times as long: {linear_cka(x, 3 * x @ rotation):.3f}")
print(f"unrelated: {linear_cka(x, torch.randn(500, 6, generator=draw)):.3f}")


# %%
def map_of(model):
    """CKA of the teacher's hidden states with a model's, first tokens left out."""
    with torch.no_grad():
        _, of_model = run_with_features(model, windows)
    sides = ([h[:, 1:] for h in side.hidden] for side in (theirs, of_model))
    return cka_map(*sides)


# %% [markdown]
# Our inherited students had most of the teacher's representations from the start. The **narrow** student had none: half the width, fresh weights. We train three of it, and look before and after. CKA takes both widths.

# %%
told = {
    "narrow, soft targets": [],
    "narrow, + hidden": [FeatureLoss("hidden", layer_map(4, 4))],
    "narrow, + relations": [FeatureLoss("relations", ((4, 4),))],
}
begun = {"narrow, not trained": narrow}
for name, features in told.items():
    begun[name] = copy.deepcopy(narrow)
    add_projection(begun[name], teacher, profile.seed)
    features = [balanced(of, begun[name], teacher, first) for of in features]
    begun[name] = trained(begun[name], features, lr=1e-3)
    drop_projection(begun[name])

# %%
maps = {"inherited, not trained": map_of(student)}
maps |= {name: map_of(model) for name, model in begun.items() if "rel" not in name}
figure = similarity_maps(maps)
plt.show()

# %%
began = compare_all(begun, teacher, text)
rows, narrow_won = [], {}
for name, of in began.items():
    row = {"student": name, "nats lost": format_difference(of.loss), "won": ""}
    if "+" in name:
        narrow_won[name] = difference(began["narrow, soft targets"], of)
        row["won"] = format_difference(narrow_won[name])
    rows.append(row | {"CKA of the last states": map_of(begun[name])[4, 4].item()})
table(rows, {"CKA of the last states": ".2f"})

# %% tags=["folded"]
# Record the narrow students and their maps.
for key, (name, of) in zip(
    ("start", "soft", "hidden", "relations"), began.items(), strict=True
):
    stem = f"features.narrow.{key}"
    record_estimate(f"{stem}.loss", of.loss, 0.2, **by_own)
    record_estimate(f"{stem}.won", narrow_won.get(name, nothing), 0.2, **by_own)
    for m in (2, 4):
        value = map_of(begun[name])[m, m].item()
        record(f"features.cka.{key}.{m}", value, "", 0.1, **by_own)
for m, n in uniform:
    value = maps["inherited, not trained"][n, m].item()
    record(f"features.cka.inherited.{m}", value, "", 0.05, **by_own)

# %% [markdown]
# *Figure: linear CKA of the teacher's hidden states 0 to 4 and the student's, on 1,020 tokens. The first token of a window is left out: its vectors are longer than the others, and linear CKA is sensitive to outliers [@davari2022cka].*
#
# In the recorded run the inherited student's states have {{features.cka.inherited.1:.2f}} and {{features.cka.inherited.2:.2f}} with the teacher's 2 and 4 that they are mapped to, before any update. So there was little left to imitate. The narrow student begins at {{features.cka.start.2:.2f}} with the teacher's state 2. Soft targets lead it to
# {{features.cka.soft.2:.2f}}, and hidden states to {{features.cka.hidden.2:.2f}}; but relations, which say nothing of that state, lead to {{features.cka.relations.2:.2f}}. Look at the map of "+ hidden": its columns 1 to 4 are nearly the same. In so few updates the blocks' states have not come apart, and each is nearest to the teacher's state 0. Squared differences fall first by a common vector for all tokens, perhaps, and CKA subtracts that; we have not measured it.
#
# But in nats hidden states win {{features.narrow.hidden.won:+.3f}} ± {{features.narrow.hidden.won_error:.3f}} over soft targets alone, and relations {{features.narrow.relations.won:+.3f}} ± {{features.narrow.relations.won_error:.3f}}. Both cost a lot. A fresh student has everything to learn in a few updates, and about half of the pull went to a demand that predicts no text. Its last states are no nearer to the teacher's with hidden states ({{features.cka.hidden.4:.2f}}) than with soft targets ({{features.cka.soft.4:.2f}}). Alike inside and good at the task are two things.
#
# ## They speak

# %%
speaking = {"teacher": teacher, "not trained": student} | own | begun
print(continuations(speaking, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %% [markdown]
# The student that was not trained repeats one phrase. With the cosine it names tourism, as the teacher does, and with a random teacher's states as well: one greedy text proves nothing. Narrow students write no words yet.
#
# ## What you saw
#
# - **Losses differ in what they see.** MSE sees lengths, cosine only directions; scores see shifts that the softmax forgets; relations need no projection.
# - **A weight is a choice.** In the recorded run the gradient of the attention scores began {{features.start.attention.gradient:.0f}} long, and that of the soft targets {{features.start.soft.gradient:.1f}} long. All losses here were made equally heavy.
# - **Added to soft targets, hidden states won {{features.seeds.won:+.3f}} ± {{features.seeds.won_error:.3f}} nats over three seeds.** A small gain that every seed repeats. The cosine won {{features.own.cosine.won:+.3f}} ± {{features.own.cosine.won_error:.3f}}; attention scores and relations lost {{features.own.attention.won:+.3f}} and {{features.own.relations.won:+.3f}}.
# - **The map matters.** Against soft targets alone, wrong layers made {{features.own.wrong.won:+.3f}} ± {{features.own.wrong.won_error:.3f}} nats, a random teacher's states {{features.own.random.won:+.3f}} ± {{features.own.random.won_error:.3f}}.
# - **Alike is not better.** The narrow student's state 2 came from {{features.cka.start.2:.2f}} to {{features.cka.hidden.2:.2f}} in CKA with hidden states, against {{features.cka.soft.2:.2f}} with soft targets alone and {{features.cka.relations.2:.2f}} with relations. Its prediction stands at {{features.narrow.hidden.won:+.3f}} ± {{features.narrow.hidden.won_error:.3f}} nats against soft targets alone.
#
# ## Limits
#
# - A few updates show how a student begins to learn, not where it ends. TinyBERT trains on features for epochs before it predicts anything: features may pay later, and these runs cannot tell.
# - Most arms have one seed; their errors are over documents, and another seed may move them further than that.
# - Weights follow one rule and were not tuned. A loss that lost here may win with a weight of its own, or a weight that falls as training goes on. FitNets and TinyBERT train in stages: features first, soft targets after.
# - One teacher of four blocks. In deep teachers the choice of layers is larger.
# - CKA says how alike two representations are, not whether the student uses them. It can be changed without changing what a network does [@davari2022cka].
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: who learns from whom?
# *Difficulty 1/5 · 5 minutes · 1 point · no GPU*
#
# A student of $M$ blocks learns from a teacher of $N$, where $M$ divides $N$. Write TinyBERT's map of hidden states, embeddings included.


# %% tags=["exercise"]
def mapped(student, teacher):
    """Pairs (m, g(m)) of hidden states, for m = 0 (embeddings) to the student's last.

    Approach: g(m) = m * teacher / student.
    Example: mapped(2, 4) is [(0, 0), (1, 2), (2, 4)].
    Hint: a network of M blocks has M + 1 hidden states.
    """
    ### BEGIN SOLUTION
    step = teacher // student
    return [(m, m * step) for m in range(student + 1)]
    ### END SOLUTION


# %% tags=["exercise-tests"]
pairs = [tuple(pair) for pair in mapped(4, 12)]
assert len(pairs) == 5, (
    "four blocks have five hidden states, the embeddings are number 0"
)
assert pairs[0] == (0, 0), "embeddings learn from embeddings"
assert pairs[1] != (1, 1), (
    "(1, 1): that copies the first layers, and never sees the last"
)
assert pairs[1] == (1, 3), "each student block does the work of three"
assert pairs[-1] == (4, 12), "the last layers have to meet"
print(pairs)
### BEGIN HIDDEN TESTS
assert [tuple(p) for p in mapped(3, 3)] == [(0, 0), (1, 1), (2, 2), (3, 3)]
assert all(isinstance(n, int) for p in mapped(2, 6) for n in p), "layers are integers"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: direction only
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Write DistilBERT's loss of hidden states, with a gradient for the student alone.


# %% tags=["exercise"]
def direction_loss(h, g):
    """Mean over tokens of 1 - cosine of student's h and teacher's g, both [..., width].

    Approach: product summed over the width, over both lengths; 1 minus it; the mean.
    Example: (3, 4) and (6, 8) give 0, (0, 1) and (1, 0) give 1.
    Hint: a cosine for each token, and .detach() for the teacher.
    """
    ### BEGIN SOLUTION
    g = g.detach()
    cosine = (h * g).sum(-1) / (h.norm(dim=-1) * g.norm(dim=-1))
    return (1 - cosine).mean()
    ### END SOLUTION


# %% tags=["exercise-tests"]
h = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
g = torch.tensor([[6.0, 8.0], [1.0, 0.0]], requires_grad=True)
value = direction_loss(h, g)
assert value.ndim == 0, "one number: the mean over tokens"
assert abs(value.item() - 1.0) > 1e-4, "a sum over tokens: take the mean"
assert value.item() > 0.3, "one cosine of all numbers together: take one for each token"
assert abs(value.item() - 0.5) < 1e-4, "(0 + 1) / 2: the lengths must not matter"
assert value.requires_grad, "the student gets no gradient: detach the teacher alone"
value.backward()
assert g.grad is None, "the teacher got a gradient: detach it"
assert h.grad is not None, "the student got no gradient"
opposite = direction_loss(
    torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]])
).item()
assert opposite > 0, "that is the cosine: the loss is 1 minus it"
assert abs(opposite - 2) < 1e-5, "opposite vectors cost 2: 1 - (-1)"
print(f"{value.item():.3f} {opposite:.3f}")
### BEGIN HIDDEN TESTS
x, y = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(1))
expected = torch.nn.CosineEmbeddingLoss()(x.view(10, 7), y.view(10, 7), torch.ones(10))
assert torch.allclose(direction_loss(x, y), expected, atol=1e-5)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: scores before the softmax
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Write TinyBERT's attention loss for a causal model, from queries and keys of one head.


# %% tags=["exercise"]
def score_loss(q, k, q_teacher, k_teacher):
    """Mean squared difference of scores over the pairs that a causal model looks at.

    All are [tokens, d]; the teacher's d may be another.
    Approach: scores q @ k.T / sqrt(d), each with its own d, before the softmax; keep
    pairs whose key is not after the query; the mean of the squares over those.
    Example: with one token, the square of one difference.
    Hint: torch.ones(t, t).tril() marks the pairs.
    """
    ### BEGIN SOLUTION
    ours = q @ k.T / q.shape[-1] ** 0.5
    theirs = q_teacher @ k_teacher.T / q_teacher.shape[-1] ** 0.5
    seen = torch.ones_like(ours).tril().bool()
    return ((ours - theirs.detach())[seen] ** 2).mean()
    ### END SOLUTION


# %% tags=["exercise-tests"]
q, k = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]])
nil = torch.zeros(2, 4)
value = score_loss(q, k, nil, nil).item()  # scores [[3, 1], [6, 2]]
assert abs(value - 12.5) > 1e-3, (
    "the query 1 sees no key 2: three pairs count, not four"
)
assert abs(value - 12.25) > 1e-3, "divide by the three pairs that count, not by four"
assert value > 1, "compare scores before the softmax"
assert abs(value - 49 / 3) < 1e-3, "(9 + 36 + 4) / 3"
ones, zeros = torch.ones(2, 4), torch.zeros(2, 1)
wide = score_loss(zeros, zeros, ones, ones).item()
assert abs(wide - 16) > 1e-3, "divide each model's scores by the root of its own d"
assert abs(wide - 4) < 1e-4, "scores of 4 / sqrt(4), against 0"
print(f"{value:.3f} {wide:.3f}")
### BEGIN HIDDEN TESTS
draws = torch.Generator().manual_seed(2)
q, k, u, w = (torch.randn(5, d, generator=draws) for d in (3, 3, 8, 8))
gap = q @ k.T / 3**0.5 - u @ w.T / 8**0.5
mask = torch.ones(5, 5).tril()
assert torch.allclose(score_loss(q, k, u, w), (gap**2 * mask).sum() / 15, atol=1e-5)
assert score_loss(q, k, q, k).item() == 0
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: alike, whatever the axes
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Write linear CKA from its formula.


# %% tags=["exercise"]
def cka(x, y):
    """Linear CKA of x [tokens, p] and y [tokens, q], a number from 0 to 1.

    Approach: subtract each column's mean; ||y.T x||^2 over ||x.T x|| times ||y.T y||,
    all Frobenius norms.
    Example: x and a rotated, scaled and moved x give 1.
    Hint: torch.linalg.matrix_norm, or the root of a sum of squares.
    """
    ### BEGIN SOLUTION
    x, y = x - x.mean(0), y - y.mean(0)
    norm = torch.linalg.matrix_norm
    return norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    ### END SOLUTION


# %% tags=["exercise-tests"]
draws = torch.Generator().manual_seed(3)
x, y = (torch.randn(40, d, generator=draws) for d in (5, 3))
turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=draws))
assert abs(float(cka(x, x)) - 1) < 1e-4, "a copy has 1"
assert abs(float(cka(x, 3 * x)) - 1) < 1e-4, "three times as long: divide by both norms"
assert abs(float(cka(x, x + 5)) - 1) < 1e-4, "moved: centre the columns first"
assert abs(float(cka(x, x @ turn)) - 1) < 1e-4, "rotated: compare y.T @ x, not x with y"
a, b = x - x.mean(0), y - y.mean(0)
K, L = a @ a.T, b @ b.T
expected = ((K * L).sum() / (K.norm() * L.norm())).item()
assert abs(float(cka(x, y)) - expected**0.5) > 1e-4, "the norm above is squared"
assert abs(float(cka(x, y)) - expected) < 1e-4, "||y.T x||^2 / (||x.T x|| ||y.T y||)"
print(f"{float(cka(x, y)):.4f}")
### BEGIN HIDDEN TESTS
assert abs(float(cka(y, x)) - float(cka(x, y))) < 1e-5
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - A. Romero and others, *FitNets: Hints for Thin Deep Nets*, 2014, arXiv 1412.6550 [@romero2014fitnets].
# - V. Sanh and others, *DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter*, 2019, arXiv 1910.01108 [@sanh2019distilbert].
# - X. Jiao and others, *TinyBERT: Distilling BERT for Natural Language Understanding*, 2019, arXiv 1909.10351 [@jiao2019tinybert].
# - W. Wang and others, *MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers*, 2020, arXiv 2002.10957 [@wang2020minilm].
# - S. Kornblith and others, *Similarity of Neural Network Representations Revisited*, 2019, arXiv 1905.00414 [@kornblith2019similarity].
# - M. Davari and others, *Reliability of CKA as a Similarity Measure in Deep Learning*, 2022, arXiv 2210.16156 [@davari2022cka].
#
# ## Next
#
# `reasoning_distillation` teaches steps instead of answers.

"""The report on a trained course-lm: held-out figures, an n-gram baseline, samples, the model card.

`course lm-report` runs this on the folder that `course train-lm` wrote; it takes a few minutes.
"""

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from course_utils import results
from course_utils.data.batches import token_stream
from course_utils.data.corpora import Document, documents
from course_utils.evaluation.perplexity import Perplexity, perplexity
from course_utils.models import load_model
from course_utils.tools.site.ngram import NGram, overlap

STRIDE = 128  # half of the model's context: each token has at least this many before it
ORDER = 5
TOKENS_AT_MOST = 300_000  # of one corpus: whole documents up to here
EVALUATED = {
    "factbook": "CIA World Factbook, countries not trained on",
    "sotu": "State of the Union, addresses not trained on",
    "wikipedia": "Wikipedia articles, out of domain: none were trained on",
}
PROMPTS = (
    "Background: The country gained its independence from France in",
    "Economic overview: A small island economy that depends on",
    "Climate: tropical; the rainy season",
    "Mr. Speaker, Mr. Vice President, Members of Congress, my fellow Americans:",
    "The relations of the United States with foreign powers",
)
NEW_TOKENS, TEMPERATURE, TOP_K = 70, 0.8, 40


class Measured(NamedTuple):
    """Figures of one corpus: the model's and the baseline's, on the same tokens."""

    documents: int
    text: str
    model: Perplexity
    ngram: Perplexity
    overlap: float  # share of the 13-grams that the training text holds too


def report(folder: Path, runs: Path) -> dict:
    """Measure the model in `folder`; writes `report.json` and the model card `README.md` there.

    The figures are recorded in the folder `runs` under `course_lm.*`, in the profile `report`, and
    returned. The model is evaluated in float32 on the evaluation splits, in windows of its whole context
    every `STRIDE` tokens; the baseline is counted on the tokens that the model was trained on.
    """
    folder = Path(folder)
    log = _training_log(folder)
    model, tokenizer = load_model(str(folder))
    config = model.config
    training = _stream(tokenizer, [d for c in log["corpora"] for d in documents(c, "train")])
    if len(training) != log["training_tokens_in_corpus"]:
        raise ValueError(
            f"{folder} was trained on {log['training_tokens_in_corpus']:,} tokens, the training split "
            f"now holds {len(training):,}: the corpora changed, so the baseline would read other text. "
            "Train again, or install the package versions that corpora.py names."
        )
    ngram = NGram(training, config.vocab_size, ORDER)
    measured = {corpus: _measure(model, tokenizer, ngram, training, corpus) for corpus in EVALUATED}
    figures = {
        "parameters": log["parameters"],
        "tokens_seen": log["training_tokens_seen"],
        "architecture": {
            "layers": config.n_layer, "width": config.n_embd, "heads": config.n_head,
            "context": config.n_positions, "vocabulary": config.vocab_size,
        },
        "protocol": {
            "window": config.n_positions, "stride": STRIDE, "ngram_order": ORDER, "dtype": "float32",
            "new_tokens": NEW_TOKENS, "temperature": TEMPERATURE, "top_k": TOP_K,
        },
        "corpora": {corpus: _figures(m) for corpus, m in measured.items()},
        "samples": _samples(model, tokenizer, seed=log["seed"]),
    }  # fmt: skip
    _record(figures, runs)
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(figures, log), "utf-8")
    return figures


def _training_log(folder: Path) -> dict:
    path = folder / "training_log.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: give the folder that `course train-lm` wrote a finished model to."
        )
    return json.loads(path.read_text("utf-8"))


def _stream(tokenizer: PreTrainedTokenizerFast, found: list[Document]) -> Tensor:
    return token_stream(tokenizer.backend_tokenizer, found, tokenizer.eos_token_id)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    ngram: NGram,
    training: Tensor,
    corpus: str,
) -> Measured:
    found = documents(corpus, "evaluation")
    streams = [_stream(tokenizer, [document]) for document in found]
    kept = sum(end <= TOKENS_AT_MOST for end in accumulate(map(len, streams)))
    tokens = torch.cat(streams[:kept])
    return Measured(
        documents=kept,
        text="".join(document.text for document in found[:kept]),
        model=perplexity(
            model, tokens, window=model.config.n_positions, stride=STRIDE, progress=True
        ),
        ngram=ngram.perplexity(tokens),
        overlap=overlap(training, tokens),
    )


def _figures(of: Measured) -> dict:
    return {
        "documents": of.documents,
        "tokens": of.model.tokens,
        "bytes": len(of.text.encode("utf-8")),
        "perplexity": of.model.perplexity,
        "bits_per_byte": of.model.bits_per_byte(of.text),
        "ngram_perplexity": of.ngram.perplexity,
        "ngram_bits_per_byte": of.ngram.bits_per_byte(of.text),
        "overlap_13": of.overlap,
    }


def _samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[dict[str, str]]:
    """One continuation of each of `PROMPTS`: the first that the seed gives."""
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            output = model.generate(
                **ids, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K,
                min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            continuation = output[0, ids.input_ids.shape[1] :]
            found.append({"prompt": prompt, "continuation": tokenizer.decode(continuation)})
    return found


def _record(figures: dict, runs: Path) -> None:
    results.set_context(profile="report", device="cpu")
    for name, unit in (("parameters", "parameters"), ("tokens_seen", "tokens")):
        results.record(f"course_lm.{name}", figures[name], unit, 0, model="course-lm", runs=runs)
    for corpus, values in figures["corpora"].items():
        of = {"corpus": corpus, "split": "evaluation", "tokens": values["tokens"]}
        for name, unit in (("perplexity", ""), ("bits_per_byte", "bits/byte")):
            for prefix in ("", "ngram_"):
                value = values[prefix + name]
                how = {"order": ORDER} if prefix else {
                    key: figures["protocol"][key] for key in ("window", "stride", "dtype")
                }  # fmt: skip
                # float32 sums differ a little between processors
                results.record(
                    f"course_lm.{corpus}.{prefix}{name}", value, unit, 1e-3 * value,
                    model="course-lm", runs=runs, **of, **how,
                )  # fmt: skip


def _card(figures: dict, log: dict) -> str:
    """The model card: front matter of the Hugging Face hub, then markdown."""
    corpora = figures["corpora"].items()
    quality = _table(
        ["text", "documents", "tokens", "perplexity", "bits per byte", f"{ORDER}-gram perplexity",
         f"{ORDER}-gram bits per byte", "13-token sequences also in the training text"],
        [
            [EVALUATED[corpus], f"{v['documents']}", f"{v['tokens']:,}", f"{v['perplexity']:.2f}",
             f"{v['bits_per_byte']:.3f}", f"{v['ngram_perplexity']:.2f}",
             f"{v['ngram_bits_per_byte']:.3f}", f"{v['overlap_13']:.1%}"]
            for corpus, v in corpora
        ],
    )  # fmt: skip
    curve = _table(
        ["step", "training loss", "held-out loss", "learning rate"],
        [
            [f"{r['step']}", f"{r['loss']:.3f}", f"{r['held_out']:.3f}", f"{r['lr']:.2e}"]
            for r in _thinned(log["curve"], 15)
        ],
    )
    best = min(log["curve"], key=lambda row: row["held_out"])
    samples = "\n\n".join(
        "> **" + _quoted(s["prompt"]) + "**" + _quoted(s["continuation"])
        for s in figures["samples"]
    )
    a = figures["architecture"]
    model = _table(
        ["", ""],
        [
            ["parameters", f"{figures['parameters']:,}"],
            ["layers, width, heads", f"{a['layers']}, {a['width']}, {a['heads']}"],
            ["context", f"{a['context']} tokens"],
            ["vocabulary", f"{a['vocabulary']:,}, byte-level BPE, learned from the training text"],
            ["weights", "safetensors, float16 (trained in float32); embedding and head tied"],
            ["made by", "`course train-lm`, with no pretrained part"],
        ],
    )
    s, seen, held = log["settings"], figures["tokens_seen"], log["training_tokens_in_corpus"]
    hours = math.fsum(row["seconds"] for row in log["curve"]) / 3600
    training = _table(
        ["", ""],
        [
            ["text", f"{_joined(log['corpora'])}, both in the public domain"],
            ["training split", f"{log['training_documents']:,} documents, {held:,} tokens"],
            ["split", "by the hash of a document's name: 10% evaluation, 6% calibration"],
            ["batch", f"{log['batch_sequences']} sequences of {log['context']} tokens"],
            [
                "seen",
                f"{log['curve'][-1]['step']:,} steps, {seen:,} tokens, {seen / held:.1f} epochs",
            ],
            ["optimizer", f"AdamW, betas {s['betas'][0]} and {s['betas'][1]}"],
            ["weight decay", f"{s['weight_decay']}, on matrices"],
            ["gradient norm", f"at most {s['clip']}"],
            ["learning rate", f"{s['lr']:g}, over {s['warmup']} steps of warm-up"],
            ["decay to zero", f"linear, over the last {s['decay']} of {s['steps']} steps"],
            ["kept weights", f"held-out loss {best['held_out']:.3f} nats, at step {best['step']}"],
            ["seed", f"{log['seed']}"],
            ["time", f"{hours:.1f} hours on {log['threads']} threads of a CPU"],
            ["python", log["python"]],
            ["torch, transformers", f"{log['torch']}, {log['transformers']}"],
        ],
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# course-lm

A small English language model for the course Large Model Quantization: a deep dive. It is small
enough to come with the course's package, and its weights were never rounded below float16, so that
every method is compared with a real reference. It has GPT-2's architecture and loads through
`transformers` as `GPT2LMHeadModel`.

{model}

## What it is for, and what not

It is a test object for quantization, pruning and distillation. It writes text that looks like its
training text for a phrase or two; made-up words and broken sentences are common, and so are made-up
facts: names, dates and figures in its samples are not to be believed. It knows two kinds of English
prose and no other, follows no instructions, sees at most {a["context"]} tokens, and nobody looked for
bias in it; two centuries of presidents' addresses hold views that are not ours. What is concluded on
it about large models needs a check on a large model.

## Quality

Evaluation documents were held out whole: countries, addresses. Perplexity is per token of this
model's own tokenizer; bits per byte of UTF-8 text compare between tokenizers. Windows of
{figures["protocol"]["window"]} tokens start every {STRIDE} tokens: each token is predicted once, after
at least {STRIDE} others (fewer only at the start of the text). The weights were evaluated in float32.
Of each text, whole documents are taken in the order of their names, up to {TOKENS_AT_MOST:,} tokens.
The baseline is an interpolated modified Kneser-Ney model of order {ORDER}, counted on the same
training tokens and evaluated on the same tokens.

{quality}

The last column says how much of the text repeats the training text word for word (the Factbook explains
its fields in the same words for many countries). Such passages are easy for both models.

## Samples

Temperature {TEMPERATURE}, top-k {TOP_K}, {NEW_TOKENS} tokens, seed {log["seed"]}: the first that came,
not chosen.

{samples}

## Training

{training}

{curve}

The held-out loss of the curve mixes both texts, in 128 windows without overlap, so it compares with no
row of the table of quality. It chose the weights that were kept, which makes those rows very slightly
optimistic. All rows are in `training_log.json`.

To reproduce: `course train-lm` trains the same model from the same seed, `course lm-report` measures it
and writes this card. The same torch with as many threads on the same kind of processor gives the
same weights; another one gives slightly different ones.
"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _thinned(curve: list[dict], at_most: int) -> list[dict]:
    """Every k-th row of the curve, and the last."""
    every = math.ceil(len(curve) / at_most)
    return [row for i, row in enumerate(curve, 1) if i % every == 0 or i == len(curve)]


def _joined(names: list[str]) -> str:
    titles = {"factbook": "CIA World Factbook", "sotu": "State of the Union addresses"}
    return " and ".join(titles[name] for name in names)


def _quoted(text: str) -> str:
    """Text as part of one markdown block quote: its line breaks kept, its markup inert."""
    for special in "\\`*_#<>[]|":
        text = text.replace(special, "\\" + special)
    return text.replace("\n", "\n> ")

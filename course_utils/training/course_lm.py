"""Training of course-lm, the small language model that the course carries with it.

`course train-lm` runs this: tokenizer, training, evaluation, model card. It takes about two hours on
two CPU cores, and goes on from its checkpoint when interrupted.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.models.tokenizer import save_tokenizer
from course_utils.training.loop import TrainConfig, next_token_loss, train

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, CONTEXT, BATCH, SEED = 4096, 256, 8, 0
CORPORA = ("factbook", "sotu")
SCHEDULE = TrainConfig(steps=5400, lr=1.5e-3, warmup=200, decay=1080, eval_every=200, patience=8)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer (the kind that GPT-2 uses) with `VOCABULARY` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model(seed: int = SEED) -> GPT2LMHeadModel:
    """GPT-2's architecture at width 256, with fresh weights; dropout is off."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, stream: Tensor, windows: int = 128) -> float:
    """Mean loss in nats per token over `windows` windows spread evenly over `stream`."""
    starts = torch.linspace(0, len(stream) - CONTEXT - 1, windows).long()
    batches = stream[starts[:, None] + torch.arange(CONTEXT + 1)].split(16)
    return torch.stack([next_token_loss(model, batch) for batch in batches]).mean().item()


def train_course_lm(out: Path, config: TrainConfig = SCHEDULE) -> None:
    """Train the model and write weights (fp16), tokenizer and `training_log.json` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = {s: [d for c in CORPORA for d in documents(c, s)] for s in ("train", "evaluation")}
    tokenizer = train_tokenizer([d.text for d in text["train"]])
    end = tokenizer.token_to_id(END_OF_TEXT)
    streams = {split: token_stream(tokenizer, found, end) for split, found in text.items()}
    batches = TrainingBatches(streams["train"], context=CONTEXT, batch_size=BATCH, seed=SEED)
    model = new_model()
    print(f"{model.num_parameters():,} parameters; {len(streams['train']):,} training tokens; "
          f"{config.steps} steps = {config.steps / batches.steps_per_epoch:.1f} epochs")  # fmt: skip

    curve = train(
        model,
        batches,
        config,
        evaluate=lambda m: held_out_loss(m, streams["evaluation"]),
        checkpoint=out / "checkpoint.safetensors",
        data=f"{' and '.join(CORPORA)}, {len(streams['train'])} tokens",
    )
    model.half().save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )
    save_tokenizer(fast, out)
    log = {
        "parameters": model.num_parameters(),
        "seed": SEED,
        "corpora": list(CORPORA),
        "training_documents": len(text["train"]),
        "training_tokens_in_corpus": len(streams["train"]),
        "training_tokens_seen": curve[-1]["step"] * BATCH * CONTEXT,
        "batch_sequences": BATCH,
        "context": CONTEXT,
        "settings": asdict(config),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "curve": curve,
    }
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")

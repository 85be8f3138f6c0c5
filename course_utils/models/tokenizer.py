"""Saving a tokenizer so that every version of transformers reads it."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """`tokenizer.save_pretrained(folder)`, with the class under the name that all versions know.

    transformers 5 writes its own name for the class, `TokenizersBackend`, which 4.57 refuses.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")

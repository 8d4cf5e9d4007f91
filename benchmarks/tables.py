"""Writes the tables and sentences of README.md, docs/ and the preset headers from the results: no figure is typed.

    python benchmarks/tables.py            # write them anew
    python benchmarks/tables.py --check    # exit code 1 and one sentence where one is out of date

A text lies between `<!-- begin generated: NAME -->` and `<!-- end generated -->`, in YAML between the same words after
`# `. `blocks` says what the NAMEs are. Pictures are `plot.py`'s.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import blocks
import script
import stored

from fastddr.errors import UserError, nearest

ROOT = Path(__file__).parents[1]
WIDTH = 118
_BLOCK = re.compile(
    r"(?P<begin>^(?P<mark><!--|\#)\ begin\ generated:\ (?P<name>[\w-]+)(?:\ -->)?\n)"
    r"(?P<text>.*?)"
    r"(?P<end>^(?:<!--|\#)\ end\ generated(?:\ -->)?$)",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_MARK = re.compile(r"^(?:<!--|#) (?:begin|end) generated\b", re.MULTILINE)


@dataclass
class Options:
    """Write the generated texts from the results."""

    check: bool = False
    """Write nothing; say which text is out of date, and exit with 1."""


def files(root: Path = ROOT) -> list[Path]:
    """Everything that may hold generated texts."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted(root.glob("fastddr/presets/*.yaml"))]


def without_blocks(text: str) -> str:
    """The text without its generated parts."""
    return _BLOCK.sub("\n", text)


def rendered(path: Path, text: str, results: Sequence[stored.Result]) -> Iterator[tuple[str, str, str]]:
    """(Name, block as it is, block as it should be) of each block of a file.

    Raises:
        UserError: a mark without its other one, or a name that there is not.
    """

    def link(target: Path) -> str:
        return Path(os.path.relpath(target, path.parent)).as_posix()

    found = list(_BLOCK.finditer(text))
    if 2 * len(found) != len(_MARK.findall(text)):
        raise UserError(f"{path.name} has a mark of a generated text without its other one; add that, or remove it.")
    for block in found:
        name = block["name"]
        if name not in blocks.BLOCKS:
            raise UserError(f"{path.name}: there is no generated text {name!r}; {nearest(name, blocks.BLOCKS)}")
        written = blocks.BLOCKS[name](results, link)
        new = _commented(written) if block["mark"] == "#" else _wrapped(written)
        yield name, block[0], f"{block['begin']}{new}{block['end']}"


def _wrapped(paragraphs: Sequence[str]) -> str:
    """Markdown: sentences are filled, tables and pictures stay as they are."""
    return "\n\n".join(text if text[:1] in "|!" else _filled(text) for text in paragraphs) + "\n"


def _commented(lines: Sequence[str]) -> str:
    """YAML: each text with a hanging indent below the first word behind its `Word:`."""
    texts = []
    for text in lines:
        head = re.match(r"(?:\w+:)?\s*", text)
        texts.append(_filled(text, WIDTH - 2, " " * (head.end() if head else 0)))
    return "".join(f"# {line}\n" for text in texts for line in text.splitlines())


def _filled(text: str, width: int = WIDTH, indent: str = "") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main(options: Options, root: Path = ROOT) -> None:
    """Write all, or check all."""
    results = stored.newest(root / "benchmarks" / "results")
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        new = text
        for name, old, wanted in rendered(path, text, results):
            if old != wanted and options.check:
                raise UserError(
                    f"{path.relative_to(root)}: the generated text {name!r} is out of date; run "
                    "`python benchmarks/tables.py`."
                )
            new = new.replace(old, wanted)
        if new != text:
            path.write_text(new, encoding="utf-8")
            sys.stdout.write(f"written: {path.relative_to(root)}\n")


if __name__ == "__main__":
    script.run(main, Options)

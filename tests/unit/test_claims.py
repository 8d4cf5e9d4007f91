"""No speed, time or score is claimed outside of the texts that are written from results."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests_support import ROOT

_NUMBER = (
    r"(?<![\w.])(?:\d[\d,.]*(?<![,.])|(?:half an?|dozen|hundred|thousand|two|three|four|five|six|seven|eight|nine|ten"
    r"|eleven|twelve|fifteen|twenty|thirty|forty|fifty|sixty)\b)"
)
_INTERVAL = r"\(\d[\d,.]*\s*(?:-|–|to)\s*\d[\d,.]*\)"
#: What makes of a number a claim of speed, time or score.
CLAIM = re.compile(
    rf"{_NUMBER}(?:\s*{_INTERVAL})?(?:"
    # 660 synthetic photographs a second, 445 images/s, 53 a second
    r"(?:[\s-]+[a-z]+){0,3}?\s*(?:/\s*s(?:ec|econd)?\b|\b(?:a|per|each|every)\s+(?:second|minute|hour)\b)"
    # 93 s, 4.1 ms, twelve minutes, a 3-minute run
    r"|[\s-]?(?:ns|µs|us|ms|s|secs?|seconds?|mins?|minutes?|h|hrs?|hours?|days?)\b"
    # 2.9 times as fast, 3× faster, 13 times the memory, tenfold
    r"|\s*(?:×|x|times|-?fold)\s*(?:as|faster|slower|quicker|less|more|the|that)\b|-?fold\b"
    # 25 GB/s, 790 TFLOP/s
    r"|\s*(?:[KMGT]i?B/s|[KMGTP]?FLOPs?\b)"
    # 98 % of the ceiling, 30 % faster
    r"|\s*%\s+(?:faster|slower|quicker|less|more|of (?:the|a|its) (?:time|step|speed|ceiling|limit|bandwidth|peak))"
    # 2.9 (2.8-3.1), 2.9× (2.8-3.1): a figure with its interval
    rf"|[^\s()|\w]{{0,2}}\s*{_INTERVAL}"
    r")"
    # a kappa of 0.84
    r"|(?:kappa|QWK|accuracy)\b[^.|]{0,50}?[\s(]0\.\d+"
)
#: What looks like one and is none, with the reason.
ALLOWED = {
    "image (b 3 h w;": "the shape of a batch",
    "or eight times as long as wide": "the shape of a photograph",
    # An aim, and it says so.
    "84 %, kappa 0.85 and macro-F1 0.65 at least, within 10 minutes on one H200. Nobody has measured it yet.": "",
}


def claims(text: str) -> list[str]:
    """Every claim in a text, with some words around it; lines, emphasis and the marks of comments are no matter."""
    plain = " ".join(re.sub(r"[*`]|^#+ ?", "", text, flags=re.MULTILINE).split())
    for phrase in ALLOWED:
        plain = plain.replace(phrase, "")
    return [plain[max(found.start() - 30, 0) : found.end() + 30] for found in CLAIM.finditer(plain)]


def header(path: Path, text: str) -> str:
    """Of a preset the comments, of another file all."""
    if path.suffix != ".yaml":
        return text
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


def test_nothing_claims_a_speed_by_hand(load: Callable[[str], Any]) -> None:
    tables = load("tables")
    found = {path.name: claims(tables.without_blocks(header(path, path.read_text()))) for path in tables.files()}
    assert {name: said for name, said in found.items() if said} == {}, (
        "write it from a result (benchmarks/tables.py), or say it without a number"
    )


def test_generated_texts_are_claims(load: Callable[[str], Any]) -> None:
    """So the marks matter: without them the lint would find the figures."""
    text = (ROOT / "README.md").read_text()
    assert len(claims(text)) > 20
    assert claims(load("tables").without_blocks(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "It trains at **12,000** images/s on an H100.", "fastddr is 20× faster than the report's own way",
        "and reaches 98 % of the ceiling", "at 4.3 TB/s of memory bandwidth", "# Time: 6 minutes on one H200",
        "two to three times as fast", "decodes 1,500 images per second", "a 10-fold speed-up over Pillow",
        "the kernel does 1,000,000 img/s", "an epoch in 3.5s", "decoding costs 4.1 ms a\n    photograph",
        "decodes 660 synthetic\nphotographs a second", "photographs of 512 px are made at 53 a second",
        "a quadratic-weighted kappa of 0.84 on the synthetic valid split", "# Result: kappa (QWK) 0.84 on valid",
        "and take some twelve minutes on\n2 CPU cores.", "it takes about half an hour on 2 cores.",
        "| `dali` | 1,305 (1,169-1,434) | 613 |", "takes about 13 times the memory",
    ],
)  # fmt: skip
def test_a_claim_is_caught(text: str) -> None:
    assert claims(text), text


@pytest.mark.parametrize(
    "text",
    [
        "256 px windows of a 512 px canvas", "98 epochs as for the ConvMixer", "95 % intervals", "quality 100, 4:4:4",
        "3 × width × height bytes of its canvas: 0.75 MiB at 512 × 512", "torch 2.14.1, DALI 2.4.0, 2026-11-24",
        "the report gives 93.61 % on train", "shows the same part of the eye in 56 % of the pixels", "minutes on a CPU",
        "Each photograph has 24 random numbers an epoch.", "a scale of 0.87 to 1.15", "`--loading.store-gib 4` sets it",
        "tens of thousands of photographs", "2 threads", "the six hues of seven cameras", "--rounds 7 --seconds 0.8",
    ],
)  # fmt: skip
def test_what_is_no_claim_is_left_alone(text: str) -> None:
    assert claims(text) == []

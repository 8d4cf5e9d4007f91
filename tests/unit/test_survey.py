"""What is wrong with a data set: named by a survey, remembered, and obeyed by training's manifest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from photographs import LAYOUTS, SET, Photo, draw, folders, labelled, official, write_csv
from PIL import Image

from fastddr.data import cache, manifest, photograph, photos, problems, survey, workers
from fastddr.data.cache import Record
from fastddr.data.problems import ERRORS, NOTES, Problem
from fastddr.data.survey import Survey
from fastddr.errors import UserError
from fastddr.tracking import copies


def checked(root: Path, **settings: object) -> Survey:
    seen = survey.take(root, **settings)  # type: ignore[arg-type]
    seen.decode(seen.undecoded(), threads=2)
    return seen


def found_in(seen: Survey) -> dict[str, set[str]]:
    """Kinds of problems, by file name."""
    named: dict[str, set[str]] = {}
    for problem in seen.problems():
        named.setdefault(os.path.basename(problem.path), set()).add(problem.kind)
    return named


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return official(tmp_path / "DDR-dataset") / "DR_grading"


FIRST = "train/007-0000-000.jpg"
SPOILED = "007-0000-000.jpg"


def _bytes(make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(make(path.read_bytes()))


def _png(path: Path, **settings: object) -> None:
    draw(path, 99, format="PNG", **settings)


def _sixteen_bits(path: Path) -> None:
    Image.fromarray(np.arange(40 * 32, dtype=np.uint16).reshape(32, 40)).save(path, "PNG")


def _floats(path: Path) -> None:
    Image.fromarray(np.zeros((32, 40), dtype=np.float32)).save(path, "TIFF")


def _rgb_png(width: int, height: int, bits: int, rows: bytes) -> Callable[[Path], object]:
    """A PNG that Pillow does not write: 16-bit RGB, or one whose header claims more than it holds."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _scan(content: bytes) -> bytes:
    """Damage inside the scan, which Pillow decodes without a word."""
    spoiled = bytearray(content)
    middle = len(content) * 7 // 10
    spoiled[middle : middle + 12] = b"\x55" * 12
    return bytes(spoiled)


def _link_out(path: Path) -> None:
    """To a photograph that lies beside the data set."""
    path.symlink_to(Path(shutil.move(path, path.parents[3] / "elsewhere.jpg")))


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.jpg")


def _turned_twice(path: Path) -> None:
    """By two blocks of EXIF, to its side and upside down."""
    blocks = [draw(path, 99, orientation=way).read_bytes() for way in (6, 3)]
    start = [content.index(b"\xff\xe1") for content in blocks]
    end = start[0] + 2 + int.from_bytes(blocks[0][start[0] + 2 : start[0] + 4], "big")
    path.write_bytes(blocks[0][:end] + blocks[1][start[1] :])


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": ("empty", _bytes(lambda content: b"")),
    "half": ("truncated", _bytes(lambda content: content[: len(content) // 2])),
    "no end": ("truncated", _bytes(lambda content: content[:-2])),
    "header cut": ("truncated", _bytes(lambda content: content[:20])),
    "junk": ("junk", _bytes(lambda content: bytes(np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8)))),
    "text": ("text", _bytes(lambda content: "name,grade\nnaïve,3\n".encode() * 500)),
    "html": ("html", _bytes(lambda content: b"\xef\xbb\xbf\n<!DOCTYPE html><html>404</html>")),
    "scan": ("corrupt", _bytes(_scan)),
    "two orientations": ("corrupt", _turned_twice),
    "gif": ("format", lambda path: draw(path, 99, format="GIF")),
    "webp": ("format", lambda path: draw(path, 99, format="WEBP")),
    "bomb": ("dimensions", _rgb_png(60_000, 60_000, 8, b"\0" * 64)),
    "small bomb": ("dimensions", _rgb_png(12_000, 12_000, 8, b"\0" * 64)),
    "long": ("dimensions", _rgb_png(13_378, 1_800, 8, b"\0" * 64)),
    "ribbon": ("dimensions", lambda path: draw(path, 99, size=(400, 40))),
    "dicom": ("format", _bytes(lambda content: b"\0" * 128 + b"DICM" + content)),
    "heic": ("format", _bytes(lambda content: b"\0\0\0\x18ftypheic" + content)),
    "pdf": ("format", _bytes(lambda content: b"%PDF-1.4\n" + content)),
    "tiny": ("dimensions", lambda path: draw(path, 99, size=(3, 40))),
    "16-bit": ("16-bit", _sixteen_bits),
    "16-bit rgb": ("16-bit", _rgb_png(16, 12, 16, (b"\0" + b"\x12\x34" * 48) * 12)),
    "floats": ("16-bit", _floats),
    "gone": ("missing", lambda path: path.unlink()),
    "link": ("broken-link", _link),
    "link out": ("outside", _link_out),
    "folder": ("format", lambda path: (path.unlink(), path.mkdir())),
    "png half": ("truncated", lambda path: (_png(path), _bytes(lambda c: c[: len(c) // 2])(path))),
    "png called jpg": ("extension", _png),
    "cmyk": ("cmyk", lambda path: draw(path, 99, mode="CMYK")),
    "greyscale": ("greyscale", lambda path: draw(path, 99, mode="L")),
    "progressive": ("progressive", lambda path: draw(path, 99, progressive=True)),
    "turned": ("turned", lambda path: draw(path, 99, orientation=6)),
}


@pytest.mark.parametrize("what", FAULTS)
def test_every_fault_is_named_and_training_obeys_the_verdict(what: str, data: Path) -> None:
    kind, spoil = FAULTS[what]
    assert found_in(checked(data)) == {}, "nothing is wrong before"
    spoil(data / FIRST)
    seen = checked(data)
    assert found_in(seen).keys() == {SPOILED}
    assert found_in(seen)[SPOILED] - {"extension"} == {kind} - {"extension"}
    assert kind in found_in(seen)[SPOILED]
    whole = len(SET)
    if kind in ERRORS:
        with pytest.raises(UserError) as caught:
            manifest.of(seen)
        said = str(caught.value)
        assert FIRST in said
        assert ERRORS[kind] in said
        assert "--on-bad exclude" in said
        assert "\n" not in said
        found = manifest.of(seen, "exclude")
        assert len(found) == whole - 1
        assert [(problem.path, problem.kind) for problem in found.left_out] == [(FIRST, kind)]
        assert any("1 photographs or labels cannot be used" in note for note in found.notes)
    else:
        found = manifest.of(seen)
        assert len(found) == whole
        assert not found.left_out
        assert any(f"1 × {kind}" in note for note in found.notes)
        assert kind in NOTES


def test_the_longest_side_that_is_taken_is_that_of_a_square_that_pillow_decodes(data: Path) -> None:
    """One more is a fault, above. `prepare` makes a square round all of a photograph."""
    _rgb_png(photograph.MAX_SIDE, 1_800, 8, b"\0" * 64)(data / FIRST)
    assert photograph.MAX_SIDE == 13_377
    header = photograph.header(str(data / FIRST))
    assert (header.width, header.height) == (photograph.MAX_SIDE, 1_800)


def test_orientation_is_read_from_every_format(tmp_path: Path) -> None:
    for extension in ("jpg", "png", "tif"):
        path = draw(tmp_path / f"a.{extension}", orientation=8)
        with photograph.strict_sizes():
            found = photograph.header(str(path))
        assert (found.width, found.height) == photograph.upright(str(path)).size == (32, 40)
        assert found.traits == ("turned",)


def _entry(tag: int, value: int) -> bytes:
    """One short number in the directory of a TIFF."""
    return struct.pack("<HHIHH", tag, 3, 1, value, 0)


def _no_adobe(content: bytes) -> bytes:
    marker = content.index(b"\xff\xee")
    return content[:marker] + content[marker + 2 + int.from_bytes(content[marker + 2 : marker + 4], "big") :]


def _deeper(content: bytes) -> bytes:
    """A JPEG of 12 bits, by its header."""
    return content.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")


#: What is drawn, what becomes of its bytes, and what is said of it.
RARE: dict[str, tuple[str, str, Callable[[bytes], bytes], str]] = {
    "inks without a word": ("JPEG", "CMYK", _no_adobe, "CMYK JPEG"),
    "cielab": ("TIFF", "LAB", bytes, "CIELAB"),
    "grey with alpha": ("TIFF", "LA", bytes, "one channel with transparency"),
    "palette with alpha": ("TIFF", "PA", bytes, "one channel with transparency"),
    "premultiplied": ("TIFF", "RGBA", lambda c: c.replace(_entry(338, 2), _entry(338, 1)), "premultiplied"),
    "bits without a number": ("TIFF", "1", bytes, "how many bits a sample has, which DALI does not decode"),
    "unknown tiff": ("TIFF", "RGB", lambda c: c.replace(_entry(262, 2), _entry(262, 77)), "header is whole"),
    "12-bit jpeg": ("JPEG", "RGB", _deeper, "header is whole"),
}


@pytest.mark.parametrize("what", RARE)
def test_rare_kinds_are_refused_by_the_header_though_nothing_is_missing(what: str, tmp_path: Path) -> None:
    format, mode, change, said = RARE[what]
    path = draw(tmp_path / "rare.jpg", format=format, mode=mode)
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert (path.read_bytes() == content) == (change is bytes)
    for read in (photograph.header, photograph.sound):
        with photograph.strict_sizes(), pytest.raises(photograph.BadPhotograph) as caught:
            read(str(path))
        assert caught.value.kind == "format"
        assert said in caught.value.reason
    path.write_bytes(content[:30])
    with photograph.strict_sizes(), pytest.raises(photograph.BadPhotograph) as caught:
        photograph.header(str(path))
    assert caught.value.kind == "truncated", "here something is"


def test_a_photograph_that_may_not_be_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root everything may be read, so the refusal is made up there."""
    (data / FIRST).chmod(0)
    if os.access(data / FIRST, os.R_OK):
        real = open

        def refuse(file: object, *arguments: object, **more: object) -> object:
            if str(file).endswith(FIRST):
                raise PermissionError(13, "Permission denied", str(file))
            return real(file, *arguments, **more)  # type: ignore[call-overload]

        monkeypatch.setattr(photograph, "open", refuse, raising=False)
    assert found_in(survey.take(data))[SPOILED] == {"unreadable"}
    monkeypatch.undo()
    (data / FIRST).chmod(0o644)
    assert found_in(survey.take(data)) == {}, "what rights hide is not remembered"


@pytest.mark.parametrize("step", ["stat", "header", "pixels"])
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_what_may_pass_is_tried_twice_and_is_not_remembered(
    code: int, step: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name = {"stat": (os, "stat"), "header": (Image, "open"), "pixels": (photograph, "_content")}[step]
    real, failing = getattr(where, name), 0

    def away(file: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal failing
        if failing and str(getattr(file, "name", file)).endswith(FIRST):
            failing -= 1
            raise OSError(code, os.strerror(code))
        return real(file, *arguments, **more)

    monkeypatch.setattr(where, name, away)
    failing = 1
    assert found_in(checked(data)) == {}
    assert failing == 0
    failing = 2
    seen = checked(data, afresh=True)
    assert found_in(seen) == {SPOILED: {"unreadable-now"}}
    with pytest.raises(UserError, match=r"cannot be read now \(.*\); give the same command again"):
        manifest.of(seen)
    assert found_in(survey.take(data)) == {}


def test_faults_of_the_scan_need_decoding_and_the_rest_do_not(data: Path) -> None:
    for number, what in enumerate(["scan", "no end", "empty", "html", "bomb"]):
        FAULTS[what][1](data / f"train/007-{number:04d}-000.jpg")
    by_header = found_in(survey.take(data)).values()
    assert {kind for kinds in by_header for kind in kinds} == {"empty", "html", "dimensions"}
    assert len(found_in(checked(data))) == 5


def test_a_verdict_is_remembered_and_a_repaired_file_is_looked_at_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (data / FIRST).read_bytes()
    (data / FIRST).write_bytes(_scan(whole))
    assert found_in(checked(data))[SPOILED] == {"corrupt"}
    with monkeypatch.context() as patch:
        patch.setattr(photograph, "header", None)
        patch.setattr(photograph, "digest", None)
        again = survey.take(data)
        assert again.undecoded() == []
        assert found_in(again)[SPOILED] == {"corrupt"}
    # The same size, as when it is fetched again: the time of change tells.
    (data / FIRST).write_bytes(whole)
    mended = survey.take(data)
    assert mended.undecoded() == [FIRST]
    mended.decode(mended.undecoded(), threads=1)
    assert found_in(mended) == {}


def test_a_look_afresh_that_is_interrupted_forgets_nothing(data: Path) -> None:
    checked(data)
    survey.take(data, afresh=True)
    assert survey.take(data).undecoded() == []


def test_a_right_that_is_taken_away_is_seen_in_spite_of_the_cache(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes neither size nor time of change. As root everything may be read, so the refusal is made up."""
    checked(data)
    (data / FIRST).chmod(0)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(FIRST) and access(path, mode))
    assert found_in(survey.take(data)) == {SPOILED: {"unreadable"}}
    monkeypatch.undo()
    assert survey.take(data).undecoded() == [], "what is known of it stays known"


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDDR_CACHE", str(tmp_path / "file"))
    assert found_in(checked(data)) == {}
    assert len(survey.take(data).undecoded()) == len(SET)


def test_odd_but_harmless_scan_parameters_are_no_damage(data: Path) -> None:
    """libjpeg remarks on them; the pixels are whole."""
    content = bytearray((data / FIRST).read_bytes())
    start = content.index(b"\xff\xda")
    length = int.from_bytes(content[start + 2 : start + 4], "big")
    content[start + 2 + length - 2] = 0  # the end of the spectral selection, 63 in a sequential scan
    with pytest.raises(ValueError, match="Invalid SOS"):
        simplejpeg.decode_jpeg(bytes(content), strict=True)
    (data / FIRST).write_bytes(content)
    assert found_in(checked(data)) == {}


def test_looking_afresh_takes_nothing_from_the_cache(data: Path) -> None:
    checked(data)
    assert survey.take(data).undecoded() == []
    assert len(survey.take(data, afresh=True).undecoded()) == len(SET)


def test_a_broken_cache_is_made_anew(data: Path) -> None:
    checked(data)
    (stored,) = [
        p for p in (cache.folder() / "photographs").iterdir() if str(data) in p.read_text(errors="surrogateescape")
    ]
    whole = json.loads(stored.read_text())
    older, deep = json.dumps(whole | {"version": 0}), "[" * 10**5 + "]" * 10**5
    for content in ("", "{", "[]", '{"version": 2, "path": ["a"], "size": [1]}', older, deep):
        stored.write_text(content)
        assert len(survey.take(data).undecoded()) == len(SET)
    for wrong in (None, 0, "40", True):  # of one photograph alone
        stored.write_text(json.dumps(whole | {"width": [wrong, *whole["width"][1:]]}))
        seen = survey.take(data)
        assert len(seen.undecoded()) == 1
        assert {record.width for record in seen.records.values()} == {40}


def test_what_is_decoded_is_saved_on_the_way(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_SAVE_EVERY", 0.0)
    seen = survey.take(data)

    class Killed(BaseException):
        pass

    def die(done: int, total: int) -> None:
        if done == 10:
            raise Killed

    with pytest.raises(Killed):
        seen.decode(seen.undecoded(), threads=1, on_progress=die)
    assert len(survey.take(data).undecoded()) == len(SET) - 9


def test_what_another_machine_decoded_is_known_of_the_copy_here(data: Path) -> None:
    """Whose files may have other times of change."""
    there = survey.take(data)
    found = there.decode(there.undecoded(), 1, keep=False)
    survey.take(data).learn({path: record._replace(changed=record.changed + 1) for path, record in found.items()})
    assert survey.take(data).undecoded() == []


def test_of_many_photographs_few_wait_and_what_is_found_is_saved_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 photographs of a second, and savings of 10 s."""
    clock, submitted, saved = 0.0, 0, 0
    paths = [f"{number}.jpg" for number in range(5000)]

    class Counted(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal submitted
            submitted += 1
            return super().submit(*args, **kwargs)

    def learn(self: survey.Survey, found: dict[str, Record], *, keep: bool = True) -> None:
        nonlocal clock, saved
        clock, saved = clock + 10, saved + 1

    def progress(done: int, total: int) -> None:
        nonlocal clock
        clock += 1
        assert submitted - done < workers.AHEAD
        assert total == 5000

    monkeypatch.setattr(survey, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(survey.Survey, "_decoded", lambda self, path: Record(int(path[:-4]), 0))
    monkeypatch.setattr(survey.Survey, "learn", learn)
    monkeypatch.setattr(survey, "time", SimpleNamespace(monotonic=lambda: clock))
    found = survey.Survey("x", Path("x"), "csv", [], {}, [], []).decode(paths, 2, progress)
    assert [(path, record.size) for path, record in found.items()] == [(path, int(path[:-4])) for path in paths]
    assert saved == 5000 // 61 + 1, "a minute after the last, and at the end"
    submitted = 0
    monkeypatch.setattr(photos, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(photos, "_checked", photos.Photo)
    listed, _ = photos.ready(paths, None, lambda what, done, total: progress(done, total))
    assert [photo.path for photo in listed] == paths


def test_what_pillow_remarks_on_metadata_is_not_printed(tmp_path: Path) -> None:
    """In a process of its own: here warnings are what pytest makes of them."""
    draw(tmp_path / "see_through.png", mode="P", transparency=bytes(range(256)))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x010F, 2, 999, 500, 0)  # beyond its end
    Image.new("RGB", (40, 32)).save(tmp_path / "cut.jpg", exif=exif)
    read = "import sys; from fastddr.data import photograph; [photograph.upright(file) for file in sys.argv[1:]]"
    files = [tmp_path / "see_through.png", tmp_path / "cut.jpg"]
    done = subprocess.run([sys.executable, "-c", read, *files], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------ between photographs


def test_the_same_picture_in_two_splits_is_an_error_of_the_one_that_is_trained_on(data: Path) -> None:
    shutil.copy(data / "test/007-0019-000.jpg", data / FIRST)
    shutil.copy(data / "test/007-0020-000.jpg", data / "valid/007-0013-000.jpg")
    seen = checked(data)
    bad = problems.errors(seen.problems())
    assert [(p.path, p.kind) for p in bad] == [
        (FIRST, "picture-in-two-splits"),
        ("valid/007-0013-000.jpg", "picture-in-two-splits"),
    ]
    kept = manifest.of(seen, "exclude").path
    assert "test/007-0019-000.jpg" in kept
    assert FIRST not in kept


@pytest.mark.parametrize("on_bad", ["raise", "exclude"])
def test_what_leaks_between_splits_stays_where_it_is_only_scored(
    data: Path, on_bad: Literal["raise", "exclude"]
) -> None:
    shutil.copy(data / "test/007-0019-000.jpg", data / FIRST)
    seen = checked(data)
    found = manifest.of(seen, on_bad, trained_on="of other photographs")
    assert len(found) == len(SET)
    assert not found.left_out
    said = "1 photographs share their picture or patient with another split (picture-in-two-splits 1): nothing is"
    assert sum(note.startswith(said) for note in found.notes) == 1
    # The run's own, from which it was left out, and which have moved.
    own = manifest.of(seen, "exclude")
    if on_bad == "exclude":
        again = manifest.of(seen, on_bad, trained_on=own.fingerprint)
        assert (again.fingerprint, again.left_out) == (own.fingerprint, own.left_out)
    else:
        # Also of a run that began before the leak was known.
        for fingerprint in (own.fingerprint, found.fingerprint):
            with pytest.raises(UserError, match=r"the same picture is in test too.*--on-bad exclude"):
                manifest.of(seen, on_bad, trained_on=fingerprint)


def test_duplicates_within_a_split_are_a_note_that_names_other_grades(data: Path) -> None:
    shutil.copy(data / FIRST, data / "train/007-0001-000.jpg")
    (problem,) = checked(data).problems()
    assert (problem.path, problem.kind) == ("train/007-0001-000.jpg", "duplicate")
    assert "of grade 1" in problem.reason
    assert f"{FIRST}, of grade 0" in problem.reason


def test_the_same_pixels_in_another_format_are_a_duplicate(tmp_path: Path) -> None:
    root = folders(tmp_path)
    with Image.open(root / "train/0/007-0000-000.jpg") as image:
        image.save(root / "train/0/copy.png")
    assert found_in(checked(root))["copy.png"] == {"duplicate"}


def test_a_patient_in_two_splits(tmp_path: Path) -> None:
    rows = []
    for number, (patient, split) in enumerate(
        [("a", "train"), ("a", "test"), ("b", "train"), ("b", "train"), ("c", "valid")]
    ):
        draw(tmp_path / f"{number}.jpg", number)
        rows.append([f"{number}.jpg", number % 5, split, patient])
    write_csv(tmp_path / "t.csv", ["path", "grade", "split", "patient"], rows)
    (problem,) = survey.take(tmp_path).problems()
    assert (problem.path, problem.kind) == ("0.jpg", "patient-in-two-splits")
    assert "patient a is in test too, as 1.jpg" in problem.reason


def test_the_same_name_in_two_splits_is_a_note(tmp_path: Path) -> None:
    photos = [Photo(n, n % 5, split) for n, split in enumerate(["train"] * 5 + ["valid"] * 5)]
    root = folders(tmp_path, photos)
    draw(root / "valid" / "0" / photos[0].name, 99)
    found = found_in(checked(root))
    assert found == {photos[0].name: {"same-name"}}


@pytest.mark.parametrize("name", ["a b.jpg", "ünder.jpg", "two\nlines.jpg", "tab\t.jpg"])
def test_odd_names_are_a_note_and_are_trained_on(name: str, tmp_path: Path) -> None:
    root = folders(tmp_path)
    draw(root / "train" / "0" / name, 77)
    seen = checked(root)
    assert found_in(seen) == {name: {"name"}}
    found = manifest.of(seen)
    assert f"train/0/{name}" in found.path
    assert all("\n" not in note for note in found.notes)


def test_what_moves_a_terminal_is_not_printed() -> None:
    assert problems.one_line("a\x1b[2J\x9b\u202eb\n\udcff é 目.jpg") == "a?[2J??b ? é 目.jpg"


def test_a_name_that_is_no_text_at_all(tmp_path: Path) -> None:
    """A file name in Latin-1 on a file system of bytes."""
    root = folders(tmp_path)
    draw(root / "train" / "0" / "x.jpg", 77)
    try:
        os.rename(root / "train" / "0" / "x.jpg", os.fsencode(root / "train" / "0") + b"/f\xfcr.jpg")
    except OSError:
        pytest.skip("this file system takes no such name")
    seen = checked(root)
    (problem,) = seen.problems()
    assert problem.kind == "encoding"
    assert survey.take(root).undecoded() == []
    with pytest.raises(UserError, match=r"f\?r.jpg: its name is not UTF-8; rename it"):
        manifest.of(seen)
    assert len(manifest.of(seen, "exclude")) == len(SET)
    with (tmp_path / "bad.csv").open("w", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(problems.write_list([problem]))
    assert problems.read_list(tmp_path / "bad.csv") == {problem.path}


# ------------------------------------------------------------------------------------------ lists


def test_a_list_of_errors_is_one_that_training_takes(data: Path, tmp_path: Path) -> None:
    for number, what in enumerate(["empty", "scan", "gone"]):
        FAULTS[what][1](data / f"train/007-{number:04d}-000.jpg")
    labels = (data / "train.txt").read_text()
    (data / "train.txt").write_text(labels + "nonsense\n007-0003-000.jpg 9\n007-0004-000.jpg 4\n")
    bad = problems.errors(checked(data).problems())
    assert sorted(problem.kind for problem in bad) == ["corrupt", "doubled", "empty", "grade", "label", "missing"]
    file = tmp_path / "bad.csv"
    file.write_text(problems.write_list(bad))
    seen = checked(data, exclude=problems.read_list(file))
    assert problems.errors(seen.problems()) == []
    found = manifest.of(seen)
    assert len(found) == len(SET) - 4
    assert {problem.kind for problem in found.left_out} == {"excluded"}
    assert len(found.left_out) == 6
    assert any("6 photographs are left out, as --exclude lists them" in note for note in found.notes)


@given(
    st.lists(
        st.builds(
            Problem,
            st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1),
            st.sampled_from(sorted(ERRORS)),
            st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))),
        )
    )
)
def test_a_list_holds_any_name(tmp_path_factory: pytest.TempPathFactory, found: list[Problem]) -> None:
    file = tmp_path_factory.mktemp("list") / "bad.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        stream.write(problems.write_list(found))
    assert problems.read_list(file) == {problem.path for problem in found}


@pytest.mark.parametrize(
    "line",
    [
        "{},blurred",
        "{}; blurred",
        "{}\tblurred",
        "no disc,{}",
        "{},",
        "{} ",
        "{} a bit blurred",
        "{} # no disc",
        "{}|bad",
    ],
)
def test_a_note_beside_a_path_of_a_plain_list_is_not_passed_over(data: Path, tmp_path: Path, line: str) -> None:
    """What was to be left out would be trained on."""
    list_, meant = tmp_path / "list.txt", line.format("train/007-0001-000.jpg")
    for before in ("", "train/007-0000-000.jpg\n"):
        list_.write_text(f"{before}{meant}\n")
        with pytest.raises(UserError, match="holds more than the path of a photograph, if only a blank") as refused:
            survey.take(data, exclude=problems.read_list(list_))
        assert repr(meant) in str(refused.value)
    list_.write_text("train/007-0000-000.jpg\nclinic 1, gone.jpg\n")
    assert len(survey.take(data, exclude=problems.read_list(list_)).excluded) == 1


def test_a_plain_list_of_paths(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("train/a.jpg\n\ntrain/b c.jpg\nclinic 1, left.jpg\n")
    assert problems.read_list(tmp_path / "list.txt") == {"train/a.jpg", "train/b c.jpg", "clinic 1, left.jpg"}
    rows = problems.write_list([Problem("a, b.jpg", "empty", "the file is empty")]).splitlines()[1:]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    assert problems.read_list(tmp_path / "list.txt") == {"a, b.jpg"}, "rows that were picked from a list"
    with pytest.raises(UserError, match="cannot be read"):
        problems.read_list(tmp_path / "nowhere.csv")
    (tmp_path / "list.txt").write_text("path\ntrain/a.jpg\n", encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        problems.read_list(tmp_path / "list.txt")


def test_what_is_left_out_moves_no_other_photograph_between_splits(tmp_path: Path) -> None:
    root = LAYOUTS["kaggle"](tmp_path)
    before = {e.path: e.split for e in survey.take(root).entries}
    gone = sorted(before)[3]
    after = {e.path: e.split for e in survey.take(root, exclude=frozenset([gone])).entries}
    assert after == {path: split for path, split in before.items() if path != gone}


def test_a_set_of_which_nothing_is_left(tmp_path: Path) -> None:
    root = labelled(tmp_path)
    for path in (root / "photographs").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its photographs can be used"):
        manifest.read(root, on_bad="exclude")


def test_the_fingerprint_of_a_set_is_that_of_its_manifest(data: Path) -> None:
    seen = survey.take(data)
    assert seen.fingerprint == manifest.of(seen).fingerprint


def test_six_classes(data: Path) -> None:
    five, six = manifest.read(data), manifest.read(data, ungradable="class")
    assert len(six.ids("train")) == len(five.ids("train")) + 1
    assert any("Six classes: 2 ungradable" in note and "1 in train, 1 in test" in note for note in six.notes)
    labels = data / "train.txt"
    labels.write_text("".join(line for line in labels.read_text().splitlines(True) if not line.endswith("5\n")))
    with pytest.raises(UserError, match="holds no ungradable photograph"):
        manifest.read(data, ungradable="class")


def test_links_out_of_the_data_are_taken_where_that_is_asked_for(data: Path, tmp_path: Path) -> None:
    _link_out(data / FIRST)
    assert len(manifest.of(checked(data, follow_links=True))) == len(SET)
    assert found_in(checked(data))[SPOILED] == {"outside"}, "what is known of the file does not hide the link"
    # A whole folder may be a link too; of the set itself it is what the user gave.
    moved = Path(shutil.move(data / "valid", tmp_path / "valid"))
    (data / "valid").symlink_to(moved)
    outside = [problem for problem in checked(data).problems() if problem.kind == "outside"]
    assert len(outside) == 1 + len(list(moved.glob("*.jpg")))
    (tmp_path / "linked").symlink_to(data)
    assert len(checked(tmp_path / "linked").problems()) == len(checked(data).problems())


def test_links_within_the_data_are_followed(data: Path) -> None:
    (data.parent / "store").mkdir()
    kept = Path(shutil.move(data / FIRST, data.parent / "store" / "kept.jpg"))
    (data / FIRST).symlink_to(Path("../..") / kept.relative_to(data.parent))
    assert found_in(checked(data.parent)) == {}, "the folder that was given is the fence"
    assert found_in(checked(data)) == {SPOILED: {"outside"}}, "a part of it alone is a narrower one"


def test_exif_that_breaks_off_turns_nothing(data: Path) -> None:
    """Pillow raises `struct.error` there, DALI passes over it."""
    broken = b"Exif\0\0II*\0"
    draw(data / FIRST, 99, format="PNG")
    Image.open(data / FIRST).save(data / FIRST, "PNG", exif=broken)
    assert found_in(checked(data))[SPOILED] == {"extension"}
    assert photograph.upright(str(data / FIRST)).size == (40, 32)


def test_a_mistyped_tag_spoils_no_turned_photograph(tmp_path: Path) -> None:
    """Pillow's `exif_transpose` writes all EXIF again, and cannot where a width is a text."""
    path = draw(tmp_path / "a.jpg")
    upright = np.asarray(Image.open(path).transpose(Image.Transpose.ROTATE_270))
    width = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"\xff\xe1" + struct.pack(">H", 46) + b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width + orientation
    path.write_bytes(b"\xff\xd8" + exif + bytes(4) + path.read_bytes()[2:])
    with photograph.strict_sizes():
        assert photograph.sound(str(path)).traits == ("turned",)
    assert np.array_equal(photograph.upright(str(path)), upright)
    assert copies.thumbnail(path).size == (32, 40)
    assert photograph.small(path, 40) is not None

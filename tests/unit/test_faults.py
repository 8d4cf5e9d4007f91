"""Faults put in on purpose: each is what its name says, into one file each, the same ones for the same seed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from fastddr.data.faults import FAULTS, apply, inject
from fastddr.data.synthetic import render
from fastddr.errors import UserError

#: Wider than high: a turned photograph can be told.
WIDTH, HEIGHT = 128, 96


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return render(0, "train", 0, 2, WIDTH)[0][:HEIGHT]


@pytest.fixture
def photo(tmp_path: Path, picture: np.ndarray) -> Path:
    path = tmp_path / "one.jpg"
    Image.fromarray(picture).save(path, quality=95, subsampling="4:2:0")
    return path


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def distance(image: Image.Image, picture: np.ndarray) -> float:
    """Mean difference in levels of 255: under 4 is what JPEG does."""
    return float(np.abs(np.asarray(image.convert("RGB"), float) - picture).mean())


def decodes_strictly(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data, strict=True)
    except ValueError:
        return False
    return True


def test_the_photograph_of_these_tests_is_sound(photo: Path, picture: np.ndarray) -> None:
    assert distance(opened(photo), picture) < 4
    assert decodes_strictly(photo.read_bytes())


def test_every_fault_spoils_the_file_and_leaves_its_name(photo: Path, picture: np.ndarray) -> None:
    sound = photo.read_bytes()
    (photo.parent / "two.jpg").write_bytes(b"another")
    for fault in FAULTS:
        photo.unlink(missing_ok=True)
        photo.write_bytes(sound)
        assert apply(photo, fault) == photo
        if fault == "unreadable":
            photo.chmod(0o600)
            assert photo.read_bytes() == sound
        else:
            assert not photo.exists() or photo.read_bytes() != sound, fault
        assert {p.name for p in photo.parent.iterdir()} <= {"one.jpg", "two.jpg"}, fault


def test_empty(photo: Path) -> None:
    assert apply(photo, "empty").read_bytes() == b""


def test_truncated(photo: Path) -> None:
    sound = photo.read_bytes()
    assert apply(photo, "truncated").read_bytes() == sound[: len(sound) // 2]
    with pytest.raises(OSError, match="truncated"):
        opened(photo)


@pytest.mark.parametrize("fault", ["junk", "text", "html"])
def test_what_is_no_photograph(photo: Path, fault: str) -> None:
    data = apply(photo, fault).read_bytes()
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(photo)
    if fault == "junk":
        assert len(set(data)) > 200
    else:
        assert data.decode("ascii").isprintable() or "\n" in data.decode("ascii")
    assert data.lower().startswith(b"<!doctype html") == (fault == "html")


@pytest.mark.parametrize(
    ("fault", "format_", "mode"),
    [
        ("extension", "PNG", "RGB"),
        ("format", "GIF", "P"),
        ("cmyk", "JPEG", "CMYK"),
        ("16-bit", "PNG", "I;16"),
        ("greyscale", "JPEG", "L"),
        ("progressive", "JPEG", "RGB"),
    ],
)
def test_other_formats_show_the_same_picture(
    photo: Path, picture: np.ndarray, fault: str, format_: str, mode: str
) -> None:
    with Image.open(apply(photo, fault)) as image:
        image.load()
        # A GIF's first frame may be opened with or without its palette.
        assert (image.format, image.mode) == (format_, mode)
        assert bool(image.info.get("progressive")) == (fault == "progressive")
        assert image.size == (WIDTH, HEIGHT)
        shown = image
        if fault == "16-bit":
            deep = np.asarray(image)
            assert deep.dtype == np.uint16
            assert deep.max() > 255
            shown = Image.fromarray((deep // 257).astype(np.uint8))
    if fault in ("16-bit", "greyscale"):
        picture = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))
    assert distance(shown, picture) < 8


def test_turned(photo: Path, picture: np.ndarray) -> None:
    image = opened(apply(photo, "turned"))
    assert image.size == (HEIGHT, WIDTH)
    assert image.getexif()[0x0112] == 6
    assert distance(ImageOps.exif_transpose(image), picture) < 4


def test_bomb(photo: Path) -> None:
    apply(photo, "bomb")
    assert photo.stat().st_size < 1000
    with pytest.raises(Image.DecompressionBombError, match="3600000000 pixels"):
        Image.open(photo)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_corrupt(photo: Path, picture: np.ndarray, seed: int, progressive: bool) -> None:
    Image.fromarray(picture).save(photo, quality=95, subsampling="4:2:0", progressive=progressive)
    sound = photo.read_bytes()
    data = apply(photo, "corrupt", seed=seed).read_bytes()
    assert opened(photo).size == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        simplejpeg.decode_jpeg(data, strict=True)
    changed = [i for i, (a, b) in enumerate(zip(sound, data, strict=True)) if a != b]
    assert len(data) == len(sound)
    assert 0 < changed[-1] - changed[0] < 64
    assert 0xFF not in [data[i] for i in changed]


def test_corrupt_goes_on_until_libjpeg_warns_of_damage(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def decode(data: bytes, strict: bool) -> None:
        assert strict
        tried.append(data)
        if len(tried) > 1:  # the first one is decoded without a complaint
            raise ValueError("Corrupt JPEG data: bad Huffman code" if len(tried) > 2 else "Unsupported marker")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    assert apply(photo, "corrupt").read_bytes() == tried[2]
    assert len(set(tried)) == 3


def test_corrupt_needs_a_jpeg(photo: Path) -> None:
    with pytest.raises(UserError, match="Only a JPEG"):
        apply(apply(photo, "extension"), "corrupt")


def test_unreadable(photo: Path) -> None:
    assert stat.S_IMODE(apply(photo, "unreadable").stat().st_mode) == 0


def test_broken_link(photo: Path) -> None:
    apply(photo, "broken-link")
    assert photo.is_symlink()
    assert not photo.exists()


def test_missing(photo: Path) -> None:
    assert not os.path.lexists(apply(photo, "missing"))


def test_duplicate(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no other photograph"):
        apply(photo, "duplicate")
    (tmp_path / "two.jpg").write_bytes(b"another")
    assert apply(photo, "duplicate").read_bytes() == b"another"


def test_a_fault_that_does_not_exist_is_refused(photo: Path) -> None:
    sound = photo.read_bytes()
    with pytest.raises(UserError, match=r"no fault 'trunkated'; did you mean 'truncated'\?$"):
        apply(photo, "trunkated")
    with pytest.raises(UserError, match="no fault 'trunkated'"):
        inject(photo.parent, [photo.name] * 3, ["empty", "trunkated"])
    assert photo.read_bytes() == sound


def test_a_fault_leaves_other_names_of_the_file_alone(photo: Path, tmp_path: Path) -> None:
    sound = photo.read_bytes()
    os.link(photo, tmp_path / "same.jpg")
    apply(photo, "empty")
    assert (tmp_path / "same.jpg").read_bytes() == sound


# ------------------------------------------------------------------------------------------- inject


@pytest.fixture
def folder(tmp_path: Path, picture: np.ndarray) -> tuple[Path, list[str], dict[str, str]]:
    """Thirty photographs, no two the same bytes: twenty of train, ten of valid."""
    root = tmp_path / "set"
    root.mkdir()
    files = [f"{i:02d}.jpg" for i in range(30)]
    for i, name in enumerate(files):
        Image.fromarray(np.roll(picture, i, 1)).save(root / name, quality=95)
    return root, files, {name: "train" if i < 20 else "valid" for i, name in enumerate(files)}


def bytes_of(root: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(root.iterdir()):
        if path.exists():
            path.chmod(0o600)
            found[path.name] = path.read_bytes()
    return found


def test_each_fault_goes_into_one_file_and_the_others_stay(folder: tuple[Path, list[str], dict[str, str]]) -> None:
    root, files, splits = folder
    before = bytes_of(root)
    found = inject(root, files, FAULTS, splits=splits)
    assert sorted(found.values()) == sorted(FAULTS)
    assert [splits[name] for name in found].count("train") == 9, "not by turns"
    after = bytes_of(root)
    assert {n for n in files if after.get(n) != before[n]} == {n for n, f in found.items() if f != "unreadable"}
    copy = next(name for name, fault in found.items() if fault == "duplicate")
    of = [name for name in files if name != copy and after.get(name) == after[copy]]
    assert len(of) == 1
    assert splits[of[0]] == splits[copy]


def test_the_seed_decides(folder: tuple[Path, list[str], dict[str, str]]) -> None:
    root, files, _ = folder
    before = bytes_of(root)
    results = []
    for seed in (1, 1, 2):
        for name, data in before.items():
            (root / name).unlink(missing_ok=True)
            (root / name).write_bytes(data)
        results.append((inject(root, files, FAULTS, seed), bytes_of(root)))
    assert results[0] == results[1]
    assert results[0][0] != results[2][0]


def test_a_duplicate_of_the_only_one_of_its_split_is_of_another(
    folder: tuple[Path, list[str], dict[str, str]],
) -> None:
    root, files, _ = folder
    splits = dict.fromkeys(files, "train") | {files[0]: "valid"}
    copy = next(iter(inject(root, files[:2], ["duplicate"], splits=splits)))
    after = bytes_of(root)
    assert {name for name in files if after[name] == after[copy]} == set(files[:2])


def test_too_few_files_are_refused(folder: tuple[Path, list[str], dict[str, str]]) -> None:
    root, files, _ = folder
    before = bytes_of(root)
    with pytest.raises(UserError, match="3 faults need 3 photographs, and there are 2"):
        inject(root, files[:2], ["empty"] * 3)
    with pytest.raises(UserError, match="2 faults need 3 photographs"):
        inject(root, files[:2], ["empty", "duplicate"])
    assert bytes_of(root) == before
    assert set(inject(root, files[:2], ["empty"] * 2)) == set(files[:2])

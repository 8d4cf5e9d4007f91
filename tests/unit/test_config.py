"""Configuration: presets, flags, YAML, and one sentence for what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastddr.cli import parse
from fastddr.config import (
    RUNTIME_KEYS,
    Config,
    dump,
    flatten,
    from_mapping,
    identity_changes,
    load_preset,
    preset_names,
)
from fastddr.errors import UserError


def test_every_preset_loads_and_bears_its_name() -> None:
    assert {"quickstart", "report-cnn", "report-resnet", "report-convmixer"} <= set(preset_names())
    for name in preset_names():
        assert load_preset(name).preset == name


def test_report_presets_keep_the_protocol_of_the_report() -> None:
    for name in ("report-cnn", "report-resnet", "report-convmixer"):
        config = load_preset(name)
        assert (config.epochs, config.image_size, config.canvas) == (98, 256, 512)
        assert config.optimizer.name == "adam"
        assert config.model == name.removeprefix("report-")
    mixer = load_preset("report-convmixer")
    assert (mixer.convmixer.dim, mixer.convmixer.depth, mixer.convmixer.kernel_size) == (512, 12, 9)
    assert (mixer.convmixer.patch_size, mixer.lr, mixer.batch_size) == (8, 1e-3, 64)


def test_preset_headers_give_command_time_and_result() -> None:
    folder = Path(__file__).parents[2] / "fastddr" / "presets"
    for file in folder.glob("*.yaml"):
        header = " ".join(line for line in file.read_text().splitlines() if line.startswith("#"))
        for word in ("accelerate launch fastddr/train.py", "Time:", "Result:"):
            assert word in header, f"{file.name} does not say {word!r}"
        assert "TIME" not in header, f"{file.name} is not filled in"


@given(
    st.builds(
        replace,
        st.just(Config()),
        epochs=st.integers(1, 500),
        lr=st.floats(1e-8, 10),
        seed=st.integers(0, 2**63 - 1),
        run_dir=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
        micro_batch_size=st.just("auto") | st.integers(1, 64),
    )
)
def test_a_dumped_configuration_reads_back_equal(config: Config) -> None:
    assert from_mapping(yaml.safe_load(dump(config)), "dump") == config


def test_flags_lie_over_the_preset() -> None:
    config = parse(["--preset", "report-cnn", "--epochs", "3", "--cnn.blocks", "4", "--augment.hflip"], "x")
    assert (config.epochs, config.cnn.blocks, config.model) == (3, 4, "cnn")
    assert config.augment.hflip
    assert not config.augment.vflip


def test_a_saved_configuration_is_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump(replace(Config(), epochs=7, optimizer=replace(Config().optimizer, clip_norm=2.0))))
    config = parse(["--preset", str(file)], "x")
    assert (config.epochs, config.optimizer.clip_norm) == (7, 2.0)


@pytest.mark.parametrize(
    ("arguments", "offender", "hint"),
    [
        (["--epoch", "3"], "--epoch", "--epochs"),
        (["--optimizer.nme", "adam"], "--optimizer.nme", "--optimizer.name"),
        (["--preset", "report-convmixr"], "report-convmixr", "report-convmixer"),
        (["--preset", "nowhere.yaml"], "nowhere.yaml", "no such file"),
        (["--preset"], "--preset", "quickstart"),
        (["--epochs", "three"], "--epochs", "three"),
        (["--epochs"], "--epochs", "value"),
        (["--optimizer.name", "rmsprop"], "rmsprop", "adamw"),
        (["--epochs", "0"], "epochs", "at least 1"),
        (["--image-size", "600"], "image_size 600", "canvas"),
        (["--augment.scale", "0.5", "1"], "augment.scale", "0.8"),
        (["stray"], "stray", "dashes"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: list[str], offender: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments, "x")
    sentence = str(caught.value)
    assert offender in sentence
    assert hint in sentence
    assert "\n" not in sentence
    assert not any(mark in sentence for mark in "╭│─")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {nme: sgd}", "'optimizer.nme'; did you mean 'optimizer.name'"),
        ("epohcs: 3", "'epohcs'; did you mean 'epochs'"),
        ("lr: fast", "lr: Input should be a valid number"),
        ("optimizer: 3", "'optimizer' is a section"),
        ("lr: 1\nlr: 2", "stands twice"),
        ("- 1", "not a list"),
        ("a: [", "not YAML"),
        ("loss: {label_smoothing: 1.5}", "label_smoothing"),
        ("epochs: yes", "epochs"),
        ("epochs: '3'", "epochs"),
        ("lr: true", "lr"),
    ],
)
def test_a_wrong_yaml_is_one_sentence_that_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_preset(str(file))
    assert said in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text, value in [("1e-4", 1e-4), ("2.5E+1", 25.0), ("3", 3.0), ("0.5", 0.5)]:
        file.write_text(f"lr: {text}")  # YAML 1.1 calls the first a string
        assert load_preset(str(file)).lr == value


def test_identity_and_runtime_keys() -> None:
    base = Config()
    assert identity_changes(base, replace(base, lr=0.5)) == {"lr": (1e-3, 0.5)}
    assert identity_changes(base, replace(base, save_every_steps=5, data="elsewhere", run_dir="r")) == {}
    tracking = replace(base, tracking=replace(base.tracking, wandb=False))
    assert identity_changes(base, tracking) == {}
    known = flatten(base)
    for key in RUNTIME_KEYS:
        assert any(k == key or k.startswith(key + ".") for k in known), f"{key} is no key"

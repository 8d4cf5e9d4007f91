"""Configuration: presets, flags, YAML, and one sentence for what is wrong."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests_support import ROOT

from fastddr.cli import parse
from fastddr.config import (
    RUNTIME_KEYS,
    Config,
    checked,
    dump,
    flatten,
    from_mapping,
    identity_changes,
    load_preset,
    preset_names,
)
from fastddr.config.sections import GOVERNED, POLICIES, SIZES, AugmentConfig, OptimizerConfig
from fastddr.config.strict import read_yaml
from fastddr.errors import UserError


def test_every_preset_loads_and_bears_its_name() -> None:
    assert {"quickstart", "report-cnn", "report-resnet", "report-convmixer"} <= set(preset_names())
    for name in preset_names():
        assert load_preset(name).preset == name


def test_report_presets_keep_the_protocol_of_the_report() -> None:
    quick = load_preset("quickstart").augment
    assert replace(quick, policy="report") == AugmentConfig(hflip=True, vflip=True)
    for name in ("report-cnn", "report-resnet", "report-convmixer"):
        config = load_preset(name)
        assert (config.epochs, config.image_size, config.canvas) == (98, 256, 512)
        assert config.optimizer.name == "adam"
        assert config.model == name.removeprefix("report-")
        flips = name == "report-convmixer"
        assert replace(config.augment, policy="report") == AugmentConfig(hflip=flips, vflip=flips)
    mixer = load_preset("report-convmixer")
    assert (mixer.convmixer.dim, mixer.convmixer.depth, mixer.convmixer.kernel_size) == (512, 12, 9)
    assert (mixer.convmixer.patch_size, mixer.lr, mixer.batch_size) == (8, 1e-3, 64)


def test_preset_headers_give_command_time_and_result() -> None:
    for file in (ROOT / "fastddr" / "presets").glob("*.yaml"):
        header = " ".join(line for line in file.read_text().splitlines() if line.startswith("#"))
        for word in ("accelerate launch fastddr/train.py", "Time:", "Result:"):
            assert word in header, f"{file.name} does not say {word!r}"
        assert "TIME" not in header, f"{file.name} is not filled in"


@hypothesis.settings(max_examples=50)
@given(
    st.builds(
        replace,
        st.just(Config()),
        epochs=st.integers(1, 500),
        lr=st.floats(1e-8, 10),
        seed=st.integers(0, 2**63 - 1),
        run_dir=st.none()
        | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
        | st.from_regex(r"[-+]?\d{1,3}(\.\d*)?[eE:][-+]?\d{1,4}", fullmatch=True),
        micro_batch_size=st.just("auto") | st.integers(1, 64),
    )
)
def test_a_dumped_configuration_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert from_mapping(read_yaml(file), "dump") == config


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
        (["--augment.policy", "fundsu"], "fundsu", "fundus"),
        (["--augment.policy=fundsu"], "fundsu", "fundus"),
        (["--augment.policy"], "--augment.policy", "value"),
        (["--augment.polcy", "none"], "--augment.polcy", "--augment.policy"),
        (["--augment.scale", "0.9", "inf"], "augment.scale", "0.8"),
        (["--augment.scale", "nan", "1"], "augment.scale", "0.8"),
        (["--augment.translate", "1.1"], "augment.translate", "from 0 to 1"),
        (["--augment.translate", "-0.1"], "augment.translate", "from 0 to 1"),
        (["--augment.resized-crop", "0", "1"], "augment.resized_crop", "above 0"),
        (["--augment.resized-crop", "0.5", "0.4"], "augment.resized_crop", "rise"),
        (["--augment.resized-crop", "0.5", "1.1"], "augment.resized_crop", "at most 1"),
        (["--augment.resized-crop", "1e-9", "1"], "augment.resized_crop", "the least is 1"),
        (["--augment.resized-crop", "0.5"], "--augment.resized-crop", "0.5: give numbers alone"),
        (["--augment.ratio", "0.75", "1.3"], "augment.ratio", "augment.resized_crop"),
        (["--augment.resized-crop", "0.2", "0.4", "--augment.ratio", "0", "1"], "augment.ratio", "above 0"),
        (["--augment.resized-crop", "0.2", "0.4", "--augment.ratio", "1.2", "1"], "augment.ratio", "rise"),
        (["--augment.resized-crop", "0.2", "0.8", "--augment.ratio", "0.75", "1.25"], "augment.ratio", "most 0.75"),
        (
            ["--augment.resized-crop", "0.2", "1", "--augment.scale", "0.8", "1"],
            "augment.scale from 0.8",
            "canvas to 224",
        ),
        (["--preset", "report-cnn", "--augment.resized-crop", "0.2", "0.8"], "canvas 512", "area to 0.39"),
        (["--augment.mixup", "-1"], "augment.mixup", "0 (off)"),
        (["--augment.cutmix", "nan"], "augment.cutmix", "0 (off)"),
        (["--augment.cutmix", "1", "--micro-batch-size", "1"], "augment.cutmix", "raise micro_batch_size"),
        (["--augment.mixup", "1", "--batch-size", "1"], "augment.mixup", "raise batch_size"),
        (["--model", "convmixr"], "convmixr", "convmixer"),
        (["--model", "convmixer-s"], "convmixer-s", "convmixer.size s"),
        (["--model", "vgg"], "vgg", "timm:NAME"),
        (["--model", "timm:"], "timm:", "timm:NAME"),
        (["--convmixer.size", "xl"], "xl", "xs"),
        (["--convmixer.activation", "silu"], "silu", "gelu"),
        (["--convmixer.dim", "0"], "convmixer.dim is 0", "at least 1"),
        (["--cnn.blocks", "-1"], "cnn.blocks is -1", "at least 1"),
        (["--resnet.stem", "stride2"], "stride2", "stride1"),
        (["--loss.label-smoothing", "1"], "loss.label_smoothing", "below 1"),
        (["--loss.name", "mae"], "mae", "mse"),
        (["--optimizer.warmup-ratio", "1"], "optimizer.warmup_ratio", "below 1"),
        (["--optimizer.ema-decay", "1"], "optimizer.ema_decay", "between 0 and 1"),
        (["--optimizer.schedule", "cosin"], "cosin", "cosine"),
        (["--init", "run:"], "run:", "run:NAME"),
        (["--memory.activation-budget", "0.5"], "activation_budget", "compile"),
        (["--compile", "--memory.activation-budget", "0"], "activation_budget", "above 0"),
        (["--compile", "--memory.checkpointing"], "checkpointing", "activation_budget"),
        (["--optimizer.weight-decay", "-1"], "optimizer.weight_decay", "0 or more"),
        (["--optimizer.betas", "0.9", "1"], "optimizer.betas", "below 1"),
        (["--optimizer.momentum", "1"], "optimizer.momentum", "below 1"),
        (["--lr", "inf"], "lr", "above 0"),
        (["--augment.std", "1", "nan", "1"], "augment.std", "above 0"),
        (["--augment.mean", "0", "inf", "0"], "augment.mean", "three numbers"),
        (["--rank-timeout-minutes", "inf"], "rank_timeout_minutes", "1e6"),
        (["--loading.store-gib", "inf"], "loading.store_gib", "at most"),
        (["--threads", "100000000000"], "threads", "cores"),
        (["--data", "/photographs/\udcff"], "data", "UTF-8"),
        (["--data", ""], "data", "empty"),
        (["--run-dir="], "run_dir", "empty"),
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
    "arguments",
    [
        ["--augment.scale", "0.8", "1"],
        ["--augment.resized-crop", "0.1", "1", "--image-size", "256", "--canvas", "320"],
        ["--augment.resized-crop", "0.1", "1", "--image-size", "256", "--canvas", "256", "--augment.scale", "0.8", "1"],
        # 3/4 × 4/3 is 1: a window as wide as the canvas, or as high.
        ["--augment.resized-crop", "0.5", "0.75", "--augment.ratio", "0.75", str(4 / 3), "--canvas", "280"],
        ["--augment.translate", "1", "--augment.rotate", "180", "--augment.hue", "0.5", "--augment.contrast", "1"],
        ["--augment.mixup", "1", "--augment.cutmix", "1", "--micro-batch-size", "2"],
    ],
)
def test_what_is_just_at_a_limit_is_taken(arguments: list[str]) -> None:
    parse(arguments, "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {nme: sgd}", "'optimizer.nme'; did you mean 'optimizer.name'"),
        ("epohcs: 3", "'epohcs'; did you mean 'epochs'"),
        ("max_hours: 1:30", "1:30 is a number of base 60"),
        ("lr: fast", "lr: Input should be a valid number"),
        ("optimizer: 3", "'optimizer' is a section"),
        ("lr: 1\nlr: 2", "stands twice"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nlr: [*b, *b]", "write out *a here"),
        ("- 1", "not a list"),
        ("a: [", "not YAML"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("seed: 0x" + "f" * 5000, "too many digits"),
        ("seed: 0x_", "not YAML"),
        ("seed: !!int abc", "not YAML"),
        ("compile: !!bool maybe", "not YAML"),
        ("epochs: !!int ''", "not YAML"),
        ("preset: best\nlr: 0.001", "preset is 'best', but a file or changes cannot begin at another preset"),
        ("data: !!timestamp foo", "not YAML"),
        ("? [a]\n: 1", "unhashable"),
        ("loss: {label_smoothing: 1.5}", "label_smoothing"),
        ("epochs: yes", "epochs"),
        ("epochs: '3'", "epochs"),
        ("lr: true", "lr"),
        ("augment: {policy: fundsu}", "augment.policy: Input should be 'none', 'report' or 'fundus'"),
        ("augment: {policy: null}", "augment.policy"),
        ("augment: {policy: [fundus]}", "augment.policy"),
        ("augment: {resized_crop: [0.5]}", "augment.resized_crop"),
        ("augment: {mixup: 1}\nmicro_batch_size: 1", "mixup"),
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


def test_a_folder_named_by_a_date_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text in ("2026-11-30", "2026-13-01", "2026-11-30 10:00:00"):
        file.write_text(f"data: {text}")
        assert load_preset(str(file)).data == text


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [
        ("lr", np.float64(0.1), 0.1),
        ("seed", np.int64(3), 3),
        ("compile", np.bool_(True), True),
        ("init", Path("some/weights"), "some/weights"),
        ("optimizer", {"betas": [0.9, 0.99]}, OptimizerConfig(betas=(0.9, 0.99))),
        ("epochs", 3.0, "epochs: Input should be a valid integer"),
        ("epochs", np.arange(3), r"array\(\[0, 1, 2\]\) is no value of a setting"),
        ("on_bad", "skip", "on_bad: Input should be 'raise' or 'exclude'"),
        ("augment", {"policy": "Fundus"}, "augment.policy: Input should be"),
        ("augment", None, "'augment' is a section"),
        ("lr", float("nan"), "lr is nan, but must be above 0"),
        ("data", "/photographs/\udcff", "data is .*no UTF-8"),
        ("data", b"photographs", "b'photographs' is no value of a setting"),
        ("epochs", 10**400, "epochs is a number of too many digits"),
    ],
)
def test_what_is_made_in_python_is_made_plain_or_refused(key: str, value: Any, plain: Any) -> None:
    config = Config()
    object.__setattr__(config, key, value)  # tests check the types of arguments, and users have no such checks
    if isinstance(plain, str) and plain != "some/weights":
        with pytest.raises(UserError, match=f"mine: {plain}"):
            checked(config, "mine")
    else:
        found = checked(config, "mine")
        assert found == replace(Config(), **{key: plain})
        assert type(getattr(found, key)) is type(plain)
        assert from_mapping(yaml.safe_load(dump(found)), "dump") == found


def test_a_preset_with_changes_is_what_a_preset_file_makes_of_them(tmp_path: Path) -> None:
    changes = {"epochs": 3, "augment": {"policy": "fundus"}, "convmixer": {"size": "xs", "dim": 40}}
    found = load_preset("report-convmixer", changes)
    assert found == from_mapping(changes, "test", load_preset("report-convmixer"))
    assert (found.augment.rotate, found.convmixer, found.preset) == (
        180,
        replace(SIZES["xs"], dim=40),
        "report-convmixer",
    )
    with pytest.raises(UserError, match=r"changes of preset quickstart: unknown key 'epohcs'; did you mean 'epochs'"):
        load_preset("quickstart", {"epohcs": 3})
    with pytest.raises(UserError, match=r"changes of preset quickstart: preset is 'best', but"):
        load_preset("quickstart", {"preset": "best"})
    with pytest.raises(UserError, match=r"changes of preset quickstart: data is .* no UTF-8"):
        load_preset("quickstart", {"data": "a\ud800"})
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 5")
    assert load_preset(file).epochs == 5
    with pytest.raises(UserError, match="mine is 'quickstart', but must be a Config"):
        checked("quickstart", "mine")


def test_identity_and_runtime_keys() -> None:
    base = Config()
    assert identity_changes(base, replace(base, lr=0.5)) == {"lr": (1e-3, 0.5)}
    assert identity_changes(base, replace(base, save_every_steps=5, data="elsewhere", run_dir="r")) == {}
    tracking = replace(base, tracking=replace(base.tracking, wandb=False))
    assert identity_changes(base, tracking) == {}
    known = flatten(asdict(base))
    for key in RUNTIME_KEYS:
        assert any(k == key or k.startswith(key + ".") for k in known), f"{key} is no key"


def test_levers_that_change_no_number_may_change_and_others_may_not() -> None:
    base = Config()
    assert identity_changes(base, replace(base, memory=replace(base.memory, checkpointing=True))) == {}
    for other in (replace(base, compile=True), replace(base, init="imagenet"), replace(base, model="timm:resnet18"),
                  replace(base, memory=replace(base.memory, layout="NCHW"))):  # fmt: skip
        assert len(identity_changes(base, other)) == 1


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("size", SIZES)
def test_a_size_sets_the_convmixer_and_flags_lie_over_it(size: str, tmp_path: Path) -> None:
    expected = SIZES[size]
    assert expected.size == size
    for arguments in (["--convmixer.size", size], [f"--convmixer.size={size}", "--preset", "report-convmixer"]):
        assert parse(arguments, "x").convmixer == expected
    wider = replace(expected, dim=40)
    assert parse(["--convmixer.dim", "40", "--convmixer.size", size], "x").convmixer == wider
    assert from_mapping({"convmixer": {"dim": 40, "size": size}}, "test").convmixer == wider
    # Of what was resolved the values count, not the name.
    file = tmp_path / "config.yaml"
    file.write_text(dump(replace(Config(), convmixer=wider)))
    assert load_preset(str(file)).convmixer == wider
    assert identity_changes(Config(convmixer=wider), Config(convmixer=replace(wider, size=None))) == {}
    assert "size" not in Config(convmixer=wider).model_settings


def test_any_name_of_timms_passes_and_has_no_settings_here() -> None:
    config = parse(["--model", "timm:vit_tiny_patch16_224"], "x")
    assert (config.model, config.model_settings) == ("timm:vit_tiny_patch16_224", {})
    assert from_mapping(yaml.safe_load(dump(config)), "dump") == config


# ---------------------------------------------------------------------------------------------- policies


def test_policies_bear_their_names_and_govern_all_maps() -> None:
    assert POLICIES["report"] == AugmentConfig()
    for name, augment in POLICIES.items():
        assert augment.policy == name
        assert from_mapping({"augment": {"policy": name}}, "test").augment == augment
        assert parse(["--augment.policy", name], "x").augment == augment
        assert parse([f"--augment.policy={name}"], "x").augment == augment
    assert set(asdict(AugmentConfig())) - set(GOVERNED) == {"mixup", "cutmix", "mean", "std"}


#: Away from every policy in all that they govern, and in what they do not.
FAR: dict[str, Any] = {
    "policy": "report", "hflip": False, "vflip": True, "rotate": 10.0, "scale": [0.9, 1.0], "resized_crop": [0.2, 0.25],
    "ratio": [0.9, 1.1], "translate": 0.1, "brightness": 0.5, "contrast": 0.6, "saturation": 0.7, "hue": 0.1,
    "mixup": 0.2, "cutmix": 1.0, "mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3],
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_a_layer_that_names_a_policy_begins_at_that_policy(name: str, tmp_path: Path) -> None:
    below = from_mapping({"augment": FAR}, "below")
    # The keys of a layer lie over its policy, in whatever order they stand.
    for section in ({"policy": name, "rotate": 30}, {"rotate": 30, "policy": name}):
        above = from_mapping({"augment": section}, "above", below).augment
        kept = {key: tuple(FAR[key]) if isinstance(FAR[key], list) else FAR[key] for key in FAR if key not in GOVERNED}
        assert above == replace(POLICIES[name], rotate=30.0, **kept)
    file = tmp_path / "config.yaml"
    file.write_text(dump(below))
    for flags in (
        ["--augment.policy", name, "--augment.rotate", "30"],
        ["--augment.rotate=30", f"--augment.policy={name}"],
        ["--augment.policy", "none", "--augment.rotate", "30", "--augment.policy", name],
    ):
        assert parse(["--preset", str(file), *flags], "x").augment == above


def test_a_layer_without_a_policy_leaves_what_is_below() -> None:
    below = from_mapping({"augment": {"policy": "fundus", "hue": 0.1}}, "below")
    assert from_mapping({"augment": {"rotate": 5}, "epochs": 3}, "above", below).augment == replace(
        POLICIES["fundus"], hue=0.1, rotate=5.0
    )


@pytest.mark.parametrize("name", POLICIES)
def test_a_stored_configuration_keeps_its_values_whatever_its_policy(name: str) -> None:
    other = from_mapping({"augment": FAR}, "below")
    for values in ({}, FAR | {"policy": name}):
        config = from_mapping({"augment": {"policy": name} | values}, "first")
        stored = yaml.safe_load(dump(config))
        assert from_mapping(stored, "again") == config
        assert from_mapping(stored, "again", other) == config, "also over a base of another policy"


def test_help_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], "x")
    said = capsys.readouterr().out.partition("╭")[0]
    assert all(name in said for name in preset_names())


def test_help_names_the_policies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--augment.policy", "fundus", "--help"], "x")
    assert "none,report,fundus" in capsys.readouterr().out.replace(" ", "")


def test_an_empty_command_line_is_the_quickstart() -> None:
    from fastddr.cli import parse

    assert parse([], "fastddr train").preset == "quickstart"

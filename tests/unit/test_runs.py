"""Which epoch is the best one, and how a run is called."""

import errno
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastddr.config import dump, load_preset
from fastddr.errors import UserError
from fastddr.runs import Progress, RunFolder, continue_from, locate

#: Few values, so that ties are common.
EPOCHS = st.lists(
    st.tuples(st.sampled_from([-0.2, 0.0, 0.5]), st.sampled_from([0.5, 1.0, 1.5])), min_size=1, max_size=8
)


def judged(epochs: list[tuple[float, float]]) -> Progress:
    progress = Progress()
    for epoch, (qwk, loss) in enumerate(epochs, start=1):
        progress.epoch, progress.step = epoch, 10 * epoch
        best = progress.keep_if_best(qwk, loss)
        assert best == (progress.best_epoch == epoch)
    return progress


@given(EPOCHS)
def test_the_highest_kappa_is_best_then_the_lowest_loss_then_the_earliest(epochs: list[tuple[float, float]]) -> None:
    progress = judged(epochs)
    wanted = max(range(len(epochs)), key=lambda i: (epochs[i][0], -epochs[i][1], -i))
    assert (progress.best_epoch, progress.best_step) == (wanted + 1, 10 * (wanted + 1))
    assert (progress.best_qwk, progress.best_loss) == epochs[wanted]


def test_kappas_that_differ_in_the_last_bits_are_equal() -> None:
    assert judged([(1e-17, 1.0), (0.0, 0.9)]).best_epoch == 2
    assert judged([(0.0, 0.9), (1e-17, 1.0)]).best_epoch == 1


@pytest.mark.parametrize(
    ("preset", "data", "name"),
    [
        ("quickstart", "synthetic", "quickstart-synthetic"),
        ("report-cnn", "/data/DDR-dataset/", "report_cnn-DDR_dataset"),
        ("report-cnn", "/data/DDR-dataset/DR_grading", "report_cnn-DDR_dataset"),
        ("mine/my recipe.yaml", "masters", "my_recipe-masters"),
    ],
)
def test_a_run_is_called_by_preset_data_and_time(preset: str, data: str, name: str) -> None:
    """A dash is between these three alone."""
    config = replace(load_preset("quickstart"), preset=preset, data=data)
    found, earlier = locate(config, datetime(2026, 3, 4, 5, 6, 7))
    assert found == Path("runs") / f"{name}-20260304-050607"
    assert not earlier


def test_other_settings_are_refused_with_the_way_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a run")
    run.path.mkdir()
    began = load_preset("quickstart")
    run.config.write_text(dump(began))
    with pytest.raises(
        UserError, match=r"lr was .* and is now 0\.5; to go on as it began, give (.*) without"
    ) as caught:
        continue_from(replace(began, lr=0.5), run, world=1)
    assert f"--preset '{run.config}' --run-dir '{run.path}'" in str(caught.value)
    assert continue_from(load_preset(str(run.config)), run, world=1).lr == began.lr


def test_a_status_that_cannot_be_read_for_a_moment_is_not_that_of_a_run_that_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is done would train again, and score test once more."""
    run = RunFolder(tmp_path)
    assert run.status() == {}
    run.set_status("done", 3)

    def away(file: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises(OSError, match="Input/output error"):
        run.status()

"""Figures against numbers published, against scikit-learn, and against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fastddr.evaluation.metrics import SplitResult, deciding, figures, figures_from_confusion, headline, reliability
from fastddr.reporting import predictions

pytestmark = pytest.mark.filterwarnings("error")

#: The 2022 report's test split, as printed there: rows = predicted. Ours has rows = truth.
REPORT = np.array(
    [
        [1784, 103, 384, 1, 8],
        [28, 14, 27, 0, 3],
        [67, 69, 884, 44, 96],
        [1, 2, 19, 22, 6],
        [0, 1, 30, 4, 162],
    ]
).T


def labels(matrix: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """One (truth, predicted) pair for each count of a matrix."""
    pairs = [(t, p) for (t, p), count in np.ndenumerate(matrix) for _ in range(count)]
    truth, predicted = torch.tensor(pairs).T
    return truth, predicted


@st.composite
def splits(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and grades of a small split: some grades absent, some photographs twice (a tie in every score), some all
    right and sure.

    Drawn from a continuum: on a coarse grid two different photographs may tie in exact arithmetic but not in
    floating point, and the AUC of two right computations then differs.
    """
    classes, n = draw(st.integers(2, 6)), draw(st.integers(1, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = 3 * rng.standard_normal((n, classes), dtype=np.float32)
    rows = draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    grades = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    if draw(st.booleans()):
        return 40.0 * torch.nn.functional.one_hot(torch.tensor(grades), classes), torch.tensor(grades)
    return torch.from_numpy(logits[rows]), torch.tensor(grades)


def rank_auc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative, a tie counting half: the definition of the AUC."""
    above = score[positive][:, None] - score[~positive][None, :]
    above = np.where(np.abs(above) < 1e-12, 0, above)
    return float((np.sign(above) / 2 + 0.5).mean()) if above.size else None


def by_hand(logits: torch.Tensor, grades: torch.Tensor) -> dict[str, Any]:
    """The figures again, in loops over photographs and grades."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    truth, predicted, grade_range = grades.numpy(), logits.numpy().argmax(1), range(logits.shape[1])
    n = len(truth)
    present = [g for g in grade_range if (truth == g).any()]
    recall = {g: float((predicted[truth == g] == g).mean()) for g in present}
    f1 = [2 * ((truth == g) & (predicted == g)).sum() / ((truth == g).sum() + (predicted == g).sum()) for g in present]
    # Grade 5, ungradable, is no step of the scale.
    scale = [(int(t), int(q)) for t, q in zip(truth, predicted, strict=True) if t < 5 and q < 5]
    observed = sum((t - q) ** 2 for t, q in scale) * len(scale)
    expected = sum((t - q) ** 2 for t, _ in scale for _, q in scale)
    areas = [(rank_auc(p[:, g], truth == g), precision(p[:, g], truth == g)) for g in grade_range]
    known = [pair for pair in areas if pair[0] is not None]
    graded = truth < 5
    endpoints = {
        name: endpoint(p[graded, least:].sum(1), truth[graded] >= least, predicted[graded] >= least)
        for name, least in (("any", 1), ("referable", 2), ("severe", 3))
        if least < len(grade_range)
    }
    found = {
        "n": n,
        "loss": float(-np.log(p[np.arange(n), truth]).mean()),
        "accuracy": float((truth == predicted).mean()),
        "qwk": 1 - observed / expected if expected else None,
        "macro_f1": float(np.mean(f1)),
        "balanced_accuracy": float(np.mean(list(recall.values()))),
        "recall": [recall.get(g) for g in grade_range],
        "confusion_matrix": [[int(((truth == t) & (predicted == q)).sum()) for q in grade_range] for t in grade_range],
        "auc": float(np.mean([pair[0] for pair in known])) if known else None,
        "average_precision": float(np.mean([pair[1] for pair in known])) if known else None,
        "referable": endpoints.get("referable"),
        "endpoints": endpoints,
    }
    if len(grade_range) == 6:
        others = [g for g in present if g < 5]
        hit = (truth == predicted)[graded]
        f1 = [
            2 * (hit & (truth[graded] == g)).sum() / ((truth == g).sum() + (predicted[graded] == g).sum())
            for g in others
        ]
        found["without_ungradable"] = {
            "n": int(graded.sum()),
            "accuracy": float(hit.mean()) if graded.any() else None,
            "qwk": found["qwk"],
            "macro_f1": float(np.mean(f1)) if others else None,
            "balanced_accuracy": float(np.mean([recall[g] for g in others])) if others else None,
        }
    return found


def endpoint(score: np.ndarray, ill: np.ndarray, called: np.ndarray) -> dict[str, float | None]:
    """The figures of one endpoint, threshold by threshold."""
    both = ill.any() and not ill.all()
    cuts = sorted({*score.tolist(), 2.0}) if both else []
    points = [(float((score[ill] >= cut).mean()), float((score[~ill] < cut).mean())) for cut in cuts]
    return {
        "sensitivity": float(called[ill].mean()) if ill.any() else None,
        "specificity": float((~called[~ill]).mean()) if not ill.all() else None,
        "auc": rank_auc(score, ill),
        "average_precision": precision(score, ill),
        "sensitivity_at_specificity_90": max((a for a, b in points if b >= 0.9 - 1e-9), default=None),
        "specificity_at_sensitivity_90": max((b for a, b in points if a >= 0.9 - 1e-9), default=None),
    }


def precision(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Average precision: the precision at each score that a positive has, weighed by how many have it."""
    if not positive.any() or positive.all():
        return None
    return float(np.mean([positive[score >= value].mean() for value in score[positive]]))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested figures as one level, so that they can be compared by name."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: value}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value is None) == (other[name] is None), name
        if value is not None:
            assert value == pytest.approx(other[name], abs=1e-9), name


def test_the_best_epoch_cannot_be_had_by_calling_all_ungradable() -> None:
    """Kappa is of what is graded: it rises as mistakes are called ungradable."""
    honest = np.pad(np.full((5, 5), 5) + np.diag([20] * 5), (0, 1))
    refusing = np.zeros((6, 6), int)
    refusing[np.arange(5), np.arange(5)], refusing[:5, 5] = 5, 40
    one, other = (figures_from_confusion(matrix) for matrix in (honest, refusing))
    assert other["qwk"] == 1 > one["qwk"]
    assert deciding(one) > deciding(other)
    assert headline(one)[-1] == "macro_f1"
    assert deciding({"qwk": 0.5, "recall": [0.0] * 5, "accuracy": 0.1, "macro_f1": 0.2}) == 0.5
    assert deciding({"qwk": None, "recall": [0.0] * 5, "accuracy": 0.1, "macro_f1": 0.2}) == 0.1


def test_the_reports_matrix_gives_the_reports_figures() -> None:
    found = figures_from_confusion(REPORT)
    assert found["n"] == 3759
    assert [sum(row) for row in found["confusion_matrix"]] == [1880, 189, 1344, 71, 275]  # DDR's test split
    assert round(100 * found["accuracy"], 2) == 76.24
    assert round(found["qwk"], 3) == 0.757
    assert round(found["macro_f1"], 3) == 0.544
    assert round(found["balanced_accuracy"], 3) == 0.516
    assert [round(100 * value, 1) for value in found["recall"]] == [94.9, 7.4, 65.8, 31.0, 58.9]
    assert round(100 * found["referable"]["sensitivity"], 1) == 75.0
    assert round(100 * found["referable"]["specificity"], 1) == 93.2


def test_figures_of_labels_are_those_of_their_matrix() -> None:
    """Through the logits the axes come out as they go in: truth down, prediction across."""
    truth, predicted = labels(REPORT)
    found = figures(torch.nn.functional.one_hot(predicted, 5).float(), truth)
    assert found["confusion_matrix"] == REPORT.tolist()
    expected = figures_from_confusion(REPORT)
    for key in ("n", "accuracy", "qwk", "macro_f1", "balanced_accuracy", "recall"):
        assert found[key] == expected[key], key
    assert found["referable"]["sensitivity"] == expected["referable"]["sensitivity"]
    assert found["referable"]["specificity"] == expected["referable"]["specificity"]


@settings(max_examples=40, deadline=None)
@given(splits())
def test_figures_are_those_of_plain_loops(split: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = figures(*split)
    ece = found.pop("ece")
    same(found, by_hand(*split))
    assert ece == pytest.approx(calibration_error(*split), abs=1e-9)
    json.dumps(found, allow_nan=False)


def calibration_error(logits: torch.Tensor, grades: torch.Tensor) -> float:
    """The expected calibration error in fifteen bins, by plain loops."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, grade in zip(logits.double().softmax(1).tolist(), grades.tolist(), strict=True):
        bins.setdefault(min(int(max(row) * 15), 14), []).append((max(row), row.index(max(row)) == grade))
    gaps = [abs(sum(sure - right for sure, right in inside)) for inside in bins.values()]
    return sum(gaps) / len(grades)


def test_a_sure_model_is_ranked_by_what_its_probabilities_of_one_no_longer_tell(tmp_path: Path) -> None:
    """Probabilities of a grade and worse sum up to 1 for many; log-odds by NumPy, and again from predictions.csv."""
    generator = torch.Generator().manual_seed(0)
    grades = torch.randint(0, 5, (600,), generator=generator)
    noise = torch.randn(600, 5, generator=generator, dtype=torch.float64)
    logits = 40 * (noise + 1.5 * torch.nn.functional.one_hot(grades, 5))
    assert (logits.softmax(1)[:, 2:].sum(1) > 1 - 1e-15).sum() > 100
    odds = np.logaddexp.reduce(logits[:, 2:].numpy(), 1) - np.logaddexp.reduce(logits[:, :2].numpy(), 1)
    found, ill = figures(logits, grades), (grades >= 2).numpy()
    assert found["referable"]["auc"] == pytest.approx(sk.roc_auc_score(ill, odds), abs=1e-12)
    assert found["referable"]["average_precision"] == pytest.approx(sk.average_precision_score(ill, odds), abs=1e-12)
    split = SplitResult(logits, grades, torch.arange(600), [f"{row}.jpg" for row in range(600)], "best")
    (tmp_path / "p.csv").write_bytes(predictions.dump({"valid": split}))
    again = predictions.load(tmp_path / "p.csv", {})["valid"]
    assert figures(again.logits, again.grades)["endpoints"] == found["endpoints"]


def test_a_probability_that_rounds_to_one_is_in_the_last_bin() -> None:
    """Half of those that are sure are wrong; beside them lie as many that are nearly sure, and right."""
    logits = torch.zeros(200, 5)
    logits[:100, 0], logits[100:, 0] = 40.0, 4.2
    grades = (torch.arange(200) < 50).long()
    bins, found = reliability(logits, grades), figures(logits, grades)["ece"]
    assert bins["count"] == [0] * 14 + [200]
    assert (
        found == pytest.approx(abs(bins["confidence"][-1] - 0.75)) == pytest.approx(calibration_error(logits, grades))
    )


@settings(max_examples=60, deadline=None)
@given(splits())
def test_figures_are_those_of_scikit_learn(split: tuple[torch.Tensor, torch.Tensor]) -> None:
    """To 1e-9, on splits of one photograph, with grades missing, with ties."""
    logits, grades = split
    keep = grades < 5  # ungradable is no step of the scale
    logits, grades = logits[keep][:, :5], grades[keep]
    if not len(grades):
        return
    found, classes = figures(logits, grades), logits.shape[1]
    truth, predicted, p = grades.numpy(), logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    present = np.unique(truth)
    assert found["confusion_matrix"] == sk.confusion_matrix(truth, predicted, labels=range(classes)).tolist()
    expected = {
        "loss": sk.log_loss(truth, p, labels=range(classes)),
        "accuracy": sk.accuracy_score(truth, predicted),
        "macro_f1": sk.f1_score(truth, predicted, labels=present, average="macro", zero_division=0),
        "balanced_accuracy": sk.recall_score(truth, predicted, labels=present, average="macro"),
    }
    if found["qwk"] is not None:
        expected["qwk"] = sk.cohen_kappa_score(truth, predicted, labels=range(classes), weights="quadratic")
    else:
        assert len(np.union1d(truth, predicted)) == 1
    if len(present) > 1:
        expected["auc"] = np.mean([sk.roc_auc_score(truth == g, p[:, g]) for g in present])
        expected["average_precision"] = np.mean([sk.average_precision_score(truth == g, p[:, g]) for g in present])
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-9), key


def test_an_absent_grade_is_none_and_outside_the_means() -> None:
    """Grade 3 has no photograph but a prediction: torchmetrics would average in a zero for it."""
    found = figures_from_confusion([[4, 0, 0, 1], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 0]])
    assert found["recall"] == [0.8, 1.0, 1.0, None]
    assert found["balanced_accuracy"] == pytest.approx(2.8 / 3)
    assert found["macro_f1"] == pytest.approx((8 / 9 + 2) / 3)


def test_an_empty_split_and_two_grades() -> None:
    empty = figures(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert empty.pop("n") == 0
    assert not any(flat({**empty, "confusion_matrix": None}).values())
    two = figures(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 1]))
    assert two["referable"] is None
    assert list(two["endpoints"]) == ["any"]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite, first 1"):
        figures(torch.tensor([[0.0, 1], [float("nan"), 0]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="grade 5 in row 1"):
        figures(torch.zeros(2, 5), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="grade -1"):
        figures(torch.zeros(1, 5), torch.tensor([-1]))
    with pytest.raises(ValueError, match="C x C"):
        figures_from_confusion([[1, 2]])


def test_ungradable_is_no_step_of_the_scale() -> None:
    """As a sixth class it leaves kappa alone, and a photograph that is called ungradable counts as referred."""
    six = np.zeros((6, 6), dtype=int)
    six[:5, :5] = REPORT
    six[5, 5], six[5, 0], six[0, 5], six[3, 5] = 300, 46, 20, 7
    five, found = figures_from_confusion(REPORT), figures_from_confusion(six)
    assert found["qwk"] == pytest.approx(five["qwk"])
    assert found["accuracy"] == pytest.approx((np.trace(REPORT) + 300) / six.sum())
    ill = REPORT[2:]
    assert found["referable"]["sensitivity"] == pytest.approx((ill[:, 2:].sum() + 7) / (ill.sum() + 7))
    well = REPORT[:2]
    assert found["referable"]["specificity"] == pytest.approx(well[:, :2].sum() / (well.sum() + 20))

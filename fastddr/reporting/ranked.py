"""ROC and precision-recall curves of the endpoints, as the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import precision_recall_curve, roc_curve

from fastddr.evaluation import metrics
from fastddr.evaluation.ranking import ENDPOINTS
from fastddr.reporting import plots
from fastddr.reporting.tables import ENDPOINT_NAMES, Figures, cell, title

#: Colour and dashes of each endpoint: apart in black and white too.
LOOKS = {
    "any": (plots.BLUE, "-"),
    "referable": (plots.ORANGE, (0, (5, 1.5))),
    "severe": (plots.GREEN, (0, (1.5, 1.2))),
}


def curves(splits: Mapping[str, metrics.SplitResult], figures: Mapping[str, Figures], kind: str = "png") -> bytes:
    """A row a split: ROC, and precision against recall; a ring on the ROC where the predicted grade stands.

    `figures` are those of the splits.
    """
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 4.9 * len(splits)), layout="constrained")
        rows = figure.subplots(len(splits), 2, squeeze=False)
        for (left, right), (name, split) in zip(rows, splits.items(), strict=True):
            _row(left, right, name, split, figures[name]["endpoints"])
        return plots.drawn(figure, kind)


def _row(left: Axes, right: Axes, name: str, split: metrics.SplitResult, found: Mapping[str, Figures]) -> None:
    logits, grades = split.logits.detach().cpu(), split.grades.cpu()
    left.plot([0, 1], [0, 1], color=plots.GREY, linewidth=1, linestyle=(0, (4, 3)))
    for endpoint in found:
        score, ill = metrics.worse_than(logits, grades, endpoint)
        if not ill.any() or ill.all():
            continue
        colour, dashes = LOOKS[endpoint]
        label = f"{ENDPOINT_NAMES[endpoint]} (grade ≥ {ENDPOINTS[endpoint]})"
        values = found[endpoint]
        alarms, hits, _ = roc_curve(ill, score)
        area = cell(values["auc"], per_cent=False)
        left.plot(alarms, hits, color=colour, linestyle=dashes, label=f"{label}: AUC {area}")
        left.plot(
            1 - values["specificity"], values["sensitivity"], "o", mfc="white", color=colour, markersize=7,
            clip_on=False, zorder=3,
        )  # fmt: skip
        precision, recall, _ = precision_recall_curve(ill, score)
        area = cell(values["average_precision"], per_cent=False)
        right.plot(
            recall, precision, color=colour, linestyle=dashes, drawstyle="steps-post",
            label=f"{label}: AP {area}, {ill.mean():.0%} of photographs",
        )  # fmt: skip
    if len(left.lines) > 1:
        left.plot([], [], "o", mfc="white", color=plots.GREY, markersize=7, label="predicted grade")
    left.set(
        title=f"{title(name)}: ROC", xlabel="1 − specificity", ylabel="Sensitivity", xlim=(-0.01, 1), ylim=(0, 1.01)
    )
    right.set(title=f"{title(name)}: precision and recall", xlabel="Recall (sensitivity)", ylabel="Precision")
    right.set(xlim=(0, 1.01), ylim=(0, 1.01))
    for axes in (left, right):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower right" if axes is left else "best", fontsize=9)

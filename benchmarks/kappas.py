"""The time that training loops take to a kappa on valid: the race of `train.py --target-qwk`, and its rows.

Each seed is a training of its own, in a process of its own, and ends at the highest kappa that is asked for or with
the preset's epochs. The loops take turns seed by seed, so that a slow minute of the machine falls on all of them. The
clock begins at the first batch that is asked for and counts validation; at lower kappas it is read on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import harness
from halted import Halted
from recipe import Case
from recipes import Spec, make

from fastddr.errors import UserError


@dataclass
class Curve:
    """One training: seconds since its beginning and kappa on valid, epoch by epoch."""

    seconds: list[float] = field(default_factory=list)
    qwk: list[float] = field(default_factory=list)

    def epochs_to(self, kappa: float) -> int | None:
        """Epochs until it first came to `kappa`; None where it did not."""
        return next((epoch for epoch, value in enumerate(self.qwk, 1) if value >= kappa), None)

    def seconds_to(self, kappa: float) -> float | None:
        """Seconds until then."""
        epochs = self.epochs_to(kappa)
        return None if epochs is None else self.seconds[epochs - 1]


def train(spec: Spec, case: Case, seed: int, highest: float) -> Curve:
    """One training, until it comes to `highest` or its epochs are over."""
    curve = Curve()
    runner = Halted(spec.label, make, spec, replace(case, config=replace(case.config, seed=seed), endless=False))
    try:
        began = time.perf_counter()
        while len(curve.qwk) < case.config.epochs and curve.epochs_to(highest) is None:
            runner.ask("epoch")
            curve.qwk.append(runner.ask("score"))
            curve.seconds.append(time.perf_counter() - began)
    finally:
        runner.close()
    return curve


def race(
    specs: Sequence[Spec], case: Case, about: Mapping[str, Any], kappas: Sequence[float], seeds: Sequence[int],
    say: Callable[[str], None],
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """The rows of one case so far, after each seed of all loops. A loop that cannot run has a row that says why."""
    curves: dict[str, list[Curve]] = {spec.label: [] for spec in specs}
    absent: list[dict[str, Any]] = []
    about = {**about, "epochs_at_most": case.config.epochs}
    for count, seed in enumerate(seeds, 1):
        for spec in specs:
            if spec.label not in curves:
                continue
            try:
                curve = train(spec, case, seed, max(kappas))
            except (UserError, RuntimeError) as problem:
                # The figures of the others must not be lost with it.
                sentence = harness.sentence(problem)
                say(f"{spec.label} is left out: {sentence}.")
                absent.append({"name": spec.label, "kind": "qwk", **about, "recipe": spec.label, "failed": sentence})
                del curves[spec.label]
                continue
            curves[spec.label].append(curve)
            say(f"  {spec.label}, seed {seed}: kappa {curve.qwk[-1]:.3f} after {len(curve.qwk)} epochs, "
                f"{curve.seconds[-1]:.1f} s")  # fmt: skip
        yield rows(curves, about, kappas, seeds[:count]) + absent


def rows(
    curves: Mapping[str, Sequence[Curve]], about: Mapping[str, Any], kappas: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each loop and kappa, the curves in that of the highest; then how many times as long as the first loop.

    A median of those seeds alone that came to a kappa would flatter: where one did not, there is none, and no ratio.
    """
    found: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    first = next(iter(curves), None)
    for kappa in sorted(kappas):
        times = {label: [curve.seconds_to(kappa) for curve in runs] for label, runs in curves.items()}
        for label, runs in curves.items():
            seconds = times[label]
            row = {
                "name": f"{label}: to kappa {kappa:g}", "kind": "qwk", **about, "recipe": label, "target_qwk": kappa,
                "seeds": list(seeds), "seconds": [None if each is None else round(each, 3) for each in seconds],
                "epochs": [curve.epochs_to(kappa) for curve in runs],
            }  # fmt: skip
            if kappa == max(kappas):
                row["curves"] = [
                    {"seconds": [round(second, 3) for second in curve.seconds], "qwk": curve.qwk} for curve in runs
                ]
            reached = [each for each in seconds if each is not None]
            if len(reached) < len(seconds):
                missed = f"{len(reached)} of {len(seconds)} seeds came to a kappa of {kappa:g}"
                found.append(row | {"failed": f"{missed} within {about['epochs_at_most']} epochs"})
                continue
            found.append(row | harness.spread(reached) | {"unit": "s"})
            if first is not None and label != first and None not in times[first]:
                name = f"{label} / {first}: to kappa {kappa:g}"
                ratios.append(
                    {"name": name, "kind": "ratio", **about, **harness.ratio(reached, times[first]), "unit": "×"}
                )
    return found + ratios


def show(found: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """A table of what was reached, and a sentence for what was not."""
    reached = [row for row in found if "failed" not in row]
    if reached:
        harness.show("time to a kappa on valid", reached)
    for row in found:
        if "failed" in row:
            say(f"{row['name']}: {row['failed']}.")

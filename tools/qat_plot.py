"""Curves of training runs, drawn with matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qfx.tools.bench_figures import Skip, need
from qfx.tools.qat_results import Result


def plot(results: Iterable[Result], path: Path) -> None:
    """Draw the metric over the steps, a line for every run; a panel for each model, with a dashed line for it in float.

    The kind of file follows from the name: PNG, SVG, PDF.

    Raises:
        Skip: matplotlib is not installed, or no run has a curve.
    """
    need("matplotlib")
    figure_module = need("matplotlib.figure")
    panels: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.curve:
            panels.setdefault((result.task, result.model), []).append(result)
    if not panels:
        raise Skip("no run has a curve to draw: only training gives one")
    # The figure itself, not pyplot: no window system is asked for and nothing global changes.
    figure = figure_module.Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, ((task, model), runs) in zip(all_axes, panels.items(), strict=True):
        for run in runs:
            label = " ".join(filter(None, (run.method, run.bits, run.note, f"seed {run.seed}")))
            steps, values = [p.step for p in run.curve], [p.metric for p in run.curve]
            axes.plot(steps, values, marker=".", label=label)
        for reference in {run.reference for run in runs if run.method != "float"}:
            axes.axhline(reference, linestyle="--", color="black", linewidth=1, label=f"float {reference:.2f}")
        axes.set(title=f"{model} on {task}", xlabel="step", ylabel=runs[0].metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

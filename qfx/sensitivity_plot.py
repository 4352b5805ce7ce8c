"""Pictures of a search for bit widths, drawn with matplotlib (the extra ``plot``).

The upper panels have a column for each layer, in graph order: the damage that each width does to it, and the bits that
it got. The lowest one is the Pareto front: what a network costs against the damage.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from qfx.bit_allocation import Allocation, pareto_front
from qfx.choices import Choice, LayerFacts
from qfx.errors import ConfigError
from qfx.sensitivity_table import Sensitivity
from qfx.whole_file import write_whole
from qfx.widths import PARTS, Trial

FORMATS: dict[str, tuple[str, dict[str, None]]] = {
    ".png": ("png", {"Software": None}),
    ".svg": ("svg", dict.fromkeys(("Creator", "Date", "Format", "Type"))),
    ".pdf": ("pdf", dict.fromkeys(("CreationDate", "Creator", "Producer"))),
}
"""What can be written, by the file's suffix; with the metadata to leave out: dates, and links to other places."""

DAMAGES = {
    "sqnr": ("noise-to-signal ratio of the outputs", ""),
    "kl": ("KL divergence of the outputs", "nats"),
    "fisher": ("KL divergence of the outputs, by the Fisher information", "nats"),
    "task": ("rise of the loss", ""),
}
"""What the damage is that a score stands for, and its unit."""

COSTS = {
    "average_weight_bits": ("bits of a weight, mean", "", 1.0),
    "weight_bytes": ("weights with their scales", "KiB", 1024.0),
    "bit_operations": ("bit operations", "G", 1e9),
    "latency_ms": ("latency of the layers", "ms", 1.0),
}
"""Resources in words, their units, and how much of the resource a unit is."""

_TRADED = {"weight": "weight_bytes", "activation": "bit_operations"}  # what fewer bits of a part save
_POINTS = 12  # of the Pareto front
_NAME = 26  # characters that are left of a layer's name
# Inches: a layer, so that its name fits beside the next one's; a letter of the name; what is between two panels.
_COLUMN, _LETTER, _GAP = 0.21, 0.053, 0.12
_NARROWEST, _WIDEST = 7.5, 400.0
_HEIGHTS = {"weight": 2.6, "activation": 2.0, "bits": 1.1, "pareto": 3.2}
_DPI = 150  # times the greatest width it is below the 2**16 pixels that Agg can draw
_FEW = 10  # columns that are as wide as a page
_GREY = "#bdbdbd"
_SMALL = 7
_PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}  # names may hold any character
_SIGN: dict[str, Any] = {"linestyle": "", "markersize": 4, "markeredgecolor": "black", "clip_on": False}
_CHOSEN = {**_SIGN, "marker": "D", "markerfacecolor": "white", "zorder": 4}
_NOTHING = {**_SIGN, "marker": "o", "markeredgewidth": 0.5, "zorder": 3}


class NoMatplotlib(ConfigError):
    """matplotlib is not installed."""


def plot(what: Sensitivity | Allocation, path: str | os.PathLike[str]) -> None:
    """Draw ``what`` into a file: PNG, SVG or PDF, by its suffix; a file that is there is replaced whole, or stays.

    Of a Sensitivity: the damage of every layer at every width, on logarithmic axes. Of an Allocation also the choices
    that were made, and where they stand among all (:func:`qfx.bit_allocation.pareto_front`).

    Raises:
        ConfigError: the suffix is of no such format, or matplotlib is not installed (:class:`NoMatplotlib`).
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"no plot is written as {Path(path).name!r}", hint="end its name in " + ", ".join(FORMATS))
    write_whole(path, _drawn(what, suffix))


def svg(what: Sensitivity | Allocation) -> str:
    """The same drawing as one ``<svg>`` element, for a page.

    Raises:
        NoMatplotlib: matplotlib is not installed; the text names the extra.
    """
    text = _drawn(what, ".svg").decode()
    return text[text.index("<svg") :]


def _drawn(what: Sensitivity | Allocation, suffix: str) -> bytes:
    kind, metadata = FORMATS[suffix]
    file = BytesIO()
    figure(what).savefig(file, format=kind, dpi=_DPI, metadata=metadata, bbox_inches="tight", pad_inches=0.15)
    return file.getvalue()


def figure(what: Sensitivity | Allocation) -> Any:
    """The drawing as a ``matplotlib.figure.Figure``: no pyplot, so that nothing global changes.

    Raises:
        NoMatplotlib: matplotlib is not installed; the text names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib("plots need matplotlib", hint="pip install 'qfx[plot]'") from error
    sensitivity, allocation = (what, None) if isinstance(what, Sensitivity) else (what.sensitivity, what)
    names = short_names(sensitivity)
    parts = [part for part in PARTS if part in dict(sensitivity.widths)]
    by_layer = [*parts, *(["bits"] if allocation else [])]
    width = min(max(_NARROWEST, _COLUMN * len(names)), _WIDEST)
    sizes = [(width, _HEIGHTS[row]) for row in by_layer]
    gaps = [_GAP] * (len(by_layer) - 1)
    if allocation:
        sizes.append((_NARROWEST, _HEIGHTS["pareto"]))
        gaps.append(0.4 + _LETTER * max(map(len, names)))
    drawn = Figure()
    axes = _stacked(drawn, sizes, gaps)
    panels = dict(zip(by_layer, axes, strict=False))
    for part in parts:
        _damage(panels[part], part, sensitivity, allocation)
    if allocation:
        _bit_map(panels["bits"], allocation)
        _pareto(axes[-1], allocation)
    for panel in panels.values():
        panel.set_xlim(-0.7, max(len(names), _FEW) - 0.3)
        panel.set_xticks([])
    panels[by_layer[-1]].set_xticks(range(len(names)), names, rotation=90, fontsize=_SMALL, **_PLAIN)
    axes[0].set_title(_title(sensitivity), loc="left", pad=20, fontsize="medium", **_PLAIN)
    _legend(axes[0], sensitivity, allocation)
    return drawn


def _stacked(drawn: Any, sizes: Sequence[tuple[float, float]], gaps: Sequence[float]) -> list[Any]:
    """Axes below one another, flush left, by their widths and heights and the gaps between them in inches.

    The drawing is as large as they are. What is written around them goes beyond: it is fitted when it is saved.
    """
    width, height = max(w for w, _ in sizes), sum(h for _, h in sizes) + sum(gaps)
    drawn.set_size_inches(width, height)
    found, top = [], height
    for (w, h), gap in zip(sizes, (*gaps, 0.0), strict=True):
        found.append(drawn.add_axes((0, (top - h) / height, w / width, h / height)))
        top -= h + gap
    return found


# --- names and colours ------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with a question mark for what is no visible character: controls, and what turns the writing around."""
    return "".join(c if c.isprintable() else "?" for c in text)


def names_of(sensitivity: Sensitivity) -> list[str]:
    """What to call each layer: its path, or its key where the path is no name for it alone."""
    count = Counter(layer.path for layer in sensitivity.layers)
    return [printable(x.path if x.path and count[x.path] == 1 else x.key) for x in sensitivity.layers]


def short_names(sensitivity: Sensitivity) -> list[str]:
    """The same, cut from the left: the end of a path tells layers apart."""
    return [name if len(name) <= _NAME else "…" + name[1 - _NAME :] for name in names_of(sensitivity)]


def _title(sensitivity: Sensitivity) -> str:
    damage, _ = DAMAGES.get(sensitivity.score, (sensitivity.score, ""))
    return f"{printable(sensitivity.model)}: {damage}\n{sensitivity.how}, {sensitivity.rows} rows of data"


def _label(sensitivity: Sensitivity) -> str:
    _, unit = DAMAGES.get(sensitivity.score, ("", ""))
    return f"damage, {unit}" if unit else "damage"


def _colour(bits: int | None) -> Any:
    """Light for many bits, dark for few; grey for float."""
    from matplotlib import colormaps

    return _GREY if bits is None else colormaps["viridis"](0.95 * (bits - 2) / 6)


def _legend(axes: Any, sensitivity: Sensitivity, allocation: Allocation | None) -> None:
    """One entry a width, above the panel."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    chosen = {b for c in allocation.choices for b in (c.weight, c.activation) if b} if allocation else set()
    widths = sorted({bits for _, bits in sensitivity.widths} | chosen)
    entries: list[Any] = [Patch(color=_colour(bits), label=f"{bits} bits") for bits in widths]
    if allocation:
        entries.append(Line2D([], [], **_CHOSEN, label="chosen"))
    if any(damage == 0.0 for damage in sensitivity.damages.values()):
        entries.append(Line2D([], [], **_NOTHING, markerfacecolor="white", label="no damage"))
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(entries)}
    axes.legend(handles=entries, **place, frameon=False, fontsize=_SMALL, handlelength=1, columnspacing=1)


# --- the panels -------------------------------------------------------------------------------------------------------


def _damage(axes: Any, part: str, sensitivity: Sensitivity, allocation: Allocation | None) -> None:
    """A bar for each layer and width: they stand in front of one another, narrower for more bits, the lowest first."""
    found = {trial: damage for trial, damage in sensitivity.damages.items() if trial.part == part}
    limits = _logarithmic(axes, found.values())
    widths = [bits for p, bits in sensitivity.widths if p == part]
    for i, bits in enumerate(widths):
        trials = [Trial(layer.key, part, bits) for layer in sensitivity.layers]
        known = [(x, found[trial]) for x, trial in enumerate(trials) if trial in found]
        tops = [_within(damage, limits) for _, damage in known]
        places, colour = [x for x, _ in known], _colour(bits)
        width = 0.88 - 0.52 * i / max(1, len(widths) - 1)
        bars = axes.bar(places, [top - limits[0] for top in tops], width, limits[0], color=colour)
        for bar, top in zip(bars, tops, strict=True):
            bar.set_zorder(2 - _height(top, limits))
        nothing = [x for x, damage in known if damage == 0.0]
        axes.plot(nothing, [limits[0]] * len(nothing), **_NOTHING, markerfacecolor=colour)
    if allocation is not None:
        pairs = zip(sensitivity.layers, allocation.choices, strict=True)
        asked = [Trial(layer.key, part, getattr(choice, part) or 0) for layer, choice in pairs]
        points = [(x, _within(found[trial], limits)) for x, trial in enumerate(asked) if trial in found]
        axes.plot([x for x, _ in points], [y for _, y in points], **_CHOSEN)
    axes.set_ylabel(f"{part}s\n{_label(sensitivity)}", fontsize="small")


def _logarithmic(axes: Any, values: Iterable[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis with room for all values; what is 0 or infinite stands at an end."""
    positive = [value for value in values if 0.0 < value < math.inf]
    low, high = (min(positive) / 3, max(positive) * 2) if positive else (0.1, 1.0)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.tick_params(which="both", labelsize=_SMALL)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return low, high


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _height(value: float, limits: tuple[float, float]) -> float:
    """Where the value stands on its axis, in [0, 1]."""
    return math.log(value / limits[0]) / math.log(limits[1] / limits[0])


def _bit_map(axes: Any, allocation: Allocation) -> None:
    """A row for the weights' bits, one for the activations', one for the number of weights."""
    layers, choices = allocation.sensitivity.layers, allocation.choices
    _cells(axes, 2, [c.weight if x.numel else 0 for x, c in zip(layers, choices, strict=True)])
    _cells(axes, 1, [choice.activation for choice in choices])
    for x, layer in enumerate(layers):
        axes.text(x, 0.5, _count(layer.numel), rotation=90, ha="center", va="center", fontsize=_SMALL - 1)
    axes.set_yticks([2.5, 1.5, 0.5], ["weight bits", "activation bits", "number of weights"], fontsize=_SMALL)
    axes.set_ylim(0, 3)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cells(axes: Any, bottom: int, bits: Sequence[int | None]) -> None:
    """Bits as coloured numbers; F for None, which is float; nothing for 0."""
    shown = [(x, b) for x, b in enumerate(bits) if b != 0]
    axes.bar([x for x, _ in shown], 0.94, 0.94, bottom + 0.03, color=[_colour(b) for _, b in shown])
    for x, b in shown:
        dark = b is not None and b < 6
        style = {"color": "white" if dark else "black", "fontsize": _SMALL + 1}
        axes.text(x, bottom + 0.5, "F" if b is None else str(b), ha="center", va="center", **style)


def _count(number: int) -> str:
    """A whole number in at most four characters or so."""
    return next((f"{number / 10**e:.3g}{s}" for e, s in ((9, "G"), (6, "M"), (3, "k")) if number >= 10**e), str(number))


def _pareto(axes: Any, allocation: Allocation) -> None:
    """Costs against damage: the front, allocations of one width for all, and the one that was chosen."""
    sensitivity = allocation.sensitivity
    part = next(part for part in PARTS if part in dict(sensitivity.widths))
    resource = _TRADED[part]
    # An allocation does not say whether it was free to choose float: it was if it did so where nobody asked for it.
    freely = zip(sensitivity.layers, allocation.choices, strict=True)
    to_float = any(choice.is_float and not (layer.fixed or layer.end) for layer, choice in freely)
    front = pareto_front(sensitivity, resource, points=_POINTS, pin=allocation.pin, allow_float=to_float)
    uniform = {bits: _uniform(allocation, part, bits) for p, bits in sensitivity.widths if p == part}
    limits = _logarithmic(axes, (a.damage for a in (*front, *uniform.values(), allocation)))
    words, unit, size = COSTS[resource]

    def points(allocations: Iterable[Allocation]) -> tuple[list[float], list[float]]:
        every = list(allocations)
        return [a.costs[resource] / size for a in every], [_within(a.damage, limits) for a in every]

    ends = "" if allocation.pin is None else ", first and last layers as chosen"
    axes.plot(*points(front), marker="o", markersize=4, label=f"{len(front)} points of the Pareto front")
    xs, ys = points(uniform.values())
    axes.plot(xs, ys, "s", color=_GREY, markeredgecolor="black", label=f"one width for all{ends}")
    labels: dict[tuple[float, float], list[str]] = {}
    for bits, point in zip(uniform, zip(xs, ys, strict=True), strict=True):
        labels.setdefault(point, []).append(f"{part[0].upper()}{bits}")
    for point, same in labels.items():
        axes.annotate(", ".join(same), point, (0, 6), textcoords="offset points", ha="center", fontsize=_SMALL)
    bits_a_weight = f"{allocation.costs['average_weight_bits']:.2f} bits a weight"
    axes.plot(*points([allocation]), "*", color="tab:red", markersize=13, label=f"chosen: {bits_a_weight}")
    axes.set_xlabel(f"{words}, {unit}", fontsize="small")
    axes.set_ylabel(f"all layers\n{_label(sensitivity)}", fontsize="small")
    axes.legend(fontsize=_SMALL)


def _uniform(allocation: Allocation, part: str, bits: int) -> Allocation:
    """The allocation with one width for every layer that the search was free in; the other part's bits as prepared."""
    sensitivity = allocation.sensitivity
    pinned = {
        i
        for group in sensitivity.groups
        if allocation.pin is not None and any(sensitivity.layers[i].end for i in group)
        for i in group
    }
    pairs = enumerate(zip(sensitivity.layers, allocation.choices, strict=True))
    choices = (c if i in pinned or layer.fixed else _at(layer, part, bits) for i, (layer, c) in pairs)
    return Allocation(sensitivity, tuple(choices), allocation.pin)


def _at(layer: LayerFacts, part: str, bits: int) -> Choice:
    """The layer's choice of that width, or of the next greater one that it can have."""
    other = next(p for p in PARTS if p != part)
    same = [c for c in layer.choices if getattr(c, other) == getattr(layer.given, other)]
    wide = [c for c in same if (getattr(c, part) or 0) >= bits]
    return min(wide, key=lambda c: int(getattr(c, part)), default=layer.given)

"""Accuracy against budget as a picture: images per class on the left, bytes with labels on the right."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdistill.core import storage
from dsdistill.errors import BadData
from dsdistill.evaluation import Score
from dsdistill.studies.results import Point, StudyResult, Whole, by_setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "budget"
# Okabe and Ito's, told apart with any kind of colour vision; the first is kept for what is no method.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_MARKERS = "osD^vPX"
_GREY, _DARK = "#777777", "#333333"
_MOST_TICKS = 10
_ASIDE = 1.02


def plot(result: StudyResult, folder: str | Path) -> list[Path]:
    """Write ``budget.png`` and ``budget.svg`` into a folder, replacing earlier ones, each whole or not at all.

    Raises:
        BadData: no cell is finished.
        OutputConflict: the folder cannot be written.
    """
    drawn = figure(result)
    storage.ensure_writable(Path(folder))
    paths = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        drawn.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
        paths.append(Path(folder) / f"{NAME}.{kind}")
        storage.write_bytes(paths[-1], buffer.getvalue())
    return paths


def figure(result: StudyResult) -> "Figure":
    """Accuracy in % against stored images per class and against bytes, both on log axes.

    One line per method with bars for its intervals (none where there is one seed), random real images dashed, the whole
    training set as a level line. No backend is chosen and no setting of matplotlib is touched.

    Raises:
        BadData: no cell is finished.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not result.points:
        raise BadData("there is nothing to plot: no cell of the study is finished")
    drawn = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, 2, sharey=True)
    settings = by_setting(result.points)
    for axes, in_bytes in zip(panels, (False, True), strict=True):
        number, lines = 0, len({(point.setting, point.method) for point in result.points})
        for setting, points in settings:
            suffix = f"\n{setting}" if len(settings) > 1 else ""
            for method in dict.fromkeys(point.method for point in points):
                own = [point for point in points if point.method == method]
                style = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
                # Side by side, so that bars at the same budget do not hide one another.
                aside = _ASIDE ** (number - (lines - 1) / 2)
                places = [place * aside for place in _places(own, in_bytes)]
                _line(axes, places, [point.accuracy for point in own], method + suffix, **style)
                number += 1
            _baselines(axes, points, result.whole.get(setting), in_bytes, suffix)
        _dress(axes, result.points, in_bytes)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(low, 0), min(high, 100.5))  # an interval of few seeds may reach beyond what there is
    panels[0].set_ylabel("test accuracy (%)")
    drawn.suptitle(_title(settings), fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    methods_first = sorted(zip(handles, labels, strict=True), key=lambda pair: isinstance(pair[0], Line2D))
    handles, labels = zip(*methods_first, strict=True)
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return drawn


def _places(points: Sequence[Point], in_bytes: bool) -> list[int]:
    return [point.bytes if in_bytes else point.ipc for point in points]


def _line(axes: Any, places: Sequence[float], scores: Sequence[Score], label: str, **style: Any) -> None:
    bars = [0.0 if score.n == 1 else 100 * score.half_width for score in scores]
    axes.errorbar(
        places,
        [100 * score.mean for score in scores],
        yerr=bars if any(bars) else None,
        label=label,
        linewidth=1.8,
        markersize=5.5,
        capsize=3,
        elinewidth=1.1,
        **style,
    )


def _baselines(axes: Any, points: Sequence[Point], whole: Whole | None, in_bytes: bool, suffix: str) -> None:
    # Under one seed and budget every method is compared with the same random images: any of them will do.
    random = {point.ipc: point for point in points if point.random is not None}
    if random:
        places = [point.random_bytes if in_bytes else ipc for ipc, point in sorted(random.items())]
        values = [100 * point.random.mean for _, point in sorted(random.items()) if point.random]
        label = "random real images" + suffix
        axes.plot(places, values, linestyle="--", linewidth=1.4, color=_GREY, marker=".", label=label, zorder=1)
    if whole is not None:
        label = f"whole training set, {whole.epochs} epochs{suffix}"
        axes.axhline(100 * whole.accuracy.mean, linestyle="-", linewidth=1.2, color=_DARK, label=label, zorder=1)


def _dress(axes: Any, points: Sequence[Point], in_bytes: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_ticks(_places(points, in_bytes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_size) if in_bytes else ScalarFormatter())
    axes.set_xlabel("bytes of the stored set, labels included" if in_bytes else "stored images per class (IPC)")
    axes.grid(axis="y", linewidth=0.6, alpha=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)


def _ticks(places: Sequence[int]) -> list[int]:
    """Where there is something to read, but not where a label would run into the one before."""
    chosen = [min(places)]
    least = (max(places) / chosen[0]) ** (1 / _MOST_TICKS)
    for place in sorted(places):
        if place > chosen[-1] and place >= 0.999 * chosen[-1] * least:
            chosen.append(place)
    return chosen


def _size(count: float, _: int) -> str:
    """Bytes in three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"


def _title(settings: Sequence[tuple[str, list[Point]]]) -> str:
    seeds = sorted({point.accuracy.n for _, points in settings for point in points})
    bars = "bars: 95 % t-interval over synthesis seeds" if seeds[-1] > 1 else "one synthesis seed: no interval"
    counts = "/".join(map(str, seeds))
    first = settings[0][0] if len(settings) == 1 else f"{len(settings)} settings"
    return f"{first}\n{counts} synthesis seed{'s' if seeds[-1] > 1 else ''}; {bars}"

"""Tables of the committed results: rewrites README.md between ``<!-- results -->`` and ``<!-- /results -->``."""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
Json = dict[str, Any]


def tables(folder: Path = RESULTS) -> str:
    """All tables as Markdown; a kind without results has none."""
    results = [(path, json.loads(path.read_bytes())) for path in sorted(folder.glob("*.json"))]
    parts = []
    for kind, (title, columns, rows_of) in _TABLES.items():
        rows = [
            [*row, _where(result), _link(path)]
            for path, result in results
            if result["kind"] == kind
            for row in rows_of(result)
        ]
        if rows:
            parts.append(f"{title}\n\n{_markdown([*columns, 'hardware', 'file'], rows)}")
    return "\n\n".join(parts)


def updated(readme: str) -> str:
    """The README with fresh tables.

    Raises:
        ValueError: it does not hold both marks, in order.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the marks {BEGIN} and {END}")
    made = tables()
    return f"{head}{begin}\n\n{made}\n\n{end}{tail}" if made else f"{head}{begin}\n{end}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the tables are out of date")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if options.check:
        if after != before:
            print("the tables of README.md are out of date: run python benchmarks/report.py", file=sys.stderr)
        return int(after != before)
    path.write_text(after, encoding="utf-8")
    return 0


# -- rows --------------------------------------------------------------------------------------------------------


def _speed(result: Json) -> list[list[str]]:
    return [
        [
            result["title"],
            one["label"],
            _seconds(one["a"]),
            _seconds(one["b"]),
            f"**{one['median_ratio']:.2f}x** ({one['min_ratio']:.2f} to {one['max_ratio']:.2f})",
            str(one["n"]),
        ]
        for one in result["comparisons"]
    ]


def _together(result: Json) -> list[list[str]]:
    return [row[1:] for row in _speed(result)]


def _estimates(result: Json) -> list[list[str]]:
    def sizes(case: Json, name: str, unit: float) -> list[str]:
        said, took = case[f"{name}_estimated"] / unit, case[f"{name}_measured"] / unit
        return [f"{said:,.3g}", f"{took:,.3g}", f"{100 * (said / took - 1):+.0f} %"]

    return [
        [case["label"], *sizes(case, "memory", 2**20), *sizes(case, "seconds", 1), *sizes(case, "disk", 2**20)]
        for case in result["cases"]
    ]


def _quality(result: Json) -> list[list[str]]:
    rows = result["rows"]
    figures = [_percent(rows[row]["accuracy"]) if row in rows else "" for row in ("synthetic", "random", "whole")]
    gain = result["gain_over_random"]
    published = "" if result["published"] is None else f"{100 * result['published']:.1f}"
    protocol = f"{result['protocol']['name']}, {rows['synthetic']['epochs']} epochs"
    steps = result["method"].get("iterations")
    title = result["title"] + (f", {steps:,} steps" if steps else "")
    n = str(rows["synthetic"]["accuracy"]["n"])
    return [[title, protocol, *figures, _percent(gain, "+") if gain else "", published, n]]


def _family(result: Json) -> list[list[str]]:
    def gain(score: Json | None) -> str:
        return "" if score is None else _percent(score, "+")

    return [
        [
            result["title"] if first else "",
            row["method"],
            f"{row['protocol']}, {result['protocols'][row['protocol']]['epochs']} epochs",
            f"{statistics.mean(row['seconds']):.0f} s",
            f"{row['loss'][0]:.3g} to {row['loss'][1]:.3g}" if row.get("loss") else "",
            _percent(row["accuracy"]),
            gain(row["gain_over_random"]),
            gain(row["gain_over_base"]),
            f"{row['accuracy']['n']} x {result['networks']}",
        ]
        for row, first in ((row, row is result["rows"][0]) for row in result["rows"])
    ]


def _gradients(result: Json) -> list[list[str]]:
    return [
        [
            result["title"] if row is result["rows"][0] else "",
            row["backward"],
            f"x {row['factor']:g}",
            f"{row['iterations']:,} of {row['step_flops'] / 1e9:.3g} GFLOP",
            f"{statistics.mean(row['seconds']):.0f} s",
            f"{statistics.mean(row['loss']):.3f}",
            _percent(row["accuracy"]),
            _percent(row["difference"], "+") if row["difference"] else "",
            f"{row['accuracy']['n']} x {result['networks']}",
        ]
        for row in result["rows"]
    ]


def _taught(result: Json) -> list[list[str]]:
    def gain(score: Json | None) -> str:
        return "" if score is None else _percent(score, "+")

    epochs = f"{result['protocol']['name']}, {result['protocol']['epochs']} epochs"
    return [
        [
            result["title"] if row is result["rows"][0] else "",
            row["method"],
            epochs,
            f"{statistics.mean(row['seconds']):.0f} s",
            f"{row['image_bytes']:,} + {row['label_bytes']:,}",
            _percent(row["soft"]),
            gain(row["soft_gain"]),
            _percent(row["hard"]),
            gain(row["hard_gain"]),
            f"{row['soft']['n']} x {result['networks']}",
        ]
        for row in result["rows"]
    ]


def _scale(result: Json) -> list[list[str]]:
    rows = [
        [
            result["title"] if point is result["points"][0] else "",
            f"{point['classes']:,} classes",
            f"{point['recover_peak_mib']:,.0f}",
            f"{point['label_peak_mib']:,.0f}",
            f"{point['set_mib']:.1f} + {point['labels_mib']:.1f} MiB",
            "",
            f"{point['recover_seconds']:.0f} + {point['label_seconds']:.0f} s",
        ]
        for point in result["points"]
    ]
    return rows + [
        [
            "ImageNet-1K, 300 epochs, ResNet-18 at 224 pixels: projected",
            f"IPC {one['ipc']}",
            "",
            "",
            f"{one['label_bytes'] / 2**30:.2f} GiB of labels",
            f"{one['published_gib']:.2f}",
            f"{one['recover_seconds'] / 86400:,.0f} + {one['label_seconds'] / 86400:,.1f} days",
        ]
        for one in result["projections"]
    ]


def _resume(result: Json) -> list[list[str]]:
    late = sum(kill["after_first_step"] for kill in result["kills"])
    outcome = "same bytes as uninterrupted" if result["equal"] else "**different bytes**"
    return [
        [
            result["title"],
            f"{late} of {len(result['kills'])} kills after the first step",
            outcome,
            str(len(result["kills"])),
        ]
    ]


def _peak(result: Json) -> list[list[str]]:
    return [
        [
            result["title"] if row is result["rows"][0] else "",
            row["method"],
            str(row["chunk"]),
            f"**{row['peak_gib']:.2f}** of {result['limit_gib']:.0f}",
            f"{row['seconds']:.0f} s",
        ]
        for row in result["rows"]
    ]


def _unroll(result: Json) -> list[list[str]]:
    def over_steps(values: list[float], form: str) -> str:
        return " / ".join(format(value, form) for value in values)

    return [
        [
            result["title"] if way is result["ways"][0] else "",
            way["backward"],
            over_steps(way["steps"], "d"),
            over_steps(way["peak_mib"], ",.0f"),
            f"**{way['growth']:.2f}x**, {way['mib_per_step']:.1f} MiB per step",
            over_steps([statistics.median(values) for values in way["seconds"]], ".3g"),
            over_steps(result["slowdown"].get(way["backward"], []), ".2f"),
            str(len(way["seconds"][0])),
        ]
        for way in result["ways"]
    ]


def _memory(result: Json) -> list[list[str]]:
    settings, growth = result["settings"], result["growth"]
    draws = f"{settings['draws']} draws of {settings['classes']} x {settings['per_class']}"
    return [
        [
            f"{result['title']}; {draws}",
            f"{point['images']:,}",
            f"{point['file_mib']:,.0f}",
            f"{result['baseline_mib']:.0f}",
            *(
                f"**{point[f'{name}_peak_mib']:.0f}**"
                + (f" ({growth[name]['bytes_per_image']:+.0f} B/image)" if last else "")
                for name in ("build", "draw")
            ),
        ]
        for point, last in ((point, point is result["points"][-1]) for point in result["points"])
    ]


def _sweep(result: Json) -> list[list[str]]:
    kill, points = result["kill"], result["points"]
    outcome = "same bytes and accuracies as uninterrupted" if result["equal"] else "**different**"
    return [
        [
            result["title"] if first else "",
            f"with {kill['cells_done']} of {result['cells']} cells done and {kill['steps']} steps of one"
            if first
            else "",
            outcome if first else "",
            point["method"],
            str(point["ipc"]),
            f"{point['bytes']:,}",
            _percent(point["accuracy"]),
            _percent(point["gain_over_random"], "+") if point["gain_over_random"] else "",
            str(point["accuracy"]["n"]),
        ]
        for point, first in ((point, point is points[0]) for point in points)
    ]


_TABLES = {
    "quality": (
        "Test accuracy in %, ± half of the 95 % interval over networks:",
        ["what", "protocol", "distilled", "random real", "whole set", "gain over random", "published", "n"],
        _quality,
    ),
    "family": (
        "Methods under one evaluator: test accuracy in %, ± half of the 95 % interval over synthesis seeds; gains are "
        "paired by seed, over random real images and (FYI) over the method that is wrapped:",
        ["what", "method", "protocol", "synthesis", "loss", "accuracy", "over random", "over base", "seeds x networks"],
        _family,
    ),
    "gradients": (
        "Trajectory matching by the exact gradient (sweep) and the truncated one at equal compute, step sizes times a "
        "factor: loss at the end, test accuracy in %, ± half of the 95 % interval over synthesis seeds, and difference "
        "from the first row, paired by seed:",
        ["what", "gradient", "step sizes", "steps", "synthesis", "loss", "accuracy", "difference", "seeds x networks"],
        _gradients,
    ),
    "taught": (
        "Decoupled methods, all labelled by one committee: test accuracy in % of networks that learn its labels and of "
        "networks that learn classes alone, ± half of the 95 % interval over synthesis seeds; gains over random real "
        "images, labelled alike, are paired by seed; bytes are those of images and labels:",
        [
            "what",
            "method",
            "protocol",
            "synthesis",
            "bytes",
            "soft labels",
            "over random",
            "hard labels",
            "over random",
            "seeds x networks",
        ],
        _taught,
    ),
    "scale": (
        "The decoupled line over the number of classes: peak memory in MiB of recovery and of labelling (each in a "
        "process of its own, imports included), bytes of set and labels; and the real run, projected for the machine "
        "at hand:",
        ["what", "size", "recovery", "labelling", "disk", "published GiB", "recovery + labelling"],
        _scale,
    ),
    "speed": (
        "Seconds, median of n processes, and ratio of paired runs (above 1: dsdistill is faster):",
        ["what", "setting", "plain loops", "dsdistill", "median ratio (range)", "n"],
        _speed,
    ),
    "together": (
        "Evaluator: several networks trained one by one and as one stacked computation, seconds for all of them:",
        ["what", "one by one", "together", "median ratio (range)", "n"],
        _together,
    ),
    "estimate": (
        "What `--dry-run` says and what the run takes: peak memory in MiB, seconds, MiB on disk:",
        ["what", "memory said", "taken", "off by", "seconds said", "taken", "off by", "disk said", "taken", "off by"],
        _estimates,
    ),
    "peak": (
        "Peak memory of a step in GiB, with the method's own batches:",
        ["what", "method", "chunk", "peak", "time, preparation cut short"],
        _peak,
    ),
    "unroll": (
        "Gradient through T steps of a student, each way: what a call takes at its peak in MiB (and the last over the "
        "first), median seconds, and these over those of the whole unroll:",
        ["what", "gradient", "T", "peak", "growth", "seconds", "of unroll's", "n"],
        _unroll,
    ),
    "memory": (
        "Peak memory in MiB over the number of images:",
        ["what", "images", "decoded", "after imports", "building the cache", "drawing from it"],
        _memory,
    ),
    "resume": ("Runs killed with SIGKILL and started again:", ["what", "when", "outcome", "n"], _resume),
    "sweep": (
        "A sweep killed with SIGKILL and continued; test accuracy in %, ± half of the 95 % interval over seeds:",
        ["what", "killed", "outcome", "method", "IPC", "bytes", "accuracy", "gain over random", "seeds"],
        _sweep,
    ),
}


# -- cells -------------------------------------------------------------------------------------------------------


def _percent(score: Json, sign: str = "") -> str:
    spread = "" if score["ci95"] is None else f" ± {100 * score['ci95']:.1f}"
    return f"{100 * score['mean']:{sign}.1f}{spread}"


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} s"


def _where(result: Json) -> str:
    hardware = result["hardware"]
    return hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"


def _link(path: Path) -> str:
    return f"[{path.stem}](benchmarks/results/{path.name})"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())

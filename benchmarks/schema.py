"""What a committed result holds.

Derived figures (medians, means, intervals) are stored beside the measurements they come from, and a result in which
the two disagree is not valid: nobody can edit a headline.
"""

import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from dsdistill.evaluation import Score as Statistics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Hardware(_Strict):
    """Where it ran. ``threads`` are those torch used in one operation; ``gpu`` is null where none was used."""

    cpu: str
    cores: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)]
    memory_gib: Positive
    gpu: str | None
    system: str


class Commit(_Strict):
    """Which code ran; ``dirty`` when the package or the benchmarks held changes that the commit lacks."""

    sha: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    dirty: bool


class Record(_Strict):
    """What every result says."""

    format: Literal["dsdistill.benchmark"] = "dsdistill.benchmark"
    schema_version: Literal[1] = 1
    title: str
    hardware: Hardware
    versions: dict[str, str]
    commit: Commit
    command: str
    seed: int
    date: str

    @field_validator("command")
    @classmethod
    def _no_machine_paths(cls, value: str) -> str:
        if re.search(r"(^|[\s='\"])[/~]", value):
            raise ValueError(f"the command names a path of one machine: {value}")
        return value

    @field_validator("date")
    @classmethod
    def _utc(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo != UTC:
            raise ValueError(f"not a UTC date: {value}")
        return value


class Comparison(_Strict):
    """Two programs timed alternately; pair i is ``a[i] / b[i]``, so above 1 means b is faster."""

    label: str
    a_name: str
    b_name: str
    a: list[Positive]
    b: list[Positive]
    median_ratio: Positive
    min_ratio: Positive
    max_ratio: Positive
    n: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, label: str, a_name: str, b_name: str, a: Sequence[float], b: Sequence[float]) -> Self:
        """The comparison of two lists of seconds."""
        median, low, high = _ratios(a, b)
        figures = {"median_ratio": median, "min_ratio": low, "max_ratio": high, "n": len(a)}
        return cls(label=label, a_name=a_name, b_name=b_name, a=list(a), b=list(b), **figures)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        figures = (self.median_ratio, self.min_ratio, self.max_ratio)
        if len(self.a) != self.n or not _close(figures, _ratios(self.a, self.b)):
            raise ValueError(f"ratios of {self.label!r} do not follow from its seconds")
        return self


class Equality(_Strict):
    """Difference between the two programs on equal inputs; ``relative`` to the largest magnitude of the quantity."""

    quantity: str
    dtype: Literal["float32", "float64"]
    absolute: Annotated[float, Field(ge=0)]
    relative: Annotated[float, Field(ge=0)]
    tolerance: Positive

    @model_validator(mode="after")
    def _passed(self) -> Self:
        if self.relative > self.tolerance:
            raise ValueError(f"{self.quantity} ({self.dtype}) differs by {self.relative}, more than {self.tolerance}")
        return self


class Speed(Record):
    """Paired timings, valid only together with a passed equality check. Seconds are per ``unit``.

    ``other_load`` is the most cores that other programs used during any of the timed processes.
    """

    kind: Literal["speed"] = "speed"
    unit: str
    settings: dict[str, Any]
    warmups: Annotated[int, Field(ge=0)]
    target: Positive
    other_load: Annotated[float, Field(ge=0)]
    comparisons: Annotated[list[Comparison], Field(min_length=1)]
    equality: Annotated[list[Equality], Field(min_length=1)]


class Scores(_Strict):
    """Repeated measurements; with one only, spread and interval are null."""

    mean: float
    std: float | None
    ci95: float | None
    n: Annotated[int, Field(ge=1)]
    values: list[float]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        expected = Statistics(tuple(self.values)).to_json()
        pairs = [(getattr(self, name), expected[name]) for name in ("mean", "std", "ci95", "n")]
        if any((one is None) != (other is None) or not _close((one or 0,), (other or 0,)) for one, other in pairs):
            raise ValueError("mean, std, ci95 and n do not follow from the values")
        return self


class Row(_Strict):
    """Test accuracies (fractions) of one training set under the protocol."""

    images: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)]
    seconds: Positive
    accuracy: Scores


class Data(_Strict):
    """The real images. ``jpeg``: they went through JPEG, which is not the published data."""

    name: str
    fingerprint: Sha256
    train_images: Annotated[int, Field(ge=1)]
    test_images: Annotated[int, Field(ge=1)]
    jpeg: bool


class Quality(Record):
    """Scores of one distilled set and its baselines, paired by seed."""

    kind: Literal["quality"] = "quality"
    data: Data
    ipc: Annotated[int, Field(ge=1)]
    method: dict[str, Any]
    synthesis_seconds: Positive | None
    protocol: dict[str, Any]
    rows: dict[Literal["synthetic", "random", "whole"], Row]
    gain_over_random: Scores | None
    published: Share | None


class FamilyRow(_Strict):
    """A method under a protocol. Scores are over synthesis seeds; a seed counts once, with the mean of its networks.

    ``seconds`` of each synthesis, ``loss`` of its first and last steps where it is told; gains are paired by seed, over
    the row "RandomReal" and over the row ``base``; of a wrapper that is the method that is wrapped, and not named.
    """

    method: str
    base: str | None = None
    settings: dict[str, Any]
    protocol: str
    seconds: list[Positive]
    loss: tuple[float, float] | None = None
    accuracy: Scores
    gain_over_random: Scores | None
    gain_over_base: Scores | None


class Family(Record):
    """Methods side by side: one evaluator, one budget, the same seeds."""

    kind: Literal["family"] = "family"
    data: Data
    ipc: Annotated[int, Field(ge=1)]
    networks: Annotated[int, Field(ge=1)]
    protocols: dict[str, dict[str, Any]]
    rows: Annotated[list[FamilyRow], Field(min_length=2)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        by_name = {(row.method, row.protocol): row.accuracy.values for row in self.rows}
        for row in self.rows:
            for gain, other in ((row.gain_over_random, "RandomReal"), (row.gain_over_base, row.base or row.method[4:])):
                if gain is None:
                    continue
                differences = [a - b for a, b in zip(row.accuracy.values, by_name[other, row.protocol], strict=True)]
                if not _close(gain.values, differences):
                    raise ValueError(f"a gain of {row.method} is not the difference of the rows")
        return self


class GradientRow(_Strict):
    """A way to differentiate through a student's training, its step sizes multiplied by ``factor``.

    ``step_flops``: of convolutions and matrix products in one step. By synthesis seed: ``seconds``, ``loss`` (mean over
    the last tenth of the steps), accuracy (mean of the seed's networks), and by how much that is above the first row's.
    """

    backward: str
    factor: Positive
    settings: dict[str, Any]
    iterations: Annotated[int, Field(ge=1)]
    step_flops: Annotated[int, Field(ge=1)]
    seconds: list[Positive]
    loss: list[Positive]
    accuracy: Scores
    difference: Scores | None


class Gradients(Record):
    """Gradients of one method side by side at equal compute; the first row is what the others are compared with."""

    kind: Literal["gradients"] = "gradients"
    data: Data
    ipc: Annotated[int, Field(ge=1)]
    networks: Annotated[int, Field(ge=1)]
    protocol: dict[str, Any]
    rows: Annotated[list[GradientRow], Field(min_length=2)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        first, *others = self.rows
        if first.difference is not None:
            raise ValueError("the first row differs from itself")
        for row in others:
            if abs(row.iterations * row.step_flops - first.iterations * first.step_flops) > row.step_flops:
                raise ValueError(f"{row.backward} x{row.factor} did not get as much compute as the first row")
            differences = [a - b for a, b in zip(row.accuracy.values, first.accuracy.values, strict=True)]
            if row.difference is None or not _close(row.difference.values, differences):
                raise ValueError(f"the difference of {row.backward} x{row.factor} is not that of the rows")
        if any(not len(row.seconds) == len(row.loss) == row.accuracy.n for row in self.rows):
            raise ValueError("a row has not one time and loss for each seed")
        return self


class Kill(_Strict):
    """One SIGKILL: seconds after the process started, and steps the run had logged by then."""

    aim: Literal["start-up", "work"]
    seconds: Annotated[float, Field(ge=0)]
    after_first_step: bool
    steps: Annotated[int, Field(ge=0)]


class Resume(Record):
    """A run killed again and again against one left alone."""

    kind: Literal["resume"] = "resume"
    settings: dict[str, Any]
    uninterrupted_seconds: Positive
    kills: Annotated[list[Kill], Field(min_length=1)]
    equal: bool
    uninterrupted: dict[str, Sha256]
    resumed: dict[str, Sha256]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.equal != (self.uninterrupted == self.resumed):
            raise ValueError("'equal' contradicts the hashes")
        return self


class Growth(_Strict):
    """Bytes of peak memory per image between the smallest and the largest set."""

    images: list[Annotated[int, Field(ge=1)]]
    peak_mib: list[Positive]
    bytes_per_image: float

    @classmethod
    def of(cls, images: Sequence[int], peak_mib: Sequence[float]) -> Self:
        """The growth over sets of so many images, ascending."""
        return cls(images=list(images), peak_mib=list(peak_mib), bytes_per_image=_growth(images, peak_mib))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not _close((self.bytes_per_image,), (_growth(self.images, self.peak_mib),)):
            raise ValueError("bytes_per_image does not follow from images and peaks")
        return self


class MemoryPoint(_Strict):
    """A set of so many images. Peaks are of resident memory; ``worker`` is the largest decoding process."""

    images: Annotated[int, Field(ge=1)]
    file_mib: Positive
    build_seconds: Positive
    build_peak_mib: Positive
    worker_peak_mib: Annotated[float, Field(ge=0)]
    open_seconds: Positive
    draw_seconds: Positive
    pass_seconds: Positive
    draw_peak_mib: Positive


class Memory(Record):
    """Peak memory over the size of the data. ``baseline_mib`` is that of a process that only imported the package."""

    kind: Literal["memory"] = "memory"
    settings: dict[str, Any]
    baseline_mib: Positive
    points: Annotated[list[MemoryPoint], Field(min_length=2)]
    growth: dict[Literal["build", "draw"], Growth]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, growth in self.growth.items():
            peaks = [getattr(point, f"{name}_peak_mib") for point in self.points]
            if growth.images != [point.images for point in self.points] or growth.peak_mib != peaks:
                raise ValueError(f"the growth of {name!r} is not that of the points")
        return self


class Together(Record):
    """Several networks trained one by one (a) and as one stacked computation (b), on equal data and seeds.

    ``largest_difference`` of any trained parameter between the two, relative to the largest parameter; ``other_load``
    as in `Speed`.
    """

    kind: Literal["together"] = "together"
    other_load: Annotated[float, Field(ge=0)]
    largest_difference: Annotated[float, Field(ge=0, le=0.05)]
    comparisons: Annotated[list[Comparison], Field(min_length=1)]


class EstimateCase(_Strict):
    """One run: what was said of it beforehand, and what it took. Bytes and seconds; ``disk`` at its fullest."""

    label: str
    settings: dict[str, Any]
    chunk: Annotated[int, Field(ge=1)]
    memory_estimated: Positive
    memory_measured: Positive
    seconds_estimated: Positive
    seconds_measured: Positive
    disk_estimated: Positive
    disk_measured: Positive


class Estimates(Record):
    """Estimates of a rehearsal beside the runs themselves, each in a process of its own."""

    kind: Literal["estimate"] = "estimate"
    cases: Annotated[list[EstimateCase], Field(min_length=1)]


class PeakRow(_Strict):
    """A method; ``seconds`` include its preparation, cut short."""

    method: str
    chunk: Annotated[int, Field(ge=1)]
    seconds: Positive
    peak_gib: Positive


class Peak(Record):
    """Peak memory of a step: of the process on a CPU, of what torch allocates on a GPU."""

    kind: Literal["peak"] = "peak"
    limit_gib: Positive
    rows: Annotated[list[PeakRow], Field(min_length=1)]


class SweepKill(_Strict):
    """The SIGKILL: seconds after the start, cells done by then, and steps of the furthest cell under way."""

    seconds: Positive
    cells_done: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]


class SweepPoint(_Strict):
    """A method at one budget; scores over synthesis seeds, each of which gives the mean of its networks."""

    method: str
    ipc: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    accuracy: Scores
    gain_over_random: Scores | None


class Sweep(Record):
    """A grid of cells killed in the middle of one and continued, against one left alone; hashes by cell."""

    kind: Literal["sweep"] = "sweep"
    settings: dict[str, Any]
    cells: Annotated[int, Field(ge=2)]
    uninterrupted_seconds: Positive
    kill: SweepKill
    continued_seconds: Positive
    equal: bool
    uninterrupted: dict[Sha256, Sha256]
    continued: dict[Sha256, Sha256]
    points: Annotated[list[SweepPoint], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.equal != (self.uninterrupted == self.continued):
            raise ValueError("'equal' contradicts the hashes")
        if not len(self.uninterrupted) == len(self.continued) == self.cells > self.kill.cells_done:
            raise ValueError("the numbers of cells do not fit together")
        return self


class UnrollWay(_Strict):
    """A way to differentiate through T steps. At each of ``steps``: MiB that a call takes at its peak, seconds of each.

    ``growth`` is the last peak over the first, ``mib_per_step`` the slope between them.
    """

    backward: str
    steps: list[Annotated[int, Field(ge=1)]]
    peak_mib: list[Positive]
    seconds: list[Annotated[list[Positive], Field(min_length=1)]]
    growth: Positive
    mib_per_step: float

    @classmethod
    def of(
        cls, backward: str, steps: Sequence[int], peak_mib: Sequence[float], seconds: Sequence[Sequence[float]]
    ) -> Self:
        """The way measured at each of ``steps``, ascending."""
        growth, slope = _grown(steps, peak_mib)
        times = [list(values) for values in seconds]
        return cls(
            backward=backward,
            steps=list(steps),
            peak_mib=list(peak_mib),
            seconds=times,
            growth=growth,
            mib_per_step=slope,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.seconds) != len(self.steps):
            raise ValueError(f"{self.backward!r} has no times for each of its steps")
        if not _close((self.growth, self.mib_per_step), _grown(self.steps, self.peak_mib)):
            raise ValueError(f"the growth of {self.backward!r} does not follow from its peaks")
        return self


class Unroll(Record):
    """Memory and time of ways to differentiate through training, over its length, on equal data.

    ``slowdown`` is the median time of a way over that of "unroll", at each length; ``other_load`` as in `Speed`.
    """

    kind: Literal["unroll"] = "unroll"
    settings: dict[str, Any]
    other_load: Annotated[float, Field(ge=0)]
    ways: Annotated[list[UnrollWay], Field(min_length=1)]
    slowdown: dict[str, list[Positive]]
    equality: Annotated[list[Equality], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        expected = slowdowns(self.ways)
        pairs = [(self.slowdown.get(name), values) for name, values in expected.items()]
        if len(pairs) != len(self.slowdown) or any(said is None or not _close(said, made) for said, made in pairs):
            raise ValueError("'slowdown' does not follow from the seconds")
        return self


def slowdowns(ways: Sequence[UnrollWay]) -> dict[str, list[float]]:
    """Median seconds of each way over those of "unroll" at the same length; empty without that.

    Raises:
        ValueError: ways were measured at different lengths.
    """
    if len({tuple(way.steps) for way in ways}) > 1:
        raise ValueError("ways were measured at different lengths")
    medians = {way.backward: [statistics.median(values) for values in way.seconds] for way in ways}
    base = medians.pop("unroll", None)
    return {
        name: [one / other for one, other in zip(values, base, strict=True)] for name, values in medians.items() if base
    }


class TaughtRow(_Strict):
    """A method whose sets one committee labels. Scores are over synthesis seeds, each with the mean of its networks.

    ``soft``: networks learn the labels of the committee; ``hard``: classes alone; gains over "RandomReal" are paired
    by seed. ``image_bytes`` and ``label_bytes`` of a set.
    """

    method: str
    settings: dict[str, Any]
    seconds: list[Positive]
    image_bytes: Annotated[int, Field(ge=1)]
    label_bytes: Annotated[int, Field(ge=1)]
    soft: Scores
    hard: Scores
    soft_gain: Scores | None
    hard_gain: Scores | None


class Taught(Record):
    """Decoupled methods side by side: one committee, one protocol, the same seeds; the first row is random images."""

    kind: Literal["taught"] = "taught"
    data: Data
    ipc: Annotated[int, Field(ge=1)]
    networks: Annotated[int, Field(ge=1)]
    protocol: dict[str, Any]
    teachers: Annotated[list[dict[str, Any]], Field(min_length=1)]
    rows: Annotated[list[TaughtRow], Field(min_length=2)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        first, *others = self.rows
        for row in others:
            pairs = ((row.soft_gain, row.soft, first.soft), (row.hard_gain, row.hard, first.hard))
            for gain, own, random in pairs:
                differences = [a - b for a, b in zip(own.values, random.values, strict=True)]
                if gain is None or not _close(gain.values, differences):
                    raise ValueError(f"a gain of {row.method} is not the difference of the rows")
        return self


class ScalePoint(_Strict):
    """A run of so many classes. Peaks are of resident memory; the set and its labels are on the disk."""

    classes: Annotated[int, Field(ge=1)]
    recover_seconds: Positive
    recover_peak_mib: Positive
    set_mib: Positive
    label_seconds: Positive
    label_peak_mib: Positive
    labels_mib: Positive


class Projection(_Strict):
    """ImageNet-1K with so many images per class: labels by the format and as published, seconds on one machine."""

    ipc: Annotated[int, Field(ge=1)]
    label_bytes: Annotated[int, Field(ge=1)]
    published_gib: Positive
    recover_seconds: Positive
    label_seconds: Positive


class Scale(Record):
    """Memory of the decoupled line over the number of classes, and what the real run would take."""

    kind: Literal["scale"] = "scale"
    settings: dict[str, Any]
    baseline_mib: Positive
    points: Annotated[list[ScalePoint], Field(min_length=2)]
    projections: Annotated[list[Projection], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        counts = [point.classes for point in self.points]
        if counts != sorted(set(counts)):
            raise ValueError("points are not in ascending order of their classes")
        return self


AnyResult = (
    Speed
    | Quality
    | Family
    | Resume
    | Memory
    | Estimates
    | Peak
    | Together
    | Sweep
    | Unroll
    | Gradients
    | Taught
    | Scale
)
Result = Annotated[AnyResult, Field(discriminator="kind")]
RESULT: TypeAdapter[AnyResult] = TypeAdapter(Result)


def read_result(path: Path) -> AnyResult:
    """Read and check a result.

    Raises:
        pydantic.ValidationError: it does not follow the schema, or its figures contradict its measurements.
    """
    return RESULT.validate_json(path.read_bytes())


def _ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    ratios = [first / second for first, second in zip(a, b, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _growth(images: Sequence[int], peak_mib: Sequence[float]) -> float:
    if len(images) < 2 or len(images) != len(peak_mib) or list(images) != sorted(set(images)):
        raise ValueError("growth needs two sets or more, ascending, and a peak for each")
    return (peak_mib[-1] - peak_mib[0]) * 2**20 / (images[-1] - images[0])


def _grown(steps: Sequence[int], peak_mib: Sequence[float]) -> tuple[float, float]:
    if len(steps) < 2 or len(steps) != len(peak_mib) or list(steps) != sorted(set(steps)):
        raise ValueError("growth needs two lengths or more, ascending, and a peak for each")
    return peak_mib[-1] / peak_mib[0], (peak_mib[-1] - peak_mib[0]) / (steps[-1] - steps[0])


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= 1e-9 * max(1.0, abs(a)) for a, b in zip(one, other, strict=True))

import io

import matplotlib as mpl
import pytest
from PIL import Image
from studies.test_results import failed, line

from dsdistill.errors import BadData
from dsdistill.studies import StudyResult, figure, plot

ROWS = [
    line(method, ipc, seed, accuracies=(0.4 + 0.05 * ipc + 0.01 * seed,) * 2)
    for method in ("DM", "RandomReal")
    for ipc in (1, 5, 10)
    for seed in (0, 1)
]
WHOLE = line(
    "RandomReal",
    whole=True,
    baselines={"whole": [0.9, 0.94]},
    evaluation=line()["evaluation"] | {"whole_epochs": 7},
)


def test_two_panels_show_accuracy_against_images_and_bytes():
    drawn = figure(StudyResult((*ROWS, WHOLE)))
    images, size = drawn.axes
    assert [axes.get_xscale() for axes in drawn.axes] == ["log", "log"]
    assert images.get_xlabel() == "stored images per class (IPC)"
    assert size.get_xlabel() == "bytes of the stored set, labels included"
    assert images.get_ylabel() == "test accuracy (%)"
    drawn.canvas.draw()
    assert [tick.get_text() for tick in images.get_xticklabels()] == ["1", "5", "10"]
    assert [tick.get_text() for tick in size.get_xticklabels()] == ["104 B", "504 B", "1 kB"]
    (legend,) = drawn.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["DM", "RandomReal", "random real images", "whole training set, 7 epochs"]
    for axes in drawn.axes:
        assert [container.get_label() for container in axes.containers] == ["DM", "RandomReal"]
        values, _, bars = axes.containers[0].lines
        assert values.get_ydata().tolist() == pytest.approx([45.5, 65.5, 90.5])
        low, high = bars[0].get_segments()[0][:, 1]
        assert (high - low) / 2 == pytest.approx(12.7062 * 0.5, abs=1e-3)  # t(0.975, 1) * 0.707 / sqrt(2)
        (random,) = [one for one in axes.get_lines() if one.get_linestyle() == "--"]
        assert random.get_ydata().tolist() == pytest.approx([45.0] * 3)
        (whole,) = [one for one in axes.get_lines() if one.get_label().startswith("whole")]
        assert whole.get_ydata() == pytest.approx([92.0, 92.0])
    assert list(drawn.axes[1].get_lines()[-2].get_xdata()) == [100, 500, 1000]  # as many plain real images
    assert "2 synthesis seeds; bars: 95 % t-interval over synthesis seeds" in drawn.get_suptitle()


def test_labels_do_not_run_into_one_another():
    near = [line(ipc=ipc, method=name) for ipc in (1, 10, 100) for name in ("DM", "Other")]
    for row in near[1::2]:
        row["bytes"] = row["bytes"] | {"total": row["bytes"]["total"] + 3}
    drawn = figure(StudyResult(tuple(near)))
    drawn.canvas.draw()
    assert [tick.get_text() for tick in drawn.axes[1].get_xticklabels()] == ["104 B", "1 kB", "10 kB"]
    assert [tick.get_text() for tick in drawn.axes[0].get_xticklabels()] == ["1", "10", "100"]


def test_one_seed_has_no_bars():
    drawn = figure(StudyResult((line(), line(ipc=2))))
    assert "no interval" in drawn.get_suptitle()
    assert drawn.axes[0].containers[0].lines[2] == ()


def test_several_settings_are_told_apart_in_the_legend():
    other = [line(ipc=ipc, data=line()["data"] | {"name": "other"}) for ipc in (1, 2)]
    drawn = figure(StudyResult((line(), line(ipc=2), *other)))
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert len(set(names)) == 4
    assert sum(name.startswith("DM\nother (01234567), protocol dc") for name in names) == 1


def test_files_are_whole_and_replaced_and_nothing_global_is_touched(tmp_path):
    settings, backend = dict(mpl.rcParams), mpl.get_backend()
    for _ in range(2):
        png, svg = plot(StudyResult(tuple(ROWS)), tmp_path)
    assert (png.name, svg.name) == ("budget.png", "budget.svg")
    assert Image.open(io.BytesIO(png.read_bytes())).size == (1600, 736)
    assert svg.read_text().rstrip().endswith("</svg>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["budget.png", "budget.svg"]
    assert (dict(mpl.rcParams), mpl.get_backend()) == (settings, backend)


def test_nothing_to_plot_is_said():
    with pytest.raises(BadData, match="no cell of the study is finished"):
        figure(StudyResult((failed(),)))

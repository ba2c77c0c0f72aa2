"""Grids of methods, budgets and seeds: each cell done once, killed and continued at will, reported with intervals.

Example:
    >>> import tempfile
    >>> import dsdistill as dd
    >>> from dsdistill import studies
    >>> out = tempfile.mkdtemp()
    >>> result = studies.grid("digits", ["RandomReal"], ipc=(1, 2), seeds=2, epochs=2, repeats=1, workers=1, out=out)
    >>> [(point.method, point.ipc, point.accuracy.n) for point in result.points]
    [('RandomReal', 1, 2), ('RandomReal', 2, 2)]
"""

from dsdistill.studies.drawing import figure, plot
from dsdistill.studies.results import Point, StudyResult, report
from dsdistill.studies.study import StudyStopped, grid

__all__ = ["Point", "StudyResult", "StudyStopped", "figure", "grid", "plot", "report"]

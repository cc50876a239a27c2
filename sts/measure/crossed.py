"""The interval of a mean over two kinds of things drawn at random and crossed: here sets of latents and problems.

Resampling problems alone would treat the sets that happened to be drawn as the only ones there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.items import MeanInterval


def crossed_mean_interval(values_DP: Sequence[Sequence[float]], *, level: float = 0.95,
                          against_one: bool = False) -> MeanInterval:
    """Mean of a complete table, with Student's interval over both its rows and its columns.

    The half-width is the root of the summed squares of two half-widths: Student's over the row means and Student's
    over the column means, each with its own degrees of freedom (Banerjee 1960). For normal values it covers the mean
    at least as often as `level` says, however rows and columns share the scatter, where one common number of degrees
    of freedom would promise too much for two or three rows. Scatter of single entries is in both parts, so the
    interval is wide where entries scatter more than rows and columns do. With one row it is Student's usual interval
    over columns.

    Args:
        values_DP: one row a set (draw), one column a problem.
        level: of the interval.
        against_one: the values are differences of a single set from each of these. Then the question is whether that
            set lies beyond what one more such set would, and its own scatter counts as well: the variance of sets is
            taken 1 + 1 / D times instead of 1 / D times, as in a prediction interval.

    Returns:
        n is the number of columns; standard error and both ends are NaN for one column; no resamples.

    Raises:
        StsError: the table is empty or has gaps.
    """
    table_DP = np.asarray(values_DP, dtype=float)
    if table_DP.ndim != 2 or not table_DP.size or not np.isfinite(table_DP).all():
        raise StsError(f"A table of shape {table_DP.shape} was given; a mean over sets and problems needs a finite "
                       "value for every set and problem, and at least one of each.")
    mean, (rows, columns) = float(table_DP.mean()), table_DP.shape
    if columns == 1:
        return MeanInterval(mean, math.nan, math.nan, math.nan, level, 1, "none")
    weights = {0: 1 / columns, 1: 1 / rows + against_one}
    parts = [(table_DP.mean(axis=axis).var(ddof=1) * weights[axis], number)
             for axis, number in ((0, columns), (1, rows)) if number > 1]
    error = math.sqrt(sum(variance for variance, _ in parts))
    reach = math.sqrt(sum(variance * scipy_stats.t.ppf((1 + level) / 2, number - 1)**2 for variance, number in parts))
    return MeanInterval(mean, error, mean - reach, mean + reach, level, columns, "t")

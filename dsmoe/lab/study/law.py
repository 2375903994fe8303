"""A law of diminishing returns, loss = a + b x^-c, fitted to runs, with intervals.

For a given c the law is linear in a and b, so the fit is a search over c alone, with least squares inside. Intervals
are percentiles over a bootstrap of residuals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 9):
the fit is repeated on its own values plus residuals that are drawn with replacement. a is at least 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

EXPONENTS = numpy.geomspace(0.02, 5.0, 220)
DRAWS, COVERED, SEED = 1000, 0.95, 0
LEAST_PLACES = 4  # different x; three parameters go through any three points


@dataclass(frozen=True)
class Law:
    """`a`, `b`, `c`: estimate, and lower and upper end of the 95 % interval."""

    a: tuple[float, float, float]
    b: tuple[float, float, float]
    c: tuple[float, float, float]
    draws: numpy.ndarray  # fp64 [draws, 3]

    def at(self, x: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """The law, and the ends of its interval, at each x."""
        curves = self.draws[:, :1] + self.draws[:, 1:2] * x[None, :] ** -self.draws[:, 2:]
        low, high = numpy.quantile(curves, _ends(), axis=0)
        return self.a[0] + self.b[0] * x ** -self.c[0], low, high

    @property
    def settled(self) -> bool:
        """Whether the data say what c is: its interval stays inside what was searched."""
        return self.c[1] > EXPONENTS[0] and self.c[2] < EXPONENTS[-1]


def fit_law(x: numpy.ndarray, loss: numpy.ndarray) -> Law | None:
    """Fit to all runs, fp64 [N] and [N]; None where there are too few different x."""
    if len(set(x.tolist())) < LEAST_PLACES:
        return None
    best = _fit(x, loss[None, :])[0]
    fitted = best[0] + best[1] * x ** -best[2]
    residuals = loss - fitted
    residuals = residuals * numpy.sqrt(len(x) / max(1, len(x) - 3))  # three parameters took their share
    drawn = numpy.random.default_rng(SEED).choice(residuals, size=(DRAWS, len(x)))
    draws = _fit(x, fitted[None, :] + drawn)
    low, high = numpy.quantile(draws, _ends(), axis=0)
    a, b, c = ((float(best[i]), float(low[i]), float(high[i])) for i in range(3))
    return Law(a, b, c, draws)


def _ends() -> tuple[float, float]:
    return (1 - COVERED) / 2, (1 + COVERED) / 2


def _fit(x: numpy.ndarray, loss_DN: numpy.ndarray) -> numpy.ndarray:
    """The best a, b, c of each row of losses: [D, N] -> [D, 3]."""
    power_CN = x[None, :] ** -EXPONENTS[:, None]
    centred_CN = power_CN - power_CN.mean(1, keepdims=True)
    mean_D = loss_DN.mean(1)
    slope_DC = (loss_DN - mean_D[:, None]) @ centred_CN.T / (centred_CN**2).sum(1)
    base_DC = mean_D[:, None] - slope_DC * power_CN.mean(1)
    through_zero_DC = loss_DN @ power_CN.T / (power_CN**2).sum(1)  # where a would be negative
    slope_DC = numpy.where(base_DC < 0, through_zero_DC, slope_DC)
    base_DC = numpy.maximum(base_DC, 0)
    # sum (loss - base - slope p)^2, written out so that no [D, C, N] is made
    power_C, square_C, cross_DC = power_CN.sum(1), (power_CN**2).sum(1), loss_DN @ power_CN.T
    error_DC = (
        (loss_DN**2).sum(1)[:, None] + len(x) * base_DC**2 + slope_DC**2 * square_C
        - 2 * base_DC * loss_DN.sum(1)[:, None] - 2 * slope_DC * cross_DC + 2 * base_DC * slope_DC * power_C
    )  # fmt: skip
    best_D, row_D = error_DC.argmin(1), numpy.arange(len(loss_DN))
    return numpy.stack([base_DC[row_D, best_D], slope_DC[row_D, best_D], EXPONENTS[best_D]], axis=1)

"""Laws of the loss, fitted to runs with scipy, with bootstrapped intervals.

    fit_law        loss = a + b x^-c                           diminishing returns in one quantity
    fit_power      ln loss = p - alpha ln C                    two lengths of training are enough; no floor
    fit_joint      ln loss = p + b ln C + c ln E + d ln C ln E

The joint law is that of Clark et al. (Unified Scaling Laws for Routed Language Models, arXiv 2202.01169, equation 1)
with training compute C, as realised, in the place of parameters. A negative d says that experts are worth more the
longer a model trains; at C = exp(-c / d) they begin to pay.

Intervals are percentiles of a bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 9): the
fit is repeated on its own values plus residuals drawn with replacement. With one seed, residuals hold what the form of
the law misses and not what another seed would change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from scipy.optimize import minimize_scalar

DRAWS, COVERED, SEED = 200, 0.95, 0
EXPONENTS = (0.02, 5.0)  # of x that are searched
MIN_PLACES = 4  # different x; three parameters go through any three points
Interval = tuple[float, float, float]  # estimate, lower and upper end of the 95 % interval


@dataclass(frozen=True)
class Law:
    """loss = a + b x^-c."""

    a: Interval
    b: Interval
    c: Interval
    draws: numpy.ndarray  # fp64 [draws, 3]

    def at(self, x: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """The law, and the ends of its interval, at each x."""
        curves = self.draws[:, :1] + self.draws[:, 1:2] * x[None, :] ** -self.draws[:, 2:]
        low, high = numpy.quantile(curves, _ends(), axis=0)
        return self.a[0] + self.b[0] * x ** -self.c[0], low, high

    @property
    def settled(self) -> bool:
        """Whether the data say what c is: its interval stays inside what was searched."""
        return self.c[1] > EXPONENTS[0] * 1.01 and self.c[2] < EXPONENTS[1] * 0.99


def fit_law(x: numpy.ndarray, loss: numpy.ndarray) -> Law | None:
    """Fit to all runs, fp64 [N] and [N], with a at least 0; None where there are too few different x."""
    if len(set(x.tolist())) < MIN_PLACES:
        return None
    best = _fit_exponent(x, loss)
    fitted = best[0] + best[1] * x ** -best[2]
    draws = numpy.stack([_fit_exponent(x, values) for values in resampled(fitted, loss - fitted, 3)])
    a, b, c = _intervals(best, draws)
    return Law(a, b, c, draws)


def _fit_exponent(x: numpy.ndarray, loss: numpy.ndarray) -> numpy.ndarray:
    """The best [a, b, c]. For a given c the law is linear in a and b: the search is over c alone, around the best of a
    few: with several minima, a descent from one start would end in any."""
    grid = numpy.geomspace(*EXPONENTS, 25)
    place = int(numpy.argmin(_linear(x, loss, grid)[2]))
    bounds = numpy.log(grid[[max(0, place - 1), min(len(grid) - 1, place + 1)]])

    def error(log_c: float) -> float:
        return float(_linear(x, loss, numpy.exp([log_c]))[2][0])

    c = numpy.exp(minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-3}).x)
    a, b, _ = _linear(x, loss, numpy.array([c]))
    return numpy.array([a[0], b[0], c])


def _linear(x: numpy.ndarray, loss: numpy.ndarray, c: numpy.ndarray) -> tuple[numpy.ndarray, ...]:
    """For each exponent the best a, at least 0, the best b, and the sum of squared errors: [C] each."""
    power = x[None, :] ** -c[:, None]
    centred = power - power.mean(1, keepdims=True)
    b = centred @ loss / (centred**2).sum(1)
    a = loss.mean() - b * power.mean(1)
    b = numpy.where(a < 0, power @ loss / (power**2).sum(1), b)
    a = numpy.maximum(a, 0.0)
    return a, b, ((a[:, None] + b[:, None] * power - loss) ** 2).sum(1)


@dataclass(frozen=True)
class Power:
    """loss = exp(p) C^-alpha, between the least and the most compute that it was fitted to."""

    p: float
    alpha: float
    least: float
    most: float

    def compute_at(self, loss: float) -> float:
        """Training compute at which the law has this loss."""
        return float(numpy.exp((self.p - numpy.log(loss)) / self.alpha))

    def holds(self, compute: float) -> bool:
        """Whether this is no extrapolation: within what was fitted, and a quarter beyond."""
        return self.least / 1.25 <= compute <= self.most * 1.25


def fit_power(compute: numpy.ndarray, loss: numpy.ndarray) -> Power | None:
    """Fit to at least two lengths, fp64 [N] and [N]; None where there are fewer, or the loss does not fall."""
    if len(compute) < 2 or numpy.ptp(numpy.log(compute)) < 0.1:
        return None
    slope, p = numpy.polyfit(numpy.log(compute), numpy.log(loss), 1)
    return Power(float(p), float(-slope), float(compute.min()), float(compute.max())) if slope < 0 else None


@dataclass(frozen=True)
class JointLaw:
    """ln loss = p + b ln C + c ln E + d ln C ln E."""

    p: Interval
    b: Interval
    c: Interval
    d: Interval
    pays_from: Interval | None  # compute from which more experts lower the loss; None where d is not below 0
    residual: float  # root mean square, of ln loss
    residuals: numpy.ndarray  # fp64 [N]

    @property
    def settled(self) -> bool:
        """Whether the sign of d is clear."""
        return self.d[1] * self.d[2] > 0


def fit_joint(compute: numpy.ndarray, experts: numpy.ndarray, loss: numpy.ndarray) -> JointLaw | None:
    """Fit to runs, fp64 [N] each; None where there are not two different E and two lengths, and more than 4 runs."""
    log_c, log_e, target = numpy.log(compute), numpy.log(experts), numpy.log(loss)
    middle = log_c.mean()  # the columns are less alike around it
    columns = numpy.stack([numpy.ones_like(log_c), log_c - middle, log_e, (log_c - middle) * log_e], axis=1)
    if len(loss) <= 4 or numpy.linalg.matrix_rank(columns, tol=1e-6) < 4:
        return None

    def fit(values: numpy.ndarray) -> numpy.ndarray:
        p, b, c, d = numpy.linalg.lstsq(columns, values, rcond=None)[0]
        return numpy.array([p - b * middle, b, c - d * middle, d])

    best = fit(target)
    fitted = best[0] + best[1] * log_c + best[2] * log_e + best[3] * log_c * log_e
    draws = numpy.stack([fit(values) for values in resampled(fitted, target - fitted, 4)])
    intervals = _intervals(best, draws)
    pays_from = None
    if best[3] < 0:
        turns = draws[draws[:, 3] < 0]
        low, high = numpy.quantile(numpy.exp(-turns[:, 2] / turns[:, 3]), _ends())
        pays_from = (float(numpy.exp(-best[2] / best[3])), float(low), float(high))
    residuals = target - fitted
    p, b, c, d = intervals
    return JointLaw(p, b, c, d, pays_from, float(numpy.sqrt((residuals**2).mean())), residuals)


def resampled(fitted: numpy.ndarray, residuals: numpy.ndarray, parameters: int) -> numpy.ndarray:
    """[draws, N]: fitted values plus residuals drawn with replacement, scaled for what the parameters took."""
    wider = residuals * numpy.sqrt(len(fitted) / max(1, len(fitted) - parameters))
    return fitted + numpy.random.default_rng(SEED).choice(wider, size=(DRAWS, len(fitted)))


def _intervals(best: numpy.ndarray, draws: numpy.ndarray) -> list[Interval]:
    low, high = numpy.quantile(draws, _ends(), axis=0)
    return [(float(best[i]), float(low[i]), float(high[i])) for i in range(len(best))]


def _ends() -> tuple[float, float]:
    return (1 - COVERED) / 2, (1 + COVERED) / 2

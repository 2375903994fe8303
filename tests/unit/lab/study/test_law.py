"""A fitted law finds the law that made the data, says how sure it is, and does not fit too few points."""

import numpy
import pytest

from dsmoe.lab.study.law import EXPONENTS, fit_law

X = numpy.repeat([4.0, 8.0, 16.0, 32.0, 64.0, 128.0], 3)


def noisy(a: float, b: float, c: float, sigma: float, seed: int) -> numpy.ndarray:
    return a + b * X**-c + sigma * numpy.random.default_rng(seed).normal(size=len(X))


def test_exact_data_give_the_law_back():
    law = fit_law(X, 1.8 + 0.4 * X**-0.5)
    assert [value[0] for value in (law.a, law.b, law.c)] == pytest.approx([1.8, 0.4, 0.5], rel=0.03)
    assert law.settled
    at, low, high = law.at(numpy.array([4.0, 256.0]))
    assert at == pytest.approx([2.0, 1.825], abs=2e-3) and (low <= at + 1e-3).all() and (at <= high + 1e-3).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = [low <= 0.5 <= high for _, low, high in (fit_law(X, noisy(1.8, 0.4, 0.5, 0.005, s)).c for s in range(40))]
    assert 33 <= sum(held) <= 40


def test_flat_data_do_not_settle_an_exponent():
    law = fit_law(X, noisy(2.0, 0.0, 1.0, 0.05, 1))
    assert not law.settled and EXPONENTS[0] <= law.c[1] <= law.c[0] <= law.c[2] <= EXPONENTS[-1]


def test_a_is_never_negative():
    law = fit_law(X, 3.0 * X**-0.3 - 0.5)
    assert law.a[0] == 0 and law.a[1] >= 0


def test_three_places_are_too_few():
    assert fit_law(X[:9], X[:9]) is None

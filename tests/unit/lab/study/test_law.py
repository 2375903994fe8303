"""A fitted law finds the law that made the data, says how sure it is, and does not fit too few points."""

import numpy
import pytest

from dsmoe.lab.study.law import EXPONENTS, fit_joint, fit_law, fit_power

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
    held = [low <= 0.5 <= high for _, low, high in (fit_law(X, noisy(1.8, 0.4, 0.5, 0.005, s)).c for s in range(15))]
    assert 11 <= sum(held) <= 15


def test_flat_data_do_not_settle_an_exponent():
    law = fit_law(X, noisy(2.0, 0.0, 1.0, 0.05, 1))
    assert not law.settled and EXPONENTS[0] <= law.c[1] <= law.c[0] <= law.c[2] <= EXPONENTS[1]


def test_a_is_never_negative():
    law = fit_law(X, 3.0 * X**-0.3 - 0.5)
    assert law.a[0] == 0 and law.a[1] >= 0


def test_three_places_are_too_few():
    assert fit_law(X[:9], X[:9]) is None


def test_a_power_law_of_lengths_is_inverted():
    compute = numpy.array([1e12, 2e12, 4e12])
    law = fit_power(compute, 5 * compute**-0.03)
    assert law.alpha == pytest.approx(0.03) and law.compute_at(5 * 3e12**-0.03) == pytest.approx(3e12)
    assert law.holds(4.9e12) and not law.holds(6e12)
    assert fit_power(compute[:1], compute[:1]) is None and fit_power(compute, compute) is None  # rising


def test_the_joint_law_says_from_which_compute_experts_pay():
    random = numpy.random.default_rng(0)
    compute, experts = numpy.meshgrid([1e12, 2e12, 4e12], [4.0, 16.0, 64.0])
    compute, experts = compute.ravel(), experts.ravel()
    turn = 2e12
    log_loss = 4 - 0.1 * numpy.log(compute) - 0.01 * numpy.log(experts) * (numpy.log(compute) - numpy.log(turn))
    law = fit_joint(compute, experts, numpy.exp(log_loss))
    assert law.d[0] == pytest.approx(-0.01) and law.b[0] == pytest.approx(-0.1) and law.residual < 1e-9
    assert law.pays_from[0] == pytest.approx(turn, rel=1e-3) and law.settled
    noise = 0.003 * random.normal(size=(20, 9))
    noisy_laws = [fit_joint(compute, experts, numpy.exp(log_loss + one)) for one in noise]
    assert sum(one.d[1] <= -0.01 <= one.d[2] for one in noisy_laws) >= 13  # 95 % with many runs; here there are nine
    assert all(one.residual > 1e-4 and len(one.residuals) == 9 for one in noisy_laws)
    assert fit_joint(compute[:3], experts[:3], compute[:3]) is None  # one E

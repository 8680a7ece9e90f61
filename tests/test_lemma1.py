"""Lemma 1 against the paper's formula, exact fractions, and gradient descent itself."""

import itertools
import math
from fractions import Fraction

import numpy
import pytest
import torch
from test_landscape import quadratic

from motkit import figures
from motkit.analysis import lemma1


def test_movement_is_the_papers_formula_and_the_closed_form():
    eta = 0.07
    for steps in (1, 2, 3, 8, 50):
        curvature = numpy.array([-3.0, 0.5, 4.0, 14.0, 27.0])
        as_sum = eta * sum((1 - eta * curvature) ** e for e in range(steps))
        closed = (1 - (1 - eta * curvature) ** steps) / curvature
        numpy.testing.assert_allclose(lemma1.movement(curvature, [eta] * steps), as_sum, rtol=1e-12)
        numpy.testing.assert_allclose(as_sum, closed, rtol=1e-10)
    assert float(lemma1.movement(0.0, [eta] * 50)) == pytest.approx(50 * eta)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_where_the_claim_holds_in_exact_arithmetic(steps):
    def s(x):
        return sum((1 - x) ** e for e in range(steps))

    grid = [Fraction(k, 500) for k in range(1, 1000)]
    values = [s(x) for x in grid]
    falls = [a > b for a, b in itertools.pairwise(values)]
    start = lemma1.rises_from(steps)
    claim = lemma1.compute_theory([steps])["claim"].iloc[0]
    assert claim["decreasing_to_2"] == all(falls)
    assert claim["decreasing_to_1"] == all(falls[:499])
    if steps % 2 == 0:
        assert math.isnan(start)
    elif steps > 1:
        first = falls.index(False)
        assert abs(float(grid[first]) - start) < 0.005
        assert not any(falls[first + 1 :])
    if steps == 3:
        assert start == pytest.approx(1.5, abs=1e-9)


def test_damping_of_gradient_descent_is_the_lemmas():
    """Real steps on a quadratic, with a schedule: every eigenvector moves as predicted."""
    pytest.importorskip("hessian_eigenthings")
    _, objective = quadratic()
    start = objective.weights
    rates = [0.04 * (1 - step / 15) for step in range(15)]
    for rate in rates:
        _, gradient = objective.gradient()
        now = objective.weights
        objective.put({name: now[name] - rate * gradient[name] for name in now})
    end = objective.weights
    table = lemma1.measure_damping(objective, start, end, top=12, lanczos_steps=12)
    eigen = table[table["direction"] == "eigenvector"]
    assert sorted(eigen["curvature"]) == pytest.approx([*range(1, 12), 20], rel=1e-8)
    numpy.testing.assert_allclose(eigen["damping"], lemma1.movement(eigen["curvature"], rates), rtol=1e-6)


def test_the_prediction_is_tied_to_the_flat_direction(tmp_path):
    import pandas

    rates, factor = [3e-4, 2e-4, 1e-4], 120.0
    curvature = numpy.array([40.0, 8.0, 0.0])
    moved = lemma1.movement(curvature, [factor * rate for rate in rates])
    rows = {"direction": ["eigenvector", "eigenvector", "flat"], "curvature": curvature, "gradient": 1.0}
    table = lemma1._with_prediction(pandas.DataFrame(rows | {"moved": -moved, "damping": moved}), rates)
    numpy.testing.assert_allclose(table["predicted"], table["share"], rtol=1e-8)
    assert table["share"].tolist()[2] == 1
    assert table["eta_lambda"].tolist() == pytest.approx((factor * 3e-4 * curvature).tolist())
    steep = pandas.DataFrame(rows | {"curvature": [900.0, 8.0, 0.0], "moved": -moved, "damping": moved})
    assert numpy.isnan(lemma1._with_prediction(steep, rates)["predicted"][0])


def test_the_figure_shows_the_theory_without_a_run():
    tables = lemma1.compute_theory()
    assert figures.to_png(lemma1.draw_lemma1(tables)).startswith(b"\x89PNG")
    assert torch.tensor(tables["grid"]["share"].to_numpy()).isfinite().all()

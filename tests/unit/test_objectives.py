"""Golden values, laws and gradients of the objectives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.update.objectives.base import Pairs
from stages.update.objectives.dpo import DPOParams, dpo
from stages.update.objectives.minor_dpo import MinorDPOParams, gate, minor_dpo

# (r_w, r_l), dpo, minor_dpo, dL/dr_w and dL/dr_l of minor_dpo; beta 0.1, worked out by hand in float64
GOLDEN = [
    ((0, 0), 0.693147, 0.693147, -0.050000, 0.0),
    ((2, 3), 0.744397, 0.744397, -0.052498, 0.052498),
    ((2, -3), 0.474077, 0.598139, -0.045017, 0.0),
    ((-2, -3), 0.644397, 0.798139, -0.054983, 0.0),
    ((-2, 3), 0.974077, 0.974077, -0.062246, 0.062246),
    ((-5, -20), 0.201413, 0.974077, -0.062246, 0.0),
]


def pairs(r_w, r_l, dtype=torch.float64):
    """Pairs whose log-ratios are given; the references stand at -7 and -9 nats."""
    r_w, r_l = (torch.as_tensor(r, dtype=dtype).reshape(-1) for r in (r_w, r_l))
    ref_w, ref_l = torch.full_like(r_w, -7.0), torch.full_like(r_l, -9.0)
    ones = torch.ones_like(r_w)
    chosen, rejected = (ref_w + r_w).requires_grad_(), (ref_l + r_l).requires_grad_()
    return Pairs(chosen, rejected, ref_w[None], ref_l[None], ones, ones)


def loss(function, batch, **params):
    kind = {minor_dpo: MinorDPOParams, dpo: DPOParams}[function]
    (term,) = function(batch, kind(**params))
    assert term.normaliser == "pairs"
    return term.loss_B


@pytest.mark.parametrize(("r", "of_dpo", "of_minor", "by_w", "by_l"), GOLDEN)
def test_golden_values_and_derivatives(r, of_dpo, of_minor, by_w, by_l):
    assert loss(dpo, pairs(*r)).item() == pytest.approx(of_dpo, abs=1e-6)
    batch = pairs(*r)
    value = loss(minor_dpo, batch)
    value.sum().backward()
    assert value.item() == pytest.approx(of_minor, abs=1e-6)
    assert batch.chosen_B.grad.item() == pytest.approx(by_w, abs=1e-6)
    assert batch.rejected_B.grad.item() == pytest.approx(by_l, abs=1e-6)


def test_label_smoothing_has_its_golden_value():
    assert loss(dpo, pairs(5.0, 0.0), label_smoothing=0.1).item() == pytest.approx(0.524077, abs=1e-6)


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(0.1, 5), st.floats(0.01, 1))
def test_laws_of_minor_dpo(r_w, r_l, step, beta):
    def minor(w, l):
        return loss(minor_dpo, pairs(w, l), beta=beta).item()

    here = minor(r_w, r_l)
    plain = loss(dpo, pairs(r_w, r_l), beta=beta).item()
    assert here == plain if r_l >= 0 else here >= plain
    assert minor(r_w + step, r_l) <= here
    assert minor(r_w, r_l + step) >= here
    assert minor(r_w, -abs(r_l)) == minor(r_w, -abs(r_l) - step)


@given(st.floats(0.001, 2))
def test_policy_equal_to_reference_gives_ln_2_to_the_last_bit(beta):
    for function in (dpo, minor_dpo):
        assert loss(function, pairs(0.0, 0.0, torch.float32), beta=beta).item() == float(torch.tensor(math.log(2)))


def test_the_gate_is_closed_at_its_floor_and_open_above_it():
    for floor in (0.0, 1e-3):
        r = torch.tensor([-1.0, 0.0, floor, floor + 1e-4, 2.0], dtype=torch.float64, requires_grad=True)
        out = gate(r, floor)
        out.sum().backward()
        assert r.grad.tolist() == [0, 0, 0, 1, 1]
        assert out.tolist() == pytest.approx([0, 0, 0, floor + 1e-4, 2])


def test_a_log_prob_that_is_not_finite_is_no_closed_gate():
    with pytest.raises(AssertionError):
        loss(minor_dpo, pairs(0.0, math.nan))


@given(
    st.lists(
        st.tuples(st.floats(-20, 20), st.floats(-20, 20)).filter(lambda r: abs(r[1]) > 0.01), min_size=1, max_size=5
    )
)
def test_gradients_agree_with_finite_differences(rows):
    r_w, r_l = zip(*rows, strict=True)
    for function in (dpo, minor_dpo):
        batch = pairs(r_w, r_l)
        value = loss(function, batch)
        value.sum().backward()
        eps = 1e-6
        for which, grad in (("w", batch.chosen_B.grad), ("l", batch.rejected_B.grad)):
            shift = torch.full((len(rows),), eps, dtype=torch.float64)
            dw, dl = (shift, 0 * shift) if which == "w" else (0 * shift, shift)
            up = loss(function, pairs(torch.tensor(r_w).double() + dw, torch.tensor(r_l).double() + dl))
            down = loss(function, pairs(torch.tensor(r_w).double() - dw, torch.tensor(r_l).double() - dl))
            assert torch.allclose((up - down) / (2 * eps), grad, atol=1e-6)


@pytest.mark.parametrize("function", [dpo, minor_dpo])
def test_extreme_log_ratios_stay_finite(function):
    batch = pairs([1e4, -1e4, 1e4, -1e4], [1e4, -1e4, -1e4, 1e4], torch.float32)
    value = loss(function, batch)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(batch.chosen_B.grad).all() and torch.isfinite(batch.rejected_B.grad).all()

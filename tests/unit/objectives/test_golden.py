"""Values worked out by hand in float64, to six decimals; beta 0.1 where nothing else is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import groups, loss_of, pairs

from stages.update.objectives.mrpo import _near_the_first, _shares, mixture
from stages.update.objectives.registry import find_loss

RATIOS = [(0, 0), (2, 3), (2, -3), (-2, -3), (-2, 3), (-5, -20)]

COLUMNS = {
    "dpo": ({}, [0.693147, 0.744397, 0.474077, 0.644397, 0.974077, 0.201413]),
    "minor_dpo": ({}, [0.693147, 0.744397, 0.598139, 0.798139, 0.974077, 0.974077]),
    "dpop": ({}, [0.693147, 0.854355, 0.201413, 29.700000, 31.500000, 70.500000]),
    "exo_pair": ({}, [2.761231, 2.935004, 1.945734, 2.589954, 3.637327, 0.785917]),
    "chi_po": ({"beta": 0.1, "r_max": 1e6}, [0.693147, 1.596143, 0.255531, 0.640342, 2.574289, 0.201290]),
}

SLOPES = [(-0.05, 0), (-0.052498, 0.052498), (-0.045017, 0), (-0.054983, 0), (-0.062246, 0.062246), (-0.062246, 0)]


def six(value):
    return pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_the_table(name):
    params, expected = COLUMNS[name]
    r_w, r_l = zip(*RATIOS, strict=True)
    assert loss_of(name, pairs(r_w, r_l), **params).tolist() == six(expected)


def test_slopes_of_minor_dpo():
    batch = pairs(*zip(*RATIOS, strict=True))
    loss_of("minor_dpo", batch).sum().backward()
    slopes = zip(batch.chosen_B.grad.tolist(), batch.rejected_B.grad.tolist(), strict=True)
    assert [list(slope) for slope in slopes] == [six(list(slope)) for slope in SLOPES]


@pytest.mark.parametrize(("name", "expected"), [("dpo", 0.524077), ("robust", 0.411577)])
def test_smoothed_labels(name, expected):
    assert loss_of(name, pairs(5.0, 0.0), label_smoothing=0.1).item() == six(expected)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.881462), (0.5, 1.086190)])
def test_exo_of_four_answers(beta, expected):
    batch = groups([[1, -2, 0.5, 3]], [[0.2, 1.5, -0.3, 0.9]])
    assert loss_of("exo", batch, beta=beta, beta_r=0.5).item() == six(expected)


def test_rpo():
    batch = replace(pairs(0.0, 0.0), chosen_B=torch.tensor([-120.0]).double())
    batch = replace(batch, ref_chosen_RB=torch.tensor([[-125.0]]).double())
    assert loss_of("rpo", batch).item() == six(0.674460)


def test_sppo():
    assert loss_of("sppo", pairs(2.0, -3.0)).item() == pytest.approx(247506.5, abs=1e-4)


def test_mpo_without_an_answer_of_the_reference():
    batch, zero = pairs(0.0, 0.0, lengths=(10, 20)), torch.zeros(1).double()
    batch = replace(batch, chosen_B=zero - 10, rejected_B=zero - 30, stream_logp_B=zero, stream_len_B=zero)
    assert loss_of("mpo", batch).item() == six(-0.622459)


def test_the_actor_term_of_hpo():
    batch, one = pairs(0.0, 0.0, lengths=(10, 10)), torch.ones(1).double()
    same = {"chosen_B": -12 * one, "rejected_B": -12 * one, "aux_chosen_B": 0.8 * one, "aux_rejected_B": 0.8 * one}
    _, actor, _ = find_loss("hpo", {})(replace(batch, **same, value_B=0.5 * one))
    assert (actor.loss_B * actor.weight_B).item() == six(2.689013)


def test_the_reference_of_mrpo_as_published():
    """Reference 1 at (-60, -75) beside the first one at (-50, -52)."""
    chosen_RB, rejected_RB = torch.tensor([[-50.0], [-60.0]]).double(), torch.tensor([[-52.0], [-75.0]]).double()
    assert _shares(chosen_RB, rejected_RB, "as_published").flatten().tolist() == six([0.882353, 0.117647])
    near_w, near_l = _near_the_first(chosen_RB, rejected_RB, 0.1)
    assert [near_w[1].item(), near_l[1].item()] == six([-52.320675, -54.786498])
    found = mixture(chosen_RB, rejected_RB, eta=0.1, weights="as_published")
    assert [logp_B.item() for logp_B in found] == six([-50.732512, -53.026426])

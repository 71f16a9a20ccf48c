"""Laws of the pairwise objectives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batches import loss_of, pairs, summed
from hypothesis import given
from hypothesis import strategies as st

from stages.update.objectives.chi_po import clipped
from stages.update.objectives.minor_dpo import gate
from stages.update.objectives.registry import find_loss

ratios = st.floats(-30, 30)
betas = st.floats(0.01, 1)
steps = st.floats(0.1, 5)

LOGISTIC = {
    "minor_dpo": {},
    "dpo": {},
    "dpop": {},
    "rpo": {"beta": 0.1},
    "chi_po": {},
    "hinge": {},
    "simpo": {},
    "mpo": {},
    "robust": {"label_smoothing": 0.0},
}
"""Those that never ask for less of the chosen or for more of the rejected answer."""


def at(name, r_w, r_l, **params):
    batch, zero = pairs(r_w, r_l, lengths=(3, 5)), torch.zeros(1).double()
    return loss_of(name, replace(batch, stream_logp_B=zero, stream_len_B=zero), **params).item()


@given(ratios, ratios, steps)
def test_a_likelier_chosen_and_an_unlikelier_rejected_answer_never_raise_the_loss(r_w, r_l, step):
    for name, params in LOGISTIC.items():
        here = at(name, r_w, r_l, **params)
        assert at(name, r_w + step, r_l, **params) <= here + 1e-12, name
        assert at(name, r_w, r_l - step, **params) <= here + 1e-12, name


@given(ratios, ratios, steps, betas)
def test_minor_dpo_floors_the_rejected_answer(r_w, r_l, step, beta):
    here = at("minor_dpo", r_w, r_l, beta=beta)
    plain = at("dpo", r_w, r_l, beta=beta)
    assert here == plain if r_l >= 0 else here >= plain
    assert at("minor_dpo", r_w, -abs(r_l), beta=beta) == at("minor_dpo", r_w, -abs(r_l) - step, beta=beta)


def test_the_gate_is_closed_at_its_floor_and_open_above_it():
    for floor in (0.0, 1e-3):
        r = torch.tensor([-1.0, 0.0, floor, floor + 1e-4, 2.0], dtype=torch.float64, requires_grad=True)
        out = gate(r, floor)
        out.sum().backward()
        assert r.grad.tolist() == [0, 0, 0, 1, 1]
        assert out.tolist() == pytest.approx([0, 0, 0, floor + 1e-4, 2])


def test_the_gates_floor_is_in_nats_a_sequence_under_either_kind_of_log_prob():
    for logps in ("sum", "mean"):
        for r_l, is_open in ((0.9, False), (1.1, True)):
            batch = pairs(0.0, r_l, lengths=(10, 10))
            loss_of("minor_dpo", batch, gate_floor=1.0, logps=logps).sum().backward()
            assert (batch.rejected_B.grad.item() != 0) == is_open


@pytest.mark.parametrize("name", ["minor_dpo", "dpo", "dpop", "exo_pair", "ipo", "hinge", "robust"])
def test_a_mean_is_the_sum_where_answers_have_one_token_and_beta_takes_it_up_where_they_have_equally_many(name):
    assert at_length(name, 1, logps="mean") == at_length(name, 1, logps="sum")
    if name != "ipo":  # beta is a margin there, and no factor
        assert at_length(name, 4, logps="mean", beta=0.8) == pytest.approx(at_length(name, 4, logps="sum", beta=0.2))


def at_length(name, length, **params):
    return loss_of(name, pairs([2, -1], [3, -4], lengths=(length, length)), **params).tolist()


@given(ratios, ratios, betas)
def test_what_dpo_is_the_limit_of(r_w, r_l, beta):
    plain = at("dpo", r_w, r_l, beta=beta)
    assert at("rpo", r_w, r_l, beta=beta, eta=0.0) == plain
    assert at("robust", r_w, r_l, beta=beta, label_smoothing=0.0) == plain
    assert at("dpop", r_w, r_l, beta=beta, dpop_lambda=0.0) == plain
    assert at("dpop", abs(r_w), r_l, beta=beta) == at("dpo", abs(r_w), r_l, beta=beta)
    assert at("dpop", r_w, r_l, beta=beta) >= plain


@given(ratios, ratios, st.floats(0.01, 0.45))
def test_robust_dpo_undoes_wrong_labels_on_average(r_w, r_l, e):
    kept = at("robust", r_w, r_l, label_smoothing=e)
    turned = at("robust", r_l, r_w, label_smoothing=e)
    assert (1 - e) * kept + e * turned == pytest.approx(at("dpo", r_w, r_l), abs=1e-9)


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.05, 2))
def test_regressions_are_at_rest_where_their_targets_are(r_w, r_l, beta):
    target = 1 / (2 * beta)
    assert at("sppo", target, -target, beta=beta) == pytest.approx(0, abs=1e-12)
    assert at("sppo", r_w, r_l, beta=beta) >= 0
    assert at("ipo", r_l + target, r_l, beta=beta, logps="sum") == pytest.approx(0, abs=1e-12)
    assert at("ipo", r_w, r_l, beta=beta) >= 0


def test_the_hinge_leaves_a_pair_that_is_apart_alone():
    batch = pairs([10.0, 12.0, 9.0], [0.0, 0.0, 0.0])
    loss_B = loss_of("hinge", batch)
    loss_B.sum().backward()
    assert loss_B.tolist() == pytest.approx([0, 0, 0.1])
    assert batch.chosen_B.grad.tolist() == pytest.approx([0, 0, -0.1])


def test_nca_raises_the_chosen_answer_at_the_start_and_falls_back_on_both():
    batch = pairs([0.0, 50.0], [0.0, 0.0])
    loss_of("nca_pair", batch).sum().backward()
    assert batch.chosen_B.grad[0] < 0 < batch.chosen_B.grad[1]
    assert (batch.rejected_B.grad > 0).all()


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_the_push_of_chi_po_is_dpos_times_the_links_slope(r_w, r_l):
    batch, plain = pairs(r_w, r_l), pairs(r_w + math.exp(r_w), r_l + math.exp(r_l))
    loss_of("chi_po", batch, r_max=100.0).sum().backward()
    loss_of("dpo", plain, beta=0.05).sum().backward()
    assert batch.chosen_B.grad.item() == pytest.approx(plain.chosen_B.grad.item() * (1 + math.exp(r_w)))
    assert batch.rejected_B.grad.item() == pytest.approx(plain.rejected_B.grad.item() * (1 + math.exp(r_l)))


def test_chi_po_feels_nothing_beyond_its_clip():
    batch = pairs([6.0, -6.0], [-6.0, 6.0])
    loss_B = loss_of("chi_po", batch)
    loss_B.sum().backward()
    assert loss_B.tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.exp(2))])
    assert batch.chosen_B.grad.tolist() == batch.rejected_B.grad.tolist() == [0, 0]


def test_a_clip_has_its_slope_up_to_the_bounds():
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    out = clipped(x, -1.0, 1.0)
    out.sum().backward()
    assert out.tolist() == [-1, -1, 0.5, 1, 1]
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert clipped(torch.tensor([math.nan]), -1.0, 1.0).isnan().all()


def test_rpo_averages_over_the_answer_when_asked_and_leaves_beta_out_then():
    batch = replace(pairs(0.0, 0.0, lengths=(4, 4)), chosen_B=torch.tensor([-120.0]).double())
    batch = replace(batch, ref_chosen_RB=batch.chosen_B[None])
    found = loss_of("rpo", batch, beta=0.5, eta=0.2, sft_average=True).item()
    assert found == pytest.approx(math.log(2) + 0.2 * 120 / 4)


def test_sft_is_a_mean_over_tokens():
    (term,) = find_loss("sft", {})(pairs([1.0, 2.0], [0.0, 0.0], lengths=(4, 6)))
    assert term.normaliser == "tokens"
    assert term.loss_B.tolist() == [6, 5]
    others = [name for name in LOGISTIC if name != "mpo"]
    assert {term.normaliser for name in others for term in find_loss(name, {})(pairs(0.0, 0.0))} == {"pairs"}


def test_simpo_and_mpo_are_blind_to_the_reference_and_to_length():
    for name in ("simpo", "mpo"):
        zero = torch.zeros(1).double()
        batch = replace(pairs(1.0, 2.0, lengths=(3, 5)), stream_logp_B=zero, stream_len_B=zero)
        alone = replace(batch, ref_chosen_RB=torch.empty(0, 1), ref_rejected_RB=torch.empty(0, 1))
        longer = replace(
            alone,
            chosen_B=2 * batch.chosen_B,
            rejected_B=2 * batch.rejected_B,
            chosen_len_B=2 * batch.chosen_len_B,
            rejected_len_B=2 * batch.rejected_len_B,
        )
        assert loss_of(name, batch) == loss_of(name, alone) == loss_of(name, longer)


def test_mpo_counts_only_the_answers_of_the_reference_that_there_are():
    batch = pairs([0.0, 0.0], [0.0, 0.0], lengths=(2, 2))
    lengths = torch.tensor([0.0, 4.0]).double()
    logps = torch.tensor([math.nan, -6.0], dtype=torch.float64, requires_grad=True)
    preference, stream = find_loss("mpo", {})(replace(batch, stream_logp_B=logps, stream_len_B=lengths))
    assert stream.loss_B.tolist() == pytest.approx([0, 0.1 * 6 / 4])
    summed([preference, stream]).sum().backward()
    assert logps.grad.tolist() == pytest.approx([0, -0.1 / 4])

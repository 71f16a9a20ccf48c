"""What holds for every objective in every form: gradients, extremes, NaN, rows apart from each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batches import FORMS, PAIRWISE, pairs, random_batch, reordered, summed, told, with_gradients

from stages.update.objectives.base import Groups
from stages.update.objectives.registry import find_loss

every_form = pytest.mark.parametrize("form", FORMS, ids=told)
every_pairwise_form = pytest.mark.parametrize("form", PAIRWISE, ids=told)


def gradients(loss, batch):
    """The loss a row, and its gradients by the answers' log-probs; zeros where one plays no part."""
    batch, leaves = with_gradients(batch)
    loss_B = summed(loss(batch))
    found = torch.autograd.grad(loss_B.sum(), leaves, allow_unused=True)
    return loss_B, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@every_form
def test_gradients_are_those_of_finite_differences(form):
    loss = find_loss(*form)
    batch, leaves = with_gradients(random_batch(loss, rows=3))

    def of(*values):
        names = ("logp_GK",) if isinstance(batch, Groups) else ("chosen_B", "rejected_B", "stream_logp_B")
        return summed(loss(replace(batch, **dict(zip(names, values, strict=True)))))

    assert torch.autograd.gradcheck(of, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


@every_form
def test_float32_gives_float64s_values_and_gradients_in_float32(form):
    loss = find_loss(*form)
    exact, exact_gradients = gradients(loss, random_batch(loss))
    rough, rough_gradients = gradients(loss, random_batch(loss, dtype=torch.float32))
    assert rough.dtype == torch.float32
    assert torch.allclose(rough.double(), exact, rtol=1e-4, atol=1e-4)
    for ours, true in zip(rough_gradients, exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), true, rtol=1e-3, atol=1e-5)


@every_form
def test_ten_thousand_nats_give_finite_float32_values_and_gradients(form):
    loss = find_loss(*form)
    for spread in (2e4, -2e4, 1e2):
        value, found = gradients(loss, random_batch(loss, spread=spread, dtype=torch.float32))
        assert torch.isfinite(value).all()
        assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize("form", [form for form in PAIRWISE if find_loss(*form).references == (1, 1)], ids=told)
@pytest.mark.parametrize(("r_w", "r_l"), [(1e4, 1e4), (1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4)])
def test_so_do_all_corners(form, r_w, r_l):
    loss, corner = find_loss(*form), pairs([r_w], [r_l], dtype=torch.float32)
    batch = replace(random_batch(loss, dtype=torch.float32, rows=1))
    names = ("chosen_B", "rejected_B", "ref_chosen_RB", "ref_rejected_RB")
    value, found = gradients(loss, replace(batch, **{name: getattr(corner, name).detach() for name in names}))
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(g).all() for g in found)


@every_form
def test_a_log_prob_that_is_no_number_is_not_hidden(form):
    loss = find_loss(*form)
    batch = random_batch(loss)
    for name in ("logp_GK",) if isinstance(batch, Groups) else ("chosen_B", "rejected_B"):
        if name == "rejected_B" and form == ("sft", {}):
            continue
        spoilt = getattr(batch, name).clone()
        spoilt.view(-1)[0] = math.nan
        try:
            value = summed(loss(replace(batch, **{name: spoilt})))
        except AssertionError:
            continue
        assert value[0].isnan(), name
        assert value[1:].isfinite().all()


@every_form
def test_a_row_knows_nothing_of_the_others(form):
    loss = find_loss(*form)
    batch, order = random_batch(loss), torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.allclose(summed(loss(reordered(batch, order))), summed(loss(batch))[order], rtol=1e-12)


@every_pairwise_form
def test_one_term_says_which_answer_the_objective_takes_for_the_better_one(form):
    loss = find_loss(*form)
    batch = random_batch(loss)
    logits = [term.logit_B for term in loss(batch) if term.logit_B is not None]
    if form in (("sft", {}), ("hpo", {"base": "sft"})):
        assert not logits
        return
    same = {"chosen_len_B": batch.rejected_len_B, "ref_chosen_RB": batch.ref_rejected_RB}
    for shift, sign in ((5.0, 1.0), (-5.0, -1.0)):
        apart = replace(batch, chosen_B=batch.rejected_B + shift, **same)
        (logit_B,) = [term.logit_B for term in loss(apart) if term.logit_B is not None]
        assert logit_B.shape == batch.chosen_B.shape
        if form[0] != "minor_dpo" and form != ("hpo", {"base": "minor_dpo"}):  # their gates leave some out
            assert (logit_B.sign() == sign).all()


def starts_at_ln2(loss):
    return loss.objective.starts_at_ln2(loss.params)


def test_some_losses_start_at_ln_2_to_the_last_bit():
    starting = [form for form in FORMS if starts_at_ln2(find_loss(*form))]
    assert {name for name, _ in starting} == {"minor_dpo", "dpo", "dpop", "chi_po", "robust"}
    assert starts_at_ln2(find_loss("rpo", {"eta": 0.0}))
    for form in [*starting, ("rpo", {"eta": 0.0})]:
        loss = find_loss(*form)
        batch = random_batch(loss, dtype=torch.float32)
        batch = replace(batch, ref_chosen_RB=batch.chosen_B[None], ref_rejected_RB=batch.rejected_B[None])
        assert (summed(loss(batch)) == torch.tensor(2.0).log()).all()

"""Groups (exo), and the objectives that build on another one (hpo, mrpo)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from batches import groups, loss_of, pairs, random_batch, summed, with_gradients
from hypothesis import given
from hypothesis import strategies as st

from stages.update.objectives.mrpo import _shares, mixture
from stages.update.objectives.registry import find_loss

ratios = st.floats(-20, 20)

# ---- exo ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(ratios, st.floats(-3, 3)), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_exo_is_blind_to_the_order_of_answers_and_to_a_constant_on_the_rewards(answers, random):
    def of(answers, more=0.0):
        h, rewards = zip(*answers, strict=True)
        return loss_of("exo", groups([h], [[reward + more for reward in rewards]])).item()

    mixed = list(answers)
    random.shuffle(mixed)
    assert of(mixed) == pytest.approx(of(answers), abs=1e-9)
    assert of(answers, 7.0) == pytest.approx(of(answers), abs=1e-9)


@pytest.mark.parametrize("logps", ["sum", "mean"])
@pytest.mark.parametrize("pad", [0.0, 1e4, math.nan, math.inf])
def test_exo_is_blind_to_padding(logps, pad):
    h, rewards = [[1.0, -2.0], [0.5, 3.0, -1.0, 2.0]], [[0.2, 1.5], [0.0, 1.0, -1.0, 0.3]]
    together = groups(h, rewards, pad=pad)
    loss_G = loss_of("exo", together, logps=logps)
    loss_G.sum().backward()
    for g in range(2):
        alone = groups(h[g : g + 1], rewards[g : g + 1])
        loss = loss_of("exo", alone, logps=logps)
        loss.sum().backward()
        assert loss_G[g].item() == pytest.approx(loss.item())
        assert together.logp_GK.grad[g, : len(h[g])].tolist() == pytest.approx(alone.logp_GK.grad[0].tolist())
    assert together.logp_GK.grad[0, 2:].tolist() == [0, 0]


@given(ratios, ratios, st.floats(0.05, 1), st.floats(0.001, 0.4))
def test_exo_of_two_answers_is_exo_pair_where_the_rewards_say_the_same_as_the_label(r_w, r_l, beta, e):
    two = groups([[r_w, r_l]], [[0.5 * math.log((1 - e) / e), 0.0]])
    of_pair = loss_of("exo_pair", pairs(r_w, r_l), beta=beta, label_smoothing=e).item()
    assert loss_of("exo", two, beta=beta, beta_r=0.5).item() == pytest.approx(of_pair, abs=1e-9)


def test_exo_is_never_negative_and_at_rest_where_the_policy_follows_the_rewards():
    rewards = [0.3, -1.0, 0.8]
    batch = groups([rewards, [1.0, 1.0, -1.0]], [rewards, rewards])
    loss_G = loss_of("exo", batch, beta=2.0, beta_r=0.5)
    loss_G.sum().backward()
    assert loss_G[0].item() == pytest.approx(0, abs=1e-12)
    assert loss_G[1] > 0
    assert batch.logp_GK.grad[0].abs().max() < 1e-12


# ---- hpo ------------------------------------------------------------------------------------------------------------

BASES = [("dpo", {"beta": 0.3}), ("minor_dpo", {}), ("rpo", {}), ("ipo", {}), ("simpo", {})]


@pytest.mark.parametrize(("base", "base_params"), BASES)
def test_hpo_without_an_actor_is_its_base_and_the_values_loss(base, base_params):
    loss = find_loss("hpo", {"base": base, "base_params": base_params, "gamma": 0.0, "tau": 0.5, "value_weight": 2.0})
    batch, _ = with_gradients(random_batch(loss))
    squares = [(aux - batch.value_B) ** 2 for aux in (batch.aux_chosen_B, batch.aux_rejected_B)]
    expected = loss_of(base, batch, **base_params) + 2.0 * 0.5 * sum(squares) / 2
    assert torch.allclose(summed(loss(batch)), expected)


def test_only_the_values_loss_trains_the_head_and_only_the_others_the_policy():
    loss = find_loss("hpo", {})
    batch, leaves = with_gradients(random_batch(loss))
    value_B = batch.value_B.clone().requires_grad_()
    *others, value = [term.loss_B.sum() for term in loss(replace(batch, value_B=value_B))]
    assert torch.autograd.grad(sum(others), value_B, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True) == (None, None, None)

    def of(value_B):
        return loss(replace(batch, value_B=value_B))[-1].loss_B

    assert torch.autograd.gradcheck(of, value_B)


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.7])
def test_the_head_settles_on_the_expectile(tau):
    rewards, weight = torch.tensor([0.0, 1.0]).double(), torch.tensor([1 - tau, tau], dtype=torch.float64)
    settled = (rewards * weight).sum() / weight.sum()
    batch = random_batch(find_loss("hpo", {}), rows=1)
    batch = replace(batch, aux_chosen_B=rewards[1:], aux_rejected_B=rewards[:1])
    value_B = settled[None].requires_grad_()
    find_loss("hpo", {"tau": tau})(replace(batch, value_B=value_B))[-1].loss_B.sum().backward()
    assert value_B.grad.item() == pytest.approx(0, abs=1e-12)


def test_the_actor_prefers_what_is_better_than_expected_up_to_a_bound():
    batch, one = pairs(0.0, 0.0, lengths=(5, 5)), torch.ones(1).double()
    pulls = []
    for reward in (-90.0, 0.2, 0.8, 90.0):
        leaf = batch.chosen_B.detach().clone().requires_grad_()
        filled = replace(batch, chosen_B=leaf, aux_chosen_B=reward * one, aux_rejected_B=one, value_B=0.5 * one)
        find_loss("hpo", {})(filled)[1].loss_B.sum().backward()
        pulls.append(-leaf.grad.item())
    scale = 0.5 / 2 / 5
    assert pulls == pytest.approx([scale * math.exp(u) for u in (-5, -1.5, 1.5, 5)])


def test_the_actor_waits_for_the_head():
    loss = find_loss("hpo", {"warmup_steps": 3, "gamma": 0.4})
    assert [loss.at(step).params.gamma for step in range(5)] == [0, 0, 0, 0.4, 0.4]
    assert find_loss("dpo", {}).at(7) == find_loss("dpo", {})


# ---- mrpo -----------------------------------------------------------------------------------------------------------

REFERENCES = [-12.0, -18.0, -15.0], [-14.0, -13.0, -25.0]  # of the chosen and the rejected answer


def referenced(count, *, dtype=torch.float64):
    """Two pairs against some references."""
    batch = pairs([1.0, -2.0], [0.5, 3.0], dtype=dtype)
    chosen, rejected = (torch.tensor(logps[:count], dtype=dtype)[:, None].repeat(1, 2) for logps in REFERENCES)
    return replace(batch, ref_chosen_RB=chosen, ref_rejected_RB=rejected)


@pytest.mark.parametrize("weights", ["corrected", "as_published"])
@pytest.mark.parametrize("base", ["dpo", "minor_dpo", "chi_po", "sppo", "exo_pair"])
def test_equal_references_are_one(weights, base):
    for count, logp in itertools.product((2, 3, 5), (0.0, -40.0)):
        batch = pairs([1.0, -2.0], [0.5, 3.0])
        refs = torch.full((count, 2), logp - 1).double(), torch.full((count, 2), logp).double()
        found = loss_of("mrpo", replace(batch, ref_chosen_RB=refs[0], ref_rejected_RB=refs[1]), base=base)
        alone = replace(batch, ref_chosen_RB=refs[0][:1], ref_rejected_RB=refs[1][:1])
        assert torch.allclose(found, loss_of(base, alone), rtol=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_at_eta_0_the_first_reference_is_the_only_one(count):
    batch = referenced(count)
    alone = replace(batch, ref_chosen_RB=batch.ref_chosen_RB[:1], ref_rejected_RB=batch.ref_rejected_RB[:1])
    assert torch.allclose(loss_of("mrpo", batch, eta=0.0), loss_of("dpo", alone))


@pytest.mark.parametrize("weights", ["corrected", "as_published"])
def test_the_mixture_lies_between_its_references_and_is_blind_to_the_others_order(weights):
    batch = referenced(3)
    both = mixture(batch.ref_chosen_RB, batch.ref_rejected_RB, eta=0.9, weights=weights)
    for mixed_B, logps_RB in zip(both, (batch.ref_chosen_RB, batch.ref_rejected_RB), strict=True):
        assert (mixed_B >= logps_RB.min(0).values).all() and (mixed_B <= logps_RB.max(0).values).all()
    order = torch.tensor([0, 2, 1])
    again = mixture(batch.ref_chosen_RB[order], batch.ref_rejected_RB[order], eta=0.9, weights=weights)
    assert torch.allclose(torch.stack(both), torch.stack(again))


def test_corrected_a_reference_counts_by_its_own_confidence_and_as_published_by_the_others():
    chosen, rejected = torch.tensor([[-10.0], [-11.0]]).double(), torch.tensor([[-10.1], [-18.0]]).double()
    toward = {
        weights: mixture(chosen, rejected, eta=0.9, weights=weights)[0].item()
        for weights in ("corrected", "as_published")
    }
    assert toward["corrected"] < toward["as_published"] < -10  # the second reference, at -11, is the confident one


def test_references_without_any_confidence_leave_the_first_one():
    same = torch.tensor([[-5.0], [-6.0]]).double()
    assert mixture(same, same, eta=0.5, weights="corrected")[0].item() == pytest.approx(-5)


logps = st.floats(-500, 0, width=32)


@given(st.lists(st.tuples(logps, logps), min_size=2, max_size=5), st.sampled_from(["corrected", "as_published"]))
def test_shares_are_never_below_0_in_float32(references, weights):
    chosen_RB, rejected_RB = (torch.tensor(column)[:, None] for column in zip(*references, strict=True))
    shares = _shares(chosen_RB, rejected_RB, weights)
    assert shares.min() >= 0 and shares.sum().item() == pytest.approx(1, abs=1e-6)
    assert all(torch.isfinite(logp) for logp in mixture(chosen_RB, rejected_RB, eta=0.1, weights=weights))


def test_references_far_apart_stay_finite_in_float32():
    chosen, rejected = torch.tensor([[-1e4], [-1.0], [0.0]]), torch.tensor([[0.0], [-1e4], [0.0]])
    for weights in ("corrected", "as_published"):
        found = torch.stack(mixture(chosen, rejected, eta=0.1, weights=weights))
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
    none = torch.zeros(2, 1)
    assert torch.isfinite(torch.stack(mixture(none, none, eta=0.1, weights="corrected"))).all()

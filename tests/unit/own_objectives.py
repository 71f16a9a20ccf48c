"""Objectives that ask the trainer for everything it can give, by import path: ``own_objectives:VALUED``."""

from __future__ import annotations

import random

import numpy
import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from stages.settings import Settings
from stages.update.objectives.base import Groups, Objective, Pairs, Term, term


class NoParams(Settings):
    """None."""


class ValuedParams(Settings):
    """Of `valued`."""

    beta: float = 0.1
    gamma: float = 0.5
    warmup_steps: int = 2
    value_learning_rate: float = Field(1e-2, gt=0)


def token_mean(batch: Pairs, _: NoParams) -> list[Term]:
    """The negative log-likelihood of a chosen token."""
    return [term(-batch.chosen_B, normaliser="tokens")]


def average_margin(batch: Pairs, _: NoParams) -> list[Term]:
    """Between mean log-probs a token, without a reference."""
    margin_B = batch.chosen_B / batch.chosen_len_B - batch.rejected_B / batch.rejected_len_B
    return [term(-logsigmoid(2 * margin_B), logit_B=2 * margin_B)]


def streamed(batch: Pairs, _: NoParams) -> list[Term]:
    """The same, and the likelihood of answers drawn from the reference."""
    assert batch.stream_logp_B is not None and batch.stream_len_B is not None
    nll_B = -batch.stream_logp_B / batch.stream_len_B.clamp(min=1)
    return [*average_margin(batch, NoParams()), term(0.3 * nll_B)]


def valued(batch: Pairs, params: ValuedParams) -> list[Term]:
    """DPO, answers weighted by how much better than expected their auxiliary rewards are, and what is expected."""
    assert batch.aux_chosen_B is not None and batch.aux_rejected_B is not None and batch.value_B is not None
    r_w, r_l = batch.log_ratios()
    logit_B = params.beta * (r_w - r_l)
    terms = [term(-logsigmoid(logit_B), logit_B=logit_B)]
    both = (
        (batch.aux_chosen_B, batch.chosen_B, batch.chosen_len_B),
        (batch.aux_rejected_B, batch.rejected_B, batch.rejected_len_B),
    )
    for reward_B, logp_B, len_B in both:
        surprise_B = reward_B - batch.value_B
        terms.append(term(-0.5 * params.gamma * surprise_B.detach().exp() * logp_B / len_B))
        terms.append(term(torch.where(surprise_B < 0, 0.3, 0.7) * surprise_B.square()))
    return terms


def against_all(batch: Pairs, _: NoParams) -> list[Term]:
    """DPO against the mean log-prob of all references."""
    logit_B = 0.1 * (batch.chosen_B - batch.ref_chosen_RB.mean(0) - batch.rejected_B + batch.ref_rejected_RB.mean(0))
    return [term(-logsigmoid(logit_B), logit_B=logit_B)]


def listwise(batch: Groups, _: NoParams) -> list[Term]:
    """Cross-entropy of the policy's shares of a group with those that the rewards ask for."""
    r_GK = batch.logp_GK - batch.ref_logp_RGK.sum(0)
    none = torch.tensor(-torch.inf)
    wanted_GK = torch.where(batch.mask_GK, batch.rewards_GK, none).softmax(-1)
    logits_GK = torch.where(batch.mask_GK, r_GK, none).log_softmax(-1)
    return [term(-torch.where(batch.mask_GK, wanted_GK * logits_GK, 0.0).sum(-1))]


def noisy(batch: Pairs, _: NoParams) -> list[Term]:
    """DPO under a beta that is drawn anew for every forward, by each of the generators that there are."""
    beta = 0.1 + random.random() + random.gauss() + numpy.random.rand() + numpy.random.randn() + torch.randn(())
    r_w, r_l = batch.log_ratios()
    return [term(-logsigmoid(beta * (r_w - r_l)), logit_B=beta * (r_w - r_l))]


def _after_warmup(params: ValuedParams, step: int) -> ValuedParams:
    return params.model_copy(update={"gamma": 0.0}) if step < params.warmup_steps else params


TOKEN_MEAN = Objective("token_mean", token_mean, NoParams, references=(0, None))
AVERAGE_MARGIN = Objective("average_margin", average_margin, NoParams, references=(0, 0))
STREAMED = Objective("streamed", streamed, NoParams, references=(0, 0), needs=frozenset({"stream"}))
VALUED = Objective("valued", valued, ValuedParams, needs=frozenset({"auxiliary", "value"}), params_at=_after_warmup)
AGAINST_ALL = Objective("against_all", against_all, NoParams, references=(2, None))
NOISY = Objective("noisy", noisy, NoParams)
LISTWISE = Objective("listwise", listwise, NoParams, rows="groups", references=(0, 1))

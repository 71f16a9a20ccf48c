"""Supervised fine-tuning on the chosen answers; most of use beside another objective."""

from __future__ import annotations

from stages.settings import Settings
from stages.update.objectives.base import Objective, Pairs, Term, term


class SFTParams(Settings):
    """It has none."""


def sft(batch: Pairs, params: SFTParams) -> list[Term]:
    """The chosen answers' negative log-likelihood, shape [B], in nats  (TRL's ``sft``).

    -log policy(y_w); a mean over the tokens of all chosen answers of the global batch, not over its pairs
    """
    return [term(-batch.chosen_B, normaliser="tokens")]


OBJECTIVE = Objective("sft", sft, SFTParams, references=(0, 0))

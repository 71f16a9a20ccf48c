"""What follows from a config alone: which table a round makes of its answers, how an evaluation samples."""

from __future__ import annotations

from pipeline.config import Config
from stages.contracts import GROUPS, PAIRS, Contract
from stages.sample.config import SampleConfig


def made_by(config: Config) -> Contract:
    """What pairing makes: `PAIRS`, or with that strategy `GROUPS`; ready pairs are pairs."""
    return GROUPS if config.pairs is None and config.pair.strategy == "groups" else PAIRS


def one_answer(config: SampleConfig) -> SampleConfig:
    """How evaluations sample: one answer a prompt from the policy itself, at temperature 1 and without truncation."""
    plain = {"num_generations": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return config.model_copy(update=plain)

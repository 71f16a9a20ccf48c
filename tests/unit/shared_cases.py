"""Micro-batches and their gradients by every way that answers go through a model, in plain torch without ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from stages.update import attention
from stages.update.config import UpdateConfig
from stages.update.forward import Forward
from stages.update.rows import AnswerRow, GroupRow, PairRow, Row, answers_of
from stages.update.scorer import Scorer
from stages.update.scoring import Scored, Scoring
from stages.update.value_head import ValueHead

CPU = torch.device("cpu")
WAYS = ("apart", "shared", "skipping")


@contextmanager
def attending(how: Literal["by segments", "under a mask"]) -> Iterator[None]:
    """Attention one way only, whichever is faster."""
    before, attention.CALL_S = attention.CALL_S, 0.0 if how == "by segments" else 1e3
    try:
        yield
    finally:
        attention.CALL_S = before


class TorchEngine:
    """A scorer whose backward is plain torch's."""

    def __init__(self, model: Any) -> None:
        self.module = Scorer(model.train())

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self.module(*args, **inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def gradient(self) -> torch.Tensor:
        """Of all parameters, in one dimension; it is taken away."""
        parameters = list(self.module.parameters())
        found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self.module.zero_grad()
        return found


def small_llama(*, tied: bool = False, vocab_size: int = 32) -> Any:
    """Two layers, two heads that share their keys, every parameter random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=vocab_size,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            max_position_embeddings=2048,
            initializer_range=0.2,
            **shape,
        )
        return LlamaForCausalLM(config)


def pairs_of(
    lengths: list[tuple[int, int, int]], *, prompts: list[int], seed: int = 0, equal: int = 0
) -> list[PairRow]:
    """Pairs of random tokens with everything that an objective may need.

    Args:
        lengths: of each pair the place of its prompt, and the tokens of its chosen and its rejected answer.
        prompts: tokens of each prompt.
        equal: so many of the first pairs have the chosen answer as the rejected one.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(32) for _ in range(count)]

    asked, rows = [tokens(count) for count in prompts], []
    for i, (place, num_chosen, num_rejected) in enumerate(lengths):
        chosen = tokens(num_chosen)
        rejected = chosen if i < equal else tokens(num_rejected)
        stream = AnswerRow(f"s{i}", asked[place], tokens(num_rejected))
        scores = {"score_chosen": 1.0, "score_rejected": 0.0, "aux_chosen": 0.5, "aux_rejected": -0.2}
        rows.append(PairRow(f"{i}", f"c{i}", f"r{i}", asked[place], chosen, rejected, stream=stream, **scores))
    return rows


def groups_of(rows: list[PairRow]) -> list[GroupRow]:
    """The answers of every two pairs in a row as a group, to the first one's prompt."""
    groups = []
    for one, other in zip(rows[::2], rows[1::2], strict=False):
        answers = [one.chosen_token_ids, one.rejected_token_ids, other.chosen_token_ids]
        ids = [f"{one.pair_id}-{k}" for k in range(3)]
        groups.append(GroupRow(one.pair_id, "", ids, one.prompt_token_ids, answers, [1.0, 0.0, 2.0]))
    return groups


def moved_references(engine: TorchEngine, rows: list[Row], *, count: int, seed: int = 0) -> list[dict[str, float]]:
    """Log-probs at least 0.5 nats above or below the model's, so that no log-ratio is near a gate's kink."""
    rng, answers = random.Random(seed), answers_of(rows)
    with torch.no_grad():
        logps = Scoring(engine, CPU, shares=False)(answers).logps_N.tolist()
    return [
        {
            answer.response_id: logp + rng.choice([-1, 1]) * rng.uniform(0.5, 3)
            for answer, logp in zip(answers, logps, strict=True)
        }
        for _ in range(count)
    ]


def gradient_by(
    way: str, engine: TorchEngine, rows: list[Row], config: UpdateConfig, references: list[dict[str, float]]
) -> tuple[torch.Tensor, Scored]:
    """The gradient of the mean loss over some rows, and what was scored for it."""
    losses = config.losses(gate_floor=1e-3)
    head = ValueHead(32, learning_rate=1e-4, device=CPU) if "value" in config.needs else None
    scoring = Scoring(engine, CPU, shares=way != "apart", wants_states=head is not None)
    forward = Forward(scoring, CPU, references, needs=config.needs, value_head=head)
    scored = forward.scored(rows, skips=way == "skipping")
    tensors = forward.tensors(rows, scored, own_reference=None)
    terms = [term for loss in losses for term in loss.at(200)(tensors)]
    sum((term.loss_B * term.weight_B).sum() / len(rows) for term in terms).backward()
    scored.backward()
    return engine.gradient(), scored

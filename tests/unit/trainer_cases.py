"""Updates that several tests make, on one rank or more, and rows to make them with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from plain_update import PlainUpdate, plain_logps

from stages.protocols import Weights
from stages.update.config import UpdateConfig
from stages.update.rows import AnswerRow, GroupRow, PairRow, answers_of

SEED = 5
BASE = {"learning_rate": 1e-4, "global_batch_size": 4, "micro_batch_size": 2, "max_grad_norm": 0.5}


@dataclass(frozen=True)
class Case:
    """An update: how many plain pairs, or which rows; the references, the start ("own") and another; options."""

    rows: int | str
    options: Mapping[str, Any] = field(default_factory=dict)
    references: Sequence[str] = ("own",)

    @property
    def config(self) -> UpdateConfig:
        return UpdateConfig(**BASE | dict(self.options))

    @property
    def own(self) -> int | None:
        return list(self.references).index("own") if "own" in self.references else None


VALUED = {"loss_type": "own_objectives:VALUED", "num_train_epochs": 2}
LISTWISE = {"loss_type": "own_objectives:LISTWISE"}
TWO_MEANS = {"loss_type": ["dpo", "own_objectives:TOKEN_MEAN"], "loss_weights": [2.0, 0.5]}
OBJECTIVES = {
    "value head, no ZeRO": Case("pairs", VALUED | {"zero_stage": 0}),
    "value head, ZeRO 1": Case("pairs", VALUED | {"zero_stage": 1}),
    "value head, ZeRO 2": Case("pairs", VALUED | {"zero_stage": 2}),
    "value head, ZeRO 3": Case("pairs", VALUED | {"zero_stage": 3, "gradient_checkpointing": True}),
    "a mean over tokens beside one over pairs": Case("pairs", TWO_MEANS),
    "no reference": Case("pairs", {"loss_type": "own_objectives:AVERAGE_MARGIN"}, ()),
    "a stream": Case("pairs", {"loss_type": "own_objectives:STREAMED", "zero_stage": 3}, ()),
    "two references": Case("pairs", {"loss_type": "own_objectives:AGAINST_ALL"}, ("other", "own")),
    "groups, one a forward": Case("groups", LISTWISE),
    "groups, several a forward": Case("groups", LISTWISE | {"micro_batch_size": 5, "zero_stage": 3}),
    "groups without a reference": Case("groups", LISTWISE, ()),
}
QUICK = ["value head, ZeRO 3", "a mean over tokens beside one over pairs", "a stream", "groups, several a forward"]


def some_rows(count: int) -> list[PairRow]:
    """Pairs of unequal lengths."""
    rng = random.Random(1)

    def digits(most):
        return [rng.randint(4, 13) for _ in range(rng.randint(1, most))]

    return [
        PairRow(f"{i:02d}", f"c{i}", f"r{i}", [1, *digits(5), 14], [*digits(6), 2], [*digits(6), 2])
        for i in range(count)
    ]


def rows_of(kind: int | str) -> list:
    """So many plain pairs; 11 with auxiliary rewards, some of them with scores and streams; or groups of 2 to 6."""
    if isinstance(kind, int):
        return some_rows(kind)
    rng, pairs = random.Random(2), some_rows(11)
    if kind == "groups":
        return [_group(pairs, number, rng) for number in range(7)]
    return [_with_all(row, number, pairs[number - 1].chosen_token_ids, rng) for number, row in enumerate(pairs)]


def _with_all(row: PairRow, number: int, drawn: list[int], rng: random.Random) -> PairRow:
    return replace(
        row,
        score_chosen=rng.gauss(1, 1) if number % 4 else None,
        score_rejected=rng.gauss(0, 1) if number % 4 else None,
        aux_chosen=rng.gauss(0, 1),
        aux_rejected=rng.gauss(0, 1),
        stream=AnswerRow(f"s{number}", row.prompt_token_ids, drawn) if number % 3 else None,
    )


def _group(pairs: list[PairRow], number: int, rng: random.Random) -> GroupRow:
    size = 2 + number % 5
    answers = [rng.choice(pairs).chosen_token_ids for _ in range(size)]
    ids = [f"g{number}-{k}" for k in range(size)]
    rewards = [float(rng.randint(0, 3)) for _ in range(size - 1)]
    return GroupRow(f"{number}", "", ids, pairs[number].prompt_token_ids, answers, [*rewards, max(rewards) + 1])


def updated(folder: Path, case: Case, other: dict[str, float] | None = None, out: Path | None = None) -> dict[str, Any]:
    """One rank's view of an update: metrics by step, and the weights and the value head after it.

    Args:
        other: the log-probs of the reference that is not the start.
    """
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    trainer = Trainer(case.config, dtype="float32", pad_token=None, num_threads=1)
    trainer.load(Weights.found(folder, round=0))
    rows, steps = rows_of(case.rows), []
    own = trainer.logps(answers_of(rows))
    references = [own if name == "own" else other for name in case.references]
    trainer.update(rows, references, own_reference=case.own, seed=SEED, on_step=steps.append)
    head, state = trainer._value_head, dict(deepspeed_engine.float32_state(trainer._engine))
    if out is not None:
        trainer.save(out, round=1)
    tensors = {} if head is None else {name: tensor.detach() for name, tensor in head._tensors.items()}
    return {"steps": steps, "state": state, "head": tensors, "references": own}


def all_updated(folder: Path, cases: dict[str, Case], other: dict[str, float] | None) -> dict[str, dict[str, Any]]:
    return {name: updated(folder, case, other) for name, case in cases.items()}


def plain(folder: Path, case: Case, other: dict[str, float] | None) -> tuple[PlainUpdate, list[dict]]:
    """The same update in plain torch, and what it did in each step."""
    rows = rows_of(case.rows)
    own = plain_logps(folder, answers_of(rows))
    references = [own if name == "own" else other for name in case.references]
    update = PlainUpdate(folder, case.config, rows, references, own=case.own, seed=SEED)
    return update, update.run()


def difference(a: dict, b: dict, start: dict) -> float:
    """The distance of two updates over the length of one."""
    gap = torch.cat([(a[name] - b[name]).flatten() for name in start]).norm()
    return float(gap / torch.cat([(b[name] - start[name]).flatten() for name in start]).norm())

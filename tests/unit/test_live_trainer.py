"""A trainer that lives through rounds: it goes on from what it holds as a new one does from what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import on_ranks
from trainer_cases import SEED, some_rows

from stages.protocols import Weights
from stages.update.config import UpdateConfig
from stages.update.model import read_weights
from stages.update.rows import answers_of

OPTIONS = {"learning_rate": 1e-3, "global_batch_size": 4, "micro_batch_size": 2, "max_grad_norm": 0.5}
KINDS = [(dtype, stage) for dtype in ("float32", "bfloat16") for stage in range(4)]
QUICK = [("float32", 2)]


def a_round(trainer, start: Weights, out: Path, number: int) -> Weights:
    trainer.load(start)
    rows = some_rows(6)
    trainer.update(rows, [trainer.logps(answers_of(rows))], own_reference=0, seed=SEED)
    return trainer.save(out / f"round-{number}", round=number)


def two_rounds(folder: Path, out: Path, dtype: str, stage: int):
    """Two rounds by one trainer, and the second one again by another that begins from what the first round saved."""
    from stages.update.worker import Trainer

    def new():
        return Trainer(UpdateConfig(**OPTIONS | {"zero_stage": stage}), dtype=dtype, pad_token=None, num_threads=1)

    start = Weights.found(folder, round=0)
    living = new()
    first = a_round(living, start, out / "living", 1)
    engine = living._engine
    second = a_round(living, first, out / "living", 2)
    assert living._engine is engine, "nothing was loaded between the rounds"
    again = a_round(new(), first, out / "again", 2)
    rested = a_round(living_rests := new(), start, out / "rested", 1)
    living_rests.rest()
    after_rest = a_round(living_rests, rested, out / "rested", 2)
    # Weights that a step has moved are no longer those of the start: they are read again.
    back = a_round(living, start, out / "back", 1)
    return first, second, again, back, after_rest


def of_kinds(folder: Path, out: Path, kinds: list[tuple[str, int]]):
    return [two_rounds(folder, out / f"{dtype}-{stage}", dtype, stage) for dtype, stage in kinds]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "kinds"), [(1, QUICK), (2, KINDS)])
def test_a_live_trainer_goes_on_as_one_that_begins_from_the_saved_weights(policy_folder, tmp_path, world, kinds):
    for rank in on_ranks(world, of_kinds, policy_folder, tmp_path, kinds):
        for (dtype, _), (first, second, again, back, after_rest) in zip(kinds, rank, strict=True):
            assert len({first.identity, second.identity}) == 2
            assert second.identity == again.identity == after_rest.identity
            assert back.identity == first.identity
            assert (first.master is None) == (dtype == "float32")
    assert read_weights(tmp_path / "float32-2" / "living" / "round-2" / "policy")

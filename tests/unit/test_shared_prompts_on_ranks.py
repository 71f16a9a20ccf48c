"""Sharing prompts and skipping backwards on ranks, under every ZeRO stage: the steps are plain torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plain_update import PlainUpdate, plain_logps
from ranks import on_ranks
from shared_cases import small_llama
from trainer_cases import BASE, SEED, difference

from stages.protocols import Weights
from stages.update.batching import deal
from stages.update.config import UpdateConfig
from stages.update.model import read_weights
from stages.update.rows import PairRow, answers_of

pytestmark = pytest.mark.slow

OPTIONS = BASE | {"micro_batch_size": 1, "global_batch_size": 2, "num_train_epochs": 3, "learning_rate": 1e-4}


def unlike_rows() -> list[PairRow]:
    """Two pairs; the second one's rejected answer is the longer one."""
    return [
        PairRow("0", "c0", "r0", [1, 5, 6, 14], [4, 5, 6, 7, 8, 9, 4, 4, 2], [4, 6, 5, 2]),
        PairRow("1", "c1", "r1", [1, 7, 14], [9, 2], [9, 9, 4, 5, 6, 7, 8, 9, 5, 2]),
    ]


def reference_of(folder: Path, rows: list[PairRow], *, active: set[int]) -> dict[str, float]:
    """The model's own log-probs moved, so that the rejected answers of some rows alone are above their reference."""
    found = plain_logps(folder, answers_of(rows))
    for i, row in enumerate(rows):
        found[row.rejected_id] += -2.0 if i in active else 2.0
    return found


def trained(folder: Path, reference: dict[str, float], all_options: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of some options: the weights after an update, its steps, and whether prompts were shared."""
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    found = []
    for options in all_options:
        trainer, steps = Trainer(UpdateConfig(**OPTIONS | options), dtype="float32", pad_token=None, num_threads=1), []
        trainer.load(Weights.found(folder, round=0))
        own = trainer.logps(answers_of(unlike_rows()))
        trainer.update(unlike_rows(), [reference], own_reference=None, seed=SEED, on_step=steps.append)
        parameters = trainer._engine.module.parameters()
        shared_out = any(getattr(p, "ds_tensor", p).numel() < getattr(p, "ds_numel", 0) for p in parameters)
        state = dict(deepspeed_engine.float32_state(trainer._engine))
        found.append({"state": state, "steps": steps, "own": own, "shared out": shared_out})
    return found


def check_plain_torchs(folder: Path, reference: dict[str, float], ranks: list[list[dict[str, Any]]]) -> None:
    plain = PlainUpdate(folder, UpdateConfig(**OPTIONS), unlike_rows(), [reference], own=None, seed=SEED)
    steps = plain.run()
    for rank in ranks:
        for found in rank:
            assert difference(found["state"], plain.weights, read_weights(folder)) < 2e-3
    for found in ranks[0]:
        for metric in ("loss", "grad_norm"):
            assert [s[metric] for s in found["steps"]] == pytest.approx([s[metric] for s in steps], rel=1e-4), metric


STAGES = [{"zero_stage": stage} for stage in range(4)]


def test_all_active_on_one_rank_and_none_on_the_other_does_not_hang(policy_folder):
    from stages.update.loads import row_load

    rows = unlike_rows()
    dealt = deal([row_load(r, shares=True, pushed_share=0.3) for r in rows], world_size=2, max_rows=1, max_tokens=4096)
    assert sorted(map(len, dealt)) == [1, 1], "each rank has one of the rows"
    reference = reference_of(policy_folder, rows, active={0})
    ranks = on_ranks(2, trained, policy_folder, reference, STAGES)
    for found in ranks[0]:
        assert [step["skips"] for step in found["steps"]] == [0, 1, 1]
        assert [step["rejected_pushed"] for step in found["steps"]] == pytest.approx([4 / 14] * 3)
    check_plain_torchs(policy_folder, reference, ranks)


def test_skipping_changes_nothing_and_so_does_no_number_of_ranks(policy_folder):
    reference = reference_of(policy_folder, unlike_rows(), active=set())
    cases = [*STAGES, {"skip_inactive": False}, {"gradient_checkpointing": True}, {"max_tokens_per_batch": 1}]
    cases += [{"micro_batch_size": 8}]
    for world_size in (1, 2):
        ranks = on_ranks(world_size, trained, policy_folder, reference, cases)
        check_plain_torchs(policy_folder, reference, ranks)
        skips = [[step["skips"] for step in found["steps"]] for found in ranks[0]]
        assert skips == [[0, 1, 1]] * 4 + [[0, 0, 0]] * 2 + [[0, 1, 1]] * 2


def test_tied_and_untied_heads_work_where_weights_are_shared_out(tmp_path):
    reference = {"c0": -20.0, "r0": -40.0, "c1": -10.0, "r1": -10.0}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        # DeepSpeed shares out nothing below 100,000 numbers.
        small_llama(tied=tied, vocab_size=4000).save_pretrained(folder)
        ranks = on_ranks(2, trained, folder, reference, [{"zero_stage": 3}])
        assert ranks[0][0]["shared out"]
        check_plain_torchs(folder, reference, ranks)
        for rank in ranks:
            assert rank[0]["own"] == pytest.approx(plain_logps(folder, answers_of(unlike_rows())), abs=1e-4)

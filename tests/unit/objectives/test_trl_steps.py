"""Optimizer steps of a tiny model by TRL's `DPOTrainer` and by ours, under the same settings: the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import on_ranks
from trl_peer import policy_and_reference, trl_trainer

from stages.protocols import Weights
from stages.update.config import UpdateConfig
from stages.update.model import read_weights
from stages.update.rows import PairRow, answers_of

pytestmark = pytest.mark.slow

LEARNING_RATE, MAX_NORM = 1e-4, 0.5

# our settings, TRL's, and the number of steps, each on the whole dataset
CASES = [
    ({"loss_type": "dpo"}, {"loss_type": ["sigmoid"]}, 1),
    ({"loss_type": "dpo", "beta": 0.5}, {"loss_type": ["sigmoid"], "beta": 0.5}, 3),
    (
        {"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        1,
    ),
]


def steps_of_trl(folder: Path, out: Path, settings: dict, num_steps: int):
    """Weights and gradient norms, and the rows that it made of the texts."""
    trainer = trl_trainer(
        policy_and_reference(folder),
        folder,
        out,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_NORM,
        weight_decay=0.0,
        optim="adamw_torch",
        per_device_train_batch_size=5,
        max_steps=num_steps,
        logging_steps=1,
        save_strategy="no",
        **settings,
    )
    trainer.train()
    rows = [
        PairRow(f"{i}", f"c{i}", f"r{i}", row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        for i, row in enumerate(trainer.train_dataset)
    ]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {name: p.detach() for name, p in trainer.model.named_parameters()}, norms, rows


def steps_of_ours(folder: Path, reference: Path, rows: list[PairRow], cases: list[tuple[dict, int]]):
    """Weights and gradient norms of every case."""
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    found = []
    for settings, num_steps in cases:
        config = UpdateConfig(
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            max_grad_norm=MAX_NORM,
            global_batch_size=len(rows),
            micro_batch_size=2,
            num_train_epochs=num_steps,
            **settings,
        )
        trainer, steps = Trainer(config, dtype="float32", pad_token=None, num_threads=1), []
        trainer.load(Weights.found(reference, round=0))
        theirs = trainer.logps(answers_of(rows))
        trainer.load(Weights.found(folder, round=1))
        trainer.update(rows, [theirs], own_reference=None, seed=1, on_step=steps.append)
        found.append((dict(deepspeed_engine.float32_state(trainer._engine)), [step["grad_norm"] for step in steps]))
    return found


def test_steps_are_trls(policy_folder, tmp_path):
    peers = [steps_of_trl(policy_folder, tmp_path / "trl", theirs, steps) for _, theirs, steps in CASES]
    policy_and_reference(policy_folder)[1].save_pretrained(tmp_path / "reference")
    cases = [(ours, steps) for ours, _, steps in CASES]
    (results,) = on_ranks(1, steps_of_ours, policy_folder, tmp_path / "reference", peers[0][2], cases)
    start = read_weights(policy_folder)
    for (weights, norms), (expected, expected_norms, _) in zip(results, peers, strict=True):
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert min(norms) > MAX_NORM, "clipping is part of the law"
        for name, tensor in expected.items():
            assert (weights[name] - tensor).abs().max() < 1e-5, name
            assert (tensor - start[name]).abs().max() > 0.9 * LEARNING_RATE

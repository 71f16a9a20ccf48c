"""The trainer against plain torch: the same loss, the same steps, on one rank and on two, under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from trainer_cases import BASE, OBJECTIVES, QUICK, SEED, Case, all_updated, difference, plain, some_rows, updated
from trainer_laws import check_metrics, check_steps

from stages.errors import StageError
from stages.protocols import Weights
from stages.update.batching import token_batch
from stages.update.config import UpdateConfig
from stages.update.guard import SkippedStep
from stages.update.logps import answer_logps
from stages.update.metrics import UpdateSummary
from stages.update.model import load_policy, read_weights
from stages.update.objectives.base import Pairs
from stages.update.objectives.minor_dpo import MinorDPOParams, minor_dpo
from stages.update.rows import answers_of

# 11 pairs in batches of 4: the last batch of 3 is divided by neither ranks nor micro-batches.
CASES = {
    **{f"ZeRO {stage}": Case(11, {"zero_stage": stage}) for stage in range(4)},
    "dpo, two epochs": Case(11, {"loss_type": "dpo", "num_train_epochs": 2}),
    "one pair": Case(1, {"micro_batch_size": 1}),
}
ALL = CASES | {name: OBJECTIVES[name] for name in QUICK}


@pytest.fixture(scope="module")
def results(policy_folder):
    return {world: on_ranks(world, all_updated, policy_folder, ALL, None) for world in (1, 2)}


@pytest.fixture(scope="module")
def in_plain_torch(policy_folder):
    return {name: plain(policy_folder, case, None) for name, case in ALL.items()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("world", [1, 2])
def test_every_layout_takes_plain_torchs_steps(results, in_plain_torch, policy_folder, world, name):
    check_steps(results[world], *in_plain_torch[name], name, start=read_weights(policy_folder))
    if name in CASES:
        norms = [step["grad_norm"] for step in results[world][0][name]["steps"]]
        assert min(norms) > UpdateConfig(**BASE).max_grad_norm, "clipping is part of the law"


@pytest.mark.parametrize("world", [1, 2])
def test_the_first_loss_is_ln_2_to_the_last_bit_and_later_ones_are_not(results, world):
    ln2 = float(torch.tensor(2.0).log())
    for name in CASES:
        first, *later = results[world][0][name]["steps"]
        assert first["loss"] == ln2
        assert all(step["loss"] != ln2 for step in later)


def test_metrics_are_those_of_the_global_batch_and_carry_trls_names(results, in_plain_torch):
    for name in ALL:
        for step in results[1][0][name]["steps"]:
            assert step.keys() >= {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins"}
            assert step.keys() >= {"rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate"}
        for ranks in results.values():
            check_metrics(ranks[0][name]["steps"], in_plain_torch[name][1])


def test_all_pairs_are_trained_on_and_only_rank_0_tells(results):
    for ranks in results.values():
        assert [step["num_pairs"] for step in ranks[0]["ZeRO 0"]["steps"]] == [4, 4, 3]
        assert all(not case["steps"] for rank in ranks[1:] for case in rank.values())


def test_reference_log_probs_are_the_models_and_complete_on_every_rank(results, policy_folder):
    model, rows = load_policy(policy_folder, dtype="float32"), answers_of(some_rows(11))
    with torch.no_grad():
        alone = {
            row.response_id: answer_logps(
                model, token_batch([row.prompt_token_ids], [row.token_ids]), torch.device("cpu")
            ).item()
            for row in rows
        }
    for ranks in results.values():
        for rank in ranks:
            assert rank["ZeRO 0"]["references"] == pytest.approx(alone, abs=1e-4)


def saved_and_loaded(folder: Path, out: Path, dtype: str, zero_stage: int):
    """A policy's weights after an update, as saved, and as a fresh load of what was saved holds them."""
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    trainer = Trainer(UpdateConfig(**BASE | {"zero_stage": zero_stage}), dtype=dtype, pad_token=None, num_threads=1)
    trainer.load(Weights.found(folder, round=0))
    rows = some_rows(6)
    summary = trainer.update(rows, [trainer.logps(answers_of(rows))], own_reference=0, seed=SEED)
    trained = dict(deepspeed_engine.float32_state(trainer._engine))
    trainer.save(out, round=1)
    master = out / "master"
    trainer.load(Weights.found(out / "policy", round=1, master=master if master.exists() else None))
    return trained, dict(deepspeed_engine.float32_state(trainer._engine)), summary


def all_saved_and_loaded(folder: Path, out: Path, kinds: list[tuple[str, int]]):
    return [saved_and_loaded(folder, out / f"{dtype}-{stage}", dtype, stage) for dtype, stage in kinds]


@pytest.mark.slow
def test_a_round_goes_on_from_float32_whatever_the_policys_dtype(policy_folder, tmp_path):
    kinds = [("float32", 0), ("float32", 2), *(("bfloat16", stage) for stage in range(4))]
    for rank in on_ranks(2, all_saved_and_loaded, policy_folder, tmp_path, kinds):
        for (dtype, _), (trained, loaded, summary) in zip(kinds, rank, strict=True):
            assert all(torch.equal(trained[name], loaded[name]) for name in trained)
            assert summary.first["loss"] == float(torch.tensor(2.0).log())
            assert summary.gate_floor >= 1e-3
            if dtype == "bfloat16":
                assert any(not torch.equal(t, t.bfloat16().float()) for t in trained.values())
    for dtype, stage in kinds:
        folder = tmp_path / f"{dtype}-{stage}"
        assert {str(t.dtype) for t in read_weights(folder / "policy").values()} == {f"torch.{dtype}"}
        assert (folder / "master").exists() == (dtype == "bfloat16")


def test_what_is_published_is_a_hugging_face_folder_with_its_tokenizer(policy_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (result,) = on_ranks(1, updated, policy_folder, Case(5), None, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert all(torch.equal(p, result["state"][name]) for name, p in model.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")("48315>").input_ids == [1, 8, 12, 7, 5, 9, 14]
    assert model.generation_config.eos_token_id == 2
    assert not list((tmp_path / "policy").glob("*.bin"))


def after_updates(folder: Path, cases: list[dict], dtype: str):
    """Float32 weights after an update under each of some options, from the same start."""
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    states, rows = [], some_rows(8)
    for options in cases:
        config = UpdateConfig(**BASE | {"global_batch_size": 8, "learning_rate": 1e-3} | options)
        trainer = Trainer(config, dtype=dtype, pad_token=None, num_threads=1)
        trainer.load(Weights.found(folder, round=0))
        references = [trainer.logps(answers_of(rows))]
        trainer.update(rows, references, own_reference=0, seed=SEED)
        states.append(dict(deepspeed_engine.float32_state(trainer._engine)))
    return states


@pytest.mark.slow
def test_in_bfloat16_too_gradients_add_up_in_float32(policy_folder):
    """Over stages and ranks all is equal where every forward holds one pair; with more, forwards round differently."""
    alone = [{"micro_batch_size": 1, "zero_stage": stage} for stage in range(4)]
    together = [{"micro_batch_size": 8, "zero_stage": stage} for stage in range(4)]
    (one,) = on_ranks(1, after_updates, policy_folder, alone + together, "bfloat16")
    two = on_ranks(2, after_updates, policy_folder, alone, "bfloat16")[1]
    start = read_weights(policy_folder)
    for state in one[1:4] + two:
        assert difference(state, one[0], start) < 1e-5
    for state in one[4:]:
        assert difference(state, one[0], start) < 0.15


def against_another_reference(folder: Path, reference: Path):
    """The first step's metrics where the policy does not start from its reference, and both models' log-probs."""
    from stages.update.worker import Trainer

    trainer = Trainer(UpdateConfig(**BASE | {"global_batch_size": 6}), dtype="float32", pad_token=None, num_threads=1)
    rows, steps = some_rows(6), []
    trainer.load(Weights.found(reference, round=0))
    theirs = trainer.logps(answers_of(rows))
    trainer.load(Weights.found(folder, round=1))
    ours = trainer.logps(answers_of(rows))
    trainer.update(rows, [theirs], own_reference=None, seed=SEED, on_step=steps.append)
    return steps[0], ours, theirs


@pytest.mark.slow
def test_a_reference_that_is_not_the_start_is_the_one_that_was_scored(policy_folder, tmp_path):
    model = load_policy(policy_folder, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path)
    ((first, ours, theirs),) = on_ranks(1, against_another_reference, tmp_path, policy_folder)
    r_w = torch.tensor([ours[row.chosen_id] - theirs[row.chosen_id] for row in some_rows(6)])
    r_l = torch.tensor([ours[row.rejected_id] - theirs[row.rejected_id] for row in some_rows(6)])
    zero = torch.zeros(1, 6)
    pairs = Pairs(r_w, r_l, zero, zero, torch.ones(6), torch.ones(6))
    expected = minor_dpo(pairs, MinorDPOParams(beta=0.1, gate_floor=1e-3))[0].loss_B.mean().item()
    assert first["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(first["loss"] - 0.6931) > 1e-3


def diverging(folder: Path, epochs: int, rate: float) -> tuple[UpdateSummary, list[SkippedStep]]:
    from stages.update.worker import Trainer

    options = {"learning_rate": rate, "num_train_epochs": epochs, "warmup_ratio": 0.0, "global_batch_size": 6}
    trainer = Trainer(UpdateConfig(**BASE | options), dtype="float32", pad_token=None, num_threads=1)
    trainer.load(Weights.found(folder, round=0))
    rows, skipped = some_rows(6), []
    references = [trainer.logps(answers_of(rows))]
    return trainer.update(rows, references, own_reference=0, seed=SEED, on_skip=skipped.append), skipped


def test_an_update_that_diverges_is_ended_and_names_the_rows_of_the_steps_it_skipped(policy_folder):
    ((summary, skipped),) = on_ranks(1, diverging, policy_folder, 8, 1e30)
    assert "5 steps in a row were skipped" in summary.ended and summary.num_skipped == 5
    assert [step.step for step in skipped] == [2, 3, 4, 5, 6]
    assert all(sorted(step.ids) == [row.pair_id for row in some_rows(6)] for step in skipped)


@pytest.mark.slow
def test_a_policy_that_its_last_step_broke_is_seen_too(policy_folder):
    ((summary, skipped),) = on_ranks(1, diverging, policy_folder, 1, 1e39)
    assert "after the last step" in summary.ended and not skipped


def changed_under_the_trainer(folder: Path) -> str:
    from stages.update.worker import Trainer

    trainer = Trainer(UpdateConfig(**BASE), dtype="float32", pad_token=None, num_threads=1)
    try:
        trainer.load(Weights(folder, "0" * 64, 0))
    except StageError as error:
        return str(error)
    return "no error"


def test_weights_that_are_not_the_published_ones_are_refused(policy_folder):
    (says,) = on_ranks(1, changed_under_the_trainer, policy_folder)
    assert "sha256" in says

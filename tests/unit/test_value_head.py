"""The value head: it goes on as if it had never been saved, stays out of the policy's folder, and survives bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from safetensors.torch import load_file
from trainer_cases import BASE, SEED, VALUED, rows_of

from stages.errors import ConfigError, InputError, StageError
from stages.protocols import Weights
from stages.update.config import UpdateConfig
from stages.update.guard import SkippedStep
from stages.update.objectives.base import Objective
from stages.update.objectives.dpo import DPOParams
from stages.update.rows import answers_of
from stages.update.value_head import ValueHead, hidden_width


def trained(head: ValueHead, steps: range) -> ValueHead:
    """Steps towards targets of this rank."""
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        hidden_BH, target_B = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
        (head(hidden_BH) - target_B).square().sum().backward()
        head.reduce()
        head.step(skipped=False)
    return head


def interrupted(folder: Path) -> list[dict[str, torch.Tensor]]:
    """A head's state after six steps, never saved and saved after three."""

    def new() -> ValueHead:
        return ValueHead(8, learning_rate=1e-2, device=torch.device("cpu"))

    never, before = trained(new(), range(6)), trained(new(), range(3))
    after = new()
    rank = str(dist.get_rank())
    before.save(folder / rank / "before")
    after.restore(folder / rank / "before")
    trained(after, range(3, 6))
    states = []
    for name, head in (("never", never), ("after", after), ("new", new())):
        head.save(folder / rank / name)
        states.append(load_file(folder / rank / name / "value_head.safetensors"))
    return states


@pytest.mark.slow
def test_a_head_that_was_saved_goes_on_to_the_last_bit_and_is_the_same_on_every_rank(tmp_path):
    ranks = on_ranks(2, interrupted, tmp_path)
    never, _, new = ranks[0]
    assert never["num_steps"] == 6 and never["weight"].abs().min() > 0
    assert not any(tensor.any() for tensor in new.values())
    for rank in ranks:
        for state in rank[:2]:
            assert all(torch.equal(state[name], never[name]) for name in never)


def test_a_head_of_another_width_is_refused(tmp_path):
    ValueHead(8, learning_rate=1e-2, device=torch.device("cpu")).save(tmp_path)
    with pytest.raises(InputError, match="value head"):
        ValueHead(9, learning_rate=1e-2, device=torch.device("cpu")).restore(tmp_path)


def test_a_model_without_an_output_embedding_is_refused():
    from transformers import LlamaConfig, LlamaModel

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(InputError, match="output embedding"):
        hidden_width(LlamaModel(LlamaConfig(vocab_size=8, **shape)))


def test_an_objective_that_needs_a_head_and_has_no_learning_rate_for_it_is_refused():
    with pytest.raises(ConfigError, match="value_learning_rate: float"):
        Objective("mine", lambda batch, params: [], DPOParams, needs=frozenset({"value"}))


def rounds(folder: Path, out: Path):
    """Two rounds with a head that goes on, a round without, and one in bfloat16 under each of two ZeRO stages."""
    from stages.update.worker import Trainer

    def made(name: str, options: dict, *, dtype: str = "float32", start: Path = folder, head: Path | None = None):
        trainer = Trainer(UpdateConfig(**BASE | options), dtype=dtype, pad_token=None, num_threads=1)
        trainer.load(Weights.found(start, round=0))
        rows, steps = rows_of("pairs"), []
        references = [trainer.logps(answers_of(rows))]
        trainer.update(rows, references, own_reference=0, seed=SEED, on_step=steps.append, value_head=head)
        trainer.save(out / name, round=1)
        return steps

    warm = VALUED | {"loss_params": {"warmup_steps": 7}}
    found = {"first": made("first", warm)}
    found["second"] = made("second", warm, start=out / "first" / "policy", head=out / "first" / "value_head")
    found["anew"] = made("anew", warm, start=out / "first" / "policy")
    found["dpo"] = made("dpo", {"loss_type": "dpo"})
    for stage in (0, 3):
        found[f"bfloat16-{stage}"] = made(f"bfloat16-{stage}", warm | {"zero_stage": stage}, dtype="bfloat16")
    return found


@pytest.fixture(scope="module")
def two_rounds(policy_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("rounds")
    return out, on_ranks(2, rounds, policy_folder, out)[0]


@pytest.mark.slow
def test_the_head_lies_beside_the_policy_and_never_in_it(two_rounds):
    out, _ = two_rounds
    names = [sorted(path.name for path in (out / name / "policy").iterdir()) for name in ("dpo", "first")]
    assert names[0] == names[1]
    assert [path.name for path in (out / "first" / "value_head").iterdir()] == ["value_head.safetensors"]
    assert not (out / "dpo" / "value_head").exists()


@pytest.mark.slow
def test_a_round_goes_on_with_the_heads_steps_and_so_with_its_warm_up(two_rounds):
    out, steps = two_rounds
    counts = [int(state_of(out / name)["num_steps"]) for name in ("first", "second", "anew")]
    assert counts == [6, 12, 6]
    assert steps["first"][0]["value/mean"] == steps["anew"][0]["value/mean"] == 0
    assert steps["second"][0]["value/mean"] == pytest.approx(steps["first"][-1]["value/mean"], abs=0.5) != 0
    assert [len(found) for found in steps.values()] == [6, 6, 6, 3, 6, 6]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "value_head" / "value_head.safetensors")


@pytest.mark.slow
def test_in_bfloat16_the_head_stays_float32_and_nearly_where_it_would_be(two_rounds):
    out, _ = two_rounds
    wanted = state_of(out / "first")["weight"]
    for stage in (0, 3):
        found = state_of(out / f"bfloat16-{stage}")["weight"]
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def refused(folder: Path, changes: list[dict]) -> list[str]:
    from stages.update.worker import Trainer

    found = []
    for change in changes:
        trainer = Trainer(UpdateConfig(**BASE | VALUED), dtype="float32", pad_token=None, num_threads=1)
        trainer.load(Weights.found(folder, round=0))
        rows = rows_of("pairs")
        rows[4] = replace(rows[4], **change)
        try:
            skipped: list[SkippedStep] = []
            logps = trainer.logps(answers_of(rows))
            trainer.update(rows, [logps], own_reference=0, seed=SEED, on_skip=skipped.append)
            found.append(" ".join(f"{step.reason} in {step.ids}" for step in skipped))
        except StageError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
def test_a_missing_auxiliary_reward_is_refused_and_a_step_with_an_infinite_one_is_skipped(policy_folder):
    changes = [{"aux_rejected": None}, {"aux_chosen": float("inf")}]
    ((missing, infinite),) = on_ranks(1, refused, policy_folder, changes)
    assert "pair 04" in missing and "role: auxiliary" in missing
    assert "'04'" in infinite

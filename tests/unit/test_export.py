"""Exports: finished rounds alone, and reference log-probs only of answers that other trainers close alike."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import tiny_models
import written_run
from refusals import refused

from pipeline.artifacts import StageFolder
from pipeline.export import export_pairs
from stages.contracts import PAIRS, PROMPTS
from stages.errors import InputError


def exported(run, *rounds):
    export_pairs(run, kind="trl", rounds=rounds, out=None)
    return pq.read_table(run / "export" / "trl.parquet").to_pylist()


# ---- which rounds ---------------------------------------------------------------------------------------------------


def test_a_copy_of_a_round_beside_it_is_not_exported(run):
    rows = exported(run)
    shutil.copytree(run / "round-0002", run / "round-0002.bak")
    assert exported(run) == rows


@pytest.mark.parametrize(
    "lost",
    [
        "pairs/manifest.json",
        "pairs/_shards",
        "reference_logps/manifest.json",
        "reference_logps/_shards/part-00001.json",
    ],
)
def test_an_unfinished_last_round_is_left_out_aloud_and_refused_where_it_is_named(run, capsys, lost):
    gone = run / "round-0002" / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert {row["round"] for row in exported(run)} == {1}
    assert "round 2 is left out: its" in capsys.readouterr().out
    refused(lambda: exported(run, 2), "round-0002", "not finished", "--round", kind=InputError)


def test_a_round_whose_objective_takes_no_reference_is_exported_without_its_log_probs(run, capsys):
    shutil.rmtree(run / "round-0002" / "reference_logps")
    of_round_2 = [row for row in exported(run) if row["round"] == 2]
    assert of_round_2 and all(row["ref_chosen_logps"] is row["ref_rejected_logps"] is None for row in of_round_2)
    assert "takes no reference" in capsys.readouterr().out
    (run / "round-0002" / "policy" / "manifest.json").unlink()
    assert {row["round"] for row in exported(run)} == {1}
    assert "no reference_logps yet" in capsys.readouterr().out


def test_an_unfinished_round_before_a_finished_one_is_refused(run):
    (run / "round-0001" / "pairs" / "manifest.json").unlink()
    refused(lambda: exported(run), "round-0001", "its pairs are not finished", kind=InputError)
    assert {row["round"] for row in exported(run, 2)} == {2}


def test_a_run_whose_only_pairs_were_emptied_is_refused(run):
    shutil.rmtree(run / "round-0002")
    for entry in (run / "round-0001" / "pairs").iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    refused(lambda: exported(run), "its pairs are not finished", kind=InputError)


def test_groups_are_refused_in_words_that_say_so(run, tmp_path, capsys):
    grouped = written_run.write_run(tmp_path / "grouped", "pair={strategy: groups}", "update.loss_type=exo", rounds=1)
    for rounds in ((), (1,)):
        refused(lambda rounds=rounds: exported(grouped, *rounds), "groups", "pair.strategy", kind=InputError)
    shutil.move(run / "round-0002" / "pairs", run / "round-0002" / "groups")
    assert {row["round"] for row in exported(run)} == {1}
    assert "round 2 is left out: it made groups" in capsys.readouterr().out


# ---- reference log-probs --------------------------------------------------------------------------------------------


def republish(stage: StageFolder, edit) -> None:
    rows = [[edit(row, number) for number, row in enumerate(table.to_pylist())] for table in stage.read_all()]
    shutil.rmtree(stage.path)
    written_run.publish(stage, [stage.contract.table(part) for part in rows])


def end_answers(run, ends) -> None:
    """The answers of both rounds' pairs end in these tokens by turns, chosen and rejected ones."""

    def edit(row, number):
        chosen, rejected = ends[number % len(ends)]
        return row | {"chosen_token_ids": [5, chosen], "rejected_token_ids": [6, rejected]}

    for number in (1, 2):
        republish(StageFolder(run / f"round-{number:04d}" / "pairs", PAIRS), edit)


def add_policy(run) -> tuple[int, int]:
    """A policy with another stop token besides its tokenizer's EOS; both."""
    made = tiny_models.policy("qwen3", run.parent / "qwen3")
    for pattern in ("tokenizer*", "generation_config.json"):
        for file in made.glob(pattern):
            shutil.copy(file, run / "round-0002" / "policy")
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(made).eos_token_id
    generation = run / "round-0002" / "policy" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [eos, eos + 1]}))
    return eos, eos + 1


def test_pairs_with_an_answer_that_does_not_end_in_the_eos_have_no_log_probs(run, capsys):
    eos, other = add_policy(run)
    end_answers(run, [(eos, eos), (eos, 7), (other, eos)])
    rows = exported(run)
    fit = [row["ref_chosen_logps"] is not None for row in rows]
    assert fit == [row["ref_rejected_logps"] is not None for row in rows]
    assert 0 < sum(fit) < len(fit)
    assert f"{len(fit) - sum(fit)} of them without reference log-probs" in capsys.readouterr().out
    pairs = {row["pair_id"]: row for n in (1, 2) for row in tables(run, n)}
    for row, fits in zip(rows, fit, strict=True):
        pair = pairs[row["pair_id"]]
        assert fits == (pair["chosen_token_ids"][-1] == pair["rejected_token_ids"][-1] == eos)


def tables(run, number):
    return [row for t in StageFolder(run / f"round-{number:04d}" / "pairs", PAIRS).read_all() for row in t.to_pylist()]


def test_an_answer_of_a_chat_may_end_in_any_eos_of_the_policy(run, capsys):
    _, other = add_policy(run)
    end_answers(run, [(other, other)])
    assert all(row["ref_chosen_logps"] is None for row in exported(run))
    chat = [{"role": "user", "content": "hello"}]
    for number in (1, 2):
        prompts = StageFolder(run / f"round-{number:04d}" / "prompts", PROMPTS)
        republish(prompts, lambda row, _: row | {"conversation": chat})
    capsys.readouterr()
    assert all(row["ref_chosen_logps"] is not None for row in exported(run))
    assert "without" not in capsys.readouterr().out


def test_without_a_tokenizer_no_log_probs_are_given(run, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("embedded:reverse\n", "no/such-model\n"))
    assert all(row["ref_chosen_logps"] is None for row in exported(run))
    assert "no tokenizer of the policy is here" in capsys.readouterr().out

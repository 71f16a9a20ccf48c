"""A prompt followed by its id: everything the tables hold of it, from any id that leads to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import written_run
from refusals import refused

from pipeline.files import read_json
from pipeline.lineage import Lineage
from pipeline.page.render import page
from pipeline.reading import published_files, round_folders, rows
from pipeline.report import round_reports
from pipeline.texts import visible
from pipeline.trace import show_trace, trace
from stages.errors import ContractError, InputError


def told(run: Path, row_id: str, *, full: bool = False) -> str:
    return "\n".join(trace(run, row_id, full=full, width=100))


def of_round(run: Path, number: int, stage: str) -> list[dict]:
    return rows(published_files(round_folders(run)[number] / stage))


def test_a_prompts_rows_of_every_round_and_table_are_told(run):
    pair = of_round(run, 2, "pairs")[0]
    text = told(run, pair["prompt_id"])
    for number in (1, 2):
        mine = [row for row in of_round(run, number, "candidates") if row["prompt_id"] == pair["prompt_id"]]
        assert len(mine) == written_run.NUM_ANSWERS
        scored = {row["response_id"]: row["reward"] for row in of_round(run, number, "scored")}
        for row in mine:
            assert row["response_id"] in text and row["policy_version"][:12] in text
            assert f"reward {scored[row['response_id']]:.6g}" in text
        made = next(row for row in of_round(run, number, "pairs") if row["prompt_id"] == pair["prompt_id"])
        assert made["pair_id"] in text and f"margin {made['margin']:.6g}" in text
        for row in of_round(run, number, "reference_logps"):
            if row["response_id"] == made["chosen_id"]:
                assert f"chosen {row['logp']:.4f} nats" in text
    assert text.count("CHOSEN") == text.count("REJECTED") == text.count("fate       paired") == 2
    assert text.count("decision   promote: every result is") == 2


def test_every_id_of_a_prompt_leads_to_it(run):
    pair = of_round(run, 1, "pairs")[0]
    whole = told(run, pair["prompt_id"])
    for row_id in (pair["pair_id"], pair["chosen_id"], pair["rejected_id"]):
        text = told(run, row_id)
        assert row_id in text.splitlines()[1]
        assert text.splitlines()[2:] == whole.splitlines()[1:]
        assert told(run, row_id[:24].upper()) == text
    assert told(run, f" {pair['prompt_id'][:20]} ") == whole


def test_a_lineage_of_an_earlier_version_without_a_hash_of_itself_is_shown_and_not_carried_on(run, capsys):
    file = run / "run.json"
    found = read_json(file)
    prompt_id = of_round(run, 2, "pairs")[0]["prompt_id"]
    whole = told(run, prompt_id)
    del found["check"]
    file.write_text(json.dumps(found))
    assert told(run, prompt_id) == whole
    assert "run.json has no hash of itself" in capsys.readouterr().out
    assert page(run, round_reports(run)).count("promote") >= 2
    refused(lambda: Lineage.read(file), "run.json", "restore the file", kind=ContractError)
    del found["rounds"][0]["standing"]
    file.write_text(json.dumps(found))
    refused(lambda: page(run, round_reports(run)), "run.json", "restore the file", kind=ContractError)


def test_a_prompt_without_a_pair_is_told_with_its_reason(run):
    fate = next(row for row in of_round(run, 1, "fates") if row["fate"] == "prompt_too_long")
    text = told(run, fate["prompt_id"])
    assert "prompt_too_long: 900 tokens" in text and "pairs, this prompt not among them" in text


def test_a_prompt_without_a_group_is_told_beside_how_many_groups_there_were(tmp_path):
    run = written_run.write_run(tmp_path, "pair={strategy: groups}", "update.loss_type=exo", rounds=1)
    of_fate = {row["fate"]: row["prompt_id"] for row in of_round(run, 1, "fates")}
    assert "groups, this prompt not among them" in told(run, of_fate["prompt_too_long"])
    assert "groups, this one among them" in told(run, of_fate["paired"])


def test_a_held_out_prompt_is_told_by_its_evaluations(run):
    answers = [of_round(run, number, "evaluation/candidates")[0] for number in (0, 1, 2)]
    text = told(run, answers[0]["prompt_id"])
    assert "held out for evaluation" in text
    assert all(row["response_id"] in text for row in answers)
    assert text.count("wins against the first policy's") == 2


def test_nothing_sampled_acts_on_the_terminal(run):
    for row in of_round(run, 1, "prompts"):
        text = told(run, row["prompt_id"], full=True)
        assert visible(text) == text


def test_long_texts_are_cut_unless_asked_for_in_full(run):
    row = next(row for row in of_round(run, 1, "prompts") if len(row["prompt"]) > 10_000)
    assert len(told(run, row["prompt_id"])) < 10_000
    whole = told(run, row["prompt_id"], full=True)
    assert whole.count("very") >= 3000
    assert all(len(line) < 130 for line in whole.splitlines())


@pytest.mark.parametrize(
    ("given", "got"), [("", "no such id"), ("xyz", "no such id"), ("f" * 33, "no such id"), ("f" * 31, "in its tables")]
)
def test_an_id_that_leads_nowhere_is_refused(run, given, got):
    with pytest.raises(InputError) as caught:
        told(run, given)
    assert got in caught.value.got


def test_a_beginning_of_several_ids_is_refused_with_some_of_them(run):
    ids = [
        row["prompt_id"] for row in [*of_round(run, 1, "prompts"), *rows(published_files(run / "evaluation/prompts"))]
    ]
    start = next(one[0] for one in ids if sum(other.startswith(one[0]) for other in ids) > 1)
    with pytest.raises(InputError) as caught:
        told(run, start)
    mentioned = [one for one in ids if one in caught.value.got]
    assert len(mentioned) > 1 and all(one.startswith(start) for one in mentioned)


def test_a_round_under_way_is_told_as_far_as_it_is(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    pair = of_round(copy, 2, "pairs")[0]
    for stage in ("pairs", "fates", "reference_logps", "policy"):
        shutil.rmtree(copy / "round-0002" / stage)
    text = told(copy, pair["prompt_id"])
    assert "not known yet" in text and "update     not yet" in text
    shutil.rmtree(copy / "round-0001")
    shutil.rmtree(copy / "round-0002")
    assert "No round has drawn this prompt yet" in told(copy, pair["prompt_id"])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="folder of a run"):
        show_trace(tmp_path / "nothing", "ab", full=False)

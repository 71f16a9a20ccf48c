"""The page of a run: it says what the tables say, stands alone, and nothing that was sampled acts on it."""

from __future__ import annotations

import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import written_run
import yaml
from hypothesis import given
from hypothesis import strategies as st
from parsed_page import Parsed, parsed

from pipeline.artifacts import StageFolder
from pipeline.config_file import load_config
from pipeline.files import read_json, write_json
from pipeline.lineage import Lineage
from pipeline.model_card import model_card
from pipeline.page.comparison import read_runs
from pipeline.page.examples import examples
from pipeline.page.render import page
from pipeline.page.rows import PAGE_ROOM, browser_rows
from pipeline.page.summary import facts
from pipeline.page.templating import page_script, script_hash
from pipeline.reading import published_files, round_folders, round_settings, rows, run_settings
from pipeline.report import round_reports, show_page, write_reports
from pipeline.submit import folder_of
from pipeline.texts import cut, visible
from pipeline.watched_files import WatchedFiles
from stages.contracts import PAIRS
from stages.errors import InputError, StageError
from stages.score.config import ScoreConfig, reward_names
from stages.vocab import FATE_MEANINGS, Fate


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_every_fate_stands_there_with_its_count_and_they_add_up(run):
    text = parsed(run).text
    reports = [report["pairs"] for report in round_reports(run) if report["round"]]
    assert set(reports[0]["fates"]) == {"paired", "duplicate_answers", "prompt_too_long"}
    for fate in reports[0]["fates"]:
        counts = " ".join(str(report["fates"][fate]) for report in reports)
        assert f"{fate} {FATE_MEANINGS[fate]} {counts}" in text
    assert "prompts drawn 8 8" in text


def test_every_fate_has_a_meaning():
    assert set(FATE_MEANINGS) == set(get_args(Fate))


def test_the_result_is_said_in_one_sentence(run):
    first, last = (round_reports(run)[number]["evaluate"] for number in (0, -1))
    text = parsed(run).text
    assert f"from {first['reward']:.2f} to {last['reward']:.2f} on 3 held-out prompts" in text
    assert f"win rate against the first policy {100 * last['win_rate']:.1f}%" in text


def test_the_page_stands_alone(run):
    html = page(run, round_reports(run))
    found = Parsed(html)
    assert not found.tags & {"img", "link", "iframe", "object", "embed", "base"}
    for name, value in found.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href"), name
        assert name != "href" or value.startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{script_hash(page_script())}'"
    assert ("content", allowed) in found.attributes
    assert f"<script>{page_script()}</script>" in html and html.count("<script>") == 1


def test_nothing_sampled_acts_on_the_page(run):
    html = page(run, round_reports(run))
    text = Parsed(html).text
    assert "<script>alert(1)</script>" in text and "<img src=x onerror=alert(1)>" in text and "<i>judge</i>" in text
    assert "\\u202eright to left\\u202c" in text and "\\x1b[31m" in text and "\\x00" in text and "{{ 7 * 7 }}" in text
    assert "very long characters" not in text and "characters …]" in text
    assert html.count("<h1>") == 1
    assert html == visible(html)


def test_the_rows_shown_are_the_tables_own(run):
    folders = round_folders(run)
    text = parsed(run).text
    found = examples({number: folders[number] for number in (1, 2)})
    assert [one.round for one in found] == [1, 2]
    for one in found:
        tables = {name: rows(published_files(folders[one.round] / name)) for name in ("candidates", "scored", "pairs")}
        rewards = {row["response_id"]: row["reward"] for row in tables["scored"]}
        pairs = {row["prompt_id"]: row for row in tables["pairs"]}
        shown = [example for _, group in one.groups for example in group]
        assert len({example.prompt_id for example in shown}) == len(shown)
        for example in shown:
            mine = {row["response_id"]: row for row in tables["candidates"] if row["prompt_id"] == example.prompt_id}
            assert {candidate.response_id for candidate in example.candidates} == set(mine)
            for candidate in example.candidates:
                assert candidate.reward == rewards[candidate.response_id]
                assert candidate.text == cut(mine[candidate.response_id]["response"], 800)
            marked = {c.mark: c.response_id for c in example.candidates if c.mark}
            made = pairs.get(example.prompt_id)
            assert marked == ({"chosen": made["chosen_id"], "rejected": made["rejected_id"]} if made else {})
            assert (example.fate == "paired") == (made is not None)
            assert example.prompt_id in text
        margins = {title: [example.margin for example in group] for title, group in one.groups}
        assert min(margins["Largest margins"]) >= max(margins["Smallest margins"])


def test_one_folder_gives_one_page_wherever_it_lies(run, copy):
    assert page(run, round_reports(run)) == page(copy, round_reports(copy))


def test_groups_are_counted_and_drawn_where_they_were_made(tmp_path):
    run = written_run.write_run(tmp_path, "pair={strategy: groups}", "update.loss_type=exo")
    text = parsed(run).text
    assert "Groups, drawn at random" in text and "a group of" in text and "Largest margins" not in text
    write_reports(run)
    made = round_reports(run)[1]["groups"]["num_groups"]
    assert f"paired   {made} groups of" in (run / "report.txt").read_text(encoding="utf-8")


def ready_pair(number, margin):
    """A pair as it came, all of one prompt."""
    both = {"prompt_id": "p", "prompt": "asked", "round": 1, "prompt_token_ids": [1], "policy_round": None}
    score = {"score_chosen": margin, "score_rejected": margin, "margin": margin}
    sides = {
        name: value
        for side in ("chosen", "rejected")
        for name, value in {
            f"{side}_id": f"{side} {number}",
            side: f"{side} text {number}",
            f"{side}_token_ids": [number],
            f"{side}_rewards": [],
        }.items()
    }
    return both | score | sides | {"pair_id": f"pair {number}"}


@pytest.mark.parametrize("margin", [None, float("nan")])
def test_every_pair_that_came_without_rewards_is_shown_as_itself(tmp_path, margin):
    written_run.publish(StageFolder(tmp_path / "pairs", PAIRS), [PAIRS.table(ready_pair(n, margin) for n in range(3))])
    ((title, shown),) = examples({1: tmp_path})[0].groups
    assert title == "Drawn at random" and [example.margin for example in shown] == [None] * 3
    assert [[c.text for c in example.candidates] for example in shown] == [
        [f"chosen text {n}", f"rejected text {n}"] for n in range(3)
    ]
    assert len(browser_rows(tmp_path, {1: tmp_path}, PAGE_ROOM).prompts) == 3


def test_a_reward_that_rises_while_a_held_out_one_falls_is_pointed_at(copy):
    file = copy / "round-0002" / "report.json"
    report = read_json(file)
    report["evaluate"] |= {"reward": 99.0, "holdout": {"exact_match": 0.0}}
    write_json(file, report)
    assert "may be gamed" in parsed(copy).text


def test_what_is_told_is_told_of_the_policy_that_stands(copy):
    """Rounds 1 and 2 were promoted, and round 3 was rolled back to round 1: the fall in round 2 concerns nobody."""
    lineage, reports = Lineage.read(copy / "run.json"), round_reports(copy)
    back = replace(
        lineage.rounds[1], round=3, standing=lineage.rounds[0].standing, decision="roll_back", reason="it fell"
    )
    lineage.settle(back)
    reports[2]["evaluate"] |= {"reward": 99.0, "holdout": {"exact_match": 0.0}}
    reports.append(reports[2] | {"round": 3, "decision": "roll_back", "reason": "it fell"})
    shutil.copytree(copy / "round-0002", copy / "round-0003")
    for report in reports[2:]:
        write_json(copy / f"round-{report['round']:04d}" / "report.json", report)
    stood = reports[1]["evaluate"]["reward"]
    text, (run,) = parsed(copy).text, read_runs([copy])
    assert f"to {stood:.2f} on 3 held-out prompts" in text and "may be gamed" not in text
    (copy / "final.json").unlink()  # it is written after the lineage
    assert f"to {stood:.2f} on 3 held-out prompts" in parsed(copy).text
    assert run.result == 1 and f"to {stood:.2f} on 3 held-out prompts" in model_card(copy)
    assert "may be gamed" not in model_card(copy)


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ({"type": "http", "url": "http://judge.example:5000/get_reward"}, "judge.example"),
        ({"type": "judge", "url": "http://a.example/v1", "model": "org/large", "rubric": "{{ completion }}"}, "large"),
        ({"type": "model", "path": "embedded:reverse-judge"}, "reverse-judge"),
        ({"type": "function", "target": "stages.score.functions:exact_match", "name": "mine"}, "mine"),
    ],
)
def test_a_reward_is_called_what_its_tables_call_it(reward, name):
    score = ScoreConfig.model_validate({"rewards": [reward]})
    told = dict(facts({"score": score.model_dump(mode="json")}, 0, 1))["rewards"]
    assert reward_names(score) == [name] and told == f"{name} (main)"


@pytest.mark.parametrize("runs", ["s3://bucket/runs", "s3://bucket/runs/", "/shared/runs"])
def test_a_command_on_the_page_names_the_run_as_submit_does(copy, runs):
    sets = [f"run.dir={runs}", "run.name=hostile"]
    config = load_config(Path("configs/quickstart.yaml"), sets)
    (copy / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert f"prefloop report {folder_of(config)} " in parsed(copy).text
    assert folder_of(config) == f"{runs.rstrip('/')}/hostile"


@pytest.mark.parametrize("stage", ["pairs", "prompts", "candidates"])
def test_a_damaged_table_is_named(copy, stage):
    part = copy / "round-0001" / stage / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(InputError, match=stage):
        page(copy, round_reports(copy))


def test_the_page_can_be_written_beside_a_folder_that_is_read_only(run, tmp_path, capsys):
    show_page(run, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(run, round_reports(run))
    assert str(tmp_path / "page.html") in capsys.readouterr().out.replace("\n", "")
    assert not (run / "report.html").exists()
    with pytest.raises(StageError, match="--out"):
        show_page(run, Path("/proc/page.html"))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="folder of a run"):
        show_page(tmp_path, None)


@given(st.text())
def test_what_is_made_visible_hides_nothing_and_stays_so(text):
    shown = visible(text)
    assert visible(shown) == shown
    shown.encode("utf-8")
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - set("\n\t\u200c\u200d")


@given(st.text(max_size=300), st.integers(10, 100))
def test_a_cut_text_keeps_both_ends(text, limit):
    shown = cut(text, limit)
    assert shown == text if len(text) <= limit else len(shown) <= limit + 30
    assert shown[:3] == text[:3] and shown[-3:] == text[-3:]


def test_added_and_watched_rounds_count_and_go_on_with_the_last_entry(tmp_path):
    run = written_run.write_run(tmp_path, "rounds=[{}, {update: {beta: 0.5}}]")
    assert "are settled" not in parsed(run).text and "only round 2" in parsed(run).text
    write_json(run / "rounds.json", {"rounds": 3, "added": 1})
    assert "2 of 3 rounds are settled" in parsed(run).text and "rounds 2 to 3" in parsed(run).text
    WatchedFiles(run / "watched.json").take(tmp_path / "more.jsonl", round=4)
    WatchedFiles(run / "watched.json").refuse(tmp_path / "broken.jsonl", "no JSON")
    assert "2 of 4 rounds are settled" in parsed(run).text
    settings = run_settings(run)
    assert [round_settings(settings, n)["update"]["beta"] for n in (1, 2, 3, 9)] == [0.1, 0.5, 0.5, 0.5]


def test_the_page_and_the_run_take_the_same_entry_for_a_round():
    config = load_config(Path("configs/quickstart.yaml"), ["rounds=[{update: {beta: 0.2}}, {update: {beta: 0.5}}]"])
    settings = config.model_dump(mode="json")
    for number in range(5):
        assert round_settings(settings, number)["update"]["beta"] == config.for_round(number).update.beta

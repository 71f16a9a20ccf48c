"""The page of a run: it says what the tables say, stands alone, and nothing that was sampled acts on it."""

from __future__ import annotations

import shutil
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
import written_run
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config_file import load_config
from pipeline.files import read_json, write_json
from pipeline.lineage import Lineage, describe
from pipeline.model_card import model_card
from pipeline.page.comparison import read_runs
from pipeline.page.examples import examples
from pipeline.page.render import page
from pipeline.page.summary import facts
from pipeline.page.templating import page_script, script_hash
from pipeline.reading import published_files, round_folders, round_settings, rows, run_settings
from pipeline.report import round_reports, show_page
from pipeline.submit import folder_of
from pipeline.texts import cut, visible
from pipeline.watch import Watch
from stages.errors import InputError, StageError
from stages.score.config import ScoreConfig, reward_names
from stages.vocab import FATE_MEANINGS, Fate

_VOID = {"meta", "br", "line", "path", "rect", "circle", "input"}  # never closed, or closed within themselves


class Parsed(HTMLParser):
    """Elements, attributes and text of a page; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def parsed(run: Path) -> Parsed:
    return Parsed(page(run, round_reports(run)))


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


def no_evaluation(run):
    for file in run.glob("round-*/report.json"):
        write_json(file, {key: value for key, value in read_json(file).items() if key != "evaluate"})


def no_metrics(run):
    for file in run.glob("round-*/metrics.jsonl"):
        file.unlink()


def metrics_that_cannot_be_drawn(run):
    (run / "round-0001" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "rewards/chosen": null}\n')
    (run / "round-0002" / "metrics.jsonl").write_text("")


def no_pair(run):
    shutil.rmtree(run / "round-0002" / "pairs")
    report = read_json(run / "round-0002" / "report.json")
    report["pairs"] = {"num_prompts": 8, "num_pairs": 0, "margin_mean": None, "fates": {"tied": 8}}
    write_json(run / "round-0002" / "report.json", report)


def tables_removed(run):
    for file in run.glob("round-*/*/part-*.parquet"):
        file.unlink()


def nothing_settled(run):
    for number in (1, 2):
        shutil.rmtree(run / f"round-{number:04d}")
    for name in ("config.yaml", "run.json", "final.json"):
        (run / name).unlink()


def second_round_unfinished(run):
    (run / "round-0002" / "report.json").unlink()


def more_figures(run):
    for file in run.glob("round-*/report.json"):
        report = read_json(file)
        report["evaluate"] |= {"kl": 0.5 * report["round"], "texts_nll": 1.25, "holdout": {}}
        write_json(file, report)


def nothing_promoted(run):
    """The first round made no policy, the second's was held."""
    lineage = Lineage.read(run / "run.json")
    first = lineage.rounds[0].start
    held = [replace(r, standing=first, decision="hold", reason="it fell & fell") for r in lineage.rounds]
    again = Lineage(run / "run.json")
    for record in (replace(held[0], result=None), held[1]):
        again.settle(record)
        file = run / f"round-{record.round:04d}" / "report.json"
        write_json(file, read_json(file) | {"decision": "hold", "reason": "it fell & fell"})
    write_json(run / "final.json", describe(first, run))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nothing_promoted, "No round's result was promoted, and the first policy stands"),
        (nothing_promoted, "The result of round 2 was not promoted (hold): it fell & fell"),
        (nothing_promoted, "The run stands behind the first policy"),
        (no_evaluation, "nothing was evaluated, so whether the policy got better is not known"),
        (no_metrics, "held-out prompts"),
        (metrics_that_cannot_be_drawn, "held-out prompts"),
        (no_pair, f"tied {FATE_MEANINGS['tied']} 0 8"),
        (tables_removed, "prompts drawn 8 8"),
        (nothing_settled, "No round is settled yet"),
        (second_round_unfinished, "1 of 2 rounds are settled"),
        (more_figures, "KL divergence, nats an answer"),
    ],
)
def test_what_a_run_lacks_is_said_and_nothing_breaks(copy, change, said):
    change(copy)
    assert said in parsed(copy).text


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


def test_a_damaged_table_is_named(copy):
    part = copy / "round-0001" / "pairs" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(InputError, match="pairs"):
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
    Watch(run / "watched.json").take(tmp_path / "more.jsonl", round=4)
    Watch(run / "watched.json").refuse(tmp_path / "broken.jsonl", "no JSON")
    assert "2 of 4 rounds are settled" in parsed(run).text
    settings = run_settings(run)
    assert [round_settings(settings, n)["update"]["beta"] for n in (1, 2, 3, 9)] == [0.1, 0.5, 0.5, 0.5]


def test_the_page_and_the_run_take_the_same_entry_for_a_round():
    config = load_config(Path("configs/quickstart.yaml"), ["rounds=[{update: {beta: 0.2}}, {update: {beta: 0.5}}]"])
    settings = config.model_dump(mode="json")
    for number in range(5):
        assert round_settings(settings, number)["update"]["beta"] == config.for_round(number).update.beta

"""Runs side by side: what differs is shown, what is equal is not, and answers are those of the same prompts."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import written_run
from rich.table import Table

from pipeline.compare import show_comparison
from pipeline.console import Console
from pipeline.files import read_json, write_json
from pipeline.page.comparison import answers, curves, differences, figures, read_runs
from pipeline.page.rows import Room
from pipeline.reading import published_files, rows
from stages.errors import InputError

ROOM = Room(1000, 10**7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    return [
        written_run.write_run(first),
        written_run.write_run(second, "update.beta=0.5", "sample.temperature=0.7", rounds=3),
    ]


def test_only_what_differs_is_shown(folders):
    found = {row[0]: row[1:] for row in differences(read_runs(folders))}
    assert found == {"update.beta": ["0.1", "0.5"], "sample.temperature": ["1.0", "0.7"], "rounds": ["2", "3"]}
    assert differences(read_runs([folders[0], folders[0]])) == []


def test_names_tell_runs_apart(folders):
    assert [run.name for run in read_runs(folders)] == list(map(str, folders))
    assert [run.name for run in read_runs(folders[:1])] == ["hostile"]
    assert len({run.name for run in read_runs([folders[0], folders[0]])}) == 2


def test_figures_are_those_of_the_policies_that_stand(folders):
    found = {row[0]: row[1:] for row in figures(read_runs(folders))}
    assert found["stands behind"] == ["round 2", "round 3"]
    for at, folder in enumerate(folders):
        reward = read_json(folder / f"round-000{2 + at}" / "report.json")["evaluate"]["reward"]
        assert found["reward"][at].startswith(f"{reward:.2f} ± ")


def test_every_chart_has_a_line_a_run_that_has_the_figure(folders):
    found = {chart.title: chart for chart in curves(read_runs(folders))}
    reward = found["Reward"]
    assert reward.x == [0, 1, 2, 3] and [line.name for line in reward.series] == list(map(str, folders))
    assert reward.series[0].values[3] is None and reward.series[1].values[3] is not None
    chosen = found["Log-ratio of the chosen answers"]
    assert len(chosen.x) == 3 * written_run.NUM_STEPS and chosen.series[0].values[-1] is None


def test_a_run_without_a_figure_keeps_its_place_among_the_lines(folders, tmp_path):
    seen = folders[0]
    blind = Path(shutil.copytree(seen, tmp_path / "blind"))
    for file in blind.glob("round-*/report.json"):
        report = read_json(file)
        report["evaluate"] |= {"win_rate": None}
        write_json(file, report)
    (chart,) = (chart for chart in curves(read_runs([blind, seen])) if chart.title == "Win rate")
    assert [line.name for line in chart.series] == [blind.name, seen.name]
    assert set(chart.series[0].values) == {None} and None not in chart.series[1].values


def test_a_win_rate_of_nothing_is_a_figure(folders, tmp_path):
    lost = Path(shutil.copytree(folders[0], tmp_path / "lost"))
    file = lost / "round-0002" / "report.json"
    report = read_json(file)
    report["evaluate"] |= {"win_rate": 0.0}
    write_json(file, report)
    found = {row[0]: row[1:] for row in figures(read_runs([folders[0], lost]))}
    assert found["win rate against its first policy"][1] == "0.0%"


def test_the_time_of_rounds_that_were_carried_on_is_told_as_what_it_is(folders, tmp_path):
    sampled = {"num_tokens": 2400, "num_tokens_now": 1200}
    for name, more in (("whole", {}), ("carried", {"is_carried_on": True})):
        file = shutil.copytree(folders[0], tmp_path / name) / "round-0001" / "report.json"
        write_json(file, read_json(file) | {"sample": sampled} | more)
    found = {row[0]: row[1:] for row in figures(read_runs([tmp_path / "whole", tmp_path / "carried"]))}
    assert found["time in rounds"] == ["24 s", "24 s (of 1 carried on, the last call alone)"]
    assert found["sampled tokens a second of it"] == ["100", ""]


def test_answers_are_to_the_same_prompts_by_the_policies_that_stand(folders):
    runs = read_runs(folders)
    found = answers(runs, ROOM)
    asked = {row["prompt_id"] for row in rows(published_files(folders[0] / "evaluation" / "prompts"))}
    assert {prompt.prompt_id for prompt in found.prompts} == asked
    for prompt in found.prompts:
        assert [column.title for column in prompt.columns] == [
            f"{folders[0]}, after round 2",
            f"{folders[1]}, after round 3",
        ]
        rewards = [column.answers[0].reward for column in prompt.columns]
        assert rewards[1] - rewards[0] == pytest.approx(2.0)
    assert f"Reward of {folders[1]} less that of {folders[0]}: +2 [+2, +2]" in found.told


def test_runs_that_were_asked_nothing_in_common_say_so(folders, tmp_path):
    other = written_run.write_run(tmp_path)
    for file in [*other.glob("round-*/report.json")]:
        write_json(file, {key: value for key, value in read_json(file).items() if key != "evaluate"})
    found = answers(read_runs([folders[0], other]), ROOM)
    assert found.prompts == [] and "no held-out prompt in common" in found.told
    show_comparison([folders[0], other], tmp_path / "page.html")


def test_the_page_is_written_and_the_tables_are_printed(folders, tmp_path, capsys):
    show_comparison(folders, tmp_path / "page.html")
    told, html = capsys.readouterr().out, (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "update.beta" in told and "stands behind" in told
    assert "<script>alert(1)" not in html and "script-src 'sha256-" in html
    tags: list[str] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append(tag)
    reader.feed(html)
    assert tags.count("h1") == 1 and tags.count("figure") >= 8


def test_settings_that_look_like_tags_are_printed_as_they_are(capsys):
    table = Table()
    table.add_column("config")
    table.add_row("sample.stop: [/INST] [red]")
    Console().table(table)
    assert "sample.stop: [/INST] [red]" in capsys.readouterr().out


def test_one_run_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match="two runs"):
        show_comparison(folders[:1], tmp_path / "page.html")
    with pytest.raises(InputError, match="folder of a run"):
        show_comparison([folders[0], tmp_path], tmp_path / "page.html")

"""A preview of the pairing strategies says what a run would get, and groups are shown wherever a run is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import written_run
from refusals import refused

from pipeline.artifacts import StageFolder
from pipeline.preview import show_preview
from pipeline.reading import published_files, rows
from pipeline.report import round_reports, write_reports
from pipeline.status import show_status
from pipeline.trace import trace
from stages.contracts import CANDIDATES, GROUPS, PROMPTS, SCORED
from stages.errors import InputError
from stages.score.config import OWN_SETTINGS

QUICKSTART = Path("configs/quickstart.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written_run.write_run(tmp_path_factory.mktemp("runs"), "pair.min_margin=0")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    return written_run.write_run(tmp_path_factory.mktemp("runs"), "pair={strategy: groups}", "update.loss_type=exo")


def sets(run, *more):
    return [f"run.dir={run.parent}", "run.name=hostile", "pair.min_margin=0", *more]


def previewed(capsys, run, *more, tables=()):
    capsys.readouterr()
    show_preview(QUICKSTART, sets(run, *more), list(tables), in_json=True)
    return json.loads(capsys.readouterr().out)


def files_of(folder):
    return sorted((str(file), file.stat().st_mtime_ns) for file in folder.rglob("*"))


def test_the_configs_own_strategy_gives_the_figures_of_the_run_and_every_strategy_is_there(run, capsys):
    before = files_of(run)
    told = previewed(capsys, run)
    assert told["round"] == 2 and [found["strategy"] for found in told["strategies"]] == list(OWN_SETTINGS)
    own = next(found for found in told["strategies"] if found["of_config"])
    report = round_reports(run)[-1]["pairs"]
    assert {name: own[name] for name in ("num_prompts", "num_pairs", "margin_mean", "fates")} == {
        name: report[name] for name in ("num_prompts", "num_pairs", "margin_mean", "fates")
    }
    assert own["chosen_less_rejected_tokens"] == report["chosen_tokens_mean"] - report["rejected_tokens_mean"]
    for found in told["strategies"]:
        if found["settings"] is None:
            assert found["why_not"] == "needs low and high"
        else:
            assert sum(found["fates"].values()) == found["num_prompts"] == report["num_prompts"]
            assert found["fates"]["prompt_too_long"] == report["fates"]["prompt_too_long"] == 1
    assert files_of(run) == before


def test_tables_from_elsewhere_give_the_same_as_the_run_but_for_why_prompts_were_left_out(run, tmp_path, capsys):
    folder = run / "round-0001"
    for contract in (PROMPTS, CANDIDATES, SCORED):
        table = pa.concat_tables(StageFolder(folder / contract.name, contract).read_all())
        pq.write_table(table, tmp_path / f"{contract.name}.parquet")
    mine = previewed(capsys, run, tables=[folder / c.name for c in (PROMPTS, CANDIDATES, SCORED)])
    other = previewed(capsys, run, tables=[tmp_path / f"{c.name}.parquet" for c in (PROMPTS, CANDIDATES, SCORED)])
    for one, two in zip(mine["strategies"], other["strategies"], strict=True):
        assert one.pop("fates").get("paired") == two.pop("fates").get("paired")
        assert one.pop("margin_mean") == pytest.approx(two.pop("margin_mean"))
        assert one == two


def test_a_table_for_people_marks_the_own_strategy_and_what_lacks_settings(run, capsys):
    capsys.readouterr()
    show_preview(QUICKSTART, sets(run, "pair.max_pairs=2"), [], in_json=False)
    out = capsys.readouterr().out
    assert "best_worst *" in out and "needs low and high" in out and "accepts every answer" in out
    assert all(strategy in out for strategy in OWN_SETTINGS)


def test_a_run_without_scored_candidates_is_refused(tmp_path):
    refused(
        lambda: show_preview(QUICKSTART, sets(tmp_path / "none"), [], in_json=False),
        "scored candidates",
        "--prompts",
        kind=InputError,
    )


def test_the_command_loads_no_heavy_library_and_asks_for_what_is_missing(run):
    heavy = "found = [m for m in ('torch', 'vllm', 'ray', 'deepspeed', 'transformers') if m in sys.modules]"
    work = "from pipeline.preview import show_preview; "
    work += f"show_preview(Path({str(QUICKSTART)!r}), {sets(run)}, [], in_json=True)"
    check = f"import sys; from pathlib import Path; {work}; {heavy}; assert not found, found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for options in (["--preview", "--prompts", "x"], ["--out", "x"], []):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "pair", str(QUICKSTART), *options], capture_output=True, text=True
        )
        assert done.returncode == 2 and "--candidates" in done.stderr


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_a_round_of_groups_can_be_looked_at_everywhere(grouped, capsys):
    report = round_reports(grouped)[-1]["groups"]
    assert report["num_groups"] == report["fates"]["paired"] and report["num_answers"] > 2 * report["num_groups"]
    write_reports(grouped)
    text = (grouped / "report.txt").read_text()
    assert f"{report['num_groups']} groups of" in text
    page = (grouped / "report.html").read_text()
    assert "Groups, drawn at random" in page and "a group of 4 answers" in page and "what was made of it" in page
    capsys.readouterr()
    show_status(grouped)
    out = capsys.readouterr().out
    assert "groups" in out and "pairs  " not in out.splitlines()[0]


def test_a_group_is_traced_by_its_id_and_by_its_prompts(grouped):
    row = rows(published_files(grouped / "round-0002" / "groups"))[0]
    for row_id in (row["group_id"], row["prompt_id"]):
        lines = "\n".join(trace(grouped, row_id, full=False, width=140))
        assert row["group_id"] in lines and "4 answers, best first" in lines and "this one among them" in lines
    assert GROUPS.schema.names == list(row)


def test_a_prompt_with_several_pairs_is_traced_with_all_and_shown_once(tmp_path):
    run = written_run.write_run(tmp_path, "pair={strategy: all_above, eta: 0.51}", rounds=1)
    write_reports(run)
    pairs = rows(published_files(run / "round-0001" / "pairs"))
    prompt_id = pairs[0]["prompt_id"]
    mine = [row for row in pairs if row["prompt_id"] == prompt_id]
    lines = "\n".join(trace(run, prompt_id, full=False, width=140))
    assert len(mine) > 1 and all(row["pair_id"] in lines for row in mine)
    assert "CHOSEN and REJECTED" in lines and f"these {len(mine)} among them" in lines
    page = (run / "report.html").read_text()
    assert f"the widest of its {len(mine)} pairs" in page
    assert page.count(f'<span class="id">{prompt_id}</span>') <= 1

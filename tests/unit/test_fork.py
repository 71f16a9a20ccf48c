"""Taking over what stays: by links that do the first run no harm, all of it or nothing; the table that says so."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
import yaml
from killed import killed_after
from refusals import refused

from pipeline.config_file import load_config
from pipeline.files import write_json, write_vouched
from pipeline.fork import fork, show, take_over
from pipeline.lineage import Lineage
from pipeline.reuse import STAGES, Reuse, Reused
from pipeline.run_folder import write_config
from pipeline.watched_files import WatchedFiles
from stages.errors import ConfigError, ContractError, InputError, StageError

QUICKSTART = Path("configs/quickstart.yaml")


def other(run, *overrides):
    return load_config(run / "config.yaml", [*overrides, f"run.dir={run.parent}", "run.name=other"])


def reuse(*made_again: str) -> Reuse:
    """Round 1 whole, and round 2 up to a stage."""
    stages = [Reused(1, stage, True, "unchanged") for stage in STAGES]
    stages += [Reused(2, stage, stage not in made_again, "for a reason") for stage in STAGES]
    return Reuse(stages, 1, ["prompts", "evaluation"])


LATER = ("reference", "update", "evaluate", "settle")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and not file.is_symlink()}


def test_what_stays_is_the_same_file_and_what_is_made_again_is_not_there(run):
    before = content(run)
    config = other(run)
    take_over(run, config, reuse(*LATER))
    there = config.folder()
    for name in ("round-0001/policy/manifest.json", "round-0002/pairs/part-00000.parquet", "prompts/manifest.json"):
        assert (there / name).samefile(run / name), name
    for name in ("reference_logps", "policy", "evaluation", "report.json", "metrics.jsonl"):
        assert not (there / "round-0002" / name).exists(), name
    assert not (there / "round-0001" / "metrics.jsonl").samefile(run / "round-0001" / "metrics.jsonl")
    (record,) = Lineage.read(there / "run.json").rounds
    assert record.standing.path == there / "round-0001" / "policy"
    assert load_config(there / "config.yaml").run.name == "other"
    assert content(run) == before


def test_what_the_new_run_writes_never_reaches_the_first(run):
    from pipeline.artifacts import StageFolder
    from pipeline.files import write_json
    from stages.contracts import PAIRS

    before, config = content(run), other(run)
    take_over(run, config, reuse(*LATER))
    there = config.folder()
    pairs = StageFolder(there / "round-0002" / "pairs", PAIRS)
    pairs.refuse("to be made again")
    pairs.drop()
    write_json(there / "round-0001" / "report.json", {"round": 1})
    with (there / "round-0001" / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    shutil.rmtree(there / "round-0001" / "policy")
    assert content(run) == before


def test_nothing_is_left_where_it_cannot_be_made_whole(run):
    config = other(run)
    (run / "watched.json").write_text("{")
    with pytest.raises(ContractError):
        take_over(run, config, reuse(*LATER))
    assert {path.name for path in run.parent.iterdir()} == {run.name}


def test_a_fork_that_dies_is_there_whole_or_not_at_all(run, monkeypatch):
    config = other(run)
    for call in ("rename", "replace"):
        for number in range(1, 4):
            with killed_after(number, monkeypatch, of=call):
                take_over(run, config, reuse(*LATER))
            assert not config.folder().exists() or (config.folder() / "config.yaml").exists(), (call, number)
            shutil.rmtree(config.folder(), ignore_errors=True)


# ---- which config ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own(run, tmp_path):
    """A config with a reward and an objective of its own beside it; the run was made by it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "fork_rewards.py").write_text("def polite(prompts, completions, **columns): return [1.0] * len(prompts)")
    (folder / "fork_losses.py").write_text(
        "from stages.update.objectives.registry import OBJECTIVES\nOBJECTIVE = OBJECTIVES['dpo']\n"
    )
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"rounds": 5}
    settings["run"] |= {"name": run.name, "dir": str(run.parent)}
    settings["policy"]["path"] = str(tiny_models.policy("llama", tmp_path / "llama"))
    settings["prompts"] = {"path": str(folder / "prompts.jsonl"), "per_round": 1}
    settings["evaluate"] = None
    settings["score"]["rewards"] = [{"type": "function", "target": "fork_rewards:polite"}]
    settings["update"] = {"loss_type": "fork_losses:OBJECTIVE"}
    (folder / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    (folder / "own.yaml").write_text(yaml.safe_dump(settings))
    write_config(load_config(folder / "own.yaml", ["rounds=2"]), run)
    yield folder / "own.yaml"
    forget_modules()


def told_of(run, capsys, *overrides, config_file=None):
    fork(run, overrides, name="new", config_file=config_file, dry_run=True)
    return " ".join(capsys.readouterr().out.split())


def forget_modules():
    for name in ("fork_rewards", "fork_losses"):
        sys.modules.pop(name, None)


def test_a_run_with_modules_of_its_own_is_forked_and_so_is_its_fork(run, own, capsys):
    forget_modules()
    assert "made again" in told_of(run, capsys, "pair.min_margin=1")
    config = other(run)
    take_over(run, config, reuse(*LATER))
    forget_modules()
    assert load_config(config.folder() / "config.yaml").run.modules == own.parent
    assert str(own.parent) not in sys.path


def test_a_run_that_does_not_say_where_its_modules_lie_asks_for_it(run, own, capsys):
    forget_modules()
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"run": {"name": run.name}}))
    refused(lambda: told_of(run, capsys), "fork_losses", "run.modules", kind=ConfigError)
    assert "made again" in told_of(run, capsys, "update.loss_type=dpo", f"run.modules={own.parent}")


def test_modules_that_were_moved_are_asked_for_and_found_where_they_are(run, own, capsys):
    write_config(load_config(own, ["rounds=2", "update.loss_type=dpo"]), run)
    moved = own.parent.rename(own.parent.with_name("moved"))
    prompts = f"prompts.path={moved / 'prompts.jsonl'}"
    forget_modules()
    refused(lambda: told_of(run, capsys, prompts), "run.modules", str(own.parent), kind=InputError)
    assert "made again" in told_of(run, capsys, prompts, f"run.modules={moved}")


def test_the_rounds_of_a_named_config_count(run, own, capsys):
    assert "rounds 3 to 5 all new" in told_of(run, capsys, config_file=own)
    own.write_text(own.read_text().replace("rounds: 5", "rounds: [{}, {pair: {min_margin: 2}}, {}]"))
    told = told_of(run, capsys, config_file=own)
    assert "round 3 all new" in told


def test_added_rounds_go_along_and_others_are_the_configs(run, own, capsys):
    assert "new" not in told_of(run, capsys)
    write_json(run / "rounds.json", {"rounds": 4, "added": 2})
    assert "rounds 3 to 4 all new" in told_of(run, capsys)
    assert "rounds 3 to 5 all new" in told_of(run, capsys, config_file=own)
    assert "round 3 all new" in told_of(run, capsys, "rounds=3")


def test_a_fork_needs_a_settled_round_and_a_name_of_its_own(run):
    def forked(name):
        fork(run, [], name=name, config_file=None, dry_run=True)

    refused(lambda: forked(run.name), "a new run", "--name", kind=StageError)
    (run / "config.yaml").unlink()
    refused(lambda: forked("other"), "let a round finish", kind=InputError)
    refused(lambda: fork(run / "none", [], name="x", config_file=None, dry_run=True), "of a run", kind=InputError)


def test_the_table_joins_stages_of_one_lot_and_names_new_rounds(run, capsys):
    show(reuse(*LATER), other(run, "rounds=4"))
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "round 1 prompts, sample, score, pair, reference, update, evaluate, settle reused unchanged" in told
    assert "round 2 reference, update, evaluate, settle made again for a reason" in told
    assert "rounds 3 to 4 all new" in told


def test_watched_files_of_settled_rounds_go_along(run):
    entries = [{"file": f"/in/{n}.jsonl", "round": n, "changed_ns": n} for n in (1, 2)]
    write_vouched(run / "watched.json", {"files": [*entries, {"file": "/in/bad", "round": None}]})
    for number in (1, 2):
        shutil.copytree(run / "prompts", run / f"prompts-{number}")
    config = other(run)
    take_over(run, config, reuse(*LATER))
    there = WatchedFiles(config.folder() / "watched.json")
    assert (there.num_taken(), there.file_of(1)) == (1, Path("/in/1.jsonl"))
    assert {path.name for path in config.folder().glob("prompts-*")} == {"prompts-1"}

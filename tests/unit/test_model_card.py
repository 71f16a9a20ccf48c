"""The final policy with its card: a folder that loads, metadata that the hub reads, nothing of this machine in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import written_run
import yaml
from killed import killed_after
from refusals import refused

from pipeline.lineage import Lineage, read_records, write_records
from pipeline.model_card import model_card, public_settings, without_places
from pipeline.model_export import export_model
from pipeline.model_folders import close_model
from pipeline.versions import installed_versions, keep_versions
from stages.errors import ContractError, InputError, StageError
from stages.weights import weights_sha256


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A written run whose last policy is a real, tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    found = written_run.write_run(folder)
    policy, made = found / "round-0002" / "policy", tiny_models.policy("llama", folder / "llama")
    shutil.rmtree(policy)
    shutil.copytree(made, policy)
    close_model(policy, {}, sha256=weights_sha256(policy))
    return found


def test_the_folder_loads_and_its_card_is_read_by_the_hubs_own_library(run, tmp_path):
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "shared" / "model"
    export_model(run, out)
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    assert not (out / "manifest.json").exists()
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"prefloop", "minor_dpo"} <= set(card.data.tags)
    assert card.data.base_model is None  # an embedded model is not the hub's


def test_the_card_says_data_rounds_objective_gate_figures_and_versions(run):
    keep_versions(run)
    text = model_card(run)
    for told in (
        "embedded:reverse-prompts",
        "loss_type: minor_dpo",
        "gate: max_kl 20.0",
        "win rate",
        "exact_match",
        "round 2, promote",
        Lineage.read(run / "run.json").rounds[-1].standing.sha256,
        f"- torch: {installed_versions()['torch']}",
    ):
        assert told in text, told


def test_nothing_in_the_folder_names_a_place_on_this_machine(run, tmp_path):
    config = run / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["policy"]["path"] = str(tmp_path / "private" / "base")
    settings["prompts"]["path"] = "~/private/prompts.jsonl"
    settings["reference"] = ["initial", str(tmp_path / "private" / "other")]
    judge = {
        "type": "judge",
        "role": "main",
        "weight": 0.5,
        "model": "org/judge",
        "url": "http://private.internal:8000/v1",
    }
    judge |= {"rubric_file": str(tmp_path / "private" / "rubric.txt"), "system": "the private words", "body": {"n": 3}}
    score = {"rewards": [judge, {"type": "judge", "rubric": "private: be kind", "name": "/private/kindness"}]}
    score["cache"] = str(tmp_path / "private" / "cache")
    settings["evaluate"] |= {"path": "~/private/held.jsonl", "texts": {"path": "./private/texts.jsonl"}}
    settings["score"] = score
    own = {"prompts": {"path": str(tmp_path / "private" / "more.jsonl")}, "score": score, "pair": {"min_margin": 2}}
    settings["rounds"] = [{}, own]
    config.write_text(yaml.safe_dump(settings))
    for number in (1, 2):
        report = run / f"round-{number:04d}" / "report.json"
        reason = f"it broke (see {tmp_path}/private/crash.log; asked http://private.internal:8000/v1 and 10.1.2.3)"
        report.write_text(json.dumps(json.loads(report.read_text()) | {"reason": reason, "decision": "hold"}))
    export_model(run, out := tmp_path / "out")
    for file in out.iterdir():
        content = file.read_bytes().decode("latin-1")
        assert str(tmp_path) not in content and "private" not in content and str(Path.home()) + "/" not in content
        assert "internal" not in content and "10.1.2.3" not in content
    card = (out / "README.md").read_text()
    assert "prompts.jsonl" in card and "more.jsonl" in card and "initial, other" in card
    assert "org/judge" in card and "min_margin: 2" in card and "kindness" in card and "see crash.log" in card


def test_names_of_the_hub_stay_whole():
    given = {"path": "org/name", "inner": [{"path": "embedded:reverse"}], "reference": "round_start", "seed": 1}
    assert public_settings(given) == given


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("see /home/me/run/a.log, twice", "see a.log, twice"),
        ("'~/run/a.log' and ../up/b and data/of/mine.jsonl", "'a.log' and b and mine.jsonl"),
        (
            "s3://bucket/run or localhost:80, judge.lan:8000 and 10.0.0.1",
            "(an address) or (an address), (an address) and (an address)",
        ),
        ("org/model and 2/3 of my_rewards.sub:polite at 0.8 tokens/s", None),
    ],
)
def test_a_text_keeps_names_and_loses_places(text, told):
    found = without_places(text)
    assert found.startswith(text if told is None else told)
    assert not any(word in found for word in ("home", "bucket", "lan:", "10.0"))


def test_a_base_model_of_the_hub_is_named_by_where_its_files_lay(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("embedded:reverse\n", "org/base\n"))
    assert "base_model" not in model_card(run)
    file = run / "run.json"
    snapshot = run / "hub" / "models--org--base" / "snapshots" / "1"
    write_records(file, json.loads(json.dumps(read_records(file)).replace('"first"', f'"{snapshot}"')))
    assert "base_model: org/base" in model_card(run)


def test_an_export_that_dies_is_there_whole_or_not_at_all_and_can_be_made_again(run, tmp_path, monkeypatch):
    out = tmp_path / "shared" / "model"
    out.mkdir(parents=True)
    for number in (1, 2, 3):
        with killed_after(number, monkeypatch, of="replace"):
            export_model(run, out)
        names = {file.name for file in out.iterdir()} if out.exists() else set()
        assert not names or {"README.md", "config.json"} <= names
        shutil.rmtree(out, ignore_errors=True)
    export_model(run, out)
    assert {path.name for path in out.parent.iterdir()} == {"model"}


def test_what_cannot_be_exported_is_refused(run, tmp_path):
    refused(lambda: export_model(tmp_path / "none", tmp_path / "out"), "the folder of a run", kind=InputError)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(lambda: export_model(run, tmp_path / "full"), "a new or an empty folder", kind=StageError)
    (run / "round-0002" / "policy" / "config.json").write_text("{}")
    refused(lambda: export_model(run, tmp_path / "out"), "as published", kind=ContractError)
    (run / "run.json").unlink()
    refused(lambda: export_model(run, tmp_path / "out"), "no settled round", kind=InputError)

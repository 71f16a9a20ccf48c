"""A round's time in a plan: told by rates alone, in proportion to the work, and never invented; and its disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.plan.command import outlook_of, show_plan
from pipeline.plan.hardware import named
from pipeline.plan.outlook import Outlook, look_ahead
from pipeline.plan.rates import Rate, Rates, keep_rates, kept_rates
from pipeline.plan.rounds import distinct, rounds_of
from pipeline.plan.survey import look
from pipeline.versions import keep_versions
from stages.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SHAPES = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
RATES = Rates(
    "a test",
    {
        "prompt": Rate("tokens", 1000.0),
        "sample": Rate("tokens", 100.0),
        "score": Rate("tokens", 500.0),
        "reference": Rate("rows", 10.0),
        "update": Rate("tokens", 50.0),
    },
    step_s=0.5,
)
HERE = named("cpu:4x16GB")


@pytest.fixture(autouse=True)
def _where_nothing_has_run(tmp_path_factory, monkeypatch):
    """A run that lies beside the tests would change what is still to do; and no rate of this machine's counts."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def shapes() -> str:
    return json.dumps(SHAPES)


def config_of(shapes: str, *overrides: str) -> Config:
    return load_config(QUICKSTART, ["policy.path=no-such/model", f"policy.shapes={shapes}", *overrides])


def outlook_by(rates: Rates | None, config: Config) -> Outlook:
    survey = look(list(distinct(found for _, found in rounds_of(config))))
    return look_ahead(config, survey, HERE, elsewhere=False, rates=rates)


def seconds(outlook: Outlook) -> dict[str, float | None]:
    return {time.stage: time.seconds for time in outlook.times}


def test_without_rates_no_time_is_told(shapes, capsys):
    found = seconds(outlook_by(None, config_of(shapes)))
    assert set(found) == {"prompt", "sample", "score", "reference", "update", "evaluate"}
    assert all(each is None for each in found.values())
    show_plan(QUICKSTART, [], devices=None, in_json=False)
    told = capsys.readouterr().out
    assert "\ntime       not known" in told and "--calibrate" in told and "hours" not in told


def test_times_are_the_work_over_the_rates(shapes):
    config = config_of(shapes, "prompts.per_round=100", "sample.num_generations=4", "sample.max_new_tokens=64")
    outlook = outlook_by(RATES, config)
    times = {time.stage: time for time in outlook.times}
    assert times["sample"].tokens == 100 * 4 * 64
    assert times["sample"].seconds == pytest.approx(256.0)
    assert times["reference"].seconds == pytest.approx(100 / 10 / config.update.workers)
    steps = outlook.rounds[0].most_steps
    assert times["update"].seconds == pytest.approx(times["update"].tokens / 50 / config.update.workers + steps * 0.5)
    held = HERE.devices.cpus
    assert all(time.device_hours == pytest.approx(time.seconds * held / 3600) for time in outlook.times)


def test_twice_the_prompts_take_twice_as_long_and_twice_the_engines_half(shapes):
    one = seconds(outlook_by(RATES, config_of(shapes, "prompts.per_round=64")))
    two = seconds(outlook_by(RATES, config_of(shapes, "prompts.per_round=128")))
    shared = seconds(outlook_by(RATES, config_of(shapes, "prompts.per_round=128", "sample.engines=2")))
    for stage in ("prompt", "sample", "score", "reference", "update"):
        assert two[stage] == pytest.approx(2 * one[stage])
    assert shared["sample"] == pytest.approx(one["sample"])
    assert shared["score"] == two["score"]


def test_what_was_not_measured_is_not_known(shapes):
    without = replace(RATES, of={stage: rate for stage, rate in RATES.of.items() if stage != "score"})
    found = seconds(outlook_by(without, config_of(shapes)))
    assert found["score"] is None and found["evaluate"] is None and found["sample"] is not None


def test_rates_are_kept_by_device_model_and_dtype(shapes):
    config = config_of(shapes)
    facts = look([config]).policy.facts
    assert facts is not None and kept_rates(config, facts, HERE) is None
    keep_rates(RATES, config, facts, HERE)
    assert kept_rates(config, facts, HERE) == RATES
    assert kept_rates(config, facts, named("cpu:8x16GB")) is None
    assert kept_rates(config, replace(facts, num_layers=4), HERE) is None
    assert kept_rates(config_of(shapes, "policy.dtype=bfloat16"), facts, HERE) is None
    assert kept_rates(config_of(shapes, "update.beta=0.3", "prompts.per_round=7"), facts, HERE) == RATES


def test_an_earlier_run_of_the_same_policy_gives_its_rates(shapes, tmp_path):
    config = config_of(shapes, f"run.dir={tmp_path}", "update.workers=1")
    facts = look([config]).policy.facts
    run = tmp_path / "earlier"
    (run / "round-0002").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    keep_versions(run)
    spans = {"sample": (0, 4), "score": (4, 6), "reference": (6, 7), "update": (7, 12)}
    report = {
        "round": 2,
        "sample": {"num_tokens": 800, "num_tokens_now": 800, "num_candidates": 40},
        "sampling_s": 4.0,
        "pairs": {"num_pairs": 10},
        "timeline": [{"stage": name, "start_s": a, "end_s": b} for name, (a, b) in spans.items()],
    }
    (run / "round-0002" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    found = kept_rates(config, facts, HERE)
    assert found is not None and str(run) in found.source
    assert found.of["sample"] == Rate("tokens", 200.0) and found.of["score"] == Rate("rows", 20.0)
    assert found.of["update"] == Rate("rows", 2.0 * config.update.num_train_epochs)
    (run / "round-0003").mkdir()
    carried_on = report | {"round": 3, "is_carried_on": True, "sampling_s": 0.1}
    (run / "round-0003" / "report.json").write_text(json.dumps(carried_on), encoding="utf-8")
    assert kept_rates(config, facts, HERE) == found
    two = yaml.safe_dump(config.model_dump(mode="json") | {"sample": {"engines": 2}})
    (run / "config.yaml").write_text(two, encoding="utf-8")
    assert kept_rates(config, facts, HERE).of["sample"] == Rate("tokens", 100.0)
    other = config_of(shapes, f"run.dir={tmp_path}", "policy.dtype=bfloat16")
    assert kept_rates(other, facts, HERE) is None


@pytest.mark.parametrize("devices", ["8x80GB", "cpu:4"])
def test_other_machines_cannot_be_calibrated_from_here(devices):
    with pytest.raises(ConfigError, match="--calibrate"):
        show_plan(QUICKSTART, [], devices=devices, in_json=True, calibrated=True)


@pytest.mark.slow
def test_a_calibration_is_kept_for_later_plans(tmp_path, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SHAPES | {"bos_token_id": 1, "eos_token_id": 2})).save_pretrained(tmp_path / "tiny")
    reward = [{"type": "function", "target": "stages.score.functions:exact_match"}]
    sets = [f"policy.path={tmp_path / 'tiny'}", f"score.rewards={json.dumps(reward)}", f"run.dir={tmp_path}"]
    sets += ["rounds=1", "pairs={path: pairs.jsonl}", "prompts=null", "evaluate=null"]
    capsys.readouterr()
    show_plan(QUICKSTART, sets, devices=None, in_json=True, calibrated=True)
    measured = json.loads(capsys.readouterr().out)
    assert measured["rates"]["missing"] == []
    assert all(rate["per_s"] > 0 for rate in measured["rates"]["of"].values())
    show_plan(QUICKSTART, sets, devices=None, in_json=True)
    assert json.loads(capsys.readouterr().out)["times"] == measured["times"]


# ---- disk -----------------------------------------------------------------------------------------------------------


def test_the_checkpoints_of_an_update_are_counted_while_they_are_there(shapes):
    config = config_of(shapes, "rounds=4", "policy.dtype=bfloat16")
    disk = outlook_of(config).disk
    num = outlook_of(config).policy.facts.num_parameters
    assert disk.checkpoint_bytes == 12 * num and disk.num_checkpoints == 3
    assert disk.policies_bytes == 4 * num * (2 + 4)
    assert disk.total_bytes == disk.policies_bytes + 3 * 12 * num + disk.tables_bytes
    never = outlook_of(config_of(shapes, "rounds=4", "update.checkpoint_minutes=null")).disk
    assert never.num_checkpoints == 0 and never.total_bytes == never.policies_bytes + never.tables_bytes
    rare = outlook_of(config_of(shapes, "update.checkpoint_minutes=null", "update.checkpoint_steps=20")).disk
    assert rare.num_checkpoints == 1


def test_adapters_have_small_checkpoints_and_kept_moments_count(shapes):
    whole, adapters = (outlook_of(config_of(shapes, *sets)).disk for sets in ([], ["update.lora.r=2"]))
    assert adapters.checkpoint_bytes < whole.checkpoint_bytes
    kept = outlook_of(config_of(shapes, "update.keep_optimizer=true")).disk
    num = whole.checkpoint_bytes // 12
    assert kept.policies_bytes - whole.policies_bytes == 3 * 8 * num


def test_cleaning_leaves_what_run_keep_says(shapes):
    disk = outlook_of(config_of(shapes, "rounds=30", "run.keep=3")).disk
    assert disk.num_policies == 30 and disk.num_cleaned == 3 + 2
    assert disk.total_bytes - disk.cleaned_bytes == (30 - 6) * disk.policy_bytes
    short = outlook_of(config_of(shapes, "rounds=2", "run.keep=3")).disk
    assert short.cleaned_bytes == short.total_bytes

"""A wrong config is refused with the fix; a right one says what decides the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config_file import load_config
from stages.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def refused(*overrides: str, file: Path = QUICKSTART) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return caught.value


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("update.learnin_rate=1", "update.learning_rate"),
        ("sampl.temperature=1", "did you mean sample?"),
        ("score.rewards.0.wieght=2", "score.rewards.0.weight"),
        ("evaluate.num_prompt=4", "evaluate.num_prompts"),
        ("update.loss_type=minor_dop", "minor_dpo"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest_known_one(override, fix):
    assert fix in refused(override).fix


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("rounds=-1", "rounds"),
        ("sample.temperature=0", "sample.temperature"),
        ("model={path: x}", "quickstart.yaml: model"),
        ("score.rewards.0.model=x", "score.rewards.0.model"),
        ("score.rewards.0.role=second", "score.rewards.0.role"),
        ("sample.num_generations=1", "sample.num_generations"),
        ("sample.max_model_len=8", "sample.max_new_tokens"),
        ("update.loss_params={label_smoothing: 0.1}", "update.loss_params.label_smoothing"),
        ("update.beta=0", "update.beta"),
        ("update.learning_rate=.nan", "update.learning_rate"),
        ("evaluate.holdout=0.1", "evaluate.path"),
        ("prompts.columns={promt: question}", "prompts.columns"),
        ("score.rewards.0.role=holdout", "score.rewards"),
        ("score.rewards.1.name=judge", "score.rewards"),
        ("score.rewards.1.scale=zscore", "score.rewards.1.scale"),
        ("score.rewards.1.weight=0.5", "score.rewards.1.weight"),
        ("score.rewards.0.type=modle", "score.rewards.0"),
        ("run.name=../elsewhere", "run.name"),
        ("policy=3", "policy"),
        ("prompts.path=null", "prompts.path"),
        ("reference=nobody", "reference"),
    ],
)
def test_a_value_out_of_range_names_its_key(override, where):
    assert where in refused(override).where


@pytest.mark.parametrize("override", ["rounds", "=3", "score.rewards.7.weight=1", "rounds.x=1", "sample.stop=[a"])
def test_an_override_that_leads_nowhere_is_refused(override):
    assert "--set" in refused(override).where


def test_a_missing_file_is_answered_with_its_neighbour():
    assert "quickstart.yaml" in refused(file=QUICKSTART.with_name("quikstart.yaml")).fix


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\xff\xfe"])
def test_what_is_no_yaml_mapping_is_refused(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    assert str(file) in refused(file=file).where


def test_a_missing_section_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rounds: 1\n")
    assert "policy" in refused(file=file).where


def test_overrides_reach_nested_fields_and_lists():
    config = load_config(QUICKSTART, ["sample.temperature=0.8", "score.rewards.0.weight=0.5", "run.name=other"])
    assert (config.sample.temperature, config.score.rewards[0].weight, config.run.name) == (0.8, 0.5, "other")


def test_a_run_is_called_after_its_file_unless_it_has_a_name(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(QUICKSTART.read_text().replace("run:       {name: quickstart}", ""))
    assert load_config(file).run.name == "mine"


def test_where_a_run_runs_is_no_part_of_what_it_is():
    here = load_config(QUICKSTART)
    there = load_config(
        QUICKSTART,
        ["update.workers=8", "update.zero_stage=3", "update.micro_batch_size=1", "sample.engines=4", "run.dir=/x"],
    )
    assert here.identity() == there.identity()
    assert here.identity() != load_config(QUICKSTART, ["update.beta=0.2"]).identity()

"""Rounds that differ: numbers by round, what they start from, and what they refer to."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config_file import load_config
from pipeline.reading import round_settings
from stages.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def of_rounds(*overrides: str, count: int = 4):
    config = load_config(QUICKSTART, overrides)
    return [config.for_round(number) for number in range(1, count + 1)]


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, overrides)
    return caught.value


def test_a_list_in_a_numbers_place_is_one_number_a_round_and_the_last_goes_on():
    rounds = of_rounds("update.beta=[0.01, 0.1, 1.0]", "sample.num_generations=[4, 8]", "momentum=[0, 0.3]")
    assert [found.update.beta for found in rounds] == [0.01, 0.1, 1.0, 1.0]
    assert [found.sample.num_generations for found in rounds] == [4, 8, 8, 8]
    assert [found.momentum for found in rounds] == [0, 0.3, 0.3, 0.3]
    assert all(isinstance(found.sample.num_generations, int) for found in rounds)


def test_a_field_that_may_be_null_and_an_objectives_parameter_are_numbers_too():
    rounds = of_rounds("update.loss_type=dpo", "update.loss_params={label_smoothing: [0.0, 0.1]}", count=2)
    assert [found.update.loss_params["label_smoothing"] for found in rounds] == [0.0, 0.1]
    assert [found.update.gate_floor for found in of_rounds("update.gate_floor=[0.1, 0.2]", count=2)] == [0.1, 0.2]


def test_lists_that_are_lists_stay_lists():
    (found,) = of_rounds("update.loss_type=[minor_dpo, sft]", "update.loss_weights=[1.0, 0.5]", count=1)
    assert found.update.loss_weights == (1.0, 0.5)


def test_an_entry_of_a_list_of_rounds_stands_above_a_schedule():
    rounds = of_rounds("update.beta=[0.01, 0.1]", "rounds=[{}, {update: {beta: 0.5}}]")
    assert [found.update.beta for found in rounds] == [0.01, 0.5, 0.5, 0.5]


def test_what_was_understood_is_kept_and_means_the_same_when_read_again():
    config = load_config(QUICKSTART, ["update.beta=[0.01, 0.1]"])
    again = type(config).model_validate(config.model_dump(mode="json"))
    assert again == config
    assert [round_settings(config.model_dump(mode="json"), k)["update"]["beta"] for k in (1, 2, 3)] == [0.01, 0.1, 0.1]


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["update.beta=[]"], "update.beta"),
        (["update.beta=[0.1, x]"], "update.beta"),
        (["update.beta=[0.1, -1]"], "update.beta"),
        (["evaluate.num_prompts=[1, 2]"], "evaluate.num_prompts"),
        (["schedules={evaluate.num_prompts: [1, 2]}"], "schedules.evaluate.num_prompts"),
        (["schedules={update.beta: [1, 2]}", "update.beta=[1, 2]"], "schedules.update.beta"),
        (["schedules={update.beat: [1, 2]}"], "update.beat"),
        (["rounds=[{update: {beta: [0.1, 0.2]}}]"], "update.beta"),
        (["sample.num_generations=[8, 1]"], "sample.num_generations"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_its_key(overrides, where):
    assert where in refused(*overrides).where


# ---- references and starts ------------------------------------------------------------------------------------------


def test_a_word_a_path_several_and_none_are_references():
    for text, names in {
        "ema": ("ema",),
        "some/where": ("some/where",),
        "embedded:reverse": ("embedded:reverse",),
        "./here": ("./here",),
    }.items():
        assert load_config(QUICKSTART, [f"reference={text}"]).references == names
    assert load_config(QUICKSTART, ["reference=none", "update.loss_type=simpo", "update.beta=2"]).references == ()
    both = ["reference=[initial, some/where]", "update.loss_type=mrpo"]
    assert load_config(QUICKSTART, both).references == ("initial", "some/where")


@pytest.mark.parametrize(
    ("overrides", "where", "fix"),
    [
        (["reference=round_strat"], "reference", "did you mean round_start?"),
        (["reference=mymodel"], "reference", "./mymodel"),
        (["reference=none"], "reference", "round_start"),
        (["reference=[initial, none]"], "reference", "initial"),
        (["reference=[initial, initial]"], "reference", "initial"),
        (["reference=[initial, previous]"], "reference", "round_start"),
        (["update.loss_type=mrpo"], "reference", "[initial, path/to/another]"),
        (["momentum=0.3", "start=initial"], "momentum", "momentum=0"),
        (["update.keep_optimizer=true", "start=initial"], "update.keep_optimizer", "update.keep_optimizer=false"),
        (["start=first"], "start", ""),
        (["momentum=-1"], "momentum", ""),
        (["ema_decay=1"], "ema_decay", ""),
        (["update.loss_type=exo"], "pair.strategy", "pair.strategy=groups"),
        (["update.loss_type=hpo"], "score.rewards", "role: auxiliary"),
        (["update.loss_type=mpo", "reference=none", "update.beta=null"], "reference", "reference=initial"),
        (["update.loss_type=[dpo, exo]"], "update.loss_type", ""),
        (["update.loss_type=[dpo, dpo]"], "update.loss_type", "loss_weights"),
        (["update.loss_type=[dpo, sft]", "update.loss_weights=[1]"], "update.loss_weights", ""),
        (["update.loss_type=[dpo, sft]", "update.loss_params={label_smoothing: 0.1}"], "update.loss_params", ""),
        (["update.loss_type=sigmoid"], "update.loss_type", "did you mean dpo?"),
        (["update.loss_type=nowhere_at_all:LOSS"], "update.loss_type", "beside the config"),
        (["update.loss_type=sft"], "update.beta", "leave it out"),
        (["update.loss_type=dpo", "update.loss_params={label_smothing: 0.1}"], "label_smothing", "label_smoothing"),
        (["update.loss_type=hpo", "update.loss_params={base: dop}", "score.rewards.1.role=auxiliary"], "base", "dpo"),
        (["score.rewards.1.scale=zscore", "score.rewards.1.role=auxiliary"], "scale", ""),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_fix(overrides, where, fix):
    error = refused(*overrides)
    assert where in error.where and fix in error.fix, str(error)


def test_an_auxiliary_reward_may_be_weighted():
    config = load_config(QUICKSTART, ["score.rewards.1.role=auxiliary", "score.rewards.1.weight=0.5"])
    assert config.rewards[1].weight == 0.5


def test_ready_pairs_and_what_they_lack_do_not_go_together(tmp_path):
    offline = ["pairs={path: x.jsonl}", "prompts=null", "rounds=1", "evaluate=null"]
    for more in (
        ["update.loss_type=exo"],
        ["update.loss_type=hpo", "score.rewards.1.role=auxiliary"],
        ["update.loss_type=mpo", "update.beta=null"],
    ):
        assert "update.loss_type" in refused(*offline, *more).where


def test_an_objective_of_the_users_own_is_found_beside_the_config(tmp_path):
    (tmp_path / "own_losses.py").write_text(
        "from stages.update.objectives.base import Objective, term\n"
        "from stages.settings import Settings\n"
        "class Params(Settings):\n    beta: float = 0.2\n    tilt: float = 1.0\n"
        "def tilted(batch, params):\n"
        "    r_w, r_l = batch.log_ratios()\n"
        "    return [term(-params.tilt * (r_w - r_l))]\n"
        "TILTED = Objective('tilted', tilted, Params)\n"
        "NOTHING = 3\n"
    )
    file = tmp_path / "own.yaml"
    file.write_text(QUICKSTART.read_text())
    own = ["update.loss_type=own_losses:TILTED", "update.loss_params={tilt: 2.0}"]
    (loss,) = load_config(file, own).update.losses()
    assert (loss.params.tilt, loss.beta, loss.objective.name) == (2.0, 0.1, "tilted")
    for wrong in (["update.loss_type=own_losses:NOTHING"], [own[0], "update.loss_params={tild: 1}"]):
        with pytest.raises(ConfigError) as caught:
            load_config(file, wrong)
        assert "tilt" in caught.value.fix or "OBJECTIVE" in caught.value.fix


# ---- the engine's log-probs as references ---------------------------------------------------------------------------

BY_ENGINE = ("update.reference_logps=engine", "update.gate_floor=0.001")


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["reference=initial"], "update.reference_logps"),
        (["reference=none", "update.loss_type=simpo"], "update.reference_logps"),
        (["start=initial"], "update.reference_logps"),
        (["max_staleness=1"], "update.reference_logps"),
        (["update.gate_floor=null"], "update.gate_floor"),
        (
            ["update.loss_type=hpo", "update.loss_params={base: minor_dpo}", "update.gate_floor=null"],
            "update.gate_floor",
        ),
    ],
)
def test_they_are_refused_where_no_reference_samples_or_a_gate_has_no_floor(overrides, where):
    assert where in refused(*BY_ENGINE, *overrides).where


def test_they_are_taken_for_the_rounds_start_and_need_no_floor_without_a_gate():
    of_rounds(*BY_ENGINE)
    of_rounds("update.reference_logps=engine", "update.loss_type=dpo")
    of_rounds("rounds=[{}, {update: {reference_logps: engine}}]", "update.loss_type=dpo")

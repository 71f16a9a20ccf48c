"""Choosing objectives in a config: what is refused, with the way out; one's own; several at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from batches import pairs, summed
from pydantic import ValidationError

from stages.errors import ConfigError
from stages.update.config import UpdateConfig
from stages.update.objectives.registry import OBJECTIVES, find_loss, find_objective


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("mrop", "mrpo"),
        ("chipo", "chi_po"),
        ("dpo_p", "dpop"),
        ("sigmoid", "dpo"),
        ("sppo_hard", "sppo"),
        ("nca", "nca_pair"),
        ("perfect", "minor_dpo is the default"),
    ],
)
def test_an_unknown_objective_is_answered_with_the_nearest(name, fix):
    with pytest.raises(ConfigError) as caught:
        find_objective(name)
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sft"])
def test_an_unknown_parameter_is_answered_with_the_nearest(name):
    first = next(iter(set(OBJECTIVES[name].params.model_fields) - {"gate_floor"}))
    with pytest.raises(ConfigError, match="loss_params") as caught:
        find_loss(name, {first + "s": 1})
    assert first in caught.value.wanted
    assert caught.value.fix == f"did you mean {first}?"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"label_smoothing": 0.5}),
        ("robust", {"label_smoothing": 0.5}),
        ("exo_pair", {"label_smoothing": 0.0}),
        ("exo", {"beta_r": 0.0}),
        ("rpo", {"eta": -1.0}),
        ("dpop", {"dpop_lambda": -1.0}),
        ("mpo", {"mpo_lambda": -0.1}),
        ("mpo", {"logps": "average"}),
        ("chi_po", {"r_max": 0.0}),
        ("hpo", {"tau": 1.0}),
        ("hpo", {"warmup_steps": -1}),
        ("mrpo", {"eta": 1.0}),
        ("mrpo", {"weights": "swapped"}),
        ("simpo", {"gamma": float("nan")}),
        ("sft", {"beta": 0.1}),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(name, params):
    with pytest.raises(ConfigError) as caught:
        find_loss(name, params)
    assert caught.value.where == f"loss_params.{next(iter(params))}"


@pytest.mark.parametrize(
    ("name", "params", "where", "says"),
    [
        ("hpo", {"base": "dop"}, "loss_params.base", "did you mean"),
        ("hpo", {"base": "exo"}, "loss_params.base", "for example dpo"),
        ("hpo", {"base": "mrpo"}, "loss_params.base", "for example dpo"),
        ("hpo", {"base": "mpo"}, "loss_params.base", "for example dpo"),
        ("mrpo", {"base": "simpo"}, "loss_params.base", "one reference"),
        ("mrpo", {"base_params": {"betta": 1}}, "loss_params.base_params.betta", "did you mean beta?"),
        ("hpo", {"base_params": {"beta": -1}}, "loss_params.base_params.beta", "-1"),
    ],
)
def test_a_base_is_checked_as_the_objective_above_it(name, params, where, says):
    with pytest.raises(ConfigError) as caught:
        find_loss(name, params)
    assert caught.value.where == where
    assert says in str(caught.value)


def test_beta_and_the_gates_floor_reach_the_objective_under_another():
    loss = find_loss("hpo", {"base": "minor_dpo"}, beta=0.7, gate_floor=0.02)
    assert loss.gated
    assert loss.beta == 0.7
    assert loss.base.params.gate_floor == 0.02
    assert find_loss("mrpo", {"base_params": {"beta": 0.3}}, beta=0.7).beta == 0.3


OWN = """
from pydantic import Field

from stages.settings import Settings
from stages.update.objectives.base import Objective, term


class Params(Settings):
    power: float = Field(2.0, gt=0)


def apart(batch, params):
    r_w, r_l = batch.log_ratios()
    return [term((1 - (r_w - r_l)).abs() ** params.power, logit_B=r_w - r_l)]


OBJECTIVE = Objective("apart", apart, Params)
SOMETHING = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    (tmp_path / "broken_losses.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_losses", None)


@pytest.mark.usefixtures("own")
def test_an_objective_of_ones_own_goes_by_its_import_path_wherever_a_name_goes():
    config = UpdateConfig(loss_type="own_losses:OBJECTIVE", loss_params={"power": 3.0})
    (loss,) = config.losses()
    assert summed(loss(pairs(4.0, 1.0))).item() == pytest.approx(8.0)
    under = find_loss("mrpo", {"base": "own_losses:OBJECTIVE", "base_params": {"power": 1.0}})
    assert under.base.params.power == 1.0
    both = UpdateConfig(loss_type=["sft", "own_losses:OBJECTIVE"], loss_params={"own_losses:OBJECTIVE": {"power": 1}})
    assert [part.objective.name for part in both.losses()] == ["sft", "apart"]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_losses:SOMETHING", "SOMETHING is a int"),
        ("own_losses:OTHER", "no OTHER in it"),
        ("no_losses:OBJECTIVE", "No module named 'no_losses'"),
        ("broken_losses:OBJECTIVE", "No module named 'no_such_module'"),
    ],
)
def test_what_is_no_objective_is_refused(name, says):
    with pytest.raises(ConfigError) as caught:
        find_objective(name)
    assert says in caught.value.got


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("dpo", (1, 1)),
        ("sft", (0, 0)),
        ("simpo", (0, 0)),
        ("mrpo", (2, None)),
        ("hpo", (1, 1)),
        ("exo", (1, 1)),
        (["dpo", "sft"], (1, 1)),
        (["simpo", "sft"], (0, 0)),
        (["mrpo", "sft"], (2, None)),
    ],
)
def test_how_many_references_a_sum_of_objectives_takes(names, expected):
    assert UpdateConfig(loss_type=names).num_references == expected


def test_objectives_of_different_references_or_rows_are_not_added_up():
    for names, says in ((["dpo", "mrpo"], "number of references"), (["dpo", "exo"], "objectives of groups")):
        with pytest.raises((ConfigError, ValidationError), match=says):
            UpdateConfig(loss_type=names)


def test_what_a_sum_of_objectives_needs():
    config = UpdateConfig(loss_type=["hpo", "mpo"], loss_weights=[1.0, 0.5])
    assert config.needs == {"auxiliary", "value", "stream"}
    assert config.told == "hpo + 0.5 mpo"


def test_the_page_has_a_row_for_every_objective_with_its_defaults():
    page = Path(__file__).parents[3] / "docs" / "objectives.md"
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in page.read_text().splitlines() if "|" in line]
    told = {row[1]: row[3] for row in rows if row[1:2] and row[1] in OBJECTIVES}
    assert told.keys() == OBJECTIVES.keys()
    for name, objective in OBJECTIVES.items():
        for word in filter(None, told[name].split(", ")):
            field, value = word.split(" ")
            default = objective.params.model_fields[field].default
            assert value == str(default).lower() or float(value) == default, (name, field)


def test_weights_reach_every_term():
    losses = UpdateConfig(loss_type=["dpo", "rpo", "sft"], loss_weights=[1, 3, 0.5]).losses()
    terms = [term for loss in losses for term in loss(pairs(0.0, 0.0))]
    assert [term.weight_B.item() for term in terms] == [1, 3, 3, 0.5]

"""The settings of pairing: each belongs to the strategies that take it, and what cannot be is refused with the fix."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairing_cases import OF_PAIRS, STRATEGIES, answer_lists, configs
from refusals import refused

from pipeline.config_file import load_config
from stages.errors import ConfigError
from stages.score.config import OWN_SETTINGS, PairConfig
from stages.score.pairing.choice import Group, choose
from stages.score.pairing.rules import RULES, Drop

QUICKSTART = Path("configs/quickstart.yaml")

REFUSED = {
    "a strategy misspelt": ("{strategy: best_wrost}", "did you mean best_worst?", "'mean_minus_2sd'"),
    "a setting misspelt": ("{strategy: all_above, etta: 0.9}", "did you mean pair.eta?"),
    "a setting of another strategy": ("{eta: 0.9}", "pair.eta", "best_worst takes", "strategy: all_above takes it"),
    "an option of pairs": ("{strategy: groups, max_pairs: 3}", "groups takes", "every strategy but groups takes it"),
    "a probability of 1": ("{strategy: all_above, eta: 1}", "less than 1", "got:    1"),
    "a temperature of 0": ("{strategy: all_above, tau: 0}", "more than 0"),
    "none of the best": ("{strategy: top_bottom, k: 0}", "at least 1"),
    "more than half": ("{strategy: top_bottom, k: 5}", "at most half of sample.num_generations 8", "at most 4"),
    "no band": ("{strategy: gap_band}", "low and high", "no low", "--set pair.low"),
    "half a band": ("{strategy: gap_band, low: 1}", "no high"),
    "a band upside down": ("{strategy: gap_band, low: 2, high: 1}", "less than pair.high 1", "exchange"),
    "a quantile of 90": ("{strategy: gap_band, low: 10, high: 90, unit: quantile}", "at most 1", "0.9 for 90%"),
    "a ratio below 1": ("{max_length_ratio: 0.5}", "at least 1"),
    "no pair at all": ("{max_pairs: 0}", "at least 1"),
    "a length reward": ("{length_penalty: -1}", "at least 0"),
    "all accepted": ("{strategy: statistical}", "fewer than sample.num_generations 8", "8 of 64"),
    "a ranking misspelt": (
        "{strategy: statistical, num_accepted: 4, ranking: firstround}",
        "did you mean first_round?",
    ),
    "infinite": ("{min_margin: .inf}", "finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_strategy_does_not_take_or_cannot_use_is_refused(case):
    pair, *says = REFUSED[case]
    refused(lambda: load_config(QUICKSTART, [f"pair={pair}"]), *says, kind=ConfigError)


def test_a_rule_takes_by_name_just_what_is_declared_for_its_strategy():
    assert set(RULES) == set(OF_PAIRS) and set(OWN_SETTINGS) == {*RULES, "groups"}
    for strategy, rule in RULES.items():
        named = [p.name for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert sorted(named) == sorted(OWN_SETTINGS[strategy])
        assert {*named} <= set(PairConfig.model_fields)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_identity_holds_every_default_and_nothing_that_does_not_count(strategy):
    given = {"low": 0.5, "high": 1.0} if strategy == "gap_band" else {}
    config, found = PairConfig(strategy=strategy, **given), PairConfig(strategy=strategy, **given).identity()
    assert config.own.items() <= found.items() and None not in config.own.values()
    spelt_out = PairConfig(strategy=strategy, **config.own)
    assert spelt_out.identity() == found
    assert ("max_pairs" in found) == (strategy != "groups")
    others = {name for other in OWN_SETTINGS.values() for name in other} - set(OWN_SETTINGS[strategy])
    assert not others & set(found)


def test_a_round_may_have_a_strategy_of_its_own():
    config = load_config(
        QUICKSTART, ["pair={strategy: all_above, max_pairs: 2}", "rounds=[{}, {pair: {strategy: best_second}}]"]
    )
    assert config.for_round(1).pair.own == {"tau": 1.0, "eta": 0.85}
    assert config.for_round(2).pair == PairConfig(strategy="best_second", max_pairs=2)


@given(answer_lists(), configs(), st.integers(0, 9))
def test_no_prompt_makes_more_than_the_plan_reckons_with(rows, config, seed):
    choice = choose(rows, config, seed=seed)
    made = 0 if isinstance(choice, Drop) else 1 if isinstance(choice, Group) else len(choice)
    assert made <= config.most_pairs(len(rows))

"""The laws of rejection sampling: every rule with every option, on one prompt's answers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairing_cases import OF_PAIRS, answer_lists, configs

from stages.score.config import PairConfig
from stages.score.pairing.choice import Group, Pair, ScoredAnswer, choose, valid_answers
from stages.score.pairing.rules import Drop

BEST_WORST = PairConfig()


# ---- laws of every rule ---------------------------------------------------------------------------------------------


@given(answer_lists(), configs(), st.randoms(), st.integers(0, 99))
def test_the_choice_is_blind_to_the_order_of_arrival(rows, config, rng, seed):
    shuffled = rows.copy()
    rng.shuffle(shuffled)
    assert choose(rows, config, seed=seed) == choose(shuffled, config, seed=seed)


def ids_of(choice):
    if isinstance(choice, Drop):
        return choice.fate
    return choice.response_ids if isinstance(choice, Group) else [(p.chosen_id, p.rejected_id) for p in choice]


def rescaled(rows, *, factor=1.0, shift=0.0):
    return [r if r.reward is None else replace(r, reward=factor * r.reward + shift) for r in rows]


@given(answer_lists(), configs(), st.integers(-16, 16), st.integers(0, 99))
def test_the_choice_is_blind_to_a_constant_added_to_every_reward(rows, config, shift, seed):
    moved = (
        config.model_copy(update={"correct_at": config.correct_at + shift})
        if config.strategy == "correct_wrong"
        else config
    )
    assert ids_of(choose(rows, config, seed=seed)) == ids_of(choose(rescaled(rows, shift=shift), moved, seed=seed))


SCALE_FREE = ("best_worst", "best_random", "best_second", "top_bottom", "mean_minus_2sd", "groups")


@given(answer_lists(), configs(SCALE_FREE, with_options=False), st.sampled_from([0.25, 2.0, 8.0]))
def test_rules_without_a_scale_are_blind_to_a_factor(rows, config, factor):
    assert ids_of(choose(rows, config, seed=1)) == ids_of(choose(rescaled(rows, factor=factor), config, seed=1))


@given(answer_lists(), st.sampled_from([0.25, 2.0, 8.0]), st.sampled_from([(0.0, 0.5), (0.3, 0.7), (0.9, 1.0)]))
def test_a_band_of_quantiles_is_blind_to_a_factor(rows, factor, band):
    config = PairConfig(strategy="gap_band", low=band[0], high=band[1], unit="quantile")
    assert ids_of(choose(rows, config, seed=1)) == ids_of(choose(rescaled(rows, factor=factor), config, seed=1))


@given(answer_lists(), configs(OF_PAIRS), st.integers(0, 99))
def test_every_pair_keeps_every_option(rows, config, seed):
    choice = choose(rows, config, seed=seed)
    if isinstance(choice, Drop):
        assert choice.detail
        return
    by_id, couples = {row.response_id: row for row in rows}, [(p.chosen_id, p.rejected_id) for p in choice]
    assert len(set(couples)) == len(couples) >= 1
    assert not {(rejected, chosen) for chosen, rejected in couples} & set(couples)
    assert len(couples) <= (config.max_pairs or len(couples))
    for pair in choice:
        chosen, rejected = by_id[pair.chosen_id], by_id[pair.rejected_id]
        assert {chosen.response_id, rejected.response_id} <= {a.response_id for a in valid_answers(rows, config)}
        assert chosen.text != rejected.text
        assert pair.score_chosen == chosen.reward - config.length_penalty * chosen.num_tokens
        assert pair.score_rejected == rejected.reward - config.length_penalty * rejected.num_tokens
        assert pair.margin == pair.score_chosen - pair.score_rejected > 0
        assert pair.margin >= config.min_margin
        if config.max_length_ratio is not None:
            short, long = sorted((chosen.num_tokens, rejected.num_tokens))
            assert long <= config.max_length_ratio * short
        if config.agreement:
            assert all(a > b for a, b in zip(chosen.main_rewards, rejected.main_rewards, strict=True))


@given(answer_lists(), configs(OF_PAIRS), st.integers(1, 4), st.integers(0, 99))
def test_a_cap_keeps_some_of_the_pairs_that_there_would_be_without_it(rows, config, cap, seed):
    every = ids_of(choose(rows, config.model_copy(update={"max_pairs": None}), seed=seed))
    some = ids_of(choose(rows, config.model_copy(update={"max_pairs": cap}), seed=seed))
    if isinstance(every, str):
        assert some == every
    else:
        assert set(some) <= set(every) and len(some) == min(cap, len(every))


@given(answer_lists(with_gaps=False), configs(), st.integers(0, 99), st.data())
def test_an_answer_of_a_known_text_changes_nothing(rows, config, seed, data):
    twin = data.draw(st.sampled_from(rows))
    more = [*rows, replace(twin, response_id="z", reward=twin.reward + 9)]
    before, after = choose(rows, config, seed=seed), choose(more, config, seed=seed)
    if not (isinstance(before, Drop) and before.fate == "too_few_valid"):
        assert ids_of(before) == ids_of(after)


def made(*rewards, tokens=1):
    return [ScoredAnswer(f"{i:02d}", f"text {i}", float(reward), False, tokens) for i, reward in enumerate(rewards)]


@pytest.mark.parametrize("strategy", ["best_random", "statistical", "correct_wrong", "all_above"])
def test_draws_differ_by_seed_and_are_spread_evenly(strategy):
    rows = made(*(range(1, 6) if strategy == "best_random" else [0, 0, 0, 9, 9, 9]))
    config = PairConfig(strategy=strategy, max_pairs=1)
    drawn = Counter(
        ids_of(choose(rows, config, seed=seed))[0] for seed in range(600) if choose(rows, config, seed=seed)
    )
    assert set(drawn) == (
        {("04", f"0{i}") for i in range(4)}
        if strategy == "best_random"
        else {(f"0{c}", f"0{r}") for c in (3, 4, 5) for r in (0, 1, 2)}
    )
    assert max(drawn.values()) < 1.8 * min(drawn.values())


# ---- fates ----------------------------------------------------------------------------------------------------------


def answers(*rows):
    return [
        ScoredAnswer(f"{i:02d}", text, reward, truncated, 1 + i, (float(i), float(-i)))
        for i, (text, reward, truncated) in enumerate(rows)
    ]


TWO = [("a", 1.0, False), ("b", 0.9, False)]


@pytest.mark.parametrize(
    ("rows", "settings", "fate"),
    [
        ([("a", None, False), ("b", None, True)], {}, "score_error"),
        ([("a", 1.0, True), ("b", None, False)], {}, "all_truncated"),
        ([("a", 1.0, False), ("b", 0.0, True)], {}, "too_few_valid"),
        ([("a", 1.0, False), ("a", 0.0, False)], {}, "duplicate_answers"),
        (TWO, {"agreement": True, "min_margin": 0.5}, "disagreement"),
        ([("a", 1.0, False), ("b", 1.0, False)], {"agreement": True}, "tied"),
        ([("a", 1.0, False), ("b", 1.0, False)], {"strategy": "groups"}, "tied"),
        (TWO, {"min_margin": 0.5, "max_length_ratio": 1.0}, "gap_too_small"),
        (TWO, {"max_length_ratio": 1.5}, "no_pair_by_rule"),
        (TWO, {"strategy": "all_above"}, "no_pair_by_rule"),
        (TWO, {"strategy": "gap_band", "low": 1.0, "high": 2.0}, "no_pair_by_rule"),
        (TWO, {"strategy": "correct_wrong", "correct_at": 2.0}, "no_pair_by_rule"),
    ],
)
def test_a_prompt_without_a_pair_has_the_first_reason_that_applies(rows, settings, fate):
    assert choose(answers(*rows), PairConfig(**settings), seed=0).fate == fate


def test_truncated_answers_pair_when_they_are_kept():
    rows = answers(("a", 1.0, True), ("b", 0.0, True))
    assert isinstance(choose(rows, PairConfig(truncated="keep"), seed=0), list)


# ---- each rule on its own -------------------------------------------------------------------------------------------


def pairs_of(rows, seed=0, **settings):
    return ids_of(choose(rows, PairConfig(**settings), seed=seed))


def test_ties_are_broken_by_id():
    rows = made(1, 1, 0, 0)
    assert choose(rows, BEST_WORST, seed=0) == choose(rows[::-1], BEST_WORST, seed=0) == [Pair("00", "02", 1.0, 0.0)]


@given(answer_lists(), st.floats(0, 3))
def test_best_worst_is_the_widest_gap_between_different_usable_answers(rows, min_margin):
    choice = choose(rows, PairConfig(min_margin=min_margin), seed=0)
    if isinstance(choice, list):
        first_of_text = {}
        for row in sorted(valid_answers(rows, BEST_WORST), key=lambda r: r.response_id):
            first_of_text.setdefault(row.text, row.reward)
        assert [pair.margin for pair in choice] == [max(first_of_text.values()) - min(first_of_text.values())]


@given(answer_lists(), configs(["best_worst"]))
def test_best_worst_is_the_widest_of_all_pairs_that_the_options_let_through(rows, config):
    band = {"strategy": "gap_band", "low": 0.0, "high": 1e9, "max_pairs": None}
    every = choose(rows, PairConfig(**(config.model_dump(exclude_unset=True) | band)), seed=0)
    choice = choose(rows, config, seed=0)
    if isinstance(every, Drop):
        assert isinstance(choice, Drop) and choice.fate == every.fate
    else:
        assert [pair.margin for pair in choice] == [max(pair.margin for pair in every)]


def test_rs_dpo_gives_the_golden_pairs():
    rows = made(0, 1, 1.8, 3)
    assert sorted(pairs_of(rows, strategy="all_above")) == [("02", "00"), ("03", "00"), ("03", "01")]
    assert pairs_of(rows, strategy="all_above", eta=0.9) == [("03", "00")]


@given(answer_lists(), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.2, 0.5, 0.85, 0.95]))
def test_all_above_is_every_pair_whose_probability_is_above_eta(rows, tau, eta):
    found = pairs_of(rows, strategy="all_above", tau=tau, eta=eta)
    usable = {}
    for row in sorted(valid_answers(rows, BEST_WORST), key=lambda r: r.response_id):
        usable.setdefault(row.text, row)
    wanted = {
        (a.response_id, b.response_id)
        for a in usable.values()
        for b in usable.values()
        if a.reward > b.reward and 1 / (1 + math.exp(-(a.reward - b.reward) / tau)) > eta
    }
    assert (set() if isinstance(found, str) else set(found)) == wanted


def test_best_second_and_its_options():
    rows = made(5, 4.5, 4, 0)
    assert pairs_of(rows, strategy="best_second") == [("00", "01")]
    assert pairs_of(rows, strategy="best_second", min_margin=0.75) == [("00", "02")]


def test_top_bottom_crosses_the_best_with_the_worst():
    rows = made(6, 5, 4, 3, 2, 1)
    assert sorted(pairs_of(rows, strategy="top_bottom", k=2)) == [
        ("00", "04"), ("00", "05"), ("01", "04"), ("01", "05")
    ]  # fmt: skip
    assert sorted(pairs_of(rows[:3], strategy="top_bottom", k=2)) == [("00", "02")]


def test_a_band_in_reward_units_and_in_quantiles():
    rows = made(0, 1, 3, 7)  # gaps 1, 2, 3, 4, 6, 7
    assert sorted(pairs_of(rows, strategy="gap_band", low=3, high=6)) == [("02", "00"), ("03", "01"), ("03", "02")]
    quantiles = dict(strategy="gap_band", unit="quantile")
    assert sorted(pairs_of(rows, low=0.8, high=1.0, **quantiles)) == [("03", "00"), ("03", "01")]
    assert sorted(pairs_of(rows, low=0.0, high=0.2, **quantiles)) == [("01", "00"), ("02", "01")]
    assert len(pairs_of(rows, low=0.0, high=1.0, **quantiles)) == 6


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.integers(1, 40), st.integers(0, 99))
def test_right_and_wrong_answers_are_used_as_evenly_as_can_be(marks, num_pairs, seed):
    num_right = sum(marks)
    num_wrong = len(marks) - num_right
    found = pairs_of(made(*marks), seed=seed, strategy="correct_wrong", num_pairs=num_pairs)
    if not num_right or not num_wrong:
        assert found == "tied"
        return
    assert len(set(found)) == len(found) == min(num_pairs, num_right * num_wrong)
    for side, count in ((0, num_right), (1, num_wrong)):
        uses = Counter(couple[side] for couple in found)
        assert max(uses.values()) - (min(uses.values()) if len(uses) == count else 0) <= 1


def test_right_is_said_of_the_reward_before_the_length_penalty():
    rows = [ScoredAnswer("a", "a", 1.0, False, 30), ScoredAnswer("b", "b", 0.0, False, 30)]
    assert pairs_of(rows, strategy="correct_wrong", length_penalty=0.01) == [("a", "b")]


def test_mean_minus_2sd_passes_an_outlier_over():
    rows = made(10, *[9, 8, 7, 6, 5] * 4, 2, -20)  # mean 5.4, deviation 5.7: the target is -6
    assert pairs_of(rows, strategy="mean_minus_2sd") == [("00", "21")]
    assert pairs_of(rows, strategy="best_worst") == [("00", "22")]


def test_rso_accepts_by_reward_as_its_beta_says():
    rows = made(*[0] * 40, *[2] * 8)

    def share_of_good(beta):
        config = PairConfig(strategy="statistical", beta=beta, num_accepted=8, ranking="tournament")
        used = [ids_of(choose(rows, config, seed=seed)) for seed in range(40)]
        winners = [chosen for couples in used if not isinstance(couples, str) for chosen, _ in couples]
        return sum(isinstance(couples, str) for couples in used) / 40, len(winners)

    assert share_of_good(0.01)[0] == 1  # only the best are accepted: all tied
    assert share_of_good(1e6)[0] < 0.5  # all alike: good and bad ones meet
    assert share_of_good(1.0)[1] > share_of_good(0.2)[1]


@given(answer_lists(max_size=16), st.integers(2, 8), st.integers(0, 99))
def test_rso_makes_half_as_many_pairs_as_it_accepts_or_one_fewer_in_a_tournament(rows, accepted, seed):
    own = dict(strategy="statistical", beta=3.0, num_accepted=accepted)
    first = pairs_of(rows, seed=seed, **own)
    games = pairs_of(rows, seed=seed, ranking="tournament", **own)
    if not isinstance(first, str):
        assert len(first) <= accepted // 2
        assert len({name for couple in first for name in couple}) == 2 * len(first)
        assert set(first) <= set(games)
    if not isinstance(games, str):
        assert len(games) <= accepted - 1
        losers = [rejected for _, rejected in games]
        assert len(set(losers)) == len(losers)


def test_a_group_is_all_different_answers_best_first():
    rows = [*made(1, 3, 2), ScoredAnswer("zz", "text 1", 9.0, False, 1)]
    config = PairConfig(strategy="groups", length_penalty=0.5)
    assert choose(rows, config, seed=0) == Group(("01", "02", "00"), (2.5, 1.5, 0.5))

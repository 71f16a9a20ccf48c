"""The gate: statistics against known results, decisions as laws over figures, and what later rounds start from."""

from __future__ import annotations

import math
import statistics

import pytest
from here import QUICKSTART
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import shop_of, weights
from refusals import refused

from pipeline import student_t
from pipeline.artifacts import StageFolder
from pipeline.config_file import load_config
from pipeline.evaluate import Judged, comparison, evaluation_figures, form_figures, mean_with_error, repetition
from pipeline.gate import FEWEST_PROMPTS, Rivals, best_round, checks, verdict
from pipeline.lineage import Lineage, RoundRecord
from pipeline.policies import PolicyLine
from pipeline.run import Run
from pipeline.schedule import reason_to_stop
from pipeline.sections import GateConfig, StopConfig
from stages.contracts import CANDIDATES, FATES, PROMPTS, SCORED

# ---- statistics -----------------------------------------------------------------------------------------------------


def test_a_mean_its_error_and_its_interval_are_the_textbooks():
    values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]
    found = mean_with_error(values)
    assert found["mean"] == 5.0
    assert found["se"] == pytest.approx(math.sqrt(32 / 7 / 8))
    assert found["se"] == pytest.approx(statistics.stdev(values) / math.sqrt(8))
    assert (found["low"], found["high"]) == pytest.approx((5 - 2.364624 * found["se"], 5 + 2.364624 * found["se"]))


@pytest.mark.parametrize(("df", "t"), [(1, 12.706205), (2, 4.302653), (7, 2.364624), (30, 2.042272), (120, 1.979930)])
def test_quantiles_of_students_t_are_the_textbooks(df, t):
    assert student_t.quantile(0.025, df=df) == pytest.approx(t, abs=1e-6)
    assert student_t.upper_tail(t, df=df) == pytest.approx(0.025, rel=1e-6)
    assert student_t.as_normal(t, df=df) == pytest.approx(1.959964, abs=1e-6)
    assert student_t.as_normal(-t, df=df) == pytest.approx(-1.959964, abs=1e-6)


@given(st.floats(-1e6, 1e6), st.integers(1, 10_000))
def test_tails_of_students_t_are_those_of_two_and_of_many(t, df):
    assert student_t.upper_tail(t, df=2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
    assert student_t.upper_tail(t, df=10**7) == pytest.approx(statistics.NormalDist().cdf(-t), abs=1e-6)
    assert abs(student_t.as_normal(t, df=df)) <= abs(t) + 1e-9
    assert student_t.upper_tail(t, df=df) + student_t.upper_tail(-t, df=df) == pytest.approx(1)


def test_of_one_value_the_error_is_not_known_and_of_none_nothing_is():
    assert mean_with_error([3.0]) == {"num": 1, "mean": 3.0, "se": None, "low": None, "high": None}
    assert set(mean_with_error([]).values()) == {0, None}


def judged(main, **holdout):
    """A policy's answers to as many prompts as `main` has values; None is an answer without one."""
    table = SCORED.table(
        {
            "response_id": f"r{i}",
            "prompt_id": f"p{i}",
            "round": 1,
            "reward": value,
            "rewards": [
                {"name": name, "value": values[i], "role": "holdout"}
                for name, values in holdout.items()
                if i < len(values)
            ],
        }
        for i, value in enumerate(main)
    )
    return Judged.of([table], {"holdout": list(holdout)})


def compared(mine, other):
    return comparison(mine, other, max_error_share=0.01)


def test_policies_are_compared_prompt_by_prompt():
    easy_and_hard = [0.0, 100.0, -50.0, 7.0]
    found = compared(judged([v + 1 for v in easy_and_hard]), judged(easy_and_hard))
    assert found["reward"] == {"num": 4, "mean": 1.0, "se": 0.0, "low": 1.0, "high": 1.0}
    assert found["win_rate"]["mean"] == 1.0


def test_only_prompts_that_both_answered_count_and_ties_half():
    found = compared(judged([1.0, 5.0, 2.0, None], exact=[1, 0, None]), judged([0.0, 5.0, None, 9.0], exact=[0, 0]))
    assert (found["reward"]["num"], found["reward"]["mean"]) == (2, 0.5)
    assert found["win_rate"]["mean"] == 0.75
    assert (found["holdout"]["exact"]["num"], found["holdout"]["exact"]["mean"]) == (2, 0.5)


@given(st.lists(st.tuples(*[st.floats(-100, 100)] * 2), min_size=2, max_size=30))
def test_turned_round_a_comparison_tells_the_opposite(pairs):
    ours, theirs = (judged(list(side)) for side in zip(*pairs, strict=True))
    one, other = compared(ours, theirs), compared(theirs, ours)
    assert one["reward"]["mean"] == pytest.approx(-other["reward"]["mean"])
    assert one["reward"]["se"] == pytest.approx(other["reward"]["se"])
    assert one["win_rate"]["mean"] + other["win_rate"]["mean"] == pytest.approx(1)


def test_repetition_is_the_share_of_4_grams_said_before():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(50))) == 0.0
    assert repetition([7] * 13) == pytest.approx(1 - 1 / 10)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_the_interval_holds_the_truth_19_times_in_20():
    import random

    rng = random.Random(0)
    for num in (3, 8, 40):
        drawn = [mean_with_error([rng.gauss(0.3, 2.0) for _ in range(num)]) for _ in range(1000)]
        assert 930 <= sum(found["low"] <= 0.3 <= found["high"] for found in drawn) <= 970


def test_form_of_no_answers_is_not_known():
    assert form_figures([]) == {"length": None, "repetition": None, "cut": None}


# ---- decisions ------------------------------------------------------------------------------------------------------

FIRST = {"length": 10.0, "repetition": 0.02, "texts_nll": 1.5, "reward": 1.0, "kl": 0.0}


def difference(mean, se=0.1):
    return {"num": 100, "mean": mean, "se": se, "low": mean - 1.96 * se, "high": mean + 1.96 * se}


def figures(*, reward=0.5, exact=0.1, rate=0.6, rivals=("first", "before"), **more):
    one = {
        "reward": difference(reward),
        "win_rate": difference(rate, 0.02),
        "holdout": {"exact": difference(exact)},
        "least_holdout": 99,
    }
    return FIRST | {"kl": 1.0, "against": {rival: one for rival in rivals}} | more


def judge(found, **config):
    rivals = Rivals(before=weights(2), best=weights(1), first=FIRST)
    return verdict(GateConfig(**config), found, weights(3), rivals)


def test_a_better_policy_is_promoted_and_stands():
    found = judge(figures())
    assert (found.decision, found.standing, found.result) == ("promote", weights(3), weights(3))
    assert "against the policy before" in found.reason and "[+0.304, +0.696]" in found.reason


BROKEN = {
    "max_kl": {"kl": 25.0},
    "max_reward_drop": {"reward": -0.3},
    "max_holdout_drop": {"exact": -0.3},
    "min_win_rate": {"rate": 0.4},
    "max_length_ratio": {"length": 21.0},
    "max_repetition": {"repetition": 0.3},
    "max_texts_nll": {"texts_nll": 2.1},
}


@pytest.mark.parametrize("limit", BROKEN)
def test_each_limit_alone_holds_a_result_and_null_lets_it_through(limit):
    found = judge(figures(**BROKEN[limit]))
    assert (found.decision, found.standing) == ("hold", weights(2))
    assert f"gate.{limit}" in found.reason and "rounds go on from the policy of round 2" in found.reason
    assert {check.name for check in found.checks if not check.kept} == {limit}
    assert judge(figures(**BROKEN[limit]), **{limit: None}).decision == "promote"


def test_what_happens_to_a_result_that_fails_is_the_configs():
    bad = figures(kl=99.0)
    assert judge(bad, on_fail="hold").standing == weights(2)
    back = judge(bad, on_fail="roll_back")
    assert (back.decision, back.standing) == ("roll_back", weights(1))
    assert judge(bad, on_fail="stop").decision == "hold"
    assert "the run ends" in judge(bad, on_fail="stop").reason


def test_rolling_back_to_the_policy_before_is_holding():
    same = Rivals(before=weights(2), best=weights(2), first=FIRST)
    assert verdict(GateConfig(on_fail="roll_back"), figures(kl=99.0), weights(3), same).decision == "hold"


def test_noise_fails_nothing():
    assert judge(figures(reward=-0.19, exact=-0.19, rate=0.47)).decision == "promote"


@pytest.mark.parametrize("num", [FEWEST_PROMPTS, 16, 64])
def test_a_policy_that_does_not_change_fails_a_fall_once_in_44_whatever_the_number_of_prompts(num):
    import random

    rng, failed, rounds = random.Random(num), 0, 4000
    for _ in range(rounds):
        fall = mean_with_error([rng.gauss(0, 1) for _ in range(num)])
        against = {"reward": fall, "holdout": {}, "least_holdout": 0, "win_rate": fall}
        found = checks(GateConfig(min_win_rate=None), {"against": {"first": against}}, FIRST)
        failed += not all(check.kept for check in found)
    assert 0.015 < failed / rounds < 0.031


def test_few_prompts_are_not_judged_and_the_verdict_says_so():
    few = judged([0.0] * (FEWEST_PROMPTS - 1), exact=[0.0] * (FEWEST_PROMPTS - 1))
    first = judged([1.0] * (FEWEST_PROMPTS - 1), exact=[1.0] * (FEWEST_PROMPTS - 1))
    found = judge(told_apart(few, first))
    assert found.decision == "promote"
    for what in ("the reward", "exact", "the win rate"):
        assert f"{what} against the first policy is not judged on 7 prompts, 8 at least" in found.reason
    more = judge(told_apart(judged([0.0] * FEWEST_PROMPTS), judged([1.0] * FEWEST_PROMPTS)))
    assert more.decision == "hold" and "not judged" not in more.reason


def test_what_is_not_known_fails_nothing_and_what_is_no_number_fails():
    unknown = {"kl": None, "length": None, "repetition": None, "texts_nll": None, "against": {}}
    assert judge(figures() | unknown).decision == "promote"
    for name in ("kl", "length", "repetition", "texts_nll"):
        assert judge(figures(**{name: math.nan})).decision == "hold"


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_a_larger_fall_never_passes_where_a_smaller_one_fails(one, other):
    def passes(reward):
        return judge(figures(reward=reward)).decision == "promote"

    assert passes(max(one, other)) or not passes(min(one, other))


def test_a_fall_that_is_the_same_on_every_prompt_is_no_noise():
    found = figures()
    found["against"]["before"] = found["against"]["before"] | {"reward": difference(-1e-3, 0.0)}
    assert judge(found).decision == "hold"


def test_a_slow_decline_is_seen_against_the_first_policy():
    found = figures()
    found["against"] = dict(found["against"])
    found["against"]["first"] = found["against"]["first"] | {"holdout": {"exact": difference(-0.25)}}
    assert "against the first policy" in judge(found).reason


ANSWERED = 64


def told_apart(mine, first):
    """The figures of a policy against the first one, each as `judged`."""
    return FIRST | {"kl": 1.0} | evaluation_figures(mine, first) | {"against": {"first": compared(mine, first)}}


@pytest.mark.parametrize("known", [0, 10, 63])
def test_a_reward_that_training_never_sees_and_that_is_gone_fails_its_check(known):
    first = judged([0.0] * ANSWERED, exact=[0.5] * ANSWERED)
    gone = judged([1.0] * ANSWERED, exact=[1.0] * known + [None] * (ANSWERED - known))
    found = judge(told_apart(gone, first))
    assert found.decision == "hold"
    assert f"exact is known on {known} prompts and needs 64, against the first policy" in found.reason
    (check,) = [check for check in found.checks if not check.kept]
    assert check.name == "max_holdout_drop" and found.figures()["checks"]
    whole = judged([1.0] * ANSWERED, exact=[1.0] * ANSWERED)
    assert judge(told_apart(whole, first)).decision == "promote"
    assert judge(told_apart(gone, first), max_holdout_drop=None).decision == "promote"


def test_as_many_values_may_be_missing_as_the_share_of_errors_allows():
    first = judged([0.0] * 200, exact=[0.5] * 200)
    for missing, decision in ((2, "promote"), (3, "hold")):
        mine = judged([1.0] * 200, exact=[None] * missing + [0.5] * (200 - missing))
        assert judge(told_apart(mine, first)).decision == decision


def test_rewards_are_named_in_the_configs_order_and_those_without_a_value_too():
    mine = judged([1.0] * 2, late=[None, None], early=[0.5, None])
    assert evaluation_figures(mine, mine)["holdout"] == {"late": None, "early": 0.5}
    assert list(compared(mine, mine)["holdout"]) == ["late", "early"]


def test_checks_are_those_whose_limits_are_set():
    assert {check.name for check in checks(GateConfig(max_kl=None), figures(), FIRST)} == set(BROKEN) - {"max_kl"}


def report(round, reward, decision="promote", **holdout):
    return {"round": round, "decision": decision, "evaluate": {"reward": reward, "holdout": holdout, "kl": 0.0}}


def test_the_best_is_by_the_reward_that_training_never_sees():
    gamed = [report(0, 1.0, exact=0.3), report(1, 2.0, exact=0.5), report(2, 9.0, exact=0.4)]
    assert best_round(gamed) == 1
    assert best_round([report(0, 1.0), report(1, 2.0), report(2, 9.0)]) == 2
    assert best_round([report(0, 1.0), report(1, 2.0), report(2, 9.0, "hold")]) == 1
    assert best_round([report(0, 2.0), report(1, 2.0)]) == 0
    assert best_round([]) == 0


def test_the_best_is_by_one_measure_alone():
    unknown = [report(0, 0.0, exact=0.5), report(1, 0.2, exact=0.9), report(2, 1.0, exact=None)]
    assert best_round(unknown) == 1
    assert best_round([report(0, 0.0, exact=None, other=0.1), report(1, 1.0, exact=None, other=0.9)]) == 0
    assert best_round([report(0, 0.0, exact=0.5, other=0.1), report(1, 1.0, other=0.9, exact=0.4)]) == 0


def test_a_run_ends_after_a_result_that_failed_if_it_is_to_and_held_results_are_nobodys_best():
    held = [report(0, 1.0), report(1, 2.0), report(2, 9.0, "hold")]
    assert reason_to_stop(StopConfig(), GateConfig(), held) is None
    assert "round 2 did not pass" in reason_to_stop(StopConfig(), GateConfig(on_fail="stop"), held)
    assert "best is 2.00, round 1" in reason_to_stop(StopConfig(patience=1), GateConfig(), held)
    held[2]["evaluate"]["kl"] = 50.0
    assert reason_to_stop(StopConfig(max_kl=10.0), GateConfig(), held) is None


def test_a_limit_on_what_is_not_told_is_refused():
    for sets, says in {
        ("evaluate=null", "gate.max_kl=5"): ["gate.max_kl", "evaluate"],
        ("evaluate.kl=false", "gate.max_kl=5"): ["evaluate.kl=true"],
        ("gate.max_texts_nll=0.1",): ["gate.max_texts_nll", "texts"],
        ("score.rewards=[{type: model, path: 'embedded:reverse-judge'}]", "gate.max_holdout_drop=1"): ["role holdout"],
        ("gate.max_kl=-1",): ["gate.max_kl"],
    }.items():
        refused(lambda sets=sets: load_config(QUICKSTART, sets), *says)
    for sets in (["evaluate=null"], ["gate=null"], ["evaluate=null", "gate.on_fail=stop"]):
        load_config(QUICKSTART, sets)


# ---- what later rounds start from -----------------------------------------------------------------------------------


def line_of(shop, *standing: int) -> PolicyLine:
    """The policies after rounds whose verdicts left these rounds' results standing."""
    lineage = Lineage(shop.folder / "run.json")
    first = before = shop.sources.policy
    for number, made_in in enumerate(standing, start=1):
        stands = weights(made_in) if made_in else first
        lineage.rounds.append(RoundRecord(number, before, before, [], weights(number), stands, "", "", {}))
        before = stands
    return PolicyLine(shop, lineage)


def named(models, tmp_path, standing, *overrides):
    found = line_of(shop_of(models, *overrides, into=tmp_path / "run"), *standing).of(len(standing) + 1)
    return found.sampling.round, found.start.round, [reference.round for _, reference in found.references], found.line


def test_a_round_after_a_held_one_starts_as_that_one_did(models, tmp_path):
    held = [1, 2, 2]
    assert named(models, tmp_path, held) == (2, 2, [2], (2, 1))
    assert named(models, tmp_path, held, "reference=previous") == (2, 2, [1], (2, 1))
    assert named(models, tmp_path, held, "start=initial") == (2, 0, [0], (2, 1))
    assert named(models, tmp_path, [0]) == (0, 0, [0], ())
    assert named(models, tmp_path, [0], "reference=previous", "momentum=0.3") == (0, 0, [0], ())


def test_a_round_after_a_roll_back_starts_from_the_best_and_what_was_between_is_not_in_its_line(models, tmp_path):
    assert named(models, tmp_path, [1, 2, 1]) == (1, 1, [1], (1,))
    assert named(models, tmp_path, [1, 2, 0, 4]) == (4, 4, [4], (4,))


def test_what_was_sampled_ahead_is_kept_after_a_hold_and_dropped_after_a_roll_back(models, tmp_path):
    stale = "max_staleness=1"
    assert named(models, tmp_path, [1, 2, 3], stale)[:2] == (2, 3)
    assert named(models, tmp_path, [1, 2, 2], stale)[:2] == (2, 2)
    assert named(models, tmp_path, [1, 2, 1], stale)[:2] == (1, 1)
    assert named(models, tmp_path, [1, 0], stale)[:2] == (0, 0)
    shop = shop_of(models, stale, into=tmp_path / "other")
    for standing, abandoned in (([1, 2, 3], None), ([1, 2, 2], None), ([1, 2, 1], 2), ([1, 0], 1), ([0], None)):
        found = line_of(shop, *standing).abandoned(len(standing) + 1)
        assert (found and found.round) == abandoned


def test_what_a_rolled_back_policy_sampled_ahead_is_dropped_and_nothing_else(models, tmp_path, capsys):
    run = Run(shop_of(models, "max_staleness=1", into=tmp_path / "run"))
    for number, made_in in enumerate([1, 2, 1], start=1):
        made, stands = weights(number), weights(made_in)
        run.lineage.settle(RoundRecord(number, made, made, [], made, stands, "", "", {}))
    tables = [StageFolder(run.folder / "round-0004" / contract.name, contract) for contract in (PROMPTS, SCORED, FATES)]
    candidates = StageFolder(run.folder / "round-0004" / "candidates", CANDIDATES)
    for policy, is_dropped in ((weights(1), False), (weights(2), True)):
        candidates.drop()
        for table in (*tables, candidates):
            table.begin({"policy": policy.sha256} if table is candidates else {})
        assert run._drop_abandoned(4)
        assert [table.path.exists() for table in (*tables, candidates)] == [True, *[not is_dropped] * 3]
    assert "the policy of round 2 sampled ahead is dropped" in capsys.readouterr().out
    assert run._drop_abandoned(4) and not capsys.readouterr().out


def test_a_lineage_read_again_is_the_same(tmp_path):
    lineage = Lineage(tmp_path / "run.json")
    for number, (result, standing) in enumerate([(1, 1), (None, 1), (3, 3)], start=1):
        made = weights(result) if result else None
        record = RoundRecord(number, weights(1), weights(1), [], made, weights(standing), "hold", "why", {"a": 1})
        lineage.settle(record)
    assert Lineage.read(tmp_path / "run.json") == lineage

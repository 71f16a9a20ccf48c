"""Rounds whose rewards a real server gives: jobs and stages as in a run, without Ray."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import tiny_models
import written_run
from here import workshop
from refusals import refuse_published, refused
from reward_servers import Fault, serving

from pipeline.artifacts import StageFolder
from pipeline.policies import Policies
from pipeline.round import Round
from stages.contracts import FATES
from stages.errors import StageError


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_models.policy("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


class Bench:
    """A round on prompts and candidates of two shards, scored by servers."""

    def __init__(self, folder, policy):
        self.folder, self.policy = folder, policy
        folder.mkdir(exist_ok=True)
        (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')

    def round(self, *rewards, sets=()):
        plain = {"type": "http", "retries": 0, "timeout_s": 2}
        given = [plain | reward for reward in rewards]
        shop = workshop(
            self.folder,
            f"policy.path={self.policy}",
            f"prompts.path={self.folder / 'prompts.jsonl'}",
            "evaluate=null",
            "prompts.shard_size=2",
            "pair.min_margin=0",
            f"score.rewards={json.dumps(given)}",
            *sets,
        )
        return Round(shop, 1, Policies(shop.sources.policy, shop.sources.policy))


def unequal(answers):
    column = answers.schema.get_field_index("response")
    texts = pa.array([f"answer {number}" for number in range(answers.num_rows)])
    return answers.set_column(column, answers.schema.field(column), texts)


@pytest.fixture
def bench(tmp_path, policy):
    return Bench(tmp_path, policy)


def rows(folder):
    return [row for table in folder.read_all() for row in table.to_pylist()]


def of_text(query, prompt, label):
    return float(sum(map(ord, query[len(prompt) :])) % 97)


def against(query, prompt, label):
    return -of_text(query, prompt, label)


def test_a_server_that_is_gone_stops_the_stage_and_the_rest_alone_is_asked_later(bench):
    with serving(of_text) as served:
        port = int(served.url.rpartition(":")[2])
        mine = {"url": served.url + "/get_reward", "name": "mine", "batch_size": 2, "concurrency": 1}
        rnd = bench.round(mine)
        tables = written_run.sampled(rnd, unequal)
        served.faults = [Fault()] * 2 + [Fault(status=500)] * 99
        refused(lambda: rnd.data.score(*tables), "mine", "HTTP 500", "carries on", kind=StageError)
        refuse_published(rnd.folder / "scored")
        answered = {query for body in served.asked[:2] for query in body["query"]}
    with serving(of_text, port=port) as served:
        scored = bench.round(mine).data.score(*tables)
        assert scored.is_closed() and served.num_answers == 16 - len(answered)
        assert not answered & {query for body in served.asked for query in body["query"]}
    assert all(row["reward"] is not None for row in rows(scored))


def test_an_answer_that_cannot_be_scored_is_null_and_a_prompt_without_any_says_why(bench):
    with serving(of_text) as served:
        mine = {"url": served.url + "/get_reward", "name": "mine"}
        rnd = bench.round(mine, sets=("score.max_error_share=0.5",))
        tables = written_run.sampled(rnd, unequal)
        lost = rows(tables[0])[1]
        served.poison = lost["prompt"]
        scored = rnd.data.score(*tables)
        pairs = rnd.data.pair(*tables, scored)
    missing = {row["prompt_id"] for row in rows(scored) if row["reward"] is None}
    assert missing == {lost["prompt_id"]}
    fates = {row["prompt_id"]: row for row in rows(StageFolder(rnd.folder / "fates", FATES))}
    assert fates[lost["prompt_id"]]["fate"] == "score_error"
    assert "mine: HTTP 500" in fates[lost["prompt_id"]]["detail"]
    assert {fate["fate"] for name, fate in fates.items() if name != lost["prompt_id"]} == {"paired"}
    assert pairs.is_closed()


def test_too_many_answers_without_a_score_stop_the_round_with_the_reasons(bench):
    with serving(lambda *_: float("nan")) as served:
        rnd = bench.round({"url": served.url + "/get_reward", "name": "mine"})
        says = ("score.max_error_share", "16 of 16 answers", "16 times mine: the server says nan")
        refused(lambda: rnd.data.score(*written_run.sampled(rnd, unequal)), *says, kind=StageError)
    refuse_published(rnd.folder / "scored")


def test_members_of_an_ensemble_that_disagree_make_no_pair(bench, policy):
    with serving(of_text) as one, serving(of_text) as two, serving(against) as three:
        members = [{"url": served.url + "/get_reward", "name": f"m{at}"} for at, served in enumerate((one, two, three))]
        members[2]["weight"] = 0.5  # it ranks all answers the other way round, and the sum does not show it
        agreed = bench.round(*members[:2], sets=("pair.agreement=true",))
        tables = written_run.sampled(agreed, unequal)
        pairs = rows(agreed.data.pair(*tables, agreed.data.score(*tables)))
        assert len(pairs) == 4
        for pair in pairs:
            sides = zip(pair["chosen_rewards"], pair["rejected_rewards"], strict=True)
            assert all(chosen["value"] > rejected["value"] for chosen, rejected in sides)
        apart = Bench(bench.folder / "apart", policy)
        summed, split = (apart.round(*members, sets=(f"pair.agreement={on}",)) for on in ("false", "true"))
        tables = written_run.sampled(split, unequal)
        scored = split.data.score(*tables)
        refused(lambda: split.data.pair(*tables, scored), "disagreement 4", kind=StageError)
        assert len(rows(summed.data.pair(*tables, scored))) == 4


def test_a_judge_and_a_server_score_a_round_together(bench):
    with serving(of_text, judge=lambda text: f'{{"score": {len(text) % 7}}}') as served:
        told = {"rubric": "{{ prompt }} {{ completion }}", "read": "json", "model": "m"}
        judge = {"type": "judge", "url": served.url + "/v1", **told}
        rnd = bench.round({"url": served.url + "/get_reward", "scale": "zscore"}, judge)
        scored = rows(rnd.data.score(*written_run.sampled(rnd, unequal)))
        again = Bench(bench.folder / "again", bench.policy)
        before, kept = len(served.asked), f"score.cache={bench.folder / 'reward_answers'}"
        rnd = again.round({"url": served.url + "/get_reward", "scale": "zscore"}, judge, sets=(kept,))
        assert rows(rnd.data.score(*written_run.sampled(rnd, unequal))) == scored and len(served.asked) == before
    assert [reward["name"] for reward in scored[0]["rewards"]] == ["127.0.0.1", "m"]
    assert all(0 <= row["rewards"][1]["value"] < 7 for row in scored)

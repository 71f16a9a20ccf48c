"""A chat model as a judge behind a real endpoint on this machine: the request, and how a score is read."""

from __future__ import annotations

import json

import pytest
from here import QUICKSTART
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from reward_servers import Fault, serving

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.sources import find_sources
from stages.errors import ConfigError, InputError, StageError
from stages.protocols import NoReward
from stages.score.config import JudgeReward
from stages.score.wire.judge import Judge
from stages.score.wire.reading import score_in

RUBRIC = "Is {{ completion }} right for {{ prompt }}? It should be {{ answer }}."


def config(url="http://localhost", **options):
    given = {"rubric": RUBRIC, "timeout_s": 5, "retries": 1, **options}
    return JudgeReward.model_validate({"type": "judge", "url": url, "model": "org/judge", **given})


def judge(served, folder, **options):
    mine = config(served.url + "/v1", **options)
    return Judge(mine, name="mine", cache=folder, rubric=mine.rubric)


@pytest.fixture
def served():
    with serving(judge=lambda text: f"It is fine. Score: {len(text) % 10}/10") as found:
        yield found


def test_an_answer_is_put_into_the_rubric_and_the_score_is_read(served, tmp_path):
    mine = judge(served, tmp_path, system="Be strict", body={"top_p": 1})
    assert mine(["2+2="], ["4"], {"answer": ["4"]}) == [len("Is 4 right for 2+2=? It should be 4.") % 10]
    assert served.asked[0] == {
        "model": "org/judge",
        "messages": [
            {"role": "system", "content": "Be strict"},
            {"role": "user", "content": "Is 4 right for 2+2=? It should be 4."},
        ],
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 512,
        "top_p": 1,
    }


def test_what_an_endpoint_refuses_may_be_left_out(served, tmp_path):
    judge(served, tmp_path, temperature=None, seed=None)(["p"], ["c"], {"answer": [None]})
    assert not {"temperature", "seed"} & served.asked[0].keys()


def test_a_chat_is_shown_message_by_message(served, tmp_path):
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    mine = judge(served, tmp_path, rubric="{{ prompt }}|{{ completion }}")
    mine([chat, chat[1:]], [[{"role": "assistant", "content": "hi"}]] * 2, {"answer": [None] * 2})
    shown = sorted(body["messages"][0]["content"] for body in served.asked)
    assert shown == ["hello|hi", "system: be kind\n\nuser: hello|hi"]


def test_what_an_answer_holds_is_no_template(served, tmp_path):
    judge(served, tmp_path)(["{{ answer }}"], ["{% raw"], {"answer": ["x"]})
    assert served.asked[0]["messages"][0]["content"] == "Is {% raw right for {{ answer }}? It should be x."


def test_a_rubric_that_asks_for_a_column_that_is_not_there(served, tmp_path):
    mine = judge(served, tmp_path, rubric="{{ completion }} {{ level }}")
    refused(lambda: mine(["p"], ["c"], {"answer": [None]}), "level", "mend the rubric", kind=StageError)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({"content": "no idea", "finish_reason": "stop"}, "no score"),
        ({"content": "7", "finish_reason": "length"}, "max_tokens"),
        ({"content": None, "finish_reason": "stop"}, "empty"),
        ({"content": "Score: 11", "finish_reason": "stop"}, "not from 0 to 10"),
    ],
)
def test_a_reply_without_a_score_is_null_says_why_and_is_not_kept(served, tmp_path, reply, says):
    message = {"message": {"content": reply["content"]}, "finish_reason": reply["finish_reason"]}
    served.faults = [Fault(text=json.dumps({"choices": [message]}))]
    mine = judge(served, tmp_path)
    (found,) = mine(["p"], ["c"], {"answer": [None]})
    assert isinstance(found, NoReward) and says in found.reason and len(served.asked) == 1
    (again,) = mine(["p"], ["c"], {"answer": [None]})
    assert isinstance(again, float)


def test_a_reply_that_is_no_completion_is_asked_for_again(served, tmp_path):
    served.faults = [Fault(text='{"choices": []}')]
    (found,) = judge(served, tmp_path)(["p"], ["c"], {"answer": [None]})
    assert isinstance(found, float) and len(served.asked) == 2


def test_another_rubric_model_or_seed_is_another_question_and_another_reading_is_not(served, tmp_path):
    for options in ({}, {"rubric": "Or {{ completion }}"}, {"model": "other"}, {"seed": 1}, {"high": 5.0}, {}):
        judge(served, tmp_path, **options)(["p"], ["c"], {"answer": [None]})
    assert len(served.asked) == 4


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("8", 8.0),
        ("Score: 7.5", 7.5),
        ("I give it 8/10.", 8.0),
        ("8 / 10", 8.0),
        ("First 3, then 9.", 9.0),
        ("**Score: 4**", 4.0),
        ("gpt4 says 5", 5.0),
        ("as in version 1.5.2 of model3b", None),
        ("-1", None),
        ("\N{MINUS SIGN}3", None),
        ("ten", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_score(reply, score):
    found = score_in(reply, config())
    assert found == score if score is not None else isinstance(found, NoReward)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 8}', 8.0),
        ('```json\n{"why": "a {brace}", "score": 6.5}\n```', 6.5),
        ('{"score": 2} and on reflection {"score": 3}', 3.0),
        ('{"score": "4"}', 4.0),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"grade": 8}', None),
        ("{{{{", None),
        ("8", None),
    ],
)
def test_a_field_of_the_last_object_is_the_score(reply, score):
    found = score_in(reply, config(read="json"))
    assert found == score if score is not None else isinstance(found, NoReward)


def test_a_pattern_finds_the_score():
    rule = config(read="pattern", pattern=r"\[\[(\d+)\]\]")
    assert score_in("[[3]] no, [[5]], 9", rule) == 5.0
    assert isinstance(score_in("9", rule), NoReward)


@given(st.text(max_size=60), st.sampled_from(["last_number", "json"]))
def test_no_reply_breaks_the_reading(reply, read):
    found = score_in(reply, config(read=read))
    assert isinstance(found, NoReward) or 0 <= found <= 10


# ---- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rubric": None}, "rubric_file"),
        ({"rubric_file": "x.txt"}, "both"),
        ({"rubric": "{{ completion"}, "line 1"),
        ({"rubric": "how good is it?"}, "{{ completion }}"),
        ({"low": 5, "high": 5}, "high"),
        ({"read": "pattern"}, "one group"),
        ({"pattern": "(a)"}, "read: pattern"),
        ({"read": "pattern", "pattern": "no group"}, "one group"),
        ({"read": "pattern", "pattern": "("}, "one group"),
        ({"url": "localhost:8000"}, "http://"),
        ({"url": "http://h/v1?api_key=abcdefgh"}, "not shown"),
        ({"url": "http://me:abcdefgh@h/v1"}, "not shown"),
        ({"token_env": "abcdefgh-123"}, "not shown"),
    ],
)
def test_settings_that_cannot_be_are_refused_without_what_may_be_secret(options, says):
    reward = {"type": "judge", "url": "http://h", "model": "m", "rubric": RUBRIC, **options}
    given = f"score.rewards={json.dumps([{key: value for key, value in reward.items() if value is not None}])}"
    error = refused(lambda: load_config(QUICKSTART, [given]), says, "score.rewards.0.", kind=ConfigError)
    assert "abcdefgh" not in str(error)


def test_an_unknown_type_and_an_unknown_key_are_told_from_the_known():
    refused(lambda: load_config(QUICKSTART, ["score.rewards=[{type: rpc}]"]), "model or function or http or judge")
    unknown = "score.rewards=[{type: http, url: 'http://h', batchsize: 3}]"
    refused(lambda: load_config(QUICKSTART, [unknown]), "did you mean score.rewards.0.batch_size?")


def rewarded(**options):
    reward = {"type": "judge", "url": "http://localhost", "model": "m", **options}
    return Config.model_validate(
        {
            "run": {"name": "x"},
            "policy": {"path": "nowhere"},
            "prompts": {"path": "nowhere.jsonl"},
            "score": {"rewards": [reward]},
        }
    )


def source(**options):
    (found,) = find_sources(rewarded(**options), needs=("rewards",)).of(1).rewards
    return found


def test_a_rubric_file_is_found_beside_the_config_and_its_content_is_what_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(lambda: source(rubric_file="rubric.txt"), "no file rubric.txt", kind=InputError)
    (tmp_path / "rubric.txt").write_text("Rate {{ completion }}")
    (tmp_path / "same.txt").write_text("Rate {{ completion }}")
    first = source(rubric_file="rubric.txt")
    assert first.rubric == "Rate {{ completion }}"
    assert first.identity() == source(rubric_file="same.txt").identity() == source(rubric=first.rubric).identity()
    assert first.identity() != source(rubric="Grade {{ completion }}").identity()
    (tmp_path / "rubric.txt").write_text("Rate it")
    refused(lambda: source(rubric_file="rubric.txt"), "rubric.txt", "{{ completion }}")


def test_a_token_is_missed_before_anything_starts(monkeypatch):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    refused(lambda: source(rubric=RUBRIC, token_env="JUDGE_TOKEN"), "JUDGE_TOKEN", kind=InputError)

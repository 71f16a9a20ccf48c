"""Rewards by a reward server, which is a real one on this machine: what is asked, what faults do, what is kept."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest
from refusals import refused
from reward_servers import Fault, serving

from stages.errors import InputError, StageError
from stages.protocols import NoReward
from stages.score.config import HttpReward
from stages.score.wire.cache import Cache
from stages.score.wire.client import Client, Refused
from stages.score.wire.server import RewardServer

PROMPTS, ANSWERS = ["p1", "p1", "p22", "p22"], ["a", "bb", "ccc", "dddd"]
LENGTHS = [1.0, 2.0, 3.0, 4.0]
COLUMNS = {"answer": ["x", None, "y", "z"]}


@pytest.fixture
def served():
    with serving() as found:
        yield found


def reward(served, folder, path="/get_reward", **options):
    config = HttpReward(type="http", url=served.url + path, **{"timeout_s": 5, "retries": 1, **options})
    return RewardServer(config, name="mine", cache=folder)


def asked(served, folder, **options):
    return reward(served, folder, **options)(PROMPTS, ANSWERS, COLUMNS)


def test_it_is_asked_as_openrlhf_asks(served, tmp_path):
    assert asked(served, tmp_path) == LENGTHS
    (body,) = served.asked
    assert body == {"query": ["p1a", "p1bb", "p22ccc", "p22dddd"], "prompts": PROMPTS, "labels": ["x", None, "y", "z"]}


def test_the_numbers_may_stand_under_another_name_and_in_lists_of_one(served, tmp_path):
    served.faults = [Fault(text='{"scores": [[1], [2.5], [3], [4]]}')]
    assert asked(served, tmp_path, field="scores") == [1.0, 2.5, 3.0, 4.0]


def test_classify_is_asked_as_verl_asks_it_and_its_rows_are_put_in_order(served, tmp_path):
    found = asked(served, tmp_path, path="/classify", protocol="classify", model="rm")
    assert found == [3.0, 4.0, 6.0, 7.0]
    (body,) = served.asked
    assert body == {"model": "rm", "use_activation": False, "input": ["p1a", "p1bb", "p22ccc", "p22dddd"]}


def test_chats_go_to_classify_as_messages_one_by_one(served, tmp_path):
    mine = reward(served, tmp_path, path="/classify", protocol="classify", model="rm")
    assert mine.sees == "turns"
    chat, answer = [{"role": "user", "content": "why?"}], [{"role": "assistant", "content": "so"}]
    assert mine([chat], [answer], {"answer": [None]}) == [2.0]
    assert served.asked[0]["messages"] == [*chat, *answer]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batches_change_nothing(served, tmp_path, batch_size):
    assert asked(served, tmp_path, batch_size=batch_size) == LENGTHS
    assert len(served.asked) == -(-4 // batch_size)


# ---- faults ---------------------------------------------------------------------------------------------------------

PASSING = {
    "500": Fault(status=500, text="oops", headers={"Retry-After": "0"}),
    "503": Fault(status=503, headers={"Retry-After": "0"}),
    "429": Fault(status=429, headers={"Retry-After": "0.2"}),
    "a late reply": Fault(wait_s=4),
    "no JSON": Fault(text="<html>hello</html>"),
    "too few": Fault(text='{"rewards": [1.0]}'),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(served, tmp_path, fault):
    served.faults = [PASSING[fault]]
    assert asked(served, tmp_path, timeout_s=1.5 if fault == "a late reply" else 5) == LENGTHS
    assert len(served.asked) == 2


@pytest.mark.parametrize("reply", ['{"error": "busy"}', "[]", "3", "null", '{"rewards": 1}', '{"rewards": [1, 2, 3]}'])
def test_another_shape_or_number_is_no_reply(served, tmp_path, reply):
    with pytest.raises(Refused):
        reward(served, tmp_path).replies(json.loads(reply), 2)
    with pytest.raises(Refused):
        reward(served, tmp_path, protocol="classify", model="rm").replies(json.loads(reply), 2)


@pytest.mark.parametrize("header", ["1", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_a_server_that_asks_for_time_gets_it(served, tmp_path, header):
    served.faults = [Fault(status=429, headers={"Retry-After": header})]
    assert asked(served, tmp_path) == LENGTHS
    assert header != "1" or served.times[1] - served.times[0] >= 1


def test_time_that_a_server_asks_for_it_gets_from_every_request(served):
    served.faults = [Fault(status=429, headers={"Retry-After": "0.5"})]
    client = Client(HttpReward(type="http", url=served.url), url=served.url + "/get_reward", where="here")
    body = {"query": [], "prompts": [], "labels": []}
    with pytest.raises(Refused, match="429"):
        client.ask(body, dict, tries=1)
    assert client.ask(body, dict, tries=1) == {"rewards": []}
    assert served.times[1] - served.times[0] >= 0.5


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null", '"good"', "true", "[1, 2]", "1" + "0" * 400])
def test_what_is_no_number_is_no_reward_for_that_answer_alone_and_says_why(served, tmp_path, value):
    served.faults = [Fault(text=f'{{"rewards": [1, {value}, 3, 4]}}')]
    one, other, *rest = asked(served, tmp_path)
    assert (one, *rest) == (1.0, 3.0, 4.0)
    assert isinstance(other, NoReward) and other.reason


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_batch_that_is_refused_is_asked_answer_by_answer(served, tmp_path, status):
    served.faults = [Fault(status=status), Fault(), Fault(status=status, text="too long")]
    found = asked(served, tmp_path, concurrency=1)
    assert [found[0], *found[2:]] == [1.0, 3.0, 4.0]
    assert f"HTTP {status}" in found[1].reason and "too long" in found[1].reason


def test_answers_that_break_a_healthy_server_are_null_however_many_stand_together(served, tmp_path):
    served.poison = "bad"
    answers = ["a", *[f"bad {number}" for number in range(7)], "ccc"]
    mine = reward(served, tmp_path, retries=0, batch_size=1, concurrency=1)
    found = mine(["p"] * 9, answers, {"answer": [None] * 9})
    assert [found[0], found[-1]] == [1.0, 3.0]
    assert all("HTTP 500" in none.reason for none in found[1:-1])


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405])
def test_what_no_try_can_change_ends_the_run_at_once(served, tmp_path, status):
    served.faults = [Fault(status=status, headers={"Location": "/elsewhere"})] * 9
    says = "token_env" if status in (401, 403) else "check url"
    refused(lambda: asked(served, tmp_path, retries=9), f"HTTP {status}", says, "mine", kind=StageError)
    assert len(served.asked) == 1


def test_nobody_at_the_address(tmp_path):
    with serving() as served:
        pass
    began = time.monotonic()
    error = refused(lambda: asked(served, tmp_path), "no connection", "2 times", "carries on", kind=StageError)
    assert served.url in str(error) and time.monotonic() - began < 20


def test_a_server_that_answers_nothing_ends_the_run_within_its_timeouts(served, tmp_path):
    served.faults = [Fault(wait_s=30)] * 99
    began = time.monotonic()
    refused(lambda: asked(served, tmp_path, timeout_s=0.3, retries=1), "no reply within 0.3 s", kind=StageError)
    assert time.monotonic() - began < 20


def test_a_server_that_dies_under_way_and_comes_back_is_asked_only_for_the_rest(tmp_path):
    with serving() as served:
        port = int(served.url.rpartition(":")[2])
        mine = reward(served, tmp_path, batch_size=1, concurrency=1)
        assert mine(PROMPTS[:2], ANSWERS[:2], {"answer": ["x", None]}) == LENGTHS[:2]
    refused(lambda: mine(PROMPTS, ANSWERS, COLUMNS), "no connection", kind=StageError)
    with serving(port=port) as served:
        assert reward(served, tmp_path)(PROMPTS, ANSWERS, COLUMNS) == LENGTHS
        assert served.asked[0]["query"] == ["p22ccc", "p22dddd"]


def test_requests_keep_the_pace(served, tmp_path):
    mine = reward(served, tmp_path, batch_size=1, requests_per_second=10)
    began = time.monotonic()
    mine(["p"] * 5, list("abcde"), {"answer": [None] * 5})
    assert max(served.times) - began >= 0.4


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("header", "shown"), [("Authorization", "Bearer very-secret"), ("x-api-key", "very-secret")])
def test_a_token_comes_from_the_environment_and_is_shown_to_the_server_alone(
    served, tmp_path, monkeypatch, header, shown
):
    monkeypatch.setenv("MY_TOKEN", "very-secret")
    served.faults = [Fault(status=403, text="not with very-secret")]
    ask = lambda: asked(served, tmp_path, token_env="MY_TOKEN", token_header=header)  # noqa: E731
    error = refused(ask, "MY_TOKEN", "HTTP 403", kind=StageError)
    assert "very-secret" not in str(error)
    assert ask() == LENGTHS
    assert {name.lower(): value for name, value in served.headers[-1].items()}[header.lower()] == shown
    assert all(b"very-secret" not in file.read_bytes() for file in tmp_path.iterdir())


def test_a_token_that_is_not_there(served, tmp_path, monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    refused(lambda: asked(served, tmp_path, token_env="MY_TOKEN"), "MY_TOKEN", "export", kind=InputError)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(served, tmp_path):
    assert asked(served, tmp_path) == asked(served, tmp_path) == LENGTHS
    assert served.num_answers == 4


def test_equal_answers_are_asked_once(served, tmp_path):
    assert reward(served, tmp_path)(["p"] * 3, ["a", "a", "bb"], {"answer": [None] * 3}) == [1.0, 1.0, 2.0]
    assert served.num_answers == 2


def test_another_address_prompt_or_label_is_another_question(served, tmp_path):
    mine = reward(served, tmp_path)
    mine(["p"], ["a"], {"answer": [None]})
    mine(["q"], ["a"], {"answer": [None]})
    mine(["p"], ["a"], {"answer": ["x"]})
    reward(served, tmp_path, path="/get_reward?v=2")(["p"], ["a"], {"answer": [None]})
    assert served.num_answers == 4


def test_a_version_stands_for_the_address(tmp_path):
    for _ in range(2):
        with serving() as served:
            assert asked(served, tmp_path, version="rm-1") == LENGTHS
    assert served.num_answers == 0
    one, other = (
        HttpReward(type="http", url=f"http://{host}/x", version="rm-1", timeout_s=seconds).identity()
        for host, seconds in (("a", 1), ("b", 2))
    )
    assert one == other
    assert HttpReward(type="http", url="http://a").identity() != HttpReward(type="http", url="http://b").identity()


def test_what_was_no_reward_is_asked_again(served, tmp_path):
    served.faults = [Fault(text='{"rewards": [1, NaN, 3, 4]}')]
    asked(served, tmp_path)
    assert asked(served, tmp_path) == LENGTHS
    assert served.asked[-1]["query"] == ["p1bb"]


def _ask_all(url, folder, start):
    mine = RewardServer(HttpReward(type="http", url=url, batch_size=2), name="mine", cache=folder)
    answers = ["x" * (1 + (start + number) % 60) for number in range(60)]
    return mine(["p"] * 60, answers, {"answer": [None] * 60}) == [float(len(answer)) for answer in answers]


def test_several_scorers_share_what_is_kept(served, tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        url = served.url + "/get_reward"
        assert all(pool.starmap(_ask_all, [(url, tmp_path, start) for start in (0, 20, 40)]))
    before = served.num_answers
    assert _ask_all(url, tmp_path, 7) and served.num_answers == before


def _keep_until_killed(folder, begun):
    cache = Cache(folder)
    for number in range(10**9):
        cache.keep({number.to_bytes(8, "big"): number})
        begun.set()


def test_a_kill_loses_nothing_that_was_kept_and_harms_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    writer = context.Process(target=_keep_until_killed, args=(tmp_path, begun))
    writer.start()
    assert begun.wait(20)
    time.sleep(0.1)
    writer.kill()
    writer.join()
    cache = Cache(tmp_path)
    found = cache.found([number.to_bytes(8, "big") for number in range(5000)])
    assert sorted(found.values()) == list(range(len(found))) and found
    cache.keep({b"more": "text"})
    assert cache.found([b"more"]) == {b"more": "text"}


def test_a_damaged_file_is_named(served, tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"this is no database, however long one looks at it" * 99)
    refused(lambda: asked(served, tmp_path), "answers.sqlite", "delete it", "score.cache", kind=StageError)

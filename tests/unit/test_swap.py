"""Real engines that are given trained weights: in place they hold what a new engine would, and a fault is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny_models
from ranks import on_ranks
from swap_cases import make_cases, tensors_of, with_old_tensor

from stages.errors import StageError
from stages.protocols import SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.sample.swap import take
from stages.sample.vllm_sampler import VLLMSampler

pytestmark = pytest.mark.slow

CONFIG = SampleConfig(num_generations=4, max_new_tokens=24)
NATURAL = [(name, kind.tied) for name, kind in tiny_models.KINDS.items()]
CASES = [*NATURAL, ("llama", True), ("gpt2", False), ("gpt_neox", True)]
FAULTY = [("llama", False), ("qwen3", True), ("gpt2", True)]
STARTED = [*FAULTY, ("gpt_neox", True)]


class Sampler(VLLMSampler):
    """An engine to which another folder can be slipped when it takes weights in place."""

    slipped: Path | None = None

    def _take_in_place(self, weights: Weights, parts: Mapping[str, str]) -> str:
        return super()._take_in_place(replace(weights, path=self.slipped or weights.path), parts)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    (found,) = on_ranks(1, make_cases, tmp_path_factory.mktemp("cases"), CASES)
    return found


@pytest.fixture(scope="module")
def engine():
    engine = Sampler(CONFIG, dtype="float32", num_threads=2, use_gpu=False, seed=0)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def case(request, cases):
    """One of `CASES`; of the module's scope, so that tests of one case follow each other and share an engine."""
    return cases[request.param]


@pytest.fixture(autouse=True)
def _nothing_slipped(engine):
    engine.slipped = None


def answers_of(engine, probe):
    requests = [SampleRequest(list(ids), 1000 * i) for i, ids in enumerate(probe.prompt_token_ids[::8])]
    return requests, [answer for answers in engine.generate(requests, CONFIG) for answer in answers]


@pytest.mark.parametrize("case", CASES, indirect=True, ids=str)
def test_an_engine_that_takes_trained_weights_says_what_transformers_says(engine, case):
    engine.load(Weights.found(case.start, round=0))
    report = take(engine, Weights.found(case.result, round=1), case.probe)
    (attempt,) = report.attempts
    assert report.verdict.kind == "proved", str(report.verdict)
    assert (attempt.loading.way == "in place") != ("mixtral" in str(case.start)), attempt.loading.reason
    assert ("experts" in attempt.loading.reason) == ("mixtral" in str(case.start))
    json.dumps(asdict(report), allow_nan=False)

    asked = engine.logps(case.probe.prompt_token_ids, case.probe.response_token_ids)
    gaps = [abs(a - b) / len(ids) for a, b, ids in zip(asked, case.plain, case.probe.response_token_ids, strict=True)]
    assert sum(gaps) / len(gaps) < 1e-4 and max(gaps) < 1e-3
    requests, answers = answers_of(engine, case.probe)
    prompts = [request.prompt_token_ids for request in requests for _ in range(CONFIG.num_generations)]
    again = engine.logps(prompts, [answer.token_ids for answer in answers])
    assert [sum(answer.logps) for answer in answers] == pytest.approx(again, abs=1e-4 * CONFIG.max_new_tokens)


@pytest.mark.parametrize("case", STARTED, indirect=True, ids=str)
def test_weights_in_place_give_the_samples_of_an_engine_started_on_them(engine, case):
    engine.load(Weights.found(case.start, round=0))
    result = Weights.found(case.result, round=1)
    assert engine.load(result).way == "in place"
    taken = answers_of(engine, case.probe)[1]
    assert engine.load(result, afresh=True).way == "started"
    assert answers_of(engine, case.probe)[1] == taken


@pytest.mark.parametrize("case", FAULTY, indirect=True, ids=str)
def test_a_tensor_that_stayed_old_is_seen_whichever_it_is(engine, case, tmp_path):
    engine.load(Weights.found(case.start, round=0))
    unseen = {}
    for number, tensor in enumerate(tensors_of(case)):
        loading = engine.load(with_old_tensor(case, tensor, tmp_path / str(number)))
        assert loading.way == "in place"
        verdict = case.probe.judge(engine.logps(case.probe.prompt_token_ids, case.probe.response_token_ids))
        if verdict.kind != "failed":
            unseen[tensor] = str(verdict)
    assert not unseen
    assert take(engine, Weights.found(case.result, round=1), case.probe).verdict.kind == "proved"


@pytest.mark.parametrize("case", FAULTY[:2], indirect=True, ids=str)
def test_a_restart_mends_what_was_taken_wrongly_and_the_report_has_both(engine, case, tmp_path):
    engine.load(Weights.found(case.start, round=0))
    embeddings = next(tensor for tensor in tensors_of(case) if "embed" in tensor)
    engine.slipped = with_old_tensor(case, embeddings, tmp_path / "faulty").path
    report = take(engine, Weights.found(case.result, round=1), case.probe)
    assert [(a.loading.way, a.verdict.kind) for a in report.attempts] == [("in place", "failed"), ("started", "proved")]
    assert engine.load(Weights.found(case.result, round=1)).way == "held"
    assert report.seconds > report.attempts[0].probe_s > 0
    json.dumps(asdict(report), allow_nan=False)


@pytest.mark.parametrize("case", FAULTY[:1], indirect=True, ids=str)
def test_a_folder_that_is_not_what_the_trainer_holds_is_refused_with_figures(engine, case):
    probe = replace(case.probe, new=case.probe.old, old=case.probe.new)
    engine.load(Weights.found(case.start, round=0))
    with pytest.raises(StageError, match=r"in place: failed: the engine is .* nats a token") as caught:
        take(engine, Weights.found(case.result, round=1), probe)
    assert "started: failed" in caught.value.got


@pytest.mark.parametrize("case", FAULTY[:1], indirect=True, ids=str)
def test_an_update_too_small_to_be_seen_is_called_so(engine, case):
    engine.load(Weights.found(case.start, round=0))
    probe = replace(case.probe, new=case.probe.old)
    assert take(engine, Weights.found(case.start, round=1), probe).verdict.kind == "not distinguishable"


@pytest.mark.parametrize("case", FAULTY[:1], indirect=True, ids=str)
def test_a_log_prob_that_the_engine_does_not_give_fails(engine, case):
    probe = replace(case.probe, new=[float("nan"), *case.probe.new[1:]])
    with pytest.raises(StageError, match="not finite"):
        take(engine, Weights.found(case.start, round=0), probe)


@pytest.mark.parametrize("case", FAULTY[:1], indirect=True, ids=str)
def test_other_eos_tokens_mean_a_new_engine_that_stops_at_them(engine, case, tmp_path):
    engine.load(Weights.found(case.result, round=1))
    requests, answers = answers_of(engine, case.probe)
    engine.load(Weights.found(case.start, round=0))
    changed = shutil.copytree(case.result, tmp_path / "changed")
    file = changed / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [answers[0].token_ids[1]]}))
    loading = engine.load(Weights.found(changed, round=1))
    assert (loading.way, "EOS" in loading.reason) == ("started", True)
    assert engine.generate(requests, CONFIG)[0][0].token_ids == answers[0].token_ids[:2]

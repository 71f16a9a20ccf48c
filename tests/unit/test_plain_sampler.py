"""The sampler of the robustness study on a tiny real model: its answers are the model's, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.robustness.sampler import PlainSampler
from stages.protocols import SampleRequest, Weights
from stages.sample.config import SampleConfig

PROMPTS = [[1, 8, 5, 9, 14], [1, 7, 14], [1, 4, 4, 4, 4, 4, 14]]
HOW = SampleConfig(num_generations=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def sampler(policy_folder):
    found = PlainSampler()
    found.load(Weights.found(policy_folder, round=0))
    return found


def test_an_answer_is_the_same_alone_and_beside_longer_prompts(sampler):
    requests = [SampleRequest(prompt, 100 * number) for number, prompt in enumerate(PROMPTS)]
    together = sampler.generate(requests, HOW)
    alone = [sampler.generate([request], HOW)[0] for request in requests]
    assert [[a.token_ids for a in row] for row in together] == [[a.token_ids for a in row] for row in alone]
    assert len({tuple(a.token_ids) for row in together for a in row}) > 3


def test_sampled_log_probs_are_those_of_the_whole_answers(sampler):
    answers = [row[0] for row in sampler.generate([SampleRequest(prompt, 7) for prompt in PROMPTS], HOW)]
    again = sampler.logps(PROMPTS, [answer.token_ids for answer in answers])
    assert [sum(answer.logps) for answer in answers] == pytest.approx(again, abs=1e-4)


def test_greedy_answers_are_those_of_transformers(sampler, policy_folder):
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    for prompt, answer in zip(PROMPTS, sampler.greedy(PROMPTS, max_new_tokens=6), strict=True):
        row = torch.tensor([prompt])
        expected = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=6)
        assert expected[0, len(prompt) :].tolist() == answer.token_ids

"""Reward models of many architectures: a score is the answer's alone, through the model's own tokenizer.

The file's name puts it before those that start an engine: vLLM changes classes of transformers in its process.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

from stages.errors import InputError
from stages.score.config import ModelReward
from stages.score.reward_model import RewardModel

ANSWERS = ["Yes", "perhaps the river", "", "Because the water falls, and the wheel turns", "12, 345", "no no no"]
PROMPT = "Why does rain fall? "
QUICK = ("qwen3", "gemma2", "gpt2", "roberta")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*tiny_models.KINDS, *tiny_models.ENCODERS)
]


class Folders:
    """Reward models by name, each written when it is first asked for."""

    def __init__(self, root):
        self.root = root

    def __getitem__(self, name):
        folder = self.root / name
        return folder if folder.exists() else tiny_models.judge(name, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("judges"))


def judge(folders, name, **options):
    pad = (tiny_models.KINDS | tiny_models.ENCODERS)[name].pad_token
    config = ModelReward(type="model", path="x", pad_token=pad, **options)
    return RewardModel(
        config, name="judge", folder=folders[name], key="score.rewards.0.path", num_threads=1, use_gpu=False
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_plain_transformers_and_does_not_depend_on_its_batch(folders, name):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    model = AutoModelForSequenceClassification.from_pretrained(folders[name], attn_implementation="eager").eval()
    with torch.no_grad():
        plain = [model(**tokenizer(PROMPT + answer, return_tensors="pt")).logits.item() for answer in ANSWERS]
    scores = judge(folders, name)
    prompts = [PROMPT] * len(ANSWERS)
    assert scores(prompts, ANSWERS, {}) == pytest.approx(plain, abs=1e-4)
    assert scores(prompts, ANSWERS[::-1], {})[::-1] == pytest.approx(plain, abs=1e-4)
    assert judge(folders, name, batch_tokens=1)(prompts, ANSWERS, {}) == pytest.approx(plain, abs=1e-4)
    assert len({round(score, 3) for score in plain}) == len(ANSWERS)


@pytest.mark.parametrize("name", ["bert", "roberta", pytest.param("deberta", marks=pytest.mark.slow)])
def test_an_encoder_may_take_prompt_and_answer_as_two_segments(folders, name):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    model = AutoModelForSequenceClassification.from_pretrained(folders[name]).eval()
    with torch.no_grad():
        plain = [model(**tokenizer(PROMPT, answer, return_tensors="pt")).logits.item() for answer in ANSWERS]
    prompts = [PROMPT] * len(ANSWERS)
    pairs = judge(folders, name, text_pair=True)(prompts, ANSWERS, {})
    assert pairs == pytest.approx(plain, abs=1e-4)
    assert pairs != pytest.approx(judge(folders, name)(prompts, ANSWERS, {}), abs=1e-3)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_a_text_as_long_as_the_context_has_a_score_and_a_longer_one_has_none(folders, name):
    from transformers import AutoTokenizer

    tokenizer, context = AutoTokenizer.from_pretrained(folders[name]), 64 if name in tiny_models.ENCODERS else 160
    words = next(n for n in range(1, 200) if len(tokenizer(" river" * n).input_ids) >= context)
    longest = " river" * words
    assert len(tokenizer(longest).input_ids) == context
    assert [score is None for score in judge(folders, name)(["", ""], [longest, longest + " river"], {})] == [
        False,
        True,
    ]


CHAT = [{"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": "Because"}]


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_a_chat_has_the_tokens_of_the_reward_models_own_template(folders, name):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    ids = tokenizer.apply_chat_template([*CHAT, *ANSWER], tokenize=True, return_dict=False)
    model = AutoModelForSequenceClassification.from_pretrained(folders[name], attn_implementation="eager").eval()
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits.item()
    assert judge(folders, name)([CHAT], [ANSWER], {}) == pytest.approx([plain], abs=1e-4)


def test_a_reward_models_template_may_have_arguments_and_may_refuse(folders):
    loud = tiny_models.CHATML + "{% if loud is defined %}!{% endif %}"
    (folders["qwen3"] / "chat_template.jinja").write_text(loud)
    calm, shouted = (judge(folders, "qwen3", chat_template_kwargs=k)([CHAT], [ANSWER], {}) for k in ({}, {"loud": 1}))
    assert calm != shouted
    with pytest.raises(InputError, match="System role not supported"):
        judge(folders, "gemma2")([[{"role": "system", "content": "Be kind"}, *CHAT]], [ANSWER], {})
    for name in ("gpt2", "bert"):
        with pytest.raises(InputError, match="chat template"):
            judge(folders, name)([CHAT], [ANSWER], {})

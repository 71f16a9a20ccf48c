"""Rewards: a score is the answer's alone, and what cannot be scored is null, never a number."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.models import check_policy, check_reward
from stages.contracts import CANDIDATES, PROMPTS
from stages.errors import InputError, StageError
from stages.score.config import ModelReward
from stages.score.functions import FunctionScorer, exact_match, find_function
from stages.score.reward_model import RewardModel
from stages.score.stage import score
from stages.tokenizers import load_tokenizer


def judge(folder, **options):
    config = ModelReward(type="model", path="x", **options)
    return RewardModel(config, name="judge", folder=folder, key="score.rewards.0.path", num_threads=1, use_gpu=False)


PROMPT = "48315>"
ANSWERS = ["51384", "5138", "", "51384513845138", "0", "51388", "91384"]


def test_a_score_does_not_depend_on_the_batch_it_was_in(judge_folder):
    together = judge(judge_folder)([PROMPT] * len(ANSWERS), ANSWERS, {})
    alone = [judge(judge_folder)([PROMPT], [answer], {})[0] for answer in ANSWERS]
    small = judge(judge_folder, batch_tokens=16)([PROMPT] * len(ANSWERS), ANSWERS, {})
    backwards = judge(judge_folder)([PROMPT] * len(ANSWERS), ANSWERS[::-1], {})[::-1]
    for other in (together, small, backwards):
        assert other == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 3) for value in alone}) == len(ANSWERS)


def test_an_answer_beyond_the_reward_models_context_has_no_score(judge_folder):
    scores = judge(judge_folder)([PROMPT, PROMPT], ["1" * 40, "51384"], {})
    assert scores[0] is None and scores[1] is not None


def test_a_reward_model_that_rested_scores_as_before_and_refuses_other_weights(judge_folder, tmp_path):
    folder = shutil.copytree(judge_folder, tmp_path / "judge")
    model = judge(folder)
    before = model([PROMPT] * len(ANSWERS), ANSWERS, {})
    model.rest()
    model.rest()
    assert model([PROMPT] * len(ANSWERS), ANSWERS, {}) == before
    model.rest()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(StageError, match="weights with sha256"):
        model([PROMPT], ["1"], {})


def test_a_chat_goes_through_the_reward_models_own_template(judge_folder, tmp_path):
    folder = shutil.copytree(judge_folder, tmp_path / "chat")
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}>{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    chat, completion = [{"role": "user", "content": "48315"}], [{"role": "assistant", "content": "51384"}]
    as_chat = judge(folder)([chat], [completion], {})
    assert as_chat == pytest.approx(judge(folder)(["48315>"], ["51384"], {}), abs=1e-6)
    with pytest.raises(InputError, match="chat template"):
        judge(judge_folder)([chat], [completion], {})


def edited(folder, target, **changes):
    """A copy of a model folder with keys of its config files changed (None removes one)."""
    shutil.copytree(folder, target)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((target / name).read_text())
        for key, value in changes.items():
            if key in content or (key == "id2label" and name == "config.json"):
                content[key] = value
                if value is None:
                    del content[key]
        (target / name).write_text(json.dumps(content))
    return target


def test_a_classifier_of_several_classes_is_refused_from_its_config_alone(judge_folder, tmp_path):
    labels = {str(i): f"L{i}" for i in range(3)}
    with pytest.raises(InputError, match="3 classes"):
        check_reward(edited(judge_folder, tmp_path / "three", id2label=labels), key="k")
    with pytest.raises(InputError, match="2 classes"):
        check_reward(edited(judge_folder, tmp_path / "two", id2label=None), key="k")


def test_each_kind_of_model_is_refused_in_the_others_place(judge_folder, policy_folder):
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        check_reward(policy_folder, key="k")
    with pytest.raises(InputError, match="score.rewards"):
        check_policy(judge_folder, key="k")


def test_pickled_weights_are_refused_unopened(policy_folder, tmp_path):
    target = shutil.copytree(policy_folder, tmp_path / "pickled")
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        check_policy(target, key="k")


def test_weights_that_end_too_early_are_refused_before_anything_loads_them(policy_folder, tmp_path):
    target = shutil.copytree(policy_folder, tmp_path / "cut")
    content = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="model.safetensors"):
        check_policy(target, key="k")


def test_a_tokenizer_without_eos_or_pad_is_refused_with_the_fix(policy_folder, tmp_path):
    no_pad = edited(policy_folder, tmp_path / "no_pad", pad_token=None)
    with pytest.raises(InputError) as caught:
        load_tokenizer(no_pad, pad_token=None, key="policy.path")
    assert "--set policy.pad_token='</s>'" in caught.value.fix
    assert load_tokenizer(no_pad, pad_token="</s>", key="policy.path").pad_token_id == 2
    with pytest.raises(InputError, match="token of the tokenizer"):
        load_tokenizer(no_pad, pad_token="<nope>", key="policy.path")
    with pytest.raises(InputError, match="EOS"):
        load_tokenizer(edited(policy_folder, tmp_path / "no_eos", eos_token=None), pad_token=None, key="policy.path")


# ---- functions ------------------------------------------------------------------------------------------------------


def half(prompts, completions, **columns):
    return [0.5, None, float("nan"), float("inf")][: len(completions)]


def too_few(prompts, completions, **columns):
    return [1.0]


def raises(prompts, completions, **columns):
    raise KeyError("level")


def of_columns(prompts, completions, answer, level, **columns):
    return [float(a == c) + n for a, c, n in zip(answer, completions, level, strict=True)]


def tables(completions):
    prompts = PROMPTS.table(
        [
            dict(
                prompt_id="p",
                round=1,
                prompt="48315>",
                conversation=None,
                prompt_token_ids=[1],
                answer="51384",
                extra='{"level": 3}',
            )
        ]
    )
    candidates = CANDIDATES.table(
        dict(
            response_id=f"r{i}",
            prompt_id="p",
            round=1,
            stream="policy",
            sample_index=i,
            response=text,
            response_token_ids=[5],
            response_logps=[-1.0],
            finish_reason="stop",
            policy_version="w",
            policy_round=0,
            seed=i,
        )
        for i, text in enumerate(completions)
    )
    return prompts, candidates


def scorer(name, **options):
    return FunctionScorer(name, options.get("role", "main"), options.get("weight", 1.0), f"{__name__}:{name}")


def test_a_reward_that_is_missing_or_not_finite_stays_null():
    table = score(*tables(["a", "b", "c", "d"]), [scorer("half")], round=1)
    assert table["reward"].to_pylist() == [0.5, None, None, None]


def test_main_rewards_are_summed_by_weight_and_holdout_ones_are_only_shown():
    rewards = [scorer("of_columns", weight=2.0), scorer("half", role="holdout")]
    table = score(*tables(["51384", "1"]), rewards, round=1)
    assert table["reward"].to_pylist() == [8.0, 6.0]
    assert [r["value"] for r in table["rewards"].to_pylist()[0]] == [4.0, 0.5]


@pytest.mark.parametrize("name", ["too_few", "raises"])
def test_a_function_that_misbehaves_is_named(name):
    with pytest.raises(StageError, match=name):
        score(*tables(["a", "b"]), [scorer(name)], round=1)


def test_a_function_that_is_not_there_is_refused():
    for target in ("no.such.module:f", f"{__name__}:nope", f"{__name__}:PROMPT"):
        with pytest.raises(InputError, match="target"):
            find_function(target)


def test_exact_match_ignores_outer_space_and_needs_a_truth():
    assert exact_match(["p"] * 3, [" 18 ", "19", "x"], ["18", "18", None]) == [1.0, 0.0, None]
    assert exact_match(["p"], [[{"role": "assistant", "content": "18"}]], ["18"]) == [1.0]

"""Chats and their templates: rendered once, one BOS, refused in the template's own words; texts that do not survive."""

from __future__ import annotations

import json

import pytest
import tiny_models

from pipeline.prompts import Form, count_changed, distinct, prompt_rows
from stages.errors import ConfigError, InputError
from stages.score.config import ModelReward, check_template_kwargs
from stages.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("tokenizers"), {}
    for name, kind in tiny_models.KINDS.items():
        (root / name).mkdir()
        kind.write_tokenizer(root / name)
        found[name] = load_tokenizer(root / name, pad_token=kind.pad_token, key="policy.path")
    return found


def table_of(tokenizer, *prompts, **form):
    rows = [(f"here row {i}", {"prompt": prompt}) for i, prompt in enumerate(prompts, start=1)]
    return distinct(prompt_rows(rows, tokenizer, form=Form(**form)))[0]


def user(text):
    return {"role": "user", "content": text}


CHAT_KINDS = [name for name, kind in tiny_models.KINDS.items() if kind.chat]


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_a_chat_is_rendered_by_its_template_and_has_the_tokens_that_transformers_gives_it(tokenizers, name):
    tokenizer, chat = tokenizers[name], [user("Name a colour"), {"role": "assistant", "content": "Red"}, user("Why?")]
    row = table_of(tokenizer, chat).to_pylist()[0]
    assert row["conversation"] == chat
    assert row["prompt"] == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert row["prompt_token_ids"] == expected
    assert expected.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_a_text_becomes_a_chat_of_one_user_message_when_asked_to(tokenizers, name):
    text, chat = (table_of(tokenizers[name], p, to_chat=True) for p in ("Name a colour", [user("Name a colour")]))
    assert text == chat
    assert table_of(tokenizers[name], "Name a colour")["conversation"].to_pylist() == [None]


def test_a_system_message_is_put_before_a_chat_that_has_none(tokenizers):
    own = [{"role": "system", "content": "Be brief"}, user("Why?")]
    table = table_of(tokenizers["qwen3"], [user("Why?")], own, system="Be kind")
    assert [chat[0]["content"] for chat in table["conversation"].to_pylist()] == ["Be kind", "Be brief"]
    assert "Be kind" in table["prompt"][0].as_py() and "Be kind" not in table["prompt"][1].as_py()
    as_text = table_of(tokenizers["qwen3"], "Why?", to_chat=True, system="Be kind")
    assert as_text["prompt"][0] == table["prompt"][0]


def test_template_arguments_reach_the_template_and_a_misspelt_one_is_refused(tokenizers):
    silent = table_of(tokenizers["qwen3"], [user("Why?")], chat_template_kwargs={"enable_thinking": False})
    aloud = table_of(tokenizers["qwen3"], [user("Why?")])
    assert silent["prompt"][0].as_py() == aloud["prompt"][0].as_py() + "<think>\n\n</think>\n\n"
    with pytest.raises(InputError, match="enable_thinkng"):
        table_of(tokenizers["qwen3"], [user("Why?")], chat_template_kwargs={"enable_thinkng": False})


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "return_dict"])
def test_what_is_not_the_templates_to_decide_is_refused_in_the_config(name):
    with pytest.raises(ConfigError, match=name):
        check_template_kwargs({name: True})
    with pytest.raises(ValueError, match=name):
        ModelReward(type="model", path="x", chat_template_kwargs={name: True})


def system(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("name", "chat", "says"),
    [
        ("gemma2", [system("Be kind"), user("Why?")], "System role not supported"),
        ("mistral", [user("Why?"), user("Why not?")], "roles must alternate"),
        ("qwen3", [user(" ")], "empty last message"),
        ("qwen3", [user("Why?"), {"role": "assistant", "content": "Because"}], "ends with the user"),
        ("llama", [user("Why?")], "no chat template"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused_with_its_place(tokenizers, name, chat, says):
    good = [user("Why?")] if tiny_models.KINDS[name].chat else "Why?"
    with pytest.raises(InputError, match="here row 2") as caught:
        table_of(tokenizers[name], good, chat)
    assert says in str(caught.value)


def with_template(tokenizers, template):
    import copy

    tokenizer = copy.deepcopy(tokenizers["qwen3"])
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_leaves_a_message_out_is_refused(tokenizers):
    deaf = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="writes the system message"):
        table_of(with_template(tokenizers, deaf), [user("Why?")], system="Be kind")
    with pytest.raises(InputError, match="writes the user message"):
        table_of(with_template(tokenizers, "{% if false %}{% endif %}"), [user("Why?")])


def test_a_template_that_forgets_the_generation_prompt_is_refused_and_one_that_needs_none_is_not(tokenizers):
    forgetful = tiny_models.CHATML.partition("{% if add_generation_prompt %}")[0]
    with pytest.raises(InputError, match="generation prompt") as caught:
        table_of(with_template(tokenizers, forgetful), [user("Why?")])
    assert "<|im_start|>assistant" in str(caught.value)
    assert table_of(tokenizers["mistral"], [user("Why?")]).num_rows == 1


@pytest.mark.parametrize("name", [name for name, kind in tiny_models.KINDS.items() if kind.pad_token or not kind.chat])
def test_plain_text_gets_the_tokenizers_own_bos_and_never_a_second(tokenizers, name):
    tokenizer = tokenizers[name]
    (bare,) = table_of(tokenizer, "Why?")["prompt_token_ids"].to_pylist()
    assert bare == tokenizer("Why?").input_ids
    (with_bos,) = table_of(tokenizer, tokenizer.bos_token + "Why?")["prompt_token_ids"].to_pylist()
    assert with_bos.count(tokenizer.bos_token_id) == 1 and with_bos[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_closes_a_prompt_with_its_eos_is_refused(tmp_path):
    tiny_models.write_byte_bpe(tmp_path, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>", pad_token="<s>")
    file = tmp_path / "tokenizer.json"
    closing = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
    closing["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    closing["special_tokens"] = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": closing}))
    with pytest.raises(InputError, match="</s>"):
        table_of(load_tokenizer(tmp_path, pad_token=None, key="policy.path"), "Why?")


@pytest.mark.parametrize("name", list(tiny_models.KINDS))
def test_every_text_survives_a_tokenizer_with_bytes(tokenizers, name):
    texts = ["Why  does\n rain fall?", "naïve Çédille 日本語 🙂", "  indented\n\tcode()", "<s> and <pad>"]
    prompts = [[user(text)] for text in texts] if tiny_models.KINDS[name].chat else texts
    assert count_changed(table_of(tokenizers[name], *prompts), tokenizers[name]) == 0


def test_texts_that_a_tokenizer_changes_are_counted(policy_folder, tmp_path):
    digits = load_tokenizer(policy_folder, pad_token=None, key="policy.path")
    assert count_changed(table_of(digits, "123>", "12a>", "a>"), digits) == 2
    tiny_models.write_byte_bpe(tmp_path, ["</s>"], eos_token="</s>", pad_token="</s>")
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    lower = load_tokenizer(tmp_path, pad_token=None, key="policy.path")
    assert count_changed(table_of(lower, "Why does rain fall?", "bread is"), lower) == 1


def test_encoding_an_answer_again_would_not_give_the_sampled_tokens(tokenizers):
    """Why nothing sampled is ever encoded again: the same text has several token sequences."""
    for name, tokenizer in tokenizers.items():
        ids = [tokenizer.convert_tokens_to_ids(token) for token in ("t", "h", "e")]
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids != ids, name

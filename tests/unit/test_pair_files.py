"""Ready pairs in the forms that trainers use."""

from __future__ import annotations

import pytest
import tiny_models

from pipeline.pair_files import pair_rows
from pipeline.prompts import Form
from stages.contracts import PAIRS
from stages.errors import InputError
from stages.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    tiny_models.KINDS["qwen3"].write_tokenizer(folder)
    return load_tokenizer(folder, pad_token=None, key="policy.path")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pairs(tokenizer, *rows, **form):
    placed = [(f"line {number}", row) for number, row in enumerate(rows, start=1)]
    return list(pair_rows(placed, tokenizer, form=Form(**form), round=1))


CHAT_FORMS = {
    "trl, messages": {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
    "trl, implicit prompt": {
        "chosen": [user("Why?"), assistant("So.")],
        "rejected": [user("Why?"), assistant("No.")],
    },
    "prompt as text, answers with it": {
        "prompt": "Why?",
        "chosen": [user("Why?"), assistant("So.")],
        "rejected": [user("Why?"), assistant("No.")],
    },
    "llama factory": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "messages and texts": {"messages": [user("Why?")], "chosen": "So.", "rejected": "No."},
}


@pytest.mark.parametrize("form", CHAT_FORMS)
def test_every_form_of_a_chat_gives_the_same_pair(tokenizer, form):
    (ours,) = pairs(tokenizer, CHAT_FORMS[form])
    (wanted,) = pairs(tokenizer, CHAT_FORMS["trl, messages"])
    assert ours == wanted
    PAIRS.table([ours])


def test_a_chats_tokens_are_those_of_its_rendering_up_to_the_end_of_the_turn(tokenizer):
    (row,) = pairs(tokenizer, CHAT_FORMS["trl, messages"])
    whole = tokenizer.apply_chat_template([user("Why?"), assistant("So.")], tokenize=True, return_dict=False)
    tokens = row["prompt_token_ids"] + row["chosen_token_ids"]
    assert whole[: len(tokens)] == tokens
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokens.count(tokenizer.eos_token_id) == whole.count(tokenizer.eos_token_id)


def test_plain_text_ends_with_one_eos(tokenizer):
    (row,) = pairs(tokenizer, {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})
    assert row["prompt"] == "1 + 1 ="
    assert row["chosen_token_ids"] == [*tokenizer(" 2").input_ids, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "names", [("question", "chosen", "rejected"), ("instruction", "chosen_response", "rejected_response")]
)
def test_other_trainers_columns_are_found(tokenizer, names):
    row = dict(zip(names, ("1 + 1 =", " 2", " 3"), strict=True))
    assert pairs(tokenizer, row) == pairs(tokenizer, {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})


def test_columns_can_be_mapped_and_scores_are_kept(tokenizer):
    row = {"q": "1 + 1 =", "good": " 2", "bad": " 3", "chosen_score": 4, "rejected_score": "1.5"}
    (found,) = pairs(tokenizer, row, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (found["score_chosen"], found["score_rejected"], found["margin"]) == (4.0, 1.5, 2.5)


def test_a_rows_own_system_message_goes_before_the_configs(tokenizer):
    row = CHAT_FORMS["llama factory"]
    (own,) = pairs(tokenizer, row | {"system": "Be brief."}, system="Be long.")
    (configured,) = pairs(tokenizer, row, system="Be long.")
    assert "Be brief." in own["prompt"] and "Be long." not in own["prompt"]
    assert "Be long." in configured["prompt"]


def test_two_equal_answers_make_no_pair(tokenizer):
    assert pairs(tokenizer, {"prompt": "a", "chosen": "b", "rejected": "b"}) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "rejected": "b"}, "chosen"),
        ({"chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "an answer"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "an answer"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "a", "chosen": [assistant("b"), user("c"), assistant("d")], "rejected": "b"}, "several turns"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "good"}, "finite number"),
        ({"messages": [assistant("a")], "chosen": "b", "rejected": "c"}, "user"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_line(tokenizer, row, words):
    with pytest.raises(InputError, match="line 1") as refused:
        pairs(tokenizer, row)
    assert words in str(refused.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(("prompt", "answer"), [("Once upon a", " time"), ("Once upon a ti", "me."), ("Say:", "two")])
def test_a_texts_answer_goes_on_where_the_prompt_ended(tmp_path, kind, prompt, answer):
    """A sentencepiece tokenizer puts a space before the first word of what it takes for a whole text."""
    tiny_models.KINDS[kind].write_tokenizer(tmp_path)
    found = load_tokenizer(tmp_path, pad_token=tiny_models.KINDS[kind].pad_token, key="policy.path")
    (row,) = pairs(found, {"prompt": prompt, "chosen": answer, "rejected": "x"})
    tokens = row["prompt_token_ids"] + row["chosen_token_ids"]
    assert found.decode(tokens, skip_special_tokens=True).strip() == prompt + answer
    assert tokens[-1] == found.eos_token_id


def test_a_chats_answer_ends_at_the_end_of_its_turn(tmp_path):
    """Gemma's turns end with another token than its EOS; behind that a policy would never write on."""
    tiny_models.KINDS["gemma2"].write_tokenizer(tmp_path)
    found = load_tokenizer(tmp_path, pad_token=None, key="policy.path")
    end = found.convert_tokens_to_ids("<end_of_turn>")
    rows = [("line 1", CHAT_FORMS["trl, messages"])]
    (row,) = pair_rows(rows, found, form=Form(), round=1, ends=[end])
    assert row["chosen_token_ids"][-1] == end
    assert row["chosen_token_ids"].count(end) == 1 and found.eos_token_id not in row["chosen_token_ids"]


def test_a_mapped_column_and_a_plain_prompt_come_before_what_looks_like_messages(tokenizer):
    row = {"prompt": "a", "messages": [user("a"), assistant("b")], "chosen": "b", "rejected": "c"}
    assert [found["prompt"] for found in pairs(tokenizer, row)] == ["a"]
    row = {"question": "a", "context": "A passage.", "chosen": "b", "rejected": "c"}
    assert [found["prompt"] for found in pairs(tokenizer, row)] == ["a"]
    row = {"other": "z", "prompt": "a", "chosen": "b", "rejected": "c"}
    assert [found["prompt"] for found in pairs(tokenizer, row, columns={"prompt": "other"})] == ["z"]


def test_a_rows_own_system_message_counts_where_a_text_becomes_a_chat(tokenizer):
    row = {"system": "Speak French.", "instruction": "a", "chosen": "b", "rejected": "c"}
    (found,) = pairs(tokenizer, row, to_chat=True)
    assert "Speak French." in found["prompt"]

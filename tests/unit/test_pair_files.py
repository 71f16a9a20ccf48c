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

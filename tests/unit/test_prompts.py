"""Prompts in: every form is read, every bad row is named with its place, draws do not repeat."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prompt_files import WHOLE, Part, fetch_dataset, on_hub, read_rows, source_sha256
from pipeline.prompts import Form, HeldOut, distinct, draw, prompt_rows, question_of
from stages.errors import InputError
from stages.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(policy_folder):
    return load_tokenizer(policy_folder, pad_token=None, key="policy.path")


ROWS = [{"prompt": "12345>", "answer": "54321", "level": 1}, {"prompt": "00000>", "answer": "00000", "level": 2}]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        open_file = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with open_file(path, table.schema) as out:
            out.write_table(table)
    else:
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(path)
    return path


def table_of(path, tokenizer, **columns):
    return distinct(prompt_rows(read_rows(path, key="prompts.path"), tokenizer, form=Form(columns)))


def test_every_form_of_file_gives_the_same_rows(tmp_path, tokenizer):
    names = ("a.jsonl", "b.json", "c.parquet", "file.arrow", "stream.arrow", "saved")
    tables = [table_of(write(tmp_path / name, ROWS), tokenizer)[0] for name in names]
    assert all(table == tables[0] for table in tables)
    assert tables[0]["answer"].to_pylist() == ["54321", "00000"]
    assert [json.loads(extra) for extra in tables[0]["extra"].to_pylist()] == [{"level": 1}, {"level": 2}]


def test_a_prompt_is_tokenised_as_the_tokenizers_plain_call_does(tmp_path, tokenizer):
    table, _ = table_of(write(tmp_path / "a.jsonl", ROWS), tokenizer)
    assert table["prompt_token_ids"].to_pylist()[0] == tokenizer("12345>").input_ids == [1, 5, 6, 7, 8, 9, 14]


def test_equal_rows_are_one_and_are_counted(tmp_path, tokenizer):
    table, merged = table_of(write(tmp_path / "a.jsonl", [*ROWS, ROWS[0], ROWS[0] | {"answer": "0"}]), tokenizer)
    assert (table.num_rows, merged) == (3, 1)


def test_columns_are_found_by_name_or_mapped(tmp_path, tokenizer):
    named = write(tmp_path / "a.jsonl", [{"question": "12345>", "answer": 5}])
    mapped = write(tmp_path / "b.jsonl", [{"text": "12345>", "truth": "5"}])
    a = table_of(named, tokenizer)[0]
    b = table_of(mapped, tokenizer, prompt="text", answer="truth")[0]
    assert a["prompt_id"] == b["prompt_id"]
    assert a["answer"].to_pylist() == ["5"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "1>"}\n{"prompt": ', "line 2"),
        ('{"prompt": "1>"}\n[1]', "line 2"),
        ('{"prompt": "1>"}\n{"prompt": "  "}', "line 2"),
        ('{"prompt": "1>"}\n{"prompt": 7}', "line 2"),
        ('{"prompt": "1>"}\n\n{"prompt": null}', "line 3"),
        ('{"text": "1>"}', "prompts.columns.prompt"),
        ('{"prompt": [{"role": "user", "content": "1>"}]}', "chat template"),
        ('{"prompt": [{"role": "assistant", "content": "1>"}]}', "ends with the user"),
        ('{"prompt": [{"role": "wizard", "content": "1>"}]}', "wizard"),
        ('{"prompt": "\xff"}', "line 1"),
    ],
)
def test_a_bad_row_is_named_with_its_place(tmp_path, tokenizer, content, says):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        table_of(file, tokenizer)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b"{}"), ("a.json", b"[1, 2]"), ("a.parquet", b"PAR1 no"), ("a.csv", b"prompt\nx\n"), ("a.arrow", b"")],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="prompts.path"):
        table_of(tmp_path / name, tokenizer)


def test_a_mapped_column_that_is_not_there_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="'question'"):
        table_of(write(tmp_path / "a.jsonl", ROWS), tokenizer, prompt="question")


CHATS = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "messages": [{"role": "user", "content": "Why?"}],
    "context_messages": [{"role": "user", "content": "Why?"}],
    "conversations": [{"from": "human", "value": "Why?"}],
}


@pytest.mark.parametrize("form", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "saved"])
@pytest.mark.parametrize("column", list(CHATS))
def test_chats_are_found_under_every_usual_name_in_every_form(tmp_path, column, form):
    tiny_models.KINDS["qwen3"].write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, pad_token=None, key="policy.path")
    table, _ = table_of(write(tmp_path / form, [{column: CHATS[column]}]), tokenizer)
    assert table["conversation"].to_pylist() == [CHATS["prompt"]]


@pytest.mark.parametrize("column", ["prompt", "question", "instruction"])
def test_texts_are_found_under_every_usual_name(tmp_path, tokenizer, column):
    assert table_of(write(tmp_path / "a.jsonl", [{column: "123>"}]), tokenizer)[0]["prompt"].to_pylist() == ["123>"]


def splits(folder):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(folder)
    return folder


def data_files(folder):
    """As a repository of the hub lies in a folder."""
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("made", [splits, data_files])
def test_of_several_splits_the_named_one_is_read_and_without_a_name_none(tmp_path, made):
    folder = made(tmp_path / "folder")
    counts = {s: len(list(read_rows(folder, key="prompts.path", part=Part(split=s)))) for s in ("train", "test")}
    assert counts == {"train": 2, "test": 1}
    for part in (WHOLE, Part(split="validation")):
        with pytest.raises(InputError, match="train, test") as caught:
            list(read_rows(folder, key="evaluate.path", part=part))
        assert "--set evaluate.split=" in caught.value.fix


def test_a_file_has_no_splits(tmp_path):
    with pytest.raises(InputError, match="split"):
        list(read_rows(write(tmp_path / "a.jsonl", ROWS), key="prompts.path", part=Part(split="train")))


def test_a_name_on_the_hub_that_cannot_be_reached_is_refused_in_words_that_help(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_hub("org/name") and on_hub("openai/gsm8k")
    (tmp_path / "data").mkdir()
    assert not any(
        map(on_hub, ["data/prompts", "data/prompts.jsonl", "./a/b", "../b", "~/b", "a.jsonl", "/a", "a/b/c"])
    )
    with pytest.raises(InputError, match="hub") as caught:
        fetch_dataset("no-such-org/no-such-data", tmp_path, key="prompts.path", part=WHOLE)
    assert "save_to_disk" in caught.value.fix


def test_a_fetched_dataset_is_one_file_of_the_split_that_was_asked_for(tmp_path, monkeypatch, tokenizer):
    """datasets takes a folder of that name for the repository, so that no network is needed."""
    data_files(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    files = [fetch_dataset("org/name", tmp_path, key="prompts.path", part=Part(split=s)) for s in ("train", "test")]
    assert [table_of(file, tokenizer)[0].num_rows for file in files] == [2, 1]
    assert source_sha256(files[0]) == source_sha256(
        fetch_dataset("org/name", tmp_path, key="prompts.path", part=Part(split="train"))
    )


@given(st.integers(1, 25), st.integers(0, 5), st.data())
def test_every_lap_asks_every_prompt_once_and_no_round_asks_one_twice(num_prompts, seed, data):
    counts = data.draw(st.lists(st.integers(1, num_prompts), min_size=1, max_size=40))
    rounds = [draw(num_prompts, before=counts[:i], count=count, seed=seed) for i, count in enumerate(counts)]
    assert [len(set(rows)) for rows in rounds] == counts
    asked = [row for rows in rounds for row in rows]
    for lap in range(len(asked) // num_prompts):
        assert sorted(asked[lap * num_prompts : (lap + 1) * num_prompts]) == list(range(num_prompts))


def test_holding_out_goes_by_the_text_alone_and_every_prompt_is_on_one_side():
    texts = [f"prompt {i}" for i in range(4000)]
    held = [HeldOut(0.1, wanted=True).keeps(text) for text in texts]
    assert held == [not HeldOut(0.1, wanted=False).keeps(text) for text in texts]
    assert sum(held) / len(held) == pytest.approx(0.1, abs=0.02)


def test_a_question_is_one_however_it_is_rendered():
    chat = [{"role": "user", "content": "Why?"}]
    told = [{"role": "system", "content": "Be brief."}, *chat]
    more = [*chat, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Why?"}]
    assert question_of("Why?", None) == question_of("<user>Why?", chat) == question_of("Be brief.<user>Why?", told)
    assert question_of("…", more) not in (question_of("Why?", None), "")

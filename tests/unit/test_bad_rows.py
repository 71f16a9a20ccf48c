"""Bad rows in prompts, pairs and texts: named with their place, and nothing of them counts as published."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from refusals import refuse_published, refused

from pipeline.artifacts import StageFolder
from pipeline.jobs.inputs import PreparePairs, PreparePrompts, PrepareTexts
from pipeline.prompt_files import WHOLE
from pipeline.prompts import Form
from pipeline.sections import PairsConfig
from pipeline.sources import DataSource
from stages.contracts import PAIRS, PROMPTS, TEXTS
from stages.errors import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen3", "gpt2"):
        tiny_models.policy(name, root / name)
    return root


def read(models, source, out, *, contract=PROMPTS, model="qwen3", **options):
    """The job that reads a source, as a run gives it to its workers."""
    jobs = {
        PROMPTS.name: (PreparePrompts, {"form": Form(), "seed": 0, "held_out": None, "exclude": None, "limit": None}),
        PAIRS.name: (PreparePairs, {"config": PairsConfig(path="x"), "round": 1}),
        TEXTS.name: (PrepareTexts, {"column": "text", "max_length": None, "num_texts": 9, "seed": 0}),
    }
    job, fields = jobs[contract.name]
    found = DataSource.found(source, key="prompts.path", part=WHOLE)
    common = {
        "source": found.path,
        "key": found.key,
        "tokenizer": models / model,
        "pad_token": "<|endoftext|>",
        "part": found.part,
        "out": StageFolder(out, contract),
    }
    job(**common, **fields | options)(None)
    return common["out"].read(0)


def written(folder, content, name="rows.jsonl"):
    file = folder / name
    if isinstance(content, (str, bytes)):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return file


def chat(*messages):
    return [{"prompt": list(messages)}]


USER, GOOD = {"role": "user", "content": "Why?"}, '{"prompt": "ok"}\n'
ROWS = {
    "nothing": ("", "at least one prompt"),
    "blank lines": ("\n\n \n", "at least one prompt"),
    "broken JSON in line 7": (GOOD * 6 + '{"prompt": "x"\n' + GOOD, "line 7", "',' delimiter"),
    "a last line cut short": (GOOD + '{"prompt": "x', "line 2", "Unterminated string"),
    "a number for a row": (GOOD + "3\n", "line 2", "a number"),
    "a list for a row": ("[1]\n", "line 1", "a list"),
    "a null for a row": ("null\n", "null"),
    "endless nesting": ('{"prompt": "a", "x": ' + "[" * 100_000, "line 1", "too deep"),
    "bytes that are no UTF-8": (GOOD.encode() + b'{"prompt": "\xff"}\n', "line 2", "0xff"),
    "UTF-16": (GOOD.encode("utf-16"), "line 1", "0xff"),
    "half a character": ('{"prompt": "a\\ud800b"}\n', "line 1", "\\ud800 alone"),
    "half a character in an answer": ('{"prompt": "a", "answer": "\\udc00"}\n', "\\udc00 alone"),
    "half a character in a key": ('{"prompt": "a", "\\ud800": 1}\n', "\\ud800 alone"),
    "no known column": ([{"text": "a"}], "prompts.columns.prompt=NAME", "the columns text"),
    "a later row without the column": (GOOD + '{"b": "x"}\n', "line 2", "the columns b"),
    "numbers": ([{"prompt": 3}], "line 1", "a number"),
    "nulls": ([{"prompt": None}] * 3, "line 1", "null"),
    "true": ([{"prompt": True}], "true or false"),
    "an object": ([{"prompt": USER}], "an object"),
    "an empty text": ([{"prompt": ""}], "an empty prompt"),
    "only space": ([{"prompt": " \n\t\u2003"}], "an empty prompt"),
    "an empty chat": (chat(), "no message"),
    "a chat that ends with the answer": (chat(USER, {"role": "assistant", "content": "So"}), "ends with the user"),
    "an unknown role": (chat({"role": "wizard", "content": "x"}), "wizard"),
    "a role that is a list": (chat({"role": ["user"], "content": "x"}), "messages of role"),
    "parts in a message": (chat({"role": "user", "content": [{"type": "image"}]}), "content (text)", "image"),
    "null in a message": (chat({"role": "user", "content": None}), "content (text)"),
    "null for a message": (chat(None), "messages of role"),
    "a text for a message": (chat("Why?"), "messages of role"),
    "a text, then a chat of a role unknown": ([*json.loads(f"[{GOOD}]"), *chat({"role": "x"})], "line 2"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_no_prompts(models, tmp_path, case):
    content, *says = ROWS[case]
    file = written(tmp_path, content)
    refused(lambda: read(models, file, tmp_path / "out"), str(file), *says, kind=InputError)
    refuse_published(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_chat_for_a_model_without_a_template(models, tmp_path):
    file = written(tmp_path, GOOD + json.dumps(chat(USER)[0]))
    error = refused(lambda: read(models, file, tmp_path / "out", model="gpt2"), "line 2", "no chat template")
    assert "a column of text" in error.fix


FILES = {
    "a.csv": (b"prompt\nx\n", ".csv"),
    "a": (GOOD.encode(), "ending in nothing"),
    "object.json": (b"{}", "an object"),
    "lines.json": ((GOOD * 2).encode(), "Extra data", ".jsonl"),
    "cut.json": (b'[{"prompt": "a"', "character 16"),
    "mixed.json": (b'[{"prompt": "a"}, 3]', "a number as entry 2"),
    "empty.json": (b"[]", "at least one prompt"),
    "junk.parquet": (b"PAR1 no", "readable parquet"),
    "empty.parquet": (b"", "readable parquet"),
    "junk.arrow": (b"ARROW1", "readable arrow"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_prompts(models, tmp_path, name):
    content, *says = FILES[name]
    file = written(tmp_path, content, name)
    refused(lambda: read(models, file, tmp_path / "out"), name, *says, kind=InputError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([1]), "a number"),
        (pa.array([None], pa.string()), "null"),
        (pa.array([b"a\xff"]), "bytes"),
        (pa.array([], pa.string()), "at least one prompt"),
        (pa.array([b"a\xff"]).view(pa.string()), "0xff"),
    ],
)
def test_parquet_columns_that_are_no_prompts(models, tmp_path, column, says):
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    refused(lambda: read(models, tmp_path / "a.parquet", tmp_path / "out"), "a.parquet", says, kind=InputError)


@pytest.mark.parametrize(
    ("files", "says"),
    [({}, "data files"), ({"a.jsonl": GOOD + "{"}, "name a single file"), ({"a.jsonl": ""}, "no row")],
)
def test_folders_that_hold_no_prompts(models, tmp_path, files, says):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files.items():
        written(folder, content, name)
    refused(lambda: read(models, folder, tmp_path / "out"), str(folder), says, kind=InputError)


def test_paths_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "memory.jsonl").symlink_to("/proc/self/mem")
    for name, says in {
        "pipe.jsonl": "neither a file nor a folder",
        "memory.jsonl": "error",
        "no.jsonl": "neither",
    }.items():
        refused(lambda name=name: DataSource.found(tmp_path / name, key="prompts.path"), "prompts.path", says)


TEXTS_OF_EVERY_KIND = [
    "👨‍👩‍👧‍👦 🏳️‍🌈 family and flag",
    "\u202eright to left\u202c عربى עברית",
    "e\u0301 and é are two",
    "é",
    "𝔘𠜎 beyond the basic plane",
    "नमस्ते ไทย 日本語 한국어",
    "a\x00b \x1b[31m \x7f\x85",
    "\ufeffmark \u2028 \u2029 \u200b",
    "  kept  space \t\n",
    "z\u0335\u0336a\u0337",
]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_unicode_of_every_kind_reaches_the_tables_byte_for_byte(models, tmp_path, ascii_only):
    rows = [{"prompt": text, "answer": text, "more": text} for text in TEXTS_OF_EVERY_KIND]
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\r\n" for row in rows)
    table = read(models, written(tmp_path, "\ufeff" + lines), tmp_path / "out").to_pylist()
    assert [row["prompt"] for row in table] == TEXTS_OF_EVERY_KIND
    assert [row["answer"] for row in table] == TEXTS_OF_EVERY_KIND
    assert [json.loads(row["extra"])["more"] for row in table] == TEXTS_OF_EVERY_KIND


def test_repeated_rows_texts_among_chats_and_a_prompt_of_a_megabyte_are_no_mistakes(models, tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "a"},
        *chat(USER),
        {"prompt": "word " * 200_000},
        {"prompt": "b", "answer": [1]},
    ]
    table = read(models, written(tmp_path, rows), tmp_path / "out").to_pylist()
    assert [len(row["prompt"]) > 1000 for row in table] == [False, False, True, False]
    assert [row["conversation"] for row in table] == [None, [USER], None, None]
    assert table[-1]["answer"] == "[1]"
    assert StageFolder(tmp_path / "out", PROMPTS).entry(0).stats["merged"] == 1


# ---- pairs and texts ------------------------------------------------------------------------------------------------

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SAID, OTHER = {"role": "assistant", "content": "So"}, {"role": "assistant", "content": "No"}
PAIR_ROWS = {
    "no chosen": ([{"prompt": "a", "rejected": "c"}], "chosen_response", "pairs.columns.chosen=NAME"),
    "no prompt": ([{"chosen": "b", "rejected": "c"}], "pairs.columns.prompt=NAME"),
    "an empty prompt": ([PAIR | {"prompt": ""}], "an empty prompt"),
    "a number for a prompt": ([PAIR | {"prompt": 3}], "a number"),
    "a number for an answer": ([PAIR | {"chosen": 3}], "line 1, chosen", "3"),
    "null for an answer": ([PAIR | {"rejected": None}], "line 1, rejected"),
    "an answer of several turns": ([PAIR | {"prompt": [USER], "chosen": [SAID, USER, SAID]}], "several turns"),
    "an answer by the user": ([PAIR | {"chosen": [USER]}], "message of the assistant"),
    "an answer without content": ([PAIR | {"chosen": [SAID | {"content": None}]}], "message of the assistant"),
    "only equal answers": ([PAIR | {"rejected": "b"}], "1 of two equal answers"),
    "equal conversations": ([{"chosen": [USER, SAID], "rejected": [USER, SAID]}], "1 of two equal answers"),
    "conversations of two prompts": ([{"chosen": [USER, SAID], "rejected": [SAID]}], "no beginning in common"),
    "only long ones": ([PAIR | {"chosen": "word " * 500}], "1 of them longer", "longer context"),
    "a score in words": ([PAIR | {"score_chosen": "good"}], "score_chosen", "'good'"),
    "a score that is not finite": ([PAIR | {"score_rejected": float("nan")}], "finite", "nan"),
    "half a character": ('{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}\n', "\\ud800 alone"),
    "nothing": ("", "0 rows"),
}


@pytest.mark.parametrize("case", PAIR_ROWS)
def test_rows_that_are_no_pairs(models, tmp_path, case):
    content, *says = PAIR_ROWS[case]
    file = written(tmp_path, content)
    refused(lambda: read(models, file, tmp_path / "out", contract=PAIRS), str(file), *says, kind=InputError)
    assert not (tmp_path / "out").exists()


def test_a_pair_with_an_empty_answer_trains_on_the_eos_alone(models, tmp_path):
    table = read(
        models, written(tmp_path, [PAIR | {"chosen": [{"from": "gpt", "value": ""}]}]), tmp_path, contract=PAIRS
    )
    assert [len(ids) for ids in table["chosen_token_ids"].to_pylist()] == [1]


@pytest.mark.parametrize(
    ("row", "says"),
    [({"x": "a"}, "the columns x"), ({"text": 3}, "3"), ({"text": " "}, "' '"), ({"text": "a"}, "two tokens")],
)
def test_rows_that_are_no_texts(models, tmp_path, row, says):
    file = written(tmp_path, [row])
    refused(lambda: read(models, file, tmp_path / "out", contract=TEXTS), str(file), says, kind=InputError)

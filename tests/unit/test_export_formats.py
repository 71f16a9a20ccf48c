"""Pairs in other trainers' files, read back by each project's documented fields: nothing of a prompt is lost."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import tiny_models
import written_run
from refusals import refused

from pipeline.artifacts import StageFolder
from pipeline.export import export_pairs
from pipeline.export_formats import FORMATS
from stages.contracts import PAIRS, PROMPTS
from stages.errors import InputError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello | <b>"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "and \u202e then?"},
]


def republish(stage, edit):
    tables = [[edit(row) for row in table.to_pylist()] for table in stage.read_all()]
    shutil.rmtree(stage.path)
    written_run.publish(stage, [stage.contract.table(rows) for rows in tables])


def make_chats(run, chat=CHAT):
    for number in (1, 2):
        republish(
            StageFolder(run / f"round-{number:04d}" / "prompts", PROMPTS), lambda row: row | {"conversation": chat}
        )


def export(run, kind):
    """The pairs as `kind` has them, row by row, and the run's own."""
    out = run / "out" / f"pairs{FORMATS[kind].endings[-1]}"
    export_pairs(run, kind=kind, rounds=(), out=out)
    pairs = [
        row
        for number in (1, 2)
        for table in StageFolder(run / f"round-{number:04d}" / "pairs", PAIRS).read_all()
        for row in table.to_pylist()
    ]
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], pairs


# ---- readers: (prompt's messages, or its text; chosen; rejected), by the projects' documents alone ------------------


def read_trl(row, folder):
    if isinstance(row["prompt"], str):
        return row["prompt"], row["chosen"], row["rejected"]
    (chosen,), (rejected,) = row["chosen"], row["rejected"]
    assert chosen["role"] == rejected["role"] == "assistant"
    return row["prompt"], chosen["content"], rejected["content"]


def read_llama_factory(row, folder):
    described = json.loads((folder / "dataset_info.json").read_text())["pairs"]
    columns = described["columns"]
    assert described["file_name"] == "pairs.jsonl" and described["ranking"] is True
    if described.get("formatting", "alpaca") == "alpaca":
        text = "\n".join(part for part in (row[columns["prompt"]], row[columns["query"]]) if part)
        return text, row[columns["chosen"]], row[columns["rejected"]]
    tags = {"human": "user", "gpt": "assistant"}
    turns = [{"role": tags[turn["from"]], "content": turn["value"]} for turn in row[columns["messages"]]]
    assert [turn["role"] for turn in turns] == [("user", "assistant")[place % 2] for place in range(len(turns))]
    assert len(turns) % 2 == 1 and {row[columns[role]]["from"] for role in ("chosen", "rejected")} == {"gpt"}
    system = [{"role": "system", "content": row[columns["system"]]}] if row[columns["system"]] else []
    return system + turns, row[columns["chosen"]]["value"], row[columns["rejected"]]["value"]


def read_ms_swift(row, folder):
    assert row.keys() == {"messages", "rejected_response"}
    *prompt, chosen = row["messages"]
    assert chosen["role"] == "assistant"
    return prompt, chosen["content"], row["rejected_response"]


def read_nemo(row, folder):
    best, worst = sorted(row["completions"], key=lambda completion: completion["rank"])
    answers = [message for ranked in (best, worst) for message in ranked["completion"]]
    assert [message["role"] for message in answers] == ["assistant"] * 2
    return row["context"], *(message["content"] for message in answers)


def read_openrlhf(row, folder):
    if isinstance(row["prompt"], str):  # special tokens are written out, since nobody adds them
        answers = (row[role].removesuffix("</s>") for role in ("chosen", "rejected"))
        return row["prompt"].removeprefix("<s>"), *answers
    prompt = row["prompt"]
    whole = {role: prompt + row[role] for role in ("chosen", "rejected")}
    assert all(messages[-1]["role"] == "assistant" for messages in whole.values())
    return prompt, *(messages[-1]["content"] for messages in whole.values())


READERS = {
    "trl": read_trl,
    "llama-factory": read_llama_factory,
    "ms-swift": read_ms_swift,
    "nemo": read_nemo,
    "openrlhf": read_openrlhf,
}
ONLY_MESSAGES = ("ms-swift", "nemo")


@pytest.mark.parametrize("kind", READERS)
def test_a_chat_stays_a_chat(run, kind):
    make_chats(run)
    rows, pairs = export(run, kind)
    assert rows and len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        assert READERS[kind](row, run / "out") == (CHAT, pair["chosen"], pair["rejected"])


@pytest.mark.parametrize("kind", READERS)
def test_a_text_stays_as_it_is(run, kind):
    rows, pairs = export(run, kind)
    assert rows and len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        text = [{"role": "user", "content": pair["prompt"]}] if kind in ONLY_MESSAGES else pair["prompt"]
        assert READERS[kind](row, run / "out") == (text, pair["chosen"], pair["rejected"])


def test_trl_itself_knows_the_rows_for_preferences(run):
    from trl import is_conversational

    make_chats(run)
    rows, _ = export(run, "trl")
    assert all(is_conversational({name: row[name] for name in ("prompt", "chosen", "rejected")}) for row in rows)


def test_a_chat_without_a_system_message_leaves_its_column_empty(run):
    make_chats(run, CHAT[1:])
    rows, _ = export(run, "llama-factory")
    assert {row["system"] for row in rows} == {""}
    assert read_llama_factory(rows[0], run / "out")[0] == CHAT[1:]


def test_what_the_sharegpt_format_cannot_hold_is_left_out_aloud(run, capsys):
    make_chats(run, [CHAT[1], CHAT[3]])
    rows, pairs = export(run, "llama-factory")
    assert rows == [] and f"{len(pairs)} pairs are left out" in capsys.readouterr().out
    assert len(export(run, "ms-swift")[0]) == len(pairs)


def test_another_description_in_dataset_info_stays(run):
    (run / "out").mkdir()
    (run / "out" / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    export(run, "llama-factory")
    assert json.loads((run / "out" / "dataset_info.json").read_text()).keys() == {"mine", "pairs"}


def test_openrlhf_reads_the_special_tokens_of_the_run(run):
    """Its dataset joins prompt and answer, adds an EOS where there is none, and encodes without special tokens."""
    made = tiny_models.policy("llama", run.parent / "llama")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(run / "round-0002" / "policy")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}

    def edit(row):
        return row | texts | {"prompt_token_ids": [bos, 7], "chosen_token_ids": [8, eos], "rejected_token_ids": [8, 9]}

    for number in (1, 2):
        republish(StageFolder(run / f"round-{number:04d}" / "pairs", PAIRS), edit)
    for row in export(run, "openrlhf")[0]:
        ids = tokenizer(row["prompt"] + row["chosen"], add_special_tokens=False)["input_ids"]
        assert [place for place, token in enumerate(ids) if token in (bos, eos)] == [0, len(ids) - 1]
        assert row["rejected"] == " ran"  # it was cut: nobody said an EOS


def test_trl_may_have_parquet_and_the_others_lines_of_json(run):
    export_pairs(run, kind="trl", rounds=(), out=None)
    assert pq.read_table(run / "export" / "trl.parquet").num_rows
    for kind in READERS.keys() - {"trl"}:
        asked = {"kind": kind, "rounds": (), "out": run / "pairs.parquet"}
        refused(lambda asked=asked: export_pairs(run, **asked), ".jsonl", kind=InputError)

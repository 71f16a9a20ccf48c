"""Prompts as people have them in, the table of `PROMPTS` out; and which of them a round draws.

A file's rows may be plain text or chats. A chat goes through the tokenizer's template once, here, and everything later
works on the rendered text and its token ids. Nothing is guessed twice: column names are found here, or mapped.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stages.contracts import PROMPTS
from stages.errors import InputError
from stages.seeds import hashed_seed, row_id
from stages.weights import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
"""Endings of the files that `read_rows` reads."""

_TEXT_COLUMNS = ("prompt", "instruction", "question")
_CHAT_COLUMNS = ("messages", "context_messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


# ---- reading --------------------------------------------------------------------------------------------------------


def source_sha256(path: Path) -> str:
    """A hash of a file's bytes, or of all files in a folder with their names."""
    if path.is_file():
        return file_sha256(path)
    lines = [f"{file_sha256(f)}  {f.relative_to(path)}\n" for f in sorted(path.rglob("*")) if f.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_rows(path: Path, *, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the place it stands at, for errors.

    Raises:
        InputError: for a file of another kind, or a line that cannot be read.
    """
    if path.is_dir():
        yield from _numbered(path, _saved_dataset(path, key))
    elif path.suffix == ".jsonl":
        yield from _json_lines(path, key)
    elif path.suffix == ".json":
        yield from _numbered(path, _json_list(path, key))
    elif path.suffix == ".parquet":
        yield from _numbered(path, _arrow_rows(path, key, "parquet"))
    elif path.suffix == ".arrow":
        yield from _numbered(path, _arrow_rows(path, key, "arrow"))
    else:
        raise InputError(
            f"{key}: {path}",
            wanted="a .jsonl, .json, .parquet or .arrow file, or a folder saved by datasets",
            got=f"a file ending in {path.suffix or 'nothing'}",
            fix="convert it, for example with datasets.load_dataset(…).to_json(…)",
        )


def _numbered(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _json_lines(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, ValueError) as error:
                raise InputError(
                    f"{key}: {where}", wanted="a JSON object", got=str(error), fix="mend the line"
                ) from None
            if not isinstance(row, dict):
                raise InputError(
                    f"{key}: {where}", wanted="a JSON object", got=type(row).__name__, fix='write {"prompt": …}'
                )
            yield where, row


def _json_list(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{key}: {path}", wanted="JSON", got=str(error), fix="mend the file there") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{key}: {path}",
            wanted="a JSON list of objects",
            got="something else",
            fix="one object a prompt, or rename a file of JSON lines to .jsonl",
        )
    return rows


def _arrow_rows(path: Path, key: str, kind: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        yield from load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{key}: {path}", wanted=f"a readable {kind} file", got=str(error), fix="write the file again"
        ) from None


def _saved_dataset(path: Path, key: str) -> Iterator[dict[str, Any]]:
    from datasets import Dataset, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{key}: {path}", wanted="a folder saved by datasets", got=str(error), fix="name a file in it instead"
        ) from None
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"{key}: {path}",
            wanted="one split",
            got=f"the splits {', '.join(dataset)}",
            fix=f"name one: {path / next(iter(dataset))}",
        )
    yield from dataset


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Columns:
    """Which input columns hold what; either `prompt` or `messages` is set."""

    prompt: str | None
    messages: str | None
    answer: str | None


def find_columns(row: Mapping[str, Any], mapped: Mapping[str, str], *, where: str) -> Columns:
    """The columns by the config's mapping, else by their usual names.

    Raises:
        InputError: if a mapped column is not there, or none looks like a prompt.
    """
    for role, column in mapped.items():
        if column not in row:
            raise InputError(
                where,
                wanted=f"column {column!r}, as columns.{role} says",
                got=f"the columns {', '.join(row) or 'none'}",
                fix=f"--set prompts.columns.{role}=…",
            )
    answer = mapped.get("answer", "answer" if "answer" in row else None)
    if "prompt" in mapped or "messages" in mapped:
        return Columns(mapped.get("prompt"), mapped.get("messages"), answer)
    text = next((name for name in _TEXT_COLUMNS if name in row), None)
    chat = next((name for name in _CHAT_COLUMNS if name in row), None)
    if text is None and chat is None:
        raise InputError(
            where,
            wanted=f"a column called {', '.join((*_TEXT_COLUMNS, *_CHAT_COLUMNS))}",
            got=f"the columns {', '.join(row) or 'none'}",
            fix="--set prompts.columns.prompt=NAME",
        )
    return Columns(text, None if text else chat, answer)


def prompt_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str],
    system: str | None,
) -> Iterator[dict[str, Any]]:
    """Rows of `PROMPTS`, in order, with repeated ones.

    Raises:
        InputError: with the row's place, for an empty prompt, a wrong type, or a chat without a template.
    """
    found: Columns | None = None
    for where, row in rows:
        if found is None or any(name is not None and name not in row for name in (found.prompt, found.messages)):
            found = find_columns(row, columns, where=where)
        value = row[found.prompt or found.messages or ""]
        chat = conversation(value, system, where) if isinstance(value, list) else None
        text = rendered(chat, tokenizer, where) if chat is not None else _plain_text(value, where)
        if chat is None and system is not None:
            raise InputError(
                where, wanted="a chat, to put prompts.system before", got="plain text", fix="--set prompts.system=null"
            )
        answer = row.get(found.answer) if found.answer else None
        extra = {k: v for k, v in row.items() if k not in (found.prompt, found.messages, found.answer)}
        answer_text = None if answer is None else str(answer)
        extra_text = json.dumps(extra, ensure_ascii=False, sort_keys=True, default=str)
        yield {
            "prompt_id": row_id("prompt", json.dumps(chat) if chat else text, answer_text, extra_text),
            "round": 0,
            "prompt": text,
            "conversation": chat,
            # A template writes the special tokens itself; a second BOS would be one too many.
            "prompt_token_ids": tokenizer(text, add_special_tokens=chat is None).input_ids,
            "answer": answer_text,
            "extra": extra_text,
        }


def _plain_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        got = "an empty prompt" if isinstance(value, str) else type(value).__name__
        raise InputError(
            where, wanted="a prompt: text, or a list of messages", got=got, fix="fill the row or remove it"
        )
    return value


def conversation(messages: Sequence[Any], system: str | None, where: str) -> list[dict[str, str]]:
    chat = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise InputError(
                where,
                wanted="messages of role (user, assistant, system) and content (text)",
                got=json.dumps(message, ensure_ascii=False, default=str)[:120],
                fix="mend the row or remove it",
            )
        chat.append({"role": _ROLES[role], "content": content})
    if not chat or chat[-1]["role"] != "user":
        got = "no message" if not chat else f"a last message by {chat[-1]['role']}"
        raise InputError(where, wanted="a chat that ends with the user", got=got, fix="cut the chat before the answer")
    if system is not None and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": system})
    return chat


def rendered(chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            where,
            wanted="plain text, since the policy's tokenizer has no chat template",
            got="a chat",
            fix="use a model with a chat template, or a column of text",
        )
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def distinct(rows: Iterable[dict[str, Any]]) -> tuple[pa.Table, int]:
    """A table of the rows with each id once, and how many were merged."""
    found: dict[str, dict[str, Any]] = {}
    count = 0
    for row in rows:
        found.setdefault(row["prompt_id"], row)
        count += 1
    return PROMPTS.table(found.values()), count - len(found)


# ---- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which side of a held-out share is meant: that share (`wanted`), or the rest."""

    share: float
    wanted: bool

    def keeps(self, prompt: str) -> bool:
        """Whether a prompt is on this side: by its text alone, so that new rows and other columns move no old one."""
        return (int(row_id("holdout", prompt)[:8], 16) / 2**32 < self.share) == self.wanted


def draw(num_prompts: int, *, before: Sequence[int] = (), count: int, seed: int) -> list[int]:
    """The row numbers that a round asks: lap after lap through all rows, each lap shuffled anew.

    No row is asked twice in a lap, nor twice in a round: a round that crosses into the next lap does not meet the rows
    it has already, which come at that lap's end instead.

    Args:
        before: how many rows each earlier round asked.
        count: how many this one asks.
    """
    assert all(asked <= num_prompts for asked in (*before, count))
    waiting = _shuffled(num_prompts, seed, 0)
    lap, drawn = 0, waiting[:0]
    for asked in (*before, count):
        drawn, waiting = waiting[:asked], waiting[asked:]
        if len(drawn) < asked:
            lap, met, missing = lap + 1, set(drawn), asked - len(drawn)
            fresh = _shuffled(num_prompts, seed, lap)
            following = [row for row in fresh if row not in met] + [row for row in fresh if row in met]
            drawn, waiting = drawn + following[:missing], following[missing:]
    return drawn


def _shuffled(count: int, seed: int, lap: int) -> list[int]:
    order = list(range(count))
    random.Random(hashed_seed("prompts", seed, lap)).shuffle(order)
    return order

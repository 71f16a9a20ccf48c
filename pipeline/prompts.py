"""Rows of a dataset in, the table of `PROMPTS` out; and which of them a round draws.

Rows may be plain text or chats. A chat goes through the tokenizer's template once, here, and everything later works on
the rendered text and its token ids. Nothing is guessed twice: column names are found here, or mapped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.prompt_files import kind_of
from stages.contracts import PROMPTS
from stages.errors import InputError
from stages.seeds import hashed_seed, row_id
from stages.tokenizers import (
    keeps_text,
    prompt_token_ids,
    refuse_closing_tokens,
    refuse_missing_generation_prompt,
    render_chat,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_COLUMNS = ("prompt", "instruction", "question")
_CHAT_COLUMNS = ("messages", "context_messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Columns:
    """Which input columns hold what; either `prompt` or `messages` is set."""

    prompt: str | None
    messages: str | None
    answer: str | None


@dataclass(frozen=True, slots=True)
class Form:
    """How rows become prompts; see `pipeline.config.PromptsConfig` for the fields."""

    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    to_chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


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
    rows: Iterable[tuple[str, Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase, *, form: Form
) -> Iterator[dict[str, Any]]:
    """Rows of `PROMPTS`, in order, with repeated ones.

    Raises:
        InputError: with the row's place, for an empty prompt, a wrong type, a chat that the template cannot write, or
            a tokenizer that cannot write a prompt.
    """
    found: Columns | None = None
    checked: set[bool] = set()  # whether of a chat: what depends on the tokenizer alone is checked once
    for where, row in rows:
        missing = found is None or any(name is not None and name not in row for name in (found.prompt, found.messages))
        if found is None or missing or (found.answer is None and "answer" in row):
            found = find_columns(row, form.columns, where=where)
        value = row[found.prompt or found.messages or ""]
        chat, text = chat_and_text(value, tokenizer, form, where)
        if (chat is not None) not in checked:
            checked.add(chat is not None)
            if chat is None:
                refuse_closing_tokens(tokenizer, text, where=where)
            else:
                refuse_missing_generation_prompt(tokenizer, chat, form.chat_template_kwargs, where=where)
        answer = row.get(found.answer) if found.answer else None
        extra = {k: v for k, v in row.items() if k not in (found.prompt, found.messages, found.answer)}
        several = isinstance(answer, (list, dict))
        answer_text = json.dumps(answer, ensure_ascii=False) if several else None if answer is None else str(answer)
        extra_text = json.dumps(extra, ensure_ascii=False, sort_keys=True, default=str)
        yield {
            "prompt_id": row_id("prompt", json.dumps(chat) if chat else text, answer_text, extra_text),
            "round": 0,
            "prompt": text,
            "conversation": chat,
            "prompt_token_ids": prompt_token_ids(tokenizer, text, rendered=chat is not None, where=where),
            "answer": answer_text,
            "extra": extra_text,
        }


def chat_and_text(
    value: Any, tokenizer: PreTrainedTokenizerBase, form: Form, where: str
) -> tuple[list[dict[str, str]] | None, str]:
    """The conversation, None for plain text, and the text that is tokenised."""
    if not isinstance(value, list):
        text = _plain_text(value, where)
        if not form.to_chat:
            if form.system is not None:
                raise InputError(
                    where,
                    wanted="a chat, to put prompts.system before",
                    got="plain text",
                    fix="--set prompts.to_chat=true, which makes each text a chat of one user message",
                )
            return None, text
        value = [{"role": "user", "content": text}]
    chat = _conversation(value, form.system, where)
    text = render_chat(tokenizer, chat, form.chat_template_kwargs, generation_prompt=True, where=where)
    _refuse_left_out(chat, text, where)
    return chat, text


def _plain_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        got = "an empty prompt" if isinstance(value, str) else kind_of(value)
        raise InputError(
            where, wanted="a prompt: text, or a list of messages", got=got, fix="fill the row or remove it"
        )
    return value


def _conversation(messages: Sequence[Any], system: str | None, where: str) -> list[dict[str, str]]:
    chat = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
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
    if not chat[-1]["content"].strip():
        raise InputError(where, wanted="a question", got="an empty last message", fix="fill the row or remove it")
    if system is not None and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": system})
    return chat


def _refuse_left_out(chat: Sequence[Mapping[str, str]], text: str, where: str) -> None:
    """Refuse a text in which the template wrote no system message, or not the question."""
    for message in (chat[0], chat[-1]):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise InputError(
                where,
                wanted=f"a chat template that writes the {message['role']} message",
                got=f"a rendered chat without it: {text[:200]!r}",
                fix="--set prompts.system=null, or mend the template"
                if message["role"] == "system"
                else "mend the chat template of the policy's tokenizer",
            )


def distinct(rows: Iterable[dict[str, Any]]) -> tuple[pa.Table, int]:
    """A table of the rows with each id once, and how many were merged."""
    found: dict[str, dict[str, Any]] = {}
    count = 0
    for row in rows:
        found.setdefault(row["prompt_id"], row)
        count += 1
    return PROMPTS.table(found.values()), count - len(found)


def count_changed(prompts: pa.Table, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many prompts cannot be read from their token ids again: the policy sees another text than a person does."""
    columns = (prompts["prompt"].to_pylist(), prompts["prompt_token_ids"].to_pylist())
    return sum(not keeps_text(tokenizer, text, ids) for text, ids in zip(*columns, strict=True))


# ---- drawing --------------------------------------------------------------------------------------------------------


def question_of(prompt: str, conversation: Sequence[Mapping[str, str]] | None) -> str:
    """What a prompt asks, however it is rendered: its text, or the chat's messages without those of the system.

    What is evaluated on and what is trained on are told apart by it, whatever template, system message or form.
    """
    if conversation is None:
        return prompt
    asked = [message for message in conversation if message["role"] != "system"]
    if len(asked) == 1:
        return asked[0]["content"]
    return json.dumps([[message["role"], message["content"]] for message in asked])


def questions(prompts: pa.Table) -> list[str]:
    """`question_of` every row of a table of `PROMPTS`."""
    rows = prompts.select(["prompt", "conversation"]).to_pylist()
    return [question_of(row["prompt"], row["conversation"]) for row in rows]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which side of a held-out share is meant: that share (`wanted`), or the rest."""

    share: float
    wanted: bool

    def keeps(self, question: str) -> bool:
        """Whether a prompt is on this side: by its question alone, so that new rows and columns move no old one."""
        return (int(row_id("holdout", question)[:8], 16) / 2**32 < self.share) == self.wanted


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

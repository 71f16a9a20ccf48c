"""Ready preference pairs as people have them in, rows of `PAIRS` out.

Accepted are TRL's columns (``prompt``, ``chosen``, ``rejected``, as text or messages; or whole conversations in
``chosen`` and ``rejected`` whose common beginning is the prompt), those of the trainers beside it (``conversations``,
``messages``, ``question`` or ``instruction`` with ``input``; ``chosen_response`` and ``rejected_response``; one
``{"from": ..., "value": ...}`` an answer; a chat's ``system``), and any others by `pairs.columns`. An answer that comes
as text ends with the EOS, since a whole answer is meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.prompts import Form, chat_and_text
from stages.errors import InputError
from stages.seeds import row_id
from stages.tokenizers import prompt_token_ids, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "messages": ("messages", "conversations", "context_messages"),
    "chosen": ("chosen", "chosen_response", "response_chosen", "accepted"),
    "rejected": ("rejected", "rejected_response", "response_rejected"),
    "score_chosen": ("score_chosen", "chosen_score", "chosen_rating", "chosen-rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected_rating", "rejected-rating"),
}


@dataclass(frozen=True, slots=True)
class ReadyPair:
    """One row, understood: the prompt as text or as the chat behind it, and both answers' texts."""

    prompt: str
    chat: list[dict[str, str]] | None
    chosen: str
    rejected: str
    score_chosen: float | None
    score_rejected: float | None


def pair_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    form: Form,
    round: int,
    ends: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """Rows of `PAIRS`, in order, with repeated ones; pairs of two equal answers are left out.

    Args:
        ends: ids of tokens that end an answer, besides the tokenizer's EOS.

    Raises:
        InputError: with the row's place, for missing columns, a wrong type, an empty prompt, or a chat without a
            template.
    """
    ends = [tokenizer.eos_token_id, *ends]
    for where, row in rows:
        pair = understood(row, tokenizer, form, where=where)
        if pair.chosen == pair.rejected:
            continue
        prompt_ids = prompt_token_ids(tokenizer, pair.prompt, rendered=pair.chat is not None, where=where)
        chosen_ids = _answer_ids(pair, pair.chosen, prompt_ids, tokenizer, form, ends, where)
        rejected_ids = _answer_ids(pair, pair.rejected, prompt_ids, tokenizer, form, ends, where)
        prompt_id = row_id("prompt", pair.prompt)
        chosen_id, rejected_id = (row_id("response", prompt_id, text) for text in (pair.chosen, pair.rejected))
        both = pair.score_chosen is not None and pair.score_rejected is not None
        yield {
            "pair_id": row_id("pair", chosen_id, rejected_id),
            "prompt_id": prompt_id,
            "chosen_id": chosen_id,
            "rejected_id": rejected_id,
            "round": round,
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "score_chosen": pair.score_chosen,
            "score_rejected": pair.score_rejected,
            "margin": pair.score_chosen - pair.score_rejected if both else None,  # type: ignore[operator]
            "prompt_token_ids": prompt_ids,
            "chosen_token_ids": chosen_ids,
            "rejected_token_ids": rejected_ids,
            "chosen_rewards": [],
            "rejected_rewards": [],
            "policy_round": None,
        }


def understood(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, form: Form, *, where: str) -> ReadyPair:
    """A row's prompt and answers, whatever form they came in.

    Raises:
        InputError: if it has none of the known forms.
    """
    found = _found_columns(row, form.columns, where)
    chosen, rejected = _messages(row[found["chosen"]]), _messages(row[found["rejected"]])
    prompt = _prompt(row, found)
    if prompt is None:
        prompt, chosen, rejected = _common_beginning(chosen, rejected, where)
    elif isinstance(prompt, list) or isinstance(chosen, list):
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        chosen, rejected = _without(before, chosen), _without(before, rejected)
        prompt = before
    own_system = row.get("system") if isinstance(row.get("system"), str) else None
    if own_system and (form.to_chat or isinstance(prompt, list)):
        form = replace(form, system=own_system)
    chat, text = chat_and_text(prompt, tokenizer, form, where)
    return ReadyPair(
        text,
        chat,
        _answer_text(chosen, "chosen", where),
        _answer_text(rejected, "rejected", where),
        _number(row, found.get("score_chosen"), where),
        _number(row, found.get("score_rejected"), where),
    )


def _found_columns(row: Mapping[str, Any], mapped: Mapping[str, str], where: str) -> dict[str, str]:
    found = dict(mapped)
    is_asked = "prompt" in mapped or "messages" in mapped
    for role, names in _NAMES.items():
        name = next((name for name in names if name in row), None)
        if role not in found and name is not None and not (is_asked and role in ("prompt", "messages")):
            found[role] = name
    for role in ("chosen", "rejected", *mapped):
        if found.get(role) not in row:
            usual = f"a column called {', '.join(_NAMES[role])}"
            wanted = f"column {found[role]!r}, as pairs.columns.{role} says" if role in found else usual
            raise InputError(
                where,
                wanted=wanted,
                got=f"the columns {', '.join(row) or 'none'}",
                fix=f"--set pairs.columns.{role}=NAME",
            )
    return found


def _prompt(row: Mapping[str, Any], found: Mapping[str, str]) -> Any:
    """The prompt as text or messages; None where the answers hold it."""
    column = found.get("prompt") or found.get("messages")
    if column is None or row[column] is None:
        return None
    value = row[column]
    more = row.get("input") if column == "instruction" else None
    return f"{value}\n{more}" if isinstance(value, str) and more else value


def _messages(value: Any) -> Any:
    """One message alone as a list of it."""
    return [value] if isinstance(value, Mapping) else value


def _common_beginning(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """Prompt and answers of two whole conversations."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise InputError(
            where,
            wanted="a column with the prompt, or conversations in chosen and rejected that begin with it",
            got="only the answers' texts",
            fix="--set pairs.columns.prompt=NAME",
        )
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if not length:
        raise InputError(
            where,
            wanted="conversations in chosen and rejected that begin with the same prompt",
            got="two that have no beginning in common, and no column with the prompt",
            fix="mend the row or remove it, or --set pairs.columns.prompt=NAME",
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _without(before: Sequence[Any], answer: Any) -> Any:
    """An answer that repeats the prompt's messages, without them."""
    if isinstance(answer, list) and len(answer) > len(before) and answer[: len(before)] == list(before):
        return answer[len(before) :]
    return answer


def _answer_text(answer: Any, role: str, where: str) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], Mapping):
        text = answer[0].get("content", answer[0].get("value"))
        said_by = answer[0].get("role", answer[0].get("from"))
        if isinstance(text, str) and said_by in ("assistant", "gpt"):
            return text
    raise InputError(
        f"{where}, {role}",
        wanted="an answer: text, or one message of the assistant",
        got=repr(answer)[:120],
        fix="mend the row or remove it; answers of several turns are not trained on",
    )


def _number(row: Mapping[str, Any], column: str | None, where: str) -> float | None:
    if column is None or row[column] is None:
        return None
    try:
        score = float(row[column])
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        got = repr(row[column])[:120]
        raise InputError(f"{where}, {column}", wanted="a finite number", got=got, fix="mend the row or remove it")
    return score


def _answer_ids(
    pair: ReadyPair,
    answer: str,
    prompt_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    form: Form,
    ends: Sequence[int],
    where: str,
) -> list[int]:
    """An answer's tokens up to the first that would have ended a sampled one, which is added where there is none.

    A chat's answer is what the template makes of it behind the rendered prompt, where that begins with the prompt.
    """
    text = answer
    if pair.chat is not None:
        messages = [*pair.chat, {"role": "assistant", "content": answer}]
        whole = render_chat(tokenizer, messages, form.chat_template_kwargs, generation_prompt=False, where=where)
        text = whole.removeprefix(pair.prompt) if whole.startswith(pair.prompt) else answer
    joint = prompt_token_ids(tokenizer, pair.prompt + text, rendered=pair.chat is not None, where=where)
    goes_on = joint[: len(prompt_ids)] == list(prompt_ids)  # else the seam was merged into one token
    ids = joint[len(prompt_ids) :] if goes_on else _ids_in_a_text(tokenizer, text)
    last = next((place for place, token in enumerate(ids) if token in ends), None)
    return [*ids, tokenizer.eos_token_id] if last is None else ids[: last + 1]


def _ids_in_a_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that does not begin anything: some tokenizers put a space before a first word."""
    before = list(tokenizer("\n", add_special_tokens=False).input_ids)
    ids = list(tokenizer("\n" + text, add_special_tokens=False).input_ids)
    if ids[: len(before)] == before:
        return ids[len(before) :]
    return list(tokenizer(text, add_special_tokens=False).input_ids)

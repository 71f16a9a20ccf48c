"""What rows and answers bring along for a forward, by which they are dealt to ranks and forwards."""

from __future__ import annotations

from stages.update.batching import Load
from stages.update.rows import AnswerRow, PairRow, Row


def row_load(row: Row, *, shares: bool, pushed_share: float | None) -> Load:
    """What a row brings along, where answers share their prompt's forward or not.

    Args:
        pushed_share: the share of rejected answers expected to get a gradient, where the others' backward is left out.
    """
    lengths = [len(answer.token_ids) for answer in row.answers]
    if isinstance(row, PairRow) and row.stream is not None:
        lengths.append(len(row.stream.token_ids))
    num_prompt = len(row.prompt_token_ids)
    if not shares:
        num_tokens = sum(lengths) + num_prompt * len(lengths)
        return Load(id(row), 0, num_tokens, 3.0 * num_tokens)
    cost = 3.0 * sum(lengths)
    if pushed_share is not None:
        cost -= (2 - 3 * pushed_share) * lengths[1]
    return Load(tuple(row.prompt_token_ids), num_prompt, sum(lengths), cost)


def answer_load(answer: AnswerRow, *, shares: bool) -> Load:
    """What an answer to be scored brings along, where answers share their prompt's forward or not."""
    num_prompt, num_answer = len(answer.prompt_token_ids), len(answer.token_ids)
    if shares:
        return Load(tuple(answer.prompt_token_ids), num_prompt, num_answer, 3.0 * num_answer)
    return Load(answer.response_id, 0, num_prompt + num_answer, 3.0 * (num_prompt + num_answer))

"""A reward server: answers in batches, a number for each.

``get_reward`` is what OpenRLHF posts to its ``remote_rm_url``: ``{"query": [...], "prompts": [...], "labels": [...]}``,
a query being prompt and answer as one text, and what it reads, ``{"rewards": [...]}``. ``classify`` is vLLM's endpoint
of that name as verl asks it: ``{"model": ..., "input": [...], "use_activation": false}`` for ``{"data": [{"index": 0,
"probs": [...]}]}``; a chat goes there as messages, so that the server renders it by the reward model's own template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stages.protocols import NoReward, Turn
from stages.score.functions import text_of
from stages.score.wire.asking import Asker, Question, number
from stages.score.wire.cache import key_of
from stages.score.wire.client import Refused
from stages.score.wire.config import HttpReward


class RewardServer(Asker[HttpReward]):
    """`stages.protocols.Reward` by a reward server; see `Asker`."""

    @property
    def sees(self) -> Literal["turns", "texts"]:
        return "texts" if self.config.protocol == "get_reward" else "turns"

    @property
    def url(self) -> str:
        return self.config.url

    def question(self, prompt: Turn, completion: Turn, columns: Mapping[str, object]) -> Question:
        if self.config.protocol == "get_reward":
            return {
                "query": text_of(prompt) + text_of(completion),
                "prompts": text_of(prompt),
                "labels": columns["answer"],
            }
        if isinstance(prompt, str):
            return {"input": prompt + text_of(completion)}
        return {"messages": [*prompt, *completion]}

    def key(self, question: Question) -> bytes:
        return key_of("http", self.config.server, self.config.protocol, self.config.model, self.config.field, question)

    def batches(self, questions: Sequence[Question]) -> list[list[int]]:
        chats = [[at] for at, question in enumerate(questions) if "messages" in question]
        texts, size = (
            [at for at, question in enumerate(questions) if "messages" not in question],
            self.config.batch_size,
        )
        return [texts[start : start + size] for start in range(0, len(texts), size)] + chats

    def body(self, questions: Sequence[Question]) -> dict[str, Any]:
        if self.config.protocol == "get_reward":
            return {name: [question[name] for question in questions] for name in ("query", "prompts", "labels")}
        asked = {"model": self.config.model, "use_activation": False}
        if "messages" in questions[0]:
            return asked | {"messages": questions[0]["messages"], "add_generation_prompt": False}
        return asked | {"input": [question["input"] for question in questions]}

    def replies(self, reply: Any, count: int) -> list[Any]:
        if self.config.protocol == "classify":
            found = _scores(reply)
        else:
            found = reply.get(self.config.field) if isinstance(reply, dict) else None
        if not isinstance(found, list):
            raise Refused(f"a reply without a list of {self.config.field}: {str(reply)[:80]!r}")
        if len(found) != count:
            raise Refused(f"{len(found)} rewards for {count} answer{'s' * (count > 1)}")
        return found

    def value(self, reply: Any) -> float | NoReward:
        return number(reply)


def _scores(reply: Any) -> list[Any] | None:
    """The last class's score of each input, in the inputs' order."""
    try:
        rows = sorted(reply["data"], key=lambda row: int(row["index"]))
        return [row["probs"][-1] for row in rows]
    except (KeyError, IndexError, TypeError, ValueError):
        return None

"""A chat model as a judge: a rubric filled in for each answer, sent to an OpenAI-compatible endpoint, a score read.

An answer can try to talk to the judge: whatever stands in it reaches the judge as a part of the rubric's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.errors import StageError
from stages.protocols import NoReward, Turn
from stages.score.functions import text_of
from stages.score.wire.asking import Asker, Question
from stages.score.wire.cache import key_of
from stages.score.wire.client import Refused
from stages.score.wire.config import JudgeReward
from stages.score.wire.reading import score_in

_PATH = "/chat/completions"


class Judge(Asker[JudgeReward]):
    """`stages.protocols.Reward` by a judge; see `Asker`.

    Args:
        rubric: the template's text, wherever it came from.
    """

    def __init__(self, config: JudgeReward, *, name: str, cache: Path, rubric: str) -> None:
        super().__init__(config, name=name, cache=cache)
        self._rubric = rubric

    @property
    def url(self) -> str:
        base, mark, query = self.config.url.partition("?")
        base = base.rstrip("/")
        return (base if base.endswith(_PATH) else base + _PATH) + mark + query

    def question(self, prompt: Turn, completion: Turn, columns: Mapping[str, object]) -> Question:
        from jinja2 import TemplateError

        try:
            told = self._template.render({**columns, "prompt": _shown(prompt), "completion": text_of(completion)})
        except TemplateError as error:
            raise StageError(
                f"score: reward {self.name}",
                wanted="a rubric that can be filled in",
                got=f"{type(error).__name__}: {error}",
                fix=f"mend the rubric; it may use prompt, completion, {', '.join(columns)}",
            ) from None
        system = [{"role": "system", "content": self.config.system}] if self.config.system is not None else []
        return {"messages": [*system, {"role": "user", "content": told}]}

    def key(self, question: Question) -> bytes:
        return key_of("judge", self.config.server, self.body([question]))

    def batches(self, questions: Sequence[Question]) -> list[list[int]]:
        return [[at] for at in range(len(questions))]

    def body(self, questions: Sequence[Question]) -> dict[str, Any]:
        (question,), config = questions, self.config
        asked = {"temperature": config.temperature, "seed": config.seed, "max_tokens": config.max_tokens}
        given = {name: value for name, value in asked.items() if value is not None}
        return {"model": config.model, **question, **given, **config.body}

    def replies(self, reply: Any, count: int) -> list[Any]:
        try:
            choice = reply["choices"][0]
            return [[choice["message"].get("content") or "", choice.get("finish_reason")]]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Refused(f"a reply that is no chat completion: {str(reply)[:80]!r}") from None

    def value(self, reply: Any) -> float | NoReward:
        content, finish_reason = reply
        if finish_reason == "length":
            return NoReward(f"the judge's reply was cut at max_tokens {self.config.max_tokens}")
        return score_in(str(content), self.config)

    @cached_property
    def _template(self) -> Any:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        return SandboxedEnvironment(undefined=StrictUndefined).from_string(self._rubric)


def _shown(prompt: Turn) -> str:
    """A prompt as the judge reads it; of a chat, every message under its role, unless there is only a user's."""
    if isinstance(prompt, str):
        return prompt
    if [message["role"] for message in prompt] == ["user"]:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)

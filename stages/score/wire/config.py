"""The settings of rewards that a server gives: ``http``, a reward server, and ``judge``, a chat model with a rubric."""

from __future__ import annotations

import os
import re
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, model_validator

from stages.errors import ConfigError, InputError
from stages.score.reward_settings import RewardSettings
from stages.settings import where

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SECRET_PARAMETER = re.compile(r"(?i)(key|token|secret|sig|signature|password)$")
_ADDRESS = re.compile(r"https?://[^\s/?#]+")


class WireSettings(RewardSettings):
    """How a server is asked, whatever it is asked."""

    url: str = Field(description="http:// or https:// address; a part of what the reward is, unless version is given")
    version: str | None = Field(
        None, description="names what the server runs; its address may then change without making another reward"
    )
    token_env: str | None = where(
        None, description="NAME of the environment variable with the token; it is read where scoring runs, never kept"
    )
    token_header: str = where(
        "Authorization", pattern=r"^[A-Za-z0-9-]+$", description="header of the token; Authorization: as a bearer's"
    )
    concurrency: int = where(4, ge=1, le=256, description="requests under way at once")
    timeout_s: float = where(60.0, gt=0, description="seconds for one request, its whole answer included")
    retries: int = where(4, ge=0, description="further tries of a request that failed, after 0.5, 1, 2, … seconds")
    requests_per_second: float | None = where(None, gt=0, description="at most; null: no limit")

    @model_validator(mode="after")
    def _an_address_without_secrets(self) -> Self:
        if not _ADDRESS.match(self.url):
            raise ConfigError(
                "url",
                wanted="an address with http:// or https://",
                got=repr(self.url),
                fix="for example http://localhost:5000/get_reward",
            )
        secret = next((name for name, _ in parse_qsl(urlsplit(self.url).query) if _SECRET_PARAMETER.search(name)), None)
        if secret is not None or urlsplit(self.url).password is not None:
            raise ConfigError(
                "url",
                wanted="an address without a token or password",
                got=f"one with {secret or 'a password'} (not shown)",
                fix="name the environment variable that holds it: token_env: MY_TOKEN",
            )
        if self.token_env is not None and not _VARIABLE.fullmatch(self.token_env):
            raise ConfigError(  # what stands there may be the token itself
                "token_env",
                wanted="the name of an environment variable, in capitals",
                got="something else (not shown)",
                fix="token_env: MY_TOKEN, and export MY_TOKEN=… before the command",
            )
        return self

    def identity(self) -> dict[str, Any]:
        given = super().identity()
        if self.version is not None:
            given.pop("url")
        return given

    @property
    def server(self) -> str:
        """What answers are kept under: the version if there is one, else the address."""
        return self.version if self.version is not None else self.url

    @property
    def default_name(self) -> str:
        return urlsplit(self.url).hostname or self.url


class HttpReward(WireSettings):
    """A reward server: one number for each answer of a batch."""

    type: Literal["http"] = Field(description="a reward server")
    protocol: Literal["get_reward", "classify"] = Field(
        "get_reward",
        description="get_reward: OpenRLHF's, {query, prompts, labels} for {rewards}; classify: vLLM's /classify, as "
        "verl asks it, {model, input} for the score before any sigmoid",
    )
    model: str | None = Field(None, description="classify: the model's name at the server")
    field: str = Field("rewards", min_length=1, description="get_reward: where the numbers stand in the reply")
    batch_size: int = where(64, ge=1, description="answers a request; chats go to classify one by one")

    @model_validator(mode="after")
    def _taken_by_the_protocol(self) -> Self:
        if self.protocol == "classify" and self.model is None:
            raise ConfigError("model", wanted="the model's name, for classify", got="nothing", fix="add model: NAME")
        if self.protocol == "get_reward" and self.model is not None:
            raise ConfigError("model", wanted="none with get_reward", got=self.model, fix="use version: instead")
        return self


class JudgeReward(WireSettings):
    """A chat model behind an OpenAI-compatible endpoint that scores an answer by a rubric."""

    type: Literal["judge"] = Field(description="a chat model with a rubric")
    model: str = Field(min_length=1, description="its name at the endpoint")
    rubric: str | None = Field(
        None, description="what it is told, a Jinja template of prompt, completion, answer and the prompts' columns"
    )
    rubric_file: str | None = Field(None, description="a file beside the config with the rubric, in its place")
    system: str | None = Field(None, description="system message")
    read: Literal["last_number", "json", "pattern"] = Field(
        "last_number",
        description="how the score is read: the reply's last number (8/10 is 8); a field of its last JSON object; "
        "the last match of a pattern",
    )
    json_field: str = Field("score", min_length=1, description="of read: json")
    pattern: str | None = Field(None, description="of read: pattern; a regular expression with one group, the number")
    low: float = Field(0.0, description="least score; another number than from low to high is no score")
    high: float = Field(10.0, description="greatest score")
    temperature: float | None = Field(0.0, ge=0, description="null: not sent, for endpoints that refuse it")
    seed: int | None = Field(0, description="sent along; null: not sent, for endpoints that refuse it")
    max_tokens: int = Field(512, ge=1, description="of a reply; one that ends there is no score")
    body: dict[str, Any] = Field({}, description="further fields of the request, such as response_format")

    @model_validator(mode="after")
    def _one_rubric_and_a_range(self) -> Self:
        if (self.rubric is None) == (self.rubric_file is None):
            got = "neither" if self.rubric is None else "both"
            raise ConfigError("rubric", wanted="rubric or rubric_file", got=got, fix="rubric_file: rubric.txt")
        if self.rubric is not None:
            check_rubric(self.rubric, where="rubric")
        if self.low >= self.high:
            raise ConfigError("low", wanted=f"less than high {self.high:g}", got=f"{self.low:g}", fix="exchange them")
        if (self.read == "pattern") != (self.pattern is not None) or not _has_one_group(self.pattern):
            raise ConfigError(
                "pattern",
                wanted="a regular expression with one group, with read: pattern alone",
                got=f"{self.pattern!r} with read: {self.read}",
                fix=r"for example read: pattern, pattern: 'Score:\s*(\d+)'",
            )
        return self

    @property
    def default_name(self) -> str:
        return self.model.rstrip("/").split("/")[-1]


def token_of(config: WireSettings, *, where: str) -> str:
    """The server's token out of the environment; empty where the config names none.

    Raises:
        InputError: if there is nothing under the name that the config gives.
    """
    name = config.token_env
    token = os.environ.get(name, "").strip() if name is not None else ""
    if name is not None and not token:
        raise InputError(
            f"{where}: token_env",
            wanted=f"the server's token in the environment variable {name}, where scoring runs",
            got="nothing",
            fix=f"export {name}=… before the command; on a cluster, where its nodes are started",
        )
    return token


def check_rubric(text: str, *, where: str) -> None:
    """Refuse a rubric that is no template, or that shows no answer.

    Raises:
        ConfigError: with what the template's reader says.
    """
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import SandboxedEnvironment

    try:
        used = meta.find_undeclared_variables(SandboxedEnvironment().parse(text))
    except TemplateSyntaxError as error:
        got = f"{error.message} (line {error.lineno})"
        raise ConfigError(where, wanted="a Jinja template", got=got, fix="mend the template there") from None
    if "completion" not in used:
        raise ConfigError(
            where,
            wanted="a template that shows the judge the answer: {{ completion }}",
            got=f"one of {', '.join(sorted(used)) or 'no variable'}",
            fix="write {{ completion }} where the answer belongs, and {{ prompt }} for what it answers",
        )


def _has_one_group(pattern: str | None) -> bool:
    try:
        return pattern is None or re.compile(pattern).groups == 1
    except re.error:
        return False

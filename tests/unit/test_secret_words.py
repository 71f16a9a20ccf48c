"""No secret in a config is let through, and none is repeated in the refusal."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config_file import load_config
from pipeline.secret_words import refuse_secrets
from stages.errors import ConfigError

ROOT = Path(__file__).parents[2]
LETTERS = string.ascii_letters + string.digits


def drawn(count: int) -> str:
    return "".join(random.Random(count).choices(LETTERS, k=count))


SHAPED = {
    "hub token": "hf_" + drawn(34),
    "openai": "sk-" + drawn(40),
    "github": "ghp_" + drawn(36),
    "aws": "AKIA" + drawn(40).upper()[:16],
    "url": f"https://someone:{drawn(12)}@example.com/prompts.jsonl",
    "ray": f"ray://:{drawn(12)}@head:10001",
    "user alone": f"https://{drawn(20)}@example.com/prompts.jsonl",
    "query": f"https://example.com/prompts.jsonl?access_token={drawn(20)}",
    "sas": f"https://example.com/prompts.jsonl?sv=1&sig={drawn(20)}",
    "github fine": "github_pat_" + drawn(36),
    "google": "AIza" + drawn(35),
    "pem": "-----BEGIN RSA PRIVATE KEY-----\n" + drawn(64),
}
PLACES = ("policy.path", "prompts.path", "cluster.address", "prompts.system", "sample.stop", "run.unknown")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", SHAPED)
def test_what_looks_like_a_secret_is_refused_wherever_it_stands_and_not_shown(tmp_path, place, kind):
    secret = SHAPED[kind]
    section, _, key = place.partition(".")
    file = tmp_path / "mine.yaml"
    file.write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    with pytest.raises(ConfigError) as caught:
        load_config(file, [f"{section}.{key}={secret!r}".replace("\\n", "\n")])
    assert place in str(caught.value) and "secret" in str(caught.value)
    assert secret not in str(caught.value) and secret[-12:] not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "MY_API_KEY", "DB_PASSWORD", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_PAT"]
    + ["OPENAI_KEY", "SSH_PASSPHRASE", "DB_PASS", "JWT", "NPM_TOKEN_2"],
)
def test_a_secret_of_the_environment_is_known_by_its_value(monkeypatch, name):
    value = drawn(17)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        refuse_secrets({"prompts": {"system": f"say {value} twice"}}, file="mine.yaml")
    assert name in caught.value.got and value not in str(caught.value)


@pytest.mark.parametrize("key", ["api_key", "password", "hub_token", "client_secret", "access_key", "PASSWD"])
def test_a_value_under_a_secrets_name_is_refused(key):
    with pytest.raises(ConfigError):
        refuse_secrets({"prompts": {"chat_template_kwargs": {key: "abc"}}}, file="mine.yaml")
    for value in (["abc"], {"deeper": "abc"}, 12345678):
        with pytest.raises(ConfigError):
            refuse_secrets({"prompts": {"chat_template_kwargs": {key: value}}}, file="mine.yaml")


@pytest.mark.parametrize("name", ["PWD", "HOME", "PATH"])
def test_a_path_below_the_folder_that_a_shell_works_in_is_none(monkeypatch, name):
    monkeypatch.setenv(name, "/some/folder/of/mine")
    refuse_secrets({"run": {"dir": "/some/folder/of/mine/runs"}}, file="mine.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_the_configs_that_come_with_it_hold_none(file):
    load_config(file, [])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["path", "system", "pad_token", "name"]), st.text(max_size=20)))
def test_ordinary_words_are_let_through(values):
    if not any("://" in value and "@" in value for value in values.values()):
        refuse_secrets({"prompts": values}, file="mine.yaml")

"""Whatever stands in a config or in a file of prompts or pairs is taken, or refused in words; nothing else happens."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny_models
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifacts import StageFolder
from pipeline.config_file import load_config
from pipeline.jobs.inputs import PreparePairs, PreparePrompts
from pipeline.prompt_files import WHOLE
from pipeline.prompts import Form
from pipeline.sections import PairsConfig
from pipeline.sources import DataSource
from stages.contracts import PAIRS, PROMPTS
from stages.errors import ConfigError, PrefloopError

QUICKSTART = yaml.safe_load((Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text())

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "none", "-1", "1e400", "../../etc", "a:b", "embedded:", "\x00", "\ud800", "$HOME", "~", "​"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def places(values, above=()):
    """Every place in nested plain values, as a path."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


PLACES = sorted(places(QUICKSTART), key=str)


def said(error: PrefloopError) -> None:
    assert all(part.strip() for part in (error.where, error.wanted, error.got, error.fix)), repr(error)


@settings(max_examples=250, deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES, new_key=st.none() | st.text(max_size=8))
def test_a_config_with_anything_anywhere(tmp_path_factory, place, value, new_key):
    values = copy.deepcopy(QUICKSTART)
    *above, last = place
    section = values
    for key in above:
        section = section[key]
    if new_key is not None and isinstance(section, dict):
        section[new_key] = value
    else:
        section[last] = value
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    try:
        file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    except yaml.YAMLError:
        return
    try:
        load_config(file)
    except ConfigError as error:
        said(error)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_text_or_bytes_as_a_config(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    said(caught.value)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_models.policy("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


COLUMNS = st.sampled_from(["prompt", "messages", "chosen", "rejected", "answer", "instruction", "score_chosen", "x"])
CHAT = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), st.text(max_size=6) | SCALARS, max_size=3),
    max_size=3,
)
ROWS = st.lists(st.dictionaries(COLUMNS, st.text(max_size=12) | CHAT | VALUES, max_size=4), min_size=1, max_size=4)


@pytest.mark.parametrize("contract", [PROMPTS, PAIRS], ids=lambda contract: contract.name)
@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_any_rows(tmp_path_factory, policy, contract, rows):
    folder = tmp_path_factory.mktemp("rows")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, out = DataSource.found(file, key="prompts.path", part=WHOLE), StageFolder(folder / "out", contract)
    common = {"source": found.path, "key": found.key, "tokenizer": policy, "pad_token": "<|endoftext|>"}
    common |= {"part": found.part, "out": out}
    asked = {"form": Form(), "seed": 0, "held_out": None, "exclude": None, "limit": None}
    if contract == PROMPTS:
        job = PreparePrompts(**common, **asked)
    else:
        job = PreparePairs(**common, config=PairsConfig(path="x"), round=1)
    try:
        (entry,) = job(None)
    except PrefloopError as error:
        said(error)
        assert out.entries() == [] and not out.is_closed()
    else:
        assert 1 <= entry.rows <= len(rows)

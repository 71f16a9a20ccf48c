"""Bad configs: each is refused with the place, what was wanted, what was got, and what to do."""

from __future__ import annotations

import pytest
from here import QUICKSTART
from refusals import refused

from pipeline.config import MAX_ROUNDS, Config
from pipeline.config_file import load_config
from pipeline.schedule import parse_addition
from pipeline.watched_files import refuse_watched
from stages.errors import ConfigError, InputError

TEXT = QUICKSTART.read_text()
OFFLINE = ("prompts=null", "score=null", "evaluate=null", "pairs.path=pairs.jsonl", "rounds=1")


def load(tmp_path, content: str | bytes, *overrides: str, name: str = "run.yaml") -> Config:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_config(file, overrides)


FILES = {
    "empty": ("", "sections such as run:", "nothing"),
    "only a comment": ("# later\n", "nothing"),
    "a list": ("- 1\n", "a list"),
    "a word": ("hello", "'hello'"),
    "no YAML": ("a: [", "line 1, column 5"),
    "a tab": ("run:\n\tname: x\n", "line 2", "\\t"),
    "a NUL byte": (b"a: \x00\n", "special characters"),
    "two documents": (TEXT + "\n---\na: 1\n", "another document", "line 34"),
    "a Python object": ("a: !!python/object/apply:os.system ['ls']\n", "constructor"),
    "a key twice": (TEXT + "\nrounds: 1\n", "'rounds'", "line 7", "line 34"),
    "a section twice": (TEXT.replace("policy:", "policy: {path: x}\npolicy:"), "'policy'", "line 6"),
    "endless nesting": ("a: " + "[" * 3000, "too deep"),
    "UTF-16": (TEXT.encode("utf-16"), "UTF-8", "line 1", "0xff"),
    "Latin-1": ((TEXT + "# caf\xe9\n").encode("latin-1"), "UTF-8", "0xe9", "line 33"),
    "a key that is no text": (TEXT + "\n3: 4\n", "3"),
    "a section that is nothing": (TEXT.replace("pair:      {strategy: best_worst, min_margin: 0.5}", "pair:"), "pair"),
    "a name that names no folder": (TEXT.replace("name: quickstart", "name: ../mine"), "run.name", "hyphens"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_config(tmp_path, case):
    content, *says = FILES[case]
    refused(lambda: load(tmp_path, content), "run.yaml", *says, kind=ConfigError)


def test_a_config_that_is_no_file(tmp_path):
    refused(lambda: load_config(tmp_path / "quickstart.yaml"), "no such file", "configs/quickstart.yaml")
    refused(lambda: load_config(tmp_path), "Is a directory")
    refused(lambda: load_config(QUICKSTART / "x.yaml"), "Not a directory")


def test_a_file_whose_name_cannot_name_a_run_says_how_to_name_it(tmp_path):
    nameless = TEXT.replace("run:       {name: quickstart}", "")
    error = refused(lambda: load(tmp_path, nameless, name="my run.yaml"), "'my run'", kind=ConfigError)
    assert "--set run.name=my-run" in error.fix
    assert load(tmp_path, nameless, "run.name=my-run", name="my run.yaml").run.name == "my-run"


@pytest.mark.parametrize("change", [lambda t: b"\xef\xbb\xbf" + t.encode(), lambda t: t.replace("\n", "\r\n").encode()])
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path, change):
    assert load(tmp_path, change(TEXT)) == load(tmp_path, TEXT)


OVERRIDES = {
    "no value": ("sample.temperature", "key=value"),
    "no key": ("=3", "key=value"),
    "an unknown section": ("sampel.temperature=1", "did you mean sample?"),
    "an unknown key": ("update.beat=1", "did you mean update.beta?"),
    "an empty step": ("sample..temperature=1", "sample."),
    "through a number": ("rounds.0.update.beta=1", "section or list"),
    "an entry from behind": ("score.rewards.-1.weight=2", "numbered from 0"),
    "no YAML": ("sample.temperature=@x", "--set sample.temperature", "quotes"),
    "text for a number": ("update.beta=x", "a number", "'x'", "--set update.beta=…"),
    "half a worker": ("update.workers=2.5", "a whole number", "2.5"),
    "below the bound": ("update.beta=-1", "more than 0", "-1"),
    "above the bound": ("sample.top_p=2", "at most 1"),
    "infinite": ("sample.temperature=.inf", "finite"),
    "a date": ("sample.temperature=2026-01-01", "a number"),
    "a text for a list": ("sample.stop=x", "a list"),
    "a list for a section": ("sample=[1]", "a section"),
    "a number for a path": ("policy.path=3", "text"),
    "an empty path": ("policy.path=''", "not empty"),
    "an unknown choice": ("policy.dtype=float16", "'float32' or 'bfloat16'"),
    "true for rounds": ("rounds=true", "a number of rounds"),
    "too many rounds": (f"rounds={MAX_ROUNDS + 1}", "a number of rounds"),
    "a list of numbers for rounds": ("rounds=[1, 2]", "one entry a round"),
    "a misspelt section of a round": ("rounds=[{updat: {beta: 1}}]", "rounds.0", "did you mean update?"),
    "a misspelt key of a round": ("rounds=[{}, {update: {beat: 1}}]", "rounds.1.update.beta"),
    "a round without prompts": ("rounds=[{prompts: null}]", "rounds.0.prompts"),
    "a reward of no type": ("score.rewards.0={path: x}", "type: model or function"),
    "a reward of an unknown type": ("score.rewards.0.type=modle", "type: model or function"),
    "no reward": ("score.rewards=[]", "at least 1"),
    "a target without a function": ("score.rewards.1.target=nocolon", "module:function"),
    "columns as a list": ("prompts.columns=[a]", "keys with values"),
    "pairs and prompts": ("pairs.path=x", "both", "--set prompts=null"),
    "neither": ("prompts=null", "prompts and score, or pairs"),
    "no score": ("score=null", "no score"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_value_that_cannot_be(case):
    override, *says = OVERRIDES[case]
    refused(lambda: load_config(QUICKSTART, [override]), *says, kind=ConfigError)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["rounds=3"], "--set rounds=1"),
        (["evaluate={path: x}"], "no score"),
        (["evaluate={holdout: 0.1}"], "no prompts"),
        (["pairs.columns={chosn: a}"], "chosen"),
    ],
)
def test_ready_pairs_with_what_they_do_not_go_with(more, says):
    assert load_config(QUICKSTART, OFFLINE).num_rounds == 1
    refused(lambda: load_config(QUICKSTART, [*OFFLINE, *more]), says, kind=ConfigError)


@pytest.mark.parametrize("text", ["2", "+0", "+x", "", "+", "++2", "+2.0", "+²", "+" + "9" * 20])
def test_rounds_to_add_that_are_no_number(text):
    refused(lambda: parse_addition(text), "--rounds +2", kind=ConfigError)


def test_a_folder_to_watch_that_is_none(tmp_path):
    (tmp_path / "a.jsonl").touch()
    config = load_config(QUICKSTART)
    refused(lambda: refuse_watched(config, tmp_path / "inbox"), f"mkdir {tmp_path / 'inbox'}", kind=InputError)
    refused(lambda: refuse_watched(config, tmp_path / "a.jsonl"), "a file", kind=InputError)
    refused(lambda: refuse_watched(load_config(QUICKSTART, OFFLINE), tmp_path), "pairs", kind=ConfigError)
    refuse_watched(config, tmp_path)

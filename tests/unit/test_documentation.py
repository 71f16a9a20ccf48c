"""The documentation against the program: every command, key, file, fragment of a config and link in it exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from documents import ROOT, Command, anchors, blocks, commands, links, pages, read, spans

from pipeline.cli import main
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.config_reference import records_in
from stages.errors import ConfigError

QUICKSTART = ROOT / "configs/quickstart.yaml"
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FOLDERS = ("pipeline", "stages", "cluster", "configs", "docs", "benchmarks", "tests")
EXAMPLES = {"my_rewards.py", "my_losses.py", "mine.yaml"}
"""Files that a reader is to write."""
META = {"section.key=value", "KEY=VALUE"}
OF_REPORTS = {"evaluate.against"}
"""Dotted names that are no keys of a config."""


def told(page: str) -> list[Command]:
    """The commands of a page's blocks, and those in its sentences that are more than a name."""
    inline = [Command(page, tuple(shlex.split(span))) for span in spans(page) if re.match(r"(prefloop|make) \S", span)]
    return commands(page) + [command for command in inline if not is_name(command)]


def is_name(command: Command) -> bool:
    """Whether no more is said than what a command is called, as in ``prefloop run …``."""
    _, name, *rest = command.words
    return command.words[0] == "prefloop" and name in {*main.commands, "--help"} and rest in ([], ["…"])


def parsed(command: Command) -> click.Context:
    """The command's words as click takes them.

    Raises:
        click.ClickException: for an unknown command, option or choice, or a missing argument.
    """
    _, name, *rest = command.words
    found = main.commands.get(name)
    if found is None:
        raise click.UsageError(f"no command {name}")
    return found.make_context(name, list(rest))


@pytest.mark.parametrize("page", pages())
def test_every_command_is_one(page):
    for command in told(page):
        program = command.words[0]
        if program == "make":
            targets = [word for word in command.words[1:] if "=" not in word]
            assert set(targets) <= TARGETS, command
        elif program == "prefloop":
            try:
                parsed(command)
            except click.ClickException as error:
                pytest.fail(f"{command.place}: {' '.join(command.words)}: {error.format_message()}")


def settings_of(command: Command) -> tuple[list[str], Path]:
    """What a command sets, and over which config."""
    if command.words[0] == "make":
        made = next((word for word in command.words if word.startswith("ARGS=")), "")
        return re.findall(r"--set ([^\s\"']+)", made), QUICKSTART
    context = parsed(command)
    named = ROOT / str(context.params.get("config") or "")
    return list(context.params.get("overrides") or ()), named if named.is_file() else QUICKSTART


@pytest.mark.parametrize("page", pages())
def test_every_setting_on_a_command_line_is_taken(page):
    named = [
        Command(page, ("prefloop", "run", "mine.yaml", *s.split(" "))) for s in spans(page) if s.startswith("--set ")
    ]
    for command in [c for c in told(page) + named if c.words[0] in ("prefloop", "make")]:
        overrides, config = settings_of(command)
        wanted = [override for override in overrides if override not in META]
        assert load_config(config, wanted), command


def keys_under(kinds: list[type]) -> dict[str, list[type]]:
    return {name: records_in(field.annotation) for kind in kinds for name, field in kind.model_fields.items()}


@pytest.mark.parametrize("page", pages())
def test_every_key_in_a_sentence_is_one(page):
    named = re.compile(rf"({'|'.join(Config.model_fields)})\.([a-z_]+)(\.[a-z_]+)*")
    for span in spans(page):
        key = span.partition(":")[0].partition("=")[0]
        if not named.fullmatch(key) or Path(key).suffix in (".json", ".jsonl", ".yaml", ".md", ".py"):
            continue
        kinds: list[type] = [Config]
        for part in key.split("."):
            known = keys_under(kinds)
            assert key in OF_REPORTS or part in known or not kinds, f"{page}: `{key}` is no key of a config"
            kinds = known.get(part, [])


@pytest.mark.parametrize("page", pages())
def test_every_file_that_is_named_is_there(page):
    here = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*")}
    words = [word for command in commands(page) for word in command.words] + spans(page)
    for word in words:
        if word.rpartition("/")[2] in EXAMPLES:
            continue
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", word):
            assert any(ROOT.glob(word.rstrip("/"))) or any(ROOT.glob(f"{word}.py")), f"{page}: {word}"
        elif re.fullmatch(r"([\w-]+/)*[\w-]+\.(py|sh|toml|jinja)", word):
            assert word.rpartition("/")[2] in here, f"{page}: {word}"


def fragments(text: str) -> list[dict]:
    """A block of YAML as parts of a config: a key that stands there again begins another one; a list has rewards."""
    if text.lstrip().startswith("- "):
        return [{"score": {"rewards": yaml.safe_load(text)}}]
    parts: list[list[str]] = [[]]
    seen: set[str] = set()
    for line in text.splitlines():
        key = re.match(r"(\w+):", line)
        if key and key[1] in seen:
            parts.append([])
            seen = set()
        seen |= {key[1]} if key else set()
        parts[-1].append(line)
    return [yaml.safe_load("\n".join(part)) for part in parts]


def completed(fragment: dict) -> dict:
    """The quickstart's config with a fragment in it."""
    config = yaml.safe_load(QUICKSTART.read_text())
    config["score"]["rewards"].append({"type": "function", "target": "rewards:kind", "role": "auxiliary"})  # for hpo
    if "pairs" in fragment:
        config = {name: part for name, part in config.items() if name not in ("prompts", "score", "evaluate")}
    for name, section in fragment.items():
        whole = name in ("evaluate", "score") or not isinstance(section, dict)
        config[name] = section if whole else config.get(name, {}) | section
    return config


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Path:
    """A folder with the modules that the pages show, to lie beside a config."""
    folder = tmp_path_factory.mktemp("beside")
    for page in pages():
        for block in blocks(page, "python"):
            if name := re.match(r"# (my_\w+\.py), beside the config\n", block.text):
                (folder / name[1]).write_text(block.text)
    return folder


@pytest.mark.parametrize("page", pages())
def test_every_fragment_of_a_config_is_taken(page, beside):
    for block in blocks(page, "yaml"):
        for fragment in fragments(block.text):
            (beside / "fragment.yaml").write_text(yaml.safe_dump(completed(fragment)))
            try:
                load_config(beside / "fragment.yaml")
            except ConfigError as error:
                pytest.fail(f"{block.place}: {fragment}\n{error}")


@pytest.mark.parametrize("page", pages())
def test_every_block_of_python_is_python(page):
    for block in blocks(page, "python"):
        compile(block.text, block.place, "exec")


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.resolve().is_relative_to(ROOT) and file.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}: {link}"


def test_every_page_has_a_place_in_the_contents():
    def files(entry: object) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        parts = entry.values() if isinstance(entry, dict) else entry
        return {file for part in parts for file in files(part)}

    contents = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    here = {file.name for file in (ROOT / "docs").glob("*.md")}
    assert here <= contents, "add them to nav in mkdocs.yml"
    assert contents - here <= {"benchmarks.md", "tests.md"}


def test_the_readme_is_short_enough_for_a_newcomer():
    assert len(read("README.md").splitlines()) < 250

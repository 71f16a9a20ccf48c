"""The commands that the documentation shows, run as they stand there, on a run as small as can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from documents import ROOT, blocks, commands, pages

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

SMALL = ("rounds=1", "prompts.per_round=64", "prompts.shard_size=32", "evaluate.num_prompts=64")
OF_CLUSTERS = {"docs/clusters.md", "docs/storage.md", "docs/scale.md"}
"""Pages whose commands want a cluster or a store; the tests of these parts run them."""
FIRST = ("run", "mine.yaml")
NAMED = {"runs/NAME": "runs/quickstart", "runs/OTHER": "runs/gentle", "runs/another": "runs/gentle"}
"""What a reader puts his own names for."""
OF_NO_RUN = ("doctor", "plan", "sample", "score", "pair", "update")


def documented() -> list[tuple[str, ...]]:
    """What comes behind ``prefloop`` in blocks of shell, made small and each once; runs come first."""
    words = [
        made_small(command.words[1:])
        for page in pages()
        if page not in OF_CLUSTERS
        for command in commands(page)
        if command.words[0] == "prefloop"
    ]
    runs = [call for call in words if call[0] == "run"]
    return list(dict.fromkeys([FIRST, *runs, *words]))


def made_small(words: tuple[str, ...]) -> tuple[str, ...]:
    """The same call on a small run: names filled in, and what a call of other settings makes in a run of its own."""
    if words == ("run", "configs/quickstart.yaml"):
        return FIRST
    call = [NAMED.get(word, word) for word in words]
    if "--model" in call:
        call[call.index("--model") + 1] = "exported"
    if call[0] in ("run", "plan", "doctor") and "configs/quickstart.yaml" in call:
        call += [part for override in SMALL for part in ("--set", override)]
    sets = [word for word in call if "=" in word]
    if call[0] == "run" and "mine.yaml" in call and any(not word.startswith("run.") for word in sets):
        call += [
            "--set",
            f"run.name={sets[0].partition('=')[0]}",
        ]
    return tuple(call)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where a reader stands: configs, one of his own, and a watched folder that says to stop."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "FOLDER").mkdir()
    (folder / "FOLDER" / "STOP").touch()
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    for override in SMALL:
        key, _, value = override.partition("=")
        *section, name = key.split(".")
        (config[section[0]] if section else config)[name] = int(value)
    digits = [f"{number:05d}" for number in range(10_007, 90_000, 400)]  # a stage by itself asks them all
    rows = [json.dumps({"prompt": f"{text}>", "answer": text[::-1]}) for text in digits]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    config["prompts"]["path"] = str(folder / "prompts.jsonl")
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return folder


def called(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)


def a_row(place: Path) -> str:
    import pyarrow.parquet as pq

    parts = sorted((place / "runs/quickstart/round-0001/pairs").glob("part-*.parquet"))
    return pq.read_table(parts[0])["pair_id"][0].as_py()


def wrong_ends(place: Path, commands: list[tuple[str, ...]]) -> list[str]:
    """What some commands said, one after another, that did not end well."""
    wrong = []
    for words in commands:
        call = [a_row(place) if word == "ID" else word for word in words]
        done = called(place, sys.executable, "-m", "pipeline", *call)
        if done.returncode or "Traceback" in done.stdout + done.stderr:
            wrong.append(
                f"prefloop {' '.join(call)}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
    return wrong


def test_every_documented_command_ends_well(place):
    """Those that work on no run beside the others, since each waits for its own processes most of the time."""
    of_no_run = [words for words in documented() if words[0] in OF_NO_RUN and "--preview" not in words]
    of_runs = [words for words in documented() if words not in of_no_run]
    with ThreadPoolExecutor(2) as side_by_side:
        found = side_by_side.map(wrong_ends, (place, place), (of_no_run, of_runs))
        wrong = [told for lane in found for told in lane]
    assert not wrong, "\n\n".join(wrong)


def test_the_policy_is_used_as_the_quickstart_shows(place):
    (shown,) = [block for block in blocks("docs/quickstart.md", "python") if "from_pretrained" in block.text]
    done = called(place, sys.executable, "-c", shown.text)
    assert done.returncode == 0 and done.stdout.startswith("48315>"), done.stderr


def test_the_pages_are_made_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="make docs installs it")
    made = called(ROOT, sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path))
    assert made.returncode == 0, made.stderr
    loaded = [line for page in tmp_path.glob("*.html") for line in page.read_text().splitlines() if 'src="http' in line]
    assert loaded == []

"""The embedded default: what stands behind ``embedded:`` names, made on first use and cached outside the repository.

``reverse`` and ``reverse-judge`` are a small policy and a small judge that are taught to reverse digit strings;
``reverse-prompts`` and ``reverse-heldout`` are prompts for them, with answers. Exact accuracy, which the judge cannot
fake, shows whether an alignment did any good. The cache's key is a hash of the recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pipeline.embedded_models import Recipe, make_judge, make_policy, write_prompts
from pipeline.files import place, sync_tree
from stages.errors import InputError

PREFIX = "embedded:"
NUM_PROMPTS, NUM_HELD_OUT = 8000, 2000

Progress = Callable[[str, int, int], None]  # (what, done, total)

_MODELS = ("reverse", "reverse-judge")
_PROMPTS = ("reverse-prompts", "reverse-heldout")


def cache_root() -> Path:
    """``$PREFLOOP_CACHE``, else ``prefloop`` in the user's cache folder."""
    if "PREFLOOP_CACHE" in os.environ:
        return Path(os.environ["PREFLOOP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefloop"


def names() -> list[str]:
    """Every name that may stand behind ``embedded:`` in a config."""
    return [*_MODELS, *_PROMPTS]


def place_of(name: str, *, recipe: Recipe | None = None) -> Path:
    """Where the cache keeps, or would keep, what stands behind a name."""
    key = hashlib.sha256(json.dumps(asdict(recipe or Recipe()), sort_keys=True).encode()).hexdigest()[:12]
    return cache_root() / "embedded" / key / (f"{name}.jsonl" if name in _PROMPTS else name)


def make(name: str, *, recipe: Recipe | None = None, progress: Progress | None = None) -> Path:
    """The folder or file behind an ``embedded:`` name, made now if the cache does not have it.

    Args:
        name: one of `names`, without the prefix.
        recipe: a smaller one in tests.
        progress: called with what is being made, steps done and steps in all.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in names():
        raise ValueError(f"nothing embedded is called {name!r}")
    recipe = recipe or Recipe()
    target = place_of(name, recipe=recipe)
    if target.exists():
        return target
    tell = progress or (lambda what, done, total: None)
    policy = make("reverse", recipe=recipe, progress=progress) if name == "reverse-judge" else None
    with _built_aside(target) as work:
        if name == "reverse":
            make_policy(work, recipe, lambda done, total: tell("policy", done, total))
        elif policy is not None:
            make_judge(work, recipe, policy, lambda done, total: tell("judge", done, total))
        else:
            held = name == "reverse-heldout"
            write_prompts(work, recipe, want_held_out=held, count=NUM_HELD_OUT if held else NUM_PROMPTS)
    return target


@contextmanager
def _built_aside(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place once complete; the first of two makers wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        yield scratch / target.name
        if not target.exists():
            sync_tree(scratch)
            place(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- in a process of its own ----------------------------------------------------------------------------------------


def make_aside(name: str, *, log: Path, progress: Progress) -> Path:
    """`make` in a process of its own, so that torch's memory and talk stay out of the driver.

    Args:
        log: where that process's output goes.

    Raises:
        InputError: if it failed; the log says why.
    """
    with log.open("a", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "pipeline.embedded", name]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdout is not None
        target = None
        for line in child.stdout:
            kind, *rest = line.rstrip("\n").split("\t")
            if kind == "progress":
                progress(rest[0], int(rest[1]), int(rest[2]))
            elif kind == "made":
                target = Path(rest[0])
    if child.wait() != 0 or target is None:
        raise InputError(
            f"embedded:{name}",
            wanted=f"to make it in {cache_root()}",
            got=f"no result; the log is {log}",
            fix="see that the folder can be written, or name another: PREFLOOP_CACHE=…",
        )
    return target


def _main(name: str) -> None:
    def tell(what: str, done: int, total: int) -> None:
        print("progress", what, done, total, sep="\t", flush=True)

    print("made", make(name, progress=tell), sep="\t", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])

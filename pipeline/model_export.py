"""A run's final policy with its card, in a folder that `from_pretrained` and the hub take as it is."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from pipeline.artifacts import MANIFEST
from pipeline.console import Console
from pipeline.files import place, sync_tree, write_text
from pipeline.lineage import Lineage
from pipeline.mirror import obtain
from pipeline.model_card import model_card
from pipeline.model_folders import refuse_changed_model
from pipeline.reading import round_folders
from stages.errors import InputError, StageError

CARD = "README.md"


def export_model(run: Path, out: Path) -> None:
    """Copy the policy that a run stands behind to `out`, with a card that says how it came about; all of it or nothing.

    Raises:
        InputError: if there is no such run, or no result of it was promoted.
        ContractError: if the policy is not as it was published.
        StageError: if `out` holds something already, or cannot be written.
    """
    round_folders(run)
    lineage = Lineage.read(run / "run.json")
    standing = lineage.rounds[-1].standing if lineage.rounds else None
    if standing is None or not standing.round:
        raise InputError(
            str(run),
            wanted="a run whose policy a round made",
            got="no settled round" if standing is None else "a run that still stands behind the policy it began with",
            fix="let a round finish; prefloop report says why results were held",
        )
    obtain(standing.path)
    refuse_changed_model(standing.path)
    card, out = model_card(run), out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StageError(
            str(out), wanted="a new or an empty folder", got="one with files in it", fix="name another: --model FOLDER"
        )
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True)
        for file in sorted(standing.path.iterdir()):
            if file.name not in (MANIFEST, CARD):
                shutil.copyfile(file, scratch / file.name)
        write_text(scratch / CARD, card)
        sync_tree(scratch)
        place(scratch, out)
    except OSError as error:
        raise StageError(
            str(out),
            wanted="a folder to write in",
            got=error.strerror or str(error),
            fix="name another: --model FOLDER",
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    Console().text(f"policy of round {standing.round}   {out}   (a Hugging Face folder; {CARD} is its card)")

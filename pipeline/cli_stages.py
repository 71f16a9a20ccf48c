"""The stages' own commands: ``prefloop sample``, ``score``, ``pair`` and ``update``, each on tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.answering import answer_for

_TABLES = click.Path(path_type=Path)
_OUT = click.option("--out", required=True, type=_TABLES, help="folder for the results")
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key")
_CONFIG = click.argument("config", type=_TABLES)


def _table(name: str, *, required: bool = True, help: str = "") -> Callable[[Any], Any]:
    told = help or f"{name}: a stage's folder, a Parquet file, or a folder of them"
    return click.option(f"--{name}", required=required, type=_TABLES, metavar="TABLE", help=told)


@click.command("sample")
@_CONFIG
@_SET
@_table("prompts", required=False, help="prompts as a table; else those of the config, all of them")
@_OUT
def sample_command(config: Path, overrides: tuple[str, ...], prompts: Path | None, out: Path) -> None:
    """Sample candidates from CONFIG's policy."""
    from pipeline.single import sample_alone

    answer_for(lambda: sample_alone(config, overrides, out, prompts=prompts))


@click.command("score")
@_CONFIG
@_SET
@_table("prompts")
@_table("candidates")
@_OUT
def score_command(config: Path, overrides: tuple[str, ...], prompts: Path, candidates: Path, out: Path) -> None:
    """Score candidates with CONFIG's rewards."""
    from pipeline.single import score_alone

    answer_for(lambda: score_alone(config, overrides, out, prompts=prompts, candidates=candidates))


@click.command("pair")
@_CONFIG
@_SET
@_table("prompts", required=False)
@_table("candidates", required=False)
@_table("scored", required=False)
@click.option("--out", type=_TABLES, help="folder for the results")
@click.option("--preview", is_flag=True, help="show what every strategy would make of them, and write nothing")
@click.option("--json", "in_json", is_flag=True, help="a preview for machines")
def pair_command(
    config: Path,
    overrides: tuple[str, ...],
    prompts: Path | None,
    candidates: Path | None,
    scored: Path | None,
    out: Path | None,
    preview: bool,
    in_json: bool,
) -> None:
    """Make chosen/rejected pairs, or groups, of scored candidates by CONFIG's rule.

    With --preview, tables may be left out: those of the newest scored round of CONFIG's run are looked at.
    """
    named = [path for path in (prompts, candidates, scored) if path is not None]
    if len(named) < 3 and (named or not preview):
        raise click.UsageError("--prompts, --candidates and --scored are needed, all three.")
    if preview:
        from pipeline.preview import show_preview

        answer_for(lambda: show_preview(config, overrides, named, in_json=in_json))
        return
    if out is None or in_json:
        raise click.UsageError("Missing option '--out'." if out is None else "--json goes with --preview.")
    from pipeline.single import pair_alone

    answer_for(lambda: pair_alone(config, overrides, out, *named))


@click.command("update")
@_CONFIG
@_SET
@_table("pairs", required=False, help="pairs as a table; else the file that CONFIG's section pairs names")
@_OUT
def update_command(config: Path, overrides: tuple[str, ...], pairs: Path | None, out: Path) -> None:
    """Update CONFIG's policy on pairs."""
    from pipeline.single import update_alone

    answer_for(lambda: update_alone(config, overrides, out, pairs=pairs))


STAGES = (sample_command, score_command, pair_command, update_command)

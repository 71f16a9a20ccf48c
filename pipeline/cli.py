"""The command ``prefloop``; importing it loads none of the heavy libraries."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.texts import visible
from stages.errors import ConfigError, PrefloopError


@click.group()
def main() -> None:
    """Iterative, on-policy preference alignment on Ray: sample, score, pair, update, again."""


@main.command("run")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key, e.g. sample.temperature=0.8"
)
@click.option("--rounds", metavar="+N", help="add rounds to the run, be it finished, interrupted or going on")
@click.option(
    "--watch", metavar="FOLDER", type=click.Path(path_type=Path), help="a round for each file of prompts that appears"
)
def run_command(config: Path, overrides: tuple[str, ...], rounds: str | None, watch: Path | None) -> None:
    """Run CONFIG to its end, or carry on where it stopped."""
    from pipeline.start import run

    _answer_for(lambda: run(config, overrides, more_rounds=rounds, watched=watch))


@main.command("fork")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="what is other, e.g. update.beta=0.05")
@click.option("--name", required=True, help="of the new run, beside the other one")
@click.option(
    "--config", "config", type=click.Path(path_type=Path), help="in the place of the run's own; rewards lie beside it"
)
@click.option("--dry-run", is_flag=True, help="only say what would be reused")
def fork_command(run: Path, overrides: tuple[str, ...], name: str, config: Path | None, dry_run: bool) -> None:
    """Start a run of other settings that reuses what is unchanged of the run in folder RUN, and say what that is."""
    from pipeline.fork import fork

    _answer_for(lambda: fork(run, overrides, name=name, config_file=config, dry_run=dry_run))


_TRAINERS = ("trl", "llama-factory", "ms-swift", "nemo", "openrlhf")
_TABLES = click.Path(path_type=Path)
_OUT = click.option("--out", required=True, type=_TABLES, help="folder for the results")
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key")
_CONFIG = click.argument("config", type=_TABLES)


def _table(name: str, *, required: bool = True, help: str = "") -> Callable[[Any], Any]:
    told = help or f"{name}: a stage's folder, a Parquet file, or a folder of them"
    return click.option(f"--{name}", required=required, type=_TABLES, metavar="TABLE", help=told)


@main.command("sample")
@_CONFIG
@_SET
@_table("prompts", required=False, help="prompts as a table; else those of the config, all of them")
@_OUT
def sample_command(config: Path, overrides: tuple[str, ...], prompts: Path | None, out: Path) -> None:
    """Sample candidates from CONFIG's policy."""
    from pipeline.single import sample_alone

    _answer_for(lambda: sample_alone(config, overrides, out, prompts=prompts))


@main.command("score")
@_CONFIG
@_SET
@_table("prompts")
@_table("candidates")
@_OUT
def score_command(config: Path, overrides: tuple[str, ...], prompts: Path, candidates: Path, out: Path) -> None:
    """Score candidates with CONFIG's rewards."""
    from pipeline.single import score_alone

    _answer_for(lambda: score_alone(config, overrides, out, prompts=prompts, candidates=candidates))


@main.command("pair")
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

        _answer_for(lambda: show_preview(config, overrides, named, in_json=in_json))
        return
    if out is None or in_json:
        raise click.UsageError("Missing option '--out'." if out is None else "--json goes with --preview.")
    from pipeline.single import pair_alone

    _answer_for(lambda: pair_alone(config, overrides, out, *named))


@main.command("update")
@_CONFIG
@_SET
@_table("pairs", required=False, help="pairs as a table; else the file that CONFIG's section pairs names")
@_OUT
def update_command(config: Path, overrides: tuple[str, ...], pairs: Path | None, out: Path) -> None:
    """Update CONFIG's policy on pairs."""
    from pipeline.single import update_alone

    _answer_for(lambda: update_alone(config, overrides, out, pairs=pairs))


@main.command("export")
@click.argument("run", type=_TABLES)
@click.option("--to", "kind", type=click.Choice(_TRAINERS), help="whose pairs; trl where nothing is said")
@click.option("--round", "rounds", type=int, multiple=True, help="only this one; may be repeated")
@click.option("--out", type=_TABLES, metavar="FILE", help="where the pairs go; else RUN/export/…")
@click.option("--model", type=_TABLES, metavar="FOLDER", help="the final policy with its card, in a new folder")
def export_command(run: Path, kind: str | None, rounds: tuple[int, ...], out: Path | None, model: Path | None) -> None:
    """Write the pairs of the run in folder RUN as another trainer reads them, or its final policy with a card."""
    if model is not None:
        if kind or rounds or out:
            raise click.UsageError("--model goes alone; --to, --round and --out are about pairs.")
        from pipeline.model_export import export_model

        _answer_for(lambda: export_model(run, model))
        return
    from pipeline.export import export_pairs

    _answer_for(lambda: export_pairs(run, kind=kind or "trl", rounds=rounds, out=out))


@main.command("plan")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--devices", metavar="DEVICES", help="plan for these, e.g. 8x80GB, 2x8x80GB or cpu:16x64GB")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key, e.g. sample.temperature=0.8"
)
@click.option("--json", "in_json", is_flag=True, help="for machines")
def plan_command(config: Path, devices: str | None, overrides: tuple[str, ...], in_json: bool) -> None:
    """Show what CONFIG will do and need, and refuse what the devices cannot hold; starts nothing."""
    from pipeline.plan.command import show_plan

    _answer_for(lambda: show_plan(config, overrides, devices=devices, in_json=in_json))


@main.command("doctor")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@_SET
@click.option("--deep", is_flag=True, help="with CONFIG: start its engine and a trainer, and compare their log-probs")
def doctor_command(config: Path | None, overrides: tuple[str, ...], deep: bool) -> None:
    """Look whether this machine, and what CONFIG names, would work; every red line says its fix."""
    if config is None and (deep or overrides):
        raise click.UsageError("--deep and --set go with CONFIG.")
    from pipeline.doctor.command import show_doctor

    _answer_for(lambda: show_doctor(config, overrides, deep=deep))


@main.command("status")
@click.argument("run", type=click.Path(path_type=Path))
def status_command(run: Path) -> None:
    """Show how far the run in folder RUN is."""
    from pipeline.status import show_status

    _answer_for(lambda: show_status(run))


@main.command("watch")
@click.argument("run", type=click.Path(path_type=Path))
def watch_command(run: Path) -> None:
    """Watch the run in folder RUN as it goes on, from any terminal: stages, rates, workers, time to go.

    Ctrl-C ends the watching, not the run. Where output is no terminal, one picture is printed.
    """
    from pipeline.live_view import watch

    _answer_for(lambda: watch(run))


@main.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="instead of report.html in the run's folder"
)
def report_command(run: Path, out: Path | None) -> None:
    """Write the page of the run in folder RUN: one HTML file with its figures, curves and real rows."""
    from pipeline.report import show_page

    _answer_for(lambda: show_page(run, out))


@main.command("compare")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("compare.html"),
    show_default=True,
    metavar="FILE",
    help="the page",
)
def compare_command(runs: tuple[Path, ...], out: Path) -> None:
    """Set the runs in some folders side by side: their configs' differences, figures, curves and answers."""
    from pipeline.compare import show_comparison

    _answer_for(lambda: show_comparison(runs, out))


@main.command("clean")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="in the place of the config's run.keep")
@click.option("--yes", is_flag=True, help="drop it")
def clean_command(run: Path, keep: int | None, yes: bool) -> None:
    """Show which rounds' weights the run in folder RUN needs no more; with --yes, drop them.

    The last rounds (run.keep), the best one and the final policy with what it came from stay; tables and figures, too.
    """
    from pipeline.cleaning import clean

    _answer_for(lambda: clean(run, keep=keep, yes=yes))


@main.command("trace")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("row_id", metavar="ID")
@click.option("--full", is_flag=True, help="long texts whole, and every token id")
def trace_command(run: Path, row_id: str, full: bool) -> None:
    """Show one prompt's rows in every table of every round.

    ID is a prompt's, an answer's or a pair's, or a beginning that no other has.
    """
    from pipeline.trace import show_trace

    _answer_for(lambda: show_trace(run, row_id, full=full))


def _answer_for(work: Callable[[], Any]) -> None:
    """Do the work, and end the process; what goes wrong becomes words and an exit status, never a traceback.

    0: done; 1: it could not be done; 2: the config is wrong; 70: a mistake of ours; 130: interrupted.
    """
    from cluster.errors import KeptWaiting, NodeLost, NotEnough, Unprotected, Unreachable, WorkerLost

    try:
        work()
        _leave("", 0)
    except PrefloopError as error:
        _leave(str(error), 2 if isinstance(error, ConfigError) else 1)
    except WorkerLost as error:
        if _is_full(error.log.parent):
            _leave(_full_disk(f"No space left on device, under {error.log.parent}"), 1)
        _leave(f"{error}\n  fix:    read the log; the same command carries on where this one stopped", 1)
    except NodeLost as error:
        fix = (
            "if the machine was short of memory, give it less to do; the same command carries on where this one stopped"
        )
        _leave(f"Ray was lost\n  wanted: its processes, up to the end\n  got:    {error.reason}\n  fix:    {fix}", 1)
    except NotEnough as error:
        fix = "fewer sample.engines or update.workers, or a larger cluster"
        _leave(f"the cluster is too small\n  wanted: {error.wanted}\n  got:    {error.got}\n  fix:    {fix}", 1)
    except KeptWaiting as error:
        fix = "wait until others let go (ray status tells what is held), then give the same command; it carries on"
        _leave(
            f"cluster.start_timeout_s\n  wanted: {error.name}: {error.wanted}, within {error.waited_s:g} s\n"
            f"  got:    {error.got}\n  fix:    {fix}",
            1,
        )
    except Unreachable as error:
        fix = "--set cluster.address=local, or the address that ray status prints"
        _leave(
            f"cluster.address\n  wanted: a Ray cluster\n  got:    {error.address}: {error.reason}\n  fix:    {fix}", 1
        )
    except Unprotected as error:
        fix = "start it with RAY_AUTH_MODE=token and a token (ray get-auth-token --generate), and set both here"
        _leave(
            "cluster.allow_unauthenticated\n  wanted: a cluster that takes work only with a token\n"
            f"  got:    {error.address}: {error.reason}\n  fix:    {fix}; or, where everybody who reaches it may run "
            "code on it, --set cluster.allow_unauthenticated=true",
            1,
        )
    except KeyboardInterrupt:
        _leave("interrupted; the same command carries on where this one stopped", 130)
    except Exception as error:  # the last line before the user
        if _is_for_want_of_room(error):
            _leave(_full_disk(str(error)), 1)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        first_line = (str(error).splitlines() or [""])[0]
        _leave(f"a mistake in prefloop: {type(error).__name__}: {first_line}{notes}", 70)


def _full_disk(got: str) -> str:
    fix = "make room there, for example with prefloop clean; the same command carries on where this one stopped"
    return f"a full disk\n  wanted: room to write\n  got:    {got}\n  fix:    {fix}"


def _is_full(folder: Path) -> bool:
    """Whether there is no room for a log's last words."""
    return folder.exists() and shutil.disk_usage(folder).free < 1 << 16


def _is_for_want_of_room(error: BaseException | None) -> bool:
    """Whether a file could not be written since its disk, or somebody's share of it, is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__
    return False


def _leave(message: str, status: int) -> None:
    sys.stdout.flush()
    if message:
        print(visible(message), file=sys.stderr, flush=True)
    # Ray and torch threads may still be up; they must not delay the exit, talk over it, or change its status.
    os._exit(status)

"""The command ``prefloop``; importing it loads none of the heavy libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.answering import answer_for
from pipeline.cli_stages import STAGES


def _with_run(
    place: str, work: Callable[[Path], Any], *, tables: bool = True, to_change: bool = False
) -> Callable[[], Any]:
    """The work on a run's folder, or on a copy of the run at an address."""

    def done() -> None:
        from pipeline.run_folder import run_at

        with run_at(place, tables=tables, to_change=to_change) as folder:
            work(folder)

    return done


class _Run(click.Path):
    """A run's folder, on a disk that this command works on itself."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(
                "a folder is wanted; at an address, runs are read by status, report, trace, export and clean", param
            )
        return super().convert(value, param, ctx)


@click.group(context_settings={"max_content_width": 120})
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

    answer_for(lambda: run(config, overrides, more_rounds=rounds, watched=watch))


@main.command("fork")
@click.argument("run", type=_Run(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="what is other, e.g. update.beta=0.05")
@click.option("--name", required=True, help="of the new run, beside the other one")
@click.option(
    "--config", "config", type=click.Path(path_type=Path), help="in the place of the run's own; rewards lie beside it"
)
@click.option("--dry-run", is_flag=True, help="only say what would be reused")
def fork_command(run: Path, overrides: tuple[str, ...], name: str, config: Path | None, dry_run: bool) -> None:
    """Start a run of other settings that reuses what is unchanged of the run in folder RUN, and say what that is."""
    from pipeline.fork import fork

    answer_for(lambda: fork(run, overrides, name=name, config_file=config, dry_run=dry_run))


_TRAINERS = ("trl", "llama-factory", "ms-swift", "nemo", "openrlhf")
_TABLES = click.Path(path_type=Path)
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key")
_CONFIG = click.argument("config", type=_TABLES)
_AT = click.option("--address", required=True, metavar="URL", help="of a cluster's job server, http://HOST:8265")


@main.command("export")
@click.argument("run")
@click.option("--to", "kind", type=click.Choice(_TRAINERS), help="whose pairs; trl where nothing is said")
@click.option("--round", "rounds", type=int, multiple=True, help="only this one; may be repeated")
@click.option("--out", type=_TABLES, metavar="FILE", help="where the pairs go; else RUN/export/…")
@click.option("--model", type=_TABLES, metavar="FOLDER", help="the final policy with its card, in a new folder")
def export_command(run: str, kind: str | None, rounds: tuple[int, ...], out: Path | None, model: Path | None) -> None:
    """Write the pairs of the run RUN, a folder or an address, as another trainer reads them, or its final policy."""
    if model is not None:
        if kind or rounds or out:
            raise click.UsageError("--model goes alone; --to, --round and --out are about pairs.")
        from pipeline.model_export import export_model

        answer_for(_with_run(run, lambda folder: export_model(folder, model)))
        return
    from pipeline.export import export_pairs

    answer_for(_with_run(run, lambda folder: export_pairs(folder, kind=kind or "trl", rounds=rounds, out=out)))


@main.command("plan")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--devices", metavar="DEVICES", help="plan for these, e.g. 8x80GB, 2x8x80GB or cpu:16x64GB")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key, e.g. sample.temperature=0.8"
)
@click.option("--json", "in_json", is_flag=True, help="for machines")
@click.option("--calibrate", "calibrated", is_flag=True, help="measure here, on a few rows, how fast each stage works")
def plan_command(
    config: Path, devices: str | None, overrides: tuple[str, ...], in_json: bool, calibrated: bool
) -> None:
    """Show what CONFIG will do and need, and refuse what the devices cannot hold; starts nothing by itself."""
    from pipeline.plan.command import show_plan

    answer_for(lambda: show_plan(config, overrides, devices=devices, in_json=in_json, calibrated=calibrated))


@main.command("doctor")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@_SET
@click.option("--deep", is_flag=True, help="with CONFIG: start its engine and a trainer, and compare their log-probs")
def doctor_command(config: Path | None, overrides: tuple[str, ...], deep: bool) -> None:
    """Look whether this machine, and what CONFIG names, would work; every red line says its fix."""
    if config is None and (deep or overrides):
        raise click.UsageError("--deep and --set go with CONFIG.")
    from pipeline.doctor.command import show_doctor

    answer_for(lambda: show_doctor(config, overrides, deep=deep))


@main.command("submit")
@_CONFIG
@_SET
@_AT
@click.option("--no-requirements", is_flag=True, help="the nodes' image has the tested versions; install nothing")
@click.option("--follow", is_flag=True, help="then tell what the run says, until it ends")
@click.option("--rounds", metavar="+N", help="add rounds to the run, be it finished or interrupted")
@click.option("--watch", metavar="FOLDER", type=_TABLES, help="as with run; the folder is one that all nodes share")
def submit_command(
    config: Path,
    overrides: tuple[str, ...],
    address: str,
    no_requirements: bool,
    follow: bool,
    rounds: str | None,
    watch: Path | None,
) -> None:
    """Run CONFIG as a Ray job on a cluster, from a copy of this checkout; the same command carries on there.

    run.dir, and whatever else CONFIG names by an absolute path, is a folder that all nodes share.
    """
    from pipeline.submit import submit

    answer_for(
        lambda: submit(
            config,
            overrides,
            address=address,
            requirements=not no_requirements,
            follow=follow,
            more_rounds=rounds,
            watched=watch,
        )
    )


@main.command("status")
@click.argument("run", required=False)
@click.option("--address", metavar="URL", help="of a cluster: RUN is a run's name or a submission id there, or all")
def status_command(run: str | None, address: str | None) -> None:
    """Show how far the run RUN, a folder or an address, is, or how the runs on a cluster are."""
    if address is not None:
        from pipeline.remote import show_jobs

        answer_for(lambda: show_jobs(address, run))
        return
    if run is None:
        raise click.UsageError("Missing argument 'RUN'; only with --address may it be left out.")
    from pipeline.status import show_status

    answer_for(_with_run(run, show_status, tables=False))


@main.command("logs")
@click.argument("run")
@_AT
@click.option("--follow", is_flag=True, help="go on until it ends; Ctrl-C ends the following, not the run")
def logs_command(run: str, address: str, follow: bool) -> None:
    """Show what RUN, a run's name or a submission id, has said on a cluster."""
    from pipeline.remote import show_logs

    answer_for(lambda: show_logs(address, run, follow=follow))


@main.command("stop")
@click.argument("run")
@_AT
def stop_command(run: str, address: str) -> None:
    """End RUN, a run's name or a submission id, on a cluster; the same submit carries on."""
    from pipeline.remote import stop_job

    answer_for(lambda: stop_job(address, run))


@main.command("watch")
@click.argument("run", type=_Run(path_type=Path))
def watch_command(run: Path) -> None:
    """Watch the run in folder RUN as it goes on, from any terminal: stages, rates, workers, time to go.

    Ctrl-C ends the watching, not the run. Where output is no terminal, one picture is printed.
    """
    from pipeline.live_view import show_live

    answer_for(lambda: show_live(run))


@main.command("report")
@click.argument("run")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="instead of report.html in the run's folder"
)
def report_command(run: str, out: Path | None) -> None:
    """Write the page of the run RUN, a folder or an address: one HTML file with figures, curves and real rows."""
    from pipeline.report import show_page

    answer_for(_with_run(run, lambda folder: show_page(folder, out)))


@main.command("compare")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True, type=_Run(path_type=Path))
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

    answer_for(lambda: show_comparison(runs, out))


@main.command("clean")
@click.argument("run")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="in the place of the config's run.keep")
@click.option("--yes", is_flag=True, help="drop it")
def clean_command(run: str, keep: int | None, yes: bool) -> None:
    """Show which rounds' weights the run in folder RUN needs no more; with --yes, drop them.

    The last rounds (run.keep), the best one and the final policy with what it came from stay; tables and figures, too.
    """
    from pipeline.cleaning import clean

    answer_for(_with_run(run, lambda folder: clean(folder, keep=keep, yes=yes), tables=False, to_change=True))


@main.command("trace")
@click.argument("run")
@click.argument("row_id", metavar="ID")
@click.option("--full", is_flag=True, help="long texts whole, and every token id")
def trace_command(run: str, row_id: str, full: bool) -> None:
    """Show one prompt's rows in every table of every round.

    ID is a prompt's, an answer's or a pair's, or a beginning that no other has.
    """
    from pipeline.trace import show_trace

    answer_for(_with_run(run, lambda folder: show_trace(folder, row_id, full=full)))


for _stage in STAGES:
    main.add_command(_stage)

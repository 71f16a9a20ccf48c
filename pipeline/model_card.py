"""The card of a run's final policy: how it came about, as Hugging Face shows it. No local path and no secret goes in.

Metadata for the hub stand before the text (huggingface.co/docs/hub/model-cards). Local files and folders are named
without the folders they lie in; a base model and data sets go into the metadata only if they are the hub's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline import embedded
from pipeline.lineage import Lineage
from pipeline.page.summary import facts, headline, round_table, warnings
from pipeline.prompt_files import on_hub
from pipeline.reading import num_rounds, run_settings
from pipeline.report import round_reports
from pipeline.versions import kept_versions

_NAMES = frozenset(("path", "reference", "model"))
"""Keys of models and data: of the hub, embedded, or local."""

_WORDS = frozenset(
    (
        *("strategy", "truncated", "unit", "ranking", "loss_type", "reference_logps", "lr_scheduler_type", "dtype"),
        *("type", "role", "scale", "name", "target", "read", "protocol", "start", "on_fail", "split"),
    )
)
"""Keys whose texts anybody may read: this project's own words, and names of rewards and modules."""

_ADDRESS = re.compile(
    r"\b[a-z][a-z0-9+.-]*://\S+|\b(?:localhost|[\w-]+(?:\.[\w-]+)+)(?::\d+)\b|\b\d+(?:\.\d+){3}\b", re.I
)
_PATH = re.compile(
    r"(?<![\w/.~-])(?:~[\w.-]*|\.{1,2})?/[^\s'\"`,;:()\[\]{}]+"  # absolute, or from here or from home
    r"|(?<![\w/.-])[\w.-]+(?:/[\w.-]+){2,}"  # longer than a name of the hub
)

_MEANINGS = (
    "Each figure is over held-out prompts, one answer each at temperature 1; ± is the standard error. Win rate is "
    "against the policy before the first round, ties half. KL is from it, in nats an answer."
)


def model_card(run: Path) -> str:
    """The card, as ``README.md`` holds it.

    Raises:
        InputError: if a file of the run cannot be read.
    """
    settings = public_settings(run_settings(run))
    lineage, reports = Lineage.read(run / "run.json"), round_reports(run)
    standing = lineage.rounds[-1].standing
    settled = len(lineage.rounds)
    told = [(name, without_places(text)) for name, text in facts(settings, settled, num_rounds(run, settings))]
    lines = ["---", _metadata(settings, lineage).strip(), "---", "", f"# {run.resolve().name}", ""]
    lines += [
        f"A language model, `{settings['policy']['path']}` before, aligned by preferences over its own answers with "
        f"Prefloop: the result of round {standing.round} of {settled}.",
        "",
        headline(reports, standing.round),
        "",
        *(f"> {without_places(warning)}\n" for warning in warnings(reports, standing.round)),
        "## How it came about",
        "",
        *_list(told),
        "",
        "## Rounds",
        "",
        *_table(reports),
        "",
        *([_MEANINGS, ""] if any("evaluate" in report for report in reports) else []),
        *(
            f"- round {report['round']}, {report['decision']}: {without_places(report['reason'])}"
            for report in reports
            if report["round"]
        ),
        "",
        "## Weights and versions",
        "",
        *_list(
            [("sha256 of the weights", standing.sha256), ("before the first round", lineage.rounds[0].sampling.sha256)]
        ),
        *_list(kept_versions(run).items()),
        "",
    ]
    return "\n".join(lines)


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's plain values without texts but those that anybody may read, and places by their last name alone."""
    found = {}
    for key, value in settings.items():
        kept = _public(value, key)
        if kept is not None or value is None:
            found[key] = kept
    return found


def without_places(text: str) -> str:
    """A text in which addresses are left out, and local paths are without the folders before the last name."""
    return _PATH.sub(lambda found: Path(found[0]).name, _ADDRESS.sub("(an address)", text))


def _public(value: Any, key: str) -> Any:
    """A value as it may be read, by the key that it stands under; None for nothing."""
    if isinstance(value, Mapping):
        return public_settings(value)
    if isinstance(value, (list, tuple)):
        return [kept for inner in value if (kept := _public(inner, key)) is not None]
    if not isinstance(value, str):
        return value
    if key in _NAMES:
        return value if _is_public(value) else Path(value).name
    return without_places(value) if key in _WORDS else None


def _is_public(name: str) -> bool:
    return name.startswith(embedded.PREFIX) or "/" not in name or on_hub(name)


def _metadata(settings: Mapping[str, Any], lineage: Lineage) -> str:
    """The card's YAML; a base model of the hub is known by where its files lay."""
    update, policy = settings.get("update") or {}, settings["policy"]["path"]
    named = update.get("loss_type", [])
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prefloop", "preference-alignment", *([named] if isinstance(named, str) else named)],
    }
    if f"models--{policy.replace('/', '--')}" in lineage.rounds[0].sampling.path.parts:
        found["base_model"] = policy
    sections = (settings.get(name) or {} for name in ("prompts", "pairs", "evaluate"))
    data = [section["path"] for section in sections if section.get("path") and on_hub(section["path"])]
    if data:
        found["datasets"] = list(dict.fromkeys(data))
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _list(told: Any) -> list[str]:
    return [f"- {name}: {_one_line(value)}" for name, value in told]


def _table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    table = round_table(reports)
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return [f"| {' | '.join(map(_one_line, row))} |" for row in rows]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

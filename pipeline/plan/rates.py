"""How fast each stage works here: measured by a calibration and kept in the user's cache, or taken from an earlier run.

A rate holds for one device, one model's shapes, one dtype and one set of releases. Nothing else is ever taken for it:
where there is none, a plan tells no time.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import embedded
from pipeline.config import Config
from pipeline.files import read_json, write_json
from pipeline.plan.hardware import Hardware, gpu_name
from pipeline.plan.model_facts import ModelFacts
from pipeline.reading import run_settings
from pipeline.report import round_reports
from pipeline.versions import installed_versions, kept_versions
from stages.errors import PrefloopError


@dataclass(frozen=True, slots=True)
class Rate:
    """What one worker gets done.

    Attributes:
        unit: ``tokens`` of prompts and answers (of answers, for sampling), or ``rows`` as long as they were when it was
            measured.
        per_s: a second.
    """

    unit: Literal["tokens", "rows"]
    per_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of the stages whose rate is known.

    Attributes:
        source: where they are from, in words.
        of: by stage: prompt (a sampler's way through prompts), sample, score, reference, update.
        step_s: an optimizer step's seconds beside its forwards and backwards, where these were told apart.
        missing: in words, what could not be measured.
    """

    source: str
    of: Mapping[str, Rate]
    step_s: float = 0.0
    missing: tuple[str, ...] = ()


def kept_rates(config: Config, facts: ModelFacts, hardware: Hardware) -> Rates | None:
    """Rates of an earlier calibration, else of an earlier run of the same policy in the same folder of runs."""
    file = _file(config, facts, hardware)
    if file.exists():
        with suppress(PrefloopError, KeyError, TypeError):
            found = read_json(file)["rates"]
            of = {stage: Rate(**rate) for stage, rate in found["of"].items()}
            return Rates(found["source"], of, found["step_s"], tuple(found["missing"]))
    return _of_earlier_run(config)


def keep_rates(rates: Rates, config: Config, facts: ModelFacts, hardware: Hardware) -> Path:
    """Write the rates of a calibration to the user's cache; the file."""
    file = _file(config, facts, hardware)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"key": _key(config, facts, hardware), "rates": asdict(rates)})
    return file


def _file(config: Config, facts: ModelFacts, hardware: Hardware) -> Path:
    key = json.dumps(_key(config, facts, hardware), sort_keys=True)
    return embedded.cache_root() / "rates" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _key(config: Config, facts: ModelFacts, hardware: Hardware) -> dict[str, Any]:
    """What a rate holds for."""
    update, sample = config.update, config.sample
    return {
        "device": device_name(hardware),
        "model": asdict(facts),
        "dtype": config.policy.dtype,
        "versions": installed_versions(),
        "rewards": [getattr(reward, "path", reward.type) for reward in config.rewards],
        "sample": [sample.tensor_parallel_size, sample.num_generations, config.num_engines],
        "update": [update.zero_stage, update.gradient_checkpointing, update.lora is not None, update.workers],
        "micro_batch": [update.micro_batch_size, update.max_tokens_per_batch],
    }


def device_name(hardware: Hardware) -> str:
    """The devices that a rate was measured on: the GPU's name, or the processor with its cores."""
    if hardware.gpu_bytes is not None:
        return f"{hardware.node.gpus:g} x {gpu_name()} of {hardware.gpu_bytes >> 20} MiB"
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{hardware.node.cpus:g} cores of {line.partition(':')[2].strip()}"
    return f"{hardware.node.cpus:g} cores of {platform.machine()}"


# ---- an earlier run -------------------------------------------------------------------------------------------------


def _of_earlier_run(config: Config) -> Rates | None:
    """Rates from the newest run of the same policy, on these releases, that lies where this config's runs lie."""
    runs = config.folder().parent
    folders: list[Path] = []
    with suppress(FileNotFoundError):  # somebody removes a run meanwhile
        folders = sorted(runs.glob("*/round-0*/report.json"), key=lambda file: -file.stat().st_mtime)
    for run in dict.fromkeys(file.parent.parent for file in folders):
        with suppress(PrefloopError, KeyError, TypeError, ValueError, ZeroDivisionError):
            settings = run_settings(run)
            policy = (settings["policy"]["path"], settings["policy"]["dtype"])
            if policy != (config.policy.path, config.policy.dtype) or kept_versions(run) != installed_versions():
                continue
            report = next((found for found in reversed(round_reports(run)) if _is_measured(found)), None)
            if report is not None and (of := _rates_of(report, settings)):
                return Rates(f"round {report['round']} of {run}, if it ran on these devices", of)
    return None


def _is_measured(report: Mapping[str, Any]) -> bool:
    """Whether a round's times are those of all its work; the first one also starts everything and is not taken."""
    return report["round"] >= 2 and not report.get("is_carried_on")


def _rates_of(report: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Rate]:
    """The rates in a round's report; none of scoring where the next round was scored in the same time."""
    spent: dict[str, float] = {}
    for span in report["timeline"]:
        spent[span["stage"]] = spent.get(span["stage"], 0.0) + span["end_s"] - span["start_s"]
    done: dict[str, tuple[Literal["tokens", "rows"], float, int]] = {}
    if "sample" in report:
        spent["sample"] = report.get("sampling_s", 0.0)
        done["sample"] = ("tokens", report["sample"]["num_tokens_now"], settings["sample"]["engines"])
        if not settings["max_staleness"]:
            done["score"] = ("rows", report["sample"]["num_candidates"], 1)
    if "pairs" in report:
        num_pairs, workers = report["pairs"]["num_pairs"], settings["update"]["workers"]
        done["reference"] = ("rows", num_pairs, workers)
        done["update"] = ("rows", num_pairs * settings["update"]["num_train_epochs"], workers)
    return {
        stage: Rate(unit, amount / spent[stage] / workers)
        for stage, (unit, amount, workers) in done.items()
        if spent.get(stage)
    }

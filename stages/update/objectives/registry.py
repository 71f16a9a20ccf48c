"""Every objective by its ``loss_type``. A new one is one file here and one line below; a user's own is ``module:NAME``.

``NAME`` in a user's module is an `Objective`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from stages.errors import ConfigError
from stages.update.objectives import (
    chi_po,
    dpo,
    dpop,
    exo,
    exo_pair,
    hinge,
    hpo,
    ipo,
    minor_dpo,
    mpo,
    mrpo,
    nca_pair,
    robust,
    rpo,
    sft,
    simpo,
    sppo,
)
from stages.update.objectives.base import BasedParams, Loss, Objective

OBJECTIVES: dict[str, Objective] = {
    module.OBJECTIVE.name: module.OBJECTIVE
    for module in (
        minor_dpo,
        dpo,
        dpop,
        rpo,
        exo,
        exo_pair,
        mpo,
        chi_po,
        hpo,
        mrpo,
        ipo,
        hinge,
        robust,
        sppo,
        simpo,
        nca_pair,
        sft,
    )
}

_ELSEWHERE = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo with loss_params.logps mean",
    "cdpo": "dpo with loss_params.label_smoothing",
    "sppo_hard": "sppo",
    "nca": "nca_pair",
    "rs_dpo": "dpo with pair.strategy all_above",
    "apo": "dpo with momentum 0.3",
}
"""Words that other trainers and papers use, and what it is here."""


def find_objective(name: str, *, key: str = "loss_type") -> Objective:
    """The objective called so, or a user's own by import path.

    Args:
        key: where the name stands, for an error.

    Raises:
        ConfigError: if there is none.
    """
    if ":" in name:
        return _own_objective(name, key)
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        known = _ELSEWHERE.get(name) or (near[0] if near else None)
        raise ConfigError(
            key,
            wanted=f"one of {', '.join(OBJECTIVES)}, or module:OBJECTIVE for one of your own",
            got=repr(name),
            fix=f"did you mean {known}?" if known else "minor_dpo is the default",
        )
    return OBJECTIVES[name]


def find_loss(
    name: str,
    params: Mapping[str, Any],
    *,
    beta: float | None = None,
    gate_floor: float | None = None,
    weight: float = 1.0,
    key: str = "loss_params",
) -> Loss:
    """An objective with its parameters checked.

    Args:
        beta: where the objective (or the one under it) has one and `params` does not say.
        gate_floor: nats a sequence, the same.
        key: what the parameters are called in an error.

    Raises:
        ConfigError: for an unknown objective, an unknown parameter, or a value outside its range.
    """
    objective = find_objective(name)
    try:
        loss = Loss(objective, objective.params.model_validate(dict(params)), weight)
        return Loss(objective, _with_common(loss, {"beta": beta, "gate_floor": gate_floor}), weight)
    except ValidationError as error:
        raise _readable(error, objective, key) from error


def _with_common(loss: Loss, common: Mapping[str, float | None]) -> Any:
    """The parameters with what holds for all objectives filled in, where they have it and do not say it themselves."""
    params = loss.params
    if isinstance(params, BasedParams):
        inner = _with_common(params.base_loss(), common)
        return params.model_copy(update={"base_params": inner.model_dump()})
    given = {name: value for name, value in common.items() if value is not None and name in type(params).model_fields}
    known = params.model_dump(include=params.model_fields_set)
    return type(params).model_validate(given | known)


def _readable(error: ValidationError, objective: Objective, key: str) -> ConfigError:
    first = error.errors()[0]
    fields = sorted(set(objective.params.model_fields) - {"gate_floor"})
    name = ".".join(map(str, first["loc"])) or objective.name
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, fields, n=1)
        return ConfigError(
            f"{key}.{name}",
            wanted=f"a parameter of {objective.name} ({', '.join(fields) or 'it has none'})",
            got=f"the unknown {name!r}",
            fix=f"did you mean {near[0]}?" if near else "remove it",
        )
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return ConfigError(f"{key}.{inner.where}", wanted=inner.wanted, got=inner.got, fix=inner.fix)
    got = f"{first['input']!r}: {first['msg']}"
    return ConfigError(
        f"{key}.{name}", wanted=f"a value that {objective.name} allows", got=got, fix="change or remove it"
    )


def _own_objective(name: str, key: str) -> Objective:
    module, _, attribute = name.partition(":")
    fix = "name a module beside the config, or in run.modules, and the Objective in it, for example my_losses:OBJECTIVE"
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(key, wanted=f"module {module}", got=f"{type(error).__name__}: {error}", fix=fix) from None
    if not isinstance(found, Objective):
        got = f"no {attribute} in it" if found is None else f"{attribute} is a {type(found).__name__}"
        raise ConfigError(key, wanted=f"an Objective in module {module}", got=got, fix=fix)
    return found

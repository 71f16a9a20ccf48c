"""From a model's name in the config to a folder that can work: found, complete, and of the right kind.

Only JSON is read here; what needs the tokenizer or the weights is checked by the workers that load them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import embedded
from pipeline.files import read_json
from stages.errors import InputError
from stages.score.reward_model import check_reward_model

Maker = Callable[[str], Path]
"""Gives what stands behind an embedded name, made now if need be."""

_NOT_CAUSAL = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(name: str, *, key: str, maker: Maker, hub: bool = True) -> Path:
    """The local file or folder behind a name: embedded (made now if need be), a path, or a model on the hub.

    Raises:
        InputError: if there is no such thing.
    """
    if name.startswith(embedded.PREFIX):
        return maker(_embedded_name(name, key))
    if (path := _existing(name, key)) is not None:
        return path
    if not hub or not _may_be_on_hub(name):
        raise InputError(
            f"{key}: {name}",
            wanted="a file or folder",
            got="no such path",
            fix=f"check the path; it is taken from {Path.cwd()}",
        )
    return _from_hub(name, key)


def find_here(name: str, *, key: str) -> Path | None:
    """What `resolve` gives, if it is on this machine already (in a cache, too); nothing is made or fetched.

    Raises:
        InputError: for an embedded name that is not known.
    """
    if name.startswith(embedded.PREFIX):
        place = embedded.place_of(_embedded_name(name, key))
        return place if place.exists() else None
    path = _existing(name, key)
    if path is not None or not _may_be_on_hub(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _existing(name: str, key: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, RuntimeError) as error:  # too long a name, an unknown user's home
        got = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{key}: {name[:80]}", wanted="a file or folder", got=got, fix="check the path") from None


def _embedded_name(name: str, key: str) -> str:
    short = name.removeprefix(embedded.PREFIX)
    if short not in embedded.names():
        raise InputError(
            f"{key}: {name}",
            wanted=" or ".join(embedded.PREFIX + known for known in embedded.names()),
            got=name,
            fix="use one of these, or a path",
        )
    return short


def _may_be_on_hub(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _from_hub(name: str, key: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # offline, gated, unknown: all end the same way
        reason = (str(error).splitlines() or ["no message"])[0]
        raise InputError(
            f"{key}: {name}",
            wanted="a folder, or a repository on the hub that can be reached",
            got=f"no such folder here, and from the hub {type(error).__name__}: {reason}",
            fix="download the model beforehand and give the folder's path",
        ) from error


def check_policy(folder: Path, *, key: str, ignore_auto_map: bool = False) -> None:
    """Refuse a folder that cannot be a policy.

    Args:
        ignore_auto_map: whether a model that names code of its own may be loaded without it.

    Raises:
        InputError: without a config, without safetensors, or with a model of another kind.
    """
    config = _model_config(folder, key)
    if not ignore_auto_map:
        _refuse_own_code(folder, key)
    kinds = config["architectures"]
    if any(kind.endswith(_NOT_CAUSAL) for kind in kinds):
        scores = any(kind.endswith("ForSequenceClassification") for kind in kinds)
        raise InputError(
            f"{key}: {folder}",
            wanted="a causal language model",
            got=", ".join(kinds),
            fix="this one scores answers: it belongs under score.rewards"
            if scores
            else "name a model that writes text",
        )


def check_reward(folder: Path, *, key: str, ignore_auto_map: bool = False) -> None:
    """Refuse a folder that cannot be a reward model; see `check_reward_model` and `check_policy`."""
    if not ignore_auto_map:
        _refuse_own_code(folder, key)
    check_reward_model(_model_config(folder, key), where=f"{key}: {folder}")


def _model_config(folder: Path, key: str) -> dict[str, Any]:
    file, wanted = folder / "config.json", "a model folder with config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").exists()
        raise InputError(
            f"{key}: {folder}",
            wanted=wanted,
            got="a file" if folder.is_file() else "a LoRA adapter without its model" if adapter else "none in it",
            fix="merge it first: peft's merge_and_unload, then save_pretrained" if adapter else "check the path",
        )
    config = read_json(file)
    kinds = (config.get("architectures") or []) if isinstance(config, dict) else None
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise InputError(
            f"{key}: {file}", wanted="a model's config", got="JSON of another kind", fix="restore the file"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
        raise InputError(
            f"{key}: {folder}",
            wanted="weights in *.safetensors",
            got=", ".join(others) or "no weights",
            fix="save the model again with save_pretrained (pickled weights are never opened)",
        )
    for weights in files:
        _refuse_broken(weights, key)
    _refuse_missing_files(folder, key)
    return config | {"architectures": kinds}


def _refuse_own_code(folder: Path, key: str) -> None:
    """Refuse a model whose files name Python code that comes with it.

    Raises:
        InputError: naming the file and the code.
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        found = read_json(file) if file.is_file() else {}
        auto_map = found.get("auto_map") if isinstance(found, dict) else None
        if auto_map:
            code = ", ".join(map(str, auto_map.values())) if isinstance(auto_map, dict) else str(auto_map)
            raise InputError(
                f"{key}: {file}",
                wanted="a model without code of its own, which is never run here",
                got=f"auto_map: {code}",
                fix="--set run.ignore_auto_map=true to load it by transformers' own class, where there is one",
            )


def _refuse_missing_files(folder: Path, key: str) -> None:
    """Refuse a folder without some of the files that its index of weights names (a download that was cut short)."""
    index = folder / "model.safetensors.index.json"
    found = read_json(index) if index.exists() else {"weight_map": {}}
    named = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(named, dict):
        raise InputError(f"{key}: {index}", wanted="weight_map", got="none in it", fix="restore the file")
    missing = sorted(name for name in set(named.values()) if not (folder / str(name)).exists())
    if missing:
        raise InputError(
            f"{key}: {folder}",
            wanted=f"the {len(set(named.values()))} files that {index.name} names",
            got=f"{len(missing)} missing, {missing[0]} among them",
            fix="copy or download them too",
        )


def _refuse_broken(weights: Path, key: str) -> None:
    """Refuse a safetensors file whose header does not fit its length (a broken download, a full disk)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{key}: {weights}", wanted="a whole safetensors file", got=str(error), fix="copy or download it again"
        ) from None

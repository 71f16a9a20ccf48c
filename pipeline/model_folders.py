"""How policies are published: a Hugging Face folder with a manifest, written last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import MANIFEST
from pipeline.files import keep_tree, read_vouched, write_vouched
from pipeline.fingerprints import differing_fields, refuse_other_fingerprint
from pipeline.mirror import fetch, sizes
from stages.errors import ContractError
from stages.protocols import Moments
from stages.weights import file_sha256

OPTIMIZER = "optimizer"
"""The folder of a round that holds AdamW's moments, beside the policy that was made with them."""

_ENDED = "update_ended.json"


def close_model(folder: Path, fingerprint: Mapping[str, Any], *, sha256: str, **figures: Any) -> None:
    """Write a model folder's manifest: its files with their hashes, last.

    Args:
        sha256: of the weights, see `stages.weights.weights_sha256`: a single file of weights is not read again for it.
    """
    weights = list(folder.glob("*.safetensors"))
    known = {weights[0].name: sha256} if len(weights) == 1 else {}
    files = {}
    for file in sorted(folder.iterdir()):
        if file.name != MANIFEST:
            keep_tree(file)
            files[file.name] = known.get(file.name) or file_sha256(file)
    write_vouched(folder / MANIFEST, {"fingerprint": fingerprint, "files": files, "sha256": sha256} | figures)


def model_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished model folder.

    Raises:
        ContractError: if it was changed.
    """
    fix = f"restore the file; where its round is not settled, delete {folder} to have it made again; "
    fix += "or start a run of another name"
    return read_vouched(folder / MANIFEST, "a model's manifest", fix=fix)


def found_model(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished model folder, or None if it is unfinished.

    Raises:
        ContractError: if it was changed.
        FingerprintError: if it was made from something else.
    """
    fetch(folder / MANIFEST)
    if not (folder / MANIFEST).exists():
        return None
    manifest = model_manifest(folder)
    refuse_other_fingerprint(folder, manifest["fingerprint"], fingerprint)
    return manifest


def found_mixture(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a mixture in ``folder/policy``, or None if it is unfinished or its weights were removed since.

    Raises as `found_model`.
    """
    manifest = found_model(folder / "policy", fingerprint)
    needed = ("policy", "master") if manifest and manifest["master_sha256"] else ("policy",)
    return (
        manifest
        if all(any(Path(file).suffix == ".safetensors" for file in sizes(folder / name)) for name in needed)
        else None
    )


def end_without_model(round_folder: Path, fingerprint: Mapping[str, Any], **figures: Any) -> None:
    """Note that a round's update was ended without a policy."""
    write_vouched(round_folder / _ENDED, {"fingerprint": fingerprint} | figures)


def ended_without_model(round_folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was noted of a round's update that was ended without a policy; None of one made from something else.

    Raises:
        ContractError: if the note was changed.
    """
    file = round_folder / _ENDED
    fetch(file)
    if not file.exists():
        return None
    fix = "restore the file, or delete it to have the update made again, and run again"
    found = read_vouched(file, "the note of an update that was ended", fix=fix)
    return None if differing_fields(found["fingerprint"], fingerprint) else found


def found_moments(round_folder: Path) -> Moments | None:
    """AdamW's moments of the update that made a round's policy, where they were kept; those of another one are none."""
    policy, optimizer = (round_folder / name for name in ("policy", OPTIMIZER))
    if not ((policy / MANIFEST).exists() and (optimizer / MANIFEST).exists()):
        return None
    made, kept = model_manifest(policy), model_manifest(optimizer)
    return Moments(optimizer, kept["sha256"]) if made["fingerprint"] == kept["fingerprint"] else None


def refuse_changed_model(folder: Path) -> None:
    """Check that a finished model folder is as its manifest says: weights, config, tokenizer.

    Of what a run's store has and this node has not, that it is there; its content is checked where it is used.

    Raises:
        ContractError: naming the first file that is missing or differs, the manifest itself if it was changed.
    """
    there = sizes(folder)
    for name, wanted in model_manifest(folder)["files"].items():
        got = file_sha256(folder / name) if (folder / name).exists() else wanted
        if name not in there or got != wanted:
            raise ContractError(
                str(folder / name),
                wanted=f"sha256 {wanted}, as published",
                got=got if name in there else "no such file",
                fix="restore the file, or start a run of another name",
            )

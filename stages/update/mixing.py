"""Policies on the line through two others: APO's momentum beyond the newer one, an average between the two."""

from __future__ import annotations

from pathlib import Path

from stages.errors import InputError
from stages.protocols import Weights
from stages.update.model import copy_tokenizer, load_policy, persistent_buffers, read_weights, save_policy


def mix(newer: Weights, older: Weights, *, by: float, out: Path, dtype: str, pad_token: str | None) -> Path | None:
    """Write ``newer + by * (newer - older)``, computed in float32 from the masters where there are any.

    `by` above 0 goes on beyond `newer` (the momentum of Accelerated PO, arXiv:2410.06293, algorithm 1); between -1 and
    0 it averages: ``(1 + by) * newer - by * older``. Tied weights stay tied; buffers, integers
    among them, are `newer`'s.

    Args:
        out: gets ``policy`` in `dtype`, and ``master`` in float32 where `dtype` is another.

    Returns:
        The master's folder, if there is one.

    Raises:
        InputError: if the two are not weights of one model.
    """
    import torch

    for weights in (newer, older):
        weights.refuse_changed()
    model = load_policy(newer.master or newer.path, dtype="float32")
    before = read_weights(older.master or older.path)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in before.items()}:
        raise InputError(
            str(older.path),
            wanted=f"weights of the same model as {newer.path}",
            got="other names or shapes",
            fix="give policies of one architecture",
        )
    with torch.no_grad():
        for name, value in state.items():
            value.add_(value - before[name].float(), alpha=by)
    kept = persistent_buffers(model)
    state |= {name: buffer.detach() for name, buffer in model.named_buffers() if name in kept}
    targets = {"policy": dtype} | ({} if dtype == "float32" else {"master": "float32"})
    for name, kind in targets.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        save_policy(model, out / name, state, dtype=kind)
        copy_tokenizer(newer.path, out / name, pad_token=pad_token)
    return out / "master" if "master" in targets else None

"""The process group that `stages.update.worker.Trainer` works in: torchrun's, or one of this process alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[int]:
    """The rank of this process in it."""
    with TemporaryDirectory() as folder:
        if "RANK" in os.environ:
            dist.init_process_group("gloo")
        else:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield dist.get_rank()
        finally:
            dist.destroy_process_group()

"""Some rows of a Parquet file, read a group of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_A_GROUP = 1 << 16  # written, and read, at a time


def take_rows(file: Path, rows: Sequence[int]) -> pa.Table:
    """Rows of a file by their numbers, in the order of `rows`; memory holds those and one group."""
    wanted = np.asarray(rows, np.int64)
    order = np.argsort(wanted)
    found, start, ends = [], 0, 0
    with pq.ParquetFile(file) as parts:
        found.append(parts.schema_arrow.empty_table())
        for batch in parts.iter_batches(ROWS_A_GROUP):
            first, ends = ends, ends + batch.num_rows
            stop = int(np.searchsorted(wanted, ends, sorter=order))
            found.append(pa.Table.from_batches([batch]).take(wanted[order[start:stop]] - first))
            start = stop
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return pa.concat_tables(found).take(places)

#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1: a valid Parquet file without rows, as any writer makes of an empty table, stops the reading of
# a whole list of files: `Dataset.from_parquet` takes the number of rows of the first row group as its batch size, which is then 0
# ("BatchSize must be greater than 0, got 0"). Files with rows before and behind it are lost with it.
# Expected: the rows of the other files, as pyarrow, DuckDB and polars give them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_DATASETS_CACHE="$folder/cache" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from datasets import Dataset, disable_progress_bars

disable_progress_bars()
for name, rows in (("a", [1, 2]), ("b", []), ("c", [3])):
    pq.write_table(pa.table({"number": pa.array(rows, pa.int64())}), f"{name}.parquet")
files = ["a.parquet", "b.parquet", "c.parquet"]
print("pyarrow: ", ds.dataset(files).to_table()["number"].to_pylist())
try:
    print("datasets:", Dataset.from_parquet(files)["number"][:])
except Exception as error:
    reason = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    print("datasets:", type(error).__name__, "from", type(reason).__name__, reason)
    raise SystemExit("BatchSize must be greater than 0" not in str(reason))
raise SystemExit("the behaviour has changed")
PYTHON

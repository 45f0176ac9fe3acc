#!/usr/bin/env bash
# torch 2.11.0 on processors without AVX-512 (here by ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY, so that newer ones show it too).
#
# A product of matrices in bfloat16 or float16 is about 40 times slower than the same product in float32, 256 x 512 by 512 x 512 on
# one thread, so that casting to float32 and back would be the quick way. And it depends on the memory order of the right matrix: the
# same numbers column by column, as `torch.nn.functional.linear` has them, take a seventh of the time and round to other results,
# while float32 gives equal results in both orders. One would expect half precision to cost at most the casts, and the order of the
# numbers in memory to change neither time nor result by much.
#
# What it means for codecs: `precision="bf16"` on such a processor is no saving, and a benchmark that first times a large product in
# bfloat16 spends minutes there.
#
# Exits with 0 while both hold.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 numpy==2.3.5
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

torch.manual_seed(0)
torch.set_num_threads(1)
left, right = torch.randn(256, 512), torch.randn(512, 512)


def milliseconds(dtype, order):
    a, b = left.to(dtype), order(right.to(dtype))
    times = []
    for _ in range(6):
        started = time.process_time()
        product = a @ b
        times.append(time.process_time() - started)
    return 1000 * sorted(times)[2], product


found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    rows, one = milliseconds(dtype, lambda matrix: matrix)
    columns, other = milliseconds(dtype, lambda matrix: matrix.t().contiguous().t())
    found[dtype] = rows, columns, torch.equal(one, other)
    print(f"{dtype}: rows {rows:.1f} ms, columns {columns:.1f} ms, equal results: {found[dtype][2]}")
full = found.pop(torch.float32)
print(torch.backends.cpu.get_cpu_capability())
sys.exit(not (full[2] and all(rows > 10 * full[0] and rows > 3 * columns and not same for rows, columns, same in found.values())))
PYTHON

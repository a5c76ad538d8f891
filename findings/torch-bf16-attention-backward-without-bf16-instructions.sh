#!/usr/bin/env bash
# torch 2.11.0 on a CPU without bf16 instructions: scaled_dot_product_attention in bf16 is as fast as in f32 forward, and
# several times slower in its backward. perf finds the backward in at::native::cpublas::cpublas_gemm_impl and gemm_transb_impl,
# ATen's own loops for a bf16 product that no library takes there. A training step in bf16 that spends a tenth of its time in
# attention in f32 can spend half of it there.
#
# Seen: 4 rows of 544 tokens, 9 heads of 64: forward bf16 / f32 about 1, backward bf16 / f32 about 5 to 7 with AVX2.
# Libraries that would use newer instructions are held to AVX2, so that every x86 machine shows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
    "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import time

import torch
import torch.nn.functional as F

torch.manual_seed(0)


def seconds(kind):
    q, k, v = (torch.randn(4, 9, 544, 64).to(kind).requires_grad_() for _ in range(3))
    forward, backward = [], []
    for _ in range(4):
        start = time.process_time()
        y = F.scaled_dot_product_attention(q, k, v)
        middle = time.process_time()
        y.backward(torch.ones_like(y))
        forward.append(middle - start)
        backward.append(time.process_time() - middle)
    return min(forward), min(backward)


rounds = [(seconds(torch.float32), seconds(torch.bfloat16)) for _ in range(3)]
forward = sorted(bf16[0] / f32[0] for f32, bf16 in rounds)[1]
backward = sorted(bf16[1] / f32[1] for f32, bf16 in rounds)[1]
print(f"torch {torch.__version__.split('+')[0]}: bf16 takes {forward:.1f} of f32's time forward, {backward:.1f} backward")
assert forward < 2 and backward > 3, "no longer so"
PYTHON

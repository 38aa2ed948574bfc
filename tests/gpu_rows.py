"""Invented records of a measurement run on a GPU, for tests of the code that uses records."""

from dataclasses import replace

from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import Card, GemmRow, ModelRow, Peaks, PruningRow, Row, StepRow

CARD = Card(
    "H100", "cuda", (9, 0), 80 * 10**9, "580.1", "13.0", "2.11", "13.0", "3.6", "5.17", "3.12.3",
    700.0, 1.98e9, "2026-11-30", "python -m benchmarks.gpu_campaign",
)  # fmt: skip
DENSE = ModelRow(
    "dense", "torch:eager", "bf16", 32, 8 * 10**9, "decode", 1, 512, (6e-3, 5e-3, 4e-3), 10**10
)
ROWS: tuple[Row, ...] = (
    CARD,
    Peaks(3e12, "bf16", 8192, 7e14),
    GemmRow("dense", "bf16", 14336, 4096, 1, (4e-5,), 1e-3),
    GemmRow("triton", "bf16", 14336, 4096, 1, (2.5e-5,), 1e-3),
    GemmRow("mma-sp", "bf16", 14336, 4096, 1, (3e-5,), 1e-3),
    GemmRow("cutlass", "bf16", 14336, 4096, 1, None, None, "compute capability 8.x only"),
    DENSE,
    replace(DENSE, engine="torch:compiled", seconds=(9e-3,)),
    replace(DENSE, model="2:4", engine="torch:triton", seconds=(4.5e-3,)),
    replace(DENSE, model="2:4", engine="torch:sparse", seconds=(2.5e-3,)),
    replace(DENSE, model="2:4", engine="torch:mma-sp", seconds=None, reason="out of memory"),
    replace(DENSE, model="structured", parameters=6 * 10**9, seconds=(4e-3,)),
    replace(DENSE, model="2:4", phase="prefill", tokens=2048, seconds=(1.0,)),  # no dense row
    PruningRow("thanos", "fast", "2:4", 4096, 14336, 2.5, 0.1),
    StepRow("models", "PASS", "10 rows"),
)
RECORDS = Records(ROWS)

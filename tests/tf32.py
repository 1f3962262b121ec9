"""What the process allows now."""

from __future__ import annotations

from dpsyngen.full_precision import _read


def tf32_allowed() -> tuple[bool, bool]:
    """Whether (matrix products, convolutions) of fp32 tensors may use TF32 now."""
    now = _read()
    if "matmul" in now:
        return now["matmul"] != "highest", bool(now["cudnn"])
    return now["each"].get("cuda.matmul") == "tf32", now["each"].get("cudnn.conv") == "tf32"

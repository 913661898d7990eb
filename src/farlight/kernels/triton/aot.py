"""Ahead-of-time (AOT) compilation of the kernels, without a device: registers, shared memory and spills, as ptxas counts them.

For tests and documents. Needs Triton's compiler and the ptxas in its wheel. A kernel's parameters get their types by name: see
`_type` and `_constants`, which must know every parameter of every kernel in `jit/`.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farlight.kernels.triton.configs import PASSES, Config, padded

__all__ = ["FLAGS", "SMALL_KERNELS", "Resources", "compiled"]

# Options of the pass kernels. With all off: whole blocks, and masked blocks with bounds, in natural order.
FLAGS = ("SORTED_ROWS", "SORTED_KEYS", "BITS", "POINTS", "DROPOUT", "ADD", "JOIN", "SPLIT", "WIDE")
# The module in `jit/` of each kernel. Besides the passes: kernels before, after and between them, and those of decoding.
_MODULES = {
    "fwd": "fwd", "dq": "bwd_dq", "dkdv": "bwd_dkdv",
    "delta": "bwd_dq", "merge": "fwd", "sum": "bwd_dq", "decode": "decode", "decode_merge": "decode",
}  # fmt: skip
SMALL_KERNELS = tuple(name for name in _MODULES if name not in PASSES)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_Q_DTYPE = {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "grad_ptr"}
_FLOAT32 = {
    "lse_ptr", "dlse_ptr", "delta_ptr", "row_max_ptr", "row_sum_ptr",
    "part_ptr", "part_out_ptr", "part_max_ptr", "part_sum_ptr", "part_dk_ptr", "part_dv_ptr",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers of a thread, bytes of shared memory of a program, bytes spilled (stores, loads)."""

    registers: int
    shared: int
    spill_stores: int
    spill_loads: int


def compiled(
    name: str, config: Config, head_dim: int, dtype: torch.dtype, capability: int, *, on: tuple[str, ...] = ()
) -> Resources:
    """Compile the kernel of a pass ("fwd", "dq", "dkdv") or one of SMALL_KERNELS for a compute capability such as 80 or 90.

    `on`: those of FLAGS that are set, and "NEGATE". Strides between heads and rows are taken as divisible by 16.
    Raises RuntimeError where no ptxas takes the program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"farlight.kernels.triton.jit.{_MODULES[name]}"), f"{name}_kernel")
    constants = _constants(config, head_dim, on)
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    divisible: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(kernel.arg_names):
        if parameter in constants:
            signature[parameter], constexprs[(position,)] = "constexpr", constants[parameter]
            continue
        signature[parameter] = _type(parameter, dtype)
        if parameter.endswith("_ptr") or parameter == "head_dim":
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=divisible)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _ptxas_report(program.asm["ptx"], program.metadata.shared, capability, Path(triton.__file__).parent)


def _constants(config: Config, head_dim: int, on: tuple[str, ...]) -> dict[str, Any]:
    """Every compile-time parameter of every kernel; strides between dimensions are specialised to 1, as at run time."""
    return {
        **{flag: flag in on for flag in (*FLAGS, "NEGATE")},
        **dict.fromkeys(("sqd", "skd", "svd", "sdd"), 1),
        "BLOCK_M": config.rows,
        "BLOCK_N": config.keys,
        "BLOCK_D": padded(head_dim),
        "BLOCK_S": 16,
        "WHOLE_D": padded(head_dim) == head_dim,
        "UNIT": 16,
        "PRECISION": "ieee",
        "SORTED": "SORTED_ROWS" in on,
        "DLSE": True,
        "LENGTHS": True,
        "MASK": True,
    }


def _type(name: str, dtype: torch.dtype) -> str:
    if name in _Q_DTYPE:
        return "*" + _TYPES[dtype]
    if name in _FLOAT32:
        return "*fp32"
    if name in ("seed_ptr", "lengths_ptr"):
        return "*i64"
    if name == "allowed_ptr":
        return "*u8"
    if name.endswith("_ptr"):
        return "*i32"
    return "fp32" if name in ("scale", "scale_log2", "keep_scale") else "i32"


def _ptxas_report(ptx: str, shared: int, capability: int, triton: Path) -> Resources:
    """Registers and spills of a program. The newest ptxas goes first: older ones refuse newer PTX."""
    folder = triton / "backends" / "nvidia" / "bin"
    tools = [str(folder / name) for name in ("ptxas-blackwell", "ptxas") if (folder / name).exists()]
    tools += [tool for tool in (shutil.which("ptxas"),) if tool is not None]
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    report = "no ptxas was found"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "kernel.ptx")
        path.write_text(ptx)
        for tool in tools:
            command = [tool, "-v", f"--gpu-name={arch}", str(path), "-o", str(Path(temporary, "kernel.cubin"))]
            report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
            registers = re.search(r"Used (\d+) registers", report)
            if spills is not None and registers is not None:
                return Resources(int(registers[1]), shared, int(spills[1]), int(spills[2]))
    raise RuntimeError(f"ptxas gave no figures: {report[:500]}")

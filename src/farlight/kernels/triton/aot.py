"""Compiling kernels ahead of time for devices that are not at hand: registers, shared memory and spills, as ptxas counts them.

For tests and documents. Needs Triton's own compiler and the ptxas that comes with it; no device.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farlight.kernels.triton.configs import Config, padded

__all__ = ["FLAGS", "SMALL", "Resources", "compiled"]

# Options of a kernel, all off: whole and bounded blocks in natural order.
FLAGS = ("ORDERED", "KEYED", "BITS", "POINTS", "DROPOUT", "ADD", "SPLIT", "WIDE")
SMALL = ("delta", "merge", "sum", "decode", "join")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_LIKE_Q = {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "into_ptr"}
_FLOATS = {"lse_ptr", "dlse_ptr", "delta_ptr", "part_ptr", "part_out_ptr", "part_lse_ptr", "part_dk_ptr", "part_dv_ptr"}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers of a thread, bytes of shared memory of a program, bytes spilled (stores, loads)."""

    registers: int
    shared: int
    spill_stores: int
    spill_loads: int


def compiled(
    what: str, config: Config, head_dim: int, dtype: torch.dtype, capability: int, *, on: tuple[str, ...] = ()
) -> Resources:
    """Compile the kernel of a pass ("forward", "queries", "keys"), or one of the small kernels between them, for a compute
    capability such as 80 or 90.

    `on`: those of FLAGS that are set. Heads with strides divisible by 16 are assumed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(what)
    constants: dict[str, Any] = {name: name in on for name in FLAGS}
    constants |= {"BLOCK_M": config.rows, "BLOCK_N": config.keys, "BLOCK_D": padded(head_dim), "PRECISION": "ieee"}
    constants |= {
        "WHOLE_D": padded(head_dim) == head_dim,
        "NEGATE": "NEGATE" in on,
        "UNIT": 16,
        "DLSE": True,
        "sqd": 1,
        "skd": 1,
        "svd": 1,
        "sdd": 1,
    }
    constants |= {"LENGTHS": True, "MASK": True, "BLOCK_S": 16}
    signature: dict[str, str] = {}
    given: dict[tuple[int, ...], Any] = {}
    divisible: dict[tuple[int, ...], Any] = {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], given[(at,)] = "constexpr", constants[name]
            continue
        signature[name] = _type(name, dtype)
        if name.endswith("_ptr") or name == "head_dim":
            divisible[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=divisible)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _measured(found.asm["ptx"], found.metadata.shared, capability, Path(triton.__file__).parent)


def _kernel(what: str) -> Any:
    from farlight.kernels.triton.jit import bwd_dkdv as keys
    from farlight.kernels.triton.jit import bwd_dq as queries
    from farlight.kernels.triton.jit import decode
    from farlight.kernels.triton.jit import fwd as forward

    modules = {"merge": forward, "delta": queries, "sum": queries, "join": decode}
    owner = modules.get(what) or {"forward": forward, "queries": queries, "keys": keys, "decode": decode}[what]
    return getattr(owner, f"{what}_kernel")


def _type(name: str, dtype: torch.dtype) -> str:
    if name in _LIKE_Q:
        return "*" + _TYPES[dtype]
    if name in _FLOATS:
        return "*fp32"
    if name in ("seed_ptr", "lengths_ptr"):
        return "*i64"
    if name == "allowed_ptr":
        return "*u8"
    if name.endswith("_ptr"):
        return "*i32"
    return "fp32" if name in ("scale", "scale_log2", "grown") else "i32"


def _measured(ptx: str, shared: int, capability: int, triton: Path) -> Resources:
    """What ptxas says of a program; the newest ptxas that is at hand, because older ones refuse newer programs."""
    folder = triton / "backends" / "nvidia" / "bin"
    tools = [str(folder / name) for name in ("ptxas-blackwell", "ptxas") if (folder / name).exists()]
    tools += [tool for tool in (shutil.which("ptxas"),) if tool is not None]
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    said = "no ptxas was found"
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "kernel.ptx")
        path.write_text(ptx)
        for tool in tools:
            command = [tool, "-v", f"--gpu-name={arch}", str(path), "-o", str(Path(place, "kernel.cubin"))]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
            registers = re.search(r"Used (\d+) registers", said)
            if spills is not None and registers is not None:
                return Resources(int(registers[1]), shared, int(spills[1]), int(spills[2]))
    raise RuntimeError(f"ptxas gave no figures: {said[:500]}")

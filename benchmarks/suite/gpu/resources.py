"""The resource table of docs/gpu.md: registers, shared memory and spills of each configuration, compiled ahead of time.

PYTHONPATH=src python benchmarks/suite/gpu/resources.py
"""

from __future__ import annotations

import torch

from farlight.kernels.triton.aot import compiled
from farlight.kernels.triton.configs import PASSES, candidates


def main() -> None:
    import triton

    print(f"Triton {triton.__version__}, bfloat16, with gathered keys and split rows\n")
    head = ["pass", "head_dim", "rows × keys", "warps", "stages", "sm_80: registers, shared, spilled", "sm_90"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for dim in (64, 128):
        for name in PASSES:
            configs = {capability: candidates(name, dim, torch.bfloat16, hopper=capability >= 90) for capability in (80, 90)}
            for config in dict.fromkeys((*configs[80], *configs[90])):
                cells = []
                for capability in (80, 90):
                    if config not in configs[capability]:
                        cells.append("not used")
                        continue
                    kernel = compiled(name, config, dim, torch.bfloat16, capability, on=("POINTS", "SPLIT"))
                    cells.append(f"{kernel.registers}, {kernel.shared:,} B, {kernel.spill_stores + kernel.spill_loads} B")
                size = f"{config.rows} × {config.keys} | {config.warps} | {config.stages}"
                print(f"| {name} | {dim} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

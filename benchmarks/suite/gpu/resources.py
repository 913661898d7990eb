"""The table of docs/gpu.md: what the compiler makes of each configuration, for devices that need not be at hand.

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
        for what in PASSES:
            listed = {capability: candidates(what, dim, torch.bfloat16, hopper=capability >= 90) for capability in (80, 90)}
            for config in dict.fromkeys((*listed[80], *listed[90])):
                cells = []
                for capability in (80, 90):
                    if config not in listed[capability]:
                        cells.append("not used")
                        continue
                    found = compiled(what, config, dim, torch.bfloat16, capability, on=("POINTS", "SPLIT"))
                    cells.append(f"{found.registers}, {found.shared:,} B, {found.spill_stores + found.spill_loads} B")
                size = f"{config.rows} × {config.keys} | {config.warps} | {config.stages}"
                print(f"| {what} | {dim} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

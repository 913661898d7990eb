"""What is not collected: modules of the Triton backend where Triton is not installed (it comes for Linux only)."""

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["src/farlight/kernels/triton/*"]

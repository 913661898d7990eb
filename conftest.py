"""What is not collected, and why."""

import importlib.util
import os

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("src/farlight/kernels/triton/*")  # Triton comes for Linux only
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob.append(
        "tests/helpers/triton_interpreted.py"
    )  # run by tests/kernels/test_triton.py, in a process that interprets kernels

"""An installation without the native module: attention runs in plain torch, says so once, and a named backend refuses.

`scripts/check_wheel.py --without-compiler` tries the same on a package that was really built that way.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = """
import sys, warnings
sys.modules["farlight._cpu"] = None  # importing it fails, as where there was no compiler
import torch
import farlight as fl
from farlight.kernels import cpu

q, k, v = torch.randn(3, 1, 2, 4096, 16)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    out = [fl.attention(q, k, v, fl.window(8)) for _ in range(3)][0]
print([str(x.message) for x in seen if "plain torch" in str(x.message)])
assert torch.allclose(out, fl.attention(q, k, v, fl.window(8), backend="reference"), atol=1e-5)
try:
    fl.attention(q, k, v, fl.window(8), backend="cpu")
except fl.UnsupportedError as error:
    print(error)
"""


def test_one_warning_and_the_right_numbers():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    warned, refused = found.stdout.strip().splitlines()
    assert warned.count("attention on the CPU runs in plain torch") == 1
    for text in (warned, refused):
        assert "the native module farlight._cpu cannot be imported" in text
        assert "install farlight where a C++ compiler is found" in text


def test_checks_that_do_not_exist():
    found = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sanitize.py"), "memory"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "unknown sanitizers 'memory'; choose 'address,undefined' or 'thread'" in found.stderr

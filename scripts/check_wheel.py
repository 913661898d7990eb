"""Build a wheel for the interpreter that runs this, install it apart, and run the kernel tests on what was installed.

`python scripts/check_wheel.py` needs an interpreter that has torch and the test tools, but not farlight itself.
`--without-compiler` hides the compilers while building: the package must then install all the same, say once what it lacks, and
compute the same numbers in plain torch. `--abi3` requires the wheel that serves CPython 3.12 and all later ones.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Run in the new installation where there is no native module: one warning, the right numbers, a refusal that says why.
PLAIN = """
import sys, warnings
from pathlib import Path

import torch

import farlight as fl
from farlight.kernels import cpu

assert Path(fl.__file__).is_relative_to(sys.argv[1]), fl.__file__
assert "farlight._cpu cannot be imported" in cpu.unavailable(), cpu.unavailable()
q, k, v = torch.randn(3, 1, 2, 4096, 16)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    outs = [fl.attention(q, k, v, fl.window(8)) for _ in range(2)]
said = [str(w.message) for w in seen if "native" in str(w.message)]
assert len(said) == 1, said
assert torch.allclose(outs[0], fl.attention(q, k, v, fl.window(8), backend="reference"), atol=1e-5)
try:
    fl.attention(q, k, v, fl.window(8), backend="cpu")
except fl.UnsupportedError as error:
    assert "install farlight where a C++ compiler is found" in str(error), error
else:
    raise AssertionError("backend 'cpu' ran without a native module")
print("without a compiler:", said[0])
"""


def main() -> int:
    """Build, install, test. The exit code is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-compiler", action="store_true")
    parser.add_argument("--abi3", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave the wheel in this folder")
    parser.add_argument("tests", nargs="*", default=["tests/kernels/test_cpu_kernel.py"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = _build(Path(folder), given.without_compiler, given.abi3)
        native = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("farlight/_cpu")]
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, native module: {native or 'none'}")
        if bool(native) == given.without_compiler:
            print("native module: not as required by --without-compiler", file=sys.stderr)
            return 1
        if given.keep is not None:
            given.keep.mkdir(parents=True, exist_ok=True)
            (given.keep / wheel.name).write_bytes(wheel.read_bytes())
        site = Path(folder) / "site"
        _pip("install", "--no-deps", "--no-compile", "--target", str(site), str(wheel))
        environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        if given.without_compiler:
            return subprocess.run([sys.executable, "-c", PLAIN, str(site)], cwd=folder, env=environment, check=False).returncode
        where = "import farlight, pathlib, sys; sys.exit(not pathlib.Path(farlight.__file__).is_relative_to(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", where, str(site)], cwd=folder, env=environment, check=True)
        tests = [str(ROOT / test) for test in given.tests]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def _build(folder: Path, hidden: bool, abi3: bool) -> Path:
    """The wheel, built in an environment of its own as pip does for everybody."""
    options = ["--config-settings", "wheel.py-api=cp312"] if abi3 else []
    # A build folder of its own: one that has seen a compiler remembers it.
    options += ["--config-settings", f"build-dir={folder / 'build'}"]
    environment = {**os.environ, **({"CC": "/nowhere/cc", "CXX": "/nowhere/c++"} if hidden else {})}
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *options, str(ROOT), environment=environment)
    (wheel,) = folder.glob("farlight-*.whl")
    return wheel


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())

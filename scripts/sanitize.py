"""Run the kernel tests on native code that checks itself: `python scripts/sanitize.py [address,undefined | thread] [pytest …]`.

The module is built beside the usual one (in build/sanitize-…) and put in its place for this run only, so that a checked
build is never imported by accident. Needs g++ or clang with its sanitizer libraries, cmake, ninja and nanobind; Linux only.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CHECKED = "FARLIGHT_CHECKED_MODULE"

# What each check needs to be told. Python and torch are not built with the checks: they leak by design, their threads meet
# in ways that the race check cannot see, and hand on their thread-local storage.
_QUIET = "race:_dl_deallocate_tls\ncalled_from_lib:libtorch_cpu.so\ncalled_from_lib:libgomp.so\nrace:libtorch_cpu.so\n"
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_mutex_bugs=0:second_deadlock_stack=1:suppressions={quiet}",
}
# What is run when nothing is named. The race check is for what runs in several threads; each set of instructions shares that.
_TESTS = {"address": (), "thread": ("-k", "threads")}


def main(arguments: list[str]) -> int:
    """Build with the named checks and run the kernel tests; the exit code is pytest's."""
    checks = arguments[0] if arguments and not arguments[0].startswith("-") else "address,undefined"
    first = checks.split(",")[0]
    if first not in _TESTS:
        print(f"asked for the checks {checks!r}; there are 'address,undefined' and 'thread'.", file=sys.stderr)
        return 2
    folder = ROOT / "build" / f"sanitize-{first}"
    module = _build(checks, folder)
    quiet = folder / "suppressions.txt"
    quiet.write_text(_QUIET)
    environment = {
        **os.environ,
        **{name: value.format(quiet=quiet) for name, value in _OPTIONS.items()},
        "LD_PRELOAD": _runtimes("thread" if first == "thread" else "address"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))),
        "PYTHONMALLOC": "malloc",
        _CHECKED: str(module),
    }
    rest = arguments[1:] or ["tests/kernels/test_cpu_kernel.py", *_TESTS[first]]
    # A report goes to the process's own stderr, and then the process is gone: pytest must leave that alone.
    command = [sys.executable, __file__, "--run", "-q", "--capture=sys", "-p", "no:cacheprovider", *rest]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _build(checks: str, folder: Path) -> Path:
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DFARLIGHT_SANITIZE={checks}", "-DFARLIGHT_IN_TREE=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    tools = {**os.environ, "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")}
    subprocess.run(configure, env=tools, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder)], env=tools, check=True)
    (module,) = folder.glob("_cpu*.so")
    return module


def _runtimes(check: str) -> str:
    """The sanitizer's library, and the C++ library whose exceptions it has to know from the start."""
    compiler = os.environ.get("CXX", "c++")
    names = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}[check]
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return ":".join(found)


def _run(arguments: list[str]) -> int:
    """Inside the checked process: the checked module takes the usual one's place before anything imports it."""
    import pytest
    import torch  # noqa: F401  (its OpenMP runtime first, as in farlight.kernels.cpu.native)

    path = os.environ[_CHECKED]
    spec = importlib.util.spec_from_file_location("farlight._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["farlight._cpu"] = module
    spec.loader.exec_module(module)

    from farlight.kernels.cpu import native

    if native.module() is not module:
        print(f"the checked module {path} is not the one in use: {native.module()}", file=sys.stderr)
        return 2
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(_run(sys.argv[2:]) if sys.argv[1:2] == ["--run"] else main(sys.argv[1:]))

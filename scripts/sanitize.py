"""Run the kernel tests under sanitizers: `python scripts/sanitize.py [address,undefined | thread] [pytest …]`.

The instrumented module is built in build/sanitize-… and replaces farlight._cpu in the test process only, so it is never
imported by accident. Needs g++ or clang with its sanitizer libraries, cmake, ninja and nanobind; Linux only.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MODULE_VARIABLE = "FARLIGHT_SANITIZED_MODULE"  # path of the instrumented module, for the child process

# Python and torch are not instrumented: they leak by design, and ThreadSanitizer does not see how their threads synchronise and
# reuse thread-local storage.
_SUPPRESSIONS = "race:_dl_deallocate_tls\ncalled_from_lib:libtorch_cpu.so\ncalled_from_lib:libgomp.so\nrace:libtorch_cpu.so\n"
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_mutex_bugs=0:second_deadlock_stack=1:suppressions={suppressions}",
}
# pytest options by default. ThreadSanitizer runs the multithreaded tests only: the threading code is the same for every ISA.
_TESTS = {"address": (), "thread": ("-k", "threads")}


def main(arguments: list[str]) -> int:
    """Build with the named sanitizers and run the kernel tests; returns pytest's exit code."""
    sanitizers = arguments[0] if arguments and not arguments[0].startswith("-") else "address,undefined"
    first = sanitizers.split(",")[0]
    if first not in _TESTS:
        print(f"unknown sanitizers {sanitizers!r}; choose 'address,undefined' or 'thread'.", file=sys.stderr)
        return 2
    folder = ROOT / "build" / f"sanitize-{first}"
    module = _build(sanitizers, folder)
    suppressions = folder / "suppressions.txt"
    suppressions.write_text(_SUPPRESSIONS)
    environment = {
        **os.environ,
        **{name: value.format(suppressions=suppressions) for name, value in _OPTIONS.items()},
        "LD_PRELOAD": _runtimes("thread" if first == "thread" else "address"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))),
        "PYTHONMALLOC": "malloc",
        _MODULE_VARIABLE: str(module),
    }
    rest = arguments[1:] or ["tests/kernels/test_cpu_kernel.py", "tests/kernels/test_cpu_decode.py", *_TESTS[first]]
    # A sanitizer writes its report to file descriptor 2 and aborts, so pytest must not capture at the descriptor level.
    command = [sys.executable, __file__, "--run", "-q", "--capture=sys", "-p", "no:cacheprovider", *rest]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _build(sanitizers: str, folder: Path) -> Path:
    """Build the instrumented module in `folder`; returns its path."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DFARLIGHT_SANITIZE={sanitizers}", "-DFARLIGHT_IN_TREE=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    tools = {**os.environ, "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")}
    subprocess.run(configure, env=tools, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder)], env=tools, check=True)
    (module,) = folder.glob("_cpu*.so")
    return module


def _runtimes(sanitizer: str) -> str:
    """LD_PRELOAD: the sanitizer's runtime, and libstdc++, whose exception functions the runtime intercepts at start-up."""
    compiler = os.environ.get("CXX", "c++")
    names = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}[sanitizer]
    paths = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return ":".join(paths)


def _run(arguments: list[str]) -> int:
    """In the test process: install the instrumented module as farlight._cpu before anything imports it, then run pytest."""
    import pytest
    import torch  # noqa: F401  (its OpenMP runtime first, as in farlight.kernels.cpu.native)

    path = os.environ[_MODULE_VARIABLE]
    spec = importlib.util.spec_from_file_location("farlight._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["farlight._cpu"] = module
    spec.loader.exec_module(module)

    from farlight.kernels.cpu import native

    if native.module() is not module:
        print(f"the instrumented module {path} is not the one in use: {native.module()}", file=sys.stderr)
        return 2
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(_run(sys.argv[2:]) if sys.argv[1:2] == ["--run"] else main(sys.argv[1:]))

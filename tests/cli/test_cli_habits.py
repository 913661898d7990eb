"""What people try at a prompt: version, help, completion, 10k, a full disk, a closed pipe, a bracket that is not closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import farlight as fl
from farlight.cli import main
from farlight.cli.numbers import count

SOURCE = str(Path(fl.__file__).parents[1])
COMMANDS = ["audit", "bench", "doctor", "embed", "map", "recall"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def shell(code: str, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE, **options}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["--version"], [], *([name, "-h"] for name in COMMANDS)], ids=" ".join
)
def test_help_and_version_load_neither_torch_nor_rich(arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['farlight', *{arguments!r}]\n"
        "unwanted = {'torch', 'numpy', 'transformers', 'rich'}\n"
        "atexit.register(lambda: print(sorted(unwanted & set(sys.modules)), file=sys.stderr))\n"
        "from farlight_command import main; main()"
    )
    done = shell(code)
    assert done.stderr == "[]\n"
    assert ("Usage" in done.stdout) != (arguments == ["--version"])


def test_the_entry_point_runs_the_commands_as_the_package_does() -> None:
    code = "import sys; sys.argv = ['farlight', 'map', 'window(3)', '-n', '1k']\nfrom farlight_command import main; main()"
    done = shell(code)
    assert (done.returncode, done.stderr) == (0, "")
    as_module = subprocess.run(
        [sys.executable, "-m", "farlight", "map", "window(3)", "-n", "1000"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    assert as_module.stdout == done.stdout


def test_a_deferred_package_becomes_the_package() -> None:
    code = (
        "import sys, farlight_command\n"
        "sys.argv = ['farlight', '--version']\n"
        "try:\n    farlight_command.main()\n"
        "except SystemExit:\n    pass\n"
        "import farlight as fl\n"
        "try:\n    fl.no_such_name\n"
        "except AttributeError as error:\n    print(error)\n"
        "print(fl.window(3).count(10), type(fl).__name__, fl.__version__)"
    )
    assert shell(code).stdout.splitlines()[1:] == [
        "module 'farlight' has no attribute 'no_such_name'",
        f"58 module {fl.__version__}",
    ]


def test_version_and_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(capsys, "--version") == (0, f"farlight {fl.__version__}\n", "")
    for name in COMMANDS:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"farlight {name}" in out[out.index("Examples:") :]
    monkeypatch.setenv("COLUMNS", "60")
    out = run(capsys, "audit", "--help")[1]
    assert "  farlight audit book.txt --pattern 'window(32)' --pattern 'window(32) | global_tokens([0, -1])'\n" in out


def test_completion_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "--install-completion" in out


@pytest.mark.parametrize("columns", ["60", "80"])
def test_the_list_of_commands_is_not_cut(columns: str) -> None:
    code = "import sys; sys.argv = ['farlight']\nfrom farlight_command import main; main()"
    lines = shell(code, COLUMNS=columns).stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


@pytest.mark.parametrize(
    "text, number",
    [("10k", 10_000), ("1M", 10**6), ("1.5k", 1500), ("64Ki", 2**16), ("2G", 2 * 10**9), ("16_384", 16384), ("1,000", 1000)],
)
def test_numbers(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize("text", ["10x", "", "k", "1.2345k", "1e5", "ten", "½", "١٠", "1.k", "--5"])
def test_what_is_no_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "map", "window(3)", f"--tokens={text}")
    assert (code, out) == (2, "")
    assert err.startswith(f"farlight: {text!r} is not a whole number")
    assert "10k" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("arguments", ["'map', 'window(3)', '-n', '50', '--json'", "'--help'", "'--version'"])
def test_output_to_a_full_disk(arguments: str) -> None:
    code = f"import sys; sys.argv = ['farlight', {arguments}]\nfrom farlight_command import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": SOURCE},
        )
    assert done.stderr == "farlight: the output cannot be written: No space left on device.\n"
    assert done.returncode == 2


def test_output_to_a_reader_that_leaves() -> None:
    code = "import sys; sys.argv = ['farlight', 'map', 'window(3)', '-n', '50']\nfrom farlight_command import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("window(3", ": the ( at column 7 is never closed; write ) where it ends."),
        ("global_tokens([0, 1)", ": the ) at column 20 closes the [ at column 15; brackets stand in pairs."),
        ("window(3))", ": the ) at column 10 has no opening bracket; brackets stand in pairs."),
        ("window(3) |", ": it is not an expression."),
    ],
)
def test_an_unclosed_bracket(pattern: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "map", pattern, "-n", "50")
    assert code == 2
    assert says in err


def test_doctor_says_fine_and_none_apart(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    backends = out[out.index("backends") : out.index("packages")]
    assert any(line.split() == ["reference", "fine"] for line in backends.splitlines())
    assert not [line for line in out.splitlines() if line.endswith(" -")]

"""The command line as a user meets it: real processes, exit statuses, what is printed where."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from convgen import __version__, cli
from convgen.commands import catalog
from convgen.spec import ConvSpec

SMALL = ("generate", "--op", "conv1d", "--kernel", "3", "--dtype", "f32", "--backend", "cpu")
"""The quickest module to compile: three small translation units."""

COMMANDS = ("generate", "export", "verify", "bench", "tune", "list", "show", "clean", "doctor")
"""As the help lists them."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this module's own, which its tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache: Path, tmp_path: Path):
    """Runs convgen in a folder of its own."""

    def run(
        *arguments: str, cwd: Path = tmp_path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "convgen", *arguments],
            cwd=cwd,
            env={**os.environ, "CONVGEN_CACHE_DIR": str(cache), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def say(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Runs convgen in this process, where torch is imported already, as :func:`run` does."""

    def say(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(cache))
        return cli.main(arguments), *capsys.readouterr()

    return say


def imported(importtime: str) -> set[str]:
    """Modules that a process imported, from what ``-X importtime`` printed."""
    return {line.rsplit("|", 1)[1].strip() for line in importtime.splitlines() if "|" in line}


def cpu_seconds(run: Callable[[], object]) -> float:
    """Processor time of the processes that ``run`` starts, the least of three runs.

    It is what a clock on the wall shows on an idle machine; this one may be busy with other tests.
    """
    least = math.inf
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        least = min(least, spent)
    return least


class TestStart:
    def test_help_takes_less_than_a_fifth_of_a_second(self, run) -> None:
        imports = [sys.executable, "-c", "import click"]
        assert cpu_seconds(lambda: run("--help")) < 4 * cpu_seconds(
            lambda: subprocess.run(imports, check=True)
        )

    def test_help_imports_nothing_heavy(self) -> None:
        command = [sys.executable, "-X", "importtime", "-m", "convgen", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not imported(result.stderr) & {"torch", "jinja2", "rich", "ninja", "numpy"}

    def test_version(self, run) -> None:
        assert run("--version").stdout == f"convgen {__version__}\n"

    def test_without_arguments_prints_help(self, run) -> None:
        result = run()
        assert result.returncode == 0
        places = [result.stdout.index(f"\n  {command} ") for command in COMMANDS]
        assert places == sorted(places)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, say, command: str) -> None:
        status, out, err = say(command, "--help")
        assert status == 0
        assert "Usage: " in out
        assert err == ""

    def test_the_console_script_is_installed(self) -> None:
        script = Path(sys.executable).parent / "convgen"
        if not script.exists():
            pytest.skip("convgen is not installed into this environment")
        result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout == f"convgen {__version__}\n"


MISTAKES = [
    ("genrate --kernel 3", "Did you mean 'generate'?"),
    ("frobnicate", "Commands: generate, export, verify"),
    ("--verison", "--version"),
    ("generate --kernal 3", "Did you mean '--kernel'?"),
    ("generate --kernel 3 --strid 2", "--stride"),
    ("generate", "'--kernel'"),
    ("generate --kernel", "'--kernel' requires an argument"),
    ("generate --kernel three", "'three' is neither an int nor ints as in 3,5,7"),
    ("generate --kernel 3,5", "give one int or 3"),
    ("generate --kernel 3,,5", "'3,,5' is neither an int nor ints"),
    ("generate --kernel 0", "every value must be at least 1"),
    ("generate --kernel 3 --stride 0", "every value must be at least 1"),
    ("generate --kernel 3 --padding same", "conv_transpose3d takes an int or 3 ints"),
    ("generate --kernel 3 --padding full", "nor 'same', nor 'valid'"),
    (
        "generate --kernel 3 --output-padding 1",
        "must be smaller than either stride 1 or dilation 1",
    ),
    ("generate --kernel 3 --groups 4 --in-channels 6", "not divisible by groups=4"),
    ("generate --kernel 3 --groups x", "'x' is not a valid integer"),
    ("generate --kernel 3 --op conv4d", "'conv3d'"),
    ("generate --kernel 3 --dtype f8", "choose from f32, f64, f16, bf16"),
    ("generate --kernel 3 --dtype ,", "--dtype"),
    ("generate --kernel 3 --backend gpu", "'cuda'"),
    ("generate --kernel 3 --backend cpu --arch 90a", "--arch is for"),
    ("generate --kernel 3 --name 3d", "is not an identifier"),
    ("generate --kernel 3 --name a.b", "is not an identifier"),
    ("generate --kernel 3 --name class", "is a keyword of Python"),
    ("generate --kernel 3 --name torch", "would hide the package torch"),
    ("generate --kernel 3 --out file", "file"),
    ("generate --kernel 3 --out file/below", "file"),
    ("generate --kernel 3 --out /proc/convgen", "cannot write to /proc/convgen"),
    ("generate --kernel 3 extra", "extra"),
    ("generate --kernel 3 --name json", "is Python's own"),
    ("generate --kernel 3 --name \ufb01lter", "is 'filter' to Python"),
    ("list extra", "extra"),
    ("show", "MODULE"),
    ("show nothing", "no module 'nothing' in generated"),
    ("show plain", "plain is not a generated module"),
    ("verify", "run convgen generate first"),
    ("verify nothing", "no module 'nothing' in generated"),
    ("clean", "--cache, --generated, --unused-days N, or names of modules"),
    ("clean plain --yes", "plain is not a generated module"),
]


class TestMistakes:
    @pytest.mark.parametrize(("command", "hint"), MISTAKES, ids=[row[0] for row in MISTAKES])
    def test_is_one_line_with_status_2_and_nothing_written(
        self, say, tmp_path: Path, command: str, hint: str
    ) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "plain").mkdir()
        status, out, err = say(*command.split())
        assert status == 2, err
        assert out == ""
        assert hint in err
        assert err.count("\n") == 1, err
        assert err.startswith("convgen")
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "plain"]

    def test_an_empty_list_of_dtypes_is_a_mistake(self, run) -> None:
        result = run("generate", "--kernel", "3", "--dtype", "")
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("python -m convgen")

    def test_of_a_folder_without_permission(self, run, tmp_path: Path) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        locked = tmp_path / "locked"
        locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        result = run("generate", "--kernel", "3", "--out", "locked/out")
        assert result.returncode == 2
        assert "cannot write to locked/out: Permission denied" in result.stderr


class TestGenerate:
    def test_prints_the_line_that_imports_the_module(self, run, tmp_path: Path) -> None:
        result = run(*SMALL)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "from generated.conv1d_k3 import Conv1d\n"
        program = result.stdout + (
            "import torch\n"
            "layer = Conv1d(2, 3)\n"
            "y = layer(torch.randn(1, 2, 9))\n"
            "y.sum().backward()\n"
            "print(tuple(y.shape), tuple(layer.weight.grad.shape))\n"
        )
        used = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert used.stdout == "(1, 3, 7) (3, 2, 3)\n", used.stderr

    def test_reports_each_step_as_a_plain_line(self, run, tmp_path: Path) -> None:
        result = run(*SMALL, CONVGEN_CACHE_DIR=str(tmp_path / "cold"))
        lines = result.stderr.splitlines()
        assert [line.split("]")[0] for line in lines[:-1]] == [f"[{n}/4" for n in range(5)]
        assert re.fullmatch(
            r"generated/conv1d_k3: cpu \(f32\), compiled in [0-9.]+ s", lines[-1]
        ), result.stderr

    def test_shows_a_bar_on_a_terminal(self, tmp_path: Path) -> None:
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "convgen", *SMALL],
            cwd=tmp_path,
            env={**os.environ, "CONVGEN_CACHE_DIR": str(tmp_path / "cold"), "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=follower,
        )
        os.close(follower)
        shown = b""
        try:
            while block := os.read(leader, 4096):
                shown += block
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(leader)
        assert process.wait() == 0
        text = shown.decode()
        assert "━" in text
        assert "4/4" in text
        assert "[4/4]" not in text
        assert text.endswith("from generated.conv1d_k3 import Conv1d\r\n")

    def test_a_warm_one_is_quick_and_imports_no_torch(
        self, run, cache: Path, tmp_path: Path
    ) -> None:
        assert run(*SMALL).returncode == 0
        # By the speed of this machine; torch's import takes 15 times what these do.
        imports = [sys.executable, "-c", "import click, jinja2"]
        assert cpu_seconds(lambda: run(*SMALL)) < 10 * cpu_seconds(
            lambda: subprocess.run(imports, check=True)
        )
        result = run(*SMALL)
        assert "found in the cache" in result.stderr
        traced = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "convgen", *SMALL],
            cwd=tmp_path,
            env={**os.environ, "CONVGEN_CACHE_DIR": str(cache), "CONVGEN_NO_BUILD": "1"},
            capture_output=True,
            text=True,
        )
        assert traced.returncode == 0, traced.stderr
        assert not imported(traced.stderr) & {"torch", "rich", "numpy"}

    def test_writes_where_and_under_the_name_that_it_is_told(self, run, tmp_path: Path) -> None:
        result = run(*SMALL, "--out", "net/layers", "--name", "stem")
        assert result.stdout == "from net.layers.stem import Conv1d\n"
        assert catalog.load(tmp_path / "net/layers/stem").built == ("cpu",)

    def test_replaces_its_own_but_nothing_else(self, run, tmp_path: Path) -> None:
        assert run(*SMALL).returncode == 0
        assert run(*SMALL).returncode == 0
        mine = tmp_path / "generated" / "stem"
        mine.mkdir()
        (mine / "thesis.txt").write_text("years of work")
        result = run(*SMALL, "--name", "stem")
        assert result.returncode == 2
        assert "is not a generated module" in result.stderr
        assert (mine / "thesis.txt").read_text() == "years of work"

    def test_refuses_what_would_lose_a_users_work_or_another_module(
        self, run, tmp_path: Path
    ) -> None:
        assert run(*SMALL).returncode == 0
        module = tmp_path / "generated" / "conv1d_k3"
        named = run(*SMALL, "--dilation", "2", "--name", "conv1d_k3", CONVGEN_NO_BUILD="1")
        assert named.returncode == 2
        assert "another specification (convgen generate --op conv1d --kernel 3)" in named.stderr
        source = module / "src" / "cpu" / "fprop_f32.cpp"
        source.write_text(source.read_text() + "// mine\n")
        again = run(*SMALL)
        assert again.returncode == 1
        assert "changed since (src/cpu/fprop_f32.cpp): move it away" in again.stderr
        assert run("clean", "conv1d_k3", "--yes").returncode == 2
        assert source.read_text().endswith("// mine\n")

    def test_lists_of_dtypes_may_be_repeated_or_separated(self, run, tmp_path: Path) -> None:
        result = run(*SMALL, "--dtype", "float64,double", "--dtype", "f32")
        assert result.returncode == 0, result.stderr
        assert catalog.load(tmp_path / "generated/conv1d_k3").dtypes == {"cpu": ("f32", "f64")}

    def test_a_compiler_that_fails_is_shown_with_the_log_and_no_traceback(
        self, run, tmp_path: Path
    ) -> None:
        compiler = tmp_path / "broken-g++"
        compiler.write_text(
            "#!/bin/sh\n"
            'case "$*" in *" -c "*) echo "oops.cpp:1:1: error: out of order" >&2; exit 1;; esac\n'
            'exec g++ "$@"\n'
        )
        compiler.chmod(0o755)
        result = run(*SMALL, CXX=str(compiler), CONVGEN_CACHE_DIR=str(tmp_path / "cold"))
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert "out of order" in result.stderr
        log = re.search(r"log: (\S+)", result.stderr)
        assert log is not None, result.stderr
        assert "out of order" in Path(log[1]).read_text()
        assert not (tmp_path / "generated").exists()

    def test_a_missing_compiler_says_what_to_install(self, run, tmp_path: Path) -> None:
        result = run(*SMALL, CXX="/nonexistent/g++")
        assert result.returncode == 1
        assert "CXX='/nonexistent/g++' does not serve" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_forbidden_to_compile_says_so(self, run, tmp_path: Path) -> None:
        result = run(*SMALL, CONVGEN_NO_BUILD="1", CONVGEN_CACHE_DIR=str(tmp_path / "cold"))
        assert result.returncode == 1
        assert "CONVGEN_NO_BUILD" in result.stderr
        assert "Traceback" not in result.stderr


class TestModules:
    @pytest.fixture
    def folder(self, run, tmp_path: Path) -> Path:
        assert run(*SMALL).returncode == 0
        return tmp_path / "generated"

    def test_list(self, run, folder: Path) -> None:
        assert run("list").stdout.splitlines() == [
            "module     built for  command",
            "conv1d_k3  cpu (f32)  convgen generate --op conv1d --kernel 3",
            "",
        ]

    def test_list_as_json(self, run, folder: Path) -> None:
        (listed,) = json.loads(run("list", "--json").stdout)
        assert listed["name"] == "conv1d_k3"
        assert listed["built"] == ["cpu"]
        assert json.loads(run("list", "--json", "--in", "elsewhere").stdout) == []

    def test_list_of_nothing_says_what_to_do(self, run) -> None:
        result = run("list")
        assert result.returncode == 0
        assert result.stdout == ""
        assert "run convgen generate first" in result.stderr

    @pytest.mark.parametrize("module", ["conv1d_k3", "generated/conv1d_k3"])
    def test_show_by_name_and_path(self, run, folder: Path, module: str) -> None:
        result = run("show", module)
        assert result.returncode == 0, result.stderr
        for expected in (
            "from generated.conv1d_k3 import Conv1d",
            "weight[2] x[q - 2] + weight[1] x[q - 1] + weight[0] x[q]",
            "src/cpu/fprop_f32.cpp",
            "lib/cpu.so",
        ):
            assert expected in result.stdout

    def test_show_as_json_names_every_file(self, run, folder: Path) -> None:
        shown = json.loads(run("show", "conv1d_k3", "--json").stdout)
        assert ConvSpec.from_dict(shown["spec"]) == ConvSpec("conv1d", 3)
        assert shown["phases"] == {"W": [{"residue": 0, "taps": [[2, -2], [1, -1], [0, 0]]}]}
        assert [kernel["contraction"] for kernel in shown["kernels"]["cpu"]] == [
            *("fprop", "dgrad", "wgrad")
        ]
        for path, size_bytes in shown["files"].items():
            assert (folder / "conv1d_k3" / path).stat().st_size == size_bytes

    def test_clean_asks_and_without_a_terminal_refuses(self, run, folder: Path) -> None:
        result = run("clean", "--generated")
        assert result.returncode == 2
        assert "add --yes" in result.stderr
        assert (folder / "conv1d_k3").exists()

    def test_clean_deletes_generated_modules_alone(self, run, folder: Path) -> None:
        (folder / "notes").mkdir()
        (folder / "notes" / "spec.json").write_text("{}")
        (folder / "notes.txt").touch()
        assert run("clean", "--generated", "--yes").returncode == 0
        assert sorted(path.name for path in folder.iterdir()) == ["notes", "notes.txt"]

    def test_clean_keeps_a_module_with_files_of_the_user(self, run, folder: Path) -> None:
        (folder / "conv1d_k3" / "train.py").touch()
        result = run("clean", "conv1d_k3", "--yes")
        assert result.returncode == 2
        assert "move train.py first" in result.stderr
        assert (folder / "conv1d_k3" / "spec.json").exists()

    def test_clean_of_the_cache(self, run, folder: Path, tmp_path: Path) -> None:
        own = {"CONVGEN_CACHE_DIR": str(tmp_path / "own")}
        assert run(*SMALL, **own).returncode == 0
        result = run("clean", "--cache", "--yes", **own)
        assert "Deleted 1 package of the cache" in result.stderr
        assert run(*SMALL, **own, CONVGEN_NO_BUILD="1").returncode == 1
        assert (folder / "conv1d_k3").exists()


class TestVerify:
    def test_prints_a_table_of_errors_and_limits(self, run) -> None:
        assert run(*SMALL).returncode == 0
        result = run("verify", "--quick")
        assert result.returncode == 0, result.stderr
        for quantity in ("forward", "grad input", "grad weight", "grad bias", "grad grad input"):
            assert re.search(
                rf"^cpu f32  {quantity} +\d+ +\d\.\de[-+]\d+ +\d\.\de[-+]\d+ +1e-05  ok$",
                result.stdout,
                re.MULTILINE,
            ), result.stdout

    def test_all_prints_every_shape(self, run, say) -> None:
        assert run(*SMALL).returncode == 0
        status, out, _ = say("verify", "conv1d_k3", "--quick", "--all")
        assert status == 0
        shapes = set(re.findall(r"\dx\d+x\d+ -> \d+", out))
        assert len(shapes) > 1

    def test_wrong_kernels_fail_with_status_1(self, run, tmp_path: Path) -> None:
        assert run(*SMALL).returncode == 0
        assert run(*SMALL, "--dilation", "2").returncode == 0
        folder = tmp_path / "generated"
        for file in ("lib/cpu.so", "lib/cpu.so.sha256"):
            (folder / "conv1d_k3" / file).write_bytes((folder / "conv1d_k3_d2" / file).read_bytes())
        # In a process of its own: this one may have loaded the right ones.
        result = run("verify", "--quick")
        assert result.returncode == 1
        assert re.search(r"^cpu f32  forward .* FAILED$", result.stdout, re.MULTILINE)
        assert result.stderr.splitlines()[-1].endswith("conv1d_k3 failed.")

    @pytest.mark.long
    def test_a_module_that_cannot_run_says_why(self, run, tmp_path: Path) -> None:
        assert run(*SMALL).returncode == 0
        library = tmp_path / "generated" / "conv1d_k3" / "lib" / "cpu.so"
        library.write_bytes(b"truncated")
        damaged = run("verify")
        assert damaged.returncode == 1
        assert "cannot be loaded" in damaged.stderr
        assert "Traceback" not in damaged.stderr
        library.unlink()
        missing = run("verify")
        assert missing.returncode == 1
        assert "Traceback" not in missing.stderr


class TestDoctor:
    def test_says_what_was_found(self, run) -> None:
        result = run("doctor")
        assert result.returncode == 0, result.stdout
        for expected in ("Python", "PyTorch", "ninja", "C++ compiler", "CUDA compiler", "Cache"):
            assert re.search(rf"^{re.escape(expected)} +\S", result.stdout, re.MULTILINE)

    def test_says_what_to_install_for_what_is_missing(self, run) -> None:
        result = run("doctor", CXX="/nonexistent/g++")
        assert result.returncode == 1
        assert "/nonexistent/g++" in result.stdout

    def test_as_json(self, run) -> None:
        findings = json.loads(run("doctor", "--json").stdout)
        assert {"what", "found", "advice", "needed"} == findings[0].keys()

    def test_imports_no_torch(self, cache: Path) -> None:
        result = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "convgen", "doctor"],
            env={**os.environ, "CONVGEN_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
        )
        assert "torch" not in imported(result.stderr)

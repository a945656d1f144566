"""Finding compilers, GPU architectures and ninja; reading what ptxas says."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from convgen.building import gpus, toolchain
from convgen.building.build import Library, build
from convgen.building.toolchain import (
    Commands,
    CudaCompiler,
    ToolchainError,
    default_architectures,
    find_cpp,
    find_cuda,
    find_ninja,
    parse_architecture,
    ptxas_resources,
)

VARIABLES = ("CXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CONVGEN_NO_BUILD", raising=False)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without nvcc, for tests that put their own somewhere."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "_STANDARD_FOLDERS", ())
    monkeypatch.setattr(toolchain, "_STANDARD_NVCC", "/nonexistent/nvcc")
    monkeypatch.setattr(toolchain, "_wheel_roots", list)
    monkeypatch.setattr(gpus, "nvml", lambda: gpus.Nvml(None, ()))
    if toolchain.shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("nvcc lies in /usr/bin beside the C++ compiler")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(home: Path, release: str = "13.0", archs: str = "75 80 90 120") -> str:
    listed = "; ".join(f"echo compute_{arch}" for arch in archs.split())
    version = f"Cuda compilation tools, release {release}, V{release}.1"
    return str(
        script(
            home / "bin" / "nvcc",
            f'case "$1" in --version) echo "{version}";; --list-gpu-arch) {listed};; esac',
        )
    )


class TestCpp:
    def test_is_found_with_its_version_and_compiles_openmp_and_cpp17(self) -> None:
        compiler = find_cpp()
        assert Path(compiler.path).is_absolute()
        assert any(character.isdigit() for character in compiler.version)
        files = {
            "src/cpu/threads.cpp": "#include <omp.h>\n"
            "template <bool B> int f() { if constexpr (B) return omp_get_max_threads(); }\n"
            'extern "C" __attribute__((visibility("default"))) int threads() {\n'
            "  int n = 0;\n  #pragma omp parallel reduction(+ : n)\n  n += 1;\n"
            "  return n == f<true>();\n}\n"
        }
        package = build("x", files, [Library("lib/cpu.so", tuple(files), compiler.commands())])
        assert ctypes.CDLL(str(package / "lib/cpu.so")).threads() == 1

    def test_is_found_with_an_empty_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert Path(find_cpp().path).exists()
        monkeypatch.delenv("PATH")
        assert Path(find_cpp().path).exists()

    def test_cxx_is_preferred(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = script(tmp_path / "my-g++", f'exec {find_cpp().path} "$@"')
        monkeypatch.setenv("CXX", str(mine))
        assert find_cpp().path == str(mine)

    def test_cxx_may_have_a_launcher_and_flags(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = find_cpp().path
        launcher = script(tmp_path / "launcher", 'exec "$@"')
        monkeypatch.setenv("CXX", f"{launcher} {Path(real).name} -DX=1")
        compiler = find_cpp()
        assert compiler.command == (str(launcher), real, "-DX=1")
        assert compiler.path == real

    @pytest.mark.parametrize(
        ("cxx", "why"),
        [("/nonexistent/g++", "was not found"), ("false", "failed"), ('"', "No closing quotation")],
    )
    def test_a_cxx_that_does_not_serve_is_an_error_and_not_passed_over(
        self, monkeypatch: pytest.MonkeyPatch, cxx: str, why: str
    ) -> None:
        monkeypatch.setenv("CXX", cxx)
        with pytest.raises(ToolchainError, match=f"does not serve: .*{why}"):
            find_cpp()

    def test_one_without_openmp_is_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = find_cpp().path
        poor = 'case "$*" in *fopenmp*) echo "fatal error: omp.h: No such file" >&2; exit 1;; esac'
        script(tmp_path / "c++", f'{poor}; exec {real} "$@"')
        script(tmp_path / "g++", f'exec {real} "$@"')
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_cpp().path == str(tmp_path / "g++")
        for name in ("g++", "clang++"):
            (tmp_path / name).unlink(missing_ok=True)
        monkeypatch.setattr(toolchain, "_STANDARD_FOLDERS", ())
        with pytest.raises(ToolchainError, match=r"omp\.h.*apt install g\+\+"):
            find_cpp()

    def test_none_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(toolchain, "_STANDARD_FOLDERS", ())
        with pytest.raises(ToolchainError, match=r"apt install g\+\+"):
            find_cpp()

    def test_identity_moves_with_version_native_target_and_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = find_cpp().path
        mine = script(tmp_path / "g++", f'exec {real} "$@"')
        monkeypatch.setenv("CXX", str(mine))
        identities = {find_cpp().commands().identity}

        def changed(text: str) -> None:
            toolchain._output.cache_clear()
            script(mine, text)
            identities.add(find_cpp().commands().identity)

        changed(f'[ "$1" = --version ] && echo "g++ 99" || exec {real} "$@"')
        changed(f'[ "$1" = --version ] && exec {real} "$@"; exec {real} -D__NEW_ISA__ "$@"')
        script(mine, f'exec {real} "$@"')
        toolchain._output.cache_clear()
        monkeypatch.setenv("CPATH", "/opt/include")
        identities.add(find_cpp().commands().identity)
        assert len(identities) == 4

    def test_native_is_spelled_as_the_compiler_spells_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "-march=native" in toolchain.CPP_FLAGS
        lenient = script(tmp_path / "g++", "echo '#define _OPENMP 201511'")
        monkeypatch.setenv("CXX", str(lenient))
        for machine, flag in (("x86_64", "-march=native"), ("aarch64", "-mcpu=native")):
            monkeypatch.setattr(toolchain.platform, "machine", lambda name=machine: name)
            flags = find_cpp().flags
            assert [word for word in flags if "native" in word] == [flag]


class TestCuda:
    def test_a_toolkit_is_preferred_to_the_wheels(
        self, no_nvcc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheels = tmp_path / "nvidia" / "cu13"
        (wheels / "lib").mkdir(parents=True)
        (wheels / "lib" / "libcudart_static.a").touch()
        expected = [fake_nvcc(wheels)]
        monkeypatch.setattr(toolchain, "_wheel_roots", lambda: [wheels])
        assert find_cuda().path == expected[-1]
        assert find_cuda().library_folder == str(wheels / "lib")

        expected.append(fake_nvcc(tmp_path / "standard"))
        monkeypatch.setattr(toolchain, "_STANDARD_NVCC", expected[-1])
        assert find_cuda().path == expected[-1]
        assert find_cuda().library_folder is None

        expected.append(fake_nvcc(tmp_path / "path"))
        monkeypatch.setenv("PATH", f"{tmp_path}/path/bin:/usr/bin:/bin")
        assert find_cuda().path == expected[-1]

        for variable in ("CUDA_PATH", "CUDA_HOME"):
            expected.append(fake_nvcc(tmp_path / variable))
            monkeypatch.setenv(variable, str(tmp_path / variable))
            assert find_cuda().path == expected[-1]

    def test_a_cuda_home_inside_the_wheels_is_served_like_the_wheels(
        self, no_nvcc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_nvcc(tmp_path)
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libcudart_static.a").touch()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert find_cuda().library_folder == str(tmp_path / "lib")
        assert f"-L{tmp_path}/lib" in find_cuda().commands(("80",)).link_libraries

    @pytest.mark.parametrize(
        ("broken", "why"),
        [
            ("exit 1", "failed"),
            ("echo 'release 11.8, V11.8.89'", "release 11.8, and 12.0 is the oldest"),
            ("echo hello", "names no release"),
            (
                '[ "$1" = --version ] && echo "release 12.0, V12.0.1" && exit 0; '
                'echo "error: -- unsupported GNU version!" >&2; exit 1',
                "unsupported GNU version",
            ),
        ],
    )
    def test_one_that_does_not_work_is_passed_over(
        self,
        no_nvcc: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        broken: str,
        why: str,
    ) -> None:
        script(tmp_path / "home" / "bin" / "nvcc", broken)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        with pytest.raises(ToolchainError, match=f"{why}.*pip install"):
            find_cuda()
        working = fake_nvcc(tmp_path / "standard")
        monkeypatch.setattr(toolchain, "_STANDARD_NVCC", working)
        assert find_cuda().path == working

    def test_one_that_the_driver_is_too_old_for_serves_if_there_is_no_other(
        self, no_nvcc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpus, "nvml", lambda: gpus.Nvml((12, 8), ((9, 0),)))
        newer = fake_nvcc(tmp_path / "newer", release="13.0")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "newer"))
        assert find_cuda().path == newer
        fitting = fake_nvcc(tmp_path / "fitting", release="12.9")
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "fitting"))
        assert find_cuda().path == fitting

    def test_none_says_what_to_install(self, no_nvcc: None) -> None:
        with pytest.raises(ToolchainError, match=r'pip install "cuda-toolkit\[nvcc,cccl\]'):
            find_cuda()

    def test_that_it_works_is_remembered(
        self, no_nvcc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = tmp_path / "calls"
        script(
            tmp_path / "bin" / "nvcc",
            f'echo "$*" >> {calls}; [ "$1" = --version ] && echo "release 13.0, V13.0.1"; exit 0',
        )
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        for _ in range(2):
            toolchain._output.cache_clear()
            find_cuda()
        assert sum("cuda_runtime" in line or "-E" in line for line in calls.open()) == 1

    def test_the_host_compiler_can_be_chosen(
        self, no_nvcc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_nvcc(tmp_path)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert find_cuda().host == find_cpp().path
        mine = script(tmp_path / "my-g++", "echo my compiler 1.0")
        monkeypatch.setenv("NVCC_CCBIN", str(mine))
        assert find_cuda().host == str(mine)
        assert find_cuda().commands(("80",)).compile[1:3] == ("-ccbin", str(mine))
        assert "my compiler 1.0" in find_cuda().commands(("80",)).identity
        monkeypatch.setenv("CUDAHOSTCXX", "/nonexistent/g++")
        with pytest.raises(ToolchainError, match="CUDAHOSTCXX"):
            find_cuda()


KERNEL = """
#include <cuda_runtime.h>
__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
extern "C" __attribute__((visibility("default"))) int devices() {
  int count = 0;
  twice<<<1, 0>>>(nullptr);
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : -1;
}
"""


def build_kernel(commands: Commands) -> Path:
    files = {"src/cuda/twice.cu": KERNEL}
    return build("x", files, [Library("lib/cuda.so", tuple(files), commands)])


class TestWheels:
    @pytest.fixture(autouse=True)
    def wheels(self) -> None:
        if not toolchain._wheel_roots():
            pytest.skip("the pip wheels of the CUDA compiler are not installed")

    def test_compile_and_link_with_an_empty_environment(self, tmp_path: Path) -> None:
        code = (
            "from convgen.building import toolchain\n"
            "toolchain._STANDARD_NVCC = '/nonexistent'\n"
            "toolchain._STANDARD_FOLDERS = ('/usr/bin', '/bin')\n"
            "from tests.building.test_toolchain import build_kernel\n"
            "nvcc = toolchain.find_cuda()\n"
            "print(nvcc.path)\n"
            "print(build_kernel(nvcc.commands(('90a',))))\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={"CONVGEN_CACHE_DIR": str(tmp_path / "cache"), "PATH": ""},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        nvcc, package = result.stdout.splitlines()
        assert "/nvidia/cu" in nvcc
        library = Path(package) / "lib" / "cuda.so"
        assert ctypes.CDLL(str(library)).devices() in range(-1, 64)
        log = (Path(package).parent / "build.log").read_text()
        assert [kernel.kernel for kernel in ptxas_resources(log)] == ["twice"]

    def test_the_runtime_is_linked_in_and_not_exported(self) -> None:
        library = build_kernel(find_cuda().commands(("80+ptx",))) / "lib" / "cuda.so"
        needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout
        assert "libcudart" not in needed
        exported = subprocess.run(
            ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True
        ).stdout
        assert [line.split()[-1] for line in exported.splitlines()] == ["devices"]


class TestArchitectures:
    @pytest.mark.parametrize(
        ("given", "canonical"),
        [
            ("90a", "90a"),
            ("sm_90a", "90a"),
            ("SM90", "90"),
            ("8.0", "80"),
            ("80+ptx", "80+ptx"),
            ("8.6+PTX", "86+ptx"),
            ("sm_120a", "120a"),
            ("10.3", "103"),
            (" 100f ", "100f"),
        ],
    )
    def test_are_accepted_in_the_usual_forms(self, given: str, canonical: str) -> None:
        assert parse_architecture(given) == canonical

    @pytest.mark.parametrize(
        "given", ["", "hopper", "9", "90b", "90a+", "native", "1200", "80 ptx"]
    )
    def test_that_are_none_say_what_is(self, given: str) -> None:
        with pytest.raises(ToolchainError, match="give compute capabilities such as"):
            parse_architecture(given)

    def test_that_are_too_old_or_do_not_exist_are_refused(self) -> None:
        with pytest.raises(ToolchainError, match=r"75 .* is the oldest"):
            parse_architecture("70")
        with pytest.raises(ToolchainError, match="does not exist: give 80"):
            parse_architecture("80a")

    @pytest.fixture
    def nvcc(self, tmp_path: Path) -> CudaCompiler:
        path = fake_nvcc(tmp_path / "toolkit")
        return CudaCompiler(path, "release 13.0", (13, 0), "/usr/bin/g++", "g++", None)

    def test_that_nvcc_lacks_are_named_with_what_it_has(self, nvcc: CudaCompiler) -> None:
        with pytest.raises(ToolchainError, match="for architecture 100a: it supports 75, 80, 90"):
            nvcc.check_architectures(["80", "100a"])

    def test_become_machine_code_and_ptx_only_where_asked(self, nvcc: CudaCompiler) -> None:
        checked = nvcc.check_architectures(["sm_90a", "9.0a", "80+ptx"])
        assert checked == ("90a", "80+ptx")
        assert [word for word in nvcc.commands(checked).compile if word.startswith("arch=")] == [
            "arch=compute_90a,code=sm_90a",
            "arch=compute_80,code=sm_80",
            "arch=compute_80,code=compute_80",
        ]

    def test_default_to_sm_80_and_its_ptx_without_a_gpu(
        self, nvcc: CudaCompiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpus, "gpu_architectures", tuple)
        assert default_architectures(nvcc) == ("80+ptx",)

    def test_default_to_the_gpus_present(
        self, nvcc: CudaCompiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpus, "gpu_architectures", lambda: ("80", "90a"))
        assert default_architectures(nvcc) == ("80", "90a")

    def test_a_gpu_newer_than_nvcc_gets_ptx_of_the_newest_that_nvcc_knows(
        self, nvcc: CudaCompiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpus, "gpu_architectures", lambda: ("90a", "130a"))
        assert default_architectures(nvcc) == ("90a", "120+ptx")


class TestNinja:
    def test_is_the_pip_package_even_if_path_is_empty(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ninja

        monkeypatch.setenv("PATH", "")
        assert find_ninja() == f"{ninja.BIN_DIR}/ninja"

    def test_of_the_path_serves_where_the_package_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = script(tmp_path / "ninja", "")
        monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_ninja() == str(mine)
        mine.unlink()
        monkeypatch.setattr(toolchain, "_STANDARD_FOLDERS", ())
        with pytest.raises(ToolchainError, match="pip install ninja"):
            find_ninja()


PTXAS = """\
[1/2] compile src/cuda/fprop_f32.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN12_GLOBAL__N_17convgen6gatherILi8EEEvPKf' for 'sm_90a'
ptxas info    : Function properties for _ZN12_GLOBAL__N_17convgen6gatherILi8EEEvPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compile time = 18.646 ms
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers
[2/2] link lib/cuda.so
"""


class TestPtxas:
    def test_reports_are_read(self) -> None:
        first, second = ptxas_resources(PTXAS)
        assert (first.kernel, first.architecture) == (
            "(anonymous namespace)::convgen::gather<8>",
            "sm_90a",
        )
        assert (first.registers, first.spills) == (128, False)
        assert (second.kernel, second.architecture, second.registers) == ("plain", "sm_80", 255)
        assert (second.stack_bytes, second.spill_store_bytes, second.spill_load_bytes) == (
            24,
            16,
            8,
        )
        assert second.spills

    def test_names_stay_mangled_without_a_demangler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*command: str, stdin: str = "") -> str:
            raise ToolchainError("c++filt does not run")

        monkeypatch.setattr(toolchain, "_run", missing)
        assert ptxas_resources(PTXAS)[0].kernel.startswith("_ZN12_GLOBAL__N_1")

    def test_a_log_without_reports_has_none(self) -> None:
        assert ptxas_resources("[1/1] compile src/cpu/fprop_f32.cpp\n") == []

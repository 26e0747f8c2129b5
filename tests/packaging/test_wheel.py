"""A wheel that was built here works where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from own_build import built, copy_of_sources, python_says
from small_policy import saved_run

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(1200),  # the kernels are compiled as a user's are
    pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux"),
]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, with its manylinux tag, and the source distribution."""
    folder = tmp_path_factory.mktemp("distributions")
    sources = folder / "sources"
    sources.mkdir()
    copy_of_sources(sources)
    plain = built("build_wheel", sources, folder / "plain", timeout=1200, ENTROPY_FAST_CUDA="off")
    python_says("-m", "auditwheel", "repair", "--wheel-dir", str(folder / "wheel"), str(plain), cwd=folder)
    (wheel,) = (folder / "wheel").iterdir()
    return wheel, built("build_sdist", sources, folder / "sdist")


@pytest.fixture(scope="module")
def clean(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; what it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("clean") / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(distributions[0])], check=True
    )
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    # After the environment's own folder on the path, so that the wheel's package is the one that is found.
    (Path(said) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def without_a_compiler(clean: Path, *arguments: str, cwd: Path) -> str:
    """Standard output of a program of the environment, with nothing else on the path."""
    environment = {"PATH": str(clean / "bin"), "HOME": str(cwd), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(clean / "bin" / arguments[0]), *arguments[1:]],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tag_and_what_is_inside(distributions: tuple[Path, Path]) -> None:
    wheel, _ = distributions
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert python == abi == f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert "manylinux" in platform and os.uname().machine in platform
    with zipfile.ZipFile(wheel) as archive:
        assert not [
            name for name in archive.namelist() if ".libs/" in name
        ]  # nothing of this machine's had to be taken in


def test_metadata_is_what_an_index_takes(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    said = python_says("-m", "twine", "check", "--strict", *map(str, distributions), cwd=tmp_path)
    assert said.count("PASSED") == 2


def test_compiled_kernels_run(clean: Path, tmp_path: Path) -> None:
    script = (
        "import shutil, entropy_fast; from entropy_fast import ops; "
        "print(entropy_fast.__file__, shutil.which('c++') or shutil.which('gcc') or shutil.which('cmake'), "
        "next(r.available for r in ops.backend_report() if r.name == 'native'))"
    )
    where, compiler, native = without_a_compiler(clean, "python", "-c", script, cwd=tmp_path).split()
    assert where.startswith(str(clean)) and compiler == "None" and native == "True"


def test_a_probe_runs(clean: Path, tmp_path: Path) -> None:
    run, out = saved_run(tmp_path / "run"), tmp_path / "out"
    probe = ("probe", str(run), "--out", str(out))
    said = without_a_compiler(clean, "python", "-m", "entropy_fast", *probe, cwd=tmp_path)
    assert "entropy" in said
    assert (out / "result.json").is_file()

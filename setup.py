"""Build of the compiled half: CMake and ninja turn ``csrc/`` into the extension module ``entropy_fast._native``.

Environment variables read here:

``ENTROPY_FAST_CUDA``
    ``auto`` (default): the CUDA kernels are built when there is a CUDA compiler; ``on``: it is an error if there is
    none; ``off``: they are left out. What was done, and why, is in ``entropy_fast._native.build_info()``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Besides the sources, what decides the outcome of a build. A changed value means a new build.
BUILD_VARIABLES = ("ENTROPY_FAST_CUDA", "CXX", "CXXFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDA_PATH")


class CMakeBuild(build_ext):
    """Builds the one extension with CMake. An unchanged one is not built again, as when only a Python file is new."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        built = build_folder / "module" / target.name
        fingerprint_file = build_folder / "fingerprint"
        fingerprint = self._fingerprint()
        if not (built.is_file() and fingerprint_file.is_file() and fingerprint_file.read_text() == fingerprint):
            fingerprint_file.unlink(missing_ok=True)
            self._run_cmake(build_folder, built.parent)
            fingerprint_file.write_text(fingerprint)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A copy beside the target, then a rename: writing into a library that a process has loaded would crash it.
        fresh = target.with_name(f".{target.name}.new")
        shutil.copy2(built, fresh)
        fresh.replace(target)

    def _run_cmake(self, build_folder: Path, module_folder: Path) -> None:
        import pybind11

        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake,
            # A compiler that was not found is cached as such, and would not be found after it has been installed.
            "--fresh",
            *("-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module_folder}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DENTROPY_FAST_VERSION={self.distribution.get_version()}",
            f"-DENTROPY_FAST_CUDA={os.environ.get('ENTROPY_FAST_CUDA', 'auto') or 'auto'}",
        ]
        ninja = shutil.which("ninja")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_folder)], check=True)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").rglob("*"))]
        for source in sources:
            if source.is_file():
                digest.update(str(source.relative_to(ROOT)).encode() + b"\0" + source.read_bytes() + b"\0")
        settings = [f"{name}={os.environ.get(name)}" for name in BUILD_VARIABLES]
        settings += [f"{tool}={shutil.which(tool)}" for tool in ("c++", "nvcc")]
        settings += [str(ROOT), str(self.distribution.get_version()), str(sysconfig.get_config_var("EXT_SUFFIX"))]
        digest.update("\0".join(settings).encode())
        return digest.hexdigest()


setup(
    packages=[*find_packages(include=["entropy_fast", "entropy_fast.*"]), "entropy_fast.kernels"],
    package_dir={"entropy_fast": "entropy_fast", "entropy_fast.kernels": "kernels/triton"},
    package_data={
        "entropy_fast": ["py.typed", "_native.pyi"],
        "entropy_fast.report.html": ["templates/*.html", "templates/*.css", "templates/sections/*.html"],
    },
    ext_modules=[Extension("entropy_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)

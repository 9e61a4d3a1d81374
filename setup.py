"""What is installed, and under which names: storm_kernels, and the folders model/ and benchmarks/
as storm_model and storm_benchmarks.

Builds the C++ library of the "cpu" backend on installation. Without a compiler the installation
still succeeds, without that backend.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FOLDERS = {"storm_model": "model", "storm_benchmarks": "benchmarks"}
CPU = Path(__file__).resolve().parent / "storm_kernels" / "backends" / "cpu"


def load_build_module():
    """storm_kernels/backends/cpu/build.py without importing the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("storm_cpu_build", CPU / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """Makes a plain shared library, loaded by ctypes, where setuptools would make a Python extension."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        builder = load_build_module()
        try:
            builder.build(Path(self.get_ext_fullpath(ext.name)))
        except builder.BuildError as error:
            print(f"storm_kernels: the cpu backend is left out: {error}", file=sys.stderr)


packages = find_packages(include=["storm_kernels", "storm_kernels.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(
    packages=packages,
    package_dir=FOLDERS,
    ext_modules=[Extension("storm_kernels.backends.cpu.libstorm_cpu", sources=[], optional=True)],
    package_data={
        "storm_kernels": ["py.typed"],
        "storm_kernels.backends.cpu": ["src/*.cpp", "src/*.h"],
        "storm_kernels.backends.cuda": ["src/*.cu", "src/*.cuh"],
        "storm_model": ["templates/*.jinja"],
        "storm_benchmarks.e2e": ["report.html.jinja"],
    },
    cmdclass={"build_ext": BuildLibrary},
)

"""Compiles mc_cli/native, and puts a line into site-packages. All else about the package is in pyproject.toml."""

import re
import sys
import tomllib
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class LibraryBuild(build_ext):
    """Builds libraries for ctypes: they are no Python modules, so one serves every Python, and exports no PyInit."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_suffix(".dll" if sys.platform == "win32" else ".so"))

    def get_export_symbols(self, ext):
        return ext.export_symbols


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BesidePackages(Distribution().get_command_class("install_data")):
    """Puts data files where packages go, also in an editable installation: Python reads .pth files nowhere else."""

    def finalize_options(self):
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()


def description():
    """README.md as package indexes show it, where no link of a repository leads anywhere.

    A link becomes the address of its file, if `[project.urls]` has a `Repository`, else its text and the file's name.
    """
    address = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {}).get("Repository")

    def outside(link):
        text, target = link.groups()
        if address is not None:
            return f"[{text}]({address}/blob/main/{target})"
        return target if text == target else f"{text} ({target})"

    return re.sub(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)", outside, (ROOT / "README.md").read_text("utf-8"))


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    data_files=[("", ["mixture_compressor.pth"])],
    ext_modules=[
        Extension(
            "mc_cli.native._library",
            sources=[
                f"mc_cli/native/{name}.c"
                for name in (
                    "trellis",
                    "trellis_product",
                    "affine_product",
                    "product",
                    "experts",
                    "pruning",
                    "threads",
                    "version",
                )
            ],
            libraries=["m"],
            depends=[f"mc_cli/native/{name}.h" for name in ("compiler", "product", "threads")],
            # Python asks for wrapping sums, which no routine here needs and which cost products a fifth of their speed
            extra_compile_args=["-O3", "-fno-wrapv", "-Wno-psabi", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,  # without a C compiler torch does their work, slower, and the stages say so
        )
    ],
    cmdclass={"build_ext": LibraryBuild, "bdist_wheel": PlatformWheel, "install_data": BesidePackages},
)

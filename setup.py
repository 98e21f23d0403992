"""Compiles mc_cli/native, and puts a line into site-packages. All else about the package is in pyproject.toml."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STARTUP = "mixture_compressor.pth"


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


class BuildStartup(Command):
    """Puts the line that Python runs when it starts beside the packages, where alone it is read."""

    user_options = ()
    editable_mode = False  # set by setuptools for `pip install -e`

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        # the packages of an editable installation stay where they are: what else it has goes into its wheel directly
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(folder)
        self.copy_file(STARTUP, folder)

    def get_source_files(self):
        return [STARTUP]

    def get_outputs(self):
        return [str(Path(self.build_lib, STARTUP))]

    def get_output_mapping(self):
        return dict(zip(self.get_outputs(), self.get_source_files(), strict=True))


class WholeBuild(build):
    """Python files, the library, and the line."""

    sub_commands = (*build.sub_commands, ("build_startup", None))


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


def native_sources():
    """mc_cli/native/sources.py, without the package around it, which needs what may not be installed yet."""
    spec = importlib.util.spec_from_file_location("native_sources", ROOT / "mc_cli" / "native" / "sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NATIVE = native_sources()
SOURCES = NATIVE.sources(ROOT / "mc_cli" / "native")


def relative(ending):
    """The sources with that ending, as setuptools takes them: relative to this file."""
    return [path.relative_to(ROOT).as_posix() for path in SOURCES if path.suffix == ending]


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            "mc_cli.native._library",
            sources=relative(".c"),
            libraries=["m"],
            define_macros=[("MC_VERSION", NATIVE.definition(NATIVE.source_version(ROOT / "mc_cli" / "native")))],
            depends=[*relative(".h"), "mc_cli/native/sources.py"],
            # Python asks for wrapping sums, which no routine here needs and which cost products a fifth of their speed
            extra_compile_args=[
                "-O3",
                "-fvisibility=hidden",
                "-fno-wrapv",
                "-Wno-psabi",
                "-fno-math-errno",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            optional=True,  # without a C compiler torch does their work, slower, and the stages say so
        )
    ],
    cmdclass={
        "build": WholeBuild,
        "build_ext": LibraryBuild,
        "build_startup": BuildStartup,
        "bdist_wheel": PlatformWheel,
    },
)

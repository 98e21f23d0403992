"""Compiles mc_cli/native. Everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class OptionalBuild(build_ext):
    """Goes on without the compiled routines where there is no C compiler: torch then does their work, slower."""

    def get_export_symbols(self, ext):
        return ext.export_symbols  # a library for ctypes, not a Python module: it has no PyInit function


setup(
    ext_modules=[
        Extension(
            "mc_cli.native._library",
            sources=["mc_cli/native/trellis.c", "mc_cli/native/trellis_product.c"],
            extra_compile_args=["-O3", "-Wno-psabi", "-fno-math-errno"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
)

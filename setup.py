"""Compiles mc_cli/native. Everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class LibraryBuild(build_ext):
    """Builds libraries for ctypes: they are no Python modules, so there is no PyInit function to export."""

    def get_export_symbols(self, ext):
        return ext.export_symbols


setup(
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
    cmdclass={"build_ext": LibraryBuild},
)

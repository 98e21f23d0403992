"""`transformers serve` for packed models: on a GPU where torch finds one, and for whatever name a client sends."""

from __future__ import annotations

import sys
from typing import Any

import mc_cli  # noqa: F401  registers the packed format


def main() -> None:
    """Runs transformers' own command with the arguments of this process."""
    import torch
    from transformers.cli.serving import server
    from transformers.cli.transformers import main as transformers

    from mc_cli.serving.any_name import AnyName

    build = server.build_server

    def build_for_any_name(*arguments: Any, **options: Any) -> Any:
        app = build(*arguments, **options)
        app.add_middleware(AnyName)
        return app

    server.build_server = build_for_any_name
    sys.argv[0] = "transformers"
    if not any(argument.split("=")[0] == "--device" for argument in sys.argv):
        sys.argv += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    transformers()


if __name__ == "__main__":
    main()

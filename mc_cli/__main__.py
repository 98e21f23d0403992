"""`python -m mc_cli`, and what the command mc-cli runs."""

import sys


def main() -> None:
    """Runs the command line, and exits with its status; Ctrl-C while it is still being imported is one line too."""
    try:
        from mc_cli.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

"""`python -m mc_cli`: the command line, where the command mc-cli is not on the path."""

from mc_cli.cli import main

if __name__ == "__main__":
    main()

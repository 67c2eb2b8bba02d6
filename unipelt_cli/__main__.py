"""Run the command line as `python -m unipelt_cli`."""

from unipelt_cli.cli import main

main()

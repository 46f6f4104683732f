"""`python -m lpt_fast`: the command line, for torchrun."""

from .cli.main import main

main()

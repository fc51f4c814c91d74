"""`python -m featherweight` is the `featherweight` command."""

from featherweight.cli import main

main()

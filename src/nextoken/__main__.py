"""`python -m nextoken` is the command `nextoken`."""

from nextoken.app.cli import main

main()

"""What a user gave is wrong: the one exception that scripts turn into a clear line and exit status 2, and a parser
that ends likewise."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """Something the user gave is wrong: the message names it, what was expected, and what to do."""


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose error is one line, without the usage of fifty flags above it."""

    def error(self, message: str) -> NoReturn:
        """End the process with exit status 2."""
        self.exit(2, f"error: {' '.join(message.split())} ({self._command()} --help explains every flag)\n")

    def _command(self) -> str:
        return self.prog if self.prog.startswith("python ") else f"python {self.prog}"


class RaisingParser(OneLineParser):
    """The same for a caller in Python: an error is a UserError, and the process goes on."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(" ".join(message.split()))

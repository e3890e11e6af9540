"""What a user gave is wrong: the one exception that scripts turn into a clear line and exit status 2, and a parser
that raises it."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """Something the user gave is wrong: the message names it, what was expected, and what to do."""


def one_line(error: Exception, most: int | None = None) -> str:
    """What an exception says, in one line, cut after `most` characters; its kind when it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose error is one line, without the usage of fifty flags above it."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        command = f"python {self.prog.removeprefix('python ')}"
        raise UserError(f"{' '.join(message.split())} ({command} --help explains the flags)")

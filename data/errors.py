"""The one exception that the scripts turn into a single clear line and exit status 2."""


class UserError(Exception):
    """Something the user gave is wrong: the message names it, what was expected, and what to do."""

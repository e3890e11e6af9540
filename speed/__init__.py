"""Speed: a plain reference loop, our path and the machine's limit on the same work; see `python -m speed --help`."""

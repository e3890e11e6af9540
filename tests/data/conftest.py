"""Running data.prepare in a test."""

import pytest

from data.prepare import main
from engine.errors import UserError


@pytest.fixture
def prepare(tmp_path, capsys):
    """Run the command with --out in the test's folder; returns what it printed, or the one error line it ended with."""

    def run(name: str, *options: object, fails: bool = False) -> str:
        words = [name, "--out", str(tmp_path / "out"), *map(str, options)]
        if not fails:
            main(words)
            return capsys.readouterr().out
        with pytest.raises((UserError, OSError)) as ended:
            main(words)
        assert "\n" not in str(ended.value)
        return str(ended.value)

    return run

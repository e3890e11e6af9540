"""What the command lines load before they know what they are asked."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

HEAVY = ("torchvision", "timm", "matplotlib", "sklearn", "torch._dynamo")
LOADED = f"\nimport sys\nprint('loaded', *(name for name in {HEAVY} if name in sys.modules))"
HELP = """
import sys
sys.argv = ["{script}.py", "--help"]
from {script} import main
try:
    main()
except SystemExit:
    pass
"""
SCRIPTS = ("transferLearning", "metaLearning", "associative_alignment", "predict", "reproduce")


@pytest.mark.parametrize(
    "code",
    ["import args_parser", *(HELP.format(script=script) for script in SCRIPTS)],
    ids=["import args_parser", *SCRIPTS],
)
def test_no_optional_or_slow_library_is_loaded_to_parse_flags(code):
    done = subprocess.run([sys.executable, "-c", code + LOADED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"

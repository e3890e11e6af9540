"""README.md, docs/ and the other pages agree with the repository: links, names, flags, pictures, formulas."""

import ast
import importlib.util
import re

import matplotlib.mathtext
import pytest

from tests.helpers import ROOT

PAGES = [*(ROOT / name for name in ("README.md", "SECURITY.md", "fs_benchmarks/README.md", "results/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SOURCES = [path for path in ROOT.glob("**/*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "tests")]
# Flags of torchrun, ruff and tensorboard.
FOREIGN = {"--standalone", "--nproc_per_node", "--check", "--logdir", "--help"}


def ids(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


def links(page):
    """(text, target, anchor) of each link of a page to a file of the repository, or to itself."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\[([^\]]*)\]\(([^)#\s]*)#?([^)\s]*)\)", prose)
    return [link for link in found if not link[1].startswith("http")]


def anchors(page):
    """The anchor that GitHub gives each heading."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in(path):
    """Functions and classes of a file, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            below = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {node.name, *(f"{node.name}.{each.name}" for each in below)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_to_files_and_to_the_functions_that_they_name(page):
    for text, target, anchor in links(page):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{target}#{anchor}: no such heading"
        if text.startswith("`") and file.suffix == ".py":
            assert text.strip("`") in names_in(file), f"{text} is not in {target}"


def test_every_picture_is_on_a_page():
    shown = {(page.parent / target).resolve() for page in PAGES for _, target, _ in links(page)}
    assert {path for path in (ROOT / "docs").iterdir() if path.suffix == ".png"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_the_files_and_modules_that_a_page_names_are_there(page):
    text = page.read_text()
    files = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text)) | set(re.findall(r"python (\w+\.py)", text))
    modules = set(re.findall(r"python -m ((?!pytest|venv)[\w.]+\w)", text))
    assert not [name for name in files if not (ROOT / name).is_file()]
    assert not [name for name in modules if not importlib.util.find_spec(name)]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_flag_on_a_page_is_a_flag(page):
    # Tables of flags have them with and without dashes.
    ours = {f"--{name}" for path in SOURCES for name in re.findall(r'"(?:--)?(\w+)', path.read_text())}
    text = re.sub(r"^#SBATCH.*$", "", page.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*", text, re.IGNORECASE)) <= ours | FOREIGN


def test_the_files_of_the_map_are_in_their_rooms():
    rooms = dict(re.findall(r"^\| `(\w+)/` \| (.*) \|$", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE))
    assert set(rooms) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for room, row in rooms.items():
        named = re.findall(r"`(\w+(?:\.py|/))`", row)
        assert not [name for name in named if not (ROOT / room / name).exists()], room


def test_formulas_are_of_macros_that_github_renders_and_have_balanced_braces():
    """By matplotlib's own reading of TeX, a small part of it; Markdown takes a backslash from before punctuation."""
    text = (ROOT / "docs" / "method.md").read_text()
    displayed = re.findall(r"^\$\$ (.*) \$\$$", text, re.MULTILINE)
    inline = re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", text)
    assert len(displayed) >= 8 and inline and text.count("$") == 4 * len(displayed) + 2 * len(inline)
    parser = matplotlib.mathtext.MathTextParser("agg")
    for formula in displayed + inline:
        assert not re.search(r"\\[^A-Za-z]|\\operatorname|\\mathop", formula), formula
        parser.parse(f"${formula}$")

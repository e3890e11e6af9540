"""The rooms: no arrow between them runs up, no modules import each other in a circle, functions stay small, and a name
is of one thing.

All of it is read from the source, imports inside functions as well; nothing is run.
"""

import ast
from collections import Counter
from collections.abc import Iterator

import pytest

from models import HEADS
from tests.helpers import ROOT

# A module imports its own room and lower ones. Models and data are side by side, and import neither each other.
LEVEL = {"engine": 0, "models": 1, "data": 1, "methods": 2, "persistence": 3, "reporting": 4, "photos": 5}
LEVEL |= {"scripts": 6, "speed": 7, "tests": 8}
# No script and no module of the tests imports another one, but for these.
SHARED = {"args_parser", "tests.helpers", "tests.published"}
MAX_PARAMETERS, MAX_LINES, MAX_MAIN_LINES = 8, 60, 55

Sources = dict[str, str]  # the text of each file by its path below the root
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*ROOT.glob("*.py"), *(path for room in LEVEL for path in (ROOT / room).rglob("*.py"))]
}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return first if first in LEVEL else "scripts"


def imports(path: str, sources: Sources) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    modules = {module_of(other) for other in sources}
    module = module_of(path)
    package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(sources[path])):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *node.module.split(".")] if node.module else base
            names += [[*base, alias.name] for alias in node.names]
    # The longest beginning of a name that is a module: the rest of it is something inside.
    beginnings = ([".".join(name[:n]) for n in range(len(name), 0, -1)] for name in names)
    found = {next((beginning for beginning in longest if beginning in modules), None) for longest in beginnings}
    return {name for name in found if name is not None}


def forbidden_arrows(sources: Sources) -> set[str]:
    """`a -> b` for every import of a room that is not below, and of another script or test module."""

    def forbidden(module: str, other: str) -> bool:
        room, other_room = room_of(module), room_of(other)
        if room == other_room:
            return room in ("scripts", "tests") and other not in SHARED
        return LEVEL[other_room] >= LEVEL[room]

    arrows = ((module_of(path), other) for path in sources for other in imports(path, sources))
    return {f"{module} -> {other}" for module, other in arrows if forbidden(module, other)}


def photos_of_the_paper(sources: Sources) -> set[str]:
    """`module -> module` for every import of photos/, anyone's own images, by another script than predict.py."""
    arrows = ((module_of(path), other) for path in sources for other in imports(path, sources))
    return {
        f"{module} -> {other}"
        for module, other in arrows
        if room_of(other) == "photos" and room_of(module) == "scripts" and module != "predict"
    }


def circles(sources: Sources) -> set[str]:
    """`a, b, ...` for every set of modules that import each other, directly or through others."""
    arrows = {module_of(path): imports(path, sources) for path in sources}
    reached: dict[str, set[str]] = {}
    for module, direct in arrows.items():
        seen, todo = set(), list(direct)
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += arrows[other]
        reached[module] = seen
    rings = ({other for other in seen if module in reached[other]} for module, seen in reached.items())
    return {", ".join(sorted(ring)) for ring in rings if ring}


Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def functions(tree: ast.AST, around: str = "") -> Iterator[tuple[str, Function]]:
    """Every function and method, nested ones too, with its name below those of the classes and functions around it."""
    for node in ast.iter_child_nodes(tree):
        inside = around
        if isinstance(node, Function | ast.ClassDef):
            name = around + getattr(node, "name", "lambda")
            inside = f"{name}."
            if isinstance(node, Function):
                yield name, node
        yield from functions(node, inside)


def functions_below(room: str, sources: Sources) -> Iterator[tuple[str, Function]]:
    """`path name` and the node of every function of the rooms below this one."""
    for path, text in sources.items():
        if LEVEL[room_of(module_of(path))] < LEVEL[room]:
            for name, node in functions(ast.parse(text)):
                yield f"{path} {name}", node


def named_parameters(node: Function) -> list[str]:
    """The names of the parameters but those with stars, without self and cls."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [parameter.arg for parameter in every if parameter.arg not in ("self", "cls")]


def too_many_parameters(sources: Sources) -> set[str]:
    """Functions of the house with more than 8 parameters, those with stars included."""
    found = set()
    for name, node in functions_below("speed", sources):
        stars = (node.args.vararg is not None) + (node.args.kwarg is not None)
        if len(named_parameters(node)) + stars > MAX_PARAMETERS:
            found.add(f"{name}: more than {MAX_PARAMETERS} parameters")
    return found


def args_below_the_scripts(sources: Sources) -> set[str]:
    """Functions of the rooms that are given the flags of a script as a whole."""
    below = functions_below("scripts", sources)
    return {f"{name}: takes args" for name, node in below if "args" in named_parameters(node)}


def too_long(sources: Sources) -> set[str]:
    """Functions of the house of more than 60 lines, and main functions of scripts of more than 55."""
    found = set()
    for name, node in functions_below("speed", sources):
        path, function = name.split(" ")
        most = MAX_MAIN_LINES if function == "main" and "/" not in path else MAX_LINES
        if (node.end_lineno or 0) - node.lineno + 1 > most:
            found.add(f"{name}: more than {most} lines")
    return found


def house(sources: Sources) -> dict[str, ast.Module]:
    """The syntax trees of the files that are neither of speed nor of the tests."""
    return {path: ast.parse(text) for path, text in sources.items() if LEVEL[room_of(module_of(path))] < LEVEL["speed"]}


def shared_names(sources: Sources) -> set[str]:
    """Names of more than one public function or class of the house, `main` apart, or of more than one module."""
    trees = house(sources)
    modules = [module_of(path).split(".")[-1] for path in trees if not path.endswith("__init__.py")]
    defined = [getattr(node, "name", "") for tree in trees.values() for node in tree.body]
    public = [name for name in defined if name and name != "main" and not name.startswith("_")]
    found = {name for names in (modules, public) for name, count in Counter(names).items() if count > 1}
    return {f"{name}: of more than one thing" for name in found}


def comparisons_with_head_names(sources: Sources) -> set[str]:
    """Files that compare something with the name of a head: a head says itself what it needs and what it sees."""
    found = set()
    for path, tree in house(sources).items():
        compared = (node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.MatchValue))
        texts = {part.value for node in compared for part in ast.walk(node) if isinstance(part, ast.Constant)}
        found |= {f"{path}: tests for {name}" for name in HEADS if name in texts}
    return found


RULES = [forbidden_arrows, photos_of_the_paper, circles, too_many_parameters, args_below_the_scripts, too_long]
RULES += [shared_names, comparisons_with_head_names]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule):
    assert {"engine/run.py", "models/__init__.py", "data/converters/cub.py", "predict.py"} <= SOURCES.keys()
    assert rule(SOURCES) == set()


# Made-up files come among those of the house, emptied.
EMPTY = dict.fromkeys(SOURCES, "")
NINE = ", ".join(f"p{i}" for i in range(9))
LINES_61 = "def f():\n" + "    pass\n" * 60
MAIN_56 = "def main():\n" + "    pass\n" * 55
# The rule, the made-up files, and what it must find in them.
BAD = {
    "engine imports models": (forbidden_arrows, {"engine/bad.py": "import models.heads"}, "engine.bad -> models.heads"),
    "models import data": (
        forbidden_arrows,
        {"models/bad.py": "from data import episodes"},
        "models.bad -> data.episodes",
    ),
    "data import models": (
        forbidden_arrows,
        {"data/bad.py": "from models.heads import softMax"},
        "data.bad -> models.heads",
    ),
    "methods import persistence": (
        forbidden_arrows,
        {"methods/bad.py": "def f():\n    from persistence import run_files as kept"},
        "methods.bad -> persistence.run_files",
    ),
    "methods import reporting": (
        forbidden_arrows,
        {"methods/bad.py": "try:\n    import reporting.report as shown\nexcept ImportError:\n    pass"},
        "methods.bad -> reporting.report",
    ),
    "a relative import": (
        forbidden_arrows,
        {"data/converters/bad.py": "from ...persistence import run_files"},
        "data.converters.bad -> persistence.run_files",
    ),
    "a room imports a script": (
        forbidden_arrows,
        {"reporting/bad.py": "import args_parser"},
        "reporting.bad -> args_parser",
    ),
    "a script imports another": (forbidden_arrows, {"bad.py": "from predict import main"}, "bad -> predict"),
    "a script imports speed": (forbidden_arrows, {"bad.py": "from speed.common import Bench"}, "bad -> speed.common"),
    "speed imports tests": (forbidden_arrows, {"speed/bad.py": "import tests.helpers"}, "speed.bad -> tests.helpers"),
    "a test module imports another": (
        forbidden_arrows,
        {"tests/models/test_bad.py": "from tests.models.test_heads import CASES"},
        "tests.models.test_bad -> tests.models.test_heads",
    ),
    "reporting imports photos": (
        forbidden_arrows,
        {"reporting/bad.py": "from photos import images"},
        "reporting.bad -> photos.images",
    ),
    "a stage imports photos": (photos_of_the_paper, {"bad.py": "import photos.images"}, "bad -> photos.images"),
    "a circle of two": (circles, {"data/a.py": "import data.b", "data/b.py": "from .a import f"}, "data.a, data.b"),
    "a circle of three": (
        circles,
        {"a.py": "import b", "b.py": "def f():\n    import c", "c.py": "from a import x"},
        "a, b, c",
    ),
    "nine parameters": (too_many_parameters, {"bad.py": f"def f({NINE}): ..."}, "bad.py f: more than 8 parameters"),
    "nine parameters of a method": (
        too_many_parameters,
        {"engine/bad.py": f"class A:\n    def f(self, {NINE[4:]}, **rest): ..."},
        "engine/bad.py A.f: more than 8 parameters",
    ),
    "args below the scripts": (
        args_below_the_scripts,
        {"persistence/bad.py": "class A:\n    async def f(self, *, args): ..."},
        "persistence/bad.py A.f: takes args",
    ),
    "61 lines": (too_long, {"bad.py": LINES_61}, "bad.py f: more than 60 lines"),
    "two functions of a name": (
        shared_names,
        {"data/bad.py": "def f(): ...", "worse.py": "class f: ..."},
        "f: of more than one thing",
    ),
    "two modules of a name": (shared_names, {"data/bad.py": "", "methods/bad.py": ""}, "bad: of more than one thing"),
    "a head by its name": (
        comparisons_with_head_names,
        {"methods/bad.py": "see = 1 if method in ('cosMax', 'other') else 2"},
        "methods/bad.py: tests for cosMax",
    ),
    "a main of 56 lines": (too_long, {"bad.py": MAIN_56}, "bad.py main: more than 55 lines"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_break_of_a_rule_is_found(case):
    rule, files, expected = BAD[case]
    assert rule(EMPTY | files) == {expected}


@pytest.mark.parametrize(
    "files",
    [
        {
            "methods/good.py": "import engine.run, data.episodes\nfrom models import build_head",
            "fine.py": "import args_parser",
        },
        {"persistence/good.py": "def f(*args, **kwargs): ...", "fine.py": "def g(args): ..."},
        {"good.py": f"class A:\n    def f(self, {NINE[4:]}): ...", "speed/good.py": f"def f({NINE}): ...\n{LINES_61}"},
        {"good.py": MAIN_56.removesuffix("    pass\n"), "speed/good.py": MAIN_56},
        {"data/good.py": LINES_61.removesuffix("    pass\n"), "tests/good.py": "import speed.common, tests.helpers"},
        {"data/good.py": "def _f(): ...\nclass A:\n    def f(self): ...", "a.py": "def main(): ...\ndef _f(): ..."},
        {"b.py": "def main(): ...\nmethod = 'arcMax'\ndef f(): ...", "speed/good.py": "def f(): ...\nx == 'arcMax'"},
    ],
)
def test_what_keeps_the_rules_is_left_alone(files):
    for rule in RULES:
        assert rule(EMPTY | files) == set()

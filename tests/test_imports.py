"""Imports point one way: a folder names only what lies below it, and no file comes round to itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pdl_kernels"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# What the files of each folder, and each file of the root, may import of ours beside their own folder.
MAY_IMPORT = {
    "options": set(),
    "errors": set(),
    "kernels": {"options"},
    "eager": {"options"},
    "backends": {"kernels", "eager"},  # one of the two, when it is chosen
    "ops": {"options", "backends", "distributed"},
    "losses": {"options", "backends", "ops", "distributed"},
    "distributed": set(),
    "data": {"errors"},
    "weights": {"data", "distributed"},
    "integrations": {"data", "losses", "options", "weights"},
    # A programme around the package, which looks inside: it compares the kernels with a composition of its own.
    "doctor": {"", "backends", "errors", "kernels"},
    "cli": {"", "errors", "weights", "data", "doctor"},
    "": {"backends", "options", "losses", "weights", "data"},  # pdl_kernels/__init__.py
}


def place(module):
    """The folder or root file that a module belongs to: "losses", "options"; "" for the package itself."""
    _, *rest = module.split(".")
    return rest[0] if rest else ""


def imports(module):
    """The modules of ours that a module's source names, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == "pdl_kernels"}


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_lies_below_it(module):
    assert place(module) in MAY_IMPORT, "a new folder, or a new file in the root: say what it may import"
    for imported in imports(module):
        if place(imported) != place(module):
            assert place(imported) in MAY_IMPORT[place(module)], f"{module} imports {imported}"


def test_what_may_be_imported_is():
    """A permission that nobody uses would let an arrow in unseen."""
    used = {name: set() for name in MAY_IMPORT}
    for module in MODULES:
        used[place(module)] |= {place(imported) for imported in imports(module)} - {place(module)}
    assert used == MAY_IMPORT


def test_folders_do_not_come_round_to_themselves():
    def below(name, above=()):
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        for other in MAY_IMPORT[name]:
            below(other, (*above, name))

    for name in MAY_IMPORT:
        below(name)


def test_no_file_comes_round_to_itself():
    arrows = {module: imports(module) - {module} for module in MODULES}
    done = set()

    def follow(module, path):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for imported in sorted(arrows[module]):
                follow(imported, [*path, module])
            done.add(module)

    for module in MODULES:
        follow(module, [])


def test_the_root_holds_folders_and_little_else():
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {"__init__.py", "options.py", "backends.py", "errors.py"}

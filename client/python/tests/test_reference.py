"""The API reference: its command knows every public module, and whatever it shows is documented.

By the sources alone. The reference itself is built by tools/api_reference, and not committed, so it cannot be out of date.
"""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "syncbn"
COMMAND = PACKAGE.parents[2] / "tools" / "api_reference"
# Their names are those of the package above them.
PARTS = {"syncbn.core"} | {
    f"syncbn.torch.{part}"
    for part in ("convert", "dimensions", "functional", "gradients", "launch", "modules", "replacing", "weighting")
}
# Private modules whose classes and functions are public under other modules' names.
BEHIND = {f"syncbn.{part}": PACKAGE / f"{part}.py" for part in ("_default", "_master", "_rounds", "_worker")}
# The command's environment is without their frameworks, which want other versions of what the others need.
ABSENT = {"syncbn.lightning", "syncbn.mmengine", "syncbn.monai"}
# Methods that a framework calls, and describes.
FRAMEWORKS_OWN = {"forward", "reset_parameters", "extra_repr", "on_train_start"}


def modules():
    """The public modules, by name: their files."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        words = ("syncbn",) + file.relative_to(PACKAGE).with_suffix("").parts
        words = words[:-1] if words[-1] == "__init__" else words
        if not any(word.startswith("_") for word in words):
            found[".".join(words)] = file
    return found


def public(body, kinds):
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_the_command_names_every_public_module():
    (listed,) = re.findall(r"^MODULES=\(([^)]*)\)", COMMAND.read_text(), re.MULTILINE)
    assert set(listed.split()) == set(modules()) - PARTS - ABSENT
    assert PARTS | ABSENT <= set(modules())


@pytest.mark.parametrize("name", sorted({**modules(), **BEHIND}))
def test_everything_that_it_shows_is_documented(name):
    tree = ast.parse({**modules(), **BEHIND}[name].read_text())
    bare = [] if ast.get_docstring(tree) else ["the module"]
    for node in public(tree.body, (ast.FunctionDef, ast.ClassDef)):
        members = public(node.body, ast.FunctionDef) if isinstance(node, ast.ClassDef) else []
        bare += [node.name] * (ast.get_docstring(node) is None)
        bare += [
            f"{node.name}.{member.name}"
            for member in members
            if ast.get_docstring(member) is None and member.name not in FRAMEWORKS_OWN
        ]
    assert not bare

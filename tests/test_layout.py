"""The order of the packages, and the limits that keep them readable."""

import ast
from itertools import pairwise
from pathlib import Path

import qf_peft

ROOT = Path(qf_peft.__file__).parent
ORDER = ["data", "runtime", "forward", "solve", "adapter", "evaluate", "teaching", "share", "documents", "app"]


def modules():
    found = sorted(ROOT.glob("*/*.py"))
    assert len(found) > 60
    return {f"{path.parent.name}.{path.stem}": ast.parse(path.read_text(encoding="utf-8")) for path in found}


def imports(name, tree):
    """(module, name) of all that a module takes from others of this package, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= 2
            parts = ([name.split(".")[0]] if node.level == 1 else []) + (node.module or "").split(".")
            parts = [part for part in parts if part]
            for alias in node.names:
                yield (".".join(parts), alias.name) if len(parts) > 1 else (".".join([*parts, alias.name]), "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qf_peft":
            raise AssertionError(f"{name} imports {node.module} by its whole name")


def test_packages_are_those_of_the_order():
    assert sorted(p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()) == sorted(ORDER)


def test_imports_point_upward_only():
    for name, tree in modules().items():
        here = ORDER.index(name.split(".")[0])
        for other, what in imports(name, tree):
            if other.startswith("registration"):  # the command line registers QF once its arguments are right
                assert name == "app.cli_common"
                continue
            assert ORDER.index(other.split(".")[0]) <= here, f"{name} imports {other}"
            assert not what.startswith("_"), f"{name} imports {other}.{what}"


def test_there_is_no_circle():
    needs = {name: {other for other, _ in imports(name, tree)} for name, tree in modules().items()}
    done = set()
    while len(done) < len(needs):
        free = {name for name, others in needs.items() if name not in done and others & needs.keys() <= done}
        assert free, f"a circle among {sorted(needs.keys() - done)}"
        done |= free


def test_nothing_is_too_long():
    for name, tree in modules().items():
        path = ROOT / (name.replace(".", "/") + ".py")
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                assert node.end_lineno - first.lineno < 60, f"{name}.{node.name}"


def test_calls_of_our_own_take_few_arguments():
    trees = modules()
    own = {n.name for tree in trees.values() for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in own or len(node.args) + len(node.keywords) <= 8 or foreign(node), (
                    f"{name}: {called}"
                )


def foreign(node):
    """A method of another library's object that has one of our names."""
    return isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in {"config.update", "blocks.launch"}


def test_the_order_is_the_documents():
    text = (ROOT.parent.parent / "README.md").read_text(encoding="utf-8")
    places = [text.index(f"| `{package}/` |") for package in ORDER]
    assert all(a < b for a, b in pairwise(places))

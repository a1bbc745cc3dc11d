# SPDX-License-Identifier: Apache-2.0

"""The order of the rooms, the size of what is in them, and that every argument is described."""

import ast
import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import trl_pgraft


PACKAGE = Path(trl_pgraft.__file__).parent
# From the lowest to the highest: a room imports from lower ones alone. See docs/architecture.md.
FLOORS = (
    *("core", "config", "pipelines", "rewards", "adapters", "rollouts", "training", "analysis", "report"),
    *("hub", "compat", "noise_correction", "trainer", "cli", "__init__"),
)
PATHS = sorted(path for path in PACKAGE.rglob("*.py*") if path.suffix in (".py", ".pyi"))
FILES = {path: ast.parse(path.read_text()) for path in PATHS}
MODULES = {path: tree for path, tree in FILES.items() if path.suffix == ".py"}
FUNCTIONS = [
    (path, node)
    for path, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def name_of(path: Path) -> str:
    """The dotted name of a file inside the package; a folder's `__init__` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path) for path in FILES}


def room_of(name: str) -> str:
    return name.partition(".")[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each module of the package that a file imports, wherever in the file it does."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*origin, *filter(None, [node.module])])
            targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            root, _, inside = target.partition(".")
            if root == PACKAGE.name:
                yield node.lineno, inside if inside in NAMES else inside.rpartition(".")[0] or "__init__"


IMPORTS = [(path, line, target) for path in FILES for line, target in imports_of(path)]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


def test_the_imports_are_found():
    """Of both kinds, so that the checks below do not pass on an empty list."""
    found = {(name_of(path), target) for path, _, target in IMPORTS}
    assert ("trainer", "rollouts.collect") in found, "from .rollouts.collect import ..."
    assert ("rewards", "rewards.registry") in found, "from .registry import ..."
    assert ("__init__", "config") in found, "of the stub"
    assert {room_of(name) for name in NAMES} <= set(FLOORS), "a new room needs a floor"


def test_a_room_imports_from_lower_floors_alone():
    wrong = [
        f"{where(path, line)}: {room_of(name_of(path))} imports {target}, which is above it"
        for path, line, target in IMPORTS
        if FLOORS.index(room_of(target)) > FLOORS.index(room_of(name_of(path)))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_run_in_a_circle():
    """Files of one room may import each other, but in no circle either."""
    places = {(name_of(path), to): where(path, line) for path, line, to in IMPORTS if to != name_of(path)}
    imported = {name: [to for origin, to in places if origin == name] for name in NAMES}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        steps = [(importer, name) for name, importer in itertools.pairwise(error.args[1])]
        pytest.fail("\n".join(f"{places[step]}: {step[0]} imports {step[1]}" for step in steps))


def test_every_file_has_its_licence_and_says_what_it_is_for():
    wrong = [
        where(path, 1)
        for path, tree in MODULES.items()
        if not path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
        or len((ast.get_docstring(tree) or "").split()) <= 3
    ]
    assert not wrong, "\n".join(wrong)


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring."""
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_no_file_is_too_long():
    """But for the configuration, whose fields have their descriptions beside them."""
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    limits = {"config": math.inf, "trainer": 250}
    wrong = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > limits.get(name, 320)]
    assert not wrong, "\n".join(wrong)


def test_no_function_is_too_long():
    wrong = [f"{where(path, f.lineno)} {f.name}: {length_of(f)}" for path, f in FUNCTIONS if length_of(f) > 45]
    assert not wrong, "\n".join(wrong)


def test_nine_of_ten_functions_are_short():
    lengths = sorted(length_of(function) for _, function in FUNCTIONS)
    assert lengths[int(0.9 * len(lengths))] <= 20


def test_the_package_is_small():
    """Statements, docstrings not counted."""
    nodes = [node for tree in MODULES.values() for node in ast.walk(tree)]
    with_docstring = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = sum(isinstance(node, with_docstring) and ast.get_docstring(node) is not None for node in nodes)
    assert sum(isinstance(node, ast.stmt) for node in nodes) - docstrings <= 6300


def test_pipelines_trainers_and_configurations_have_types():
    """In signatures, and in fields of classes, which are the signature of a dataclass."""
    names = {"pipeline", "sd_pipeline", "trainer", "config"}
    arguments = [(path, a.lineno, a.arg, a.annotation) for path, f in FUNCTIONS for a in arguments_of(f)]
    fields = [
        (path, node.lineno, node.target.id, node.annotation)
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    wrong = [
        f"{where(path, line)}: {name}: Any"
        for path, line, name, annotation in arguments + fields
        if name in names and annotation is not None and ast.unparse(annotation).split(" | ")[0] == "Any"
    ]
    assert not wrong, "\n".join(wrong)


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = function.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def public_callables() -> dict[str, Any]:
    """Public functions and classes, and the public methods and properties that the package gives these classes."""
    found = {}
    for name in trl_pgraft.__all__:
        found[name] = value = getattr(trl_pgraft, name)
        for owner in value.__mro__ if inspect.isclass(value) else ():
            if owner.__module__.startswith("trl_pgraft"):
                methods = {m: f for m, f in vars(owner).items() if is_public_method(m, f)}
                found |= {f"{name}.{m}": getattr(f, "__func__", f) for m, f in methods.items()}
    return found


def is_public_method(name: str, value: Any) -> bool:
    is_method = inspect.isfunction(value) or isinstance(value, classmethod | staticmethod | property)
    return is_method and (name == "__call__" or not name.startswith("_"))


def names_to_describe(value: Any) -> list[str]:
    """Arguments of a function or class, without those that a configuration's field describes in its metadata."""
    if isinstance(value, property):
        return []
    described = {f.name for f in dataclasses.fields(value) if f.metadata} if dataclasses.is_dataclass(value) else set()
    return [name for name in inspect.signature(value).parameters if name not in {"self", "cls", *described}]


def undescribed(value: Any) -> list[str]:
    """
    Arguments that the docstring does not describe: in four words or more in its section `Args:`, or, where it has no
    such section, by their names in its text.
    """
    docstring = inspect.cleandoc(value.__doc__ or "")
    if not docstring:
        return ["(no docstring)"]
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        words = dict.fromkeys(re.findall(r"`\**(\w+)`" if "\n" in docstring else r"\w+", docstring), 4)
    else:
        entries = re.findall(r"^ {4}([\w*, ]+?)(?: \(.*\))?:\n((?: {8}.*\n?|\n)*)", section[1], re.MULTILINE)
        words = {name.strip("* "): len(text.split()) for names, text in entries for name in names.split(",")}
    return [name for name in names_to_describe(value) if words.get(name, 0) < 4]


@pytest.mark.parametrize("name, value", public_callables().items(), ids=public_callables())
def test_every_public_argument_is_described(name, value):
    assert not undescribed(value), f"{name}: {', '.join(undescribed(value))}"


def test_the_check_of_descriptions_finds_what_is_missing():
    def one(prompts, rewards, missing):
        """
        Do something.

        Args:
            prompts (`list[str]`):
                The prompts that are sampled.
            rewards (`torch.Tensor`):
                The rewards.
        """

    def two(prompts, missing):
        """Sample `prompts`."""

    def three(prompts, missing):
        """
        Sample.

        An image is sampled for each of `prompts`; nothing is missing.
        """

    assert undescribed(one) == ["rewards", "missing"]
    assert undescribed(two) == undescribed(three) == ["missing"]

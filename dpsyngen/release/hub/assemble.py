"""Making one file of code out of several modules of this package, so that a release runs where dpsyngen is not.

What a root module needs is followed from definition to definition; only that is written out, word for word.  So the
code of a release cannot differ from ours: it *is* ours.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = "dpsyngen"
_ROOT = Path(__file__).parents[2]


@dataclass
class _Module:
    """A module's top level.

    Attributes:
        name: dotted.
        source: its lines.
        definitions: the statements that define each name.
        ours: names imported from this package, with the module that defines them.
        foreign: other imported names, with the statement that imports just them.
        order: position of each statement.
    """

    name: str
    source: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    order: dict[int, int] = field(default_factory=dict)
    body: list[ast.stmt] = field(default_factory=list)


class NotSelfContained(Exception):
    """Some code that a release should carry cannot be carried: a mistake in this package, not of a user."""


def assemble(root: str, heading: str) -> str:
    """The source of module `root` with all that it needs of this package.

    Args:
        root: dotted name of a module of this package; all its definitions are taken.
        heading: text of the docstring of the new file.

    Raises:
        NotSelfContained: two modules give different things one name, or a function imports from this package.
    """
    modules: dict[str, _Module] = {}
    needed: dict[str, set[str]] = {}
    imports: dict[str, str] = {}
    finished: list[str] = []  # modules, each after those it imports from

    def module(name: str) -> _Module:
        if name not in modules:
            modules[name] = _read(name)
            for other in modules[name].ours.values():
                module(other)
            finished.append(name)
        return modules[name]

    def require(name: str, where: str) -> None:
        """Note that definition `name` of module `where` is needed, and all that it needs."""
        home = module(where)
        if name in home.ours:
            require(name, home.ours[name])
        elif name in home.foreign:
            if imports.setdefault(name, home.foreign[name]) != home.foreign[name]:
                raise NotSelfContained(f"{name} is imported in two ways")
        elif name in home.definitions and name not in needed.setdefault(where, set()):
            needed[where].add(name)
            if any(name in names for other, names in needed.items() if other != where):
                raise NotSelfContained(f"{name} is defined in two modules, one of them {where}")
            for used in _names(home.definitions[name]):
                require(used, where)

    for name in module(root).definitions:
        require(name, root)
    parts = [f'"""{heading}"""', "from __future__ import annotations", "\n".join(sorted(imports.values()))]
    for name in finished:
        if name in needed:
            parts.append(f"# {'-' * 30} {name}")
            parts += list(_written(modules[name], needed[name]))
    return "\n\n".join(parts) + "\n"


@cache
def _text(name: str) -> str:
    path = _ROOT.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="utf-8")


def _read(name: str) -> _Module:
    text = _text(name)
    tree = ast.parse(text)
    out = _Module(name, text.splitlines(), body=tree.body)
    for position, statement in enumerate(tree.body):
        out.order[id(statement)] = position
        if isinstance(statement, ast.ImportFrom) and statement.module != "__future__":
            for alias in statement.names:
                bound = alias.asname or alias.name
                if (statement.module or "").split(".")[0] == PACKAGE:
                    if alias.asname:
                        raise NotSelfContained(f"{name} gives {alias.name} another name")
                    out.ours[bound] = statement.module or ""
                else:
                    as_ = f" as {alias.asname}" if alias.asname else ""
                    out.foreign[bound] = f"from {statement.module} import {alias.name}{as_}"
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                bound = alias.asname or alias.name.split(".")[0]
                out.foreign[bound] = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            out.definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            out.definitions |= {t.id: statement for t in statement.targets if isinstance(t, ast.Name)}
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            out.definitions[statement.target.id] = statement
    return out


def _names(statement: ast.stmt) -> Iterator[str]:
    """Every name in a statement, in annotations, too: those are for readers."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            raise NotSelfContained(f"line {node.lineno} imports from {node.module} inside a function")


def _written(module: _Module, names: set[str]) -> Iterator[str]:
    """The statements that define `names`, as they stand, with the comments above and the docstrings below them."""
    wanted = sorted({module.order[id(module.definitions[name])] for name in names})
    for position in wanted:
        statement = module.body[position]
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(d.lineno for d in decorators)]) - 1
        while first and module.source[first - 1].startswith("#"):
            first -= 1
        last = statement.end_lineno or statement.lineno
        after = module.body[position + 1] if position + 1 < len(module.body) else None
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.end_lineno:
            last = after.end_lineno
        yield "\n".join(module.source[first:last])

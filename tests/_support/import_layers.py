"""The rule that imports point downward, as a function over a source tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "entropy_fast"

# Lowest first. A module may import from its own unit, from layers below, and from a unit beside it that does not import back.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "errors",
            "config",
            "_version",
            "accessors",
            "atomic",
            "digests",
            "libraries",
            "optional_packages",
            "scalars",
            "schema",
        }
    ),
    frozenset({"reference"}),
    frozenset({"ops"}),
    frozenset({"rollouts"}),
    frozenset({"distributed"}),
    frozenset({"resuming"}),
    frozenset({"checks"}),
    frozenset({"step"}),
    frozenset({"sharded"}),
    frozenset({"columns"}),
    frozenset({"estimates"}),
    frozenset({"context"}),
    frozenset({"capture"}),
    frozenset({"ways"}),
    frozenset({"engines", "truth"}),
    frozenset({"api", "candidates", "offline_entropy_probe", "probe_components"}),
    frozenset({"sampling", "run_folder"}),
    frozenset({"report", "integrations", "demo"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
COMPILED = ("_native", "kernels")  # reached through ops alone
NEVER_TRUTH = ("engines", "estimates", "api", "probe_components", "offline_entropy_probe")
EXEMPT = f"{PACKAGE}/__init__.py"  # resolves names lazily, from everywhere
REGISTER = "register_accessor"  # of names in layers above, which only that file may know


def violations(root: Path) -> list[str]:
    """Broken rules of the package under ``root`` (the folder that holds ``entropy_fast``), one sentence each."""
    level = {unit: index for index, units in enumerate(LAYERS) for unit in units}
    found = []
    graph: dict[str, set[str]] = {}
    modules = dict(_modules(root))
    for name, path in modules.items():
        relative = path.relative_to(root).as_posix()
        if relative == EXEMPT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        unit = _unit(name)
        if unit not in level:
            found.append(f"{relative}: '{unit}' is in no layer")
            continue
        graph[name] = set()
        found += [
            f"{relative}:{line}: says where an accessor is, which {EXEMPT} alone does" for line in _registrations(tree)
        ]
        for line, target, at_module_level in _imports(tree, name, path.name == "__init__.py"):
            other = _unit(target)
            where = f"{relative}:{line}"
            if other in COMPILED:
                if unit != "ops":
                    found.append(f"{where}: {unit} imports {PACKAGE}.{other}, which only ops may")
                continue
            if other == "":
                found.append(f"{where}: imports {PACKAGE} itself, which imports everything")
                continue
            if other == "truth" and unit in NEVER_TRUTH:
                found.append(f"{where}: the estimate ({unit}) imports the truth")
            if other not in level:
                found.append(f"{where}: imports '{other}', which is in no layer")
            elif level[other] > level[unit]:
                found.append(f"{where}: {unit} imports {other} from a layer above")
            if at_module_level:
                graph[name].add(_resolve(target, modules))
    found += [f"import cycle: {' -> '.join(cycle)}" for cycle in _cycles(graph)]
    return found + [f"folders in a circle: {' -> '.join(cycle)}" for cycle in _cycles(_folders(graph))]


def _folders(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same imports between the folders and files that lie side by side, at every depth.

    What a folder's ``__init__`` takes from the inside, and what the inside takes from there, is no import between rooms.
    """
    rooms: dict[str, set[str]] = {}
    for name, targets in graph.items():
        for target in targets:
            one, two = name.split("."), target.split(".")
            common = next(
                (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
            )
            if common < min(len(one), len(two)):
                rooms.setdefault(".".join(one[: common + 1]), set()).add(".".join(two[: common + 1]))
    return rooms


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _unit(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _resolve(target: str, modules: dict[str, Path]) -> str:
    while target not in modules and "." in target:
        target = target.rpartition(".")[0]
    return target


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """Line, absolute dotted target and whether it runs when the module is imported, of imports within the package.

    Imports inside functions obey the layers too, but cannot form a cycle at run time.
    """
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            deferred.update(ast.walk(node))
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")
                anchor = anchor[: len(anchor) - node.level + (1 if is_package else 0)]
                base = ".".join([*anchor, base] if base else anchor)
            # `from package import name`: the name may be a module of its own.
            targets = [f"{base}.{alias.name}" for alias in node.names]
            # The version is everybody's: the top-level package gets it from the lowest layer without importing more.
            targets = [f"{PACKAGE}._version" if t == f"{PACKAGE}.__version__" else t for t in targets]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            targets = [str(node.args[0].value)]
        for target in targets:
            if target == PACKAGE or target.startswith(PACKAGE + "."):
                yield getattr(node, "lineno", 0), target, node not in deferred


def _registrations(tree: ast.Module) -> Iterator[int]:
    """Lines on which an accessor's home is given: a text, which no rule about imports sees."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == REGISTER:
            yield node.lineno


def _cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        if node in path:
            yield [*path[path.index(node) :], node]
            return
        if node in done:
            return
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if target != node:
                yield from visit(target)
        path.pop()
        done.add(node)

    for start in sorted(graph):
        yield from visit(start)

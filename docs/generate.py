"""Writes the parts of the documentation that follow from the code; a test holds the pages against it.

python docs/generate.py

Whole pages: commands, study file, message schemas, errors. In other pages what stands between `<!-- generated: NAME -->` and
`<!-- end -->`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
PACKAGE = REPOSITORY / "nnunet_fedharm"
MADE = "<!-- written by docs/generate.py; do not edit -->"


def pages() -> dict[Path, str]:
    """Path -> what the page has to hold."""
    reference = DOCS / "reference"
    written = {
        reference / "commands.md": commands(),
        reference / "study-file.md": study_file(),
        reference / "message-schemas.md": schemas(),
        reference / "errors.md": errors(),
    }
    for page, blocks in _BLOCKS.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        for name, make in blocks.items():
            text = with_block(text, name, make())
        written[DOCS / page] = text
    return written


def with_block(text: str, name: str, content: str) -> str:
    """The page with new content between the marks of a block."""
    pattern = re.compile(rf"(<!-- generated: {re.escape(name)} -->\n).*?(<!-- end -->)", flags=re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"The page needs the marks of the block {name!r} once.")
    return pattern.sub(lambda found: f"{found[1]}\n{content.strip()}\n\n{found[2]}", text)


def commands() -> str:
    """Every command and sub-command with its options, from the parsers."""
    from nnunet_fedharm.cli import COMMANDS, command_parser

    parts = [
        f"# Every option of every command\n\n{MADE}\n",
        "As `nnunet-fedharm COMMAND --help` says it. What the commands are for: [command line](cli.md).\n",
    ]
    for name, words in COMMANDS.items():
        parts.append(f"## {name}\n\n{words[:1].upper()}{words[1:]}.\n")
        parts += _parsers(command_parser(name), name)
    return "\n".join(parts)


def _parsers(parser: argparse.ArgumentParser, name: str, words: str = "") -> Iterator[str]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    own = [action for action in parser._actions if action not in nested and action.dest != "help"]
    if " " in name:
        yield f"### {name}\n" + (f"\n{words[:1].upper()}{words[1:]}.\n" if words else "")
    if own:
        rows = [(_written(action), _helped(parser, action)) for action in own]
        yield table(("option", "meaning"), rows)
    for action in nested:
        said = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for word, child in action.choices.items():
            yield from _parsers(child, f"{name} {word}", said.get(word, ""))


def _written(action: argparse.Action) -> str:
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    value = " ".join(value) if isinstance(value, tuple) else value
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    more = "" if action.nargs == 0 else f" {value}" + (" …" if action.nargs in ("+", "*") else "")
    return f"`{', '.join(action.option_strings)}{more}`" + (" (needed)" if action.required else "")


def _helped(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    said = parser._get_formatter()._expand_help(action) if action.help else ""
    default = action.default
    if "default" in said or default in (None, False, argparse.SUPPRESS, "", [], ()) or not action.option_strings:
        return said
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return f"{said} (default: {shown})".strip()


def study_file() -> str:
    """Tables of study.toml."""
    from nnunet_fedharm.study import study_tables as module

    parts = [
        f"# `study.toml`\n\n{MADE}\n",
        "Every key of the file that `nnunet-fedharm study init` writes; unknown keys are refused. How to use it: "
        "[run a study](../how-to/study.md).\n",
    ]
    for name, part in (
        ("study", module.Subject),
        ("arms", module.Arms),
        ("training", module.Training),
        ("report", module.Report),
    ):
        parts.append(f"## [{name}]\n\n{_first(part)}\n\n{field_table(part)}")
    from nnunet_fedharm.privacy.options import PrivacyOptions

    parts.append(f"## [privacy]\n\nOf the arms at `epsilons`.\n\n{field_table(PrivacyOptions, without=('epsilon',))}")
    parts.append(
        f"In the same table: {_lower(_first(module.PrivateTraining))}\n\n{field_table(module.PrivateTraining)}"
    )
    return "\n".join(parts)


def _first(part: type) -> str:
    """The docstring's first sentence; a table of the file names itself there, which the heading has said."""
    words = re.sub(r"^`\[\w+\]`: ", "", inspect.getdoc(part) or "")
    return words[:1].upper() + words[1:]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def field_table(part: type, *, without: Sequence[str] = ()) -> str:
    """Fields of a dataclass: name, default, docstring."""
    from nnunet_fedharm.planning.explain import field_docstrings

    meanings = field_docstrings(part)
    rows = [
        (f"`{item.name}`", _default(item.default), meanings.get(item.name, ""))
        for item in fields(part)  # type: ignore[arg-type]
        if item.name not in without
    ]
    return table(("key", "default", "meaning"), rows)


def _default(value: Any) -> str:
    if value is MISSING:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`[{', '.join(map(repr, value))}]`".replace("'", '"')
    return "null" if value is None else f"`{value!r}`".replace("'", '"') if isinstance(value, str) else f"{value:g}"


def schemas() -> str:
    """Keys, types and bounds of the messages between server and sites."""
    parts = [
        f"# Schemas of all messages\n\n{MADE}\n",
        "Every key is required, no other is allowed, and both ends check types and bounds ([what messages tell](messages.md)). A "
        'reply carries `status` beside: "ok", or "error" with the kind and one sentence. `object` is strict JSON as text.\n',
    ]
    for title, name in (("Training", "federation.messages"), ("Secure sums", "federation.secure.messages"),
                        ("Site report", "federation.report.messages")):  # fmt: skip
        parts.append(f"## {title}\n")
        for schema in _schemas(import_module(f"nnunet_fedharm.{name}")):
            rows = [(f"`{key}`", *_bounds(item)) for key, item in schema.items.items()]
            weights = "\nTensors travel along.\n" if getattr(schema, "weights", False) else ""
            parts.append(f"### {schema.name}\n{weights}\n{table(('key', 'type', 'bounds'), rows)}")
    return "\n".join(parts)


def _schemas(module: Any) -> list[Any]:
    """In the order of the module; what it imports from elsewhere stands elsewhere."""
    assigned = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    names = [
        item.targets[0].id
        for item in assigned
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name)
    ]
    found = [getattr(module, name, None) for name in names]
    return [item for item in found if hasattr(item, "items") and isinstance(getattr(item, "name", None), str)]


def _bounds(item: Any) -> tuple[str, str]:
    kind = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "dict": "object"}.get(
        item.type.__name__, item.type.__name__
    )
    if item.type is bool:
        return kind, ""
    if item.type in (int, float):
        return kind, f"{item.least:g} to {item.most:g}"
    words = f"at most {item.most:.0f} characters"
    if item.pattern:
        words = f"`{item.pattern}`, {words}"
    return kind, words + (f"; numbers {', '.join(item.numbers)} only" if item.numbers else "")


def errors() -> str:
    """Classes of errors and where they are raised."""
    import nnunet_fedharm.errors as module

    raised: dict[str, set[str]] = {}
    for path in _sources():
        for name in re.findall(r"raise (\w+Error)\(", path.read_text(encoding="utf-8")):
            raised.setdefault(name, set()).add(_room(path))
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    rows = [
        (f"`{item.name}`", ast.get_docstring(item) or "", ", ".join(sorted(raised.get(item.name, ()))))
        for item in tree.body
        if isinstance(item, ast.ClassDef)
    ]
    return (
        f"# Errors\n\n{MADE}\n\nThe command line prints the message of an error of these classes, one sentence that says what is "
        "wrong, where, and what to do, and ends with status 2. Any other exception is a defect: please report it.\n\n"
        + table(("class", "means", "raised in"), rows)
    )


def rooms() -> str:
    """The layers of import-linter, with each room's purpose and the rooms that it uses now."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(item["layers"] for item in contracts if item["type"] == "layers")
    used = uses()
    rows = []
    for layer in layers:
        for name in (part.strip() for part in layer.split("|")):
            if name.startswith("("):
                continue
            rows.append((f"`{name}`", _purpose(name), ", ".join(sorted(used.get(name, ()))) or "nothing of ours"))
    return table(("room", "holds", "uses"), rows)


def uses() -> dict[str, set[str]]:
    """Room -> rooms whose modules it imports."""
    found: dict[str, set[str]] = {}
    for path in _sources():
        room = _room(path)
        names = re.findall(r"^\s*(?:from|import) nnunet_fedharm\.(\w+)", path.read_text(encoding="utf-8"), flags=re.M)
        found.setdefault(room, set()).update(name for name in names if name not in (room, "__version__"))
    return found


def _sources() -> list[Path]:
    skipped = ("nnunet_ext", "flower_app")
    folders = [
        path for path in sorted(PACKAGE.iterdir()) if path.is_dir() and path.name not in (*skipped, "__pycache__")
    ]
    return sorted([*PACKAGE.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))])


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _purpose(room: str) -> str:
    path = PACKAGE / f"{room}.py"
    tree = ast.parse((path if path.is_file() else PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    return " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    words = " ".join(str(text).split()).replace("|", "\\|")
    parts = re.split(r"(`[^`]*`)", words)  # code shows its signs as they are
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def _schedule() -> str:
    from nnunet_fedharm.planning.section import Schedule

    return field_table(Schedule)


def _privacy() -> str:
    from nnunet_fedharm.privacy.options import PrivacyOptions

    return field_table(PrivacyOptions)


def hooks() -> str:
    """Members of nnU-Net's classes that ours replace, with what ours say of themselves."""
    from nnunet_fedharm.planning.planner import ResizingPlanner
    from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
    from nnunet_fedharm.trainers.predictor import FedHarmPredictor

    parts = []
    for ours in (nnUNetTrainerFedHarm, FedHarmPredictor, ResizingPlanner):
        own = [item for item in ours.__mro__ if item.__module__.startswith("nnunet_fedharm")]
        base = next(item for item in ours.__mro__ if item.__module__.startswith("nnunetv2"))
        names = dict.fromkeys(
            name for item in own for name in vars(item) if hasattr(base, name) and not name.startswith("__")
        )
        rows = [(f"`{name}`", _said(getattr(ours, name))) for name in names if callable(getattr(ours, name))]
        parts.append(
            f"`{ours.__name__}`, of nnU-Net's `{base.__name__}`:\n\n" + table(("hook", "what ours does"), rows)
        )
    return "\n".join(parts)


def _said(member: Any) -> str:
    """First paragraph of its docstring."""
    return (inspect.getdoc(member) or "").split("\n\n")[0]


_BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "reference/plans-section.md": {"schedule": _schedule, "privacy": _privacy},
    "architecture.md": {"rooms": rooms},
    "explanation/nnunet-hooks.md": {"hooks": hooks},
}


def main() -> None:
    """Write what differs."""
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()

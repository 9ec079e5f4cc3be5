"""Draws docs/floors.svg, the folders of gain_ops on their floors: from the layers of import-linter and the imports as they are.

    python docs/draw_floors.py            draws
    python docs/draw_floors.py FOLDER     counts the imports of another checkout

Floors are the ``layers`` contract of pyproject.toml. A box is a folder, or a file that stands alone: the first sentence of its
docstring, its number of Python files, and what it imports, inside functions too. An import that goes up or sideways raises.
Only the standard library is needed. tests/test_architecture.py holds the committed picture to what this draws.
"""

import ast
import html
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "floors.svg"
PACKAGE = "gain_ops"
# where the files of a package lie, as setup.py maps them
FOLDERS = {PACKAGE: "gain_ops", f"{PACKAGE}.kernels": "kernels/gain"}

WIDTH, LEFT, GAP, PAD, LINE = 1000, 64, 12, 10, 16
CHARACTER = 6.8  # the width of one in the widest of the usual sans-serif fonts, at 11 px


def layers(root: Path = ROOT) -> list[list[str]]:
    """The floors from the top down, each a list of names below the package: the contract of import-linter."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [
        c
        for c in settings["tool"]["importlinter"]["contracts"]
        if c["type"] == "layers" and c["containers"] == ["gain_ops"]
    ]
    return [line.split(" | ") for line in contract["layers"]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The files of the package by their dotted names, a folder's ``__init__.py`` by the folder's."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(path: Path, known: Iterable[str]) -> set[str]:
    """Which of the known modules a file imports, wherever in the file that stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from gain_ops.ops import raw` imports a module, `from gain_ops.ops.raw import scale` a name of one
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & set(known)


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """The imports between modules."""
    files = modules(root)
    return {name: imports(path, files.keys()) - {name} for name, path in files.items()}


def box(module: str) -> str:
    """The box that a module is in: its first name below the package, or "" for the package's own ``__init__.py``."""
    return ".".join(module.split(".")[1:2])


def arrows(between: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports between boxes."""
    found: dict[str, set[str]] = {box(module): set() for module in between}
    for module, targets in between.items():
        found[box(module)] |= {box(target) for target in targets} - {box(module)}
    return found


def circles(between: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reached = {}
    for start in between:
        seen, todo = set(), list(between[start])
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += between[node]
        reached[start] = seen
    groups = {frozenset(other for other in reached[node] if node in reached[other]) for node in between}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def depth(between: Mapping[str, set[str]]) -> int:
    """How many floors the imports need: the nodes of the longest chain, a circle counted as one node."""
    head = {node: group[0] for group in circles(between) for node in group}
    floors: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in floors:
            members = [other for other in between if head.get(other, other) == node]
            below = {head.get(target, target) for member in members for target in between[member]} - {node}
            floors[node] = 1 + max(map(floor, below), default=0)
        return floors[node]

    return max(floor(head.get(node, node)) for node in between)


def counts(root: Path = ROOT) -> str:
    """What the imports of a checkout come to, in words; of an older one too, such as ``git archive`` writes."""
    files = graph(root)
    between = {name: targets - {""} for name, targets in arrows(files).items() if name}
    return (
        f"{len(between)} boxes, {sum(map(len, between.values()))} imports between them, {depth(between)} floors needed, "
        f"circles among files: {', '.join(f'one of {len(group)}' for group in circles(files)) or 'none'}"
    )


def refuse_upward(floors: list[list[str]], between: Mapping[str, set[str]]) -> None:
    """Raise SystemExit unless every import goes down and nobody inside imports the package's own ``__init__.py``."""
    height = {name: -i for i, names in enumerate(floors) for name in names} | {"": 1}
    if missing := between.keys() ^ height.keys():
        raise SystemExit(f"the layers of pyproject.toml and the folders differ in: {', '.join(sorted(missing))}")
    for source, targets in between.items():
        if wrong := sorted(target for target in targets if height[target] >= height[source]):
            raise SystemExit(f"{source} imports {', '.join(name or PACKAGE for name in wrong)}, which is not below it")


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring: its first paragraph."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].replace("``", "").split())


def picture(root: Path = ROOT) -> str:
    """The picture, as the text of an SVG."""
    floors, files = layers(root), modules(root)
    between = arrows(graph(root))
    refuse_upward(floors, between)
    order = [name for names in floors for name in names]
    top = 64
    body: list[str] = []
    for number, names in zip(range(len(floors), -1, -1), [[""], *floors], strict=True):
        width = (WIDTH - LEFT - GAP * len(names)) / len(names)
        texts = [_texts(name, files, [other for other in order if other in between[name]], width) for name in names]
        height = 2 * PAD + LINE * max(len(lines) for lines in texts)
        label = f"{number}" if number < len(floors) else ""
        body.append(_text(LEFT / 2 + 8, top + height / 2 + 5, label, "floor"))
        for i, lines in enumerate(texts):
            left = LEFT + i * (width + GAP)
            kind = "room" if label else "root"
            body.append(f'<rect class="{kind}" x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="4"/>')
            for j, (css, text) in enumerate(lines):
                body.append(_text(left + PAD, top + PAD + 12 + LINE * j, text, css))
        top += height + GAP
    count = sum(len(targets) for name, targets in between.items() if name)
    heading = f"gain_ops: {len(order)} boxes on {len(floors)} floors, {count} imports between them, every one downwards"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" aria-label="{heading}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{WIDTH}" height="{top}" fill="#fff"/>',
            _text(LEFT, 28, heading, "name"),
            _text(
                LEFT,
                48,
                "docs/draw_floors.py draws this from the source: change the code, then run it again.",
                "imports",
            ),
            *body,
            f'<path class="down" d="M16 64V{top - GAP}m-5 -9l5 9l5 -9"/>',
            "</svg>",
            "",
        ]
    )


_STYLE = """
text { font: 11px Helvetica, Arial, "DejaVu Sans", sans-serif; fill: #222 }
.name { font-weight: bold; font-size: 13px }
.imports { fill: #555; font-style: italic }
.floor { font-size: 15px; fill: #888; text-anchor: middle }
.room { fill: #eef3f9; stroke: #7d95b2 }
.down { fill: none; stroke: #888 }
.root { fill: #fff; stroke: #7d95b2; stroke-dasharray: 5 4 }
"""


def _texts(name: str, files: Mapping[str, Path], below: list[str], width: float) -> list[tuple[str, str]]:
    path = files[f"{PACKAGE}.{name}" if name else PACKAGE]
    count = sum(box(module) == name for module in files)
    folder = path.name == "__init__.py"
    if not name:
        title = "gain_ops/__init__.py"
    elif folder:
        title = f"{FOLDERS.get(f'{PACKAGE}.{name}', name)}/  ({count} files)"
    else:
        title = f"{name}.py"
    about = sentence(path) if name else "The public names. Nobody inside imports this file."
    columns = int((width - 2 * PAD) / CHARACTER)
    lines = [("name", title)]
    lines += [("about", line) for line in textwrap.wrap(about, columns)]
    lines += [("imports", line) for line in textwrap.wrap(f"imports {', '.join(below) or 'nothing of these'}", columns)]
    return lines


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:g}" y="{y:g}">{html.escape(text)}</text>'


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(counts(Path(sys.argv[1])))
    else:
        PICTURE.write_text(picture(), encoding="utf-8", newline="\n")
        print(f"{PICTURE.relative_to(ROOT)}: {counts()}")

"""Sections of text, tables and plots as one self-contained HTML file, and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gain_study.report.plots import Plot
from gain_study.report.tables import Strong, Table

__all__ = ["Bullets", "Section", "html", "markdown", "to_html", "to_markdown"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --line: #d5dae0; --dim: #5b6570; --head: #f2f4f6;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --paper: #15181c; --line: #363d45; --dim: #9aa4af;
  --head: #1f242a; --link: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
p, li { max-width: 48rem; } nav ul { padding-left: 1.2rem; } a { color: var(--link); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { background: var(--head); vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 7rem; }
tbody th, th.words, td.words { text-align: left; }
td.words { white-space: normal; min-width: 8rem; max-width: 32rem; }
figure { margin: 1.5rem 0; } figcaption { color: var(--dim); font-size: .875rem; max-width: 48rem; }
figure img { display: block; width: 100%; min-width: 40rem; background: #fff; border-radius: 4px; padding: .5rem; }
"""


@dataclass(frozen=True)
class Bullets:
    """Sentences, each with a bullet."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A heading and its blocks: paragraphs, bullets, tables and plots."""

    title: str
    blocks: Sequence[str | Bullets | Table | Plot]


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page that includes a table of contents, style and images."""
    contents = "\n".join(
        f'<li><a href="#s{number}">{escape(section.title)}</a></li>' for number, section in enumerate(sections, 1)
    )
    body = "\n".join(
        f'<section id="s{number}">\n<h2>{escape(section.title)}</h2>\n'
        + "\n".join(html(block) for block in section.blocks)
        + "\n</section>"
        for number, section in enumerate(sections, 1)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<nav aria-label="Contents">\n<ul>\n{contents}\n</ul>\n</nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same as Markdown; a plot is a link to its file in the same folder."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts += [f"## {_plain(section.title)}", *(markdown(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def html(block: str | Bullets | Table | Plot) -> str:
    """A block as HTML."""
    if isinstance(block, Bullets):
        return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in block.lines) + "\n</ul>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Plot):
        data = base64.b64encode(block.path.read_bytes()).decode("ascii")
        return (
            f'<figure>\n<div class="wide"><img alt="{escape(block.title)}" src="data:image/png;base64,{data}"></div>\n'
            f"<figcaption><strong>{escape(block.title)}.</strong> {escape(block.caption)}</figcaption>\n</figure>"
        )
    return f"<p>{escape(block)}</p>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col"{_class(table, at)}>{escape(text)}</th>' for at, text in enumerate(table.columns))
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td{_class(table, at)}>{_strong(text)}</td>" for at, text in enumerate(others, 1))
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    top = f"<thead><tr>{head}</tr></thead>\n" if any(table.columns) else ""
    body = "\n".join(rows)
    return f'<div class="wide" tabindex="0"><table>{caption}\n{top}<tbody>\n{body}\n</tbody>\n</table></div>'


def _class(table: Table, column: int) -> str:
    return ' class="words"' if column == 0 or column in table.words else ""


def _strong(text: str) -> str:
    return f"<strong>{escape(text)}</strong>" if isinstance(text, Strong) else escape(text)


def markdown(block: str | Bullets | Table | Plot) -> str:
    """A block as Markdown."""
    if isinstance(block, Bullets):
        return "\n".join(f"- {_plain(line)}" for line in block.lines)
    if isinstance(block, Table):
        rule = ["---" if at == 0 or at in block.words else "---:" for at in range(len(block.columns))]
        rows = [
            [f"**{_plain(text)}**" if isinstance(text, Strong) else _plain(text) for text in row] for row in block.rows
        ]
        lines = [f"| {' | '.join(row)} |" for row in ([_plain(text) for text in block.columns], rule, *rows)]
        return "\n".join([f"**{_plain(block.caption)}**\n", *lines] if block.caption else lines)
    if isinstance(block, Plot):
        return f"![{_plain(block.title)}]({block.path.name})"
    return _plain(block)


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to format."""
    for special in ("\\", "|", "*", "_", "`", "[", "]"):
        text = text.replace(special, f"\\{special}")
    return escape(" ".join(text.split()), quote=False)

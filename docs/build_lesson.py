"""Build docs/lesson.ipynb and docs/lesson.html from lesson_code.py: `python docs/build_lesson.py`.

jupytext reads the `# %%` cells, nbclient executes them, and nbconvert renders them as a page.
"""

import ast
import itertools
import re
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from pygments.formatters import HtmlFormatter

DOCS = Path(__file__).parent
LESSON = DOCS.parent / "lesson_code.py"

COLAB = """\
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]\
(https://colab.research.google.com/github/sysdr/aiml-p/blob/main/day144/day144_pytorch/docs/lesson.ipynb)

This notebook is built from `lesson_code.py`. Run its cells in order, each as often as you like.
Colab has all that it needs. The commands are for a terminal, in the folder of the project."""

ARGUMENTS = """\
# Options of the sections below: change them, and run the sections again.
device = select_device()
epochs = 100  # at least 1
seed = 0
output = Path("checkpoints")"""

FIGURE = """\
from IPython.display import Image

alt = "Left: w by iteration, with and without zero_(). Right: the loss by epoch."
Image(filename=str(output / "lesson.png"), metadata={"alt": alt})"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>PyTorch in five steps</title>
<style>
{highlight}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 100rem; padding: 0 1rem; color: #1f2328; background: #fff;
  font: 1rem/1.6 system-ui, sans-serif; }}
a {{ color: #0969da; }}
h2 {{ margin-top: 3rem; }}
code, pre {{ font: 0.8125rem/1.5 ui-monospace, Menlo, Consolas, monospace; }}
pre {{ margin: 0; padding: 0.75rem; overflow-x: auto; }}
.prompt, .anchor-link {{ display: none; }}
.text_cell {{ max-width: 50rem; overflow-wrap: anywhere; }}
.highlight, .text_cell pre {{ background: #f6f8fa; border-radius: 6px; }}
.code_cell {{ display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.75rem; margin: 1rem 0; }}
.output_wrapper {{ border-left: 3px solid #d1d9e0; }}
.output_wrapper img {{ display: block; max-width: 100%; height: auto; padding: 0.75rem; }}
@media (min-width: 83rem) {{
  .code_cell:has(.output_wrapper) {{ grid-template-columns: minmax(0, 50rem) minmax(0, 1fr); }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def read_lesson() -> NotebookNode:
    """Return lesson_code.py as a notebook, without the command line, which is its last cell."""
    cells = [new_markdown_cell(COLAB)]
    for cell in jupytext.read(LESSON).cells[:-1]:
        cells.extend(convert(cell))
    cells.append(new_code_cell(FIGURE))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def convert(cell: NotebookNode) -> Iterator[NotebookNode]:
    """Make of a `# %%` cell what reads well in a notebook.

    The docstring, and comments on lines of their own, become prose. Each definition is a cell. The
    body of the last function, the section, becomes small cells of top-level code, and so leaves
    variables that a reader can inspect.
    """
    code = cell.source
    if docstring := ast.get_docstring(ast.parse(code)):
        title, _, text = docstring.partition(": ")
        yield new_markdown_cell(f"# {title}\n\n{text[0].upper()}{text[1:]}")
        yield new_code_cell(code.partition('"""\n\n')[2])
        return
    yield new_markdown_cell(f"## {cell.metadata.title}")
    *definitions, section = code.split("\n\n\n")
    comments, _, function = section.rpartition("def ")  # Section 2 has comments only before it
    for part in [*definitions, comments]:
        yield from prose_and_code(part)
    if cell.metadata.title.startswith("Section 1"):
        yield new_code_cell(ARGUMENTS)
    body = textwrap.dedent(function.partition(":\n")[2])
    # A notebook always plots.
    body = re.sub(r"^if plot:\n((    .*\n)+)", lambda m: textwrap.dedent(m[1]), body, flags=re.M)
    for part in split(body):
        yield from prose_and_code(part)


def split(body: str) -> list[str]:
    """Split the body of a section at empty lines, before comments and before mistakes."""
    parts = [""]
    in_comment = False
    for line in body.splitlines():
        starts_comment = line.startswith("#") and not in_comment
        if not line or starts_comment or line.startswith("try:"):
            parts.append("")
        parts[-1] += line + "\n"
        in_comment = line.startswith("#")
    return parts


def prose_and_code(text: str) -> Iterator[NotebookNode]:
    """Make a text cell of leading comments, and a code cell of the rest."""
    lines = text.strip().splitlines()
    comments = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    if comments:
        yield new_markdown_cell(textwrap.dedent("\n".join(line[1:] for line in comments)))
    if code := lines[len(comments) :]:
        yield new_code_cell("\n".join(code))


def execute(notebook: NotebookNode) -> NotebookNode:
    """Execute the cells in one kernel, in an empty folder; return the notebook with its outputs."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        ).execute()
    return notebook


def render(notebook: NotebookNode) -> str:
    """Return the notebook, without its first cell, as a page that needs nothing else."""
    page = nbformat.v4.new_notebook(cells=notebook.cells[1:], metadata=notebook.metadata)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(page)
    return PAGE.format(highlight=HtmlFormatter().get_style_defs(".highlight"), body=body)


def main() -> None:
    """Write both files."""
    notebook = execute(read_lesson())
    nbformat.write(notebook, DOCS / "lesson.ipynb")
    (DOCS / "lesson.html").write_text(render(notebook), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Hook of mkdocs: notebooks are run when the site is built, and shown with what they then put out.

They are kept without outputs. A cell that raises ends the build.
"""

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

FOLDER = "notebooks/"
SECONDS = 300
"""Longest time of a cell."""


def on_files(files: Any, config: Any) -> Any:
    """A page for every notebook; the notebook itself stays, to be downloaded."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_uri.startswith(FOLDER) and file.src_uri.endswith(".ipynb")]:
        name = Path(file.src_uri).name
        page = markdown(run(Path(file.abs_src_path)), f"{name}")
        files.append(File.generated(config, str(Path(file.src_uri).with_suffix(".md")), content=page))
    return files


def run(path: Path) -> dict[str, Any]:
    """The notebook with its outputs, run in an empty folder.

    Raises:
        CellExecutionError: if a cell raises.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=SECONDS,
            startup_timeout=SECONDS,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        ).execute()
    return json.loads(nbformat.writes(notebook))


def markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook as a page."""
    parts = [cell_markdown(cell) for cell in notebook["cells"]]
    head, rest = parts[0], parts[1:]
    return "\n\n".join([head, f"[Download this notebook]({name}){{ download }}", *rest]) + "\n"


def cell_markdown(cell: dict[str, Any]) -> str:
    """A cell and its outputs."""
    source = _text(cell["source"])
    if cell["cell_type"] != "code":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *filter(None, map(output_markdown, cell["outputs"]))])


def output_markdown(output: dict[str, Any]) -> str:
    """What a cell put out: HTML and pictures as they are, else text. What was written to the log is left out."""
    if output["output_type"] == "stream":
        return f"```text\n{_text(output['text']).rstrip()}\n```" if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "text/html" in data:
        return f'<div class="output">\n{_text(data["text/html"])}\n</div>'
    if "image/svg+xml" in data:
        encoded = base64.b64encode(_text(data["image/svg+xml"]).encode()).decode()
        return f"![](data:image/svg+xml;base64,{encoded})"
    if "text/plain" in data:
        return f"```text\n{_text(data['text/plain'])}\n```"
    return ""


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)

"""Every block of code in the README and in the documentation runs and prints what it says."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import moe_fast
from pages import Differs, blocks, run_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a page may need beyond the package and its extras.
OPTIONAL = ("torch", "transformers", "jax", "pandas", "distributed")
EXTRAS = ("safetensors", "ml_dtypes", "typer", "matplotlib", "yaml")

if not (ROOT / "docs").exists():
    pytest.skip("the documentation does not lie beside the tests", allow_module_level=True)


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_reference_lists_every_public_name_and_nothing_deeper():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    names = {f"moe_fast.{name}" for name in moe_fast.__all__} - {"moe_fast.__version__"}
    tree = ast.parse(Path(moe_fast.__file__).with_name("torch.py").read_text())  # needs no torch
    (of_torch,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    names |= {f"moe_fast.torch.{name}" for name in of_torch}
    assert sorted(listed) == sorted(names)


def test_the_front_page_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages - {"index.md"} == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


def close_figures():
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_page(page):
    shell = any(block.language == "bash" for block in blocks(page))
    if shell and sys.platform == "win32":
        pytest.skip("holds blocks for bash")
    if shell and importlib.util.find_spec("typer") is None:
        pytest.skip("typer is not installed")
    try:
        run_page(page)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL + EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed")
    finally:
        close_figures()


def page_of(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_blocks_share_a_namespace_and_a_folder(tmp_path, capsys):
    page = page_of(tmp_path, """
```python
from pathlib import Path
number = 6
```

Prose, and in a list:

-   an item

    ```python
    Path("file").write_text(str(7 * number))
    ```

```pycon
>>> number + 1
7
```
""")  # fmt: skip
    assert run_page(page) == 3
    assert Path("file").read_text() == "42"


@pytest.mark.skipif(sys.platform == "win32", reason="runs bash")
def test_shell_blocks_run_in_this_environment(tmp_path):
    page = page_of(tmp_path, """
```bash
pip install what-does-not-exist
python -c 'import sys; print(sys.executable)' > python
```

```bash
echo one; echo two
```
```text
one
...o
```
""")  # fmt: skip
    assert run_page(page) == 2
    assert Path("python").read_text().strip() == sys.executable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1)\n```\n```text\n2\n```\n", r"page.md:2 prints\s+1\s+where.*has\s+2"),
        ("```pycon\n>>> 1\n2\n```\n", r"page.md.*Expected:\s+2\s+Got:\s+1"),
        pytest.param(
            "```bash\nfalse\ntrue\n```\n",
            "page.md:2 ends with exit code 1",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="runs bash"),
        ),
    ],
    ids=["python", "pycon", "bash"],
)
def test_a_block_that_does_something_else_is_found(tmp_path, text, message):
    with pytest.raises(Differs, match=f"(?s){message}"):
        run_page(page_of(tmp_path, text))


def test_an_error_has_the_line_of_the_page(tmp_path):
    with pytest.raises(ZeroDivisionError, match="division") as raised:
        run_page(page_of(tmp_path, "# Title\n\n```python\nx = 1\nx / 0\n```\n"))
    assert raised.traceback[-1].lineno + 1 == 5


def test_excepted_and_other_blocks_do_not_run(tmp_path):
    page = page_of(
        tmp_path,
        "<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n\n```yaml\nkey: 1\n```\n",
    )
    assert run_page(page) == 0

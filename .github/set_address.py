"""Write the address of the repository into what is published of it.

    python .github/set_address.py https://example.org/owner/moe_fast

The package index shows README.md far from the files that it links to, and pip users know nothing of
the repository. Only who publishes knows the address: the workflow calls this before it builds.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"(\]\(|^\[\w+\]: )(?![a-z]+:|#)([^)\s]+)", re.MULTILINE)
URLS = {
    "Homepage": "",
    "Documentation": "/tree/main/docs",
    "Source": "",
    "Issues": "/issues",
    "Changelog": "/blob/main/CHANGELOG.md",
}


def set_address(folder: Path, address: str) -> None:
    address = address.rstrip("/")

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[2].endswith((".png", ".svg")) else "blob"
        return f"{link[1]}{address}/{kind}/main/{link[2]}"

    readme = folder / "README.md"
    readme.write_text(LINK.sub(absolute, readme.read_text("utf-8")), "utf-8")
    lines = [f'{name} = "{address}{path}"' for name, path in URLS.items()]
    project = folder / "pyproject.toml"
    text = project.read_text("utf-8")
    marker = "\n[project.scripts]\n"
    assert text.count(marker) == 1
    urls = "\n".join(["", "[project.urls]", *lines, ""])
    project.write_text(text.replace(marker, urls + marker), "utf-8")
    site = folder / "mkdocs.yml"
    if site.exists():
        site.write_text(f"repo_url: {address}\n" + site.read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    set_address(Path(), sys.argv[1])

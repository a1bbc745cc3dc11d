# SPDX-License-Identifier: Apache-2.0

"""The documents: links to files of the repository lead somewhere, and the map in the README has every room."""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]


def links_of(document: Path) -> list[str]:
    """Targets of a document's links and images, those to the web left out."""
    tokens = [
        token
        for block in MarkdownIt("gfm-like", {"linkify": False}).parse(document.read_text())
        for token in block.children or []
    ]
    targets = [token.attrs.get("href") or token.attrs.get("src") for token in tokens]
    return [str(target) for target in targets if target and "://" not in str(target)]


def anchors_of(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    tokens = MarkdownIt().parse(document.read_text())
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for link in links_of(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors_of(target), link


def test_the_map_in_the_readme_has_every_room_once():
    rows = re.findall(r"^\| \[`(.+?)/?`\]\(trl_pgraft/\1\) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    rooms = {path.name for path in (ROOT / "trl_pgraft").iterdir() if (path / "__init__.py").exists()}
    assert sorted(rows) == sorted({*rooms, "config.py"})

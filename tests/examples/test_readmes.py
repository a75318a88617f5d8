"""The index names every example, and the links of all READMEs work."""

import re

import pytest
from readmes import REAL_WORLD

ROOT = REAL_WORLD.parent
INDEX = (REAL_WORLD / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path.parent.name for path in REAL_WORLD.glob("*/__main__.py"))
READMES = [ROOT / "README.md", REAL_WORLD / "README.md", *REAL_WORLD.glob("*/README.md")]


def test_index_names_every_example():
    assert "TODO" not in INDEX
    table = INDEX.split("| the article |")[1].split("\n\n")[0]
    assert sorted(set(re.findall(r"\]\((\w+)/README\.md", table))) == EXAMPLES
    root = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"-m real_world\.(\w+)", root)) <= set(EXAMPLES)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links(readme):
    text = readme.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\s*\)", text):
        if target.startswith("http"):
            continue
        path = (readme.parent / target) if target else readme
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{target}#{anchor}"

"""The pages that describe the code must be true of it."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_errors_is_that_of_the_sources() -> None:
    spec = importlib.util.spec_from_file_location("list_errors", ROOT / "tools" / "list_errors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python tools/list_errors.py"
    assert "`server_lost`" in module.page() and "`unknown_words`" in module.page()


def test_every_link_of_the_pages_leads_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_nobody_is_sent_to_a_package_that_the_index_does_not_have() -> None:
    """The name `track4d` is nobody's there: whoever takes it would be installed."""
    pages = [ROOT / "README.md", *(path for folder in ("docs", "addon", "server", "protocol", "tools")
                                   for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py"))]  # fmt: skip
    assert not [path for path in pages if re.search(r"pip install ['\"]?track4d\b", path.read_text("utf-8"))]

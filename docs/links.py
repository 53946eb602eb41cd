"""Check that every link within a built site has a target, and that no page fetches anything from another site. Checked
in tests/test_docs.py on wrong pages."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Elements that a browser fetches without a click.
FETCHED = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}
NOT_FETCHED = {"canonical", "next", "prev", "author", "search"}  # link elements that only tell


class Links(HTMLParser):
    """The names on a page, and where it leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[tuple[str, bool]] = []  # where to, and whether the browser goes there by itself
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.names |= {found[key] for key in ("id", "name") if key in found}
        for key in ("href", "src", "data"):
            if key in found:
                by_itself = (tag, key) in FETCHED and found.get("rel") not in NOT_FETCHED
                self.links.append((found[key], by_itself))


def problems(site: Path) -> list[str]:
    """A sentence for each link that leads nowhere, and for each thing that is fetched from elsewhere."""
    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]  # there: a theme's templates
    pages = {path.resolve(): Links(path.read_text("utf-8")) for path in files}
    found = []
    for path, page in pages.items():
        if "_modules" in path.parts:
            continue  # Sphinx leaves the source pages of an earlier build as they were
        name = path.relative_to(site.resolve()).as_posix()
        for link, by_itself in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            if parts.scheme or parts.netloc:
                found += [f"{name}: fetches {link}"] if by_itself else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in {*pages[target].names, ""}:
                found.append(f"{name}: {link} has no such place on its page")
    return found

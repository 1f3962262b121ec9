"""What MkDocs does not do by itself: pages that are made when the site is built, links that leave docs/, notebooks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
_LOADER = re.compile(
    r'<script(?: src="">| type="text/x-mathjax-config">| type="module">(?=[^<]*mermaid)).*?</script>', re.DOTALL
)
_PAGE_LINK = re.compile(r'href="((?![a-z]+:)[^"#]+)\.(?:md|ipynb)(#[^"]*)?"')
_OUTWARD = re.compile(r"\]\((?:\.\./)+((?:benchmarks|dpsyngen)/[\w./-]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, the reference of the command line, and the files outside of docs/ that pages link to."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from docs.tools.commands import reference_page
    from docs.tools.settings import settings_page

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    made = {"changelog.md": changelog, "reference/cli.md": reference_page(), "reference/settings.md": settings_page()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    linked = {m for page in files.documentation_pages() if page.src_uri.endswith(".md") for m in _outward_links(page)}
    for path in sorted(linked):
        if (ROOT / path).is_file():
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def _outward_links(page: File) -> list[str]:
    return _OUTWARD.findall(page.content_string)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to the copies in the site; one that leads nowhere stays, and fails the build."""
    up = "../" * page.file.src_uri.count("/")
    return _OUTWARD.sub(
        lambda m: f"]({up}files/{m[1]})" if files.get_file_from_path(f"files/{m[1]}") else m[0], markdown
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages from notebooks: without loaders of scripts from elsewhere, and with links to pages instead of sources."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return _PAGE_LINK.sub(r'href="\1.html\2"', _LOADER.sub("", html))


def on_post_build(config: MkDocsConfig) -> None:
    """The search index once more as a script: from the disk, pages may load no JSON."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}\n", encoding="utf-8")

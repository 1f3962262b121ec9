"""The documentation: it builds without a warning, fetches nothing, and its commands, code and figures are true."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from inspect import cleandoc, signature
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from docs.figures.make import DRAWINGS
from docs.tools.commands import commands, is_option, reference_page
from docs.tools.settings import settings_page
from dpsyngen.config import Config, preset_names
from dpsyngen.diffusion.stages import VARIANTS
from dpsyngen.privacy.accounting import Mechanism, _bound
from dpsyngen.programs import program_names
from tests.report.chromium import inspect, needs_chromium

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
BLOCK = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`(dpsyngen [^`\n]+)`(?!`)")
LARGEST_FIGURE = 200_000


# ------------------------------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    pytest.importorskip("material", reason="the extra 'docs' is not installed")
    out = tmp_path_factory.mktemp("site")
    # Not with --quiet, which keeps mkdocs from counting its warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"mkdocs build --strict:\n{done.stdout}{done.stderr}"
    assert "WARNING" not in done.stdout + done.stderr
    return out


class Fetched(HTMLParser):
    """Addresses that a browser loads to show a page; links that a reader may follow are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.addresses.append(found.get("src", ""))
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.addresses.append(found.get("href", ""))
        self.addresses += re.findall(r"url\(([^)]*)\)", found.get("style", ""))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_holds_every_kind_of_page(site: Path) -> None:
    for page in ("index", "getting-started", "concepts/stages", "how-to/resume", "reference/privacy", "reference/cli"):
        assert (site / f"{page}.html").is_file(), page
    assert "0.1.0" in (site / "changelog.html").read_text(encoding="utf-8")
    assert "PerExampleGradients" in (site / "reference/privacy.html").read_text(encoding="utf-8")
    assert (site / "files/benchmarks/results/dp-step-2-cores.json").is_file(), "links out of docs/ lead to a copy"


@pytest.mark.slow
def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = Fetched()
        page.feed(path.read_text(encoding="utf-8"))
        outside = [a for a in page.addresses if re.match(r"(https?:)?//", a)]
        assert not outside, f"{path.relative_to(site)} loads {outside}"
        text = re.sub(r"base64,[\w+/=]+", "", path.read_text(encoding="utf-8"))  # a picture may spell anything
        assert "cdn" not in text, f"{path.relative_to(site)} can load a script"
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path


class Linked(HTMLParser):
    """Links of a page, and the names that can be linked to on it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.names |= {found[k] for k in ("id", "name") if k in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])


@pytest.mark.slow
def test_every_link_leads_somewhere_also_in_notebooks_and_the_reference(site: Path) -> None:
    pages = {path.resolve(): Linked(path) for path in site.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link) or path.name == "404.html":
                continue
            target, _, name = unquote(link).partition("#")
            there = (path.parent / target).resolve() if target else path
            if not there.exists() or (name and there in pages and name not in pages[there].names):
                lost.append(f"{path.relative_to(site.resolve())}: {link}")
    assert not lost, "\n".join(lost)


@pytest.mark.slow
def test_no_docstring_is_shown_raw(site: Path) -> None:
    for path in (site / "reference").glob("*.html"):
        text = re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))
        assert not re.search(r":(class|func|meth|mod|data|attr):", text), f"{path.name}: a Sphinx role"
        assert "```" not in text, f"{path.name}: a fence"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("page", ["index", "concepts/differential-privacy", "reference/diffusion"])
@pytest.mark.parametrize("width", [1280, 400])
def test_pages_open_from_the_disk_without_errors_or_requests(site: Path, page: str, width: int) -> None:
    seen = inspect(site / f"{page}.html", width=width, dark=width == 400)
    assert seen.errors == []
    assert seen.broken == []
    assert [r for r in seen.requests if not r.startswith(site.as_uri())] == []
    assert seen.overflow == 0


@pytest.mark.slow
@needs_chromium
def test_search_works_from_the_disk(site: Path) -> None:
    search = """(async () => {
      const field = document.querySelector("input[name=query]");
      field.focus(); field.value = "hash-chained"; field.dispatchEvent(new Event("input", {bubbles: true}));
      field.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true, key: "d"}));
      for (let i = 0; i < 200; i++) {
        if (document.querySelector(".md-search-result__item")) break;
        await new Promise(done => setTimeout(done, 100));
      }
      return document.querySelectorAll(".md-search-result__item").length;
    })()"""
    assert inspect(site / "index.html", expression=search).value > 0


# ------------------------------------------------------------------------------------------ commands and code


def blocks(path: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """The code blocks of a page in one of `languages`, each with the number of its first line."""
    text = path.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[3] in languages:
            lines = [line.removeprefix(match[1]) for line in match[4].splitlines()]
            yield text[: match.start()].count("\n") + 2, "\n".join(lines)


def shown_commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command line of dpsyngen on a page: where it is, and its words."""
    for number, block in blocks(path, "", "sh", "bash", "console"):
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            line = line.removeprefix("$ ").strip()
            words = re.sub(r"^(?:.* )?-m dpsyngen ", "dpsyngen ", line) if "-m dpsyngen" in line else line
            if words.startswith("dpsyngen "):
                yield f"{path.name}:{number}: {line}", shlex.split(words, comments=True)
    for match in CODE.finditer(path.read_text(encoding="utf-8")):
        try:
            yield f"{path.name}: `{match[1]}`", shlex.split(match[1])
        except ValueError:
            continue


def problem_of(words: list[str], known: dict[tuple[str, ...], Any], whole: bool) -> str | None:
    """What is wrong with a command line; None if nothing is.

    Args:
        words: the line, "dpsyngen" first.
        known: all commands.
        whole: whether required options and arguments must be there, as in a block that can be pasted.
    """
    given = words[1:]
    if given and given[0] in ("--version", "--help", "-h", "COMMAND", "…"):
        return None
    name = next((tuple(given[:n]) for n in (2, 1) if tuple(given[:n]) in known), None)
    if name is None:
        group = any(k[0] == given[0] for k in known) if given else True
        return None if group and len(given) < 2 and not whole else f"there is no command {' '.join(given[:2])!r}"
    command, rest = known[name], given[len(name) :]
    options = {o: p for p in command.params if is_option(p) for o in (*p.opts, *p.secondary_opts)}
    arguments, used, k = 0, set(), 0
    while k < len(rest):
        word, _, value = rest[k].partition("=")
        k += 1
        if re.fullmatch(r"-[a-z]", word) or word.startswith("--"):
            if word not in options:
                return f"{' '.join(name)} has no option {word}"
            used.add(options[word].name)
            if not options[word].is_flag and not value:
                k += 1
                if k > len(rest) and whole:
                    return f"{word} needs a value"
                value = rest[k - 1] if k <= len(rest) else ""
            if name in (("train",), ("stages",)) and (wrong := wrong_value(word, value)):
                return wrong
        elif word not in ("…", "..."):
            arguments += 1
    if not whole or "…" in words:
        return None
    missing = [p.opts[0] for p in command.params if is_option(p) and p.required and p.name not in used]
    needed = sum(1 for p in command.params if not is_option(p) and p.required)
    if missing or arguments < needed:
        return f"it lacks {', '.join(missing) or 'an argument'}"
    most = sum(1 for p in command.params if not is_option(p))
    unlimited = any(p.nargs == -1 for p in command.params if not is_option(p))
    return None if unlimited or arguments <= most else f"{' '.join(name)} takes no more than {most} arguments"


def wrong_value(option: str, value: str) -> str | None:
    """What is wrong with a setting's name, or with the name of a preset, variant or program; None if nothing is."""
    names: dict[str, tuple[str, ...]] = {
        "--preset": preset_names(),
        "--variant": VARIANTS,
        "--program": program_names(),
    }
    if option in names and value not in (*names[option], "…"):
        return f"there is no {option.removeprefix('--')} {value!r}"
    if option == "--set":
        section, _, field = value.partition("=")[0].partition(".")
        fields = getattr(Config.model_fields.get(section), "annotation", None)
        if field.partition(".")[0] not in getattr(fields, "model_fields", {}) and section != "SECTION":
            return f"there is no setting {section}.{field}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_shown_exists_with_these_options(page: Path) -> None:
    known = commands()
    wrong = []
    for where, words in shown_commands(page):
        problem = problem_of(words, known, whole=":" in where.split(" ")[0].removesuffix(":"))
        if problem:
            wrong.append(f"{where}\n    {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("dpsyngen train --data x --epsilon 1 --out y", None),
        ("dpsyngen train --data x --epsilon 1", "it lacks --out"),
        ("dpsyngen train --data x --epsylon 1 --out y", "train has no option --epsylon"),
        ("dpsyngen train --data x --epsilon 1 --set private.noise=discrete --out y", None),
        ("dpsyngen train --data x --epsilon 1 --set private.sound=loud --out y", "there is no setting private.sound"),
        ("dpsyngen train --data x --epsilon 1 --preset quick --out y", "there is no preset 'quick'"),
        ("dpsyngen practise --out y", "there is no command 'practise --out'"),
        ("dpsyngen budget make x", "there is no command 'budget make'"),
        ("dpsyngen report", "it lacks an argument"),
        ("dpsyngen report a b", "report takes no more than 1 arguments"),
        ("dpsyngen ledger a b c", None),
        ("dpsyngen sample a -n 5 --out", "--out needs a value"),
    ],
)
def test_wrong_commands_would_be_found(line: str, problem: str | None) -> None:
    assert problem_of(shlex.split(line), commands(), whole=True) == problem


def misfit(call: ast.Call, known: dict[str, Any]) -> str | None:
    """What is wrong with the arguments of a call of ours; None if nothing is, or if it calls nothing that is known."""
    path, root = list[str](), call.func
    while isinstance(root, ast.Attribute):
        path.insert(0, root.attr)
        root = root.value
    target = known.get(root.id) if isinstance(root, ast.Name) else None
    for name in path:
        target = getattr(target, name, None)
    spread = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
    if spread or not callable(target):
        return None
    try:
        signature(target).bind(*call.args, **{str(k.arg): k.value for k in call.keywords})
    except TypeError as error:
        return f"{ast.unparse(call)}: {error}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_python_block_compiles_imports_what_is_there_and_gives_what_it_takes(page: Path) -> None:
    import dpsyngen

    # What the pages call by these names, without anything in it.
    known: dict[str, Any] = {"dpsyngen": dpsyngen}
    known |= {"generator": object.__new__(dpsyngen.Generator), "samples": object.__new__(dpsyngen.Samples)}
    for number, block in blocks(page, "python", "py"):
        tree = ast.parse(block, filename=f"{page.name}:{number}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dpsyngen":
                module = __import__(str(node.module), fromlist=[a.name for a in node.names])
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}:{number}: {node.module} has no {name.name}"
                    known[name.asname or name.name] = getattr(module, name.name)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dpsyngen":
                assert hasattr(dpsyngen, node.attr), f"{page.name}:{number}: dpsyngen has no {node.attr}"
        wrong = [m for node in ast.walk(tree) if isinstance(node, ast.Call) and (m := misfit(node, known))]
        assert not wrong, f"{page.name}:{number}: {wrong}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("dpsyngen.train('photos/', epsilon=3, out='r')", None),
        ("dpsyngen.train('photos/', epsilon=3, out='r', epsylon=3)", "unexpected keyword argument 'epsylon'"),
        ("dpsyngen.write_samples(samples, 'synthetic')", "missing a required argument"),
        ("print(anything)", None),
    ],
)
def test_wrong_calls_would_be_found(line: str, problem: str | None) -> None:
    import dpsyngen

    (call,) = (node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call))
    found = misfit(call, {"dpsyngen": dpsyngen})
    assert found is None if problem is None else problem in str(found)


def test_the_reference_of_the_command_line_has_every_command_and_option() -> None:
    page = reference_page()
    for words, command in commands().items():
        assert f"\n## {' '.join(words)}\n" in page
        for parameter in command.params:
            if is_option(parameter) and "--help" not in parameter.opts:
                assert f"`{parameter.opts[0]}`" in page


def test_the_reference_of_the_settings_has_every_setting() -> None:
    page = settings_page()
    for section, field in Config.model_fields.items():
        for name in getattr(field.annotation, "model_fields", {}):
            assert f"| `{section}.{name}` | " in page


def test_docstrings_of_ours_become_what_griffe_reads() -> None:
    griffe = pytest.importorskip("griffe", reason="the extra 'docs' is not installed")
    from docs.tools.docstrings import rewrite

    text = """Do it, see :func:`there`.

    Args:
        a, b: both of them,
            as said.
        c: another.

    Formal guarantee: none.

        >>> 1 + 1
        2
    """
    assert rewrite(cleandoc(text), griffe.Function("do")).splitlines() == [
        "Do it, see `there`.",
        "",
        "Args:",
        "    a: both of them,",
        "        as said.",
        "    b: as ``a``.",
        "    c: another.",
        "",
        "**Formal guarantee:** none.",
        "",
        "```pycon",
        ">>> 1 + 1",
        "2",
        "```",
    ]


# ------------------------------------------------------------------------------------------ figures


def almost_equal(a: str, b: str) -> bool:
    """The same but for numbers that differ by less than a pixel: the last digits of a machine's arithmetic."""
    number = re.compile(r"-?\d+\.\d+")
    if number.sub("#", a) != number.sub("#", b):
        return False
    pairs = zip(number.findall(a), number.findall(b), strict=True)
    return all(abs(float(x) - float(y)) <= 0.5 for x, y in pairs)


def epsilon_to_a_pixel(mechanisms: list[Mechanism], delta: float, _: str = "pld", group_size: int = 1) -> float:
    """ε on a grid eight times as coarse, which a picture does not show."""
    return _bound.__wrapped__(tuple(mechanisms), delta, group_size, (), 8).epsilon


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "epsilon.svg" else n for n in DRAWINGS]
)
def test_figures_are_what_the_code_draws_now(name: str, monkeypatch) -> None:
    monkeypatch.setattr("docs.figures.epsilon.epsilon", epsilon_to_a_pixel)
    kept = (DOCS / "figures" / name).read_text(encoding="utf-8")
    assert almost_equal(DRAWINGS[name](), kept), "run: make figures"


def test_new_figures_are_small_and_have_an_alternative_text() -> None:
    for path in DOCS.joinpath("figures").iterdir():
        assert path.stat().st_size < LARGEST_FIGURE, path.name
    for page in PAGES:
        for alternative in re.findall(r"!\[([^\]]*)\]\(", page.read_text(encoding="utf-8")):
            assert alternative.strip(), f"{page.name}: a picture without words"

"""Documents as sections of plain text or Markdown: Markdown, text, HTML and PDF files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

KINDS = {
    ".md": "Markdown", ".markdown": "Markdown", ".txt": "text", ".text": "text", ".rst": "text", ".html": "HTML",
    ".htm": "HTML", ".xhtml": "HTML", ".pdf": "PDF",
}  # fmt: skip
"""What is read, by the file name's ending."""

_CHROME = ("script", "style", "template", "noscript", "nav", "footer", "aside", "form", "svg", "iframe")
_WIDE, _EVEN = 50, 0.6  # characters of a wrapped text's longest line; of that the shortest but a paragraph's last
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """What stands under one heading, or on one page of a PDF."""

    headings: tuple[str, ...]
    """The heading and those above it, outermost first."""
    text: str
    page: int | None = None
    """Counted from 1; of PDFs alone."""


def read_document(path: str | Path) -> list[Section]:
    """A document's sections, in order.

    Args:
        path: a Markdown, text (UTF-8, or UTF-16 with a mark), HTML or PDF file, by the ending of its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its kind is not known, it cannot be decoded or is damaged or locked, or holds no text.
        ImportError: the library that reads it is missing; the message says how to install it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no document {path}: there is no such file")
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path.name}: the ending {path.suffix!r} is not known; expected one of {', '.join(KINDS)}")
    data = path.read_bytes()
    if kind == "PDF":
        sections = _pdf(path, data)
    elif kind == "HTML":
        sections = _markdown(_html(data))
    else:
        text = _decoded(path, data)
        sections = _markdown(text) if kind == "Markdown" else [Section((), _unwrapped(text))]
    sections = [section for section in sections if section.text.strip()]
    if not sections:
        more = "; if it holds scanned pages, recognise their text first (OCR)" if kind == "PDF" else ""
        raise ValueError(f"{path.name}: the document holds no text{more}")
    return sections


def _decoded(path: Path, data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: byte {error.start} is no {error.encoding} text; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path.name}: this is a binary file, not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _markdown(text: str) -> list[Section]:
    """Sections by heading; their text stays Markdown."""
    parser = _library("markdown_it", "Markdown").MarkdownIt("commonmark").enable("table")
    lines: list[str | None] = [*_FRONT_MATTER.sub("", text, count=1).splitlines()]
    tokens = parser.parse("\n".join(lines))
    sections, path, start = [], [], 0

    def section(end: int | None) -> Section:
        standing = [line for line in lines[start:end] if line is not None]
        return Section(tuple(title for _, title in path), "\n".join(standing).strip())

    for number, token in enumerate(tokens):
        if token.type == "paragraph_open":
            _join(lines, *token.map)
        if token.type == "html_block" and token.content.lstrip().startswith("<!--"):
            lines[slice(*token.map)] = [""] * (token.map[1] - token.map[0])
        if token.type != "heading_open" or token.level:  # a heading inside a quotation is none of the document's
            continue
        sections.append(section(token.map[0]))
        level, title = int(token.tag[1]), tokens[number + 1].content.strip()
        path = [*(pair for pair in path if pair[0] < level), (level, title)]
        start = token.map[1]
    return [*sections, section(None)]


def _join(lines: list[str | None], start: int, end: int) -> None:
    """Join a paragraph's lines, but where it asks for a break by two spaces or a backslash."""
    to = start
    for number in range(start + 1, end):
        if lines[to].endswith(("  ", "\\")):
            to = number
        else:
            lines[to], lines[number] = f"{lines[to].rstrip()} {lines[number].lstrip(' >')}", None


def _html(data: bytes) -> str:
    """The page's own text as Markdown, without scripts, menus and footers."""
    soup = _library("bs4", "HTML").BeautifulSoup(data, "html.parser")
    for element in soup(_CHROME):
        element.decompose()
    body = soup.find("main") or soup.find("article") or soup.body or soup
    convert = _library("markdownify", "HTML").MarkdownConverter(
        heading_style="ATX", strip=["a", "img"], escape_underscores=False, escape_asterisks=False
    )
    return convert.convert_soup(body)


def _pdf(path: Path, data: bytes) -> list[Section]:
    pypdf = _library("pypdf", "PDF")
    from io import BytesIO

    try:
        reader = pypdf.PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError(f"{path.name}: the PDF is locked by a password; save it without one")
        pages = [page.extract_text() or "" for page in reader.pages]
    except (pypdf.errors.PyPdfError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name}: the PDF cannot be read ({error or type(error).__name__})") from error
    return [Section((), _flowing(text), number) for number, text in enumerate(pages, 1)]


def _unwrapped(text: str) -> str:
    """A plain text, its paragraphs' lines joined where they are wrapped: all but the last about as long as a page is
    wide. Lists, addresses and verses stay."""

    def flow(paragraph: str) -> str:
        lengths = [len(line) for line in paragraph.splitlines()]
        wrapped = len(lengths) > 1 and min(lengths[:-1]) >= _EVEN * max(lengths) and max(lengths) >= _WIDE
        return _flowing(paragraph) if wrapped else paragraph

    return "\n\n".join(flow(paragraph) for paragraph in re.split(r"\n\s*\n", text))


def _flowing(text: str) -> str:
    """A page's lines joined to paragraphs: a line break inside a sentence is the page's, not the text's."""
    text = re.sub(r"(?<=\w)-\n(?=[a-zà-ÿ])", "", text)
    return re.sub(r"(?<![\n.!?:;。！？])[ \t]*\n[ \t]*(?=[^\n\s•*\-–—\d])", " ", text)


def _library(name: str, kind: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"reading {kind} needs the library {name}: pip install 'qf-peft[documents]'") from error

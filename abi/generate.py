#!/usr/bin/env python3
"""Generate the Go and Python views of ring.h, the one definition of shared memory, and static asserts of every offset that they use.

    python abi/generate.py          write ring/abi.go, python/src/dmi/_abi.py and abi/golden/offsets.h
    python abi/generate.py --check  fail where they differ from what would be written

Only what ring.h uses is understood: integer #defines, enums, plain structs of fixed-width integers, arrays and
other structs. Its DMI_STATIC_ASSERTs are checked against the layout computed here, so that a view cannot be
generated from a misunderstanding.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "abi" / "ring.h"
GO = ROOT / "ring" / "abi.go"
PYTHON = ROOT / "python" / "src" / "dmi" / "_abi.py"
OFFSETS = ROOT / "abi" / "golden" / "offsets.h"

SCALARS = {"uint8_t": 1, "uint16_t": 2, "uint32_t": 4, "uint64_t": 8}
GO_SCALARS = {"uint8_t": "uint8", "uint16_t": "uint16", "uint32_t": "uint32", "uint64_t": "uint64"}
CTYPES = {"uint8_t": "c_uint8", "uint16_t": "c_uint16", "uint32_t": "c_uint32", "uint64_t": "c_uint64"}


@dataclass
class Field:
    type: str
    name: str
    count: int  # 0: not an array
    comment: str
    offset: int = 0
    bytes: int = 0

    @property
    def padding(self) -> bool:
        return re.fullmatch(r"(spare|pad)\d*", self.name) is not None


@dataclass
class Struct:
    name: str
    fields: list[Field]
    size: int
    align: int


@dataclass
class Header:
    defines: dict[str, tuple[int, str]]  # value, C suffix
    enums: dict[str, dict[str, int]]
    structs: dict[str, Struct]


def fail(message: str) -> None:
    raise SystemExit(f"abi/generate.py: {message}")


def parse(text: str) -> Header:
    comments: list[str] = []

    def keep(match: re.Match[str]) -> str:
        comments.append(" ".join(match.group(0)[2:-2].split()))
        return f"@{len(comments) - 1}@"

    text = re.sub(r"/\*.*?\*/", keep, text, flags=re.DOTALL)
    bare = re.sub(r"@\d+@", "", text)

    defines = {}
    for name, value, suffix in re.findall(
        r"^#define (DMI_\w+) (0x[0-9a-fA-F]+|\d+)(ull|u)?[ \t]*$", bare, re.MULTILINE
    ):
        defines[name] = (int(value, 0), suffix)

    def number(word: str) -> int:
        return defines[word][0] if word in defines else int(word, 0)

    enums: dict[str, dict[str, int]] = {}
    for name, body in re.findall(r"^enum (\w+) \{(.*?)\};", bare, re.MULTILINE | re.DOTALL):
        enums[name] = {}
        for item in filter(None, (part.strip() for part in body.split(","))):
            key, equals, value = item.partition("=")
            if not equals:
                fail(f"enum {name}: {item} has no value; give every member one")
            enums[name][key.strip()] = number(value.strip())

    structs: dict[str, Struct] = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        fields, offset, align = [], 0, 1
        pattern = r"(struct \w+|uint\d+_t) (\w+)(?:\[(\w+)\])?;[ \t]*(?:@(\d+)@)?"
        for kind, field_name, count, comment in re.findall(pattern, body):
            kind = kind.removeprefix("struct ")
            element = SCALARS[kind] if kind in SCALARS else structs[kind].size
            natural = SCALARS[kind] if kind in SCALARS else structs[kind].align
            field = Field(kind, field_name, number(count) if count else 0, comments[int(comment)] if comment else "")
            field.offset = -(-offset // natural) * natural
            field.bytes = element * max(field.count, 1)
            if field.offset != offset:
                fail(f"struct {name}: {field_name} needs hidden padding at {offset}; write it out")
            offset, align = field.offset + field.bytes, max(align, natural)
            fields.append(field)
        if bare_fields := len(re.findall(r";", re.sub(r"@\d+@", "", body))) - len(fields):
            fail(f"struct {name}: {bare_fields} fields not understood")
        if offset % align:
            fail(f"struct {name}: its size {offset} is no multiple of {align}; write the padding out")
        structs[name] = Struct(name, fields, offset, align)

    asserts = 0
    for name, size in re.findall(r"DMI_STATIC_ASSERT\(sizeof\(struct (\w+)\) == (\d+),", bare):
        asserts += 1
        if structs[name].size != int(size):
            fail(f"struct {name}: {structs[name].size} bytes by this parser, {size} by its static assert")
    for name, member, at in re.findall(r"DMI_STATIC_ASSERT\(offsetof\(struct (\w+), (\w+)\) == (\d+),", bare):
        asserts += 1
        offset = next(f.offset for f in structs[name].fields if f.name == member)
        if offset != int(at):
            fail(f"struct {name}: {member} at {offset} by this parser, at {at} by its static assert")
    if asserts != len(re.findall(r"^DMI_STATIC_ASSERT\(", bare, re.MULTILINE)):
        fail("a static assert was not understood")
    return Header(defines, enums, structs)


# ------------------------------------------------------------------ names
INITIALISMS = {"ABI", "CPU", "CUDA", "IO", "NS", "ID", "PID"}
SPELLINGS = {"DTYPE": "DType", "INT8": "Int8", "NDIM": "NDim"}


def camel(name: str) -> str:
    out = ""
    for word in name.upper().split("_"):
        keep = word in INITIALISMS or any(c.isdigit() for c in word)
        out += SPELLINGS.get(word, word if keep else word.capitalize())
    return out


# What would read wrongly as a bare Go name: ring.Open is a verb.
GO_STRUCTS = {"dmi_open": "OpenRecord", "dmi_close": "CloseRecord", "dmi_gap": "GapRecord"}


def go_struct(name: str) -> str:
    return GO_STRUCTS.get(name, camel(name.removeprefix("dmi_")))


# ------------------------------------------------------------------ Go
def go_view(header: Header) -> str:
    out = [
        "// Code generated by abi/generate.py from abi/ring.h; DO NOT EDIT.",
        "",
        "package ring",
        "",
        'import "encoding/binary"',
        "",
        "const (",
    ]
    rows = []
    for name, (value, suffix) in header.defines.items():
        kind = {"ull": " uint64", "u": " uint32", "": ""}[suffix]
        literal = f"{value:#x}" if suffix else str(value)
        rows.append((camel(name.removeprefix("DMI_")) + kind, f"= {literal}", ""))
    out += go_columns(rows, split_first=True) + [")", ""]
    for enum, members in header.enums.items():
        out += [f"// enum {enum}", "const ("]
        out += go_columns([(camel(m.removeprefix("DMI_")), f"= {v}", "") for m, v in members.items()]) + [")", ""]
    for struct in header.structs.values():
        go = go_struct(struct.name)
        out += [f"// struct {struct.name}: size and offsets in bytes.", "const ("]
        rows = [(f"{go}Size", f"= {struct.size}", "")]
        rows += [(f"{go}{camel(f.name)}Offset", f"= {f.offset}", "") for f in struct.fields if not f.padding]
        out += go_columns(rows) + [")", ""]
        if any(f.type in header.structs for f in struct.fields) or struct.name == "dmi_word":
            continue  # words that both sides touch are reached by offset and atomics, never decoded as a whole
        out += [f"// {go} is a copy of struct {struct.name}.", f"type {go} struct {{"]
        rows = []
        for f in struct.fields:
            if not f.padding:
                array = f"[{f.count}]" if f.count else ""
                rows.append((camel(f.name), array + GO_SCALARS[f.type], f"// {f.comment}" if f.comment else ""))
        out += go_columns(rows) + ["}", ""]
        receiver = go[0].lower()
        if receiver == "b":
            receiver = "s"
        out += [
            f"// Decode reads {receiver} from the first {go}Size bytes of b.",
            f"func ({receiver} *{go}) Decode(b []byte) {{",
            f"\t_ = b[{go}Size-1]",
        ]
        out += [line for f in struct.fields if not f.padding for line in go_move(receiver, f, encode=False)]
        out += [
            "}",
            "",
            f"// Encode writes {receiver} to the first {go}Size bytes of b; padding becomes zero.",
            f"func ({receiver} *{go}) Encode(b []byte) {{",
            f"\tclear(b[:{go}Size])",
        ]
        out += [line for f in struct.fields if not f.padding for line in go_move(receiver, f, encode=True)]
        out += ["}", ""]
    return "\n".join(out[:-1]) + "\n"


def go_columns(rows: list[tuple[str, str, str]], split_first: bool = False) -> list[str]:
    """Lay columns out as gofmt does."""
    if split_first:  # name, type, value: types align among themselves where there are any
        names = max(len(r[0].split(" ")[0]) for r in rows)
        kinds = max(len(r[0].partition(" ")[2]) for r in rows)
        return [f"\t{r[0].split(' ')[0]:<{names}} {r[0].partition(' ')[2]:<{kinds}} {r[1]}" for r in rows]
    first = max(len(r[0]) for r in rows)
    lines = [(f"\t{a:<{first}} {b}", c) for a, b, c in rows]
    out = []
    for i, (line, comment) in enumerate(lines):
        if not comment:
            out.append(line)
            continue
        low = i
        while low > 0 and lines[low - 1][1]:
            low -= 1
        high = i
        while high + 1 < len(lines) and lines[high + 1][1]:
            high += 1
        width = max(len(text) for text, _ in lines[low : high + 1])
        out.append(f"{line:<{width}} {comment}")
    return out


def go_move(receiver: str, f: Field, encode: bool) -> list[str]:
    name, bits = f"{receiver}.{camel(f.name)}", SCALARS[f.type] * 8
    if f.type == "uint8_t" and f.count:
        pair = (f"b[{f.offset}:{f.offset + f.bytes}]", f"{name}[:]")
        return [f"\tcopy({pair[0]}, {pair[1]})" if encode else f"\tcopy({pair[1]}, {pair[0]})"]
    at, index = str(f.offset), ""
    if f.count:
        at, index = f"{f.offset}+{f.bytes // f.count}*i", "[i]"
    if bits == 8:
        line = f"b[{at}] = {name}" if encode else f"{name} = b[{at}]"
    elif encode:
        line = f"binary.LittleEndian.PutUint{bits}(b[{at}:], {name}{index})"
    else:
        line = f"{name}{index} = binary.LittleEndian.Uint{bits}(b[{at}:])"
    if not f.count:
        return ["\t" + line]
    return [f"\tfor i := range {name} {{", "\t\t" + line, "\t}"]


# ------------------------------------------------------------------ Python
def python_view(header: Header) -> str:
    out = [
        '"""Views of abi/ring.h. Generated by abi/generate.py; do not edit."""',
        "",
        "import ctypes",
        "from enum import IntEnum",
        "",
    ]
    for name, (value, suffix) in header.defines.items():
        out.append(f"{name.removeprefix('DMI_')} = {f'0x{value:X}' if suffix else value}")
    for enum, members in header.enums.items():
        prefix = enum.upper() + "_"
        out += ["", "", f"class {camel(enum.removeprefix('dmi_'))}(IntEnum):"]
        out += [f"    {m.removeprefix(prefix)} = {v}" for m, v in members.items()]
    for struct in header.structs.values():
        out += ["", "", f"class {camel(struct.name.removeprefix('dmi_'))}Struct(ctypes.LittleEndianStructure):"]
        out += ["    _fields_ = ["]
        for f in struct.fields:
            kind = (
                f"{camel(f.type.removeprefix('dmi_'))}Struct"
                if f.type in header.structs
                else f"ctypes.{CTYPES[f.type]}"
            )
            out.append(f'        ("{f.name}", {kind}{f" * {f.count}" if f.count else ""}),')
        out += ["    ]"]
    out += ["", ""]
    for struct in header.structs.values():
        out.append(f"assert ctypes.sizeof({camel(struct.name.removeprefix('dmi_'))}Struct) == {struct.size}")
    return "\n".join(out) + "\n"


def offsets(header: Header) -> str:
    """What a C compiler is asked to confirm: where every field is that the views read and write."""
    lines = ["/* Generated by abi/generate.py from abi/ring.h; do not edit. Every offset of the views, for a compiler to confirm. */", "#pragma once", "", '#include "abi/ring.h"', ""]
    for struct in header.structs.values():
        lines.append(f'DMI_STATIC_ASSERT(sizeof(struct {struct.name}) == {struct.size}, "{struct.name}");')
        for field in struct.fields:
            lines.append(f'DMI_STATIC_ASSERT(offsetof(struct {struct.name}, {field.name}) == {field.offset}, "{struct.name}.{field.name}");')
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a view differs")
    check = parser.parse_args().check
    header = parse(HEADER.read_text())
    stale = []
    for path, text in ((GO, go_view(header)), (PYTHON, python_view(header)), (OFFSETS, offsets(header))):
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if check and stale:
        print(f"{', '.join(stale)}: differs from abi/ring.h; run python abi/generate.py", file=sys.stderr)
        return 1
    print("; ".join(f"{name}: written" for name in stale) or "views of abi/ring.h are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())

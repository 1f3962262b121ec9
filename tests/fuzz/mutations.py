"""Ways to spoil a valid file, from single bits to its own building blocks.

A random string is refused at its first bytes; only files that are nearly right reach the code behind.  Where a format
has check sums or compression, the mutation goes inside and they are made right again.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

# Ends of integer ranges, and sizes that overflow when multiplied.
NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def spoil_bytes(data: bytes, other: bytes, random: Random) -> bytes:
    """``data`` with one to four accidents; ``other`` is a file to splice in."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if not out:
            return bytes(random.randbytes(random.randrange(1, 40)))
        # Headers are short and decide most, so half of the accidents happen there.
        at = random.randrange(min(len(out), 80)) if random.random() < 0.5 else random.randrange(len(out))
        length = random.choice((1, 2, 4, 8, 30, 200))
        match random.randrange(9):
            case 0:
                out[at] ^= 1 << random.randrange(8)
            case 1:
                out[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2 | 3:
                form = random.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
                value = random.choice(NUMBERS) & (2 ** (8 * struct.calcsize(form)) - 1)
                packed = struct.pack(form, value)
                out[at : at + len(packed)] = packed
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length]
            case 6:
                out[at:at] = random.randbytes(length)
            case 7:
                del out[at:]
            case 8:
                start = random.randrange(len(other) + 1)
                out[at : at + length] = other[start : start + length]
    return bytes(out)


def spoil_png(data: bytes, other: bytes, random: Random) -> bytes:
    """A PNG file with chunks changed, dropped, repeated, moved or added, and their check sums mostly right."""
    chunks = png_chunks(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(chunks)) if chunks else 0
        match random.randrange(5):
            case 0 | 1 if chunks:
                kind, content = chunks[at]
                if kind == b"IDAT" and random.random() < 0.7:
                    content = zlib.compress(spoil_bytes(_inflated(content), other, random))
                else:
                    content = spoil_bytes(content, other, random)
                chunks[at] = (kind, content)
            case 2 if chunks:
                del chunks[at]
            case 3 if chunks:
                chunks.insert(random.randrange(len(chunks) + 1), chunks[at])
            case _:
                kind = random.choice(
                    (b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"zTXt", b"iTXt", b"pHYs", b"IDAT")
                )
                size = random.choice((0, 1, 8, 26, 768, 3000))
                content = random.randbytes(size)
                if kind in (b"zTXt", b"iCCP"):
                    content = b"k\0\0" + zlib.compress(bytes(random.choice((10, 10**5, 2 * 10**6))))
                chunks.insert(at, (kind, content))
    return png_file(chunks, random if random.random() < 0.1 else None)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(type, content) of each chunk."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_file(chunks: list[tuple[bytes, bytes]], wrong_sums: Random | None = None) -> bytes:
    """A PNG file of these chunks, with right check sums unless ``wrong_sums`` draws others."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        crc = zlib.crc32(kind + content) if wrong_sums is None else wrong_sums.randrange(2**32)
        parts.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc))
    return b"".join(parts)


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error:
        return data


# ---------------------------------------------------------------------------------------------- structured values

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**9, 10**18, 10**400, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    " ", "x" * 5000, "../../x", "/etc/passwd", "\x00", "\x1b[31m", "\u202egnp", "\ud800", "<script>", "1", "yes",
    "tiny", [], [[]], {}, {"a": 1}, [1] * 2000, {"x" * 3000: {}},
)  # fmt: skip


def spoil_value(value: Any, random: Random) -> Any:
    """A nested value (of JSON or YAML) with one to three of its parts replaced, dropped, renamed or added."""
    out = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(out))
        if not places:
            return deepcopy(random.choice(ODD_VALUES))
        holder, key = random.choice(places)
        match random.randrange(6):
            case 0 | 1 | 2:
                holder[key] = deepcopy(random.choice(ODD_VALUES))  # or the next change would be in it for good
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[random.choice((f"{key}x", "extra", "", "x" * 300, "\u202e"))] = holder.pop(key)
            case _:
                other_holder, other_key = random.choice(places)
                if (isinstance(other_holder, list) and other_key >= len(other_holder)) or other_key not in other_holder:
                    continue
                holder[key] = json.loads(json.dumps(other_holder[other_key]))
    return out


def _places(value: Any) -> Any:
    """(container, key) of every part."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def spoil_safetensors(data: bytes, other: bytes, random: Random) -> bytes:
    """A safetensors file with its header changed as a value, and the length before it mostly right."""
    (length,) = struct.unpack("<Q", data[:8])
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    if random.random() < 0.3:
        name = random.choice(list(header))
        if "dtype" in header[name]:
            header[name]["dtype"] = random.choice(("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X"))
    else:
        header = spoil_value(header, random)
    if random.random() < 0.2:
        content = spoil_bytes(content, other, random)
    try:
        text = json.dumps(header).encode()
    except ValueError:
        text = b"{}"
    length = len(text) if random.random() < 0.9 else random.choice(NUMBERS)
    return struct.pack("<Q", length) + text + content


Spoil = Callable[[bytes, bytes, Random], bytes]

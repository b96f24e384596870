"""Changes of valid files: of their bytes, of protobuf messages, of JSON trees, of zip members.

Every function takes a ``random.Random`` and returns new content; the same seed, the same content.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

INTEGERS = (0, 1, -1, 2, 3, 7, 127, 255, 256, 65535, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62)
INTEGERS += (2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-40, 1e38, -1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "\x00", "..", "/etc/passwd", "é" * 3, "\u202e", "x" * 300, "Conv", "0", "-1")
TEXTS += ("Add", "If", "Loop", "DequantizeLinear", "0-99999999999", "1e999", "[31m", "nan")


def change_bytes(rng: random.Random, content: bytes, other: bytes = b"") -> bytes:
    """Return ``content`` with one to four places changed."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not data:
            data += bytes(rng.randrange(256) for _ in range(4))
        place = rng.randrange(len(data))
        length = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(data) - place)
        there = bytes(data[place : place + length])
        start = rng.randrange(len(other)) if other else 0
        changed = (
            bytes([there[0] ^ 1 << rng.randrange(8)]) + there[1:],
            bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + there[1:],
            b"",
            rng.randbytes(length) + there,
            there + there,
            bytes(length),
            other[start : start + length],
        )
        data[place : place + length] = rng.choice(changed)
        if rng.random() < 0.1:
            del data[place:]
    return bytes(data)


def change_message(rng: random.Random, message: Message) -> None:
    """Change one to three fields anywhere in a protobuf message, in place."""
    for _ in range(rng.randint(1, 3)):
        _change_field(rng, _pick_message(rng, message))


def _pick_message(rng: random.Random, message: Message) -> Message:
    """Walk down at random; most walks end some levels below the top."""
    while rng.random() < 0.9:
        below = [
            part
            for field, value in message.ListFields()
            if field.message_type is not None
            for part in (value if field.is_repeated else [value])
        ]
        if not below:
            break
        message = rng.choice(below)
    return message


def _change_field(rng: random.Random, message: Message) -> None:
    fields = [field for field, _ in message.ListFields()]
    if not fields or rng.random() < 0.1:
        fields = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    name, repeated = field.name, field.is_repeated
    if rng.random() < 0.1:
        message.ClearField(name)
    elif field.message_type is not None:
        _change_messages(rng, message, name, repeated)
    elif repeated:
        values = getattr(message, name)
        kind = rng.randrange(4)
        if kind == 0 and values:
            del values[rng.randrange(len(values))]
        elif kind == 1 and values:
            values.append(rng.choice(values))
        elif kind == 2 and len(values) > 1:
            a, b = rng.randrange(len(values)), rng.randrange(len(values))
            values[a], values[b] = values[b], values[a]
        elif values:
            values[rng.randrange(len(values))] = _scalar(rng, field)
        else:
            values.append(_scalar(rng, field))
    else:
        setattr(message, name, _scalar(rng, field))


def _change_messages(rng: random.Random, message: Message, name: str, repeated: bool) -> None:
    if not repeated:
        part = getattr(message, name)
        part.SetInParent()
        _change_field(rng, part) if rng.random() < 0.5 else message.ClearField(name)
        return
    values = getattr(message, name)
    if not values or rng.random() < 0.1:
        values.add()
        return
    place = rng.randrange(len(values))
    if rng.random() < 0.5:
        del values[place]
    else:
        values.add().CopyFrom(values[place])


def _scalar(rng: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if kind == field.CPPTYPE_STRING:
        text = rng.choice(TEXTS)
        return text.encode() if field.type == field.TYPE_BYTES else text
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == field.CPPTYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    limits = {field.CPPTYPE_INT32: (-(2**31), 2**31), field.CPPTYPE_UINT64: (0, 2**64)}
    limits |= {field.CPPTYPE_UINT32: (0, 2**32), field.CPPTYPE_INT64: (-(2**63), 2**63)}
    low, high = limits[kind]
    return rng.choice([value for value in INTEGERS if low <= value < high])


def change_json(rng: random.Random, tree: Any) -> Any:
    """Return ``tree`` with one to three of its values changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return rng.choice((None, [], {}, 0))
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.append(parent[key])
        elif kind == 2 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(key)
        elif kind == 3:
            other_parent, other_key = rng.choice(places)
            parent[key] = json.loads(
                json.dumps(
                    other_parent.get(other_key, None)
                    if isinstance(other_parent, dict)
                    else other_parent[other_key]
                    if other_key < len(other_parent)
                    else None
                )
            )
        elif isinstance(parent[key], str) and rng.random() < 0.7:
            parent[key] = change_text(rng, parent[key])
        else:
            parent[key] = rng.choice(
                (*INTEGERS, *FLOATS, *TEXTS, None, True, [], {}, [[]], {"a": 1})
            )
    return tree


def change_text(rng: random.Random, text: str) -> str:
    """Return ``text`` with a few characters changed; digits are favoured."""
    letters = list(text)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(letters) + 1)
        new = rng.choice("0123456789999,-.: {}[]&*!\n\x00é\u202e\x1b<>'\"")
        kind = rng.randrange(4)
        if kind == 0 and letters:
            del letters[min(place, len(letters) - 1)]
        elif kind == 1:
            letters[place:place] = list(new * rng.choice((1, 1, 8)))
        elif kind == 2:
            letters[place:place] = letters[place : place + 20]
        else:
            letters[place : place + 1] = [new]
    return "".join(letters)


def _places(tree: Any) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def change_zip(
    rng: random.Random, content: bytes, change: Callable[[random.Random, bytes], bytes]
) -> bytes:
    """Return a zip archive with one member changed, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    chosen = rng.choice(names)
    if rng.random() < 0.1:
        del members[chosen]
    elif rng.random() < 0.1:
        members[rng.choice(("../up", "/etc/x", "a/b", ""))] = members.pop(chosen)
    else:
        members[chosen] = change(rng, members[chosen])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name or "x"), data)
    return out.getvalue()

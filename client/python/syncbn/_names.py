"""Names that are made of others, within the protocol's limit."""

from syncbn._arguments import MOST_NAME_BYTES

_HASH_BYTES = 17


def _fnv1a(data: bytes) -> int:
    found = 0xCBF29CE484222325
    for byte in data:
        found = (found ^ byte) * 0x100000001B3 % (1 << 64)
    return found


def derived(layer: str, suffix: str = "") -> str:
    """`layer` and `suffix` as one name of at most 255 bytes.

    Where they are longer together, the end of the layer's name gives way to "~" and a hash of all of it. Every client does
    so in the same way, since workers meet by such names (PROTOCOL.md, section 4; vocabulary/derived_name.h).
    """
    name = layer.encode()
    room = MOST_NAME_BYTES - len(suffix.encode())
    if len(name) <= room:
        return layer + suffix
    kept = name[: room - _HASH_BYTES].decode(errors="ignore")  # No character is cut in two.
    return f"{kept}~{_fnv1a(name):016x}{suffix}"

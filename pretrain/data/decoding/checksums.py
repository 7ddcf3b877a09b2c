"""Cyclic redundancy checks of audio frames, bit by bit through a table."""


def crc(data: bytes | memoryview, polynomial: int, bits: int, value: int = 0) -> int:
    """The remainder of `data` by a polynomial without its highest term, from `value` on, as FLAC and MPEG
    audio have it."""
    table = _table(polynomial, bits)
    for byte in data:
        value = (value << 8 ^ table[(value >> bits - 8) ^ byte]) & (1 << bits) - 1
    return value


def _table(polynomial: int, bits: int) -> list[int]:
    if polynomial not in _TABLES:
        table = []
        for value in range(256):
            value <<= bits - 8
            for _ in range(8):
                value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & (1 << bits) - 1
            table.append(value)
        _TABLES[polynomial] = table
    return _TABLES[polynomial]


_TABLES: dict[int, list[int]] = {}

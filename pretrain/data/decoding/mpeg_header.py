"""Headers of MPEG audio frames."""

import re
from functools import lru_cache
from typing import NamedTuple

SYNC = re.compile(rb"\xff[\xe2-\xff]")


_RATES = (44100, 48000, 32000)


_LOW = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


_KBPS = {  # by MPEG 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): _LOW,
    (False, 3): _LOW,
}


class Kind(NamedTuple):
    """What may not change within a stream. `version` is 3 for MPEG 1, 2 for MPEG 2, 0 for its extension to
    low rates, 2.5."""

    version: int
    layer: int
    sample_rate: int
    channels: int

    @property
    def samples(self) -> int:
        """Of a frame."""
        return 384 if self.layer == 1 else 576 if self.layer == 3 and self.version != 3 else 1152

    @property
    def side(self) -> int:
        """Bytes of side information in a frame."""
        return (17, 32)[self.channels - 1] if self.version == 3 else (9, 17)[self.channels - 1]

    def __str__(self) -> str:
        return f"{self.sample_rate} Hz {'mono' if self.channels == 1 else 'stereo'}"


@lru_cache(maxsize=4096)
def parse_header(header: bytes) -> tuple[Kind, int] | None:
    """(kind, bytes in the frame) of four bytes that begin a frame; None of any others, and for a free bit
    rate."""
    if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
        return None
    version, layer, rate, choice = (
        header[1] >> 3 & 3,
        4 - (header[1] >> 1 & 3),
        header[2] >> 2 & 3,
        header[2] >> 4,
    )
    if version == 1 or layer == 4 or rate == 3 or choice in (0, 15):
        return None
    kind = Kind(version, layer, _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version], 1 if header[3] >> 6 == 3 else 2)
    slot = 4 if layer == 1 else 1
    num_slots = kind.samples // 8 * 1000 * _KBPS[version == 3, layer][choice - 1] // kind.sample_rate // slot
    return kind, (num_slots + (header[2] >> 1 & 1)) * slot

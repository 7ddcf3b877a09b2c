"""Recordings whose headers lie, byte by byte, and a flac whose few bytes are many samples."""

import io
import struct

import numpy as np
import soundfile

TEN_HOURS = 10 * 3600 * 16000


def wav(
    claimed: int, samples: bytes = bytes(1000), rate: int = 16000, channels: int = 1, bits: int = 16
) -> bytes:
    """A WAV that claims a data chunk of so many bytes."""
    align = channels * bits // 8
    about = struct.pack("<HHIIHH", 1, channels, rate, rate * align % 2**32, align, bits)
    head = b"RIFF" + struct.pack("<I", (36 + claimed) % 2**32) + b"WAVEfmt " + struct.pack("<I", 16) + about
    return head + b"data" + struct.pack("<I", claimed) + samples


def encoded(form: str, rate: int = 16000) -> bytes:
    """A second of noise."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(0).uniform(-0.3, 0.3, rate), rate, format=form)
    return buffer.getvalue()


def flac_claiming(total: int, rate: int = 16000) -> bytes:
    """A second of flac whose STREAMINFO, RFC 9639 section 8.2, says `total` samples at `rate`."""
    data = bytearray(encoded("FLAC"))
    about = int.from_bytes(data[18:26], "big")
    data[18:26] = (rate << 44 | about & (0xFF << 36) | total).to_bytes(8, "big")
    return bytes(data)


def ogg_claiming(total: int) -> bytes:
    """A second of Ogg Vorbis whose last page, RFC 3533 section 6, ends at sample `total`."""
    data = bytearray(encoded("OGG"))
    page = data.rfind(b"OggS")
    data[page + 6 : page + 14] = struct.pack("<q", total)
    data[page + 22 : page + 26] = bytes(4)
    data[page + 22 : page + 26] = struct.pack("<I", _crc(bytes(data[page:]), 0x04C11DB7, 32))
    return bytes(data)


def mp3_claiming(num_frames: int) -> bytes:
    """A second of mp3 whose Xing header counts `num_frames` of 576 samples."""
    data = bytearray(encoded("MP3"))
    place = max(data.find(b"Xing"), data.find(b"Info"))
    assert place > 0, "libsndfile's encoder writes one"
    data[place + 8 : place + 12] = struct.pack(">I", num_frames)
    return bytes(data)


def flac_bomb(num_frames: int, channels: int = 8, block: int = 65535) -> bytes:
    """A whole flac (RFC 9639) of constant zeros: 35 bytes for 65,535 samples of eight channels."""
    about = (16000 << 44 | (channels - 1) << 41 | 15 << 36 | num_frames * block).to_bytes(8, "big")
    parts = [b"fLaC\x80\0\0\x22" + struct.pack(">HH", block, block) + bytes(6) + about + bytes(16)]
    for number in range(num_frames):
        head = (
            b"\xff\xf8\x75"
            + bytes([(channels - 1) << 4 | 8])
            + chr(number).encode()
            + struct.pack(">H", block - 1)
        )
        frame = head + bytes([_crc(head, 0x07, 8)]) + bytes(3) * channels
        parts.append(frame + struct.pack(">H", _crc(frame, 0x8005, 16)))
    return b"".join(parts)


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> (bits - 1) else 0)) & ((1 << bits) - 1)
    return value

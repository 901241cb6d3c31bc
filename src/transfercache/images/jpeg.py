"""Holes in JPEG files: zero bytes that a torn copy or a preallocated download left in the coded picture."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: A disk's sector, the least that a torn copy leaves out.
HOLE = bytes(512)

# FF 00 and the restart markers stand within coded data; any other marker ends it or begins a segment (T.81 B.1.1).
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_BASELINE, _EXTENDED, _PROGRESSIVE, _DHT, _EOI, _SOS = 0xC0, 0xC1, 0xC2, 0xC4, 0xD9, 0xDA
_ZRL = 0xF0  # sixteen zero coefficients, after which the block goes on


def hole_bytes(data: bytes) -> int:
    """Return the length of the first hole in the coded picture of a JPEG file, 0 where there is none.

    A run of zero bytes is none where the file's own Huffman codes make it flat picture, nor where the coding cannot
    tell (arithmetic; refined DC). `docs/images.md` says what stays unseen; sections here are of ITU-T T.81.
    """
    if data.rfind(HOLE) < 0:  # nearly every file ends here, and for such a needle rfind is ten times as fast as find
        return 0
    frame, symbols, at = 0, dict[int, int](), 2
    while (marker := _MARKER.search(data, at)) and marker[1][0] != _EOI:
        kind, start = marker[1][0], marker.end()
        at = start + int.from_bytes(data[start : start + 2])
        segment = data[start + 2 : at]
        if kind in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            frame = kind
        elif kind == _DHT:
            symbols |= _zero_symbols(segment)
        elif kind == _SOS and not _may_be_zero(segment, frame, symbols):
            following = _MARKER.search(data, at)
            _, hole, rest = data[at : following.start() if following else None].partition(HOLE)
            after = rest.lstrip(b"\0")
            if hole and (after or not following):  # cameras pad with zero bytes up to a marker, the picture being whole
                return len(HOLE) + len(rest) - len(after)
    return 0


def _zero_symbols(tables: bytes) -> dict[int, int]:
    """Return what zero bits stand for in each table of a DHT segment, by its class and destination (B.2.4.2)."""
    symbols = {}
    while len(tables) > 17:
        symbols[tables[0]] = tables[17]  # the first symbol: codes are given out in order, from zero (C.2)
        tables = tables[17 + sum(tables[1:17]) :]
    return symbols


def _may_be_zero(scan: bytes, frame: int, symbols: Mapping[int, int]) -> bool:
    """Return whether zero bits decode to nothing, block after block, in the scan with this header (B.2.3)."""
    if len(scan) < 6 or not frame:
        return True
    dc = [symbols.get(table >> 4, 0) for table in scan[2:-3:2]]
    ac = [symbols.get(0x10 | table & 15, 0) for table in scan[2:-3:2]]
    if frame != _PROGRESSIVE:  # every DC as the one before it, and no AC: F.1.2.1, F.1.2.2
        return not any(dc + ac)
    if scan[-3] == 0:  # DC; bits that refine it are not Huffman-coded: G.1.2.1
        return scan[-1] >> 4 > 0 or not any(dc)
    return all(symbol & 15 == 0 and symbol != _ZRL for symbol in ac)  # EOBn, no AC in 2^n blocks: G.1.2.2, G.1.2.3

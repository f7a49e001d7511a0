"""The ten digits and twelve letters that scenes are labelled with, as bitmaps, so that no system font is needed."""

from __future__ import annotations

# Five wide, seven high: one hex pair per row, most significant of five bits on the left. Letters that this grid makes
# hard to tell apart (B and 8, O and 0, Z and 2) are left out, and "a", which is also a word of the questions.
BITMAPS = {
    "0": "0E 11 13 15 19 11 0E",
    "1": "04 0C 04 04 04 04 0E",
    "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E",
    "7": "1F 01 02 04 08 08 08",
    "8": "0E 11 11 0E 11 11 0E",
    "9": "0E 11 11 0F 01 02 0C",
    "c": "0E 11 10 10 10 11 0E",
    "e": "1F 10 10 1E 10 10 1F",
    "h": "11 11 11 1F 11 11 11",
    "j": "07 02 02 02 02 12 0C",
    "k": "11 12 14 18 14 12 11",
    "l": "10 10 10 10 10 10 1F",
    "m": "11 1B 15 15 11 11 11",
    "p": "1E 11 11 1E 10 10 10",
    "t": "1F 04 04 04 04 04 04",
    "u": "11 11 11 11 11 11 0E",
    "x": "11 11 0A 04 0A 11 11",
    "y": "11 11 11 0A 04 04 04",
}
GLYPHS = tuple(BITMAPS)
DIGITS = 10  # GLYPHS[:DIGITS] are digits, the rest letters
SIZES = ((10, 7), (14, 10), (17, 12))  # pixels, (height, width)

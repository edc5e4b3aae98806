"""The encoding of a text file: UTF, the one that is given, or the one of the usual others in which its words look like
words; where these are several, it is asked for."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence

from tokenfusion.errors import InputError

WESTERN = "cp1252"
KANA = ("HIRAGANA", "KATAKANA")
LATIN, JAPANESE = ("LATIN",), ("CJK", *KANA, "IDEOGRAPHIC", "FULLWIDTH")
USUAL = {
    **dict.fromkeys((WESTERN, "cp1250", "iso8859_2", "cp1254", "mac_roman", "cp850"), LATIN),
    **dict.fromkeys(("cp1251", "koi8_r", "cp866"), ("CYRILLIC",)),
    "cp1253": ("GREEK",),
    **dict.fromkeys(("gb18030", "big5"), ("CJK", "IDEOGRAPHIC", "FULLWIDTH")),
    "cp949": ("HANGUL",),
    **dict.fromkeys(("cp932", "euc_jp"), JAPANESE),
    "cp1255": ("HEBREW",),
    "cp1256": ("ARABIC",),
    "cp874": ("THAI",),
}
"""Encodings in which people's lists are, and how the names of their letters begin."""
COMMON = {
    "gb18030": ("gb2312", 0xB0A1, 0xD7F9),
    "big5": ("big5", 0xA440, 0xC67E),
    "cp949": ("euc_kr", 0xB0A1, 0xC8FE),
    "cp932": ("shift_jis", 0x889F, 0x9872),
    "euc_jp": ("euc_jp", 0xB0A1, 0xCFD3),
}
"""Where their common characters stand in the narrower encoding."""
CASELESS = ("cp1255", "cp1256", "cp874")
"""Those in which nearly any bytes look like words; they are taken where no other is."""
RARE = frozenset("ŠŽŸšžÐÝÞðýþ")
"""Letters of cp1252 that western languages hardly have, and other encodings have others for."""
ENOUGH = 12
"""Different characters by which Korean is told from Chinese, which a few might be as well."""
SAMPLED = 2**20
"""Bytes by which an encoding is guessed."""


def decode_text(data: bytes, given: str = "") -> tuple[str, str, str]:
    """A file's text, its encoding, and where that was guessed how its words read, in words.

    Args:
        data: the file's bytes.
        given: the encoding of what is in no UTF; "" to guess.

    Raises:
        InputError: which encoding it is in is not clear, with how its words read in each; or none is called so.
        UnicodeDecodeError: it is not in the one that is given.
    """
    found = json.detect_encoding(data)
    if not found.startswith("utf-8"):  # by their mark or, without one, by the zeros of the first letters
        return data.decode(found), found, ""
    try:
        text = data.decode("utf-8-sig")
        if not given or not text.isascii():
            return text, "utf-8", ""
    except UnicodeDecodeError:
        if not given:
            return guessed(data)
    try:
        return data.decode(given), given, ""
    except LookupError as error:
        raise InputError(f"--encoding {given}: {error}; name one that Python has, such as cp1252 or gb18030") from error


def guessed(data: bytes) -> tuple[str, str, str]:
    """As `decode_text`, of what is in no UTF."""
    sample = data[: data.rfind(b"\n", 0, SAMPLED) + 1 or SAMPLED] if len(data) > SAMPLED else data
    words = {name: found for name in USUAL if natural(found := strange_words(sample, name), name)}
    likely = likeliest(words)
    if not likely:
        from charset_normalizer import from_bytes

        best = from_bytes(sample).best()
        likely = [best.encoding if best is not None else "latin_1"]
        words = {likely[0]: strange_words(sample, likely[0])}
    first, *others = likely
    reads = {name: ", ".join(map(repr, telling(words, name, likely)[:3])) for name in likely}
    listed = [f"{read} as {name}" for name, read in reads.items()]
    if others and first != WESTERN:
        raise InputError(
            f"it is in no UTF, and which encoding it is in is not clear: it reads {'; '.join(listed)}. Say so by "
            f"--encoding {first}, or save it in UTF-8"
        )
    more = "".join(f"; or {read}" for read in listed[1:4])
    return data.decode(first), first, f"{reads[first]}{more}; --encoding sets another"


def telling(words: Mapping[str, Sequence[str]], name: str, likely: Sequence[str]) -> list[str]:
    """The words of a reading that are others in another one; all where there is none."""
    same = set.intersection(*(set(words[other]) for other in likely))
    return [word for word in words[name] if word not in same] or list(words[name])


def strange_words(data: bytes, encoding: str) -> list[str]:
    """The different words that have letters or signs beyond ASCII, in order; none where these bytes cannot be read."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return []
    return [word for word in dict.fromkeys(re.findall(r"(?:[^\W\d_]|[^\x00-\x7f])+", text)) if not word.isascii()]


def natural(words: Sequence[str], encoding: str) -> bool:
    """Whether words look like words, but for one of twenty; those of Latin letters if some are of plain ones."""
    strange = sum(not is_natural(word, encoding) for word in words)
    letters = "".join(words)
    plain = sum(letter.isascii() for letter in letters) / max(len(letters), 1)
    return bool(words) and 20 * strange <= len(words) and (USUAL[encoding] != LATIN or plain >= 0.25)


def is_natural(word: str, encoding: str) -> bool:
    """Whether a word is of letters of one script, common ones, and small but for the first, or all capital."""
    scripts, beyond = USUAL[encoding], [letter for letter in word if not letter.isascii()]
    if not all(unicodedata.name(letter, "").startswith(scripts) for letter in beyond) or unicodedata.combining(word[0]):
        return False
    if encoding in COMMON:
        return all(is_common(letter, encoding) for letter in beyond if unicodedata.category(letter) == "Lo")
    if scripts != LATIN and len(beyond) < len(word):
        return False
    plain = "".join(letter for letter in word if letter.isascii())
    return is_cased(word) or (bool(plain) and not is_cased(plain))


def is_common(letter: str, encoding: str) -> bool:
    """Whether a character stands among the common ones of an encoding of thousands, or is of a script of few."""
    narrow, first, last = COMMON[encoding]
    try:
        code = int.from_bytes(letter.encode(narrow))
    except UnicodeEncodeError:
        return False
    return first <= code <= last or unicodedata.name(letter).startswith(KANA)


def is_cased(word: str) -> bool:
    """Whether it has capitals as words do, or is of a script without."""
    return (
        word.lower() == word.upper() or word.islower() or word.isupper() or (word[:1].isupper() and word[1:].islower())
    )


def likeliest(words: Mapping[str, Sequence[str]]) -> list[str]:
    """The encodings of different readings, the likeliest first; alone where nothing speaks for another."""
    differing = {tuple(found): name for name, found in reversed(list(words.items()))}.values()
    names = [name for name in words if name in differing]
    kana = [n for n in names if any(unicodedata.name(c, "").startswith(KANA) for word in words[n] for c in word)]
    if len(kana) == 1:  # no other text reads as Japanese by chance
        return kana
    if "cp949" in names and len(set("".join(words["cp949"]))) >= ENOUGH:
        return ["cp949"]
    cased = [name for name in names if name not in CASELESS]
    small = [name for name in cased if not all(word.isupper() for word in words[name])]
    names = next((few for few in (cased, small) if len(few) == 1), names)
    return sorted(names, key=lambda name: name == WESTERN and bool(RARE & set("".join(words[name]))))

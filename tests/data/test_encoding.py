"""Lists in the encodings of other systems are read right, or it is asked which one it is: no name is garbled unsaid."""

import json
from pathlib import Path

import pytest
from making import LIMIT, png

from tokenfusion.data.encoding import decode_text
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

ANIMALS = {
    "cp1252": ("Löwe", "Bär", "Känguru", "Eichhörnchen", "Möwe"),
    "mac_roman": ("Löwe", "Bär", "Känguru", "Eichhörnchen", "Möwe"),
    "cp850": ("Löwe", "Bär", "Känguru"),
    "cp1251": ("тигр", "Лев", "слон", "жираф", "обезьяна"),
    "koi8_r": ("тигр", "лев", "слон", "жираф", "обезьяна"),
    "cp866": ("Тигр", "лев", "слон"),
    "cp1253": ("γάτα", "σκύλος", "άλογο"),
    "gb18030": ("老虎", "狮子", "大象", "长颈鹿", "猴子", "熊猫", "斑马", "狐狸", "兔子", "松鼠"),
    "big5": ("老虎", "獅子", "大象", "長頸鹿", "猴子", "熊貓", "斑馬", "狐狸", "兔子", "松鼠"),
    "euc_kr": ("호랑이", "사자", "코끼리", "기린", "원숭이", "판다", "얼룩말", "여우", "토끼"),
    "shift_jis": ("ねこ", "いぬ", "トラ", "ライオン", "熊"),
    "euc_jp": ("とら", "ライオン", "象", "猿", "狐", "リス"),
}
FEW = {"gb18030": ("猫", "狗"), "euc_kr": ("고양이", "개"), "cp1250": ("kůň", "žirafa"), "cp1254": ("kuş", "ağaç")}


def text_of(words: tuple[str, ...]) -> str:
    return "path,label\n" + "".join(f"{number}.png,{words[number % len(words)]}\n" for number in range(40))


@pytest.mark.parametrize("encoding", ANIMALS)
def test_usual_encodings_are_read_and_what_they_read_is_said(encoding: str) -> None:
    text = text_of(ANIMALS[encoding])
    found, _, said = decode_text(text.encode(encoding))
    assert found == text
    assert repr(ANIMALS[encoding][0]) in said
    assert said.endswith("; --encoding sets another")


@pytest.mark.parametrize("encoding", FEW)
def test_where_words_look_right_in_several_it_is_asked_for(encoding: str) -> None:
    text = text_of(FEW[encoding])
    with pytest.raises(
        InputError, match=r"which encoding it is in is not clear: it reads .* Say so by --encoding"
    ) as info:
        decode_text(text.encode(encoding))
    assert repr(FEW[encoding][0]) in str(info.value)
    assert decode_text(text.encode(encoding), encoding)[0] == text


def test_a_western_reading_is_taken_and_the_other_one_named() -> None:
    text, encoding, said = decode_text(text_of(("kočka", "pes")).encode("cp1250"))
    assert encoding == "cp1252"
    assert "koèka" in text
    assert said == "'koèka'; or 'kočka' as cp1250; --encoding sets another"
    assert "kočka" in decode_text(text.encode("cp1252"), "cp1250")[0]


def test_utf_goes_before_what_is_given_and_plain_letters_do_not() -> None:
    assert decode_text("ä".encode(), "cp1251") == ("ä", "utf-8", "")
    assert decode_text("猫".encode("utf-16"), "cp1251")[0] == "猫"
    assert decode_text("猫".encode("iso2022_jp"), "iso2022_jp")[0] == "猫"
    with pytest.raises(InputError, match="--encoding gb: unknown encoding: gb; name one that Python has"):
        decode_text(b"a\xe9\xfd", "gb")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json"])
def test_lists_of_every_kind_are_asked_about_and_read(ending: str, picture, tmp_path: Path) -> None:
    rows = [{"path": f"{number}.png", "label": FEW["gb18030"][number % 2]} for number in range(6)]
    for row in rows:
        (tmp_path / row["path"]).write_bytes(png(picture(1)))
    lines = {".csv": [",".join(row.values()) for row in [{"p": "path", "l": "label"}, *rows]]}
    lines[".jsonl"] = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = json.dumps(rows, ensure_ascii=False) if ending == ".json" else "\n".join(lines[ending])
    path = tmp_path / f"x{ending}"
    path.write_bytes(text.encode("gb18030"))
    with pytest.raises(InputError, match=f"x{ending}: it is in no UTF, .* '猫', '狗' as gb18030"):
        open_dataset(path)
    source = open_dataset(path, reading=Reading(encoding="gb18030"))
    assert sorted(source.classes) == sorted(FEW["gb18030"])
    assert source.decode(0, LIMIT).shape[0] == 3
    path.write_bytes(text.replace("猫", "grün").replace("狗", "café").encode("mac_roman"))
    source = open_dataset(path)
    assert source.classes == ("café", "grün")
    assert any("read as mac_roman ('grün', 'café'; --encoding sets another)" in note for note in source.notes)


def test_the_option_reaches_every_verb(command, picture, tmp_path: Path) -> None:
    words = FEW["gb18030"]
    for number in range(12):
        (tmp_path / f"{number}{words[number % 2]}.png").write_bytes(png(picture(number)))
    rows = "".join(f"{number}{words[number % 2]}.png,{words[number % 2]}\n" for number in range(12))
    (tmp_path / "x.csv").write_bytes(f"path,label\n{rows}".encode("gb18030"))
    run, given = tmp_path / "run", ("--encoding", "gb18030")
    status, _, errors = command("train", tmp_path / "x.csv", "--dry-run")
    assert (status, "which encoding it is in is not clear" in errors) == (2, True)
    small = ("--model", "resnet_micro", "--img-size", 8, "--epochs", 1, "--batch-size", 4, "--out", run)
    assert command("train", tmp_path / "x.csv", *given, *small)[0] == 0
    assert command("evaluate", run)[0] == 0
    assert command("evaluate", run, tmp_path / "x.csv", "--with-training-images", "--out", tmp_path / "judged")[0] == 0
    (tmp_path / "other").mkdir()
    for path in tmp_path.glob("*.png"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other" / "y.csv").write_bytes(f"path,label\n{rows}".encode("gb18030"))
    again = (tmp_path / "other" / "y.csv", *given, "--with-training-images", "--out", tmp_path / "again")
    assert command("evaluate", run, *again)[0] == 0
    assert command("predict", run, tmp_path / "x.csv", *given, "--out", tmp_path / "found")[0] == 0
    assert command("check", tmp_path / "x.csv", *given, "--out", tmp_path / "check")[0] == 0

"""Images are prepared ahead of the model, in order, and only so far."""

import threading
from itertools import count

import pytest

from tokenfusion.data.unlabelled import NamedImage, Part
from tokenfusion.errors import InputError
from tokenfusion.predict.ahead import prepared_ahead


def part_of(images, fetch=None) -> Part:
    return Part("name", "source", "content", images, fetch)


def named(numbers):
    return (NamedImage(str(number), lambda: b"") for number in numbers)


def taken(stream) -> list[str | None]:
    return [item.result()[0] if hasattr(item, "result") else item for item in stream]


def test_images_come_in_order_with_an_end_behind_each_part():
    parts = [part_of(lambda: named(range(3))), part_of(lambda: named(())), part_of(lambda: named((7,)))]
    stream = prepared_ahead(parts, lambda image: (image.path, "read"), threads=3, waiting=2)
    assert taken(stream) == ["0", "1", "2", None, None, "7", None]


def test_only_so_many_are_read_before_they_are_taken():
    read, enough = [], threading.Event()

    def endless():
        for number in count():
            read.append(number)
            if number == 5:
                enough.set()
            yield NamedImage(str(number), lambda: b"")

    stream = prepared_ahead([part_of(endless)], lambda image: (image.path, "read"), threads=1, waiting=4)
    assert next(stream).result()[0] == "0"
    assert enough.wait(10)  # four that wait, and one more for the one that was taken
    stream.close()
    assert len(read) == 6


def test_a_part_that_fails_ends_itself_alone_and_an_error_of_ours_ends_all():
    def fails():
        yield from named((1,))
        raise InputError("damaged")

    def is_wrong():
        yield from named((2,))
        raise KeyError("a mistake")

    stream = prepared_ahead([part_of(fails), part_of(is_wrong)], lambda image: (image.path, ""), threads=1, waiting=9)
    assert next(stream).result()[0] == "1"
    assert str(next(stream)) == "damaged"
    assert next(stream).result()[0] == "2"
    with pytest.raises(KeyError, match="a mistake"):
        next(stream)


def test_shards_to_come_are_fetched_before_they_are_read():
    fetched = [threading.Event() for _ in range(3)]

    def first():
        assert fetched[1].wait(10)
        assert fetched[2].wait(10)
        yield from named((0,))

    parts = [part_of(first if number == 0 else lambda: named(()), event.set) for number, event in enumerate(fetched)]
    assert taken(prepared_ahead(parts, lambda image: (image.path, ""), threads=1, waiting=1)) == ["0", None, None, None]

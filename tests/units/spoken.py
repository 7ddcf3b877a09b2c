"""Words with their times, for tests of text beside units."""

from pretrain.data.utterance import Word


def at(milliseconds: list[tuple[int, int, str]]) -> list[Word]:
    """Words from the pause before each and its length."""
    words, now = [], 0
    for pause, length, name in milliseconds:
        words.append(Word((now + pause) / 1000, (now + pause + length) / 1000, name))
        now += pause + length
    return words

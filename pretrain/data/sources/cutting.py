"""Long recordings as several utterances: pieces of like length, each with the phones and words that lie in
it.

A transcript goes into pieces by its words' times. Without them nobody knows which words are whose, and the
pieces have no text.
"""

import math
from dataclasses import replace

from pretrain.data.manifest import Timed
from pretrain.data.probing import Probed
from pretrain.data.sources.candidates import Candidate

Found = tuple[Candidate, Probed]  # what is usable, and its start, num_samples and sample_rate


def cut(found: list[Found], max_seconds: float | None) -> list[Found]:
    """Each recording longer than `max_seconds` as the fewest equal pieces that are not, named ID-0, ID-1, …;
    all others as they are.

    A piece's name that is another recording's is a ValueError.
    """
    if max_seconds is None:
        return found
    pieces = [piece for candidate, probed in found for piece in _pieces(candidate, probed, max_seconds)]
    if len(pieces) > len(found):
        names: dict[str, Candidate] = {}
        for piece, _ in pieces:
            if other := names.get(piece.id):
                raise ValueError(
                    f"max_seconds: a piece of {piece.path} would have the id {piece.id!r}, which "
                    f"{other.path} has; rename one of the files"
                )
            names[piece.id] = piece
    return pieces


def cuts_in_words(before: list[Found], after: list[Found]) -> str | None:
    """A note for the summary; None where nothing was cut."""
    ids = {candidate.id for candidate, _ in after}
    whole = [candidate for candidate, _ in before if candidate.id not in ids]
    if not whole:
        return None
    num_pieces = len(after) - (len(before) - len(whole))
    lost = sum(candidate.text is not None and candidate.words is None for candidate in whole)
    without = f"; {lost} of their transcripts have no word times and were dropped" if lost else ""
    return f"{len(whole)} recordings longer than max_seconds were cut into {num_pieces} utterances{without}"


def _pieces(candidate: Candidate, probed: Probed, max_seconds: float) -> list[Found]:
    start, num_samples, sample_rate = probed
    count = math.ceil(num_samples / (max_seconds * sample_rate))
    if count <= 1:
        return [(candidate, probed)]
    borders = [round(num_samples * number / count) for number in range(count + 1)]
    made = []
    for number in range(count):
        first, end = borders[number], borders[number + 1]
        span = first / sample_rate, end / sample_rate
        words = _within(candidate.words, *span)
        text = (
            None if words is None or candidate.text is None else " ".join(word.word for word in words) or None
        )
        name, phones = f"{candidate.id}-{number:0{len(str(count - 1))}}", _within(candidate.phones, *span)
        piece = replace(candidate, id=name, text=text, words=words, phones=phones)
        made.append((piece, (start + first, end - first, sample_rate)))
    return made


def _within(times: list[Timed] | None, start: float, end: float) -> list[Timed] | None:
    """Phones or words whose middle lies in [start, end), counted from `start` and ending with the piece."""
    if times is None:
        return None
    inside = [timed for timed in times if start <= (timed.start + timed.end) / 2 < end]
    return [
        timed._replace(start=max(timed.start - start, 0.0), end=min(timed.end, end) - start)
        for timed in inside
    ]

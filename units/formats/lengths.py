"""Units of other tools against the lengths of the recordings that they are said to be of, so that none goes
under a wrong name."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pretrain.data.frame_counts import count_bounds, count_frames, likely_rate
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE
from units.corpus.corpus_writing import Document
from units.formats.description import Located


class Mismatch(NamedTuple):
    """An utterance whose units do not fit its length."""

    where: str
    utterance: str
    num_units: int
    num_frames: int | None  # that its units last, if that is known
    num_samples: int  # at 16 kHz
    length_of: str  # where the length is from


class LengthCheck:
    """Compares each document with its length in the manifest, and with the one in its own file (a `.tsv`, a
    `duration`), where there are.

    Where durations are known their sum must be within `count_bounds`; otherwise there must at least not be
    more units than frames.
    """

    def __init__(
        self,
        source: str,
        rate_hz: float,
        said_by: str | None,
        manifest: Manifest | None,
        rows: dict[str, int],
    ):
        """`rows`: the manifest's row of each id. `said_by`: the file that gives the frame rate, if one
        does."""
        self.source, self.rate_hz, self.said_by, self.manifest, self.rows = (
            source,
            rate_hz,
            said_by,
            manifest,
            rows,
        )
        self._lengths = np.zeros(0, np.int64) if manifest is None else manifest.lengths
        self._rates = np.zeros(0, np.int64) if manifest is None else manifest.column("sample_rate").to_numpy()
        self._num_checked = self._num_frames = self._num_samples = 0

    def checked(self, stream: Iterator[Located]) -> Iterator[Document]:
        """The documents, one at a time. ValueError at the first whose length is another, with the number of
        all such."""
        for located in stream:
            if (wrong := self._mismatch(located)) is not None:
                raise ValueError(self._message(wrong, 1 + self._count(stream)))
            yield located.document

    def _count(self, stream: Iterator[Located]) -> int:
        """How many more there are."""
        count = 0
        try:
            for located in stream:
                count += self._mismatch(located) is not None
        except ValueError:
            pass  # of a later line; the first is reported
        return count

    def _mismatch(self, located: Located) -> Mismatch | None:
        document, durations = located.document, located.document.durations
        row = self.rows.get(document.id)
        have = len(document.units) if durations is None else int(durations.sum(dtype=np.int64))
        found = None
        for lengths, length_of in self._claims(located, row):
            self._count_in(have, lengths[0])
            if not any(self._fits(have, durations is not None, length) for length in lengths):
                timed = None if durations is None else have
                found = found or Mismatch(
                    located.where, document.id, len(document.units), timed, lengths[0], length_of
                )
        self._num_checked += 1
        return found

    def _claims(self, located: Located, row: int | None) -> Iterator[tuple[list[int], str]]:
        """(what the length may be in samples at 16 kHz, who says it)."""
        if row is not None:
            assert self.manifest is not None
            yield [int(self._lengths[row])], str(self.manifest.folder)
        if located.num_samples is not None:
            lengths = [located.num_samples]  # fairseq's scripts refuse audio at other rates than 16 kHz
            if row is not None:  # a list may count samples at the file's own rate
                lengths.append(located.num_samples * SAMPLE_RATE // max(1, int(self._rates[row])))
            yield lengths, located.length_of

    def _count_in(self, num_frames: int, num_samples: int) -> None:
        self._num_frames += num_frames
        self._num_samples += num_samples

    def _fits(self, have: int, timed: bool, num_samples: int) -> bool:
        fewest, most = count_bounds(num_samples, self.rate_hz)
        return have <= most and (have >= fewest or not timed)

    def _message(self, wrong: Mismatch, count: int) -> str:
        frames = count_frames(wrong.num_samples, self.rate_hz)
        lasting = (
            f" that last {wrong.num_frames} frames" if wrong.num_frames not in (None, wrong.num_units) else ""
        )
        return (
            f"{wrong.where}: {wrong.num_units} units{lasting} for utterance {wrong.utterance!r}, which has "
            f"{frames} frames at {self.rate_hz:g} Hz by the {wrong.num_samples} samples (16 kHz) in "
            f"{wrong.length_of} ({count} of {self._num_checked} utterances differ); {self._remedy(wrong)}"
        )

    def _remedy(self, wrong: Mismatch) -> str:
        """What is likely wrong, by how many frames there are in all."""
        rate = likely_rate(self._num_frames, self._num_samples)
        in_list = wrong.length_of.partition(": ")[0].endswith(".tsv")
        if (
            wrong.num_frames is not None
            and rate is not None
            and abs(rate - self.rate_hz) > 0.06 * self.rate_hz
        ):
            other = (
                "; samples at another rate than 16 kHz are understood with the `manifest`"
                if in_list and not self.rows
                else ""
            )
            where = "say" if self.said_by is None else f"correct {self.said_by}:"
            return f"all together they look like {rate:g} Hz units; {where} frame_rate_hz = {rate:g}{other}"
        if in_list:
            return (
                f"give the .tsv that {self.source} was made from (source_options.tsv = …), with its lines in "
                "the same order"
            )
        if wrong.length_of.startswith(wrong.where):
            return "its units or its length are of another recording"
        if wrong.num_frames is None:
            return "give the manifest of the audio that they were made from, or their frame_rate_hz"
        return (
            "give the manifest of the audio that they were made from; where that was cut at a longest "
            "length, one of the parts (`offset` and `duration` in JSON lines)"
        )

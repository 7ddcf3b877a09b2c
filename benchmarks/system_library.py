"""Imported before soundfile, gives the contenders of the loader benchmark that ask for it the system's libsndfile.

A process holds one library of a name: fairseq2's decoder takes the one in soundfile's wheel where that was loaded first, and decodes
as slowly. Its contenders, and `system` (ours with the same library), therefore hide the wheel's, and soundfile takes the
system's, as it does where it was installed without one (`pip install --no-binary soundfile soundfile`).
"""

import sys
from ctypes.util import find_library

CONTENDERS = ("fairseq2-", "system-")

if any(word.startswith(CONTENDERS) for word in sys.argv) and find_library("sndfile"):
    sys.modules["_soundfile_data"] = None  # type: ignore[assignment]  # what the wheel's library is found by

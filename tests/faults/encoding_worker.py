"""What test_shards_race runs: encode in several forks at once, of which the one named is killed after so many
seconds.

python tests/faults/encoding_worker.py CONFIG(JSON) [SECONDS ...]   a fork each; SECONDS is when it is killed,
"never" if not

Nothing is computed before the forks. Prints the exit status of each.
"""

import json
import os
import signal
import sys
import time

from quantize import encoding, features

load = features.load_audio


def slow(utterance):  # type: ignore[no-untyped-def]
    time.sleep(0.05)
    return load(utterance)


def start() -> int:
    if (child := os.fork()) == 0:
        status = 1
        try:
            encoding.encode(encoding.EncodeConfig(**json.loads(sys.argv[1])))
            status = 0
        finally:
            os._exit(status)
    return child


def main() -> None:
    features.load_audio = slow  # type: ignore[assignment]
    children = [start() for _ in sys.argv[2:]]
    began = time.monotonic()
    for when, child in sorted(
        (float(when), child) for when, child in zip(sys.argv[2:], children, strict=True) if when != "never"
    ):
        time.sleep(max(0.0, began + when - time.monotonic()))
        os.kill(child, signal.SIGKILL)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    main()

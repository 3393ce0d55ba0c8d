"""Reads damaged copies of video files: each must be read or refused with its name, in bounded time and memory.

    python examples/fuzz_video.py a.mp4 b.mkv c.webm --num-files 2000

Every second one is read through an open file, which must stay open.

A copy that ends otherwise stays in the folder. One that takes too long ends the run and is the last one there.
"""

import argparse
import faulthandler
import os
import random
import resource
from collections import Counter
from pathlib import Path

import av

from modeling_stts.stts_video import as_string, read_video


HEADER_SIZE = 2000
EDGE_VALUES = (b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xff\xff\xff")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="+", help="short video files of several formats")
    parser.add_argument("--num-files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("fuzz"), help="where the copies are written")
    parser.add_argument("--seconds", type=float, default=20, help="time limit of each file")
    parser.add_argument("--gigabytes", type=float, default=8, help="address space of the whole run")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    limit = int(arguments.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    av.logging.set_level(None)
    random_numbers, counts = random.Random(arguments.seed), Counter()
    for number in range(arguments.num_files):
        clip = random_numbers.choice(arguments.clips)
        path = arguments.folder / f"{arguments.seed}_{number}_{clip.name}"
        path.write_bytes(damage(clip.read_bytes(), random_numbers))
        faulthandler.dump_traceback_later(arguments.seconds, exit=True)
        result = try_to_read(path) if number % 2 else try_to_read_open(path)
        faulthandler.cancel_dump_traceback_later()
        counts[result] += 1
        if result in ("read", "refused"):
            path.unlink()
        else:
            print(f"{path}: {result}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    open_files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    print(f"{dict(counts)}, peak {peak:.0f} MiB, {open_files} open files and {threads} threads at the end")
    raise SystemExit(int(bool(set(counts) - {"read", "refused"})))


def damage(content, random_numbers):
    """Flips, overwrites, removes or cuts at some places, half of them near the file's beginning."""
    content = bytearray(content)
    for _ in range(random_numbers.choice([1, 2, 4, 16])):
        length = len(content) if random_numbers.random() < 0.5 else min(HEADER_SIZE, len(content))
        place = random_numbers.randrange(length)
        kind = random_numbers.randrange(10)
        if kind < 4:
            content[place] = random_numbers.randrange(256)
        elif kind < 7:
            content[place : place + 4] = random_numbers.choice(EDGE_VALUES)
        elif kind < 9:
            del content[place : place + random_numbers.randrange(1, 64)]
        else:
            del content[place + 1 :]
        content = content or bytearray(1)
    return bytes(content)


def try_to_read_open(path):
    with path.open("rb") as file:
        result = try_to_read(file)
        return result if file.tell() == 0 else f"{result}, but the file is elsewhere now"


def try_to_read(video):
    try:
        read_video(video, lambda metadata: sorted({0, metadata.total_num_frames // 2, metadata.total_num_frames - 1}))
    except ValueError as error:
        return "refused" if as_string(video) in str(error) else f"refused without its name: {error}"
    except Exception as error:
        return repr(error)
    return "read"


if __name__ == "__main__":
    main()

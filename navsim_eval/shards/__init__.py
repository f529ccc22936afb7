"""Packed storage of many small samples: a few large files, checksums, resumable after a kill at any moment.

A *sample* is a mapping from names to numpy arrays under a key (a scene token). A store is a folder:

    manifest.json     what the samples are: purpose, split, configuration, hash of the preprocessing, format version
    tokens.txt        the keys that a complete store holds, one a line, in the order in which readers list them
    broken.json       keys that could not be built in the last run, with the reason
    00000.data        records one after the other, each aligned to 64 bytes
    00000.index       one JSON line per finished record: [key, offset, size, crc32]

A record describes itself: length of the header, header (JSON: name, dtype, shape, codec, position of every array), then
the arrays. A sample exists once its index line is complete, and the line is written after the record; so a killed
writer leaves nothing half-valid: the next one cuts the last shard back to its last sound record and goes on. Shards
before the last one are never written again.

One process writes (`ShardWriter` takes a lock; `build_shards` lets a pool of processes compute and pack the samples).
Any number of processes may read, also while the store grows; each maps the files into memory for itself.
"""

from navsim_eval.shards.build import BuildReport, build_shards
from navsim_eval.shards.folder import FORMAT_VERSION, SHARD_BYTES, read_manifest
from navsim_eval.shards.reader import ShardReader
from navsim_eval.shards.record import Arrays, Deflate, pack, unpack
from navsim_eval.shards.upkeep import Verification, repair, verify
from navsim_eval.shards.writer import ShardWriter

__all__ = [
    "FORMAT_VERSION",
    "SHARD_BYTES",
    "Arrays",
    "BuildReport",
    "Deflate",
    "ShardReader",
    "ShardWriter",
    "Verification",
    "build_shards",
    "pack",
    "read_manifest",
    "repair",
    "unpack",
    "verify",
]

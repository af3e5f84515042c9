"""Prepare data with small shards, after a line on stdout that says that it begins; test_kill_prepare.py kills it."""

import sys

import data_report  # noqa: F401  (so that all imports are over when it begins)
import instruct_format
import prepare_instruct_dataset
from cli import run


def main() -> int:
    prepare_instruct_dataset.SHARD_TOKENS = int(sys.argv[1])
    instruct_format.tokenizer()
    print("begin", flush=True)
    return prepare_instruct_dataset.main(sys.argv[2:])


run(main)

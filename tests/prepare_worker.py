"""Prepare data with small shards, after a line on stdout that says that it begins; test_crash.py kills it."""

import sys

import instruct_format
import prepare_instruct_dataset
from cli import run
from data import shards


def main() -> int:
    shards.SHARD_TOKENS = int(sys.argv[1])
    instruct_format.tokenizer()
    print("begin", flush=True)
    return prepare_instruct_dataset.main(sys.argv[2:])


run(main)

"""Rows of files and of the hub become examples, and examples become token shards."""

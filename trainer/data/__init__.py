"""Loaders: which samples come when and on which rank, where the reading stands, and how it goes on after a stop.

loader.py is what users and loops hold; the others serve it: sources (what is read from), sharding (index arithmetic), reading
(samples to batches), randomness (numbers drawn while reading), stream and dispatch (iterables), state (JSON), config (options).
"""

"""Traces: the vocabulary of requests, readers and writers, generators, adapter assignment, result records. A leaf."""

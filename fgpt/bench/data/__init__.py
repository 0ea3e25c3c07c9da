"""Benchmarks of the data pipeline: encoding, samples, opening."""

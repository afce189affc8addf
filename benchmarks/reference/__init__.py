"""The slow, obvious version: written line by line from the paper, one sample at a time.

It is what the benchmarks compare with and what the tests believe. Nothing here is tuned: no memory
format, no fusion, no batching that the text does not have.
"""

"""Photographs in, WebDataset shards with sketches out."""

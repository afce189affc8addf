"""From shards to batches: the order of samples, the shard cache, decoding."""

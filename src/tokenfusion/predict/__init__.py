"""Predictions of many images, as Parquet: shard by shard, by any number of processes, going on where it was killed."""

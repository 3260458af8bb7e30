"""batchgen: prompt Parquet in, generation Parquet out, on Ray, every row exactly once."""

__version__ = "0.1.0"

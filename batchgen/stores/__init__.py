"""Where files lie: a local disk, S3, any other fsspec store, and a probe of what an output's store can do.

`storage.py` is the only door: nobody else uses these but for `probe`. A vendor's errors become ours here, by type or
code, never by text.
"""

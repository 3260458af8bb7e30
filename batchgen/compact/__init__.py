"""A finished dataset again, in files of the size that its consumers like: `batchgen compact OUT DEST`.

`digest` says whether two sets of Arrow rows are the same, `plan` cuts shards into parts (both pure), `compact` carries it
out. OUT is only read.
"""

"""One run: holds the folder's lease, asks the queue, feeds the pool, and finishes what is done."""

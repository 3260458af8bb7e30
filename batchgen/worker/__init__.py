"""One engine and its shards: rows in, requests in flight, results spilled and committed. Knows no Ray and no queue."""

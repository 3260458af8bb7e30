"""The HTTP endpoint: OpenAI's Files and Batches API over ordinary jobs, and what it serves interactively beside them.

A batch is a job: its input is Parquet in the endpoint's store, its output an ordinary output folder. `door` has the seams
between what needs Ray and what doesn't: the app, the state and the conductor run with plain uvicorn and the inline pool.
State lies in the store and nowhere else; a process that is killed at any instant costs time only.
"""

"""Pipelines: a dataset per date. What a pipeline is, when its runs are due, and how a run is carried through to its end.

Decisions (`spec`, `calendar`, `template`, `graph`, `events`, `decide`) are pure; time is an argument. All state
lies in the pipeline's `state` folder, as a log of events that are only ever created if absent (`log`): several schedulers
may work on it at once, and any of them may be killed at any instant. A run is one process (`execute`) in which every
stage is an ordinary job.
"""

"""What need not be generated again: fingerprints of requests, answers of earlier outputs, exact duplicates inside a run."""

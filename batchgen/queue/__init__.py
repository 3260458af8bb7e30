"""Who does what next: leases, order, retries, suspects, the tail and the fleet's size; time is an argument."""

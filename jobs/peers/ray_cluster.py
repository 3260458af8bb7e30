"""A Ray cluster of one node for the ways that want one: prints its address, ends when standard input does."""

import sys

import ray


def main() -> None:
    context = ray.init(
        num_cpus=int(sys.argv[1]),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()

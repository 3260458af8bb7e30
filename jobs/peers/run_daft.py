"""Daft's `prompt` through its OpenAI provider, on its native runner. Runs in an environment of its own."""

import os

os.environ.setdefault("DAFT_RUNNER", "native")
os.environ.setdefault("DO_NOT_TRACK", "true")

import daft
from daft.functions import prompt

from batchgen.bench.child import Child


def main() -> None:
    child = Child()
    daft.set_provider("openai", api_key="none", base_url=f"{child['url']}/v1")
    with child.job():
        rows = daft.read_parquet(f"{child['input']}/*.parquet")
        options = {"provider": "openai", "use_chat_completions": True, **child["options"]}
        text = prompt(daft.col("prompt"), model="simulated", **options)
        rows.select("id", text.alias("text")).write_parquet(child["output"])
    child.close("daft", "openai")


if __name__ == "__main__":
    main()

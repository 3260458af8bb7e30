"""datatrove's `InferenceRunner` against an endpoint, its own Parquet reader and writer around it."""

from typing import Any

from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter

from batchgen.bench.child import Child


async def ask(document: Document, generate: Any) -> Any:
    return await generate({"messages": [{"role": "user", "content": document.text}]})


def make_line(_: Any, document: Document) -> dict[str, Any]:
    return {"id": document.id, "text": document.metadata["rollout_results"][0].text}


def main() -> None:
    child = Child()
    config = InferenceConfig(
        server_type="endpoint",
        endpoint_url=child["url"],
        model_name_or_path="simulated",
        **child["config"],
    )
    runner = InferenceRunner(ask, config, ParquetWriter(child["output"], adapter=make_line, expand_metadata=False))
    reader = ParquetReader(child["input"], text_key="prompt", id_key="id")
    with child.job():
        runner.run(reader(), rank=0, world_size=1)
    child.close("datatrove")


if __name__ == "__main__":
    main()

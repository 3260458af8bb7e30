"""`ray.data.llm`'s HTTP processor: the way to send rows to a server that Ray documents."""

import ray
from ray.data.llm import HttpRequestProcessorConfig, build_processor

from batchgen.bench.child import Child


def make_payload(row: dict[str, str]) -> dict[str, object]:
    body = {"model": "simulated", "messages": [{"role": "user", "content": row["prompt"]}]}
    return {"id": row["id"], "payload": body}


def read_answer(row: dict[str, object]) -> dict[str, object]:
    answer: dict[str, list[dict[str, dict[str, str]]]] = row["http_response"]  # type: ignore[assignment]
    return {"id": row["id"], "text": answer["choices"][0]["message"]["content"]}


def main() -> None:
    child = Child()
    ray.init(address=child["ray_address"], logging_level="warning", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = HttpRequestProcessorConfig(url=f"{child['url']}/v1/chat/completions", **child["config"])
    processor = build_processor(config, preprocess=make_payload, postprocess=read_answer)
    with child.job():
        processor(ray.data.read_parquet(child["input"])).write_parquet(child["output"])
    child.close("ray")


if __name__ == "__main__":
    main()

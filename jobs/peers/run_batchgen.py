"""batchgen itself, by its own `run_job`. Where there is a bucket, the input is put there first and the output is read
back after the job."""

from pathlib import Path
from typing import Any

from batchgen.bench.child import Child
from batchgen.driver.run import run_job
from batchgen.driver.view import LineView
from batchgen.specs.load import make_spec
from batchgen.storage import Storage


def put_input(folder: str, url: str) -> str:
    store = Storage(url)
    for path in sorted(Path(folder).glob("*.parquet")):
        store.put(path.name, path.read_bytes())
    return url


def fetch_output(url: str, folder: str) -> None:
    store = Storage(url)
    Path(folder, "data").mkdir(parents=True)
    for info in store.list_files("data"):
        name = Path(info.path).name
        Path(folder, "data", name).write_bytes(store.read_bytes(f"data/{name}"))


def make_tree(child: Child) -> dict[str, Any]:
    tree: dict[str, Any] = child["spec"]
    tree["input"]["paths"], tree["output"] = child["input"], {**tree.get("output", {}), "path": child["output"]}
    if tree["engine"]["kind"] == "openai":
        tree["engine"]["base_urls"] = f"{child['url']}/v1"
    tree["cluster"]["address"] = child["ray_address"]
    return tree


def main() -> None:
    child = Child()
    tree = make_tree(child)
    if tree["cluster"]["pool"] == "ray":
        from batchgen.ray_pool import connect

        connect(make_spec(tree).cluster)
    if bucket := child["bucket"]:
        tree["input"]["paths"] = put_input(child["input"], f"{bucket}/in")
        tree["output"]["path"] = f"{bucket}/out"
    with child.job():
        report = run_job(make_spec(tree), LineView(5.0, print))
    if report["exit_code"] != 0:
        raise SystemExit(f"batchgen: {report['state']}: {report['message']}")
    if bucket:
        fetch_output(f"{bucket}/out", child["output"])
    child.close("batchgen", "ray")


if __name__ == "__main__":
    main()

"""`LLM`: strict about its arguments, casual about everything else."""

import atexit
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from tensorrt_llm._stand_in.control import Control
from tensorrt_llm._stand_in.ranks import RankProcess
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams
from tensorrt_llm.tokenizer.deepseek_v32 import DeepseekV32Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"


class LLM:
    """One engine. Its ranks are processes; so is their memory."""

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in TorchLlmArgs.model_fields and name not in ("_mpi_session", "backend"):
                raise ValueError(f"{type(self).__name__} got invalid argument: {name}")
        given = {"tokenizer_mode": tokenizer_mode, "skip_tokenizer_init": skip_tokenizer_init, "dtype": dtype}
        given |= {"trust_remote_code": trust_remote_code, "tensor_parallel_size": tensor_parallel_size}
        given |= {"revision": revision, "tokenizer_revision": tokenizer_revision, "tokenizer": tokenizer}
        self.args = TorchLlmArgs(model=model, **given, **{k: v for k, v in kwargs.items() if not k.startswith("_")})
        os.environ.update(self.args.env_overrides or {})
        self._control = Control(os.environ.get("STAND_IN_CONTROL"))
        self._is_shutdown = False
        self._ids = itertools.count(1)
        self._results: dict[int, RequestOutput] = {}
        self._rank_of: dict[int, int] = {}
        self._unpinned: set[int] = set()
        self._ballast: list[bytearray] = []
        self._num_empty = 0
        record({"llm": {"model": str(model), **given, **kwargs}})
        self.tokenizer = None if skip_tokenizer_init else self._load_tokenizer()
        self._max_seq_len = self.args.max_seq_len or self._read_model_len()
        self._ranks: list[RankProcess] = []
        atexit.register(self.shutdown)
        self._start()

    # ---- start

    def _load_tokenizer(self) -> Any:
        if self.args.custom_tokenizer not in (None, "deepseek_v32"):
            raise ValueError(f"Failed to import custom tokenizer: {self.args.custom_tokenizer}")
        return DeepseekV32Tokenizer.from_pretrained(self.args.tokenizer or self.args.model)

    def _read_model_len(self) -> int:
        return int(json.loads((Path(self.args.model) / "config.json").read_text())["max_position_embeddings"])

    def _start(self) -> None:
        fault = self._control.get("start_fault")
        if fault == "exit":
            os._exit(1)
        num_ranks = min(self.args.tensor_parallel_size, int(os.environ.get("STAND_IN_NUM_RANKS") or 2**30))
        for number in range(num_ranks):
            self._ranks.append(RankProcess(self._make_options(number), self._on_event))
        for rank in self._ranks:
            rank.wait_until_ready()
        time.sleep(self._control.get("start_s", 0.0))
        while fault == "hang":
            time.sleep(1.0)
        if fault in ("oom", "worker_died"):
            for rank in self._ranks:
                rank.stop(wait_s=5.0)
            died = "Executor worker died during initialization"
            raise RuntimeError(died if fault == "worker_died" else "CUDA out of memory. Tried to allocate 20.00 GiB")

    def _make_options(self, number: int) -> dict[str, Any]:
        alphabet = self.tokenizer.encode(LETTERS, add_special_tokens=False) if self.tokenizer else list(range(10, 40))
        max_batch_size = self.args.max_batch_size or 2048
        options: dict[str, Any] = {"rank": number, "stream_interval": self.args.stream_interval}
        return {**options, "max_batch_size": max_batch_size, "alphabet": sorted(set(alphabet))}

    # ---- requests

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: SchedulingParams | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        del lora_request, prompt_adapter_request, kv_cache_retention_config, disaggregated_params
        del trace_headers, _postproc_params, cache_salt
        self._look_for_faults()
        if self._is_shutdown:
            raise RuntimeError("LLM is shutting down")
        params = self._prepare_sampling_params(sampling_params)
        prompt, token_ids = self._read_inputs(inputs, params)
        if not self.args.enable_chunked_prefill and len(token_ids) > (self.args.max_num_tokens or 8192):
            raise RequestError(
                f"The sum of prompt length ({len(token_ids)}), query length (0) should not exceed "
                f"max_num_tokens ({self.args.max_num_tokens})"
            )
        return self._submit(prompt, token_ids, params, scheduling_params, streaming)

    def _prepare_sampling_params(self, params: SamplingParams | None) -> SamplingParams:
        if params is None:
            params = SamplingParams()
        if not isinstance(params, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams or None, but got {type(params)}")
        if params.n > 1 or params.use_beam_search:
            raise NotImplementedError("the stand-in makes one sequence a request")
        if params.end_id is None:
            if self.tokenizer is None:
                raise ValueError("tokenizer is required to reset end_id if it is None")
            params._setup(self.tokenizer)
        params._stream_interval = self.args.stream_interval
        params.return_perf_metrics = params.return_perf_metrics or self.args.return_perf_metrics
        return params

    def _read_inputs(self, inputs: Any, params: SamplingParams) -> tuple[str | None, list[int]]:
        if isinstance(inputs, dict):
            inputs = inputs.get("prompt_token_ids") or inputs.get("prompt")
        if isinstance(inputs, str):
            return inputs, self.tokenizer.encode(inputs, add_special_tokens=params.add_special_tokens)
        if not isinstance(inputs, list) or not all(isinstance(each, int) for each in inputs):
            raise TypeError("The inputs must be type str or list of int")
        return None, inputs

    def _submit(
        self,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        scheduling: SchedulingParams | None,
        streaming: bool,
    ) -> RequestOutput:
        number = next(self._ids)
        result = RequestOutput(self, number, prompt, token_ids, params)
        rank = self._choose_rank(scheduling)
        self._results[number], self._rank_of[number] = result, rank
        if scheduling is None or scheduling.attention_dp_rank is None:
            self._unpinned.add(number)
        told = {"rank": rank, "streaming": streaming, "num_inflight": len(self._results)}
        told["is_pinned"] = number not in self._unpinned
        record({"prompt": token_ids, "sampling": describe(params), **told})
        self._ballast.append(bytearray(os.urandom(1) * int(self._control.get("rss_bytes_per_request", 0))))
        self._ranks[rank].num_active += 1
        refusal = self._refuse(token_ids)
        if refusal:
            self._on_event({"id": number, "error": refusal})
        else:
            self._ranks[rank].send(self._make_order(number, token_ids, params))
        return result

    def _refuse(self, token_ids: list[int]) -> str | None:
        """What a worker would answer instead of taking it."""
        if len(token_ids) >= self._max_seq_len:
            return f"`default_max_tokens` ({self._max_seq_len - len(token_ids)}) must be greater than 0"
        if self.tokenizer is not None and any(not 0 <= each < len(self.tokenizer) for each in token_ids):
            return "Token ID out of range"
        return None

    def _choose_rank(self, scheduling: SchedulingParams | None) -> int:
        """A full rank's strict request waits for it, but only while no request without a rank is there."""
        balanced = min(range(len(self._ranks)), key=lambda each: self._ranks[each].num_active)
        wanted = scheduling.attention_dp_rank if scheduling is not None and self.args.enable_attention_dp else None
        if wanted is None:
            return balanced
        if not 0 <= wanted < self.args.tensor_parallel_size:
            self._is_shutdown = True
            raise IndexError("list index out of range")
        wanted %= len(self._ranks)  # fewer processes than ranks may stand in for them
        is_full = self._ranks[wanted].num_active >= (self.args.max_batch_size or 2048)
        is_strict = not scheduling.attention_dp_relax and not self._unpinned
        return wanted if is_strict or not is_full else balanced

    def _make_order(self, number: int, token_ids: list[int], params: SamplingParams) -> dict[str, Any]:
        think, think_end = (self.tokenizer and self.tokenizer.tokenizer.token_to_id(t) for t in ("<think>", "</think>"))
        marks = [each for each in token_ids if each in (think, think_end) and each is not None]
        guided = params.guided_decoding and params.guided_decoding.json
        return {
            "id": number,
            "prompt": token_ids,
            "max_tokens": min(params.max_tokens or 2**30, self._max_seq_len - len(token_ids)),
            "min_tokens": params.min_tokens,
            "is_greedy": params._greedy_decoding,
            "seed": params.seed,
            "stops": [ids for _, ids in params._get_stop_reasons_and_words()],
            "end_id": params.end_id,
            "ignore_eos": params.ignore_eos,
            "logprobs": params.logprobs,
            "is_empty": self._is_empty(),
            "guided": self.tokenizer.encode(make_instance(guided), add_special_tokens=False) if guided else None,
            "think_end": think_end if marks and marks[-1] == think else None,
        }

    def _is_empty(self) -> bool:
        asked = self._control.get("empty_answers", 0)
        self._num_empty = self._num_empty + 1 if asked else 0
        return asked is True or 0 < self._num_empty <= asked

    def _on_event(self, event: dict[str, Any]) -> None:
        result = self._results.get(event["id"])
        if result is None:
            return
        event["cached_tokens"] = self._control.get("cached_tokens", 0)
        if "error" in event or event["reason"]:
            del self._results[event["id"]]
            self._ranks[self._rank_of.pop(event["id"])].num_active -= 1
            self._unpinned.discard(event["id"])
        result._put(event)

    def _abort(self, number: int) -> None:
        record({"abort": number})
        if number in self._rank_of:
            self._ranks[self._rank_of[number]].send({"abort": number})

    # ---- health and the end

    def _look_for_faults(self) -> None:
        if self._control.has_fired("unhealthy"):
            self._is_shutdown = True
        if self._control.has_fired("crash"):
            self._is_shutdown = True
            raise RuntimeError("[TensorRT-LLM][ERROR] a worker died: CUDA error: unspecified launch failure")

    def _check_health(self) -> bool:
        self._is_shutdown = self._control.has_fired("unhealthy") or self._is_shutdown
        return not self._is_shutdown

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        del timeout
        is_on = self.args.enable_iter_perf_stats and self._rank_of
        return [{"iter": 1, "numActiveRequests": len(self._rank_of)}] if is_on else []

    def shutdown(self) -> None:
        while self._control.get("hang_shutdown") and self._ranks:
            time.sleep(0.05)
        self._is_shutdown = True
        atexit.unregister(self.shutdown)
        for rank in self._ranks:
            rank.stop(wait_s=5.0)
        self._ranks = []

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __getstate__(self) -> None:
        raise RuntimeError("LLM object can not be pickled.")


def record(call: dict[str, Any]) -> None:
    if path := os.environ.get("STAND_IN_CALLS"):
        with Path(path).open("a") as file:
            file.write(json.dumps(call, default=str) + "\n")


def describe(params: SamplingParams) -> dict[str, Any]:
    names = [name for name in SamplingParams.__dataclass_fields__ if not name.startswith("_")]
    return {name: getattr(params, name) for name in names if getattr(params, name) is not None}


def make_instance(schema: Any) -> str:
    """The smallest JSON text that fits a plain schema."""
    return json.dumps(instantiate(json.loads(schema) if isinstance(schema, str) else schema))


def instantiate(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        return {name: instantiate(part) for name, part in schema.get("properties", {}).items()}
    return {"string": "a", "integer": 1, "number": 1.5, "boolean": True, "array": []}.get(schema.get("type", ""))

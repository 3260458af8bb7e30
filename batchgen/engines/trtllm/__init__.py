"""The parts of the TensorRT-LLM engine (`engines.tensorrt_llm`).

The actor's side: `args` and `sampling` say in the vendor's words what the spec and a request ask; `process` starts `keeper`
and, through it, the engine's own process; `client` speaks to that over `wire`, `health` judges it, `orphans` and `gpu` see
that nothing of an earlier one is left. The other side: `child`, and what it is made of (`port`, `serve`, `probe`, `host`,
`errors`); `vendor` is the only module that imports TensorRT-LLM.
"""

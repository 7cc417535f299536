"""Run jobs inside vLLM: vllm_process.py JOB.json RESULTS.json [FEATURES.safetensors].

A job is a list of engines: {"name", "folder", "options", "runs"}; a run is a list of requests,
each a prompt and the arguments of SamplingParams. Results: {"engine/run": {"codes", "errors"}} and
{"engine": {"preemptions"}}. Not a test: tests start it and read its results.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    job, results_path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    # One process where one is enough: it starts faster and its errors are ours to see.
    several = any(engine["options"].get("tensor_parallel_size", 1) > 1 for engine in job)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(several))
    from safetensors.torch import load_file

    features = load_file(sys.argv[3]) if len(sys.argv) > 3 else {}
    results = {}
    for engine in job:
        results.update(run_engine(engine, features, several))
        results_path.write_text(json.dumps(results))


def run_engine(engine: dict, features: dict, several: bool) -> dict:
    from vllm import LLM

    begin, cpu = time.time(), time.process_time()
    more = {} if several else {"distributed_executor_backend": "uni"}
    llm = LLM(
        engine["folder"],
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **{
            "logits_processors": ["autoregressive.serving.vllm_guidance:Guidance"],
            **{"enforce_eager": True, "max_num_seqs": 16, **more, **engine["options"]},
        },
    )
    results = {}
    for name, requests in engine["runs"].items():
        results[f"{engine['name']}/{name}"] = run_requests(llm, requests, features)
    metrics = {} if several else {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    preemptions = metrics.get("vllm:num_preemptions")
    model = llm.llm_engine.vllm_config.model_config
    results[engine["name"]] = {
        "preemptions": preemptions,
        "kv_heads": model.get_total_num_kv_heads(),
        "seconds": time.time() - begin,
        "cpu_seconds": time.process_time() - cpu,
    }
    print("ENGINE", engine["name"], results[engine["name"]], flush=True)
    del llm
    gc.collect()
    return results


def run_requests(llm: object, requests: list[dict], features: dict) -> dict:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    def prompt(request: dict) -> dict:
        if "features" in request:
            return {"prompt_embeds": features[request["features"]]}
        return {"prompt_token_ids": request["prompt_token_ids"]}

    prompts = [prompt(request) for request in requests]
    parameters = [SamplingParams(**request["sampling"]) for request in requests]
    try:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
    except VLLMValidationError as error:
        return {"codes": [], "error": str(error)}
    return {"codes": [list(output.outputs[0].token_ids) for output in outputs], "error": None}


if __name__ == "__main__":
    main()

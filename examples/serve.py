"""A server that classifies texts with a packed model, on the processor.

    pip install fastapi uvicorn    # and hf_stompp with its extra `fast`
    python examples/serve.py bert-sst2-1bit --port 8000    # a folder, or a name on the Hub

    curl localhost:8000/predict --json '{"text": "A joy from start to finish."}'

The answer is a label and its score. /health answers as soon as texts can be sent. The same by uvicorn's own command,
with all its options:

    CHECKPOINT=bert-sst2-1bit uvicorn --app-dir examples --factory serve:create_app --limit-concurrency 100
"""

import argparse
import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, StringConstraints
from transformers import pipeline

from hf_stompp import kernels
from hf_stompp.fusion import fuse


class Input(BaseModel):
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)]


class Output(BaseModel):
    label: str
    score: float


def create_app(checkpoint: str | None = None) -> FastAPI:
    """The application for a checkpoint, by default the one that the environment's `CHECKPOINT` names."""
    classify = pipeline(
        "text-classification", model=checkpoint or os.environ["CHECKPOINT"], device="cpu", truncation=True
    )
    if len(classify.tokenizer) <= len(classify.tokenizer.all_special_tokens):  # transformers makes one of no words
        raise SystemExit(f"{checkpoint} has no tokenizer of its own: tokenizer.save_pretrained({checkpoint!r}).")
    longest = classify.model.config.max_position_embeddings
    own = classify.tokenizer.model_max_length  # some tokenizers have none
    classify.tokenizer.model_max_length = min(own, longest)
    fused = fuse(classify.model)  # which works under no_grad alone: a pipeline sees to that
    print(f"{kernels.info()}\nfused: {len(fused.bits)} pairs of layers, {len(fused.norms)} norms", flush=True)
    classify("The first call compiles the kernels and lays the weights out for them.")
    # As many texts at a time as there are cores, each on one thread: several threads on a text of a sentence or two
    # wait for each other more than they gain, and more texts at a time (a `def` endpoint has up to 40) take turns. Who
    # has to wait is served in the order of arrival.
    pool = ThreadPoolExecutor(torch.get_num_threads())
    torch.set_num_threads(1)
    app = FastAPI()

    @app.post("/predict")
    async def predict(input: Input) -> Output:
        [best] = await asyncio.get_running_loop().run_in_executor(pool, classify, input.text)
        return Output(**best)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer repeats the input, however large, and fails if that is no Unicode.
        reasons = [{"loc": reason["loc"], "msg": reason["msg"]} for reason in error.errors()]
        return JSONResponse({"detail": reasons}, status_code=422)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or name on the Hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(create_app(args.checkpoint), host=args.host, port=args.port)

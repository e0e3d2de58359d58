"""A stand-in for `vllm serve`: the part of its command line and of its HTTP API that the engine uses, on no model.

An answer is five words made from the prompt's tokens, the model's name and, when sampling, the seed. `/seen` gives the
bodies of all completions so far, `/told` what else was posted: loads and unloads with the adapter's name, sleep and
wake_up; and "broken off" for each answer that its asker did not wait for, streams aside.
Environment: FAKE_VLLM_ANSWER=text is the answer to all; FAKE_VLLM_FAILS=text ends with that text in the log;
FAKE_VLLM_DIES_AFTER=n exits at the n-th completion; FAKE_VLLM_STATUS=n is the status of all completions;
FAKE_VLLM_PAUSES=s waits so many seconds after each word of a stream, and before any other answer;
FAKE_VLLM_CERTIFICATE=file makes it https; FAKE_VLLM_SLEEPLESS=1 makes it a version that can't sleep,
FAKE_VLLM_IS_OLD=1 one that gives no token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def option(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


BASE = option("--served-model-name", sys.argv[2])
MAX_RANK = int(option("--max-lora-rank", "16"))
adapters: dict[str, str] = {}
seen: list[dict[str, Any]] = []
told: list[str] = []
SLEEPLESS = "FAKE_VLLM_SLEEPLESS" in os.environ
PAUSE_S = float(os.environ.get("FAKE_VLLM_PAUSES", "0"))


def words(body: dict[str, Any]) -> list[str]:
    seed = body["seed"] if body["temperature"] > 0 else None
    text = json.dumps([body["prompt"], body["model"], seed, os.getpid() if body["temperature"] and seed is None else 0])
    digest = hashlib.sha256(text.encode()).digest()
    return [f"w{number}" for number in digest[: min(5, body["max_tokens"])]]


def choice(text: str, body: dict[str, Any], numbers: list[str], finish: str | None) -> dict[str, Any]:
    logprobs = None
    if body.get("logprobs") is not None:
        tokens = [f"token_id:{word[1:]}" for word in numbers]
        logprobs = {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens)}
        logprobs["top_logprobs"] = [{token: -0.5, "token_id:9": -1.5} for token in tokens]
    made = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish, "stop_reason": None}
    if body.get("return_token_ids") and "FAKE_VLLM_IS_OLD" not in os.environ:
        made["token_ids"] = [*(int(word[1:]) for word in numbers), body["stop_token_ids"][0]]
    return made


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        """As vLLM does: whoever has no key gets no further than the health check."""
        key = os.environ.get("VLLM_API_KEY")
        if not key or not self.path.startswith("/v1") or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self.reply(401, {"error": "Unauthorized"})
        return True

    def do_GET(self) -> None:
        if self.refused():
            return
        models = [{"id": BASE, "parent": None, "max_model_len": 4096}]
        models += [{"id": name, "parent": BASE} for name in adapters]
        self.reply(200, {"/v1/models": {"data": models}, "/seen": seen, "/told": told}.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.refused():
            return
        if self.path == "/v1/completions":
            self.complete(body)
            return
        action = self.path.partition("?")[0].rpartition("/")[2]
        told.append(" ".join([action.removesuffix("_lora_adapter"), *filter(None, [body.get("lora_name")])]))
        actions = {"load_lora_adapter": self.load, "unload_lora_adapter": self.unload}
        if "--enable-sleep-mode" in sys.argv and os.environ.get("VLLM_SERVER_DEV_MODE") == "1" and not SLEEPLESS:
            actions |= {"sleep": self.done, "wake_up": self.done}
        actions.get(action, self.unknown)(body)

    def done(self, body: dict[str, Any]) -> None:
        self.reply(200, {})

    def unknown(self, body: dict[str, Any]) -> None:
        self.reply(404, {"detail": "Not Found"})

    def unload(self, body: dict[str, Any]) -> None:
        there = adapters.pop(body["lora_name"], None)
        self.reply(200 if there else 404, "Success" if there else {"error": {"message": "The adapter is not found."}})

    def load(self, body: dict[str, Any]) -> None:
        config = Path(body["lora_path"]) / "adapter_config.json"
        if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") != "True":
            self.reply(404, {"detail": "Not Found"})
        elif body["lora_name"] in adapters:
            self.reply(400, {"error": {"message": "The lora adapter has already been loaded."}})
        elif not config.is_file():
            self.reply(404, {"error": {"message": f"No adapter found for {body['lora_path']}"}})
        elif json.loads(config.read_text())["r"] > MAX_RANK:
            self.reply(500, {"error": {"message": f"LoRA rank is greater than max_lora_rank {MAX_RANK}"}})
        else:
            adapters[body["lora_name"]] = body["lora_path"]
            self.reply(200, "Success")

    def complete(self, body: dict[str, Any]) -> None:
        seen.append(body)
        if len(seen) == int(os.environ.get("FAKE_VLLM_DIES_AFTER", "0")):
            os.write(1, b"out of memory, said the fake\n")
            os._exit(3)
        if "FAKE_VLLM_STATUS" in os.environ:
            self.reply(int(os.environ["FAKE_VLLM_STATUS"]), {"error": {"message": "not now"}})
            return
        if body["model"] not in {BASE, *adapters}:
            self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        answer = [os.environ["FAKE_VLLM_ANSWER"]] if "FAKE_VLLM_ANSWER" in os.environ else words(body)
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(answer),
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        if not body.get("stream"):
            # Whoever waits for an answer sends nothing else, unless it is the end.
            if select.select([self.connection], [], [], PAUSE_S)[0]:
                told.append("broken off")
                self.close_connection = True
                return
            self.reply(200, {"choices": [choice(" ".join(answer), body, answer, "stop")], "usage": usage})
            return
        # Words come before their numbers: text and tokens of a chunk needn't be the same.
        texts = [word if place == 0 else f" {word}" for place, word in enumerate(answer)]
        pieces = [choice(text, body, answer[place - 1 : place], None) for place, text in enumerate(texts)]
        last = choice("", body, answer[-1:], "stop")
        events: list[dict[str, Any]] = [{"choices": [piece]} for piece in [*pieces, last]]
        events.append({"choices": [], "usage": usage})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(sum(map(len, lines))))
        self.end_headers()
        for line in lines:
            self.wfile.write(line.encode())
            self.wfile.flush()
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    if "FAKE_VLLM_FAILS" in os.environ:
        sys.exit(os.environ["FAKE_VLLM_FAILS"])
    server = ThreadingHTTPServer(("127.0.0.1", int(option("--port", "8000"))), Handler)
    if "FAKE_VLLM_CERTIFICATE" in os.environ:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.environ["FAKE_VLLM_CERTIFICATE"])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()

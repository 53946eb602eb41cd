"""Serve the engine of mistral.rs, from its Python package, with our own thin server: POST /v1/completions.

mistral.rs has a server of its own, which this is not. A request becomes a ``ChatCompletionRequest`` whose template is
the text itself, and the numbers of the answer are those of the engine.

    python serve.py FOLDER [f32|bf16|f16] [PORT]
"""

import json
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from mistralrs import Architecture, ChatCompletionRequest, ModelDType, Runner, Which

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def load(folder, dtype="f32", **options):
    kind = {"f32": ModelDType.F32, "bf16": ModelDType.BF16, "f16": ModelDType.F16}[dtype]
    which = Which.Plain(model_id=str(folder), arch=Architecture.Gemma2, dtype=kind, **options)
    with tempfile.TemporaryDirectory() as place:
        template = Path(place, "text.jinja")
        template.write_text(TEMPLATE)
        return Runner(which=which, jinja_explicit=str(template), no_paged_attn=True, prefix_cache_n=0)


def complete(runner, text, top, new=1, temperature=1.0):
    request = ChatCompletionRequest(
        messages=text, model="default", logprobs=True, top_logprobs=top, max_tokens=new, temperature=temperature
    )
    return runner.send_chat_completion_request(request)


def as_json(answer):
    content = [
        {"token": one.token, "logprob": one.logprob,
         "top_logprobs": [{"token": best.token, "logprob": best.logprob} for best in one.top_logprobs]}
        for one in answer.choices[0].logprobs.content
    ]  # fmt: skip
    choice = {"finish_reason": answer.choices[0].finish_reason, "logprobs": {"content": content}}
    return {"choices": [choice], "usage": {"prompt_tokens": answer.usage.prompt_tokens}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(body["prompt"], str) and not body.get("echo"):
            given = body["prompt"], body["logprobs"], body["max_tokens"], body["temperature"]
            status, found = 200, as_json(complete(self.server.runner, *given))
        else:
            status, found = 400, {"error": "takes one text, and does not repeat it"}
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", int(sys.argv[3]) if sys.argv[3:] else 8000), Handler)
    server.runner = load(*sys.argv[1:3])
    server.serve_forever()

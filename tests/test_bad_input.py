"""What clients get wrong, over HTTP to one real server: the promised answer, no trace, and it keeps serving."""

import gzip
import io
import json
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from adapters.appraiser import Appraiser
from adapters.files import FileOps
from adapters.registry import Registry
from adapters.store import Store
from loadtests.server_process import serving
from tests.adapters.samples import make_layout, write_folder

DEMO = Path(__file__).parents[1] / "demo"
LEGAL = DEMO / "adapters" / "legal"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
JSON = {"content-type": "application/json"}
GOOD = {"model": "legal", "prompt": "Q:", "max_tokens": 1}
USER = [{"role": "user", "content": "hi"}]

config = json.loads((LEGAL / CONFIG).read_text())
tensors = load_file(LEGAL / TENSORS)
weights = save(tensors, {"format": "pt"})
FIRST = "base_model.model.model.layers.0.self_attn.q_proj."


class Place:
    """The server under test, what it had at the beginning, and where it keeps it."""

    def __init__(self, client: httpx.Client, store: Path) -> None:
        self.client, self.store = client, store
        self.before = self.adapters()

    def adapters(self) -> list[dict]:
        return self.client.get("/v1/adapters").json()["data"]

    def files(self) -> set[Path]:
        return {path.relative_to(self.store) for path in self.store.rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    """The store was filled for another base: `odd` is at an adapter of that one, `mixed` has one in its history."""
    root = tmp_path_factory.mktemp("bad-input")
    fill_for_another_base(root / "store", write_folder(root / "odd"))
    flags = ["--served-model-name", "base", "--adapter-store", str(root / "store"), "--threads", "1"]
    flags += ["--lora-modules", f"legal={LEGAL}", "--lora-modules", f"mixed={LEGAL}"]
    flags += ["--max-loras", "2", "--max-lora-rank", "64", "--max-upload-bytes", "4MiB"]
    with (
        serving(DEMO / "base", *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield Place(client, root / "store")


def fill_for_another_base(root: Path, folder: Path) -> None:
    store = Store(root, FileOps())
    registry = Registry(store, Appraiser(make_layout(), torch.float32, 64, lambda adapter: None))
    registry.put_folder("odd", folder)
    registry.put_folder("mixed", folder, mover="start")  # so that the next start moves it on
    store.close()


@dataclass(frozen=True)
class Bad:
    """A request, the answer it must get, and words that its message or findings must have."""

    what: str
    status: int
    code: str
    send: Callable[[httpx.Client], httpx.Response]
    words: tuple[str, ...] = ()
    param: str | None = None


def completion(what, status, code, param, *words, **fields) -> Bad:
    return Bad(
        what, status, code, lambda client: client.post("/v1/completions", json=GOOD | fields), words, param
    )


def chat(what, status, code, param, *words, **fields) -> Bad:
    body = {"model": "base", "messages": USER, "max_tokens": 1} | fields
    return Bad(
        what, status, code, lambda client: client.post("/v1/chat/completions", json=body), words, param
    )


def raw(what, status, code, content, *words, path="/v1/completions", headers=JSON) -> Bad:
    return Bad(what, status, code, lambda client: client.post(path, content=content, headers=headers), words)


REQUESTS = [
    raw("cut short", 400, "invalid_value", b'{"prompt": "a', "not valid JSON"),
    raw("no JSON at all", 400, "invalid_value", b"prompt=a", "not valid JSON"),
    raw("an empty body", 400, "invalid_value", b"", "not valid JSON"),
    raw("bytes that are no text", 400, "invalid_value", b'{"prompt": "\xff"}', "not valid JSON"),
    raw("a list", 400, "invalid_value", b"[]", "must be a JSON object"),
    raw("half a character", 400, "invalid_value", b'{"prompt": "\\ud800"}', "not valid JSON"),
    raw("deep", 400, "invalid_value", b'{"prompt": ' + b"[" * 100_000, "not valid JSON"),
    raw(
        "another type",
        415,
        "unsupported_media_type",
        b"{}",
        "application/json",
        headers={"content-type": "text/plain"},
    ),
    raw("no type", 415, "unsupported_media_type", b"{}", "Content-Type", headers={}),
    raw(
        "a form",
        415,
        "unsupported_media_type",
        b"a=b",
        headers={"content-type": "application/x-www-form-urlencoded"},
    ),
    raw("too large", 413, "request_too_large", b'{"prompt": "' + b"x" * 5_000_000 + b'"}', "4194304 bytes"),
    raw("chat, too large", 413, "request_too_large", b" " * 5_000_000, path="/v1/chat/completions"),
    raw("tokens, cut short", 400, "invalid_value", b"{", path="/tokenize"),
    raw("a rollback, cut short", 400, "invalid_value", b"{", path="/v1/adapters/legal/rollback"),
    completion("no prompt", 400, "invalid_value", "prompt", "must be a string", prompt=None),
    completion("an empty list", 400, "invalid_value", "prompt", prompt=[]),
    completion("a mixed list", 400, "invalid_value", "prompt", prompt=["a", 1]),
    completion("a number for text", 400, "invalid_value", "prompt", prompt=5),
    completion("text for a number", 400, "invalid_value", "max_tokens", "must be", "'5'", max_tokens="5"),
    completion("true for a number", 400, "invalid_value", "max_tokens", max_tokens=True),
    completion("text for true", 400, "invalid_value", "stream", stream="yes"),
    completion("no tokens", 400, "invalid_value", "max_tokens", max_tokens=-1),
    completion("too hot", 400, "invalid_value", "temperature", "less than or equal to 2", temperature=2.5),
    completion("too cold", 400, "invalid_value", "temperature", temperature=-0.1),
    completion("top_p of nothing", 400, "invalid_value", "top_p", top_p=0),
    completion("top_p of too much", 400, "invalid_value", "top_p", top_p=1.5),
    completion("top_k below -1", 400, "invalid_value", "top_k", top_k=-2),
    completion("no choices", 400, "invalid_value", "n", n=0),
    completion("too many choices", 400, "invalid_value", "n", n=1000),
    completion("a seed of 65 bits", 400, "invalid_value", "seed", seed=2**64),
    completion("too many stop strings", 400, "invalid_value", "stop", stop=["a"] * 17),
    completion("an empty stop string", 400, "invalid_value", "stop", stop=""),
    completion(
        "options of no stream", 400, "invalid_value", "stream_options", stream_options={"include_usage": True}
    ),
    completion("too many prompts", 400, "invalid_value", "prompt", prompt=["a"] * 300),
    completion("an unknown model", 404, "model_not_found", "model", "GET /v1/models", model="gpt-4"),
    completion(
        "an unknown adapter",
        404,
        "adapter_not_found",
        "adapter",
        "no adapter",
        model="base",
        adapter="legale",
    ),
    completion("an unknown adapter of the base", 404, "adapter_not_found", "model", model="base:nobody"),
    completion(
        "an unknown adapter, streamed",
        404,
        "adapter_not_found",
        "adapter",
        model="base",
        adapter="x",
        stream=True,
    ),
    completion("an empty name", 400, "invalid_value", "adapter", adapter=""),
    completion("two adapters", 400, "invalid_value", "adapter", "'legal'", "'mixed'", adapter="mixed"),
    completion(
        "one that does not fit",
        409,
        "adapter_incompatible",
        "adapter",
        "cannot serve it",
        model="base",
        adapter="odd",
    ),
    completion("one that does not fit, as a model", 409, "adapter_incompatible", "model", model="odd"),
    completion("one that does not fit, of the base", 409, "adapter_incompatible", "model", model="base:odd"),
    completion(
        "a prompt over the limit",
        400,
        "context_length_exceeded",
        "prompt",
        "2048 tokens",
        prompt="a b c " * 5000,
    ),
    completion("ids over the limit", 400, "context_length_exceeded", "prompt", prompt=[5] * 2048),
    completion(
        "no room for so many", 400, "context_length_exceeded", "prompt", "5000 are asked for", max_tokens=5000
    ),
    completion("an id above the vocabulary", 400, "invalid_value", "prompt", "2048", prompt=[2048]),
    completion("an id below it", 400, "invalid_value", "prompt", prompt=[[5], [-1]]),
    completion("an id of 70 bits", 400, "invalid_value", "prompt", prompt=[2**70]),
    completion(
        "a stop id above the vocabulary", 400, "invalid_value", "stop_token_ids", stop_token_ids=[2048]
    ),
    completion("suffix", 400, "unsupported_parameter", "suffix", "leave it out", suffix="end"),
    completion(
        "response_format",
        400,
        "unsupported_parameter",
        "response_format",
        response_format={"type": "json_object"},
    ),
    completion("a grammar", 400, "unsupported_parameter", "guided_regex", guided_regex="a+"),
    completion("beam search", 400, "unsupported_parameter", "use_beam_search", use_beam_search=True),
    completion("best_of", 400, "unsupported_parameter", "best_of", best_of=3),
    chat("no messages", 400, "invalid_value", "messages", messages=[]),
    chat("messages of text", 400, "invalid_value", "messages", messages="hi"),
    chat(
        "an unknown role",
        400,
        "invalid_value",
        "messages.0.role",
        messages=[{"role": "king", "content": "hi"}],
    ),
    chat(
        "an image",
        400,
        "invalid_value",
        "messages.0.content",
        messages=[{"role": "user", "content": [{"type": "image_url"}]}],
    ),
    chat("tools that must be called", 400, "unsupported_parameter", "tool_choice", tool_choice="required"),
    chat(
        "a schema",
        400,
        "unsupported_parameter",
        "response_format",
        response_format={"type": "json_schema", "json_schema": {}},
    ),
    chat(
        "a template of one's own",
        400,
        "unsupported_parameter",
        "chat_template",
        chat_template="{{ messages }}",
    ),
    chat(
        "a conversation over the limit",
        400,
        "context_length_exceeded",
        "messages",
        messages=[{"role": "user", "content": "a b c " * 5000}],
    ),
    chat("an adapter that does not fit", 409, "adapter_incompatible", "model", model="odd"),
]


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes], mode: str = "w:gz", **fields: object) -> bytes:
    """`fields` are set on the first entry."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            fields = {}
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def linked_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo(CONFIG)
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def adapter(changed: Mapping[str, torch.Tensor | None] | None = None, **settings: object) -> bytes:
    """The demo's adapter with other tensors and another config; a tensor that is None is left out."""
    held = {name: tensor for name, tensor in (tensors | (changed or {})).items() if tensor is not None}
    return zipped({CONFIG: json.dumps(config | settings).encode(), TENSORS: save(held, {"format": "pt"})})


def of_rank(rank: int) -> bytes:
    """One module's factors at another rank, the config included."""
    a, b = tensors[FIRST + "lora_A.weight"], tensors[FIRST + "lora_B.weight"]
    held = {
        FIRST + "lora_A.weight": torch.full((rank, a.shape[1]), 0.01),
        FIRST + "lora_B.weight": torch.full((b.shape[0], rank), 0.01),
    }
    return zipped({CONFIG: json.dumps(config | {"r": rank}).encode(), TENSORS: save(held, {"format": "pt"})})


def every(change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> dict[str, torch.Tensor]:
    return {name: change(tensor).contiguous() for name, tensor in tensors.items() if part in name}


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


NAN = {FIRST + "lora_A.weight": tensors[FIRST + "lora_A.weight"].clone().fill_(float("nan"))}
HUGE = {FIRST + "lora_B.weight": tensors[FIRST + "lora_B.weight"].clone().fill_(float("inf"))}
files = {CONFIG: (LEGAL / CONFIG).read_bytes(), TENSORS: weights}
good = zipped(files)


def put(what, code, content, *words, status=400, name="new", **headers) -> Bad:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Bad(
        what,
        status,
        code,
        lambda client: client.put(f"/v1/adapters/{name}", content=content, headers=named),
        words,
        {"content-digest": "Content-Digest", "if-none-match": "If-None-Match"}.get(next(iter(named), "")),
    )


def form(what, code, parts, *words, status=400, name="new", param=None) -> Bad:
    return Bad(
        what,
        status,
        code,
        lambda client: client.post("/v1/adapters", data={"name": name}, files=parts),
        words,
        param,
    )


UPLOADS = [
    put("nothing", "invalid_archive", b"", "an empty file"),
    put("noise", "invalid_archive", b"hello", "not a zip, tar or tar.gz archive"),
    put("a zip cut short", "invalid_archive", good[: len(good) // 2], "damaged or cut short"),
    put("a tar cut short", "invalid_archive", tarred(files, "w")[:9000], "damaged or cut short"),
    put("a tar.gz cut short", "invalid_archive", tarred(files)[:9000], "damaged or cut short"),
    put("a gzip of noise", "invalid_archive", gzip.compress(b"hello" * 999), "damaged or cut short"),
    put("a bomb", "invalid_archive", zipped(files | {TENSORS: bytes(3 << 20)}), "100 times its size"),
    put("a bomb as a tar.gz", "invalid_archive", tarred({"x": bytes(3 << 20)}), "100 times its size"),
    put(
        "a large bomb",
        "adapter_upload_too_large",
        zipped(files | {TENSORS: os.urandom(3 << 20) + bytes(3 << 20)}),
        "unpacks to more",
        status=413,
    ),
    put(
        "a path upwards",
        "invalid_archive",
        zipped({"../" + CONFIG: b"{}"} | files),
        "leads out of the archive",
    ),
    put(
        "a path upwards in a tar",
        "invalid_archive",
        tarred({"a/../../" + CONFIG: b"{}"} | files),
        "leads out",
    ),
    put(
        "an absolute path",
        "invalid_archive",
        zipped({"/etc/" + CONFIG: b"{}"} | files),
        "leads out of the archive",
    ),
    put(
        "an absolute path in a tar",
        "invalid_archive",
        tarred({"/tmp/" + TENSORS: b"{}"} | files),
        "leads out",
    ),
    put("a link in a zip", "invalid_archive", linked_zip(), "is a link or a device"),
    put(
        "a link in a tar",
        "invalid_archive",
        tarred({CONFIG: b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "is a link",
    ),
    put(
        "a hard link in a tar",
        "invalid_archive",
        tarred({CONFIG: b""}, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "is a link",
    ),
    put("a device in a tar", "invalid_archive", tarred({CONFIG: b""}, type=tarfile.CHRTYPE), "a device"),
    put("one file twice", "invalid_archive", zipped(files | {"b/" + CONFIG: b"{}"}), "twice"),
    put(
        "too many entries",
        "invalid_archive",
        zipped(files | {f"{n}": b"" for n in range(64)}),
        "more than 64 entries",
    ),
    put(
        "a pickle in a zip",
        "invalid_archive",
        zipped({CONFIG: files[CONFIG], "adapter_model.bin": b"\x80\x02"}),
        "never loaded",
        "save_file",
    ),
    put("a pickle", "invalid_archive", pickle.dumps(tensors), "never loaded", "save_file"),
    put("a file of torch.save", "invalid_archive", torch_file(), "never loaded", "save_file"),
    put(
        "a pickle by a better name",
        "invalid_adapter",
        zipped(files | {TENSORS: pickle.dumps(1) + bytes(99)}),
        "never loaded",
    ),
    put("no tensors", "invalid_archive", zipped({CONFIG: b"{}"}), f"no {TENSORS}"),
    put("no config", "invalid_archive", zipped({TENSORS: weights}), f"no {CONFIG}"),
    put(
        "a bare safetensors",
        "invalid_archive",
        weights,
        "bare .safetensors",
        f"its {CONFIG} is needed too",
        "zip adapter.zip",
        "curl -T adapter.zip http://127.0.0.1:",
        "/v1/adapters/new",
    ),
    put("another archive", "invalid_archive", b"7z\xbc\xaf\x27\x1c", "7z archive"),
    put("tensors cut short", "invalid_adapter", zipped(files | {TENSORS: weights[:-9]}), TENSORS),
    put("a config that is no JSON", "invalid_adapter", zipped(files | {CONFIG: b"{"}), "is not JSON"),
    put(
        "a missing tensor",
        "invalid_adapter",
        adapter({FIRST + "lora_B.weight": None}),
        "has no lora_B beside it",
    ),
    put(
        "a stranger among the tensors",
        "invalid_adapter",
        adapter({"x": torch.ones(1)}),
        "not a tensor that peft writes",
    ),
    put(
        "transposed factors", "invalid_adapter", adapter(every(torch.t)), "transposed", "as peft stores them"
    ),
    put(
        "wrong shapes",
        "invalid_adapter",
        adapter(every(lambda tensor: tensor[:, :100], "lora_A")),
        "this base needs [r, 256]",
    ),
    put("NaN", "invalid_adapter", adapter(NAN), "holds NaN", "before it diverged"),
    put("infinity", "invalid_adapter", adapter(HUGE), "holds infinity"),
    put("no effect", "invalid_adapter", adapter(every(torch.zeros_like, "lora_B")), "every delta is zero"),
    put(
        "another base",
        "invalid_adapter",
        adapter(
            {
                **dict.fromkeys(tensors),
                **{name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()},
            }
        ),
        "is in this base",
    ),
    put("another dtype", "invalid_adapter", adapter(every(torch.Tensor.double)), "is of dtype F64"),
    put("rank 0", "invalid_adapter", of_rank(0), "rank 0"),
    put("a rank over the cap", "invalid_adapter", of_rank(65), "has rank 65", "up to 64"),
    put("another rank than the config's", "invalid_adapter", adapter(r=4), "has rank 8"),
    put("an adapter larger than the pool", "adapter_too_large", of_rank(48)),
    put("DoRA", "unsupported_adapter_feature", adapter(use_dora=True), "use_dora"),
    put(
        "DoRA by its tensors",
        "unsupported_adapter_feature",
        adapter({FIRST + "lora_magnitude_vector": torch.ones(256)}),
        "DoRA",
    ),
    put(
        "modules_to_save",
        "unsupported_adapter_feature",
        adapter(modules_to_save=["lm_head"]),
        "modules_to_save",
    ),
    put(
        "a whole matrix",
        "unsupported_adapter_feature",
        adapter({"base_model.model.lm_head.weight": torch.ones(4, 4)}),
        "is a whole matrix",
    ),
    put("aLoRA", "unsupported_adapter_feature", adapter(alora_invocation_tokens=[1, 2]), "invocation tokens"),
    put(
        "PiSSA",
        "unsupported_adapter_feature",
        adapter(init_lora_weights="pissa_niter_4"),
        "path_initial_model_for_weight_conversion",
    ),
    put(
        "OLoRA",
        "unsupported_adapter_feature",
        adapter(init_lora_weights="olora"),
        "at the start of training",
    ),
    put("another method", "unsupported_adapter_feature", adapter(peft_type="IA3"), "only LORA is served"),
    put("a setting that nobody knows", "unsupported_adapter_feature", adapter(use_magic=True), "use_magic"),
    put("a colon in the name", "invalid_adapter_name", good, "1 to 64 letters", name="a:b"),
    put("a comma in the name", "invalid_adapter_name", good, name="a,b"),
    put("quotes in the name", "invalid_adapter_name", good, name="a%22b"),
    put("a single quote in the name", "invalid_adapter_name", good, name="a'b"),
    put("upwards as a name", "invalid_adapter_name", good, name="%2e%2e"),
    put("a path as a name", "invalid_adapter_name", good, name="..%2F..%2Fetc"),
    put("a slash in the name", "invalid_adapter_name", good, name="a/b"),
    put("a name of nothing", "invalid_adapter_name", good, name=""),
    put("300 characters", "invalid_adapter_name", good, name="a" * 300),
    put("a NUL in the name", "invalid_adapter_name", good, name="a%00b"),
    put("a line's end in the name", "invalid_value", good, "%0A", name="legal%0A"),
    put("another script", "invalid_adapter_name", good, name="ünï"),
    put("the base's name", "invalid_adapter_name", good, "base model's name", name="base"),
    put("an upload too large", "adapter_upload_too_large", bytes(5 << 20), "--max-upload-bytes", status=413),
    put("JSON", "unsupported_media_type", b"{}", status=415, content_type="application/json"),
    put(
        "a form where an archive goes",
        "unsupported_media_type",
        b"--a--",
        "POST /v1/adapters",
        status=415,
        content_type="multipart/form-data; boundary=a",
    ),
    put("another digest", "invalid_value", good, "another sha-256", content_digest="sha-256=:AAAA:"),
    put("If-None-Match", "invalid_value", good, "not supported", if_none_match="*"),
    put(
        "another generation",
        "precondition_failed",
        good,
        "is at",
        status=412,
        name="legal",
        if_match='"' + "0" * 64 + '"',
    ),
    form(
        "a pickle in a form",
        "invalid_archive",
        [("file", (CONFIG, b"{}")), ("file", ("adapter_model.bin", b"\x80\x02"))],
        "never loaded",
    ),
    form("one file of two", "invalid_archive", {TENSORS: ("t", weights)}, f"no {CONFIG}", "curl -T"),
    form("one file twice in a form", "invalid_archive", [("file", (CONFIG, b"{}"))] * 2, "twice"),
    form(
        "a bare safetensors in a form",
        "invalid_archive",
        {"file": ("w.safetensors", weights)},
        "bare .safetensors",
        "/v1/adapters/new",
    ),
    form(
        "two files that do not fit",
        "invalid_adapter",
        [("file", (CONFIG, b"{")), ("file", (TENSORS, weights))],
        "is not JSON",
    ),
    form("a form with a path as a name", "invalid_adapter_name", {"file": ("a", good)}, name="../../etc"),
    form("a form too large", "adapter_upload_too_large", {"file": ("a", bytes(5 << 20))}, status=413),
    form("a form without a file", "invalid_value", {"other": (None, b"x")}, "file is required", param="file"),
    raw(
        "a form that is JSON",
        415,
        "unsupported_media_type",
        b'{"name": "a"}',
        "curl -F name=",
        path="/v1/adapters",
    ),
    raw(
        "a form cut short",
        400,
        "invalid_value",
        b"--a\r\n",
        "is malformed",
        path="/v1/adapters",
        headers={"content-type": "multipart/form-data; boundary=a"},
    ),
]

OTHERS = [
    Bad(
        "an incompatible version",
        409,
        "adapter_incompatible",
        lambda client: client.post("/v1/adapters/mixed/rollback", json={"to": 1}),
        ("cannot be served",),
    ),
    Bad(
        "a version that is not",
        404,
        "adapter_not_found",
        lambda client: client.post("/v1/adapters/mixed/rollback", json={"to": 9}),
        ("has no version 9",),
    ),
    Bad(
        "a rollback of nobody",
        404,
        "adapter_not_found",
        lambda client: client.post("/v1/adapters/nobody/rollback", json={"to": 1}),
    ),
    Bad("nobody's removal", 404, "adapter_not_found", lambda client: client.delete("/v1/adapters/nobody")),
    Bad(
        "the base's removal",
        400,
        "invalid_value",
        lambda client: client.delete("/v1/models/base"),
        ("cannot be removed",),
        "model",
    ),
    Bad(
        "nobody's removal as a model",
        404,
        "model_not_found",
        lambda client: client.delete("/v1/models/nobody"),
        (),
        "model",
    ),
    Bad("no route", 404, "not_found", lambda client: client.get("/v2"), ("GET /v2",)),
    Bad("another method", 405, "method_not_allowed", lambda client: client.put("/v1/completions", json={})),
    Bad(
        "a preflight",
        405,
        "method_not_allowed",
        lambda client: client.options(
            "/v1/completions",
            headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
        ),
    ),
    Bad(
        "a page of another site",
        403,
        "insufficient_scope",
        lambda client: client.put(
            "/v1/adapters/new", content=good, headers={"origin": "https://evil.example"}
        ),
    ),
    Bad(
        "ids above the vocabulary",
        400,
        "invalid_value",
        lambda client: client.post("/detokenize", json={"tokens": [2048]}),
        ("2048",),
        "tokens",
    ),
    Bad(
        "both kinds of text",
        400,
        "invalid_value",
        lambda client: client.post("/tokenize", json={"prompt": "a", "messages": USER}),
        (),
        "prompt",
    ),
]

TYPES = {403: "permission_error", 409: "conflict_error"}


@pytest.mark.parametrize("bad", [*REQUESTS, *UPLOADS, *OTHERS], ids=lambda bad: bad.what)
def test_it_is_refused_and_nothing_is_left(place, bad):
    before = place.adapters(), place.files()
    response = bad.send(place.client)
    assert response.status_code == bad.status, response.text
    (body,) = response.json().values()
    assert set(body) - {"details"} == {"message", "type", "param", "code"}
    assert (body["code"], body["param"]) == (bad.code, bad.param), body
    assert body["type"] == TYPES.get(bad.status, "invalid_request_error")
    said = body["message"] + str(body.get("details", ""))
    assert not [word for word in bad.words if word not in said], said
    assert len(response.content) < 4000, "what was sent is repeated at length"
    assert str(place.store) not in said
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert (response.headers.get("x-should-retry") == "false") is (bad.status == 409)
    assert (response.headers.get("connection") == "close") is (bad.status == 413)
    assert (place.adapters(), place.files()) == before
    assert place.client.post("/v1/completions", json=GOOD).status_code == 200


def test_findings_name_the_place_and_the_cure(place):
    response = place.client.put("/v1/adapters/new", content=adapter(every(torch.t), use_dora=True))
    details = response.json()["error"]["details"]
    assert any("use_dora" in finding["where"] for finding in details)
    assert all(finding["where"] and finding["problem"] for finding in details)
    assert len(details) == 7, "of each kind the first five, and how many more"


def test_the_line_that_a_bare_safetensors_is_answered_with_works(place, tmp_path):
    response = place.client.put("/v1/adapters/by-the-line", content=weights)
    line = response.json()["error"]["message"].partition("to send one: ")[2]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(["sh", "-ec", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    try:
        assert json.loads(done.stdout[done.stdout.index("{") :])["id"] == "by-the-line", done
    finally:
        place.client.delete("/v1/adapters/by-the-line")


def test_what_the_table_sends_is_good_but_for_its_fault(place):
    """Else it would be about nothing."""
    try:
        for sent in (good, tarred(files), tarred(files, "w"), adapter(), of_rank(32)):
            assert place.client.put("/v1/adapters/new", content=sent).status_code in (200, 201)
        sent = [("file", (name, data)) for name, data in files.items()]
        assert place.client.post("/v1/adapters", data={"name": "new"}, files=sent).status_code == 201
    finally:
        place.client.delete("/v1/adapters/new")
    assert (
        place.client.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 1}).status_code == 200
    )


def test_a_name_that_does_not_fit_is_listed_and_can_be_replaced(place):
    (odd,) = [entry for entry in place.before if entry["id"] == "odd"]
    assert (odd["state"], bool(odd["findings"])) == ("incompatible", True)
    assert "odd" not in {model["id"] for model in place.client.get("/v1/models").json()["data"]}
    assert place.client.put("/v1/adapters/odd", content=good).status_code == 201
    body = {"model": "odd", "prompt": "Q:", "max_tokens": 1}
    assert place.client.post("/v1/completions", json=body).status_code == 200
    assert place.client.delete("/v1/models/odd").json()["deleted"] is True
    assert place.client.post("/v1/completions", json=body).status_code == 404


def test_a_line_s_end_in_a_path_is_no_way_to_another_name(place):
    for method, path in (("DELETE", "adapters/legal"), ("GET", "adapters/legal"), ("DELETE", "models/legal")):
        response = place.client.request(method, f"/v1/{path}%0A")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")

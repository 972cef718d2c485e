"""One set of fields from flags, environment, file and defaults, in this order; mistakes are one line."""

from pathlib import Path

import pydantic
import pytest

from kernels import segments
from server import config
from server.config import Settings, SettingsError, flag
from server.config_sources import load_client_settings, load_settings
from server.config_values import LoraModule
from server.other_flags import ALIASES, ALWAYS, REFUSED


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_the_order_of_sources(file, monkeypatch):
    path = file("model: from-file\nport: 1\nmax-num-seqs: 2\nblock_size: 4\n")
    monkeypatch.setenv("LORAPLEX_PORT", "10")
    monkeypatch.setenv("LORAPLEX_MAX_NUM_SEQS", "20")
    monkeypatch.setenv("LORAPLEX_HOST", "")
    settings = load_settings({"port": "100"}, path)
    assert (settings.port, settings.max_num_seqs, settings.block_size) == (100, 20, 4)
    assert (settings.model, settings.host, settings.prefill_chunk) == ("from-file", "127.0.0.1", 128)


def test_blocks_fill_the_tiles_of_attention():
    assert config.KV_TILE == segments.KV_TILE
    with pytest.raises(SettingsError, match="--block-size must divide 256"):
        load_settings({"model": "m", "block_size": "24"})


def test_settings_are_frozen():
    settings = Settings(model="a")
    with pytest.raises(pydantic.ValidationError):
        settings.port = 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 1024**2),
        ("1GiB", 1024**3),
        ("2GB", 2 * 10**9),
        ("1.5 kib", 1536),
        ("100", 100),
        ("7b", 7),
    ],
)
def test_sizes(text, size):
    assert load_settings({"model": "a", "max_upload_bytes": text}).max_upload_bytes == size


def test_adapters_to_register(file, monkeypatch):
    expected = (LoraModule("a", Path("/x")), LoraModule("b", Path("/y=z")))
    assert load_settings({"model": "m", "lora_modules": ["a=/x", "b=/y=z"]}).lora_modules == expected
    assert load_settings({"model": "m"}, file("lora-modules: {a: /x, b: /y=z}")).lora_modules == expected
    assert load_settings({"model": "m"}, file("lora_modules: [a=/x, b=/y=z]")).lora_modules == expected
    monkeypatch.setenv("LORAPLEX_LORA_MODULES", "a=/x,b=/y=z")
    assert load_settings({"model": "m"}).lora_modules == expected
    assert Settings(model="m", lora_modules=expected).lora_modules == expected


def secrets(keys):
    return [key.get_secret_value() for key in keys]


def test_keys(file, monkeypatch, tmp_path):
    listed = load_settings({"model": "m", "api_key": ["a", "b,c", "a"]})
    assert secrets(listed.api_key) == ["a", "b", "c"]
    assert secrets(load_settings({"model": "m"}, file("api-key: a")).api_key) == ["a"]
    assert secrets(load_settings({"model": "m"}, file("api-key: [a, b]")).api_key) == ["a", "b"]
    monkeypatch.setenv("LORAPLEX_API_KEY", "x,y")
    monkeypatch.setenv("LORAPLEX_ADMIN_API_KEY", "z")
    assert secrets(load_settings({"model": "m"}).api_key) == ["x", "y"]
    assert secrets(load_settings({"model": "m"}).admin_api_key) == ["z"]
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    given = {"model": "m", "api_key_file": str(tmp_path / "keys")}
    assert secrets(load_settings(given).api_key) == ["x", "y", "one", "two"]
    given = {"model": "m", "admin_api_key": ["three"], "admin_api_key_file": str(tmp_path / "keys")}
    assert secrets(load_settings(given).admin_api_key) == ["three", "one", "two"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"api_key": [""]}, ["--api-key", "visible ASCII"]),
        ({"api_key": "hush hush"}, ["--api-key", "visible ASCII"]),
        ({"api_key": "hush\u00e9"}, ["--api-key", "visible ASCII"]),
        ({"admin_api_key": ["hush,"]}, ["--admin-api-key", "visible ASCII"]),
        ({"api_key": 12345}, ["--api-key", "in quotes"]),
        ({"api_key": "hush", "admin_api_key": ["hush"]}, ["--admin-api-key must differ"]),
        ({"api_key_file": "/nowhere/keys"}, ["--api-key-file /nowhere/keys", "No such file"]),
        ({"admin_api_key_file": "/dev/null"}, ["--admin-api-key-file /dev/null", "holds no key"]),
    ],
)
def test_keys_that_cannot_be_are_not_repeated(flags, words):
    with pytest.raises(SettingsError) as caught:
        load_settings({"model": "m", **flags})
    line = str(caught.value)
    assert all(word in line for word in words), line
    assert "\n" not in line
    assert "hush" not in line
    assert "12345" not in line


def test_a_broken_file_is_not_quoted(file):
    with pytest.raises(SettingsError, match="line 3: ") as caught:
        load_settings({"model": "m"}, file("port: 1\napi-key: [hush\nx: 1\n"))
    assert "hush" not in str(caught.value)


def test_keys_are_shown_nowhere():
    settings = load_settings({"model": "m", "api_key": "hush", "admin_api_key": "psst"})
    for text in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "hush" not in text
        assert "psst" not in text


def test_spellings_of_nf4():
    assert load_settings({"model": "m", "quantization": "bitsandbytes"}).quantization == "nf4"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, ["MODEL is missing", "loraplex serve"]),
        ({"model": "m", "port": "70000"}, ["--port", "65535", "'70000'"]),
        ({"model": "m", "port": "x"}, ["--port", "'x'"]),
        ({"model": "m", "dtype": "int3"}, ["--dtype", "'float32'", "'int3'"]),
        ({"model": "m", "max_upload_bytes": "2 apples"}, ["--max-upload-bytes", "512MiB", "2 apples"]),
        ({"model": "m", "max_upload_bytes": "0"}, ["--max-upload-bytes", "greater than or equal to 1"]),
        ({"model": "m", "lora_modules": ["a"]}, ["--lora-modules", "name=path"]),
        ({"model": "m", "lora_modules": ["a=/x", "a=/y"]}, ["--lora-modules", "twice"]),
        ({"model": "m", "lora_modules": ["_a=/x"]}, ["--lora-modules", "'_a'", "use 1 to 64 letters"]),
        ({"model": "m", "lora_modules": ["m=/x"]}, ["--lora-modules", "m is the base's own name"]),
        (
            {"model": "/x/m", "served_model_name": "a,b", "lora_modules": ["b=/x"]},
            ["--lora-modules", "b is the base's own name", "--served-model-name"],
        ),
        ({"model": "m", "prefill_chunk": "600"}, ["--prefill-chunk 600", "--max-num-batched-tokens 512"]),
        ({"model": "m", "shutdown_timeout": "nan"}, ["--shutdown-timeout"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(flags, words):
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


def test_mistakes_name_the_variable_or_the_file(file, monkeypatch):
    with pytest.raises(SettingsError, match=r"max-num-seqs in .*config.yaml: must be"):
        load_settings({"model": "m"}, file("max-num-seqs: many"))
    monkeypatch.setenv("LORAPLEX_PORT", "eighty")
    with pytest.raises(SettingsError, match="LORAPLEX_PORT: must be"):
        load_settings({"model": "m"})


def test_variables_that_are_no_setting_are_said(monkeypatch, caplog):
    monkeypatch.setenv("LORAPLEX_API_KEYS", "secret")
    monkeypatch.setenv("LORAPLEX_URL", "http://elsewhere")
    assert load_settings({"model": "m"}).api_key == ()
    (record,) = caplog.records
    assert (
        record.getMessage()
        == "LORAPLEX_API_KEYS is no setting and changes nothing; was LORAPLEX_API_KEY meant?"
    )


def test_what_kubernetes_says_of_a_service_of_our_name(monkeypatch, caplog):
    said = {"PORT": "tcp://10.0.0.1:8000", "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT_HTTP": "8000"}
    said |= {
        "PORT_8000_TCP_ADDR": "10.0.0.1",
        "EU_SERVICE_HOST": "10.0.0.2",
        "EU_PORT": "tcp://10.0.0.2:8000",
    }
    for name, value in said.items():
        monkeypatch.setenv(f"LORAPLEX_{name}", value)
    assert load_settings({"model": "m"}).port == 8000
    assert load_settings({"model": "m", "port": "8001"}).port == 8001
    assert {record.args[0] for record in caplog.records} == {"LORAPLEX_PORT"}


def test_a_variable_names_the_file(file, monkeypatch):
    monkeypatch.setenv("LORAPLEX_CONFIG", str(file("model: from-file")))
    assert load_settings({}).model == "from-file"


@pytest.mark.parametrize("text", ["prot: 1", "- a", "a: [", "5"])
def test_files_that_cannot_be(file, text):
    with pytest.raises(SettingsError) as caught:
        load_settings({"model": "m"}, file(text))
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(SettingsError, match=r"nowhere\.yaml"):
        load_settings({"model": "m"}, Path("nowhere.yaml"))
    assert load_settings({"model": "m"}, None).port == 8000


def test_derived_values(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    settings = Settings(model="/models/llama/")
    assert settings.base_name == "llama"
    assert settings.store_folder == tmp_path / "loraplex" / "store"
    assert settings.quantized_folder == Path.home() / ".cache" / "loraplex" / "quantized"
    assert Settings(model="org/llama", served_model_name="x").base_name == "x"
    assert Settings(model="a", adapter_store="/s").store_folder == Path("/s")


def test_modules_in_vllms_json_form(file, monkeypatch):
    expected = (LoraModule("a", Path("/x")), LoraModule("b", Path("/y"), "m"))
    texts = ['{"name": "a", "path": "/x"}', '{"name": "b", "path": "/y", "base_model_name": "m"}']
    assert load_settings({"model": "m", "lora_modules": texts}).lora_modules == expected
    assert load_settings({"model": "m"}, file(f"lora-modules: [{', '.join(texts)}]")).lora_modules == expected
    monkeypatch.setenv("LORAPLEX_LORA_MODULES", f"[{', '.join(texts)}]")
    assert load_settings({"model": "m"}).lora_modules == expected
    monkeypatch.setenv("LORAPLEX_LORA_MODULES", texts[0])
    assert load_settings({"model": "m"}).lora_modules == expected[:1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "a"}', "must be given as"),
        ('{"name": "a", "path": "/x", "rank": 8}', "must be given as"),
        ('{"name": "a", "path": 5}', "must be given as"),
        ('{"name": "a", "path"', "must be given as"),
        ('{"name": "a", "path": "/x", "base_model_name": "other"}', "a is for the base other, and this is m"),
    ],
)
def test_modules_in_json_that_cannot_be(text, words):
    with pytest.raises(SettingsError) as caught:
        load_settings({"model": "m", "lora_modules": [text]})
    assert str(caught.value).startswith("--lora-modules: ")
    assert words in str(caught.value)


def test_several_names_of_the_base(file, monkeypatch):
    for settings in (
        load_settings({"model": "/x/m", "served_model_name": ["a", "b"]}),
        load_settings({"model": "/x/m"}, file("served-model-name: [a, b]")),
        Settings(model="/x/m", served_model_name="a,b"),
    ):
        assert (settings.base_name, settings.base_names) == ("a", {"a", "b", "/x/m"})
    assert Settings(model="/x/m").base_names == {"m", "/x/m"}
    with pytest.raises(SettingsError, match="--served-model-name"):
        load_settings({"model": "m", "served_model_name": [""]})


@pytest.mark.parametrize("name", ALIASES)
def test_names_that_other_servers_have(name, file, monkeypatch):
    value = {
        "model": "m",
        "lora_modules": "a=/x",
        "adapter_dtype": "bfloat16",
        "gpu_memory_utilization": "0.5",
    }
    text, ours = value.get(ALIASES[name], "7"), ALIASES[name]
    base = {} if ours == "model" else {"model": "m"}
    expected = getattr(load_settings(base | {ours: text}), ours)
    assert getattr(load_settings(base | {name: text}), ours) == expected
    assert getattr(load_settings(base, file(f"{name.replace('_', '-')}: {text}")), ours) == expected
    with pytest.raises(SettingsError, match="are one setting"):
        load_settings(base | {ours: text, name: text})
    monkeypatch.setenv(f"LORAPLEX_{name.upper()}", text)
    assert getattr(load_settings(base), ours) == expected


@pytest.mark.parametrize("name", ALWAYS)
def test_what_is_always_so_is_accepted_and_its_contrary_is_not(name, file):
    for true in (True, "true", "1"):
        assert load_settings({"model": "m", name: true}) == Settings(model="m")
    assert load_settings({"model": "m"}, file(f"{name}: true")) == Settings(model="m")
    with pytest.raises(SettingsError, match=f"{flag(name)}: .* cannot be turned off"):
        load_settings({"model": "m", name: False})
    with pytest.raises(SettingsError, match="cannot be turned off"):
        load_settings({"model": "m"}, file(f"{name}: false"))


def test_what_cannot_be_honoured_is_refused_wherever_it_stands(file, monkeypatch):
    with pytest.raises(SettingsError, match=r"^tensor-parallel-size in .*: a server runs on one device"):
        load_settings({"model": "m"}, file("tensor-parallel-size: 2"))
    monkeypatch.setenv("LORAPLEX_LOAD_FORMAT", "bitsandbytes")
    with pytest.raises(SettingsError, match=r"^LORAPLEX_LOAD_FORMAT: .* leave it out"):
        load_settings({"model": "m"})


def test_no_name_is_ours_and_anothers():
    names = [*Settings.model_fields, *ALIASES, *ALWAYS, *REFUSED]
    assert len(set(names)) == len(names)
    assert set(ALIASES.values()) <= set(Settings.model_fields)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_loras": "4", "adapter_memory_bytes": "1GiB"}, "--max-loras and --adapter-memory-bytes"),
        ({"max_cpu_loras": "4", "adapter_host_memory_bytes": "1GiB"}, "--max-cpu-loras and --adapter-host"),
        (
            {"gpu_memory_utilization": "0.9", "kv_cache_memory_bytes": "1GiB"},
            "--gpu-memory-utilization and --kv",
        ),
        ({"gpu_memory_utilization": "90"}, "less than or equal to 1"),
        ({"ssl_certfile": "c.pem"}, "--ssl-certfile and --ssl-keyfile go together"),
    ],
)
def test_what_contradicts_itself(flags, words):
    with pytest.raises(SettingsError) as caught:
        load_settings({"model": "m", **flags})
    assert words in str(caught.value)


def test_a_client_finds_its_server_and_its_key(monkeypatch):
    for name in ("URL", "API_KEY", "ADMIN_API_KEY"):
        monkeypatch.delenv(f"LORAPLEX_{name}", raising=False)
    assert load_client_settings(None, None) == ("http://127.0.0.1:8000", None)
    monkeypatch.setenv("LORAPLEX_URL", "https://a/llm/v1/")
    monkeypatch.setenv("LORAPLEX_API_KEY", "user")
    assert load_client_settings(None, None) == ("https://a/llm", "user")
    monkeypatch.setenv("LORAPLEX_ADMIN_API_KEY", "admin")
    assert load_client_settings("http://b:1", None) == ("http://b:1", "admin")
    assert load_client_settings("http://b:1", "typed") == ("http://b:1", "typed")
    monkeypatch.setenv("LORAPLEX_URL", "a:8000")
    with pytest.raises(SettingsError, match="LORAPLEX_URL: must be like"):
        load_client_settings(None, None)

"""A model by its hub id, sharded over two ranks: fetched once per node, and trained to the folder's bits."""

import http.server
import json
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from metatt_scale.backbone import byte_tokenizer
from tests.distributed.jobs import TRAIN, adapter_of, finish, job, torchrun, write_recipe
from tests.toy import LLAMA

pytestmark = pytest.mark.slow
HUB_ID, COMMIT = "someone/tiny-llama", "a" * 40


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tiny-llama"
    config = AutoConfig.for_model(**LLAMA)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="30kB")
    byte_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickles are not fetched")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@contextmanager
def hub(folder: Path):
    """Serve a folder by the hub's protocol on a port of this host; give its address and what was downloaded."""
    downloads: Counter[str] = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/{HUB_ID}/resolve/").partition("/")[2]
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith(f"/api/models/{HUB_ID}/"):
                sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
                tree = [{"type": "file", "path": n, "size": size, "oid": n} for n, size in sizes.items()]
                info = {"id": HUB_ID, "sha": COMMIT, "siblings": [{"rfilename": n} for n in sizes]}
                data = json.dumps(tree if "/tree/" in path else info).encode()
            elif name and (folder / name).is_file():
                data = (folder / name).read_bytes()
                headers["ETag"] = f'"{name}"'
                downloads[name] += body
            else:
                data, headers = b"", {"X-Error-Code": "EntryNotFound" if name else "RepoNotFound"}
            self.send_response(200 if data else 404)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", downloads
    finally:
        server.shutdown()
        server.server_close()


def sharded(folder, name, path):
    backbone = {"path": str(path), "dtype": "float32"}
    return torchrun(TRAIN, write_recipe(folder, name, backbone=backbone, parallel={"backbone": "fsdp2"}))


def online(address, folder):
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(folder / "home")}


def test_two_ranks_fetch_each_file_once(tmp_path, model_folder):
    finish(sharded(tmp_path, "folder", model_folder), tmp_path / "folder.log")
    with hub(model_folder) as (address, downloads):
        finish(sharded(tmp_path, "hub", HUB_ID), tmp_path / "hub.log", **online(address, tmp_path))
        weights = {name: count for name, count in downloads.items() if name.endswith((".safetensors", ".bin"))}
        assert weights == {file.name: 1 for file in model_folder.glob("*.safetensors")}
    assert adapter_of(tmp_path / "hub") == adapter_of(tmp_path / "folder")
    # what is in the cache needs no hub
    finish(sharded(tmp_path, "offline", HUB_ID), tmp_path / "offline.log", HF_HOME=str(tmp_path / "home"))
    assert adapter_of(tmp_path / "offline") == adapter_of(tmp_path / "folder")


def test_what_the_hub_lacks_is_one_message(tmp_path, model_folder):
    with (
        hub(model_folder) as (address, _),
        job(sharded(tmp_path, "no", "someone/else"), tmp_path / "log", **online(address, tmp_path)) as running,
    ):
        assert running.wait() != 0
    assert "backbone.path 'someone/else'" in running.output()

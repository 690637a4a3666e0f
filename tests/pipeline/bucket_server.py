"""A server that speaks as much of Google Cloud Storage as TensorStore asks, for tests.

TensorStore's gs:// driver, and Orbax through it, talk to this server. etils asks an fsspec file
system for the same objects; it stands in for gcsfs, and as in a bucket there are no empty
directories. So nothing of this package, of Orbax or of TensorStore knows that it is a test.
Processes that a test starts find the server in their environment; `reading_from_server` gives them
the same file system.
"""

import contextlib
import http.server
import io
import itertools
import json
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from orbax.checkpoint._src.path import gcs_utils

from mlpmem_jax.store.arrays import open_array, read_rows


class Objects:
    """What all buckets hold: name, its bucket included, to content.

    Attributes:
        written: Names in the order in which they were written.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._held = {}
        self._generations = itertools.count(1)
        self.written = []

    def put(self, name, data, expected=None):
        """Writes an object, if it is of the expected generation; returns whether it was."""
        with self._lock:
            if expected not in (None, self._held.get(name, (None, 0))[1]):
                return False
            self._held[name] = (bytes(data), next(self._generations))
            self.written.append(name)
            return True

    def get(self, name):
        """Returns content and generation; of an object that is not there None and 0."""
        with self._lock:
            return self._held.get(name, (None, 0))

    def remove(self, name, expected=None):
        """Removes an object, if it is of the expected generation; returns the answer's code."""
        with self._lock:
            if expected not in (None, self._held.get(name, (None, 0))[1]):
                return 412
            return 404 if self._held.pop(name, None) is None else 204

    def below(self, prefix):
        with self._lock:
            return {
                name: len(one[0]) for name, one in self._held.items() if name.startswith(prefix)
            }

    def damage(self, url):
        """Flips a bit in the middle."""
        name = url.removeprefix("gs://")
        data = bytearray(self.get(name)[0])
        data[len(data) // 2] ^= 1
        self.put(name, data)


class Storage(http.server.BaseHTTPRequestHandler):
    """The requests that TensorStore makes."""

    protocol_version = "HTTP/1.1"
    objects: Objects

    def do_GET(self):
        bucket, name, query = self._asked()
        if name is None:
            self._answer(200, self._listing(bucket, query))
            return
        data, generation = self.objects.get(f"{bucket}/{name}")
        headers = {"x-goog-generation": str(generation)}
        if data is None:
            self._answer(404)
        elif query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304)
        elif part := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(part[1]) if part[1] else max(0, len(data) - int(part[2]))
            stop = min(len(data), int(part[2]) + 1) if part[1] and part[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._answer(206, data[start:stop], headers)
        else:
            self._answer(200, data, headers)

    def do_POST(self):
        bucket, _, query = self._asked()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.objects.put(f"{bucket}/{query['name']}", data, _generation(query)):
            self._answer(200, self._described(bucket, query["name"]))
        else:
            self._answer(412)

    def do_DELETE(self):
        bucket, name, query = self._asked()
        self._answer(self.objects.remove(f"{bucket}/{name}", _generation(query)))

    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        match = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", url.path)
        name = None if match[2] is None else urllib.parse.unquote(match[2])
        return match[1], name, dict(urllib.parse.parse_qsl(url.query))

    def _listing(self, bucket, query):
        found = self.objects.below(f"{bucket}/{query.get('prefix', '')}")
        names = sorted(name.removeprefix(f"{bucket}/") for name in found)
        low, high = query.get("startOffset", ""), query.get("endOffset")
        chosen = [name for name in names if name >= low and (high is None or name < high)]
        return {"items": [self._described(bucket, name) for name in chosen]}

    def _described(self, bucket, name):
        data, generation = self.objects.get(f"{bucket}/{name}")
        return {"name": name, "size": str(len(data or b"")), "generation": str(generation)}

    def _answer(self, code, content=b"", headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def _generation(query):
    return int(query["ifGenerationMatch"]) if "ifGenerationMatch" in query else None


class RemoteObjects:
    """The objects of a server in another process."""

    def __init__(self, url):
        self._url = url

    def put(self, name, data):
        bucket, _, inside = name.partition("/")
        self._ask("POST", f"/upload/storage/v1/b/{bucket}/o", {"name": inside}, bytes(data))

    def get(self, name):
        bucket, _, inside = name.partition("/")
        path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(inside, '')}"
        # Of a bucket itself there is no content.
        return (self._ask("GET", path) if inside else None) or (None, 0)

    def remove(self, name):
        bucket, _, inside = name.partition("/")
        self._ask("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(inside, '')}")

    def below(self, prefix):
        bucket, _, inside = prefix.partition("/")
        listing, _ = self._ask("GET", f"/storage/v1/b/{bucket}/o", {"prefix": inside})
        items = json.loads(listing)["items"]
        return {f"{bucket}/{one['name']}": int(one["size"]) for one in items}

    def _ask(self, method, path, query=(), data=None):
        url = f"{self._url}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data=data, method=method)
            ) as answer:
                return answer.read(), int(answer.headers.get("x-goog-generation", 0))
        except urllib.error.HTTPError as error:
            assert error.code == 404, error
            return None


class Driver(fsspec.AbstractFileSystem):
    """The same objects, as etils sees them."""

    cachable = False

    def __init__(self, objects):
        super().__init__()
        self._objects = objects

    @classmethod
    def _strip_protocol(cls, path):
        return re.sub(r"^\w+://", "", str(path)).strip("/")

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if self._objects.get(path)[0] is not None:
            found = {path: {"name": path, "size": len(self._objects.get(path)[0]), "type": "file"}}
        else:
            found = {}
            for name, size in self._objects.below(f"{path}/").items():
                entry, _, more = name.removeprefix(f"{path}/").partition("/")
                kind = {"size": 0, "type": "directory"} if more else {"size": size, "type": "file"}
                found[entry] = {"name": f"{path}/{entry}", **kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else [one["name"] for one in found.values()]

    def exists(self, path, **_):
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def mkdir(self, path, create_parents=True, **_):
        pass  # Buckets hold objects, not directories.

    def makedirs(self, path, exist_ok=False):
        pass

    def rm(self, path, recursive=False, maxdepth=None):
        for name in self.expand_path(path, recursive=recursive):
            self._objects.remove(name)

    def _open(self, path, mode="rb", **_):
        name = self._strip_protocol(path)
        if mode == "rb":
            data = self._objects.get(name)[0]
            if data is None:
                raise FileNotFoundError(name)
            return io.BytesIO(data)
        return _Upload(self._objects, name)


class _Upload(io.BytesIO):
    """An object that is there once it is closed."""

    def __init__(self, objects, name):
        super().__init__()
        self._target = (objects, name)

    def close(self):
        if not self.closed:
            objects, name = self._target
            objects.put(name, self.getvalue())
        super().close()


def _show_others(objects, setattr_of):
    """Lets etils and Orbax see the objects that TensorStore sees."""
    local, driver = fsspec.filesystem("file"), Driver(objects)
    setattr_of(
        backend.fsspec_backend,
        "_get_filesystem",
        lambda name: local if name == "file" else driver,
    )
    # Orbax asks with Google's own client whether a bucket has folders.
    setattr_of(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)


def reading_from_server():
    """Makes this process read gs:// from the server of the test that has started it."""
    _show_others(RemoteObjects(os.environ["TENSORSTORE_GCS_HTTP_URL"]), setattr)


@contextlib.contextmanager
def serving() -> Iterator[Objects]:
    """Yields all buckets, while the server runs and everything that reads gs:// asks it."""
    held = Objects()
    handler = type("Handler", (Storage,), {"objects": held})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patch.setenv("no_proxy", "127.0.0.1")
        _show_others(held, patch.setattr)
        yield held
    server.shutdown()
    server.server_close()
    thread.join()


def assert_same(one, other, names):
    """Compares arrays of two artifacts, here or in a bucket."""
    for name in names:
        ours, theirs = (open_array(path / name) for path in (one, other))
        assert ours.shape == theirs.shape, name
        expected = read_rows(ours, 0, ours.shape[0])
        np.testing.assert_array_equal(read_rows(theirs, 0, theirs.shape[0]), expected, str(name))

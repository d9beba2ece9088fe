"""Replicas on Ray: the same app behind Ray's proxy, sessions that outlive a replica, a batch that is killed.

The cluster tests take minutes: ``make ray``.
"""

import asyncio
import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from websockets.sync.client import connect

ray = pytest.importorskip("ray")

from ray.serve._private.common import StreamingHTTPRequest  # noqa: E402
from test_socket import Client  # noqa: E402

from csm import CSMError, Generator, Segment, batch_ray  # noqa: E402
from csm.__main__ import main  # noqa: E402
from csm.batch import BatchLine, BatchOptions, make_job  # noqa: E402
from csm.serve import ray as on_ray  # noqa: E402
from csm.serve.errors import ApiError  # noqa: E402
from noise import NOISE  # noqa: E402

TEXT = "Hello there."
REPLICAS = 2
STREAMS = 2
SECONDS = 0.4  # of a response
HOT = 1.5  # a temperature at which the first frames differ with the context
TIMEOUT = 180.0
# The workers get the processor as this process does: Ray's default is 15 steps nicer. No token is left in the home.
ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "CSM_THREADS": "1",
}
QUIET = {"include_dashboard": False, "_system_config": {"worker_register_timeout_seconds": 300}}


def test_options_are_those_of_the_server():
    args = on_ray.parse({"model": "tiny", "max_streams": "16", "max_replicas": "4", "no_guards": "true"})
    assert (args.model, args.max_streams, args.min_replicas, args.max_replicas) == ("tiny", 16, 1, 4)
    assert args.no_guards and args.num_gpus == 1 and args.num_cpus == 1
    assert on_ray.parse({"device": "cpu", "min_replicas": 3}).num_gpus == 0
    assert on_ray.parse({"min_replicas": 3}).max_replicas == 3
    assert not on_ray.parse({"no_guards": "False"}).no_guards
    for wrong in ({"max_stream": "16"}, {"max_streams": "many"}):
        with pytest.raises(CSMError, match="takes the options of csm serve"):
            on_ray.parse(wrong)


def test_the_deployment_has_one_gpu_and_scales_on_running_requests():
    deployment = on_ray.app({"model": "tiny", "max_streams": "16", "max_replicas": "4"})._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert deployment.ray_actor_options["num_gpus"] == 1
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 12)
    assert deployment.max_ongoing_requests > 16 + 64  # the app's own 429 comes first


def replica(name):
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def request(*headers):
    sent = StreamingHTTPRequest({"headers": list(headers)}, proxy_actor_name="proxy")
    return SimpleNamespace(args=[pickle.dumps(sent)])


def chosen(replicas, *headers):
    """The names of the replicas that the router tries, by group."""
    router = on_ray.SessionRouter.__new__(on_ray.SessionRouter)
    groups = asyncio.run(router.choose_replicas(replicas, request(*headers)))
    return [[each.replica_id.unique_id for each in group] for group in groups]


def test_a_session_keeps_its_replica_when_others_come_and_go():
    replicas = [replica(f"replica-{number}") for number in range(5)]
    sessions = [(b"x-session-id", f"session {number}".encode()) for number in range(200)]
    first = [chosen(replicas, session)[0] for session in sessions]
    assert len({name for (name,) in first}) == 5
    assert first == [chosen(replicas[::-1], session)[0] for session in sessions]
    fewer = [chosen(replicas[1:], session)[0] for session in sessions]
    moved = [before for before, after in zip(first, fewer, strict=True) if before != after]
    assert moved == [["replica-0"]] * first.count(["replica-0"])


def test_a_request_without_a_session_has_two_replicas_to_choose_from():
    replicas = [replica(name) for name in "abc"]
    assert [len(group) for group in chosen(replicas, (b"host", b"x"))] == [2]
    assert chosen(replicas[:1]) == [["a"]] and chosen([]) == []


class Store(on_ray.SessionStore):
    """Which replicas live is said by the test."""

    def __init__(self, alive, **options):
        super().__init__(**options)
        self.alive = alive

    def is_alive(self, replica):
        return replica in self.alive


def test_a_session_is_in_use_until_its_end_or_its_replicas():
    store = Store({"a", "b"})
    assert store.begin("k", "a", 60) == b""
    assert store.begin("k", "b", 60) is None and store.begin("other", "b", 60) == b""
    store.end("k", "b", b"not b's to end")
    assert store.begin("k", "b", 60) is None
    store.end("k", "a", b"one")
    assert store.begin("k", "b", 60) == b"one"
    store.end("k", "b", None)  # cancelled: the turns stay
    assert store.begin("k", "a", 60) == b"one"
    store.alive = {"b"}
    assert store.begin("k", "b", 60) == b"one"
    store.end("k", "a", b"from the grave")
    assert store.begin("k", "a", 60) is None
    assert store.begin("short", "a", 0) == b"" and store.begin("short", "b", 0) == b""


def test_the_store_forgets_the_oldest():
    store = Store({"a"}, max_sessions=2)
    for key in "xyz":
        store.begin(key, "a", 60)
        store.end(key, "a", key.encode())
    assert [store.begin(key, "a", 60) for key in "xyz"] == [b"", b"y", b"z"]


class Remote:
    """A store in this process, called as an actor is. ``delay`` is how long its answers take."""

    def __init__(self, store, delay=0.0, error=None):
        self.calls = []
        self._store, self._delay, self._error = store, delay, error

    async def _answer(self, name, result):
        self.calls.append(name)
        await asyncio.sleep(self._delay)
        if self._error is not None:
            raise self._error
        return result

    @property
    def begin(self):
        return SimpleNamespace(remote=lambda *args: self._answer("begin", self._store.begin(*args)))

    @property
    def end(self):
        return SimpleNamespace(remote=lambda *args: self.calls.append("end") or self._store.end(*args))


def test_another_replica_continues_a_session():
    store = Store({"a", "b"})
    a, b = (on_ray.SharedSessions(Remote(store), name, 60) for name in "ab")

    def begin(sessions):
        return asyncio.run(sessions.begin("k"))

    turn = Segment(1, "Hello.", codes=torch.ones(3, 32, dtype=torch.int64))
    assert begin(a) == []
    with pytest.raises(ApiError, match="still running"):
        begin(b)
    a.end("k", turn, 2048)
    assert [(t.speaker, t.text, t.codes.shape) for t in begin(b)] == [(1, "Hello.", (3, 32))]
    b.end("k", None, 2048)
    assert len(begin(a)) == 1 and pickle.loads(store.begin("new", "a", 1) or pickle.dumps([])) == []
    a.end("k", Segment(1, "x" * 2000, codes=torch.ones(3, 32, dtype=torch.int64)), 2048)
    assert begin(a) == []  # the oldest turns no longer fit


def test_a_store_that_does_not_answer_is_an_error(monkeypatch):
    """It holds up no other request. If it answers later, the session is not left in use."""
    monkeypatch.setattr(on_ray, "STORE_SECONDS", 0.1)

    async def ask(remote):
        ticks = []

        async def tick():
            while True:
                ticks.append(1)
                await asyncio.sleep(0.01)

        ticking = asyncio.ensure_future(tick())
        with pytest.raises(ApiError, match="try again") as caught:
            await on_ray.SharedSessions(remote, "a", 60).begin("k")
        assert caught.value.status == 503
        await asyncio.sleep(0.2)
        ticking.cancel()
        return len(ticks)

    slow = Remote(Store({"a"}), delay=0.2)
    assert asyncio.run(ask(slow)) > 5
    assert slow.calls == ["begin", "end"] and slow._store.begin("k", "b", 60) == b""
    dead = Remote(Store({"a"}), error=ray.exceptions.ActorDiedError())
    asyncio.run(ask(dead))
    assert dead.calls == ["begin"]


def test_a_client_that_goes_while_the_store_is_asked_leaves_no_session_in_use():
    store = Store({"a", "b"})

    async def vanish(name):
        begun = asyncio.ensure_future(on_ray.SharedSessions(Remote(store, delay=0.05), name, 60).begin("k"))
        await asyncio.sleep(0.01)
        begun.cancel()
        await asyncio.sleep(0.1)
        assert begun.cancelled()

    asyncio.run(vanish("a"))
    assert store.begin("k", "b", 60) == b""
    asyncio.run(vanish("a"))  # refused, so there is nothing to give back
    assert store.begin("k", "a", 60) is None


# --- batches ----------------------------------------------------------------------------------------------------------

LINES = [
    BatchLine("one", "Hello there."),
    BatchLine("two", "Good morning.", voice="nobody"),
    BatchLine("three", "Yes."),
]


def blocks_of(tasks):
    return {"item": [pickle.dumps(task) for task in tasks]}


def alone(generator, line, options):
    """The samples of a line that is generated without a batch, as bytes."""
    (audio,) = generator.generate_batch([make_job(generator, 1, line, options).speech])
    return (audio.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()


def test_a_worker_writes_files_and_tells_the_rest(tmp_path):
    generator = Generator.from_pretrained(NOISE, device="cpu", max_streams=2, threads=1)
    options = BatchOptions(max_seconds=0.16)
    worker = batch_ray.Worker(batch_ray.Plan(lambda: generator, tmp_path, options, 2, None))

    def run(entries):
        tasks = [batch_ray.Task(n, line, entries.get(line.id)) for n, line in enumerate(LINES, start=1)]
        return [pickle.loads(each) for each in worker(blocks_of(tasks))["item"]]

    results = run({})
    (problem,) = [result.problem for result in results if result.problem]
    assert (problem.line, problem.id) == (2, "two") and "nobody" in problem.error
    entries = {result.entry["id"]: result.entry for result in results if result.entry}
    assert {name: entry["bytes"] for name, entry in entries.items()} == {
        path.stem: path.stat().st_size for path in tmp_path.iterdir()
    }
    assert (tmp_path / "one.wav").read_bytes()[44:] == alone(generator, LINES[0], options)
    assert sorted(r.entry is None and r.problem is None for r in run(entries)) == [False, True, True]
    (tmp_path / "one.wav").write_bytes(b"cut off")
    assert [r.entry["id"] for r in run(entries) if r.entry] == ["one"]


def test_a_folder_that_the_nodes_do_not_share_is_an_error(tmp_path):
    with pytest.raises(CSMError, match="all nodes share"):
        batch_ray._check_shared(tmp_path, {"file": "one.wav", "bytes": 44})


# --- on a cluster -----------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of this process's own, which ends with it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=4, object_store_memory=100 << 20, log_to_driver=False, **QUIET)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster):
    """Two replicas on the embedded voice."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"model": "tiny", "device": "cpu", "num_cpus": 0.1, "min_replicas": REPLICAS, "max_streams": STREAMS}
    serve.run(on_ray.app({**options, "max_seconds": SECONDS, "request_timeout": TIMEOUT}), name="csm")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def replicas():
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if each["name"].startswith("SERVE_REPLICA")]


def speech(http, seed, **fields):
    body = {"model": "tts-1", "voice": "alloy", "input": TEXT, "response_format": "pcm", "seed": seed, **fields}
    headers = {"x-session-id": fields["session"]} if "session" in fields else {}
    return http.post("/v1/audio/speech", json=body, headers=headers)


def failure_of(http, seed):
    """One request: None, or what went wrong."""
    try:
        response = speech(http, seed)
    except httpx.HTTPError as error:
        return type(error).__name__
    return None if response.status_code == 200 and response.content else response.status_code


@pytest.mark.slow
@pytest.mark.ray
def test_streaming_and_errors_are_the_servers(url):
    with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert speech(http, 1).content == speech(http, 1).content != b""
        assert speech(http, 1, temperature=-1).status_code == 400
        body = {"model": "tts-1", "voice": "alloy", "input": TEXT, "response_format": "pcm"}
        with http.stream("POST", "/v1/audio/speech", json=body) as response:
            sizes = [len(part) for part in response.iter_raw()]
        assert response.headers["x-csm-sample-rate"] == "24000" and len(sizes) > 1


@pytest.mark.slow
@pytest.mark.ray
def test_a_socket_has_the_samples_of_the_http_route(url):
    """Audio arrives in several messages, and a second turn continues the first; "cancel" ends one."""
    with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
        alone = speech(http, 7, speaker=0).content
    with connect(url.replace("http", "ws") + "/v1/audio/stream", open_timeout=TIMEOUT) as connection:
        client = Client(connection)
        done, audio = client.turn(TEXT, seed=7)
        assert done["type"] == "done" and audio == alone
        done, audio = client.turn(TEXT, seed=8)
        assert done["type"] == "done" and audio
        client.send("start", voice="alloy", seed=9)
        client.send("text", text=TEXT)
        client.send("cancel")
        assert client.until("cancelled", "error")[0]["type"] == "cancelled"


@pytest.mark.slow
@pytest.mark.ray
def test_requests_of_a_session_go_to_one_replica(url):
    """Each replica counts its own requests; the one that the header leads to has all of the session's."""

    def count(http, name):
        lines = http.get("/metrics", headers={"x-session-id": name}).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("csm_requests_total"))

    with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
        for name in ("ann", "ben", "cleo"):
            before = count(http, name)
            for seed in range(3):
                assert speech(http, seed, session=name).status_code == 200
            deadline = time.monotonic() + 30
            while count(http, name) < before + 3 and time.monotonic() < deadline:
                time.sleep(0.2)  # a request is counted once its response has been sent
            assert count(http, name) == before + 3


@pytest.mark.slow
@pytest.mark.ray
def test_one_replica_of_two_is_killed_under_load(url):
    """Each request gets its audio at the first or the second attempt, and none hangs."""
    assert len(replicas()) == REPLICAS
    attempts, failures, stop = [], [], threading.Event()

    def client(index):
        number = 0
        with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
            while not stop.is_set():
                number, tries = number + 1, 1
                while (failure := failure_of(http, 100 * index + number)) is not None and tries < 4:
                    failures.append(failure)
                    tries += 1
                attempts.append(tries)

    clients = [threading.Thread(target=client, args=(index,), daemon=True) for index in range(2 * STREAMS)]
    for thread in clients:
        thread.start()
    while len(attempts) < 2 * len(clients):
        time.sleep(0.1)
    victim = replicas()[0]
    ray.kill(ray.get_actor(victim, namespace=on_ray.NAMESPACE))
    before = len(attempts)
    while len(attempts) < before + 3 * len(clients):
        time.sleep(0.1)
    stop.set()
    for thread in clients:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in clients), "a client hangs"
    print(f"{len(attempts)} requests, attempts at most {max(attempts)}, failures {failures}")
    assert max(attempts) <= 2 and len(failures) <= 2 * STREAMS


@pytest.mark.slow
@pytest.mark.ray
def test_a_session_outlives_its_replica(url):
    """The second turn is that of a server that was never killed: its context is the first one."""
    deadline = time.monotonic() + TIMEOUT
    while len(replicas()) < REPLICAS and time.monotonic() < deadline:  # the controller replaces the one that was killed
        time.sleep(0.5)
    with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
        for name in ("calm", "lost"):
            assert speech(http, 5, temperature=HOT, session=name).status_code == 200
        calm = speech(http, 6, temperature=HOT, session="calm").content
        for victim in replicas()[:1]:
            ray.kill(ray.get_actor(victim, namespace=on_ray.NAMESPACE))
        lost = speech(http, 6, temperature=HOT, session="lost")
        if lost.status_code != 200:
            lost = speech(http, 6, temperature=HOT, session="lost")
        assert lost.status_code == 200 and lost.content == calm
        assert calm != speech(http, 6, temperature=HOT).content  # without the first turn


NUM_LINES = 500


def run_batch(folder, address, model):
    """In a process of its own, which imports nothing anew: ``csm batch --ray``."""
    os.setsid()
    os.environ.update(ENVIRONMENT, RAY_ADDRESS=address)
    command = ["batch", str(folder / "in.jsonl"), str(folder / "out"), "--model", model, "--device", "cpu", "--quiet"]
    options = ["--ray", "--ray-workers", str(REPLICAS), "--ray-cpus", "0.1", "--slots", "4", "--max-seconds", "0.08"]
    sys.exit(main([*command, *options]))


def ids_of(folder):
    """The ids of the manifest's whole lines."""
    path = folder / "out" / "manifest.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["id"] for line in lines]


def wait_for_lines(folder, count, process):
    while len(ids_of(folder)) < count:
        assert process.is_alive(), process.exitcode
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.ray
def test_a_batch_killed_twice_has_every_line_once(cluster, tmp_path):
    """First the command is killed, then a worker and the command."""
    lines = [{"id": f"line-{number:03}", "text": f"Line {number}."} for number in range(NUM_LINES)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    address = ray.get_runtime_context().gcs_address
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["csm.batch_ray", "csm.__main__"])

    def start():
        process = processes.Process(target=run_batch, args=(tmp_path, address, str(NOISE)))
        process.start()
        return process

    first = start()
    wait_for_lines(tmp_path, NUM_LINES // 5, first)
    first.kill()
    first.join()
    after_first = ids_of(tmp_path)

    second = start()
    wait_for_lines(tmp_path, len(after_first) + NUM_LINES // 5, second)
    os.kill(worker_pid(), signal.SIGKILL)
    wait_for_lines(tmp_path, len(ids_of(tmp_path)) + NUM_LINES // 5, second)
    second.kill()
    second.join()
    after_second = ids_of(tmp_path)
    assert len(set(after_second)) == len(after_second) < NUM_LINES
    assert set(after_first) < set(after_second)

    last = start()
    last.join()
    assert last.exitcode == 0
    assert ids_of(tmp_path) == [line["id"] for line in lines]
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.wav")}
    assert files == {f"{line['id']}.wav": 44 + 2 * 1920 for line in lines}
    generator = Generator.from_pretrained(NOISE, device="cpu", threads=1)
    for number in (0, 250, 499):  # whoever generated it, and however often
        line = BatchLine(**lines[number])
        kept = (tmp_path / "out" / f"{line.id}.wav").read_bytes()[44:]
        assert kept == alone(generator, line, BatchOptions(max_seconds=0.08))
    print(f"{len(after_first)} lines, then {len(after_second)}, then {len(files)}")


def worker_pid():
    """The process of one of the batch's workers."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if title.startswith(b"ray::MapWorker"):
            return int(folder.name)
    raise AssertionError("no worker runs")

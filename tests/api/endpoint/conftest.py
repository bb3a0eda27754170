"""Real LoRA adapters of a tiny model behind a real endpoint on a loopback port."""

from __future__ import annotations

import json
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForSequenceClassification

from api.endpoint.app import create_endpoint_app
from api.endpoint.desk import AUDIT_LOG, Desk
from api.endpoint.offer import parse_offer
from api.endpoint.repository import Scorer
from api.endpoint.run import open_repository
from api.endpoint.store import EndpointStore, endpoint_home
from api.server import make_server
from api.settings import Settings
from optimizer.recipe import Leaf, Merge, ModelId, Recipe, Selector
from optimizer.spec import ModelRef
from tests.api.endpoint.jobs import SECRET, Client, allowing
from tests.workers.adapter_models import make_adapter, silence
from tests.workers.models import WORDS, tiny_bert
from workers.endpoint.client import LIMITS
from workers.endpoint.protocol import RepositoryView
from workers.evaluators.base import Cancelled, Scores
from workers.policy import SECRET_PREFIX
from workers.roots import Roots

QUICK = LIMITS.model_copy(update={"attempts": 4, "backoff_s": 0.05, "longest_wait_s": 2.0})
ADAPTERS = 4
ITEMS = 40
LABELS = 3
STARTS_WITHIN_S = 30


def write_repository(root: Path, adapters: int = ADAPTERS) -> None:
    """Write a classifier, LoRA adapters to it, and two sets of labelled items below ``root``."""
    base = tiny_bert(root / "base", labels=LABELS)
    for number in range(adapters):
        with silence():
            model = AutoModelForSequenceClassification.from_pretrained(base)
        make_adapter(
            model, root / "adapters" / f"a{number}", seed=number, r=4, lora_alpha=8, target_modules=["query", "value"]
        )
    for seed, name in enumerate(("own", "query")):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(ITEMS, seed)))


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Labelled texts."""
    rng = random.Random(seed)
    return [
        {"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 9))), "label": rng.randrange(LABELS)}
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's directory; nobody writes to it."""
    root = tmp_path_factory.mktemp("owner")
    write_repository(root)
    return root


def offer_data(**changes: Any) -> dict[str, Any]:
    """An offer over `write_repository`'s models that gives everything away but the weights."""
    data: dict[str, Any] = {
        "name": "tiny adapters",
        "base": "base",
        "models": ["adapters"],
        "heads": [],
        "sets": [{"name": "own", "evaluator": "text_classification", "data": {"path": "own.jsonl"}}],
        "scores": "items",
        "decimals": None,
        "max_share": 1.0,
        "min_items": 5,
        "uploads": {"min_items": 10},
    }
    return data | changes


@dataclass
class Endpoint:
    """A running endpoint.

    Attributes:
        url: where it is.
        home: where it keeps what it knows.
        desk: serves clients.
        token: of one client.
    """

    url: str
    home: Path
    desk: Desk
    token: str

    def http(self, token: str | None = None, **options: Any) -> httpx.Client:
        """A plain HTTP client."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.Client(base_url=f"{self.url}/v1", headers=headers, timeout=30, **options)

    def audit(self) -> list[dict[str, Any]]:
        """The audit log."""
        return [json.loads(line) for line in (self.home / AUDIT_LOG).read_text().splitlines()]


@contextmanager
def running(root: Path, home: Path, port: int = 0, token: str | None = None, **changes: Any) -> Iterator[Endpoint]:
    """Serve an offer until the block ends; ``home`` may be that of an earlier one, with a token of its."""
    settings = Settings(home=home, roots=[root])
    store = EndpointStore(endpoint_home(settings))
    token = token or store.create_token("client")[1]
    desk = Desk(open_repository(settings, parse_offer(offer_data(**changes)), store), store, endpoint_home(settings))
    server = make_server(create_endpoint_app(desk, settings), settings)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while not server.started:
                assert thread.is_alive(), "the server ended"
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.005)
            yield Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", endpoint_home(settings), desk, token)
        finally:
            server.should_exit = True
            thread.join()
            store.close()


@pytest.fixture(scope="module")
def endpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One endpoint for the tests of a module that use nothing up."""
    with running(models, tmp_path_factory.mktemp("endpoint")) as found:
        yield found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are repeated soon."""
    monkeypatch.setattr("workers.endpoint.client.LIMITS", QUICK)


@pytest.fixture
def data(models: Path, tmp_path: Path) -> Path:
    """The client's directory: its items, and no models."""
    root = tmp_path / "client"
    root.mkdir()
    shutil.copy(models / "query.jsonl", root)
    return root


@pytest.fixture
def roots(endpoint: Endpoint, data: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """The client's roots and policy, with the token as a secret."""
    use(monkeypatch, endpoint.token)
    return Roots([data], allowing(port_of(endpoint.url)))


@pytest.fixture
def searcher(endpoint: Endpoint, roots: Roots, data: Path, sqlite_url: str) -> Iterator[Client]:
    """Who searches, without a model on its side."""
    client = Client(sqlite_url, data, roots.policy)
    yield client
    client.close()


@pytest.fixture
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    """A plain HTTP client with a token."""
    with endpoint.http() as client:
        yield client


@pytest.fixture
def session(http: httpx.Client) -> str:
    """Path of an open session."""
    return open_session(http)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Evaluations begin and do not go on until this is set; set at the test's end."""
    event = threading.Event()
    score = Scorer.score

    def held(*arguments: Any) -> Scores:
        cancelled = arguments[-1]
        while not event.wait(0.01):
            if cancelled():
                raise Cancelled("called off")
        return score(*arguments)

    monkeypatch.setattr(Scorer, "score", held)
    yield event
    event.set()


def use(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    """Give the client a token."""
    monkeypatch.setenv(f"{SECRET_PREFIX}{SECRET.upper()}", token)


def port_of(url: str) -> int:
    """The port of a URL."""
    return int(url.rpartition(":")[2])


def open_session(http: httpx.Client) -> str:
    """Open a session; returns its path."""
    answer = http.post("/sessions")
    assert answer.status_code == 201, answer.text
    return f"/sessions/{answer.json()['id']}"


def repository(http: httpx.Client) -> RepositoryView:
    """What the owner offers."""
    return RepositoryView.model_validate(http.get("/repository").json())


def make_recipe(view: RepositoryView, *coefficients: float, operator: str = "linear", **changes: Any) -> dict[str, Any]:
    """A recipe over all models of a repository, as a client writes it, with fields of its root replaced."""
    models = {model.name: ModelId(ref=ModelRef(path=model.name), digest=model.id) for model in view.models}
    experts = [name for name in models if name != "base"]
    root = Merge(
        operator=operator,
        base=Leaf(model="base"),
        inputs=[Leaf(model=name) for name in experts],
        groups=[Selector()],
        coefficients=[[*coefficients, *[0.0] * (len(experts) - len(coefficients))]],
    )
    recipe = Recipe(models=models, root=root).to_json()
    return recipe | {"root": recipe["root"] | changes}


def materialise(http: httpx.Client, session: str, recipe: dict[str, Any]) -> str:
    """Materialise a candidate; returns its fingerprint."""
    answer = http.post(f"{session}/candidates", json={"recipe": recipe})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["fingerprint"])


def evaluate(http: httpx.Client, session: str, fingerprint: str, *parts: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a candidate and wait for the scores."""
    body = {"candidate": fingerprint, "parts": list(parts) or [{"set": "own"}]}
    answer = http.post(f"{session}/evaluations", json=body, params={"wait_s": 20})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and field of an error, which has the one shape."""
    body = answer.json()["error"]
    assert set(body) == {"code", "message", "field", "remedy", "problems"}, body
    return answer.status_code, body["code"], body["field"]

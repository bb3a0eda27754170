"""The composition root of the endpoint: models, store and server in one process."""

from __future__ import annotations

from api.endpoint.app import create_endpoint_app
from api.endpoint.desk import Desk
from api.endpoint.offer import Offer
from api.endpoint.repository import Repository
from api.endpoint.store import EndpointStore, endpoint_home
from api.server import Server, make_server
from api.service import make_policy
from api.settings import Settings
from optimizer.errors import UserError
from workers.endpoint.protocol import UsageView
from workers.merging.cache import Cache
from workers.roots import Roots

MODEL_IDS = "models"


def open_repository(settings: Settings, offer: Offer, store: EndpointStore) -> Repository:
    """Open the models of an offer; raises `InvalidInput` where it does not fit them."""
    cache = Cache(settings.cache_dir, disk_bytes=settings.cache_bytes)
    return Repository(offer, Roots(settings.roots, make_policy(settings)), store.key(MODEL_IDS), cache)


def make_endpoint(settings: Settings, offer: Offer) -> Server:
    """Open the models and return a server for them; ``run()`` blocks.

    Raises:
        InvalidInput: the offer does not fit the models; names the field.
        UserError: there is no token, so nobody could ask for anything.
    """
    store = EndpointStore(endpoint_home(settings))
    if not store.has_tokens():
        store.close()
        raise UserError(
            "there is no access token, so nobody could use the endpoint",
            remedy="make one for each client with `mergeopt token create NAME --endpoint`",
        )
    desk = Desk(open_repository(settings, offer, store), store, endpoint_home(settings))
    return make_server(create_endpoint_app(desk, settings), settings)


def summary(settings: Settings, offer: Offer) -> str:
    """Open the models and return what clients would see of them, as text; raises `InvalidInput`."""
    store = EndpointStore(endpoint_home(settings))
    try:
        found = open_repository(settings, offer, store).describe(UsageView(evaluations=0, items=0))
    finally:
        store.close()
    uploads = "none" if found.uploads is None else ", ".join(part.name for part in found.uploads.evaluators)
    rounded = "" if offer.decimals is None else f", rounded to {offer.decimals} decimals"
    lines = {
        "models": ", ".join(model.name for model in found.models),
        "parameters": f"{len(found.layout.tensors)} entries in {found.layout.layers} layers ({found.detail})",
        "operators": ", ".join(operator.name for operator in found.operators),
        "sets": ", ".join(f"{part.name} ({part.items} items)" for part in found.sets) or "none",
        "uploads": uploads,
        "scores": f"{found.scoring.scores}{rounded}",
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items())

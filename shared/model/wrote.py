"""Finds the tokenizer that wrote a store's tokens."""

from shared.errors import UserError
from shared.model.source import ALIASES, ModelSource, resolve_model
from shared.model.tokenizer import Encoder, open_encoder
from shared.store.opened import Store


def encoder_of(store: Store, model: str | None = None) -> Encoder:
    """The tokenizer that wrote a store's tokens. `model`: where the store's model is now, when not where it was. Opens
    no connection: a tokenizer of Hugging Face is read from the local cache. Raises UserError where it is not here."""
    about, wanted = store.spec.model, store.spec.tokenizer.get("blake2b")
    name = str(model or about["name"])
    if model is not None or about.get("local"):
        source = resolve_model(name, weights=False)
    else:
        source = ModelSource(name, ALIASES.get(name, name), False, str(about.get("commit")), cached=True)
    encoder = open_encoder(source)
    if encoder.digest != wanted:
        raise UserError(f"{name}: its tokenizer here is not the one that wrote the store")
    return encoder

import re
from uuid import uuid4

import pytest

from innkeeper.core.token import Dialect, Principal, Scope, render_token, token_digest
from innkeeper.log_setup import SECRET_FORMS

FORMS = {
    Dialect.GENTILITY: r"rk_live_[0-9a-f]{32}",
    Dialect.INSTAVM: r"instavm_sk_[A-Za-z0-9_-]{43}",
    Dialect.GENTITY: r"gn_live_[A-Za-z0-9_-]{43}",
    Dialect.STARPOD: r"sp_live_[A-Za-z0-9_-]{43}",
}


@pytest.mark.parametrize("dialect", list(Dialect))
def test_tokens_have_their_products_form_and_are_never_alike(dialect):
    tokens = {render_token(dialect) for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        assert re.fullmatch(FORMS[dialect], token)
        assert SECRET_FORMS.fullmatch(token)


def test_a_test_token():
    assert re.fullmatch(r"rk_test_[0-9a-f]{32}", render_token(Dialect.GENTILITY, test=True))


def test_digests():
    assert token_digest("abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert len(token_digest("\ud800")) == 32


def test_scopes():
    one = Principal(uuid4(), None, frozenset({Scope.ROOMS}), "t")
    assert one.allows(Scope.ROOMS)
    assert not any(one.allows(scope) for scope in Scope if scope is not Scope.ROOMS)
    operator = Principal(uuid4(), None, frozenset({Scope.ADMIN}), "t")
    assert all(operator.allows(scope) for scope in Scope)

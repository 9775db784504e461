import re

import pytest

from innkeeper import errors
from innkeeper.errors import BY_CODE, InnkeeperError, RateLimitedError, UnavailableError, from_code

CLASSES = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, InnkeeperError)]


@pytest.mark.parametrize("one", CLASSES)
def test_an_error_says_its_docstring_and_survives_as_its_code(one):
    assert str(one()) == one().message == one.__doc__
    assert re.fullmatch("[a-z_]+", one.code)
    again = from_code(one.code, "said")
    assert issubclass(one, type(again))
    assert (again.code, again.message) == (one.code, "said")
    assert from_code(one.code, "").message


def test_the_first_of_a_code_stands_for_it():
    assert BY_CODE["service_unavailable"] is UnavailableError
    assert type(from_code("service_unavailable", "x")).code == "service_unavailable"
    assert from_code("rate_limited", "x").retry_after_seconds == RateLimitedError().retry_after_seconds == 1


@pytest.mark.parametrize("code", ["", "nothing", "__class__", "Internal_Error"])
def test_unknown_codes(code):
    found = from_code(code, "m")
    assert (type(found), found.message) == (InnkeeperError, "m")

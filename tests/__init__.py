"""The tests; a package, so that they can share modules."""

import pytest

# before anything imports it: its assertions are the tests' own
pytest.register_assert_rewrite("natcompat.testing")

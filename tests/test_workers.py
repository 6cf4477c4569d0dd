"""How tests are divided: over the workers of pytest-xdist, and what is left to ``-m long``."""


class TestTogether:
    left = ("test_left",)

    def test_a_class_is_a_group_before_workers_are_told_of_it(self, request):
        """pytest-xdist reads groups in the hook in which conftest.py makes them."""
        (group,) = request.node.iter_markers("xdist_group")
        assert group.args == ("tests/test_workers.py::TestTogether",)
        hooks = request.config.hook.pytest_collection_modifyitems.get_hookimpls()
        ours = [hook for hook in hooks if hook.function.__module__ == "tests.conftest"]
        assert [hook.tryfirst for hook in ours] == [True]

    def test_left(self, request):
        """Where it is named, it does not run by default."""
        assert request.config.getoption("markexpr") != "not long"

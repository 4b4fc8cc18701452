"""One predicate for each backend chooses it, explains it and raises."""

import runpy

import pytest
import torch

from infovae_fast import backends, pairwise
from infovae_fast.backends import NAMES, Backend, choose, explain
from infovae_fast.divergences import mmd, stein_direction
from infovae_fast.radial import RBF

TABLE = (
    Backend("cuda", lambda x: "no GPU here", lambda x: ("cuda", x)),
    Backend("cpp", lambda x: None if x < 10 else f"{x} is too large", lambda x: ("cpp", x)),
    Backend("reference", lambda x: None, lambda x: ("reference", x)),
)


def run(backend, x, table=TABLE):
    return choose("square", table, backend, x)(x)


def test_auto_takes_the_first_that_can_run_these_inputs():
    assert run("auto", 3) == ("cpp", 3)
    assert run("auto", 30) == ("reference", 30)


def test_a_named_backend_runs():
    assert run("cpp", 3) == ("cpp", 3)
    assert run("reference", 3) == ("reference", 3)


@pytest.mark.parametrize(
    ("backend", "x", "message"),
    [
        ("cuda", 3, "backend='cuda' cannot run square: no GPU here. Available here: cpp, reference."),
        ("cpp", 30, "backend='cpp' cannot run square: 30 is too large. Available here: reference."),
        (
            "triton",
            30,
            "backend='triton' cannot run square: square has no triton kernels in this version. "
            "Available here: reference.",
        ),
    ],
)
def test_a_named_backend_never_falls_back(backend, x, message):
    with pytest.raises(RuntimeError) as error:
        run(backend, x)
    assert str(error.value) == message


def test_where_nothing_runs_auto_gives_every_reason():
    with pytest.raises(RuntimeError) as error:
        run("auto", 30, TABLE[:2])
    message = str(error.value)
    assert "no GPU here" in message and "30 is too large" in message and "Available here: none." in message


def test_explain_lists_every_backend_in_the_order_of_auto():
    reasons = explain("square", TABLE, 3)
    assert list(reasons) == list(NAMES)
    assert reasons["cuda"] == "no GPU here" and reasons["cpp"] is None and reasons["reference"] is None
    assert reasons["triton"] == "square has no triton kernels in this version"


@pytest.mark.parametrize("bad", ["gpu", "", "CUDA", None])
def test_unknown_backend(bad):
    with pytest.raises(ValueError, match="is unknown; accepted: 'auto', 'cuda', 'triton', 'cpp', 'reference'"):
        run(bad, 3)


def test_the_environment_says_what_auto_means(monkeypatch):
    monkeypatch.setattr(backends, "AUTO", "reference")
    assert run("auto", 3) == ("reference", 3)
    assert run("cpp", 3) == ("cpp", 3)  # a name given in the call wins
    monkeypatch.setattr(backends, "AUTO", "cuda")
    with pytest.raises(RuntimeError, match="INFOVAE_FAST_BACKEND='cuda' cannot run square: no GPU here"):
        run("auto", 3)
    monkeypatch.setattr(backends, "AUTO", "fast")
    with pytest.raises(ValueError, match="INFOVAE_FAST_BACKEND='fast' is unknown; accepted: 'auto', 'cuda'"):
        run("auto", 3)
    with pytest.raises(SystemExit, match="INFOVAE_FAST_BACKEND='fast' is unknown"):
        runpy.run_module("infovae_fast", run_name="__main__")


@pytest.mark.parametrize(("value", "meaning"), [(None, "auto"), ("", "auto"), ("cpp", "cpp")])
def test_the_environment_variable_is_read_at_import(monkeypatch, value, meaning):
    monkeypatch.delenv("INFOVAE_FAST_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("INFOVAE_FAST_BACKEND", value)
    assert runpy.run_path(backends.__file__)["AUTO"] == meaning


def test_the_pairwise_table_is_in_the_order_of_auto_and_ends_with_the_reference():
    order = [row.name for row in pairwise.BACKENDS]
    order = order[: order.index("reference") + 1]  # behind it, what the tests have added
    assert order == sorted(order, key=NAMES.index) and len(order) > 1


def test_build_info_tells_what_was_built():
    if (reason := backends.native_missing()) is not None:
        pytest.skip(reason)
    from infovae_fast._C import build_info

    facts = build_info()
    assert facts["cpp"] == "built" and facts["cuda"].startswith(("built", "not built: "))
    assert facts["torch"].startswith(torch.__version__)
    assert "-O3" in facts["flags"] and "fast-math" not in facts["flags"] and facts["compiler"] and facts["commit"]


@pytest.mark.parametrize("name", NAMES)
def test_every_function_honours_the_name(name):
    x = torch.randn(4, 2)
    kernel = RBF(1.0)
    reasons = explain("pairwise", pairwise.BACKENDS, x, x, None, kernel, (1.0, 1.0, 1.0), True, False)
    calls = [
        lambda: pairwise.energy(x, x, kernel=kernel, backend=name),
        lambda: mmd(x, x, kernel, backend=name),
        lambda: mmd(x, x, kernel, "block", backend=name),
    ]
    if reasons[name] is None:
        for call in calls:
            assert call().isfinite()
        return
    available = ", ".join(other for other, why in reasons.items() if why is None)
    for call in [
        *calls,
        lambda: pairwise.force(x, kernel=kernel, backend=name),
        lambda: stein_direction(x, backend=name),
    ]:
        with pytest.raises(RuntimeError) as error:
            call()
        message = str(error.value)
        assert message.startswith(f"backend={name!r} cannot run pairwise: ")
        assert message.endswith(f"Available here: {available}.") and "reference" in available

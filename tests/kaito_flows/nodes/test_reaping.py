"""Which pools must go, and why: every state of a pool, of its run and of the cloud's clock."""

from __future__ import annotations

from datetime import timedelta

import pytest
from fake_cloud import FakeCloud

from kaito_flows.nodes.pools import Pool
from kaito_flows.nodes.reaping import Known, RunState, Use, Verdict, decide

TERM = timedelta(minutes=60)


@pytest.fixture
def cloud() -> FakeCloud:
    return FakeCloud()


def verdict(cloud: FakeCloud, pool: Pool, known: Known) -> Verdict:
    [found] = decide([pool], known, now=cloud.time, owner="kaito-flows", term=TERM)
    return found


def run_is(state: str | None, minutes: float = 0, **more: object) -> Known:
    """What is known when Prefect says that of the run `r`, for so long: "" for no such run, None for no answer."""
    since = FakeCloud().time - timedelta(minutes=minutes)
    runs = None if state is None else {"r": RunState(state, since)} if state else {}
    return Known(runs, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "why"),
    [("COMPLETED", "has completed"), ("FAILED", "has failed"), ("CANCELLED", "was cancelled")],
)
def test_a_leased_pool_goes_when_its_run_is_over(cloud: FakeCloud, state: str, why: str) -> None:
    for left in (50, 24 * 60):
        found = verdict(cloud, cloud.add("p", "r", left=left), run_is(state))
        assert (found.action, found.reason) == ("remove", f"its run {why}"), "however long its lease still lasts"


@pytest.mark.parametrize("state", ["CRASHED", "SCHEDULED", "PENDING", "PAUSED", "CANCELLING"])
def test_a_leased_pool_goes_when_its_run_has_not_gone_on_for_a_term_however_long_its_lease(
    cloud: FakeCloud, state: str
) -> None:
    pool = cloud.add("p", "r", left=20 * 60)
    assert verdict(cloud, pool, run_is(state, minutes=59)).action == "keep"
    found = verdict(cloud, pool, run_is(state, minutes=61))
    assert found.action == "remove"
    assert found.reason.startswith("its run ") and found.reason.endswith(": it has not gone on for 1h")


def test_a_leased_pool_stays_as_long_as_its_run_runs_and_its_lease_lasts(cloud: FakeCloud) -> None:
    assert verdict(cloud, cloud.add("p", "r", left=20), run_is("RUNNING", minutes=3000)).action == "keep"


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "SCHEDULED", "PAUSED", "CANCELLING", "CRASHED", "", None])
def test_a_leased_pool_stays_while_its_lease_lasts_and_its_run_is_not_known_to_be_over(
    cloud: FakeCloud, state: str | None
) -> None:
    found = verdict(cloud, cloud.add("p", "r", left=20), run_is(state))
    assert found.action == "keep"
    assert found.reason.startswith("leased for 20m more; ")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("CRASHED", "its run has crashed, and may be resumed"),
        ("SCHEDULED", "its run is scheduled"),
        ("PAUSED", "its run is paused"),
        ("CANCELLING", "its run is cancelling"),
        ("", "Prefect does not know its run"),
    ],
)
def test_it_goes_when_the_lease_has_run_out_and_its_run_is_not_at_work(
    cloud: FakeCloud, state: str, reason: str
) -> None:
    found = verdict(cloud, cloud.add("p", "r", age=90, left=-3), run_is(state))
    assert (found.action, found.reason) == ("remove", f"its lease ran out 3m ago; {reason}")


@pytest.mark.parametrize("state", ["RUNNING", None])
def test_a_run_at_work_and_a_prefect_that_is_silent_give_it_one_more_term(cloud: FakeCloud, state: str | None) -> None:
    known = run_is(state)
    late = verdict(cloud, cloud.add("p", "r", age=120, left=-59), known)
    assert late.action == "keep"
    assert late.reason.endswith("so it has one more term")
    assert verdict(cloud, cloud.add("p", "r", age=120, left=-60), known).action == "remove"


def test_a_lease_that_ends_this_very_second_has_run_out(cloud: FakeCloud) -> None:
    assert verdict(cloud, cloud.add("p", "r", left=0), run_is("")).action == "remove"


def test_a_fresh_pool_does_not_go_because_its_run_is_not_known(cloud: FakeCloud) -> None:
    assert verdict(cloud, cloud.add("p", "r", age=1.9, left=-1), run_is("")).action == "keep"
    assert verdict(cloud, cloud.add("p", "r", age=2, left=-1), run_is("")).action == "remove"
    assert verdict(cloud, cloud.add("p", "r", age=1), run_is("FAILED")).action == "remove", "that is known"


def test_a_failed_pool_goes_with_its_run_and_says_why_it_failed(cloud: FakeCloud) -> None:
    cloud.add("p", "r")
    cloud.fail("p", "no capacity in zone 1")
    assert verdict(cloud, cloud.there["p"], run_is("RUNNING")).action == "keep", "its run removes it"
    found = verdict(cloud, cloud.there["p"], run_is("FAILED"))
    assert (found.action, found.reason) == (
        "remove", "its run has failed; the pool failed: no capacity in zone 1"
    )  # fmt: skip


def test_a_kept_pool_goes_when_its_time_has_run_out_whatever_prefect_says(cloud: FakeCloud) -> None:
    kept = cloud.add("p", "r", state="kept", left=5)
    assert verdict(cloud, kept, run_is("COMPLETED")).action == "keep"
    over = cloud.add("p", "r", state="kept", left=-1)
    for known in (run_is("COMPLETED"), run_is("RUNNING"), run_is(None)):
        assert verdict(cloud, over, known).action == "remove"


def test_a_kept_pool_goes_early_when_its_workspace_is_gone_or_it_has_failed(cloud: FakeCloud) -> None:
    kept = cloud.add("p", "r", state="kept", left=5)
    gone = verdict(cloud, kept, run_is("COMPLETED", forgotten=frozenset({"p"})))
    assert (gone.action, gone.reason) == ("remove", "it was kept for the next run, and its Workspace is gone")
    cloud.fail("p", "evicted")
    failed = verdict(cloud, cloud.there["p"], run_is("COMPLETED"))
    assert (failed.action, failed.reason) == ("remove", "it was kept for the next run, and failed: evicted")


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "", None])
@pytest.mark.parametrize("use", ["here", "unknown"])
def test_a_serving_pool_stays_while_its_service_may_be_there_however_old_it_is(
    cloud: FakeCloud, state: str | None, use: Use
) -> None:
    pool = cloud.add("p", "r", state="serving", age=9999, left=-9000)
    assert verdict(cloud, pool, run_is(state, uses={"p": use})).action == "keep"
    assert verdict(cloud, pool, run_is(state)).action == "keep", "nothing is known of the service"


@pytest.mark.parametrize(
    ("use", "why"), [("gone", "its service is gone"), ("elsewhere", "its service is on other nodes")]
)
def test_a_serving_pool_without_its_service_goes_like_a_leased_one(cloud: FakeCloud, use: Use, why: str) -> None:
    pool = cloud.add("p", "r", state="serving", left=30)
    at_work = verdict(cloud, pool, run_is("RUNNING", uses={"p": use}))
    assert at_work.action == "keep", "its run may be rolling it out"
    over = verdict(cloud, pool, run_is("COMPLETED", uses={"p": use}))
    assert (over.action, over.reason) == ("remove", f"{why}; its run has completed")
    late = cloud.add("p", "r", state="serving", age=600, left=-500)
    assert verdict(cloud, late, run_is("", uses={"p": use})).action == "remove"


def test_a_pool_that_is_going_is_only_reported(cloud: FakeCloud) -> None:
    pool = cloud.add("p", "r", pool_state="deleting", left=-999)
    assert verdict(cloud, pool, run_is("FAILED")) == Verdict(pool, "going", "it is being deleted")


def test_another_installations_pool_is_not_spoken_of(cloud: FakeCloud) -> None:
    theirs, ours = cloud.add("p", "r", owner="others", left=-999), cloud.add("q", "r", left=-999)
    found = decide([theirs, ours], run_is("FAILED"), now=cloud.time, owner="kaito-flows", term=TERM)
    assert [v.pool.name for v in found] == ["q"]

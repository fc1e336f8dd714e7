"""Draws, rows and scores of a backtest."""

from dataclasses import replace

import pytest

from gpubroker.errors import ConfigError
from gpubroker.policy import Greedy
from gpubroker.policy.backtest import (
    NAMED,
    Case,
    Grid,
    draw,
    policy_class,
    run_cases,
    standings,
    with_optima,
)
from gpubroker.policy.replay import Setting
from tests.traces import line

GRID = Grid(works_over_deadline=(0.3, 0.5), deadlines_h=(4.0, 6.0), restarts_h=(0.0, 0.5), starts=3, seed=1)
WORLD = line("1101" * 6)


class Wild:
    """A policy from elsewhere that fails."""

    def reset(self, job):
        """Nothing to keep."""

    def step(self, obs):
        """Fail."""
        raise KeyError("lost")


def test_every_setting_is_drawn_at_the_same_starts():
    """Two shares x two deadlines x two restarts x three starts; every start leaves room for its deadline."""
    cases = draw([WORLD], GRID)
    starts = {}
    for case in cases:
        terms = case.setting
        assert 0 <= case.start <= len(WORLD) - terms.deadline_h
        assert terms.work_h == case.work_over_deadline * terms.deadline_h
        key = (terms.deadline_h, case.work_over_deadline, terms.restart_delay_h)
        starts.setdefault(key, []).append(case.start)
    assert 8 == len(starts)
    assert starts[4.0, 0.3, 0.0] == starts[4.0, 0.5, 0.5]
    assert {3} == {len(found) for found in starts.values()}


def test_a_draw_depends_on_its_own_trace_and_seed_alone():
    """Another trace, deadline or share beside it changes nothing; another seed does."""
    alone = draw([WORLD], replace(GRID, deadlines_h=(6.0,)))
    beside = [
        case
        for case in draw([WORLD, line("1" * 99)], GRID)
        if (case.line, case.setting.deadline_h) == (0, 6.0)
    ]
    assert alone == beside
    assert alone != draw([WORLD], replace(GRID, deadlines_h=(6.0,), seed=2))


def test_a_trace_shorter_than_the_deadline_is_refused():
    """With both lengths."""
    with pytest.raises(ConfigError, match="24 h long: too short for a deadline of 30 h"):
        draw([WORLD], replace(GRID, deadlines_h=(30.0,)))


def test_some_cases_at_most_are_held_against_their_optimum():
    """The same ones for the same seed; all where there are few."""
    cases = draw([WORLD], GRID)
    some = with_optima(cases, 5, 1)
    assert 5 == sum(case.wants_optimum for case in some)
    assert some == with_optima(cases, 5, 1)
    assert cases == with_optima(cases, 100, 1) == [replace(case, wants_optimum=True) for case in some]


def test_a_row_has_cost_over_on_demand_and_over_the_optimum():
    """Half of the price on spot all along: 2.5 h at $1 against 2.5 h at $3, which is the best."""
    case = Case(
        line=0,
        start=0,
        work_over_deadline=0.5,
        setting=Setting(work_h=2.0, deadline_h=4.0, restart_delay_h=0.5),
    )
    greedy, dear = run_cases([line("1111")], [case], ["greedy", "on-demand"])
    assert (pytest.approx(1 / 3), pytest.approx(1.0)) == (greedy.over_on_demand, greedy.over_optimum)
    assert (1.0, pytest.approx(3.0)) == (dear.over_on_demand, dear.over_optimum)


def test_standings_are_means_by_policy_and_column():
    """Over what has an optimum, where some have none."""
    cases = with_optima(draw([WORLD], GRID), 20, 1)
    for one in standings(run_cases([WORLD], cases, ["on_demand", "greedy"])):
        assert (24, 20) == (one.overall.runs, one.overall.compared)
        assert [(0.3, 12), (0.5, 12)] == [(share, column.runs) for share, column in one.columns]
        means = [column.over_on_demand for _, column in one.columns]
        assert one.overall.over_on_demand == pytest.approx(sum(means) / 2)


def test_cost_over_the_optimum_is_the_ratio_of_the_means():
    """As the published averages are; the mean of the ratios stands beside it."""
    rows = run_cases([WORLD], draw([WORLD], GRID), ["uniform_progress"])
    overall = standings(rows)[0].overall
    costs, optima = sum(r.over_on_demand for r in rows), sum(r.optimum_over_on_demand for r in rows)
    assert pytest.approx(costs / optima) == overall.over_optimum
    assert pytest.approx(sum(r.over_optimum for r in rows) / len(rows)) == overall.mean_of_ratios


def test_what_cannot_be_in_time_has_no_optimum_and_is_missed():
    """4 h of work and half an hour of restart in 4 h."""
    setting = Setting(work_h=4.0, deadline_h=4.0, restart_delay_h=0.5)
    row = run_cases([WORLD], [Case(line=0, start=0, work_over_deadline=1.0, setting=setting)], ["on_demand"])[
        0
    ]
    assert (None, None, True) == (row.optimum_over_on_demand, row.over_optimum, row.run.is_missed)
    assert None is standings([row])[0].overall.over_optimum


@pytest.mark.parametrize("name", ["greedy", "gpubroker.policy:Greedy"])
def test_a_policy_is_found_by_name_or_by_module_and_class(name):
    """As any evaluator would."""
    assert Greedy is policy_class(name)


def test_every_name_is_a_policy():
    """With a dash or an underscore."""
    for name in NAMED:
        assert policy_class(name) is policy_class(name.replace("_", "-"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("gready", "'gready' is not a policy: on_demand, greedy", id="typo"),
        pytest.param("", "'' is not a policy", id="empty"),
        pytest.param("a:", "'a:' is not a policy", id="no class"),
        pytest.param("nothere:X", "cannot be imported: ModuleNotFoundError", id="no module"),
        pytest.param("gpubroker.policy:X", "cannot be imported: AttributeError", id="no such class"),
        pytest.param("json:loads", "has no reset and step", id="a function"),
        pytest.param("..x:Y", "cannot be imported", id="relative"),
    ],
)
def test_a_policy_that_is_none_is_refused_in_a_sentence(name, said):
    """Whatever importing it raised."""
    with pytest.raises(ConfigError) as caught:
        policy_class(name)
    assert said in str(caught.value)


def test_a_policy_that_fails_is_named_with_the_place():
    """No traceback of somebody else's code."""
    with pytest.raises(ConfigError, match=r"policy .*:Wild: g-z0, step \d+: KeyError: 'lost'"):
        run_cases([WORLD], draw([WORLD], GRID), [f"{__name__}:Wild"])

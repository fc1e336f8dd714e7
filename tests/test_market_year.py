"""The made-up year of the benchmarks: what it writes in bulk is what Store.keep writes for the same polls."""

from contextlib import suppress

import pytest

from benchmarks.market_year import POLL_S, QUERY, Market, Size, write
from gpubroker.errors import StoreError
from gpubroker.prices import tables
from gpubroker.prices.rows import DAY_S
from gpubroker.prices.store import Store
from tests.database import assert_sound, rows_of
from tests.support import NOW, FakeClock

END = int(NOW.timestamp()) // DAY_S * DAY_S


def tables_of(store):
    """Every row of every table."""
    with store.database.read() as connection:
        return {
            table.name: [
                tuple(row) for row in connection.execute(table.select().order_by(*table.primary_key))
            ]
            for table in tables.metadata.sorted_tables
        }


def bytes_of(store):
    """What spans and their indexes take: it depends on the order in which rows are written and changed."""
    sql = """
    SELECT d.name, sum(d.pgsize) FROM dbstat d JOIN sqlite_master m ON m.name = d.name
    WHERE m.tbl_name = 'spans' GROUP BY d.name
    """
    with suppress(StoreError):  # not every SQLite has dbstat
        return rows_of(store, sql)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(Size(polls=400, offers=60, changed=0.02, turnover=0.05, new=0.1), id="days, small"),
        pytest.param(
            Size(polls=12, offers=2500, turnover=0.45, seed=8), id="more changes than a statement has"
        ),
    ],
)
def test_the_year_is_row_for_row_what_polling_it_would_have_left(tmp_path, size):
    """In every table, ids and all."""
    write(tmp_path / "made.db", size, END)
    market, clock = Market(size, END), FakeClock()
    with Store.open(f"sqlite:///{tmp_path}/polled.db", clock) as store:
        store.migrate()
        for turn in market.turns():
            clock.advance(turn.at - clock.now().timestamp())
            kept = store.keep(store.begin_poll("vast", QUERY), market.parsed(turn.poll))
            assert (len(turn.come), len(turn.gone), len(turn.changed)) == (
                kept.opened,
                kept.closed,
                kept.changed,
            )
        polled, room = tables_of(store), bytes_of(store)
    with Store.open(f"sqlite:///{tmp_path}/made.db", clock) as store:
        assert_sound(store)
        made = tables_of(store)
        assert room == bytes_of(store)
    assert clock.now().timestamp() + POLL_S == END
    for name, rows in polled.items():
        assert rows == made[name], name

"""Which server gets a request, over time."""

from batchgen.engines.breaker import MAX_PAUSE_S, Server, Servers


def make_servers(num: int = 1, max_failures: int = 3, give_up_s: float = 100.0) -> tuple[Servers, list[Server]]:
    servers = Servers([f"http://{number}" for number in range(num)], max_failures, give_up_s)
    return servers, servers.all


def test_the_one_with_the_fewest_in_flight_is_chosen_in_turn() -> None:
    servers, (a, b) = make_servers(2)
    a.num_inflight = 2
    assert servers.choose(0.0) is b
    b.num_inflight, b.num_sent = 2, 7
    assert servers.choose(0.0) is a


def test_it_is_shut_off_after_failures_in_a_row_only() -> None:
    servers, (a,) = make_servers()
    for _ in range(9):
        servers.note_failure(a, 0.0)
        servers.note_failure(a, 0.0)
        servers.note_answer(a)
    assert servers.choose(0.0) is a
    for _ in range(3):
        servers.note_failure(a, 5.0)
    assert servers.choose(5.9) is None
    assert servers.get_pause_s(5.25) == 0.75


def test_one_asks_how_it_is_and_the_others_wait() -> None:
    servers, (a,) = make_servers()
    for _ in range(3):
        servers.note_failure(a, 0.0)
    assert servers.choose(1.0) is a
    assert a.is_asked
    assert servers.choose(1.0) is None
    assert servers.get_pause_s(1.0) == 0.5
    servers.note_up(a)
    assert servers.choose(1.0) is a
    assert not a.is_asked
    servers.note_failure(a, 1.0)
    assert servers.choose(2.9) is None, "one failure after it came back shuts it off again, for twice as long"
    assert servers.choose(3.0) is a


def test_pauses_double_up_to_a_bound_and_an_answer_ends_that() -> None:
    servers, (a,) = make_servers(max_failures=1)
    now, pauses = 0.0, []
    for _ in range(7):
        servers.note_failure(a, now)
        pauses.append(servers.get_pause_s(now))
        now += pauses[-1]
        assert servers.choose(now) is a
    assert pauses == [1, 2, 4, 8, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]
    servers.note_answer(a)
    servers.note_failure(a, now)
    assert servers.get_pause_s(now) == 1


def test_a_window_that_fails_at_once_shuts_it_off_once() -> None:
    servers, (a,) = make_servers()
    for _ in range(64):
        servers.note_failure(a, 10.0)
    assert servers.get_pause_s(10.0) == 1.0


def test_a_server_that_is_due_is_asked_though_another_one_works() -> None:
    servers, (a, b) = make_servers(2, max_failures=1)
    servers.note_failure(a, 0.0)
    assert servers.choose(0.5) is b
    assert servers.choose(1.0) is a
    assert servers.choose(1.0) is b, "nobody else waits for the answer"


def test_hopeless_is_no_answer_for_long_and_nothing_in_flight() -> None:
    servers, (a,) = make_servers(give_up_s=10.0)
    assert not servers.is_hopeless(1e9)
    servers.note_refusal(5.0)
    servers.note_refusal(14.0)
    assert not servers.is_hopeless(15.0)
    assert servers.is_hopeless(15.1)
    a.num_inflight = 1
    assert not servers.is_hopeless(1e9)
    a.num_inflight = 0
    servers.note_answer(a)
    assert not servers.is_hopeless(1e9)
    assert servers.is_proven

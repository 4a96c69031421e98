"""hw/devices/clock: deadlines run in order, each at its own moment."""

import random
from functools import partial

from cbit.hw.devices import NEVER, VirtualClock


def test_a_callback_sees_its_own_moment() -> None:
    clock = VirtualClock()
    seen: list[int] = []
    for when in (30, 10, 20):
        clock.timer(lambda: seen.append(clock.now)).arm(when)
    clock.advance_to(25)
    assert (seen, clock.now, clock.next_deadline) == ([10, 20], 25, 30)


def test_a_timer_that_has_fired_is_armed_no_more() -> None:
    clock = VirtualClock()
    timer = clock.timer(lambda: None)
    timer.arm(4)
    assert timer.when == 4
    clock.advance_to(4)
    assert timer.when is None


def test_equal_deadlines_fire_in_the_order_they_were_armed() -> None:
    clock = VirtualClock()
    seen: list[str] = []
    first = clock.timer(lambda: seen.append("first"))
    second = clock.timer(lambda: seen.append("second"))
    second.arm(5)
    first.arm(5)
    clock.advance_to(5)
    assert seen == ["second", "first"]


def test_armed_again_at_the_same_moment_a_timer_goes_to_the_end() -> None:
    clock = VirtualClock()
    seen: list[str] = []
    first = clock.timer(lambda: seen.append("first"))
    second = clock.timer(lambda: seen.append("second"))
    first.arm(5)
    second.arm(5)
    first.disarm()
    first.arm(5)
    clock.advance_to(9)
    assert seen == ["second", "first"]


def test_a_timer_armed_again_forgets_the_moment_before() -> None:
    clock = VirtualClock()
    seen: list[int] = []
    timer = clock.timer(lambda: seen.append(clock.now))
    timer.arm(10)
    timer.arm(40)
    assert clock.next_deadline == 40
    clock.advance_to(100)
    assert seen == [40]


def test_a_callback_may_arm_its_own_timer() -> None:
    clock = VirtualClock()
    seen: list[int] = []

    def again() -> None:
        seen.append(clock.now)
        timer.arm(clock.now + 7)

    timer = clock.timer(again)
    timer.arm(7)
    clock.advance_to(30)
    assert seen == [7, 14, 21, 28]
    assert clock.next_deadline == 35


def test_a_callback_may_disarm_another_timer_of_the_same_moment() -> None:
    clock = VirtualClock()
    seen: list[str] = []
    victim = clock.timer(lambda: seen.append("victim"))
    clock.timer(victim.disarm).arm(3)
    victim.arm(3)
    clock.advance_to(3)
    assert (seen, clock.next_deadline) == ([], NEVER)


def test_disarmed_timers_leave_no_deadline() -> None:
    clock = VirtualClock()
    timer = clock.timer(lambda: None)
    assert clock.next_deadline == NEVER
    timer.disarm()
    timer.arm(10)
    timer.disarm()
    assert (timer.when, clock.next_deadline) == (None, NEVER)


def test_a_moment_that_is_past_fires_at_once_and_time_does_not_run_back() -> None:
    clock = VirtualClock()
    seen: list[int] = []
    clock.advance_to(100)
    clock.timer(lambda: seen.append(clock.now)).arm(50)
    clock.advance_to(100)
    assert (seen, clock.now) == ([100], 100)
    clock.advance_to(20)
    assert clock.now == 100


def test_law_deadlines_agree_with_a_sorted_list() -> None:
    for seed in range(25):
        rng = random.Random(seed)
        clock = VirtualClock()
        fired: list[int] = []
        timers = [clock.timer(partial(fired.append, n)) for n in range(6)]
        model: dict[int, tuple[int, int]] = {}  # timer: when, order of arming
        for step in range(200):
            n = rng.randrange(6)
            if rng.random() < 0.6:
                when = clock.now + rng.randrange(8)
                timers[n].arm(when)
                model[n] = (when, step)
            elif rng.random() < 0.5:
                timers[n].disarm()
                model.pop(n, None)
            else:
                target = clock.now + rng.randrange(10)
                due = sorted((w, o, m) for m, (w, o) in model.items() if w <= target)
                clock.advance_to(target)
                assert fired == [m for _, _, m in due], seed
                fired.clear()
                for _, _, m in due:
                    del model[m]
            earliest = min((when for when, _ in model.values()), default=NEVER)
            assert clock.next_deadline == earliest, seed

"""hw/trace: events in order, for whoever listens."""

import json

import pytest

from cbit.hw.machine import Machine
from cbit.hw.trace import KINDS, Event, Trace


def test_nobody_listens_at_first() -> None:
    assert not Trace().active


def test_a_machine_that_nobody_listens_to_makes_no_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The promise of the module: a truth test is all that silence costs.
    calls = []
    monkeypatch.setattr(Trace, "emit", lambda self, kind, **facts: calls.append(kind))
    machine = Machine(ram=4 << 20, coherent=False)
    machine.cpu.cpuid(0x8000_001F)
    machine.cpu.rdmsr(0xC001_0010)
    machine.bus.store(0x1000, b"x", 0)
    machine.bus.load(0x1000, 1, 1)  # a hazard
    machine.bus.load(0xB_8000, 2, 1)  # the VGA window through C = 1
    machine.cpu.wbinvd()
    machine.reset()
    assert len(machine.caches.hazards_met) == 1
    assert calls == []


def test_events_are_numbered_and_carry_their_facts() -> None:
    trace = Trace()
    heard: list[Event] = []
    trace.listen(heard.append)
    assert trace.active
    trace.emit("rdmsr", index=0xC001_0010, value=1 << 23)
    trace.emit("flush", what="wbinvd")
    assert [event.number for event in heard] == [0, 1]
    assert heard[0].kind == "rdmsr"
    assert heard[0].facts == {"index": 0xC001_0010, "value": 1 << 23}
    assert heard[1].facts == {"what": "wbinvd"}


def test_a_listener_hears_only_its_kinds_and_the_numbers_go_on() -> None:
    trace = Trace()
    everything: list[Event] = []
    flushes: list[Event] = []
    trace.listen(everything.append)
    trace.listen(flushes.append, frozenset({"flush"}))
    for kind in ("cr", "flush", "reset", "flush"):
        trace.emit(kind)
    assert [event.kind for event in everything] == ["cr", "flush", "reset", "flush"]
    assert [event.number for event in flushes] == [1, 3]


def test_a_kind_that_is_not_declared_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="tea-break"):
        Trace().emit("tea-break")
    assert "hazard" in KINDS


def test_json_has_addresses_and_values_in_hex_and_counts_in_decimal() -> None:
    facts = {"pa": 0x20_0000, "pages": 12, "from_slot": 0, "to_slot": 1}
    record = Event(7, "tag-change", facts).as_json()
    assert record == {
        "event": 7,
        "kind": "tag-change",
        "pa": "0x200000",
        "pages": 12,
        "from_slot": 0,
        "to_slot": 1,
    }
    assert json.loads(json.dumps(record)) == record


def test_other_slot_is_a_small_number_like_every_slot() -> None:
    record = Event(0, "hazard", {"what": "stale-line", "other_slot": 1}).as_json()
    assert (record["what"], record["other_slot"]) == ("stale-line", 1)

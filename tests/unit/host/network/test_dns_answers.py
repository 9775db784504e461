import contextlib
from ipaddress import IPv4Address

import pytest
from dnslib import AAAA, EDNS0, HTTPS, QTYPE, RCODE, RR, SOA, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.host.network import dns_answers
from innkeeper.host.network.addressing import is_public
from innkeeper.host.network.upstream import Upstream, parse_resolv_conf


def question(name: str = "Example.ORG", qtype: str = "A", *, payload_bytes: int = 0) -> dns_answers.Question:
    record = DNSRecord.question(name, qtype)
    if payload_bytes:
        record.add_ar(EDNS0(udp_len=payload_bytes))
    return dns_answers.parse_question(record.pack())


@given(st.binary(max_size=600))
def test_any_bytes_are_a_question_or_malformed(packet: bytes) -> None:
    with contextlib.suppress(dns_answers.MalformedQuestionError):
        dns_answers.parse_question(packet)
    answer = dns_answers.refusal(packet, RCODE.FORMERR)
    assert answer is None or answer[:2] == packet[:2]


@given(st.binary(max_size=80), st.integers(0, 60))
def test_a_damaged_question_is_a_question_or_malformed(noise: bytes, place: int) -> None:
    packet = DNSRecord.question("www.example.org").pack()
    with contextlib.suppress(dns_answers.MalformedQuestionError):
        dns_answers.parse_question(packet[:place] + noise + packet[place + len(noise) :])


def test_a_question_is_read() -> None:
    asked = question(payload_bytes=65000)
    assert (asked.name, asked.type_name) == ("example.org", "A")
    assert asked.payload_bytes == dns_answers.UDP_PAYLOAD_BYTES
    assert question().payload_bytes == 512
    assert question(payload_bytes=1).payload_bytes == 512


def test_answers_and_double_questions_are_malformed() -> None:
    with pytest.raises(dns_answers.MalformedQuestionError):
        dns_answers.parse_question(DNSRecord.question("a.b").reply().pack())
    double = DNSRecord.question("a.b")
    double.add_question(DNSRecord.question("c.d").q)
    with pytest.raises(dns_answers.MalformedQuestionError):
        dns_answers.parse_question(double.pack())


@pytest.mark.parametrize(
    ("qtype", "rcode"), [("AAAA", "NOERROR"), ("HTTPS", "NOERROR"), ("ANY", "REFUSED"), ("AXFR", "REFUSED")]
)
def test_what_is_never_asked_upstream(qtype: str, rcode: str) -> None:
    early = dns_answers.early_answer(question(qtype=qtype))
    assert early is not None
    answer = DNSRecord.parse(early)
    assert RCODE[answer.header.rcode] == rcode
    assert not answer.rr


def test_the_query_upstream_is_our_own() -> None:
    asked = question(payload_bytes=4096)
    query = DNSRecord.parse(dns_answers.upstream_query(asked, 77))
    assert query.header.id == 77
    assert str(query.q.qname).lower() == "example.org."
    assert query.ar[0].rclass == dns_answers.UDP_PAYLOAD_BYTES


def test_a_reply_must_belong_to_the_question() -> None:
    asked = question()
    query = DNSRecord.parse(dns_answers.upstream_query(asked, 77))
    assert dns_answers.parse_reply(query.reply().pack(), asked, 77).header.id == 77
    for packet, message_id in (
        (query.reply().pack(), 78),
        (query.pack(), 77),
        (b"\0" * 5, 77),
        (DNSRecord.question("other.org").reply().pack(), None),
    ):
        expected = int.from_bytes(packet[:2], "big") if message_id is None else message_id
        with pytest.raises(ValueError):
            dns_answers.parse_reply(packet, asked, expected)


def test_private_addresses_are_taken_out() -> None:
    asked = question()
    reply = DNSRecord.question("example.org").reply()
    for address in ("93.184.216.34", "10.0.0.1", "169.254.169.254"):
        reply.add_answer(RR("example.org", QTYPE.A, rdata=A(address), ttl=9))
    reply.add_answer(RR("example.org", QTYPE.AAAA, rdata=AAAA("2001:db8::1")))
    reply.add_answer(RR("example.org", QTYPE.HTTPS, rdata=HTTPS(1, [], [])))
    reply.add_auth(RR("example.org", QTYPE.SOA, rdata=SOA("a", "b", (1, 2, 3, 4, 5))))
    reply.add_auth(RR("example.org", QTYPE.A, rdata=A("10.0.0.2")))
    reply.add_ar(RR("extra.example.org", QTYPE.A, rdata=A("10.0.0.3")))
    filtered = dns_answers.filtered(asked, reply, is_public)
    assert filtered.withheld == (IPv4Address("10.0.0.1"), IPv4Address("169.254.169.254"))
    answer = DNSRecord.parse(filtered.packet)
    assert [str(record.rdata) for record in answer.rr] == ["93.184.216.34"]
    assert [record.rtype for record in answer.auth] == [QTYPE.SOA]
    assert answer.ar == []
    assert answer.header.id == asked.message_id


def test_what_does_not_fit_udp_is_cut() -> None:
    asked = question()
    reply = DNSRecord.question("example.org").reply()
    for number in range(60):
        reply.add_answer(RR("example.org", QTYPE.A, rdata=A(f"93.184.216.{number}")))
    whole = dns_answers.filtered(asked, reply, is_public).packet
    cut = dns_answers.for_udp(asked, whole)
    assert len(whole) > 512 >= len(cut)
    assert DNSRecord.parse(cut).header.tc
    large = question(payload_bytes=1232)
    assert dns_answers.for_udp(large, whole) == whole


def test_resolv_conf() -> None:
    text = "# nameserver 1.1.1.1\nsearch x\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver nonsense\n"
    assert parse_resolv_conf(text) == [Upstream("127.0.0.53"), Upstream("fe80::1%eth0")]
    assert parse_resolv_conf("options edns0\n") == [Upstream("127.0.0.1")]


def test_a_question_with_answers_in_it_is_malformed() -> None:
    record = DNSRecord.question("a.b")
    for number in range(dns_answers.QUESTION_RECORDS + 1):
        record.add_answer(RR("a.b", QTYPE.A, rdata=A(f"8.8.8.{number}")))
    with pytest.raises(dns_answers.MalformedQuestionError):
        dns_answers.parse_question(record.pack())


def test_an_answer_of_any_size_is_not_read() -> None:
    asked = question()
    reply = DNSRecord.parse(dns_answers.upstream_query(asked, 77)).reply()
    for number in range(1_500):
        reply.add_answer(RR("example.org", QTYPE.A, rdata=A(f"8.8.{number // 250}.{number % 250}")))
    with pytest.raises(ValueError, match="bytes"):
        dns_answers.parse_reply(reply.pack(), asked, 77)

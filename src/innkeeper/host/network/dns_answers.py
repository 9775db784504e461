"""What a guest may ask and what it may be told: pure functions of DNS messages."""

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address

import dnslib  # type: ignore[import-untyped]
from dnslib import CLASS, EDNS0, QTYPE, RCODE, DNSHeader, DNSQuestion, DNSRecord

from innkeeper.host.network.dns_message import read_message

# Larger UDP answers would be fragmented; this is the size that resolvers agreed on in 2020.
UDP_PAYLOAD_BYTES = 1232
UDP_PLAIN_BYTES = 512
# A question is a name of at most 255 bytes, perhaps with EDNS options beside it.
QUESTION_BYTES = 1232
QUESTION_RECORDS = 4
# What a zone may answer costs the daemon time, and the zone may be the guest's own: the largest answer takes 30 ms.
REPLY_BYTES = 16_384
REPLY_RECORDS = 1_024

# Answered as if there were no such records: AAAA, because guests have no IPv6; SVCB and HTTPS, because their hints carry
# addresses past the filter and their keys hide from the firewall which name a connection is for.
EMPTY_TYPES = frozenset({QTYPE.AAAA, QTYPE.SVCB, QTYPE.HTTPS})
REFUSED_TYPES = frozenset({QTYPE.ANY, QTYPE.AXFR, QTYPE.IXFR})
IN_CLASS = CLASS.reverse["IN"]


class MalformedQuestionError(ValueError):
    """Not one DNS question."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a guest; `name` is lower case, without the last dot."""

    message_id: int
    name: str
    qtype: int
    qclass: int
    opcode: int
    recursion_desired: bool
    payload_bytes: int
    edns: bool
    asked: DNSQuestion

    @property
    def type_name(self) -> str:
        """`A`, `MX`, or `TYPE65280`."""
        name = QTYPE.forward.get(self.qtype)
        return str(name) if name else f"TYPE{self.qtype}"


def parse_question(packet: bytes) -> Question:
    """Read a guest's packet, which may be anything. Raises MalformedQuestionError."""
    try:
        record = read_message(packet, max_bytes=QUESTION_BYTES, max_records=QUESTION_RECORDS)
        if record.header.qr or len(record.questions) != 1:
            raise MalformedQuestionError("not one question")
        asked = record.questions[0]
        options = [extra for extra in record.ar if extra.rtype == QTYPE.OPT]
        return Question(
            message_id=record.header.id,
            name=str(asked.qname).rstrip(".").lower(),
            qtype=asked.qtype,
            qclass=asked.qclass,
            opcode=record.header.opcode,
            recursion_desired=bool(record.header.rd),
            payload_bytes=max(UDP_PLAIN_BYTES, min(options[0].rclass, UDP_PAYLOAD_BYTES))
            if options
            else UDP_PLAIN_BYTES,
            edns=bool(options),
            asked=asked,
        )
    except MalformedQuestionError:
        raise
    except Exception as error:  # dnslib raises whatever the bytes provoke
        raise MalformedQuestionError(f"{type(error).__name__}: {error}") from error


def refusal(packet: bytes, rcode: int) -> bytes | None:
    """The shortest answer to a packet that may be malformed; None when it has not even a header."""
    if len(packet) < 12 or packet[2] & 0x80:
        return None
    header = DNSHeader(id=int.from_bytes(packet[:2], "big"), qr=1, ra=1, rcode=rcode)
    return bytes(DNSRecord(header).pack())


def early_answer(question: Question) -> bytes | None:
    """The answer to what is never asked upstream, or None."""
    if question.opcode != 0:
        return answer(question, rcode=RCODE.NOTIMP)
    if question.qclass != IN_CLASS or question.qtype in REFUSED_TYPES:
        return answer(question, rcode=RCODE.REFUSED)
    if question.qtype in EMPTY_TYPES:
        return answer(question)
    return None


def upstream_query(question: Question, message_id: int) -> bytes:
    """The question in our own words: nothing of the guest's packet goes upstream but name and type."""
    record = DNSRecord(
        DNSHeader(id=message_id, rd=1), q=DNSQuestion(question.asked.qname, question.qtype, question.qclass)
    )
    record.add_ar(EDNS0(udp_len=UDP_PAYLOAD_BYTES))
    return bytes(record.pack())


def parse_reply(packet: bytes, question: Question, message_id: int) -> DNSRecord:
    """An upstream's packet, checked to belong to the question. Raises ValueError when it does not, or is larger than we read."""
    try:
        record = read_message(packet, max_bytes=REPLY_BYTES, max_records=REPLY_RECORDS)
    except Exception as error:
        raise ValueError(f"unreadable reply: {error}") from error
    if record.header.id != message_id or not record.header.qr:
        raise ValueError("a reply to something else")
    if record.questions:
        told = record.questions[0]
        if told.qtype != question.qtype or str(told.qname).rstrip(".").lower() != question.name:
            raise ValueError("a reply to another question")
    return record


@dataclass(frozen=True, slots=True)
class Filtered:
    """An answer for the guest, and the addresses that were taken out of it."""

    packet: bytes
    withheld: tuple[IPv4Address, ...]


def filtered(question: Question, reply: DNSRecord, allowed: Callable[[IPv4Address], bool]) -> Filtered:
    """The upstream's answer section without addresses that the guest may not have.

    A public name that points into a private network (DNS rebinding) tells nothing and leads nowhere.
    """
    kept, withheld = [], []
    for record in reply.rr:
        if record.rtype in EMPTY_TYPES:
            continue
        if record.rtype == QTYPE.A:
            address = IPv4Address(bytes(record.rdata.data))
            if not allowed(address):
                withheld.append(address)
                continue
        kept.append(record)
    # The authority section holds the SOA that says how long "there is none" may be remembered.
    authority = [record for record in reply.auth if record.rtype == QTYPE.SOA]
    return Filtered(answer(question, rcode=reply.header.rcode, records=kept, authority=authority), tuple(withheld))


def answer(
    question: Question,
    *,
    rcode: int = RCODE.NOERROR,
    records: list[dnslib.RR] | None = None,
    authority: list[dnslib.RR] | None = None,
    truncated: bool = False,
) -> bytes:
    """A packet that answers the question."""
    header = DNSHeader(
        id=question.message_id,
        opcode=question.opcode,
        qr=1,
        ra=1,
        rd=int(question.recursion_desired),
        tc=int(truncated),
        rcode=rcode,
    )
    record = DNSRecord(header, q=question.asked, rr=list(records or []), auth=list(authority or []))
    if question.edns:
        record.add_ar(EDNS0(udp_len=UDP_PAYLOAD_BYTES))
    return bytes(record.pack())


def for_udp(question: Question, packet: bytes) -> bytes:
    """The packet as it is when it fits the guest's UDP size, else one that says: ask again over TCP."""
    return packet if len(packet) <= question.payload_bytes else answer(question, truncated=True)

//! A blocking netlink socket that is open for one call: requests, dumps, and batches of changes.

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink may say more than is asked")]

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

use crate::Errno;

/// More than any datagram of a dump: the kernel makes none over 32 KiB (`netlink_dump` in net/netlink).
const RECEIVE_BYTES: usize = 64 * 1024;

/// Orders sent at once. Even if each is refused, the answers fit the socket's default receive buffer.
const REQUESTS_PER_SEND_MAX: usize = 64;

/// How often a dump is tried before it fails.
const DUMPS: usize = 10;

/// Why a dump failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DumpError {
    /// Each of so many tries was interrupted by concurrent changes.
    Interrupted(usize),
    Refused(Errno),
}

pub(super) struct Channel {
    socket: Socket,
    received: Vec<u8>,
    sequence: u32,
}

impl Channel {
    /// Opens a socket of `protocol` (linux/netlink.h) in the network namespace of the calling thread.
    pub(super) fn open(protocol: isize) -> Result<Self, Errno> {
        let socket = Socket::new(protocol).map_err(errno)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(errno)?;
        // An error answer repeats the request unless this is switched off.
        socket.set_cap_ack(true).map_err(errno)?;
        Ok(Self { socket, received: vec![0; RECEIVE_BYTES], sequence: 0 })
    }

    /// Makes the kernel apply the filters of a dump (Linux 4.20), so that only a domain's entries are transferred.
    pub(super) fn filtered(self) -> Result<Self, Errno> {
        self.socket.set_netlink_get_strict_chk(true).map_err(errno)?;
        Ok(self)
    }

    /// Requests one object.
    pub(super) fn get<I>(&mut self, question: I) -> Result<I, Errno>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<I>>,
    {
        self.send([(question, 0)])?;
        loop {
            for answer in self.receive::<I>()?.into_iter().filter(|answer| self.is_current(answer)) {
                match answer.payload {
                    NetlinkPayload::InnerMessage(answer) => return Ok(answer),
                    NetlinkPayload::Error(error) => return Err(answer_errno(error.raw_code())),
                    _ => {}
                }
            }
        }
    }

    /// Requests a dump of a table, and calls `take` to add each entry to the result as it is received: the raw entries
    /// are ten times as large. The result is a consistent snapshot, or an error.
    pub(super) fn dump<Q, A, T: Default>(&mut self, question: &Q, take: impl Fn(&mut T, A)) -> Result<T, DumpError>
    where
        Q: NetlinkSerializable + Into<NetlinkPayload<Q>> + Clone,
        A: NetlinkDeserializable,
    {
        for _ in 0..DUMPS {
            if let Some(table) = self.dump_once(question.clone(), &take).map_err(DumpError::Refused)? {
                return Ok(table);
            }
        }
        Err(DumpError::Interrupted(DUMPS))
    }

    /// `None` if the table changed meanwhile. Reads to the end then, too: remaining messages would be taken for the
    /// answer to the next request.
    fn dump_once<Q, A, T: Default>(&mut self, question: Q, take: impl Fn(&mut T, A)) -> Result<Option<T>, Errno>
    where
        Q: NetlinkSerializable + Into<NetlinkPayload<Q>>,
        A: NetlinkDeserializable,
    {
        self.send([(question, NLM_F_DUMP)])?;
        let (mut table, mut whole) = (T::default(), true);
        loop {
            for answer in self.receive::<A>()?.into_iter().filter(|answer| self.is_current(answer)) {
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(entry) => take(&mut table, entry),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok(whole.then_some(table)),
                    NetlinkPayload::Done(done) => return Err(answer_errno(done.code)),
                    NetlinkPayload::Error(error) => return Err(answer_errno(error.raw_code())),
                    _ => {}
                }
            }
        }
    }

    /// Sends requests, each with its flags, in their order, and returns the kernel's answer to each.
    pub(super) fn request_batch<I>(&mut self, requests: impl IntoIterator<Item = (I, u16)>) -> Vec<Result<(), Errno>>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<I>>,
    {
        let mut requests = requests.into_iter();
        let mut results = Vec::new();
        loop {
            let chunk: Vec<_> = requests.by_ref().take(REQUESTS_PER_SEND_MAX).collect();
            if chunk.is_empty() {
                return results;
            }
            let count = chunk.len();
            results.extend(self.request_chunk(chunk).unwrap_or_else(|error| vec![Err(error); count]));
        }
    }

    /// The kernel executes all requests of one send before it returns, and always answers a refused one; so the
    /// acknowledgement of the last request stands for all that were not refused.
    fn request_chunk<I>(&mut self, mut requests: Vec<(I, u16)>) -> Result<Vec<Result<(), Errno>>, Errno>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<I>>,
    {
        let mut results = vec![Ok(()); requests.len()];
        if let Some((_, flags)) = requests.last_mut() {
            *flags |= NLM_F_ACK;
        }
        let first = self.send(requests)?;
        loop {
            for answer in self.receive::<I>()? {
                let index = answer.header.sequence_number.wrapping_sub(first) as usize;
                let (NetlinkPayload::Error(error), Some(result)) = (&answer.payload, results.get_mut(index)) else {
                    continue;
                };
                if error.code.is_some() {
                    *result = Err(answer_errno(error.raw_code()));
                }
                if self.is_current(&answer) {
                    return Ok(results);
                }
            }
        }
    }

    /// Sends messages as one datagram and gives the sequence number of the first; the last has `self.sequence`.
    fn send<I>(&mut self, messages: impl IntoIterator<Item = (I, u16)>) -> Result<u32, Errno>
    where
        I: NetlinkSerializable + Into<NetlinkPayload<I>>,
    {
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::new();
        for (message, flags) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message = NetlinkMessage::new(netlink_packet_core::NetlinkHeader::default(), message.into());
            message.header.flags = NLM_F_REQUEST | flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = datagram.len();
            datagram.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut datagram[start..]);
        }
        self.socket.send(&datagram, 0).map_err(errno)?;
        Ok(first)
    }

    fn receive<I: NetlinkDeserializable>(&mut self) -> Result<Vec<NetlinkMessage<I>>, Errno> {
        let length = loop {
            match self.socket.recv(&mut &mut self.received[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map_err(errno)?,
            }
        };
        messages(self.received.get(..length).ok_or(Errno::EIO)?)
    }

    fn is_current<I>(&self, answer: &NetlinkMessage<I>) -> bool {
        answer.header.sequence_number == self.sequence
    }
}

/// The messages of a datagram.
pub(super) fn messages<I: NetlinkDeserializable>(mut datagram: &[u8]) -> Result<Vec<NetlinkMessage<I>>, Errno> {
    let mut messages = Vec::new();
    while !datagram.is_empty() {
        let message = NetlinkMessage::deserialize(datagram).map_err(|error| {
            tracing::warn!(%error, "netlink answer unreadable");
            Errno::EIO
        })?;
        let length = (message.header.length as usize).next_multiple_of(4);
        datagram = datagram.get(length..).unwrap_or_default();
        messages.push(message);
    }
    Ok(messages)
}

/// Netlink answers with error numbers below zero.
fn answer_errno(code: i32) -> Errno {
    Errno::from_raw(code.saturating_neg())
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

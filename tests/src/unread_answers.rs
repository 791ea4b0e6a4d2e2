//! Clients that send requests and do not read the answers.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use crate::DEADLINE;

/// The number of requests that such a client sends without waiting for an answer.
pub const PIPELINED: usize = 4_000;

/// [`PIPELINED`] requests for `path`, one behind the other.
#[must_use]
pub fn pipelined(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: broker\r\n\r\n").repeat(PIPELINED).into_bytes()
}

/// Sends as many of `requests` as the socket takes without blocking, and reads one byte of the first answer: then the
/// server has begun to process them. `socket` returns the stream's socket.
pub fn pile_up<S: Read + Write>(stream: &mut S, socket: impl Fn(&S) -> &TcpStream, requests: &[u8]) {
    socket(stream).set_nonblocking(true).expect("an option");
    if let Err(error) = stream.write_all(requests) {
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
    }
    socket(stream).set_nonblocking(false).expect("an option");
    socket(stream).set_read_timeout(Some(DEADLINE)).expect("an option");
    stream.read_exact(&mut [0]).expect("the beginning of an answer");
}
